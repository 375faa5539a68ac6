//! Raw block volumes, as pods have them.

use anyhow::{Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::objects::{Space, eventually, text, volume_size, volumes_on};
use xtask::testbed::Cluster;

pub const TESTS: [Test<Cluster>; 2] = [
    ("block::a_pod_writes_comes_back_grows_and_leaves_nothing", life),
    ("block::a_pod_that_may_only_read_cannot_write", read_only),
];

fn life(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "block")?;
    // What lies on the disk is not what a pod may see.
    let n1 = cluster.node("n1")?;
    n1.sh(&lvprov_tests::dirty("600m"))?;
    space.claim("c", "xfs-csi", "200Mi", "volumeMode: Block")?;
    space.raw_pod("p", Some("n1"), "c", "")?;
    space.ready("p")?;
    let pv = space.volume_of("c")?;
    let name = text(&pv, "/metadata/name").to_owned();
    ensure!(text(&pv, "/spec/volumeMode") == "Block" && pv.pointer("/spec/csi/fsType").is_none(), "{pv:#}");
    let zeros = |megabytes: u64| {
        format!(
            "[ $(dd if=/dev/raw bs=1M 2>/dev/null | tr -d '\\000' | wc -c) = 0 ] && [ $(dd if=/dev/raw bs=1M 2>/dev/null | wc -c) = {} ]",
            megabytes << 20
        )
    };
    space.exec("p", &zeros(200))?;
    space.exec("p", "echo kept | dd of=/dev/raw bs=512 seek=7 conv=notrunc,fsync 2>/dev/null")?;
    let read = "dd if=/dev/raw bs=512 skip=7 count=1 2>/dev/null | head -c 4";
    // Deleted, and back.
    space.delete_pod("p")?;
    let mounts = n1.read_file("/proc/self/mountinfo")?;
    ensure!(!mounts.contains(&format!("volumeDevices/publish/{name}")), "{mounts}");
    space.raw_pod("p", Some("n1"), "c", "")?;
    space.ready("p")?;
    ensure!(space.exec("p", read)? == "kept");
    // kubelet has its size.
    eventually("kubelet has the size of the device", || {
        let summary = cluster.kubectl(["get", "--raw", "/api/v1/nodes/n1/proxy/stats/summary"])?;
        let summary: serde_json::Value = serde_json::from_str(&summary)?;
        let pods = summary["pods"].as_array().into_iter().flatten();
        let mut volumes = pods.flat_map(|pod| pod["volume"].as_array().into_iter().flatten());
        Ok(volumes.any(|one| one["pvcRef"]["namespace"] == "block" && one["capacityBytes"] == 200u64 << 20))
    })?;
    // Grown while it is open, by zeros.
    space.kubectl(&["patch", "pvc", "c", "-p", r#"{"spec":{"resources":{"requests":{"storage":"400Mi"}}}}"#])?;
    space.grown("c", "p", "400Mi")?;
    ensure!(volume_size(cluster, "n1", &name)? == 400 << 20);
    ensure!(space.exec("p", read)? == "kept");
    space.exec("p", "[ $(dd if=/dev/raw bs=1M skip=200 2>/dev/null | tr -d '\\000' | wc -c) = 0 ] && [ $(dd if=/dev/raw bs=1M 2>/dev/null | wc -c) = 419430400 ]")?;
    // Its claim goes while the device is open on the node, as a pod leaves it that was deleted by force.
    n1.sh(&format!(
        "sh -c 'exec 7< /dev/vg0/{name}; exec sleep 600' > /dev/null 2>&1 < /dev/null & echo $! > /run/opener.pid"
    ))?;
    space.delete_pod("p")?;
    space.kubectl(&["delete", "pvc", "c", "--timeout=240s"])?;
    cluster.wait_event("default", "PersistentVolume", &name, lvprov_tests::objects::LONG, |event| {
        event.reason == "VolumeInUse"
    })?;
    ensure!(volumes_on(cluster, "n1", "claim=block/")?.len() == 1);
    n1.sh("kill $(cat /run/opener.pid)")?;
    eventually("the volume is removed", || Ok(volumes_on(cluster, "n1", "claim=block/")?.is_empty()))?;
    space.end()
}

fn read_only(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "block-ro")?;
    space.claim("c", "xfs-csi", "100Mi", "volumeMode: Block")?;
    space.raw_pod("w", Some("n1"), "c", "")?;
    space.ready("w")?;
    space.exec("w", "echo kept | dd of=/dev/raw conv=notrunc,fsync 2>/dev/null")?;
    space.delete_pod("w")?;
    space.raw_pod("r", Some("n1"), "c", ", readOnly: true")?;
    space.ready("r")?;
    ensure!(space.exec("r", "head -c 4 /dev/raw")? == "kept");
    let written = space
        .exec("r", "if echo lost | dd of=/dev/raw conv=notrunc,fsync 2>/dev/null; then echo yes; else echo no; fi")?;
    ensure!(written == "no" && space.exec("r", "head -c 4 /dev/raw")? == "kept", "{written}");
    space.end()
}
