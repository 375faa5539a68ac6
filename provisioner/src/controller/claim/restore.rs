//! Claims whose volumes are to hold data: made where the data are.
//!
//! No scheduler is waited for, since there is no choice: the volume is made on
//! the node of the snapshot, or of the claim that is cloned, and its
//! PersistentVolume then leads the pod there. A node that the scheduler has
//! chosen meanwhile does not matter, for it looks at the PersistentVolume before
//! it binds the pod, and chooses anew. So the claim is never handed back, either:
//! what is in the way is told, and waited for.

use std::time::Duration;

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::api::storage::v1::StorageClass;
use kube::ResourceExt;
use lvm::size::human;
use tonic::{Code, Status};

use super::data::{Found, Unfound, find};
use super::{PARKED, Target, already, group_of, make};
use crate::controller::context::Context;
use crate::controller::error::{Error, Row};
use crate::controller::events::Reason;
use crate::controller::nodes::{State, Unreached, explain, sent_by_node};
use crate::controller::queue::Action;
use crate::controller::snapshot;
use crate::controller::validate::{Data, Request};

/// Between attempts, where the next may well succeed.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// Brings a claim that asks for data to its volume.
pub(super) async fn provision(
    claim: &PersistentVolumeClaim,
    class: &StorageClass,
    request: &Request,
    data: &Data,
    ctx: &Context,
) -> Result<Action, Error> {
    if let Some(action) = already(claim, ctx).await? {
        return Ok(action);
    }
    let uid = claim.uid().unwrap_or_default();
    // Nodes are in the news often, and the same is not asked again that soon.
    if let Some(left) = [Row::Attempts, Row::Silence].iter().filter_map(|row| ctx.failures.left(&uid, *row)).max() {
        return Ok(Action::requeue(left));
    }
    let found = match find(claim, request, data, ctx).await? {
        Ok(found) => found,
        Err(Unfound::Refused(note)) => return wait(claim, Reason::ClaimRefused, note, PARKED, ctx).await,
        Err(Unfound::NotYet(note)) => {
            let note = format!("{note}. The claim waits");
            return wait(claim, Reason::DataNotReady, note, LONGEST_WAIT, ctx).await;
        }
    };
    let topology = &found.place.topology;
    let Some(view) = ctx.nodes.with_topology(topology) else {
        let note = format!(
            "{data} is on node {topology}, which has gone, or has no lvprov node service. The claim waits for it: a volume \
             with these data can be nowhere else"
        );
        hold(claim, topology, ctx);
        return wait(claim, Reason::NodeGone, note, PARKED, ctx).await;
    };
    let node = view.name.as_str();
    if !request.topologies.allow(&view.labels) {
        let note = format!(
            "{data} is on node {node}, which is not among the allowedTopologies of StorageClass {} ({}), and a volume with \
             these data can be nowhere else. Use another StorageClass",
            class.name_any(),
            request.topologies
        );
        hold(claim, node, ctx);
        return wait(claim, Reason::NodeNotAllowed, note, PARKED, ctx).await;
    }
    let reached = match ctx.nodes.reach(node) {
        Ok(reached) => reached,
        Err(unreached) => return silent(claim, node, data, unreached, ctx).await,
    };
    if !matches!(view.state, State::Up(_)) {
        // Its report comes first.
        return Ok(Action::requeue(Duration::from_secs(1)));
    }
    // As large as the node will make it.
    let extent = view.group(&found.place.volume_group).map_or(1, |group| group.extent);
    let whole = request.layout.whole(request.bytes, extent).unwrap_or(u64::MAX);
    if whole < found.bytes {
        let note = format!(
            "{data} needs {}, and the claim asks for {}. Delete the claim and make it again with at least as much",
            human(found.bytes),
            human(request.bytes)
        );
        return wait(claim, Reason::ClaimRefused, note, PARKED, ctx).await;
    }
    let Some(volume_group) = group_of(request, Some(&view)) else {
        let note = format!(
            "{data} is on node {node}, which lacks {}, and a volume with these data can be nowhere else. Use another \
             StorageClass, or name a group of that node so",
            request.volume_group
        );
        hold(claim, node, ctx);
        return wait(claim, Reason::NoVolumeGroup, note, PARKED, ctx).await;
    };
    let target = Target { node, reached: &reached, volume_group, source: Some(&found.source) };
    match make(claim, class, request, target, ctx).await? {
        Ok(action) => {
            ctx.held.end(&uid);
            Ok(action)
        }
        Err(status) => failed(claim, node, data, &found, &status, ctx).await,
    }
}

/// Tells, and tries again after a while that doubles up to `longest`.
async fn wait(
    claim: &PersistentVolumeClaim,
    reason: Reason,
    note: String,
    longest: Duration,
    ctx: &Context,
) -> Result<Action, Error> {
    let wait = ctx.failures.note(&claim.uid().unwrap_or_default(), Row::Attempts, "", longest).wait;
    ctx.events.tell(claim, reason, note).await;
    Ok(Action::requeue(wait))
}

/// News of this node is worth another look at the claim.
fn hold(claim: &PersistentVolumeClaim, node: &str, ctx: &Context) {
    ctx.held.note(claim.uid().unwrap_or_default(), node.to_owned());
}

/// Waits for a node to answer, and tells when that takes long.
async fn silent(
    claim: &PersistentVolumeClaim,
    node: &str,
    data: &Data,
    unreached: Unreached,
    ctx: &Context,
) -> Result<Action, Error> {
    let row = ctx.failures.note(&claim.uid().unwrap_or_default(), Row::Silence, node, LONGEST_WAIT);
    hold(claim, node, ctx);
    if unreached.since.max(row.since) >= ctx.patience {
        let note = format!(
            "{data} is on node {node}, whose lvprov node service does not answer: {}. The claim waits for it. Look at the \
             service's pod: kubectl -n lvprov-system get pods -o wide",
            unreached.why
        );
        ctx.events.tell(claim, Reason::NodeUnreachable, note).await;
    }
    Ok(Action::requeue(row.wait))
}

/// What a node's refusal means to a claim that can have no other.
async fn failed(
    claim: &PersistentVolumeClaim,
    node: &str,
    data: &Data,
    found: &Found,
    status: &Status,
    ctx: &Context,
) -> Result<Action, Error> {
    let uid = claim.uid().unwrap_or_default();
    let said = explain(status);
    if !sent_by_node(status) {
        let unreached = Unreached { since: Duration::ZERO, why: said };
        return silent(claim, node, data, unreached, ctx).await;
    }
    ctx.failures.end(&uid, Row::Silence);
    let code = status.code();
    // It may have become unusable: then the snapshot itself is to say so.
    if let Some(content) = &found.content
        && matches!(code, Code::NotFound | Code::FailedPrecondition | Code::DataLoss | Code::Internal)
        && let Some(why) = snapshot::check(content, ctx).await?
    {
        let note = format!("{data} cannot be used any more: {why}");
        return wait(claim, Reason::DataNotReady, note, PARKED, ctx).await;
    }
    match code {
        Code::ResourceExhausted => {
            let note = format!(
                "{data} is on node {node}, which cannot hold the volume: {said}. Make room there, or ask for less; it is \
                 looked at again when that changes"
            );
            hold(claim, node, ctx);
            wait(claim, Reason::NotEnoughSpace, note, PARKED, ctx).await
        }
        Code::NotFound => {
            let note = format!("node {node} does not have the data of {data}: {said}");
            wait(claim, Reason::DataNotReady, note, PARKED, ctx).await
        }
        Code::OutOfRange | Code::InvalidArgument => {
            let note = format!("node {node} does not fill the volume from {data}: {said}");
            wait(claim, Reason::ClaimRefused, note, PARKED, ctx).await
        }
        Code::AlreadyExists | Code::Unimplemented | Code::Unauthenticated | Code::PermissionDenied => {
            let note = format!(
                "node {node} does not make the volume: {said} ({code:?}). If a volume of this claim is left there, `lvprov \
                 gc` shows it"
            );
            wait(claim, Reason::ProvisioningFailed, note, PARKED, ctx).await
        }
        // What is copied takes its time, and the node says how far it is.
        _ => {
            let note = format!("node {node} has not made the volume yet, which is tried again: {said} ({code:?})");
            wait(claim, Reason::ProvisioningFailed, note, LONGEST_WAIT, ctx).await
        }
    }
}

/// Whether the node has made nothing, or what is there is not this claim's to
/// remove. A copy that was begun is there whatever stopped it.
pub(super) fn is_definite(status: &Status) -> bool {
    sent_by_node(status)
        && matches!(
            status.code(),
            Code::AlreadyExists
                | Code::InvalidArgument
                | Code::OutOfRange
                | Code::Unimplemented
                | Code::Unauthenticated
                | Code::PermissionDenied
        )
}
