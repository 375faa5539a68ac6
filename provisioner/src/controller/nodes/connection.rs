//! Connections to node services, calls on them, and what a status of one says.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tower::service_fn;

use crate::names::{MEANT_NODE, NODE_SERVER_NAME};
use crate::reports::Reports;
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
        Some(cause) => explain_error(cause),
        None => status.message().to_owned(),
    }
}

/// What has happened to a connection, in words.
pub(super) fn explain_error(error: &dyn std::error::Error) -> String {
    let text = with_causes(error);
    match about_certificates(&text) {
        Some(what) => what.to_owned(),
        None => text,
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
    match tls {
        Some(tls) => connect_over(address, port, tls),
        None => Ok(endpoint(address, port, "http")?.connect_lazy()),
    }
}

/// The reports of a node, and the certificate that it shows.
///
/// # Errors
/// When there is no connection in time, or no agreement on it.
pub(super) async fn listen(
    address: IpAddr,
    port: u16,
    tls: &TlsDirectory,
) -> io::Result<(Reports<TlsStream<TcpStream>>, Option<Validity>)> {
    let connecting = tls_stream(address, port, tls.now().listener_config());
    let stream = timeout(CONNECT_TIMEOUT, connecting).await.map_err(|_| {
        let what = format!("it takes no connection within {} s", CONNECT_TIMEOUT.as_secs());
        io::Error::new(io::ErrorKind::TimedOut, what)
    })??;
    let validity = stream.get_ref().1.peer_certificates().and_then(|all| x509::validity(all.first()?));
    Ok((Reports::new(stream), validity))
}

async fn tls_stream(address: IpAddr, port: u16, config: Arc<ClientConfig>) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect((address, port)).await?;
    stream.set_nodelay(true)?;
    let name = ServerName::try_from(NODE_SERVER_NAME).map_err(io::Error::other)?;
    TlsConnector::from(config).connect(name, stream).await
}

fn connect_over(address: IpAddr, port: u16, tls: Arc<TlsDirectory>) -> Result<Channel, tonic::transport::Error> {
    let connector = service_fn(move |_: Uri| {
        let config = tls.now().client_config();
        async move { tls_stream(address, port, config).await.map(TokioIo::new) }
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
