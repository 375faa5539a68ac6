//! The CSI Node service, for kubelet.
//!
//! So far it only says where this node is: volumes are mounted through the
//! FlexVolume driver, so nothing else is served and nothing else claimed.
//! kubelet makes the node's topology label from the answer.

use std::collections::HashMap;

use lvprov_proto::csi::node_server::Node;
use lvprov_proto::csi::{
    NodeExpandVolumeRequest, NodeExpandVolumeResponse, NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse,
    NodeGetInfoRequest, NodeGetInfoResponse, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeStageVolumeRequest, NodeStageVolumeResponse,
    NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse, NodeUnstageVolumeRequest, NodeUnstageVolumeResponse,
    Topology,
};
use tonic::{Request, Response, Status};

use crate::names::{FLEX_DRIVER, TOPOLOGY_NODE};

/// Answers kubelet.
#[derive(Debug, Clone)]
pub struct NodeService {
    node_name: String,
}

impl NodeService {
    /// For the Kubernetes node of this name.
    pub fn new(node_name: String) -> Self {
        Self { node_name }
    }
}

/// The segments that say "on this node".
pub(super) fn topology(node_name: &str) -> Topology {
    Topology { segments: HashMap::from([(TOPOLOGY_NODE.to_owned(), node_name.to_owned())]) }
}

/// For every call that is not served: it stands in the pod's Events.
fn through_flex_volume(call: &str) -> Status {
    Status::unimplemented(format!(
        "{call} is not served: volumes of this driver are mounted through the FlexVolume driver {FLEX_DRIVER}"
    ))
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn node_get_info(
        &self,
        _request: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        Ok(Response::new(NodeGetInfoResponse {
            node_id: self.node_name.clone(),
            // What a volume group can hold is a matter of bytes, not of number.
            max_volumes_per_node: 0,
            accessible_topology: Some(topology(&self.node_name)),
        }))
    }

    async fn node_get_capabilities(
        &self,
        _request: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities: Vec::new() }))
    }

    async fn node_stage_volume(
        &self,
        _request: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        Err(through_flex_volume("NodeStageVolume"))
    }

    async fn node_unstage_volume(
        &self,
        _request: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        Err(through_flex_volume("NodeUnstageVolume"))
    }

    async fn node_publish_volume(
        &self,
        _request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        Err(through_flex_volume("NodePublishVolume"))
    }

    async fn node_unpublish_volume(
        &self,
        _request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        Err(through_flex_volume("NodeUnpublishVolume"))
    }

    async fn node_get_volume_stats(
        &self,
        _request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        Err(through_flex_volume("NodeGetVolumeStats"))
    }

    async fn node_expand_volume(
        &self,
        _request: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        Err(through_flex_volume("NodeExpandVolume"))
    }
}
