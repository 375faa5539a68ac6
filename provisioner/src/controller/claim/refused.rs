//! What follows where a node makes no volume: another attempt, or the claim is
//! handed back to the scheduler.

use std::time::Duration;

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use tonic::{Code, Status};
use tracing::info;

use super::PARKED;
use crate::controller::context::Context;
use crate::controller::error::{Doing, Error, Row, is_conflict, is_not_found};
use crate::controller::events::Reason;
use crate::controller::names::SELECTED_NODE;
use crate::controller::nodes::{explain, sent_by_node};
use crate::controller::queue::Action;

/// Between attempts, where the next may well succeed.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A node that answers, but whose LVM fails or is busy, is given up after so
/// many times the patience with one that does not answer: it may have made the
/// volume, and another node would make a second one.
const PATIENCE_WITH_LVM: u32 = 10;

/// What follows from a node's refusal.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// This node cannot serve the claim: the scheduler must choose another.
    HandBack(Reason),
    /// The node may not be there; handed back if that lasts.
    Unreachable,
    /// May succeed next time. If it never does, another node serves the claim;
    /// what this one may have made all the same is removed then.
    RetryThenHandBack,
    /// May succeed next time.
    Retry,
    /// Will not succeed before somebody has done something.
    Park,
}

impl Next {
    /// The node has made nothing, or what is there is not this claim's to
    /// remove.
    pub(super) fn is_definite(&self) -> bool {
        matches!(self, Self::HandBack(Reason::NotEnoughSpace | Reason::NoVolumeGroup) | Self::Park)
    }
}

pub(super) fn next(status: &Status) -> Next {
    match status.code() {
        // LVM has refused, and the node has seen that no volume is there. (With
        // a cause it is the connection that broke.)
        Code::Internal if sent_by_node(status) => Next::HandBack(Reason::ProvisioningFailed),
        Code::ResourceExhausted => Next::HandBack(Reason::NotEnoughSpace),
        Code::FailedPrecondition => Next::HandBack(Reason::NoVolumeGroup),
        Code::Unavailable if !sent_by_node(status) => Next::Unreachable,
        // It did not answer in time, as each time where its LVM hangs: our limit for a call is
        // shorter than the node's for a lock or a command.
        Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded => Next::RetryThenHandBack,
        // A volume of this name, with another layout; a request that the node
        // does not understand or does not take from us. The same will be said
        // again.
        Code::AlreadyExists
        | Code::InvalidArgument
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Unauthenticated
        | Code::PermissionDenied => Next::Park,
        // A call that was cut off may have made the volume: asked again, the
        // same node answers with it. Another node would make a second one.
        _ => Next::Retry,
    }
}

pub(super) async fn failed(
    claim: &PersistentVolumeClaim,
    node: &str,
    status: &Status,
    next: Next,
    ctx: &Context,
) -> Result<Action, Error> {
    let said = explain(status);
    let uid = claim.uid().unwrap_or_default();
    if sent_by_node(status) {
        ctx.failures.end(&uid, Row::Silence);
    }
    // It has not refused this time: it may be at work.
    if next == Next::Retry {
        ctx.failures.end(&uid, Row::Refusals);
    }
    match next {
        Next::HandBack(Reason::ProvisioningFailed) => {
            let note = format!(
                "node {node}, chosen for the pod of this claim, could not make the volume: {said}. The scheduler \
                 chooses another one"
            );
            hand_back(claim, node, Reason::ProvisioningFailed, note, ctx).await
        }
        Next::HandBack(reason) => {
            let note = format!(
                "node {node}, chosen for the pod of this claim, cannot hold the volume: {said}. The \
                 scheduler chooses another one; if no other fits, ask for less or make room"
            );
            hand_back(claim, node, reason, note, ctx).await
        }
        Next::Unreachable => unreachable(claim, node, Duration::ZERO, &said, ctx).await,
        Next::RetryThenHandBack => {
            let row = ctx.failures.note(&uid, Row::Refusals, node, LONGEST_WAIT);
            let patience = ctx.patience * PATIENCE_WITH_LVM;
            let left = patience.saturating_sub(row.since);
            if left.is_zero() {
                let note = format!(
                    "node {node}, chosen for the pod of this claim, could not make the volume for {} s: {said}. The \
                     scheduler chooses another one",
                    patience.as_secs()
                );
                return hand_back(claim, node, Reason::ProvisioningFailed, note, ctx).await;
            }
            ctx.events.tell(claim, Reason::ProvisioningFailed, tried_again(node, status)).await;
            Ok(Action::requeue(row.wait.min(left)))
        }
        Next::Retry => {
            let wait = ctx.failures.note(&uid, Row::Attempts, node, LONGEST_WAIT).wait;
            ctx.events.tell(claim, Reason::ProvisioningFailed, tried_again(node, status)).await;
            Ok(Action::requeue(wait))
        }
        Next::Park => {
            let note = format!(
                "node {node} does not make the volume: {said} ({:?}). If a volume of this claim is left \
                 there, `lvprov gc` shows it",
                status.code()
            );
            ctx.events.tell(claim, Reason::ProvisioningFailed, note).await;
            Ok(Action::requeue(PARKED))
        }
    }
}

fn tried_again(node: &str, status: &Status) -> String {
    format!("node {node} could not make the volume, which is tried again: {} ({:?})", explain(status), status.code())
}

/// Waits for a node to answer, and hands the claim back when that takes too
/// long. `since`: how long it is known to be silent.
pub(super) async fn unreachable(
    claim: &PersistentVolumeClaim,
    node: &str,
    since: Duration,
    why: &str,
    ctx: &Context,
) -> Result<Action, Error> {
    let uid = claim.uid().unwrap_or_default();
    let row = ctx.failures.note(&uid, Row::Silence, node, LONGEST_WAIT);
    let left = ctx.patience.saturating_sub(since.max(row.since));
    if left.is_zero() {
        let note = format!(
            "the lvprov node service on {node}, chosen for the pod of this claim, has not answered for {} s: \
             {why}. The scheduler chooses another one. Look at the service's pod: kubectl -n lvprov-system \
             get pods -o wide",
            ctx.patience.as_secs()
        );
        return hand_back(claim, node, Reason::NodeUnreachable, note, ctx).await;
    }
    Ok(Action::requeue(row.wait.min(left)))
}

/// Gives the pod back to the scheduler: removes the annotation, unless the
/// claim has changed meanwhile.
pub(super) async fn hand_back(
    claim: &PersistentVolumeClaim,
    node: &str,
    reason: Reason,
    note: String,
    ctx: &Context,
) -> Result<Action, Error> {
    let (name, namespace) = (claim.name_any(), claim.namespace().unwrap_or_default());
    // UID and version make the patch fail where the claim is another one, or
    // has changed, since it was read.
    let patch = json!({"metadata": {
        "uid": claim.uid(),
        "resourceVersion": claim.resource_version(),
        "annotations": {SELECTED_NODE: null},
    }});
    let api: Api<PersistentVolumeClaim> = Api::namespaced(ctx.client.clone(), &namespace);
    let patched = api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await;
    match patched {
        Ok(_) => {
            info!(claim = name, namespace, node, "handed back to the scheduler");
            ctx.failures.clear(&claim.uid().unwrap_or_default());
            ctx.events.tell(claim, reason, note).await;
            Ok(Action::await_change())
        }
        // Somebody else was faster; the change comes by the watch.
        Err(error) if is_conflict(&error) || is_not_found(&error) => Ok(Action::await_change()),
        Err(error) => Err(error).doing(|| format!("hand claim {namespace}/{name} back to the scheduler")),
    }
}
