//! Unmounts that keep failing, and the Events that tell of them.

use std::time::Instant;

use lvprov_proto::lvprov::FailingUnmount;
use serde_json::{Value, json};

use super::super::nodes::{State, Troubles};
use super::super::trouble::Teller;
use super::{ApiServer, Scene, with_node};

const PODS: &str = "/api/v1/pods";

fn report(pods: &[&str]) -> Troubles {
    let failing = |pod: &&str| FailingUnmount {
        pod_uid: (*pod).to_owned(),
        target: format!("/var/lib/kubelet/pods/{pod}/volumes/lvprov.io~lvm/logs"),
        message: "cannot unmount it: EBUSY".into(),
        users: vec!["process 7 (tail)".into()],
        ..FailingUnmount::default()
    };
    Troubles { node: "n1".into(), failing: pods.iter().map(failing).collect() }
}

fn pod(name: &str, uid: &str, annotations: Value) -> Value {
    json!({
        "apiVersion": "meta.k8s.io/v1",
        "kind": "PartialObjectMetadata",
        "metadata": {"namespace": "shop", "name": name, "uid": uid, "annotations": annotations},
    })
}

async fn answer_pods(api: &mut ApiServer) {
    let items = [
        pod("other", "9999", json!({})),
        pod("web-0", "1111", json!({})),
        pod("etcd-n1", "in-the-api", json!({"kubernetes.io/config.hash": "2222"})),
    ];
    let list =
        json!({"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadataList", "metadata": {}, "items": items});
    api.expect("GET", PODS).await.answer(200, list);
}

#[tokio::test]
async fn the_pod_is_told_once_until_the_text_is_old() {
    let mut scene = Scene::new(with_node()).await;
    let mut teller = Teller::default();
    teller.take(report(&["1111"]));
    let ctx = scene.ctx.clone();
    let (teller, note) = tokio::join!(
        async {
            teller.tell(&ctx).await;
            teller
        },
        async {
            answer_pods(&mut scene.api).await;
            scene.api.expect_event("shop", "FailedUnmount").await
        }
    );
    assert!(note.contains("Volume logs") && note.contains("on node n1") && note.contains("process 7 (tail)"), "{note}");
    let mut teller = teller;
    teller.take(report(&["1111"]));
    teller.tell(&ctx).await;
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_static_pods_mirror_is_told_and_one_that_has_gone_costs_one_look() {
    let mut scene = Scene::new(with_node()).await;
    let mut teller = Teller::default();
    teller.take(report(&["2222", "3333"]));
    let ctx = scene.ctx.clone();
    tokio::join!(teller.tell(&ctx), async {
        answer_pods(&mut scene.api).await;
        let path = "/apis/events.k8s.io/v1/namespaces/shop/events";
        let asked = scene.api.expect("POST", path).await;
        assert_eq!(asked.body["regarding"]["name"], "etcd-n1");
        assert_eq!(asked.body["regarding"]["uid"], "in-the-api");
        assert_eq!(asked.body["regarding"]["kind"], "Pod");
        let event = asked.body.clone();
        asked.answer(201, event);
    });
    teller.tell(&ctx).await;
    scene.api.expect_nothing_more().await;
}

#[tokio::test]
async fn what_a_silent_node_said_is_not_repeated_and_an_api_that_fails_is_asked_again() {
    let mut scene = Scene::new(with_node()).await;
    let mut teller = Teller::default();
    teller.take(report(&["1111"]));
    let ctx = scene.ctx.clone();
    scene.node_is(State::Down { since: Instant::now(), why: "refused".into() });
    teller.tell(&ctx).await;
    scene.api.expect_nothing_more().await;

    scene.node_is(State::Up(Vec::new()));
    tokio::join!(teller.tell(&ctx), async {
        scene.api.expect("GET", PODS).await.refuse(403, "Forbidden");
    });
    tokio::join!(teller.tell(&ctx), async {
        answer_pods(&mut scene.api).await;
        scene.api.expect_event("shop", "FailedUnmount").await;
    });
}
