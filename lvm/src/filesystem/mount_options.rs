//! How a volume is mounted.

use nix::mount::MsFlags;

/// Mount options that a StorageClass may ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountOptions {
    /// Flags for mount(2).
    pub flags: MsFlags,
    /// Options that the file system itself reads.
    pub data: Vec<&'static str>,
}

/// A mount option that is not on the list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("mount option {0:?} is not served; served are {SERVED}")]
pub struct MountOptionError(String);

const SERVED: &str =
    "noatime, nodiratime, relatime, strictatime, lazytime, nodev, nosuid, noexec, sync, dirsync, discard and nodiscard";

impl Default for MountOptions {
    fn default() -> Self {
        Self { flags: MsFlags::empty(), data: Vec::new() }
    }
}

impl MountOptions {
    /// The options of a text, one by one.
    pub fn words(text: &str) -> impl Iterator<Item = &str> {
        text.split(',').map(str::trim).filter(|word| !word.is_empty())
    }

    /// Parses options separated by commas, each from the list that is served.
    pub fn parse(text: &str) -> Result<Self, MountOptionError> {
        let mut options = Self::default();
        for word in Self::words(text) {
            match word {
                "noatime" => options.flags |= MsFlags::MS_NOATIME,
                "nodiratime" => options.flags |= MsFlags::MS_NODIRATIME,
                "relatime" => options.flags |= MsFlags::MS_RELATIME,
                "strictatime" => options.flags |= MsFlags::MS_STRICTATIME,
                "lazytime" => options.flags |= MsFlags::MS_LAZYTIME,
                "nodev" => options.flags |= MsFlags::MS_NODEV,
                "nosuid" => options.flags |= MsFlags::MS_NOSUID,
                "noexec" => options.flags |= MsFlags::MS_NOEXEC,
                "sync" => options.flags |= MsFlags::MS_SYNCHRONOUS,
                "dirsync" => options.flags |= MsFlags::MS_DIRSYNC,
                "discard" => options.data.push("discard"),
                "nodiscard" => options.data.push("nodiscard"),
                other => return Err(MountOptionError(other.chars().take(40).collect())),
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_options_come_from_a_list() {
        let options = MountOptions::parse("noatime, discard,,nodev").unwrap();
        assert_eq!(options.flags, MsFlags::MS_NOATIME | MsFlags::MS_NODEV);
        assert_eq!(options.data, ["discard"]);
        for bad in ["rw", "ro", "suid", "context=x", "bind", "remount", "nouuid", "logdev=/dev/sda", "discard discard"]
        {
            assert!(MountOptions::parse(bad).is_err(), "{bad}");
        }
    }
}
