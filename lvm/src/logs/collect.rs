//! Looking inside, and taking away what nothing owns any more.

use super::directory::{
    GONE, PRIVATE, directory_names, empty_trash, is_bound, next_project, open_beneath, open_directory,
    private_directory, read_record,
};
use super::index::Index;
use super::{CollectError, Directory, LogError, LogVolume, errno, io};
use crate::identity::Owner;
use crate::lock::Lock;
use crate::names::{DirectoryName, LogVolumeName, Namespace, VgName};
use crate::report::LogicalVolume;
use crate::{Lvm, mounts, quota};
use nix::fcntl::renameat;
use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

impl Lvm {
    /// The log volumes among `volumes` with their directories; mounts those
    /// that are not mounted, to look inside.
    pub fn log_volumes(&self, volumes: &[LogicalVolume]) -> Result<Vec<LogVolume>, LogError> {
        let root = Path::new("/proc/self/mountinfo");
        let mut found = Vec::new();
        for lv in volumes {
            let Owner::Log { namespace, volume } = &lv.owner else { continue };
            let path = self.log_path(namespace, volume);
            let node = self.mount_log(lv).and_then(Result::ok);
            let mounts = mounts::all().map_err(io("read", root))?;
            let directories = node.and_then(|node| self.directories(&path, &node, &mounts).ok());
            found.push(LogVolume {
                lv: lv.clone(),
                namespace: namespace.clone(),
                volume: volume.clone(),
                path,
                directories,
            });
        }
        Ok(found)
    }

    pub(super) fn directories(
        &self,
        path: &Path,
        node: &Path,
        mounts: &[mounts::Mount],
    ) -> Result<Vec<Directory>, LogError> {
        let number = mounts::file_system_of(path).map_err(io("look at", path))?;
        let root = open_directory(path)?;
        let mut directories = Vec::new();
        for name in directory_names(path)? {
            let below = path.join(name.as_str());
            let Ok(directory) = open_beneath(&root, OsStr::new(name.as_str())) else { continue };
            let record = read_record(&directory).ok().flatten();
            // The directory's own could be changed by its pod, to show a neighbour's figures.
            let project = match record.as_ref().map(|record| record.project).filter(|project| *project != 0) {
                Some(project) => project,
                None => quota::project(&directory).map_err(io("read the quota project of", &below))?,
            };
            let usage = quota::usage(node, project).map_err(io("read the quota of", &below))?;
            directories.push(Directory {
                mounted: is_bound(mounts, number, name.as_str()),
                record,
                usage,
                path: below,
                name: name.to_string(),
            });
        }
        Ok(directories)
    }

    /// Removes a pod's directory, if it is not mounted and was last used by the
    /// pod with this UID (`None`: has no readable record).
    pub fn collect_directory(
        &self,
        vg: &VgName,
        namespace: &Namespace,
        volume: &LogVolumeName,
        name: &DirectoryName,
        pod_uid: Option<&str>,
    ) -> Result<(), CollectError> {
        let place = self.place(vg, namespace, volume);
        let path = place.path.join(name.as_str());
        let changed = |reason| CollectError::Changed { what: path.display().to_string(), reason };
        let lock = Lock::volume(&place.lv, self.patience())?;
        self.ensure_mounted(&place, &lock, None)?;
        let number = mounts::file_system_of(&place.path).map_err(io("look at", &place.path))?;
        let all = mounts::all().map_err(io("read the mounts above", &path))?;
        if is_bound(&all, number, name.as_str()) {
            return Err(changed("it is mounted for a pod"));
        }
        let root = open_directory(&place.path)?;
        let directory = match open_beneath(&root, OsStr::new(name.as_str())) {
            Ok(directory) => directory,
            Err(nix::Error::ENOENT) => return Ok(()),
            Err(error) => return Err(errno("open", &path)(error).into()),
        };
        let record = read_record(&directory).map_err(io("read the record of", &path))?;
        if record.as_ref().map(|record| record.pod_uid.as_str()) != pod_uid {
            return Err(changed("another pod has used it meanwhile"));
        }
        // Out of the way in one step, so that what is half removed never looks
        // like a pod's; a number that is given once keeps names short and apart.
        let private = private_directory(&root, &place.path)?;
        let number = next_project(&root).map_err(io("number what is removed from", &place.path))?;
        renameat(&root, name.as_str(), &private, format!("{GONE}{number}").as_str())
            .map_err(errno("move away", &path))?;
        if let Some(mut index) = Index::load(&place.path) {
            index.directories.remove(name.as_str());
            let _ = index.store(&place.path);
        }
        // A large tree takes its time; pods need not wait for it.
        drop(lock);
        empty_trash(&private, &place.path.join(PRIVATE))?;
        Ok(())
    }

    /// Removes a log volume that has no directory left.
    pub fn collect_log(&self, vg: &VgName, namespace: &Namespace, volume: &LogVolumeName) -> Result<(), CollectError> {
        let place = self.place(vg, namespace, volume);
        let changed = |reason| CollectError::Changed { what: format!("{vg}/{}", place.lv), reason };
        let lock = Lock::volume(&place.lv, self.patience())?;
        match self.ensure_mounted(&place, &lock, None) {
            Ok(_) => {
                if !directory_names(&place.path)?.is_empty() {
                    return Err(changed("it has directories again"));
                }
                self.unmount(&place.path)?;
            }
            Err(LogError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let owner = Owner::Log { namespace: namespace.clone(), volume: volume.clone() };
        self.delete_if(vg, &place.lv, |found| found.owner == owner)?;
        // The empty mount point, and the namespace's directory if this was its last volume.
        Index::remove(&place.path);
        let _ = fs::remove_dir(&place.path);
        if let Some(parent) = place.path.parent() {
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }
}
