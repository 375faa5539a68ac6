//! `cargo xtask`: set up, use and test lvprov on a test bed.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use xtask::commands::bench::BenchCommand;
use xtask::commands::cluster::ClusterCommand;
use xtask::commands::demo::DemoCommand;
use xtask::commands::fuzz::FuzzCommand;
use xtask::commands::image::ImageCommand;
use xtask::commands::node::NodeCommand;
use xtask::commands::test::TestCommand;
use xtask::progress::step;
use xtask::{agent, commands, sandbox, setup};

/// The test bed of lvprov: nodes with real LVM, and a real Kubernetes.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a command on a throw-away node with a volume group `vg0`.
    Node(NodeCommand),
    /// A Kubernetes cluster that stays between commands.
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Show all that lvprov does on a real Kubernetes with two nodes.
    Demo(DemoCommand),
    /// Measure what lvprov adds, side by side with the same without it.
    Bench(BenchCommand),
    /// Build the container image that lvprov is installed from.
    Image(ImageCommand),
    /// Run all tests, from unit tests to end-to-end ones.
    Test(TestCommand),
    /// Give random input to whatever reads input from outside.
    Fuzz(FuzzCommand),
    /// Install and build what the test bed needs, so that later commands start in seconds.
    Setup,
    /// Parts that run in a sandbox or a guest.
    #[command(hide = true, subcommand)]
    Internal(Internal),
}

#[derive(Subcommand)]
enum Internal {
    /// Make a sandbox and stay until it ends.
    Supervise {
        directory: PathBuf,
        #[arg(long)]
        detached: bool,
    },
    /// Process 1 of a sandbox.
    Init {
        #[arg(long)]
        detached: bool,
    },
    /// Time the commands of a plan that is read from standard input.
    Time,
    /// Run commands for others.
    Agent {
        #[arg(long)]
        listen: SocketAddr,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<u8> {
    match command {
        Command::Node(node) => return commands::node::run(&node),
        Command::Cluster(cluster) => return commands::cluster::run(cluster),
        Command::Demo(demo) => commands::demo::run(&demo)?,
        Command::Bench(bench) => commands::bench::run(&bench)?,
        Command::Image(image) => commands::image::run(&image)?,
        Command::Test(test) => return commands::test::run(&test),
        Command::Fuzz(fuzz) => return commands::fuzz::run(&fuzz),
        Command::Setup => {
            setup::for_tests()?;
            step("Build lvprov", || setup::binaries::build(setup::binaries::Profile::Debug))?;
        }
        Command::Internal(Internal::Supervise { directory, detached }) => {
            sandbox::supervisor::supervise(&directory, detached)?;
        }
        Command::Internal(Internal::Init { detached }) => sandbox::supervisor::init(detached)?,
        Command::Internal(Internal::Time) => commands::bench::timing::run()?,
        Command::Internal(Internal::Agent { listen }) => agent::server::serve(listen)?,
    }
    Ok(0)
}
