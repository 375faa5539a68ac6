//! `lvprov doctor`: it is silent where nothing is wrong, and tells of each thing
//! that is.

use crate::COMMANDS;
use crate::service::Service;
use anyhow::{Result, ensure};
use lvprov_tests::Test;
use serde_json::Value;
use xtask::testbed::{Node, NodeOptions};

pub const TESTS: [Test<Node>; 3] = [
    ("doctor::what_is_wrong_with_volumes_and_disks_is_told", volumes_and_disks),
    ("doctor::settings_of_lvm_that_hurt_are_told", settings),
    ("doctor::the_node_service_tells_the_same_and_counts_it", through_the_service),
];

/// The exit status, and each finding as `<severity> <id> <object>`.
fn doctor(node: &Node, options: &str) -> Result<(i32, Vec<String>)> {
    let output = node.exec(["sh", "-c", &format!("lvprov doctor --json {options}")])?;
    let report: Value = serde_json::from_str(&output.stdout)?;
    ensure!(report["schema"] == "lvprov.io/doctor/v1", "{report}");
    let findings = report["nodes"][0]["findings"].as_array().cloned().unwrap_or_default();
    Ok((output.status, findings.iter().map(shown).collect()))
}

fn shown(finding: &Value) -> String {
    let text = |key: &str| finding[key].as_str().unwrap_or("?").to_owned();
    format!("{} {} {}", text("severity"), text("id"), text("object"))
}

/// A node that other tests leave nothing on.
fn own_node() -> Result<Node> {
    let node =
        Node::boot_with(NodeOptions { disks_gib: vec![20, 2, 2], volume_groups: false, ..NodeOptions::default() })?;
    node.sh("vgcreate -qq -y vg0 /dev/ubdb")?;
    crate::configure(&node, "")?;
    Ok(node)
}

fn tells(node: &Node, options: &str, status: i32, wanted: &[&str]) -> Result<()> {
    let (is, found) = doctor(node, options)?;
    ensure!(found == wanted && is == status, "status {is}: {found:#?}");
    Ok(())
}

fn volumes_and_disks(_: &Node) -> Result<()> {
    let node = own_node()?;
    let ran = crate::kinds(&node, || tells(&node, "", 0, &[]))?;
    ensure!(ran == ["report: lvm lvmconfig", "report: lvm fullreport"], "{ran:?}");
    ensure!(node.sh("lvprov doctor")?.contains("0 errors, 0 warnings"));

    // As an lvm command leaves it that is killed half way.
    node.sh("lvcreate -qq -y -n b -L 320m vg0 && dmsetup suspend vg0-b")?;
    tells(&node, "", 2, &["error device-suspended logical volume vg0/b"])?;
    node.sh(
        "dmsetup resume vg0-b && dmsetup clear vg0-b && dmsetup remove vg0-b && dmsetup create -u $(lvs --noheadings \
             -o lv_uuid,vg_uuid vg0/b | awk '{gsub(\"-\",\"\"); print \"LVM-\" $2 $1}') --notable vg0-b",
    )?;
    tells(&node, "", 2, &["error volume-half-made logical volume vg0/b"])?;
    node.sh("dmsetup remove vg0-b; lvchange -qq -ay vg0/b && mv /dev/mapper/vg0-b /dev/mapper/elsewhere")?;
    tells(&node, "", 2, &["error device-node-missing logical volume vg0/b"])?;
    node.sh("mv /dev/mapper/elsewhere /dev/mapper/vg0-b && mkfs.ext4 -q /dev/vg0/b && mkdir -p /tmp/b")?;

    // The kernel takes writing away after an error; the mount itself still says rw.
    node.sh("mount -o errors=remount-ro /dev/vg0/b /tmp/b && echo 1 > /sys/fs/ext4/dm-$((0x$(stat -L -c %T /dev/vg0/b)))/trigger_fs_error")?;
    let (status, found) = doctor(&node, "")?;
    let told = ["error volume-errors logical volume vg0/b", "error volume-read-only logical volume vg0/b"];
    ensure!(status == 2 && found.len() == 1 && told.contains(&found[0].as_str()), "{found:?}");
    node.sh("umount /tmp/b && mkfs.xfs -q -f /dev/vg0/b && mount /dev/vg0/b /tmp/b && xfs_io -x -c shutdown /tmp/b")?;
    tells(&node, "", 2, &["error volume-shut-down logical volume vg0/b"])?;
    node.sh("umount /tmp/b && mkfs.ext4 -q -F /dev/vg0/b && mount -o ro /dev/vg0/b /tmp/b")?;
    tells(&node, "", 0, &[])?;

    // Only a namespace that nobody knows of has it.
    node.sh("unshare -m --propagation private sh -c 'echo $$ > /run/other.pid; exec sleep 600' > /dev/null 2>&1 < /dev/null &
             while ! test -s /run/other.pid || ! grep -q sleep /proc/$(cat /run/other.pid)/comm; do sleep 0.05; done; umount /tmp/b")?;
    tells(&node, "", 1, &["warning volume-mounted-elsewhere logical volume vg0/b"])?;
    node.sh("kill $(cat /run/other.pid); while test -d /proc/$(cat /run/other.pid); do sleep 0.05; done; lvremove -qq -y vg0/b")?;

    // A pool that its volumes may fill.
    node.sh(
        "lvcreate -qq -y -T -L 64m vg0/pool 2> /dev/null && lvcreate -qq -y -T -V 128m -n thin vg0/pool 2> /dev/null",
    )?;
    tells(&node, "", 1, &["warning thin-pool-not-extended thin pool vg0/pool"])?;
    node.sh("dd if=/dev/urandom of=/dev/vg0/thin bs=1M count=54 oflag=direct status=none")?;
    tells(
        &node,
        "",
        1,
        &["warning thin-pool-data thin pool vg0/pool", "warning thin-pool-not-extended thin pool vg0/pool"],
    )?;
    node.sh("dd if=/dev/urandom of=/dev/vg0/thin bs=1M count=62 oflag=direct status=none")?;
    tells(
        &node,
        "",
        2,
        &["error thin-pool-data thin pool vg0/pool", "warning thin-pool-not-extended thin pool vg0/pool"],
    )?;
    node.sh("lvremove -qq -y vg0/pool")?;

    // A clone of a disk, and then neither of them.
    node.sh("vgextend -qq -y vg0 /dev/ubdc && dd if=/dev/ubdc of=/dev/ubdd bs=1M count=4 status=none conv=fsync")?;
    let (status, found) = doctor(&node, "")?;
    ensure!(status == 2 && found.len() == 1 && found[0].starts_with("error disk-duplicate /dev/ubd"), "{found:?}");
    node.sh("for disk in c d; do dd if=/dev/zero of=/dev/ubd$disk bs=1M count=4 status=none conv=fsync; done")?;
    tells(&node, "", 2, &["error disk-missing volume group vg0"])?;
    Ok(())
}

fn settings(_: &Node) -> Result<()> {
    let node = own_node()?;
    let told = |change: &str, options: &str, status: i32, wanted: &[&str]| {
        node.sh(&format!("cp /etc/lvm/lvm.conf /run/lvm.conf; {change}"))?;
        let done = tells(&node, options, status, wanted);
        node.sh("cp /run/lvm.conf /etc/lvm/lvm.conf")?;
        done
    };
    let add = |section: &str, line: &str| format!("sed -i 's,^{section} {{,{section} {{\\n{line},' /etc/lvm/lvm.conf");
    told(&add("activation", "volume_list=[\"vg1\"]"), "", 2, &["error lvm-volume-list volume group vg0"])?;
    // What it says is true.
    let tried =
        node.exec(["lvcreate", "-y", "-n", "x", "-L", "8m", "vg0", "--config", "activation/volume_list=[\"vg1\"]"])?;
    ensure!(!tried.success(), "{}", tried.stdout);
    told(&add("activation", "volume_list=[\"vg0\"]"), "", 0, &[])?;
    told(&add("activation", "read_only_volume_list=[\"vg0\"]"), "", 2, &["error lvm-read-only-list volume group vg0"])?;
    told(&add("activation", "auto_activation_volume_list=[]"), "", 0, &["note lvm-auto-activation volume group vg0"])?;
    told("sed -i 's/\"a|.\\*|\"/\"r|.*|\"/' /etc/lvm/lvm.conf", "", 2, &["error group-hidden volume group vg0"])?;
    told(
        &format!(
            "mkdir -p /etc/lvm/devices; echo VERSION=1.1.1 > /etc/lvm/devices/system.devices; {}",
            add("devices", "use_devicesfile=1")
        ),
        "",
        2,
        &["error group-hidden volume group vg0"],
    )?;
    told(
        "echo 'global { use_lvmlockd=1 }' >> /etc/lvm/lvm.conf",
        "",
        1,
        &["warning lvmlockd-missing lvm.conf: global/use_lvmlockd"],
    )?;
    told("true", "--volume-group vg9", 2, &["error group-missing volume group vg9"])?;
    told("echo 'broken {' >> /etc/lvm/lvm.conf", "", 2, &["error lvm-config lvm.conf", "error lvm-report lvm"])?;

    // LVM does nothing without a copy of what was.
    node.sh("mkdir -p /etc/lvm/archive && mount -t tmpfs -o size=64k none /etc/lvm/archive && head -c 64k /dev/zero > /etc/lvm/archive/x")?;
    tells(&node, "", 2, &["error lvm-archive-full /etc/lvm/archive"])?;
    ensure!(!node.exec(["lvcreate", "-y", "-n", "x", "-L", "8m", "vg0"])?.success());
    node.sh("umount /etc/lvm/archive")?;

    // A tool that is not there, a /run without room, a mount that is not shared.
    node.sh("mkdir /run/gone && mv $(readlink -f $(command -v mkfs.xfs)) /run/gone/")?;
    tells(&node, "", 2, &["error tool-missing mkfs.xfs"])?;
    node.sh("mv /run/gone/mkfs.xfs /usr/sbin/ && rmdir /run/gone")?;
    node.sh("mount -o remount,size=2m /run && head -c 1800k /dev/zero > /run/fill")?;
    tells(&node, "", 1, &["warning run-full /run"])?;
    node.sh("rm /run/fill && mount --make-private /var/lib/kubelet")?;
    tells(&node, "", 1, &["warning mount-not-shared /var/lib/kubelet"])?;
    node.sh("mount --make-shared /var/lib/kubelet && echo '{\"nonsense\": 1}' > /etc/lvprov/node.json")?;
    tells(&node, "", 2, &["error node-config /etc/lvprov/node.json"])?;
    Ok(())
}

fn through_the_service(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    node.sh("lvcreate -qq -y -n doctors -L 8m vg0 && dmsetup suspend vg0-doctors")?;
    let asked = service.call(&["diagnose"]);
    let metrics = service.metrics("metrics")?.ok();
    node.sh("dmsetup resume vg0-doctors && lvremove -qq -y vg0/doctors")?;
    let found: Vec<String> = asked?.iter().map(shown).collect();
    ensure!(found.iter().any(|one| one == "error device-suspended logical volume vg0/doctors"), "{found:?}");
    let metrics = metrics?;
    let has = |sample: &str| metrics.lines().any(|line| line == sample);
    ensure!(has("lvprov_findings{severity=\"error\"} 1"), "{metrics}");
    ensure!(has("lvprov_volume_group_missing_disks{volume_group=\"vg0\"} 0"), "{metrics}");
    ensure!(metrics.contains("lvprov_volume_group_metadata_free_bytes{volume_group=\"vg0\"} "), "{metrics}");
    // Metrics are read without a process, whatever they tell.
    service.until_reported()?;
    let ran = crate::kinds(node, || {
        let text = service.metrics("metrics")?.ok()?;
        ensure!(text.contains("lvprov_findings{severity=\"error\"} 0"), "{text}");
        Ok(())
    })?;
    ensure!(!ran.iter().any(|command| command.contains("fullreport") || command.contains("lvmconfig")), "{ran:?}");
    node.sh(&format!(": > {COMMANDS}"))?;
    Ok(())
}
