//! PersistentVolumes whose claims have gone.

use super::super::queue::Action;
use super::super::volume::reconcile;
use super::*;
use tonic::Status;

fn path() -> String {
    format!("/api/v1/persistentvolumes/{VOLUME}")
}

#[tokio::test]
async fn a_released_volume_goes_before_its_pv() {
    goes_before_its_pv(volume("Released")).await;
}

#[tokio::test]
async fn a_released_csi_volume_goes_before_its_pv_too() {
    goes_before_its_pv(csi_volume("Released")).await;
}

async fn goes_before_its_pv(released: Value) {
    let mut scene = Scene::new(World::default()).await;
    let running = tokio::spawn(reconcile(parsed(released.clone()), scene.ctx.clone()));
    scene.api.expect("GET", &path()).await.answer(200, released.clone());
    scene.api.expect("GET", CLAIM_PATH).await.refuse(404, "NotFound");

    let asked = scene.api.expect("DELETE", &path()).await;
    assert_eq!(scene.node.deleted(), [format!("vg0/{VOLUME}")]);
    assert_eq!(scene.node.meant(), ["n1"]);
    assert_eq!(asked.body["preconditions"], json!({"uid": "volume-uid"}));
    let mut deleted = released;
    deleted["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    deleted["metadata"]["resourceVersion"] = json!("12");
    asked.answer(200, deleted.clone());

    scene.api.expect("GET", &path()).await.answer(200, deleted.clone());
    let asked = scene.api.expect("PATCH", &path()).await;
    assert_eq!(
        asked.body,
        json!({"metadata": {"resourceVersion": "12", "finalizers": ["kubernetes.io/pv-protection"]}})
    );
    asked.answer(200, deleted);
    assert_eq!(running.await.unwrap().unwrap(), Action::await_change());
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_volume_in_use_keeps_its_pv_and_says_so() {
    let mut scene = Scene::new(World::default()).await;
    scene.node.refuse(Status::failed_precondition("logical volume vg0/x is in use (mounted by process 17)"));
    let running = tokio::spawn(reconcile(parsed(volume("Released")), scene.ctx.clone()));
    scene.api.expect("GET", &path()).await.answer(200, volume("Released"));
    scene.api.expect("GET", CLAIM_PATH).await.refuse(404, "NotFound");
    let note = scene.api.expect_event("default", "VolumeInUse").await;
    assert!(note.contains("process 17"), "{note}");
    assert_ne!(running.await.unwrap().unwrap(), Action::await_change());
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn what_the_node_does_not_remove_for_us_is_told_in_its_words() {
    for refusal in [
        Status::permission_denied("logical volume vg0/x does not carry the tags of lvprov; it is left alone"),
        Status::unavailable("this is node n2"),
    ] {
        let mut scene = Scene::new(World::default()).await;
        scene.node.refuse(refusal.clone());
        let running = tokio::spawn(reconcile(parsed(volume("Released")), scene.ctx.clone()));
        scene.api.expect("GET", &path()).await.answer(200, volume("Released"));
        scene.api.expect("GET", CLAIM_PATH).await.refuse(404, "NotFound");
        let note = scene.api.expect_event("default", "VolumeDeleteFailed").await;
        assert!(note.contains(refusal.message()), "{note}");
        assert_ne!(running.await.unwrap().unwrap(), Action::await_change());
        scene.api.expect_nothing_more().await;
    }
}

#[tokio::test]
async fn nothing_is_removed_before_the_node_has_shown_that_it_is_the_one() {
    let mut scene = Scene::new(World::default()).await;
    scene.node_is(State::Connecting);
    let running = tokio::spawn(reconcile(parsed(volume("Released")), scene.ctx.clone()));
    scene.api.expect("GET", &path()).await.answer(200, volume("Released"));
    scene.api.expect("GET", CLAIM_PATH).await.refuse(404, "NotFound");
    let done = tokio::time::timeout(SOON, running).await.expect("it asks or tells more");
    assert_ne!(done.unwrap().unwrap(), Action::await_change());
    assert!(scene.node.deleted().is_empty());
    // Nor is anything wrong that a user should be told of.
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn an_old_watch_does_not_cost_data() {
    // By now an admin has changed the policy, or given the volume to another claim.
    let mut kept = volume("Released");
    kept["spec"]["persistentVolumeReclaimPolicy"] = json!("Retain");
    for now in [kept, volume("Bound")] {
        let mut scene = Scene::new(World::default()).await;
        let running = tokio::spawn(reconcile(parsed(volume("Released")), scene.ctx.clone()));
        scene.api.expect("GET", &path()).await.answer(200, now);
        running.await.unwrap().unwrap();
        assert!(scene.node.deleted().is_empty());
        scene.api.expect_nothing_more().await;
    }
}

#[tokio::test]
async fn a_claim_that_still_names_the_volume_keeps_it() {
    let mut scene = Scene::new(World::default()).await;
    let running = tokio::spawn(reconcile(parsed(volume("Released")), scene.ctx.clone()));
    scene.api.expect("GET", &path()).await.answer(200, volume("Released"));
    let mut bound = claim();
    bound["spec"]["volumeName"] = json!(VOLUME);
    scene.api.expect("GET", CLAIM_PATH).await.answer(200, bound);
    scene.api.expect_event("default", "VolumeKept").await;
    running.await.unwrap().unwrap();
    assert!(scene.node.deleted().is_empty());
}

#[tokio::test]
async fn when_the_api_cannot_be_asked_nothing_is_removed() {
    let mut scene = Scene::new(World::default()).await;
    let running = tokio::spawn(reconcile(parsed(volume("Released")), scene.ctx.clone()));
    scene.api.expect("GET", &path()).await.answer(200, volume("Released"));
    scene.api.expect("GET", CLAIM_PATH).await.refuse(503, "ServiceUnavailable");
    assert!(running.await.unwrap().is_err());
    assert!(scene.node.deleted().is_empty());
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_volume_of_a_node_that_has_gone_waits_for_it() {
    let mut elsewhere = volume("Released");
    elsewhere["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"][0]["matchExpressions"][0]["values"] =
        json!(["n9"]);
    let mut scene = Scene::new(World::default()).await;
    let running = tokio::spawn(reconcile(parsed(elsewhere.clone()), scene.ctx.clone()));
    scene.api.expect("GET", &path()).await.answer(200, elsewhere);
    scene.api.expect("GET", CLAIM_PATH).await.refuse(404, "NotFound");
    let note = scene.api.expect_event("default", "NodeGone").await;
    assert!(note.contains("n9") && note.contains("finalizer"), "{note}");
    assert_eq!(running.await.unwrap().unwrap(), Action::await_change());
    assert!(scene.node.deleted().is_empty());
}
