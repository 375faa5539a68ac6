//! How volumes come and go.

use super::{choose, has_finalizer, settled, wait_capacity};
use crate::COMMANDS;
use anyhow::{Context, Result, ensure};
use lvprov_tests::objects::{IDLE, LONG, Source, Space, class, eventually, text, volume_size, volumes_on};
use xtask::testbed::Cluster;

const SMALL: u64 = 320 << 20;

/// A claim with its volume, on a node, without a pod. Gives the PV's name.
fn made(space: &Space<'_>, claim: &str, class: &str, node: &str) -> Result<String> {
    space.claim(claim, class, "320Mi", "")?;
    choose(space, claim, node)?;
    Ok(text(&space.volume_of(claim)?, "/metadata/name").to_owned())
}

/// How often an lvm command of this name was run for a volume on a node.
fn runs(cluster: &Cluster, node: &str, command: &str, volume: &str) -> Result<usize> {
    let log = cluster.node(node)?.read_file(COMMANDS)?;
    Ok(log.lines().filter(|line| line.contains(command) && line.contains(volume)).count())
}

pub fn default_class(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "defaulted")?;
    let claim = |name: &str| {
        cluster.apply(&format!(
            "{{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {{name: {name}, namespace: defaulted}}, spec: \
             {{accessModes: [ReadWriteOnce], resources: {{requests: {{storage: 320Mi}}}}}}}}"
        ))
    };
    let class_of = |claim: &str| -> Result<Option<String>> {
        Ok(space.get(&format!("pvc {claim}"))?.pointer("/spec/storageClassName").map(|name| name.to_string()))
    };
    claim("early")?;
    ensure!(class_of("early")?.is_none(), "the cluster has a default class already");
    space.pod("p", None, &["early", "late"].map(lvprov_tests::objects::claim_volume))?;
    class(cluster, "later", "volumeGroup: vg0", "")?;
    cluster.kubectl(["annotate", "storageclass", "later", "storageclass.kubernetes.io/is-default-class=true"])?;
    // The API server gives the class to a new claim, the controller manager to the old one.
    let outcome = claim("late").and_then(|_| space.ready("p"));
    cluster.kubectl(["delete", "storageclass", "later"])?;
    outcome?;
    for claim in ["early", "late"] {
        ensure!(class_of(claim)?.as_deref() == Some("\"later\""), "{claim}");
        Source::Flexvolume.check(&space.volume_of(claim)?)?;
    }
    // A volume's end needs no class.
    let pv = text(&space.volume_of("early")?, "/metadata/name").to_owned();
    space.leave()?;
    cluster.wait(&format!("pv/{pv}"), "delete", LONG)
}

pub fn ephemeral(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "ephemeral")?;
    let volumes = ["xfs", "xfs-csi"].map(|class| {
        format!(
            "ephemeral: {{volumeClaimTemplate: {{spec: {{accessModes: [ReadWriteOnce], storageClassName: {class}, \
             resources: {{requests: {{storage: 320Mi}}}}}}}}}}"
        )
    });
    space.pod("p", Some("n1"), &volumes)?;
    space.ready("p")?;
    space.exec("p", "echo a > /v0/file && echo b > /v1/file && sync")?;
    let uid = text(&space.get("pod p")?, "/metadata/uid").to_owned();
    let mut pvs = Vec::new();
    for (claim, source) in [("p-v0", Source::Flexvolume), ("p-v1", Source::Csi)] {
        ensure!(text(&space.get(&format!("pvc {claim}"))?, "/metadata/ownerReferences/0/uid") == uid);
        pvs.push(source.check(&space.volume_of(claim)?)?);
    }
    ensure!(volumes_on(cluster, "n1", "claim=ephemeral/p-v")?.len() == 2);
    space.delete_pod("p")?;
    for pv in pvs {
        cluster.wait(&format!("pv/{pv}"), "delete", LONG)?;
    }
    ensure!(volumes_on(cluster, "n1", "claim=ephemeral/")?.is_empty());
    ensure!(space.kubectl(&["get", "pvc", "-o", "name"])?.is_empty());
    space.leave()
}

pub fn retention(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "retention")?;
    cluster.apply(
        &"{apiVersion: apps/v1, kind: StatefulSet, metadata: {name: set, namespace: retention}, spec: {replicas: 2, \
         serviceName: set, podManagementPolicy: Parallel, selector: {matchLabels: {app: set}}, \
         persistentVolumeClaimRetentionPolicy: {whenScaled: Retain, whenDeleted: Delete}, \
         template: {metadata: {labels: {app: set}}, spec: {terminationGracePeriodSeconds: 1, containers: [{name: c, \
         image: 'lvprov.io/busybox:latest', imagePullPolicy: Never, command: {IDLE}, \
         volumeMounts: [{name: data, mountPath: /v0}]}]}}, volumeClaimTemplates: [{metadata: {name: data}, spec: \
         {accessModes: [ReadWriteOnce], storageClassName: xfs, resources: {requests: {storage: 320Mi}}}}]}}"
            .replace("{IDLE}", IDLE),
    )?;
    let scale = |replicas: u8| space.kubectl(&["scale", "statefulset", "set", &format!("--replicas={replicas}")]);
    space.wait("pod/set-1", "create")?;
    space.ready("set-1")?;
    space.exec("set-1", "echo kept > /v0/file && sync")?;
    let pv = text(&space.volume_of("data-set-1")?, "/metadata/name").to_owned();

    scale(1)?;
    space.wait("pod/set-1", "delete")?;
    scale(2)?;
    space.wait("pod/set-1", "create")?;
    space.ready("set-1")?;
    ensure!(space.exec("set-1", "cat /v0/file")? == "kept");
    ensure!(text(&space.volume_of("data-set-1")?, "/metadata/name") == pv);

    let policy = r#"{"spec": {"persistentVolumeClaimRetentionPolicy": {"whenScaled": "Delete"}}}"#;
    space.kubectl(&["patch", "statefulset", "set", "-p", policy])?;
    scale(1)?;
    cluster.wait(&format!("pv/{pv}"), "delete", LONG)?;
    let first = text(&space.volume_of("data-set-0")?, "/metadata/name").to_owned();
    space.kubectl(&["delete", "statefulset", "set", "--timeout=240s"])?;
    cluster.wait(&format!("pv/{first}"), "delete", LONG)?;
    for node in ["n1", "n2"] {
        ensure!(volumes_on(cluster, node, "claim=retention/")?.is_empty());
    }
    space.leave()
}

pub fn kept_pv_deleted_first(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "keptfirst")?;
    let pv = made(&space, "c", "ext4-retain-csi", "n1")?;
    cluster.kubectl(["delete", "pv", &pv, "--wait=false"])?;
    // It waits for its claim, which keeps it.
    let there = cluster.get_json(&format!("pv {pv}"))?;
    ensure!(text(&there, "/status/phase") == "Bound" && there["metadata"]["deletionTimestamp"].is_string());
    ensure!(text(&space.get("pvc c")?, "/status/phase") == "Bound");
    space.kubectl(&["delete", "pvc", "c", "--timeout=240s"])?;
    cluster.wait(&format!("pv/{pv}"), "delete", LONG)?;
    ensure!(volume_size(cluster, "n1", &pv)? == SMALL);
    ensure!(runs(cluster, "n1", "lvremove", &pv)? == 0);
    cluster.node("n1")?.run(["lvremove", "-qq", "-y", &format!("vg0/{pv}")])?;
    space.leave()
}

pub fn released_pv_deleted(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "released")?;
    let node = cluster.node("n2")?;
    let pv = made(&space, "c", "xfs", "n2")?;
    // In use, it stays Released for as long as the test likes.
    let holder = node.sh(&format!("sleep 600 < /dev/vg0/{pv} > /dev/null 2>&1 & echo $!"))?;
    space.kubectl(&["delete", "pvc", "c", "--timeout=240s"])?;
    cluster.wait_event("default", "PersistentVolume", &pv, LONG, |event| event.reason == "VolumeInUse")?;
    cluster.kubectl(["delete", "pv", &pv, "--wait=false"])?;
    // pv-protection goes, ours stays: the volume is still there.
    let ours_alone = |pv: &serde_json::Value| {
        has_finalizer(pv) && pv.pointer("/metadata/finalizers").and_then(|all| all.as_array()).map(Vec::len) == Some(1)
    };
    cluster.watch(&format!("pv {pv}"), LONG, ours_alone)?;
    ensure!(volume_size(cluster, "n2", &pv)? == SMALL);
    node.run(["kill", holder.trim()])?;
    cluster.wait(&format!("pv/{pv}"), "delete", LONG)?;
    ensure!(volumes_on(cluster, "n2", "claim=released/")?.is_empty());
    let removed = runs(cluster, "n2", "lvremove", &pv)?;
    ensure!(removed == 1, "removed {removed} times");
    space.leave()
}

pub fn finalizer(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "finalizer")?;
    let pv = made(&space, "c", "xfs-csi", "n1")?;
    let policy = |policy: &str| -> Result<()> {
        let patch = format!(r#"{{"spec": {{"persistentVolumeReclaimPolicy": "{policy}"}}}}"#);
        cluster.kubectl(["patch", "pv", &pv, "-p", &patch])?;
        cluster.watch(&format!("pv {pv}"), LONG, |pv| has_finalizer(pv) == (policy == "Delete"))?;
        Ok(())
    };
    ensure!(has_finalizer(&cluster.get_json(&format!("pv {pv}"))?));
    policy("Retain")?;
    policy("Delete")?;
    policy("Retain")?;
    space.kubectl(&["delete", "pvc", "c", "--timeout=240s"])?;
    cluster.wait(&format!("pv/{pv}"), "jsonpath={.status.phase}=Released", LONG)?;
    ensure!(volume_size(cluster, "n1", &pv)? == SMALL);
    // Changed once more, the volume goes as if it had been so from the start.
    let patch = r#"{"spec": {"persistentVolumeReclaimPolicy": "Delete"}}"#;
    cluster.kubectl(["patch", "pv", &pv, "-p", patch])?;
    cluster.wait(&format!("pv/{pv}"), "delete", LONG)?;
    ensure!(volumes_on(cluster, "n1", "claim=finalizer/")?.is_empty());
    space.leave()
}

pub fn deleted_in_the_middle(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "middle")?;
    let node = cluster.node("n1")?;
    let free = settled(cluster)?.into_iter().find(|(node, _)| node == "n1").context("n1's capacity")?.1;
    // The node waits for the group's lock, so it stays in the middle.
    let holder = node.sh("flock --no-fork /run/lvprov/vg-vg0.lock sleep 600 < /dev/null > /dev/null 2>&1 & echo $!")?;
    let asked = || -> Result<String> {
        space.claim("c", "xfs", "320Mi", "")?;
        choose(&space, "c", "n1")?;
        // What is being made is promised, so the call has arrived.
        wait_capacity(cluster, "xfs", "n1", Some(free - SMALL))?;
        let uid = text(&space.get("pvc c")?, "/metadata/uid").to_owned();
        space.kubectl(&["delete", "pvc", "c", "--timeout=240s"])?;
        Ok(format!("pvc-{uid}"))
    };
    let asked = asked();
    node.run(["kill", holder.trim()])?;
    let volume = asked?;
    eventually("the volume is made and removed", || {
        Ok(runs(cluster, "n1", "lvcreate", &volume)? == 1 && runs(cluster, "n1", "lvremove", &volume)? == 1)
    })?;
    ensure!(volumes_on(cluster, "n1", "claim=middle/")?.is_empty());
    cluster.wait(&format!("pv/{volume}"), "delete", LONG)?;
    wait_capacity(cluster, "xfs", "n1", Some(free))?;
    space.leave()
}
