//! Claims that grow, and claims that cannot.

use anyhow::{Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::objects::{LONG, Source, Space, class, eventually, text, volume_size};
use xtask::testbed::Cluster;

pub const TESTS: [Test<Cluster>; 7] = [
    ("growth::a_claim_grows_while_it_is_used", |c| grows(c, Source::Flexvolume)),
    ("growth::csi_a_claim_grows_while_it_is_used", |c| grows(c, Source::Csi)),
    ("growth::csi_a_btrfs_grows_while_it_is_used", btrfs),
    ("growth::csi_what_the_group_cannot_hold_is_said_and_harms_nobody", csi_too_much),
    ("growth::csi_a_claim_grows_before_a_pod_uses_it", csi_unused),
    ("growth::what_the_group_cannot_hold_is_said_and_taken_back", too_much),
    ("growth::on_a_full_group_the_least_request_ends_it_and_the_pod_starts_again", full_group),
];

fn raise(space: &Space<'_>, claim: &str, size: &str) -> Result<()> {
    let patch = format!(r#"{{"spec":{{"resources":{{"requests":{{"storage":"{size}"}}}}}}}}"#);
    space.kubectl(&["patch", "pvc", claim, "-p", &patch])?;
    Ok(())
}

fn request(space: &Space<'_>, claim: &str, size: &str) -> Result<()> {
    raise(space, claim, size)?;
    space.hurry("p")
}

fn grows(cluster: &Cluster, source: Source) -> Result<()> {
    let space = Space::new(cluster, source.pick("grows", "grows-csi"))?;
    space.claim("c", source.pick("xfs", "xfs-csi"), "1Gi", "")?;
    space.pod_with_claim("p", Some("n1"), "c")?;
    space.ready("p")?;
    let pv = source.check(&space.volume_of("c")?)?;
    space.exec("p", "echo kept > /v0/file")?;
    request(&space, "c", "2Gi")?;
    space.grown("c", "p", "2Gi")?;
    ensure!(volume_size(cluster, "n1", &pv)? == 2 << 30);
    let blocks: u64 = space.exec("p", "df -kP /v0 | tail -1 | awk '{print $2}'")?.trim().parse()?;
    ensure!(blocks > 1_900_000, "the file system has {blocks} KiB");
    ensure!(space.exec("p", "cat /v0/file")? == "kept");
    nothing_left(&space)?;
    eventually("nothing of the growth is left on the PV", || {
        let annotations = &space.volume_of("c")?["metadata"]["annotations"];
        Ok(annotations.get("volume.alpha.kubernetes.io/pre-resize-capacity").is_none())
    })?;
    space.end()
}

/// The class says how it is made; kubelet carries that to whoever makes it.
fn btrfs(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "grows-btrfs")?;
    let parameters = "volumeGroup: vg0, source: csi, csi.storage.k8s.io/fstype: btrfs, mkfsOptions: '-m single'";
    class(cluster, "btrfs-csi", parameters, "")?;
    space.claim("c", "btrfs-csi", "1Gi", "")?;
    space.pod_with_claim("p", Some("n1"), "c")?;
    space.ready("p")?;
    space.exec("p", "echo kept > /v0/file && sync")?;
    let usage = cluster.node("n1")?.sh("btrfs filesystem df $(findmnt -n -t btrfs -o TARGET | head -1)")?;
    ensure!(usage.contains("Metadata, single"), "{usage}");
    request(&space, "c", "2Gi")?;
    space.grown("c", "p", "2Gi")?;
    let blocks: u64 = space.exec("p", "df -kP /v0 | tail -1 | awk '{print $2}'")?.trim().parse()?;
    ensure!(blocks == 2 << 20, "the file system has {blocks} KiB");
    ensure!(space.exec("p", "cat /v0/file")? == "kept");
    space.end()?;
    cluster.kubectl(["delete", "storageclass", "btrfs-csi"])?;
    Ok(())
}

fn csi_too_much(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "toomuch-csi")?;
    space.claim("c", "xfs-csi", "1Gi", "")?;
    space.pod_with_claim("p", Some("n1"), "c")?;
    space.ready("p")?;
    let pv = Source::Csi.check(&space.volume_of("c")?)?;
    request(&space, "c", "500Gi")?;
    space.event("PersistentVolumeClaim", "c", &["VolumeGrowthImpossible", "vg0", "missing"])?;
    space.wait("pvc/c", "jsonpath={.status.allocatedResourceStatuses.storage}=ControllerResizeInfeasible")?;
    let message = text(&condition(&space, "ControllerResizeError")?, "/message").to_owned();
    ensure!(message.contains("missing"), "{message}");
    // Neither volume nor PV have changed, the pod goes on, and starts again.
    ensure!(volume_size(cluster, "n1", &pv)? == 1 << 30);
    ensure!(text(&space.volume_of("c")?, "/spec/capacity/storage") == "1Gi");
    ensure!(space.exec("p", "touch /v0/file && echo running")? == "running");
    space.delete_pod("p")?;
    space.pod_with_claim("p", Some("n1"), "c")?;
    space.ready("p")?;

    // Lowered to what fits, it grows to that.
    request(&space, "c", "2Gi")?;
    space.grown("c", "p", "2Gi")?;
    ensure!(volume_size(cluster, "n1", &pv)? == 2 << 30);
    nothing_left(&space)?;
    ensure!(text(&space.volume_of("c")?, "/spec/capacity/storage") == "2Gi");

    // Room that comes later is used without anybody asking again.
    let n1 = cluster.node("n1")?;
    n1.sh("lvcreate -qq -y -n filler-csi -l 100%FREE vg0 && echo changed > /run/lvprov/vg-vg0.lock")?;
    request(&space, "c", "3Gi")?;
    space.wait("pvc/c", "jsonpath={.status.allocatedResourceStatuses.storage}=ControllerResizeInfeasible")?;
    n1.sh("lvremove -qq -y vg0/filler-csi && echo changed > /run/lvprov/vg-vg0.lock")?;
    space.grown("c", "p", "3Gi")?;
    ensure!(volume_size(cluster, "n1", &pv)? == 3 << 30);
    nothing_left(&space)?;
    space.end()
}

/// A condition of the claim; nothing where it has none such.
fn condition(space: &Space<'_>, type_: &str) -> Result<serde_json::Value> {
    let claim = space.get("pvc c")?;
    let conditions = claim["status"]["conditions"].as_array().cloned().unwrap_or_default();
    Ok(conditions.into_iter().find(|condition| condition["type"] == type_).unwrap_or_default())
}

/// The volume grows at once, its file system when the pod starts.
fn csi_unused(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "unused-csi")?;
    space.claim("c", "xfs-csi", "1Gi", "")?;
    space.kubectl(&["annotate", "pvc", "c", "volume.kubernetes.io/selected-node=n2"])?;
    let pv = Source::Csi.check(&space.volume_of("c")?)?;
    raise(&space, "c", "2Gi")?;
    space.wait("pvc/c", "jsonpath={.status.allocatedResourceStatuses.storage}=NodeResizePending")?;
    ensure!(volume_size(cluster, "n2", &pv)? == 2 << 30);
    ensure!(text(&space.volume_of("c")?, "/spec/capacity/storage") == "2Gi");
    ensure!(text(&space.get("pvc c")?, "/status/capacity/storage") == "1Gi");
    space.pod_with_claim("p", None, "c")?;
    space.ready("p")?;
    space.wait("pvc/c", "jsonpath={.status.capacity.storage}=2Gi")?;
    let blocks: u64 = space.exec("p", "df -kP /v0 | tail -1 | awk '{print $2}'")?.trim().parse()?;
    ensure!(blocks > 1_900_000, "the file system has {blocks} KiB");
    nothing_left(&space)?;
    space.end()
}

fn too_much(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "toomuch")?;
    space.claim("c", "xfs", "1Gi", "")?;
    space.pod_with_claim("p", Some("n1"), "c")?;
    space.ready("p")?;
    let pv = text(&space.volume_of("c")?, "/metadata/name").to_owned();
    request(&space, "c", "500Gi")?;
    space.event("PersistentVolumeClaim", "c", &["vg0", "missing"])?;
    space.event("Pod", "p", &["VolumeResizeFailed", "vg0", "missing"])?;
    ensure!(space.exec("p", "touch /v0/file && echo running")? == "running");
    ensure!(volume_size(cluster, "n1", &pv)? == 1 << 30);

    // Lowered to what fits, it grows to that.
    request(&space, "c", "2Gi")?;
    space.cluster.wait("-n toomuch pvc/c", "jsonpath={.status.capacity.storage}=2Gi", 4 * LONG)?;
    ensure!(volume_size(cluster, "n1", &pv)? == 2 << 30);
    nothing_left(&space)?;
    let pv_object = space.volume_of("c")?;
    ensure!(text(&pv_object, "/spec/capacity/storage") == "2Gi", "{pv_object:#}");
    // And the pod starts again.
    space.delete_pod("p")?;
    space.pod_with_claim("p", Some("n1"), "c")?;
    space.ready("p")?;
    space.end()
}

/// The growth and its way back have left nothing on the claim.
fn nothing_left(space: &Space<'_>) -> Result<()> {
    eventually("nothing of the growth is left on the claim", || {
        let claim = space.get("pvc c")?;
        let conditions = claim.pointer("/status/conditions").and_then(|c| c.as_array()).cloned().unwrap_or_default();
        let left = conditions.iter().any(|c| text(c, "/type") != "Unused");
        Ok(!left && claim.pointer("/status/allocatedResourceStatuses").is_none())
    })
}

/// The API takes no request that is not larger than the capacity, and not one
/// extent is free: even the least growth would fail for ever, and with it
/// every start of the pod.
fn full_group(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "fullgroup")?;
    space.claim("c", "xfs", "1Gi", "")?;
    space.pod_with_claim("p", Some("n1"), "c")?;
    space.ready("p")?;
    let pv = text(&space.volume_of("c")?, "/metadata/name").to_owned();
    let n1 = cluster.node("n1")?;
    n1.sh("lvcreate -qq -y -n filler -l 100%FREE vg0")?;
    request(&space, "c", "90Gi")?;
    space.event("PersistentVolumeClaim", "c", &["vg0", "missing"])?;
    request(&space, "c", "1073741825")?;
    nothing_left(&space)?;
    space.delete_pod("p")?;
    space.pod_with_claim("p", Some("n1"), "c")?;
    space.ready("p")?;
    ensure!(volume_size(cluster, "n1", &pv)? == 1 << 30);
    n1.sh("lvremove -qq -y vg0/filler")?;
    space.end()
}
