//! What is kept of watched objects: there may be a hundred thousand of each,
//! and a good part of every one is nothing that is ever looked at here.
//!
//! What is written is always a patch, and what cannot be undone is decided by
//! the object that the API server gives at that moment: so nothing is lost.

use k8s_openapi::api::core::v1::{Node, NodeStatus, PersistentVolume, PersistentVolumeClaim};
use kube::{Resource, ResourceExt};

use super::names::PROVISIONED_BY;
use super::snapshot::types::{ContentSpec, VolumeSnapshotContent};
use super::volume::logical_volume_of;
use crate::names::DRIVER;

/// The whole object once more, as `kubectl apply` leaves it.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Any object, without who wrote what of it.
pub fn object<K: Resource>(object: &mut K) {
    let metadata = object.meta_mut();
    metadata.managed_fields = None;
    metadata.self_link = None;
    metadata.generate_name = None;
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

/// A PersistentVolume. Of others' it is enough that they are there.
pub fn volume(volume: &mut PersistentVolume) {
    object(volume);
    volume.metadata.labels = None;
    let made_here = volume.annotations().get(PROVISIONED_BY).map(String::as_str) == Some(DRIVER);
    if !made_here && volume.spec.as_ref().and_then(logical_volume_of).is_none() {
        volume.metadata.annotations = None;
        volume.spec = None;
        volume.status = None;
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

/// A claim.
pub fn claim(claim: &mut PersistentVolumeClaim) {
    object(claim);
    claim.metadata.labels = None;
    claim.metadata.owner_references = None;
}

#[cfg(test)]
mod tests {
    use super::super::nodes::{address_of, topology_of};
    use super::super::volume::{Need, need, place_of};
    use super::*;
    use serde_json::{Value, json};

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
        volume(&mut ours);
        assert_eq!((place_of(&ours), need(&ours)), (place, before));
        assert!(ours.spec.is_some() && ours.managed_fields().is_empty());
        let mut others: PersistentVolume = parsed(json!({
            "metadata": {"name": "nfs", "annotations": {"pv.kubernetes.io/provisioned-by": "nfs.example"}},
            "spec": {"persistentVolumeReclaimPolicy": "Delete", "nfs": {"path": "/", "server": "a"}},
            "status": {"phase": "Released"},
        }));
        volume(&mut others);
        assert!(others.spec.is_none() && place_of(&others).is_none());
        assert_ne!(need(&others), Need::Removal);
    }
}
