//! The way of a claim, from the pod that wants it to the end of its volume.

use crate::COMMANDS;
use anyhow::{Context, Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::objects::{LONG, Source, Space, claim_volume, eventually, text, volume_size, volumes_on};
use std::collections::BTreeSet;
use xtask::testbed::Cluster;

pub const TESTS: [Test<Cluster>; 12] = [
    ("claims::a_statefulset_over_two_nodes_keeps_its_data_and_leaves_nothing", |c| statefulset(c, Source::Flexvolume)),
    ("claims::csi_a_statefulset_over_two_nodes_keeps_its_data_and_leaves_nothing", |c| statefulset(c, Source::Csi)),
    ("claims::one_creation_is_one_mutating_command_and_at_most_one_report", counts),
    ("claims::retain_keeps_the_volume", |c| retain(c, Source::Flexvolume)),
    ("claims::csi_retain_keeps_the_volume", |c| retain(c, Source::Csi)),
    ("claims::a_force_deleted_pod_does_not_cost_a_mounted_volume", |c| force_delete(c, Source::Flexvolume)),
    ("claims::csi_a_force_deleted_pod_does_not_cost_a_mounted_volume", |c| force_delete(c, Source::Csi)),
    ("claims::a_pv_deleted_first_goes_with_its_claim", |c| pv_deleted_first(c, Source::Flexvolume)),
    ("claims::csi_a_pv_deleted_first_goes_with_its_claim", |c| pv_deleted_first(c, Source::Csi)),
    ("claims::one_pod_alone_has_a_read_write_once_pod_claim", |c| one_pod_alone(c, Source::Flexvolume)),
    ("claims::csi_one_pod_alone_has_a_read_write_once_pod_claim", |c| one_pod_alone(c, Source::Csi)),
    ("claims::csi_kubelet_knows_how_full_a_volume_is", stats),
];

const STATEFULSET: &str = include_str!("../../deploy/examples/statefulset.yaml");

/// The example, with the class's one parameter added.
fn statefulset_of(source: Source) -> String {
    let added = source.pick("", "\n  source: csi");
    STATEFULSET.replace("\n  volumeGroup: vg0", &format!("{added}\n  volumeGroup: vg0"))
}

fn statefulset(cluster: &Cluster, source: Source) -> Result<()> {
    let objects = statefulset_of(source);
    cluster.apply(&objects)?;
    cluster.kubectl(["rollout", "status", "statefulset/db", "--timeout=300s"])?;
    let space = Space { cluster, name: "default" };
    let mut nodes = BTreeSet::new();
    for ordinal in 0..3 {
        let claim = space.get(&format!("pvc data-db-{ordinal}"))?;
        let pod = space.get(&format!("pod db-{ordinal}"))?;
        let node = text(&pod, "/spec/nodeName").to_owned();
        let pv = space.volume_of(&format!("data-db-{ordinal}"))?;
        let name = text(&pv, "/metadata/name").to_owned();
        let uid = text(&claim, "/metadata/uid");
        ensure!(name == format!("pvc-{uid}"), "{name} for claim {uid}");
        ensure!(text(&pv, "/spec/claimRef/uid") == uid);
        ensure!(text(&pv, "/metadata/annotations/pv.kubernetes.io~1provisioned-by") == "lvm.lvprov.io");
        ensure!(source.check(&pv)? == name, "{pv:#}");
        ensure!(text(&pv, "/spec/capacity/storage") == "1Gi", "{pv:#}");
        ensure!(text(&pv, "/spec/persistentVolumeReclaimPolicy") == "Delete");
        let affinity = "/spec/nodeAffinity/required/nodeSelectorTerms/0/matchExpressions/0";
        ensure!(text(&pv, &format!("{affinity}/key")) == "topology.lvprov.io/node", "{pv:#}");
        ensure!(text(&pv, &format!("{affinity}/values/0")) == node, "{pv:#}");
        let tagged = volumes_on(cluster, &node, &format!("lvprov.io/claim=default/data-db-{ordinal}"))?;
        ensure!(tagged == [name], "{tagged:?} on {node}");
        nodes.insert(node);
    }
    ensure!(nodes.len() == 2, "all pods are on {nodes:?}");

    // Made again, the pod finds its file.
    space.exec("db-1", "echo kept > /data/file && sync")?;
    let before = text(&space.get("pod db-1")?, "/metadata/uid").to_owned();
    space.delete_pod("db-1")?;
    cluster.kubectl(["rollout", "status", "statefulset/db", "--timeout=300s"])?;
    space.ready("db-1")?;
    ensure!(text(&space.get("pod db-1")?, "/metadata/uid") != before);
    ensure!(space.exec("db-1", "cat /data/file")? == "kept");
    let starts = space.exec("db-1", "wc -l < /data/starts")?;
    ensure!(starts.trim() == "2", "{starts} starts");

    // Claims gone: unmounted, volumes removed, PVs gone.
    cluster.delete(&objects)?;
    let volumes = ["data-db-0", "data-db-1", "data-db-2"];
    let pvs: Vec<String> =
        volumes.iter().map(|c| Ok(text(&space.volume_of(c)?, "/metadata/name").to_owned())).collect::<Result<_>>()?;
    for claim in volumes {
        space.kubectl(&["delete", "pvc", claim, "--timeout=240s"])?;
    }
    for pv in &pvs {
        cluster.wait(&format!("pv/{pv}"), "delete", LONG)?;
    }
    for node in nodes {
        let left = volumes_on(cluster, &node, "lvprov.io/claim=default/data-db")?;
        ensure!(left.is_empty(), "{left:?} left on {node}");
        let mounts = cluster.node(&node)?.sh("grep -c pvc- /proc/self/mountinfo || true")?;
        ensure!(mounts == "0", "{mounts} mounts left on {node}");
    }
    Ok(())
}

fn counts(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "counts")?;
    let node = cluster.node("n1")?;
    let log = |kind: &str| -> Result<usize> {
        let text = node.read_file(COMMANDS)?;
        Ok(text.lines().filter(|line| line.contains(&format!("\"kind\":\"{kind}\""))).count())
    };
    // A driver's first mount makes a report of its own: the claim alone is counted,
    // so the node is chosen by hand and no pod mounts it.
    node.sh(&format!(": > {COMMANDS}"))?;
    space.claim("c", "xfs", "1Gi", "")?;
    space.kubectl(&["annotate", "pvc", "c", "volume.kubernetes.io/selected-node=n1"])?;
    space.volume_of("c")?;
    // The refresh of what is free follows the creation a moment later.
    std::thread::sleep(std::time::Duration::from_secs(3));
    let (mutating, reports) = (log("mutate")?, log("report")?);
    ensure!(
        mutating == 1 && reports <= 1,
        "{mutating} mutating commands, {reports} reports:\n{}",
        node.read_file(COMMANDS)?
    );
    // Idle, it runs none.
    node.sh(&format!(": > {COMMANDS}"))?;
    std::thread::sleep(std::time::Duration::from_secs(10));
    let idle = node.read_file(COMMANDS)?;
    ensure!(idle.is_empty(), "an idle node ran: {idle}");
    space.end()
}

fn retain(cluster: &Cluster, source: Source) -> Result<()> {
    let space = Space::new(cluster, source.pick("retain", "retain-csi"))?;
    space.claim("c", source.pick("ext4-retain", "ext4-retain-csi"), "64Mi", "")?;
    space.pod_with_claim("p", Some("n2"), "c")?;
    space.ready("p")?;
    space.exec("p", "echo kept > /v0/file && sync")?;
    let mount = cluster.node("n2")?.sh("grep ' /var/lib/kubelet/pods/.*pvc-.*ext4' /proc/self/mountinfo")?;
    ensure!(mount.contains("noatime"), "the class's mountOptions did not arrive: {mount}");
    let pv = source.check(&space.volume_of("c")?)?;
    ensure!(text(&space.volume_of("c")?, "/spec/persistentVolumeReclaimPolicy") == "Retain");
    space.delete_pod("p")?;
    space.kubectl(&["delete", "pvc", "c", "--timeout=240s"])?;
    cluster.wait(&format!("pv/{pv}"), "jsonpath={.status.phase}=Released", LONG)?;
    std::thread::sleep(std::time::Duration::from_secs(3));
    ensure!(volume_size(cluster, "n2", &pv)? == 64 << 20, "the volume is not what it was");
    // An admin who deletes the PV keeps the volume; gc lists it.
    cluster.kubectl(["delete", "pv", &pv, "--timeout=240s"])?;
    ensure!(volume_size(cluster, "n2", &pv)? == 64 << 20);
    cluster.node("n2")?.run(["lvremove", "-qq", "-y", &format!("vg0/{pv}")])?;
    space.end()
}

/// Released says that no pod object uses the claim, not that nothing has it mounted.
fn force_delete(cluster: &Cluster, source: Source) -> Result<()> {
    let space = Space::new(cluster, source.pick("force", "force-csi"))?;
    space.claim("c", source.pick("xfs", "xfs-csi"), "320Mi", "")?;
    space.pod_with_claim("p", Some("n1"), "c")?;
    space.ready("p")?;
    let pv = text(&space.volume_of("c")?, "/metadata/name").to_owned();
    // Something on the node still uses the volume.
    let node = cluster.node("n1")?;
    let device = format!("/dev/vg0/{pv}");
    node.sh(&format!("mkdir -p /mnt/held && mount {device} /mnt/held && echo precious > /mnt/held/file"))?;
    space.kubectl(&["delete", "pod", "p", "--force", "--grace-period=0"])?;
    space.kubectl(&["delete", "pvc", "c", "--timeout=240s"])?;
    cluster.wait(&format!("pv/{pv}"), "jsonpath={.status.phase}=Released", LONG)?;
    cluster
        .wait_event("default", "PersistentVolume", &pv, LONG, |e| e.message.contains("in use"))
        .context("an event on the PV that says the volume is in use")?;
    ensure!(node.read_file("/mnt/held/file")? == "precious");
    node.run(["umount", "/mnt/held"])?;
    cluster.wait(&format!("pv/{pv}"), "delete", LONG)?;
    let tag = format!("claim={}/c", space.name);
    eventually("the volume is removed", || Ok(!volumes_on(cluster, "n1", &tag)?.contains(&pv)))?;
    space.end()
}

fn pv_deleted_first(cluster: &Cluster, source: Source) -> Result<()> {
    let space = Space::new(cluster, source.pick("pvfirst", "pvfirst-csi"))?;
    space.claim("c", source.pick("xfs", "xfs-csi"), "320Mi", "")?;
    space.pod_with_claim("p", Some("n1"), "c")?;
    space.ready("p")?;
    let pv = text(&space.volume_of("c")?, "/metadata/name").to_owned();
    cluster.kubectl(["delete", "pv", &pv, "--wait=false"])?;
    space.exec("p", "echo still > /v0/file")?;
    space.delete_pod("p")?;
    space.kubectl(&["delete", "pvc", "c", "--timeout=240s"])?;
    cluster.wait(&format!("pv/{pv}"), "delete", LONG)?;
    ensure!(volumes_on(cluster, "n1", &format!("claim={}/c", space.name))?.is_empty());
    space.end()
}

/// Also against a pod that no scheduler has kept away.
fn one_pod_alone(cluster: &Cluster, source: Source) -> Result<()> {
    let space = Space::new(cluster, source.pick("alone", "alone-csi"))?;
    space.claim("c", source.pick("xfs", "xfs-csi"), "320Mi", "accessModes: [ReadWriteOncePod]")?;
    space.pod_with_claim("p", Some("n1"), "c")?;
    space.ready("p")?;
    let second = space.pod_yaml("q", None, &[claim_volume("c")]);
    cluster.apply(&second.replacen("spec: {", "spec: {nodeName: n1, ", 1))?;
    space.event("Pod", "q", &["ReadWriteOncePod"])?;
    ensure!(text(&space.get("pod q")?, "/status/phase") == "Pending");
    space.delete_pod("p")?;
    space.ready("q")?;
    space.leave()
}

/// What kubelet's `kubelet_volume_stats_*` are made of.
fn stats(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "stats-csi")?;
    space.claim("c", "xfs-csi", "1Gi", "")?;
    space.pod_with_claim("p", Some("n1"), "c")?;
    space.ready("p")?;
    space.exec("p", "dd if=/dev/zero of=/v0/fill bs=1M count=100 2>&1 && sync")?;
    eventually("kubelet has measured the volume", || {
        let summary = cluster.kubectl(["get", "--raw", "/api/v1/nodes/n1/proxy/stats/summary"])?;
        let summary: serde_json::Value = serde_json::from_str(&summary)?;
        let volumes = summary["pods"].as_array().into_iter().flatten();
        let mut volumes = volumes.flat_map(|pod| pod["volume"].as_array().into_iter().flatten());
        let ours = |volume: &&serde_json::Value| volume["pvcRef"]["namespace"] == "stats-csi";
        let found = volumes.find(ours).cloned().unwrap_or_default();
        let number = |key: &str| found[key].as_u64().unwrap_or(0);
        Ok(number("usedBytes") > 100 << 20 && number("capacityBytes") < 1 << 30 && number("inodes") > 1000)
    })?;
    space.end()
}
