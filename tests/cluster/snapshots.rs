//! Snapshots by the cluster's own snapshot-controller, and volumes made from
//! them and from other claims.

use anyhow::{Context, Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::objects::{
    LONG, Space, claim_volume, class, eventually, lvprov, lvprov_json, take_snapshots, text, volumes_on,
};
use serde_json::Value;
use xtask::testbed::Cluster;

pub const TESTS: [Test<Cluster>; 8] = [
    ("snapshots::of_a_running_pods_volume_are_restored_and_cloned", |c| lives(c, "snap-thick", "xfs-csi")),
    ("snapshots::of_a_thin_volume_are_restored_and_cloned", thin),
    ("snapshots::a_pod_follows_its_data_whatever_node_was_chosen", follows),
    ("snapshots::what_cannot_be_had_is_refused_with_a_reason", refused),
    ("snapshots::a_claim_deleted_in_the_middle_leaves_nothing", cut_short),
    ("snapshots::a_volume_with_a_snapshot_grows_and_goes_after_it", in_the_way),
    ("snapshots::one_that_is_lost_says_so", lost),
    ("snapshots::of_a_raw_device_is_restored_and_kept_for_another_name", raw),
];

fn from_snapshot(name: &str) -> String {
    format!("dataSource: {{apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot, name: {name}}}")
}

fn from_claim(name: &str) -> String {
    format!("dataSource: {{kind: PersistentVolumeClaim, name: {name}}}")
}

fn is_there(cluster: &Cluster, handle: &str) -> Result<bool> {
    let (node, volume) = handle.split_once('/').with_context(|| format!("{handle:?} names no node"))?;
    Ok(cluster.node(node)?.exec(["lvs", volume])?.success())
}

fn node_of(volume: &Value) -> &str {
    text(volume, "/spec/nodeAffinity/required/nodeSelectorTerms/0/matchExpressions/0/values/0")
}

/// A pod on n1 has written "old" into the claim `data`.
fn written(space: &Space<'_>, class: &str, size: &str) -> Result<()> {
    space.claim("data", class, size, "")?;
    space.pod_with_claim("p", Some("n1"), "data")?;
    space.ready("p")?;
    space.exec("p", "echo old > /v0/file && sync").map(drop)
}

fn lives(cluster: &Cluster, name: &'static str, class: &str) -> Result<()> {
    take_snapshots(cluster)?;
    let space = Space::new(cluster, name)?;
    written(&space, class, "400Mi")?;
    let handle = space.ready_snapshot("before", "data")?;
    ensure!(handle.starts_with("n1/vg0/") && is_there(cluster, &handle)?, "{handle}");
    let taken = space.get("volumesnapshot before")?;
    ensure!(text(&taken, "/status/restoreSize") == "400Mi", "{taken:#}");
    ensure!(!text(&taken, "/status/creationTime").is_empty(), "{taken:#}");
    space.exec("p", "echo new > /v0/file && dd if=/dev/urandom of=/v0/more bs=1M count=20 2>/dev/null && sync")?;

    // No pod is needed for them to be made.
    space.claim("again", class, "400Mi", &from_snapshot("before"))?;
    space.claim("larger", class, "800Mi", &from_snapshot("before"))?;
    space.claim("clone", class, "400Mi", &from_claim("data"))?;
    for claim in ["again", "larger", "clone"] {
        let volume = space.volume_of(claim)?;
        ensure!(node_of(&volume) == "n1", "{volume:#}");
    }
    let volumes: Vec<String> = ["again", "larger", "clone"].map(claim_volume).to_vec();
    // While the first pod still uses the source.
    space.pod("r", None, &volumes)?;
    space.ready("r")?;
    ensure!(text(&space.get("pod r")?, "/spec/nodeName") == "n1");
    let read =
        |pod: &str, files: &str| Ok::<_, anyhow::Error>(space.exec(pod, &format!("cat {files}"))?.replace('\n', " "));
    ensure!(read("r", "/v0/file /v1/file /v2/file")? == "old old new");
    ensure!(read("p", "/v0/file")? == "new");
    ensure!(
        space.exec("r", "ls /v0/more /v1/more 2>/dev/null | wc -l; cmp /v2/more /v2/more && echo whole")? == "0\nwhole"
    );
    let kib: u64 = space.exec("r", "df -kP /v1 | tail -1 | awk '{print $2}'")?.trim().parse()?;
    ensure!(kib > 600 << 10, "the file system of the larger one has {kib} KiB");
    // Each is its own.
    space.exec("r", "echo changed > /v0/file && echo changed > /v2/file && sync")?;
    ensure!(read("p", "/v0/file")? == "new" && read("r", "/v1/file")? == "old");

    // The snapshot goes, and what was made from it stays.
    space.kubectl(&["delete", "volumesnapshot", "before", "--timeout=240s"])?;
    ensure!(!is_there(cluster, &handle)?, "{handle} is still there");
    ensure!(cluster.get_json("volumesnapshotcontents")?["items"].as_array().is_some_and(Vec::is_empty));
    space.delete_pod("r")?;
    space.pod("r", None, &volumes)?;
    space.ready("r")?;
    ensure!(read("r", "/v0/file /v1/file /v2/file")? == "changed old changed");
    space.end()?;
    eventually("nothing is left of it", || Ok(volumes_on(cluster, "n1", &format!("claim={name}/"))?.is_empty()))
}

fn thin(cluster: &Cluster) -> Result<()> {
    let n1 = cluster.node("n1")?;
    let configure = |more: &str| -> Result<()> {
        n1.write_file("/etc/lvprov/node.json", format!(r#"{{"commandLog":"{}"{more}}}"#, crate::COMMANDS))?;
        cluster.kubectl(["-n", "lvprov-system", "rollout", "restart", "daemonset/lvprov-node"])?;
        cluster.kubectl(["-n", "lvprov-system", "rollout", "status", "daemonset/lvprov-node", "--timeout=240s"])?;
        Ok(())
    };
    n1.sh("lvcreate -qq -y --type thin-pool -L 4g -n snappool vg0")?;
    configure(r#","thinPools":{"vg0":{"pool":"snappool"}}"#)?;
    class(cluster, "snap-thin", "volumeGroup: vg0, layout: thin, source: csi", "mountOptions: [discard]")?;
    lives(cluster, "snap-thin", "snap-thin")?;
    cluster.kubectl(["delete", "storageclass", "snap-thin"])?;
    configure("")?;
    n1.sh("lvremove -qq -y vg0/snappool && echo changed > /run/lvprov/vg-vg0.lock").map(drop)
}

/// The scheduler chooses before there is a volume, and wrongly: it cannot know where the data are.
fn follows(cluster: &Cluster) -> Result<()> {
    take_snapshots(cluster)?;
    let space = Space::new(cluster, "snap-follows")?;
    written(&space, "xfs-csi", "320Mi")?;
    cluster.kubectl(["cordon", "n1"])?;
    space.claim("again", "xfs-csi", "320Mi", &from_snapshot("late"))?;
    space.pod_with_claim("r", None, "again")?;
    space.event("PersistentVolumeClaim", "again", &["DataNotReady", "there is no VolumeSnapshot snap-follows/late"])?;
    space.wait("pvc/again", r"jsonpath={.metadata.annotations.volume\.kubernetes\.io/selected-node}=n2")?;
    space.ready_snapshot("late", "data")?;
    let volume = space.volume_of("again")?;
    ensure!(node_of(&volume) == "n1", "{volume:#}");
    // It is given back to the scheduler by what the volume says, not by a time limit.
    space.event("Pod", "r", &["FailedScheduling"])?;
    cluster.kubectl(["uncordon", "n1"])?;
    space.ready("r")?;
    ensure!(text(&space.get("pod r")?, "/spec/nodeName") == "n1");
    ensure!(space.exec("r", "cat /v0/file")? == "old");
    space.end()
}

fn refused(cluster: &Cluster) -> Result<()> {
    take_snapshots(cluster)?;
    let space = Space::new(cluster, "snap-refused")?;
    written(&space, "xfs-csi", "400Mi")?;
    space.ready_snapshot("before", "data")?;
    let refused = |claim: &str, words: &[&str]| space.event("PersistentVolumeClaim", claim, words);
    space.claim("flex", "xfs", "400Mi", &from_snapshot("before"))?;
    refused("flex", &["ClaimRefused", "source: csi"])?;
    space.claim("small", "xfs-csi", "320Mi", &from_snapshot("before"))?;
    refused("small", &["ClaimRefused", "needs 400 MiB"])?;
    let block = format!("{}, volumeMode: Block", from_snapshot("before"));
    space.claim("block", "xfs-csi", "400Mi", &block)?;
    refused("block", &["ClaimRefused", "volumeMode Filesystem"])?;
    space.claim("other", "xfs-csi", "400Mi", "dataSourceRef: {apiGroup: hello.example, kind: Hello, name: h}")?;
    refused("other", &["LeftToPopulator", "Hello h of hello.example"])?;
    space.claim("nothing", "xfs-csi", "400Mi", &from_claim("none"))?;
    refused("nothing", &["DataNotReady", "there is no claim snap-refused/none"])?;

    // Of a FlexVolume neither: a clone is refused here, a snapshot by the cluster's own controller.
    space.claim("flexdata", "xfs", "320Mi", "")?;
    space.pod_with_claim("f", Some("n1"), "flexdata")?;
    space.ready("f")?;
    space.claim("clone", "xfs-csi", "320Mi", &from_claim("flexdata"))?;
    refused("clone", &["ClaimRefused", "has a FlexVolume"])?;
    space.snapshot("flex", "flexdata")?;
    eventually("the snapshot says why not", || {
        Ok(text(&space.get("volumesnapshot flex")?, "/status/error/message").contains("CSI"))
    })?;
    let made = volumes_on(cluster, "n1", "claim=snap-refused/")?;
    let claims =
        [space.volume_of("data")?, space.volume_of("flexdata")?].map(|pv| text(&pv, "/metadata/name").to_owned());
    ensure!(made.iter().filter(|name| name.starts_with("pvc-")).all(|name| claims.contains(name)), "{made:?}");
    space.end()
}

fn cut_short(cluster: &Cluster) -> Result<()> {
    take_snapshots(cluster)?;
    let space = Space::new(cluster, "snap-cut")?;
    written(&space, "xfs-csi", "1500Mi")?;
    space.exec("p", "dd if=/dev/urandom of=/v0/more bs=1M count=300 2>/dev/null && sync")?;
    let handle = space.ready_snapshot("before", "data")?;
    space.claim("again", "xfs-csi", "1500Mi", &from_snapshot("before"))?;
    let copies = || volumes_on(cluster, "n1", "claim=snap-cut/again");
    eventually("the node is at it", || Ok(!copies()?.is_empty()))?;
    space.kubectl(&["delete", "pvc", "again", "--timeout=240s"])?;
    eventually("nothing is left of it", || Ok(copies()?.is_empty()))?;
    // Nor of what has kept the snapshot.
    space.kubectl(&["delete", "volumesnapshot", "before", "--timeout=240s"])?;
    ensure!(!is_there(cluster, &handle)?, "{handle} is still there");
    space.end()
}

fn in_the_way(cluster: &Cluster) -> Result<()> {
    take_snapshots(cluster)?;
    let space = Space::new(cluster, "snap-way")?;
    written(&space, "xfs-csi", "320Mi")?;
    let volume = text(&space.volume_of("data")?, "/metadata/name").to_owned();
    space.ready_snapshot("not-yet-grown", "data")?;
    // It does not grow, and says what for.
    space.kubectl(&["patch", "pvc", "data", "-p", r#"{"spec":{"resources":{"requests":{"storage":"400Mi"}}}}"#])?;
    space.event(
        "PersistentVolumeClaim",
        "data",
        &["VolumeGrowthFailed", "VolumeSnapshots of it: snap-way/not-yet-grown"],
    )?;
    space.kubectl(&["delete", "volumesnapshot", "not-yet-grown", "--timeout=240s"])?;
    space.grown("data", "p", "400Mi")?;
    // Nor does it go.
    let handle = space.ready_snapshot("kept", "data")?;
    space.delete_pod("p")?;
    space.kubectl(&["delete", "pvc", "data", "--timeout=240s"])?;
    cluster
        .wait_event("default", "PersistentVolume", &volume, LONG, |event| {
            event.reason == "VolumeInUse" && event.message.contains("VolumeSnapshots of it: snap-way/kept")
        })
        .context("the PersistentVolume says what is in the way")?;
    ensure!(is_there(cluster, &handle)? && volumes_on(cluster, "n1", "claim=snap-way/data")?.contains(&volume));
    // What is there of it can still be had.
    space.claim("again", "xfs-csi", "400Mi", &from_snapshot("kept"))?;
    space.pod_with_claim("r", None, "again")?;
    space.ready("r")?;
    ensure!(space.exec("r", "cat /v0/file")? == "old");
    space.kubectl(&["delete", "volumesnapshot", "kept", "--timeout=240s"])?;
    cluster.wait(&format!("pv/{volume}"), "delete", LONG)?;
    eventually("both have gone", || {
        Ok(!is_there(cluster, &handle)? && !volumes_on(cluster, "n1", "claim=snap-way/data")?.contains(&volume))
    })?;
    space.end()
}

/// More is overwritten than its room can hold.
fn lost(cluster: &Cluster) -> Result<()> {
    take_snapshots(cluster)?;
    cluster.apply(
        "{apiVersion: snapshot.storage.k8s.io/v1, kind: VolumeSnapshotClass, metadata: {name: tiny}, \
         driver: lvm.lvprov.io, deletionPolicy: Delete, parameters: {snapshotSize: 8Mi}}",
    )?;
    let space = Space::new(cluster, "snap-lost")?;
    written(&space, "xfs-csi", "320Mi")?;
    cluster.apply(
        "{apiVersion: snapshot.storage.k8s.io/v1, kind: VolumeSnapshot, metadata: {name: small, namespace: snap-lost}, \
         spec: {volumeSnapshotClassName: tiny, source: {persistentVolumeClaimName: data}}}",
    )?;
    let handle = space.handle_of_snapshot("small")?;
    space.exec("p", "dd if=/dev/urandom of=/v0/more bs=1M count=60 2>/dev/null && sync")?;
    space.claim("again", "xfs-csi", "320Mi", &from_snapshot("small"))?;
    space.event("PersistentVolumeClaim", "again", &["small", "lost"])?;
    space.event("VolumeSnapshot", "small", &["SnapshotLost", "snapshotSize"])?;
    space.wait("volumesnapshot/small", "jsonpath={.status.readyToUse}=false")?;
    // The volume is none the worse, and the doctor knows of it.
    ensure!(space.exec("p", "cat /v0/file; stat -c %s /v0/more")? == "old\n62914560");
    let found = lvprov(cluster, &["doctor", "--node", "n1", "--json"])?;
    ensure!(found.stdout.contains("snapshot-invalid"), "{}", found.stdout);
    space.kubectl(&["delete", "pvc", "again", "--timeout=120s"])?;
    space.kubectl(&["delete", "volumesnapshot", "small", "--timeout=120s"])?;
    ensure!(!is_there(cluster, &handle)?, "{handle} is still there");
    space.end()
}

/// Of a raw device; and its logical volume outlives its VolumeSnapshot, for another one.
fn raw(cluster: &Cluster) -> Result<()> {
    take_snapshots(cluster)?;
    let space = Space::new(cluster, "snap-raw")?;
    space.claim("data", "xfs-csi", "128Mi", "volumeMode: Block")?;
    space.raw_pod("p", Some("n1"), "data", "")?;
    space.ready("p")?;
    space.exec("p", "echo old | dd of=/dev/raw bs=512 seek=7 conv=notrunc,fsync 2>/dev/null")?;
    let handle = space.ready_snapshot("before", "data")?;
    space.exec("p", "echo new | dd of=/dev/raw bs=512 seek=7 conv=notrunc,fsync 2>/dev/null")?;
    // Neither mode is made from the other.
    space.claim("files", "xfs-csi", "400Mi", &from_snapshot("before"))?;
    space.event("PersistentVolumeClaim", "files", &["ClaimRefused", "volumeMode Filesystem"])?;
    space.kubectl(&["delete", "pvc", "files", "--timeout=120s"])?;

    // It is kept without its content, is nobody's then, and is given another name.
    let content = space.get("volumesnapshot before")?;
    let content = text(&content, "/status/boundVolumeSnapshotContentName").to_owned();
    let retain = r#"{"spec":{"deletionPolicy":"Retain"}}"#;
    cluster.kubectl(["patch", "volumesnapshotcontent", &content, "--type=merge", "-p", retain])?;
    space.kubectl(&["delete", "volumesnapshot", "before", "--timeout=120s"])?;
    cluster.kubectl(["delete", "volumesnapshotcontent", &content, "--ignore-not-found", "--timeout=120s"])?;
    ensure!(is_there(cluster, &handle)?, "{handle} has gone");
    let garbage = lvprov_json(cluster, &["gc", "--json", "--older-than", "0s"])?;
    let name = handle.split_once('/').map_or("", |(_, name)| name);
    let listed =
        |garbage: &Value| garbage["items"].as_array().is_some_and(|all| all.iter().any(|one| one["name"] == name));
    ensure!(listed(&garbage), "gc does not list {name}: {garbage:#}");
    cluster.apply(&format!(
        "{{apiVersion: snapshot.storage.k8s.io/v1, kind: VolumeSnapshotContent, metadata: {{name: snap-raw-kept}}, \
         spec: {{driver: lvm.lvprov.io, deletionPolicy: Delete, source: {{snapshotHandle: '{handle}'}}, \
         sourceVolumeMode: Block, volumeSnapshotRef: {{name: kept, namespace: snap-raw}}}}}}\n---\n\
         {{apiVersion: snapshot.storage.k8s.io/v1, kind: VolumeSnapshot, metadata: {{name: kept, namespace: snap-raw}}, \
         spec: {{source: {{volumeSnapshotContentName: snap-raw-kept}}}}}}"
    ))?;
    space.wait("volumesnapshot/kept", "jsonpath={.status.readyToUse}=true")?;
    let garbage = lvprov_json(cluster, &["gc", "--json", "--older-than", "0s"])?;
    ensure!(!listed(&garbage), "gc lists what a content names: {garbage:#}");

    let more = format!("volumeMode: Block, {}", from_snapshot("kept"));
    space.claim("again", "xfs-csi", "192Mi", &more)?;
    space.raw_pod("r", None, "again", "")?;
    space.ready("r")?;
    let read = "dd if=/dev/raw bs=512 skip=7 count=1 2>/dev/null | head -c 3";
    ensure!(space.exec("r", read)? == "old" && space.exec("p", read)? == "new");
    space.exec("r", "[ $(dd if=/dev/raw bs=1M skip=128 2>/dev/null | tr -d '\\000' | wc -c) = 0 ]")?;
    space.kubectl(&["delete", "volumesnapshot", "kept", "--timeout=120s"])?;
    ensure!(!is_there(cluster, &handle)?, "{handle} is still there");
    space.end()
}
