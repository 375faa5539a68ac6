//! `cargo xtask demo`.

use std::time::{Duration, Instant};
use std::{fs, process};

use anyhow::{Result, bail, ensure};
use clap::Args;

use crate::paths;
use crate::progress::{say, step};
use crate::sandbox::Sandbox;
use crate::setup::{self, binaries};
use crate::testbed::{Cluster, ClusterOptions};

/// Name of the cluster that `--keep` leaves: the one that `cargo xtask cluster`
/// means where it is given none.
const KEPT: &str = "dev";
const LIMIT: Duration = Duration::from_secs(120);

/// Shows all that lvprov does on a real Kubernetes with two nodes.
#[derive(Debug, Args)]
pub struct DemoCommand {
    /// Leave the cluster running.
    #[arg(long)]
    keep: bool,
    /// Profile of the binaries.
    #[arg(long, value_enum, default_value_t)]
    profile: binaries::Profile,
}

/// A log volume that is not kept: what `gc` has to do.
const SHORT_LIVED: &str = "
apiVersion: v1
kind: Pod
metadata: {name: batch, namespace: default}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  containers:
    - name: batch
      image: lvprov.io/busybox:latest
      imagePullPolicy: Never
      command: [sh, -c, 'echo done > /logs/result']
      volumeMounts: [{name: logs, mountPath: /logs}]
  volumes:
    - name: logs
      flexVolume:
        driver: lvprov.io/lvm
        options: {type: log, volume: batch-logs, size: 512Mi, quota: 50Mi, retention: 1s}
";

/// Runs it.
///
/// # Errors
/// When a part of it does not do what it should.
pub fn run(command: &DemoCommand) -> Result<()> {
    let start = Instant::now();
    if command.keep && Sandbox::find(KEPT)?.is_some() {
        bail!("a cluster {KEPT} is running: `cargo xtask cluster down` ends it");
    }
    setup::for_cluster()?;
    step("Build lvprov", || binaries::build(command.profile))?;
    let ready = Instant::now();
    let options = ClusterOptions {
        name: if command.keep { KEPT.into() } else { format!("demo-{}", process::id()) },
        profile: command.profile,
        detached: command.keep,
        ..ClusterOptions::default()
    };
    let cluster =
        step("Start Kubernetes 1.37 with two nodes (user-mode Linux, a volume group vg0 of 20 GiB each)", || {
            Cluster::start(options)
        })?;
    let tour = Tour { cluster: &cluster };
    let shown = tour.all();
    if shown.is_err() || !command.keep {
        cluster.end(shown.is_err());
    }
    shown?;
    println!(
        "\nAll of it worked: {:.0} s, {:.0} s of them once everything was built.",
        start.elapsed().as_secs_f64(),
        ready.elapsed().as_secs_f64()
    );
    if command.keep {
        println!(
            "The cluster is left running:
  cargo xtask cluster kubectl get pods,pvc,pv
  cargo xtask cluster kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov volumes
  cargo xtask cluster exec n1 -- lvs -o +tags
  cargo xtask cluster down"
        );
    } else {
        println!("Nothing is left of it; --keep would leave the cluster running.");
    }
    Ok(())
}

struct Tour<'a> {
    cluster: &'a Cluster,
}

impl Tour<'_> {
    fn all(&self) -> Result<()> {
        step("Install lvprov from deploy/manifests", || self.cluster.install_lvprov())?;
        self.show("get pods -n lvprov-system -o wide")?;
        step("Apply deploy/examples/statefulset.yaml: three pods, a claim each", || self.claims())?;
        step("Delete pod db-0: it comes back to its data", || self.comes_back())?;
        // kubelet takes up to 90 s to look at a volume again: seen to below.
        step("Ask for 2 GiB for the claim of db-0, while it is in use", || self.ask_for_more())?;
        step("Apply deploy/examples/deployment-logs.yaml: three pods, log volumes with quotas", || self.logs())?;
        step("Fill the quota of one pod", || self.quota())?;
        step("Delete the Deployment: its logs stay readable on the nodes", || self.logs_stay())?;
        step("Collect what nothing owns any more", || self.collect())?;
        step("See that the claim of db-0 has grown", || self.has_grown())?;
        step("Delete the StatefulSet and its claims: their volumes go", || self.delete())
    }

    fn example(&self, name: &str) -> Result<String> {
        Ok(fs::read_to_string(paths::repository().join("deploy/examples").join(name))?)
    }

    /// Runs a read-only kubectl command and prints it with what it says.
    fn show(&self, arguments: &str) -> Result<()> {
        println!("\n$ kubectl {arguments}\n{}\n", self.cluster.kubectl(arguments.split_whitespace())?);
        Ok(())
    }

    fn lvprov(&self, arguments: &str) -> Result<String> {
        let line = format!("-n lvprov-system exec deploy/lvprov-controller -- /lvprov {arguments}");
        let said = self.cluster.kubectl(line.split_whitespace())?;
        println!("\n$ kubectl {line}\n{said}\n");
        Ok(said)
    }

    fn show_on_nodes(&self, script: &str) -> Result<()> {
        for name in self.cluster.node_names() {
            println!("\n{name}# {script}\n{}\n", self.cluster.node(&name)?.sh(script)?);
        }
        Ok(())
    }

    fn claims(&self) -> Result<()> {
        self.cluster.apply(&self.example("statefulset.yaml")?)?;
        for pod in ["db-0", "db-1", "db-2"] {
            self.cluster.wait(&format!("pod/{pod}"), "create", LIMIT)?;
            self.cluster.wait(&format!("pod/{pod}"), "condition=Ready", LIMIT)?;
        }
        self.show("get pods -l app=db -o wide")?;
        self.show("get persistentvolumeclaims")?;
        self.show("get persistentvolumes")?;
        self.show("get csistoragecapacities -n lvprov-system -o custom-columns=CLASS:.storageClassName,CAPACITY:.capacity,NODE:.nodeTopology.matchLabels")?;
        self.show_on_nodes("lvs -o name,size,tags vg0; grep vg0-pvc /proc/mounts")
    }

    fn logs(&self) -> Result<()> {
        self.cluster.apply(&self.example("deployment-logs.yaml")?)?;
        self.cluster.wait("deployment/web", "condition=Available", LIMIT)?;
        self.cluster.kubectl(["rollout", "status", "deployment/web", "--timeout=120s"])?;
        self.show("get pods -l app=web -o wide")?;
        self.show_on_nodes(
            "lvs -o name,size,tags -S 'lv_name=~^log-' vg0; cd /var/log/lvprov/default/web-logs; ls; \
             xfs_quota -x -c 'report -p -h' .",
        )
    }

    fn web_pods(&self) -> Result<Vec<String>> {
        let names =
            self.cluster.kubectl(["get", "pods", "-l", "app=web", "-o", "jsonpath={.items[*].metadata.name}"])?;
        Ok(names.split_whitespace().map(Into::into).collect())
    }

    fn quota(&self) -> Result<()> {
        let pods = self.web_pods()?;
        let [first, others @ ..] = pods.as_slice() else { bail!("the Deployment has no pods") };
        let fill = "dd if=/dev/zero of=/logs/fill bs=1M count=200 2>&1; df -h /logs; rm /logs/fill";
        let said = self.cluster.kubectl_output(["exec", first, "--", "sh", "-c", fill])?.stdout;
        println!("\n$ kubectl exec {first} -- sh -c '{fill}'\n{said}");
        ensure!(said.contains("No space left") || said.contains("quota"), "the quota of {first} did not stop it");
        for pod in others {
            self.cluster.kubectl(["exec", pod, "--", "sh", "-c", "echo undisturbed >> /logs/web.log"])?;
        }
        say("its neighbours went on writing");
        Ok(())
    }

    fn starts(&self) -> Result<String> {
        self.cluster.kubectl(["exec", "db-0", "--", "cat", "/data/starts"])
    }

    fn comes_back(&self) -> Result<()> {
        let before = self.starts()?;
        self.cluster.kubectl(["delete", "pod", "db-0"])?;
        self.cluster.wait("pod/db-0", "create", LIMIT)?;
        self.cluster.wait("pod/db-0", "condition=Ready", LIMIT)?;
        let after = self.starts()?;
        println!("\n$ kubectl exec db-0 -- cat /data/starts\n{after}\n");
        ensure!(
            after.starts_with(&before) && after.lines().count() == before.lines().count() + 1,
            "db-0 lost its data"
        );
        Ok(())
    }

    fn ask_for_more(&self) -> Result<()> {
        let patch = r#"{"spec":{"resources":{"requests":{"storage":"2Gi"}}}}"#;
        self.cluster.kubectl(["patch", "pvc", "data-db-0", "-p", patch])?;
        println!("\n$ kubectl patch pvc data-db-0 -p '{patch}'\n");
        Ok(())
    }

    fn has_grown(&self) -> Result<()> {
        self.cluster.wait("pvc/data-db-0", "jsonpath={.status.capacity.storage}=2Gi", Duration::from_secs(240))?;
        self.show("get persistentvolumeclaim data-db-0")?;
        self.show("exec db-0 -- df -h /data")
    }

    fn logs_stay(&self) -> Result<()> {
        self.cluster.delete(&self.example("deployment-logs.yaml")?)?;
        self.cluster.kubectl(["wait", "--for=delete", "pod", "-l", "app=web", "--timeout=120s"])?;
        self.show_on_nodes("tail -n 2 /var/log/lvprov/default/web-logs/*/web.log")
    }

    fn collect(&self) -> Result<()> {
        self.cluster.apply(SHORT_LIVED)?;
        self.cluster.wait("pod/batch", "jsonpath={.status.phase}=Succeeded", LIMIT)?;
        self.cluster.delete(SHORT_LIVED)?;
        // Its retention, and the age that gc is asked to leave alone.
        std::thread::sleep(Duration::from_secs(3));
        self.lvprov("volumes")?;
        let listed = self.lvprov("gc --older-than 1s")?;
        ensure!(listed.contains("batch"), "gc does not list the directory of pod batch");
        self.lvprov("gc --older-than 1s --settle 1s --apply")?;
        // The volume that was left empty.
        self.lvprov("gc --older-than 1s --settle 1s --apply")?;
        let left = self.lvprov("gc --older-than 1s")?;
        ensure!(!left.contains("batch-logs"), "gc --apply left something of pod batch");
        Ok(())
    }

    fn delete(&self) -> Result<()> {
        self.cluster.kubectl(["delete", "statefulset", "db"])?;
        self.cluster.kubectl(["delete", "pvc", "data-db-0", "data-db-1", "data-db-2"])?;
        self.cluster.kubectl(["wait", "--for=delete", "pv", "--all", "--timeout=120s"])?;
        self.show("get pods,persistentvolumeclaims,persistentvolumes")?;
        self.show_on_nodes("lvs -o name,size vg0; vgs -o name,size,free vg0")?;
        for name in self.cluster.node_names() {
            let left = self.cluster.node(&name)?.run(["lvs", "--noheadings", "-o", "name", "-S", "lv_name=~^pvc-"])?;
            ensure!(left.trim().is_empty(), "volumes are left on {name}: {left}");
        }
        Ok(())
    }
}
