//! `lvprov gc`: finds what nothing owns, and removes nothing else.

use anyhow::{Context, Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::objects::{Space, eventually, log_volume, lvprov, lvprov_json, text, volumes_on};
use serde_json::Value;
use xtask::testbed::Cluster;

pub const TESTS: [Test<Cluster>; 3] = [
    ("gc::an_orphan_is_listed_and_goes_only_when_told", orphan),
    ("gc::log_directories_go_after_their_retention_and_the_volume_last", logs),
    ("gc::nothing_is_touched_when_the_api_cannot_be_asked", api_down),
];

/// The names that gc lists, from its JSON.
fn listed(report: &Value) -> Vec<String> {
    report["items"].as_array().into_iter().flatten().map(|item| text(item, "/name").to_owned()).collect()
}

fn make_orphan(cluster: &Cluster, node: &str, uid: &str) -> Result<String> {
    let id = text(&cluster.get_json("namespace kube-system")?, "/metadata/uid").to_owned();
    let name = format!("pvc-{uid}");
    cluster.node(node)?.sh(&format!(
        "lvcreate -qq -y -n {name} -L 320m --addtag lvprov.io/kind=data --addtag lvprov.io/cluster={id} \
         --addtag lvprov.io/claim-uid={uid} --addtag lvprov.io/claim=gone/data vg0"
    ))?;
    Ok(name)
}

fn orphan(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "gc")?;
    space.claim("c", "xfs", "320Mi", "")?;
    space.pod_with_claim("p", Some("n2"), "c")?;
    space.ready("p")?;
    let used = text(&space.volume_of("c")?, "/metadata/name").to_owned();
    let orphan = make_orphan(cluster, "n2", "99999999-1111-4222-8333-444455556666")?;
    let n2 = cluster.node("n2")?;
    n2.sh("lvcreate -qq -y -n somebody-elses -L 8m vg0")?;
    // One of another cluster that has the same disk.
    n2.sh("lvcreate -qq -y -n pvc-88888888-1111-4222-8333-444455556666 -L 8m --addtag lvprov.io/kind=data \
         --addtag lvprov.io/cluster=77777777-1111-4222-8333-444455556666 \
         --addtag lvprov.io/claim-uid=88888888-1111-4222-8333-444455556666 --addtag lvprov.io/claim=gone/other vg0")?;
    let fresh = lvprov_json(cluster, &["gc", "--json", "--older-than", "1h"])?;
    ensure!(!listed(&fresh).iter().any(|name| name.contains(&orphan)), "too young to be listed: {fresh:#}");
    let report = lvprov_json(cluster, &["gc", "--json", "--older-than", "0s"])?;
    let names = listed(&report);
    ensure!(names.iter().any(|name| name.contains(&orphan)), "{report:#}");
    for not in [used.as_str(), "somebody-elses", "pvc-88888888"] {
        ensure!(!names.iter().any(|name| name.contains(not)), "{not} is listed: {report:#}");
    }
    ensure!(volumes_on(cluster, "n2", "claim=gone/data")?.len() == 1, "gc without --apply has removed something");
    let table = lvprov(cluster, &["gc", "--older-than", "0s"])?;
    ensure!(table.success() && table.stdout.contains(&orphan) && table.stdout.contains("320 MiB"), "{}", table.stdout);
    let applied = lvprov(cluster, &["gc", "--apply", "--older-than", "0s", "--settle", "1s"])?;
    ensure!(applied.success(), "{}{}", applied.stdout, applied.stderr);
    ensure!(volumes_on(cluster, "n2", "claim=gone/data")?.is_empty());
    let left = n2.run(["lvs", "--noheadings", "-o", "lv_name", "vg0"])?;
    for kept in [used.as_str(), "somebody-elses", "pvc-88888888"] {
        ensure!(left.contains(kept), "{kept} is gone; left are {left}");
    }
    space.exec("p", "touch /v0/file")?;
    n2.sh("lvremove -qq -y vg0/somebody-elses vg0/pvc-88888888-1111-4222-8333-444455556666")?;
    space.end()
}

fn logs(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "gclogs")?;
    space.pod("short", Some("n1"), &[log_volume("gc", "retention: 1s")])?;
    space.pod("long", Some("n1"), &[log_volume("gc", "retention: 24h")])?;
    space.ready("short")?;
    space.ready("long")?;
    space.exec("short", "echo line > /v0/log")?;
    let gc = || lvprov_json(cluster, &["gc", "--json", "--older-than", "0s"]);
    let has = |report: &Value, what: &str| listed(report).iter().any(|name| name.contains(what));
    let report = gc()?;
    ensure!(!has(&report, "gclogs"), "a directory in use is listed: {report:#}");
    space.delete_pod("short")?;
    space.delete_pod("long")?;
    let n1 = cluster.node("n1")?;
    eventually("kubelet has unmounted", || Ok(n1.sh("grep -c '/short ' /proc/self/mountinfo || true")? == "0"))?;
    eventually("the short directory is past its retention", || Ok(has(&gc()?, "short")))?;
    let report = gc()?;
    ensure!(!has(&report, "long"), "a directory within its retention is listed: {report:#}");
    let apply = || -> Result<()> {
        let out = lvprov(cluster, &["gc", "--apply", "--older-than", "0s", "--settle", "1s"])?;
        ensure!(out.success(), "{}{}", out.stdout, out.stderr);
        Ok(())
    };
    apply()?;
    let left = n1.run(["ls", "/var/log/lvprov/gclogs/gc"])?;
    ensure!(left == "long", "{left}");
    // The last directory gone, the volume is listed and goes as well.
    n1.run(["rm", "-r", "/var/log/lvprov/gclogs/gc/long"])?;
    apply()?;
    ensure!(volumes_on(cluster, "n1", "log=gclogs/")?.is_empty());
    ensure!(!n1.exec(["test", "-e", "/var/log/lvprov/gclogs"])?.success(), "the mount point is still there");
    space.end()
}

fn api_down(cluster: &Cluster) -> Result<()> {
    let orphan = make_orphan(cluster, "n1", "66666666-1111-4222-8333-444455556666")?;
    // The admin's machine: certificates from the Secret, an API server that is not there.
    let n1 = cluster.node("n1")?;
    n1.run(["mkdir", "-p", "/run/admin-tls"])?;
    let secret = cluster.get_json("-n lvprov-system secret lvprov-controller-tls")?;
    for (key, value) in secret["data"].as_object().context("the secret has no data")? {
        let value = value.as_str().unwrap_or("");
        n1.sh(&format!("echo {value} | base64 -d > /run/admin-tls/{key}"))?;
    }
    n1.write_file(
        "/run/kubeconfig",
        "{apiVersion: v1, kind: Config, current-context: c, clusters: [{name: c, cluster: {server: 'https://127.0.0.1:1'}}], \
         contexts: [{name: c, context: {cluster: c, user: u}}], users: [{name: u, user: {token: x}}]}",
    )?;
    let out = n1.sh("set +e; KUBECONFIG=/run/kubeconfig timeout 100 lvprov gc --apply --older-than 0s --settle 1s \
         --tls-dir /run/admin-tls 2>&1; echo status=$?")?;
    ensure!(!out.contains("status=0") && !out.contains("status=124"), "{out}");
    ensure!(
        volumes_on(cluster, "n1", "claim=gone/data")? == [orphan.clone()],
        "gc has removed what it could not ask about"
    );
    n1.run(["lvremove", "-qq", "-y", &format!("vg0/{orphan}")])?;
    Ok(())
}
