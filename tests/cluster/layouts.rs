//! Striped and mirrored volumes: on n1, whose spare disks become a group.

use anyhow::{Context, Result, ensure};
use lvm::size::parse_quantity;
use lvprov_tests::Test;
use lvprov_tests::objects::{Space, claim_volume, class, eventually, lvprov, text, volume_size};
use serde_json::Value;
use xtask::testbed::{Cluster, Machine};

pub const TESTS: [Test<Cluster>; 3] = [
    ("layouts::each_lives_as_a_linear_one_does", lives),
    ("layouts::a_mirror_that_cannot_grow_gets_back", cannot_grow),
    ("layouts::a_device_class_is_another_group_on_each_node", device_classes),
];

const MIB: u64 = 1 << 20;
const DISKS: &str = "/dev/ubdc /dev/ubdd /dev/ubde /dev/ubdf";
/// Name, parameters, and what is free for it on four empty disks of 1020 MiB.
const CLASSES: [(&str, &str, u64); 3] = [
    ("striped", "layout: striped, stripes: '3', source: csi", 3 * 1020),
    ("raid1", "layout: raid1", 1016),
    ("raid10", "layout: raid10, source: csi", 2 * 1016),
];

/// Others, too, have the group to themselves.
struct Disks {
    node: Machine,
}

impl Disks {
    fn make(cluster: &Cluster) -> Result<Self> {
        let node = cluster.node("n1")?.clone();
        node.sh(&format!("vgcreate -qq -y vg1 {DISKS} && echo changed > /run/lvprov/vg-vg1.lock"))?;
        for (name, parameters, _) in CLASSES {
            class(cluster, name, &format!("volumeGroup: vg1, {parameters}"), "")?;
        }
        Ok(Self { node })
    }

    fn end(self, cluster: &Cluster) -> Result<()> {
        eventually("nothing is left in the group", || {
            Ok(self.node.run(["lvs", "-a", "--noheadings", "vg1"])?.trim().is_empty())
        })?;
        for (name, _, _) in CLASSES {
            cluster.kubectl(["delete", "storageclass", name])?;
        }
        self.node.sh(&format!(
            "vgremove -qq -y vg1; for d in {DISKS}; do pvremove -qq -y $d; done; echo changed > /run/lvprov/vg-vg1.lock"
        ))?;
        Ok(())
    }
}

/// What the scheduler is told: all together, and the largest.
fn told(cluster: &Cluster, class: &str) -> Result<Option<(u64, u64)>> {
    let list = cluster.get_json("-n lvprov-system csistoragecapacities")?;
    let of_class: Vec<&Value> = list["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|item| text(item, "/storageClassName") == class)
        .collect();
    ensure!(
        of_class.iter().all(|item| text(item, "/nodeTopology/matchLabels/topology.lvprov.io~1node") == "n1"),
        "{of_class:#?}"
    );
    let bytes = |item: &Value, field: &str| parse_quantity(text(item, field)).context("a quantity");
    of_class.first().map(|item| Ok((bytes(item, "/capacity")?, bytes(item, "/maximumVolumeSize")?))).transpose()
}

fn lives(cluster: &Cluster) -> Result<()> {
    let disks = Disks::make(cluster)?;
    let space = Space::new(cluster, "layouts")?;
    for (name, _, mib) in CLASSES {
        eventually("the room for it is told", || Ok(told(cluster, name)?.is_some_and(|(_, most)| most == mib * MIB)))?;
    }
    for (name, _, _) in CLASSES {
        space.claim(name, name, "320Mi", "")?;
    }
    let volumes: Vec<String> = CLASSES.map(|(name, _, _)| claim_volume(name)).to_vec();
    // Only n1 has the group.
    space.pod("p", None, &volumes)?;
    space.ready("p")?;
    ensure!(text(&space.get("pod p")?, "/spec/nodeName") == "n1");
    for (name, size, layout) in
        [("striped", "324Mi", "striped:3:65536"), ("raid1", "320Mi", "raid1:1"), ("raid10", "320Mi", "raid10:2:65536")]
    {
        let pv = space.volume_of(name)?;
        ensure!(text(&pv, "/spec/capacity/storage") == size, "{pv:#}");
        ensure!(text(&pv, "/metadata/annotations/lvprov.io~1layout") == layout, "{pv:#}");
        let kind = disks.node.run([
            "lvs",
            "--noheadings",
            "-o",
            "segtype",
            &format!("vg1/{}", text(&pv, "/metadata/name")),
        ])?;
        ensure!(kind.trim() == layout.split(':').next().unwrap_or_default(), "{kind}");
    }
    // Each of the first two disks has 324/3 + 324 + 164 of them, the third 272 and the last 164.
    eventually("their room is taken", || {
        Ok(told(cluster, "raid10")?.is_some_and(|(_, most)| most < 2 * 1016 * MIB - 300 * MIB))
    })?;
    space.exec("p", "for v in 0 1 2; do echo kept > /v$v/file; done; sync")?;
    for (name, size) in [("striped", "408Mi"), ("raid1", "400Mi"), ("raid10", "400Mi")] {
        let patch = r#"{"spec":{"resources":{"requests":{"storage":"400Mi"}}}}"#;
        space.kubectl(&["patch", "pvc", name, "-p", patch])?;
        space.grown(name, "p", size)?;
        let volume = text(&space.volume_of(name)?, "/metadata/name").to_owned();
        ensure!(volume_size(cluster, "n1", &volume)? == parse_quantity(size)?, "{name}");
    }
    space.delete_pod("p")?;
    space.pod("p", None, &volumes)?;
    space.ready("p")?;
    ensure!(space.exec("p", "cat /v0/file /v1/file /v2/file")?.replace('\n', " ") == "kept kept kept");
    // Larger than any two disks: nowhere, and it is said how it would lie.
    space.claim("large", "raid1", "1Gi", "")?;
    space.pod("waits", None, &[claim_volume("large")])?;
    space.event("PersistentVolumeClaim", "large", &["as raid1 (2 disks each)", "n1 has", "missing"])?;
    space.end()?;
    disks.end(cluster)
}

/// The group has room on two disks, but not where a mirror could grow.
fn cannot_grow(cluster: &Cluster) -> Result<()> {
    let disks = Disks::make(cluster)?;
    let space = Space::new(cluster, "no-mirror")?;
    space.claim("flex", "raid1", "320Mi", "")?;
    space.pod_with_claim("p", None, "flex")?;
    space.ready("p")?;
    // It is on the first two: now the second and the third are the ones with room.
    disks.node.sh("lvcreate -qq -y -an -Zn -Wn -n fill1 -l 100%PVS vg1 /dev/ubdc; \
         lvcreate -qq -y -an -Zn -Wn -n fill2 -l 100%PVS vg1 /dev/ubdf; echo changed > /run/lvprov/vg-vg1.lock")?;
    let patch = |size: &str| {
        let patch = format!(r#"{{"spec":{{"resources":{{"requests":{{"storage":"{size}"}}}}}}}}"#);
        space.kubectl(&["patch", "pvc", "flex", "-p", &patch])?;
        space.hurry("p")
    };
    patch("500Mi")?;
    space.event("Pod", "p", &["cannot grow", "its copies are on", "on others"])?;
    ensure!(space.exec("p", "touch /v0/file && echo running")? == "running");
    // One byte more than it has: tried, and ended.
    patch("335544321")?;
    eventually("the growth has ended", || {
        space.hurry("p")?;
        std::thread::sleep(std::time::Duration::from_secs(2));
        let claim = space.get("pvc flex")?;
        Ok(text(&claim, "/status/allocatedResources/storage") == "320Mi"
            && text(&claim, "/status/allocatedResourceStatuses/storage").is_empty())
    })?;
    space.event("PersistentVolumeClaim", "flex", &["VolumeGrowthWithdrawn", "320 MiB"])?;
    ensure!(text(&space.volume_of("flex")?, "/spec/capacity/storage") == "320Mi");
    space.delete_pod("p")?;
    space.pod_with_claim("p", None, "flex")?;
    space.ready("p")?;
    // Once there is room, it grows.
    disks.node.sh("lvremove -qq -y vg1/fill1 vg1/fill2; echo changed > /run/lvprov/vg-vg1.lock")?;
    patch("500Mi")?;
    space.grown("flex", "p", "500Mi")?;
    space.end()?;
    disks.end(cluster)
}

/// n1 calls its vg1 fast, and n2 its vg0; n1's default is vg0, and n2 has none. And vg1 has a thin pool.
fn device_classes(cluster: &Cluster) -> Result<()> {
    let disks = Disks::make(cluster)?;
    let classes = [
        (
            "n1",
            r#""deviceClasses":{"fast":{"volumeGroup":"vg1"},"bulk":{"volumeGroup":"vg0","default":true}},
               "thinPools":{"vg1":{"pool":"pool0"}}"#,
        ),
        ("n2", r#""deviceClasses":{"fast":{"volumeGroup":"vg0"}}"#),
    ];
    let configure = |with: bool| -> Result<()> {
        for (node, classes) in classes {
            let more = if with { format!(",{classes}") } else { String::new() };
            let text = format!(r#"{{"commandLog":"{}"{more}}}"#, crate::COMMANDS);
            cluster.node(node)?.write_file("/etc/lvprov/node.json", text)?;
        }
        cluster.kubectl(["-n", "lvprov-system", "rollout", "restart", "daemonset/lvprov-node"])?;
        cluster.kubectl(["-n", "lvprov-system", "rollout", "status", "daemonset/lvprov-node", "--timeout=240s"])?;
        Ok(())
    };
    disks.node.sh("lvcreate -qq -y --type thin-pool -L 1g -n pool0 vg1")?;
    configure(true)?;
    class(cluster, "fast", "deviceClass: fast", "")?;
    class(cluster, "fast-csi", "deviceClass: fast, source: csi", "")?;
    class(cluster, "anywhere", "source: csi", "")?;
    class(cluster, "thin", "volumeGroup: vg1, layout: thin", "mountOptions: [discard]")?;
    eventually("what its pool can hold is told", || Ok(told(cluster, "thin")? == Some((1 << 30, 1 << 30))))?;
    let space = Space::new(cluster, "device-classes")?;
    let cases = [("fast", "n1", "vg1"), ("fast-csi", "n2", "vg0"), ("anywhere", "n1", "vg0"), ("thin", "n1", "vg1")];
    for (name, node, _) in cases {
        space.claim(name, name, "320Mi", "")?;
        space.pod_with_claim(name, Some(node), name)?;
    }
    for (name, node, group) in cases {
        space.ready(name)?;
        let pv = space.volume_of(name)?;
        let volume = text(&pv, "/metadata/name");
        let options = "/spec/flexVolume/options/volumeGroup";
        let handle = text(&pv, "/spec/csi/volumeHandle");
        ensure!(text(&pv, options) == group || handle == format!("{group}/{volume}"), "{pv:#}");
        cluster.node(node)?.run(["lvs", &format!("{group}/{volume}")])?;
        space.kubectl(&["patch", "pvc", name, "-p", r#"{"spec":{"resources":{"requests":{"storage":"400Mi"}}}}"#])?;
        space.grown(name, name, "400Mi")?;
    }
    eventually("what is promised of the pool is told", || {
        Ok(told(cluster, "thin")?.is_some_and(|(_, most)| most == 624 * MIB))
    })?;
    // Pods start with a growth that the pool cannot hold only once it is taken back.
    let patch = |size: &str| {
        let patch = format!(r#"{{"spec":{{"resources":{{"requests":{{"storage":"{size}"}}}}}}}}"#);
        space.kubectl(&["patch", "pvc", "thin", "-p", &patch])
    };
    patch("2Gi")?;
    space.event("PersistentVolumeClaim", "thin", &["VolumeGrowthImpossible", "missing"])?;
    patch("500Mi")?;
    space.grown("thin", "thin", "500Mi")?;
    // n2 has no default.
    space.claim("nowhere", "anywhere", "320Mi", "")?;
    space.pod_with_claim("nowhere", Some("n2"), "nowhere")?;
    space.event("Pod", "nowhere", &["FailedScheduling"])?;
    space.kubectl(&["annotate", "pvc", "nowhere", "volume.kubernetes.io/selected-node=n2"])?;
    space.event("PersistentVolumeClaim", "nowhere", &["NoVolumeGroup", "n2", "lacks the default device class"])?;
    let shown = lvprov(cluster, &["capacity"])?;
    ensure!(shown.stdout.contains("bulk (default)") && shown.stdout.contains("fast"), "{}", shown.stdout);
    space.end()?;
    for name in ["fast", "fast-csi", "anywhere", "thin"] {
        cluster.kubectl(["delete", "storageclass", name])?;
    }
    configure(false)?;
    eventually("nothing is left in the pool", || {
        Ok(disks.node.run(["lvs", "--noheadings", "-o", "lv_name", "vg1"])?.trim() == "pool0")
    })?;
    disks.node.run(["lvremove", "-qq", "-y", "vg1/pool0"])?;
    disks.end(cluster)
}
