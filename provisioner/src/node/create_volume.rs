//! CreateVolume: what a request must say, and what its failures mean.

use std::collections::HashMap;

use lvm::command::CommandError;
use lvm::config::DeviceClasses;
use lvm::duration::{DurationError, parse_duration};
use lvm::intent::{DeletePolicy, DeletePolicyError, Intent};
use lvm::layout::{self, Layout, LayoutError};
use lvm::lock::LockError;
use lvm::names::{ClaimName, ClaimUid, ClusterId, DeviceClass, LvName, NameError, Namespace, VgName};
use lvm::report::{LogicalVolume, ReportError};
use lvm::restore::{Content, SourceError};
use lvm::size::human;
use lvm::thin::PoolError;
use lvm::volume::{CreateData, CreateError, ExtendError};
use lvm::{filesystem::FsType, identity::DataOwner};
use lvprov_proto::csi::volume_content_source::Type as SourceType;
use lvprov_proto::csi::{CapacityRange, CreateVolumeRequest, TopologyRequirement, VolumeContentSource};
use tonic::{Code, Status};

use super::addressee::Misdirected;
use super::capability::{self, Access, CapabilityError};
use super::in_progress::Busy;
use super::snapshots::{self, SnapshotId};
use super::volume_id::VolumeId;
use super::wiper::NotFinished;
use crate::names::{TOPOLOGY_NODE, parameters};

/// Why there is no new volume.
#[derive(Debug, thiserror::Error)]
pub enum CreateVolumeError {
    /// The call is for another node.
    #[error(transparent)]
    Misdirected(#[from] Misdirected),
    /// A required parameter is missing.
    #[error("parameter {0} is missing")]
    MissingParameter(&'static str),
    /// A parameter that we do not know.
    #[error("parameter {0:?} is not known")]
    UnknownParameter(String),
    /// A parameter's value is not valid.
    #[error("parameter {key}: {source}")]
    Parameter {
        /// The parameter.
        key: &'static str,
        /// What is wrong.
        #[source]
        source: NameError,
    },
    /// Two answers to one question.
    #[error("parameters {} and {} cannot be given both", parameters::VOLUME_GROUP, parameters::DEVICE_CLASS)]
    TwoGroups,
    /// The node's configuration does not name such a class.
    #[error("this node has no {asked}; {} names: {present}", lvm::config::CONFIG_PATH)]
    NoDeviceClass {
        /// What was asked for.
        asked: String,
        /// Those that are there.
        present: String,
    },
    /// A layout that cannot be had.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The claim's volume is there already, in another group.
    #[error("logical volume {name} is there already, in volume group {found} and not in {asked}")]
    OtherGroup {
        /// The volume.
        name: LvName,
        /// Where it is.
        found: VgName,
        /// Where it was to be.
        asked: VgName,
    },
    /// The name is not that of the claim's volume.
    #[error("name {name:?} is not that of the claim's volume, {expected}")]
    Name {
        /// As asked for.
        name: String,
        /// As it should be.
        expected: LvName,
    },
    /// What is to be done with its bytes in the end.
    #[error("parameter deletePolicy: {0}")]
    DeletePolicy(#[from] DeletePolicyError),
    /// How long it is to be in the trash.
    #[error("parameter trashTime: {0}")]
    TrashTime(#[from] DurationError),
    /// A volume has a name.
    #[error("the volume's name is missing")]
    NoName,
    /// It cannot be used as asked for.
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    /// The size is missing, or contradicts itself.
    #[error("capacity range: {0}")]
    Range(String),
    /// The file system needs more.
    #[error("{} is too small for {fs}, which needs {} at least", human(*.asked), human(.fs.minimum_size()))]
    TooSmall {
        /// Bytes asked for.
        asked: u64,
        /// The file system.
        fs: FsType,
    },
    /// What it is to be made from is not ours, or not here.
    #[error("there is no {0} on this node to make a volume from")]
    NoSource(String),
    /// The source says nothing.
    #[error("the volume's content source names neither a snapshot nor a volume")]
    ContentSource,
    /// A VolumeAttributesClass.
    #[error("a VolumeAttributesClass is not served")]
    MutableParameters,
    /// It does not say where, or says elsewhere.
    #[error("the volume is wanted on {wanted}, this is node {node}")]
    OtherNode {
        /// The nodes asked for.
        wanted: String,
        /// This node.
        node: String,
    },
    /// The group is not among those that this node may serve.
    #[error("no volume group {vg} is served on this node; it serves: {served}")]
    NotServed {
        /// The group.
        vg: VgName,
        /// Those that are.
        served: String,
    },
    /// The same volume is worked on.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// LVM could not make it, and it is not there.
    #[error("no volume was made: {0}")]
    NotMade(CommandError),
    /// LVM could not make it.
    #[error(transparent)]
    Lvm(#[from] CreateError),
    /// It still shows what its extents held before.
    #[error(transparent)]
    NotFinished(#[from] NotFinished),
    /// The work broke off.
    #[error("creating the volume broke off: {0}")]
    Interrupted(String),
}

impl CreateVolumeError {
    /// What the caller is to make of it.
    pub fn code(&self) -> Code {
        match self {
            // The request itself is wrong: the same again fails the same way.
            Self::MissingParameter(_)
            | Self::UnknownParameter(_)
            | Self::Parameter { .. }
            | Self::Layout(_)
            | Self::TwoGroups
            | Self::Name { .. }
            | Self::NoName
            | Self::DeletePolicy(_)
            | Self::TrashTime(_)
            | Self::Capability(_)
            | Self::ContentSource
            | Self::MutableParameters => Code::InvalidArgument,
            Self::NoSource(_) => Code::NotFound,
            Self::Lvm(CreateError::Source(error)) => code_of_source(error),
            // The caller has an old address of its node: with the right one it goes well.
            Self::OtherNode { .. } | Self::Misdirected(_) => Code::Unavailable,
            // Wrong node for this class until an admin changes something: back to the scheduler.
            Self::NotServed { .. }
            | Self::NoDeviceClass { .. }
            | Self::Lvm(CreateError::Pool(
                PoolError::NotConfigured { .. } | PoolError::Missing { .. } | PoolError::NotZeroing { .. },
            ))
            | Self::Lvm(
                CreateError::NoVolumeGroup { .. } | CreateError::NoModule { .. } | CreateError::Partial { .. },
            ) => Code::FailedPrecondition,
            // The first call decides; this one learns of it by calling again.
            // So does one that is being overwritten.
            Self::Busy(_) | Self::NotFinished(NotFinished::UnderWay { .. }) => Code::Aborted,
            Self::NotFinished(NotFinished::Failed(_)) => Code::Unavailable,
            // Another node may have room: back to the scheduler.
            Self::Lvm(
                CreateError::Full { .. }
                | CreateError::NoDisks { .. }
                | CreateError::MetadataFull { .. }
                | CreateError::Pool(PoolError::Full { .. } | PoolError::NearlyFull { .. }),
            ) => Code::ResourceExhausted,
            // Somebody else's volume, or a smaller one: calling again does not change it.
            Self::Lvm(CreateError::Conflict { .. }) | Self::OtherGroup { .. } => Code::AlreadyExists,
            // "Unsupported capacity_range", also once it is in whole extents.
            Self::Range(_)
            | Self::TooSmall { .. }
            | Self::Lvm(CreateError::Size { .. } | CreateError::Stripe { .. }) => Code::OutOfRange,
            // Waited for long enough; the next call may be luckier.
            Self::Lvm(CreateError::Lock(LockError::Busy { .. })) => Code::Unavailable,
            // Nothing is left behind here; another node's LVM may be in better order.
            Self::NotMade(_) => Code::Internal,
            // LVM may have made it or not. The next call finds out: nothing is given back on a guess.
            Self::Lvm(
                CreateError::Lock(_)
                | CreateError::Report(_)
                | CreateError::Pool(_)
                | CreateError::Command(_)
                | CreateError::Device { .. },
            )
            | Self::Interrupted(_) => Code::Unavailable,
        }
    }
}

/// What the caller is to make of a source that cannot be had.
fn code_of_source(error: &SourceError) -> Code {
    match error {
        SourceError::Missing { .. } => Code::NotFound,
        SourceError::Lost { .. } => Code::FailedPrecondition,
        SourceError::Larger { .. } => Code::OutOfRange,
        SourceError::Mode { .. } | SourceError::FileSystem { .. } => Code::InvalidArgument,
        SourceError::Snapshot(error) => snapshots::code_of(error),
        SourceError::Extend(ExtendError::Pool(error)) if error.is_full() => Code::ResourceExhausted,
        // The next call goes on where this one has ended.
        SourceError::Extend(_) | SourceError::Device { .. } | SourceError::Remove(_) => Code::Unavailable,
    }
}

impl From<CreateVolumeError> for Status {
    fn from(error: CreateVolumeError) -> Self {
        Status::new(error.code(), crate::with_causes(&error))
    }
}

/// What is known after a failure. An lvcreate that has ended with an error is
/// looked after, with `find`: where the volume is not there, that is certain,
/// and the caller may go elsewhere.
pub fn failure(
    error: CreateError,
    find: impl FnOnce() -> Result<Option<LogicalVolume>, ReportError>,
) -> CreateVolumeError {
    match error {
        // One that still runs may make the volume yet.
        CreateError::Command(failed @ CommandError::Failed { .. }) if matches!(find(), Ok(None)) => {
            CreateVolumeError::NotMade(failed)
        }
        other => other.into(),
    }
}

/// Checks a request and gives what LVM is to make on `node`.
///
/// # Errors
/// When it is not valid, or not for this node.
pub fn parse(
    request: &CreateVolumeRequest,
    node: &str,
    classes: &DeviceClasses,
) -> Result<CreateData, CreateVolumeError> {
    check_place(request.accessibility_requirements.as_ref(), node)?;
    check_keys(&request.parameters)?;
    let value = |key| request.parameters.get(key).ok_or(CreateVolumeError::MissingParameter(key));
    let vg = group(&request.parameters, classes)?;
    let owner = if CLAIMS.iter().any(|key| request.parameters.contains_key(*key)) {
        DataOwner {
            cluster: checked(parameters::CLUSTER, value(parameters::CLUSTER)?, ClusterId::parse)?,
            claim_uid: checked(parameters::CLAIM_UID, value(parameters::CLAIM_UID)?, ClaimUid::parse)?,
            namespace: checked(parameters::PVC_NAMESPACE, value(parameters::PVC_NAMESPACE)?, Namespace::parse)?,
            claim: checked(parameters::PVC_NAME, value(parameters::PVC_NAME)?, ClaimName::parse)?,
        }
    } else {
        nobodys(&request.name)?
    };
    let name = LvName::for_claim(&owner.claim_uid);
    let of_claim = request.parameters.contains_key(parameters::CLAIM_UID).then_some(&request.name);
    for given in [of_claim, request.parameters.get(parameters::PV_NAME)].into_iter().flatten() {
        if given != name.as_str() {
            return Err(CreateVolumeError::Name { name: given.chars().take(80).collect(), expected: name });
        }
    }
    let content = request.volume_content_source.as_ref().map(|source| parse_source(source, node)).transpose()?;
    if !request.mutable_parameters.is_empty() {
        return Err(CreateVolumeError::MutableParameters);
    }
    let fs_parameter = request.parameters.get(parameters::FS_TYPE).map(String::as_str);
    let access = capability::check(&request.volume_capabilities, fs_parameter)?;
    let (size, limit) = parse_range(request.capacity_range)?;
    if let Access::Mount(fs) = access
        && size < fs.minimum_size()
    {
        return Err(CreateVolumeError::TooSmall { asked: size, fs });
    }
    let layout = Layout::parse(|key| request.parameters.get(key).map(String::as_str))?;
    let intent = parse_intent(&request.parameters, access == Access::Block)?;
    let fs = match access {
        Access::Mount(fs) => Some(fs),
        Access::Block => None,
    };
    Ok(CreateData { vg, name, size, limit, extent_size: None, layout, metadata_free: None, owner, intent, fs, content })
}

/// What is to be in it. A source that cannot be ours is not there.
fn parse_source(source: &VolumeContentSource, node: &str) -> Result<Content, CreateVolumeError> {
    let missing = |what: &str, id: &str| {
        CreateVolumeError::NoSource(format!("{what} {:?}", id.chars().take(200).collect::<String>()))
    };
    match &source.r#type {
        Some(SourceType::Snapshot(from)) => {
            let id = SnapshotId::parse(&from.snapshot_id).filter(|id| id.node == node);
            let id = id.ok_or_else(|| missing("snapshot", &from.snapshot_id))?;
            Ok(Content::Snapshot { vg: id.vg, name: id.lv })
        }
        Some(SourceType::Volume(from)) => {
            let id = VolumeId::parse(&from.volume_id).ok_or_else(|| missing("volume", &from.volume_id))?;
            Ok(Content::Volume { vg: id.vg, lv: id.lv, claim_uid: id.claim_uid })
        }
        None => Err(CreateVolumeError::ContentSource),
    }
}

/// The volume group that parameters name, as this node understands them.
///
/// # Errors
/// When they contradict each other, or the node knows no such class.
pub fn group(given: &HashMap<String, String>, classes: &DeviceClasses) -> Result<VgName, CreateVolumeError> {
    let class = match (given.get(parameters::VOLUME_GROUP), given.get(parameters::DEVICE_CLASS)) {
        (Some(_), Some(_)) => return Err(CreateVolumeError::TwoGroups),
        (Some(group), None) => return checked(parameters::VOLUME_GROUP, group, VgName::parse),
        (None, class) => class.map(|class| checked(parameters::DEVICE_CLASS, class, DeviceClass::parse)).transpose()?,
    };
    classes.group(class.as_ref()).cloned().ok_or_else(|| CreateVolumeError::NoDeviceClass {
        asked: class.map_or_else(|| "default device class".to_owned(), |class| format!("device class {class}")),
        present: classes.names(),
    })
}

/// What becomes of the volume in the end.
fn parse_intent(given: &HashMap<String, String>, block: bool) -> Result<Intent, CreateVolumeError> {
    let delete = match given.get(parameters::DELETE_POLICY).map(String::as_str) {
        None | Some("") => DeletePolicy::default(),
        Some(text) => text.parse()?,
    };
    let trash_time = match given.get(parameters::TRASH_TIME).map(String::as_str) {
        None | Some("") => std::time::Duration::ZERO,
        Some(text) => parse_duration(text)?,
    };
    let class = match given.get(parameters::CLASS).map(String::as_str) {
        None | Some("") => None,
        // A class has the same kind of name as a claim.
        Some(name) => Some(checked(parameters::CLASS, name, ClaimName::parse)?.to_string()),
    };
    Ok(Intent { block, delete, trash_time, class })
}

/// Says that a volume is a claim's: all of them, or none.
const CLAIMS: [&str; 4] = [parameters::CLUSTER, parameters::CLAIM_UID, parameters::PVC_NAMESPACE, parameters::PVC_NAME];

/// No cluster has this UID.
const NO_CLUSTER: &str = "00000000-0000-0000-0000-000000000000";

/// The owner of a volume that is asked for by its name alone, as CSI allows: a
/// cluster that is none, so that no Kubernetes cluster ever collects it.
fn nobodys(name: &str) -> Result<DataOwner, CreateVolumeError> {
    if name.is_empty() {
        return Err(CreateVolumeError::NoName);
    }
    Ok(DataOwner {
        cluster: checked("cluster", NO_CLUSTER, ClusterId::parse)?,
        claim_uid: lvm::identity::uid_of_name(name),
        namespace: checked("namespace", "csi", Namespace::parse)?,
        claim: checked("claim", "by-name", ClaimName::parse)?,
    })
}

fn checked<T>(
    key: &'static str,
    value: &str,
    parse: impl FnOnce(&str) -> Result<T, NameError>,
) -> Result<T, CreateVolumeError> {
    parse(value).map_err(|source| CreateVolumeError::Parameter { key, source })
}

/// A node is named by one of the requisite topologies; `preferred` only orders
/// them. Without any the caller does not know where the volume will be, which
/// is no use for a local one.
fn check_place(requirement: Option<&TopologyRequirement>, node: &str) -> Result<(), CreateVolumeError> {
    let requirement = requirement.cloned().unwrap_or_default();
    if requirement.requisite.is_empty() && requirement.preferred.is_empty() {
        // Calls of the controller name their node in any case (see addressee).
        return Ok(());
    }
    let topologies = if requirement.requisite.is_empty() { &requirement.preferred } else { &requirement.requisite };
    let wanted: Vec<&str> =
        topologies.iter().filter_map(|topology| topology.segments.get(TOPOLOGY_NODE).map(String::as_str)).collect();
    if wanted.contains(&node) {
        return Ok(());
    }
    let wanted = if wanted.is_empty() {
        format!("no node (topology {TOPOLOGY_NODE} is missing)")
    } else {
        wanted.iter().map(|name| name.chars().take(80).collect::<String>()).collect::<Vec<_>>().join(", ")
    };
    Err(CreateVolumeError::OtherNode { wanted, node: node.to_owned() })
}

fn check_keys(given: &HashMap<String, String>) -> Result<(), CreateVolumeError> {
    const KNOWN: [&str; 15] = [
        parameters::VOLUME_GROUP,
        parameters::DEVICE_CLASS,
        layout::LAYOUT,
        layout::STRIPES,
        layout::STRIPE_SIZE,
        layout::MIRRORS,
        parameters::FS_TYPE,
        parameters::PVC_NAME,
        parameters::PVC_NAMESPACE,
        parameters::PV_NAME,
        parameters::CLAIM_UID,
        parameters::CLUSTER,
        parameters::DELETE_POLICY,
        parameters::TRASH_TIME,
        parameters::CLASS,
    ];
    match given.keys().filter(|key| !KNOWN.contains(&key.as_str())).min() {
        None => Ok(()),
        Some(key) => Err(CreateVolumeError::UnknownParameter(key.chars().take(80).collect())),
    }
}

/// Bytes of a volume whose size is not said.
const DEFAULT_SIZE: u64 = 1 << 30;

/// Bytes at least, and at most (0: no limit).
fn parse_range(range: Option<CapacityRange>) -> Result<(u64, u64), CreateVolumeError> {
    let range = range.unwrap_or_default();
    let bytes = |what: &str, value: i64| {
        u64::try_from(value).map_err(|_| CreateVolumeError::Range(format!("{what} is negative ({value})")))
    };
    let required = bytes("required_bytes", range.required_bytes)?;
    let limit = bytes("limit_bytes", range.limit_bytes)?;
    let required = match (required, limit) {
        // CSI leaves the size to us where nothing is said of it.
        (0, 0) => DEFAULT_SIZE,
        (0, limit) => limit.min(DEFAULT_SIZE),
        (required, _) => required,
    };
    if limit != 0 && limit < required {
        return Err(CreateVolumeError::Range(format!("limit_bytes {limit} is below required_bytes {required}")));
    }
    Ok((required, limit))
}

#[cfg(test)]
mod tests {
    use lvprov_proto::csi::Topology;
    use lvprov_proto::csi::volume_capability::access_mode::Mode;
    use lvprov_proto::csi::volume_content_source::SnapshotSource;

    use super::super::capability::tests::mount;
    use super::*;

    fn parse(request: &CreateVolumeRequest, node: &str) -> Result<CreateData, CreateVolumeError> {
        super::parse(request, node, &DeviceClasses::default())
    }

    const UID: &str = "0f0e7f0a-1111-4222-8333-444455556666";
    const GIB: i64 = 1 << 30;

    fn topology(node: &str) -> Topology {
        Topology { segments: HashMap::from([(TOPOLOGY_NODE.to_owned(), node.to_owned())]) }
    }

    fn request() -> CreateVolumeRequest {
        let parameters = [
            (parameters::VOLUME_GROUP, "vg0"),
            (parameters::FS_TYPE, "xfs"),
            (parameters::PVC_NAME, "data-web-0"),
            (parameters::PVC_NAMESPACE, "shop"),
            (parameters::PV_NAME, &format!("pvc-{UID}")),
            (parameters::CLAIM_UID, UID),
            (parameters::CLUSTER, "11111111-2222-4333-8444-555555555555"),
        ];
        CreateVolumeRequest {
            name: format!("pvc-{UID}"),
            capacity_range: Some(CapacityRange { required_bytes: GIB, limit_bytes: 0 }),
            volume_capabilities: vec![mount(Mode::SingleNodeWriter, "xfs", &[])],
            parameters: parameters.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
            accessibility_requirements: Some(TopologyRequirement {
                requisite: vec![topology("n1")],
                preferred: vec![topology("n1")],
            }),
            ..Default::default()
        }
    }

    #[test]
    fn whole_request_becomes_one_volume() {
        let volume = parse(&request(), "n1").unwrap();
        assert_eq!(volume.vg.as_str(), "vg0");
        assert_eq!(volume.name.as_str(), format!("pvc-{UID}"));
        assert_eq!((volume.size, volume.limit), (GIB as u64, 0));
        assert_eq!(volume.owner.namespace.as_str(), "shop");
        assert_eq!(volume.owner.claim.as_str(), "data-web-0");
    }

    #[test]
    fn a_node_knows_its_groups_by_class() {
        let mut by_class = request();
        by_class.parameters.remove(parameters::VOLUME_GROUP);
        assert_eq!(parse(&by_class, "n1").unwrap().vg.as_str(), "vg0");
        by_class.parameters.insert(parameters::DEVICE_CLASS.to_owned(), "default".to_owned());
        assert_eq!(parse(&by_class, "n1").unwrap().vg.as_str(), "vg0");
    }

    #[test]
    fn any_requisite_topology_may_name_this_node() {
        let mut wide = request();
        let requirement = wide.accessibility_requirements.as_mut().unwrap();
        requirement.requisite = vec![topology("n2"), topology("n1")];
        parse(&wide, "n1").unwrap();
        wide.accessibility_requirements.as_mut().unwrap().requisite.clear();
        parse(&wide, "n1").unwrap();
    }

    #[test]
    fn what_is_asked_for_by_name_alone_belongs_to_no_cluster() {
        let mut bare = request();
        bare.parameters.retain(|key, _| key == parameters::VOLUME_GROUP);
        bare.name = "a name that is no claim's".to_owned();
        bare.capacity_range = None;
        bare.accessibility_requirements = None;
        let volume = parse(&bare, "n1").unwrap();
        assert_eq!(volume.size, DEFAULT_SIZE);
        assert_eq!(volume.name, LvName::for_claim(&volume.owner.claim_uid));
        assert!(volume.owner.cluster.as_str().starts_with("00000000-"));
        assert_eq!(parse(&bare, "n1").unwrap().name, volume.name);
        bare.name.push('2');
        assert_ne!(parse(&bare, "n1").unwrap().name, volume.name);
        bare.name.clear();
        assert!(matches!(parse(&bare, "n1"), Err(CreateVolumeError::NoName)));
    }

    type Change = fn(&mut CreateVolumeRequest);

    fn set(request: &mut CreateVolumeRequest, key: &str, value: &str) {
        request.parameters.insert(key.to_owned(), value.to_owned());
    }

    #[test]
    fn what_is_wrong_is_refused_and_named() {
        let cases: [(&str, Code, Change); 31] = [
            ("cannot be given both", Code::InvalidArgument, |r| set(r, parameters::DEVICE_CLASS, "default")),
            ("no device class fast; /etc/lvprov/node.json names: default", Code::FailedPrecondition, |r| {
                r.parameters.remove(parameters::VOLUME_GROUP);
                set(r, parameters::DEVICE_CLASS, "fast");
            }),
            ("parameter deviceClass", Code::InvalidArgument, |r| {
                r.parameters.remove(parameters::VOLUME_GROUP);
                set(r, parameters::DEVICE_CLASS, "Fast");
            }),
            ("layout", Code::InvalidArgument, |r| set(r, "layout", "raid5")),
            ("stripes does not go", Code::InvalidArgument, |r| set(r, "stripes", "2")),
            ("cluster is missing", Code::InvalidArgument, |r| drop(r.parameters.remove(parameters::CLUSTER))),
            ("pvc/name is missing", Code::InvalidArgument, |r| drop(r.parameters.remove(parameters::PVC_NAME))),
            ("pvc/namespace is missing", Code::InvalidArgument, |r| {
                drop(r.parameters.remove(parameters::PVC_NAMESPACE));
            }),
            ("claim-uid is missing", Code::InvalidArgument, |r| drop(r.parameters.remove(parameters::CLAIM_UID))),
            ("\"thin\" is not known", Code::InvalidArgument, |r| set(r, "thin", "yes")),
            ("parameter volumeGroup", Code::InvalidArgument, |r| set(r, parameters::VOLUME_GROUP, "--yes")),
            ("parameter volumeGroup", Code::InvalidArgument, |r| set(r, parameters::VOLUME_GROUP, "")),
            ("pvc/namespace", Code::InvalidArgument, |r| set(r, parameters::PVC_NAMESPACE, "../etc")),
            ("pvc/name", Code::InvalidArgument, |r| set(r, parameters::PVC_NAME, "a,b")),
            ("claim-uid", Code::InvalidArgument, |r| set(r, parameters::CLAIM_UID, "1")),
            ("not that of the claim", Code::InvalidArgument, |r| r.name = "pvc-other".into()),
            ("not that of the claim", Code::InvalidArgument, |r| r.name.clear()),
            ("not that of the claim", Code::InvalidArgument, |r| set(r, parameters::PV_NAME, "pv-7")),
            ("\"zfs\"", Code::InvalidArgument, |r| set(r, parameters::FS_TYPE, "zfs")),
            ("asked for at once", Code::InvalidArgument, |r| set(r, parameters::FS_TYPE, "ext4")),
            ("no volume capability", Code::InvalidArgument, |r| r.volume_capabilities.clear()),
            ("MULTI_NODE_MULTI_WRITER", Code::InvalidArgument, |r| {
                r.volume_capabilities = vec![mount(Mode::MultiNodeMultiWriter, "", &[])];
            }),
            ("negative", Code::OutOfRange, |r| {
                r.capacity_range = Some(CapacityRange { required_bytes: -1, limit_bytes: 0 });
            }),
            ("negative", Code::OutOfRange, |r| {
                r.capacity_range = Some(CapacityRange { required_bytes: GIB, limit_bytes: -1 });
            }),
            ("below required_bytes", Code::OutOfRange, |r| {
                r.capacity_range = Some(CapacityRange { required_bytes: GIB, limit_bytes: 5 });
            }),
            ("1 MiB is too small for xfs, which needs 300 MiB", Code::OutOfRange, |r| {
                r.capacity_range = Some(CapacityRange { required_bytes: 1 << 20, limit_bytes: 0 });
            }),
            ("neither a snapshot nor a volume", Code::InvalidArgument, |r| {
                r.volume_content_source = Some(VolumeContentSource::default());
            }),
            ("no snapshot \"n2/vg0/snap-", Code::NotFound, |r| {
                let snapshot_id = format!("n2/vg0/snap-{UID}");
                let r#type = Some(SourceType::Snapshot(SnapshotSource { snapshot_id }));
                r.volume_content_source = Some(VolumeContentSource { r#type });
            }),
            ("VolumeAttributesClass", Code::InvalidArgument, |r| {
                r.mutable_parameters.insert("iops".into(), "5".into());
            }),
            ("wanted on n2, this is node n1", Code::Unavailable, |r| {
                r.accessibility_requirements =
                    Some(TopologyRequirement { requisite: vec![topology("n2")], preferred: vec![topology("n1")] });
            }),
            ("topology.lvprov.io/node is missing", Code::Unavailable, |r| {
                let elsewhere = Topology { segments: HashMap::from([("zone".to_owned(), "z".to_owned())]) };
                r.accessibility_requirements =
                    Some(TopologyRequirement { requisite: vec![elsewhere], preferred: Vec::new() });
            }),
        ];
        for (text, code, change) in cases {
            let mut request = request();
            change(&mut request);
            let error = parse(&request, "n1").unwrap_err();
            assert!(error.to_string().contains(text), "{error} has no {text:?}");
            assert_eq!(Status::from(error).code(), code, "{text}");
        }
    }

    #[test]
    fn codes_of_lvms_answers() {
        let vg = VgName::parse("vg0").unwrap();
        let name = LvName::parse("pvc-1").unwrap();
        let cases = [
            (CreateError::NoVolumeGroup { vg: vg.clone(), present: "none".into() }, Code::FailedPrecondition),
            (CreateError::Full { vg: vg.clone(), asked: 3 << 30, free: 1 << 30, trash: 0 }, Code::ResourceExhausted),
            (CreateError::MetadataFull { vg: vg.clone(), free: 100 }, Code::ResourceExhausted),
            (CreateError::Conflict { vg, name, reason: String::new() }, Code::AlreadyExists),
            (CreateError::Size { asked: 1, reason: String::new() }, Code::OutOfRange),
        ];
        for (error, code) in cases {
            let begins = error.to_string();
            let status = Status::from(CreateVolumeError::from(error));
            assert_eq!(status.code(), code);
            assert_eq!(status.message(), begins);
        }
        let misdirected = super::super::addressee::check("n1", "n2").unwrap_err();
        assert_eq!(CreateVolumeError::from(misdirected).code(), Code::Unavailable);
        // What the controller looks for.
        let error = CreateVolumeError::NotServed { vg: VgName::parse("vg9").unwrap(), served: "vg0".into() };
        assert!(error.to_string().starts_with("no volume group"));
    }

    #[test]
    fn a_failed_lvcreate_is_certain_only_where_nothing_is_left_of_it() {
        use std::os::unix::process::ExitStatusExt;
        let failed = || {
            CreateError::Command(CommandError::Failed {
                command: "lvm lvcreate".into(),
                status: std::process::ExitStatus::from_raw(5 << 8),
                stderr: "insufficient metadata space".into(),
            })
        };
        let unreadable = || Err(ReportError::Unreadable { report: "lvs", reason: String::new() });
        let status = Status::from(failure(failed(), || Ok(None)));
        assert_eq!(status.code(), Code::Internal);
        assert!(status.message().contains("insufficient metadata space"), "{status}");
        // Whether it is there cannot be told: it may be.
        assert_eq!(failure(failed(), unreadable).code(), Code::Unavailable);
        // It goes on, and will make the volume.
        let running = CommandError::StillRunning {
            command: "lvm lvcreate".into(),
            after: std::time::Duration::from_secs(100),
            pid: 7,
        };
        assert_eq!(failure(running.into(), || Ok(None)).code(), Code::Unavailable);
        let vg = VgName::parse("vg0").unwrap();
        let full = CreateError::Full { vg, asked: 3 << 30, free: 1 << 30, trash: 0 };
        assert_eq!(failure(full, unreadable).code(), Code::ResourceExhausted);
    }
}
