use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::certificates::Certificates;
use crate::certificates::state::tests::secrets_of;
use crate::certificates::state::{LIFETIME, RENEW, old_key};

const START: i64 = 1_800_000_000;
const DAY: i64 = 24 * 3600;
/// Of a certificate; all times below are shares of it.
const LIFE: i64 = 96 * 3600;

fn start() -> Secrets {
    secrets_of(&Certificates::generate_at(Duration::from_secs(LIFE as u64), START).unwrap())
}

fn put(secrets: &mut Secrets, write: Write) {
    secrets.named_mut(write.secret).unwrap().as_mut().unwrap().extend(write.values);
}

/// All steps that there are now. They come to an end.
fn run(secrets: &mut Secrets, now: i64) -> Vec<Step> {
    let mut steps = Vec::new();
    while let Some(step) = plan(secrets, now).step {
        put(secrets, write(step, secrets, now).unwrap());
        steps.push(step);
        assert!(steps.len() < 30, "no end: {steps:?}");
    }
    steps
}

fn set(secrets: &mut Secrets, key: &str, value: &str) {
    secrets.authorities.as_mut().unwrap().insert(key.to_owned(), value.as_bytes().to_vec());
}

/// Whether one who has the Secret of `caller` as it was then, and one who has
/// that of the nodes as it was at another time, accept each other.
fn accept(caller: Side, callers: &Secrets, nodes: &Secrets, now: i64) -> Result<(), String> {
    let one_way = |of: Side, shown: &Secrets, holder: Side, holders: &Secrets| {
        let leaf = shown.leaf(of).ok_or_else(|| format!("{of:?} has no certificate"))?;
        if !leaf.is_valid(now) {
            return Err(format!("the certificate of {of:?} is valid {:?}, and it is {now}", leaf.validity));
        }
        let bundle = BUNDLES.iter().find(|bundle| bundle.holder == holder && bundle.of == of).unwrap();
        let trusted = holders.trusted(bundle);
        let accepted = trusted.iter().any(|seen| x509::is_signed_by(&leaf.der, &seen.der));
        accepted.then_some(()).ok_or_else(|| format!("{holder:?} does not accept {of:?}"))
    };
    one_way(caller, callers, Side::Node, nodes)?;
    one_way(Side::Node, nodes, caller, callers)
}

fn all_accept(secrets: &Secrets, now: i64) {
    for caller in [Side::Controller, Side::Metrics] {
        accept(caller, secrets, secrets, now).unwrap();
    }
}

#[test]
fn new_secrets_are_left_alone_until_a_third_of_the_time_is_left() {
    let mut secrets = start();
    let first = plan(&secrets, START);
    assert_eq!((first.step, first.notices), (None, vec![]));
    // Looked at again once a day, and just when there is something to do.
    assert_eq!(first.wake, START + DAY);
    let due = START + LIFE * 2 / 3;
    assert_eq!(plan(&secrets, due - 1), Plan { step: None, wake: due, notices: vec![] });
    let renewed = Side::ALL.map(Step::Renew);
    assert_eq!(run(&mut secrets, due), renewed);
    assert_eq!(plan(&secrets, due).wake, due + DAY);
    all_accept(&secrets, due);
}

#[test]
fn an_authority_is_trusted_before_it_signs_and_until_it_ends() {
    let mut secrets = start();
    let first = secrets.authority(Side::Node, Slot::Current).unwrap();
    // At half of its time.
    let half = START + 2 * LIFE;
    run(&mut secrets, half - 1);
    let mut expected = Side::ALL.map(Step::Prepare).to_vec();
    expected.extend(Side::ALL.map(Step::Trust));
    expected.extend(Side::ALL.map(|side| Step::Trusted(side, Slot::Next)));
    assert_eq!(run(&mut secrets, half), expected);
    let ripe = half + LIFE / 4;
    assert_eq!(plan(&secrets, ripe - 1).step, None);
    assert_eq!(plan(&secrets, ripe - 1).wake, ripe);
    let mut expected = Side::ALL.map(Step::Promote).to_vec();
    expected.extend(Side::ALL.map(Step::Renew));
    assert_eq!(run(&mut secrets, ripe), expected);
    let trusted = |secrets: &Secrets| secrets.trusted(&BUNDLES[2]).contains(&first);
    // Its key is gone at once.
    assert!(trusted(&secrets) && secrets.old(Side::Node).contains(&first));
    let keys = secrets.authorities.as_ref().unwrap().values();
    assert_eq!(keys.filter(|value| value.starts_with(b"-----BEGIN PRIVATE KEY")).count(), 3);
    let end = first.validity.not_after + CLOCK_SKEW;
    for at in (ripe..end).step_by(LIFE as usize / 12) {
        run(&mut secrets, at);
        all_accept(&secrets, at);
    }
    assert!(trusted(&secrets));
    assert!(run(&mut secrets, end + 1).contains(&Step::Prune(Side::Node)));
    assert!(!trusted(&secrets) && secrets.old(Side::Node).len() < 2);
}

#[test]
fn a_renewal_that_is_asked_for_is_of_everything_and_once() {
    let mut secrets = start();
    let asked = START + LIFE / 10;
    set(&mut secrets, RENEW, &x509::show_time(asked));
    // A clock that is ahead has written it.
    assert_eq!(plan(&secrets, asked - 60), Plan { step: None, wake: asked, notices: vec![] });
    let steps = run(&mut secrets, asked + 1);
    assert!(
        Side::ALL.into_iter().all(|side| steps.contains(&Step::Prepare(side)) && steps.contains(&Step::Renew(side)))
    );
    assert_eq!(run(&mut secrets, asked + LIFE / 5), []);
    let steps = run(&mut secrets, asked + LIFE / 4 + 1);
    assert!(
        Side::ALL.into_iter().all(|side| steps.contains(&Step::Promote(side)) && steps.contains(&Step::Renew(side)))
    );
    assert_eq!(run(&mut secrets, asked + LIFE / 2), []);
}

#[test]
fn without_authorities_nothing_is_done_and_without_a_secret_the_rest_is() {
    let mut secrets = start();
    secrets.authorities = None;
    assert_eq!(plan(&secrets, START + 9 * LIFE), Plan { step: None, wake: START + 9 * LIFE + DAY, notices: vec![] });

    let mut secrets = start();
    secrets.leaves[Side::Node as usize] = None;
    // Whether nodes trust a new authority of the controller cannot be seen: it does not sign.
    let half = START + 2 * LIFE;
    run(&mut secrets, half - LIFE / 2);
    run(&mut secrets, half);
    run(&mut secrets, half + LIFE / 2);
    assert!(secrets.authority(Side::Controller, Slot::Next).is_some());
    assert!(secrets.authority(Side::Node, Slot::Next).is_none());
    assert_eq!(plan(&secrets, half + LIFE / 2).notices, [Notice::Missing(Side::Node)]);
    // An empty one is filled.
    secrets.leaves[Side::Node as usize] = Some(Data::new());
    run(&mut secrets, half + LIFE / 2);
    all_accept(&secrets, half + LIFE / 2);
    assert_eq!(plan(&secrets, half + LIFE / 2).notices, []);
}

#[test]
fn what_is_broken_is_made_anew_and_nobody_is_locked_out() {
    let garbage = b"garbage".to_vec();
    for side in Side::ALL {
        let keys = Slot::Current.keys(side);
        for broken in [&keys.certificate, &keys.key, &keys.signs, &old_key(side), &LIFETIME.to_owned()] {
            let mut secrets = start();
            let before = secrets.clone();
            secrets.authorities.as_mut().unwrap().insert(broken.clone(), garbage.clone());
            let mut now = START + 60;
            run(&mut secrets, now);
            // What was read before goes with what is read now, and so on.
            let caller = if side == Side::Metrics { Side::Metrics } else { Side::Controller };
            for _ in 0..6 {
                accept(caller, &before, &secrets, now).unwrap();
                accept(caller, &secrets, &before, now).unwrap();
                now += LIFE / 24;
                run(&mut secrets, now);
            }
            for _ in 0..12 {
                now += LIFE / 12;
                run(&mut secrets, now);
                all_accept(&secrets, now);
            }
            let notices = plan(&secrets, now).notices;
            let expected: &[Notice] = if broken == LIFETIME { &[Notice::Lifetime] } else { &[] };
            assert_eq!(notices, expected, "{broken}");
        }
        for file in [CERTIFICATE, KEY, "ca.crt", "metrics-ca.crt"] {
            let mut secrets = start();
            let before = secrets.clone();
            secrets.leaves[side as usize].as_mut().unwrap().insert(file.to_owned(), garbage.clone());
            run(&mut secrets, START + 60);
            for caller in [Side::Controller, Side::Metrics] {
                accept(caller, &before, &secrets, START + 60).unwrap();
                accept(caller, &secrets, &before, START + 60).unwrap();
            }
        }
    }
}

/// `lvprov certificates | kubectl apply -f -` that broke off after the first Secret.
#[test]
fn authorities_that_came_alone_are_taken_in_without_a_gap() {
    let before = start();
    let mut secrets = before.clone();
    secrets.authorities =
        secrets_of(&Certificates::generate_at(Duration::from_secs(LIFE as u64), START + 600).unwrap()).authorities;
    let mut now = START + 600;
    let steps = run(&mut secrets, now);
    assert!(!steps.iter().any(|step| matches!(step, Step::Renew(_))), "{steps:?}");
    accept(Side::Controller, &before, &secrets, now).unwrap();
    accept(Side::Controller, &secrets, &before, now).unwrap();
    let lagging = secrets.clone();
    now += LIFE / 4;
    let steps = run(&mut secrets, now);
    assert_eq!(steps, Side::ALL.map(Step::Renew));
    accept(Side::Controller, &lagging, &secrets, now).unwrap();
    accept(Side::Controller, &secrets, &lagging, now).unwrap();
}

#[test]
fn nothing_valid_is_left_and_all_of_it_is_made_at_once() {
    let mut secrets = start();
    let late = START + 10 * LIFE;
    assert!(plan(&secrets, late).notices.contains(&Notice::OfNoUse(Side::Controller)));
    run(&mut secrets, late);
    all_accept(&secrets, late);
    assert_eq!(plan(&secrets, late).notices, []);
}

#[test]
fn certificates_from_a_future_that_a_wrong_clock_saw_are_replaced() {
    let mut secrets = start();
    let (now, wrong) = (START + LIFE / 10, START + 3 * LIFE);
    run(&mut secrets, wrong);
    run(&mut secrets, wrong + LIFE / 4);
    run(&mut secrets, now);
    all_accept(&secrets, now);
    assert_eq!(plan(&secrets, now).notices, []);
}

#[test]
fn a_lifetime_may_be_raised_and_lowered() {
    for (first, second) in [(120, LIFE), (LIFE, 120)] {
        let mut secrets = secrets_of(&Certificates::generate_at(Duration::from_secs(first as u64), START).unwrap());
        set(&mut secrets, LIFETIME, &format!("{second}s"));
        if second < first {
            // What lives for longer is left alone until somebody asks.
            assert_eq!(run(&mut secrets, START + 10), []);
            set(&mut secrets, RENEW, &x509::show_time(START + 10));
        }
        let mut lagging = secrets.clone();
        for now in (START + 10..START + 600).step_by(20) {
            let steps = run(&mut secrets, now);
            if now > START + 100 && second == LIFE {
                assert_eq!(steps, []);
            }
            accept(Side::Controller, &secrets, &lagging, now).unwrap();
            accept(Side::Controller, &lagging, &secrets, now).unwrap();
            lagging = secrets.clone();
        }
        let leaf = secrets.leaf(Side::Node).unwrap();
        let left = leaf.validity.not_after - START - 600;
        assert!((0.max(second - 600)..=second).contains(&left), "{left} s are left");
    }
}

/// What happens between two looks.
#[derive(Debug, Clone)]
enum Happening {
    /// The leader does so many steps, then dies.
    Steps(usize),
    /// It does all of them.
    AllSteps,
    /// One that has lost the lead does the step that it had in mind.
    Late,
    /// Somebody asks for a renewal.
    Asked,
}

fn happenings() -> impl Strategy<Value = Vec<(i64, Happening)>> {
    let happening = prop_oneof![
        4 => Just(Happening::AllSteps),
        3 => (0..4_usize).prop_map(Happening::Steps),
        2 => Just(Happening::Late),
        1 => Just(Happening::Asked),
    ];
    vec((0..=LIFE / 48, happening), 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is interrupted, and whoever has read the Secrets at whatever
    /// time within the overlap: all accept each other.
    #[test]
    fn all_that_lag_by_no_more_than_the_overlap_accept_each_other(happenings in happenings()) {
        let mut secrets = start();
        let mut now = START;
        // Versions of the Secrets, and until when each was the newest.
        let mut history = vec![secrets.clone()];
        let mut until: Vec<i64> = Vec::new();
        // What a leader that was stopped had read, and was going to write.
        let mut in_mind: Option<(Secrets, Write)> = None;
        // A leader gets to the end now and then.
        let mut unfinished = 0;
        let mut told = false;
        for (time, happening) in happenings {
            now += time;
            let mut apply = |secrets: &mut Secrets, write: Write| {
                put(secrets, write);
                until.push(now);
                history.push(secrets.clone());
            };
            let most = match happening {
                Happening::Steps(most) if unfinished < 2 => { unfinished += 1; most }
                Happening::Asked if !told => {
                    told = true;
                    let values = [(RENEW.to_owned(), x509::show_time(now).into_bytes())].into();
                    apply(&mut secrets, Write { secret: AUTHORITIES_SECRET, values });
                    0
                }
                Happening::Late => {
                    if let Some((mut read, write)) = in_mind.take() {
                        // Refused where that Secret has changed meanwhile.
                        let mut present = secrets.clone();
                        if read.named_mut(write.secret) == present.named_mut(write.secret) {
                            apply(&mut secrets, write);
                        }
                    }
                    30
                }
                _ => 30,
            };
            for _ in 0..most {
                let Some(step) = plan(&secrets, now).step else { unfinished = 0; break };
                let write = write(step, &secrets, now).unwrap();
                apply(&mut secrets, write);
            }
            if let Some(step) = plan(&secrets, now).step {
                in_mind = Some((secrets.clone(), write(step, &secrets, now).unwrap()));
            }
            let newest = history.len() - 1;
            let lagging: Vec<usize> = (0..=newest).filter(|at| until.get(*at).is_none_or(|until| *until >= now - LIFE / 4)).collect();
            for at in [lagging[0], lagging[lagging.len() / 2]] {
                for caller in [Side::Controller, Side::Metrics] {
                    for (callers, nodes) in [(at, newest), (newest, at), (at, at)] {
                        let done = accept(caller, &history[callers], &history[nodes], now);
                        prop_assert!(done.is_ok(), "{} at {} of {newest}, {nodes}: {}", done.unwrap_err(), callers, now - START);
                    }
                }
            }
        }
    }
}
