//! The NodeAdmin service: what CSI has no call for.

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use lvm::Lvm;
use lvprov_proto::lvprov::node_admin_server::NodeAdmin;
use lvprov_proto::lvprov::{
    CapacityReport, CollectRequest, CollectResponse, DiagnoseRequest, DiagnoseResponse, InventoryItem,
    InventoryRequest, WatchCapacityRequest,
};
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use super::addressee;
use super::capacity::Capacity;
use super::collect::{CollectError, Doomed};
use super::diagnosis;
use super::in_progress::InProgress;
use super::inventory::{self, InventoryError, PodsDirectory};
use super::served::Served;
use super::trouble::Failing;

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
}

impl AdminService {
    /// For the Kubernetes node `node_name`; `pods`: where kubelet keeps them.
    pub fn new(
        node_name: &str,
        lvm: Arc<Lvm>,
        served: Served,
        pods: PodsDirectory,
        capacity: Capacity,
        failing: Failing,
        in_progress: Arc<InProgress>,
    ) -> Self {
        Self { node_name: node_name.into(), lvm, served, pods, capacity, failing, in_progress }
    }

    async fn take_inventory(&self, request: &InventoryRequest) -> Result<Vec<InventoryItem>, InventoryError> {
        addressee::check(&self.node_name, &request.node)?;
        let (lvm, served, pods) = (Arc::clone(&self.lvm), self.served.clone(), self.pods.clone());
        tokio::task::spawn_blocking(move || inventory::take(&lvm, &served, &pods))
            .await
            .map_err(|error| InventoryError::Interrupted(error.to_string()))?
    }

    fn parse(&self, request: CollectRequest) -> Result<Doomed, CollectError> {
        addressee::check(&self.node_name, &request.node)?;
        Doomed::parse(request, &self.served, &self.pods, &self.lvm.config.log_root)
    }

    async fn remove(&self, doomed: Doomed) -> Result<CollectResponse, CollectError> {
        let operation = self.in_progress.begin(doomed.key())?;
        // Clearing a large directory takes long and leaves the group alone.
        let turn = match doomed.is_data_volume() {
            true => Some(self.in_progress.turn(doomed.vg()).await),
            false => None,
        };
        let lvm = Arc::clone(&self.lvm);
        // Goes on to its end even if the call is cancelled.
        tokio::task::spawn_blocking(move || {
            let _held = (operation, turn);
            doomed.remove(&lvm)
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
