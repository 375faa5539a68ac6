//! `lvprov vg create`: a volume group that holds what is to come.

use std::path::PathBuf;

use lvm::Lvm;
use lvm::config::NodeConfig;
use lvm::create_group::{MOST_VOLUMES, USUAL_VOLUMES, metadata_size};
use lvm::names::VgName;
use lvm::report::volumes_that_fit;
use lvm::size::human;
use nix::unistd::Uid;

use super::AdminError;
use crate::node::namespace;

/// What `lvprov vg` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Makes a volume group of blank disks on this node.
    Create(Create),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lvprov vg create vg0 /dev/sdb
  lvprov vg create vg0 /dev/nvme0n1 /dev/nvme1n1 --volumes 20000
  lvprov vg create vg0 /dev/sdb --dry-run

What vgcreate would do, but for two things: the metadata area is large enough for
the volumes that are to come, which cannot be changed later; and a disk that is
used, or that has anything on it, is refused.")]
struct Create {
    /// Name of the group, as StorageClasses are to say it
    name: VgName,
    /// The disks, or partitions
    #[arg(required = true, value_name = "DISK")]
    disks: Vec<PathBuf>,
    /// How many volumes the group is to hold at least
    #[arg(long, default_value_t = USUAL_VOLUMES, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=MOST_VOLUMES))]
    volumes: u64,
    /// Look at the disks, say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// In a privileged container with hostPID: work on the host
    #[arg(long)]
    host_mount_namespace: bool,
}

/// Runs the command.
///
/// # Errors
/// When the group cannot be made as asked; then nothing was changed.
pub fn run(args: &Args) -> Result<(), AdminError> {
    let Command::Create(create) = &args.command;
    if !Uid::effective().is_root() {
        return Err(AdminError::NotRoot);
    }
    if create.host_mount_namespace {
        namespace::enter_host()?;
    }
    let lvm = Lvm::new(NodeConfig::load()?);
    let Create { name, disks, volumes, .. } = create;
    let shown: Vec<String> = disks.iter().map(|disk| disk.display().to_string()).collect();
    let shown = shown.join(", ");
    let metadata = metadata_size(*volumes);
    let group = match create.dry_run {
        true => {
            lvm.check_disks(disks, metadata)?;
            println!(
                "would make volume group {name} on {shown}, with a metadata area of {} for {volumes} volumes",
                human(metadata)
            );
            return Ok(());
        }
        false => lvm.create_group(name, disks, *volumes)?,
    };
    println!(
        "made volume group {name} on {shown}: {} for volumes, about {} of them",
        human(group.free),
        volumes_that_fit(group.metadata.free)
    );
    Ok(())
}
