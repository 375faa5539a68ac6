//! What a real kubelet and its controller manager once called, called again on
//! our driver and real LVM: in the same order, as often, and at the same time
//! where it came at the same time. It was recorded with other drivers, so each
//! of their volumes becomes one of ours; what is kubelet's own stays as it was.

use crate::{create, uid};
use anyhow::{Context, Result, anyhow, bail, ensure};
use lvprov_tests::Test;
use lvprov_tests::driver::{Answer, call};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use xtask::testbed::{Node, NodeOptions};

pub const TESTS: [Test<Node>; 2] = [
    ("replay::recorded_calls_are_answered_as_kubelet_needs", recorded),
    ("replay::recorded_calls_with_the_power_cut_in_between", power_cuts),
];

const FULL_1: &str = include_str!("captures/flex-calls-1.20-full1.log");
const FULL_2: &str = include_str!("captures/flex-calls-1.20-full2.log");
const STANDALONE_1: &str = include_str!("captures/flex-calls-1.20-standalone1.log");
const STANDALONE_2: &str = include_str!("captures/flex-calls-1.20-standalone2.log");

/// Recorded volumes that become data volumes, with their size; the others
/// become log volumes.
const DATA: [(&str, &str); 6] =
    [("web-0", "100m"), ("web-1", "100m"), ("att0", "320m"), ("lvd", "64m"), ("lvf", "64m"), ("lv0", "64m")];
/// Directory of the volume whose mount and unmount are made to fail.
const FAULTY: &str = "/var/lib/kubelet/pods/1ebd385e-a1ff-427c-8ed1-bf571d343078/volumes/lvprov.io~lvm/v";
/// Directory of the volume that is unmounted behind kubelet's back.
const BEHIND: &str = "/var/lib/kubelet/pods/1400f649-60f2-45f7-8ce5-13310c1d4636/volumes/lvprov.io~lvm/v";
/// Calls of one verb that came within so many milliseconds are made at once.
const AT_ONCE: u64 = 50;

fn recorded(_: &Node) -> Result<()> {
    let mut kubelet = Kubelet::start()?;
    for recording in [FULL_1, FULL_2] {
        kubelet.replay(recording, &[])?;
        kubelet.end()?;
    }
    // A static pod, whose UID stays the same: its node goes down in between.
    kubelet.replay(STANDALONE_1, &[])?;
    kubelet.reboot(false)?;
    kubelet.replay(STANDALONE_2, &[])?;
    kubelet.end()
}

fn power_cuts(_: &Node) -> Result<()> {
    let mut kubelet = Kubelet::start()?;
    // After the last one the pods are gone when kubelet is back: it unmounts
    // what was never mounted.
    let cuts = [("all-up", true), ("delete-web-1-pod", true), ("delete-all", false)];
    kubelet.replay(FULL_1, &cuts)?;
    kubelet.end()?;
    kubelet.replay(FULL_2, &[("C_delete", true), ("F2_restart_after_umount_behind", true), ("F_del", false)])?;
    kubelet.end()
}

/// A line of a recording.
#[derive(Debug)]
enum Line {
    /// What was done to the cluster.
    Phase(&'static str),
    Call(Recorded),
}

#[derive(Debug)]
struct Recorded {
    /// Milliseconds of the day.
    at: u64,
    args: Vec<&'static str>,
}

fn parse(recording: &'static str) -> Result<Vec<Line>> {
    let lines = recording.lines().map(|line| parse_line(line).with_context(|| line.to_owned()));
    let lines = lines.collect::<Result<Vec<_>>>()?;
    let calls = lines.iter().filter(|line| matches!(line, Line::Call(_))).count();
    ensure!(calls > 1 && calls == recording.matches(" argc=").count(), "{calls} calls");
    Ok(lines)
}

fn parse_line(line: &'static str) -> Result<Line> {
    if let Some((_, phase)) = line.split_once("#### ") {
        return Ok(Line::Phase(phase));
    }
    let (head, rest) = line.split_once("argc=").context("no argc")?;
    let (count, args) = rest.split_once(' ').context("no arguments")?;
    let args = args.strip_prefix('[').and_then(|args| args.strip_suffix(']')).context("no brackets")?;
    let args: Vec<&str> = args.split("] [").collect();
    ensure!(args.len() == count.parse::<usize>()?, "{} arguments", args.len());
    let time = head.split(' ').next().context("no time")?;
    let mut at = 0.0;
    for part in time.split(':') {
        at = at * 60.0 + part.parse::<f64>()?;
    }
    Ok(Line::Call(Recorded { at: (at * 1000.0) as u64, args }))
}

/// An argument as it would be for our driver.
fn ours(argument: &str) -> Result<String> {
    if argument.starts_with('{') {
        return options(argument);
    }
    let Some(rest) = argument.strip_prefix("KUBELET_ROOT") else { return Ok(argument.to_owned()) };
    let parts: Vec<&str> =
        rest.split('/').map(|part| if part.starts_with("example.com~") { "lvprov.io~lvm" } else { part }).collect();
    Ok(format!("/var/lib/kubelet{}", parts.join("/")))
}

fn options(json: &str) -> Result<String> {
    let mut options: Map<String, Value> = serde_json::from_str(json)?;
    let lv = options.remove("lv").and_then(|lv| lv.as_str().map(str::to_owned)).context("no lv")?;
    options.retain(|key, _| key.starts_with("kubernetes.io/"));
    let own = match claim(&lv) {
        Some(uid) => vec![
            ("type", "data".to_owned()),
            ("volumeGroup", "vg0".to_owned()),
            ("logicalVolume", format!("pvc-{uid}")),
            ("claimUID", uid),
        ],
        None => {
            vec![("type", "log".to_owned()), ("volume", lv), ("size", "1Gi".to_owned()), ("quota", "100Mi".to_owned())]
        }
    };
    options.extend(own.into_iter().map(|(key, value)| (key.to_owned(), Value::String(value))));
    Ok(Value::Object(options).to_string())
}

/// The claim of a recorded volume that becomes a data volume.
fn claim(lv: &str) -> Option<String> {
    DATA.iter().zip(0x400..).find(|((name, _), _)| *name == lv).map(|(_, number)| uid(number))
}

/// What kubelet does around a call.
struct Kubelet {
    node: Node,
    /// What should be mounted: directory, and the call's arguments.
    mounted: BTreeMap<String, Vec<String>>,
    /// How often each volume has been mounted for writing.
    writers: BTreeMap<String, usize>,
    pods: BTreeSet<String>,
    /// Whether the call must fail.
    faulty: bool,
}

impl Kubelet {
    fn start() -> Result<Self> {
        let node = Node::boot_with(NodeOptions { memory_mib: 512, ..NodeOptions::default() })?;
        for (name, size) in DATA {
            create(&node, "default", &claim(name).context("a claim")?, size)?;
        }
        Ok(Self { node, mounted: BTreeMap::new(), writers: BTreeMap::new(), pods: BTreeSet::new(), faulty: false })
    }

    /// Replays a recording. `cuts`: where the power is cut, and whether the pods
    /// are still wanted when the node is back.
    fn replay(&mut self, recording: &'static str, cuts: &[(&str, bool)]) -> Result<()> {
        let lines = parse(recording)?;
        let mut cut = 0;
        let mut next = 0;
        while let Some(line) = lines.get(next) {
            next += 1;
            let first = match line {
                Line::Call(call) => call,
                Line::Phase(phase) => {
                    if let Some((_, stay)) = cuts.iter().find(|(at, _)| at == phase) {
                        cut += 1;
                        self.reboot(*stay).with_context(|| format!("power cut at {phase}"))?;
                    }
                    self.phase(phase).with_context(|| (*phase).to_owned())?;
                    continue;
                }
            };
            let mut batch = vec![first];
            while let Some(Line::Call(call)) = lines.get(next)
                && call.args[0] == first.args[0]
                && call.at.abs_diff(first.at) <= AT_ONCE
            {
                batch.push(call);
                next += 1;
            }
            let calls = batch.iter().map(|call| call.args.iter().map(|argument| ours(argument)).collect());
            self.call_at_once(&calls.collect::<Result<Vec<_>>>()?)?;
        }
        ensure!(cut == cuts.len(), "the power was cut {cut} times");
        Ok(())
    }

    /// What was done to the cluster, and what made calls fail: here the causes
    /// are of our own.
    fn phase(&mut self, phase: &str) -> Result<()> {
        let lv = format!("pvc-{}", claim("lvd").context("a claim")?);
        match phase {
            "D_mount_fails_exit1" => {
                self.node.run(["lvrename", "-qq", "vg0", &lv, "elsewhere"])?;
                self.faulty = true;
            }
            "D_fault_removed" => {
                self.node.run(["lvrename", "-qq", "vg0", "elsewhere", &lv])?;
                self.faulty = false;
            }
            "E_unmount_fails" => {
                self.node.sh(&format!("cd {FAULTY} && (sleep 600 > /dev/null 2>&1 & echo $! > /run/busy.pid)"))?;
                self.faulty = true;
            }
            "E_fault_removed" => {
                self.node.sh("pid=$(cat /run/busy.pid); kill $pid; while test -d /proc/$pid; do sleep 0.05; done")?;
                self.faulty = false;
            }
            "F2_restart_after_umount_behind" => {
                self.node.run(["umount", BEHIND])?;
            }
            _ => {}
        }
        Ok(())
    }

    fn call_at_once(&mut self, calls: &[Vec<String>]) -> Result<()> {
        for args in calls.iter().filter(|args| args[0] == "mount") {
            // What is mounted already is not mounted again: kubelet does not call.
            ensure!(!self.is_mounted(&args[1])?, "{} is mounted", args[1]);
            self.node.run(["mkdir", "-p", &args[1]])?;
        }
        let node = &self.node;
        let answers = std::thread::scope(|scope| {
            let run = |args: &[String]| call(node, &args.iter().map(String::as_str).collect::<Vec<_>>());
            let all: Vec<_> = calls.iter().map(|args| scope.spawn(move || run(args))).collect();
            all.into_iter().map(|one| one.join().unwrap_or_else(|_| bail!("a panic"))).collect::<Vec<_>>()
        });
        for (args, answer) in calls.iter().zip(answers) {
            answer.and_then(|answer| self.judge(args, answer)).with_context(|| args.join(" "))?;
        }
        Ok(())
    }

    fn judge(&mut self, args: &[String], answer: Answer) -> Result<()> {
        match args[0].as_str() {
            "init" => {
                ensure!(answer.json["capabilities"]["attach"] == false, "{}", answer.json);
                answer.success()
            }
            "mount" => {
                let directory = &args[1];
                if self.faulty {
                    answer.failure(&["is not on this node"])?;
                    // As kubelet does: a mount left behind would be in its way.
                    self.node.run(["rmdir", directory])?;
                    return Ok(());
                }
                answer.success()?;
                ensure!(self.is_mounted(directory)?, "nothing is mounted");
                self.mounted.insert(directory.clone(), args.to_vec());
                self.pods.insert(pod_of(directory)?);
                self.write(directory, &args[2])
            }
            "unmount" => {
                let directory = &args[1];
                if self.faulty {
                    answer.failure(&["cannot unmount", "busy"])?;
                    ensure!(self.is_mounted(directory)?, "it failed, and nothing is mounted");
                    return Ok(());
                }
                answer.success()?;
                ensure!(!self.is_mounted(directory)?, "it is still mounted");
                self.mounted.remove(directory);
                self.node.sh(&format!("test ! -e {directory} || rmdir {directory}"))?;
                Ok(())
            }
            "expandfs" => {
                answer.success()?;
                let (directory, bytes) = (&args[3], args[4].parse::<u64>()?);
                let device = self.node.run(["findmnt", "-n", "-o", "SOURCE", directory])?;
                let size: u64 = self.node.run(["blockdev", "--getsize64", &device])?.trim().parse()?;
                ensure!(size == bytes, "the volume has {size} B");
                let blocks = self.node.run(["stat", "-f", "-c", "%b %S", directory])?;
                let (count, each) = blocks.trim().split_once(' ').context("two numbers")?;
                let holds = count.parse::<u64>()? * each.parse::<u64>()?;
                // A file system shows less than its device, and more than the old one.
                ensure!(holds > bytes * 3 / 4, "the file system has {holds} B");
                Ok(())
            }
            _ => {
                ensure!(answer.status == "Not supported", "{}: {}", answer.status, answer.message);
                Ok(())
            }
        }
    }

    /// Writes a line to a volume, and finds those written before, by whatever pod.
    fn write(&mut self, directory: &str, json: &str) -> Result<()> {
        let options: Map<String, Value> = serde_json::from_str(json)?;
        let text = |key: &str| options.get(key).and_then(Value::as_str).unwrap_or("").to_owned();
        if text("kubernetes.io/readwrite") == "ro" {
            ensure!(!self.node.exec(["touch", &format!("{directory}/x")])?.success(), "it can be written to");
            return Ok(());
        }
        let own = if text("type") == "log" { text("kubernetes.io/pod.name") } else { String::new() };
        let writers = self.writers.entry(format!("{}{}/{own}", text("logicalVolume"), text("volume"))).or_default();
        *writers += 1;
        let file = format!("{directory}/lines");
        let lines = self.node.sh(&format!("echo line >> {file}; sync {file}; wc -l < {file}"))?;
        ensure!(lines.trim() == writers.to_string(), "{lines} lines, not {writers}");
        Ok(())
    }

    /// A power cut. kubelet starts, mounts again what its pods still want, and
    /// unmounts what it finds of pods that are gone: directories whose removal
    /// had not reached the disk are back.
    fn reboot(&mut self, pods_stay: bool) -> Result<()> {
        self.node.power_cut()?;
        self.node.power_on()?;
        self.call_at_once(&[vec!["init".to_owned()]])?;
        let found = self.node.sh("ls -d /var/lib/kubelet/pods/*/volumes/lvprov.io~lvm/* 2> /dev/null || true")?;
        for directory in found.lines().filter(|directory| !self.mounted.contains_key(*directory)).collect::<Vec<_>>() {
            self.call_at_once(&[vec!["unmount".to_owned(), directory.to_owned()]])?;
        }
        if pods_stay {
            for args in self.mounted.clone().into_values() {
                self.call_at_once(&[args])?;
            }
        }
        Ok(())
    }

    fn is_mounted(&self, directory: &str) -> Result<bool> {
        Ok(self.node.exec(["mountpoint", "-q", directory])?.success())
    }

    /// Nothing is left: neither a mount nor a directory.
    fn end(&self) -> Result<()> {
        ensure!(self.mounted.is_empty(), "still mounted: {:?}", self.mounted.keys());
        let mounts = self.node.sh("grep /var/lib/kubelet/pods /proc/self/mountinfo || true")?;
        ensure!(mounts.is_empty(), "{mounts}");
        for pod in &self.pods {
            // After a power cut a directory may be gone already.
            let rmdir = format!(
                "for d in volumes/lvprov.io~lvm volumes .; do d=/var/lib/kubelet/pods/{pod}/$d; test ! -e $d || rmdir ${{d%/.}}; done"
            );
            self.node.sh(&rmdir)?;
        }
        let left = self.node.sh("ls -A /var/lib/kubelet/pods")?;
        ensure!(left.is_empty(), "{left}");
        // Each log volume has its pod's directory, and nothing half-made.
        let directories =
            self.node.sh("cd /var/log/lvprov && find . -mindepth 3 -maxdepth 4 -type d ! -name lost+found | sort")?;
        // The one that is mounted for reading only was not written to.
        let mut expected = vec!["./default/inl/.lvprov".to_owned(), "./default/inl/inline".to_owned()];
        for (key, _) in self.writers.iter().filter(|(key, _)| !key.starts_with("pvc-")) {
            let (volume, pod) = key.split_once('/').ok_or_else(|| anyhow!("{key}"))?;
            expected.push(format!("./default/{volume}/.lvprov"));
            expected.push(format!("./default/{volume}/{pod}"));
        }
        let found: Vec<&str> = directories.lines().collect();
        // After a power cut a volume is mounted again by its next pod only.
        ensure!(
            found.iter().all(|directory| expected.iter().any(|one| one == directory)),
            "{found:?}, and not {expected:?}"
        );
        Ok(())
    }
}

fn pod_of(directory: &str) -> Result<String> {
    Ok(directory.split('/').nth(5).context("no pod")?.to_owned())
}
