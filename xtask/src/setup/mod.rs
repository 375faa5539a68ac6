//! Getting what the test bed needs onto the machine.

pub mod binaries;
mod go;
pub mod kubernetes;
pub mod packages;

use anyhow::Result;

/// Packages and Kubernetes, for a cluster.
///
/// # Errors
/// When one of them cannot be had.
pub fn for_cluster() -> Result<()> {
    let all: Vec<&str> = [packages::NODE, packages::CLUSTER].concat();
    packages::install(&all)?;
    kubernetes::build()
}
