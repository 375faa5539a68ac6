//! The CSI Identity service, the same on every socket.

use lvprov_proto::csi::identity_server::Identity;
use lvprov_proto::csi::plugin_capability::service::Type;
use lvprov_proto::csi::plugin_capability::volume_expansion::Type as Growth;
use lvprov_proto::csi::plugin_capability::{self, Service, VolumeExpansion};
use lvprov_proto::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    PluginCapability, ProbeRequest, ProbeResponse,
};
use tonic::{Request, Response, Status};

use super::capacity::Capacity;
use crate::names::DRIVER;

/// Says who we are, and whether LVM answers.
#[derive(Debug, Clone)]
pub struct IdentityService {
    capacity: Capacity,
}

impl IdentityService {
    /// `capacity` knows whether LVM has ever answered.
    pub fn new(capacity: Capacity) -> Self {
        Self { capacity }
    }
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _request: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: DRIVER.to_owned(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            manifest: Default::default(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _request: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let capability = |kind: Type| PluginCapability {
            r#type: Some(plugin_capability::Type::Service(Service { r#type: kind.into() })),
        };
        Ok(Response::new(GetPluginCapabilitiesResponse {
            capabilities: vec![
                capability(Type::ControllerService),
                capability(Type::VolumeAccessibilityConstraints),
                PluginCapability {
                    r#type: Some(plugin_capability::Type::VolumeExpansion(VolumeExpansion {
                        r#type: Growth::Online.into(),
                    })),
                },
            ],
        }))
    }

    async fn probe(&self, _request: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        Ok(Response::new(ProbeResponse { ready: Some(self.capacity.latest().is_some()) }))
    }
}
