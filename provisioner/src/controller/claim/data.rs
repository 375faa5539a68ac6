//! Where the data are that a claim asks for, or why it cannot have them.

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt};
use lvprov_proto::csi::VolumeContentSource;
use lvprov_proto::csi::volume_content_source::{SnapshotSource, Type, VolumeSource};

use crate::controller::context::Context;
use crate::controller::error::{Doing, Error, is_forbidden, is_not_found};
use crate::controller::quantity::storage_of;
use crate::controller::snapshot::types::{VolumeSnapshot, VolumeSnapshotContent};
use crate::controller::snapshot::{Handle, Presence};
use crate::controller::validate::{Data, Request, Source};
use crate::controller::volume::{Place, place_of, source_of};
use crate::names::DRIVER;

/// Data that can be had now.
#[derive(Debug)]
pub(super) struct Found {
    /// Where they are.
    pub place: Place,
    /// A volume needs at least so much for them.
    pub bytes: u64,
    /// For the node.
    pub source: VolumeContentSource,
    /// Of a snapshot.
    pub content: Option<VolumeSnapshotContent>,
}

/// Why there are none.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unfound {
    /// Claim and source do not go together.
    Refused(String),
    /// Not yet, or not any more.
    NotYet(String),
}

type Outcome = Result<Result<Found, Unfound>, Error>;

fn refuse(why: String) -> Outcome {
    Ok(Err(Unfound::Refused(why)))
}

fn not_yet(why: String) -> Outcome {
    Ok(Err(Unfound::NotYet(why)))
}

/// Looks for a claim's data.
pub(super) async fn find(claim: &PersistentVolumeClaim, request: &Request, data: &Data, ctx: &Context) -> Outcome {
    match data {
        Data::Snapshot(name) => of_snapshot(claim, request, name, ctx).await,
        Data::Claim(name) => Ok(of_claim(claim, request, name, ctx)),
    }
}

fn mode(block: bool) -> &'static str {
    if block { "Block" } else { "Filesystem" }
}

fn other_mode(what: &str, has: &str, request: &Request) -> Unfound {
    Unfound::Refused(format!(
        "{what} is of volumeMode {has}, and the claim has volumeMode {}: what a pod has written to a device is never mounted, \
         nor the other way round. Delete the claim and make it again with volumeMode: {has}",
        mode(request.block)
    ))
}

async fn of_snapshot(claim: &PersistentVolumeClaim, request: &Request, name: &str, ctx: &Context) -> Outcome {
    let presence = ctx.snapshots.presence();
    if presence != Presence::There {
        return not_yet(format!("VolumeSnapshot {name} cannot be read: {presence}"));
    }
    let namespace = claim.namespace().unwrap_or_default();
    let api: Api<VolumeSnapshot> = Api::namespaced(ctx.client.clone(), &namespace);
    let snapshot = match api.get(name).await {
        Ok(snapshot) => snapshot,
        Err(error) if is_not_found(&error) => {
            return not_yet(format!("there is no VolumeSnapshot {namespace}/{name}. Make it, or delete the claim"));
        }
        Err(error) if is_forbidden(&error) => {
            return not_yet(format!("VolumeSnapshot {name} cannot be read: {}", Presence::Forbidden));
        }
        Err(error) => return Err(error).doing(|| format!("read VolumeSnapshot {namespace}/{name}")),
    };
    if snapshot.metadata.deletion_timestamp.is_some() {
        return not_yet(format!("VolumeSnapshot {name} is being deleted"));
    }
    let status = snapshot.status.clone().unwrap_or_default();
    let (Some(content_name), Some(true)) = (&status.bound_volume_snapshot_content_name, status.ready_to_use) else {
        let why = status.error.and_then(|error| error.message).map(|why| format!(": {why}")).unwrap_or_default();
        return not_yet(format!("VolumeSnapshot {name} is not ready to use{why}"));
    };
    let api: Api<VolumeSnapshotContent> = Api::all(ctx.client.clone());
    let content = api.get_opt(content_name).await.doing(|| format!("read VolumeSnapshotContent {content_name}"))?;
    let Some(content) = content else {
        return not_yet(format!("VolumeSnapshotContent {content_name} of VolumeSnapshot {name} has gone"));
    };
    if content.spec.driver != DRIVER {
        return refuse(format!(
            "VolumeSnapshot {name} is of driver {}, and its class makes volumes of {DRIVER}. Use a StorageClass of that \
             driver",
            content.spec.driver
        ));
    }
    let reference = &content.spec.volume_snapshot_ref;
    let is_its = reference.uid.as_deref().is_some_and(|uid| Some(uid) == snapshot.uid().as_deref())
        && reference.name.as_deref() == Some(name)
        && reference.namespace.as_deref() == Some(namespace.as_str());
    if !is_its {
        return refuse(format!(
            "VolumeSnapshotContent {content_name} is not bound to VolumeSnapshot {namespace}/{name} (UID {}), but to {}/{} \
             (UID {})",
            snapshot.uid().unwrap_or_default(),
            reference.namespace.as_deref().unwrap_or_default(),
            reference.name.as_deref().unwrap_or_default(),
            reference.uid.as_deref().unwrap_or_default()
        ));
    }
    if content.metadata.deletion_timestamp.is_some() {
        return not_yet(format!("VolumeSnapshotContent {content_name} is being deleted"));
    }
    let (Some(text), true) = (content.handle(), content.is_ready()) else {
        let why = content.error().map(|why| format!(": {why}")).unwrap_or_default();
        return not_yet(format!("VolumeSnapshot {name} is not ready to use{why}"));
    };
    let handle: Handle = match text.parse() {
        Ok(handle) => handle,
        Err(error) => return refuse(format!("VolumeSnapshot {name}: {error}")),
    };
    if let Some(has) = content.spec.source_volume_mode.as_deref().filter(|has| *has != mode(request.block)) {
        return Ok(Err(other_mode(&format!("VolumeSnapshot {name}"), has, request)));
    }
    let size = content.status.as_ref().and_then(|status| status.restore_size).unwrap_or_default();
    let source = Type::Snapshot(SnapshotSource { snapshot_id: handle.to_string() });
    Ok(Ok(Found {
        place: handle.0,
        bytes: u64::try_from(size).unwrap_or_default(),
        source: VolumeContentSource { r#type: Some(source) },
        content: Some(content),
    }))
}

/// By what the watches have brought, of which none is younger than the claim.
fn of_claim(claim: &PersistentVolumeClaim, request: &Request, name: &str, ctx: &Context) -> Result<Found, Unfound> {
    let namespace = claim.namespace().unwrap_or_default();
    let Some(source) = ctx.claims.get(&ObjectRef::new(name).within(&namespace)) else {
        return Err(Unfound::NotYet(format!("there is no claim {namespace}/{name}. Make it, or delete this one")));
    };
    if source.metadata.deletion_timestamp.is_some() {
        return Err(Unfound::NotYet(format!("claim {name} is being deleted")));
    }
    let bound = source.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound");
    let volume_name = source.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).filter(|_| bound);
    let Some(volume_name) = volume_name else {
        return Err(Unfound::NotYet(format!("claim {name} has no volume yet, so there is nothing to copy")));
    };
    let is_its = |volume: &PersistentVolume| {
        volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref()).is_some_and(|it| it.uid == source.uid())
    };
    let Some(volume) = ctx.volumes.get(&ObjectRef::new(volume_name)) else {
        return Err(Unfound::NotYet(format!("PersistentVolume {volume_name} of claim {name} has gone")));
    };
    let Some(place) = place_of(&volume) else {
        return Err(Unfound::Refused(format!(
            "claim {name} has PersistentVolume {volume_name}, which is not of lvprov, and so cannot be copied by it. Use a \
             StorageClass of the driver that made it"
        )));
    };
    if !is_its(&volume) {
        return Err(Unfound::NotYet(format!("PersistentVolume {volume_name} is not bound to claim {name}")));
    }
    if source_of(&volume) != Source::Csi {
        return Err(Unfound::Refused(format!(
            "claim {name} has a FlexVolume, and Kubernetes has no clones of those. Copy its files with a pod that has both \
             claims, this one made again without spec.dataSource; claims of a class with source: csi can be cloned"
        )));
    }
    let spec = volume.spec.as_ref();
    let has = spec.and_then(|spec| spec.volume_mode.as_deref()).unwrap_or("Filesystem");
    if has != mode(request.block) {
        return Err(other_mode(&format!("claim {name}"), has, request));
    }
    let bytes = storage_of(spec.and_then(|spec| spec.capacity.as_ref())).ok().flatten().unwrap_or_default();
    let source = Type::Volume(VolumeSource { volume_id: place.handle() });
    Ok(Found { place, bytes, source: VolumeContentSource { r#type: Some(source) }, content: None })
}
