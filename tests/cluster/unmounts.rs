//! Volumes that cannot be unmounted.

use anyhow::{Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::objects::{LONG, Space, log_volume, text};
use xtask::testbed::Cluster;

pub const TESTS: [Test<Cluster>; 1] = [("unmounts::a_busy_volume_is_an_event_on_its_pod", busy)];

fn busy(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "busy")?;
    space.pod("p", Some("n1"), &[log_volume("busy", "")])?;
    space.ready("p")?;
    let uid = text(&space.get("pod p")?, "/metadata/uid").to_owned();
    let n1 = cluster.node("n1")?;
    let directory = format!("/var/lib/kubelet/pods/{uid}/volumes/lvprov.io~lvm/v0");
    let pid = n1.sh(&format!("cd {directory}; sleep 600 < /dev/null > /dev/null 2>&1 & echo $!"))?;
    space.kubectl(&["delete", "pod", "p", "--wait=false"])?;
    let user = format!("process {} (sleep)", pid.trim());
    space.event("Pod", "p", &["FailedUnmount", "Volume v0 cannot be unmounted on node n1", "busy", &user])?;
    ensure!(!text(&space.get("pod p")?, "/metadata/deletionTimestamp").is_empty(), "the pod has not been deleted");
    let told = cluster.events_for("busy", "Pod", "p")?.iter().filter(|event| event.reason == "FailedUnmount").count();
    ensure!(told == 1, "told {told} times");
    n1.run(["kill", pid.trim()])?;
    cluster.wait("-n busy pod/p", "delete", LONG)?;
    let notes = n1.sh("ls -A /run/lvprov/unmounts")?;
    ensure!(notes.trim().is_empty(), "{notes}");
    space.end()
}
