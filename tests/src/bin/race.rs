//! An enemy against the driver: it exchanges directories and symbolic links as
//! fast as it can, while the driver mounts and unmounts for it and for its
//! neighbour. Prints what happened as one line of JSON; exit status 1 where
//! anything was mounted or changed that should not have been.
//!
//! `pod`: the enemy does what a pod can, inside its own directory. `root`: it
//! exchanges entries of the volume's root, which only root on the host can; the
//! mount must then be the right directory, or fail.

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use lvm::{mounts, quota};
use nix::fcntl::{RenameFlags, renameat2};
use nix::sys::stat::{Mode, fchmod};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

const PODS: &str = "/var/lib/kubelet/pods";
const ENEMY: &str = "enemy";
const NEIGHBOUR: &str = "neighbour";
/// What the links lead to, and no call may change.
const OUTSIDE: &str = "/run/race-outside";
const QUOTA: u64 = 32 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    Pod,
    Root,
}

#[derive(Debug, Parser)]
struct Cli {
    kind: Kind,
    /// How many mounts of the enemy, each with its unmount.
    #[arg(long)]
    mounts: usize,
    /// Start this driver for each call; without it the driver's code is called
    /// within this process, which is many times as fast.
    #[arg(long)]
    driver: Option<PathBuf>,
    #[arg(long)]
    volume: String,
}

/// A directory, as it must stay.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seal {
    inode: u64,
    mode: u32,
    owner: (u32, u32),
    entries: Vec<OsString>,
}

impl Seal {
    fn of(path: &Path) -> Result<Self> {
        let metadata = fs::symlink_metadata(path)?;
        let mut entries = Vec::new();
        for entry in fs::read_dir(path)? {
            entries.push(entry?.file_name());
        }
        entries.sort();
        let owner = (metadata.uid(), metadata.gid());
        Ok(Self { inode: metadata.ino(), mode: metadata.mode(), owner, entries })
    }
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(summary) => {
            println!("{summary}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{}", json!({"error": format!("{error:#}")}));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<Value> {
    let race = Race::prepare(cli)?;
    let (stop, exchanges) = (AtomicBool::new(false), AtomicU64::new(0));
    let begun = Instant::now();
    let mut counts = Counts::default();
    let raced = std::thread::scope(|scope| {
        let enemy = scope.spawn(|| race.fight(&stop, &exchanges).context("the enemy"));
        let raced = race.calls(&mut counts);
        stop.store(true, Ordering::Relaxed);
        raced.and(enemy.join().unwrap_or_else(|_| bail!("the enemy panicked")))
    });
    raced.with_context(|| format!("after {counts:?}"))?;
    race.check_afterwards()?;
    Ok(json!({
        "mounted": counts.mounted, "refused": counts.refused, "exchanges": exchanges.into_inner(),
        "seconds": begun.elapsed().as_secs_f64().round(),
    }))
}

#[derive(Debug, Default)]
struct Counts {
    mounted: usize,
    refused: usize,
}

struct Race<'a> {
    cli: &'a Cli,
    base: PathBuf,
    /// Device node of the volume.
    device: PathBuf,
    /// Inode and quota project of the enemy's directory.
    enemy: (u64, u32),
    neighbour: Seal,
    neighbour_project: u32,
    outside: Seal,
    etc: Seal,
}

impl<'a> Race<'a> {
    fn prepare(cli: &'a Cli) -> Result<Self> {
        let base = Path::new("/var/log/lvprov/race").join(&cli.volume);
        fs::create_dir_all(Path::new(OUTSIDE).join("new"))?;
        fs::create_dir_all(Path::new(OUTSIDE).join("gone-1"))?;
        fs::write(Path::new(OUTSIDE).join("new/file"), "")?;
        for pod in [ENEMY, NEIGHBOUR] {
            mount(cli, pod, "first")?.map_err(anyhow::Error::msg)?;
            unmount(cli, pod, "first")?;
        }
        let mount = mounts::at(&base)?.context("the volume is not mounted")?;
        let project = |pod: &str| -> Result<u32> { Ok(quota::project(File::open(base.join(pod))?)?) };
        Ok(Self {
            cli,
            device: mount.device_node().context("no device node")?,
            enemy: (fs::metadata(base.join(ENEMY))?.ino(), project(ENEMY)?),
            neighbour: Seal::of(&base.join(NEIGHBOUR))?,
            neighbour_project: project(NEIGHBOUR)?,
            outside: Seal::of(Path::new(OUTSIDE))?,
            etc: Seal::of(Path::new("/etc"))?,
            base,
        })
    }

    fn fight(&self, stop: &AtomicBool, exchanges: &AtomicU64) -> Result<()> {
        match self.cli.kind {
            Kind::Pod => self.fight_inside(stop, exchanges),
            Kind::Root => self.fight_in_the_root(stop, exchanges),
        }
    }

    /// What a pod can do: anything below its own directory, and to the
    /// directory's own attributes.
    fn fight_inside(&self, stop: &AtomicBool, exchanges: &AtomicU64) -> Result<()> {
        let own = self.base.join(ENEMY);
        let directory = File::open(&own)?;
        fs::create_dir_all(own.join("a/lvm"))?;
        let targets = ["/etc", "../neighbour", "/", "..", "../.lvprov", OUTSIDE];
        for (number, target) in targets.iter().enumerate() {
            symlink(target, own.join(format!("link{number}")))?;
        }
        for round in 0u64.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let link = format!("link{}", round % targets.len() as u64);
            match renameat2(&directory, "a", &directory, link.as_str(), RenameFlags::RENAME_EXCHANGE) {
                Ok(()) => exchanges.fetch_add(1, Ordering::Relaxed),
                // XFS exchanges nothing below a directory of another project.
                Err(nix::Error::EXDEV) => 0,
                Err(error) => return Err(error.into()),
            };
            // Its owner may do so where it is root in the host's user namespace.
            quota::set_project(&directory, [self.neighbour_project, self.enemy.1][(round / 3 % 2) as usize])?;
            fchmod(&directory, Mode::from_bits_truncate(0o700 | (round % 64) as u32))?;
        }
        Ok(())
    }

    /// What only root on the host can do: the enemy's directory, and the one
    /// for what is not a pod's, are exchanged with something else, and back.
    fn fight_in_the_root(&self, stop: &AtomicBool, exchanges: &AtomicU64) -> Result<()> {
        let root = File::open(&self.base)?;
        let targets = ["/etc", NEIGHBOUR, "/", ".", "..", OUTSIDE];
        for (number, target) in targets.iter().enumerate() {
            symlink(target, self.base.join(format!(".trap{number}")))?;
        }
        fs::write(self.base.join(format!(".trap{}", targets.len())), "a file")?;
        symlink(OUTSIDE, self.base.join(".outside"))?;
        for round in 0u64.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let trap = format!(".trap{}", round % (targets.len() as u64 + 1));
            for (name, other) in [(ENEMY, trap.as_str()), (".lvprov", ".outside")] {
                renameat2(&root, name, &root, other, RenameFlags::RENAME_EXCHANGE)?;
                std::thread::yield_now();
                renameat2(&root, name, &root, other, RenameFlags::RENAME_EXCHANGE)?;
                exchanges.fetch_add(2, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn calls(&self, counts: &mut Counts) -> Result<()> {
        for number in 0..self.cli.mounts {
            self.one_round(number, counts).with_context(|| format!("mount {number}"))?;
        }
        Ok(())
    }

    fn one_round(&self, number: usize, counts: &mut Counts) -> Result<()> {
        let uid = number.to_string();
        let target = target(self.cli, ENEMY, &uid);
        match mount(self.cli, ENEMY, &uid)? {
            Ok(()) => {
                counts.mounted += 1;
                // Whatever its name is by now: it must be the directory itself.
                let there = fs::symlink_metadata(&target)?;
                let volume = mounts::file_system_of(&self.base)?;
                ensure!(mounts::file_system_of(&target)? == volume, "another file system is mounted");
                ensure!(there.ino() == self.enemy.0, "inode {} is mounted, not {}", there.ino(), self.enemy.0);
            }
            Err(message) => {
                ensure!(self.cli.kind == Kind::Root, "a pod made its own mount fail: {message}");
                counts.refused += 1;
                ensure!(mounts::at(&target)?.is_none(), "it failed, and something is mounted: {message}");
            }
        }
        self.neighbour(&uid)?;
        // A pod whose directory is not there yet: it is made, or the call fails.
        if self.cli.kind == Kind::Root {
            let fresh = format!("fresh-{}", number % 50);
            if mount(self.cli, &fresh, &uid)?.is_ok() {
                unmount(self.cli, &fresh, &uid)?;
                fs::remove_dir(self.base.join(&fresh)).context("a new directory is not in its place")?;
            }
        }
        unmount(self.cli, ENEMY, &uid)?;
        ensure!(mounts::at(&target)?.is_none(), "it is still mounted");
        ensure!(Seal::of(Path::new(OUTSIDE))? == self.outside, "{OUTSIDE} has changed");
        ensure!(Path::new(OUTSIDE).join("new/file").exists(), "a file in {OUTSIDE} has gone");
        Ok(())
    }

    /// The neighbour's mount always works, and nothing of its is changed.
    fn neighbour(&self, uid: &str) -> Result<()> {
        let target = target(self.cli, NEIGHBOUR, uid);
        mount(self.cli, NEIGHBOUR, uid)?.map_err(anyhow::Error::msg).context("the neighbour's mount")?;
        let inode = fs::symlink_metadata(&target)?.ino();
        ensure!(inode == self.neighbour.inode, "inode {inode} is mounted for the neighbour");
        unmount(self.cli, NEIGHBOUR, uid)?;
        let project = quota::project(File::open(self.base.join(NEIGHBOUR))?)?;
        ensure!(project == self.neighbour_project, "the neighbour has project {project}");
        let limit = quota::usage(&self.device, project)?.limit;
        ensure!(limit == QUOTA, "the neighbour's limit is {limit} B");
        let now = Seal::of(&self.base.join(NEIGHBOUR))?;
        ensure!(now == self.neighbour, "{now:?}, and before {:?}", self.neighbour);
        Ok(())
    }

    /// With the enemy gone all is as it was.
    fn check_afterwards(&self) -> Result<()> {
        mount(self.cli, ENEMY, "last")?.map_err(anyhow::Error::msg)?;
        unmount(self.cli, ENEMY, "last")?;
        let directory = File::open(self.base.join(ENEMY))?;
        ensure!(directory.metadata()?.ino() == self.enemy.0, "the directory is another one");
        let project = quota::project(&directory)?;
        ensure!(project == self.enemy.1, "project {project}, and not {}", self.enemy.1);
        let limit = quota::usage(&self.device, project)?.limit;
        ensure!(limit == QUOTA, "the limit is {limit} B");
        ensure!(Seal::of(Path::new("/etc"))? == self.etc, "/etc has changed");
        let own = format!("{PODS}/{}-", self.cli.volume);
        let stray = mounts::all()?.into_iter().find(|mount| mount.target.to_string_lossy().starts_with(&own));
        ensure!(stray.is_none(), "a stray mount: {stray:?}");
        Ok(())
    }
}

fn target(cli: &Cli, pod: &str, uid: &str) -> PathBuf {
    Path::new(PODS).join(format!("{}-{pod}-{uid}", cli.volume)).join("volumes/lvprov.io~lvm/logs")
}

/// The inner result is the driver's: its message where it failed.
fn mount(cli: &Cli, pod: &str, uid: &str) -> Result<Result<(), String>> {
    let target = target(cli, pod, uid);
    fs::create_dir_all(&target)?;
    let options = json!({
        "type": "log", "volume": cli.volume, "size": "1Gi", "quota": QUOTA.to_string(),
        "kubernetes.io/fsType": "xfs", "kubernetes.io/readwrite": "rw", "kubernetes.io/pvOrVolumeName": "logs",
        "kubernetes.io/pod.name": pod, "kubernetes.io/pod.namespace": "race",
        "kubernetes.io/pod.uid": format!("{}-{pod}-{uid}", cli.volume), "kubernetes.io/serviceAccount.name": "default",
    });
    call(cli, ["mount".into(), target.into(), options.to_string().into()].to_vec())
}

/// Never fails, and leaves an empty directory, which goes as with kubelet.
fn unmount(cli: &Cli, pod: &str, uid: &str) -> Result<()> {
    let target = target(cli, pod, uid);
    call(cli, ["unmount".into(), target.clone().into()].to_vec())?.map_err(anyhow::Error::msg).context("unmount")?;
    for directory in target.ancestors().take_while(|directory| *directory != Path::new(PODS)) {
        fs::remove_dir(directory).with_context(|| format!("rmdir {}", directory.display()))?;
    }
    Ok(())
}

fn call(cli: &Cli, args: Vec<OsString>) -> Result<Result<(), String>> {
    let json = match &cli.driver {
        None => lvprov_flexvolume::answer(&args).to_json(),
        Some(driver) => {
            let output = Command::new(driver).args(&args).env_clear().stdin(Stdio::null()).output()?;
            ensure!(output.stderr.is_empty(), "it wrote to standard error");
            output.stdout
        }
    };
    let answer: Value = serde_json::from_slice(&json)?;
    match answer["status"].as_str() {
        Some("Success") => Ok(Ok(())),
        Some("Failure") => Ok(Err(answer["message"].as_str().unwrap_or("").to_owned())),
        _ => bail!("{answer}"),
    }
}
