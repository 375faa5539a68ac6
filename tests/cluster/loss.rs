//! A node that leaves the cluster for good, and one that comes back too late.

use anyhow::{Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::objects::{IDLE, LONG, Space, class, eventually, lvprov, text, volumes_on};
use xtask::testbed::Cluster;

pub const TESTS: [Test<Cluster>; 1] = [("loss::a_lost_nodes_claims_are_made_anew_elsewhere", lost)];

fn set_up_controller(cluster: &Cluster, patch: &str) -> Result<()> {
    cluster.kubectl(["-n", "lvprov-system", "patch", "deployment", "lvprov-controller", "--type=json", "-p", patch])?;
    cluster.kubectl(["-n", "lvprov-system", "rollout", "status", "deployment/lvprov-controller", "--timeout=240s"])?;
    // The one before may still be ending.
    eventually("one controller is left", || {
        let pods = cluster.get_json("-n lvprov-system pods -l app.kubernetes.io/component=controller")?;
        Ok(pods["items"].as_array().is_some_and(|pods| pods.len() == 1))
    })
}

fn lost(cluster: &Cluster) -> Result<()> {
    cluster.apply(include_str!("../../deploy/node-loss/rbac.yaml"))?;
    let args = "/spec/template/spec/containers/0/args";
    set_up_controller(cluster, &format!(r#"[{{"op": "add", "path": "{args}/-", "value": "--node-lost-after=15"}}]"#))?;
    let controller = cluster.get_json("-n lvprov-system pods -l app.kubernetes.io/component=controller")?;
    let stays = text(&controller, "/items/0/spec/nodeName").to_owned();
    let goes = if stays == "n1" { "n2" } else { "n1" };

    class(cluster, "recreate", "volumeGroup: vg0, onNodeLoss: recreate", "")?;
    let space = Space::new(cluster, "loss")?;
    cluster.kubectl(["cordon", &stays])?;
    cluster.apply(
        &"{apiVersion: apps/v1, kind: StatefulSet, metadata: {name: set, namespace: loss}, spec: {replicas: 1, \
         serviceName: set, selector: {matchLabels: {app: set}}, \
         template: {metadata: {labels: {app: set}}, spec: {terminationGracePeriodSeconds: 1, containers: [{name: c, \
         image: 'lvprov.io/busybox:latest', imagePullPolicy: Never, command: {IDLE}, \
         volumeMounts: [{name: data, mountPath: /v0}]}]}}, volumeClaimTemplates: [{metadata: {name: data}, spec: \
         {accessModes: [ReadWriteOnce], storageClassName: recreate, resources: {requests: {storage: 320Mi}}}}]}}"
            .replace("{IDLE}", IDLE),
    )?;
    space.wait("pod/set-0", "create")?;
    space.ready("set-0")?;
    for (claim, class) in [("kept", "xfs"), ("released", "xfs"), ("alone", "recreate")] {
        space.claim(claim, class, "320Mi", "")?;
        space.pod_with_claim(claim, None, claim)?;
        space.ready(claim)?;
    }
    cluster.kubectl(["uncordon", &stays])?;
    let uid_of =
        |claim: &str| Ok::<_, anyhow::Error>(text(&space.get(&format!("pvc {claim}"))?, "/metadata/uid").to_owned());
    let pv_of = |claim: &str| Ok::<_, anyhow::Error>(text(&space.volume_of(claim)?, "/metadata/name").to_owned());
    let (first, kept, alone) = (uid_of("data-set-0")?, uid_of("kept")?, uid_of("alone")?);
    let (first_pv, released_pv, kept_pv) = (pv_of("data-set-0")?, pv_of("released")?, pv_of("kept")?);

    let node = cluster.node(goes)?;
    node.kill_kubelet()?;
    cluster.kubectl(["delete", "node", goes])?;
    space.event("PersistentVolumeClaim", "data-set-0", &[goes, "not in the cluster any more"])?;
    space.event("PersistentVolumeClaim", "kept", &["The volume is kept"])?;
    // Its pod is deleted by hand, as that of a claim that goes meanwhile.
    space.kubectl(&["delete", "pod", "released", "--force", "--grace-period=0"])?;
    space.kubectl(&["delete", "pvc", "released", "--wait=false"])?;

    // The pod garbage collector takes its time; then the StatefulSet's pod waits, and gets a new claim.
    cluster
        .watch("-n loss pvc data-set-0", 4 * LONG, |claim| text(claim, "/metadata/uid") != first && !claim.is_null())?;
    space.ready("set-0")?;
    ensure!(text(&space.get("pod set-0")?, "/spec/nodeName") == stays);
    ensure!(pv_of("data-set-0")? != first_pv);
    space.event("PersistentVolumeClaim", "data-set-0", &["has been gone for long enough"])?;
    for pv in [&first_pv, &released_pv] {
        cluster.wait(&format!("pv/{pv}"), "delete", LONG)?;
    }
    let events = cluster.kubectl(["get", "events", "-n", "default", "-o", "jsonpath={.items[*].message}"])?;
    ensure!(events.contains(&format!("vg0/{first_pv} is left behind on node {goes}")), "{events}");
    // What is to be kept is, and what nobody would make anew.
    ensure!(uid_of("kept")? == kept && uid_of("alone")? == alone);

    // It comes back after all: what was left behind is nobody's, and the rest goes on.
    node.start_kubelet()?;
    cluster.wait(&format!("node/{goes}"), "create", LONG)?;
    cluster.wait(&format!("node/{goes}"), "condition=Ready", LONG)?;
    eventually("the node service is back", || {
        Ok(!text(&cluster.get_json(&format!("node {goes}"))?, "/metadata/labels/topology.lvprov.io~1node").is_empty())
    })?;
    eventually("the kept volume has its node again", || {
        let pv = cluster.get_json(&format!("pv {kept_pv}"))?;
        Ok(text(&pv, "/metadata/annotations/lvprov.io~1node-lost-since").is_empty())
    })?;
    eventually("gc lists what was left behind", || {
        let listed = lvprov(cluster, &["gc", "--older-than", "0s"])?.stdout;
        Ok(listed.contains(&first_pv) && listed.contains(&released_pv) && !listed.contains(&kept_pv))
    })?;
    lvprov(cluster, &["gc", "--apply", "--older-than", "0s", "--settle", "1s"])?;
    eventually("it is removed", || {
        let left = volumes_on(cluster, goes, "claim=loss/")?;
        Ok(!left.iter().any(|name| *name == first_pv || *name == released_pv))
    })?;
    space.end()?;
    let all = cluster.get_json("-n lvprov-system deployment lvprov-controller")?;
    let all = all.pointer(args).and_then(|args| args.as_array()).map_or(0, Vec::len);
    set_up_controller(cluster, &format!(r#"[{{"op": "remove", "path": "{args}/{}"}}]"#, all - 1))
}
