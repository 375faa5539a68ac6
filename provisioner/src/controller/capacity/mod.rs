//! What the scheduler is told: CSIStorageCapacity objects for each class of ours
//! and the nodes with its volume group that the class allows, and the CSIDriver
//! that makes it look there.
//!
//! Objects first, then the CSIDriver: with it, a node without an object is
//! refused. `capacity` is always set: without it the scheduler of 1.37 crashes
//! where two nodes fit.

mod wanted;

use std::collections::{BTreeMap, HashMap};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::{CSIDriver, CSIDriverSpec, CSIStorageCapacity, StorageClass};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement, OwnerReference};
use kube::api::{DeleteParams, ObjectMeta, Patch, PatchParams};
use kube::runtime::reflector::{Store, store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::TryRecvError;
use tracing::{debug, info, warn};

use super::claim::ClassChanged;
use super::error::is_not_found;
use super::names::{FIELD_MANAGER, MANAGED_BY};
use super::nodes::Nodes;
use super::objects::Objects;
use super::quantity::{quantity, storage_of};
use super::slim;
use crate::names::{DRIVER, TOPOLOGY_NODE};
use wanted::{Published, Room, settled, wanted};

/// How long the watch may take to bring what was written here: writing it once
/// more for each that it brings would cost the square of their number.
const WATCH_LAG: Duration = Duration::from_secs(15);

/// What was done a moment ago, so that the watch may not have brought it.
#[derive(Debug, Default)]
struct Done {
    /// Published, by name.
    written: HashMap<String, (Published, Instant)>,
    /// Withdrawn, by UID: one of the same name may have come since.
    withdrawn: HashMap<String, Instant>,
    /// When the CSIDriver was last there.
    driver_made: Option<Instant>,
    /// Whether nodes share objects.
    shares: bool,
}

impl Done {
    fn forget_old(&mut self) {
        self.written.retain(|_, (_, at)| at.elapsed() < WATCH_LAG);
        self.withdrawn.retain(|_, at| at.elapsed() < WATCH_LAG);
    }
}

/// How long changes are gathered where nodes share objects: each may cost new
/// objects of thousands of nodes.
const GATHER: Duration = Duration::from_secs(1);
/// The same where each node has its own.
const GATHER_SHORTLY: Duration = Duration::from_millis(5);
/// The CSIDriver is made anew if somebody deletes it: looked at so often.
const DRIVER_EVERY: Duration = Duration::from_secs(600);
/// So many are written at the same time.
const AT_ONCE: usize = 8;
/// After a write that failed.
const RETRY: Duration = Duration::from_secs(5);

fn capacity_object(
    name: &str,
    namespace: &str,
    published: &Published,
    owner: Option<&OwnerReference>,
) -> CSIStorageCapacity {
    let node_topology = match &published.nodes[..] {
        [node] => LabelSelector {
            match_labels: Some(BTreeMap::from([(TOPOLOGY_NODE.to_owned(), node.clone())])),
            match_expressions: None,
        },
        nodes => LabelSelector {
            match_labels: None,
            match_expressions: Some(vec![LabelSelectorRequirement {
                key: TOPOLOGY_NODE.to_owned(),
                operator: "In".to_owned(),
                values: Some(nodes.to_vec()),
            }]),
        },
    };
    CSIStorageCapacity {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(namespace.to_owned()),
            labels: Some(BTreeMap::from([(MANAGED_BY.to_owned(), DRIVER.to_owned())])),
            owner_references: owner.map(|owner| vec![owner.clone()]),
            ..ObjectMeta::default()
        },
        storage_class_name: published.class.clone(),
        capacity: Some(quantity(published.room.free)),
        maximum_volume_size: Some(quantity(published.room.largest)),
        node_topology: Some(node_topology),
    }
}

/// Of its nodes the object's name tells.
fn says(object: &CSIStorageCapacity, published: &Published) -> bool {
    room_of(object) == Some(published.room)
}

fn room_of(object: &CSIStorageCapacity) -> Option<Room> {
    let bytes = |quantity: &Option<_>| -> Option<u64> {
        let one = quantity.clone().map(|quantity| BTreeMap::from([("storage".to_owned(), quantity)]));
        storage_of(one.as_ref()).ok().flatten()
    };
    Some(Room { free: bytes(&object.capacity)?, largest: bytes(&object.maximum_volume_size)? })
}

/// The nodes that an object speaks of.
fn nodes_of(object: &CSIStorageCapacity) -> impl Iterator<Item = &str> {
    let labels = object.node_topology.iter().flat_map(|topology| topology.match_labels.iter().flatten());
    let one = labels.filter(|(key, _)| *key == TOPOLOGY_NODE).map(|(_, node)| node);
    let terms = object.node_topology.iter().flat_map(|topology| topology.match_expressions.iter().flatten());
    one.chain(terms.flat_map(|term| term.values.iter().flatten())).map(String::as_str)
}

/// What is said of each node of a class now.
fn said(there: &BTreeMap<String, Arc<CSIStorageCapacity>>) -> HashMap<(&str, &str), Room> {
    let mut said = HashMap::new();
    for object in there.values() {
        let Some(room) = room_of(object) else { continue };
        said.extend(nodes_of(object).map(|node| ((object.storage_class_name.as_str(), node), room)));
    }
    said
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

/// Takes one event of the watch. No: there will be no more.
fn goes_on<T>(changed: Option<Result<T, watcher::Error>>) -> bool {
    if let Some(Err(error)) = &changed {
        warn!(%error, "cannot watch the CSIStorageCapacity objects");
    }
    changed.is_some()
}

/// Deletes an object, and gives it back once that is done. None: it was not.
async fn withdraw(
    api: Api<CSIStorageCapacity>,
    (name, uid): (String, Option<String>),
) -> Option<(String, Option<String>)> {
    match api.delete(&name, &DeleteParams::default()).await {
        Ok(_) => info!(name, "withdrew a capacity"),
        Err(error) if is_not_found(&error) => {}
        Err(error) => {
            warn!(name, %error, "cannot withdraw the capacity");
            return None;
        }
    }
    Some((name, uid))
}

/// Keeps the objects right.
pub struct Publisher {
    /// To the API server.
    pub client: Client,
    /// Where the objects are.
    pub namespace: String,
    /// With whom they go.
    pub owner: Option<OwnerReference>,
    /// Fed from the watch that `node_objects` is of.
    pub nodes: Arc<Nodes>,
    /// As watched.
    pub node_objects: Objects<Node>,
    /// As watched.
    pub classes: Store<StorageClass>,
    /// How long a silent node's objects stay.
    pub patience: Duration,
    /// As of [`wanted`].
    pub share_from: usize,
}

impl Publisher {
    /// Works until dropped. `class_changed` tells of changed classes.
    pub async fn run(self, mut class_changed: broadcast::Receiver<ClassChanged>) {
        let api: Api<CSIStorageCapacity> = Api::namespaced(self.client.clone(), &self.namespace);
        let (objects, writer) = store::<CSIStorageCapacity>();
        let config = watcher::Config::default().labels(&format!("{MANAGED_BY}={DRIVER}"));
        // The end of a list, too, is news: what it does not bring has gone.
        let watch = watcher(api.clone(), config).default_backoff().modify(slim::capacity).reflect(writer);
        let mut watch = pin!(watch);
        let mut news = self.nodes.news();
        // A class or a node that the watches have not brought yet is none that
        // has gone: its objects must not be withdrawn.
        let mut ready = pin!(async {
            self.node_objects.wait_until_ready().await;
            futures::future::try_join(objects.wait_until_ready(), self.classes.wait_until_ready()).await
        });
        let mut is_ready = false;
        let mut done = Done::default();
        let mut again = Some(Duration::ZERO);
        loop {
            tokio::select! {
                changed = watch.next() => if !goes_on(changed) { return },
                result = &mut ready, if !is_ready => is_ready = result.is_ok(),
                // Lagging behind is no loss: everything is looked at below.
                _ = news.recv() => {}
                _ = class_changed.recv() => {}
                () = tokio::time::sleep(again.unwrap_or(Duration::MAX)), if again.is_some() => {}
            }
            // Everything is looked at below, so what comes meanwhile is old. The watch is read all
            // the time: it gives what has come piece by piece, and lags behind where it has to wait.
            let mut gathered = pin!(tokio::time::sleep(if done.shares { GATHER } else { GATHER_SHORTLY }));
            loop {
                tokio::select! {
                    () = &mut gathered => break,
                    changed = watch.next() => if !goes_on(changed) { return },
                }
            }
            while !matches!(news.try_recv(), Err(TryRecvError::Empty | TryRecvError::Closed)) {}
            if !is_ready {
                again = None;
                continue;
            }
            let mut round = pin!(self.round(&api, &objects, &mut done));
            let mut more = false;
            again = loop {
                tokio::select! {
                    again = &mut round => break again,
                    changed = watch.next() => if !goes_on(changed) { return } else { more = true },
                }
            };
            if more {
                again = Some(Duration::ZERO);
            }
        }
    }

    /// One comparison of what should be with what is. Says when the next is
    /// due although nothing happens.
    async fn round(
        &self,
        api: &Api<CSIStorageCapacity>,
        objects: &Store<CSIStorageCapacity>,
        done: &mut Done,
    ) -> Option<Duration> {
        let nodes = self.nodes.views();
        let mut failed = false;
        done.forget_old();
        let there: BTreeMap<String, Arc<CSIStorageCapacity>> = objects
            .state()
            .into_iter()
            .filter(|object| !object.uid().is_some_and(|uid| done.withdrawn.contains_key(&uid)))
            .map(|object| (object.name_any(), object))
            .collect();
        let wanted = wanted(&self.classes.state(), &nodes, self.patience, self.share_from, &said(&there));
        done.shares = !(wanted.shared.is_empty() && wanted.keep_all_of.is_empty());
        let (mut new, mut awaited) = (Vec::new(), false);
        for (name, published) in &wanted.publish {
            if there.get(name).is_some_and(|object| says(object, published)) {
                done.written.remove(name);
            } else if done.written.get(name).is_some_and(|(last, _)| last == published) {
                awaited = true;
            } else {
                new.push((name.clone(), published.clone()));
            }
        }
        let writes = new.into_iter().map(|(name, published)| self.publish(api.clone(), name, published));
        let mut writes = stream::iter(writes).buffer_unordered(AT_ONCE);
        while let Some(written) = writes.next().await {
            match written {
                Some((name, published)) => drop(done.written.insert(name, (published, Instant::now()))),
                None => failed = true,
            }
        }
        drop(writes);
        let goes = |name: &String, object: &CSIStorageCapacity| {
            let class = &object.storage_class_name;
            let keep = || nodes_of(object).any(|node| wanted.keep.contains(&(class.clone(), node.to_owned())));
            let shared = || wanted.shared.contains(class) || nodes_of(object).nth(1).is_some();
            let stays = wanted.publish.contains_key(name)
                || wanted.keep_all_of.contains(class)
                || keep()
                // What takes the place of a shared one comes first, or its nodes would be refused meanwhile.
                || failed && shared();
            !stays
        };
        let gone = there.iter().filter(|(name, object)| goes(name, object));
        let gone: Vec<_> = gone.map(|(name, object)| (name.clone(), object.uid())).collect();
        let mut deletions =
            stream::iter(gone.into_iter().map(|one| withdraw(api.clone(), one))).buffer_unordered(AT_ONCE);
        while let Some(withdrawn) = deletions.next().await {
            let Some((name, uid)) = withdrawn else {
                failed = true;
                continue;
            };
            done.withdrawn.extend(uid.map(|uid| (uid, Instant::now())));
            // If it is wanted again at once, it is not there.
            done.written.remove(&name);
        }
        drop(deletions);
        let due = done.driver_made.is_none_or(|at| at.elapsed() >= DRIVER_EVERY);
        if due && !failed && settled(&nodes) {
            match self.make_driver().await {
                true => done.driver_made = Some(Instant::now()),
                false => failed = true,
            }
        }
        if failed {
            return Some(RETRY);
        }
        // What the watch has not brought by then is written again.
        let unseen = awaited.then_some(WATCH_LAG);
        let driver = done.driver_made.map(|at| DRIVER_EVERY.saturating_sub(at.elapsed()).max(RETRY));
        [unseen, wanted.again, driver].into_iter().flatten().min()
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
        let Published { class, nodes, room: Room { free, .. } } = &published;
        let node = match &nodes[..] {
            [node] => node.clone(),
            nodes => format!("{} nodes", nodes.len()),
        };
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
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn both_sizes_are_always_there() {
        let published = Published {
            class: "fast".into(),
            nodes: vec!["a".into()],
            room: Room { free: (8 << 20) + 5, largest: 8 << 20 },
        };
        let object = capacity_object("x", "ns", &published, None);
        assert!(says(&object, &published));
        let object = serde_json::to_value(object).unwrap();
        assert_eq!(object["capacity"], "8388613");
        assert_eq!(object["maximumVolumeSize"], "8Mi");
        assert_eq!(object["nodeTopology"]["matchLabels"], json!({"topology.lvprov.io/node": "a"}));
        assert_eq!(object["metadata"]["ownerReferences"], Value::Null);
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
