//! Volumes on a node that nothing names: their claim was deleted while the
//! controller that had asked for them was down.
//!
//! Whenever a node comes up, and so at the start of every controller, its disks
//! are compared with what the watches have brought. What has no PersistentVolume
//! may be left over; [`super::calls`] asks the API server and has it removed,
//! but only if nobody has been given it yet: a volume that holds data is for an
//! admin to judge (`lvprov gc`). Snapshots that the node lists as lost are told
//! of at the same time, since nobody else looks at one that was ready.

use std::collections::HashSet;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, StreamExt};
use kube::runtime::reflector::ObjectRef;
use lvprov_proto::lvprov::inventory_item::Item;
use lvprov_proto::lvprov::node_admin_client::NodeAdminClient;
use lvprov_proto::lvprov::{CollectRequest, DataVolume, InventoryItem, InventoryRequest};
use tokio::sync::broadcast;
use tokio_stream::wrappers::BroadcastStream;
use tonic::Status;
use tracing::{info, warn};

use super::calls::Wanted;
use super::context::Context;
use super::nodes::{News, State, call_to, explain};
use super::snapshot::{self, Handle};
use super::volume::Place;
use crate::with_causes;

/// So many nodes are looked at at the same time.
const AT_ONCE: usize = 16;
/// For the inventory of a node, and for the removal of one volume.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Between attempts to look at a node.
const PAUSE: Duration = Duration::from_secs(30);
const ATTEMPTS: usize = 5;

/// Looks at nodes as they come up, for ever.
pub async fn run(ctx: Arc<Context>, news: broadcast::Receiver<News>) {
    let up = BroadcastStream::new(news).flat_map(|news| {
        stream::iter(match news {
            Ok(News::Up(node)) => vec![node],
            Ok(_) => Vec::new(),
            // Too much has happened to hear of each node.
            Err(_) => {
                let up = ctx.nodes.views().into_iter().filter(|view| matches!(view.state, State::Up(_)));
                up.map(|view| view.name.clone()).collect()
            }
        })
    });
    pin!(up)
        .for_each_concurrent(AT_ONCE, async |node| {
            for _ in 0..ATTEMPTS {
                match look(&node, &ctx).await {
                    Ok(()) => return,
                    Err(why) => warn!(node, why, "cannot look for volumes that nothing names; trying again"),
                }
                tokio::time::sleep(PAUSE).await;
            }
        })
        .await;
}

/// Notes what may be left over on a node. The error is for people.
pub async fn look(node: &str, ctx: &Context) -> Result<(), String> {
    let Ok(reached) = ctx.nodes.reach_up(node) else {
        // Its return is news again.
        return Ok(());
    };
    let mut lost = HashSet::new();
    let listed = async {
        let call = call_to(node, InventoryRequest { node: node.to_owned() }, CALL_TIMEOUT)?;
        let mut items = NodeAdminClient::new(reached.channel).inventory(call).await?.into_inner();
        while let Some(item) = items.message().await? {
            if let Some(Item::Snapshot(snapshot)) = &item.item
                && snapshot.cluster == ctx.cluster
                && snapshot.lost
            {
                let place = Place {
                    topology: reached.topology.clone(),
                    volume_group: snapshot.volume_group.clone(),
                    logical_volume: snapshot.logical_volume.clone(),
                };
                lost.insert(Handle(place).to_string());
            }
            if let Some(Item::DataVolume(volume)) = item.item
                && volume.cluster == ctx.cluster
                && !volume.open
                // Not the room that another one grows by.
                && volume.logical_volume == format!("pvc-{}", volume.claim_uid)
                && !ctx.volumes.contains(&ObjectRef::new(&volume.logical_volume))
            {
                ctx.calls.found(wanted(&volume, &reached.topology), volume);
            }
        }
        Ok::<_, Status>(())
    };
    listed.await.map_err(|status| explain(&status))?;
    if !lost.is_empty() && ctx.snapshots.are_known().await {
        snapshot::found_lost(&lost, ctx).await.map_err(|error| with_causes(&error))?;
    }
    Ok(())
}

fn wanted(volume: &DataVolume, topology: &str) -> Wanted {
    Wanted {
        claim_uid: volume.claim_uid.clone(),
        namespace: volume.claim_namespace.clone(),
        claim: volume.claim_name.clone(),
        place: Place {
            topology: topology.to_owned(),
            volume_group: volume.volume_group.clone(),
            logical_volume: volume.logical_volume.clone(),
        },
    }
}

/// Has a volume removed that nothing names, unless it has been used, or is not
/// any more what was listed.
///
/// # Errors
/// When it is not known what has become of it; for people.
pub async fn remove(wanted: &Wanted, listed: &DataVolume, ctx: &Context) -> Result<(), String> {
    let Wanted { namespace, claim, place, .. } = wanted;
    let Some(node) = ctx.nodes.with_topology(&place.topology) else {
        return Err("its node has gone".to_owned());
    };
    let reached = ctx.nodes.reach_up(&node.name).map_err(|unreached| unreached.why)?;
    let collected = async {
        let item = Some(InventoryItem { item: Some(Item::DataVolume(listed.clone())) });
        let request = CollectRequest { item, node: node.name.clone(), only_unused: true };
        NodeAdminClient::new(reached.channel).collect(call_to(&node.name, request, CALL_TIMEOUT)?).await
    };
    let answer = collected.await.map_err(|status| explain(&status))?.into_inner();
    let (volume, node) = (place.handle(), &node.name);
    if answer.removed {
        info!(volume, node, namespace, claim, "removed a volume that nothing names and nobody has used");
    } else {
        warn!(
            volume,
            node,
            namespace,
            claim,
            why = answer.detail,
            "nothing names this volume; it is left for `lvprov gc`"
        );
    }
    Ok(())
}
