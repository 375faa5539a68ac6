//! Log volumes: shared, bounded, kept.

use crate::lose_superblock;
use crate::service::Service;
use anyhow::{Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::driver::{Call, call};
use xtask::testbed::Node;

pub const TESTS: [Test<Node>; 13] = [
    ("logs::pods_share_a_volume_and_not_a_quota", quotas),
    ("logs::files_stay_at_their_path_when_the_pod_has_gone", files_stay),
    ("logs::size_means_at_least", at_least),
    ("logs::a_changed_quota_counts_at_the_next_mount", changed_quota),
    ("logs::twenty_pods_at_once", twenty_at_once),
    ("logs::the_volume_comes_back_after_deactivation", comes_back),
    ("logs::a_busy_directory_is_not_unmounted_by_force", busy),
    ("logs::a_pod_that_joins_its_neighbours_project_gains_nothing", stolen_project),
    ("logs::empty_files_have_a_limit_too", many_files),
    ("logs::a_growth_that_was_cut_off_is_finished", growth_cut_off),
    ("logs::a_volume_that_was_never_formatted_is_repaired", half_made),
    ("logs::the_mark_of_a_new_volume_does_not_outlive_its_first_pod", mark_left),
    ("logs::mounts_are_nodev_nosuid_noexec_and_can_be_read_only", flags),
];

fn fill(node: &Node, directory: &str, mib: u32) -> Result<bool> {
    let output =
        node.exec(["dd", "if=/dev/zero", &format!("of={directory}/fill"), "bs=1M", &format!("count={mib}")])?;
    ensure!(
        output.success() || output.stderr.contains("No space left") || output.stderr.contains("quota exceeded"),
        "{}",
        output.stderr
    );
    Ok(output.success())
}

fn quotas(node: &Node) -> Result<()> {
    let a = Call::log("logs", "web-a", "logs-1a", "shared");
    let b = Call::log("logs", "web-b", "logs-1b", "shared");
    a.mount(node)?.success()?;
    b.mount(node)?.success()?;
    ensure!(!fill(node, &a.directory(), 120)?, "120 MiB fit into a quota of 100 MiB");
    ensure!(fill(node, &b.directory(), 90)?, "the neighbour of a full directory has no room");
    let volumes = node.sh("lvs --noheadings -o lv_tags vg0 | grep -c 'log=logs/shared'")?;
    ensure!(volumes == "1", "{volumes} volumes");
    // Neither sees the other.
    let seen = node.run(["ls", "-A", &b.directory()])?;
    ensure!(seen == "fill", "{seen}");
    // Another namespace's volume of the same name is another one.
    let other = Call::log("logs2", "web-a", "logs-1c", "shared");
    other.mount(node)?.success()?;
    ensure!(node.run(["ls", "-A", &other.directory()])?.is_empty());
    for call in [a, b, other] {
        call.unmount(node)?.success()?;
    }
    Ok(())
}

fn files_stay(node: &Node) -> Result<()> {
    let call = Call::log("logs", "web-a", "logs-2", "kept");
    call.mount(node)?.success()?;
    node.sh(&format!("echo line > {}/app.log", call.directory()))?;
    call.unmount(node)?.success()?;
    node.run(["rmdir", &call.directory()])?;
    ensure!(node.read_file("/var/log/lvprov/logs/kept/web-a/app.log")? == "line");
    // The pod made again under its name finds its files.
    let again = Call::log("logs", "web-a", "logs-2b", "kept");
    again.mount(node)?.success()?;
    ensure!(node.read_file(&format!("{}/app.log", again.directory()))? == "line");
    again.unmount(node)?.success()
}

fn at_least(node: &Node) -> Result<()> {
    let call = Call::log("logs", "web-a", "logs-3", "grows");
    let size = || -> Result<u64> {
        Ok(node.run(["stat", "-f", "-c", "%b", "/var/log/lvprov/logs/grows"])?.parse::<u64>()? * 4096)
    };
    call.mount(node)?.success()?;
    call.unmount(node)?.success()?;
    let first = size()?;
    let larger = call.clone().with("size", "2Gi");
    larger.mount(node)?.success()?;
    larger.unmount(node)?.success()?;
    ensure!(size()? > first + (900 << 20), "{first} -> {}", size()?);
    // A Deployment rolled back asks for less again, and is served.
    call.mount(node)?.success()?;
    ensure!(size()? > first + (900 << 20));
    call.unmount(node)?.success()?;
    call.with("size", "2Ti").mount(node)?.failure(&["vg0", "free", "missing"])
}

fn changed_quota(node: &Node) -> Result<()> {
    let call = Call::log("logs", "web-a", "logs-4", "requota");
    call.mount(node)?.success()?;
    ensure!(!fill(node, &call.directory(), 120)?);
    call.unmount(node)?.success()?;
    let more = call.with("quota", "200Mi");
    more.mount(node)?.success()?;
    ensure!(fill(node, &more.directory(), 150)?);
    more.unmount(node)?.success()
}

fn twenty_at_once(node: &Node) -> Result<()> {
    let calls: Vec<Call> = (0..20)
        .map(|i| Call::log("logs", &format!("web-{i}"), &format!("logs-5-{i}"), "crowd").with("quota", "8Mi"))
        .collect();
    std::thread::scope(|scope| {
        let all: Vec<_> = calls.iter().map(|call| scope.spawn(|| call.mount(node)?.success())).collect();
        all.into_iter().try_for_each(|one| one.join().unwrap_or_else(|_| anyhow::bail!("panic")))
    })?;
    let volumes = node.sh("lvs --noheadings -o lv_tags vg0 | grep -c 'log=logs/crowd'")?;
    ensure!(volumes == "1", "{volumes} volumes");
    for call in [&calls[0], &calls[19]] {
        ensure!(!fill(node, &call.directory(), 12)?, "{} has no quota of its own", call.uid);
    }
    ensure!(fill(node, &calls[7].directory(), 6)?);
    for call in &calls {
        call.unmount(node)?.success()?;
    }
    Ok(())
}

fn comes_back(node: &Node) -> Result<()> {
    let first = Call::log("logs", "web-a", "logs-6", "reboot");
    first.mount(node)?.success()?;
    node.sh(&format!("echo line > {}/app.log", first.directory()))?;
    first.unmount(node)?.success()?;
    // As a node is after a reboot: not mounted, not active, the run directory empty.
    node.sh("umount /var/log/lvprov/logs/reboot && rmdir /var/log/lvprov/logs/reboot && lvchange -an @lvprov.io/log=logs/reboot && rm -rf /run/lvprov")?;
    let second = Call::log("logs", "web-b", "logs-6b", "reboot");
    second.mount(node)?.success()?;
    ensure!(node.read_file("/var/log/lvprov/logs/reboot/web-a/app.log")? == "line");
    second.unmount(node)?.success()
}

fn busy(node: &Node) -> Result<()> {
    let log = Call::log("logs", "web-a", "logs-7", "busy");
    log.mount(node)?.success()?;
    let directory = log.directory();
    node.sh(&format!("cd {directory} && (sleep 60 >/dev/null 2>&1 & echo $! > /run/busy.pid)"))?;
    log.unmount(node)?.failure(&["cannot unmount", "busy"])?;
    ensure!(log.is_mounted(node)?);
    node.sh("kill $(cat /run/busy.pid); while kill -0 $(cat /run/busy.pid) 2>/dev/null; do sleep 0.1; done")?;
    // Something mounted further down is not passed over either.
    node.sh(&format!("mkdir {directory}/sub && mount -t tmpfs none {directory}/sub"))?;
    log.unmount(node)?.failure(&["still mounted below", "sub"])?;
    node.run(["umount", &format!("{directory}/sub")])?;
    log.unmount(node)?.success()?;
    ensure!(!log.is_mounted(node)?);
    // After a reboot kubelet unmounts what was never mounted.
    call(node, &["unmount", "/var/lib/kubelet/pods/never/volumes/lvprov.io~lvm/logs"])?.success()
}

fn flags(node: &Node) -> Result<()> {
    let call = Call::log("logs", "web-a", "logs-8", "flags").with("kubernetes.io/readwrite", "ro");
    call.mount(node)?.success()?;
    let options = node.run(["findmnt", "-n", "-o", "VFS-OPTIONS", &call.directory()])?;
    for flag in ["ro", "nodev", "nosuid", "noexec"] {
        ensure!(options.split(',').any(|o| o == flag), "{flag} is not in {options}");
    }
    let base = node.run(["findmnt", "-n", "-o", "VFS-OPTIONS", "/var/log/lvprov/logs/flags"])?;
    ensure!(base.split(',').any(|o| o == "rw"), "{base}");
    call.unmount(node)?.success()
}

/// Root in a container may change the project of its own files.
fn stolen_project(node: &Node) -> Result<()> {
    let a = Call::log("logs", "web-a", "logs-9a", "projects");
    let b = Call::log("logs", "web-b", "logs-9b", "projects");
    a.mount(node)?.success()?;
    b.mount(node)?.success()?;
    let base = "/var/log/lvprov/logs/projects";
    let project = |name: &str| node.sh(&format!("lsattr -pd {base}/{name} | awk '{{print $1}}'"));
    let (of_a, of_b) = (project("web-a")?, project("web-b")?);
    ensure!(of_a != of_b && of_a != "0", "{of_a} and {of_b}");
    a.unmount(node)?.success()?;
    node.run(["chattr", "-p", &of_b, &format!("{base}/web-a")])?;
    // Nor are the neighbour's figures shown as its own.
    ensure!(fill(node, &b.directory(), 5)?);
    let service = Service::start(node)?;
    let items = service.call(&["inventory"])?;
    let is_a = |item: &&serde_json::Value| item["path"] == format!("{base}/web-a");
    let shown = items.iter().find(is_a).and_then(|item| item["used"].as_u64());
    ensure!(shown.is_some_and(|used| used < 1 << 20), "{shown:?} bytes are shown for an empty directory");
    drop(service);
    a.with("quota", "1Mi").mount(node)?.success()?;
    ensure!(project("web-a")? == of_a, "the project is still the neighbour's");
    ensure!(fill(node, &b.directory(), 60)?, "the neighbour's limit has been changed");
    b.unmount(node)?.success()?;
    call(node, &["unmount", "/var/lib/kubelet/pods/logs-9a/volumes/lvprov.io~lvm/logs"])?.success()
}

fn many_files(node: &Node) -> Result<()> {
    let call = Call::log("logs", "web-a", "logs-10", "files").with("quota", "8Mi");
    call.mount(node)?.success()?;
    // 8 MiB are 512 files of 16 KiB.
    let script = format!(
        "cd {} && i=0; while [ $i -lt 700 ]; do : > f$i || exit 0; i=$((i+1)); done 2>/dev/null",
        call.directory()
    );
    node.exec(["sh", "-c", &script])?;
    let files: u32 = node.sh(&format!("ls {} | wc -l", call.directory()))?.trim().parse()?;
    ensure!((400..=512).contains(&files), "{files} files");
    call.unmount(node)?.success()
}

/// The power goes between lvextend and xfs_growfs.
fn growth_cut_off(node: &Node) -> Result<()> {
    let log = Call::log("logs", "web-a", "logs-11", "cutoff");
    log.mount(node)?.success()?;
    log.unmount(node)?.success()?;
    let base = "/var/log/lvprov/logs/cutoff";
    let mark = format!("import os; os.setxattr('{base}', 'trusted.lvprov.growing', b'1')");
    node.run(["python3", "-c", &mark])?;
    node.sh("lvextend -qq -L 2g $(lvs --noheadings -o lv_full_name @lvprov.io/log=logs/cutoff)")?;
    let blocks = || -> Result<u64> { Ok(node.run(["stat", "-f", "-c", "%b", base])?.parse()?) };
    let before = blocks()?;
    log.with("size", "2Gi").mount(node)?.success()?;
    ensure!(blocks()? > before + (900 << 8), "{before} -> {} blocks", blocks()?);
    call(node, &["unmount", "/var/lib/kubelet/pods/logs-11/volumes/lvprov.io~lvm/logs"])?.success()
}

/// The power goes after lvcreate has made the volume and before it has wiped
/// it: a former owner's file system shows.
fn half_made(node: &Node) -> Result<()> {
    let name = lvm::names::LvName::for_log(&"logs".parse()?, &"half".parse()?);
    node.sh(&format!(
        "lvcreate -qq -y -n {name} -L 1g --addtag lvprov.io/kind=log --addtag lvprov.io/log=logs/half \
         --addtag lvprov.io/new vg0 && mkfs.xfs -q -f /dev/vg0/{name}"
    ))?;
    let call = Call::log("logs", "web-a", "logs-12", "half");
    call.mount(node)?.success()?;
    call.unmount(node)?.success()?;
    // In use once, it is never formatted again.
    node.run(["umount", "/var/log/lvprov/logs/half"])?;
    lose_superblock(node, &format!("/dev/vg0/{name}"))?;
    call.mount(node)?.failure(&["has had one", "Nothing is formatted"])
}

/// The driver was killed between mkfs and taking the mark off: the volume was
/// mounted and written to, and still counted as never used.
fn mark_left(node: &Node) -> Result<()> {
    let (namespace, volume) = ("logs".parse()?, "marked".parse()?);
    let name = lvm::names::LvName::for_log(&namespace, &volume);
    let uuid = lvm::identity::log_uuid(&namespace, &volume);
    node.sh(&format!(
        "lvcreate -qq -y -W y -Z y -n {name} -L 1g --addtag lvprov.io/kind=log --addtag lvprov.io/log=logs/marked \
         --addtag lvprov.io/new vg0 && mkfs.xfs -q -m uuid={uuid} /dev/vg0/{name}"
    ))?;
    let call = Call::log("logs", "web-a", "logs-marked", "marked");
    call.mount(node)?.success()?;
    let tags = node.run(["lvs", "--noheadings", "-o", "lv_tags", &format!("vg0/{name}")])?;
    ensure!(tags.contains("log=logs/marked") && !tags.contains("lvprov.io/new"), "{tags}");
    call.unmount(node)?.success()
}
