//! Mounts: what is mounted where, mounting, unmounting.

use crate::Lvm;
use crate::command::Runner;
use crate::fault;
use crate::names::{LvName, VgName, split_dm_name};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// One line of /proc/self/mountinfo (proc_pid_mountinfo(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Number of the block device, or that of the file system where it has none.
    pub device: (u32, u32),
    /// The directory of the file system that is mounted.
    pub root: PathBuf,
    /// Where.
    pub target: PathBuf,
    /// Type of the file system.
    pub fs_type: String,
}

/// All mounts of this mount namespace, in the order in which they were made.
pub fn all() -> io::Result<Vec<Mount>> {
    Ok(parse(&fs::read("/proc/self/mountinfo")?))
}

/// Reads mountinfo; lines that make no sense are left out.
pub fn parse(mountinfo: &[u8]) -> Vec<Mount> {
    mountinfo.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    // 36 35 98:0 /root /target options optional... - type source options
    let mut fields = line.split(|b| *b == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let root = unescape(fields.next()?);
    let target = unescape(fields.next()?);
    let mut rest = fields.skip_while(|field| *field != b"-");
    let fs_type = String::from_utf8_lossy(rest.nth(1)?).into_owned();
    let mut device = (major.parse().ok()?, minor.parse().ok()?);
    // Btrfs, which may span several devices, has a number of its own making.
    if fs_type == "btrfs"
        && let Some(source) = rest.next().map(unescape)
        && source.starts_with("/dev")
    {
        device = device_number(&source).unwrap_or(device);
    }
    Some(Mount { device, root, target, fs_type })
}

/// Space, tab, newline and backslash stand as three octal digits.
pub(crate) fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut at = 0;
    while at < field.len() {
        let octal =
            field.get(at + 1..at + 4).filter(|d| field[at] == b'\\' && d.iter().all(|b| (b'0'..=b'7').contains(b)));
        match octal {
            Some(digits) => {
                let value = digits.iter().fold(0u32, |sum, b| sum * 8 + u32::from(b - b'0'));
                bytes.push((value & 0xff) as u8);
                at += 4;
            }
            None => {
                bytes.push(field[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

impl Mount {
    /// The block device's node, as the kernel names it (`/dev/dm-3`). None
    /// where it is no block device, or gone.
    pub fn device_node(&self) -> Option<PathBuf> {
        let (major, minor) = self.device;
        let name = fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok()?;
        Some(Path::new("/dev").join(name.file_name()?))
    }

    /// The logical volume that is mounted. None: something else.
    pub fn logical_volume(&self) -> Option<(VgName, LvName)> {
        let (major, minor) = self.device;
        let name = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/dm/name")).ok()?;
        split_dm_name(name.trim())
    }
}

impl Mount {
    /// Whether it may be one node of a device directory, mounted elsewhere.
    pub fn is_of_a_node(&self) -> bool {
        matches!(self.fs_type.as_str(), "devtmpfs" | "tmpfs") && self.root != Path::new("/")
    }
}

/// The logical volume that a block device's node stands for. None: something else.
pub fn logical_volume_of(node: &Path) -> Option<(VgName, LvName)> {
    let device = device_number(node).ok()?;
    Mount { device, root: PathBuf::new(), target: PathBuf::new(), fs_type: String::new() }.logical_volume()
}

/// Device number of a block device's node.
pub fn device_number(node: &Path) -> io::Result<(u32, u32)> {
    let metadata = fs::metadata(node)?;
    if !metadata.file_type().is_block_device() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a block device"));
    }
    Ok(split(metadata.rdev()))
}

/// Device number of the file system that `path` lies on.
pub fn file_system_of(path: &Path) -> io::Result<(u32, u32)> {
    Ok(split(fs::metadata(path)?.dev()))
}

fn split(device: u64) -> (u32, u32) {
    (libc::major(device), libc::minor(device))
}

/// The path as the mount table knows it: with no link but its last component.
/// Where its directory is not there, nothing is mounted, and it is given as it is.
pub fn real(path: &Path) -> PathBuf {
    match (path.parent().map(Path::canonicalize), path.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => path.to_owned(),
    }
}

/// What is mounted at `target` itself, the topmost where there are several.
pub fn at(target: &Path) -> io::Result<Option<Mount>> {
    Ok(all()?.into_iter().rfind(|mount| mount.target == target))
}

/// Size of a block device in bytes.
pub fn device_size(node: &Path) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    // The end of a block device is its size; no ioctl needed.
    File::open(node)?.seek(SeekFrom::End(0))
}

/// Mounts a device.
pub fn mount_device(node: &Path, target: &Path, fs_type: &str, flags: MsFlags, data: &str) -> io::Result<()> {
    let data = if data.is_empty() { None } else { Some(data) };
    Ok(mount(Some(node), target, Some(fs_type), flags, data)?)
}

/// How a mount of a directory differs from the mount that the directory is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BindOptions {
    /// Nothing can be written through it.
    pub read_only: bool,
    /// Programs on it can be run.
    pub exec: bool,
    /// One of `MS_NOATIME`, `MS_RELATIME`, `MS_STRICTATIME`, and
    /// `MS_NODIRATIME`; empty: as the other mount.
    pub access_times: MsFlags,
}

impl Default for BindOptions {
    fn default() -> Self {
        Self { read_only: false, exec: false, access_times: MsFlags::empty() }
    }
}

/// Mounts the open directory at `target`, and nowhere else: a path could have
/// been exchanged meanwhile.
pub fn bind(directory: impl AsFd, target: &Path, options: BindOptions) -> io::Result<()> {
    let source = PathBuf::from(format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd()));
    mount(Some(&source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    if options == BindOptions::default() { Ok(()) } else { change_or_unmount(target, options) }
}

/// Makes a new mount read-only, or takes it away again.
pub(crate) fn make_read_only_or_unmount(target: &Path) -> io::Result<()> {
    change_or_unmount(target, BindOptions { read_only: true, ..BindOptions::default() })
}

/// What stays mounted after a failure would be taken for ready.
fn change_or_unmount(target: &Path, options: BindOptions) -> io::Result<()> {
    change(target, options).inspect_err(|_| {
        let _ = umount2(target, MntFlags::UMOUNT_NOFOLLOW);
    })
}

/// Changes one mount, keeping its other flags; the file system itself stays as
/// it is for others.
fn change(target: &Path, options: BindOptions) -> io::Result<()> {
    let now = nix::sys::statvfs::statvfs(target)?.flags();
    let mut flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
    for (has, flag) in [
        (nix::sys::statvfs::FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (nix::sys::statvfs::FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (nix::sys::statvfs::FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (nix::sys::statvfs::FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (nix::sys::statvfs::FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (nix::sys::statvfs::FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ] {
        flags.set(flag, now.contains(has));
    }
    flags.set(MsFlags::MS_RDONLY, options.read_only);
    if options.exec {
        flags.remove(MsFlags::MS_NOEXEC);
    }
    if !options.access_times.is_empty() {
        flags.remove(MsFlags::MS_NOATIME | MsFlags::MS_NODIRATIME | MsFlags::MS_RELATIME);
        flags |= options.access_times;
    }
    Ok(mount(None::<&str>, target, None::<&str>, flags, None::<&str>)?)
}

/// A directory could not be freed of its mounts.
#[derive(Debug, thiserror::Error)]
pub enum UnmountError {
    /// The mount table could not be read.
    #[error("cannot read the mounts of this node: {0}")]
    Unreadable(io::Error),
    /// The kernel refused.
    #[error("cannot unmount {target}: {source}; it is tried again once what uses it has gone")]
    Refused {
        /// The mount point.
        target: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Its device hangs, and so would the unmount.
    #[error("cannot unmount {target}: {source}; it is tried again")]
    Device {
        /// The mount point.
        target: String,
        /// What is wrong with the device.
        source: io::Error,
    },
    /// Something else is mounted further down.
    #[error("{below} is still mounted below {target}; unmount it first")]
    Below {
        /// The directory that should be free.
        target: String,
        /// The mount that is in the way.
        below: String,
    },
}

impl Lvm {
    /// As [`unmount`].
    pub fn unmount(&self, target: &Path) -> Result<Vec<Mount>, UnmountError> {
        unmount(&self.runner, target)
    }
}

/// Unmounts whatever is mounted at `target`, layer by layer, never lazily and
/// never by force. Gives what was mounted, topmost first: nothing where nothing
/// was. After success no mount is left at `target` or below it.
///
/// Where the last mount of a file system goes, its device must answer first: an
/// unmount(2) that waits for a hung disk could not be ended.
pub fn unmount(runner: &Runner, target: &Path) -> Result<Vec<Mount>, UnmountError> {
    let mut gone = Vec::new();
    let mut attempts = 0;
    loop {
        let mounts = all().map_err(UnmountError::Unreadable)?;
        if let Some(below) = mounts.iter().find(|m| m.target.starts_with(target) && m.target != target) {
            return Err(UnmountError::Below {
                target: target.display().to_string(),
                below: below.target.display().to_string(),
            });
        }
        let Some(top) = mounts.iter().rfind(|m| m.target == target).cloned() else { return Ok(gone) };
        if mounts.iter().filter(|m| m.device == top.device).count() == 1
            && let Some(node) = top.device_node()
        {
            match crate::device::probe(runner, &node) {
                Err(source) if matches!(source.kind(), io::ErrorKind::TimedOut | io::ErrorKind::ResourceBusy) => {
                    return Err(UnmountError::Device { target: target.display().to_string(), source });
                }
                // A disk that is broken or gone answers with an error, and so will the kernel.
                _ => {}
            }
        }
        fault::point("unmount-before");
        match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {
                fault::point("unmount-after");
                gone.push(top);
            }
            // Somebody else was faster: look again. If it is still listed, it
            // is hidden below another mount, and no path leads to it.
            Err(nix::Error::EINVAL | nix::Error::ENOENT) if attempts < 3 => attempts += 1,
            Err(error) => {
                return Err(UnmountError::Refused { target: target.display().to_string(), source: error.into() });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Captured on a node, shortened.
    const MOUNTINFO: &[u8] = b"\
21 0 0:20 / / rw,relatime shared:1 - overlay overlay rw,lowerdir=/,upperdir=/mnt/u\n\
64 21 253:3 / /var/log/lvprov/shop/web-logs rw,nosuid,nodev,noexec,relatime shared:31 - xfs /dev/mapper/vg0-log--0011223344556677 rw,prjquota\n\
77 21 253:3 /web-a /var/lib/kubelet/pods/1111/volumes/lvprov.io~lvm/logs rw,nosuid,nodev,noexec,relatime - xfs /dev/mapper/vg0-log--0011223344556677 rw,prjquota\n\
78 21 8:1 / /mnt/with\\040space\\134x rw master:1 propagate_from:2 - ext4 /dev/sda1 rw\n";

    #[test]
    fn mountinfo_is_read_field_by_field() {
        let mounts = parse(MOUNTINFO);
        assert_eq!(mounts.len(), 4);
        assert_eq!(mounts[1].device, (253, 3));
        assert_eq!(mounts[1].fs_type, "xfs");
        assert_eq!(mounts[2].root, Path::new("/web-a"));
        assert_eq!(mounts[2].target, Path::new("/var/lib/kubelet/pods/1111/volumes/lvprov.io~lvm/logs"));
        assert_eq!(mounts[3].target, Path::new("/mnt/with space\\x"));
        assert_eq!(mounts[3].fs_type, "ext4");
    }

    #[test]
    fn a_link_on_the_way_is_seen_through() {
        let directory = tempfile::tempdir().unwrap();
        let there = directory.path().canonicalize().unwrap().join("there");
        fs::create_dir(&there).unwrap();
        std::os::unix::fs::symlink(&there, directory.path().join("link")).unwrap();
        assert_eq!(real(&directory.path().join("link/volume")), there.join("volume"));
        assert_eq!(real(Path::new("/nonexistent/a/b")), Path::new("/nonexistent/a/b"));
    }

    #[test]
    fn unmounting_what_is_not_mounted_is_done_already() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(unmount(&Runner::default(), directory.path()).unwrap(), []);
        assert_eq!(unmount(&Runner::default(), Path::new("/nonexistent/dir")).unwrap(), []);
    }

    #[test]
    fn what_the_kernel_says_now_can_be_read() {
        assert!(all().unwrap().iter().any(|mount| mount.target == Path::new("/proc")));
    }

    proptest! {
        #[test]
        fn any_line_can_be_read(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&line);
        }

        #[test]
        fn escapes_go_back(text in "[ a-z\\\\\t\n]{0,30}") {
            let escaped: String = text.chars().map(|c| match c {
                ' ' | '\t' | '\n' | '\\' => format!("\\{:03o}", c as u32),
                c => c.to_string(),
            }).collect();
            prop_assert_eq!(unescape(escaped.as_bytes()), PathBuf::from(text));
        }
    }
}
