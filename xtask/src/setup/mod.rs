//! Getting what the test bed needs onto the machine.

pub mod binaries;
mod go;
pub mod go_module;
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
    kubernetes::KUBERNETES.build()
}

/// What [`for_cluster`] gets, and the public tests of CSI drivers.
///
/// # Errors
/// When one of them cannot be had.
pub fn for_tests() -> Result<()> {
    for_cluster()?;
    kubernetes::CSI_SANITY.build()
}
