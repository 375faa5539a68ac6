//! Volumes that are made from what another one holds, or held: restores of
//! snapshots, and clones.
//!
//! A thin volume from a thin one of the same pool shares what neither has
//! overwritten: nothing is copied. Any other is copied, from a snapshot in any
//! case, so that it is of one moment. Until all is done, the new volume bears
//! the tag [`WIPING`], and what it was made from in another one, which stays.
//! Each step is safe to repeat, and what was cut off is gone on with.
//!
//! In the end it is as if its owner had made it: the UUID of its file system is
//! its own, so that it can be mounted beside the one that it came from, and the
//! file system is as large as the volume.

use crate::command::CommandError;
pub use crate::copy::CopyError;
use crate::copy::{Copy, copy};
use crate::fault;
use crate::filesystem::{self, FsType, GrowError, UuidError};
use crate::identity::{self, Owner};
use crate::intent::{Origin, WIPING};
use crate::layout::Layout;
use crate::lock::{Lock, LockError};
use crate::names::{ClaimUid, LvName, SnapshotUid, VgName};
use crate::report::{LogicalVolume, ReportError, Snapshot};
use crate::size::human;
use crate::snapshot::{CreateSnapshot, DeleteSnapshotError, Room, SnapshotError};
use crate::volume::{Begun, CreateData, CreateError, Created, ExtendError, Lvm, device};
use crate::wipe::{Progress, Wiped};
use std::io;
use std::path::Path;

/// What is to be in a new volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// What a snapshot shows.
    Snapshot {
        /// Volume group.
        vg: VgName,
        /// The snapshot.
        name: LvName,
    },
    /// What the volume of a claim holds at that moment.
    Volume {
        /// Volume group.
        vg: VgName,
        /// The volume.
        lv: LvName,
        /// Whose it is.
        claim_uid: ClaimUid,
    },
}

/// What a volume is to be made from cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// It is not there.
    #[error("there is no {what} {vg}/{name} on this node to make a volume from")]
    Missing {
        /// Snapshot or volume.
        what: &'static str,
        /// The group.
        vg: VgName,
        /// The snapshot, or the volume.
        name: LvName,
    },
    /// Its room was used up.
    #[error(
        "snapshot {vg}/{name} is lost: more was overwritten in its volume than its room could hold; delete it, and make the next one with a larger snapshotSize"
    )]
    Lost {
        /// The group.
        vg: VgName,
        /// The snapshot.
        name: LvName,
    },
    /// It would not fit.
    #[error("{vg}/{name} shows {}, and {} was asked for; ask for as much at least", human(*.has), human(*.asked))]
    Larger {
        /// The group.
        vg: VgName,
        /// The snapshot, or the volume.
        name: LvName,
        /// Bytes that it has.
        has: u64,
        /// Bytes asked for.
        asked: u64,
    },
    /// Neither mode is made from the other.
    #[error("{vg}/{name} is {is}, and {asked} was asked for; the two are never made from one another")]
    Mode {
        /// The group.
        vg: VgName,
        /// The snapshot, or the volume.
        name: LvName,
        /// What it is.
        is: &'static str,
        /// What was asked for.
        asked: &'static str,
    },
    /// It has another file system.
    #[error("{vg}/{name} has {found}, and the class asks for {asked}; use a class of the same file system")]
    FileSystem {
        /// The group.
        vg: VgName,
        /// The snapshot, or the volume.
        name: LvName,
        /// What it has.
        found: String,
        /// What was asked for.
        asked: FsType,
    },
    /// What a clone is copied from cannot be made.
    #[error("what is copied has to keep still meanwhile: {0}")]
    Snapshot(#[from] SnapshotError),
    /// Its device cannot be read.
    #[error("cannot read {device}: {source}")]
    Device {
        /// The device.
        device: String,
        /// What the system said.
        source: io::Error,
    },
    /// What was needed for a while cannot be removed.
    #[error(transparent)]
    Remove(#[from] DeleteSnapshotError),
    /// The new volume could not be made as large as it is to be.
    #[error(transparent)]
    Extend(#[from] ExtendError),
}

/// A volume could not be filled.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// What it is copied from has gone, or is lost.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The copy broke off.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// A device cannot be used.
    #[error("cannot use {device}: {source}")]
    Device {
        /// The device.
        device: String,
        /// What the system said.
        source: io::Error,
    },
    /// Its file system could not be given its UUID.
    #[error(transparent)]
    Uuid(#[from] UuidError),
    /// Its file system could not be made as large as the volume.
    #[error(transparent)]
    Grow(#[from] GrowError),
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

/// Whether a volume is a copy, made or to be made.
fn is_copied(found: &LogicalVolume) -> bool {
    found.marks.origin.as_ref().is_some_and(|origin| origin.copied)
}

/// What a volume is made from, as found.
struct Source {
    vg: VgName,
    name: LvName,
    size: u64,
    block: bool,
    /// The pool of a thin one.
    thin: bool,
    active: bool,
    /// The claim whose the bytes are.
    claim_uid: ClaimUid,
}

impl Source {
    fn of_snapshot(one: Snapshot) -> Result<Self, SourceError> {
        if one.lost {
            return Err(SourceError::Lost { vg: one.vg, name: one.name });
        }
        let (thin, claim_uid) = (one.pool.is_some(), one.owner.source.claim_uid);
        Ok(Self { vg: one.vg, name: one.name, size: one.size, block: one.block, thin, active: one.active, claim_uid })
    }

    fn check(&self, request: &CreateData) -> Result<(), SourceError> {
        let (vg, name) = (self.vg.clone(), self.name.clone());
        if self.block != request.intent.block {
            let said = |block| if block { "a raw device" } else { "a file system" };
            return Err(SourceError::Mode { vg, name, is: said(self.block), asked: said(request.intent.block) });
        }
        if request.size < self.size {
            return Err(SourceError::Larger { vg, name, has: self.size, asked: request.size });
        }
        Ok(())
    }

    /// Looks at what is on the device of it, or of what has been made from it.
    fn check_file_system(&self, lvm: &Lvm, node: &Path, asked: Option<FsType>) -> Result<(), SourceError> {
        let Some(asked) = asked.filter(|_| !self.block) else { return Ok(()) };
        let failed = |source| SourceError::Device { device: node.display().to_string(), source };
        let found = match filesystem::superblock(&lvm.runner, node).map_err(failed)? {
            Some(found) if found.fs == asked && found.complete => return Ok(()),
            Some(found) if found.complete => found.fs.to_string(),
            // Nobody has mounted it yet, and it becomes what is asked for.
            _ if filesystem::is_marked_new(&lvm.runner, node).map_err(failed)? => return Ok(()),
            _ => "no file system that lvprov knows".to_owned(),
        };
        Err(SourceError::FileSystem { vg: self.vg.clone(), name: self.name.clone(), found, asked })
    }
}

impl Lvm {
    /// Makes a volume from a snapshot or another volume, or finds the one that
    /// an earlier call made. It is not ready before [`Lvm::finish_new`] has come
    /// to its end.
    pub(crate) fn create_from(&self, request: &CreateData, content: &Content) -> Result<Created, CreateError> {
        let there = self.find(&request.vg, &request.name)?.filter(|found| found.marks.trashed.is_none());
        match there {
            // What is done needs no source any more.
            Some(found) if !found.marks.wiping || (is_copied(&found) && found.active && !found.half_made) => {
                let created = Self::found(request, &found)?;
                if let (false, Some(origin)) = (created.wiping, &found.marks.origin) {
                    // Who made it may have ended just before that.
                    self.forget_clone(origin, &request.owner).map_err(SourceError::from)?;
                }
                return Ok(created);
            }
            _ => {}
        }
        let source = self.source(content)?;
        source.check(request)?;
        let pool_is_ours = source.vg == request.vg && self.config.thin_pools.contains_key(&request.vg);
        if source.thin && request.layout == Layout::Thin && pool_is_ours {
            return self.share(request, &source);
        }
        let (snapshot, of_clone) = match content {
            Content::Snapshot { .. } => (source, false),
            Content::Volume { .. } => (self.snapshot_for_clone(request, &source)?, true),
        };
        self.copy_from(request, &snapshot).inspect_err(|_| {
            // Nothing needs it now; where that cannot be said, gc finds it.
            if of_clone && matches!(self.find(&request.vg, &request.name), Ok(None)) {
                let _ = self.delete_snapshot(&snapshot.vg, &snapshot.name);
            }
        })
    }

    fn found(request: &CreateData, found: &LogicalVolume) -> Result<Created, CreateError> {
        Self::is_meant(request, found)?;
        if found.size < request.size {
            return Err(request.conflict(&format!("it has {} and not {}", human(found.size), human(request.size))));
        }
        Ok(Created { size: found.size, existed: true, wiping: found.marks.wiping })
    }

    fn is_meant(request: &CreateData, found: &LogicalVolume) -> Result<(), CreateError> {
        if found.owner != Owner::Data(request.owner.clone()) {
            return Err(request.conflict("it belongs to another claim"));
        }
        if found.marks.origin.is_none() {
            return Err(request.conflict("it was made empty, and a copy was asked for"));
        }
        if found.layout != request.layout || found.marks.intent.block != request.intent.block {
            return Err(request.conflict("its layout or mode is another one"));
        }
        Ok(())
    }

    fn source(&self, content: &Content) -> Result<Source, CreateError> {
        match content {
            Content::Snapshot { vg, name } => {
                let missing = || SourceError::Missing { what: "snapshot", vg: vg.clone(), name: name.clone() };
                let mut all = self.snapshots()?.into_iter();
                let found = all.find(|one| one.vg == *vg && one.name == *name).ok_or_else(missing)?;
                Ok(Source::of_snapshot(found)?)
            }
            Content::Volume { vg, lv, claim_uid } => {
                let missing = || SourceError::Missing { what: "volume", vg: vg.clone(), name: lv.clone() };
                let mut all = self.volumes()?.into_iter();
                let found = all.find(|one| one.vg == *vg && one.name == *lv).ok_or_else(missing)?;
                crate::snapshot::check_source(&found).map_err(SourceError::from)?;
                let (block, thin, active) = (found.marks.intent.block, found.layout == Layout::Thin, found.active);
                match found.owner {
                    Owner::Data(owner) if owner.claim_uid == *claim_uid => {
                        let (vg, name, size, claim_uid) = (found.vg, found.name, found.size, owner.claim_uid);
                        Ok(Source { vg, name, size, block, thin, active, claim_uid })
                    }
                    _ => Err(missing().into()),
                }
            }
        }
    }

    /// A thin volume that shares what its source has. One that was cut off is
    /// gone on with.
    fn share(&self, request: &CreateData, source: &Source) -> Result<Created, CreateError> {
        let (vg, name) = (&request.vg, &request.name);
        let mut lock = self.lock_group(vg)?;
        let mut has = source.size;
        let mut existed = false;
        match self.find_in(vg, name, Some(&lock))? {
            // It was on its way to the trash: the name is needed now.
            Some(found) if found.marks.trashed.is_some() => drop(self.to_trash(&mut lock, &found)?),
            Some(found) => {
                Self::is_meant(request, &found)?;
                existed = found.active || self.is_in_pool(&mut lock, &found)?;
                has = found.size;
                if !existed {
                    self.lvremove(&mut lock, vg, name)?;
                }
            }
            None => {}
        }
        if !existed {
            has = source.size;
            self.check_pool(&lock, vg, request.size)?;
            let origin = Origin { copied: false, vg: source.vg.clone(), name: source.name.clone() };
            let tags = [request.tags(), vec![WIPING.to_owned(), origin.to_tag()]].concat();
            let mut args: Vec<String> = ["lvcreate", "--yes", "--quiet", "--snapshot"].map(str::to_owned).to_vec();
            args.extend(["--setactivationskip", "n", "--activate", "y", "--name", name.as_str()].map(str::to_owned));
            for tag in tags {
                args.extend(["--addtag".to_owned(), tag]);
            }
            args.push(format!("{}/{}", source.vg, source.name));
            fault::point("share-before");
            fault::during("share-during");
            self.mutate(&mut lock, &args)?;
            fault::point("share-after");
        }
        if let Err(unfit) = source.check_file_system(self, &device(vg, name), request.fs) {
            self.lvremove(&mut lock, vg, name)?;
            return Err(unfit.into());
        }
        let size = match request.size > has {
            true => self.extend_thin(&mut lock, vg, name, has, request.size).map_err(SourceError::from)?,
            false => has,
        };
        fault::point("share-extended");
        Ok(Created { size, existed, wiping: true })
    }

    fn is_whole_copy(&self, lock: &mut Lock, found: &LogicalVolume) -> Result<bool, CommandError> {
        Ok(found.layout != Layout::Thin || found.active || self.is_in_pool(lock, found)?)
    }

    /// Whether the pool knows a thin volume whose making was cut off.
    fn is_in_pool(&self, lock: &mut Lock, found: &LogicalVolume) -> Result<bool, CommandError> {
        match self.activate(lock, &found.vg, &found.name) {
            Err(CommandError::Failed { stderr, .. }) if stderr.contains("No data available") => Ok(false),
            other => other.map(|()| true),
        }
    }

    /// What a clone is copied from: a snapshot for as long as that takes.
    fn snapshot_for_clone(&self, request: &CreateData, source: &Source) -> Result<Source, CreateError> {
        let uid = SnapshotUid::parse(request.owner.claim_uid.as_str())
            .map_err(|error| request.conflict(&error.to_string()))?;
        let room = match source.thin {
            true => Room::default(),
            false => self.room_for_clone(request, source)?,
        };
        let snapshot = CreateSnapshot {
            vg: source.vg.clone(),
            lv: source.name.clone(),
            claim_uid: source.claim_uid.clone(),
            name: LvName::for_clone(&request.owner.claim_uid),
            uid,
            asked_by: Some((request.owner.namespace.clone(), request.owner.claim.clone())),
            room,
        };
        let made = self.create_snapshot(&snapshot).map_err(SourceError::from)?;
        Ok(Source::of_snapshot(made)?)
    }

    /// As much as there is beside the copy, since it is needed only for a while.
    fn room_for_clone(&self, request: &CreateData, source: &Source) -> Result<Room, CreateError> {
        let lock = self.lock_group(&source.vg)?;
        let group = self.group(&source.vg, &lock)?;
        let copy = if source.vg == request.vg && request.layout != Layout::Thin { request.size } else { 0 };
        let left = group.free.saturating_sub(copy.saturating_add(group.extent_size));
        let percent = u128::from(left).saturating_mul(100) / u128::from(source.size.max(1));
        // With less than a tenth, a busy volume outruns the copy.
        Ok(Room::Percent(u64::try_from(percent).unwrap_or(100).clamp(10, 100)))
    }

    fn copy_from(&self, request: &CreateData, source: &Source) -> Result<Created, CreateError> {
        let node = device(&source.vg, &source.name);
        if !source.active || !node.exists() {
            self.activate_snapshot(&mut self.lock_group(&source.vg)?, &source.vg, &source.name)?;
        }
        source.check_file_system(self, &node, request.fs)?;
        let origin = Origin { copied: true, vg: source.vg.clone(), name: source.name.clone() };
        let tags = [request.tags(), vec![WIPING.to_owned(), origin.to_tag()]].concat();
        let Begun { size, found, mut lock } = self.begin(request, &tags)?;
        match found {
            None => Ok(Created { size, existed: false, wiping: true }),
            // Its parts are there, or its pool does not know it: nothing is in it.
            Some(found) if found.half_made || !self.is_whole_copy(&mut lock, &found)? => {
                self.lvremove(&mut lock, &found.vg, &found.name)?;
                drop(lock);
                self.copy_from(request, source)
            }
            Some(found) => Self::found(request, &found),
        }
    }

    /// Brings a volume that was made from another to where it is its owner's:
    /// with no lock held while it is copied. `go_on` as in [`crate::wipe::wipe`].
    pub(crate) fn fill(
        &self,
        found: &LogicalVolume,
        origin: &Origin,
        go_on: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<(Wiped, Option<Progress>), FillError> {
        let node = device(&found.vg, &found.name);
        if !found.active || !node.exists() {
            self.activate(&mut self.lock_group(&found.vg)?, &found.vg, &found.name)?;
        }
        let failed = |source| FillError::Device { device: node.display().to_string(), source };
        let mut progress = None;
        if origin.copied {
            let noted = Progress::of(&node, "copy").map_err(failed)?;
            if self.copy_all(found, origin, &noted, go_on)? != Wiped::Whole {
                return Ok((Wiped::Partly, None));
            }
            progress = Some(noted);
        }
        fault::point("copy-after");
        if let (false, Owner::Data(owner)) = (found.marks.intent.block, &found.owner) {
            let uuid = identity::data_uuid(&owner.namespace, &owner.claim_uid);
            match filesystem::superblock(&self.runner, &node).map_err(failed)? {
                Some(superblock) => {
                    if superblock.uuid != uuid {
                        filesystem::set_uuid(&self.runner, superblock.fs, &node, uuid)?;
                    }
                    fault::point("fill-uuid");
                    filesystem::grow_unmounted(&self.runner, superblock.fs, &node)?;
                }
                // Nobody had mounted it yet.
                None => filesystem::mark_new(&node, uuid).map_err(failed)?,
            }
            crate::data::note_known(&node);
        }
        fault::point("filled");
        Ok((Wiped::Whole, progress))
    }

    fn copy_all(
        &self,
        found: &LogicalVolume,
        origin: &Origin,
        progress: &Progress,
        go_on: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Wiped, FillError> {
        let (vg, name) = (origin.vg.clone(), origin.name.clone());
        let of_origin = |one: &Snapshot| one.vg == vg && one.name == name;
        let found_source = self.snapshots()?.into_iter().find(of_origin);
        let missing = || SourceError::Missing { what: "snapshot", vg: vg.clone(), name: name.clone() };
        let source = Source::of_snapshot(found_source.ok_or_else(missing)?)?;
        let from = device(&vg, &name);
        if !source.active || !from.exists() {
            self.activate_snapshot(&mut self.lock_group(&vg)?, &vg, &name)?;
        }
        fault::point("copy-before");
        let mut go_on = |done, total| {
            if done > 0 {
                fault::point("copy-piece");
            }
            go_on(done, total)
        };
        let (to, sparse) = (device(&found.vg, &found.name), found.layout == Layout::Thin);
        let job = Copy { from: &from, to: &to, length: source.size, zero_rest: source.block, sparse };
        Ok(copy(&self.runner, &job, progress, &mut go_on)?)
    }

    /// LVM leaves thin snapshots inactive unless it is told otherwise.
    fn activate_snapshot(&self, lock: &mut Lock, vg: &VgName, name: &LvName) -> Result<(), CommandError> {
        let args = ["lvchange", "--yes", "--quiet", "--activate", "y", "--ignoreactivationskip"].map(str::to_owned);
        self.mutate(lock, &[&args[..], &[format!("{vg}/{name}")]].concat())
    }
}
