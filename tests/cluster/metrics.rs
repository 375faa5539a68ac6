//! Metrics, read as Prometheus reads them.

use anyhow::{Context, Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::objects::{Space, log_volume};
use xtask::testbed::{Cluster, Output};

pub const TESTS: [Test<Cluster>; 1] = [("metrics::a_secret_of_their_own_reads_them_and_no_more", secret)];

fn secret(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "metrics")?;
    space.pod("p", Some("n1"), &[log_volume("measured", "")])?;
    space.ready("p")?;
    space.exec("p", "dd if=/dev/zero of=/v0/file bs=1M count=3 2>/dev/null && sync")?;
    let n2 = cluster.node("n2")?;
    n2.run(["mkdir", "-p", "/run/metrics-tls"])?;
    let secret = cluster.get_json("-n lvprov-system secret lvprov-metrics-tls")?;
    for (key, value) in secret["data"].as_object().context("the secret has no data")? {
        let value = value.as_str().unwrap_or("");
        n2.sh(&format!("echo {value} | base64 -d > /run/metrics-tls/{key}"))?;
    }
    // From another node, over the network.
    let address = cluster.node("n1")?.address();
    let call = |port: u16, what: &str| -> Result<Output> {
        let address = format!("{address}:{port}");
        n2.exec([env!("CARGO_BIN_EXE_node-call"), "--address", &address, "--tls-dir", "/run/metrics-tls", what])
    };
    let text = call(9809, "metrics")?.ok()?;
    let used = "lvprov_log_directory_used_bytes{namespace=\"metrics\",volume=\"measured\",directory=\"p\",pod=\"p\"} ";
    let used =
        text.lines().find_map(|line| line.strip_prefix(used)).with_context(|| format!("no sample in\n{text}"))?;
    ensure!((3 << 20..4 << 20).contains(&used.parse::<u64>()?), "{used} B used");
    ensure!(text.contains("lvprov_node_info{node=\"n1\""), "{text}");
    ensure!(!call(9808, "inventory")?.success(), "a reader of metrics may call the node service");
    space.end()
}
