//! Calling the driver as kubelet does, and judging its answer as kubelet does.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};
use xtask::testbed::Node;

/// A call's options, and the directory they are for.
#[derive(Debug, Clone)]
pub struct Call {
    /// UID of the pod.
    pub uid: String,
    /// Name of the volume in the pod, or of the PV.
    pub name: String,
    options: Map<String, Value>,
}

impl Call {
    /// A pod's volume; nothing is asked for yet.
    pub fn new(namespace: &str, pod: &str, uid: &str, name: &str) -> Self {
        let options = json!({
            "kubernetes.io/fsType": "xfs",
            "kubernetes.io/pod.name": pod,
            "kubernetes.io/pod.namespace": namespace,
            "kubernetes.io/pod.uid": uid,
            "kubernetes.io/pvOrVolumeName": name,
            "kubernetes.io/readwrite": "rw",
            "kubernetes.io/serviceAccount.name": "default",
        });
        let Value::Object(options) = options else { unreachable!() };
        Self { uid: uid.to_owned(), name: name.to_owned(), options }
    }

    /// The claim's data volume on vg0.
    pub fn data(namespace: &str, pod: &str, pod_uid: &str, claim_uid: &str) -> Self {
        Self::new(namespace, pod, pod_uid, &format!("pvc-{claim_uid}"))
            .with("type", "data")
            .with("volumeGroup", "vg0")
            .with("logicalVolume", format!("pvc-{claim_uid}"))
            .with("claimUID", claim_uid)
    }

    /// A log volume of 1 GiB, 100 MiB for the pod.
    pub fn log(namespace: &str, pod: &str, uid: &str, volume: &str) -> Self {
        Self::new(namespace, pod, uid, "logs")
            .with("type", "log")
            .with("volume", volume)
            .with("size", "1Gi")
            .with("quota", "100Mi")
    }

    /// With another option, or another value of one.
    pub fn with(mut self, key: &str, value: impl Into<String>) -> Self {
        self.options.insert(key.to_owned(), Value::String(value.into()));
        self
    }

    /// Without an option.
    pub fn without(mut self, key: &str) -> Self {
        self.options.remove(key);
        self
    }

    /// With another file system.
    pub fn fs(self, fs: &str) -> Self {
        self.with("kubernetes.io/fsType", fs)
    }

    /// The directory that kubelet names.
    pub fn directory(&self) -> String {
        format!("/var/lib/kubelet/pods/{}/volumes/lvprov.io~lvm/{}", self.uid, self.name)
    }

    /// The JSON that kubelet passes.
    pub fn json(&self) -> String {
        Value::Object(self.options.clone()).to_string()
    }

    /// Makes the directory, as kubelet does, and mounts.
    pub fn mount(&self, node: &Node) -> Result<Answer> {
        node.run(["mkdir", "-p", &self.directory()])?;
        call(node, &["mount", &self.directory(), &self.json()])
    }

    /// Unmounts.
    pub fn unmount(&self, node: &Node) -> Result<Answer> {
        call(node, &["unmount", &self.directory()])
    }

    /// Grows to so many bytes.
    pub fn expand(&self, node: &Node, bytes: u64) -> Result<Answer> {
        call(node, &["expandfs", &self.json(), "", &self.directory(), &bytes.to_string(), "0"])
    }

    /// Whether anything is mounted at the directory.
    pub fn is_mounted(&self, node: &Node) -> Result<bool> {
        Ok(node.exec(["mountpoint", "-q", &self.directory()])?.success())
    }
}

/// What the driver answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Success, Failure or Not supported.
    pub status: String,
    /// What a user reads in the Event.
    pub message: String,
    /// The whole object.
    pub json: Value,
}

impl Answer {
    /// Fails unless it is Success.
    pub fn success(self) -> Result<()> {
        ensure!(self.status == "Success", "the driver said {}: {}", self.status, self.message);
        Ok(())
    }

    /// Fails unless it is Failure with a message that holds all of `words`.
    pub fn failure(self, words: &[&str]) -> Result<()> {
        ensure!(self.status == "Failure", "the driver said {}, not Failure", self.status);
        for word in words {
            ensure!(self.message.contains(word), "{word:?} is not in the message {:?}", self.message);
        }
        Ok(())
    }
}

/// Runs the driver and holds its answer to kubelet's rules.
pub fn call(node: &Node, args: &[&str]) -> Result<Answer> {
    let mut argv = vec!["lvprov-flexvolume"];
    argv.extend(args);
    let output = node.exec(argv)?;
    ensure!(output.stderr.is_empty(), "the driver wrote to standard error: {}", output.stderr);
    let json: Value = serde_json::from_str(&output.stdout).with_context(|| format!("answer {:?}", output.stdout))?;
    let text = |key: &str| json[key].as_str().unwrap_or("").to_owned();
    let answer = Answer { status: text("status"), message: text("message"), json: json.clone() };
    match answer.status.as_str() {
        "Success" => ensure!(output.status == 0, "Success with exit status {}", output.status),
        "Failure" | "Not supported" => ensure!(output.status != 0, "{} with exit status 0", answer.status),
        other => bail!("status {other:?}"),
    }
    Ok(answer)
}
