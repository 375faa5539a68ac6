//! Removes one item of an inventory, if it still is what it was then.

use std::path::{Path, PathBuf};

use lvm::Lvm;
use lvm::identity::Owner;
use lvm::lock::LockError;
use lvm::logs::CollectError as LogsError;
use lvm::mounts::{self, UnmountError};
use lvm::names::{LogVolumeName, LvName, NameError, Namespace, PodName, VgName};
use lvm::volume::{DeleteError, Deleted};
use lvprov_proto::lvprov as wire;
use lvprov_proto::lvprov::inventory_item::Item;
use tonic::{Code, Status};
use tracing::warn;

use super::in_progress::Busy;
use super::addressee::Misdirected;
use super::inventory::PodsDirectory;
use super::served::Served;

/// Why an item could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// The request holds no item.
    /// The call is for another node.
    #[error(transparent)]
    Misdirected(#[from] Misdirected),
    #[error("the request names no item")]
    NoItem,
    /// A name in it is not valid.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A path in it is none of ours.
    #[error("{0} is not a place where volumes of lvprov are mounted")]
    Place(PathBuf),
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
    /// A mount could not be undone.
    #[error(transparent)]
    Unmount(#[from] UnmountError),
    /// The work broke off.
    #[error("the removal broke off: {0}")]
    Interrupted(String),
}

impl CollectError {
    /// What the caller is to make of it.
    pub fn code(&self) -> Code {
        match self {
            // The request itself is wrong.
            Self::NoItem | Self::Name(_) | Self::Place(_) => Code::InvalidArgument,
            // Not ours to touch, as things are set up.
            Self::NotServed(_) | Self::Delete(DeleteError::NotOurs { .. }) => Code::FailedPrecondition,
            Self::Logs(LogsError::Delete(DeleteError::NotOurs { .. })) => Code::FailedPrecondition,
            // Another caller is at it.
            Self::Busy(_) => Code::Aborted,
            Self::Delete(DeleteError::Lock(LockError::Busy { .. })) => Code::Aborted,
            // Not known whether it is gone: the next inventory tells.
            // The caller has an old address of its node.
            Self::Misdirected(_) => Code::Unavailable,
            Self::Delete(_) | Self::Logs(_) | Self::Unmount(_) | Self::Interrupted(_) => Code::Unavailable,
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
    Data { lv: LvName, listed: Box<wire::DataVolume> },
    Log { namespace: Namespace, volume: LogVolumeName },
    Directory { namespace: Namespace, volume: LogVolumeName, directory: PodName, pod_uid: Option<String> },
    Mount { lv: LvName, target: PathBuf },
}

impl Doomed {
    /// Checks what an inventory item says.
    ///
    /// # Errors
    /// When it is not something that an inventory of this node can hold.
    pub fn parse(
        item: Option<wire::InventoryItem>,
        served: &Served,
        pods: &PodsDirectory,
        log_root: &Path,
    ) -> Result<Self, CollectError> {
        let item = item.and_then(|item| item.item).ok_or(CollectError::NoItem)?;
        let (vg, what, key) = match item {
            Item::DataVolume(listed) => {
                let lv = LvName::parse(&listed.logical_volume)?;
                let key = format!("{}/{lv}", listed.volume_group);
                (listed.volume_group.clone(), What::Data { lv, listed: Box::new(listed) }, key)
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
                let directory = PodName::parse(&listed.directory)?;
                // Empty where the directory has no readable record.
                let pod_uid = Some(listed.pod_uid).filter(|uid| !uid.is_empty());
                let key = format!("log {namespace}/{volume}/{directory}");
                (listed.volume_group, What::Directory { namespace, volume, directory, pod_uid }, key)
            }
            Item::Mount(listed) => {
                let lv = LvName::parse(&listed.logical_volume)?;
                let target = PathBuf::from(&listed.target);
                let is_plain = target.components().all(|part| part != std::path::Component::ParentDir);
                if !is_plain || (pods.pod_of(&target).is_none() && !target.starts_with(log_root)) {
                    return Err(CollectError::Place(target));
                }
                let key = format!("mount {}", target.display());
                (listed.volume_group, What::Mount { lv, target }, key)
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
        matches!(self.what, What::Data { .. })
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
            What::Data { lv, listed } => {
                let meant = |found: &lvm::report::LogicalVolume| match &found.owner {
                    Owner::Data(owner) => {
                        owner.claim_uid.as_str() == listed.claim_uid
                            && owner.cluster.as_str() == listed.cluster
                            && found.created == listed.created_unix
                    }
                    Owner::Log { .. } => false,
                };
                match lvm.delete_if(&self.vg, lv, meant) {
                    Ok(Deleted::Removed) => Ok(removed("logical volume removed")),
                    Ok(Deleted::Absent) => Ok(left("it is gone already, or another volume has its name now")),
                    Err(error @ DeleteError::InUse { .. }) => Ok(left(&error.to_string())),
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
            What::Mount { lv, target } => self.unmount(lvm, lv, target),
        }
    }

    fn unmount(&self, lvm: &Lvm, lv: &LvName, target: &Path) -> Result<wire::CollectResponse, CollectError> {
        let there = mounts::at(target).map_err(UnmountError::Unreadable)?;
        let Some(there) = there else { return Ok(left("nothing is mounted there any more")) };
        match there.logical_volume() {
            Some((vg, found)) if vg == self.vg && found == *lv => {}
            _ => return Ok(left("something else is mounted there now")),
        }
        // Busy or stacked mounts are what a pod that still runs has.
        let gone = match mounts::unmount(target) {
            Ok(gone) => gone,
            Err(error @ (UnmountError::Refused { .. } | UnmountError::Below { .. })) => {
                return Ok(left(&error.to_string()));
            }
            Err(error) => return Err(error.into()),
        };
        for mount in &gone {
            if let Err(error) = lvm.note_unmounted(mount) {
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
        Doomed::parse(Some(wire::InventoryItem { item: Some(item) }), &served, &pods, Path::new(LOG_ROOT))
    }

    fn mount(target: &str) -> Item {
        Item::Mount(wire::Mount {
            target: target.into(),
            volume_group: "vg0".into(),
            logical_volume: "pvc-1".into(),
            ..Default::default()
        })
    }

    #[test]
    fn only_our_own_places_are_unmounted() {
        let root = std::fs::canonicalize("/var/lib/kubelet").unwrap_or_else(|_| "/var/lib/kubelet".into());
        let pod = root.join("pods/0f0e7f0a-1111-4222-8333-444455556666/volumes/lvprov.io~lvm/data");
        parse(mount(pod.to_str().unwrap())).unwrap();
        parse(mount("/var/log/lvprov/shop/web")).unwrap();
        for bad in
            ["/", "/etc", "", "relative", "/var/log/lvprov/../../..", "/var/log/lvprovx", "/var/lib/kubelet/pods"]
        {
            assert!(matches!(parse(mount(bad)), Err(CollectError::Place(_))), "{bad:?}");
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
        assert_eq!(Status::from(foreign).code(), Code::FailedPrecondition);
        let nothing = Doomed::parse(
            Some(wire::InventoryItem { item: None }),
            &Served::default(),
            &PodsDirectory::new(Path::new("/var/lib/kubelet")),
            Path::new(LOG_ROOT),
        );
        assert_eq!(Status::from(nothing.unwrap_err()).code(), Code::InvalidArgument);
    }

    #[test]
    fn nothing_mounted_is_nothing_to_remove() {
        let doomed = parse(mount("/var/log/lvprov/no/such")).unwrap();
        let lvm = Lvm::new(lvm::config::NodeConfig::default());
        let answer = doomed.remove(&lvm).unwrap();
        assert!(!answer.removed && answer.detail.contains("nothing is mounted"), "{answer:?}");
    }
}
