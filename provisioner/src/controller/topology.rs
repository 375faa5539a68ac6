//! A class's `allowedTopologies`, read as the scheduler reads them: by the
//! labels of the Node object.

use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::api::storage::v1::StorageClass;

/// Where a class allows volumes. Without any term: everywhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Topologies(Vec<Term>);

/// Each label must have one of its values. Without any label: nowhere.
type Term = Vec<(String, Vec<String>)>;

impl Topologies {
    /// Those of a class.
    pub fn of(class: &StorageClass) -> Self {
        let terms = class.allowed_topologies.iter().flatten().map(|term| {
            let labels = term.match_label_expressions.iter().flatten();
            labels.map(|label| (label.key.clone(), label.values.clone())).collect()
        });
        Self(terms.collect())
    }

    /// Whether a node with these labels is among them.
    pub fn allow(&self, labels: &BTreeMap<String, String>) -> bool {
        let holds = |(key, values): &(String, Vec<String>)| labels.get(key).is_some_and(|value| values.contains(value));
        self.0.is_empty() || self.0.iter().any(|term| !term.is_empty() && term.iter().all(holds))
    }
}

/// As far as an Event has room for it.
impl fmt::Display for Topologies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LONGEST: usize = 200;
        let label = |(key, values): &(String, Vec<String>)| format!("{key} in [{}]", values.join(", "));
        let term = |term: &Term| term.iter().map(label).collect::<Vec<_>>().join(" and ");
        let text = self.0.iter().map(term).collect::<Vec<_>>().join(", or ");
        match text.char_indices().nth(LONGEST) {
            None => f.write_str(&text),
            Some((end, _)) => write!(f, "{}…", &text[..end]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn of(allowed: Value) -> Topologies {
        let class = json!({"metadata": {"name": "c"}, "provisioner": "p", "allowedTopologies": allowed});
        Topologies::of(&serde_json::from_value(class).unwrap())
    }

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_class_that_says_nothing_allows_every_node() {
        assert!(of(Value::Null).allow(&labels(&[])));
        assert!(of(json!([])).allow(&labels(&[("zone", "a")])));
    }

    #[test]
    fn terms_are_alternatives_and_all_labels_of_one_must_hold() {
        let topologies = of(json!([
            {"matchLabelExpressions": [{"key": "zone", "values": ["a", "b"]}, {"key": "disk", "values": ["ssd"]}]},
            {"matchLabelExpressions": [{"key": "host", "values": ["n9"]}]},
        ]));
        for (allowed, pairs) in [
            (true, &[("zone", "a"), ("disk", "ssd")][..]),
            (true, &[("zone", "b"), ("disk", "ssd"), ("host", "n1")]),
            (true, &[("host", "n9")]),
            (false, &[("zone", "a")]),
            (false, &[("zone", "c"), ("disk", "ssd")]),
            (false, &[("host", "n1")]),
            (false, &[]),
        ] {
            assert_eq!(topologies.allow(&labels(pairs)), allowed, "{pairs:?}");
        }
        assert_eq!(topologies.to_string(), "zone in [a, b] and disk in [ssd], or host in [n9]");
    }

    #[test]
    fn an_empty_term_allows_no_node() {
        assert!(!of(json!([{}])).allow(&labels(&[("zone", "a")])));
        assert!(!of(json!([{"matchLabelExpressions": []}])).allow(&labels(&[("zone", "a")])));
    }

    #[test]
    fn a_long_list_is_cut_short() {
        let values: Vec<String> = (0..200).map(|i| format!("zürich-{i}")).collect();
        let text = of(json!([{"matchLabelExpressions": [{"key": "zone", "values": values}]}])).to_string();
        assert!(text.chars().count() == 201 && text.ends_with('…'), "{text}");
    }
}
