//! Building Kubernetes.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use super::go;
use crate::paths;
use crate::progress::step;

/// All components in one program.
pub fn binary() -> PathBuf {
    paths::testbed().join("kubernetes")
}

/// Builds the program, unless it is there, built from what the sources are now.
///
/// # Errors
/// When there is no Go, a module cannot be had, or it does not compile.
pub fn build() -> Result<()> {
    let sources = paths::repository().join("xtask/kubernetes");
    let mut hash = Sha256::new();
    for name in ["go.mod", "go.sum", "main.go"] {
        hash.update(fs::read(sources.join(name)).with_context(|| format!("cannot read {name}"))?);
    }
    let key: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let marker = paths::testbed().join("kubernetes.built-from");
    if binary().exists() && fs::read_to_string(&marker).is_ok_and(|built| built.trim() == key) {
        return Ok(());
    }
    let module = fs::read_to_string(sources.join("go.mod"))?;
    let version = module
        .lines()
        .find_map(|line| line.trim().strip_prefix("k8s.io/kubernetes v"))
        .context("go.mod does not require k8s.io/kubernetes")?
        .to_string();
    let go = go::find_or_install()?;
    fs::create_dir_all(paths::testbed())?;
    step(format!("Build Kubernetes {version} (some minutes the first time)"), || {
        let mut parts = version.split('.');
        let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let stamp = "k8s.io/component-base/version";
        let flags =
            format!("-s -w -X {stamp}.gitVersion=v{version} -X {stamp}.gitMajor={major} -X {stamp}.gitMinor={minor}");
        // Under another name until it is whole.
        let part = binary().with_extension("part");
        let status = Command::new(&go)
            .current_dir(&sources)
            .args(["build", "-trimpath", "-ldflags", &flags, "-o"])
            .arg(&part)
            .arg(".")
            .env("CGO_ENABLED", "0")
            .env("GOTOOLCHAIN", "local")
            .env("GOFLAGS", "")
            .stdout(std::io::stderr())
            .status()
            .with_context(|| format!("cannot run {}", go.display()))?;
        if !status.success() {
            bail!("Kubernetes does not build ({status})");
        }
        fs::rename(part, binary())?;
        fs::write(marker, key)?;
        Ok(())
    })
}
