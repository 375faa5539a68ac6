//! Log volumes: one logical volume shared by the pods of a namespace on a node,
//! a directory with a quota of its own for each pod.
//!
//! The volume is mounted at `<log root>/<namespace>/<volume>` and stays there
//! after its pods are gone, so that log shippers can finish. What is known of a
//! pod's directory (UID, retention, last use) is kept in an extended attribute
//! of the directory itself: it is made with it, goes with it, needs no file of
//! its own, and pods cannot write it (`trusted.*`, xattr(7)).

mod bounds;
mod collect;
mod directory;
pub mod index;
mod mounted;
mod publish;
mod refresh;
pub mod template;

use crate::Lvm;
use crate::command::CommandError;
use crate::config::CONFIG_PATH;
use crate::duration::show_duration;
use crate::filesystem::{BlankError, FsType, FsTypeError};
use crate::lock::LockError;
use crate::mounts::{BindOptions, UnmountError};
use crate::names::{DirectoryName, LogVolumeName, LvName, Namespace, PodName, PodUid, VgName};
use crate::quota::Usage;
use crate::report::{LogicalVolume, ReportError};
use crate::size::human;
use crate::volume::{CreateError, DeleteError, ExtendError, LogNewError};
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use mounted::{MountedLog, Space, names_at};
pub use refresh::PodOfMount;

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
    /// Hard limit of the number of files in it.
    pub files: u64,
    /// File system of a new volume.
    pub fs: FsType,
    /// Name of the pod's directory.
    pub directory: DirectoryName,
    /// Name of the pod.
    pub pod: PodName,
    /// UID of the pod.
    pub pod_uid: PodUid,
    /// Its containers, as far as they are known, for the index.
    pub containers: Vec<String>,
    /// How long the directory is kept after its last use.
    pub retention: Duration,
    /// Owner of the directory. Where it is not said, a new one is root's, and
    /// one that is there is left as it is.
    pub owner: Ownership,
    /// Mode of the directory. Where it is not said, a new one is open to all
    /// (0777; only the pod gets there), and one that is there left as it is.
    pub mode: Option<u32>,
    /// How it is mounted.
    pub mount: BindOptions,
    /// Where to mount it.
    pub target: PathBuf,
}

/// Who owns a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ownership {
    /// User id.
    pub user: Option<u32>,
    /// Group id.
    pub group: Option<u32>,
}

/// What is written on a pod's directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// UID of the pod that used it last.
    pub pod_uid: String,
    /// Name of that pod. Empty where it is not known: then it is the directory's.
    #[serde(default)]
    pub pod: String,
    /// Seconds that it is kept after its last use.
    pub retention: u64,
    /// When it was mounted or unmounted last, in seconds since 1970.
    pub last_used: i64,
    /// Its quota project. The directory's own could be changed by its owner.
    #[serde(default)]
    pub project: u32,
}

impl Record {
    /// When it may be removed, if it is not used again: seconds since 1970.
    pub fn keep_until(&self) -> i64 {
        self.last_used.saturating_add(i64::try_from(self.retention).unwrap_or(i64::MAX))
    }
}

/// A pod's directory on a log volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directory {
    /// Its name.
    pub name: String,
    /// Its path on the node.
    pub path: PathBuf,
    /// What is known of it. None: unreadable.
    pub record: Option<Record>,
    /// What is in it, and may be.
    pub usage: Usage,
    /// Whether it is mounted for a pod.
    pub mounted: bool,
}

impl Directory {
    /// Name of its pod: where it is not recorded, the directory is named for it.
    pub fn pod(&self) -> &str {
        let recorded = self.record.as_ref().map(|record| record.pod.as_str());
        recorded.filter(|pod| !pod.is_empty()).unwrap_or(&self.name)
    }
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
    /// The file system has no project quotas.
    #[error(transparent)]
    FsType(#[from] FsTypeError),
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
    /// The size is past the node's bound.
    #[error("a log volume may have {} on this node (logVolumes.maxSize in {CONFIG_PATH}); {} was asked for", human(*.bound), human(*.asked))]
    SizeBound {
        /// Bytes asked for.
        asked: u64,
        /// The bound in bytes.
        bound: u64,
    },
    /// The namespace's volumes together are past the node's bound.
    #[error("the log volumes of namespace {namespace} may have {} together on this node (logVolumes.maxPerNamespace in {CONFIG_PATH}) and have {}: {} are left, and {} more were asked for", human(*.bound), human(*.used), human(.bound.saturating_sub(*.used)), human(*.more))]
    NamespaceBound {
        /// The namespace.
        namespace: Namespace,
        /// Bytes that its volumes have.
        used: u64,
        /// Bytes that were asked for beyond that.
        more: u64,
        /// The bound in bytes.
        bound: u64,
    },
    /// The retention is past the node's bound.
    #[error("logs may be kept for {} on this node (logVolumes.maxRetention in {CONFIG_PATH}); {} was asked for", show_duration(*.bound), show_duration(*.asked))]
    RetentionBound {
        /// Time asked for.
        asked: Duration,
        /// The bound.
        bound: Duration,
    },
    /// The directory is that of a pod with another name.
    #[error(
        "directory {path} belongs to pod {owner}; choose another subPath, or wait until its retention has ended and it is collected (lvprov gc)"
    )]
    OtherPods {
        /// The directory.
        path: String,
        /// Name of its pod.
        owner: String,
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
    /// It has no file system of ours.
    #[error("log volume {vg}/{lv} has no file system{}", if *.new { " yet: the next pod that uses it makes it" } else { ", and has had one: its superblock may be damaged. Nothing is formatted; look at it by hand (xfs_repair, e2fsck)" })]
    NotFormatted {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
        /// Whether it has never been in use.
        new: bool,
    },
    /// Pods may not carve from this group.
    #[error(
        "volume group {vg} is not open to log volumes on this node; open are: {open} (volumeGroup and moreVolumeGroups in {CONFIG_PATH})"
    )]
    GroupNotOpen {
        /// The group asked for.
        vg: VgName,
        /// Those that are open.
        open: String,
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
    /// The mark of a new volume could not be taken off.
    #[error(transparent)]
    New(#[from] LogNewError),
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
}

fn taken(place: &Place<'_>, path: &Path, reason: &str) -> LogError {
    LogError::Taken {
        path: path.display().to_string(),
        vg: place.vg.clone(),
        lv: place.lv.clone(),
        reason: reason.to_owned(),
    }
}
