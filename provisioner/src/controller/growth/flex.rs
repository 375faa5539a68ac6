//! Growth where the PV has a flexVolume source: what Kubernetes leaves to us.
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

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::ResourceExt;
use lvm::size::human;
use serde_json::json;
use tracing::info;

use super::{Bound, CHANGED, Growth, Lack, condition, conditions, patch_status, patch_volume, status};
use crate::controller::context::Context;
use crate::controller::error::Error;
use crate::controller::events::Reason;
use crate::controller::names::{GROWTH_ENDED, PRE_RESIZE_CAPACITY, STORAGE};
use crate::controller::nodes::Group;
use crate::controller::quantity::{storage, storage_of};
use crate::controller::queue::Action;

/// What a growth needs from us.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Need {
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
fn need(growth: &Growth, group: Option<&Group>) -> Need {
    let lack = group.and_then(|group| growth.lack(group));
    // A request of one extent more, on each disk, cannot be lowered to need less.
    let least = group.is_some_and(|group| growth.more(group) <= growth.layout.step(group.extent));
    // Whether the disks of a striped or mirrored volume have room only its driver knows.
    let stuck = growth.failed && !growth.layout.is_linear();
    let hopeless = (lack.is_some() || stuck) && (least || growth.ended);
    let withdrawn = growth.allocated.is_some_and(|allocated| growth.requested < allocated) || hopeless;
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
            // It has been tried as it is asked for now.
            None if hopeless || (stuck && growth.allocated == Some(growth.requested)) => Need::End(None),
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

/// Looks after the growth of a claim that is bound to a flexVolume PV.
pub(super) async fn reconcile(claim: &PersistentVolumeClaim, bound: &Bound, ctx: &Context) -> Result<Action, Error> {
    let Bound { growth, place, .. } = bound;
    let node = ctx.nodes.with_topology(&place.topology);
    let group = node.as_ref().and_then(|node| node.group(&place.volume_group));
    match need(growth, group) {
        Need::Nothing => Ok(Action::await_change()),
        Need::Impossible(lack) => {
            let note = format!(
                "growing to {} takes {}. The volume stays as it is, with {has}, and no pod can start with it while \
                 kubelet tries. Delete other volumes, or add a disk to the volume group (vgextend); or lower the \
                 request, to more than {has}: if that does not fit either, the growth is ended",
                human(growth.requested),
                lack.in_words(place, growth.layout),
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
            settle(claim, bound, growth.requested, Some(status::NODE_PENDING), note, ctx).await
        }
        Need::End(lack) => {
            let why = match lack {
                Some(lack) => format!(
                    ", since even {} takes {}. When there is room, raise the request: then it grows",
                    human(growth.requested),
                    lack.in_words(place, growth.layout)
                ),
                None => String::new(),
            };
            let note = format!("the growth has ended; the volume stays as it is, with {}{why}", human(growth.has));
            settle(claim, bound, growth.has, None, note, ctx).await
        }
    }
}

/// Makes `bytes` what has been granted: on the PV first, so that after a crash
/// in between the claim still shows that it has to be done again.
async fn settle(
    claim: &PersistentVolumeClaim,
    Bound { growth, volume, .. }: &Bound,
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
        if patch_volume(volume, patch, ctx).await?.is_none() {
            return Ok(CHANGED);
        }
    }
    let patch = json!({
        "metadata": {"uid": claim.uid(), "resourceVersion": claim.resource_version()},
        "status": {
            "allocatedResources": storage(bytes),
            "allocatedResourceStatuses": {STORAGE: status},
            // While another growth is pending, the one that says so stays.
            "conditions": conditions(claim, if status.is_some() { &[condition::FS_PENDING] } else { &[] }, None),
        },
    });
    if patch_status(claim, patch, ctx).await?.is_none() {
        return Ok(CHANGED);
    }
    info!(claim = name, namespace, bytes, "took back a growth that could not be had");
    ctx.events.tell(claim, Reason::VolumeGrowthWithdrawn, note).await;
    Ok(Action::await_change())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lvm::layout::Layout;

    const GIB: u64 = 1 << 30;

    fn growth(requested: u64, allocated: Option<u64>, status: &str) -> Growth {
        let status = status.into();
        Growth { requested, has: GIB, allocated, status, failed: false, ended: false, layout: Layout::Linear }
    }

    fn free(free: u64) -> Group {
        Group::of("vg0", 100 * GIB, free, 4 << 20)
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

    /// The group has room, and the disks that the copies are on have none.
    #[test]
    fn a_mirror_whose_own_disks_are_full_gets_back_by_the_lowest_request() {
        let layout = Layout::Raid1 { mirrors: 1 };
        let group = || Group { disks: vec![9 * GIB; 2], ..free(18 * GIB) };
        let mut asked = Growth { layout, ..growth(3 * GIB, Some(3 * GIB), status::NODE_IN_PROGRESS) };
        assert_eq!(need(&asked, Some(&group())), Need::Nothing);
        asked.failed = true;
        assert_eq!(need(&asked, Some(&group())), Need::Nothing);
        let given_up = Growth { status: status::NODE_INFEASIBLE.into(), ..asked.clone() };
        assert_eq!(need(&given_up, Some(&group())), Need::End(None));
        // One byte more: granted in place of the larger one, tried, and then ended.
        for status in [status::NODE_PENDING, status::NODE_IN_PROGRESS, status::NODE_INFEASIBLE] {
            let lowest = Growth { layout, failed: true, ..growth(GIB + 1, Some(GIB + 1), status) };
            assert_eq!(need(&lowest, Some(&group())), Need::End(None), "{status}");
            let linear = Growth { layout: Layout::Linear, ..lowest };
            assert_ne!(need(&linear, Some(&group())), Need::End(None), "{status}");
        }
        // The controller manager has been restarted, and kubelet has tried again.
        let again =
            Growth { ended: true, failed: true, layout, ..growth(3 * GIB, Some(3 * GIB), status::NODE_INFEASIBLE) };
        assert_eq!(need(&again, Some(&group())), Need::End(None));
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
}
