//! Events on claims, PVs, snapshots, pods, nodes and Secrets: what users are told, and that it is told once.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource};
use tracing::{info, warn};

use crate::names::DRIVER;

/// The same Event again within this time is not sent. `kube` keeps the series
/// of an Event for six minutes, so after this it counts up instead of
/// appearing a second time.
pub const QUIET: Duration = Duration::from_secs(5 * 60);

/// A text that keeps changing is sent again only after this time.
const SELDOM: Duration = Duration::from_secs(60);

/// The API server takes notes of less than 1 KiB.
const LONGEST_NOTE: usize = 1000;

/// Why an Event is made; what `kubectl describe` shows as its reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The claim, or its class, asks for what is not served.
    ClaimRefused,
    /// No node has the room, or the volume group, that a claim needs.
    NoNodeHasRoom,
    /// The node chosen for the claim's pod no longer exists.
    NodeGone,
    /// The node of a volume has left the cluster.
    NodeLost,
    /// Nothing is done for lost nodes, since they are too many.
    NodeLossStopped,
    /// The claim is deleted, to be made anew on another node.
    ClaimGivenUp,
    /// A volume stays on a node that is lost; its PV goes.
    VolumeLeftBehind,
    /// The class does not allow volumes on the chosen node.
    NodeNotAllowed,
    /// The node service of the chosen node does not answer.
    NodeUnreachable,
    /// The chosen node does not have the class's volume group.
    NoVolumeGroup,
    /// The chosen node has less free than the claim needs.
    NotEnoughSpace,
    /// The volume could not be made; it is tried again.
    ProvisioningFailed,
    /// The volume is there.
    ProvisioningSucceeded,
    /// The claim was grown past what its node has free.
    VolumeGrowthImpossible,
    /// The volume could not be grown; it is tried again.
    VolumeGrowthFailed,
    /// The volume has grown; its file system comes next.
    VolumeGrown,
    /// A growth that could not be had was taken back.
    VolumeGrowthWithdrawn,
    /// A released volume is still in use on its node.
    VolumeInUse,
    /// A released volume could not be removed; it is tried again.
    VolumeDeleteFailed,
    /// A released volume is kept although its policy is Delete.
    VolumeKept,
    /// A pod's volume cannot be unmounted; kubelet goes on trying.
    FailedUnmount,
    /// The claim is for a volume populator.
    LeftToPopulator,
    /// What a claim's volume is to hold is not there, or not ready yet.
    DataNotReady,
    /// A snapshot could not be taken, or looked at; it is tried again.
    SnapshotFailed,
    /// A snapshot cannot be used any more.
    SnapshotLost,
    /// A snapshot that is to go is still needed on its node.
    SnapshotInUse,
    /// A snapshot could not be removed; it is tried again.
    SnapshotDeleteFailed,
    /// A certificate, or an authority, has been made anew.
    CertificateRenewed,
    /// A certificate is not renewed, or a node does not use the new one.
    CertificateNotRenewed,
}

impl Reason {
    fn as_str(self) -> &'static str {
        match self {
            Self::ClaimRefused => "ClaimRefused",
            Self::NoNodeHasRoom => "NoNodeHasRoom",
            Self::NodeGone => "NodeGone",
            Self::NodeLost => "NodeLost",
            Self::NodeLossStopped => "NodeLossStopped",
            Self::ClaimGivenUp => "ClaimGivenUp",
            Self::VolumeLeftBehind => "VolumeLeftBehind",
            Self::NodeNotAllowed => "NodeNotAllowed",
            Self::NodeUnreachable => "NodeUnreachable",
            Self::NoVolumeGroup => "NoVolumeGroup",
            Self::NotEnoughSpace => "NotEnoughSpace",
            Self::ProvisioningFailed => "ProvisioningFailed",
            Self::ProvisioningSucceeded => "ProvisioningSucceeded",
            Self::VolumeGrowthImpossible => "VolumeGrowthImpossible",
            Self::VolumeGrowthFailed => "VolumeGrowthFailed",
            Self::VolumeGrown => "VolumeGrown",
            Self::VolumeGrowthWithdrawn => "VolumeGrowthWithdrawn",
            Self::VolumeInUse => "VolumeInUse",
            Self::VolumeDeleteFailed => "VolumeDeleteFailed",
            Self::VolumeKept => "VolumeKept",
            Self::FailedUnmount => "FailedUnmount",
            Self::LeftToPopulator => "LeftToPopulator",
            Self::DataNotReady => "DataNotReady",
            Self::SnapshotFailed => "SnapshotFailed",
            Self::SnapshotLost => "SnapshotLost",
            Self::SnapshotInUse => "SnapshotInUse",
            Self::SnapshotDeleteFailed => "SnapshotDeleteFailed",
            Self::CertificateRenewed => "CertificateRenewed",
            Self::CertificateNotRenewed => "CertificateNotRenewed",
        }
    }

    fn type_(self) -> EventType {
        match self {
            Self::ProvisioningSucceeded
            | Self::VolumeGrown
            | Self::VolumeGrowthWithdrawn
            | Self::LeftToPopulator
            | Self::CertificateRenewed => EventType::Normal,
            _ => EventType::Warning,
        }
    }

    fn action(self) -> &'static str {
        match self {
            Self::ClaimRefused | Self::LeftToPopulator => "Validate",
            Self::NoNodeHasRoom => "Place",
            Self::NodeGone
            | Self::NodeNotAllowed
            | Self::NodeUnreachable
            | Self::NoVolumeGroup
            | Self::NotEnoughSpace => "HandBack",
            Self::ProvisioningFailed | Self::ProvisioningSucceeded | Self::DataNotReady => "Provision",
            Self::SnapshotFailed | Self::SnapshotLost => "Snapshot",
            Self::VolumeGrowthImpossible
            | Self::VolumeGrowthFailed
            | Self::VolumeGrown
            | Self::VolumeGrowthWithdrawn => "Grow",
            Self::NodeLost | Self::NodeLossStopped | Self::ClaimGivenUp | Self::VolumeLeftBehind => "GiveUp",
            Self::VolumeInUse
            | Self::VolumeDeleteFailed
            | Self::VolumeKept
            | Self::SnapshotInUse
            | Self::SnapshotDeleteFailed => "Delete",
            Self::FailedUnmount => "Unmount",
            Self::CertificateRenewed | Self::CertificateNotRenewed => "Renew",
        }
    }
}

/// Sends Events, each text once in a while.
pub struct Events {
    client: Client,
    reporter: Reporter,
    told: Mutex<HashMap<(String, Reason), Told>>,
}

struct Told {
    note: String,
    at: Instant,
    // kube's recorder takes Events of one reason for a series whatever their
    // text, and keeps the first text. A new text gets a new recorder.
    recorder: Recorder,
}

impl Events {
    /// `instance` tells apart the controllers of one installation.
    pub fn new(client: Client, instance: String) -> Self {
        Self {
            client,
            reporter: Reporter { controller: DRIVER.to_owned(), instance: Some(instance) },
            told: Mutex::default(),
        }
    }

    /// Says `note` on `object`, unless the same was said a moment ago.
    ///
    /// An Event that cannot be sent is logged: work goes on without it.
    pub async fn tell<K>(&self, object: &K, reason: Reason, note: String)
    where
        K: Resource<DynamicType = ()>,
    {
        let reference = object.object_ref(&());
        self.tell_about(&reference, reason, note).await;
    }

    /// As [`Events::tell`], for texts that keep changing: where an earlier one
    /// is fresh, this one is not sent, and the time is given after which it is
    /// worth telling.
    pub async fn tell_seldom<K>(&self, object: &K, reason: Reason, note: String) -> Option<Duration>
    where
        K: Resource<DynamicType = ()>,
    {
        let reference = object.object_ref(&());
        let note = shortened(note);
        if let Some(left) = self.too_fresh(&reference, reason, &note) {
            return Some(left);
        }
        self.tell_about(&reference, reason, note).await;
        None
    }

    /// How long an Event with another text will be fresh.
    fn too_fresh(&self, reference: &ObjectReference, reason: Reason, note: &str) -> Option<Duration> {
        let told = self.told();
        let earlier = told.get(&(reference.uid.clone().unwrap_or_default(), reason))?;
        (earlier.note != note).then(|| SELDOM.checked_sub(earlier.at.elapsed()))?
    }

    fn told(&self) -> MutexGuard<'_, HashMap<(String, Reason), Told>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Events::tell`], on an object that is only known by a reference.
    pub async fn tell_about(&self, reference: &ObjectReference, reason: Reason, note: String) {
        let note = shortened(note);
        let Some(recorder) = self.recorder_for(reference, reason, &note) else {
            return;
        };
        let object = reference.name.as_deref().unwrap_or_default();
        let namespace = reference.namespace.as_deref().unwrap_or_default();
        info!(object, namespace, reason = reason.as_str(), note, "event");
        let event = Event {
            type_: reason.type_(),
            reason: reason.as_str().to_owned(),
            note: Some(note),
            action: reason.action().to_owned(),
            secondary: None,
        };
        if let Err(error) = recorder.publish(&event, reference).await {
            warn!(object, namespace, reason = reason.as_str(), %error, "cannot send the event");
        }
    }

    /// The recorder to send with, or None where the text is still fresh.
    fn recorder_for(&self, reference: &ObjectReference, reason: Reason, note: &str) -> Option<Recorder> {
        let uid = reference.uid.clone().unwrap_or_default();
        let now = Instant::now();
        let mut told = self.told();
        told.retain(|_, earlier| now.duration_since(earlier.at) < 2 * QUIET);
        let key = (uid, reason);
        let recorder = match told.get(&key) {
            Some(earlier) if earlier.note == note => {
                if now.duration_since(earlier.at) < QUIET {
                    return None;
                }
                earlier.recorder.clone()
            }
            _ => Recorder::new(self.client.clone(), self.reporter.clone()),
        };
        told.insert(key, Told { note: note.to_owned(), at: now, recorder: recorder.clone() });
        Some(recorder)
    }
}

fn shortened(mut note: String) -> String {
    if note.len() > LONGEST_NOTE {
        let end = (0..=LONGEST_NOTE - 4).rev().find(|at| note.is_char_boundary(*at)).unwrap_or(0);
        note.truncate(end);
        note.push_str(" …");
    }
    note
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::client::Body;

    fn events() -> Events {
        let (service, _handle) = tower_test::mock::pair::<http::Request<Body>, http::Response<Body>>();
        Events::new(Client::new(service, "default"), "test".into())
    }

    fn on(uid: &str) -> ObjectReference {
        ObjectReference { uid: Some(uid.into()), ..ObjectReference::default() }
    }

    #[tokio::test]
    async fn the_same_text_is_told_once_and_a_new_one_at_once() {
        let events = events();
        let tell = |uid: &str, reason, note| events.recorder_for(&on(uid), reason, note).is_some();
        assert!(tell("a", Reason::NotEnoughSpace, "1 GiB missing"));
        assert!(!tell("a", Reason::NotEnoughSpace, "1 GiB missing"));
        assert!(tell("a", Reason::NotEnoughSpace, "2 GiB missing"));
        assert!(tell("a", Reason::NodeGone, "1 GiB missing"));
        assert!(tell("b", Reason::NotEnoughSpace, "1 GiB missing"));
    }

    #[tokio::test]
    async fn a_text_that_keeps_changing_is_held_back() {
        let events = events();
        let fresh = |note| events.too_fresh(&on("a"), Reason::NoNodeHasRoom, note).is_some();
        assert!(!fresh("1 GiB free"));
        events.recorder_for(&on("a"), Reason::NoNodeHasRoom, "1 GiB free");
        assert!(fresh("2 GiB free"));
        // The very same text is not held back for later: it was told.
        assert!(!fresh("1 GiB free"));
    }

    #[test]
    fn a_note_fits_an_event_and_is_cut_between_characters() {
        assert_eq!(shortened("short".into()), "short");
        let cut = shortened("ä".repeat(800));
        assert!(cut.len() < 1024 && cut.ends_with(" …"), "{}", cut.len());
    }
}
