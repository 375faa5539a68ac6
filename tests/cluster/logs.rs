//! Log volumes of a Deployment.

use anyhow::{Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::objects::{LONG, Space, eventually, log_volume, lvprov, lvprov_json, text, volumes_on};
use serde_json::Value;
use std::collections::BTreeMap;
use xtask::testbed::Cluster;

pub const TESTS: [Test<Cluster>; 4] = [
    ("logs::a_deployment_shares_one_volume_a_node_and_its_files_stay", deployment),
    ("logs::the_admin_sees_who_has_how_much_and_until_when", listed),
    ("logs::an_inline_csi_volume_is_the_same_log_volume", inline_csi),
    ("logs::pods_under_restricted_security_have_logs_too", restricted),
];

const DEPLOYMENT: &str = include_str!("../../deploy/examples/deployment-logs.yaml");

fn deployment(cluster: &Cluster) -> Result<()> {
    let space = Space { cluster, name: "default" };
    cluster.apply(DEPLOYMENT)?;
    cluster.kubectl(["rollout", "status", "deployment/web", "--timeout=300s"])?;
    let pods = space.get("pods -l app=web")?;
    let mut by_node: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for pod in pods["items"].as_array().into_iter().flatten() {
        let (name, node) = (text(pod, "/metadata/name"), text(pod, "/spec/nodeName"));
        by_node.entry(node.to_owned()).or_default().push(name.to_owned());
    }
    ensure!(by_node.values().map(Vec::len).sum::<usize>() == 3, "{by_node:?}");
    for node in by_node.keys() {
        let volumes = volumes_on(cluster, node, "log=default/web-logs")?;
        ensure!(volumes.len() == 1, "{volumes:?} on {node}");
    }
    // One of two on the same node fills its quota; its neighbour does not notice.
    let Some((node, pods)) = by_node.iter().find(|(_, pods)| pods.len() >= 2) else {
        anyhow::bail!("three pods on two nodes, and no two on one: {by_node:?}");
    };
    let said = space.exec(&pods[0], "dd if=/dev/zero of=/logs/fill bs=1M count=200 2>&1 || true")?;
    ensure!(said.contains("No space left") || said.contains("uota"), "{said}");
    space.exec(&pods[1], "dd if=/dev/zero of=/logs/fill bs=1M count=60 2>&1 && rm /logs/fill")?;
    space.exec(&pods[1], "echo last-line >> /logs/web.log && sync")?;

    cluster.delete(DEPLOYMENT)?;
    cluster.wait("-n default pods -l app=web", "delete", LONG)?;
    let machine = cluster.node(node)?;
    eventually("kubelet has unmounted the directories", || {
        Ok(machine.sh("grep -c 'pods/.*lvprov.io~lvm/logs' /proc/self/mountinfo || true")? == "0")
    })?;
    let log = machine.read_file(&format!("/var/log/lvprov/default/web-logs/{}/web.log", pods[1]))?;
    ensure!(log.contains("still here") && log.contains("last-line"), "{log}");
    Ok(())
}

fn listed(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "listed")?;
    space.pod("p", Some("n1"), &[log_volume("mine", "retention: 2h")])?;
    space.pod("q", Some("n1"), &[log_volume("mine", "")])?;
    space.ready("p")?;
    space.ready("q")?;
    space.exec("p", "dd if=/dev/zero of=/v0/file bs=1M count=50 2>/dev/null && sync")?;
    let show = || lvprov_json(cluster, &["logs", "--json", "--namespace", "listed", "--node", "n1"]);
    let report = show()?;
    ensure!(report["nodes"].as_array().is_some_and(|nodes| nodes.len() == 1), "{report:#}");
    ensure!(report["volumes"].as_array().is_some_and(|volumes| volumes.len() == 1), "{report:#}");
    ensure!(report["volumes"][0]["sizeBytes"] == 1 << 30, "{report:#}");
    let p = |report: &Value| report["volumes"][0]["directories"][0].clone();
    let used = p(&report);
    ensure!(used["pod"] == "p" && used["quotaBytes"] == 100 << 20 && used["usedPercent"] == 50, "{used:#}");
    ensure!(used["state"] == "mounted" && used["mayGoUnix"].is_null(), "{used:#}");
    space.delete_pod("p")?;
    eventually("the directory of p is kept", || Ok(p(&show()?)["state"] == "kept"))?;
    let kept = p(&show()?);
    let (last, may_go) = (kept["lastUsedUnix"].as_i64(), kept["mayGoUnix"].as_i64());
    ensure!(last.is_some_and(|last| may_go == Some(last + 7200)), "{kept:#}");
    let table = lvprov(cluster, &["logs", "--namespace", "listed"])?.ok()?;
    let words = |pod: &str| table.lines().find(|line| line.contains(pod)).map(|line| line.split_whitespace().collect());
    let of_p: Vec<&str> = words(" p ").unwrap_or_default();
    ensure!(of_p.contains(&"kept") && matches!(of_p[..], [.., "in", _]), "{table}");
    ensure!(words(" q ").is_some_and(|of_q: Vec<&str>| of_q.ends_with(&["in", "use"])), "{table}");
    ensure!(!lvprov(cluster, &["logs", "--node", "n9"])?.success(), "a node that is not there");
    let nothing = lvprov(cluster, &["logs", "--namespace", "nobodys"])?.ok()?;
    ensure!(nothing.starts_with("total: 0 log volumes"), "{nothing}");
    space.end()
}

fn inline_csi(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "inline-csi")?;
    let csi = |more: &str| {
        format!("csi: {{driver: lvm.lvprov.io, volumeAttributes: {{volume: shared, size: 1Gi, quota: 100Mi{more}}}}}")
    };
    space.pod("flex", Some("n1"), &[log_volume("shared", "")])?;
    space.pod("csi", Some("n1"), &[csi(", retention: 2h")])?;
    space.ready("flex")?;
    space.ready("csi")?;
    let volumes = volumes_on(cluster, "n1", "log=inline-csi/shared")?;
    ensure!(volumes.len() == 1, "{volumes:?}");
    let said = space.exec("csi", "dd if=/dev/zero of=/v0/fill bs=1M count=200 2>&1 || true")?;
    ensure!(said.contains("No space left") || said.contains("uota"), "{said}");
    space.exec("flex", "dd if=/dev/zero of=/v0/fill bs=1M count=60 2>&1")?;
    space.exec("csi", "rm /v0/fill; echo last-line > /v0/app.log; sync")?;
    // A wish that is not met is said on the pod, as the driver says it.
    space.pod("wrong", Some("n1"), &[csi(", qouta: 5Mi")])?;
    space.event("Pod", "wrong", &["qouta", "not known"])?;
    space.delete_pod("wrong")?;
    space.delete_pod("csi")?;
    let machine = cluster.node("n1")?;
    let log = machine.read_file("/var/log/lvprov/inline-csi/shared/csi/app.log")?;
    ensure!(log.contains("last-line"), "{log}");
    let index: Value = serde_json::from_str(&machine.read_file("/var/log/lvprov/inline-csi/shared.json")?)?;
    let last = &index["directories"]["csi"]["uses"][0];
    ensure!(last["pod"] == "csi" && last["containers"][0] == "c" && last["until"].is_string(), "{index:#}");
    space.end()
}

fn restricted(cluster: &Cluster) -> Result<()> {
    const EXAMPLE: &str = include_str!("../../deploy/examples/deployment-logs-csi.yaml");
    cluster.apply(EXAMPLE)?;
    let space = Space { cluster, name: "restricted-logs" };
    space.kubectl(&["rollout", "status", "deployment/web", "--timeout=300s"])?;
    let pods = space.get("pods -l app=web")?;
    let pod = text(&pods, "/items/0/metadata/name").to_owned();
    // kubelet's fsGroup comes after ours, and wins.
    let seen = space.exec(&pod, "stat -c '%g %a' /logs")?;
    ensure!(seen.trim() == "2000 2777", "{seen}");
    eventually("it writes its log", || Ok(space.exec(&pod, "cat /logs/web.log")?.contains("still here")))?;
    space.end()
}
