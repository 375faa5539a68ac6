//! The driver against mount(8) and umount(8), and against a driver written as a
//! shell script.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command as Process, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lvm::identity::data_uuid;
use lvm::names::{ClaimUid, Namespace};
use serde_json::{Value, json};

use super::rows::Row;
use super::timing::{Plan, Runs};
use crate::agent::Command;
use crate::paths;
use crate::sandbox::xtask_binary;
use crate::setup::binaries::{self, Profile};
use crate::testbed::Node;

const CLAIM: &str = "0f0e7f0a-1111-4222-8333-0000000000b0";
const NAMESPACE: &str = "bench";
const SHELL_DRIVER: &str = include_str!("shell-driver.sh");
const LIMIT: Duration = Duration::from_secs(3600);

/// A pod's volume, as kubelet calls for it.
struct Volume {
    directory: String,
    json: String,
}

impl Volume {
    /// The directory is below `root`, not below kubelet's: that one removes the
    /// directories of pods that it does not know.
    fn new(root: &str, pod: &str, options: Value) -> Self {
        let uid = format!("bench-{pod}");
        let mut options = options;
        for (key, value) in [
            ("fsType", "xfs"),
            ("pod.name", pod),
            ("pod.namespace", NAMESPACE),
            ("pod.uid", &uid),
            ("pvOrVolumeName", "volume"),
            ("readwrite", "rw"),
            ("serviceAccount.name", "default"),
        ] {
            options[format!("kubernetes.io/{key}")] = value.into();
        }
        Self { directory: format!("{root}/pods/{uid}/volumes/lvprov.io~lvm/volume"), json: options.to_string() }
    }

    fn data(root: &str, pod: &str) -> Self {
        let lv = format!("pvc-{CLAIM}");
        Self::new(root, pod, json!({"type": "data", "volumeGroup": "vg0", "logicalVolume": lv, "claimUID": CLAIM}))
    }

    fn log(root: &str, pod: &str) -> Self {
        Self::new(root, pod, json!({"type": "log", "volume": "logs", "size": "1Gi", "quota": "100Mi"}))
    }

    /// A mount and an unmount by a driver.
    fn by(&self, driver: &str) -> Vec<Vec<String>> {
        vec![words(&[driver, "mount", &self.directory, &self.json]), words(&[driver, "unmount", &self.directory])]
    }

    /// The same by mount(8) and umount(8).
    fn by_hand(&self, mount: &[&str]) -> Vec<Vec<String>> {
        let mount = [&["mount"], mount, &[&self.directory]].concat();
        vec![words(&mount), words(&["umount", &self.directory])]
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn uuid() -> Result<String> {
    Ok(data_uuid(&Namespace::parse(NAMESPACE)?, &ClaimUid::parse(CLAIM)?).to_string())
}

/// A ready data volume, and a second pod's directory of a log volume, on a node
/// with real LVM.
///
/// # Errors
/// When a call fails.
pub fn on_node(node: &Node, count: usize) -> Result<Vec<Row>> {
    if count == 0 {
        return Ok(Vec::new());
    }
    let (driver, shell) = ("/usr/local/bin/lvprov-flexvolume", "/run/bench/shell-driver.sh");
    node.write_file(shell, SHELL_DRIVER)?;
    let first = Volume::log("/run/bench", "first");
    node.sh(&format!(
        "chmod +x {shell}\n\
         lvcreate -qq -y -n pvc-{CLAIM} -L 1g --addtag lvprov.io/kind=data --addtag lvprov.io/claim-uid={CLAIM} \
           --addtag lvprov.io/claim={NAMESPACE}/data --addtag lvprov.io/cluster={CLAIM} vg0\n\
         mkfs.xfs -q -m uuid={} /dev/vg0/pvc-{CLAIM}\n\
         mkdir -p {directory}\n\
         {driver} mount {directory} '{}'",
        uuid()?,
        first.json,
        directory = first.directory,
    ))?;
    let mut rows = Vec::new();
    let data = Volume::data("/run/bench", "data");
    let device = format!("/dev/vg0/pvc-{CLAIM}");
    let sides = vec![data.by(driver), data.by_hand(&["-t", "xfs", &device]), data.by(shell)];
    rows.extend(compare("node, data volume", measure_on(node, count, sides, &[&data])?));
    let log = Volume::log("/run/bench", "second");
    // Another pod's, so that the two drivers' quotas do not meet.
    let other = Volume::log("/run/bench", "other");
    let directory = format!("/var/log/lvprov/{NAMESPACE}/logs/second");
    let sides = vec![log.by(driver), log.by_hand(&["--bind", &directory]), other.by(shell)];
    rows.extend(compare("node, log directory", measure_on(node, count, sides, &[&log, &other])?));
    Ok(rows)
}

fn measure_on(node: &Node, rounds: usize, sides: Vec<Vec<Vec<String>>>, volumes: &[&Volume]) -> Result<Vec<Vec<Runs>>> {
    for volume in volumes {
        node.run(["mkdir", "-p", &volume.directory])?;
    }
    let plan = serde_json::to_vec(&Plan { rounds, sides })?;
    let xtask = xtask_binary()?.display().to_string();
    let output = node.exec_within(&Command::new([xtask.as_str(), "internal", "time"]), &plan, LIMIT)?;
    Ok(serde_json::from_str(&output.ok()?)?)
}

/// A file system on a loop device, in a mount namespace and a /dev of its own:
/// this machine may have no device-mapper, and a driver that finds its volume
/// ready does not ask for it.
///
/// # Errors
/// When a call fails.
pub fn natively(profile: Profile, count: usize) -> Result<Vec<Row>> {
    if count == 0 {
        return Ok(Vec::new());
    }
    fs::create_dir_all(paths::testbed())?;
    let work = tempfile::Builder::new().prefix("bench-").tempdir_in(paths::testbed())?;
    let root = work.path().to_str().context("a path that is no text")?;
    let image = format!("{root}/image");
    File::create(&image)?.set_len(1 << 30)?;
    let made = Process::new("mkfs.xfs").args(["-q", "-m", &format!("uuid={}", uuid()?), &image]).status()?;
    ensure!(made.success(), "mkfs.xfs failed");
    let data = Volume::data(root, "data");
    fs::create_dir_all(&data.directory)?;
    let name = lvm::names::dm_name(&"vg0".parse()?, &format!("pvc-{CLAIM}").parse()?);
    let device = format!("/dev/mapper/{name}");
    let driver = binaries::directory(profile).join("lvprov-flexvolume");
    let sides =
        vec![data.by(driver.to_str().context("a path that is no text")?), data.by_hand(&["-t", "xfs", &device])];
    let measured = in_own_namespace(&image, &device, work.path(), &Plan { rounds: count, sides })?;
    Ok(compare("natively, data volume", measured))
}

/// Runs the plan where `device` is the image. All of it goes with the process,
/// however it ends: the loop device is told to when its last user closes it.
fn in_own_namespace(image: &str, device: &str, work: &Path, plan: &Plan) -> Result<Vec<Vec<Runs>>> {
    const SCRIPT: &str = r#"
        loop=$(losetup --find --show "$1")
        exec 9< "$loop"
        losetup --detach "$loop"
        mkdir -p "$3/dev"
        mount -t tmpfs tmpfs "$3/dev"
        mkdir "$3/dev/mapper"
        cp -a /dev/null /dev/zero /dev/urandom "$loop" "$3/dev/"
        cp -a "$loop" "$3$2"
        mount --move "$3/dev" /dev
        exec "$4" internal time
    "#;
    let mut child = Process::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-ec", SCRIPT, "sh", image, device])
        .arg(work)
        .arg(xtask_binary()?)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run unshare")?;
    let plan = serde_json::to_vec(plan)?;
    child.stdin.take().context("no standard input")?.write_all(&plan)?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "measuring on this machine failed: {}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Rows from the driver's mount and unmount against each other side's.
fn compare(what: &str, measured: Vec<Vec<Runs>>) -> Vec<Row> {
    let names = [["mount(8)", "umount(8)"], ["shell driver", "shell driver"]];
    let (ours, others) = measured.split_first().map_or((&[][..], &[][..]), |(ours, others)| (ours.as_slice(), others));
    let mut rows = Vec::new();
    for (theirs, names) in others.iter().zip(names) {
        for (((ours, theirs), against), verb) in ours.iter().zip(theirs).zip(names).zip(["mount", "unmount"]) {
            rows.push(Row {
                what: format!("{what}: {verb}"),
                ours: ours.milliseconds.clone(),
                against,
                theirs: theirs.milliseconds.clone(),
                processes: Some((ours.processes, theirs.processes)),
            });
        }
    }
    rows
}
