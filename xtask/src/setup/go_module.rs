//! Programs that are built from Go modules of their own in `xtask/`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use super::go;
use crate::progress::step;
use crate::{hex, paths};

/// A module in `xtask/<name>`, which becomes a program of the same name.
pub struct GoModule {
    /// Name of the directory and of the program.
    pub name: &'static str,
    /// The files that say what is built.
    pub sources: &'static [&'static str],
    /// The package that is built.
    pub package: &'static str,
    /// The module whose version is that of the program.
    pub of: &'static str,
    /// For people: what it is.
    pub title: &'static str,
    /// Further flags of the linker, for a version.
    pub linker_flags: fn(&str) -> String,
    /// What else is needed of its modules: a module, and a directory in it.
    pub files: Option<(&'static str, &'static str)>,
}

impl GoModule {
    /// Where the program is.
    pub fn binary(&self) -> PathBuf {
        paths::testbed().join(self.name)
    }

    /// Where the files are that come with it.
    pub fn files(&self) -> PathBuf {
        paths::testbed().join(format!("{}.files", self.name))
    }

    /// Builds the program, unless it is there, built from what the sources are now.
    ///
    /// # Errors
    /// When there is no Go, a module cannot be had, or it does not compile.
    pub fn build(&self) -> Result<()> {
        let directory = paths::repository().join("xtask").join(self.name);
        let mut hash = Sha256::new();
        for name in self.sources {
            hash.update(fs::read(directory.join(name)).with_context(|| format!("cannot read {name}"))?);
        }
        let key = hex(&hash.finalize());
        let marker = paths::testbed().join(format!("{}.built-from", self.name));
        if self.binary().exists() && fs::read_to_string(&marker).is_ok_and(|built| built.trim() == key) {
            return Ok(());
        }
        let module = fs::read_to_string(directory.join("go.mod"))?;
        let version = version_of(&module, self.of)
            .with_context(|| format!("go.mod of {} does not require {}", self.name, self.of))?;
        let go = go::find_or_install()?;
        fs::create_dir_all(paths::testbed())?;
        step(format!("Build {} {version} (once)", self.title), || {
            // Under another name until it is whole.
            let part = self.binary().with_extension("part");
            let status = Command::new(&go)
                .current_dir(&directory)
                .args(["build", "-trimpath", "-ldflags", &format!("-s -w {}", (self.linker_flags)(&version)), "-o"])
                .arg(&part)
                .arg(self.package)
                .env("CGO_ENABLED", "0")
                .env("GOTOOLCHAIN", "local")
                .env("GOFLAGS", "")
                .stdout(std::io::stderr())
                .status()
                .with_context(|| format!("cannot run {}", go.display()))?;
            if !status.success() {
                bail!("{} does not build ({status})", self.title);
            }
            self.copy_files(&go, &directory)?;
            fs::rename(part, self.binary())?;
            fs::write(marker, key)?;
            Ok(())
        })
    }

    /// Takes over its files from where Go keeps the module.
    fn copy_files(&self, go: &Path, directory: &Path) -> Result<()> {
        let Some((module, within)) = self.files else { return Ok(()) };
        let output = Command::new(go)
            .current_dir(directory)
            .args(["list", "-m", "-f", "{{.Dir}}", module])
            .env("GOTOOLCHAIN", "local")
            .env("GOFLAGS", "")
            .stderr(std::process::Stdio::inherit())
            .output()
            .with_context(|| format!("cannot run {}", go.display()))?;
        let kept = String::from_utf8(output.stdout)?;
        if !output.status.success() || kept.trim().is_empty() {
            bail!("go.mod of {} does not have module {module} ({})", self.name, output.status);
        }
        let to = self.files();
        fs::create_dir_all(&to)?;
        let from = Path::new(kept.trim()).join(within);
        for entry in fs::read_dir(&from).with_context(|| format!("cannot read {}", from.display()))? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                // What Go keeps may only be read.
                fs::write(to.join(entry.file_name()), fs::read(entry.path())?)?;
            }
        }
        Ok(())
    }
}

/// The version of a required module, without its `v`.
fn version_of(go_mod: &str, module: &str) -> Option<String> {
    go_mod.lines().find_map(|line| {
        let mut words = line.trim().trim_start_matches("require ").split_whitespace();
        (words.next()? == module).then_some(())?;
        words.next()?.strip_prefix('v').map(str::to_owned)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_that_of_the_module_that_is_meant() {
        let go_mod =
            "module x\n\ngo 1.26.0\n\nrequire (\n\texample.org/ab v1.0.0\n\texample.org/a v2.3.4 // indirect\n)\n";
        assert_eq!(version_of(go_mod, "example.org/a").as_deref(), Some("2.3.4"));
        assert_eq!(version_of("require example.org/a v1.0.0\n", "example.org/a").as_deref(), Some("1.0.0"));
        assert_eq!(version_of(go_mod, "example.org/b"), None);
    }
}
