//! The CSI volume id: `<volume group>/<logical volume>`.

use std::fmt;

use lvm::names::{ClaimUid, LvName, VgName};

/// Prefix of the name of every data volume, before its claim's UID.
const PREFIX: &str = "pvc-";

/// A data volume, by its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeId {
    /// Volume group.
    pub vg: VgName,
    /// Logical volume.
    pub lv: LvName,
    /// The claim that it was made for, as its name says.
    pub claim_uid: ClaimUid,
}

impl VolumeId {
    /// None: no volume of ours can have this id.
    pub fn parse(id: &str) -> Option<Self> {
        let (vg, lv) = id.split_once('/')?;
        let claim_uid = ClaimUid::parse(lv.strip_prefix(PREFIX)?).ok()?;
        Some(Self { vg: VgName::parse(vg).ok()?, lv: LvName::for_claim(&claim_uid), claim_uid })
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.vg, self.lv)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_ours_go_both_ways_and_others_are_none() {
        let id = "vg0/pvc-0f0e7f0a-1111-4222-8333-444455556666";
        assert_eq!(VolumeId::parse(id).unwrap().to_string(), id);
        for other in [
            "",
            "vg0",
            "vg0/",
            "/pvc-0f0e7f0a-1111-4222-8333-444455556666",
            "vg0/log-0011223344556677",
            "vg0/pvc-x",
            "-y/pvc-0f0e7f0a-1111-4222-8333-444455556666",
            "vg0/pvc-0f0e7f0a-1111-4222-8333-444455556666/x",
            "vg0/../pvc-0f0e7f0a-1111-4222-8333-444455556666",
        ] {
            assert_eq!(VolumeId::parse(other), None, "{other:?}");
        }
    }
}
