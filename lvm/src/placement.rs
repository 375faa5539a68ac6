//! On which disks a striped or mirrored volume is made, and grows.

use crate::command::Kind;
use crate::layout::Layout;
use crate::lock::Lock;
use crate::mounts;
use crate::names::{LvName, VgName, dm_name};
use crate::report::{self, Disk, Disks, ReportError};
use crate::volume::{ExtendError, Lvm};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// A growth that has been given its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Growth {
    /// Bytes that the volume is to have, in whole stripes.
    pub size: u64,
    /// The disks, as lvextend is told of them; none: LVM chooses.
    pub disks: Vec<String>,
}

/// Names and free bytes.
pub(crate) fn choices(disks: &[Disk]) -> Vec<(&str, u64)> {
    disks.iter().map(|disk| (disk.name.as_str(), disk.free)).collect()
}

/// A disk's name as an argument: lvm reads what follows a colon as extents, and
/// what begins with an at sign as a tag (lvm(8)).
pub(crate) fn argument(disk: &str) -> String {
    disk.chars().flat_map(|c| matches!(c, ':' | '@' | '\\').then_some('\\').into_iter().chain([c])).collect()
}

/// Whether a volume lies on one disk, as one piece or several: then LVM need not
/// be asked how it lies. What the kernel does not tell is no.
pub(crate) fn is_plain(node: &Path) -> bool {
    let Ok((major, minor)) = mounts::device_number(node) else { return false };
    let Ok(entries) = fs::read_dir(format!("/sys/dev/block/{major}:{minor}/slaves")) else { return false };
    let below: Vec<_> = entries.filter_map(Result::ok).collect();
    match below.as_slice() {
        // A disk may itself be of the device-mapper (encrypted, multipath), but no volume of LVM.
        [one] => !fs::read_to_string(one.path().join("dm/uuid")).is_ok_and(|uuid| uuid.starts_with("LVM-")),
        _ => false,
    }
}

/// The parts of a mirrored volume that have a device node.
pub(crate) fn active_parts(vg: &VgName, lv: &LvName) -> Vec<String> {
    let Ok(nodes) = fs::read_dir("/dev/mapper") else { return Vec::new() };
    let whole = dm_name(vg, lv);
    let part = |node: fs::DirEntry| {
        let node = node.file_name().into_string().ok()?;
        let suffix = node.strip_prefix(&whole)?;
        report::is_part(suffix).then(|| format!("{vg}/{lv}{suffix}"))
    };
    nodes.filter_map(|node| part(node.ok()?)).collect()
}

impl Lvm {
    /// The disks of a group, and those of one of its volumes: one report.
    fn disks(&self, lock: &Lock, vg: &VgName, lv: &LvName) -> Result<Disks, ReportError> {
        let select = format!("vg_name=\"{vg}\"");
        let mut args = vec!["pvs", "--segments", "--select", &select];
        args.extend(report::FORMAT);
        args.push(report::PV_FIELDS);
        report::disks(&self.runner.lvm(Kind::Report, &args, Some(lock))?.success()?.stdout, lv)
    }

    /// Chooses where a volume grows from `now` to `size` bytes: one report.
    pub(crate) fn place_growth(
        &self,
        lock: &Lock,
        vg: &VgName,
        lv: &LvName,
        layout: Layout,
        now: u64,
        size: u64,
    ) -> Result<Growth, ExtendError> {
        let there = self.disks(lock, vg, lv)?;
        if there.partial {
            return Err(ExtendError::Partial { vg: vg.clone() });
        }
        place(&there, layout, now, size).map_err(|(asked, own, shortage)| ExtendError::NoDisks {
            vg: vg.clone(),
            name: lv.clone(),
            asked,
            own,
            shortage,
        })
    }
}

/// Of a growth without a place: bytes in whole stripes, what the disks of a
/// mirrored volume have, and what the others lack.
type Lack = (u64, Option<u64>, crate::layout::Shortage);

fn place(there: &Disks, layout: Layout, now: u64, size: u64) -> Result<Growth, Lack> {
    let asked = layout.whole(size, there.extent_size).unwrap_or(u64::MAX);
    let leg = layout.leg_of_growth(asked.saturating_sub(now));
    let all = choices(&there.disks);
    let chosen = |disks: Vec<&str>| Growth { size: asked, disks: disks.into_iter().map(argument).collect() };
    if !layout.is_mirrored() {
        return layout.place(&all, leg).map(chosen).map_err(|shortage| (asked, None, shortage));
    }
    if there.legs.len() != layout.legs() {
        // An admin has made another kind of volume of it.
        return Ok(Growth { size, disks: Vec::new() });
    }
    // Each copy goes on on its own disk; or all of them on disks that have nothing of any
    // copy, so that no disk ever has something of two.
    let own: Vec<&str> = there.legs.iter().filter_map(|leg| leg.last()).map(String::as_str).collect();
    let free = |name: &&str| all.iter().find(|(disk, _)| disk == name).map_or(0, |(_, free)| *free);
    let least = own.iter().map(free).min().unwrap_or(0);
    let apart = own.iter().collect::<BTreeSet<_>>().len() == own.len();
    if least >= leg && apart {
        return Ok(chosen(own));
    }
    let used: BTreeSet<&str> = there.legs.iter().flatten().map(String::as_str).collect();
    let fresh: Vec<(&str, u64)> = all.into_iter().filter(|(disk, _)| !used.contains(disk)).collect();
    layout.place(&fresh, leg).map(chosen).map_err(|shortage| (asked, Some(least), shortage))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EXTENT: u64 = 4 << 20;
    const RAID1: Layout = Layout::Raid1 { mirrors: 1 };

    fn disks(free: &[(&str, u64)], legs: &[&[&str]]) -> Disks {
        Disks {
            extent_size: EXTENT,
            partial: false,
            disks: free.iter().map(|(name, extents)| Disk { name: (*name).into(), free: extents * EXTENT }).collect(),
            legs: legs.iter().map(|leg| leg.iter().map(|disk| (*disk).to_owned()).collect()).collect(),
        }
    }

    fn grown(there: &Disks, layout: Layout, extents: u64) -> Option<Vec<String>> {
        place(there, layout, 10 * EXTENT, (10 + extents) * EXTENT).ok().map(|growth| growth.disks)
    }

    #[test]
    fn copies_grow_where_they_are_or_all_elsewhere() {
        let there = disks(&[("a", 50), ("b", 20), ("c", 40), ("d", 30)], &[&["a"], &["b"]]);
        assert_eq!(grown(&there, RAID1, 20).unwrap(), ["a", "b"]);
        // Not a and c: c would have the second copy, and then a later part of the first.
        assert_eq!(grown(&there, RAID1, 21).unwrap(), ["c", "d"]);
        assert_eq!(grown(&there, RAID1, 31), None);
        let moved_on = disks(&[("a", 50), ("b", 50), ("c", 5), ("d", 5)], &[&["a", "c"], &["b", "d"]]);
        assert_eq!(grown(&moved_on, RAID1, 5).unwrap(), ["c", "d"]);
        assert_eq!(grown(&moved_on, RAID1, 6), None);
    }

    #[test]
    fn stripes_go_on_wherever_there_is_room() {
        let there = disks(&[("a", 5), ("b", 20), ("c", 40)], &[]);
        let layout = Layout::Striped { stripes: 2, stripe_size: 64 << 10 };
        assert_eq!(grown(&there, layout, 40).unwrap(), ["c", "b"]);
        assert_eq!(grown(&there, layout, 41), None);
        let growth = place(&there, layout, 10 * EXTENT, 11 * EXTENT).unwrap();
        assert_eq!(growth.size, 12 * EXTENT);
    }

    #[test]
    fn what_an_admin_has_made_of_it_is_left_to_lvm() {
        let there = disks(&[("a", 50), ("b", 20)], &[&["a"]]);
        assert!(grown(&there, RAID1, 20).unwrap().is_empty());
    }

    #[test]
    fn a_disks_name_is_one_argument() {
        assert_eq!(argument("/dev/sda1"), "/dev/sda1");
        assert_eq!(argument("/dev/disk/by-path/pci-0000:00:1f@x"), "/dev/disk/by-path/pci-0000\\:00\\:1f\\@x");
    }

    proptest! {
        /// However it grows, no disk comes to have something of two copies.
        #[test]
        fn no_disk_has_two_copies(free in proptest::collection::vec(0_u64..30, 2..8), steps in proptest::collection::vec(1_u64..20, 1..8)) {
            let names: Vec<String> = (0..free.len()).map(|n| format!("d{n}")).collect();
            let list: Vec<(&str, u64)> = names.iter().map(String::as_str).zip(free.iter().copied()).collect();
            let mut there = disks(&list, &[&["d0"], &["d1"]]);
            for extents in steps {
                let Some(chosen) = grown(&there, RAID1, extents) else { continue };
                prop_assert_eq!(chosen.len(), 2);
                // LVM gives them to the copies in either order where they are fresh.
                let own = there.legs.iter().zip(&chosen).all(|(leg, disk)| leg.last() == Some(disk));
                let order: Vec<&String> = if own { chosen.iter().collect() } else { chosen.iter().rev().collect() };
                for (leg, disk) in there.legs.iter_mut().zip(order) {
                    leg.push(disk.clone());
                    let one = there.disks.iter_mut().find(|one| one.name == *disk).unwrap();
                    prop_assert!(one.free >= extents * EXTENT);
                    one.free -= extents * EXTENT;
                }
                prop_assert!(there.legs[0].iter().all(|disk| !there.legs[1].contains(disk)));
            }
        }
    }
}
