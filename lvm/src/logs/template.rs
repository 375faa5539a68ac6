//! What a pod's directory of a log volume is called.

use crate::names::{DirectoryName, NameError, Namespace, NodeName, PodName, PodUid};
use std::str::FromStr;

/// A template that was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// A placeholder that is not known, or a brace without its other.
    #[error("subPath {0:?} is not valid: known are {{namespace}}, {{pod}}, {{uid}} and {{node}}")]
    Placeholder(String),
    /// A character that no directory's name can have.
    #[error(
        "subPath {0:?} is not valid: beside placeholders it takes a-z A-Z 0-9 - _ . and no slash: each pod has one directory in the volume"
    )]
    Character(String),
    /// Several pods would get the same directory.
    #[error(
        "subPath {0:?} names no one pod: it must hold {{pod}} or {{uid}}, since each pod has a directory and a quota of its own"
    )]
    NotOnePods(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Namespace,
    Pod,
    Uid,
    Node,
}

/// The name of a pod's directory, with places for what is known of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template(Vec<Part>);

impl Default for Template {
    /// The pod's name.
    fn default() -> Self {
        Self(vec![Part::Pod])
    }
}

impl FromStr for Template {
    type Err = TemplateError;

    fn from_str(text: &str) -> Result<Self, TemplateError> {
        let shown = || text.chars().take(80).collect::<String>();
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            if let Some(inside) = rest.strip_prefix('{') {
                let (name, after) = inside.split_once('}').ok_or_else(|| TemplateError::Placeholder(shown()))?;
                parts.push(match name {
                    "namespace" => Part::Namespace,
                    "pod" => Part::Pod,
                    "uid" => Part::Uid,
                    "node" => Part::Node,
                    _ => return Err(TemplateError::Placeholder(shown())),
                });
                rest = after;
            } else {
                let end = rest.find('{').unwrap_or(rest.len());
                let (literal, after) = rest.split_at(end);
                if !literal.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
                    return Err(TemplateError::Character(shown()));
                }
                parts.push(Part::Text(literal.to_owned()));
                rest = after;
            }
        }
        if !parts.iter().any(|part| matches!(part, Part::Pod | Part::Uid)) {
            return Err(TemplateError::NotOnePods(shown()));
        }
        Ok(Self(parts))
    }
}

impl Template {
    /// The directory's name for this pod. `node` is asked only where its name is needed.
    pub fn expand(
        &self,
        namespace: &Namespace,
        pod: &PodName,
        uid: &PodUid,
        node: impl Fn() -> Result<NodeName, NameError>,
    ) -> Result<DirectoryName, NameError> {
        let mut name = String::new();
        for part in &self.0 {
            match part {
                Part::Text(text) => name.push_str(text),
                Part::Namespace => name.push_str(namespace.as_str()),
                Part::Pod => name.push_str(pod.as_str()),
                Part::Uid => name.push_str(uid.as_str()),
                Part::Node => name.push_str(node()?.as_str()),
            }
        }
        DirectoryName::parse(&name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn expand(template: &str) -> String {
        let template: Template = template.parse().unwrap();
        let (namespace, pod) = ("shop".parse().unwrap(), "web-0".parse().unwrap());
        template.expand(&namespace, &pod, &"u1".parse().unwrap(), || "n1".parse()).unwrap().to_string()
    }

    #[test]
    fn places_are_filled() {
        assert_eq!(expand("{pod}"), "web-0");
        assert_eq!(expand("{namespace}_{pod}_{uid}.{node}"), "shop_web-0_u1.n1");
        assert_eq!(expand("app-{uid}"), "app-u1");
    }

    #[test]
    fn what_is_no_directory_of_one_pod_is_refused() {
        for bad in ["", "logs", "{namespace}", "{node}"] {
            assert!(matches!(bad.parse::<Template>(), Err(TemplateError::NotOnePods(_))), "{bad:?}");
        }
        for bad in ["{pod", "{}", "{pod}{name}", "{POD}", "{{pod}}"] {
            assert!(matches!(bad.parse::<Template>(), Err(TemplateError::Placeholder(_))), "{bad:?}");
        }
        for bad in ["../{pod}", "a/{pod}", "{pod}}", "{pod} x", "{pod}\n"] {
            assert!(matches!(bad.parse::<Template>(), Err(TemplateError::Character(_))), "{bad:?}");
        }
    }

    #[test]
    fn a_hidden_or_endless_directory_is_refused() {
        let (namespace, pod) = ("shop".parse().unwrap(), "w".repeat(253).parse().unwrap());
        for bad in [".{pod}", "-{pod}", "{pod}x"] {
            let template: Template = bad.parse().unwrap();
            let expanded = template.expand(&namespace, &pod, &"u1".parse().unwrap(), || "n1".parse());
            assert!(expanded.is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_template_gives_one_name_or_is_refused(text in "(\\{(pod|uid|node|namespace|x)\\}|[a-z./{}-]){0,6}") {
            let Ok(template) = text.parse::<Template>() else { return Ok(()) };
            let (namespace, pod) = ("shop".parse().unwrap(), "web-0".parse().unwrap());
            if let Ok(name) = template.expand(&namespace, &pod, &"u1".parse().unwrap(), || "n1".parse()) {
                prop_assert!(!name.as_str().contains('/') && !name.as_str().starts_with('.'));
            }
        }
    }
}
