//! Kinds of file systems, and how a class has them made.

use crate::{create, uid};
use anyhow::{Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::driver::Call;
use xtask::testbed::Node;

pub const TESTS: [Test<Node>; 4] = [
    ("filesystems::btrfs_works_as_the_others_do", btrfs),
    ("filesystems::a_btrfs_whose_mkfs_was_cut_off_is_made_again", cut_off),
    ("filesystems::mkfs_options_shape_what_is_made_and_nothing_else", options),
    ("filesystems::log_volumes_have_no_btrfs", logs),
];

fn claim(number: u32, pod_uid: &str) -> Call {
    Call::data("filesystems", "web-0", pod_uid, &uid(number))
}

fn btrfs(node: &Node) -> Result<()> {
    create(node, "filesystems", &uid(0xf1), "320m")?;
    let (first, second) = (claim(0xf1, "fs-1").fs("btrfs"), claim(0xf1, "fs-1b").fs("btrfs"));
    first.mount(node)?.success()?;
    // The same call again: what is mounted there is known by its device, which Btrfs does not tell as others do.
    first.mount(node)?.success()?;
    ensure!(node.run(["findmnt", "-n", "-o", "FSTYPE", &first.directory()])?.trim() == "btrfs");
    second.mount(node)?.success()?;
    node.sh(&format!("echo kept > {}/file && sync", first.directory()))?;
    ensure!(node.read_file(&format!("{}/file", second.directory()))? == "kept");
    second.unmount(node)?.success()?;
    ensure!(first.is_mounted(node)?);
    first.expand(node, 640 << 20)?.success()?;
    first.expand(node, 640 << 20)?.success()?;
    let blocks: u64 = node.run(["stat", "-f", "-c", "%b", &first.directory()])?.trim().parse()?;
    ensure!(blocks * 4096 == 640 << 20, "{blocks} blocks of 4 KiB after growing to 640 MiB");
    first.unmount(node)?.success()?;
    ensure!(!first.is_mounted(node)?);
    node.run(["lvchange", "-an", &format!("vg0/pvc-{}", uid(0xf1))])?;
    let reader = claim(0xf1, "fs-1c").fs("btrfs").with("kubernetes.io/readwrite", "ro");
    reader.mount(node)?.success()?;
    ensure!(node.read_file(&format!("{}/file", reader.directory()))? == "kept");
    ensure!(!node.exec(["touch", &format!("{}/x", reader.directory())])?.success());
    reader.unmount(node)?.success()?;
    claim(0xf1, "fs-1d").mount(node)?.failure(&["file system btrfs", "xfs was asked for"])
}

fn cut_off(node: &Node) -> Result<()> {
    create(node, "filesystems", &uid(0xf2), "320m")?;
    let call = claim(0xf2, "fs-2").fs("btrfs");
    call.mount(node)?.success()?;
    call.unmount(node)?.success()?;
    // The magic that mkfs.btrfs writes first, and replaces last.
    let device = format!("/dev/vg0/pvc-{}", uid(0xf2));
    node.sh(&format!("printf '!' | dd of={device} bs=1 seek=65600 conv=notrunc,fsync status=none"))?;
    call.mount(node)?.success()?;
    node.run(["touch", &format!("{}/file", call.directory())])?;
    call.unmount(node)?.success()
}

fn options(node: &Node) -> Result<()> {
    create(node, "filesystems", &uid(0xf3), "320m")?;
    let call = claim(0xf3, "fs-3");
    for (options, words) in [
        ("-l logdev=/dev/ubda", &["-l logdev", "not served for xfs"][..]),
        ("-i size=1k;reboot", &["-i size", "must be a number"]),
        ("-m 1", &["not served for xfs"]),
    ] {
        call.clone().with("mkfsOptions", options).mount(node)?.failure(words)?;
    }
    let xfs = call.with("mkfsOptions", "-i size=1024 -m reflink=0");
    xfs.mount(node)?.success()?;
    let info = node.run(["xfs_info", &xfs.directory()])?;
    ensure!(info.contains("isize=1024") && info.contains("reflink=0"), "{info}");
    xfs.unmount(node)?.success()?;
    // They count for a new file system; one that is there is mounted as it is.
    xfs.with("mkfsOptions", "-i size=512").mount(node)?.success()?;
    ensure!(node.run(["xfs_info", &claim(0xf3, "fs-3").directory()])?.contains("isize=1024"));
    claim(0xf3, "fs-3").unmount(node)?.success()?;

    create(node, "filesystems", &uid(0xf4), "64m")?;
    let ext4 = claim(0xf4, "fs-4").fs("ext4").with("mkfsOptions", "-E stride=16,stripe_width=64 -m 0");
    ext4.mount(node)?.success()?;
    let device = format!("/dev/vg0/pvc-{}", uid(0xf4));
    let info = node.run(["dumpe2fs", "-h", &device])?;
    for line in ["RAID stride:              16", "RAID stripe width:        64", "Reserved block count:     0"] {
        ensure!(info.contains(line), "{line:?} is not in {info}");
    }
    ext4.unmount(node)?.success()
}

fn logs(node: &Node) -> Result<()> {
    let call = Call::log("filesystems", "web-0", "fs-5", "logs").fs("btrfs");
    call.mount(node)?.failure(&["btrfs", "xfs or ext4", "quotas"])?;
    let tags = node.run(["lvs", "--noheadings", "-o", "lv_tags", "vg0"])?;
    ensure!(!tags.contains("log=filesystems/"), "a volume was made: {tags}");
    Ok(())
}
