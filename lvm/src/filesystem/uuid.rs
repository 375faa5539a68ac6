//! Giving a file system that nobody uses another UUID.

use super::aside::mounted_aside;
use super::{FsType, superblock};
use crate::command::{CommandError, Kind, Runner};
use ::uuid::Uuid;
use std::ffi::OsStr;
use std::io;
use std::path::Path;

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
            mounted_aside(fs, device, |_| ()).map_err(io("replay the journal of"))?;
            text = format!("uuid {uuid}");
            // What xfs_admin(8), a script, does.
            let args = ["-x".as_ref(), "-c".as_ref(), OsStr::new(&text), device.as_os_str()];
            said = runner.run(Kind::Tool, "xfs_db", &args, None)?.success()?;
        }
        FsType::Btrfs => {
            // With the one that it is a copy of mounted, the kernel refuses it.
            if super::btrfs_has_log(runner, device).map_err(io("read"))? {
                mounted_aside(fs, device, |_| ()).map_err(io("replay the log of"))?;
            }
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
