//! A snapshot is taken.

use std::collections::HashMap;

use kube::api::Api;
use kube::{Resource, ResourceExt};
use lvm::fault;
use lvprov_proto::csi::CreateSnapshotRequest;
use lvprov_proto::csi::controller_client::ControllerClient;
use tracing::info;

use super::types::{VolumeSnapshotClass, VolumeSnapshotContent};
use super::{CALL_TIMEOUT, Failed, SOON, Silent, ask, note_creation, record, volume_with};
use crate::controller::context::Context;
use crate::controller::error::{Doing, Error, Row};
use crate::controller::nodes::call_to;
use crate::controller::queue::Action;
use crate::controller::volume::Place;
use crate::names::parameters;

/// Parameters of a VolumeSnapshotClass that are the snapshot-controller's, or
/// the secrets that this driver has no use for.
const NOT_THE_NODES: &str = "csi.storage.k8s.io/";

/// Has the volume's node take the snapshot of a content. A call that was cut off
/// is made again: the node knows the snapshot by its name.
pub(super) async fn create(content: &VolumeSnapshotContent, ctx: &Context) -> Result<Action, Error> {
    let uid = content.uid().unwrap_or_default();
    // The failure itself has changed the content.
    if let Some(left) = ctx.failures.left(&uid, Row::Attempts) {
        return Ok(Action::requeue(left));
    }
    let handle = content.spec.source.volume_handle.clone().unwrap_or_default();
    let Some(place) = volume_with(&handle, ctx) else {
        let note = format!(
            "no PersistentVolume of lvprov has the volume {handle}: its claim was deleted before the snapshot was taken. \
             Delete the VolumeSnapshot"
        );
        return record::fail(content, Failed::finally(note), ctx).await;
    };
    let parameters = match parameters_of(content, ctx).await? {
        Ok(parameters) => parameters,
        Err(note) => return record::fail(content, Failed::finally(note), ctx).await,
    };
    let asked = match ask(&place.topology, ctx) {
        Ok(asked) => asked,
        Err(Silent::Soon) => return Ok(Action::requeue(SOON)),
        // What an earlier call has made there is not known.
        Err(Silent::Told(reason, note)) => {
            let failed = Failed { reason, is_final: false, ..Failed::finally(note) };
            return record::fail(content, failed, ctx).await;
        }
    };
    let Some(content) = note_creation(content, true, ctx).await? else {
        return Ok(Action::await_change());
    };
    let reference = &content.spec.volume_snapshot_ref;
    let request = CreateSnapshotRequest {
        source_volume_id: handle.clone(),
        name: format!("snapshot-{}", reference.uid.as_deref().unwrap_or_default()),
        parameters: parameters
            .into_iter()
            .chain([
                (parameters::SNAPSHOT_NAME.to_owned(), reference.name.clone().unwrap_or_default()),
                (parameters::SNAPSHOT_NAMESPACE.to_owned(), reference.namespace.clone().unwrap_or_default()),
                (parameters::SNAPSHOT_CONTENT_NAME.to_owned(), content.name_any()),
                (parameters::CLUSTER.to_owned(), ctx.cluster.clone()),
            ])
            .collect(),
        ..CreateSnapshotRequest::default()
    };
    fault::point("snapshot-call-before");
    let answer = async {
        let call = call_to(&asked.node, request, CALL_TIMEOUT)?;
        ControllerClient::new(asked.reached.channel.clone()).create_snapshot(call).await
    };
    let answer = answer.await;
    fault::point("snapshot-call-after");
    let snapshot = match answer {
        Ok(answer) => answer.into_inner().snapshot.unwrap_or_default(),
        Err(status) => {
            let failed = Failed::said(&asked.node, &format!("could not take a snapshot of {handle}"), &status);
            return record::fail(&content, failed, ctx).await;
        }
    };
    let told = record::Told::of(&asked.node, snapshot, |it: &Place| {
        it.topology == place.topology && it.volume_group == place.volume_group
    })?;
    info!(
        content = content.name_any(),
        volume = handle,
        node = asked.node,
        snapshot = %told.handle,
        ready = told.ready,
        "took a snapshot"
    );
    record::record(&content, &told, ctx).await
}

/// What the content's class says to nodes. The inner error is for users.
async fn parameters_of(
    content: &VolumeSnapshotContent,
    ctx: &Context,
) -> Result<Result<HashMap<String, String>, String>, Error> {
    let kind = VolumeSnapshotClass::kind(&());
    let Some(name) = &content.spec.volume_snapshot_class_name else {
        return Ok(Err(format!("VolumeSnapshotContent {} names no {kind}", content.name_any())));
    };
    let api: Api<VolumeSnapshotClass> = Api::all(ctx.client.clone());
    let class = api.get_opt(name).await.doing(|| format!("read {kind} {name}"))?;
    let Some(class) = class else {
        return Ok(Err(format!("{kind} {name} has gone. Make it again, or delete the VolumeSnapshot")));
    };
    let all = class.parameters.unwrap_or_default();
    Ok(Ok(all.into_iter().filter(|(key, _)| !key.starts_with(NOT_THE_NODES)).collect()))
}
