//! `cargo xtask node`.

use std::{env, io};

use anyhow::Result;
use clap::Args;

use crate::agent::Command;
use crate::agent::client::Input;
use crate::progress::say;
use crate::setup::{binaries, packages};
use crate::testbed::node::{Node, NodeOptions};

/// Boots a throw-away node, runs a command there, hands back its output and
/// exit status.
///
/// The node is a machine of its own with this machine's files (nothing it
/// writes reaches the disk), root, LVM, a volume group `vg0`, and `lvprov` and
/// `lvprov-flexvolume` on its PATH. The command starts in the current directory.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask node -- lvs
  cargo xtask node -- sh -c 'lvcreate -L 1G -n a vg0 && mkfs.xfs /dev/vg0/a'
  cargo xtask node --no-build --disk-gib 20 --disk-gib 5 -- vgs
  cargo xtask node                  # a shell that reads commands from standard input")]
pub struct NodeCommand {
    /// What to run; a shell where nothing is given.
    #[arg(last = true)]
    command: Vec<String>,
    /// Take the binaries as they are.
    #[arg(long)]
    no_build: bool,
    /// Profile of the binaries.
    #[arg(long, value_enum, default_value_t)]
    profile: binaries::Profile,
    /// Memory in MiB.
    #[arg(long, default_value_t = 1024)]
    memory: u32,
    /// Size in GiB of a disk; the first carries vg0, a second vg1, and so on.
    #[arg(long = "disk-gib", default_value = "20")]
    disks: Vec<u64>,
    /// Disks without volume groups on them.
    #[arg(long)]
    bare: bool,
    /// Say how long things took.
    #[arg(long, short)]
    verbose: bool,
}

/// Runs it; gives the command's exit status.
///
/// # Errors
/// When there is no node, or the command cannot be started there.
pub fn run(command: &NodeCommand) -> Result<u8> {
    packages::install(packages::NODE)?;
    if !command.no_build {
        binaries::build(command.profile)?;
    }
    let options = NodeOptions {
        memory_mib: command.memory,
        disks_gib: command.disks.clone(),
        volume_groups: !command.bare,
        profile: command.profile,
        ..NodeOptions::default()
    };
    let start = std::time::Instant::now();
    let node = Node::boot_with(options)?;
    if command.verbose {
        say(format!("user-mode Linux node ready after {:.1} s", start.elapsed().as_secs_f64()));
    }
    let argv = if command.command.is_empty() { vec!["sh".into()] } else { command.command.clone() };
    let remote = Command { cwd: env::current_dir().ok(), ..Command::new(argv) };
    let exit = node.agent().exec(&remote, Input::Inherit, None, &mut io::stdout(), &mut io::stderr())?;
    Ok(u8::try_from(exit.shell_code()).unwrap_or(u8::MAX))
}
