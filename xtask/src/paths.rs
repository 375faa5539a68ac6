//! Where things are in the working copy.

use std::env;
use std::path::{Path, PathBuf};

/// The working copy: where the workspace's `Cargo.toml` is.
pub fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Cargo's target directory.
pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), |dir| repository().join(dir))
}

/// What the test bed builds and keeps.
pub fn testbed() -> PathBuf {
    target().join("testbed")
}

/// One directory per running sandbox.
pub fn runs() -> PathBuf {
    testbed().join("run")
}

/// Logs kept of what failed.
pub fn kept_logs() -> PathBuf {
    testbed().join("logs")
}

/// The triple that shipped binaries are built for: static ones.
pub fn static_target() -> &'static str {
    if cfg!(target_arch = "aarch64") { "aarch64-unknown-linux-gnu" } else { "x86_64-unknown-linux-gnu" }
}
