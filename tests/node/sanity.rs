//! The public tests of CSI drivers, on the node service's unix socket.

use crate::service::Service;
use anyhow::{Result, ensure};
use lvprov_tests::Test;
use std::time::Duration;
use xtask::agent::Command;
use xtask::setup::kubernetes::CSI_SANITY;
use xtask::testbed::Node;

pub const TESTS: [Test<Node>; 2] = [
    ("sanity::csi_sanity_passes_whole", |node| csi_sanity(node, "mount")),
    ("sanity::csi_sanity_passes_whole_for_raw_block", |node| csi_sanity(node, "block")),
];

const PARAMETERS: &str = "volumeGroup: vg0\ncsi.storage.k8s.io/fstype: xfs\n";

fn csi_sanity(node: &Node, access: &str) -> Result<()> {
    let _service = Service::start(node)?;
    node.write_file("/run/sanity.yaml", PARAMETERS)?;
    let volumes = || -> Result<String> { node.sh("lvs --noheadings -o lv_name vg0 | sort") };
    let before = volumes()?;
    let command = Command::new([
        CSI_SANITY.binary().display().to_string().as_str(),
        "-csi.endpoint=unix:///var/lib/kubelet/plugins/lvm.lvprov.io/csi.sock",
        "-csi.testvolumeparameters=/run/sanity.yaml",
        &format!("-csi.testvolumeaccesstype={access}"),
        // Small: it calls once only, and a copy is to be done within that call.
        "-csi.testvolumesize=335544320",
        "-csi.testvolumeexpandsize=671088640",
        "-csi.mountdir=/run/sanity-mount",
        "-csi.stagingdir=/run/sanity-staging",
        "-ginkgo.no-color",
    ]);
    let output = node.exec_within(&command, b"", Duration::from_secs(300))?;
    // One that leaves its directory behind makes all later ones fail: the first tells the story.
    let told = output.stdout.lines().skip_while(|line| !line.contains("[FAILED]")).take(60);
    let told = told.collect::<Vec<_>>().join("\n");
    ensure!(output.success(), "csi-sanity:\n{told}");
    // What it passes over is only what the driver says it does not have.
    let summary = output.stdout.lines().rev().find(|line| line.contains("Passed")).unwrap_or("");
    ensure!(summary.contains("0 Failed"), "{summary}");
    let passed = summary.split('|').find_map(|part| part.trim().strip_suffix(" Passed")?.split_whitespace().last());
    let passed: u32 = passed.and_then(|number| number.parse().ok()).unwrap_or(0);
    ensure!(passed >= 30, "only {passed} passed: {summary}");
    ensure!(volumes()? == before, "volumes are left: {}", volumes()?);
    Ok(())
}
