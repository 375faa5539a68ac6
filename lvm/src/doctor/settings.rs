//! LVM's settings (lvm.conf(5)), as `lvmconfig` shows them with all defaults.

use super::groups::Group;
use super::{Finding, Scope};
use crate::size::human;
use nix::sys::statvfs::statvfs;
use std::collections::BTreeMap;
use std::path::Path;

/// Lets LVM look at all disks, whatever its devices file says.
pub const NO_DEVICES_FILE: &str = "devices/use_devicesfile=0";
/// Lets LVM look at all disks, whatever its filters say.
pub const NO_FILTER: &str = "devices/filter=[\"a|.*|\"] devices/global_filter=[\"a|.*|\"]";

/// Old copies of metadata are seldom worth so much of a root file system.
const LARGE_ARCHIVE: u64 = 1 << 30;
/// A copy of a small group's metadata fits into it.
const LITTLE_ROOM: u64 = 64 << 10;

/// Values by `section/key`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings(BTreeMap<String, String>);

impl Settings {
    /// Reads `section {`, `key=value` and `}`; all else is left out.
    pub fn parse(text: &str) -> Self {
        let (mut values, mut sections) = (BTreeMap::new(), Vec::new());
        for line in text.lines().map(str::trim) {
            if let Some(name) = line.strip_suffix('{') {
                sections.push(name.trim().to_owned());
            } else if line == "}" {
                sections.pop();
            } else if let Some((key, value)) = line.split_once('=')
                && let [section] = sections.as_slice()
            {
                values.insert(format!("{section}/{}", key.trim()), value.trim().to_owned());
            }
        }
        Self(values)
    }

    fn raw(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// A text.
    pub fn text(&self, key: &str) -> Option<&str> {
        Some(self.raw(key)?.trim_matches('"'))
    }

    /// A number.
    pub fn number(&self, key: &str) -> Option<u64> {
        self.raw(key)?.parse().ok()
    }

    /// Whether it is known to be 1.
    pub fn flag(&self, key: &str) -> bool {
        self.number(key) == Some(1)
    }

    /// A list of texts. None: it is not set.
    pub fn list(&self, key: &str) -> Option<Vec<String>> {
        let raw = self.raw(key)?;
        let inner = raw.strip_prefix('[').and_then(|raw| raw.strip_suffix(']')).unwrap_or(raw);
        let parts = inner.split("\",\"").map(|part| part.trim().trim_matches('"').to_owned());
        Some(parts.filter(|part| !part.is_empty()).collect())
    }
}

/// What gets in our way.
pub fn look(settings: &Settings, scope: &Scope, groups: &[Group], found: &mut Vec<Finding>) {
    for group in groups.iter().filter(|group| scope.serves(&group.name)) {
        look_at_lists(settings, group.name.as_str(), found);
    }
    if settings.number("global/activation") == Some(0) {
        found.push(Finding::error(
            "lvm-no-activation",
            "lvm.conf: global/activation",
            "LVM gives no volume a device: nothing can be mounted",
            "take it out",
        ));
    }
    if settings.flag("global/use_lvmlockd") && !Path::new("/run/lvm/lvmlockd.socket").exists() {
        found.push(Finding::warning(
            "lvmlockd-missing",
            "lvm.conf: global/use_lvmlockd",
            "LVM is told to ask lvmlockd for locks, and lvmlockd does not run: no group is made, and no disk added to one",
            "set use_lvmlockd=0, since volumes of ours are never shared by nodes; or start lvmlockd",
        ));
    }
    if settings.number("backup/backup") == Some(0) {
        found.push(Finding::warning(
            "lvm-no-backup",
            "lvm.conf: backup/backup",
            "LVM keeps no copies of its metadata: what others change in a group is not seen until our next change, \
             and a damaged group cannot be restored",
            "set backup=1, the default",
        ));
    }
    if settings.number("allocation/use_blkid_wiping") == Some(0) {
        found.push(Finding::warning(
            "lvm-no-blkid-wiping",
            "lvm.conf: allocation/use_blkid_wiping",
            "LVM wipes few kinds of signatures from a new volume: where one of an earlier owner is left, the first \
             mount is refused",
            "set use_blkid_wiping=1, the default",
        ));
    }
    look_at_archive(settings, found);
}

fn look_at_lists(settings: &Settings, vg: &str, found: &mut Vec<Finding>) {
    let excluded = |key: &str| settings.list(key).is_some_and(|list| !list.iter().any(|entry| may_match(entry, vg)));
    if excluded("activation/volume_list") {
        found.push(Finding::error(
            "lvm-volume-list",
            format!("volume group {vg}"),
            "activation/volume_list in lvm.conf does not have it: none of its volumes gets a device, so none is made or mounted",
            format!("add \"{vg}\" to the list, or take the list out"),
        ));
    }
    if settings.list("activation/read_only_volume_list").is_some_and(|list| list.iter().any(|entry| covers(entry, vg)))
    {
        found.push(Finding::error(
            "lvm-read-only-list",
            format!("volume group {vg}"),
            "activation/read_only_volume_list in lvm.conf has it: its volumes cannot be written to",
            "take it out of the list",
        ));
    }
    if excluded("activation/auto_activation_volume_list") {
        found.push(Finding::note(
            "lvm-auto-activation",
            format!("volume group {vg}"),
            "activation/auto_activation_volume_list in lvm.conf does not have it: after a reboot each volume's first \
             mount costs an lvm command",
            format!("add \"{vg}\" to the list, or leave it"),
        ));
    }
}

/// Whether the entry of a list means the group, or some of its volumes: a tag
/// may be any volume's.
fn may_match(entry: &str, vg: &str) -> bool {
    covers(entry, vg) || entry.starts_with('@') || entry.split_once('/').is_some_and(|(group, _)| group == vg)
}

/// Whether it means all of the group.
fn covers(entry: &str, vg: &str) -> bool {
    entry == vg || entry == "@*"
}

/// LVM changes nothing where it cannot keep a copy of what was before.
fn look_at_archive(settings: &Settings, found: &mut Vec<Finding>) {
    let (directory, wanted) = (settings.text("backup/archive_dir").unwrap_or("/etc/lvm/archive"), "backup/archive");
    if settings.number(wanted) == Some(0) {
        return;
    }
    let sizes = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let sizes: Vec<u64> = sizes.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).collect();
    let taken = sizes.iter().fold(0, |sum: u64, size| sum.saturating_add(*size));
    let largest = sizes.iter().copied().max().unwrap_or(0).max(LITTLE_ROOM);
    let kept = format!("it holds {} old copies of metadata, {} in all", sizes.len(), human(taken));
    let remedy = "remove old ones, and lower backup/retain_days and retain_min in lvm.conf: each change of a group \
                  leaves one, as large as the group's metadata";
    let room = statvfs(directory).map_or(u64::MAX, |stat| stat.blocks_available().saturating_mul(stat.fragment_size()));
    if room < largest {
        found.push(Finding::error(
            "lvm-archive-full",
            directory,
            format!(
                "{} are left in its file system: LVM changes no group where it cannot keep a copy. {kept}",
                human(room)
            ),
            remedy,
        ));
    } else if taken > LARGE_ARCHIVE {
        found.push(Finding::warning("lvm-archive-large", directory, kept, remedy));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::VgName;
    use proptest::prelude::*;

    const SHOWN: &str = "devices {\n\tfilter=[\"r|^/dev/ubda$|\",\"a|.*|\"]\n\tuse_devicesfile=0\n}\n\
        activation {\n\tvolume_list=[\"vg1\",\"vg2/lv\"]\n\tmonitoring=1\n}\n\
        backup {\n\tarchive_dir=\"/nonexistent\"\n}\n";

    fn ids(text: &str) -> Vec<&'static str> {
        let vg = VgName::parse("vg0").unwrap();
        let scope = Scope { groups: vec![], kubelet_root: "/var/lib/kubelet".into() };
        let group = Group { name: vg, metadata_free: 0, metadata_size: 0, missing: 0, disks: vec![], volumes: vec![] };
        let mut found = Vec::new();
        look(&Settings::parse(text), &scope, &[group], &mut found);
        found.into_iter().map(|finding| finding.id).collect()
    }

    #[test]
    fn settings_are_read_as_lvmconfig_prints_them() {
        let settings = Settings::parse(SHOWN);
        assert_eq!(settings.list("devices/filter").unwrap(), ["r|^/dev/ubda$|", "a|.*|"]);
        assert_eq!(settings.list("activation/auto_activation_volume_list"), None);
        assert_eq!(settings.text("backup/archive_dir"), Some("/nonexistent"));
        assert!(settings.flag("activation/monitoring") && !settings.flag("devices/use_devicesfile"));
    }

    #[test]
    fn lists_that_leave_a_group_out_are_told_of() {
        assert_eq!(ids(SHOWN), ["lvm-volume-list"]);
        for list in ["\"vg0\"", "\"vg1\",\"vg0\"", "\"@*\"", "\"vg0/pvc-1\"", "\"@lvprov.io/kind=data\""] {
            let text = format!("activation {{\n\tvolume_list=[{list}]\n}}\n");
            assert!(ids(&text).is_empty(), "{list}");
        }
        assert_eq!(ids("activation {\n\tread_only_volume_list=[\"vg0\"]\n}"), ["lvm-read-only-list"]);
        assert_eq!(ids("activation {\n\tauto_activation_volume_list=[]\n}"), ["lvm-auto-activation"]);
    }

    #[test]
    fn what_stops_lvm_is_told_of_and_defaults_are_not() {
        assert!(ids("").is_empty());
        assert_eq!(ids("global {\n\tactivation=0\n}"), ["lvm-no-activation"]);
        assert_eq!(ids("backup {\n\tbackup=0\n\tarchive=0\n}"), ["lvm-no-backup"]);
        assert_eq!(ids("allocation {\n\tuse_blkid_wiping=0\n}\nbackup {\n\tarchive=0\n}"), ["lvm-no-blkid-wiping"]);
    }

    proptest! {
        #[test]
        fn any_output_is_read(text in "[a-z{}=/\\[\\]\", \n]{0,200}") {
            let settings = Settings::parse(&text);
            let _ = settings.list("a/b");
        }
    }
}
