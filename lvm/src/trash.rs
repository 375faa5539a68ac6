//! The trash: data volumes whose claim has gone, and that are kept for a while,
//! or whose bytes take a while to wipe.
//!
//! A volume goes there by a tag that says since when, and a name that no pod
//! can mount. What its tags said at its creation decides what becomes of it:
//! how long it stays, and what is done with its bytes in the end. That begins
//! with the tag [`WIPING`]; from then on there is no way back. Its extents are
//! free after the wipe, never before.

use crate::block::WipeError;
use crate::clock::now;
use crate::command::CommandError;
use crate::fault;
use crate::identity::Owner;
use crate::intent::{DeletePolicy, WIPING, trashed_tag};
use crate::lock::{Lock, LockError};
use crate::names::{LvName, VgName};
use crate::report::{LogicalVolume, ReportError};
use crate::volume::Lvm;
use crate::wipe::{How, Wiped};

/// What has been done with a volume in the trash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Emptied {
    /// It has gone, and its extents are free.
    Removed,
    /// As before, but the disk takes no discards.
    RemovedUndiscarded,
    /// Its wipe has been left off.
    Partly,
    /// It is not there any more, or no longer in the trash.
    Absent,
}

/// A volume could not be removed from the trash.
#[derive(Debug, thiserror::Error)]
pub enum EmptyError {
    /// Something holds it open.
    #[error("logical volume {vg}/{name} is in the trash and held open all the same; it is tried again")]
    InUse {
        /// The group.
        vg: VgName,
        /// The volume.
        name: LvName,
    },
    /// Its bytes could not be wiped.
    #[error(transparent)]
    Wipe(#[from] WipeError),
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

/// The name of a volume that has been in the trash since then. A claim may have
/// had several, one after another.
fn name_in_trash(found: &LogicalVolume, since: i64) -> LvName {
    let Owner::Data(owner) = &found.owner else { return found.name.clone() };
    LvName::parse(&format!("trash-{}-{since:x}", owner.claim_uid)).unwrap_or_else(|_| found.name.clone())
}

impl Lvm {
    /// Puts a closed data volume into the trash, under its group's lock. The
    /// same again goes on where it was cut off.
    pub(crate) fn to_trash(&self, lock: &mut Lock, found: &LogicalVolume) -> Result<LvName, CommandError> {
        let since = match found.marks.trashed {
            Some(since) => since,
            None => {
                let since = now();
                fault::point("trash-before");
                self.tag(lock, &found.vg, &found.name, "--addtag", &trashed_tag(since))?;
                since
            }
        };
        fault::point("trash-tagged");
        let name = name_in_trash(found, since);
        if name != found.name {
            self.rename(lock, &found.vg, &found.name, &name)?;
        }
        fault::point("trash-renamed");
        Ok(name)
    }

    /// What is in the trash: one report. What was cut off on its way there gets
    /// its name, if `may_touch` its group.
    pub fn trash(&self, may_touch: impl Fn(&VgName) -> bool) -> Result<Vec<LogicalVolume>, EmptyError> {
        let mut all = self.volumes()?;
        all.retain(|volume| volume.marks.trashed.is_some() && may_touch(&volume.vg));
        for volume in &mut all {
            let name = volume.marks.trashed.map(|since| name_in_trash(volume, since));
            if name.is_some_and(|name| name != volume.name) {
                let mut lock = self.lock_group(&volume.vg)?;
                if let Some(found) = self.still(volume)? {
                    volume.name = self.to_trash(&mut lock, &found)?;
                }
            }
        }
        Ok(all)
    }

    /// Wipes a volume in the trash as it is to be wiped, with no lock held
    /// meanwhile, and removes it. Since when it has been there has to be the
    /// same, or another has its name by now. `go_on` as in [`crate::wipe::wipe`].
    pub fn empty(&self, meant: &LogicalVolume, go_on: &mut dyn FnMut(u64, u64) -> bool) -> Result<Emptied, EmptyError> {
        let (vg, name) = (&meant.vg, &meant.name);
        let mut emptied = Emptied::Removed;
        {
            let mut lock = self.lock_group(vg)?;
            let Some(found) = self.still(meant)? else { return Ok(Emptied::Absent) };
            if found.open {
                return Err(EmptyError::InUse { vg: vg.clone(), name: name.clone() });
            }
            if meant.marks.intent.delete == DeletePolicy::Remove {
                self.lvremove(&mut lock, vg, name)?;
                return Ok(emptied);
            }
            if !found.marks.wiping {
                fault::point("trash-wipe-before");
                self.tag(&mut lock, vg, name, "--addtag", WIPING)?;
            }
        }
        let how = match meant.marks.intent.delete {
            DeletePolicy::Discard => How::Discard,
            _ => How::Zero,
        };
        let (wiped, progress) = self.wipe_volume(meant, how, "trash", go_on)?;
        match wiped {
            Wiped::Partly => return Ok(Emptied::Partly),
            Wiped::Unable => emptied = Emptied::RemovedUndiscarded,
            Wiped::Whole => {}
        }
        let mut lock = self.lock_group(vg)?;
        if self.still(meant)?.is_none() {
            return Ok(Emptied::Absent);
        }
        self.lvremove(&mut lock, vg, name)?;
        progress.forget();
        Ok(emptied)
    }

    /// The volume, if it is still the same one.
    fn still(&self, meant: &LogicalVolume) -> Result<Option<LogicalVolume>, ReportError> {
        let found = self.find(&meant.vg, &meant.name)?;
        Ok(found.filter(|found| {
            found.owner == meant.owner
                && found.created == meant.created
                && found.marks.trashed.is_some()
                && found.marks.trashed == meant.marks.trashed
        }))
    }
}
