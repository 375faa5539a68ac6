//! The CSI Controller service, for the volume groups of this one node.

use std::collections::HashMap;
use std::fmt::Display;
use std::sync::Arc;
use std::time::Instant;

use lvm::Lvm;
use lvm::identity::Owner;
use lvm::layout::Layout;
use lvm::names::{Namespace, VgName};
use lvm::report::{Snapshot, VolumeGroup};
use lvm::volume::{Created, DeleteError, Deleted, ExtendError};
use lvprov_proto::csi::controller_server::Controller;
use lvprov_proto::csi::controller_service_capability::rpc::Type;
use lvprov_proto::csi::controller_service_capability::{self, Rpc};
use lvprov_proto::csi::validate_volume_capabilities_response::Confirmed;
use lvprov_proto::csi::{self, ControllerServiceCapability, Volume};
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use super::addressee;
use super::capability::{self, Access};
use super::capacity::Capacity;
use super::create_volume::{self, CreateVolumeError};
use super::csi_node::topology;
use super::delete_volume::DeleteVolumeError;
use super::expand_volume::{self, ExpandVolumeError};
use super::in_progress::InProgress;
use super::served::Served;
use super::snapshots::{self, CreateSnapshotError, RemoveSnapshotError, SnapshotId};
use super::volume_id::VolumeId;
use super::wiper::{COPIED, Wiper, ZEROED};
use crate::names::{TOPOLOGY_NODE, context, parameters};

/// Makes and removes data volumes.
#[derive(Debug, Clone)]
pub struct ControllerService {
    node_name: Arc<str>,
    lvm: Arc<Lvm>,
    served: Served,
    capacity: Capacity,
    in_progress: Arc<InProgress>,
    wiper: Wiper,
}

impl ControllerService {
    /// For the Kubernetes node `node_name`.
    pub fn new(
        node_name: &str,
        lvm: Arc<Lvm>,
        served: Served,
        capacity: Capacity,
        in_progress: Arc<InProgress>,
        wiper: Wiper,
    ) -> Self {
        Self { node_name: node_name.into(), lvm, served, capacity, in_progress, wiper }
    }

    async fn create(&self, request: &csi::CreateVolumeRequest) -> Result<Made, CreateVolumeError> {
        let mut volume = create_volume::parse(request, &self.node_name, &self.lvm.config.device_classes)?;
        if !self.served.includes(&volume.vg) {
            return Err(CreateVolumeError::NotServed { vg: volume.vg, served: self.served.to_string() });
        }
        // An extent's size never changes, so an old report does.
        volume.extent_size = self.capacity.group(&volume.vg).map(|group| group.extent_size);
        volume.metadata_free = self.capacity.metadata_free(&volume.vg);
        let id = VolumeId { vg: volume.vg.clone(), lv: volume.name.clone(), claim_uid: volume.owner.claim_uid.clone() };
        let namespace = volume.owner.namespace.clone();
        let operation = self.in_progress.begin(&id.to_string())?;
        self.not_elsewhere(&id)?;
        let promise = self.capacity.promise(&id.vg, volume.size, volume.layout);
        let turn = self.in_progress.turn(&id.vg).await;
        let lvm = Arc::clone(&self.lvm);
        // The call may be cancelled now; the work goes on to its end, and until
        // then nobody else may touch the volume.
        let (created, operation) = tokio::task::spawn_blocking(move || {
            let _held = turn;
            let made = lvm.create_data(&volume);
            match &made {
                Ok(created) if !created.existed => promise.keep(),
                _ => drop(promise),
            }
            let made = made.map_err(|error| create_volume::failure(error, || lvm.find(&volume.vg, &volume.name)));
            made.map(|created| (created, operation))
        })
        .await
        .map_err(|error| CreateVolumeError::Interrupted(error.to_string()))??;
        if created.wiping {
            // Other volumes of the group are made meanwhile, this one is not touched.
            let doing = if request.volume_content_source.is_some() { COPIED } else { ZEROED };
            self.wiper.finished(&id.vg, &id.lv, doing).await?;
        }
        drop(operation);
        Ok(Made { id, namespace, created })
    }

    /// A claim has one volume, whatever its class says of the group by now. Those
    /// that are active are seen, and a new one is.
    fn not_elsewhere(&self, id: &VolumeId) -> Result<(), CreateVolumeError> {
        let groups = self.capacity.latest();
        let others = groups.iter().flat_map(|groups| groups.iter()).filter(|group| group.name != id.vg);
        match others.into_iter().find(|group| lvm::volume::device(&group.name, &id.lv).exists()) {
            None => Ok(()),
            Some(group) => Err(CreateVolumeError::OtherGroup {
                name: id.lv.clone(),
                found: group.name.clone(),
                asked: id.vg.clone(),
            }),
        }
    }

    async fn expand(&self, request: &csi::ControllerExpandVolumeRequest) -> Result<u64, ExpandVolumeError> {
        let (id, size) = expand_volume::parse(request)?;
        if !self.served.includes(&id.vg) {
            return Err(ExpandVolumeError::NotServed(id.vg));
        }
        let mut operation = self.in_progress.begin(&id.to_string())?;
        loop {
            let turn = self.in_progress.turn(&id.vg).await;
            let (lvm, meant) = (Arc::clone(&self.lvm), id.clone());
            let (extended, held) = tokio::task::spawn_blocking(move || {
                let _held = turn;
                (lvm.extend_any(&meant.vg, &meant.lv, size), operation)
            })
            .await
            .map_err(|error| ExpandVolumeError::Interrupted(error.to_string()))?;
            operation = held;
            match extended {
                // Then its room can be handed on.
                Err(ExtendError::Zeroing { vg, spare, .. }) => self.wiper.finished(&vg, &spare, ZEROED).await?,
                other => return Ok(other?),
            }
        }
    }

    async fn delete(&self, id: &str) -> Result<Deleted, DeleteVolumeError> {
        if id.is_empty() {
            return Err(DeleteVolumeError::MissingId);
        }
        // CSI: a volume that cannot exist is gone already.
        let Some(id) = VolumeId::parse(id) else { return Ok(Deleted::Absent) };
        if !self.served.includes(&id.vg) {
            return Err(DeleteVolumeError::NotServed(id.vg));
        }
        let operation = self.in_progress.begin(&id.to_string())?;
        for unfinished in [&id.lv, &lvm::grow::spare_of(&id.lv)] {
            self.wiper.leave_off(&id.vg, unfinished).await;
        }
        let turn = self.in_progress.turn(&id.vg).await;
        let (lvm, meant) = (Arc::clone(&self.lvm), id.clone());
        let deleted = tokio::task::spawn_blocking(move || {
            let _held = (operation, turn);
            lvm.delete_if(&meant.vg, &meant.lv, |found| match &found.owner {
                Owner::Data(owner) => owner.claim_uid == meant.claim_uid,
                Owner::Log { .. } => false,
            })
        })
        .await
        .map_err(|error| DeleteVolumeError::Interrupted(error.to_string()))?;
        match deleted {
            Err(DeleteError::Report(_))
                if self.capacity.latest().is_some() && self.capacity.group(&id.vg).is_none() =>
            {
                Err(DeleteVolumeError::NoVolumeGroup { vg: id.vg, lv: id.lv })
            }
            other => {
                if matches!(other, Ok(Deleted::Trashed)) {
                    self.wiper.trash_changed();
                }
                Ok(other?)
            }
        }
    }

    async fn snapshot(&self, request: &csi::CreateSnapshotRequest) -> Result<Snapshot, CreateSnapshotError> {
        let snapshot = snapshots::parse(request)?;
        if !self.served.includes(&snapshot.vg) {
            return Err(CreateSnapshotError::NotServed(snapshot.vg));
        }
        let operation = self.in_progress.begin(&format!("{}/{}", snapshot.vg, snapshot.name))?;
        let turn = self.in_progress.turn(&snapshot.vg).await;
        let lvm = Arc::clone(&self.lvm);
        let made = tokio::task::spawn_blocking(move || {
            let _held = (operation, turn);
            lvm.create_snapshot(&snapshot)
        });
        Ok(made.await.map_err(|error| CreateSnapshotError::Interrupted(error.to_string()))??)
    }

    /// Whether it was there.
    async fn delete_snapshot(&self, id: &str) -> Result<bool, RemoveSnapshotError> {
        if id.is_empty() {
            return Err(RemoveSnapshotError::MissingId);
        }
        // CSI: a snapshot that cannot exist is gone already.
        let Some(meant) = SnapshotId::parse(id) else { return Ok(false) };
        if *meant.node != *self.node_name {
            return Err(RemoveSnapshotError::OtherNode { id: id.to_owned(), node: self.node_name.to_string() });
        }
        if !self.served.includes(&meant.vg) {
            return Err(RemoveSnapshotError::NotServed(meant.vg));
        }
        let operation = self.in_progress.begin(&format!("{}/{}", meant.vg, meant.lv))?;
        let turn = self.in_progress.turn(&meant.vg).await;
        let lvm = Arc::clone(&self.lvm);
        let removed = tokio::task::spawn_blocking(move || {
            let _held = (operation, turn);
            lvm.delete_snapshot(&meant.vg, &meant.lv)
        });
        Ok(removed.await.map_err(|error| RemoveSnapshotError::Interrupted(error.to_string()))??)
    }

    /// What volumes as the parameters describe them can have together in the group that these
    /// name, and the largest of them at most, from the latest report.
    fn free(&self, request: &csi::GetCapacityRequest) -> Result<(u64, u64), Status> {
        let elsewhere = request
            .accessible_topology
            .as_ref()
            .and_then(|topology| topology.segments.get(TOPOLOGY_NODE))
            .is_some_and(|node| **node != *self.node_name);
        if elsewhere {
            return Ok((0, 0));
        }
        let layout = Layout::parse(|key| request.parameters.get(key).map(String::as_str));
        let Some(layout) = layout.ok().filter(|layout| layout.missing_module().is_none()) else {
            return Ok((0, 0));
        };
        let fs = request.parameters.get(parameters::FS_TYPE).map(String::as_str);
        let usable =
            request.volume_capabilities.is_empty() && fs.is_none_or(|fs| fs.parse::<lvm::filesystem::FsType>().is_ok());
        if !usable && capability::check(&request.volume_capabilities, fs).is_err() {
            return Ok((0, 0));
        }
        let groups = self.capacity.available().ok_or_else(|| Status::unavailable("LVM has not answered yet"))?;
        let room = |group: &VolumeGroup| {
            if layout == Layout::Thin {
                let room = group.thin_room.unwrap_or(0);
                return (room, room);
            }
            let free = group.free_of_disks();
            (layout.total(&free, group.extent_size), layout.largest(&free, group.extent_size))
        };
        let named = create_volume::group(&request.parameters, &self.lvm.config.device_classes);
        let group = named.ok().and_then(|named| groups.iter().find(|group| group.name == named));
        Ok(group.map_or((0, 0), room))
    }
}

/// A volume that is there now.
struct Made {
    id: VolumeId,
    namespace: Namespace,
    created: Created,
}

/// One line for each call that changes something.
fn log<T, E: Display>(
    call: &str,
    volume: &str,
    started: Instant,
    result: &Result<T, E>,
    detail: impl Fn(&T) -> String,
) {
    let ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    match result {
        Ok(done) => info!(call, volume, ms, result = detail(done)),
        Err(error) => warn!(call, volume, ms, %error),
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn unserved(call: &str) -> Status {
    Status::unimplemented(format!("{call} is not served"))
}

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn create_volume(
        &self,
        request: Request<csi::CreateVolumeRequest>,
    ) -> Result<Response<csi::CreateVolumeResponse>, Status> {
        let started = Instant::now();
        let meant_here = addressee::check_metadata(&self.node_name, request.metadata());
        let request = request.into_inner();
        let result = match meant_here {
            Ok(()) => self.create(&request).await,
            Err(misdirected) => Err(misdirected.into()),
        };
        log("CreateVolume", &request.name, started, &result, |Made { id, created, .. }| {
            let how = if created.existed { "existed" } else { "made" };
            format!("{how} {id} with {} B", created.size)
        });
        let Made { id, namespace, created } = result?;
        let content_source = request.volume_content_source;
        let namespace = namespace.to_string();
        Ok(Response::new(csi::CreateVolumeResponse {
            volume: Some(Volume {
                capacity_bytes: signed(created.size),
                volume_id: id.to_string(),
                volume_context: HashMap::from([
                    (context::CLAIM_NAMESPACE.to_owned(), namespace),
                    (context::CLAIM_UID.to_owned(), id.claim_uid.to_string()),
                ]),
                accessible_topology: vec![topology(&self.node_name)],
                content_source,
            }),
        }))
    }

    async fn delete_volume(
        &self,
        request: Request<csi::DeleteVolumeRequest>,
    ) -> Result<Response<csi::DeleteVolumeResponse>, Status> {
        let started = Instant::now();
        let meant_here = addressee::check_metadata(&self.node_name, request.metadata());
        let id = request.into_inner().volume_id;
        let result = match meant_here {
            Ok(()) => self.delete(&id).await,
            Err(misdirected) => Err(misdirected.into()),
        };
        log("DeleteVolume", &id, started, &result, |deleted| {
            match deleted {
                Deleted::Removed => "removed",
                Deleted::Trashed => "in the trash",
                Deleted::Absent => "was not there",
            }
            .to_owned()
        });
        result?;
        Ok(Response::new(csi::DeleteVolumeResponse {}))
    }

    async fn get_capacity(
        &self,
        request: Request<csi::GetCapacityRequest>,
    ) -> Result<Response<csi::GetCapacityResponse>, Status> {
        let (total, largest) = self.free(&request.into_inner())?;
        Ok(Response::new(csi::GetCapacityResponse {
            available_capacity: signed(total),
            maximum_volume_size: Some(signed(largest)),
            minimum_volume_size: None,
        }))
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<csi::ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<csi::ValidateVolumeCapabilitiesResponse>, Status> {
        let request = request.into_inner();
        if request.volume_id.is_empty() {
            return Err(Status::invalid_argument("volume_id is missing"));
        }
        if request.volume_capabilities.is_empty() {
            return Err(Status::invalid_argument("volume_capabilities is missing"));
        }
        let not_found = || Status::not_found(format!("no volume {:?} on node {}", request.volume_id, self.node_name));
        let id = VolumeId::parse(&request.volume_id).ok_or_else(not_found)?;
        let known: Option<VgName> = self.capacity.group(&id.vg).map(|group| group.name);
        let vg = known.ok_or_else(not_found)?;
        let lvm = Arc::clone(&self.lvm);
        let found = tokio::task::spawn_blocking(move || lvm.find(&vg, &id.lv))
            .await
            .map_err(|error| Status::unavailable(error.to_string()))?
            // Not known is not the same as not there.
            .map_err(|error| Status::unavailable(error.to_string()))?;
        let found = found.ok_or_else(not_found)?;
        let fs = request.parameters.get(parameters::FS_TYPE).map(String::as_str);
        let response = match capability::check(&request.volume_capabilities, fs) {
            Ok(access) if (access == Access::Block) != found.marks.intent.block => {
                let made_for = if found.marks.intent.block { "a raw block device" } else { "a file system" };
                csi::ValidateVolumeCapabilitiesResponse {
                    confirmed: None,
                    message: format!("the volume was made for {made_for}, and never changes that"),
                }
            }
            Ok(_) => csi::ValidateVolumeCapabilitiesResponse {
                confirmed: Some(Confirmed {
                    volume_context: request.volume_context,
                    volume_capabilities: request.volume_capabilities,
                    parameters: request.parameters,
                    mutable_parameters: request.mutable_parameters,
                }),
                message: String::new(),
            },
            Err(error) => csi::ValidateVolumeCapabilitiesResponse { confirmed: None, message: error.to_string() },
        };
        Ok(Response::new(response))
    }

    async fn controller_get_capabilities(
        &self,
        _request: Request<csi::ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<csi::ControllerGetCapabilitiesResponse>, Status> {
        let capability = |kind: Type| ControllerServiceCapability {
            r#type: Some(controller_service_capability::Type::Rpc(Rpc { r#type: kind.into() })),
        };
        Ok(Response::new(csi::ControllerGetCapabilitiesResponse {
            capabilities: [
                Type::CreateDeleteVolume,
                Type::GetCapacity,
                Type::ExpandVolume,
                Type::SingleNodeMultiWriter,
                Type::CreateDeleteSnapshot,
                Type::ListSnapshots,
                Type::CloneVolume,
            ]
            .map(capability)
            .to_vec(),
        }))
    }

    async fn controller_publish_volume(
        &self,
        _request: Request<csi::ControllerPublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerPublishVolumeResponse>, Status> {
        Err(unserved("ControllerPublishVolume"))
    }

    async fn controller_unpublish_volume(
        &self,
        _request: Request<csi::ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerUnpublishVolumeResponse>, Status> {
        Err(unserved("ControllerUnpublishVolume"))
    }

    async fn list_volumes(
        &self,
        _request: Request<csi::ListVolumesRequest>,
    ) -> Result<Response<csi::ListVolumesResponse>, Status> {
        Err(unserved("ListVolumes"))
    }

    async fn create_snapshot(
        &self,
        request: Request<csi::CreateSnapshotRequest>,
    ) -> Result<Response<csi::CreateSnapshotResponse>, Status> {
        let started = Instant::now();
        let meant_here = addressee::check_metadata(&self.node_name, request.metadata());
        let request = request.into_inner();
        let result = match meant_here {
            Ok(()) => self.snapshot(&request).await,
            Err(misdirected) => Err(misdirected.into()),
        };
        log("CreateSnapshot", &request.source_volume_id, started, &result, |made| {
            format!("{}/{} of {} B", made.vg, made.name, made.size)
        });
        let snapshot = Some(snapshots::to_csi(&self.node_name, &result?));
        Ok(Response::new(csi::CreateSnapshotResponse { snapshot }))
    }

    async fn delete_snapshot(
        &self,
        request: Request<csi::DeleteSnapshotRequest>,
    ) -> Result<Response<csi::DeleteSnapshotResponse>, Status> {
        let started = Instant::now();
        let meant_here = addressee::check_metadata(&self.node_name, request.metadata());
        let id = request.into_inner().snapshot_id;
        let result = match meant_here {
            Ok(()) => self.delete_snapshot(&id).await,
            Err(misdirected) => Err(misdirected.into()),
        };
        log("DeleteSnapshot", &id, started, &result, |removed| {
            if *removed { "removed" } else { "was not there" }.to_owned()
        });
        result?;
        Ok(Response::new(csi::DeleteSnapshotResponse {}))
    }

    async fn list_snapshots(
        &self,
        request: Request<csi::ListSnapshotsRequest>,
    ) -> Result<Response<csi::ListSnapshotsResponse>, Status> {
        // Another node's "there is none" would be taken for a loss.
        addressee::check_metadata(&self.node_name, request.metadata())
            .map_err(|misdirected| Status::unavailable(misdirected.to_string()))?;
        let request = request.into_inner();
        let (lvm, served) = (Arc::clone(&self.lvm), self.served.clone());
        let all = tokio::task::spawn_blocking(move || lvm.snapshots())
            .await
            .map_err(|error| Status::unavailable(error.to_string()))?
            .map_err(|error| Status::unavailable(error.to_string()))?;
        let all = all.into_iter().filter(|one| served.includes(&one.vg)).collect();
        Ok(Response::new(snapshots::page(&self.node_name, all, &request)?))
    }

    async fn get_snapshot(
        &self,
        _request: Request<csi::GetSnapshotRequest>,
    ) -> Result<Response<csi::GetSnapshotResponse>, Status> {
        Err(unserved("GetSnapshot"))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<csi::ControllerExpandVolumeRequest>,
    ) -> Result<Response<csi::ControllerExpandVolumeResponse>, Status> {
        let started = Instant::now();
        let meant_here = addressee::check_metadata(&self.node_name, request.metadata());
        let request = request.into_inner();
        let result = match meant_here {
            Ok(()) => self.expand(&request).await,
            Err(misdirected) => Err(misdirected.into()),
        };
        log("ControllerExpandVolume", &request.volume_id, started, &result, |size| format!("has {size} B"));
        Ok(Response::new(csi::ControllerExpandVolumeResponse {
            capacity_bytes: signed(result?),
            // The file system grows where it is mounted.
            node_expansion_required: true,
        }))
    }

    async fn controller_get_volume(
        &self,
        _request: Request<csi::ControllerGetVolumeRequest>,
    ) -> Result<Response<csi::ControllerGetVolumeResponse>, Status> {
        Err(unserved("ControllerGetVolume"))
    }

    async fn controller_modify_volume(
        &self,
        _request: Request<csi::ControllerModifyVolumeRequest>,
    ) -> Result<Response<csi::ControllerModifyVolumeResponse>, Status> {
        Err(unserved("ControllerModifyVolume"))
    }
}
