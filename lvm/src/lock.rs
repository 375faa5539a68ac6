//! One writer at a time: file locks that wait in order of arrival, up to a deadline.
//!
//! Locks are flock(2) on files below [`DIRECTORY`], so the kernel frees them
//! when their holder dies. A mutating lvm command is given its group's lock, as
//! its standard input, and so keeps it even if who started it is killed.
//! The directory is in /run, which only root can write; /run/lock is anybody's.
//!
//! Whoever has changed a volume group writes to its lock file: the node service
//! watches these files (inotify) and so learns of every change, also of those
//! that the driver makes.

use crate::flock;
use crate::names::{LvName, Namespace, VgName};
use crate::shell::Held;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where lock files lie. Emptied by a reboot, as locks should be.
pub const DIRECTORY: &str = "/run/lvprov";

/// A lock could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Its file cannot be opened or locked.
    #[error("cannot lock {path}: {source}")]
    Io {
        /// The lock file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Somebody held it for too long.
    #[error("{what} was busy for {} s; it is tried again (see who holds {path})", .waited.as_secs())]
    Busy {
        /// What is locked.
        what: String,
        /// The lock file.
        path: String,
        /// How long was waited.
        waited: Duration,
    },
}

/// A lock held; dropped, it is free.
#[derive(Debug)]
pub struct Lock {
    file: File,
    /// Of a group whose lvm stays.
    held: Option<Held>,
}

/// The file of a volume group's lock: written to after every change.
pub fn volume_group_path(vg: &VgName) -> PathBuf {
    Path::new(DIRECTORY).join(format!("vg-{vg}.lock"))
}

/// The lock file, made where it is not there.
pub(crate) fn open(path: &Path) -> std::io::Result<File> {
    let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    match open() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
            }
            open()
        }
        other => other,
    }
}

impl Lock {
    /// Locks a volume group against all our other writers.
    pub fn volume_group(vg: &VgName, patience: Duration) -> Result<Self, LockError> {
        Self::take(&volume_group_path(vg), &format!("volume group {vg}"), patience)
    }

    /// Locks one logical volume: its file system, a log volume's mount,
    /// directories and end. Taken before the group's lock, never after it.
    pub fn volume(lv: &LvName, patience: Duration) -> Result<Self, LockError> {
        Self::take(&Path::new(DIRECTORY).join(format!("lv-{lv}.lock")), &format!("logical volume {lv}"), patience)
    }

    /// Locks what is shared by all log volumes of a namespace. Taken after a
    /// volume's lock, before a group's.
    pub fn namespace(namespace: &Namespace, patience: Duration) -> Result<Self, LockError> {
        let path = Path::new(DIRECTORY).join(format!("ns-{namespace}.lock"));
        Self::take(&path, &format!("the log volumes of namespace {namespace}"), patience)
    }

    fn take(path: &Path, what: &str, patience: Duration) -> Result<Self, LockError> {
        let io = |source| LockError::Io { path: path.display().to_string(), source };
        let file = open(path).map_err(io)?;
        let start = Instant::now();
        if flock::lock(&file, patience).map_err(io)? {
            return Ok(Self { file, held: None });
        }
        Err(LockError::Busy { what: what.to_owned(), path: path.display().to_string(), waited: start.elapsed() })
    }

    /// Tells watchers that what this lock guards has changed.
    pub fn announce_change(&mut self) {
        // Only the event counts, not what is written; a full /run is no reason to fail.
        let file = self.held.as_mut().map_or(&mut self.file, |held| &mut held.changes);
        let _ = file.set_len(0);
        let _ = file.write_all(b"changed\n");
    }

    /// A lock that the group's lvm shares.
    pub(crate) fn held(file: File, held: Held) -> Self {
        Self { file, held: Some(held) }
    }

    /// The lvm that stays, where there is one.
    pub(crate) fn shell(&self) -> Option<&Held> {
        self.held.as_ref()
    }

    /// A child that was given this lock goes on, and is the one to free it.
    pub(crate) fn abandon(&self) {
        if let Some(held) = &self.held {
            held.abandon();
        }
    }

    /// The descriptor, for a child that must hold the lock as long as it runs.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_waits_until_the_first_is_done() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sub").join("a.lock");
        let first = Lock::take(&path, "a", Duration::ZERO).unwrap();
        assert!(matches!(Lock::take(&path, "a", Duration::from_millis(20)), Err(LockError::Busy { .. })));
        let waiting = std::thread::spawn({
            let path = path.clone();
            move || Lock::take(&path, "a", Duration::from_secs(20)).is_ok()
        });
        std::thread::sleep(Duration::from_millis(20));
        drop(first);
        assert!(waiting.join().unwrap());
    }

    #[test]
    fn a_change_shows_on_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.lock");
        let mut lock = Lock::take(&path, "a", Duration::ZERO).unwrap();
        lock.announce_change();
        lock.announce_change();
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("changed\n"));
    }
}
