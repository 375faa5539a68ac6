//! What is to be done with the Secrets, and when to look again.
//!
//! One step at a time, each one write to one Secret, and each decided from
//! what all of them hold by then: so it does not matter after which step a
//! controller dies, or which one goes on.
//!
//! The order that keeps everybody accepted: a new authority is first trusted
//! everywhere, and signs only when it has been for as long as a node may lag
//! behind. What it replaces stays trusted until it ends.

use super::issue::{self, AUTHORITY_LIVES, CLOCK_SKEW, IssueError, Lifetime, Pair, leaf_end};
use super::sides::{BUNDLES, Bundle, Side};
use super::state::{Data, Der, Secrets, Seen, Slot, old_key};
use crate::names::AUTHORITIES_SECRET;
use crate::tls::{CERTIFICATE, KEY};
use crate::x509;

/// Looked at again after this time at the latest, in seconds.
const LONGEST_WAIT: i64 = 24 * 3600;

/// One write to one Secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// An authority is not, or no longer, trusted everywhere.
    Distrust(Side, Slot),
    /// Make the next authority.
    Prepare(Side),
    /// Have the holder of this Secret trust whom it should.
    Trust(Side),
    /// An authority is now in all Secrets that it has to be in.
    Trusted(Side, Slot),
    /// The next authority signs from now on.
    Promote(Side),
    /// Make a new certificate.
    Renew(Side),
    /// Forget authorities that have ended.
    Prune(Side),
}

/// What somebody has to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Notice {
    /// The Secret of a side is not there.
    Missing(Side),
    /// The authority of a side cannot sign.
    CannotSign(Side),
    /// The certificate of a side is of no use to anybody.
    OfNoUse(Side),
    /// The lifetime that the Secret says is none.
    Lifetime,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The next step, if there is one now.
    pub step: Option<Step>,
    /// When to look again, if nothing happens before.
    pub wake: i64,
    /// What somebody has to look at.
    pub notices: Vec<Notice>,
}

/// A write: the values of some keys of a Secret. The others stay.
#[derive(Debug, PartialEq, Eq)]
pub struct Write {
    /// The Secret.
    pub secret: &'static str,
    /// The values.
    pub values: Data,
}

/// What is to be done. Without the authorities' Secret: nothing.
pub fn plan(secrets: &Secrets, now: i64) -> Plan {
    if secrets.authorities.is_none() {
        return Plan { step: None, wake: now + LONGEST_WAIT, notices: Vec::new() };
    }
    let sides = Side::ALL.map(|side| View::new(secrets, side, now));
    let step = STEPS.iter().find_map(|step| sides.iter().find_map(step));
    let times = sides.iter().flat_map(View::times).chain(secrets.renew());
    let wake = times.filter(|at| *at > now).min().map_or(now + LONGEST_WAIT, |at| at.min(now + LONGEST_WAIT));
    let mut notices: Vec<Notice> = sides.iter().flat_map(View::notices).collect();
    if secrets.said_lifetime().is_none() {
        notices.push(Notice::Lifetime);
    }
    Plan { step, wake: if step.is_some() { now } else { wake }, notices }
}

/// In this order: see above.
const STEPS: [fn(&View<'_>) -> Option<Step>; 7] = [
    |view| view.distrust(),
    |view| view.needs_next().then_some(Step::Prepare(view.side)),
    |view| view.trusts_wrongly().then_some(Step::Trust(view.side)),
    |view| view.trusted(),
    |view| view.may_promote().then_some(Step::Promote(view.side)),
    |view| view.may_renew().then_some(Step::Renew(view.side)),
    |view| view.holds_what_is_over().then_some(Step::Prune(view.side)),
];

/// One side, as the Secrets have it.
struct View<'a> {
    secrets: &'a Secrets,
    side: Side,
    now: i64,
    lifetime: Lifetime,
    current: Option<(Seen, Pair)>,
    next: Option<(Seen, Pair)>,
    leaf: Option<Seen>,
    /// Whether the current authority has signed it.
    leaf_is_current: bool,
    /// Whether nobody would accept it.
    leaf_is_of_no_use: bool,
}

impl<'a> View<'a> {
    fn new(secrets: &'a Secrets, side: Side, now: i64) -> Self {
        let leaf = secrets.leaf(side);
        let signed_by =
            |authority: &Seen| leaf.as_ref().is_some_and(|leaf| x509::is_signed_by(&leaf.der, &authority.der));
        let current = secrets.signer(side, Slot::Current, now);
        let leaf_is_current = current.as_ref().is_some_and(|(seen, _)| signed_by(seen));
        // Some authority that all have.
        let accepted = || {
            BUNDLES
                .iter()
                .filter(|bundle| bundle.of == side && secrets.of(bundle.holder).is_some())
                .all(|bundle| secrets.trusted(bundle).iter().any(signed_by))
        };
        let leaf_is_of_no_use = !leaf.as_ref().is_some_and(|leaf| leaf.is_valid(now)) || !accepted();
        Self {
            secrets,
            side,
            now,
            lifetime: secrets.lifetime(),
            next: secrets.signer(side, Slot::Next, now),
            current,
            leaf,
            leaf_is_current,
            leaf_is_of_no_use,
        }
    }

    fn authority(&self, slot: Slot) -> Option<&(Seen, Pair)> {
        match slot {
            Slot::Current => self.current.as_ref(),
            Slot::Next => self.next.as_ref(),
        }
    }

    /// For how long an authority is trusted before it signs. Where the lifetime
    /// was raised, the one before it would not live that long.
    fn overlap(&self, slot: Slot) -> i64 {
        let before = self.current.as_ref().filter(|_| slot == Slot::Next);
        let share = before.map_or(i64::MAX, |(seen, _)| seen.validity.length() / AUTHORITY_LIVES / 4);
        self.lifetime.overlap().min(share)
    }

    /// From when on an authority may sign. None: not all trust it yet, as far
    /// as is known. A time too far in the future was written by a clock that
    /// was wrong, or when certificates lived longer.
    fn signs_from(&self, slot: Slot) -> Option<i64> {
        let latest = self.now + self.overlap(slot) + CLOCK_SKEW;
        self.secrets.signs_from(self.side, slot).filter(|from| *from <= latest)
    }

    fn is_ripe(&self, slot: Slot) -> bool {
        self.signs_from(slot).is_some_and(|from| from <= self.now)
    }

    fn distrust(&self) -> Option<Step> {
        let wrong = |slot: &Slot| {
            let Some((seen, _)) = self.authority(*slot) else { return false };
            let said = self.secrets.signs_from(self.side, *slot).is_some();
            said && (self.signs_from(*slot).is_none() || !self.secrets.is_trusted(self.side, seen, true))
        };
        [Slot::Current, Slot::Next].into_iter().find(wrong).map(|slot| Step::Distrust(self.side, slot))
    }

    fn trusted(&self) -> Option<Step> {
        let now_is = |slot: &Slot| {
            let seen = self.authority(*slot);
            seen.is_some_and(|(seen, _)| self.secrets.is_trusted(self.side, seen, false))
                && self.signs_from(*slot).is_none()
        };
        [Slot::Current, Slot::Next].into_iter().find(now_is).map(|slot| Step::Trusted(self.side, slot))
    }

    /// Whether it was made before everything was to be renewed.
    fn is_to_go(&self, seen: &Seen) -> bool {
        self.secrets.renew().is_some_and(|before| before <= self.now && seen.made(self.lifetime) < before)
    }

    fn needs_next(&self) -> bool {
        self.next.is_none()
            && self.current.as_ref().is_none_or(|(seen, _)| {
                self.is_to_go(seen) || self.now >= seen.validity.not_after - self.lifetime.succeeded_at()
            })
    }

    fn may_promote(&self) -> bool {
        self.next.is_some() && (self.is_ripe(Slot::Next) || (self.current.is_none() && self.leaf_is_of_no_use))
    }

    fn may_renew(&self) -> bool {
        let (Some((_, pair)), Some(_)) = (&self.current, self.secrets.of(self.side)) else { return false };
        let Some(leaf) = &self.leaf else { return true };
        let gain = leaf_end(&pair.certificate, self.lifetime, self.now) - leaf.validity.not_after;
        let ends_soon = self.now >= leaf.validity.not_after - self.lifetime.renewed_at();
        if self.leaf_is_current && !self.leaf_is_of_no_use {
            return self.is_to_go(leaf) || (ends_soon && gain > leaf.validity.length() / 12);
        }
        self.leaf_is_of_no_use || self.is_ripe(Slot::Current)
    }

    fn trusts_wrongly(&self) -> bool {
        let held = |bundle: &&Bundle| bundle.holder == self.side && self.secrets.of(self.side).is_some();
        BUNDLES.iter().filter(held).any(|bundle| whom_to_trust(self.secrets, bundle, self.now).is_some())
    }

    fn holds_what_is_over(&self) -> bool {
        self.secrets.old(self.side).iter().any(|seen| seen.is_over(self.now))
    }

    /// When something changes by itself.
    fn times(&self) -> Vec<i64> {
        let end = |seen: &Seen| seen.validity.not_after;
        let mut times: Vec<i64> = self.secrets.old(self.side).iter().map(|seen| end(seen) + CLOCK_SKEW + 1).collect();
        times.extend(self.leaf.iter().flat_map(|leaf| [end(leaf) - self.lifetime.renewed_at(), end(leaf) + 1]));
        times.extend(self.current.iter().map(|(seen, _)| end(seen) - self.lifetime.succeeded_at()));
        times.extend([Slot::Current, Slot::Next].into_iter().filter_map(|slot| self.signs_from(slot)));
        times
    }

    fn notices(&self) -> Vec<Notice> {
        if self.secrets.of(self.side).is_none() {
            return vec![Notice::Missing(self.side)];
        }
        let mut notices = Vec::new();
        if self.current.is_none() {
            notices.push(Notice::CannotSign(self.side));
        }
        if self.leaf_is_of_no_use {
            notices.push(Notice::OfNoUse(self.side));
        }
        notices
    }
}

/// Whom a holder is to trust: all authorities of that side that have not
/// ended, also those that are not in the authorities' Secret, since somebody
/// may have their certificates. None: that is what it holds.
fn whom_to_trust(secrets: &Secrets, bundle: &Bundle, now: i64) -> Option<Vec<Der>> {
    let held = secrets.trusted(bundle);
    let own = secrets.old(bundle.of).into_iter();
    let own = own.chain([Slot::Current, Slot::Next].into_iter().filter_map(|slot| secrets.authority(bundle.of, slot)));
    let mut wanted: Vec<Der> = Vec::new();
    for seen in own.chain(held.iter().cloned()).filter(|seen| !seen.is_over(now)) {
        if !wanted.contains(&seen.der) {
            wanted.push(seen.der);
        }
    }
    let same = held.len() == wanted.len() && held.iter().all(|seen| wanted.contains(&seen.der));
    // Who trusts nobody cannot even be started: rather those that have ended.
    (!wanted.is_empty() && (!same || secrets.is_damaged(bundle))).then_some(wanted)
}

/// What a step writes.
///
/// # Errors
/// When a key or certificate cannot be made.
pub fn write(step: Step, secrets: &Secrets, now: i64) -> Result<Write, IssueError> {
    let lifetime = secrets.lifetime();
    let in_authorities =
        |values: Vec<(String, Vec<u8>)>| Write { secret: AUTHORITIES_SECRET, values: values.into_iter().collect() };
    let old = |side: Side, more: Option<Der>| {
        let all = secrets.old(side).into_iter().filter(|seen| !seen.is_over(now)).map(|seen| seen.der).chain(more);
        (old_key(side), x509::to_pem(all).into_bytes())
    };
    Ok(match step {
        Step::Distrust(side, slot) => in_authorities(vec![(slot.keys(side).signs, Vec::new())]),
        Step::Trusted(side, slot) => {
            let from = now + View::new(secrets, side, now).overlap(slot);
            in_authorities(vec![(slot.keys(side).signs, x509::show_time(from).into_bytes())])
        }
        Step::Prepare(side) => {
            let made = issue::authority(side, lifetime, now)?;
            let keys = Slot::Next.keys(side);
            in_authorities(vec![
                (keys.certificate, made.certificate.into_bytes()),
                (keys.key, made.key.into_bytes()),
                (keys.signs, Vec::new()),
            ])
        }
        Step::Promote(side) => {
            let (from, to) = (Slot::Next.keys(side), Slot::Current.keys(side));
            let kept = |key: &str| secrets.value(key).to_vec();
            let before = secrets.authority(side, Slot::Current).filter(|seen| !seen.is_over(now));
            in_authorities(vec![
                (to.certificate, kept(&from.certificate)),
                (to.key, kept(&from.key)),
                (to.signs, kept(&from.signs)),
                (from.certificate, Vec::new()),
                (from.key, Vec::new()),
                (from.signs, Vec::new()),
                old(side, before.map(|seen| seen.der)),
            ])
        }
        Step::Prune(side) => in_authorities(vec![old(side, None)]),
        Step::Trust(side) => {
            let bundles = BUNDLES.iter().filter(|bundle| bundle.holder == side);
            let values = bundles.filter_map(|bundle| {
                Some((bundle.file.to_owned(), x509::to_pem(whom_to_trust(secrets, bundle, now)?).into_bytes()))
            });
            Write { secret: side.secret(), values: values.collect() }
        }
        Step::Renew(side) => {
            let values = match secrets.signer(side, Slot::Current, now) {
                Some((_, pair)) => {
                    let made = issue::leaf(side, &pair, lifetime, now)?;
                    Data::from([
                        (CERTIFICATE.to_owned(), made.certificate.into_bytes()),
                        (KEY.to_owned(), made.key.into_bytes()),
                    ])
                }
                // Not planned so.
                None => Data::new(),
            };
            Write { secret: side.secret(), values }
        }
    })
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
