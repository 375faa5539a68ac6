//! Namespaces of our own, which end with everything in them.
//!
//! A sandbox is a process id, network and mount namespace. Its first process
//! is ours; the kernel kills every process in it, and takes down its
//! interfaces and mounts, as soon as that one ends, however it ends. In it
//! runs an agent that starts what is asked for.
//!
//! A *tied* sandbox holds the reading end of a pipe whose writing end is in
//! the process that made it: when that process ends, by Ctrl-C, panic or
//! SIGKILL, the sandbox sees the pipe close, and ends.

pub mod supervisor;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use std::{env, thread};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::agent::client::Agent;
use crate::paths;

/// Where the agent of a sandbox listens, in the sandbox's own network.
const AGENT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 700);

/// Whether a sandbox ends with the process that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// It does.
    Tied,
    /// It stays until [`Sandbox::stop`].
    Detached,
}

/// What `sandbox.json` says.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    supervisor: i32,
    init: i32,
}

/// A running sandbox.
#[derive(Debug)]
pub struct Sandbox {
    directory: PathBuf,
    record: Record,
    agent: Agent,
    /// Of a sandbox that this process made: its death ends a tied one.
    child: Mutex<Option<Child>>,
    life: Life,
}

impl Sandbox {
    /// Makes a sandbox with a directory of this name below `target/testbed/run`.
    ///
    /// # Errors
    /// When one of that name is running, or namespaces cannot be made.
    pub fn start(name: &str, life: Life) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("the test bed makes network interfaces and mounts: run it as root");
        }
        remove_stale();
        let directory = paths::runs().join(name);
        fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        let log = File::create(directory.join("supervisor.log"))?;
        let mut child = Process::new(xtask_binary()?)
            .args(["internal", "supervise"])
            .arg(&directory)
            .args((life == Life::Detached).then_some("--detached"))
            .stdin(if life == Life::Tied { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("cannot start the supervisor")?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        if line.trim() != "ready" {
            let _ = child.wait();
            let said = fs::read_to_string(directory.join("supervisor.log")).unwrap_or_default();
            bail!("the sandbox {name} did not start: {}", said.trim());
        }
        let mut sandbox = Self::open(&directory)?;
        sandbox.child = Mutex::new(Some(child));
        sandbox.life = life;
        Ok(sandbox)
    }

    /// The running sandbox of this name, if there is one.
    ///
    /// # Errors
    /// When its record cannot be read.
    pub fn find(name: &str) -> Result<Option<Self>> {
        let directory = paths::runs().join(name);
        if !directory.exists() || !is_locked(&directory)? {
            return Ok(None);
        }
        Self::open(&directory).map(Some)
    }

    fn open(directory: &Path) -> Result<Self> {
        let file = directory.join("sandbox.json");
        let text = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let record: Record = serde_json::from_slice(&text)?;
        Ok(Self {
            directory: directory.to_path_buf(),
            agent: Agent::new(record.init, AGENT),
            record,
            child: Mutex::new(None),
            life: Life::Detached,
        })
    }

    /// Its directory: records, logs, disks.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its agent, which runs commands in its namespaces.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Process id of its first process, as this process sees it.
    pub fn pid(&self) -> i32 {
        self.record.init
    }

    /// Ends it with all that runs in it, and waits until all has gone.
    ///
    /// # Errors
    /// When it still lives after ten seconds.
    pub fn end(&self) -> Result<()> {
        let child = self.child.lock().unwrap_or_else(PoisonError::into_inner).take();
        if self.life == Life::Tied && child.is_none() {
            return Ok(());
        }
        let _ = kill(Pid::from_raw(self.record.init), Signal::SIGKILL);
        if let Some(mut child) = child {
            child.wait()?;
            return Ok(());
        }
        for _ in 0..1000 {
            if !is_locked(&self.directory)? {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(10));
        }
        bail!(
            "the sandbox in {} did not end; its processes are children of {}",
            self.directory.display(),
            self.record.init
        )
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if self.life == Life::Tied {
            let _ = self.end();
        }
    }
}

/// The `xtask` program: this one, or, in a test, the one that runs the tests.
///
/// # Errors
/// When there is none.
pub fn xtask_binary() -> Result<PathBuf> {
    if let Some(path) = env::var_os("LVPROV_XTASK") {
        return Ok(path.into());
    }
    // A build that ran meanwhile has put a new file in the place of ours.
    let own = env::current_exe()?;
    let own = own.to_str().and_then(|path| path.strip_suffix(" (deleted)")).map_or(own.clone(), PathBuf::from);
    if own.file_name().is_some_and(|name| name == "xtask") {
        return Ok(own);
    }
    let built = paths::target().join(paths::static_target()).join("debug/xtask");
    if built.exists() {
        return Ok(built);
    }
    bail!("{} is not there: run `cargo build -p xtask`, or the tests through `cargo xtask test`", built.display())
}

/// Whether a supervisor holds the directory's lock, as it does all its life.
fn is_locked(directory: &Path) -> io::Result<bool> {
    match File::open(directory.join("lock")) {
        Ok(file) => match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(_) => Ok(false),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(true),
            Err((_, error)) => Err(error.into()),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes the directories of sandboxes that have ended without tidying.
fn remove_stale() {
    let Ok(entries) = fs::read_dir(paths::runs()) else { return };
    for entry in entries.flatten() {
        let directory = entry.path();
        // One that is just being made has no lock yet.
        let young = entry.metadata().is_ok_and(|data| {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            now.as_secs().cast_signed() - data.mtime() < 60
        });
        if !young && is_locked(&directory).is_ok_and(|locked| !locked) {
            let _ = fs::remove_dir_all(&directory);
        }
    }
}
