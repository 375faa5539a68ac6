//! `lvprov certificates`: makes the certificates of controller, nodes, and
//! whoever reads the nodes' metrics.
//!
//! Three certificate authorities, one leaf each; see [`crate::tls`] for why. The
//! authorities' keys exist only inside one call: nothing can be signed later,
//! so the certificates are renewed by making all of them anew.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};

use crate::names::{CONTROLLER_TLS_SECRET, METRICS_TLS_SECRET, NAMESPACE, NODE_SERVER_NAME, NODE_TLS_SECRET};
use crate::tls::METRICS_CA;

/// Clocks of a cluster differ: certificates are valid this much earlier.
const CLOCK_SKEW: Duration = Duration::hours(1);

/// The name in the controller's certificate. Nodes check the CA, not the name.
const CONTROLLER_NAME: &str = "controller.lvprov.io";

/// The name in the certificate that reads metrics. Nodes check the CA here, too.
const METRICS_NAME: &str = "metrics.lvprov.io";

/// What `lvprov certificates` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Namespace of the Secrets
    #[arg(long, default_value = NAMESPACE)]
    pub namespace: String,
    /// How long the certificates are valid
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u16).range(1..=3650))]
    pub days: u16,
    /// Write files to DIR/controller, DIR/node and DIR/metrics instead of
    /// printing Secrets
    #[arg(long, value_name = "DIR")]
    pub directory: Option<PathBuf>,
}

/// Why there are no certificates.
#[derive(Debug, thiserror::Error)]
pub enum CertificatesError {
    /// A key or certificate could not be made.
    #[error("cannot make the certificate of {subject}")]
    Generate {
        /// Whose.
        subject: &'static str,
        /// What rcgen says.
        #[source]
        source: rcgen::Error,
    },
    /// A name that Kubernetes would refuse.
    #[error("{0:?} is not the name of a namespace: lower case letters, digits and dashes")]
    Namespace(String),
    /// A file or standard output cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}

/// What one side needs, all in PEM.
pub struct Material {
    /// Own certificate.
    pub certificate: String,
    /// Own private key.
    pub key: String,
    /// The CA that the other side's certificate is signed by.
    pub ca: String,
    /// The CA of those that may read metrics. Nodes only.
    pub metrics_ca: Option<String>,
}

/// Matching certificates of all sides.
pub struct Certificates {
    /// For the controller and the admin's commands.
    pub controller: Material,
    /// For all nodes.
    pub node: Material,
    /// For Prometheus.
    pub metrics: Material,
}

impl Certificates {
    /// Makes new authorities and one certificate from each.
    ///
    /// # Errors
    /// When a key or certificate cannot be made.
    pub fn generate(days: u16) -> Result<Self, CertificatesError> {
        let controller_ca = authority("lvprov controller CA", days)?;
        let node_ca = authority("lvprov node CA", days)?;
        let metrics_ca = authority("lvprov metrics CA", days)?;
        let (controller, controller_key) =
            leaf(CONTROLLER_NAME, ExtendedKeyUsagePurpose::ClientAuth, &controller_ca, days)?;
        let (node, node_key) = leaf(NODE_SERVER_NAME, ExtendedKeyUsagePurpose::ServerAuth, &node_ca, days)?;
        let (metrics, metrics_key) = leaf(METRICS_NAME, ExtendedKeyUsagePurpose::ClientAuth, &metrics_ca, days)?;
        let material = |certificate, key, ca: &str| Material { certificate, key, ca: ca.to_owned(), metrics_ca: None };
        Ok(Self {
            controller: material(controller, controller_key, &node_ca.pem()),
            node: Material { metrics_ca: Some(metrics_ca.pem()), ..material(node, node_key, &controller_ca.pem()) },
            metrics: material(metrics, metrics_key, &node_ca.pem()),
        })
    }

    /// All as Secrets, to be given to `kubectl apply -f -`.
    pub fn to_yaml(&self, namespace: &str) -> String {
        [
            self.controller.secret(CONTROLLER_TLS_SECRET, namespace),
            self.node.secret(NODE_TLS_SECRET, namespace),
            self.metrics.secret(METRICS_TLS_SECRET, namespace),
        ]
        .join("---\n")
    }
}

impl Material {
    /// Writes `tls.crt`, `tls.key`, `ca.crt` and, of a node, `metrics-ca.crt`;
    /// the directory is made if need be, and only its owner may read the key.
    ///
    /// # Errors
    /// When one of them cannot be written.
    pub fn write(&self, dir: &Path) -> Result<(), CertificatesError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|source| CertificatesError::Write { path: dir.to_owned(), source })?;
        for (name, content, mode) in self.files() {
            let path = dir.join(name);
            OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(mode)
                .open(&path)
                .and_then(|mut file| file.write_all(content.as_bytes()))
                .map_err(|source| CertificatesError::Write { path, source })?;
        }
        Ok(())
    }

    fn files(&self) -> impl Iterator<Item = (&'static str, &str, u32)> {
        let always =
            [("tls.crt", &self.certificate, 0o644), ("tls.key", &self.key, 0o600), ("ca.crt", &self.ca, 0o644)];
        let of_node = self.metrics_ca.as_ref().map(|ca| (METRICS_CA, ca, 0o644));
        always.into_iter().chain(of_node).map(|(name, content, mode)| (name, content.as_str(), mode))
    }

    fn secret(&self, name: &str, namespace: &str) -> String {
        let mut yaml = format!(
            "apiVersion: v1\nkind: Secret\ntype: kubernetes.io/tls\nmetadata:\n  \
             name: {name}\n  namespace: {namespace}\nstringData:\n"
        );
        for (key, content, _) in self.files() {
            yaml.push_str("  ");
            yaml.push_str(key);
            yaml.push_str(": |\n");
            for line in content.lines() {
                yaml.push_str("    ");
                yaml.push_str(line.trim_end());
                yaml.push('\n');
            }
        }
        yaml
    }
}

/// Runs the command.
///
/// # Errors
/// When the certificates cannot be made, or not be written.
pub fn run(args: &Args) -> Result<(), CertificatesError> {
    if !is_dns_label(&args.namespace) {
        return Err(CertificatesError::Namespace(args.namespace.clone()));
    }
    let made = Certificates::generate(args.days)?;
    if let Some(dir) = &args.directory {
        made.controller.write(&dir.join("controller"))?;
        made.node.write(&dir.join("node"))?;
        return made.metrics.write(&dir.join("metrics"));
    }
    io::stdout()
        .write_all(made.to_yaml(&args.namespace).as_bytes())
        .map_err(|source| CertificatesError::Write { path: "standard output".into(), source })
}

fn authority(subject: &'static str, days: u16) -> Result<CertifiedIssuer<'static, KeyPair>, CertificatesError> {
    let generate = |source| CertificatesError::Generate { subject, source };
    let mut params = params(subject, Vec::new(), days).map_err(generate)?;
    // It signs leaves and no other authority.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().map_err(generate)?;
    CertifiedIssuer::self_signed(params, key).map_err(generate)
}

fn leaf(
    name: &'static str,
    usage: ExtendedKeyUsagePurpose,
    issuer: &CertifiedIssuer<'_, KeyPair>,
    days: u16,
) -> Result<(String, String), CertificatesError> {
    let generate = |source| CertificatesError::Generate { subject: name, source };
    let mut params = params(name, vec![name.to_owned()], days).map_err(generate)?;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    let key = KeyPair::generate().map_err(generate)?;
    let certificate = params.signed_by(&key, issuer).map_err(generate)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

fn params(common_name: &str, names: Vec<String>, days: u16) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    let now = OffsetDateTime::now_utc();
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + Duration::days(days.into());
    Ok(params)
}

fn is_dns_label(text: &str) -> bool {
    let inside = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=63).contains(&text.len()) && text.chars().all(inside) && !text.starts_with('-') && !text.ends_with('-')
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Arc;

    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
    use rustls::server::WebPkiClientVerifier;
    use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

    use super::*;

    fn chain(material: &Material) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        (
            CertificateDer::pem_slice_iter(material.certificate.as_bytes()).collect::<Result<_, _>>().unwrap(),
            PrivateKeyDer::from_pem_slice(material.key.as_bytes()).unwrap(),
        )
    }

    fn roots(ca: &str) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).unwrap()).unwrap();
        roots
    }

    /// One whole handshake in memory.
    fn handshake(server: &Material, client: &Material, name: &str) -> Result<(), rustls::Error> {
        crate::tls::install_crypto();
        let (certificates, key) = chain(server);
        let verifier = WebPkiClientVerifier::builder(roots(&server.ca).into()).build().unwrap();
        let server =
            ServerConfig::builder().with_client_cert_verifier(verifier).with_single_cert(certificates, key).unwrap();
        let (certificates, key) = chain(client);
        let client = ClientConfig::builder()
            .with_root_certificates(roots(&client.ca))
            .with_client_auth_cert(certificates, key)
            .unwrap();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut server = ServerConnection::new(Arc::new(server)).unwrap();
        let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
        for _ in 0..10 {
            let mut wire = Vec::new();
            client.write_tls(&mut wire).unwrap();
            server.read_tls(&mut wire.as_slice()).unwrap();
            server.process_new_packets()?;
            wire.clear();
            server.write_tls(&mut wire).unwrap();
            client.read_tls(&mut wire.as_slice()).unwrap();
            client.process_new_packets()?;
        }
        assert!(!client.is_handshaking() && !server.is_handshaking());
        Ok(())
    }

    #[test]
    fn controller_and_node_accept_each_other_only() {
        let ours = Certificates::generate(1).unwrap();
        let others = Certificates::generate(1).unwrap();
        handshake(&ours.node, &ours.controller, NODE_SERVER_NAME).unwrap();

        let refused =
            |server: &Material, client: &Material, name: &str| handshake(server, client, name).unwrap_err().to_string();
        // The caller is of another installation, in whole or in part.
        // Each alone would do; here both sides have reason to refuse.
        refused(&ours.node, &others.controller, NODE_SERVER_NAME);
        let disguised = Material {
            certificate: others.controller.certificate.clone(),
            key: others.controller.key.clone(),
            ca: ours.controller.ca.clone(),
            metrics_ca: None,
        };
        let text = refused(&ours.node, &disguised, NODE_SERVER_NAME);
        assert!(text.contains("invalid peer certificate"), "{text}");
        // A node calls a node, trusting the right CA.
        let node_as_caller = Material {
            certificate: ours.node.certificate.clone(),
            key: ours.node.key.clone(),
            ca: ours.controller.ca.clone(),
            metrics_ca: None,
        };
        let text = refused(&ours.node, &node_as_caller, NODE_SERVER_NAME);
        assert!(text.contains("invalid peer certificate"), "{text}");
        // Who may read metrics may not call.
        let text = refused(&ours.node, &ours.metrics, NODE_SERVER_NAME);
        assert!(text.contains("invalid peer certificate"), "{text}");
        // A node of another installation, and a name that is not a node's.
        let text = refused(&others.node, &ours.controller, NODE_SERVER_NAME);
        assert!(text.contains("invalid peer certificate"), "{text}");
        let text = refused(&ours.node, &ours.controller, "elsewhere.lvprov.io");
        assert!(text.contains("not valid for name"), "{text}");
        // The controller's certificate cannot serve as a node's.
        let controller_as_node = Material {
            certificate: ours.controller.certificate.clone(),
            key: ours.controller.key.clone(),
            ca: ours.node.ca.clone(),
            metrics_ca: None,
        };
        refused(&controller_as_node, &ours.controller, NODE_SERVER_NAME);
    }

    #[test]
    fn secrets_hold_the_files_and_no_authority_key() {
        let made = Certificates::generate(1).unwrap();
        let yaml = made.to_yaml("storage");
        let mut documents = yaml.split("---\n");
        // PEM lines are dashes too: take the separator only at a line's start.
        assert!(documents.next().unwrap().starts_with("apiVersion: v1\n"));
        assert_eq!(yaml.matches("kind: Secret\n").count(), 3);
        assert_eq!(yaml.matches("  namespace: storage\n").count(), 3);
        assert_eq!(yaml.matches("PRIVATE KEY-----").count(), 6);
        assert_eq!(yaml.matches("BEGIN CERTIFICATE").count(), 7);
        for name in ["lvprov-controller-tls", "lvprov-node-tls", "lvprov-metrics-tls"] {
            assert!(yaml.contains(&format!("  name: {name}\n")), "{yaml}");
        }
        // Only nodes have anybody to trust with their metrics.
        assert_eq!(yaml.matches("  metrics-ca.crt: |\n").count(), 1);
        for line in yaml.lines().filter(|line| !line.starts_with("    ")) {
            assert!(line == "---" || line.contains(':'), "{line:?}");
        }
    }

    #[test]
    fn files_are_what_the_service_loads() {
        let dir = tempfile::tempdir().unwrap();
        let args = Args { namespace: "lvprov-system".into(), days: 1, directory: Some(dir.path().to_owned()) };
        run(&args).unwrap();
        for side in ["controller", "node", "metrics"] {
            crate::tls::TlsDirectory::open(&dir.path().join(side)).unwrap();
            let key = fs::metadata(dir.path().join(side).join("tls.key")).unwrap();
            assert_eq!(key.permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn namespace_must_be_one() {
        for bad in ["", "a b", "a\nb: c", "-a", "A"] {
            let args = Args { namespace: bad.into(), days: 1, directory: None };
            assert!(matches!(run(&args), Err(CertificatesError::Namespace(_))));
        }
    }
}
