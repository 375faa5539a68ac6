//! Processes that die at any moment: nothing is lost, leaked or made twice.

use anyhow::{Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::objects::{LONG, Space, text, volumes_on};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use xtask::testbed::Cluster;

pub const TESTS: [Test<Cluster>; 1] = [("crash::twenty_claims_while_controller_and_nodes_are_killed", twenty)];

/// Small and seeded: a failure can be had again with LVPROV_SEED.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        // xorshift64
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn twenty(cluster: &Cluster) -> Result<()> {
    let seed = match std::env::var("LVPROV_SEED") {
        Ok(seed) => seed.parse()?,
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64 | 1,
    };
    eprintln!("crash: LVPROV_SEED={seed}");
    let mut random = Random(seed);
    let space = Space::new(cluster, "crash")?;
    let mut objects = String::new();
    for i in 0..20 {
        let node = if i % 2 == 0 { "n1" } else { "n2" };
        objects.push_str(&format!(
            "---\n{{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {{name: c{i}, namespace: crash, annotations: \
             {{volume.kubernetes.io/selected-node: {node}}}}}, spec: {{accessModes: [ReadWriteOnce], storageClassName: xfs, \
             resources: {{requests: {{storage: 320Mi}}}}}}}}\n"
        ));
    }
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| -> Result<()> {
            for _ in 0..3 {
                std::thread::sleep(Duration::from_millis(random.below(1500)));
                let victim = ["controller", "node"][random.below(2) as usize];
                let at = ["n1", "n2"][random.below(2) as usize];
                // The controller runs on one of the two; the kill that finds none is no loss.
                let nodes = if victim == "controller" { vec!["n1", "n2"] } else { vec![at] };
                for node in nodes {
                    cluster.node(node)?.exec(["pkill", "-KILL", "-f", &format!("^/lvprov[ -]{victim}( |$)")])?;
                }
            }
            Ok(())
        });
        cluster.apply(&objects)?;
        killer.join().unwrap_or_else(|_| anyhow::bail!("the killer panicked"))
    })?;
    for i in 0..20 {
        // A container killed again and again is started with growing pauses.
        cluster.wait(&format!("-n crash pvc/c{i}"), "jsonpath={.status.phase}=Bound", 3 * LONG)?;
    }
    let pvs = cluster.get_json("pv")?;
    let ours =
        pvs["items"].as_array().into_iter().flatten().filter(|pv| text(pv, "/spec/claimRef/namespace") == "crash");
    let count = ours.count();
    ensure!(count == 20, "{count} PVs (seed {seed})");
    let volumes = volumes_on(cluster, "n1", "claim=crash/")?.len() + volumes_on(cluster, "n2", "claim=crash/")?.len();
    ensure!(volumes == 20, "{volumes} volumes (seed {seed})");
    for i in [0, 19] {
        space.pod_with_claim(&format!("p{i}"), None, &format!("c{i}"))?;
        space.ready(&format!("p{i}"))?;
    }
    space.end()?;
    for node in ["n1", "n2"] {
        lvprov_tests::objects::eventually("all volumes are removed", || {
            Ok(volumes_on(cluster, node, "claim=crash/")?.is_empty())
        })?;
    }
    Ok(())
}
