//! What a node may have made for a claim that does not need it any more.

use super::super::calls::clear;
use super::super::claim::reconcile;
use super::super::leftovers;
use super::*;
use lvprov_proto::lvprov::DataVolume;
use tonic::Status;

fn volume_path() -> String {
    format!("/api/v1/persistentvolumes/{VOLUME}")
}

/// The PV of the claim, with its volume on another node.
fn elsewhere() -> Value {
    let mut volume = volume("Bound");
    volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"][0]["matchExpressions"][0]["values"] = json!(["n2"]);
    volume
}

/// The node was asked for a volume, and nobody knows whether it has made it.
async fn cut_off(world: World) -> Scene {
    let mut scene = Scene::new(World { nodes: vec![node_object()], ..world }).await;
    scene.node.refuse(Status::deadline_exceeded("too slow"));
    let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
    scene.api.expect_event("shop", "ProvisioningFailed").await;
    running.await.unwrap().unwrap();
    scene.node.serve();
    assert_eq!(scene.ctx.calls.unknown().len(), 1);
    scene
}

/// One look at what is left, with these answers of the API server.
async fn look(scene: &mut Scene, claim: Option<Value>, volume: Option<Value>) {
    let ctx = scene.ctx.clone();
    let running = tokio::spawn(async move { clear(&ctx).await });
    for (path, object) in [(CLAIM_PATH.to_owned(), claim), (volume_path(), volume)] {
        let asked = scene.api.expect("GET", &path).await;
        match object {
            Some(object) => asked.answer(200, object),
            None => asked.refuse(404, "NotFound"),
        }
    }
    running.await.unwrap();
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_claim_deleted_in_the_middle_leaves_no_volume() {
    let mut scene = cut_off(World::default()).await;
    look(&mut scene, None, None).await;
    assert_eq!(scene.node.deleted(), [format!("vg0/{VOLUME}")]);
    assert!(scene.ctx.calls.unknown().is_empty());
}

#[tokio::test]
async fn a_claim_made_again_under_the_name_is_another() {
    let mut scene = cut_off(World::default()).await;
    let mut again = claim();
    again["metadata"]["uid"] = json!("another");
    look(&mut scene, Some(again), None).await;
    assert_eq!(scene.node.deleted(), [format!("vg0/{VOLUME}")]);
}

#[tokio::test]
async fn while_the_claim_waits_its_volume_is_left_for_it() {
    // As the watch has it, nobody is even asked.
    let mut scene = cut_off(World { claims: vec![claim()], ..World::default() }).await;
    clear(&scene.ctx).await;
    scene.api.expect_nothing_more().await;
    // The watch has lost it, the API server has not.
    let mut scene = cut_off(World::default()).await;
    look(&mut scene, Some(claim()), None).await;
    assert!(scene.node.deleted().is_empty());
    assert_eq!(scene.ctx.calls.unknown().len(), 1);
}

#[tokio::test]
async fn a_volume_that_a_pv_names_is_not_left_over() {
    let mut scene = cut_off(World::default()).await;
    look(&mut scene, None, Some(volume("Released"))).await;
    assert!(scene.node.deleted().is_empty());
    assert!(scene.ctx.calls.unknown().is_empty());
}

#[tokio::test]
async fn a_claim_that_was_bound_has_left_nothing() {
    let scene = cut_off(World::default()).await;
    let mut bound = claim();
    bound["spec"]["volumeName"] = json!(VOLUME);
    reconcile(parsed(bound), scene.ctx.clone()).await.unwrap();
    assert!(scene.ctx.calls.unknown().is_empty());
}

#[tokio::test]
async fn a_claim_served_elsewhere_after_all_leaves_no_volume_here() {
    let mut scene = cut_off(World { claims: vec![claim()], ..World::default() }).await;
    // It was handed back meanwhile, and has its volume on n2.
    let World { volumes, .. } = World { volumes: vec![elsewhere()], ..World::default() };
    Arc::get_mut(&mut scene.ctx).unwrap().volumes = kept(volumes);
    look(&mut scene, Some(claim()), Some(elsewhere())).await;
    assert_eq!(scene.node.deleted(), [format!("vg0/{VOLUME}")]);
    assert_eq!(scene.node.meant(), ["n1", "n1"]);
}

#[tokio::test]
async fn without_an_answer_of_api_server_or_node_nothing_is_removed_or_forgotten() {
    let mut scene = cut_off(World::default()).await;
    let ctx = scene.ctx.clone();
    let running = tokio::spawn(async move { clear(&ctx).await });
    scene.api.expect("GET", CLAIM_PATH).await.answer(200, json!({"kind": "Status"}));
    running.await.unwrap();
    scene.node_is(State::Connecting);
    look(&mut scene, None, None).await;
    assert!(scene.node.deleted().is_empty());
    assert_eq!(scene.ctx.calls.unknown().len(), 1);
}

#[tokio::test]
async fn a_volume_made_beside_the_one_the_pv_names_is_removed_and_told_of() {
    let mut scene = Scene::new(World { claims: vec![claim()], ..with_node() }).await;
    let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
    scene.api.expect("POST", "/api/v1/persistentvolumes").await.refuse(409, "AlreadyExists");
    scene.api.expect("GET", &volume_path()).await.answer(200, elsewhere());
    let note = scene.api.expect_event("shop", "ProvisioningFailed").await;
    assert!(note.contains("on node n2") && note.contains("node n1 is removed"), "{note}");
    running.await.unwrap().unwrap();
    Arc::get_mut(&mut scene.ctx).unwrap().volumes = kept(vec![elsewhere()]);
    look(&mut scene, Some(claim()), Some(elsewhere())).await;
    assert_eq!(scene.node.deleted(), [format!("vg0/{VOLUME}")]);
}

#[tokio::test]
async fn nobody_asks_for_a_volume_that_is_being_removed() {
    let mut scene = cut_off(World::default()).await;
    let left = scene.ctx.calls.unknown().remove(0);
    let removing = scene.ctx.calls.begin(left).unwrap();
    reconcile(parsed(claim()), scene.ctx.clone()).await.unwrap();
    assert_eq!(scene.node.created().len(), 1);
    drop(removing);
    scene.api.expect_nothing_more().await;
}

/// A node with a volume that an earlier controller has asked for.
async fn found(world: World, used: bool, change: impl FnOnce(&mut DataVolume)) -> Scene {
    let scene = Scene::new(World { nodes: vec![node_object()], ..world }).await;
    let mut volume = DataVolume {
        volume_group: "vg0".into(),
        logical_volume: VOLUME.into(),
        claim_uid: CLAIM_UID.into(),
        claim_namespace: "shop".into(),
        claim_name: "data-db-0".into(),
        cluster: "cluster".into(),
        ..DataVolume::default()
    };
    change(&mut volume);
    scene.node.has(volume, used);
    leftovers::look("n1", &scene.ctx).await.unwrap();
    scene
}

#[tokio::test]
async fn what_an_earlier_controller_left_goes_if_nobody_has_used_it() {
    for used in [false, true] {
        let mut scene = found(World::default(), used, |_| {}).await;
        look(&mut scene, None, None).await;
        assert_eq!(scene.node.collected().len(), usize::from(!used));
        assert!(scene.node.deleted().is_empty(), "whether it is used was not looked at");
        assert!(scene.ctx.calls.unknown().is_empty());
    }
}

#[tokio::test]
async fn what_may_be_needed_or_is_somebody_elses_stays_whoever_left_it() {
    // Its claim waits for it, or its PV is there though the watch has not brought it.
    let mut scene = found(World::default(), false, |_| {}).await;
    look(&mut scene, Some(claim()), None).await;
    assert_eq!(scene.ctx.calls.unknown().len(), 1);
    let mut scene = found(World::default(), false, |_| {}).await;
    look(&mut scene, None, Some(volume("Released"))).await;
    assert!(scene.node.collected().is_empty() && scene.ctx.calls.unknown().is_empty());
    // Nothing is even asked.
    let known = World { volumes: vec![volume("Bound")], ..World::default() };
    for scene in [
        found(known, false, |_| {}).await,
        found(World::default(), false, |volume| volume.cluster = "another".into()).await,
        found(World::default(), false, |volume| volume.open = true).await,
    ] {
        assert!(scene.ctx.calls.unknown().is_empty());
    }
}

#[tokio::test]
async fn a_node_that_cannot_list_its_volumes_is_looked_at_again() {
    let scene = Scene::new(with_node()).await;
    scene.node.refuse(Status::unavailable("lvm is busy"));
    assert_eq!(leftovers::look("n1", &scene.ctx).await.unwrap_err(), "lvm is busy");
}

/// The volume is asked for again, then the claim goes: no longer found, but ours.
#[tokio::test]
async fn a_volume_found_and_then_asked_for_is_one_asked_for() {
    let mut scene = found(World::default(), true, |_| {}).await;
    scene.node.refuse(Status::deadline_exceeded("too slow"));
    let running = tokio::spawn(reconcile(parsed(claim()), scene.ctx.clone()));
    scene.api.expect_event("shop", "ProvisioningFailed").await;
    running.await.unwrap().unwrap();
    scene.node.serve();
    look(&mut scene, None, None).await;
    assert_eq!(scene.node.deleted(), [format!("vg0/{VOLUME}")]);
}
