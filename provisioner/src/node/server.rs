//! Serves the services: to the controller over mutual TLS, to kubelet over unix
//! sockets. Metrics have a port of their own, where others are let in too.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lvm::Lvm;
use lvm::trouble::Notes;
use lvprov_proto::csi::controller_server::ControllerServer;
use lvprov_proto::csi::identity_server::IdentityServer;
use lvprov_proto::csi::node_server::NodeServer;
use lvprov_proto::lvprov::node_admin_server::NodeAdminServer;
use lvprov_proto::pluginregistration::registration_server::RegistrationServer;
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::{Error, Server};
use tracing::debug;

use super::admin_service::AdminService;
use super::capacity::Capacity;
use super::controller_service::ControllerService;
use super::csi_node::NodeService;
use super::diagnosis;
use super::identity::IdentityService;
use super::in_progress::InProgress;
use super::incoming::{Connection, connections, connections_but};
use super::inventory::PodsDirectory;
use super::metrics::Metrics;
use super::registration::RegistrationService;
use super::served::Served;
use super::trouble::Failing;
use super::wiper::Wiper;
use crate::reports;
use crate::tls::TlsDirectory;

/// A peer that does not answer for this long is asked whether it lives…
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// …and given up after this long: its streams and their tasks go.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// After this time a connection takes no more calls, and its peer connects
/// anew, with the certificate that it has by then. The controller does so
/// earlier by itself.
pub const LONGEST_CONNECTION: Duration = Duration::from_secs(3600);

/// Who serves over TLS, and to whom.
#[derive(Debug, Clone)]
pub struct Tls {
    /// Own certificate, and whom to trust.
    pub files: Arc<TlsDirectory>,
    /// How long a connection is used; [`LONGEST_CONNECTION`] but in tests.
    pub longest_connection: Duration,
}

/// What all services of one node share.
#[derive(Debug, Clone)]
pub struct Shared {
    /// Name of the Kubernetes node.
    pub node_name: String,
    /// LVM on this node.
    pub lvm: Arc<Lvm>,
    /// Groups that may be touched.
    pub served: Served,
    /// Where kubelet keeps its pods.
    pub pods: PodsDirectory,
    /// What the groups hold.
    pub capacity: Capacity,
    /// Unmounts that keep failing…
    pub failing: Failing,
    /// …and the notes that tell of them.
    pub notes: Notes,
    /// What is being done.
    pub in_progress: Arc<InProgress>,
    /// What is being overwritten.
    pub wiper: Wiper,
}

/// Serves the controller until `stop`, then ends once every call has.
///
/// # Errors
/// When the socket fails.
pub async fn serve_controller(
    shared: Shared,
    listener: TcpListener,
    tls: Tls,
    stop: CancellationToken,
) -> Result<(), Error> {
    let Shared { node_name, lvm, served, pods, capacity, failing, in_progress, wiper, .. } = shared;
    let controller = ControllerService::new(
        &node_name,
        Arc::clone(&lvm),
        served.clone(),
        capacity.clone(),
        Arc::clone(&in_progress),
        wiper.clone(),
    );
    let report = {
        let (capacity, failing, stop) = (capacity.clone(), failing.clone(), stop.clone());
        move |connection: Connection| {
            let (reports, stop) = (capacity.reports(failing.clone()), stop.clone());
            tokio::spawn(async move {
                let sent = tokio::select! {
                    sent = reports::send(connection, reports) => sent,
                    () = stop.cancelled() => Ok(()),
                };
                if let Err(error) = sent {
                    debug!(%error, "who listened to reports has gone");
                }
            });
        }
    };
    let admin = AdminService::new(&node_name, lvm, served, pods, capacity.clone(), failing, in_progress, wiper);
    let Tls { files, longest_connection } = tls;
    let connections = connections_but(listener, longest_connection, move || files.now().server_config(), report);
    Server::builder()
        .max_connection_age(longest_connection)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_service(IdentityServer::new(IdentityService::new(capacity)))
        .add_service(ControllerServer::new(controller))
        .add_service(NodeAdminServer::new(admin))
        .serve_with_incoming_shutdown(connections, stop.cancelled_owned())
        .await
}

/// Serves metrics until `stop`, then ends once every reader has its answer.
///
/// # Errors
/// When the socket fails.
pub async fn serve_metrics(
    shared: Shared,
    listener: TcpListener,
    tls: Tls,
    stop: CancellationToken,
) -> Result<(), Error> {
    let Shared { node_name, lvm, served, pods, capacity, notes, wiper, .. } = shared;
    let scope = diagnosis::scope(&served, &pods);
    let Tls { files, longest_connection } = tls;
    let metrics = Metrics::new(&node_name, lvm, served, capacity, notes)
        .with_findings(scope)
        .with_certificates(Arc::clone(&files))
        .with_wiper(wiper);
    let connections = connections(listener, longest_connection, move || files.now().metrics_config());
    Server::builder()
        .max_connection_age(longest_connection)
        // Not every reader speaks HTTP/2.
        .accept_http1(true)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_routes(Routes::from(metrics.router()))
        .serve_with_incoming_shutdown(connections, stop.cancelled_owned())
        .await
}

/// Serves CSI to kubelet until `stop`.
///
/// # Errors
/// When the socket fails.
pub async fn serve_kubelet(shared: Shared, listener: UnixListener, stop: CancellationToken) -> Result<(), Error> {
    Server::builder()
        .add_service(IdentityServer::new(IdentityService::new(shared.capacity.clone())))
        .add_service(NodeServer::new(NodeService::new(
            &shared.node_name,
            Arc::clone(&shared.lvm),
            shared.served.clone(),
        )))
        // Only root gets at this socket, and root has lvm itself.
        .add_service(ControllerServer::new(ControllerService::new(
            &shared.node_name,
            shared.lvm,
            shared.served,
            shared.capacity,
            shared.in_progress,
            shared.wiper,
        )))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.cancelled_owned())
        .await
}

/// Makes the driver known to kubelet until `stop`; `csi` is the socket that
/// [`serve_kubelet`] listens on.
///
/// # Errors
/// When the socket fails.
pub async fn serve_registration(csi: &Path, listener: UnixListener, stop: CancellationToken) -> Result<(), Error> {
    Server::builder()
        .add_service(RegistrationServer::new(RegistrationService::new(csi)))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.cancelled_owned())
        .await
}
