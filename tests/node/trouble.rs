//! Disks that hang, lvm that is blocked, file systems that are damaged: an
//! answer in time, nothing half done, and the next call recovers.

use crate::service::Service;
use crate::{configure, configured, create, uid};
use anyhow::{Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::driver::{Answer, Call};
use xtask::testbed::Node;

pub const TESTS: [Test<Node>; 7] = [
    ("trouble::a_hung_disk_is_said_to_hang_and_comes_back", hung_disk),
    ("trouble::metrics_leave_out_a_disk_that_hangs", hung_metrics),
    ("trouble::a_blocked_lvm_is_left_to_finish", blocked_lvm),
    ("trouble::a_group_that_is_busy_is_waited_for_and_no_longer", busy_group),
    ("trouble::a_journal_is_replayed", journal),
    ("trouble::damage_is_repaired_only_where_the_policy_says_so", repair),
    ("trouble::a_disk_that_is_gone_can_be_unmounted", gone_disk),
];

/// A volume group `vgh` on a device that can be made to hang. Suspended from
/// below, it looks to the volumes on it like a disk that has stopped answering.
struct Hanging<'a>(&'a Node);

impl<'a> Hanging<'a> {
    fn new(node: &'a Node) -> Result<Self> {
        node.sh("lvcreate -qq -y -n below -L 3g vg0 && s=$(blockdev --getsz /dev/vg0/below) && \
             dmsetup create hanging --table \"0 $s linear /dev/vg0/below 0\" && dmsetup mknodes && \
             vgcreate -qq vgh /dev/mapper/hanging")?;
        Ok(Self(node))
    }

    fn hang(&self) -> Result<()> {
        self.0.run(["dmsetup", "suspend", "--noflush", "--nolockfs", "hanging"])?;
        Ok(())
    }

    fn go_on(&self) -> Result<()> {
        self.0.run(["dmsetup", "resume", "hanging"])?;
        Ok(())
    }

    /// Calls while the disk hangs; it goes on afterwards in any case.
    fn while_it_hangs(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.hang()?;
        configure(self.0, SHORT)?;
        let done = work();
        self.go_on()?;
        configure(self.0, OPEN)?;
        done
    }

    fn end(self) -> Result<()> {
        self.0.sh(
            "for m in $(findmnt -rn -o TARGET,SOURCE | awk '/vgh-/ {print $1}' | tac); do umount $m || exit 1; done; \
             vgremove -qq -ff -y vgh && dmsetup remove hanging && lvremove -qq -y vg0/below",
        )?;
        Ok(())
    }
}

/// The group is open to log volumes.
const OPEN: &str = r#""moreVolumeGroups":["vgh"]"#;
/// And the deadline is short: only for calls that are to miss it, since a busy
/// machine may need longer for those that are not.
const SHORT: &str = r#""moreVolumeGroups":["vgh"],"deadline":"6s""#;

fn hung(answer: Answer) -> Result<()> {
    answer.failure(&["has not answered", "hangs"])
}

fn hung_disk(node: &Node) -> Result<()> {
    let disk = Hanging::new(node)?;
    configured(node, OPEN, || {
        let log = Call::log("trouble", "web-a", "trouble-1", "hung").with("volumeGroup", "vgh");
        let second = Call::log("trouble", "web-b", "trouble-1b", "hung").with("volumeGroup", "vgh");
        let claim = uid(0x301);
        let data = Call::data("trouble", "db-0", "trouble-1c", &claim).with("volumeGroup", "vgh");
        create(node, "trouble", &claim, "320m")?;
        node.sh(&format!("vgs vgh > /dev/null; lvremove -qq -y vg0/pvc-{claim}"))?;
        node.sh(&format!(
            "lvcreate -qq -y -W y -Z y -n pvc-{claim} -L 320m --addtag lvprov.io/kind=data \
             --addtag lvprov.io/cluster=11111111-2222-4333-8444-555555555555 --addtag lvprov.io/claim-uid={claim} \
             --addtag lvprov.io/claim=trouble/data vgh && \
             dd if=/run/mark-{claim} of=/dev/vgh/pvc-{claim} bs=512 count=1 conv=notrunc,fsync status=none"
        ))?;
        log.mount(node)?.success()?;
        data.mount(node)?.success()?;
        disk.while_it_hangs(|| {
            // A further pod of a volume that is mounted, and the last mount of one.
            hung(second.mount(node)?)?;
            ensure!(!second.is_mounted(node)?);
            hung(data.unmount(node)?)?;
            ensure!(data.is_mounted(node)?);
            Ok(())
        })?;
        second.mount(node)?.success()?;
        data.unmount(node)?.success()?;
        // And a volume that is not mounted yet.
        disk.while_it_hangs(|| {
            hung(data.mount(node)?)?;
            ensure!(!data.is_mounted(node)?);
            // The directory of a log volume goes without a look at the disk: other mounts of it stay.
            second.unmount(node)?.success()
        })?;
        data.mount(node)?.success()?;
        for call in [&log, &data] {
            call.unmount(node)?.success()?;
        }
        Ok(())
    })?;
    disk.end()
}

fn hung_metrics(node: &Node) -> Result<()> {
    let disk = Hanging::new(node)?;
    configured(node, OPEN, || {
        let hangs = Call::log("trouble", "web-a", "trouble-m1", "hangs").with("volumeGroup", "vgh");
        let works = Call::log("trouble", "web-a", "trouble-m2", "works");
        hangs.mount(node)?.success()?;
        works.mount(node)?.success()?;
        let service = Service::start(node)?;
        let shows = |unreadable: &str, volumes: &[&str]| {
            let text = service.metrics("metrics")?.ok()?;
            let line = format!("lvprov_log_volumes_unreadable {unreadable}");
            ensure!(text.lines().any(|one| one == line), "not {line}:\n{text}");
            for volume in ["hangs", "works"] {
                let shown =
                    text.contains(&format!("lvprov_log_volume_used_bytes{{namespace=\"trouble\",volume=\"{volume}\""));
                ensure!(shown == volumes.contains(&volume), "{volume}:\n{text}");
            }
            Ok(())
        };
        shows("0", &["hangs", "works"])?;
        disk.while_it_hangs(|| shows("1", &["works"]))?;
        shows("0", &["hangs", "works"])?;
        hangs.unmount(node)?.success()?;
        works.unmount(node)?.success()
    })?;
    disk.end()
}

fn blocked_lvm(node: &Node) -> Result<()> {
    let disk = Hanging::new(node)?;
    configured(node, OPEN, || {
        let log = Call::log("trouble", "web-a", "trouble-2", "blocked").with("volumeGroup", "vgh");
        disk.while_it_hangs(|| log.mount(node)?.failure(&["still running", "left to finish"]))?;
        ensure!(!log.is_mounted(node)?);
        // Whatever that command made is found, or it is made now.
        let mut last = log.mount(node)?;
        for _ in 0..5 {
            if last.status != "Success" {
                last = log.mount(node)?;
            }
        }
        last.success()?;
        let volumes = node.sh("lvs --noheadings -o lv_name vgh | wc -l")?;
        ensure!(volumes.trim() == "1", "{volumes} volumes");
        log.unmount(node)?.success()
    })?;
    disk.end()
}

fn busy_group(node: &Node) -> Result<()> {
    let log = Call::log("trouble", "web-a", "trouble-3", "busy");
    configured(node, r#""deadline":"5s""#, || {
        node.sh(
            "mkdir -p /run/lvprov && (flock /run/lvprov/vg-vg0.lock sleep 300 > /dev/null 2>&1 & echo $! > /run/holder); \
             while flock -n /run/lvprov/vg-vg0.lock true; do sleep 0.1; done",
        )?;
        let answer = log.mount(node);
        node.sh("pkill -P $(cat /run/holder); while ! flock -n /run/lvprov/vg-vg0.lock true; do sleep 0.1; done")?;
        answer?.failure(&["volume group vg0 was busy"])
    })?;
    log.mount(node)?.success()?;
    log.unmount(node)?.success()
}

fn journal(node: &Node) -> Result<()> {
    let claim = uid(0x304);
    create(node, "trouble", &claim, "320m")?;
    let call = Call::data("trouble", "db-0", "trouble-4", &claim);
    call.mount(node)?.success()?;
    let directory = call.directory();
    node.sh(&format!("echo precious > {directory}/file && sync"))?;
    // As a power cut leaves it: the log is not empty, and nothing was unmounted in order.
    node.sh(&format!("echo more > {directory}/late; xfs_io -x -c 'shutdown -f' {directory}"))?;
    call.unmount(node)?.success()?;
    call.mount(node)?.success()?;
    ensure!(node.read_file(&format!("{directory}/file"))? == "precious");
    call.unmount(node)?.success()
}

fn repair(node: &Node) -> Result<()> {
    for (number, fs, at) in [(0x305, "xfs", 136), (0x306, "ext4", 2048 + 0x1c)] {
        let claim = uid(number);
        create(node, "trouble", &claim, "320m")?;
        let call = Call::data("trouble", "db-0", &format!("trouble-5-{fs}"), &claim).fs(fs);
        call.mount(node)?.success()?;
        node.sh(&format!("echo precious > {}/file", call.directory()))?;
        call.unmount(node)?.success()?;
        // A count in the superblock is wrong, or the checksum of a group (with blocks of 1 KiB).
        node.sh(&format!("printf ZZZZ | dd of=/dev/vg0/pvc-{claim} bs=1 seek={at} conv=notrunc,fsync status=none"))?;
        call.mount(node)?.failure(&["cannot mount", "damaged", "repair in /etc/lvprov/node.json"])?;
        ensure!(!call.is_mounted(node)?);
        configured(node, r#""repair":"safe""#, || call.mount(node)?.success())?;
        ensure!(node.read_file(&format!("{}/file", call.directory()))? == "precious");
        call.unmount(node)?.success()?;
    }
    Ok(())
}

/// Not hung but broken: every access is an error. A pod must still be able to go.
fn gone_disk(node: &Node) -> Result<()> {
    let claim = uid(0x307);
    create(node, "trouble", &claim, "320m")?;
    let call = Call::data("trouble", "db-0", "trouble-6", &claim);
    call.mount(node)?.success()?;
    let device = format!("vg0-pvc--{}", claim.replace('-', "--"));
    node.sh(&format!(
        "s=$(dmsetup table {device} | cut -d' ' -f2) && dmsetup table {device} > /run/table && \
         dmsetup suspend --noflush --nolockfs {device} && dmsetup reload {device} --table \"0 $s error\" && \
         dmsetup resume {device}"
    ))?;
    let answer = call.unmount(node);
    node.sh(&format!("dmsetup suspend {device} && dmsetup reload {device} /run/table && dmsetup resume {device}"))?;
    answer?.success()?;
    call.mount(node)?.success()?;
    call.unmount(node)?.success()
}
