//! Damaged file systems: repaired only where the node's policy says so, and
//! only by what throws nothing away.

use crate::Lvm;
use crate::command::{CommandError, Kind, Runner};
use crate::config::Repair;
use crate::filesystem::FsType;
use crate::lock::Lock;
use std::ffi::OsStr;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

/// How the kernel says that what is on the disk makes no sense: EFSCORRUPTED
/// and EFSBADCRC of xfs and ext4. EIO is no such case: the disk itself is ill.
fn is_damage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EUCLEAN | libc::EBADMSG))
}

impl Lvm {
    /// Mounts; where the kernel finds damage and the policy allows it, repairs
    /// and mounts once more. `lock`: that of the volume, held.
    pub(crate) fn mount_repairing(
        &self,
        lock: &Lock,
        device: &Path,
        fs: FsType,
        mount: impl Fn() -> io::Result<()>,
    ) -> io::Result<()> {
        match mount() {
            Err(error) if self.may_repair(&error, fs) => {
                repair(&self.runner, lock.fd(), device, fs)
                    .map_err(|failed| io::Error::other(format!("{error}; repairing it: {failed}")))?;
                mount()
            }
            other => other,
        }
    }

    /// Whether a mount that failed so is worth taking the volume's lock for.
    pub(crate) fn may_repair(&self, error: &io::Error, fs: FsType) -> bool {
        is_damage(error) && self.config.repair == Repair::Safe && tool(fs).is_some()
    }
}

/// The program that repairs without throwing anything away, and its options.
fn tool(fs: FsType) -> Option<(&'static str, &'static [&'static str])> {
    match fs {
        // Without -L it refuses to throw a log away (xfs_repair(8)).
        FsType::Xfs => Some(("xfs_repair", &[])),
        FsType::Ext4 => Some(("e2fsck", &["-p"])),
        // `btrfs check --repair` is for developers of Btrfs (btrfs-check(8)).
        FsType::Btrfs => None,
    }
}

fn repair(runner: &Runner, lock: BorrowedFd<'_>, device: &Path, fs: FsType) -> Result<(), CommandError> {
    let Some((program, options)) = tool(fs) else { return Ok(()) };
    let args: Vec<&OsStr> = options.iter().map(OsStr::new).chain([device.as_os_str()]).collect();
    let done = runner.run(Kind::Tool, program, &args, Some(lock))?;
    // e2fsck(8): 1 is "errors were corrected".
    if fs == FsType::Ext4 && done.status.code() == Some(1) { Ok(()) } else { done.success().map(drop) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filesystem::{MkfsOptions, NewFs};
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;
    use uuid::Uuid;

    #[test]
    fn only_damage_is_repaired() {
        for (errno, damage) in [(libc::EUCLEAN, true), (libc::EBADMSG, true), (libc::EIO, false), (libc::EBUSY, false)]
        {
            assert_eq!(is_damage(&io::Error::from_raw_os_error(errno)), damage);
        }
    }

    #[test]
    fn what_a_tool_can_repair_is_repaired() {
        for fs in [FsType::Xfs, FsType::Ext4] {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(fs.minimum_size()).unwrap();
            let (runner, lock) = (Runner::default(), file.as_file().as_fd());
            let options = MkfsOptions::default();
            let new = NewFs { fs, uuid: Uuid::from_u128(7), quota: false, again: false, options: &options };
            crate::filesystem::make(&runner, lock, file.path(), &new).unwrap();
            // A count of the superblock, which its copies know better; the
            // checksum of a group (1 KiB blocks, so the groups are at 2048).
            let at = if fs == FsType::Xfs { 136 } else { 2048 + 0x1c };
            file.as_file().write_all_at(&[0x5a; 4], at).unwrap();
            repair(&runner, lock, file.path(), fs).unwrap();
            let mut repaired = [0; 4];
            file.as_file().read_exact_at(&mut repaired, at).unwrap();
            assert_ne!(repaired, [0x5a; 4], "{fs}");
        }
    }

    #[test]
    fn what_no_tool_can_repair_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(16 << 20).unwrap();
        assert!(repair(&Runner::default(), file.as_file().as_fd(), file.path(), FsType::Ext4).is_err());
    }
}
