//! The node service on real LVM, called as the controller calls it.

use crate::{COMMANDS, kinds, lose_superblock, uid};
use anyhow::{Context, Result, bail, ensure};
use lvprov_tests::Test;
use lvprov_tests::driver::Call;
use serde_json::Value;
use std::thread::sleep;
use std::time::{Duration, Instant};
use xtask::testbed::Node;

pub const TESTS: [Test<Node>; 18] = [
    ("service::a_creation_is_one_change_and_one_report", one_creation),
    ("service::the_same_request_is_the_same_volume", same_request),
    ("service::an_old_volume_without_its_superblock_is_not_made_anew", damaged_and_old),
    ("service::a_volume_in_use_anywhere_is_not_removed", in_use),
    ("service::what_is_not_ours_is_left", not_ours),
    ("service::changes_by_driver_and_admin_are_reported", reported),
    ("service::an_idle_node_runs_nothing", idle),
    ("service::works_on_the_host_from_inside_a_container", in_container),
    ("service::a_call_given_up_goes_on_and_is_found_again", given_up),
    ("service::killed_during_eight_creations_it_makes_eight", killed),
    ("service::told_to_stop_it_finishes_and_leaves_kubelet", stopped),
    ("service::inventory_shows_everything_of_ours", inventory),
    ("service::collect_removes_what_it_is_told_and_no_more", collect),
    ("service::collect_tells_used_volumes_from_unused_ones", collect_unused),
    ("service::log_volumes_are_mounted_again_after_a_reboot", logs_after_reboot),
    ("service::metrics_cost_no_process_and_are_for_their_readers", metrics),
    ("service::unmounts_that_keep_failing_are_told", failing_unmounts),
    ("service::an_index_learns_of_containers_as_they_start", index),
];

const MIB: u64 = 1 << 20;
const SIZE: &str = "335544320";
/// What it writes.
pub const LOG: &str = "/run/lvprov-node.log";
const REGISTRATION: &str = "/var/lib/kubelet/plugins_registry/lvm.lvprov.io@reg.sock";

/// A running `lvprov node`; killed when dropped.
pub(crate) struct Service<'a> {
    node: &'a Node,
}

impl<'a> Service<'a> {
    pub(crate) fn start(node: &'a Node) -> Result<Self> {
        Self::start_in(node, "", "--tls-dir /run/lvprov-tls/node")
    }

    /// `before`: shell commands of its container. `options`: further ones.
    pub(crate) fn start_in(node: &'a Node, before: &str, options: &str) -> Result<Self> {
        let run = format!(
            "{before}\necho $$ > /run/lvprov-node.pid\n\
             exec lvprov node --node-name n1 {options}\n"
        );
        node.write_file("/run/lvprov-node.sh", run)?;
        node.sh(&format!(
            ": > {COMMANDS}\ntest -d /run/lvprov-tls || lvprov certificates --directory /run/lvprov-tls\n\
             rm -f /run/lvprov-node.status\n\
             setsid sh -c '{} > {LOG} 2>&1; echo $? > /run/lvprov-node.status' < /dev/null > /dev/null 2>&1 &",
            if before.is_empty() { "sh /run/lvprov-node.sh" } else { "unshare -m -i sh /run/lvprov-node.sh" }
        ))?;
        let service = Self { node };
        let begun = Instant::now();
        // It answers only after its first report.
        while !service.call(&["watch", "1"]).is_ok_and(|answers| answers[0]["vg"] == "vg0") {
            if begun.elapsed() > Duration::from_secs(90) {
                bail!("the node service does not answer:\n{}", node.read_file(LOG).unwrap_or_default());
            }
            sleep(Duration::from_millis(100));
        }
        // At start it also looks for log volumes to mount; from then on it is idle.
        node.sh(&format!(
            "for i in $(seq 100); do grep -q 'lvm lvs' {COMMANDS} && exit; sleep 0.1; done; echo no report of volumes; false"
        ))?;
        Ok(service)
    }

    pub(crate) fn call(&self, args: &[&str]) -> Result<Vec<Value>> {
        let mut argv = vec![env!("CARGO_BIN_EXE_node-call")];
        argv.extend(args);
        let output = self.node.exec(argv)?;
        let answers = output.stdout.lines().map(|line| Ok(serde_json::from_str(line)?)).collect::<Result<Vec<_>>>();
        let answers = answers.with_context(|| format!("{}{}", output.stdout, output.stderr))?;
        ensure!(output.success() || !answers.is_empty(), "{}", output.stderr);
        Ok(answers)
    }

    /// One answer.
    pub(crate) fn ask(&self, args: &[&str]) -> Result<Value> {
        let mut answers = self.call(args)?;
        ensure!(answers.len() == 1, "{answers:?}");
        Ok(answers.remove(0))
    }

    pub(crate) fn create(&self, uid: &str) -> Result<()> {
        let answer = self.ask(&["create", uid, SIZE])?;
        ensure!(answer["id"] == format!("vg0/pvc-{uid}") && answer["bytes"] == 320 * MIB, "{answer}");
        Ok(())
    }

    pub(crate) fn delete(&self, uid: &str) -> Result<Value> {
        self.ask(&["delete", &format!("vg0/pvc-{uid}")])
    }

    pub(crate) fn free(&self) -> Result<u64> {
        self.ask(&["watch", "1"])?["free"].as_u64().context("free")
    }

    /// Waits until capacity is reported like this.
    pub(crate) fn until_free(&self, free: u64) -> Result<()> {
        let begun = Instant::now();
        loop {
            let now = self.free()?;
            if now == free {
                return Ok(());
            }
            ensure!(begun.elapsed() < Duration::from_secs(60), "{now} B are reported as free, not {free} B");
            sleep(Duration::from_millis(100));
        }
    }

    /// Waits until it has asked LVM what its groups have.
    pub(crate) fn until_reported(&self) -> Result<()> {
        self.node
            .sh(&format!("for i in $(seq 600); do grep -q 'lvm vgs' {COMMANDS} && exit; sleep 0.1; done; false"))
            .context("the node service has not asked for its groups")?;
        Ok(())
    }

    /// Waits until it has nothing more to do: a new log volume changes its group twice.
    fn idle(&self, free: u64) -> Result<()> {
        self.until_free(free)?;
        sleep(Duration::from_secs(2));
        Ok(())
    }

    pub(crate) fn pid(&self) -> Result<String> {
        Ok(self.node.read_file("/run/lvprov-node.pid")?.trim().to_owned())
    }

    /// The metrics, or what is said instead, to the holder of a certificate.
    pub fn metrics(&self, holder: &str) -> Result<xtask::testbed::Output> {
        let tls = format!("/run/lvprov-tls/{holder}");
        let call = env!("CARGO_BIN_EXE_node-call");
        self.node.exec([call, "--address", "127.0.0.1:9809", "--tls-dir", tls.as_str(), "metrics"])
    }

    /// SIGTERM; gives the exit status.
    fn stop(self) -> Result<String> {
        self.node.run(["kill", &self.pid()?])?;
        self.status()
    }

    pub(crate) fn status(&self) -> Result<String> {
        self.node.sh(
            "for i in $(seq 300); do test -s /run/lvprov-node.status && break; sleep 0.1; done; cat /run/lvprov-node.status",
        )
    }
}

impl Drop for Service<'_> {
    fn drop(&mut self) {
        let _ = self.node.sh("test -s /run/lvprov-node.status || kill -9 $(cat /run/lvprov-node.pid); \
             for i in $(seq 100); do test -s /run/lvprov-node.status && break; sleep 0.1; done");
    }
}

fn exists(node: &Node, uid: &str) -> Result<bool> {
    Ok(node.exec(["lvs", &format!("vg0/pvc-{uid}")])?.success())
}

fn one_creation(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    let free = service.free()?;
    let create = || {
        kinds(node, || {
            service.create(&uid(0x200))?;
            // What is being made is no longer free at once; the report follows.
            service.until_free(free - 320 * MIB)?;
            service.until_reported()
        })
    };
    let mut ran = create()?;
    // On a busy machine the look at log volumes that belongs to the start may come late: once.
    if ran.first().is_some_and(|first| first == "report: lvm lvs") {
        service.delete(&uid(0x200))?;
        service.until_free(free)?;
        ran = create()?;
    }
    ensure!(ran == ["mutate: lvm lvcreate", "report: lvm vgs"], "{ran:?}");
    let tags = node.sh(&format!("lvs --noheadings -o lv_tags vg0/pvc-{}", uid(0x200)))?;
    let wanted = format!(
        "lvprov.io/claim-uid={},lvprov.io/claim=default/data,\
         lvprov.io/cluster=11111111-2222-4333-8444-555555555555,lvprov.io/kind=data",
        uid(0x200)
    );
    ensure!(tags.trim() == wanted, "{tags}");
    let ran = kinds(node, || {
        service.delete(&uid(0x200))?;
        service.until_free(free)
    })?;
    ensure!(ran == ["report: lvm lvs", "mutate: lvm lvremove", "report: lvm vgs"], "{ran:?}");
    ensure!(!exists(node, &uid(0x200))?);
    Ok(())
}

fn same_request(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    let id = uid(0x201);
    service.create(&id)?;
    service.create(&id)?;
    let refused = |args: &[&str], code: &str, words: &[&str]| {
        let answer = service.ask(args)?;
        let message = answer["message"].as_str().unwrap_or("");
        ensure!(answer["code"] == code, "{answer}");
        ensure!(words.iter().all(|word| message.contains(word)), "{answer}");
        Ok(())
    };
    refused(&["create", &id, "671088640"], "AlreadyExists", &["320 MiB", "640 MiB"])?;
    refused(&["create", &id, SIZE, "--claim", "other"], "AlreadyExists", &["another claim"])?;
    refused(&["create", &uid(0x202), SIZE, "--vg", "vg9"], "FailedPrecondition", &["no volume group vg9"])?;
    refused(&["create", &uid(0x202), SIZE, "--node", "n2"], "Unavailable", &["n2", "n1"])?;
    refused(&["create", &uid(0x202), "1048576"], "OutOfRange", &["too small for xfs"])?;
    refused(&["create", &uid(0x202), SIZE, "--fs", "zfs"], "InvalidArgument", &["zfs"])?;
    refused(&["create", &uid(0x202), "1099511627776"], "ResourceExhausted", &["1 TiB was asked for", "missing"])?;
    ensure!(!exists(node, &uid(0x202))?, "something was left behind");
    // A volume that has grown since still is the one asked for.
    node.run(["lvextend", "-qq", "-L", "400m", &format!("vg0/pvc-{id}")])?;
    let answer = service.ask(&["create", &id, SIZE])?;
    ensure!(answer["bytes"] == 400 * MIB, "{answer}");
    service.delete(&id)?;
    ensure!(!exists(node, &id)?);
    ensure!(service.delete(&id)?["deleted"] == true, "the second time");
    refused(&["delete", &format!("vg9/pvc-{id}")], "Unavailable", &["no volume group vg9", "disk missing"])?;
    Ok(())
}

/// The API server's data are from a backup, and say nothing of a volume that has
/// been in use since, and has lost its superblock: the claim asks for it again.
fn damaged_and_old(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    let id = uid(0x20e);
    service.create(&id)?;
    let call = Call::data("default", "web-0", "service-14", &id);
    call.mount(node)?.success()?;
    call.unmount(node)?.success()?;
    lose_superblock(node, &format!("/dev/vg0/pvc-{id}"))?;
    let lv_uuid = || node.run(["lvs", "--noheadings", "-o", "lv_uuid", &format!("vg0/pvc-{id}")]);
    let used = lv_uuid()?;
    // Made long ago, as lvs tells.
    node.sh(&format!(
        "vgcfgbackup -qq -f /run/vg0.cfg vg0\n\
         sed -i '/pvc-{id} {{/,/creation_time/ s/creation_time = .*/creation_time = 1700000000/' /run/vg0.cfg\n\
         vgcfgrestore -qq --yes --force -f /run/vg0.cfg vg0"
    ))?;
    let answer = service.ask(&["create", &id, SIZE])?;
    let message = answer["message"].as_str().unwrap_or("");
    ensure!(answer["code"] == "AlreadyExists" && message.contains("more than a day ago"), "{answer}");
    ensure!(lv_uuid()? == used, "it was made anew");
    // What to do is in the message.
    node.run(["lvremove", "-qq", "-y", &format!("vg0/pvc-{id}")])?;
    service.create(&id)?;
    // One made just now was cut off before it was marked, and is nobody's yet.
    let new = lv_uuid()?;
    lose_superblock(node, &format!("/dev/vg0/pvc-{id}"))?;
    service.create(&id)?;
    ensure!(lv_uuid()? != new, "it was not made anew");
    service.delete(&id)?;
    Ok(())
}

fn in_use(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    let id = uid(0x203);
    service.create(&id)?;
    let call = Call::data("default", "web-0", "service-1", &id);
    call.mount(node)?.success()?;
    // A mount namespace of its own, such as a container's, keeps the volume
    // after kubelet has unmounted it.
    let sleeper = node.sh("unshare -m sleep 600 < /dev/null > /dev/null 2>&1 & echo $!")?;
    node.sh(&format!("until grep -q {} /proc/{sleeper}/mountinfo; do sleep 0.05; done", call.uid))?;
    let refused = |when: &str| {
        let answer = service.delete(&id)?;
        ensure!(answer["code"] == "FailedPrecondition", "{when}: {answer}");
        ensure!(exists(node, &id)?);
        Ok(())
    };
    refused("mounted")?;
    call.unmount(node)?.success()?;
    refused("mounted elsewhere")?;
    node.sh(&format!("kill {sleeper}; while test -d /proc/{sleeper}; do sleep 0.05; done"))?;
    ensure!(service.delete(&id)?["deleted"] == true);
    ensure!(!exists(node, &id)?);
    Ok(())
}

fn not_ours(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    let id = uid(0x204);
    // The name of one of ours, and no tags.
    node.run(["lvcreate", "-qq", "-y", "-n", &format!("pvc-{id}"), "-L", "320m", "vg0"])?;
    let answer = service.delete(&id)?;
    ensure!(answer["code"] == "PermissionDenied", "{answer}");
    let answer = service.ask(&["create", &id, SIZE])?;
    ensure!(answer["code"].is_string(), "a volume without our tags was given out: {answer}");
    ensure!(!service.call(&["inventory"])?.iter().any(|item| item.to_string().contains(&id)));
    ensure!(exists(node, &id)?);
    node.run(["lvremove", "-qq", "-y", &format!("vg0/pvc-{id}")])?;
    Ok(())
}

fn reported(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    let free = service.free()?;
    node.run(["lvcreate", "-qq", "-y", "-n", "by-hand", "-L", "128m", "vg0"])?;
    service.until_free(free - 128 * MIB)?;
    node.run(["lvremove", "-qq", "-y", "vg0/by-hand"])?;
    service.until_free(free)?;
    let call = Call::log("service", "web-a", "service-2", "reported");
    call.mount(node)?.success()?;
    service.until_free(free - 1024 * MIB)?;
    call.unmount(node)?.success()
}

fn idle(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    kinds(node, || {
        service.create(&uid(0x205))?;
        service.until_reported()
    })?;
    sleep(Duration::from_secs(2));
    let ran = kinds(node, || {
        for _ in 0..3 {
            service.free()?;
            sleep(Duration::from_secs(2));
        }
        Ok(())
    })?;
    ensure!(ran.is_empty(), "{ran:?}");
    service.delete(&uid(0x205))?;
    Ok(())
}

fn in_container(node: &Node) -> Result<()> {
    // Neither device nodes, nor locks, nor an lvm: only the host's can do it.
    let before = "mount -t tmpfs none /dev/mapper && mount -t tmpfs none /run/lock && mount -t tmpfs none /etc/lvm\n\
                  mkdir -p /tmp/tls && mount -t tmpfs none /tmp/tls && cp /run/lvprov-tls/node/* /tmp/tls\n\
                  for tool in lvm mkfs.xfs; do mount --bind /bin/false $(readlink -f $(command -v $tool)); done";
    let service = Service::start_in(node, before, "--tls-dir /tmp/tls --host-mount-namespace")?;
    let pid = service.pid()?;
    for namespace in ["mnt", "ipc"] {
        let same = node.sh(&format!("readlink /proc/1/ns/{namespace} /proc/{pid}/ns/{namespace} | uniq | wc -l"))?;
        ensure!(same.trim() == "1", "not in the {namespace} namespace of the host");
    }
    service.create(&uid(0x206))?;
    ensure!(node.exec(["test", "-b", &format!("/dev/vg0/pvc-{}", uid(0x206))])?.success());
    service.delete(&uid(0x206))?;
    ensure!(service.stop()? == "0");
    Ok(())
}

fn given_up(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    let id = uid(0x207);
    let answer = service.ask(&["create", &id, SIZE, "--patience-ms", "20"])?;
    ensure!(answer["code"] == "Cancelled" || answer["code"] == "DeadlineExceeded", "{answer}");
    // Meanwhile the volume is worked on, afterwards it is there.
    let begun = Instant::now();
    loop {
        let answer = service.ask(&["create", &id, SIZE])?;
        if answer["code"] != "Aborted" {
            ensure!(answer["bytes"] == 320 * MIB, "{answer}");
            break;
        }
        ensure!(begun.elapsed() < Duration::from_secs(20), "{answer}");
    }
    let made = node.sh(&format!("grep lvcreate {COMMANDS} | grep {id} | grep -c '\"exit\":0'"))?;
    ensure!(made.trim() == "1", "it was made {made} times");
    service.delete(&id)?;
    Ok(())
}

/// What `create-many` makes.
fn many(node: &Node) -> Result<usize> {
    let count =
        node.sh("lvs --noheadings -o lv_name vg0 | grep -c 'pvc-0f0e7f0a-1111-4222-9333-00000000000[0-7]' || true")?;
    Ok(count.trim().parse()?)
}

fn killed(node: &Node) -> Result<()> {
    ensure!(many(node)? == 0, "left by another test");
    // Eight creations take 3 s here.
    let seed = std::time::UNIX_EPOCH.elapsed()?.subsec_millis();
    let wait = format!("{}.{:03}", seed % 3, seed);
    println!("killed after {wait} s");
    let service = Service::start(node)?;
    let pid = service.pid()?;
    let calls = format!("{} create-many 8 {SIZE} > /run/many.out", env!("CARGO_BIN_EXE_node-call"));
    node.sh(&format!("({calls} || true) & sleep {wait}; kill -9 {pid}; wait"))?;
    ensure!(service.status()?.trim() == "137", "it ended by itself: {}", node.read_file(LOG)?);
    drop(service);
    let before = many(node)?;
    // An lvm that was running has gone on to its end, holding the lock.
    let service = Service::start(node)?;
    let answers = service.call(&["create-many", "8", SIZE])?;
    ensure!(
        answers.iter().all(|answer| answer["bytes"] == 320 * MIB),
        "killed after {wait} s with {before} volumes: {answers:?}"
    );
    let after = many(node)?;
    ensure!(after == 8, "killed after {wait} s with {before} volumes, {after} after the second call");
    node.sh("lvremove -qq -y -S 'lv_name=~^pvc-0f0e7f0a-1111-4222-9333-00000000000[0-7]' vg0")?;
    ensure!(many(node)? == 0);
    Ok(())
}

fn stopped(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    ensure!(node.exec(["test", "-S", REGISTRATION])?.success());
    let pid = service.pid()?;
    let id = uid(0x208);
    // A stream that would never end by itself, and a creation that waits for
    // another writer of the group.
    let calls = format!(
        "{call} watch 100 --patience-ms 60000 > /run/watch.out 2>&1 &\n\
         watch=$!\n\
         flock /run/lvprov/vg-vg0.lock sleep 5 &\n\
         writer=$!\n\
         sleep 0.5\n\
         {call} create {id} {SIZE} > /run/create.out 2>&1 &\n\
         create=$!\n\
         sleep 2\n\
         kill {pid}\n\
         kill -0 $writer\n\
         wait $create\n\
         wait $watch || true\n\
         cat /run/create.out",
        call = env!("CARGO_BIN_EXE_node-call")
    );
    let answer: Value = serde_json::from_str(node.sh(&calls)?.trim())?;
    ensure!(answer["bytes"] == 320 * MIB, "the creation did not get its answer: {answer}");
    ensure!(service.status()? == "0", "{}", node.read_file(LOG)?);
    let ended = node.read_file("/run/watch.out")?;
    ensure!(ended.contains("the stream has ended"), "{ended}");
    ensure!(!node.exec(["test", "-e", REGISTRATION])?.success(), "the registration socket is still there");
    drop(service);
    // What a killed one leaves is no hindrance.
    let service = Service::start(node)?;
    node.run(["kill", "-9", &service.pid()?])?;
    drop(service);
    ensure!(node.exec(["test", "-S", REGISTRATION])?.success());
    let service = Service::start(node)?;
    service.delete(&id)?;
    Ok(())
}

fn inventory(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    let id = uid(0x209);
    service.create(&id)?;
    let data = Call::data("default", "web-0", "service-3", &id);
    let log = Call::log("service", "web-a", "service-4", "listed");
    data.mount(node)?.success()?;
    log.mount(node)?.success()?;
    node.sh(&format!("dd if=/dev/zero of={}/a bs=1M count=3 2> /dev/null; sync", log.directory()))?;
    let items = service.call(&["inventory"])?;
    let one = |kind: &str, text: &str| {
        let mut found = items.iter().filter(|item| item["kind"] == kind && item.to_string().contains(text));
        match (found.next(), found.next()) {
            (Some(item), None) => Ok(item),
            _ => bail!("not one {kind} with {text} in {items:#?}"),
        }
    };
    let volume = one("data", &id)?;
    ensure!(volume["open"] == true && volume["claim"] == "default/data" && volume["size"] == 320 * MIB, "{volume}");
    let now: i64 = node.sh("date +%s")?.trim().parse()?;
    let age = now - volume["created"].as_i64().unwrap_or(0);
    ensure!((0..300).contains(&age), "made {age} s ago: {volume}");
    let volume = one("log", "service/listed")?;
    ensure!(volume["directories"] == 1 && volume["mounted"] == true, "{volume}");
    ensure!(volume["path"] == "/var/log/lvprov/service/listed", "{volume}");
    let directory = one("directory", "service/listed")?;
    ensure!(directory["pod"] == "web-a" && directory["uid"] == "service-4", "{directory}");
    ensure!(directory["quota"] == 100 * MIB && directory["mounted"] == true, "{directory}");
    let used = directory["used"].as_u64().unwrap_or(0);
    ensure!((3 * MIB..4 * MIB).contains(&used), "{directory}");
    for call in [&data, &log] {
        let mount = one("mount", &call.uid)?;
        ensure!(mount["target"] == call.directory() && mount["uid"] == *call.uid, "{mount}");
        call.unmount(node)?.success()?;
    }
    let items = service.call(&["inventory"])?;
    ensure!(!items.iter().any(|item| item["kind"] == "mount"), "{items:#?}");
    ensure!(items.iter().any(|item| item["kind"] == "directory" && item["mounted"] == false), "{items:#?}");
    service.delete(&id)?;
    Ok(())
}

fn collect(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    let id = uid(0x20a);
    service.create(&id)?;
    let data = Call::data("default", "web-0", "service-5", &id);
    let log = Call::log("service", "web-a", "service-6", "doomed");
    data.mount(node)?.success()?;
    log.mount(node)?.success()?;
    let left = |text: &str| {
        let answer = service.ask(&["collect", text])?;
        ensure!(answer["removed"] == false, "{text}: {answer}");
        Ok(answer["detail"].as_str().unwrap_or("").to_owned())
    };
    let gone = |text: &str| {
        let answer = service.ask(&["collect", text])?;
        ensure!(answer["removed"] == true, "{text}: {answer}");
        Ok(())
    };
    // In use: nothing goes.
    left("\"kind\":\"data\",\"lv\":\"pvc-0f0e7f0a-1111-4222-8333-00000000020a\"")?;
    let detail = left("/var/log/lvprov/service/doomed/web-a")?;
    ensure!(detail.contains("mounted for a pod"), "{detail}");
    node.sh(&format!("cd {}; sleep 600 < /dev/null > /dev/null 2>&1 & echo $! > /run/busy", data.directory()))?;
    let detail = left(&data.directory())?;
    ensure!(detail.contains("busy"), "{detail}");
    node.sh("kill $(cat /run/busy); while test -d /proc/$(cat /run/busy); do sleep 0.05; done")?;
    // Dead mounts first, then what was mounted.
    gone(&data.directory())?;
    gone(&log.directory())?;
    ensure!(!data.is_mounted(node)? && !log.is_mounted(node)?);
    gone("\"kind\":\"data\",\"lv\":\"pvc-0f0e7f0a-1111-4222-8333-00000000020a\"")?;
    ensure!(!exists(node, &id)?);
    let detail = left("\"kind\":\"log\",\"lv\"").or_else(|_| left("\"path\":\"/var/log/lvprov/service/doomed\""))?;
    ensure!(detail.contains("has directories"), "{detail}");
    gone("/var/log/lvprov/service/doomed/web-a")?;
    gone("\"path\":\"/var/log/lvprov/service/doomed\"")?;
    ensure!(!node.exec(["test", "-e", "/var/log/lvprov/service/doomed"])?.success());
    ensure!(node.sh("lvs --noheadings -o lv_tags vg0 | grep -c service/doomed || true")?.trim() == "0");
    Ok(())
}

fn collect_unused(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    let [new, used, damaged] = [uid(0x20b), uid(0x20c), uid(0x20d)];
    for id in [&new, &used, &damaged] {
        service.create(id)?;
    }
    // Data that was unmounted again, once with its superblock and once without.
    for (id, pod) in [(&used, "web-0"), (&damaged, "web-1")] {
        let data = Call::data("default", pod, "service-7", id);
        data.mount(node)?.success()?;
        data.unmount(node)?.success()?;
    }
    lose_superblock(node, &format!("/dev/vg0/pvc-{damaged}"))?;
    let collect =
        |id: &str| service.ask(&["collect", &format!("\"kind\":\"data\",\"lv\":\"pvc-{id}\""), "--only-unused"]);
    for id in [&used, &damaged] {
        let answer = collect(id)?;
        ensure!(
            answer["removed"] == false && answer["detail"].as_str().is_some_and(|why| why.contains("holds data")),
            "{answer}"
        );
        ensure!(exists(node, id)?);
    }
    let answer = collect(&new)?;
    ensure!(answer["removed"] == true && !exists(node, &new)?, "{answer}");
    for id in [&used, &damaged] {
        service.delete(id)?;
    }
    Ok(())
}

fn logs_after_reboot(node: &Node) -> Result<()> {
    let call = Call::log("service", "web-a", "service-7", "again");
    call.mount(node)?.success()?;
    node.sh(&format!("echo line > {}/app.log", call.directory()))?;
    call.unmount(node)?.success()?;
    let lv = node.sh("lvs --noheadings -o lv_name @lvprov.io/log=service/again")?;
    node.sh(&format!("umount /var/log/lvprov/service/again; lvchange -an vg0/{}", lv.trim()))?;
    let _service = Service::start(node)?;
    node.sh(
        "for i in $(seq 100); do test -e /var/log/lvprov/service/again/web-a/app.log && exit; sleep 0.1; done; exit 1",
    )?;
    Ok(())
}

fn metrics(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    let free = service.free()?;
    let call = Call::log("service", "web-a", "service-8", "measured");
    call.mount(node)?.success()?;
    service.idle(free - 1024 * MIB)?;
    node.sh(&format!("dd if=/dev/zero of={}/a bs=1M count=3 2> /dev/null; sync", call.directory()))?;
    let mut text = String::new();
    let mut scrape = || {
        kinds(node, || {
            for _ in 0..5 {
                text = service.metrics("metrics")?.ok()?;
            }
            Ok(())
        })
    };
    // The report of the mount's last change may come late; a scrape that asks lvm would do so each time.
    let mut ran = scrape()?;
    for _ in 0..4 {
        if !ran.is_empty() {
            ran = scrape()?;
        }
    }
    ensure!(ran.is_empty(), "{ran:?}");
    let value = |name: &str, labels: &str| {
        let sample = format!("{name}{{namespace=\"service\",volume=\"measured\",{labels}}} ");
        let line = text.lines().find_map(|line| line.strip_prefix(&sample));
        line.with_context(|| format!("no {sample}in\n{text}"))?.parse::<u64>().context("value")
    };
    let directory = |name: &str| value(&format!("lvprov_log_directory_{name}"), "directory=\"web-a\",pod=\"web-a\"");
    ensure!((3 * MIB..4 * MIB).contains(&directory("used_bytes")?), "{text}");
    ensure!(directory("quota_bytes")? == 100 * MIB, "{text}");
    // The directory and the file.
    ensure!(directory("inodes_used")? == 2 && directory("inodes_quota")? == 6400, "{text}");
    let volume = |name: &str| value(&format!("lvprov_log_volume_{name}"), "volume_group=\"vg0\"");
    ensure!((900 * MIB..=1024 * MIB).contains(&volume("size_bytes")?), "{text}");
    ensure!(volume("used_bytes")? >= 3 * MIB && volume("used_bytes")? < volume("available_bytes")?, "{text}");
    ensure!(text.contains(&format!("lvprov_volume_group_free_bytes{{volume_group=\"vg0\"}} {}\n", service.free()?)));
    ensure!(text.contains("lvprov_commands_total{kind=\"report\"}") && text.contains("lvprov_failing_unmounts 0"));

    ensure!(service.metrics("controller")?.success());
    ensure!(!service.metrics("node")?.success(), "any node may read metrics");
    let answer = service.ask(&["--tls-dir", "/run/lvprov-tls/metrics", "inventory"])?;
    ensure!(answer["error"].is_string() || answer["code"].is_string(), "a reader of metrics may call: {answer}");
    call.unmount(node)?.success()
}

fn failing_unmounts(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    let call = Call::log("service", "web-a", "service-9", "busy");
    call.mount(node)?.success()?;
    let pid = node.sh(&format!("cd {}; sleep 600 < /dev/null > /dev/null 2>&1 & echo $!", call.directory()))?;
    let pid = pid.trim();
    let told = |wanted: usize| {
        let begun = Instant::now();
        loop {
            let report = service.ask(&["watch", "1"])?;
            let failing = report["failing"].as_array().context("failing")?;
            if failing.len() == wanted {
                return Ok(failing.clone());
            }
            ensure!(begun.elapsed() < Duration::from_secs(60), "{report}");
            sleep(Duration::from_millis(100));
        }
    };
    for _ in 0..3 {
        call.unmount(node)?.failure(&["cannot unmount", "busy"])?;
    }
    let failing = &told(1)?[0];
    ensure!(failing["uid"] == "service-9" && failing["target"] == call.directory(), "{failing}");
    ensure!(failing["users"] == serde_json::json!([format!("process {pid} (sleep)")]), "{failing}");
    ensure!(service.metrics("metrics")?.ok()?.contains("lvprov_failing_unmounts 1"));
    node.sh(&format!("kill {pid}; while test -d /proc/{pid}; do sleep 0.05; done"))?;
    call.unmount(node)?.success()?;
    told(0)?;
    ensure!(service.metrics("metrics")?.ok()?.contains("lvprov_failing_unmounts 0"));
    let left = node.sh("ls -A /run/lvprov/unmounts")?;
    ensure!(left.trim().is_empty(), "{left}");
    Ok(())
}

fn index(node: &Node) -> Result<()> {
    let service = Service::start(node)?;
    let free = service.free()?;
    let call = Call::log("service", "web-a", "service-10", "indexed");
    call.mount(node)?.success()?;
    service.idle(free - 1024 * MIB)?;
    let shows = |wanted: &[&str], open: bool| {
        let begun = Instant::now();
        loop {
            // It is replaced in one step, and may be missing.
            let text = node.sh("cat /var/log/lvprov/service/indexed.json || echo null")?;
            let found: Value = serde_json::from_str(&text)?;
            let one = &found["directories"]["web-a"]["uses"][0];
            let is_open = one["uid"] == "service-10" && one["until"].is_null();
            if one["containers"] == serde_json::json!(wanted) && is_open == open {
                return Ok(());
            }
            ensure!(begun.elapsed() < Duration::from_secs(60), "{found:#}");
            sleep(Duration::from_millis(100));
        }
    };
    let containers = format!("/var/lib/kubelet/pods/{}/containers", call.uid);
    let ran = kinds(node, || {
        shows(&[], true)?;
        node.run(["mkdir", "-p", &format!("{containers}/app")])?;
        shows(&["app"], true)?;
        node.run(["mkdir", &format!("{containers}/side")])?;
        shows(&["app", "side"], true)?;
        // Lost, and made anew.
        node.run(["rm", "/var/log/lvprov/service/indexed.json"])?;
        node.run(["mkdir", &format!("{containers}/last")])?;
        shows(&["app", "last", "side"], true)?;
        // Without the driver, so without a word to the index.
        node.run(["umount", &call.directory()])?;
        shows(&["app", "last", "side"], false)
    })?;
    ensure!(ran.is_empty(), "{ran:?}");
    call.unmount(node)?.success()
}
