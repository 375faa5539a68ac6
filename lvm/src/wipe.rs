//! Overwriting a device, piece by piece, so that it can be left off and gone on
//! with, and nobody waits for it with a lock in his hand.
//!
//! Zeros are written by the kernel (BLKZEROOUT, block/ioctl.c): by the disk's
//! own command where it has one that is bound to read as zeros, else as pages.
//! A discard alone (BLKDISCARD) promises nothing of what is read afterwards:
//! Linux says so of every device (`discard_zeroes_data` in sysfs is 0).

use crate::command::Runner;
use crate::device;
use crate::lock::DIRECTORY;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// So much is overwritten between two looks at whether to go on.
pub(crate) const PIECE: u64 = 64 << 20;

/// How a device is wiped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// It reads as zeros afterwards.
    Zero,
    /// The disk may forget what it holds.
    Discard,
}

/// How a wipe ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wiped {
    /// It has been done, and is on the disk.
    Whole,
    /// It has been left off; the next one goes on there, unless the node was
    /// started anew.
    Partly,
    /// The device takes no discards; nothing was done.
    Unable,
}

#[allow(missing_docs, reason = "of a macro")]
mod ioctl {
    // <linux/fs.h>
    nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);
    nix::ioctl_write_ptr_bad!(blkzeroout, nix::request_code_none!(0x12, 127), [u64; 2]);
}

/// The kernel's own id of a logical volume's device: of its group's and its own
/// UUID, so that no other has ever had it.
pub fn dm_uuid(node: &Path) -> io::Result<String> {
    let number = fs::metadata(node)?.rdev();
    let path = format!("/sys/dev/block/{}:{}/dm/uuid", libc::major(number), libc::minor(number));
    let uuid = fs::read_to_string(path)?.trim().to_owned();
    if uuid.is_empty() || !uuid.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the device has no id of LVM's"));
    }
    Ok(uuid)
}

/// How far a wipe has come. In /run, so that it is forgotten together with what
/// a disk may not have written when the power goes.
#[derive(Debug)]
pub struct Progress(PathBuf);

impl Progress {
    /// Of one wipe of one volume; `purpose` sets it apart from others of it.
    pub fn of(node: &Path, purpose: &str) -> io::Result<Self> {
        Ok(Self(Path::new(DIRECTORY).join("wipes").join(format!("{}-{purpose}", dm_uuid(node)?))))
    }

    pub(crate) fn read(&self) -> u64 {
        fs::read_to_string(&self.0).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    pub(crate) fn write(&self, done: u64) {
        // What cannot be noted is wiped twice.
        let _ = self.0.parent().map(fs::create_dir_all);
        let next = self.0.with_extension("next");
        let _ = fs::write(&next, done.to_string()).and_then(|()| fs::rename(&next, &self.0));
    }

    /// The wipe has ended.
    pub fn forget(&self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Wipes a device that nobody else has open. `go_on` is told, after each piece,
/// how many bytes of how many are done.
pub fn wipe(
    runner: &Runner,
    node: &Path,
    how: How,
    progress: &Progress,
    go_on: &mut dyn FnMut(u64, u64) -> bool,
) -> io::Result<Wiped> {
    // Exclusive: refused while it is mounted, or below another device (open(2), "O_EXCL").
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(node)?;
    let total = crate::mounts::device_size(node)?;
    let mut done = progress.read().min(total) / PIECE * PIECE;
    while done < total {
        if !go_on(done, total) {
            return Ok(Wiped::Partly);
        }
        // What hangs in an ioctl could not be ended.
        device::refuse_suspended(&file)?;
        device::probe(runner, node)?;
        let length = PIECE.min(total - done);
        match overwrite(&file, how, done, length) {
            Err(error) if how == How::Discard && error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                return Ok(Wiped::Unable);
            }
            other => other?,
        }
        done += length;
        progress.write(done);
    }
    file.sync_all()?;
    go_on(total, total);
    Ok(Wiped::Whole)
}

/// One range, by one call of the kernel.
#[allow(unsafe_code)]
pub(crate) fn overwrite(file: &File, how: How, start: u64, length: u64) -> io::Result<()> {
    let range = [start, length];
    // SAFETY: both take a pointer to two u64 and write nothing to it.
    let done = unsafe {
        match how {
            How::Zero => ioctl::blkzeroout(file.as_raw_fd(), &raw const range),
            How::Discard => ioctl::blkdiscard(file.as_raw_fd(), &raw const range),
        }
    };
    Ok(done.map(drop)?)
}
