//! The machine around LVM: tools, udev, /run, kernel, clock.

use super::Finding;
use super::groups::Group;
use super::settings::Settings;
use crate::command::find_program;
use nix::sys::statvfs::{FsFlags, statvfs};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Locks and notes are empty or small; lvm keeps some files too.
const LITTLE_ROOM: u64 = 1 << 20;
const FEW_FILES: u64 = 64;
/// Volumes made so much later than now say that the clock went back.
const CLOCK_SLACK: i64 = 300;
/// Where udev takes its rules from, the first that has one wins (udev(7)).
const RULES: [&str; 4] = ["/etc/udev/rules.d", "/run/udev/rules.d", "/usr/lib/udev/rules.d", "/lib/udev/rules.d"];

/// What can be seen without a process.
pub fn look(found: &mut Vec<Finding>) {
    look_at_run(Path::new("/run"), found);
    look_at_tool_files(found);
    if !Path::new("/dev/mapper/control").exists() {
        found.push(Finding::error(
            "device-mapper-missing",
            "/dev/mapper/control",
            "the kernel has no device-mapper, or /dev is not the host's: no logical volume can be used",
            "`modprobe dm-mod`",
        ));
    }
}

fn look_at_run(run: &Path, found: &mut Vec<Finding>) {
    let Ok(stat) = statvfs(run) else { return };
    let room = stat.blocks_available().saturating_mul(stat.fragment_size());
    let why = "locks cannot be made there, so nothing can be mounted, made or removed";
    if stat.flags().contains(FsFlags::ST_RDONLY) {
        found.push(Finding::error(
            "run-read-only",
            run.display(),
            format!("it is read-only: {why}"),
            "mount a tmpfs there",
        ));
    } else if room < LITTLE_ROOM || (stat.files() > 0 && stat.files_available() < FEW_FILES) {
        let problem = format!("{room} B and {} files are left in it: {why}", stat.files_available());
        let remedy = "see who fills it (`du -x /run`), or make it larger (`mount -o remount,size=… /run`)";
        // With nothing left it has happened already.
        let full = room < 4096 || (stat.files() > 0 && stat.files_available() == 0);
        found.push(match full {
            true => Finding::error("run-full", run.display(), problem, remedy),
            false => Finding::warning("run-full", run.display(), problem, remedy),
        });
    }
}

/// Tools by what they are for. The default file system's are a must.
fn look_at_tool_files(found: &mut Vec<Finding>) {
    let must = ["lvm", "blkid", "wipefs", "mkfs.xfs", "xfs_growfs"];
    let missing = |name: &&str| find_program(name).is_none();
    for name in must.iter().filter(|name| missing(name)) {
        found.push(Finding::error(
            "tool-missing",
            *name,
            "it is not installed: volumes cannot be made, formatted or grown",
            "install lvm2, util-linux and xfsprogs",
        ));
    }
    let sets: [(&str, &[&str]); 2] =
        [("ext4", &["mkfs.ext4", "resize2fs", "e2fsck"]), ("btrfs", &["mkfs.btrfs", "btrfs"])];
    for (fs, tools) in sets {
        let gone: Vec<&str> = tools.iter().copied().filter(|name| missing(name)).collect();
        if !gone.is_empty() {
            found.push(Finding::note(
                "tool-missing",
                gone.join(", "),
                format!("not installed: volumes with {fs} cannot be formatted or grown on this node"),
                "install e2fsprogs or btrfs-progs, if a StorageClass wants them",
            ));
        }
    }
}

/// What the groups' volumes and LVM's settings need beyond that.
pub fn look_at_tools(groups: &[Group], settings: &Settings, found: &mut Vec<Finding>) {
    let volumes = || groups.iter().flat_map(|group| &group.volumes);
    if volumes().any(super::groups::Volume::is_thin_pool) {
        let check = settings.text("global/thin_check_executable").unwrap_or("/usr/sbin/thin_check");
        if !check.is_empty() && !Path::new(check).exists() {
            found.push(Finding::error(
                "tool-missing",
                check,
                "it is not installed, and LVM activates no thin pool without it",
                "install thin-provisioning-tools",
            ));
        }
    }
    look_at_udev(settings, Path::new("/run/udev/control").exists(), found);
    let targets: BTreeSet<&str> = volumes()
        .flat_map(|volume| {
            [("thin", "dm-thin-pool"), ("raid", "dm-raid"), ("cache", "dm-cache"), ("writecache", "dm-writecache")]
                .into_iter()
                .filter(|(word, _)| volume.is(word))
                .map(|(_, module)| module)
        })
        .collect();
    for module in targets {
        if !has_module(module) {
            found.push(Finding::error(
                "dm-target-missing",
                module,
                "the kernel neither has this device-mapper target nor finds the module, and there are volumes that need it",
                format!("install the kernel's module package; `modprobe {module}` must work"),
            ));
        }
    }
}

/// In the kernel, loaded, or to be loaded.
fn has_module(name: &str) -> bool {
    let underscored = name.replace('-', "_");
    if Path::new("/sys/module").join(&underscored).exists() {
        return true;
    }
    let Ok(release) = fs::read_to_string("/proc/sys/kernel/osrelease") else { return true };
    let directory = Path::new("/lib/modules").join(release.trim());
    // `kernel/drivers/md/dm-raid.ko.xz: …`
    let names = [format!("/{name}.ko"), format!("/{underscored}.ko")];
    ["modules.dep", "modules.builtin"].iter().any(|file| {
        let text = fs::read_to_string(directory.join(file)).unwrap_or_default();
        text.lines().any(|line| names.iter().any(|name| line.split(':').next().unwrap_or("").contains(name.as_str())))
    })
}

/// lvm waits for udev's last rule whenever udev runs.
fn look_at_udev(settings: &Settings, runs: bool, found: &mut Vec<Finding>) {
    if !runs || settings.number("activation/udev_sync") == Some(0) {
        return;
    }
    for (rule, what) in [
        (
            "95-dm-notify.rules",
            "lvm waits for ever for udev to say that a device is ready: no volume is made or activated",
        ),
        ("10-dm.rules", "udev makes no links to logical volumes, and takes them for plain disks"),
    ] {
        if is_in_force(rule) {
            continue;
        }
        found.push(Finding::error(
            "udev-rule-missing",
            rule,
            format!("udev runs without this rule of device-mapper (or it is masked): {what}"),
            "install dmsetup's udev rules, and remove an empty file or link of that name from /etc/udev/rules.d",
        ));
    }
}

fn is_in_force(rule: &str) -> bool {
    let first =
        RULES.iter().map(|directory| Path::new(directory).join(rule)).find(|path| path.symlink_metadata().is_ok());
    // An empty one, or a link to /dev/null, masks it.
    first.is_some_and(|path| fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.len() > 0))
}

/// Retention, certificates and ages are reckoned by it.
pub fn look_at_clock(groups: &[Group], now: i64, found: &mut Vec<Finding>) {
    let newest = groups.iter().flat_map(|group| &group.volumes).map(super::groups::Volume::made).max().unwrap_or(0);
    if newest > now + CLOCK_SLACK {
        found.push(Finding::warning(
            "clock",
            "clock",
            format!(
                "a volume was made {} s later than it is now: the clock is, or was, wrong; logs are kept too long or too short",
                newest - now
            ),
            "set the clock, and see that it is kept right (chrony, systemd-timesyncd)",
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;

    #[test]
    fn udevs_rules_matter_only_where_lvm_waits_for_it() {
        let told = |settings: &str, runs| {
            let mut found = Vec::new();
            look_at_udev(&Settings::parse(settings), runs, &mut found);
            found.len()
        };
        let (off, on) = ("activation {\n\tudev_sync=0\n}\n", "activation {\n\tudev_sync=1\n}\n");
        assert_eq!(told(off, true), 0);
        assert_eq!(told(on, false), 0);
        let gone = ["95-dm-notify.rules", "10-dm.rules"].iter().filter(|rule| !is_in_force(rule)).count();
        assert_eq!(told(on, true), gone);
        assert!(!is_in_force("no-such.rules"));
    }

    #[test]
    fn a_module_that_is_nowhere_is_missing() {
        assert!(!has_module("dm-no-such-target"));
    }

    #[test]
    fn run_with_room_is_fine() {
        let directory = tempfile::tempdir().unwrap();
        let mut found = Vec::new();
        look_at_run(directory.path(), &mut found);
        assert_eq!(found.iter().filter(|one| one.severity == Severity::Error).count(), 0);
    }
}
