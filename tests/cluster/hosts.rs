//! The driver taken away while kubelet needs it: docs/operations.md, "Hosts as
//! they are".

use anyhow::{Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::objects::{LONG, Space, claim_volume, eventually, log_volume, text};
use xtask::testbed::Cluster;

pub const TESTS: [Test<Cluster>; 1] = [("hosts::a_pod_outlives_the_driver_and_ends_when_it_is_back", uninstalled)];

const PLUGINS: &str = "/usr/libexec/kubernetes/kubelet-plugins/volume/exec";

fn uninstalled(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "hosts")?;
    space.claim("c", "xfs", "320Mi", "")?;
    space.pod("p", Some("n1"), &[claim_volume("c"), log_volume("left", "")])?;
    space.ready("p")?;
    let node = cluster.node("n1")?;
    let uid = text(&space.get("pod p")?, "/metadata/uid").to_owned();
    node.sh(&format!("cp {PLUGINS}/lvprov.io~lvm/lvm /run/driver-kept && rm -r {PLUGINS}/lvprov.io~lvm"))?;
    space.exec("p", "echo line > /v0/file && echo line > /v1/file && sync")?;

    space.kubectl(&["delete", "pod", "p", "--wait=false"])?;
    // Its processes end, and kubelet asks in vain for somebody to unmount.
    let container = format!("grep -l {uid} /proc/[0-9]*/cgroup 2> /dev/null | wc -l");
    eventually("the pod's processes have ended", || Ok(node.sh(&container)?.trim() == "0"))?;
    let log = xtask::testbed::guest::GUEST_LOGS;
    let complaint =
        format!("grep {uid} {log}/kubelet.log | grep -c 'no volume plugin matched name: lvprov.io/lvm' || true");
    eventually("kubelet says that it cannot unmount", || Ok(node.sh(&complaint)?.trim() != "0"))?;
    let mounts = node.sh(&format!("grep -c 'pods/{uid}/volumes/lvprov.io~lvm/' /proc/self/mountinfo"))?;
    ensure!(mounts.trim() == "2", "{mounts} mounts");
    ensure!(space.get("pod p")?["metadata"]["deletionTimestamp"].is_string(), "it is not being deleted");

    node.sh(&format!("lvprov install-driver --source /run/driver-kept --plugin-dir {PLUGINS} 2>&1"))?;
    cluster.wait("-n hosts pod/p", "delete", LONG)?;
    eventually("its directory is removed", || {
        Ok(!node.exec(["test", "-e", &format!("/var/lib/kubelet/pods/{uid}")])?.success())
    })?;
    ensure!(node.read_file("/var/log/lvprov/hosts/left/p/file")? == "line");
    space.end()
}
