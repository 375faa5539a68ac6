//! Claims: from the node that the scheduler chose to a PersistentVolume, or
//! back to the scheduler.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::controller::Action;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Api, ResourceExt};
use lvm::size::human;
use lvprov_proto::csi::controller_client::ControllerClient;
use lvprov_proto::csi::volume_capability::access_mode::Mode;
use lvprov_proto::csi::volume_capability::{AccessMode, AccessType, MountVolume};
use lvprov_proto::csi::{CapacityRange, CreateVolumeRequest, Topology, TopologyRequirement, VolumeCapability};
use serde_json::json;
use tonic::{Code, Status};
use tracing::info;

use super::calls::{Call, wanted};
use super::context::Context;
use super::error::{Doing, Error, Row, already_exists, is_conflict, is_not_found};
use super::events::Reason;
use super::growth;
use super::names::{SELECTED_NODE, STORAGE_PROVISIONER, volume_of};
use super::nodes::{News, Reached, call_to, explain, sent_by_node};
use super::placement::{self, Fit};
use super::validate::{Request, Source, class_name, validate};
use super::volume::{Made, Place, build, place_of};
use crate::names::{DRIVER, TOPOLOGY_NODE, context, parameters};

/// For one call that makes a logical volume.
const CREATE_TIMEOUT: Duration = Duration::from_secs(60);
/// Between attempts, where the next may well succeed.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A node that answers, but whose LVM fails or is busy, is given up after so
/// many times the patience with one that does not answer: it may have made the
/// volume, and another node would make a second one.
const PATIENCE_WITH_LVM: u32 = 10;
/// Between attempts, where somebody has to do something first.
const PARKED: Duration = Duration::from_secs(5 * 60);

/// The node that the scheduler chose for the claim's pod.
pub fn selected_node(claim: &PersistentVolumeClaim) -> Option<&str> {
    claim.annotations().get(SELECTED_NODE).map(String::as_str)
}

/// Whether the claim still waits for a volume.
fn waits(claim: &PersistentVolumeClaim) -> bool {
    let spec = claim.spec.as_ref();
    let named = spec.and_then(|spec| spec.volume_name.as_deref());
    claim.metadata.deletion_timestamp.is_none() && named.unwrap_or_default().is_empty()
}

/// Brings a claim of ours to where it should be.
///
/// # Errors
/// When the API server cannot be asked or refuses; it is tried again.
pub async fn reconcile(claim: Arc<PersistentVolumeClaim>, ctx: Arc<Context>) -> Result<Action, Error> {
    if claim.metadata.deletion_timestamp.is_some() {
        // What a node may have made for it is not needed now.
        ctx.calls.look();
        return Ok(Action::await_change());
    }
    if !waits(&claim) {
        let name = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
        let place = ctx.volumes.get(&ObjectRef::new(name)).and_then(|volume| place_of(&volume));
        ctx.calls.bound(&claim.uid().unwrap_or_default(), place.as_ref());
        return growth::reconcile(&claim, &ctx).await;
    }
    let Some(class_name) = class_name(&claim) else {
        return Ok(Action::await_change());
    };
    let Some(class) = ctx.classes.get(&ObjectRef::new(class_name)) else {
        if claim.annotations().get(STORAGE_PROVISIONER).map(String::as_str) == Some(DRIVER) {
            let note = format!("StorageClass {class_name} has gone. Make it again, or delete the claim");
            ctx.events.tell(&*claim, Reason::ClaimRefused, note).await;
        }
        return Ok(Action::await_change());
    };
    if class.provisioner != DRIVER {
        return Ok(Action::await_change());
    }
    let request = match validate(&claim, &class) {
        Ok(request) => request,
        Err(refusal) => {
            ctx.events.tell(&*claim, Reason::ClaimRefused, refusal.to_string()).await;
            return Ok(Action::await_change());
        }
    };
    match selected_node(&claim) {
        Some(node) => provision(&claim, &class, &request, node, &ctx).await,
        None => Ok(unplaced(&claim, &request, &ctx).await),
    }
}

/// The scheduler has chosen no node yet: says so where it cannot.
async fn unplaced(claim: &PersistentVolumeClaim, request: &Request, ctx: &Context) -> Action {
    match placement::fit(request, &ctx.nodes.views(), ctx.patience) {
        Fit::Somewhere | Fit::Unknown(None) => Action::await_change(),
        Fit::Unknown(Some(again)) => Action::requeue(again),
        // What is free changes often, and so does the text.
        Fit::Nowhere(note) => match ctx.events.tell_seldom(claim, Reason::NoNodeHasRoom, note).await {
            None => Action::await_change(),
            Some(again) => Action::requeue(again),
        },
    }
}

async fn provision(
    claim: &PersistentVolumeClaim,
    class: &StorageClass,
    request: &Request,
    node: &str,
    ctx: &Context,
) -> Result<Action, Error> {
    let uid = claim.uid().unwrap_or_default();
    if let Some(volume) = ctx.volumes.get(&ObjectRef::new(&volume_of(&uid))) {
        return known(claim, &volume, ctx).await;
    }
    // The watch may bring our own PV later than the claim's next change.
    if let Some(left) = ctx.published.left(&uid) {
        return Ok(Action::requeue(left));
    }
    if !node_exists(node, ctx).await? {
        let note =
            format!("node {node}, chosen for the pod of this claim, has gone; the scheduler chooses another one");
        return hand_back(claim, node, Reason::NodeGone, note, ctx).await;
    }
    let reached = match ctx.nodes.reach(node) {
        Ok(reached) => reached,
        Err(unreached) => {
            let since = unreached.since;
            return unreachable(claim, node, since, &unreached.why, ctx).await;
        }
    };
    let place = Place {
        topology: reached.topology.clone(),
        volume_group: request.volume_group.to_string(),
        logical_volume: volume_of(&uid),
    };
    let Some(call) = ctx.calls.begin(wanted(claim, place)) else {
        // What an earlier call may have left is just being removed.
        return Ok(Action::requeue(Duration::from_secs(1)));
    };
    let made = match create(claim, request, node, &reached, ctx).await? {
        Ok(made) => made,
        Err(status) => {
            let next = next(&status);
            if next.is_definite() {
                call.settled();
            }
            return failed(claim, node, &status, next, ctx).await;
        }
    };
    ctx.failures.end(&uid, Row::Silence);
    info!(
        claim = claim.name_any(),
        namespace = claim.namespace(),
        node,
        volume = made.logical_volume,
        "made the volume"
    );
    publish(claim, &build(claim, class, request, &made), &made, call, ctx).await
}

/// There is a PV of the claim's name already.
async fn known(claim: &PersistentVolumeClaim, volume: &PersistentVolume, ctx: &Context) -> Result<Action, Error> {
    let reference = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
    if reference.is_some_and(|reference| reference.uid == claim.uid()) {
        ctx.calls.bound(&claim.uid().unwrap_or_default(), place_of(volume).as_ref());
        // The controller manager binds the two. Should the PV be deleted
        // before, no change of the claim tells of it.
        return Ok(Action::requeue(PARKED));
    }
    let note = format!(
        "PersistentVolume {} exists and belongs to another claim. Delete it, or delete this claim and make \
         it again",
        volume.name_any()
    );
    ctx.events.tell(claim, Reason::ProvisioningFailed, note).await;
    Ok(Action::requeue(PARKED))
}

/// Whether the Node object exists. Only the API server itself is believed when
/// it says no.
async fn node_exists(node: &str, ctx: &Context) -> Result<bool, Error> {
    if ctx.node_objects.get(&ObjectRef::new(node)).is_some() {
        return Ok(true);
    }
    let api: Api<Node> = Api::all(ctx.client.clone());
    match api.get_metadata(node).await {
        Ok(_) => Ok(true),
        Err(error) if is_not_found(&error) => Ok(false),
        Err(error) => Err(error).doing(|| format!("read node {node}")),
    }
}

/// The inner result is the node's answer.
async fn create(
    claim: &PersistentVolumeClaim,
    request: &Request,
    node: &str,
    reached: &Reached,
    ctx: &Context,
) -> Result<Result<Made, Status>, Error> {
    let message = create_request(claim, request, &reached.topology, &ctx.cluster);
    let answer = async {
        let call = call_to(node, message, CREATE_TIMEOUT)?;
        ControllerClient::new(reached.channel.clone()).create_volume(call).await
    };
    let volume = match answer.await {
        Ok(answer) => answer.into_inner().volume.unwrap_or_default(),
        Err(status) => return Ok(Err(status)),
    };
    let wrong = |what: String| Error::Answer { node: node.to_owned(), what };
    let (volume_group, logical_volume) =
        volume.volume_id.split_once('/').filter(|(group, _)| *group == request.volume_group.as_str()).ok_or_else(
            || wrong(format!("was asked for a volume in {} and made {:?}", request.volume_group, volume.volume_id)),
        )?;
    let bytes = u64::try_from(volume.capacity_bytes)
        .ok()
        .filter(|bytes| *bytes >= request.bytes)
        .ok_or_else(|| wrong(format!("was asked for {} bytes and made {}", request.bytes, volume.capacity_bytes)))?;
    // A csi PV keeps this for ever, and without it no pod could mount the volume.
    let owner = [
        (context::CLAIM_NAMESPACE, claim.namespace().unwrap_or_default()),
        (context::CLAIM_UID, claim.uid().unwrap_or_default()),
    ];
    if request.source == Source::Csi && !owner.iter().all(|(key, is)| volume.volume_context.get(*key) == Some(is)) {
        return Err(wrong(format!("made {} and does not say whose it is", volume.volume_id)));
    }
    Ok(Ok(Made {
        topology: reached.topology.clone(),
        volume_group: volume_group.to_owned(),
        logical_volume: logical_volume.to_owned(),
        bytes,
        context: volume.volume_context.into_iter().collect(),
    }))
}

fn create_request(
    claim: &PersistentVolumeClaim,
    request: &Request,
    topology: &str,
    cluster: &str,
) -> CreateVolumeRequest {
    let uid = claim.uid().unwrap_or_default();
    let name = volume_of(&uid);
    let here = Topology { segments: HashMap::from([(TOPOLOGY_NODE.to_owned(), topology.to_owned())]) };
    let parameters = [
        (parameters::VOLUME_GROUP, request.volume_group.to_string()),
        (parameters::FS_TYPE, request.fs_type.to_string()),
        (parameters::PVC_NAME, claim.name_any()),
        (parameters::PVC_NAMESPACE, claim.namespace().unwrap_or_default()),
        (parameters::PV_NAME, name.clone()),
        (parameters::CLAIM_UID, uid),
        (parameters::CLUSTER, cluster.to_owned()),
    ];
    CreateVolumeRequest {
        name,
        capacity_range: Some(CapacityRange {
            required_bytes: i64::try_from(request.bytes).unwrap_or(i64::MAX),
            limit_bytes: 0,
        }),
        volume_capabilities: vec![VolumeCapability {
            access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
            access_type: Some(AccessType::Mount(MountVolume {
                fs_type: request.fs_type.to_string(),
                mount_flags: request.mount_flags(),
                ..MountVolume::default()
            })),
        }],
        parameters: parameters.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        accessibility_requirements: Some(TopologyRequirement { requisite: vec![here.clone()], preferred: vec![here] }),
        ..CreateVolumeRequest::default()
    }
}

/// Makes the PV of a volume that has been made.
async fn publish(
    claim: &PersistentVolumeClaim,
    volume: &PersistentVolume,
    made: &Made,
    call: Call<'_>,
    ctx: &Context,
) -> Result<Action, Error> {
    let (name, node) = (volume.name_any(), &made.topology);
    let api: Api<PersistentVolume> = Api::all(ctx.client.clone());
    match api.create(&PostParams::default(), volume).await {
        Ok(_) => {}
        Err(error) if already_exists(&error) => {
            let there = api.get(&name).await.doing(|| format!("read PersistentVolume {name}"))?;
            match place_of(&there) {
                // A PV for the volume somewhere else: this one is not needed.
                Some(place) if Some(&place) != place_of(volume).as_ref() => {
                    let note = format!(
                        "PersistentVolume {name} names a volume on node {}; the one just made on node {node} is \
                         removed again",
                        place.topology
                    );
                    ctx.events.tell(claim, Reason::ProvisioningFailed, note).await;
                    drop(call);
                }
                _ => call.settled(),
            }
            return known(claim, &there, ctx).await;
        }
        Err(error) => {
            let note = format!(
                "the volume is there on node {node}, but its PersistentVolume cannot be made, which is \
                 tried again: {error}"
            );
            ctx.events.tell(claim, Reason::ProvisioningFailed, note).await;
            return Err(error).doing(|| format!("create PersistentVolume {name}"));
        }
    }
    call.settled();
    ctx.published.note(claim.uid().unwrap_or_default());
    ctx.failures.clear(&claim.uid().unwrap_or_default());
    let note = format!("made {}/{} with {} on node {node}", made.volume_group, made.logical_volume, human(made.bytes));
    ctx.events.tell(claim, Reason::ProvisioningSucceeded, note).await;
    // As in `known`.
    Ok(Action::requeue(PARKED))
}

/// What follows from a node's refusal.
#[derive(Debug, PartialEq, Eq)]
enum Next {
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
    fn is_definite(&self) -> bool {
        matches!(self, Self::HandBack(Reason::NotEnoughSpace | Reason::NoVolumeGroup) | Self::Park)
    }
}

fn next(status: &Status) -> Next {
    match status.code() {
        // LVM has refused, and the node has seen that no volume is there. (With
        // a cause it is the connection that broke.)
        Code::Internal if sent_by_node(status) => Next::HandBack(Reason::ProvisioningFailed),
        Code::ResourceExhausted => Next::HandBack(Reason::NotEnoughSpace),
        Code::FailedPrecondition => Next::HandBack(Reason::NoVolumeGroup),
        Code::Unavailable if !sent_by_node(status) => Next::Unreachable,
        Code::Unavailable => Next::RetryThenHandBack,
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

async fn failed(
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
async fn unreachable(
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
async fn hand_back(
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

/// The claims that have to be looked at again for what became of a node, or
/// (None) of any node.
pub fn concerned_by_node(
    news: Option<&News>,
    claims: &Store<PersistentVolumeClaim>,
) -> Vec<ObjectRef<PersistentVolumeClaim>> {
    let concerned = |selected: &str| match news {
        None => true,
        Some(News::Capacity(_)) => false,
        Some(News::Up(node) | News::Down(node) | News::Gone(node)) => selected == node,
    };
    references(claims, |claim| waits(claim) && selected_node(claim).is_none_or(concerned))
}

/// What has happened to StorageClasses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClassChanged {
    /// One was made, changed or deleted: its name.
    One(String),
    /// Any may have been.
    Any,
}

/// The waiting claims of a class that has changed.
pub fn concerned_by_class(
    changed: &ClassChanged,
    claims: &Store<PersistentVolumeClaim>,
) -> Vec<ObjectRef<PersistentVolumeClaim>> {
    let concerned = |claim: &PersistentVolumeClaim| match changed {
        ClassChanged::One(class) => class_name(claim) == Some(class.as_str()),
        ClassChanged::Any => true,
    };
    references(claims, |claim| waits(claim) && concerned(claim))
}

fn references(
    claims: &Store<PersistentVolumeClaim>,
    concerned: impl Fn(&PersistentVolumeClaim) -> bool,
) -> Vec<ObjectRef<PersistentVolumeClaim>> {
    claims.state_filter(|claim| concerned(claim)).iter().map(|claim| ObjectRef::from_obj(&**claim)).collect()
}
