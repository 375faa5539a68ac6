//! Device-mapper's devices of our groups, and the cookies that lvm and udev
//! pass each other; from sysfs and /proc.

use super::{Finding, Scope, now};
use crate::names::{LvName, VgName, split_dm_name};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// lvm suspends a device for a moment when it changes it.
const MOMENT: Duration = Duration::from_millis(300);
/// udev answers in milliseconds; after so many seconds nobody will any more.
const LONG: i64 = 60;
/// The upper half of the key of libdm's semaphores.
const COOKIE_MAGIC: i64 = 0x0D4D;

/// An active logical volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its number.
    pub number: (u32, u32),
    /// Its name for device-mapper.
    pub dm_name: String,
    /// Its volume group.
    pub vg: VgName,
    /// The logical volume, or a hidden part of one.
    pub lv: LvName,
    /// Whether nothing gets through to it.
    pub suspended: bool,
}

/// All active logical volumes of the groups that are served.
pub fn active(scope: &Scope) -> Vec<Device> {
    active_in(Path::new("/sys/class/block"), scope)
}

fn active_in(class: &Path, scope: &Scope) -> Vec<Device> {
    let mut devices: Vec<Device> =
        fs::read_dir(class).into_iter().flatten().flatten().filter_map(|entry| read(&entry.path(), scope)).collect();
    devices.sort_by(|a, b| a.dm_name.cmp(&b.dm_name));
    devices
}

fn read(directory: &Path, scope: &Scope) -> Option<Device> {
    if !directory.file_name()?.to_str()?.starts_with("dm-") {
        return None;
    }
    let text = |file: &str| fs::read_to_string(directory.join(file)).map(|text| text.trim().to_owned()).ok();
    if !text("dm/uuid")?.starts_with("LVM-") {
        return None;
    }
    let dm_name = text("dm/name")?;
    let (vg, lv) = split_dm_name(&dm_name)?;
    let number = text("dev")?;
    let (major, minor) = number.split_once(':')?;
    let number = (major.parse().ok()?, minor.parse().ok()?);
    let suspended = text("dm/suspended")? == "1";
    scope.serves(&vg).then_some(Device { number, dm_name, vg, lv, suspended })
}

pub fn look(scope: &Scope, found: &mut Vec<Finding>) {
    let devices = active(scope);
    look_at_suspended(scope, &devices, found);
    for device in &devices {
        let node = Path::new("/dev/mapper").join(&device.dm_name);
        if !is_of(&node, device.number) {
            found.push(Finding::error(
                "device-node-missing",
                format!("logical volume {}/{}", device.vg, device.lv),
                format!("it is active, and {} is not its device: it cannot be mounted", node.display()),
                "`dmsetup mknodes` makes it; then see why udev, or whatever makes /dev, did not",
            ));
        }
    }
    look_at_cookies(&fs::read_to_string("/proc/sysvipc/sem").unwrap_or_default(), now(), found);
}

/// Hidden parts have none that anybody needs.
fn is_of(node: &Path, number: (u32, u32)) -> bool {
    crate::mounts::device_number(node).is_ok_and(|is| is == number)
}

/// So is every device for a moment while lvm works on it.
fn look_at_suspended(scope: &Scope, devices: &[Device], found: &mut Vec<Finding>) {
    let before: Vec<&Device> = devices.iter().filter(|device| device.suspended).collect();
    if before.is_empty() {
        return;
    }
    std::thread::sleep(MOMENT);
    let still = active(scope);
    for device in before.iter().filter(|device| still.contains(device)) {
        found.push(Finding::error(
            "device-suspended",
            format!("logical volume {}/{}", device.vg, device.lv),
            "its device is suspended, as after an lvm command that was killed: whoever reads or writes it, and lvm, waits",
            format!("if no lvm command runs (`ps -C lvm,lvextend,lvconvert`): `dmsetup resume {}`", device.dm_name),
        ));
    }
}

/// `key semid perms nsems uid gid cuid cgid otime ctime`
fn look_at_cookies(table: &str, now: i64, found: &mut Vec<Finding>) {
    let stuck = table
        .lines()
        .filter(|line| {
            let fields: Vec<i64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
            let (Some(key), Some(changed)) = (fields.first(), fields.get(9)) else { return false };
            key >> 16 == COOKIE_MAGIC && changed + LONG < now
        })
        .count();
    if stuck > 0 {
        found.push(Finding::warning(
            "udev-cookies",
            "udev",
            format!("{stuck} lvm or dmsetup commands wait, or have died waiting, for udev to say that a device is ready"),
            "`dmsetup udevcookies` shows them, `dmsetup udevcomplete_all 5` lets those go that have waited for 5 minutes; \
             then see that udev runs and has the rule 95-dm-notify.rules",
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_logical_volumes_of_served_groups_are_devices() {
        let class = tempfile::tempdir().unwrap();
        let make = |at: &str, uuid: &str, name: &str, suspended: &str| {
            let directory = class.path().join(at);
            fs::create_dir_all(directory.join("dm")).unwrap();
            for (file, text) in [("dev", "253:4\n"), ("dm/uuid", uuid), ("dm/name", name), ("dm/suspended", suspended)]
            {
                fs::write(directory.join(file), text).unwrap();
            }
        };
        make("dm-0", "LVM-abc\n", "vg0-pvc--1\n", "1\n");
        make("dm-1", "LVM-abc\n", "vg1-pvc--2\n", "0\n");
        make("dm-2", "CRYPT-abc\n", "vg0-x\n", "0\n");
        fs::create_dir(class.path().join("sda")).unwrap();
        let scope = Scope { groups: vec![VgName::parse("vg0").unwrap()], kubelet_root: "/".into() };
        let devices = active_in(class.path(), &scope);
        let [one] = devices.as_slice() else { panic!("{devices:?}") };
        assert_eq!((one.vg.as_str(), one.lv.as_str(), one.suspended, one.number), ("vg0", "pvc-1", true, (253, 4)));
    }

    #[test]
    fn only_old_cookies_of_libdm_are_stuck() {
        let table = |key: u32, ctime: i64| {
            format!(
                "       key      semid perms      nsems   uid   gid  cuid  cgid      otime      ctime\n \
                 {key}          0   600          1     0     0     0     0          0 {ctime}\n"
            )
        };
        let told = |table: String| {
            let mut found = Vec::new();
            look_at_cookies(&table, 1_000_000, &mut found);
            found.len()
        };
        assert_eq!(told(table(0x0D4D_1234, 900_000)), 1);
        assert_eq!(told(table(0x0D4D_1234, 999_990)), 0);
        assert_eq!(told(table(0x1234_1234, 900_000)), 0);
        assert_eq!(told(String::new()), 0);
    }

    proptest! {
        #[test]
        fn any_table_is_read(text in "[0-9 \n-]{0,200}") {
            look_at_cookies(&text, 0, &mut Vec::new());
        }
    }
}
