//! Data volumes on their node: mounting one for a pod, growing one.

use crate::command::CommandError;
use crate::config::CONFIG_PATH;
use crate::fault;
use crate::filesystem::{self, BlankError, FsType, MkfsOptions, MountOptions, NewFs, Superblock};
use crate::identity::{self, Owner};
use crate::lock::{Lock, LockError};
use crate::mounts::{self, Mount};
use crate::names::{ClaimUid, LvName, Namespace, VgName};
use crate::report::{LogicalVolume, ReportError};
use crate::unfinished;
use crate::volume::{ExtendError, Lvm, device};
use std::io;
use std::path::{Path, PathBuf};

/// A data volume to be mounted for a pod.
#[derive(Debug, Clone)]
pub struct PublishData {
    /// Volume group.
    pub vg: VgName,
    /// Logical volume.
    pub lv: LvName,
    /// The claim that it was made for.
    pub claim_uid: ClaimUid,
    /// Namespace of the pod, as kubelet tells it: the claim's must be the same.
    pub namespace: Namespace,
    /// File system that it should have.
    pub fs: FsType,
    /// How that is made, where there is none yet.
    pub mkfs: MkfsOptions,
    /// Whether the pod may only read.
    pub read_only: bool,
    /// Whether no other pod may have it (ReadWriteOncePod).
    pub alone: bool,
    /// Further options.
    pub options: MountOptions,
    /// Where to mount it.
    pub target: PathBuf,
}

/// A data volume could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum PublishDataError {
    /// The volume is not there.
    #[error(
        "logical volume {vg}/{lv} is not on this node: was the disk replaced, or the volume removed by hand? The data is not here; nothing was made in its place"
    )]
    Missing {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
    },
    /// The volume is not that of the claim, or the claim not of the pod's namespace.
    #[error(
        "logical volume {vg}/{lv} does not belong to claim {claim_uid} of namespace {namespace}; it is not mounted"
    )]
    NotTheClaims {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
        /// The claim named.
        claim_uid: ClaimUid,
        /// The namespace of the pod.
        namespace: Namespace,
    },
    /// Another pod has a volume that is for one alone.
    #[error(
        "logical volume {vg}/{lv} is for one pod alone (ReadWriteOncePod), and mounted at {path}; this pod gets it when that one has ended"
    )]
    NotAlone {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
        /// Where it is mounted.
        path: String,
    },
    /// The mounts cannot be looked at.
    #[error("cannot read /proc/self/mountinfo: {0}")]
    Mounts(io::Error),
    /// It has another file system than the one asked for.
    #[error("logical volume {vg}/{lv} has a file system {found}, and {asked} was asked for; it is left as it is")]
    OtherFileSystem {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
        /// What it has.
        found: FsType,
        /// What it should have.
        asked: FsType,
    },
    /// Something else is mounted at the target already.
    #[error("something else is mounted at {target} already; unmount it first")]
    TargetTaken {
        /// The target.
        target: String,
    },
    /// The kernel refused the mount.
    #[error("cannot mount {vg}/{lv} ({fs}) at {target}: {source}. If the file system is damaged, look at the kernel's log and repair it by hand ({repair}), or let the node do so (repair in {CONFIG_PATH})", repair = .fs.checker())]
    Mount {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
        /// Its file system.
        fs: FsType,
        /// The target.
        target: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The device or the target cannot be used.
    #[error("cannot use {path}: {source}")]
    Io {
        /// The path.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// It was made as a raw device.
    #[error(
        "logical volume {vg}/{lv} is a raw block volume: what is on it is its pods' own, and never mounted as a file system"
    )]
    Block {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
    },
    /// It has no file system, and is not marked as new.
    #[error("logical volume {vg}/{lv} has no file system, and does not bear the mark of a new volume either: its superblock may be damaged. Nothing is formatted; look at it by hand ({repair})", repair = .fs.checker())]
    NotNew {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
        /// The file system that it should have.
        fs: FsType,
    },
    /// It is not proved to be blank.
    #[error(transparent)]
    NotBlank(#[from] BlankError),
    /// The lock was not free in time.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// LVM could not be asked.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// Activating or formatting failed.
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// A data volume could not be grown.
#[derive(Debug, thiserror::Error)]
pub enum ExpandError {
    /// It is not mounted there.
    #[error("logical volume {vg}/{lv} is not mounted at {target}")]
    NotMounted {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
        /// Where it should be.
        target: String,
    },
    /// The logical volume could not be extended.
    #[error(transparent)]
    Extend(#[from] ExtendError),
    /// The file system could not be grown.
    #[error("the logical volume has been extended, its file system not yet: {0}")]
    Grow(CommandError),
    /// The mount cannot be looked at.
    #[error("cannot use {path}: {source}")]
    Io {
        /// The path.
        path: String,
        /// What the system said.
        source: io::Error,
    },
}

/// Where it is noted which devices are volumes that were made for a file system,
/// by their kernel's id, which no other ever has. Emptied by a reboot: then LVM
/// is asked once more.
fn known_at(node: &Path) -> io::Result<PathBuf> {
    Ok(Path::new(crate::lock::DIRECTORY).join("filesystems").join(crate::wipe::dm_uuid(node)?))
}

fn is_known(node: &Path) -> bool {
    known_at(node).is_ok_and(|path| path.exists())
}

/// What cannot be noted is asked again.
pub(crate) fn note_known(node: &Path) {
    let _ = known_at(node).and_then(|path| {
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
        std::fs::write(path, "")
    });
}

/// The device is one no more, or about to be removed.
pub(crate) fn forget_known(node: &Path) {
    let _ = known_at(node).and_then(std::fs::remove_file);
    let _ = unfinished::end(node);
}

impl Lvm {
    /// Notes which of these volumes have file systems, so that their first mounts
    /// need not ask.
    pub fn note_file_systems(&self, volumes: &[LogicalVolume]) {
        for volume in volumes {
            let marks = &volume.marks;
            let for_one = matches!(volume.owner, Owner::Data(_)) && !marks.intent.block && !marks.spare;
            if for_one && !marks.wiping && volume.active {
                note_known(&device(&volume.vg, &volume.name));
            }
        }
    }
}

fn at_path(path: &Path) -> impl FnOnce(io::Error) -> PublishDataError {
    let path = path.display().to_string();
    |source| PublishDataError::Io { path, source }
}

impl Lvm {
    /// Mounts a data volume at its target. A volume that is ready costs one
    /// read of its superblock and one mount(2): no child process, no lvm. Only
    /// where that is not enough is it activated, and formatted if it is blank.
    pub fn publish_data(&self, request: &PublishData) -> Result<(), PublishDataError> {
        let node = device(&request.vg, &request.lv);
        // What is in the trash, or room for a growth, has another name than its claim's.
        if request.lv != LvName::for_claim(&request.claim_uid) {
            return Err(Self::not_the_claims(request));
        }
        if let Some(there) = mounts::at(&request.target).map_err(at_path(&request.target))? {
            return match mounts::device_number(&node) {
                Ok(number) if number == there.device => Ok(()),
                _ => Err(PublishDataError::TargetTaken { target: request.target.display().to_string() }),
            };
        }
        let lock = match request.alone {
            true => Some(self.lock_alone(request)?),
            false => None,
        };
        match filesystem::superblock(&self.runner, &node) {
            // A superblock alone proves nothing: on a raw volume it would be its pods' own making.
            Ok(Some(superblock)) if superblock.complete && is_known(&node) => {
                self.mount_data(request, &node, superblock, lock.as_ref())
            }
            Ok(_) => self.prepare_data(request, &node, lock),
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.prepare_data(request, &node, lock),
            Err(error) => Err(at_path(&node)(error)),
        }
    }

    /// As long as the lock is held, nobody else is given the volume.
    fn lock_alone(&self, request: &PublishData) -> Result<Lock, PublishDataError> {
        let lock = Lock::volume(&request.lv, self.patience())?;
        let is_it = |mount: &Mount| mount.logical_volume().is_some_and(|(vg, lv)| vg == request.vg && lv == request.lv);
        match mounts::all().map_err(PublishDataError::Mounts)?.iter().find(|mount| is_it(mount)) {
            None => Ok(lock),
            Some(other) => Err(PublishDataError::NotAlone {
                vg: request.vg.clone(),
                lv: request.lv.clone(),
                path: other.target.display().to_string(),
            }),
        }
    }

    fn not_the_claims(request: &PublishData) -> PublishDataError {
        PublishDataError::NotTheClaims {
            vg: request.vg.clone(),
            lv: request.lv.clone(),
            claim_uid: request.claim_uid.clone(),
            namespace: request.namespace.clone(),
        }
    }

    /// `lock`: that of the volume, where it is held already.
    fn mount_data(
        &self,
        request: &PublishData,
        node: &Path,
        found: Superblock,
        lock: Option<&Lock>,
    ) -> Result<(), PublishDataError> {
        if found.uuid != identity::data_uuid(&request.namespace, &request.claim_uid) {
            return Err(Self::not_the_claims(request));
        }
        if found.fs != request.fs {
            return Err(PublishDataError::OtherFileSystem {
                vg: request.vg.clone(),
                lv: request.lv.clone(),
                found: found.fs,
                asked: request.fs,
            });
        }
        std::fs::create_dir_all(&request.target).map_err(at_path(&request.target))?;
        // From here on it may be in use.
        unfinished::end(node).map_err(at_path(node))?;
        let data = request.options.data.join(",");
        // The file system itself always for writing: other pods may have it
        // mounted so, and only this mount of it is made read-only.
        let mount = || mounts::mount_device(node, &request.target, found.fs.as_str(), request.options.flags, &data);
        let mut result = mount();
        if let Err(error) = &result
            && self.may_repair(error, found.fs)
        {
            let taken = if lock.is_none() { Some(Lock::volume(&request.lv, self.patience())?) } else { None };
            if let Some(lock) = lock.or(taken.as_ref()) {
                result = self.mount_repairing(lock, node, found.fs, mount);
            }
        }
        if request.read_only {
            result = result.and_then(|()| mounts::make_read_only_or_unmount(&request.target));
        }
        fault::point("mount-after");
        result.map_err(|source| PublishDataError::Mount {
            vg: request.vg.clone(),
            lv: request.lv.clone(),
            fs: found.fs,
            target: request.target.display().to_string(),
            source,
        })
    }

    /// Has LVM say whose the volume is and what it was made for, and give it its
    /// device.
    fn find_data(&self, request: &PublishData, node: &Path) -> Result<(), PublishDataError> {
        let Some(found) = self.find(&request.vg, &request.lv)? else {
            return Err(PublishDataError::Missing { vg: request.vg.clone(), lv: request.lv.clone() });
        };
        match &found.owner {
            Owner::Data(owner) if owner.claim_uid == request.claim_uid && owner.namespace == request.namespace => {}
            _ => return Err(Self::not_the_claims(request)),
        }
        if found.marks.intent.block || found.marks.spare {
            return Err(PublishDataError::Block { vg: request.vg.clone(), lv: request.lv.clone() });
        }
        if found.marks.trashed.is_some() {
            return Err(PublishDataError::Missing { vg: request.vg.clone(), lv: request.lv.clone() });
        }
        if !found.active || !node.exists() {
            self.activate(&mut self.lock_group(&request.vg)?, &request.vg, &request.lv)?;
        }
        note_known(node);
        Ok(())
    }

    /// The slow road: not active, or without a file system yet. `lock`: that of
    /// the volume, where it is held already.
    fn prepare_data(&self, request: &PublishData, node: &Path, lock: Option<Lock>) -> Result<(), PublishDataError> {
        // Of this volume only: others may be formatted meanwhile.
        let lock = match lock {
            Some(lock) => lock,
            None => Lock::volume(&request.lv, self.patience())?,
        };
        let uuid = identity::data_uuid(&request.namespace, &request.claim_uid);
        // Made here for a file system, by the note, and for this claim, by the mark: LVM knows no more.
        let is_new = is_known(node) && filesystem::is_new(&self.runner, node, uuid).unwrap_or(false);
        if !is_new {
            self.find_data(request, node)?;
        }
        // A second look: another call may have done all this while we waited.
        let superblock = match filesystem::superblock(&self.runner, node).map_err(at_path(node))? {
            Some(superblock) if superblock.complete => superblock,
            unfinished => {
                // Ours, but its mkfs was cut off: nobody has ever written to it.
                let again = unfinished.is_some_and(|superblock| superblock.uuid == uuid);
                if !again && !filesystem::is_untouched(&self.runner, node, uuid).map_err(at_path(node))? {
                    // Two proofs: nothing that anybody would know, and our own mark, or the note
                    // of the mkfs that has overwritten it.
                    filesystem::prove_blank(&self.runner, node)?;
                    if !unfinished::is_begun(node)
                        && !filesystem::is_new(&self.runner, node, uuid).map_err(at_path(node))?
                    {
                        return Err(PublishDataError::NotNew {
                            vg: request.vg.clone(),
                            lv: request.lv.clone(),
                            fs: request.fs,
                        });
                    }
                }
                let new = NewFs { fs: request.fs, uuid, quota: false, again, options: &request.mkfs };
                // Where it cannot be noted, an mkfs that is cut off is left for repair.
                let _ = unfinished::begin(node);
                filesystem::make(&self.runner, lock.fd(), node, &new)?;
                Superblock { fs: request.fs, uuid, complete: true }
            }
        };
        self.mount_data(request, node, superblock, Some(&lock))
    }

    /// Grows a mounted data volume and its file system to at least `size`
    /// bytes. The same call again changes nothing.
    pub fn expand_data(&self, vg: &VgName, lv: &LvName, target: &Path, size: u64) -> Result<(), ExpandError> {
        let io = |source| ExpandError::Io { path: target.display().to_string(), source };
        let node = device(vg, lv);
        let not_mounted =
            || ExpandError::NotMounted { vg: vg.clone(), lv: lv.clone(), target: target.display().to_string() };
        let mount = mounts::at(target).map_err(io)?.ok_or_else(not_mounted)?;
        if mounts::device_number(&node).ok() != Some(mount.device) {
            return Err(not_mounted());
        }
        let fs: FsType = mount.fs_type.parse().map_err(|_| not_mounted())?;
        self.extend(vg, lv, size)?;
        fault::point("growfs-before");
        filesystem::grow(&self.runner, fs, &node, target).map_err(ExpandError::Grow)?;
        fault::point("growfs-after");
        Ok(())
    }
}
