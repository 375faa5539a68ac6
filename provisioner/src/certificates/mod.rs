//! Certificates of controller, nodes, and whoever reads the nodes' metrics:
//! `lvprov certificates` makes them, the controller renews them.
//!
//! Three certificate authorities, one leaf each; see [`crate::tls`] for why.
//! The authorities and their keys are in a Secret of their own, which no pod
//! mounts. Where there is none, as with files and with certificates from
//! elsewhere, nobody renews anything.

pub mod admin;
pub mod cluster;
pub mod issue;
pub mod plan;
pub mod sides;
pub mod state;

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use lvm::duration::{parse_duration, show_duration};

use crate::names::{AUTHORITIES_SECRET, NAMESPACE};
use crate::tls::{CA, CERTIFICATE, KEY, METRICS_CA};
use crate::x509;
use issue::{IssueError, Lifetime, Pair};
use sides::Side;
use state::{DEFAULT_LIFETIME, LIFETIME, RENEW, SHORTEST_LIFETIME, Slot, old_key};

/// Files are renewed by nobody.
const FILES_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);

/// What `lvprov certificates` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Namespace of the Secrets
    #[arg(long, default_value = NAMESPACE)]
    pub namespace: String,
    /// How long certificates are valid, such as 90d, the default; 365d with
    /// --directory
    #[arg(long, value_name = "TIME", value_parser = lifetime)]
    pub lifetime: Option<Duration>,
    /// Write files to DIR/controller, DIR/node and DIR/metrics instead of
    /// printing Secrets; nobody renews them
    #[arg(long, value_name = "DIR", group = "what")]
    pub directory: Option<PathBuf>,
    /// Ask the controller to renew all certificates and authorities now,
    /// without a moment in which anybody is refused
    #[arg(long, group = "what", conflicts_with = "lifetime")]
    pub renew: bool,
    /// List the certificates in the Secrets of the cluster
    #[arg(long, group = "what", conflicts_with = "lifetime")]
    pub list: bool,
    /// With --list: as JSON
    #[arg(long, requires = "list")]
    pub json: bool,
}

/// Why there are no certificates.
#[derive(Debug, thiserror::Error)]
pub enum CertificatesError {
    /// A key or certificate could not be made.
    #[error(transparent)]
    Issue(#[from] IssueError),
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
    /// The Secrets in the cluster cannot be read, or not be changed.
    #[error(transparent)]
    Cluster(#[from] admin::ClusterError),
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
    /// What has signed them, in the order of [`Side::ALL`].
    authorities: [Pair; 3],
    lifetime: Duration,
    made: i64,
}

impl Certificates {
    /// Makes new authorities and one certificate from each.
    ///
    /// # Errors
    /// When a key or certificate cannot be made.
    pub fn generate(lifetime: Duration) -> Result<Self, IssueError> {
        Self::generate_at(lifetime, x509::now())
    }

    /// As [`Certificates::generate`], at another time.
    ///
    /// # Errors
    /// When a key or certificate cannot be made.
    pub fn generate_at(lifetime: Duration, now: i64) -> Result<Self, IssueError> {
        let valid = Lifetime::new(lifetime);
        let [controller_ca, node_ca, metrics_ca] =
            [Side::Controller, Side::Node, Side::Metrics].map(|side| issue::authority(side, valid, now));
        let (controller_ca, node_ca, metrics_ca) = (controller_ca?, node_ca?, metrics_ca?);
        let material = |side, authority: &Pair, ca: &Pair, metrics_ca: Option<&Pair>| {
            let Pair { certificate, key } = issue::leaf(side, authority, valid, now)?;
            let metrics_ca = metrics_ca.map(|ca| ca.certificate.clone());
            Ok::<_, IssueError>(Material { certificate, key, ca: ca.certificate.clone(), metrics_ca })
        };
        Ok(Self {
            controller: material(Side::Controller, &controller_ca, &node_ca, None)?,
            node: material(Side::Node, &node_ca, &controller_ca, Some(&metrics_ca))?,
            metrics: material(Side::Metrics, &metrics_ca, &node_ca, None)?,
            authorities: [controller_ca, node_ca, metrics_ca],
            lifetime,
            made: now,
        })
    }

    fn of(&self, side: Side) -> &Material {
        match side {
            Side::Controller => &self.controller,
            Side::Node => &self.node,
            Side::Metrics => &self.metrics,
        }
    }

    /// The Secrets by name, with all that stands in them. The authorities come
    /// first: whatever is missing after half of it, the controller can make.
    pub fn secrets(&self) -> Vec<(&'static str, Vec<(String, String)>)> {
        // All keys, also those without a value: an earlier installation may
        // have left one.
        let mut authorities =
            vec![(LIFETIME.to_owned(), show_duration(self.lifetime)), (RENEW.to_owned(), String::new())];
        for side in Side::ALL {
            let Pair { certificate, key } = self.authorities[side as usize].clone();
            let keys = Slot::Current.keys(side);
            authorities.extend([
                (keys.certificate, certificate),
                (keys.key, key),
                (keys.signs, x509::show_time(self.made)),
            ]);
            let keys = Slot::Next.keys(side);
            let empty = [keys.certificate, keys.key, keys.signs, old_key(side)];
            authorities.extend(empty.map(|key| (key, String::new())));
        }
        let leaves = Side::ALL.map(|side| {
            let files = self.of(side).files().map(|(name, content, _)| (name.to_owned(), content.to_owned()));
            (side.secret(), files.collect())
        });
        std::iter::once((AUTHORITIES_SECRET, authorities)).chain(leaves).collect()
    }

    /// All as Secrets, to be given to `kubectl apply -f -`.
    pub fn to_yaml(&self, namespace: &str) -> String {
        let secrets = self.secrets();
        secrets.iter().map(|(name, values)| secret(name, namespace, values)).collect::<Vec<_>>().join("---\n")
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
        let always = [(CERTIFICATE, &self.certificate, 0o644), (KEY, &self.key, 0o600), (CA, &self.ca, 0o644)];
        let of_node = self.metrics_ca.as_ref().map(|ca| (METRICS_CA, ca, 0o644));
        always.into_iter().chain(of_node).map(|(name, content, mode)| (name, content.as_str(), mode))
    }
}

fn secret(name: &str, namespace: &str, values: &[(String, String)]) -> String {
    let type_ = if name == AUTHORITIES_SECRET { "Opaque" } else { "kubernetes.io/tls" };
    let mut yaml = format!(
        "apiVersion: v1\nkind: Secret\ntype: {type_}\nmetadata:\n  name: {name}\n  namespace: {namespace}\n  \
         labels:\n    app.kubernetes.io/name: lvprov\nstringData:\n"
    );
    for (key, content) in values {
        if !content.contains('\n') {
            yaml.push_str(&format!("  {key}: \"{content}\"\n"));
            continue;
        }
        yaml.push_str(&format!("  {key}: |\n"));
        for line in content.lines() {
            yaml.push_str(&format!("    {}\n", line.trim_end()));
        }
    }
    yaml
}

/// Runs the command.
///
/// # Errors
/// When the certificates cannot be made, or not be written.
pub fn run(args: &Args) -> Result<(), CertificatesError> {
    if !is_dns_label(&args.namespace) {
        return Err(CertificatesError::Namespace(args.namespace.clone()));
    }
    if args.renew || args.list {
        return Ok(admin::run(args)?);
    }
    if let Some(dir) = &args.directory {
        let made = Certificates::generate(args.lifetime.unwrap_or(FILES_LIFETIME))?;
        return Side::ALL.into_iter().try_for_each(|side| made.of(side).write(&dir.join(side.name())));
    }
    let made = Certificates::generate(args.lifetime.unwrap_or(DEFAULT_LIFETIME))?;
    io::stdout()
        .write_all(made.to_yaml(&args.namespace).as_bytes())
        .map_err(|source| CertificatesError::Write { path: "standard output".into(), source })
}

fn lifetime(text: &str) -> Result<Duration, String> {
    let lifetime = parse_duration(text).map_err(|error| error.to_string())?;
    let longest = Duration::from_secs(10 * 365 * 24 * 3600);
    if (SHORTEST_LIFETIME..=longest).contains(&lifetime) {
        return Ok(lifetime);
    }
    Err(format!("certificates live between {} and {}", show_duration(SHORTEST_LIFETIME), show_duration(longest)))
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
    use crate::names::NODE_SERVER_NAME;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn args() -> Args {
        let namespace = NAMESPACE.to_owned();
        Args { namespace, lifetime: None, directory: None, renew: false, list: false, json: false }
    }

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
        let ours = Certificates::generate(DAY).unwrap();
        let others = Certificates::generate(DAY).unwrap();
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
    fn secrets_hold_the_files_and_authority_keys_are_in_theirs_alone() {
        let made = Certificates::generate(DAY).unwrap();
        let yaml = made.to_yaml("storage");
        // PEM lines are dashes too: take the separator only at a line's start.
        let documents: Vec<_> = yaml.split("\n---\n").collect();
        let keys: Vec<_> = documents.iter().map(|text| text.matches("PRIVATE KEY-----").count() / 2).collect();
        assert_eq!(keys, [3, 1, 1, 1]);
        assert!(documents.iter().all(|text| text.starts_with("apiVersion: v1\nkind: Secret\n")));
        assert_eq!(yaml.matches("  namespace: storage\n").count(), 4);
        assert_eq!(yaml.matches("BEGIN CERTIFICATE").count(), 10);
        for name in ["lvprov-authorities", "lvprov-controller-tls", "lvprov-node-tls", "lvprov-metrics-tls"] {
            assert!(yaml.contains(&format!("  name: {name}\n")), "{yaml}");
        }
        // Only nodes have anybody to trust with their metrics.
        assert_eq!(yaml.matches("  metrics-ca.crt: |\n").count(), 1);
        assert!(yaml.contains("  lifetime: \"1d\"\n"), "{yaml}");
        for line in yaml.lines().filter(|line| !line.starts_with("    ")) {
            assert!(line == "---" || line.contains(':'), "{line:?}");
        }
    }

    #[test]
    fn files_are_what_the_service_loads() {
        let dir = tempfile::tempdir().unwrap();
        run(&Args { directory: Some(dir.path().to_owned()), ..args() }).unwrap();
        for side in ["controller", "node", "metrics"] {
            crate::tls::TlsDirectory::open(&dir.path().join(side)).unwrap();
            let key = fs::metadata(dir.path().join(side).join("tls.key")).unwrap();
            assert_eq!(key.permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn namespace_must_be_one_and_a_lifetime_long_enough() {
        for bad in ["", "a b", "a\nb: c", "-a", "A"] {
            assert!(matches!(run(&Args { namespace: bad.into(), ..args() }), Err(CertificatesError::Namespace(_))));
        }
        assert_eq!(lifetime("90d"), Ok(90 * DAY));
        for bad in ["", "59s", "4000d", "1"] {
            assert!(lifetime(bad).is_err(), "{bad}");
        }
    }
}
