//! Making file systems, and what a StorageClass may ask of it.

use super::FsType;
use crate::command::{CommandError, Kind, Runner};
use crate::fault;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::path::Path;
use uuid::Uuid;

/// A file system to be made.
#[derive(Debug, Clone, Copy)]
pub struct NewFs<'a> {
    /// Its type.
    pub fs: FsType,
    /// Its UUID.
    pub uuid: Uuid,
    /// Ready for project quotas. Not for Btrfs.
    pub quota: bool,
    /// Over one of our own whose mkfs did not come to its end.
    pub again: bool,
    /// Further options, of this type.
    pub options: &'a MkfsOptions,
}

/// Makes a file system. `lock`: that of the volume, which mkfs keeps even if
/// this process dies.
pub fn make(runner: &Runner, lock: BorrowedFd<'_>, device: &Path, new: &NewFs<'_>) -> Result<(), CommandError> {
    let (program, mut args) = command(new);
    args.push(device.display().to_string());
    fault::point("mkfs-before");
    runner.run(Kind::Tool, program, &args, Some(lock))?.success()?;
    fault::point("mkfs-after");
    Ok(())
}

/// Nothing is discarded here: that took place, or was chosen not to, when the
/// last owner left.
fn command(new: &NewFs<'_>) -> (&'static str, Vec<String>) {
    let uuid = new.uuid.to_string();
    // mke2fs alone has -E, and of several only the last would count.
    let (extended, others): (Vec<&Setting>, Vec<&Setting>) =
        new.options.settings.iter().partition(|setting| setting.known.flag == "-E");
    let mut args = vec!["-q".to_owned()];
    let program = match new.fs {
        FsType::Xfs => {
            args.extend(["-K".to_owned(), "-m".to_owned(), format!("uuid={uuid}")]);
            "mkfs.xfs"
        }
        FsType::Ext4 => {
            let mut values = vec!["nodiscard".to_owned()];
            if new.quota {
                args.extend(["-O", "quota,project"].map(str::to_owned));
                values.push("quotatype=prjquota".to_owned());
            }
            values.extend(extended.into_iter().map(Setting::value_with_key));
            args.extend(["-U".to_owned(), uuid, "-E".to_owned(), values.join(",")]);
            "mkfs.ext4"
        }
        FsType::Btrfs => {
            args.extend(["-K".to_owned(), "-U".to_owned(), uuid]);
            "mkfs.btrfs"
        }
    };
    for setting in others {
        args.extend([setting.known.flag.to_owned(), setting.value_with_key()]);
    }
    if new.again && new.fs != FsType::Ext4 {
        args.push("-f".to_owned());
    }
    (program, args)
}

/// What a value must be.
#[derive(Debug, PartialEq, Eq)]
enum Value {
    /// A number, with one of the units k, m and g or without.
    Number,
    /// One of these words.
    OneOf(&'static [&'static str]),
}

/// An option that is served.
#[derive(Debug, PartialEq, Eq)]
struct Known {
    fs: FsType,
    flag: &'static str,
    /// Of `key=value`; empty where the value stands alone.
    key: &'static str,
    value: Value,
}

const fn number(fs: FsType, flag: &'static str, key: &'static str) -> Known {
    Known { fs, flag, key, value: Value::Number }
}

const fn words(fs: FsType, flag: &'static str, key: &'static str, words: &'static [&'static str]) -> Known {
    Known { fs, flag, key, value: Value::OneOf(words) }
}

const SWITCH: &[&str] = &["0", "1"];
const PROFILES: &[&str] = &["single", "dup"];

/// Everything that shapes the file system and nothing that could harm it or
/// reach beyond the device: no other device (a log, a real-time part), no
/// label or UUID, no file that is read, no way to switch checksums off.
const KNOWN: &[Known] = &[
    number(FsType::Xfs, "-b", "size"),
    number(FsType::Xfs, "-d", "agcount"),
    number(FsType::Xfs, "-d", "agsize"),
    number(FsType::Xfs, "-d", "su"),
    number(FsType::Xfs, "-d", "sw"),
    number(FsType::Xfs, "-i", "size"),
    number(FsType::Xfs, "-i", "maxpct"),
    words(FsType::Xfs, "-i", "sparse", SWITCH),
    number(FsType::Xfs, "-l", "size"),
    number(FsType::Xfs, "-l", "su"),
    words(FsType::Xfs, "-m", "bigtime", SWITCH),
    words(FsType::Xfs, "-m", "finobt", SWITCH),
    words(FsType::Xfs, "-m", "inobtcount", SWITCH),
    words(FsType::Xfs, "-m", "reflink", SWITCH),
    words(FsType::Xfs, "-m", "rmapbt", SWITCH),
    number(FsType::Xfs, "-n", "size"),
    number(FsType::Xfs, "-s", "size"),
    words(FsType::Ext4, "-b", "", &["1024", "2048", "4096"]),
    words(FsType::Ext4, "-E", "lazy_itable_init", SWITCH),
    words(FsType::Ext4, "-E", "lazy_journal_init", SWITCH),
    number(FsType::Ext4, "-E", "stride"),
    number(FsType::Ext4, "-E", "stripe_width"),
    number(FsType::Ext4, "-i", ""),
    number(FsType::Ext4, "-I", ""),
    number(FsType::Ext4, "-J", "size"),
    number(FsType::Ext4, "-m", ""),
    number(FsType::Ext4, "-N", ""),
    words(FsType::Ext4, "-T", "", &["small", "default", "big", "huge", "news", "largefile", "largefile4"]),
    words(FsType::Btrfs, "-d", "", PROFILES),
    words(FsType::Btrfs, "-m", "", PROFILES),
    number(FsType::Btrfs, "-n", ""),
    words(FsType::Btrfs, "--csum", "", &["crc32c", "xxhash", "sha256", "blake2"]),
];

/// A longer text is no list of options.
const LONGEST: usize = 500;

/// Options of mkfs, in the words of mkfs.xfs(8), mke2fs(8) and mkfs.btrfs(8).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MkfsOptions {
    settings: Vec<Setting>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Setting {
    known: &'static Known,
    value: String,
}

impl Setting {
    fn value_with_key(&self) -> String {
        if self.known.key.is_empty() { self.value.clone() } else { format!("{}={}", self.known.key, self.value) }
    }
}

/// An option of mkfs that is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MkfsOptionError {
    /// It is not on the list.
    #[error("mkfs option {option:?} is not served for {fs}; served are {}", served(*.fs))]
    Unknown {
        /// As given.
        option: String,
        /// The file system.
        fs: FsType,
    },
    /// An option without its value.
    #[error("mkfs option {0:?} has no value; options are written as for mkfs, such as \"-i size=1024 -m reflink=0\"")]
    NoValue(String),
    /// A value that it cannot have.
    #[error("mkfs option {option} is {value:?}; it must be {rule}")]
    Value {
        /// The option.
        option: String,
        /// As given.
        value: String,
        /// What it must be.
        rule: String,
    },
    /// The same once more.
    #[error("mkfs option {0} is given twice")]
    Twice(String),
    /// Too long to be true.
    #[error("the mkfs options are longer than {LONGEST} characters")]
    TooLong,
}

fn served(fs: FsType) -> String {
    let options: Vec<String> = KNOWN.iter().filter(|known| known.fs == fs).map(Known::to_string).collect();
    options.join(", ")
}

impl fmt::Display for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.flag)?;
        if self.key.is_empty() { Ok(()) } else { write!(f, " {}", self.key) }
    }
}

impl Value {
    fn takes(&self, text: &str) -> bool {
        match self {
            Self::OneOf(words) => words.contains(&text),
            Self::Number => {
                let digits = text.strip_suffix(['k', 'm', 'g']).unwrap_or(text);
                (1..=12).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit())
            }
        }
    }

    fn rule(&self) -> String {
        match self {
            Self::OneOf(words) => format!("one of {}", words.join(", ")),
            Self::Number => "a number such as 16, 64k or 1g".to_owned(),
        }
    }
}

fn shown(text: &str) -> String {
    text.chars().take(40).collect()
}

impl MkfsOptions {
    /// Parses options for `fs`, written as on the command line of its mkfs:
    /// `-i size=1024,maxpct=10 -m reflink=0`. Each is from the list that is served.
    ///
    /// # Errors
    /// The first one that is refused.
    pub fn parse(fs: FsType, text: &str) -> Result<Self, MkfsOptionError> {
        if text.len() > LONGEST {
            return Err(MkfsOptionError::TooLong);
        }
        let mut settings: Vec<Setting> = Vec::new();
        let mut rest = text.split_whitespace();
        while let Some(flag) = rest.next() {
            let values = rest.next().ok_or_else(|| MkfsOptionError::NoValue(shown(flag)))?;
            for part in values.split(',') {
                let (key, value) = part.split_once('=').unwrap_or(("", part));
                let known = KNOWN.iter().find(|known| known.fs == fs && known.flag == flag && known.key == key);
                let Some(known) = known else {
                    return Err(MkfsOptionError::Unknown { option: shown(&format!("{flag} {part}")), fs });
                };
                if !known.value.takes(value) {
                    let (option, rule) = (known.to_string(), known.value.rule());
                    return Err(MkfsOptionError::Value { option, value: shown(value), rule });
                }
                if settings.iter().any(|setting| setting.known == known) {
                    return Err(MkfsOptionError::Twice(known.to_string()));
                }
                settings.push(Setting { known, value: value.to_owned() });
            }
        }
        Ok(Self { settings })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::fd::AsFd;

    fn options(fs: FsType, text: &str) -> MkfsOptions {
        MkfsOptions::parse(fs, text).unwrap()
    }

    fn line(fs: FsType, quota: bool, again: bool, text: &str) -> String {
        let options = options(fs, text);
        let (program, args) = command(&NewFs { fs, uuid: Uuid::nil(), quota, again, options: &options });
        format!("{program} {}", args.join(" ")).replace(&Uuid::nil().to_string(), "U")
    }

    #[test]
    fn what_is_run_for_each() {
        for (fs, quota, again, text, expected) in [
            (FsType::Xfs, false, false, "", "mkfs.xfs -q -K -m uuid=U"),
            (
                FsType::Xfs,
                true,
                true,
                " -i size=1024,maxpct=10  -m reflink=0",
                "mkfs.xfs -q -K -m uuid=U -i size=1024 -i maxpct=10 -m reflink=0 -f",
            ),
            (FsType::Ext4, false, true, "", "mkfs.ext4 -q -U U -E nodiscard"),
            (
                FsType::Ext4,
                true,
                false,
                "-E stride=16,stripe_width=64 -m 1",
                "mkfs.ext4 -q -O quota,project -U U -E nodiscard,quotatype=prjquota,stride=16,stripe_width=64 -m 1",
            ),
            (FsType::Btrfs, false, true, "-m single --csum xxhash", "mkfs.btrfs -q -K -U U -m single --csum xxhash -f"),
        ] {
            assert_eq!(line(fs, quota, again, text), expected);
        }
    }

    #[test]
    fn only_what_is_on_the_list_is_taken() {
        use MkfsOptionError::{NoValue, Twice, Unknown, Value};
        let refused = |fs, text| MkfsOptions::parse(fs, text).unwrap_err();
        for text in [
            "-m uuid=x",
            "-m crc=0",
            "-l logdev=/dev/sda",
            "-r rtdev=/dev/sda",
            "-d file=1",
            "-d name=/dev/sda",
            "-p /etc/passwd",
            "-f 1",
            "/dev/sda -f",
            "-L label",
            "-N 1",
            "-d agcount",
            "-c options=/etc/x",
            "-E x=1",
        ] {
            assert!(matches!(refused(FsType::Xfs, text), Unknown { .. }), "{text}");
        }
        for text in
            ["-O ^metadata_csum", "-E root_owner=0:0", "-d /etc", "-J device=/dev/sda", "-U x", "-F 1", "-m uuid=1"]
        {
            assert!(matches!(refused(FsType::Ext4, text), Unknown { .. }), "{text}");
        }
        for text in ["-r /etc", "--rootdir /etc", "-U x", "-O x", "-M 1", "-d raid0x=1"] {
            assert!(matches!(refused(FsType::Btrfs, text), Unknown { .. }), "{text}");
        }
        for text in ["-d agcount=-1", "-i size=", "-i size=1k;", "-i size=1e3", "-m reflink=2", "-i size=9999999999999"]
        {
            assert!(matches!(refused(FsType::Xfs, text), Value { .. }), "{text}");
        }
        assert!(matches!(refused(FsType::Btrfs, "-d raid0"), Value { .. }));
        assert!(matches!(refused(FsType::Xfs, "-i"), NoValue(_)));
        assert!(matches!(refused(FsType::Xfs, "-i size=512 -i size=1024"), Twice(_)));
        assert_eq!(MkfsOptions::parse(FsType::Xfs, &" ".repeat(501)), Err(MkfsOptionError::TooLong));
        let text = refused(FsType::Xfs, "-i typo=1").to_string();
        assert!(text.contains("-i size") && !text.contains("-T"), "{text}");
    }

    #[test]
    fn all_that_is_served_is_taken_by_mkfs() {
        for fs in [FsType::Xfs, FsType::Ext4, FsType::Btrfs] {
            for known in KNOWN.iter().filter(|known| known.fs == fs) {
                let value = match (&known.value, known.to_string().as_str()) {
                    (Value::OneOf(words), _) => words[words.len() - 1],
                    (_, "-b size" | "-n size") => "4k",
                    (_, "-s size") => "512",
                    (_, "-d agsize") => "256m",
                    (_, "-d su" | "-l su") => "64k",
                    (_, "-l size" | "-J size") if fs == FsType::Xfs => "100m",
                    (_, "-i") => "16384",
                    (_, "-n") => "16k",
                    (_, "-i size" | "-I") => "512",
                    _ => "8",
                };
                let mut text = format!(
                    "{} {}",
                    known.flag,
                    if known.key.is_empty() { value.to_owned() } else { format!("{}={value}", known.key) }
                );
                match known.to_string().as_str() {
                    "-d su" => text.push_str(",sw=4"),
                    "-d sw" => text.push_str(",su=64k"),
                    "-E stripe_width" => text.push_str(",stride=8"),
                    _ => {}
                }
                let file = tempfile::NamedTempFile::new().unwrap();
                file.as_file().set_len(1 << 30).unwrap();
                let options = options(fs, &text);
                let new = NewFs { fs, uuid: Uuid::from_u128(7), quota: false, again: false, options: &options };
                make(&Runner::default(), file.as_file().as_fd(), file.path(), &new)
                    .unwrap_or_else(|error| panic!("{fs} {text}: {error}"));
            }
        }
    }

    proptest! {
        /// Whatever is taken gives pairs of a flag on the list and a plain word.
        #[test]
        fn nothing_else_reaches_the_command_line(text in "[-a-zA-Z0-9=,;/$ .]{0,60}") {
            for fs in [FsType::Xfs, FsType::Ext4, FsType::Btrfs] {
                let Ok(options) = MkfsOptions::parse(fs, &text) else { continue };
                for setting in &options.settings {
                    prop_assert!(KNOWN.contains(setting.known));
                    prop_assert!(setting.value.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{}", setting.value);
                }
            }
        }
    }
}
