//! Claims with a selected node.

use super::super::claim::reconcile;
use super::super::queue::Action;
use super::*;
use tonic::Status;

/// Until a claim whose PV should be bound soon is looked at again.
const PARKED: Duration = Duration::from_secs(300);

/// The annotation is removed, and only from the version that was read.
async fn expect_hand_back(api: &mut ApiServer) {
    let asked = api.expect("PATCH", CLAIM_PATH).await;
    assert_eq!(
        asked.body,
        json!({"metadata": {
            "uid": CLAIM_UID,
            "resourceVersion": "7",
            "annotations": {"volume.kubernetes.io/selected-node": null},
        }})
    );
    asked.answer(200, claim());
}

#[tokio::test]
async fn a_claim_gets_its_volume_from_the_selected_node() {
    let mut scene = Scene::new(with_node()).await;
    let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));

    let asked = scene.api.expect("POST", "/api/v1/persistentvolumes").await;
    assert_eq!(asked.body["metadata"]["name"], VOLUME);
    assert_eq!(asked.body["spec"]["claimRef"]["uid"], CLAIM_UID);
    assert_eq!(asked.body["spec"]["flexVolume"]["options"]["logicalVolume"], VOLUME);
    asked.answer(201, volume("Pending"));
    let note = scene.api.expect_event("shop", "ProvisioningSucceeded").await;
    assert!(note.contains("1 GiB on node n1"), "{note}");
    // Should the PV be deleted before it is bound, only this brings another.
    assert_eq!(running.await.unwrap().unwrap(), Action::requeue(PARKED));
    assert_eq!(scene.node.meant(), ["n1"]);

    let created = scene.node.created();
    assert_eq!(created.len(), 1);
    assert_eq!(created[0].parameters["lvprov.io/claim-uid"], CLAIM_UID);
    assert_eq!(created[0].parameters["csi.storage.k8s.io/pvc/namespace"], "shop");
    assert_eq!(created[0].parameters["lvprov.io/cluster"], "cluster");
    let here = &created[0].accessibility_requirements.as_ref().unwrap().requisite[0];
    assert_eq!(here.segments["topology.lvprov.io/node"], "n1");

    // The claim changes before the watch brings the PV: nobody is asked again.
    let again = tokio::time::timeout(SOON, reconcile(parsed(claim()), scene.ctx.clone())).await;
    again.expect("it asks the API server").unwrap();
    assert_eq!(scene.node.created().len(), 1);
    scene.api.expect_nothing_more().await;
}

fn csi_claim() -> Value {
    let mut claim = claim();
    claim["spec"]["storageClassName"] = json!("fast-csi");
    claim
}

#[tokio::test]
async fn a_claim_of_a_csi_class_gets_a_csi_pv() {
    let mut scene = Scene::new(with_node()).await;
    let running = tokio::spawn(reconcile(parsed(csi_claim()), scene.ctx.clone()));
    let asked = scene.api.expect("POST", "/api/v1/persistentvolumes").await;
    let spec = &asked.body["spec"];
    assert_eq!(spec["csi"], csi_volume("")["spec"]["csi"]);
    assert_eq!(spec.get("flexVolume"), None);
    assert_eq!(spec["mountOptions"], json!(["noatime", "discard"]));
    assert_eq!(spec["claimRef"]["uid"], CLAIM_UID);
    assert_eq!(spec["nodeAffinity"], csi_volume("")["spec"]["nodeAffinity"]);
    asked.answer(201, csi_volume("Pending"));
    scene.api.expect_event("shop", "ProvisioningSucceeded").await;
    assert_eq!(running.await.unwrap().unwrap(), Action::requeue(PARKED));
    // The class's own parameter is no business of the node's.
    assert_eq!(scene.node.created()[0].parameters.get("source"), None);
}

#[tokio::test]
async fn no_csi_pv_is_made_that_no_pod_could_mount() {
    let mut scene = Scene::new(with_node()).await;
    scene.node.forget_owners();
    let running = tokio::spawn(reconcile(parsed(csi_claim()), scene.ctx.clone()));
    let error = running.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("whose it is") && error.contains("same version"), "{error}");
    scene.api.expect_nothing_more().await;
    // A flexVolume says it in options of its own.
    let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
    scene.api.expect("POST", "/api/v1/persistentvolumes").await.answer(201, volume("Pending"));
    scene.api.expect_event("shop", "ProvisioningSucceeded").await;
    running.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_controller_that_died_between_volume_and_pv_goes_on() {
    let mut scene = Scene::new(with_node()).await;
    let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
    // The PV was made after all, only the watch has not brought it.
    scene.api.expect("POST", "/api/v1/persistentvolumes").await.refuse(409, "AlreadyExists");
    scene.api.expect("GET", &format!("/api/v1/persistentvolumes/{VOLUME}")).await.answer(200, volume("Pending"));
    assert_eq!(running.await.unwrap().unwrap(), Action::requeue(PARKED));
    assert!(scene.ctx.calls.unknown().is_empty());
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_pv_of_the_same_name_but_anothers_is_not_taken() {
    let mut foreign = volume("Bound");
    foreign["spec"]["claimRef"]["uid"] = json!("another");
    let mut scene = Scene::new(World { volumes: vec![foreign], ..with_node() }).await;
    let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
    let note = scene.api.expect_event("shop", "ProvisioningFailed").await;
    assert!(note.contains("belongs to another claim"), "{note}");
    running.await.unwrap().unwrap();
    assert!(scene.node.created().is_empty());
}

#[tokio::test]
async fn a_node_that_has_gone_hands_the_claim_back() {
    let mut scene = Scene::new(World::default()).await;
    let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
    scene.api.expect("GET", "/api/v1/nodes/n1").await.refuse(404, "NotFound");
    expect_hand_back(&mut scene.api).await;
    scene.api.expect_event("shop", "NodeGone").await;
    running.await.unwrap().unwrap();
    assert!(scene.node.created().is_empty());
}

/// A class that allows volumes in one zone, and a node of another.
async fn in_the_wrong_zone(zone: &str) -> Scene {
    let mut node = node_object();
    node["metadata"]["labels"]["zone"] = json!(zone);
    let mut scene = Scene::new(World { nodes: vec![node], ..World::default() }).await;
    let mut zoned = class();
    zoned["allowedTopologies"] = json!([{"matchLabelExpressions": [{"key": "zone", "values": ["a"]}]}]);
    Arc::get_mut(&mut scene.ctx).unwrap().classes = watched::<StorageClass>(vec![zoned]);
    scene
}

#[tokio::test]
async fn a_node_that_the_class_does_not_allow_is_not_asked() {
    let mut scene = in_the_wrong_zone("b").await;
    let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
    expect_hand_back(&mut scene.api).await;
    let note = scene.api.expect_event("shop", "NodeNotAllowed").await;
    assert!(note.contains("node n1") && note.contains("StorageClass fast (zone in [a])"), "{note}");
    running.await.unwrap().unwrap();
    assert!(scene.node.created().is_empty());
}

#[tokio::test]
async fn a_volume_that_is_there_stays_where_the_class_allows_none_any_more() {
    let mut scene = in_the_wrong_zone("b").await;
    Arc::get_mut(&mut scene.ctx).unwrap().volumes = kept(vec![volume("Pending")]);
    reconcile(parsed(claim()), scene.ctx.clone()).await.unwrap();
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_claim_that_no_node_may_serve_says_so() {
    let mut scene = in_the_wrong_zone("b").await;
    let mut unplaced = claim();
    unplaced["metadata"].as_object_mut().unwrap().remove("annotations");
    let running = tokio::spawn(reconcile(parsed(unplaced), scene.ctx.clone()));
    let note = scene.api.expect_event("shop", "NoNodeHasRoom").await;
    assert!(note.contains("allowedTopologies of StorageClass fast"), "{note}");
    running.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_node_that_cannot_be_asked_for_has_not_gone() {
    let mut scene = Scene::new(World::default()).await;
    let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
    scene.api.expect("GET", "/api/v1/nodes/n1").await.refuse(500, "InternalError");
    assert!(running.await.unwrap().is_err());
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_node_without_room_or_group_or_whose_lvm_refuses_hands_the_claim_back_with_its_words() {
    for (refusal, reason) in [
        (Status::resource_exhausted("5 GiB are missing"), "NotEnoughSpace"),
        (Status::failed_precondition("no volume group vg0 on this node"), "NoVolumeGroup"),
        (Status::internal("lvcreate failed: device is read-only"), "ProvisioningFailed"),
    ] {
        let mut scene = Scene::new(with_node()).await;
        scene.node.refuse(refusal.clone());
        let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
        expect_hand_back(&mut scene.api).await;
        let note = scene.api.expect_event("shop", reason).await;
        assert!(note.contains(refusal.message()), "{note}");
        assert_eq!(running.await.unwrap().unwrap(), Action::await_change());
    }
}

#[tokio::test]
async fn a_claim_that_changed_meanwhile_is_not_handed_back() {
    let mut scene = Scene::new(with_node()).await;
    scene.node.refuse(Status::resource_exhausted("full"));
    let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
    scene.api.expect("PATCH", CLAIM_PATH).await.refuse(409, "Conflict");
    running.await.unwrap().unwrap();
    // And no Event says that it was.
    scene.api.expect_nothing_more().await;
}

/// A connection to where nobody listens.
async fn silent(scene: &Scene) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    let n1 = scene.ctx.nodes.view("n1").unwrap();
    scene.ctx.nodes.place((*n1).clone(), channel);
}

#[tokio::test]
async fn a_node_that_does_not_answer_is_waited_for_first() {
    let mut scene = Scene::new(with_node()).await;
    silent(&scene).await;
    let action = reconcile(parsed(claim()), scene.ctx.clone()).await.unwrap();
    assert_ne!(action, Action::await_change());
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_node_that_stays_silent_hands_the_claim_back() {
    let mut scene = Scene::new(with_node()).await;
    silent(&scene).await;
    Arc::get_mut(&mut scene.ctx).unwrap().patience = Duration::ZERO;
    let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
    expect_hand_back(&mut scene.api).await;
    let note = scene.api.expect_event("shop", "NodeUnreachable").await;
    assert!(note.contains("refused"), "{note}");
    running.await.unwrap().unwrap();
}

/// One reconciliation; the path of the first request that it makes, if any,
/// which is refused.
async fn first_request(scene: &mut Scene) -> Option<String> {
    let mut running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
    tokio::select! {
        _ = &mut running => None,
        asked = scene.api.handle.next_request() => {
            let (request, answer) = asked.unwrap();
            answer.send_response(Response::builder().status(409).body(Body::empty()).unwrap());
            let _ = running.await.unwrap();
            Some(request.uri().path().to_owned())
        }
    }
}

/// A first call ends like this (None: in silence). After longer than the
/// patience a second one meets silence: whether that hands the claim back.
async fn handed_back_after(first: Option<Status>, heard_between: bool) -> bool {
    let mut scene = Scene::new(with_node()).await;
    Arc::get_mut(&mut scene.ctx).unwrap().patience = Duration::from_millis(200);
    match first {
        Some(answer) => scene.node.refuse(answer),
        None => silent(&scene).await,
    }
    first_request(&mut scene).await;
    tokio::time::sleep(Duration::from_millis(250)).await;
    if heard_between {
        scene.ctx.failures.heard_from("n1");
    }
    silent(&scene).await;
    first_request(&mut scene).await.as_deref() == Some(CLAIM_PATH)
}

#[tokio::test]
async fn only_silence_counts_as_silence() {
    // A call that took too long, or was refused, has not met silence.
    assert!(!handed_back_after(Some(Status::deadline_exceeded("too slow")), false).await);
    assert!(!handed_back_after(Some(Status::aborted("the same volume is worked on")), false).await);
    assert!(!handed_back_after(Some(Status::unavailable("the lock is busy")), false).await);
    // Nor is it silence when the node was heard in between.
    assert!(!handed_back_after(None, true).await);
    assert!(handed_back_after(None, false).await);
}

#[tokio::test]
async fn a_node_at_work_is_not_given_up_for_earlier_refusals() {
    let mut scene = Scene::new(with_node()).await;
    Arc::get_mut(&mut scene.ctx).unwrap().patience = Duration::from_millis(10);
    for (refusal, wait) in [
        (Status::unavailable("the lock is busy"), 120),
        (Status::aborted("the same volume is worked on"), 0),
        (Status::unavailable("the lock is busy"), 0),
    ] {
        scene.node.refuse(refusal);
        let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
        scene.api.expect_event("shop", "ProvisioningFailed").await;
        assert_ne!(running.await.unwrap().unwrap(), Action::await_change());
        tokio::time::sleep(Duration::from_millis(wait)).await;
    }
}

#[tokio::test]
async fn a_node_whose_lvm_fails_is_told_of_and_in_the_end_given_up() {
    let mut scene = Scene::new(with_node()).await;
    scene.node.refuse(Status::unavailable("lvcreate failed with exit status 5"));
    let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
    let note = scene.api.expect_event("shop", "ProvisioningFailed").await;
    assert!(note.contains("tried again: lvcreate failed"), "{note}");
    assert_ne!(running.await.unwrap().unwrap(), Action::await_change());

    Arc::get_mut(&mut scene.ctx).unwrap().patience = Duration::ZERO;
    let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
    expect_hand_back(&mut scene.api).await;
    let note = scene.api.expect_event("shop", "ProvisioningFailed").await;
    assert!(note.contains("The scheduler chooses another one"), "{note}");
    assert_eq!(running.await.unwrap().unwrap(), Action::await_change());
}

/// Our limit for a call is shorter than what the node allows its LVM.
#[tokio::test]
async fn a_node_whose_lvm_hangs_is_given_up_in_the_end() {
    for status in [Status::cancelled("Timeout expired"), Status::deadline_exceeded("too slow")] {
        let mut scene = Scene::new(with_node()).await;
        Arc::get_mut(&mut scene.ctx).unwrap().patience = Duration::ZERO;
        scene.node.refuse(status);
        let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
        expect_hand_back(&mut scene.api).await;
        let note = scene.api.expect_event("shop", "ProvisioningFailed").await;
        assert!(note.contains("The scheduler chooses another one"), "{note}");
        assert_eq!(running.await.unwrap().unwrap(), Action::await_change());
    }
}

#[tokio::test]
async fn a_call_that_was_cut_off_is_asked_of_the_same_node_again() {
    let mut scene = Scene::new(with_node()).await;
    scene.node.refuse(Status::deadline_exceeded("too slow"));
    let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
    scene.api.expect_event("shop", "ProvisioningFailed").await;
    assert_ne!(running.await.unwrap().unwrap(), Action::await_change());
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_refused_claim_changes_nothing() {
    let mut scene = Scene::new(with_node()).await;
    let mut many = claim();
    many["spec"]["accessModes"] = json!(["ReadWriteMany"]);
    let running = tokio::spawn(reconcile(parsed(many), scene.ctx.clone()));
    scene.api.expect_event("shop", "ClaimRefused").await;
    assert_eq!(running.await.unwrap().unwrap(), Action::await_change());
    assert!(scene.node.created().is_empty());
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn claims_of_others_and_claims_being_deleted_are_left_alone() {
    let mut foreign = claim();
    foreign["spec"]["storageClassName"] = json!("other");
    let mut deleted = claim();
    deleted["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    let mut named = claim();
    named["spec"]["volumeName"] = json!("chosen-by-hand");
    let mut scene = Scene::new(with_node()).await;
    for claim in [foreign, deleted, named] {
        assert_eq!(reconcile(parsed(claim), scene.ctx.clone()).await.unwrap(), Action::await_change());
    }
    assert!(scene.node.created().is_empty());
    scene.api.expect_nothing_more().await;
}
