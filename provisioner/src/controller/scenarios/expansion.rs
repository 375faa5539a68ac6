//! Claims with a csi volume that are raised.

use super::super::claim::reconcile;
use super::super::growth;
use super::super::nodes::News;
use super::super::queue::Action;
use super::*;
use kube::runtime::reflector::ObjectRef;
use tonic::Status;

const MIB: u64 = 1 << 20;

fn pv_path() -> String {
    format!("/api/v1/persistentvolumes/{VOLUME}")
}

fn status_path() -> String {
    format!("{CLAIM_PATH}/status")
}

/// A bound claim that has 1 GiB and asks for `request`.
fn raised(request: &str) -> Value {
    let mut claim = claim();
    claim["spec"]["volumeName"] = json!(VOLUME);
    claim["spec"]["resources"]["requests"]["storage"] = json!(request);
    claim["status"] = json!({
        "phase": "Bound",
        "capacity": {"storage": "1Gi"},
        "conditions": [{"type": "Unused", "status": "False"}],
    });
    claim
}

/// As it is once its growth has come to `status`.
fn under_way(request: &str, allocated: &str, status: &str) -> Value {
    let mut claim = raised(request);
    claim["status"]["allocatedResources"] = json!({"storage": allocated});
    claim["status"]["allocatedResourceStatuses"] = json!({"storage": status});
    claim
}

async fn scene() -> Scene {
    Scene::new(World { volumes: vec![csi_volume("Bound")], ..with_node() }).await
}

fn condition_types(status: &Value) -> Vec<&str> {
    status["conditions"].as_array().unwrap().iter().map(|condition| condition["type"].as_str().unwrap()).collect()
}

/// The claim says that its growth to `request` is under way.
async fn announced(scene: &mut Scene, request: &str, version: &str) {
    let asked = scene.api.expect("PATCH", &status_path()).await;
    assert_eq!(
        asked.body["metadata"],
        json!({
            "uid": CLAIM_UID,
            "resourceVersion": version,
            "annotations": {"volume.kubernetes.io/storage-resizer": "lvm.lvprov.io"},
        })
    );
    let status = &asked.body["status"];
    assert_eq!(status["allocatedResources"], json!({"storage": request}));
    assert_eq!(status["allocatedResourceStatuses"], json!({"storage": "ControllerResizeInProgress"}));
    assert_eq!(condition_types(status), ["Unused", "Resizing"]);
    let mut claim = under_way(request, request, "ControllerResizeInProgress");
    claim["metadata"]["resourceVersion"] = json!("8");
    claim["status"]["conditions"] = status["conditions"].clone();
    asked.answer(200, claim);
}

/// The claim hands over to kubelet.
async fn handed_over(scene: &mut Scene, bytes: &str, version: &str) {
    let asked = scene.api.expect("PATCH", &status_path()).await;
    assert_eq!(asked.body["metadata"], json!({"uid": CLAIM_UID, "resourceVersion": version}));
    let status = &asked.body["status"];
    assert_eq!(status["allocatedResources"], json!({"storage": bytes}));
    assert_eq!(status["allocatedResourceStatuses"], json!({"storage": "NodeResizePending"}));
    assert_eq!(condition_types(status), ["Unused", "FileSystemResizePending"]);
    // It has what the file system has until kubelet says otherwise.
    assert_eq!(status.get("capacity"), None);
    asked.answer(200, under_way(bytes, bytes, "NodeResizePending"));
    scene.api.expect_event("shop", "VolumeGrown").await;
}

#[tokio::test]
async fn a_raised_request_grows_the_volume_then_the_pv_then_it_is_kubelets() {
    let mut scene = scene().await;
    let running = tokio::spawn(reconcile(parsed(raised("3Gi")), scene.ctx.clone()));
    announced(&mut scene, "3Gi", "7").await;

    let asked = scene.api.expect("PATCH", &pv_path()).await;
    // By now the volume has the size.
    assert_eq!(scene.node.expanded(), [(format!("vg0/{VOLUME}"), 3 * GIB as i64)]);
    assert_eq!(scene.node.meant(), ["n1"]);
    assert_eq!(
        asked.body,
        json!({
            "metadata": {"uid": "volume-uid", "annotations": {"volume.alpha.kubernetes.io/pre-resize-capacity": "1Gi"}},
            "spec": {"capacity": {"storage": "3Gi"}},
        })
    );
    asked.answer(200, csi_volume("Bound"));
    handed_over(&mut scene, "3Gi", "8").await;
    assert_eq!(running.await.unwrap().unwrap(), Action::await_change());

    // The watch brings the first of the two changes: nobody is asked again.
    let between = under_way("3Gi", "3Gi", "ControllerResizeInProgress");
    assert_ne!(reconcile(parsed(between), scene.ctx.clone()).await.unwrap(), Action::await_change());
    // And then the second.
    let done = under_way("3Gi", "3Gi", "NodeResizePending");
    assert_eq!(reconcile(parsed(done), scene.ctx.clone()).await.unwrap(), Action::await_change());
    assert_eq!(scene.node.expanded().len(), 1);
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn what_is_granted_is_what_the_volume_has() {
    let mut scene = scene().await;
    let running = tokio::spawn(reconcile(parsed(raised("1073741825")), scene.ctx.clone()));
    announced(&mut scene, "1073741825", "7").await;
    let asked = scene.api.expect("PATCH", &pv_path()).await;
    let capacity = format!("{}Mi", 1028);
    assert_eq!(asked.body["spec"], json!({"capacity": {"storage": capacity}}));
    asked.answer(200, csi_volume("Bound"));
    handed_over(&mut scene, &capacity, "8").await;
    running.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_controller_that_died_on_the_way_goes_on() {
    // Before the node was asked, or after; the node does it only once.
    let mut scene = scene().await;
    let begun = under_way("3Gi", "3Gi", "ControllerResizeInProgress");
    let running = tokio::spawn(reconcile(parsed(begun.clone()), scene.ctx.clone()));
    scene.api.expect("PATCH", &pv_path()).await.answer(200, csi_volume("Bound"));
    handed_over(&mut scene, "3Gi", "7").await;
    running.await.unwrap().unwrap();

    // After the PV was raised.
    let mut grown = csi_volume("Bound");
    grown["spec"]["capacity"]["storage"] = json!("3Gi");
    let mut scene = Scene::new(World { volumes: vec![grown], ..with_node() }).await;
    let running = tokio::spawn(reconcile(parsed(begun), scene.ctx.clone()));
    handed_over(&mut scene, "3Gi", "7").await;
    running.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_claim_that_changed_meanwhile_is_looked_at_again() {
    let mut scene = scene().await;
    let running = tokio::spawn(reconcile(parsed(raised("3Gi")), scene.ctx.clone()));
    scene.api.expect("PATCH", &status_path()).await.refuse(409, "Conflict");
    assert_ne!(running.await.unwrap().unwrap(), Action::await_change());
    assert!(scene.node.expanded().is_empty());
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_second_growth_waits_for_kubelet_to_end_the_first() {
    let mut scene = scene().await;
    for status in ["NodeResizePending", "NodeResizeInProgress"] {
        for request in ["2Gi", "9Gi"] {
            let claim = under_way(request, "3Gi", status);
            assert_eq!(reconcile(parsed(claim), scene.ctx.clone()).await.unwrap(), Action::await_change());
        }
    }
    assert!(scene.node.expanded().is_empty());
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn no_room_is_said_on_the_claim_and_nothing_else_changes() {
    let mut scene = scene().await;
    scene.node.refuse(Status::resource_exhausted("volume group vg0 has 10 GiB free: 79 GiB are missing"));
    let running = tokio::spawn(reconcile(parsed(raised("90Gi")), scene.ctx.clone()));
    announced(&mut scene, "90Gi", "7").await;
    let asked = scene.api.expect("PATCH", &status_path()).await;
    let status = asked.body["status"].clone();
    assert_eq!(asked.body["metadata"], json!({"uid": CLAIM_UID, "resourceVersion": "8"}));
    assert_eq!(status["allocatedResourceStatuses"], json!({"storage": "ControllerResizeInfeasible"}));
    assert_eq!(condition_types(&status), ["Unused", "ControllerResizeError"]);
    assert!(status["conditions"][1]["message"].as_str().unwrap().contains("79 GiB are missing"), "{status}");
    asked.answer(200, under_way("90Gi", "90Gi", "ControllerResizeInfeasible"));
    let note = scene.api.expect_event("shop", "VolumeGrowthImpossible").await;
    assert!(note.contains("90 GiB") && note.contains("79 GiB are missing") && note.contains("with 1 GiB"), "{note}");
    running.await.unwrap().unwrap();

    // Whatever else changes on the claim, the node is not asked again.
    let refused = under_way("90Gi", "90Gi", "ControllerResizeInfeasible");
    assert_eq!(reconcile(parsed(refused), scene.ctx.clone()).await.unwrap(), Action::await_change());
    assert_eq!(scene.node.expanded().len(), 1);
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_lower_request_that_fits_is_served() {
    let mut scene = scene().await;
    let lowered = under_way("2Gi", "90Gi", "ControllerResizeInfeasible");
    let running = tokio::spawn(reconcile(parsed(lowered), scene.ctx.clone()));
    announced(&mut scene, "2Gi", "7").await;
    scene.api.expect("PATCH", &pv_path()).await.answer(200, csi_volume("Bound"));
    handed_over(&mut scene, "2Gi", "8").await;
    running.await.unwrap().unwrap();
    assert_eq!(scene.node.expanded(), [(format!("vg0/{VOLUME}"), 2 * GIB as i64)]);
}

#[tokio::test]
async fn room_that_comes_is_used() {
    let refused = under_way("9Gi", "9Gi", "ControllerResizeInfeasible");
    let world = World { volumes: vec![csi_volume("Bound")], claims: vec![refused.clone()], ..with_node() };
    let mut scene = Scene::new(world).await;
    // The node's reports bring the claim back, and no other's.
    let concerned = |news: News| growth::concerned_by_node(Some(&news), &scene.ctx);
    let claim = [ObjectRef::new("data-db-0").within("shop")];
    assert_eq!(concerned(News::Capacity("n1".into())), claim);
    assert_eq!(concerned(News::Up("n1".into())), claim);
    assert!(concerned(News::Capacity("n2".into())).is_empty());
    assert!(concerned(News::Down("n1".into())).is_empty());
    assert_eq!(growth::concerned_by_node(None, &scene.ctx), claim);

    scene.group_has(8 * GIB - 4 * MIB);
    assert_eq!(reconcile(parsed(refused.clone()), scene.ctx.clone()).await.unwrap(), Action::await_change());
    scene.api.expect_nothing_more().await;
    scene.group_has(8 * GIB);
    let running = tokio::spawn(reconcile(parsed(refused), scene.ctx.clone()));
    announced(&mut scene, "9Gi", "7").await;
    scene.api.expect("PATCH", &pv_path()).await.answer(200, csi_volume("Bound"));
    handed_over(&mut scene, "9Gi", "8").await;
    running.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_node_that_refuses_although_its_group_has_room_is_asked_seldom() {
    let mut scene = scene().await;
    scene.node.refuse(Status::resource_exhausted("somebody was faster"));
    let running = tokio::spawn(reconcile(parsed(raised("3Gi")), scene.ctx.clone()));
    announced(&mut scene, "3Gi", "7").await;
    let refused = under_way("3Gi", "3Gi", "ControllerResizeInfeasible");
    scene.api.expect("PATCH", &status_path()).await.answer(200, refused.clone());
    scene.api.expect_event("shop", "VolumeGrowthImpossible").await;
    assert_ne!(running.await.unwrap().unwrap(), Action::await_change());
    // Its own change of the claim comes back at once.
    assert_ne!(reconcile(parsed(refused), scene.ctx.clone()).await.unwrap(), Action::await_change());
    assert_eq!(scene.node.expanded().len(), 1);
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_node_that_cannot_do_it_now_is_told_of_and_asked_again() {
    for (refusal, on_claim) in
        [(Status::unavailable("the lock is busy"), false), (Status::internal("device is read-only"), true)]
    {
        let mut scene = scene().await;
        scene.node.refuse(refusal.clone());
        let begun = under_way("3Gi", "3Gi", "ControllerResizeInProgress");
        let running = tokio::spawn(reconcile(parsed(begun.clone()), scene.ctx.clone()));
        if on_claim {
            let asked = scene.api.expect("PATCH", &status_path()).await;
            let status = &asked.body["status"];
            assert_eq!(status["allocatedResourceStatuses"], json!({"storage": "ControllerResizeInProgress"}));
            assert_eq!(condition_types(status), ["Unused", "ControllerResizeError"]);
            asked.answer(200, begun.clone());
        }
        let note = scene.api.expect_event("shop", "VolumeGrowthFailed").await;
        assert!(note.contains(refusal.message()) && note.contains("tried again"), "{note}");
        let Ok(Ok(again)) = running.await else { panic!("failed") };
        assert_eq!(again, Action::requeue(Duration::from_millis(500)));
        // Not before that time.
        assert_ne!(reconcile(parsed(begun.clone()), scene.ctx.clone()).await.unwrap(), Action::await_change());
        assert_eq!(scene.node.expanded().len(), 1);

        tokio::time::sleep(Duration::from_millis(510)).await;
        scene.node.serve();
        let running = tokio::spawn(reconcile(parsed(begun), scene.ctx.clone()));
        scene.api.expect("PATCH", &pv_path()).await.answer(200, csi_volume("Bound"));
        handed_over(&mut scene, "3Gi", "7").await;
        running.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_silent_node_is_waited_for_and_told_of_when_it_stays_silent() {
    let begun = under_way("3Gi", "3Gi", "ControllerResizeInProgress");
    let mut scene = scene().await;
    let down = |since| State::Down { since, why: "connection refused".into() };
    scene.node_is(down(std::time::Instant::now()));
    assert_ne!(reconcile(parsed(begun.clone()), scene.ctx.clone()).await.unwrap(), Action::await_change());
    scene.api.expect_nothing_more().await;

    Arc::get_mut(&mut scene.ctx).unwrap().patience = Duration::ZERO;
    scene.ctx.failures.heard_from("n1");
    let running = tokio::spawn(reconcile(parsed(begun.clone()), scene.ctx.clone()));
    let note = scene.api.expect_event("shop", "VolumeGrowthFailed").await;
    assert!(note.contains("n1") && note.contains("connection refused"), "{note}");
    running.await.unwrap().unwrap();
    assert!(scene.node.expanded().is_empty());

    // Back again, it is asked at once.
    scene.group_has(10 * GIB);
    scene.ctx.failures.heard_from("n1");
    let running = tokio::spawn(reconcile(parsed(begun), scene.ctx.clone()));
    scene.api.expect("PATCH", &pv_path()).await.answer(200, csi_volume("Bound"));
    handed_over(&mut scene, "3Gi", "7").await;
    running.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_size_that_is_too_small_is_not_believed() {
    let mut scene = scene().await;
    let begun = under_way("9223372036854775807", "9223372036854775807", "ControllerResizeInProgress");
    assert!(reconcile(parsed(begun), scene.ctx.clone()).await.is_err());
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_growth_that_is_through_is_forgotten_on_the_pv() {
    let mut grown = csi_volume("Bound");
    grown["spec"]["capacity"]["storage"] = json!("3Gi");
    grown["metadata"]["annotations"]["volume.alpha.kubernetes.io/pre-resize-capacity"] = json!("1Gi");
    let mut scene = Scene::new(World { volumes: vec![grown.clone()], ..with_node() }).await;
    let mut claim = raised("3Gi");
    claim["status"]["capacity"]["storage"] = json!("3Gi");
    claim["status"]["allocatedResources"] = json!({"storage": "3Gi"});
    let running = tokio::spawn(reconcile(parsed(claim.clone()), scene.ctx.clone()));
    let asked = scene.api.expect("PATCH", &pv_path()).await;
    let annotations = json!({"volume.alpha.kubernetes.io/pre-resize-capacity": null});
    assert_eq!(asked.body, json!({"metadata": {"uid": "volume-uid", "annotations": annotations}}));
    asked.answer(200, grown.clone());
    running.await.unwrap().unwrap();

    grown["metadata"]["annotations"].as_object_mut().unwrap().remove("volume.alpha.kubernetes.io/pre-resize-capacity");
    let mut scene = Scene::new(World { volumes: vec![grown], ..with_node() }).await;
    reconcile(parsed(claim), scene.ctx.clone()).await.unwrap();
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_flex_volume_is_the_controller_managers_to_grow() {
    let mut scene = Scene::new(World { volumes: vec![volume("Bound")], ..with_node() }).await;
    reconcile(parsed(raised("3Gi")), scene.ctx.clone()).await.unwrap();
    assert!(scene.node.expanded().is_empty());
    scene.api.expect_nothing_more().await;
}
