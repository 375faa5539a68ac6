//! Annotations, finalizers and labels of Kubernetes that the controller acts
//! on, and those of its own.

/// Written by the scheduler on a claim of a WaitForFirstConsumer class: the
/// node it has chosen. Removing it hands the pod back to the scheduler.
pub const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";

/// Written on a PV by who made it. A value that does not begin with
/// `kubernetes.io/` keeps the controller manager from deleting it.
pub const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";

/// Written on a claim by the controller manager: who should serve it.
pub const STORAGE_PROVISIONER: &str = "volume.kubernetes.io/storage-provisioner";

/// Written on a claim by who grows its volume: the name of the resizer.
pub const STORAGE_RESIZER: &str = "volume.kubernetes.io/storage-resizer";

/// Written on a PV by who raises its capacity: what its file system has until
/// it has grown as well.
pub const PRE_RESIZE_CAPACITY: &str = "volume.alpha.kubernetes.io/pre-resize-capacity";

/// How a claim named its class before there was a field for it.
pub const BETA_STORAGE_CLASS: &str = "volume.beta.kubernetes.io/storage-class";

/// Keeps a PV in the API until its logical volume is gone. On while the
/// reclaim policy is Delete.
pub const PV_FINALIZER: &str = "external-provisioner.volume.kubernetes.io/finalizer";

/// On every CSIStorageCapacity of ours.
pub const MANAGED_BY: &str = "lvprov.io/managed-by";

/// Who applies our objects, in their `managedFields`.
pub const FIELD_MANAGER: &str = "lvprov-controller";

/// On a PV of ours: the request of its claim whose growth was ended for want
/// of room, in bytes. The controller manager begins such a growth again
/// whenever it starts.
pub const GROWTH_ENDED: &str = "lvprov.io/growth-ended";

/// On a PV of ours: how its volume lies on the disks, where it is not linear.
pub const LAYOUT: &str = "lvprov.io/layout";

/// On a PV of ours whose Node object is not there: since when that is known.
pub const NODE_LOST_SINCE: &str = "lvprov.io/node-lost-since";

/// On a PV of ours, from its class: what becomes of its claim when its node is
/// lost. The class may have gone by then.
pub const ON_NODE_LOSS: &str = "lvprov.io/on-node-loss";

/// Key of the sizes in claims and PVs.
pub const STORAGE: &str = "storage";

/// The PV, and the logical volume, of a claim.
pub fn volume_of(claim_uid: &str) -> String {
    format!("pvc-{claim_uid}")
}
