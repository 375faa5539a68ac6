//! Project quotas: a directory tree with a hard limit of its own.
//!
//! quotactl(2) and the FS_IOC_FSSETXATTR ioctl (linux/fs.h) do on XFS and ext4
//! alike what is needed, so no tool is run.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// `struct fsxattr` of linux/fs.h.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct FsXattr {
    xflags: u32,
    extsize: u32,
    nextents: u32,
    projid: u32,
    cowextsize: u32,
    pad: [u8; 8],
}

/// New files and directories take the project of their directory.
const FS_XFLAG_PROJINHERIT: u32 = 0x200;
/// linux/quota.h: quotas of projects.
const PRJQUOTA: libc::c_int = 2;

mod ioctl {
    #![allow(unsafe_code, missing_docs)]
    nix::ioctl_read!(get_xattr, b'X', 31, super::FsXattr);
    nix::ioctl_write_ptr!(set_xattr, b'X', 32, super::FsXattr);
}

/// Puts an empty directory, and all that will be made in it, into a project.
#[allow(unsafe_code)]
pub fn set_project(directory: impl AsFd, project: u32) -> io::Result<()> {
    let fd = directory.as_fd().as_raw_fd();
    let mut attributes = FsXattr::default();
    // SAFETY: fd is open, and the struct is the kernel's own layout.
    unsafe { ioctl::get_xattr(fd, &mut attributes) }?;
    attributes.projid = project;
    attributes.xflags |= FS_XFLAG_PROJINHERIT;
    // SAFETY: as above.
    unsafe { ioctl::set_xattr(fd, &attributes) }?;
    Ok(())
}

/// The project of a directory; 0 means none.
#[allow(unsafe_code)]
pub fn project(directory: impl AsFd) -> io::Result<u32> {
    let mut attributes = FsXattr::default();
    // SAFETY: the descriptor is open, and the struct is the kernel's own layout.
    unsafe { ioctl::get_xattr(directory.as_fd().as_raw_fd(), &mut attributes) }?;
    Ok(attributes.projid)
}

/// Use and hard limits of a project; a limit of 0 means none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes in use.
    pub used: u64,
    /// The hard limit in bytes.
    pub limit: u64,
    /// Files, directories and links in use.
    pub files: u64,
    /// The hard limit of their number.
    pub files_limit: u64,
}

/// Bytes of quota for each file: what mke2fs(8) reckons with. Files take room
/// too that no quota of bytes counts, so their number is limited as well.
const BYTES_PER_FILE: u64 = 16 << 10;
/// So many files are always allowed.
const LEAST_FILES: u64 = 256;

/// The number of files that goes with a quota, where nobody says: one for each
/// 16 KiB, 256 at least.
pub fn files_for(bytes: u64) -> u64 {
    (bytes / BYTES_PER_FILE).max(LEAST_FILES)
}

/// Sets the hard limits of a project: bytes, rounded down to 1 KiB but never to
/// none, and the number of files. `device`: the block device of the mounted
/// file system.
pub fn set_limit(device: &Path, project: u32, bytes: u64, files: u64) -> io::Result<()> {
    // quotactl(2) counts limits in units of 1 KiB.
    let blocks = (bytes / 1024).max(1);
    let mut limits = dqblk();
    limits.dqb_bhardlimit = blocks;
    limits.dqb_bsoftlimit = blocks;
    limits.dqb_ihardlimit = files;
    limits.dqb_isoftlimit = limits.dqb_ihardlimit;
    limits.dqb_valid = libc::QIF_BLIMITS | libc::QIF_ILIMITS;
    quotactl(libc::Q_SETQUOTA, device, project, &mut limits)
}

/// Use and limits of a project; all 0 where nothing is known of it yet.
pub fn usage(device: &Path, project: u32) -> io::Result<Usage> {
    // The kernel gives ENOENT for a missing device and for an unknown project alike.
    std::fs::metadata(device)?;
    let mut limits = dqblk();
    match quotactl(libc::Q_GETQUOTA, device, project, &mut limits) {
        Ok(()) => Ok(Usage {
            used: limits.dqb_curspace,
            limit: limits.dqb_bhardlimit.saturating_mul(1024),
            files: limits.dqb_curinodes,
            files_limit: limits.dqb_ihardlimit,
        }),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT)) => Ok(Usage::default()),
        Err(error) => Err(error),
    }
}

fn dqblk() -> libc::dqblk {
    libc::dqblk {
        dqb_bhardlimit: 0,
        dqb_bsoftlimit: 0,
        dqb_curspace: 0,
        dqb_ihardlimit: 0,
        dqb_isoftlimit: 0,
        dqb_curinodes: 0,
        dqb_btime: 0,
        dqb_itime: 0,
        dqb_valid: 0,
    }
}

#[allow(unsafe_code)]
fn quotactl(command: libc::c_int, device: &Path, project: u32, limits: &mut libc::dqblk) -> io::Result<()> {
    let device = CString::new(device.as_os_str().as_bytes())?;
    let command = (command << 8) | PRJQUOTA; // QCMD of sys/quota.h
    // SAFETY: the path ends with NUL, and the kernel reads or fills the struct it knows.
    let status =
        unsafe { libc::quotactl(command, device.as_ptr(), project.cast_signed(), std::ptr::from_mut(limits).cast()) };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_struct_is_the_kernels() {
        assert_eq!(size_of::<FsXattr>(), 28);
    }

    #[test]
    fn a_file_system_without_quotas_says_so() {
        assert!(set_limit(Path::new("/nonexistent"), 1000, 1 << 20, 256).is_err());
        assert!(usage(Path::new("/nonexistent"), 1000).is_err());
    }
}
