//! What Kubernetes sees: claims and pods, against the same without lvprov.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;

use super::rows::Row;
use crate::progress::say;
use crate::testbed::{Cluster, ClusterNode, Timeline};

/// The node that everything takes place on.
const NODE: &str = "n1";
const LIMIT: Duration = Duration::from_secs(120);
/// The node's report after a change has ended by then.
const SETTLE: Duration = Duration::from_secs(2);
/// So many claims at once.
const AT_ONCE: usize = 20;

/// A cluster with one node, lvprov installed.
pub struct Bench<'a> {
    cluster: &'a Cluster,
    node: ClusterNode<'a>,
    timeline: Timeline,
}

impl<'a> Bench<'a> {
    /// Makes the class that the claims are of, and begins to watch.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn new(cluster: &'a Cluster) -> Result<Self> {
        cluster.apply(
            "{apiVersion: storage.k8s.io/v1, kind: StorageClass, metadata: {name: bench}, \
             provisioner: lvm.lvprov.io, volumeBindingMode: WaitForFirstConsumer, parameters: {volumeGroup: vg0}}",
        )?;
        Ok(Self {
            cluster,
            node: cluster.node(NODE)?,
            timeline: cluster.timeline(&["pods", "persistentvolumeclaims", "persistentvolumes"]),
        })
    }

    /// `selected-node` is written with the claim itself: neither scheduler nor
    /// pod is in what is measured.
    fn claim(name: &str, size: &str) -> String {
        format!(
            "{{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {{name: {name}, namespace: default, \
             annotations: {{volume.kubernetes.io/selected-node: {NODE}}}}}, spec: {{accessModes: [ReadWriteOnce], \
             storageClassName: bench, resources: {{requests: {{storage: {size}}}}}}}}}\n---\n"
        )
    }

    /// Claims one after the other: until the PV is there, and until it is bound.
    ///
    /// # Errors
    /// When one of them is not served.
    pub fn claims(&self, count: usize) -> Result<Vec<Row>> {
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
            row("claim of 1 GiB: selected-node to PV", to_volume, "lvcreate", bare.clone()),
            row("claim of 1 GiB: selected-node to Bound", to_bound, "lvcreate", bare),
        ])
    }

    /// Twenty claims at once: until all are bound.
    ///
    /// # Errors
    /// When one of them is not served.
    pub fn claims_at_once(&self, count: usize) -> Result<Vec<Row>> {
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
        Ok(vec![row("20 claims at once: all Bound", ours, "20 lvcreate, in turn", theirs)])
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
    use serde_json::json;

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
