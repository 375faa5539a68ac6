//! Adopt: what a request must say, and what its failures mean.

use std::time::Duration;

use lvm::adopt::{Adopt, AdoptError};
use lvm::filesystem::{FsType, FsTypeError};
use lvm::identity::DataOwner;
use lvm::intent::{DeletePolicy, DeletePolicyError, Intent};
use lvm::lock::LockError;
use lvm::names::{ClaimName, ClaimUid, ClusterId, LvName, NameError, Namespace, VgName};
use lvprov_proto::lvprov::AdoptRequest;
use tonic::{Code, Status};

use super::addressee::Misdirected;
use super::in_progress::Busy;

/// Why a volume has not been given to a claim.
#[derive(Debug, thiserror::Error)]
pub enum AdoptCallError {
    /// The call is for another node.
    #[error(transparent)]
    Misdirected(#[from] Misdirected),
    /// A name in it is not valid.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A file system that is not served.
    #[error(transparent)]
    FsType(#[from] FsTypeError),
    /// A delete policy that is not served.
    #[error("deletePolicy: {0}")]
    DeletePolicy(#[from] DeletePolicyError),
    /// The group is not among those that this node may serve.
    #[error("volume group {0} is not among those that this node serves")]
    NotServed(VgName),
    /// The volume is being worked on.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// It does not suit, or LVM refused.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
    /// The work broke off.
    #[error("giving the volume to the claim broke off: {0}")]
    Interrupted(String),
}

impl AdoptCallError {
    fn code(&self) -> Code {
        match self {
            Self::Name(_) | Self::FsType(_) | Self::DeletePolicy(_) => Code::InvalidArgument,
            Self::NotServed(_) => Code::PermissionDenied,
            Self::Busy(_) => Code::Aborted,
            Self::Adopt(AdoptError::Missing { .. }) => Code::NotFound,
            Self::Adopt(AdoptError::Unfit { .. } | AdoptError::Uuid(_)) => Code::FailedPrecondition,
            Self::Adopt(AdoptError::Lock(LockError::Busy { .. })) => Code::Aborted,
            // How far it has come is on the disk: the same again goes on.
            Self::Misdirected(_) | Self::Adopt(_) | Self::Interrupted(_) => Code::Unavailable,
        }
    }
}

impl From<AdoptCallError> for Status {
    fn from(error: AdoptCallError) -> Self {
        Status::new(error.code(), crate::with_causes(&error))
    }
}

/// Checks what a request says.
///
/// # Errors
/// When something in it is not valid.
pub fn parse(request: &AdoptRequest) -> Result<Adopt, AdoptCallError> {
    let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let fs = given(&request.fs_type).map(|fs| fs.parse::<FsType>()).transpose()?;
    let delete = given(&request.delete_policy).map(|policy| policy.parse::<DeletePolicy>()).transpose()?;
    let class = given(&request.storage_class).map(|class| ClaimName::parse(&class)).transpose()?;
    Ok(Adopt {
        vg: VgName::parse(&request.volume_group)?,
        lv: LvName::parse(&request.logical_volume)?,
        from: given(&request.from_claim_uid).map(|uid| ClaimUid::parse(&uid)).transpose()?,
        owner: DataOwner {
            cluster: ClusterId::parse(&request.cluster)?,
            claim_uid: ClaimUid::parse(&request.claim_uid)?,
            namespace: Namespace::parse(&request.claim_namespace)?,
            claim: ClaimName::parse(&request.claim_name)?,
        },
        intent: Intent {
            block: fs.is_none(),
            delete: delete.unwrap_or_default(),
            trash_time: Duration::from_secs(request.trash_seconds),
            class: class.map(|class| class.to_string()),
        },
        fs,
        size: request.size_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_checked() {
        let request = AdoptRequest {
            node: "n1".into(),
            volume_group: "vg0".into(),
            logical_volume: "mine".into(),
            from_claim_uid: String::new(),
            cluster: "11111111-2222-4333-8444-555555555555".into(),
            claim_uid: "0f0e7f0a-1111-4222-8333-444455556666".into(),
            claim_namespace: "shop".into(),
            claim_name: "data".into(),
            fs_type: "xfs".into(),
            delete_policy: "zero".into(),
            trash_seconds: 60,
            storage_class: "fast".into(),
            size_bytes: 1 << 30,
        };
        let parsed = parse(&request).unwrap();
        assert_eq!((parsed.fs, parsed.from.is_none(), parsed.intent.block), (Some(FsType::Xfs), true, false));
        assert!(parse(&AdoptRequest { fs_type: String::new(), ..request.clone() }).unwrap().intent.block);
        type Change = fn(&mut AdoptRequest);
        let changes: [Change; 8] = [
            |r| r.volume_group = "-y".into(),
            |r| r.logical_volume = "a b".into(),
            |r| r.from_claim_uid = "x".into(),
            |r| r.claim_uid = "../x".into(),
            |r| r.claim_namespace = "A".into(),
            |r| r.fs_type = "ntfs".into(),
            |r| r.delete_policy = "shred".into(),
            |r| r.storage_class = "--deltag".into(),
        ];
        for change in changes {
            let mut bad = request.clone();
            change(&mut bad);
            assert_eq!(Status::from(parse(&bad).unwrap_err()).code(), Code::InvalidArgument);
        }
    }
}
