//! Calls a node service from inside its machine, the way the controller does.
//!
//! `node-call [--address IP:PORT] [--tls-dir DIR] CALL`, one line of JSON per
//! answer on standard output. A call that the service refuses is an answer too:
//! `{"code": "...", "message": "..."}`, exit status 1. Metrics are read from the
//! port and with the certificate that are told.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use clap::{Parser, Subcommand};
use http_body_util::BodyExt;
use lvprov::controller::nodes::connect;
use lvprov::names::{NODE_PORT, TOPOLOGY_NODE, parameters};
use lvprov::tls::TlsDirectory;
use lvprov_proto::csi::controller_client::ControllerClient;
use lvprov_proto::csi::node_client::NodeClient;
use lvprov_proto::csi::volume_capability::access_mode::Mode;
use lvprov_proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use lvprov_proto::csi::volume_content_source::{SnapshotSource, Type as SourceType, VolumeSource};
use lvprov_proto::csi::{
    CapacityRange, ControllerExpandVolumeRequest, CreateSnapshotRequest, CreateVolumeRequest, DeleteSnapshotRequest,
    DeleteVolumeRequest, GetCapacityRequest, ListSnapshotsRequest, NodeExpandVolumeRequest, NodeGetVolumeStatsRequest,
    NodePublishVolumeRequest, NodeUnpublishVolumeRequest, Topology, TopologyRequirement, VolumeCapability,
    VolumeContentSource,
};
use lvprov_proto::lvprov::inventory_item::Item;
use lvprov_proto::lvprov::node_admin_client::NodeAdminClient;
use lvprov_proto::lvprov::{
    AdoptRequest, CollectRequest, DiagnoseRequest, EmptyTrashRequest, InventoryItem, InventoryRequest,
    WatchCapacityRequest,
};
use serde_json::{Value, json};
use tonic::Status;
use tonic::transport::Channel;
use tower::{Service, ServiceExt};

/// Under this name the tests start it.
const NODE: &str = "n1";
const CLUSTER: &str = "11111111-2222-4333-8444-555555555555";

#[derive(Debug, Parser)]
struct Cli {
    #[arg(long, default_value_t = SocketAddr::from(([127, 0, 0, 1], NODE_PORT)))]
    address: SocketAddr,
    #[arg(long, default_value = "/run/lvprov-tls/controller")]
    tls_dir: PathBuf,
    #[command(subcommand)]
    call: Call,
}

#[derive(Debug, Subcommand)]
enum Call {
    /// Makes the volume of claim `default/<name>` in namespace default.
    Create {
        uid: String,
        bytes: i64,
        #[arg(long, default_value = "vg0")]
        vg: String,
        #[arg(long, default_value = "xfs")]
        fs: String,
        #[arg(long, default_value = "data")]
        claim: String,
        #[arg(long, default_value = NODE)]
        node: String,
        /// Further parameters, `key=value`.
        #[arg(long = "set")]
        more: Vec<String>,
        /// Gives up on the answer after so long.
        #[arg(long, default_value_t = 60_000)]
        patience_ms: u64,
        /// As a raw device.
        #[arg(long)]
        block: bool,
        /// From this snapshot.
        #[arg(long)]
        snapshot: Option<String>,
        /// From this volume.
        #[arg(long)]
        volume: Option<String>,
    },
    /// Makes a snapshot of a volume.
    Snapshot {
        id: String,
        /// UID of the VolumeSnapshot.
        uid: String,
        #[arg(long)]
        size: Option<String>,
    },
    /// Removes a snapshot.
    DeleteSnapshot { id: String },
    /// Lists the snapshots.
    Snapshots,
    /// Extends a volume.
    Expand { id: String, bytes: i64 },
    /// Gives a volume of claim `default/data` to a pod, as kubelet does.
    Publish {
        id: String,
        target: String,
        #[arg(long)]
        block: bool,
        #[arg(long)]
        readonly: bool,
        /// ReadWriteOncePod
        #[arg(long)]
        alone: bool,
        #[arg(long, default_value = "default")]
        namespace: String,
    },
    /// Takes it away again.
    Unpublish { id: String, target: String },
    /// What it has.
    Stats { id: String, path: String },
    /// Has it grown for its pods.
    NodeExpand { id: String, path: String, bytes: i64 },
    /// Makes `count` volumes at once; their claims' UIDs end in 0, 1, 2…
    CreateMany { count: u32, bytes: i64 },
    /// What volumes of a class with these parameters, `key=value`, can have.
    Capacity { parameters: Vec<String> },
    /// Removes a volume.
    Delete { id: String },
    /// Shows capacity: the first message, and further ones.
    Watch {
        /// Ends after so many messages…
        messages: usize,
        /// …or after so long without one.
        #[arg(long, default_value_t = 10_000)]
        patience_ms: u64,
    },
    /// Prints the metrics, as they are.
    Metrics,
    /// Has what is in the trash, and whose line holds `text`, removed.
    EmptyTrash { text: String },
    /// Gives a volume to claim `<namespace>/<claim>`.
    Adopt {
        lv: String,
        uid: String,
        /// UID of the claim whose it was; empty: without tags.
        #[arg(long, default_value = "")]
        from: String,
        #[arg(long, default_value = "default")]
        namespace: String,
        #[arg(long, default_value = "data")]
        claim: String,
        /// Empty: a raw device.
        #[arg(long, default_value = "xfs")]
        fs: String,
        #[arg(long, default_value_t = 1)]
        bytes: u64,
        #[arg(long, default_value = "vg0")]
        vg: String,
    },
    /// Lists everything.
    Inventory,
    /// Says what will hurt.
    Diagnose,
    /// Lists everything, and collects each item whose line holds `text`.
    Collect {
        text: String,
        /// Only data volumes that nobody has been given yet.
        #[arg(long)]
        only_unused: bool,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match call(Cli::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let answer = match error.downcast_ref::<Status>() {
                Some(status) => refusal(status),
                None => json!({"error": format!("{error:#}")}),
            };
            println!("{answer}");
            ExitCode::FAILURE
        }
    }
}

fn refusal(status: &Status) -> Value {
    json!({"code": format!("{:?}", status.code()), "message": status.message()})
}

#[allow(clippy::too_many_lines, reason = "one arm for each call")]
async fn call(cli: Cli) -> Result<()> {
    lvprov::tls::install_crypto();
    let channel = connect(cli.address.ip(), cli.address.port(), Some(TlsDirectory::open(&cli.tls_dir)?))?;
    let mut controller = ControllerClient::new(channel.clone());
    match cli.call {
        Call::Create { uid, bytes, vg, fs, claim, node, more, patience_ms, block, snapshot, volume } => {
            let mut message = create(&uid, bytes, &vg, &fs, &claim, &node);
            if block {
                message.volume_capabilities = vec![capability(true, false)];
            }
            let from = match (snapshot, volume) {
                (Some(snapshot_id), _) => Some(SourceType::Snapshot(SnapshotSource { snapshot_id })),
                (None, volume) => volume.map(|volume_id| SourceType::Volume(VolumeSource { volume_id })),
            };
            message.volume_content_source = from.map(|from| VolumeContentSource { r#type: Some(from) });
            message.parameters.extend(pairs(&more));
            message.parameters.retain(|_, value| !value.is_empty());
            let mut request = tonic::Request::new(message);
            request.set_timeout(Duration::from_millis(patience_ms));
            println!("{}", created(controller.create_volume(request).await?.into_inner().volume));
        }
        Call::Snapshot { id, uid, size } => {
            let size = size.map(|size| (parameters::SNAPSHOT_SIZE.to_owned(), size));
            let name = format!("snapshot-{uid}");
            let parameters = size.into_iter().collect();
            let request =
                CreateSnapshotRequest { source_volume_id: id, name, parameters, ..CreateSnapshotRequest::default() };
            println!("{}", shown(controller.create_snapshot(request).await?.into_inner().snapshot));
        }
        Call::DeleteSnapshot { id } => {
            let request = DeleteSnapshotRequest { snapshot_id: id, ..DeleteSnapshotRequest::default() };
            controller.delete_snapshot(request).await?;
            println!("{}", json!({"deleted": true}));
        }
        Call::Snapshots => {
            let all = controller.list_snapshots(ListSnapshotsRequest::default()).await?.into_inner();
            for entry in all.entries {
                println!("{}", shown(entry.snapshot));
            }
        }
        Call::Expand { id, bytes } => {
            let range = CapacityRange { required_bytes: bytes, limit_bytes: 0 };
            let request =
                ControllerExpandVolumeRequest { volume_id: id, capacity_range: Some(range), ..Default::default() };
            let answer = controller.controller_expand_volume(request).await?.into_inner();
            println!("{}", json!({"bytes": answer.capacity_bytes}));
        }
        Call::Publish { id, target, block, readonly, alone, namespace } => {
            let uid = id.rsplit_once("pvc-").map_or("", |(_, uid)| uid).to_owned();
            let context = [("claimNamespace".to_owned(), namespace), ("claimUID".to_owned(), uid)];
            let request = NodePublishVolumeRequest {
                volume_id: id,
                target_path: target,
                readonly,
                volume_capability: Some(capability(block, alone)),
                volume_context: context.into(),
                ..Default::default()
            };
            kubelet().await?.node_publish_volume(request).await?;
            println!("{}", json!({"published": true}));
        }
        Call::Unpublish { id, target } => {
            let request = NodeUnpublishVolumeRequest { volume_id: id, target_path: target };
            kubelet().await?.node_unpublish_volume(request).await?;
            println!("{}", json!({"unpublished": true}));
        }
        Call::Stats { id, path } => {
            let request = NodeGetVolumeStatsRequest { volume_id: id, volume_path: path, ..Default::default() };
            let answer = kubelet().await?.node_get_volume_stats(request).await?.into_inner();
            let usage: Vec<Value> = answer
                .usage
                .iter()
                .map(|one| json!({"total": one.total, "used": one.used, "unit": one.unit}))
                .collect();
            println!("{}", json!({"usage": usage}));
        }
        Call::NodeExpand { id, path, bytes } => {
            let range = CapacityRange { required_bytes: bytes, limit_bytes: 0 };
            let request = NodeExpandVolumeRequest {
                volume_id: id,
                volume_path: path,
                capacity_range: Some(range),
                ..Default::default()
            };
            let answer = kubelet().await?.node_expand_volume(request).await?.into_inner();
            println!("{}", json!({"bytes": answer.capacity_bytes}));
        }
        Call::CreateMany { count, bytes } => {
            let mut calls = Vec::new();
            for number in 0..count {
                let request = create(&uid(number), bytes, "vg0", "xfs", "data", NODE);
                let mut controller = ControllerClient::new(channel.clone());
                calls.push(tokio::spawn(async move { controller.create_volume(request).await }));
            }
            for call in calls {
                match call.await? {
                    Ok(volume) => println!("{}", created(volume.into_inner().volume)),
                    Err(status) => println!("{}", refusal(&status)),
                }
            }
        }
        Call::Capacity { parameters } => {
            let request = GetCapacityRequest { parameters: pairs(&parameters), ..Default::default() };
            let answer = controller.get_capacity(request).await?.into_inner();
            println!("{}", json!({"total": answer.available_capacity, "largest": answer.maximum_volume_size}));
        }
        Call::Delete { id } => {
            controller.delete_volume(DeleteVolumeRequest { volume_id: id, ..Default::default() }).await?;
            println!("{}", json!({"deleted": true}));
        }
        Call::Watch { messages, patience_ms } => watch(channel, messages, Duration::from_millis(patience_ms)).await?,
        Call::Metrics => metrics(channel).await?,
        Call::EmptyTrash { text } => {
            for item in inventory(channel.clone()).await? {
                let shown = show(&item).to_string();
                if let Some(Item::Trashed(trashed)) = item.item
                    && shown.contains(&text)
                {
                    let request = EmptyTrashRequest { node: NODE.to_owned(), trashed: Some(trashed) };
                    let answer = NodeAdminClient::new(channel.clone()).empty_trash(request).await?.into_inner();
                    println!("{}", json!({"found": answer.found}));
                }
            }
        }
        Call::Adopt { lv, uid, from, namespace, claim, fs, bytes, vg } => {
            let request = AdoptRequest {
                node: NODE.to_owned(),
                volume_group: vg,
                logical_volume: lv,
                from_claim_uid: from,
                cluster: CLUSTER.to_owned(),
                claim_uid: uid,
                claim_namespace: namespace,
                claim_name: claim,
                fs_type: fs,
                size_bytes: bytes,
                ..Default::default()
            };
            let answer = NodeAdminClient::new(channel).adopt(request).await?.into_inner();
            println!("{}", json!({"lv": answer.logical_volume, "bytes": answer.size_bytes, "layout": answer.layout}));
        }
        Call::Inventory => {
            for item in inventory(channel).await? {
                println!("{}", show(&item));
            }
        }
        Call::Diagnose => {
            let request = DiagnoseRequest { node: NODE.to_owned() };
            for found in NodeAdminClient::new(channel).diagnose(request).await?.into_inner().findings {
                println!(
                    "{}",
                    json!({"severity": found.severity, "id": found.id, "object": found.object, "problem": found.problem})
                );
            }
        }
        Call::Collect { text, only_unused } => {
            for item in inventory(channel.clone()).await? {
                if !show(&item).to_string().contains(&text) {
                    continue;
                }
                let request = CollectRequest { item: Some(item), node: NODE.to_owned(), only_unused };
                let answer = NodeAdminClient::new(channel.clone()).collect(request).await?.into_inner();
                println!("{}", json!({"removed": answer.removed, "detail": answer.detail}));
            }
        }
    }
    Ok(())
}

fn capability(block: bool, alone: bool) -> VolumeCapability {
    let mode = if alone { Mode::SingleNodeSingleWriter } else { Mode::SingleNodeWriter };
    let access = match block {
        true => AccessType::Block(BlockVolume {}),
        false => AccessType::Mount(MountVolume::default()),
    };
    VolumeCapability { access_mode: Some(AccessMode { mode: mode.into() }), access_type: Some(access) }
}

/// The node service, as kubelet sees it.
async fn kubelet() -> Result<NodeClient<Channel>> {
    let socket = "unix:///var/lib/kubelet/plugins/lvm.lvprov.io/csi.sock";
    Ok(NodeClient::new(tonic::transport::Endpoint::from_static(socket).connect().await?))
}

/// Claims of `create-many`: none that a test names itself.
fn uid(number: u32) -> String {
    format!("0f0e7f0a-1111-4222-9333-{number:012x}")
}

fn pairs(given: &[String]) -> HashMap<String, String> {
    given
        .iter()
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

fn created(volume: Option<lvprov_proto::csi::Volume>) -> Value {
    let volume = volume.unwrap_or_default();
    json!({"id": volume.volume_id, "bytes": volume.capacity_bytes})
}

fn create(uid: &str, bytes: i64, vg: &str, fs: &str, claim: &str, node: &str) -> CreateVolumeRequest {
    let given = [
        (parameters::VOLUME_GROUP, vg),
        (parameters::FS_TYPE, fs),
        (parameters::PVC_NAME, claim),
        (parameters::PVC_NAMESPACE, "default"),
        (parameters::CLAIM_UID, uid),
        (parameters::CLUSTER, CLUSTER),
    ];
    let here = Topology { segments: HashMap::from([(TOPOLOGY_NODE.to_owned(), node.to_owned())]) };
    CreateVolumeRequest {
        name: format!("pvc-{uid}"),
        capacity_range: Some(CapacityRange { required_bytes: bytes, limit_bytes: 0 }),
        volume_capabilities: vec![VolumeCapability {
            access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
            access_type: Some(AccessType::Mount(MountVolume::default())),
        }],
        parameters: given.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        accessibility_requirements: Some(TopologyRequirement { requisite: vec![here], preferred: Vec::new() }),
        ..Default::default()
    }
}

async fn watch(channel: Channel, messages: usize, patience: Duration) -> Result<()> {
    let mut stream = NodeAdminClient::new(channel).watch_capacity(WatchCapacityRequest {}).await?.into_inner();
    for _ in 0..messages {
        let Ok(message) = tokio::time::timeout(patience, stream.message()).await else { return Ok(()) };
        let Some(report) = message? else { bail!("the stream has ended") };
        let failing: Vec<Value> = report
            .failing_unmounts
            .iter()
            .map(|unmount| {
                json!({"uid": unmount.pod_uid, "target": unmount.target, "message": unmount.message,
                       "users": unmount.users, "count": unmount.count})
            })
            .collect();
        for group in report.volume_groups {
            println!(
                "{}",
                json!({"node": report.node, "vg": group.name, "size": group.size_bytes,
                       "free": group.free_bytes, "extent": group.extent_bytes, "disks": group.disk_free_bytes,
                       "layouts": group.layouts, "classes": group.device_classes, "thin": group.thin_room_bytes,
                       "default": group.default_device_class, "trash": group.trash_bytes, "failing": failing})
            );
        }
    }
    Ok(())
}

async fn metrics(mut channel: Channel) -> Result<()> {
    let request = http::Request::get("/metrics").body(tonic::body::Body::empty())?;
    let answer = channel.ready().await?.call(request).await?;
    ensure!(answer.status() == 200, "status {}", answer.status());
    let text = answer.into_body().collect().await?.to_bytes();
    print!("{}", String::from_utf8(text.to_vec())?);
    Ok(())
}

fn shown(snapshot: Option<lvprov_proto::csi::Snapshot>) -> Value {
    let snapshot = snapshot.unwrap_or_default();
    json!({"id": snapshot.snapshot_id, "bytes": snapshot.size_bytes, "source": snapshot.source_volume_id,
        "ready": snapshot.ready_to_use, "made": snapshot.creation_time.map(|time| time.seconds)})
}

async fn inventory(channel: Channel) -> Result<Vec<InventoryItem>> {
    let request = InventoryRequest { node: NODE.to_owned() };
    let mut stream = NodeAdminClient::new(channel).inventory(request).await?.into_inner();
    let mut items = Vec::new();
    while let Some(item) = stream.message().await? {
        items.push(item);
    }
    Ok(items)
}

fn show(item: &InventoryItem) -> Value {
    match &item.item {
        Some(Item::DataVolume(v)) => json!({"kind": "data", "vg": v.volume_group, "lv": v.logical_volume,
            "size": v.size_bytes, "created": v.created_unix, "uid": v.claim_uid,
            "claim": format!("{}/{}", v.claim_namespace, v.claim_name), "cluster": v.cluster, "open": v.open,
            "placement": v.layout}),
        Some(Item::LogVolume(v)) => json!({"kind": "log", "vg": v.volume_group, "lv": v.logical_volume,
            "size": v.size_bytes, "created": v.created_unix, "volume": format!("{}/{}", v.namespace, v.volume),
            "directories": v.directories, "mounted": v.mounted, "path": v.path}),
        Some(Item::LogDirectory(v)) => json!({"kind": "directory", "vg": v.volume_group, "lv": v.logical_volume,
            "volume": format!("{}/{}", v.namespace, v.volume), "directory": v.directory, "pod": v.pod_name,
            "uid": v.pod_uid, "used": v.used_bytes, "quota": v.quota_bytes, "retention": v.retention_seconds,
            "lastUsed": v.last_used_unix, "mounted": v.mounted, "path": v.path}),
        Some(Item::Mount(v)) => json!({"kind": "mount", "target": v.target, "device": v.device,
            "vg": v.volume_group, "lv": v.logical_volume, "uid": v.pod_uid, "reason": v.reason}),
        Some(Item::Trashed(v)) => {
            let volume = v.volume.clone().unwrap_or_default();
            json!({"kind": "trash", "vg": volume.volume_group, "lv": volume.logical_volume, "size": volume.size_bytes,
                "uid": volume.claim_uid, "claim": format!("{}/{}", volume.claim_namespace, volume.claim_name),
                "since": v.trashed_unix, "until": v.until_unix, "policy": v.delete_policy, "wiping": v.wiping,
                "class": volume.storage_class, "block": volume.block})
        }
        Some(Item::Snapshot(v)) => json!({"kind": "snapshot", "vg": v.volume_group, "lv": v.logical_volume,
            "size": v.size_bytes, "room": v.room_bytes, "used": v.used_percent, "lost": v.lost, "open": v.open,
            "source": v.source_claim_uid, "uid": v.snapshot_uid, "ofClone": v.of_clone,
            "name": format!("{}/{}", v.snapshot_namespace, v.snapshot_name)}),
        None => Value::Null,
    }
}
