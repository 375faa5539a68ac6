//! What kubelet's calls of the CSI Node service ask for, and doing it.
//!
//! A PersistentVolume's context comes from its PV, which only admins write; the
//! context of an inline volume comes from the pod, and is read as the options
//! of a log volume and nothing else.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};

use lvm::Lvm;
use lvm::block::{PublishBlock, PublishBlockError};
use lvm::config::NodeConfig;
use lvm::data::{ExpandError, PublishData, PublishDataError};
use lvm::filesystem::{FsType, FsTypeError, MkfsOptionError, MkfsOptions, MountOptionError, MountOptions};
use lvm::lock::LockError;
use lvm::logs::{LogError, PublishLog};
use lvm::mounts::{self, BindOptions, Mount, UnmountError};
use lvm::names::{NameError, Namespace, NodeName, PodName, PodUid};
use lvm::options::{LogOptions, Options, OptionsError};
use lvm::trouble::Notes;
use lvm::volume::ExtendError;
use lvprov_proto::csi::volume_capability::AccessType;
use lvprov_proto::csi::volume_capability::access_mode::Mode;
use lvprov_proto::csi::volume_usage::Unit;
use lvprov_proto::csi::{NodeExpandVolumeRequest, NodePublishVolumeRequest, VolumeUsage};
use nix::sys::statvfs::statvfs;
use tonic::{Code, Status};

use super::capability::{self, Access, CapabilityError};
use super::in_progress::Busy;
use super::served::Served;
use super::volume_id::VolumeId;
use crate::names::context;

/// Mount points of CSI volumes below a pod's directory (kubelet).
pub const CSI_DIRECTORY: &str = "kubernetes.io~csi";

/// Why a call of kubelet's failed.
#[derive(Debug, thiserror::Error)]
pub enum NodeCallError {
    /// A field that must be there is not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// The path is none that a volume can be mounted at.
    #[error("{0:?} is not an absolute path without ..")]
    Path(String),
    /// No volume of ours can have this id.
    #[error("there is no volume {0:?}")]
    NoVolume(String),
    /// The group is not to be touched.
    #[error("volume group {0} is not served on this node")]
    NotServed(String),
    /// The volume belongs to a claim of another namespace than the pod's.
    #[error("the volume belongs to namespace {volume}, the pod to {pod}; it is not mounted")]
    OtherNamespace {
        /// Namespace of the volume.
        volume: Namespace,
        /// Namespace of the pod.
        pod: Namespace,
    },
    /// What the pod wants to do with it is not served.
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    /// An option of an inline volume is wrong.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// An inline volume that is no log volume.
    #[error("an inline volume must be a log volume; a data volume comes from a claim")]
    InlineData,
    /// A mount option is not served.
    #[error(transparent)]
    MountOption(#[from] MountOptionError),
    /// A file system is not served.
    #[error(transparent)]
    FsType(#[from] FsTypeError),
    /// An option of mkfs is not served.
    #[error(transparent)]
    MkfsOption(#[from] MkfsOptionError),
    /// A name is not valid.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Nothing of this volume is mounted there.
    #[error("volume {volume} is not mounted at {path}")]
    NotMounted {
        /// The volume's id.
        volume: String,
        /// The path.
        path: String,
    },
    /// A size out of range.
    #[error("capacity range: {0}")]
    Range(String),
    /// A data volume could not be mounted.
    #[error(transparent)]
    Data(#[from] PublishDataError),
    /// A raw volume could not be given to a pod.
    #[error(transparent)]
    Block(#[from] PublishBlockError),
    /// A raw volume has not grown.
    #[error("{volume} has {has} B and not {asked} B yet; it grows before its pods are told of it")]
    NotGrown {
        /// The volume's id.
        volume: String,
        /// Bytes.
        has: u64,
        /// Bytes asked for.
        asked: u64,
    },
    /// A log volume could not be mounted.
    #[error(transparent)]
    Log(#[from] LogError),
    /// It could not be unmounted.
    #[error(transparent)]
    Unmount(#[from] UnmountError),
    /// It could not be grown.
    #[error(transparent)]
    Expand(#[from] ExpandError),
    /// A path cannot be used.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The path.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The same path is being worked on.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// The task broke off.
    #[error("the call broke off: {0}")]
    Interrupted(String),
}

impl NodeCallError {
    /// The code that says what the caller can do (CSI, "Error Scheme").
    fn code(&self) -> Code {
        match self {
            Self::Missing(_)
            | Self::Path(_)
            | Self::Capability(_)
            | Self::Options(_)
            | Self::InlineData
            | Self::MountOption(_)
            | Self::FsType(_)
            | Self::MkfsOption(_)
            | Self::Log(LogError::FsType(_))
            | Self::Name(_) => Code::InvalidArgument,
            Self::NoVolume(_)
            | Self::NotMounted { .. }
            | Self::Data(PublishDataError::Missing { .. })
            | Self::Block(PublishBlockError::Missing { .. }) => Code::NotFound,
            Self::NotServed(_)
            | Self::Data(PublishDataError::NotAlone { .. } | PublishDataError::Block { .. })
            | Self::Block(
                PublishBlockError::NotAlone { .. }
                | PublishBlockError::NotBlock { .. }
                | PublishBlockError::LoopsAreScanned,
            ) => Code::FailedPrecondition,
            Self::OtherNamespace { .. }
            | Self::Data(PublishDataError::NotTheClaims { .. })
            | Self::Block(PublishBlockError::NotTheClaims { .. }) => Code::PermissionDenied,
            // The group has no room: kubelet ends the growth rather than try for ever.
            Self::Range(_)
            | Self::Expand(ExpandError::Extend(
                ExtendError::Full { .. } | ExtendError::NoDisks { .. } | ExtendError::MetadataFull { .. },
            )) => Code::OutOfRange,
            Self::Expand(ExpandError::Extend(ExtendError::Pool(error))) if error.is_full() => Code::OutOfRange,
            Self::Busy(_) => Code::Aborted,
            Self::Data(PublishDataError::Lock(LockError::Busy { .. }))
            | Self::Block(PublishBlockError::Lock(LockError::Busy { .. }) | PublishBlockError::Wiping { .. })
            | Self::NotGrown { .. }
            | Self::Log(LogError::Lock(LockError::Busy { .. }))
            | Self::Interrupted(_) => Code::Unavailable,
            _ => Code::Internal,
        }
    }
}

impl From<NodeCallError> for Status {
    fn from(error: NodeCallError) -> Self {
        Status::new(error.code(), crate::with_causes(&error))
    }
}

/// A path as the mount table knows it, should kubelet's root lie behind a link.
pub fn path(text: &str) -> Result<PathBuf, NodeCallError> {
    let path = Path::new(text);
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !path.is_absolute() || !plain || path.parent().is_none() {
        return Err(NodeCallError::Path(text.chars().take(200).collect()));
    }
    Ok(mounts::real(&path.components().collect::<PathBuf>()))
}

/// What is to be mounted for a pod.
#[derive(Debug)]
pub enum Published {
    /// A claim's volume.
    Data {
        /// Which.
        id: VolumeId,
        /// Namespace of its claim.
        namespace: Namespace,
        /// File system that it should have.
        fs: FsType,
        /// Whether the pod may only read.
        read_only: bool,
        /// Whether no other pod may have it (ReadWriteOncePod).
        alone: bool,
        /// Further options.
        options: MountOptions,
        /// How the file system is made.
        mkfs: MkfsOptions,
    },
    /// A claim's raw device.
    Block {
        /// Which.
        id: VolumeId,
        /// Namespace of its claim.
        namespace: Namespace,
        /// Whether the pod may only read.
        read_only: bool,
        /// Whether no other pod may have it (ReadWriteOncePod).
        alone: bool,
    },
    /// A directory of a log volume.
    Log {
        /// What the pod says.
        context: HashMap<String, String>,
        /// Namespace of the pod.
        namespace: Namespace,
        /// Name of the pod.
        pod: PodName,
        /// UID of the pod.
        pod_uid: PodUid,
        /// File system of a new volume.
        fs: FsType,
        /// Whether the pod may only read.
        read_only: bool,
    },
}

impl Published {
    /// Reads a request; what it says is checked, and nothing on disk.
    pub fn parse(request: &NodePublishVolumeRequest, served: &Served) -> Result<Self, NodeCallError> {
        let wanted = request.volume_capability.as_ref().ok_or(NodeCallError::Missing("volume_capability"))?;
        let said = &request.volume_context;
        let get = |key: &'static str| said.get(key).ok_or(NodeCallError::Missing(key));
        let access = capability::check(std::slice::from_ref(wanted), None)?;
        if said.get(context::EPHEMERAL).is_some_and(|value| value == "true") {
            return Ok(Self::Log {
                context: said.clone(),
                namespace: Namespace::parse(get(context::POD_NAMESPACE)?)?,
                pod: PodName::parse(get(context::POD_NAME)?)?,
                pod_uid: PodUid::parse(get(context::POD_UID)?)?,
                fs: access.file_system()?,
                read_only: request.readonly,
            });
        }
        let unknown = || NodeCallError::NoVolume(request.volume_id.chars().take(200).collect());
        let id = VolumeId::parse(&request.volume_id).ok_or_else(unknown)?;
        if !served.includes(&id.vg) {
            return Err(NodeCallError::NotServed(id.vg.to_string()));
        }
        let namespace = Namespace::parse(get(context::CLAIM_NAMESPACE)?)?;
        // The API binds a claim only to pods of its namespace; this is for whoever has written a PV by hand.
        if let Some(pod) = said.get(context::POD_NAMESPACE) {
            let pod = Namespace::parse(pod)?;
            if pod != namespace {
                return Err(NodeCallError::OtherNamespace { volume: namespace, pod });
            }
        }
        let flags = match &wanted.access_type {
            Some(AccessType::Mount(mount)) => mount.mount_flags.join(","),
            _ => String::new(),
        };
        let mode = wanted.access_mode.map(|access| access.mode()).unwrap_or_default();
        let alone = mode == Mode::SingleNodeSingleWriter;
        let Access::Mount(fs) = access else {
            return Ok(Self::Block { id, namespace, read_only: request.readonly, alone });
        };
        Ok(Self::Data {
            id,
            namespace,
            fs,
            read_only: request.readonly,
            alone,
            options: MountOptions::parse(&flags)?,
            mkfs: MkfsOptions::parse(fs, said.get(context::MKFS_OPTIONS).map_or("", String::as_str))?,
        })
    }

    /// Mounts it. The same call again changes nothing.
    pub fn publish(self, lvm: &Lvm, target: PathBuf, node_name: &str) -> Result<(), NodeCallError> {
        match self {
            Self::Data { id, namespace, fs, read_only, alone, options, mkfs } => {
                lvm.publish_data(&PublishData {
                    vg: id.vg,
                    lv: id.lv,
                    claim_uid: id.claim_uid,
                    namespace,
                    fs,
                    mkfs,
                    read_only,
                    alone,
                    options,
                    target,
                })?;
            }
            Self::Block { id, namespace, read_only, alone } => lvm.publish_block(&PublishBlock {
                vg: id.vg,
                lv: id.lv,
                claim_uid: id.claim_uid,
                namespace,
                read_only,
                alone,
                target,
            })?,
            Self::Log { context, namespace, pod, pod_uid, fs, read_only } => {
                let log = log_options(&context, &lvm.config)?;
                let node = || match &lvm.config.node_name {
                    Some(name) => Ok(name.clone()),
                    None => NodeName::parse(node_name),
                };
                lvm.publish_log(&PublishLog {
                    directory: log.sub_path.expand(&namespace, &pod, &pod_uid, node)?,
                    vg: log.vg.unwrap_or_else(|| lvm.config.volume_group.clone()),
                    namespace,
                    volume: log.volume,
                    size: log.size,
                    quota: log.quota,
                    files: log.files,
                    fs,
                    pod,
                    pod_uid,
                    containers: containers(&target),
                    retention: log.retention,
                    owner: log.owner,
                    mode: log.mode,
                    mount: BindOptions { read_only, ..log.mount },
                    target,
                })?;
            }
        }
        Ok(())
    }
}

/// The options of an inline volume, as a FlexVolume's. `type` may be left out:
/// there is no other kind of inline volume.
fn log_options(context: &HashMap<String, String>, config: &NodeConfig) -> Result<LogOptions, NodeCallError> {
    let said = context.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    let user = said.filter(|(key, _)| !key.starts_with(context::KUBELETS));
    let typed = if context.contains_key("type") { None } else { Some(("type", "log")) };
    match Options::parse(user.chain(typed), &config.logs)? {
        Options::Log(log) => Ok(log),
        Options::Data { .. } => Err(NodeCallError::InlineData),
    }
}

/// The containers of the pod that a target belongs to, as far as they have been
/// started: kubelet makes a directory for each.
fn containers(target: &Path) -> Vec<String> {
    // <root>/pods/<uid>/volumes/kubernetes.io~csi/<name>/mount
    target.ancestors().nth(4).map(containers_of).unwrap_or_default()
}

/// As [`containers`], of a pod's own directory. Bounded, since it ends up in an index.
pub fn containers_of(pod: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(pod.join("containers")) else { return Vec::new() };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| PodName::parse(name).is_ok()).take(64).collect();
    names.sort_unstable();
    names
}

/// UID of the pod whose volume is mounted at `target`, by kubelet's layout.
fn pod_uid(target: &Path) -> Option<PodUid> {
    let parts: Vec<&str> = target.iter().rev().take(6).filter_map(|part| part.to_str()).collect();
    match parts.as_slice() {
        ["mount", _, CSI_DIRECTORY, "volumes", uid, "pods"] => PodUid::parse(uid).ok(),
        _ => None,
    }
}

/// Unmounts and removes the target, as CSI wants it. What was never mounted is done.
pub fn unpublish(lvm: &Lvm, target: PathBuf) -> Result<(), NodeCallError> {
    let uid = pod_uid(&target);
    let notes = Notes::default();
    let gone = lvm.unmount(&target).inspect_err(|error| {
        // kubelet makes no Event of it, as little as with the driver.
        if let Some(pod) = &uid {
            notes.note_failed_unmount(&target, pod, &error.to_string());
        }
    })?;
    notes.clear(&target);
    for mount in gone {
        // Only when its retention begins is lost with this.
        if let Err(error) = lvm.note_unmounted(&mount, uid.as_ref(), containers(&target)) {
            tracing::warn!(target = %target.display(), %error, "cannot note when a log directory was used last");
        }
    }
    // A raw device's is a file, and empty now that the node is no longer upon it.
    let file = std::fs::symlink_metadata(&target).is_ok_and(|there| there.is_file() && there.len() == 0);
    let removed = if file { std::fs::remove_file(&target) } else { std::fs::remove_dir(&target) };
    match removed {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(NodeCallError::Io { what: "remove", path: target.display().to_string(), source })
        }
        _ => Ok(()),
    }
}

/// What of ours is mounted at `path`, if it is the volume with this id. An
/// inline volume's id is kubelet's own (`csi-` and a hash): any of ours will do.
fn mounted(id: &str, path: &Path) -> Result<Mount, NodeCallError> {
    let not_mounted =
        || NodeCallError::NotMounted { volume: id.chars().take(200).collect(), path: path.display().to_string() };
    let read = |source| NodeCallError::Io { what: "look at", path: path.display().to_string(), source };
    let mount = mounts::at(path).map_err(read)?.ok_or_else(not_mounted)?;
    let (vg, lv) = mount.logical_volume().ok_or_else(not_mounted)?;
    let is_it = match VolumeId::parse(id) {
        Some(id) => id.vg == vg && id.lv == lv,
        None => id.starts_with("csi-") && lv.as_str().starts_with("log-"),
    };
    if is_it { Ok(mount) } else { Err(not_mounted()) }
}

/// The size of the raw volume with this id, whose node, or a link to it, is at
/// `path`. None: there is no block device. kubelet calls with paths of its own
/// making, which lead to the one that was published.
fn raw_size(id: &str, path: &Path) -> Result<Option<u64>, NodeCallError> {
    if !std::fs::metadata(path).is_ok_and(|there| there.file_type().is_block_device()) {
        return Ok(None);
    }
    let (volume, path) = (id.chars().take(200).collect(), path.display().to_string());
    let is_it = |(vg, lv)| VolumeId::parse(id).is_some_and(|id| id.vg == vg && id.lv == lv);
    if !mounts::logical_volume_of(Path::new(&path)).is_some_and(is_it) {
        return Err(NodeCallError::NotMounted { volume, path });
    }
    let size = mounts::device_size(Path::new(&path));
    size.map(Some).map_err(|source| NodeCallError::Io { what: "read the size of", path, source })
}

/// Bytes and inodes of what is mounted there: one statvfs(3), no lvm. Of a
/// directory with a quota the kernel tells what the quota leaves. Of a raw
/// device nobody but its pod knows how much of it is used.
pub fn usage(id: &str, path: &Path) -> Result<Vec<VolumeUsage>, NodeCallError> {
    if let Some(size) = raw_size(id, path)? {
        let total = i64::try_from(size).unwrap_or(i64::MAX);
        return Ok(vec![VolumeUsage { total, unit: Unit::Bytes.into(), ..VolumeUsage::default() }]);
    }
    mounted(id, path)?;
    let read = |error: nix::Error| NodeCallError::Io {
        what: "look at",
        path: path.display().to_string(),
        source: error.into(),
    };
    let found = statvfs(path).map_err(read)?;
    let usage = |unit: Unit, scale: u64, total: u64, free: u64, available: u64| {
        let signed = |count: u64| i64::try_from(count.saturating_mul(scale)).unwrap_or(i64::MAX);
        VolumeUsage {
            available: signed(available),
            total: signed(total),
            used: signed(total.saturating_sub(free)),
            unit: unit.into(),
        }
    };
    Ok(vec![
        usage(Unit::Bytes, found.fragment_size(), found.blocks(), found.blocks_free(), found.blocks_available()),
        usage(Unit::Inodes, 1, found.files(), found.files_free(), found.files_available()),
    ])
}

/// The volume of a request to grow it, and the bytes that it should have.
pub fn parse_expand(request: &NodeExpandVolumeRequest) -> Result<(VolumeId, u64), NodeCallError> {
    let unknown = || NodeCallError::NoVolume(request.volume_id.chars().take(200).collect());
    let id = VolumeId::parse(&request.volume_id).ok_or_else(unknown)?;
    if let Some(capability) = &request.volume_capability {
        capability::check(std::slice::from_ref(capability), None)?;
    }
    let range = request.capacity_range.unwrap_or_default();
    let size = u64::try_from(range.required_bytes)
        .map_err(|_| NodeCallError::Range(format!("required_bytes is negative ({})", range.required_bytes)))?;
    Ok((id, size))
}

/// Grows the file system that is mounted at `path`, and the volume where it has
/// less than `size` bytes. Gives what the volume has then.
///
/// A raw volume has grown before: its pods see it at once, and there is nothing
/// to do here.
pub fn expand(lvm: &Lvm, id: &VolumeId, path: &Path, size: u64) -> Result<i64, NodeCallError> {
    if let Some(has) = raw_size(&id.to_string(), path)? {
        if has < size {
            return Err(NodeCallError::NotGrown { volume: id.to_string(), has, asked: size });
        }
        return Ok(i64::try_from(has).unwrap_or(i64::MAX));
    }
    let mount = mounted(&id.to_string(), path)?;
    lvm.expand_data(&id.vg, &id.lv, path, size)?;
    let read = |source| NodeCallError::Io { what: "read the size at", path: path.display().to_string(), source };
    let node = mount.device_node().ok_or_else(|| read(io::ErrorKind::NotFound.into()))?;
    Ok(i64::try_from(mounts::device_size(&node).map_err(read)?).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use lvprov_proto::csi::CapacityRange;

    use super::super::capability::tests::mount;
    use super::*;

    const ID: &str = "vg0/pvc-0f0e7f0a-1111-4222-8333-444455556666";

    fn data() -> NodePublishVolumeRequest {
        NodePublishVolumeRequest {
            volume_id: ID.to_owned(),
            target_path: "/var/lib/kubelet/pods/u1/volumes/kubernetes.io~csi/pvc-1/mount".to_owned(),
            volume_capability: Some(mount(Mode::SingleNodeWriter, "ext4", &["noatime"])),
            volume_context: HashMap::from([
                ("claimNamespace".to_owned(), "shop".to_owned()),
                ("csi.storage.k8s.io/pod.namespace".to_owned(), "shop".to_owned()),
            ]),
            ..NodePublishVolumeRequest::default()
        }
    }

    fn log() -> NodePublishVolumeRequest {
        let context = [
            ("csi.storage.k8s.io/ephemeral", "true"),
            ("csi.storage.k8s.io/pod.namespace", "shop"),
            ("csi.storage.k8s.io/pod.name", "web-0"),
            ("csi.storage.k8s.io/pod.uid", "u1"),
            ("csi.storage.k8s.io/serviceAccount.name", "default"),
            ("volume", "web-logs"),
            ("size", "1Gi"),
            ("quota", "100Mi"),
        ];
        NodePublishVolumeRequest {
            volume_id: "csi-0123".to_owned(),
            volume_context: context.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
            ..data()
        }
    }

    fn parse(request: &NodePublishVolumeRequest) -> Result<Published, NodeCallError> {
        Published::parse(request, &Served::default())
    }

    #[test]
    fn a_claims_volume_is_known_by_its_id_and_context() {
        let Published::Data { id, namespace, fs, read_only, options, .. } = parse(&data()).unwrap() else { panic!() };
        assert_eq!((id.to_string().as_str(), namespace.as_str(), fs), (ID, "shop", FsType::Ext4));
        assert!(!read_only && !options.flags.is_empty());
    }

    #[test]
    fn what_is_wrong_is_refused_with_its_code() {
        type Change = fn(&mut NodePublishVolumeRequest);
        let cases: [(Change, Code); 6] = [
            (|r| r.volume_capability = None, Code::InvalidArgument),
            (|r| r.volume_id = "nobody's".to_owned(), Code::NotFound),
            (|r| r.volume_context.clear(), Code::InvalidArgument),
            (
                |r| drop(r.volume_context.insert("csi.storage.k8s.io/pod.namespace".into(), "other".into())),
                Code::PermissionDenied,
            ),
            (|r| r.volume_capability = Some(mount(Mode::SingleNodeWriter, "", &["context=x"])), Code::InvalidArgument),
            (|r| r.volume_capability = Some(mount(Mode::MultiNodeMultiWriter, "", &[])), Code::InvalidArgument),
        ];
        for (number, (change, code)) in cases.into_iter().enumerate() {
            let mut request = data();
            change(&mut request);
            assert_eq!(Status::from(parse(&request).unwrap_err()).code(), code, "case {number}");
        }
        let only = Served::new(&["vg1".parse().unwrap()]);
        assert_eq!(Status::from(Published::parse(&data(), &only).unwrap_err()).code(), Code::FailedPrecondition);
    }

    #[test]
    fn an_inline_volume_takes_the_options_of_a_log_volume() {
        let Published::Log { context, pod_uid, .. } = parse(&log()).unwrap() else { panic!() };
        let options = log_options(&context, &NodeConfig::default()).unwrap();
        assert_eq!((options.volume.as_str(), options.quota, pod_uid.as_str()), ("web-logs", 100 << 20, "u1"));
        let mut more = context.clone();
        more.insert("qouta".to_owned(), "1Gi".to_owned());
        assert!(log_options(&more, &NodeConfig::default()).is_err());
    }

    /// A pod cannot get at a claim's volume by calling it inline.
    #[test]
    fn an_inline_volume_is_never_a_claims() {
        let mut request = log();
        request.volume_id = ID.to_owned();
        let data = [("type", "data"), ("volumeGroup", "vg0"), ("logicalVolume", "pvc-x")];
        request.volume_context.retain(|key, _| key.starts_with("csi."));
        request.volume_context.extend(data.map(|(key, value)| (key.to_owned(), value.to_owned())));
        let uid = "0f0e7f0a-1111-4222-8333-444455556666";
        request.volume_context.insert("claimUID".to_owned(), uid.to_owned());
        let Published::Log { context, .. } = parse(&request).unwrap() else { panic!() };
        assert!(matches!(log_options(&context, &NodeConfig::default()), Err(NodeCallError::InlineData)));
    }

    #[test]
    fn paths_are_absolute_and_plain() {
        assert_eq!(path("/nonexistent/a//b/").unwrap(), Path::new("/nonexistent/a/b"));
        for bad in ["", "a/b", "/", "/a/../b"] {
            assert!(matches!(path(bad), Err(NodeCallError::Path(_))), "{bad:?}");
        }
    }

    #[test]
    fn the_pod_is_known_by_its_path() {
        let target = Path::new("/var/lib/kubelet/pods/u1/volumes/kubernetes.io~csi/logs/mount");
        assert_eq!(pod_uid(target).unwrap().as_str(), "u1");
        assert_eq!(pod_uid(Path::new("/tmp/target")), None);
    }

    #[test]
    fn what_is_not_mounted_has_no_usage() {
        let error = usage(ID, Path::new("/proc")).unwrap_err();
        assert_eq!(error.code(), Code::NotFound, "{error}");
        assert_eq!(usage(ID, Path::new("/nonexistent")).unwrap_err().code(), Code::NotFound);
    }

    #[test]
    fn a_size_to_grow_to_is_not_negative() {
        let request = |required_bytes| NodeExpandVolumeRequest {
            volume_id: ID.to_owned(),
            capacity_range: Some(CapacityRange { required_bytes, limit_bytes: 0 }),
            ..NodeExpandVolumeRequest::default()
        };
        assert_eq!(parse_expand(&request(1 << 30)).unwrap().1, 1 << 30);
        assert_eq!(parse_expand(&request(-1)).unwrap_err().code(), Code::OutOfRange);
    }
}
