//! `lvprov install-driver`: puts the FlexVolume driver where kubelet finds it.
//!
//! kubelet watches the plugin directory and asks a driver for its capabilities
//! as soon as it appears; a first answer that fails is not asked for again. So
//! the driver must appear complete, by one rename, and its directory must hold
//! nothing but it. Names that begin with a dot are ignored by kubelet.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tracing::info;

/// Directory of the driver: vendor and name, as kubelet wants it.
const DRIVER_DIR: &str = "lvprov.io~lvm";
/// A first installation before it is complete.
const DRIVER_DIR_NEW: &str = ".lvprov.io~lvm";
/// The executable in it.
const EXECUTABLE: &str = "lvm";
/// A new version of it before it is complete.
const EXECUTABLE_NEW: &str = ".lvm";
const MODE: u32 = 0o755;

/// What `lvprov install-driver` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The driver to install
    #[arg(long, default_value = "/lvprov-flexvolume")]
    pub source: PathBuf,
    /// kubelet's volume plugin directory
    #[arg(long, default_value = "/usr/libexec/kubernetes/kubelet-plugins/volume/exec")]
    pub plugin_dir: PathBuf,
}

/// Why the driver is not installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The kernel refused a step.
    #[error("cannot {what} {path}")]
    Io {
        /// The step.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The source is no program.
    #[error("{0} is not an executable program; --source names the driver to install")]
    NotAProgram(PathBuf),
    /// Something that is not a directory stands in the driver's place.
    #[error("{0} is not a directory; remove it, then install again")]
    NotADirectory(PathBuf),
}

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Installed {
    /// There was none before.
    New,
    /// It replaced another version.
    Updated,
    /// This version was there already; nothing was written.
    Unchanged,
}

/// Runs the command.
///
/// # Errors
/// When the driver could not be installed; what was there before still is.
pub fn run(args: &Args) -> Result<(), InstallError> {
    let installed = install(&args.source, &args.plugin_dir)?;
    info!(
        plugin_dir = %args.plugin_dir.display(),
        result = ?installed,
        "driver installed"
    );
    Ok(())
}

/// Installs `source` below `plugin_dir`, or updates what is there.
///
/// Safe to interrupt and to repeat. Two at the same time wait for each other.
///
/// # Errors
/// As for [`run`].
pub fn install(source: &Path, plugin_dir: &Path) -> Result<Installed, InstallError> {
    let driver = read_program(source)?;
    fs::create_dir_all(plugin_dir).map_err(at("create", plugin_dir))?;
    // Two versions of the pod overlap during an update. The lock is on the
    // directory itself: kubelet would take any new file in it as a sign.
    let parent = File::open(plugin_dir).map_err(at("open", plugin_dir))?;
    parent.lock().map_err(at("lock", plugin_dir))?;

    let dir = plugin_dir.join(DRIVER_DIR);
    let there = is_there(&dir)?;
    remove_leftovers(plugin_dir, &dir)?;
    // The rename of a first installation also takes an empty directory's place.
    let installed = if !there || is_empty(&dir)? {
        install_directory(&driver, plugin_dir, &dir)?;
        Installed::New
    } else if has(&dir.join(EXECUTABLE), &driver)? {
        Installed::Unchanged
    } else {
        let existed = dir.join(EXECUTABLE).exists();
        replace_executable(&driver, &dir)?;
        if existed { Installed::Updated } else { Installed::New }
    };
    parent.sync_all().map_err(at("sync", plugin_dir))?;
    Ok(installed)
}

/// What an interrupted installation leaves.
fn remove_leftovers(plugin_dir: &Path, dir: &Path) -> Result<(), InstallError> {
    let half_made = plugin_dir.join(DRIVER_DIR_NEW);
    gone(fs::remove_dir_all(&half_made)).map_err(at("remove", &half_made))?;
    let half_written = dir.join(EXECUTABLE_NEW);
    gone(fs::remove_file(&half_written)).map_err(at("remove", &half_written))
}

/// Whether the driver's directory exists; as anything else it is refused.
fn is_there(dir: &Path) -> Result<bool, InstallError> {
    match fs::symlink_metadata(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(at("look at", dir)(error)),
        Ok(metadata) if metadata.is_dir() => Ok(true),
        Ok(_) => Err(InstallError::NotADirectory(dir.to_owned())),
    }
}

fn is_empty(dir: &Path) -> Result<bool, InstallError> {
    let mut entries = fs::read_dir(dir).map_err(at("list", dir))?;
    Ok(entries.next().is_none())
}

fn install_directory(driver: &[u8], plugin_dir: &Path, dir: &Path) -> Result<(), InstallError> {
    let new = plugin_dir.join(DRIVER_DIR_NEW);
    fs::create_dir(&new).map_err(at("create", &new))?;
    // Whatever the umask says.
    fs::set_permissions(&new, fs::Permissions::from_mode(MODE)).map_err(at("set the mode of", &new))?;
    write_executable(driver, &new.join(EXECUTABLE))?;
    sync_dir(&new)?;
    fs::rename(&new, dir).map_err(at("rename to", dir))
}

fn replace_executable(driver: &[u8], dir: &Path) -> Result<(), InstallError> {
    let new = dir.join(EXECUTABLE_NEW);
    write_executable(driver, &new)?;
    // Calls that run keep the old file until they end.
    let path = dir.join(EXECUTABLE);
    fs::rename(&new, &path).map_err(at("rename to", &path))?;
    sync_dir(dir)
}

fn write_executable(driver: &[u8], path: &Path) -> Result<(), InstallError> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(MODE).open(path).map_err(at("create", path))?;
    file.write_all(driver).map_err(at("write", path))?;
    file.set_permissions(fs::Permissions::from_mode(MODE)).map_err(at("set the mode of", path))?;
    // A node that loses power must not come back with an empty driver.
    file.sync_all().map_err(at("sync", path))
}

fn read_program(path: &Path) -> Result<Vec<u8>, InstallError> {
    let content = fs::read(path).map_err(at("read", path))?;
    if content.starts_with(b"\x7fELF") { Ok(content) } else { Err(InstallError::NotAProgram(path.to_owned())) }
}

/// Whether `path` is a file with this content that can be executed.
fn has(path: &Path, driver: &[u8]) -> Result<bool, InstallError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(at("look at", path)(error)),
        Ok(metadata) => {
            let as_it_should = metadata.is_file()
                && metadata.permissions().mode() & 0o777 == MODE
                && metadata.len() == driver.len() as u64;
            if !as_it_should {
                return Ok(false);
            }
        }
    }
    let mut content = Vec::with_capacity(driver.len());
    File::open(path).and_then(|mut file| file.read_to_end(&mut content)).map_err(at("read", path))?;
    Ok(content == driver)
}

fn sync_dir(dir: &Path) -> Result<(), InstallError> {
    File::open(dir).and_then(|file| file.sync_all()).map_err(at("sync", dir))
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_owned();
    move |source| InstallError::Io { what, path, source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    struct Host {
        root: tempfile::TempDir,
    }

    impl Host {
        fn new() -> Self {
            Self { root: tempfile::tempdir().unwrap() }
        }

        fn plugin_dir(&self) -> PathBuf {
            self.root.path().join("exec")
        }

        fn executable(&self) -> PathBuf {
            self.plugin_dir().join(DRIVER_DIR).join(EXECUTABLE)
        }

        fn install(&self, version: &str) -> Result<Installed, InstallError> {
            let source = self.root.path().join("driver");
            fs::write(&source, format!("\x7fELF{version}")).unwrap();
            install(&source, &self.plugin_dir())
        }

        /// Everything below the plugin directory.
        fn tree(&self) -> Vec<String> {
            fn walk(root: &Path, dir: &Path, found: &mut Vec<String>) {
                for entry in fs::read_dir(dir).unwrap() {
                    let path = entry.unwrap().path();
                    let name = path.strip_prefix(root).unwrap();
                    found.push(name.to_str().unwrap().to_owned());
                    if path.is_dir() {
                        walk(root, &path, found);
                    }
                }
            }
            let mut found = Vec::new();
            walk(&self.plugin_dir(), &self.plugin_dir(), &mut found);
            found.sort();
            found
        }

        fn assert_has(&self, version: &str) {
            assert_eq!(self.tree(), ["lvprov.io~lvm", "lvprov.io~lvm/lvm"]);
            let content = fs::read(self.executable()).unwrap();
            assert_eq!(content, format!("\x7fELF{version}").as_bytes());
            let mode = fs::metadata(self.executable()).unwrap().mode();
            assert_eq!(mode & 0o7777, 0o755);
        }
    }

    #[test]
    fn first_installation_makes_directory_and_driver() {
        let host = Host::new();
        assert_eq!(host.install("1").unwrap(), Installed::New);
        host.assert_has("1");
    }

    #[test]
    fn same_version_is_not_written_again() {
        let host = Host::new();
        host.install("1").unwrap();
        let before = fs::metadata(host.executable()).unwrap();
        assert_eq!(host.install("1").unwrap(), Installed::Unchanged);
        let after = fs::metadata(host.executable()).unwrap();
        assert_eq!(before.ino(), after.ino());
        assert_eq!(before.ctime_nsec(), after.ctime_nsec());
        host.assert_has("1");
    }

    #[test]
    fn update_is_a_rename_over_the_old_file() {
        let host = Host::new();
        host.install("1").unwrap();
        let before = fs::metadata(host.executable()).unwrap();
        let directory = fs::metadata(host.executable().parent().unwrap()).unwrap();
        // Held open, as a call that runs would.
        let mut running = File::open(host.executable()).unwrap();
        assert_eq!(host.install("2").unwrap(), Installed::Updated);
        host.assert_has("2");
        let after = fs::metadata(host.executable()).unwrap();
        assert_ne!(before.ino(), after.ino());
        let directory_after = fs::metadata(host.executable().parent().unwrap()).unwrap();
        assert_eq!(directory.ino(), directory_after.ino());
        let mut old = String::new();
        running.read_to_string(&mut old).unwrap();
        assert_eq!(old, "\x7fELF1");
    }

    #[test]
    fn driver_that_lost_its_mode_is_replaced() {
        let host = Host::new();
        host.install("1").unwrap();
        fs::set_permissions(host.executable(), fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(host.install("1").unwrap(), Installed::Updated);
        host.assert_has("1");
    }

    #[test]
    fn leftovers_of_an_interrupted_installation_go() {
        let host = Host::new();
        let half_made = host.plugin_dir().join(DRIVER_DIR_NEW);
        fs::create_dir_all(&half_made).unwrap();
        fs::write(half_made.join(EXECUTABLE), "half").unwrap();
        assert_eq!(host.install("1").unwrap(), Installed::New);
        host.assert_has("1");

        let half_written = host.executable().with_file_name(EXECUTABLE_NEW);
        fs::write(&half_written, "half").unwrap();
        assert_eq!(host.install("1").unwrap(), Installed::Unchanged);
        host.assert_has("1");
        fs::write(&half_written, "half").unwrap();
        assert_eq!(host.install("2").unwrap(), Installed::Updated);
        host.assert_has("2");
    }

    #[test]
    fn empty_directory_and_directory_without_driver_are_filled() {
        let host = Host::new();
        fs::create_dir_all(host.plugin_dir().join(DRIVER_DIR)).unwrap();
        assert_eq!(host.install("1").unwrap(), Installed::New);
        host.assert_has("1");

        fs::remove_file(host.executable()).unwrap();
        fs::write(host.executable().with_file_name(EXECUTABLE_NEW), "half").unwrap();
        assert_eq!(host.install("1").unwrap(), Installed::New);
        host.assert_has("1");
    }

    #[test]
    fn wrong_source_or_place_changes_nothing() {
        let host = Host::new();
        let source = host.root.path().join("script");
        fs::write(&source, "#!/bin/sh\n").unwrap();
        let error = install(&source, &host.plugin_dir()).unwrap_err();
        assert!(matches!(error, InstallError::NotAProgram(_)), "{error}");
        assert!(!host.plugin_dir().exists());

        fs::create_dir_all(host.plugin_dir()).unwrap();
        let elsewhere = host.root.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, host.plugin_dir().join(DRIVER_DIR)).unwrap();
        let error = host.install("1").unwrap_err();
        assert!(matches!(error, InstallError::NotADirectory(_)), "{error}");
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
    }

    #[test]
    fn two_at_once_leave_one_whole_driver() {
        let host = Host::new();
        let sources: Vec<_> = (0..4)
            .map(|i| {
                let source = host.root.path().join(format!("driver{i}"));
                fs::write(&source, format!("\x7fELF{}", i.to_string().repeat(100_000))).unwrap();
                source
            })
            .collect();
        std::thread::scope(|scope| {
            for source in &sources {
                scope.spawn(|| install(source, &host.plugin_dir()).unwrap());
            }
        });
        let content = fs::read(host.executable()).unwrap();
        assert!(sources.iter().any(|s| fs::read(s).unwrap() == content));
        assert_eq!(host.tree().len(), 2);
    }
}
