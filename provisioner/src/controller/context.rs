//! What all reconciliations share.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::Client;
use kube::runtime::reflector::Store;

use super::error::Failures;
use super::events::Events;
use super::nodes::Nodes;

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
    pub node_objects: Store<Node>,
    /// As watched.
    pub classes: Store<StorageClass>,
    /// As watched.
    pub claims: Store<PersistentVolumeClaim>,
    /// As watched.
    pub volumes: Store<PersistentVolume>,
    /// What has failed lately, by UID.
    pub failures: Failures,
    /// How long a selected node may be out of reach before its claim is handed
    /// back to the scheduler.
    pub patience: Duration,
}
