//! What is kept of watched objects: there may be a hundred thousand of each,
//! and a good part of every one is nothing that is ever looked at here.
//!
//! What is written is always a patch, and what cannot be undone is decided by
//! the object that the API server gives at that moment: so nothing is lost.

use k8s_openapi::api::core::v1::{Node, NodeStatus, PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::CSIStorageCapacity;
use kube::api::ObjectMeta;
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};

use super::names::{NODE_LOST_SINCE, PRE_RESIZE_CAPACITY, PROVISIONED_BY, SELECTED_NODE, STORAGE_PROVISIONER};
use super::objects::Kept;
use super::snapshot::types::{ContentSpec, VolumeSnapshotContent};
use super::volume::{Need, logical_volume_of, need, place_of};
use super::{claim, growth};
use crate::names::{DRIVER, FLEX_DRIVER, TOPOLOGY_NODE};

/// The whole object once more, as `kubectl apply` leaves it.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Any object, without who wrote what of it.
pub fn object<K: Resource>(object: &mut K) {
    let metadata = object.meta_mut();
    metadata.managed_fields = None;
    metadata.self_link = None;
    metadata.generate_name = None;
    metadata.creation_timestamp = None;
    if let Some(annotations) = &mut metadata.annotations {
        annotations.remove(LAST_APPLIED);
    }
}

/// A node: where it is, its labels, whether it is cordoned.
pub fn node(node: &mut Node) {
    object(node);
    node.metadata.annotations = None;
    node.metadata.owner_references = None;
    if let Some(spec) = &mut node.spec {
        let unschedulable = spec.unschedulable;
        *spec = k8s_openapi::api::core::v1::NodeSpec { unschedulable, ..Default::default() };
    }
    if let Some(status) = &mut node.status {
        let addresses = status.addresses.take();
        *status = NodeStatus { addresses, ..NodeStatus::default() };
    }
}

/// Where it is and whether it is cordoned, the node services know.
impl Kept for Node {
    fn slim(&mut self) {
        self.spec = None;
        self.status = None;
    }

    fn is_live(&self) -> bool {
        false
    }

    fn node(&self) -> Option<String> {
        self.labels().get(TOPOLOGY_NODE).cloned()
    }

    fn sample() -> Value {
        json!({"metadata": {
            "labels": {
                "beta.kubernetes.io/arch": "amd64", "beta.kubernetes.io/os": "linux",
                "failure-domain.beta.kubernetes.io/region": "", "failure-domain.beta.kubernetes.io/zone": "",
                "kubernetes.io/arch": "amd64", "kubernetes.io/hostname": "", "kubernetes.io/os": "linux",
                "node.kubernetes.io/instance-type": "", "node-role.kubernetes.io/worker": "",
                "topology.kubernetes.io/region": "", "topology.kubernetes.io/zone": "", TOPOLOGY_NODE: "",
            },
            "name": "", "resourceVersion": "1", "uid": "",
        }})
    }
}

/// A capacity: how much it says of what, under which name.
pub fn capacity(capacity: &mut CSIStorageCapacity) {
    let metadata = std::mem::take(&mut capacity.metadata);
    let CSIStorageCapacity { capacity: free, maximum_volume_size, node_topology, storage_class_name, .. } =
        std::mem::take(capacity);
    let ObjectMeta { name, namespace, uid, .. } = metadata;
    *capacity = CSIStorageCapacity {
        metadata: ObjectMeta { name, namespace, uid, ..ObjectMeta::default() },
        capacity: free,
        maximum_volume_size,
        node_topology,
        storage_class_name,
    };
}

/// Of others' volumes it is enough that they are there.
impl Kept for PersistentVolume {
    fn slim(&mut self) {
        object(self);
        self.metadata.labels = None;
        if let Some(status) = &mut self.status {
            status.last_phase_transition_time = None;
        }
        let made_here = self.annotations().get(PROVISIONED_BY).map(String::as_str) == Some(DRIVER);
        if !made_here && self.spec.as_ref().and_then(logical_volume_of).is_none() {
            self.metadata.annotations = None;
            self.spec = None;
            self.status = None;
        }
    }

    /// Its finalizer or its removal is to be looked after, a growth has left
    /// something on it, its node is lost, or it is called otherwise than its
    /// logical volume, by which it is looked for.
    fn is_live(&self) -> bool {
        let marked = |key: &str| self.annotations().contains_key(key);
        place_of(self).is_some_and(|place| {
            need(self) != Need::Nothing
                || marked(PRE_RESIZE_CAPACITY)
                || marked(NODE_LOST_SINCE)
                || self.metadata.name.as_deref() != Some(&*place.logical_volume)
        })
    }

    fn node(&self) -> Option<String> {
        place_of(self).map(|place| place.topology)
    }

    fn sample() -> Value {
        json!({
            "metadata": {
                "annotations": {"pv.kubernetes.io/provisioned-by": DRIVER},
                "finalizers": ["external-provisioner.volume.kubernetes.io/finalizer", "kubernetes.io/pv-protection"],
                "name": "pvc-", "resourceVersion": "1", "uid": "",
            },
            "spec": {
                "accessModes": ["ReadWriteOnce"],
                "capacity": {"storage": "10Gi"},
                "claimRef": {
                    "apiVersion": "v1", "kind": "PersistentVolumeClaim", "name": "data-", "namespace": "default",
                    "resourceVersion": "1", "uid": "",
                },
                "csi": {
                    "driver": DRIVER, "fsType": "ext4",
                    "volumeAttributes": {"claimNamespace": "default", "claimUID": ""}, "volumeHandle": "vg0/pvc-",
                },
                "flexVolume": {
                    "driver": FLEX_DRIVER, "fsType": "ext4",
                    "options": {"claimUID": "", "logicalVolume": "pvc-", "type": "data", "volumeGroup": "vg0"},
                },
                "mountOptions": ["noatime"],
                "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [
                    {"key": TOPOLOGY_NODE, "operator": "In", "values": [""]},
                ]}]}},
                "persistentVolumeReclaimPolicy": "Delete",
                "storageClassName": "",
                "volumeMode": "Filesystem",
            },
            "status": {"phase": "Bound"},
        })
    }
}

/// A content. Of others' nothing but whose it is.
pub fn content(content: &mut VolumeSnapshotContent) {
    object(content);
    content.metadata.labels = None;
    if !content.is_ours() {
        content.metadata.annotations = None;
        let driver = std::mem::take(&mut content.spec.driver);
        content.spec = ContentSpec { driver, ..ContentSpec::default() };
        content.status = None;
    }
}

impl Kept for PersistentVolumeClaim {
    fn slim(&mut self) {
        object(self);
        self.metadata.labels = None;
        self.metadata.owner_references = None;
    }

    /// It waits for its volume, or grows.
    fn is_live(&self) -> bool {
        claim::waits(self) || growth::is_under_way(self)
    }

    fn node(&self) -> Option<String> {
        None
    }

    fn sample() -> Value {
        json!({
            "metadata": {
                "annotations": {
                    "pv.kubernetes.io/bind-completed": "yes",
                    "pv.kubernetes.io/bound-by-controller": "yes",
                    "volume.beta.kubernetes.io/storage-provisioner": DRIVER,
                    SELECTED_NODE: "",
                    STORAGE_PROVISIONER: DRIVER,
                },
                "finalizers": ["kubernetes.io/pvc-protection"],
                "name": "data-", "namespace": "default", "resourceVersion": "1", "uid": "",
            },
            "spec": {
                "accessModes": ["ReadWriteOnce"],
                "resources": {"requests": {"storage": "10Gi"}},
                "storageClassName": "",
                "volumeMode": "Filesystem",
                "volumeName": "pvc-",
            },
            "status": {"accessModes": ["ReadWriteOnce"], "capacity": {"storage": "10Gi"}, "phase": "Bound"},
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::nodes::{address_of, topology_of};
    use super::*;

    fn parsed<K: serde::de::DeserializeOwned>(object: Value) -> K {
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn what_is_looked_at_of_a_node_stays() {
        let mut slim: Node = parsed(json!({
            "metadata": {"name": "n1", "uid": "u", "labels": {"topology.lvprov.io/node": "n1", "zone": "a"},
                         "annotations": {"a": "b"}, "managedFields": [{"manager": "kubelet"}]},
            "spec": {"unschedulable": true, "podCIDR": "10.0.0.0/24"},
            "status": {"addresses": [{"type": "InternalIP", "address": "10.1.2.3"}], "images": [{"names": ["x"]}]},
        }));
        node(&mut slim);
        assert_eq!(topology_of(&slim).as_deref(), Some("n1"));
        assert_eq!(address_of(&slim).unwrap().to_string(), "10.1.2.3");
        assert_eq!((slim.uid().as_deref(), slim.labels()["zone"].as_str()), (Some("u"), "a"));
        assert_eq!(slim.spec.as_ref().unwrap().unschedulable, Some(true));
        assert!(slim.status.as_ref().unwrap().images.is_none() && slim.managed_fields().is_empty());
    }

    #[test]
    fn ours_stay_whole_and_of_others_nothing_is_kept() {
        let mut ours = super::super::volume::tests::pv("Delete", "");
        ours.metadata.managed_fields = Some(vec![Default::default()]);
        let (place, before) = (place_of(&ours), need(&ours));
        ours.slim();
        assert_eq!((place_of(&ours), need(&ours)), (place, before));
        assert!(ours.spec.is_some() && ours.managed_fields().is_empty());
        let mut others: PersistentVolume = parsed(json!({
            "metadata": {"name": "nfs", "annotations": {"pv.kubernetes.io/provisioned-by": "nfs.example"}},
            "spec": {"persistentVolumeReclaimPolicy": "Delete", "nfs": {"path": "/", "server": "a"}},
            "status": {"phase": "Released"},
        }));
        others.slim();
        assert!(others.spec.is_none() && place_of(&others).is_none());
        assert_ne!(need(&others), Need::Removal);
    }
}
