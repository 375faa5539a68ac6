//! Snapshots: what the sidecar of other CSI drivers does.
//!
//! The cluster's snapshot-controller makes a VolumeSnapshotContent for each
//! VolumeSnapshot of a user, and says when it is to go. Here the node of the
//! volume is asked for the snapshot, and the content's status says what came of
//! it; that controller carries it on to the VolumeSnapshot.

mod create;
mod delete;
mod record;
pub mod types;
mod watch;

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::stream::{self, Stream, StreamExt};
use k8s_openapi::api::core::v1::PersistentVolume;
use kube::api::{Patch, PatchParams};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio_stream::wrappers::BroadcastStream;
use tonic::Code;
use tonic::Status;

use super::context::Context;
use super::error::{Doing, Error, Row, is_conflict, is_not_found};
use super::events::Reason;
use super::nodes::{News, Reached, State, explain, sent_by_node};
use super::queue::Action;
use super::validate::Source;
use super::volume::{Place, place_of, source_of};
pub use record::check;
use types::{BEING_CREATED, Need, VolumeSnapshotContent, need};
pub use watch::{Presence, SELDOM, watch};

/// For one call that takes, or removes, a snapshot.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Between attempts, where the next may well succeed.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// Between attempts, where somebody has to do something first.
const PARKED: Duration = Duration::from_secs(5 * 60);
/// The first list of contents takes no longer.
const KNOWN_WITHIN: Duration = Duration::from_secs(10);
/// How many snapshots a text names at most.
const NAMED: usize = 5;
/// Until a node that is being connected to has reported, or has not.
const SOON: Duration = Duration::from_secs(2);

/// Which VolumeSnapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// What is known of the cluster's snapshots.
pub struct Snapshots {
    /// As watched; empty where there are none to watch.
    pub contents: Store<VolumeSnapshotContent>,
    presence: Mutex<Presence>,
    ready: broadcast::Sender<SnapshotName>,
    gone: broadcast::Sender<String>,
}

impl Snapshots {
    /// Nothing is known yet.
    pub fn new(contents: Store<VolumeSnapshotContent>) -> Self {
        let (ready, gone) = (broadcast::channel(256).0, broadcast::channel(256).0);
        Self { contents, presence: Mutex::default(), ready, gone }
    }

    /// Whether the cluster has any.
    pub fn presence(&self) -> Presence {
        *self.lock()
    }

    /// Whether that is news.
    pub fn set_presence(&self, presence: Presence) -> bool {
        std::mem::replace(&mut *self.lock(), presence) != presence
    }

    /// From now on, the VolumeSnapshots that volumes can be made from.
    pub fn ready(&self) -> broadcast::Receiver<SnapshotName> {
        self.ready.subscribe()
    }

    /// From now on, the nodes that a snapshot has gone from, by topology.
    pub fn gone(&self) -> broadcast::Receiver<String> {
        self.gone.subscribe()
    }

    /// Volumes can be made from it now.
    fn tell_ready(&self, snapshot: SnapshotName) {
        // An error only says that nobody listens.
        let _ = self.ready.send(snapshot);
    }

    /// A snapshot has gone from this node.
    pub fn tell_gone(&self, topology: &str) {
        // As above.
        let _ = self.gone.send(topology.to_owned());
    }

    /// The contents are known, or there are none to know.
    pub async fn are_known(&self) -> bool {
        match self.presence() {
            Presence::NotInstalled | Presence::Forbidden => false,
            Presence::Unknown | Presence::There => tokio::time::timeout(KNOWN_WITHIN, self.contents.wait_until_ready())
                .await
                .is_ok_and(|done| done.is_ok()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Presence> {
        self.presence.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a node calls a snapshot: `<node>/<volume group>/<logical volume>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handle(pub Place);

/// It is not one of ours.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no snapshot of lvprov, which are called <node>/<volume group>/<logical volume>")]
pub struct NoHandle(String);

impl FromStr for Handle {
    type Err = NoHandle;

    fn from_str(text: &str) -> Result<Self, NoHandle> {
        let words: Vec<&str> = text.split('/').collect();
        match words.as_slice() {
            [node, group, volume] if words.iter().all(|word| !word.is_empty()) => Ok(Self(Place {
                topology: (*node).to_owned(),
                volume_group: (*group).to_owned(),
                logical_volume: (*volume).to_owned(),
            })),
            _ => Err(NoHandle(text.chars().take(200).collect())),
        }
    }
}

impl fmt::Display for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.0.topology, self.0.handle())
    }
}

/// Brings a content of ours to where it should be.
///
/// # Errors
/// When the API server cannot be asked or refuses; it is tried again.
pub async fn reconcile(content: Arc<VolumeSnapshotContent>, ctx: Arc<Context>) -> Result<Action, Error> {
    if !content.is_ours() {
        return Ok(Action::await_change());
    }
    match need(&content) {
        Need::Nothing => Ok(Action::await_change()),
        Need::Creation => create::create(&content, &ctx).await,
        Need::Look => record::look(&content, &ctx).await,
        Need::Note => note_creation(&content, false, &ctx).await.map(|_| Action::await_change()),
        Need::Removal => delete::remove(&content, &ctx).await,
        Need::NoFinalizer => delete::let_go(&content, &ctx).await,
    }
}

/// Why nothing came of a content this time.
struct Failed {
    reason: Reason,
    /// For the content's status and an Event.
    note: String,
    /// The longest wait until the next attempt.
    longest: Duration,
    /// No node has made the snapshot, nor is at it.
    is_final: bool,
}

impl Failed {
    /// Nothing was asked of any node, and somebody has to do something first.
    fn finally(note: String) -> Self {
        Self { reason: Reason::SnapshotFailed, note, longest: PARKED, is_final: true }
    }

    /// What a node has said to `what`.
    fn said(node: &str, what: &str, status: &Status) -> Self {
        let is_final = sent_by_node(status)
            && !matches!(status.code(), Code::Cancelled | Code::DeadlineExceeded | Code::Unavailable | Code::Aborted);
        let note = format!("node {node} {what}, which is tried again: {} ({:?})", explain(status), status.code());
        let longest = if is_final { PARKED } else { LONGEST_WAIT };
        Self { reason: Reason::SnapshotFailed, note, longest, is_final }
    }
}

/// A node that can be asked.
struct Asked {
    node: String,
    reached: Reached,
}

/// Why a node cannot be asked.
enum Silent {
    /// Nothing is known yet.
    Soon,
    /// For an Event.
    Told(Reason, String),
}

/// The node with this topology, once its own report has shown that it is the
/// one.
fn ask(topology: &str, ctx: &Context) -> Result<Asked, Silent> {
    let Some(node) = ctx.nodes.with_topology(topology) else {
        let note = format!(
            "node {topology}, where the snapshot is, has gone, or has no lvprov node service. If it comes back, this \
             goes on"
        );
        return Err(Silent::Told(Reason::NodeGone, note));
    };
    match ctx.nodes.reach_up(&node.name) {
        Ok(reached) => Ok(Asked { node: node.name.clone(), reached }),
        Err(_) if node.state == State::Connecting => Err(Silent::Soon),
        // A node service that restarts is nothing to tell of.
        Err(unreached) if unreached.since < ctx.patience => Err(Silent::Soon),
        Err(unreached) => {
            let note = format!(
                "the lvprov node service on {}, where the snapshot is, does not answer: {}. Look at its pod: kubectl -n \
                 lvprov-system get pods -o wide",
                node.name, unreached.why
            );
            Err(Silent::Told(Reason::NodeUnreachable, note))
        }
    }
}

/// The PV with a volume of ours that CSI calls so.
fn volume_with(handle: &str, ctx: &Context) -> Option<Place> {
    let is_it = |volume: &PersistentVolume| {
        source_of(volume) == Source::Csi && place_of(volume).is_some_and(|place| place.handle() == handle)
    };
    let (_, name) = handle.split_once('/')?;
    let by_name = ctx.volumes.get(&ObjectRef::new(name)).filter(|volume| is_it(volume));
    // One of another name was imported: those are live.
    by_name.or_else(|| ctx.volumes.live(is_it).pop()).and_then(|volume| place_of(&volume))
}

/// What users call the snapshots of a volume, as the end of a sentence about
/// what is in its way; empty where there are none.
pub fn in_the_way(volume: &Place, ctx: &Context) -> String {
    let handle = volume.handle();
    let is_its = |content: &VolumeSnapshotContent| {
        content.is_ours() && content.handle().is_some() && content.spec.source.volume_handle.as_ref() == Some(&handle)
    };
    let name = |content: &VolumeSnapshotContent| {
        let reference = &content.spec.volume_snapshot_ref;
        format!(
            "{}/{}",
            reference.namespace.as_deref().unwrap_or_default(),
            reference.name.as_deref().unwrap_or_default()
        )
    };
    let mut names: Vec<String> =
        ctx.snapshots.contents.state_filter(is_its).iter().map(|content| name(content)).collect();
    if names.is_empty() {
        return String::new();
    }
    names.sort();
    let more = names.len().saturating_sub(NAMED);
    names.truncate(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!(". VolumeSnapshots of it: {}{more}", names.join(", "))
}

/// Has a snapshot that a node has listed as lost say so itself.
///
/// # Errors
/// When the API server cannot be asked or refuses.
pub async fn found_lost(handles: &HashSet<String>, ctx: &Context) -> Result<(), Error> {
    let is_it = |content: &VolumeSnapshotContent| {
        content.is_ours() && content.is_ready() && content.handle().is_some_and(|handle| handles.contains(handle))
    };
    for content in ctx.snapshots.contents.state_filter(is_it) {
        check(&content, ctx).await?;
    }
    Ok(())
}

/// Where a content's snapshot is, or is to be, as far as is known.
fn topology_of(content: &VolumeSnapshotContent, ctx: &Context) -> Option<String> {
    let source = &content.spec.source;
    match content.handle().or(source.snapshot_handle.as_deref()) {
        Some(handle) => handle.parse::<Handle>().ok().map(|handle| handle.0.topology),
        None => volume_with(source.volume_handle.as_deref()?, ctx).map(|place| place.topology),
    }
}

/// Contents to look at again for what became of nodes: those that wait for one
/// that is up now.
pub fn triggers(ctx: &Arc<Context>) -> impl Stream<Item = ObjectRef<VolumeSnapshotContent>> + Send + 'static {
    let ctx = ctx.clone();
    BroadcastStream::new(ctx.nodes.news()).ready_chunks(super::MANY).flat_map(move |news| {
        let mut up = HashSet::new();
        let mut any = false;
        for one in news {
            match one {
                Ok(News::Up(node)) => drop(ctx.nodes.view(&node).map(|view| up.insert(view.topology.clone()))),
                Ok(_) => {}
                // Too much has happened to hear of each node.
                Err(_) => any = true,
            }
        }
        let concerned = |content: &VolumeSnapshotContent| {
            content.is_ours()
                && matches!(need(content), Need::Creation | Need::Look | Need::Removal)
                && (any || topology_of(content, &ctx).is_some_and(|topology| up.contains(&topology)))
        };
        let waiting = match up.is_empty() && !any {
            true => Vec::new(),
            false => ctx.snapshots.contents.state_filter(concerned),
        };
        for content in &waiting {
            ctx.failures.end(&content.uid().unwrap_or_default(), Row::Attempts);
        }
        stream::iter(waiting.iter().map(|content| ObjectRef::from_obj(&**content)).collect::<Vec<_>>())
    })
}

/// Notes on the content that a node is asked for its snapshot, or that what came
/// of it is known. None: it has changed, or gone.
async fn note_creation(
    content: &VolumeSnapshotContent,
    on: bool,
    ctx: &Context,
) -> Result<Option<VolumeSnapshotContent>, Error> {
    let value = on.then_some("yes");
    let patch = json!({"metadata": {"uid": content.uid(), "annotations": {BEING_CREATED: value}}});
    patch_object(content, patch, ctx).await
}

/// Patches a content. None: it has changed, or gone, since it was read.
async fn patch_object(
    content: &VolumeSnapshotContent,
    patch: Value,
    ctx: &Context,
) -> Result<Option<VolumeSnapshotContent>, Error> {
    let name = content.name_any();
    let api: Api<VolumeSnapshotContent> = Api::all(ctx.client.clone());
    unless_changed(api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await)
        .doing(|| format!("annotate VolumeSnapshotContent {name}"))
}

/// Patches a content's status, as [`patch_object`].
async fn patch_status(
    content: &VolumeSnapshotContent,
    status: Value,
    ctx: &Context,
) -> Result<Option<VolumeSnapshotContent>, Error> {
    let name = content.name_any();
    let patch = json!({"metadata": {"uid": content.uid()}, "status": status});
    let api: Api<VolumeSnapshotContent> = Api::all(ctx.client.clone());
    unless_changed(api.patch_status(&name, &PatchParams::default(), &Patch::Merge(patch)).await)
        .doing(|| format!("set the status of VolumeSnapshotContent {name}"))
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

    #[test]
    fn a_handle_names_node_group_and_volume() {
        let handle: Handle = "n1/vg0/snap-1".parse().unwrap();
        assert_eq!((handle.0.topology.as_str(), handle.0.handle().as_str()), ("n1", "vg0/snap-1"));
        assert_eq!(handle.to_string(), "n1/vg0/snap-1");
        for bad in ["", "n1", "vg0/snap", "n1//snap", "/vg0/snap", "n1/vg0/snap/", "a/b/c/d"] {
            let error = bad.parse::<Handle>().unwrap_err().to_string();
            assert!(error.contains("<node>/<volume group>"), "{error}");
        }
    }

    #[test]
    fn what_a_node_said_counts_as_final_and_what_cut_the_call_off_does_not() {
        let is_final = |status: &Status| Failed::said("n1", "does not", status).is_final;
        for code in [Code::ResourceExhausted, Code::FailedPrecondition, Code::InvalidArgument, Code::Internal] {
            assert!(is_final(&Status::new(code, "x")), "{code:?}");
        }
        for code in [Code::Unavailable, Code::Aborted, Code::DeadlineExceeded, Code::Cancelled] {
            assert!(!is_final(&Status::new(code, "x")), "{code:?}");
        }
        let broken = Status::from_error(Box::new(std::io::Error::from(std::io::ErrorKind::ConnectionReset)));
        assert!(!is_final(&broken));
    }
}
