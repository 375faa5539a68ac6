//! Connections to node services, calls on them, and what a status of one says.

use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tower::service_fn;

use crate::names::{MEANT_NODE, NODE_SERVER_NAME};
use crate::tls::TlsDirectory;
use crate::with_causes;
use crate::x509::{self, Validity};

/// For a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A node that answers no ping for so long is cut off.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// A status in words. What tonic says of a broken connection is in its causes.
pub fn explain(status: &Status) -> String {
    match std::error::Error::source(status) {
        Some(cause) => {
            let text = with_causes(cause);
            match about_certificates(&text) {
                Some(what) => what.to_owned(),
                None => text,
            }
        }
        None => status.message().to_owned(),
    }
}

/// What can be said better of a refused certificate. By its text: between
/// rustls and here are layers that keep nothing else.
fn about_certificates(text: &str) -> Option<&'static str> {
    let says = |what: &[&str]| what.iter().any(|what| text.contains(what));
    if says(&["invalid peer certificate: certificate expired", "invalid peer certificate: certificate not valid yet"]) {
        return Some(
            "the node's certificate has expired (or its clock or ours is wrong); the node is called again until it has \
             read the renewed one from its Secret lvprov-node-tls",
        );
    }
    if says(&["invalid peer certificate: UnknownIssuer", "invalid peer certificate: BadSignature"]) {
        return Some(
            "the node's certificate is of no authority in the controller's Secret lvprov-controller-tls; the node is \
             called again until both have read Secrets that belong together",
        );
    }
    if says(&["received fatal alert: CertificateExpired"]) {
        return Some(
            "the node says that the controller's certificate has expired (or its clock or ours is wrong); the node is \
             called again until the controller has read the renewed one from its Secret lvprov-controller-tls",
        );
    }
    says(&["received fatal alert: UnknownCA", "received fatal alert: DecryptError"]).then_some(
        "the controller's certificate is of no authority in the node's Secret lvprov-node-tls; the node is called again \
         until both have read Secrets that belong together",
    )
}

/// Whether the node has said it. A status with a cause is one that was made of
/// what happened to the connection.
pub fn sent_by_node(status: &Status) -> bool {
    std::error::Error::source(status).is_none()
}

/// A connection to a node service; made when first used, and again whenever
/// it has broken, each time with what the files of `tls` hold by then. Without
/// `tls` it is in the clear: for tests.
///
/// # Errors
/// When `address` and `port` make no address.
pub fn connect(address: IpAddr, port: u16, tls: Option<Arc<TlsDirectory>>) -> Result<Channel, tonic::transport::Error> {
    connect_noting(address, port, tls, Arc::default())
}

/// As [`connect`], noting what certificate is shown there.
///
/// # Errors
/// When `address` and `port` make no address.
pub(super) fn connect_noting(
    address: IpAddr,
    port: u16,
    tls: Option<Arc<TlsDirectory>>,
    shown: Arc<Shown>,
) -> Result<Channel, tonic::transport::Error> {
    match tls {
        Some(tls) => connect_with(address, port, move || tls.now().client_config(), shown),
        None => Ok(endpoint(address, port, "http")?.connect_lazy()),
    }
}

/// The certificate that a node has shown last.
#[derive(Debug, Default)]
pub struct Shown(Mutex<Option<Validity>>);

impl Shown {
    /// None: no connection was made yet.
    pub fn validity(&self) -> Option<Validity> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, certificates: Option<&[CertificateDer<'_>]>) {
        let validity = certificates.and_then(|all| x509::validity(all.first()?));
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = validity;
    }
}

/// As [`connect`], with what `config` gives when the connection is made; `shown`
/// notes what certificate is shown there.
///
/// # Errors
/// When `address` and `port` make no address.
pub fn connect_with(
    address: IpAddr,
    port: u16,
    config: impl Fn() -> Arc<ClientConfig> + Send + 'static,
    shown: Arc<Shown>,
) -> Result<Channel, tonic::transport::Error> {
    let connector = service_fn(move |_: Uri| {
        let (config, shown) = (config(), Arc::clone(&shown));
        async move {
            let stream = TcpStream::connect((address, port)).await?;
            stream.set_nodelay(true)?;
            let name = ServerName::try_from(NODE_SERVER_NAME).map_err(io::Error::other)?;
            let stream = TlsConnector::from(config).connect(name, stream).await?;
            shown.note(stream.get_ref().1.peer_certificates());
            Ok::<_, io::Error>(TokioIo::new(stream))
        }
    });
    // The scheme makes tonic add no TLS of its own.
    let origin = endpoint(address, port, "https")?.uri().clone();
    Ok(endpoint(address, port, "http")?.origin(origin).connect_with_connector_lazy(connector))
}

fn endpoint(address: IpAddr, port: u16, scheme: &str) -> Result<Endpoint, tonic::transport::Error> {
    let host = match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    };
    Ok(Endpoint::from_shared(format!("{scheme}://{host}:{port}"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// A call to one node, which says so: whoever else answers at the node's
/// address refuses it.
///
/// # Errors
/// When `node` is no name of a node.
pub fn call_to<T>(node: &str, message: T, timeout: Duration) -> Result<Request<T>, Status> {
    let name = node
        .parse::<MetadataValue<Ascii>>()
        .map_err(|_| Status::invalid_argument(format!("{node:?} is no name of a node")))?;
    let mut call = Request::new(message);
    call.metadata_mut().insert(MEANT_NODE, name);
    call.set_timeout(timeout);
    Ok(call)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_names_its_node() {
        let call = call_to("n1", (), Duration::from_secs(1)).unwrap();
        assert_eq!(call.metadata().get("x-lvprov-node").unwrap(), "n1");
        assert!(call_to("n\n1", (), Duration::from_secs(1)).is_err());
    }
}
