//! `cargo xtask fuzz`.

use anyhow::{Context, Result};
use clap::Args;

use crate::cargo::cargo;

/// Gives random input to whatever reads input from outside, and to the driver
/// as a whole.
///
/// Each target says how often it was run. Input that fails is made as small as
/// it can be and printed; it belongs into a test of its own then. Built to be
/// fast, and to notice every overflow.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask fuzz                  # ten minutes each
  cargo xtask fuzz --seconds 60 mountinfo")]
pub struct FuzzCommand {
    /// Only targets whose name contains this.
    filter: Option<String>,
    /// How long each target is run; as many at once as there are cores.
    #[arg(long, default_value_t = 600)]
    seconds: u32,
}

/// Runs it; gives the exit status.
///
/// # Errors
/// When cargo cannot be run.
pub fn run(command: &FuzzCommand) -> Result<u8> {
    let status = cargo()
        .args([
            "test",
            "--quiet",
            "--profile",
            "fuzz",
            "--package",
            "lvm",
            "--package",
            "lvprov-flexvolume",
            "--test",
            "fuzz",
        ])
        .args(["--no-fail-fast", "--", "--nocapture"])
        .args(&command.filter)
        .env(crate::commands::test::FUZZ_SECONDS, command.seconds.to_string())
        .status()
        .context("cannot run cargo test")?;
    Ok(u8::from(!status.success()))
}
