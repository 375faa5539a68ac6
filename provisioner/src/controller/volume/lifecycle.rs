//! What becomes of a PersistentVolume: its finalizer, and the removal of its
//! logical volume.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Resource, ResourceExt};
use lvm::fault;
use lvprov_proto::csi::DeleteVolumeRequest;
use lvprov_proto::csi::controller_client::ControllerClient;
use serde_json::json;
use tonic::Code;
use tracing::{info, warn};

use super::{Place, place_of};
use crate::controller::context::Context;
use crate::controller::error::{Doing, Error, Row, is_conflict, is_not_found};
use crate::controller::events::Reason;
use crate::controller::names::PV_FINALIZER;
use crate::controller::nodes::{State, call_to, explain};
use crate::controller::queue::Action;
use crate::controller::snapshot;

/// For one call that removes a logical volume.
const DELETE_TIMEOUT: Duration = Duration::from_secs(60);
/// Until a node that is being connected to has reported, or has not.
const SOON: Duration = Duration::from_secs(2);
/// Between attempts to remove one.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// What a PV of ours needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Nothing, until it changes.
    Nothing,
    /// Our finalizer, since its policy is Delete.
    Finalizer,
    /// To be let go: the logical volume is to be kept, so the API object may
    /// be deleted at any time.
    NoFinalizer,
    /// Its logical volume removed, then itself.
    Removal,
}

/// Decides by phase, reclaim policy, finalizer, and whether the PV is being
/// deleted. The policy is honoured also when an admin deletes the PV first.
pub fn need(volume: &PersistentVolume) -> Need {
    let delete =
        volume.spec.as_ref().and_then(|spec| spec.persistent_volume_reclaim_policy.as_deref()) == Some("Delete");
    let phase = volume.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default();
    let deleting = volume.metadata.deletion_timestamp.is_some();
    let ours = volume.finalizers().iter().any(|name| name == PV_FINALIZER);
    match (delete, ours) {
        (true, true) if phase == "Released" => Need::Removal,
        // Never bound, or freed by an admin who now deletes it: nothing says
        // that its data may go. `lvprov gc` will show the logical volume.
        (true, true) if deleting && phase == "Available" => Need::NoFinalizer,
        (false, true) => Need::NoFinalizer,
        (true, false) if !deleting => Need::Finalizer,
        _ => Need::Nothing,
    }
}

/// Brings a PV of ours to where it should be.
///
/// # Errors
/// When the API server cannot be asked or refuses; it is tried again.
pub async fn reconcile(volume: Arc<PersistentVolume>, ctx: Arc<Context>) -> Result<Action, Error> {
    let Some(place) = place_of(&volume) else {
        return Ok(Action::await_change());
    };
    match need(&volume) {
        Need::Nothing => Ok(Action::await_change()),
        Need::Finalizer => {
            let mut finalizers = volume.finalizers().to_vec();
            finalizers.push(PV_FINALIZER.to_owned());
            set_finalizers(&volume, &ctx, finalizers).await
        }
        Need::NoFinalizer => set_finalizers(&volume, &ctx, others(&volume)).await,
        Need::Removal => remove(&volume, &place, &ctx).await,
    }
}

async fn remove(volume: &PersistentVolume, place: &Place, ctx: &Context) -> Result<Action, Error> {
    let name = volume.name_any();
    let api: Api<PersistentVolume> = Api::all(ctx.client.clone());
    // What the watch brought may be old by now, and this step cannot be undone.
    let now = match api.get(&name).await {
        Ok(now) => now,
        Err(error) if is_not_found(&error) => return Ok(Action::await_change()),
        Err(error) => return Err(error).doing(|| format!("read PersistentVolume {name}")),
    };
    if now.uid() != volume.uid() || need(&now) != Need::Removal || place_of(&now).as_ref() != Some(place) {
        return Ok(Action::await_change());
    }
    if still_claimed(&now, ctx).await? {
        let note = "its claim still exists and names it, so its data is kept although it is Released. \
                    Delete the claim, or set the reclaim policy to Retain";
        ctx.events.tell(&now, Reason::VolumeKept, note.to_owned()).await;
        return Ok(Action::requeue(LONGEST_WAIT));
    }
    fault::point("delete-before");
    if let Err(failed) = delete_volume(place, ctx).await {
        if !matches!(failed.again, Again::Soon) {
            ctx.events.tell(&now, failed.reason, failed.note).await;
        }
        return Ok(match failed.again {
            Again::Later => {
                let key = volume.uid().unwrap_or_default();
                Action::requeue(ctx.failures.note(&key, Row::Attempts, &place.topology, LONGEST_WAIT).wait)
            }
            Again::Soon => Action::requeue(SOON),
            Again::WhenTheNodeIsBack => Action::await_change(),
        });
    }
    fault::point("delete-after");
    info!(volume = name, handle = place.handle(), node = place.topology, "removed the volume");
    ctx.failures.clear(&volume.uid().unwrap_or_default());
    delete_object(&now, ctx).await
}

/// Lets a released PV go whose node has gone for good; its logical volume is
/// left behind there.
///
/// # Errors
/// When the API server cannot be asked, or refuses.
pub async fn give_up(volume: &PersistentVolume, place: &Place, ctx: &Context) -> Result<(), Error> {
    let name = volume.name_any();
    let api: Api<PersistentVolume> = Api::all(ctx.client.clone());
    let Some(now) = api.get_opt(&name).await.doing(|| format!("read PersistentVolume {name}"))? else {
        return Ok(());
    };
    let same = now.uid() == volume.uid() && need(&now) == Need::Removal && place_of(&now).as_ref() == Some(place);
    if !same || still_claimed(&now, ctx).await? {
        return Ok(());
    }
    let note = format!(
        "logical volume {} is left behind on node {}, which has been gone for long enough; this PersistentVolume goes \
         without it. If the node comes back, `lvprov gc` lists the volume, and nothing uses it",
        place.handle(),
        place.topology
    );
    warn!(volume = name, handle = place.handle(), node = place.topology, "left behind on a lost node");
    ctx.events.tell(&now, Reason::VolumeLeftBehind, note).await;
    delete_object(&now, ctx).await.map(|_| ())
}

/// Deletes a PV whose volume needs nothing any more.
async fn delete_object(now: &PersistentVolume, ctx: &Context) -> Result<Action, Error> {
    let name = now.name_any();
    let api: Api<PersistentVolume> = Api::all(ctx.client.clone());
    let this_one = DeleteParams {
        preconditions: Some(Preconditions { uid: now.uid(), resource_version: None }),
        ..DeleteParams::default()
    };
    match api.delete(&name, &this_one).await {
        Ok(_) => {}
        Err(error) if is_not_found(&error) => return Ok(Action::await_change()),
        Err(error) => return Err(error).doing(|| format!("delete PersistentVolume {name}")),
    }
    fault::point("pv-delete-after");
    // The deletion has changed the PV's version: read the finalizers again.
    match api.get(&name).await {
        Ok(deleted) => set_finalizers(&deleted, ctx, others(&deleted)).await,
        Err(error) if is_not_found(&error) => Ok(Action::await_change()),
        Err(error) => Err(error).doing(|| format!("read PersistentVolume {name}")),
    }
}

/// Whether the claim that a Released volume was made for is there and says it
/// is bound to it. The controller manager has looked already; what is about to
/// be destroyed is worth a second look.
async fn still_claimed(volume: &PersistentVolume, ctx: &Context) -> Result<bool, Error> {
    let Some(reference) = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref()) else {
        return Ok(false);
    };
    let (Some(namespace), Some(name)) = (&reference.namespace, &reference.name) else {
        return Ok(false);
    };
    let api: Api<PersistentVolumeClaim> = Api::namespaced(ctx.client.clone(), namespace);
    let claim = api.get_opt(name).await.doing(|| format!("read claim {namespace}/{name}"))?;
    Ok(claim.is_some_and(|claim| {
        claim.uid() == reference.uid
            && claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()) == volume.meta().name
    }))
}

/// Why a logical volume is still there, or may be.
pub struct Undeleted {
    /// Of the Event.
    pub reason: Reason,
    /// Its text.
    pub note: String,
    again: Again,
}

enum Again {
    /// Nothing is known yet, so there is nothing to tell.
    Soon,
    Later,
    WhenTheNodeIsBack,
}

/// Has the node remove a logical volume; success also where it is not there.
/// The node looks at its tags, and whether it is in use.
///
/// # Errors
/// When it is not known to be gone.
pub async fn delete_volume(place: &Place, ctx: &Context) -> Result<(), Undeleted> {
    let topology = &place.topology;
    let Some(node) = ctx.nodes.with_topology(topology) else {
        return Err(Undeleted {
            reason: Reason::NodeGone,
            note: format!(
                "the volume is on node {topology}, which has gone. If it comes back, the volume is \
                 removed then; if it never will, remove the finalizer {PV_FINALIZER} from this \
                 PersistentVolume"
            ),
            again: Again::WhenTheNodeIsBack,
        });
    };
    // That it is not there is believed only of the node itself, not of one that
    // has its address by now.
    let known = node.state != State::Connecting;
    let reached = ctx.nodes.reach_up(&node.name).map_err(|unreached| Undeleted {
        reason: Reason::NodeUnreachable,
        note: format!(
            "the volume cannot be removed while the lvprov node service on {} does not answer: {}. \
             Look at its pod: kubectl -n lvprov-system get pods -o wide",
            node.name, unreached.why
        ),
        again: if known { Again::WhenTheNodeIsBack } else { Again::Soon },
    })?;
    let request = DeleteVolumeRequest { volume_id: place.handle(), ..DeleteVolumeRequest::default() };
    let deleted = async {
        let call = call_to(&node.name, request, DELETE_TIMEOUT)?;
        ControllerClient::new(reached.channel).delete_volume(call).await
    };
    let status = match deleted.await {
        Ok(_) => return Ok(()),
        // Gone already, which is all that is wanted.
        Err(status) if status.code() == Code::NotFound => return Ok(()),
        Err(status) => status,
    };
    let said = explain(&status);
    let snapshots = match status.code() {
        Code::FailedPrecondition => snapshot::in_the_way(place, ctx),
        _ => String::new(),
    };
    let note = format!(
        "{} on node {} is not removed yet, which is tried again: {said} ({:?}){snapshots}",
        place.handle(),
        node.name,
        status.code()
    );
    let reason = match status.code() {
        Code::FailedPrecondition => Reason::VolumeInUse,
        // Also PERMISSION_DENIED: it has lost our tags, or is in a group that the node does not serve.
        _ => Reason::VolumeDeleteFailed,
    };
    Err(Undeleted { reason, note, again: Again::Later })
}

fn others(volume: &PersistentVolume) -> Vec<String> {
    let keep = |name: &&String| *name != PV_FINALIZER;
    volume.finalizers().iter().filter(keep).cloned().collect()
}

/// Writes the finalizers, provided that nobody has changed the PV meanwhile.
async fn set_finalizers(volume: &PersistentVolume, ctx: &Context, finalizers: Vec<String>) -> Result<Action, Error> {
    let name = volume.name_any();
    if volume.finalizers() == finalizers {
        return Ok(Action::await_change());
    }
    let patch = json!({"metadata": {
        "resourceVersion": volume.resource_version(),
        "finalizers": finalizers,
    }});
    let api: Api<PersistentVolume> = Api::all(ctx.client.clone());
    match api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await {
        Ok(_) => Ok(Action::await_change()),
        Err(error) if is_not_found(&error) || is_conflict(&error) => Ok(Action::requeue(Duration::from_secs(1))),
        Err(error) => Err(error).doing(|| format!("set the finalizers of PersistentVolume {name}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::object::tests::pv;
    use super::*;

    fn in_phase(policy: &str, phase: &str, finalizer: bool, deleting: bool) -> Need {
        let mut volume = serde_json::to_value(pv(policy, "")).unwrap();
        volume["status"] = json!({"phase": phase});
        volume["metadata"]["finalizers"] = match finalizer {
            true => json!(["kubernetes.io/pv-protection", PV_FINALIZER]),
            false => json!(["kubernetes.io/pv-protection"]),
        };
        if deleting {
            volume["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        need(&serde_json::from_value(volume).unwrap())
    }

    #[test]
    fn only_a_released_pv_under_delete_that_we_guard_is_removed() {
        assert_eq!(in_phase("Delete", "Released", true, false), Need::Removal);
        // An admin has deleted the PV before the claim.
        assert_eq!(in_phase("Delete", "Released", true, true), Need::Removal);
        for phase in ["Bound", "Pending", "Available", "Failed", ""] {
            assert_ne!(in_phase("Delete", phase, true, false), Need::Removal, "{phase}");
            assert_ne!(in_phase("Delete", phase, true, true), Need::Removal, "{phase}");
        }
        for policy in ["Retain", "Recycle"] {
            assert_ne!(in_phase(policy, "Released", true, false), Need::Removal);
            assert_ne!(in_phase(policy, "Released", true, true), Need::Removal);
        }
        // Without our finalizer it may have been dealt with already.
        assert_ne!(in_phase("Delete", "Released", false, false), Need::Removal);
        assert_ne!(in_phase("Delete", "Released", false, true), Need::Removal);
    }

    #[test]
    fn the_finalizer_follows_the_reclaim_policy() {
        assert_eq!(in_phase("Delete", "Bound", false, false), Need::Finalizer);
        assert_eq!(in_phase("Delete", "Bound", true, false), Need::Nothing);
        assert_eq!(in_phase("Retain", "Bound", true, false), Need::NoFinalizer);
        assert_eq!(in_phase("Retain", "Released", true, true), Need::NoFinalizer);
        assert_eq!(in_phase("Retain", "Released", false, false), Need::Nothing);
        // The API server takes no new finalizer on what is being deleted.
        assert_eq!(in_phase("Delete", "Bound", false, true), Need::Nothing);
        assert_eq!(in_phase("Delete", "Bound", true, true), Need::Nothing);
        assert_eq!(in_phase("Delete", "Available", true, true), Need::NoFinalizer);
    }
}
