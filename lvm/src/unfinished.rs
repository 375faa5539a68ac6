//! Notes of data volumes whose file systems are being made. mkfs overwrites the
//! mark of a new volume long before it writes what a file system is known by: a
//! volume whose mkfs was cut off in between would look like one in use that has
//! lost its superblock. The notes outlast a reboot, and none is left of a volume
//! that anybody has been given.

use crate::wipe::dm_uuid;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// Notes are named by the kernel's id of the device, which no other ever has.
const DIRECTORY: &str = "/var/lib/lvprov/mkfs";

fn at(node: &Path) -> io::Result<PathBuf> {
    Ok(Path::new(DIRECTORY).join(dm_uuid(node)?))
}

fn sync_directory() -> io::Result<()> {
    File::open(DIRECTORY)?.sync_all()
}

/// Notes, on disk, that a file system is about to be made.
pub(crate) fn begin(node: &Path) -> io::Result<()> {
    let path = at(node)?;
    fs::create_dir_all(DIRECTORY)?;
    File::create(path)?.sync_all()?;
    sync_directory()
}

/// Whether one was begun, and nobody has been given the volume since.
pub(crate) fn is_begun(node: &Path) -> bool {
    at(node).is_ok_and(|path| path.exists())
}

/// Takes the note away, on disk: to be called before anybody is given the volume.
pub(crate) fn end(node: &Path) -> io::Result<()> {
    // What has no id has no note.
    let Ok(path) = at(node) else { return Ok(()) };
    match fs::remove_file(path) {
        Ok(()) => sync_directory(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
