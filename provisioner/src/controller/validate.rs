//! From a claim and its class to what a node is asked for, or to the reason
//! why not, in words that say what to do.
//!
//! Pure: nothing here asks anybody.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::api::storage::v1::StorageClass;
use kube::ResourceExt;

use super::names::BETA_STORAGE_CLASS;
use super::quantity::{QuantityError, human, storage_of};
use crate::names::parameters::{FS_TYPE, VOLUME_GROUP};

/// A claim that can be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Volume group to carve from.
    pub volume_group: String,
    /// File system to make.
    pub fs_type: FsType,
    /// For `mount(8)`, joined by commas; empty when the class has none.
    pub mount_options: String,
    /// At least so many bytes.
    pub bytes: u64,
    /// Of the claim.
    pub access_modes: Vec<String>,
}

/// File systems that data volumes can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FsType {
    /// The default.
    Xfs,
    /// The fourth extended file system.
    Ext4,
}

impl FsType {
    /// As in StorageClass, PV and `mkfs.<name>`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Xfs => "xfs",
            Self::Ext4 => "ext4",
        }
    }

    /// The smallest volume, in bytes, that can hold it: `mkfs.xfs(8)` refuses
    /// less than 300 MiB, and ext4 on less than 16 MiB is mostly journal.
    pub fn minimum_size(self) -> u64 {
        match self {
            Self::Xfs => 300 << 20,
            Self::Ext4 => 16 << 20,
        }
    }

    fn parse(text: &str) -> Option<Self> {
        match text {
            "" | "xfs" => Some(Self::Xfs),
            "ext4" => Some(Self::Ext4),
            _ => None,
        }
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
    #[error(
        "volumeMode {0} is not served. Delete the claim and make it again with volumeMode Filesystem"
    )]
    VolumeMode(String),
    #[error(
        "the claim has a selector, which chooses among volumes that exist; this class only makes \
         new ones. Delete the claim and make it again without spec.selector"
    )]
    Selector,
    #[error(
        "a volume cannot be filled from another one ({0}). Delete the claim and make it again \
         without spec.dataSource and spec.dataSourceRef"
    )]
    DataSource(String),
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
    #[error(
        "StorageClass {class} has the mount option {option:?}, which is not served: {why}. Delete \
         the class and make it again without it"
    )]
    MountOption {
        class: String,
        option: String,
        why: String,
    },
    #[error(
        "StorageClass {class} has the unknown parameter {parameter:?}. Known are volumeGroup and \
         csi.storage.k8s.io/fstype. Delete the class and make it again without it"
    )]
    Parameter { class: String, parameter: String },
    #[error(
        "StorageClass {0} does not say which LVM volume group to use. Delete the class and make it \
         again with parameters: {{volumeGroup: <name>}}"
    )]
    NoVolumeGroup(String),
    #[error(
        "StorageClass {class} has volumeGroup {group:?}, which cannot be the name of an LVM volume \
         group: {why}. Delete the class and make it again with the name that `vgs` shows"
    )]
    VolumeGroup {
        class: String,
        group: String,
        why: &'static str,
    },
    #[error(
        "StorageClass {class} has file system {fs_type:?}; served are xfs and ext4. Delete the \
         class and make it again with csi.storage.k8s.io/fstype: xfs"
    )]
    FsType { class: String, fs_type: String },
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

    let access_modes = spec.access_modes.unwrap_or_default();
    if access_modes.is_empty() {
        return Err(Refusal::NoAccessMode);
    }
    let foreign = |mode: &&String| !matches!(mode.as_str(), "ReadWriteOnce" | "ReadWriteOncePod");
    if let Some(mode) = access_modes.iter().find(foreign) {
        return Err(Refusal::AccessMode(mode.clone(), class_name));
    }
    if let Some(mode) = spec.volume_mode
        && mode != "Filesystem"
    {
        return Err(Refusal::VolumeMode(mode));
    }
    if spec.selector.is_some() {
        return Err(Refusal::Selector);
    }
    let source = spec
        .data_source_ref
        .map(|source| format!("{} {}", source.kind, source.name))
        .or_else(|| {
            spec.data_source
                .map(|source| format!("{} {}", source.kind, source.name))
        });
    if let Some(source) = source {
        return Err(Refusal::DataSource(source));
    }
    if let Some(attributes) = spec.volume_attributes_class_name
        && !attributes.is_empty()
    {
        return Err(Refusal::AttributesClass(attributes));
    }

    let template = Template::of(class)?;
    let requests = spec.resources.and_then(|resources| resources.requests);
    let bytes = storage_of(requests.as_ref())?.ok_or(Refusal::NoSize)?;
    if bytes < template.fs_type.minimum_size() {
        return Err(Refusal::TooSmall {
            asked: bytes,
            fs_type: template.fs_type,
        });
    }
    Ok(Request {
        volume_group: template.volume_group,
        fs_type: template.fs_type,
        mount_options: template.mount_options,
        bytes,
        access_modes,
    })
}

/// What a class says of all its volumes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Volume group to carve from.
    pub volume_group: String,
    /// File system to make.
    pub fs_type: FsType,
    /// For `mount(8)`, joined by commas.
    pub mount_options: String,
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
        if let Some(unknown) = parameters
            .keys()
            .find(|key| !matches!(key.as_str(), VOLUME_GROUP | FS_TYPE))
        {
            return Err(Refusal::Parameter {
                class: name,
                parameter: unknown.clone(),
            });
        }
        let volume_group = parameters.get(VOLUME_GROUP).cloned().unwrap_or_default();
        if volume_group.is_empty() {
            return Err(Refusal::NoVolumeGroup(name));
        }
        if let Some(why) = volume_group_fault(&volume_group) {
            return Err(Refusal::VolumeGroup {
                class: name,
                group: volume_group,
                why,
            });
        }
        let wanted = parameters.get(FS_TYPE).map(String::as_str).unwrap_or("");
        let fs_type = FsType::parse(wanted).ok_or_else(|| Refusal::FsType {
            class: name.clone(),
            fs_type: wanted.to_owned(),
        })?;
        let options = class.mount_options.as_deref().unwrap_or_default();
        let mount_options =
            mount_options(options).map_err(|(option, why)| Refusal::MountOption {
                class: name,
                option,
                why,
            })?;
        Ok(Self {
            volume_group,
            fs_type,
            mount_options,
        })
    }
}

/// Why a text cannot be a volume group's name, after `lvm(8)`, VALID NAMES.
fn volume_group_fault(name: &str) -> Option<&'static str> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "+_.-".contains(c);
    if name.len() > 127 {
        Some("it is longer than 127 characters")
    } else if !name.chars().all(allowed) {
        Some("only letters, digits and +_.- are allowed")
    } else if name.starts_with('-') {
        Some("it begins with a hyphen")
    } else if matches!(name, "." | "..") {
        Some("it is the name of a directory")
    } else {
        None
    }
}
