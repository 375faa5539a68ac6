//! Makes the driver known to kubelet.
//!
//! kubelet watches a directory for sockets and asks each who is behind it. As
//! long as the socket is there, the driver stands in the node's CSINode object.

use std::path::Path;

use lvprov_proto::pluginregistration::registration_server::Registration;
use lvprov_proto::pluginregistration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};
use tonic::{Request, Response, Status};
use tracing::{error, info};

use crate::names::DRIVER;

/// Answers kubelet's plugin watcher.
#[derive(Debug, Clone)]
pub struct RegistrationService {
    endpoint: String,
}

impl RegistrationService {
    /// `endpoint`: the CSI socket, as kubelet sees it.
    pub fn new(endpoint: &Path) -> Self {
        Self { endpoint: endpoint.display().to_string() }
    }
}

#[tonic::async_trait]
impl Registration for RegistrationService {
    async fn get_info(&self, _request: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: DRIVER.to_owned(),
            endpoint: self.endpoint.clone(),
            // The first digit is all that kubelet compares.
            supported_versions: vec!["1.0.0".to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        if status.plugin_registered {
            info!(driver = DRIVER, "kubelet has registered the driver");
        } else {
            // kubelet tries again by itself.
            error!(driver = DRIVER, reason = status.error, "kubelet refused to register the driver");
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
