//! Crashes at every step: a process ends there, or the node's power goes. Then
//! nothing is lost, leaked or made twice.
//!
//! The cluster runs lvprov with fault points (`lvm/src/fault.rs`). Some cases
//! run with every test, all of them with `--full`; `LVPROV_CASE="grow cut !raid1"`
//! picks those that have all of these words in their names, and none with `!`; `|`
//! stands between alternatives.

mod cases;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cases::{Case, Happening, Operation};
use lvprov_tests::Test;
use lvprov_tests::objects::{
    Space, claim_volume, class, eventually, log_volume_of, lvprov, lvprov_json, take_snapshots, text, volume_size,
    volumes_on,
};
use xtask::setup::binaries::{self, Profile};
use xtask::testbed::{Cluster, ClusterOptions};

const TESTS: [Test<Cluster>; 1] = [("matrix::nothing_is_lost_leaked_or_made_twice", matrix)];

const NODE: &str = "n1";
/// Where points are armed (`lvm::fault::DIRECTORY`, which is not there without the feature).
const FAULTS: &str = "/run/lvprov-faults";
/// Until a point is passed that an operation comes by.
const HIT: Duration = Duration::from_secs(150);

/// Log volumes stay to the end of the matrix, all on one disk, so they are small too.
const SMALL: &str = "320Mi";
const LARGE: &str = "640Mi";

fn main() {
    lvprov_tests::run(&TESTS, &[], start)
}

fn start() -> Result<Cluster> {
    binaries::build(Profile::Faults)?;
    shipped_binaries_have_no_fault_points()?;
    let options = ClusterOptions {
        name: format!("matrix-{}", std::process::id()),
        nodes: 1,
        profile: Profile::Faults,
        spare_disks_gib: vec![2, 2],
        ..ClusterOptions::default()
    };
    let cluster = Cluster::start(options)?;
    // A controller that may write there: the node service and the driver see the node's own files.
    cluster.node(NODE)?.sh(&format!("mkdir -m 0777 {FAULTS}; vgcreate -qq -y vg1 /dev/ubdc /dev/ubdd"))?;
    cluster.install_lvprov()?;
    let patch = format!(
        r#"{{"spec":{{"strategy":{{"type":"Recreate","rollingUpdate":null}},"template":{{"spec":{{
            "volumes":[{{"name":"faults","hostPath":{{"path":"{FAULTS}","type":"DirectoryOrCreate"}}}}],
            "containers":[{{"name":"controller","volumeMounts":[{{"name":"faults","mountPath":"{FAULTS}"}}]}}]}}}}}}}}"#
    );
    cluster.kubectl(["-n", "lvprov-system", "patch", "deployment", "lvprov-controller", "-p", &patch])?;
    cluster.kubectl(["-n", "lvprov-system", "rollout", "status", "deployment/lvprov-controller", "--timeout=240s"])?;
    class(&cluster, "flexvolume", "volumeGroup: vg0", "")?;
    class(&cluster, "csi", "volumeGroup: vg0, source: csi", "")?;
    class(&cluster, "raid1", "volumeGroup: vg1, source: csi, layout: raid1", "")?;
    take_snapshots(&cluster)?;
    class(&cluster, "zero", "volumeGroup: vg0, deletePolicy: zero", "")?;
    Ok(cluster)
}

/// The feature must not get into what is shipped, by whatever else is built beside it.
fn shipped_binaries_have_no_fault_points() -> Result<()> {
    for (profile, expected) in [(Profile::Faults, true), (Profile::Debug, false)] {
        for name in ["lvprov", "lvprov-flexvolume"] {
            let path = binaries::directory(profile).join(name);
            let program = std::fs::read(&path).with_context(|| format!("{}", path.display()))?;
            let found = program.windows(FAULTS.len()).any(|window| window == FAULTS.as_bytes());
            ensure!(found == expected, "{}: fault points: {found}", path.display());
        }
    }
    Ok(())
}

fn matrix(cluster: &Cluster) -> Result<()> {
    let words = std::env::var("LVPROV_CASE").unwrap_or_default();
    let full = lvprov_tests::full() || !words.is_empty();
    let cases: Vec<Case> = cases::all()
        .into_iter()
        .filter(|case| {
            let name = case.name();
            let suits = |word: &str| match word.strip_prefix('!') {
                Some(word) => !name.contains(word),
                None => name.contains(word),
            };
            (full || case.always) && words.split('|').any(|words| words.split_whitespace().all(suits))
        })
        .collect();
    ensure!(!cases.is_empty(), "no case has {words:?} in its name");
    let mut failed = Vec::new();
    for (number, case) in cases.iter().enumerate() {
        let begun = Instant::now();
        let result = Run::new(cluster, case, number).and_then(|run| run.whole());
        let seconds = begun.elapsed().as_secs_f64();
        match result {
            Ok(()) => eprintln!("case {} of {}: {} ok ({seconds:.1} s)", number + 1, cases.len(), case.name()),
            Err(error) => {
                eprintln!("case {} of {}: {} FAILED ({seconds:.1} s): {error:#}", number + 1, cases.len(), case.name());
                failed.push(format!("{}: {error:#}", case.name()));
                // What is armed must not meet the next one.
                cluster.node(NODE)?.sh(&format!("rm -f {FAULTS}/*"))?;
            }
        }
    }
    ensure!(failed.is_empty(), "{} of {} cases failed:\n{}", failed.len(), cases.len(), failed.join("\n"));
    // The last cut may have been a moment ago.
    let listing = ["gc", "--json", "--older-than", "0s"];
    eventually("gc sees the node", || Ok(lvprov(cluster, &listing).is_ok_and(|listed| listed.success())))?;
    let left = lvprov_json(cluster, &listing)?;
    ensure!(left["items"].as_array().is_some_and(Vec::is_empty), "left behind: {left:#}");
    Ok(())
}

/// One case, in a namespace of its own.
struct Run<'a> {
    cluster: &'a Cluster,
    case: &'a Case,
    space: Space<'a>,
}

impl<'a> Run<'a> {
    fn new(cluster: &'a Cluster, case: &'a Case, number: usize) -> Result<Self> {
        // Kept to the end of the process, which is that of the test.
        let name: &'static str = Box::leak(format!("case-{number}").into_boxed_str());
        Ok(Self { cluster, case, space: Space::new(cluster, name)? })
    }

    fn whole(self) -> Result<()> {
        self.prepare().context("before the crash")?;
        self.arm()?;
        // What a person calls does not come back before the crash.
        std::thread::scope(|scope| {
            if self.case.operation == Operation::Import {
                scope.spawn(|| self.import());
            }
            self.begin()?;
            self.crash()
        })?;
        self.finish().context("after the crash")?;
        self.check()?;
        self.end().context("at the end")
    }

    /// Nothing of this case may come by a point of the next one.
    fn end(&self) -> Result<()> {
        if self.case.operation == Operation::Snapshot {
            self.space.kubectl(&["delete", "volumesnapshot", "s", "--timeout=120s"])?;
            self.no_snapshots()?;
        }
        self.space.kubectl(&["delete", "pod,pvc", "--all", "--timeout=240s"])?;
        self.gone()?;
        // What is left of the namespace itself needs no waiting for.
        self.space.kubectl(&["delete", "namespace", self.namespace(), "--wait=false"]).map(drop)
    }

    fn namespace(&self) -> &'static str {
        self.space.name
    }

    fn claim(&self) -> Result<()> {
        let class = match self.case.operation {
            Operation::Trash => "zero",
            _ if self.case.mirrored => "raid1",
            _ => self.case.source.pick("flexvolume", "csi"),
        };
        self.space.claim("c", class, SMALL, if self.is_raw() { "volumeMode: Block" } else { "" })?;
        self.space.kubectl(&["annotate", "pvc", "c", &format!("volume.kubernetes.io/selected-node={NODE}")])?;
        Ok(())
    }

    fn is_raw(&self) -> bool {
        matches!(self.case.operation, Operation::Block | Operation::GrowBlock)
    }

    fn pod(&self) -> Result<()> {
        if self.is_raw() {
            return self.space.raw_pod("p", Some(NODE), "c", "");
        }
        self.space.pod("p", Some(NODE), &[claim_volume("c")])
    }

    fn prepare(&self) -> Result<()> {
        match self.case.operation {
            Operation::Create | Operation::Abandon | Operation::Log => Ok(()),
            // What lies on the disk is not what its pod may see.
            Operation::Block => self.dirty(),
            Operation::Delete | Operation::Mount | Operation::Trash => {
                self.claim()?;
                self.space.volume_of("c").map(drop)
            }
            Operation::Grow | Operation::Unmount | Operation::Snapshot | Operation::DeleteSnapshot => {
                self.claim()?;
                self.pod()?;
                self.space.ready("p")?;
                self.space.exec("p", "echo kept > /v0/file && sync")?;
                if self.case.operation == Operation::DeleteSnapshot {
                    self.space.ready_snapshot("s", "c")?;
                }
                Ok(())
            }
            Operation::Clone => {
                // Written to the volume's own disk before the power can go.
                self.space.claim("s", "csi", SMALL, "")?;
                self.space.pod("q", Some(NODE), &[claim_volume("s")])?;
                self.space.ready("q")?;
                self.space.exec("q", "echo kept > /v0/file && sync").map(drop)
            }
            Operation::Import => {
                let volume = self.by_hand();
                self.cluster.node(NODE)?.sh(&format!(
                    "lvcreate -qq -y -n {volume} -L 320m vg0 && mkfs.xfs -q /dev/vg0/{volume} && mkdir -p /mnt/{volume} &&
                     mount /dev/vg0/{volume} /mnt/{volume} && echo kept > /mnt/{volume}/file && umount /mnt/{volume}"
                ))?;
                self.space.claim("c", "flexvolume", SMALL, "")
            }
            Operation::GrowBlock => {
                self.claim()?;
                self.pod()?;
                self.space.ready("p")?;
                self.dirty()?;
                self.space.exec("p", "echo kept | dd of=/dev/raw conv=notrunc,fsync 2>/dev/null").map(drop)
            }
        }
    }

    fn by_hand(&self) -> String {
        format!("by-hand-{}", self.namespace())
    }

    /// Whether it has come to its end.
    fn import(&self) -> Result<bool> {
        let (volume, claim) = (format!("vg0/{}", self.by_hand()), format!("{}/c", self.namespace()));
        let imported = lvprov(self.cluster, &["import", &volume, "--node", NODE, "--claim", &claim])?;
        Ok(imported.success())
    }

    fn dirty(&self) -> Result<()> {
        self.cluster.node(NODE)?.sh(&lvprov_tests::dirty("400m")).map(drop)
    }

    fn arm(&self) -> Result<()> {
        let action = match (self.case.operation, self.case.happening) {
            (Operation::Abandon, _) | (_, Happening::Cut) => "hold",
            (_, Happening::End) => "end",
        };
        let file = format!("{FAULTS}/{}", self.case.point);
        let node = self.cluster.node(NODE)?;
        // Renamed into place, so that nobody meets an empty file.
        node.sh(&format!("mkdir -p {FAULTS}; chmod 0777 {FAULTS}; echo {action} > {file}.new; mv {file}.new {file}"))?;
        Ok(())
    }

    fn begin(&self) -> Result<()> {
        match self.case.operation {
            Operation::Create | Operation::Abandon | Operation::Block => self.claim(),
            Operation::Clone => {
                let source = "dataSource: {kind: PersistentVolumeClaim, name: s}";
                self.space.claim("c", "csi", SMALL, source)
            }
            Operation::Delete | Operation::Trash => {
                self.space.kubectl(&["delete", "pvc", "c", "--wait=false"]).map(drop)
            }
            Operation::Snapshot => self.space.snapshot("s", "c"),
            Operation::DeleteSnapshot => {
                self.space.kubectl(&["delete", "volumesnapshot", "s", "--wait=false"]).map(drop)
            }
            Operation::Mount => self.pod(),
            // Its caller waits beside this.
            Operation::Import => Ok(()),
            Operation::Unmount => self.space.kubectl(&["delete", "pod", "p", "--wait=false"]).map(drop),
            Operation::Log => self.space.pod("p", Some(NODE), &[log_volume_of(SMALL, "logs", "")]),
            Operation::Grow | Operation::GrowBlock => {
                let patch = format!(r#"{{"spec":{{"resources":{{"requests":{{"storage":"{LARGE}"}}}}}}}}"#);
                self.space.kubectl(&["patch", "pvc", "c", "-p", &patch])?;
                self.space.hurry("p")
            }
        }
    }

    fn crash(&self) -> Result<()> {
        let hit = format!("{FAULTS}/{}.hit", self.case.point);
        let node = self.cluster.node(NODE)?;
        let deadline = Instant::now() + HIT;
        let mut hurried = Instant::now();
        while !node.exec(["test", "-e", &hit])?.success() {
            ensure!(Instant::now() < deadline, "{} was not passed within {HIT:?}", self.case.point);
            // kubelet grows a file system once the claim says that it may.
            if matches!(self.case.operation, Operation::Grow | Operation::GrowBlock)
                && hurried.elapsed() > Duration::from_secs(3)
            {
                self.space.hurry("p")?;
                hurried = Instant::now();
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        if self.case.operation == Operation::Abandon {
            // The controller stands between volume and PV, and will not go on.
            self.space.kubectl(&["delete", "pvc", "c", "--timeout=60s"])?;
            if self.case.happening == Happening::End {
                node.sh("pkill -KILL -f '^/lvprov.* controller( |$)'")?;
            }
        }
        if self.case.happening == Happening::Cut {
            // What containerd and kubelet have on the node's own disk is not under test: a sandbox whose
            // network is half written down can never be removed. Volumes are on other disks.
            node.run(["sync", "-f", "/var/lib/containerd"])?;
            node.power_cut()?;
            node.power_on()?;
        }
        node.run(["rm", "-f", &hit])?;
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        match self.case.operation {
            Operation::Create if self.case.mirrored => {
                // It is blank, and known to be.
                self.pod()?;
                self.space.ready("p")
            }
            Operation::Create => self.space.volume_of("c").map(drop),
            Operation::Delete | Operation::Abandon | Operation::Trash => self.gone(),
            Operation::Block => {
                self.pod()?;
                self.space.ready("p")?;
                self.only_zeros(0)
            }
            Operation::Mount | Operation::Log => {
                self.space.ready("p")?;
                // What is not on the disk yet would go with the power in the next case.
                self.space.exec("p", "echo written > /v0/new && sync && cat /v0/new").map(drop)
            }
            Operation::Snapshot => {
                let handle = self.space.handle_of_snapshot("s")?;
                let there = self.snapshots()?;
                ensure!(there.len() == 1 && handle.ends_with(&there[0]), "{handle}, and there are {there:?}");
                self.space.ready("p")?;
                self.kept()
            }
            Operation::DeleteSnapshot => {
                self.no_snapshots()?;
                self.space.ready("p")?;
                self.kept()
            }
            Operation::Import => {
                eventually("the same command again gives the volume to the claim", || self.import())?;
                self.pod()?;
                self.space.ready("p")?;
                self.kept()
            }
            Operation::Clone => {
                self.pod()?;
                self.space.ready("p")?;
                self.kept()?;
                self.space.exec("p", "echo other > /v0/file && sync")?;
                self.space.ready("q")?;
                let source = self.space.exec("q", "cat /v0/file")?;
                ensure!(source == "kept", "its source has {source:?}");
                self.nothing_of_the_copy()
            }
            Operation::Unmount => {
                self.space.kubectl(&["wait", "--for=delete", "pod/p", "--timeout=240s"])?;
                self.nothing_mounted()?;
                self.pod()?;
                self.space.ready("p")?;
                self.kept()
            }
            Operation::Grow => {
                self.space.grown("c", "p", LARGE)?;
                self.space.ready("p")?;
                self.kept()
            }
            Operation::GrowBlock => {
                self.space.grown("c", "p", LARGE)?;
                self.space.ready("p")?;
                let kept = self.space.exec("p", "head -c 4 /dev/raw")?;
                ensure!(kept == "kept", "the device has {kept:?}");
                self.only_zeros(1)
            }
        }
    }

    /// From so many MiB on.
    fn only_zeros(&self, from: u64) -> Result<()> {
        let script = format!("dd if=/dev/raw bs=1M skip={from} 2>/dev/null | tr -d '\\000' | wc -c");
        let other = self.space.exec("p", &script)?;
        ensure!(other.trim() == "0", "{other} bytes of the device are not zero");
        Ok(())
    }

    fn kept(&self) -> Result<()> {
        let file = self.space.exec("p", "cat /v0/file")?;
        ensure!(file == "kept", "the file has {file:?}");
        Ok(())
    }

    fn gone(&self) -> Result<()> {
        let tag = format!("claim={}/", self.namespace());
        eventually("the volume is removed", || Ok(volumes_on(self.cluster, NODE, &tag)?.is_empty()))?;
        let parts = self.cluster.node(NODE)?.run(["lvs", "-a", "--noheadings", "vg1"])?;
        ensure!(parts.trim().is_empty(), "parts of the volume are left: {parts}");
        eventually("its PersistentVolume is gone", || Ok(self.volumes()?.is_empty()))
    }

    /// Names of the PersistentVolumes for this namespace.
    fn volumes(&self) -> Result<Vec<String>> {
        let all = self.cluster.get_json("pv")?;
        let items = all["items"].as_array().into_iter().flatten();
        let ours = items.filter(|pv| text(pv, "/spec/claimRef/namespace") == self.namespace());
        Ok(ours.map(|pv| text(pv, "/metadata/name").to_owned()).collect())
    }

    /// Names of the snapshots of this namespace.
    fn snapshots(&self) -> Result<Vec<String>> {
        volumes_on(self.cluster, NODE, &format!("snapshot={}/", self.namespace()))
    }

    /// Neither here nor there.
    fn no_snapshots(&self) -> Result<()> {
        eventually("the snapshot is removed", || Ok(self.snapshots()?.is_empty()))?;
        eventually("its content is gone", || {
            let all = self.cluster.get_json("volumesnapshotcontents")?;
            let mut all = all["items"].as_array().into_iter().flatten();
            Ok(!all.any(|content| text(content, "/spec/volumeSnapshotRef/namespace") == self.namespace()))
        })
    }

    /// What it was copied from has gone with that.
    fn nothing_of_the_copy(&self) -> Result<()> {
        let node = self.cluster.node(NODE)?;
        eventually("the snapshot of the clone is removed", || {
            Ok(!node.run(["lvs", "--noheadings", "-o", "lv_name", "vg0"])?.contains("clone-"))
        })
    }

    fn nothing_mounted(&self) -> Result<()> {
        let mounts = self.cluster.node(NODE)?.read_file("/proc/mounts")?;
        for volume in self.volumes()? {
            let escaped = volume.replace('-', "--");
            ensure!(!mounts.contains(&escaped), "{volume} is mounted: {mounts}");
        }
        Ok(())
    }

    /// As many volumes as there should be, of the size that they should have.
    fn check(&self) -> Result<()> {
        let namespace = self.namespace();
        if self.case.operation == Operation::Log {
            let volumes = volumes_on(self.cluster, NODE, &format!("log={namespace}/logs"))?;
            ensure!(volumes.len() == 1, "log volumes: {volumes:?}");
            ensure!(volumes_on(self.cluster, NODE, "lvprov.io/new")?.is_empty(), "one is marked as new");
            ensure!(volume_size(self.cluster, NODE, &volumes[0])? == 320 << 20);
            return Ok(());
        }
        let removed = matches!(self.case.operation, Operation::Delete | Operation::Abandon | Operation::Trash);
        let expected = if self.case.operation == Operation::Clone { 2 } else { usize::from(!removed) };
        let (volumes, mut logical) = (self.volumes()?, volumes_on(self.cluster, NODE, &format!("claim={namespace}/"))?);
        // A snapshot says whose volume it is of.
        logical.retain(|name| !name.starts_with("snap-"));
        ensure!(volumes.len() == expected && volumes == logical, "PersistentVolumes {volumes:?}, LVs {logical:?}");
        for name in &logical {
            let grown = matches!(self.case.operation, Operation::Grow | Operation::GrowBlock);
            let size = if grown { 640 << 20 } else { 320 << 20 };
            let has = volume_size(self.cluster, NODE, name)?;
            ensure!(has == size, "{name} has {has} bytes and not {size}");
        }
        Ok(())
    }
}
