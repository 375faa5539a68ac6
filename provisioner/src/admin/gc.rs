//! `lvprov gc`: what nothing owns any more, on all nodes.
//!
//! First the nodes are asked what they have, then the API server what is in
//! use: so nothing that was made in between looks unowned. If any part of the
//! API's answer cannot be had, nothing is concluded. With `--apply` all of it
//! is done twice, some time apart, and only what was garbage both times is
//! removed; the node then looks once more itself.

use std::collections::BTreeMap;
use std::time::Duration;

use kube::Client;
use lvm::size::human;
use lvprov_proto::lvprov::inventory_item::Item;
use serde::Serialize;
use tracing::info;

use super::cluster::ClusterView;
use super::fleet::{Answer, Fleet, FleetNode};
use super::garbage::{Judge, Seen, Verdict};
use super::report::{NodeReport, Report as _};
use super::{AdminError, Reach, now, table};

/// What `lvprov gc` is told.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Listed are, of all nodes:
  data            a logical volume of this cluster with neither PersistentVolume nor claim
  snapshot        a snapshot of such a volume with no VolumeSnapshotContent, or of a clone that is done
  log-directory   a pod's part of a log volume, after the pod and its retention
  log             a log volume in which no pod's directory is left
  mount           a mount whose pod has gone, or of a log volume whose volume group has

Examples:
  # What would be removed, and why
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov gc

  # Remove it
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov gc --apply

  # For a program
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov gc --json

The exit status is 1 if a node did not answer, an item could not be removed, or the API server could not be asked; \
in the last case nothing was changed.")]
pub struct Args {
    #[command(flatten)]
    reach: Reach,
    /// Remove what is listed; without it, nothing is changed
    #[arg(long)]
    apply: bool,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Leave alone what is younger, such as 30s, 5m, 12h or 7d
    #[arg(long, default_value = "5m", value_parser = span, value_name = "TIME")]
    older_than: Duration,
    /// Time between the two looks of --apply
    #[arg(long, default_value = "10s", value_parser = span, value_name = "TIME")]
    settle: Duration,
}

/// Runs the command.
///
/// # Errors
/// When the API server cannot be asked (nothing is changed then), a node does
/// not answer, or something could not be removed.
pub fn run(args: Args) -> Result<(), AdminError> {
    super::run(&args.reach, async |client, fleet| gc(&args, &client, &fleet).await)
}

/// What is garbage, and which nodes could not be asked.
#[derive(Debug, Default)]
struct Look {
    found: Vec<Found>,
    unreached: Vec<(String, String)>,
}

#[derive(Debug, Clone)]
struct Found {
    node: FleetNode,
    item: Item,
    age: Option<Duration>,
    reason: String,
}

async fn gc(args: &Args, client: &Client, fleet: &Fleet) -> Result<(), AdminError> {
    let mut seen = look(args.older_than, client, fleet).await?;
    let mut outcomes = BTreeMap::new();
    if args.apply && !seen.found.is_empty() {
        info!(settle = ?args.settle, items = seen.found.len(), "looking again in a while");
        tokio::time::sleep(args.settle).await;
        let again = look(args.older_than, client, fleet).await?;
        seen = both(&seen, again);
        for (at, found) in in_order(&seen.found) {
            outcomes.insert(at, remove(fleet, found).await);
        }
    }
    let report = Report::new(args, fleet, &seen, &outcomes);
    report.print(args.json)?;
    let kept = outcomes.values().filter(|outcome| !outcome.removed).count();
    if kept > 0 {
        return Err(AdminError::NotRemoved(kept));
    }
    report.complete()
}

/// Nodes first, then the API server.
async fn look(older_than: Duration, client: &Client, fleet: &Fleet) -> Result<Look, AdminError> {
    let answers = fleet.inventories().await;
    let view = ClusterView::ask(client).await?;
    Ok(conclude(answers, &view, now(), older_than))
}

fn conclude(answers: Vec<Answer<Vec<Item>>>, view: &ClusterView, now: i64, older_than: Duration) -> Look {
    let mut seen = Seen::default();
    for Answer { node, result } in &answers {
        seen.note(&node.name, &view.id, result.as_deref().unwrap_or_default());
    }
    let judge = Judge { view, seen: &seen, now, older_than };
    let mut look = Look::default();
    for answer in answers {
        match answer.result {
            Err(why) => look.unreached.push((answer.node.name, why)),
            Ok(items) => {
                look.found.extend(items.into_iter().filter_map(|item| match judge.judge(&answer.node.name, &item) {
                    Verdict::Keep(_) => None,
                    Verdict::Garbage(reason) => {
                        Some(Found { node: answer.node.clone(), age: judge.age_of(&item), item, reason })
                    }
                }))
            }
        }
    }
    look
}

/// What was garbage in both looks.
fn both(first: &Look, second: Look) -> Look {
    let known: std::collections::HashSet<_> = first.found.iter().map(|found| found.key()).collect();
    Look { found: second.found.into_iter().filter(|found| known.contains(&found.key())).collect(), ..second }
}

/// Mounts keep volumes from being removed, and directories the log volumes
/// that they are in.
fn in_order(found: &[Found]) -> Vec<(usize, &Found)> {
    let mut order: Vec<_> = found.iter().enumerate().collect();
    order.sort_by_key(|(at, found)| {
        let rank = match found.item {
            Item::Mount(_) => 0,
            Item::LogDirectory(_) => 1,
            Item::LogVolume(_) => 2,
            // A volume that is not thin stays as long as it has snapshots.
            Item::Snapshot(_) => 3,
            Item::DataVolume(_) | Item::Trashed(_) => 4,
        };
        (rank, *at)
    });
    order
}

#[derive(Debug, Clone)]
struct Outcome {
    removed: bool,
    detail: String,
}

async fn remove(fleet: &Fleet, found: &Found) -> Outcome {
    match fleet.collect(&found.node, found.item.clone()).await {
        Ok(response) => Outcome { removed: response.removed, detail: response.detail },
        Err(why) => Outcome { removed: false, detail: why },
    }
}

impl Found {
    /// What makes it the same item in another look.
    fn key(&self) -> (String, &'static str, String) {
        (self.node.name.clone(), kind(&self.item), identity(&self.item))
    }
}

/// As shown, and in JSON.
pub(super) fn kind(item: &Item) -> &'static str {
    match item {
        Item::DataVolume(_) => "data",
        Item::LogVolume(_) => "log",
        Item::LogDirectory(_) => "log-directory",
        Item::Mount(_) => "mount",
        Item::Trashed(_) => "trash",
        Item::Snapshot(_) => "snapshot",
    }
}

/// As shown, and in JSON.
pub(super) fn name(item: &Item) -> String {
    match item {
        Item::DataVolume(volume) => format!("{}/{}", volume.volume_group, volume.logical_volume),
        Item::LogVolume(volume) => {
            format!("{}/{} ({}/{})", volume.volume_group, volume.logical_volume, volume.namespace, volume.volume)
        }
        Item::LogDirectory(directory) => directory.path.clone(),
        Item::Mount(mount) => mount.target.clone(),
        Item::Snapshot(one) => format!("{}/{}", one.volume_group, one.logical_volume),
        Item::Trashed(trashed) => {
            let volume = trashed.volume.as_ref();
            volume.map_or(String::new(), |volume| format!("{}/{}", volume.volume_group, volume.logical_volume))
        }
    }
}

/// A name alone is not enough: a directory of the same name may be that of
/// another pod, a volume of the same name one made anew.
fn identity(item: &Item) -> String {
    let more = match item {
        Item::DataVolume(volume) => format!("{} {}", volume.claim_uid, volume.created_unix),
        Item::LogVolume(volume) => volume.created_unix.to_string(),
        Item::LogDirectory(directory) => format!("{} {}", directory.pod_uid, directory.last_used_unix),
        Item::Mount(mount) => format!("{}/{} {}", mount.volume_group, mount.logical_volume, mount.pod_uid),
        Item::Trashed(trashed) => trashed.trashed_unix.to_string(),
        Item::Snapshot(one) => one.created_unix.to_string(),
    };
    format!("{} {more}", name(item))
}

/// Bytes that go with the item. A mount takes none, and a thin snapshot none of
/// its own.
pub(super) fn size(item: &Item) -> u64 {
    match item {
        Item::DataVolume(volume) => volume.size_bytes,
        Item::LogVolume(volume) => volume.size_bytes,
        Item::LogDirectory(directory) => directory.used_bytes,
        Item::Trashed(trashed) => trashed.volume.as_ref().map_or(0, |volume| volume.size_bytes),
        Item::Snapshot(one) => one.room_bytes,
        Item::Mount(_) => 0,
    }
}

/// The result, as `--json` prints it. Fields are only ever added.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    schema: &'static str,
    applied: bool,
    nodes: Vec<NodeReport>,
    items: Vec<ItemReport>,
    total: Total,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ItemReport {
    node: String,
    kind: &'static str,
    name: String,
    size_bytes: u64,
    age_seconds: Option<u64>,
    reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    removed: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Total {
    items: usize,
    size_bytes: u64,
    removed: usize,
}

impl Report {
    fn new(args: &Args, fleet: &Fleet, look: &Look, outcomes: &BTreeMap<usize, Outcome>) -> Self {
        let nodes = fleet.nodes().iter().map(|node| {
            let unreached = look.unreached.iter().find(|(name, _)| *name == node.name);
            NodeReport::new(&node.name, unreached.map(|(_, why)| why.as_str()))
        });
        let items: Vec<_> = look
            .found
            .iter()
            .enumerate()
            .map(|(at, found)| ItemReport {
                node: found.node.name.clone(),
                kind: kind(&found.item),
                name: name(&found.item),
                size_bytes: size(&found.item),
                age_seconds: found.age.map(|age| age.as_secs()),
                reason: found.reason.clone(),
                removed: outcomes.get(&at).map(|outcome| outcome.removed),
                detail: outcomes.get(&at).map(|outcome| outcome.detail.clone()).filter(|detail| !detail.is_empty()),
            })
            .collect();
        let total = Total {
            items: items.len(),
            size_bytes: items.iter().map(|item| item.size_bytes).fold(0, u64::saturating_add),
            removed: items.iter().filter(|item| item.removed == Some(true)).count(),
        };
        Self { schema: "lvprov.io/gc/v1", applied: args.apply, nodes: nodes.collect(), items, total }
    }
}

impl super::report::Report for Report {
    fn nodes(&self) -> impl Iterator<Item = &NodeReport> {
        self.nodes.iter()
    }

    fn text(&self) -> String {
        let mut text = String::new();
        if !self.items.is_empty() {
            let rows: Vec<Vec<String>> = self.items.iter().map(|item| item.row(self.applied)).collect();
            let mut header = vec!["NODE", "KIND", "NAME", "SIZE", "AGE", "REASON"];
            if self.applied {
                header.push("RESULT");
            }
            text.push_str(&table::render(&header, &rows));
        }
        for node in &self.nodes {
            if let Some(error) = &node.error {
                text.push_str(&format!("node {} did not answer and was left alone: {error}\n", node.name));
            }
        }
        let what = match self.items.len() {
            0 => "nothing to collect".to_owned(),
            1 => format!("1 item, {}", human(self.total.size_bytes)),
            items => format!("{items} items, {}", human(self.total.size_bytes)),
        };
        let done = match (self.applied, self.items.is_empty()) {
            (_, true) => String::new(),
            (true, false) => format!("; {} removed", self.total.removed),
            (false, false) => "; nothing was changed, --apply removes them".to_owned(),
        };
        text.push_str(&format!("total: {what} on {} nodes{done}\n", self.nodes.len()));
        text
    }
}

impl ItemReport {
    fn row(&self, applied: bool) -> Vec<String> {
        let mut row = vec![
            self.node.clone(),
            self.kind.to_owned(),
            self.name.clone(),
            if self.kind == "mount" { "-".to_owned() } else { human(self.size_bytes) },
            self.age_seconds.map_or_else(|| "-".to_owned(), |age| table::age(Duration::from_secs(age))),
            self.reason.clone(),
        ];
        if applied {
            row.push(match (self.removed, &self.detail) {
                (Some(true), _) => "removed".to_owned(),
                (_, Some(detail)) => format!("kept: {detail}"),
                (_, None) => "kept".to_owned(),
            });
        }
        row
    }
}

/// A time span as the options take it.
fn span(text: &str) -> Result<Duration, String> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let factor = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err("a time is a number and one of s, m, h or d, such as 10m".to_owned()),
    };
    let number: u64 = number.parse().map_err(|_| "a time begins with a number, such as 10m".to_owned())?;
    number.checked_mul(factor).map(Duration::from_secs).ok_or_else(|| "this is too long a time".to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::cluster::Reference;
    use super::*;
    use lvprov_proto::lvprov::{DataVolume, LogDirectory, LogVolume, Mount};

    fn node(name: &str) -> FleetNode {
        FleetNode { name: name.into(), address: None }
    }

    fn found(item: Item) -> Found {
        Found { node: node("a"), item, age: Some(Duration::from_secs(90)), reason: "its pod has gone".into() }
    }

    fn data(name: &str, created_unix: i64) -> Item {
        Item::DataVolume(DataVolume {
            volume_group: "vg0".into(),
            logical_volume: name.into(),
            size_bytes: 1 << 30,
            created_unix,
            ..DataVolume::default()
        })
    }

    fn report(apply: bool, look: &Look, outcomes: &BTreeMap<usize, Outcome>) -> Report {
        let reach = Reach { tls_dir: "/tls".into(), node_port: 1 };
        let args = Args { reach, apply, json: false, older_than: Duration::ZERO, settle: Duration::ZERO };
        Report::new(&args, &Fleet::new(vec![node("a"), node("b")], 1, None), look, outcomes)
    }

    #[test]
    fn of_two_volumes_one_goes_only_while_the_other_is_seen() {
        let mut view = ClusterView { id: "cluster".into(), ..ClusterView::default() };
        let reference =
            Reference { topology: Some("b".into()), volume_group: "vg0".into(), logical_volume: "one".into() };
        view.volumes.insert("one".into(), reference);
        let one = || {
            let Item::DataVolume(volume) = data("one", 1) else { unreachable!() };
            Item::DataVolume(DataVolume { cluster: "cluster".into(), ..volume })
        };
        let garbage = |b: Result<Vec<Item>, String>| {
            let answers =
                vec![Answer { node: node("a"), result: Ok(vec![one()]) }, Answer { node: node("b"), result: b }];
            let look = conclude(answers, &view, 1000, Duration::from_secs(300));
            look.found.into_iter().map(|found| found.node.name).collect::<Vec<_>>()
        };
        assert_eq!(garbage(Ok(vec![one()])), ["a"]);
        assert!(garbage(Ok(Vec::new())).is_empty());
        assert!(garbage(Err("connection refused".into())).is_empty());
    }

    #[test]
    fn only_what_was_seen_twice_goes() {
        let first = Look { found: vec![found(data("one", 1)), found(data("two", 1))], unreached: Vec::new() };
        // "two" was made anew under its name, "three" is new.
        let second = Look {
            found: vec![found(data("one", 1)), found(data("two", 2)), found(data("three", 1))],
            unreached: Vec::new(),
        };
        let names: Vec<_> = both(&first, second).found.iter().map(|found| name(&found.item)).collect();
        assert_eq!(names, ["vg0/one"]);
    }

    #[test]
    fn mounts_go_first_and_directories_before_their_volume() {
        let found = [
            found(data("one", 1)),
            found(Item::LogVolume(LogVolume::default())),
            found(Item::LogDirectory(LogDirectory::default())),
            found(Item::Mount(Mount::default())),
        ];
        let order: Vec<_> = in_order(&found).into_iter().map(|(at, _)| at).collect();
        assert_eq!(order, [3, 2, 1, 0]);
    }

    #[test]
    fn the_table_ends_with_a_total_and_names_silent_nodes() {
        let look = Look {
            found: vec![found(data("one", 1)), found(data("two", 1))],
            unreached: vec![("b".into(), "connection refused".into())],
        };
        assert_eq!(
            report(false, &look, &BTreeMap::new()).text(),
            "NODE  KIND  NAME     SIZE   AGE    REASON\n\
             a     data  vg0/one  1 GiB  1m30s  its pod has gone\n\
             a     data  vg0/two  1 GiB  1m30s  its pod has gone\n\
             node b did not answer and was left alone: connection refused\n\
             total: 2 items, 2 GiB on 2 nodes; nothing was changed, --apply removes them\n"
        );
        let nothing = report(false, &Look::default(), &BTreeMap::new()).text();
        assert_eq!(nothing, "total: nothing to collect on 2 nodes\n");
    }

    #[test]
    fn json_has_what_the_table_has() {
        let look = Look { found: vec![found(data("one", 1))], unreached: Vec::new() };
        let outcomes = BTreeMap::from([(0, Outcome { removed: false, detail: "it is open".into() })]);
        let json: serde_json::Value = serde_json::from_str(&report(true, &look, &outcomes).json()).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "schema": "lvprov.io/gc/v1",
                "applied": true,
                "nodes": [{"name": "a", "reached": true}, {"name": "b", "reached": true}],
                "items": [{
                    "node": "a", "kind": "data", "name": "vg0/one", "sizeBytes": 1_073_741_824, "ageSeconds": 90,
                    "reason": "its pod has gone", "removed": false, "detail": "it is open",
                }],
                "total": {"items": 1, "sizeBytes": 1_073_741_824, "removed": 0},
            })
        );
    }

    #[test]
    fn spans_of_time() {
        for (text, seconds) in [("0", 0), ("10s", 10), ("5m", 300), ("12h", 43_200), ("7d", 604_800)] {
            assert_eq!(span(text), Ok(Duration::from_secs(seconds)));
        }
        for text in ["", "m", "5 m", "-1s", "1w", "99999999999999999999d", "18446744073709551615d"] {
            assert!(span(text).is_err(), "{text}");
        }
    }
}
