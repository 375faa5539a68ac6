//! Copying a device to another one, piece by piece, so that it can be left off
//! and gone on with.

use crate::command::Runner;
use crate::device;
use crate::wipe::{How, PIECE, Progress, Wiped, overwrite};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// So much is read at once.
const BLOCK: u64 = 1 << 20;

/// What a copy that has broken off was doing.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The device that is copied could not be read.
    #[error("cannot read {device} at {offset}: {source}")]
    Read {
        /// The device.
        device: String,
        /// Where.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The copy could not be written.
    #[error("cannot write {device} at {offset}: {source}")]
    Write {
        /// The device.
        device: String,
        /// Where.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
}

/// What is copied to where.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Copy<'a> {
    /// From its start,
    pub from: &'a Path,
    /// to the start of this one, which nobody else has open.
    pub to: &'a Path,
    /// Bytes.
    pub length: u64,
    /// Whether what follows is overwritten with zeros.
    pub zero_rest: bool,
    /// Whether the new device reads as zeros where nothing has been written.
    pub sparse: bool,
}

/// Copies. `go_on` is told, after each piece, how many bytes of how many are
/// done. Of the new device, nothing beyond what is copied (and zeroed) changes.
pub(crate) fn copy(
    runner: &Runner,
    copy: &Copy<'_>,
    progress: &Progress,
    go_on: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Wiped, CopyError> {
    let read = |offset| move |source| CopyError::Read { device: copy.from.display().to_string(), offset, source };
    let write = |offset| move |source| CopyError::Write { device: copy.to.display().to_string(), offset, source };
    let from = File::open(copy.from).map_err(read(0))?;
    // Exclusive: refused while it is mounted, or below another device (open(2), "O_EXCL").
    let to = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(copy.to).map_err(write(0))?;
    let has = crate::mounts::device_size(copy.to).map_err(write(0))?;
    let total = if copy.zero_rest { has } else { copy.length.min(has) };
    let mut done = progress.read().min(total) / PIECE * PIECE;
    let mut block = vec![0; BLOCK as usize];
    while done < total {
        if !go_on(done, total) {
            return Ok(Wiped::Partly);
        }
        // What hangs in the kernel could not be ended.
        for (file, path) in [(&from, copy.from), (&to, copy.to)] {
            device::refuse_suspended(file).and_then(|()| device::probe(runner, path)).map_err(read(done))?;
        }
        let end = total.min(done + PIECE);
        let mut at = done;
        while at < end {
            let length = BLOCK.min(end - at).min(copy.length.saturating_sub(at));
            if length == 0 {
                overwrite(&to, How::Zero, at, end - at).map_err(write(at))?;
                break;
            }
            let bytes = &mut block[..length as usize];
            from.read_exact_at(bytes, at).map_err(read(at))?;
            if bytes.iter().any(|byte| *byte != 0) {
                to.write_all_at(bytes, at).map_err(write(at))?;
            } else if !copy.sparse {
                overwrite(&to, How::Zero, at, length).map_err(write(at))?;
            }
            at += length;
        }
        to.sync_data().map_err(write(done))?;
        // Nobody reads either of them soon, and others need the memory.
        for file in [&from, &to] {
            let range = (i64::try_from(done), i64::try_from(end - done));
            if let (Ok(offset), Ok(length)) = range {
                let _ = posix_fadvise(file, offset, length, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
            }
        }
        done = end;
        progress.write(done);
    }
    to.sync_all().map_err(write(total))?;
    go_on(total, total);
    Ok(Wiped::Whole)
}
