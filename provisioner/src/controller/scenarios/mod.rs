//! Reconciliations against an API server and a node that answer as told.

mod claims;
mod expansion;
mod growth;
mod left;
mod loss;
mod node;
mod renewal;
mod restores;
mod snapshots;
mod unmounts;
mod volumes;
mod watches;

use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::StorageClass;
use kube::Client;
use kube::client::Body;
use kube::runtime::reflector::{Store, store};
use kube::runtime::watcher::Event;
use serde_json::{Value, json};
use tower_test::mock::{Handle, SendResponse};

use super::calls::Calls;
use super::claim::Held;
use super::context::{Context, Lately};
use super::error::Failures;
use super::events::Events;
use super::nodes::{Group, Nodes, State, View};
use super::objects::{Kept, Objects};
use super::snapshot::types::VolumeSnapshotContent;
use super::snapshot::{Presence, Snapshots};
use crate::names::DRIVER;
use node::FakeNode;

const CLAIM_UID: &str = "0f0e7f0a-1111-4222-8333-444455556666";
const VOLUME: &str = "pvc-0f0e7f0a-1111-4222-8333-444455556666";
const GIB: u64 = 1 << 30;

const CLAIM_PATH: &str = "/api/v1/namespaces/shop/persistentvolumeclaims/data-db-0";

/// Far longer than any step takes.
const SOON: Duration = Duration::from_secs(10);

/// The API server's end of the client's connection.
struct ApiServer {
    handle: Handle<Request<Body>, Response<Body>>,
}

/// A request that waits for its answer.
struct Asked {
    query: String,
    body: Value,
    answer: SendResponse<Response<Body>>,
}

impl ApiServer {
    /// The next request, which must be this one.
    async fn expect(&mut self, method: &str, path: &str) -> Asked {
        let next = tokio::time::timeout(SOON, self.handle.next_request()).await;
        let (request, answer) =
            next.unwrap_or_else(|_| panic!("no {method} {path} within {SOON:?}")).expect("the client is gone");
        assert_eq!((request.method().as_str(), request.uri().path()), (method, path));
        let query = request.uri().query().unwrap_or_default().to_owned();
        let bytes = request.into_body().collect_bytes().await.unwrap();
        let body = if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes).unwrap() };
        Asked { query, body, answer }
    }

    /// An Event with this reason; its note.
    async fn expect_event(&mut self, namespace: &str, reason: &str) -> String {
        let path = format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events");
        let asked = self.expect("POST", &path).await;
        assert_eq!(asked.body["reason"], reason, "{}", asked.body["note"]);
        let note = asked.body["note"].as_str().unwrap().to_owned();
        let event = asked.body.clone();
        asked.answer(201, event);
        note
    }

    /// No request has come that nobody expected.
    async fn expect_nothing_more(&mut self) {
        let more = tokio::time::timeout(Duration::from_millis(50), self.handle.next_request()).await;
        if let Ok(Some((request, _))) = more {
            panic!("unexpected: {} {}", request.method(), request.uri());
        }
    }
}

impl Asked {
    fn answer(self, status: u16, body: Value) {
        let response = Response::builder().status(status).body(Body::from(serde_json::to_vec(&body).unwrap()));
        self.answer.send_response(response.unwrap());
    }

    fn refuse(self, status: u16, reason: &str) {
        let body = json!({
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status, "reason": reason, "message": reason,
        });
        self.answer(status, body);
    }
}

/// What the watches have brought.
#[derive(Default)]
struct World {
    nodes: Vec<Value>,
    volumes: Vec<Value>,
    claims: Vec<Value>,
    contents: Vec<Value>,
}

/// One cluster: its API server, one node n1, and the controller's context.
struct Scene {
    api: ApiServer,
    node: FakeNode,
    ctx: Arc<Context>,
}

impl Scene {
    async fn new(world: World) -> Self {
        let (service, handle) = tower_test::mock::pair();
        let client = Client::new(service, "default");
        let node = FakeNode::start().await;
        let nodes = Nodes::new(None, 0);
        let group = Group::of("vg0", 20 * GIB, 10 * GIB, 4 << 20);
        nodes.place(View::of("n1", State::Up(vec![group])), node.channel.clone());
        let ctx = Context {
            events: Events::new(client.clone(), "test".into()),
            client,
            cluster: "cluster".into(),
            nodes,
            node_objects: kept::<Node>(world.nodes),
            classes: watched::<StorageClass>(vec![class(), csi_class()]),
            claims: kept(world.claims),
            volumes: kept(world.volumes),
            snapshots: Arc::new(Snapshots::new(watched::<VolumeSnapshotContent>(world.contents))),
            held: Held::default(),
            failures: Failures::default(),
            calls: Calls::default(),
            published: Lately::default(),
            grown: Lately::default(),
            patience: Duration::from_secs(30),
        };
        ctx.snapshots.set_presence(Presence::There);
        Self { api: ApiServer { handle }, node, ctx: Arc::new(ctx) }
    }

    /// The node is in another state.
    fn node_is(&self, state: State) {
        self.ctx.nodes.place(View::of("n1", state), self.node.channel.clone());
    }

    /// The node has so much free.
    fn group_has(&self, free: u64) {
        self.node_is(State::Up(vec![Group::of("vg0", 20 * GIB, free, 4 << 20)]));
    }
}

fn parsed<K: serde::de::DeserializeOwned>(object: Value) -> Arc<K> {
    Arc::new(serde_json::from_value(object).unwrap())
}

fn with_node() -> World {
    World { nodes: vec![node_object()], ..World::default() }
}

fn watched<K>(objects: Vec<Value>) -> Store<K>
where
    K: kube::Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + 'static,
{
    let (reader, mut writer) = store::<K>();
    writer.apply_watcher_event(&Event::Init);
    for object in objects {
        writer.apply_watcher_event(&Event::InitApply(serde_json::from_value(object).unwrap()));
    }
    writer.apply_watcher_event(&Event::InitDone);
    reader
}

fn kept<K: Kept>(list: Vec<Value>) -> Objects<K> {
    let objects = Objects::default();
    objects.take(Event::Init);
    for object in list {
        objects.take(Event::InitApply(serde_json::from_value(object).unwrap()));
    }
    objects.take(Event::InitDone);
    objects
}

fn class() -> Value {
    json!({
        "metadata": {"name": "fast"},
        "provisioner": DRIVER,
        "parameters": {"volumeGroup": "vg0"},
        "volumeBindingMode": "WaitForFirstConsumer",
        "reclaimPolicy": "Delete",
    })
}

fn csi_class() -> Value {
    let mut class = class();
    class["metadata"]["name"] = json!("fast-csi");
    class["parameters"]["source"] = json!("csi");
    class["mountOptions"] = json!(["noatime", "discard"]);
    class
}

fn claim() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": "data-db-0",
            "namespace": "shop",
            "uid": CLAIM_UID,
            "resourceVersion": "7",
            "annotations": {"volume.kubernetes.io/selected-node": "n1"},
        },
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "fast",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    })
}

fn node_object() -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "labels": {"topology.lvprov.io/node": "n1"}}})
}

fn volume(phase: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {
            "name": VOLUME,
            "uid": "volume-uid",
            "resourceVersion": "11",
            "annotations": {"pv.kubernetes.io/provisioned-by": DRIVER},
            "finalizers": ["kubernetes.io/pv-protection", "external-provisioner.volume.kubernetes.io/finalizer"],
        },
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Delete",
            "claimRef": {"namespace": "shop", "name": "data-db-0", "uid": CLAIM_UID},
            "flexVolume": {
                "driver": "lvprov.io/lvm",
                "options": {"type": "data", "volumeGroup": "vg0", "logicalVolume": VOLUME, "claimUID": CLAIM_UID},
            },
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [
                {"key": "topology.lvprov.io/node", "operator": "In", "values": ["n1"]},
            ]}]}},
        },
        "status": {"phase": phase},
    })
}

const SNAPSHOT_UID: &str = "1a2b3c4d-1111-4222-8333-444455556666";
const CONTENT: &str = "snapcontent-1a2b3c4d-1111-4222-8333-444455556666";
const SNAPSHOT_ID: &str = "n1/vg0/snap-1a2b3c4d-1111-4222-8333-444455556666";
/// When the node says that it was taken.
const TAKEN: i64 = 1_700_000_000_000_000_005;

/// As the snapshot-controller makes it for a VolumeSnapshot.
fn content() -> Value {
    json!({
        "apiVersion": "snapshot.storage.k8s.io/v1",
        "kind": "VolumeSnapshotContent",
        "metadata": {
            "name": CONTENT,
            "uid": "content-uid",
            "resourceVersion": "21",
            "annotations": {},
            "finalizers": ["snapshot.storage.kubernetes.io/volumesnapshotcontent-bound-protection"],
        },
        "spec": {
            "driver": DRIVER,
            "deletionPolicy": "Delete",
            "source": {"volumeHandle": format!("vg0/{VOLUME}")},
            "sourceVolumeMode": "Filesystem",
            "volumeSnapshotClassName": "snaps",
            "volumeSnapshotRef": {
                "apiVersion": "snapshot.storage.k8s.io/v1", "kind": "VolumeSnapshot", "namespace": "shop", "name": "before",
                "uid": SNAPSHOT_UID, "resourceVersion": "20",
            },
        },
    })
}

fn ready_content() -> Value {
    let mut content = content();
    content["status"] =
        json!({"snapshotHandle": SNAPSHOT_ID, "creationTime": TAKEN, "readyToUse": true, "restoreSize": 1 << 30});
    content
}

fn csi_volume(phase: &str) -> Value {
    let mut volume = volume(phase);
    volume["spec"].as_object_mut().unwrap().remove("flexVolume");
    volume["spec"]["csi"] = json!({
        "driver": DRIVER,
        "volumeHandle": format!("vg0/{VOLUME}"),
        "fsType": "xfs",
        "volumeAttributes": {"claimNamespace": "shop", "claimUID": CLAIM_UID},
    });
    volume
}
