//! The directories of a log volume: opened beneath its root, made with a quota
//! project, removed by way of the trash, and what is recorded of each.

use super::{LogError, Record, errno, io as at};
use crate::clock::now;
use crate::names::DirectoryName;
use crate::{mounts, quota, xattr};
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Directory for what is not a pod's: half-made and half-removed directories.
/// No pod can have this name.
pub(super) const PRIVATE: &str = ".lvprov";
/// What half-removed directories are called in there.
pub(super) const GONE: &str = "gone-";
/// Attribute of a pod's directory: a [`Record`] as JSON.
const RECORD: &str = "trusted.lvprov.record";
/// Attribute of the volume's root: the next free project id.
const NEXT_PROJECT: &str = "trusted.lvprov.next-project";
/// Project ids begin here; smaller ones are often somebody's by hand.
pub(super) const FIRST_PROJECT: u32 = 1000;

pub(super) fn open_directory(path: &Path) -> Result<File, LogError> {
    File::open(path).map_err(at("open", path))
}

/// Opens a directory that lies directly in `root`, and follows no link to it.
/// A name of one component with O_NOFOLLOW cannot leave `root`; openat2(2) with
/// RESOLVE_BENEATH says the same of kernels that have it.
pub(super) fn open_beneath(root: impl AsFd, name: &OsStr) -> nix::Result<OwnedFd> {
    use nix::fcntl::{OpenHow, ResolveFlag, openat2};
    if name.is_empty() || name == "." || name == ".." || name.as_bytes().contains(&b'/') {
        return Err(nix::Error::EINVAL);
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let resolve = ResolveFlag::RESOLVE_BENEATH
        | ResolveFlag::RESOLVE_NO_SYMLINKS
        | ResolveFlag::RESOLVE_NO_MAGICLINKS
        | ResolveFlag::RESOLVE_NO_XDEV;
    match openat2(&root, name, OpenHow::new().flags(flags).resolve(resolve)) {
        Err(nix::Error::ENOSYS) => openat(&root, name, flags, Mode::empty()),
        other => other,
    }
}

/// The directory for what is not a pod's.
pub(super) fn private_directory(root: &File, path: &Path) -> Result<OwnedFd, LogError> {
    let private = path.join(PRIVATE);
    match mkdirat(root, PRIVATE, Mode::S_IRWXU) {
        Ok(()) | Err(nix::Error::EEXIST) => {}
        Err(error) => return Err(errno("make", &private)(error)),
    }
    open_beneath(root, OsStr::new(PRIVATE)).map_err(errno("open", &private))
}

/// A new pod's directory: made aside, given its project, then moved into
/// place, so that none is ever there without a quota.
pub(super) fn make_directory(root: &File, path: &Path, name: &OsStr) -> Result<OwnedFd, LogError> {
    let private = private_directory(root, path)?;
    let aside = path.join(PRIVATE).join("new");
    clear(&private, OsStr::new("new"), &aside)?;
    // As an emptyDir: the pod may run as any user, and only the pod gets here.
    mkdirat(&private, "new", Mode::S_IRWXU).map_err(errno("make", &aside))?;
    let directory = open_beneath(&private, OsStr::new("new")).map_err(errno("open", &aside))?;
    fchmod(&directory, Mode::S_IRWXU | Mode::S_IRWXG | Mode::S_IRWXO).map_err(errno("set the mode of", &aside))?;
    let project = next_project(root).map_err(at("number the directories of", path))?;
    quota::set_project(&directory, project).map_err(at("set the quota project of", &aside))?;
    renameat(&private, "new", root, name).map_err(errno("move into place", &aside))?;
    Ok(directory)
}

pub(super) fn next_project(root: &File) -> io::Result<u32> {
    let project = match xattr::get(root, NEXT_PROJECT)? {
        Some(text) => String::from_utf8_lossy(&text)
            .parse()
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the next project id is no number"))?,
        None => FIRST_PROJECT,
    };
    let next = project.checked_add(1).ok_or_else(|| io::Error::other("all project ids are used up"))?;
    xattr::set(root, NEXT_PROJECT, next.to_string().as_bytes())?;
    Ok(project)
}

/// A path to what is open, whatever has become of its name.
fn opened(directory: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()))
}

/// Removes a tree of ours in the open directory, if it is there. No link in it
/// is followed (std::fs::remove_dir_all works on descriptors), nor one that has
/// taken the directory's place meanwhile. `path` is for messages.
fn clear(private: &OwnedFd, name: &OsStr, path: &Path) -> Result<(), LogError> {
    match fs::remove_dir_all(opened(private).join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Removes all that has been moved away, also by calls that were cut off.
/// `path` is for messages.
pub(super) fn empty_trash(private: &OwnedFd, path: &Path) -> Result<(), LogError> {
    for entry in fs::read_dir(opened(private)).map_err(at("list", path))? {
        let name = entry.map_err(at("list", path))?.file_name();
        if name.as_bytes().starts_with(GONE.as_bytes()) {
            clear(private, &name, &path.join(&name))?;
        }
    }
    Ok(())
}

/// Names of the directories in a log volume that are pods'.
pub(super) fn directory_names(path: &Path) -> Result<Vec<DirectoryName>, LogError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path).map_err(at("list", path))? {
        let entry = entry.map_err(at("list", path))?;
        let name = entry.file_name();
        let is_directory = entry.file_type().map_err(at("list", path))?.is_dir();
        // ext4 has a lost+found; no name of ours holds a +.
        if let Some(name) = name.to_str().filter(|_| is_directory).and_then(|name| DirectoryName::parse(name).ok()) {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

pub(super) fn is_bound(mounts: &[mounts::Mount], device: (u32, u32), name: &str) -> bool {
    let root = Path::new("/").join(name);
    mounts.iter().any(|mount| mount.device == device && mount.root.starts_with(&root))
}

pub(super) fn read_record(directory: impl AsFd) -> io::Result<Option<Record>> {
    Ok(xattr::get(directory, RECORD)?.and_then(|text| serde_json::from_slice(&text).ok()))
}

/// The records of all directories that have one.
pub(super) fn records(path: &Path) -> Result<Vec<(DirectoryName, Record)>, LogError> {
    each_record(path, |_, record| Ok(record))
}

/// Begins the retention of every directory anew.
pub(super) fn touch_records(path: &Path) -> Result<Vec<(DirectoryName, Record)>, LogError> {
    each_record(path, |directory, record| {
        let record = Record { last_used: now(), ..record };
        write_record(directory, &record)?;
        Ok(record)
    })
}

fn each_record(
    path: &Path,
    work: impl Fn(&OwnedFd, Record) -> io::Result<Record>,
) -> Result<Vec<(DirectoryName, Record)>, LogError> {
    let root = open_directory(path)?;
    let mut found = Vec::new();
    for name in directory_names(path)? {
        let below = path.join(name.as_str());
        let Ok(directory) = open_beneath(&root, OsStr::new(name.as_str())) else { continue };
        if let Some(record) = read_record(&directory).map_err(at("read the record of", &below))? {
            let record = work(&directory, record).map_err(at("write the record of", &below))?;
            found.push((name, record));
        }
    }
    Ok(found)
}

pub(super) fn write_record(directory: impl AsFd, record: &Record) -> io::Result<()> {
    xattr::set(directory, RECORD, &serde_json::to_vec(record)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_link_in_place_of_a_pods_directory_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let root = File::open(directory.path()).unwrap();
        symlink("/etc", directory.path().join("web-a")).unwrap();
        assert!(open_beneath(&root, OsStr::new("web-a")).is_err());
        for bad in ["..", "/etc", "a/b", ".", ""] {
            assert!(open_beneath(&root, OsStr::new(bad)).is_err(), "{bad:?}");
        }
        fs::create_dir(directory.path().join("web-b")).unwrap();
        assert!(open_beneath(&root, OsStr::new("web-b")).is_ok());
    }

    #[test]
    fn only_directories_that_a_pod_could_have_are_listed() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["web-b", "web-a", "lost+found", PRIVATE] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        fs::write(directory.path().join("file"), "").unwrap();
        symlink("/etc", directory.path().join("link")).unwrap();
        let names = directory_names(directory.path()).unwrap();
        assert_eq!(names.iter().map(DirectoryName::as_str).collect::<Vec<_>>(), ["web-a", "web-b"]);
    }

    #[test]
    fn project_ids_are_given_once() {
        let directory = tempfile::tempdir().unwrap();
        let root = File::open(directory.path()).unwrap();
        assert_eq!(next_project(&root).unwrap(), FIRST_PROJECT);
        assert_eq!(next_project(&root).unwrap(), FIRST_PROJECT + 1);
    }

    #[test]
    fn a_record_stays_on_its_directory() {
        let directory = tempfile::tempdir().unwrap();
        let root = File::open(directory.path()).unwrap();
        assert_eq!(read_record(&root).unwrap(), None);
        let record =
            Record { pod_uid: "1111".to_owned(), pod: "web-a".to_owned(), retention: 60, last_used: 7, project: 1000 };
        write_record(&root, &record).unwrap();
        assert_eq!(read_record(&root).unwrap(), Some(record));
    }

    #[test]
    fn what_a_cut_off_removal_left_goes_with_the_next() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("gone-1000/sub")).unwrap();
        fs::create_dir_all(directory.path().join("new")).unwrap();
        let open = OwnedFd::from(File::open(directory.path()).unwrap());
        empty_trash(&open, directory.path()).unwrap();
        assert!(!directory.path().join("gone-1000").exists());
        assert!(directory.path().join("new").exists());
    }

    #[test]
    fn clearing_follows_no_link() {
        let directory = tempfile::tempdir().unwrap();
        let keep = directory.path().join("keep");
        fs::create_dir(&keep).unwrap();
        fs::write(keep.join("file"), "").unwrap();
        let tree = directory.path().join("tree");
        fs::create_dir(&tree).unwrap();
        symlink(&keep, tree.join("link")).unwrap();
        let open = OwnedFd::from(File::open(directory.path()).unwrap());
        clear(&open, OsStr::new("tree"), &tree).unwrap();
        clear(&open, OsStr::new("tree"), &tree).unwrap();
        assert!(keep.join("file").exists() && !tree.exists());
    }

    #[test]
    fn clearing_stays_in_the_directory_that_was_opened() {
        let directory = tempfile::tempdir().unwrap();
        let (private, other) = (directory.path().join("private"), directory.path().join("other"));
        for tree in [private.join("new"), other.join("new")] {
            fs::create_dir_all(tree).unwrap();
        }
        let open = OwnedFd::from(File::open(&private).unwrap());
        fs::rename(&private, directory.path().join("moved")).unwrap();
        symlink(&other, &private).unwrap();
        clear(&open, OsStr::new("new"), &private.join("new")).unwrap();
        assert!(other.join("new").exists() && !directory.path().join("moved/new").exists());
    }
}
