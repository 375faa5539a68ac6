//! The node's own settings, shared by the driver and the node service.

use crate::names::VgName;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// Where [`NodeConfig::load`] looks.
pub const CONFIG_PATH: &str = "/etc/lvprov/node.json";

/// Settings of this node. Every one has a default: the file may be absent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeConfig {
    /// Volume group of log volumes that name none. Default `vg0`.
    pub volume_group: VgName,
    /// Further volume groups that a pod may name for its log volumes.
    pub more_volume_groups: Vec<VgName>,
    /// Directory below which log volumes are mounted. Default `/var/log/lvprov`.
    pub log_root: PathBuf,
    /// File to which one JSON line is written for each child process run
    /// (see [`crate::command`]). Default: none.
    pub command_log: Option<PathBuf>,
}

/// The configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It exists and cannot be read.
    #[error("cannot read {path}: {source}")]
    Unreadable {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is not the JSON that is expected.
    #[error("{path} is not valid: {reason}; known keys: volumeGroup, moreVolumeGroups, logRoot, commandLog")]
    Invalid {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct File {
    volume_group: Option<String>,
    more_volume_groups: Vec<String>,
    log_root: Option<PathBuf>,
    command_log: Option<PathBuf>,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self::from_file(File::default(), "defaults").unwrap_or_else(|_| unreachable!("the defaults are valid"))
    }
}

impl NodeConfig {
    /// Reads [`CONFIG_PATH`]; a missing file means the defaults.
    pub fn load() -> Result<Self, ConfigError> {
        Self::load_from(Path::new(CONFIG_PATH))
    }

    /// Reads the file at `path`; a missing file means the defaults.
    pub fn load_from(path: &Path) -> Result<Self, ConfigError> {
        let shown = path.display().to_string();
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => return Err(ConfigError::Unreadable { path: shown, source }),
        };
        // An object and nothing else: serde would take a list for a struct.
        let file = serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&text)
            .and_then(|object| serde_json::from_value::<File>(object.into()))
            .map_err(|error| ConfigError::Invalid { path: shown.clone(), reason: error.to_string() })?;
        Self::from_file(file, &shown)
    }

    fn from_file(file: File, shown: &str) -> Result<Self, ConfigError> {
        let invalid = |reason: String| ConfigError::Invalid { path: shown.to_owned(), reason };
        let volume_group =
            VgName::parse(file.volume_group.as_deref().unwrap_or("vg0")).map_err(|error| invalid(error.to_string()))?;
        let log_root = file.log_root.unwrap_or_else(|| PathBuf::from("/var/log/lvprov"));
        for path in [Some(&log_root), file.command_log.as_ref()].into_iter().flatten() {
            if !path.is_absolute() || path.components().any(|c| c == std::path::Component::ParentDir) {
                return Err(invalid(format!("{} is not an absolute path without ..", path.display())));
            }
        }
        let more = file.more_volume_groups.iter().map(|name| VgName::parse(name));
        let more_volume_groups = more.collect::<Result<_, _>>().map_err(|error| invalid(error.to_string()))?;
        Ok(Self { volume_group, more_volume_groups, log_root: without_links(&log_root), command_log: file.command_log })
    }

    /// The volume groups that pods may carve log volumes from.
    pub fn open_groups(&self) -> impl Iterator<Item = &VgName> {
        std::iter::once(&self.volume_group).chain(&self.more_volume_groups)
    }
}

/// The path as the mount table will know it. What is not there yet has no links.
fn without_links(path: &Path) -> PathBuf {
    for ancestor in path.ancestors() {
        if let (Ok(real), Ok(rest)) = (ancestor.canonicalize(), path.strip_prefix(ancestor)) {
            return real.join(rest);
        }
    }
    path.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<NodeConfig, ConfigError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("node.json");
        std::fs::write(&path, text).unwrap();
        NodeConfig::load_from(&path)
    }

    #[test]
    fn a_missing_file_means_the_defaults() {
        let config = NodeConfig::load_from(Path::new("/nonexistent/node.json")).unwrap();
        assert_eq!(config, NodeConfig::default());
        assert_eq!(config.volume_group.as_str(), "vg0");
        assert_eq!(config.log_root, Path::new("/var/log/lvprov"));
    }

    #[test]
    fn a_file_sets_what_it_names() {
        let config = load(r#"{"volumeGroup":"fast","logRoot":"/srv/logs"}"#).unwrap();
        assert_eq!(config.volume_group.as_str(), "fast");
        assert_eq!(config.log_root, Path::new("/srv/logs"));
        assert_eq!(config.command_log, None);
        let config = load(r#"{"volumeGroup":"fast","moreVolumeGroups":["slow"]}"#).unwrap();
        assert_eq!(config.open_groups().map(VgName::as_str).collect::<Vec<_>>(), ["fast", "slow"]);
    }

    #[test]
    fn a_log_root_behind_a_link_is_where_the_link_leads() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().canonicalize().unwrap().join("real");
        std::fs::create_dir(&real).unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert_eq!(without_links(&link.join("logs/lvprov")), real.join("logs/lvprov"));
    }

    #[test]
    fn a_wrong_file_is_refused_with_its_path() {
        for text in [
            "",
            "[]",
            r#"{"volumegroup":"x"}"#,
            r#"{"volumeGroup":"-x"}"#,
            r#"{"logRoot":"a"}"#,
            r#"{"logRoot":"/a/../b"}"#,
        ] {
            let error = load(text).unwrap_err().to_string();
            assert!(error.contains("node.json"), "{error}");
        }
    }
}
