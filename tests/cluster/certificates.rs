//! Certificates that renew themselves, seen by those who use them; and that
//! nobody else gets at them.

use anyhow::{Context, Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::objects::{LONG, Space, eventually, text};
use serde_json::Value;
use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};
use xtask::testbed::{Cluster, ClusterNode};

pub const TESTS: [Test<Cluster>; 3] = [
    ("certificates::renewed_while_claims_are_served_and_a_node_sleeps", renewals),
    ("certificates::what_an_admin_has_broken_is_mended_by_a_controller_that_starts_with_it", broken),
    ("certificates::only_the_controller_reads_them_and_each_right_is_the_least", rights),
];

const SYSTEM: &str = "lvprov-system";

/// A pod of lvprov, and the certificate that kubelet has put in it.
struct Holder<'a> {
    node: ClusterNode<'a>,
    pod: String,
    file: String,
    secret: &'static str,
}

impl<'a> Holder<'a> {
    fn of(cluster: &'a Cluster, pod: &Value) -> Result<Self> {
        let controller = text(pod, "/metadata/labels/app.kubernetes.io~1component") == "controller";
        let uid = text(pod, "/metadata/uid");
        Ok(Self {
            node: cluster.node(text(pod, "/spec/nodeName"))?,
            pod: text(pod, "/metadata/name").to_owned(),
            file: format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~secret/tls"),
            secret: if controller { "lvprov-controller-tls" } else { "lvprov-node-tls" },
        })
    }

    /// Whether kubelet has brought what the Secrets hold.
    fn is_up_to_date(&self, secrets: &Value) -> Result<bool> {
        let named = |secret: &&Value| text(secret, "/metadata/name") == self.secret;
        let wanted = secrets["items"].as_array().into_iter().flatten().find(named).context("no such Secret")?;
        let held = self.node.sh(&format!("base64 -w0 {0}/tls.crt && echo && base64 -w0 {0}/ca.crt", self.file))?;
        let wanted = ["/data/tls.crt", "/data/ca.crt"].map(|key| text(wanted, key));
        Ok(held.lines().collect::<Vec<_>>() == wanted)
    }

    fn kubelet(&self, signal: &str) -> Result<()> {
        self.node.sh(&format!("kill -{signal} $(cat /run/kubelet.pid)")).map(drop)
    }
}

/// Waits until kubelets have brought what the Secrets hold. They look at a pod
/// every minute or so, and at once when the pod has changed.
fn bring(cluster: &Cluster, holders: &[&Holder]) -> Result<()> {
    let note = format!("lvprov.io/hurry={}", SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos());
    let pods = holders.iter().map(|holder| holder.pod.as_str());
    cluster.kubectl(["-n", SYSTEM, "annotate", "--overwrite", "pod"].into_iter().chain(pods).chain([note.as_str()]))?;
    eventually("kubelets have brought the Secrets", || {
        let secrets = cluster.get_json(&format!("-n {SYSTEM} secret lvprov-controller-tls lvprov-node-tls"))?;
        Ok(holders
            .iter()
            .map(|holder| holder.is_up_to_date(&secrets))
            .collect::<Result<Vec<_>>>()?
            .iter()
            .all(|is| *is))
    })
}

/// Calls all nodes over connections of its own.
fn all_answer(cluster: &Cluster) -> Result<()> {
    let lvprov = ["-n", SYSTEM, "exec", "deploy/lvprov-controller", "--", "/lvprov", "capacity"];
    cluster.kubectl(lvprov).context("`lvprov capacity` in the controller's pod").map(drop)
}

fn renew(cluster: &Cluster) -> Result<()> {
    let lvprov = ["-n", SYSTEM, "exec", "deploy/lvprov-controller", "--", "/lvprov", "certificates", "--renew"];
    cluster.kubectl(lvprov).map(drop)
}

/// Waits until this key of a Secret is something else, and not empty.
fn changed(cluster: &Cluster, secret: &str, key: &str, before: &str) -> Result<String> {
    let at = format!("/data/{key}");
    let seen = cluster.watch(&format!("-n {SYSTEM} secret {secret}"), LONG, |seen| {
        let now = text(seen, &at);
        !now.is_empty() && now != before
    })?;
    Ok(text(&seen, &at).to_owned())
}

fn value(cluster: &Cluster, secret: &str, key: &str) -> Result<String> {
    Ok(text(&cluster.get_json(&format!("-n {SYSTEM} secret {secret}"))?, &format!("/data/{key}")).to_owned())
}

fn set_lifetime(cluster: &Cluster, lifetime: &str) -> Result<()> {
    let patch = format!(r#"{{"stringData":{{"lifetime":"{lifetime}"}}}}"#);
    cluster.kubectl(["-n", SYSTEM, "patch", "secret", "lvprov-authorities", "-p", &patch]).map(drop)
}

fn renewals(cluster: &Cluster) -> Result<()> {
    let list = cluster.get_json(&format!("-n {SYSTEM} pods -l app.kubernetes.io/name=lvprov"))?;
    let pods: Vec<Value> = list["items"].as_array().context("no list of pods")?.clone();
    let (controller, nodes): (Vec<Holder>, Vec<Holder>) = pods
        .iter()
        .map(|pod| Holder::of(cluster, pod))
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .partition(|holder| holder.secret == "lvprov-controller-tls");
    let controller = controller.first().context("no controller")?;
    let (awake, sleeper): (Vec<_>, Vec<_>) = nodes.iter().partition(|node| node.node.name() == controller.node.name());
    let (awake, sleeper) = (awake.first().context("no node")?, sleeper.first().context("no second node")?);

    let all = [controller, awake, sleeper];
    let done = renew_twice(cluster, controller, awake, sleeper).and_then(|()| wakes(cluster, sleeper));
    // Other tests go on with certificates that live for long.
    sleeper.kubelet("CONT")?;
    let made = ["-n", SYSTEM, "exec", "deploy/lvprov-controller", "--", "/lvprov", "certificates"];
    cluster.apply(&cluster.kubectl(made)?)?;
    bring(cluster, &all)?;
    eventually("all nodes answer", || Ok(all_answer(cluster).is_ok()))?;
    done?;
    // All of it without a restart.
    let list = cluster.get_json(&format!("-n {SYSTEM} pods -l app.kubernetes.io/name=lvprov"))?;
    let facts = |pods: &[Value]| -> BTreeSet<(String, String)> {
        let restarts = |pod: &Value| pod["status"]["containerStatuses"][0]["restartCount"].to_string();
        pods.iter().map(|pod| (text(pod, "/metadata/uid").to_owned(), restarts(pod))).collect()
    };
    ensure!(facts(list["items"].as_array().context("no list of pods")?) == facts(&pods), "pods were restarted");
    let events = cluster.get_json(&format!("-n {SYSTEM} events --field-selector reason=CertificateNotRenewed"))?;
    ensure!(events["items"].as_array().is_some_and(Vec::is_empty), "{events:#}");
    Ok(())
}

/// One that slept for longer than it may is back with its kubelet.
fn wakes(cluster: &Cluster, sleeper: &Holder) -> Result<()> {
    sleeper.kubelet("CONT")?;
    let space = Space::new(cluster, "renewed")?;
    space.claim("c", "xfs", "320Mi", "")?;
    let node = sleeper.node.name().to_owned();
    space.pod_with_claim("p", Some(&node), "c")?;
    bring(cluster, &[sleeper])?;
    eventually("all nodes answer", || Ok(all_answer(cluster).is_ok()))?;
    space.ready("p")?;
    space.leave()
}

/// Certificates of a minute and a half: a new authority signs after 22 seconds.
fn renew_twice(cluster: &Cluster, controller: &Holder, awake: &Holder, sleeper: &Holder) -> Result<()> {
    let node_before = value(cluster, "lvprov-node-tls", "tls.crt")?;
    let trusted_before = value(cluster, "lvprov-node-tls", "ca.crt")?;
    let authority_before = value(cluster, "lvprov-authorities", "node.crt")?;
    set_lifetime(cluster, "90s")?;
    renew(cluster)?;
    let node_second = changed(cluster, "lvprov-node-tls", "tls.crt", &node_before)?;
    changed(cluster, "lvprov-node-tls", "ca.crt", &trusted_before)?;
    changed(cluster, "lvprov-controller-tls", "ca.crt", "")?;
    bring(cluster, &[controller, awake, sleeper])?;
    all_answer(cluster)?;

    // It sleeps while the new authorities take over.
    sleeper.kubelet("STOP")?;
    let authority_second = changed(cluster, "lvprov-authorities", "node.crt", &authority_before)?;
    let node_third = changed(cluster, "lvprov-node-tls", "tls.crt", &node_second)?;
    bring(cluster, &[controller, awake])?;
    all_answer(cluster).context("the node that sleeps has what it needs")?;

    // And once more, for longer than it may.
    renew(cluster)?;
    changed(cluster, "lvprov-node-tls", "tls.crt", &node_third)?;
    changed(cluster, "lvprov-authorities", "node.crt", &authority_second)?;
    bring(cluster, &[controller, awake])?;
    cluster
        .wait_event(SYSTEM, "Secret", "lvprov-node-tls", LONG, |event| event.message.contains("without a restart"))?;
    Ok(())
}

/// The controller's own certificate, without which it calls nobody, and a Secret that is gone.
fn broken(cluster: &Cluster) -> Result<()> {
    let scale = |replicas: &str| cluster.kubectl(["-n", SYSTEM, "scale", "deployment/lvprov-controller", replicas]);
    scale("--replicas=0")?;
    cluster.wait(&format!("-n {SYSTEM} pod -l app.kubernetes.io/component=controller"), "delete", LONG)?;
    let patch = r#"{"stringData":{"tls.crt":"garbage","ca.crt":"garbage"}}"#;
    cluster.kubectl(["-n", SYSTEM, "patch", "secret", "lvprov-controller-tls", "-p", patch])?;
    cluster.kubectl(["-n", SYSTEM, "delete", "secret", "lvprov-metrics-tls"])?;
    scale("--replicas=1")?;
    let garbage = value(cluster, "lvprov-controller-tls", "tls.crt")?;
    changed(cluster, "lvprov-controller-tls", "tls.crt", &garbage)?;
    cluster.wait_event(SYSTEM, "Secret", "lvprov-authorities", LONG, |event| {
        event.message.contains("kubectl create secret generic lvprov-metrics-tls")
    })?;
    cluster.kubectl(["-n", SYSTEM, "create", "secret", "generic", "lvprov-metrics-tls"])?;
    for key in ["tls.crt", "tls.key", "ca.crt"] {
        changed(cluster, "lvprov-metrics-tls", key, "")?;
    }
    let list = cluster.get_json(&format!("-n {SYSTEM} pods -l app.kubernetes.io/component=controller"))?;
    bring(cluster, &[&Holder::of(cluster, &list["items"][0])?])?;
    let space = Space::new(cluster, "mended")?;
    space.claim("c", "xfs", "320Mi", "")?;
    space.pod_with_claim("p", None, "c")?;
    space.ready("p")?;
    eventually("all nodes answer", || Ok(all_answer(cluster).is_ok()))?;
    space.leave()
}

fn rights(cluster: &Cluster) -> Result<()> {
    let may = |account: &str, what: &str| -> Result<bool> {
        let mut words = vec!["auth", "can-i", "--as"];
        let account = format!("system:serviceaccount:{SYSTEM}:lvprov-{account}");
        words.push(&account);
        words.extend(what.split(' '));
        // Its exit status is the answer.
        Ok(cluster.kubectl_output(words)?.stdout.trim() == "yes")
    };
    let ours = "secret/lvprov-authorities -n lvprov-system";
    ensure!(may("controller", &format!("get {ours}"))? && may("controller", &format!("patch {ours}"))?);
    // How the controller learns what time it is at the API server.
    let patch = r#"{"metadata":{"annotations":{"lvprov.io/clock":"now"}}}"#;
    let asked = cluster.kubectl([
        "-n",
        SYSTEM,
        "patch",
        "secret",
        "lvprov-authorities",
        "--type=merge",
        "--dry-run=server",
        "--field-manager=lvprov-clock",
        "--show-managed-fields",
        "-o",
        "json",
        "-p",
        patch,
    ])?;
    let asked: Value = serde_json::from_str(&asked)?;
    let stamps = asked["metadata"]["managedFields"].as_array().context("no managedFields")?;
    let stamp = stamps.iter().find(|stamp| stamp["manager"] == "lvprov-clock").context("not stamped")?;
    ensure!(stamp["time"].is_string(), "{stamp:#}");
    ensure!(value(cluster, "lvprov-authorities", "lifetime").is_ok_and(|lifetime| !lifetime.is_empty()));
    for what in [
        "list secrets -n lvprov-system",
        "watch secrets -n lvprov-system",
        "create secrets -n lvprov-system",
        "delete secret/lvprov-authorities -n lvprov-system",
        "get secret/other -n lvprov-system",
        "get secret/lvprov-authorities -n default",
        "get secrets -A",
        "create pods -n lvprov-system",
        "delete pods -A",
        "create pods/exec -n lvprov-system",
        "patch nodes",
        "update persistentvolumeclaims -n default",
        "delete persistentvolumeclaims -n default",
        "get volumesnapshots.snapshot.storage.k8s.io -A",
        "list volumesnapshotcontents.snapshot.storage.k8s.io",
        "impersonate users",
        "escalate clusterroles",
    ] {
        ensure!(!may("controller", what)?, "the controller may {what}");
    }
    for what in [
        "get secrets -n lvprov-system",
        "get secret/lvprov-node-tls -n lvprov-system",
        "get secret/lvprov-authorities -n lvprov-system",
        "create persistentvolumes",
        "patch persistentvolumes",
        "get persistentvolumes",
        "list pods -A",
        "get nodes",
        "patch nodes",
        "create events -n default",
        "get leases -n lvprov-system",
    ] {
        ensure!(!may("node", what)?, "the node service may {what}");
    }
    Ok(())
}
