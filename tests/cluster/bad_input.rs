//! What is refused: with an Event on the object that asks, and nothing made.

use anyhow::{Context, Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::objects::{Space, class, log_volume, text, volumes_on};
use xtask::testbed::Cluster;

pub const TESTS: [Test<Cluster>; 2] =
    [("bad_input::claims_that_cannot_be_served", claims), ("bad_input::log_volumes_that_cannot_be_served", logs)];

fn claims(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "badclaims")?;
    class(cluster, "bad-parameter", "volumeGroup: vg0, stripes: '2'", "")?;
    class(cluster, "bad-group", "volumeGroup: '--help'", "")?;
    class(cluster, "bad-both", "volumeGroup: vg0, deviceClass: fast", "")?;
    class(cluster, "bad-fs", "volumeGroup: vg0, csi.storage.k8s.io/fstype: ntfs", "")?;
    class(cluster, "bad-options", "volumeGroup: vg0", "mountOptions: [suid]")?;
    class(cluster, "bad-binding", "volumeGroup: vg0", "volumeBindingMode: Immediate")?;
    cluster.apply(
        "{apiVersion: storage.k8s.io/v1, kind: VolumeAttributesClass, metadata: {name: gold}, driverName: lvm.lvprov.io, parameters: {iops: '100'}}",
    )?;
    let modes = "accessModes: [ReadWriteMany]";
    let cases: [(&str, &str, &str, &str, &[&str]); 12] = [
        ("rwx", "xfs", "1Gi", modes, &["ReadWriteMany", "ReadWriteOnce"]),
        ("rox", "xfs", "1Gi", "accessModes: [ReadOnlyMany]", &["ReadOnlyMany"]),
        ("block", "xfs", "1Gi", "volumeMode: Block", &["Block", "source: csi"]),
        ("selector", "xfs", "1Gi", "selector: {matchLabels: {a: b}}", &["selector"]),
        ("source", "xfs", "1Gi", "dataSource: {kind: PersistentVolumeClaim, name: rwx}", &["dataSource"]),
        ("attributes", "xfs", "1Gi", "volumeAttributesClassName: gold", &["VolumeAttributesClass"]),
        ("small", "xfs", "100Mi", "", &["300 MiB"]),
        ("parameter", "bad-parameter", "1Gi", "", &["stripes"]),
        ("group", "bad-group", "1Gi", "", &["--help"]),
        ("both", "bad-both", "1Gi", "", &["both a volumeGroup and a deviceClass"]),
        ("fs", "bad-fs", "1Gi", "", &["ntfs", "xfs"]),
        ("options", "bad-options", "1Gi", "", &["suid", "noatime"]),
    ];
    for (name, class, size, more, _) in cases {
        space.claim(name, class, size, more).with_context(|| name.to_owned())?;
    }
    space.claim("binding", "bad-binding", "1Gi", "")?;
    for (name, _, _, _, words) in cases {
        space.event("PersistentVolumeClaim", name, words)?;
        // Even where somebody has chosen a node, nothing is made.
        space.kubectl(&["annotate", "pvc", name, "volume.kubernetes.io/selected-node=n1"])?;
    }
    space.event("PersistentVolumeClaim", "binding", &["WaitForFirstConsumer"])?;
    std::thread::sleep(std::time::Duration::from_secs(3));
    for node in ["n1", "n2"] {
        let made = volumes_on(cluster, node, "claim=badclaims/")?;
        ensure!(made.is_empty(), "{made:?} on {node}");
    }
    let claims = space.get("pvc")?;
    for claim in claims["items"].as_array().into_iter().flatten() {
        ensure!(text(claim, "/status/phase") == "Pending", "{claim:#}");
    }
    // Everything else goes on.
    space.claim("good", "xfs", "320Mi", "")?;
    space.pod_with_claim("p", None, "good")?;
    space.ready("p")?;
    space.end()
}

fn logs(cluster: &Cluster) -> Result<()> {
    let space = Space::new(cluster, "badlogs")?;
    let bad = |options: &str| vec![format!("flexVolume: {{driver: lvprov.io/lvm, options: {{{options}}}}}")];
    let cases: [(&str, Vec<String>, &[&str]); 5] = [
        ("missing", bad("type: log, volume: a, size: 1Gi"), &["option quota is missing"]),
        ("slash", bad("type: log, volume: ../a, size: 1Gi, quota: 1Mi"), &["log volume name"]),
        ("huge", bad("type: log, volume: a, size: 900Gi, quota: 1Mi"), &["vg0", "missing"]),
        (
            "group",
            bad("type: log, volume: a, size: 1Gi, quota: 1Mi, volumeGroup: vg9"),
            &["volume group vg9 is not open", "vg0"],
        ),
        ("unknown", vec![log_volume("a", "qouta: 1Mi")], &["qouta"]),
    ];
    for (name, volumes, _) in &cases {
        space.pod(name, Some("n2"), volumes)?;
    }
    for (name, _, words) in &cases {
        space.event("Pod", name, words)?;
    }
    let made = volumes_on(cluster, "n2", "log=badlogs/")?;
    ensure!(made.is_empty(), "{made:?}");
    space.end()
}
