//! Pods that come and go, all at once, on one log volume: each thread is a pod
//! that is mounted, writes a line and is unmounted, round after round, by the
//! driver as kubelet would start it. Prints what it did as one line of JSON;
//! exit status 1 where anything was not as it should be.

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use lvm::mounts::{self, Mount};
use lvm::quota;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Where kubelet keeps its pods' volumes.
const PODS: &str = "/var/lib/kubelet/pods";
/// After so many errors the rest would tell nothing new.
const MOST_ERRORS: usize = 20;

#[derive(Debug, Parser)]
struct Cli {
    /// The driver.
    #[arg(long, default_value = "/usr/local/bin/lvprov-flexvolume")]
    driver: PathBuf,
    #[arg(long, default_value_t = 20)]
    pods: usize,
    #[arg(long)]
    rounds: usize,
    #[arg(long)]
    namespace: String,
    #[arg(long)]
    volume: String,
}

struct Storm {
    cli: Cli,
    base: PathBuf,
    errors: Mutex<Vec<String>>,
    stop: AtomicBool,
    /// Held while a process is started, and while files of a pod's mount are
    /// open: a new process has all of them, until it becomes the driver, and
    /// would keep another thread's mount busy.
    files: Mutex<()>,
}

/// What a pod's thread found out.
#[derive(Debug, Default, Clone, Copy)]
struct Pod {
    project: u32,
    rounds: usize,
    /// The slowest call of the first round, in which the volume is made, and of all others.
    slowest: [Duration; 2],
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let base = Path::new("/var/log/lvprov").join(&cli.namespace).join(&cli.volume);
    let storm = Storm { cli, base, errors: Mutex::default(), stop: AtomicBool::new(false), files: Mutex::default() };
    let begun = Instant::now();
    let pods = storm.run();
    let seconds = begun.elapsed().as_secs_f64();
    if let Err(error) = storm.check_end(&pods) {
        storm.report("at the end", &error);
    }
    let errors = storm.errors.into_inner().unwrap_or_default();
    let rounds: usize = pods.iter().map(|pod| pod.rounds).sum();
    let slowest = [0, 1].map(|of| pods.iter().map(|pod| pod.slowest[of].as_millis()).max());
    println!(
        "{}",
        json!({
            "pods": pods.len(), "calls": 2 * rounds, "seconds": (seconds * 10.0).round() / 10.0,
            "slowestMs": {"whileMade": slowest[0], "later": slowest[1]}, "errors": errors,
        })
    );
    if errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl Storm {
    fn report(&self, what: &str, error: &anyhow::Error) {
        if let Ok(mut errors) = self.errors.lock() {
            errors.push(format!("{what}: {error:#}"));
            self.stop.store(errors.len() >= MOST_ERRORS, Ordering::Relaxed);
        }
    }

    fn run(&self) -> Vec<Pod> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.cli.pods).map(|number| scope.spawn(move || self.pod(number))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or_default()).collect()
        })
    }

    fn pod(&self, number: usize) -> Pod {
        let mut pod = Pod::default();
        for round in 0..self.cli.rounds {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            if let Err(error) = self.round(number, round, &mut pod) {
                self.report(&format!("pod {number}, round {round}"), &error);
            }
            pod.rounds += 1;
        }
        pod
    }

    /// The pod is made again under its name, with a new UID and another quota.
    fn round(&self, number: usize, round: usize, pod: &mut Pod) -> Result<()> {
        let name = name(number);
        let uid = format!("{}-{number}-{round}", self.cli.volume);
        let home = Path::new(PODS).join(&uid);
        let target = home.join("volumes/lvprov.io~lvm/logs");
        let quota = (8 + ((number + round) % 5) as u64) << 20;
        let options = json!({
            "type": "log", "volume": self.cli.volume, "size": "1Gi", "quota": quota.to_string(),
            "kubernetes.io/fsType": "xfs", "kubernetes.io/readwrite": "rw", "kubernetes.io/pvOrVolumeName": "logs",
            "kubernetes.io/pod.name": name, "kubernetes.io/pod.namespace": self.cli.namespace,
            "kubernetes.io/pod.uid": uid, "kubernetes.io/serviceAccount.name": "default",
        });
        fs::create_dir_all(&target)?;
        let path = target.to_str().context("a path")?;
        let slowest = &mut pod.slowest[usize::from(round > 0)];
        *slowest = (*slowest).max(self.call(&["mount", path, &options.to_string()])?);

        let mount = self.only_mount(&target)?;
        ensure!(mount.root == Path::new("/").join(&name), "{} is mounted", mount.root.display());
        ensure!(mount.device == mounts::file_system_of(&self.base)?, "another file system is mounted");
        let files = self.files.lock();
        let project = quota::project(File::open(&target)?)?;
        ensure!(project != 0 && (pod.project == 0 || pod.project == project), "project {} is {project}", pod.project);
        pod.project = project;
        let device = mount.device_node().context("no device node")?;
        let limit = quota::usage(&device, project)?.limit;
        ensure!(limit == quota, "the limit is {limit} B, and not {quota} B");
        writeln!(OpenOptions::new().create(true).append(true).open(target.join("lines"))?, "{round}")?;
        drop(files);

        let slowest = &mut pod.slowest[usize::from(round > 0)];
        *slowest = (*slowest).max(self.call(&["unmount", path])?);
        ensure!(mounts::at(&target)?.is_none(), "it is still mounted");
        // As kubelet does: what is not empty stays, and is an error.
        for directory in target.ancestors().take_while(|directory| *directory != Path::new(PODS)) {
            fs::remove_dir(directory).with_context(|| format!("rmdir {}", directory.display()))?;
        }
        Ok(())
    }

    fn only_mount(&self, target: &Path) -> Result<Mount> {
        let mut found = mounts::all()?.into_iter().filter(|mount| mount.target == target);
        match (found.next(), found.next()) {
            (Some(mount), None) => Ok(mount),
            (None, _) => bail!("nothing is mounted"),
            (Some(_), Some(_)) => bail!("it is mounted twice"),
        }
    }

    /// Calls the driver, holds its answer to kubelet's rules, and takes the time.
    fn call(&self, args: &[&str]) -> Result<Duration> {
        let mut command = Command::new(&self.cli.driver);
        command.args(args).env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let files = self.files.lock();
        let begun = Instant::now();
        let child = command.spawn();
        drop(files);
        let output = child?.wait_with_output()?;
        let took = begun.elapsed();
        let stdout = String::from_utf8_lossy(&output.stdout);
        ensure!(output.stderr.is_empty(), "{}: it wrote to standard error", args[0]);
        let answer: Value = serde_json::from_str(&stdout).with_context(|| format!("{}: {stdout:?}", args[0]))?;
        ensure!(answer["status"] == "Success" && output.status.success(), "{}: {answer}", args[0]);
        Ok(took)
    }

    /// What is left when all have gone.
    fn check_end(&self, pods: &[Pod]) -> Result<()> {
        let own = format!("{PODS}/{}-", self.cli.volume);
        let stray = mounts::all()?.into_iter().find(|mount| mount.target.to_string_lossy().starts_with(&own));
        ensure!(stray.is_none(), "a stray mount: {stray:?}");
        for entry in fs::read_dir(PODS)? {
            let path = entry?.path();
            ensure!(!path.to_string_lossy().starts_with(&own), "a stray directory: {}", path.display());
        }
        let projects: BTreeSet<u32> = pods.iter().map(|pod| pod.project).collect();
        ensure!(projects.len() == pods.len(), "{} quota projects of {} pods", projects.len(), pods.len());
        let names: BTreeSet<String> = (0..pods.len()).map(name).collect();
        let mut found = BTreeSet::new();
        for entry in fs::read_dir(&self.base)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() && entry.file_name() != ".lvprov" {
                found.insert(entry.file_name().to_string_lossy().into_owned());
            }
        }
        ensure!(found == names, "directories {found:?}");
        let half_made = fs::read_dir(self.base.join(".lvprov"))?.count();
        ensure!(half_made == 0, "{half_made} half-made directories");
        for name in names {
            let lines = fs::read_to_string(self.base.join(&name).join("lines"))?.lines().count();
            ensure!(lines == self.cli.rounds, "{name} has {lines} lines");
        }
        Ok(())
    }
}

fn name(number: usize) -> String {
    format!("web-{number}")
}
