//! Which waiting claims have to be looked at again for what has happened.

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::runtime::reflector::{ObjectRef, Store};

use super::{selected_node, waits};
use crate::controller::nodes::News;
use crate::controller::validate::class_name;

/// The claims that have to be looked at again for what became of a node, or
/// (None) of any node.
pub fn concerned_by_node(
    news: Option<&News>,
    claims: &Store<PersistentVolumeClaim>,
) -> Vec<ObjectRef<PersistentVolumeClaim>> {
    let concerned = |selected: &str| match news {
        None => true,
        Some(News::Capacity(_)) => false,
        Some(News::Up(node) | News::Changed(node) | News::Down(node) | News::Gone(node)) => selected == node,
    };
    references(claims, |claim| waits(claim) && selected_node(claim).is_none_or(concerned))
}

/// What has happened to StorageClasses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClassChanged {
    /// One was made, changed or deleted: its name.
    One(String),
    /// Any may have been.
    Any,
}

/// The waiting claims of a class that has changed.
pub fn concerned_by_class(
    changed: &ClassChanged,
    claims: &Store<PersistentVolumeClaim>,
) -> Vec<ObjectRef<PersistentVolumeClaim>> {
    let concerned = |claim: &PersistentVolumeClaim| match changed {
        ClassChanged::One(class) => class_name(claim) == Some(class.as_str()),
        ClassChanged::Any => true,
    };
    references(claims, |claim| waits(claim) && concerned(claim))
}

fn references(
    claims: &Store<PersistentVolumeClaim>,
    concerned: impl Fn(&PersistentVolumeClaim) -> bool,
) -> Vec<ObjectRef<PersistentVolumeClaim>> {
    claims.state_filter(|claim| concerned(claim)).iter().map(|claim| ObjectRef::from_obj(&**claim)).collect()
}
