//! The node services: one connection to each, over which it reports.
//!
//! Reports bring what each volume group has free, and as long as they come the
//! node is known to live. So nobody ever has to ask. Calls go over connections
//! of their own, which are kept to the nodes that were called last.

mod connection;
mod follow;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use lvm::layout::Layout;
use lvprov_proto::lvprov::{CapacityReport, FailingUnmount};
use tokio::sync::{Semaphore, broadcast};
use tokio::task::AbortHandle;
use tonic::transport::Channel;
use tracing::{info, warn};

use super::validate::GroupChoice;
use crate::names::TOPOLOGY_NODE;
use crate::tls::TlsDirectory;
use crate::x509::Validity;
use crate::{with_causes, x509};
pub use connection::{call_to, connect, explain, sent_by_node};
use follow::{LONGEST_CONNECTION, follow};

/// Connections for calls are kept to so many nodes.
const MOST_CALLED: usize = 128;
/// So many nodes are connected to at the same time: after a start there are
/// thousands to connect to.
const MOST_CONNECTING: usize = 64;

/// A volume group of a node. Sizes in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Its name in LVM.
    pub name: String,
    /// All of it.
    pub size: u64,
    /// What is not given to any logical volume.
    pub free: u64,
    /// Logical volumes are whole numbers of these.
    pub extent: u64,
    /// What is in the trash.
    pub trash: u64,
    /// What each of its disks has free.
    pub disks: Vec<u64>,
    /// The layouts that its volumes can have.
    pub layouts: Vec<String>,
    /// What may be promised of its thin pool.
    pub thin_room: u64,
    /// What the node calls it.
    pub device_classes: Vec<String>,
    /// Whether it is the node's default.
    pub is_default: bool,
}

impl Group {
    /// A group of one disk, on a node that can do anything, for tests.
    #[cfg(test)]
    pub fn of(name: &str, size: u64, free: u64, extent: u64) -> Self {
        let layouts = ["linear", "striped", "raid1", "raid10"].map(str::to_owned).to_vec();
        let device_classes = Vec::new();
        let (disks, name) = (vec![free], name.into());
        let (thin_room, trash, is_default) = (0, 0, false);
        Self { name, size, free, extent, trash, disks, layouts, thin_room, device_classes, is_default }
    }

    /// Whether volumes can lie there so.
    pub fn serves(&self, layout: Layout) -> bool {
        layout.is_linear() || self.layouts.iter().any(|kind| kind == layout.kind())
    }

    /// What volumes of this layout can have together at most.
    pub fn total(&self, layout: Layout) -> u64 {
        match layout {
            Layout::Linear => self.free,
            Layout::Thin => self.thin_room,
            _ => layout.total(&self.disks, self.extent),
        }
    }

    /// The largest volume of this layout for which there is room.
    pub fn largest(&self, layout: Layout) -> u64 {
        let whole = |bytes: u64| bytes - bytes % self.extent.max(1);
        match layout {
            Layout::Linear => whole(self.free),
            Layout::Thin => whole(self.thin_room),
            _ => layout.largest(&self.disks, self.extent),
        }
    }

    /// By how much a volume of this layout can grow at most. Its own disks may
    /// have less, which its node knows.
    pub fn largest_growth(&self, layout: Layout) -> u64 {
        match layout {
            Layout::Linear => self.free,
            Layout::Thin => self.thin_room,
            _ => layout.largest_growth(&self.disks, self.extent),
        }
    }
}

/// How a node service is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Nothing is known yet.
    Connecting,
    /// Its stream is open, and this is its newest report.
    Up(Vec<Group>),
    /// Its stream is broken, or could not be opened.
    Down {
        /// Since when.
        since: Instant,
        /// For people.
        why: String,
    },
}

/// One node, as it is at the moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// Name of the Node object.
    pub name: String,
    /// Value of its topology label.
    pub topology: String,
    /// All its labels: a class may allow some nodes only.
    pub labels: Arc<BTreeMap<String, String>>,
    /// The scheduler is to put nothing new there.
    pub cordoned: bool,
    /// How its service is doing.
    pub state: State,
}

impl View {
    /// A node without anything special, for tests.
    #[cfg(test)]
    pub fn of(name: &str, state: State) -> Self {
        Self { name: name.into(), topology: name.into(), labels: Arc::default(), cordoned: false, state }
    }

    /// The volume group that a class means there. None also where the node is
    /// not up.
    pub fn chosen(&self, choice: &GroupChoice) -> Option<&Group> {
        let State::Up(groups) = &self.state else { return None };
        groups.iter().find(|group| match choice {
            GroupChoice::Group(name) => group.name == name.as_str(),
            GroupChoice::Class(Some(class)) => group.device_classes.iter().any(|one| one == class.as_str()),
            GroupChoice::Class(None) => group.is_default,
        })
    }

    /// Its volume group of that name. None also where the node is not up.
    pub fn group(&self, name: &str) -> Option<&Group> {
        match &self.state {
            State::Up(groups) => groups.iter().find(|group| group.name == name),
            _ => None,
        }
    }
}

/// What has become of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// Its stream is open again; its first report is here.
    Up(String),
    /// A new report.
    Capacity(String),
    /// The Node object has other labels, or was cordoned or uncordoned.
    Changed(String),
    /// Its stream is broken.
    Down(String),
    /// The Node object, or its label, has gone.
    Gone(String),
}

/// All unmounts that keep failing on a node.
#[derive(Debug, Clone, PartialEq)]
pub struct Troubles {
    /// The node.
    pub node: String,
    /// None: there are none any more.
    pub failing: Vec<FailingUnmount>,
}

/// A node shows a certificate that should have been replaced by now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ageing {
    /// The node.
    pub node: String,
    /// When the certificate ends, in seconds since 1970.
    pub ends: i64,
}

/// How to call a node.
#[derive(Debug, Clone)]
pub struct Reached {
    /// Shared; connects again by itself.
    pub channel: Channel,
    /// Value of the node's topology label.
    pub topology: String,
}

/// Why a node cannot be called now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreached {
    /// How long it has been so, as far as is known.
    pub since: Duration,
    /// For people.
    pub why: String,
}

/// All nodes that have a node service.
pub struct Nodes {
    tls: Option<Arc<TlsDirectory>>,
    port: u16,
    longest_connection: Duration,
    table: Mutex<BTreeMap<String, Entry>>,
    called: Mutex<HashMap<String, Called>>,
    connecting: Semaphore,
    news: broadcast::Sender<News>,
    troubles: broadcast::Sender<Troubles>,
    ageing: broadcast::Sender<Ageing>,
}

struct Entry {
    // Shared with who looks at all of them, which happens often.
    view: Arc<View>,
    address: IpAddr,
    // None in tests only.
    follower: Option<AbortHandle>,
}

/// A connection for calls, which makes itself anew when it has broken.
struct Called {
    channel: Channel,
    made: Instant,
    used: Instant,
}

impl Drop for Entry {
    fn drop(&mut self) {
        if let Some(follower) = &self.follower {
            follower.abort();
        }
    }
}

impl Nodes {
    /// No node yet. Without `tls` connections are in the clear: for tests.
    pub fn new(tls: Option<Arc<TlsDirectory>>, port: u16) -> Arc<Self> {
        Self::with_connections_of(LONGEST_CONNECTION, tls, port)
    }

    /// As [`Nodes::new`], with connections that are replaced after other than
    /// the usual time.
    pub fn with_connections_of(longest: Duration, tls: Option<Arc<TlsDirectory>>, port: u16) -> Arc<Self> {
        let (news, troubles, ageing) =
            (broadcast::channel(1024).0, broadcast::channel(1024).0, broadcast::channel(1024).0);
        Arc::new(Self {
            tls,
            port,
            longest_connection: longest,
            table: Mutex::default(),
            called: Mutex::default(),
            connecting: Semaphore::new(MOST_CONNECTING),
            news,
            troubles,
            ageing,
        })
    }

    /// From now on, what becomes of nodes.
    pub fn news(&self) -> broadcast::Receiver<News> {
        self.news.subscribe()
    }

    /// From now on, the unmounts that fail on nodes.
    pub fn troubles(&self) -> broadcast::Receiver<Troubles> {
        self.troubles.subscribe()
    }

    /// From now on, nodes whose certificates should have been replaced.
    pub fn ageing(&self) -> broadcast::Receiver<Ageing> {
        self.ageing.subscribe()
    }

    /// All nodes, in order of name.
    pub fn views(&self) -> Vec<Arc<View>> {
        self.table().values().map(|entry| entry.view.clone()).collect()
    }

    /// One node.
    pub fn view(&self, name: &str) -> Option<Arc<View>> {
        self.table().get(name).map(|entry| entry.view.clone())
    }

    /// The node whose topology label has this value.
    pub fn with_topology(&self, topology: &str) -> Option<Arc<View>> {
        // It is the node's own name, mostly.
        self.view(topology)
            .filter(|view| view.topology == topology)
            .or_else(|| self.table().values().map(|entry| &entry.view).find(|view| view.topology == topology).cloned())
    }

    /// How to call the node.
    ///
    /// # Errors
    /// When its service does not answer, or there is none.
    pub fn reach(&self, name: &str) -> Result<Reached, Unreached> {
        self.reached(self.table().get(name))
    }

    /// How to call the node, where its own report has shown that it is the one
    /// that answers at its address: for what cannot be undone.
    ///
    /// # Errors
    /// As [`Nodes::reach`], and while it has not reported.
    pub fn reach_up(&self, name: &str) -> Result<Reached, Unreached> {
        let table = self.table();
        match table.get(name) {
            Some(entry) if entry.view.state == State::Connecting => {
                Err(Unreached { since: Duration::ZERO, why: "it has not reported yet".to_owned() })
            }
            entry => self.reached(entry),
        }
    }

    fn reached(&self, entry: Option<&Entry>) -> Result<Reached, Unreached> {
        let entry = entry.ok_or_else(|| Unreached {
            since: Duration::ZERO,
            why: format!(
                "no lvprov node service has registered there (the Node has no label {TOPOLOGY_NODE} with its own name)"
            ),
        })?;
        match &entry.view.state {
            State::Down { since, why } => Err(Unreached { since: since.elapsed(), why: why.clone() }),
            State::Connecting | State::Up(_) => {
                let channel = self
                    .channel(&entry.view.name, entry.address)
                    .map_err(|error| Unreached { since: Duration::ZERO, why: with_causes(&error) })?;
                Ok(Reached { channel, topology: entry.view.topology.clone() })
            }
        }
    }

    /// A connection for calls. An old one is replaced, so that it has the
    /// certificates that both sides have by then; calls that are under way on it
    /// end there.
    fn channel(&self, name: &str, address: IpAddr) -> Result<Channel, tonic::transport::Error> {
        let mut called = self.called();
        let now = Instant::now();
        if let Some(to) = called.get_mut(name)
            && to.made.elapsed() < self.longest_connection
        {
            to.used = now;
            return Ok(to.channel.clone());
        }
        let channel = connect(address, self.port, self.tls.clone())?;
        called.insert(name.to_owned(), Called { channel: channel.clone(), made: now, used: now });
        if called.len() > MOST_CALLED {
            let oldest = called.iter().min_by_key(|(_, to)| to.used).map(|(name, _)| name.clone());
            oldest.map(|name| called.remove(&name));
        }
        Ok(channel)
    }

    /// Takes in a Node object: a new one is connected to, one with another
    /// address or label is connected to anew, one without label is let go.
    pub fn observe(self: &Arc<Self>, node: &Node) {
        let name = node.name_any();
        let (Some(topology), Some(address)) = (topology_of(node), address_of(node)) else {
            if let Some(other) = node.labels().get(TOPOLOGY_NODE).filter(|value| **value != name) {
                warn!(node = name, "ignored: its label {TOPOLOGY_NODE} says {other}; remove the label");
            }
            self.forget(&name);
            return;
        };
        let cordoned = node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or_default();
        let mut table = self.table();
        if let Some(entry) = table.get_mut(&name)
            && entry.view.topology == topology
            && entry.address == address
        {
            // Mostly a heartbeat: nothing is copied for that.
            if entry.view.cordoned != cordoned || *entry.view.labels != *node.labels() {
                let view = Arc::make_mut(&mut entry.view);
                view.cordoned = cordoned;
                view.labels = Arc::new(node.labels().clone());
                drop(table);
                self.publish(News::Changed(name));
            }
            return;
        }
        info!(node = name, %address, "following the node service");
        self.called().remove(&name);
        let follower = tokio::spawn(follow(self.clone(), name.clone(), address));
        let labels = Arc::new(node.labels().clone());
        let view = View { name: name.clone(), topology, labels, cordoned, state: State::Connecting };
        let view = Arc::new(view);
        table.insert(name, Entry { view, address, follower: Some(follower.abort_handle()) });
    }

    /// Lets go of a node.
    pub fn forget(&self, name: &str) {
        if self.table().remove(name).is_some() {
            self.called().remove(name);
            info!(node = name, "the node has gone");
            self.publish(News::Gone(name.to_owned()));
        }
    }

    /// Lets go of all nodes but these.
    pub fn retain(&self, keep: impl Fn(&str) -> bool) {
        let gone: Vec<String> = self.table().keys().filter(|name| !keep(name)).cloned().collect();
        gone.iter().for_each(|name| self.forget(name));
    }

    /// A node known without a connection being made, for tests.
    #[cfg(test)]
    pub fn place(&self, view: View, channel: Channel) {
        let (made, used) = (Instant::now(), Instant::now());
        self.called().insert(view.name.clone(), Called { channel, made, used });
        self.table().insert(
            view.name.clone(),
            Entry { view: Arc::new(view), address: IpAddr::from([127, 0, 0, 1]), follower: None },
        );
    }

    /// As if this had become of a node, for tests.
    #[cfg(test)]
    pub fn tell(&self, news: News) {
        self.publish(news);
    }

    fn report(&self, name: &str, report: CapacityReport) {
        let groups = report
            .volume_groups
            .into_iter()
            .map(|group| Group {
                name: group.name,
                size: group.size_bytes,
                free: group.free_bytes,
                extent: group.extent_bytes,
                disks: group.disk_free_bytes,
                layouts: group.layouts,
                thin_room: group.thin_room_bytes,
                device_classes: group.device_classes,
                is_default: group.default_device_class,
                trash: group.trash_bytes,
            })
            .collect();
        let new = State::Up(groups);
        let troubles = Troubles { node: name.to_owned(), failing: report.failing_unmounts };
        let news = {
            let mut table = self.table();
            let Some(entry) = table.get_mut(name) else {
                return;
            };
            let was_up = matches!(entry.view.state, State::Up(_));
            let changed = entry.view.state != new;
            if changed {
                Arc::make_mut(&mut entry.view).state = new;
            }
            match (changed, was_up) {
                (false, _) => None,
                (true, true) => Some(News::Capacity(name.to_owned())),
                (true, false) => {
                    info!(node = name, "the node service is up");
                    Some(News::Up(name.to_owned()))
                }
            }
        };
        // An error only says that nobody listens.
        let _ = self.troubles.send(troubles);
        if let Some(news) = news {
            self.publish(news);
        }
    }

    fn down(&self, name: &str, why: String, started: Instant) {
        {
            let mut table = self.table();
            let Some(entry) = table.get_mut(name) else {
                return;
            };
            self.called().remove(name);
            let state = &mut Arc::make_mut(&mut entry.view).state;
            let since = match state {
                State::Down { since, .. } => *since,
                State::Connecting => started,
                State::Up(_) => Instant::now(),
            };
            let news = !matches!(state, State::Down { .. });
            // Also where it has been down for another reason.
            if !matches!(state, State::Down { why: earlier, .. } if *earlier == why) {
                warn!(node = name, why, "the node service does not answer");
            }
            *state = State::Down { since, why };
            if !news {
                return;
            }
        }
        self.publish(News::Down(name.to_owned()));
    }

    /// A connection has just been made.
    fn look_at_certificate(&self, name: &str, shown: Option<Validity>) {
        if let Some(validity) = shown.filter(|validity| validity.ends_soon(x509::now())) {
            warn!(node = name, ends = x509::show_time(validity.not_after), "the node shows an old certificate");
            // An error only says that nobody listens.
            let _ = self.ageing.send(Ageing { node: name.to_owned(), ends: validity.not_after });
        }
    }

    fn publish(&self, news: News) {
        // An error only says that nobody listens.
        let _ = self.news.send(news);
    }

    // Taken after the table, where both are.
    fn called(&self) -> MutexGuard<'_, HashMap<String, Called>> {
        self.called.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The value of the label that kubelet sets when a node service registers: the
/// node's name. A Node with another value is not ours to use: PVs, capacities
/// and calls of two nodes would be taken for each other's.
pub fn topology_of(node: &Node) -> Option<String> {
    node.labels().get(TOPOLOGY_NODE).filter(|value| **value == node.name_any()).cloned()
}

/// Where the node's host network is reached inside the cluster.
pub fn address_of(node: &Node) -> Option<IpAddr> {
    node.status
        .as_ref()?
        .addresses
        .as_ref()?
        .iter()
        .filter(|address| address.type_ == "InternalIP")
        .find_map(|address| address.address.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use tonic::transport::Endpoint;

    fn node(label: Value) -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": "n1", "labels": {"topology.lvprov.io/node": label}},
            "status": {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}]},
        }))
        .unwrap()
    }

    #[tokio::test]
    async fn a_node_that_is_labelled_as_another_is_let_go() {
        let nodes = Nodes::new(None, 1);
        nodes.observe(&node(json!("n2")));
        assert!(nodes.views().is_empty());
        nodes.observe(&node(json!("n1")));
        assert_eq!(nodes.with_topology("n1").map(|view| view.name.clone()), Some("n1".to_owned()));
        nodes.observe(&node(json!("n2")));
        assert!(nodes.views().is_empty());
        let unreached = nodes.reach("n1").unwrap_err();
        assert!(unreached.why.contains("with its own name"), "{}", unreached.why);
    }

    #[tokio::test]
    async fn what_cannot_be_undone_waits_for_a_nodes_own_report() {
        let nodes = Nodes::new(None, 1);
        let channel = Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        let place = |state| {
            nodes.place(View::of("n1", state), channel.clone());
        };
        place(State::Connecting);
        assert!(nodes.reach("n1").is_ok() && nodes.reach_up("n1").is_err());
        place(State::Up(Vec::new()));
        assert!(nodes.reach_up("n1").is_ok());
        place(State::Down { since: Instant::now(), why: "refused".into() });
        assert!(nodes.reach_up("n1").is_err() && nodes.reach_up("n9").is_err());
    }
    #[tokio::test]
    async fn other_labels_and_a_cordon_are_news_and_a_heartbeat_is_none() {
        let nodes = Nodes::new(None, 1);
        let mut object = node(json!("n1"));
        nodes.observe(&object);
        let mut news = nodes.news();
        object.metadata.resource_version = Some("2".into());
        nodes.observe(&object);
        assert!(news.try_recv().is_err());
        object.labels_mut().insert("zone".into(), "a".into());
        nodes.observe(&object);
        assert_eq!(news.try_recv(), Ok(News::Changed("n1".into())));
        object.spec = serde_json::from_value(json!({"unschedulable": true})).unwrap();
        nodes.observe(&object);
        assert_eq!(news.try_recv(), Ok(News::Changed("n1".into())));
        let view = nodes.view("n1").unwrap();
        assert!(view.cordoned && view.labels["zone"] == "a");
    }
}
