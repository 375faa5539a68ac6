//! What a volume's options say, in a FlexVolume or an inline CSI volume alike:
//! flat strings, parsed into what is to be done.

use crate::config::LogLimits;
use crate::duration::{DurationError, parse_duration};
use crate::filesystem::{FsTypeError, MountOptionError, MountOptions};
use crate::logs::Ownership;
use crate::logs::template::{Template, TemplateError};
use crate::mounts::BindOptions;
use crate::names::{ClaimUid, LogVolumeName, LvName, NameError, VgName};
use crate::quota;
use crate::size::{QuantityError, human, parse_quantity};
use nix::mount::MsFlags;
use std::collections::BTreeMap;
use std::time::Duration;

/// Options that were refused.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// The kind of volume is not known.
    #[error("option type is {0:?}; it must be data or log")]
    Type(String),
    /// An option that must be there is missing.
    #[error("option {option} is missing; a volume of type {kind} needs {needs}")]
    Missing {
        /// The option.
        option: &'static str,
        /// The kind of volume.
        kind: &'static str,
        /// All that it needs.
        needs: &'static str,
    },
    /// An option that is not known.
    #[error("option {option:?} is not known; a volume of type {kind} takes {takes}")]
    Unknown {
        /// The option.
        option: String,
        /// The kind of volume.
        kind: &'static str,
        /// All that it takes.
        takes: &'static str,
    },
    /// A size that is no size.
    #[error("option {option}: {source}")]
    Quantity {
        /// The option.
        option: &'static str,
        /// What is wrong with it.
        source: QuantityError,
    },
    /// A size out of bounds.
    #[error("option {option} is {}; {rule}", human(*.bytes))]
    Bounds {
        /// The option.
        option: &'static str,
        /// Bytes asked for.
        bytes: u64,
        /// What it must be.
        rule: &'static str,
    },
    /// A retention that is no time.
    #[error("option retention: {0}")]
    Retention(#[from] DurationError),
    /// A number of files that is none.
    #[error("option inodes is {0:?}; it must be a number of files, 16 at least, such as 5000 or 10k")]
    Inodes(String),
    /// Neither yes nor no.
    #[error("option onePod is {0:?}; it must be true or false")]
    OnePod(String),
    /// An owner that is none.
    #[error("option owner is {0:?}; it must be a user id, or a user and a group id, such as 1000 or 1000:2000")]
    Owner(String),
    /// A mode that is none.
    #[error("option mode is {0:?}; it must be three or four octal digits such as 0750, without set-user-id")]
    Mode(String),
    /// A mount option that log volumes do not have.
    #[error(
        "mount option {0:?} is not served for log volumes; served are exec, noatime, nodiratime, relatime and strictatime. nodev and nosuid always apply, and noexec where exec is not asked for"
    )]
    LogMountOption(String),
    /// A name for the directory that is none.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A name that is not valid.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A mount option that is not served.
    #[error(transparent)]
    MountOption(#[from] MountOptionError),
    /// A file system that is not served.
    #[error(transparent)]
    FsType(#[from] FsTypeError),
}

/// What the user asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Options {
    /// A data volume that the provisioner has made.
    Data {
        /// Volume group.
        vg: VgName,
        /// Logical volume.
        lv: LvName,
        /// The claim it was made for.
        claim_uid: ClaimUid,
        /// Whether it is for one pod alone.
        one_pod: bool,
        /// Further mount options.
        mount: MountOptions,
        /// How its file system is made, in the words of [`crate::filesystem::MkfsOptions`]: these
        /// depend on its type, which is told elsewhere.
        mkfs: String,
    },
    /// A pod's directory of a log volume.
    Log(LogOptions),
}

/// What the user asks for of a log volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogOptions {
    /// Volume group, where it is not the node's default.
    pub vg: Option<VgName>,
    /// The log volume.
    pub volume: LogVolumeName,
    /// Bytes of the volume, at least.
    pub size: u64,
    /// Bytes of the pod's directory, at most.
    pub quota: u64,
    /// Files in the pod's directory, at most.
    pub files: u64,
    /// How long the directory is kept.
    pub retention: Duration,
    /// Name of the directory.
    pub sub_path: Template,
    /// Owner of the directory.
    pub owner: Ownership,
    /// Mode of the directory.
    pub mode: Option<u32>,
    /// How it is mounted; whether only for reading is kubelet's to say.
    pub mount: BindOptions,
}

const DATA: &str = "volumeGroup, logicalVolume, claimUID";
const DATA_TAKES: &str = "volumeGroup, logicalVolume, claimUID, onePod, mountOptions and mkfsOptions";
const LOG: &str = "volume, size and quota";
const LOG_TAKES: &str = "volume, size, quota, inodes, retention, volumeGroup, subPath, owner, mode and mountOptions";
/// A directory with less than this is of no use to anybody.
const LEAST_FILES: u64 = 16;

impl Options {
    /// Parses the user's options; `limits` are the node's, whose defaults count
    /// where the user does not say. Nothing unknown is passed over: it may be a
    /// quota with a typing error.
    pub fn parse<'a>(user: impl Iterator<Item = (&'a str, &'a str)>, limits: &LogLimits) -> Result<Self, OptionsError> {
        let mut options: BTreeMap<&str, &str> = user.collect();
        let kind = options.remove("type").unwrap_or("");
        let (kind, needs, takes) = match kind {
            "data" => ("data", DATA, DATA_TAKES),
            "log" => ("log", LOG, LOG_TAKES),
            other => return Err(OptionsError::Type(other.chars().take(40).collect())),
        };
        let mut take = |option: &'static str| options.remove(option);
        let need = |option, value: Option<&'a str>| value.ok_or(OptionsError::Missing { option, kind, needs });
        let parsed = if kind == "data" {
            Self::Data {
                vg: VgName::parse(need("volumeGroup", take("volumeGroup"))?)?,
                lv: LvName::parse(need("logicalVolume", take("logicalVolume"))?)?,
                claim_uid: ClaimUid::parse(need("claimUID", take("claimUID"))?)?,
                one_pod: one_pod(take("onePod"))?,
                mount: MountOptions::parse(take("mountOptions").unwrap_or(""))?,
                mkfs: take("mkfsOptions").unwrap_or("").to_owned(),
            }
        } else {
            let volume = LogVolumeName::parse(need("volume", take("volume"))?)?;
            let size = match (take("size"), limits.default_size) {
                (None, Some(default)) => default,
                (text, _) => size("size", need("size", text)?)?,
            };
            let quota = match (take("quota"), limits.default_quota) {
                (None, Some(default)) => default.min(size),
                (text, _) => size_of_quota(need("quota", text)?, size)?,
            };
            Self::Log(LogOptions {
                vg: take("volumeGroup").map(VgName::parse).transpose()?,
                volume,
                size,
                quota,
                files: take("inodes").map_or(Ok(quota::files_for(quota)), files)?,
                retention: take("retention").map_or(Ok(limits.default_retention), parse_duration)?,
                sub_path: take("subPath").map_or(Ok(Template::default()), str::parse)?,
                owner: take("owner").map_or(Ok(Ownership::default()), owner)?,
                mode: take("mode").map(mode).transpose()?,
                mount: log_mount(take("mountOptions").unwrap_or(""))?,
            })
        };
        match options.keys().next() {
            None => Ok(parsed),
            Some(option) => Err(OptionsError::Unknown { option: option.chars().take(60).collect(), kind, takes }),
        }
    }
}

fn one_pod(text: Option<&str>) -> Result<bool, OptionsError> {
    match text {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(other) => Err(OptionsError::OnePod(shown(other))),
    }
}

fn size(option: &'static str, text: &str) -> Result<u64, OptionsError> {
    let bytes = parse_quantity(text).map_err(|source| OptionsError::Quantity { option, source })?;
    if bytes == 0 {
        return Err(OptionsError::Bounds { option, bytes, rule: "it must be more than 0" });
    }
    Ok(bytes)
}

fn size_of_quota(text: &str, of: u64) -> Result<u64, OptionsError> {
    let bytes = size("quota", text)?;
    if bytes > of {
        return Err(OptionsError::Bounds { option: "quota", bytes, rule: "it must not be more than size" });
    }
    Ok(bytes)
}

fn shown(text: &str) -> String {
    text.chars().take(40).collect()
}

fn files(text: &str) -> Result<u64, OptionsError> {
    let number = parse_quantity(text).ok().filter(|number| (LEAST_FILES..=u64::from(u32::MAX)).contains(number));
    number.ok_or_else(|| OptionsError::Inodes(shown(text)))
}

fn owner(text: &str) -> Result<Ownership, OptionsError> {
    let refuse = || OptionsError::Owner(shown(text));
    // The last id means "leave it" to chown(2), and a sign is none of a number's.
    let id = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        text.parse::<u32>().ok().filter(|id| digits && *id != u32::MAX).ok_or_else(refuse)
    };
    let (user, group) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
    Ok(Ownership { user: Some(id(user)?), group: group.map(id).transpose()? })
}

fn mode(text: &str) -> Result<u32, OptionsError> {
    let octal = (3..=4).contains(&text.len()) && text.bytes().all(|b| (b'0'..=b'7').contains(&b));
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| octal && mode & 0o4000 == 0);
    mode.ok_or_else(|| OptionsError::Mode(shown(text)))
}

fn log_mount(text: &str) -> Result<BindOptions, OptionsError> {
    let mut options = BindOptions::default();
    for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        match word {
            "exec" => options.exec = true,
            "noatime" => options.access_times |= MsFlags::MS_NOATIME,
            "nodiratime" => options.access_times |= MsFlags::MS_NODIRATIME,
            "relatime" => options.access_times |= MsFlags::MS_RELATIME,
            "strictatime" => options.access_times |= MsFlags::MS_STRICTATIME,
            // As it is in any case.
            "nodev" | "nosuid" => {}
            other => return Err(OptionsError::LogMountOption(shown(other))),
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(options: &[(&str, &str)]) -> Result<Options, OptionsError> {
        Options::parse(options.iter().copied(), &LogLimits::default())
    }

    fn log(options: &[(&str, &str)]) -> LogOptions {
        match parse(options).unwrap() {
            Options::Log(log) => log,
            data => panic!("{data:?}"),
        }
    }

    const LOG_OPTIONS: [(&str, &str); 4] =
        [("type", "log"), ("volume", "web-logs"), ("size", "1Gi"), ("quota", "100Mi")];

    #[test]
    fn a_log_volume_as_the_readme_writes_it() {
        let log = log(&LOG_OPTIONS);
        assert_eq!((log.vg, log.volume.as_str(), log.size, log.quota), (None, "web-logs", 1 << 30, 100 << 20));
        assert_eq!((log.files, log.retention), (6400, LogLimits::default().default_retention));
        assert_eq!((log.owner, log.mode, log.mount), (Ownership::default(), None, BindOptions::default()));
    }

    #[test]
    fn all_that_a_log_volume_takes() {
        let mut options = LOG_OPTIONS.to_vec();
        options.extend([
            ("inodes", "10k"),
            ("retention", "72h"),
            ("volumeGroup", "slow"),
            ("subPath", "{pod}_{uid}"),
            ("owner", "1000:2000"),
            ("mode", "2750"),
            ("mountOptions", "exec, noatime"),
        ]);
        let log = log(&options);
        assert_eq!((log.files, log.retention), (10_000, Duration::from_secs(72 * 3600)));
        assert_eq!(log.owner, Ownership { user: Some(1000), group: Some(2000) });
        assert_eq!((log.mode, log.sub_path), (Some(0o2750), "{pod}_{uid}".parse().unwrap()));
        assert_eq!(log.mount, BindOptions { exec: true, access_times: MsFlags::MS_NOATIME, read_only: false });
    }

    #[test]
    fn the_nodes_defaults_count_where_the_pod_does_not_say() {
        let limits = LogLimits { default_size: Some(1 << 30), default_quota: Some(2 << 30), ..LogLimits::default() };
        let options = [("type", "log"), ("volume", "web-logs")];
        let Options::Log(log) = Options::parse(options.into_iter(), &limits).unwrap() else { panic!() };
        // A default quota never asks for more than the volume has.
        assert_eq!((log.size, log.quota), (1 << 30, 1 << 30));
        let more = options.into_iter().chain([("size", "4Gi")]);
        let Options::Log(log) = Options::parse(more, &limits).unwrap() else { panic!() };
        assert_eq!((log.size, log.quota), (4 << 30, 2 << 30));
    }

    #[test]
    fn each_missing_option_is_named() {
        for missing in 1..LOG_OPTIONS.len() {
            let mut options = LOG_OPTIONS.to_vec();
            let (name, _) = options.remove(missing);
            let error = parse(&options).unwrap_err().to_string();
            assert!(error.contains(&format!("option {name} is missing")), "{error}");
        }
        assert!(matches!(parse(&[]), Err(OptionsError::Type(_))));
    }

    #[test]
    fn bad_values_are_refused() {
        for (key, value) in [
            ("volume", "../x"),
            ("volume", "a/b"),
            ("size", "0"),
            ("size", "lots"),
            ("size", "-1Gi"),
            ("quota", "0"),
            ("quota", "2Gi"),
            ("retention", "1"),
            ("retention", "1w"),
            ("retention", "-1h"),
            ("retention", "99999999999d"),
            ("volumeGroup", "-y"),
            ("qouta", "1Gi"),
            ("inodes", "0"),
            ("inodes", "many"),
            ("inodes", "5G"),
            ("owner", "root"),
            ("owner", ""),
            ("owner", "1:"),
            ("owner", ":1"),
            ("owner", "+1"),
            ("owner", "4294967295"),
            ("mode", "4755"),
            ("mode", "75"),
            ("mode", "0o75"),
            ("mode", "888"),
            ("subPath", "../{pod}"),
            ("subPath", "all"),
            ("mountOptions", "dev"),
            ("mountOptions", "suid"),
            ("mountOptions", "remount"),
            ("type", "tmp"),
        ] {
            let mut options = LOG_OPTIONS.to_vec();
            options.retain(|(k, _)| *k != key);
            options.push((key, value));
            assert!(parse(&options).is_err(), "{key}={value}");
        }
    }

    #[test]
    fn a_data_volume_needs_its_claim() {
        let uid = "0f0e7f0a-1111-4222-8333-444455556666";
        let all = [("type", "data"), ("volumeGroup", "vg0"), ("logicalVolume", "pvc-x"), ("claimUID", uid)];
        assert!(parse(&all).is_ok());
        assert!(parse(&all[..3]).is_err());
        let mut more = all.to_vec();
        more.push(("mountOptions", "noatime,suid"));
        assert!(matches!(parse(&more), Err(OptionsError::MountOption(_))));
    }

    proptest! {
        #[test]
        fn any_options_are_taken_or_refused(key in "[a-zA-Z]{0,12}", value in "\\PC{0,30}") {
            let mut options = LOG_OPTIONS.to_vec();
            options.push((&key, &value));
            let _ = parse(&options);
        }

        #[test]
        fn any_owner_and_mode_is_taken_or_refused(text in "[0-9:+-]{0,12}") {
            let _ = (owner(&text), mode(&text), files(&text));
        }
    }
}
