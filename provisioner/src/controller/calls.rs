//! Calls whose outcome is not known, and what becomes of what they may have
//! made.
//!
//! A CreateVolume that was cut off may have made its volume. While the claim
//! is there it is asked for again. Where the claim goes first, or gets its
//! volume elsewhere, nothing names the one that may be there: it is removed.
//! The node removes it only if it is that claim's and closed. This is kept in
//! memory only; what an earlier controller has left, [`super::leftovers`] finds.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt};
use lvprov_proto::lvprov::DataVolume;
use tokio::sync::Notify;
use tracing::{info, warn};

use super::context::Context;
use super::error::{Doing, Error};
use super::leftovers;
use super::volume::{Place, delete_volume, place_of};
use crate::with_causes;

/// Between looks at what is left, while there is anything.
const LOOK_EVERY: Duration = Duration::from_secs(15);

/// A volume that a call was to make: whose, and where.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Wanted {
    /// The claim's UID.
    pub claim_uid: String,
    /// The claim's namespace.
    pub namespace: String,
    /// The claim's name.
    pub claim: String,
    /// Where the volume is, if it is.
    pub place: Place,
}

/// The calls that are under way, or whose outcome is not known.
#[derive(Debug, Default)]
pub struct Calls {
    open: Mutex<HashMap<Wanted, Outcome>>,
    left: Notify,
}

#[derive(Debug, Default)]
struct Outcome {
    /// Somebody is at it.
    busy: bool,
    /// The volume as its node listed it. None: it was asked for here, so nobody
    /// else can have been given it.
    listed: Option<DataVolume>,
}

/// A call under way. Dropped without [`Call::settled`] its outcome counts as
/// not known.
#[derive(Debug)]
pub struct Call<'a> {
    calls: &'a Calls,
    wanted: Wanted,
    listed: Option<DataVolume>,
    settled: bool,
}

impl Calls {
    /// Begins a call. None: another, for the same volume, is under way.
    pub fn begin(&self, wanted: Wanted) -> Option<Call<'_>> {
        let mut open = self.open();
        let outcome = open.entry(wanted.clone()).or_default();
        if outcome.busy {
            return None;
        }
        *outcome = Outcome { busy: true, listed: None };
        Some(Call { calls: self, wanted, listed: None, settled: false })
    }

    /// As [`Calls::begin`], only to see what became of a volume that may be left.
    fn take(&self, wanted: Wanted) -> Option<Call<'_>> {
        let mut open = self.open();
        let outcome = open.get_mut(&wanted).filter(|outcome| !outcome.busy)?;
        outcome.busy = true;
        Some(Call { calls: self, wanted, listed: outcome.listed.take(), settled: false })
    }

    /// A node has listed a volume that no PV names, as far as is known.
    pub fn found(&self, wanted: Wanted, listed: DataVolume) {
        self.open().entry(wanted).or_insert(Outcome { busy: false, listed: Some(listed) });
        self.left.notify_one();
    }

    /// The volumes that may be there.
    pub fn unknown(&self) -> Vec<Wanted> {
        self.open().iter().filter(|(_, outcome)| !outcome.busy).map(|(wanted, _)| wanted.clone()).collect()
    }

    /// The claim has its PV, with the volume at `place` (None: not known where).
    /// What is there holds data, or will: it is nothing that was left.
    pub fn bound(&self, claim_uid: &str, place: Option<&Place>) {
        let may_be_it = |wanted: &Wanted| wanted.claim_uid == claim_uid && place.is_none_or(|it| *it == wanted.place);
        self.open().retain(|wanted, outcome| outcome.busy || !may_be_it(wanted));
    }

    /// Something that outcomes depend on has changed: worth a look.
    pub fn look(&self) {
        self.left.notify_one();
    }

    fn open(&self) -> MutexGuard<'_, HashMap<Wanted, Outcome>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Call<'_> {
    /// The outcome is known: either a PV names the volume, or it is not there.
    pub fn settled(mut self) {
        self.settled = true;
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        let mut open = self.calls.open();
        if self.settled {
            open.remove(&self.wanted);
        } else {
            open.insert(self.wanted.clone(), Outcome { busy: false, listed: self.listed.take() });
            self.calls.left.notify_one();
        }
    }
}

/// Looks after what is left, for ever.
pub async fn run(ctx: Arc<Context>) {
    loop {
        if ctx.calls.unknown().is_empty() {
            ctx.calls.left.notified().await;
        } else {
            // Either way there is something to look at.
            let _ = tokio::time::timeout(LOOK_EVERY, ctx.calls.left.notified()).await;
        }
        clear(&ctx).await;
    }
}

/// One look at each volume that may be left.
pub async fn clear(ctx: &Context) {
    for wanted in ctx.calls.unknown() {
        if !worth_asking(&wanted, ctx) {
            continue;
        }
        let Some(call) = ctx.calls.take(wanted.clone()) else {
            continue;
        };
        match settle(&wanted, call.listed.as_ref(), ctx).await {
            Ok(true) => call.settled(),
            Ok(false) => {}
            Err(error) => {
                let volume = wanted.place.handle();
                warn!(volume, error = with_causes(&error), "not known whether the volume is needed");
            }
        }
    }
}

/// By what the watches have brought: whether it could be time.
fn worth_asking(wanted: &Wanted, ctx: &Context) -> bool {
    let claim = ctx.claims.get(&ObjectRef::new(&wanted.claim).within(&wanted.namespace));
    !claim.is_some_and(|claim| waits_for(&claim, wanted))
        || ctx.volumes.contains(&ObjectRef::new(&wanted.place.logical_volume))
}

/// The claim may still ask for the volume.
fn waits_for(claim: &PersistentVolumeClaim, wanted: &Wanted) -> bool {
    claim.metadata.uid.as_ref() == Some(&wanted.claim_uid) && claim.metadata.deletion_timestamp.is_none()
}

/// Removes the volume if nothing needs it. Whether its outcome is known now.
async fn settle(wanted: &Wanted, listed: Option<&DataVolume>, ctx: &Context) -> Result<bool, Error> {
    let Wanted { namespace, claim, place, .. } = wanted;
    // Only the API server itself is believed. The claim first: once it is
    // gone, nobody makes a PV for it any more.
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(ctx.client.clone(), namespace);
    let now = claims.get_opt(claim).await.doing(|| format!("read claim {namespace}/{claim}"))?;
    let waits = now.is_some_and(|now| waits_for(&now, wanted));
    let name = &place.logical_volume;
    let volumes: Api<PersistentVolume> = Api::all(ctx.client.clone());
    let volume = volumes.get_opt(name).await.doing(|| format!("read PersistentVolume {name}"))?;
    match volume.as_ref().map(place_of) {
        None if waits => return Ok(false),
        None => {}
        Some(Some(elsewhere)) if elsewhere != *place => {}
        // It is this PV's volume, or may be: not ours to remove.
        Some(_) => return Ok(true),
    }
    if !ctx.node_objects.contains(&ObjectRef::new(&place.topology)) {
        // With its volumes, as far as anybody can know.
        return Ok(true);
    }
    if let Some(listed) = listed {
        return Ok(match leftovers::remove(wanted, listed, ctx).await {
            Ok(()) => true,
            Err(why) => {
                warn!(volume = place.handle(), node = place.topology, why, "left for now");
                false
            }
        });
    }
    match delete_volume(place, ctx).await {
        Ok(()) => {
            info!(
                volume = place.handle(),
                node = place.topology,
                claim,
                namespace,
                "removed what a call may have left that no PersistentVolume names"
            );
            Ok(true)
        }
        Err(undeleted) => {
            warn!(volume = place.handle(), node = place.topology, why = undeleted.note, "left for now");
            Ok(false)
        }
    }
}

/// What a claim asks for on a node.
pub fn wanted(claim: &PersistentVolumeClaim, place: Place) -> Wanted {
    Wanted {
        claim_uid: claim.uid().unwrap_or_default(),
        namespace: claim.namespace().unwrap_or_default(),
        claim: claim.name_any(),
        place,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted() -> Wanted {
        let place = Place { topology: "n1".into(), volume_group: "vg0".into(), logical_volume: "pvc-u1".into() };
        Wanted { claim_uid: "u1".into(), namespace: "shop".into(), claim: "data".into(), place }
    }

    #[test]
    fn only_one_at_a_time_and_what_is_not_settled_stays() {
        let calls = Calls::default();
        let call = calls.begin(wanted()).unwrap();
        assert!(calls.begin(wanted()).is_none());
        assert!(calls.unknown().is_empty());
        drop(call);
        assert_eq!(calls.unknown(), [wanted()]);
        calls.begin(wanted()).unwrap().settled();
        assert!(calls.unknown().is_empty());
    }

    #[test]
    fn what_a_claim_is_bound_to_is_not_left_over_and_one_elsewhere_is() {
        let calls = Calls::default();
        let left = |bound_at: Option<&Place>| {
            drop(calls.begin(wanted()).unwrap());
            calls.bound("another", None);
            calls.bound("u1", bound_at);
            !calls.unknown().is_empty()
        };
        assert!(!left(Some(&wanted().place)));
        assert!(!left(None));
        assert!(left(Some(&Place { topology: "n2".into(), ..wanted().place })));
    }
}
