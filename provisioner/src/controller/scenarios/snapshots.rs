//! VolumeSnapshotContents, from the snapshot-controller to a node and back.

use super::super::leftovers;
use super::super::nodes::News;
use super::super::queue::Action;
use super::super::snapshot::{reconcile, triggers, watch};
use super::super::volume_triggers;
use super::*;
use futures::StreamExt;
use kube::runtime::reflector::ObjectRef;
use tonic::Status;

const GROUP: &str = "/apis/snapshot.storage.k8s.io/v1";
const CONTENTS: &str = "/apis/snapshot.storage.k8s.io/v1/volumesnapshotcontents";
const BEING_CREATED: &str = "snapshot.storage.kubernetes.io/volumesnapshot-being-created";
const BEING_DELETED: &str = "snapshot.storage.kubernetes.io/volumesnapshot-being-deleted";

fn path() -> String {
    format!("{CONTENTS}/{CONTENT}")
}

fn with_volume() -> World {
    World { volumes: vec![csi_volume("Bound")], ..with_node() }
}

fn deleted() -> Value {
    let mut deleted = ready_content();
    deleted["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    deleted["metadata"]["annotations"][BEING_DELETED] = json!("yes");
    deleted
}

fn noted(mut content: Value) -> Value {
    content["metadata"]["annotations"][BEING_CREATED] = json!("yes");
    content
}

async fn expect_class(api: &mut ApiServer) {
    let class = json!({
        "metadata": {"name": "snaps"},
        "driver": DRIVER,
        "deletionPolicy": "Delete",
        "parameters": {"snapshotSize": "20%", "csi.storage.k8s.io/snapshotter-secret-name": "x"},
    });
    api.expect("GET", &format!("{GROUP}/volumesnapshotclasses/snaps")).await.answer(200, class);
}

async fn expect_note(api: &mut ApiServer, on: bool) {
    let asked = api.expect("PATCH", &path()).await;
    let value = if on { json!("yes") } else { Value::Null };
    assert_eq!(asked.body, json!({"metadata": {"uid": "content-uid", "annotations": {BEING_CREATED: value}}}));
    asked.answer(200, if on { noted(content()) } else { content() });
}

/// The content's status is written; what it says.
async fn expect_status(api: &mut ApiServer) -> Value {
    let asked = api.expect("PATCH", &format!("{}/status", path())).await;
    assert_eq!(asked.body["metadata"], json!({"uid": "content-uid"}));
    let status = asked.body["status"].clone();
    asked.answer(200, content());
    status
}

/// The same Event on content and VolumeSnapshot; its note.
async fn expect_told(api: &mut ApiServer, reason: &str) -> String {
    let on_content = api.expect_event("default", reason).await;
    let on_snapshot = api.expect_event("shop", reason).await;
    assert_eq!(on_content, on_snapshot);
    on_content
}

/// What the watch brings next.
async fn again(scene: &Scene, content: Value) -> tokio::task::JoinHandle<Result<Action, super::super::error::Error>> {
    tokio::spawn(reconcile(parsed(content), scene.ctx.clone()))
}

#[tokio::test]
async fn a_snapshot_is_taken_on_the_node_of_its_volume() {
    let mut scene = Scene::new(with_volume()).await;
    let mut ready = scene.ctx.snapshots.ready();
    let running = again(&scene, content()).await;
    expect_class(&mut scene.api).await;
    expect_note(&mut scene.api, true).await;
    let status = expect_status(&mut scene.api).await;
    assert_eq!(
        status,
        json!({
            "snapshotHandle": SNAPSHOT_ID, "creationTime": TAKEN, "restoreSize": GIB, "readyToUse": true, "error": null,
        })
    );
    expect_note(&mut scene.api, false).await;
    assert_eq!(running.await.unwrap().unwrap(), Action::await_change());
    scene.api.expect_nothing_more().await;

    assert_eq!(scene.node.meant(), ["n1"]);
    let asked = scene.node.snapshotted().remove(0);
    assert_eq!(asked.name, format!("snapshot-{SNAPSHOT_UID}"));
    assert_eq!(asked.source_volume_id, format!("vg0/{VOLUME}"));
    let parameters = json!({
        "snapshotSize": "20%",
        "csi.storage.k8s.io/volumesnapshot/name": "before",
        "csi.storage.k8s.io/volumesnapshot/namespace": "shop",
        "csi.storage.k8s.io/volumesnapshotcontent/name": CONTENT,
        "lvprov.io/cluster": "cluster",
    });
    assert_eq!(json!(asked.parameters), parameters);
    // Claims that wait for it hear of it.
    let ready = ready.try_recv().unwrap();
    assert_eq!((ready.namespace.as_str(), ready.name.as_str()), ("shop", "before"));
}

#[tokio::test]
async fn others_contents_and_ready_ones_are_left_alone() {
    let mut foreign = content();
    foreign["spec"]["driver"] = json!("other.example");
    let mut scene = Scene::new(with_volume()).await;
    for content in [foreign, ready_content()] {
        assert_eq!(again(&scene, content).await.await.unwrap().unwrap(), Action::await_change());
    }
    assert!(scene.node.meant().is_empty());
    scene.api.expect_nothing_more().await;
    // One that died between the two patches goes on.
    let running = again(&scene, noted(ready_content())).await;
    expect_note(&mut scene.api, false).await;
    running.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_a_node_refuses_is_told_and_tried_again_after_a_while() {
    let mut scene = Scene::new(with_volume()).await;
    scene.node.refuse(Status::resource_exhausted("200 MiB are missing"));
    let running = again(&scene, content()).await;
    expect_class(&mut scene.api).await;
    expect_note(&mut scene.api, true).await;
    let status = expect_status(&mut scene.api).await;
    let message = status["error"]["message"].as_str().unwrap();
    assert!(message.contains("200 MiB are missing") && message.contains("node n1"), "{message}");
    assert_eq!((status["readyToUse"].clone(), status["error"]["time"].is_string()), (json!(false), true));
    assert_eq!(expect_told(&mut scene.api, "SnapshotFailed").await, message);
    // Nothing was made, so that the content can be deleted.
    expect_note(&mut scene.api, false).await;
    assert_ne!(running.await.unwrap().unwrap(), Action::await_change());
    // The status has changed the content, which is no reason to ask again.
    let waits = again(&scene, content()).await.await.unwrap().unwrap();
    assert_ne!(waits, Action::await_change());
    assert_eq!(scene.node.snapshotted().len(), 1);
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_call_that_was_cut_off_is_remembered_also_by_a_content_that_is_deleted() {
    let mut scene = Scene::new(with_volume()).await;
    scene.node.refuse(Status::deadline_exceeded("too slow"));
    let running = again(&scene, content()).await;
    expect_class(&mut scene.api).await;
    expect_note(&mut scene.api, true).await;
    expect_status(&mut scene.api).await;
    expect_told(&mut scene.api, "SnapshotFailed").await;
    running.await.unwrap().unwrap();
    scene.api.expect_nothing_more().await;
    // The user has given up meanwhile; what the node has made is to be found, or it would stay for ever.
    scene.node.serve();
    scene.ctx.failures.clear("content-uid");
    let mut given_up = noted(deleted());
    given_up["status"] = json!({"readyToUse": false});
    let running = again(&scene, given_up).await;
    expect_class(&mut scene.api).await;
    expect_note(&mut scene.api, true).await;
    assert_eq!(expect_status(&mut scene.api).await["snapshotHandle"], SNAPSHOT_ID);
    expect_note(&mut scene.api, false).await;
    running.await.unwrap().unwrap();
}

#[tokio::test]
async fn without_its_volume_or_class_no_snapshot_is_taken() {
    let mut scene = Scene::new(with_node()).await;
    let running = again(&scene, content()).await;
    let status = expect_status(&mut scene.api).await;
    assert!(status["error"]["message"].as_str().unwrap().contains("its claim was deleted before"), "{status}");
    expect_told(&mut scene.api, "SnapshotFailed").await;
    running.await.unwrap().unwrap();

    let mut scene = Scene::new(with_volume()).await;
    let running = again(&scene, content()).await;
    scene.api.expect("GET", &format!("{GROUP}/volumesnapshotclasses/snaps")).await.refuse(404, "NotFound");
    let status = expect_status(&mut scene.api).await;
    assert!(status["error"]["message"].as_str().unwrap().contains("VolumeSnapshotClass snaps has gone"), "{status}");
    expect_told(&mut scene.api, "SnapshotFailed").await;
    running.await.unwrap().unwrap();
    assert!(scene.node.meant().is_empty());
}

#[tokio::test]
async fn a_node_that_is_silent_is_waited_for_and_after_a_while_told_of() {
    let mut scene = Scene::new(with_volume()).await;
    let down = |ago| State::Down {
        since: std::time::Instant::now().checked_sub(Duration::from_secs(ago)).unwrap(),
        why: "refused".into(),
    };
    scene.node_is(down(1));
    let running = again(&scene, content()).await;
    expect_class(&mut scene.api).await;
    assert_ne!(running.await.unwrap().unwrap(), Action::await_change());
    scene.api.expect_nothing_more().await;
    scene.node_is(down(60));
    let running = again(&scene, content()).await;
    expect_class(&mut scene.api).await;
    assert!(expect_status(&mut scene.api).await["error"]["message"].as_str().unwrap().contains("refused"));
    expect_told(&mut scene.api, "NodeUnreachable").await;
    running.await.unwrap().unwrap();
    assert!(scene.node.meant().is_empty());
}

#[tokio::test]
async fn a_node_that_is_up_again_takes_the_snapshots_that_wait_for_it() {
    let mut done = ready_content();
    done["metadata"]["name"] = json!("done");
    let scene = Scene::new(World { contents: vec![content(), done], ..with_volume() }).await;
    let mut triggers = std::pin::pin!(triggers(&scene.ctx));
    scene.ctx.failures.note("content-uid", super::super::error::Row::Attempts, "", SOON);
    scene.ctx.nodes.tell(News::Up("n1".into()));
    let next = tokio::time::timeout(SOON, triggers.next()).await.unwrap();
    assert_eq!(next, Some(ObjectRef::new(CONTENT)));
    assert_eq!(scene.ctx.failures.left("content-uid", super::super::error::Row::Attempts), None);
    assert!(tokio::time::timeout(Duration::from_millis(50), triggers.next()).await.is_err());
}

#[tokio::test]
async fn a_snapshot_that_was_there_before_is_looked_at() {
    let mut pre = content();
    pre["spec"]["source"] = json!({"snapshotHandle": SNAPSHOT_ID});
    let mut scene = Scene::new(with_node()).await;
    let running = again(&scene, pre.clone()).await;
    let status = expect_status(&mut scene.api).await;
    assert_eq!((&status["snapshotHandle"], &status["readyToUse"]), (&json!(SNAPSHOT_ID), &json!(true)));
    running.await.unwrap().unwrap();
    scene.api.expect_nothing_more().await;
    assert!(scene.node.snapshotted().is_empty());

    let mut scene = Scene::new(with_node()).await;
    scene.node.list_no_snapshots(Ok(()));
    let running = again(&scene, pre.clone()).await;
    assert!(expect_status(&mut scene.api).await["error"]["message"].as_str().unwrap().contains("not on node n1"));
    expect_told(&mut scene.api, "SnapshotLost").await;
    running.await.unwrap().unwrap();

    let mut scene = Scene::new(with_node()).await;
    pre["spec"]["source"] = json!({"snapshotHandle": "somebody-elses"});
    let running = again(&scene, pre).await;
    assert!(
        expect_status(&mut scene.api).await["error"]["message"].as_str().unwrap().contains("no snapshot of lvprov")
    );
    expect_told(&mut scene.api, "SnapshotFailed").await;
    running.await.unwrap().unwrap();
    assert!(scene.node.meant().is_empty());
}

#[tokio::test]
async fn a_snapshot_whose_space_has_overflowed_says_so_wherever_it_is_looked_at() {
    let mut scene = Scene::new(with_volume()).await;
    scene.node.lose_snapshots();
    let running = again(&scene, content()).await;
    expect_class(&mut scene.api).await;
    expect_note(&mut scene.api, true).await;
    let status = expect_status(&mut scene.api).await;
    assert_eq!(status["readyToUse"], false);
    let message = status["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("lost") && message.contains("snapshotSize"), "{message}");
    expect_note(&mut scene.api, false).await;
    assert_eq!(expect_told(&mut scene.api, "SnapshotLost").await, message);
    // The snapshot-controller does not take it back by itself.
    let asked = scene.api.expect("PATCH", &format!("{GROUP}/namespaces/shop/volumesnapshots/before/status")).await;
    assert_eq!(
        (&asked.body["metadata"]["uid"], &asked.body["status"]["readyToUse"]),
        (&json!(SNAPSHOT_UID), &json!(false))
    );
    asked.answer(200, json!({"metadata": {"name": "before"}}));
    running.await.unwrap().unwrap();
    // Once is enough.
    let mut lost = ready_content();
    lost["status"]["readyToUse"] = json!(false);
    lost["status"]["error"] = json!({"message": message});
    assert_eq!(again(&scene, lost).await.await.unwrap().unwrap(), Action::await_change());
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_node_that_comes_up_tells_of_snapshots_that_it_has_lost_and_of_no_others() {
    let mut scene = Scene::new(World { contents: vec![ready_content()], ..with_volume() }).await;
    let listed = |lost, cluster: &str| lvprov_proto::lvprov::Snapshot {
        volume_group: "vg0".into(),
        logical_volume: format!("snap-{SNAPSHOT_UID}"),
        cluster: cluster.into(),
        lost,
        ..Default::default()
    };
    scene.node.has_snapshot(listed(false, "cluster"));
    scene.node.has_snapshot(listed(true, "another"));
    leftovers::look("n1", &scene.ctx).await.unwrap();
    scene.api.expect_nothing_more().await;
    scene.node.lose_snapshots();
    scene.node.has_snapshot(listed(true, "cluster"));
    let ctx = scene.ctx.clone();
    let looking = tokio::spawn(async move { leftovers::look("n1", &ctx).await });
    assert_eq!(expect_status(&mut scene.api).await["readyToUse"], false);
    expect_told(&mut scene.api, "SnapshotLost").await;
    let status = format!("{GROUP}/namespaces/shop/volumesnapshots/before/status");
    scene.api.expect("PATCH", &status).await.answer(200, json!({"metadata": {"name": "before"}}));
    looking.await.unwrap().unwrap();
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_snapshot_goes_before_its_content() {
    let mut scene = Scene::new(with_volume()).await;
    let mut gone = scene.ctx.snapshots.gone();
    let running = again(&scene, deleted()).await;
    scene.api.expect("GET", &path()).await.answer(200, deleted());
    let asked = scene.api.expect("PATCH", &format!("{}/status", path())).await;
    assert_eq!(scene.node.unsnapshotted(), [SNAPSHOT_ID]);
    assert_eq!(
        asked.body["status"],
        json!({"snapshotHandle": null, "creationTime": null, "readyToUse": null, "restoreSize": null})
    );
    let mut empty = deleted();
    empty["status"] = json!({});
    empty["metadata"]["resourceVersion"] = json!("22");
    asked.answer(200, empty.clone());
    let asked = scene.api.expect("PATCH", &path()).await;
    assert_eq!(asked.body, json!({"metadata": {"uid": "content-uid", "resourceVersion": "22", "finalizers": []}}));
    asked.answer(200, empty);
    assert_eq!(running.await.unwrap().unwrap(), Action::await_change());
    scene.api.expect_nothing_more().await;
    assert_eq!(scene.node.meant(), ["n1"]);
    assert_eq!(gone.try_recv().unwrap(), "n1");
}

#[tokio::test]
async fn a_snapshot_that_is_to_be_kept_stays_and_its_content_goes() {
    let mut kept = deleted();
    kept["spec"]["deletionPolicy"] = json!("Retain");
    let mut scene = Scene::new(with_volume()).await;
    let running = again(&scene, kept.clone()).await;
    let asked = scene.api.expect("PATCH", &path()).await;
    assert_eq!(asked.body["metadata"]["finalizers"], json!([]));
    asked.answer(200, kept.clone());
    running.await.unwrap().unwrap();
    // As the watch has it the policy is Delete, and an admin has changed it.
    let running = again(&scene, deleted()).await;
    scene.api.expect("GET", &path()).await.answer(200, kept);
    running.await.unwrap().unwrap();
    assert!(scene.node.unsnapshotted().is_empty());
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_content_that_only_an_admin_deletes_waits_for_its_snapshot() {
    let mut early = deleted();
    early["metadata"]["annotations"] = json!({});
    let mut scene = Scene::new(with_volume()).await;
    assert_eq!(again(&scene, early).await.await.unwrap().unwrap(), Action::await_change());
    assert!(scene.node.meant().is_empty());
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn what_is_in_the_way_of_a_removal_is_told_in_the_nodes_words() {
    for (refusal, reason) in [
        (Status::failed_precondition("volume pvc-2 is being made from it"), "SnapshotInUse"),
        (Status::unavailable("lvm is busy"), "SnapshotDeleteFailed"),
    ] {
        let mut scene = Scene::new(with_volume()).await;
        scene.node.refuse(refusal.clone());
        let running = again(&scene, deleted()).await;
        scene.api.expect("GET", &path()).await.answer(200, deleted());
        let note = expect_told(&mut scene.api, reason).await;
        assert!(note.contains(refusal.message()), "{note}");
        assert_ne!(running.await.unwrap().unwrap(), Action::await_change());
        scene.api.expect_nothing_more().await;
    }
}

#[tokio::test]
async fn a_snapshot_on_a_node_that_has_gone_waits_and_says_how_to_give_it_up() {
    let mut elsewhere = deleted();
    elsewhere["status"]["snapshotHandle"] = json!("n9/vg0/snap-1");
    let mut scene = Scene::new(with_volume()).await;
    let running = again(&scene, elsewhere.clone()).await;
    scene.api.expect("GET", &path()).await.answer(200, elsewhere);
    let note = expect_told(&mut scene.api, "NodeGone").await;
    assert!(note.contains("n9") && note.contains("Retain"), "{note}");
    assert_eq!(running.await.unwrap().unwrap(), Action::await_change());
    assert!(scene.node.meant().is_empty());
}

#[tokio::test]
async fn a_released_volume_is_looked_at_again_when_a_snapshot_of_its_node_has_gone() {
    let scene = Scene::new(World { volumes: vec![csi_volume("Released")], ..with_node() }).await;
    let mut volumes = std::pin::pin!(volume_triggers(&scene.ctx));
    scene.ctx.snapshots.tell_gone("n2");
    scene.ctx.snapshots.tell_gone("n1");
    let next = tokio::time::timeout(SOON, volumes.next()).await.unwrap();
    assert_eq!(next, Some(ObjectRef::new(VOLUME)));
    assert!(tokio::time::timeout(Duration::from_millis(50), volumes.next()).await.is_err());
}

#[tokio::test]
async fn a_volume_that_cannot_go_for_its_snapshots_says_what_users_call_them() {
    let released = csi_volume("Released");
    let mut scene = Scene::new(World { contents: vec![ready_content()], ..with_node() }).await;
    scene.node.refuse(Status::failed_precondition("it has snapshots (snap-1)"));
    let running = tokio::spawn(super::super::volume::reconcile(parsed(released.clone()), scene.ctx.clone()));
    scene.api.expect("GET", &format!("/api/v1/persistentvolumes/{VOLUME}")).await.answer(200, released);
    scene.api.expect("GET", CLAIM_PATH).await.refuse(404, "NotFound");
    let note = scene.api.expect_event("default", "VolumeInUse").await;
    assert!(note.contains("snap-1") && note.ends_with("VolumeSnapshots of it: shop/before"), "{note}");
    assert_ne!(running.await.unwrap().unwrap(), Action::await_change());
}

#[tokio::test]
async fn without_the_definitions_or_the_right_it_waits_and_says_what_is_missing() {
    let mut scene = Scene::new(World::default()).await;
    scene.ctx.snapshots.set_presence(Presence::Unknown);
    let events = watch(scene.ctx.client.clone(), scene.ctx.snapshots.clone(), Duration::from_millis(20));
    let mut events = std::pin::pin!(events);
    let list = json!({
        "apiVersion": "snapshot.storage.k8s.io/v1", "kind": "VolumeSnapshotContentList",
        "metadata": {"resourceVersion": "5"}, "items": [content()],
    });
    let server = async {
        scene.api.expect("GET", CONTENTS).await.refuse(404, "NotFound");
        let asked = scene.api.expect("GET", CONTENTS).await;
        let absent = scene.ctx.snapshots.presence();
        asked.refuse(403, "Forbidden");
        let asked = scene.api.expect("GET", CONTENTS).await;
        assert!(asked.query.contains("limit=1"), "{}", asked.query);
        let forbidden = scene.ctx.snapshots.presence();
        asked.answer(200, list.clone());
        let asked = scene.api.expect("GET", CONTENTS).await;
        assert!(asked.query.contains("limit=500"), "{}", asked.query);
        asked.answer(200, list);
        (absent, forbidden)
    };
    let client = async {
        loop {
            match events.next().await {
                Some(Ok(Event::InitApply(content))) => return content.metadata.name,
                Some(Ok(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    };
    let both = tokio::time::timeout(SOON, futures::future::join(server, client)).await.unwrap();
    assert_eq!(both, ((Presence::NotInstalled, Presence::Forbidden), Some(CONTENT.to_owned())));
    assert_eq!(scene.ctx.snapshots.presence(), Presence::There);
    assert!(Presence::Forbidden.to_string().contains("deploy/snapshots"));
}
