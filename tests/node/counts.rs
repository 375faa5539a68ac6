//! How little the driver does: counts that cannot flake.

use crate::service::Service;
use crate::{create, kinds, uid};
use anyhow::{Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::driver::Call;
use xtask::testbed::Node;

pub const TESTS: [Test<Node>; 4] = [
    ("counts::first_mount_of_what_was_made_here_asks_no_lvm", first_mount_here),
    ("counts::first_mount_of_a_data_volume_is_one_report_and_mkfs", first_mount),
    ("counts::mount_of_a_ready_volume_starts_no_process", ready_mount),
    ("counts::second_pod_of_a_log_volume_starts_no_process", second_log),
];

fn first_mount(node: &Node) -> Result<()> {
    create(node, "counts", &uid(0x100), "320m")?;
    let call = Call::data("counts", "web-0", "counts-1", &uid(0x100));
    let ran = kinds(node, || call.mount(node)?.success())?;
    // Its mark, which is this test's, does not say that LVM has wiped it.
    ensure!(ran == ["report: lvm lvs", "tool: blkid", "tool: mkfs.xfs"], "{ran:?}");
    call.unmount(node)?.success()
}

/// The node service has noted that it made the volume, and marked it as wiped.
fn first_mount_here(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    service.create(&uid(0x103))?;
    let call = Call::data("default", "web-0", "counts-3", &uid(0x103));
    let mut ran = kinds(node, || call.mount(node)?.success())?;
    // The node service's own, since its group has changed.
    ran.retain(|kind| kind != "report: lvm vgs");
    ensure!(ran == ["tool: mkfs.xfs"], "{ran:?}");
    call.unmount(node)?.success()?;
    // Of another claim, or another namespace, it is asked as ever, and refused.
    let thief = Call::data("other", "web-0", "counts-3-thief", &uid(0x103));
    thief.mount(node)?.failure(&["does not belong"])?;
    ensure!(service.delete(&uid(0x103))?["deleted"] == true);
    // The note goes with the volume.
    let notes = node.sh("ls /run/lvprov/filesystems | wc -l")?;
    service.create(&uid(0x104))?;
    ensure!(service.delete(&uid(0x104))?["deleted"] == true);
    let after = node.sh("ls /run/lvprov/filesystems | wc -l")?;
    ensure!(notes == after, "{notes} notes became {after}");
    Ok(())
}

/// The kernel's own count of forks since it booted: what the driver says of
/// itself is not asked.
fn forks_of(node: &Node, script: &str) -> Result<u64> {
    // `read` is a builtin: between the two looks only what the script runs is forked.
    let probe = format!(
        "forks() {{ while read -r key value; do case $key in processes) forks=$value;; esac; done < /proc/stat; }}\n\
         forks; before=$forks\n{script}\nforks; echo $((forks - before))"
    );
    let mut least = u64::MAX;
    for _ in 0..5 {
        let out = node.sh(&probe)?;
        least = least.min(out.lines().last().unwrap_or("").parse()?);
    }
    Ok(least)
}

fn ready_mount(node: &Node) -> Result<()> {
    create(node, "counts", &uid(0x101), "320m")?;
    let call = Call::data("counts", "web-0", "counts-2", &uid(0x101));
    call.mount(node)?.success()?;
    call.unmount(node)?.success()?;
    let ran = kinds(node, || {
        call.mount(node)?.success()?;
        call.unmount(node)?.success()
    })?;
    ensure!(ran.is_empty(), "{ran:?}");
    let directory = call.directory();
    let script = format!(
        "lvprov-flexvolume mount {directory} '{}' > /dev/null\nlvprov-flexvolume unmount {directory} > /dev/null",
        call.json()
    );
    // The driver itself, twice; a kernel thread of the mount may add to it. The
    // same two calls without a driver tell how many.
    let with_driver = forks_of(node, &script)?;
    let device = format!("/dev/vg0/pvc-{}", uid(0x101));
    let bare = forks_of(node, &format!("mount {device} {directory}\numount {directory}"))?;
    ensure!(with_driver == bare, "driver: {with_driver} forks, mount(8) and umount(8): {bare}");
    Ok(())
}

fn second_log(node: &Node) -> Result<()> {
    let first = Call::log("counts", "web-a", "counts-3", "web-logs");
    let ran = kinds(node, || first.mount(node)?.success())?;
    let expected = [
        "report: lvm lvs",
        "mutate: lvm lvcreate",
        "tool: wipefs",
        "tool: blkid",
        "tool: mkfs.xfs",
        "mutate: lvm lvchange",
    ];
    ensure!(ran == expected, "{ran:?}");
    let second = Call::log("counts", "web-b", "counts-4", "web-logs");
    let ran = kinds(node, || {
        second.mount(node)?.success()?;
        second.unmount(node)?.success()
    })?;
    ensure!(ran.is_empty(), "{ran:?}");
    first.unmount(node)?.success()
}
