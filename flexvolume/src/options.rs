//! The user's options, parsed into what is to be done.

use lvm::filesystem::{FsTypeError, MountOptionError, MountOptions};
use lvm::names::{ClaimUid, LogVolumeName, LvName, NameError, VgName};
use lvm::size::{QuantityError, human, parse_quantity};
use std::collections::BTreeMap;
use std::time::Duration;

/// Kept this long after its last use, where the options do not say.
const DEFAULT_RETENTION: Duration = Duration::from_secs(7 * 24 * 3600);

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
    #[error("option retention is {0:?}; it must be a time such as 90s, 30m, 24h or 7d")]
    Retention(String),
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
        /// Further mount options.
        mount: MountOptions,
    },
    /// A pod's directory of a log volume.
    Log {
        /// Volume group, where it is not the node's default.
        vg: Option<VgName>,
        /// The log volume.
        volume: LogVolumeName,
        /// Bytes of the volume, at least.
        size: u64,
        /// Bytes of the pod's directory, at most.
        quota: u64,
        /// How long the directory is kept.
        retention: Duration,
    },
}

const DATA: &str = "volumeGroup, logicalVolume, claimUID";
const DATA_TAKES: &str = "volumeGroup, logicalVolume, claimUID and mountOptions";
const LOG: &str = "volume, size and quota";
const LOG_TAKES: &str = "volume, size, quota, retention and volumeGroup";

impl Options {
    /// Parses the user's options. Nothing unknown is passed over: it may be a
    /// quota with a typing error.
    pub fn parse<'a>(user: impl Iterator<Item = (&'a str, &'a str)>) -> Result<Self, OptionsError> {
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
                mount: MountOptions::parse(take("mountOptions").unwrap_or(""))?,
            }
        } else {
            let volume = LogVolumeName::parse(need("volume", take("volume"))?)?;
            let size = size("size", need("size", take("size"))?)?;
            let quota = size_of_quota(need("quota", take("quota"))?, size)?;
            let retention = take("retention").map_or(Ok(DEFAULT_RETENTION), duration)?;
            let vg = take("volumeGroup").map(VgName::parse).transpose()?;
            Self::Log { vg, volume, size, quota, retention }
        };
        match options.keys().next() {
            None => Ok(parsed),
            Some(option) => Err(OptionsError::Unknown { option: option.chars().take(60).collect(), kind, takes }),
        }
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

fn duration(text: &str) -> Result<Duration, OptionsError> {
    let refuse = || OptionsError::Retention(text.chars().take(40).collect());
    let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(refuse)?;
    let (number, unit) = text.split_at(split);
    let scale = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return Err(refuse()),
    };
    let number: u64 = number.parse().map_err(|_| refuse())?;
    // A hundred years: far from any overflow of a time.
    let seconds = number.checked_mul(scale).filter(|s| *s <= 100 * 365 * 24 * 3600).ok_or_else(refuse)?;
    Ok(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(options: &[(&str, &str)]) -> Result<Options, OptionsError> {
        Options::parse(options.iter().copied())
    }

    const LOG_OPTIONS: [(&str, &str); 4] =
        [("type", "log"), ("volume", "web-logs"), ("size", "1Gi"), ("quota", "100Mi")];

    #[test]
    fn a_log_volume_as_the_readme_writes_it() {
        let Options::Log { vg, volume, size, quota, retention } = parse(&LOG_OPTIONS).unwrap() else { panic!() };
        assert_eq!((vg, volume.as_str(), size, quota), (None, "web-logs", 1 << 30, 100 << 20));
        assert_eq!(retention, DEFAULT_RETENTION);
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

    #[test]
    fn times() {
        for (text, seconds) in [("0s", 0), ("90s", 90), ("30m", 1800), ("24h", 86400), ("7d", 604_800)] {
            assert_eq!(duration(text).unwrap(), Duration::from_secs(seconds));
        }
    }

    proptest! {
        #[test]
        fn any_options_are_taken_or_refused(key in "[a-zA-Z]{0,12}", value in "\\PC{0,30}") {
            let mut options = LOG_OPTIONS.to_vec();
            options.push((&key, &value));
            let _ = parse(&options);
        }
    }
}
