//! Who owns a logical volume: its tags, and the UUID of its file system.
//!
//! Tags are the truth on disk (every logical volume of ours carries them). The
//! file system's UUID is derived from the owner too, so that the driver can
//! tell from the superblock alone, without asking LVM, that what it is about to
//! mount was made for this claim and this namespace: a signature that an
//! interrupted `lvcreate` did not wipe, or the volume of another namespace
//! named in a pod's options, has another UUID.

use crate::layout::Layout;
use crate::names::{ClaimName, ClaimUid, ClusterId, LogVolumeName, Namespace, SnapshotUid};
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// What all tags of ours begin with.
pub const PREFIX: &str = "lvprov.io/";
const KIND: &str = "lvprov.io/kind=";
const CLUSTER: &str = "lvprov.io/cluster=";
const CLAIM_UID: &str = "lvprov.io/claim-uid=";
const CLAIM: &str = "lvprov.io/claim=";
const SNAPSHOT_UID: &str = "lvprov.io/snapshot-uid=";
const SNAPSHOT: &str = "lvprov.io/snapshot=";
const LOG: &str = "lvprov.io/log=";
const LAYOUT: &str = "lvprov.io/layout=";

/// The tag of a log volume that has been made and not formatted yet.
pub const NEW: &str = "lvprov.io/new";

/// The owner of a logical volume of ours, as its tags tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// The volume of one PersistentVolumeClaim.
    Data(DataOwner),
    /// The log volume that pods of one namespace share on this node.
    Log {
        /// Namespace of the pods.
        namespace: Namespace,
        /// Name of the log volume in that namespace.
        volume: LogVolumeName,
    },
}

/// The claim that a data volume was made for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataOwner {
    /// The cluster whose claim it is.
    pub cluster: ClusterId,
    /// UID of the claim.
    pub claim_uid: ClaimUid,
    /// Namespace of the claim.
    pub namespace: Namespace,
    /// Name of the claim.
    pub claim: ClaimName,
}

/// Whose a snapshot is: of which volume it is one, and what asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotOwner {
    /// The claim whose volume it is a snapshot of.
    pub source: DataOwner,
    /// UID of the VolumeSnapshot; of what a clone is copied from, that of the
    /// new volume's claim.
    pub uid: SnapshotUid,
    /// Namespace of the VolumeSnapshot, or of that claim.
    pub namespace: Namespace,
    /// Name of the VolumeSnapshot, or of that claim.
    pub name: ClaimName,
}

impl SnapshotOwner {
    /// The tags that `lvcreate --addtag` is given.
    pub fn to_tags(&self) -> Vec<String> {
        vec![
            format!("{KIND}snapshot"),
            format!("{CLUSTER}{}", self.source.cluster),
            format!("{CLAIM_UID}{}", self.source.claim_uid),
            format!("{CLAIM}{}/{}", self.source.namespace, self.source.claim),
            format!("{SNAPSHOT_UID}{}", self.uid),
            format!("{SNAPSHOT}{}/{}", self.namespace, self.name),
        ]
    }

    /// Reads it from an LV's tags. None: no snapshot of ours, or not whole, and
    /// then not touched.
    pub fn from_tags<'a>(tags: impl IntoIterator<Item = &'a str> + Clone) -> Option<Self> {
        let value = |prefix: &str| tags.clone().into_iter().find_map(|tag| tag.strip_prefix(prefix));
        if value(KIND)? != "snapshot" {
            return None;
        }
        let (of_namespace, claim) = value(CLAIM)?.split_once('/')?;
        let (namespace, name) = value(SNAPSHOT)?.split_once('/')?;
        Some(Self {
            source: DataOwner {
                cluster: ClusterId::parse(value(CLUSTER)?).ok()?,
                claim_uid: ClaimUid::parse(value(CLAIM_UID)?).ok()?,
                namespace: Namespace::parse(of_namespace).ok()?,
                claim: ClaimName::parse(claim).ok()?,
            },
            uid: SnapshotUid::parse(value(SNAPSHOT_UID)?).ok()?,
            namespace: Namespace::parse(namespace).ok()?,
            name: ClaimName::parse(name).ok()?,
        })
    }
}

impl Owner {
    /// The tags that `lvcreate --addtag` is given.
    pub fn to_tags(&self) -> Vec<String> {
        match self {
            Owner::Data(data) => vec![
                format!("{KIND}data"),
                format!("{CLUSTER}{}", data.cluster),
                format!("{CLAIM_UID}{}", data.claim_uid),
                format!("{CLAIM}{}/{}", data.namespace, data.claim),
            ],
            Owner::Log { namespace, volume } => vec![format!("{KIND}log"), format!("{LOG}{namespace}/{volume}")],
        }
    }

    /// Reads the owner from an LV's tags. None: not ours, or not whole, and
    /// then not touched.
    pub fn from_tags<'a>(tags: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        let (mut kind, mut cluster, mut uid, mut claim, mut log) = (None, None, None, None, None);
        for tag in tags {
            for (prefix, slot) in [
                (KIND, &mut kind),
                (CLUSTER, &mut cluster),
                (CLAIM_UID, &mut uid),
                (CLAIM, &mut claim),
                (LOG, &mut log),
            ] {
                if let Some(value) = tag.strip_prefix(prefix) {
                    *slot = Some(value);
                }
            }
        }
        match kind? {
            "data" => {
                let (namespace, claim) = claim?.split_once('/')?;
                Some(Owner::Data(DataOwner {
                    cluster: ClusterId::parse(cluster?).ok()?,
                    claim_uid: ClaimUid::parse(uid?).ok()?,
                    namespace: Namespace::parse(namespace).ok()?,
                    claim: ClaimName::parse(claim).ok()?,
                }))
            }
            "log" => {
                let (namespace, volume) = log?.split_once('/')?;
                Some(Owner::Log {
                    namespace: Namespace::parse(namespace).ok()?,
                    volume: LogVolumeName::parse(volume).ok()?,
                })
            }
            _ => None,
        }
    }
}

/// The tag that says how a volume was asked to lie on the disks; none where it
/// may lie anywhere.
pub fn layout_tag(layout: Layout) -> Option<String> {
    (!layout.is_linear()).then(|| format!("{LAYOUT}{layout}"))
}

/// What [`layout_tag`] says among an LV's tags.
pub fn layout_of<'a>(tags: impl IntoIterator<Item = &'a str>) -> Layout {
    let said = tags.into_iter().find_map(|tag| tag.strip_prefix(LAYOUT));
    said.and_then(|layout| layout.parse().ok()).unwrap_or_default()
}

/// The UUID of a data volume's file system.
pub fn data_uuid(namespace: &Namespace, claim_uid: &ClaimUid) -> Uuid {
    derive(&["data", namespace.as_str(), claim_uid.as_str()])
}

/// The UUID of a log volume's file system.
pub fn log_uuid(namespace: &Namespace, volume: &LogVolumeName) -> Uuid {
    derive(&["log", namespace.as_str(), volume.as_str()])
}

/// The UID that stands for the claim of a volume that was made for none, but
/// under a name of its own (by another orchestrator than Kubernetes, say).
pub fn uid_of_name(name: &str) -> ClaimUid {
    let uid = derive(&["name", name]);
    ClaimUid::parse(&uid.to_string()).unwrap_or_else(|_| unreachable!("a UUID is a claim's UID"))
}

fn derive(parts: &[&str]) -> Uuid {
    let digest = digest(parts);
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    // Version 8 of RFC 9562: a UUID of the application's own making.
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

/// SHA-256 of the parts; no part may hold a newline, which sets them apart.
pub(crate) fn digest(parts: &[&str]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(b"lvprov.io\n");
    for part in parts {
        hash.update(part.as_bytes());
        hash.update(b"\n");
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data() -> Owner {
        Owner::Data(DataOwner {
            cluster: ClusterId::parse("11111111-2222-4333-8444-555555555555").unwrap(),
            claim_uid: ClaimUid::parse("0f0e7f0a-1111-4222-8333-444455556666").unwrap(),
            namespace: Namespace::parse("shop").unwrap(),
            claim: ClaimName::parse("data-web-0").unwrap(),
        })
    }

    #[test]
    fn tags_go_both_ways_in_any_order_and_among_others() {
        let log = Owner::Log {
            namespace: Namespace::parse("shop").unwrap(),
            volume: LogVolumeName::parse("web-logs").unwrap(),
        };
        for owner in [data(), log] {
            let mut tags = owner.to_tags();
            tags.reverse();
            tags.push("backup".to_owned());
            assert_eq!(Owner::from_tags(tags.iter().map(String::as_str)), Some(owner));
        }
    }

    #[test]
    fn a_volume_with_half_of_the_tags_is_not_ours() {
        let tags = data().to_tags();
        for missing in 0..tags.len() {
            let left: Vec<&str> =
                tags.iter().enumerate().filter(|(i, _)| *i != missing).map(|(_, t)| t.as_str()).collect();
            assert_eq!(Owner::from_tags(left), None);
        }
        assert_eq!(Owner::from_tags([]), None);
    }

    #[test]
    fn a_snapshot_is_no_volume_and_known_only_by_all_of_its_tags() {
        let Owner::Data(source) = data() else { unreachable!() };
        let owner = SnapshotOwner {
            source,
            uid: SnapshotUid::parse("1f0e7f0a-1111-4222-8333-444455556666").unwrap(),
            namespace: Namespace::parse("shop").unwrap(),
            name: ClaimName::parse("before-upgrade").unwrap(),
        };
        let tags = owner.to_tags();
        let read = |tags: &[String]| SnapshotOwner::from_tags(tags.iter().map(String::as_str));
        assert_eq!(read(&tags), Some(owner));
        assert_eq!(Owner::from_tags(tags.iter().map(String::as_str)), None);
        assert_eq!(read(&data().to_tags()), None);
        for missing in 0..tags.len() {
            let mut left = tags.clone();
            left.remove(missing);
            assert_eq!(read(&left), None);
        }
    }

    #[test]
    fn tags_hold_only_what_lvm_takes() {
        for tag in data().to_tags() {
            assert!(tag.len() <= 1024);
            assert!(tag.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+.-/=!:&#".contains(&b)), "{tag}");
        }
    }

    #[test]
    fn another_namespace_or_claim_means_another_file_system() {
        let uid = ClaimUid::parse("0f0e7f0a-1111-4222-8333-444455556666").unwrap();
        let (a, b) = (Namespace::parse("a").unwrap(), Namespace::parse("b").unwrap());
        assert_ne!(data_uuid(&a, &uid), data_uuid(&b, &uid));
        assert_eq!(data_uuid(&a, &uid), data_uuid(&a, &uid));
        assert_eq!(data_uuid(&a, &uid).get_version_num(), 8);
    }
}
