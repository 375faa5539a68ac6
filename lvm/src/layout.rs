//! How a data volume lies on the disks (physical volumes) of its group.
//!
//! Each leg of a striped or mirrored volume has a disk of its own, and LVM is
//! told which: left to itself, it fills up what is free here and there, and puts
//! a later part of one copy on the disk of another one, so that the loss of one
//! disk is the loss of both copies.

use crate::size::{QuantityError, human, parse_quantity, round_up};
use std::fmt;
use std::ops::RangeInclusive;
use std::path::Path;
use std::str::FromStr;

/// Parameter that chooses the layout.
pub const LAYOUT: &str = "layout";
/// Parameter: over how many disks the data are spread.
pub const STRIPES: &str = "stripes";
/// Parameter: so many bytes go to one disk before the next one's turn.
pub const STRIPE_SIZE: &str = "stripeSize";
/// Parameter: how many further copies there are.
pub const MIRRORS: &str = "mirrors";

const DEFAULT_STRIPES: u32 = 2;
const DEFAULT_STRIPE_SIZE: u64 = 64 << 10;
const DEFAULT_MIRRORS: u32 = 1;
/// What LVM 2.03 takes (lvcreate(8), lvmraid(7)).
const STRIPED: RangeInclusive<u32> = 2..=128;
const RAID10: RangeInclusive<u32> = 2..=32;
const RAID1: RangeInclusive<u32> = 1..=9;
const STRIPE_SIZES: RangeInclusive<u64> = 4 << 10..=4 << 20;

/// How a data volume lies on the disks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Wherever there is room.
    #[default]
    Linear,
    /// Spread over several disks. Lost with any of them.
    Striped {
        /// Disks.
        stripes: u32,
        /// Bytes that go to one disk before the next one's turn.
        stripe_size: u64,
    },
    /// Several copies.
    Raid1 {
        /// Copies beside the first.
        mirrors: u32,
    },
    /// Spread over several disks, with two copies of each part.
    Raid10 {
        /// Parts.
        stripes: u32,
        /// Bytes that go to one part before the next one's turn.
        stripe_size: u64,
    },
    /// In the group's thin pool, which gives it room as it is written to.
    Thin,
}

/// Parameters that were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Another layout.
    #[error("layout {0:?} is not known; known are linear, striped, raid1, raid10 and thin")]
    Unknown(String),
    /// A parameter of another layout.
    #[error("parameter {parameter} does not go with layout {layout}")]
    NotFor {
        /// The parameter.
        parameter: &'static str,
        /// The layout.
        layout: &'static str,
    },
    /// A number that is none, or out of bounds.
    #[error("{parameter} {value:?} of layout {layout} is not a number from {from} to {to}")]
    Number {
        /// The parameter.
        parameter: &'static str,
        /// What was given.
        value: String,
        /// The layout.
        layout: &'static str,
        /// The least.
        from: u32,
        /// The most.
        to: u32,
    },
    /// A stripe size that is none.
    #[error("{STRIPE_SIZE}: {0}")]
    Size(#[from] QuantityError),
    /// A stripe size that LVM does not take.
    #[error("{STRIPE_SIZE} {} is not a power of two from 4 KiB to 4 MiB", human(*.0))]
    StripeSize(u64),
}

fn number(
    parameter: &'static str,
    layout: &'static str,
    value: Option<&str>,
    default: u32,
    bounds: RangeInclusive<u32>,
) -> Result<u32, LayoutError> {
    let Some(value) = value else { return Ok(default) };
    let digits = value.bytes().all(|b| b.is_ascii_digit());
    let number = value.parse().ok().filter(|number| digits && bounds.contains(number));
    number.ok_or_else(|| LayoutError::Number {
        parameter,
        value: value.chars().take(20).collect(),
        layout,
        from: *bounds.start(),
        to: *bounds.end(),
    })
}

fn stripe_size(value: Option<&str>) -> Result<u64, LayoutError> {
    let bytes = value.map_or(Ok(DEFAULT_STRIPE_SIZE), parse_quantity)?;
    if bytes.is_power_of_two() && STRIPE_SIZES.contains(&bytes) {
        Ok(bytes)
    } else {
        Err(LayoutError::StripeSize(bytes))
    }
}

impl Layout {
    /// Reads the parameters of a StorageClass or a request.
    pub fn parse<'a>(get: impl Fn(&'static str) -> Option<&'a str>) -> Result<Self, LayoutError> {
        let name = get(LAYOUT).unwrap_or_default();
        let stripes = |layout, bounds| number(STRIPES, layout, get(STRIPES), DEFAULT_STRIPES, bounds);
        let mirrors = |layout, bounds| number(MIRRORS, layout, get(MIRRORS), DEFAULT_MIRRORS, bounds);
        let (layout, takes): (_, &[&str]) = match name {
            "" | "linear" => (Self::Linear, &[]),
            "striped" => (
                Self::Striped { stripes: stripes("striped", STRIPED)?, stripe_size: stripe_size(get(STRIPE_SIZE))? },
                &[STRIPES, STRIPE_SIZE],
            ),
            "raid1" => (Self::Raid1 { mirrors: mirrors("raid1", RAID1)? }, &[MIRRORS]),
            "raid10" => {
                // LVM has no other.
                mirrors("raid10", 1..=1)?;
                let (stripes, stripe_size) = (stripes("raid10", RAID10)?, stripe_size(get(STRIPE_SIZE))?);
                (Self::Raid10 { stripes, stripe_size }, &[STRIPES, STRIPE_SIZE, MIRRORS])
            }
            "thin" => (Self::Thin, &[]),
            other => return Err(LayoutError::Unknown(other.chars().take(40).collect())),
        };
        let unfit = [STRIPES, STRIPE_SIZE, MIRRORS].into_iter().find(|key| get(key).is_some() && !takes.contains(key));
        match unfit {
            None => Ok(layout),
            Some(parameter) => Err(LayoutError::NotFor { parameter, layout: layout.kind() }),
        }
    }

    /// The parameters that [`Layout::parse`] reads the same layout from.
    pub fn to_parameters(self) -> Vec<(&'static str, String)> {
        let mut all = vec![(LAYOUT, self.kind().to_owned())];
        match self {
            Self::Linear => all.clear(),
            Self::Striped { stripes, stripe_size } | Self::Raid10 { stripes, stripe_size } => {
                all.extend([(STRIPES, stripes.to_string()), (STRIPE_SIZE, stripe_size.to_string())]);
            }
            Self::Raid1 { mirrors } => all.push((MIRRORS, mirrors.to_string())),
            Self::Thin => {}
        }
        all
    }

    /// Its name.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Striped { .. } => "striped",
            Self::Raid1 { .. } => "raid1",
            Self::Raid10 { .. } => "raid10",
            Self::Thin => "thin",
        }
    }

    /// Whether it lies where there is room, and nothing else is to be known.
    pub fn is_linear(self) -> bool {
        self == Self::Linear
    }

    /// Among how many parts a volume's bytes are divided.
    fn parts(self) -> u64 {
        match self {
            Self::Linear | Self::Raid1 { .. } | Self::Thin => 1,
            Self::Striped { stripes, .. } | Self::Raid10 { stripes, .. } => stripes.into(),
        }
    }

    /// How many disks it takes.
    pub fn legs(self) -> usize {
        let legs = match self {
            Self::Linear | Self::Thin => 1,
            Self::Striped { stripes, .. } => stripes,
            Self::Raid1 { mirrors } => mirrors + 1,
            Self::Raid10 { stripes, .. } => stripes * 2,
        };
        usize::try_from(legs).unwrap_or(usize::MAX)
    }

    /// Whether a lost disk is no lost volume.
    pub fn is_mirrored(self) -> bool {
        matches!(self, Self::Raid1 { .. } | Self::Raid10 { .. })
    }

    /// Bytes of one stripe, which may not be more than an extent.
    pub fn stripe_size(self) -> Option<u64> {
        match self {
            Self::Linear | Self::Raid1 { .. } | Self::Thin => None,
            Self::Striped { stripe_size, .. } | Self::Raid10 { stripe_size, .. } => Some(stripe_size),
        }
    }

    /// `size` in whole extents and stripes, as LVM rounds it. None: too much.
    pub fn whole(self, size: u64, extent: u64) -> Option<u64> {
        round_up(size, extent.max(1).checked_mul(self.parts())?)
    }

    /// The least by which a volume can grow.
    pub fn step(self, extent: u64) -> u64 {
        extent.max(1).saturating_mul(self.parts())
    }

    /// Bytes of each leg of a volume of `size` bytes, in whole stripes, that is
    /// to be made: its part of the data, and what the mirrors remember.
    pub fn leg(self, size: u64, extent: u64) -> u64 {
        let data = size / self.parts();
        data.saturating_add(self.memory(data, extent))
    }

    /// Bytes of each leg that `more` bytes of a volume that is there take.
    pub fn leg_of_growth(self, more: u64) -> u64 {
        more / self.parts()
    }

    /// Bytes that a mirror needs beside each copy: two blocks of 4 KiB and a
    /// bit for each region of 2 MiB, in whole extents (LVM 2.03, raid_manip.c).
    fn memory(self, data: u64, extent: u64) -> u64 {
        if !self.is_mirrored() {
            return 0;
        }
        let bytes = (2 * 4096) + (data / (2 << 20)).div_ceil(8);
        round_up(bytes, extent.max(1)).unwrap_or(u64::MAX)
    }

    /// The largest volume for which there is room on disks with so much `free`.
    pub fn largest(self, free: &[u64], extent: u64) -> u64 {
        let extent = extent.max(1);
        let whole = |bytes: u64| bytes - bytes % extent;
        if self.is_linear() {
            return free.iter().fold(0, |sum, one| sum.saturating_add(whole(*one)));
        }
        let Some(least) = nth_largest(free, self.legs()) else { return 0 };
        whole(least).saturating_sub(self.memory(least, extent)).saturating_mul(self.parts())
    }

    /// By how much a volume can grow at most where its disks are not known.
    pub fn largest_growth(self, free: &[u64], extent: u64) -> u64 {
        let extent = extent.max(1);
        match self.is_linear() {
            true => self.largest(free, extent),
            false => {
                nth_largest(free, self.legs()).map_or(0, |least| (least - least % extent).saturating_mul(self.parts()))
            }
        }
    }

    /// What volumes can have together at most.
    pub fn total(self, free: &[u64], extent: u64) -> u64 {
        let extent = extent.max(1);
        if self.is_linear() {
            return self.largest(free, extent);
        }
        // So many rows, with an extent on each of as many disks as there are legs: no disk
        // gives more than one to a row.
        let extents: Vec<u64> = free.iter().map(|one| one / extent).collect();
        let legs = u64::try_from(self.legs()).unwrap_or(u64::MAX);
        let possible = |rows: u64| {
            let sum = extents.iter().fold(0_u64, |sum, one| sum.saturating_add(rows.min(*one)));
            sum >= rows.saturating_mul(legs)
        };
        let (mut low, mut high) = (0, extents.iter().fold(0_u64, |sum, one| sum.saturating_add(*one)) / legs.max(1));
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            if possible(middle) { low = middle } else { high = middle - 1 }
        }
        let bytes = low.saturating_mul(extent);
        let data = bytes.saturating_sub(self.memory(bytes, extent)).saturating_mul(self.parts());
        data.max(self.largest(free, extent))
    }

    /// Takes a volume of `size` bytes from what disks have free, as it would lie.
    pub fn take(self, size: u64, free: &mut [u64], extent: u64) {
        let size = self.whole(size, extent).unwrap_or(u64::MAX);
        let mut order: Vec<usize> = (0..free.len()).collect();
        order.sort_by_key(|index| std::cmp::Reverse(free[*index]));
        if self.is_linear() {
            // Where LVM will put it is not known: the largest first.
            let mut left = size;
            for index in order {
                let taken = left.min(free[index]);
                free[index] -= taken;
                left -= taken;
            }
            return;
        }
        let leg = self.leg(size, extent);
        for index in order.into_iter().take(self.legs()) {
            free[index] = free[index].saturating_sub(leg);
        }
    }

    /// Chooses a disk for each leg of `leg` bytes: those with the most room.
    pub fn place<'a>(self, disks: &[(&'a str, u64)], leg: u64) -> Result<Vec<&'a str>, Shortage> {
        let mut disks = disks.to_vec();
        disks.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(b.0)));
        let legs = self.legs();
        let fit = disks.iter().filter(|(_, free)| *free >= leg).count();
        if fit >= legs {
            return Ok(disks.into_iter().take(legs).map(|(name, _)| name).collect());
        }
        let next = disks.get(fit).map_or(0, |(_, free)| *free);
        Err(Shortage { layout: self, leg, fit, disks: disks.len(), next })
    }

    /// What lvcreate is told of it.
    pub(crate) fn arguments(self) -> Vec<String> {
        let mut all = Vec::new();
        let mut add = |option: &str, value: String| all.extend([option.to_owned(), value]);
        match self {
            // Of a thin one, what it is told depends on the group.
            Self::Linear | Self::Thin => {}
            Self::Striped { stripes, stripe_size } => {
                add("--type", "striped".to_owned());
                add("--stripes", stripes.to_string());
                add("--stripesize", format!("{stripe_size}b"));
            }
            Self::Raid1 { mirrors } => {
                add("--type", "raid1".to_owned());
                add("--mirrors", mirrors.to_string());
            }
            Self::Raid10 { stripes, stripe_size } => {
                add("--type", "raid10".to_owned());
                add("--mirrors", "1".to_owned());
                add("--stripes", stripes.to_string());
                add("--stripesize", format!("{stripe_size}b"));
            }
        }
        all
    }

    /// The kernel module that it needs and that this node does not have.
    pub fn missing_module(self) -> Option<&'static str> {
        let needs: &[&str] = match self {
            // Parts of dm-mod itself.
            Self::Linear | Self::Striped { .. } => &[],
            Self::Raid1 { .. } => &["dm-raid", "raid1"],
            Self::Raid10 { .. } => &["dm-raid", "raid10"],
            Self::Thin => &["dm-thin-pool"],
        };
        needs.iter().find(|module| !has_module(module)).copied()
    }

    /// Names of the layouts that this node's kernel has. (Thin volumes need a pool, too.)
    pub fn kinds_here() -> Vec<&'static str> {
        let (stripes, stripe_size) = (DEFAULT_STRIPES, DEFAULT_STRIPE_SIZE);
        [
            Self::Linear,
            Self::Striped { stripes, stripe_size },
            Self::Raid1 { mirrors: DEFAULT_MIRRORS },
            Self::Raid10 { stripes, stripe_size },
        ]
        .into_iter()
        .filter(|layout| layout.missing_module().is_none())
        .map(Self::kind)
        .collect()
    }
}

/// Whether the kernel has a module, or can load it.
pub(crate) fn has_module(name: &str) -> bool {
    let loaded = Path::new("/sys/module").join(name.replace('-', "_"));
    if loaded.exists() {
        return true;
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let directory = Path::new("/lib/modules").join(release.trim());
    ["modules.builtin", "modules.dep"].iter().any(|list| {
        // Lines such as `kernel/drivers/md/dm-raid.ko.xz: kernel/…`.
        let text = std::fs::read_to_string(directory.join(list)).unwrap_or_default();
        text.lines().any(|line| {
            let path = line.split(':').next().unwrap_or_default();
            path.rsplit('/').next().and_then(|file| file.split(".ko").next()) == Some(name)
        })
    })
}

fn nth_largest(free: &[u64], n: usize) -> Option<u64> {
    let mut sorted = free.to_vec();
    sorted.sort_unstable_by(|a, b| b.cmp(a));
    sorted.get(n.checked_sub(1)?).copied()
}

/// Why there is no room for the legs of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    /// What it was to be.
    pub layout: Layout,
    /// Bytes of each leg.
    pub leg: u64,
    /// How many disks have room for one.
    pub fit: usize,
    /// How many disks there are to choose from.
    pub disks: usize,
    /// What the best of the others has free.
    pub next: u64,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layout, leg, fit, disks, next } = self;
        write!(
            f,
            "{} takes {} disks (physical volumes) with {} free each, and {fit} of {disks} have that",
            layout.kind(),
            layout.legs(),
            human(*leg)
        )?;
        if disks < &layout.legs() {
            return write!(f, ": {} disks are missing", layout.legs() - disks);
        }
        write!(f, "; the next has {}: {} are missing on it", human(*next), human(leg.saturating_sub(*next)))
    }
}

impl fmt::Display for Layout {
    /// As it stands in the tag of a volume.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind())?;
        match self {
            Self::Linear | Self::Thin => Ok(()),
            Self::Striped { stripes, stripe_size } | Self::Raid10 { stripes, stripe_size } => {
                write!(f, ":{stripes}:{stripe_size}")
            }
            Self::Raid1 { mirrors } => write!(f, ":{mirrors}"),
        }
    }
}

impl FromStr for Layout {
    type Err = LayoutError;

    fn from_str(text: &str) -> Result<Self, LayoutError> {
        let mut parts = text.split(':');
        let kind = parts.next().unwrap_or_default();
        let (first, second) = (parts.next(), parts.next());
        let layout = Self::parse(|key| match (key, kind) {
            (LAYOUT, _) => Some(kind),
            (MIRRORS, "raid10") => None,
            (MIRRORS, "raid1") | (STRIPES, "striped" | "raid10") => first,
            (STRIPE_SIZE, "striped" | "raid10") => second,
            _ => None,
        })?;
        // In one way only.
        if layout.to_string() == text { Ok(layout) } else { Err(LayoutError::Unknown(text.chars().take(40).collect())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EXTENT: u64 = 4 << 20;
    const GIB: u64 = 1 << 30;

    fn parse(given: &[(&str, &str)]) -> Result<Layout, LayoutError> {
        Layout::parse(|key| given.iter().find(|(name, _)| *name == key).map(|(_, value)| *value))
    }

    const RAID10: Layout = Layout::Raid10 { stripes: 2, stripe_size: 64 << 10 };
    const RAID1: Layout = Layout::Raid1 { mirrors: 1 };
    const STRIPED3: Layout = Layout::Striped { stripes: 3, stripe_size: 64 << 10 };

    #[test]
    fn parameters_become_a_layout() {
        assert_eq!(parse(&[]), Ok(Layout::Linear));
        assert_eq!(parse(&[("layout", "raid1")]), Ok(RAID1));
        assert_eq!(parse(&[("layout", "raid1"), ("mirrors", "2")]), Ok(Layout::Raid1 { mirrors: 2 }));
        assert_eq!(parse(&[("layout", "striped"), ("stripes", "3")]), Ok(STRIPED3));
        assert_eq!(parse(&[("layout", "thin")]), Ok(Layout::Thin));
        assert_eq!(parse(&[("layout", "raid10"), ("stripeSize", "64Ki"), ("mirrors", "1")]), Ok(RAID10));
        for bad in [
            &[("layout", "raid5")][..],
            &[("layout", "RAID1")],
            &[("stripes", "2")],
            &[("layout", "linear"), ("mirrors", "1")],
            &[("layout", "raid1"), ("stripes", "2")],
            &[("layout", "raid1"), ("stripeSize", "64Ki")],
            &[("layout", "striped"), ("mirrors", "1")],
            &[("layout", "thin"), ("stripes", "2")],
            &[("layout", "raid1"), ("mirrors", "0")],
            &[("layout", "raid1"), ("mirrors", "10")],
            &[("layout", "raid10"), ("mirrors", "2")],
            &[("layout", "raid10"), ("stripes", "1")],
            &[("layout", "raid10"), ("stripes", "33")],
            &[("layout", "striped"), ("stripes", "129")],
            &[("layout", "striped"), ("stripes", "+2")],
            &[("layout", "striped"), ("stripes", "")],
            &[("layout", "striped"), ("stripeSize", "3Ki")],
            &[("layout", "striped"), ("stripeSize", "8Mi")],
            &[("layout", "striped"), ("stripeSize", "2Ki")],
            &[("layout", "striped"), ("stripeSize", "much")],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    /// As seen on LVM 2.03.16.
    #[test]
    fn legs_are_counted_as_lvm_counts_them() {
        assert_eq!(RAID1.whole(320 << 20, EXTENT), Some(320 << 20));
        assert_eq!(RAID1.leg(320 << 20, EXTENT), 324 << 20);
        assert_eq!(RAID10.whole(324 << 20, EXTENT), Some(328 << 20));
        assert_eq!(RAID10.leg(328 << 20, EXTENT), 168 << 20);
        assert_eq!(STRIPED3.whole(320 << 20, EXTENT), Some(324 << 20));
        assert_eq!(STRIPED3.leg(324 << 20, EXTENT), 108 << 20);
        assert_eq!((Layout::Raid1 { mirrors: 3 }.legs(), RAID10.legs(), STRIPED3.legs()), (4, 4, 3));
        // More than one extent where these are small.
        assert_eq!(RAID1.leg(GIB, 4 << 10) - GIB, 12 << 10);
    }

    #[test]
    fn the_disk_with_the_least_room_of_those_needed_counts() {
        let free = [4 * GIB, GIB, 2 * GIB];
        assert_eq!(Layout::Linear.largest(&free, EXTENT), 7 * GIB);
        assert_eq!(RAID1.largest(&free, EXTENT), 2 * GIB - EXTENT);
        assert_eq!(STRIPED3.largest(&free, EXTENT), 3 * GIB);
        assert_eq!(RAID10.largest(&free, EXTENT), 0);
        assert_eq!(RAID10.largest(&[GIB; 5], EXTENT), 2 * (GIB - EXTENT));
        // One more of 1 GiB fits beside the first.
        assert_eq!(RAID1.total(&free, EXTENT), 3 * GIB - EXTENT);
        assert_eq!(RAID1.total(&[9 * GIB], EXTENT), 0);
        assert_eq!(RAID1.largest(&[EXTENT, EXTENT], EXTENT), 0);
    }

    #[test]
    fn a_shortage_names_what_is_missing() {
        let disks = [("/dev/a", 4 * GIB), ("/dev/b", GIB)];
        assert_eq!(RAID1.place(&disks, GIB), Ok(vec!["/dev/a", "/dev/b"]));
        let text = RAID1.place(&disks, 2 * GIB).unwrap_err().to_string();
        assert!(text.contains("raid1 takes 2 disks") && text.contains("1 of 2 have that"), "{text}");
        assert!(text.contains("the next has 1 GiB: 1 GiB are missing on it"), "{text}");
        let text = RAID10.place(&disks, GIB).unwrap_err().to_string();
        assert!(text.contains("4 disks") && text.contains("2 disks are missing"), "{text}");
    }

    fn any_layout() -> impl Strategy<Value = Layout> {
        let size = (12_u32..=22).prop_map(|power| 1_u64 << power);
        prop_oneof![
            Just(Layout::Linear),
            (2_u32..=128, size.clone()).prop_map(|(stripes, stripe_size)| Layout::Striped { stripes, stripe_size }),
            (1_u32..=9).prop_map(|mirrors| Layout::Raid1 { mirrors }),
            (2_u32..=32, size).prop_map(|(stripes, stripe_size)| Layout::Raid10 { stripes, stripe_size }),
        ]
    }

    proptest! {
        #[test]
        fn tags_and_parameters_go_both_ways(layout in any_layout()) {
            prop_assert_eq!("thin".parse(), Ok(Layout::Thin));
            let tag = layout.to_string();
            prop_assert!(tag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b':'));
            prop_assert_eq!(tag.parse(), Ok(layout));
            let given = layout.to_parameters();
            let read = Layout::parse(|key| given.iter().find(|(name, _)| *name == key).map(|(_, value)| value.as_str()));
            prop_assert_eq!(read, Ok(layout));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[a-z0-9:]{0,20}|\\PC{0,20}") {
            if let Ok(layout) = text.parse::<Layout>() {
                prop_assert_eq!(layout.to_string(), text);
            }
        }

        /// What is said to fit can be placed, and one step more cannot.
        #[test]
        fn the_largest_volume_is_the_largest(
            layout in any_layout(), extents in proptest::collection::vec(0_u64..5000, 0..12),
        ) {
            let free: Vec<u64> = extents.iter().map(|count| count * EXTENT).collect();
            let names: Vec<String> = (0..free.len()).map(|number| number.to_string()).collect();
            let disks: Vec<(&str, u64)> = names.iter().map(String::as_str).zip(free.iter().copied()).collect();
            let largest = layout.largest(&free, EXTENT);
            prop_assert_eq!(layout.whole(largest, EXTENT), Some(largest));
            prop_assert!(layout.total(&free, EXTENT) >= largest);
            if !layout.is_linear() {
                if largest > 0 {
                    prop_assert!(layout.place(&disks, layout.leg(largest, EXTENT)).is_ok());
                }
                let more = largest + layout.step(EXTENT);
                prop_assert!(layout.place(&disks, layout.leg(more, EXTENT)).is_err());
            }
            let mut left = free.clone();
            layout.take(largest, &mut left, EXTENT);
            if largest > 0 {
                let legs = if layout.is_linear() { 1 } else { layout.legs() as u64 };
                let taken: u64 = free.iter().sum::<u64>() - left.iter().sum::<u64>();
                prop_assert_eq!(taken, layout.leg(largest, EXTENT) * legs);
            }
        }
    }
}
