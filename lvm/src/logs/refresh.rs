//! The index of a volume that is mounted, made to agree with what is there.
//!
//! A pod's directory is mounted before its containers are started, and whoever
//! unmounts cannot always say so: what a mount and an unmount write is made
//! good here.

use super::directory::{directory_names, is_bound, records};
use super::index::Index;
use super::publish::load_index;
use super::{LogError, MountedLog, io};
use crate::lock::Lock;
use crate::names::PodUid;
use crate::volume::device;
use crate::{Lvm, mounts};
use std::collections::BTreeSet;
use std::path::Path;

/// The pod that something is mounted for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodOfMount {
    /// Its UID.
    pub uid: PodUid,
    /// Its containers, as far as they have been started.
    pub containers: Vec<String>,
}

impl Lvm {
    /// Brings the index of a log volume up to date, and makes it anew where it is
    /// lost. `pod_of` tells whom a directory is mounted for. Gives whether
    /// anything had to be written.
    ///
    /// # Errors
    /// When the volume cannot be looked at, or the index not be written.
    pub fn refresh_index(
        &self,
        log: &MountedLog,
        pod_of: impl Fn(&Path) -> Option<PodOfMount>,
    ) -> Result<bool, LogError> {
        let place = self.place(&log.vg, &log.namespace, &log.volume);
        // Nobody has to wait for this, and nobody shall wait for a hung disk because of it.
        let node = device(&log.vg, &log.lv);
        crate::device::probe(&self.runner, &node).map_err(io("read", &node))?;
        // Mounts and unmounts write under it, too: what is seen here is not half of either.
        let _lock = Lock::volume(&place.lv, self.patience())?;
        let all = mounts::all().map_err(io("read the mounts above", &place.path))?;
        if !self.mounted_logs(&all).contains(log) {
            return Ok(false);
        }
        let number = mounts::file_system_of(&place.path).map_err(io("look at", &place.path))?;
        let before = Index::load(&place.path);
        let mut index = load_index(&place);
        let there: BTreeSet<String> = directory_names(&place.path)?.iter().map(ToString::to_string).collect();
        index.directories.retain(|name, _| there.contains(name));
        for (name, record) in records(&place.path)? {
            let path = place.path.join(name.as_str());
            if !index.directories.contains_key(name.as_str()) {
                index.restore(&name, &path, &record, is_bound(&all, number, name.as_str()));
            }
            let root = Path::new("/").join(name.as_str());
            let here = all.iter().filter(|mount| mount.device == number && mount.root == root);
            let pods: Vec<PodOfMount> = here.filter_map(|mount| pod_of(&mount.target)).collect();
            if !pods.is_empty() {
                index.end_others(name.as_str(), &pods.iter().map(|pod| pod.uid.as_str()).collect::<Vec<_>>());
            } else if !is_bound(&all, number, name.as_str()) {
                index.end(name.as_str(), None, Vec::new(), Some(record.keep_until()));
            }
            for PodOfMount { uid, containers } in pods {
                let pod = if record.pod.is_empty() { name.as_str() } else { &record.pod };
                index.begin(&name, &path, pod, uid.as_str(), containers);
            }
        }
        if before.as_ref() == Some(&index) {
            return Ok(false);
        }
        index.store(&place.path)?;
        Ok(true)
    }
}
