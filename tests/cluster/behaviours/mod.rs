//! What users of Kubernetes storage expect of any driver: `places` is about
//! where volumes are made, `lives` about how they come and go.

mod lives;
mod places;

use anyhow::{Context, Result};
use lvprov_tests::Test;
use lvprov_tests::objects::{LONG, Space, eventually, text};
use serde_json::Value;
use xtask::testbed::Cluster;

pub const TESTS: [Test<Cluster>; 11] = [
    ("behaviours::a_burst_gets_what_fits_and_the_rest_follows_as_room_is_freed", places::burst),
    ("behaviours::a_cordoned_node_gets_nothing_but_what_was_chosen_before", places::cordoned),
    ("behaviours::an_unready_node_and_a_deleted_one_leave_nothing_stuck", places::lost),
    ("behaviours::no_volume_is_where_the_class_does_not_allow_it", places::topologies),
    ("behaviours::a_class_made_the_default_serves_claims_that_name_none", lives::default_class),
    ("behaviours::ephemeral_volumes_come_and_go_with_their_pod", lives::ephemeral),
    ("behaviours::a_statefulset_keeps_or_drops_claims_as_it_says", lives::retention),
    ("behaviours::a_kept_pv_deleted_first_leaves_its_volume", lives::kept_pv_deleted_first),
    ("behaviours::a_released_pv_deleted_by_hand_still_takes_its_volume_along", lives::released_pv_deleted),
    ("behaviours::the_finalizer_of_a_pv_follows_its_reclaim_policy", lives::finalizer),
    ("behaviours::a_claim_deleted_while_its_volume_is_made_leaves_none", lives::deleted_in_the_middle),
];

const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";

/// As the scheduler does it, for a claim that no pod needs to wait for.
fn choose(space: &Space<'_>, claim: &str, node: &str) -> Result<()> {
    space.kubectl(&["annotate", "pvc", claim, &format!("{SELECTED_NODE}={node}")])?;
    Ok(())
}

/// Whether it is the capacity of that class on that node.
fn is_capacity(object: &Value, class: &str, node: &str) -> bool {
    text(object, "/storageClassName") == class
        && text(object, "/nodeTopology/matchLabels/topology.lvprov.io~1node") == node
}

/// The capacities of a class: node, object's name, bytes.
fn capacities(cluster: &Cluster, class: &str) -> Result<Vec<(String, String, u64)>> {
    let list = cluster.get_json("-n lvprov-system csistoragecapacities")?;
    let of_class = |item: &&Value| text(item, "/storageClassName") == class;
    let items = list["items"].as_array().into_iter().flatten().filter(of_class);
    items
        .map(|item| {
            let node = text(item, "/nodeTopology/matchLabels/topology.lvprov.io~1node").to_owned();
            let bytes = lvm::size::parse_quantity(text(item, "/capacity")).context("a capacity")?;
            Ok((node, text(item, "/metadata/name").to_owned(), bytes))
        })
        .collect()
}

/// Waits until a class has a capacity on a node, of so many bytes where it is said.
fn wait_capacity(cluster: &Cluster, class: &str, node: &str, bytes: Option<u64>) -> Result<()> {
    let says = |object: &Value| lvm::size::parse_quantity(text(object, "/capacity")).ok();
    cluster.watch("-n lvprov-system csistoragecapacities", LONG, |object| {
        is_capacity(object, class, node) && bytes.is_none_or(|bytes| says(object) == Some(bytes))
    })?;
    Ok(())
}

/// What each node's volume group has free, once nothing that other tests have
/// left changes it any more, and the capacities of class xfs say the same.
fn settled(cluster: &Cluster) -> Result<Vec<(String, u64)>> {
    let mut free = Vec::new();
    eventually("what other tests have left is gone", || {
        let pvs = cluster.get_json("pv")?;
        let ending = |pv: &Value| {
            text(pv, "/status/phase") == "Released" && text(pv, "/spec/persistentVolumeReclaimPolicy") == "Delete"
        };
        if pvs["items"].as_array().is_some_and(|items| items.iter().any(ending)) {
            return Ok(false);
        }
        free = ["n1", "n2"]
            .map(|node| -> Result<_> { Ok((node.to_owned(), free_on(cluster, node)?)) })
            .into_iter()
            .collect::<Result<_>>()?;
        let told = capacities(cluster, "xfs")?;
        Ok(free.iter().all(|(node, bytes)| told.iter().any(|(of, _, says)| of == node && says == bytes)))
    })?;
    Ok(free)
}

fn free_on(cluster: &Cluster, node: &str) -> Result<u64> {
    let out = cluster.node(node)?.run(["vgs", "--noheadings", "--units", "b", "--nosuffix", "-o", "vg_free", "vg0"])?;
    Ok(out.trim().parse()?)
}

fn has_finalizer(pv: &Value) -> bool {
    let finalizers = pv.pointer("/metadata/finalizers").and_then(Value::as_array);
    finalizers.is_some_and(|all| all.iter().any(|one| one == "external-provisioner.volume.kubernetes.io/finalizer"))
}
