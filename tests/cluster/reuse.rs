//! Volumes that come back: from the trash, kept ones, and such as were made by
//! hand; each by one command of the admin's.

use anyhow::{Context, Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::objects::{LONG, Source, Space, class, eventually, lvprov, lvprov_json, text, volumes_on};
use serde_json::Value;
use xtask::testbed::Cluster;

pub const TESTS: [Test<Cluster>; 4] = [
    ("reuse::a_volume_comes_back_from_the_trash", |c| trash(c, Source::Flexvolume)),
    ("reuse::csi_a_volume_comes_back_from_the_trash", |c| trash(c, Source::Csi)),
    ("reuse::a_kept_volume_is_given_to_another_claim", |c| kept(c, Source::Flexvolume)),
    ("reuse::csi_kept_and_imported_volumes_are_given_to_claims", |c| {
        kept(c, Source::Csi)?;
        imported(c)
    }),
];

/// What `lvprov trash list` has of a namespace.
fn in_trash(cluster: &Cluster, namespace: &str) -> Result<Vec<Value>> {
    let report = lvprov_json(cluster, &["trash", "list", "--json"])?;
    let all = report["volumes"].as_array().cloned().unwrap_or_default();
    Ok(all.into_iter().filter(|one| text(one, "/claim").starts_with(&format!("{namespace}/"))).collect())
}

fn refused(cluster: &Cluster, args: &[&str], words: &str) -> Result<()> {
    let out = lvprov(cluster, args)?;
    ensure!(!out.success() && out.stderr.contains(words), "{args:?}: {} {}", out.stdout, out.stderr);
    Ok(())
}

fn ok(cluster: &Cluster, args: &[&str]) -> Result<String> {
    let out = lvprov(cluster, args)?;
    ensure!(out.success(), "{args:?}: {}{}", out.stdout, out.stderr);
    Ok(out.stdout)
}

/// A pod writes into the claim's volume; then pod and claim go.
fn written_and_gone(space: &Space<'_>, class: &str, size: &str) -> Result<String> {
    space.claim("c", class, size, "")?;
    space.pod_with_claim("p", Some("n1"), "c")?;
    space.ready("p")?;
    let name = text(&space.volume_of("c")?, "/metadata/name").to_owned();
    space.exec("p", "echo kept > /v0/file && sync")?;
    gone(space)?;
    Ok(name)
}

fn gone(space: &Space<'_>) -> Result<()> {
    space.delete_pod("p")?;
    space.kubectl(&["delete", "pvc", "c", "--timeout=240s"]).map(drop)
}

/// A pod finds the file in the claim's volume.
fn found(space: &Space<'_>) -> Result<()> {
    space.pod_with_claim("p", None, "c")?;
    space.ready("p")?;
    let file = space.exec("p", "cat /v0/file")?;
    ensure!(file == "kept", "the file has {file:?}");
    Ok(())
}

fn trash(cluster: &Cluster, source: Source) -> Result<()> {
    let class_name = source.pick("careful", "careful-csi");
    let more = source.pick("", ", source: csi");
    class(cluster, class_name, &format!("volumeGroup: vg0, deletePolicy: zero, trashTime: 24h{more}"), "")?;
    let space = Space::new(cluster, source.pick("trash", "trash-csi"))?;
    let pv = written_and_gone(&space, class_name, "320Mi")?;
    cluster.wait(&format!("pv/{pv}"), "delete", LONG)?;
    let trashed = in_trash(cluster, space.name)?;
    let [one] = trashed.as_slice() else { anyhow::bail!("in the trash: {trashed:#?}") };
    ensure!(one["sizeBytes"] == 320u64 << 20 && one["deletePolicy"] == "zero" && one["wiping"] == false, "{one:#}");
    ensure!(text(one, "/storageClass") == class_name && text(one, "/node") == "n1", "{one:#}");
    let name = text(one, "/name").to_owned();
    let table = ok(cluster, &["trash", "list"])?;
    ensure!(table.contains(&name) && table.contains("goes in 23h"), "{table}");
    let capacity = lvprov_json(cluster, &["capacity", "--json"])?;
    ensure!(capacity.to_string().contains("\"trashBytes\":335544320"), "{capacity:#}");
    let garbage = lvprov_json(cluster, &["gc", "--json", "--older-than", "0s"])?;
    ensure!(!garbage.to_string().contains(&name), "{garbage:#}");

    // For a claim of the same name, as a StatefulSet makes it again.
    ok(cluster, &["trash", "restore", &name])?;
    ensure!(in_trash(cluster, space.name)?.is_empty());
    cluster.wait(&format!("pv/{pv}"), "jsonpath={.status.phase}=Available", LONG)?;
    space.claim("c", class_name, "320Mi", "")?;
    let again = space.volume_of("c")?;
    ensure!(text(&again, "/metadata/name") == pv, "{again:#}");
    found(&space)?;

    // For a claim in another namespace.
    gone(&space)?;
    cluster.wait(&format!("pv/{pv}"), "delete", LONG)?;
    let name = text(&in_trash(cluster, space.name)?[0], "/name").to_owned();
    let other = Space::new(cluster, source.pick("trash-other", "trash-other-csi"))?;
    refused(cluster, &["trash", "restore", &name, "--claim", &format!("{}/c", other.name)], "there is none")?;
    refused(cluster, &["trash", "restore", "vg0/trash-nothing"], "not in the trash")?;
    other.claim("c", class_name, "320Mi", "")?;
    let report = ok(cluster, &["trash", "restore", &name, "--claim", &format!("{}/c", other.name), "--json"])?;
    let report: Value = serde_json::from_str(&report)?;
    let given = other.volume_of("c")?;
    ensure!(text(&report, "/persistentVolume") == text(&given, "/metadata/name"), "{report:#}");
    ensure!(source.check(&given)? == text(&given, "/metadata/name"));
    found(&other)?;

    // Not waited for.
    gone(&other)?;
    eventually("it is in the trash", || Ok(!in_trash(cluster, other.name)?.is_empty()))?;
    let name = text(&in_trash(cluster, other.name)?[0], "/name").to_owned();
    ok(cluster, &["trash", "empty", &name])?;
    eventually("it has gone", || Ok(volumes_on(cluster, "n1", &format!("claim={}/", other.name))?.is_empty()))?;
    cluster.kubectl(["delete", "storageclass", class_name])?;
    other.end()?;
    space.end()
}

fn kept(cluster: &Cluster, source: Source) -> Result<()> {
    let class_name = source.pick("ext4-retain", "ext4-retain-csi");
    let space = Space::new(cluster, source.pick("kept", "kept-csi"))?;
    let pv = written_and_gone(&space, class_name, "64Mi")?;
    cluster.wait(&format!("pv/{pv}"), "jsonpath={.status.phase}=Released", LONG)?;
    let other = Space::new(cluster, source.pick("kept-other", "kept-other-csi"))?;
    let to = format!("{}/c", other.name);
    // What does not suit is refused, and nothing has changed.
    other.claim("large", class_name, "640Mi", "")?;
    refused(cluster, &["reuse", &pv, "--claim", &format!("{}/large", other.name)], "asks for 640 MiB")?;
    other.claim("xfs", source.pick("xfs", "xfs-csi"), "320Mi", "")?;
    refused(cluster, &["reuse", &pv, "--claim", &format!("{}/xfs", other.name)], "320 MiB")?;
    refused(cluster, &["reuse", &pv, "--claim", &to], "there is none")?;
    ensure!(volumes_on(cluster, "n1", &format!("claim={}/c", space.name))? == std::slice::from_ref(&pv));

    other.claim("c", class_name, "64Mi", "")?;
    let told = ok(cluster, &["reuse", &pv, "--claim", &to])?;
    ensure!(told.contains(&to), "{told}");
    cluster.wait(&format!("pv/{pv}"), "delete", LONG)?;
    let given = other.volume_of("c")?;
    let second = text(&given, "/metadata/name").to_owned();
    ensure!(text(&given, "/spec/persistentVolumeReclaimPolicy") == "Retain" && second != pv, "{given:#}");
    found(&other)?;
    refused(cluster, &["reuse", &second, "--claim", &format!("{}/large", other.name)], "it is Bound")?;
    let garbage = lvprov_json(cluster, &["gc", "--json", "--older-than", "0s"])?;
    ensure!(!garbage.to_string().contains(&second), "{garbage:#}");

    // Of one whose PV is gone, by its logical volume.
    gone(&other)?;
    cluster.kubectl(["delete", "pv", &second, "--timeout=240s"])?;
    space.claim("c", class_name, "64Mi", "")?;
    let back = format!("{}/c", space.name);
    ok(cluster, &["reuse", &format!("vg0/{second}"), "--claim", &back])?;
    let third = text(&space.volume_of("c")?, "/metadata/name").to_owned();
    found(&space)?;
    // Once more changes nothing.
    ok(cluster, &["reuse", &format!("vg0/{second}"), "--claim", &back]).context("once more").map(drop).or_else(
        |error| {
            // Its volume is in use by now, which is as good.
            if error.to_string().contains("in use") || format!("{error:#}").contains("in use") {
                Ok(())
            } else {
                Err(error)
            }
        },
    )?;
    gone(&space)?;
    cluster.kubectl(["delete", "pv", &third, "--timeout=240s"])?;
    cluster.node("n1")?.run(["lvremove", "-qq", "-y", &format!("vg0/{third}")])?;
    other.end()?;
    space.end()
}

fn imported(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "imported")?;
    let n2 = cluster.node("n2")?;
    n2.sh("lvcreate -qq -y -n mysql -L 100m vg0 && mkfs.ext4 -q /dev/vg0/mysql && mkdir -p /mnt/mysql &&
         mount /dev/vg0/mysql /mnt/mysql && echo kept > /mnt/mysql/file && umount /mnt/mysql")?;
    space.claim("c", "ext4-retain-csi", "64Mi", "")?;
    refused(cluster, &["import", "vg0/mysql", "--claim", "imported/c"], "--node")?;
    refused(cluster, &["import", "vg0/mysql", "--node", "n1", "--claim", "imported/c"], "not on this node")?;
    ok(cluster, &["import", "vg0/mysql", "--node", "n2", "--claim", "imported/c"])?;
    let pv = space.volume_of("c")?;
    ensure!(text(&pv, "/spec/capacity/storage") == "100Mi", "{pv:#}");
    found(&space)?;
    gone(&space)?;
    let name = text(&pv, "/metadata/name").to_owned();
    cluster.kubectl(["delete", "pv", &name, "--timeout=240s"])?;
    n2.run(["lvremove", "-qq", "-y", &format!("vg0/{name}")])?;
    space.end()
}
