//! A snapshot goes.

use kube::{Api, ResourceExt};
use lvm::fault;
use lvprov_proto::csi::DeleteSnapshotRequest;
use lvprov_proto::csi::controller_client::ControllerClient;
use serde_json::json;
use tonic::Code;
use tracing::info;

use super::record::tell;
use super::types::{CONTENT_FINALIZER, Need, VolumeSnapshotContent, need};
use super::{CALL_TIMEOUT, Handle, LONGEST_WAIT, PARKED, SOON, Silent, ask, patch_object, patch_status};
use crate::controller::context::Context;
use crate::controller::error::{Doing, Error, Row, is_not_found};
use crate::controller::events::Reason;
use crate::controller::nodes::{call_to, explain};
use crate::controller::queue::Action;

/// Has the node remove the snapshot of a content, and lets the content go.
pub(super) async fn remove(content: &VolumeSnapshotContent, ctx: &Context) -> Result<Action, Error> {
    let (name, uid) = (content.name_any(), content.uid().unwrap_or_default());
    let api: Api<VolumeSnapshotContent> = Api::all(ctx.client.clone());
    // What the watch brought may be old by now, and this step cannot be undone.
    let now = match api.get(&name).await {
        Ok(now) => now,
        Err(error) if is_not_found(&error) => return Ok(Action::await_change()),
        Err(error) => return Err(error).doing(|| format!("read VolumeSnapshotContent {name}")),
    };
    if now.uid() != content.uid() || need(&now) != Need::Removal || now.handle() != content.handle() {
        return Ok(Action::await_change());
    }
    let handle = match now.handle().unwrap_or_default().parse::<Handle>() {
        Ok(handle) => handle,
        Err(error) => {
            let note = format!("{error}. To let it go, set its deletionPolicy to Retain");
            tell(&now, Reason::SnapshotDeleteFailed, &note, ctx).await;
            return Ok(Action::requeue(PARKED));
        }
    };
    let asked = match ask(&handle.0.topology, ctx) {
        Ok(asked) => asked,
        Err(Silent::Soon) => return Ok(Action::requeue(SOON)),
        Err(Silent::Told(reason, mut note)) => {
            if reason == Reason::NodeGone {
                note.push_str("; if it never will, set the deletionPolicy of the VolumeSnapshotContent to Retain");
            }
            tell(&now, reason, &note, ctx).await;
            // Its return is news.
            return Ok(Action::await_change());
        }
    };
    fault::point("snapshot-delete-call-before");
    let request = DeleteSnapshotRequest { snapshot_id: handle.to_string(), ..DeleteSnapshotRequest::default() };
    let deleted = async {
        let call = call_to(&asked.node, request, CALL_TIMEOUT)?;
        ControllerClient::new(asked.reached.channel).delete_snapshot(call).await
    };
    match deleted.await {
        Ok(_) => {}
        // Gone already, which is all that is wanted.
        Err(status) if status.code() == Code::NotFound => {}
        Err(status) => {
            let reason = match status.code() {
                Code::FailedPrecondition => Reason::SnapshotInUse,
                _ => Reason::SnapshotDeleteFailed,
            };
            let note = format!(
                "{} on node {} is not removed yet, which is tried again: {} ({:?})",
                handle.0.handle(),
                asked.node,
                explain(&status),
                status.code()
            );
            tell(&now, reason, &note, ctx).await;
            return Ok(Action::requeue(ctx.failures.note(&uid, Row::Attempts, "", LONGEST_WAIT).wait));
        }
    }
    fault::point("snapshot-delete-call-after");
    info!(content = name, snapshot = %handle, node = asked.node, "removed the snapshot");
    ctx.failures.clear(&uid);
    ctx.snapshots.tell_gone(&handle.0.topology);
    let nothing = json!({"snapshotHandle": null, "creationTime": null, "readyToUse": null, "restoreSize": null});
    match patch_status(&now, nothing, ctx).await? {
        Some(now) => let_go(&now, ctx).await,
        None => Ok(Action::requeue(SOON)),
    }
}

/// Takes our finalizer off a content, provided that nobody has changed it
/// meanwhile.
pub(super) async fn let_go(content: &VolumeSnapshotContent, ctx: &Context) -> Result<Action, Error> {
    let others: Vec<&String> = content.finalizers().iter().filter(|name| *name != CONTENT_FINALIZER).collect();
    if others.len() == content.finalizers().len() {
        return Ok(Action::await_change());
    }
    let patch = json!({"metadata": {
        "uid": content.uid(),
        "resourceVersion": content.resource_version(),
        "finalizers": others,
    }});
    match patch_object(content, patch, ctx).await? {
        Some(_) => Ok(Action::await_change()),
        // What has changed it is news, unless it has gone.
        None => Ok(Action::requeue(SOON)),
    }
}
