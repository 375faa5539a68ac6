//! `lvprov doctor` for nodes of a cluster.

use anyhow::{Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::objects::lvprov;
use serde_json::Value;
use xtask::testbed::Cluster;

pub const TESTS: [Test<Cluster>; 1] = [("doctor::it_looks_at_nodes_from_the_controllers_pod", from_the_pod)];

fn from_the_pod(cluster: &Cluster) -> Result<()> {
    let n2 = cluster.node("n2")?;
    n2.sh("lvcreate -qq -y -n doctors -L 8m vg0 && dmsetup suspend vg0-doctors")?;
    let all = lvprov(cluster, &["doctor", "--all", "--json"]);
    let one = lvprov(cluster, &["doctor", "--node", "n2"]);
    n2.sh("dmsetup resume vg0-doctors && lvremove -qq -y vg0/doctors")?;
    let (all, one) = (all?, one?);
    let report: Value = serde_json::from_str(&all.stdout)?;
    let suspended = |node: &str| {
        let nodes = report["nodes"].as_array().into_iter().flatten();
        let found =
            nodes.filter(|it| it["name"] == node).flat_map(|it| it["findings"].as_array().into_iter().flatten());
        found.filter(|finding| finding["id"] == "device-suspended").count()
    };
    ensure!((suspended("n1"), suspended("n2")) == (0, 1), "{report:#}");
    ensure!(all.status == 2 && one.status == 2, "{} and {}", all.status, one.status);
    let line = "n2: error: logical volume vg0/doctors: its device is suspended";
    ensure!(one.stdout.contains(line) && one.stdout.contains("dmsetup resume vg0-doctors"), "{}", one.stdout);
    let nobody = lvprov(cluster, &["doctor", "--node", "n9"])?;
    ensure!(!nobody.success() && nobody.stderr.contains("n9"), "{}", nobody.stderr);
    Ok(())
}
