//! Mutual TLS between controller and nodes, with certificates from files.
//!
//! There are three certificate authorities. Nodes trust only the one that signed
//! the controller's certificate, and look for the controller's name in it; the
//! controller trusts only the one that signed the nodes'. So a node's
//! certificate, which every node holds, cannot be used to call another node. The
//! third signs certificates that only read metrics: nodes trust it on their
//! metrics port and nowhere else, so that the handshake alone tells who may do
//! what.
//!
//! Each new connection uses what the files hold at that moment, so that a
//! renewal needs no restart.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fstatat};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::client::{Resumption, verify_server_name};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, VerifierBuilderError, WebPkiClientVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme};
use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::names::CONTROLLER_CLIENT_NAME;
use crate::reports;
use crate::x509::{self, Validity};

/// File with the own certificate.
pub const CERTIFICATE: &str = "tls.crt";
/// File with its key.
pub const KEY: &str = "tls.key";
/// File with the CAs of the other side, one after the other.
pub const CA: &str = "ca.crt";
/// File with the CAs of the certificates that may read metrics.
pub const METRICS_CA: &str = "metrics-ca.crt";

/// kubelet's link to the directory that holds the present files of a Secret.
const PRESENT: &str = "..data";

/// Where nobody connects, the files are looked at this often.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// A warning that still holds is said again after this time.
const WARN_EVERY: Duration = Duration::from_secs(3600);

const HTTP_1: &[u8] = b"http/1.1";
const HTTP_2: &[u8] = b"h2";

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
    /// None of the certificates of a file can be trusted.
    #[error("{path} holds no certificate of an authority")]
    Trust {
        /// The file.
        path: PathBuf,
        /// What rustls says.
        #[source]
        source: VerifierBuilderError,
    },
    /// Certificate and key are of no use, or not of each other.
    #[error("{CERTIFICATE} and {KEY} of {directory} are not a certificate and its key; make both anew")]
    Pair {
        /// Where they are.
        directory: PathBuf,
        /// What rustls says.
        #[source]
        source: rustls::Error,
    },
}

/// What the files held when they were last looked at.
pub struct Tls {
    files: Files,
    validity: Option<Validity>,
    trusted: RootsOf,
    client: Arc<ClientConfig>,
    listener: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    metrics: Arc<ServerConfig>,
}

struct RootsOf {
    other_side: Vec<CertificateDer<'static>>,
    metrics: Vec<CertificateDer<'static>>,
}

/// The PEM texts.
#[derive(PartialEq, Eq)]
struct Files {
    certificate: Vec<u8>,
    key: Vec<u8>,
    ca: Vec<u8>,
    metrics_ca: Option<Vec<u8>>,
}

// Not derived: the key must never reach a log.
impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("validity", &self.validity).finish_non_exhaustive()
    }
}

/// Lets in the controller: its authority has signed the certificate, and for
/// the controller's name. An authority of one's own may sign for others too.
#[derive(Debug)]
struct Controller {
    authority: Arc<dyn ClientCertVerifier>,
}

impl ClientCertVerifier for Controller {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.authority.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.authority.verify_client_cert(certificate, intermediates, now)?;
        let name =
            ServerName::try_from(CONTROLLER_CLIENT_NAME).map_err(|error| rustls::Error::General(error.to_string()))?;
        verify_server_name(&ParsedCertificate::try_from(certificate)?, &name)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.authority.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.authority.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.authority.supported_verify_schemes()
    }
}

impl Tls {
    fn new(files: Files, directory: &Path) -> Result<Self, TlsError> {
        let content = |name: &str, label| TlsError::Content { path: directory.join(name), label };
        let certificates = |pem: &[u8], name| x509::from_pem(pem).ok_or_else(|| content(name, "CERTIFICATE"));
        let own = certificates(&files.certificate, CERTIFICATE)?;
        let key = PrivateKeyDer::from_pem_slice(&files.key).map_err(|_| content(KEY, "PRIVATE KEY"))?;
        let trusted = RootsOf {
            other_side: certificates(&files.ca, CA)?,
            metrics: match &files.metrics_ca {
                Some(pem) => certificates(pem, METRICS_CA)?,
                None => Vec::new(),
            },
        };
        let pair = |source| TlsError::Pair { directory: directory.to_owned(), source };
        let roots = |of: &mut dyn Iterator<Item = &CertificateDer<'static>>| {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(of.cloned());
            Arc::new(roots)
        };
        let nodes = roots(&mut trusted.other_side.iter());
        let readers = roots(&mut trusted.other_side.iter().chain(&trusted.metrics));
        let mut client = ClientConfig::builder()
            .with_root_certificates(Arc::clone(&nodes))
            .with_client_auth_cert(own.clone(), key.clone_key())
            .map_err(pair)?;
        client.alpn_protocols = vec![HTTP_2.to_vec()];
        // A resumed session checks no certificate again.
        client.resumption = Resumption::disabled();
        let mut listener = client.clone();
        listener.alpn_protocols = vec![reports::PROTOCOL.to_vec()];
        let callers = |roots: Arc<RootCertStore>| {
            WebPkiClientVerifier::builder(roots)
                .build()
                .map_err(|source| TlsError::Trust { path: directory.join(CA), source })
        };
        let server = |verifier: Arc<dyn ClientCertVerifier>, protocols: &[&[u8]]| {
            let mut server = ServerConfig::builder()
                .with_client_cert_verifier(verifier)
                .with_single_cert(own.clone(), key.clone_key())
                .map_err(pair)?;
            server.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
            server.session_storage = Arc::new(NoServerSessionStorage {});
            server.send_tls13_tickets = 0;
            Ok::<_, TlsError>(Arc::new(server))
        };
        Ok(Self {
            client: Arc::new(client),
            listener: Arc::new(listener),
            server: server(Arc::new(Controller { authority: callers(nodes)? }), &[HTTP_2, reports::PROTOCOL])?,
            // Not every reader speaks HTTP/2.
            metrics: server(callers(readers)?, &[HTTP_2, HTTP_1])?,
            validity: own.first().and_then(|certificate| x509::validity(certificate)),
            trusted,
            files,
        })
    }

    /// For callers of nodes: the node must have a certificate of the nodes'
    /// CA. Its name is [`crate::names::NODE_SERVER_NAME`].
    pub fn client_config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.client)
    }

    /// As [`Tls::client_config`], for who listens to a node's reports.
    pub fn listener_config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.listener)
    }

    /// For the node service: callers must have a certificate of the
    /// controller's CA, with the name [`CONTROLLER_CLIENT_NAME`].
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// For the metrics of the node service: readers must have a certificate of
    /// the metrics CA, or of the controller's. Where there is no metrics CA,
    /// only the controller's will do.
    pub fn metrics_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.metrics)
    }

    /// Whether `authority` is one of the other side's CAs.
    pub fn trusts(&self, authority: &CertificateDer<'_>) -> bool {
        self.trusted.other_side.contains(authority)
    }

    /// Until when each file is of use, in seconds since 1970: for a file with
    /// several CAs, the last of them. Files that are missing, or tell no time,
    /// are left out.
    pub fn expiries(&self) -> Vec<(&'static str, i64)> {
        let last = |certificates: &[CertificateDer<'_>]| {
            certificates.iter().filter_map(|certificate| x509::validity(certificate)).map(|it| it.not_after).max()
        };
        let all = [
            (CERTIFICATE, self.validity.map(|validity| validity.not_after)),
            (CA, last(&self.trusted.other_side)),
            (METRICS_CA, last(&self.trusted.metrics)),
        ];
        all.into_iter().filter_map(|(name, expiry)| Some((name, expiry?))).collect()
    }

    /// What is to be said of the own certificate at `now`, if anything.
    fn warning(&self, now: i64) -> Option<String> {
        let validity = self.validity?;
        let Validity { not_before, not_after } = validity;
        let until = x509::show_time(not_after);
        if now > not_after {
            return Some(format!("it has expired, at {until}: nobody accepts it"));
        }
        if now < not_before {
            return Some(format!("it is valid from {} on: is the clock right?", x509::show_time(not_before)));
        }
        validity.ends_soon(now).then(|| format!("it expires at {until}, and nobody has renewed it"))
    }
}

/// A directory with own certificate and key, and whom to trust: `tls.crt`,
/// `tls.key`, `ca.crt` and, on a node, `metrics-ca.crt`, as a mounted Secret
/// has them.
///
/// The directory is held open and its files are read through it: they are
/// found also from another mount namespace. Files that cannot be used are
/// warned of, and those before them are used on.
#[derive(Debug)]
pub struct TlsDirectory {
    path: PathBuf,
    directory: OwnedFd,
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    stamp: Stamp,
    tls: Arc<Tls>,
    warned: Option<(String, Instant)>,
}

/// Tells whether a file is still the one that was read. None: not there.
type Stamp = [Option<(u64, u64, i64, i64, i64, i64)>; 4];

impl TlsDirectory {
    /// Opens it and reads the files. `metrics-ca.crt` may be missing.
    ///
    /// # Errors
    /// When another one is missing, or does not hold what its name says.
    pub fn open(path: &Path) -> Result<Arc<Self>, TlsError> {
        let directory = File::open(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })?;
        let directory = OwnedFd::from(directory);
        let stamp = stamp(&directory);
        let tls = Arc::new(Tls::new(read(&directory, path)?, path)?);
        let held = Mutex::new(Held { stamp, tls, warned: None });
        Ok(Arc::new(Self { path: path.to_owned(), directory, held }))
    }

    /// What the files hold now. Costs some stat(2), and reads only what has
    /// changed.
    pub fn now(&self) -> Arc<Tls> {
        let mut held = self.lock();
        let stamp = stamp(&self.directory);
        if stamp != held.stamp {
            self.read_into(&mut held, stamp);
        }
        Arc::clone(&held.tls)
    }

    /// Looks at the files once a minute, for ever, and warns of certificates
    /// that are about to expire.
    pub async fn watch(self: Arc<Self>) {
        let mut every = interval(LOOK_EVERY);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            every.tick().await;
            let mut held = self.lock();
            // Also where nothing seems to have changed: a file can be written twice within one tick of its clock.
            let stamp = stamp(&self.directory);
            self.read_into(&mut held, stamp);
            if let Some(warning) = held.tls.warning(x509::now()) {
                self.warn(&mut held, warning);
            }
        }
    }

    fn read_into(&self, held: &mut Held, stamp: Stamp) {
        let read = read(&self.directory, &self.path).and_then(|files| {
            let changed = files != held.tls.files;
            changed.then(|| Tls::new(files, &self.path)).transpose()
        });
        match read {
            Ok(None) => held.stamp = stamp,
            Ok(Some(tls)) => {
                let expires = tls.validity.map(|validity| x509::show_time(validity.not_after));
                info!(directory = %self.path.display(), expires, "new certificates");
                *held = Held { stamp, tls: Arc::new(tls), warned: None };
            }
            // Not noted as seen: it is read again at the next look.
            Err(error) => self.warn(held, crate::with_causes(&error)),
        }
    }

    fn warn(&self, held: &mut Held, what: String) {
        let fresh = |(said, at): &(String, Instant)| *said == what && at.elapsed() < WARN_EVERY;
        if !held.warned.as_ref().is_some_and(fresh) {
            warn!(directory = %self.path.display(), what, "certificates");
            held.warned = Some((what, Instant::now()));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn stamp(directory: &OwnedFd) -> Stamp {
    [CERTIFICATE, KEY, CA, METRICS_CA].map(|name| {
        let seen = fstatat(directory, name, AtFlags::empty()).ok()?;
        Some((seen.st_dev, seen.st_ino, seen.st_mtime, seen.st_mtime_nsec, seen.st_ctime_nsec, seen.st_size))
    })
}

fn read(directory: &OwnedFd, path: &Path) -> Result<Files, TlsError> {
    // All files from the same side of a swap. Right after one kubelet removes
    // the old side, so that a second try has to find the new one.
    let from_present = || {
        let flags = OFlag::O_DIRECTORY | OFlag::O_PATH | OFlag::O_CLOEXEC;
        match openat(directory, PRESENT, flags, Mode::empty()) {
            Ok(present) => read_from(&present, path),
            Err(Errno::ENOENT) => read_from(directory, path),
            Err(errno) => Err(TlsError::Read { path: path.join(PRESENT), source: errno.into() }),
        }
    };
    match from_present() {
        Err(TlsError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => from_present(),
        read => read,
    }
}

fn read_from(directory: &OwnedFd, path: &Path) -> Result<Files, TlsError> {
    let read = |name: &str| {
        let error = |source| TlsError::Read { path: path.join(name), source };
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let file = openat(directory.as_fd(), name, flags, Mode::empty()).map_err(|errno| error(errno.into()))?;
        let mut content = Vec::new();
        File::from(file).read_to_end(&mut content).map_err(error)?;
        Ok(content)
    };
    let metrics_ca = match read(METRICS_CA) {
        Err(TlsError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
        other => Some(other?),
    };
    Ok(Files { certificate: read(CERTIFICATE)?, key: read(KEY)?, ca: read(CA)?, metrics_ca })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::certificates::issue::{self, Lifetime};
    use crate::certificates::sides::Side;
    use crate::certificates::{Certificates, Material};

    fn made() -> Certificates {
        install_crypto();
        Certificates::generate(Duration::from_secs(24 * 3600)).unwrap()
    }

    /// What kubelet does: a new directory, and one rename.
    fn mount(at: &Path, number: u32, material: &Material) {
        material.write(&at.join(format!("..{number}"))).unwrap();
        let link = at.join("..data_tmp");
        symlink(format!("..{number}"), &link).unwrap();
        fs::rename(&link, at.join(PRESENT)).unwrap();
        for name in [CERTIFICATE, KEY, CA] {
            let _ = symlink(format!("{PRESENT}/{name}"), at.join(name));
        }
        if let Some(earlier) = number.checked_sub(1) {
            let _ = fs::remove_dir_all(at.join(format!("..{earlier}")));
        }
    }

    fn holds(tls: &Tls, material: &Material) -> bool {
        tls.files.certificate == material.certificate.as_bytes()
    }

    #[test]
    fn a_swapped_secret_is_seen_at_the_next_look_wherever_its_directory_is() {
        let root = tempfile::tempdir().unwrap();
        let at = root.path().join("tls");
        fs::create_dir(&at).unwrap();
        let (first, second, third) = (made().controller, made().controller, made().controller);
        mount(&at, 0, &first);
        let directory = TlsDirectory::open(&at).unwrap();
        let tls = directory.now();
        assert!(holds(&tls, &first) && Arc::ptr_eq(&tls, &directory.now()));
        mount(&at, 1, &second);
        assert!(holds(&directory.now(), &second));
        // As after a change of the mount namespace: nothing is at the path any more.
        let elsewhere = root.path().join("elsewhere");
        fs::rename(&at, &elsewhere).unwrap();
        mount(&elsewhere, 2, &third);
        assert!(holds(&directory.now(), &third));
        // The first ones are still whole for who uses them.
        assert!(holds(&tls, &first));
    }

    #[test]
    fn half_a_set_changes_nothing() {
        let root = tempfile::tempdir().unwrap();
        let at = root.path();
        let (first, second) = (made(), made());
        first.node.write(at).unwrap();
        let directory = TlsDirectory::open(at).unwrap();
        let put = |name: &str, content: &str| fs::write(at.join(name), content).unwrap();
        let unchanged = || holds(&directory.now(), &first.node);

        put(CERTIFICATE, &second.node.certificate);
        assert!(unchanged(), "a certificate without its key");
        put(KEY, "");
        assert!(unchanged(), "no key");
        put(KEY, &second.node.key);
        put(CA, &second.node.ca[..second.node.ca.len() / 2]);
        assert!(unchanged(), "half of the authorities");
        fs::remove_file(at.join(CA)).unwrap();
        assert!(unchanged(), "no authorities");
        put(CA, &second.node.ca);
        assert!(holds(&directory.now(), &second.node));
        // What is optional may go, and what is said of it goes too.
        assert_eq!(directory.now().expiries().len(), 3);
        fs::remove_file(at.join(METRICS_CA)).unwrap();
        assert_eq!(directory.now().expiries().len(), 2);
    }

    #[test]
    fn what_cannot_be_used_is_said_at_the_start() {
        let root = tempfile::tempdir().unwrap();
        let (ours, others) = (made(), made());
        let refused = |change: &dyn Fn(&Path)| {
            ours.node.write(root.path()).unwrap();
            change(root.path());
            crate::with_causes(&TlsDirectory::open(root.path()).unwrap_err())
        };
        let text = refused(&|at| fs::write(at.join(KEY), &others.node.key).unwrap());
        assert!(text.contains("not a certificate and its key"), "{text}");
        let text = refused(&|at| fs::write(at.join(CA), &ours.node.key).unwrap());
        assert!(text.contains("ca.crt holds no PEM block \"CERTIFICATE\""), "{text}");
        let text = refused(&|at| fs::remove_file(at.join(KEY)).unwrap());
        assert!(text.contains("is the Secret with the certificates mounted there?"), "{text}");
    }

    #[test]
    fn certificates_that_nobody_renews_are_warned_of() {
        let root = tempfile::tempdir().unwrap();
        made().node.write(root.path()).unwrap();
        let tls = TlsDirectory::open(root.path()).unwrap().now();
        let Validity { not_before, not_after } = tls.validity.unwrap();
        let lifetime = not_after - not_before;
        assert_eq!(tls.warning(not_after - lifetime / 3), None);
        for (now, what) in [
            (not_after - lifetime / 6, "nobody has renewed it"),
            (not_after, "nobody has renewed it"),
            (not_after + 1, "it has expired"),
            (not_before - 1, "is the clock right?"),
        ] {
            let warning = tls.warning(now).unwrap();
            assert!(warning.contains(what), "{warning}");
        }
        assert!(!format!("{tls:?}").contains("PRIVATE"));
    }

    /// An authority of an admin's own may sign for more than the controller.
    #[test]
    fn the_authority_alone_makes_nobody_the_controller() {
        install_crypto();
        let (lifetime, now) = (Lifetime::new(Duration::from_secs(24 * 3600)), x509::now());
        let authority = issue::authority(Side::Controller, lifetime, now).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(x509::readable(authority.certificate.as_bytes()));
        let nodes = Controller { authority: WebPkiClientVerifier::builder(Arc::new(roots)).build().unwrap() };
        let look = |signed_by: &issue::Pair, side| {
            let leaf = issue::leaf(side, signed_by, lifetime, now).unwrap();
            let certificate = x509::from_pem(leaf.certificate.as_bytes()).unwrap().remove(0);
            nodes.verify_client_cert(&certificate, &[], UnixTime::now()).map(drop)
        };
        look(&authority, Side::Controller).unwrap();
        // Its authority and another name: for a client too, but not the controller.
        let error = look(&authority, Side::Metrics).unwrap_err().to_string();
        assert!(error.contains("controller.lvprov.io"), "{error}");
        // Its name and another authority.
        let other = issue::authority(Side::Controller, lifetime, now).unwrap();
        look(&other, Side::Controller).unwrap_err();
    }
}
