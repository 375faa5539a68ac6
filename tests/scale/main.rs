//! A small version of `cargo xtask bench scale`: what is asked of the API
//! server must not grow with what there is.

use anyhow::{Result, ensure};
use lvprov_tests::Test;
use xtask::commands::bench::scale::{ScaleOptions, measure};
use xtask::setup::binaries::Profile;

const TESTS: [Test<()>; 1] = [("scale::few_requests_and_only_pages_whatever_there_is", few_requests)];

fn main() {
    lvprov_tests::run(&TESTS, &[], || Ok(()))
}

fn few_requests((): &()) -> Result<()> {
    // Enough of them to share capacities.
    let options = ScaleOptions { nodes: 50, volumes: 600, new_claims: 20, new_pods: 3, shared_from: 50 };
    let measured = measure(options, Profile::Debug)?;
    let shown = format!("{:#}", measured.json(options));
    ensure!(measured.unpaged.is_empty(), "{shown}");
    // The PersistentVolume, and an Event; a burst may cost a conflict. Some nodes come into another group.
    ensure!(measured.writes_per_claim() <= 3.0, "{shown}");
    ensure!((2..10).contains(&measured.capacities), "{shown}");
    let of = |call: &str| measured.claim_calls.get(call).copied().unwrap_or(0);
    ensure!(of("create persistentvolumes") == 20 && of("list persistentvolumes") == 0, "{shown}");
    // A restart reads, page by page, and writes nothing that is there already.
    let writes = |call: &&String| !call.starts_with("get") && !call.starts_with("list") && !call.starts_with("watch");
    let written: Vec<&String> = measured.restart_calls.keys().filter(writes).collect();
    ensure!(written.iter().all(|call| *call == "patch csidrivers"), "{shown}");
    let lists: u64 = measured.restart_calls.iter().filter(|(call, _)| call.starts_with("list")).map(|(_, n)| n).sum();
    ensure!(lists <= 16, "{shown}");
    Ok(())
}
