//! Log volumes: one logical volume shared by the pods of a namespace on a node,
//! a directory with a quota of its own for each pod.
//!
//! The volume is mounted at `<log root>/<namespace>/<volume>` and stays there
//! after its pods are gone, so that log shippers can finish. What is known of a
//! pod's directory (UID, retention, last use) is kept in an extended attribute
//! of the directory itself: it is made with it, goes with it, needs no file of
//! its own, and pods cannot write it (`trusted.*`, xattr(7)).

use crate::command::CommandError;
use crate::filesystem::{self, BlankError, FsType};
use crate::identity::{self, Owner};
use crate::lock::{Lock, LockError};
use crate::mounts::{self, UnmountError};
use crate::names::{LogVolumeName, LvName, Namespace, PodName, PodUid, VgName};
use crate::quota;
use crate::report::{LogicalVolume, ReportError};
use crate::size::human;
use crate::volume::{CreateError, DeleteError, ExtendError, Lvm, PATIENCE, device};
use nix::fcntl::{OFlag, openat, renameat};
use nix::mount::MsFlags;
use nix::sys::stat::{Mode, fchmod, mkdirat};
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Directory for what is not a pod's: half-made and half-removed directories.
/// No pod can have this name.
const PRIVATE: &str = ".lvprov";
/// Attribute of a pod's directory: a [`Record`] as JSON.
const RECORD: &str = "trusted.lvprov.record";
/// Attribute of the volume's root: the next free project id.
const NEXT_PROJECT: &str = "trusted.lvprov.next-project";
/// Project ids begin here; smaller ones are often somebody's by hand.
const FIRST_PROJECT: u32 = 1000;

/// A pod's directory of a log volume, to be mounted for it.
#[derive(Debug, Clone)]
pub struct PublishLog {
    /// Volume group, where a new log volume is made.
    pub vg: VgName,
    /// Namespace of the pod.
    pub namespace: Namespace,
    /// Name of the log volume in that namespace.
    pub volume: LogVolumeName,
    /// Bytes that the volume must have at least.
    pub size: u64,
    /// Hard limit of the pod's directory in bytes.
    pub quota: u64,
    /// File system of a new volume.
    pub fs: FsType,
    /// Name of the pod, and of its directory.
    pub pod: PodName,
    /// UID of the pod.
    pub pod_uid: PodUid,
    /// How long the directory is kept after its last use.
    pub retention: Duration,
    /// Whether the pod may only read.
    pub read_only: bool,
    /// Where to mount it.
    pub target: PathBuf,
}

/// What is written on a pod's directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// UID of the pod that used it last.
    pub pod_uid: String,
    /// Seconds that it is kept after its last use.
    pub retention: u64,
    /// When it was mounted or unmounted last, in seconds since 1970.
    pub last_used: i64,
}

/// A pod's directory on a log volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directory {
    /// Its name, which is its pod's.
    pub name: String,
    /// Its path on the node.
    pub path: PathBuf,
    /// What is known of it. None: unreadable.
    pub record: Option<Record>,
    /// Bytes in use.
    pub used: u64,
    /// Its hard limit in bytes.
    pub quota: u64,
    /// Whether it is mounted for a pod.
    pub mounted: bool,
}

/// A log volume and its directories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogVolume {
    /// Its logical volume.
    pub lv: LogicalVolume,
    /// Namespace.
    pub namespace: Namespace,
    /// Name in that namespace.
    pub volume: LogVolumeName,
    /// Where it is, or would be, mounted.
    pub path: PathBuf,
    /// Its directories. None: it cannot be mounted, so nobody knows.
    pub directories: Option<Vec<Directory>>,
}

/// A log volume could not be mounted for a pod.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The size is below what the file system needs.
    #[error("a log volume of {} is too small for {fs}, which needs at least {}", human(*.asked), human(.fs.minimum_size()))]
    TooSmall {
        /// Bytes asked for.
        asked: u64,
        /// The file system.
        fs: FsType,
    },
    /// The quota is larger than the volume.
    #[error("quota {} is larger than the log volume, which has {}; ask for a larger size or a smaller quota", human(*.quota), human(*.size))]
    QuotaTooLarge {
        /// Bytes of quota asked for.
        quota: u64,
        /// Bytes of the volume.
        size: u64,
    },
    /// Something that is not the volume is in its place.
    #[error("{path} is taken by something that is not log volume {vg}/{lv}: {reason}")]
    Taken {
        /// The path.
        path: String,
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
        /// What is there.
        reason: String,
    },
    /// The kernel refused the mount.
    #[error("cannot mount log volume {vg}/{lv} at {path}: {source}")]
    Mount {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
        /// The path.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A path cannot be used.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The path.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The logical volume could not be made.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The logical volume could not be extended.
    #[error(transparent)]
    Extend(#[from] ExtendError),
    /// It is not proved to be blank.
    #[error(transparent)]
    NotBlank(#[from] BlankError),
    /// The lock was not free in time.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// LVM could not be asked.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// A tool failed.
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// A directory or volume could not be collected.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// It is in use again, or no longer what it was.
    #[error("{what} is left alone: {reason}")]
    Changed {
        /// The directory or volume.
        what: String,
        /// What has changed.
        reason: &'static str,
    },
    /// It could not be unmounted.
    #[error(transparent)]
    Unmount(#[from] UnmountError),
    /// Its logical volume could not be removed.
    #[error(transparent)]
    Delete(#[from] DeleteError),
    /// It could not be mounted or looked at.
    #[error(transparent)]
    Log(#[from] LogError),
}

impl From<LockError> for CollectError {
    fn from(error: LockError) -> Self {
        Self::Log(error.into())
    }
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LogError {
    let path = path.display().to_string();
    move |source| LogError::Io { what, path, source }
}

fn errno(what: &'static str, path: &Path) -> impl FnOnce(nix::Error) -> LogError {
    let at = io(what, path);
    move |error| at(error.into())
}

/// One log volume, by its names: where it is and how to recognise it.
struct Place<'a> {
    vg: &'a VgName,
    lv: LvName,
    namespace: &'a Namespace,
    volume: &'a LogVolumeName,
    path: PathBuf,
}

impl Lvm {
    fn place<'a>(&self, vg: &'a VgName, namespace: &'a Namespace, volume: &'a LogVolumeName) -> Place<'a> {
        Place { vg, lv: LvName::for_log(namespace, volume), namespace, volume, path: self.log_path(namespace, volume) }
    }

    /// Where a log volume is mounted.
    pub fn log_path(&self, namespace: &Namespace, volume: &LogVolumeName) -> PathBuf {
        self.config.log_root.join(namespace.as_str()).join(volume.as_str())
    }

    /// Mounts a pod's directory of a log volume, making what is not there yet.
    /// Where the volume is mounted already, no child process is started.
    pub fn publish_log(&self, request: &PublishLog) -> Result<(), LogError> {
        if request.size < request.fs.minimum_size() {
            return Err(LogError::TooSmall { asked: request.size, fs: request.fs });
        }
        let place = self.place(&request.vg, &request.namespace, &request.volume);
        let lock = Lock::volume(&place.lv, PATIENCE)?;
        let node = self.ensure_mounted(&place, &lock, Some((request.size, request.fs)))?;
        let has = mounts::device_size(&node).map_err(io("read the size of", &node))?;
        if has < request.size {
            self.extend(&request.vg, &place.lv, request.size)?;
            let fs = mounts::at(&place.path).map_err(io("look at", &place.path))?.map(|mount| mount.fs_type);
            let fs = fs.and_then(|fs| fs.parse().ok()).unwrap_or(request.fs);
            filesystem::grow(&self.runner, fs, &node, &place.path)?;
        }
        let size = has.max(request.size);
        if request.quota > size {
            return Err(LogError::QuotaTooLarge { quota: request.quota, size });
        }

        let root = open_directory(&place.path)?;
        let path = place.path.join(request.pod.as_str());
        let name = OsStr::new(request.pod.as_str());
        let directory = match open_beneath(&root, name) {
            Ok(directory) => directory,
            Err(nix::Error::ENOENT) => make_directory(&root, &place.path, name)?,
            Err(error) => return Err(errno("open", &path)(error)),
        };
        let project = quota::project(&directory).map_err(io("read the quota project of", &path))?;
        quota::set_limit(&node, project, request.quota).map_err(io("set the quota of", &path))?;
        let record =
            Record { pod_uid: request.pod_uid.to_string(), retention: request.retention.as_secs(), last_used: now() };
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

    /// Notes on a pod's directory that it has been unmounted: its retention
    /// begins. `gone` is what [`mounts::unmount`] gave. Nothing to note is no error.
    pub fn note_unmounted(&self, gone: &mounts::Mount) -> io::Result<()> {
        let Ok(name) = gone.root.strip_prefix("/") else { return Ok(()) };
        if name.as_os_str().is_empty() || name.components().count() != 1 {
            return Ok(());
        }
        let base = mounts::all()?.into_iter().find(|m| {
            m.device == gone.device && m.root == Path::new("/") && m.target.starts_with(&self.config.log_root)
        });
        let Some(base) = base else { return Ok(()) };
        let root = File::open(&base.target)?;
        let directory = open_beneath(&root, name.as_os_str())?;
        if let Some(mut record) = read_record(&directory)? {
            record.last_used = now();
            write_record(&directory, &record)?;
        }
        Ok(())
    }

    /// Mounts the log volume at its path, if it is not, and gives its device.
    /// `create`: size and file system of one that is not there yet.
    fn ensure_mounted(
        &self,
        place: &Place<'_>,
        lock: &Lock,
        create: Option<(u64, FsType)>,
    ) -> Result<PathBuf, LogError> {
        let node = device(place.vg, &place.lv);
        if let Some(there) = mounts::at(&place.path).map_err(io("look at", &place.path))? {
            return match there.logical_volume() {
                Some((vg, lv)) if lv == place.lv => Ok(device(&vg, &lv)),
                other => {
                    let reason = other.map_or("another mount".to_owned(), |(vg, lv)| format!("volume {vg}/{lv}"));
                    Err(taken(place, &place.path, &reason))
                }
            };
        }
        let uuid = identity::log_uuid(place.namespace, place.volume);
        let superblock = match filesystem::superblock(&node) {
            Ok(Some(superblock)) if superblock.complete => superblock,
            Ok(_) => self.prepare_log(place, lock, &node, create)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.prepare_log(place, lock, &node, create)?,
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
        // All groups: an unknown one is told apart from a missing volume later, by lvcreate.
        match self.volumes()?.into_iter().find(|lv| lv.name == place.lv) {
            Some(found) if found.vg != *place.vg => {
                return Err(taken(place, &place.path, &format!("its own earlier volume in volume group {}", found.vg)));
            }
            Some(found) if found.owner != owner => return Err(taken(place, node, "the volume of another owner")),
            Some(found) => {
                if !found.active || !node.exists() {
                    self.activate(&mut lock, place.vg, &place.lv)?;
                }
            }
            None => match create {
                Some((size, _)) => self.create_log(&mut lock, place.vg, &place.lv, size, &owner)?,
                None => {
                    let gone = io::Error::from(io::ErrorKind::NotFound);
                    return Err(io("find", node)(gone));
                }
            },
        }
        drop(lock);
        let uuid = identity::log_uuid(place.namespace, place.volume);
        match filesystem::superblock(node).map_err(io("read", node))? {
            Some(superblock) if superblock.complete => Ok(superblock),
            unfinished => {
                let again = unfinished.is_some_and(|superblock| superblock.uuid == uuid);
                if !again {
                    filesystem::prove_blank(&self.runner, node)?;
                }
                let fs = create.map(|(_, fs)| fs).unwrap_or_default();
                filesystem::make(&self.runner, volume_lock.fd(), node, fs, uuid, true, again)?;
                Ok(filesystem::Superblock { fs, uuid, complete: true })
            }
        }
    }

    /// Mounts every log volume of this node that is not mounted, so that
    /// shippers find it again after a reboot. Gives what could not be mounted.
    pub fn mount_logs(&self, volumes: &[LogicalVolume]) -> Vec<LogError> {
        volumes.iter().filter_map(|lv| self.mount_log(lv)?.err()).collect()
    }

    /// None: not a log volume.
    fn mount_log(&self, lv: &LogicalVolume) -> Option<Result<PathBuf, LogError>> {
        let Owner::Log { namespace, volume } = &lv.owner else { return None };
        let place = self.place(&lv.vg, namespace, volume);
        Some(
            Lock::volume(&place.lv, PATIENCE)
                .map_err(LogError::from)
                .and_then(|lock| self.ensure_mounted(&place, &lock, None)),
        )
    }

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

    fn directories(&self, path: &Path, node: &Path, mounts: &[mounts::Mount]) -> Result<Vec<Directory>, LogError> {
        let number = mounts::file_system_of(path).map_err(io("look at", path))?;
        let root = open_directory(path)?;
        let mut directories = Vec::new();
        for name in directory_names(path)? {
            let below = path.join(&name);
            let Ok(directory) = open_beneath(&root, OsStr::new(&name)) else { continue };
            let project = quota::project(&directory).map_err(io("read the quota project of", &below))?;
            let usage = quota::usage(node, project).map_err(io("read the quota of", &below))?;
            directories.push(Directory {
                mounted: is_bound(mounts, number, &name),
                record: read_record(&directory).ok().flatten(),
                used: usage.used,
                quota: usage.limit,
                path: below,
                name,
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
        name: &PodName,
        pod_uid: Option<&str>,
    ) -> Result<(), CollectError> {
        let place = self.place(vg, namespace, volume);
        let path = place.path.join(name.as_str());
        let changed = |reason| CollectError::Changed { what: path.display().to_string(), reason };
        let lock = Lock::volume(&place.lv, PATIENCE)?;
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
        // Out of the way in one step, so that what is half removed never looks like a pod's.
        let private = private_directory(&root, &place.path)?;
        let trash = format!("gone-{name}");
        clear(&place.path.join(PRIVATE).join(&trash))?;
        renameat(&root, name.as_str(), &private, trash.as_str()).map_err(errno("move away", &path))?;
        clear(&place.path.join(PRIVATE).join(&trash))?;
        Ok(())
    }

    /// Removes a log volume that has no directory left.
    pub fn collect_log(&self, vg: &VgName, namespace: &Namespace, volume: &LogVolumeName) -> Result<(), CollectError> {
        let place = self.place(vg, namespace, volume);
        let changed = |reason| CollectError::Changed { what: format!("{vg}/{}", place.lv), reason };
        let lock = Lock::volume(&place.lv, PATIENCE)?;
        match self.ensure_mounted(&place, &lock, None) {
            Ok(_) => {
                if !directory_names(&place.path)?.is_empty() {
                    return Err(changed("it has directories again"));
                }
                mounts::unmount(&place.path)?;
            }
            Err(LogError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let owner = Owner::Log { namespace: namespace.clone(), volume: volume.clone() };
        self.delete_if(vg, &place.lv, |found| found.owner == owner)?;
        // The empty mount point, and the namespace's directory if this was its last volume.
        let _ = fs::remove_dir(&place.path);
        if let Some(parent) = place.path.parent() {
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }
}

fn taken(place: &Place<'_>, path: &Path, reason: &str) -> LogError {
    LogError::Taken {
        path: path.display().to_string(),
        vg: place.vg.clone(),
        lv: place.lv.clone(),
        reason: reason.to_owned(),
    }
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX))
}

fn open_directory(path: &Path) -> Result<File, LogError> {
    File::open(path).map_err(io("open", path))
}

/// Opens a directory that lies directly in `root`, and follows no link to it.
/// A name of one component with O_NOFOLLOW cannot leave `root`; openat2(2) with
/// RESOLVE_BENEATH says the same of kernels that have it.
fn open_beneath(root: impl AsFd, name: &OsStr) -> nix::Result<OwnedFd> {
    use nix::fcntl::{OpenHow, ResolveFlag, openat2};
    if name.is_empty() || name == "." || name == ".." || name.as_bytes().contains(&b'/') {
        return Err(nix::Error::EINVAL);
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let resolve = ResolveFlag::RESOLVE_BENEATH
        | ResolveFlag::RESOLVE_NO_SYMLINKS
        | ResolveFlag::RESOLVE_NO_MAGICLINKS
        | ResolveFlag::RESOLVE_NO_XDEV;
    match openat2(&root, name, OpenHow::new().flags(flags).resolve(resolve)) {
        Err(nix::Error::ENOSYS) => openat(&root, name, flags, Mode::empty()),
        other => other,
    }
}

/// The directory for what is not a pod's.
fn private_directory(root: &File, path: &Path) -> Result<OwnedFd, LogError> {
    let private = path.join(PRIVATE);
    match mkdirat(root, PRIVATE, Mode::S_IRWXU) {
        Ok(()) | Err(nix::Error::EEXIST) => {}
        Err(error) => return Err(errno("make", &private)(error)),
    }
    open_beneath(root, OsStr::new(PRIVATE)).map_err(errno("open", &private))
}

/// A new pod's directory: made aside, given its project, then moved into
/// place, so that none is ever there without a quota.
fn make_directory(root: &File, path: &Path, name: &OsStr) -> Result<OwnedFd, LogError> {
    let private = private_directory(root, path)?;
    let aside = path.join(PRIVATE).join("new");
    clear(&aside)?;
    // As an emptyDir: the pod may run as any user, and only the pod gets here.
    mkdirat(&private, "new", Mode::S_IRWXU).map_err(errno("make", &aside))?;
    let directory = open_beneath(&private, OsStr::new("new")).map_err(errno("open", &aside))?;
    fchmod(&directory, Mode::S_IRWXU | Mode::S_IRWXG | Mode::S_IRWXO).map_err(errno("set the mode of", &aside))?;
    let project = next_project(root).map_err(io("number the directories of", path))?;
    quota::set_project(&directory, project).map_err(io("set the quota project of", &aside))?;
    renameat(&private, "new", root, name).map_err(errno("move into place", &aside))?;
    Ok(directory)
}

fn next_project(root: &File) -> io::Result<u32> {
    let project = match xattr::get(root, NEXT_PROJECT)? {
        Some(text) => String::from_utf8_lossy(&text)
            .parse()
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the next project id is no number"))?,
        None => FIRST_PROJECT,
    };
    let next = project.checked_add(1).ok_or_else(|| io::Error::other("all project ids are used up"))?;
    xattr::set(root, NEXT_PROJECT, next.to_string().as_bytes())?;
    Ok(project)
}

/// Removes a tree of ours, if it is there. No link in it is followed
/// (std::fs::remove_dir_all works on descriptors).
fn clear(path: &Path) -> Result<(), LogError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Names of the directories in a log volume that are pods'.
fn directory_names(path: &Path) -> Result<Vec<String>, LogError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path).map_err(io("list", path))? {
        let entry = entry.map_err(io("list", path))?;
        let name = entry.file_name();
        let is_directory = entry.file_type().map_err(io("list", path))?.is_dir();
        // ext4 has a lost+found; a pod's name holds no +.
        if let Some(name) = name.to_str().filter(|name| is_directory && PodName::parse(name).is_ok()) {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn is_bound(mounts: &[mounts::Mount], device: (u32, u32), name: &str) -> bool {
    let root = Path::new("/").join(name);
    mounts.iter().any(|mount| mount.device == device && mount.root.starts_with(&root))
}

fn read_record(directory: impl AsFd) -> io::Result<Option<Record>> {
    Ok(xattr::get(directory, RECORD)?.and_then(|text| serde_json::from_slice(&text).ok()))
}

fn write_record(directory: impl AsFd, record: &Record) -> io::Result<()> {
    xattr::set(directory, RECORD, &serde_json::to_vec(record)?)
}

/// Extended attributes of an open directory (xattr(7)).
mod xattr {
    use std::ffi::CString;
    use std::io;
    use std::os::fd::{AsFd, AsRawFd};

    /// The largest value we write.
    const MOST: usize = 1024;

    #[allow(unsafe_code)]
    pub fn get(file: impl AsFd, name: &str) -> io::Result<Option<Vec<u8>>> {
        let name = CString::new(name)?;
        let mut value = vec![0; MOST];
        // SAFETY: the name ends with NUL, and the buffer has the length that is told.
        let length =
            unsafe { libc::fgetxattr(file.as_fd().as_raw_fd(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        match usize::try_from(length) {
            Ok(length) => {
                value.truncate(length);
                Ok(Some(value))
            }
            Err(_) => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENODATA) => Ok(None),
                error => Err(error),
            },
        }
    }

    #[allow(unsafe_code)]
    pub fn set(file: impl AsFd, name: &str, value: &[u8]) -> io::Result<()> {
        let name = CString::new(name)?;
        // SAFETY: the name ends with NUL, and the value has the length that is told.
        let status =
            unsafe { libc::fsetxattr(file.as_fd().as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
        if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_link_in_place_of_a_pods_directory_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let root = File::open(directory.path()).unwrap();
        symlink("/etc", directory.path().join("web-a")).unwrap();
        assert!(open_beneath(&root, OsStr::new("web-a")).is_err());
        for bad in ["..", "/etc", "a/b", ".", ""] {
            assert!(open_beneath(&root, OsStr::new(bad)).is_err(), "{bad:?}");
        }
        fs::create_dir(directory.path().join("web-b")).unwrap();
        assert!(open_beneath(&root, OsStr::new("web-b")).is_ok());
    }

    #[test]
    fn only_directories_that_a_pod_could_have_are_listed() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["web-b", "web-a", "lost+found", PRIVATE] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        fs::write(directory.path().join("file"), "").unwrap();
        symlink("/etc", directory.path().join("link")).unwrap();
        assert_eq!(directory_names(directory.path()).unwrap(), ["web-a", "web-b"]);
    }

    #[test]
    fn project_ids_are_given_once() {
        let directory = tempfile::tempdir().unwrap();
        let root = File::open(directory.path()).unwrap();
        assert_eq!(next_project(&root).unwrap(), FIRST_PROJECT);
        assert_eq!(next_project(&root).unwrap(), FIRST_PROJECT + 1);
    }

    #[test]
    fn a_record_stays_on_its_directory() {
        let directory = tempfile::tempdir().unwrap();
        let root = File::open(directory.path()).unwrap();
        assert_eq!(read_record(&root).unwrap(), None);
        let record = Record { pod_uid: "1111".to_owned(), retention: 60, last_used: 7 };
        write_record(&root, &record).unwrap();
        assert_eq!(read_record(&root).unwrap(), Some(record));
    }

    #[test]
    fn clearing_follows_no_link() {
        let directory = tempfile::tempdir().unwrap();
        let keep = directory.path().join("keep");
        fs::create_dir(&keep).unwrap();
        fs::write(keep.join("file"), "").unwrap();
        let tree = directory.path().join("tree");
        fs::create_dir(&tree).unwrap();
        symlink(&keep, tree.join("link")).unwrap();
        clear(&tree).unwrap();
        clear(&tree).unwrap();
        assert!(keep.join("file").exists());
    }
}
