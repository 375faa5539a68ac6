//! What kubelet hands over: paths and a flat map of strings.

use lvm::names::{NameError, Namespace, PodName, PodUid};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Component, Path, PathBuf};

/// A call that makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Too few or too many arguments.
    #[error("{verb} takes {expected} arguments, got {got}")]
    Arguments {
        /// The verb.
        verb: &'static str,
        /// How many it takes.
        expected: usize,
        /// How many there were.
        got: usize,
    },
    /// The options are not JSON, or not a flat map of strings.
    #[error("the options are not a JSON object of strings: {0}")]
    Json(String),
    /// The path is not one of a pod's volume.
    #[error("{0:?} is not a volume directory of a pod (<kubelet root>/pods/<uid>/volumes/<driver>/<volume>)")]
    Path(String),
    /// Something that kubelet always tells is missing.
    #[error("kubelet's {0} is missing")]
    Missing(&'static str),
    /// A name is not valid.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Path and options name different pods.
    #[error("the directory is that of pod {path}, the options are those of pod {json}; nothing is mounted")]
    OtherPod {
        /// UID in the path.
        path: PodUid,
        /// UID in the options.
        json: String,
    },
    /// A size in bytes is no number.
    #[error("{0:?} is not a size in bytes")]
    Size(String),
}

/// The directory that kubelet gives to a pod's volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodPath {
    /// The directory itself.
    pub path: PathBuf,
    /// The pod's UID, which the path alone tells for certain.
    pub uid: PodUid,
}

impl PodPath {
    /// Takes `<kubelet root>/pods/<uid>/volumes/<driver>/<volume>` and nothing else.
    pub fn parse(argument: &OsStr) -> Result<Self, CallError> {
        let path = Path::new(argument);
        let refuse = || CallError::Path(argument.to_string_lossy().chars().take(200).collect());
        let parts: Vec<Component<'_>> = path.components().collect();
        if !path.is_absolute() || parts[1..].iter().any(|part| !matches!(part, Component::Normal(_))) {
            return Err(refuse());
        }
        let names: Vec<&OsStr> = parts.iter().rev().take(5).map(|part| part.as_os_str()).collect();
        let [_, _, volumes, uid, pods] = names.as_slice() else { return Err(refuse()) };
        if *volumes != "volumes" || *pods != "pods" {
            return Err(refuse());
        }
        let uid = PodUid::parse(uid.to_str().ok_or_else(refuse)?)?;
        // Rebuilt from its parts: no trailing slash, no doubled one; and as the
        // mount table knows it, should kubelet's root lie behind a link.
        Ok(Self { path: lvm::mounts::real(&parts.iter().collect::<PathBuf>()), uid })
    }
}

impl PodPath {
    /// The pod's containers that have been started so far: kubelet makes a
    /// directory for each. Bounded, since it ends up in an index.
    pub fn containers(&self) -> Vec<String> {
        let Some(pod) = self.path.ancestors().nth(3) else { return Vec::new() };
        let Ok(entries) = std::fs::read_dir(pod.join("containers")) else { return Vec::new() };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<String> = names.filter(|name| PodName::parse(name).is_ok()).take(64).collect();
        names.sort_unstable();
        names
    }
}

/// The options of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallOptions(BTreeMap<String, String>);

impl CallOptions {
    /// Takes a JSON object of strings and nothing else.
    pub fn parse(argument: &OsString) -> Result<Self, CallError> {
        let text = argument.to_str().ok_or_else(|| CallError::Json("not UTF-8".to_owned()))?;
        // serde_json quotes a string that stands where none should, whatever its length.
        let refuse = |error: serde_json::Error| CallError::Json(error.to_string().chars().take(200).collect());
        serde_json::from_str(text).map(Self).map_err(refuse)
    }

    /// An option that kubelet itself writes. It may be empty.
    pub fn kubelet(&self, key: &'static str) -> Result<&str, CallError> {
        self.0.get(key).map(String::as_str).ok_or(CallError::Missing(key))
    }

    /// The options that the user wrote.
    pub fn user(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .filter(|(key, _)| !key.contains("kubernetes.io/"))
            .map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// Whether the pod may only read.
    pub fn read_only(&self) -> Result<bool, CallError> {
        match self.kubelet("kubernetes.io/readwrite")? {
            "rw" => Ok(false),
            "ro" => Ok(true),
            _ => Err(CallError::Missing("kubernetes.io/readwrite (rw or ro)")),
        }
    }

    /// Namespace of the pod.
    pub fn namespace(&self) -> Result<Namespace, CallError> {
        Ok(Namespace::parse(self.kubelet("kubernetes.io/pod.namespace")?)?)
    }

    /// Name of the pod.
    pub fn pod(&self) -> Result<PodName, CallError> {
        Ok(PodName::parse(self.kubelet("kubernetes.io/pod.name")?)?)
    }

    /// Options could have overwritten kubelet's own keys in old releases: the
    /// path is what counts, and both must agree.
    pub fn check_pod(&self, path: &PodPath) -> Result<(), CallError> {
        let json = self.kubelet("kubernetes.io/pod.uid")?;
        if json == path.uid.as_str() {
            return Ok(());
        }
        Err(CallError::OtherPod { path: path.uid.clone(), json: json.chars().take(130).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_a_pods_volume_directory_is_taken() {
        let good = PodPath::parse(OsStr::new(
            "/var/lib/kubelet/pods/2c03bdd00561704f5934b4088a3cd664/volumes/lvprov.io~lvm/v/",
        ));
        let good = good.unwrap();
        assert_eq!(good.uid.as_str(), "2c03bdd00561704f5934b4088a3cd664");
        assert_eq!(
            good.path,
            Path::new("/var/lib/kubelet/pods/2c03bdd00561704f5934b4088a3cd664/volumes/lvprov.io~lvm/v")
        );
        for bad in [
            "",
            "/",
            "/etc",
            "pods/u/volumes/d/v",
            "/pods/u/volumes/d",
            "/k/pods/u/volumes/d/..",
            "/k/pods/../volumes/d/v",
            "/k/pod/u/volumes/d/v",
            "/k/pods/u/volume/d/v",
        ] {
            assert!(PodPath::parse(OsStr::new(bad)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn containers_are_those_that_have_a_directory() {
        let root = tempfile::tempdir().unwrap();
        let pod = root.path().join("pods/u1");
        for container in ["app", "sidecar"] {
            std::fs::create_dir_all(pod.join("containers").join(container)).unwrap();
        }
        let path = PodPath::parse(pod.join("volumes/d/v").as_os_str()).unwrap();
        assert_eq!(path.containers(), ["app", "sidecar"]);
        assert!(PodPath::parse(OsStr::new("/k/pods/u/volumes/d/v")).unwrap().containers().is_empty());
    }

    #[test]
    fn options_of_another_pod_are_refused() {
        let path = PodPath::parse(OsStr::new("/k/pods/aaa/volumes/d/v")).unwrap();
        let options = CallOptions::parse(&r#"{"kubernetes.io/pod.uid":"bbb"}"#.into()).unwrap();
        assert!(matches!(options.check_pod(&path), Err(CallError::OtherPod { .. })));
        assert!(CallOptions::parse(&"{}".into()).unwrap().check_pod(&path).is_err());
    }

    #[test]
    fn what_is_no_flat_map_is_refused() {
        for bad in ["", "null", "[]", "{", r#"{"a":1}"#, r#"{"a":{}}"#, r#"{"a":null}"#, "\"x\"", "{}{}"] {
            assert!(matches!(CallOptions::parse(&bad.into()), Err(CallError::Json(_))), "{bad}");
        }
        let long = CallOptions::parse(&format!("\"{}\"", "x".repeat(5000)).into()).unwrap_err();
        assert!(long.to_string().len() < 300, "{long}");
    }

    proptest! {
        #[test]
        fn any_path_is_taken_or_refused(text in "[a-z/.~-]{0,80}") {
            if let Ok(taken) = PodPath::parse(OsStr::new(&text)) {
                prop_assert!(taken.path.is_absolute());
                prop_assert!(!text.split('/').any(|part| part == ".."));
            }
        }
    }
}
