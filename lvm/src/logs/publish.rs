//! Mounting: a pod's directory, and the volume that it lies on.

use super::directory::{
    FIRST_PROJECT, is_bound, make_directory, next_project, open_beneath, open_directory, read_record, records,
    touch_records, write_record,
};
use super::index::Index;
use super::{LogError, Ownership, Place, PublishLog, Record, errno, io, taken};
use crate::clock::now;
use crate::fault;
use crate::filesystem::{self, FsType, MkfsOptions, NewFs};
use crate::identity::{self, Owner};
use crate::lock::Lock;
use crate::names::PodUid;
use crate::report::LogicalVolume;
use crate::volume::device as device_of;
use crate::{Lvm, device, mounts, quota, xattr};
use nix::mount::MsFlags;
use nix::sys::stat::{Mode, fchmod};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Error, ErrorKind, Result as IoResult};
use std::os::fd::OwnedFd;
use std::os::unix::fs::fchown;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Attribute of the volume's root once the mark of a new volume is known to be off.
const SETTLED: &str = "trusted.lvprov.settled";
/// Attribute of the volume's root while its file system is being grown.
const GROWING: &str = "trusted.lvprov.growing";
/// How long an unmount waits to note the end of a directory's use: not long,
/// since kubelet waits too, and all that is lost is a little retention.
const NOTE_PATIENCE: Duration = Duration::from_secs(2);

impl Lvm {
    /// Mounts a pod's directory of a log volume, making what is not there yet.
    /// Where the volume is mounted already, no child process is started.
    pub fn publish_log(&self, request: &PublishLog) -> Result<(), LogError> {
        self.check_request(request)?;
        let place = self.place(&request.vg, &request.namespace, &request.volume);
        let lock = Lock::volume(&place.lv, self.patience())?;
        let node = self.ensure_mounted(&place, &lock, Some((request.size, request.fs)))?;
        let root = open_directory(&place.path)?;
        self.settle(&place, &root)?;
        let size = self.grow_log(request, &place, &node, &root)?;
        if request.quota > size {
            return Err(LogError::QuotaTooLarge { quota: request.quota, size });
        }
        let path = place.path.join(request.directory.as_str());
        fault::point("log-directory-before");
        let directory = self.own_directory(request, &place, &node, &root, &path)?;
        fault::point("log-directory-after");

        match mounts::at(&request.target).map_err(io("look at", &request.target))? {
            Some(there) => {
                let ours = there.root == Path::new("/").join(request.directory.as_str())
                    && mounts::file_system_of(&place.path).ok() == Some(there.device);
                if !ours {
                    return Err(taken(&place, &request.target, "another mount"));
                }
            }
            None => {
                fs::create_dir_all(&request.target).map_err(io("make", &request.target))?;
                mounts::bind(&directory, &request.target, request.mount)
                    .map_err(io("mount the pod's directory at", &request.target))?;
            }
        }
        fault::point("log-bind-after");
        let mut index = load_index(&place);
        let uid = request.pod_uid.as_str();
        index.begin(&request.directory, &path, request.pod.as_str(), uid, request.containers.clone());
        // A service to shippers; the pod has its directory.
        let _ = index.store(&place.path);
        Ok(())
    }

    /// Takes the mark of a new volume off where whoever formatted it died
    /// before that: while it is on, a volume that has lost its superblock would
    /// be formatted. Asks LVM once in a volume's life.
    fn settle(&self, place: &Place<'_>, root: &File) -> Result<(), LogError> {
        if xattr::get(root, SETTLED).map_err(io("look at", &place.path))?.is_some() {
            return Ok(());
        }
        if self.find(place.vg, &place.lv)?.is_some_and(|found| found.new) {
            self.no_longer_new(place.vg, &place.lv)?;
        }
        xattr::set(root, SETTLED, b"1").map_err(io("mark as settled", &place.path))
    }

    /// Grows a volume that has less than is asked for, and finishes a growth
    /// that was cut off. Gives what it has then, in bytes.
    fn grow_log(&self, request: &PublishLog, place: &Place<'_>, node: &Path, root: &File) -> Result<u64, LogError> {
        let has = mounts::device_size(node).map_err(io("read the size of", node))?;
        let growing = xattr::get(root, GROWING).map_err(io("look at", &place.path))?.is_some();
        if has >= request.size && !growing {
            return Ok(has);
        }
        let bound = self.lock_namespace(place.namespace)?;
        if has < request.size {
            let volumes = if bound.is_some() { self.volumes()? } else { Vec::new() };
            self.check_size(place.namespace, has, request.size, &volumes)?;
        }
        // Set before and taken off after, so that a growth that is cut off in between is finished.
        xattr::set(root, GROWING, b"1").map_err(io("mark as growing", &place.path))?;
        self.extend(&request.vg, &place.lv, request.size)?;
        let fs = mounts::at(&place.path).map_err(io("look at", &place.path))?.map(|mount| mount.fs_type);
        let fs = fs.and_then(|fs| fs.parse().ok()).unwrap_or(request.fs);
        filesystem::grow(&self.runner, fs, node, &place.path)?;
        xattr::remove(root, GROWING).map_err(io("mark as grown", &place.path))?;
        Ok(has.max(request.size))
    }

    /// The pod's directory with its quota, owner and record, made if it is not there.
    fn own_directory(
        &self,
        request: &PublishLog,
        place: &Place<'_>,
        node: &Path,
        root: &File,
        path: &Path,
    ) -> Result<OwnedFd, LogError> {
        let name = OsStr::new(request.directory.as_str());
        let directory = match open_beneath(root, name) {
            Ok(directory) => directory,
            Err(nix::Error::ENOENT) => make_directory(root, &place.path, name)?,
            Err(error) => return Err(errno("open", path)(error)),
        };
        let known = read_record(&directory).map_err(io("read the record of", path))?;
        if let Some(known) = &known {
            let owner = if known.pod.is_empty() { request.directory.as_str() } else { &known.pod };
            if owner != request.pod.as_str() {
                return Err(LogError::OtherPods { path: path.display().to_string(), owner: owner.to_owned() });
            }
        }
        let project = own_project(root, &directory, known.as_ref()).map_err(io("set the quota project of", path))?;
        quota::set_limit(node, project, request.quota, request.files).map_err(io("set the quota of", path))?;
        if request.owner != Ownership::default() {
            fchown(&directory, request.owner.user, request.owner.group).map_err(io("set the owner of", path))?;
        }
        if let Some(mode) = request.mode {
            fchmod(&directory, Mode::from_bits_truncate(mode)).map_err(errno("set the mode of", path))?;
        }
        let record = Record {
            pod_uid: request.pod_uid.to_string(),
            pod: request.pod.to_string(),
            retention: request.retention.as_secs(),
            last_used: now(),
            project,
        };
        write_record(&directory, &record).map_err(io("write the record of", path))?;
        Ok(directory)
    }

    /// Notes that a pod's directory has been unmounted: its retention begins.
    /// `gone` is what [`Lvm::unmount`] gave; `pod_uid`: whose mount it was, where
    /// that is known. Nothing to note is no error.
    pub fn note_unmounted(
        &self,
        gone: &mounts::Mount,
        pod_uid: Option<&PodUid>,
        containers: Vec<String>,
    ) -> IoResult<()> {
        let Ok(name) = gone.root.strip_prefix("/") else { return Ok(()) };
        if name.as_os_str().is_empty() || name.components().count() != 1 {
            return Ok(());
        }
        let base = mounts::all()?.into_iter().find(|m| {
            m.device == gone.device && m.root == Path::new("/") && m.target.starts_with(&self.config.log_root)
        });
        let Some(base) = base else { return Ok(()) };
        let Some((_, lv)) = base.logical_volume() else { return Ok(()) };
        if let Some(node) = base.device_node() {
            // What follows must not wait for a hung disk: the unmount is done.
            device::probe(&self.runner, &node)?;
        }
        // Or a mount under the same name could be noted as the earlier pod's.
        let _lock = Lock::volume(&lv, NOTE_PATIENCE).map_err(Error::other)?;
        let root = File::open(&base.target)?;
        let directory = open_beneath(&root, name.as_os_str())?;
        let name = name.to_string_lossy();
        let mut keep_until = None;
        if !is_bound(&mounts::all()?, gone.device, &name)
            && let Some(mut record) = read_record(&directory)?
        {
            record.last_used = now();
            keep_until = Some(record.keep_until());
            write_record(&directory, &record)?;
        }
        if let Some(mut index) = Index::load(&base.target) {
            index.end(&name, pod_uid.map(PodUid::as_str), containers, keep_until);
            index.store(&base.target).map_err(Error::other)?;
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
        let node = device_of(place.vg, &place.lv);
        if let Some(there) = mounts::at(&place.path).map_err(io("look at", &place.path))? {
            return match there.logical_volume() {
                Some((vg, lv)) if vg == *place.vg && lv == place.lv => {
                    // The first thing that is written would wait for a hung disk.
                    device::probe(&self.runner, &node).map_err(io("use", &node))?;
                    Ok(node)
                }
                other => {
                    let reason = other.map_or("another mount".to_owned(), |(vg, lv)| format!("volume {vg}/{lv}"));
                    Err(taken(place, &place.path, &reason))
                }
            };
        }
        let uuid = identity::log_uuid(place.namespace, place.volume);
        let mut settled = false;
        let mut prepare = || {
            let superblock = self.prepare_log(place, lock, &node, create)?;
            settled = true;
            Ok::<_, LogError>(superblock)
        };
        let superblock = match filesystem::superblock(&self.runner, &node) {
            Ok(Some(superblock)) if superblock.complete && superblock.uuid == uuid => superblock,
            Ok(_) => prepare()?,
            Err(error) if error.kind() == ErrorKind::NotFound => prepare()?,
            Err(error) => return Err(io("read", &node)(error)),
        };
        if superblock.uuid != uuid {
            return Err(taken(place, &node, "a file system that was not made for it"));
        }
        fs::create_dir_all(&place.path).map_err(io("make", &place.path))?;
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        let fs = superblock.fs;
        self.mount_repairing(lock, &node, fs, || {
            mounts::mount_device(&node, &place.path, fs.as_str(), flags, "prjquota").map_err(explain_quota)
        })
        .map_err(|source| LogError::Mount {
            vg: place.vg.clone(),
            lv: place.lv.clone(),
            path: place.path.display().to_string(),
            source,
        })?;
        fault::point("log-mount-after");
        if settled {
            // It has just looked: nobody needs to ask again.
            let _ = xattr::set(open_directory(&place.path)?, SETTLED, b"1");
        }
        // Whoever was using it when the node went down could not say when.
        let records = touch_records(&place.path)?;
        let mut index = load_index(place);
        index.end_all();
        for (name, record) in records {
            index.end(name.as_str(), Some(&record.pod_uid), Vec::new(), Some(record.keep_until()));
        }
        let _ = index.store(&place.path);
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
        let _bound = if create.is_some() { self.lock_namespace(place.namespace)? } else { None };
        let mut lock = self.lock_group(place.vg)?;
        let volumes = self.volumes()?;
        let new = match volumes.iter().find(|lv| lv.name == place.lv) {
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
                    self.check_size(place.namespace, 0, size, &volumes)?;
                    self.create_log(&mut lock, place.vg, &place.lv, size, &owner)?;
                    true
                }
                None => return Err(io("find", node)(Error::from(ErrorKind::NotFound))),
            },
        };
        drop(lock);
        let uuid = identity::log_uuid(place.namespace, place.volume);
        let found = filesystem::superblock(&self.runner, node).map_err(io("read", node))?;
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
        let new = NewFs { fs, uuid, quota: true, again: false, options: &MkfsOptions::default() };
        filesystem::make(&self.runner, volume_lock.fd(), node, &new)?;
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
            Lock::volume(&place.lv, self.patience())
                .map_err(LogError::from)
                .and_then(|lock| self.ensure_mounted(&place, &lock, None)),
        )
    }
}

/// What the kernel says of ext4 where it knows no format of quotas.
fn explain_quota(error: Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ESRCH) => Error::other(format!("{error}: this kernel has no quotas (module quota_v2)")),
        _ => error,
    }
}

/// The quota project of a pod's directory: the one that its record tells, set
/// again in case the pod has changed it, or a new one.
fn own_project(root: &File, directory: &OwnedFd, known: Option<&Record>) -> IoResult<u32> {
    let recorded = known.map(|record| record.project).filter(|project| *project != 0);
    let actual = quota::project(directory)?;
    let project = match recorded {
        Some(project) => project,
        // Made a moment ago, and not recorded yet.
        None if actual >= FIRST_PROJECT && known.is_none() => actual,
        None => next_project(root)?,
    };
    if project != actual {
        quota::set_project(directory, project)?;
    }
    Ok(project)
}

/// The index of a volume that is mounted, made anew from the records of its
/// directories where there is none.
pub(super) fn load_index(place: &Place<'_>) -> Index {
    if let Some(index) = Index::load(&place.path) {
        return index;
    }
    let mut index = Index {
        version: 1,
        namespace: place.namespace.to_string(),
        volume: place.volume.to_string(),
        ..Index::default()
    };
    let (mounts, device) = (mounts::all().unwrap_or_default(), mounts::file_system_of(&place.path).ok());
    for (name, record) in records(&place.path).unwrap_or_default() {
        let mounted = device.is_some_and(|device| is_bound(&mounts, device, name.as_str()));
        index.restore(&name, &place.path.join(name.as_str()), &record, mounted);
    }
    index
}
