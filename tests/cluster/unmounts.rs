//! Volumes that cannot be unmounted.

use anyhow::{Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::objects::{LONG, Space, log_volume, text};
use xtask::testbed::Cluster;

pub const TESTS: [Test<Cluster>; 2] =
    [("unmounts::a_busy_volume_is_an_event_on_its_pod", flex), ("unmounts::a_busy_csi_volume_is_one_too", csi)];

fn flex(cluster: &Cluster) -> Result<()> {
    busy(cluster, "busy-flex", &log_volume("busy", ""), "lvprov.io~lvm/v0")
}

fn csi(cluster: &Cluster) -> Result<()> {
    let volume = "csi: {driver: lvm.lvprov.io, volumeAttributes: {volume: busy, size: 1Gi, quota: 100Mi}}";
    busy(cluster, "busy-csi", volume, "kubernetes.io~csi/v0/mount")
}

fn busy(cluster: &Cluster, namespace: &'static str, volume: &str, place: &str) -> Result<()> {
    let space = Space::new(cluster, namespace)?;
    space.pod("p", Some("n1"), &[volume.to_owned()])?;
    space.ready("p")?;
    let uid = text(&space.get("pod p")?, "/metadata/uid").to_owned();
    let n1 = cluster.node("n1")?;
    let directory = format!("/var/lib/kubelet/pods/{uid}/volumes/{place}");
    let pid = n1.sh(&format!("cd {directory}; sleep 600 < /dev/null > /dev/null 2>&1 & echo $!"))?;
    space.kubectl(&["delete", "pod", "p", "--wait=false"])?;
    let user = format!("process {} (sleep)", pid.trim());
    space.event("Pod", "p", &["FailedUnmount", "Volume v0 cannot be unmounted on node n1", "busy", &user])?;
    ensure!(!text(&space.get("pod p")?, "/metadata/deletionTimestamp").is_empty(), "the pod has not been deleted");
    let events = cluster.events_for(namespace, "Pod", "p")?;
    let told = events.iter().filter(|event| event.reason == "FailedUnmount").count();
    ensure!(told == 1, "told {told} times: {events:#?}");
    n1.run(["kill", pid.trim()])?;
    cluster.wait(&format!("-n {namespace} pod/p"), "delete", LONG)?;
    let notes = n1.sh("ls -A /run/lvprov/unmounts")?;
    ensure!(notes.trim().is_empty(), "{notes}");
    space.end()
}
