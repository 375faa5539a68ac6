//! Snapshots, restores and clones, on real LVM.

use crate::block::{dirty, id, is_zero, refused};
use crate::service::Service;
use crate::{COMMANDS, configured, create, kinds, uid};
use anyhow::{Context, Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::driver::Call;
use serde_json::Value;
use std::time::{Duration, Instant};
use xtask::testbed::Node;

pub const TESTS: [Test<Node>; 10] = [
    ("snapshots::each_file_system_is_restored_and_cloned_beside_its_original", each_file_system),
    ("snapshots::thin_ones_share_what_they_have", thin),
    ("snapshots::a_raw_device_is_copied_to_its_last_byte", block),
    ("snapshots::a_volume_with_snapshots_neither_grows_nor_goes", kept),
    ("snapshots::one_that_had_too_little_room_is_lost_and_told", lost),
    ("snapshots::what_does_not_suit_is_refused_and_nothing_is_left", unfit),
    ("snapshots::a_copy_that_was_cut_off_goes_on", cut_off),
    ("snapshots::a_copy_that_nobody_wants_leaves_nothing", given_up),
    ("snapshots::what_a_clone_was_copied_from_goes_although_its_maker_ended", left_by_a_clone),
    ("snapshots::the_inventory_shows_them_and_they_are_collected", collected),
];

const MIB: u64 = 1 << 20;
const SIZE: u64 = 320 * MIB;

fn snapshot_id(number: u32) -> String {
    format!("n1/vg0/snap-{}", uid(number))
}

/// Asks until what is made is ready.
fn make(service: &Service<'_>, number: u32, bytes: u64, more: &[&str]) -> Result<Value> {
    let (uid, bytes) = (uid(number), bytes.to_string());
    let args = [&["create", &uid, &bytes][..], more].concat();
    let begun = Instant::now();
    loop {
        let answer = service.ask(&args)?;
        if answer["code"] != "Aborted" {
            return Ok(answer);
        }
        ensure!(begun.elapsed() < Duration::from_secs(180), "{answer}");
    }
}

fn names(node: &Node, vg: &str) -> Result<Vec<String>> {
    let names = node.run(["lvs", "--noheadings", "-o", "lv_name", vg])?;
    Ok(names.split_whitespace().map(str::to_owned).collect())
}

fn pod(number: u32, fs: &str) -> Call {
    Call::data("default", "web-0", &format!("snap-{number:x}"), &uid(number)).fs(fs)
}

fn holds(node: &Node, pod: &Call, text: &str) -> Result<()> {
    let has = node.read_file(&format!("{}/file", pod.directory()))?;
    ensure!(has.trim() == text, "{} holds {has:?} and not {text:?}", pod.directory());
    Ok(())
}

fn write(node: &Node, pod: &Call, text: &str) -> Result<()> {
    node.sh(&format!("echo '{text}' > {}/file && sync -f {0}/file", pod.directory()))?;
    Ok(())
}

/// Mebibytes of the file system that a pod sees.
fn sees(node: &Node, pod: &Call) -> Result<u64> {
    Ok(node.sh(&format!("df -m --output=size {} | tail -n 1", pod.directory()))?.trim().parse()?)
}

/// All three are mounted at once: the original, a restore and a clone.
fn each_file_system(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    for (number, fs) in [(0xb00, "xfs"), (0xb10, "ext4"), (0xb20, "btrfs")] {
        create(node, "default", &uid(number), "320m")?;
        let original = pod(number, fs);
        original.mount(node)?.success()?;
        write(node, &original, "before")?;
        let made = service.ask(&["snapshot", &id(number), &uid(number)])?;
        ensure!(made["id"] == snapshot_id(number) && made["bytes"] == SIZE && made["ready"] == true, "{fs}: {made}");
        ensure!(service.ask(&["snapshot", &id(number), &uid(number)])? == made, "another one");
        write(node, &original, "after")?;

        let from = ["--fs", fs, "--snapshot", &snapshot_id(number)];
        let restored = make(&service, number + 1, SIZE, &from)?;
        ensure!(restored["bytes"] == SIZE, "{fs}: {restored}");
        let restored = pod(number + 1, fs);
        restored.mount(node)?.success()?;
        holds(node, &restored, "before")?;
        write(node, &restored, "restored")?;

        // Larger than what it is a copy of, and its file system too.
        let cloned = make(&service, number + 2, 480 * MIB, &["--fs", fs, "--volume", &id(number)])?;
        ensure!(cloned["bytes"] == 480 * MIB, "{fs}: {cloned}");
        let cloned = pod(number + 2, fs);
        cloned.mount(node)?.success()?;
        holds(node, &cloned, "after")?;
        let (small, large) = (sees(node, &original)?, sees(node, &cloned)?);
        ensure!(large >= small + 120, "{fs}: {small} MiB, and the larger clone {large} MiB");

        holds(node, &original, "after")?;
        holds(node, &restored, "restored")?;
        let tags = node.sh(&format!("lvs --noheadings -o lv_tags {}", id(number + 1)))?;
        ensure!(tags.contains(&format!("lvprov.io/from=copy:vg0/snap-{}", uid(number))), "{tags}");
        ensure!(!tags.contains("wiping"), "{tags}");
        let left = names(node, "vg0")?;
        ensure!(!left.iter().any(|name| name.starts_with("clone-")), "{left:?}");
        for call in [&original, &restored, &cloned] {
            call.unmount(node)?.success()?;
        }
        for _ in 0..2 {
            ensure!(service.ask(&["delete-snapshot", &snapshot_id(number)])?["deleted"] == true);
        }
        // Done, and asked for again: it needs no source.
        ensure!(make(&service, number + 1, SIZE, &from)?["bytes"] == SIZE);
        for number in [number, number + 1, number + 2] {
            ensure!(service.ask(&["delete", &id(number)])?["deleted"] == true);
        }
    }
    Ok(())
}

/// A group vg1 with a thin pool; gone when dropped.
struct Pool<'a>(&'a Node);

impl<'a> Pool<'a> {
    fn make(node: &'a Node) -> Result<Self> {
        let pool = Self(node);
        node.sh("vgcreate -qq -y vg1 /dev/ubdc && lvcreate -qq -y --type thin-pool -Zy -L 900m -n pool0 vg1")?;
        Ok(pool)
    }
}

impl Drop for Pool<'_> {
    fn drop(&mut self) {
        let _ = self.0.sh("vgremove -qq -y -ff vg1; pvremove -qq -y -ff /dev/ubdc");
    }
}

const OVERSOLD: &str = r#""thinPools":{"vg1":{"pool":"pool0","overProvisioning":3.0}}"#;

fn thin(node: &Node) -> Result<()> {
    let _pool = Pool::make(node)?;
    configured(node, OVERSOLD, || {
        let service = Service::start(node)?;
        let thin = ["--vg", "vg1", "--set", "layout=thin"];
        let volume = |number| format!("vg1/pvc-{}", uid(number));
        let snapshot = format!("n1/vg1/snap-{}", uid(0xb30));
        ensure!(make(&service, 0xb30, SIZE, &thin)?["bytes"] == SIZE);
        let at = |number| pod(number, "xfs").with("volumeGroup", "vg1");
        let original = at(0xb30);
        original.mount(node)?.success()?;
        write(node, &original, "before")?;
        let used = || -> Result<f64> {
            Ok(node.run(["lvs", "--noheadings", "-o", "data_percent", "vg1/pool0"])?.trim().parse()?)
        };
        node.sh(&format!(
            "dd if=/dev/urandom of={}/bulk bs=1M count=100 conv=fsync status=none",
            original.directory()
        ))?;
        let full = used()?;
        ensure!(service.ask(&["snapshot", &volume(0xb30), &uid(0xb30)])?["id"] == snapshot.as_str());
        write(node, &original, "after")?;
        // Nothing is copied, and no lvm runs but what makes it.
        let ran = kinds(node, || {
            let made = make(&service, 0xb31, 480 * MIB, &[&thin[..], &["--snapshot", &snapshot]].concat())?;
            ensure!(made["bytes"] == 480 * MIB, "{made}");
            Ok(())
        })?;
        let changes: Vec<_> = ran.iter().filter(|kind| kind.starts_with("mutate")).collect();
        ensure!(changes == ["mutate: lvm lvcreate", "mutate: lvm lvextend", "mutate: lvm lvchange"], "{ran:?}");
        let restored = at(0xb31);
        restored.mount(node)?.success()?;
        holds(node, &restored, "before")?;
        ensure!(sees(node, &restored)? >= sees(node, &original)? + 120, "its file system has not grown");
        ensure!(make(&service, 0xb32, SIZE, &[&thin[..], &["--volume", &volume(0xb30)]].concat())?["bytes"] == SIZE);
        let cloned = at(0xb32);
        cloned.mount(node)?.success()?;
        holds(node, &cloned, "after")?;
        let shared = used()?;
        // A new UUID has each of the two write the log of its XFS anew (64 MiB), and no more than that.
        ensure!(shared < full + 20.0, "{full} percent became {shared}: the bytes were copied");
        let tags = node.sh(&format!("lvs --noheadings -o lv_tags {}", volume(0xb32)))?;
        ensure!(tags.contains(&format!("lvprov.io/from=thin:vg1/pvc-{}", uid(0xb30))), "{tags}");
        // Into a group without thin volumes it is copied.
        ensure!(make(&service, 0xb33, SIZE, &["--snapshot", &snapshot])?["bytes"] == SIZE);
        let copied = pod(0xb33, "xfs");
        copied.mount(node)?.success()?;
        holds(node, &copied, "before")?;
        for call in [&original, &restored, &cloned, &copied] {
            call.unmount(node)?.success()?;
        }
        // Each stands for itself: the original may go first, and grow before.
        ensure!(service.ask(&["expand", &volume(0xb30), &(400 * MIB).to_string()])?["bytes"] == 400 * MIB);
        ensure!(service.ask(&["delete", &volume(0xb30)])?["deleted"] == true);
        ensure!(make(&service, 0xb34, SIZE, &[&thin[..], &["--snapshot", &snapshot]].concat())?["bytes"] == SIZE);
        let late = at(0xb34);
        late.mount(node)?.success()?;
        holds(node, &late, "before")?;
        late.unmount(node)?.success()?;
        // What a pool has not promised cannot be had: 3 times 900 MiB, 480 + 320 + 320 + 320 are promised.
        let more = [&thin[..], &["--snapshot", &snapshot]].concat();
        let answer = make(&service, 0xb35, 1400 * MIB, &more)?;
        ensure!(answer["code"] == "ResourceExhausted", "{answer}");
        ensure!(service.ask(&["delete-snapshot", &snapshot])?["deleted"] == true);
        for number in [0xb31, 0xb32, 0xb34] {
            ensure!(service.ask(&["delete", &volume(number)])?["deleted"] == true);
        }
        ensure!(service.ask(&["delete", &id(0xb33)])?["deleted"] == true);
        ensure!(names(node, "vg1")? == ["pool0"], "{:?}", names(node, "vg1")?);
        Ok(())
    })
}

fn block(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    crate::block::make(&service, 0xb40)?;
    let device = format!("/dev/{}", id(0xb40));
    node.sh(&format!("dd if=/dev/urandom of={device} bs=1M count=100 seek=33 conv=fsync status=none"))?;
    let sum = |device: &str| node.sh(&format!("head -c {SIZE} {device} | sha256sum"));
    let was = sum(&device)?;
    service.ask(&["snapshot", &id(0xb40), &uid(0xb40)])?;
    node.sh(&format!("dd if=/dev/zero of={device} bs=1M count=200 conv=fsync status=none"))?;
    dirty(node)?;
    let from = ["--block", "--snapshot", &snapshot_id(0xb40)];
    ensure!(make(&service, 0xb41, 480 * MIB, &from)?["bytes"] == 480 * MIB);
    let copy = format!("/dev/{}", id(0xb41));
    ensure!(sum(&copy)? == was, "other bytes");
    ensure!(is_zero(node, &copy, 320)?, "old bytes show beyond the copy");
    // Neither mode is made from the other.
    let fs = ["create", &uid(0xb42), &SIZE.to_string(), "--snapshot", &snapshot_id(0xb40)];
    refused(&service, &fs, "InvalidArgument", &["is a raw device, and a file system was asked for"])?;
    for (call, id) in [("delete-snapshot", snapshot_id(0xb40)), ("delete", id(0xb40)), ("delete", id(0xb41))] {
        ensure!(service.ask(&[call, &id])?["deleted"] == true, "{id}");
    }
    Ok(())
}

fn kept(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    service.create(&uid(0xb50))?;
    let before = service.ask(&["snapshot", &id(0xb50), &uid(0xb50), "--size", "20%"])?;
    ensure!(before["ready"] == true, "{before}");
    let name = format!("snap-{}", uid(0xb50));
    refused(&service, &["delete", &id(0xb50)], "FailedPrecondition", &["has snapshots", &name])?;
    let more = (2048 * MIB).to_string();
    refused(&service, &["expand", &id(0xb50), &more], "FailedPrecondition", &["has snapshots", &name])?;
    // The driver's own way of growing.
    let call = pod(0xb50, "xfs");
    call.mount(node)?.success()?;
    call.expand(node, 2048 * MIB)?.failure(&["has snapshots", &name])?;
    call.unmount(node)?.success()?;
    ensure!(service.ask(&["delete-snapshot", &snapshot_id(0xb50)])?["deleted"] == true);
    ensure!(service.ask(&["expand", &id(0xb50), &more])?["bytes"] == 2048 * MIB);
    ensure!(service.ask(&["delete", &id(0xb50)])?["deleted"] == true);
    Ok(())
}

fn lost(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    create(node, "default", &uid(0xb60), "320m")?;
    let call = pod(0xb60, "ext4");
    call.mount(node)?.success()?;
    service.ask(&["snapshot", &id(0xb60), &uid(0xb60), "--size", "8Mi"])?;
    node.sh(&format!("dd if=/dev/urandom of={}/bulk bs=1M count=60 conv=fsync status=none", call.directory()))?;
    let listed = service.call(&["snapshots"])?;
    let one = listed.iter().find(|one| one["id"] == snapshot_id(0xb60)).context("not listed")?;
    ensure!(one["ready"] == false, "{one}");
    let restore = ["create", &uid(0xb61), &SIZE.to_string(), "--fs", "ext4", "--snapshot", &snapshot_id(0xb60)];
    refused(&service, &restore, "FailedPrecondition", &["is lost", "snapshotSize"])?;
    let found = service.call(&["diagnose"])?;
    let lost = found.iter().find(|one| one["id"] == "snapshot-invalid").context("the doctor says nothing")?;
    ensure!(lost["object"].as_str().is_some_and(|object| object.contains(&uid(0xb60))), "{lost}");
    // The volume itself is none the worse.
    node.sh(&format!("sync -f {0}/bulk && test $(stat -c %s {0}/bulk) = 62914560", call.directory()))?;
    call.unmount(node)?.success()?;
    ensure!(service.ask(&["delete-snapshot", &snapshot_id(0xb60)])?["deleted"] == true);
    ensure!(service.ask(&["delete", &id(0xb60)])?["deleted"] == true);
    Ok(())
}

fn unfit(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    create(node, "default", &uid(0xb70), "320m")?;
    let call = pod(0xb70, "xfs");
    call.mount(node)?.success()?;
    call.unmount(node)?.success()?;
    service.ask(&["snapshot", &id(0xb70), &uid(0xb70)])?;
    let before = names(node, "vg0")?;
    let (new, bytes, snapshot) = (uid(0xb71), SIZE.to_string(), snapshot_id(0xb70));
    let restore = |more: &[&str], code: &str, words: &[&str]| {
        refused(&service, &[&["create", &new, &bytes][..], more].concat(), code, words)
    };
    restore(&["--snapshot", &snapshot_id(0xb7f)], "NotFound", &["no snapshot"])?;
    restore(&["--snapshot", &snapshot.replace("n1/", "n2/")], "NotFound", &["no snapshot"])?;
    restore(&["--volume", &id(0xb7f)], "NotFound", &["no volume"])?;
    restore(&["--snapshot", &snapshot, "--fs", "ext4"], "InvalidArgument", &["has xfs, and the class asks for ext4"])?;
    restore(&["--volume", &id(0xb70), "--fs", "ext4"], "InvalidArgument", &["has xfs, and the class asks for ext4"])?;
    let smaller = ["create", &new, &(304 * MIB).to_string(), "--snapshot", &snapshot];
    refused(&service, &smaller, "OutOfRange", &["shows 320 MiB, and 304 MiB was asked for"])?;
    let huge = ["create", &new, &(200_u64 << 30).to_string(), "--volume", &id(0xb70)];
    refused(&service, &huge, "ResourceExhausted", &["are missing"])?;
    let other = ["snapshot", &id(0xb70), &uid(0xb72), "--size", "120%"];
    refused(&service, &other, "InvalidArgument", &["snapshotSize", "120%"])?;
    refused(&service, &["snapshot", &id(0xb7f), &uid(0xb72)], "NotFound", &["is not on this node"])?;
    // The same name for another volume.
    create(node, "default", &uid(0xb73), "320m")?;
    refused(&service, &["snapshot", &id(0xb73), &uid(0xb70)], "AlreadyExists", &["is there already"])?;
    ensure!(service.ask(&["delete", &id(0xb73)])?["deleted"] == true);
    ensure!(names(node, "vg0")? == before, "{before:?} became {:?}", names(node, "vg0")?);
    // A volume without tags of ours is none.
    node.sh("lvcreate -qq -y -n snap-0f0e7f0a-1111-4222-8333-000000000bff -L 4m vg0")?;
    refused(&service, &["delete-snapshot", &snapshot_id(0xbff)], "PermissionDenied", &["does not carry the tags"])?;
    node.run(["lvremove", "-qq", "-y", "vg0/snap-0f0e7f0a-1111-4222-8333-000000000bff"])?;
    ensure!(service.ask(&["delete-snapshot", &snapshot])?["deleted"] == true);
    ensure!(service.ask(&["delete", &id(0xb70)])?["deleted"] == true);
    Ok(())
}

/// Large enough that a copy is not done at once.
fn begun(service: &Service<'_>, node: &Node, number: u32, from: &[&str]) -> Result<()> {
    let bytes = (2048 * MIB).to_string();
    let uid = uid(number);
    let args = [&["create", &uid, &bytes][..], from, &["--patience-ms", "100"]].concat();
    let answer = service.ask(&args)?;
    ensure!(answer["code"].is_string(), "it was done at once: {answer}");
    let begun = Instant::now();
    while !node.exec(["test", "-e", &format!("/dev/{}", id(number))])?.success() {
        ensure!(begun.elapsed() < Duration::from_secs(30), "nothing is made");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// A volume of 2 GiB with a file and much that is not zero.
fn large(node: &Node, number: u32) -> Result<()> {
    create(node, "default", &uid(number), "2g")?;
    let call = pod(number, "xfs");
    call.mount(node)?.success()?;
    write(node, &call, "whole")?;
    node.sh(&format!("yes much | head -c 1200M > {}/bulk && sync -f {0}/bulk", call.directory()))?;
    call.unmount(node)?.success()
}

fn cut_off(node: &Node) -> Result<()> {
    large(node, 0xb80)?;
    let from = ["--volume".to_owned(), id(0xb80)];
    let from: Vec<&str> = from.iter().map(String::as_str).collect();
    {
        let service = Service::start(node)?;
        begun(&service, node, 0xb81, &from)?;
        // As long as it is under way, what it is copied from stays.
        let clone = format!("clone-{}", uid(0xb81));
        ensure!(names(node, "vg0")?.contains(&clone), "no snapshot to copy from");
        node.run(["kill", "-9", &service.pid()?])?;
    }
    let tags = node.sh(&format!("lvs --noheadings -o lv_tags {}", id(0xb81)))?;
    ensure!(tags.contains("wiping") && tags.contains("from=copy"), "{tags}");
    let service = Service::start(node)?;
    ensure!(make(&service, 0xb81, 2048 * MIB, &from)?["bytes"] == 2048 * MIB);
    let call = pod(0xb81, "xfs");
    call.mount(node)?.success()?;
    holds(node, &call, "whole")?;
    node.sh(&format!("yes much | head -c 1200M | cmp - {}/bulk", call.directory()))?;
    call.unmount(node)?.success()?;
    let left = names(node, "vg0")?;
    ensure!(!left.iter().any(|name| name.starts_with("clone-")), "{left:?}");
    for number in [0xb80, 0xb81] {
        ensure!(service.ask(&["delete", &id(number)])?["deleted"] == true);
    }
    Ok(())
}

fn given_up(node: &Node) -> Result<()> {
    large(node, 0xb90)?;
    let service = Service::start(node)?;
    let before = names(node, "vg0")?;
    begun(&service, node, 0xb91, &["--volume", &id(0xb90)])?;
    let answer = service.ask(&["delete", &id(0xb91)])?;
    ensure!(answer["deleted"] == true, "{answer}");
    ensure!(names(node, "vg0")? == before, "{before:?} became {:?}", names(node, "vg0")?);
    // A snapshot that is being copied stays until that is given up.
    service.ask(&["snapshot", &id(0xb90), &uid(0xb90)])?;
    begun(&service, node, 0xb92, &["--snapshot", &snapshot_id(0xb90)])?;
    let words = ["still being copied", &uid(0xb92)];
    refused(&service, &["delete-snapshot", &snapshot_id(0xb90)], "FailedPrecondition", &words)?;
    ensure!(service.ask(&["delete", &id(0xb92)])?["deleted"] == true);
    ensure!(service.ask(&["delete-snapshot", &snapshot_id(0xb90)])?["deleted"] == true);
    ensure!(service.ask(&["delete", &id(0xb90)])?["deleted"] == true);
    Ok(())
}

/// The service ended when the clone was whole and its snapshot still there, which then stayed.
fn left_by_a_clone(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    service.create(&uid(0xbc0))?;
    let from = ["--volume".to_owned(), id(0xbc0)];
    let from: Vec<&str> = from.iter().map(String::as_str).collect();
    ensure!(make(&service, 0xbc1, SIZE, &from)?["bytes"] == SIZE);
    let clone = format!("clone-{}", uid(0xbc1));
    let bring_back = || -> Result<()> {
        service.ask(&["snapshot", &id(0xbc0), &uid(0xbc1), "--size", "25%"])?;
        node.run(["lvrename", "-qq", "vg0", &format!("snap-{}", uid(0xbc1)), &clone])?;
        ensure!(names(node, "vg0")?.contains(&clone));
        Ok(())
    };
    bring_back()?;
    ensure!(make(&service, 0xbc1, SIZE, &from)?["bytes"] == SIZE);
    ensure!(!names(node, "vg0")?.contains(&clone), "the same call again leaves it");
    bring_back()?;
    ensure!(service.ask(&["delete", &id(0xbc1)])?["deleted"] == true);
    ensure!(!names(node, "vg0")?.contains(&clone), "it is left when the clone goes");
    ensure!(service.ask(&["delete", &id(0xbc0)])?["deleted"] == true);
    Ok(())
}

fn collected(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    service.create(&uid(0xba0))?;
    service.ask(&["snapshot", &id(0xba0), &uid(0xba1), "--size", "25%"])?;
    let all = service.call(&["inventory"])?;
    let name = format!("snap-{}", uid(0xba1));
    let one = all.iter().find(|item| item["lv"] == name.as_str()).context("not in the inventory")?;
    ensure!(one["kind"] == "snapshot" && one["source"] == uid(0xba0).as_str() && one["ofClone"] == false, "{one}");
    ensure!(
        one["lost"] == false && one["room"].as_u64().is_some_and(|room| (80 * MIB..90 * MIB).contains(&room)),
        "{one}"
    );
    let volume = service.call(&["collect", &format!("pvc-{}", uid(0xba0))])?;
    ensure!(volume.iter().any(|answer| answer.to_string().contains("has snapshots")), "{volume:?}");
    node.sh(&format!(": > {COMMANDS}"))?;
    let done = service.call(&["collect", &name])?;
    ensure!(done.iter().any(|answer| answer.to_string().contains("snapshot removed")), "{done:?}");
    ensure!(!names(node, "vg0")?.contains(&name));
    ensure!(service.ask(&["delete", &id(0xba0)])?["deleted"] == true);
    Ok(())
}
