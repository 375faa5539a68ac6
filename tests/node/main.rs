//! The driver on real LVM: one node without Kubernetes.

mod adopt;
mod bad_input;
mod block;
mod counts;
mod data;
mod doctor;
mod filesystems;
mod hosts;
mod layouts;
mod limits;
mod log_options;
mod logs;
mod many;
mod race;
mod replay;
mod sanity;
mod service;
mod shell;
mod shippers;
mod snapshots;
mod storm;
mod trash;
mod trouble;

use anyhow::Result;
use lvprov_tests::Test;
use xtask::testbed::{Node, NodeOptions};

/// Where the node's children are written down.
const COMMANDS: &str = "/run/lvprov-commands.log";

/// What others show as well, and in less time.
const ONLY_FULL: [&str; 3] = [
    // The matrix cuts copies off in a cluster.
    "snapshots::a_copy_that_was_cut_off_goes_on",
    // Those of linear ones do always.
    "layouts::a_raw_device_of_any_kind_grows_by_zeros",
    "shell::killed_service_or_lvm_leaves_no_lock",
];

fn main() {
    let mut tests: Vec<Test<Node>> = Vec::new();
    tests.extend(adopt::TESTS);
    tests.extend(bad_input::TESTS);
    tests.extend(block::TESTS);
    tests.extend(counts::TESTS);
    tests.extend(data::TESTS);
    tests.extend(doctor::TESTS);
    tests.extend(filesystems::TESTS);
    tests.extend(hosts::TESTS);
    tests.extend(layouts::TESTS);
    tests.extend(limits::TESTS);
    tests.extend(log_options::TESTS);
    tests.extend(logs::TESTS);
    tests.extend(many::TESTS);
    tests.extend(race::TESTS);
    tests.extend(replay::TESTS);
    tests.extend(sanity::TESTS);
    tests.extend(service::TESTS);
    tests.extend(shell::TESTS);
    tests.extend(shippers::TESTS);
    tests.extend(snapshots::TESTS);
    tests.extend(storm::TESTS);
    tests.extend(trash::TESTS);
    tests.extend(trouble::TESTS);
    lvprov_tests::run(&tests, &ONLY_FULL, || {
        // Sparse: the tests leave their volumes behind.
        let options = NodeOptions { disks_gib: vec![100], spare_disks_gib: vec![1; 4], ..NodeOptions::default() };
        let node = Node::boot_with(options)?;
        configure(&node, "")?;
        Ok(node)
    })
}

/// Writes the node's configuration; `more` is further JSON of it.
fn configure(node: &Node, more: &str) -> Result<()> {
    let comma = if more.is_empty() { "" } else { "," };
    node.write_file("/etc/lvprov/node.json", format!(r#"{{"commandLog":"{COMMANDS}"{comma}{more}}}"#))
}

/// Does something under another configuration of the node.
fn configured(node: &Node, more: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    configure(node, more)?;
    let done = work();
    configure(node, "")?;
    done
}

/// Makes a data volume as the node service does.
fn create(node: &Node, namespace: &str, claim_uid: &str, size: &str) -> Result<()> {
    let cluster = "11111111-2222-4333-8444-555555555555";
    node.sh(&format!(
        "lvcreate -qq -y -W y -Z y -n pvc-{claim_uid} -L {size} --addtag lvprov.io/kind=data \
         --addtag lvprov.io/cluster={cluster} --addtag lvprov.io/claim-uid={claim_uid} \
         --addtag lvprov.io/claim={namespace}/data vg0"
    ))?;
    mark_new(node, namespace, claim_uid)
}

/// Writes the mark of a new volume, as the node service does after lvcreate.
fn mark_new(node: &Node, namespace: &str, claim_uid: &str) -> Result<()> {
    let uuid = lvm::identity::data_uuid(&namespace.parse()?, &claim_uid.parse()?);
    let image = std::env::temp_dir().join(format!("lvprov-mark-{}-{claim_uid}", std::process::id()));
    std::fs::write(&image, [0; 512])?;
    lvm::filesystem::mark_new(&image, uuid)?;
    let mark = std::fs::read(&image)?;
    std::fs::remove_file(&image)?;
    node.write_file(format!("/run/mark-{claim_uid}"), mark)?;
    node.sh(&format!(
        "dd if=/run/mark-{claim_uid} of=/dev/vg0/pvc-{claim_uid} bs=512 count=1 conv=notrunc,fsync status=none"
    ))?;
    Ok(())
}

/// Takes the first superblock of what is unmounted.
fn lose_superblock(node: &Node, device: &str) -> Result<()> {
    node.sh(&format!("dd if=/dev/zero of={device} bs=4096 count=1 conv=notrunc,fsync status=none"))?;
    Ok(())
}

/// A claim UID of its own for each number.
fn uid(number: u32) -> String {
    format!("0f0e7f0a-1111-4222-8333-{number:012x}")
}

/// What kinds of commands `work` ran, in order, as the command log tells.
fn kinds(node: &Node, work: impl FnOnce() -> Result<()>) -> Result<Vec<String>> {
    node.sh(&format!(": > {COMMANDS}"))?;
    work()?;
    let log = node.read_file(COMMANDS)?;
    log.lines()
        // The start of an lvm that stays is no command, and it may have been started before.
        .filter(|line| !line.contains(r#""command":"lvm","#))
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(line)?;
            let command = line["command"].as_str().unwrap_or("");
            let words: Vec<&str> = command.split(' ').take(if command.starts_with("lvm ") { 2 } else { 1 }).collect();
            Ok(format!("{}: {}", line["kind"].as_str().unwrap_or("?"), words.join(" ")))
        })
        .collect()
}
