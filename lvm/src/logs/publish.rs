//! Mounting: a pod's directory, and the volume that it lies on.

use super::directory::{
    FIRST_PROJECT, is_bound, make_directory, next_project, now, open_beneath, open_directory, read_record,
    touch_records, write_record,
};
use super::{LogError, Place, PublishLog, Record, errno, io, taken};
use crate::filesystem::{self, FsType};
use crate::identity::{self, Owner};
use crate::lock::Lock;
use crate::names::VgName;
use crate::report::LogicalVolume;
use crate::volume::{PATIENCE, device};
use crate::{Lvm, mounts, quota, xattr};
use nix::mount::MsFlags;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Error, ErrorKind, Result as IoResult};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Attribute of the volume's root while its file system is being grown.
const GROWING: &str = "trusted.lvprov.growing";
/// How long an unmount waits to note the end of a directory's use: not long,
/// since kubelet waits too, and all that is lost is a little retention.
const NOTE_PATIENCE: Duration = Duration::from_secs(2);

impl Lvm {
    /// Mounts a pod's directory of a log volume, making what is not there yet.
    /// Where the volume is mounted already, no child process is started.
    pub fn publish_log(&self, request: &PublishLog) -> Result<(), LogError> {
        if request.size < request.fs.minimum_size() {
            return Err(LogError::TooSmall { asked: request.size, fs: request.fs });
        }
        if !self.config.open_groups().any(|vg| *vg == request.vg) {
            let open: Vec<&str> = self.config.open_groups().map(VgName::as_str).collect();
            return Err(LogError::GroupNotOpen { vg: request.vg.clone(), open: open.join(", ") });
        }
        let place = self.place(&request.vg, &request.namespace, &request.volume);
        let lock = Lock::volume(&place.lv, PATIENCE)?;
        let node = self.ensure_mounted(&place, &lock, Some((request.size, request.fs)))?;
        let has = mounts::device_size(&node).map_err(io("read the size of", &node))?;
        let root = open_directory(&place.path)?;
        let growing = xattr::get(&root, GROWING).map_err(io("look at", &place.path))?.is_some();
        if has < request.size || growing {
            // Set before and taken off after, so that a growth that is cut off in between is finished.
            xattr::set(&root, GROWING, b"1").map_err(io("mark as growing", &place.path))?;
            self.extend(&request.vg, &place.lv, request.size)?;
            let fs = mounts::at(&place.path).map_err(io("look at", &place.path))?.map(|mount| mount.fs_type);
            let fs = fs.and_then(|fs| fs.parse().ok()).unwrap_or(request.fs);
            filesystem::grow(&self.runner, fs, &node, &place.path)?;
            xattr::remove(&root, GROWING).map_err(io("mark as grown", &place.path))?;
        }
        let size = has.max(request.size);
        if request.quota > size {
            return Err(LogError::QuotaTooLarge { quota: request.quota, size });
        }

        let path = place.path.join(request.pod.as_str());
        let name = OsStr::new(request.pod.as_str());
        let directory = match open_beneath(&root, name) {
            Ok(directory) => directory,
            Err(nix::Error::ENOENT) => make_directory(&root, &place.path, name)?,
            Err(error) => return Err(errno("open", &path)(error)),
        };
        let project = self.own_project(&root, &directory).map_err(io("set the quota project of", &path))?;
        quota::set_limit(&node, project, request.quota).map_err(io("set the quota of", &path))?;
        let record = Record {
            pod_uid: request.pod_uid.to_string(),
            retention: request.retention.as_secs(),
            last_used: now(),
            project,
        };
        write_record(&directory, &record).map_err(io("write the record of", &path))?;

        if let Some(there) = mounts::at(&request.target).map_err(io("look at", &request.target))? {
            let ours = there.root == Path::new("/").join(request.pod.as_str())
                && mounts::file_system_of(&place.path).ok() == Some(there.device);
            return if ours { Ok(()) } else { Err(taken(&place, &request.target, "another mount")) };
        }
        fs::create_dir_all(&request.target).map_err(io("make", &request.target))?;
        mounts::bind(&directory, &request.target, request.read_only)
            .map_err(io("mount the pod's directory at", &request.target))
    }

    /// The quota project of a pod's directory: the one that its record tells,
    /// set again in case the pod has changed it, or a new one.
    fn own_project(&self, root: &File, directory: &OwnedFd) -> IoResult<u32> {
        let recorded = read_record(directory)?.map(|record| record.project).filter(|project| *project != 0);
        let actual = quota::project(directory)?;
        let project = match recorded {
            Some(project) => project,
            // Made a moment ago, and not recorded yet.
            None if actual >= FIRST_PROJECT && read_record(directory)?.is_none() => actual,
            None => next_project(root)?,
        };
        if project != actual {
            quota::set_project(directory, project)?;
        }
        Ok(project)
    }

    /// Notes on a pod's directory that it has been unmounted: its retention
    /// begins. `gone` is what [`mounts::unmount`] gave. Nothing to note is no error.
    pub fn note_unmounted(&self, gone: &mounts::Mount) -> IoResult<()> {
        let Ok(name) = gone.root.strip_prefix("/") else { return Ok(()) };
        if name.as_os_str().is_empty() || name.components().count() != 1 {
            return Ok(());
        }
        let base = mounts::all()?.into_iter().find(|m| {
            m.device == gone.device && m.root == Path::new("/") && m.target.starts_with(&self.config.log_root)
        });
        let Some(base) = base else { return Ok(()) };
        let Some((_, lv)) = base.logical_volume() else { return Ok(()) };
        // Or a mount under the same name could be noted as the earlier pod's.
        let _lock = Lock::volume(&lv, NOTE_PATIENCE).map_err(Error::other)?;
        let root = File::open(&base.target)?;
        let directory = open_beneath(&root, name.as_os_str())?;
        if is_bound(&mounts::all()?, gone.device, &name.to_string_lossy()) {
            return Ok(());
        }
        if let Some(mut record) = read_record(&directory)? {
            record.last_used = now();
            write_record(&directory, &record)?;
        }
        Ok(())
    }

    /// Mounts the log volume at its path, if it is not, and gives its device.
    /// `create`: size and file system of one that is not there yet.
    pub(super) fn ensure_mounted(
        &self,
        place: &Place<'_>,
        lock: &Lock,
        create: Option<(u64, FsType)>,
    ) -> Result<PathBuf, LogError> {
        let node = device(place.vg, &place.lv);
        if let Some(there) = mounts::at(&place.path).map_err(io("look at", &place.path))? {
            return match there.logical_volume() {
                Some((vg, lv)) if vg == *place.vg && lv == place.lv => Ok(node),
                other => {
                    let reason = other.map_or("another mount".to_owned(), |(vg, lv)| format!("volume {vg}/{lv}"));
                    Err(taken(place, &place.path, &reason))
                }
            };
        }
        let uuid = identity::log_uuid(place.namespace, place.volume);
        let superblock = match filesystem::superblock(&node) {
            Ok(Some(superblock)) if superblock.complete && superblock.uuid == uuid => superblock,
            Ok(_) => self.prepare_log(place, lock, &node, create)?,
            Err(error) if error.kind() == ErrorKind::NotFound => self.prepare_log(place, lock, &node, create)?,
            Err(error) => return Err(io("read", &node)(error)),
        };
        if superblock.uuid != uuid {
            return Err(taken(place, &node, "a file system that was not made for it"));
        }
        fs::create_dir_all(&place.path).map_err(io("make", &place.path))?;
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        mounts::mount_device(&node, &place.path, superblock.fs.as_str(), flags, "prjquota").map_err(|source| {
            LogError::Mount {
                vg: place.vg.clone(),
                lv: place.lv.clone(),
                path: place.path.display().to_string(),
                source,
            }
        })?;
        // Whoever was using it when the node went down could not say when.
        touch_records(&place.path)?;
        Ok(node)
    }

    /// The slow road: make, activate, format, as needed.
    fn prepare_log(
        &self,
        place: &Place<'_>,
        volume_lock: &Lock,
        node: &Path,
        create: Option<(u64, FsType)>,
    ) -> Result<filesystem::Superblock, LogError> {
        let owner = Owner::Log { namespace: place.namespace.clone(), volume: place.volume.clone() };
        let mut lock = Lock::volume_group(place.vg, PATIENCE)?;
        let new = match self.volumes()?.into_iter().find(|lv| lv.name == place.lv) {
            Some(found) if found.vg != *place.vg => {
                return Err(taken(place, &place.path, &format!("its own earlier volume in volume group {}", found.vg)));
            }
            Some(found) if found.owner != owner => return Err(taken(place, node, "the volume of another owner")),
            Some(found) => {
                if !found.active || !node.exists() {
                    self.activate(&mut lock, place.vg, &place.lv)?;
                }
                found.new
            }
            None => match create {
                Some((size, _)) => {
                    self.create_log(&mut lock, place.vg, &place.lv, size, &owner)?;
                    true
                }
                None => return Err(io("find", node)(Error::from(ErrorKind::NotFound))),
            },
        };
        drop(lock);
        let uuid = identity::log_uuid(place.namespace, place.volume);
        let found = filesystem::superblock(node).map_err(io("read", node))?;
        if let Some(superblock) = found.filter(|superblock| superblock.complete && superblock.uuid == uuid) {
            if new {
                self.no_longer_new(place.vg, &place.lv)?;
            }
            return Ok(superblock);
        }
        // Only what has never been in use is formatted, and only for a pod:
        // looking at a volume does not.
        let Some((_, fs)) = create.filter(|_| new) else {
            return match found {
                Some(superblock) if superblock.complete => Ok(superblock),
                _ => Err(LogError::NotFormatted { vg: place.vg.clone(), lv: place.lv.clone(), new }),
            };
        };
        // An lvcreate that was cut off may have left a former owner's signatures.
        self.wipe(volume_lock, node)?;
        filesystem::prove_blank(&self.runner, node)?;
        filesystem::make(&self.runner, volume_lock.fd(), node, fs, uuid, true, false)?;
        self.no_longer_new(place.vg, &place.lv)?;
        Ok(filesystem::Superblock { fs, uuid, complete: true })
    }

    /// Mounts every log volume of this node that is not mounted, so that
    /// shippers find it again after a reboot. Gives what could not be mounted.
    pub fn mount_logs(&self, volumes: &[LogicalVolume]) -> Vec<LogError> {
        let mount = |lv: &LogicalVolume| -> Option<Result<(), LogError>> {
            Some(self.mount_log(lv)?.and_then(|_| {
                // Formatted, and cut off before that was noted.
                if lv.new {
                    self.no_longer_new(&lv.vg, &lv.name)?
                }
                Ok(())
            }))
        };
        volumes.iter().filter_map(|lv| mount(lv)?.err()).collect()
    }

    /// None: not a log volume.
    pub(super) fn mount_log(&self, lv: &LogicalVolume) -> Option<Result<PathBuf, LogError>> {
        let Owner::Log { namespace, volume } = &lv.owner else { return None };
        let place = self.place(&lv.vg, namespace, volume);
        Some(
            Lock::volume(&place.lv, PATIENCE)
                .map_err(LogError::from)
                .and_then(|lock| self.ensure_mounted(&place, &lock, None)),
        )
    }
}
