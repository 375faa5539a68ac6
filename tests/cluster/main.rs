//! The whole of lvprov on a real Kubernetes: two nodes, installed from the
//! manifests as a user does. Each test has a namespace of its own.

mod bad_input;
mod behaviours;
mod block;
mod capacity;
mod certificates;
mod claims;
mod crash;
mod doctor;
mod gc;
mod growth;
mod hosts;
mod layouts;
mod logs;
mod loss;
mod metrics;
mod reuse;
mod snapshots;
mod unmounts;

use anyhow::Result;
use lvprov_tests::Test;
use lvprov_tests::objects::class;
use xtask::testbed::{Cluster, ClusterOptions};

/// Where each node's children are written down.
const COMMANDS: &str = "/run/lvprov-commands.log";

/// Much like a test that always runs: by the other source, on another kind of
/// volume, or on a node without Kubernetes.
const ONLY_FULL: [&str; 19] = [
    "claims::csi_retain_keeps_the_volume",
    "claims::csi_a_force_deleted_pod_does_not_cost_a_mounted_volume",
    "claims::csi_a_pv_deleted_first_goes_with_its_claim",
    "claims::csi_one_pod_alone_has_a_read_write_once_pod_claim",
    "growth::csi_a_claim_grows_while_it_is_used",
    "growth::csi_a_btrfs_grows_while_it_is_used",
    "growth::csi_a_claim_grows_before_a_pod_uses_it",
    "reuse::csi_a_volume_comes_back_from_the_trash",
    "reuse::a_kept_volume_is_given_to_another_claim",
    "capacity::a_selected_node_without_the_service_is_handed_back",
    "layouts::a_mirror_that_cannot_grow_gets_back",
    "certificates::what_an_admin_has_broken_is_mended_by_a_controller_that_starts_with_it",
    "unmounts::a_busy_csi_volume_is_one_too",
    "snapshots::of_a_thin_volume_are_restored_and_cloned",
    "snapshots::a_volume_with_a_snapshot_grows_and_goes_after_it",
    "snapshots::one_that_is_lost_says_so",
    "snapshots::a_claim_deleted_in_the_middle_leaves_nothing",
    "snapshots::of_a_raw_device_is_restored_and_kept_for_another_name",
    // Its crashes are the matrix's, in any order.
    "crash::twenty_claims_while_controller_and_nodes_are_killed",
];

fn main() {
    let mut tests: Vec<Test<Cluster>> = Vec::new();
    tests.extend(claims::TESTS);
    tests.extend(growth::TESTS);
    tests.extend(block::TESTS);
    tests.extend(reuse::TESTS);
    tests.extend(capacity::TESTS);
    tests.extend(layouts::TESTS);
    tests.extend(bad_input::TESTS);
    tests.extend(logs::TESTS);
    tests.extend(metrics::TESTS);
    tests.extend(certificates::TESTS);
    tests.extend(unmounts::TESTS);
    tests.extend(gc::TESTS);
    tests.extend(behaviours::TESTS);
    tests.extend(hosts::TESTS);
    tests.extend(crash::TESTS);
    tests.extend(doctor::TESTS);
    // They give the controller further rights.
    tests.extend(snapshots::TESTS);
    // It takes a node away, and gives it back.
    tests.extend(loss::TESTS);
    lvprov_tests::run(&tests, &ONLY_FULL, start)
}

fn start() -> Result<Cluster> {
    let cluster = Cluster::start(ClusterOptions { spare_disks_gib: vec![1; 4], ..ClusterOptions::default() })?;
    for name in cluster.node_names() {
        cluster.node(&name)?.write_file("/etc/lvprov/node.json", format!(r#"{{"commandLog":"{COMMANDS}"}}"#))?;
    }
    cluster.install_lvprov()?;
    for (suffix, source) in [("", ""), ("-csi", ", source: csi")] {
        class(&cluster, &format!("xfs{suffix}"), &format!("volumeGroup: vg0{source}"), "")?;
        class(
            &cluster,
            &format!("ext4-retain{suffix}"),
            &format!("volumeGroup: vg0, csi.storage.k8s.io/fstype: ext4{source}"),
            "reclaimPolicy: Retain, mountOptions: [noatime]",
        )?;
    }
    Ok(cluster)
}
