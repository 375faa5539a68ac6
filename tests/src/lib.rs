//! What tests that cross rooms share. They need the test bed, so they run only
//! where `cargo xtask test` says that there is one; elsewhere they show as
//! ignored.

pub mod driver;
pub mod objects;

use anyhow::Result;
use libtest_mimic::{Arguments, Trial};
use std::sync::Arc;

/// A named test, given what all tests of its file share.
pub type Test<T> = (&'static str, fn(&T) -> Result<()>);

/// Whether the test bed is to be used.
pub fn enabled() -> bool {
    std::env::var_os("LVPROV_TESTBED").is_some()
}

/// A shell command that fills a device with what is not zero. Pipes are slow in
/// user-mode Linux.
pub fn fill(device: &str) -> String {
    format!(r#"xfs_io -d -c "pwrite -q -S 0x73 -b 4m 0 $(blockdev --getsize64 {device})" {device}"#)
}

/// A shell command that makes a volume of vg0 in the extents that are given out
/// next, fills it, and removes it.
pub fn dirty(size: &str) -> String {
    format!(
        "lvcreate -qq -y -Wn -Zn -n earlier -L {size} vg0 && {} && lvremove -qq -y vg0/earlier",
        fill("/dev/vg0/earlier")
    )
}

/// Whether what is otherwise left out or cut short is to run as a whole.
pub fn full() -> bool {
    std::env::var_os("LVPROV_FULL").is_some()
}

/// Runs tests on something that they share and that is made once, on the main
/// thread, when there is anything to run. Ends the process.
///
/// `only_full`: names of those that repeat much of another one, or take their time.
/// They show as ignored unless everything is to run, or somebody asks for tests
/// by name.
pub fn run<T: Send + Sync + 'static>(tests: &[Test<T>], only_full: &[&str], make: impl FnOnce() -> Result<T>) -> ! {
    for name in only_full {
        assert!(tests.iter().any(|(known, _)| known == name), "{name} is no test");
    }
    let mut arguments = Arguments::from_args();
    let everything = full() || arguments.filter.is_some();
    let ignored = |name: &str| !enabled() || (!everything && only_full.contains(&name));
    let wanted = |name: &str| match &arguments.filter {
        Some(filter) if arguments.exact => name == filter,
        Some(filter) => name.contains(filter.as_str()),
        None => true,
    };
    let any = !arguments.list && tests.iter().any(|(name, _)| wanted(name) && !ignored(name));
    let shared = if any {
        match make() {
            Ok(shared) => Some(Arc::new(shared)),
            Err(error) => {
                eprintln!("the test bed does not come up: {error:#}");
                std::process::exit(1);
            }
        }
    } else {
        None
    };
    // Each test has names of its own, but two cores and one disk are shared.
    arguments.test_threads.get_or_insert(1);
    let trials = tests
        .iter()
        .map(|&(name, test)| {
            let shared = shared.clone();
            Trial::test(name, move || {
                let Some(shared) = shared else { return Err("no test bed".into()) };
                test(&shared).map_err(|error| {
                    // The summary comes at the end of all tests.
                    eprintln!("{name}: {error:#}");
                    format!("{error:#}").into()
                })
            })
            .with_ignored_flag(ignored(name))
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    if conclusion.has_failed() {
        xtask::testbed::keep_logs();
    }
    drop(shared);
    conclusion.exit()
}
