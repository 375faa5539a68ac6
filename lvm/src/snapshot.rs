//! Snapshots: a data volume as it was at one moment, as long as it is kept.
//!
//! Of a thin volume it is a thin one, which shares with it what neither has
//! overwritten (lvmthin(7)). Of any other, LVM copies what is about to be
//! overwritten into room that the snapshot has for that (lvcreate(8),
//! "--snapshot"). Where that room is used up the snapshot is lost, so it is as
//! large as it can ever need to be unless somebody asks for less.
//!
//! The kernel freezes a mounted file system for that moment (dm-ioctl, suspend
//! without "noflush"), so that a snapshot of it needs no repair.

use crate::command::CommandError;
use crate::fault;
use crate::identity::{DataOwner, Owner, SnapshotOwner};
use crate::intent::{BLOCK, Origin};
use crate::layout::Layout;
use crate::lock::{Lock, LockError};
use crate::names::{ClaimName, ClaimUid, LvName, Namespace, SnapshotUid, VgName};
use crate::report::{self, LogicalVolume, ReportError, Snapshot};
use crate::size::{QuantityError, human, parse_quantity, round_up};
use crate::thin::PoolError;
use crate::volume::{Lvm, size_argument};

/// Parameter of a VolumeSnapshotClass: room for what is overwritten.
pub const SNAPSHOT_SIZE: &str = "snapshotSize";

/// LVM's own (lvcreate(8), "--chunksize"): so much is copied at once, and each
/// such piece costs 16 bytes of its room.
const CHUNK: u64 = 4 << 10;
const EXCEPTION: u64 = 16;

/// Room for what is overwritten while a snapshot is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// A part of the volume, in percent.
    Percent(u64),
    /// Bytes.
    Bytes(u64),
}

impl Default for Room {
    /// However much is overwritten.
    fn default() -> Self {
        Self::Percent(100)
    }
}

/// A size that was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RoomError {
    /// A part of a volume.
    #[error("{SNAPSHOT_SIZE} {0:?} is not a part of a volume from 1% to 100%")]
    Percent(String),
    /// A number of bytes.
    #[error("{SNAPSHOT_SIZE}: {0}")]
    Quantity(#[from] QuantityError),
    /// Nothing.
    #[error("{SNAPSHOT_SIZE} is 0: nothing could be overwritten")]
    Nothing,
}

impl std::str::FromStr for Room {
    type Err = RoomError;
    fn from_str(text: &str) -> Result<Self, RoomError> {
        if let Some(number) = text.strip_suffix('%') {
            let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
            let percent = number.parse().ok().filter(|percent| digits && (1..=100).contains(percent));
            return percent.map(Self::Percent).ok_or_else(|| RoomError::Percent(text.chars().take(20).collect()));
        }
        match parse_quantity(text)? {
            0 => Err(RoomError::Nothing),
            bytes => Ok(Self::Bytes(bytes)),
        }
    }
}

impl Room {
    /// Bytes for a snapshot of a volume of `size` bytes, in whole extents. Never
    /// more than can be needed: all of it, and where each piece of it lies.
    fn of(self, size: u64, extent: u64) -> u64 {
        // A header, and a further page of entries that is begun.
        let all = size.saturating_add(size / CHUNK * EXCEPTION).saturating_add(2 * CHUNK);
        let asked = match self {
            Self::Percent(percent) => u64::try_from(u128::from(all) * u128::from(percent) / 100).unwrap_or(u64::MAX),
            Self::Bytes(bytes) => bytes.min(all),
        };
        round_up(asked.max(1), extent.max(1)).unwrap_or(u64::MAX)
    }
}

/// A snapshot to be made.
#[derive(Debug, Clone)]
pub struct CreateSnapshot {
    /// Volume group.
    pub vg: VgName,
    /// The volume.
    pub lv: LvName,
    /// The claim whose it is.
    pub claim_uid: ClaimUid,
    /// The snapshot's name; see [`LvName::for_snapshot`].
    pub name: LvName,
    /// UID of what asked for it: a VolumeSnapshot, or the claim of a clone.
    pub uid: SnapshotUid,
    /// Its namespace and name, where they are known.
    pub asked_by: Option<(Namespace, ClaimName)>,
    /// For what is overwritten; of no meaning for thin volumes.
    pub room: Room,
}

/// A snapshot could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The volume is not there.
    #[error("logical volume {vg}/{lv} is not on this node")]
    Missing {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
    },
    /// It is not what its claim has.
    #[error("logical volume {vg}/{lv} {why}; there is nothing to make a snapshot of")]
    NotReady {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
        /// What it is instead.
        why: &'static str,
    },
    /// One of that name is of something else.
    #[error("snapshot {vg}/{name} is there already, and of {of}")]
    Conflict {
        /// The group.
        vg: VgName,
        /// The snapshot.
        name: LvName,
        /// What it is of.
        of: String,
    },
    /// There is no room.
    #[error("volume group {vg} has {} free ({free} B), and a snapshot of {lv} needs {} ({asked} B) for what is overwritten while it is kept: {} are missing. Give its VolumeSnapshotClass a smaller {SNAPSHOT_SIZE}, or remove what is not needed", human(*.free), human(*.asked), human(.asked.saturating_sub(*.free)))]
    Full {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
        /// Bytes that it needs.
        asked: u64,
        /// Bytes free.
        free: u64,
    },
    /// The thin pool cannot hold it.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The kernel cannot do it.
    #[error("this node's kernel has no module dm-snapshot, which snapshots need; install it (modprobe dm-snapshot)")]
    NoModule,
    /// The lock was not free in time.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// LVM could not be asked.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// LVM refused.
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// A snapshot could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum DeleteSnapshotError {
    /// It is being read.
    #[error("snapshot {vg}/{name} is in use; it is tried again")]
    InUse {
        /// The group.
        vg: VgName,
        /// The snapshot.
        name: LvName,
    },
    /// A volume that is made from it is not finished.
    #[error("snapshot {vg}/{name} is still being copied to {volume}; it can be removed when that is done")]
    Needed {
        /// The group.
        vg: VgName,
        /// The snapshot.
        name: LvName,
        /// The volume.
        volume: String,
    },
    /// It does not carry our tags.
    #[error("logical volume {vg}/{name} does not carry the tags of a snapshot of lvprov; it is left alone")]
    NotOurs {
        /// The group.
        vg: VgName,
        /// The snapshot.
        name: LvName,
    },
    /// The lock was not free in time.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// LVM could not be asked; the snapshot may well exist.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// LVM refused.
    #[error(transparent)]
    Command(#[from] CommandError),
}

impl Lvm {
    /// All snapshots of this node that carry our tags: one report.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>, ReportError> {
        report::snapshots(&self.report("lvs", report::SNAPSHOT_FIELDS, None, None)?)
    }

    /// Our snapshots of one group: one report. An error where the group is not there.
    pub(crate) fn snapshots_of(&self, vg: &VgName, lock: Option<&Lock>) -> Result<Vec<Snapshot>, ReportError> {
        report::snapshots(&self.report("lvs", report::SNAPSHOT_FIELDS, Some(vg.as_str()), lock)?)
    }

    /// Makes a snapshot, or finds the one that an earlier call made.
    pub fn create_snapshot(&self, request: &CreateSnapshot) -> Result<Snapshot, SnapshotError> {
        let mut lock = self.lock_group(&request.vg)?;
        self.create_snapshot_in(&mut lock, request)
    }

    /// As [`Lvm::create_snapshot`], under the group's lock.
    pub(crate) fn create_snapshot_in(
        &self,
        lock: &mut Lock,
        request: &CreateSnapshot,
    ) -> Result<Snapshot, SnapshotError> {
        let (vg, lv, name) = (&request.vg, &request.lv, &request.name);
        let find = |lock: &Lock| -> Result<Option<Snapshot>, ReportError> {
            Ok(self.snapshots_of(vg, Some(lock))?.into_iter().find(|one| one.name == *name))
        };
        if let Some(found) = find(lock)? {
            if found.owner.source.claim_uid != request.claim_uid {
                let of = format!("claim {}/{}", found.owner.source.namespace, found.owner.source.claim);
                return Err(SnapshotError::Conflict { vg: vg.clone(), name: name.clone(), of });
            }
            return Ok(found);
        }
        let missing = || SnapshotError::Missing { vg: vg.clone(), lv: lv.clone() };
        let source = self.find_in(vg, lv, Some(lock))?.ok_or_else(missing)?;
        check_source(&source)?;
        let Owner::Data(owner) = &source.owner else { return Err(missing()) };
        if owner.claim_uid != request.claim_uid {
            return Err(missing());
        }
        let (namespace, by) =
            request.asked_by.clone().unwrap_or_else(|| (owner.namespace.clone(), owner.claim.clone()));
        let owner = SnapshotOwner { source: owner.clone(), uid: request.uid.clone(), namespace, name: by };
        let mut tags = owner.to_tags();
        if source.marks.intent.block {
            tags.push(BLOCK.to_owned());
        }
        let mut args: Vec<String> =
            ["lvcreate", "--yes", "--quiet", "--snapshot", "--name"].map(str::to_owned).to_vec();
        args.push(name.to_string());
        if source.layout == Layout::Thin {
            self.check_pool(lock, vg, source.size)?;
        } else {
            if !crate::layout::has_module("dm-snapshot") {
                return Err(SnapshotError::NoModule);
            }
            let group = self.groups(Some(lock))?.into_iter().find(|group| group.name == *vg).ok_or_else(missing)?;
            let asked = request.room.of(source.size, group.extent_size);
            if asked > group.free {
                return Err(SnapshotError::Full { vg: vg.clone(), lv: lv.clone(), asked, free: group.free });
            }
            args.extend(["--size".to_owned(), size_argument(asked)]);
        }
        for tag in tags {
            args.extend(["--addtag".to_owned(), tag]);
        }
        args.push(format!("{vg}/{lv}"));
        fault::point("snapshot-before");
        fault::during("snapshot-during");
        self.mutate(lock, &args)?;
        fault::point("snapshot-after");
        find(lock)?.ok_or_else(missing)
    }

    /// Removes a snapshot of ours. False: it is not there. The same again
    /// succeeds.
    pub fn delete_snapshot(&self, vg: &VgName, name: &LvName) -> Result<bool, DeleteSnapshotError> {
        let mut lock = self.lock_group(vg)?;
        let all = self.snapshots_of(vg, Some(&lock))?;
        let Some(found) = all.iter().find(|one| one.name == *name) else {
            // Either it is gone, or it is somebody's without our tags.
            return match crate::volume::device(vg, name).exists() {
                true => Err(DeleteSnapshotError::NotOurs { vg: vg.clone(), name: name.clone() }),
                false => Ok(false),
            };
        };
        // In whichever group the copy is.
        let is_copy = |one: &LogicalVolume| {
            let of = one.marks.origin.as_ref();
            one.marks.wiping && of.is_some_and(|of| of.copied && of.vg == *vg && of.name == *name)
        };
        if let Some(copy) = self.volumes()?.into_iter().find(is_copy) {
            let volume = format!("{}/{}", copy.vg, copy.name);
            return Err(DeleteSnapshotError::Needed { vg: vg.clone(), name: name.clone(), volume });
        }
        if found.open {
            return Err(DeleteSnapshotError::InUse { vg: vg.clone(), name: name.clone() });
        }
        fault::point("snapshot-remove-before");
        self.lvremove(&mut lock, vg, name)?;
        fault::point("snapshot-remove-after");
        Ok(true)
    }

    /// Removes what a clone was copied from, if it is there.
    pub(crate) fn forget_clone(&self, of: &Origin, owner: &DataOwner) -> Result<(), DeleteSnapshotError> {
        if of.copied && of.name == LvName::for_clone(&owner.claim_uid) {
            self.delete_snapshot(&of.vg, &of.name)?;
        }
        Ok(())
    }

    /// As [`Lvm::forget_clone`], where the volume itself was never begun. Such a
    /// snapshot is active, so that LVM need not be asked.
    pub(crate) fn forget_begun_clone(&self, vg: &VgName, lv: &LvName) -> Result<(), DeleteSnapshotError> {
        let uid = lv.as_str().strip_prefix("pvc-").and_then(|uid| ClaimUid::parse(uid).ok());
        if let Some(uid) = uid
            && crate::volume::device(vg, &LvName::for_clone(&uid)).exists()
        {
            self.delete_snapshot(vg, &LvName::for_clone(&uid))?;
        }
        Ok(())
    }

    /// The names of the snapshots that a volume, which is not thin, has to keep
    /// old bytes for.
    pub(crate) fn snapshots_on(&self, lock: &Lock, vg: &VgName, name: &LvName) -> Result<Vec<String>, ReportError> {
        report::snapshots_on(&self.report("lvs", report::SNAPSHOT_FIELDS, Some(vg.as_str()), Some(lock))?, name)
    }
}

/// Whether it is a claim's volume, and holds what that has written.
pub(crate) fn check_source(source: &LogicalVolume) -> Result<(), SnapshotError> {
    let refuse = |why| Err(SnapshotError::NotReady { vg: source.vg.clone(), lv: source.name.clone(), why });
    let marks = &source.marks;
    match &source.owner {
        Owner::Log { .. } => refuse("is a log volume"),
        Owner::Data(_) if marks.trashed.is_some() => refuse("is in the trash"),
        Owner::Data(_) if marks.spare => refuse("is room for the growth of another one"),
        Owner::Data(_) if marks.wiping || source.half_made => refuse("is still being made"),
        Owner::Data(_) => Ok(()),
    }
}

/// The name that stands for a snapshot's name: of its UID, where that is in it.
pub fn uid_of(name: &str) -> SnapshotUid {
    let of_kubernetes = name.strip_prefix("snapshot-").and_then(|uid| SnapshotUid::parse(uid).ok());
    of_kubernetes.unwrap_or_else(|| {
        let uid = crate::identity::uid_of_name(&format!("snapshot {name}"));
        SnapshotUid::parse(uid.as_str()).unwrap_or_else(|_| unreachable!("a claim's UID is a UUID"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;
    const EXTENT: u64 = 4 << 20;

    #[test]
    fn room_is_a_part_or_a_size() {
        assert_eq!("20%".parse(), Ok(Room::Percent(20)));
        assert_eq!("100%".parse(), Ok(Room::Percent(100)));
        assert_eq!("5Gi".parse(), Ok(Room::Bytes(5 * GIB)));
        for wrong in ["0%", "101%", "%", "+5%", "x%", "5%%", "", "0", "-1", "1Zi"] {
            assert!(wrong.parse::<Room>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn all_of_a_volume_can_be_overwritten_and_no_more_is_taken() {
        // One more byte for 256, and what has begun.
        assert_eq!(Room::default().of(GIB, EXTENT), GIB + 2 * EXTENT);
        assert_eq!(Room::Bytes(10 * GIB).of(GIB, EXTENT), GIB + 2 * EXTENT);
        assert_eq!(Room::Bytes(GIB / 2).of(GIB, EXTENT), GIB / 2);
        assert_eq!(Room::Percent(1).of(EXTENT, EXTENT), EXTENT);
    }

    #[test]
    fn the_name_is_that_of_kubernetes_or_stands_for_any() {
        let uid = "0f0e7f0a-1111-4222-8333-444455556666";
        assert_eq!(uid_of(&format!("snapshot-{uid}")).as_str(), uid);
        assert_eq!(LvName::for_snapshot(&uid_of(&format!("snapshot-{uid}"))).as_str(), format!("snap-{uid}"));
        let other = uid_of("a name of another kind");
        assert_eq!(other, uid_of("a name of another kind"));
        assert_ne!(other, uid_of("a name of another kind 2"));
    }

    proptest! {
        #[test]
        fn room_is_whole_and_enough(size in 1u64..(1 << 50), percent in 1u64..=100) {
            let room = Room::Percent(percent).of(size, EXTENT);
            prop_assert_eq!(room % EXTENT, 0);
            prop_assert!(u128::from(room) * 100 >= u128::from(size) * u128::from(percent));
            prop_assert!(Room::Percent(100).of(size, EXTENT) >= room);
        }

        #[test]
        fn any_text_is_read(text in "\\PC{0,20}") {
            let _ = text.parse::<Room>();
        }
    }
}
