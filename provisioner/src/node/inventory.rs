//! Everything of ours on this node: on its disks, and in its mount table.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use lvm::Lvm;
use lvm::identity::Owner;
use lvm::logs::{LogError, LogVolume};
use lvm::mounts::{self, Mount};
use lvm::names::{LvName, PodUid, VgName};
use lvm::report::{LogicalVolume, ReportError};
use lvprov_proto::lvprov as wire;
use lvprov_proto::lvprov::inventory_item::Item;
use tonic::Status;

use super::addressee::Misdirected;
use super::served::Served;

/// Directory of our FlexVolume mounts in a pod's directory.
const PLUGIN_DIRECTORY: &str = "volumes/lvprov.io~lvm";

/// Why there is no inventory. Half of one would look like things had gone, so
/// it is all or nothing.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// The call is for another node.
    #[error(transparent)]
    Misdirected(#[from] Misdirected),
    /// LVM could not be asked.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// The log volumes could not be looked at.
    #[error(transparent)]
    Logs(#[from] LogError),
    /// The mount table could not be read.
    #[error("cannot read the mounts of this node")]
    Mounts(#[source] io::Error),
    /// The work broke off.
    #[error("the inventory broke off: {0}")]
    Interrupted(String),
}

impl From<InventoryError> for Status {
    fn from(error: InventoryError) -> Self {
        // In every case it is not known what there is; asking again may tell.
        Status::unavailable(crate::with_causes(&error))
    }
}

/// Where kubelet keeps its pods: a real path, as the mount table has them.
#[derive(Debug, Clone)]
pub struct PodsDirectory(PathBuf);

impl PodsDirectory {
    /// Below kubelet's root directory.
    pub fn new(kubelet_root: &Path) -> Self {
        // A root that is a link shows as its target in the mount table.
        let root = std::fs::canonicalize(kubelet_root).unwrap_or_else(|_| kubelet_root.to_owned());
        Self(root.join("pods"))
    }

    /// The UID of the pod that a volume is mounted for, if `target` is the
    /// mount point of a FlexVolume of ours.
    pub fn pod_of(&self, target: &Path) -> Option<PodUid> {
        let below = target.strip_prefix(&self.0).ok()?;
        let uid = below.iter().next()?.to_str()?;
        let volume = below.strip_prefix(uid).ok()?.strip_prefix(PLUGIN_DIRECTORY).ok()?;
        if volume.iter().count() != 1 {
            return None;
        }
        PodUid::parse(uid).ok()
    }
}

/// Looks at everything. One lvm report.
///
/// # Errors
/// When anything cannot be looked at.
pub fn take(lvm: &Lvm, served: &Served, pods: &PodsDirectory) -> Result<Vec<wire::InventoryItem>, InventoryError> {
    // Mounts first: what is mounted now cannot be removed before the report
    // without being unmounted, while the other way round a new volume would
    // look like a mount without one.
    let mounted = mounts::all().map_err(InventoryError::Mounts)?;
    let volumes: Vec<LogicalVolume> = lvm.volumes()?.into_iter().filter(|lv| served.includes(&lv.vg)).collect();
    let logs = lvm.log_volumes(&volumes)?;

    let data = volumes.iter().filter_map(data_volume).map(Item::DataVolume);
    let log_volumes = logs.iter().map(log_volume).map(Item::LogVolume);
    let directories = logs.iter().flat_map(log_directories).map(Item::LogDirectory);
    let known: HashMap<(&VgName, &LvName), &LogicalVolume> =
        volumes.iter().map(|lv| ((&lv.vg, &lv.name), lv)).collect();
    let mounts = mounted
        .iter()
        .filter_map(|mount| {
            let (vg, lv) = mount.logical_volume()?;
            let ours = known.contains_key(&(&vg, &lv));
            describe(mount, &vg, &lv, ours, served, pods, &lvm.config.log_root)
        })
        .map(Item::Mount);
    Ok(data
        .chain(log_volumes)
        .chain(directories)
        .chain(mounts)
        .map(|item| wire::InventoryItem { item: Some(item) })
        .collect())
}

fn data_volume(lv: &LogicalVolume) -> Option<wire::DataVolume> {
    let Owner::Data(owner) = &lv.owner else { return None };
    Some(wire::DataVolume {
        volume_group: lv.vg.to_string(),
        logical_volume: lv.name.to_string(),
        size_bytes: lv.size,
        created_unix: lv.created,
        claim_uid: owner.claim_uid.to_string(),
        claim_namespace: owner.namespace.to_string(),
        claim_name: owner.claim.to_string(),
        cluster: owner.cluster.to_string(),
        open: lv.open,
    })
}

fn log_volume(log: &LogVolume) -> wire::LogVolume {
    wire::LogVolume {
        volume_group: log.lv.vg.to_string(),
        logical_volume: log.lv.name.to_string(),
        size_bytes: log.lv.size,
        created_unix: log.lv.created,
        namespace: log.namespace.to_string(),
        volume: log.volume.to_string(),
        directories: log.directories.as_ref().map_or(0, |all| u32::try_from(all.len()).unwrap_or(u32::MAX)),
        mounted: log.directories.is_some(),
        path: log.path.display().to_string(),
    }
}

fn log_directories(log: &LogVolume) -> Vec<wire::LogDirectory> {
    let directories = log.directories.as_deref().unwrap_or_default();
    directories
        .iter()
        .map(|directory| wire::LogDirectory {
            volume_group: log.lv.vg.to_string(),
            logical_volume: log.lv.name.to_string(),
            namespace: log.namespace.to_string(),
            volume: log.volume.to_string(),
            directory: directory.name.clone(),
            // The directory is named for its pod.
            pod_name: directory.name.clone(),
            pod_uid: directory.record.as_ref().map(|record| record.pod_uid.clone()).unwrap_or_default(),
            used_bytes: directory.used,
            quota_bytes: directory.quota,
            retention_seconds: directory.record.as_ref().map_or(0, |record| record.retention),
            last_used_unix: directory.record.as_ref().map_or(0, |record| record.last_used),
            mounted: directory.mounted,
            path: directory.path.display().to_string(),
        })
        .collect()
}

/// A mount that belongs in the inventory. `ours`: LVM knows the volume, and it
/// carries our tags.
fn describe(
    mount: &Mount,
    vg: &VgName,
    lv: &LvName,
    ours: bool,
    served: &Served,
    pods: &PodsDirectory,
    log_root: &Path,
) -> Option<wire::Mount> {
    let pod = pods.pod_of(&mount.target);
    let reason = match (&pod, ours) {
        (Some(_), true) => "mounted for a pod",
        // Only where nothing but our own mounts can be.
        (Some(_), false) => "its logical volume is gone, or has lost our tags",
        (None, false) if mount.target.starts_with(log_root) => "its logical volume is gone, or has lost our tags",
        (None, _) => return None,
    };
    if !served.includes(vg) {
        return None;
    }
    Some(wire::Mount {
        target: mount.target.display().to_string(),
        device: mount.device_node().map(|node| node.display().to_string()).unwrap_or_default(),
        volume_group: vg.to_string(),
        logical_volume: lv.to_string(),
        pod_uid: pod.map(|uid| uid.to_string()).unwrap_or_default(),
        reason: reason.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "0f0e7f0a-1111-4222-8333-444455556666";

    fn pods() -> PodsDirectory {
        PodsDirectory(PathBuf::from("/var/lib/kubelet/pods"))
    }

    fn mount(target: &str) -> Mount {
        Mount { device: (0, 0), root: "/".into(), target: target.into(), fs_type: "xfs".into() }
    }

    #[test]
    fn only_the_mount_point_of_a_volume_of_ours_names_a_pod() {
        let of = |path: &str| pods().pod_of(Path::new(path)).map(|uid| uid.to_string());
        let volume = format!("/var/lib/kubelet/pods/{POD}/volumes/lvprov.io~lvm/data");
        assert_eq!(of(&volume).as_deref(), Some(POD));
        for other in [
            format!("{volume}/deeper"),
            format!("/var/lib/kubelet/pods/{POD}/volumes/lvprov.io~lvm"),
            format!("/var/lib/kubelet/pods/{POD}/volumes/kubernetes.io~csi/data/mount"),
            format!("/var/lib/kubelet/pods/{POD}/volume-subpaths/data/c/0"),
            format!("/srv/pods/{POD}/volumes/lvprov.io~lvm/data"),
            "/var/lib/kubelet/pods".to_owned(),
            "/".to_owned(),
        ] {
            assert_eq!(of(&other), None, "{other}");
        }
    }

    #[test]
    fn root_of_kubelet_may_be_a_link() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().canonicalize().unwrap().join("data");
        std::fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, directory.path().join("kubelet")).unwrap();
        let pods = PodsDirectory::new(&directory.path().join("kubelet"));
        assert_eq!(pods.0, real.join("pods"));
    }

    #[test]
    fn mounts_of_others_are_not_listed() {
        let vg = VgName::parse("vg0").unwrap();
        let lv = LvName::parse("pvc-1").unwrap();
        let (all, log_root) = (Served::default(), Path::new("/var/log/lvprov"));
        let list = |target: &str, ours, served: &Served| {
            describe(&mount(target), &vg, &lv, ours, served, &pods(), log_root).map(|mount| mount.reason)
        };
        let volume = format!("/var/lib/kubelet/pods/{POD}/volumes/lvprov.io~lvm/data");
        assert_eq!(list(&volume, true, &all).as_deref(), Some("mounted for a pod"));
        assert!(list(&volume, false, &all).unwrap().contains("gone"));
        // A log volume at its place is no mount for a pod, and dead only without its volume.
        assert_eq!(list("/var/log/lvprov/shop/web", true, &all), None);
        assert!(list("/var/log/lvprov/shop/web", false, &all).unwrap().contains("gone"));
        // The host's own volumes.
        assert_eq!(list("/", false, &all), None);
        assert_eq!(list("/home", true, &all), None);
        let other = Served::new(&[VgName::parse("vg1").unwrap()]);
        assert_eq!(list(&volume, true, &other), None);
    }
}
