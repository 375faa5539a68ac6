//! `cargo xtask cluster`.

use std::time::Instant;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};

use crate::agent::Command;
use crate::progress::{say, step};
use crate::sandbox::Sandbox;
use crate::setup;
use crate::setup::binaries::{self, Profile};
use crate::testbed::{Cluster, ClusterOptions};

/// What to do with a cluster.
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Start a cluster and leave it running.
    #[command(after_help = "Examples:
  cargo xtask cluster up --nodes 2
  cargo xtask cluster kubectl get pods -A
  cargo xtask cluster exec n1 -- lvs
  cargo xtask cluster down")]
    Up(Up),
    /// Run a command on a node.
    Exec {
        /// Which cluster.
        #[command(flatten)]
        which: Which,
        /// n1, n2, …
        node: String,
        /// What to run there.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Run kubectl as the cluster's admin.
    Kubectl {
        /// Which cluster.
        #[command(flatten)]
        which: Which,
        /// kubectl's arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Build lvprov and install it from deploy/manifests, as a user would; again
    /// after a change.
    Install {
        /// Which cluster.
        #[command(flatten)]
        which: Which,
        /// Take the binaries as they are.
        #[arg(long)]
        no_build: bool,
    },
    /// Tell what runs, and where its logs are.
    Status(Which),
    /// End a cluster with everything in it.
    Down(Which),
}

/// Which cluster is meant.
#[derive(Debug, Args)]
pub struct Which {
    /// Its name.
    #[arg(long, default_value = "dev")]
    name: String,
}

/// What the cluster is to be.
#[derive(Debug, Args)]
pub struct Up {
    #[command(flatten)]
    which: Which,
    /// How many nodes.
    #[arg(long, default_value_t = 2)]
    nodes: u8,
    /// Memory of a node, in MiB.
    #[arg(long, default_value_t = 2048)]
    memory: u32,
    /// Size in GiB of a disk of each node; the first carries vg0, a second vg1, and so on.
    #[arg(long = "disk-gib", default_value = "20")]
    disks: Vec<u64>,
    /// Profile of the binaries.
    #[arg(long, value_enum, default_value_t)]
    profile: Profile,
}

/// Runs it; gives the exit status.
///
/// # Errors
/// When there is no such cluster, or it cannot be started.
pub fn run(command: ClusterCommand) -> Result<u8> {
    let status = |code: i32| u8::try_from(code).unwrap_or(u8::MAX);
    match command {
        ClusterCommand::Up(up) => {
            start(up)?;
            Ok(0)
        }
        ClusterCommand::Exec { which, node, command } => {
            let cluster = Cluster::find(&which.name)?;
            Ok(status(cluster.node(&node)?.inherit(&Command::new(command))?))
        }
        ClusterCommand::Kubectl { which, arguments } => {
            Ok(status(Cluster::find(&which.name)?.kubectl_inherit(arguments)?))
        }
        ClusterCommand::Install { which, no_build } => {
            let cluster = Cluster::find(&which.name)?;
            if !no_build {
                binaries::build(cluster.options().profile)?;
            }
            step("Install lvprov", || cluster.install_lvprov())?;
            Ok(0)
        }
        ClusterCommand::Status(which) => show(&which.name),
        ClusterCommand::Down(which) => {
            match Cluster::find(&which.name) {
                Ok(cluster) => cluster.end(false),
                // One that did not come up has no cluster to it, but a sandbox.
                Err(error) => match Sandbox::find(&which.name)? {
                    Some(sandbox) => sandbox.end()?,
                    None => return Err(error),
                },
            }
            Ok(0)
        }
    }
}

fn start(up: Up) -> Result<()> {
    if Sandbox::find(&up.which.name)?.is_some() {
        bail!("a cluster {} is running: `cargo xtask cluster down` ends it", up.which.name);
    }
    setup::for_cluster()?;
    let start = Instant::now();
    let cluster = Cluster::start(ClusterOptions {
        name: up.which.name,
        nodes: up.nodes,
        memory_mib: up.memory,
        disks_gib: up.disks,
        spare_disks_gib: Vec::new(),
        profile: up.profile,
        detached: true,
        control_only: false,
        crun: true,
    })?;
    say(format!(
        "cluster {} with {} nodes (user-mode Linux) is up after {:.1} s; logs are in {}",
        cluster.options().name,
        cluster.options().nodes,
        start.elapsed().as_secs_f64(),
        cluster.directory().display()
    ));
    Ok(())
}

fn show(name: &str) -> Result<u8> {
    let Some(_) = Sandbox::find(name)? else {
        println!("cluster {name} is not running");
        return Ok(1);
    };
    let cluster = Cluster::find(name)?;
    println!("cluster {name} is running; logs are in {}", cluster.directory().display());
    println!("{}", cluster.kubectl(["get", "nodes", "-o", "wide"])?);
    println!("{}", cluster.kubectl(["get", "pods", "--all-namespaces", "-o", "wide"])?);
    Ok(0)
}
