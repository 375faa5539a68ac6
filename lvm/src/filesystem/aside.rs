//! Mounting a file system where nobody looks, for what only the kernel can do.

use super::{FsType, grow};
use crate::command::{CommandError, Runner};
use crate::mounts;
use nix::mount::MsFlags;
use std::io;
use std::path::{Path, PathBuf};

/// A file system that nobody has mounted could not be grown.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// It could not be mounted for that.
    #[error("cannot mount {device} to grow its file system: {source}")]
    Mount {
        /// The device.
        device: String,
        /// What the system said.
        source: io::Error,
    },
    /// The tool refused.
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// Mounts it, has `work` done at its place, and unmounts it. What it had begun
/// is brought to its end by the kernel.
pub(super) fn mounted_aside<T>(fs: FsType, device: &Path, work: impl FnOnce(&Path) -> T) -> io::Result<T> {
    let name = device.file_name().unwrap_or_default();
    let at: PathBuf = Path::new(crate::lock::DIRECTORY).join("replay").join(name);
    std::fs::create_dir_all(&at)?;
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    // Of a copy the original may be mounted.
    let data = if fs == FsType::Xfs { "nouuid" } else { "" };
    // One that a crash has left is of this device, and no hindrance.
    let mounted = match mounts::at(&at)? {
        Some(_) => Ok(()),
        None => mounts::mount_device(device, &at, fs.as_str(), flags, data),
    };
    let done = mounted.and_then(|()| {
        let done = work(&at);
        nix::mount::umount(&at)?;
        Ok(done)
    });
    let _ = std::fs::remove_dir(&at);
    done
}

/// Grows a file system that nobody has mounted to the size of its device.
pub fn grow_unmounted(runner: &Runner, fs: FsType, device: &Path) -> Result<(), GrowError> {
    let grown = mounted_aside(fs, device, |at| grow(runner, fs, device, at));
    Ok(grown.map_err(|source| GrowError::Mount { device: device.display().to_string(), source })??)
}
