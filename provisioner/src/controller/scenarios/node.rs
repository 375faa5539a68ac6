//! A node service that answers as told.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use lvprov_proto::csi;
use lvprov_proto::csi::controller_server::{Controller, ControllerServer};
use lvprov_proto::lvprov as wire;
use lvprov_proto::lvprov::node_admin_server::{NodeAdmin, NodeAdminServer};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};

/// A volume is extended by whole ones of these.
const EXTENT: u64 = 4 << 20;

/// What it was asked, and what it is to say.
#[derive(Default)]
struct Script {
    created: Vec<csi::CreateVolumeRequest>,
    deleted: Vec<String>,
    expanded: Vec<(String, i64)>,
    /// It is of a version that does not say whose volume it has made.
    silent_about_owner: bool,
    /// Snapshots that its inventory has.
    listed_snapshots: Vec<wire::Snapshot>,
    /// Data volumes that it has, and whether they have been used.
    volumes: Vec<(wire::DataVolume, bool)>,
    collected: Vec<String>,
    /// The nodes that the calls said they were for.
    meant: Vec<String>,
    refusal: Option<Status>,
    snapshotted: Vec<csi::CreateSnapshotRequest>,
    unsnapshotted: Vec<String>,
    /// Snapshots that it has lost.
    lost: bool,
    /// What it says when it is asked what became of a snapshot: that there is
    /// none, or this.
    about_snapshots: Option<Result<(), Status>>,
    /// It is of a version that fills no volumes.
    leaves_empty: bool,
}

impl Script {
    fn snapshot(&self, snapshot_id: String) -> csi::Snapshot {
        let mut taken = csi::Snapshot::default().creation_time.unwrap_or_default();
        (taken.seconds, taken.nanos) = (1_700_000_000, 5);
        csi::Snapshot {
            size_bytes: 1 << 30,
            snapshot_id,
            creation_time: Some(taken),
            ready_to_use: !self.lost,
            ..csi::Snapshot::default()
        }
    }
}

/// A node service on loopback.
pub struct FakeNode {
    /// To it.
    pub channel: Channel,
    script: Arc<Mutex<Script>>,
}

impl FakeNode {
    pub async fn start() -> Self {
        let script = Arc::<Mutex<Script>>::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let service = || Service { script: script.clone() };
        let server = Server::builder()
            .add_service(ControllerServer::new(service()))
            .add_service(NodeAdminServer::new(service()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        Self { channel, script }
    }

    /// From now on it refuses everything.
    pub fn refuse(&self, status: Status) {
        self.script.lock().unwrap().refusal = Some(status);
    }

    /// From now on it serves.
    pub fn serve(&self) {
        self.script.lock().unwrap().refusal = None;
    }

    /// What it was asked to take snapshots of.
    pub fn snapshotted(&self) -> Vec<csi::CreateSnapshotRequest> {
        self.script.lock().unwrap().snapshotted.clone()
    }

    /// The snapshots that it was asked to remove.
    pub fn unsnapshotted(&self) -> Vec<String> {
        self.script.lock().unwrap().unsnapshotted.clone()
    }

    /// From now on all its snapshots are lost.
    pub fn lose_snapshots(&self) {
        self.script.lock().unwrap().lost = true;
    }

    /// From now on it lists no snapshots, or says this.
    pub fn list_no_snapshots(&self, instead: Result<(), Status>) {
        self.script.lock().unwrap().about_snapshots = Some(instead);
    }

    /// From now on it fills no volumes.
    pub fn leave_empty(&self) {
        self.script.lock().unwrap().leaves_empty = true;
    }

    /// It has this snapshot.
    pub fn has_snapshot(&self, snapshot: wire::Snapshot) {
        self.script.lock().unwrap().listed_snapshots.push(snapshot);
    }

    /// It has this data volume.
    pub fn has(&self, volume: wire::DataVolume, used: bool) {
        self.script.lock().unwrap().volumes.push((volume, used));
    }

    /// What was collected.
    pub fn collected(&self) -> Vec<String> {
        self.script.lock().unwrap().collected.clone()
    }

    /// From now on it does not say whose volume it has made.
    pub fn forget_owners(&self) {
        self.script.lock().unwrap().silent_about_owner = true;
    }

    /// What it was asked to extend, and to how many bytes.
    pub fn expanded(&self) -> Vec<(String, i64)> {
        self.script.lock().unwrap().expanded.clone()
    }

    pub fn meant(&self) -> Vec<String> {
        self.script.lock().unwrap().meant.clone()
    }

    pub fn created(&self) -> Vec<csi::CreateVolumeRequest> {
        self.script.lock().unwrap().created.clone()
    }

    pub fn deleted(&self) -> Vec<String> {
        self.script.lock().unwrap().deleted.clone()
    }
}

struct Service {
    script: Arc<Mutex<Script>>,
}

fn meant<T>(request: &Request<T>) -> String {
    request.metadata().get("x-lvprov-node").map(|node| node.to_str().unwrap().to_owned()).unwrap_or_default()
}

type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<Response<T>, Status>> + Send + 'a>>;

/// Calls that the controller never makes.
macro_rules! never {
    ($($name:ident($request:ident) -> $response:ident;)*) => {
        $(fn $name<'a: 'b, 'b>(&'a self, _: Request<csi::$request>) -> Answer<'b, csi::$response>
        where
            Self: 'b,
        {
            Box::pin(std::future::ready(Err(Status::unimplemented(stringify!($name)))))
        })*
    };
}

impl Controller for Service {
    fn create_volume<'a: 'b, 'b>(
        &'a self,
        request: Request<csi::CreateVolumeRequest>,
    ) -> Answer<'b, csi::CreateVolumeResponse>
    where
        Self: 'b,
    {
        let mut script = self.script.lock().unwrap();
        script.meant.push(meant(&request));
        let request = request.into_inner();
        script.created.push(request.clone());
        let mut owner = HashMap::from([
            ("claimNamespace".to_owned(), request.parameters["csi.storage.k8s.io/pvc/namespace"].clone()),
            ("claimUID".to_owned(), request.parameters["lvprov.io/claim-uid"].clone()),
        ]);
        if script.silent_about_owner {
            owner.clear();
        }
        let answer = match &script.refusal {
            Some(refusal) => Err(refusal.clone()),
            None => Ok(Response::new(csi::CreateVolumeResponse {
                volume: Some(csi::Volume {
                    capacity_bytes: request.capacity_range.unwrap().required_bytes,
                    volume_id: format!("{}/{}", request.parameters["volumeGroup"], request.name),
                    volume_context: owner,
                    content_source: request.volume_content_source.filter(|_| !script.leaves_empty),
                    ..csi::Volume::default()
                }),
            })),
        };
        Box::pin(std::future::ready(answer))
    }

    fn delete_volume<'a: 'b, 'b>(
        &'a self,
        request: Request<csi::DeleteVolumeRequest>,
    ) -> Answer<'b, csi::DeleteVolumeResponse>
    where
        Self: 'b,
    {
        let mut script = self.script.lock().unwrap();
        script.meant.push(meant(&request));
        script.deleted.push(request.into_inner().volume_id);
        let answer = match &script.refusal {
            Some(refusal) => Err(refusal.clone()),
            None => Ok(Response::new(csi::DeleteVolumeResponse {})),
        };
        Box::pin(std::future::ready(answer))
    }

    fn controller_expand_volume<'a: 'b, 'b>(
        &'a self,
        request: Request<csi::ControllerExpandVolumeRequest>,
    ) -> Answer<'b, csi::ControllerExpandVolumeResponse>
    where
        Self: 'b,
    {
        let mut script = self.script.lock().unwrap();
        script.meant.push(meant(&request));
        let request = request.into_inner();
        let asked = request.capacity_range.unwrap().required_bytes;
        script.expanded.push((request.volume_id, asked));
        let answer = match &script.refusal {
            Some(refusal) => Err(refusal.clone()),
            None => Ok(Response::new(csi::ControllerExpandVolumeResponse {
                capacity_bytes: (asked as u64).next_multiple_of(EXTENT) as i64,
                node_expansion_required: true,
            })),
        };
        Box::pin(std::future::ready(answer))
    }

    fn create_snapshot<'a: 'b, 'b>(
        &'a self,
        request: Request<csi::CreateSnapshotRequest>,
    ) -> Answer<'b, csi::CreateSnapshotResponse>
    where
        Self: 'b,
    {
        let mut script = self.script.lock().unwrap();
        script.meant.push(meant(&request));
        let request = request.into_inner();
        script.snapshotted.push(request.clone());
        let id = format!("n1/vg0/{}", request.name.replace("snapshot-", "snap-"));
        let snapshot = Some(csi::Snapshot { source_volume_id: request.source_volume_id, ..script.snapshot(id) });
        let answer = match &script.refusal {
            Some(refusal) => Err(refusal.clone()),
            None => Ok(Response::new(csi::CreateSnapshotResponse { snapshot })),
        };
        Box::pin(std::future::ready(answer))
    }

    fn list_snapshots<'a: 'b, 'b>(
        &'a self,
        request: Request<csi::ListSnapshotsRequest>,
    ) -> Answer<'b, csi::ListSnapshotsResponse>
    where
        Self: 'b,
    {
        let mut script = self.script.lock().unwrap();
        script.meant.push(meant(&request));
        let snapshot = Some(script.snapshot(request.into_inner().snapshot_id));
        let answer = match &script.about_snapshots {
            Some(Ok(())) => Ok(Response::new(csi::ListSnapshotsResponse::default())),
            Some(Err(refusal)) => Err(refusal.clone()),
            None => Ok(Response::new(csi::ListSnapshotsResponse {
                entries: vec![csi::list_snapshots_response::Entry { snapshot }],
                next_token: String::new(),
            })),
        };
        Box::pin(std::future::ready(answer))
    }

    fn delete_snapshot<'a: 'b, 'b>(
        &'a self,
        request: Request<csi::DeleteSnapshotRequest>,
    ) -> Answer<'b, csi::DeleteSnapshotResponse>
    where
        Self: 'b,
    {
        let mut script = self.script.lock().unwrap();
        script.meant.push(meant(&request));
        script.unsnapshotted.push(request.into_inner().snapshot_id);
        let answer = match &script.refusal {
            Some(refusal) => Err(refusal.clone()),
            None => Ok(Response::new(csi::DeleteSnapshotResponse {})),
        };
        Box::pin(std::future::ready(answer))
    }

    never! {
        controller_publish_volume(ControllerPublishVolumeRequest) -> ControllerPublishVolumeResponse;
        controller_unpublish_volume(ControllerUnpublishVolumeRequest) -> ControllerUnpublishVolumeResponse;
        validate_volume_capabilities(ValidateVolumeCapabilitiesRequest) -> ValidateVolumeCapabilitiesResponse;
        list_volumes(ListVolumesRequest) -> ListVolumesResponse;
        get_capacity(GetCapacityRequest) -> GetCapacityResponse;
        controller_get_capabilities(ControllerGetCapabilitiesRequest) -> ControllerGetCapabilitiesResponse;
        get_snapshot(GetSnapshotRequest) -> GetSnapshotResponse;
        controller_get_volume(ControllerGetVolumeRequest) -> ControllerGetVolumeResponse;
        controller_modify_volume(ControllerModifyVolumeRequest) -> ControllerModifyVolumeResponse;
    }
}

type Listed<T> = Pin<Box<dyn futures::Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl NodeAdmin for Service {
    type WatchCapacityStream = Listed<wire::CapacityReport>;
    type InventoryStream = Listed<wire::InventoryItem>;

    async fn watch_capacity(
        &self,
        _: Request<wire::WatchCapacityRequest>,
    ) -> Result<Response<Self::WatchCapacityStream>, Status> {
        Err(Status::unimplemented("watch_capacity"))
    }

    async fn inventory(
        &self,
        request: Request<wire::InventoryRequest>,
    ) -> Result<Response<Self::InventoryStream>, Status> {
        let script = self.script.lock().unwrap();
        assert_eq!(request.into_inner().node, "n1");
        if let Some(refusal) = &script.refusal {
            return Err(refusal.clone());
        }
        let item = |(volume, _): &(wire::DataVolume, bool)| {
            Ok(wire::InventoryItem { item: Some(wire::inventory_item::Item::DataVolume(volume.clone())) })
        };
        let snapshots = script
            .listed_snapshots
            .iter()
            .cloned()
            .map(|snapshot| Ok(wire::InventoryItem { item: Some(wire::inventory_item::Item::Snapshot(snapshot)) }));
        let items: Vec<_> = script.volumes.iter().map(item).chain(snapshots).collect();
        Ok(Response::new(Box::pin(futures::stream::iter(items))))
    }

    async fn diagnose(&self, _: Request<wire::DiagnoseRequest>) -> Result<Response<wire::DiagnoseResponse>, Status> {
        Err(Status::unimplemented("diagnose"))
    }

    async fn empty_trash(
        &self,
        _: Request<wire::EmptyTrashRequest>,
    ) -> Result<Response<wire::EmptyTrashResponse>, Status> {
        Err(Status::unimplemented("empty_trash"))
    }

    async fn adopt(&self, _: Request<wire::AdoptRequest>) -> Result<Response<wire::AdoptResponse>, Status> {
        Err(Status::unimplemented("adopt"))
    }

    async fn collect(&self, request: Request<wire::CollectRequest>) -> Result<Response<wire::CollectResponse>, Status> {
        let mut script = self.script.lock().unwrap();
        let request = request.into_inner();
        assert!(request.node == "n1" && request.only_unused);
        let Some(wire::inventory_item::Item::DataVolume(asked)) = request.item.and_then(|item| item.item) else {
            return Err(Status::invalid_argument("no data volume"));
        };
        let removed = script.volumes.iter().any(|(volume, used)| *volume == asked && !used);
        if removed {
            script.volumes.retain(|(volume, _)| *volume != asked);
            script.collected.push(asked.logical_volume);
        }
        Ok(Response::new(wire::CollectResponse { removed, detail: String::new() }))
    }
}
