//! Trying a property on random input for as long as is asked for.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{Config, TestCaseResult, TestRunner};
use std::cell::Cell;
use std::fmt::Debug;
use std::time::Instant;

/// Seconds for each target where LVPROV_FUZZ_SECONDS does not say.
const SECONDS: f64 = 1.0;

/// Tries `check` on values of `strategy` until the time is over, and says how
/// often. A value that fails is made as small as can be, and shown.
pub fn fuzz<S>(target: &str, strategy: S, check: impl Fn(S::Value) -> TestCaseResult)
where
    S: Strategy,
    S::Value: Debug,
{
    let seconds = std::env::var("LVPROV_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(SECONDS);
    let config = Config { cases: 32, failure_persistence: None, max_shrink_iters: 10_000, ..Config::default() };
    let executions = Cell::new(0u64);
    let begun = Instant::now();
    while begun.elapsed().as_secs_f64() < seconds {
        // A new one each time, with a new seed: one runs its cases once.
        let tried = TestRunner::new(config.clone()).run(&strategy, |value| {
            executions.set(executions.get() + 1);
            check(value)
        });
        if let Err(error) = tried {
            panic!("{target}: {error}");
        }
    }
    println!("fuzz {target}: {} executions in {:.1} s", executions.get(), begun.elapsed().as_secs_f64());
}

/// One of the samples, with some bytes changed, taken out or put in.
pub fn mutated(samples: &[&[u8]]) -> impl Strategy<Value = Vec<u8>> + use<> {
    let samples: Vec<Vec<u8>> = samples.iter().map(|sample| sample.to_vec()).collect();
    // Bytes with a meaning find more than others.
    let byte = prop_oneof![any::<u8>(), select(b"\"{}[]:,\\/ \n-.0123=".to_vec())];
    (select(samples), vec((any::<Index>(), byte, 0..5u8), 0..8)).prop_map(|(mut bytes, edits)| {
        for (index, byte, edit) in edits {
            if bytes.is_empty() {
                break;
            }
            let at = index.index(bytes.len());
            match edit {
                0 | 1 => bytes[at] = byte,
                2 => drop(bytes.remove(at)),
                3 => bytes.insert(at, byte),
                _ => bytes.truncate(at + 1),
            }
        }
        bytes
    })
}
