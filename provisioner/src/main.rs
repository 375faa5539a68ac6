//! `lvprov`: what runs in the cluster, and what its admin runs.

use std::error::Error;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use lvprov::logging::Output;
use lvprov::{admin, certificates, controller, installer, logging, node};

/// Local LVM volumes for Kubernetes.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    logging: logging::Args,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves the claims of the cluster. One instance at a time acts.
    Controller(controller::Args),
    /// Serves the volume groups of this node.
    Node(node::Args),
    /// Installs the FlexVolume driver where kubelet finds it.
    InstallDriver(installer::Args),
    /// Prints the Secrets with the certificates of controller, nodes and metrics.
    Certificates(certificates::Args),
    /// Lists what nothing owns any more; removes it with --apply.
    Gc(admin::gc::Args),
    /// Lists the volumes of all nodes.
    Volumes(admin::volumes::Args),
    /// Lists the log volumes of all nodes, and what pods have in them.
    Logs(admin::logs::Args),
    /// Lists, restores and empties what is in the trash.
    Trash(admin::trash::Args),
    /// Gives a volume that was kept to another claim.
    Reuse(admin::reuse::ReuseArgs),
    /// Gives a logical volume that was made by hand to a claim.
    Import(admin::reuse::ImportArgs),
    /// Lists the volume groups of all nodes.
    Capacity(admin::capacity::Args),
    /// Says what will hurt on this node, or on others, and what to do.
    Doctor(admin::doctor::Args),
    /// Makes a volume group on this node.
    Vg(admin::vg::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let output = match cli.command {
        Command::Controller(_) | Command::Node(_) => Output::Stdout,
        _ => Output::Stderr,
    };
    if let Err(error) = logging::init(&cli.logging, output) {
        eprintln!("lvprov: {error}");
        return ExitCode::from(2);
    }
    lvprov::tls::install_crypto();
    let done: Result<ExitCode, Box<dyn Error>> = match cli.command {
        Command::Controller(args) => finished(controller::run(args)),
        Command::Node(args) => finished(node::run(args)),
        Command::InstallDriver(args) => finished(installer::run(&args)),
        Command::Certificates(args) => finished(certificates::run(&args)),
        Command::Gc(args) => finished(admin::gc::run(args)),
        Command::Volumes(args) => finished(admin::volumes::run(args)),
        Command::Logs(args) => finished(admin::logs::run(args)),
        Command::Trash(args) => finished(admin::trash::run(args)),
        Command::Reuse(args) => finished(admin::reuse::reuse(args)),
        Command::Import(args) => finished(admin::reuse::import(args)),
        Command::Capacity(args) => finished(admin::capacity::run(args)),
        Command::Vg(args) => finished(admin::vg::run(&args)),
        Command::Doctor(args) => admin::doctor::run(&args).map_err(Into::into),
    };
    match done {
        Ok(status) => status,
        Err(error) => {
            eprintln!("lvprov: {}", lvprov::with_causes(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// Of commands that either do what they are asked or fail.
fn finished<E: Error + 'static>(done: Result<(), E>) -> Result<ExitCode, Box<dyn Error>> {
    done.map(|()| ExitCode::SUCCESS).map_err(Into::into)
}
