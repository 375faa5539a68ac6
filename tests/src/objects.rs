//! Objects for tests, and waiting for what becomes of them.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use xtask::testbed::Cluster;

/// Long enough for anything on a busy machine of two cores.
pub const LONG: Duration = Duration::from_secs(240);
/// Command of a container that does nothing and ends when it is told to, which
/// the first process of a container only does where it says so.
pub const IDLE: &str = "[sh, -c, 'trap exit TERM; sleep 100000 & wait']";

/// Through what kubelet mounts the volumes of a class: a class's parameter, for
/// tests that are to hold for both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The FlexVolume driver; the default.
    Flexvolume,
    /// The node service.
    Csi,
}

impl Source {
    /// One of two names.
    pub fn pick<T>(self, flexvolume: T, csi: T) -> T {
        match self {
            Self::Flexvolume => flexvolume,
            Self::Csi => csi,
        }
    }

    /// Checks that a PV is of this kind, and gives the logical volume that it
    /// names, without the group.
    pub fn check(self, pv: &Value) -> Result<String> {
        let volume = match self {
            Self::Flexvolume => {
                ensure!(text(pv, "/spec/flexVolume/driver") == "lvprov.io/lvm", "{pv:#}");
                ensure!(pv.pointer("/spec/csi").is_none(), "{pv:#}");
                text(pv, "/spec/flexVolume/options/logicalVolume")
            }
            Self::Csi => {
                ensure!(text(pv, "/spec/csi/driver") == "lvm.lvprov.io", "{pv:#}");
                ensure!(pv.pointer("/spec/flexVolume").is_none(), "{pv:#}");
                let claim = serde_json::json!({
                    "claimNamespace": text(pv, "/spec/claimRef/namespace"),
                    "claimUID": text(pv, "/spec/claimRef/uid"),
                });
                ensure!(pv.pointer("/spec/csi/volumeAttributes") == Some(&claim), "{pv:#}");
                text(pv, "/spec/csi/volumeHandle").strip_prefix("vg0/").unwrap_or_default()
            }
        };
        Ok(volume.to_owned())
    }
}

/// A namespace of a test's own, with its objects; gone, with them, when the
/// test calls [`Space::end`].
#[derive(Debug)]
pub struct Space<'a> {
    /// The cluster.
    pub cluster: &'a Cluster,
    /// Name of the namespace.
    pub name: &'static str,
}

impl<'a> Space<'a> {
    /// Makes the namespace.
    pub fn new(cluster: &'a Cluster, name: &'static str) -> Result<Self> {
        cluster.apply(&format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}}}}}"))?;
        Ok(Self { cluster, name })
    }

    /// Deletes the namespace and waits until all in it has gone.
    pub fn end(self) -> Result<()> {
        self.cluster.kubectl(["delete", "namespace", self.name, "--timeout=240s"])?;
        Ok(())
    }

    /// Deletes the namespace without waiting, where what is left of it is of no
    /// interest any more.
    pub fn leave(self) -> Result<()> {
        self.cluster.kubectl(["delete", "namespace", self.name, "--wait=false"])?;
        Ok(())
    }

    /// A claim; `more` is further YAML of its spec, in flow style, such as `volumeMode: Block`.
    pub fn claim(&self, name: &str, class: &str, size: &str, more: &str) -> Result<()> {
        let modes = if more.contains("accessModes") { "" } else { "accessModes: [ReadWriteOnce], " };
        let more = if more.is_empty() { String::new() } else { format!(", {more}") };
        self.cluster.apply(&format!(
            "{{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {{name: {name}, namespace: {ns}}}, \
             spec: {{{modes}storageClassName: {class}, resources: {{requests: {{storage: {size}}}}}{more}}}}}",
            ns = self.name
        ))?;
        Ok(())
    }

    /// A snapshot of a claim's volume; see [`take_snapshots`].
    pub fn snapshot(&self, name: &str, claim: &str) -> Result<()> {
        self.cluster.apply(&format!(
            "{{apiVersion: snapshot.storage.k8s.io/v1, kind: VolumeSnapshot, metadata: {{name: {name}, namespace: {ns}}}, \
             spec: {{volumeSnapshotClassName: snaps, source: {{persistentVolumeClaimName: {claim}}}}}}}",
            ns = self.name
        ))?;
        Ok(())
    }

    /// A snapshot that is ready; what the node calls it.
    pub fn ready_snapshot(&self, name: &str, claim: &str) -> Result<String> {
        self.snapshot(name, claim)?;
        self.handle_of_snapshot(name)
    }

    /// Waits until a snapshot is ready; what the node calls it.
    pub fn handle_of_snapshot(&self, name: &str) -> Result<String> {
        self.wait(&format!("volumesnapshot/{name}"), "jsonpath={.status.readyToUse}=true")?;
        let snapshot = self.get(&format!("volumesnapshot {name}"))?;
        let content = text(&snapshot, "/status/boundVolumeSnapshotContentName");
        let content = self.cluster.get_json(&format!("volumesnapshotcontent {content}"))?;
        Ok(text(&content, "/status/snapshotHandle").to_owned())
    }

    /// A pod that does nothing, with volumes in flow style: `persistentVolumeClaim:
    /// {claimName: a}`, each mounted at /v0, /v1, …
    pub fn pod(&self, name: &str, node: Option<&str>, volumes: &[String]) -> Result<()> {
        self.cluster.apply(&self.pod_yaml(name, node, volumes))?;
        Ok(())
    }

    /// The YAML of [`Space::pod`].
    pub fn pod_yaml(&self, name: &str, node: Option<&str>, volumes: &[String]) -> String {
        let list: Vec<String> = volumes.iter().enumerate().map(|(i, v)| format!("{{name: v{i}, {v}}}")).collect();
        let mounts: Vec<String> = (0..volumes.len()).map(|i| format!("{{name: v{i}, mountPath: /v{i}}}")).collect();
        let selector = node.map_or(String::new(), |n| format!("nodeSelector: {{kubernetes.io/hostname: {n}}}, "));
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: {ns}}}, spec: {{{selector}\
             terminationGracePeriodSeconds: 1, containers: [{{name: c, image: 'lvprov.io/busybox:latest', \
             imagePullPolicy: Never, command: {IDLE}, volumeMounts: [{mounts}]}}], volumes: [{list}]}}}}",
            ns = self.name,
            mounts = mounts.join(", "),
            list = list.join(", ")
        )
    }

    /// A pod with one claim.
    pub fn pod_with_claim(&self, name: &str, node: Option<&str>, claim: &str) -> Result<()> {
        self.pod(name, node, &[claim_volume(claim)])
    }

    /// A pod that has a claim as the raw device /dev/raw; `more` is further YAML
    /// of its `persistentVolumeClaim`.
    pub fn raw_pod(&self, name: &str, node: Option<&str>, claim: &str, more: &str) -> Result<()> {
        let volume = format!("persistentVolumeClaim: {{claimName: {claim}{more}}}");
        let yaml = self.pod_yaml(name, node, &[volume]);
        let mounts = "volumeMounts: [{name: v0, mountPath: /v0}]";
        self.cluster.apply(&yaml.replace(mounts, "volumeDevices: [{name: v0, devicePath: /dev/raw}]")).map(drop)
    }

    /// Waits for a condition of an object of this namespace.
    pub fn wait(&self, object: &str, condition: &str) -> Result<()> {
        self.cluster.wait(&format!("-n {} {object}", self.name), condition, LONG)
    }

    /// Waits until a pod is Ready.
    pub fn ready(&self, pod: &str) -> Result<()> {
        self.wait(&format!("pod/{pod}"), "condition=Ready")
    }

    /// Deletes a pod and waits until it has gone.
    pub fn delete_pod(&self, name: &str) -> Result<()> {
        self.kubectl(&["delete", "pod", name, "--timeout=240s"])?;
        Ok(())
    }

    /// Runs kubectl in this namespace.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        let mut all = vec!["-n", self.name];
        all.extend(args);
        self.cluster.kubectl(all)
    }

    /// Runs a shell script in a pod.
    pub fn exec(&self, pod: &str, script: &str) -> Result<String> {
        self.kubectl(&["exec", pod, "--", "sh", "-c", script])
    }

    /// Has kubelet look at a running pod now, which it does every 60 to 90 s
    /// and whenever the pod has changed.
    pub fn hurry(&self, pod: &str) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
        self.kubectl(&["annotate", "pod", pod, &format!("test/hurry={now}"), "--overwrite"]).map(drop)
    }

    /// Waits until a claim that a pod uses has grown. kubelet does its part once
    /// the claim says that it may, so it is hurried more than once.
    pub fn grown(&self, claim: &str, pod: &str, size: &str) -> Result<()> {
        eventually("the claim has grown", || {
            if text(&self.get(&format!("pvc {claim}"))?, "/status/capacity/storage") == size {
                return Ok(true);
            }
            self.hurry(pod)?;
            std::thread::sleep(Duration::from_secs(2));
            Ok(false)
        })
    }

    /// An object of this namespace.
    pub fn get(&self, object: &str) -> Result<Value> {
        self.cluster.get_json(&format!("-n {} {object}", self.name))
    }

    /// Waits for an Event on an object, whose text holds all of `words`.
    pub fn event(&self, kind: &str, name: &str, words: &[&str]) -> Result<()> {
        self.cluster
            .wait_event(self.name, kind, name, LONG, |event| {
                words.iter().all(|word| event.message.contains(word) || event.reason.contains(word))
            })
            .with_context(|| format!("an event with {words:?}"))?;
        Ok(())
    }

    /// The PV that a claim is bound to.
    pub fn volume_of(&self, claim: &str) -> Result<Value> {
        self.wait(&format!("pvc/{claim}"), "jsonpath={.status.phase}=Bound")?;
        let claim = self.get(&format!("pvc {claim}"))?;
        self.cluster.get_json(&format!("pv {}", text(&claim, "/spec/volumeName")))
    }
}

/// A pod's volume from a claim.
pub fn claim_volume(claim: &str) -> String {
    format!("persistentVolumeClaim: {{claimName: {claim}}}")
}

/// A pod's log volume.
pub fn log_volume(volume: &str, more: &str) -> String {
    log_volume_of("1Gi", volume, more)
}

/// As [`log_volume`], of another size.
pub fn log_volume_of(size: &str, volume: &str, more: &str) -> String {
    let more = if more.is_empty() { String::new() } else { format!(", {more}") };
    format!(
        "flexVolume: {{driver: lvprov.io/lvm, options: {{type: log, volume: {volume}, size: {size}, quota: 100Mi{more}}}}}"
    )
}

/// A StorageClass of ours; `more` is further YAML in flow style.
pub fn class(cluster: &Cluster, name: &str, parameters: &str, more: &str) -> Result<()> {
    let binding = if more.contains("volumeBindingMode") { "" } else { "volumeBindingMode: WaitForFirstConsumer, " };
    let more = if more.is_empty() { String::new() } else { format!(", {more}") };
    cluster.apply(&format!(
        "{{apiVersion: storage.k8s.io/v1, kind: StorageClass, metadata: {{name: {name}}}, provisioner: lvm.lvprov.io, \
         {binding}allowVolumeExpansion: true, parameters: {{{parameters}}}{more}}}"
    ))?;
    Ok(())
}

/// A text in an object; empty where there is none.
pub fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or("")
}

/// Gives the controller the rights for snapshots, and makes a class of them.
pub fn take_snapshots(cluster: &Cluster) -> Result<()> {
    cluster.apply(include_str!("../../deploy/snapshots/rbac.yaml"))?;
    cluster.apply(
        "{apiVersion: snapshot.storage.k8s.io/v1, kind: VolumeSnapshotClass, metadata: {name: snaps}, \
         driver: lvm.lvprov.io, deletionPolicy: Delete}",
    )?;
    Ok(())
}

/// Names of the logical volumes on a node whose tags hold `tag`.
pub fn volumes_on(cluster: &Cluster, node: &str, tag: &str) -> Result<Vec<String>> {
    let out = cluster.node(node)?.run(["lvs", "--noheadings", "-o", "lv_name,lv_tags"])?;
    Ok(out
        .lines()
        .filter(|line| line.contains(tag))
        .filter_map(|line| line.split_whitespace().next().map(str::to_owned))
        .collect())
}

/// Size of a logical volume in bytes.
pub fn volume_size(cluster: &Cluster, node: &str, name: &str) -> Result<u64> {
    let select = format!("lv_name={name}");
    let shown = ["lvs", "--noheadings", "--units", "b", "--nosuffix", "-o", "lv_size", "--select", &select];
    let out = cluster.node(node)?.run(shown)?;
    Ok(out.trim().parse()?)
}

/// Waits for something that no API object tells of, such as a volume on a node.
pub fn eventually(what: &str, mut check: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + LONG;
    loop {
        if check()? {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("{what}: not within {LONG:?}");
        }
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// Runs `lvprov` in the controller's pod, as an admin does.
pub fn lvprov(cluster: &Cluster, args: &[&str]) -> Result<xtask::testbed::Output> {
    let mut all = vec!["-n", "lvprov-system", "exec", "deploy/lvprov-controller", "--", "/lvprov"];
    all.extend(args);
    cluster.kubectl_output(all)
}

/// As [`lvprov`], which is to succeed and print JSON.
pub fn lvprov_json(cluster: &Cluster, args: &[&str]) -> Result<Value> {
    let out = lvprov(cluster, args)?;
    ensure!(out.success(), "{args:?} ended with {}:\n{}{}", out.status, out.stdout, out.stderr);
    serde_json::from_str(&out.stdout).with_context(|| format!("{args:?} printed {}", out.stdout))
}
