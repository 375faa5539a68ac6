//! Growing a raw volume while it is used, without ever showing what its new
//! extents held before.
//!
//! The moment that lvextend has added extents, whoever has the device open can
//! read them. So they are taken as a logical volume of their own, the spare,
//! and overwritten as such; then, under the group's lock, the spare is removed
//! and the volume extended by exactly its extents. That of a striped or mirrored
//! volume has a stripe on the disk of each leg, so that each has as many
//! extents. Where that is cut off in between, they are free extents like others,
//! and all of it begins anew.

use crate::fault;
use crate::intent::{WIPING, spare_tag};
use crate::layout::Layout;
use crate::lock::Lock;
use crate::names::LvName;
use crate::report::{self, LogicalVolume, ReportError, Segment};
use crate::volume::{ExtendError, Lvm};

/// Any that fits into an extent.
const SPARE_STRIPE: u64 = 64 << 10;

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
        if found.layout == Layout::Thin {
            // Its pool zeroes what it hands out.
            return self.extend_thin(lock, vg, name, found.size, size);
        }
        let missing = || ExtendError::Missing { vg: vg.clone(), name: name.clone() };
        let group = self.groups(Some(lock))?.into_iter().find(|group| group.name == *vg).ok_or_else(missing)?;
        let extent = group.extent_size.max(1);
        let asked = found.layout.whole(size, extent).unwrap_or(u64::MAX);
        let more = asked.saturating_sub(found.size);
        let segments = self.segments(lock, vg.as_str())?;
        // An admin may have made another kind of volume of it.
        let is_other = |segment: &&Segment| segment.lv == name.as_str() && segment.kind != found.layout.kind();
        if let Some(other) = segments.iter().find(is_other) {
            return Err(ExtendError::Layout { vg: vg.clone(), name: name.clone(), layout: other.kind.clone() });
        }
        // Each leg grows by as much, on a disk of its own: so does a striped one.
        let room_size = match found.layout.is_linear() {
            true => more,
            false => found.layout.leg_of_growth(more).saturating_mul(found.layout.legs() as u64),
        };
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
            if room.size == room_size && !room.marks.wiping {
                self.hand_on(lock, found, &room, &segments, more / extent)?;
                return Ok(found.size.saturating_add(more));
            }
            if room.size == room_size || room.open {
                return Err(zeroing());
            }
            // For a growth that is no longer wanted.
            self.lvremove(lock, vg, &spare)?;
        }
        let tags = [found.owner.to_tags(), vec![spare_tag(), WIPING.to_owned()]].concat();
        let (layout, disks) = match found.layout.is_linear() {
            true => (Layout::Linear, Vec::new()),
            false => {
                let place = self.place_growth(lock, vg, name, found.layout, found.size, asked)?;
                let stripes = u32::try_from(place.disks.len()).unwrap_or(u32::MAX);
                (Layout::Striped { stripes, stripe_size: SPARE_STRIPE }, place.disks)
            }
        };
        match self.lvcreate(lock, vg, &spare, room_size, layout, &tags, &disks) {
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
        extents: u64,
    ) -> Result<(), ExtendError> {
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
        extend.push(format!("+{extents}"));
        extend.push(format!("{}/{}", found.vg, found.name));
        extend.extend(ranges);
        self.mutate(lock, &extend)?;
        fault::point("hand-on-after");
        Ok(())
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
