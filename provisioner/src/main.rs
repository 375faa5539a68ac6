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
    let done: Result<(), Box<dyn Error>> = match cli.command {
        Command::Controller(args) => controller::run(args).map_err(Into::into),
        Command::Node(args) => node::run(args).map_err(Into::into),
        Command::InstallDriver(args) => installer::run(&args).map_err(Into::into),
        Command::Certificates(args) => certificates::run(&args).map_err(Into::into),
        Command::Gc(args) => admin::gc::run(args).map_err(Into::into),
        Command::Volumes(args) => admin::volumes::run(args).map_err(Into::into),
        Command::Logs(args) => admin::logs::run(args).map_err(Into::into),
        Command::Trash(args) => admin::trash::run(args).map_err(Into::into),
        Command::Reuse(args) => admin::reuse::reuse(args).map_err(Into::into),
        Command::Import(args) => admin::reuse::import(args).map_err(Into::into),
        Command::Capacity(args) => admin::capacity::run(args).map_err(Into::into),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lvprov: {}", lvprov::with_causes(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
