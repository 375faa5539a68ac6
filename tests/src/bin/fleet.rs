//! Thousands of nodes that are not there: one process that answers as all their
//! node services, and the objects that a cluster with them would have, written
//! straight to etcd. For `cargo xtask bench scale`.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream as StdStream};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::thread;

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Parser, Subcommand};
use futures::{Stream, StreamExt};
use lvprov::names::{DRIVER, FLEX_DRIVER, NODE_PORT, TOPOLOGY_NODE, context};
use lvprov::reports;
use lvprov::tls::TlsDirectory;
use lvprov_proto::csi::controller_server::{Controller, ControllerServer};
use lvprov_proto::csi::{self, Volume};
use lvprov_proto::lvprov as wire;
use lvprov_proto::lvprov::node_admin_server::{NodeAdmin, NodeAdminServer};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::WatchStream;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status};

/// Simulated nodes have addresses of loopback, from this one on.
const FIRST: u32 = u32::from_be_bytes([127, 16, 0, 1]);
const GIB: u64 = 1 << 30;
/// Operations of one transaction; etcd takes 128 by default.
const BATCH: usize = 100;
/// Connections to etcd.
const WRITERS: usize = 4;

#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answers as the node services of all nodes, over mutual TLS.
    Serve {
        #[arg(long)]
        tls_dir: PathBuf,
    },
    /// Writes nodes, volumes and claims to etcd.
    Load {
        #[arg(long)]
        nodes: u32,
        #[arg(long)]
        volumes: u32,
        #[arg(long, default_value = "127.0.0.1:2379")]
        etcd: SocketAddr,
    },
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Serve { tls_dir } => serve(tls_dir),
        Command::Load { nodes, volumes, etcd } => load(nodes, volumes, etcd),
    }
}

fn address(node: u32) -> Ipv4Addr {
    Ipv4Addr::from(FIRST + node)
}

fn name(node: u32) -> String {
    format!("node-{node:05}")
}

fn name_at(address: SocketAddr) -> Option<String> {
    match address {
        SocketAddr::V4(v4) => Some(name(u32::from(*v4.ip()).checked_sub(FIRST)?)),
        SocketAddr::V6(_) => None,
    }
}

/// A connection that remembers which node was called.
struct Called {
    stream: TlsStream<TcpStream>,
    node: Arc<str>,
}

impl Connected for Called {
    type ConnectInfo = Arc<str>;

    fn connect_info(&self) -> Arc<str> {
        Arc::clone(&self.node)
    }
}

impl AsyncRead for Called {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Called {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[tokio::main]
async fn serve(tls_dir: PathBuf) -> Result<()> {
    lvprov::tls::install_crypto();
    let tls = TlsDirectory::open(&tls_dir)?;
    let listener = TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], NODE_PORT))).await?;
    let (sender, receiver) = tokio::sync::mpsc::channel(256);
    let rooms = Rooms::default();
    let served = rooms.clone();
    tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            let (tls, sender, rooms) = (Arc::clone(&tls), sender.clone(), served.clone());
            tokio::spawn(async move {
                let node = stream.local_addr().ok().and_then(name_at);
                let accepted = TlsAcceptor::from(tls.now().server_config()).accept(stream).await;
                let (Some(node), Ok(stream)) = (node, accepted) else { return };
                if stream.get_ref().1.alpn_protocol() == Some(reports::PROTOCOL) {
                    let _ = reports::send(stream, rooms.reports(&node)).await;
                } else {
                    let _ = sender.send(Ok::<_, std::io::Error>(Called { stream, node: node.into() })).await;
                }
            });
        }
    });
    Server::builder()
        .add_service(NodeAdminServer::new(Node(rooms.clone())))
        .add_service(ControllerServer::new(Node(rooms)))
        .serve_with_incoming(tokio_stream::wrappers::ReceiverStream::new(receiver))
        .await?;
    Ok(())
}

/// What each node has free.
#[derive(Debug, Clone, Default)]
struct Rooms(Arc<Mutex<BTreeMap<String, watch::Sender<u64>>>>);

impl Rooms {
    fn of(&self, node: &str) -> watch::Sender<u64> {
        // One claim more and a fourth of them has, rounded, less.
        let at_first = || if node.ends_with(['0', '4', '8']) { 512 * GIB } else { 500 * GIB };
        let mut rooms = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        rooms.entry(node.to_owned()).or_insert_with(|| watch::Sender::new(at_first())).clone()
    }

    fn reports(&self, node: &str) -> impl Stream<Item = wire::CapacityReport> + Send + use<> {
        let (node, room) = (node.to_owned(), self.of(node));
        WatchStream::new(room.subscribe()).map(move |free| {
            // As long as anybody listens.
            let _ = &room;
            report_of(&node, free)
        })
    }
}

/// Any of the nodes.
#[derive(Debug, Clone)]
struct Node(Rooms);

fn called<T>(request: &Request<T>) -> Result<Arc<str>, Status> {
    request.extensions().get::<Arc<str>>().cloned().ok_or_else(|| Status::internal("called nobody"))
}

fn report_of(node: &str, free: u64) -> wire::CapacityReport {
    wire::CapacityReport {
        node: node.to_owned(),
        volume_groups: vec![wire::VolumeGroup {
            name: "vg0".into(),
            size_bytes: 1000 * GIB,
            free_bytes: free,
            extent_bytes: 4 << 20,
            disk_free_bytes: vec![free],
            layouts: vec!["linear".into()],
            ..wire::VolumeGroup::default()
        }],
        failing_unmounts: Vec::new(),
    }
}

fn nobody_asks() -> Status {
    Status::unimplemented("nobody asks for that here")
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl NodeAdmin for Node {
    type WatchCapacityStream = Answers<wire::CapacityReport>;
    type InventoryStream = Answers<wire::InventoryItem>;

    async fn watch_capacity(
        &self,
        request: Request<wire::WatchCapacityRequest>,
    ) -> Result<Response<Self::WatchCapacityStream>, Status> {
        let node = called(&request)?;
        Ok(Response::new(Box::pin(self.0.reports(&node).map(Ok))))
    }

    /// Nothing that no PersistentVolume names.
    async fn inventory(&self, _: Request<wire::InventoryRequest>) -> Result<Response<Self::InventoryStream>, Status> {
        Ok(Response::new(Box::pin(futures::stream::empty())))
    }

    async fn collect(&self, _: Request<wire::CollectRequest>) -> Result<Response<wire::CollectResponse>, Status> {
        Err(nobody_asks())
    }

    async fn empty_trash(
        &self,
        _: Request<wire::EmptyTrashRequest>,
    ) -> Result<Response<wire::EmptyTrashResponse>, Status> {
        Err(nobody_asks())
    }

    async fn adopt(&self, _: Request<wire::AdoptRequest>) -> Result<Response<wire::AdoptResponse>, Status> {
        Err(nobody_asks())
    }

    async fn diagnose(&self, _: Request<wire::DiagnoseRequest>) -> Result<Response<wire::DiagnoseResponse>, Status> {
        Err(nobody_asks())
    }
}

#[tonic::async_trait]
impl Controller for Node {
    async fn create_volume(
        &self,
        request: Request<csi::CreateVolumeRequest>,
    ) -> Result<Response<csi::CreateVolumeResponse>, Status> {
        let node = called(&request)?;
        let request = request.into_inner();
        let parameter = |key: &str| request.parameters.get(key).cloned().unwrap_or_default();
        let bytes = request.capacity_range.map_or(0, |range| range.required_bytes);
        self.0.of(&node).send_modify(|free| *free = free.saturating_sub(bytes as u64));
        let segments = [(TOPOLOGY_NODE.to_owned(), node.to_string())].into();
        let volume = Volume {
            capacity_bytes: bytes,
            volume_id: format!("vg0/{}", request.name),
            volume_context: [
                (context::CLAIM_NAMESPACE.to_owned(), parameter("csi.storage.k8s.io/pvc/namespace")),
                (context::CLAIM_UID.to_owned(), parameter("lvprov.io/claim-uid")),
            ]
            .into(),
            accessible_topology: vec![csi::Topology { segments }],
            ..Volume::default()
        };
        Ok(Response::new(csi::CreateVolumeResponse { volume: Some(volume) }))
    }

    async fn delete_volume(
        &self,
        _: Request<csi::DeleteVolumeRequest>,
    ) -> Result<Response<csi::DeleteVolumeResponse>, Status> {
        Ok(Response::new(csi::DeleteVolumeResponse {}))
    }

    async fn controller_publish_volume(
        &self,
        _: Request<csi::ControllerPublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerPublishVolumeResponse>, Status> {
        Err(nobody_asks())
    }

    async fn controller_unpublish_volume(
        &self,
        _: Request<csi::ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerUnpublishVolumeResponse>, Status> {
        Err(nobody_asks())
    }

    async fn validate_volume_capabilities(
        &self,
        _: Request<csi::ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<csi::ValidateVolumeCapabilitiesResponse>, Status> {
        Err(nobody_asks())
    }

    async fn list_volumes(
        &self,
        _: Request<csi::ListVolumesRequest>,
    ) -> Result<Response<csi::ListVolumesResponse>, Status> {
        Err(nobody_asks())
    }

    async fn get_capacity(
        &self,
        _: Request<csi::GetCapacityRequest>,
    ) -> Result<Response<csi::GetCapacityResponse>, Status> {
        Err(nobody_asks())
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<csi::ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<csi::ControllerGetCapabilitiesResponse>, Status> {
        Err(nobody_asks())
    }

    async fn create_snapshot(
        &self,
        _: Request<csi::CreateSnapshotRequest>,
    ) -> Result<Response<csi::CreateSnapshotResponse>, Status> {
        Err(nobody_asks())
    }

    async fn delete_snapshot(
        &self,
        _: Request<csi::DeleteSnapshotRequest>,
    ) -> Result<Response<csi::DeleteSnapshotResponse>, Status> {
        Err(nobody_asks())
    }

    async fn list_snapshots(
        &self,
        _: Request<csi::ListSnapshotsRequest>,
    ) -> Result<Response<csi::ListSnapshotsResponse>, Status> {
        Err(nobody_asks())
    }

    async fn get_snapshot(
        &self,
        _: Request<csi::GetSnapshotRequest>,
    ) -> Result<Response<csi::GetSnapshotResponse>, Status> {
        Err(nobody_asks())
    }

    async fn controller_expand_volume(
        &self,
        _: Request<csi::ControllerExpandVolumeRequest>,
    ) -> Result<Response<csi::ControllerExpandVolumeResponse>, Status> {
        Err(nobody_asks())
    }

    async fn controller_get_volume(
        &self,
        _: Request<csi::ControllerGetVolumeRequest>,
    ) -> Result<Response<csi::ControllerGetVolumeResponse>, Status> {
        Err(nobody_asks())
    }

    async fn controller_modify_volume(
        &self,
        _: Request<csi::ControllerModifyVolumeRequest>,
    ) -> Result<Response<csi::ControllerModifyVolumeResponse>, Status> {
        Err(nobody_asks())
    }
}

/// Who last wrote an object, as the API server notes it: a good part of each.
fn managed(manager: &str, fields: Value) -> Value {
    json!([{"manager": manager, "operation": "Update", "apiVersion": "v1", "time": "2026-01-01T00:00:00Z",
            "fieldsType": "FieldsV1", "fieldsV1": fields}])
}

fn metadata(name: &str, number: u32, kind: u8) -> Value {
    json!({"name": name, "uid": format!("{kind:08x}-0000-4000-8000-{number:012x}"), "creationTimestamp": "2026-01-01T00:00:00Z"})
}

fn node_object(number: u32) -> Value {
    let name = name(number);
    let mut metadata = metadata(&name, number, 1);
    metadata["labels"] = json!({TOPOLOGY_NODE: name, "kubernetes.io/hostname": name, "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64", "topology.kubernetes.io/zone": format!("zone-{}", number % 3)});
    metadata["managedFields"] = managed(
        "kubelet",
        json!({"f:status": {"f:addresses": {".": {}}, "f:allocatable":
        {"f:cpu": {}, "f:memory": {}}, "f:capacity": {"f:cpu": {}, "f:memory": {}}, "f:images": {}, "f:conditions": {}}}),
    );
    let resources = json!({"cpu": "64", "memory": "256Gi", "pods": "250", "ephemeral-storage": "1Ti"});
    let images: Vec<Value> = (0..20)
        .map(|image| json!({"names": [format!("registry.example/team/service-{image}@sha256:{image:064x}"),
                                      format!("registry.example/team/service-{image}:v1.{image}")], "sizeBytes": 123_456_789}))
        .collect();
    json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {}, "status": {
        "addresses": [{"type": "InternalIP", "address": address(number).to_string()}, {"type": "Hostname", "address": name}],
        "capacity": resources, "allocatable": resources, "images": images,
        "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "kubelet is posting ready status",
                        "lastHeartbeatTime": "2026-01-01T00:00:00Z", "lastTransitionTime": "2026-01-01T00:00:00Z"}],
        "nodeInfo": {"architecture": "amd64", "bootID": "", "containerRuntimeVersion": "containerd://2.0.0",
                     "kernelVersion": "6.1.0", "kubeProxyVersion": "", "kubeletVersion": "v1.37.2", "machineID": "",
                     "operatingSystem": "linux", "osImage": "Debian", "systemUUID": ""}}})
}

fn claim_names(number: u32) -> (String, String, String) {
    let uid = format!("{:08x}-0000-4000-8000-{number:012x}", 2);
    (format!("data-set-{}-{}", number / 10, number % 10), format!("pvc-{uid}"), uid)
}

fn claim_object(number: u32) -> Value {
    let (claim, volume, _) = claim_names(number);
    let mut metadata = metadata(&claim, number, 2);
    metadata["namespace"] = json!("default");
    metadata["labels"] = json!({"app": format!("set-{}", number / 10)});
    metadata["finalizers"] = json!(["kubernetes.io/pvc-protection"]);
    metadata["annotations"] = json!({"pv.kubernetes.io/bind-completed": "yes", "pv.kubernetes.io/bound-by-controller": "yes",
        "volume.kubernetes.io/selected-node": "node-00000", "volume.kubernetes.io/storage-provisioner": DRIVER,
        "volume.beta.kubernetes.io/storage-provisioner": DRIVER});
    metadata["managedFields"] = managed(
        "kube-controller-manager",
        json!({"f:metadata": {"f:annotations":
        {".": {}, "f:pv.kubernetes.io/bind-completed": {}, "f:volume.kubernetes.io/selected-node": {}}, "f:labels": {".": {}, "f:app": {}}},
        "f:spec": {"f:accessModes": {}, "f:resources": {"f:requests": {".": {}, "f:storage": {}}}, "f:volumeMode": {}, "f:volumeName": {}},
        "f:status": {"f:accessModes": {}, "f:capacity": {".": {}, "f:storage": {}}, "f:phase": {}}}),
    );
    json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata,
        "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "scale", "volumeMode": "Filesystem", "volumeName": volume,
                 "resources": {"requests": {"storage": "10Gi"}}},
        "status": {"phase": "Bound", "accessModes": ["ReadWriteOnce"], "capacity": {"storage": "10Gi"}}})
}

fn volume_object(number: u32, nodes: u32) -> Value {
    let (claim, volume, claim_uid) = claim_names(number);
    let mut metadata = metadata(&volume, number, 3);
    metadata["annotations"] = json!({"pv.kubernetes.io/provisioned-by": DRIVER});
    metadata["finalizers"] =
        json!(["external-provisioner.volume.kubernetes.io/finalizer", "kubernetes.io/pv-protection"]);
    metadata["managedFields"] = managed(
        "lvprov-controller",
        json!({"f:metadata": {"f:annotations": {".": {}}, "f:finalizers": {}},
        "f:spec": {"f:accessModes": {}, "f:capacity": {".": {}, "f:storage": {}}, "f:claimRef": {}, "f:flexVolume": {".": {},
        "f:driver": {}, "f:fsType": {}, "f:options": {}}, "f:nodeAffinity": {".": {}, "f:required": {}},
        "f:persistentVolumeReclaimPolicy": {}, "f:storageClassName": {}, "f:volumeMode": {}}}),
    );
    json!({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": metadata,
        "spec": {"accessModes": ["ReadWriteOnce"], "capacity": {"storage": "10Gi"}, "volumeMode": "Filesystem",
            "persistentVolumeReclaimPolicy": "Delete", "storageClassName": "scale",
            "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": "default", "name": claim, "uid": claim_uid},
            "flexVolume": {"driver": FLEX_DRIVER, "fsType": "xfs", "options": {"type": "data", "volumeGroup": "vg0",
                           "logicalVolume": volume, "claimUID": claim_uid}},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [
                {"key": TOPOLOGY_NODE, "operator": "In", "values": [name(number % nodes.max(1))]}]}]}}},
        "status": {"phase": "Bound"}})
}

fn load(nodes: u32, volumes: u32, etcd: SocketAddr) -> Result<()> {
    let writers: Vec<_> = (0..WRITERS as u32)
        .map(|writer| {
            thread::spawn(move || -> Result<()> {
                let mut etcd = Etcd::connect(etcd)?;
                let mine = |count: u32| (0..count).filter(move |number| number % WRITERS as u32 == writer);
                for number in mine(nodes) {
                    etcd.put(&format!("/registry/minions/{}", name(number)), &node_object(number))?;
                }
                for number in mine(volumes) {
                    let (claim, volume, _) = claim_names(number);
                    etcd.put(&format!("/registry/persistentvolumes/{volume}"), &volume_object(number, nodes))?;
                    etcd.put(&format!("/registry/persistentvolumeclaims/default/{claim}"), &claim_object(number))?;
                }
                etcd.flush()
            })
        })
        .collect();
    for writer in writers {
        writer.join().map_err(|_| anyhow::anyhow!("a writer panicked"))??;
    }
    Ok(())
}

/// etcd's own gateway of JSON, over a connection that stays open.
struct Etcd {
    stream: BufReader<StdStream>,
    pending: Vec<Value>,
}

impl Etcd {
    fn connect(address: SocketAddr) -> Result<Self> {
        let stream = StdStream::connect(address).context("cannot reach etcd")?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::new(stream), pending: Vec::new() })
    }

    fn put(&mut self, key: &str, object: &Value) -> Result<()> {
        let put = json!({"key": base64(key.as_bytes()), "value": base64(object.to_string().as_bytes())});
        self.pending.push(json!({"requestPut": put}));
        if self.pending.len() >= BATCH { self.flush() } else { Ok(()) }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.stream.read_line(&mut line)? > 0, "etcd has closed the connection");
        Ok(line.trim().to_owned())
    }

    fn flush(&mut self) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let body = json!({"success": std::mem::take(&mut self.pending)}).to_string();
        write!(
            self.stream.get_mut(),
            "POST /v3/kv/txn HTTP/1.1\r\nHost: etcd\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let (status, mut length, mut chunked) = (self.line()?, 0, false);
        loop {
            let header = self.line()?.to_ascii_lowercase();
            if let Some(value) = header.strip_prefix("content-length:") {
                length = value.trim().parse()?;
            } else if header.starts_with("transfer-encoding:") {
                chunked = header.contains("chunked");
            } else if header.is_empty() {
                break;
            }
        }
        let mut answer = Vec::new();
        loop {
            if chunked {
                length = usize::from_str_radix(&self.line()?, 16)?;
            }
            let before = answer.len();
            answer.resize(before + length, 0);
            self.stream.read_exact(&mut answer[before..])?;
            if !chunked {
                break;
            }
            // Each chunk, and the last, empty one, ends with a line of its own.
            self.line()?;
            if length == 0 {
                break;
            }
        }
        if !status.contains(" 200") {
            bail!("etcd said {status}: {}", String::from_utf8_lossy(&answer));
        }
        Ok(())
    }
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0_u32, |group, byte| group << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for at in 0..4 {
            let digit = DIGITS[(group >> (18 - 6 * at) & 63) as usize];
            text.push(if at <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    text
}
