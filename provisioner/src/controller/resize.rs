//! Growth of claims: what Kubernetes leaves to us.
//!
//! For a flexVolume PV the controller manager grants every growth on paper
//! (PV capacity, the claim's `allocatedResources`), and kubelet then calls the
//! driver, which grows the logical volume. Where the volume group has no room
//! that never succeeds, and the controller manager does not take it back when
//! the user lowers the request again (it listens to growing requests only).
//! So this says early that a growth cannot be had, and takes it back.
//!
//! The API server refuses a request that is not above what the claim has. So
//! even the lowest one may take an extent that is not there: then the growth
//! is ended, and the claim goes on with a request above its capacity.

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, PersistentVolumeClaimCondition};
use kube::api::{Patch, PatchParams};
use kube::runtime::controller::Action;
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt};
use lvm::size::{human, round_up};
use serde_json::json;
use std::time::Duration;
use tracing::info;

use super::context::Context;
use super::error::{Doing, Error, is_conflict, is_not_found};
use super::events::Reason;
use super::names::{GROWTH_ENDED, PRE_RESIZE_CAPACITY, STORAGE};
use super::nodes::Group;
use super::quantity::{quantity, storage, storage_of};
use super::volume::{Place, place_of};

/// Values of `allocatedResourceStatuses`.
mod status {
    pub const NODE_PENDING: &str = "NodeResizePending";
    pub const NODE_IN_PROGRESS: &str = "NodeResizeInProgress";
    pub const NODE_INFEASIBLE: &str = "NodeResizeInfeasible";
    pub const CONTROLLER_IN_PROGRESS: &str = "ControllerResizeInProgress";
}

/// Conditions that tell of a growth. All of them go when it has ended.
const CONDITIONS: [&str; 4] = [NODE_ERROR, "Resizing", FS_PENDING, "ControllerResizeError"];
const NODE_ERROR: &str = "NodeResizeError";
const FS_PENDING: &str = "FileSystemResizePending";

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
}

impl Growth {
    /// Reads a claim, and the annotations of its PV; None where the claim has
    /// no sizes to read, or malformed ones.
    pub fn of(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> Option<Self> {
        let requests = claim.spec.as_ref()?.resources.as_ref()?.requests.as_ref();
        let state = claim.status.as_ref()?;
        let statuses = state.allocated_resource_statuses.as_ref();
        let requested = storage_of(requests).ok()??;
        Some(Self {
            requested,
            has: storage_of(state.capacity.as_ref()).ok()??,
            allocated: storage_of(state.allocated_resources.as_ref()).ok()?,
            status: statuses.and_then(|statuses| statuses.get(STORAGE)).cloned().unwrap_or_default(),
            failed: state
                .conditions
                .iter()
                .flatten()
                .any(|condition| condition.type_ == NODE_ERROR && condition.status == "True"),
            ended: volume.annotations().get(GROWTH_ENDED) == Some(&requested.to_string()),
        })
    }

    /// How much more the request takes than the volume has, in whole extents.
    fn more(&self, group: &Group) -> u64 {
        let extent = group.extent.max(1);
        let wanted = round_up(self.requested, extent).unwrap_or(u64::MAX);
        wanted.saturating_sub(round_up(self.has, extent).unwrap_or(u64::MAX))
    }

    /// What the group lacks for the growth. None: it fits.
    fn lack(&self, group: &Group) -> Option<Lack> {
        let missing = self.more(group).checked_sub(group.free).filter(|missing| *missing > 0)?;
        Some(Lack { free: group.free, missing })
    }
}

/// Why a growth does not fit, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lack {
    /// What the group has free.
    pub free: u64,
    /// How much more the growth takes.
    pub missing: u64,
}

/// What a growth needs from us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Need {
    /// Nothing, until the claim changes.
    Nothing,
    /// A word to the user: it does not fit.
    Impossible(Lack),
    /// The lower request granted in place of the larger one.
    Lower,
    /// The growth ended: the volume stays as it is, because that is enough, or
    /// because the group lacks something.
    End(Option<Lack>),
}

/// Decides; `group` is the volume's, where its node is up.
pub fn need(growth: &Growth, group: Option<&Group>) -> Need {
    let lack = group.and_then(|group| growth.lack(group));
    // A request of one extent more cannot be lowered to need less.
    let least = group.is_some_and(|group| growth.more(group) <= group.extent.max(1));
    let withdrawn = growth.allocated.is_some_and(|allocated| growth.requested < allocated)
        || (lack.is_some() && (least || growth.ended));
    let idle = match growth.status.as_str() {
        // kubelet has not begun. Should it begin now, its own write and ours
        // carry the claim's version, so that one of the two fails.
        status::NODE_PENDING => withdrawn,
        // kubelet has given up. With nothing withdrawn this is what is left
        // when it gave up the larger size just after we had lowered it.
        status::NODE_INFEASIBLE => {
            growth.ended || growth.allocated.is_some_and(|allocated| growth.requested <= allocated)
        }
        // kubelet fails and tries again. Should it succeed at this moment, the
        // volume is larger than the claim says: nothing is lost.
        status::NODE_IN_PROGRESS => withdrawn && growth.failed,
        _ => false,
    };
    if idle {
        return match lack {
            _ if growth.requested <= growth.has => Need::End(None),
            Some(lack) => Need::End(Some(lack)),
            None => Need::Lower,
        };
    }
    // Only before kubelet has begun: later the volume may have grown already,
    // and what is free has shrunk by it.
    let early = match growth.status.as_str() {
        // Where it was ended, that has been said.
        "" => !growth.ended,
        status::CONTROLLER_IN_PROGRESS | status::NODE_PENDING => true,
        _ => false,
    };
    match lack {
        Some(lack) if early || growth.failed => Need::Impossible(lack),
        _ => Need::Nothing,
    }
}

/// Looks after the growth of a bound claim.
///
/// # Errors
/// When the API server cannot be asked or refuses; it is tried again.
pub async fn reconcile(claim: &PersistentVolumeClaim, ctx: &Context) -> Result<Action, Error> {
    let Some((growth, volume, place)) = ours(claim, ctx) else {
        return Ok(Action::await_change());
    };
    let node = ctx.nodes.with_topology(&place.topology);
    let group = node.as_ref().and_then(|node| node.group(&place.volume_group));
    match need(&growth, group) {
        Need::Nothing => Ok(Action::await_change()),
        Need::Impossible(lack) => {
            let note = format!(
                "growing to {} takes {}. The volume stays as it is, with {has}, and no pod can start with it while \
                 kubelet tries. Delete other volumes, or add a disk to the volume group (vgextend); or lower the \
                 request, to more than {has}: if that does not fit either, the growth is ended",
                human(growth.requested),
                too_much(&place, lack),
                has = human(growth.has),
            );
            ctx.events.tell(claim, Reason::VolumeGrowthImpossible, note).await;
            Ok(Action::await_change())
        }
        Need::Lower => {
            let note = match growth.allocated {
                Some(allocated) if allocated > growth.requested => {
                    format!(
                        "the growth to {} was taken back; it is now to {}",
                        human(allocated),
                        human(growth.requested)
                    )
                }
                _ => format!("the growth to {} is tried again", human(growth.requested)),
            };
            settle(claim, &volume, &growth, growth.requested, Some(status::NODE_PENDING), note, ctx).await
        }
        Need::End(lack) => {
            let why = match lack {
                Some(lack) => format!(
                    ", since even {} takes {}. When there is room, raise the request: then it grows",
                    human(growth.requested),
                    too_much(&place, lack)
                ),
                None => String::new(),
            };
            let note = format!("the growth has ended; the volume stays as it is, with {}{why}", human(growth.has));
            settle(claim, &volume, &growth, growth.has, None, note, ctx).await
        }
    }
}

fn too_much(place: &Place, lack: Lack) -> String {
    format!(
        "more than volume group {} on node {} has free ({}): {} are missing",
        place.volume_group,
        place.topology,
        human(lack.free),
        human(lack.missing)
    )
}

/// The growth of a claim that is bound to a PV of ours.
fn ours(claim: &PersistentVolumeClaim, ctx: &Context) -> Option<(Growth, std::sync::Arc<PersistentVolume>, Place)> {
    if claim.status.as_ref()?.phase.as_deref() != Some("Bound") {
        return None;
    }
    let name = claim.spec.as_ref()?.volume_name.as_deref()?;
    let volume = ctx.volumes.get(&ObjectRef::new(name))?;
    let growth = Growth::of(claim, &volume)?;
    // The many claims that do not grow need no more.
    if growth.requested <= growth.has && growth.status.is_empty() {
        return None;
    }
    let place = place_of(&volume)?;
    let bound_to = volume.spec.as_ref()?.claim_ref.as_ref()?.uid.clone();
    (bound_to == claim.uid()).then_some((growth, volume, place))
}

/// Makes `bytes` what has been granted: on the PV first, so that after a crash
/// in between the claim still shows that it has to be done again.
async fn settle(
    claim: &PersistentVolumeClaim,
    volume: &PersistentVolume,
    growth: &Growth,
    bytes: u64,
    status: Option<&str>,
    note: String,
    ctx: &Context,
) -> Result<Action, Error> {
    let (name, namespace) = (claim.name_any(), claim.namespace().unwrap_or_default());
    let granted = volume.spec.as_ref().and_then(|spec| spec.capacity.as_ref());
    // Where the growth is ended, what the watch has brought is not enough to
    // leave the PV alone: the controller manager may just have raised it.
    if status.is_none() || storage_of(granted).ok().flatten() != Some(bytes) {
        let mut patch = json!({
            "metadata": {"uid": volume.uid(), "resourceVersion": volume.resource_version()},
            "spec": {"capacity": storage(bytes)},
        });
        if status.is_none() {
            patch["metadata"]["annotations"] =
                json!({PRE_RESIZE_CAPACITY: null, GROWTH_ENDED: growth.requested.to_string()});
        }
        let api: Api<PersistentVolume> = Api::all(ctx.client.clone());
        let patched = api.patch(&volume.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await;
        if let Err(error) = patched {
            return outdated(error, || format!("set the capacity of PersistentVolume {}", volume.name_any()));
        }
    }
    let patch = json!({
        "metadata": {"uid": claim.uid(), "resourceVersion": claim.resource_version()},
        "status": {
            "allocatedResources": {STORAGE: quantity(bytes)},
            "allocatedResourceStatuses": {STORAGE: status},
            "conditions": conditions(claim, status.is_some()),
        },
    });
    let api: Api<PersistentVolumeClaim> = Api::namespaced(ctx.client.clone(), &namespace);
    if let Err(error) = api.patch_status(&name, &PatchParams::default(), &Patch::Merge(patch)).await {
        return outdated(error, || format!("set the status of claim {namespace}/{name}"));
    }
    info!(claim = name, namespace, bytes, "took back a growth that could not be had");
    ctx.events.tell(claim, Reason::VolumeGrowthWithdrawn, note).await;
    Ok(Action::await_change())
}

/// The claim's conditions without those of the growth that has ended; while
/// another is `pending`, the one that says so stays.
fn conditions(claim: &PersistentVolumeClaim, pending: bool) -> Vec<PersistentVolumeClaimCondition> {
    let all = claim.status.as_ref().and_then(|status| status.conditions.as_ref());
    all.into_iter()
        .flatten()
        .filter(|condition| match condition.type_.as_str() {
            FS_PENDING => pending,
            other => !CONDITIONS.contains(&other),
        })
        .cloned()
        .collect()
}

/// Somebody has changed the object: it is looked at again as it is now.
fn outdated(error: kube::Error, what: impl FnOnce() -> String) -> Result<Action, Error> {
    if is_conflict(&error) || is_not_found(&error) {
        return Ok(Action::requeue(Duration::from_secs(1)));
    }
    Err(error).doing(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn growth(requested: u64, allocated: Option<u64>, status: &str) -> Growth {
        Growth { requested, has: GIB, allocated, status: status.into(), failed: false, ended: false }
    }

    fn free(free: u64) -> Group {
        Group { name: "vg0".into(), size: 100 * GIB, free, extent: 4 << 20 }
    }

    #[test]
    fn a_growth_that_fits_is_left_to_kubernetes() {
        for status in ["", status::CONTROLLER_IN_PROGRESS, status::NODE_PENDING, status::NODE_IN_PROGRESS] {
            let growth = growth(3 * GIB, Some(3 * GIB), status);
            assert_eq!(need(&growth, Some(&free(2 * GIB))), Need::Nothing, "{status}");
            assert_eq!(need(&growth, None), Need::Nothing, "{status}");
        }
    }

    #[test]
    fn a_growth_that_does_not_fit_is_told_early() {
        for status in ["", status::CONTROLLER_IN_PROGRESS, status::NODE_PENDING] {
            let told = need(&growth(3 * GIB, None, status), Some(&free(GIB)));
            assert_eq!(told, Need::Impossible(Lack { free: GIB, missing: GIB }), "{status}");
        }
        let told = need(&growth(2 * GIB + 1, None, ""), Some(&free(GIB)));
        assert_eq!(told, Need::Impossible(Lack { free: GIB, missing: 4 << 20 }));
    }

    #[test]
    fn what_kubelet_is_growing_may_be_grown_already() {
        let mut growing = growth(3 * GIB, Some(3 * GIB), status::NODE_IN_PROGRESS);
        assert_eq!(need(&growing, Some(&free(GIB))), Need::Nothing);
        growing.failed = true;
        assert!(matches!(need(&growing, Some(&free(GIB))), Need::Impossible(_)));
    }

    #[test]
    fn a_withdrawn_growth_is_taken_back_once_kubelet_is_not_at_it() {
        let lowered = |status| growth(2 * GIB, Some(90 * GIB), status);
        assert_eq!(need(&lowered(status::NODE_PENDING), None), Need::Lower);
        assert_eq!(need(&lowered(status::NODE_INFEASIBLE), None), Need::Lower);
        let mut trying = lowered(status::NODE_IN_PROGRESS);
        assert_eq!(need(&trying, None), Need::Nothing);
        trying.failed = true;
        assert_eq!(need(&trying, None), Need::Lower);
        // The controller manager is in the middle of its own writes.
        assert_eq!(need(&lowered(status::CONTROLLER_IN_PROGRESS), None), Need::Nothing);
        assert_eq!(need(&lowered(""), None), Need::Nothing);
    }

    #[test]
    fn giving_up_the_lowered_size_too_late_is_undone() {
        let growth = growth(2 * GIB, Some(2 * GIB), status::NODE_INFEASIBLE);
        assert_eq!(need(&growth, None), Need::Lower);
    }

    #[test]
    fn a_request_that_grows_again_is_the_controller_managers() {
        let growth = growth(95 * GIB, Some(90 * GIB), status::NODE_INFEASIBLE);
        assert_eq!(need(&growth, None), Need::Nothing);
    }

    #[test]
    fn back_to_what_the_volume_has_ends_the_growth() {
        assert_eq!(need(&growth(GIB, Some(90 * GIB), status::NODE_INFEASIBLE), None), Need::End(None));
    }

    const NONE_FREE: Lack = Lack { free: 0, missing: 4 << 20 };

    #[test]
    fn on_a_full_group_the_lowest_request_ends_the_growth() {
        // The API server takes nothing lower than one byte more.
        let lowest = |allocated, status| growth(GIB + 1, Some(allocated), status);
        for status in [status::NODE_PENDING, status::NODE_INFEASIBLE] {
            assert_eq!(need(&lowest(90 * GIB, status), Some(&free(0))), Need::End(Some(NONE_FREE)), "{status}");
            // It was granted in the meantime, or from the start: the user cannot lower it.
            assert_eq!(need(&lowest(GIB + 1, status), Some(&free(0))), Need::End(Some(NONE_FREE)), "{status}");
            assert_eq!(need(&lowest(90 * GIB, status), Some(&free(4 << 20))), Need::Lower, "{status}");
        }
        let mut trying = lowest(90 * GIB, status::NODE_IN_PROGRESS);
        assert_eq!(need(&trying, Some(&free(0))), Need::Nothing);
        trying.failed = true;
        assert_eq!(need(&trying, Some(&free(0))), Need::End(Some(NONE_FREE)));
        // What is free is not known: kubelet finds out.
        assert_eq!(need(&trying, None), Need::Lower);
    }

    #[test]
    fn lowered_but_still_too_much_ends_the_growth_and_not_lowered_does_not() {
        let lowered = growth(3 * GIB, Some(90 * GIB), status::NODE_PENDING);
        let lack = Lack { free: GIB, missing: GIB };
        assert_eq!(need(&lowered, Some(&free(GIB))), Need::End(Some(lack)));
        let asked = growth(90 * GIB, Some(90 * GIB), status::NODE_PENDING);
        assert!(matches!(need(&asked, Some(&free(GIB))), Need::Impossible(_)));
    }

    #[test]
    fn an_ended_growth_is_silent_and_ended_again_when_begun_again() {
        let ended = |allocated, status| Growth { ended: true, ..growth(3 * GIB, Some(allocated), status) };
        let lack = Lack { free: GIB, missing: GIB };
        assert_eq!(need(&ended(GIB, ""), Some(&free(GIB))), Need::Nothing);
        // The controller manager has been restarted.
        assert_eq!(need(&ended(3 * GIB, status::NODE_PENDING), Some(&free(GIB))), Need::End(Some(lack)));
        // kubelet gave up the larger size just after it was ended.
        assert_eq!(need(&ended(GIB, status::NODE_INFEASIBLE), Some(&free(GIB))), Need::End(Some(lack)));
        // There is room by now.
        assert_eq!(need(&ended(3 * GIB, status::NODE_PENDING), Some(&free(2 * GIB))), Need::Nothing);
    }

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
        let mut expected = growth(2 * GIB, Some(90 * GIB), status::NODE_IN_PROGRESS);
        expected.failed = true;
        let mut volume = PersistentVolume::default();
        assert_eq!(Growth::of(&claim, &volume).as_ref(), Some(&expected));
        volume.annotations_mut().insert(GROWTH_ENDED.into(), (3 * GIB).to_string());
        assert_eq!(Growth::of(&claim, &volume).as_ref(), Some(&expected));
        volume.annotations_mut().insert(GROWTH_ENDED.into(), (2 * GIB).to_string());
        expected.ended = true;
        assert_eq!(Growth::of(&claim, &volume), Some(expected));
        let kept = |pending| -> Vec<String> {
            conditions(&claim, pending).into_iter().map(|condition| condition.type_).collect()
        };
        assert_eq!(kept(true), ["FileSystemResizePending", "Unused"]);
        assert_eq!(kept(false), ["Unused"]);
    }
}
