//! Growth where the PV has a csi source: checked first, then granted.
//!
//! The claim says that it is under way; the node extends the logical volume;
//! the PV says what it has then; and the claim hands over to kubelet, which has
//! the node service grow the file system. What the group has no room for
//! changes nothing but the claim's status: the volume goes on as it is, pods
//! start with it, and it grows once there is room, or a lower request fits.
//!
//! Every step is safe to repeat, so that whoever dies in between, the next
//! reconciliation goes on. A growth that kubelet is at ends before the next one
//! begins, since kubelet takes its size from the claim's status.

use std::time::Duration;

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::ResourceExt;
use lvm::fault;
use lvm::size::human;
use lvprov_proto::csi::controller_client::ControllerClient;
use lvprov_proto::csi::{CapacityRange, ControllerExpandVolumeRequest};
use serde_json::json;
use tonic::{Code, Status};
use tracing::info;

use super::{Bound, CHANGED, Growth, Lack, condition, condition_of, conditions, patch_status, patch_volume, status};
use crate::controller::context::Context;
use crate::controller::error::{Error, Row};
use crate::controller::events::Reason;
use crate::controller::names::{PRE_RESIZE_CAPACITY, STORAGE, STORAGE_RESIZER};
use crate::controller::nodes::{call_to, explain, sent_by_node};
use crate::controller::quantity::{quantity, storage, storage_of};
use crate::controller::queue::Action;
use crate::controller::snapshot;
use crate::controller::volume::Place;
use crate::names::DRIVER;

/// For one call that extends a logical volume.
const EXPAND_TIMEOUT: Duration = Duration::from_secs(60);
/// Between attempts, where the next may well succeed.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Between attempts, where somebody has to do something first.
const PARKED: Duration = Duration::from_secs(5 * 60);
/// Of a condition's message, in characters.
const LONGEST_MESSAGE: usize = 1000;

/// What a growth needs from us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    /// Nothing, until the claim, its node or the group changes.
    Nothing,
    /// The volume extended.
    Extension,
    /// What the growth has left on the PV taken off.
    Tidying,
}

/// Decides; `lack` is what the group is known to lack.
fn need(growth: &Growth, lack: Option<Lack>) -> Need {
    let asked_before = growth.allocated == Some(growth.requested);
    match growth.status.as_str() {
        "" if growth.requested <= growth.has => Need::Tidying,
        // The node has said so, and nothing has changed.
        status::CONTROLLER_INFEASIBLE if asked_before && lack.is_some() => Need::Nothing,
        "" | status::CONTROLLER_IN_PROGRESS | status::CONTROLLER_INFEASIBLE => Need::Extension,
        // To kubelet the volume was too small, or not there.
        status::NODE_INFEASIBLE => Need::Extension,
        _ => Need::Nothing,
    }
}

/// Looks after the growth of a claim that is bound to a csi PV.
pub(super) async fn reconcile(claim: &PersistentVolumeClaim, bound: &Bound, ctx: &Context) -> Result<Action, Error> {
    let Bound { growth, place, .. } = bound;
    let node = ctx.nodes.with_topology(&place.topology);
    let group = node.as_ref().and_then(|node| node.group(&place.volume_group));
    match need(growth, group.and_then(|group| growth.lack(group))) {
        Need::Nothing => Ok(Action::await_change()),
        Need::Tidying => tidy(bound, ctx).await,
        Need::Extension => match not_yet(claim, growth, ctx) {
            Some(left) => Ok(Action::requeue(left)),
            None => extend(claim, bound, ctx).await,
        },
    }
}

/// For how long the node is not to be asked the same again: it has just
/// refused, or has done it and the watch has not brought that yet.
fn not_yet(claim: &PersistentVolumeClaim, growth: &Growth, ctx: &Context) -> Option<Duration> {
    let ours = [status::CONTROLLER_IN_PROGRESS, status::CONTROLLER_INFEASIBLE];
    if growth.allocated != Some(growth.requested) || !ours.contains(&growth.status.as_str()) {
        return None;
    }
    let uid = claim.uid().unwrap_or_default();
    let rows = [Row::Silence, Row::Attempts].map(|row| ctx.failures.left(&uid, row));
    rows.into_iter().flatten().max().or_else(|| ctx.grown.left(&grown(&uid, growth)))
}

/// One growth among all that there ever are.
fn grown(claim_uid: &str, growth: &Growth) -> String {
    format!("{claim_uid} {}", growth.requested)
}

async fn extend(claim: &PersistentVolumeClaim, bound: &Bound, ctx: &Context) -> Result<Action, Error> {
    let Bound { growth, volume, place } = bound;
    let announced = growth.status == status::CONTROLLER_IN_PROGRESS && growth.allocated == Some(growth.requested);
    let announcement;
    let claim = if announced {
        claim
    } else {
        let patch = json!({
            "metadata": {
                "uid": claim.uid(),
                "resourceVersion": claim.resource_version(),
                "annotations": {STORAGE_RESIZER: DRIVER},
            },
            "status": {
                "allocatedResources": storage(growth.requested),
                "allocatedResourceStatuses": {STORAGE: status::CONTROLLER_IN_PROGRESS},
                "conditions": conditions(claim, &[], Some(condition(condition::RESIZING, String::new()))),
            },
        });
        match patch_status(claim, patch, ctx).await? {
            Some(patched) => announcement = patched,
            None => return Ok(CHANGED),
        }
        &announcement
    };
    fault::point("expand-before");
    let bytes = match ask(growth, place, ctx).await {
        Ok(bytes) if bytes >= growth.requested => bytes,
        Ok(bytes) => {
            let what = format!("was asked to grow {} to {} bytes and says {bytes}", place.handle(), growth.requested);
            return Err(Error::Answer { node: place.topology.clone(), what });
        }
        Err(refused) => return put_off(claim, bound, refused, ctx).await,
    };
    fault::point("expand-after");
    // The PV before the claim's status: after a crash in between the claim
    // still shows that it has to be done again.
    let old = volume.spec.as_ref().and_then(|spec| spec.capacity.as_ref());
    let old = storage_of(old).ok().flatten();
    if old != Some(bytes) {
        let mut patch = json!({"metadata": {"uid": volume.uid()}, "spec": {"capacity": storage(bytes)}});
        // So much is the file system's, should the PV come to another claim
        // before kubelet has grown it.
        if !volume.annotations().contains_key(PRE_RESIZE_CAPACITY) {
            patch["metadata"]["annotations"] = json!({PRE_RESIZE_CAPACITY: quantity(growth.has)});
        }
        if patch_volume(volume, patch, ctx).await?.is_none() {
            return Ok(CHANGED);
        }
    }
    fault::point("expand-pv-after");
    let pending = condition(
        condition::FS_PENDING,
        "the volume has grown; its file system grows where a pod uses it, or when one starts".to_owned(),
    );
    let patch = json!({
        "metadata": {"uid": claim.uid(), "resourceVersion": claim.resource_version()},
        "status": {
            // What kubelet grows to, and then has the claim say: the PV's
            // capacity, or it would find that there is more to grow for ever.
            "allocatedResources": storage(bytes),
            "allocatedResourceStatuses": {STORAGE: status::NODE_PENDING},
            "conditions": conditions(claim, &[], Some(pending)),
        },
    });
    if patch_status(claim, patch, ctx).await?.is_none() {
        return Ok(CHANGED);
    }
    fault::point("expand-status-after");
    let uid = claim.uid().unwrap_or_default();
    ctx.failures.clear(&uid);
    ctx.grown.note(grown(&uid, growth));
    let (name, namespace) = (claim.name_any(), claim.namespace().unwrap_or_default());
    info!(claim = name, namespace, node = place.topology, volume = place.handle(), bytes, "grew the volume");
    let note = format!(
        "{} on node {} has {} now; kubelet grows its file system, within about a minute where a pod uses it, or when \
         one starts",
        place.handle(),
        place.topology,
        human(bytes)
    );
    ctx.events.tell(claim, Reason::VolumeGrown, note).await;
    Ok(Action::await_change())
}

/// Why a volume has not been extended.
#[derive(Debug)]
enum Refused {
    /// The node service does not answer, as far as is known for so long.
    Silence(Duration, String),
    /// Not this time.
    Again(String),
    /// Not this time either, and something is wrong.
    Failed(String),
    /// Not before somebody has made room, or asked for less.
    Infeasible(String),
}

/// Has the node extend the volume. Gives what it has then, which may be more
/// than was asked for now.
async fn ask(growth: &Growth, place: &Place, ctx: &Context) -> Result<u64, Refused> {
    let Some(node) = ctx.nodes.with_topology(&place.topology) else {
        return Err(Refused::Silence(Duration::MAX, "the node has gone, or has no lvprov node service".to_owned()));
    };
    let reached = ctx.nodes.reach(&node.name).map_err(|unreached| Refused::Silence(unreached.since, unreached.why))?;
    let request = ControllerExpandVolumeRequest {
        volume_id: place.handle(),
        capacity_range: Some(CapacityRange {
            required_bytes: i64::try_from(growth.requested).unwrap_or(i64::MAX),
            limit_bytes: 0,
        }),
        ..ControllerExpandVolumeRequest::default()
    };
    let answer = async {
        let call = call_to(&node.name, request, EXPAND_TIMEOUT)?;
        ControllerClient::new(reached.channel).controller_expand_volume(call).await
    };
    match answer.await {
        Ok(answer) => Ok(u64::try_from(answer.into_inner().capacity_bytes).unwrap_or_default()),
        Err(status) => Err(match refused(&status) {
            Refused::Failed(said) if status.code() == Code::FailedPrecondition => {
                Refused::Failed(said + &snapshot::in_the_way(place, ctx))
            }
            refused => refused,
        }),
    }
}

fn refused(status: &Status) -> Refused {
    let said = explain(status);
    match status.code() {
        _ if !sent_by_node(status) => Refused::Silence(Duration::ZERO, said),
        Code::ResourceExhausted | Code::OutOfRange | Code::InvalidArgument | Code::NotFound => {
            Refused::Infeasible(said)
        }
        Code::Unavailable | Code::Aborted | Code::DeadlineExceeded | Code::Cancelled => Refused::Again(said),
        code => Refused::Failed(format!("{said} ({code:?})")),
    }
}

/// Says why it does not grow now, and when it is tried again.
async fn put_off(
    claim: &PersistentVolumeClaim,
    bound: &Bound,
    refused: Refused,
    ctx: &Context,
) -> Result<Action, Error> {
    let Bound { growth, place, .. } = bound;
    let uid = claim.uid().unwrap_or_default();
    let asked = growth.requested.to_string();
    let row = match &refused {
        Refused::Silence(..) => ctx.failures.note(&uid, Row::Silence, &place.topology, LONGEST_WAIT),
        Refused::Infeasible(_) => ctx.failures.note(&uid, Row::Attempts, &asked, PARKED),
        Refused::Again(_) | Refused::Failed(_) => ctx.failures.note(&uid, Row::Attempts, &asked, LONGEST_WAIT),
    };
    let (to, has) = (human(growth.requested), human(growth.has));
    match refused {
        // A node service that restarts is nothing to tell of.
        Refused::Silence(since, _) if since.max(row.since) < ctx.patience => {}
        Refused::Silence(_, why) => {
            let note = format!(
                "growing to {to} waits for the lvprov node service on {}, which does not answer: {why}. Look at its \
                 pod: kubectl -n lvprov-system get pods -o wide",
                place.topology
            );
            ctx.events.tell(claim, Reason::VolumeGrowthFailed, note).await;
        }
        Refused::Again(said) => {
            let note = format!("node {} could not grow it to {to}, which is tried again: {said}", place.topology);
            ctx.events.tell(claim, Reason::VolumeGrowthFailed, note).await;
        }
        Refused::Failed(said) => {
            if !say_on_claim(claim, growth, status::CONTROLLER_IN_PROGRESS, &said, ctx).await? {
                return Ok(CHANGED);
            }
            let note = format!("node {} could not grow it to {to}, which is tried again: {said}", place.topology);
            ctx.events.tell(claim, Reason::VolumeGrowthFailed, note).await;
        }
        Refused::Infeasible(said) => {
            if !say_on_claim(claim, growth, status::CONTROLLER_INFEASIBLE, &said, ctx).await? {
                return Ok(CHANGED);
            }
            let note = format!(
                "node {} cannot grow it to {to}: {said}. The volume goes on with {has}, and pods start with it. It \
                 grows by itself once there is room; or lower the request, to more than {has}",
                place.topology
            );
            ctx.events.tell(claim, Reason::VolumeGrowthImpossible, note).await;
        }
    }
    Ok(Action::requeue(row.wait))
}

/// Writes an error on the claim, if it is not there. Whether the claim was
/// still the same.
async fn say_on_claim(
    claim: &PersistentVolumeClaim,
    growth: &Growth,
    status: &str,
    said: &str,
    ctx: &Context,
) -> Result<bool, Error> {
    let message: String = said.chars().take(LONGEST_MESSAGE).collect();
    let there = condition_of(claim, condition::CONTROLLER_ERROR).and_then(|there| there.message.as_ref());
    if super::status_of(claim) == status && there == Some(&message) {
        return Ok(true);
    }
    let kept: &[&str] = if status == status::CONTROLLER_IN_PROGRESS { &[condition::RESIZING] } else { &[] };
    let patch = json!({
        "metadata": {"uid": claim.uid(), "resourceVersion": claim.resource_version()},
        "status": {
            "allocatedResources": storage(growth.requested),
            "allocatedResourceStatuses": {STORAGE: status},
            "conditions": conditions(claim, kept, Some(condition(condition::CONTROLLER_ERROR, message))),
        },
    });
    Ok(patch_status(claim, patch, ctx).await?.is_some())
}

/// The file system has grown as well: the PV need not remember its old size.
async fn tidy(bound: &Bound, ctx: &Context) -> Result<Action, Error> {
    let volume = &bound.volume;
    let patch = json!({"metadata": {"uid": volume.uid(), "annotations": {PRE_RESIZE_CAPACITY: null}}});
    match patch_volume(volume, patch, ctx).await? {
        Some(_) => Ok(Action::await_change()),
        None => Ok(CHANGED),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lvm::layout::Layout;

    const GIB: u64 = 1 << 30;
    const LACK: Lack = Lack { free: 0, missing: GIB };

    fn growth(requested: u64, allocated: Option<u64>, status: &str) -> Growth {
        let status = status.into();
        Growth { requested, has: GIB, allocated, status, failed: false, ended: false, layout: Layout::Linear }
    }

    #[test]
    fn a_raised_request_is_ours_to_serve_and_so_is_one_that_was_begun() {
        for (allocated, status) in [
            (None, ""),
            (Some(GIB), ""),
            (Some(3 * GIB), status::CONTROLLER_IN_PROGRESS),
            // Raised, or lowered, since.
            (Some(2 * GIB), status::CONTROLLER_IN_PROGRESS),
            (Some(9 * GIB), status::CONTROLLER_IN_PROGRESS),
            (Some(3 * GIB), status::NODE_INFEASIBLE),
        ] {
            assert_eq!(need(&growth(3 * GIB, allocated, status), None), Need::Extension, "{allocated:?} {status}");
            // Whether there is room is for the node to say.
            assert_eq!(need(&growth(3 * GIB, allocated, status), Some(LACK)), Need::Extension, "{status}");
        }
    }

    #[test]
    fn what_kubelet_is_at_is_not_touched() {
        for status in [status::NODE_PENDING, status::NODE_IN_PROGRESS, "SomethingNew"] {
            for requested in [2 * GIB, 3 * GIB, 4 * GIB] {
                assert_eq!(need(&growth(requested, Some(3 * GIB), status), None), Need::Nothing, "{status}");
            }
        }
    }

    #[test]
    fn what_has_no_room_waits_for_room_or_another_request() {
        let refused = |requested| growth(requested, Some(9 * GIB), status::CONTROLLER_INFEASIBLE);
        assert_eq!(need(&refused(9 * GIB), Some(LACK)), Need::Nothing);
        assert_eq!(need(&refused(9 * GIB), None), Need::Extension);
        assert_eq!(need(&refused(2 * GIB), Some(LACK)), Need::Extension);
        assert_eq!(need(&refused(10 * GIB), Some(LACK)), Need::Extension);
    }

    #[test]
    fn a_growth_that_is_through_leaves_nothing() {
        assert_eq!(need(&growth(GIB, Some(GIB), ""), None), Need::Tidying);
    }

    #[test]
    fn what_a_node_says_decides_whether_it_is_asked_again() {
        for code in [Code::ResourceExhausted, Code::OutOfRange, Code::InvalidArgument, Code::NotFound] {
            assert!(matches!(refused(&Status::new(code, "x")), Refused::Infeasible(_)), "{code:?}");
        }
        for code in [Code::Unavailable, Code::Aborted, Code::DeadlineExceeded] {
            assert!(matches!(refused(&Status::new(code, "x")), Refused::Again(_)), "{code:?}");
        }
        for code in [Code::Internal, Code::FailedPrecondition, Code::Unimplemented, Code::Unknown] {
            assert!(matches!(refused(&Status::new(code, "x")), Refused::Failed(_)), "{code:?}");
        }
        let broken = Status::from_error(Box::new(std::io::Error::from(std::io::ErrorKind::ConnectionReset)));
        assert!(matches!(refused(&broken), Refused::Silence(..)));
    }
}
