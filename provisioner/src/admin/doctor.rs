//! `lvprov doctor`: what will hurt on a node, before it does.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use lvm::Lvm;
use lvm::config::NodeConfig;
use lvm::doctor::{Finding as Found, Scope, Severity};
use lvm::names::VgName;
use lvprov_proto::lvprov as wire;
use lvprov_proto::lvprov::DiagnoseResponse;
use nix::unistd::{Uid, gethostname};
use serde::Serialize;

use super::fleet::{Answer, Fleet};
use super::report::{NodeReport, Report as _};
use super::{AdminError, Reach};
use crate::node::namespace;

/// Clocks that differ by more make Events and ages hard to read, and
/// certificates valid too early or too late.
const CLOCK_SLACK_MILLIS: i64 = 30_000;

/// What `lvprov doctor` is told.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lvprov doctor                                    # this node, as root
  lvprov doctor --volume-group vg0 --json
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov doctor --all
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov doctor --node n1

Nothing is changed. Each finding has an id, says what is wrong, and what to do.
The exit status is 0 where nothing is wrong, 1 with warnings, 2 with errors, or
where a node does not answer.")]
pub struct Args {
    #[command(flatten)]
    reach: Reach,
    /// Ask the node service of this node, instead of looking at this machine
    #[arg(long, value_name = "NAME", conflicts_with = "all")]
    node: Option<String>,
    /// Ask the node services of all nodes
    #[arg(long)]
    all: bool,
    /// On this machine: look at these volume groups only
    #[arg(long = "volume-group", value_name = "VG", conflicts_with_all = ["node", "all"])]
    volume_groups: Vec<VgName>,
    /// On this machine: kubelet's root directory
    #[arg(long, default_value = "/var/lib/kubelet", value_name = "DIR", conflicts_with_all = ["node", "all"])]
    kubelet_root: PathBuf,
    /// In a privileged container with hostPID: look at the host
    #[arg(long, conflicts_with_all = ["node", "all"])]
    host_mount_namespace: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command; gives the exit status.
///
/// # Errors
/// When nothing could be looked at.
pub fn run(args: &Args) -> Result<ExitCode, AdminError> {
    let report = if args.all || args.node.is_some() { Report::of(ask(args)?) } else { here(args)? };
    report.print(args.json)?;
    Ok(ExitCode::from(report.status()))
}

fn ask(args: &Args) -> Result<Vec<Answer<DiagnoseResponse>>, AdminError> {
    let mut answers = Vec::new();
    super::run(&args.reach, async |_, fleet: Fleet| {
        let fleet = match &args.node {
            Some(name) => fleet.only(name).ok_or_else(|| AdminError::NoNode(name.clone()))?,
            None => fleet,
        };
        answers = fleet.diagnoses().await;
        Ok(())
    })?;
    Ok(answers)
}

fn here(args: &Args) -> Result<Report, AdminError> {
    if !Uid::effective().is_root() {
        return Err(AdminError::NotRoot);
    }
    if args.host_mount_namespace {
        namespace::enter_host()?;
    }
    // What is wrong with it is a finding.
    let config = NodeConfig::load().unwrap_or_default();
    let host = || gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    let name = config.node_name.as_ref().map_or_else(host, ToString::to_string);
    let scope = Scope { groups: args.volume_groups.clone(), kubelet_root: args.kubelet_root.clone() };
    let findings = Lvm::new(config).diagnose(&scope).into_iter().map(Finding::from).collect();
    Ok(Report::new(vec![Node { node: NodeReport::new(&name, None), findings }]))
}

/// The result, as `--json` prints it. Fields are only ever added.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    schema: &'static str,
    nodes: Vec<Node>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    #[serde(flatten)]
    node: NodeReport,
    findings: Vec<Finding>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Finding {
    id: String,
    severity: Severity,
    object: String,
    problem: String,
    remedy: String,
}

impl From<Found> for Finding {
    fn from(found: Found) -> Self {
        let Found { id, severity, object, problem, remedy } = found;
        Self { id: id.to_owned(), severity, object, problem, remedy }
    }
}

impl From<wire::Finding> for Finding {
    fn from(found: wire::Finding) -> Self {
        let wire::Finding { id, severity, object, problem, remedy } = found;
        // A newer node may know further ones: better too loud than too quiet.
        let severity = Severity::ALL.into_iter().find(|one| one.as_str() == severity).unwrap_or(Severity::Error);
        Self { id, severity, object, problem, remedy }
    }
}

impl Report {
    fn new(nodes: Vec<Node>) -> Self {
        Self { schema: "lvprov.io/doctor/v1", nodes }
    }

    fn of(answers: Vec<Answer<DiagnoseResponse>>) -> Self {
        let now = super::now().saturating_mul(1000);
        let nodes = answers.into_iter().map(|answer| {
            let node = NodeReport::of(&answer);
            let mut findings = Vec::new();
            if let Ok(response) = answer.result {
                findings.extend(response.findings.into_iter().map(Finding::from));
                findings.extend(clock(response.now_unix_millis, now));
            }
            Node { node, findings }
        });
        Self::new(nodes.collect())
    }

    fn count(&self, severity: Severity) -> usize {
        self.nodes.iter().flat_map(|node| &node.findings).filter(|finding| finding.severity == severity).count()
    }

    /// As the help says.
    fn status(&self) -> u8 {
        let reached = self.nodes.iter().all(|node| node.node.reached);
        match (self.count(Severity::Error), self.count(Severity::Warning)) {
            _ if !reached => 2,
            (0, 0) => 0,
            (0, _) => 1,
            _ => 2,
        }
    }
}

fn clock(node: i64, here: i64) -> Option<Finding> {
    let apart = node.saturating_sub(here);
    // Answers of other nodes were waited for, too: a minute is allowed for that.
    (!(-CLOCK_SLACK_MILLIS - 60_000..=CLOCK_SLACK_MILLIS).contains(&apart)).then(|| Finding {
        id: "clock".to_owned(),
        severity: Severity::Warning,
        object: "clock".to_owned(),
        problem: format!("the node's clock is {} s off ours", apart / 1000),
        remedy: "set the one that is wrong, and see that it is kept right (chrony, systemd-timesyncd)".to_owned(),
    })
}

impl super::report::Report for Report {
    fn nodes(&self) -> impl Iterator<Item = &NodeReport> {
        self.nodes.iter().map(|node| &node.node)
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for node in &self.nodes {
            text.push_str(&node.node.unanswered().unwrap_or_default());
            for Finding { id, severity, object, problem, remedy } in &node.findings {
                // Writing to a String cannot fail.
                let _ =
                    writeln!(text, "{}: {severity}: {object}: {problem} [{id}]\n    to do: {remedy}", node.node.name);
            }
        }
        let [notes, warnings, errors] = Severity::ALL.map(|severity| self.count(severity));
        let nodes = self.nodes.len();
        let _ = writeln!(text, "{errors} errors, {warnings} warnings, {notes} notes on {nodes} nodes");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::super::fleet::FleetNode;
    use super::*;

    fn finding(severity: &str) -> wire::Finding {
        wire::Finding {
            id: "metadata-low".into(),
            severity: severity.into(),
            object: "volume group vg0".into(),
            problem: "it is nearly full".into(),
            remedy: "remove some".into(),
        }
    }

    fn answer(name: &str, result: Result<Vec<wire::Finding>, String>) -> Answer<DiagnoseResponse> {
        let now_unix_millis = crate::admin::now() * 1000;
        let result = result.map(|findings| DiagnoseResponse { findings, now_unix_millis });
        Answer { node: FleetNode { name: name.into(), address: None }, result }
    }

    #[test]
    fn the_status_is_that_of_the_worst() {
        let status = |answers| Report::of(answers).status();
        assert_eq!(status(vec![answer("a", Ok(vec![])), answer("b", Ok(vec![finding("note")]))]), 0);
        assert_eq!(status(vec![answer("a", Ok(vec![finding("warning"), finding("note")]))]), 1);
        assert_eq!(status(vec![answer("a", Ok(vec![finding("warning")])), answer("b", Ok(vec![finding("error")]))]), 2);
        assert_eq!(status(vec![answer("a", Ok(vec![])), answer("b", Err("refused".into()))]), 2);
        assert_eq!(status(vec![answer("a", Ok(vec![finding("worse than all we know")]))]), 2);
    }

    #[test]
    fn findings_say_where_what_and_what_to_do() {
        let report = Report::of(vec![answer("a", Ok(vec![finding("warning")])), answer("b", Err("refused".into()))]);
        assert_eq!(
            report.text(),
            "a: warning: volume group vg0: it is nearly full [metadata-low]\n    to do: remove some\n\
             node b did not answer: refused\n0 errors, 1 warnings, 0 notes on 2 nodes\n"
        );
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(json["nodes"][0]["findings"][0]["severity"], "warning");
        assert_eq!(json["nodes"][1]["reached"], false);
    }

    #[test]
    fn clocks_that_differ_are_told_of() {
        assert!(clock(0, 0).is_none() && clock(0, 80_000).is_none() && clock(20_000, 0).is_none());
        assert!(clock(40_000, 0).is_some() && clock(0, 100_000).is_some());
    }
}
