//! The index of a log volume: which pod, UID and containers each directory
//! belonged to, and when. For log shippers, which see only paths.
//!
//! It lies beside the volume, as `<log root>/<namespace>/<volume>.json` (a
//! volume's name has no dot), and is replaced in one step. It is a service: what
//! counts is in the records of the directories, and the index is made from them
//! anew where it is missing. So nothing fails because of it.

use super::{LogError, Record, io};
use crate::clock::now;
use crate::names::DirectoryName;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// So many uses of a directory are remembered, the newest.
const USES: usize = 16;

/// All that is said of one volume.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Index {
    /// Format of this file: 1.
    pub version: u32,
    /// Namespace of the volume.
    pub namespace: String,
    /// Name of the volume.
    pub volume: String,
    /// By the name of the directory.
    pub directories: BTreeMap<String, Entry>,
}

/// A directory.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Entry {
    /// Where it is.
    pub path: PathBuf,
    /// The pods that had it, the latest last.
    pub uses: Vec<Use>,
    /// It may be removed after this time. None while a pod has it.
    pub keep_until: Option<String>,
}

/// A pod's time with a directory.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Use {
    /// Name of the pod.
    pub pod: String,
    /// Its UID, as kubelet has it.
    pub uid: String,
    /// Its containers, as far as they had been started when this was written.
    pub containers: Vec<String>,
    /// When it was mounted (RFC 3339, UTC).
    pub from: String,
    /// When it was unmounted. None: it is mounted.
    pub until: Option<String>,
}

/// A time in seconds since 1970, for people and programs (RFC 3339, UTC).
pub fn rfc3339(seconds: i64) -> String {
    Timestamp::from_second(seconds).unwrap_or_default().to_string()
}

impl Index {
    /// Where the index of the volume that is mounted at `volume` lies.
    pub fn path(volume: &Path) -> PathBuf {
        volume.with_added_extension("json")
    }

    /// The index of a volume. None: there is none that can be read.
    pub fn load(volume: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(Self::path(volume)).ok()?).ok()
    }

    /// Replaces the file.
    pub(super) fn store(&self, volume: &Path) -> Result<(), LogError> {
        let path = Self::path(volume);
        let aside = volume.with_added_extension("json.new");
        let mut text = serde_json::to_vec_pretty(self).map_err(|error| io("write", &aside)(error.into()))?;
        text.push(b'\n');
        fs::write(&aside, text).map_err(io("write", &aside))?;
        fs::rename(&aside, &path).map_err(io("replace", &path))
    }

    /// Removes the file, with the volume that it is of.
    pub(super) fn remove(volume: &Path) {
        let _ = fs::remove_file(Self::path(volume));
        let _ = fs::remove_file(volume.with_added_extension("json.new"));
    }

    /// A pod has been given a directory.
    pub(super) fn begin(&mut self, name: &DirectoryName, path: &Path, pod: &str, uid: &str, containers: Vec<String>) {
        let entry = self.directories.entry(name.to_string()).or_default();
        entry.path = path.to_owned();
        entry.keep_until = None;
        match entry.uses.iter_mut().rfind(|one| one.uid == uid) {
            // A mount that is repeated, or made again after the node was down.
            Some(same) => {
                same.until = None;
                same.add(containers);
            }
            None => {
                let from = rfc3339(now());
                entry.uses.push(Use { pod: pod.to_owned(), uid: uid.to_owned(), containers, from, until: None });
            }
        }
        let too_many = entry.uses.len().saturating_sub(USES);
        entry.uses.drain(..too_many);
    }

    /// What the record of a directory tells of it. When its pod came is not
    /// known any more: before it was used last.
    pub(super) fn restore(&mut self, name: &DirectoryName, path: &Path, record: &Record, mounted: bool) {
        let pod = if record.pod.is_empty() { name.to_string() } else { record.pod.clone() };
        let last = rfc3339(record.last_used);
        let until = (!mounted).then(|| last.clone());
        let keep_until = (!mounted).then(|| rfc3339(record.keep_until()));
        let uses = vec![Use { pod, uid: record.pod_uid.clone(), containers: Vec::new(), from: last, until }];
        self.directories.insert(name.to_string(), Entry { path: path.to_owned(), uses, keep_until });
    }

    /// A pod has given a directory back (`uid` is None: whoever had it);
    /// `keep_until`: seconds since 1970, where no other pod has it.
    pub(super) fn end(&mut self, name: &str, uid: Option<&str>, containers: Vec<String>, keep_until: Option<i64>) {
        let Some(entry) = self.directories.get_mut(name) else { return };
        entry.keep_until = keep_until.map(rfc3339);
        for ended in entry.uses.iter_mut().filter(|one| one.until.is_none() && uid.is_none_or(|uid| one.uid == uid)) {
            ended.until = Some(rfc3339(now()));
            ended.add(containers.clone());
        }
    }

    /// Only the pods with these UIDs have a directory: whoever else had it has
    /// given it back, since when nobody knows.
    pub(super) fn end_others(&mut self, name: &str, uids: &[&str]) {
        let now = rfc3339(now());
        let uses = self.directories.get_mut(name).into_iter().flat_map(|entry| &mut entry.uses);
        for other in uses.filter(|one| !uids.contains(&one.uid.as_str())) {
            other.until.get_or_insert_with(|| now.clone());
        }
    }

    /// The node was down: whatever was in use is not any more, since when nobody knows.
    pub(super) fn end_all(&mut self) {
        let now = rfc3339(now());
        for one in self.directories.values_mut().flat_map(|entry| &mut entry.uses) {
            one.until.get_or_insert_with(|| now.clone());
        }
    }
}

impl Use {
    fn add(&mut self, containers: Vec<String>) {
        self.containers.extend(containers);
        self.containers.sort_unstable();
        self.containers.dedup();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> DirectoryName {
        "web-0".parse().unwrap()
    }

    #[test]
    fn it_tells_who_had_a_directory_and_when() {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path().join("web-logs");
        let mut index = Index { version: 1, ..Index::default() };
        index.begin(&name(), &volume.join("web-0"), "web-0", "u1", Vec::new());
        // The next pod of that name comes before the first has gone.
        index.begin(&name(), &volume.join("web-0"), "web-0", "u2", Vec::new());
        index.end("web-0", Some("u1"), vec!["app".to_owned()], None);
        index.store(&volume).unwrap();
        let read = Index::load(&volume).unwrap();
        assert_eq!(read, index);
        let uses = &read.directories["web-0"].uses;
        assert_eq!((uses[0].uid.as_str(), uses[1].uid.as_str()), ("u1", "u2"));
        assert!(uses[0].until.is_some() && uses[1].until.is_none());
        assert_eq!(uses[0].containers, ["app"]);
        assert!(uses[0].from.starts_with("20") && uses[0].from.ends_with('Z'), "{}", uses[0].from);
        Index::remove(&volume);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_same_pod_again_is_the_same_use() {
        let mut index = Index::default();
        index.begin(&name(), Path::new("/v/web-0"), "web-0", "u1", Vec::new());
        index.end_all();
        assert!(index.directories["web-0"].uses[0].until.is_some());
        index.begin(&name(), Path::new("/v/web-0"), "web-0", "u1", vec!["app".to_owned()]);
        index.end("web-0", Some("u1"), vec!["app".to_owned(), "side".to_owned()], Some(86_400));
        let entry = &index.directories["web-0"];
        assert_eq!(entry.uses.len(), 1);
        assert_eq!(entry.uses[0].containers, ["app", "side"]);
        assert_eq!(entry.keep_until.as_deref(), Some("1970-01-02T00:00:00Z"));
    }

    #[test]
    fn a_record_alone_tells_the_last_pod() {
        let mut index = Index::default();
        let record =
            Record { pod_uid: "u1".to_owned(), pod: "web-0".to_owned(), retention: 60, last_used: 0, project: 1000 };
        index.restore(&name(), Path::new("/v/web-0"), &record, false);
        let entry = &index.directories["web-0"];
        assert_eq!(entry.uses[0].until.as_deref(), Some("1970-01-01T00:00:00Z"));
        assert_eq!(entry.keep_until.as_deref(), Some("1970-01-01T00:01:00Z"));
        index.restore(&name(), Path::new("/v/web-0"), &record, true);
        assert!(index.directories["web-0"].uses[0].until.is_none());
    }

    #[test]
    fn whoever_has_gone_unseen_has_ended() {
        let mut index = Index::default();
        for uid in ["u1", "u2"] {
            index.begin(&name(), Path::new("/v/web-0"), "web-0", uid, Vec::new());
        }
        index.end_others("web-0", &["u2"]);
        index.end_others("none", &[]);
        let uses = &index.directories["web-0"].uses;
        assert!(uses[0].until.is_some() && uses[1].until.is_none(), "{uses:?}");
    }

    #[test]
    fn it_does_not_grow_for_ever() {
        let mut index = Index::default();
        for number in 0..100 {
            index.begin(&name(), Path::new("/v/web-0"), "web-0", &format!("u{number}"), Vec::new());
        }
        assert_eq!(index.directories["web-0"].uses.len(), USES);
        assert_eq!(index.directories["web-0"].uses[USES - 1].uid, "u99");
    }

    #[test]
    fn a_broken_index_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path().join("web-logs");
        assert_eq!(Index::load(&volume), None);
        fs::write(Index::path(&volume), "{").unwrap();
        assert_eq!(Index::load(&volume), None);
    }
}
