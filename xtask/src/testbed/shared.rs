//! One cluster for many tests.

use std::env;
use std::sync::OnceLock;

use anyhow::{Result, anyhow};

use super::cluster::{Cluster, ClusterOptions};
use crate::progress::step;

/// Whether tests that need a node are to run: `cargo xtask test` says so.
pub fn is_asked_for() -> bool {
    env::var_os("LVPROV_TESTBED").is_some_and(|value| value == "1")
}

/// A cluster that starts when the first test asks for it. Meant for a `static`,
/// which is never dropped: call [`Shared::end`] when all tests have run.
///
/// ```no_run
/// use xtask::testbed::{Cluster, ClusterOptions, Shared};
///
/// static CLUSTER: Shared = Shared::new(ClusterOptions::default, Cluster::install_lvprov);
///
/// fn pods_can_be_listed() -> anyhow::Result<()> {
///     CLUSTER.get()?.kubectl(["get", "pods"])?;
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct Shared {
    options: fn() -> ClusterOptions,
    prepare: fn(&Cluster) -> Result<()>,
    cluster: OnceLock<Result<Cluster, String>>,
}

impl Shared {
    /// One of these options, prepared so once it is up.
    pub const fn new(options: fn() -> ClusterOptions, prepare: fn(&Cluster) -> Result<()>) -> Self {
        Self { options, prepare, cluster: OnceLock::new() }
    }

    /// The cluster. The first to ask starts it, the others wait.
    ///
    /// # Errors
    /// When it could not be started or prepared: the same for everybody.
    pub fn get(&self) -> Result<&Cluster> {
        let cluster = self.cluster.get_or_init(|| {
            let cluster =
                step("Start a cluster", || Cluster::start((self.options)())).map_err(|error| format!("{error:#}"))?;
            match step("Prepare the cluster", || (self.prepare)(&cluster)) {
                Ok(()) => Ok(cluster),
                Err(error) => {
                    cluster.end(true);
                    Err(format!("{error:#}"))
                }
            }
        });
        cluster.as_ref().map_err(|error| anyhow!("{error}"))
    }

    /// Ends the cluster, if one was started; keeps its logs where a test failed.
    pub fn end(&self, failed: bool) {
        if let Some(Ok(cluster)) = self.cluster.get() {
            cluster.end(failed);
        }
    }
}
