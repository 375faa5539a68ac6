//! What crashes, where, and how.

use lvprov_tests::objects::Source;

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Create,
    /// The claim is deleted while its volume is made, and the crash comes then.
    Abandon,
    Delete,
    Grow,
    /// The first mount, which formats.
    Mount,
    Unmount,
    /// The first mount of a log volume, which makes it.
    Log,
    /// Of a raw volume, which is overwritten first.
    Block,
    /// Of a raw volume that is used.
    GrowBlock,
    /// Of a volume whose class has it wiped, by way of the trash.
    Trash,
    /// Of a volume that is copied from another one.
    Clone,
    /// A snapshot is taken of a volume that is used.
    Snapshot,
    /// It goes.
    DeleteSnapshot,
    /// A volume that was made by hand is given to a claim.
    Import,
}

/// What happens at the point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Happening {
    /// The process ends there.
    End,
    /// The node's power is cut.
    Cut,
}

#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub operation: Operation,
    pub source: Source,
    /// Whether it is about a volume of two copies.
    pub mirrored: bool,
    pub point: &'static str,
    pub happening: Happening,
    /// Whether it runs with every test.
    pub always: bool,
}

impl Case {
    pub fn name(&self) -> String {
        let kind = if self.mirrored { "raid1 " } else { "" };
        format!("{:?} {:?} {kind}{} {:?}", self.operation, self.source, self.point, self.happening).to_lowercase()
    }
}

/// The points that each operation comes by, in order.
const POINTS: [(Operation, Source, &[&str]); 17] = [
    (
        Operation::Create,
        Source::Flexvolume,
        &["create-before", "lvcreate-before", "lvcreate-after", "mark-after", "create-after", "pv-after"],
    ),
    (Operation::Abandon, Source::Flexvolume, &["create-after"]),
    (
        Operation::Delete,
        Source::Flexvolume,
        &["delete-before", "lvremove-before", "lvremove-after", "delete-after", "pv-delete-after"],
    ),
    (Operation::Mount, Source::Flexvolume, &["mkfs-before", "mkfs-after", "mount-after"]),
    (Operation::Mount, Source::Csi, &["mkfs-before", "mkfs-after", "mount-after"]),
    (Operation::Unmount, Source::Flexvolume, &["unmount-before", "unmount-after"]),
    (Operation::Unmount, Source::Csi, &["unmount-before", "unmount-after"]),
    (Operation::Grow, Source::Flexvolume, &["lvextend-before", "lvextend-after", "growfs-before", "growfs-after"]),
    (
        Operation::Grow,
        Source::Csi,
        &[
            "expand-before",
            "lvextend-before",
            "lvextend-after",
            "expand-after",
            "expand-pv-after",
            "expand-status-after",
            "growfs-before",
            "growfs-after",
        ],
    ),
    (
        Operation::Log,
        Source::Flexvolume,
        &[
            "lvcreate-before",
            "lvcreate-after",
            "mkfs-before",
            "mkfs-after",
            "untag-before",
            "untag-after",
            "log-mount-after",
            "log-directory-before",
            "log-directory-after",
            "log-bind-after",
        ],
    ),
    (
        Operation::Block,
        Source::Csi,
        &["lvcreate-after", "wipe-before", "wipe-piece", "zeroed-before", "zeroed-after", "create-after"],
    ),
    (
        Operation::GrowBlock,
        Source::Csi,
        &["lvcreate-after", "wipe-piece", "zeroed-after", "hand-on-before", "hand-on-between", "hand-on-after"],
    ),
    (
        Operation::Clone,
        Source::Csi,
        &[
            "snapshot-before",
            "snapshot-after",
            "lvcreate-before",
            "lvcreate-after",
            "copy-before",
            "copy-piece",
            "copy-after",
            "fill-uuid",
            "filled",
            "zeroed-before",
            "zeroed-after",
            "snapshot-remove-before",
            "snapshot-remove-after",
            "create-after",
        ],
    ),
    (
        Operation::Snapshot,
        Source::Csi,
        &["snapshot-call-before", "snapshot-before", "snapshot-during", "snapshot-after", "snapshot-call-after"],
    ),
    (
        Operation::DeleteSnapshot,
        Source::Csi,
        &[
            "snapshot-delete-call-before",
            "snapshot-remove-before",
            "lvremove-during",
            "snapshot-remove-after",
            "snapshot-delete-call-after",
        ],
    ),
    (Operation::Import, Source::Flexvolume, &["adopt-tagged", "adopt-uuid", "adopt-renamed"]),
    (
        Operation::Trash,
        Source::Flexvolume,
        &[
            "trash-before",
            "trash-tagged",
            "trash-renamed",
            "trash-wipe-before",
            "wipe-piece",
            "lvremove-before",
            "lvremove-after",
        ],
    ),
];

/// Those that differ where LVM makes one volume of several. `…-during`: the power goes while LVM is at it.
const MIRRORED: [(Operation, Source, &[&str]); 3] = [
    (
        Operation::Create,
        Source::Csi,
        &["lvcreate-before", "lvcreate-during", "lvcreate-after", "mark-after", "create-after"],
    ),
    (Operation::Grow, Source::Csi, &["lvextend-before", "lvextend-during", "lvextend-after", "growfs-before"]),
    (Operation::Delete, Source::Csi, &["lvremove-before", "lvremove-during", "lvremove-after"]),
];

/// Each operation, and each process that takes part in it, at least once.
const ALWAYS: [&str; 14] = [
    "create flexvolume lvcreate-after end",
    "create flexvolume mark-after cut",
    "abandon flexvolume create-after end",
    "create csi raid1 lvcreate-during cut",
    "delete flexvolume pv-delete-after end",
    "mount flexvolume mkfs-after end",
    "unmount csi unmount-before end",
    "grow csi expand-after end",
    "log flexvolume untag-before end",
    "growblock csi hand-on-between end",
    "trash flexvolume wipe-piece cut",
    "snapshot csi snapshot-after cut",
    "deletesnapshot csi snapshot-delete-call-after end",
    "clone csi copy-piece cut",
];

/// The whole matrix.
pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    let plain = POINTS.into_iter().map(|points| (points, false));
    let mirrored = MIRRORED.into_iter().map(|points| (points, true));
    for ((operation, source, points), mirrored) in plain.chain(mirrored) {
        for point in points {
            for happening in [Happening::End, Happening::Cut] {
                if point.ends_with("-during") && happening == Happening::End {
                    continue;
                }
                let case = Case { operation, source, mirrored, point, happening, always: false };
                cases.push(Case { always: ALWAYS.contains(&case.name().as_str()), ..case });
            }
        }
    }
    assert_eq!(cases.iter().filter(|case| case.always).count(), ALWAYS.len(), "a case that always runs is not there");
    cases
}
