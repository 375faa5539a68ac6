//! Where there is room, and where there is not.

use anyhow::{Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::objects::{LONG, Space, class, eventually, text};
use xtask::testbed::Cluster;

pub const TESTS: [Test<Cluster>; 5] = [
    ("capacity::the_scheduler_goes_where_there_is_room", where_room),
    ("capacity::what_fits_nowhere_waits_with_words", fits_nowhere),
    ("capacity::a_group_that_is_nowhere_is_named", no_group),
    ("capacity::a_selected_node_that_is_gone_is_handed_back", node_gone),
    ("capacity::a_selected_node_without_the_service_is_handed_back", no_service),
];

fn where_room(cluster: &Cluster) -> Result<()> {
    let driver = cluster.get_json("csidriver lvm.lvprov.io")?;
    for (pointer, value) in
        [("/spec/attachRequired", false), ("/spec/storageCapacity", true), ("/spec/podInfoOnMount", true)]
    {
        ensure!(driver.pointer(pointer) == Some(&value.into()), "{driver:#}");
    }
    let space = Space::new(cluster, "room")?;
    // Somebody else's volume takes nearly all of n1, and the lock file tells the service.
    let n1 = cluster.node("n1")?;
    n1.sh("lvcreate -qq -y -n not-ours -l 95%FREE vg0 && echo changed > /run/lvprov/vg-vg0.lock")?;
    eventually("n1's capacity has shrunk", || {
        let list = cluster.get_json("-n lvprov-system csistoragecapacities")?;
        let of_n1 = |item: &&serde_json::Value| {
            text(item, "/nodeTopology/matchLabels/topology.lvprov.io~1node") == "n1"
                && text(item, "/storageClassName") == "xfs"
        };
        let item = list["items"].as_array().into_iter().flatten().find(of_n1).cloned().unwrap_or_default();
        ensure!(item.is_null() || !text(&item, "/maximumVolumeSize").is_empty(), "{item:#}");
        Ok(lvm::size::parse_quantity(text(&item, "/capacity")).is_ok_and(|free| free < 5 << 30))
    })?;
    for i in 0..3 {
        space.claim(&format!("c{i}"), "xfs", "3Gi", "")?;
        space.pod_with_claim(&format!("p{i}"), None, &format!("c{i}"))?;
    }
    for i in 0..3 {
        space.ready(&format!("p{i}"))?;
        ensure!(text(&space.get(&format!("pod p{i}"))?, "/spec/nodeName") == "n2");
    }
    space.end()?;
    n1.sh("lvremove -qq -y vg0/not-ours && echo changed > /run/lvprov/vg-vg0.lock")?;
    Ok(())
}

fn fits_nowhere(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "nowhere")?;
    space.claim("c", "xfs", "900Gi", "")?;
    space.pod_with_claim("p", None, "c")?;
    space.event("PersistentVolumeClaim", "c", &["900 GiB", "n1", "n2", "vg0"])?;
    space.event("Pod", "p", &["did not have enough free storage"])?;
    ensure!(text(&space.get("pvc c")?, "/status/phase") == "Pending");
    space.end()
}

fn no_group(cluster: &Cluster) -> Result<()> {
    class(cluster, "nogroup", "volumeGroup: vg9", "")?;
    let space = Space::new(cluster, "nogroup")?;
    space.claim("c", "nogroup", "1Gi", "")?;
    space.pod_with_claim("p", None, "c")?;
    space.event("PersistentVolumeClaim", "c", &["vg9"])?;
    // Even where somebody has chosen a node.
    space.kubectl(&["annotate", "pvc", "c", "volume.kubernetes.io/selected-node=n1"])?;
    handed_back(&space, "c")?;
    space.end()
}

fn handed_back(space: &Space<'_>, claim: &str) -> Result<()> {
    space.cluster.watch(&format!("-n {} pvc {claim}", space.name), LONG, |claim| {
        text(claim, "/metadata/annotations/volume.kubernetes.io~1selected-node").is_empty()
    })?;
    Ok(())
}

fn node_gone(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "nodegone")?;
    space.claim("c", "xfs", "320Mi", "")?;
    space.kubectl(&["annotate", "pvc", "c", "volume.kubernetes.io/selected-node=long-gone"])?;
    handed_back(&space, "c")?;
    space.event("PersistentVolumeClaim", "c", &["long-gone"])?;
    space.pod_with_claim("p", None, "c")?;
    space.ready("p")?;
    space.end()
}

fn no_service(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "noservice")?;
    // A node that never had the service.
    cluster.apply(
        "{apiVersion: v1, kind: Node, metadata: {name: bare, labels: {kubernetes.io/hostname: bare}}, spec: {unschedulable: true}}",
    )?;
    space.claim("c", "xfs", "320Mi", "")?;
    space.kubectl(&["annotate", "pvc", "c", "volume.kubernetes.io/selected-node=bare"])?;
    handed_back(&space, "c")?;
    space.event("PersistentVolumeClaim", "c", &["bare"])?;
    cluster.kubectl(["delete", "node", "bare"])?;
    space.end()
}
