//! Mounts of our volumes, in this mount namespace and in others.

use super::devices::{Device, active};
use super::{Finding, Scope};
use crate::mounts::{device_number, real, unescape};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A look at all processes ends after so long, with what was found.
const SEARCH: Duration = Duration::from_secs(2);

/// A line of mountinfo (proc_pid_mountinfo(5)), as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    number: (u32, u32),
    target: PathBuf,
    /// What is mounted below it is seen elsewhere too.
    shared: bool,
    /// The mount itself can be written to.
    writable: bool,
    /// The file system can be written to.
    fs_writable: bool,
}

fn parse(mountinfo: &[u8]) -> Vec<Line> {
    mountinfo.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Line> {
    // 36 35 98:0 /root /target options optional... - type source options
    let mut fields = line.split(|byte| *byte == b' ');
    let (major, minor) = std::str::from_utf8(fields.nth(2)?).ok()?.split_once(':')?;
    let number = (major.parse().ok()?, minor.parse().ok()?);
    let target = unescape(fields.nth(1)?);
    let writable = has(fields.next()?, b"rw");
    let mut shared = false;
    for field in fields.by_ref() {
        if field == b"-" {
            break;
        }
        shared |= field.starts_with(b"shared:");
    }
    let (fs_type, source) = (fields.next()?, fields.next()?);
    let number = match fs_type {
        // It has a number of its own making.
        b"btrfs" => device_number(&unescape(source)).unwrap_or(number),
        _ => number,
    };
    Some(Line { number, target, shared, writable, fs_writable: has(fields.next()?, b"rw") })
}

fn has(options: &[u8], option: &[u8]) -> bool {
    options.split(|byte| *byte == b',').any(|one| one == option)
}

pub fn look(scope: &Scope, log_root: &Path, found: &mut Vec<Finding>) {
    let own = match fs::read("/proc/self/mountinfo") {
        Ok(own) => parse(&own),
        Err(error) => {
            found.push(Finding::error("mounts", "/proc/self/mountinfo", error.to_string(), "mount /proc"));
            return;
        }
    };
    let devices = active(scope);
    look_at_propagation(&own, &scope.kubelet_root, log_root, found);
    look_at_file_systems(&own, &devices, found);
}

/// The mount that a path is on.
fn mount_of<'a>(lines: &'a [Line], path: &Path) -> Option<&'a Line> {
    let depth = |line: &Line| line.target.components().count();
    // Of several at one place the last one is on top.
    lines.iter().filter(|line| path.starts_with(&line.target)).max_by_key(|line| depth(line))
}

fn look_at_propagation(lines: &[Line], kubelet_root: &Path, log_root: &Path, found: &mut Vec<Finding>) {
    let places = [
        (kubelet_root, "pods with mountPropagation: HostToContainer on it, and a kubelet in a container,"),
        (log_root, "log shippers in pods (mountPropagation: HostToContainer)"),
    ];
    for (path, who) in places {
        if !path.exists() {
            continue;
        }
        let path = fs::canonicalize(path).unwrap_or_else(|_| real(path));
        let Some(mount) = mount_of(lines, &path).filter(|mount| !mount.shared) else { continue };
        found.push(Finding::warning(
            "mount-not-shared",
            path.display(),
            format!(
                "it lies on the mount {}, which is not shared: {who} do not see volumes that are mounted later",
                mount.target.display()
            ),
            format!("`mount --make-rshared {}`, also after each reboot", mount.target.display()),
        ));
    }
}

/// File systems of ours that have seen errors. Only what the kernel has in
/// memory is asked for: no disk is waited for.
fn look_at_file_systems(lines: &[Line], devices: &[Device], found: &mut Vec<Finding>) {
    let mut told = BTreeSet::new();
    for line in lines {
        let Some(device) = devices.iter().find(|device| device.number == line.number) else { continue };
        let Some((id, problem)) = trouble(line, device) else { continue };
        if told.insert(&device.dm_name) {
            found.push(Finding::error(
                id,
                format!("logical volume {}/{}", device.vg, device.lv),
                format!("{problem}; it is mounted at {}", line.target.display()),
                "see the kernel's log (`dmesg`) for the error; end its pod, so that it is unmounted, and check the file \
                 system (docs/troubleshooting.md)",
            ));
        }
    }
}

fn trouble(line: &Line, device: &Device) -> Option<(&'static str, &'static str)> {
    if line.writable && !line.fs_writable {
        return Some(("volume-read-only", "the kernel has made its file system read-only after an error"));
    }
    // Kept in its superblock until it is checked.
    let errors = fs::read_to_string(format!("/sys/fs/ext4/dm-{}/errors_count", device.number.1));
    if errors.is_ok_and(|count| count.trim() != "0") {
        return Some(("volume-errors", "the kernel has found errors in its file system, and may take no more writes"));
    }
    // Of a file system that is mounted the root directory is in memory. It is
    // the one of another mount where that hides this one.
    let shut_down = fs::metadata(&line.target).is_err_and(|error| error.raw_os_error() == Some(libc::EIO));
    shut_down.then_some(("volume-shut-down", "the kernel has shut its file system down after an error"))
}

/// What is mounted in other mount namespaces alone: nobody unmounts it, and its
/// volume cannot be removed. Looks at all processes.
pub fn look_elsewhere(scope: &Scope, found: &mut Vec<Finding>) {
    look_at_kubelet(found);
    let Ok(own) = fs::read("/proc/self/mountinfo") else { return };
    let mounted: HashSet<(u32, u32)> = parse(&own).iter().map(|line| line.number).collect();
    let devices = active(scope);
    let lost: HashSet<(u32, u32)> =
        devices.iter().map(|device| device.number).filter(|number| !mounted.contains(number)).collect();
    if lost.is_empty() {
        return;
    }
    let users = namespaces(&lost);
    for device in devices {
        let Some(users) = users.get(&device.number) else { continue };
        found.push(Finding::warning(
            "volume-mounted-elsewhere",
            format!("logical volume {}/{}", device.vg, device.lv),
            format!(
                "it is not mounted on the host any more, but in the mount namespace of {}: it cannot be removed",
                users.iter().cloned().collect::<Vec<_>>().join(", ")
            ),
            "end that process, or unmount it there (`nsenter -t <pid> -m umount <place>`)",
        ));
    }
}

/// One process of each mount namespace that has one of these devices mounted.
fn namespaces(wanted: &HashSet<(u32, u32)>) -> BTreeMap<(u32, u32), BTreeSet<String>> {
    let (begun, mut seen) = (Instant::now(), HashSet::new());
    seen.extend(fs::read_link("/proc/self/ns/mnt").ok());
    let mut users: BTreeMap<(u32, u32), BTreeSet<String>> = BTreeMap::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        if begun.elapsed() > SEARCH {
            break;
        }
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(namespace) = fs::read_link(process.path().join("ns/mnt")) else { continue };
        if !seen.insert(namespace) {
            continue;
        }
        let lines = parse(&fs::read(process.path().join("mountinfo")).unwrap_or_default());
        for line in lines.iter().filter(|line| wanted.contains(&line.number)) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            users.entry(line.number).or_default().insert(format!("process {pid} ({})", name.trim()));
        }
    }
    users
}

/// kubelet where what it mounts is seen by nobody else.
fn look_at_kubelet(found: &mut Vec<Finding>) {
    let Ok(host) = fs::read_link("/proc/1/ns/mnt") else { return };
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let path = process.path();
        if !fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim() == "kubelet") {
            continue;
        }
        if fs::read_link(path.join("ns/mnt")).is_ok_and(|namespace| namespace != host) {
            found.push(Finding::note(
                "kubelet-namespace",
                format!("kubelet (process {})", process.file_name().display()),
                "it runs in a mount namespace of its own: volumes of pods are seen on the host only where its directory \
                 is shared with it",
                "see that its directory is mounted with rshared propagation into it",
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::{LvName, VgName};
    use proptest::prelude::*;

    const MOUNTS: &str = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
        30 22 8:2 / /var/lib/kubelet rw - xfs /dev/sda2 rw\n\
        31 30 253:4 / /var/lib/kubelet/pods/a\\040b/x rw,noatime shared:5 master:2 - ext4 /dev/mapper/vg0-pvc--1 ro,errors=remount-ro\n\
        32 30 253:5 / /var/lib/kubelet/pods/c ro,noatime - ext4 /dev/mapper/vg0-pvc--2 ro\n";

    fn device(minor: u32) -> Device {
        Device {
            number: (253, minor),
            dm_name: format!("vg0-pvc--{minor}"),
            vg: VgName::parse("vg0").unwrap(),
            lv: LvName::parse(&format!("pvc-{minor}")).unwrap(),
            suspended: false,
        }
    }

    #[test]
    fn mountinfo_is_read() {
        let lines = parse(MOUNTS.as_bytes());
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[2].target, Path::new("/var/lib/kubelet/pods/a b/x"));
        let seen: Vec<_> = lines.iter().map(|line| (line.shared, line.writable, line.fs_writable)).collect();
        assert_eq!(seen, [(true, true, true), (false, true, true), (true, true, false), (false, false, false)]);
    }

    #[test]
    fn only_what_was_not_asked_to_be_read_only_is_told_of() {
        let mut found = Vec::new();
        look_at_file_systems(&parse(MOUNTS.as_bytes()), &[device(4), device(5)], &mut found);
        let [one] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!((one.id, one.object.as_str()), ("volume-read-only", "logical volume vg0/pvc-4"));
    }

    #[test]
    fn a_path_is_on_the_deepest_mount_above_it() {
        let lines = parse(MOUNTS.as_bytes());
        assert!(mount_of(&lines, Path::new("/var/lib")).unwrap().shared);
        assert!(!mount_of(&lines, Path::new("/var/lib/kubelet/pods")).unwrap().shared);
        assert!(mount_of(&lines, Path::new("/var/lib/kubelet2")).unwrap().shared);
    }

    proptest! {
        #[test]
        fn any_mountinfo_is_read(bytes in proptest::collection::vec(any::<u8>(), 0..200), text in "[0-9:/a-z \\\\,\n-]{0,200}") {
            parse(&bytes);
            parse(text.as_bytes());
        }
    }
}
