//! Raw block volumes, on real LVM.

use crate::service::Service;
use crate::{create, uid};
use anyhow::{Context, Result, bail, ensure};
use lvprov_tests::Test;
use lvprov_tests::driver::Call;
use std::time::{Duration, Instant};
use xtask::testbed::Node;

pub const TESTS: [Test<Node>; 8] = [
    ("block::a_device_is_published_again_and_taken_away", published),
    ("block::a_new_device_shows_no_byte_of_an_earlier_tenant", no_old_bytes),
    ("block::a_device_that_grows_shows_none_either", grows),
    ("block::neither_mode_is_handed_out_as_the_other", modes),
    ("block::a_file_system_that_a_pod_made_is_never_mounted", crafted),
    ("block::a_published_device_is_not_removed", in_use),
    ("block::no_pod_gets_one_where_lvm_would_look_at_what_it_writes", scanned),
    ("block::an_overwriting_that_was_cut_off_goes_on", cut_off),
];

const SIZE: &str = "335544320";
const MIB: u64 = 1 << 20;

pub(crate) fn id(number: u32) -> String {
    format!("vg0/pvc-{}", uid(number))
}

fn target(name: &str) -> String {
    format!("/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices/publish/pv/{name}")
}

/// Makes one, and asks again as long as it is overwritten.
pub(crate) fn make(service: &Service<'_>, number: u32) -> Result<()> {
    let begun = Instant::now();
    loop {
        let answer = service.ask(&["create", &uid(number), SIZE, "--block"])?;
        if answer["code"] != "Aborted" {
            ensure!(answer["bytes"] == 320 * MIB, "{answer}");
            return Ok(());
        }
        ensure!(begun.elapsed() < Duration::from_secs(120), "{answer}");
    }
}

pub(crate) fn refused(service: &Service<'_>, args: &[&str], code: &str, words: &[&str]) -> Result<()> {
    let answer = service.ask(args)?;
    let message = answer["message"].as_str().unwrap_or("");
    ensure!(answer["code"] == code && words.iter().all(|word| message.contains(word)), "{args:?}: {answer}");
    Ok(())
}

/// Leaves something that is not zero in the extents that are given out next.
pub(crate) fn dirty(node: &Node) -> Result<()> {
    // Of 100 GiB the first are used first.
    node.sh(&lvprov_tests::dirty("1g")).map(drop)
}

/// Whether the device holds nothing but zeros from an offset on, in MiB.
pub(crate) fn is_zero(node: &Node, device: &str, from: u64) -> Result<bool> {
    let looked = node.exec([env!("CARGO_BIN_EXE_zeros"), device, &from.to_string()])?;
    match looked.status {
        0 => Ok(true),
        1 => Ok(false),
        _ => bail!("{looked:?}"),
    }
}

fn published(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    make(&service, 0x700)?;
    let (id, a) = (id(0x700), target("pod-a"));
    for _ in 0..2 {
        service.ask(&["publish", &id, &a, "--block"]).and_then(|answer| {
            ensure!(answer["published"] == true, "{answer}");
            Ok(())
        })?;
        ensure!(node.exec(["test", "-b", &a])?.success(), "no device at {a}");
    }
    let mounts = node.sh(&format!("grep -c ' {a} ' /proc/mounts"))?;
    ensure!(mounts.trim() == "1", "mounted {mounts} times");
    node.sh(&format!("echo mine | dd of={a} conv=fsync status=none"))?;
    let stats = service.ask(&["stats", &id, &a])?;
    ensure!(stats["usage"].as_array().is_some_and(|all| all.len() == 1), "{stats}");
    ensure!(stats["usage"][0]["total"] == 320 * MIB && stats["usage"][0]["unit"] == 1, "{stats}");
    refused(&service, &["stats", "vg0/pvc-0f0e7f0a-1111-4222-8333-00000000ffff", &a], "NotFound", &["not mounted"])?;
    refused(&service, &["stats", &id, &target("nobody")], "NotFound", &["not mounted"])?;
    // Of another namespace, for one pod alone, and upon what somebody needs.
    let other = ["publish", &id, &target("pod-b"), "--block", "--namespace", "other"];
    refused(&service, &other, "PermissionDenied", &["does not belong"])?;
    refused(
        &service,
        &["publish", &id, &target("pod-b"), "--block", "--alone"],
        "FailedPrecondition",
        &["one pod alone"],
    )?;
    node.sh(&format!("echo mine > {}", target("file")))?;
    refused(&service, &["publish", &id, &target("file"), "--block"], "Internal", &["something else"])?;
    ensure!(node.read_file(&target("file"))?.trim() == "mine");
    node.run(["rm", &target("file")])?;

    for _ in 0..2 {
        ensure!(service.ask(&["unpublish", &id, &a])?["unpublished"] == true);
        ensure!(!node.exec(["test", "-e", &a])?.success(), "{a} is still there");
    }
    // Read-only: the mount says so; a container's device is limited by kubelet.
    ensure!(service.ask(&["publish", &id, &a, "--block", "--readonly"])?["published"] == true);
    let options = node.sh(&format!("grep ' {a} ' /proc/self/mountinfo"))?;
    ensure!(options.split(' ').nth(5).is_some_and(|o| o.split(',').any(|word| word == "ro")), "{options}");
    ensure!(node.sh(&format!("head -c 4 {a}"))? == "mine");
    // Not active, as after a reboot of some hosts.
    service.ask(&["unpublish", &id, &a])?;
    node.run(["lvchange", "-an", &id])?;
    ensure!(service.ask(&["publish", &id, &a, "--block"])?["published"] == true);
    ensure!(node.sh(&format!("head -c 4 {a}"))? == "mine");
    service.ask(&["unpublish", &id, &a])?;
    ensure!(service.ask(&["delete", &id])?["deleted"] == true);
    Ok(())
}

fn no_old_bytes(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    dirty(node)?;
    // The extents are what the earlier tenant had: a volume made by hand shows it.
    node.sh("lvcreate -qq -y -Wn -Zn -n look -L 320m vg0")?;
    let dirty = !is_zero(node, "/dev/vg0/look", 0)?;
    node.run(["lvremove", "-qq", "-y", "vg0/look"])?;
    ensure!(dirty, "the test shows nothing: the extents are zeros");
    make(&service, 0x701)?;
    ensure!(is_zero(node, &format!("/dev/{}", id(0x701)), 0)?, "old bytes show");
    let tags = node.sh(&format!("lvs --noheadings -o lv_tags {}", id(0x701)))?;
    ensure!(tags.contains("lvprov.io/mode=block") && !tags.contains("wiping"), "{tags}");
    service.ask(&["delete", &id(0x701)])?;
    Ok(())
}

fn grows(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    make(&service, 0x702)?;
    let (id, a) = (id(0x702), target("grower"));
    dirty(node)?;
    service.ask(&["publish", &id, &a, "--block"])?;
    // Somebody has it open all the time, as a container does, by a node of its own.
    node.sh(&format!(
        "sh -c 'exec 7< /dev/{id}; while test -e {a}; do sleep 0.1; done' > /dev/null 2>&1 < /dev/null &"
    ))?;
    refused(&service, &["node-expand", &id, &a, "671088640"], "Unavailable", &["not 671088640"])?;
    let begun = Instant::now();
    while service.ask(&["expand", &id, "671088640"])?["bytes"] != 640 * MIB {
        ensure!(begun.elapsed() < Duration::from_secs(120), "it does not grow");
    }
    ensure!(service.ask(&["node-expand", &id, &a, "671088640"])?["bytes"] == 640 * MIB);
    ensure!(node.sh(&format!("blockdev --getsize64 {a}"))?.trim() == "671088640");
    ensure!(is_zero(node, &a, 320)?, "old bytes show in what it has grown by");
    ensure!(service.ask(&["stats", &id, &a])?["usage"][0]["total"] == 640 * MIB);
    let left = node.sh("lvs --noheadings -o lv_name vg0")?;
    ensure!(!left.contains("grow-"), "{left}");
    refused(&service, &["expand", &id, "1099511627776"], "ResourceExhausted", &["missing"])?;
    ensure!(service.ask(&["unpublish", &id, &a])?["unpublished"] == true);
    let begun = Instant::now();
    loop {
        let answer = service.ask(&["delete", &id])?;
        if answer["deleted"] == true {
            return Ok(());
        }
        ensure!(begun.elapsed() < Duration::from_secs(30), "it is not removed: {answer}");
    }
}

fn modes(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    make(&service, 0x703)?;
    refused(&service, &["create", &uid(0x703), SIZE], "AlreadyExists", &["raw block"])?;
    let directory = "/var/lib/kubelet/pods/u1/volumes/kubernetes.io~csi/pv/mount";
    refused(&service, &["publish", &id(0x703), directory], "FailedPrecondition", &["raw block"])?;
    create(node, "default", &uid(0x704), "320m")?;
    refused(&service, &["create", &uid(0x704), SIZE, "--block"], "AlreadyExists", &["file system"])?;
    refused(&service, &["publish", &id(0x704), &target("x"), "--block"], "FailedPrecondition", &["file system"])?;
    ensure!(!node.exec(["test", "-e", &target("x")])?.success());
    for number in [0x703, 0x704] {
        service.ask(&["delete", &id(number)])?;
    }
    Ok(())
}

/// A pod writes a superblock with just the UUID that its claim's file system
/// would have, and names the volume in inline options of its own.
fn crafted(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    make(&service, 0x705)?;
    let uuid = lvm::identity::data_uuid(&"default".parse()?, &uid(0x705).parse()?);
    node.sh(&format!("mkfs.xfs -q -m uuid={uuid} /dev/{}", id(0x705)))?;
    let call = Call::data("default", "web-0", "block-1", &uid(0x705));
    call.mount(node)?.failure(&["raw block"])?;
    ensure!(!node.read_file("/proc/mounts")?.contains("block-1"));
    service.ask(&["delete", &id(0x705)]).map(drop)
}

fn in_use(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    make(&service, 0x706)?;
    let (id, a) = (id(0x706), target("user"));
    service.ask(&["publish", &id, &a, "--block"])?;
    // Published, and opened by nobody.
    refused(&service, &["delete", &id], "FailedPrecondition", &["in use"])?;
    node.sh(&format!(
        "sh -c 'exec 7< /dev/{id}; exec sleep 600' > /dev/null 2>&1 < /dev/null & echo $! > /run/user.pid"
    ))?;
    node.sh("until ls -l /proc/$(cat /run/user.pid)/fd/7; do sleep 0.05; done")?;
    ensure!(service.ask(&["unpublish", &id, &a])?["unpublished"] == true);
    // Opened, and no longer published.
    refused(&service, &["delete", &id], "FailedPrecondition", &["in use"])?;
    node.sh("kill $(cat /run/user.pid); while test -d /proc/$(cat /run/user.pid); do sleep 0.05; done")?;
    ensure!(service.ask(&["delete", &id])?["deleted"] == true);
    Ok(())
}

fn scanned(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    make(&service, 0x708)?;
    node.sh(r#"cp /etc/lvm/lvm.conf /run/lvm.conf && sed -i 's#"r|^/dev/loop|", ##' /etc/lvm/lvm.conf"#)?;
    let refused =
        refused(&service, &["publish", &id(0x708), &target("x"), "--block"], "FailedPrecondition", &["global_filter"]);
    node.run(["cp", "/run/lvm.conf", "/etc/lvm/lvm.conf"])?;
    refused?;
    ensure!(service.ask(&["publish", &id(0x708), &target("x"), "--block"])?["published"] == true);
    // As kubelet does, with what a pod might write: a group of the node's own name.
    node.sh(&format!(
        "losetup -f {} && loop=$(losetup -a | head -1 | cut -d: -f1) && cp /etc/lvm/lvm.conf /run/lvm.conf &&
         sed -i 's#\"r|^/dev/loop|\", ##' /etc/lvm/lvm.conf && pvcreate -qq -y $loop; cp /run/lvm.conf /etc/lvm/lvm.conf",
        target("x")
    ))?;
    let seen = node.sh("pvs --noheadings -o pv_name")?;
    ensure!(!seen.contains("loop"), "{seen}");
    refused_in_use(&service)?;
    node.sh("losetup -D; while losetup -a | grep -q .; do sleep 0.1; done")?;
    service.ask(&["unpublish", &id(0x708), &target("x")])?;
    ensure!(service.ask(&["delete", &id(0x708)])?["deleted"] == true);
    Ok(())
}

fn refused_in_use(service: &Service<'_>) -> Result<()> {
    refused(service, &["delete", &id(0x708)], "FailedPrecondition", &["in use"])
}

fn cut_off(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    dirty(node)?;
    // As a node service leaves it that is killed right after lvcreate.
    let uid = uid(0x707);
    node.sh(&format!(
        "lvcreate -qq -y -Wy -Zy -n pvc-{uid} -L 320m --addtag lvprov.io/kind=data \
         --addtag lvprov.io/cluster=11111111-2222-4333-8444-555555555555 --addtag lvprov.io/claim-uid={uid} \
         --addtag lvprov.io/claim=default/data --addtag lvprov.io/mode=block --addtag lvprov.io/wiping vg0"
    ))?;
    refused(&service, &["publish", &id(0x707), &target("x"), "--block"], "Unavailable", &["zeros"])?;
    make(&service, 0x707)?;
    ensure!(is_zero(node, &format!("/dev/{}", id(0x707)), 0)?, "old bytes show");
    let wipes = node.sh("ls /run/lvprov/wipes 2>/dev/null || true").context("wipes")?;
    ensure!(wipes.trim().is_empty(), "left: {wipes}");
    service.ask(&["delete", &id(0x707)]).map(drop)
}
