//! The node's own settings, shared by the driver and the node service.

use crate::duration::parse_duration;
use crate::names::{DeviceClass, LvName, NodeName, VgName};
use crate::size::parse_quantity;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where [`NodeConfig::load`] looks.
pub const CONFIG_PATH: &str = "/etc/lvprov/node.json";

/// Settings of this node. Every one has a default: the file may be absent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeConfig {
    /// Volume group of log volumes that name none. Default `vg0`.
    pub volume_group: VgName,
    /// Further volume groups that a pod may name for its log volumes.
    pub more_volume_groups: Vec<VgName>,
    /// What StorageClasses call the volume groups.
    pub device_classes: DeviceClasses,
    /// The thin pools of volume groups, made by the admin.
    pub thin_pools: BTreeMap<VgName, ThinPool>,
    /// Directory below which log volumes are mounted. Default `/var/log/lvprov`.
    pub log_root: PathBuf,
    /// What `{node}` of a subPath stands for. Default: the host's name.
    pub node_name: Option<NodeName>,
    /// What log volumes may be, and are where a pod does not say.
    pub logs: LogLimits,
    /// After this time a call of the driver gives up. Default 60 s.
    pub deadline: Duration,
    /// What becomes of a file system that the kernel refuses as damaged.
    pub repair: Repair,
    /// What the driver writes to its log.
    pub log_level: LogLevel,
    /// File that the driver's log goes to, instead of the journal or syslog.
    pub log_file: Option<PathBuf>,
    /// Whether the node service keeps an lvm for each group, as long as there
    /// is something to do, rather than start one for each command. Default: yes.
    pub keep_lvm: bool,
    /// File to which one JSON line is written for each child process run
    /// (see [`crate::command`]). Default: none.
    pub command_log: Option<PathBuf>,
}

/// A thin pool that thin volumes are made in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThinPool {
    /// Its name in its group.
    pub pool: LvName,
    /// So many thousandths of its size its volumes may have together.
    pub over_provisioning: u64,
}

impl ThinPool {
    fn read(pools: BTreeMap<String, ThinPoolFile>) -> Result<BTreeMap<VgName, Self>, String> {
        let mut read = BTreeMap::new();
        for (vg, pool) in pools {
            let vg = VgName::parse(&vg).map_err(|error| format!("thinPools: {error}"))?;
            let wrong = |error: String| format!("thinPools.{vg}: {error}");
            let name = LvName::parse(&pool.pool).map_err(|error| wrong(error.to_string()))?;
            let ratio = pool.over_provisioning.map_or_else(|| "1".to_owned(), |ratio| ratio.to_string());
            // As thousands are read: 1.5k.
            let thousandths =
                parse_quantity(&format!("{ratio}k")).ok().filter(|ratio| (1000..=100_000).contains(ratio));
            let over_provisioning = thousandths
                .ok_or_else(|| wrong(format!("overProvisioning is {ratio}, and must be from 1 (never) to 100")))?;
            read.insert(vg, Self { pool: name, over_provisioning });
        }
        Ok(read)
    }
}

/// Names for volume groups, so that they may be called differently on each node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceClasses {
    groups: BTreeMap<DeviceClass, VgName>,
    default: Option<DeviceClass>,
}

impl Default for DeviceClasses {
    fn default() -> Self {
        NodeConfig::default().device_classes
    }
}

impl DeviceClasses {
    /// The group of a class; of the default one, where none is named.
    pub fn group(&self, class: Option<&DeviceClass>) -> Option<&VgName> {
        self.groups.get(class.or(self.default.as_ref())?)
    }

    /// The classes that a group is of.
    pub fn of(&self, group: &VgName) -> impl Iterator<Item = &DeviceClass> {
        self.groups.iter().filter(move |(_, of_class)| *of_class == group).map(|(class, _)| class)
    }

    /// Their names, for people.
    pub fn names(&self) -> String {
        self.groups.keys().map(DeviceClass::as_str).collect::<Vec<_>>().join(", ")
    }

    /// Reads what the file says. Without a word of it there is one class, the
    /// default, which is the group of log volumes.
    fn read(classes: Option<BTreeMap<String, DeviceClassFile>>, only: &VgName) -> Result<Self, String> {
        let Some(classes) = classes else {
            let name = DeviceClass::parse("default").map_err(|error| error.to_string())?;
            return Ok(Self { groups: BTreeMap::from([(name.clone(), only.clone())]), default: Some(name) });
        };
        let mut read = Self { groups: BTreeMap::new(), default: None };
        for (name, class) in classes {
            let name = DeviceClass::parse(&name).map_err(|error| format!("deviceClasses: {error}"))?;
            let group = VgName::parse(&class.volume_group).map_err(|error| format!("deviceClasses.{name}: {error}"))?;
            if class.default
                && let Some(other) = read.default.replace(name.clone())
            {
                return Err(format!("deviceClasses: {other} and {name} cannot both be the default"));
            }
            read.groups.insert(name, group);
        }
        Ok(read)
    }
}

/// Defaults and bounds of log volumes. `None`: no default, no bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLimits {
    /// Bytes of a volume whose pod does not say.
    pub default_size: Option<u64>,
    /// Bytes of a directory whose pod does not say.
    pub default_quota: Option<u64>,
    /// How long a directory is kept whose pod does not say. Default 7 days.
    pub default_retention: Duration,
    /// Bytes that a volume may be made with or grown to.
    pub max_size: Option<u64>,
    /// Bytes that all volumes of a namespace may have together on this node.
    pub max_per_namespace: Option<u64>,
    /// How long a directory may be kept.
    pub max_retention: Option<Duration>,
}

impl Default for LogLimits {
    fn default() -> Self {
        Self {
            default_size: None,
            default_quota: None,
            default_retention: Duration::from_secs(7 * 24 * 3600),
            max_size: None,
            max_per_namespace: None,
            max_retention: None,
        }
    }
}

/// Whether a damaged file system is repaired. A journal is replayed in any
/// case: that is the kernel's doing, and no repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Repair {
    /// It is left as it is, and the Event says so.
    #[default]
    Never,
    /// What its tool repairs without throwing anything away, or asking, is
    /// repaired before the mount is tried once more: e2fsck(8) with `-p`,
    /// xfs_repair(8) without `-L`.
    Safe,
}

/// How much the driver writes to its log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// Calls that failed.
    Error,
    /// Calls that changed something, too.
    #[default]
    Info,
    /// Every call but `init`.
    Debug,
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
    #[error("{path} is not valid: {reason}")]
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
    device_classes: Option<BTreeMap<String, DeviceClassFile>>,
    thin_pools: BTreeMap<String, ThinPoolFile>,
    log_root: Option<PathBuf>,
    node_name: Option<String>,
    log_volumes: LogVolumes,
    deadline: Option<String>,
    repair: Repair,
    log_level: LogLevel,
    log_file: Option<PathBuf>,
    keep_lvm: Option<bool>,
    command_log: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ThinPoolFile {
    pool: String,
    over_provisioning: Option<serde_json::Number>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct DeviceClassFile {
    volume_group: String,
    #[serde(default)]
    default: bool,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct LogVolumes {
    default_size: Option<String>,
    default_quota: Option<String>,
    default_retention: Option<String>,
    max_size: Option<String>,
    max_per_namespace: Option<String>,
    max_retention: Option<String>,
}

/// A driver's call needs some time, and kubelet waits for two minutes at most
/// before it complains.
const DEADLINES: std::ops::RangeInclusive<Duration> = Duration::from_secs(5)..=Duration::from_secs(600);

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
        let group = |name: &str| VgName::parse(name).map_err(|error| invalid(error.to_string()));
        let log_root = file.log_root.unwrap_or_else(|| PathBuf::from("/var/log/lvprov"));
        for path in [Some(&log_root), file.command_log.as_ref(), file.log_file.as_ref()].into_iter().flatten() {
            if !path.is_absolute() || path.components().any(|c| c == std::path::Component::ParentDir) {
                return Err(invalid(format!("{} is not an absolute path without ..", path.display())));
            }
        }
        let set = Reader { shown };
        let logs = file.log_volumes;
        let retention = set.time("logVolumes.defaultRetention", logs.default_retention)?;
        let deadline = set.time("deadline", file.deadline)?.unwrap_or(Duration::from_secs(60));
        if !DEADLINES.contains(&deadline) {
            return Err(invalid("deadline must be from 5s to 10m".to_owned()));
        }
        let volume_group = group(file.volume_group.as_deref().unwrap_or("vg0"))?;
        Ok(Self {
            device_classes: DeviceClasses::read(file.device_classes, &volume_group).map_err(invalid)?,
            thin_pools: ThinPool::read(file.thin_pools).map_err(invalid)?,
            volume_group,
            more_volume_groups: file.more_volume_groups.iter().map(|name| group(name)).collect::<Result<_, _>>()?,
            log_root: without_links(&log_root),
            node_name: set.parsed("nodeName", file.node_name, NodeName::parse)?,
            logs: LogLimits {
                default_size: set.bytes("logVolumes.defaultSize", logs.default_size)?,
                default_quota: set.bytes("logVolumes.defaultQuota", logs.default_quota)?,
                default_retention: retention.unwrap_or(LogLimits::default().default_retention),
                max_size: set.bytes("logVolumes.maxSize", logs.max_size)?,
                max_per_namespace: set.bytes("logVolumes.maxPerNamespace", logs.max_per_namespace)?,
                max_retention: set.time("logVolumes.maxRetention", logs.max_retention)?,
            },
            deadline,
            repair: file.repair,
            log_level: file.log_level,
            log_file: file.log_file,
            keep_lvm: file.keep_lvm.unwrap_or(true),
            command_log: file.command_log,
        })
    }

    /// The volume groups that pods may carve log volumes from.
    pub fn open_groups(&self) -> impl Iterator<Item = &VgName> {
        std::iter::once(&self.volume_group).chain(&self.more_volume_groups)
    }
}

/// Reads single settings, and names the one that is wrong.
struct Reader<'a> {
    shown: &'a str,
}

impl Reader<'_> {
    fn parsed<T, E: fmt::Display>(
        &self,
        key: &str,
        text: Option<String>,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<Option<T>, ConfigError> {
        let invalid =
            |error: E| ConfigError::Invalid { path: self.shown.to_owned(), reason: format!("{key}: {error}") };
        text.map(|text| parse(&text).map_err(invalid)).transpose()
    }

    fn bytes(&self, key: &str, text: Option<String>) -> Result<Option<u64>, ConfigError> {
        self.parsed(key, text, parse_quantity)
    }

    fn time(&self, key: &str, text: Option<String>) -> Result<Option<Duration>, ConfigError> {
        self.parsed(key, text, parse_duration)
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
    fn device_classes_name_groups_and_one_may_be_the_default() {
        let class = |name: &str| DeviceClass::parse(name).unwrap();
        let group = |config: &NodeConfig, name: Option<&str>| {
            config.device_classes.group(name.map(class).as_ref()).map(ToString::to_string)
        };
        let plain = load(r#"{"volumeGroup":"data"}"#).unwrap();
        assert_eq!(group(&plain, None).as_deref(), Some("data"));
        assert_eq!(group(&plain, Some("default")).as_deref(), Some("data"));
        assert_eq!(group(&plain, Some("fast")), None);
        let two = load(
            r#"{"deviceClasses":{"fast":{"volumeGroup":"nvme"},"bulk":{"volumeGroup":"hdd","default":true},
                "cheap":{"volumeGroup":"hdd"}}}"#,
        )
        .unwrap();
        assert_eq!(group(&two, None).as_deref(), Some("hdd"));
        assert_eq!(group(&two, Some("fast")).as_deref(), Some("nvme"));
        assert_eq!(group(&two, Some("default")), None);
        let hdd = VgName::parse("hdd").unwrap();
        assert_eq!(two.device_classes.of(&hdd).map(DeviceClass::as_str).collect::<Vec<_>>(), ["bulk", "cheap"]);
        // None of them is the default: whoever names none gets nothing.
        assert_eq!(group(&load(r#"{"deviceClasses":{"fast":{"volumeGroup":"nvme"}}}"#).unwrap(), None), None);
    }

    #[test]
    fn thin_pools_are_promised_once_unless_the_file_says_otherwise() {
        let config = load(
            r#"{"thinPools":{"vg0":{"pool":"pool0"},"vg1":{"pool":"a","overProvisioning":1.5},
                "vg2":{"pool":"b","overProvisioning":20}}}"#,
        );
        let pools: Vec<_> = config.unwrap().thin_pools.into_values().map(|pool| pool.over_provisioning).collect();
        assert_eq!(pools, [1000, 1500, 20_000]);
    }

    #[test]
    fn bounds_are_read_with_their_units() {
        let config = load(
            r#"{"deadline":"30s","repair":"safe","logLevel":"debug","nodeName":"n1","logVolumes":{"defaultSize":"1Gi",
                "defaultQuota":"100Mi","maxSize":"20Gi","maxPerNamespace":"50Gi","maxRetention":"30d"}}"#,
        );
        let config = config.unwrap();
        assert_eq!(config.deadline, Duration::from_secs(30));
        assert_eq!((config.repair, config.log_level), (Repair::Safe, LogLevel::Debug));
        let logs = config.logs;
        assert_eq!((logs.default_size, logs.default_quota), (Some(1 << 30), Some(100 << 20)));
        assert_eq!((logs.max_size, logs.max_per_namespace), (Some(20 << 30), Some(50 << 30)));
        assert_eq!(logs.max_retention, Some(Duration::from_secs(30 * 86400)));
        assert_eq!(logs.default_retention, LogLimits::default().default_retention);
    }

    #[test]
    fn a_wrong_setting_is_named() {
        for (text, word) in [
            (r#"{"logVolumes":{"maxSize":"lots"}}"#, "logVolumes.maxSize"),
            (r#"{"logVolumes":{"maxsize":"1Gi"}}"#, "maxsize"),
            (r#"{"logVolumes":{"defaultRetention":"1w"}}"#, "logVolumes.defaultRetention"),
            (r#"{"deadline":"1s"}"#, "deadline"),
            (r#"{"nodeName":"a/b"}"#, "nodeName"),
            (r#"{"repair":"force"}"#, "force"),
            (r#"{"thinPools":{"vg0":{"pool":"-a"}}}"#, "thinPools.vg0"),
            (r#"{"thinPools":{"vg0":{"pool":"a","overProvisioning":0.5}}}"#, "overProvisioning is 0.5"),
            (r#"{"thinPools":{"vg0":{"pool":"a","overProvisioning":101}}}"#, "from 1 (never) to 100"),
            (r#"{"thinPools":{"vg0":{"pool":"a","overProvisioning":-1}}}"#, "overProvisioning is -1"),
            (r#"{"thinPools":{"vg0":{"pool":"a","size":"1Gi"}}}"#, "size"),
            (r#"{"deviceClasses":{"Fast":{"volumeGroup":"a"}}}"#, "device class"),
            (r#"{"deviceClasses":{"fast":{"volumeGroup":"-a"}}}"#, "deviceClasses.fast"),
            (r#"{"deviceClasses":{"fast":{}}}"#, "volumeGroup"),
            (r#"{"deviceClasses":{"fast":{"volumeGroup":"a","thick":true}}}"#, "thick"),
            (
                r#"{"deviceClasses":{"a":{"volumeGroup":"a","default":true},"b":{"volumeGroup":"b","default":true}}}"#,
                "both be the default",
            ),
        ] {
            let error = load(text).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
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
