//! Data volumes: mounted, kept, grown, and never given to the wrong one.

use crate::service::Service;
use crate::{create, lose_superblock, uid};
use anyhow::{Context, Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::driver::{Call, call};
use xtask::testbed::Node;

pub const TESTS: [Test<Node>; 16] = [
    ("data::init_says_what_the_driver_can_do", init),
    ("data::files_stay_over_unmount_and_deactivation", files_stay),
    ("data::ext4_works_as_xfs_does", ext4),
    ("data::two_pods_of_one_claim_share_it_for_a_moment", two_pods),
    ("data::a_volume_for_one_pod_is_given_to_no_second_one", one_pod),
    ("data::read_only_is_read_only_also_beside_a_writer", read_only),
    ("data::a_pod_of_another_namespace_gets_nothing", other_namespace),
    ("data::a_foreign_file_system_is_neither_mounted_nor_formatted", foreign),
    ("data::a_file_system_other_than_asked_is_left_alone", other_fs),
    ("data::a_volume_that_is_gone_is_said_to_be_gone", gone),
    ("data::growth_is_online_repeatable_and_bounded", growth),
    ("data::an_interrupted_mkfs_is_done_again", interrupted_mkfs),
    ("data::an_mkfs_that_left_neither_mark_nor_superblock_is_done_again", mkfs_left_nothing),
    ("data::a_used_volume_without_its_superblock_is_not_formatted", lost_superblock),
    ("data::a_suspended_device_is_said_to_be_suspended", suspended),
    ("data::a_kubelet_root_behind_a_link_is_unmounted_too", linked_root),
];

fn init(node: &Node) -> Result<()> {
    let answer = call(node, &["init"])?;
    let expected = serde_json::json!({
        "attach": false, "fsGroup": true, "requiresFSResize": true, "selinuxRelabel": true, "supportsMetrics": true
    });
    ensure!(answer.json["capabilities"] == expected, "{}", answer.json);
    for verb in ["attach", "detach", "getvolumename", "waitforattach", "mountdevice", "expandvolume", "x"] {
        ensure!(call(node, &[verb, "{}"])?.status == "Not supported", "{verb}");
    }
    Ok(())
}

fn files_stay(node: &Node) -> Result<()> {
    create(node, "data", &uid(1), "320m")?;
    let first = Call::data("data", "web-0", "data-1", &uid(1)).with("mountOptions", "noatime");
    first.mount(node)?.success()?;
    // The same call again, as after a kubelet restart.
    first.mount(node)?.success()?;
    node.sh(&format!("echo kept > {}/file", first.directory()))?;
    let options = node.run(["findmnt", "-n", "-o", "OPTIONS", &first.directory()])?;
    ensure!(options.contains("noatime"), "{options}");
    first.unmount(node)?.success()?;
    first.unmount(node)?.success()?;
    node.run(["rmdir", &first.directory()])?;
    node.run(["lvchange", "-an", &format!("vg0/pvc-{}", uid(1))])?;
    let again = Call::data("data", "web-0", "data-1b", &uid(1));
    again.mount(node)?.success()?;
    ensure!(node.read_file(&format!("{}/file", again.directory()))? == "kept");
    again.unmount(node)?.success()
}

fn ext4(node: &Node) -> Result<()> {
    create(node, "data", &uid(2), "64m")?;
    let call = Call::data("data", "web-0", "data-2", &uid(2)).fs("ext4");
    call.mount(node)?.success()?;
    let fs = node.run(["findmnt", "-n", "-o", "FSTYPE", &call.directory()])?;
    ensure!(fs == "ext4", "{fs}");
    call.expand(node, 128 << 20)?.success()?;
    let size: u64 = node.run(["stat", "-f", "-c", "%b", &call.directory()])?.parse()?;
    ensure!(size > 90 << 10, "{size} blocks of 1 KiB after growing to 128 MiB");
    call.unmount(node)?.success()
}

/// A StatefulSet's pod made again is mounted under its new UID before or after
/// the old one is unmounted.
fn two_pods(node: &Node) -> Result<()> {
    create(node, "data", &uid(3), "320m")?;
    let old = Call::data("data", "web-0", "data-3", &uid(3));
    let new = Call::data("data", "web-0", "data-3b", &uid(3));
    old.mount(node)?.success()?;
    new.mount(node)?.success()?;
    node.sh(&format!("echo seen > {}/file", old.directory()))?;
    ensure!(node.read_file(&format!("{}/file", new.directory()))? == "seen");
    old.unmount(node)?.success()?;
    ensure!(new.is_mounted(node)?);
    new.unmount(node)?.success()
}

fn one_pod(node: &Node) -> Result<()> {
    create(node, "data", &uid(30), "320m")?;
    let pod = |uid_of_pod: &str| Call::data("data", "web-0", uid_of_pod, &uid(30)).with("onePod", "true");
    let (first, second) = (pod("data-30"), pod("data-30b"));
    first.mount(node)?.success()?;
    // The same call again, as after a kubelet restart.
    first.mount(node)?.success()?;
    second.mount(node)?.failure(&["ReadWriteOncePod", &first.directory(), "when that one has ended"])?;
    ensure!(!second.is_mounted(node)?, "the refused pod has it");
    first.unmount(node)?.success()?;
    second.mount(node)?.success()?;
    first.mount(node)?.failure(&["ReadWriteOncePod"])?;
    second.unmount(node)?.success()?;
    first.with("onePod", "yes").mount(node)?.failure(&["onePod", "true or false"])
}

fn read_only(node: &Node) -> Result<()> {
    create(node, "data", &uid(4), "320m")?;
    let writer = Call::data("data", "web-0", "data-4", &uid(4));
    let reader = Call::data("data", "job", "data-4b", &uid(4)).with("kubernetes.io/readwrite", "ro");
    writer.mount(node)?.success()?;
    reader.mount(node)?.success()?;
    ensure!(!node.exec(["touch", &format!("{}/x", reader.directory())])?.success());
    node.run(["touch", &format!("{}/x", writer.directory())])?;
    writer.unmount(node)?.success()?;
    reader.unmount(node)?.success()?;
    reader.mount(node)?.success()?;
    ensure!(!node.exec(["touch", &format!("{}/y", reader.directory())])?.success());
    reader.unmount(node)?.success()
}

/// A pod can name any volume in its inline options; only the namespace that
/// kubelet tells counts.
fn other_namespace(node: &Node) -> Result<()> {
    create(node, "data", &uid(5), "320m")?;
    let thief = Call::data("other", "web-0", "data-5", &uid(5));
    thief.mount(node)?.failure(&["does not belong", "other"])?;
    let owner = Call::data("data", "web-0", "data-5b", &uid(5));
    owner.mount(node)?.success()?;
    thief.mount(node)?.failure(&["does not belong", "other"])?;
    ensure!(!thief.is_mounted(node)?);
    owner.unmount(node)?.success()
}

/// Another tenant's signature that an interrupted lvcreate did not wipe.
fn foreign(node: &Node) -> Result<()> {
    create(node, "data", &uid(6), "320m")?;
    let device = format!("/dev/vg0/pvc-{}", uid(6));
    node.run(["mkfs.xfs", "-q", "-f", &device])?;
    let before = node.run(["blkid", "-p", "-o", "export", &device])?;
    let call = Call::data("data", "web-0", "data-6", &uid(6));
    call.mount(node)?.failure(&["does not belong"])?;
    ensure!(!call.is_mounted(node)?);
    ensure!(before == node.run(["blkid", "-p", "-o", "export", &device])?);
    // One that nobody mounts.
    node.run(["wipefs", "-qa", &device])?;
    node.run(["mkswap", "-q", &device])?;
    call.mount(node)?.failure(&["swap", "not formatted"])?;
    ensure!(!call.is_mounted(node)?);
    // One that leaves the mark of the node service where it is, which says that the volume was wiped.
    let service = Service::start(node)?;
    service.create(&uid(0x2f0))?;
    let device = format!("/dev/vg0/pvc-{}", uid(0x2f0));
    let call = Call::data("default", "web-0", "data-2f0", &uid(0x2f0));
    node.sh(&format!("truncate -s 1m /run/swap && mkswap -q /run/swap && dd if=/run/swap of={device} bs=512 skip=1 seek=1 count=7 conv=fsync status=none"))?;
    call.mount(node)?.failure(&["swap", "not formatted"])?;
    ensure!(!call.is_mounted(node)?);
    Ok(())
}

fn other_fs(node: &Node) -> Result<()> {
    create(node, "data", &uid(7), "320m")?;
    let call = Call::data("data", "web-0", "data-7", &uid(7));
    call.mount(node)?.success()?;
    call.unmount(node)?.success()?;
    call.clone().fs("ext4").mount(node)?.failure(&["file system xfs", "ext4 was asked for"])?;
    call.fs("zfs").mount(node)?.failure(&["zfs", "xfs, ext4 or btrfs"])
}

fn gone(node: &Node) -> Result<()> {
    let call = Call::data("data", "web-0", "data-8", &uid(8));
    call.mount(node)?.failure(&["is not on this node"])?;
    call.clone().with("volumeGroup", "nosuch").mount(node)?.failure(&["nosuch", "not found"])?;
    ensure!(!call.is_mounted(node)?);
    Ok(())
}

fn growth(node: &Node) -> Result<()> {
    create(node, "data", &uid(9), "320m")?;
    let call = Call::data("data", "web-0", "data-9", &uid(9));
    call.expand(node, 400 << 20)?.failure(&["not mounted"])?;
    call.mount(node)?.success()?;
    let size = || -> Result<u64> {
        let lv = format!("vg0/pvc-{}", uid(9));
        Ok(node.run(["lvs", "--noheadings", "--units", "b", "--nosuffix", "-o", "lv_size", &lv])?.trim().parse()?)
    };
    // Not a multiple of the extent size: rounded up.
    call.expand(node, (400 << 20) + 1)?.success()?;
    ensure!(size()? == 404 << 20, "{}", size()?);
    call.expand(node, (400 << 20) + 1)?.success()?;
    call.expand(node, 1)?.success()?;
    ensure!(size()? == 404 << 20, "{}", size()?);
    let blocks: u64 = node.run(["stat", "-f", "-c", "%b", &call.directory()])?.parse()?;
    ensure!(blocks * 4096 > 330 << 20, "{blocks} blocks");
    call.expand(node, 1 << 40)?.failure(&["vg0", "free", "missing"])?;
    ensure!(size()? == 404 << 20, "{}", size()?);
    node.run(["touch", &format!("{}/still-writable", call.directory())])?;
    call.unmount(node)?.success()
}

fn interrupted_mkfs(node: &Node) -> Result<()> {
    create(node, "data", &uid(10), "320m")?;
    let call = Call::data("data", "web-0", "data-10", &uid(10));
    call.mount(node)?.success()?;
    call.unmount(node)?.success()?;
    // sb_inprogress, as mkfs.xfs leaves it when the power goes.
    let device = format!("/dev/vg0/pvc-{}", uid(10));
    node.sh(&format!("printf '\\001' | dd of={device} bs=1 seek=126 conv=notrunc,fsync status=none"))?;
    call.mount(node)?.success()?;
    node.run(["touch", &format!("{}/file", call.directory())])?;
    call.unmount(node)?.success()
}

/// mke2fs overwrites the mark first, and writes the superblock last.
fn mkfs_left_nothing(node: &Node) -> Result<()> {
    create(node, "data", &uid(14), "64m")?;
    let device = format!("/dev/vg0/pvc-{}", uid(14));
    let call = Call::data("data", "web-0", "data-14", &uid(14)).fs("ext4");
    let mke2fs = node.sh("readlink -f $(command -v mkfs.ext4)")?;
    let mke2fs = mke2fs.trim();
    // The real one, of whose work all is there but the last write.
    node.write_file(
        "/run/mke2fs",
        format!(
            "#!/bin/sh\n/run/mkfs/mkfs.ext4 \"$@\" || exit\n\
             dd if=/dev/zero of={device} bs=4096 count=1 conv=notrunc,fsync status=none\nexit 1\n"
        ),
    )?;
    node.sh(&format!(
        "mkdir -p /run/mkfs && cp {mke2fs} /run/mkfs/mkfs.ext4 && chmod +x /run/mke2fs && mount --bind /run/mke2fs {mke2fs}"
    ))?;
    let answer = call.mount(node);
    node.sh(&format!("umount {mke2fs}"))?;
    answer?.failure(&["mkfs.ext4", "exit status: 1"]).context("mkfs was cut off")?;
    ensure!(!call.is_mounted(node)?);
    ensure!(node.sh("ls /var/lib/lvprov/mkfs")?.trim().starts_with("LVM-"), "it is not noted");

    call.mount(node)?.success()?;
    ensure!(node.sh("ls /var/lib/lvprov/mkfs")?.trim().is_empty(), "it is still noted");
    node.run(["touch", &format!("{}/file", call.directory())])?;
    call.unmount(node)?.success()?;
    // From now on it is one in use.
    lose_superblock(node, &device)?;
    call.mount(node)?.failure(&["superblock may be damaged", "Nothing is formatted", "e2fsck"])
}

/// With its first superblock gone a volume looks blank to blkid; its data can
/// still be had from the other superblocks.
fn lost_superblock(node: &Node) -> Result<()> {
    create(node, "data", &uid(11), "320m")?;
    let call = Call::data("data", "web-0", "data-11", &uid(11));
    call.mount(node)?.success()?;
    node.sh(&format!("echo precious > {}/file && sync", call.directory()))?;
    call.unmount(node)?.success()?;
    let device = format!("/dev/vg0/pvc-{}", uid(11));
    lose_superblock(node, &device)?;
    call.mount(node)?.failure(&["superblock may be damaged", "Nothing is formatted", "xfs_repair"])?;
    ensure!(!call.is_mounted(node)?);
    node.exec(["xfs_repair", &device])?;
    call.mount(node)?.success()?;
    ensure!(node.read_file(&format!("{}/file", call.directory()))? == "precious");
    call.unmount(node)?.success()
}

fn suspended(node: &Node) -> Result<()> {
    create(node, "data", &uid(12), "320m")?;
    let call = Call::data("data", "web-0", "data-12", &uid(12));
    call.mount(node)?.success()?;
    call.unmount(node)?.success()?;
    let name = format!("vg0-pvc--{}", uid(12).replace('-', "--"));
    node.run(["dmsetup", "suspend", &name])?;
    let answer = call.mount(node);
    node.run(["dmsetup", "resume", &name])?;
    answer?.failure(&["suspended", "dmsetup resume"])?;
    call.mount(node)?.success()?;
    call.unmount(node)?.success()
}

fn linked_root(node: &Node) -> Result<()> {
    create(node, "data", &uid(13), "320m")?;
    let call = Call::data("data", "web-0", "data-13", &uid(13));
    let linked = call.directory().replace("/var/lib/kubelet", "/run/kubelet-link");
    node.sh(&format!("mkdir -p {} && ln -s /var/lib/kubelet /run/kubelet-link", call.directory()))?;
    lvprov_tests::driver::call(node, &["mount", &linked, &call.json()])?.success()?;
    ensure!(call.is_mounted(node)?);
    lvprov_tests::driver::call(node, &["expandfs", &call.json(), "", &linked, "400000000", "0"])?.success()?;
    lvprov_tests::driver::call(node, &["unmount", &linked])?.success()?;
    ensure!(!call.is_mounted(node)?);
    Ok(())
}
