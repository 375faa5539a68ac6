//! What the admin runs: `lvprov gc`, `lvprov volumes`, `lvprov logs`,
//! `lvprov capacity`, `lvprov doctor`, `lvprov trash`, `lvprov reuse`, `lvprov import`.
//!
//! All of them ask every node that has a node service, with the controller's
//! certificate: run them in the controller's pod, or anywhere with a
//! kubeconfig and the certificate's files.

pub mod capacity;
mod cluster;
pub mod doctor;
mod fleet;
mod garbage;
pub mod gc;
pub mod logs;
mod report;
pub mod reuse;
pub mod table;
pub mod trash;
pub mod vg;
pub mod volumes;

use std::future::Future;
use std::path::PathBuf;

use kube::Client;
use lvm::clock::now;

use crate::names::NODE_PORT;
use crate::tls::{TlsDirectory, TlsError};
use fleet::Fleet;

/// How to reach cluster and nodes.
#[derive(Debug, clap::Args)]
pub struct Reach {
    /// Directory with tls.crt, tls.key and ca.crt, to call the nodes with
    #[arg(long, default_value = "/tls", value_name = "DIR")]
    pub tls_dir: PathBuf,
    /// TCP port of the node service on every node
    #[arg(long, default_value_t = NODE_PORT, value_name = "PORT")]
    pub node_port: u16,
}

/// Why a command could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The asynchronous runtime cannot be started.
    #[error("cannot start the runtime")]
    Runtime(#[source] std::io::Error),
    /// The files to call nodes with cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Neither in a cluster nor with a kubeconfig.
    #[error(
        "cannot reach a cluster; run this with `kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov …`, \
         or set KUBECONFIG"
    )]
    Client(#[source] Box<kube::Error>),
    /// The API server did not answer, or not all of it. Nothing was changed.
    #[error("cannot list {what}, so it is not known what is still in use; nothing was changed")]
    Api {
        /// Of which objects.
        what: &'static str,
        /// What the API server, or the connection, says.
        #[source]
        source: Box<kube::Error>,
    },
    /// What is looked at is root's.
    #[error("this looks at devices and mounts of this machine: run it as root, or ask a node with --node or --all")]
    NotRoot,
    /// The host cannot be looked at from here.
    #[error(transparent)]
    Namespace(#[from] crate::node::namespace::NamespaceError),
    /// The node's configuration cannot be used.
    #[error(transparent)]
    Config(#[from] lvm::config::ConfigError),
    /// A volume group is not made.
    #[error(transparent)]
    CreateGroup(#[from] lvm::create_group::CreateGroupError),
    /// No node of this name has a node service.
    #[error("no node {0:?} has an lvprov node service; `lvprov capacity` lists those that have")]
    NoNode(String),
    /// What is shown is not all there is.
    #[error("{unreached} of {nodes} nodes did not answer; what is on them is not shown")]
    Incomplete {
        /// How many did not answer.
        unreached: usize,
        /// How many there are.
        nodes: usize,
    },
    /// Some of what was to be removed is still there.
    #[error("{0} of the items could not be removed; the list says why")]
    NotRemoved(usize),
    /// It cannot be done so; the text says why and what to do.
    #[error("{0}")]
    Refused(String),
    /// An object could not be read or written; it was begun, and can be run again.
    #[error("cannot {what}; run the same command again")]
    Object {
        /// What was tried.
        what: String,
        /// What the API server, or the connection, says.
        #[source]
        source: Box<kube::Error>,
    },
    /// Standard output cannot be written.
    #[error("cannot write the result")]
    Output(#[source] std::io::Error),
}

/// Connects, and runs `work` to its end.
fn run<F, W>(reach: &Reach, work: W) -> Result<(), AdminError>
where
    W: FnOnce(Client, Fleet) -> F,
    F: Future<Output = Result<(), AdminError>>,
{
    let tls = TlsDirectory::open(&reach.tls_dir)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(AdminError::Runtime)?;
    runtime.block_on(async {
        let client = Client::try_default().await.map_err(|error| AdminError::Client(Box::new(error)))?;
        let nodes = cluster::nodes(&client).await?;
        let fleet = Fleet::new(nodes, reach.node_port, Some(tls));
        work(client, fleet).await
    })
}
