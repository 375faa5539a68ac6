//! Claims with a selected node.

use super::super::claim::reconcile;
use super::*;
use kube::runtime::controller::Action;
use tonic::Status;

const CLAIM_PATH: &str = "/api/v1/namespaces/shop/persistentvolumeclaims/data-db-0";

fn parsed(claim: Value) -> Arc<PersistentVolumeClaim> {
    Arc::new(serde_json::from_value(claim).unwrap())
}

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

fn with_node() -> World {
    World { nodes: vec![node_object()], ..World::default() }
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
    assert_eq!(running.await.unwrap().unwrap(), Action::await_change());

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

#[tokio::test]
async fn a_controller_that_died_between_volume_and_pv_goes_on() {
    let mut scene = Scene::new(with_node()).await;
    let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
    // The PV was made after all, only the watch has not brought it.
    scene.api.expect("POST", "/api/v1/persistentvolumes").await.refuse(409, "AlreadyExists");
    scene.api.expect("GET", &format!("/api/v1/persistentvolumes/{VOLUME}")).await.answer(200, volume("Pending"));
    assert_eq!(running.await.unwrap().unwrap(), Action::await_change());
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

#[tokio::test]
async fn a_node_that_cannot_be_asked_for_has_not_gone() {
    let mut scene = Scene::new(World::default()).await;
    let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
    scene.api.expect("GET", "/api/v1/nodes/n1").await.refuse(500, "InternalError");
    assert!(running.await.unwrap().is_err());
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_node_without_room_or_group_hands_the_claim_back_with_its_words() {
    for (refusal, reason) in [
        (Status::resource_exhausted("5 GiB are missing"), "NotEnoughSpace"),
        (Status::failed_precondition("no volume group vg0 on this node"), "NoVolumeGroup"),
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
    scene.ctx.nodes.place(scene.ctx.nodes.view("n1").unwrap(), channel);
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

/// A bound claim whose growth to 90 GiB cannot be had, lowered to 2 GiB.
fn lowered() -> Value {
    let mut claim = claim();
    claim["spec"]["volumeName"] = json!(VOLUME);
    claim["spec"]["resources"]["requests"]["storage"] = json!("2Gi");
    claim["status"] = json!({
        "phase": "Bound",
        "capacity": {"storage": "1Gi"},
        "allocatedResources": {"storage": "90Gi"},
        "allocatedResourceStatuses": {"storage": "NodeResizeInfeasible"},
        "conditions": [{"type": "NodeResizeError", "status": "True"}, {"type": "Unused", "status": "False"}],
    });
    claim
}

#[tokio::test]
async fn a_withdrawn_growth_is_taken_back_on_the_pv_first() {
    let mut grown = volume("Bound");
    grown["spec"]["capacity"]["storage"] = json!("90Gi");
    let mut scene = Scene::new(World { volumes: vec![grown], ..with_node() }).await;
    let running = tokio::spawn(reconcile(parsed(lowered()), scene.ctx.clone()));

    let asked = scene.api.expect("PATCH", &format!("/api/v1/persistentvolumes/{VOLUME}")).await;
    assert_eq!(
        asked.body,
        json!({
            "metadata": {"uid": "volume-uid", "resourceVersion": "11"},
            "spec": {"capacity": {"storage": "2Gi"}},
        })
    );
    asked.answer(200, volume("Bound"));
    let asked = scene.api.expect("PATCH", &format!("{CLAIM_PATH}/status")).await;
    assert_eq!(asked.body["metadata"], json!({"uid": CLAIM_UID, "resourceVersion": "7"}));
    assert_eq!(asked.body["status"]["allocatedResources"], json!({"storage": "2Gi"}));
    assert_eq!(asked.body["status"]["allocatedResourceStatuses"], json!({"storage": "NodeResizePending"}));
    let conditions = asked.body["status"]["conditions"].as_array().unwrap();
    assert_eq!(conditions.len(), 1);
    assert_eq!(conditions[0]["type"], "Unused");
    asked.answer(200, claim());
    scene.api.expect_event("shop", "VolumeGrowthWithdrawn").await;
    running.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_pv_that_was_lowered_before_a_crash_is_not_lowered_again() {
    let mut halfway = volume("Bound");
    halfway["spec"]["capacity"]["storage"] = json!("2Gi");
    let mut scene = Scene::new(World { volumes: vec![halfway], ..with_node() }).await;
    let running = tokio::spawn(reconcile(parsed(lowered()), scene.ctx.clone()));
    scene.api.expect("PATCH", &format!("{CLAIM_PATH}/status")).await.answer(200, claim());
    scene.api.expect_event("shop", "VolumeGrowthWithdrawn").await;
    running.await.unwrap().unwrap();
}
