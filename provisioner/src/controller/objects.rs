//! What the watches of claims, PersistentVolumes and nodes have brought.
//!
//! There may be a hundred thousand of them, and for nearly all of them nothing
//! is to be done for months. Those are kept packed: as JSON, compressed against
//! a text that is like all of them, in a tenth of the memory that the object
//! takes. Those for which something is to be done are kept as they are, so that
//! they can be searched.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use futures::stream::{Stream, StreamExt};
use kube::Resource;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher::{self, Event};
use lz4_flex::block::{compress_prepend_size_with_dict, decompress_size_prepended_with_dict};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::watch;
use tracing::{error, warn};

/// A kind of object that can be kept so.
pub trait Kept:
    Resource<DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static
{
    /// Takes away what is never looked at.
    fn slim(&mut self);

    /// Whether something is to be done for it, or is to be once something else
    /// happens.
    fn is_live(&self) -> bool;

    /// The node that it belongs to, if any.
    fn node(&self) -> Option<String>;

    /// What most of them look like.
    fn sample() -> Value;
}

/// All objects of a kind. Clones share them.
#[derive(Debug)]
pub struct Objects<K> {
    table: Arc<RwLock<Table<K>>>,
    like: Arc<[u8]>,
    ready: watch::Sender<bool>,
}

#[derive(Debug)]
struct Table<K> {
    live: HashMap<Box<str>, Live<K>>,
    packed: HashMap<Box<str>, Packed>,
    /// Of lists: what the latest has not brought has gone.
    round: u32,
}

#[derive(Debug)]
struct Live<K> {
    object: Arc<K>,
    round: u32,
}

#[derive(Debug)]
struct Packed {
    bytes: Box<[u8]>,
    node: NodeTag,
    round: u32,
}

/// Stands for a node's name; none where there is no node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeTag(u64);

impl NodeTag {
    const NONE: Self = Self(0);

    /// Of a node.
    pub fn of(node: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        node.hash(&mut hasher);
        Self(hasher.finish().max(1))
    }
}

impl<K> Clone for Objects<K> {
    fn clone(&self) -> Self {
        Self { table: self.table.clone(), like: self.like.clone(), ready: self.ready.clone() }
    }
}

impl<K: Kept> Default for Objects<K> {
    fn default() -> Self {
        // By way of the type, so that it has the order of what it is compared with.
        let sample = serde_json::from_value::<K>(K::sample()).and_then(|sample| serde_json::to_vec(&sample));
        let table = Table { live: HashMap::new(), packed: HashMap::new(), round: 0 };
        Self {
            table: Arc::new(RwLock::new(table)),
            like: sample.unwrap_or_default().into(),
            ready: watch::Sender::new(false),
        }
    }
}

impl<K: Kept> Objects<K> {
    /// Takes in all that `events` brings; gives what is to be looked at: of the
    /// first list what is live, later on what has changed.
    pub fn follow(
        &self,
        events: impl Stream<Item = watcher::Result<Event<K>>> + Send + 'static,
    ) -> impl Stream<Item = ObjectRef<K>> + Send + 'static {
        let objects = self.clone();
        events.filter_map(move |event| {
            std::future::ready(match event {
                Ok(event) => objects.take(event),
                Err(error) => {
                    warn!(kind = %K::kind(&()), %error, "cannot watch");
                    None
                }
            })
        })
    }

    /// One event of a watch.
    pub(super) fn take(&self, event: Event<K>) -> Option<ObjectRef<K>> {
        match event {
            Event::Init => {
                self.write(|table| table.round = table.round.wrapping_add(1));
                None
            }
            Event::InitApply(object) => {
                let object_ref = ObjectRef::from_obj(&object);
                self.put(object).then_some(object_ref)
            }
            Event::InitDone => {
                self.write(|table| {
                    let round = table.round;
                    table.live.retain(|_, live| live.round == round);
                    table.packed.retain(|_, packed| packed.round == round);
                    table.packed.shrink_to_fit();
                });
                self.ready.send_replace(true);
                None
            }
            Event::Apply(object) => {
                let object_ref = ObjectRef::from_obj(&object);
                self.put(object);
                Some(object_ref)
            }
            Event::Delete(object) => {
                let key = key(&ObjectRef::from_obj(&object));
                self.write(|table| {
                    table.live.remove(&*key);
                    table.packed.remove(&*key);
                });
                None
            }
        }
    }

    /// Whether it is live, or another version than there was.
    fn put(&self, mut object: K) -> bool {
        object.slim();
        let key = key(&ObjectRef::from_obj(&object)).into_boxed_str();
        let packed = if object.is_live() { None } else { self.pack(&key, &object) };
        self.write(|table| {
            let round = table.round;
            match packed {
                None => {
                    table.packed.remove(&key);
                    table.live.insert(key, Live { object: Arc::new(object), round });
                    true
                }
                Some((bytes, node)) => {
                    let was_live = table.live.remove(&key).is_some();
                    let changed = table.packed.get(&key).is_some_and(|before| before.bytes != bytes);
                    table.packed.insert(key, Packed { bytes, node, round });
                    changed || was_live
                }
            }
        })
    }

    /// None: it cannot be packed.
    fn pack(&self, key: &str, object: &K) -> Option<(Box<[u8]>, NodeTag)> {
        let text = serde_json::to_vec(object).ok()?;
        let node = object.node().map_or(NodeTag::NONE, |node| NodeTag::of(&node));
        Some((compress_prepend_size_with_dict(&text, &self.like(key)).into(), node))
    }

    /// What a packed object is like: its name is in it more than once, too.
    fn like(&self, key: &str) -> Vec<u8> {
        [&*self.like, key.as_bytes()].concat()
    }

    fn unpack(&self, key: &str, packed: &Packed) -> Option<Arc<K>> {
        let text = decompress_size_prepended_with_dict(&packed.bytes, &self.like(key)).ok();
        let object = text.and_then(|text| serde_json::from_slice(&text).ok());
        if object.is_none() {
            error!(kind = %K::kind(&()), key, "what was kept of the object cannot be read; please report this");
        }
        object.map(Arc::new)
    }

    /// One object.
    pub fn get(&self, object: &ObjectRef<K>) -> Option<Arc<K>> {
        let key = key(object);
        let table = self.read();
        match table.live.get(&*key) {
            Some(live) => Some(live.object.clone()),
            None => table.packed.get(&*key).and_then(|packed| self.unpack(&key, packed)),
        }
    }

    /// Whether there is such an object.
    pub fn contains(&self, object: &ObjectRef<K>) -> bool {
        let key = key(object);
        let table = self.read();
        table.live.contains_key(&*key) || table.packed.contains_key(&*key)
    }

    /// The names of all.
    pub fn names(&self) -> Vec<String> {
        let table = self.read();
        let keys = table.live.keys().chain(table.packed.keys());
        keys.map(|key| key.rsplit_once('/').map_or(&**key, |(_, name)| name).to_owned()).collect()
    }

    /// Those for which something is to be done, and `wanted` holds.
    pub fn live(&self, wanted: impl Fn(&K) -> bool) -> Vec<Arc<K>> {
        let table = self.read();
        table.live.values().map(|live| &live.object).filter(|object| wanted(object)).cloned().collect()
    }

    /// Those of nodes for which `wanted` holds.
    pub fn of_nodes(&self, wanted: impl Fn(NodeTag) -> bool) -> Vec<Arc<K>> {
        let is_wanted = |object: &K| object.node().is_some_and(|node| wanted(NodeTag::of(&node)));
        let mut found = self.live(is_wanted);
        let table = self.read();
        let packed = table.packed.iter().filter(|(_, packed)| packed.node != NodeTag::NONE && wanted(packed.node));
        found.extend(packed.filter_map(|(key, packed)| self.unpack(key, packed)));
        found
    }

    /// Until the first list is here.
    pub async fn wait_until_ready(&self) {
        // The sender is here: it cannot have gone.
        let _ = self.ready.subscribe().wait_for(|ready| *ready).await;
    }

    fn read(&self) -> RwLockReadGuard<'_, Table<K>> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write<T>(&self, change: impl FnOnce(&mut Table<K>) -> T) -> T {
        change(&mut self.table.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// No name has a slash in it.
fn key<K: Resource<DynamicType = ()>>(object: &ObjectRef<K>) -> String {
    match &object.namespace {
        Some(namespace) => format!("{namespace}/{}", object.name),
        None => object.name.clone(),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
    use kube::ResourceExt;
    use serde_json::json;

    use super::*;

    const NODE: &str = "worker-0017.example";

    fn volume(number: u32, phase: &str) -> PersistentVolume {
        let uid = format!("7d1e0a52-93c4-4b8e-a1f0-{number:012x}");
        let mut volume = serde_json::to_value(super::super::volume::tests::pv("Delete", "")).unwrap();
        volume["status"] = json!({"phase": phase});
        volume["metadata"]["name"] = json!(format!("pvc-{uid}"));
        volume["metadata"]["uid"] = json!(format!("c0a9f3b1-1d6e-4f27-9b58-{:012x}", number ^ 0x5a5a_5a5a));
        volume["metadata"]["resourceVersion"] = json!((number + 1_000_000).to_string());
        volume["spec"]["claimRef"] = json!({"kind": "PersistentVolumeClaim", "apiVersion": "v1", "namespace": "shop", "name": format!("data-db-{number}"), "uid": uid});
        volume["spec"]["flexVolume"]["options"]["logicalVolume"] = json!(format!("pvc-{uid}"));
        volume["spec"]["flexVolume"]["options"]["claimUID"] = json!(uid);
        volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"][0]["matchExpressions"][0]["values"] =
            json!([NODE]);
        serde_json::from_value(volume).unwrap()
    }

    fn listed<K: Kept>(objects: &Objects<K>, list: impl IntoIterator<Item = K>) -> Vec<String> {
        objects.take(Event::Init);
        let looked_at = list.into_iter().filter_map(|object| objects.take(Event::InitApply(object)));
        let looked_at = looked_at.map(|object| object.name).collect();
        objects.take(Event::InitDone);
        looked_at
    }

    fn reference(volume: &PersistentVolume) -> ObjectRef<PersistentVolume> {
        ObjectRef::from_obj(volume)
    }

    #[test]
    fn what_is_packed_comes_out_as_it_went_in() {
        let objects = Objects::default();
        let mut volume = volume(1, "Bound");
        listed(&objects, [volume.clone()]);
        volume.slim();
        assert_eq!(objects.read().packed.len(), 1);
        assert_eq!(*objects.get(&reference(&volume)).unwrap(), volume);
        assert!(objects.contains(&reference(&volume)));
        assert!(objects.get(&ObjectRef::new("pvc-other")).is_none() && !objects.contains(&ObjectRef::new("pvc-other")));
    }

    /// Or a hundred thousand would not fit into what the manifest gives.
    #[test]
    fn a_volume_and_its_claim_at_rest_take_few_bytes() {
        let volumes = Objects::default();
        listed(&volumes, (0..100).map(|number| volume(number, "Bound")));
        let claims = Objects::default();
        listed(&claims, (0..100).map(|number| {
            let uid = format!("7d1e0a52-93c4-4b8e-a1f0-{number:012x}");
            let claim = json!({
                "metadata": {"name": format!("data-db-{number}"), "namespace": "shop", "uid": uid, "resourceVersion": (number + 5000).to_string(),
                    "labels": {"app": "db"}, "finalizers": ["kubernetes.io/pvc-protection"], "annotations": {
                        "pv.kubernetes.io/bind-completed": "yes", "pv.kubernetes.io/bound-by-controller": "yes",
                        "volume.kubernetes.io/selected-node": NODE, "volume.kubernetes.io/storage-provisioner": crate::names::DRIVER,
                        "volume.beta.kubernetes.io/storage-provisioner": crate::names::DRIVER}},
                "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "20Gi"}}, "storageClassName": "local",
                    "volumeMode": "Filesystem", "volumeName": format!("pvc-{uid}")},
                "status": {"phase": "Bound", "accessModes": ["ReadWriteOnce"], "capacity": {"storage": "20Gi"}},
            });
            serde_json::from_value::<PersistentVolumeClaim>(claim).unwrap()
        }));
        let sizes = |packed: Vec<usize>| packed.iter().sum::<usize>() / packed.len();
        let of_volume = sizes(volumes.read().packed.values().map(|packed| packed.bytes.len()).collect());
        let of_claim = sizes(claims.read().packed.values().map(|packed| packed.bytes.len()).collect());
        assert!(of_volume < 220 && of_claim < 180, "{of_volume} and {of_claim} bytes");
    }

    #[test]
    fn at_first_only_what_is_live_is_looked_at_and_later_what_has_changed() {
        let objects = Objects::default();
        let (resting, released) = (volume(1, "Bound"), volume(2, "Released"));
        assert_eq!(listed(&objects, [resting.clone(), released.clone()]), [released.name_any()]);
        let live = objects.live(|_| true);
        assert_eq!(live.iter().map(|volume| volume.name_any()).collect::<Vec<_>>(), [released.name_any()]);
        // The watch has broken, and one was changed meanwhile.
        let mut changed = resting.clone();
        changed.metadata.resource_version = Some("9".into());
        assert_eq!(listed(&objects, [changed.clone()]), [changed.name_any()]);
        assert!(objects.get(&reference(&released)).is_none(), "it has gone meanwhile");
        assert!(listed(&objects, [changed.clone()]).is_empty());
        // What is brought by itself is always looked at.
        assert_eq!(objects.take(Event::Apply(changed.clone())).map(|it| it.name), changed.metadata.name);
        let released = volume(1, "Released");
        objects.take(Event::Apply(released.clone()));
        assert_eq!((objects.live(|_| true).len(), objects.read().packed.len()), (1, 0));
        objects.take(Event::Apply(changed.clone()));
        assert_eq!((objects.live(|_| true).len(), objects.read().packed.len()), (0, 1));
        objects.take(Event::Delete(changed.clone()));
        assert!(!objects.contains(&reference(&changed)));
    }

    #[test]
    fn those_of_a_node_are_found_packed_or_not() {
        let objects = Objects::default();
        listed(&objects, [volume(1, "Bound"), volume(2, "Released")]);
        let tag = NodeTag::of(NODE);
        assert_eq!(objects.of_nodes(|node| node == tag).len(), 2);
        assert!(objects.of_nodes(|node| node != tag).is_empty());
    }

    #[tokio::test]
    async fn it_is_ready_once_the_first_list_is_whole() {
        let objects = Objects::default();
        objects.take(Event::Init);
        objects.take(Event::InitApply(volume(1, "Bound")));
        let ready = tokio::time::timeout(std::time::Duration::from_millis(10), objects.wait_until_ready()).await;
        assert!(ready.is_err());
        objects.take(Event::InitDone);
        objects.wait_until_ready().await;
    }
}
