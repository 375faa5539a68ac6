//! What all reconciliations share.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::Client;
use kube::runtime::reflector::Store;

use super::calls::Calls;
use super::claim::Held;
use super::error::Failures;
use super::events::Events;
use super::nodes::Nodes;
use super::objects::Objects;
use super::snapshot::Snapshots;

/// What all reconciliations share.
pub struct Context {
    /// To the API server.
    pub client: Client,
    /// For what users are told.
    pub events: Events,
    /// UID of the namespace kube-system: which cluster a volume belongs to.
    pub cluster: String,
    /// The node services.
    pub nodes: Arc<Nodes>,
    /// As watched.
    pub node_objects: Objects<Node>,
    /// As watched.
    pub classes: Store<StorageClass>,
    /// As watched.
    pub claims: Objects<PersistentVolumeClaim>,
    /// As watched.
    pub volumes: Objects<PersistentVolume>,
    /// The cluster's snapshots.
    pub snapshots: Arc<Snapshots>,
    /// Claims that can be served on one node only, and wait for it.
    pub held: Held,
    /// What has failed lately, by UID.
    pub failures: Failures,
    /// What nodes were asked to make, and may have made.
    pub calls: Calls,
    /// The UIDs of claims whose PVs were made a moment ago.
    pub published: Lately,
    /// The growths that were handed to kubelet a moment ago.
    pub grown: Lately,
    /// How long a selected node may be out of reach before its claim is handed
    /// back to the scheduler.
    pub patience: Duration,
}

/// How long the watch may take to bring what was written here.
const WATCH_LAG: Duration = Duration::from_secs(15);

/// What was done here a moment ago, and the watch may not have brought yet:
/// asking a node for it again would only cost it a look at its disks.
#[derive(Debug, Default)]
pub struct Lately {
    at: Mutex<HashMap<String, Instant>>,
}

impl Lately {
    /// It has been done.
    pub fn note(&self, what: String) {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        at.retain(|_, at| at.elapsed() < WATCH_LAG);
        at.insert(what, Instant::now());
    }

    /// For how long the news of it may still be on its way. None: it is not.
    pub fn left(&self, what: &str) -> Option<Duration> {
        let at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        WATCH_LAG.checked_sub(at.get(what)?.elapsed())
    }
}
