//! An lvm that stays, one for each volume group.
//!
//! Most of what an lvm command costs is the start of its process. `lvm` without
//! arguments reads commands from its standard input, one a line, until that
//! ends (lvm(8)). With the profile that LVM's own D-Bus service uses, it answers
//! each with one JSON document on a descriptor of its own (LVM_REPORT_FD): rows
//! and messages, and whether it has succeeded.
//!
//! It must hold the group's lock as long as a command runs, as every lvm command
//! does, whatever becomes of this process. So its standard error is the lock
//! file, opened for reading only (what it says goes nowhere): a lock taken on one
//! descriptor is held by all its copies. Within this process that lock excludes
//! nobody, so there is a turn to be waited for first, in order of arrival too.

use crate::command::{CommandError, Finished, Runner};
use crate::flock;
use crate::lock::{Lock, LockError, open, volume_group_path};
use crate::names::VgName;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::Deserialize;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One that has had nothing to do for so long ends.
const IDLE: Duration = Duration::from_secs(60);
/// What it is told to answer in; it comes with LVM.
const PROFILE: &str = "/etc/lvm/profile/lvmdbusd.profile";
/// It takes no more words than 64 a line.
const MOST_WORDS: usize = 60;

/// The lvm of each group.
#[derive(Debug, Default)]
pub(crate) struct Shells {
    groups: Mutex<HashMap<VgName, Arc<Kept>>>,
}

#[derive(Debug)]
struct Kept {
    turn: File,
    shell: Mutex<Option<Shell>>,
}

/// The turn at a group's lvm; dropped, the next one's.
#[derive(Debug)]
pub(crate) struct Held {
    kept: Arc<Kept>,
    /// For [`Lock::announce_change`].
    pub(crate) changes: File,
    // Closed last.
    _turn: File,
}

#[derive(Debug)]
struct Shell {
    child: Option<Child>,
    commands: Option<ChildStdin>,
    answers: ChildStdout,
    lock: File,
    used: Instant,
}

impl Shells {
    /// None where LVM lacks what it takes.
    pub(crate) fn new() -> Option<Self> {
        Path::new(PROFILE).exists().then(Self::default)
    }

    /// Locks a group, through its lvm where there is one.
    pub(crate) fn lock(&self, vg: &VgName, runner: &Runner, patience: Duration) -> Result<Lock, LockError> {
        let path = volume_group_path(vg);
        let io = |source| LockError::Io { path: path.display().to_string(), source };
        let begun = Instant::now();
        let busy = || LockError::Busy {
            what: format!("volume group {vg}"),
            path: path.display().to_string(),
            waited: begun.elapsed(),
        };
        let kept = self.of(vg).map_err(io)?;
        let turn = kept.turn().map_err(io)?;
        if !flock::lock(&turn, patience).map_err(io)? {
            return Err(busy());
        }
        let changes = open(&path).map_err(io)?;
        let Some(file) = Kept::ready(&kept, &path, &changes, runner) else {
            return Lock::volume_group(vg, patience.saturating_sub(begun.elapsed()));
        };
        if !flock::lock(&file, patience.saturating_sub(begun.elapsed())).map_err(io)? {
            return Err(busy());
        }
        Ok(Lock::held(file, Held { kept, changes, _turn: turn }))
    }

    fn of(&self, vg: &VgName) -> io::Result<Arc<Kept>> {
        let mut groups = locked(&self.groups);
        if let Some(kept) = groups.get(vg) {
            return Ok(Arc::clone(kept));
        }
        let turn = File::from(memfd_create("lvprov-turn", MFdFlags::MFD_CLOEXEC)?);
        let kept = Arc::new(Kept { turn, shell: Mutex::default() });
        groups.insert(vg.clone(), Arc::clone(&kept));
        Ok(kept)
    }
}

impl Kept {
    /// One more opening of the turn's file: locks are between openings.
    fn turn(&self) -> io::Result<File> {
        File::open(format!("/proc/self/fd/{}", self.turn.as_raw_fd()))
    }

    /// The lock that the group's lvm shares, started where it does not run.
    /// None: it cannot be started; every command is a process of its own then.
    fn ready(kept: &Arc<Self>, path: &Path, there: &File, runner: &Runner) -> Option<File> {
        let mut shell = locked(&kept.shell);
        if !shell.as_mut().is_some_and(|shell| shell.serves(there)) {
            *shell = None;
            let begun = Instant::now();
            *shell = Shell::start(path, runner.cgroup().as_ref()).ok();
            if shell.is_some() {
                runner.note_shell(begun);
                end_when_idle(kept);
            }
        }
        shell.as_ref()?.lock.try_clone().ok()
    }
}

impl Held {
    /// Runs one command. None: there is no lvm any more.
    pub(crate) fn run(&self, shown: &str, line: &str, limit: Duration) -> Option<Result<Finished, CommandError>> {
        let mut shell = locked(&self.kept.shell);
        let running = shell.as_mut()?;
        let pid = running.child.as_ref().map_or(0, Child::id);
        let begun = Instant::now();
        let answer = running.run(line, limit);
        let failed = |source| CommandError::Start { program: shown.to_owned(), source };
        match answer {
            Ok(Some(answer)) => {
                let done = read(shown, answer).map(|done| match done.status.success() {
                    true => done,
                    false => running.explain(shown, done, limit),
                });
                Some(done.map_err(failed))
            }
            Ok(None) => {
                *shell = None;
                Some(Err(CommandError::StillRunning { command: shown.to_owned(), after: begun.elapsed(), pid }))
            }
            // What became of the command is seen by who looks at the disks next.
            Err(error) => {
                *shell = None;
                Some(Err(failed(error)))
            }
        }
    }

    /// A child that holds a copy of the lock goes on: it is not freed here.
    pub(crate) fn abandon(&self) {
        *locked(&self.kept.shell) = None;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(shell) = &mut *locked(&self.kept.shell) {
            shell.used = Instant::now();
            // It fails only for a descriptor that is none.
            let _ = shell.lock.unlock();
        }
    }
}

impl Shell {
    fn start(lock: &Path, cgroup: Option<&File>) -> io::Result<Self> {
        let lock = File::open(lock)?;
        let program = ["/usr/sbin/lvm", "/sbin/lvm"].map(PathBuf::from).into_iter().find(|path| path.exists());
        let mut command = Command::new(program.ok_or(io::ErrorKind::NotFound)?);
        command
            .env_clear()
            .env("LC_ALL", "C")
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LVM_SUPPRESS_FD_WARNINGS", "1")
            .env("LVM_COMMAND_PROFILE", "lvmdbusd")
            .env("LVM_REPORT_FD", "1")
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(lock.try_clone()?);
        prepare(&mut command, cgroup.map(AsRawFd::as_raw_fd));
        let mut child = command.spawn()?;
        let (Some(commands), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        Ok(Self { child: Some(child), commands: Some(commands), answers, lock, used: Instant::now() })
    }

    /// Whether it runs, and its lock is that of the file that is there.
    fn serves(&mut self, there: &File) -> bool {
        let runs = self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)));
        let same = |a: &File, b: &File| {
            let (a, b) = (a.metadata(), b.metadata());
            matches!((a, b), (Ok(a), Ok(b)) if (a.dev(), a.ino()) == (b.dev(), b.ino()))
        };
        runs && same(&self.lock, there)
    }

    /// Adds the errors that the last command has met: its own answer tells
    /// whether it has succeeded, and no more. lvm keeps them for `lastlog`.
    fn explain(&mut self, shown: &str, done: Finished, limit: Duration) -> Finished {
        let told = self.run("lastlog", limit).ok().flatten();
        match told.and_then(|told| serde_json::from_slice::<Answer>(&told).ok()) {
            Some(told) => Finished::new(shown, done.status, done.stdout, told.errors()),
            None => done,
        }
    }

    /// None: it has not answered in time.
    fn run(&mut self, line: &str, limit: Duration) -> io::Result<Option<Vec<u8>>> {
        let deadline = Instant::now() + limit;
        let commands = self.commands.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        commands.write_all(format!("{line}\n").as_bytes())?;
        let (mut answer, mut part) = (Vec::new(), [0; 16 << 10]);
        while !is_whole(&answer) {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut poll = libc::pollfd { fd: self.answers.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            match crate::command::poll_one(&mut poll, left) {
                Ok(true) => match self.answers.read(&mut part)? {
                    0 => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "lvm has ended amid a command")),
                    read => answer.extend_from_slice(&part[..read]),
                },
                Ok(false) if left.is_zero() => return Ok(None),
                Ok(false) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Some(answer))
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // It ends after the command that it is at, if any.
        self.commands = None;
        if let Some(mut child) = self.child.take() {
            std::thread::spawn(move || child.wait());
        }
    }
}

/// The words as a line for lvm. None: one has what lvm would take for syntax.
pub(crate) fn line(words: &[impl AsRef<str>]) -> Option<String> {
    let plain = |word: &str| {
        let inner = |c: char| c.is_ascii_alphanumeric() || "-_+./:=,@%&!\"".contains(c);
        word.chars().next().is_some_and(|first| first != '"') && word.chars().all(inner)
    };
    let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
    (!words.is_empty() && words.len() <= MOST_WORDS && words.iter().all(|word| plain(word))).then(|| words.join(" "))
}

#[derive(Deserialize)]
struct Answer {
    log: Vec<Message>,
}

impl Answer {
    fn errors(&self) -> Vec<u8> {
        let errors = self.log.iter().filter(|message| message.log_type == "error");
        errors.map(|message| message.log_message.as_str()).collect::<Vec<_>>().join("\n").into_bytes()
    }
}

#[derive(Deserialize)]
struct Message {
    log_type: String,
    log_message: String,
    log_ret_code: String,
}

/// Whether all of a document is there.
fn is_whole(answer: &[u8]) -> bool {
    answer.ends_with(b"}\n") && serde_json::from_slice::<serde::de::IgnoredAny>(answer).is_ok()
}

/// An answer as the output of a process that ran this command alone.
fn read(shown: &str, answer: Vec<u8>) -> io::Result<Finished> {
    let told: Answer = serde_json::from_slice(&answer)?;
    let status = told.log.iter().rev().find(|message| message.log_type == "status");
    let status = status.ok_or_else(|| io::Error::other("lvm does not say whether it has succeeded"))?;
    // 1 is success, and becomes 0 as the exit status of a process (lvm2: ECMD_PROCESSED).
    let code = match status.log_ret_code.as_str() {
        "1" => 0,
        other => other.parse().ok().filter(|code| (1..=255).contains(code)).unwrap_or(255),
    };
    Ok(Finished::new(shown, ExitStatus::from_raw(code << 8), answer, told.errors()))
}

/// Ends a group's lvm once it has nothing to do.
fn end_when_idle(kept: &Arc<Kept>) {
    let kept = Arc::downgrade(kept);
    std::thread::spawn(move || {
        let mut wait = IDLE;
        loop {
            std::thread::sleep(wait);
            wait = IDLE;
            let Some(kept) = kept.upgrade() else { return };
            let Ok(turn) = kept.turn() else { return };
            if !flock::lock(&turn, Duration::ZERO).unwrap_or(false) {
                continue;
            }
            let mut shell = locked(&kept.shell);
            match shell.as_ref().and_then(|shell| IDLE.checked_sub(shell.used.elapsed())) {
                Some(left) if !left.is_zero() => wait = left,
                _ => {
                    *shell = None;
                    return;
                }
            }
        }
    });
}

#[allow(unsafe_code)]
fn prepare(command: &mut Command, cgroup: Option<i32>) {
    // SAFETY: between fork and exec only write(2) and signal(2) are called, which
    // are async-signal-safe, on a descriptor that the parent keeps open.
    unsafe {
        command.pre_exec(move || {
            // Where nobody reads the answer any more, the command is still done to its end.
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
            if let Some(cgroup) = cgroup {
                libc::write(cgroup, b"0".as_ptr().cast(), 1);
            }
            Ok(())
        });
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_words_become_a_line() {
        assert_eq!(line(&["lvs", "-o", "report/time_format=\"%s\""]).unwrap(), "lvs -o report/time_format=\"%s\"");
        for bad in ["", "a b", "a\nvgremove", "\"a", "#a", "a'b", "a\\b", "ü"] {
            assert_eq!(line(&["lvs", bad]), None, "{bad:?}");
        }
        assert_eq!(line(&["a"; 61]), None);
    }

    #[test]
    fn an_answer_is_what_a_process_would_have_given() {
        let answer = |code: &str| {
            format!(
                r#"{{"log":[{{"log_type":"error","log_message":"no such group","log_ret_code":"0"}},
                   {{"log_type":"status","log_message":"x","log_ret_code":"{code}"}}]}}"#
            )
        };
        read("lvm vgs", answer("1").into_bytes()).unwrap().success().unwrap();
        let error = read("lvm vgs", answer("5").into_bytes()).unwrap().success().unwrap_err().to_string();
        assert_eq!(error, "lvm vgs failed with exit status: 5: no such group");
        for bad in ["{}", "{\"log\":[]}", "[]", ""] {
            assert!(read("lvm vgs", bad.into()).is_err(), "{bad:?}");
        }
        assert!(is_whole(b"{\"log\":[{}\n]}\n") && !is_whole(b"{\"log\":[{}\n") && !is_whole(b""));
    }
}
