//! The NodeAdmin service: what CSI has no call for.

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use lvm::Lvm;
use lvm::adopt::Adopted;
use lvm::names::{LvName, VgName};
use lvprov_proto::lvprov::inventory_item::Item;
use lvprov_proto::lvprov::node_admin_server::NodeAdmin;
use lvprov_proto::lvprov::{
    AdoptRequest, AdoptResponse, CapacityReport, CollectRequest, CollectResponse, DiagnoseRequest, DiagnoseResponse,
    EmptyTrashRequest, EmptyTrashResponse, InventoryItem, InventoryRequest, WatchCapacityRequest,
};
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use super::addressee;
use super::adopt::{self, AdoptCallError};
use super::capacity::Capacity;
use super::collect::{CollectError, Doomed};
use super::diagnosis;
use super::in_progress::InProgress;
use super::inventory::{self, InventoryError, PodsDirectory};
use super::served::Served;
use super::trouble::Failing;
use super::wiper::Wiper;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Shows and collects.
#[derive(Debug, Clone)]
pub struct AdminService {
    node_name: Arc<str>,
    lvm: Arc<Lvm>,
    served: Served,
    pods: PodsDirectory,
    capacity: Capacity,
    failing: Failing,
    in_progress: Arc<InProgress>,
    wiper: Wiper,
}

impl AdminService {
    /// For the Kubernetes node `node_name`; `pods`: where kubelet keeps them.
    #[allow(clippy::too_many_arguments, reason = "they are what the services of a node share")]
    pub fn new(
        node_name: &str,
        lvm: Arc<Lvm>,
        served: Served,
        pods: PodsDirectory,
        capacity: Capacity,
        failing: Failing,
        in_progress: Arc<InProgress>,
        wiper: Wiper,
    ) -> Self {
        Self { node_name: node_name.into(), lvm, served, pods, capacity, failing, in_progress, wiper }
    }

    async fn take_inventory(&self, request: &InventoryRequest) -> Result<Vec<InventoryItem>, InventoryError> {
        addressee::check(&self.node_name, &request.node)?;
        let (lvm, served, pods) = (Arc::clone(&self.lvm), self.served.clone(), self.pods.clone());
        let mut items = tokio::task::spawn_blocking(move || inventory::take(&lvm, &served, &pods))
            .await
            .map_err(|error| InventoryError::Interrupted(error.to_string()))??;
        for item in &mut items {
            if let Some(Item::Trashed(trashed)) = &mut item.item
                && let Some(volume) = &trashed.volume
            {
                let wiped = self.wiper.progress(&volume.volume_group, &volume.logical_volume);
                trashed.wiped_bytes = wiped.unwrap_or(0);
            }
        }
        Ok(items)
    }

    fn empty(&self, request: EmptyTrashRequest) -> Result<bool, CollectError> {
        addressee::check(&self.node_name, &request.node)?;
        let trashed = request.trashed.ok_or(CollectError::NoItem)?;
        let volume = trashed.volume.ok_or(CollectError::NoItem)?;
        let (vg, lv) = (VgName::parse(&volume.volume_group)?, LvName::parse(&volume.logical_volume)?);
        if !self.served.includes(&vg) {
            return Err(CollectError::NotServed(vg));
        }
        Ok(self.wiper.empty_now(&vg, &lv, trashed.trashed_unix))
    }

    fn parse(&self, request: CollectRequest) -> Result<Doomed, CollectError> {
        addressee::check(&self.node_name, &request.node)?;
        Doomed::parse(request, &self.served, &self.pods, &self.lvm.config.log_root)
    }

    async fn take_over(&self, request: AdoptRequest) -> Result<AdoptResponse, AdoptCallError> {
        addressee::check(&self.node_name, &request.node)?;
        let wanted = adopt::parse(&request)?;
        if !self.served.includes(&wanted.vg) {
            return Err(AdoptCallError::NotServed(wanted.vg));
        }
        let operation = self.in_progress.begin(&format!("{}/{}", wanted.vg, wanted.lv))?;
        // Nor may anybody just make it.
        let name = LvName::for_claim(&wanted.owner.claim_uid);
        let made = match name == wanted.lv {
            true => None,
            false => Some(self.in_progress.begin(&format!("{}/{name}", wanted.vg))?),
        };
        let turn = self.in_progress.turn(&wanted.vg).await;
        let (lvm, wiper) = (Arc::clone(&self.lvm), self.wiper.clone());
        tokio::task::spawn_blocking(move || {
            let _held = (operation, made, turn);
            let adopted = lvm.adopt(&wanted);
            wiper.trash_changed();
            let Adopted { size, layout } = adopted?;
            Ok(AdoptResponse { logical_volume: name.to_string(), size_bytes: size, layout: layout.to_string() })
        })
        .await
        .map_err(|error| AdoptCallError::Interrupted(error.to_string()))?
    }

    async fn remove(&self, doomed: Doomed) -> Result<CollectResponse, CollectError> {
        let operation = self.in_progress.begin(doomed.key())?;
        // Clearing a large directory takes long and leaves the group alone.
        let turn = match doomed.is_data_volume() {
            true => Some(self.in_progress.turn(doomed.vg()).await),
            false => None,
        };
        let (lvm, wiper) = (Arc::clone(&self.lvm), self.wiper.clone());
        // Goes on to its end even if the call is cancelled.
        tokio::task::spawn_blocking(move || {
            let _held = (operation, turn);
            let removed = doomed.remove(&lvm);
            if doomed.is_data_volume() {
                wiper.trash_changed();
            }
            removed
        })
        .await
        .map_err(|error| CollectError::Interrupted(error.to_string()))?
    }
}

#[tonic::async_trait]
impl NodeAdmin for AdminService {
    type WatchCapacityStream = Answers<CapacityReport>;
    type InventoryStream = Answers<InventoryItem>;

    async fn watch_capacity(
        &self,
        _request: Request<WatchCapacityRequest>,
    ) -> Result<Response<Self::WatchCapacityStream>, Status> {
        Ok(Response::new(Box::pin(self.capacity.reports(self.failing.clone()).map(Ok))))
    }

    async fn inventory(&self, request: Request<InventoryRequest>) -> Result<Response<Self::InventoryStream>, Status> {
        let items = self.take_inventory(&request.into_inner()).await;
        let items = items.inspect_err(|error| warn!(%error, "no inventory"))?;
        Ok(Response::new(Box::pin(tokio_stream::iter(items.into_iter().map(Ok)))))
    }

    async fn diagnose(&self, request: Request<DiagnoseRequest>) -> Result<Response<DiagnoseResponse>, Status> {
        addressee::check(&self.node_name, &request.into_inner().node)
            .map_err(|misdirected| Status::unavailable(misdirected.to_string()))?;
        let (lvm, scope) = (Arc::clone(&self.lvm), diagnosis::scope(&self.served, &self.pods));
        let findings = tokio::task::spawn_blocking(move || lvm.diagnose(&scope))
            .await
            .map_err(|error| Status::unavailable(format!("the diagnosis broke off: {error}")))?;
        Ok(Response::new(diagnosis::to_wire(&findings)))
    }

    async fn empty_trash(&self, request: Request<EmptyTrashRequest>) -> Result<Response<EmptyTrashResponse>, Status> {
        let request = request.into_inner();
        let item = request.trashed.as_ref().and_then(|trashed| trashed.volume.as_ref());
        let item = item.map_or(String::new(), |volume| format!("{}/{}", volume.volume_group, volume.logical_volume));
        let found = self.empty(request).inspect_err(|error| warn!(item, %error, "the trash is not emptied"))?;
        info!(item, found, "to be removed from the trash");
        Ok(Response::new(EmptyTrashResponse { found }))
    }

    async fn adopt(&self, request: Request<AdoptRequest>) -> Result<Response<AdoptResponse>, Status> {
        let request = request.into_inner();
        let item = format!("{}/{}", request.volume_group, request.logical_volume);
        let claim = format!("{}/{}", request.claim_namespace, request.claim_name);
        let adopted = self.take_over(request).await;
        let adopted =
            adopted.inspect_err(|error| warn!(item, claim, %error, "the volume is not given to the claim"))?;
        info!(item, claim, volume = adopted.logical_volume, "gave the volume to the claim");
        Ok(Response::new(adopted))
    }

    async fn collect(&self, request: Request<CollectRequest>) -> Result<Response<CollectResponse>, Status> {
        let doomed = self.parse(request.into_inner()).inspect_err(|error| warn!(%error, "collect refused"))?;
        let item = doomed.key().to_owned();
        match self.remove(doomed).await {
            Ok(answer) => {
                info!(item, removed = answer.removed, detail = answer.detail, "collect");
                Ok(Response::new(answer))
            }
            Err(error) => {
                warn!(item, %error, "collect failed");
                Err(error.into())
            }
        }
    }
}
