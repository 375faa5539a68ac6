//! Which waiting claims have to be looked at again for what has happened.

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::ResourceExt;
use kube::runtime::reflector::ObjectRef;

use super::{selected_node, waits};
use crate::controller::context::Context;
use crate::controller::error::Row;
use crate::controller::nodes::News;
use crate::controller::objects::Objects;
use crate::controller::snapshot::SnapshotName;
use crate::controller::validate::{asks_for_data, class_name};

/// The claims that have to be looked at again for what became of a node, or
/// (None) of any node.
pub fn concerned_by_node(news: Option<&News>, ctx: &Context) -> Vec<ObjectRef<PersistentVolumeClaim>> {
    let (node, room_only) = match news {
        None => (None, false),
        Some(News::Capacity(node)) => (Some(node.as_str()), true),
        Some(News::Up(node) | News::Changed(node) | News::Down(node) | News::Gone(node)) => {
            (Some(node.as_str()), false)
        }
    };
    let held = ctx.held.take(node);
    if room_only && held.is_empty() {
        return Vec::new();
    }
    for uid in &held {
        ctx.failures.end(uid, Row::Attempts);
    }
    let is_held = |claim: &PersistentVolumeClaim| claim.metadata.uid.as_ref().is_some_and(|uid| held.contains(uid));
    let placed_there = |claim: &PersistentVolumeClaim| {
        // Where data are is not for the scheduler to say.
        !room_only
            && !asks_for_data(claim)
            && selected_node(claim).is_none_or(|selected| node.is_none_or(|node| node == selected))
    };
    references(&ctx.claims, |claim| waits(claim) && (is_held(claim) || placed_there(claim)))
}

/// The waiting claims that are to be made from a VolumeSnapshot, which is ready
/// now, or (None) from any.
pub fn concerned_by_snapshot(snapshot: Option<&SnapshotName>, ctx: &Context) -> Vec<ObjectRef<PersistentVolumeClaim>> {
    let wants_it = |claim: &PersistentVolumeClaim| {
        let Some(spec) = &claim.spec else { return false };
        let by_ref = spec.data_source_ref.as_ref().map(|source| (&source.kind, &source.name));
        let source = by_ref.or_else(|| spec.data_source.as_ref().map(|source| (&source.kind, &source.name)));
        let is_it = |name: &str| {
            snapshot.is_none_or(|it| it.name == name && claim.metadata.namespace.as_ref() == Some(&it.namespace))
        };
        waits(claim) && source.is_some_and(|(kind, name)| kind == "VolumeSnapshot" && is_it(name))
    };
    let waiting = ctx.claims.live(wants_it);
    for claim in &waiting {
        ctx.failures.end(&claim.uid().unwrap_or_default(), Row::Attempts);
    }
    waiting.iter().map(|claim| ObjectRef::from_obj(&**claim)).collect()
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
    claims: &Objects<PersistentVolumeClaim>,
) -> Vec<ObjectRef<PersistentVolumeClaim>> {
    let concerned = |claim: &PersistentVolumeClaim| match changed {
        ClassChanged::One(class) => class_name(claim) == Some(class.as_str()),
        ClassChanged::Any => true,
    };
    references(claims, |claim| waits(claim) && concerned(claim))
}

fn references(
    claims: &Objects<PersistentVolumeClaim>,
    concerned: impl Fn(&PersistentVolumeClaim) -> bool,
) -> Vec<ObjectRef<PersistentVolumeClaim>> {
    claims.live(concerned).iter().map(|claim| ObjectRef::from_obj(&**claim)).collect()
}
