//! From a claim and its class to what a node is asked for, or to the reason
//! why not, in words that say what to do.
//!
//! Pure: nothing here asks anybody.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, PersistentVolumeClaimSpec};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::ResourceExt;

use lvm::duration::{DurationError, parse_duration, show_duration};
use lvm::filesystem::{FsType, MkfsOptionError, MkfsOptions, MountOptionError, MountOptions};
use lvm::intent::{DeletePolicy, DeletePolicyError};
use lvm::layout::{self, Layout, LayoutError};
use lvm::names::{DeviceClass, NameError, VgName};
use lvm::size::{QuantityError, human};

use super::loss::policy;
use super::names::BETA_STORAGE_CLASS;
use super::quantity::storage_of;
use super::snapshot::types::GROUP;
use super::topology::Topologies;
use crate::names::parameters::{DELETE_POLICY, DEVICE_CLASS, FS_TYPE, TRASH_TIME, VOLUME_GROUP};
use crate::names::{MKFS_OPTIONS, ON_NODE_LOSS, SOURCE};

/// Through what kubelet mounts the volumes of a class, and so who grows them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Source {
    /// The FlexVolume driver.
    #[default]
    Flexvolume,
    /// The node service.
    Csi,
}

/// Which volume group of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GroupChoice {
    /// The one of this name.
    Group(VgName),
    /// The one that the node's configuration calls so; none: its default.
    Class(Option<DeviceClass>),
}

impl GroupChoice {
    /// What a node is told of it.
    pub fn to_parameter(&self) -> Option<(&'static str, String)> {
        match self {
            Self::Group(name) => Some((VOLUME_GROUP, name.to_string())),
            Self::Class(class) => class.as_ref().map(|class| (DEVICE_CLASS, class.to_string())),
        }
    }

    /// Whether a node can have understood it as this group.
    pub fn may_be(&self, group: &str) -> bool {
        match self {
            Self::Group(name) => name.as_str() == group,
            Self::Class(_) => VgName::parse(group).is_ok(),
        }
    }
}

impl fmt::Display for GroupChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Group(name) => write!(f, "volume group {name}"),
            Self::Class(Some(class)) => write!(f, "device class {class}"),
            Self::Class(None) => f.write_str("the default device class"),
        }
    }
}

/// What becomes of a class's volumes when their claims are gone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct End {
    /// What is done with their bytes.
    pub delete: DeletePolicy,
    /// How long they are kept in the trash before.
    pub trash_time: Duration,
    /// Name of the class.
    pub class: String,
}

impl End {
    /// As a node is told; None: nothing needs to be said.
    pub fn delete_policy(&self) -> Option<String> {
        (self.delete != DeletePolicy::Remove).then(|| self.delete.to_string())
    }

    /// As a node is told.
    pub fn trash_time(&self) -> Option<String> {
        (!self.trash_time.is_zero()).then(|| show_duration(self.trash_time))
    }

    /// As a node is told.
    pub fn class(&self) -> Option<String> {
        (!self.class.is_empty()).then(|| self.class.clone())
    }
}

/// What a new volume is to hold; in the namespace of its claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    /// What this VolumeSnapshot does.
    Snapshot(String),
    /// What the volume of this claim does.
    Claim(String),
}

impl fmt::Display for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Snapshot(name) => write!(f, "VolumeSnapshot {name}"),
            Self::Claim(name) => write!(f, "claim {name}"),
        }
    }
}

/// A claim that can be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Kind of its PV.
    pub source: Source,
    /// What it is to be filled with.
    pub data: Option<Data>,
    /// Volume group to carve from.
    pub volume_group: GroupChoice,
    /// How the volume lies on the group's disks.
    pub layout: Layout,
    /// File system to make.
    pub fs_type: FsType,
    /// A raw device, with no file system.
    pub block: bool,
    /// What becomes of it in the end.
    pub end: End,
    /// For `mount(8)`, joined by commas; empty when the class has none.
    pub mount_options: String,
    /// For mkfs; empty when the class has none.
    pub mkfs_options: String,
    /// At least so many bytes.
    pub bytes: u64,
    /// Of the claim.
    pub access_modes: Vec<String>,
    /// Where it may be.
    pub topologies: Topologies,
}

impl Request {
    /// The mount options, one by one.
    pub fn mount_flags(&self) -> Vec<String> {
        self.mount_options.split(',').filter(|option| !option.is_empty()).map(str::to_owned).collect()
    }
}

/// Why a claim is not served. Nothing has been changed for it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the texts say it")]
pub enum Refusal {
    #[error(
        "access mode {0} cannot be served: a volume of StorageClass {1} is on one node only. \
         Delete the claim and make it again with accessModes [ReadWriteOnce] or [ReadWriteOncePod]"
    )]
    AccessMode(String, String),
    #[error("the claim has no access mode. Make it again with accessModes [ReadWriteOnce]")]
    NoAccessMode,
    #[error("volumeMode {0} is not served. Delete the claim and make it again with volumeMode Filesystem or Block")]
    VolumeMode(String),
    #[error(
        "volumeMode Block is served by classes with source: csi only, since Kubernetes has no raw block for \
         FlexVolumes, and StorageClass {0} has source flexvolume. Delete the claim and make it again with a class \
         that has parameters: {{source: csi}}, or with volumeMode Filesystem"
    )]
    BlockOfFlexvolume(String),
    #[error(
        "the claim has a selector, which chooses among volumes that exist; this class only makes \
         new ones. Delete the claim and make it again without spec.selector"
    )]
    Selector,
    #[error(
        "its dataSourceRef is {0}, which is for a volume populator to serve: lvprov makes no volume for it. Without such a \
         populator, delete the claim and make it again without spec.dataSourceRef"
    )]
    Populated(String),
    #[error(
        "its dataSourceRef is {what} of namespace {namespace}, and data of another namespace are not served. Delete the \
         claim and make it again there, or with a source of its own namespace"
    )]
    OtherNamespace { what: String, namespace: String },
    #[error(
        "{data} cannot be its dataSource: Kubernetes has no snapshots and clones for FlexVolumes, and StorageClass {class} \
         has source flexvolume. Delete the claim and make it again with a class that has parameters: {{source: csi}}"
    )]
    DataForFlexvolume { data: Data, class: String },
    #[error(
        "VolumeAttributesClass {0} cannot be honoured by volumes of this class. Delete the claim \
         and make it again without spec.volumeAttributesClassName"
    )]
    AttributesClass(String),
    #[error("the requested size cannot be understood: {0}")]
    Size(#[from] QuantityError),
    #[error("the claim requests no storage. Make it again with spec.resources.requests.storage")]
    NoSize,
    #[error(
        "{} is too small for {}, which needs {}. Delete the claim and make it again with a larger request",
        human(*asked), fs_type.as_str(), human(fs_type.minimum_size())
    )]
    TooSmall { asked: u64, fs_type: FsType },
    #[error(
        "StorageClass {0} has volumeBindingMode {1}, so the volume's node would be chosen before \
         the pod's. Delete the class and make it again with volumeBindingMode: WaitForFirstConsumer"
    )]
    BindingMode(String, String),
    #[error("StorageClass {class}: {source}. Delete the class and make it again without the option")]
    MountOption { class: String, source: MountOptionError },
    #[error("StorageClass {class}: {source}. Delete the class and make it again with {MKFS_OPTIONS} put right")]
    MkfsOption { class: String, source: MkfsOptionError },
    #[error(
        "StorageClass {class} has the unknown parameter {parameter:?}. Known are volumeGroup, deviceClass, \
         csi.storage.k8s.io/fstype, mkfsOptions, layout, stripes, stripeSize, mirrors, source, deletePolicy, \
         trashTime and onNodeLoss. Delete the class and make it again without it"
    )]
    Parameter { class: String, parameter: String },
    #[error("StorageClass {class}: {source}. Delete the class and make it again with the layout put right")]
    Layout { class: String, source: LayoutError },
    #[error(
        "StorageClass {0} names both a volumeGroup and a deviceClass, and only one of them can count. Delete the \
         class and make it again with one, or with neither for the default device class of each node"
    )]
    TwoGroups(String),
    #[error(
        "StorageClass {class}: {source}. Delete the class and make it again with a name that deviceClasses in \
         /etc/lvprov/node.json has on some nodes"
    )]
    DeviceClass { class: String, source: NameError },
    #[error(
        "StorageClass {class}: {source}. Delete the class and make it again with the name that \
         `vgs` shows"
    )]
    VolumeGroup { class: String, source: NameError },
    #[error(
        "StorageClass {class} has file system {fs_type:?}; served are xfs, ext4 and btrfs. Delete the \
         class and make it again with csi.storage.k8s.io/fstype: xfs"
    )]
    FsType { class: String, fs_type: String },
    #[error(
        "StorageClass {class} has source {wanted:?}; known are flexvolume and csi. Delete the class and make it \
         again with one of them, or without it for flexvolume"
    )]
    Source { class: String, wanted: String },
    #[error("StorageClass {class}: deletePolicy {source}. Delete the class and make it again with one of them")]
    DeletePolicy { class: String, source: DeletePolicyError },
    #[error("StorageClass {class}: trashTime {source}. Delete the class and make it again with trashTime: 24h")]
    TrashTime { class: String, source: DurationError },
    #[error(
        "StorageClass {class} has onNodeLoss {wanted:?}; known are keep and recreate. Delete the class and make it again \
         with one of them, or without it for keep"
    )]
    OnNodeLoss { class: String, wanted: String },
}

/// The name of the class that a claim asks for.
pub fn class_name(claim: &PersistentVolumeClaim) -> Option<&str> {
    claim
        .annotations()
        .get(BETA_STORAGE_CLASS)
        .map(String::as_str)
        .or_else(|| claim.spec.as_ref()?.storage_class_name.as_deref())
        .filter(|name| !name.is_empty())
}

/// What to ask a node for.
///
/// # Errors
/// The first reason found why the claim cannot be served.
pub fn validate(claim: &PersistentVolumeClaim, class: &StorageClass) -> Result<Request, Refusal> {
    let spec = claim.spec.clone().unwrap_or_default();
    let class_name = class.name_any();

    // Before all else: such a claim is not ours, whatever else it says.
    let data = data_of(&spec, &claim.namespace().unwrap_or_default())?;
    let access_modes = spec.access_modes.unwrap_or_default();
    if access_modes.is_empty() {
        return Err(Refusal::NoAccessMode);
    }
    let foreign = |mode: &&String| !matches!(mode.as_str(), "ReadWriteOnce" | "ReadWriteOncePod");
    if let Some(mode) = access_modes.iter().find(foreign) {
        return Err(Refusal::AccessMode(mode.clone(), class_name));
    }
    let block = match spec.volume_mode.as_deref() {
        None | Some("Filesystem") => false,
        Some("Block") => true,
        Some(other) => return Err(Refusal::VolumeMode(other.chars().take(40).collect())),
    };
    if spec.selector.is_some() {
        return Err(Refusal::Selector);
    }
    if let Some(attributes) = spec.volume_attributes_class_name
        && !attributes.is_empty()
    {
        return Err(Refusal::AttributesClass(attributes));
    }

    let template = Template::of(class)?;
    let requests = spec.resources.and_then(|resources| resources.requests);
    let bytes = storage_of(requests.as_ref())?.ok_or(Refusal::NoSize)?;
    if block && template.source != Source::Csi {
        return Err(Refusal::BlockOfFlexvolume(class_name));
    }
    if !block && bytes < template.fs_type.minimum_size() {
        return Err(Refusal::TooSmall { asked: bytes, fs_type: template.fs_type });
    }
    if let Some(data) = &data
        && template.source != Source::Csi
    {
        return Err(Refusal::DataForFlexvolume { data: data.clone(), class: class_name });
    }
    Ok(Request {
        source: template.source,
        data,
        volume_group: template.volume_group,
        layout: template.layout,
        fs_type: template.fs_type,
        block,
        end: template.end,
        mount_options: template.mount_options,
        mkfs_options: template.mkfs_options,
        bytes,
        access_modes,
        topologies: template.topologies,
    })
}

/// Whether a claim asks for a volume with data in it, whoever fills it.
pub fn asks_for_data(claim: &PersistentVolumeClaim) -> bool {
    claim.spec.as_ref().is_some_and(|spec| spec.data_source.is_some() || spec.data_source_ref.is_some())
}

/// What a claim is to be filled with. The API server keeps `dataSource` and
/// `dataSourceRef` equal where the older of the two can say it.
fn data_of(spec: &PersistentVolumeClaimSpec, own_namespace: &str) -> Result<Option<Data>, Refusal> {
    let by_ref = spec.data_source_ref.as_ref().map(|it| (&it.api_group, &it.kind, &it.name, it.namespace.as_deref()));
    let source = by_ref.or_else(|| spec.data_source.as_ref().map(|it| (&it.api_group, &it.kind, &it.name, None)));
    let Some((group, kind, name, namespace)) = source else { return Ok(None) };
    let data = match (group.as_deref().unwrap_or_default(), kind.as_str()) {
        (GROUP, "VolumeSnapshot") => Data::Snapshot(name.clone()),
        ("", "PersistentVolumeClaim") => Data::Claim(name.clone()),
        (group, kind) => {
            let named = format!("{kind} {name}{}{group}", if group.is_empty() { "" } else { " of " });
            return Err(Refusal::Populated(named.chars().take(200).collect()));
        }
    };
    match namespace.filter(|namespace| !namespace.is_empty() && *namespace != own_namespace) {
        Some(other) => Err(Refusal::OtherNamespace { what: data.to_string(), namespace: other.to_owned() }),
        None => Ok(Some(data)),
    }
}

/// What a class says of all its volumes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Kind of the PVs.
    pub source: Source,
    /// Volume group to carve from.
    pub volume_group: GroupChoice,
    /// How they lie on the group's disks.
    pub layout: Layout,
    /// File system to make.
    pub fs_type: FsType,
    /// What becomes of them in the end.
    pub end: End,
    /// For `mount(8)`, joined by commas.
    pub mount_options: String,
    /// For mkfs, words separated by one space.
    pub mkfs_options: String,
    /// Where they may be.
    pub topologies: Topologies,
}

impl Template {
    /// Reads a class of ours.
    ///
    /// # Errors
    /// When no claim of this class can be served.
    pub fn of(class: &StorageClass) -> Result<Self, Refusal> {
        let name = class.name_any();
        // The API server's default is Immediate.
        let binding = class.volume_binding_mode.as_deref().unwrap_or("Immediate");
        if binding != "WaitForFirstConsumer" {
            return Err(Refusal::BindingMode(name, binding.to_owned()));
        }
        let none = BTreeMap::new();
        let parameters = class.parameters.as_ref().unwrap_or(&none);
        const LAYOUTS: [&str; 4] = [layout::LAYOUT, layout::STRIPES, layout::STRIPE_SIZE, layout::MIRRORS];
        let known = |key: &str| {
            matches!(key, VOLUME_GROUP | DEVICE_CLASS | FS_TYPE | MKFS_OPTIONS | SOURCE)
                || matches!(key, DELETE_POLICY | TRASH_TIME | ON_NODE_LOSS)
                || LAYOUTS.contains(&key)
        };
        if let Some(unknown) = parameters.keys().find(|key| !known(key)) {
            return Err(Refusal::Parameter { class: name, parameter: unknown.chars().take(80).collect() });
        }
        let volume_group = match (parameters.get(VOLUME_GROUP), parameters.get(DEVICE_CLASS)) {
            (Some(_), Some(_)) => return Err(Refusal::TwoGroups(name)),
            (Some(group), None) => VgName::parse(group)
                .map(GroupChoice::Group)
                .map_err(|source| Refusal::VolumeGroup { class: name.clone(), source })?,
            (None, class) => {
                let class = class.map(|class| DeviceClass::parse(class)).transpose();
                GroupChoice::Class(class.map_err(|source| Refusal::DeviceClass { class: name.clone(), source })?)
            }
        };
        let layout = Layout::parse(|key| parameters.get(key).map(String::as_str))
            .map_err(|source| Refusal::Layout { class: name.clone(), source })?;
        let fs_type = match parameters.get(FS_TYPE).map(String::as_str) {
            None | Some("") => FsType::default(),
            Some(wanted) => wanted
                .parse()
                .map_err(|_| Refusal::FsType { class: name.clone(), fs_type: wanted.chars().take(40).collect() })?,
        };
        let mkfs_options = parameters.get(MKFS_OPTIONS).map(String::as_str).unwrap_or_default();
        MkfsOptions::parse(fs_type, mkfs_options)
            .map_err(|source| Refusal::MkfsOption { class: name.clone(), source })?;
        let mkfs_options = mkfs_options.split_whitespace().collect::<Vec<_>>().join(" ");
        let source = match parameters.get(SOURCE).map(String::as_str) {
            None | Some("" | "flexvolume") => Source::Flexvolume,
            Some("csi") => Source::Csi,
            Some(other) => return Err(Refusal::Source { class: name, wanted: other.chars().take(40).collect() }),
        };
        let delete = match parameters.get(DELETE_POLICY).map(String::as_str) {
            None | Some("") => DeletePolicy::default(),
            Some(text) => text.parse().map_err(|source| Refusal::DeletePolicy { class: name.clone(), source })?,
        };
        let trash_time = match parameters.get(TRASH_TIME).map(String::as_str) {
            None | Some("") => Duration::ZERO,
            Some(text) => parse_duration(text).map_err(|source| Refusal::TrashTime { class: name.clone(), source })?,
        };
        let end = End { delete, trash_time, class: name.clone() };
        if let Some(wanted) = parameters.get(ON_NODE_LOSS)
            && !matches!(wanted.as_str(), policy::KEEP | policy::RECREATE)
        {
            return Err(Refusal::OnNodeLoss { class: name, wanted: wanted.chars().take(40).collect() });
        }
        let mount_options = class.mount_options.as_deref().unwrap_or_default().join(",");
        MountOptions::parse(&mount_options).map_err(|source| Refusal::MountOption { class: name, source })?;
        // Only the options themselves go on, into PVs: no white space around them.
        let options: Vec<&str> = MountOptions::words(&mount_options).collect();
        let mount_options = options.join(",");
        Ok(Self {
            source,
            volume_group,
            layout,
            fs_type,
            end,
            mount_options,
            mkfs_options,
            topologies: Topologies::of(class),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::{option, sample};
    use serde_json::{Value, json};

    use super::*;

    fn class(change: impl FnOnce(&mut Value)) -> StorageClass {
        let mut class = json!({
            "metadata": {"name": "fast"},
            "provisioner": "lvm.lvprov.io",
            "parameters": {"volumeGroup": "vg0", "csi.storage.k8s.io/fstype": "ext4"},
            "volumeBindingMode": "WaitForFirstConsumer",
        });
        change(&mut class);
        serde_json::from_value(class).unwrap()
    }

    fn claim(change: impl FnOnce(&mut Value)) -> PersistentVolumeClaim {
        let mut claim = json!({
            "metadata": {"name": "data-0", "namespace": "default"},
            "spec": {
                "accessModes": ["ReadWriteOnce"],
                "storageClassName": "fast",
                "resources": {"requests": {"storage": "1Gi"}},
            },
        });
        change(&mut claim);
        serde_json::from_value(claim).unwrap()
    }

    /// What somebody might try: plain, as an option, with what a shell, LVM, a
    /// path or YAML reads differently, and over-long.
    fn hostile() -> impl Strategy<Value = String> {
        let known = sample::select(vec!["vg0", "xfs", "ext4", "csi", "noatime", "discard", "volumeGroup", "source"]);
        let evil = sample::select(vec![
            "-", "--help", "\n", "\0", " ", "\u{a0}", "\u{2028}", ",", "/", "..", "$(id)", ";", "'", "@", "=", "ä",
            "\u{202e}",
        ]);
        prop_oneof![
            3 => known.clone().prop_map(str::to_owned),
            3 => (evil.clone(), known.clone()).prop_map(|(evil, known)| format!("{evil}{known}")),
            3 => (known.clone(), evil.clone()).prop_map(|(known, evil)| format!("{known}{evil}")),
            1 => (known, evil).prop_map(|(known, evil)| format!("{known}{evil}").repeat(300)),
            1 => "\\PC{0,40}",
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn nothing_in_a_class_reaches_a_node_or_a_volume_but_what_is_on_a_list(
            group in hostile(), fs in hostile(), source in hostile(), mkfs in hostile(), extra in option::weighted(0.2, hostile()),
            options in vec(hostile(), 0..3), plain in any::<[bool; 5]>(),
        ) {
            let pick = |plain, hostile: String, usual: &str| if plain { usual.to_owned() } else { hostile };
            let class = class(|c| {
                c["parameters"] = json!({
                    "volumeGroup": pick(plain[0], group, "vg0"),
                    "csi.storage.k8s.io/fstype": pick(plain[1], fs, "xfs"),
                    "source": pick(plain[2], source, "csi"),
                });
                if let Some(extra) = extra {
                    c["parameters"][extra] = json!("x");
                }
                if plain[4] {
                    c["parameters"][MKFS_OPTIONS] = json!(format!("-m {mkfs}"));
                }
                c["mountOptions"] = json!(if plain[3] { vec!["noatime".to_owned()] } else { options });
            });
            match validate(&claim(|_| ()), &class) {
                Ok(request) => {
                    let (_, group) = request.volume_group.to_parameter().unwrap();
                    prop_assert!(group.bytes().all(|b| b.is_ascii_alphanumeric() || b"+_.-".contains(&b)), "{:?}", group);
                    prop_assert!(!group.starts_with(['-', '.']) && group.len() < 128, "{:?}", group);
                    for flag in request.mount_flags() {
                        prop_assert!(flag.bytes().all(|b| b.is_ascii_lowercase()), "{:?}", flag);
                    }
                    prop_assert_eq!(request.mount_flags().join(","), request.mount_options);
                    let listed = |b: u8| b.is_ascii_alphanumeric() || b"-_=, ".contains(&b);
                    prop_assert!(request.mkfs_options.bytes().all(listed), "{:?}", request.mkfs_options);
                }
                Err(refusal) => {
                    let text = refusal.to_string();
                    prop_assert!(text.chars().all(|c| !c.is_control()), "{:?}", text);
                    prop_assert!(text.len() < 1000, "too long for an Event: {}", text);
                }
            }
        }
    }

    fn refused(claim: &PersistentVolumeClaim, class: &StorageClass) -> String {
        let text = validate(claim, class).unwrap_err().to_string();
        assert!(text.len() < 600, "too long for an Event: {text}");
        text
    }

    fn refused_claim(change: impl FnOnce(&mut Value)) -> String {
        refused(&claim(change), &class(|_| ()))
    }

    fn refused_class(change: impl FnOnce(&mut Value)) -> String {
        refused(&claim(|_| ()), &class(change))
    }

    #[test]
    fn a_plain_claim_is_served() {
        let request = validate(&claim(|_| ()), &class(|_| ())).unwrap();
        assert_eq!(request.source, Source::Flexvolume);
        assert_eq!(request.volume_group.to_string(), "volume group vg0");
        assert_eq!(request.fs_type, FsType::Ext4);
        assert_eq!(request.bytes, 1 << 30);
        assert_eq!(request.mount_options, "");
        assert_eq!(request.access_modes, ["ReadWriteOnce"]);
    }

    #[test]
    fn xfs_is_the_default_and_mount_options_are_taken_along() {
        let class = class(|c| {
            c["parameters"] = json!({"volumeGroup": "vg0"});
            c["mountOptions"] = json!(["noatime", "discard"]);
        });
        let request = validate(&claim(|_| ()), &class).unwrap();
        assert_eq!(request.fs_type, FsType::Xfs);
        assert_eq!(request.mount_options, "noatime,discard");
        assert_eq!(request.mount_flags(), ["noatime", "discard"]);
    }

    #[test]
    fn options_of_mkfs_are_those_of_the_file_system() {
        let with = |fs: &str, options: &str| {
            let (fs, options) = (json!(fs), json!(options));
            move |c: &mut Value| {
                c["parameters"] =
                    json!({"volumeGroup": "vg0", "csi.storage.k8s.io/fstype": fs, "mkfsOptions": options});
            }
        };
        let class = class(with("xfs", "  -i size=1024\n-m  reflink=0 "));
        assert_eq!(validate(&claim(|_| ()), &class).unwrap().mkfs_options, "-i size=1024 -m reflink=0");
        for (fs, options) in
            [("ext4", "-i size=1024"), ("xfs", "-l logdev=/dev/sda"), ("btrfs", "-m raid1"), ("xfs", "-i")]
        {
            let text = refused_class(with(fs, options));
            assert!(text.contains("mkfsOptions") && text.contains("mkfs option"), "{text}");
        }
    }

    #[test]
    fn the_source_is_the_classs_choice_and_no_other_than_ours() {
        let source = |source: &str| {
            let class = class(|c| c["parameters"]["source"] = json!(source));
            validate(&claim(|_| ()), &class).map(|request| request.source)
        };
        assert_eq!(source("csi"), Ok(Source::Csi));
        assert_eq!(source("flexvolume"), Ok(Source::Flexvolume));
        assert_eq!(source(""), Ok(Source::Flexvolume));
        for other in ["CSI", "csi ", "flexVolume", "local", &"x".repeat(1000)] {
            let text = refused_class(|c| c["parameters"]["source"] = json!(other));
            assert!(text.contains("flexvolume and csi") && text.contains("StorageClass fast"), "{text}");
        }
    }

    #[test]
    fn a_layout_is_the_classs_choice_and_must_make_sense() {
        let with = |more: Value| {
            let parameters = json!({"volumeGroup": "vg0"}).as_object().unwrap().clone();
            let parameters: serde_json::Map<_, _> =
                parameters.into_iter().chain(more.as_object().unwrap().clone()).collect();
            move |c: &mut Value| c["parameters"] = parameters.into()
        };
        let layout = |more| validate(&claim(|_| ()), &class(with(more))).unwrap().layout;
        assert_eq!(layout(json!({})), Layout::Linear);
        assert_eq!(layout(json!({"layout": "raid1"})), Layout::Raid1 { mirrors: 1 });
        let striped = Layout::Striped { stripes: 4, stripe_size: 128 << 10 };
        assert_eq!(layout(json!({"layout": "striped", "stripes": "4", "stripeSize": "128Ki"})), striped);
        for (more, word) in [
            (json!({"layout": "raid6"}), "linear, striped, raid1"),
            (json!({"layout": "raid1", "stripes": "2"}), "stripes does not go with layout raid1"),
            (json!({"mirrors": "1"}), "mirrors does not go with layout linear"),
            (json!({"layout": "raid1", "mirrors": "many"}), "from 1 to 9"),
            (json!({"layout": "striped", "stripeSize": "3Ki"}), "power of two"),
        ] {
            let text = refused_class(with(more));
            assert!(text.contains(word) && text.contains("StorageClass fast"), "{text}");
        }
    }

    #[test]
    fn a_csi_class_serves_raw_block_and_no_more_than_the_other() {
        let class = class(|c| c["parameters"]["source"] = json!("csi"));
        let pod = claim(|c| c["spec"]["accessModes"] = json!(["ReadWriteOncePod"]));
        assert_eq!(validate(&pod, &class).unwrap().access_modes, ["ReadWriteOncePod"]);
        let small = claim(|c| {
            c["spec"]["volumeMode"] = json!("Block");
            c["spec"]["resources"]["requests"]["storage"] = json!("4Mi");
        });
        assert!(validate(&small, &class).unwrap().block, "the least of a file system does not count");
        let other = claim(|c| c["spec"]["volumeMode"] = json!("Tape"));
        assert!(refused(&other, &class).contains("volumeMode Tape"));
        let attributes = claim(|c| c["spec"]["volumeAttributesClassName"] = json!("gold"));
        assert!(refused(&attributes, &class).contains("VolumeAttributesClass gold"));
    }

    #[test]
    fn read_write_once_pod_is_served_and_explicit_filesystem_too() {
        let claim = claim(|c| {
            c["spec"]["accessModes"] = json!(["ReadWriteOncePod"]);
            c["spec"]["volumeMode"] = json!("Filesystem");
            c["spec"]["volumeAttributesClassName"] = json!("");
        });
        assert!(validate(&claim, &class(|_| ())).is_ok());
    }

    #[test]
    fn access_modes_of_many_nodes_are_refused() {
        for mode in ["ReadWriteMany", "ReadOnlyMany"] {
            let text = refused_claim(|c| c["spec"]["accessModes"] = json!(["ReadWriteOnce", mode]));
            assert!(text.contains(mode) && text.contains("ReadWriteOnce"), "{text}");
        }
        assert!(refused_claim(|c| c["spec"]["accessModes"] = json!([])).contains("no access mode"));
    }

    #[test]
    fn the_end_of_a_volume_is_what_its_class_says() {
        let class = class(|c| {
            c["parameters"]["deletePolicy"] = json!("zero");
            c["parameters"]["trashTime"] = json!("24h");
        });
        let end = validate(&claim(|_| ()), &class).unwrap().end;
        assert_eq!((end.delete_policy().as_deref(), end.trash_time().as_deref()), (Some("zero"), Some("1d")));
        assert_eq!(end.class().as_deref(), Some("fast"));
        let text = refused_class(|c| c["parameters"]["deletePolicy"] = json!("shred"));
        assert!(text.contains("remove, discard or zero"), "{text}");
        let text = refused_class(|c| c["parameters"]["trashTime"] = json!("soon"));
        assert!(text.contains("trashTime") && text.contains("24h"), "{text}");
    }

    #[test]
    fn block_mode_is_refused_by_a_class_of_flexvolumes() {
        let text = refused_claim(|c| c["spec"]["volumeMode"] = json!("Block"));
        assert!(text.contains("volumeMode Block") && text.contains("source: csi"), "{text}");
    }

    #[test]
    fn a_selector_is_refused_even_an_empty_one() {
        let text = refused_claim(|c| c["spec"]["selector"] = json!({}));
        assert!(text.contains("spec.selector"), "{text}");
    }

    fn of_csi() -> StorageClass {
        class(|c| c["parameters"]["source"] = json!("csi"))
    }

    #[test]
    fn data_come_from_a_snapshot_or_a_claim_of_the_same_namespace() {
        let snapshot = json!({"kind": "VolumeSnapshot", "name": "s1", "apiGroup": "snapshot.storage.k8s.io"});
        let other = json!({"kind": "PersistentVolumeClaim", "name": "c1"});
        for field in ["dataSource", "dataSourceRef"] {
            let data = |source: &Value| {
                let claim = claim(|c| c["spec"][field] = source.clone());
                assert!(asks_for_data(&claim));
                validate(&claim, &of_csi()).unwrap().data
            };
            assert_eq!(data(&snapshot), Some(Data::Snapshot("s1".into())));
            assert_eq!(data(&other), Some(Data::Claim("c1".into())));
            let text = refused_claim(|c| c["spec"][field] = snapshot.clone());
            assert!(text.contains("VolumeSnapshot s1") && text.contains("source: csi"), "{text}");
        }
        assert_eq!(validate(&claim(|_| ()), &of_csi()).unwrap().data, None);
        let named = |namespace: &str| {
            let mut source = snapshot.clone();
            source["namespace"] = json!(namespace);
            validate(&claim(|c| c["spec"]["dataSourceRef"] = source), &of_csi())
        };
        assert_eq!(named("default").unwrap().data, Some(Data::Snapshot("s1".into())));
        let text = named("shop").unwrap_err().to_string();
        assert!(text.contains("VolumeSnapshot s1 of namespace shop"), "{text}");
    }

    #[test]
    fn what_a_populator_serves_is_not_refused_for_anything_else() {
        let source = json!({"kind": "Hello", "name": "h1", "apiGroup": "hello.example.com"});
        let populated = |c: &mut Value| {
            c["spec"]["dataSourceRef"] = source.clone();
            c["spec"]["accessModes"] = json!(["ReadWriteMany"]);
        };
        let refusal = validate(&claim(populated), &class(|_| ())).unwrap_err();
        assert_eq!(refusal, Refusal::Populated("Hello h1 of hello.example.com".into()));
        // Of the same kind, and of another group.
        let other = json!({"kind": "VolumeSnapshot", "name": "s1"});
        let refusal = validate(&claim(|c| c["spec"]["dataSourceRef"] = other), &of_csi()).unwrap_err();
        assert_eq!(refusal, Refusal::Populated("VolumeSnapshot s1".into()));
    }

    #[test]
    fn an_attributes_class_is_refused() {
        let text = refused_claim(|c| c["spec"]["volumeAttributesClassName"] = json!("gold"));
        assert!(text.contains("VolumeAttributesClass gold"), "{text}");
    }

    #[test]
    fn sizes_that_hold_no_file_system_are_refused() {
        let ask = |size: &str, fs: &str| {
            let claim = claim(|c| c["spec"]["resources"]["requests"]["storage"] = json!(size));
            let class = class(|c| c["parameters"]["csi.storage.k8s.io/fstype"] = json!(fs));
            validate(&claim, &class)
        };
        assert!(ask("16Mi", "ext4").is_ok());
        assert!(ask("300Mi", "xfs").is_ok());
        let text = ask("314572799", "xfs").unwrap_err().to_string();
        assert!(text.contains("300 MiB") && text.contains("xfs"), "{text}");
        assert!(ask("0", "ext4").unwrap_err().to_string().contains("0 B is too small"));
        assert!(ask("1Gi?", "ext4").unwrap_err().to_string().contains("1Gi?"));
        assert!(refused_claim(|c| c["spec"]["resources"] = json!({})).contains("no storage"));
    }

    #[test]
    fn immediate_binding_is_refused_also_as_the_default() {
        let text = refused_class(|c| c["volumeBindingMode"] = json!("Immediate"));
        assert!(text.contains("WaitForFirstConsumer"), "{text}");
        assert!(refused_class(|c| c["volumeBindingMode"] = Value::Null).contains("Immediate"));
    }

    #[test]
    fn unknown_parameters_are_refused() {
        let text = refused_class(|c| c["parameters"]["volumegroup"] = json!("vg0"));
        assert!(text.contains("\"volumegroup\""), "{text}");
    }

    #[test]
    fn a_group_goes_by_its_name_or_by_what_nodes_call_it() {
        let choice = |parameters: Value| {
            validate(&claim(|_| ()), &class(|c| c["parameters"] = parameters)).unwrap().volume_group
        };
        assert_eq!(choice(json!({})), GroupChoice::Class(None));
        let fast = GroupChoice::Class(Some("fast".parse().unwrap()));
        assert_eq!(choice(json!({"deviceClass": "fast"})), fast);
        assert_eq!((fast.to_parameter(), fast.may_be("nvme0")), (Some(("deviceClass", "fast".to_owned())), true));
        assert!(!choice(json!({"volumeGroup": "vg0"})).may_be("nvme0") && !fast.may_be(""));
        let both = refused_class(|c| c["parameters"]["deviceClass"] = json!("fast"));
        assert!(both.contains("both a volumeGroup and a deviceClass"), "{both}");
        for bad in ["", "Fast", "-y", "../x", &"f".repeat(64)] {
            let text = refused_class(|c| c["parameters"] = json!({"deviceClass": bad}));
            assert!(text.contains("StorageClass fast: device class"), "{text}");
        }
    }

    #[test]
    fn a_volume_group_must_be_a_name() {
        assert!(refused_class(|c| c["parameters"]["volumeGroup"] = json!("")).contains("volume group"));
        for bad in ["../vg0", "vg 0", "-vg0", ".", &"v".repeat(128)] {
            let text = refused_class(|c| c["parameters"]["volumeGroup"] = json!(bad));
            assert!(text.contains("StorageClass fast") && text.contains("vgs"), "{text}");
        }
    }

    #[test]
    fn other_file_systems_are_refused() {
        let text = refused_class(|c| c["parameters"]["csi.storage.k8s.io/fstype"] = json!("zfs"));
        assert!(text.contains("zfs") && text.contains("btrfs"), "{text}");
    }

    #[test]
    fn mount_options_outside_the_list_are_refused() {
        let text = refused_class(|c| c["mountOptions"] = json!(["noatime", "uid=0"]));
        assert!(text.contains("uid=0") && text.contains("StorageClass fast"), "{text}");
        // One entry must not smuggle in another.
        assert!(refused_class(|c| c["mountOptions"] = json!(["noatime,context=x"])).contains("context"));
    }

    #[test]
    fn the_old_annotation_names_the_class_too() {
        let name = |c: &PersistentVolumeClaim| class_name(c).map(str::to_owned);
        assert_eq!(name(&claim(|_| ())).as_deref(), Some("fast"));
        let old = claim(|c| {
            c["metadata"]["annotations"] = json!({BETA_STORAGE_CLASS: "slow"});
            c["spec"]["storageClassName"] = Value::Null;
        });
        assert_eq!(name(&old).as_deref(), Some("slow"));
        assert_eq!(name(&claim(|c| c["spec"]["storageClassName"] = json!(""))), None);
    }
}
