//! Everything of ours on this node: on its disks, and in its mount table.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use lvm::Lvm;
use lvm::identity::Owner;
use lvm::logs::{LogError, LogVolume, names_at};
use lvm::mounts::{self, Mount};
use lvm::names::{LvName, PodUid, VgName};
use lvm::report::{LogicalVolume, ReportError, Snapshot, VolumeGroup};
use lvprov_proto::lvprov as wire;
use lvprov_proto::lvprov::inventory_item::Item;
use tonic::Status;

use super::addressee::Misdirected;
use super::publish::CSI_DIRECTORY;
use super::served::Served;

/// Directory of our FlexVolume mounts among a pod's volumes.
const FLEX_DIRECTORY: &str = "lvprov.io~lvm";

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

    /// kubelet's root directory.
    pub fn kubelet_root(&self) -> &Path {
        self.0.parent().unwrap_or(&self.0)
    }

    /// That of one pod.
    pub fn directory(&self, pod: &PodUid) -> PathBuf {
        self.0.join(pod.as_str())
    }

    /// The UID of the pod that a volume is mounted for, if `target` is the
    /// mount point of a FlexVolume of ours, or of a CSI volume.
    pub fn pod_of(&self, target: &Path) -> Option<PodUid> {
        let below = target.strip_prefix(&self.0).ok()?;
        let uid = below.iter().next()?.to_str()?;
        let volumes = below.strip_prefix(uid).ok()?.strip_prefix("volumes").ok()?;
        let parts: Vec<&str> = volumes.iter().filter_map(|part| part.to_str()).collect();
        match parts.as_slice() {
            [FLEX_DIRECTORY, _] | [CSI_DIRECTORY, _, "mount"] => PodUid::parse(uid).ok(),
            _ => None,
        }
    }
}

/// The logical volume that belongs at this mount point, if that is the place of
/// a log volume: `<log root>/<namespace>/<volume>`, and nothing above or below.
pub fn log_volume_at(target: &Path, log_root: &Path) -> Option<LvName> {
    names_at(target, log_root).map(|(namespace, volume)| LvName::for_log(&namespace, &volume))
}

/// Whether what a mount shows has gone for good. A volume that is merely not
/// among those with our tags is somebody's. LVM removes none that is mounted,
/// so one is gone only with its whole group.
pub fn is_gone(vg: &VgName, groups: &[VolumeGroup]) -> bool {
    groups.iter().all(|group| group.name != *vg)
}

/// Looks at everything. Two lvm reports, and another one where something is
/// mounted at a place of ours whose volume is not ours.
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

    // Room for a growth is a part of what grows; without that it shows as what it is.
    let grows: HashSet<LvName> =
        volumes.iter().filter(|lv| !lv.marks.spare).map(|lv| lvm::grow::spare_of(&lv.name)).collect();
    let kept = |lv: &&LogicalVolume| lv.marks.trashed.is_none() && !(lv.marks.spare && grows.contains(&lv.name));
    let data = volumes.iter().filter(kept).filter_map(data_volume).map(Item::DataVolume);
    let trash = volumes.iter().filter_map(trashed).map(Item::Trashed);
    let snapshots = lvm.snapshots()?;
    let snapshots = snapshots.iter().filter(|one| served.includes(&one.vg)).map(snapshot).map(Item::Snapshot);
    let log_volumes = logs.iter().map(log_volume).map(Item::LogVolume);
    let directories = logs.iter().flat_map(log_directories).map(Item::LogDirectory);
    let placed: Vec<Placed> = mounted
        .iter()
        .filter_map(|mount| {
            let (vg, lv) = mount.logical_volume()?;
            Placed::find(mount, vg, lv, pods, &lvm.config.log_root).filter(|placed| served.includes(&placed.vg))
        })
        .collect();
    let known: HashSet<(&VgName, &LvName)> = volumes.iter().map(|lv| (&lv.vg, &lv.name)).collect();
    let is_ours = |placed: &Placed| known.contains(&(&placed.vg, &placed.lv));
    let groups = match placed.iter().all(is_ours) {
        true => Vec::new(),
        false => lvm.volume_groups()?,
    };
    let mounts = placed
        .iter()
        .filter_map(|placed| {
            placed.describe(match is_ours(placed) {
                true => Backing::Ours,
                false if is_gone(&placed.vg, &groups) => Backing::Gone,
                false => Backing::Others,
            })
        })
        .map(Item::Mount);
    Ok(data
        .chain(log_volumes)
        .chain(directories)
        .chain(mounts)
        .chain(trash)
        .chain(snapshots)
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
        layout: lv.layout.to_string(),
        block: lv.marks.intent.block,
        storage_class: lv.marks.intent.class.clone().unwrap_or_default(),
    })
}

fn trashed(lv: &LogicalVolume) -> Option<wire::TrashedVolume> {
    Some(wire::TrashedVolume {
        volume: Some(data_volume(lv)?),
        trashed_unix: lv.marks.trashed?,
        until_unix: lv.marks.trashed_until()?,
        delete_policy: lv.marks.intent.delete.to_string(),
        wiping: lv.marks.wiping,
        wiped_bytes: 0,
    })
}

fn snapshot(one: &Snapshot) -> wire::Snapshot {
    let source = &one.owner.source;
    wire::Snapshot {
        volume_group: one.vg.to_string(),
        logical_volume: one.name.to_string(),
        size_bytes: one.size,
        created_unix: one.created,
        cluster: source.cluster.to_string(),
        source_claim_uid: source.claim_uid.to_string(),
        source_claim_namespace: source.namespace.to_string(),
        source_claim_name: source.claim.to_string(),
        snapshot_uid: one.owner.uid.to_string(),
        snapshot_namespace: one.owner.namespace.to_string(),
        snapshot_name: one.owner.name.to_string(),
        room_bytes: one.room,
        used_percent: one.used_percent.and_then(|percent| u32::try_from(percent).ok()).unwrap_or(0),
        lost: one.lost,
        open: one.open,
        of_clone: one.name != LvName::for_snapshot(&one.owner.uid),
    }
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
            pod_name: directory.pod().to_owned(),
            pod_uid: directory.record.as_ref().map(|record| record.pod_uid.clone()).unwrap_or_default(),
            used_bytes: directory.usage.used,
            quota_bytes: directory.usage.limit,
            retention_seconds: directory.record.as_ref().map_or(0, |record| record.retention),
            last_used_unix: directory.record.as_ref().map_or(0, |record| record.last_used),
            mounted: directory.mounted,
            path: directory.path.display().to_string(),
        })
        .collect()
}

/// What a mount shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backing {
    /// A volume that carries our tags.
    Ours,
    /// A volume that LVM may know, and that does not carry them.
    Others,
    /// Nothing any more.
    Gone,
}

/// A mount at a place where only volumes of ours belong.
struct Placed<'a> {
    mount: &'a Mount,
    vg: VgName,
    lv: LvName,
    /// None at the place of a log volume.
    pod: Option<PodUid>,
}

impl<'a> Placed<'a> {
    fn find(mount: &'a Mount, vg: VgName, lv: LvName, pods: &PodsDirectory, log_root: &Path) -> Option<Self> {
        let pod = pods.pod_of(&mount.target);
        let at_log = || mount.root == Path::new("/") && log_volume_at(&mount.target, log_root).as_ref() == Some(&lv);
        (pod.is_some() || at_log()).then_some(Self { mount, vg, lv, pod })
    }

    /// As it is listed, if it is. A log volume stays mounted after its pods.
    fn describe(&self, backing: Backing) -> Option<wire::Mount> {
        let reason = match (&self.pod, backing) {
            (Some(_), Backing::Ours) => "mounted for a pod",
            (Some(_), Backing::Others) => "mounted for a pod; its logical volume does not carry our tags",
            (_, Backing::Gone) => "its volume group is gone",
            (None, Backing::Ours | Backing::Others) => return None,
        };
        Some(wire::Mount {
            target: self.mount.target.display().to_string(),
            device: self.mount.device_node().map(|node| node.display().to_string()).unwrap_or_default(),
            volume_group: self.vg.to_string(),
            logical_volume: self.lv.to_string(),
            pod_uid: self.pod.as_ref().map(PodUid::to_string).unwrap_or_default(),
            reason: reason.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use lvm::names::{LogVolumeName, Namespace};
    use lvm::report::Metadata;

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
        let csi = format!("/var/lib/kubelet/pods/{POD}/volumes/kubernetes.io~csi/data");
        assert_eq!(of(&format!("{csi}/mount")).as_deref(), Some(POD));
        for other in [
            format!("{volume}/deeper"),
            format!("/var/lib/kubelet/pods/{POD}/volumes/lvprov.io~lvm"),
            csi.clone(),
            format!("{csi}/mount/deeper"),
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

    fn listed(target: &str, lv: &str, backing: Backing) -> Option<String> {
        let (vg, lv) = (VgName::parse("vg0").unwrap(), LvName::parse(lv).unwrap());
        let mount = mount(target);
        let placed = Placed::find(&mount, vg, lv, &pods(), Path::new("/var/log/lvprov"))?;
        placed.describe(backing).map(|mount| mount.reason)
    }

    #[test]
    fn mounts_of_others_are_not_listed() {
        let volume = format!("/var/lib/kubelet/pods/{POD}/volumes/lvprov.io~lvm/data");
        assert_eq!(listed(&volume, "pvc-1", Backing::Ours).as_deref(), Some("mounted for a pod"));
        assert!(listed(&volume, "pvc-1", Backing::Others).unwrap().contains("does not carry our tags"));
        assert!(listed(&volume, "pvc-1", Backing::Gone).unwrap().contains("gone"));
        // The host's own volumes, whatever LVM says of them.
        for place in ["/", "/home", "/var/log", "/var/log/lvprov"] {
            assert_eq!(listed(place, "root", Backing::Gone), None, "{place}");
        }
    }

    #[test]
    fn a_log_volume_stays_mounted_until_its_group_has_gone() {
        let (namespace, volume) = (Namespace::parse("shop").unwrap(), LogVolumeName::parse("web").unwrap());
        let lv = LvName::for_log(&namespace, &volume);
        let at = |target: &str, backing| listed(target, lv.as_str(), backing);
        assert_eq!(at("/var/log/lvprov/shop/web", Backing::Ours), None);
        assert_eq!(at("/var/log/lvprov/shop/web", Backing::Gone).as_deref(), Some("its volume group is gone"));
        // An admin has changed its tags: that is no reason to take it from whoever reads it.
        assert_eq!(at("/var/log/lvprov/shop/web", Backing::Others), None);
        // A mount that an admin has made, of whatever volume.
        assert_eq!(listed("/var/log/lvprov/shop/web", "archive", Backing::Gone), None);
        for place in
            ["/var/log/lvprov", "/var/log/lvprov/shop", "/var/log/lvprov/shop/web/a", "/var/log/lvprov/shop/other"]
        {
            assert_eq!(at(place, Backing::Gone), None, "{place}");
        }
    }

    #[test]
    fn only_a_group_that_lvm_does_not_know_is_gone() {
        let name = |name: &str| VgName::parse(name).unwrap();
        let groups = [VolumeGroup {
            name: name("vg0"),
            size: 8 << 30,
            free: 0,
            extent_size: 4 << 20,
            disks: Vec::new(),
            partial: false,
            metadata: Metadata::default(),
            thin_room: None,
        }];
        assert!(!is_gone(&name("vg0"), &groups));
        assert!(is_gone(&name("vg1"), &groups));
    }
}
