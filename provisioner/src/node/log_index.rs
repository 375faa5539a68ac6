//! Keeps the indexes of log volumes up to date: which containers a pod has is
//! known only after its volumes have been mounted.
//!
//! The kernel tells of every change of the mount table, and kubelet makes a
//! directory for each container before it starts it. So nothing is asked for
//! while nothing happens.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lvm::logs::{LogError, MountedLog, PodOfMount};
use lvm::mounts::{self, Mount};
use lvm::{Lvm, names::PodUid};
use nix::sys::inotify::{AddWatchFlags, WatchDescriptor};
use tokio::io::Interest;
use tokio::time::sleep;
use tracing::{debug, warn};

use super::inotify::{Watches, register};
use super::inventory::PodsDirectory;
use super::publish::containers_of;
use super::served::Served;

/// The containers of a pod start one after another.
const QUIET: Duration = Duration::from_millis(500);
/// Where changes cannot be watched, until the next attempt.
const RETRY: Duration = Duration::from_secs(60);

/// Refreshes the indexes of one node.
#[derive(Debug, Clone)]
pub struct Indexer {
    lvm: Arc<Lvm>,
    served: Served,
    pods: PodsDirectory,
}

/// The pods that have a directory of a log volume, by where it is mounted.
type InUse = BTreeMap<PathBuf, PodUid>;
/// As in the index: with their containers.
type Known = BTreeMap<PathBuf, (PodUid, Vec<String>)>;

impl Indexer {
    /// Of the volumes served; `pods`: where kubelet keeps them.
    pub fn new(lvm: Arc<Lvm>, served: Served, pods: PodsDirectory) -> Self {
        Self { lvm, served, pods }
    }

    /// Refreshes until dropped. Volumes are served also where that does not work.
    pub async fn run(self) {
        loop {
            if let Err(error) = self.watch().await {
                warn!(%error, "the indexes of log volumes may lack containers");
            }
            sleep(RETRY).await;
        }
    }

    async fn watch(&self) -> io::Result<()> {
        let table = register(File::open("/proc/self/mountinfo")?, Interest::PRIORITY)?;
        let watches = Watches::new()?;
        let mut watched = BTreeMap::new();
        let mut known = BTreeMap::new();
        loop {
            let in_use = self.in_use(&mounts::all()?);
            // Before the directories are read, so that none is missed.
            self.watch_pods(&watches, &mut watched, in_use.values().flat_map(InUse::values));
            known = self.refresh(in_use, known).await?;
            tokio::select! {
                changed = table.ready(Interest::PRIORITY) => changed?.clear_ready(),
                events = watches.events() => drop(events?),
            }
            sleep(QUIET).await;
            while watches.pending() {
                watches.events().await?;
            }
        }
    }

    /// By log volume, in the order of where these are.
    fn in_use(&self, mounts: &[Mount]) -> BTreeMap<PathBuf, InUse> {
        let logs = self.lvm.mounted_logs(mounts).into_iter().filter(|log| self.served.includes(&log.vg));
        logs.map(|log| {
            let pods = self.of_log(&log, mounts);
            (log.path, pods)
        })
        .collect()
    }

    fn of_log(&self, log: &MountedLog, mounts: &[Mount]) -> InUse {
        let device = mounts.iter().rfind(|mount| mount.target == log.path).map(|mount| mount.device);
        let of_it = mounts.iter().filter(|mount| Some(mount.device) == device);
        of_it.filter_map(|mount| Some((mount.target.clone(), self.pods.pod_of(&mount.target)?))).collect()
    }

    /// Watches where the containers of these pods will be, and no others'.
    fn watch_pods<'a>(
        &self,
        watches: &Watches,
        watched: &mut BTreeMap<PathBuf, WatchDescriptor>,
        pods: impl Iterator<Item = &'a PodUid>,
    ) {
        let mut wanted = BTreeSet::new();
        for pod in pods {
            let pod = self.pods.directory(pod);
            let containers = pod.join("containers");
            // The one is made in the other with the first container.
            wanted.insert(if containers.is_dir() { containers } else { pod });
        }
        watched.retain(|path, watch| {
            let keep = wanted.contains(path);
            if !keep {
                watches.remove(*watch);
            }
            keep
        });
        for path in wanted {
            if watched.contains_key(&path) {
                continue;
            }
            match watches.add(&path, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_ONLYDIR) {
                Ok(watch) => {
                    watched.insert(path, watch);
                }
                // The pod has gone meanwhile; then its mount has, too.
                Err(error) => debug!(path = %path.display(), %error, "not watched"),
            }
        }
    }

    /// Refreshes the indexes of which something is not `known` as it is now.
    async fn refresh(
        &self,
        in_use: BTreeMap<PathBuf, InUse>,
        known: BTreeMap<PathBuf, Known>,
    ) -> io::Result<BTreeMap<PathBuf, Known>> {
        let this = self.clone();
        tokio::task::spawn_blocking(move || this.refresh_changed(in_use, &known)).await.map_err(io::Error::other)
    }

    fn refresh_changed(
        &self,
        in_use: BTreeMap<PathBuf, InUse>,
        known: &BTreeMap<PathBuf, Known>,
    ) -> BTreeMap<PathBuf, Known> {
        let with_containers = |(target, pod): (PathBuf, PodUid)| {
            let containers = containers_of(&self.pods.directory(&pod));
            (target, (pod, containers))
        };
        let now = in_use.into_iter().map(|(log, pods)| (log, pods.into_iter().map(with_containers).collect::<Known>()));
        let mut done = BTreeMap::new();
        for (log, pods) in now {
            if known.get(&log) != Some(&pods)
                && let Err(error) = self.refresh_one(&log)
            {
                // With the next change it is tried again.
                warn!(path = %log.display(), %error, "the index of a log volume is not up to date");
                continue;
            }
            done.insert(log, pods);
        }
        done
    }

    fn refresh_one(&self, path: &Path) -> Result<(), LogError> {
        // As it is by now: what has gone meanwhile needs no index.
        let mounts = mounts::all().unwrap_or_default();
        let Some(log) = self.lvm.mounted_logs(&mounts).into_iter().find(|log| log.path == path) else { return Ok(()) };
        let pod_of = |target: &Path| {
            let uid = self.pods.pod_of(target)?;
            let containers = containers_of(&self.pods.directory(&uid));
            Some(PodOfMount { uid, containers })
        };
        let written = self.lvm.refresh_index(&log, pod_of)?;
        debug!(path = %path.display(), written, "index of a log volume");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use lvm::config::NodeConfig;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_pods_containers_are_waited_for_where_they_will_be() {
        let root = tempfile::tempdir().unwrap();
        let pods = PodsDirectory::new(root.path());
        let uid = PodUid::parse("1111").unwrap();
        let pod = pods.directory(&uid);
        std::fs::create_dir_all(&pod).unwrap();
        let indexer = Indexer::new(Arc::new(Lvm::new(NodeConfig::default())), Served::default(), pods);
        let (watches, mut watched) = (Watches::new().unwrap(), BTreeMap::new());
        let soon = Duration::from_secs(20);

        for name in ["containers", "containers/app", "containers/side"] {
            indexer.watch_pods(&watches, &mut watched, [&uid].into_iter());
            assert_eq!(watched.len(), 1);
            std::fs::create_dir(pod.join(name)).unwrap();
            timeout(soon, watches.events()).await.unwrap().unwrap();
        }
        assert_eq!(containers_of(&pod), ["app", "side"]);
        indexer.watch_pods(&watches, &mut watched, [].into_iter());
        assert!(watched.is_empty());
    }
}
