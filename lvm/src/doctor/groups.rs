//! Volume groups, their disks and volumes, as one report shows them.

use super::Finding;
use super::settings::Settings;
use crate::identity::{NEW, Owner};
use crate::names::VgName;
use crate::report::{self, ReportError};
use crate::size::human;
use serde::Deserialize;

/// Arguments that say what `lvm fullreport` shows.
pub const FIELDS: [&str; 21] = [
    "--configreport",
    "vg",
    "-o",
    "vg_name,vg_mda_free,vg_mda_size,vg_missing_pv_count",
    "--configreport",
    "pv",
    "-o",
    "pv_name,pv_uuid,pv_missing",
    "--configreport",
    "lv",
    "-a",
    "-o",
    "lv_name,lv_attr,lv_time,lv_tags,lv_layout,lv_size,lv_health_status,data_percent,metadata_percent,pool_lv",
    // Not asked for, and cannot be left out.
    "--configreport",
    "pvseg",
    "-o",
    "pvseg_start",
    "--configreport",
    "seg",
    "-o",
    "seg_start",
];

/// From this share on a thin pool is told of: in percent.
const POOL_WARNING: f64 = 80.0;
/// From this share on it is about to stop every volume in it.
const POOL_ERROR: f64 = 95.0;
/// From this share on a snapshot is told of: in percent.
const SNAPSHOT_WARNING: f64 = 80.0;
/// A log volume is formatted in seconds.
const LONGEST_MKFS: i64 = 600;

/// A group, and what is in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// Its name.
    pub name: VgName,
    /// Bytes by which its metadata can still grow.
    pub metadata_free: u64,
    /// Bytes of its smallest metadata area.
    pub metadata_size: u64,
    /// How many of its disks are not there.
    pub missing: u64,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Its volumes, hidden ones too.
    pub volumes: Vec<Volume>,
}

/// A physical volume.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Disk {
    #[serde(rename = "pv_name")]
    pub name: String,
    #[serde(rename = "pv_uuid")]
    pub uuid: String,
    #[serde(rename = "pv_missing")]
    missing: String,
}

/// A logical volume.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Volume {
    #[serde(rename = "lv_name")]
    pub name: String,
    #[serde(rename = "lv_attr")]
    attr: String,
    #[serde(rename = "lv_time")]
    time: String,
    #[serde(rename = "lv_tags")]
    tags: String,
    #[serde(rename = "lv_layout")]
    pub layout: String,
    #[serde(rename = "lv_size")]
    size: String,
    #[serde(rename = "lv_health_status")]
    health: String,
    data_percent: String,
    metadata_percent: String,
    pool_lv: String,
}

#[derive(Deserialize)]
struct VgRow {
    vg_name: String,
    vg_mda_free: String,
    vg_mda_size: String,
    vg_missing_pv_count: String,
}

#[derive(Deserialize)]
struct Section {
    #[serde(default)]
    vg: Vec<VgRow>,
    #[serde(default)]
    pv: Vec<Disk>,
    #[serde(default)]
    lv: Vec<Volume>,
}

impl Volume {
    fn is_ours(&self) -> bool {
        Owner::from_tags(self.tags.split(',')).is_some()
    }

    fn is_new(&self) -> bool {
        self.tags.split(',').any(|tag| tag == NEW)
    }

    /// When it was made, in seconds since 1970; 0: not known.
    pub fn made(&self) -> i64 {
        self.time.trim().parse().unwrap_or(0)
    }

    /// The letter of `lv_attr` at this place (lvs(8)).
    fn letter(&self, at: usize) -> u8 {
        self.attr.as_bytes().get(at).copied().unwrap_or(b'-')
    }

    /// Whether the layout has this word.
    pub fn is(&self, word: &str) -> bool {
        self.layout.split(',').any(|part| part == word)
    }

    pub fn is_thin_pool(&self) -> bool {
        self.is("thin") && self.is("pool")
    }
}

/// Reads what `lvm fullreport` printed.
pub fn parse(stdout: &[u8]) -> Result<Vec<Group>, ReportError> {
    let report = "fullreport";
    let mut groups = Vec::new();
    for section in report::sections::<Section>(report, stdout)? {
        for row in &section.vg {
            let name = VgName::parse(&row.vg_name)
                .map_err(|error| ReportError::Unreadable { report, reason: error.to_string() })?;
            groups.push(Group {
                name,
                metadata_free: report::number(report, "vg_mda_free", &row.vg_mda_free)?,
                metadata_size: report::number(report, "vg_mda_size", &row.vg_mda_size)?,
                missing: report::number(report, "vg_missing_pv_count", &row.vg_missing_pv_count)?,
                disks: section.pv.clone(),
                // Hidden volumes stand in brackets.
                volumes: section
                    .lv
                    .iter()
                    .map(|lv| Volume { name: lv.name.trim_matches(['[', ']']).to_owned(), ..lv.clone() })
                    .collect(),
            });
        }
    }
    Ok(groups)
}

/// What is wrong with one group.
pub fn look(group: &Group, settings: &Settings, now: i64, found: &mut Vec<Finding>) {
    let vg = &group.name;
    found.extend(metadata(vg, group.metadata_free, group.metadata_size));
    let gone = group.disks.iter().filter(|disk| !disk.missing.is_empty());
    let gone: Vec<&str> = gone.map(|disk| disk.uuid.as_str()).collect();
    found.extend(partial(vg, group.missing, &gone));
    for volume in &group.volumes {
        look_at_state(vg, volume, found);
        found.extend(filling(vg, volume));
        if volume.is_new() && volume.is_ours() && volume.made() + LONGEST_MKFS < now {
            found.push(Finding::warning(
                "volume-half-made",
                format!("logical volume {vg}/{}", volume.name),
                "the log volume was made and never formatted",
                "the next pod that mounts it has it formatted; if none will, remove it: `lvprov gc` lists it, or `lvremove`",
            ));
        }
        if volume.is_thin_pool() {
            look_at_pool(group, volume, settings, found);
        }
    }
}

/// Whether a group's metadata area fills up.
pub fn metadata(vg: &VgName, free: u64, size: u64) -> Option<Finding> {
    let more = report::volumes_that_fit(free);
    // Both halves hold a copy.
    let tenth = size / 2 / 10;
    let problem = format!(
        "its metadata area has room for about {more} more volumes ({} of {} free)",
        human(free),
        human(size / 2)
    );
    let remedy = "a metadata area cannot be enlarged: remove volumes that are not needed (`lvprov gc`), or make a group \
                  with a larger one (`lvprov vg create`) on other disks for what comes";
    let object = format!("volume group {vg}");
    match () {
        () if more == 0 => Some(Finding::error(
            "metadata-full",
            object,
            "its metadata area is full: no volume can be made in it",
            remedy,
        )),
        () if free < tenth || more < 100 => Some(Finding::warning("metadata-low", object, problem, remedy)),
        () => None,
    }
}

/// Whether disks of a group are missing; `gone`: their UUIDs, where they are known.
pub fn partial(vg: &VgName, missing: u64, gone: &[&str]) -> Option<Finding> {
    if missing == 0 {
        return None;
    }
    let which = if gone.is_empty() { String::new() } else { format!(" (PV UUID {})", gone.join(", ")) };
    Some(Finding::error(
        "disk-missing",
        format!("volume group {vg}"),
        format!("{missing} of its disks are missing{which}; nothing can be changed in it"),
        "attach the disks again, or see that no filter hides them; what was on one that never comes back is lost: \
         `vgreduce --removemissing` after saving the rest",
    ))
}

/// Whether a snapshot that is not thin runs out of room for what is overwritten.
fn filling(vg: &VgName, volume: &Volume) -> Option<Finding> {
    // lvs(8): first and fifth letter.
    if volume.letter(0) != b's' || volume.letter(4) != b'a' {
        return None;
    }
    let percent = volume.data_percent.trim().parse::<f64>().ok().filter(|percent| *percent >= SNAPSHOT_WARNING)?;
    Some(Finding::warning(
        "snapshot-filling",
        format!("logical volume {vg}/{}", volume.name),
        format!(
            "{percent}% of the snapshot's room for what is overwritten is used; when it is full, the snapshot is lost"
        ),
        format!("`lvextend --size +… {vg}/{}`, or restore from it and delete it", volume.name),
    ))
}

fn look_at_state(vg: &VgName, volume: &Volume, found: &mut Vec<Finding>) {
    let object = || format!("logical volume {vg}/{}", volume.name);
    // lvs(8): fifth letter.
    match volume.letter(4) {
        b'd' | b'i' | b'X' => found.push(Finding::error(
            "volume-half-made",
            object(),
            "its device is there without a table, as after an lvm command that was cut off; it cannot be used",
            "if no lvm command runs: `dmsetup remove` its device; the next mount makes it anew",
        )),
        b'I' | b'S' | b'm' | b'M' => found.push(Finding::error(
            "snapshot-invalid",
            object(),
            "the snapshot is invalid: it has run full, or its merge has failed",
            "what it showed is lost: delete its VolumeSnapshot, or remove it (lvremove); make the next one with a larger snapshotSize",
        )),
        b'c' | b'C' => found.push(Finding::error(
            "volume-check-needed",
            object(),
            "its metadata has to be checked before it can be used",
            format!("`lvconvert --repair {vg}/{}` while nothing uses it", volume.name),
        )),
        _ => {}
    }
    match volume.health.as_str() {
        "" => {}
        // Told of the group.
        "partial" => {}
        health => found.push(Finding::error(
            "volume-unhealthy",
            object(),
            format!("LVM says that it is: {health}"),
            "see lvs(8) for what that means, and the kernel's log for why",
        )),
    }
}

fn look_at_pool(group: &Group, pool: &Volume, settings: &Settings, found: &mut Vec<Finding>) {
    let vg = &group.name;
    let object = format!("thin pool {vg}/{}", pool.name);
    let parts = [
        ("thin-pool-data", "data", &pool.data_percent, "--size"),
        ("thin-pool-metadata", "metadata", &pool.metadata_percent, "--poolmetadatasize"),
    ];
    for (id, what, percent, option) in parts {
        // Empty while it is not active.
        let Ok(percent) = percent.trim().parse::<f64>() else { continue };
        let problem = format!("{percent}% of its {what} is in use; when it is full, writes to all volumes in it fail");
        let remedy = format!("`lvextend {option} +… {vg}/{}`, or remove volumes or data from it (fstrim)", pool.name);
        if percent >= POOL_ERROR {
            found.push(Finding::error(id, &object, problem, remedy));
        } else if percent >= POOL_WARNING {
            found.push(Finding::warning(id, &object, problem, remedy));
        }
    }
    let promised: u64 = group
        .volumes
        .iter()
        .filter(|volume| volume.pool_lv.trim_matches(['[', ']']) == pool.name)
        .filter_map(|volume| volume.size.trim().parse::<u64>().ok())
        .fold(0, u64::saturating_add);
    let size: u64 = pool.size.trim().parse().unwrap_or(u64::MAX);
    // One that cannot run full needs nobody to extend it.
    if promised > size && settings.number("activation/thin_pool_autoextend_threshold").is_some_and(|at| at >= 100) {
        found.push(Finding::warning(
            "thin-pool-not-extended",
            &object,
            format!(
                "its volumes may hold {} and it has {}, and nothing extends it (thin_pool_autoextend_threshold=100)",
                human(promised),
                human(size)
            ),
            "set activation/thin_pool_autoextend_threshold in lvm.conf to 70 or so, and see that dmeventd runs; or watch it",
        ));
    }
}

/// What LVM itself warned of.
pub fn look_at_warnings(stderr: &str, found: &mut Vec<Finding>) {
    for line in stderr.lines().map(str::trim) {
        // "WARNING: Not using device /dev/sdb for PV <uuid>."
        if let Some(rest) = line.strip_prefix("WARNING: Not using device ") {
            let mut words = rest.split(' ');
            let (device, uuid) = (words.next().unwrap_or(""), words.nth(2).unwrap_or("").trim_end_matches('.'));
            found.push(Finding::error(
                "disk-duplicate",
                device,
                format!("the same PV (UUID {uuid}) is on another device too: a clone, or two paths to one disk"),
                "detach the clone or give it another identity (`vgimportclone`); of several paths let lvm.conf's filter \
                 accept one only. LVM changes nothing in the group until then",
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn vg() -> VgName {
        VgName::parse("vg0").unwrap()
    }

    fn lv(change: impl FnOnce(&mut Value)) -> Volume {
        let mut lv = json!({"lv_name": "pvc-1", "lv_attr": "-wi-a-----", "lv_time": "1795555907", "lv_tags": "",
            "lv_layout": "linear", "lv_size": "1024", "lv_health_status": "", "data_percent": "",
            "metadata_percent": "", "pool_lv": ""});
        change(&mut lv);
        serde_json::from_value(lv).unwrap()
    }

    fn ids(volumes: Vec<Volume>, settings: &str) -> Vec<(&'static str, Severity)> {
        let group =
            Group { name: vg(), metadata_free: 400 << 10, metadata_size: 1 << 20, missing: 0, disks: vec![], volumes };
        let mut found = Vec::new();
        look(&group, &Settings::parse(settings), 1_795_560_000, &mut found);
        found.into_iter().map(|finding| (finding.id, finding.severity)).collect()
    }

    #[test]
    fn metadata_is_told_of_before_it_is_full() {
        let severity = |free| metadata(&vg(), free, 1 << 20).map(|finding| (finding.id, finding.severity));
        assert_eq!(severity(400 << 10), None);
        assert_eq!(severity(60 << 10), Some(("metadata-low", Severity::Warning)));
        assert_eq!(severity(0), Some(("metadata-full", Severity::Error)));
        // A large one is told of while a good deal is left.
        assert_eq!(metadata(&vg(), 700 << 10, 16 << 20).unwrap().id, "metadata-low");
        assert!(metadata(&vg(), 60 << 10, 1 << 20).unwrap().problem.contains("more volumes"));
    }

    #[test]
    fn healthy_volumes_are_not_told_of() {
        let thin = |v: &mut Value| {
            v["lv_layout"] = json!("thin,pool");
            v["data_percent"] = json!("12.00");
        };
        assert_eq!(ids(vec![lv(|_| ()), lv(|v| v["lv_attr"] = json!("-wi-ao----")), lv(thin)], ""), []);
    }

    #[test]
    fn pools_are_told_of_before_they_are_full() {
        let pool = |data: &str, metadata: &str| {
            lv(|v| {
                (v["lv_layout"], v["lv_name"]) = (json!("thin,pool"), json!("pool"));
                (v["data_percent"], v["metadata_percent"]) = (json!(data), json!(metadata));
            })
        };
        assert_eq!(ids(vec![pool("80.00", "10")], ""), [("thin-pool-data", Severity::Warning)]);
        assert_eq!(ids(vec![pool("10", "96.5")], ""), [("thin-pool-metadata", Severity::Error)]);
        let never = "activation {\n\tthin_pool_autoextend_threshold=100\n}\n";
        let thin = |size: &str| lv(|v| (v["pool_lv"], v["lv_size"]) = (json!("pool"), json!(size)));
        assert_eq!(ids(vec![pool("1", "1"), thin("1024")], never), []);
        assert_eq!(ids(vec![pool("1", "1"), thin("1025")], never), [("thin-pool-not-extended", Severity::Warning)]);
    }

    #[test]
    fn half_made_and_sick_volumes_are_told_of() {
        let state = |attr: &str| lv(|v| v["lv_attr"] = json!(attr));
        assert_eq!(ids(vec![state("-wi-XX----")], ""), [("volume-half-made", Severity::Error)]);
        assert_eq!(ids(vec![state("swi-I-s---")], ""), [("snapshot-invalid", Severity::Error)]);
        let health = lv(|v| v["lv_health_status"] = json!("out_of_data"));
        assert_eq!(ids(vec![health], ""), [("volume-unhealthy", Severity::Error)]);
        let log = |time: &str| {
            lv(|v| {
                (v["lv_tags"], v["lv_time"]) =
                    (json!("lvprov.io/kind=log,lvprov.io/log=shop/web,lvprov.io/new"), json!(time));
            })
        };
        assert_eq!(ids(vec![log("1795555907")], ""), [("volume-half-made", Severity::Warning)]);
        assert_eq!(ids(vec![log("1795559990")], ""), []);
    }

    #[test]
    fn duplicates_are_read_from_warnings() {
        let mut found = Vec::new();
        look_at_warnings(
            "  WARNING: Not using device /dev/ubdc for PV abc-def.\n  WARNING: PV abc-def prefers device /dev/ubdb\n",
            &mut found,
        );
        let [one] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!((one.id, one.object.as_str()), ("disk-duplicate", "/dev/ubdc"));
        assert!(one.problem.contains("UUID abc-def)"), "{}", one.problem);
    }

    proptest! {
        #[test]
        fn any_output_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300), text in ".{0,200}") {
            let _ = parse(&bytes);
            let _ = parse(text.as_bytes());
            look_at_warnings(&text, &mut Vec::new());
        }
    }
}
