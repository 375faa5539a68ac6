//! Where volumes are made, and where not.

use super::{SELECTED_NODE, capacities, choose, settled, wait_capacity};
use anyhow::{Result, ensure};
use lvprov_tests::objects::{LONG, Space, class, text, volumes_on};
use std::collections::BTreeSet;
use xtask::testbed::Cluster;

const BURST_SIZE: u64 = 6 << 30;

/// The volume's name, and where it may be used.
fn node_of(space: &Space<'_>, claim: &str) -> Result<String> {
    let pv = space.volume_of(claim)?;
    let values = "/spec/nodeAffinity/required/nodeSelectorTerms/0/matchExpressions/0/values";
    ensure!(pv.pointer(values).and_then(|v| v.as_array()).is_some_and(|all| all.len() == 1), "{pv:#}");
    Ok(text(&pv, &format!("{values}/0")).to_owned())
}

fn handed_back(space: &Space<'_>, claim: &str) -> Result<()> {
    let annotation = format!("/metadata/annotations/{}", SELECTED_NODE.replace('/', "~1"));
    let gone = |claim: &serde_json::Value| text(claim, &annotation).is_empty();
    space.cluster.watch(&format!("-n {} pvc {claim}", space.name), LONG, gone)?;
    Ok(())
}

/// Waits until so many claims of the namespace are bound, and gives their names.
fn bound(space: &Space<'_>, count: usize) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    space.cluster.watch(&format!("-n {} pvc", space.name), 2 * LONG, |claim| {
        let name = text(claim, "/metadata/name").to_owned();
        match text(claim, "/status/phase") == "Bound" && text(claim, "/metadata/deletionTimestamp").is_empty() {
            true => names.insert(name),
            false => names.remove(&name),
        };
        names.len() == count
    })?;
    Ok(names)
}

/// The scheduler looks at pods that fit nowhere again every five minutes; all
/// waits here are shorter, so what moves them are changed capacities.
pub fn burst(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "burst")?;
    let fit: u64 = settled(cluster)?.iter().map(|(_, bytes)| bytes / BURST_SIZE).sum();
    ensure!(fit >= 2, "other tests have left too little room: {fit} volumes fit");
    let all = usize::try_from(fit)? + 2;
    let mut objects = String::new();
    for i in 0..all {
        let class = ["xfs", "xfs-csi"][i % 2];
        objects.push_str(&format!(
            "---\n{{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {{name: c{i}, namespace: burst}}, spec: \
             {{accessModes: [ReadWriteOnce], storageClassName: {class}, resources: {{requests: {{storage: 6Gi}}}}}}}}\n\
             ---\n{}\n",
            space.pod_yaml(&format!("p{i}"), None, &[lvprov_tests::objects::claim_volume(&format!("c{i}"))])
        ));
    }
    cluster.apply(&objects)?;
    let served = bound(&space, all - 2)?;
    let rest: Vec<String> = (0..all).map(|i| format!("c{i}")).filter(|name| !served.contains(name)).collect();
    for claim in &rest {
        space.event("PersistentVolumeClaim", claim, &["NoNodeHasRoom", "6 GiB", "n1 has", "n2 has", "missing"])?;
        ensure!(text(&space.get(&format!("pvc {claim}"))?, "/status/phase") == "Pending");
    }
    let there = || -> Result<usize> {
        Ok(volumes_on(cluster, "n1", "claim=burst/")?.len() + volumes_on(cluster, "n2", "claim=burst/")?.len())
    };
    // Nor where somebody has chosen a node (of a claim without a pod, so that it
    // is not the scheduler): LVM decides.
    space.claim("late", "xfs", "6Gi", "")?;
    choose(&space, "late", "n1")?;
    handed_back(&space, "late")?;
    space.event("PersistentVolumeClaim", "late", &["NotEnoughSpace", "node n1"])?;
    ensure!(there()? == all - 2, "{} volumes for {} claims", there()?, all - 2);

    // One goes, one comes.
    let ended = served.iter().next().cloned().unwrap_or_default();
    space.kubectl(&["delete", "pod", &ended.replace('c', "p"), "--wait=false"])?;
    space.kubectl(&["delete", "pvc", &ended, "--timeout=240s"])?;
    let served_now = bound(&space, all - 2)?;
    ensure!(rest.iter().filter(|name| served_now.contains(*name)).count() == 1, "{served_now:?} of {rest:?}");
    ensure!(there()? == all - 2, "{} volumes for {} claims", there()?, all - 2);
    space.leave()
}

pub fn cordoned(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "cordoned")?;
    space.claim("running", "xfs", "320Mi", "")?;
    space.pod_with_claim("running", Some("n1"), "running")?;
    space.ready("running")?;
    cluster.kubectl(["cordon", "n1"])?;
    let outcome = while_cordoned(&space);
    // Whatever came of it: the other tests need the node.
    cluster.kubectl(["uncordon", "n1"])?;
    outcome?;
    ensure!(node_of(&space, "waits")? == "n1");
    space.leave()
}

fn while_cordoned(space: &Space<'_>) -> Result<()> {
    space.claim("new", "xfs-csi", "320Mi", "")?;
    space.claim("chosen", "xfs", "320Mi", "")?;
    space.claim("waits", "xfs", "320Mi", "")?;
    space.pod_with_claim("new", None, "new")?;
    space.pod_with_claim("waits", Some("n1"), "waits")?;
    choose(space, "chosen", "n1")?;
    ensure!(node_of(space, "new")? == "n2");
    // The scheduler had chosen when the node was not cordoned yet.
    ensure!(node_of(space, "chosen")? == "n1");
    space.event("Pod", "waits", &["unschedulable"])?;
    ensure!(text(&space.get("pvc waits")?, "/status/phase") == "Pending");
    ensure!(space.exec("running", "echo on > /v0/file && cat /v0/file")? == "on");
    // It is the scheduler that keeps away: what the node has is told as before.
    ensure!(capacities(space.cluster, "xfs")?.iter().any(|(node, ..)| node == "n1"), "n1's capacity was withdrawn");
    Ok(())
}

/// n2's kubelet dies, then its Node object is deleted, then it comes back.
pub fn lost(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "lost")?;
    space.claim("before", "xfs", "320Mi", "")?;
    space.pod_with_claim("before", Some("n2"), "before")?;
    space.ready("before")?;
    let n2 = cluster.node("n2")?;
    n2.kill_kubelet()?;
    let outcome = while_unready(&space).and_then(|()| while_deleted(&space));
    n2.start_kubelet()?;
    cluster.wait("node/n2", "create", LONG)?;
    cluster.wait("node/n2", "condition=Ready", LONG)?;
    let pv = outcome?;
    // It has its capacities again, and what waited for it goes on.
    wait_capacity(cluster, "xfs", "n2", None)?;
    wait_capacity(cluster, "xfs-csi", "n2", None)?;
    cluster.wait(&format!("pv/{pv}"), "delete", LONG)?;
    ensure!(volumes_on(cluster, "n2", "claim=lost/before")?.is_empty());
    space.claim("after", "xfs", "320Mi", "")?;
    choose(&space, "after", "n2")?;
    ensure!(node_of(&space, "after")? == "n2");
    space.leave()
}

fn while_unready(space: &Space<'_>) -> Result<()> {
    let cluster = space.cluster;
    // What the controller manager finds out by itself after most of a minute.
    cluster.kubectl([
        "patch",
        "node",
        "n2",
        "--subresource=status",
        "-p",
        r#"{"status": {"conditions": [{"type": "Ready", "status": "False", "reason": "KubeletDied"}]}}"#,
    ])?;
    cluster.watch("node n2", LONG, |node| {
        let taints = node.pointer("/spec/taints").and_then(|taints| taints.as_array());
        // On a slow machine the controller manager may be there first.
        let keys = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"];
        taints.is_some_and(|all| all.iter().any(|taint| keys.contains(&text(taint, "/key"))))
    })?;
    space.claim("new", "xfs", "320Mi", "")?;
    space.pod_with_claim("new", None, "new")?;
    ensure!(node_of(space, "new")? == "n1");
    // Chosen before: the node service makes volumes, with kubelet or without.
    space.claim("chosen", "xfs", "320Mi", "")?;
    choose(space, "chosen", "n2")?;
    ensure!(node_of(space, "chosen")? == "n2");
    ensure!(capacities(cluster, "xfs")?.iter().any(|(node, ..)| node == "n2"), "n2's capacity was withdrawn");
    Ok(())
}

/// Gives the PV that waits for the node.
fn while_deleted(space: &Space<'_>) -> Result<String> {
    let cluster = space.cluster;
    cluster.kubectl(["delete", "node", "n2", "--timeout=240s"])?;
    for class in ["xfs", "xfs-csi"] {
        for (_, name, _) in capacities(cluster, class)?.iter().filter(|(node, ..)| node == "n2") {
            cluster.wait(&format!("-n lvprov-system csistoragecapacity/{name}"), "delete", LONG)?;
        }
    }
    space.claim("gone", "xfs", "320Mi", "")?;
    choose(space, "gone", "n2")?;
    handed_back(space, "gone")?;
    space.event("PersistentVolumeClaim", "gone", &["NodeGone", "n2"])?;
    space.pod_with_claim("gone", None, "gone")?;
    ensure!(node_of(space, "gone")? == "n1");

    let pv = text(&space.volume_of("before")?, "/metadata/name").to_owned();
    space.kubectl(&["delete", "pod", "before", "--force", "--grace-period=0"])?;
    space.kubectl(&["delete", "pvc", "before", "--timeout=240s"])?;
    cluster.wait_event("default", "PersistentVolume", &pv, LONG, |event| event.reason == "NodeGone")?;
    Ok(pv)
}

const ZONE: &str = "example.com/zone";

pub fn topologies(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "topologies")?;
    let allowed = |key: &str, value: &str| {
        format!("allowedTopologies: [{{matchLabelExpressions: [{{key: {key}, values: [{value}]}}]}}]")
    };
    class(cluster, "only-n2", "volumeGroup: vg0", &allowed("kubernetes.io/hostname", "n2"))?;
    class(cluster, "only-z9", "volumeGroup: vg0, source: csi", &allowed(ZONE, "z9"))?;
    // Whoever chose it: the volume would be where the class does not want it.
    space.claim("wrong", "only-n2", "320Mi", "")?;
    choose(&space, "wrong", "n1")?;
    handed_back(&space, "wrong")?;
    space.event("PersistentVolumeClaim", "wrong", &["n1", "allowedTopologies", "only-n2"])?;
    space.pod_with_claim("wrong", None, "wrong")?;
    ensure!(node_of(&space, "wrong")? == "n2");
    ensure!(volumes_on(cluster, "n1", "claim=topologies/")?.is_empty(), "a volume was made on n1");
    let nodes: Vec<String> = capacities(cluster, "only-n2")?.into_iter().map(|(node, ..)| node).collect();
    ensure!(nodes == ["n2"], "capacities of class only-n2: {nodes:?}");

    // No node, until one gets the label.
    space.claim("zone", "only-z9", "320Mi", "")?;
    space.pod_with_claim("zone", None, "zone")?;
    space.event("PersistentVolumeClaim", "zone", &["allowedTopologies", "only-z9"])?;
    ensure!(capacities(cluster, "only-z9")?.is_empty());
    cluster.kubectl(["label", "node", "n1", &format!("{ZONE}=z9")])?;
    let outcome = wait_capacity(cluster, "only-z9", "n1", None).and_then(|()| node_of(&space, "zone"));
    cluster.kubectl(["label", "node", "n1", &format!("{ZONE}-")])?;
    ensure!(outcome? == "n1");
    // Gone with the label; what was made there stays.
    for (_, name, _) in capacities(cluster, "only-z9")? {
        cluster.wait(&format!("-n lvprov-system csistoragecapacity/{name}"), "delete", LONG)?;
    }
    space.ready("zone")?;
    cluster.kubectl(["delete", "storageclass", "only-n2", "only-z9"])?;
    space.leave()
}
