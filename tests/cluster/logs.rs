//! Log volumes of a Deployment.

use anyhow::{Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::objects::{LONG, Space, eventually, text, volumes_on};
use std::collections::BTreeMap;
use xtask::testbed::Cluster;

pub const TESTS: [Test<Cluster>; 1] = [("logs::a_deployment_shares_one_volume_a_node_and_its_files_stay", deployment)];

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
