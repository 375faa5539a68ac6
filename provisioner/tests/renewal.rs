//! Certificates are renewed again and again while node services serve over real
//! TLS on loopback. Only the clock that the renewal is told is another one: a
//! lifetime passes in seconds, and all of its certificates are valid now.
// What helpers cannot get fails the test, as in the tests themselves.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lvprov::certificates::Certificates;
use lvprov::certificates::plan::{Step, Write, plan, write};
use lvprov::certificates::sides::Side;
use lvprov::certificates::state::{Data, RENEW, Secrets};
use lvprov::controller::nodes::connect;
use lvprov::names::DRIVER;
use lvprov::node::capacity::Reporter;
use lvprov::node::identity::IdentityService;
use lvprov::node::in_progress::InProgress;
use lvprov::node::incoming::connections;
use lvprov::node::server::LONGEST_CONNECTION;
use lvprov::tls::{Tls, TlsDirectory};
use lvprov::x509;
use lvprov_proto::csi::GetPluginInfoRequest;
use lvprov_proto::csi::identity_client::IdentityClient;
use lvprov_proto::csi::identity_server::IdentityServer;
use rustls::ServerConfig;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tonic::transport::{Channel, Server};

const DAY: i64 = 24 * 3600;
const LIFE: i64 = 100 * DAY;
/// For so long a node may not hear of anything.
const OVERLAP: i64 = LIFE / 4;

/// A mounted Secret.
struct Mounted {
    directory: TempDir,
    number: u32,
    files: Arc<TlsDirectory>,
}

impl Mounted {
    fn new(data: &Data) -> Self {
        let directory = tempfile::tempdir().unwrap();
        put(directory.path(), 0, data);
        let files = TlsDirectory::open(directory.path()).unwrap();
        Self { directory, number: 0, files }
    }

    /// As kubelet does: all files at once.
    fn bring(&mut self, data: &Data) {
        self.number += 1;
        put(self.directory.path(), self.number, data);
    }
}

fn put(at: &Path, number: u32, data: &Data) {
    let side = at.join(format!("..{number}"));
    fs::create_dir(&side).unwrap();
    for (name, content) in data {
        fs::write(side.join(name), content).unwrap();
        let _ = symlink(format!("..data/{name}"), at.join(name));
    }
    symlink(format!("..{number}"), at.join("..new")).unwrap();
    fs::rename(at.join("..new"), at.join("..data")).unwrap();
}

/// A node: what it serves, with what it has read.
struct Node {
    secret: Mounted,
    calls: SocketAddr,
    metrics: SocketAddr,
}

impl Node {
    async fn start(data: &Data) -> Self {
        let secret = Mounted::new(data);
        let calls = serve(&secret.files, Tls::server_config).await;
        let metrics = serve(&secret.files, Tls::metrics_config).await;
        Self { secret, calls, metrics }
    }
}

async fn serve(files: &Arc<TlsDirectory>, config: fn(&Tls) -> Arc<ServerConfig>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let files = Arc::clone(files);
    let connections = connections(listener, LONGEST_CONNECTION, move || config(&files.now()));
    let (_, capacity) = Reporter::new("n1", Arc::new(InProgress::default()).count(), || Ok(Vec::new()));
    let identity = IdentityServer::new(IdentityService::new(capacity));
    tokio::spawn(Server::builder().add_service(identity).serve_with_incoming(connections));
    address
}

fn to(address: SocketAddr, caller: &Mounted) -> Channel {
    connect(address.ip(), address.port(), Some(Arc::clone(&caller.files))).unwrap()
}

async fn answers(channel: Channel) -> Result<(), tonic::Status> {
    let info = IdentityClient::new(channel).get_plugin_info(GetPluginInfoRequest {}).await?.into_inner();
    assert_eq!(info.name, DRIVER);
    Ok(())
}

fn made_at(time: i64) -> Secrets {
    let mut secrets = Secrets::default();
    for (name, values) in Certificates::generate_at(Duration::from_secs(LIFE as u64), time).unwrap().secrets() {
        *secrets.named_mut(name).unwrap() = Some(values.into_iter().map(|(key, value)| (key, value.into())).collect());
    }
    secrets
}

fn apply(secrets: &mut Secrets, write: Write) {
    secrets.named_mut(write.secret).unwrap().as_mut().unwrap().extend(write.values);
}

fn data(secrets: &Secrets, side: Side) -> &Data {
    secrets.of(side).unwrap()
}

#[tokio::test]
async fn nobody_is_refused_and_nothing_restarted_while_all_certificates_and_authorities_change() {
    lvprov::tls::install_crypto();
    let today = x509::now();
    let mut now = today - 95 * DAY;
    let mut secrets = made_at(now);
    let stranger = Mounted::new(data(&made_at(now), Side::Controller));

    let mut node = Node::start(data(&secrets, Side::Node)).await;
    let mut sleeper = Node::start(data(&secrets, Side::Node)).await;
    let mut controller = Mounted::new(data(&secrets, Side::Controller));
    let mut slow_controller = Mounted::new(data(&secrets, Side::Controller));
    let mut reader = Mounted::new(data(&secrets, Side::Metrics));
    // Open all the time.
    let kept = to(node.calls, &controller);

    let (mut renewed, mut promoted, mut slept_since) = (0, 0, now);
    while now <= today {
        if (today - now) % (30 * DAY) == 0 {
            apply(
                &mut secrets,
                Write {
                    secret: lvprov::names::AUTHORITIES_SECRET,
                    values: [(RENEW.to_owned(), x509::show_time(now).into())].into(),
                },
            );
        }
        while let Some(step) = plan(&secrets, now).step {
            let write = write(step, &secrets, now).unwrap();
            apply(&mut secrets, write);
            renewed += usize::from(step == Step::Renew(Side::Node));
            promoted += usize::from(step == Step::Promote(Side::Node));
            node.secret.bring(data(&secrets, Side::Node));
            controller.bring(data(&secrets, Side::Controller));
            reader.bring(data(&secrets, Side::Metrics));
            for (who, at) in
                [(&controller, &node), (&controller, &sleeper), (&slow_controller, &node), (&slow_controller, &sleeper)]
            {
                let done = answers(to(at.calls, who)).await;
                assert!(done.is_ok(), "{step:?} at {}: {done:?}", (now - today) / DAY);
            }
            for at in [&node, &sleeper] {
                answers(to(at.metrics, &reader)).await.unwrap();
                answers(to(at.calls, &reader)).await.unwrap_err();
                answers(to(at.calls, &stranger)).await.unwrap_err();
            }
        }
        answers(kept.clone()).await.unwrap();
        // They wake up just in time.
        if now - slept_since >= OVERLAP - 5 * DAY {
            sleeper.secret.bring(data(&secrets, Side::Node));
            slow_controller.bring(data(&secrets, Side::Controller));
            slept_since = now;
        }
        now += 5 * DAY;
    }
    assert!(renewed >= 5 && promoted >= 2, "{renewed} certificates, {promoted} authorities");
    let expiry = |mounted: &Mounted| mounted.files.now().expiries()[0].1;
    assert_eq!(expiry(&node.secret), secrets.leaf(Side::Node).unwrap().validity.not_after);
    assert_eq!(expiry(&controller), secrets.leaf(Side::Controller).unwrap().validity.not_after);
}

/// One that slept for longer is refused until it has read its Secret, and then no more.
#[tokio::test]
async fn a_node_that_slept_for_too_long_is_back_as_soon_as_its_secret_is() {
    lvprov::tls::install_crypto();
    let today = x509::now();
    let mut secrets = made_at(today - LIFE / 2);
    let mut node = Node::start(data(&secrets, Side::Node)).await;
    let mut controller = Mounted::new(data(&secrets, Side::Controller));
    let asked = [(RENEW.to_owned(), x509::show_time(today - LIFE / 3).into())].into();
    apply(&mut secrets, Write { secret: lvprov::names::AUTHORITIES_SECRET, values: asked });
    for now in [today - LIFE / 3, today] {
        while let Some(step) = plan(&secrets, now).step {
            let write = write(step, &secrets, now).unwrap();
            apply(&mut secrets, write);
        }
    }
    controller.bring(data(&secrets, Side::Controller));
    let channel = to(node.calls, &controller);
    answers(channel.clone()).await.unwrap_err();
    node.secret.bring(data(&secrets, Side::Node));
    // The same channel, as the controller's: it connects again.
    answers(channel).await.unwrap();
}
