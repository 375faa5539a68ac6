//! Removes one item of an inventory, if it still is what it was then.

use std::path::{Path, PathBuf};

use lvm::Lvm;
use lvm::identity::Owner;
use lvm::lock::LockError;
use lvm::logs::CollectError as LogsError;
use lvm::mounts::{self, UnmountError};
use lvm::names::{DirectoryName, LogVolumeName, LvName, NameError, Namespace, VgName};
use lvm::report::ReportError;
use lvm::snapshot::DeleteSnapshotError;
use lvm::volume::{DeleteError, Deleted};
use lvprov_proto::lvprov as wire;
use lvprov_proto::lvprov::inventory_item::Item;
use tonic::{Code, Status};
use tracing::warn;

use super::addressee::Misdirected;
use super::in_progress::Busy;
use super::inventory::{PodsDirectory, is_gone, log_volume_at};
use super::served::Served;

/// Why an item could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// The call is for another node.
    #[error(transparent)]
    Misdirected(#[from] Misdirected),
    /// The request holds no item.
    #[error("the request names no item")]
    NoItem,
    /// A name in it is not valid.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A path in it is none of ours.
    #[error("{target} is not a place where lvprov mounts logical volume {lv}")]
    Place {
        /// As asked for.
        target: PathBuf,
        /// What is said to be mounted there.
        lv: LvName,
    },
    /// The group is not among those that this node may serve.
    #[error("volume group {0} is not among those that this node serves")]
    NotServed(VgName),
    /// The same item is worked on.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// A data volume could not be removed.
    #[error(transparent)]
    Delete(#[from] DeleteError),
    /// A log volume or directory could not be removed.
    #[error(transparent)]
    Logs(#[from] LogsError),
    /// LVM could not be asked what there is.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// A mount could not be undone.
    #[error(transparent)]
    Unmount(#[from] UnmountError),
    /// The snapshot could not be removed.
    #[error(transparent)]
    Snapshot(#[from] DeleteSnapshotError),
    /// The work broke off.
    #[error("the removal broke off: {0}")]
    Interrupted(String),
}

impl CollectError {
    /// What the caller is to make of it.
    pub fn code(&self) -> Code {
        match self {
            // The caller has an old address of its node.
            Self::Misdirected(_) => Code::Unavailable,
            // The request itself is wrong.
            Self::NoItem | Self::Name(_) | Self::Place { .. } => Code::InvalidArgument,
            // Not ours to touch, as things are set up.
            Self::NotServed(_) | Self::Delete(DeleteError::NotOurs { .. }) => Code::PermissionDenied,
            Self::Logs(LogsError::Delete(DeleteError::NotOurs { .. })) => Code::PermissionDenied,
            // Another caller is at it.
            Self::Busy(_) => Code::Aborted,
            Self::Delete(DeleteError::Lock(LockError::Busy { .. })) => Code::Aborted,
            // Not known whether it is gone: the next inventory tells.
            Self::Snapshot(_)
            | Self::Delete(_)
            | Self::Logs(_)
            | Self::Report(_)
            | Self::Unmount(_)
            | Self::Interrupted(_) => Code::Unavailable,
        }
    }
}

impl From<CollectError> for Status {
    fn from(error: CollectError) -> Self {
        Status::new(error.code(), crate::with_causes(&error))
    }
}

/// An item that is to go, with its names checked.
#[derive(Debug)]
pub struct Doomed {
    vg: VgName,
    what: What,
    /// One text for all requests that mean the same thing.
    key: String,
}

#[derive(Debug)]
enum What {
    Data {
        lv: LvName,
        listed: Box<wire::DataVolume>,
        only_unused: bool,
    },
    Snapshot {
        lv: LvName,
        created: i64,
    },
    Log {
        namespace: Namespace,
        volume: LogVolumeName,
    },
    Directory {
        namespace: Namespace,
        volume: LogVolumeName,
        directory: DirectoryName,
        pod_uid: Option<String>,
    },
    /// `log`: of a log volume, which no pod's end makes superfluous.
    Mount {
        lv: LvName,
        target: PathBuf,
        log: bool,
    },
}

impl Doomed {
    /// Checks what a request says of an inventory item.
    ///
    /// # Errors
    /// When it is not something that an inventory of this node can hold.
    pub fn parse(
        request: wire::CollectRequest,
        served: &Served,
        pods: &PodsDirectory,
        log_root: &Path,
    ) -> Result<Self, CollectError> {
        let only_unused = request.only_unused;
        let item = request.item.and_then(|item| item.item).ok_or(CollectError::NoItem)?;
        let (vg, what, key) = match item {
            Item::DataVolume(listed) => {
                let lv = LvName::parse(&listed.logical_volume)?;
                let key = format!("{}/{lv}", listed.volume_group);
                (listed.volume_group.clone(), What::Data { lv, listed: Box::new(listed), only_unused }, key)
            }
            Item::LogVolume(listed) => {
                let namespace = Namespace::parse(&listed.namespace)?;
                let volume = LogVolumeName::parse(&listed.volume)?;
                let key = format!("log {namespace}/{volume}");
                (listed.volume_group, What::Log { namespace, volume }, key)
            }
            Item::LogDirectory(listed) => {
                let namespace = Namespace::parse(&listed.namespace)?;
                let volume = LogVolumeName::parse(&listed.volume)?;
                let directory = DirectoryName::parse(&listed.directory)?;
                // Empty where the directory has no readable record.
                let pod_uid = Some(listed.pod_uid).filter(|uid| !uid.is_empty());
                let key = format!("log {namespace}/{volume}/{directory}");
                (listed.volume_group, What::Directory { namespace, volume, directory, pod_uid }, key)
            }
            Item::Snapshot(listed) => {
                let lv = LvName::parse(&listed.logical_volume)?;
                let key = format!("{}/{lv}", listed.volume_group);
                (listed.volume_group, What::Snapshot { lv, created: listed.created_unix }, key)
            }
            // It goes by itself, or by `lvprov trash empty`.
            Item::Trashed(_) => return Err(CollectError::NoItem),
            Item::Mount(listed) => {
                let lv = LvName::parse(&listed.logical_volume)?;
                let target = PathBuf::from(&listed.target);
                let is_plain = target.components().all(|part| part != std::path::Component::ParentDir);
                let log = log_volume_at(&target, log_root).as_ref() == Some(&lv);
                if !is_plain || (pods.pod_of(&target).is_none() && !log) {
                    return Err(CollectError::Place { target, lv });
                }
                let key = format!("mount {}", target.display());
                (listed.volume_group, What::Mount { lv, target, log }, key)
            }
        };
        let vg = VgName::parse(&vg)?;
        if !served.includes(&vg) {
            return Err(CollectError::NotServed(vg));
        }
        Ok(Self { vg, what, key })
    }

    /// The same for all requests that mean the same thing.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Whether removing it is one change of its volume group and no more.
    pub fn is_data_volume(&self) -> bool {
        matches!(self.what, What::Data { .. } | What::Snapshot { .. })
    }

    /// Its volume group.
    pub fn vg(&self) -> &VgName {
        &self.vg
    }

    /// Removes it. What is in use again, changed or gone is left alone, and the
    /// answer says so.
    ///
    /// # Errors
    /// When it is not known whether it is gone.
    pub fn remove(&self, lvm: &Lvm) -> Result<wire::CollectResponse, CollectError> {
        match &self.what {
            What::Data { lv, listed, only_unused } => {
                let mut used = false;
                let meant = |found: &lvm::report::LogicalVolume| match &found.owner {
                    Owner::Data(owner) => {
                        let same = owner.claim_uid.as_str() == listed.claim_uid
                            && owner.cluster.as_str() == listed.cluster
                            && found.created == listed.created_unix;
                        used = same && *only_unused && !lvm.is_unused(found);
                        same && !used
                    }
                    Owner::Log { .. } => false,
                };
                let done = lvm.delete_if(&self.vg, lv, meant);
                if used {
                    return Ok(left("it holds data, or has held some"));
                }
                match done {
                    Ok(Deleted::Removed) => Ok(removed("logical volume removed")),
                    Ok(Deleted::Trashed) => Ok(removed("in the trash, as its class has it")),
                    Ok(Deleted::Absent) => Ok(left("it is gone already, or another volume has its name now")),
                    Err(error @ (DeleteError::InUse { .. } | DeleteError::HasSnapshots { .. })) => {
                        Ok(left(&error.to_string()))
                    }
                    Err(error) => Err(error.into()),
                }
            }
            What::Snapshot { lv, created } => {
                let same =
                    |one: &lvm::report::Snapshot| one.vg == self.vg && one.name == *lv && one.created == *created;
                if !lvm.snapshots()?.iter().any(same) {
                    return Ok(left("it is gone already, or another snapshot has its name now"));
                }
                match lvm.delete_snapshot(&self.vg, lv) {
                    Ok(true) => Ok(removed("snapshot removed")),
                    Ok(false) => Ok(left("it is gone already")),
                    Err(error @ (DeleteSnapshotError::InUse { .. } | DeleteSnapshotError::Needed { .. })) => {
                        Ok(left(&error.to_string()))
                    }
                    Err(error) => Err(error.into()),
                }
            }
            What::Log { namespace, volume } => {
                log_result(lvm.collect_log(&self.vg, namespace, volume), "log volume removed")
            }
            What::Directory { namespace, volume, directory, pod_uid } => log_result(
                lvm.collect_directory(&self.vg, namespace, volume, directory, pod_uid.as_deref()),
                "directory removed",
            ),
            What::Mount { lv, target, log } => self.unmount(lvm, lv, target, *log),
        }
    }

    fn unmount(&self, lvm: &Lvm, lv: &LvName, target: &Path, log: bool) -> Result<wire::CollectResponse, CollectError> {
        let mut there = mounts::all().map_err(UnmountError::Unreadable)?;
        there.retain(|mount| mount.target == target);
        if there.is_empty() {
            return Ok(left("nothing is mounted there any more"));
        }
        // All layers go, so all of them have to be what was listed.
        let is_meant = |mount: &mounts::Mount| {
            mount.logical_volume().is_some_and(|(vg, found)| vg == self.vg && found == *lv)
                && (!log || mount.root == Path::new("/"))
        };
        if !there.iter().all(is_meant) {
            return Ok(left("something else is mounted there now"));
        }
        if log && !is_gone(&self.vg, &lvm.volume_groups()?) {
            return Ok(left("its volume group is there"));
        }
        // Busy or stacked mounts are what a pod that still runs has.
        let gone = match lvm.unmount(target) {
            Ok(gone) => gone,
            Err(error @ (UnmountError::Refused { .. } | UnmountError::Below { .. })) => {
                return Ok(left(&error.to_string()));
            }
            Err(error) => return Err(error.into()),
        };
        for mount in &gone {
            if let Err(error) = lvm.note_unmounted(mount, None, Vec::new()) {
                warn!(target = %target.display(), %error, "cannot note when a log directory was used last");
            }
        }
        Ok(removed("unmounted"))
    }
}

fn log_result(result: Result<(), LogsError>, done: &str) -> Result<wire::CollectResponse, CollectError> {
    match result {
        Ok(()) => Ok(removed(done)),
        Err(error @ LogsError::Changed { .. }) => Ok(left(&error.to_string())),
        Err(error @ LogsError::Delete(DeleteError::InUse { .. })) => Ok(left(&error.to_string())),
        Err(error @ LogsError::Unmount(UnmountError::Refused { .. } | UnmountError::Below { .. })) => {
            Ok(left(&error.to_string()))
        }
        Err(error) => Err(error.into()),
    }
}

fn removed(detail: &str) -> wire::CollectResponse {
    wire::CollectResponse { removed: true, detail: detail.to_owned() }
}

fn left(detail: &str) -> wire::CollectResponse {
    wire::CollectResponse { removed: false, detail: detail.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG_ROOT: &str = "/var/log/lvprov";

    fn parse(item: Item) -> Result<Doomed, CollectError> {
        let pods = PodsDirectory::new(Path::new("/var/lib/kubelet"));
        let served = Served::new(&[VgName::parse("vg0").unwrap()]);
        let request =
            wire::CollectRequest { item: Some(wire::InventoryItem { item: Some(item) }), ..Default::default() };
        Doomed::parse(request, &served, &pods, Path::new(LOG_ROOT))
    }

    fn mount(target: &str) -> Item {
        Item::Mount(wire::Mount {
            target: target.into(),
            volume_group: "vg0".into(),
            logical_volume: "pvc-1".into(),
            ..Default::default()
        })
    }

    /// Of the log volume `shop/web`.
    fn log_mount(target: &str) -> Item {
        let (namespace, volume) = (Namespace::parse("shop").unwrap(), LogVolumeName::parse("web").unwrap());
        Item::Mount(wire::Mount {
            target: target.into(),
            volume_group: "vg0".into(),
            logical_volume: LvName::for_log(&namespace, &volume).to_string(),
            ..Default::default()
        })
    }

    #[test]
    fn only_our_own_places_are_unmounted() {
        let root = std::fs::canonicalize("/var/lib/kubelet").unwrap_or_else(|_| "/var/lib/kubelet".into());
        let pod = root.join("pods/0f0e7f0a-1111-4222-8333-444455556666/volumes/lvprov.io~lvm/data");
        parse(mount(pod.to_str().unwrap())).unwrap();
        parse(log_mount("/var/log/lvprov/shop/web")).unwrap();
        for bad in
            ["/", "/etc", "", "relative", "/var/log/lvprov/../../..", "/var/log/lvprovx", "/var/lib/kubelet/pods"]
        {
            assert!(matches!(parse(mount(bad)), Err(CollectError::Place { .. })), "{bad:?}");
            assert!(matches!(parse(log_mount(bad)), Err(CollectError::Place { .. })), "{bad:?}");
        }
        // What an admin has mounted below the logs, and a log volume anywhere but at its own place.
        for other in [
            mount("/var/log/lvprov"),
            mount("/var/log/lvprov/shop/web"),
            log_mount("/var/log/lvprov"),
            log_mount("/var/log/lvprov/shop"),
            log_mount("/var/log/lvprov/shop/other"),
            log_mount("/var/log/lvprov/shop/web/deeper"),
        ] {
            let error = parse(other).unwrap_err();
            assert_eq!(Status::from(error).code(), Code::InvalidArgument);
        }
    }

    #[test]
    fn hostile_names_and_foreign_groups_are_refused() {
        let directory = |namespace: &str, directory: &str, vg: &str| {
            parse(Item::LogDirectory(wire::LogDirectory {
                volume_group: vg.into(),
                namespace: namespace.into(),
                volume: "web".into(),
                directory: directory.into(),
                ..Default::default()
            }))
        };
        directory("shop", "web-a", "vg0").unwrap();
        assert!(matches!(directory("../x", "web-a", "vg0"), Err(CollectError::Name(_))));
        assert!(matches!(directory("shop", "..", "vg0"), Err(CollectError::Name(_))));
        assert!(matches!(directory("shop", "web-a", "-y"), Err(CollectError::Name(_))));
        let foreign = directory("shop", "web-a", "vg1").unwrap_err();
        assert_eq!(Status::from(foreign).code(), Code::PermissionDenied);
        let nothing = Doomed::parse(
            wire::CollectRequest { item: Some(wire::InventoryItem { item: None }), ..Default::default() },
            &Served::default(),
            &PodsDirectory::new(Path::new("/var/lib/kubelet")),
            Path::new(LOG_ROOT),
        );
        assert_eq!(Status::from(nothing.unwrap_err()).code(), Code::InvalidArgument);
    }

    #[test]
    fn nothing_mounted_is_nothing_to_remove() {
        let doomed = parse(log_mount("/var/log/lvprov/shop/web")).unwrap();
        let lvm = Lvm::new(lvm::config::NodeConfig::default());
        let answer = doomed.remove(&lvm).unwrap();
        assert!(!answer.removed && answer.detail.contains("nothing is mounted"), "{answer:?}");
    }
}
