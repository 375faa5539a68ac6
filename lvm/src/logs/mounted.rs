//! The log volumes that are mounted, read from the kernel alone: no lvm, no
//! lock, nothing mounted to look inside. For whoever asks often.

use super::{Directory, LogError, io};
use crate::Lvm;
use crate::mounts::Mount;
use crate::names::{LogVolumeName, LvName, Namespace, VgName};
use crate::volume::device;
use nix::sys::statvfs::statvfs;
use std::collections::BTreeMap;
use std::io::Error;
use std::path::{Path, PathBuf};

/// A mounted log volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountedLog {
    /// Its volume group.
    pub vg: VgName,
    /// Its logical volume.
    pub lv: LvName,
    /// Namespace.
    pub namespace: Namespace,
    /// Name in that namespace.
    pub volume: LogVolumeName,
    /// Where it is mounted.
    pub path: PathBuf,
}

/// What a file system has (statvfs(3)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes for files.
    pub size: u64,
    /// Bytes in use, quotas or not.
    pub used: u64,
    /// Bytes that a pod can still write.
    pub available: u64,
    /// Files and directories that there can be.
    pub files: u64,
    /// How many more there can be.
    pub free_files: u64,
}

impl Lvm {
    /// Those of `mounts` that are log volumes at their own place, in its order.
    pub fn mounted_logs(&self, mounts: &[Mount]) -> Vec<MountedLog> {
        // Of several mounts at one place the last is the one that is seen.
        let by_path: BTreeMap<&Path, &Mount> = mounts.iter().map(|mount| (mount.target.as_path(), mount)).collect();
        by_path.values().filter_map(|mount| at_its_place(mount, &self.config.log_root)).collect()
    }

    /// What one has room for, and its directories. `mounts`: all there are.
    ///
    /// # Errors
    /// When the file system does not answer, as one that the kernel has shut
    /// down, or its disk does not.
    pub fn look_into_log(&self, log: &MountedLog, mounts: &[Mount]) -> Result<(Space, Vec<Directory>), LogError> {
        // What is in memory would still be told; what is not would be waited for.
        let node = device(&log.vg, &log.lv);
        crate::device::answers(&node).map_err(io("read", &node))?;
        let space = space(&log.path).map_err(io("look at", &log.path))?;
        Ok((space, self.directories(&log.path, &node, mounts)?))
    }
}

fn at_its_place(mount: &Mount, log_root: &Path) -> Option<MountedLog> {
    let (namespace, volume) = names_at(&mount.target, log_root)?;
    if mount.root != Path::new("/") {
        return None;
    }
    let (vg, lv) = mount.logical_volume()?;
    let path = mount.target.clone();
    (lv == LvName::for_log(&namespace, &volume)).then_some(MountedLog { vg, lv, namespace, volume, path })
}

/// The log volume that belongs at this place: `<log root>/<namespace>/<volume>`,
/// and nothing above or below.
pub fn names_at(target: &Path, log_root: &Path) -> Option<(Namespace, LogVolumeName)> {
    let mut parts = target.strip_prefix(log_root).ok()?.iter();
    let namespace = Namespace::parse(parts.next()?.to_str()?).ok()?;
    let volume = LogVolumeName::parse(parts.next()?.to_str()?).ok()?;
    parts.next().is_none().then_some((namespace, volume))
}

fn space(path: &Path) -> Result<Space, Error> {
    let stat = statvfs(path)?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.fragment_size());
    Ok(Space {
        size: bytes(stat.blocks()),
        used: bytes(stat.blocks().saturating_sub(stat.blocks_free())),
        available: bytes(stat.blocks_available()),
        files: stat.files(),
        free_files: stat.files_free(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_place_of_a_log_volume_is_one() {
        let root = Path::new("/var/log/lvprov");
        let of =
            |path: &str| names_at(Path::new(path), root).map(|(namespace, volume)| format!("{namespace} {volume}"));
        assert_eq!(of("/var/log/lvprov/shop/web").as_deref(), Some("shop web"));
        for other in [
            "/var/log/lvprov",
            "/var/log/lvprov/shop",
            "/var/log/lvprov/shop/web/a",
            "/var/log/lvprov/Shop/web",
            "/srv/shop/web",
            "/",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn a_file_system_says_what_it_has() {
        let space = space(Path::new("/")).unwrap();
        assert!(space.size > 0 && space.used <= space.size && space.available <= space.size);
        assert!(super::space(Path::new("/nonexistent")).is_err());
    }
}
