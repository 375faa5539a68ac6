//! The processes that make up a sandbox.
//!
//! `supervise` stays outside: it holds the lock, makes the namespaces, waits,
//! and removes the disks when all is over. `init` is process 1 inside: it
//! mounts a fresh proc, starts the agent, and reaps orphans.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::parent_id;
use std::path::Path;
use std::process::{Command as Process, Stdio, exit};
use std::{env, io, thread};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, setsid};

use super::{AGENT, Record};

/// Makes a sandbox and stays until it has ended.
///
/// # Errors
/// When the directory is in use or the namespaces cannot be made.
pub fn supervise(directory: &Path, detached: bool) -> Result<()> {
    let file = File::create(directory.join("lock"))?;
    let _lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, error)| error)
        .with_context(|| format!("{} is in use by a running test bed", directory.display()))?;
    // Ctrl-C is for the process that made us: its end is seen on the pipe.
    let _ = setsid();
    unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
        .context("cannot make namespaces")?;
    let mut child = Process::new(env::current_exe()?)
        .args(["internal", "init"])
        .args(detached.then_some("--detached"))
        .stdin(Stdio::inherit())
        .stdout(Stdio::piped())
        .spawn()?;
    let record = Record { supervisor: std::process::id().cast_signed(), init: child.id().cast_signed() };
    fs::write(directory.join("sandbox.json"), serde_json::to_vec(&record)?)?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line)?;
    }
    print!("{line}");
    io::Write::flush(&mut io::stdout())?;
    child.wait()?;
    // Everything inside is dead by now: the disks have no user.
    remove_disks(directory);
    Ok(())
}

fn remove_disks(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.ends_with("etcd") {
            let _ = fs::remove_dir_all(path);
        } else if path.is_dir() {
            remove_disks(&path);
        } else if path.extension() == Some(OsStr::new("img")) {
            let _ = fs::remove_file(path);
        }
    }
}

/// Process 1 of a sandbox. Returns only on failure.
///
/// # Errors
/// When its mounts or its agent cannot be made.
pub fn init(detached: bool) -> Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    if std::process::id() != 1 || parent_id() != 0 {
        bail!("this is for the supervisor to start, as process 1 of a namespace");
    }
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("cannot make / private")?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).context("cannot mount /proc")?;
    let linked = Process::new("ip").args(["link", "set", "lo", "up"]).status().context("cannot run ip")?;
    if !linked.success() {
        bail!("cannot bring up the loopback interface");
    }
    let agent = Process::new(env::current_exe()?)
        .args(["internal", "agent", "--listen", &AGENT.to_string()])
        .stdin(Stdio::null())
        .spawn()?;
    let agent = Pid::from_raw(agent.id().cast_signed());
    // The agent now has it: the reader must see its end when it prints no more.
    if !detached {
        thread::spawn(|| {
            let mut rest = Vec::new();
            let _ = io::stdin().read_to_end(&mut rest);
            exit(0);
        });
    }
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) if pid == agent => {
                bail!("the sandbox's agent ended")
            }
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
