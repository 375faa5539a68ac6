//! cargo, run from within cargo.

use std::env;
use std::process::Command;

use crate::paths;

/// `cargo`, in the working copy, as if a person had called it.
///
/// `cargo run` and `cargo test` tell their program of its own package. Build
/// scripts of dependencies ask for some of these variables, so a cargo that
/// inherits them takes all that comes after for changed, each time.
pub fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(paths::repository());
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(tells_of_a_package) {
            cargo.env_remove(name);
        }
    }
    cargo
}

/// Set by cargo for what it runs, and by nobody for cargo ("Environment
/// variables Cargo sets for crates", the Cargo book).
fn tells_of_a_package(name: &str) -> bool {
    const PREFIXES: [&str; 5] = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_", "CARGO_PRIMARY_"];
    PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    /// Every second command of the test bed compiled TLS and Kubernetes again.
    #[test]
    fn cargo_is_not_told_of_the_package_that_calls_it() {
        let cargo = cargo();
        let removed: Vec<&OsStr> =
            cargo.get_envs().filter(|(_, value)| value.is_none()).map(|(name, _)| name).collect();
        assert!(env::var_os("CARGO_MANIFEST_DIR").is_some(), "cargo test has set none");
        assert!(removed.contains(&OsStr::new("CARGO_MANIFEST_DIR")), "{removed:?}");
        for kept in ["CARGO_HOME", "CARGO_TARGET_DIR", "CARGO_INCREMENTAL", "CARGO_BUILD_JOBS"] {
            assert!(!removed.contains(&OsStr::new(kept)));
        }
    }
}
