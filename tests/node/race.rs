//! Isolation against an enemy that races the driver.

use anyhow::{Context, Result, ensure};
use lvprov_tests::Test;
use serde_json::Value;
use std::time::Duration;
use xtask::agent::Command;
use xtask::testbed::Node;

pub const TESTS: [Test<Node>; 2] = [
    ("race::a_pod_that_exchanges_links_and_directories_gains_nothing", pod),
    ("race::with_entries_of_the_root_exchanged_a_mount_is_right_or_fails", root),
];

/// How many calls are raced within one process.
fn mounts() -> u64 {
    if lvprov_tests::full() { 1000 } else { 300 }
}

/// The same calls within one process, many of them, and by the driver's binary.
fn race(node: &Node, kind: &str, volume: &str) -> Result<Value> {
    let mut last = Value::Null;
    let many = mounts().to_string();
    for (mounts, driver) in [(&*many, None), ("20", Some("/usr/local/bin/lvprov-flexvolume"))] {
        let volume = format!("{volume}-{}", if driver.is_some() { "binary" } else { "code" });
        let mut argv = vec![env!("CARGO_BIN_EXE_race"), kind, "--mounts", mounts, "--volume", &volume];
        argv.extend(driver.iter().flat_map(|driver| ["--driver", driver]));
        let output = node.exec_within(&Command::new(argv), b"", Duration::from_secs(1200))?;
        eprintln!("race, {kind}: {}{}", output.stdout, output.stderr);
        ensure!(output.success(), "{}{}", output.stdout, output.stderr);
        if driver.is_none() {
            last = serde_json::from_str(&output.stdout).context("what happened")?;
        }
    }
    // It did race: so many exchanges during so many calls.
    ensure!(last["exchanges"].as_u64() > Some(1000), "{last}");
    Ok(last)
}

fn pod(node: &Node) -> Result<()> {
    let done = race(node, "pod", "inside")?;
    ensure!(done["mounted"] == mounts() && done["refused"] == 0, "{done}");
    Ok(())
}

fn root(node: &Node) -> Result<()> {
    let done = race(node, "root", "root")?;
    // Both took place, or nothing was raced.
    ensure!(done["mounted"].as_u64() > Some(0) && done["refused"].as_u64() > Some(0), "{done}");
    Ok(())
}
