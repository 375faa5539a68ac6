//! Striped and mirrored volumes, on a group of four disks that each test makes.

use crate::service::Service;
use crate::{configured, kinds, uid};
use anyhow::{Context, Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::driver::Call;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use xtask::testbed::Node;

pub const TESTS: [Test<Node>; 13] = [
    ("layouts::each_is_made_found_mounted_grown_and_removed", whole_life),
    ("layouts::what_is_said_to_fit_is_what_lvm_makes", capacity),
    ("layouts::no_disk_has_something_of_two_copies", copies),
    ("layouts::the_driver_grows_a_mirror_or_says_what_is_missing", driver_growth),
    ("layouts::half_of_a_mirror_is_made_anew", half_made),
    ("layouts::an_activation_that_was_cut_off_is_done_again", half_active),
    ("layouts::a_lost_disk_is_not_the_loss_of_a_mirror", lost_disk),
    ("layouts::a_kernel_that_cannot_is_told", no_module),
    ("layouts::a_mirror_made_by_hand_grows_as_one", by_hand),
    ("layouts::a_raw_device_of_any_kind_grows_by_zeros", raw_growth),
    ("layouts::thin_volumes_are_promised_once", thin),
    ("layouts::half_of_a_thin_volume_is_made_anew", half_of_a_thin_volume),
    ("layouts::a_device_class_is_a_group_of_the_nodes_choice", device_classes),
];

const MIB: u64 = 1 << 20;
/// The node's spare disks.
const DISKS: &str = "/dev/ubdc /dev/ubdd /dev/ubde /dev/ubdf";

/// A group vg1 of four disks with 1020 MiB each; gone when dropped.
struct Disks<'a>(&'a Node);

impl<'a> Disks<'a> {
    fn make(node: &'a Node) -> Result<Self> {
        let disks = Self(node);
        node.sh(&format!("vgcreate -qq -y vg1 {DISKS}"))?;
        Ok(disks)
    }

    /// Takes room on one disk.
    fn fill(&self, disk: &str, mib: u64) -> Result<()> {
        self.0.sh(&format!("lvcreate -qq -y -an -Zn -Wn -n fill-{disk}-{mib} -L {mib}m vg1 /dev/ubd{disk}"))?;
        Ok(())
    }

    /// The disks of each image of a mirrored volume, by the image's name.
    fn legs(&self, uid: &str) -> Result<BTreeMap<String, BTreeSet<String>>> {
        let rows = self.0.run(["lvs", "-a", "--noheadings", "-o", "lv_name,devices", "vg1"])?;
        let mut legs = BTreeMap::<String, BTreeSet<String>>::new();
        for row in rows.lines() {
            let mut words = row.split_whitespace();
            let (name, devices) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            if name.starts_with(&format!("[pvc-{uid}_rimage_")) {
                let disk = devices.split('(').next().unwrap_or_default();
                legs.entry(name.to_owned()).or_default().insert(disk.to_owned());
            }
        }
        Ok(legs)
    }

    fn size(&self, uid: &str) -> Result<u64> {
        let lv = format!("vg1/pvc-{uid}");
        Ok(self.0.run(["lvs", "--noheadings", "--units", "b", "--nosuffix", "-o", "lv_size", &lv])?.trim().parse()?)
    }

    /// Nothing of any volume is left, hidden or not.
    fn empty(&self) -> Result<()> {
        let left = self.0.run(["lvs", "-a", "--noheadings", "vg1"])?;
        ensure!(left.trim().is_empty(), "{left}");
        Ok(())
    }
}

impl Drop for Disks<'_> {
    fn drop(&mut self) {
        let _ = self.0.sh(&format!("vgremove -qq -y -ff vg1; for d in {DISKS}; do pvremove -qq -y -ff $d; done"));
    }
}

/// Asks for a volume of vg1.
fn create(service: &Service<'_>, uid: &str, bytes: u64, parameters: &[&str]) -> Result<Value> {
    let bytes = bytes.to_string();
    let mut args = vec!["create", uid, &bytes, "--vg", "vg1"];
    for parameter in parameters {
        args.extend(["--set", parameter]);
    }
    service.ask(&args)
}

fn expand(service: &Service<'_>, uid: &str, bytes: u64) -> Result<Value> {
    service.ask(&["expand", &format!("vg1/pvc-{uid}"), &bytes.to_string()])
}

fn refused(answer: &Value, code: &str, words: &[&str]) -> Result<()> {
    let message = answer["message"].as_str().unwrap_or("");
    ensure!(answer["code"] == code, "{answer}");
    ensure!(words.iter().all(|word| message.contains(word)), "{answer}");
    Ok(())
}

/// Removes it, which the first seconds of a mirror's resync do not hold up.
fn delete(service: &Service<'_>, uid: &str) -> Result<()> {
    let answer = service.ask(&["delete", &format!("vg1/pvc-{uid}")])?;
    ensure!(answer["deleted"] == true, "{answer}");
    Ok(())
}

/// What the group reports, once that is `free`.
fn reported(service: &Service<'_>, expected: impl Fn(&Value) -> bool) -> Result<Value> {
    for _ in 0..600 {
        let groups = service.call(&["watch", "1"])?;
        let group = groups.into_iter().find(|group| group["vg"] == "vg1");
        if let Some(group) = group.filter(|group| expected(group)) {
            return Ok(group);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    anyhow::bail!("not reported: {:?}", service.call(&["watch", "1"])?)
}

fn data(namespace: &str, pod: &str, claim: &str) -> Call {
    Call::data(namespace, pod, pod, claim).with("volumeGroup", "vg1")
}

fn whole_life(node: &Node) -> Result<()> {
    let disks = Disks::make(node)?;
    let service = Service::start(node)?;
    // Parameters, what comes of 321 MiB, what each disk gives for it, and how many disks.
    type Made = (u32, &'static [&'static str], u64, u64, usize, &'static str);
    let cases: [Made; 4] = [
        (0x700, &["layout=striped"], 328, 164, 2, "striped:2:65536"),
        (0x701, &["layout=striped", "stripes=3", "stripeSize=128Ki"], 324, 108, 3, "striped:3:131072"),
        (0x702, &["layout=raid1"], 324, 328, 2, "raid1:1"),
        (0x703, &["layout=raid10"], 328, 168, 4, "raid10:2:65536"),
    ];
    for (number, parameters, mib, leg, legs, layout) in cases {
        let claim = uid(number);
        reported(&service, |group| group["free"] == 4080 * MIB)?;
        let mut took = Duration::ZERO;
        let ran = kinds(node, || {
            let begun = Instant::now();
            let made = create(&service, &claim, 321 * MIB, parameters)?;
            took = begun.elapsed();
            ensure!(made["bytes"] == mib * MIB, "{made}");
            reported(&service, |group| group["free"] == (4080 - leg * legs as u64) * MIB)?;
            node.sh(&format!(
                "for i in $(seq 100); do test $(grep -c 'lvm vgs' {}) = 2 && exit; sleep 0.1; done",
                crate::COMMANDS
            ))?;
            Ok(())
        })?;
        let expected = ["report: lvm vgs", "mutate: lvm lvcreate", "report: lvm vgs", "report: lvm vgs"];
        // What is under way for more than a second is reported before its end, too.
        let late = took > Duration::from_secs(1) && ran == expected;
        ensure!(late || ran == expected[..3], "{layout}: {ran:?} in {took:?}");
        let free: Vec<u64> =
            (0..4).map(|i| if i < 4 - legs { 1020 } else { 1020 - leg }).map(|mib| mib * MIB).collect();
        reported(&service, |group| group["disks"] == serde_json::json!(free))?;

        let again = create(&service, &claim, 321 * MIB, parameters)?;
        ensure!(again["bytes"] == mib * MIB, "{again}");
        refused(&create(&service, &claim, 321 * MIB, &[])?, "AlreadyExists", &[layout, "not linear"])?;
        let elsewhere = service.ask(&["create", &claim, "321000000"])?;
        refused(&elsewhere, "AlreadyExists", &["in volume group vg1 and not in vg0"])?;
        let listed: Vec<Value> = service.call(&["inventory"])?.into_iter().filter(|item| item["vg"] == "vg1").collect();
        ensure!(listed.len() == 1 && listed[0]["placement"] == layout, "{listed:?}");

        // Mounted while a mirror is still being synchronised.
        let pod = data("default", &format!("pod-{number}"), &claim);
        pod.mount(node)?.success()?;
        node.sh(&format!("echo kept > {}/file", pod.directory()))?;
        pod.expand(node, 401 * MIB)?.success()?;
        let step = if layout.starts_with("raid1:") { 4 } else { 4 * legs as u64 / if legs == 4 { 2 } else { 1 } };
        let expected = 401_u64.next_multiple_of(step) * MIB;
        ensure!(disks.size(&claim)? == expected, "{layout}: {} and not {expected}", disks.size(&claim)?);
        let grown = expand(&service, &claim, 481 * MIB)?;
        let expected = 481_u64.next_multiple_of(step) * MIB;
        ensure!(grown["bytes"] == expected && disks.size(&claim)? == expected, "{layout}: {grown}");
        ensure!(expand(&service, &claim, 481 * MIB)?["bytes"] == expected, "the second time");
        pod.expand(node, 481 * MIB)?.success()?;
        let blocks: u64 = node.run(["stat", "-f", "-c", "%b", &pod.directory()])?.parse()?;
        ensure!(blocks * 4096 > 400 * MIB, "{layout}: {blocks} blocks");
        ensure!(node.read_file(&format!("{}/file", pod.directory()))? == "kept");
        refused(&service.ask(&["delete", &format!("vg1/pvc-{claim}")])?, "FailedPrecondition", &["in use"])?;
        pod.unmount(node)?.success()?;
        delete(&service, &claim)?;
        delete(&service, &claim)?;
        disks.empty()?;
    }
    Ok(())
}

/// On disks of different size, with their room in pieces.
fn capacity(node: &Node) -> Result<()> {
    let disks = Disks::make(node)?;
    // Three pieces are free on the first, two on the second.
    node.sh(
        "for i in 1 2 3 4; do lvcreate -qq -y -an -Zn -Wn -n a$i -L 120m vg1 /dev/ubdc; done; lvremove -qq -y vg1/a1 vg1/a3
         for i in 1 2; do lvcreate -qq -y -an -Zn -Wn -n b$i -L 320m vg1 /dev/ubdd; done; lvremove -qq -y vg1/b1",
    )?;
    disks.fill("e", 508)?;
    let service = Service::start(node)?;
    reported(&service, |group| group["disks"] == serde_json::json!([1020 * MIB, 780 * MIB, 700 * MIB, 512 * MIB]))?;
    let cases: [(&[&str], u64, u64); 5] = [
        (&["layout=striped"], 2 * 780, 8),
        (&["layout=striped", "stripes=4"], 4 * 512, 16),
        (&["layout=raid1"], 780 - 4, 4),
        (&["layout=raid1", "mirrors=3"], 512 - 4, 4),
        (&["layout=raid10"], 2 * (512 - 4), 8),
    ];
    for (number, (parameters, mib, step)) in (0x710..).zip(cases) {
        let claim = uid(number);
        let mut args = vec!["capacity", "volumeGroup=vg1"];
        args.extend(parameters);
        let said = service.ask(&args)?;
        ensure!(said["largest"] == mib * MIB, "{parameters:?}: {said}");
        ensure!(said["total"].as_u64() >= said["largest"].as_u64(), "{said}");
        let more = create(&service, &claim, (mib + step) * MIB, parameters)?;
        refused(&more, "ResourceExhausted", &["vg1 cannot hold", "disks (physical volumes)", "4 MiB are missing"])?;
        let made = create(&service, &claim, mib * MIB, parameters)?;
        ensure!(made["bytes"] == mib * MIB, "{parameters:?}: {made}");
        // Asked again once the group is full, it is the same volume.
        let again = create(&service, &claim, mib * MIB, parameters)?;
        ensure!(again["bytes"] == mib * MIB, "{parameters:?}: {again}");
        let legs = disks.legs(&claim)?;
        ensure!(legs.values().all(|leg| leg.len() == 1), "{legs:?}");
        ensure!(legs.values().flatten().collect::<BTreeSet<_>>().len() == legs.len(), "{legs:?}");
        delete(&service, &claim)?;
        reported(&service, |group| group["disks"][0] == 1020 * MIB)?;
    }
    let none = service.ask(&["capacity", "volumeGroup=vg1", "layout=striped", "stripes=5"])?;
    ensure!(none["largest"] == 0 && none["total"] == 0, "{none}");
    let five = create(&service, &uid(0x71f), 320 * MIB, &["layout=striped", "stripes=5"])?;
    refused(&five, "ResourceExhausted", &["5 disks", "1 disks are missing"])?;
    for (parameters, words) in [
        (&["layout=raid5"][..], &["raid5", "linear, striped, raid1"][..]),
        (&["layout=raid1", "stripes=2"], &["stripes does not go with layout raid1"]),
        (&["layout=raid10", "mirrors=2"], &["mirrors", "from 1 to 1"]),
    ] {
        refused(&create(&service, &uid(0x71f), 320 * MIB, parameters)?, "InvalidArgument", words)?;
    }
    let small = node.sh("vgchange -qq -s 64k vg1 && vgs --noheadings --units b -o vg_extent_size vg1")?;
    ensure!(small.trim() == "65536B", "{small}");
    drop(service);
    let service = Service::start(node)?;
    let stripes = create(&service, &uid(0x71f), 320 * MIB, &["layout=striped", "stripeSize=128Ki"])?;
    refused(&stripes, "OutOfRange", &["stripeSize 128 KiB", "extent", "64 KiB"])?;
    // A bit for each 2 MiB, and so more extents where these are small.
    let made = create(&service, &uid(0x71e), 320 * MIB, &["layout=raid1"])?;
    ensure!(made["bytes"] == 320 * MIB, "{made}");
    Ok(())
}

fn apart(legs: &BTreeMap<String, BTreeSet<String>>) -> Result<()> {
    let all: Vec<&String> = legs.values().flatten().collect();
    ensure!(!all.is_empty() && all.len() == all.iter().collect::<BTreeSet<_>>().len(), "copies share a disk: {legs:?}");
    Ok(())
}

/// Where LVM 2.03.16, left to itself, gives a disk to both copies.
fn copies(node: &Node) -> Result<()> {
    let disks = Disks::make(node)?;
    disks.fill("d", 320)?;
    disks.fill("e", 420)?;
    disks.fill("f", 1016)?;
    let service = Service::start(node)?;
    let claim = uid(0x720);
    refused(&create(&service, &claim, 900 * MIB, &["layout=raid1"])?, "ResourceExhausted", &["1 of 4 have that"])?;
    let made = create(&service, &claim, 400 * MIB, &["layout=raid1"])?;
    ensure!(made["bytes"] == 400 * MIB, "{made}");
    let first = disks.legs(&claim)?;
    apart(&first)?;
    // On c and d: with room for 296 MiB more on d. Nothing but e and f have nothing of it.
    let message = expand(&service, &claim, 700 * MIB)?;
    refused(&message, "ResourceExhausted", &["no more than 296 MiB free", "on others", "1 of 2 have that"])?;
    ensure!(disks.size(&claim)? == 400 * MIB);
    ensure!(expand(&service, &claim, 600 * MIB)?["bytes"] == 600 * MIB);
    ensure!(disks.legs(&claim)? == first, "it could have stayed where it was");
    // With room on another disk the copies go on there, both of them.
    node.run(["lvremove", "-qq", "-y", "vg1/fill-f-1016"])?;
    ensure!(expand(&service, &claim, 1100 * MIB)?["bytes"] == 1100 * MIB);
    let legs = disks.legs(&claim)?;
    ensure!(legs.values().all(|leg| leg.len() == 2), "{legs:?}");
    apart(&legs)?;
    ensure!(expand(&service, &claim, 1150 * MIB)?["bytes"] == 1152 * MIB);
    apart(&disks.legs(&claim)?)?;
    delete(&service, &claim)?;
    Ok(())
}

fn driver_growth(node: &Node) -> Result<()> {
    let disks = Disks::make(node)?;
    disks.fill("e", 1000)?;
    disks.fill("f", 1000)?;
    let (mirror, linear) = (uid(0x730), uid(0x731));
    {
        let service = Service::start(node)?;
        create(&service, &mirror, 320 * MIB, &["layout=raid1"])?;
        create(&service, &linear, 320 * MIB, &[])?;
    }
    let pod = data("default", "growth-1", &mirror);
    pod.mount(node)?.success()?;
    let ran = kinds(node, || pod.expand(node, 400 * MIB)?.success())?;
    ensure!(ran == ["report: lvm lvs", "report: lvm pvs", "mutate: lvm lvextend", "tool: xfs_growfs"], "{ran:?}");
    pod.expand(node, 1200 * MIB)?.failure(&["vg1 cannot grow", "its copies are on", "Ask for less"])?;
    ensure!(disks.size(&mirror)? == 400 * MIB);
    node.sh(&format!("echo still > {}/file", pod.directory()))?;
    pod.unmount(node)?.success()?;
    // A linear volume costs what it did.
    let pod = data("default", "growth-2", &linear);
    pod.mount(node)?.success()?;
    let ran = kinds(node, || pod.expand(node, 400 * MIB)?.success())?;
    ensure!(ran == ["mutate: lvm lvextend", "tool: xfs_growfs"], "{ran:?}");
    pod.unmount(node)?.success()
}

/// As an lvcreate leaves it that is cut off: its parts are to be seen, and have
/// the volume's tags.
fn half_made(node: &Node) -> Result<()> {
    let disks = Disks::make(node)?;
    let service = Service::start(node)?;
    let claim = uid(0x740);
    create(&service, &claim, 320 * MIB, &["layout=raid1"])?;
    let device = format!("/dev/vg1/pvc-{claim}");
    // Of a former tenant, say.
    node.run(["mkfs.xfs", "-q", "-f", &device])?;
    node.sh("vgchange -qq -an vg1; vgcfgbackup -qq -f /run/vg1.meta vg1
         sed -i -e '/_rmeta_[0-9]* {/,/flags/s/\\(status = \\[.*\\)\\]/\\1, \"VISIBLE\"]/' \
             -e '/pvc-[0-9a-f-]* {/,/flags/s/flags = .*/flags = [\"ACTIVATION_SKIP\"]/' /run/vg1.meta
         vgcfgrestore -qq -y -f /run/vg1.meta vg1")?;
    let seen = node.run(["lvs", "--noheadings", "-o", "lv_name", "vg1"])?;
    ensure!(seen.contains("_rmeta_0") && seen.contains("_rmeta_1"), "{seen}");
    let listed: Vec<Value> = service.call(&["inventory"])?.into_iter().filter(|item| item["vg"] == "vg1").collect();
    ensure!(listed.len() == 1, "parts are listed: {listed:?}");
    let ran = kinds(node, || {
        let made = create(&service, &claim, 320 * MIB, &["layout=raid1"])?;
        ensure!(made["bytes"] == 320 * MIB, "{made}");
        Ok(())
    })?;
    let changes: Vec<&String> = ran.iter().filter(|kind| kind.starts_with("mutate")).collect();
    ensure!(changes == ["mutate: lvm lvcreate", "mutate: lvm lvremove", "mutate: lvm lvcreate"], "{ran:?}");
    let seen = node.run(["lvs", "--noheadings", "-o", "lv_name", "vg1"])?;
    ensure!(seen.trim() == format!("pvc-{claim}"), "{seen}");
    ensure!(!node.exec(["blkid", "-p", &device])?.success(), "the former tenant's file system is there");
    let pod = data("default", "half-1", &claim);
    pod.mount(node)?.success()?;
    pod.unmount(node)?.success()?;
    delete(&service, &claim)?;
    disks.empty()
}

fn half_active(node: &Node) -> Result<()> {
    let _disks = Disks::make(node)?;
    let claim = uid(0x750);
    create(&Service::start(node)?, &claim, 320 * MIB, &["layout=raid1"])?;
    let pod = data("default", "active-1", &claim);
    let mut kept = false;
    for part in ["rimage_0", "rmeta_1"] {
        node.sh(&format!("lvchange -qq -an vg1/pvc-{claim}; lvchange -qq -y -ay vg1/pvc-{claim}_{part}"))?;
        let refused = node.exec(["lvchange", "-ay", &format!("vg1/pvc-{claim}")])?;
        ensure!(!refused.success(), "LVM activates it");
        pod.mount(node)?.success()?;
        if kept {
            ensure!(node.read_file(&format!("{}/file", pod.directory()))? == "kept");
        }
        node.sh(&format!("echo kept > {}/file", pod.directory()))?;
        kept = true;
        pod.unmount(node)?.success()?;
    }
    Ok(())
}

fn lost_disk(node: &Node) -> Result<()> {
    let disks = Disks::make(node)?;
    let service = Service::start(node)?;
    let (mirror, blank, striped) = (uid(0x760), uid(0x761), uid(0x762));
    let pods = [&mirror, &striped].map(|claim| data("default", &format!("lost-{claim}"), claim));
    for (claim, layout) in [(&mirror, "raid1"), (&blank, "raid1"), (&striped, "striped")] {
        let parameter = format!("layout={layout}");
        let mut parameters = vec![parameter.as_str()];
        if layout == "striped" {
            parameters.push("stripes=4");
        }
        let made = create(&service, claim, 320 * MIB, &parameters)?;
        ensure!(made["bytes"].is_u64(), "{made}");
    }
    for pod in &pods {
        pod.mount(node)?.success()?;
        node.sh(&format!("echo kept > {}/file && sync", pod.directory()))?;
        pod.unmount(node)?.success()?;
    }
    // The copies are where they are only once they are the same.
    node.sh(
        "for i in $(seq 600); do lvs --noheadings -o copy_percent vg1 | grep -v 100.00 | grep -q '[0-9]' || exit 0; sleep 0.1; done; false",
    )?;
    let legs = disks.legs(&mirror)?;
    let lost = legs.values().flatten().next().context("no disk")?.clone();
    node.sh(&format!(
        "vgchange -qq -an vg1; dd if={lost} of=/run/label bs=1M count=1 status=none; \
         dd if=/dev/zero of={lost} bs=1M count=1 conv=fsync status=none"
    ))?;
    // What is changed by hand below LVM is not seen by anybody.
    node.sh("mkdir -p /run/lvprov; echo changed >> /run/lvprov/vg-vg1.lock")?;
    reported(&service, |group| group["free"] == 0 && group["disks"] == serde_json::json!([]))?;
    for parameters in [&["layout=raid1"][..], &[]] {
        let refusal = create(&service, &uid(0x76f), 320 * MIB, parameters)?;
        refused(&refusal, "FailedPrecondition", &["vg1 has lost a disk", "vgreduce --removemissing"])?;
    }
    refused(&expand(&service, &mirror, 400 * MIB)?, "FailedPrecondition", &["vg1 has lost a disk"])?;
    let said = service.ask(&["capacity", "volumeGroup=vg1", "layout=raid1"])?;
    ensure!(said["largest"] == 0, "{said}");

    pods[0].mount(node)?.success()?;
    ensure!(node.read_file(&format!("{}/file", pods[0].directory()))? == "kept");
    pods[0].expand(node, 400 * MIB)?.failure(&["vg1 has lost a disk"])?;
    pods[0].unmount(node)?.success()?;
    // One that nobody has used yet still bears its mark.
    let first = data("default", "lost-first", &blank);
    first.mount(node)?.success()?;
    first.unmount(node)?.success()?;
    pods[1].mount(node)?.failure(&["lvchange", "partial"])?;
    ensure!(!pods[1].is_mounted(node)?);

    // The same disk is back. It was never gone for the kernel, which would have told LVM.
    node.sh(&format!(
        "vgchange -qq -an vg1; dd if=/run/label of={lost} bs=1M count=1 conv=fsync status=none; rm -f /run/lvm/hints; \
         vgchange -qq -ay vg1"
    ))?;
    pods[1].mount(node)?.success()?;
    ensure!(node.read_file(&format!("{}/file", pods[1].directory()))? == "kept");
    pods[1].unmount(node)?.success()?;
    for claim in [&mirror, &blank, &striped] {
        delete(&service, claim)?;
    }
    disks.empty()
}

fn no_module(node: &Node) -> Result<()> {
    let _disks = Disks::make(node)?;
    node.run(["rmmod", "dm_raid"])?;
    let result = without_raid(node);
    node.sh("mkdir -p /run/modules/lib/modules; ln -sfn /usr/lib/uml/modules/* /run/modules/lib/modules/; \
         modprobe -d /run/modules dm-raid")?;
    result?;
    let service = Service::start(node)?;
    ensure!(create(&service, &uid(0x770), 320 * MIB, &["layout=raid1"])?["bytes"] == 320 * MIB);
    delete(&service, &uid(0x770))
}

fn without_raid(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    reported(&service, |group| group["layouts"] == serde_json::json!(["linear", "striped"]))?;
    for layout in ["layout=raid1", "layout=raid10"] {
        let refusal = create(&service, &uid(0x770), 320 * MIB, &[layout])?;
        refused(&refusal, "FailedPrecondition", &["no module dm-raid", "modprobe dm-raid"])?;
        let said = service.ask(&["capacity", "volumeGroup=vg1", layout])?;
        ensure!(said["largest"] == 0 && said["total"] == 0, "{said}");
    }
    ensure!(create(&service, &uid(0x771), 320 * MIB, &["layout=striped"])?["bytes"] == 320 * MIB);
    delete(&service, &uid(0x771))
}

fn device_classes(node: &Node) -> Result<()> {
    let _disks = Disks::make(node)?;
    // Without a word of them there is one.
    let service = Service::start(node)?;
    let group = reported(&service, |_| true)?;
    ensure!(group["classes"] == serde_json::json!([]) && group["default"] == false, "{group}");
    let ask = |service: &Service<'_>, number: u32, class: &str| {
        let claim = uid(number);
        // An empty one is not sent.
        let class = format!("deviceClass={class}");
        service.ask(&["create", &claim, "335544320", "--vg", "", "--set", &class])
    };
    let made = ask(&service, 0x780, "")?;
    ensure!(made["id"] == format!("vg0/pvc-{}", uid(0x780)), "{made}");
    refused(&ask(&service, 0x781, "fast")?, "FailedPrecondition", &["no device class fast", "names: default"])?;
    let both = service.ask(&["create", &uid(0x781), "335544320", "--set", "deviceClass=default"])?;
    refused(&both, "InvalidArgument", &["cannot be given both"])?;
    drop(service);
    let classes = r#""deviceClasses":{"fast":{"volumeGroup":"vg1","default":true},"bulk":{"volumeGroup":"vg0"},
        "gone":{"volumeGroup":"vg9"}}"#;
    configured(node, classes, || {
        let service = Service::start(node)?;
        let group = reported(&service, |_| true)?;
        ensure!(group["classes"] == serde_json::json!(["fast"]) && group["default"] == true, "{group}");
        for (number, class, vg) in [(0x782, "fast", "vg1"), (0x783, "", "vg1"), (0x784, "bulk", "vg0")] {
            let made = ask(&service, number, class)?;
            ensure!(made["id"] == format!("{vg}/pvc-{}", uid(number)), "{class}: {made}");
        }
        // The default is another one now, and the claim's volume where it was.
        let moved = ask(&service, 0x780, "")?;
        refused(&moved, "AlreadyExists", &["in volume group vg0 and not in vg1"])?;
        refused(&ask(&service, 0x781, "gone")?, "FailedPrecondition", &["no volume group vg9"])?;
        let room = |parameters: &[&str]| {
            let mut args = vec!["capacity"];
            args.extend(parameters);
            service.ask(&args)
        };
        ensure!(room(&["deviceClass=fast"])? == room(&["volumeGroup=vg1"])?);
        ensure!(room(&[])? == room(&["volumeGroup=vg1"])?);
        ensure!(room(&["deviceClass=fast", "layout=raid1"])? == room(&["volumeGroup=vg1", "layout=raid1"])?);
        ensure!(room(&["deviceClass=gone"])?["largest"] == 0);
        for (number, vg) in [(0x780, "vg0"), (0x782, "vg1"), (0x783, "vg1"), (0x784, "vg0")] {
            let answer = service.ask(&["delete", &format!("{vg}/pvc-{}", uid(number))])?;
            ensure!(answer["deleted"] == true, "{answer}");
        }
        Ok(())
    })
}

const THIN_POOL: &str = r#""thinPools":{"vg1":{"pool":"pool0"}}"#;

fn by_hand(node: &Node) -> Result<()> {
    let disks = Disks::make(node)?;
    let service = Service::start(node)?;
    node.sh("lvcreate -qq -y --type raid1 -m 1 -L 320m -n mysql vg1 && mkfs.ext4 -q /dev/vg1/mysql")?;
    let claim = uid(0x7b0);
    let answer = service.ask(&["adopt", "mysql", &claim, "--vg", "vg1", "--fs", "ext4", "--bytes", "335544320"])?;
    ensure!(answer["lv"] == format!("pvc-{claim}") && answer["layout"] == "raid1:1", "{answer}");
    // The disks of its copies are full: it grows on two others, and no disk comes to have both.
    let legs = disks.legs(&claim)?;
    for disk in legs.values().flatten() {
        disks.fill(disk.trim_start_matches("/dev/ubd"), 600)?;
    }
    ensure!(expand(&service, &claim, 640 * MIB)?["bytes"] == 640 * MIB);
    let legs = disks.legs(&claim)?;
    let all: Vec<&String> = legs.values().flatten().collect();
    ensure!(legs.len() == 2 && all.iter().collect::<BTreeSet<_>>().len() == all.len(), "{legs:?}");
    ensure!(all.len() == 4, "it has not grown on other disks: {legs:?}");
    delete(&service, &claim)
}

/// What is given out next on each disk holds something that is not zero.
fn dirty(node: &Node) -> Result<()> {
    node.sh(&format!(
        "for d in {DISKS}; do \
           lvcreate -qq -y -Wn -Zn -n earlier -L 320m vg1 $d 2>/dev/null || continue; \
           {fill}; lvremove -qq -y vg1/earlier; \
         done",
        fill = lvprov_tests::fill("/dev/vg1/earlier")
    ))?;
    Ok(())
}

fn raw_growth(node: &Node) -> Result<()> {
    let disks = Disks::make(node)?;
    let until = |ask: &dyn Fn() -> Result<Value>| -> Result<Value> {
        for _ in 0..60 {
            let answer = ask()?;
            if answer["code"] != "Aborted" {
                return Ok(answer);
            }
        }
        anyhow::bail!("it is never done: {}", ask()?)
    };
    configured(node, THIN_POOL, || {
        let service = Service::start(node)?;
        let kinds = [("striped", 0x7a0), ("raid1", 0x7a1), ("raid10", 0x7a2), ("thin", 0x7a3)];
        for (layout, number) in kinds {
            if layout == "thin" {
                node.sh("lvcreate -qq -y --type thin-pool -Zy -L 900m -n pool0 vg1; echo changed >> /run/lvprov/vg-vg1.lock")?;
                reported(&service, |group| group["thin"] == 900 * MIB)?;
            } else {
                dirty(node)?;
            }
            let (uid, layout) = (uid(number), format!("layout={layout}"));
            let bytes = (64 * MIB).to_string();
            let made = ["create", &uid, &bytes, "--vg", "vg1", "--block", "--set", &layout];
            ensure!(until(&|| service.ask(&made))?["bytes"] == 64 * MIB, "{layout}");
            let device = format!("/dev/vg1/pvc-{uid}");
            node.sh(&format!("echo kept | dd of={device} conv=fsync,notrunc status=none"))?;
            // Held open by a pod meanwhile.
            node.sh(&format!(
                "sh -c 'exec 7< {device}; exec sleep 60' > /dev/null 2>&1 < /dev/null & echo $! > /run/holder"
            ))?;
            let grown = until(&|| expand(&service, &uid, 200 * MIB))?;
            ensure!(grown["bytes"] == 200 * MIB, "{layout}: {grown}");
            ensure!(node.sh(&format!("blockdev --getsize64 {device}"))?.trim() == (200 * MIB).to_string(), "{layout}");
            ensure!(crate::block::is_zero(node, &device, 1)?, "{layout}: old bytes show");
            ensure!(node.sh(&format!("head -c 4 {device}"))? == "kept", "{layout}");
            let left = node.run(["lvs", "--noheadings", "-o", "lv_name", "vg1"])?;
            ensure!(!left.contains("grow-"), "{layout}: {left}");
            if layout.contains("raid") {
                let legs = disks.legs(&uid)?;
                let all: Vec<&String> = legs.values().flatten().collect();
                ensure!(
                    all.iter().collect::<BTreeSet<_>>().len() == all.len(),
                    "{layout}: a disk has two legs: {legs:?}"
                );
                // Each copy for itself: what the other disk shows is the same.
                node.sh(&format!(
                    "while ! lvs --noheadings -o sync_percent vg1/pvc-{uid} | grep -q 100; do sleep 0.2; done"
                ))?;
                ensure!(crate::block::is_zero(node, &device, 1)?, "{layout}: old bytes show once it is in sync");
            }
            let huge = expand(&service, &uid, 8192 * MIB)?;
            ensure!(huge["code"] == "ResourceExhausted", "{layout}: {huge}");
            node.sh("kill $(cat /run/holder); while pgrep -F /run/holder > /dev/null; do sleep 0.1; done")?;
            delete(&service, &uid)?;
        }
        Ok(())
    })
}

fn thin(node: &Node) -> Result<()> {
    let disks = Disks::make(node)?;
    let (first, second, third) = (uid(0x790), uid(0x791), uid(0x792));
    // The node has none, or it is not what it should be.
    {
        let service = Service::start(node)?;
        let none = create(&service, &first, 320 * MIB, &["layout=thin"])?;
        refused(&none, "FailedPrecondition", &["names no thin pool for volume group vg1"])?;
        ensure!(service.ask(&["capacity", "volumeGroup=vg1", "layout=thin"])?["largest"] == 0);
    }
    configured(node, THIN_POOL, || {
        let service = Service::start(node)?;
        let none = create(&service, &first, 320 * MIB, &["layout=thin"])?;
        refused(&none, "FailedPrecondition", &["vg1 has no thin pool pool0", "lvcreate --type thin-pool"])?;
        node.sh("lvcreate -qq -y --type thin-pool -Zn -L 1g -n pool0 vg1")?;
        let open = create(&service, &first, 320 * MIB, &["layout=thin"])?;
        refused(&open, "FailedPrecondition", &["does not zero", "lvchange --zero y vg1/pool0"])?;
        node.sh("lvchange -qq --zero y vg1/pool0; echo changed >> /run/lvprov/vg-vg1.lock")?;
        let group = reported(&service, |group| group["thin"] == 1024 * MIB)?;
        ensure!(group["layouts"].as_array().is_some_and(|all| all.contains(&"thin".into())), "{group}");
        let free = group["free"].as_u64().context("free")?;

        let ran = kinds(node, || {
            let made = create(&service, &first, 321 * MIB, &["layout=thin"])?;
            ensure!(made["bytes"] == 324 * MIB, "{made}");
            reported(&service, |group| group["thin"] == 700 * MIB && group["free"] == free)?;
            node.sh(&format!(
                "for i in $(seq 100); do test $(grep -c 'lvm lvs' {}) = 2 && exit; sleep 0.1; done",
                crate::COMMANDS
            ))?;
            Ok(())
        })?;
        ensure!(ran == ["report: lvm lvs", "mutate: lvm lvcreate", "report: lvm vgs", "report: lvm lvs"], "{ran:?}");
        ensure!(create(&service, &first, 321 * MIB, &["layout=thin"])?["bytes"] == 324 * MIB);
        refused(&create(&service, &first, 321 * MIB, &[])?, "AlreadyExists", &["layout is thin and not linear"])?;
        let more = create(&service, &second, 704 * MIB, &["layout=thin"])?;
        refused(&more, "ResourceExhausted", &["vg1/pool0 has 700 MiB", "4 MiB are missing"])?;
        let said = service.ask(&["capacity", "volumeGroup=vg1", "layout=thin"])?;
        ensure!(said["largest"] == 700 * MIB && said["total"] == 700 * MIB, "{said}");

        let pod = data("default", "thin-1", &first);
        pod.mount(node)?.success()?;
        node.sh(&format!("echo kept > {}/file", pod.directory()))?;
        pod.expand(node, 400 * MIB)?.success()?;
        ensure!(expand(&service, &first, 500 * MIB)?["bytes"] == 500 * MIB);
        refused(&expand(&service, &first, 1025 * MIB)?, "ResourceExhausted", &["524 MiB that are not promised"])?;
        pod.expand(node, 1100 * MIB)?.failure(&["vg1/pool0", "not promised", "missing"])?;
        ensure!(disks.size(&first)? == 500 * MIB);
        pod.expand(node, 500 * MIB)?.success()?;
        ensure!(node.read_file(&format!("{}/file", pod.directory()))? == "kept");
        // It takes of the pool what has been written, and no more.
        let used: f64 = node.run(["lvs", "--noheadings", "-o", "data_percent", "vg1/pool0"])?.trim().parse()?;
        ensure!(used < 30.0, "{used} percent of the pool are used");
        ensure!(create(&service, &second, 524 * MIB, &["layout=thin"])?["bytes"] == 524 * MIB);
        reported(&service, |group| group["thin"] == 0)?;
        let full = create(&service, &third, 320 * MIB, &["layout=thin"])?;
        refused(&full, "ResourceExhausted", &["320 MiB are missing"])?;
        pod.unmount(node)?.success()?;
        // After a reboot, say.
        node.run(["vgchange", "-qq", "-an", "vg1"])?;
        pod.mount(node)?.success()?;
        ensure!(node.read_file(&format!("{}/file", pod.directory()))? == "kept");
        pod.unmount(node)?.success()
    })?;
    configured(node, r#""thinPools":{"vg1":{"pool":"pool0","overProvisioning":1.5}}"#, || {
        let service = Service::start(node)?;
        reported(&service, |group| group["thin"] == 512 * MIB)?;
        ensure!(create(&service, &third, 512 * MIB, &["layout=thin"])?["bytes"] == 512 * MIB);
        for claim in [&first, &second, &third] {
            delete(&service, claim)?;
        }
        reported(&service, |group| group["thin"] == 1536 * MIB)?;
        let left = node.run(["lvs", "--noheadings", "-o", "lv_name", "vg1"])?;
        ensure!(left.trim() == "pool0", "{left}");
        Ok(())
    })
}

/// As an lvcreate leaves it that is cut off: LVM knows it, its pool does not.
fn half_of_a_thin_volume(node: &Node) -> Result<()> {
    let _disks = Disks::make(node)?;
    node.sh("lvcreate -qq -y --type thin-pool -L 1g -n pool0 vg1")?;
    configured(node, THIN_POOL, || {
        let service = Service::start(node)?;
        let claim = uid(0x7a0);
        create(&service, &claim, 320 * MIB, &["layout=thin"])?;
        node.sh(&format!(
            "id=$(lvs --noheadings -o thin_id vg1/pvc-{claim} | tr -d ' '); lvchange -qq -an vg1/pvc-{claim}; \
             dmsetup message vg1-pool0-tpool 0 \"delete $id\""
        ))?;
        ensure!(!node.exec(["lvchange", "-ay", &format!("vg1/pvc-{claim}")])?.success(), "its pool knows it");
        let again = create(&service, &claim, 320 * MIB, &["layout=thin"])?;
        ensure!(again["bytes"] == 320 * MIB, "{again}");
        let pod = data("default", "thin-half", &claim);
        pod.mount(node)?.success()?;
        pod.unmount(node)?.success()?;
        delete(&service, &claim)
    })
}
