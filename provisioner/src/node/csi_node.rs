//! The CSI Node service, for kubelet.
//!
//! Nothing is staged: each pod gets a mount of its own, straight from the
//! device, as through the FlexVolume driver and by the same code. kubelet makes
//! the node's topology label from NodeGetInfo.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use lvm::Lvm;
use lvprov_proto::csi::node_server::Node;
use lvprov_proto::csi::node_service_capability::rpc::Type;
use lvprov_proto::csi::node_service_capability::{self, Rpc};
use lvprov_proto::csi::{self, NodeServiceCapability, Topology};
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use super::in_progress::InProgress;
use super::publish::{self, NodeCallError, Published};
use super::served::Served;
use crate::names::TOPOLOGY_NODE;

/// Answers kubelet.
#[derive(Debug, Clone)]
pub struct NodeService {
    node_name: Arc<str>,
    lvm: Arc<Lvm>,
    served: Served,
    in_progress: Arc<InProgress>,
}

impl NodeService {
    /// For the Kubernetes node of this name.
    pub fn new(node_name: &str, lvm: Arc<Lvm>, served: Served) -> Self {
        Self { node_name: node_name.into(), lvm, served, in_progress: Arc::default() }
    }

    /// Does something at a path that nothing else is being done at, where it may
    /// block. It goes on to its end, also when the call is cancelled.
    async fn at<T: Send + 'static>(
        &self,
        call: &'static str,
        volume: &str,
        path: &str,
        work: impl FnOnce(&Lvm, PathBuf) -> Result<T, NodeCallError> + Send + 'static,
    ) -> Result<T, Status> {
        let started = Instant::now();
        let result = async {
            let path = publish::path(path)?;
            let operation = self.in_progress.begin(&path.to_string_lossy())?;
            let lvm = Arc::clone(&self.lvm);
            tokio::task::spawn_blocking(move || {
                let _held = operation;
                work(&lvm, path)
            })
            .await
            .map_err(|error| NodeCallError::Interrupted(error.to_string()))?
        }
        .await;
        let ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        match &result {
            Ok(_) => info!(call, volume, path, ms),
            Err(error) => warn!(call, volume, path, ms, %error),
        }
        Ok(result?)
    }
}

/// The segments that say "on this node".
pub(super) fn topology(node_name: &str) -> Topology {
    Topology { segments: HashMap::from([(TOPOLOGY_NODE.to_owned(), node_name.to_owned())]) }
}

/// CSI wants a name for everything that a call is about.
fn needed(what: &'static str, value: &str) -> Result<(), NodeCallError> {
    if value.is_empty() { Err(NodeCallError::Missing(what)) } else { Ok(()) }
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn node_get_info(
        &self,
        _request: Request<csi::NodeGetInfoRequest>,
    ) -> Result<Response<csi::NodeGetInfoResponse>, Status> {
        Ok(Response::new(csi::NodeGetInfoResponse {
            node_id: self.node_name.to_string(),
            // What a volume group can hold is a matter of bytes, not of number.
            max_volumes_per_node: 0,
            accessible_topology: Some(topology(&self.node_name)),
        }))
    }

    async fn node_get_capabilities(
        &self,
        _request: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<csi::NodeGetCapabilitiesResponse>, Status> {
        let capability = |kind: Type| NodeServiceCapability {
            r#type: Some(node_service_capability::Type::Rpc(Rpc { r#type: kind.into() })),
        };
        Ok(Response::new(csi::NodeGetCapabilitiesResponse {
            capabilities: [Type::GetVolumeStats, Type::ExpandVolume, Type::SingleNodeMultiWriter]
                .map(capability)
                .to_vec(),
        }))
    }

    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Result<Response<csi::NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        needed("volume_id", &request.volume_id)?;
        needed("target_path", &request.target_path)?;
        let published = Published::parse(&request, &self.served)?;
        let node_name = Arc::clone(&self.node_name);
        self.at("NodePublishVolume", &request.volume_id, &request.target_path, move |lvm, target| {
            published.publish(lvm, target, &node_name)
        })
        .await?;
        Ok(Response::new(csi::NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<csi::NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        needed("volume_id", &request.volume_id)?;
        needed("target_path", &request.target_path)?;
        self.at("NodeUnpublishVolume", &request.volume_id, &request.target_path, publish::unpublish).await?;
        Ok(Response::new(csi::NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<csi::NodeGetVolumeStatsRequest>,
    ) -> Result<Response<csi::NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        needed("volume_id", &request.volume_id)?;
        needed("volume_path", &request.volume_path)?;
        // Where nothing can be mounted, nothing is: CSI wants NOT_FOUND.
        let path = publish::path(&request.volume_path).map_err(|_| NodeCallError::NotMounted {
            volume: request.volume_id.chars().take(200).collect(),
            path: request.volume_path.chars().take(200).collect(),
        })?;
        let id = request.volume_id;
        let usage = tokio::task::spawn_blocking(move || publish::usage(&id, &path))
            .await
            .map_err(|error| NodeCallError::Interrupted(error.to_string()))??;
        Ok(Response::new(csi::NodeGetVolumeStatsResponse { usage }))
    }

    async fn node_expand_volume(
        &self,
        request: Request<csi::NodeExpandVolumeRequest>,
    ) -> Result<Response<csi::NodeExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        needed("volume_id", &request.volume_id)?;
        needed("volume_path", &request.volume_path)?;
        let (id, size) = publish::parse_expand(&request)?;
        let capacity = self
            .at("NodeExpandVolume", &request.volume_id, &request.volume_path, move |lvm, path| {
                publish::expand(lvm, &id, &path, size)
            })
            .await?;
        Ok(Response::new(csi::NodeExpandVolumeResponse { capacity_bytes: capacity }))
    }

    async fn node_stage_volume(
        &self,
        _request: Request<csi::NodeStageVolumeRequest>,
    ) -> Result<Response<csi::NodeStageVolumeResponse>, Status> {
        Err(Status::unimplemented("nothing is staged: see NodeGetCapabilities"))
    }

    async fn node_unstage_volume(
        &self,
        _request: Request<csi::NodeUnstageVolumeRequest>,
    ) -> Result<Response<csi::NodeUnstageVolumeResponse>, Status> {
        Err(Status::unimplemented("nothing is staged: see NodeGetCapabilities"))
    }
}
