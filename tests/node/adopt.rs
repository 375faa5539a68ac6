//! Volumes that are given to a claim: kept ones, and such as were made by hand.

use crate::block::{id, make, refused};
use crate::service::Service;
use crate::{create, uid};
use anyhow::{Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::driver::Call;
use xtask::testbed::Node;

pub const TESTS: [Test<Node>; 4] = [
    ("adopt::a_kept_volume_is_another_claims_and_no_longer_the_first_ones", kept),
    ("adopt::a_volume_made_by_hand_is_a_claims", by_hand),
    ("adopt::what_does_not_suit_is_refused_and_left_as_it_is", unfit),
    ("adopt::what_was_cut_off_goes_on", cut_off),
];

const SIZE: u64 = 335_544_320;

fn tags(node: &Node, lv: &str) -> Result<String> {
    Ok(node.sh(&format!("lvs --noheadings -o lv_tags vg0/{lv}"))?.trim().to_owned())
}

/// Each file system, and a volume that was not unmounted cleanly.
fn kept(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    for (number, fs) in [(0x900, "xfs"), (0x910, "ext4"), (0x920, "btrfs")] {
        let (old, new) = (uid(number), uid(number + 1));
        create(node, "default", &old, "320m")?;
        node.sh(&format!("lvchange -qq --addtag lvprov.io/layout=raid1:1 vg0/pvc-{old}"))?;
        let first = Call::data("default", "web-0", &format!("adopt-{number}"), &old).fs(fs);
        first.mount(node)?.success()?;
        node.sh(&format!("echo kept > {}/file && sync", first.directory()))?;
        let args = ["adopt", &format!("pvc-{old}"), &new, "--from", &old, "--namespace", "other", "--fs", fs];
        refused(&service, &args, "FailedPrecondition", &["in use"])?;
        // As the power leaves it: the journal has to be replayed.
        if fs == "xfs" {
            node.sh(&format!("xfs_io -x -c 'shutdown -f' {}", first.directory()))?;
        }
        first.unmount(node)?.success()?;
        for _ in 0..2 {
            let answer = service.ask(&args)?;
            ensure!(answer["lv"] == format!("pvc-{new}") && answer["bytes"] == SIZE, "{fs}: {answer}");
        }
        let now = tags(node, &format!("pvc-{new}"))?;
        ensure!(now.contains("lvprov.io/claim=other/data") && now.contains(&new) && !now.contains(&old), "{now}");
        ensure!(now.contains("lvprov.io/layout=raid1:1"), "how it lies on the disks is forgotten: {now}");
        // The new owner's, and nobody else's.
        let second = Call::data("other", "web-0", &format!("adopt-new-{number}"), &new).fs(fs);
        second.mount(node)?.success()?;
        ensure!(node.read_file(&format!("{}/file", second.directory()))?.trim() == "kept", "{fs}");
        second.unmount(node)?.success()?;
        first.mount(node)?.failure(&["not on this node"])?;
        let thief = Call::data("default", "web-0", &format!("adopt-thief-{number}"), &old).fs(fs);
        thief.with("logicalVolume", format!("pvc-{new}")).mount(node)?.failure(&["does not belong"])?;
        Call::data("default", "web-0", &format!("adopt-ns-{number}"), &new)
            .fs(fs)
            .mount(node)?
            .failure(&["does not belong"])?;
        ensure!(service.ask(&["delete", &id(number + 1)])?["deleted"] == true);
    }
    Ok(())
}

fn by_hand(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    node.sh("lvcreate -qq -y -n mysql -L 400m --addtag backup vg0 && mkfs.ext4 -q /dev/vg0/mysql &&
         mkdir -p /mnt/mysql && mount /dev/vg0/mysql /mnt/mysql && echo kept > /mnt/mysql/file")?;
    let args = ["adopt", "mysql", &uid(0x930), "--fs", "ext4", "--bytes", "335544320"];
    refused(&service, &args, "FailedPrecondition", &["in use"])?;
    node.run(["umount", "/mnt/mysql"])?;
    let answer = service.ask(&args)?;
    ensure!(answer["lv"] == format!("pvc-{}", uid(0x930)) && answer["bytes"] == 400u64 << 20, "{answer}");
    let now = tags(node, &format!("pvc-{}", uid(0x930)))?;
    ensure!(now.contains("backup") && now.contains("lvprov.io/kind=data"), "{now}");
    let call = Call::data("default", "web-0", "adopt-hand", &uid(0x930)).fs("ext4");
    call.mount(node)?.success()?;
    ensure!(node.read_file(&format!("{}/file", call.directory()))?.trim() == "kept");
    call.unmount(node)?.success()?;
    service.ask(&["delete", &id(0x930)])?;
    // As a raw device it may hold anything, and stays as it is.
    node.sh("lvcreate -qq -y -n raw -L 320m vg0 && echo anything | dd of=/dev/vg0/raw conv=fsync status=none")?;
    ensure!(service.ask(&["adopt", "raw", &uid(0x931), "--fs", ""])?["lv"].is_string());
    let target = "/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices/publish/pv/adopted";
    ensure!(service.ask(&["publish", &id(0x931), target, "--block"])?["published"] == true);
    ensure!(node.sh(&format!("head -c 8 {target}"))? == "anything");
    service.ask(&["unpublish", &id(0x931), target])?;
    ensure!(service.ask(&["delete", &id(0x931)])?["deleted"] == true);
    Ok(())
}

fn unfit(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    let (old, new) = (uid(0x940), uid(0x941));
    create(node, "default", &old, "320m")?;
    let call = Call::data("default", "web-0", "adopt-unfit", &old);
    call.mount(node)?.success()?;
    call.unmount(node)?.success()?;
    let lv = format!("pvc-{old}");
    let before = (tags(node, &lv)?, node.sh(&format!("blkid -p -o value -s UUID /dev/vg0/{lv}"))?);
    let from = ["--from", old.as_str()];
    let cases: [(&[&str], &str); 6] = [
        (&["adopt", &lv, &new], "does not belong|is the volume of claim default/data"),
        (&["adopt", &lv, &new, "--from", &uid(0x942)], "is the volume of claim default/data"),
        (&["adopt", &lv, &new, from[0], from[1], "--fs", "ext4"], "it has xfs"),
        (&["adopt", &lv, &new, from[0], from[1], "--fs", ""], "made for a file system"),
        (&["adopt", &lv, &new, from[0], from[1], "--bytes", "400000000"], "320 MiB"),
        (&["adopt", "nothing", &new], "not on this node"),
    ];
    for (args, words) in cases {
        let answer = service.ask(args)?;
        let message = answer["message"].as_str().unwrap_or("");
        ensure!(words.split('|').any(|word| message.contains(word)), "{args:?}: {answer}");
    }
    // The claim has one already; another cluster's; a raw one; a log volume.
    create(node, "default", &new, "320m")?;
    refused(&service, &["adopt", &lv, &new, "--from", &old], "FailedPrecondition", &["has a volume already"])?;
    service.ask(&["delete", &id(0x941)])?;
    make(&service, 0x943)?;
    let raw = format!("pvc-{}", uid(0x943));
    refused(&service, &["adopt", &raw, &new, "--from", &uid(0x943)], "FailedPrecondition", &["raw block"])?;
    service.ask(&["delete", &id(0x943)])?;
    let tag = "lvprov.io/cluster=11111111-2222-4333-8444-555555555555";
    node.sh(&format!(
        "lvchange -qq --deltag {tag} --addtag lvprov.io/cluster=11111111-2222-4333-8444-55555555aaaa vg0/{lv}"
    ))?;
    refused(&service, &["adopt", &lv, &new, "--from", &old], "FailedPrecondition", &["another cluster"])?;
    node.sh(&format!("lvchange -qq --deltag lvprov.io/cluster=11111111-2222-4333-8444-55555555aaaa vg0/{lv}"))?;
    refused(&service, &["adopt", &lv, &new], "FailedPrecondition", &["some of the tags"])?;
    node.sh(&format!("lvchange -qq --addtag {tag} vg0/{lv}"))?;
    let sorted = |tags: &str| {
        let mut all: Vec<String> = tags.split(',').map(str::to_owned).collect();
        all.sort();
        all
    };
    ensure!(sorted(&tags(node, &lv)?) == sorted(&before.0), "its tags have changed");
    ensure!(node.sh(&format!("blkid -p -o value -s UUID /dev/vg0/{lv}"))? == before.1, "its UUID has changed");
    service.ask(&["delete", &id(0x940)]).map(drop)
}

/// Each state that a crash can leave.
fn cut_off(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    for (number, renamed) in [(0x950, false), (0x960, true)] {
        let (old, new) = (uid(number), uid(number + 1));
        create(node, "default", &old, "320m")?;
        let call = Call::data("default", "web-0", &format!("adopt-cut-{number}"), &old);
        call.mount(node)?.success()?;
        node.sh(&format!("echo kept > {}/file && sync", call.directory()))?;
        call.unmount(node)?.success()?;
        // Its tags are the new claim's, its UUID and perhaps its name are not.
        node.sh(&format!(
            "lvchange -qq --deltag lvprov.io/claim-uid={old} --addtag lvprov.io/claim-uid={new} vg0/pvc-{old}"
        ))?;
        if renamed {
            node.sh(&format!("lvrename -qq vg0 pvc-{old} pvc-{new}"))?;
        }
        let answer = service.ask(&["adopt", &format!("pvc-{old}"), &new, "--from", &old])?;
        ensure!(answer["lv"] == format!("pvc-{new}"), "{answer}");
        let call = Call::data("default", "web-0", &format!("adopt-cut-new-{number}"), &new);
        call.mount(node)?.success()?;
        ensure!(node.read_file(&format!("{}/file", call.directory()))?.trim() == "kept");
        call.unmount(node)?.success()?;
        service.ask(&["delete", &id(number + 1)])?;
    }
    Ok(())
}
