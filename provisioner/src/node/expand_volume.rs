//! ControllerExpandVolume: what a request must say, and what its failures mean.

use lvm::lock::LockError;
use lvm::names::VgName;
use lvm::volume::ExtendError;
use lvprov_proto::csi::ControllerExpandVolumeRequest;
use tonic::{Code, Status};

use super::addressee::Misdirected;
use super::capability::{self, CapabilityError};
use super::in_progress::Busy;
use super::volume_id::VolumeId;
use super::wiper::NotFinished;

/// Why a volume was not extended.
#[derive(Debug, thiserror::Error)]
pub enum ExpandVolumeError {
    /// The call is for another node.
    #[error(transparent)]
    Misdirected(#[from] Misdirected),
    /// Which volume is not said.
    #[error("volume_id is missing")]
    MissingId,
    /// No volume of ours can have this id.
    #[error("there is no volume {0:?}")]
    NoVolume(String),
    /// The group is not to be touched.
    #[error("volume group {0} is not served on this node")]
    NotServed(VgName),
    /// What it is to be used for is not served.
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    /// Sizes that make no sense.
    #[error("capacity range: {0}")]
    Range(String),
    /// The volume is being worked on.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// LVM said no.
    #[error(transparent)]
    Lvm(#[from] ExtendError),
    /// The room that it grows by still shows what it held before.
    #[error(transparent)]
    NotFinished(#[from] NotFinished),
    /// The task broke off.
    #[error("extending the volume broke off: {0}")]
    Interrupted(String),
}

impl ExpandVolumeError {
    fn code(&self) -> Code {
        match self {
            Self::MissingId | Self::Capability(_) => Code::InvalidArgument,
            Self::NoVolume(_) | Self::Lvm(ExtendError::Missing { .. }) => Code::NotFound,
            Self::NotServed(_) | Self::Lvm(ExtendError::Partial { .. }) => Code::FailedPrecondition,
            Self::Range(_) => Code::OutOfRange,
            Self::Lvm(ExtendError::Full { .. } | ExtendError::NoDisks { .. } | ExtendError::MetadataFull { .. }) => {
                Code::ResourceExhausted
            }
            Self::Lvm(ExtendError::Pool(error)) if error.is_full() => Code::ResourceExhausted,
            Self::Lvm(ExtendError::Layout { .. } | ExtendError::InTheWay { .. } | ExtendError::HasSnapshots { .. }) => {
                Code::FailedPrecondition
            }
            // It goes on; the next call finds out how far.
            Self::Busy(_) | Self::NotFinished(NotFinished::UnderWay { .. }) => Code::Aborted,
            Self::NotFinished(NotFinished::Failed(_)) => Code::Unavailable,
            Self::Misdirected(_) | Self::Interrupted(_) | Self::Lvm(ExtendError::Lock(LockError::Busy { .. })) => {
                Code::Unavailable
            }
            // It may be extended by now or not; the next call finds out.
            Self::Lvm(_) => Code::Unavailable,
        }
    }
}

impl From<ExpandVolumeError> for Status {
    fn from(error: ExpandVolumeError) -> Self {
        Status::new(error.code(), crate::with_causes(&error))
    }
}

/// The volume, and the bytes that it should have.
pub fn parse(request: &ControllerExpandVolumeRequest) -> Result<(VolumeId, u64), ExpandVolumeError> {
    if request.volume_id.is_empty() {
        return Err(ExpandVolumeError::MissingId);
    }
    let shown = || request.volume_id.chars().take(200).collect();
    let id = VolumeId::parse(&request.volume_id).ok_or_else(|| ExpandVolumeError::NoVolume(shown()))?;
    if let Some(capability) = &request.volume_capability {
        capability::check(std::slice::from_ref(capability), None)?;
    }
    let range = request.capacity_range.ok_or_else(|| ExpandVolumeError::Range("it is missing".to_owned()))?;
    let bytes = |value: i64| {
        u64::try_from(value).map_err(|_| ExpandVolumeError::Range(format!("a size is negative ({value})")))
    };
    let (required, limit) = (bytes(range.required_bytes)?, bytes(range.limit_bytes)?);
    if limit != 0 && limit < required {
        return Err(ExpandVolumeError::Range(format!("limit_bytes {limit} is below required_bytes {required}")));
    }
    Ok((id, required))
}

#[cfg(test)]
mod tests {
    use lvprov_proto::csi::CapacityRange;

    use super::*;

    const ID: &str = "vg0/pvc-0f0e7f0a-1111-4222-8333-444455556666";

    fn request(id: &str, range: Option<(i64, i64)>) -> ControllerExpandVolumeRequest {
        ControllerExpandVolumeRequest {
            volume_id: id.to_owned(),
            capacity_range: range.map(|(required_bytes, limit_bytes)| CapacityRange { required_bytes, limit_bytes }),
            ..ControllerExpandVolumeRequest::default()
        }
    }

    #[test]
    fn what_is_wrong_has_its_code() {
        for (id, range, code) in [
            ("", Some((1, 0)), Code::InvalidArgument),
            ("nobody's", Some((1, 0)), Code::NotFound),
            (ID, None, Code::OutOfRange),
            (ID, Some((-1, 0)), Code::OutOfRange),
            (ID, Some((2, 1)), Code::OutOfRange),
        ] {
            assert_eq!(Status::from(parse(&request(id, range)).unwrap_err()).code(), code, "{id} {range:?}");
        }
        assert_eq!(parse(&request(ID, Some((1 << 30, 0)))).unwrap().1, 1 << 30);
    }

    #[test]
    fn no_room_is_said_as_such() {
        let error = ExtendError::Full {
            vg: "vg0".parse().unwrap(),
            name: "pvc-1".parse().unwrap(),
            asked: 3 << 30,
            more: 2 << 30,
            free: 1 << 30,
        };
        assert_eq!(ExpandVolumeError::from(error).code(), Code::ResourceExhausted);
    }
}
