//! Mutual TLS between controller and nodes, with certificates from files.
//!
//! There are three certificate authorities. Nodes trust only the one that signed
//! the controller's certificate, the controller trusts only the one that
//! signed the nodes'. So a node's certificate, which every node holds, cannot
//! be used to call another node. The third signs certificates that only read
//! metrics: nodes trust it on their metrics port and nowhere else, so that the
//! handshake alone tells who may do what.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

use crate::names::NODE_SERVER_NAME;

/// File with the CA of the certificates that may read metrics.
pub const METRICS_CA: &str = "metrics-ca.crt";

/// How long a peer may take for its side of the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Makes ring the crypto provider of this process. Safe to call again.
pub fn install_crypto() {
    // The error only says that a provider is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// Why the TLS files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file of the directory cannot be read.
    #[error("cannot read {path}; is the Secret with the certificates mounted there?")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// A file does not hold what its name says.
    #[error("{path} holds no PEM block {label:?}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What should stand in it.
        label: &'static str,
    },
}

/// Own certificate and key, and whom to trust: `tls.crt`, `tls.key`, `ca.crt`
/// and, on a node, `metrics-ca.crt` of one directory, as a mounted Secret has
/// them.
#[derive(Clone)]
pub struct TlsFiles {
    certificate: Vec<u8>,
    key: Vec<u8>,
    ca: Vec<u8>,
    metrics_ca: Option<Vec<u8>>,
}

// Not derived: the key must never reach a log.
impl std::fmt::Debug for TlsFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsFiles").finish_non_exhaustive()
    }
}

impl TlsFiles {
    /// Reads the files. `metrics-ca.crt` may be missing.
    ///
    /// # Errors
    /// When another one is missing, or one is plainly not PEM of its kind.
    pub fn load(dir: &Path) -> Result<Self, TlsError> {
        let metrics_ca = match read(dir, METRICS_CA, "CERTIFICATE") {
            Err(TlsError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            other => Some(other?),
        };
        Ok(Self {
            certificate: read(dir, "tls.crt", "CERTIFICATE")?,
            key: read(dir, "tls.key", "PRIVATE KEY")?,
            ca: read(dir, "ca.crt", "CERTIFICATE")?,
            metrics_ca,
        })
    }

    /// For the node service: callers must have a certificate of the
    /// controller's CA.
    pub fn server_config(&self) -> ServerTlsConfig {
        self.trusting(Certificate::from_pem(&self.ca))
    }

    /// For the metrics of the node service: readers must have a certificate of
    /// the metrics CA, or of the controller's. Where there is no metrics CA,
    /// only the controller's will do.
    pub fn metrics_config(&self) -> ServerTlsConfig {
        let mut both = self.ca.clone();
        if let Some(metrics) = &self.metrics_ca {
            both.push(b'\n');
            both.extend_from_slice(metrics);
        }
        self.trusting(Certificate::from_pem(both))
    }

    fn trusting(&self, callers: Certificate) -> ServerTlsConfig {
        ServerTlsConfig::new()
            .identity(self.identity())
            .client_ca_root(callers)
            .client_auth_optional(false)
            .timeout(HANDSHAKE_TIMEOUT)
    }

    /// For callers of nodes: the node must have a certificate of the nodes'
    /// CA, under the name that all nodes share.
    pub fn client_config(&self) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .identity(self.identity())
            .ca_certificate(Certificate::from_pem(&self.ca))
            .domain_name(NODE_SERVER_NAME)
    }

    fn identity(&self) -> Identity {
        Identity::from_pem(&self.certificate, &self.key)
    }
}

fn read(dir: &Path, name: &str, label: &'static str) -> Result<Vec<u8>, TlsError> {
    let path = dir.join(name);
    let content = fs::read(&path).map_err(|source| TlsError::Read { path: path.clone(), source })?;
    // "EC PRIVATE KEY" and "RSA PRIVATE KEY" are keys as well.
    let end = format!("{label}-----");
    let found = String::from_utf8_lossy(&content)
        .lines()
        .any(|line| line.starts_with("-----BEGIN ") && line.trim_end().ends_with(&end));
    if found { Ok(content) } else { Err(TlsError::Content { path, label }) }
}
