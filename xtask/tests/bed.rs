//! What the test bed promises: real LVM, power cuts that are power cuts, and
//! nothing left behind.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::{Arguments, Failed, Trial, run};
use xtask::agent;
use xtask::sandbox::xtask_binary;
use xtask::testbed::{Cluster, ClusterOptions, Node, NodeOptions, Shared, is_asked_for};

static CLUSTER: Shared = Shared::new(ClusterOptions::default, |_| Ok(()));

fn main() -> ExitCode {
    let trial = |name, test: fn() -> Result<()>| {
        Trial::test(name, move || test().map_err(|error| Failed::from(format!("{error:#}"))))
            .with_ignored_flag(!is_asked_for())
    };
    // One after the other: each wants the machine's few cores for itself.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    let trials = vec![
        trial("commands_hand_back_what_they_say", commands_hand_back_what_they_say),
        trial("a_command_over_its_time_is_killed", a_command_over_its_time_is_killed),
        trial("guests_do_not_write_to_this_machine", guests_do_not_write_to_this_machine),
        trial("a_power_cut_keeps_what_was_synced", a_power_cut_keeps_what_was_synced),
        trial("a_reboot_keeps_what_was_written", a_reboot_keeps_what_was_written),
        trial("xtask_node_hands_back_status_and_streams", xtask_node_hands_back_status_and_streams),
        trial("a_killed_xtask_leaves_no_process_behind", a_killed_xtask_leaves_no_process_behind),
        trial("pods_run_log_and_reach_the_api", pods_run_log_and_reach_the_api),
        trial("a_wait_that_fails_tells_what_there_is", a_wait_that_fails_tells_what_there_is),
        trial("a_cluster_node_comes_back_after_a_power_cut", a_cluster_node_comes_back_after_a_power_cut),
    ];
    let conclusion = run(&arguments, trials);
    CLUSTER.end(conclusion.has_failed());
    conclusion.exit_code()
}

fn commands_hand_back_what_they_say() -> Result<()> {
    let node = Node::boot()?;
    let output = node.exec(["sh", "-c", "echo out; echo err >&2; exit 7"])?;
    ensure!((output.stdout.as_str(), output.stderr.as_str(), output.status) == ("out\n", "err\n", 7), "{output:?}");
    let error = node.run(["ls", "/nowhere"]).unwrap_err().to_string();
    ensure!(error.contains("ls /nowhere") && error.contains("status 2") && error.contains("No such file"), "{error}");
    let big = vec![b'x'; 5_000_000];
    let echoed = node.exec_with(&agent::Command::new(["cat"]), &big)?;
    ensure!(echoed.stdout.as_bytes() == big, "{} bytes came back", echoed.stdout.len());
    node.write_file("/etc/lvprov/node.json", "{}")?;
    ensure!(node.read_file("/etc/lvprov/node.json")? == "{}");
    node.sh("lvcreate -q -L 1G -n a vg0; mkfs.xfs -q /dev/vg0/a; mkdir /a; mount -o prjquota /dev/vg0/a /a")?;
    ensure!(node.run(["lvs", "--noheadings", "-o", "lv_name", "vg0"])?.trim() == "a");
    // A background process that keeps the streams open does not hold up the answer.
    let start = Instant::now();
    node.sh("sleep 60 & echo started")?;
    ensure!(start.elapsed() < Duration::from_secs(10));
    Ok(())
}

fn a_command_over_its_time_is_killed() -> Result<()> {
    let node = Node::boot_with(NodeOptions { disks_gib: vec![], ..NodeOptions::default() })?;
    let command = agent::Command::new(["sh", "-c", "echo begun; exec sleep 1234"]);
    let error = node.exec_within(&command, b"", Duration::from_secs(1)).unwrap_err().to_string();
    ensure!(error.contains("1s") && error.contains("begun"), "{error}");
    sleep(Duration::from_millis(200));
    ensure!(node.exec(["pgrep", "-f", "sleep 1234"])?.status == 1, "it still runs");
    Ok(())
}

fn guests_do_not_write_to_this_machine() -> Result<()> {
    let node = Node::boot_with(NodeOptions { disks_gib: vec![], ..NodeOptions::default() })?;
    let here = xtask_binary()?.with_file_name("written-by-a-guest");
    let path = here.display();
    node.sh(&format!("echo x > {path}; cat {path}; rm -rf /etc/hostname; ls -A /mnt/old | wc -l"))?;
    ensure!(!here.exists(), "{path} is on this machine");
    ensure!(Path::new("/etc/hostname").exists(), "/etc/hostname has gone from this machine");
    Ok(())
}

fn prepare_disk(node: &Node) -> Result<()> {
    node.sh("lvcreate -q -L 1G -n a vg0; mkfs.xfs -q /dev/vg0/a; mkdir /a; mount /dev/vg0/a /a; \
         echo kept > /a/kept; echo kept > /srv/kept; sync; echo lost > /a/lost")?;
    Ok(())
}

fn a_power_cut_keeps_what_was_synced() -> Result<()> {
    let mut node = Node::boot()?;
    prepare_disk(&node)?;
    node.power_cut()?;
    ensure!(node.exec(["true"]).is_err(), "a node without power answers");
    node.power_on()?;
    ensure!(node.exec(["mountpoint", "-q", "/a"])?.status != 0, "what was mounted still is");
    node.sh("mount /dev/vg0/a /a")?;
    ensure!(node.read_file("/a/kept")? == "kept" && node.read_file("/srv/kept")? == "kept");
    ensure!(node.exec(["cat", "/a/lost"])?.stdout != "lost\n", "what was in memory only is there");
    Ok(())
}

fn a_reboot_keeps_what_was_written() -> Result<()> {
    let mut node = Node::boot()?;
    prepare_disk(&node)?;
    node.reboot()?;
    node.sh("mount /dev/vg0/a /a")?;
    ensure!(node.read_file("/a/lost")? == "lost" && node.read_file("/srv/kept")? == "kept");
    Ok(())
}

fn xtask_node_hands_back_status_and_streams() -> Result<()> {
    let script = "cat; pwd >&2; which lvprov-flexvolume >/dev/null; exit 5";
    let mut child = Command::new(xtask_binary()?)
        .args(["node", "--no-build", "--", "sh", "-c", script])
        .current_dir("/usr/share")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    std::io::Write::write_all(&mut child.stdin.take().context("no stdin")?, b"typed")?;
    let output = child.wait_with_output()?;
    ensure!(output.status.code() == Some(5), "{output:?}");
    ensure!(output.stdout == b"typed" && output.stderr == b"/usr/share\n", "{output:?}");
    Ok(())
}

/// Processes whose command line contains `word`, zombies not counted.
fn processes_with(word: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(word) {
            found.push(line);
        }
    }
    Ok(found)
}

fn a_killed_xtask_leaves_no_process_behind() -> Result<()> {
    let mut child = Command::new(xtask_binary()?)
        .args(["node", "--no-build", "--", "sh", "-c", "echo up; sleep 1000"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let directory = format!("/run/node-{}-0", child.id());
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("no stdout")?).read_line(&mut line)?;
    ensure!(line == "up\n", "{line}");
    ensure!(!processes_with(&directory)?.is_empty(), "the test looks for the wrong thing");
    child.kill()?;
    child.wait()?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while !processes_with(&directory)?.is_empty() {
        ensure!(Instant::now() < deadline, "{:?}", processes_with(&directory)?);
        sleep(Duration::from_millis(50));
    }
    Ok(())
}

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: hello}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: hello
    image: lvprov.io/busybox:latest
    imagePullPolicy: IfNotPresent
    command: [sh, -c, 'echo hello; sleep 1000']
";

fn pods_run_log_and_reach_the_api() -> Result<()> {
    let cluster = CLUSTER.get()?;
    cluster.apply(POD)?;
    cluster.wait("pod/hello", "condition=Ready", Duration::from_secs(60))?;
    ensure!(cluster.kubectl(["logs", "hello"])? == "hello");
    ensure!(cluster.kubectl_output(["exec", "hello", "--", "sh", "-c", "exit 3"])?.status == 3);
    cluster.kubectl(["exec", "hello", "--", "nc", "-w", "5", "10.96.0.1", "443", "-e", "true"])?;
    let event = cluster.wait_event("default", "Pod", "hello", Duration::from_secs(20), |e| e.reason == "Started")?;
    ensure!(event.kind == "Normal", "{event:?}");
    let pod = cluster.get_json("pod hello")?;
    ensure!(pod["status"]["phase"] == "Running");
    cluster.delete(POD)?;
    cluster.wait("pod/hello", "delete", Duration::from_secs(30))
}

fn a_wait_that_fails_tells_what_there_is() -> Result<()> {
    let cluster = CLUSTER.get()?;
    let error = cluster.wait("node/n1", "jsonpath={.metadata.name}=n2", Duration::from_secs(1)).unwrap_err();
    let error = format!("{error:#}");
    ensure!(error.contains("timed out") && error.contains("MemoryPressure"), "{error}");
    let error = cluster.watch("node n1", Duration::from_secs(1), |node| node["metadata"]["name"] == "n2").unwrap_err();
    ensure!(error.to_string().contains("MemoryPressure"), "{error}");
    Ok(())
}

fn a_cluster_node_comes_back_after_a_power_cut() -> Result<()> {
    let cluster = CLUSTER.get()?;
    let node = cluster.node("n2")?;
    let boot = |cluster: &Cluster| {
        Ok::<_, anyhow::Error>(cluster.get_json("node n2")?["status"]["nodeInfo"]["bootID"].clone())
    };
    let before = boot(cluster)?;
    node.power_cut()?;
    node.power_on()?;
    cluster.watch("node n2", Duration::from_secs(60), |node| node["status"]["nodeInfo"]["bootID"] != before)?;
    ensure!(
        cluster.get_json("node n1")?["status"]["nodeInfo"]["machineID"]
            != cluster.get_json("node n2")?["status"]["nodeInfo"]["machineID"]
    );
    cluster.wait("node/n2", "condition=Ready", Duration::from_secs(60))
}
