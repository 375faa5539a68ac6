//! Hosts that are not as most are, and what an admin does to one that runs:
//! docs/operations.md, "Hosts as they are".

use crate::service::Service;
use crate::{create, uid};
use anyhow::{Context, Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::driver::{Call, call};
use serde_json::Value;
use xtask::testbed::{Node, NodeOptions};

pub const TESTS: [Test<Node>; 4] = [
    ("hosts::another_kubelet_root", another_root),
    ("hosts::a_read_only_usr_and_another_plugin_directory", read_only_usr),
    ("hosts::no_call_fails_while_the_driver_is_replaced", replaced),
    ("hosts::an_uninstalled_driver_leaves_mounts_that_can_be_undone_by_hand", uninstalled),
];

const OPERATIONS: &str = include_str!("../../docs/operations.md");
const PLUGINS: &str = "/usr/libexec/kubernetes/kubelet-plugins/volume/exec";

fn another_root(node: &Node) -> Result<()> {
    create(node, "default", &uid(0x500), "320m")?;
    let data = Call::data("default", "web-0", "hosts-1", &uid(0x500));
    let log = Call::log("hosts", "web-a", "hosts-2", "elsewhere");
    let directory = |call: &Call| call.directory().replace("/var/lib/kubelet", "/srv/kubelet");
    for volume in [&data, &log] {
        node.run(["mkdir", "-p", &directory(volume)])?;
        call(node, &["mount", &directory(volume), &volume.json()])?.success()?;
        node.sh(&format!("mountpoint -q {0} && touch {0}/file", directory(volume)))?;
        ensure!(!volume.is_mounted(node)?, "it is mounted below the usual root");
    }
    let service = Service::start_in(node, "", "--tls-dir /run/lvprov-tls/node --kubelet-root /srv/kubelet")?;
    node.run(["test", "-S", "/srv/kubelet/plugins/lvm.lvprov.io/csi.sock"])?;
    node.run(["test", "-S", "/srv/kubelet/plugins_registry/lvm.lvprov.io@reg.sock"])?;
    let items = service.call(&["inventory"])?;
    for volume in [&data, &log] {
        let found = items.iter().any(|item| item["kind"] == "mount" && item["target"] == directory(volume).as_str());
        ensure!(found, "{} is not in {items:#?}", directory(volume));
        call(node, &["unmount", &directory(volume)])?.success()?;
        node.run(["rmdir", &directory(volume)])?;
    }
    ensure!(!service.call(&["inventory"])?.iter().any(|item| item["kind"] == "mount"), "mounts that are gone");
    Ok(())
}

/// A copy of the driver without symbols; `more` bytes at its end make it another
/// version that does the same.
fn version(node: &Node, name: &str, more: &str) -> Result<()> {
    node.sh(&format!(
        "strip -o /run/{name} $(readlink -f /usr/local/bin/lvprov-flexvolume); printf '{more}' >> /run/{name}"
    ))?;
    Ok(())
}

fn read_only_usr(node: &Node) -> Result<()> {
    version(node, "driver-ro", "")?;
    let volume = Call::log("hosts", "web-a", "hosts-3", "plugins");
    let (directory, json) = (volume.directory(), volume.json());
    // In a mount namespace of its own: the other tests need /usr as it was.
    let script = format!(
        "rm -rf {PLUGINS}\n\
         mount --bind /usr /usr && mount -o remount,bind,ro /usr\n\
         if lvprov install-driver --source /run/driver-ro > /run/refused 2>&1; then exit 1; fi\n\
         lvprov install-driver --source /run/driver-ro --plugin-dir /var/lib/kubelet/volume-plugins > /dev/null 2>&1\n\
         driver=/var/lib/kubelet/volume-plugins/lvprov.io~lvm/lvm\n\
         mkdir -p {directory}\n\
         $driver init\n\
         $driver mount {directory} '{json}'\n\
         mountpoint -q {directory}\n\
         echo line > {directory}/file\n\
         $driver unmount {directory}\n\
         rmdir {directory}"
    );
    let said = node.run(["unshare", "-m", "sh", "-ec", &script])?;
    let answers =
        said.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>().with_context(|| said.clone())?;
    ensure!(answers.len() == 3 && answers.iter().all(|answer| answer["status"] == "Success"), "{said}");
    let refused = node.read_file("/run/refused")?;
    ensure!(refused.contains("kubelet-plugins") && refused.contains("Read-only file system"), "{refused}");
    Ok(())
}

fn replaced(node: &Node) -> Result<()> {
    version(node, "driver-1", "1")?;
    version(node, "driver-2", "2")?;
    let install = "lvprov install-driver --source";
    let storm = format!(
        "{} --driver '{PLUGINS}/lvprov.io~lvm/lvm' --rounds 6 --namespace hosts --volume upgrade",
        env!("CARGO_BIN_EXE_storm")
    );
    let script = format!(
        "{install} /run/driver-1 > /dev/null 2>&1\n\
         {storm} > /run/storm.out 2>&1 & storm=$!\n\
         count=0\n\
         while kill -0 $storm 2> /dev/null; do\n\
           for number in 2 1; do\n\
             {install} /run/driver-$number > /run/install.out 2>&1 || {{ cat /run/install.out; exit 1; }}\n\
             count=$((count + 1))\n\
           done\n\
         done\n\
         wait $storm || {{ cat /run/storm.out; exit 1; }}\n\
         cat /run/storm.out\n\
         echo $count"
    );
    let said = node.sh(&script)?;
    eprintln!("upgrade: {}", said.replace('\n', ", replaced: "));
    let count: u32 = said.lines().last().context("a count")?.parse()?;
    ensure!(count >= 6, "the driver was replaced {count} times only");
    let left = node.sh(&format!("cd {PLUGINS} && find . -mindepth 1"))?;
    ensure!(left == "./lvprov.io~lvm\n./lvprov.io~lvm/lvm", "{left}");
    Ok(())
}

/// The commands that docs/operations.md gives, word by word.
const UNMOUNT_PODS: &str = "findmnt -rno TARGET | grep '/volumes/lvprov.io~lvm/' | xargs -r umount";
const UNMOUNT_LOGS: &str = "findmnt -rno TARGET | grep '^/var/log/lvprov/' | xargs -r umount";

fn uninstalled(_: &Node) -> Result<()> {
    for step in [UNMOUNT_PODS, UNMOUNT_LOGS] {
        ensure!(OPERATIONS.contains(step), "docs/operations.md does not say {step}");
    }
    // The steps are for a whole node: one of its own.
    let node = Node::boot_with(NodeOptions { memory_mib: 512, ..NodeOptions::default() })?;
    version(&node, "driver", "")?;
    let install = "lvprov install-driver --source /run/driver 2>&1";
    node.sh(install)?;
    let driver = format!("{PLUGINS}/lvprov.io~lvm/lvm");
    create(&node, "hosts", &uid(0x501), "320m")?;
    let data = Call::data("hosts", "web-0", "hosts-4", &uid(0x501));
    let log = Call::log("hosts", "web-a", "hosts-5", "left");
    for volume in [&data, &log] {
        node.run(["mkdir", "-p", &volume.directory()])?;
        node.run([driver.as_str(), "mount", &volume.directory(), &volume.json()])?;
    }
    node.run(["rm", "-r", &format!("{PLUGINS}/lvprov.io~lvm")])?;
    // What is mounted stays so, and pods go on.
    for volume in [&data, &log] {
        ensure!(volume.is_mounted(&node)?);
        node.sh(&format!("echo kept > {}/file", volume.directory()))?;
    }
    node.sh(UNMOUNT_PODS)?;
    for volume in [&data, &log] {
        ensure!(!volume.is_mounted(&node)?);
    }
    ensure!(node.read_file("/var/log/lvprov/hosts/left/web-a/file")? == "kept");
    node.sh(UNMOUNT_LOGS)?;
    let open = node.sh("lvs --noheadings -o lv_name,lv_attr vg0 | grep -c ' .....o' || true")?;
    ensure!(open.trim() == "0", "{}", node.run(["lvs"])?);
    // Installed again, it has nothing to undo, and finds all as it was left.
    node.sh(install)?;
    for volume in [&data, &log] {
        node.run([driver.as_str(), "unmount", &volume.directory()])?;
        node.run([driver.as_str(), "mount", &volume.directory(), &volume.json()])?;
        ensure!(node.read_file(&format!("{}/file", volume.directory()))? == "kept");
        node.run([driver.as_str(), "unmount", &volume.directory()])?;
    }
    Ok(())
}
