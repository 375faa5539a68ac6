//! All node services, asked at once.

use std::net::IpAddr;
use std::time::Duration;

use futures::StreamExt;
use futures::stream;
use lvprov_proto::lvprov::inventory_item::Item;
use lvprov_proto::lvprov::node_admin_client::NodeAdminClient;
use lvprov_proto::lvprov::{
    CapacityReport, CollectRequest, CollectResponse, InventoryItem, InventoryRequest, WatchCapacityRequest,
};
use tonic::Status;
use tonic::transport::{Channel, ClientTlsConfig};

use crate::controller::nodes::{connect, explain};
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
    tls: Option<ClientTlsConfig>,
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
    pub fn new(nodes: Vec<FleetNode>, port: u16, tls: Option<ClientTlsConfig>) -> Self {
        Self { nodes, port, tls }
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

    /// Has one node remove one item.
    pub async fn collect(&self, node: &FleetNode, item: Item) -> Result<CollectResponse, String> {
        let channel = self.channel(node)?;
        let mut request = tonic::Request::new(CollectRequest { item: Some(InventoryItem { item: Some(item) }) });
        request.set_timeout(COLLECT_TIMEOUT);
        let collected = NodeAdminClient::new(channel).collect(request).await;
        collected.map(tonic::Response::into_inner).map_err(|status| explain(&status))
    }

    async fn ask<T, F>(&self, limit: Duration, question: impl Fn(NodeAdminClient<Channel>) -> F) -> Vec<Answer<T>>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let question = &question;
        let asked = self.nodes.iter().map(|node| async move {
            let answer = async {
                let channel = self.channel(node)?;
                match tokio::time::timeout(limit, question(NodeAdminClient::new(channel))).await {
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

async fn inventory(mut client: NodeAdminClient<Channel>) -> Result<Vec<Item>, Status> {
    let mut stream = client.inventory(InventoryRequest {}).await?.into_inner();
    let mut items = Vec::new();
    while let Some(item) = stream.message().await? {
        items.extend(item.item);
    }
    Ok(items)
}

async fn capacity(mut client: NodeAdminClient<Channel>) -> Result<CapacityReport, Status> {
    let mut stream = client.watch_capacity(WatchCapacityRequest {}).await?.into_inner();
    let first = stream.message().await?;
    first.ok_or_else(|| Status::unavailable("it sent no report"))
}
