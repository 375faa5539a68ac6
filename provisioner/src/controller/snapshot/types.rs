//! The objects of snapshot.storage.k8s.io/v1, as far as they are looked at.
//!
//! Their definitions come with the cluster's snapshot-controller, so they may
//! be missing.

use std::borrow::Cow;
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::{ClusterResourceScope, NamespaceResourceScope};
use kube::api::ObjectMeta;
use kube::{Resource, ResourceExt};
use serde::Deserialize;

use crate::names::DRIVER;

/// Their group.
pub const GROUP: &str = "snapshot.storage.k8s.io";

/// Written on a content by the snapshot-controller: its VolumeSnapshot is being
/// deleted.
const BEING_DELETED: &str = "snapshot.storage.kubernetes.io/volumesnapshot-being-deleted";

/// Written on a content by who takes snapshots: a node was asked for one, and
/// what has become of it is not known yet.
pub const BEING_CREATED: &str = "snapshot.storage.kubernetes.io/volumesnapshot-being-created";

/// Put on a content by the snapshot-controller, and taken off by who takes
/// snapshots, when the snapshot has gone or is to be kept.
pub const CONTENT_FINALIZER: &str = "snapshot.storage.kubernetes.io/volumesnapshotcontent-bound-protection";

/// Of a content whose snapshot is one of a group, which are not served.
const GROUP_HANDLE: &str = "groupsnapshot.storage.kubernetes.io/volumeGroupSnapshotHandle";

/// What a user asks for: a snapshot of a claim's volume.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct VolumeSnapshot {
    /// Of the object.
    pub metadata: ObjectMeta,
    /// Written by the snapshot-controller.
    #[serde(default)]
    pub status: Option<SnapshotStatus>,
}

/// How far a VolumeSnapshot is.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotStatus {
    /// The content that it is bound to.
    pub bound_volume_snapshot_content_name: Option<String>,
    /// Whether volumes can be made from it.
    pub ready_to_use: Option<bool>,
    /// Why it is not ready.
    pub error: Option<SnapshotError>,
}

/// Why something failed.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct SnapshotError {
    /// For people.
    pub message: Option<String>,
    /// When.
    pub time: Option<Time>,
}

/// The snapshot itself, to Kubernetes.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct VolumeSnapshotContent {
    /// Of the object.
    pub metadata: ObjectMeta,
    /// What is to be, or is, snapshotted.
    pub spec: ContentSpec,
    /// What has become of it; written here.
    #[serde(default)]
    pub status: Option<ContentStatus>,
}

/// What is to be snapshotted.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContentSpec {
    /// Who takes it.
    pub driver: String,
    /// `Delete` or `Retain`.
    #[serde(default)]
    pub deletion_policy: String,
    /// The volume, or a snapshot that is there.
    #[serde(default)]
    pub source: ContentSource,
    /// `Filesystem` or `Block`.
    pub source_volume_mode: Option<String>,
    /// With its parameters.
    pub volume_snapshot_class_name: Option<String>,
    /// The VolumeSnapshot that it is for; without UID until they are bound.
    #[serde(default)]
    pub volume_snapshot_ref: ObjectReference,
}

/// One of the two.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContentSource {
    /// Handle of the volume that is to be snapshotted.
    pub volume_handle: Option<String>,
    /// Handle of a snapshot that was there before.
    pub snapshot_handle: Option<String>,
}

/// What has become of a content.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContentStatus {
    /// What the node calls the snapshot.
    pub snapshot_handle: Option<String>,
    /// In nanoseconds since 1970.
    pub creation_time: Option<i64>,
    /// Whether volumes can be made from it.
    pub ready_to_use: Option<bool>,
    /// The least size of a volume made from it, in bytes.
    pub restore_size: Option<i64>,
    /// Why it is not ready.
    pub error: Option<SnapshotError>,
}

/// How snapshots are taken.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct VolumeSnapshotClass {
    /// Of the object.
    pub metadata: ObjectMeta,
    /// For the node.
    pub parameters: Option<BTreeMap<String, String>>,
}

impl VolumeSnapshotContent {
    /// Whether its snapshot is for this driver to take.
    pub fn is_ours(&self) -> bool {
        self.spec.driver == DRIVER && !self.annotations().contains_key(GROUP_HANDLE)
    }

    /// What the node calls the snapshot, once that is known.
    pub fn handle(&self) -> Option<&str> {
        self.status.as_ref()?.snapshot_handle.as_deref()
    }

    /// Whether volumes can be made from it, as far as it says.
    pub fn is_ready(&self) -> bool {
        self.status.as_ref().and_then(|status| status.ready_to_use) == Some(true)
    }

    /// Whether a node was asked for it, and may have made it.
    pub fn is_being_created(&self) -> bool {
        self.annotations().contains_key(BEING_CREATED)
    }

    /// What its error says.
    pub fn error(&self) -> Option<&str> {
        self.status.as_ref()?.error.as_ref()?.message.as_deref()
    }
}

/// What a content needs from us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Nothing, until it changes.
    Nothing,
    /// Its snapshot taken.
    Creation,
    /// Its snapshot looked at: it is there, or should be.
    Look,
    /// The note taken off that a node is asked for it.
    Note,
    /// Its snapshot removed.
    Removal,
    /// To be let go.
    NoFinalizer,
}

/// Decides as the sidecar of other drivers does: what is being deleted goes
/// only once the snapshot-controller says so, and not while a node may still be
/// making its snapshot.
pub fn need(content: &VolumeSnapshotContent) -> Need {
    let source = &content.spec.source;
    if content.metadata.deletion_timestamp.is_some() {
        let never_bound = source.snapshot_handle.is_some()
            && content.spec.volume_snapshot_ref.uid.as_deref().unwrap_or_default().is_empty();
        let may_go = !content.is_being_created() && content.annotations().contains_key(BEING_DELETED);
        if never_bound || may_go {
            return match content.spec.deletion_policy.as_str() {
                "Delete" if content.handle().is_some() => Need::Removal,
                _ if content.finalizers().iter().any(|name| name == CONTENT_FINALIZER) => Need::NoFinalizer,
                _ => Need::Nothing,
            };
        }
    }
    if content.is_ready() {
        return if content.is_being_created() { Need::Note } else { Need::Nothing };
    }
    match (&source.volume_handle, &source.snapshot_handle) {
        (Some(_), None) if content.handle().is_none() => Need::Creation,
        (Some(_), None) | (None, Some(_)) => Need::Look,
        // The snapshot-controller says what is wrong with it.
        (Some(_), Some(_)) | (None, None) => Need::Nothing,
    }
}

macro_rules! resource {
    ($type:ident, $scope:ident, $plural:literal) => {
        impl Resource for $type {
            type DynamicType = ();
            type Scope = $scope;

            fn kind(_: &()) -> Cow<'_, str> {
                stringify!($type).into()
            }

            fn group(_: &()) -> Cow<'_, str> {
                GROUP.into()
            }

            fn version(_: &()) -> Cow<'_, str> {
                "v1".into()
            }

            fn plural(_: &()) -> Cow<'_, str> {
                $plural.into()
            }

            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

resource!(VolumeSnapshot, NamespaceResourceScope, "volumesnapshots");
resource!(VolumeSnapshotContent, ClusterResourceScope, "volumesnapshotcontents");
resource!(VolumeSnapshotClass, ClusterResourceScope, "volumesnapshotclasses");

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn content(change: impl FnOnce(&mut Value)) -> VolumeSnapshotContent {
        let mut content = json!({
            "metadata": {"name": "snapcontent-u", "uid": "c", "annotations": {}, "finalizers": [CONTENT_FINALIZER]},
            "spec": {
                "driver": DRIVER,
                "deletionPolicy": "Delete",
                "source": {"volumeHandle": "vg0/pvc-1"},
                "volumeSnapshotRef": {"namespace": "shop", "name": "s", "uid": "u"},
            },
        });
        change(&mut content);
        serde_json::from_value(content).unwrap()
    }

    fn taken(ready: bool) -> Value {
        json!({"snapshotHandle": "n1/vg0/snap", "readyToUse": ready, "creationTime": 1, "restoreSize": 2})
    }

    #[test]
    fn a_new_one_is_taken_one_that_is_there_looked_at_and_a_ready_one_left_alone() {
        assert_eq!(need(&content(|_| ())), Need::Creation);
        assert_eq!(need(&content(|c| c["status"] = json!({"readyToUse": false, "error": {}}))), Need::Creation);
        assert_eq!(need(&content(|c| c["status"] = taken(false))), Need::Look);
        assert_eq!(need(&content(|c| c["status"] = taken(true))), Need::Nothing);
        let pre = |c: &mut Value| c["spec"]["source"] = json!({"snapshotHandle": "n1/vg0/snap"});
        assert_eq!(need(&content(pre)), Need::Look);
        let noted = |c: &mut Value| {
            c["status"] = taken(true);
            c["metadata"]["annotations"][BEING_CREATED] = json!("yes");
        };
        assert_eq!(need(&content(noted)), Need::Note);
        let both = json!({"snapshotHandle": "n1/vg0/snap", "volumeHandle": "vg0/pvc-1"});
        for source in [both, json!({})] {
            assert_eq!(need(&content(|c| c["spec"]["source"] = source)), Need::Nothing);
        }
    }

    #[test]
    fn what_is_deleted_waits_for_the_snapshot_controller_and_for_the_nodes_answer() {
        let deleted = |annotations: &[&str], policy: &str, status: Value| {
            let annotations: BTreeMap<_, _> = annotations.iter().map(|name| (*name, "yes")).collect();
            content(|c| {
                c["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
                c["metadata"]["annotations"] = json!(annotations);
                c["spec"]["deletionPolicy"] = json!(policy);
                c["status"] = status;
            })
        };
        assert_eq!(need(&deleted(&[], "Delete", taken(true))), Need::Nothing);
        assert_eq!(need(&deleted(&[BEING_DELETED], "Delete", taken(true))), Need::Removal);
        assert_eq!(need(&deleted(&[BEING_DELETED], "Delete", taken(false))), Need::Removal);
        assert_eq!(need(&deleted(&[BEING_DELETED], "Retain", taken(true))), Need::NoFinalizer);
        assert_eq!(need(&deleted(&[BEING_DELETED], "Delete", json!({}))), Need::NoFinalizer);
        // A node may be making it: only then is known what there is to remove.
        let both = [BEING_DELETED, BEING_CREATED];
        assert_eq!(need(&deleted(&both, "Delete", Value::Null)), Need::Creation);
        let mut let_go = deleted(&[BEING_DELETED], "Retain", taken(true));
        let_go.metadata.finalizers = None;
        assert_eq!(need(&let_go), Need::Nothing);
    }

    #[test]
    fn one_that_was_never_bound_goes_without_being_asked_for() {
        let unbound = |status: Value| {
            content(|c| {
                c["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
                c["spec"]["source"] = json!({"snapshotHandle": "n1/vg0/snap"});
                c["spec"]["volumeSnapshotRef"] = json!({"namespace": "shop", "name": "s"});
                c["status"] = status;
            })
        };
        assert_eq!(need(&unbound(taken(true))), Need::Removal);
        assert_eq!(need(&unbound(Value::Null)), Need::NoFinalizer);
    }

    #[test]
    fn others_and_members_of_groups_are_not_ours() {
        assert!(content(|_| ()).is_ours());
        assert!(!content(|c| c["spec"]["driver"] = json!("other.example")).is_ours());
        assert!(!content(|c| c["metadata"]["annotations"][GROUP_HANDLE] = json!("g")).is_ours());
    }
}
