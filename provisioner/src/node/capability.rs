//! What a volume of ours can be used for.

use lvm::filesystem::{FsType, MountOptions};
use lvprov_proto::csi::VolumeCapability;
use lvprov_proto::csi::volume_capability::AccessType;
use lvprov_proto::csi::volume_capability::access_mode::Mode;

/// Why a capability is not served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CapabilityError {
    /// None was given.
    #[error("no volume capability is given")]
    None,
    /// Raw block and a file system.
    #[error("a raw block volume and a mounted file system are asked for at once")]
    BlockAndMount,
    /// Raw block, for pods' inline volumes.
    #[error("an inline volume cannot be a raw block device")]
    Block,
    /// Neither block nor mount.
    #[error("the volume capability names no access type")]
    NoAccessType,
    /// More than one node.
    #[error("access mode {0} is not served: a local volume can be written on one node only, use ReadWriteOnce")]
    AccessMode(&'static str),
    /// A file system that is not ours.
    #[error("file system {0:?} is not served: xfs, ext4 or btrfs")]
    FileSystem(String),
    /// Two that differ.
    #[error("file systems {0} and {1} are asked for at once")]
    TwoFileSystems(FsType, FsType),
    /// Mount options that are refused.
    #[error("mount options are not served: {0}")]
    MountOptions(String),
    /// To be done by kubelet.
    #[error("volume_mount_group is not served: kubelet sets the group of the files")]
    MountGroup,
}

/// How a volume is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// With this file system.
    Mount(FsType),
    /// As a raw device.
    Block,
}

impl Access {
    /// The file system.
    ///
    /// # Errors
    /// Where it is used as a raw device.
    pub fn file_system(self) -> Result<FsType, CapabilityError> {
        match self {
            Self::Mount(fs) => Ok(fs),
            Self::Block => Err(CapabilityError::Block),
        }
    }
}

/// What one capability asks for.
enum Asked {
    Mount(Option<FsType>),
    Block,
}

/// Checks all capabilities of a request together with the file system that its
/// parameters name, and gives what is meant. xfs, if nobody says anything. The
/// file system of a class does not matter to a raw device.
///
/// # Errors
/// When one is not served, or two contradict each other.
pub fn check(capabilities: &[VolumeCapability], parameter: Option<&str>) -> Result<Access, CapabilityError> {
    if capabilities.is_empty() {
        return Err(CapabilityError::None);
    }
    let asked = capabilities.iter().map(check_one).collect::<Result<Vec<_>, _>>()?;
    let raw = asked.iter().filter(|one| matches!(one, Asked::Block)).count();
    let parameter = parse(parameter.unwrap_or_default())?;
    if raw == asked.len() {
        return Ok(Access::Block);
    }
    let mut chosen = None;
    for one in asked.into_iter().chain([Asked::Mount(parameter)]) {
        match (chosen, one) {
            (_, Asked::Block) => return Err(CapabilityError::BlockAndMount),
            (Some(one), Asked::Mount(Some(other))) if one != other => {
                return Err(CapabilityError::TwoFileSystems(one, other));
            }
            (_, Asked::Mount(Some(fs))) => chosen = Some(fs),
            (_, Asked::Mount(None)) => {}
        }
    }
    Ok(Access::Mount(chosen.unwrap_or_default()))
}

fn check_one(capability: &VolumeCapability) -> Result<Asked, CapabilityError> {
    let mode = capability.access_mode.map(|access| access.mode()).unwrap_or_default();
    match mode {
        // SINGLE_NODE_WRITER is what callers say that do not know the other two.
        Mode::SingleNodeWriter | Mode::SingleNodeSingleWriter | Mode::SingleNodeMultiWriter => {}
        other => return Err(CapabilityError::AccessMode(other.as_str_name())),
    }
    let mount = match &capability.access_type {
        Some(AccessType::Mount(mount)) => mount,
        Some(AccessType::Block(_)) => return Ok(Asked::Block),
        None => return Err(CapabilityError::NoAccessType),
    };
    if !mount.volume_mount_group.is_empty() {
        return Err(CapabilityError::MountGroup);
    }
    MountOptions::parse(&mount.mount_flags.join(","))
        .map_err(|error| CapabilityError::MountOptions(error.to_string()))?;
    Ok(Asked::Mount(parse(&mount.fs_type)?))
}

fn parse(fs: &str) -> Result<Option<FsType>, CapabilityError> {
    if fs.is_empty() {
        return Ok(None);
    }
    fs.parse().map(Some).map_err(|_| CapabilityError::FileSystem(fs.chars().take(40).collect()))
}

#[cfg(test)]
pub(super) mod tests {
    use lvprov_proto::csi::volume_capability::{AccessMode, BlockVolume, MountVolume};

    use super::*;

    pub fn mount(mode: Mode, fs: &str, flags: &[&str]) -> VolumeCapability {
        VolumeCapability {
            access_mode: Some(AccessMode { mode: mode.into() }),
            access_type: Some(AccessType::Mount(MountVolume {
                fs_type: fs.into(),
                mount_flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
                volume_mount_group: String::new(),
            })),
        }
    }

    #[test]
    fn single_node_modes_are_served_and_no_other() {
        for mode in [Mode::SingleNodeWriter, Mode::SingleNodeSingleWriter, Mode::SingleNodeMultiWriter] {
            assert_eq!(check(&[mount(mode, "", &[])], None), Ok(Access::Mount(FsType::Xfs)));
        }
        for mode in [
            Mode::Unknown,
            Mode::SingleNodeReaderOnly,
            Mode::MultiNodeReaderOnly,
            Mode::MultiNodeSingleWriter,
            Mode::MultiNodeMultiWriter,
        ] {
            let error = check(&[mount(mode, "", &[])], None).unwrap_err();
            assert_eq!(error, CapabilityError::AccessMode(mode.as_str_name()));
        }
        let mut unknown_to_us = mount(Mode::SingleNodeWriter, "", &[]);
        unknown_to_us.access_mode = Some(AccessMode { mode: 99 });
        check(&[unknown_to_us], None).unwrap_err();
    }

    #[test]
    fn file_system_comes_from_either_place_but_not_from_two() {
        let xfs = mount(Mode::SingleNodeWriter, "xfs", &[]);
        let ext4 = mount(Mode::SingleNodeWriter, "ext4", &[]);
        let any = mount(Mode::SingleNodeWriter, "", &[]);
        assert_eq!(check(std::slice::from_ref(&any), Some("ext4")), Ok(Access::Mount(FsType::Ext4)));
        assert_eq!(check(std::slice::from_ref(&ext4), None), Ok(Access::Mount(FsType::Ext4)));
        assert_eq!(check(&[ext4.clone(), any.clone()], Some("ext4")), Ok(Access::Mount(FsType::Ext4)));
        assert!(matches!(check(&[xfs], Some("ext4")), Err(CapabilityError::TwoFileSystems(..))));
        for bad in ["zfs", "XFS", "xfs ", "../xfs"] {
            assert!(matches!(check(std::slice::from_ref(&any), Some(bad)), Err(CapabilityError::FileSystem(_))));
        }
    }

    #[test]
    fn what_cannot_be_honoured_is_refused() {
        assert_eq!(check(&[], None), Err(CapabilityError::None));
        let mut capability = mount(Mode::SingleNodeWriter, "", &[]);
        capability.access_type = Some(AccessType::Block(BlockVolume {}));
        assert_eq!(check(&[capability.clone()], Some("ext4")), Ok(Access::Block));
        let both = [capability.clone(), mount(Mode::SingleNodeWriter, "", &[])];
        assert_eq!(check(&both, None), Err(CapabilityError::BlockAndMount));
        capability.access_type = None;
        assert_eq!(check(&[capability], None), Err(CapabilityError::NoAccessType));
        check(&[mount(Mode::SingleNodeWriter, "", &["noatime", "discard"])], None).unwrap();
        let error = check(&[mount(Mode::SingleNodeWriter, "", &["context=x"])], None).unwrap_err();
        assert!(matches!(error, CapabilityError::MountOptions(_)), "{error}");
    }
}
