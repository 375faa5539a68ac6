//! `cargo xtask bench`: what lvprov adds to what there is without it.
//!
//! Everything is measured side by side on one cluster, the two sides taking
//! turns, so that what slows the machine slows both.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::progress::{say, step};
use crate::setup::{self, binaries};
use crate::testbed::{Cluster, ClusterNode, ClusterOptions, Timeline};

/// The node that everything takes place on.
const NODE: &str = "n1";
const LIMIT: Duration = Duration::from_secs(120);
/// The node's report after a change has ended by then.
const SETTLE: Duration = Duration::from_secs(2);
const DRIVER: &str = "/usr/libexec/kubernetes/kubelet-plugins/volume/exec/lvprov.io~lvm/lvm";
/// So many claims at once.
const AT_ONCE: usize = 20;

/// Measures claims, mounts and pods against the same without lvprov.
#[derive(Debug, Args)]
pub struct BenchCommand {
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// How many claims, one after the other; 0 here and below leaves out that part.
    #[arg(long, default_value_t = 12)]
    claims: usize,
    /// How often twenty claims at once.
    #[arg(long, default_value_t = 3)]
    bursts: usize,
    /// How many mounts.
    #[arg(long, default_value_t = 40)]
    mounts: usize,
    /// How many pods.
    #[arg(long, default_value_t = 6)]
    pods: usize,
    /// Profile of the binaries.
    #[arg(long, value_enum, default_value_t = binaries::Profile::Release)]
    profile: binaries::Profile,
    /// Take the binaries that there are.
    #[arg(long)]
    no_build: bool,
}

/// Runs it.
///
/// # Errors
/// When a part of it does not do what it should.
pub fn run(command: &BenchCommand) -> Result<()> {
    setup::for_cluster()?;
    if !command.no_build {
        step("Build lvprov", || binaries::build(command.profile))?;
    }
    let options = ClusterOptions { nodes: 1, profile: command.profile, ..ClusterOptions::default() };
    let cluster = step("Start Kubernetes with one node", || Cluster::start(options))?;
    let measured = measure(&cluster, command);
    cluster.end(measured.is_err());
    let (machine, rows) = measured?;
    if command.json {
        let rows: Vec<Value> = rows.iter().map(Row::json).collect();
        println!("{:#}", json!({"machine": machine, "milliseconds": rows}));
    } else {
        print_table(&machine, &rows);
    }
    Ok(())
}

fn measure(cluster: &Cluster, command: &BenchCommand) -> Result<(Value, Vec<Row>)> {
    step("Install lvprov", || cluster.install_lvprov())?;
    cluster.apply(
        "{apiVersion: storage.k8s.io/v1, kind: StorageClass, metadata: {name: bench}, provisioner: lvm.lvprov.io, \
         volumeBindingMode: WaitForFirstConsumer, parameters: {volumeGroup: vg0}}",
    )?;
    let bench = Bench {
        cluster,
        node: cluster.node(NODE)?,
        timeline: cluster.timeline(&["pods", "persistentvolumeclaims", "persistentvolumes"]),
    };
    let mut rows = Vec::new();
    let stages: [(&str, Stage<'_>); 4] = [
        ("Claims, one after the other", &|| bench.claims(command.claims)),
        ("Claims, all at once", &|| bench.claims_at_once(command.bursts)),
        ("Mounts", &|| bench.mounts(command.mounts)),
        ("Pods", &|| bench.pods(command.pods)),
    ];
    for (what, stage) in stages {
        let measured = step(what, stage)?;
        // Here too, in case that a later stage fails.
        measured.iter().for_each(|row| say(row.line()));
        rows.extend(measured);
    }
    Ok((bench.machine()?, rows))
}

/// A part of the benchmark.
type Stage<'a> = &'a dyn Fn() -> Result<Vec<Row>>;

/// One thing measured, and what it is measured against.
struct Row {
    what: &'static str,
    ours: Vec<f64>,
    against: &'static str,
    theirs: Vec<f64>,
}

impl Row {
    fn line(&self) -> String {
        let (ours, theirs) = (median(&self.ours), median(&self.theirs));
        format!(
            "{:<38} {:>28}   {:<22} {:>28}   {:>6.2}  {:>+9.1}",
            self.what,
            spread(&self.ours),
            self.against,
            spread(&self.theirs),
            ours / theirs,
            ours - theirs
        )
    }

    fn json(&self) -> Value {
        json!({
            "what": self.what, "median": median(&self.ours), "runs": self.ours,
            "against": self.against, "against_median": median(&self.theirs), "against_runs": self.theirs,
            "ratio": median(&self.ours) / median(&self.theirs),
        })
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => sorted[count / 2],
        count => f64::midpoint(sorted[count / 2 - 1], sorted[count / 2]),
    }
}

fn print_table(machine: &Value, rows: &[Row]) {
    let text = |key: &str| machine[key].as_str().unwrap_or("?").to_owned();
    println!("{}: {}, {} cores, {}", text("date"), text("cpu"), machine["cores"], text("node"));
    println!("binaries: {}; medians in milliseconds, (least to most), runs\n", text("profile"));
    println!("{:<38} {:>28}   {:<22} {:>28}   {:>6}  {:>9}", "", "lvprov", "", "without", "ratio", "more");
    for row in rows {
        println!("{}", row.line());
    }
}

fn spread(values: &[f64]) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(0.0, f64::max);
    format!("{:.1} ({least:.1}-{most:.1}) {}", median(values), values.len())
}

struct Bench<'a> {
    cluster: &'a Cluster,
    node: ClusterNode<'a>,
    timeline: Timeline,
}

impl Bench<'_> {
    /// `selected-node` is written with the claim itself: neither scheduler nor
    /// pod is in what is measured.
    fn claim(name: &str, size: &str) -> String {
        format!(
            "{{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {{name: {name}, namespace: default, \
             annotations: {{volume.kubernetes.io/selected-node: {NODE}}}}}, spec: {{accessModes: [ReadWriteOnce], \
             storageClassName: bench, resources: {{requests: {{storage: {size}}}}}}}}}\n---\n"
        )
    }

    fn claims(&self, count: usize) -> Result<Vec<Row>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let (mut to_volume, mut to_bound, mut bare) = (Vec::new(), Vec::new(), Vec::new());
        // The first round of each is not counted.
        for round in 0..=count {
            let mut one = || {
                let name = format!("one-{round}");
                self.timeline.clear();
                self.cluster.apply(&Self::claim(&name, "1Gi"))?;
                let selected = self.timeline.first("the claim", LIMIT, |object| is_claim(object, &name))?;
                let bound = self.timeline.first("a bound claim", LIMIT, |object| is_bound(object, &name))?;
                let volume = self.timeline.first("its volume", LIMIT, |object| is_volume_of(object, &name))?;
                if round > 0 {
                    to_volume.push(ms(volume.saturating_duration_since(selected)));
                    to_bound.push(ms(bound.saturating_duration_since(selected)));
                }
                self.remove_claims(&[name])
            };
            let mut other = || {
                let took = self.lvcreate("1g")?;
                if round > 0 {
                    bare.push(took);
                }
                Ok(())
            };
            take_turns(round, &mut one, &mut other)?;
        }
        Ok(vec![
            Row {
                what: "claim of 1 GiB: selected-node to PV",
                ours: to_volume,
                against: "lvcreate",
                theirs: bare.clone(),
            },
            Row { what: "claim of 1 GiB: selected-node to Bound", ours: to_bound, against: "lvcreate", theirs: bare },
        ])
    }

    fn claims_at_once(&self, count: usize) -> Result<Vec<Row>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 0..count {
            let names: Vec<String> = (0..AT_ONCE).map(|number| format!("all-{round}-{number}")).collect();
            let mut all = || {
                self.timeline.clear();
                self.cluster.apply(&names.iter().map(|name| Self::claim(name, "320Mi")).collect::<String>())?;
                let first = self.timeline.first("the first claim", LIMIT, |object| is_claim(object, &names[0]))?;
                let mut last = first;
                for name in &names {
                    last = last.max(self.timeline.first("a bound claim", LIMIT, |object| is_bound(object, name))?);
                }
                ours.push(ms(last - first));
                self.remove_claims(&names)
            };
            let mut bare = || {
                let mut sum = 0.0;
                for _ in 0..AT_ONCE {
                    sum += self.lvcreate("320m")?;
                }
                theirs.push(sum);
                Ok(())
            };
            take_turns(round, &mut all, &mut bare)?;
        }
        Ok(vec![Row { what: "20 claims at once: all Bound", ours, against: "20 lvcreate, in turn", theirs }])
    }

    fn remove_claims(&self, names: &[String]) -> Result<()> {
        let claims = self.cluster.get_json("-n default persistentvolumeclaims")?;
        let volume = |claim: &Value| claim["spec"]["volumeName"].as_str().map(|name| format!("pv/{name}"));
        let claims = claims["items"].as_array().map(Vec::as_slice).unwrap_or_default();
        let volumes: Vec<String> = claims.iter().filter_map(volume).collect();
        ensure!(volumes.len() == names.len(), "{} volumes of {} claims", volumes.len(), names.len());
        let words = ["-n", "default", "delete", "pvc"].into_iter().map(str::to_owned);
        self.cluster.kubectl(words.chain(names.iter().cloned()))?;
        self.cluster.wait(&volumes.join(" "), "delete", LIMIT)?;
        std::thread::sleep(SETTLE);
        Ok(())
    }

    /// Milliseconds of a bare lvcreate, removed again afterwards. It is given
    /// the options that ours has, but for the tags, and holds our lock, so that
    /// the node service does not take it for a change to be reported while it
    /// is measured.
    fn lvcreate(&self, size: &str) -> Result<f64> {
        let script = format!(
            "export LVM_SUPPRESS_FD_WARNINGS=1\n\
             exec 9>> /run/lvprov/vg-vg0.lock && flock 9 || exit 1\n\
             before=${{EPOCHREALTIME/./}}\n\
             lvm lvcreate --yes --quiet --wipesignatures y --zero y --name bench --size {size} vg0 > /dev/null || exit 1\n\
             echo $((${{EPOCHREALTIME/./}} - before))\n\
             lvm lvremove --yes --quiet vg0/bench > /dev/null"
        );
        let took: f64 = self.node.run(["bash", "-c", &script])?.trim().parse()?;
        Ok(took / 1000.0)
    }

    fn mounts(&self, count: usize) -> Result<Vec<Row>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        self.timeline.clear();
        self.cluster.apply(&Self::claim("mounts", "1Gi"))?;
        self.timeline.first("a bound claim", LIMIT, |object| is_bound(object, "mounts"))?;
        let claim = self.cluster.get_json("-n default pvc mounts")?;
        let uid = claim["metadata"]["uid"].as_str().context("a uid")?;
        let volume = format!("pvc-{uid}");
        // As kubelet would for a pod, but not below its root: it removes the
        // directories of pods that it does not know.
        let pod = "0f0e7f0a-1111-4222-8333-0000000000b0";
        let directory = format!("/run/bench/pods/{pod}/volumes/lvprov.io~lvm/{volume}");
        let call = json!({
            "type": "data", "volumeGroup": "vg0", "logicalVolume": volume, "claimUID": uid,
            "kubernetes.io/fsType": "xfs", "kubernetes.io/readwrite": "rw", "kubernetes.io/pvOrVolumeName": volume,
            "kubernetes.io/pod.name": "bench", "kubernetes.io/pod.namespace": "default", "kubernetes.io/pod.uid": pod,
            "kubernetes.io/serviceAccount.name": "default",
        });
        // Once to make the file system.
        self.node.sh(&format!(
            "mkdir -p {directory}; '{DRIVER}' mount {directory} '{call}'; '{DRIVER}' unmount {directory}"
        ))?;
        std::thread::sleep(SETTLE);
        // Within what is measured, the shell forks once for each step of either
        // side, and for nothing else. The directory is there before, as kubelet
        // has it.
        let script = format!(
            "driver() {{ mkdir -p {directory}; a=${{EPOCHREALTIME/./}}; '{DRIVER}' mount {directory} '{call}' > /run/bench.out || {{ cat /run/bench.out >&2; exit 1; }}\n\
             b=${{EPOCHREALTIME/./}}; '{DRIVER}' unmount {directory} > /dev/null || exit 1\n\
             c=${{EPOCHREALTIME/./}}; echo driver $((b - a)) $((c - b)); }}\n\
             bare() {{ mkdir -p {directory}; a=${{EPOCHREALTIME/./}}; mount -t xfs /dev/vg0/{volume} {directory} > /dev/null || exit 1\n\
             b=${{EPOCHREALTIME/./}}; umount {directory} > /dev/null || exit 1\n\
             c=${{EPOCHREALTIME/./}}; echo bare $((b - a)) $((c - b)); }}\n\
             driver > /dev/null; bare > /dev/null\n\
             for ((i = 0; i < {count}; i += 2)); do driver; bare; bare; driver; done"
        );
        let printed = self.node.run(["bash", "-c", &script])?;
        self.node.sh(&format!("rm -d -f {directory}"))?;
        self.remove_claims(&["mounts".to_owned()])?;
        let column = |side: &str, column: usize| -> Result<Vec<f64>> {
            let lines = printed.lines().filter(|line| line.starts_with(side));
            let micros =
                lines.map(|line| line.split(' ').nth(column).context("a number")?.parse::<f64>().context("a number"));
            let values: Vec<f64> = micros.map(|micros| Ok(micros? / 1000.0)).collect::<Result<_>>()?;
            ensure!(values.len() >= count, "{side} ran {} times", values.len());
            Ok(values)
        };
        Ok(vec![
            Row {
                what: "driver: mount of a ready volume",
                ours: column("driver", 1)?,
                against: "mount(8) -t xfs",
                theirs: column("bare", 1)?,
            },
            Row {
                what: "driver: unmount",
                ours: column("driver", 2)?,
                against: "umount(8)",
                theirs: column("bare", 2)?,
            },
        ])
    }

    fn pods(&self, count: usize) -> Result<Vec<Row>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 0..=count {
            let mut with_claim = || {
                let name = format!("claim-{round}");
                let claim = Self::claim(&name, "1Gi")
                    .replace(&format!("annotations: {{volume.kubernetes.io/selected-node: {NODE}}}"), "");
                let pod = pod(&name, &format!("persistentVolumeClaim: {{claimName: {name}}}"));
                let took = self.pod_start(&name, &format!("{claim}{pod}"))?;
                if round > 0 {
                    ours.push(took);
                }
                self.remove_claims(&[name])
            };
            let mut with_directory = || {
                let name = format!("directory-{round}");
                let took = self.pod_start(&name, &pod(&name, "emptyDir: {}"))?;
                if round > 0 {
                    theirs.push(took);
                }
                std::thread::sleep(SETTLE);
                Ok(())
            };
            take_turns(round, &mut with_claim, &mut with_directory)?;
        }
        Ok(vec![Row { what: "pod with a new claim of 1 GiB: to Ready", ours, against: "with an emptyDir", theirs }])
    }

    /// Milliseconds from the pod's appearance to Ready; deletes the pod.
    fn pod_start(&self, name: &str, yaml: &str) -> Result<f64> {
        self.timeline.clear();
        self.cluster.apply(yaml)?;
        let made = self.timeline.first("the pod", LIMIT, |object| is(object, "Pod", name))?;
        let ready = self.timeline.first("a ready pod", LIMIT, |object| is(object, "Pod", name) && is_ready(object))?;
        self.cluster.kubectl(["-n", "default", "delete", "pod", name])?;
        Ok(ms(ready - made))
    }

    fn machine(&self) -> Result<Value> {
        let info = fs::read_to_string("/proc/cpuinfo")?;
        let cpu = info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("");
        let kernel = self.node.run(["uname", "-r"])?;
        let lvm = self.node.sh("lvm version | sed -n 's/ *LVM version: *//p'")?;
        let kubernetes = self.cluster.kubectl(["version", "-o", "json"])?;
        let kubernetes: Value = serde_json::from_str(&kubernetes)?;
        let profile = self.cluster.options().profile.directory();
        Ok(json!({
            "date": self.node.run(["date", "-u", "+%Y-%m-%d"])?.trim(),
            "cpu": cpu.trim_start_matches([' ', '\t', ':']),
            "cores": std::thread::available_parallelism()?.get(),
            "node": format!("user-mode Linux {}, LVM {}, Kubernetes {}", kernel.trim(), lvm.trim(),
                            kubernetes["serverVersion"]["gitVersion"].as_str().unwrap_or("?")),
            "profile": profile,
        }))
    }
}

/// Even rounds one way round, odd ones the other.
fn take_turns(round: usize, one: &mut dyn FnMut() -> Result<()>, other: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    let start = Instant::now();
    if round.is_multiple_of(2) {
        one()?;
        other()?;
    } else {
        other()?;
        one()?;
    }
    say(format!("round {round}: {:.1} s", start.elapsed().as_secs_f64()));
    Ok(())
}

fn pod(name: &str, volume: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: default}}, spec: {{\
         nodeSelector: {{kubernetes.io/hostname: {NODE}}}, terminationGracePeriodSeconds: 0, \
         containers: [{{name: c, image: 'lvprov.io/busybox:latest', imagePullPolicy: Never, \
         command: [sleep, '100000'], volumeMounts: [{{name: v, mountPath: /v}}]}}], \
         volumes: [{{name: v, {volume}}}]}}}}\n"
    )
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn is(object: &Value, kind: &str, name: &str) -> bool {
    object["kind"] == kind && object["metadata"]["name"] == name
}

fn is_claim(object: &Value, name: &str) -> bool {
    is(object, "PersistentVolumeClaim", name)
        && object["metadata"]["annotations"]["volume.kubernetes.io/selected-node"] == NODE
}

fn is_bound(object: &Value, name: &str) -> bool {
    is(object, "PersistentVolumeClaim", name) && object["status"]["phase"] == "Bound"
}

fn is_volume_of(object: &Value, name: &str) -> bool {
    object["kind"] == "PersistentVolume" && object["spec"]["claimRef"]["name"] == name
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    conditions.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_few_and_many() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn objects_are_told_apart() {
        let claim = json!({"kind": "PersistentVolumeClaim", "metadata": {"name": "a",
            "annotations": {"volume.kubernetes.io/selected-node": NODE}}, "status": {"phase": "Pending"}});
        assert!(is_claim(&claim, "a") && !is_claim(&claim, "b") && !is_bound(&claim, "a"));
        let volume = json!({"kind": "PersistentVolume", "spec": {"claimRef": {"name": "a"}}});
        assert!(is_volume_of(&volume, "a") && !is_claim(&volume, "a"));
        let pod = json!({"kind": "Pod", "status": {"conditions": [{"type": "Ready", "status": "False"}]}});
        assert!(!is_ready(&pod));
    }
}
