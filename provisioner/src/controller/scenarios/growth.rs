//! Claims whose growth cannot be had.

use super::super::claim::reconcile;
use super::*;

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
    let note = scene.api.expect_event("shop", "VolumeGrowthWithdrawn").await;
    assert!(note.contains("90 GiB was taken back; it is now to 2 GiB"), "{note}");
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

#[tokio::test]
async fn on_a_full_group_the_lowest_request_ends_the_growth() {
    let mut grown = volume("Bound");
    grown["spec"]["capacity"]["storage"] = json!("90Gi");
    let mut scene = Scene::new(World { volumes: vec![grown], ..with_node() }).await;
    scene.group_has(0);
    // One byte more than it has: the API server takes no less.
    let mut lowest = lowered();
    lowest["spec"]["resources"]["requests"]["storage"] = json!("1073741825");
    let running = tokio::spawn(reconcile(parsed(lowest.clone()), scene.ctx.clone()));

    let asked = scene.api.expect("PATCH", &format!("/api/v1/persistentvolumes/{VOLUME}")).await;
    assert_eq!(
        asked.body,
        json!({
            "metadata": {"uid": "volume-uid", "resourceVersion": "11", "annotations": {
                "volume.alpha.kubernetes.io/pre-resize-capacity": null,
                "lvprov.io/growth-ended": "1073741825",
            }},
            "spec": {"capacity": {"storage": "1Gi"}},
        })
    );
    asked.answer(200, volume("Bound"));
    let asked = scene.api.expect("PATCH", &format!("{CLAIM_PATH}/status")).await;
    assert_eq!(asked.body["status"]["allocatedResources"], json!({"storage": "1Gi"}));
    assert_eq!(asked.body["status"]["allocatedResourceStatuses"], json!({"storage": null}));
    assert_eq!(asked.body["status"]["conditions"].as_array().unwrap().len(), 1);
    asked.answer(200, claim());
    let note = scene.api.expect_event("shop", "VolumeGrowthWithdrawn").await;
    assert!(note.contains("vg0 on node n1 has free (0 B): 4 MiB are missing"), "{note}");
    assert!(note.contains("with 1 GiB") && note.contains("raise the request"), "{note}");
    running.await.unwrap().unwrap();

    // With the growth ended there is nothing left to say, or to do.
    let mut ended = volume("Bound");
    ended["metadata"]["annotations"]["lvprov.io/growth-ended"] = json!("1073741825");
    let mut scene = Scene::new(World { volumes: vec![ended], ..with_node() }).await;
    scene.group_has(0);
    lowest["status"]["allocatedResources"] = json!({"storage": "1Gi"});
    lowest["status"]["allocatedResourceStatuses"] = json!({});
    lowest["status"]["conditions"] = json!([]);
    reconcile(parsed(lowest), scene.ctx.clone()).await.unwrap();
    scene.api.expect_nothing_more().await;
}
