//! What Kubernetes sees: claims and pods, against the same without lvprov.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::rows::Row;
use crate::progress::say;
use crate::testbed::{Cluster, ClusterNode, Timeline};

/// The node that everything takes place on.
const NODE: &str = "n1";
const LIMIT: Duration = Duration::from_secs(120);
/// For many at once.
const LONGEST: Duration = Duration::from_secs(600);
/// The node's report after a change has ended by then.
const SETTLE: Duration = Duration::from_secs(2);
/// Where the node's lvm commands are written down.
pub const COMMANDS: &str = "/run/lvprov-commands.log";
/// Classes of small volumes.
const SMALL: &str = "bench-small";
const SMALL_CSI: &str = "bench-small-csi";
/// Pods of the StatefulSet.
pub const REPLICAS: usize = 20;

/// A cluster with one node, lvprov installed.
pub struct Bench<'a> {
    cluster: &'a Cluster,
    node: ClusterNode<'a>,
    timeline: Timeline,
    resident: RefCell<Option<Value>>,
}

impl<'a> Bench<'a> {
    /// Makes the class that the claims are of, and begins to watch.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn new(cluster: &'a Cluster) -> Result<Self> {
        let classes = [("bench", "xfs", "flexvolume"), (SMALL, "ext4", "flexvolume"), (SMALL_CSI, "ext4", "csi")];
        for (name, fs, source) in classes {
            cluster.apply(&format!(
                "{{apiVersion: storage.k8s.io/v1, kind: StorageClass, metadata: {{name: {name}}}, \
                 provisioner: lvm.lvprov.io, volumeBindingMode: WaitForFirstConsumer, \
                 parameters: {{volumeGroup: vg0, csi.storage.k8s.io/fstype: {fs}, source: {source}}}}}"
            ))?;
        }
        Ok(Self {
            cluster,
            node: cluster.node(NODE)?,
            timeline: cluster.timeline(&["pods", "persistentvolumeclaims", "persistentvolumes"]),
            resident: RefCell::default(),
        })
    }

    /// `selected-node` is written with the claim itself: neither scheduler nor
    /// pod is in what is measured.
    fn claim(name: &str, class: &str, size: &str) -> String {
        format!(
            "{{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {{name: {name}, namespace: default, \
             annotations: {{volume.kubernetes.io/selected-node: {NODE}}}}}, spec: {{accessModes: [ReadWriteOnce], \
             storageClassName: {class}, resources: {{requests: {{storage: {size}}}}}}}}}\n---\n"
        )
    }

    /// Claims one after the other: until the PV is there, until it is bound, and
    /// from the claim's end to the PV's.
    ///
    /// # Errors
    /// When one of them is not served.
    pub fn claims(&self, count: usize) -> Result<Vec<Row>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let (mut to_volume, mut to_bound, mut to_end) = (Vec::new(), Vec::new(), Vec::new());
        let (mut bare, mut bare_end) = (Vec::new(), Vec::new());
        // lvm processes of the round with the most.
        let mut commands = 0;
        // The first round of each is not counted.
        for round in 0..=count {
            let mut one = || {
                let name = format!("one-{round}");
                self.timeline.clear();
                let before = self.commands()?;
                self.cluster.apply(&Self::claim(&name, "bench", "1Gi"))?;
                let selected = self.timeline.first("the claim", LIMIT, |object| is_claim(object, &name))?;
                let bound = self.timeline.first("a bound claim", LIMIT, |object| is_bound(object, &name))?;
                let volume = self.timeline.first("its volume", LIMIT, |object| is_volume_of(object, &name))?;
                commands = commands.max(self.commands()? - before);
                let ended = self.remove_claims(&[name])?;
                if round > 0 {
                    to_volume.push(ms(volume.saturating_duration_since(selected)));
                    to_bound.push(ms(bound.saturating_duration_since(selected)));
                    to_end.push(ms(ended));
                }
                Ok(())
            };
            let mut other = || {
                let (made, removed) = self.lvcreate("1g")?;
                if round > 0 {
                    bare.push(made);
                    bare_end.push(removed);
                }
                Ok(())
            };
            take_turns(round, &mut one, &mut other)?;
        }
        let processes = Some((commands, 1));
        Ok(vec![
            Row { processes, ..row("claim of 1 GiB: selected-node to PV", to_volume, "lvcreate", bare.clone()) },
            Row { processes, ..row("claim of 1 GiB: selected-node to Bound", to_bound, "lvcreate", bare) },
            row("claim of 1 GiB: its end to the PV's", to_end, "lvremove", bare_end),
        ])
    }

    /// Many claims at once: until all PVs are there, and until all are bound.
    ///
    /// # Errors
    /// When one of them is not served.
    pub fn claims_at_once(&self, claims: usize, count: usize) -> Result<Vec<Row>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let (mut to_volumes, mut to_bound, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
        // lvm processes of the round with the most.
        let mut commands = 0;
        for round in 0..count {
            let names: Vec<String> = (0..claims).map(|number| format!("all-{claims}-{round}-{number}")).collect();
            let mut all = || {
                self.timeline.clear();
                let before = self.commands()?;
                self.cluster.apply(&names.iter().map(|name| Self::claim(name, SMALL, "64Mi")).collect::<String>())?;
                let first = self.timeline.first("the first claim", LIMIT, |object| is_claim(object, &names[0]))?;
                let (mut last_volume, mut last_bound) = (first, first);
                for name in &names {
                    let bound = self.timeline.first("a bound claim", LONGEST, |object| is_bound(object, name))?;
                    let volume = self.timeline.first("its volume", LONGEST, |object| is_volume_of(object, name))?;
                    (last_volume, last_bound) = (last_volume.max(volume), last_bound.max(bound));
                }
                to_volumes.push(ms(last_volume - first));
                to_bound.push(ms(last_bound - first));
                commands = commands.max(self.commands()? - before);
                self.remove_claims(&names).map(drop)
            };
            let mut bare = || {
                let mut sum = 0.0;
                for _ in 0..claims {
                    sum += self.lvcreate("64m")?.0;
                }
                theirs.push(sum);
                Ok(())
            };
            take_turns(round, &mut all, &mut bare)?;
        }
        let processes = Some((commands, claims as u64));
        let against = "as many lvcreate, in turn";
        Ok(vec![
            Row { processes, ..row(&format!("{claims} claims at once: all PVs"), to_volumes, against, theirs.clone()) },
            Row { processes, ..row(&format!("{claims} claims at once: all Bound"), to_bound, against, theirs) },
        ])
    }

    /// lvm processes that lvprov has started on the node so far.
    fn commands(&self) -> Result<u64> {
        let log = self.node.read_file(COMMANDS).unwrap_or_default();
        Ok(log.lines().filter(|line| line.contains("\"command\":\"lvm") && line.contains("\"process\":true")).count()
            as u64)
    }

    /// Removes claims with their volumes. Gives the time from the end of the
    /// first claim to that of the last PV.
    fn remove_claims(&self, names: &[String]) -> Result<Duration> {
        let claims = self.cluster.get_json("-n default persistentvolumeclaims")?;
        let volume = |claim: &Value| claim["spec"]["volumeName"].as_str().map(str::to_owned);
        let claims = claims["items"].as_array().map(Vec::as_slice).unwrap_or_default();
        let volumes: Vec<String> = claims.iter().filter_map(volume).collect();
        ensure!(volumes.len() == names.len(), "{} volumes of {} claims", volumes.len(), names.len());
        self.timeline.clear();
        let words = ["-n", "default", "delete", "pvc", "--wait=false"].into_iter().map(str::to_owned);
        self.cluster.kubectl(words.chain(names.iter().cloned()))?;
        let first = self.timeline.first("the end of a claim", LIMIT, |object| {
            object["kind"] == "PersistentVolumeClaim" && Timeline::is_gone(object)
        })?;
        let mut last = first;
        for volume in &volumes {
            let gone = |object: &Value| is(object, "PersistentVolume", volume) && Timeline::is_gone(object);
            last = last.max(self.timeline.first("the end of a PV", LONGEST, gone)?);
        }
        std::thread::sleep(SETTLE);
        Ok(last - first)
    }

    /// Milliseconds of a bare lvcreate, and of the lvremove after it. It is given
    /// the options that ours has, but for the tags, and holds our lock, so that
    /// the node service does not take it for a change to be reported while it
    /// is measured.
    fn lvcreate(&self, size: &str) -> Result<(f64, f64)> {
        let script = format!(
            "export LVM_SUPPRESS_FD_WARNINGS=1\n\
             exec 9>> /run/lvprov/vg-vg0.lock && flock 9 || exit 1\n\
             before=${{EPOCHREALTIME/./}}\n\
             lvm lvcreate --yes --quiet --wipesignatures y --zero y --name bench --size {size} vg0 > /dev/null || exit 1\n\
             made=${{EPOCHREALTIME/./}}\n\
             lvm lvremove --yes --quiet vg0/bench > /dev/null || exit 1\n\
             echo $((made - before)) $((${{EPOCHREALTIME/./}} - made))"
        );
        let took = self.node.run(["bash", "-c", &script])?;
        let (made, removed) = took.trim().split_once(' ').context("two times")?;
        Ok((made.parse::<f64>()? / 1000.0, removed.parse::<f64>()? / 1000.0))
    }

    /// Pods with a new claim: until they are ready.
    ///
    /// # Errors
    /// When one of them does not become ready.
    pub fn pods(&self, count: usize) -> Result<Vec<Row>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 0..=count {
            let mut with_claim = || {
                let name = format!("claim-{round}");
                let claim = Self::claim(&name, "bench", "1Gi")
                    .replace(&format!("annotations: {{volume.kubernetes.io/selected-node: {NODE}}}"), "");
                let pod = pod(&name, &format!("persistentVolumeClaim: {{claimName: {name}}}"));
                let took = self.pod_start(&name, &format!("{claim}{pod}"))?;
                if round > 0 {
                    ours.push(took);
                }
                self.remove_claims(&[name]).map(drop)
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
        Ok(vec![row("pod with a new claim of 1 GiB: to Ready", ours, "with an emptyDir", theirs)])
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

    /// A StatefulSet whose pods start all at once, with a claim each: until all are Ready.
    ///
    /// # Errors
    /// When one of them does not become ready.
    pub fn stateful_sets(&self, count: usize) -> Result<Vec<Row>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let (mut flex, mut csi, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..count {
            let mut with_claims = || {
                // Each of the two is as often the first.
                let mut both = [("flex", SMALL, &mut flex), ("csi", SMALL_CSI, &mut csi)];
                if round % 2 == 1 {
                    both.reverse();
                }
                for (name, class, times) in both {
                    let name = format!("{name}-{round}");
                    times.push(self.stateful_set(&name, Some(class))?);
                    let claims: Vec<String> = (0..REPLICAS).map(|pod| format!("v-{name}-{pod}")).collect();
                    self.remove_claims(&claims)?;
                }
                Ok(())
            };
            let mut without = || {
                theirs.push(self.stateful_set(&format!("none-{round}"), None)?);
                std::thread::sleep(SETTLE);
                Ok(())
            };
            take_turns(round, &mut with_claims, &mut without)?;
        }
        let against = "without volumes";
        Ok(vec![
            row(&format!("StatefulSet of {REPLICAS}, flexvolume: all Ready"), flex, against, theirs.clone()),
            row(&format!("StatefulSet of {REPLICAS}, csi: all Ready"), csi, against, theirs),
        ])
    }

    /// Milliseconds from its first pod's appearance until all are Ready; deletes it with its pods.
    fn stateful_set(&self, name: &str, class: Option<&str>) -> Result<f64> {
        self.timeline.clear();
        self.cluster.apply(&stateful_set(name, class))?;
        let pods: Vec<String> = (0..REPLICAS).map(|number| format!("{name}-{number}")).collect();
        let of_it = |object: &Value| pods.iter().any(|pod| is(object, "Pod", pod));
        let first = self.timeline.first("the first pod", LIMIT, of_it)?;
        let mut last = first;
        for pod in &pods {
            let ready = |object: &Value| is(object, "Pod", pod) && is_ready(object);
            last = last.max(self.timeline.first("a ready pod", LONGEST, ready)?);
        }
        if class.is_some() {
            *self.resident.borrow_mut() = Some(self.resident()?);
        }
        self.cluster.kubectl([
            "-n",
            "default",
            "delete",
            "statefulset",
            name,
            "--cascade=foreground",
            "--timeout=240s",
        ])?;
        Ok(ms(last - first))
    }

    /// MiB that the node service and the controller have resident, and how many
    /// of them are anonymous, that is, not the code in their files.
    ///
    /// # Errors
    /// When one of them does not run here.
    pub fn resident(&self) -> Result<Value> {
        let of = |what: &str| -> Result<Value> {
            let script = format!("awk '/VmRSS|RssAnon/ {{print $2}}' /proc/$(pgrep -o -f '^/lvprov[ -]{what}')/status");
            let kib = self.node.sh(&script)?;
            let mut mib = kib.lines().map(|kib| kib.trim().parse::<f64>().map(|kib| kib / 1024.0));
            let mut next = || mib.next().context("VmRSS and RssAnon")?.map_err(anyhow::Error::from);
            Ok(json!({"all": next()?, "anonymous": next()?}))
        };
        Ok(json!({"node service": of("node")?, "controller": of("controller")?}))
    }

    /// The same, when the pods of the last StatefulSet with claims were all ready.
    pub fn resident_with_volumes(&self) -> Option<Value> {
        self.resident.borrow().clone()
    }

    /// The node, for what is asked of the machine.
    pub fn node(&self) -> &ClusterNode<'a> {
        &self.node
    }

    /// The version of Kubernetes.
    ///
    /// # Errors
    /// When kubectl fails.
    pub fn kubernetes(&self) -> Result<String> {
        let versions: Value = serde_json::from_str(&self.cluster.kubectl(["version", "-o", "json"])?)?;
        Ok(versions["serverVersion"]["gitVersion"].as_str().unwrap_or("?").to_owned())
    }
}

fn row(what: &str, ours: Vec<f64>, against: &'static str, theirs: Vec<f64>) -> Row {
    Row { what: what.to_owned(), ours, against, theirs, processes: None }
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

fn stateful_set(name: &str, class: Option<&str>) -> String {
    let mounts = if class.is_some() { ", volumeMounts: [{name: v, mountPath: /v}]" } else { "" };
    let templates = class.map_or(String::new(), |class| {
        format!(
            ", volumeClaimTemplates: [{{metadata: {{name: v}}, spec: {{accessModes: [ReadWriteOnce], storageClassName: \
             {class}, resources: {{requests: {{storage: 64Mi}}}}}}}}]"
        )
    });
    format!(
        "{{apiVersion: apps/v1, kind: StatefulSet, metadata: {{name: {name}, namespace: default}}, spec: {{\
         replicas: {REPLICAS}, serviceName: none, podManagementPolicy: Parallel, \
         selector: {{matchLabels: {{app: {name}}}}}, template: {{metadata: {{labels: {{app: {name}}}}}, spec: {{\
         terminationGracePeriodSeconds: 0, containers: [{{name: c, image: 'lvprov.io/busybox:latest', \
         imagePullPolicy: Never, command: [sleep, '100000']{mounts}}}]}}}}{templates}}}}}"
    )
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
