//! Groups with very many volumes, and with no room for the description of more.

use crate::service::Service;
use crate::{configure, kinds, uid};
use anyhow::{Context, Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::driver::Call;
use serde_json::Value;
use std::fmt::Write;
use std::time::{Duration, Instant};
use xtask::testbed::{Node, NodeOptions};

pub const TESTS: [Test<Node>; 2] = [
    ("many::fourteen_hundred_volumes_are_served_as_one_is", fourteen_hundred),
    ("many::a_full_metadata_area_is_known_before_it_is_hit", full_metadata),
];

const MIB: u64 = 1 << 20;

/// A node with bare disks, which other tests leave alone.
fn own_node(disks_gib: Vec<u64>) -> Result<Node> {
    let node = Node::boot_with(NodeOptions { disks_gib, volume_groups: false, ..NodeOptions::default() })?;
    configure(&node, "")?;
    Ok(node)
}

/// The UID of the claim of a volume of [`fill`].
fn bulk_uid(number: u32) -> String {
    format!("0f0e7f0a-1111-4222-aaaa-{number:012x}")
}

/// Gives a group without volumes so many of one extent each, in one write of
/// its metadata: what so many calls of lvcreate would leave.
fn fill(node: &Node, vg: &str, count: u32) -> Result<()> {
    let file = format!("/run/{vg}.metadata");
    node.sh(&format!("vgcfgbackup -f {file} {vg}"))?;
    let empty = node.read_file(&file)?;
    let end = empty.rfind('}').context("metadata without an end")?;
    let mut text = format!("{}\tlogical_volumes {{\n", &empty[..end]);
    for number in 0..count {
        let uid = bulk_uid(number);
        write!(
            text,
            "pvc-{uid} {{\nid = \"{number:06}-0000-0000-0000-0000-0000-{number:06}\"\n\
             status = [\"READ\", \"WRITE\", \"VISIBLE\"]\nflags = []\n\
             tags = [\"lvprov.io/kind=data\", \"lvprov.io/cluster=11111111-2222-4333-8444-555555555555\", \
             \"lvprov.io/claim-uid={uid}\", \"lvprov.io/claim=default/data-some-statefulset-{number}\"]\n\
             creation_time = 1795879362\ncreation_host = \"n1\"\nsegment_count = 1\n\
             segment1 {{\nstart_extent = 0\nextent_count = 1\ntype = \"striped\"\nstripe_count = 1\n\
             stripes = [\"pv0\", {number}]\n}}\n}}\n"
        )?;
    }
    text.push_str("}\n}\n");
    node.write_file(&file, text)?;
    node.sh(&format!("vgcfgrestore -qq -f {file} {vg}"))?;
    Ok(())
}

fn fourteen_hundred(_: &Node) -> Result<()> {
    let node = own_node(vec![20, 1, 1])?;
    // A group is made of blank disks only.
    node.sh("mkfs.ext4 -q /dev/ubdc && mkdir -p /tmp/c && vgcreate -qq -y zz /dev/ubdd")?;
    let refused = |disks: &str, words: &str| {
        let output = node.sh(&format!("if lvprov vg create vg0 {disks} 2>&1; then exit 1; fi"))?;
        ensure!(output.contains(words), "{disks}: {output}");
        Ok(())
    };
    refused("/dev/ubdb /dev/ubdc", "signature (ext4)")?;
    refused("/dev/ubdd", "LVM2_member")?;
    refused("/dev/ubdb /dev/ubdb", "named twice")?;
    refused("/dev/ubdb --volumes 50000000", "50000")?;
    node.sh("mount /dev/ubdc /tmp/c")?;
    refused("/dev/ubdc", "mounted at /tmp/c")?;
    node.sh("unshare -m --propagation private sh -c 'echo $$ > /run/other.pid; exec sleep 600' > /dev/null 2>&1 < /dev/null &
             while ! test -s /run/other.pid || ! grep -q sleep /proc/$(cat /run/other.pid)/comm; do sleep 0.05; done; umount /tmp/c")?;
    refused("/dev/ubdc", "in use")?;
    node.sh("kill $(cat /run/other.pid)")?;
    let told = node.sh("lvprov vg create vg0 /dev/ubdb --dry-run")?;
    ensure!(told.contains("would make volume group vg0 on /dev/ubdb") && told.contains("16 MiB"), "{told}");
    ensure!(!node.exec(["vgs", "vg0"])?.success(), "a dry run has made it");
    let told = node.sh("lvprov vg create vg0 /dev/ubdb")?;
    ensure!(told.contains("made volume group vg0"), "{told}");
    refused("/dev/ubdc", "there already")?;

    fill(&node, "vg0", 1400)?;
    let service = Service::start(&node)?;
    let free = service.call(&["watch", "1"])?[1]["free"].as_u64();
    ensure!(free.is_some(), "both groups are reported");
    let (one, size) = (uid(0x500), (320 * MIB).to_string());
    let ran = kinds(&node, || {
        let made = service.call(&["create", &one, &size])?;
        ensure!(made[0]["id"] == format!("vg0/pvc-{one}"), "{made:?}");
        service.until_reported()
    })?;
    ensure!(ran == ["mutate: lvm lvcreate", "report: lvm vgs"], "{ran:?}");
    // The same again is the same, found among them.
    let again = service.call(&["create", &one, &size])?;
    ensure!(again[0]["bytes"] == 320 * MIB, "{again:?}");
    ensure!(service.call(&["inventory"])?.len() == 1401);
    let call = Call::data("default", "many-0", "many-1", &one);
    call.mount(&node)?.success()?;
    let ran = kinds(&node, || call.expand(&node, 400 * MIB)?.success())?;
    ensure!(ran.iter().filter(|command| *command == "mutate: lvm lvextend").count() == 1, "{ran:?}");
    let size = node.sh(&format!("blockdev --getsize64 /dev/vg0/pvc-{one}"))?;
    ensure!(size.trim() == (400 * MIB).to_string(), "{size}");
    call.unmount(&node)?.success()?;
    for gone in [one, bulk_uid(0), bulk_uid(1399)] {
        let deleted = service.call(&["delete", &format!("vg0/pvc-{gone}")])?;
        ensure!(deleted[0]["deleted"] == true, "{deleted:?}");
    }
    let left = node.sh("vgs --noheadings -o lv_count vg0")?;
    ensure!(left.trim() == "1398", "{left}");
    let found = node.exec(["sh", "-c", "lvprov doctor --volume-group vg0"])?;
    ensure!(found.success(), "{}", found.stdout);
    Ok(())
}

fn full_metadata(_: &Node) -> Result<()> {
    let node = own_node(vec![10])?;
    // As LVM makes it by itself: 1 MiB.
    node.sh("vgcreate -qq -y vg0 /dev/ubdb")?;
    fill(&node, "vg0", 955)?;
    let told = node.exec(["lvprov", "doctor"])?;
    ensure!(told.status == 1 && told.stdout.contains("[metadata-low]"), "{}", told.stdout);
    let service = Service::start(&node)?;
    let free = || service.call(&["watch", "1"])?[0]["free"].as_u64().context("free");
    let create =
        |number: u32| service.call(&["create", &uid(number), "335544320"]).map(|mut answers| answers.remove(0));
    // What is left for new volumes is soon gone.
    let mut made = 0;
    let refusal = loop {
        let answer = create(0x510 + made)?;
        if answer["id"].is_null() {
            break answer;
        }
        made += 1;
        ensure!(made < 20, "it never ends");
    };
    ensure!(made > 0 && refusal["code"] == "ResourceExhausted", "after {made}: {refusal}");
    let message = refusal["message"].as_str().unwrap_or("");
    ensure!(
        message.contains("metadata area of volume group vg0 is full") && message.contains("lvprov gc"),
        "{message}"
    );
    let eventually = |what: &str, done: &dyn Fn() -> Result<bool>| {
        let begun = Instant::now();
        while !done()? {
            ensure!(begun.elapsed() < Duration::from_secs(60), "{what}");
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    };
    eventually("capacity is not 0", &|| Ok(free()? == 0))?;
    let told = node.exec(["lvprov", "doctor"])?;
    ensure!(told.status == 2 && told.stdout.contains("[metadata-full]"), "{}", told.stdout);
    // It is not even tried, and nothing is half made.
    let ran = kinds(&node, || {
        ensure!(create(0x510 + made)?["code"] == "ResourceExhausted");
        Ok(())
    })?;
    ensure!(ran == ["report: lvm vgs", "report: lvm lvs"], "{ran:?}");
    ensure!(!node.exec(["lvs", &format!("vg0/pvc-{}", uid(0x510 + made))])?.success());
    // Those that are there are served, and grow.
    let first: Value = create(0x510)?;
    ensure!(first["bytes"] == 320 * MIB, "{first}");
    let call = Call::data("default", "full-0", "full-1", &uid(0x510));
    call.mount(&node)?.success()?;
    call.expand(&node, 400 * MIB)?.success()?;
    call.unmount(&node)?.success()?;
    for number in 0..8 {
        let deleted = service.call(&["delete", &format!("vg0/pvc-{}", bulk_uid(number))])?;
        ensure!(deleted[0]["deleted"] == true, "{deleted:?}");
    }
    eventually("capacity stays 0", &|| Ok(free()? > 0))?;
    ensure!(!create(0x510 + made)?["id"].is_null());
    Ok(())
}
