//! Snapshots: what requests must say, and what their failures mean.

use std::collections::HashMap;
use std::fmt;

use lvm::lock::LockError;
use lvm::names::{ClaimName, LvName, NameError, Namespace, SnapshotUid, VgName};
use lvm::report::Snapshot;
use lvm::snapshot::{CreateSnapshot, DeleteSnapshotError, Room, RoomError, SnapshotError, uid_of};
use lvprov_proto::csi;
use prost_types::Timestamp;
use tonic::{Code, Status};

use super::addressee::Misdirected;
use super::in_progress::Busy;
use super::volume_id::VolumeId;
use crate::names::parameters;

/// The CSI snapshot id: `<node>/<volume group>/<logical volume>`. A volume's id
/// need not say its node, since its PersistentVolume does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotId {
    /// The node, by its topology.
    pub node: String,
    /// Volume group.
    pub vg: VgName,
    /// The snapshot.
    pub lv: LvName,
}

impl SnapshotId {
    /// None: no snapshot of ours can have this id.
    pub fn parse(id: &str) -> Option<Self> {
        let (node, place) = id.split_once('/')?;
        let (vg, lv) = place.split_once('/')?;
        let uid = SnapshotUid::parse(lv.strip_prefix("snap-")?).ok()?;
        let node = (!node.is_empty() && node.len() <= 253).then(|| node.to_owned())?;
        Some(Self { node, vg: VgName::parse(vg).ok()?, lv: LvName::for_snapshot(&uid) })
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.node, self.vg, self.lv)
    }
}

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum CreateSnapshotError {
    /// The call is for another node.
    #[error(transparent)]
    Misdirected(#[from] Misdirected),
    /// What every request has.
    #[error("{0} is missing")]
    MissingField(&'static str),
    /// A parameter that we do not know.
    #[error("parameter {0:?} is not known; known is {known}", known = parameters::SNAPSHOT_SIZE)]
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
    /// So much room cannot be meant.
    #[error("parameter {0}")]
    Room(#[from] RoomError),
    /// No volume of ours can have this id.
    #[error("there is no volume {0:?} on this node")]
    NoVolume(String),
    /// The group is not to be touched.
    #[error("volume group {0} is not served on this node")]
    NotServed(VgName),
    /// The same snapshot is worked on.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// LVM said no.
    #[error(transparent)]
    Lvm(#[from] SnapshotError),
    /// The work broke off.
    #[error("making the snapshot broke off: {0}")]
    Interrupted(String),
}

/// What the caller is to make of it.
pub fn code_of(error: &SnapshotError) -> Code {
    match error {
        SnapshotError::Missing { .. } => Code::NotFound,
        SnapshotError::NotReady { .. } | SnapshotError::NoModule => Code::FailedPrecondition,
        SnapshotError::Conflict { .. } => Code::AlreadyExists,
        SnapshotError::Full { .. } => Code::ResourceExhausted,
        SnapshotError::Pool(error) if error.is_full() => Code::ResourceExhausted,
        SnapshotError::Pool(_) => Code::FailedPrecondition,
        // It may be there or not; the next call finds out.
        SnapshotError::Lock(_) | SnapshotError::Report(_) | SnapshotError::Command(_) => Code::Unavailable,
    }
}

impl CreateSnapshotError {
    fn code(&self) -> Code {
        match self {
            Self::MissingField(_) | Self::UnknownParameter(_) | Self::Parameter { .. } | Self::Room(_) => {
                Code::InvalidArgument
            }
            Self::NoVolume(_) => Code::NotFound,
            Self::NotServed(_) => Code::FailedPrecondition,
            Self::Busy(_) => Code::Aborted,
            Self::Misdirected(_) | Self::Interrupted(_) => Code::Unavailable,
            Self::Lvm(error) => code_of(error),
        }
    }
}

impl From<CreateSnapshotError> for Status {
    fn from(error: CreateSnapshotError) -> Self {
        Status::new(error.code(), crate::with_causes(&error))
    }
}

/// Why a snapshot is still there, or may be.
#[derive(Debug, thiserror::Error)]
pub enum RemoveSnapshotError {
    /// The call is for another node.
    #[error(transparent)]
    Misdirected(#[from] Misdirected),
    /// No id is given.
    #[error("snapshot_id is missing")]
    MissingId,
    /// It is another node's.
    #[error("snapshot {id} is on another node; this is {node}")]
    OtherNode {
        /// The snapshot.
        id: String,
        /// This node.
        node: String,
    },
    /// The group is not to be touched.
    #[error("volume group {0} is not served on this node; its snapshots are left alone")]
    NotServed(VgName),
    /// The same snapshot is worked on.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// LVM said no.
    #[error(transparent)]
    Lvm(#[from] DeleteSnapshotError),
    /// The work broke off.
    #[error("removing the snapshot broke off: {0}")]
    Interrupted(String),
}

impl RemoveSnapshotError {
    fn code(&self) -> Code {
        match self {
            Self::MissingId => Code::InvalidArgument,
            Self::NotServed(_) | Self::Lvm(DeleteSnapshotError::NotOurs { .. }) => Code::PermissionDenied,
            Self::Busy(_) => Code::Aborted,
            Self::Lvm(DeleteSnapshotError::InUse { .. } | DeleteSnapshotError::Needed { .. }) => {
                Code::FailedPrecondition
            }
            Self::Lvm(DeleteSnapshotError::Lock(LockError::Busy { .. })) => Code::Aborted,
            // Not known whether it is gone.
            Self::Misdirected(_) | Self::OtherNode { .. } | Self::Lvm(_) | Self::Interrupted(_) => Code::Unavailable,
        }
    }
}

impl From<RemoveSnapshotError> for Status {
    fn from(error: RemoveSnapshotError) -> Self {
        Status::new(error.code(), crate::with_causes(&error))
    }
}

const KNOWN: [&str; 5] = [
    parameters::SNAPSHOT_SIZE,
    parameters::SNAPSHOT_NAME,
    parameters::SNAPSHOT_NAMESPACE,
    parameters::SNAPSHOT_CONTENT_NAME,
    parameters::CLUSTER,
];

/// Checks a request and gives what LVM is to make.
///
/// # Errors
/// When it is not valid.
pub fn parse(request: &csi::CreateSnapshotRequest) -> Result<CreateSnapshot, CreateSnapshotError> {
    if request.name.is_empty() {
        return Err(CreateSnapshotError::MissingField("name"));
    }
    if request.source_volume_id.is_empty() {
        return Err(CreateSnapshotError::MissingField("source_volume_id"));
    }
    let given = &request.parameters;
    if let Some(key) = given.keys().filter(|key| !KNOWN.contains(&key.as_str())).min() {
        return Err(CreateSnapshotError::UnknownParameter(key.chars().take(80).collect()));
    }
    let room = given.get(parameters::SNAPSHOT_SIZE).filter(|text| !text.is_empty());
    let room = room.map_or_else(|| Ok(Room::default()), |text| text.parse())?;
    let asked_by = asked_by(given)?;
    let shown = || CreateSnapshotError::NoVolume(request.source_volume_id.chars().take(200).collect());
    let volume = VolumeId::parse(&request.source_volume_id).ok_or_else(shown)?;
    let uid = uid_of(&request.name);
    let name = LvName::for_snapshot(&uid);
    Ok(CreateSnapshot { vg: volume.vg, lv: volume.lv, claim_uid: volume.claim_uid, name, uid, asked_by, room })
}

/// The VolumeSnapshot, where it is told.
fn asked_by(given: &HashMap<String, String>) -> Result<Option<(Namespace, ClaimName)>, CreateSnapshotError> {
    let wrong = |key| move |source| CreateSnapshotError::Parameter { key, source };
    let namespace = given.get(parameters::SNAPSHOT_NAMESPACE);
    let namespace = namespace.map(|text| Namespace::parse(text)).transpose();
    // A VolumeSnapshot has the same kind of name as a claim.
    let name = given.get(parameters::SNAPSHOT_NAME).map(|text| ClaimName::parse(text)).transpose();
    let namespace = namespace.map_err(wrong(parameters::SNAPSHOT_NAMESPACE))?;
    let name = name.map_err(wrong(parameters::SNAPSHOT_NAME))?;
    Ok(namespace.zip(name))
}

/// A snapshot, as CSI has it.
pub fn to_csi(node: &str, found: &Snapshot) -> csi::Snapshot {
    let id = SnapshotId { node: node.to_owned(), vg: found.vg.clone(), lv: found.name.clone() };
    let source = LvName::for_claim(&found.owner.source.claim_uid);
    csi::Snapshot {
        size_bytes: i64::try_from(found.size).unwrap_or(i64::MAX),
        snapshot_id: id.to_string(),
        source_volume_id: format!("{}/{source}", found.vg),
        creation_time: Some(Timestamp { seconds: found.created, nanos: 0 }),
        ready_to_use: !found.lost,
        ..csi::Snapshot::default()
    }
}

/// The snapshots that are asked for, a page of them.
///
/// # Errors
/// When the token is none that an earlier page gave.
pub fn page(
    node: &str,
    mut all: Vec<Snapshot>,
    request: &csi::ListSnapshotsRequest,
) -> Result<csi::ListSnapshotsResponse, Status> {
    // What a clone is copied from is nobody's to see.
    all.retain(|one| one.name == LvName::for_snapshot(&one.owner.uid));
    all.sort_by(|a, b| (&a.vg, &a.name).cmp(&(&b.vg, &b.name)));
    let mut entries: Vec<csi::Snapshot> = all.iter().map(|one| to_csi(node, one)).collect();
    let is_asked = |asked: &str, has: &str| asked.is_empty() || asked == has;
    entries.retain(|one| {
        is_asked(&request.snapshot_id, &one.snapshot_id) && is_asked(&request.source_volume_id, &one.source_volume_id)
    });
    let begin = match request.starting_token.as_str() {
        "" => 0,
        // CSI: the caller begins anew.
        token => token.parse().ok().filter(|at| *at <= entries.len()).ok_or_else(|| {
            Status::aborted(format!("starting_token {:?} is not one of ours", request.starting_token))
        })?,
    };
    let most = match usize::try_from(request.max_entries) {
        Ok(0) => usize::MAX,
        Ok(most) => most,
        Err(_) => return Err(Status::invalid_argument("max_entries is negative")),
    };
    let end = begin.saturating_add(most).min(entries.len());
    let next_token = if end < entries.len() { end.to_string() } else { String::new() };
    let entry = |snapshot: csi::Snapshot| csi::list_snapshots_response::Entry { snapshot: Some(snapshot) };
    let entries = entries.drain(begin..end).map(entry).collect();
    Ok(csi::ListSnapshotsResponse { entries, next_token })
}

#[cfg(test)]
mod tests {
    use lvm::identity::{DataOwner, SnapshotOwner};

    use super::*;

    const UID: &str = "0f0e7f0a-1111-4222-8333-444455556666";

    fn request(change: impl FnOnce(&mut csi::CreateSnapshotRequest)) -> csi::CreateSnapshotRequest {
        let mut request = csi::CreateSnapshotRequest {
            source_volume_id: format!("vg0/pvc-{UID}"),
            name: format!("snapshot-{UID}"),
            ..Default::default()
        };
        change(&mut request);
        request
    }

    fn set(request: &mut csi::CreateSnapshotRequest, key: &str, value: &str) {
        request.parameters.insert(key.to_owned(), value.to_owned());
    }

    #[test]
    fn ids_of_ours_go_both_ways_and_others_are_none() {
        let id = format!("node-1.example/vg0/snap-{UID}");
        assert_eq!(SnapshotId::parse(&id).unwrap().to_string(), id);
        for other in [
            "",
            "snap",
            "/vg0/snap-x",
            &format!("/vg0/snap-{UID}"),
            &format!("n/vg0/pvc-{UID}"),
            &format!("n/-y/snap-{UID}"),
            &format!("n/vg0/snap-{UID}/x"),
            &format!("n/vg0/clone-{UID}"),
        ] {
            assert_eq!(SnapshotId::parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_request_says_which_volume_and_how_much_room() {
        let asked = parse(&request(|request| {
            set(request, parameters::SNAPSHOT_SIZE, "20%");
            set(request, parameters::SNAPSHOT_NAME, "before-upgrade");
            set(request, parameters::SNAPSHOT_NAMESPACE, "shop");
        }))
        .unwrap();
        assert_eq!(asked.name.as_str(), format!("snap-{UID}"));
        assert_eq!((asked.vg.as_str(), asked.lv.as_str()), ("vg0", format!("pvc-{UID}").as_str()));
        assert_eq!(asked.room, Room::Percent(20));
        assert_eq!(asked.asked_by.unwrap().1.as_str(), "before-upgrade");
        assert_eq!(parse(&request(|_| ())).unwrap().room, Room::default());
    }

    #[test]
    fn what_is_wrong_is_refused_and_named() {
        type Change = fn(&mut csi::CreateSnapshotRequest);
        let cases: [(&str, Code, Change); 7] = [
            ("name is missing", Code::InvalidArgument, |r| r.name.clear()),
            ("source_volume_id is missing", Code::InvalidArgument, |r| r.source_volume_id.clear()),
            ("no volume \"x\"", Code::NotFound, |r| r.source_volume_id = "x".into()),
            ("\"size\" is not known", Code::InvalidArgument, |r| set(r, "size", "1")),
            ("snapshotSize \"0%\"", Code::InvalidArgument, |r| set(r, parameters::SNAPSHOT_SIZE, "0%")),
            ("volumesnapshot/name", Code::InvalidArgument, |r| set(r, parameters::SNAPSHOT_NAME, "a,b")),
            ("volumesnapshot/namespace", Code::InvalidArgument, |r| set(r, parameters::SNAPSHOT_NAMESPACE, "../x")),
        ];
        for (text, code, change) in cases {
            let status = Status::from(parse(&request(change)).unwrap_err());
            assert!(status.message().contains(text), "{status} has no {text:?}");
            assert_eq!(status.code(), code, "{text}");
        }
    }

    fn snapshot(number: u32) -> Snapshot {
        let uid = SnapshotUid::parse(&format!("0f0e7f0a-1111-4222-8333-{number:012x}")).unwrap();
        let source = DataOwner {
            cluster: UID.parse().unwrap(),
            claim_uid: UID.parse().unwrap(),
            namespace: "shop".parse().unwrap(),
            claim: "data".parse().unwrap(),
        };
        Snapshot {
            vg: "vg0".parse().unwrap(),
            name: LvName::for_snapshot(&uid),
            owner: SnapshotOwner { source, uid, namespace: "shop".parse().unwrap(), name: "one".parse().unwrap() },
            of: None,
            size: 1 << 30,
            room: 0,
            used_percent: None,
            created: 1_800_000_000,
            pool: None,
            active: true,
            open: false,
            lost: number == 2,
            block: false,
        }
    }

    #[test]
    fn pages_follow_one_another_and_show_no_clones() {
        let mut clone = snapshot(9);
        clone.name = LvName::parse(&format!("clone-{UID}")).unwrap();
        let all = || vec![snapshot(3), clone.clone(), snapshot(1), snapshot(2)];
        let ask = |token: &str, most| {
            let request =
                csi::ListSnapshotsRequest { max_entries: most, starting_token: token.into(), ..Default::default() };
            page("n1", all(), &request)
        };
        let first = ask("", 2).unwrap();
        let ready = |page: &csi::ListSnapshotsResponse| {
            page.entries.iter().flat_map(|one| &one.snapshot).map(|one| one.ready_to_use).collect::<Vec<_>>()
        };
        assert_eq!((ready(&first), first.next_token.as_str()), (vec![true, false], "2"));
        let rest = ask("2", 2).unwrap();
        assert_eq!((rest.entries.len(), rest.next_token.as_str()), (1, ""));
        assert_eq!(ask("", 0).unwrap().entries.len(), 3);
        assert_eq!(ask("x", 0).unwrap_err().code(), Code::Aborted);
        assert_eq!(ask("4", 0).unwrap_err().code(), Code::Aborted);
        let one =
            csi::ListSnapshotsRequest { snapshot_id: format!("n1/vg0/{}", snapshot(1).name), ..Default::default() };
        assert_eq!(page("n1", all(), &one).unwrap().entries.len(), 1);
        let of_nobody = csi::ListSnapshotsRequest { source_volume_id: "vg0/pvc-x".into(), ..Default::default() };
        assert_eq!(page("n1", all(), &of_nobody).unwrap().entries.len(), 0);
    }
}
