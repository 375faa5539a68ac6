//! What becomes of volumes whose class has a grace, or a wipe, at the end.

use crate::block::{dirty, id, is_zero, make, refused};
use crate::service::{LOG, Service};
use crate::uid;
use anyhow::{Context, Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::driver::Call;
use serde_json::Value;
use std::time::{Duration, Instant};
use xtask::testbed::Node;

pub const TESTS: [Test<Node>; 6] = [
    ("trash::a_volume_waits_there_and_is_said_to_take_room", waits),
    ("trash::its_time_passes_and_its_extents_hold_zeros", zeroed),
    ("trash::a_wipe_that_was_cut_off_goes_on", cut_off),
    ("trash::what_discards_or_only_waits_is_removed_too", discarded),
    ("trash::where_the_disk_takes_no_discards_it_is_removed_and_told", undiscarded),
    ("trash::nobody_mounts_what_is_in_it", not_mounted),
];

const SIZE: &str = "335544320";
const MIB: u64 = 1 << 20;

fn create(service: &Service<'_>, number: u32, parameters: &[&str]) -> Result<()> {
    let uid = uid(number);
    let mut args = vec!["create", &uid, SIZE];
    for parameter in parameters {
        args.extend(["--set", parameter]);
    }
    let answer = service.ask(&args)?;
    ensure!(answer["bytes"] == 320 * MIB, "{answer}");
    Ok(())
}

fn delete(service: &Service<'_>, number: u32) -> Result<()> {
    let answer = service.ask(&["delete", &id(number)])?;
    ensure!(answer["deleted"] == true, "{answer}");
    Ok(())
}

/// The volume of this claim in the trash.
fn trashed(service: &Service<'_>, number: u32) -> Result<Option<Value>> {
    let all = service.call(&["inventory"])?;
    Ok(all.into_iter().find(|item| item["kind"] == "trash" && item["uid"] == uid(number)))
}

fn until_gone(service: &Service<'_>, number: u32) -> Result<()> {
    let begun = Instant::now();
    while let Some(item) = trashed(service, number)? {
        ensure!(begun.elapsed() < Duration::from_secs(120), "it stays: {item}");
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

fn waits(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    create(&service, 0x800, &["trashTime=24h", "lvprov.io/storage-class=careful"])?;
    let call = Call::data("default", "web-0", "trash-1", &uid(0x800));
    call.mount(node)?.success()?;
    node.sh(&format!("echo kept > {}/file", call.directory()))?;
    refused(&service, &["delete", &id(0x800)], "FailedPrecondition", &["in use"])?;
    call.unmount(node)?.success()?;
    let free = service.free()?;
    delete(&service, 0x800)?;
    // The same again is done already.
    delete(&service, 0x800)?;
    let item = trashed(&service, 0x800)?.context("it is not in the trash")?;
    ensure!(item["claim"] == "default/data" && item["class"] == "careful" && item["policy"] == "remove", "{item}");
    ensure!(item["until"].as_i64().zip(item["since"].as_i64()).is_some_and(|(u, s)| u - s == 86_400), "{item}");
    ensure!(item["lv"].as_str().is_some_and(|lv| lv.starts_with("trash-")), "{item}");
    ensure!(!service.call(&["inventory"])?.iter().any(|item| item["kind"] == "data" && item["uid"] == uid(0x800)));
    // It takes its room, and that is said.
    let begun = Instant::now();
    loop {
        let report = service.ask(&["watch", "1"])?;
        if report["trash"] == 320 * MIB {
            ensure!(report["free"] == free, "{report}");
            break;
        }
        ensure!(begun.elapsed() < Duration::from_secs(20), "{report}");
        std::thread::sleep(Duration::from_millis(200));
    }
    let metrics = service.metrics("metrics")?.ok()?;
    ensure!(metrics.contains("lvprov_trash_bytes{volume_group=\"vg0\"} 335544320"), "{metrics}");
    refused(&service, &["create", &uid(0x801), "1099511627776"], "ResourceExhausted", &["320 MiB are in the trash"])?;
    // A claim under the same name of CSI's gets a volume of its own.
    create(&service, 0x800, &[])?;
    delete(&service, 0x800)?;
    ensure!(trashed(&service, 0x800)?.is_some());
    // Emptied by hand.
    ensure!(service.ask(&["empty-trash", &uid(0x800)])?["found"] == true);
    until_gone(&service, 0x800)?;
    service.until_free(free + 320 * MIB)
}

/// Where a volume's extents are.
fn extents(node: &Node, lv: &str) -> Result<(String, u64, u64)> {
    let ranges = node.sh(&format!("lvs --noheadings --segments -o seg_pe_ranges vg0/{lv}"))?;
    let range = ranges.split_whitespace().next().context("no range")?;
    let (device, extents) = range.rsplit_once(':').context("no range")?;
    let (first, last) = extents.split_once('-').context("no range")?;
    Ok((device.to_owned(), first.parse()?, last.parse()?))
}

/// Whether the extents that a volume had hold zeros, read by way of a volume
/// made by hand upon just them.
fn were_wiped(node: &Node, (device, first, last): &(String, u64, u64)) -> Result<bool> {
    let count = last - first + 1;
    node.sh(&format!("lvcreate -qq -y -Wn -Zn -n look -l {count} vg0 {device}:{first}-{last}"))?;
    let zero = is_zero(node, "/dev/vg0/look", 0)?;
    node.run(["lvremove", "-qq", "-y", "vg0/look"])?;
    Ok(zero)
}

fn fill(node: &Node, number: u32) -> Result<()> {
    let device = format!("/dev/{}", id(number));
    node.sh(&lvprov_tests::fill(&device)).map(drop)
}

fn zeroed(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    create(&service, 0x802, &["deletePolicy=zero", "trashTime=3s"])?;
    fill(node, 0x802)?;
    let at = extents(node, &format!("pvc-{}", uid(0x802)))?;
    delete(&service, 0x802)?;
    ensure!(trashed(&service, 0x802)?.is_some_and(|item| item["policy"] == "zero"));
    until_gone(&service, 0x802)?;
    ensure!(were_wiped(node, &at)?, "its bytes are still there");
    let metrics = service.metrics("metrics")?.ok()?;
    let wiped = metrics.lines().find_map(|line| line.strip_prefix("lvprov_wiped_bytes_total ")).context("no figure")?;
    ensure!(wiped.parse::<u64>()? >= 320 * MIB, "{wiped}");
    ensure!(metrics.contains("lvprov_wipe_remaining_bytes 0"), "{metrics}");
    // A raw volume as well, and it is made anew with zeros all the same.
    dirty(node)?;
    make(&service, 0x803)?;
    delete(&service, 0x803)
}

fn cut_off(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    create(&service, 0x804, &["deletePolicy=zero", "trashTime=24h"])?;
    create(&service, 0x805, &["deletePolicy=zero", "trashTime=24h"])?;
    fill(node, 0x804)?;
    fill(node, 0x805)?;
    let places = [0x804, 0x805].map(|number| extents(node, &format!("pvc-{}", uid(number))));
    delete(&service, 0x804)?;
    // Killed between the tag and the name, and within the wipe.
    drop(service);
    let (first, second) = (uid(0x804), uid(0x805));
    node.sh(&format!(
        "lvchange -qq --addtag lvprov.io/trashed=$(date +%s) vg0/pvc-{second}
         lvchange -qq --addtag lvprov.io/wiping $(lvs --noheadings -o vg_name,lv_name | awk '/trash-{first}/ {{print $1 \"/\" $2}}')"
    ))?;
    let service = Service::start(node)?;
    // What has begun goes on by itself; the other one is where it was to be.
    until_gone(&service, 0x804)?;
    let item = trashed(&service, 0x805)?.context("it is not in the trash")?;
    ensure!(item["lv"].as_str().is_some_and(|lv| lv.starts_with("trash-")) && item["wiping"] == false, "{item}");
    ensure!(service.ask(&["empty-trash", &second])?["found"] == true);
    until_gone(&service, 0x805)?;
    for at in places {
        ensure!(were_wiped(node, &at?)?, "its bytes are still there");
    }
    Ok(())
}

fn discarded(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    let free = service.free()?;
    create(&service, 0x806, &["deletePolicy=discard"])?;
    fill(node, 0x806)?;
    let at = extents(node, &format!("pvc-{}", uid(0x806)))?;
    create(&service, 0x807, &["trashTime=1s"])?;
    refused(&service, &["create", &uid(0x808), SIZE, "--set", "deletePolicy=shred"], "InvalidArgument", &["zero"])?;
    refused(&service, &["create", &uid(0x808), SIZE, "--set", "trashTime=soon"], "InvalidArgument", &["24h"])?;
    delete(&service, 0x806)?;
    delete(&service, 0x807)?;
    until_gone(&service, 0x806)?;
    until_gone(&service, 0x807)?;
    service.until_free(free)?;
    // The test bed's disks forget what they are told to, and read as zeros there.
    ensure!(were_wiped(node, &at)?, "nothing was discarded");
    Ok(())
}

/// It goes all the same, and somebody hears that its bytes are still there.
fn undiscarded(node: &Node) -> Result<()> {
    const MOST: &str = "/sys/block/ubdb/queue/discard_max_bytes";
    let service = Service::start(node)?;
    // ubd forgets what it was told when the last one closes it.
    node.sh(&format!("lvcreate -qq -y -n holds -L 4m vg0; echo 0 > {MOST}"))?;
    let done = create(&service, 0x80b, &["deletePolicy=discard"]).and_then(|()| {
        fill(node, 0x80b)?;
        let at = extents(node, &format!("pvc-{}", uid(0x80b)))?;
        delete(&service, 0x80b)?;
        until_gone(&service, 0x80b)?;
        Ok(at)
    });
    node.sh(&format!("cat /sys/block/ubdb/queue/discard_max_hw_bytes > {MOST}; lvremove -qq -y vg0/holds"))?;
    let at = done?;
    ensure!(at.0 == "/dev/ubdb", "the volume is on {}", at.0);
    ensure!(!were_wiped(node, &at)?, "its bytes have gone");
    let log = node.read_file(LOG)?;
    ensure!(log.contains("takes no discards"), "{log}");
    Ok(())
}

fn not_mounted(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    create(&service, 0x809, &["trashTime=24h"])?;
    let call = Call::data("default", "web-0", "trash-2", &uid(0x809));
    call.mount(node)?.success()?;
    call.unmount(node)?.success()?;
    delete(&service, 0x809)?;
    let item = trashed(&service, 0x809)?.context("it is not in the trash")?;
    let named = call.with("logicalVolume", item["lv"].as_str().unwrap_or(""));
    named.mount(node)?.failure(&["does not belong"])?;
    Call::data("default", "web-0", "trash-3", &uid(0x809)).mount(node)?.failure(&["not on this node"])?;
    ensure!(service.ask(&["empty-trash", &uid(0x809)])?["found"] == true);
    until_gone(&service, 0x809)
}
