//! Growth of claims.
//!
//! Who does it depends on the PV's source. For a flexVolume the controller
//! manager grants every growth on paper and kubelet's driver grows the volume:
//! [`flex`] looks after what can go wrong with that. For csi the controller
//! manager stays away, and all of it is ours up to the file system: [`csi`].

mod csi;
mod flex;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, PersistentVolumeClaimCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Patch, PatchParams};
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt};
use lvm::layout::Layout;
use lvm::size::human;
use serde_json::Value;

use super::context::Context;
use super::error::{Doing, Error, Row, is_conflict, is_not_found};
use super::names::{GROWTH_ENDED, PRE_RESIZE_CAPACITY, STORAGE};
use super::nodes::{Group, News};
use super::objects::Objects;
use super::quantity::storage_of;
use super::queue::Action;
use super::validate::Source;
use super::volume::{Place, layout_of, place_of, source_of};

/// Until an object that somebody has changed is looked at again; mostly the
/// watch brings it sooner.
const CHANGED: Action = Action::requeue(Duration::from_secs(1));

/// Values of `allocatedResourceStatuses`.
mod status {
    pub const CONTROLLER_IN_PROGRESS: &str = "ControllerResizeInProgress";
    pub const CONTROLLER_INFEASIBLE: &str = "ControllerResizeInfeasible";
    pub const NODE_PENDING: &str = "NodeResizePending";
    pub const NODE_IN_PROGRESS: &str = "NodeResizeInProgress";
    pub const NODE_INFEASIBLE: &str = "NodeResizeInfeasible";
}

/// Conditions that tell of a growth. All of them go when it has ended.
mod condition {
    pub const RESIZING: &str = "Resizing";
    pub const FS_PENDING: &str = "FileSystemResizePending";
    pub const CONTROLLER_ERROR: &str = "ControllerResizeError";
    pub const NODE_ERROR: &str = "NodeResizeError";
    pub const ALL: [&str; 4] = [RESIZING, FS_PENDING, CONTROLLER_ERROR, NODE_ERROR];
}

/// The sizes of a bound claim, in bytes, and how far its growth is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Growth {
    /// What the user asks for now.
    pub requested: u64,
    /// What the volume is known to have.
    pub has: u64,
    /// What has been granted on paper.
    pub allocated: Option<u64>,
    /// Of `allocatedResourceStatuses`; empty when nothing is under way.
    pub status: String,
    /// kubelet has tried and failed.
    pub failed: bool,
    /// A growth to this very request was ended before, for want of room.
    pub ended: bool,
    /// How the volume lies on the disks.
    pub layout: Layout,
}

impl Growth {
    /// Reads a claim, and the annotations of its PV; None where the claim has
    /// no sizes to read, or malformed ones.
    pub fn of(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> Option<Self> {
        let state = claim.status.as_ref()?;
        let (requested, has) = sizes(claim)?;
        Some(Self {
            requested,
            has,
            allocated: storage_of(state.allocated_resources.as_ref()).ok()?,
            status: status_of(claim).to_owned(),
            failed: condition_of(claim, condition::NODE_ERROR).is_some(),
            ended: volume.annotations().get(GROWTH_ENDED) == Some(&requested.to_string()),
            layout: layout_of(volume),
        })
    }

    /// How much more the request takes than the volume has, in whole extents
    /// and stripes.
    fn more(&self, group: &Group) -> u64 {
        let whole = |bytes| self.layout.whole(bytes, group.extent).unwrap_or(u64::MAX);
        whole(self.requested).saturating_sub(whole(self.has))
    }

    /// What the group is known to lack for the growth. None: it fits, or, where
    /// the volume is not linear, its own disks decide, which its node knows.
    fn lack(&self, group: &Group) -> Option<Lack> {
        let free = group.largest_growth(self.layout);
        let missing = self.more(group).checked_sub(free).filter(|missing| *missing > 0)?;
        Some(Lack { free, missing })
    }
}

/// Why a growth does not fit, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lack {
    /// What the group has free for it.
    pub free: u64,
    /// How much more the growth takes.
    pub missing: u64,
}

impl Lack {
    /// "more than … has free …", for users.
    fn in_words(self, place: &Place, layout: Layout) -> String {
        let how = match layout {
            Layout::Linear => String::new(),
            Layout::Thin => " in its thin pool".to_owned(),
            other => format!(" for a volume of layout {}", other.kind()),
        };
        format!(
            "more than volume group {} on node {} has free{how} ({}): {} are missing",
            place.volume_group,
            place.topology,
            human(self.free),
            human(self.missing)
        )
    }
}

/// A claim that is bound to a PV of ours, as far as its size goes.
struct Bound {
    growth: Growth,
    volume: Arc<PersistentVolume>,
    place: Place,
}

/// Looks after the growth of a bound claim.
///
/// # Errors
/// When the API server cannot be asked or refuses; it is tried again.
pub async fn reconcile(claim: &PersistentVolumeClaim, ctx: &Context) -> Result<Action, Error> {
    let Some(bound) = bound(claim, ctx) else {
        return Ok(Action::await_change());
    };
    match source_of(&bound.volume) {
        Source::Flexvolume => flex::reconcile(claim, &bound, ctx).await,
        Source::Csi => csi::reconcile(claim, &bound, ctx).await,
    }
}

/// The growth of a claim that is bound to a PV of ours, if there is anything to
/// look after.
fn bound(claim: &PersistentVolumeClaim, ctx: &Context) -> Option<Bound> {
    if claim.status.as_ref()?.phase.as_deref() != Some("Bound") {
        return None;
    }
    let volume = volume_of(claim, ctx)?;
    let growth = Growth::of(claim, &volume)?;
    // The many claims that do not grow need no more.
    if growth.requested <= growth.has
        && growth.status.is_empty()
        && !volume.annotations().contains_key(PRE_RESIZE_CAPACITY)
    {
        return None;
    }
    let place = place_of(&volume)?;
    let bound_to = &volume.spec.as_ref()?.claim_ref.as_ref()?.uid;
    (*bound_to == claim.uid()).then_some(Bound { growth, volume, place })
}

fn volume_of(claim: &PersistentVolumeClaim, ctx: &Context) -> Option<Arc<PersistentVolume>> {
    let name = claim.spec.as_ref()?.volume_name.as_deref()?;
    ctx.volumes.get(&ObjectRef::new(name))
}

/// The growing claims to look at again for what became of a node, or (None) of
/// any node: those that wait for its service, or for room on it.
pub fn concerned_by_node(news: Option<&News>, ctx: &Context) -> Vec<ObjectRef<PersistentVolumeClaim>> {
    let node = match news {
        None => None,
        Some(News::Up(node) | News::Capacity(node)) => match ctx.nodes.view(node) {
            Some(view) => Some(view.topology.clone()),
            None => return Vec::new(),
        },
        Some(News::Changed(_) | News::Down(_) | News::Gone(_)) => return Vec::new(),
    };
    waiting_on(node.as_deref(), ctx)
}

/// As [`concerned_by_node`], for a snapshot that has gone from a node: it may
/// have been in the way of a growth there.
pub fn concerned_by_snapshot_gone(node: Option<&str>, ctx: &Context) -> Vec<ObjectRef<PersistentVolumeClaim>> {
    let waiting = waiting_on(node, ctx);
    for claim in &waiting {
        if let Some(claim) = ctx.claims.get(claim) {
            ctx.failures.end(&claim.uid().unwrap_or_default(), Row::Attempts);
        }
    }
    waiting
}

/// The growing claims that wait for a node, or (None) for any.
fn waiting_on(node: Option<&str>, ctx: &Context) -> Vec<ObjectRef<PersistentVolumeClaim>> {
    let waits = |claim: &PersistentVolumeClaim| {
        matches!(status_of(claim), status::CONTROLLER_IN_PROGRESS | status::CONTROLLER_INFEASIBLE)
    };
    let there = |claim: &PersistentVolumeClaim| {
        let place = || volume_of(claim, ctx).and_then(|volume| place_of(&volume));
        node.is_none_or(|node| place().is_some_and(|place| place.topology == node))
    };
    let waiting = ctx.claims.live(waits);
    waiting.iter().filter(|claim| there(claim)).map(|claim| ObjectRef::from_obj(&**claim)).collect()
}

/// Whether a bound claim grows, or should.
pub fn is_under_way(claim: &PersistentVolumeClaim) -> bool {
    !status_of(claim).is_empty() || sizes(claim).is_some_and(|(requested, has)| requested > has)
}

/// What a claim asks for, and what its volume is known to have.
fn sizes(claim: &PersistentVolumeClaim) -> Option<(u64, u64)> {
    let requests = claim.spec.as_ref()?.resources.as_ref()?.requests.as_ref();
    let has = claim.status.as_ref()?.capacity.as_ref();
    Some((storage_of(requests).ok()??, storage_of(has).ok()??))
}

/// The claims whose growth has ended, or so it seems, and has left something on
/// their PVs: at the start nothing else calls for a look at them.
pub fn to_be_tidied(volumes: &Objects<PersistentVolume>) -> Vec<ObjectRef<PersistentVolumeClaim>> {
    let left = volumes.live(|volume| volume.annotations().contains_key(PRE_RESIZE_CAPACITY));
    let claim = |volume: &Arc<PersistentVolume>| {
        let reference = volume.spec.as_ref()?.claim_ref.as_ref()?;
        Some(ObjectRef::new(reference.name.as_deref()?).within(reference.namespace.as_deref()?))
    };
    left.iter().filter_map(claim).collect()
}

/// How far the claim's growth is; empty when nothing is under way.
fn status_of(claim: &PersistentVolumeClaim) -> &str {
    let statuses = claim.status.as_ref().and_then(|status| status.allocated_resource_statuses.as_ref());
    statuses.and_then(|statuses| statuses.get(STORAGE)).map_or("", String::as_str)
}

/// A condition that holds.
fn condition_of<'a>(claim: &'a PersistentVolumeClaim, type_: &str) -> Option<&'a PersistentVolumeClaimCondition> {
    let all = claim.status.as_ref()?.conditions.as_ref()?;
    all.iter().find(|condition| condition.type_ == type_ && condition.status == "True")
}

/// The claim's conditions, of those that tell of a growth only `kept`, and
/// `more`.
fn conditions(
    claim: &PersistentVolumeClaim,
    kept: &[&str],
    more: Option<PersistentVolumeClaimCondition>,
) -> Vec<PersistentVolumeClaimCondition> {
    let all = claim.status.as_ref().and_then(|status| status.conditions.as_ref());
    let stays = |condition: &&PersistentVolumeClaimCondition| {
        let type_ = condition.type_.as_str();
        kept.contains(&type_) || !condition::ALL.contains(&type_)
    };
    all.into_iter().flatten().filter(stays).cloned().chain(more).collect()
}

/// A condition that holds from now on.
fn condition(type_: &str, message: String) -> PersistentVolumeClaimCondition {
    PersistentVolumeClaimCondition {
        type_: type_.to_owned(),
        status: "True".to_owned(),
        last_transition_time: Some(Time(Timestamp::now())),
        message: Some(message).filter(|message| !message.is_empty()),
        ..PersistentVolumeClaimCondition::default()
    }
}

/// Patches a claim's status. None: the claim has changed, or gone, since it was
/// read, for which the patch has to carry its UID and version.
async fn patch_status(
    claim: &PersistentVolumeClaim,
    patch: Value,
    ctx: &Context,
) -> Result<Option<PersistentVolumeClaim>, Error> {
    let (name, namespace) = (claim.name_any(), claim.namespace().unwrap_or_default());
    let api: Api<PersistentVolumeClaim> = Api::namespaced(ctx.client.clone(), &namespace);
    let patched = api.patch_status(&name, &PatchParams::default(), &Patch::Merge(patch)).await;
    unless_changed(patched).doing(|| format!("set the status of claim {namespace}/{name}"))
}

/// Patches a PV. None: as for [`patch_status`].
async fn patch_volume(
    volume: &PersistentVolume,
    patch: Value,
    ctx: &Context,
) -> Result<Option<PersistentVolume>, Error> {
    let name = volume.name_any();
    let api: Api<PersistentVolume> = Api::all(ctx.client.clone());
    let patched = api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await;
    unless_changed(patched).doing(|| format!("set the capacity of PersistentVolume {name}"))
}

fn unless_changed<T>(patched: Result<T, kube::Error>) -> Result<Option<T>, kube::Error> {
    match patched {
        Ok(object) => Ok(Some(object)),
        Err(error) if is_conflict(&error) || is_not_found(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const GIB: u64 = 1 << 30;

    #[test]
    fn sizes_and_status_are_read_from_the_claim() {
        let claim: PersistentVolumeClaim = serde_json::from_value(json!({
            "metadata": {"name": "c"},
            "spec": {"resources": {"requests": {"storage": "2Gi"}}},
            "status": {
                "capacity": {"storage": "1Gi"},
                "allocatedResources": {"storage": "90Gi"},
                "allocatedResourceStatuses": {"storage": "NodeResizeInProgress"},
                "conditions": [
                    {"type": "NodeResizeError", "status": "True"},
                    {"type": "FileSystemResizePending", "status": "True"},
                    {"type": "Unused", "status": "False"},
                ],
            },
        }))
        .unwrap();
        let mut expected = Growth {
            requested: 2 * GIB,
            has: GIB,
            allocated: Some(90 * GIB),
            status: status::NODE_IN_PROGRESS.into(),
            failed: true,
            ended: false,
            layout: Layout::Linear,
        };
        let mut volume = PersistentVolume::default();
        assert_eq!(Growth::of(&claim, &volume).as_ref(), Some(&expected));
        volume.annotations_mut().insert(GROWTH_ENDED.into(), (3 * GIB).to_string());
        assert_eq!(Growth::of(&claim, &volume).as_ref(), Some(&expected));
        volume.annotations_mut().insert(GROWTH_ENDED.into(), (2 * GIB).to_string());
        expected.ended = true;
        assert_eq!(Growth::of(&claim, &volume).as_ref(), Some(&expected));
        volume.annotations_mut().insert("lvprov.io/layout".into(), "raid1:1".into());
        expected.layout = Layout::Raid1 { mirrors: 1 };
        assert_eq!(Growth::of(&claim, &volume).as_ref(), Some(&expected));
        // So much is free, and not on two disks.
        let mut group =
            Group { disks: vec![9 * GIB, GIB / 2], ..Group::of("vg0", 10 * GIB, 9 * GIB + GIB / 2, 4 << 20) };
        assert_eq!(expected.lack(&group), Some(Lack { free: GIB / 2, missing: GIB / 2 }));
        group.disks[1] = GIB;
        assert_eq!(expected.lack(&group), None);
        let types = |kept: &[&str], more| -> Vec<String> {
            conditions(&claim, kept, more).into_iter().map(|condition| condition.type_).collect()
        };
        assert_eq!(types(&["FileSystemResizePending"], None), ["FileSystemResizePending", "Unused"]);
        assert_eq!(types(&[], None), ["Unused"]);
        assert_eq!(types(&[], Some(condition(condition::RESIZING, String::new()))), ["Unused", "Resizing"]);
    }
}
