//! Getting what the test bed needs onto the machine.

pub mod binaries;
mod go;
pub mod go_module;
pub mod kubernetes;
pub mod packages;

use anyhow::Result;

/// Packages, Kubernetes and the snapshot-controller, for a cluster.
///
/// # Errors
/// When one of them cannot be had.
pub fn for_cluster() -> Result<()> {
    packages::install(&[packages::NODE, packages::CLUSTER].concat())?;
    kubernetes::KUBERNETES.build()?;
    kubernetes::SNAPSHOT_CONTROLLER.build()
}

/// All that tests use: what [`for_cluster`] gets, a log shipper, and the public tests of CSI drivers.
///
/// # Errors
/// When one of them cannot be had.
pub fn for_tests() -> Result<()> {
    packages::install(&[packages::NODE, packages::CLUSTER, packages::TESTS].concat())?;
    kubernetes::KUBERNETES.build()?;
    kubernetes::SNAPSHOT_CONTROLLER.build()?;
    kubernetes::CSI_SANITY.build()
}
