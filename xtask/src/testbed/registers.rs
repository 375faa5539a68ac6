//! What user-mode Linux needs on processors with more registers than it knows.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::{hex, paths};

const SOURCE: &str = include_str!("../../user-mode-linux/registers.rs");

/// Bytes of extended registers that user-mode Linux 6.1 keeps of a process.
#[cfg(target_arch = "x86_64")]
const KNOWN: u32 = 2696;

/// A library to be preloaded into user-mode Linux, where this processor needs one.
/// Built when there is none yet.
///
/// # Errors
/// When it does not compile.
pub fn preload() -> Result<Option<PathBuf>> {
    if !needed() {
        return Ok(None);
    }
    let hash = hex(&Sha256::digest(SOURCE)[..8]);
    let library = paths::testbed().join(format!("uml-registers-{hash}.so"));
    if library.exists() {
        return Ok(Some(library));
    }
    fs::create_dir_all(paths::testbed())?;
    // Several nodes may start at once: each builds its own, and the last one stays.
    let part = tempfile::NamedTempFile::new_in(paths::testbed())?.into_temp_path();
    build(&part)?;
    part.persist(&library)?;
    Ok(Some(library))
}

fn build(library: &Path) -> Result<()> {
    let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| OsString::from("rustc"));
    let status = Command::new(&compiler)
        .args(["--edition=2024", "--crate-type=cdylib", "-Copt-level=2", "-Cpanic=abort", "-Dwarnings", "-o"])
        .arg(library)
        .arg(paths::repository().join("xtask/user-mode-linux/registers.rs"))
        .status()
        .with_context(|| format!("cannot run {}", compiler.display()))?;
    if !status.success() {
        bail!("the library that user-mode Linux needs on this processor does not build ({status})");
    }
    Ok(())
}

#[cfg(target_arch = "x86_64")]
fn needed() -> bool {
    use std::arch::x86_64::__cpuid_count;
    // Leaf 0xd: the size for all registers that the kernel has enabled.
    __cpuid_count(0, 0).eax >= 0xd && __cpuid_count(0xd, 0).ebx > KNOWN
}

#[cfg(not(target_arch = "x86_64"))]
fn needed() -> bool {
    false
}

#[cfg(test)]
mod tests {
    /// Also where it is not needed: otherwise the next machine finds out.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_library_builds_on_every_machine() {
        let directory = tempfile::tempdir().unwrap();
        super::build(&directory.path().join("registers.so")).unwrap();
    }
}
