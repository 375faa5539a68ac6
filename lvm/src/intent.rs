//! What a data volume is meant for, and what becomes of it in the end: tags
//! that it gets when it is made, beside those of its owner.

use crate::duration::parse_duration;
use crate::names::{LvName, VgName};
use std::fmt;
use std::time::Duration;

pub(crate) const BLOCK: &str = "lvprov.io/mode=block";
const DELETE: &str = "lvprov.io/delete=";
const TRASH_TIME: &str = "lvprov.io/trash-time=";
const CLASS: &str = "lvprov.io/class=";
const TRASHED: &str = "lvprov.io/trashed=";
const FROM: &str = "lvprov.io/from=";
const SPARE: &str = "lvprov.io/spare";

/// The tag of a volume that is being overwritten: it is nobody's to use. A new
/// raw volume has it until it holds nothing but zeros, one that is made from
/// another until it is its owner's in all, a discarded one from then on.
pub const WIPING: &str = "lvprov.io/wiping";

/// What is done with the bytes of a volume before its extents are free again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeletePolicy {
    /// Nothing.
    #[default]
    Remove,
    /// The disk is told that they are not needed.
    Discard,
    /// They are overwritten with zeros.
    Zero,
}

/// A policy that is not served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not served; use remove, discard or zero")]
pub struct DeletePolicyError(String);

impl std::str::FromStr for DeletePolicy {
    type Err = DeletePolicyError;
    fn from_str(text: &str) -> Result<Self, DeletePolicyError> {
        match text {
            "remove" => Ok(Self::Remove),
            "discard" => Ok(Self::Discard),
            "zero" => Ok(Self::Zero),
            other => Err(DeletePolicyError(other.chars().take(40).collect())),
        }
    }
}

impl fmt::Display for DeletePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Remove => "remove",
            Self::Discard => "discard",
            Self::Zero => "zero",
        })
    }
}

/// What a volume is meant for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Intent {
    /// A raw device for its pods, with no file system of ours.
    pub block: bool,
    /// What is done with its bytes in the end.
    pub delete: DeletePolicy,
    /// How long it is kept in the trash before that.
    pub trash_time: Duration,
    /// The StorageClass that it was made for, where that is known.
    pub class: Option<String>,
}

impl Intent {
    /// The tags that `lvcreate --addtag` is given.
    pub fn to_tags(&self) -> Vec<String> {
        let mut tags = Vec::new();
        if self.block {
            tags.push(BLOCK.to_owned());
        }
        if self.delete != DeletePolicy::Remove {
            tags.push(format!("{DELETE}{}", self.delete));
        }
        if !self.trash_time.is_zero() {
            tags.push(format!("{TRASH_TIME}{}s", self.trash_time.as_secs()));
        }
        if let Some(class) = &self.class {
            tags.push(format!("{CLASS}{class}"));
        }
        tags
    }

    /// Whether its end takes more than one `lvremove`.
    pub fn is_trashed_first(&self) -> bool {
        self.delete != DeletePolicy::Remove || !self.trash_time.is_zero()
    }
}

/// What a volume was made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// It has been copied; else it shares what neither has overwritten.
    pub copied: bool,
    /// The group of the snapshot, or of the thin volume.
    pub vg: VgName,
    /// The snapshot, or the thin volume.
    pub name: LvName,
}

impl Origin {
    /// The tag that `lvcreate --addtag` is given.
    pub fn to_tag(&self) -> String {
        let how = if self.copied { "copy" } else { "thin" };
        format!("{FROM}{how}:{}/{}", self.vg, self.name)
    }

    fn parse(text: &str) -> Option<Self> {
        let (how, place) = text.split_once(':')?;
        let copied = match how {
            "copy" => true,
            "thin" => false,
            _ => return None,
        };
        let (vg, name) = place.split_once('/')?;
        Some(Self { copied, vg: VgName::parse(vg).ok()?, name: LvName::parse(name).ok()? })
    }
}

/// What a volume's tags say beside its owner.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Marks {
    /// What it is meant for.
    pub intent: Intent,
    /// It is being overwritten.
    pub wiping: bool,
    /// Since when it has been in the trash, in seconds since 1970.
    pub trashed: Option<i64>,
    /// It is room for the growth of another volume, see `lvm::grow`.
    pub spare: bool,
    /// What it was made from, if anything.
    pub origin: Option<Origin>,
}

impl Marks {
    /// Reads them. What cannot be read counts as what destroys least.
    pub fn from_tags<'a>(tags: impl IntoIterator<Item = &'a str>) -> Self {
        let mut marks = Self::default();
        for tag in tags {
            match tag {
                BLOCK => marks.intent.block = true,
                WIPING => marks.wiping = true,
                SPARE => marks.spare = true,
                _ => {}
            }
            if let Some(policy) = tag.strip_prefix(DELETE) {
                marks.intent.delete = policy.parse().unwrap_or_default();
            }
            if let Some(time) = tag.strip_prefix(TRASH_TIME) {
                marks.intent.trash_time = parse_duration(time).unwrap_or(Duration::MAX);
            }
            if let Some(from) = tag.strip_prefix(FROM) {
                marks.origin = Origin::parse(from);
            }
            if let Some(class) = tag.strip_prefix(CLASS) {
                marks.intent.class = Some(class.to_owned());
            }
            if let Some(since) = tag.strip_prefix(TRASHED) {
                marks.trashed = Some(since.parse().unwrap_or(i64::MAX));
            }
        }
        marks
    }

    /// When its time in the trash ends, in seconds since 1970.
    pub fn trashed_until(&self) -> Option<i64> {
        let time = i64::try_from(self.intent.trash_time.as_secs()).unwrap_or(i64::MAX);
        self.trashed.map(|since| since.saturating_add(time))
    }
}

/// The tag of a volume that goes to the trash now.
pub fn trashed_tag(now: i64) -> String {
    format!("{TRASHED}{now}")
}

/// The tag of room for a growth.
pub fn spare_tag() -> String {
    SPARE.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn tags_go_both_ways(
            block: bool, delete in prop_oneof![Just(DeletePolicy::Remove), Just(DeletePolicy::Discard), Just(DeletePolicy::Zero)],
            seconds in 0u64..100_000_000, class in proptest::option::of("[a-z0-9]{1,20}(\\.[a-z0-9-]{1,20}[a-z0-9])?"),
        ) {
            let intent = Intent { block, delete, trash_time: Duration::from_secs(seconds), class };
            let tags = intent.to_tags();
            for tag in &tags {
                prop_assert!(tag.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+.-/=!:&#".contains(&b)), "{}", tag);
            }
            let marks = Marks::from_tags(tags.iter().map(String::as_str).rev());
            prop_assert_eq!(&marks.intent, &intent);
            prop_assert!(!marks.wiping && marks.trashed.is_none());
        }

        #[test]
        fn any_tag_is_read(tags in proptest::collection::vec("(lvprov.io/[a-z-]{1,12}=?)?[ -~]{0,20}", 0..6)) {
            let _ = Marks::from_tags(tags.iter().map(String::as_str));
        }
    }

    #[test]
    fn what_a_volume_was_made_from_goes_both_ways() {
        for copied in [true, false] {
            let (vg, name) = (VgName::parse("vg0").unwrap(), LvName::parse("snap-1").unwrap());
            let origin = Origin { copied, vg, name };
            assert_eq!(Marks::from_tags([origin.to_tag().as_str()]).origin, Some(origin));
        }
        assert_eq!(Marks::from_tags(["lvprov.io/from=moved:vg0/a"]).origin, None);
    }

    #[test]
    fn trash_has_a_time_and_nonsense_never_ends_it() {
        let tags = ["lvprov.io/trashed=1000", "lvprov.io/trash-time=24h"];
        assert_eq!(Marks::from_tags(tags).trashed_until(), Some(87_400));
        let tags = ["lvprov.io/trashed=soon", "lvprov.io/trash-time=24h"];
        assert_eq!(Marks::from_tags(tags).trashed_until(), Some(i64::MAX));
        let tags = ["lvprov.io/trashed=1", "lvprov.io/trash-time=x"];
        assert_eq!(Marks::from_tags(tags).trashed_until(), Some(i64::MAX));
        assert_eq!(Marks::from_tags(["backup"]), Marks::default());
    }
}
