//! What LVM reports, decoded into types.
//!
//! Reports are asked for as JSON, in bytes, with times as seconds since 1970
//! (lvmreport(7)). LVM prints advice in the midst of the JSON on standard
//! output: such lines are dropped and counted.

use crate::identity::{self, NEW, Owner, SnapshotOwner};
use crate::intent::Marks;
use crate::layout::{self, Layout};
use crate::names::{LvName, VgName};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// A volume group, as LVM sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeGroup {
    /// Its name.
    pub name: VgName,
    /// Bytes in all.
    pub size: u64,
    /// Bytes that LVM may allocate: none while a disk is missing, since LVM
    /// changes nothing in a group then.
    pub free: u64,
    /// Bytes of one extent.
    pub extent_size: u64,
    /// Its disks that may be allocated from, in order of name.
    pub disks: Vec<Disk>,
    /// Whether a disk of it is missing.
    pub partial: bool,
    /// What there is beside its volumes.
    pub metadata: Metadata,
    /// Bytes that may be promised of its thin pool, where it has one and that
    /// has been looked at.
    pub thin_room: Option<u64>,
}

impl VolumeGroup {
    /// What each disk has free.
    pub fn free_of_disks(&self) -> Vec<u64> {
        self.disks.iter().map(|disk| disk.free).collect()
    }
}

/// The areas on its disks where a volume group keeps what it knows of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metadata {
    /// Bytes of the smallest; half of it is used, beside a copy.
    pub size: u64,
    /// Bytes by which the group's description can still grow.
    pub free: u64,
    /// How many disks are missing; nothing can be changed then.
    pub missing_disks: u64,
}

impl Default for Metadata {
    /// One that is never full.
    fn default() -> Self {
        Self { size: u64::MAX, free: u64::MAX, missing_disks: 0 }
    }
}

/// Bytes that one volume of ours takes in the metadata of its group, with long
/// names and in several pieces.
pub const VOLUME_METADATA: u64 = 1024;
/// Bytes of metadata that new volumes leave to those that are there: for
/// growth, tags and the like.
pub const RESERVED_METADATA: u64 = 16 << 10;

/// How many more volumes of ours a metadata area takes that has so much left.
pub fn volumes_that_fit(metadata_free: u64) -> u64 {
    metadata_free.saturating_sub(RESERVED_METADATA) / VOLUME_METADATA
}

/// A physical volume.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Disk {
    /// Its device.
    pub name: String,
    /// Bytes not allocated.
    pub free: u64,
}

/// A logical volume that carries our tags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogicalVolume {
    /// Its volume group.
    pub vg: VgName,
    /// Its name.
    pub name: LvName,
    /// Bytes.
    pub size: u64,
    /// When it was made, in seconds since 1970.
    pub created: i64,
    /// Whether it has a device node.
    pub active: bool,
    /// Whether anything holds the device open: a mount in any mount namespace,
    /// a process, a device on top of it.
    pub open: bool,
    /// Who it belongs to.
    pub owner: Owner,
    /// Whether it is a log volume that has not been formatted yet.
    pub new: bool,
    /// How it was asked to lie on the disks.
    pub layout: Layout,
    /// Whether the lvcreate that made it broke off: parts of it are still to be
    /// seen, which LVM hides before it is done.
    pub half_made: bool,
    /// Whether there are snapshots that it keeps old bytes for; those of thin
    /// volumes do not count.
    pub has_snapshots: bool,
    /// What else its tags say.
    pub marks: Marks,
}

/// A report that could not be had or read.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The command failed.
    #[error(transparent)]
    Command(#[from] crate::command::CommandError),
    /// It printed something else than expected.
    #[error("cannot read the output of {report}: {reason}")]
    Unreadable {
        /// The report.
        report: &'static str,
        /// What was wrong.
        reason: String,
    },
}

/// Arguments of every report: stable, machine-readable output.
pub(crate) const FORMAT: [&str; 9] = [
    "--reportformat",
    "json",
    "--units",
    "b",
    "--nosuffix",
    "--config",
    "report/time_format=\"%s\"",
    "--ignorelockingfailure",
    "-o",
];
pub(crate) const VG_FIELDS: &str = "vg_name,vg_size,vg_extent_size,vg_attr,vg_mda_size,vg_mda_free,vg_missing_pv_count,\
                                    pv_name,pv_free,pv_missing,pv_allocatable";
pub(crate) const PV_FIELDS: &str =
    "vg_name,vg_extent_size,vg_attr,pv_name,pv_free,pv_missing,pv_allocatable,lv_name,seg_start";
pub(crate) const POOL_FIELDS: &str = "vg_name,lv_name,lv_size,lv_attr,pool_lv,data_percent,metadata_percent";
pub(crate) const SNAPSHOT_FIELDS: &str =
    "vg_name,lv_name,lv_size,lv_attr,lv_time,lv_tags,origin,origin_size,pool_lv,data_percent";
pub(crate) const LV_FIELDS: &str = "vg_name,lv_name,lv_size,lv_attr,lv_time,lv_tags";

#[derive(Deserialize)]
struct VgRow {
    vg_name: String,
    vg_size: String,
    vg_extent_size: String,
    vg_attr: String,
    vg_mda_size: String,
    vg_mda_free: String,
    vg_missing_pv_count: String,
    pv_name: String,
    pv_free: String,
    pv_missing: String,
    pv_allocatable: String,
}

#[derive(Deserialize)]
struct PvRow {
    vg_extent_size: String,
    vg_attr: String,
    pv_name: String,
    pv_free: String,
    pv_missing: String,
    pv_allocatable: String,
    lv_name: String,
    seg_start: String,
}

#[derive(Deserialize)]
struct LvRow {
    vg_name: String,
    lv_name: String,
    lv_size: String,
    lv_attr: String,
    lv_time: String,
    lv_tags: String,
}

#[derive(Deserialize)]
struct PoolRow {
    vg_name: String,
    lv_name: String,
    lv_size: String,
    lv_attr: String,
    pool_lv: String,
    data_percent: String,
    metadata_percent: String,
}

#[derive(Deserialize)]
struct Report<T> {
    #[serde(default = "Vec::new", alias = "vg", alias = "lv", alias = "pvseg", alias = "seg")]
    rows: Vec<T>,
}

#[derive(Deserialize)]
struct Document<T> {
    report: Vec<T>,
}

/// Rows of a report, and how many lines of advice stood among them.
fn rows<T: for<'de> Deserialize<'de>>(report: &'static str, stdout: &[u8]) -> Result<(Vec<T>, usize), ReportError> {
    let (sections, advice) = document::<Report<T>>(report, stdout)?;
    Ok((sections.into_iter().flat_map(|section| section.rows).collect(), advice))
}

/// The sections of a report that has several kinds of rows.
pub(crate) fn sections<T: for<'de> Deserialize<'de>>(
    report: &'static str,
    stdout: &[u8],
) -> Result<Vec<T>, ReportError> {
    Ok(document(report, stdout)?.0)
}

fn document<T: for<'de> Deserialize<'de>>(report: &'static str, stdout: &[u8]) -> Result<(Vec<T>, usize), ReportError> {
    let unreadable = |reason: String| ReportError::Unreadable { report, reason };
    let text = std::str::from_utf8(stdout).map_err(|error| unreadable(error.to_string()))?;
    let (mut json, mut advice) = (String::with_capacity(text.len()), 0);
    for line in text.lines() {
        // Every line of LVM's JSON begins with one of these; advice begins with a word.
        match line.trim_start().bytes().next() {
            None => {}
            Some(b'{' | b'}' | b'[' | b']' | b'"' | b',') => {
                json.push_str(line);
                json.push('\n');
            }
            Some(_) => advice += 1,
        }
    }
    let document: Document<T> = serde_json::from_str(&json).map_err(|error| unreadable(error.to_string()))?;
    Ok((document.report, advice))
}

pub(crate) fn number(report: &'static str, field: &str, text: &str) -> Result<u64, ReportError> {
    text.trim()
        .parse()
        .map_err(|_| ReportError::Unreadable { report, reason: format!("{field} is {text:?}, not a number") })
}

/// The disk of a row, where LVM may allocate from it.
fn disk(
    report: &'static str,
    name: &str,
    free: &str,
    missing: &str,
    allocatable: &str,
) -> Result<Option<Disk>, ReportError> {
    if !missing.is_empty() || allocatable.is_empty() {
        return Ok(None);
    }
    Ok(Some(Disk { name: name.to_owned(), free: number(report, "pv_free", free)? }))
}

/// vgs(8): the fourth letter of vg_attr.
fn is_partial(attr: &str) -> bool {
    attr.as_bytes().get(3) == Some(&b'p')
}

/// Decodes the output of `vgs`, which has a row for each disk.
pub fn volume_groups(stdout: &[u8]) -> Result<Vec<VolumeGroup>, ReportError> {
    let report = "vgs";
    let (rows, _) = rows::<VgRow>(report, stdout)?;
    let mut groups = BTreeMap::new();
    for row in rows {
        let name = VgName::parse(&row.vg_name)
            .map_err(|error| ReportError::Unreadable { report, reason: error.to_string() })?;
        let group = groups.entry(name.clone()).or_insert(VolumeGroup {
            name,
            size: number(report, "vg_size", &row.vg_size)?,
            free: 0,
            extent_size: number(report, "vg_extent_size", &row.vg_extent_size)?,
            disks: Vec::new(),
            partial: is_partial(&row.vg_attr),
            metadata: Metadata {
                size: number(report, "vg_mda_size", &row.vg_mda_size)?,
                free: number(report, "vg_mda_free", &row.vg_mda_free)?,
                missing_disks: number(report, "vg_missing_pv_count", &row.vg_missing_pv_count)?,
            },
            thin_room: None,
        });
        group.disks.extend(disk(report, &row.pv_name, &row.pv_free, &row.pv_missing, &row.pv_allocatable)?);
    }
    let finished = |mut group: VolumeGroup| {
        if group.partial {
            group.disks.clear();
        }
        // LVM lists them in any order.
        group.disks.sort_unstable();
        group.free = group.disks.iter().fold(0, |sum, disk| sum.saturating_add(disk.free));
        group
    };
    Ok(groups.into_values().map(finished).collect())
}

/// Whether a name ends so that it is of a part of a mirrored volume.
pub(crate) fn is_part(end: &str) -> bool {
    let number = end.strip_prefix("_rmeta_").or_else(|| end.strip_prefix("_rimage_"));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

/// A snapshot of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Volume group.
    pub vg: VgName,
    /// Its name.
    pub name: LvName,
    /// Whose it is.
    pub owner: SnapshotOwner,
    /// The logical volume that it is of. None: that has gone, and the snapshot
    /// is thin.
    pub of: Option<LvName>,
    /// Bytes of what it shows.
    pub size: u64,
    /// Bytes that it has for what is overwritten; 0: it is thin.
    pub room: u64,
    /// Percent of that which is used, or, of a thin one, of what it shows that
    /// was ever written. Not known while it is not active.
    pub used_percent: Option<u64>,
    /// When it was made, in seconds since 1970.
    pub created: i64,
    /// The pool of a thin one.
    pub pool: Option<LvName>,
    /// Whether its device is there.
    pub active: bool,
    /// Whether it is held open.
    pub open: bool,
    /// Whether what it showed is no longer known, since its room was used up.
    pub lost: bool,
    /// Of a raw device.
    pub block: bool,
}

#[derive(Deserialize)]
struct SnapshotRow {
    vg_name: String,
    lv_name: String,
    lv_size: String,
    lv_attr: String,
    lv_time: String,
    lv_tags: String,
    origin: String,
    origin_size: String,
    pool_lv: String,
    data_percent: String,
}

/// Decodes the output of `lvs` on snapshots. Those that are not ours are left out.
pub fn snapshots(stdout: &[u8]) -> Result<Vec<Snapshot>, ReportError> {
    let report = "lvs";
    let (rows, _) = rows::<SnapshotRow>(report, stdout)?;
    let mut snapshots = Vec::new();
    for row in rows {
        let tags = || row.lv_tags.split(',').filter(|tag| !tag.is_empty());
        let all: Vec<&str> = tags().collect();
        let Some(owner) = SnapshotOwner::from_tags(all.iter().copied()) else { continue };
        let unreadable = |error: crate::names::NameError| ReportError::Unreadable { report, reason: error.to_string() };
        let name = |text: &str| match text {
            "" => Ok(None),
            text => LvName::parse(text).map(Some).map_err(unreadable),
        };
        let attr = row.lv_attr.as_bytes();
        let pool = name(&row.pool_lv)?;
        let has = number(report, "lv_size", &row.lv_size)?;
        let (size, room) = match pool {
            Some(_) => (has, 0),
            None => (number(report, "origin_size", &row.origin_size)?, has),
        };
        snapshots.push(Snapshot {
            vg: VgName::parse(&row.vg_name).map_err(unreadable)?,
            name: LvName::parse(&row.lv_name).map_err(unreadable)?,
            owner,
            of: name(&row.origin)?,
            size,
            room,
            used_percent: row.data_percent.split('.').next().and_then(|whole| whole.parse().ok()),
            created: i64::try_from(number(report, "lv_time", &row.lv_time)?).unwrap_or(i64::MAX),
            pool,
            // lvs(8): a lost one is (I)nvalid, or (S) where it is suspended too.
            active: matches!(attr.get(4), Some(b'a' | b'I')),
            open: attr.get(5) != Some(&b'-'),
            lost: matches!(attr.get(4), Some(b'I' | b'S')),
            block: Marks::from_tags(all.iter().copied()).intent.block,
        });
    }
    Ok(snapshots)
}

/// The snapshots, whoever's they are, that a volume which is not thin keeps old
/// bytes for, from the same output.
pub(crate) fn snapshots_on(stdout: &[u8], of: &LvName) -> Result<Vec<String>, ReportError> {
    let (rows, _) = rows::<SnapshotRow>("lvs", stdout)?;
    let is_on = |row: &SnapshotRow| row.origin == of.as_str() && row.pool_lv.is_empty();
    Ok(rows.into_iter().filter(is_on).map(|row| row.lv_name).collect())
}

/// Decodes the output of `lvs`. Volumes that are not ours are left out, and so
/// are the parts of volumes.
pub fn volumes(stdout: &[u8]) -> Result<Vec<LogicalVolume>, ReportError> {
    let report = "lvs";
    let (rows, _) = rows::<LvRow>(report, stdout)?;
    // LVM hides the parts of a volume, but for those that it is just making.
    // They have the volume's tags.
    let whole_of = |row: &LvRow| {
        let (whole, _) =
            row.lv_name.rmatch_indices('_').map(|(at, _)| row.lv_name.split_at(at)).find(|(_, end)| is_part(end))?;
        Some((row.vg_name.clone(), whole.to_owned()))
    };
    let half_made: BTreeSet<(String, String)> = rows.iter().filter_map(whole_of).collect();
    let mut volumes = Vec::new();
    for row in rows.iter().filter(|row| whole_of(row).is_none()) {
        let tags = || row.lv_tags.split(',').filter(|tag| !tag.is_empty());
        let Some(owner) = Owner::from_tags(tags()) else { continue };
        let unreadable = |error: crate::names::NameError| ReportError::Unreadable { report, reason: error.to_string() };
        // lvs(8): the fifth letter of lv_attr is the state, the sixth whether the device is open.
        let attr = row.lv_attr.as_bytes();
        volumes.push(LogicalVolume {
            vg: VgName::parse(&row.vg_name).map_err(unreadable)?,
            name: LvName::parse(&row.lv_name).map_err(unreadable)?,
            size: number(report, "lv_size", &row.lv_size)?,
            created: i64::try_from(number(report, "lv_time", &row.lv_time)?).unwrap_or(i64::MAX),
            active: attr.get(4) == Some(&b'a'),
            // Unknown counts as open: nothing is removed on a guess.
            open: attr.get(5) != Some(&b'-'),
            owner,
            new: tags().any(|tag| tag == NEW),
            layout: identity::layout_of(tags()),
            has_snapshots: matches!(attr.first(), Some(b'o' | b'O')),
            half_made: half_made.contains(&(row.vg_name.clone(), row.lv_name.clone())),
            marks: Marks::from_tags(tags()),
        });
    }
    Ok(volumes)
}

/// How much of a thin pool is promised and used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PoolUse {
    /// Its group.
    pub vg: String,
    /// Its name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Bytes that its volumes have together.
    pub promised: u64,
    /// Percent of its data that is used, where it is active.
    pub data: Option<u64>,
    /// Percent of its metadata.
    pub metadata: Option<u64>,
    /// Whether it zeroes what it hands out.
    pub zeroes: bool,
}

/// Decodes the output of `lvs` for thin pools, whoever has made their volumes.
pub(crate) fn pools(stdout: &[u8]) -> Result<Vec<PoolUse>, ReportError> {
    let report = "lvs";
    let (rows, _) = rows::<PoolRow>(report, stdout)?;
    let percent = |text: &str| text.split('.').next().and_then(|whole| whole.parse().ok());
    let mut pools = Vec::new();
    // lvs(8): the first letter of lv_attr is the type, the eighth whether new blocks are zeroed.
    for row in rows.iter().filter(|row| row.lv_attr.starts_with('t')) {
        let mut promised = 0_u64;
        for volume in rows.iter().filter(|one| one.vg_name == row.vg_name && one.pool_lv == row.lv_name) {
            promised = promised.saturating_add(number(report, "lv_size", &volume.lv_size)?);
        }
        pools.push(PoolUse {
            vg: row.vg_name.clone(),
            name: row.lv_name.clone(),
            size: number(report, "lv_size", &row.lv_size)?,
            promised,
            data: percent(&row.data_percent),
            metadata: percent(&row.metadata_percent),
            zeroes: row.lv_attr.as_bytes().get(7) == Some(&b'z'),
        });
    }
    Ok(pools)
}

/// The disks of one group, and which of them a volume lies on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disks {
    /// Bytes of one extent.
    pub extent_size: u64,
    /// Whether one is missing.
    pub partial: bool,
    /// Those that may be allocated from, in order of name.
    pub disks: Vec<Disk>,
    /// For each copy of a mirrored volume, the disks of its data in their order.
    pub legs: Vec<Vec<String>>,
}

/// Decodes the output of `pvs --segments` for one group, and looks for the
/// volume `lv`.
pub(crate) fn disks(stdout: &[u8], lv: &LvName) -> Result<Disks, ReportError> {
    let report = "pvs";
    let (rows, _) = rows::<PvRow>(report, stdout)?;
    let first =
        rows.first().ok_or_else(|| ReportError::Unreadable { report, reason: "there is no disk in it".to_owned() })?;
    let extent_size = number(report, "vg_extent_size", &first.vg_extent_size)?;
    let partial = is_partial(&first.vg_attr);
    let (mut disks, mut legs) = (BTreeSet::new(), BTreeMap::<u32, BTreeMap<u64, String>>::new());
    let image = format!("[{lv}_rimage_");
    for row in &rows {
        disks.extend(disk(report, &row.pv_name, &row.pv_free, &row.pv_missing, &row.pv_allocatable)?);
        let leg = row.lv_name.strip_prefix(&image).and_then(|rest| rest.strip_suffix(']')?.parse().ok());
        if let Some(leg) = leg {
            let start = number(report, "seg_start", &row.seg_start)?;
            legs.entry(leg).or_default().insert(start, row.pv_name.clone());
        }
    }
    let legs = legs.into_values().map(|segments| segments.into_values().collect()).collect();
    Ok(Disks { extent_size, partial, disks: disks.into_iter().collect(), legs })
}

pub(crate) const MADE_FIELDS: &str = "lv_name,segtype,stripes,stripe_size,pool_lv";

#[derive(Deserialize)]
struct MadeRow {
    lv_name: String,
    segtype: String,
    stripes: String,
    stripe_size: String,
    pool_lv: String,
}

/// How a volume lies on its disks, whoever made it, as far as that is a layout
/// of ours: all its segments are of one. `pool`: the group's thin pool.
pub(crate) fn made_as(stdout: &[u8], lv: &LvName, pool: Option<&LvName>) -> Result<Layout, ReportError> {
    let (rows, _) = rows::<MadeRow>("lvs", stdout)?;
    let layout = |row: &MadeRow| {
        let images: u32 = row.stripes.trim().parse().ok()?;
        let number = match row.segtype.as_str() {
            "striped" => images,
            "raid1" => images.checked_sub(1)?,
            "raid10" => images / 2,
            "linear" => return Some(Layout::Linear),
            "thin" => return pool.filter(|pool| row.pool_lv == pool.as_str()).map(|_| Layout::Thin),
            _ => return None,
        };
        let number = number.to_string();
        let is_mirror = row.segtype == "raid1";
        let parameter = |key: &'static str| match key {
            layout::LAYOUT => Some(row.segtype.as_str()),
            layout::MIRRORS if is_mirror => Some(number.as_str()),
            layout::STRIPES if !is_mirror => Some(number.as_str()),
            layout::STRIPE_SIZE if !is_mirror => Some(row.stripe_size.trim()),
            _ => None,
        };
        Layout::parse(parameter).ok()
    };
    let mut all = rows.iter().filter(|row| row.lv_name == lv.as_str()).map(layout);
    let first = all.next().flatten().unwrap_or_default();
    Ok(if all.all(|other| other == Some(first)) { first } else { Layout::default() })
}

/// A logical volume, whoever made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnyVolume {
    /// Its name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// As lvs(8) has it.
    pub attr: String,
    /// All its tags.
    pub tags: Vec<String>,
}

/// Decodes the output of `lvs`, with volumes that are not ours.
pub fn any_volumes(stdout: &[u8]) -> Result<Vec<AnyVolume>, ReportError> {
    let report = "lvs";
    let (rows, _) = rows::<LvRow>(report, stdout)?;
    let volume = |row: LvRow| {
        Ok(AnyVolume {
            size: number(report, "lv_size", &row.lv_size)?,
            tags: row.lv_tags.split(',').filter(|tag| !tag.is_empty()).map(str::to_owned).collect(),
            name: row.lv_name,
            attr: row.lv_attr,
        })
    };
    rows.into_iter().map(volume).collect()
}

pub(crate) const SEGMENT_FIELDS: &str = "lv_name,segtype,seg_pe_ranges";

#[derive(Deserialize)]
struct SegmentRow {
    lv_name: String,
    segtype: String,
    seg_pe_ranges: String,
}

/// One piece of a logical volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// The volume's name, whoever made it.
    pub lv: String,
    /// `linear`, `striped`, …
    pub kind: String,
    /// Where its extents are: `/dev/sda:0-79`, as lvextend(8) takes them.
    pub ranges: Vec<String>,
}

/// Decodes the output of `lvs --segments`.
pub fn segments(stdout: &[u8]) -> Result<Vec<Segment>, ReportError> {
    let report = "lvs";
    let (rows, _) = rows::<SegmentRow>(report, stdout)?;
    let is_range = |range: &str| {
        let (device, extents) = range.rsplit_once(':').unwrap_or_default();
        let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        device.starts_with("/dev/") && extents.split_once('-').is_some_and(|(from, to)| number(from) && number(to))
    };
    let mut segments = Vec::with_capacity(rows.len());
    for row in rows {
        let ranges: Vec<String> = row.seg_pe_ranges.split_whitespace().map(str::to_owned).collect();
        if matches!(row.segtype.as_str(), "linear" | "striped") && !ranges.iter().all(|range| is_range(range)) {
            let reason = format!("seg_pe_ranges is {:?}", row.seg_pe_ranges);
            return Err(ReportError::Unreadable { report, reason });
        }
        segments.push(Segment { lv: row.lv_name, kind: row.segtype, ranges });
    }
    Ok(segments)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_was_made_by_hand_is_known_by_its_segments() {
        let made = |segments: &[(&str, u32, u64)]| {
            let rows: Vec<String> = segments
                .iter()
                .map(|(kind, stripes, size)| {
                    format!(
                        r#"{{"lv_name":"mysql","segtype":"{kind}","stripes":"{stripes}","stripe_size":"{size}","pool_lv":"pool0"}}"#
                    )
                })
                .collect();
            let json = format!("{{\"report\":[{{\"seg\":[{}]}}]}}", rows.join(",\n"));
            let pool = LvName::parse("pool0").unwrap();
            made_as(json.as_bytes(), &LvName::parse("mysql").unwrap(), Some(&pool)).unwrap().to_string()
        };
        for (segments, layout) in [
            (&[("linear", 1, 0)][..], "linear"),
            (&[("linear", 1, 0), ("linear", 1, 0)], "linear"),
            (&[("raid1", 2, 0)], "raid1:1"),
            (&[("raid1", 3, 0), ("raid1", 3, 0)], "raid1:2"),
            (&[("striped", 3, 65536)], "striped:3:65536"),
            (&[("raid10", 4, 65536)], "raid10:2:65536"),
            (&[("thin", 0, 0)], "thin"),
            // Of neither kind, or of none of ours.
            (&[("striped", 2, 65536), ("linear", 1, 0)], "linear"),
            (&[("raid5", 3, 65536)], "linear"),
        ] {
            assert_eq!(made(segments), layout, "{segments:?}");
        }
    }

    #[test]
    fn groups_as_lvm_prints_them() {
        let groups = volume_groups(include_bytes!("../captures/vgs.json")).unwrap();
        let [group] = groups.as_slice() else { panic!("{groups:?}") };
        assert_eq!(group.name.as_str(), "vg0");
        assert_eq!((group.size, group.extent_size), (21_453_864_960, 4 << 20));
        assert_eq!(group.free, group.size);
        assert_eq!(group.disks, [Disk { name: "/dev/ubdb".into(), free: group.size }]);
        assert!(!group.partial);
    }

    #[test]
    fn a_group_without_one_of_its_disks_has_nothing_free() {
        let groups = volume_groups(include_bytes!("../captures/vgs-partial.json")).unwrap();
        let seen: Vec<_> = groups.iter().map(|group| (group.name.as_str(), group.partial, group.free)).collect();
        assert_eq!(seen, [("vg0", false, 21_453_864_960), ("vg1", true, 0)]);
        assert_eq!((groups[1].size, &groups[1].disks[..]), (3_208_642_560, &[][..]));
        // Nor does LVM allocate from a disk that an admin has closed.
        let closed =
            String::from_utf8_lossy(include_bytes!("../captures/vgs-partial.json")).replace("wz-pn-", "wz--n-");
        let open: Vec<Disk> = volume_groups(closed.as_bytes()).unwrap().remove(1).disks;
        assert_eq!(open, [Disk { name: "/dev/ubdd".into(), free: 0 }]);
    }

    #[test]
    fn a_mirrored_volume_is_one_and_half_of_one_is_known() {
        let whole = volumes(include_bytes!("../captures/lvs-raid.json")).unwrap();
        let half = volumes(include_bytes!("../captures/lvs-half-made.json")).unwrap();
        for (volumes, half_made) in [(whole, false), (half, true)] {
            let [volume] = volumes.as_slice() else { panic!("{volumes:?}") };
            assert_eq!(volume.name.as_str(), "pvc-0f0e7f0a-1111-4222-8333-444455556666");
            assert_eq!((volume.size, volume.layout), (320 << 20, Layout::Raid1 { mirrors: 1 }));
            assert_eq!(volume.half_made, half_made);
        }
    }

    #[test]
    fn the_disks_of_each_copy_are_found() {
        let lv = LvName::parse("pvc-0f0e7f0a-1111-4222-8333-444455556666").unwrap();
        let report = include_bytes!("../captures/pvs.json");
        let found = disks(report, &lv).unwrap();
        let names: Vec<&str> = found.disks.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(names, ["/dev/ubdc", "/dev/ubdd", "/dev/ubde"]);
        assert_eq!((found.extent_size, found.partial, found.disks[0].free), (4 << 20, false, 394_264_576));
        assert_eq!(found.legs, [["/dev/ubdc"], ["/dev/ubdd"]]);
        assert!(disks(report, &LvName::parse("between").unwrap()).unwrap().legs.is_empty());
        assert!(disks(br#"{"report":[{"pvseg":[]}]}"#, &lv).is_err());
    }

    #[test]
    fn only_volumes_of_ours_are_seen_with_their_state() {
        let volumes = volumes(include_bytes!("../captures/lvs.json")).unwrap();
        let seen: Vec<_> = volumes.iter().map(|lv| (lv.name.as_str(), lv.active, lv.open)).collect();
        assert_eq!(
            seen,
            [("log-0011223344556677", false, false), ("pvc-0f0e7f0a-1111-4222-8333-444455556666", true, true),]
        );
        assert!(matches!(&volumes[0].owner, Owner::Log { volume, .. } if volume.as_str() == "web-logs"));
        assert_eq!((volumes[0].size, volumes[0].created), (320 << 20, 1_795_555_907));
    }

    #[test]
    fn a_pool_has_promised_what_its_volumes_may_come_to_have() {
        let found = pools(include_bytes!("../captures/lvs-thin.json")).unwrap();
        let [pool] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!((pool.vg.as_str(), pool.name.as_str(), pool.size), ("vg1", "pool0", 1 << 30));
        assert_eq!((pool.promised, pool.data, pool.metadata, pool.zeroes), (640 << 20, Some(6), Some(11), true));
    }

    #[test]
    fn a_group_without_volumes_is_no_error() {
        assert_eq!(volumes(include_bytes!("../captures/lvs-empty.json")).unwrap(), []);
    }

    /// LVM prints advice between the lines of its JSON.
    #[test]
    fn advice_amid_the_json_is_dropped_and_counted() {
        let (rows, advice) = rows::<LvRow>("lvs", include_bytes!("../captures/lvs-missing-group.json")).unwrap();
        assert!(rows.is_empty());
        assert_eq!(advice, 2);
        let warned = String::from_utf8_lossy(include_bytes!("../captures/vgs.json"))
            .replace("      \"report\"", "  WARNING: VG vg0 was previously updated while missing.\n      \"report\"");
        assert_eq!(volume_groups(warned.as_bytes()).unwrap().len(), 1);
    }

    #[test]
    fn what_is_no_report_is_an_error_and_not_an_empty_list() {
        for bad in
            [&b""[..], b"{}", b"{\"report\":{}}", b"Volume group not found", b"\xff", b"{\"report\":[{\"lv\":[{}]}]}"]
        {
            assert!(volumes(bad).is_err(), "{bad:?}");
        }
        let text = String::from_utf8_lossy(include_bytes!("../captures/vgs.json")).replace("21453864960", "<20.00g");
        assert!(volume_groups(text.as_bytes()).is_err());
    }

    #[test]
    fn segments_say_where_they_are() {
        let text = |ranges: &str| {
            format!(r#"{{"report":[{{"seg":[{{"lv_name":"a","segtype":"linear","seg_pe_ranges":"{ranges}"}}]}}]}}"#)
        };
        let found = segments(text("/dev/ubdb:0-79 /dev/sd:x:3-3").as_bytes()).unwrap();
        assert_eq!(found[0].ranges, ["/dev/ubdb:0-79", "/dev/sd:x:3-3"]);
        for bad in ["sda:0-1", "/dev/sda", "/dev/sda:0", "/dev/sda:a-1", "--yes"] {
            assert!(segments(text(bad).as_bytes()).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_output_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = segments(&bytes);
            let _ = volumes(&bytes);
            let _ = volume_groups(&bytes);
            let _ = pools(&bytes);
            let _ = disks(&bytes, &LvName::parse("pvc-1").unwrap());
        }
    }
}
