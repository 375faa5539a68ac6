//! Unmounts that fail, noted where the node service sees them.
//!
//! kubelet makes no Event of a failing unmount: the pod stays in Terminating,
//! and nobody is told why. The driver cannot tell either, since it lives for
//! one call and speaks to nobody. So it leaves a note, a small file for each
//! volume directory, and takes it away once the unmount has succeeded. Notes
//! are a help: nothing fails because one cannot be written.

use crate::clock::now;
use crate::identity::digest;
use crate::names::PodUid;
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Where the notes lie. Emptied by a reboot, which also ends all mounts.
pub const DIRECTORY: &str = "/run/lvprov/unmounts";

/// Characters of a message that are kept.
const LONGEST_MESSAGE: usize = 500;
/// A note is smaller by far; a larger file is none.
const LARGEST: u64 = 16 << 10;
const ENDING: &str = ".json";

/// A volume directory of a pod that could not be unmounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FailedUnmount {
    /// The directory.
    pub target: PathBuf,
    /// UID of the pod, as kubelet has it.
    pub pod_uid: String,
    /// How often in a row it has failed.
    pub count: u32,
    /// When it failed first, in seconds since 1970.
    pub first: i64,
    /// When it failed last, in seconds since 1970.
    pub last: i64,
    /// What the driver said last.
    pub message: String,
}

/// The notes of one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notes {
    directory: PathBuf,
}

impl Default for Notes {
    fn default() -> Self {
        Self::at(Path::new(DIRECTORY))
    }
}

impl Notes {
    /// Those below `directory`.
    pub fn at(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// Where they lie.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Makes their directory, which only root may enter.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make_directory(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)
    }

    /// Notes that unmounting `target`, a volume directory of `pod`, has failed
    /// once more.
    pub fn note_failed_unmount(&self, target: &Path, pod: &PodUid, message: &str) {
        // The unmount has failed anyway, and says so itself.
        let _ = self.write(target, pod, message);
    }

    /// Unmounting `target` has succeeded, or is no longer wanted.
    pub fn clear(&self, target: &Path) {
        // Mostly there is none.
        let _ = fs::remove_file(self.file(target));
    }

    /// All of them, in order of target. What is not a note is left out.
    ///
    /// # Errors
    /// When the directory is there and cannot be read.
    pub fn all(&self) -> io::Result<Vec<FailedUnmount>> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut notes = Vec::new();
        for entry in entries {
            let entry = entry?;
            if entry.file_name().as_bytes().ends_with(ENDING.as_bytes()) {
                notes.extend(read(&entry.path()));
            }
        }
        notes.sort_by(|a, b| a.target.cmp(&b.target));
        Ok(notes)
    }

    fn write(&self, target: &Path, pod: &PodUid, message: &str) -> io::Result<()> {
        let file = self.file(target);
        let now = now();
        let before = read(&file).filter(|before| before.target == target && before.pod_uid == pod.as_str());
        let note = FailedUnmount {
            target: target.to_owned(),
            pod_uid: pod.to_string(),
            count: before.as_ref().map_or(0, |before| before.count).saturating_add(1),
            first: before.map_or(now, |before| before.first),
            last: now,
            message: message.chars().take(LONGEST_MESSAGE).collect(),
        };
        // Whoever reads it finds the whole of it, or none.
        let aside = file.with_extension(format!("{}", std::process::id()));
        let open = || OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside);
        let mut written = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.make_directory()?;
                open()?
            }
            other => other?,
        };
        written.write_all(&serde_json::to_vec(&note)?)?;
        fs::rename(&aside, &file)
    }

    /// A hash: UID and volume together may be longer than a file's name.
    fn file(&self, target: &Path) -> PathBuf {
        let digest = digest(&["unmount", &target.to_string_lossy()]);
        let mut name: String = digest[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        name.push_str(ENDING);
        self.directory.join(name)
    }
}

fn read(file: &Path) -> Option<FailedUnmount> {
    let small = fs::metadata(file).ok().filter(|metadata| metadata.is_file() && metadata.len() <= LARGEST);
    small.and_then(|_| serde_json::from_slice(&fs::read(file).ok()?).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const TARGET: &str = "/var/lib/kubelet/pods/1111/volumes/lvprov.io~lvm/logs";

    fn notes(directory: &tempfile::TempDir) -> Notes {
        Notes::at(&directory.path().join("lvprov/unmounts"))
    }

    fn pod(uid: &str) -> PodUid {
        PodUid::parse(uid).unwrap()
    }

    #[test]
    fn failures_in_a_row_are_one_note_that_counts() {
        let directory = tempfile::tempdir().unwrap();
        let notes = notes(&directory);
        assert_eq!(notes.all().unwrap(), []);
        for message in ["busy", "busy", "still busy"] {
            notes.note_failed_unmount(Path::new(TARGET), &pod("1111"), message);
        }
        let all = notes.all().unwrap();
        let [note] = all.as_slice() else { panic!("{all:?}") };
        assert_eq!((note.target.to_str(), note.pod_uid.as_str()), (Some(TARGET), "1111"));
        assert_eq!((note.count, note.message.as_str()), (3, "still busy"));
        assert!(note.first > 0 && note.last >= note.first, "{note:?}");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(notes.directory()), mode(&notes.file(Path::new(TARGET)))), (0o700, 0o600));
        assert_eq!(fs::read_dir(notes.directory()).unwrap().count(), 1, "something was left aside");
    }

    #[test]
    fn success_ends_the_row() {
        let directory = tempfile::tempdir().unwrap();
        let notes = notes(&directory);
        notes.clear(Path::new(TARGET));
        notes.note_failed_unmount(Path::new(TARGET), &pod("1111"), "busy");
        notes.note_failed_unmount(Path::new("/other"), &pod("1111"), "busy");
        notes.clear(Path::new(TARGET));
        let left: Vec<_> = notes.all().unwrap().into_iter().map(|note| note.target).collect();
        assert_eq!(left, [Path::new("/other")]);
        notes.note_failed_unmount(Path::new("/other"), &pod("2222"), "busy");
        assert_eq!(notes.all().unwrap()[0].count, 1, "of another pod");
    }

    #[test]
    fn names_as_long_as_they_come_are_noted_and_messages_are_cut() {
        let directory = tempfile::tempdir().unwrap();
        let notes = notes(&directory);
        let (uid, volume) = ("u".repeat(128), "v".repeat(253));
        let target = format!("/var/lib/kubelet/pods/{uid}/volumes/lvprov.io~lvm/{volume}");
        notes.note_failed_unmount(Path::new(&target), &pod(&uid), &"ä".repeat(10_000));
        assert_eq!(notes.all().unwrap()[0].message.chars().count(), LONGEST_MESSAGE);
    }

    #[test]
    fn what_is_no_note_is_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let notes = notes(&directory);
        notes.make_directory().unwrap();
        fs::write(notes.directory().join("a.json"), "{").unwrap();
        fs::write(notes.directory().join("b.json"), vec![b' '; 20 << 10]).unwrap();
        fs::create_dir(notes.directory().join("c.json")).unwrap();
        fs::write(notes.directory().join("d.4711"), "half").unwrap();
        assert_eq!(notes.all().unwrap(), []);
    }

    #[test]
    fn where_nothing_can_be_written_nothing_happens() {
        let notes = Notes::at(Path::new("/proc/lvprov"));
        notes.note_failed_unmount(Path::new(TARGET), &pod("1111"), "busy");
        notes.clear(Path::new(TARGET));
        assert_eq!(notes.all().unwrap(), []);
    }
}
