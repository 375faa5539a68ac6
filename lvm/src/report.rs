//! What LVM reports, decoded into types.
//!
//! Reports are asked for as JSON, in bytes, with times as seconds since 1970
//! (lvmreport(7)). LVM prints advice in the midst of the JSON on standard
//! output: such lines are dropped and counted.

use crate::identity::{NEW, Owner};
use crate::intent::Marks;
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
pub(crate) const VG_FIELDS: &str = "vg_name,vg_size,vg_free,vg_extent_size";
pub(crate) const LV_FIELDS: &str = "vg_name,lv_name,lv_size,lv_attr,lv_time,lv_tags";

#[derive(Deserialize)]
struct VgRow {
    vg_name: String,
    vg_size: String,
    vg_free: String,
    vg_extent_size: String,
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
    #[serde(default = "Vec::new", alias = "vg", alias = "lv", alias = "seg")]
    rows: Vec<T>,
}

#[derive(Deserialize)]
struct Document<T> {
    report: Vec<Report<T>>,
}

/// Rows of a report, and how many lines of advice stood among them.
fn rows<T: for<'de> Deserialize<'de>>(report: &'static str, stdout: &[u8]) -> Result<(Vec<T>, usize), ReportError> {
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
    Ok((document.report.into_iter().flat_map(|r| r.rows).collect(), advice))
}

fn number(report: &'static str, field: &str, text: &str) -> Result<u64, ReportError> {
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
            marks: Marks::from_tags(tags()),
        });
    }
    Ok(volumes)
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
        if row.segtype == "linear" && !ranges.iter().all(|range| is_range(range)) {
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
        }
    }
}
