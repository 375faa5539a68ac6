//! Nodes that have left the cluster for good.

use jiff::{SignedDuration, Timestamp};

use super::super::loss::{Pace, Settings, look};
use super::*;

const AFTER: Duration = Duration::from_secs(600);
const SINCE: &str = "lvprov.io/node-lost-since";

fn settings() -> Settings {
    Settings { after: AFTER, claims_per_minute: 10, most_percent: 20 }
}

fn pv_path(name: &str) -> String {
    format!("/api/v1/persistentvolumes/{name}")
}

/// A volume on `node`, whose absence was seen so many seconds ago.
fn on(node: &str, phase: &str, seen: Option<i64>) -> Value {
    let mut volume = volume(phase);
    volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"][0]["matchExpressions"][0]["values"] = json!([node]);
    volume["metadata"]["annotations"]["lvprov.io/on-node-loss"] = json!("recreate");
    if let Some(seen) = seen {
        let since = Timestamp::now() - SignedDuration::from_secs(seen);
        volume["metadata"]["annotations"][SINCE] = json!(since.to_string());
    }
    volume
}

fn bound_claim() -> Value {
    let mut claim = claim();
    claim["spec"]["volumeName"] = json!(VOLUME);
    claim
}

fn pod(node: Option<&str>, owner: &str) -> Value {
    json!({
        "metadata": {"name": "db-0", "namespace": "shop", "ownerReferences": [
            {"apiVersion": "apps/v1", "kind": owner, "name": "db", "uid": "set-uid", "controller": true},
        ]},
        "spec": {"nodeName": node, "containers": [],
                 "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data-db-0"}}]},
    })
}

fn pods(items: &[Value]) -> Value {
    json!({"apiVersion": "v1", "kind": "PodList", "metadata": {"resourceVersion": "1"}, "items": items})
}

async fn scene(volumes: Vec<Value>) -> Scene {
    Scene::new(World { volumes, ..with_node() }).await
}

/// One look in the background; the node is not there, as the API server says.
async fn begin(scene: &mut Scene, settings: Settings) -> tokio::task::JoinHandle<Option<Duration>> {
    let ctx = scene.ctx.clone();
    let running = tokio::spawn(async move { look(&ctx, settings, &mut Pace::default()).await.unwrap() });
    scene.api.expect("GET", "/api/v1/nodes/n9").await.refuse(404, "NotFound");
    running
}

#[tokio::test]
async fn without_a_lost_node_nobody_is_asked() {
    let mut scene = scene(vec![volume("Bound")]).await;
    assert_eq!(look(&scene.ctx, settings(), &mut Pace::default()).await.unwrap(), None);
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn the_first_look_is_noted_and_told_and_deletes_nothing() {
    let mut scene = scene(vec![on("n9", "Bound", None)]).await;
    let running = begin(&mut scene, settings()).await;
    let patch = scene.api.expect("PATCH", &pv_path(VOLUME)).await;
    let since: Timestamp = patch.body["metadata"]["annotations"][SINCE].as_str().unwrap().parse().unwrap();
    assert!(Timestamp::now().duration_since(since) < SignedDuration::from_secs(60));
    assert_eq!(patch.body["metadata"]["uid"], "volume-uid");
    patch.answer(200, on("n9", "Bound", Some(0)));
    scene.api.expect("GET", CLAIM_PATH).await.answer(200, bound_claim());
    for namespace in ["shop", "default"] {
        let note = scene.api.expect_event(namespace, "NodeLost").await;
        assert!(note.contains("node n9") && note.contains("600 s") && note.contains("StatefulSet"), "{note}");
    }
    assert!(running.await.unwrap().is_some());
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn before_its_time_nothing_is_done_whoever_looks() {
    // Also a controller that has just been started: the time is on the volume.
    let mut scene = scene(vec![on("n9", "Bound", Some(590))]).await;
    let again = begin(&mut scene, settings()).await.await.unwrap().unwrap();
    assert!(again <= Duration::from_secs(10), "{again:?}");
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_claim_that_a_statefulset_waits_for_is_deleted() {
    let mut scene = scene(vec![on("n9", "Bound", Some(601))]).await;
    let running = begin(&mut scene, settings()).await;
    scene.api.expect("GET", &pv_path(VOLUME)).await.answer(200, on("n9", "Bound", Some(601)));
    scene.api.expect("GET", CLAIM_PATH).await.answer(200, bound_claim());
    let list = scene.api.expect("GET", "/api/v1/namespaces/shop/pods").await;
    assert!(list.query.contains("limit=500"), "{}", list.query);
    list.answer(200, pods(&[pod(None, "StatefulSet")]));
    let note = scene.api.expect_event("shop", "ClaimGivenUp").await;
    assert!(note.contains("n9") && note.contains(VOLUME), "{note}");
    let delete = scene.api.expect("DELETE", CLAIM_PATH).await;
    assert_eq!(delete.body["preconditions"]["uid"], CLAIM_UID);
    delete.answer(200, bound_claim());
    running.await.unwrap();
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_claim_is_kept_while_a_pod_is_placed_or_nobody_would_make_it_anew() {
    for present in [vec![pod(Some("n9"), "StatefulSet")], vec![pod(None, "ReplicaSet")], vec![]] {
        let mut scene = scene(vec![on("n9", "Bound", Some(601))]).await;
        let running = begin(&mut scene, settings()).await;
        scene.api.expect("GET", &pv_path(VOLUME)).await.answer(200, on("n9", "Bound", Some(601)));
        scene.api.expect("GET", CLAIM_PATH).await.answer(200, bound_claim());
        scene.api.expect("GET", "/api/v1/namespaces/shop/pods").await.answer(200, pods(&present));
        assert!(running.await.unwrap().is_some());
        scene.api.expect_nothing_more().await;
    }
}

#[tokio::test]
async fn a_claim_that_is_another_by_now_is_kept() {
    let mut again = bound_claim();
    again["metadata"]["uid"] = json!("another");
    let mut scene = scene(vec![on("n9", "Bound", Some(601))]).await;
    let running = begin(&mut scene, settings()).await;
    scene.api.expect("GET", &pv_path(VOLUME)).await.answer(200, on("n9", "Bound", Some(601)));
    scene.api.expect("GET", CLAIM_PATH).await.answer(200, again);
    running.await.unwrap();
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn by_default_a_claim_is_kept() {
    let mut kept = on("n9", "Bound", Some(100_000));
    kept["metadata"]["annotations"].as_object_mut().unwrap().remove("lvprov.io/on-node-loss");
    let mut scene = scene(vec![kept]).await;
    assert!(begin(&mut scene, settings()).await.await.unwrap().is_some());
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_released_volume_is_left_behind_and_its_pv_goes() {
    let mut scene = scene(vec![on("n9", "Released", Some(601))]).await;
    let running = begin(&mut scene, settings()).await;
    scene.api.expect("GET", &pv_path(VOLUME)).await.answer(200, on("n9", "Released", Some(601)));
    scene.api.expect("GET", CLAIM_PATH).await.refuse(404, "NotFound");
    let note = scene.api.expect_event("default", "VolumeLeftBehind").await;
    assert!(note.contains(&format!("vg0/{VOLUME}")) && note.contains("n9") && note.contains("lvprov gc"), "{note}");
    let delete = scene.api.expect("DELETE", &pv_path(VOLUME)).await;
    assert_eq!(delete.body["preconditions"]["uid"], "volume-uid");
    let mut deleting = on("n9", "Released", Some(601));
    deleting["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    delete.answer(200, deleting.clone());
    scene.api.expect("GET", &pv_path(VOLUME)).await.answer(200, deleting.clone());
    let patch = scene.api.expect("PATCH", &pv_path(VOLUME)).await;
    assert_eq!(patch.body["metadata"]["finalizers"], json!(["kubernetes.io/pv-protection"]));
    patch.answer(200, deleting);
    running.await.unwrap();
    assert!(scene.node.deleted().is_empty());
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn what_cannot_be_asked_is_not_gone() {
    for (status, reason) in [(503, "ServiceUnavailable"), (403, "Forbidden"), (500, "InternalError")] {
        let mut scene = scene(vec![on("n9", "Bound", Some(601)), on("n8", "Released", Some(601))]).await;
        let ctx = scene.ctx.clone();
        let running = tokio::spawn(async move { look(&ctx, settings(), &mut Pace::default()).await });
        // Volumes of one name count once in the store: the last one.
        scene.api.expect("GET", "/api/v1/nodes/n8").await.refuse(status, reason);
        assert!(running.await.unwrap().is_err());
        scene.api.expect_nothing_more().await;
    }
}

#[tokio::test]
async fn a_node_that_the_watch_has_lost_and_the_api_has_not_is_there() {
    let mut scene = scene(vec![on("n9", "Bound", Some(601))]).await;
    let ctx = scene.ctx.clone();
    let running = tokio::spawn(async move { look(&ctx, settings(), &mut Pace::default()).await.unwrap() });
    scene.api.expect("GET", "/api/v1/nodes/n9").await.answer(200, node_object());
    running.await.unwrap();
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_node_that_is_back_begins_anew() {
    let mut scene = scene(vec![on("n1", "Bound", Some(601))]).await;
    let ctx = scene.ctx.clone();
    let running = tokio::spawn(async move { look(&ctx, settings(), &mut Pace::default()).await.unwrap() });
    let patch = scene.api.expect("PATCH", &pv_path(VOLUME)).await;
    assert_eq!(patch.body["metadata"]["annotations"], json!({SINCE: null}));
    patch.answer(200, on("n1", "Bound", None));
    assert_eq!(running.await.unwrap(), None);
}

/// Volumes on nodes n90, n91 …, one on each.
fn spread(count: usize) -> Vec<Value> {
    let volume = |number: usize| {
        let mut volume = on(&format!("n9{number}"), "Bound", Some(601));
        volume["metadata"]["name"] = json!(format!("pvc-{number}"));
        volume["metadata"]["uid"] = json!(format!("uid-{number}"));
        volume["spec"]["claimRef"]["name"] = json!(format!("data-db-{number}"));
        volume
    };
    (0..count).map(volume).collect()
}

#[tokio::test]
async fn where_many_have_gone_at_once_nothing_is_given_up() {
    // Two of three, and one is the most.
    let mut scene = scene(spread(2)).await;
    let ctx = scene.ctx.clone();
    let running = tokio::spawn(async move { look(&ctx, settings(), &mut Pace::default()).await.unwrap() });
    for node in ["n90", "n91"] {
        scene.api.expect("GET", &format!("/api/v1/nodes/{node}")).await.refuse(404, "NotFound");
    }
    for _ in 0..2 {
        let note = scene.api.expect_event("default", "NodeLossStopped").await;
        assert!(note.contains("2 of 3 nodes") && note.contains("20%"), "{note}");
    }
    assert!(running.await.unwrap().is_some());
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn claims_go_one_after_the_other() {
    let mut volumes = spread(2);
    volumes[1]["spec"]["nodeAffinity"] = volumes[0]["spec"]["nodeAffinity"].clone();
    let mut scene = scene(volumes.clone()).await;
    let ctx = scene.ctx.clone();
    let slowly = Settings { claims_per_minute: 1, ..settings() };
    let mut pace = Pace::default();
    let running = tokio::spawn(async move {
        let again = look(&ctx, slowly, &mut pace).await.unwrap();
        (again, look(&ctx, slowly, &mut pace).await.unwrap())
    });
    scene.api.expect("GET", "/api/v1/nodes/n90").await.refuse(404, "NotFound");
    let path = "/api/v1/namespaces/shop/persistentvolumeclaims/data-db-0";
    let mut first = bound_claim();
    first["spec"]["volumeName"] = json!("pvc-0");
    let mut waiting = pod(None, "StatefulSet");
    waiting["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] = json!("data-db-0");
    scene.api.expect("GET", &pv_path("pvc-0")).await.answer(200, volumes[0].clone());
    scene.api.expect("GET", path).await.answer(200, first.clone());
    scene.api.expect("GET", "/api/v1/namespaces/shop/pods").await.answer(200, pods(&[waiting]));
    scene.api.expect_event("shop", "ClaimGivenUp").await;
    scene.api.expect("DELETE", path).await.answer(200, first);
    // The second look: it is too early for any other.
    scene.api.expect("GET", "/api/v1/nodes/n90").await.refuse(404, "NotFound");
    let (_, again) = running.await.unwrap();
    assert!(again.is_some());
    scene.api.expect_nothing_more().await;
}
