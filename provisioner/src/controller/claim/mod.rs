//! Claims: from the node that the scheduler chose to a PersistentVolume, or
//! back to the scheduler.

mod concerned;
mod create;
mod data;
mod held;
mod refused;
mod restore;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::PostParams;
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt};
use lvm::fault;
use lvm::size::human;
use lvprov_proto::csi::VolumeContentSource;
use tonic::Status;
use tracing::info;

use super::calls::{Call, wanted};
use super::context::Context;
use super::error::{Doing, Error, Row, already_exists, is_not_found};
use super::events::Reason;
use super::growth;
use super::names::{SELECTED_NODE, STORAGE_PROVISIONER, volume_of};
use super::nodes::{Reached, State, View};
use super::placement::{self, Fit};
use super::queue::Action;
use super::validate::{GroupChoice, Refusal, Request, class_name, validate};
use super::volume::{Made, Place, build, place_of};
use crate::names::DRIVER;
pub use concerned::{ClassChanged, concerned_by_class, concerned_by_node, concerned_by_snapshot};
use create::create;
pub use held::Held;
use refused::{failed, hand_back, next, unreachable};

/// Between attempts, where somebody has to do something first.
const PARKED: Duration = Duration::from_secs(5 * 60);

/// The node that the scheduler chose for the claim's pod.
pub fn selected_node(claim: &PersistentVolumeClaim) -> Option<&str> {
    claim.annotations().get(SELECTED_NODE).map(String::as_str)
}

/// Whether the claim still waits for a volume.
pub fn waits(claim: &PersistentVolumeClaim) -> bool {
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
        ctx.held.end(&claim.uid().unwrap_or_default());
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
            let reason = match refusal {
                Refusal::Populated(_) => Reason::LeftToPopulator,
                _ => Reason::ClaimRefused,
            };
            ctx.events.tell(&*claim, reason, refusal.to_string()).await;
            return Ok(Action::await_change());
        }
    };
    if let Some(data) = &request.data {
        return restore::provision(&claim, &class, &request, data, &ctx).await;
    }
    match selected_node(&claim) {
        Some(node) => provision(&claim, &class, &request, node, &ctx).await,
        None => Ok(unplaced(&claim, class_name, &request, &ctx).await),
    }
}

/// The scheduler has chosen no node yet: says so where it cannot.
async fn unplaced(claim: &PersistentVolumeClaim, class: &str, request: &Request, ctx: &Context) -> Action {
    match placement::fit(request, class, &ctx.nodes.views(), ctx.patience) {
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
    if let Some(action) = already(claim, ctx).await? {
        return Ok(action);
    }
    let Some(labels) = labels_of(node, ctx).await? else {
        let note =
            format!("node {node}, chosen for the pod of this claim, has gone; the scheduler chooses another one");
        return hand_back(claim, node, Reason::NodeGone, note, ctx).await;
    };
    // The scheduler has looked too; the node, or the class, may have changed since.
    if !request.topologies.allow(&labels) {
        let note = format!(
            "node {node}, chosen for the pod of this claim, is not among the allowedTopologies of StorageClass {} ({}); \
             the scheduler chooses another one",
            class.name_any(),
            request.topologies
        );
        return hand_back(claim, node, Reason::NodeNotAllowed, note, ctx).await;
    }
    let reached = match ctx.nodes.reach(node) {
        Ok(reached) => reached,
        Err(unreached) => {
            let since = unreached.since;
            return unreachable(claim, node, since, &unreached.why, ctx).await;
        }
    };
    let view = ctx.nodes.view(node);
    let Some(volume_group) = group_of(request, view.as_deref()) else {
        if !view.is_some_and(|view| matches!(view.state, State::Up(_))) {
            // Its report comes first.
            return Ok(Action::requeue(Duration::from_secs(1)));
        }
        let note = format!(
            "node {node}, chosen for the pod of this claim, lacks {}; the scheduler chooses another one",
            request.volume_group
        );
        return hand_back(claim, node, Reason::NoVolumeGroup, note, ctx).await;
    };
    match make(claim, class, request, Target { node, reached: &reached, volume_group, source: None }, ctx).await? {
        Ok(action) => Ok(action),
        Err(status) => failed(claim, node, &status, next(&status), ctx).await,
    }
}

/// What follows where there is a PV for the claim, or was made a moment ago.
async fn already(claim: &PersistentVolumeClaim, ctx: &Context) -> Result<Option<Action>, Error> {
    let uid = claim.uid().unwrap_or_default();
    if let Some(volume) = ctx.volumes.get(&ObjectRef::new(&volume_of(&uid))) {
        return known(claim, &volume, ctx).await.map(Some);
    }
    // The watch may bring our own PV later than the claim's next change.
    Ok(ctx.published.left(&uid).map(Action::requeue))
}

/// The volume group that a node has for the claim, as far as it has reported. A
/// class that names a group means it, reported or not.
fn group_of(request: &Request, view: Option<&View>) -> Option<String> {
    match &request.volume_group {
        GroupChoice::Group(name) => Some(name.to_string()),
        choice => view?.chosen(choice).map(|group| group.name.clone()),
    }
}

/// Where a volume is to be made, and with what in it.
struct Target<'a> {
    node: &'a str,
    reached: &'a Reached,
    volume_group: String,
    source: Option<&'a VolumeContentSource>,
}

/// Has a node make the volume, and makes its PV. The inner error is the node's
/// refusal.
async fn make(
    claim: &PersistentVolumeClaim,
    class: &StorageClass,
    request: &Request,
    target: Target<'_>,
    ctx: &Context,
) -> Result<Result<Action, Status>, Error> {
    let Target { node, reached, volume_group, source } = target;
    let uid = claim.uid().unwrap_or_default();
    let place = Place { topology: reached.topology.clone(), volume_group, logical_volume: volume_of(&uid) };
    let Some(call) = ctx.calls.begin(wanted(claim, place)) else {
        // What an earlier call may have left is just being removed.
        return Ok(Ok(Action::requeue(Duration::from_secs(1))));
    };
    let made = match create(claim, request, source, node, reached, ctx).await? {
        Ok(made) => made,
        Err(status) => {
            let is_definite = match source {
                None => next(&status).is_definite(),
                Some(_) => restore::is_definite(&status),
            };
            if is_definite {
                call.settled();
            }
            return Ok(Err(status));
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
    publish(claim, &build(claim, class, request, &made), &made, call, ctx).await.map(Ok)
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

/// The labels of the Node object; None where there is none. Only the API server
/// itself is believed when it says so.
async fn labels_of(node: &str, ctx: &Context) -> Result<Option<BTreeMap<String, String>>, Error> {
    if let Some(object) = ctx.node_objects.get(&ObjectRef::new(node)) {
        return Ok(Some(object.labels().clone()));
    }
    let api: Api<Node> = Api::all(ctx.client.clone());
    match api.get_metadata(node).await {
        Ok(object) => Ok(Some(object.labels().clone())),
        Err(error) if is_not_found(&error) => Ok(None),
        Err(error) => Err(error).doing(|| format!("read node {node}")),
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
        Ok(_) => fault::point("pv-after"),
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
