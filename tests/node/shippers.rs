//! A real log shipper: rsyslog, configured as deploy/examples/shippers/rsyslog.conf says.

use anyhow::{Context, Result, bail, ensure};
use lvprov_tests::Test;
use lvprov_tests::driver::Call;
use serde_json::Value;
use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};
use xtask::agent::Command;
use xtask::testbed::Node;

pub const TESTS: [Test<Node>; 1] =
    [("shippers::rsyslog_ships_every_line_of_pods_that_come_rotate_and_go_once", rsyslog)];

const VOLUMES: [&str; 2] = ["ship-a", "ship-b"];
const PODS: [&str; 3] = ["web-0", "web-1", "web-2"];
/// Where the example writes to.
const SHIPPED: &str = "/var/log/lvprov-shipped.log";
const LIMIT: Duration = Duration::from_secs(120);

/// What a pod writes: numbered lines, from `$3` on, each with the pod's name
/// `$2`, to files in `$1`. It rotates by going on in a file of a new name, at
/// once. Its last lines come at its very end. In its slow part it says so.
const WRITER: &str = r#"
cd "$1"; who=$2; next=$3
lines() {
    end=$((next + $2))
    while [ $next -lt $end ]; do
        echo "$who $next: a line that is about as long as lines in logs commonly are"
        next=$((next + 1))
    done >> $1
}
lines app.log 100
lines app-$3-0.log 50
lines app.log 100
touch slow
for i in 1 2 3 4 5 6 7 8 9 10; do
    sleep 0.4
    lines app.log 2
done
lines app-$3-1.log 100
lines app-$3-2.log 100
lines app.log 30
"#;
/// How many lines that are.
const LINES: usize = 500;

/// Starts rsyslog where it sees of the log volumes only those of this test. In
/// its memory a file of less than 512 bytes is an inode number and no more, and
/// the same number stands for other files on other volumes: what another test
/// has left would cost a file here its beginning (docs/operations.md says so).
const START: &str = r#"
for directory in /var/log/lvprov/*/; do
    test "$directory" = /var/log/lvprov/ship/ || mount -t tmpfs none "$directory"
done
exec rsyslogd -n -i /run/rsyslog-test.pid -f /run/rsyslog-test.conf
"#;

/// A running rsyslog; killed when dropped.
struct Rsyslog<'a> {
    node: &'a Node,
    pid: i32,
}

impl<'a> Rsyslog<'a> {
    fn start(node: &'a Node) -> Result<Self> {
        let example = xtask::paths::repository().join("deploy/examples/shippers/rsyslog.conf");
        let main = format!(
            "global(workDirectory=\"/var/spool/rsyslog\")\ninclude(file=\"{}\" mode=\"required\")\n",
            example.display()
        );
        node.write_file("/run/rsyslog-test.conf", main)?;
        node.run(["mkdir", "-p", "/var/spool/rsyslog"])?;
        // New volumes arrive in its mount namespace; what is hidden in there is hidden nowhere else.
        let command = Command::new(["unshare", "--mount", "--propagation", "slave", "sh", "-ec", START]);
        let pid = node.spawn(&command, "/run/rsyslog-test.log").context("rsyslog, which cargo xtask setup installs")?;
        Ok(Self { node, pid })
    }

    fn stop(self) -> Result<()> {
        let pid = self.pid;
        self.node.sh(&format!(
            "kill {pid}; n=0; while test -d /proc/{pid}; do sleep 0.1; n=$((n + 1)); test $n -lt 300; done"
        ))?;
        Ok(())
    }
}

impl Drop for Rsyslog<'_> {
    fn drop(&mut self) {
        let _ = self.node.exec(["kill", "-9", &self.pid.to_string()]);
    }
}

fn pods() -> impl Iterator<Item = (&'static str, &'static str)> {
    VOLUMES.into_iter().flat_map(|volume| PODS.into_iter().map(move |pod| (volume, pod)))
}

/// All pods come, write and go, and with each of them its process.
fn life(node: &Node, number: usize, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
    let calls: Vec<Call> =
        pods().map(|(volume, pod)| Call::log("ship", pod, &format!("{volume}-{pod}-{number}"), volume)).collect();
    let mut pids = Vec::new();
    for ((volume, pod), call) in pods().zip(&calls) {
        call.mount(node)?.success()?;
        let (from, who) = (number * LINES, format!("{volume}/{pod}"));
        let command = Command::new(["sh", "-ec", WRITER, "sh", &call.directory(), &who, &from.to_string()]);
        pids.push(node.spawn(&command, "/run/writers.log")?);
    }
    for call in &calls {
        until("a pod is in its slow part", || {
            Ok(node.exec(["test", "-e", &format!("{}/slow", call.directory())])?.success())
        })?;
    }
    meanwhile()?;
    for (pid, call) in pids.into_iter().zip(&calls) {
        until("a pod ends", || Ok(node.agent().status(pid)?.is_some()))?;
        let exit = node.agent().status(pid)?.context("it has ended")?;
        ensure!(exit.code == Some(0), "a writer failed: {}", node.read_file("/run/writers.log")?);
        node.run(["rm", &format!("{}/slow", call.directory())])?;
        // As soon as it has ended, whatever has been shipped by then.
        call.unmount(node)?.success()?;
        node.run(["rmdir", &call.directory()])?;
    }
    Ok(())
}

/// All files that pods go on in are rotated by renaming. Around that pods have to
/// be quiet (docs/operations.md): all that was written has been shipped by now,
/// and nothing is written before rsyslog, which keeps the old file for five
/// seconds and more, has let go.
fn rename(node: &Node, rsyslog: &Rsyslog) -> Result<()> {
    for (volume, pod) in pods() {
        let file = format!("/var/log/lvprov/ship/{volume}/{pod}/app.log");
        node.run(["mv", &file, &format!("{file}.1")])?;
    }
    let held = format!("ls -l /proc/{}/fd | grep -c 'app.log.1$' || true", rsyslog.pid);
    ensure!(node.sh(&held)?.trim() != "0", "rsyslog reads none of the renamed files");
    until("rsyslog lets go of renamed files", || Ok(node.sh(&held)?.trim() == "0"))
}

fn until(what: &str, mut check: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !check()? {
        if begun.elapsed() > LIMIT {
            bail!("{what}: not within {LIMIT:?}");
        }
        sleep(Duration::from_millis(200));
    }
    Ok(())
}

fn rsyslog(node: &Node) -> Result<()> {
    // One volume's place is there before the volume is, as after a reboot.
    node.run(["mkdir", "-p", "/var/log/lvprov/ship/ship-a"])?;
    let mut running = Some(Rsyslog::start(node)?);
    sleep(Duration::from_secs(1));
    // The volumes are made under its eyes, and it is restarted while all write.
    life(node, 0, || {
        running.take().context("it runs")?.stop()?;
        running = Some(Rsyslog::start(node)?);
        Ok(())
    })?;
    let running = running.context("it runs")?;
    let shipped = |expected: usize| {
        let count = format!("grep -c '\"namespace\":\"ship\"' {SHIPPED} || true");
        until("every line is shipped", || Ok(node.sh(&count)?.trim().parse().unwrap_or(0) >= expected))
    };
    // What is missing is told by the check at the end.
    let _ = shipped(LINES * pods().count());
    rename(node, &running)?;
    // Each pod is made again, with another UID, and goes on in its files.
    life(node, 1, || Ok(()))?;
    let _ = shipped(2 * LINES * pods().count());
    // What came twice comes within the next looks.
    sleep(Duration::from_secs(3));
    running.stop()?;
    check(&node.read_file(SHIPPED)?).with_context(|| node.read_file("/run/rsyslog-test.log").unwrap_or_default())
}

/// Every line once, with the names of its pod.
fn check(shipped: &str) -> Result<()> {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for line in shipped.lines() {
        let entry: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        let text = |key: &str| entry[key].as_str().unwrap_or("").to_owned();
        let message = text("message");
        let key = message.split(':').next().unwrap_or("").to_owned();
        // Tests leave files behind, of which nothing may be seen here.
        ensure!(text("namespace") == "ship", "{line}");
        ensure!(key.starts_with(&format!("{}/{} ", text("volume"), text("directory"))), "{line}");
        *seen.entry(key).or_default() += 1;
    }
    let mut wrong = Vec::new();
    for (volume, pod) in pods() {
        for number in 0..2 * LINES {
            match seen.remove(&format!("{volume}/{pod} {number}")) {
                Some(1) => {}
                count => wrong.push(format!("{volume}/{pod} {number}: {} times", count.unwrap_or(0))),
            }
        }
    }
    ensure!(wrong.is_empty(), "{} lines: {}", wrong.len(), wrong[..wrong.len().min(20)].join(", "));
    ensure!(seen.is_empty(), "lines that nobody wrote: {seen:?}");
    Ok(())
}
