//! Nodes that have left the cluster for good, and what was on them.
//!
//! A node is lost when its Node object has been gone for a set time. When that
//! is seen first, it is noted on each PersistentVolume of the node, so that a
//! restart of the controller does not begin, or shorten, the time; claims and
//! PersistentVolumes get an Event. When the time is over, and the API server
//! still says that there is no such Node, released volumes are given up, and
//! claims whose class wants that are deleted, so that their StatefulSets make
//! them anew elsewhere. "Cannot be asked" is never taken for "gone". Where more
//! nodes have gone at once than machines fail, somebody has made a mistake, and
//! nothing is done.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt};
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;
use tracing::{info, warn};

use super::context::Context;
use super::error::{Doing, Error, is_conflict, is_not_found};
use super::events::Reason;
use super::names::{NODE_LOST_SINCE, ON_NODE_LOSS};
use super::nodes::News;
use super::objects::{Kept, NodeTag};
use super::volume::{Need, Place, give_up, need, place_of};
use crate::with_causes;

/// Between looks at nodes that are lost.
const SELDOM: Duration = Duration::from_secs(60);
const OFTEN: Duration = Duration::from_secs(2);
/// Claims are counted over this time.
const MINUTE: Duration = Duration::from_secs(60);
/// Pods a page.
const PAGE: u32 = 500;

/// What to do, and how fast.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// A Node object has to be gone for so long.
    pub after: Duration,
    /// So many claims are deleted in a minute at most.
    pub claims_per_minute: usize,
    /// Where more than this share of all nodes has gone, nothing is done.
    pub most_percent: usize,
}

/// What has been done a moment ago.
#[derive(Debug, Default)]
pub struct Pace {
    deleted: VecDeque<Instant>,
}

impl Pace {
    /// How long to wait for the next claim. None: it may be deleted now.
    fn wait(&mut self, most: usize) -> Option<Duration> {
        self.deleted.retain(|at| at.elapsed() < MINUTE);
        let first = self.deleted.front()?;
        (self.deleted.len() >= most).then(|| MINUTE.saturating_sub(first.elapsed()))
    }

    fn note(&mut self) {
        self.deleted.push_back(Instant::now());
    }
}

/// What becomes of the volumes of a class when their node is lost.
pub mod policy {
    /// Nothing: an Event tells.
    pub const KEEP: &str = "keep";
    /// The claim is deleted, and made anew by its StatefulSet.
    pub const RECREATE: &str = "recreate";
}

/// Looks after lost nodes, for ever; asks nobody while there is none.
pub async fn run(ctx: Arc<Context>, settings: Settings) {
    let mut news = ctx.nodes.news();
    let mut pace = Pace::default();
    loop {
        let again = match look(&ctx, settings, &mut pace).await {
            Ok(again) => again,
            Err(error) => {
                warn!(error = with_causes(&error), "not known whether nodes are lost");
                Some(SELDOM)
            }
        };
        let wait_for_news = async {
            loop {
                match news.recv().await {
                    Ok(News::Gone(_) | News::Up(_)) | Err(RecvError::Lagged(_)) => return,
                    Ok(News::Capacity(_) | News::Changed(_) | News::Down(_)) => {}
                    Err(RecvError::Closed) => std::future::pending().await,
                }
            }
        };
        // Nobody waits without end: a Node without service makes no news.
        let _ = tokio::time::timeout(again.unwrap_or(Duration::MAX), wait_for_news).await;
    }
}

/// What is to be done for a volume of a lost node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    /// Its PersistentVolume is to go; the logical volume is left behind.
    GiveUp,
    /// Its claim is to be deleted.
    Recreate,
}

fn action(volume: &PersistentVolume) -> Option<Action> {
    let phase = volume.status.as_ref().and_then(|status| status.phase.as_deref());
    match need(volume) {
        Need::Removal => Some(Action::GiveUp),
        _ if phase == Some("Bound")
            && volume.annotations().get(ON_NODE_LOSS).map(String::as_str) == Some(policy::RECREATE) =>
        {
            Some(Action::Recreate)
        }
        _ => None,
    }
}

/// One look at all volumes whose nodes are not there. When to look again; None
/// where there is none.
///
/// # Errors
/// When the API server cannot be asked, or refuses. Nothing was concluded.
pub async fn look(ctx: &Context, settings: Settings, pace: &mut Pace) -> Result<Option<Duration>, Error> {
    let mut suspects: BTreeMap<String, Vec<(Arc<PersistentVolume>, Place)>> = BTreeMap::new();
    let there: HashSet<NodeTag> = ctx.node_objects.names().iter().map(|name| NodeTag::of(name)).collect();
    let marked = ctx.volumes.live(|volume| volume.annotations().contains_key(NODE_LOST_SINCE));
    let marked =
        marked.into_iter().filter(|volume| volume.node().is_some_and(|node| there.contains(&NodeTag::of(&node))));
    for volume in ctx.volumes.of_nodes(|node| !there.contains(&node)).into_iter().chain(marked) {
        let Some(place) = place_of(&volume) else { continue };
        if !ctx.node_objects.contains(&ObjectRef::new(&place.topology)) {
            suspects.entry(place.topology.clone()).or_default().push((volume, place));
        } else if volume.annotations().contains_key(NODE_LOST_SINCE) {
            info!(volume = volume.name_any(), node = place.topology, "its node is back");
            note_since(&volume, None, ctx).await?;
        }
    }
    if suspects.is_empty() {
        return Ok(None);
    }
    // What the watch brought may be old, or not all of it.
    let nodes: Api<Node> = Api::all(ctx.client.clone());
    let mut lost = BTreeMap::new();
    for (node, mut volumes) in suspects {
        if nodes.get_opt(&node).await.doing(|| format!("read Node {node}"))?.is_none() {
            volumes.sort_by_key(|(volume, _)| volume.name_any());
            lost.insert(node, volumes);
        }
    }
    let mut again = SELDOM.min(settings.after / 4).max(OFTEN);
    let mut due = Vec::new();
    let now = Timestamp::now();
    for (node, volumes) in &lost {
        for (volume, place) in volumes {
            let since = volume.annotations().get(NODE_LOST_SINCE).and_then(|since| since.parse::<Timestamp>().ok());
            let Some(since) = since else {
                first_seen(volume, place, now, settings, ctx).await?;
                continue;
            };
            // A clock that was set back makes it longer, never shorter.
            let passed = Duration::try_from(now.duration_since(since)).unwrap_or(Duration::ZERO);
            match settings.after.checked_sub(passed).filter(|left| !left.is_zero()) {
                Some(left) => again = again.min(left.max(OFTEN)),
                None => due.extend(action(volume).map(|action| (node, volume, place, action))),
            }
        }
    }
    if due.is_empty() {
        return Ok(Some(again));
    }
    if let Some(why) = too_many(&lost, settings, ctx) {
        warn!(why, "nothing is done for lost nodes");
        for (_, volume, _, _) in due {
            ctx.events.tell(&**volume, Reason::NodeLossStopped, why.clone()).await;
        }
        return Ok(Some(SELDOM));
    }
    for (node, volume, place, action) in due {
        match action {
            Action::GiveUp => give_up(volume, place, ctx).await?,
            Action::Recreate => match pace.wait(settings.claims_per_minute) {
                Some(wait) => again = again.min(wait.max(OFTEN)),
                None if recreate(volume, node, ctx).await? => {
                    pace.note();
                    // Its volume is released next.
                    again = OFTEN;
                }
                None => {}
            },
        }
    }
    Ok(Some(again))
}

/// Why nothing is done: more nodes have gone at once than fail by themselves.
/// Those for which nothing is left to do do not count.
fn too_many(
    lost: &BTreeMap<String, Vec<(Arc<PersistentVolume>, Place)>>,
    settings: Settings,
    ctx: &Context,
) -> Option<String> {
    let concerns = |volumes: &Vec<(Arc<PersistentVolume>, Place)>| volumes.iter().any(|(v, _)| action(v).is_some());
    let gone = lost.values().filter(|volumes| concerns(volumes)).count();
    let there = ctx.node_objects.of_nodes(|_| true).len();
    let most = ((there + gone) * settings.most_percent / 100).max(1);
    (gone > most).then(|| {
        format!(
            "{gone} of {} nodes with volumes have gone, which is more than {}% (--node-lost-most-percent): no claim and no \
             volume is given up. Were they deleted by mistake? Nodes that come back keep their volumes. Otherwise delete \
             the claims by hand, or raise the limit",
            there + gone,
            settings.most_percent
        )
    })
}

async fn first_seen(
    volume: &PersistentVolume,
    place: &Place,
    now: Timestamp,
    settings: Settings,
    ctx: &Context,
) -> Result<(), Error> {
    let node = &place.topology;
    note_since(volume, Some(now), ctx).await?;
    let after = settings.after.as_secs();
    let next = match action(volume) {
        Some(Action::Recreate) => format!(
            "If it is not back in {after} s, the claim is deleted, so that its StatefulSet makes it anew, empty, on another node"
        ),
        Some(Action::GiveUp) => {
            format!("If it is not back in {after} s, the volume is left behind there, and this PersistentVolume goes")
        }
        None => {
            "The volume is kept, and its pod waits for the node. If the node never comes back, delete the claim and \
                 its pod; volumes of a class with onNodeLoss: recreate are made anew by themselves"
                .to_owned()
        }
    };
    let note = format!("node {node}, where the volume {} is, is not in the cluster any more. {next}", place.handle());
    if let Some(claim) = claim_of(volume, ctx).await?
        && action(volume) != Some(Action::GiveUp)
    {
        ctx.events.tell(&claim, Reason::NodeLost, note.clone()).await;
    }
    ctx.events.tell(volume, Reason::NodeLost, note).await;
    Ok(())
}

/// Notes since when the node is not there, or that it is.
async fn note_since(volume: &PersistentVolume, since: Option<Timestamp>, ctx: &Context) -> Result<(), Error> {
    let name = volume.name_any();
    let since = since.map(|since| since.to_string());
    // Only on the very one that was looked at.
    let patch = json!({"metadata": {"uid": volume.uid(), "annotations": {NODE_LOST_SINCE: since}}});
    let api: Api<PersistentVolume> = Api::all(ctx.client.clone());
    match api.patch_metadata(&name, &PatchParams::default(), &Patch::Merge(patch)).await {
        Err(error) if !is_not_found(&error) && !is_conflict(&error) => {
            Err(error).doing(|| format!("annotate PersistentVolume {name}"))
        }
        _ => Ok(()),
    }
}

/// The claim that a volume is bound to, as it is now. None: it has gone, or is
/// another by now.
async fn claim_of(volume: &PersistentVolume, ctx: &Context) -> Result<Option<PersistentVolumeClaim>, Error> {
    let Some(reference) = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref()) else {
        return Ok(None);
    };
    let (Some(namespace), Some(name)) = (&reference.namespace, &reference.name) else { return Ok(None) };
    let api: Api<PersistentVolumeClaim> = Api::namespaced(ctx.client.clone(), namespace);
    let claim = api.get_opt(name).await.doing(|| format!("read claim {namespace}/{name}"))?;
    let is_it = |claim: &PersistentVolumeClaim| {
        claim.uid() == reference.uid
            && claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()) == volume.metadata.name
    };
    Ok(claim.filter(is_it))
}

/// Deletes the claim of a volume of a lost node, if a StatefulSet waits to make
/// it anew. Whether it has been deleted.
async fn recreate(volume: &PersistentVolume, node: &str, ctx: &Context) -> Result<bool, Error> {
    let name = volume.name_any();
    let volumes: Api<PersistentVolume> = Api::all(ctx.client.clone());
    let now = volumes.get_opt(&name).await.doing(|| format!("read PersistentVolume {name}"))?;
    let same = |now: &PersistentVolume| now.uid() == volume.uid() && action(now) == Some(Action::Recreate);
    let Some(now) = now.filter(same) else { return Ok(false) };
    let Some(claim) = claim_of(&now, ctx).await?.filter(|claim| claim.metadata.deletion_timestamp.is_none()) else {
        return Ok(false);
    };
    let (namespace, claim_name) = (claim.namespace().unwrap_or_default(), claim.name_any());
    if !is_waited_for(&namespace, &claim_name, ctx).await? {
        return Ok(false);
    }
    let note = format!(
        "node {node} has been gone for long enough: the claim is deleted, so that its StatefulSet makes it anew on \
         another node. What was in its volume {name} is lost to it"
    );
    ctx.events.tell(&claim, Reason::ClaimGivenUp, note).await;
    let this_one = DeleteParams {
        preconditions: Some(Preconditions { uid: claim.uid(), resource_version: None }),
        ..DeleteParams::default()
    };
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(ctx.client.clone(), &namespace);
    match claims.delete(&claim_name, &this_one).await {
        Ok(_) => {
            info!(claim = claim_name, namespace, node, volume = name, "deleted the claim of a lost node");
            Ok(true)
        }
        Err(error) if is_not_found(&error) || is_conflict(&error) => Ok(false),
        Err(error) => Err(error).doing(|| format!("delete claim {namespace}/{claim_name}")),
    }
}

/// Whether a pod of a StatefulSet waits with this claim to be scheduled, and
/// none runs with it: pods that still name a node are for the pod garbage
/// collector. Without such a pod nobody would make the claim anew.
async fn is_waited_for(namespace: &str, claim: &str, ctx: &Context) -> Result<bool, Error> {
    let api: Api<Pod> = Api::namespaced(ctx.client.clone(), namespace);
    let mut params = ListParams::default().limit(PAGE);
    let mut waits = false;
    loop {
        let page = api.list(&params).await.doing(|| format!("list pods of namespace {namespace}"))?;
        for pod in page.items.iter().filter(|pod| uses(pod, claim)) {
            let placed = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).is_some_and(|n| !n.is_empty());
            if placed {
                return Ok(false);
            }
            waits |= pod.owner_references().iter().any(|o| o.kind == "StatefulSet" && o.controller == Some(true));
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(waits),
        }
    }
}

fn uses(pod: &Pod, claim: &str) -> bool {
    let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_ref());
    let mut claims = volumes.into_iter().flatten().filter_map(|volume| volume.persistent_volume_claim.as_ref());
    claims.any(|source| source.claim_name == claim)
}
