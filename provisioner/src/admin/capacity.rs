//! `lvprov capacity`: the volume groups of all nodes.

use lvm::size::human;
use lvprov_proto::lvprov::CapacityReport;
use serde::Serialize;

use super::fleet::{Answer, Fleet};
use super::report::{NodeReport, Report as _};
use super::{AdminError, Reach, table};

/// What `lvprov capacity` is told.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov capacity
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov capacity --json

The exit status is 1 if a node did not answer.")]
pub struct Args {
    #[command(flatten)]
    reach: Reach,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When the nodes cannot be listed, or one does not answer.
pub fn run(args: Args) -> Result<(), AdminError> {
    super::run(&args.reach, async |_, fleet| capacity(args.json, &fleet).await)
}

async fn capacity(json: bool, fleet: &Fleet) -> Result<(), AdminError> {
    let report = Report::new(fleet.capacities().await);
    report.print(json)?;
    report.complete()
}

/// The result, as `--json` prints it. Fields are only ever added.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    schema: &'static str,
    nodes: Vec<NodeGroups>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeGroups {
    #[serde(flatten)]
    node: NodeReport,
    volume_groups: Vec<GroupReport>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct GroupReport {
    name: String,
    size_bytes: u64,
    free_bytes: u64,
    extent_bytes: u64,
    disk_free_bytes: Vec<u64>,
    layouts: Vec<String>,
    thin_room_bytes: u64,
    device_classes: Vec<String>,
    default_device_class: bool,
    trash_bytes: u64,
}

impl Report {
    fn new(answers: Vec<Answer<CapacityReport>>) -> Self {
        let nodes = answers.into_iter().map(|answer| {
            let node = NodeReport::of(&answer);
            let groups = answer.result.into_iter().flat_map(|report| report.volume_groups);
            NodeGroups {
                node,
                volume_groups: groups
                    .map(|group| GroupReport {
                        name: group.name,
                        size_bytes: group.size_bytes,
                        free_bytes: group.free_bytes,
                        extent_bytes: group.extent_bytes,
                        disk_free_bytes: group.disk_free_bytes,
                        layouts: group.layouts,
                        thin_room_bytes: group.thin_room_bytes,
                        device_classes: group.device_classes,
                        default_device_class: group.default_device_class,
                        trash_bytes: group.trash_bytes,
                    })
                    .collect(),
            }
        });
        Self { schema: "lvprov.io/capacity/v1", nodes: nodes.collect() }
    }
}

impl super::report::Report for Report {
    fn nodes(&self) -> impl Iterator<Item = &NodeReport> {
        self.nodes.iter().map(|node| &node.node)
    }

    fn text(&self) -> String {
        let mut rows = Vec::new();
        let (mut size, mut free) = (0_u64, 0_u64);
        for node in &self.nodes {
            for group in &node.volume_groups {
                size = size.saturating_add(group.size_bytes);
                free = free.saturating_add(group.free_bytes);
                rows.push(vec![
                    node.node.name.clone(),
                    group.name.clone(),
                    human(group.size_bytes),
                    human(group.free_bytes),
                    used(group.size_bytes, group.free_bytes),
                    if group.trash_bytes == 0 { "-".to_owned() } else { human(group.trash_bytes) },
                    classes(group),
                ]);
            }
        }
        let header = ["NODE", "VOLUME GROUP", "SIZE", "FREE", "USED", "TRASH", "DEVICE CLASSES"];
        let mut text = table::render(&header, &rows);
        for node in &self.nodes {
            match node.node.unanswered() {
                Some(line) => text.push_str(&line),
                None if node.volume_groups.is_empty() => {
                    text.push_str(&format!("node {} has no volume group\n", node.node.name));
                }
                None => {}
            }
        }
        text.push_str(&format!("total: {}, {} free, on {} nodes\n", human(size), human(free), self.nodes.len()));
        text
    }
}

fn used(size: u64, free: u64) -> String {
    match table::percent(size.saturating_sub(free), size) {
        Some(percent) => format!("{percent}%"),
        None => "-".to_owned(),
    }
}

/// What the node calls a group, and whether it is its default.
fn classes(group: &GroupReport) -> String {
    let names = group.device_classes.join(", ");
    match (names.is_empty(), group.default_device_class) {
        (true, _) => "-".to_owned(),
        (false, true) => format!("{names} (default)"),
        (false, false) => names,
    }
}

#[cfg(test)]
mod tests {
    use super::super::fleet::FleetNode;
    use super::*;
    use lvprov_proto::lvprov::VolumeGroup;

    #[test]
    fn groups_are_listed_and_summed() {
        let node = |name: &str| FleetNode { name: name.into(), address: None };
        let group = |name: &str, size: u64, free: u64| VolumeGroup {
            name: name.into(),
            size_bytes: size << 30,
            free_bytes: free << 30,
            extent_bytes: 4 << 20,
            disk_free_bytes: vec![free << 30],
            layouts: vec!["linear".into()],
            device_classes: if name == "hdd" { vec!["bulk".into(), "cheap".into()] } else { Vec::new() },
            default_device_class: name == "hdd",
            trash_bytes: if name == "hdd" { 3 << 30 } else { 0 },
            thin_room_bytes: 0,
        };
        let report = |node: &str, volume_groups| CapacityReport {
            node: node.into(),
            volume_groups,
            ..CapacityReport::default()
        };
        let text = Report::new(vec![
            Answer { node: node("a"), result: Ok(report("a", vec![group("hdd", 100, 50), group("vg0", 20, 5)])) },
            Answer { node: node("b"), result: Err("connection refused".into()) },
            Answer { node: node("c"), result: Ok(report("c", Vec::new())) },
        ])
        .text();
        assert_eq!(
            text,
            "NODE  VOLUME GROUP  SIZE     FREE    USED  TRASH  DEVICE CLASSES\n\
             a     hdd           100 GiB  50 GiB  50%   3 GiB  bulk, cheap (default)\n\
             a     vg0           20 GiB   5 GiB   75%   -      -\n\
             node b did not answer: connection refused\n\
             node c has no volume group\n\
             total: 120 GiB, 55 GiB free, on 3 nodes\n"
        );
        assert_eq!(used(0, 0), "-");
    }
}
