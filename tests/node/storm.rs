//! Many pods at once on one log volume, for many rounds.

use anyhow::{Context, Result, ensure};
use lvprov_tests::Test;
use serde_json::Value;
use std::time::Duration;
use xtask::agent::Command;
use xtask::testbed::Node;

pub const TESTS: [Test<Node>; 1] = [("storm::twenty_pods_come_and_go_at_once_for_many_rounds", storm)];

/// Rounds where LVPROV_ROUNDS does not say; a process costs 30 ms here.
const ROUNDS: usize = 8;
/// A thousand rounds take their time.
const LIMIT: Duration = Duration::from_secs(3 * 3600);

fn volumes(node: &Node, tag: &str) -> Result<usize> {
    Ok(node.sh(&format!("lvs --noheadings -o lv_tags vg0 | grep -c '{tag}' || true"))?.trim().parse()?)
}

fn storm(node: &Node) -> Result<()> {
    let rounds = std::env::var("LVPROV_ROUNDS").map_or(Ok(ROUNDS), |text| text.parse())?;
    let before = volumes(node, "lvprov.io/kind=log")?;
    let argv =
        [env!("CARGO_BIN_EXE_storm"), "--rounds", &rounds.to_string(), "--namespace", "storm", "--volume", "web-logs"];
    let output = node.exec_within(&Command::new(argv), b"", LIMIT)?;
    eprintln!("storm: {}{}", output.stdout, output.stderr);
    ensure!(output.success(), "it ended with status {}", output.status);
    let done: Value = serde_json::from_str(&output.stdout).context("what it did")?;
    ensure!(done["calls"] == 20 * 2 * rounds, "{done}");
    // All of them made one volume, and only its own mount holds it.
    let after = volumes(node, "lvprov.io/kind=log")?;
    ensure!(after == before + 1, "{before} log volumes before, {after} after");
    node.run(["umount", "/var/log/lvprov/storm/web-logs"])?;
    let attributes = node.run(["lvs", "--noheadings", "-o", "lv_attr", "@lvprov.io/log=storm/web-logs"])?;
    ensure!(attributes.trim().get(5..6) == Some("-"), "{attributes}: it is still open");
    Ok(())
}
