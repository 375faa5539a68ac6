//! What a node is asked for, and what it must have answered.

use std::collections::HashMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::ResourceExt;
use lvm::fault;
use lvprov_proto::csi::controller_client::ControllerClient;
use lvprov_proto::csi::volume_capability::access_mode::Mode;
use lvprov_proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use lvprov_proto::csi::{
    CapacityRange, CreateVolumeRequest, Topology, TopologyRequirement, VolumeCapability, VolumeContentSource,
};
use tonic::Status;

use crate::controller::context::Context;
use crate::controller::error::Error;
use crate::controller::names::volume_of;
use crate::controller::nodes::{Reached, call_to};
use crate::controller::validate::{Request, Source};
use crate::controller::volume::Made;
use crate::names::{TOPOLOGY_NODE, context, parameters};

/// For one call that makes a logical volume.
const CREATE_TIMEOUT: Duration = Duration::from_secs(60);

/// The inner result is the node's answer; `source`: what is to be in it.
pub(super) async fn create(
    claim: &PersistentVolumeClaim,
    request: &Request,
    source: Option<&VolumeContentSource>,
    node: &str,
    reached: &Reached,
    ctx: &Context,
) -> Result<Result<Made, Status>, Error> {
    let mut message = create_request(claim, request, &reached.topology, &ctx.cluster);
    message.volume_content_source = source.cloned();
    let answer = async {
        let call = call_to(node, message, CREATE_TIMEOUT)?;
        ControllerClient::new(reached.channel.clone()).create_volume(call).await
    };
    fault::point("create-before");
    let answer = answer.await;
    fault::point("create-after");
    let volume = match answer {
        Ok(answer) => answer.into_inner().volume.unwrap_or_default(),
        Err(status) => return Ok(Err(status)),
    };
    let wrong = |what: String| Error::Answer { node: node.to_owned(), what };
    let (volume_group, logical_volume) =
        volume.volume_id.split_once('/').filter(|(group, _)| request.volume_group.may_be(group)).ok_or_else(|| {
            wrong(format!("was asked for a volume in {} and made {:?}", request.volume_group, volume.volume_id))
        })?;
    let bytes = u64::try_from(volume.capacity_bytes)
        .ok()
        .filter(|bytes| *bytes >= request.bytes)
        .ok_or_else(|| wrong(format!("was asked for {} bytes and made {}", request.bytes, volume.capacity_bytes)))?;
    // A node service that knows of no sources makes an empty volume.
    if volume.content_source.as_ref() != source {
        return Err(wrong(format!("made {} and does not say what is in it", volume.volume_id)));
    }
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
        (parameters::FS_TYPE, request.fs_type.to_string()),
        (parameters::PVC_NAME, claim.name_any()),
        (parameters::PVC_NAMESPACE, claim.namespace().unwrap_or_default()),
        (parameters::PV_NAME, name.clone()),
        (parameters::CLAIM_UID, uid),
        (parameters::CLUSTER, cluster.to_owned()),
    ];
    let more = [
        (parameters::DELETE_POLICY, request.end.delete_policy()),
        (parameters::TRASH_TIME, request.end.trash_time()),
        (parameters::CLASS, request.end.class()),
    ];
    let parameters = parameters.into_iter().chain(more.into_iter().filter_map(|(key, value)| Some((key, value?))));
    let access = match request.block {
        true => AccessType::Block(BlockVolume {}),
        false => AccessType::Mount(MountVolume {
            fs_type: request.fs_type.to_string(),
            mount_flags: request.mount_flags(),
            ..MountVolume::default()
        }),
    };
    CreateVolumeRequest {
        name,
        capacity_range: Some(CapacityRange {
            required_bytes: i64::try_from(request.bytes).unwrap_or(i64::MAX),
            limit_bytes: 0,
        }),
        volume_capabilities: vec![VolumeCapability {
            access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
            access_type: Some(access),
        }],
        parameters: parameters
            .into_iter()
            .chain(request.layout.to_parameters())
            .chain(request.volume_group.to_parameter())
            .map(|(key, value)| (key.to_owned(), value))
            .collect(),
        accessibility_requirements: Some(TopologyRequirement { requisite: vec![here.clone()], preferred: vec![here] }),
        ..CreateVolumeRequest::default()
    }
}
