//! Growing a raw volume while it is used, without ever showing what its new
//! extents held before.
//!
//! The moment that lvextend has added extents, whoever has the device open can
//! read them. So they are taken as a logical volume of their own, the spare,
//! and overwritten as such; then, under the group's lock, the spare is removed
//! and the volume extended by exactly its extents. Where that is cut off in
//! between, they are free extents like others, and all of it begins anew.

use crate::fault;
use crate::intent::{WIPING, spare_tag};
use crate::layout::Layout;
use crate::lock::Lock;
use crate::names::LvName;
use crate::report::{self, LogicalVolume, ReportError, Segment};
use crate::size::round_up;
use crate::volume::{ExtendError, Lvm};

/// The name of the room that a volume grows by.
pub fn spare_of(name: &LvName) -> LvName {
    let id = name.as_str().strip_prefix("pvc-").unwrap_or(name.as_str());
    let short: String = format!("grow-{id}").chars().take(127).collect();
    LvName::parse(&short).unwrap_or_else(|_| name.clone())
}

impl Lvm {
    /// Extends a raw volume to at least `size` bytes, under its group's lock.
    /// [`ExtendError::Zeroing`] until its room has been overwritten: see
    /// [`Lvm::finish_new`].
    pub(crate) fn extend_block(&self, lock: &mut Lock, found: &LogicalVolume, size: u64) -> Result<u64, ExtendError> {
        let (vg, name, spare) = (&found.vg, &found.name, spare_of(&found.name));
        let missing = || ExtendError::Missing { vg: vg.clone(), name: name.clone() };
        let group = self.groups(Some(lock))?.into_iter().find(|group| group.name == *vg).ok_or_else(missing)?;
        let asked = round_up(size, group.extent_size.max(1)).unwrap_or(u64::MAX);
        let more = asked.saturating_sub(found.size);
        let segments = self.segments(lock, vg.as_str())?;
        let other = segments.iter().find(|segment| segment.lv == name.as_str() && segment.kind != "linear");
        if let Some(other) = other {
            return Err(ExtendError::Layout { vg: vg.clone(), name: name.clone(), layout: other.kind.clone() });
        }
        let zeroing = || ExtendError::Zeroing { vg: vg.clone(), name: name.clone(), spare: spare.clone() };
        let room = self.find_in(vg, &spare, Some(lock))?;
        // Also one that LVM has and that does not bear our tags.
        if room.is_none() && segments.iter().any(|segment| segment.lv == spare.as_str()) {
            return Err(ExtendError::InTheWay { vg: vg.clone(), name: name.clone(), spare });
        }
        if let Some(room) = room {
            if !room.marks.spare || room.owner != found.owner {
                return Err(ExtendError::InTheWay { vg: vg.clone(), name: name.clone(), spare });
            }
            if room.size == more && !room.marks.wiping {
                return self.hand_on(lock, found, &room, &segments, group.extent_size);
            }
            if room.size == more || room.open {
                return Err(zeroing());
            }
            // For a growth that is no longer wanted.
            self.lvremove(lock, vg, &spare)?;
        }
        let tags = [found.owner.to_tags(), vec![spare_tag(), WIPING.to_owned()]].concat();
        match self.lvcreate(lock, vg, &spare, more, Layout::Linear, &tags, &[]) {
            Ok(()) => Err(zeroing()),
            Err(_) if more > group.free => {
                let (vg, name) = (vg.clone(), name.clone());
                Err(ExtendError::Full { vg, name, asked, more, free: group.free })
            }
            Err(failure) => Err(failure.into()),
        }
    }

    fn segments(&self, lock: &Lock, of: &str) -> Result<Vec<Segment>, ReportError> {
        let fields = report::SEGMENT_FIELDS;
        let mut args = vec!["lvs", "--segments"];
        args.extend(report::FORMAT);
        args.extend([fields, of]);
        let done = self.runner.lvm(crate::command::Kind::Report, &args, Some(lock))?.success()?;
        report::segments(&done.stdout)
    }

    fn hand_on(
        &self,
        lock: &mut Lock,
        found: &LogicalVolume,
        room: &LogicalVolume,
        segments: &[Segment],
        extent: u64,
    ) -> Result<u64, ExtendError> {
        let of_room = segments.iter().filter(|segment| segment.lv == room.name.as_str());
        let ranges: Vec<String> = of_room.flat_map(|segment| segment.ranges.iter().cloned()).collect();
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        fault::point("hand-on-before");
        // A discard, which lvm.conf may ask for, would undo the zeros.
        let mut remove = words(&["lvremove", "--yes", "--quiet", "--config", "devices/issue_discards=0"]);
        remove.push(format!("{}/{}", room.vg, room.name));
        self.mutate(lock, &remove)?;
        fault::point("hand-on-between");
        let mut extend = words(&["lvextend", "--yes", "--quiet", "--extents"]);
        extend.push(format!("+{}", room.size / extent.max(1)));
        extend.push(format!("{}/{}", found.vg, found.name));
        extend.extend(ranges);
        self.mutate(lock, &extend)?;
        fault::point("hand-on-after");
        Ok(found.size.saturating_add(room.size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spare_has_a_name_of_its_own() {
        let name = LvName::parse("pvc-0f0e7f0a-1111-4222-8333-444455556666").unwrap();
        assert_eq!(spare_of(&name).as_str(), "grow-0f0e7f0a-1111-4222-8333-444455556666");
    }
}
