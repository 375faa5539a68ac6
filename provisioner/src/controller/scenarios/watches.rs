//! What the watches bring, in an unfavourable order.

use super::super::capacity::Publisher;
use super::super::claim::ClassChanged;
use super::super::error::Row;
use super::super::nodes::News;
use super::super::{claim_triggers, follow_class};
use super::*;
use futures::StreamExt;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::reflector::store::Writer;
use tokio::sync::broadcast;

use crate::names::TOPOLOGY_NODE;

const CAPACITIES: &str = "/apis/storage.k8s.io/v1/namespaces/ns/csistoragecapacities";

fn brings<K>(writer: &mut Writer<K>, objects: Vec<Value>)
where
    K: kube::Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + 'static,
{
    writer.apply_watcher_event(&Event::Init);
    for object in objects {
        writer.apply_watcher_event(&Event::InitApply(serde_json::from_value(object).unwrap()));
    }
    writer.apply_watcher_event(&Event::InitDone);
}

/// Of a new leader, whose watches have brought nothing yet.
struct Publishing {
    scene: Scene,
    changed: broadcast::Sender<ClassChanged>,
    class_writer: Writer<StorageClass>,
    node_objects: Objects<Node>,
    running: tokio::task::JoinHandle<()>,
}

async fn publishing() -> Publishing {
    let scene = Scene::new(World::default()).await;
    let (classes, class_writer) = store::<StorageClass>();
    let node_objects = Objects::default();
    let nodes = scene.ctx.nodes.clone();
    let publisher = Publisher {
        client: scene.ctx.client.clone(),
        namespace: "ns".into(),
        owner: None,
        nodes,
        node_objects: node_objects.clone(),
        classes,
        patience: SOON,
        share_from: 0,
    };
    let (changed, _) = broadcast::channel(8);
    let running = tokio::spawn(publisher.run(changed.subscribe()));
    Publishing { scene, changed, class_writer, node_objects, running }
}

fn capacities(items: &[&Value]) -> Value {
    json!({
        "apiVersion": "storage.k8s.io/v1", "kind": "CSIStorageCapacityList",
        "metadata": {"resourceVersion": "5"}, "items": items,
    })
}

fn brings_nodes(objects: &Objects<Node>) {
    for event in [Event::Init, Event::InitApply(serde_json::from_value(node_object()).unwrap()), Event::InitDone] {
        objects.take(event);
    }
}

#[tokio::test]
async fn a_new_leader_withdraws_no_capacity_before_it_knows_classes_and_nodes() {
    let Publishing { mut scene, changed, mut class_writer, node_objects, running } = publishing().await;
    let stale = json!({
        "metadata": {"name": "lvprov-stale", "namespace": "ns", "uid": "stale", "resourceVersion": "5"},
        "storageClassName": "gone",
    });
    scene.api.expect("GET", CAPACITIES).await.answer(200, capacities(&[&stale]));
    let _watch = scene.api.expect("GET", CAPACITIES).await;
    // The objects are known, a class has changed: still nothing may happen.
    changed.send(ClassChanged::Any).unwrap();
    scene.api.expect_nothing_more().await;
    brings(&mut class_writer, vec![class()]);
    scene.api.expect_nothing_more().await;
    brings_nodes(&node_objects);
    // Now what there is is published, and only what there is not withdrawn.
    let asked = scene.api.handle.next_request().await.unwrap();
    assert_eq!(asked.0.method(), "PATCH");
    asked.1.send_response(Response::new(Body::from(br#"{"storageClassName": "fast"}"#.to_vec())));
    let gone = format!("{CAPACITIES}/lvprov-stale");
    scene.api.expect("DELETE", &gone).await.answer(200, stale);
    let driver = "/apis/storage.k8s.io/v1/csidrivers/lvm.lvprov.io";
    scene.api.expect("PATCH", driver).await.answer(200, json!({"metadata": {}, "spec": {}}));
    // Nothing is done twice because the watch takes its time.
    for _ in 0..3 {
        changed.send(ClassChanged::Any).unwrap();
        scene.api.expect_nothing_more().await;
    }
    running.abort();
}

/// The API server: lists are answered with this one, watches kept.
struct Server {
    api: ApiServer,
    list: Value,
    watches: Vec<SendResponse<Response<Body>>>,
}

impl Server {
    /// Without any capacity.
    fn empty(api: ApiServer) -> Self {
        Self { api, list: capacities(&[]), watches: Vec::new() }
    }

    /// The next write; None: a watch or a list was asked for.
    async fn next(&mut self) -> Option<(String, Asked)> {
        let next = tokio::time::timeout(SOON, self.api.handle.next_request()).await;
        let (request, answer) = next.expect("a request").expect("the client is gone");
        let what = format!("{} {}", request.method(), request.uri().path());
        let query = request.uri().query().unwrap_or_default().to_owned();
        if request.method() != "GET" {
            let bytes = request.into_body().collect_bytes().await.unwrap();
            let body = serde_json::from_slice(&bytes).unwrap_or_default();
            return Some((what, Asked { query, body, answer }));
        }
        match query.contains("watch=") {
            true => self.watches.push(answer),
            false => Asked { query, body: Value::Null, answer }.answer(200, self.list.clone()),
        }
        None
    }

    async fn write(&mut self) -> (String, Asked) {
        loop {
            if let Some(write) = self.next().await {
                return write;
            }
        }
    }

    /// Has the watch bring these, and then break.
    async fn watch_brings(&mut self, events: &[Value]) {
        while self.watches.is_empty() {
            assert!(self.next().await.is_none(), "an unexpected write");
        }
        let lines: String = events.iter().map(|event| format!("{event}\n")).collect();
        self.watches.remove(0).send_response(Response::new(Body::from(lines.into_bytes())));
    }

    /// The first capacity of all, and the driver.
    async fn first_capacity(&mut self) -> Value {
        let (_, asked) = self.write().await;
        let mut object = asked.body.clone();
        object["metadata"]["uid"] = json!("u");
        object["metadata"]["resourceVersion"] = json!("6");
        asked.answer(200, object.clone());
        let (what, asked) = self.write().await;
        assert!(what.starts_with("PATCH /apis/storage.k8s.io/v1/csidrivers/"), "{what}");
        asked.answer(200, json!({"metadata": {}, "spec": {}}));
        object
    }
}

fn patch_of(object: &Value) -> String {
    format!("PATCH {CAPACITIES}/{}", object["metadata"]["name"].as_str().unwrap())
}

#[tokio::test]
async fn a_capacity_that_a_new_list_lacks_is_published_anew_and_at_once() {
    let Publishing { scene, changed: _changed, mut class_writer, node_objects, running } = publishing().await;
    brings(&mut class_writer, vec![class()]);
    brings_nodes(&node_objects);
    let mut server = Server::empty(scene.api);
    let object = server.first_capacity().await;
    // The watch shows it, and breaks; when it is back the object has gone.
    let expired = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410, "reason": "Expired"});
    let events = [json!({"type": "ADDED", "object": object}), json!({"type": "ERROR", "object": expired})];
    server.watch_brings(&events).await;
    assert_eq!(server.write().await.0, patch_of(&object));
    running.abort();
}

#[tokio::test]
async fn a_capacity_that_is_wanted_again_is_published_although_the_watch_has_not_shown_its_end() {
    let Publishing { scene, changed, mut class_writer, node_objects, running } = publishing().await;
    brings(&mut class_writer, vec![class()]);
    brings_nodes(&node_objects);
    let mut server = Server::empty(scene.api);
    let object = server.first_capacity().await;
    server.watch_brings(&[json!({"type": "ADDED", "object": object})]).await;
    let class = || -> StorageClass { serde_json::from_value(class()).unwrap() };
    class_writer.apply_watcher_event(&Event::Delete(class()));
    changed.send(ClassChanged::Any).unwrap();
    let (what, asked) = server.write().await;
    assert_eq!(what, patch_of(&object).replace("PATCH", "DELETE"));
    asked.answer(200, object.clone());
    class_writer.apply_watcher_event(&Event::Apply(class()));
    changed.send(ClassChanged::Any).unwrap();
    assert_eq!(server.write().await.0, patch_of(&object));
    running.abort();
}

/// As after a start with another `--capacities-shared-from`, or with fewer nodes.
#[tokio::test]
async fn a_shared_capacity_stays_until_each_of_its_nodes_has_its_own() {
    let Publishing { scene, changed, mut class_writer, node_objects, running } = publishing().await;
    let place = |state| scene.ctx.nodes.place(View::of("n2", state), scene.node.channel.clone());
    place(State::Connecting);
    let shared = json!({
        "metadata": {"name": "lvprov-shared", "namespace": "ns", "uid": "s", "resourceVersion": "5"},
        "storageClassName": "fast", "capacity": "1Gi", "maximumVolumeSize": "1Gi",
        "nodeTopology": {"matchExpressions": [{"key": TOPOLOGY_NODE, "operator": "In", "values": ["n1", "n2"]}]},
    });
    let mut server = Server { api: scene.api, list: capacities(&[&shared]), watches: Vec::new() };
    brings(&mut class_writer, vec![class()]);
    brings_nodes(&node_objects);
    let (of_n1, asked) = server.write().await;
    let body = asked.body.clone();
    assert_eq!(body["nodeTopology"]["matchLabels"][TOPOLOGY_NODE], "n1", "{of_n1}");
    asked.answer(200, body);
    changed.send(ClassChanged::Any).unwrap();
    place(State::Up(vec![Group::of("vg0", 20 * GIB, 10 * GIB, 4 << 20)]));
    changed.send(ClassChanged::Any).unwrap();
    // Nothing was withdrawn before this.
    let (of_n2, asked) = server.write().await;
    let body = asked.body.clone();
    assert_eq!(body["nodeTopology"]["matchLabels"][TOPOLOGY_NODE], "n2", "{of_n2}");
    asked.answer(200, body);
    assert_eq!(server.write().await.0, format!("DELETE {CAPACITIES}/lvprov-shared"));
    running.abort();
}

#[tokio::test]
async fn claims_hear_of_classes_once_the_store_has_them() {
    let scene = Scene::new(World { claims: vec![claim()], ..World::default() }).await;
    let (changed, mut heard) = broadcast::channel(8);
    let mut triggers = std::pin::pin!(claim_triggers(&scene.ctx, &changed));
    let class = || -> StorageClass { serde_json::from_value(class()).unwrap() };
    // A list, or another one after the watch was broken: what it brings is in
    // the store only at its end, and what has gone is not brought at all.
    for event in [Event::Init, Event::InitApply(class())] {
        follow_class(&changed, Ok(event));
    }
    assert!(heard.try_recv().is_err());
    follow_class(&changed, Ok(Event::InitDone));
    assert_eq!(heard.try_recv(), Ok(ClassChanged::Any));
    let concerned = ObjectRef::new("data-db-0").within("shop");
    let next = tokio::time::timeout(SOON, triggers.next()).await.unwrap();
    assert_eq!(next, Some(concerned));
    for event in [Event::Apply(class()), Event::Delete(class())] {
        follow_class(&changed, Ok(event));
        assert_eq!(heard.try_recv(), Ok(ClassChanged::One("fast".into())));
    }
}

#[tokio::test]
async fn a_node_that_is_up_again_has_not_been_silent() {
    let scene = Scene::new(World::default()).await;
    let (changed, _) = broadcast::channel(8);
    let mut triggers = std::pin::pin!(claim_triggers(&scene.ctx, &changed));
    let silent = || scene.ctx.failures.note("u1", Row::Silence, "n1", SOON).wait.as_millis();
    assert_eq!((silent(), silent()), (500, 1000));
    scene.ctx.nodes.tell(News::Up("n1".into()));
    // No claim is concerned.
    let none = tokio::time::timeout(Duration::from_millis(50), triggers.next()).await;
    assert!(none.is_err());
    assert_eq!(silent(), 500);
}

#[tokio::test]
async fn a_node_with_other_labels_concerns_the_claims_that_wait_for_it_or_for_any() {
    let named = |name: &str, selected: Option<&str>| {
        let mut claim = claim();
        claim["metadata"]["name"] = json!(name);
        claim["metadata"]["annotations"] = match selected {
            Some(node) => json!({"volume.kubernetes.io/selected-node": node}),
            None => json!({}),
        };
        claim
    };
    let claims = vec![named("there", Some("n1")), named("elsewhere", Some("n2")), named("anywhere", None)];
    let scene = Scene::new(World { claims, ..World::default() }).await;
    let (changed, _) = broadcast::channel(8);
    let mut triggers = std::pin::pin!(claim_triggers(&scene.ctx, &changed));
    scene.ctx.nodes.tell(News::Changed("n1".into()));
    let mut concerned = Vec::new();
    while let Ok(Some(claim)) = tokio::time::timeout(Duration::from_millis(200), triggers.next()).await {
        concerned.push(claim.name);
    }
    concerned.sort();
    assert_eq!(concerned, ["anywhere", "there"]);
}
