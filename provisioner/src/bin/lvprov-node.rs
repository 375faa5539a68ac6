//! `lvprov-node`: what `lvprov node` is, by itself.
//!
//! On each node it runs all the time, and most of what it has in memory is its
//! own code: without that of the controller it is half as much.

use std::process::ExitCode;

use clap::Parser;
use lvprov::{logging, node};

/// Serves the volume groups of this node.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    logging: logging::Args,
    #[command(flatten)]
    node: node::Args,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = logging::init(&cli.logging, logging::Output::Stdout) {
        eprintln!("lvprov-node: {error}");
        return ExitCode::from(2);
    }
    lvprov::tls::install_crypto();
    match node::run(cli.node) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lvprov-node: {}", lvprov::with_causes(&error));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::Cli;

    #[test]
    fn its_arguments_go_together() {
        Cli::command().debug_assert();
    }
}
