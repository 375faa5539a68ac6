//! `lvprov volumes`: everything of ours on all nodes.

use lvm::size::human;
use lvprov_proto::lvprov::inventory_item::Item;
use serde::Serialize;

use super::fleet::{Answer, Fleet};
use super::gc::{kind, name, size};
use super::report::{NodeReport, Report as _};
use super::{AdminError, Reach, table};

/// What `lvprov volumes` is told.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov volumes
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov volumes --json

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
    super::run(&args.reach, async |_, fleet| volumes(args.json, &fleet).await)
}

async fn volumes(json: bool, fleet: &Fleet) -> Result<(), AdminError> {
    let report = Report::new(fleet.inventories().await);
    report.print(json)?;
    report.complete()
}

/// The result, as `--json` prints it. Fields are only ever added.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    schema: &'static str,
    nodes: Vec<NodeReport>,
    volumes: Vec<VolumeReport>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct VolumeReport {
    node: String,
    kind: &'static str,
    name: String,
    size_bytes: u64,
    owner: String,
    in_use: bool,
    /// Of a data volume.
    #[serde(skip_serializing_if = "Option::is_none")]
    layout: Option<String>,
}

impl Report {
    fn new(answers: Vec<Answer<Vec<Item>>>) -> Self {
        let mut report = Self { schema: "lvprov.io/volumes/v1", nodes: Vec::new(), volumes: Vec::new() };
        for answer in answers {
            report.nodes.push(NodeReport::of(&answer));
            let Answer { node, result } = answer;
            report.volumes.extend(result.into_iter().flatten().filter_map(|item| volume(&node.name, &item)));
        }
        report
    }
}

impl super::report::Report for Report {
    fn nodes(&self) -> impl Iterator<Item = &NodeReport> {
        self.nodes.iter()
    }

    fn text(&self) -> String {
        let rows: Vec<Vec<String>> = self
            .volumes
            .iter()
            .map(|volume| {
                let in_use = if volume.in_use { "yes" } else { "no" };
                vec![
                    volume.node.clone(),
                    volume.kind.to_owned(),
                    volume.name.clone(),
                    human(volume.size_bytes),
                    volume.owner.clone(),
                    in_use.to_owned(),
                ]
            })
            .collect();
        let mut text = table::render(&["NODE", "KIND", "NAME", "SIZE", "OWNER", "IN USE"], &rows);
        text.extend(self.nodes.iter().filter_map(NodeReport::unanswered));
        // A directory's bytes are in its log volume's.
        let of = |kind| self.volumes.iter().filter(move |volume| volume.kind == kind);
        let bytes = of("data")
            .chain(of("log"))
            .chain(of("snapshot"))
            .map(|volume| volume.size_bytes)
            .fold(0, u64::saturating_add);
        text.push_str(&format!(
            "total: {} data volumes and {} log volumes, {} on {} nodes\n",
            of("data").count(),
            of("log").count(),
            human(bytes),
            self.nodes.len()
        ));
        text
    }
}

/// A mount is no volume.
fn volume(node: &str, item: &Item) -> Option<VolumeReport> {
    let (owner, in_use) = match item {
        Item::DataVolume(volume) => (format!("claim {}/{}", volume.claim_namespace, volume.claim_name), volume.open),
        Item::LogVolume(volume) => (format!("{} directories", volume.directories), volume.mounted),
        Item::LogDirectory(directory) => {
            (format!("pod {}/{}", directory.namespace, directory.pod_name), directory.mounted)
        }
        Item::Trashed(trashed) => {
            let volume = trashed.volume.clone().unwrap_or_default();
            (format!("claim {}/{}", volume.claim_namespace, volume.claim_name), volume.open)
        }
        Item::Snapshot(one) => {
            let lost = if one.lost { ", lost" } else { "" };
            let what = if one.of_clone { "clone" } else { "snapshot" };
            let owner = format!("{what} {}/{}{lost}", one.snapshot_namespace, one.snapshot_name);
            (owner, one.open)
        }
        Item::Mount(_) => return None,
    };
    Some(VolumeReport {
        node: node.to_owned(),
        kind: kind(item),
        name: name(item),
        size_bytes: size(item),
        owner,
        in_use,
        layout: match item {
            Item::DataVolume(volume) => Some(volume.layout.clone()),
            _ => None,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::super::fleet::FleetNode;
    use super::*;
    use lvprov_proto::lvprov::{DataVolume, LogDirectory, LogVolume, Mount};

    #[test]
    fn volumes_are_listed_and_summed_without_counting_logs_twice() {
        let node = |name: &str| FleetNode { name: name.into(), address: None };
        let items = vec![
            Item::DataVolume(DataVolume {
                volume_group: "vg0".into(),
                logical_volume: "pvc-1".into(),
                size_bytes: 1 << 30,
                claim_namespace: "shop".into(),
                claim_name: "data-db-0".into(),
                open: true,
                layout: "linear".into(),
                ..DataVolume::default()
            }),
            Item::LogVolume(LogVolume {
                volume_group: "vg0".into(),
                logical_volume: "log-1".into(),
                namespace: "shop".into(),
                volume: "web".into(),
                size_bytes: 2 << 30,
                directories: 1,
                mounted: true,
                ..LogVolume::default()
            }),
            Item::LogDirectory(LogDirectory {
                namespace: "shop".into(),
                pod_name: "web-0".into(),
                path: "/var/log/lvprov/shop/web/web-0".into(),
                used_bytes: 5 << 20,
                ..LogDirectory::default()
            }),
            Item::Mount(Mount::default()),
        ];
        let report = Report::new(vec![
            Answer { node: node("a"), result: Ok(items) },
            Answer { node: node("b"), result: Err("connection refused".into()) },
        ]);
        assert_eq!(
            report.text(),
            "NODE  KIND           NAME                            SIZE   OWNER                 IN USE\n\
             a     data           vg0/pvc-1                       1 GiB  claim shop/data-db-0  yes\n\
             a     log            vg0/log-1 (shop/web)            2 GiB  1 directories         yes\n\
             a     log-directory  /var/log/lvprov/shop/web/web-0  5 MiB  pod shop/web-0        no\n\
             node b did not answer: connection refused\n\
             total: 1 data volumes and 1 log volumes, 3 GiB on 2 nodes\n"
        );
    }
}
