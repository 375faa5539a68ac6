//! Giving a file system that nobody uses another UUID.

use super::{FsType, superblock};
use crate::command::{CommandError, Kind, Runner};
use crate::mounts;
use ::uuid::Uuid;
use nix::mount::MsFlags;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

/// A UUID could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum UuidError {
    /// The tool refused.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// It could not be read, or brought in order.
    #[error("cannot {what} {device}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The device.
        device: String,
        /// What the system said.
        source: io::Error,
    },
    /// The tool says that it has, and yet it has not.
    #[error("the file system on {device} still has another UUID: {said}")]
    Unchanged {
        /// The device.
        device: String,
        /// What the tool said.
        said: String,
    },
}

/// Gives the unmounted file system on a device another UUID. The same again
/// changes nothing, and puts right what was cut off.
pub fn set_uuid(runner: &Runner, fs: FsType, device: &Path, uuid: Uuid) -> Result<(), UuidError> {
    let io = |what| {
        let device = device.display().to_string();
        move |source| UuidError::Io { what, device, source }
    };
    let has = |what| superblock(runner, device).map_err(io(what)).map(|found| found.map(|found| found.uuid));
    let (text, said);
    match fs {
        FsType::Ext4 => {
            // Replays its journal, too; 1 is "errors corrected" (e2fsck(8)).
            let args = ["-f".as_ref(), "-p".as_ref(), device.as_os_str()];
            let checked = runner.run(Kind::Tool, "e2fsck", &args, None)?;
            if checked.status.code() != Some(1) {
                checked.success()?;
            }
            text = uuid.to_string();
            let args = ["-U".as_ref(), OsStr::new(&text), device.as_os_str()];
            said = runner.run(Kind::Tool, "tune2fs", &args, None)?.success()?;
        }
        FsType::Xfs => {
            replay(fs, device).map_err(io("replay the journal of"))?;
            text = format!("uuid {uuid}");
            // What xfs_admin(8), a script, does.
            let args = ["-x".as_ref(), "-c".as_ref(), OsStr::new(&text), device.as_os_str()];
            said = runner.run(Kind::Tool, "xfs_db", &args, None)?.success()?;
        }
        FsType::Btrfs => {
            replay(fs, device).map_err(io("replay the log of"))?;
            text = uuid.to_string();
            let args = ["-M".as_ref(), OsStr::new(&text), device.as_os_str()];
            said = runner.run(Kind::Tool, "btrfstune", &args, None)?.success()?;
        }
    }
    if has("read")? == Some(uuid) {
        return Ok(());
    }
    let said = [said.stdout, said.stderr].concat();
    let said = String::from_utf8_lossy(&said).split_whitespace().collect::<Vec<_>>().join(" ");
    Err(UuidError::Unchanged { device: device.display().to_string(), said: said.chars().take(300).collect() })
}

/// Mounts and unmounts it, where nobody looks: what it had begun is brought to
/// its end by the kernel.
fn replay(fs: FsType, device: &Path) -> io::Result<()> {
    let name = device.file_name().unwrap_or_default();
    let at: PathBuf = Path::new(crate::lock::DIRECTORY).join("replay").join(name);
    std::fs::create_dir_all(&at)?;
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    let data = if fs == FsType::Xfs { "nouuid" } else { "" };
    // One that a crash has left is of this device, and no hindrance.
    let mounted = match mounts::at(&at)? {
        Some(_) => Ok(()),
        None => mounts::mount_device(device, &at, fs.as_str(), flags, data),
    };
    let unmounted = mounted.and_then(|()| Ok(nix::mount::umount(&at)?));
    let _ = std::fs::remove_dir(&at);
    unmounted
}
