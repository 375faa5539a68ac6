//! `lvprov logs`: the log volumes of all nodes, and what pods have in them.

use std::time::Duration;

use lvm::size::human;
use lvprov_proto::lvprov::inventory_item::Item;
use lvprov_proto::lvprov::{LogDirectory, LogVolume};
use serde::Serialize;

use super::fleet::{Answer, Fleet};
use super::report::{NodeReport, Report as _};
use super::table::{age, percent};
use super::{AdminError, Reach, now, table};

/// What `lvprov logs` is told.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A line for each log volume (USED: by all its directories, OF: its size), and below it one for each pod's directory \
(OF: its quota). A directory may go when its retention ends; from then on `lvprov gc` lists it, once its pod has gone.

Examples:
  # All of them
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov logs

  # Those of one namespace, or on one node
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov logs --namespace shop
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov logs --node worker-3

  # Directories that are nearly full, for a program
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov logs --json \\
    | jq '.volumes[].directories[] | select(.usedPercent >= 90)'

The exit status is 1 if a node did not answer.")]
pub struct Args {
    #[command(flatten)]
    reach: Reach,
    /// Only those of this namespace
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// Only those on this node; no other is asked
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When the nodes cannot be listed, there is none of the name asked for, or one
/// does not answer.
pub fn run(args: Args) -> Result<(), AdminError> {
    super::run(&args.reach, async |_, fleet| logs(&args, fleet).await)
}

async fn logs(args: &Args, fleet: Fleet) -> Result<(), AdminError> {
    let fleet = match &args.node {
        Some(node) => fleet.only(node).ok_or_else(|| AdminError::NoNode(node.clone()))?,
        None => fleet,
    };
    let report = Report::new(fleet.inventories().await, args.namespace.as_deref(), now());
    report.print(args.json)?;
    report.complete()
}

/// The result, as `--json` prints it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    schema: &'static str,
    nodes: Vec<NodeReport>,
    volumes: Vec<VolumeReport>,
    #[serde(skip)]
    now: i64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct VolumeReport {
    node: String,
    namespace: String,
    volume: String,
    volume_group: String,
    logical_volume: String,
    path: String,
    size_bytes: u64,
    /// By all its directories.
    used_bytes: u64,
    used_percent: Option<u64>,
    /// Without that nobody knows what is in it.
    mounted: bool,
    directories: Vec<DirectoryReport>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct DirectoryReport {
    directory: String,
    pod: String,
    pod_uid: String,
    path: String,
    used_bytes: u64,
    quota_bytes: u64,
    used_percent: Option<u64>,
    state: State,
    last_used_unix: Option<i64>,
    retention_seconds: u64,
    /// None while it is in use, and where nobody knows when that was last.
    may_go_unix: Option<i64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
enum State {
    /// In its pod, right now.
    Mounted,
    /// After its pod, for its retention.
    Kept,
}

impl Report {
    fn new(answers: Vec<Answer<Vec<Item>>>, namespace: Option<&str>, now: i64) -> Self {
        let mut report = Self { schema: "lvprov.io/logs/v1", nodes: Vec::new(), volumes: Vec::new(), now };
        for answer in answers {
            report.nodes.push(NodeReport::of(&answer));
            let items = answer.result.unwrap_or_default();
            let mut volumes: Vec<VolumeReport> = items
                .iter()
                .filter_map(|item| match item {
                    Item::LogVolume(volume) => Some(volume),
                    _ => None,
                })
                .filter(|volume| namespace.is_none_or(|wanted| volume.namespace == wanted))
                .map(|volume| VolumeReport::new(&answer.node.name, volume, &items))
                .collect();
            volumes.sort_by(|a, b| (&a.namespace, &a.volume).cmp(&(&b.namespace, &b.volume)));
            report.volumes.extend(volumes);
        }
        report
    }
}

impl super::report::Report for Report {
    fn nodes(&self) -> impl Iterator<Item = &NodeReport> {
        self.nodes.iter()
    }

    fn text(&self) -> String {
        let header = ["NODE", "NAMESPACE", "VOLUME", "POD", "USED", "OF", "SHARE", "STATE", "LAST USED", "MAY GO"];
        let rows: Vec<Vec<String>> = self.volumes.iter().flat_map(|volume| volume.rows(self.now)).collect();
        let mut text = match rows.as_slice() {
            [] => String::new(),
            rows => table::render(&header, rows),
        };
        text.extend(self.nodes.iter().filter_map(NodeReport::unanswered));
        let sum = |bytes: fn(&VolumeReport) -> u64| self.volumes.iter().map(bytes).fold(0, u64::saturating_add);
        text.push_str(&format!(
            "total: {} log volumes of {}, {} used in {} directories, on {} nodes\n",
            self.volumes.len(),
            human(sum(|volume| volume.size_bytes)),
            human(sum(|volume| volume.used_bytes)),
            self.volumes.iter().map(|volume| volume.directories.len()).sum::<usize>(),
            self.nodes.len()
        ));
        text
    }
}

impl VolumeReport {
    fn new(node: &str, volume: &LogVolume, items: &[Item]) -> Self {
        let is_in = |directory: &&LogDirectory| {
            directory.volume_group == volume.volume_group && directory.logical_volume == volume.logical_volume
        };
        let mut directories: Vec<DirectoryReport> = items
            .iter()
            .filter_map(|item| match item {
                Item::LogDirectory(directory) => Some(directory),
                _ => None,
            })
            .filter(is_in)
            .map(DirectoryReport::new)
            .collect();
        directories.sort_by(|a, b| a.directory.cmp(&b.directory));
        let used_bytes = directories.iter().map(|directory| directory.used_bytes).fold(0, u64::saturating_add);
        Self {
            node: node.to_owned(),
            namespace: volume.namespace.clone(),
            volume: volume.volume.clone(),
            volume_group: volume.volume_group.clone(),
            logical_volume: volume.logical_volume.clone(),
            path: volume.path.clone(),
            size_bytes: volume.size_bytes,
            used_bytes,
            used_percent: percent(used_bytes, volume.size_bytes),
            mounted: volume.mounted,
            directories,
        }
    }

    /// Its own, and one for each directory.
    fn rows(&self, now: i64) -> Vec<Vec<String>> {
        let place = [&self.node, &self.namespace, &self.volume].map(String::clone);
        let unknown = || "-".to_owned();
        let known = |text: String| if self.mounted { text } else { unknown() };
        let own = [
            match self.directories.len() {
                1 => known("1 pod".to_owned()),
                pods => known(format!("{pods} pods")),
            },
            known(human(self.used_bytes)),
            human(self.size_bytes),
            known(share(self.used_percent)),
            if self.mounted { "mounted" } else { "not mounted" }.to_owned(),
            unknown(),
            unknown(),
        ];
        let mut rows = vec![[place.as_slice(), &own].concat()];
        rows.extend(self.directories.iter().map(|directory| [place.as_slice(), &directory.cells(now)].concat()));
        rows
    }
}

impl DirectoryReport {
    fn new(directory: &LogDirectory) -> Self {
        let last_used = (directory.last_used_unix > 0).then_some(directory.last_used_unix);
        let retention = i64::try_from(directory.retention_seconds).unwrap_or(i64::MAX);
        Self {
            directory: directory.directory.clone(),
            pod: directory.pod_name.clone(),
            pod_uid: directory.pod_uid.clone(),
            path: directory.path.clone(),
            used_bytes: directory.used_bytes,
            quota_bytes: directory.quota_bytes,
            used_percent: percent(directory.used_bytes, directory.quota_bytes),
            state: if directory.mounted { State::Mounted } else { State::Kept },
            last_used_unix: last_used,
            retention_seconds: directory.retention_seconds,
            may_go_unix: last_used.filter(|_| !directory.mounted).map(|used| used.saturating_add(retention)),
        }
    }

    fn cells(&self, now: i64) -> [String; 7] {
        let span = |from: i64, to: i64| age(Duration::from_secs(u64::try_from(to.saturating_sub(from)).unwrap_or(0)));
        let (state, last_used, may_go) = match self.state {
            State::Mounted => ("mounted", "now".to_owned(), "in use".to_owned()),
            State::Kept => (
                "kept",
                self.last_used_unix.map_or("-".to_owned(), |used| format!("{} ago", span(used, now))),
                match self.may_go_unix {
                    None => "-".to_owned(),
                    Some(then) if then <= now => "now".to_owned(),
                    Some(then) => format!("in {}", span(now, then)),
                },
            ),
        };
        let quota = if self.quota_bytes == 0 { "-".to_owned() } else { human(self.quota_bytes) };
        let pod = match self.pod == self.directory {
            true => self.pod.clone(),
            false => format!("{} ({})", self.pod, self.directory),
        };
        [pod, human(self.used_bytes), quota, share(self.used_percent), state.to_owned(), last_used, may_go]
    }
}

fn share(percent: Option<u64>) -> String {
    percent.map_or("-".to_owned(), |percent| format!("{percent}%"))
}

#[cfg(test)]
mod tests {
    use super::super::fleet::FleetNode;
    use super::super::report::Report as _;
    use super::*;

    const NOW: i64 = 1_800_000_000;
    const HOUR: i64 = 3600;

    fn node(name: &str) -> FleetNode {
        FleetNode { name: name.into(), address: None }
    }

    fn volume(namespace: &str, lv: &str, mounted: bool) -> Item {
        Item::LogVolume(LogVolume {
            volume_group: "vg0".into(),
            logical_volume: lv.into(),
            size_bytes: 1 << 30,
            namespace: namespace.into(),
            volume: "web".into(),
            mounted,
            path: format!("/var/log/lvprov/{namespace}/web"),
            ..LogVolume::default()
        })
    }

    fn directory(lv: &str, name: &str, last_used_unix: i64, mounted: bool) -> Item {
        Item::LogDirectory(LogDirectory {
            volume_group: "vg0".into(),
            logical_volume: lv.into(),
            directory: name.into(),
            pod_name: name.into(),
            used_bytes: 25 << 20,
            quota_bytes: 100 << 20,
            retention_seconds: 24 * 3600,
            last_used_unix,
            mounted,
            ..LogDirectory::default()
        })
    }

    fn answers() -> Vec<Answer<Vec<Item>>> {
        let of_a = vec![
            volume("shop", "log-1", true),
            directory("log-1", "web-1", NOW - 2 * HOUR, false),
            directory("log-1", "web-0", NOW - 9 * HOUR, true),
            volume("back", "log-2", true),
            directory("log-2", "old", NOW - 25 * HOUR, false),
            directory("log-2", "broken", 0, false),
            volume("dark", "log-3", false),
        ];
        vec![
            Answer { node: node("a"), result: Ok(of_a) },
            Answer { node: node("b"), result: Err("connection refused".into()) },
        ]
    }

    #[test]
    fn directories_stand_below_their_volume_with_when_they_may_go() {
        assert_eq!(
            Report::new(answers(), None, NOW).text(),
            "\
NODE  NAMESPACE  VOLUME  POD     USED    OF       SHARE  STATE        LAST USED  MAY GO
a     back       web     2 pods  50 MiB  1 GiB    4%     mounted      -          -
a     back       web     broken  25 MiB  100 MiB  25%    kept         -          -
a     back       web     old     25 MiB  100 MiB  25%    kept         1d1h ago   now
a     dark       web     -       -       1 GiB    -      not mounted  -          -
a     shop       web     2 pods  50 MiB  1 GiB    4%     mounted      -          -
a     shop       web     web-0   25 MiB  100 MiB  25%    mounted      now        in use
a     shop       web     web-1   25 MiB  100 MiB  25%    kept         2h ago     in 22h
node b did not answer: connection refused
total: 3 log volumes of 3 GiB, 100 MiB used in 4 directories, on 2 nodes
"
        );
    }

    #[test]
    fn a_namespace_shows_its_own_only() {
        let report = Report::new(answers(), Some("shop"), NOW);
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(json["schema"], "lvprov.io/logs/v1");
        assert_eq!(json["nodes"][1]["error"], "connection refused");
        let volumes = json["volumes"].as_array().unwrap();
        assert_eq!(volumes.len(), 1);
        assert_eq!(volumes[0]["namespace"], "shop");
        assert_eq!(volumes[0]["usedBytes"], 50 << 20);
        let [used, kept] = volumes[0]["directories"].as_array().unwrap().as_slice() else { panic!("{volumes:?}") };
        assert_eq!((&used["state"], &used["mayGoUnix"]), (&"mounted".into(), &serde_json::Value::Null));
        assert_eq!((&kept["state"], &kept["mayGoUnix"]), (&"kept".into(), &(NOW + 22 * HOUR).into()));
        assert_eq!(kept["usedPercent"], 25);
        assert!(report.complete().is_err());
    }

    #[test]
    fn nothing_is_said_shortly() {
        let report = Report::new(vec![Answer { node: node("a"), result: Ok(Vec::new()) }], None, NOW);
        assert_eq!(report.text(), "total: 0 log volumes of 0 B, 0 B used in 0 directories, on 1 nodes\n");
        report.complete().unwrap();
    }
}
