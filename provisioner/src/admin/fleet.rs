//! All node services, asked at once.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream;
use lvprov_proto::lvprov::inventory_item::Item;
use lvprov_proto::lvprov::node_admin_client::NodeAdminClient;
use lvprov_proto::lvprov::{
    AdoptRequest, AdoptResponse, CapacityReport, CollectRequest, CollectResponse, DiagnoseRequest, DiagnoseResponse,
    EmptyTrashRequest, InventoryItem, InventoryRequest, TrashedVolume, WatchCapacityRequest,
};
use tonic::Status;
use tonic::transport::Channel;

use crate::controller::nodes::{connect, explain};
use crate::tls::TlsDirectory;
use crate::with_causes;

/// So many nodes are asked at the same time.
const AT_ONCE: usize = 64;
/// For the inventory of one node, all of it.
const INVENTORY_TIMEOUT: Duration = Duration::from_secs(120);
/// For its newest capacity, which it has at hand.
const CAPACITY_TIMEOUT: Duration = Duration::from_secs(15);
/// For removing one item.
const COLLECT_TIMEOUT: Duration = Duration::from_secs(120);

/// A node with a node service. Its topology label is its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FleetNode {
    /// Name of the Node object.
    pub name: String,
    /// None where the Node has no InternalIP.
    pub address: Option<IpAddr>,
}

/// All of them.
pub struct Fleet {
    nodes: Vec<FleetNode>,
    port: u16,
    tls: Option<Arc<TlsDirectory>>,
}

/// What a node answered, or why it did not.
pub struct Answer<T> {
    /// Who was asked.
    pub node: FleetNode,
    /// The error is for people.
    pub result: Result<T, String>,
}

impl Fleet {
    /// In the order in which answers are to come.
    pub fn new(nodes: Vec<FleetNode>, port: u16, tls: Option<Arc<TlsDirectory>>) -> Self {
        Self { nodes, port, tls }
    }

    /// The one node of this name. None: there is none.
    pub fn only(mut self, name: &str) -> Option<Self> {
        self.nodes.retain(|node| node.name == name);
        (!self.nodes.is_empty()).then_some(self)
    }

    /// All nodes.
    pub fn nodes(&self) -> &[FleetNode] {
        &self.nodes
    }

    /// Everything of ours, of each node.
    pub async fn inventories(&self) -> Vec<Answer<Vec<Item>>> {
        self.ask(INVENTORY_TIMEOUT, inventory).await
    }

    /// The volume groups of each node.
    pub async fn capacities(&self) -> Vec<Answer<CapacityReport>> {
        self.ask(CAPACITY_TIMEOUT, capacity).await
    }

    /// What will hurt on each node.
    pub async fn diagnoses(&self) -> Vec<Answer<DiagnoseResponse>> {
        self.ask(INVENTORY_TIMEOUT, async |mut client: NodeAdminClient<Channel>, node| {
            Ok(client.diagnose(DiagnoseRequest { node }).await?.into_inner())
        })
        .await
    }

    /// Has one node remove one item.
    pub async fn collect(&self, node: &FleetNode, item: Item) -> Result<CollectResponse, String> {
        let channel = self.channel(node)?;
        let item = Some(InventoryItem { item: Some(item) });
        let mut request = tonic::Request::new(CollectRequest { item, node: node.name.clone(), only_unused: false });
        request.set_timeout(COLLECT_TIMEOUT);
        let collected = NodeAdminClient::new(channel).collect(request).await;
        collected.map(tonic::Response::into_inner).map_err(|status| explain(&status))
    }

    /// Has one node remove a volume from its trash. Whether it is there.
    pub async fn empty_trash(&self, node: &FleetNode, trashed: TrashedVolume) -> Result<bool, String> {
        let channel = self.channel(node)?;
        let mut request = tonic::Request::new(EmptyTrashRequest { node: node.name.clone(), trashed: Some(trashed) });
        request.set_timeout(CAPACITY_TIMEOUT);
        let emptied = NodeAdminClient::new(channel).empty_trash(request).await;
        emptied.map(|answer| answer.into_inner().found).map_err(|status| explain(&status))
    }

    /// Has one node give a volume to a claim.
    pub async fn adopt(&self, node: &FleetNode, adopted: AdoptRequest) -> Result<AdoptResponse, String> {
        let channel = self.channel(node)?;
        let mut request = tonic::Request::new(AdoptRequest { node: node.name.clone(), ..adopted });
        request.set_timeout(COLLECT_TIMEOUT);
        let adopted = NodeAdminClient::new(channel).adopt(request).await;
        adopted.map(tonic::Response::into_inner).map_err(|status| explain(&status))
    }

    /// `question` is told the node's name: its answer must not be another's.
    async fn ask<T, F>(
        &self,
        limit: Duration,
        question: impl Fn(NodeAdminClient<Channel>, String) -> F,
    ) -> Vec<Answer<T>>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let question = &question;
        let asked = self.nodes.iter().map(|node| async move {
            let answer = async {
                let channel = self.channel(node)?;
                match tokio::time::timeout(limit, question(NodeAdminClient::new(channel), node.name.clone())).await {
                    Ok(answer) => answer.map_err(|status| explain(&status)),
                    Err(_) => Err(format!("it has not answered for {} s", limit.as_secs())),
                }
            };
            Answer { node: node.clone(), result: answer.await }
        });
        stream::iter(asked).buffered(AT_ONCE).collect().await
    }

    fn channel(&self, node: &FleetNode) -> Result<Channel, String> {
        let address = node.address.ok_or("its Node object has no InternalIP")?;
        connect(address, self.port, self.tls.clone()).map_err(|error| with_causes(&error))
    }
}

async fn inventory(mut client: NodeAdminClient<Channel>, node: String) -> Result<Vec<Item>, Status> {
    let mut stream = client.inventory(InventoryRequest { node }).await?.into_inner();
    let mut items = Vec::new();
    while let Some(item) = stream.message().await? {
        items.extend(item.item);
    }
    Ok(items)
}

async fn capacity(mut client: NodeAdminClient<Channel>, node: String) -> Result<CapacityReport, Status> {
    let mut stream = client.watch_capacity(WatchCapacityRequest {}).await?.into_inner();
    let first = stream.message().await?.ok_or_else(|| Status::unavailable("it sent no report"))?;
    if first.node != node {
        return Err(Status::unavailable(format!("at its address answers node {}", first.node)));
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use lvm::Lvm;
    use lvm::config::NodeConfig;
    use lvm::names::VgName;
    use lvprov_proto::lvprov::Mount;
    use lvprov_proto::lvprov::node_admin_server::NodeAdminServer;
    use tokio::net::TcpListener;
    use tonic::transport::Server;
    use tonic::transport::server::TcpIncoming;

    use super::*;
    use crate::node::admin_service::AdminService;
    use crate::node::capacity::Reporter;
    use crate::node::in_progress::InProgress;
    use crate::node::inventory::PodsDirectory;
    use crate::node::served::Served;
    use crate::node::trouble::Failing;
    use crate::node::wiper::Wiper;

    /// The machine of node a has gone, and node b has got its address; both
    /// Node objects are there.
    #[tokio::test]
    async fn what_another_node_answers_is_no_answer() {
        let directory = tempfile::tempdir().unwrap();
        let in_progress = Arc::new(InProgress::default());
        let (reporter, capacity) = Reporter::new("b", in_progress.count(), || Ok(Vec::new()));
        let (locks, backup) = (directory.path().join("locks"), directory.path().join("backup"));
        std::fs::create_dir(&backup).unwrap();
        tokio::spawn(async move { reporter.run(&locks, &backup).await });
        let (lvm, pods) =
            (Arc::new(Lvm::new(NodeConfig::default())), PodsDirectory::new(Path::new("/var/lib/kubelet")));
        // It serves no group: whatever is to be collected is refused, by the node that is meant.
        let served = Served::new(&[VgName::parse("none").unwrap()]);
        let wiper = Wiper::new(Arc::clone(&lvm), served.clone(), capacity.clone());
        let service = AdminService::new("b", lvm, served, pods, capacity, Failing::none(), in_progress, wiper);
        let service = NodeAdminServer::new(service);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(Server::builder().add_service(service).serve_with_incoming(TcpIncoming::from(listener)));

        let node = |name: &str| FleetNode { name: name.into(), address: Some(address.ip()) };
        let fleet = Fleet::new(vec![node("a"), node("b")], address.port(), None);
        let [a, b] = fleet.capacities().await.try_into().map_err(|_| "two").unwrap();
        assert_eq!(a.result.unwrap_err(), "at its address answers node b");
        assert_eq!(b.result.unwrap().node, "b");

        let meant_for_a = "this is node b, and the call is meant for node a";
        let [a, _] = fleet.inventories().await.try_into().map_err(|_| "two").unwrap();
        let error = a.result.unwrap_err();
        assert!(error.starts_with(meant_for_a), "{error}");

        let item = || {
            Item::Mount(Mount {
                target: "/var/lib/kubelet/pods/0f0e7f0a/volumes/lvprov.io~lvm/data".into(),
                volume_group: "vg0".into(),
                logical_volume: "pvc-1".into(),
                ..Mount::default()
            })
        };
        let error = fleet.collect(&node("a"), item()).await.unwrap_err();
        assert!(error.starts_with(meant_for_a), "{error}");
        let error = fleet.collect(&node("b"), item()).await.unwrap_err();
        assert!(error.contains("not among those that this node serves"), "{error}");
    }
}
