//! What LVM reports, decoded into types.
//!
//! Reports are asked for as JSON, in bytes, with times as seconds since 1970
//! (lvmreport(7)). LVM prints advice in the midst of the JSON on standard
//! output: such lines are dropped and counted.

use crate::identity::{NEW, Owner};
use crate::names::{LvName, VgName};
use serde::Deserialize;

/// A volume group, as LVM sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeGroup {
    /// Its name.
    pub name: VgName,
    /// Bytes in all.
    pub size: u64,
    /// Bytes not allocated.
    pub free: u64,
    /// Bytes of one extent.
    pub extent_size: u64,
    /// What there is beside its volumes.
    pub metadata: Metadata,
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
pub(crate) const VG_FIELDS: &str = "vg_name,vg_size,vg_free,vg_extent_size,vg_mda_size,vg_mda_free,vg_missing_pv_count";
pub(crate) const LV_FIELDS: &str = "vg_name,lv_name,lv_size,lv_attr,lv_time,lv_tags";

#[derive(Deserialize)]
struct VgRow {
    vg_name: String,
    vg_size: String,
    vg_free: String,
    vg_extent_size: String,
    vg_mda_size: String,
    vg_mda_free: String,
    vg_missing_pv_count: String,
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
struct Report<T> {
    #[serde(default = "Vec::new", alias = "vg", alias = "lv")]
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

/// Decodes the output of `vgs`.
pub fn volume_groups(stdout: &[u8]) -> Result<Vec<VolumeGroup>, ReportError> {
    let report = "vgs";
    let (rows, _) = rows::<VgRow>(report, stdout)?;
    let mut groups = Vec::with_capacity(rows.len());
    for row in rows {
        let name = VgName::parse(&row.vg_name)
            .map_err(|error| ReportError::Unreadable { report, reason: error.to_string() })?;
        groups.push(VolumeGroup {
            name,
            size: number(report, "vg_size", &row.vg_size)?,
            free: number(report, "vg_free", &row.vg_free)?,
            extent_size: number(report, "vg_extent_size", &row.vg_extent_size)?,
            metadata: Metadata {
                size: number(report, "vg_mda_size", &row.vg_mda_size)?,
                free: number(report, "vg_mda_free", &row.vg_mda_free)?,
                missing_disks: number(report, "vg_missing_pv_count", &row.vg_missing_pv_count)?,
            },
        });
    }
    Ok(groups)
}

/// Decodes the output of `lvs`. Volumes that are not ours are left out.
pub fn volumes(stdout: &[u8]) -> Result<Vec<LogicalVolume>, ReportError> {
    let report = "lvs";
    let (rows, _) = rows::<LvRow>(report, stdout)?;
    let mut volumes = Vec::new();
    for row in rows {
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
        });
    }
    Ok(volumes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn groups_as_lvm_prints_them() {
        let groups = volume_groups(include_bytes!("../captures/vgs.json")).unwrap();
        let [group] = groups.as_slice() else { panic!("{groups:?}") };
        assert_eq!(group.name.as_str(), "vg0");
        assert_eq!((group.size, group.extent_size), (21_470_642_176, 4 << 20));
        assert_eq!(group.free, group.size);
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
        let text = String::from_utf8_lossy(include_bytes!("../captures/vgs.json")).replace("21470642176", "<20.00g");
        assert!(volume_groups(text.as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn any_output_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = volumes(&bytes);
            let _ = volume_groups(&bytes);
        }
    }
}
