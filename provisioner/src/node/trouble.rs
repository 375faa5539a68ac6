//! Unmounts that keep failing: seen in the notes that the driver (and, of CSI
//! volumes, the node service itself) leaves, and told to the controller, which
//! makes Events on their pods.
//!
//! That something is in use is told once it is certain that it stays so: a pod
//! that ends often leaves a directory in use for a moment. Who uses it is
//! looked for here, since a search of all processes is not for the driver,
//! which kubelet waits for.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lvm::mounts::{self, Mount};
use lvm::trouble::{FailedUnmount, Notes};
use lvprov_proto::lvprov as wire;
use nix::sys::inotify::{AddWatchFlags, InotifyEvent};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::inotify::Watches;

/// An unmount keeps failing if it has failed so often…
const OFTEN: u32 = 3;
/// …or, where attempts are rare, again after so many seconds.
const LONG: i64 = 30;
/// Notes are written in bursts when several pods end at once.
const QUIET: Duration = Duration::from_millis(200);
/// Between looks at what keeps failing.
const LOOK_AGAIN: Duration = Duration::from_secs(5 * 60);
/// Where notes cannot be watched, until the next attempt.
const RETRY: Duration = Duration::from_secs(60);
/// So many are told; no node has more volumes of ours that end at once.
const MOST: usize = 256;

/// So many processes are named for each directory.
const MOST_USERS: usize = 5;
/// A search for them ends after so long, with what was found.
const SEARCH: Duration = Duration::from_secs(2);
/// So many descriptors of a process are looked at.
const MOST_DESCRIPTORS: usize = 4096;

/// The unmounts that keep failing at the moment. Clones share it.
#[derive(Debug, Clone)]
pub struct Failing(watch::Receiver<Arc<[wire::FailingUnmount]>>);

impl Failing {
    /// None, now and later.
    pub fn none() -> Self {
        Self(watch::Sender::new(Arc::default()).subscribe())
    }

    /// Those of now, in order of target.
    pub fn latest(&self) -> Arc<[wire::FailingUnmount]> {
        self.0.borrow().clone()
    }

    /// Waits until they are others. Safe to cancel.
    ///
    /// # Errors
    /// When they never will be.
    pub async fn changed(&mut self) -> Result<(), watch::error::RecvError> {
        self.0.changed().await
    }
}

/// Watches the notes.
#[derive(Debug)]
pub struct Watcher {
    notes: Notes,
    failing: watch::Sender<Arc<[wire::FailingUnmount]>>,
}

impl Watcher {
    /// For these notes.
    pub fn new(notes: Notes) -> (Self, Failing) {
        let failing = watch::Sender::new(Arc::default());
        let told = Failing(failing.subscribe());
        (Self { notes, failing }, told)
    }

    /// Watches until dropped. Volumes are served also where that does not work.
    pub async fn run(self) {
        loop {
            if let Err(error) = self.watch().await {
                warn!(path = %self.notes.directory().display(), %error, "failing unmounts will not be told of");
                sleep(RETRY).await;
            }
        }
    }

    /// Until the directory has gone.
    async fn watch(&self) -> io::Result<()> {
        self.notes.make_directory()?;
        let watches = Watches::new()?;
        watches.add(
            self.notes.directory(),
            AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_ONLYDIR,
        )?;
        let is_end = |event: &InotifyEvent| event.mask.contains(AddWatchFlags::IN_IGNORED);
        loop {
            self.look().await;
            // Of what is unmounted by hand, and of who uses it now, no note tells.
            let wait = if self.failing.borrow().is_empty() { Duration::MAX } else { LOOK_AGAIN };
            let Ok(events) = timeout(wait, watches.events()).await else { continue };
            let mut ended = events?.iter().any(is_end);
            sleep(QUIET).await;
            while watches.pending() {
                ended |= watches.events().await?.iter().any(is_end);
            }
            if ended {
                return Ok(());
            }
        }
    }

    async fn look(&self) {
        let notes = self.notes.clone();
        let found = tokio::task::spawn_blocking(move || Ok(describe(persisting(&notes)?))).await;
        match found.map_err(io::Error::other).and_then(|found| found) {
            Ok(failing) => self.publish(failing),
            Err(error) => warn!(%error, "cannot look at the unmounts that fail"),
        }
    }

    fn publish(&self, failing: Vec<wire::FailingUnmount>) {
        self.failing.send_if_modified(|latest| {
            let changed = **latest != *failing;
            if changed {
                for unmount in &failing {
                    let wire::FailingUnmount { pod_uid, target, count, message, users, .. } = unmount;
                    info!(pod_uid, target, count, message, ?users, "an unmount keeps failing");
                }
                *latest = failing.into();
            }
            changed
        });
    }
}

/// The unmounts that keep failing. Notes of what is no longer mounted, by
/// whomever, are taken away.
///
/// # Errors
/// When notes or mounts cannot be read.
pub fn persisting(notes: &Notes) -> io::Result<Vec<FailedUnmount>> {
    let mut all = notes.all()?;
    if all.is_empty() {
        return Ok(all);
    }
    let mounts = mounts::all()?;
    all.retain(|note| {
        let mounted = is_mounted(&note.target, &mounts);
        if !mounted {
            notes.clear(&note.target);
        }
        mounted && persists(note)
    });
    all.truncate(MOST);
    Ok(all)
}

fn persists(note: &FailedUnmount) -> bool {
    note.count >= OFTEN || note.last.saturating_sub(note.first) >= LONG
}

/// There, or further down.
fn is_mounted(target: &Path, mounts: &[Mount]) -> bool {
    mounts.iter().any(|mount| mount.target.starts_with(target))
}

fn describe(failing: Vec<FailedUnmount>) -> Vec<wire::FailingUnmount> {
    let targets: Vec<&Path> = failing.iter().map(|note| note.target.as_path()).collect();
    let users = if targets.is_empty() { Vec::new() } else { users_of(&targets) };
    failing
        .iter()
        .zip(users)
        .map(|(note, users)| wire::FailingUnmount {
            pod_uid: note.pod_uid.clone(),
            target: note.target.display().to_string(),
            message: note.message.clone(),
            users,
            count: note.count,
            first_unix: note.first,
            last_unix: note.last,
        })
        .collect()
}

/// The processes that work in each of these volume directories, run from it, or
/// have a file of it open. A container sees the directory under a path of its
/// own, which ends the same; what it holds keeps the host's mount in use where
/// mounts propagate to it.
fn users_of(targets: &[&Path]) -> Vec<Vec<String>> {
    let ends: Vec<Option<Vec<u8>>> = targets.iter().map(|target| end_of(target)).collect();
    let mut users = vec![Vec::new(); targets.len()];
    let until = Instant::now() + SEARCH;
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().filter(|name| name.bytes().all(|b| b.is_ascii_digit())) else { continue };
        if Instant::now() > until {
            break;
        }
        let paths = paths_of(&process.path());
        for (end, users) in ends.iter().zip(&mut users) {
            let uses = end.as_ref().is_some_and(|end| paths.iter().any(|path| is_below(path, end)));
            if uses && users.len() < MOST_USERS {
                users.push(format!("process {pid} ({})", command_of(&process.path())));
            }
        }
    }
    users
}

/// What is the same in every path of a volume directory, and in no other:
/// `/<pod UID>/volumes/<driver>/<volume>`, of a CSI volume with `/mount`.
fn end_of(target: &Path) -> Option<Vec<u8>> {
    let parts: Vec<&OsStr> = target.iter().collect();
    let pods = parts.windows(3).rposition(|three| three[0] == "pods" && three[2] == "volumes")?;
    let end = parts[pods + 1..].iter().flat_map(|part| [b"/".as_slice(), part.as_bytes()]);
    Some(end.flatten().copied().collect())
}

fn is_below(path: &Path, end: &[u8]) -> bool {
    let path = path.as_os_str().as_bytes();
    let after = |at: usize| &path[at + end.len()..];
    path.windows(end.len())
        .enumerate()
        .filter(|(_, window)| *window == end)
        // The kernel adds that to the name of what has been removed.
        .any(|(at, _)| after(at).is_empty() || after(at).starts_with(b"/") || after(at).starts_with(b" (deleted)"))
}

/// Where a process is, what it runs, and what it has open. A process that has
/// ended meanwhile has none.
fn paths_of(process: &Path) -> Vec<PathBuf> {
    let open = fs::read_dir(process.join("fd")).into_iter().flatten().flatten().take(MOST_DESCRIPTORS);
    ["cwd", "root", "exe"]
        .iter()
        .map(|name| process.join(name))
        .chain(open.map(|descriptor| descriptor.path()))
        .filter_map(|link| fs::read_link(link).ok())
        .collect()
}

/// Its name, which the process itself chooses: nothing that a terminal obeys.
fn command_of(process: &Path) -> String {
    let name = fs::read(process.join("comm")).unwrap_or_default();
    let name = name.strip_suffix(b"\n").unwrap_or(&name);
    name.iter().take(16).map(|byte| if byte.is_ascii_graphic() { char::from(*byte) } else { '?' }).collect()
}

#[cfg(test)]
mod tests {
    use lvm::names::PodUid;

    use super::*;

    /// Mounted wherever a test runs.
    const MOUNTED: &str = "/proc";

    fn fails(notes: &Notes, target: &str, times: u32) {
        for _ in 0..times {
            notes.note_failed_unmount(Path::new(target), &PodUid::parse("1111").unwrap(), "busy");
        }
    }

    fn note(count: u32, first: i64, last: i64) -> FailedUnmount {
        FailedUnmount { target: "/t".into(), pod_uid: "1111".into(), count, first, last, message: "busy".into() }
    }

    #[test]
    fn one_failure_is_nothing_and_three_or_half_a_minute_are() {
        assert!(!persists(&note(1, 100, 100)));
        assert!(!persists(&note(2, 100, 129)));
        assert!(persists(&note(3, 100, 100)));
        assert!(persists(&note(2, 100, 130)));
        // A clock that was set back.
        assert!(!persists(&note(2, 100, i64::MIN)));
    }

    #[test]
    fn what_is_not_mounted_any_more_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let notes = Notes::at(directory.path());
        fails(&notes, MOUNTED, 3);
        fails(&notes, "/nonexistent/1111/volumes/lvprov.io~lvm/logs", 3);
        let targets: Vec<_> = persisting(&notes).unwrap().into_iter().map(|note| note.target).collect();
        assert_eq!(targets, [Path::new(MOUNTED)]);
        assert_eq!(notes.all().unwrap().len(), 1);
    }

    #[test]
    fn whoever_has_a_file_open_is_named_and_no_one_else() {
        let directory = tempfile::tempdir().unwrap();
        let below = |uid: &str| {
            let volume = directory.path().join("pods").join(uid).join("volumes/lvprov.io~lvm/logs");
            fs::create_dir_all(&volume).unwrap();
            volume
        };
        let (used, unused, neighbour) = (below("1111"), below("2222"), below("1111").with_file_name("logs-2"));
        fs::create_dir(&neighbour).unwrap();
        let file = fs::File::create(used.join("a")).unwrap();
        let me = format!("process {} (", std::process::id());
        let users = || users_of(&[&used, &unused, &neighbour, Path::new("/proc")]);
        let found = users();
        assert!(found[0].len() == 1 && found[0][0].starts_with(&me), "{found:?}");
        assert!(found[1..].iter().all(Vec::is_empty), "{found:?}");
        // Removed, and open all the same.
        fs::remove_file(used.join("a")).unwrap();
        assert_eq!(users()[0].len(), 1);
        drop(file);
        assert!(users()[0].is_empty());
    }

    #[test]
    fn a_containers_path_counts_and_a_longer_name_does_not() {
        let end = end_of(Path::new("/var/lib/kubelet/pods/1111/volumes/lvprov.io~lvm/logs")).unwrap();
        for path in [
            "/host/pods/1111/volumes/lvprov.io~lvm/logs",
            "/1111/volumes/lvprov.io~lvm/logs/a/b",
            "/x/1111/volumes/lvprov.io~lvm/logs (deleted)",
        ] {
            assert!(is_below(Path::new(path), &end), "{path}");
        }
        for path in ["/pods/1111/volumes/lvprov.io~lvm/logs2", "/pods/21111/volumes/lvprov.io~lvm/logs", "/", ""] {
            assert!(!is_below(Path::new(path), &end), "{path}");
        }
        let csi = end_of(Path::new("/var/lib/kubelet/pods/1111/volumes/kubernetes.io~csi/logs/mount")).unwrap();
        assert_eq!(csi, b"/1111/volumes/kubernetes.io~csi/logs/mount");
        assert_eq!(end_of(Path::new("/proc")), None);
    }

    #[tokio::test]
    async fn failures_are_told_as_they_come_and_as_they_end() {
        let directory = tempfile::tempdir().unwrap();
        let notes = Notes::at(&directory.path().join("lvprov/unmounts"));
        let (watcher, mut failing) = Watcher::new(notes.clone());
        tokio::spawn(watcher.run());
        let soon = Duration::from_secs(20);
        while !notes.directory().exists() {
            sleep(Duration::from_millis(5)).await;
        }
        fails(&notes, MOUNTED, 3);
        timeout(soon, failing.changed()).await.unwrap().unwrap();
        let latest = failing.latest();
        assert_eq!((latest.len(), latest[0].pod_uid.as_str(), latest[0].target.as_str()), (1, "1111", MOUNTED));
        assert_eq!((latest[0].message.as_str(), latest[0].users.len()), ("busy", 0));
        // Somebody clears up; afterwards all goes on.
        fs::remove_dir_all(directory.path().join("lvprov")).unwrap();
        timeout(soon, failing.changed()).await.unwrap().unwrap();
        assert!(failing.latest().is_empty());
        fails(&notes, MOUNTED, 3);
        timeout(soon, failing.changed()).await.unwrap().unwrap();
        notes.clear(Path::new(MOUNTED));
        timeout(soon, failing.changed()).await.unwrap().unwrap();
        assert!(failing.latest().is_empty());
    }
}
