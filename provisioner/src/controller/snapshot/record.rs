//! What the content, and its VolumeSnapshot, say of a snapshot.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Patch, PatchParams};
use kube::{Api, Resource, ResourceExt};
use lvprov_proto::csi::controller_client::ControllerClient;
use lvprov_proto::csi::{ListSnapshotsRequest, Snapshot};
use serde_json::{Value, json};
use tracing::warn;

use super::types::{VolumeSnapshot, VolumeSnapshotContent};
use super::{
    CALL_TIMEOUT, Failed, Handle, SOON, Silent, SnapshotName, ask, note_creation, patch_status, unless_changed,
};
use crate::controller::context::Context;
use crate::controller::error::{Doing, Error, Row};
use crate::controller::events::Reason;
use crate::controller::nodes::call_to;
use crate::controller::queue::Action;
use crate::controller::volume::Place;

/// A snapshot, as its node tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Told {
    /// What the node calls it.
    pub handle: Handle,
    /// In nanoseconds since 1970.
    pub created: i64,
    /// The least size of a volume made from it.
    pub bytes: u64,
    /// No: it is lost.
    pub ready: bool,
}

impl Told {
    /// Reads a node's answer; `is_it`: whether the snapshot can be where it says.
    pub fn of(node: &str, snapshot: Snapshot, is_it: impl Fn(&Place) -> bool) -> Result<Self, Error> {
        let wrong = |what: String| Error::Answer { node: node.to_owned(), what };
        let handle = snapshot.snapshot_id.parse::<Handle>().ok().filter(|handle| is_it(&handle.0));
        let handle = handle.ok_or_else(|| wrong(format!("calls a snapshot {:?}", snapshot.snapshot_id)))?;
        let bytes = u64::try_from(snapshot.size_bytes).ok().filter(|bytes| *bytes > 0);
        let bytes = bytes.ok_or_else(|| wrong(format!("gives {handle} {} bytes", snapshot.size_bytes)))?;
        let created = snapshot
            .creation_time
            .and_then(|time| time.seconds.checked_mul(1_000_000_000)?.checked_add(time.nanos.into()));
        let created = created.ok_or_else(|| wrong(format!("does not say when {handle} was taken")))?;
        Ok(Self { handle, created, bytes, ready: snapshot.ready_to_use })
    }

    fn lost(&self) -> String {
        format!(
            "the snapshot is lost: more was written to its volume than its own space on node {} holds ({}). Delete it, and \
             take the next one with a larger snapshotSize in its VolumeSnapshotClass",
            self.handle.0.topology,
            self.handle.0.handle()
        )
    }
}

/// Looks at a snapshot that should be there.
pub(super) async fn look(content: &VolumeSnapshotContent, ctx: &Context) -> Result<Action, Error> {
    let uid = content.uid().unwrap_or_default();
    if let Some(left) = ctx.failures.left(&uid, Row::Attempts) {
        return Ok(Action::requeue(left));
    }
    match ask_for(content, ctx).await? {
        Seen::There(told) => record(content, &told, ctx).await,
        Seen::Failed(failed) => fail(content, failed, ctx).await,
        Seen::Soon => Ok(Action::requeue(SOON)),
    }
}

/// Looks whether the snapshot of a ready content can still be used, as when a
/// volume could not be made from it. None: it can, or that is not known.
///
/// # Errors
/// When the API server cannot be asked or refuses.
pub async fn check(content: &VolumeSnapshotContent, ctx: &Context) -> Result<Option<String>, Error> {
    match ask_for(content, ctx).await? {
        Seen::There(told) => {
            let lost = (!told.ready).then(|| told.lost());
            record(content, &told, ctx).await?;
            Ok(lost)
        }
        Seen::Failed(failed) if failed.is_final => {
            let note = failed.note.clone();
            fail(content, failed, ctx).await?;
            Ok(Some(note))
        }
        Seen::Failed(_) | Seen::Soon => Ok(None),
    }
}

enum Seen {
    There(Told),
    Failed(Failed),
    Soon,
}

async fn ask_for(content: &VolumeSnapshotContent, ctx: &Context) -> Result<Seen, Error> {
    let named = content.handle().or(content.spec.source.snapshot_handle.as_deref()).unwrap_or_default();
    let handle = match named.parse::<Handle>() {
        Ok(handle) => handle,
        Err(error) => return Ok(Seen::Failed(Failed::finally(error.to_string()))),
    };
    let asked = match ask(&handle.0.topology, ctx) {
        Ok(asked) => asked,
        Err(Silent::Soon) => return Ok(Seen::Soon),
        Err(Silent::Told(reason, note)) => {
            return Ok(Seen::Failed(Failed { reason, is_final: false, ..Failed::finally(note) }));
        }
    };
    let request = ListSnapshotsRequest { snapshot_id: handle.to_string(), ..ListSnapshotsRequest::default() };
    let answer = async {
        let call = call_to(&asked.node, request, CALL_TIMEOUT)?;
        ControllerClient::new(asked.reached.channel).list_snapshots(call).await
    };
    let listed = match answer.await {
        Ok(answer) => answer.into_inner().entries,
        Err(status) => {
            let failed =
                Failed::said(&asked.node, &format!("could not look at snapshot {}", handle.0.handle()), &status);
            // Only that it is not there is an answer.
            return Ok(Seen::Failed(Failed { is_final: false, ..failed }));
        }
    };
    let Some(snapshot) = listed.into_iter().find_map(|entry| entry.snapshot) else {
        let note =
            format!("snapshot {} is not on node {} any more. Delete the VolumeSnapshot", handle.0.handle(), asked.node);
        return Ok(Seen::Failed(Failed { reason: Reason::SnapshotLost, ..Failed::finally(note) }));
    };
    Ok(Seen::There(Told::of(&asked.node, snapshot, |it| *it == handle.0)?))
}

/// Writes down what a node has told.
pub(super) async fn record(content: &VolumeSnapshotContent, told: &Told, ctx: &Context) -> Result<Action, Error> {
    let lost = (!told.ready).then(|| told.lost());
    let now = content.status.clone().unwrap_or_default();
    let handle = told.handle.to_string();
    let same = now.snapshot_handle.as_ref() == Some(&handle)
        && now.ready_to_use == Some(told.ready)
        && now.creation_time.is_some()
        && now.restore_size.is_some()
        && content.error() == lost.as_deref();
    if !same {
        let status = json!({
            "snapshotHandle": handle,
            "creationTime": told.created,
            "restoreSize": told.bytes,
            "readyToUse": told.ready,
            "error": lost.as_ref().map(|note| error(note)),
        });
        if patch_status(content, status, ctx).await?.is_none() {
            return Ok(Action::await_change());
        }
    }
    if content.is_being_created() {
        note_creation(content, false, ctx).await?;
    }
    ctx.failures.clear(&content.uid().unwrap_or_default());
    match lost {
        Some(note) if !same => {
            warn!(content = content.name_any(), snapshot = handle, "the snapshot is lost");
            tell(content, Reason::SnapshotLost, &note, ctx).await;
            unready(content, &note, ctx).await?;
        }
        // Those who wait for it have heard of it before.
        None if !same => {
            let reference = &content.spec.volume_snapshot_ref;
            if let (Some(namespace), Some(name)) = (&reference.namespace, &reference.name) {
                ctx.snapshots.tell_ready(SnapshotName { namespace: namespace.clone(), name: name.clone() });
            }
        }
        _ => {}
    }
    Ok(Action::await_change())
}

/// Writes down why nothing came of it, and when it is tried again.
pub(super) async fn fail(content: &VolumeSnapshotContent, failed: Failed, ctx: &Context) -> Result<Action, Error> {
    let Failed { reason, note, longest, is_final } = failed;
    let uid = content.uid().unwrap_or_default();
    // Before the content changes by it.
    let wait = ctx.failures.note(&uid, Row::Attempts, "", longest).wait;
    let was_ready = content.is_ready();
    // A node that is silent has not lost its snapshots.
    if (!was_ready || is_final) && content.error() != Some(note.as_str()) {
        let status = json!({"readyToUse": false, "error": error(&note)});
        if patch_status(content, status, ctx).await?.is_none() {
            return Ok(Action::await_change());
        }
    }
    tell(content, reason, &note, ctx).await;
    if is_final && content.is_being_created() {
        note_creation(content, false, ctx).await?;
    }
    if was_ready && is_final {
        unready(content, &note, ctx).await?;
    }
    Ok(Action::requeue(wait))
}

fn error(note: &str) -> Value {
    json!({"message": note, "time": Time(Timestamp::now())})
}

/// Tells on the content, and on the VolumeSnapshot that users look at.
pub(super) async fn tell(content: &VolumeSnapshotContent, reason: Reason, note: &str, ctx: &Context) {
    ctx.events.tell(content, reason, note.to_owned()).await;
    let reference = &content.spec.volume_snapshot_ref;
    if reference.uid.as_deref().is_some_and(|uid| !uid.is_empty()) {
        let mut reference = reference.clone();
        reference.api_version = Some(VolumeSnapshot::api_version(&()).into_owned());
        reference.kind = Some(VolumeSnapshot::kind(&()).into_owned());
        ctx.events.tell_about(&reference, reason, note.to_owned()).await;
    }
}

/// Takes readiness off a VolumeSnapshot. The snapshot-controller looks no more
/// at the content of one that is ready; of one that is not it takes over what
/// the content says.
async fn unready(content: &VolumeSnapshotContent, note: &str, ctx: &Context) -> Result<(), Error> {
    let reference = &content.spec.volume_snapshot_ref;
    let (Some(namespace), Some(name), Some(uid)) = (&reference.namespace, &reference.name, &reference.uid) else {
        return Ok(());
    };
    let patch = json!({"metadata": {"uid": uid}, "status": {"readyToUse": false, "error": error(note)}});
    let api: Api<VolumeSnapshot> = Api::namespaced(ctx.client.clone(), namespace);
    unless_changed(api.patch_status(name, &PatchParams::default(), &Patch::Merge(patch)).await)
        .doing(|| format!("set the status of VolumeSnapshot {namespace}/{name}"))
        .map(drop)
}
