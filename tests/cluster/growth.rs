//! Claims that grow, and claims that cannot.

use anyhow::{Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::objects::{LONG, Space, eventually, text, volume_size};
use xtask::testbed::Cluster;

pub const TESTS: [Test<Cluster>; 3] = [
    ("growth::a_claim_grows_while_it_is_used", grows),
    ("growth::what_the_group_cannot_hold_is_said_and_taken_back", too_much),
    ("growth::on_a_full_group_the_least_request_ends_it_and_the_pod_starts_again", full_group),
];

fn request(space: &Space<'_>, claim: &str, size: &str) -> Result<()> {
    let patch = format!(r#"{{"spec":{{"resources":{{"requests":{{"storage":"{size}"}}}}}}}}"#);
    space.kubectl(&["patch", "pvc", claim, "-p", &patch])?;
    // A running pod is looked at every 60 to 90 s; a change to it hurries that.
    space.kubectl(&["annotate", "pod", "p", &format!("test/hurry={size}"), "--overwrite"])?;
    Ok(())
}

fn grows(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "grows")?;
    space.claim("c", "xfs", "1Gi", "")?;
    space.pod_with_claim("p", Some("n1"), "c")?;
    space.ready("p")?;
    let pv = text(&space.volume_of("c")?, "/metadata/name").to_owned();
    space.exec("p", "echo kept > /v0/file")?;
    request(&space, "c", "2Gi")?;
    space.wait("pvc/c", "jsonpath={.status.capacity.storage}=2Gi")?;
    ensure!(volume_size(cluster, "n1", &pv)? == 2 << 30);
    let blocks: u64 = space.exec("p", "df -kP /v0 | tail -1 | awk '{print $2}'")?.trim().parse()?;
    ensure!(blocks > 1_900_000, "the file system has {blocks} KiB");
    ensure!(space.exec("p", "cat /v0/file")? == "kept");
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
