//! The lvm that the node service keeps (`keepLvm`).

use anyhow::{Context, Result, ensure};
use lvprov_tests::Test;
use xtask::testbed::Node;

use crate::service::Service;
use crate::{COMMANDS, configured, uid};

pub const TESTS: [Test<Node>; 4] = [
    ("shell::one_lvm_makes_finds_and_removes_volumes", one),
    ("shell::others_change_the_group_in_between", others),
    ("shell::killed_service_or_lvm_leaves_no_lock", killed),
    ("shell::without_it_each_command_is_a_process", without),
];

/// Process ids of those that read commands: lvm without arguments.
const SHELLS: &str = "for p in /proc/[0-9]*; do test \"$(tr '\\0' ' ' < $p/cmdline 2> /dev/null)\" = '/usr/sbin/lvm ' && \
                      echo ${p#/proc/}; done; true";

fn shells(node: &Node) -> Result<Vec<String>> {
    Ok(node.sh(SHELLS)?.lines().map(str::to_owned).collect())
}

fn the_shell(node: &Node) -> Result<String> {
    let mut all = shells(node)?;
    ensure!(all.len() == 1, "lvm that stay: {all:?}");
    all.pop().context("one")
}

fn one(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    let uids: Vec<String> = (0x7000..0x7004).map(uid).collect();
    for uid in &uids {
        service.create(uid)?;
    }
    let first = the_shell(node)?;
    // The same again: this one is found in a report of it.
    service.create(&uids[0])?;
    let tags = node.sh(&format!("lvs --noheadings -o tags vg0/pvc-{}", uids[0]))?;
    ensure!(tags.contains(&format!("lvprov.io/claim-uid={}", uids[0])), "{tags}");
    let asked = service.ask(&["create", &uid(0x7005), "99999999995904"])?;
    ensure!(asked["message"].as_str().is_some_and(|message| message.contains("free")), "{asked}");
    // What LVM itself says of a refusal is told as a process would have told it.
    node.sh("vgchange -qq --logicalvolume $(vgs --noheadings -o lv_count vg0 | tr -d ' ') vg0")?;
    let refused = service.ask(&["create", &uid(0x7006), "335544320"]);
    node.sh("vgchange -qq --logicalvolume 0 vg0")?;
    let refused = refused?;
    ensure!(
        refused["message"].as_str().is_some_and(|message| message.contains("Maximum number of logical volumes")),
        "{refused}"
    );
    for uid in &uids {
        service.delete(uid)?;
        ensure!(node.sh(&format!("test ! -e /dev/vg0/pvc-{uid} && echo gone"))?.trim() == "gone");
    }
    ensure!(the_shell(node)? == first, "it was started again");
    let log = node.read_file(COMMANDS)?;
    ensure!(log.matches("lvm lvcreate").count() >= 5 && log.matches("lvm lvremove").count() == 4, "{log}");
    let changes = log.lines().filter(|line| line.contains("\"mutate\""));
    ensure!(changes.clone().all(|line| line.contains("\"process\":false")), "{log}");
    ensure!(log.matches("\"command\":\"lvm\"").count() == 1, "{log}");
    // With nothing more to do it goes.
    node.sh("for i in $(seq 90); do test -d /proc/PID || exit 0; sleep 1; done; false".replace("PID", &first).as_str())
        .context("it stays without anything to do")?;
    Ok(())
}

fn others(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    service.create(&uid(0x7010))?;
    // What this lvm has read of the group is no longer true.
    node.sh("lvcreate -qq -y -L 320M -n others-a vg0 && lvremove -qq -y vg0/others-a && lvcreate -qq -y -L 64M -n others-b vg0")?;
    service.create(&uid(0x7011))?;
    node.sh(&format!("lvremove -qq -y vg0/pvc-{}", uid(0x7010)))?;
    service.create(&uid(0x7010))?;
    node.sh("vgck vg0 && lvs --noheadings -o lv_name vg0/others-b && lvremove -qq -y vg0/others-b")?;
    // The lock file goes, as with a cleaned /run: the next lock is that of the new file.
    let before = the_shell(node)?;
    node.sh("rm /run/lvprov/vg-vg0.lock")?;
    service.create(&uid(0x7012))?;
    node.sh(&format!("for i in $(seq 50); do test -d /proc/{before} || exit 0; sleep 0.1; done; false"))
        .context("the earlier lvm stays")?;
    the_shell(node)?;
    for number in [0x7010, 0x7011, 0x7012] {
        service.delete(&uid(number))?;
    }
    Ok(())
}

fn killed(node: &Node) -> Result<()> {
    let free = "timeout 60 flock /run/lvprov/vg-vg0.lock true";
    let service = Service::start(node)?;
    service.create(&uid(0x7020))?;
    // A free lock is free, though it is open there.
    node.sh(free)?;
    // The lvm is killed: the next command has another.
    let first = the_shell(node)?;
    node.sh(&format!("kill -9 {first}"))?;
    service.create(&uid(0x7021))?;
    ensure!(the_shell(node)? != first);
    // Stopped in the midst: whoever kills the service does not free the lock.
    let second = the_shell(node)?;
    node.sh(&format!("kill -STOP {second}"))?;
    let _ = service.call(&["create", &uid(0x7022), "335544320", "--patience-ms", "1500"]);
    node.sh(&format!("kill -9 {}", service.pid()?))?;
    ensure!(
        !node.exec(["sh", "-c", "timeout 2 flock /run/lvprov/vg-vg0.lock true"])?.success(),
        "the lock is free while a command is under way"
    );
    // It goes on, does the one command to its end, and ends itself.
    node.sh(&format!("kill -CONT {second}"))?;
    node.sh(free)?;
    ensure!(shells(node)?.is_empty(), "it stays");
    node.sh(&format!("lvs vg0/pvc-{}", uid(0x7022))).context("its command was not done to the end")?;
    let service = Service::start(node)?;
    for number in [0x7020, 0x7021, 0x7022] {
        service.delete(&uid(number))?;
    }
    Ok(())
}

fn without(node: &Node) -> Result<()> {
    configured(node, r#""keepLvm":false"#, || {
        let service = Service::start(node)?;
        service.create(&uid(0x7030))?;
        service.delete(&uid(0x7030))?;
        ensure!(shells(node)?.is_empty(), "one stays without being asked for");
        let log = node.read_file(COMMANDS)?;
        ensure!(
            log.contains("lvm lvcreate") && log.contains("lvm lvremove") && !log.contains("\"process\":false"),
            "{log}"
        );
        Ok(())
    })
}
