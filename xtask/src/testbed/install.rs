//! Installing lvprov on a cluster, the way its README tells a user to.

use std::path::PathBuf;
use std::process::Command as Process;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::cluster::Cluster;
use super::image::Image;
use crate::paths;
use crate::setup::binaries;

/// Where lvprov is installed.
pub const NAMESPACE: &str = "lvprov-system";
const ROLLOUT_LIMIT: Duration = Duration::from_secs(240);

impl Cluster {
    /// Imports the image, makes certificates, applies `deploy/manifests`, and
    /// waits until every node can be provisioned on. Where lvprov is installed
    /// already, it is replaced by what is built now.
    ///
    /// # Errors
    /// When a binary is not built, an object is refused, or a pod does not
    /// become ready in two minutes.
    pub fn install_lvprov(&self) -> Result<()> {
        let tools = binaries::directory(self.options().profile);
        self.import_images(&[Image::lvprov(&tools)])?;
        let again = self.kubectl_output(["-n", NAMESPACE, "get", "daemonset/lvprov-node"])?.success();
        let manifests = paths::repository().join("deploy/manifests");
        let file = |name: &str| manifests.join(name).display().to_string();
        self.kubectl(["apply", "-f", &file("00-namespace.yaml")])?;
        if !again {
            self.apply(&certificates(tools.join("lvprov"))?)?;
        }
        self.kubectl(["apply", "-f", &file("")])?;
        if again {
            self.kubectl([
                "-n",
                NAMESPACE,
                "rollout",
                "restart",
                "daemonset/lvprov-node",
                "deployment/lvprov-controller",
            ])?;
        }
        for object in ["daemonset/lvprov-node", "deployment/lvprov-controller"] {
            self.wait_rollout(object)?;
        }
        for node in self.node_names() {
            let registered = r"jsonpath={.metadata.labels.topology\.lvprov\.io/node}";
            self.wait(&format!("node/{node}"), &format!("{registered}={node}"), ROLLOUT_LIMIT)?;
        }
        Ok(())
    }

    fn wait_rollout(&self, object: &str) -> Result<()> {
        let limit = format!("--timeout={}s", ROLLOUT_LIMIT.as_secs());
        let output = self.kubectl_output(["-n", NAMESPACE, "rollout", "status", object, &limit])?;
        if output.success() {
            return Ok(());
        }
        let state = self.kubectl_output(["-n", NAMESPACE, "describe", "pods"])?.stdout;
        let logs = self.kubectl_output(["-n", NAMESPACE, "logs", object, "--all-pods=true", "--tail=30"])?;
        bail!("{object} did not become ready: {}\n{state}\n{}{}", output.stderr.trim(), logs.stdout, logs.stderr)
    }
}

/// The Secrets for mutual TLS, as YAML.
fn certificates(lvprov: PathBuf) -> Result<String> {
    let output = Process::new(&lvprov)
        .args(["certificates", "--namespace", NAMESPACE])
        .output()
        .with_context(|| format!("cannot run {}", lvprov.display()))?;
    if !output.status.success() {
        bail!("`lvprov certificates` failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}
