//! What the scheduler is told: a CSIStorageCapacity for each class of ours and
//! node with its volume group that the class allows, and the CSIDriver that makes it look there.
//!
//! Objects first, then the CSIDriver: with it, a node without an object is
//! refused. `capacity` is always set: without it the scheduler of 1.37 crashes
//! where two nodes fit.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{FutureExt, StreamExt, stream};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::{CSIDriver, CSIDriverSpec, CSIStorageCapacity, StorageClass};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, OwnerReference};
use kube::api::{DeleteParams, ObjectMeta, Patch, PatchParams};
use kube::runtime::reflector::{Store, store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use sha2::{Digest, Sha256};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::TryRecvError;
use tracing::{debug, info, warn};

use super::claim::ClassChanged;
use super::error::is_not_found;
use super::names::{FIELD_MANAGER, MANAGED_BY};
use super::nodes::{Nodes, State, View};
use super::quantity::{quantity, storage_of};
use super::slim;
use super::validate::Template;
use crate::names::{DRIVER, TOPOLOGY_NODE};

/// How long the watch may take to bring what was written here: writing it once
/// more for each that it brings would cost the square of their number.
const WATCH_LAG: Duration = Duration::from_secs(15);
/// What was written a moment ago.
type Written = HashMap<String, (Published, Instant)>;
/// So many are written at the same time.
const AT_ONCE: usize = 8;
/// After a write that failed.
const RETRY: Duration = Duration::from_secs(5);

/// A capacity that should be published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The StorageClass.
    pub class: String,
    /// Value of the node's topology label.
    pub topology: String,
    /// What volumes of the class can have together there.
    pub free: u64,
    /// The largest volume that fits: whole extents and stripes.
    pub largest: u64,
}

/// What there should be, by object name.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// To be there, with these sizes.
    pub publish: BTreeMap<String, Published>,
    /// To be left as they are: their nodes are silent, but not for long.
    pub keep: BTreeSet<String>,
    /// When to look again although nothing has happened.
    pub again: Option<Duration>,
}

/// The name of an object: classes and nodes have longer names than fit.
fn object_name(class: &str, topology: &str) -> String {
    let digest = Sha256::digest(format!("{class}\0{topology}"));
    let hex: String = digest.iter().take(10).map(|byte| format!("{byte:02x}")).collect();
    format!("lvprov-{hex}")
}

/// Decides what should be published.
pub fn wanted<V: Borrow<View>>(classes: &[Arc<StorageClass>], nodes: &[V], patience: Duration) -> Wanted {
    let mut wanted = Wanted::default();
    for class in classes.iter().filter(|class| class.provisioner == DRIVER) {
        // No claim of such a class can be served, anywhere.
        let Ok(template) = Template::of(class) else {
            continue;
        };
        for node in nodes.iter().map(Borrow::borrow).filter(|node| template.topologies.allow(&node.labels)) {
            let name = object_name(&class.name_any(), &node.topology);
            match &node.state {
                State::Connecting => {
                    wanted.keep.insert(name);
                }
                State::Down { since, .. } => {
                    let left = patience.saturating_sub(since.elapsed());
                    if !left.is_zero() {
                        wanted.keep.insert(name);
                        wanted.again = Some(wanted.again.map_or(left, |again| again.min(left)));
                    }
                }
                State::Up(_) => {
                    if let Some(group) =
                        node.chosen(&template.volume_group).filter(|group| group.serves(template.layout))
                    {
                        let published = Published {
                            class: class.name_any(),
                            topology: node.topology.clone(),
                            free: group.total(template.layout),
                            largest: group.largest(template.layout),
                        };
                        wanted.publish.insert(name, published);
                    }
                }
            }
        }
    }
    wanted
}

/// Whether enough is known for the CSIDriver to do no harm: some node has
/// reported, and none is still being connected to.
fn settled<V: Borrow<View>>(nodes: &[V]) -> bool {
    let states = || nodes.iter().map(|node| &node.borrow().state);
    states().any(|state| matches!(state, State::Up(_))) && !states().any(|state| *state == State::Connecting)
}

fn capacity_object(
    name: &str,
    namespace: &str,
    published: &Published,
    owner: Option<&OwnerReference>,
) -> CSIStorageCapacity {
    CSIStorageCapacity {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(namespace.to_owned()),
            labels: Some(BTreeMap::from([(MANAGED_BY.to_owned(), DRIVER.to_owned())])),
            owner_references: owner.map(|owner| vec![owner.clone()]),
            ..ObjectMeta::default()
        },
        storage_class_name: published.class.clone(),
        capacity: Some(quantity(published.free)),
        maximum_volume_size: Some(quantity(published.largest)),
        node_topology: Some(LabelSelector {
            match_labels: Some(BTreeMap::from([(TOPOLOGY_NODE.to_owned(), published.topology.clone())])),
            match_expressions: None,
        }),
    }
}

fn says(object: &CSIStorageCapacity, published: &Published) -> bool {
    let bytes = |quantity: &Option<_>| -> Option<u64> {
        let one = quantity.clone().map(|quantity| BTreeMap::from([("storage".to_owned(), quantity)]));
        storage_of(one.as_ref()).ok().flatten()
    };
    bytes(&object.capacity) == Some(published.free) && bytes(&object.maximum_volume_size) == Some(published.largest)
}

fn driver_object() -> CSIDriver {
    CSIDriver {
        metadata: ObjectMeta {
            name: Some(DRIVER.to_owned()),
            labels: Some(BTreeMap::from([(MANAGED_BY.to_owned(), DRIVER.to_owned())])),
            ..ObjectMeta::default()
        },
        spec: CSIDriverSpec {
            // This and the lifecycle modes can never be changed.
            attach_required: Some(false),
            volume_lifecycle_modes: Some(vec!["Persistent".to_owned(), "Ephemeral".to_owned()]),
            pod_info_on_mount: Some(true),
            storage_capacity: Some(true),
            fs_group_policy: Some("File".to_owned()),
            // Log volumes of many pods share one superblock.
            se_linux_mount: Some(false),
            ..CSIDriverSpec::default()
        },
    }
}

/// Keeps the objects right.
pub struct Publisher {
    client: Client,
    namespace: String,
    owner: Option<OwnerReference>,
    nodes: Arc<Nodes>,
    node_objects: Store<Node>,
    classes: Store<StorageClass>,
    patience: Duration,
}

impl Publisher {
    /// `owner`: with whom the objects go; `nodes`: fed from the watch that
    /// `node_objects` is of; `patience`: how long a silent node's
    /// objects stay.
    pub fn new(
        client: Client,
        namespace: String,
        owner: Option<OwnerReference>,
        nodes: Arc<Nodes>,
        node_objects: Store<Node>,
        classes: Store<StorageClass>,
        patience: Duration,
    ) -> Self {
        Self { client, namespace, owner, nodes, node_objects, classes, patience }
    }

    /// Works until dropped. `class_changed` tells of changed classes.
    pub async fn run(self, mut class_changed: broadcast::Receiver<ClassChanged>) {
        let api: Api<CSIStorageCapacity> = Api::namespaced(self.client.clone(), &self.namespace);
        let (objects, writer) = store::<CSIStorageCapacity>();
        let config = watcher::Config::default().labels(&format!("{MANAGED_BY}={DRIVER}"));
        let watch =
            watcher(api.clone(), config).default_backoff().modify(slim::capacity).reflect(writer).touched_objects();
        let mut watch = pin!(watch);
        let mut news = self.nodes.news();
        // A class or a node that the watches have not brought yet is none that
        // has gone: its objects must not be withdrawn.
        let mut ready = pin!(futures::future::try_join3(
            objects.wait_until_ready(),
            self.classes.wait_until_ready(),
            self.node_objects.wait_until_ready(),
        ));
        let mut is_ready = false;
        let mut driver_made = false;
        let mut written = Written::new();
        let mut again = Some(Duration::ZERO);
        loop {
            tokio::select! {
                changed = watch.next() => match changed {
                    Some(Ok(_)) => {}
                    Some(Err(error)) => warn!(%error, "cannot watch the CSIStorageCapacity objects"),
                    None => return,
                },
                result = &mut ready, if !is_ready => is_ready = result.is_ok(),
                // Lagging behind is no loss: everything is looked at below.
                _ = news.recv() => {}
                _ = class_changed.recv() => {}
                () = tokio::time::sleep(again.unwrap_or(Duration::MAX)), if again.is_some() => {}
            }
            // Everything is looked at below, so what came meanwhile is old.
            while !matches!(news.try_recv(), Err(TryRecvError::Empty | TryRecvError::Closed)) {}
            while let Some(Some(changed)) = watch.next().now_or_never() {
                if let Err(error) = changed {
                    warn!(%error, "cannot watch the CSIStorageCapacity objects");
                    break;
                }
            }
            if !is_ready {
                again = None;
                continue;
            }
            again = self.round(&api, &objects, &mut written, &mut driver_made).await;
        }
    }

    /// One comparison of what should be with what is. Says when the next is
    /// due although nothing happens.
    async fn round(
        &self,
        api: &Api<CSIStorageCapacity>,
        objects: &Store<CSIStorageCapacity>,
        written: &mut Written,
        driver_made: &mut bool,
    ) -> Option<Duration> {
        let nodes = self.nodes.views();
        let wanted = wanted(&self.classes.state(), &nodes, self.patience);
        let mut failed = false;
        let there: BTreeMap<String, Arc<CSIStorageCapacity>> =
            objects.state().into_iter().map(|object| (object.name_any(), object)).collect();
        written.retain(|_, (_, at)| at.elapsed() < WATCH_LAG);
        let (mut new, mut awaited) = (Vec::new(), false);
        for (name, published) in &wanted.publish {
            if there.get(name).is_some_and(|object| says(object, published)) {
                written.remove(name);
            } else if written.get(name).is_some_and(|(last, _)| last == published) {
                awaited = true;
            } else {
                new.push((name.clone(), published.clone()));
            }
        }
        let writes = new.into_iter().map(|(name, published)| self.publish(api.clone(), name, published));
        let mut writes = stream::iter(writes).buffer_unordered(AT_ONCE);
        while let Some(done) = writes.next().await {
            match done {
                Some((name, published)) => drop(written.insert(name, (published, Instant::now()))),
                None => failed = true,
            }
        }
        drop(writes);
        for name in there.keys() {
            if wanted.publish.contains_key(name) || wanted.keep.contains(name) {
                continue;
            }
            match api.delete(name, &DeleteParams::default()).await {
                Ok(_) => info!(name, "withdrew a capacity"),
                Err(error) if is_not_found(&error) => {}
                Err(error) => {
                    warn!(name, %error, "cannot withdraw the capacity");
                    failed = true;
                }
            }
        }
        if !*driver_made && !failed && settled(&nodes) {
            *driver_made = self.make_driver().await;
            failed = !*driver_made;
        }
        match (failed, awaited) {
            (true, _) => Some(RETRY),
            // What the watch has not brought by then is written again.
            (false, true) => Some(wanted.again.map_or(WATCH_LAG, |again| again.min(WATCH_LAG))),
            (false, false) => wanted.again,
        }
    }

    /// What was written. None: it was not.
    async fn publish(
        &self,
        api: Api<CSIStorageCapacity>,
        name: String,
        published: Published,
    ) -> Option<(String, Published)> {
        let object = capacity_object(&name, &self.namespace, &published, self.owner.as_ref());
        let apply = PatchParams::apply(FIELD_MANAGER).force();
        let Published { class, topology: node, free, .. } = &published;
        match api.patch(&name, &apply, &Patch::Apply(&object)).await {
            Ok(_) => {
                debug!(class, node, free, "published");
                Some((name, published))
            }
            Err(error) => {
                warn!(class, node, %error, "cannot publish the capacity");
                None
            }
        }
    }

    async fn make_driver(&self) -> bool {
        let api: Api<CSIDriver> = Api::all(self.client.clone());
        let apply = PatchParams::apply(FIELD_MANAGER).force();
        match api.patch(DRIVER, &apply, &Patch::Apply(driver_object())).await {
            Ok(_) => true,
            Err(error) => {
                warn!(
                    %error,
                    "cannot make CSIDriver {DRIVER}, so the scheduler does not look at capacities. One with another \
                     attachRequired or volumeLifecycleModes must be deleted by hand"
                );
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::nodes::Group;
    use super::*;
    use serde_json::{Value, json};

    const PATIENCE: Duration = Duration::from_secs(30);

    fn class(name: &str, group: &str) -> Arc<StorageClass> {
        let class = json!({
            "metadata": {"name": name},
            "provisioner": DRIVER,
            "parameters": {"volumeGroup": group},
            "volumeBindingMode": "WaitForFirstConsumer",
        });
        Arc::new(serde_json::from_value(class).unwrap())
    }

    fn node(name: &str, state: State) -> View {
        View::of(name, state)
    }

    fn up(name: &str, group: &str, free: u64) -> View {
        let group = Group::of(group, 1 << 40, free, 4 << 20);
        node(name, State::Up(vec![group]))
    }

    fn down(name: &str, ago: Duration) -> View {
        node(name, State::Down { since: Instant::now().checked_sub(ago).unwrap(), why: String::new() })
    }

    #[test]
    fn one_object_for_each_class_and_node_with_its_group() {
        let classes = [class("fast", "vg0"), class("slow", "hdd")];
        let nodes = [up("a", "vg0", 5 << 30), up("b", "vg0", 1), up("c", "hdd", 0)];
        let wanted = wanted(&classes, &nodes, PATIENCE);
        let published: Vec<_> = wanted
            .publish
            .values()
            .map(|one| (one.class.as_str(), one.topology.as_str(), one.free, one.largest))
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        assert_eq!(published, [("fast", "a", 5 << 30, 5 << 30), ("fast", "b", 1, 0), ("slow", "c", 0, 0)]);
        assert!(wanted.keep.is_empty() && wanted.again.is_none());
    }

    #[test]
    fn a_node_that_the_class_does_not_allow_has_no_object_whatever_its_state() {
        let mut zoned = (*class("zoned", "vg0")).clone();
        zoned.allowed_topologies = serde_json::from_value(json!([
            {"matchLabelExpressions": [{"key": "zone", "values": ["a"]}]},
        ]))
        .unwrap();
        let classes = [class("fast", "vg0"), Arc::new(zoned)];
        let in_zone = |zone: &str, view: View| {
            let labels = Arc::new(BTreeMap::from([("zone".to_owned(), zone.to_owned())]));
            View { labels, ..view }
        };
        let nodes = [
            in_zone("a", up("a", "vg0", 1)),
            in_zone("b", up("b", "vg0", 1)),
            in_zone("b", node("new", State::Connecting)),
            in_zone("b", down("late", Duration::ZERO)),
            up("c", "vg0", 1),
        ];
        let wanted = wanted(&classes, &nodes, PATIENCE);
        let of =
            |class: &str| wanted.publish.values().filter(|one| one.class == class).map(|one| &*one.topology).collect();
        let (fast, zoned): (BTreeSet<&str>, BTreeSet<&str>) = (of("fast"), of("zoned"));
        assert_eq!((fast, zoned), (BTreeSet::from(["a", "b", "c"]), BTreeSet::from(["a"])));
        assert_eq!(wanted.keep, ["new", "late"].map(|node| object_name("fast", node)).into());
    }

    #[test]
    fn classes_that_are_not_ours_or_cannot_be_served_are_not_published() {
        let mut foreign = (*class("other", "vg0")).clone();
        foreign.provisioner = "example.com/other".into();
        let mut immediate = (*class("now", "vg0")).clone();
        immediate.volume_binding_mode = None;
        let classes = [Arc::new(foreign), Arc::new(immediate)];
        assert_eq!(wanted(&classes, &[up("a", "vg0", 1)], PATIENCE), Wanted::default());
    }

    #[test]
    fn a_silent_nodes_objects_stay_for_a_while() {
        let classes = [class("fast", "vg0")];
        let nodes = [
            node("new", State::Connecting),
            down("late", Duration::from_secs(10)),
            down("lost", Duration::from_secs(31)),
        ];
        let wanted = wanted(&classes, &nodes, PATIENCE);
        assert!(wanted.publish.is_empty());
        let kept: BTreeSet<_> = ["new", "late"].map(|node| object_name("fast", node)).into();
        assert_eq!(wanted.keep, kept);
        let again = wanted.again.unwrap();
        assert!(again > Duration::from_secs(15) && again <= Duration::from_secs(20), "{again:?}");
    }

    #[test]
    fn the_driver_waits_for_the_first_capacities() {
        assert!(!settled::<View>(&[]));
        assert!(!settled(&[down("a", PATIENCE)]));
        assert!(!settled(&[up("a", "vg0", 1), node("b", State::Connecting)]));
        assert!(settled(&[up("a", "vg0", 1), down("b", Duration::ZERO)]));
    }

    #[test]
    fn both_sizes_are_always_there() {
        let published = Published { class: "fast".into(), topology: "a".into(), free: (8 << 20) + 5, largest: 8 << 20 };
        let object = capacity_object("x", "ns", &published, None);
        assert!(says(&object, &published));
        let object = serde_json::to_value(object).unwrap();
        assert_eq!(object["capacity"], "8388613");
        assert_eq!(object["maximumVolumeSize"], "8Mi");
        assert_eq!(object["nodeTopology"]["matchLabels"], json!({"topology.lvprov.io/node": "a"}));
        assert_eq!(object["metadata"]["ownerReferences"], Value::Null);
    }

    #[test]
    fn names_of_objects_fit_and_differ() {
        let long = object_name(&"c".repeat(253), &"n".repeat(63));
        assert!(long.len() < 63);
        assert_ne!(object_name("a", "bc"), object_name("ab", "c"));
    }

    #[test]
    fn the_driver_is_in_its_final_form() {
        assert_eq!(
            serde_json::to_value(driver_object()).unwrap()["spec"],
            json!({
                "attachRequired": false,
                "podInfoOnMount": true,
                "storageCapacity": true,
                "fsGroupPolicy": "File",
                "volumeLifecycleModes": ["Persistent", "Ephemeral"],
                "seLinuxMount": false,
            })
        );
    }
}
