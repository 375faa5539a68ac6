//! Sees that a volume group has changed, whoever changed it, without asking.
//!
//! Our own processes write to the group's lock file after each change. Everyone
//! else's lvm command leaves a copy of the new metadata in LVM's backup
//! directory (lvm.conf(5), backup/backup, on by default). inotify(7) tells of
//! both.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::sys::inotify::{AddWatchFlags, InotifyEvent, WatchDescriptor};
use tracing::warn;

use super::inotify::Watches;

/// Why changes cannot be watched.
#[derive(Debug, thiserror::Error)]
#[error("cannot watch {path} for changes of volume groups")]
pub struct ChangesError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Changes of volume groups, as they come.
pub struct Changes {
    watches: Watches,
    lock_directory: PathBuf,
    locks: WatchDescriptor,
    backup: Option<WatchDescriptor>,
}

impl Changes {
    /// Begins to watch. The lock directory is made if need be; a missing backup
    /// directory means that others' changes are not seen.
    ///
    /// # Errors
    /// When the lock directory cannot be made or watched.
    pub fn watch(lock_directory: &Path, backup_directory: &Path) -> Result<Self, ChangesError> {
        let at = |source: io::Error| ChangesError { path: lock_directory.to_owned(), source };
        let watches = Watches::new().map_err(at)?;
        let locks = watch_locks(&watches, lock_directory).map_err(at)?;
        let backup = watches
            .add(
                backup_directory,
                AddWatchFlags::IN_MOVED_TO
                    | AddWatchFlags::IN_MOVED_FROM
                    | AddWatchFlags::IN_DELETE
                    | AddWatchFlags::IN_ONLYDIR,
            )
            .inspect_err(|error| {
                warn!(
                    path = %backup_directory.display(),
                    %error,
                    "changes that others make to volume groups will not be seen until our next one"
                );
            })
            .ok();
        Ok(Self { watches, lock_directory: lock_directory.to_owned(), locks, backup })
    }

    /// Waits for the next change; several at once count as one. Safe to cancel.
    ///
    /// # Errors
    /// When inotify fails, or the lock directory is gone and cannot be made
    /// again.
    pub async fn next(&mut self) -> Result<(), ChangesError> {
        loop {
            let events = self.watches.events().await.map_err(|source| self.error(source))?;
            if self.any_change(&events)? {
                return Ok(());
            }
        }
    }

    /// Whether there is something to read without waiting.
    pub fn pending(&self) -> bool {
        self.watches.pending()
    }

    fn any_change(&mut self, events: &[InotifyEvent]) -> Result<bool, ChangesError> {
        let mut changed = false;
        for event in events {
            let name = event.name.as_deref();
            if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                changed = true;
            } else if event.wd == self.locks {
                if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                    self.locks =
                        watch_locks(&self.watches, &self.lock_directory).map_err(|source| self.error(source))?;
                    changed = true;
                }
                changed |= name.is_some_and(is_group_lock);
            } else if Some(event.wd) == self.backup {
                changed |= name.is_some_and(|name| self.is_foreign_change(name));
            }
        }
        Ok(changed)
    }

    /// A file of the backup directory has the name of its group. One of our own
    /// processes holds the group's lock until it has announced its change: that
    /// one counts, not LVM's backup half way through.
    fn is_foreign_change(&self, name: &OsStr) -> bool {
        if name.as_bytes().starts_with(b".") {
            return false;
        }
        let mut file = OsStr::new("vg-").to_owned();
        file.push(name);
        file.push(".lock");
        match std::fs::File::open(self.lock_directory.join(file)) {
            Ok(lock) => !matches!(lock.try_lock_shared(), Err(std::fs::TryLockError::WouldBlock)),
            Err(_) => true,
        }
    }

    fn error(&self, source: io::Error) -> ChangesError {
        ChangesError { path: self.lock_directory.clone(), source }
    }
}

fn watch_locks(watches: &Watches, directory: &Path) -> io::Result<WatchDescriptor> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    watches.add(directory, AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_ONLYDIR)
}

fn is_group_lock(name: &OsStr) -> bool {
    let name = name.as_bytes();
    name.starts_with(b"vg-") && name.ends_with(b".lock")
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    struct Bench {
        directory: tempfile::TempDir,
        changes: Changes,
    }

    impl Bench {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            fs::create_dir(directory.path().join("backup")).unwrap();
            let changes = Changes::watch(&directory.path().join("locks"), &directory.path().join("backup")).unwrap();
            Self { directory, changes }
        }

        fn lock_file(&self) -> PathBuf {
            self.directory.path().join("locks/vg-vg0.lock")
        }

        /// As LVM does: aside, then renamed.
        fn back_up(&self) {
            let backup = self.directory.path().join("backup");
            fs::write(backup.join(".lvm_tmp"), "").unwrap();
            fs::rename(backup.join(".lvm_tmp"), backup.join("vg0")).unwrap();
        }

        async fn sees_change(&mut self) -> bool {
            timeout(Duration::from_millis(100), self.changes.next()).await.is_ok_and(|result| result.is_ok())
        }
    }

    #[tokio::test]
    async fn lock_taken_and_freed_is_no_change() {
        let mut bench = Bench::new();
        let file = File::create(bench.lock_file()).unwrap();
        file.lock().unwrap();
        drop(file);
        File::open(bench.lock_file()).unwrap();
        fs::write(bench.directory.path().join("locks/log-1.lock"), "x").unwrap();
        assert!(!bench.sees_change().await);
        fs::write(bench.lock_file(), "changed\n").unwrap();
        assert!(bench.sees_change().await);
        assert!(!bench.changes.pending());
    }

    #[tokio::test]
    async fn backup_during_our_own_change_is_no_change_of_others() {
        let mut bench = Bench::new();
        let file = File::create(bench.lock_file()).unwrap();
        file.lock().unwrap();
        bench.back_up();
        assert!(!bench.sees_change().await);
        drop(file);
        bench.back_up();
        assert!(bench.sees_change().await);
    }

    #[tokio::test]
    async fn lock_directory_may_be_removed_and_made_again() {
        let mut bench = Bench::new();
        fs::remove_dir_all(bench.directory.path().join("locks")).unwrap();
        assert!(bench.sees_change().await);
        fs::write(bench.lock_file(), "changed\n").unwrap();
        assert!(bench.sees_change().await);
    }

    #[tokio::test]
    async fn node_without_backups_is_served_too() {
        let directory = tempfile::tempdir().unwrap();
        Changes::watch(&directory.path().join("locks"), &directory.path().join("none")).unwrap();
    }
}
