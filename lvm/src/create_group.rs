//! Making a volume group that holds what is to come: its metadata area cannot
//! be enlarged later.

use crate::Lvm;
use crate::command::CommandError;
use crate::filesystem::{BlankError, prove_blank};
use crate::lock::{Lock, LockError};
use crate::mounts;
use crate::names::VgName;
use crate::report::{RESERVED_METADATA, ReportError, VOLUME_METADATA, VolumeGroup};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;
/// What LVM keeps of an area for itself.
const HEADER: u64 = 4096;
/// Volumes that a group is made for where nobody says how many.
pub const USUAL_VOLUMES: u64 = 8_000;
/// With more, each lvm command takes many seconds.
pub const MOST_VOLUMES: u64 = 50_000;

/// A group could not be made. Nothing has been changed, unless LVM says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum CreateGroupError {
    /// It is there.
    #[error("volume group {0} is there already; to add a disk to it: vgextend")]
    Exists(VgName),
    /// No disk was named.
    #[error("name the disks that the group is to have, as /dev/…")]
    NoDisks,
    /// One disk was named twice.
    #[error("{0} is named twice, perhaps under two names")]
    Twice(PathBuf),
    /// Too many volumes.
    #[error("a group for {0} volumes would be too slow; make several, with {MOST_VOLUMES} at most each")]
    TooMany(u64),
    /// It is no block device.
    #[error("{disk} is not a block device: {source}")]
    NotADisk {
        /// As it was named.
        disk: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It cannot hold the metadata and anything beside it.
    #[error("{disk} has {size} B; with a metadata area of {metadata} B nothing would be left for volumes")]
    TooSmall {
        /// The disk.
        disk: PathBuf,
        /// Bytes that it has.
        size: u64,
        /// Bytes that each disk of the group gives to metadata.
        metadata: u64,
    },
    /// Somebody uses it.
    #[error("{disk} is in use: {why}. Nothing has been changed")]
    InUse {
        /// The disk.
        disk: PathBuf,
        /// By what.
        why: String,
    },
    /// There is something on it.
    #[error(transparent)]
    NotBlank(#[from] BlankError),
    /// The lock was not free in time.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// LVM could not be asked.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// LVM refused.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// It is not there after all.
    #[error("lvm has made volume group {0}, and does not show it; `lvprov doctor` may tell why")]
    Vanished(VgName),
}

/// Bytes of a metadata area that holds the description of so many volumes
/// twice: the one that counts, and the one that is being written.
pub fn metadata_size(volumes: u64) -> u64 {
    let copy = volumes.saturating_mul(VOLUME_METADATA).saturating_add(RESERVED_METADATA);
    copy.saturating_mul(2).saturating_add(HEADER).next_multiple_of(MIB)
}

impl Lvm {
    /// Makes a volume group of blank disks that nobody uses, with room for the
    /// metadata of so many volumes. One report before, `vgcreate`, and one after.
    pub fn create_group(&self, vg: &VgName, disks: &[PathBuf], volumes: u64) -> Result<VolumeGroup, CreateGroupError> {
        if volumes > MOST_VOLUMES {
            return Err(CreateGroupError::TooMany(volumes));
        }
        let metadata = metadata_size(volumes);
        let mut lock = Lock::volume_group(vg, self.patience())?;
        if self.volume_groups()?.iter().any(|group| group.name == *vg) {
            return Err(CreateGroupError::Exists(vg.clone()));
        }
        self.check_disks(disks, metadata)?;
        // Without --yes: what LVM would ask about is refused.
        let mut args = vec!["vgcreate".to_owned(), "--quiet".to_owned()];
        args.extend(["--metadatasize".to_owned(), format!("{metadata}b"), vg.to_string()]);
        args.extend(disks.iter().map(|disk| disk.display().to_string()));
        self.mutate(&mut lock, &args)?;
        let made = self.volume_groups()?.into_iter().find(|group| group.name == *vg);
        made.ok_or_else(|| CreateGroupError::Vanished(vg.clone()))
    }

    /// Whether all of these may be taken.
    pub fn check_disks(&self, disks: &[PathBuf], metadata: u64) -> Result<(), CreateGroupError> {
        if disks.is_empty() {
            return Err(CreateGroupError::NoDisks);
        }
        let mut seen = Vec::new();
        for disk in disks {
            let not_a_disk = |source| CreateGroupError::NotADisk { disk: disk.clone(), source };
            if !disk.is_absolute() || !disk.display().to_string().bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(not_a_disk(io::Error::new(io::ErrorKind::InvalidInput, "its path is not /dev/…")));
            }
            let number = mounts::device_number(disk).map_err(not_a_disk)?;
            if seen.contains(&number) {
                return Err(CreateGroupError::Twice(disk.clone()));
            }
            seen.push(number);
            let size = mounts::device_size(disk).map_err(not_a_disk)?;
            if size <= metadata.saturating_add(8 * MIB) {
                return Err(CreateGroupError::TooSmall { disk: disk.clone(), size, metadata });
            }
            if let Some(why) = user_of(disk, number).map_err(not_a_disk)? {
                return Err(CreateGroupError::InUse { disk: disk.clone(), why });
            }
            prove_blank(&self.runner, disk)?;
        }
        Ok(())
    }
}

/// What uses a disk, as far as can be seen. An exclusive open is the kernel's
/// own answer: mounts of any namespace, swap, RAIDs and device-mapper hold one.
fn user_of(disk: &Path, number: (u32, u32)) -> io::Result<Option<String>> {
    use std::os::unix::fs::OpenOptionsExt;
    let sys = PathBuf::from(format!("/sys/dev/block/{}:{}", number.0, number.1));
    let names = |directory: &Path| -> Vec<String> {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    let holders = names(&sys.join("holders"));
    if !holders.is_empty() {
        return Ok(Some(format!("{} lies on it", holders.join(", "))));
    }
    let parts: Vec<String> = names(&sys).into_iter().filter(|name| sys.join(name).join("partition").exists()).collect();
    if !parts.is_empty() {
        return Ok(Some(format!("it has partitions ({}); name one of them", parts.join(", "))));
    }
    if let Some(mount) = mounts::all()?.into_iter().find(|mount| mount.device == number) {
        return Ok(Some(format!("it is mounted at {}", mount.target.display())));
    }
    match fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(disk) {
        Ok(_) => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            Ok(Some("the kernel says so (swap, or a mount in another mount namespace?)".to_owned()))
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NodeConfig;
    use crate::report::volumes_that_fit;
    use proptest::prelude::*;

    #[test]
    fn what_is_no_disk_is_refused_before_lvm_is_asked() {
        let lvm = Lvm::new(NodeConfig::default());
        let refused = |disks: &[&str]| {
            let disks: Vec<PathBuf> = disks.iter().map(PathBuf::from).collect();
            lvm.check_disks(&disks, MIB).unwrap_err().to_string()
        };
        assert!(refused(&[]).contains("/dev/…"));
        assert!(refused(&["--force"]).contains("not a block device"));
        assert!(refused(&["/dev/null"]).contains("not a block device"));
        assert!(refused(&["/nonexistent"]).contains("not a block device"));
    }

    proptest! {
        /// LVM uses half of it, rounded down to sectors.
        #[test]
        fn a_metadata_area_holds_what_it_was_made_for(volumes in 0..=MOST_VOLUMES) {
            let size = metadata_size(volumes);
            prop_assert_eq!(size % MIB, 0);
            prop_assert!(volumes_that_fit((size - HEADER) / 2) >= volumes);
            prop_assert!(size <= 2 * volumes * VOLUME_METADATA + 2 * MIB);
        }
    }
}
