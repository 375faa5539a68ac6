//! PersistentVolumes: what one of ours looks like, and what becomes of it
//! once its claim has gone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{
    CSIPersistentVolumeSource, FlexPersistentVolumeSource, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm,
    ObjectReference, PersistentVolume, PersistentVolumeClaim, PersistentVolumeSpec, VolumeNodeAffinity,
};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::{DeleteParams, ObjectMeta, Patch, PatchParams, Preconditions};
use kube::runtime::controller::Action;
use kube::{Api, Resource, ResourceExt};
use lvprov_proto::csi::DeleteVolumeRequest;
use lvprov_proto::csi::controller_client::ControllerClient;
use serde_json::json;
use tonic::Code;
use tracing::info;

use super::context::Context;
use super::error::{Doing, Error, Row, is_conflict, is_not_found};
use super::events::Reason;
use super::names::{PROVISIONED_BY, PV_FINALIZER, volume_of};
use super::nodes::{State, call_to, explain};
use super::quantity::storage;
use super::validate::{Request, Source};
use crate::names::{DRIVER, FLEX_DRIVER, TOPOLOGY_NODE};

/// For one call that removes a logical volume.
const DELETE_TIMEOUT: Duration = Duration::from_secs(60);
/// Until a node that is being connected to has reported, or has not.
const SOON: Duration = Duration::from_secs(2);
/// Between attempts to remove one.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Keys of `flexVolume.options`, read by the driver.
mod options {
    pub const TYPE: &str = "type";
    pub const VOLUME_GROUP: &str = "volumeGroup";
    pub const LOGICAL_VOLUME: &str = "logicalVolume";
    pub const CLAIM_UID: &str = "claimUID";
    pub const MOUNT_OPTIONS: &str = "mountOptions";
}

/// A logical volume that a node has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// Value of the node's topology label.
    pub topology: String,
    /// Its volume group.
    pub volume_group: String,
    /// Its name.
    pub logical_volume: String,
    /// What it really has.
    pub bytes: u64,
    /// What the node wants to be told when the volume is mounted.
    pub context: BTreeMap<String, String>,
}

/// The PV of a claim.
pub fn build(claim: &PersistentVolumeClaim, class: &StorageClass, request: &Request, made: &Made) -> PersistentVolume {
    let claim_uid = claim.uid().unwrap_or_default();
    let reclaim_policy = class.reclaim_policy.clone().unwrap_or_else(|| "Delete".to_owned());
    let (flex_volume, csi, mount_options) = match request.source {
        // kubelet refuses to mount a flexVolume PV that has mountOptions of its
        // own: they travel in the driver's options.
        Source::Flexvolume => (Some(flex_source(&claim_uid, request, made)), None, None),
        Source::Csi => {
            (None, Some(csi_source(request, made)), Some(request.mount_flags()).filter(|flags| !flags.is_empty()))
        }
    };
    let here = NodeSelectorRequirement {
        key: TOPOLOGY_NODE.to_owned(),
        operator: "In".to_owned(),
        values: Some(vec![made.topology.clone()]),
    };
    PersistentVolume {
        metadata: ObjectMeta {
            name: Some(volume_of(&claim_uid)),
            annotations: Some(BTreeMap::from([(PROVISIONED_BY.to_owned(), DRIVER.to_owned())])),
            finalizers: (reclaim_policy == "Delete").then(|| vec![PV_FINALIZER.to_owned()]),
            ..ObjectMeta::default()
        },
        spec: Some(PersistentVolumeSpec {
            access_modes: Some(request.access_modes.clone()),
            capacity: Some(storage(made.bytes)),
            claim_ref: Some(ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("PersistentVolumeClaim".to_owned()),
                namespace: claim.namespace(),
                name: Some(claim.name_any()),
                // Without it the volume would only be reserved by name, and
                // given to another claim that comes to have the name.
                uid: Some(claim_uid),
                resource_version: claim.resource_version(),
                ..ObjectReference::default()
            }),
            csi,
            flex_volume,
            mount_options,
            node_affinity: Some(VolumeNodeAffinity {
                required: Some(NodeSelector {
                    node_selector_terms: vec![NodeSelectorTerm {
                        match_expressions: Some(vec![here]),
                        match_fields: None,
                    }],
                }),
            }),
            persistent_volume_reclaim_policy: Some(reclaim_policy),
            storage_class_name: Some(class.name_any()),
            volume_mode: Some("Filesystem".to_owned()),
            ..PersistentVolumeSpec::default()
        }),
        status: None,
    }
}

fn flex_source(claim_uid: &str, request: &Request, made: &Made) -> FlexPersistentVolumeSource {
    let mut flex_options = BTreeMap::from([
        (options::TYPE.to_owned(), "data".to_owned()),
        (options::VOLUME_GROUP.to_owned(), made.volume_group.clone()),
        (options::LOGICAL_VOLUME.to_owned(), made.logical_volume.clone()),
        (options::CLAIM_UID.to_owned(), claim_uid.to_owned()),
    ]);
    if !request.mount_options.is_empty() {
        flex_options.insert(options::MOUNT_OPTIONS.to_owned(), request.mount_options.clone());
    }
    FlexPersistentVolumeSource {
        driver: FLEX_DRIVER.to_owned(),
        fs_type: Some(request.fs_type.as_str().to_owned()),
        options: Some(flex_options),
        ..FlexPersistentVolumeSource::default()
    }
}

fn csi_source(request: &Request, made: &Made) -> CSIPersistentVolumeSource {
    CSIPersistentVolumeSource {
        driver: DRIVER.to_owned(),
        volume_handle: handle(&made.volume_group, &made.logical_volume),
        fs_type: Some(request.fs_type.as_str().to_owned()),
        volume_attributes: Some(made.context.clone()),
        ..CSIPersistentVolumeSource::default()
    }
}

/// The id that CSI calls a volume by.
fn handle(volume_group: &str, logical_volume: &str) -> String {
    format!("{volume_group}/{logical_volume}")
}

/// Volume group and logical volume of a PV, whoever made it; None where it is
/// not for us to mount.
pub fn logical_volume_of(spec: &PersistentVolumeSpec) -> Option<(String, String)> {
    match (&spec.flex_volume, &spec.csi) {
        (Some(flex), _) if flex.driver == FLEX_DRIVER => {
            let option = |key| flex.options.as_ref()?.get(key).cloned();
            Some((option(options::VOLUME_GROUP)?, option(options::LOGICAL_VOLUME)?))
        }
        (_, Some(csi)) if csi.driver == DRIVER => {
            let (group, volume) = csi.volume_handle.split_once('/')?;
            Some((group.to_owned(), volume.to_owned()))
        }
        _ => None,
    }
}

/// Where the logical volume of a PV is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Place {
    /// Value of the node's topology label.
    pub topology: String,
    /// Its volume group.
    pub volume_group: String,
    /// Its name.
    pub logical_volume: String,
}

impl Place {
    /// The handle that CSI calls it by.
    pub fn handle(&self) -> String {
        handle(&self.volume_group, &self.logical_volume)
    }
}

/// Where the volume of a PV is; None where the PV is not one that [`build`]
/// made.
pub fn place_of(volume: &PersistentVolume) -> Option<Place> {
    if volume.annotations().get(PROVISIONED_BY).map(String::as_str) != Some(DRIVER) {
        return None;
    }
    let spec = volume.spec.as_ref()?;
    let (volume_group, logical_volume) = logical_volume_of(spec)?;
    let requirement = spec
        .node_affinity
        .iter()
        .flat_map(|affinity| &affinity.required)
        .flat_map(|selector| &selector.node_selector_terms)
        .flat_map(|term| term.match_expressions.iter().flatten())
        .find(|requirement| requirement.key == TOPOLOGY_NODE)?;
    Some(Place { topology: requirement.values.as_ref()?.first()?.clone(), volume_group, logical_volume })
}

/// Kind of a PV of ours.
pub fn source_of(volume: &PersistentVolume) -> Source {
    match volume.spec.as_ref().and_then(|spec| spec.csi.as_ref()) {
        Some(_) => Source::Csi,
        None => Source::Flexvolume,
    }
}

/// What a PV of ours needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Nothing, until it changes.
    Nothing,
    /// Our finalizer, since its policy is Delete.
    Finalizer,
    /// To be let go: the logical volume is to be kept, so the API object may
    /// be deleted at any time.
    NoFinalizer,
    /// Its logical volume removed, then itself.
    Removal,
}

/// Decides by phase, reclaim policy, finalizer, and whether the PV is being
/// deleted. The policy is honoured also when an admin deletes the PV first.
pub fn need(volume: &PersistentVolume) -> Need {
    let delete =
        volume.spec.as_ref().and_then(|spec| spec.persistent_volume_reclaim_policy.as_deref()) == Some("Delete");
    let phase = volume.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default();
    let deleting = volume.metadata.deletion_timestamp.is_some();
    let ours = volume.finalizers().iter().any(|name| name == PV_FINALIZER);
    match (delete, ours) {
        (true, true) if phase == "Released" => Need::Removal,
        // Never bound, or freed by an admin who now deletes it: nothing says
        // that its data may go. `lvprov gc` will show the logical volume.
        (true, true) if deleting && phase == "Available" => Need::NoFinalizer,
        (false, true) => Need::NoFinalizer,
        (true, false) if !deleting => Need::Finalizer,
        _ => Need::Nothing,
    }
}

/// Brings a PV of ours to where it should be.
///
/// # Errors
/// When the API server cannot be asked or refuses; it is tried again.
pub async fn reconcile(volume: Arc<PersistentVolume>, ctx: Arc<Context>) -> Result<Action, Error> {
    let Some(place) = place_of(&volume) else {
        return Ok(Action::await_change());
    };
    match need(&volume) {
        Need::Nothing => Ok(Action::await_change()),
        Need::Finalizer => {
            let mut finalizers = volume.finalizers().to_vec();
            finalizers.push(PV_FINALIZER.to_owned());
            set_finalizers(&volume, &ctx, finalizers).await
        }
        Need::NoFinalizer => set_finalizers(&volume, &ctx, others(&volume)).await,
        Need::Removal => remove(&volume, &place, &ctx).await,
    }
}

async fn remove(volume: &PersistentVolume, place: &Place, ctx: &Context) -> Result<Action, Error> {
    let name = volume.name_any();
    let api: Api<PersistentVolume> = Api::all(ctx.client.clone());
    // What the watch brought may be old by now, and this step cannot be undone.
    let now = match api.get(&name).await {
        Ok(now) => now,
        Err(error) if is_not_found(&error) => return Ok(Action::await_change()),
        Err(error) => return Err(error).doing(|| format!("read PersistentVolume {name}")),
    };
    if now.uid() != volume.uid() || need(&now) != Need::Removal || place_of(&now).as_ref() != Some(place) {
        return Ok(Action::await_change());
    }
    if still_claimed(&now, ctx).await? {
        let note = "its claim still exists and names it, so its data is kept although it is Released. \
                    Delete the claim, or set the reclaim policy to Retain";
        ctx.events.tell(&now, Reason::VolumeKept, note.to_owned()).await;
        return Ok(Action::requeue(LONGEST_WAIT));
    }
    if let Err(failed) = delete_volume(place, ctx).await {
        if !matches!(failed.again, Again::Soon) {
            ctx.events.tell(&now, failed.reason, failed.note).await;
        }
        return Ok(match failed.again {
            Again::Later => {
                let key = volume.uid().unwrap_or_default();
                Action::requeue(ctx.failures.note(&key, Row::Attempts, &place.topology, LONGEST_WAIT).wait)
            }
            Again::Soon => Action::requeue(SOON),
            Again::WhenTheNodeIsBack => Action::await_change(),
        });
    }
    info!(volume = name, handle = place.handle(), node = place.topology, "removed the volume");
    ctx.failures.clear(&volume.uid().unwrap_or_default());

    let this_one = DeleteParams {
        preconditions: Some(Preconditions { uid: now.uid(), resource_version: None }),
        ..DeleteParams::default()
    };
    match api.delete(&name, &this_one).await {
        Ok(_) => {}
        Err(error) if is_not_found(&error) => return Ok(Action::await_change()),
        Err(error) => return Err(error).doing(|| format!("delete PersistentVolume {name}")),
    }
    // The deletion has changed the PV's version: read the finalizers again.
    match api.get(&name).await {
        Ok(deleted) => set_finalizers(&deleted, ctx, others(&deleted)).await,
        Err(error) if is_not_found(&error) => Ok(Action::await_change()),
        Err(error) => Err(error).doing(|| format!("read PersistentVolume {name}")),
    }
}

/// Whether the claim that a Released volume was made for is there and says it
/// is bound to it. The controller manager has looked already; what is about to
/// be destroyed is worth a second look.
async fn still_claimed(volume: &PersistentVolume, ctx: &Context) -> Result<bool, Error> {
    let Some(reference) = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref()) else {
        return Ok(false);
    };
    let (Some(namespace), Some(name)) = (&reference.namespace, &reference.name) else {
        return Ok(false);
    };
    let api: Api<PersistentVolumeClaim> = Api::namespaced(ctx.client.clone(), namespace);
    let claim = api.get_opt(name).await.doing(|| format!("read claim {namespace}/{name}"))?;
    Ok(claim.is_some_and(|claim| {
        claim.uid() == reference.uid
            && claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()) == volume.meta().name
    }))
}

/// Why a logical volume is still there, or may be.
pub struct Undeleted {
    /// Of the Event.
    pub reason: Reason,
    /// Its text.
    pub note: String,
    again: Again,
}

enum Again {
    /// Nothing is known yet, so there is nothing to tell.
    Soon,
    Later,
    WhenTheNodeIsBack,
}

/// Has the node remove a logical volume; success also where it is not there.
/// The node looks at its tags, and whether it is in use.
///
/// # Errors
/// When it is not known to be gone.
pub async fn delete_volume(place: &Place, ctx: &Context) -> Result<(), Undeleted> {
    let topology = &place.topology;
    let Some(node) = ctx.nodes.with_topology(topology) else {
        return Err(Undeleted {
            reason: Reason::NodeGone,
            note: format!(
                "the volume is on node {topology}, which has gone. If it comes back, the volume is \
                 removed then; if it never will, remove the finalizer {PV_FINALIZER} from this \
                 PersistentVolume"
            ),
            again: Again::WhenTheNodeIsBack,
        });
    };
    // That it is not there is believed only of the node itself, not of one that
    // has its address by now.
    let known = node.state != State::Connecting;
    let reached = ctx.nodes.reach_up(&node.name).map_err(|unreached| Undeleted {
        reason: Reason::NodeUnreachable,
        note: format!(
            "the volume cannot be removed while the lvprov node service on {} does not answer: {}. \
             Look at its pod: kubectl -n lvprov-system get pods -o wide",
            node.name, unreached.why
        ),
        again: if known { Again::WhenTheNodeIsBack } else { Again::Soon },
    })?;
    let request = DeleteVolumeRequest { volume_id: place.handle(), ..DeleteVolumeRequest::default() };
    let deleted = async {
        let call = call_to(&node.name, request, DELETE_TIMEOUT)?;
        ControllerClient::new(reached.channel).delete_volume(call).await
    };
    let status = match deleted.await {
        Ok(_) => return Ok(()),
        // Gone already, which is all that is wanted.
        Err(status) if status.code() == Code::NotFound => return Ok(()),
        Err(status) => status,
    };
    let said = explain(&status);
    let note = format!(
        "{} on node {} is not removed yet, which is tried again: {said} ({:?})",
        place.handle(),
        node.name,
        status.code()
    );
    let reason = match status.code() {
        Code::FailedPrecondition => Reason::VolumeInUse,
        // Also PERMISSION_DENIED: it has lost our tags, or is in a group that the node does not serve.
        _ => Reason::VolumeDeleteFailed,
    };
    Err(Undeleted { reason, note, again: Again::Later })
}

fn others(volume: &PersistentVolume) -> Vec<String> {
    let keep = |name: &&String| *name != PV_FINALIZER;
    volume.finalizers().iter().filter(keep).cloned().collect()
}

/// Writes the finalizers, provided that nobody has changed the PV meanwhile.
async fn set_finalizers(volume: &PersistentVolume, ctx: &Context, finalizers: Vec<String>) -> Result<Action, Error> {
    let name = volume.name_any();
    if volume.finalizers() == finalizers {
        return Ok(Action::await_change());
    }
    let patch = json!({"metadata": {
        "resourceVersion": volume.resource_version(),
        "finalizers": finalizers,
    }});
    let api: Api<PersistentVolume> = Api::all(ctx.client.clone());
    match api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await {
        Ok(_) => Ok(Action::await_change()),
        Err(error) if is_not_found(&error) || is_conflict(&error) => Ok(Action::requeue(Duration::from_secs(1))),
        Err(error) => Err(error).doing(|| format!("set the finalizers of PersistentVolume {name}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lvm::filesystem::FsType;
    use lvm::names::VgName;
    use serde_json::Value;

    fn pv(policy: &str, options: &str) -> PersistentVolume {
        of(Source::Flexvolume, policy, options)
    }

    fn of(source: Source, policy: &str, options: &str) -> PersistentVolume {
        let claim: PersistentVolumeClaim = serde_json::from_value(json!({
            "metadata": {"name": "data-db-0", "namespace": "shop", "uid": "u1", "resourceVersion": "7"},
        }))
        .unwrap();
        let class: StorageClass = serde_json::from_value(json!({
            "metadata": {"name": "fast"},
            "provisioner": DRIVER,
            "reclaimPolicy": policy,
        }))
        .unwrap();
        let request = Request {
            source,
            volume_group: VgName::parse("vg0").unwrap(),
            fs_type: FsType::Xfs,
            mount_options: options.into(),
            bytes: (1 << 30) - 5,
            access_modes: vec!["ReadWriteOnce".into()],
        };
        let made = Made {
            topology: "worker-1".into(),
            volume_group: "vg0".into(),
            logical_volume: "pvc-u1".into(),
            bytes: 1 << 30,
            context: BTreeMap::from([("claimNamespace".into(), "shop".into()), ("claimUID".into(), "u1".into())]),
        };
        build(&claim, &class, &request, &made)
    }

    #[test]
    fn a_pv_has_all_that_keeps_the_controller_manager_away() {
        let built = serde_json::to_value(pv("Delete", "")).unwrap();
        assert_eq!(
            built,
            json!({
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {
                    "name": "pvc-u1",
                    "annotations": {"pv.kubernetes.io/provisioned-by": "lvm.lvprov.io"},
                    "finalizers": ["external-provisioner.volume.kubernetes.io/finalizer"],
                },
                "spec": {
                    "accessModes": ["ReadWriteOnce"],
                    "capacity": {"storage": "1Gi"},
                    "claimRef": {
                        "apiVersion": "v1",
                        "kind": "PersistentVolumeClaim",
                        "namespace": "shop",
                        "name": "data-db-0",
                        "uid": "u1",
                        "resourceVersion": "7",
                    },
                    "flexVolume": {
                        "driver": "lvprov.io/lvm",
                        "fsType": "xfs",
                        "options": {
                            "type": "data",
                            "volumeGroup": "vg0",
                            "logicalVolume": "pvc-u1",
                            "claimUID": "u1",
                        },
                    },
                    "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [{
                        "key": "topology.lvprov.io/node",
                        "operator": "In",
                        "values": ["worker-1"],
                    }]}]}},
                    "persistentVolumeReclaimPolicy": "Delete",
                    "storageClassName": "fast",
                    "volumeMode": "Filesystem",
                },
            })
        );
    }

    #[test]
    fn a_kept_pv_has_no_finalizer_and_mount_options_travel_in_the_options() {
        let built = serde_json::to_value(pv("Retain", "noatime,discard")).unwrap();
        assert_eq!(built["metadata"].get("finalizers"), None);
        assert_eq!(built["spec"].get("mountOptions"), None);
        assert_eq!(built["spec"]["flexVolume"]["options"]["mountOptions"], "noatime,discard");
    }

    #[test]
    fn a_csi_pv_differs_in_its_source_and_its_mount_options_only() {
        let built = serde_json::to_value(of(Source::Csi, "Delete", "noatime,discard")).unwrap();
        let mut expected = serde_json::to_value(pv("Delete", "")).unwrap();
        let spec = expected["spec"].as_object_mut().unwrap();
        spec.remove("flexVolume");
        spec.insert("mountOptions".into(), json!(["noatime", "discard"]));
        spec.insert(
            "csi".into(),
            json!({
                "driver": "lvm.lvprov.io",
                "volumeHandle": "vg0/pvc-u1",
                "fsType": "xfs",
                "volumeAttributes": {"claimNamespace": "shop", "claimUID": "u1"},
            }),
        );
        assert_eq!(built, expected);
        let plain = serde_json::to_value(of(Source::Csi, "Delete", "")).unwrap();
        assert_eq!(plain["spec"].get("mountOptions"), None);
    }

    #[test]
    fn the_place_is_read_back_and_only_from_our_own() {
        for (source, driver) in [(Source::Flexvolume, "/spec/flexVolume/driver"), (Source::Csi, "/spec/csi/driver")] {
            let built = of(source, "Delete", "");
            let place = place_of(&built).unwrap();
            assert_eq!(place.handle(), "vg0/pvc-u1");
            assert_eq!(place.topology, "worker-1");
            assert_eq!(source_of(&built), source);
            for path in ["/metadata/annotations/pv.kubernetes.io~1provisioned-by", driver] {
                let mut foreign = serde_json::to_value(&built).unwrap();
                *foreign.pointer_mut(path).unwrap() = Value::from("example.com/other");
                let foreign: PersistentVolume = serde_json::from_value(foreign).unwrap();
                assert_eq!(place_of(&foreign), None, "{path}");
            }
        }
    }

    fn in_phase(policy: &str, phase: &str, finalizer: bool, deleting: bool) -> Need {
        let mut volume = serde_json::to_value(pv(policy, "")).unwrap();
        volume["status"] = json!({"phase": phase});
        volume["metadata"]["finalizers"] = match finalizer {
            true => json!(["kubernetes.io/pv-protection", PV_FINALIZER]),
            false => json!(["kubernetes.io/pv-protection"]),
        };
        if deleting {
            volume["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        need(&serde_json::from_value(volume).unwrap())
    }

    #[test]
    fn only_a_released_pv_under_delete_that_we_guard_is_removed() {
        assert_eq!(in_phase("Delete", "Released", true, false), Need::Removal);
        // An admin has deleted the PV before the claim.
        assert_eq!(in_phase("Delete", "Released", true, true), Need::Removal);
        for phase in ["Bound", "Pending", "Available", "Failed", ""] {
            assert_ne!(in_phase("Delete", phase, true, false), Need::Removal, "{phase}");
            assert_ne!(in_phase("Delete", phase, true, true), Need::Removal, "{phase}");
        }
        for policy in ["Retain", "Recycle"] {
            assert_ne!(in_phase(policy, "Released", true, false), Need::Removal);
            assert_ne!(in_phase(policy, "Released", true, true), Need::Removal);
        }
        // Without our finalizer it may have been dealt with already.
        assert_ne!(in_phase("Delete", "Released", false, false), Need::Removal);
        assert_ne!(in_phase("Delete", "Released", false, true), Need::Removal);
    }

    #[test]
    fn the_finalizer_follows_the_reclaim_policy() {
        assert_eq!(in_phase("Delete", "Bound", false, false), Need::Finalizer);
        assert_eq!(in_phase("Delete", "Bound", true, false), Need::Nothing);
        assert_eq!(in_phase("Retain", "Bound", true, false), Need::NoFinalizer);
        assert_eq!(in_phase("Retain", "Released", true, true), Need::NoFinalizer);
        assert_eq!(in_phase("Retain", "Released", false, false), Need::Nothing);
        // The API server takes no new finalizer on what is being deleted.
        assert_eq!(in_phase("Delete", "Bound", false, true), Need::Nothing);
        assert_eq!(in_phase("Delete", "Bound", true, true), Need::Nothing);
        assert_eq!(in_phase("Delete", "Available", true, true), Need::NoFinalizer);
    }
}
