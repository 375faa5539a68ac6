//! `cargo xtask bench scale`: the controller against the real API server, with
//! thousands of nodes that are not there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::agent::Command;
use crate::paths;
use crate::progress::{say, step};
use crate::setup::binaries::{self, Profile};
use crate::testbed::certificates::{ADMIN, LVPROV};
use crate::testbed::{Cluster, ClusterOptions};

/// Nothing is written for so long: it has come to rest.
const QUIET: Duration = Duration::from_secs(5);
const CAPACITIES: &str = "/apis/storage.k8s.io/v1/namespaces/lvprov-system/csistoragecapacities";
/// Objects on a page of a list, as the controller asks for them.
const PAGE: u32 = 500;
/// The longest that is waited for anything.
const LIMIT: Duration = Duration::from_secs(900);

/// How much of it.
#[derive(Debug, Clone, Copy, Args)]
pub struct ScaleOptions {
    /// Simulated nodes.
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    pub nodes: u32,
    /// PersistentVolumes that are there, each with its claim.
    #[arg(long, default_value_t = 100_000)]
    pub volumes: u32,
    /// Claims that are made and bound meanwhile.
    #[arg(long, default_value_t = 50)]
    pub new_claims: u32,
    /// Pods that the scheduler places, each with a claim.
    #[arg(long, default_value_t = 10)]
    pub new_pods: u32,
    /// From so many nodes on they share capacities; 0: never.
    #[arg(long, default_value_t = 200)]
    pub shared_from: u32,
}

/// What was measured.
#[derive(Debug, Clone, Default)]
pub struct Measured {
    /// From the first start until the capacities of all nodes are there and nothing is written.
    pub first_start: Duration,
    /// From another start until all nodes are followed and nothing is asked.
    pub restart: Duration,
    /// The most memory that the controller has had resident, in KiB.
    pub peak_kib: u64,
    /// What it has at rest.
    pub steady_kib: u64,
    /// Lists that were not asked for in pages.
    pub unpaged: Vec<String>,
    /// Requests after the restart, until it is at rest, by verb and resource.
    pub restart_calls: BTreeMap<String, u64>,
    /// Requests for new claims, by verb and resource.
    pub claim_calls: BTreeMap<String, u64>,
    /// CSIStorageCapacity objects in the end.
    pub capacities: usize,
    /// How many claims these were for.
    pub claims: u32,
    /// How long the scheduler looks for a node for one pod, on average, without what it waits for.
    pub attempt: Option<Duration>,
}

impl Measured {
    /// Requests of ours that write, for each claim.
    pub fn writes_per_claim(&self) -> f64 {
        let is_write = |call: &str| ["create", "update", "patch", "delete"].iter().any(|verb| call.starts_with(verb));
        let writes: u64 = self.claim_calls.iter().filter(|(call, _)| is_write(call)).map(|(_, count)| count).sum();
        writes as f64 / f64::from(self.claims.max(1))
    }

    /// For programs, and in the order in which people read it.
    pub fn json(&self, options: ScaleOptions) -> Value {
        let seconds = |time: Duration| (time.as_secs_f64() * 10.0).round() / 10.0;
        json!({
            "nodes": options.nodes,
            "volumes": options.volumes,
            "capacities": self.capacities,
            "first start s": seconds(self.first_start),
            "restart s": seconds(self.restart),
            "resident MiB": {"peak": self.peak_kib / 1024, "at rest": self.steady_kib / 1024},
            "lists without pages": self.unpaged,
            "requests of a restart": self.restart_calls,
            "requests for claims": {"claims": self.claims, "requests": self.claim_calls, "writes for each": self.writes_per_claim()},
            "scheduler ms a pod": self.attempt.map(|time| (time.as_secs_f64() * 10_000.0).round() / 10.0),
        })
    }
}

/// Measures it.
///
/// # Errors
/// When a part of it does not do what it should.
pub fn measure(options: ScaleOptions, profile: Profile) -> Result<Measured> {
    let cluster_options = ClusterOptions {
        name: format!("scale-{}", std::process::id()),
        nodes: 0,
        control_only: true,
        profile,
        ..ClusterOptions::default()
    };
    let cluster = step("Start a control plane", || Cluster::start(cluster_options))?;
    let measured = Scale { cluster: &cluster, options, profile }.run();
    cluster.end(measured.is_err());
    measured
}

struct Scale<'a> {
    cluster: &'a Cluster,
    options: ScaleOptions,
    profile: Profile,
}

impl Scale<'_> {
    fn run(&self) -> Result<Measured> {
        let cluster = self.cluster;
        let tls = cluster.directory().join("lvprov-tls");
        let lvprov = binaries::directory(self.profile).join("lvprov");
        let fleet = binaries::directory(Profile::Debug).join("fleet");
        let (lvprov, fleet) = (lvprov.display().to_string(), fleet.display().to_string());
        for file in ["00-namespace.yaml", "10-rbac.yaml"] {
            let file = paths::repository().join("deploy/manifests").join(file).display().to_string();
            cluster.kubectl(["apply", "-f", &file])?;
        }
        cluster.apply(
            "{apiVersion: storage.k8s.io/v1, kind: StorageClass, metadata: {name: scale}, provisioner: lvm.lvprov.io, \
             parameters: {volumeGroup: vg0}, volumeBindingMode: WaitForFirstConsumer}",
        )?;
        cluster.control().run([&*lvprov, "certificates", "--directory", &tls.display().to_string()])?;
        step("Write nodes, volumes and claims to etcd", || {
            let (nodes, volumes) = (self.options.nodes.to_string(), self.options.volumes.to_string());
            let load = Command::new([&*fleet, "load", "--nodes", &nodes, "--volumes", &volumes]);
            let output = cluster.control().exec_within(&load, b"", LIMIT)?;
            output.ok()
        })?;
        step("Wait until the API server has it", || self.wait_cached())?;
        let serve = Command::new([&*fleet, "serve", "--tls-dir", &tls.join("node").display().to_string()]);
        cluster.control().spawn(&raised(serve), cluster.directory().join("fleet.log"))?;

        let mut measured = Measured::default();
        let controller = self.start(&lvprov, "first")?;
        measured.first_start = step("Start the controller", || self.wait_published(&controller))?;
        measured.unpaged = unpaged(&self.audited()?);
        self.memory(&controller, &mut measured)?;
        self.stop(&controller)?;

        let before = self.audited()?.len();
        let controller = self.start(&lvprov, "second")?;
        measured.restart = step("Start it again", || self.wait_published(&controller))?;
        measured.restart_calls = calls(&self.audited()?[before..]);
        measured.unpaged.extend(unpaged(&self.audited()?[before..]));
        self.memory(&controller, &mut measured)?;

        let before = self.audited()?.len();
        step("Claims", || self.make_claims())?;
        measured.claims = self.options.new_claims;
        measured.claim_calls = calls(&self.audited()?[before..]);
        measured.capacities = self.capacities()?.len();
        if self.options.new_pods > 0 {
            measured.attempt = Some(step("Pods for the scheduler", || self.make_pods())?);
        }
        self.memory(&controller, &mut measured)?;
        self.stop(&controller)?;
        Ok(measured)
    }

    fn start(&self, lvprov: &str, name: &str) -> Result<Process> {
        let directory = self.cluster.directory();
        let tls = directory.join("lvprov-tls/controller").display().to_string();
        let shared_from = self.options.shared_from.to_string();
        let mut command = Command::new([lvprov, "controller", "--tls-dir", &tls, "--identity", name]);
        command.argv.extend(["--capacities-shared-from".to_owned(), shared_from]);
        command.env.insert("KUBECONFIG".into(), self.cluster.kubeconfig(LVPROV.0).display().to_string());
        let begun = Instant::now();
        let pid = self.cluster.control().spawn(&raised(command), directory.join(format!("controller-{name}.log")))?;
        Ok(Process { pid, begun })
    }

    fn stop(&self, controller: &Process) -> Result<()> {
        Ok(self.cluster.control().agent().end(controller.pid)?)
    }

    /// What the controller has asked so far.
    fn audited(&self) -> Result<Vec<Value>> {
        let text = fs::read_to_string(self.cluster.audit_log()).unwrap_or_default();
        // The last line may be half written.
        Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    fn capacities(&self) -> Result<Vec<Value>> {
        let mut list: Value = serde_json::from_str(&self.cluster.kubectl(["get", "--raw", CAPACITIES])?)?;
        Ok(list["items"].as_array_mut().map(std::mem::take).unwrap_or_default())
    }

    /// How many nodes have one.
    fn nodes_with_capacity(&self) -> Result<usize> {
        let nodes = |object: &Value| match object.pointer("/nodeTopology/matchExpressions/0/values") {
            Some(values) => values.as_array().map_or(0, Vec::len),
            None => 1,
        };
        Ok(self.capacities()?.iter().map(nodes).sum())
    }

    /// The API server serves watches from a cache, which learns of what was
    /// written behind its back as fast as it can: until what was written last
    /// is in it. Names are those of the program that has written them.
    fn wait_cached(&self) -> Result<()> {
        let begun = Instant::now();
        let last = |count: u32| count.saturating_sub(4)..count;
        let nodes = last(self.options.nodes).map(|number| format!("/api/v1/nodes/node-{number:05}"));
        let volumes = last(self.options.volumes)
            .map(|number| format!("/api/v1/persistentvolumes/pvc-00000002-0000-4000-8000-{number:012x}"));
        let claims = last(self.options.volumes).map(|number| {
            format!("/api/v1/namespaces/default/persistentvolumeclaims/data-set-{}-{}", number / 10, number % 10)
        });
        for path in nodes.chain(volumes).chain(claims) {
            // Of any version: out of the cache.
            let uri = format!("{path}?resourceVersion=0");
            while !self.cluster.kubectl_output(["get", "--raw", &uri])?.success() {
                ensure!(begun.elapsed() < LIMIT, "the API server has not learnt of {path}");
                std::thread::sleep(Duration::from_millis(500));
            }
        }
        Ok(())
    }

    /// Until all capacities are there, and nothing is written any more.
    fn wait_published(&self, controller: &Process) -> Result<Duration> {
        // All pages of all lists: it comes to rest between two of them, too.
        let lists = |log: &[Value]| {
            let listed = |what: &str, count: u32| {
                let pages =
                    log.iter().filter(|entry| entry["verb"] == "list" && entry["objectRef"]["resource"] == what);
                pages.count() >= count.div_ceil(PAGE) as usize
            };
            let ScaleOptions { nodes, volumes, .. } = self.options;
            listed("nodes", nodes) && listed("persistentvolumes", volumes) && listed("persistentvolumeclaims", volumes)
        };
        let begun_at = self.audited()?.len();
        let (mut last, mut rested) = (0, Instant::now());
        loop {
            ensure!(controller.begun.elapsed() < LIMIT, "it has not come to rest");
            std::thread::sleep(Duration::from_millis(250));
            self.alive(controller)?;
            let log = self.audited()?;
            // A Lease is renewed for ever.
            let work = log.iter().filter(|entry| entry["objectRef"]["resource"] != "leases").count();
            // It follows all nodes once it has a connection to each.
            if work != last
                || !lists(&log[begun_at.min(log.len())..])
                || self.connections(controller)? < self.options.nodes as usize
            {
                (last, rested) = (work, Instant::now());
            } else if rested.elapsed() > QUIET && self.nodes_with_capacity()? == self.options.nodes as usize {
                return Ok(controller.begun.elapsed() - rested.elapsed());
            }
        }
    }

    fn alive(&self, controller: &Process) -> Result<()> {
        match self.cluster.control().agent().status(controller.pid)? {
            None => Ok(()),
            Some(exit) => bail!("the controller has ended with {}", exit.shell_code()),
        }
    }

    /// Its connections to node services.
    fn connections(&self, controller: &Process) -> Result<usize> {
        let text = self.cluster.control().sh(&format!("ls /proc/{}/fd | wc -l", controller.pid))?;
        Ok(text.trim().parse()?)
    }

    fn memory(&self, controller: &Process, measured: &mut Measured) -> Result<()> {
        let status = self.cluster.control().read_file(&format!("/proc/{}/status", controller.pid))?;
        let kib = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<u64>().ok()
        };
        measured.peak_kib = measured.peak_kib.max(kib("VmHWM").context("VmHWM")?);
        measured.steady_kib = kib("VmRSS").context("VmRSS")?;
        say(format!("controller: {} MiB, at most {} MiB", measured.steady_kib / 1024, measured.peak_kib / 1024));
        Ok(())
    }

    /// Claims for which a node is chosen already.
    fn make_claims(&self) -> Result<()> {
        let claim = |number: u32| {
            json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim",
                "metadata": {"name": format!("new-{number}"), "namespace": "default", "annotations":
                    {"volume.kubernetes.io/selected-node": format!("node-{:05}", number % self.options.nodes)}},
                "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "scale", "resources": {"requests": {"storage": "1Gi"}}}})
        };
        let claims: Vec<String> = (0..self.options.new_claims).map(|number| claim(number).to_string()).collect();
        self.cluster.apply(&claims.join("\n---\n"))?;
        for number in 0..self.options.new_claims {
            self.cluster.wait(&format!("-n default pvc/new-{number}"), "jsonpath={.status.phase}=Bound", LIMIT)?;
        }
        // Events are sent after the PV.
        std::thread::sleep(QUIET);
        Ok(())
    }

    /// Pods whose node the scheduler chooses; how long it looks for one.
    fn make_pods(&self) -> Result<Duration> {
        let object = |number: u32| {
            format!(
                "{{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {{name: pod-{number}, namespace: default}}, spec: \
                 {{accessModes: [ReadWriteOnce], storageClassName: scale, resources: {{requests: {{storage: 1Gi}}}}}}}}\n---\n\
                 {{apiVersion: v1, kind: Pod, metadata: {{name: pod-{number}, namespace: default}}, spec: {{containers: [{{name: c, \
                 image: none}}], volumes: [{{name: v, persistentVolumeClaim: {{claimName: pod-{number}}}}}]}}}}"
            )
        };
        let objects: Vec<String> = (0..self.options.new_pods).map(object).collect();
        let before = self.attempts()?;
        self.cluster.apply(&objects.join("\n---\n"))?;
        for number in 0..self.options.new_pods {
            self.cluster.wait(&format!("-n default pod/pod-{number}"), "condition=PodScheduled", LIMIT)?;
        }
        let after = self.attempts()?;
        let count = after.1 - before.1;
        ensure!(count > 0.0, "the scheduler counts no attempt");
        Ok(Duration::from_secs_f64((after.0 - before.0) / count))
    }

    /// Seconds that the scheduler has looked for nodes, and how often.
    fn attempts(&self) -> Result<(f64, f64)> {
        let config: Value = serde_json::from_slice(&fs::read(self.cluster.kubeconfig(ADMIN.0))?)?;
        let token = config["users"][0]["user"]["token"].as_str().context("token")?;
        let text = self.cluster.control().sh(&format!(
            "curl -sk -H 'Authorization: Bearer {token}' https://127.0.0.1:10259/metrics | grep '^scheduler_scheduling_algorithm_duration_seconds_' || true"
        ))?;
        let of = |suffix: &str| -> f64 {
            let lines = text.lines().filter(|line| line.contains(suffix));
            lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
        };
        Ok((of("_seconds_sum"), of("_seconds_count")))
    }
}

struct Process {
    pid: i32,
    begun: Instant,
}

/// With as many descriptors as there may be.
fn raised(command: Command) -> Command {
    let words = ["sh", "-c", "ulimit -n $(ulimit -Hn); exec \"$@\"", "sh"].map(str::to_owned);
    Command { argv: words.into_iter().chain(command.argv).collect(), ..command }
}

/// Requests by verb and resource, without leases.
fn calls(log: &[Value]) -> BTreeMap<String, u64> {
    let mut calls = BTreeMap::new();
    for entry in log {
        let text = |pointer: &str| entry.pointer(pointer).and_then(Value::as_str).unwrap_or("");
        let (verb, resource) = (text("/verb"), text("/objectRef/resource"));
        if resource != "leases" {
            *calls.entry(format!("{verb} {resource}")).or_insert(0) += 1;
        }
    }
    calls
}

/// Lists of what there may be thousands of, that were asked for in one piece.
fn unpaged(log: &[Value]) -> Vec<String> {
    let found: BTreeSet<String> = log
        .iter()
        .filter(|entry| entry["verb"] == "list")
        .filter_map(|entry| entry["requestURI"].as_str())
        // One object by its name is no list.
        .filter(|uri| !uri.contains("limit=") && !uri.contains("metadata.name%3D"))
        .map(str::to_owned)
        .collect();
    found.into_iter().collect()
}
