//! `cargo xtask image`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::paths;
use crate::progress::step;
use crate::setup::binaries::{self, Profile};
use crate::testbed::image::{Image, write_archive};

/// Builds the container image that `deploy/manifests` installs from, as an
/// archive for `docker load`, `podman load` or `ctr images import`.
#[derive(Debug, Args)]
pub struct ImageCommand {
    /// Where to write it.
    #[arg(long, short, default_value_os_t = paths::testbed().join("lvprov-image.tar"))]
    output: PathBuf,
    /// Its name.
    #[arg(long, default_value = "lvprov.io/lvprov:latest")]
    name: String,
    /// Profile of the binaries.
    #[arg(long, value_enum, default_value_t = Profile::Release)]
    profile: Profile,
}

/// Runs it.
///
/// # Errors
/// When a binary does not build, or the archive cannot be written.
pub fn run(command: &ImageCommand) -> Result<()> {
    let tools = step("Build lvprov", || binaries::build(command.profile))?;
    if let Some(directory) = command.output.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let image = Image { name: command.name.clone(), ..Image::lvprov(&tools) };
    write_archive(&[image], &command.output)?;
    println!("{}", command.output.display());
    Ok(())
}
