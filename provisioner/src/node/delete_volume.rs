//! DeleteVolume: what its failures mean.

use lvm::names::{LvName, VgName};
use lvm::volume::DeleteError;
use tonic::{Code, Status};

use super::addressee::Misdirected;
use super::in_progress::Busy;

/// Why a volume is still there, or may be.
#[derive(Debug, thiserror::Error)]
pub enum DeleteVolumeError {
    /// The call is for another node.
    #[error(transparent)]
    Misdirected(#[from] Misdirected),
    /// No id is given.
    #[error("volume_id is missing")]
    MissingId,
    /// The group is not among those that this node may serve.
    #[error("volume group {0} is not among those that this node serves; its volumes are left alone")]
    NotServed(VgName),
    /// The group is not there.
    #[error(
        "no volume group {vg} on this node: is its disk missing? {vg}/{lv} counts as there until the group is back, \
         or its PersistentVolume's finalizer is removed by hand"
    )]
    NoVolumeGroup {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
    },
    /// The same volume is worked on.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// LVM did not remove it.
    #[error(transparent)]
    Lvm(#[from] DeleteError),
    /// The work broke off.
    #[error("removing the volume broke off: {0}")]
    Interrupted(String),
}

impl DeleteVolumeError {
    /// What the caller is to make of it.
    pub fn code(&self) -> Code {
        match self {
            // The request itself is wrong.
            Self::MissingId => Code::InvalidArgument,
            // The caller has an old address of its node: the right one knows more.
            Self::Misdirected(_) => Code::Unavailable,
            // CSI: its last user, and its snapshots, have to go first.
            Self::Lvm(DeleteError::InUse { .. } | DeleteError::HasSnapshots { .. }) => Code::FailedPrecondition,
            // Not ours to touch, until an admin says otherwise.
            Self::Lvm(DeleteError::NotOurs { .. }) | Self::NotServed(_) => Code::PermissionDenied,
            // The first call decides; this one learns of it by calling again.
            Self::Busy(_) => Code::Aborted,
            // Not known whether it is gone. That a group is missing does not mean that its
            // volumes are: its disk may come back.
            Self::Lvm(
                DeleteError::Lock(_) | DeleteError::Report(_) | DeleteError::Command(_) | DeleteError::Clone(_),
            )
            | Self::NoVolumeGroup { .. }
            | Self::Interrupted(_) => Code::Unavailable,
        }
    }
}

impl From<DeleteVolumeError> for Status {
    fn from(error: DeleteVolumeError) -> Self {
        Status::new(error.code(), crate::with_causes(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_in_use_is_told_from_one_that_is_not_ours_and_ignorance_is_not_success() {
        let vg = VgName::parse("vg0").unwrap();
        let name = LvName::parse("pvc-1").unwrap();
        let in_use = DeleteVolumeError::from(DeleteError::InUse { vg: vg.clone(), name: name.clone() });
        assert_eq!(Status::from(in_use).code(), Code::FailedPrecondition);
        let unserved = DeleteVolumeError::NotServed(vg.clone());
        assert_eq!(Status::from(unserved).code(), Code::PermissionDenied);
        let foreign = DeleteVolumeError::from(DeleteError::NotOurs { vg, name });
        assert_eq!(Status::from(foreign).code(), Code::PermissionDenied);
        let missing = lvm::command::CommandError::Missing { program: "lvm".into() };
        let unknown = DeleteVolumeError::from(DeleteError::Command(missing));
        assert_eq!(Status::from(unknown).code(), Code::Unavailable);
    }
}
