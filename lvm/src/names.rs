//! Names from outside, each parsed into a type of its own before it is used.
//!
//! Everything in a pod, a claim or a StorageClass may be hostile. A value of
//! one of these types has been checked: it holds no separator, no `..` and no
//! character that LVM, a path or a tag would read differently.

use std::fmt;

/// A name that was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {value:?} is not valid: {rule}")]
pub struct NameError {
    what: &'static str,
    value: String,
    rule: &'static str,
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal, $rule:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(String);

        impl $type {
            /// Checks `value` and takes it.
            pub fn parse(value: &str) -> Result<Self, NameError> {
                let check: fn(&str) -> bool = $check;
                if check(value) {
                    return Ok(Self(value.to_owned()));
                }
                // Long input is cut: it ends up in Events and logs.
                Err(NameError { what: $what, value: value.chars().take(80).collect(), rule: $rule })
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl std::str::FromStr for $type {
            type Err = NameError;
            fn from_str(value: &str) -> Result<Self, NameError> {
                Self::parse(value)
            }
        }
    };
}

name!(
    /// Name of a volume group (lvm(8), "VALID NAMES").
    VgName, "volume group",
    "1 to 127 of a-z A-Z 0-9 + _ . -, not beginning with - or .", is_lvm_name
);
name!(
    /// Name of a logical volume (lvm(8), "VALID NAMES").
    LvName, "logical volume",
    "1 to 127 of a-z A-Z 0-9 + _ . -, not beginning with - or ., and none that LVM keeps for itself",
    |v| is_lvm_name(v) && !is_reserved_lv(v)
);
name!(
    /// A Kubernetes namespace (RFC 1123 label).
    Namespace, "namespace", "1 to 63 of a-z 0-9 -, beginning and ending with a letter or digit", is_label
);
name!(
    /// Name of a pod (RFC 1123 subdomain).
    PodName, "pod name", "1 to 253 of a-z 0-9 - ., beginning and ending with a letter or digit", is_subdomain
);
name!(
    /// UID of a pod. A static pod's is 32 hex digits, or whatever its file says.
    PodUid, "pod UID", "1 to 128 of a-z A-Z 0-9 - _ ., not beginning with a dot",
    |v| (1..=128).contains(&v.len()) && !v.starts_with('.') && v.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
);
name!(
    /// Name of a PersistentVolumeClaim (RFC 1123 subdomain).
    ClaimName, "claim name", "1 to 253 of a-z 0-9 - ., beginning and ending with a letter or digit", is_subdomain
);
name!(
    /// UID of a PersistentVolumeClaim: an RFC 4122 UUID in lower case.
    ClaimUid, "claim UID", "a UUID in lower case, such as 0f0e7f0a-…", is_uuid
);
name!(
    /// UID of a VolumeSnapshot: an RFC 4122 UUID in lower case.
    SnapshotUid, "snapshot UID", "a UUID in lower case, such as 0f0e7f0a-…", is_uuid
);
name!(
    /// UID of the cluster: that of its namespace kube-system.
    ClusterId, "cluster id", "a UUID in lower case, such as 0f0e7f0a-…", is_uuid
);
name!(
    /// Name that a node's configuration has for one of its volume groups.
    DeviceClass, "device class",
    "1 to 63 of a-z 0-9 -, beginning and ending with a letter or digit", is_label
);
name!(
    /// Name of a log volume, unique in its namespace.
    LogVolumeName, "log volume name",
    "1 to 63 of a-z 0-9 -, beginning and ending with a letter or digit", is_label
);

name!(
    /// Name of a directory in a log volume.
    DirectoryName, "directory name",
    "1 to 253 of a-z A-Z 0-9 - _ ., beginning with a letter or digit",
    |v| (1..=253).contains(&v.len())
        && v.as_bytes()[0].is_ascii_alphanumeric()
        && v.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
);
name!(
    /// Name of a Kubernetes node (RFC 1123 subdomain).
    NodeName, "node name", "1 to 253 of a-z 0-9 - ., beginning and ending with a letter or digit", is_subdomain
);

impl From<&PodName> for DirectoryName {
    /// What is a pod's name can be a directory's.
    fn from(pod: &PodName) -> Self {
        Self(pod.0.clone())
    }
}

fn is_lvm_name(value: &str) -> bool {
    (1..=127).contains(&value.len())
        && !value.starts_with(['-', '.'])
        && value.bytes().all(|b| b.is_ascii_alphanumeric() || b"+_.-".contains(&b))
}

/// Names and parts of names that lvcreate(8) refuses.
fn is_reserved_lv(value: &str) -> bool {
    const PREFIXES: [&str; 2] = ["snapshot", "pvmove"];
    const PARTS: [&str; 13] = [
        "_cdata", "_cmeta", "_corig", "_cvol", "_iorig", "_mimage", "_mlog", "_pmspare", "_rimage", "_rmeta", "_tdata",
        "_tmeta", "_vorigin",
    ];
    PREFIXES.iter().any(|p| value.starts_with(p)) || PARTS.iter().any(|p| value.contains(p))
}

fn is_label(value: &str) -> bool {
    let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let bytes = value.as_bytes();
    bytes.len() <= 63
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
}

fn is_subdomain(value: &str) -> bool {
    // The API allows a label of a subdomain to be longer than 63.
    let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    value.len() <= 253
        && value.split('.').all(|part| {
            let bytes = part.as_bytes();
            edge(bytes.first())
                && edge(bytes.last())
                && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
        })
}

fn is_uuid(value: &str) -> bool {
    value.len() == 36 && !value.bytes().any(|b| b.is_ascii_uppercase()) && uuid::Uuid::try_parse(value).is_ok()
}

impl LvName {
    /// The logical volume of a claim: `pvc-<uid>`, also the name of its
    /// PersistentVolume.
    pub fn for_claim(uid: &ClaimUid) -> Self {
        Self(format!("pvc-{uid}"))
    }

    /// A snapshot: `snap-<uid>` (LVM keeps names that begin with `snapshot` for
    /// itself).
    pub fn for_snapshot(uid: &SnapshotUid) -> Self {
        Self(format!("snap-{uid}"))
    }

    /// The snapshot that the volume of a claim is copied from, as long as that
    /// takes, where it is to be the copy of another volume: `clone-<uid>`.
    pub fn for_clone(uid: &ClaimUid) -> Self {
        Self(format!("clone-{uid}"))
    }

    /// The logical volume of a log volume. Namespace and volume together may be
    /// longer than device-mapper allows, so the name is a hash of both; the
    /// tags hold the names themselves.
    pub fn for_log(namespace: &Namespace, volume: &LogVolumeName) -> Self {
        let digest = crate::identity::digest(&["log", namespace.as_str(), volume.as_str()]);
        let mut name = String::from("log-");
        for byte in &digest[..8] {
            name.push_str(&format!("{byte:02x}"));
        }
        Self(name)
    }
}

/// The name device-mapper gives to a logical volume: hyphens doubled in each
/// part, one hyphen between them (libdevmapper, `dm_build_dm_name`).
pub fn dm_name(vg: &VgName, lv: &LvName) -> String {
    format!("{}-{}", vg.as_str().replace('-', "--"), lv.as_str().replace('-', "--"))
}

/// The reverse of [`dm_name`]. None where the name is no plain logical volume.
pub fn split_dm_name(name: &str) -> Option<(VgName, LvName)> {
    let bytes = name.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] == b'-' {
            if bytes.get(at + 1) == Some(&b'-') {
                at += 2;
                continue;
            }
            let vg = VgName::parse(&name[..at].replace("--", "-")).ok()?;
            let rest = &name[at + 1..];
            // A single hyphen further on marks one of LVM's own layers.
            if rest.replace("--", "").contains('-') {
                return None;
            }
            return Some((vg, LvName::parse(&rest.replace("--", "-")).ok()?));
        }
        at += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_volume_name_cannot_leave_its_place() {
        for bad in ["", "..", ".", "a/b", "../etc", "a..b/", "-a", "a-", "A", "a_b", "a b", "a\n", "ä", "a,b", "@a"] {
            assert!(LogVolumeName::parse(bad).is_err(), "{bad:?}");
            assert!(Namespace::parse(bad).is_err(), "{bad:?}");
        }
        assert!(LogVolumeName::parse(&"a".repeat(63)).is_ok());
        assert!(LogVolumeName::parse(&"a".repeat(64)).is_err());
    }

    #[test]
    fn a_pod_name_is_one_path_component() {
        for good in ["web-0", "web-a.b", "kube-proxy-n1", "0"] {
            assert!(PodName::parse(good).is_ok(), "{good:?}");
        }
        for bad in ["", ".", "..", "a..b", ".a", "a.", "a/b", "a.-b"] {
            assert!(PodName::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_that_lvm_would_refuse_or_read_as_options_are_refused() {
        for bad in ["-y", "--help", ".", "..", "a b", "a/b", "a,b", "a\"b", "@tag", ""] {
            assert!(VgName::parse(bad).is_err(), "{bad:?}");
            assert!(LvName::parse(bad).is_err(), "{bad:?}");
        }
        for bad in ["snapshot1", "pvmove0", "x_tdata", "a_rimage_0"] {
            assert!(LvName::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_error_names_the_thing_and_the_rule_and_is_not_endless() {
        let error = VgName::parse(&"x y".repeat(1000)).unwrap_err().to_string();
        assert!(error.contains("volume group") && error.contains("1 to 127"), "{error}");
        assert!(error.len() < 250, "{error}");
    }

    #[test]
    fn a_claim_uid_is_a_uuid() {
        assert!(ClaimUid::parse("0f0e7f0a-1111-4222-8333-444455556666").is_ok());
        for bad in ["0F0E7F0A-1111-4222-8333-444455556666", "0f0e7f0a111142228333444455556666", "", "x"] {
            assert!(ClaimUid::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_longest_names_still_fit_device_mapper() {
        let namespace = Namespace::parse(&"n".repeat(63)).unwrap();
        let volume = LogVolumeName::parse(&"v".repeat(63)).unwrap();
        let lv = LvName::for_log(&namespace, &volume);
        assert_eq!(lv.as_str().len(), 20);
        let other = LvName::for_log(&Namespace::parse("a").unwrap(), &LogVolumeName::parse("b").unwrap());
        assert_ne!(lv, other);
    }

    proptest! {
        #[test]
        fn dm_names_go_both_ways(vg in "[a-z0-9+_][a-z0-9+_.-]{0,20}", lv in "pvc-[a-z0-9-]{1,40}") {
            // LVM's own scheme cannot tell a trailing hyphen of the group from the separator.
            prop_assume!(!vg.ends_with('-'));
            let (vg, lv) = (VgName::parse(&vg).unwrap(), LvName::parse(&lv).unwrap());
            prop_assert_eq!(split_dm_name(&dm_name(&vg, &lv)), Some((vg, lv)));
        }

        #[test]
        fn no_accepted_name_is_a_path(text in "\\PC{0,70}") {
            if let Ok(name) = PodName::parse(&text) {
                prop_assert_eq!(std::path::Path::new(name.as_str()).components().count(), 1);
                prop_assert!(name.as_str() != ".." && name.as_str() != ".");
            }
        }

        #[test]
        fn splitting_any_text_does_not_panic(text in "\\PC{0,70}") {
            let _ = split_dm_name(&text);
        }
    }
}
