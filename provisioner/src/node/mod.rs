//! `lvprov node`: serves the volume groups of one node.
//!
//! Four sockets: TCP with mutual TLS for the controller and for readers of
//! metrics ([`server`]), and two unix sockets for kubelet, which make the driver
//! and the node's topology label known. LVM is asked for what the volume groups hold once at start and
//! after every change ([`capacity`]); between changes no process is started.

pub mod addressee;
pub mod admin_service;
pub mod adopt;
pub mod capability;
pub mod capacity;
pub mod changes;
pub mod collect;
pub mod controller_service;
pub mod create_volume;
pub mod csi_node;
pub mod delete_volume;
pub mod diagnosis;
pub mod expand_volume;
pub mod exposition;
pub mod identity;
pub mod in_progress;
pub mod incoming;
pub mod inotify;
pub mod inventory;
pub mod log_index;
pub mod metrics;
pub mod namespace;
pub mod publish;
pub mod registration;
pub mod served;
pub mod server;
pub mod snapshots;
pub mod sockets;
pub mod trouble;
pub mod volume_id;
pub mod wiper;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lvm::Lvm;
use lvm::config::{ConfigError, NodeConfig};
use lvm::names::VgName;
use lvm::trouble::Notes;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::capacity::Reporter;
use self::changes::ChangesError;
use self::in_progress::InProgress;
use self::inventory::PodsDirectory;
use self::log_index::Indexer;
use self::namespace::NamespaceError;
use self::served::Served;
use self::server::{LONGEST_CONNECTION, Shared, Tls};
use self::sockets::{Paths, Socket, SocketError};
use self::wiper::Wiper;
use crate::names::{METRICS_PORT, NODE_PORT};
use crate::tls::{TlsDirectory, TlsError};

/// Where LVM keeps copies of its metadata (lvm.conf(5), `backup_dir`).
const LVM_BACKUP_DIRECTORY: &str = "/etc/lvm/backup";

/// What `lvprov node` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of this Kubernetes node
    #[arg(long, env = "NODE_NAME", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub node_name: String,
    /// Address for the controller to call
    #[arg(long, default_value_t = SocketAddr::from(([0, 0, 0, 0], NODE_PORT)))]
    pub listen: SocketAddr,
    /// Address for Prometheus to read metrics from
    #[arg(long, default_value_t = SocketAddr::from(([0, 0, 0, 0], METRICS_PORT)))]
    pub metrics_listen: SocketAddr,
    /// Directory with tls.crt, tls.key, ca.crt and metrics-ca.crt
    #[arg(long, default_value = "/tls")]
    pub tls_dir: PathBuf,
    /// kubelet's root directory
    #[arg(long, default_value = "/var/lib/kubelet")]
    pub kubelet_root: PathBuf,
    /// Work in the host's mount namespace, with the host's own lvm; needs
    /// hostPID and a privileged container
    #[arg(long)]
    pub host_mount_namespace: bool,
    /// Serve only these volume groups; all that there are, if not given
    #[arg(long = "volume-group", value_name = "VG")]
    pub volume_groups: Vec<VgName>,
}

/// Why the node service ended.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The certificates cannot be read.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The host's namespaces cannot be entered.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// The node's configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// tokio cannot start.
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    /// The TCP address cannot be bound.
    #[error("cannot listen on {address}")]
    Listen {
        /// As asked for.
        address: SocketAddr,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// A unix socket cannot be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Changes of volume groups cannot be seen.
    #[error(transparent)]
    Changes(#[from] ChangesError),
    /// A server ended by itself.
    #[error("the {service} server failed")]
    Serve {
        /// Which.
        service: &'static str,
        /// What tonic says.
        #[source]
        source: tonic::transport::Error,
    },
    /// A task of ours panicked.
    #[error("a task broke off")]
    Task(#[from] tokio::task::JoinError),
}

/// Runs the node service until SIGTERM or SIGINT; then it accepts nothing more
/// and ends once everything that runs has.
///
/// # Errors
/// When it cannot start, or one of its parts fails.
pub fn run(args: Args) -> Result<(), NodeError> {
    // The container's files are out of sight afterwards, but for what is open.
    let tls = TlsDirectory::open(&args.tls_dir)?;
    if args.host_mount_namespace {
        namespace::enter_host()?;
    }
    let lvm = open_lvm(args.host_mount_namespace)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // The work is done by lvm; this only waits for it.
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(NodeError::Runtime)?;
    // Dropping the runtime waits for work in LVM that is still under way.
    runtime.block_on(serve(args, lvm, tls))
}

fn open_lvm(on_host: bool) -> Result<Lvm, NodeError> {
    let config = NodeConfig::load()?;
    // On the host, lvm commands outlive our container.
    let lvm = if on_host { Lvm::in_cgroup(config) } else { Lvm::new(config) };
    Ok(lvm.keeping_lvm())
}

async fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), NodeError> {
    let error = |source| NodeError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(error)?;
    let address = listener.local_addr().map_err(error)?;
    Ok((listener, address))
}

async fn serve(args: Args, lvm: Lvm, files: Arc<TlsDirectory>) -> Result<(), NodeError> {
    let asked_to_stop = asked_to_stop().map_err(NodeError::Runtime)?;
    let (listener, address) = listen(args.listen).await?;
    let (metrics_listener, metrics_address) = listen(args.metrics_listen).await?;
    let paths = Paths::new(&args.kubelet_root);
    let (csi_socket, csi_listener) = Socket::bind(&paths.csi)?;

    let lvm = Arc::new(lvm);
    let served = Served::new(&args.volume_groups);
    let in_progress = Arc::new(InProgress::default());
    let (reporter, capacity) = Reporter::new(&args.node_name, in_progress.count(), {
        let (lvm, served) = (Arc::clone(&lvm), served.clone());
        move || Ok(lvm.volume_groups_and_pools()?.into_iter().filter(|group| served.includes(&group.name)).collect())
    });
    let capacity = capacity.with_classes(&lvm.config.device_classes);
    let notes = Notes::default();
    let (troubles, failing) = trouble::Watcher::new(notes.clone());
    let pods = PodsDirectory::new(&args.kubelet_root);
    let indexer = Indexer::new(Arc::clone(&lvm), served.clone(), pods.clone());
    let wiper = Wiper::new(Arc::clone(&lvm), served.clone(), capacity.clone());
    let shared = Shared {
        node_name: args.node_name.clone(),
        lvm: Arc::clone(&lvm),
        served,
        pods,
        capacity,
        failing,
        notes,
        in_progress,
        wiper: wiper.clone(),
    };

    // Ends with the runtime.
    tokio::spawn(Arc::clone(&files).watch());
    let tls = Tls { files, longest_connection: LONGEST_CONNECTION };
    let stop = CancellationToken::new();
    let mut servers = JoinSet::new();
    let controller = server::serve_controller(shared.clone(), listener, tls.clone(), stop.clone());
    spawn(&mut servers, "controller", controller);
    let metrics = server::serve_metrics(shared.clone(), metrics_listener, tls, stop.clone());
    spawn(&mut servers, "metrics", metrics);
    spawn(&mut servers, "CSI", server::serve_kubelet(shared, csi_listener, stop.clone()));
    // Last, since kubelet calls as soon as it is there.
    let (registration_socket, registration) = Socket::bind(&paths.registration)?;
    let registered = {
        let (csi, stop) = (paths.csi.clone(), stop.clone());
        async move { server::serve_registration(&csi, registration, stop).await }
    };
    spawn(&mut servers, "registration", registered);
    info!(node = args.node_name, %address, %metrics_address, version = env!("CARGO_PKG_VERSION"), "serving");

    let (log_lvm, at_start) = (Arc::clone(&lvm), wiper.clone());
    tokio::task::spawn_blocking(move || mount_logs(&log_lvm, &at_start));
    // These end with the runtime.
    tokio::spawn(troubles.run());
    tokio::spawn(indexer.run());
    tokio::spawn(wiper.clone().run());
    let ended = tokio::select! {
        () = asked_to_stop => Ok(()),
        // Capacity that is not kept up to date misleads the scheduler: better to be restarted.
        changes = reporter.run(Path::new(lvm::lock::DIRECTORY), Path::new(LVM_BACKUP_DIRECTORY)) => changes.map_err(NodeError::from),
        Some(server) = servers.join_next() => server.map_err(NodeError::from).and_then(|result| result),
    };
    // The reporter has been dropped, and with it ended the streams of capacity.
    info!("stopping; what runs is finished first");
    drop((registration_socket, csi_socket));
    stop.cancel();
    wiper.stop();
    while let Some(server) = servers.join_next().await {
        if let Err(error) = server.map_err(NodeError::from).and_then(|result| result) {
            warn!(%error, "while stopping");
        }
    }
    ended
}

fn spawn(
    servers: &mut JoinSet<Result<(), NodeError>>,
    service: &'static str,
    server: impl Future<Output = Result<(), tonic::transport::Error>> + Send + 'static,
) {
    servers.spawn(async move { server.await.map_err(|source| NodeError::Serve { service, source }) });
}

/// Log volumes stay mounted when their pods are gone, for log shippers; after a
/// reboot nobody else mounts them again. The same report says what is in the trash.
fn mount_logs(lvm: &Lvm, wiper: &Wiper) {
    match lvm.volumes() {
        Ok(volumes) => {
            lvm.note_file_systems(&volumes);
            wiper.begin(&volumes);
            for error in lvm.mount_logs(&volumes) {
                warn!(%error, "a log volume is not mounted");
            }
        }
        Err(error) => {
            warn!(%error, "log volumes are not mounted");
            wiper.trash_changed();
        }
    }
}

/// Ends at the first SIGTERM or SIGINT from now on.
fn asked_to_stop() -> io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
