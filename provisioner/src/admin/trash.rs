//! `lvprov trash`: what is in the trash of all nodes, and what to do about it.

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::Client;
use lvm::size::human;
use lvprov_proto::lvprov::TrashedVolume;
use lvprov_proto::lvprov::inventory_item::Item;
use serde::Serialize;
use serde_json::json;
use std::time::Duration;

use super::cluster::ClusterView;
use super::fleet::{Fleet, FleetNode};
use super::report::{NodeReport, Report as _};
use super::reuse::{Source, Wanted, split};
use super::{AdminError, Reach, now, table};

/// What `lvprov trash` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Lists what is in the trash, since when, and what becomes of it.
    List(ListArgs),
    /// Makes a volume in the trash a volume again, with a PersistentVolume.
    Restore(RestoreArgs),
    /// Removes volumes from the trash before their time.
    Empty(EmptyArgs),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov trash list
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov trash list --node n1 --json

The exit status is 1 if a node did not answer.")]
struct ListArgs {
    #[command(flatten)]
    reach: Reach,
    /// Only what is on this node
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Without --claim the PersistentVolume waits for a claim of the same name in the same namespace as the one that had it: \
make that claim (or scale its StatefulSet up again), and it is bound to it. With --claim it is given to that claim, \
which has to be there, of a StorageClass of lvprov and not bound, in any namespace. A volume that is being wiped cannot \
be restored.

Examples:
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov trash restore vg0/trash-0f0e…
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov trash restore vg0/trash-0f0e… --claim shop/data-db-0

A command that failed may be run again, with the same words.")]
struct RestoreArgs {
    #[command(flatten)]
    reach: Reach,
    /// As `lvprov trash list` names it
    #[arg(value_name = "VG/LV")]
    volume: String,
    /// The claim that is to have it
    #[arg(long, value_name = "NAMESPACE/NAME")]
    claim: Option<String>,
    /// The StorageClass, where the one that it was made for has gone
    #[arg(long, value_name = "CLASS", conflicts_with = "claim")]
    class: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Each is wiped first if its class has it so (`lvprov trash list` shows how far that is), then removed.

Examples:
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov trash empty vg0/trash-0f0e…
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov trash empty --all --node n1

The exit status is 1 if a node did not answer, or a volume was not found.")]
struct EmptyArgs {
    #[command(flatten)]
    reach: Reach,
    /// As `lvprov trash list` names them
    #[arg(value_name = "VG/LV", required_unless_present = "all", conflicts_with = "all")]
    volumes: Vec<String>,
    /// All that is in the trash
    #[arg(long)]
    all: bool,
    /// Only what is on this node
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When a node or the API server does not answer, or it cannot be done.
pub fn run(args: Args) -> Result<(), AdminError> {
    match args.command {
        Command::List(args) => super::run(&args.reach, async |_, fleet| {
            let report = look(&one(fleet, args.node.as_deref())?).await.0;
            report.print(args.json)?;
            report.complete()
        }),
        Command::Empty(args) => {
            super::run(&args.reach, async |_, fleet| empty(&args, &one(fleet, args.node.as_deref())?).await)
        }
        Command::Restore(args) => super::run(&args.reach, async |client, fleet| restore(&args, &client, &fleet).await),
    }
}

fn one(fleet: Fleet, node: Option<&str>) -> Result<Fleet, AdminError> {
    match node {
        Some(name) => fleet.only(name).ok_or_else(|| AdminError::NoNode(name.to_owned())),
        None => Ok(fleet),
    }
}

type Found = Vec<(FleetNode, TrashedVolume)>;

async fn look(fleet: &Fleet) -> (Report, Found) {
    let mut report = Report { schema: "lvprov.io/trash/v1", nodes: Vec::new(), volumes: Vec::new() };
    let mut found = Vec::new();
    for answer in fleet.inventories().await {
        report.nodes.push(NodeReport::of(&answer));
        for item in answer.result.into_iter().flatten() {
            if let Item::Trashed(trashed) = item {
                report.volumes.push(TrashReport::of(&answer.node.name, &trashed, now()));
                found.push((answer.node.clone(), trashed));
            }
        }
    }
    (report, found)
}

async fn empty(args: &EmptyArgs, fleet: &Fleet) -> Result<(), AdminError> {
    let (mut report, found) = look(fleet).await;
    let is_meant = |one: &TrashReport| args.all || args.volumes.contains(&one.name);
    let missing: Vec<&str> = args
        .volumes
        .iter()
        .filter(|name| !report.volumes.iter().any(|one| one.name == **name))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        let names = missing.join(", ");
        return Err(AdminError::Refused(format!("not in the trash: {names}. `lvprov trash list` shows what is")));
    }
    let mut failed = 0;
    for ((node, trashed), shown) in found.into_iter().zip(&mut report.volumes) {
        if !is_meant(shown) {
            continue;
        }
        shown.state = match fleet.empty_trash(&node, trashed).await {
            Ok(true) => "going".to_owned(),
            Ok(false) => "gone".to_owned(),
            Err(why) => {
                failed += 1;
                format!("failed: {why}")
            }
        };
    }
    report.volumes.retain(is_meant);
    report.print(args.json)?;
    match failed {
        0 => report.complete(),
        failed => Err(AdminError::NotRemoved(failed)),
    }
}

async fn restore(args: &RestoreArgs, client: &Client, fleet: &Fleet) -> Result<(), AdminError> {
    let (vg, lv) = split(&args.volume)
        .ok_or_else(|| AdminError::Refused(format!("{:?} is not <volume group>/<logical volume>", args.volume)))?;
    let (report, mut found) = look(fleet).await;
    found.retain(|(_, trashed)| {
        trashed.volume.as_ref().is_some_and(|one| one.volume_group == vg && one.logical_volume == lv)
    });
    let Some((node, trashed)) = found.pop() else {
        let unreached = report.nodes.iter().filter_map(NodeReport::unanswered).collect::<String>();
        return Err(AdminError::Refused(format!(
            "{vg}/{lv} is not in the trash of any node. `lvprov trash list` shows what is; one that a command before \
             has taken out is given to its claim with `lvprov reuse`. {unreached}"
        )));
    };
    if trashed.wiping {
        return Err(AdminError::Refused(format!("{vg}/{lv} is being wiped, and cannot be restored any more")));
    }
    let volume = trashed.volume.unwrap_or_default();
    let wanted = match &args.claim {
        Some(claim) => Wanted::of_claim(client, claim).await?,
        None => {
            let class = args.class.clone().unwrap_or(volume.storage_class);
            if class.is_empty() {
                let why = "it is not known for which StorageClass the volume was made; name one with --class, or a \
                           claim with --claim";
                return Err(AdminError::Refused(why.to_owned()));
            }
            let claim = json!({
                "metadata": {"namespace": volume.claim_namespace, "name": volume.claim_name, "uid": volume.claim_uid},
                "spec": {
                    "accessModes": ["ReadWriteOnce"],
                    "volumeMode": if volume.block { "Block" } else { "Filesystem" },
                    "storageClassName": class,
                    "resources": {"requests": {"storage": volume.size_bytes.to_string()}},
                },
            });
            // All of it is of the right kind, as just written.
            let claim: PersistentVolumeClaim = serde_json::from_value(claim).unwrap_or_default();
            Wanted::new(client, claim, &class).await?
        }
    };
    let view = ClusterView::ask(client).await?;
    let source = Source { vg: vg.to_owned(), lv: lv.to_owned(), node: None };
    let given = wanted.take(client, fleet, &view, &node, &source, &volume.claim_uid, None).await?;
    wanted.publish(client, &node, given).await?.print(args.json)
}

/// The result, as `--json` prints it. Fields are only ever added.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    schema: &'static str,
    nodes: Vec<NodeReport>,
    volumes: Vec<TrashReport>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct TrashReport {
    node: String,
    name: String,
    size_bytes: u64,
    claim: String,
    storage_class: String,
    block: bool,
    trashed_unix: i64,
    until_unix: i64,
    delete_policy: String,
    wiping: bool,
    wiped_bytes: u64,
    state: String,
}

impl TrashReport {
    fn of(node: &str, trashed: &TrashedVolume, now: i64) -> Self {
        let volume = trashed.volume.clone().unwrap_or_default();
        let left = u64::try_from(trashed.until_unix.saturating_sub(now)).unwrap_or(0);
        let state = match (trashed.wiping, left) {
            (true, _) => {
                let share = table::percent(trashed.wiped_bytes, volume.size_bytes).unwrap_or(0);
                format!("being wiped, {share}%")
            }
            (false, 0) => "due".to_owned(),
            (false, left) => format!("goes in {}", table::age(Duration::from_secs(left))),
        };
        Self {
            node: node.to_owned(),
            name: format!("{}/{}", volume.volume_group, volume.logical_volume),
            size_bytes: volume.size_bytes,
            claim: format!("{}/{}", volume.claim_namespace, volume.claim_name),
            storage_class: volume.storage_class,
            block: volume.block,
            trashed_unix: trashed.trashed_unix,
            until_unix: trashed.until_unix,
            delete_policy: trashed.delete_policy.clone(),
            wiping: trashed.wiping,
            wiped_bytes: trashed.wiped_bytes,
            state,
        }
    }
}

impl super::report::Report for Report {
    fn nodes(&self) -> impl Iterator<Item = &NodeReport> {
        self.nodes.iter()
    }

    fn text(&self) -> String {
        let row = |one: &TrashReport| {
            let age = u64::try_from(now().saturating_sub(one.trashed_unix)).unwrap_or(0);
            vec![
                one.node.clone(),
                one.name.clone(),
                human(one.size_bytes),
                one.claim.clone(),
                table::age(Duration::from_secs(age)),
                one.delete_policy.clone(),
                one.state.clone(),
            ]
        };
        let rows: Vec<Vec<String>> = self.volumes.iter().map(row).collect();
        let mut text = String::new();
        if !rows.is_empty() {
            text = table::render(&["NODE", "NAME", "SIZE", "CLAIM", "SINCE", "THEN", "STATE"], &rows);
        }
        text.extend(self.nodes.iter().filter_map(NodeReport::unanswered));
        let bytes = self.volumes.iter().map(|one| one.size_bytes).fold(0, u64::saturating_add);
        let (count, nodes) = (self.volumes.len(), self.nodes.len());
        text.push_str(&format!("total: {count} in the trash, {} on {nodes} nodes\n", human(bytes)));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lvprov_proto::lvprov::DataVolume;

    #[test]
    fn the_state_says_what_comes_next() {
        let trashed = |until: i64, wiping| TrashedVolume {
            volume: Some(DataVolume {
                volume_group: "vg0".into(),
                logical_volume: "trash-1".into(),
                size_bytes: 1 << 30,
                claim_namespace: "shop".into(),
                claim_name: "data".into(),
                ..DataVolume::default()
            }),
            trashed_unix: 1000,
            until_unix: until,
            delete_policy: "zero".into(),
            wiping,
            wiped_bytes: 1 << 28,
        };
        let state = |until, wiping| TrashReport::of("n1", &trashed(until, wiping), 1000).state;
        assert_eq!(state(1000 + 86_400, false), "goes in 1d");
        assert_eq!(state(900, false), "due");
        assert_eq!(state(900, true), "being wiped, 25%");
        let shown = TrashReport::of("n1", &trashed(900, false), 1000);
        assert_eq!((shown.name.as_str(), shown.claim.as_str()), ("vg0/trash-1", "shop/data"));
    }
}
