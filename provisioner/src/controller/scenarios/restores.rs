//! Claims whose volumes are to hold data: of a snapshot, or of another claim.

use super::super::calls::clear;
use super::super::claim::{concerned_by_node, concerned_by_snapshot, reconcile};
use super::super::error::Row;
use super::super::nodes::News;
use super::super::queue::Action;
use super::super::snapshot::SnapshotName;
use super::*;
use kube::runtime::reflector::ObjectRef;
use lvprov_proto::csi::volume_content_source::Type;
use tonic::Status;

const NEW_UID: &str = "9f9e7f9a-1111-4222-8333-444455556666";
const NEW_VOLUME: &str = "pvc-9f9e7f9a-1111-4222-8333-444455556666";
const NEW_PATH: &str = "/api/v1/namespaces/shop/persistentvolumeclaims/again";
const SNAPSHOT_PATH: &str = "/apis/snapshot.storage.k8s.io/v1/namespaces/shop/volumesnapshots/before";

fn content_path() -> String {
    format!("/apis/snapshot.storage.k8s.io/v1/volumesnapshotcontents/{CONTENT}")
}

/// A claim that no pod uses yet, so that no node is selected.
fn restored() -> Value {
    let mut claim = claim();
    claim["metadata"]["name"] = json!("again");
    claim["metadata"]["uid"] = json!(NEW_UID);
    claim["metadata"]["annotations"] = json!({});
    claim["spec"]["storageClassName"] = json!("fast-csi");
    let source = json!({"apiGroup": "snapshot.storage.k8s.io", "kind": "VolumeSnapshot", "name": "before"});
    claim["spec"]["dataSource"] = source.clone();
    claim["spec"]["dataSourceRef"] = source;
    claim
}

fn cloned() -> Value {
    let mut claim = restored();
    let source = json!({"kind": "PersistentVolumeClaim", "name": "data-db-0"});
    claim["spec"]["dataSource"] = source.clone();
    claim["spec"]["dataSourceRef"] = source;
    claim
}

/// The claim that is cloned, bound.
fn source_claim() -> Value {
    let mut claim = claim();
    claim["spec"]["volumeName"] = json!(VOLUME);
    claim["status"] = json!({"phase": "Bound"});
    claim
}

fn with_source() -> World {
    World { claims: vec![source_claim()], volumes: vec![csi_volume("Bound")], ..with_node() }
}

fn snapshot() -> Value {
    json!({
        "apiVersion": "snapshot.storage.k8s.io/v1",
        "kind": "VolumeSnapshot",
        "metadata": {"name": "before", "namespace": "shop", "uid": SNAPSHOT_UID},
        "spec": {"source": {"persistentVolumeClaimName": "data-db-0"}},
        "status": {"boundVolumeSnapshotContentName": CONTENT, "readyToUse": true, "restoreSize": "1Gi"},
    })
}

fn run(scene: &Scene, claim: Value) -> tokio::task::JoinHandle<Result<Action, super::super::error::Error>> {
    tokio::spawn(reconcile(parsed(claim), scene.ctx.clone()))
}

/// Snapshot and content are read, as these.
async fn expect_source(api: &mut ApiServer, snapshot: Value, content: Value) {
    api.expect("GET", SNAPSHOT_PATH).await.answer(200, snapshot);
    api.expect("GET", &content_path()).await.answer(200, content);
}

/// A claim of this world ends with such an Event; its text.
async fn told(scene: &mut Scene, claim: Value, source: Option<(Value, Value)>, reason: &str) -> (String, Action) {
    let running = run(scene, claim);
    if let Some((snapshot, content)) = source {
        expect_source(&mut scene.api, snapshot, content).await;
    }
    let note = scene.api.expect_event("shop", reason).await;
    let action = running.await.unwrap().unwrap();
    scene.api.expect_nothing_more().await;
    (note, action)
}

/// A PV is made for the claim, with its volume on n1.
async fn expect_pv(api: &mut ApiServer) {
    let asked = api.expect("POST", "/api/v1/persistentvolumes").await;
    let spec = &asked.body["spec"];
    assert_eq!(asked.body["metadata"]["name"], NEW_VOLUME);
    assert_eq!(spec["csi"]["volumeHandle"], format!("vg0/{NEW_VOLUME}"));
    assert_eq!(spec["claimRef"]["uid"], NEW_UID);
    assert_eq!(spec["nodeAffinity"], csi_volume("")["spec"]["nodeAffinity"]);
    let made = asked.body.clone();
    asked.answer(201, made);
    api.expect_event("shop", "ProvisioningSucceeded").await;
}

#[tokio::test]
async fn a_volume_is_made_from_a_snapshot_where_that_is_and_no_scheduler_is_waited_for() {
    for selected in [None, Some("n1"), Some("n2")] {
        let mut scene = Scene::new(with_node()).await;
        let mut claim = restored();
        if let Some(node) = selected {
            claim["metadata"]["annotations"]["volume.kubernetes.io/selected-node"] = json!(node);
        }
        let running = run(&scene, claim);
        expect_source(&mut scene.api, snapshot(), ready_content()).await;
        expect_pv(&mut scene.api).await;
        running.await.unwrap().unwrap();
        scene.api.expect_nothing_more().await;
        let asked = scene.node.created().remove(0);
        let Some(Type::Snapshot(source)) = asked.volume_content_source.unwrap().r#type else { panic!("no snapshot") };
        assert_eq!(source.snapshot_id, SNAPSHOT_ID);
        assert_eq!(scene.node.meant(), ["n1"]);
        assert!(scene.ctx.calls.unknown().is_empty());
    }
}

#[tokio::test]
async fn a_claim_is_cloned_where_it_is() {
    let mut scene = Scene::new(with_source()).await;
    let running = run(&scene, cloned());
    expect_pv(&mut scene.api).await;
    running.await.unwrap().unwrap();
    let asked = scene.node.created().remove(0);
    let Some(Type::Volume(source)) = asked.volume_content_source.unwrap().r#type else { panic!("no volume") };
    assert_eq!(source.volume_id, format!("vg0/{VOLUME}"));
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn no_pv_is_made_of_a_volume_that_an_older_node_has_left_empty() {
    let mut scene = Scene::new(with_source()).await;
    scene.node.leave_empty();
    let error = run(&scene, cloned()).await.unwrap().unwrap_err().to_string();
    assert!(error.contains("what is in it") && error.contains("same version"), "{error}");
    scene.api.expect_nothing_more().await;
    // It is removed with its claim.
    assert_eq!(scene.ctx.calls.unknown().len(), 1);
}

#[tokio::test]
async fn a_volume_may_be_larger_than_its_source_and_as_large_in_whole_extents() {
    let mut scene = Scene::new(with_node()).await;
    let mut claim = restored();
    // The snapshot has a whole number of extents of 4 MiB.
    claim["spec"]["resources"]["requests"]["storage"] = json!("1073000000");
    let running = run(&scene, claim);
    expect_source(&mut scene.api, snapshot(), ready_content()).await;
    expect_pv(&mut scene.api).await;
    running.await.unwrap().unwrap();
    let mut large = restored();
    large["spec"]["resources"]["requests"]["storage"] = json!("2Gi");
    let mut scene = Scene::new(with_node()).await;
    let running = run(&scene, large);
    expect_source(&mut scene.api, snapshot(), ready_content()).await;
    expect_pv(&mut scene.api).await;
    running.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_does_not_go_with_its_source_is_refused_and_nothing_made() {
    let mut small = restored();
    small["spec"]["resources"]["requests"]["storage"] = json!("512Mi");
    let mut block = restored();
    block["spec"]["volumeMode"] = json!("Block");
    let mut others = ready_content();
    others["spec"]["driver"] = json!("other.example");
    let mut misbound = ready_content();
    misbound["spec"]["volumeSnapshotRef"]["uid"] = json!("another");
    let mut elsewhere = ready_content();
    elsewhere["spec"]["volumeSnapshotRef"]["namespace"] = json!("bank");
    for (claim, content, words) in [
        (small, ready_content(), "needs 1 GiB, and the claim asks for 512 MiB"),
        (block, ready_content(), "volumeMode Filesystem, and the claim has volumeMode Block"),
        (restored(), others, "driver other.example"),
        (restored(), misbound, "is not bound to VolumeSnapshot shop/before"),
        (restored(), elsewhere, "but to bank/before"),
    ] {
        let mut scene = Scene::new(with_node()).await;
        let (note, _) = told(&mut scene, claim, Some((snapshot(), content)), "ClaimRefused").await;
        assert!(note.contains(words), "{note}");
        assert!(scene.node.created().is_empty());
    }
}

#[tokio::test]
async fn a_claim_that_cannot_be_cloned_says_why() {
    let small = || {
        let mut claim = cloned();
        claim["spec"]["resources"]["requests"]["storage"] = json!("512Mi");
        claim
    };
    let block = || {
        let mut claim = cloned();
        claim["spec"]["volumeMode"] = json!("Block");
        claim
    };
    let mut foreign = csi_volume("Bound");
    foreign["metadata"]["annotations"] = json!({});
    let unbound = || {
        let mut claim = source_claim();
        claim["spec"].as_object_mut().unwrap().remove("volumeName");
        claim["status"] = json!({"phase": "Pending"});
        claim
    };
    let world = |claims: Vec<Value>, volume: Value| World { claims, volumes: vec![volume], ..with_node() };
    for (claim, world, reason, words) in [
        (small(), with_source(), "ClaimRefused", "needs 1 GiB, and the claim asks for 512 MiB"),
        (block(), with_source(), "ClaimRefused", "is of volumeMode Filesystem"),
        (cloned(), world(vec![source_claim()], volume("Bound")), "ClaimRefused", "has a FlexVolume"),
        (cloned(), world(vec![source_claim()], foreign), "ClaimRefused", "is not of lvprov"),
        (cloned(), world(vec![unbound()], csi_volume("Bound")), "DataNotReady", "has no volume yet"),
        (cloned(), world(vec![], csi_volume("Bound")), "DataNotReady", "there is no claim shop/data-db-0"),
    ] {
        let mut scene = Scene::new(world).await;
        let (note, action) = told(&mut scene, claim, None, reason).await;
        assert!(note.contains(words), "{note}");
        assert_ne!(action, Action::await_change());
        assert!(scene.node.created().is_empty());
    }
}

#[tokio::test]
async fn a_class_of_flexvolumes_and_a_populators_claim_are_told_apart_from_each_other() {
    let mut flex = restored();
    flex["spec"]["storageClassName"] = json!("fast");
    let mut scene = Scene::new(with_node()).await;
    let (note, action) = told(&mut scene, flex, None, "ClaimRefused").await;
    assert!(note.contains("source: csi") && action == Action::await_change(), "{note}");

    let mut populated = restored();
    populated["spec"].as_object_mut().unwrap().remove("dataSource");
    populated["spec"]["dataSourceRef"] = json!({"apiGroup": "hello.example", "kind": "Hello", "name": "h"});
    populated["metadata"]["annotations"]["volume.kubernetes.io/selected-node"] = json!("n1");
    let (note, action) = told(&mut scene, populated, None, "LeftToPopulator").await;
    assert!(note.contains("Hello h of hello.example") && action == Action::await_change(), "{note}");

    let mut across = restored();
    across["spec"]["dataSourceRef"]["namespace"] = json!("bank");
    let (note, _) = told(&mut scene, across, None, "ClaimRefused").await;
    assert!(note.contains("namespace bank"), "{note}");
    assert!(scene.node.created().is_empty());
}

#[tokio::test]
async fn a_snapshot_that_is_not_ready_is_waited_for_without_a_busy_loop() {
    let mut unready = snapshot();
    unready["status"] = json!({"readyToUse": false, "error": {"message": "200 MiB are missing"}});
    let mut scene = Scene::new(World { claims: vec![restored()], ..with_node() }).await;
    let running = run(&scene, restored());
    scene.api.expect("GET", SNAPSHOT_PATH).await.answer(200, unready);
    let note = scene.api.expect_event("shop", "DataNotReady").await;
    assert!(note.contains("not ready to use: 200 MiB are missing"), "{note}");
    assert_ne!(running.await.unwrap().unwrap(), Action::await_change());
    // Whatever brings it up before its time: nobody is asked.
    assert_ne!(run(&scene, restored()).await.unwrap().unwrap(), Action::await_change());
    scene.api.expect_nothing_more().await;
    // But for the snapshot itself.
    let named = |name: &str| SnapshotName { namespace: "shop".into(), name: name.into() };
    assert!(concerned_by_snapshot(Some(&named("other")), &scene.ctx).is_empty());
    let concerned = concerned_by_snapshot(Some(&named("before")), &scene.ctx);
    assert_eq!(concerned, [ObjectRef::new("again").within("shop")]);
    let running = run(&scene, restored());
    expect_source(&mut scene.api, snapshot(), ready_content()).await;
    expect_pv(&mut scene.api).await;
    running.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_snapshot_that_is_not_there_or_goes_is_told_of() {
    let mut scene = Scene::new(with_node()).await;
    let running = run(&scene, restored());
    scene.api.expect("GET", SNAPSHOT_PATH).await.refuse(404, "NotFound");
    assert!(scene.api.expect_event("shop", "DataNotReady").await.contains("there is no VolumeSnapshot shop/before"));
    running.await.unwrap().unwrap();

    let mut scene = Scene::new(with_node()).await;
    let running = run(&scene, restored());
    scene.api.expect("GET", SNAPSHOT_PATH).await.refuse(403, "Forbidden");
    assert!(scene.api.expect_event("shop", "DataNotReady").await.contains("deploy/snapshots"));
    running.await.unwrap().unwrap();

    let mut going = snapshot();
    going["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    let mut scene = Scene::new(with_node()).await;
    let running = run(&scene, restored());
    scene.api.expect("GET", SNAPSHOT_PATH).await.answer(200, going);
    assert!(scene.api.expect_event("shop", "DataNotReady").await.contains("is being deleted"));
    running.await.unwrap().unwrap();

    // Where there can be none, nobody is asked.
    for (presence, words) in [
        (Presence::NotInstalled, "install the snapshot-controller"),
        (Presence::Forbidden, "kubectl apply -f deploy/snapshots"),
    ] {
        let mut scene = Scene::new(with_node()).await;
        scene.ctx.snapshots.set_presence(presence);
        let (note, action) = told(&mut scene, restored(), None, "DataNotReady").await;
        assert!(note.contains(words), "{note}");
        assert_ne!(action, Action::await_change());
    }
}

#[tokio::test]
async fn a_node_without_room_keeps_the_claim_until_its_room_changes() {
    let mut claim = restored();
    claim["metadata"]["annotations"]["volume.kubernetes.io/selected-node"] = json!("n1");
    let mut scene = Scene::new(World { claims: vec![claim.clone()], ..with_node() }).await;
    scene.node.refuse(Status::resource_exhausted("5 GiB are missing"));
    let source = || Some((snapshot(), ready_content()));
    // No hand-back: the API server is asked nothing more.
    let (note, action) = told(&mut scene, claim.clone(), source(), "NotEnoughSpace").await;
    assert!(note.contains("5 GiB are missing") && note.contains("VolumeSnapshot before is on node n1"), "{note}");
    assert_ne!(action, Action::await_change());
    let capacity = |node: &str| News::Capacity(node.into());
    assert!(concerned_by_node(Some(&capacity("n2")), &scene.ctx).is_empty());
    assert!(scene.ctx.failures.left(NEW_UID, Row::Attempts).is_some());
    assert_eq!(concerned_by_node(Some(&capacity("n1")), &scene.ctx), [ObjectRef::new("again").within("shop")]);
    assert!(concerned_by_node(Some(&capacity("n1")), &scene.ctx).is_empty());
    scene.node.serve();
    let running = run(&scene, claim);
    expect_source(&mut scene.api, snapshot(), ready_content()).await;
    expect_pv(&mut scene.api).await;
    running.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_source_on_a_node_that_has_gone_or_is_silent_is_waited_for() {
    let mut elsewhere = ready_content();
    elsewhere["status"]["snapshotHandle"] = json!("n9/vg0/snap-1");
    let mut scene = Scene::new(with_node()).await;
    let (note, _) = told(&mut scene, restored(), Some((snapshot(), elsewhere)), "NodeGone").await;
    assert!(note.contains("n9"), "{note}");

    let mut scene = Scene::new(World { claims: vec![restored()], ..with_node() }).await;
    let since = std::time::Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
    scene.node_is(State::Down { since, why: "refused".into() });
    let (note, action) = told(&mut scene, restored(), Some((snapshot(), ready_content())), "NodeUnreachable").await;
    assert!(note.contains("refused"), "{note}");
    assert_ne!(action, Action::await_change());
    assert!(scene.node.created().is_empty());
    let up = News::Up("n1".into());
    assert_eq!(concerned_by_node(Some(&up), &scene.ctx), [ObjectRef::new("again").within("shop")]);
}

#[tokio::test]
async fn a_class_that_does_not_allow_the_sources_node_is_refused_with_its_name() {
    let mut scene = Scene::new(with_source()).await;
    let mut zoned = csi_class();
    zoned["allowedTopologies"] = json!([{"matchLabelExpressions": [{"key": "zone", "values": ["a"]}]}]);
    Arc::get_mut(&mut scene.ctx).unwrap().classes = watched::<StorageClass>(vec![zoned]);
    let (note, _) = told(&mut scene, cloned(), None, "NodeNotAllowed").await;
    assert!(note.contains("node n1") && note.contains("zone in [a]"), "{note}");
    assert!(scene.node.created().is_empty());
}

#[tokio::test]
async fn a_copy_under_way_is_asked_for_again_and_told_of() {
    let mut scene = Scene::new(with_source()).await;
    scene.node.refuse(Status::aborted("40% of it is copied"));
    let (note, action) = told(&mut scene, cloned(), None, "ProvisioningFailed").await;
    assert!(note.contains("40% of it is copied"), "{note}");
    assert_ne!(action, Action::await_change());
    assert_eq!(scene.ctx.calls.unknown().len(), 1);
}

#[tokio::test]
async fn a_claim_deleted_in_the_middle_of_a_copy_leaves_no_volume() {
    for (refusal, reason) in [
        (Status::aborted("40% of it is copied"), "ProvisioningFailed"),
        (Status::resource_exhausted("the pool is full"), "NotEnoughSpace"),
    ] {
        let mut scene = Scene::new(with_source()).await;
        scene.node.refuse(refusal);
        told(&mut scene, cloned(), None, reason).await;
        scene.node.serve();
        let ctx = scene.ctx.clone();
        let clearing = tokio::spawn(async move { clear(&ctx).await });
        scene.api.expect("GET", NEW_PATH).await.refuse(404, "NotFound");
        scene.api.expect("GET", &format!("/api/v1/persistentvolumes/{NEW_VOLUME}")).await.refuse(404, "NotFound");
        clearing.await.unwrap();
        assert_eq!(scene.node.deleted(), [format!("vg0/{NEW_VOLUME}")]);
        assert!(scene.ctx.calls.unknown().is_empty());
    }
}

#[tokio::test]
async fn what_the_node_says_of_the_two_sizes_or_modes_is_told() {
    for refusal in [Status::out_of_range("the claim is smaller"), Status::invalid_argument("it holds ext4")] {
        let mut scene = Scene::new(with_source()).await;
        scene.node.refuse(refusal.clone());
        let (note, _) = told(&mut scene, cloned(), None, "ClaimRefused").await;
        assert!(note.contains(refusal.message()), "{note}");
        // Nothing was made, and what is there is not this claim's.
        assert!(scene.ctx.calls.unknown().is_empty());
    }
}

#[tokio::test]
async fn a_restore_finds_out_that_its_snapshot_is_lost() {
    let mut scene = Scene::new(with_node()).await;
    scene.node.refuse(Status::failed_precondition("its space has overflowed"));
    scene.node.lose_snapshots();
    let running = run(&scene, restored());
    expect_source(&mut scene.api, snapshot(), ready_content()).await;
    let asked = scene.api.expect("PATCH", &format!("{}/status", content_path())).await;
    assert_eq!(asked.body["status"]["readyToUse"], false);
    asked.answer(200, content());
    scene.api.expect_event("default", "SnapshotLost").await;
    scene.api.expect_event("shop", "SnapshotLost").await;
    let asked = scene.api.expect("PATCH", &format!("{SNAPSHOT_PATH}/status")).await;
    assert_eq!(asked.body["status"]["readyToUse"], false);
    asked.answer(200, snapshot());
    let note = scene.api.expect_event("shop", "DataNotReady").await;
    assert!(note.contains("cannot be used any more: the snapshot is lost"), "{note}");
    running.await.unwrap().unwrap();
    scene.api.expect_nothing_more().await;

    // One that is in order is not, whatever else the node has said.
    let mut scene = Scene::new(with_node()).await;
    scene.node.refuse(Status::failed_precondition("another node has it open"));
    let source = Some((snapshot(), ready_content()));
    let (note, _) = told(&mut scene, restored(), source, "ProvisioningFailed").await;
    assert!(note.contains("another node has it open"), "{note}");
}

#[tokio::test]
async fn a_pv_that_is_there_is_not_made_again() {
    let mut made = csi_volume("Bound");
    made["metadata"]["name"] = json!(NEW_VOLUME);
    made["spec"]["claimRef"] = json!({"namespace": "shop", "name": "again", "uid": NEW_UID});
    let mut scene = Scene::new(World { volumes: vec![made], ..with_node() }).await;
    run(&scene, restored()).await.unwrap().unwrap();
    assert!(scene.node.created().is_empty());
    scene.api.expect_nothing_more().await;
}
