//! Building what is shipped to nodes.

use std::io;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::cargo::cargo;
use crate::paths;

/// Cargo profile of the shipped binaries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
pub enum Profile {
    /// Quick to build.
    #[default]
    Debug,
    /// As shipped.
    Release,
    /// With the points at which tests of crashes end a process. Never shipped.
    #[value(skip)]
    Faults,
}

impl Profile {
    /// Name of its directory below the target triple's.
    pub fn directory(self) -> &'static str {
        match self {
            Profile::Debug | Profile::Faults => "debug",
            Profile::Release => "release",
        }
    }
}

/// A directory of its own: what is built with another feature must not take the place of what is shipped.
fn faults() -> PathBuf {
    paths::target().join("faults")
}

/// Where the static binaries of a profile are.
pub fn directory(profile: Profile) -> PathBuf {
    let target = if profile == Profile::Faults { faults() } else { paths::target() };
    target.join(paths::static_target()).join(profile.directory())
}

/// Builds the static `lvprov` and `lvprov-flexvolume`; gives their directory.
///
/// # Errors
/// When cargo does; its output goes to standard error.
pub fn build(profile: Profile) -> Result<PathBuf> {
    let packages: &[&str] = match profile {
        // All at once, so that tests find everything compiled with the same features.
        Profile::Debug => &["--workspace", "--bins"],
        Profile::Faults => &["--workspace", "--bin", "lvprov", "--bin", "lvprov-node", "--bin", "lvprov-flexvolume"],
        // Nothing but what each program asks for.
        Profile::Release => &["--package", "lvprov", "--package", "lvprov-flexvolume", "--bins"],
    };
    run(profile, packages)
}

/// As [`build`], and only `lvprov-flexvolume`.
///
/// # Errors
/// When cargo does; its output goes to standard error.
pub fn build_driver(profile: Profile) -> Result<PathBuf> {
    run(profile, &["--package", "lvprov-flexvolume", "--bins"])
}

fn run(profile: Profile, packages: &[&str]) -> Result<PathBuf> {
    let mut cargo = cargo();
    cargo.args(["build", "--quiet"]).args(packages).stdout(io::stderr());
    match profile {
        Profile::Debug => &mut cargo,
        Profile::Release => cargo.arg("--release"),
        // Dependencies are those of the others (Cargo reference, build.build-dir).
        Profile::Faults => cargo
            .args(["--features", "lvm/fault-points", "--target-dir"])
            .arg(faults())
            .env("CARGO_BUILD_BUILD_DIR", paths::target()),
    };
    if !cargo.status().context("cannot run cargo")?.success() {
        bail!("the binaries for the nodes do not build; --no-build takes what there is");
    }
    Ok(directory(profile))
}
