//! The node service as its callers see it: the controller over real TLS on
//! loopback, kubelet over real unix sockets. Nothing here gets as far as LVM.
// What helpers cannot get fails the test, as in the tests themselves.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt;
use lvm::Lvm;
use lvm::config::NodeConfig;
use lvm::names::VgName;
use lvm::report::{Disk, Metadata, VolumeGroup};
use lvm::trouble::Notes;
use lvprov::certificates::{Certificates, Material};
use lvprov::controller::nodes::{Ageing, News, Nodes, connect};
use lvprov::names::{DRIVER, MEANT_NODE, NODE_SERVER_NAME, TOPOLOGY_NODE, parameters};
use lvprov::node::capacity::Reporter;
use lvprov::node::in_progress::InProgress;
use lvprov::node::inventory::PodsDirectory;
use lvprov::node::served::Served;
use lvprov::node::server::{self, LONGEST_CONNECTION, Shared, Tls};
use lvprov::node::sockets::{Paths, Socket};
use lvprov::node::trouble::Failing;
use lvprov::node::wiper::Wiper;
use lvprov::tls::TlsDirectory;
use lvprov_proto::csi::controller_client::ControllerClient;
use lvprov_proto::csi::identity_client::IdentityClient;
use lvprov_proto::csi::node_client::NodeClient;
use lvprov_proto::csi::volume_capability::access_mode::Mode;
use lvprov_proto::csi::volume_capability::{AccessMode, AccessType, MountVolume};
use lvprov_proto::csi::{
    CapacityRange, ControllerGetCapabilitiesRequest, CreateVolumeRequest, DeleteVolumeRequest, GetCapacityRequest,
    GetPluginInfoRequest, NodeGetCapabilitiesRequest, NodeGetInfoRequest, NodePublishVolumeRequest, ProbeRequest,
    Topology, TopologyRequirement, ValidateVolumeCapabilitiesRequest, VolumeCapability,
};
use lvprov_proto::lvprov::inventory_item::Item;
use lvprov_proto::lvprov::node_admin_client::NodeAdminClient;
use lvprov_proto::lvprov::{
    CapacityReport, CollectRequest, InventoryItem, InventoryRequest, Mount, WatchCapacityRequest,
};
use lvprov_proto::pluginregistration::registration_client::RegistrationClient;
use lvprov_proto::pluginregistration::{InfoRequest, RegistrationStatus};
use tempfile::TempDir;
use tokio::net::{TcpListener, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Streaming};
use tower::{Service, ServiceExt};

const NODE: &str = "n1";
const UID: &str = "0f0e7f0a-1111-4222-8333-444455556666";
const GIB: u64 = 1 << 30;
const SOON: Duration = Duration::from_secs(10);

/// A node service with one volume group, whose free space is read from a file.
struct Bench {
    directory: TempDir,
    certificates: Certificates,
    address: SocketAddr,
    metrics: SocketAddr,
    paths: Paths,
    in_progress: Arc<InProgress>,
    stop: CancellationToken,
    reporter: JoinHandle<()>,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
    _sockets: [Socket; 2],
}

impl Bench {
    async fn start() -> Self {
        lvprov::tls::install_crypto();
        Self::start_with(Certificates::generate(Duration::from_secs(24 * 3600)).unwrap()).await
    }

    async fn start_with(certificates: Certificates) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir(at("backup")).unwrap();
        certificates.node.write(&at("node")).unwrap();
        certificates.controller.write(&at("controller")).unwrap();
        let files = TlsDirectory::open(&at("node")).unwrap();
        let tls = Tls { files, longest_connection: LONGEST_CONNECTION };

        let free = at("free");
        fs::write(&free, (3 * GIB).to_string()).unwrap();
        let in_progress = Arc::new(InProgress::default());
        let (reporter, capacity) = Reporter::new(NODE, in_progress.count(), move || {
            let free = fs::read_to_string(&free).unwrap().parse().unwrap();
            let disks = vec![Disk { name: "/dev/ubdb".to_owned(), free }];
            let (name, extent_size) = (VgName::parse("vg0").unwrap(), 4 << 20);
            Ok(vec![VolumeGroup {
                name,
                size: 8 * GIB,
                free,
                extent_size,
                disks,
                partial: false,
                metadata: Metadata::default(),
                thin_room: None,
            }])
        });
        let (locks, backup) = (at("locks"), at("backup"));
        let reporter = tokio::spawn(async move { reporter.run(&locks, &backup).await.unwrap() });
        let lvm = Arc::new(Lvm::new(NodeConfig::default()));
        let shared = Shared {
            node_name: NODE.to_owned(),
            wiper: Wiper::new(Arc::clone(&lvm), Served::default(), capacity.clone()),
            lvm,
            served: Served::new(&[VgName::parse("vg0").unwrap()]),
            pods: PodsDirectory::new(&at("kubelet")),
            capacity,
            failing: Failing::none(),
            notes: Notes::at(&at("unmounts")),
            in_progress: Arc::clone(&in_progress),
        };

        let stop = CancellationToken::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(server::serve_controller(shared.clone(), listener, tls.clone(), stop.clone()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let metrics = listener.local_addr().unwrap();
        tokio::spawn(server::serve_metrics(shared.clone(), listener, tls, stop.clone()));
        let paths = Paths::new(&at("kubelet"));
        let (csi, listener) = Socket::bind(&paths.csi).unwrap();
        tokio::spawn(server::serve_kubelet(shared, listener, stop.clone()));
        let (registration, listener) = Socket::bind(&paths.registration).unwrap();
        let (endpoint, stopped) = (paths.csi.clone(), stop.clone());
        tokio::spawn(async move { server::serve_registration(&endpoint, listener, stopped).await });
        let _sockets = [csi, registration];
        Self { directory, certificates, address, metrics, paths, in_progress, stop, reporter, server, _sockets }
    }

    async fn connect(&self, tls: ClientTlsConfig) -> Result<Channel, tonic::transport::Error> {
        self.connect_to(self.address, tls).await
    }

    async fn connect_to(&self, address: SocketAddr, tls: ClientTlsConfig) -> Result<Channel, tonic::transport::Error> {
        let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap();
        endpoint.tls_config(tls).unwrap().connect_timeout(SOON).timeout(SOON).connect().await
    }

    /// What a reader of metrics with these certificates gets. None: no answer.
    async fn read(&self, path: &'static str, tls: ClientTlsConfig) -> Option<(u16, String)> {
        let mut channel = self.connect_to(self.metrics, tls).await.ok()?;
        channel.ready().await.ok()?;
        let request = http::Request::get(path).body(tonic::body::Body::empty()).unwrap();
        let answer = channel.call(request).await.ok()?;
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await.ok()?.to_bytes();
        Some((status, String::from_utf8(body.to_vec()).unwrap()))
    }

    /// As the controller does.
    async fn controller(&self) -> Channel {
        let files = TlsDirectory::open(&self.directory.path().join("controller")).unwrap();
        connect(self.address.ip(), self.address.port(), Some(files)).unwrap()
    }

    /// The stream of capacity.
    async fn reports(&self) -> Streaming<CapacityReport> {
        let mut admin = NodeAdminClient::new(self.controller().await);
        admin.watch_capacity(WatchCapacityRequest {}).await.unwrap().into_inner()
    }

    fn set_free(&self, bytes: u64) {
        fs::write(self.directory.path().join("free"), bytes.to_string()).unwrap();
        fs::write(self.directory.path().join("locks/vg-vg0.lock"), "changed\n").unwrap();
    }

    /// Whether a caller with these certificates gets an answer.
    async fn answers(&self, tls: ClientTlsConfig) -> bool {
        let Ok(channel) = self.connect(tls).await else { return false };
        IdentityClient::new(channel).get_plugin_info(GetPluginInfoRequest {}).await.is_ok()
    }
}

/// Like a controller, with someone's certificate and trusting `ca`.
fn caller(own: Option<&Material>, ca: &str, name: &str) -> ClientTlsConfig {
    let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)).domain_name(name);
    match own {
        Some(own) => config.identity(Identity::from_pem(&own.certificate, &own.key)),
        None => config,
    }
}

async fn unix(path: &Path) -> Channel {
    unix_as(path, "localhost").await
}

/// With something else than `localhost` as the authority of its calls.
async fn unix_as(path: &Path, authority: &str) -> Channel {
    let path: PathBuf = path.to_owned();
    Endpoint::from_static("http://localhost")
        .origin(format!("http://{authority}").parse().unwrap())
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
        }))
        .await
        .unwrap()
}

async fn next(stream: &mut Streaming<CapacityReport>) -> Option<u64> {
    let report = timeout(SOON, stream.message()).await.unwrap().unwrap()?;
    assert_eq!(report.node, NODE);
    assert_eq!(report.volume_groups.len(), 1);
    let group = &report.volume_groups[0];
    assert_eq!((group.name.as_str(), group.size_bytes, group.extent_bytes), ("vg0", 8 * GIB, 4 << 20));
    Some(group.free_bytes)
}

fn topology(node: &str) -> Topology {
    Topology { segments: HashMap::from([(TOPOLOGY_NODE.to_owned(), node.to_owned())]) }
}

fn capability() -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
        access_type: Some(AccessType::Mount(MountVolume::default())),
    }
}

fn create(vg: &str, node: &str) -> CreateVolumeRequest {
    let given = [
        (parameters::VOLUME_GROUP, vg),
        (parameters::PVC_NAME, "data-web-0"),
        (parameters::PVC_NAMESPACE, "shop"),
        (parameters::CLAIM_UID, UID),
        (parameters::CLUSTER, "11111111-2222-4333-8444-555555555555"),
    ];
    CreateVolumeRequest {
        name: format!("pvc-{UID}"),
        capacity_range: Some(CapacityRange { required_bytes: GIB as i64, limit_bytes: 0 }),
        volume_capabilities: vec![capability()],
        parameters: given.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        accessibility_requirements: Some(TopologyRequirement { requisite: vec![topology(node)], preferred: vec![] }),
        ..Default::default()
    }
}

#[tokio::test]
async fn only_the_controller_gets_an_answer() {
    let bench = Bench::start().await;
    let ours = &bench.certificates;
    let others = Certificates::generate(Duration::from_secs(24 * 3600)).unwrap();
    let node_ca = &ours.controller.ca;
    assert!(bench.answers(caller(Some(&ours.controller), node_ca, NODE_SERVER_NAME)).await);

    assert!(!bench.answers(caller(None, node_ca, NODE_SERVER_NAME)).await, "no certificate");
    assert!(!bench.answers(caller(Some(&others.controller), node_ca, NODE_SERVER_NAME)).await, "another CA");
    assert!(!bench.answers(caller(Some(&ours.node), node_ca, NODE_SERVER_NAME)).await, "a node");
    assert!(!bench.answers(caller(Some(&ours.metrics), node_ca, NODE_SERVER_NAME)).await, "a reader of metrics");
    // The other way round: the controller does not talk to just anybody.
    assert!(!bench.answers(caller(Some(&ours.controller), &others.controller.ca, NODE_SERVER_NAME)).await);
    assert!(!bench.answers(caller(Some(&ours.controller), node_ca, "n1.example.com")).await);
    // Without TLS at all.
    let plain = Endpoint::from_shared(format!("http://{}", bench.address)).unwrap().connect().await;
    if let Ok(channel) = plain {
        IdentityClient::new(channel).get_plugin_info(GetPluginInfoRequest {}).await.unwrap_err();
    }
    // And none of these has done any harm.
    assert!(bench.answers(caller(Some(&ours.controller), node_ca, NODE_SERVER_NAME)).await);
}

/// The controller sees it where it connects: nobody asks for it.
#[tokio::test]
async fn a_node_that_shows_an_old_certificate_is_told_of() {
    lvprov::tls::install_crypto();
    let life = Duration::from_secs(24 * 3600);
    let node: k8s_openapi::api::core::v1::Node = serde_json::from_value(serde_json::json!({
        "metadata": {"name": NODE, "labels": {TOPOLOGY_NODE: NODE}},
        "status": {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}]},
    }))
    .unwrap();
    let now = lvprov::x509::now();
    for (age, told) in [(23 * 3600, true), (3600, false)] {
        let bench = Bench::start_with(Certificates::generate_at(life, now - age).unwrap()).await;
        let files = TlsDirectory::open(&bench.directory.path().join("controller")).unwrap();
        let nodes = Nodes::new(Some(files), bench.address.port());
        let (mut ageing, mut news) = (nodes.ageing(), nodes.news());
        nodes.observe(&node);
        assert_eq!(timeout(SOON, news.recv()).await.unwrap().unwrap(), News::Up(NODE.to_owned()));
        if told {
            let ends = now - age + 24 * 3600;
            let expected = Ageing { node: NODE.to_owned(), ends };
            assert_eq!(timeout(SOON, ageing.recv()).await.unwrap().unwrap(), expected);
        }
        nodes.forget(NODE);
        assert!(ageing.try_recv().is_err());
    }
}

#[tokio::test]
async fn metrics_are_for_their_readers_and_the_controller() {
    let bench = Bench::start().await;
    let ours = &bench.certificates;
    let others = Certificates::generate(Duration::from_secs(24 * 3600)).unwrap();
    let node_ca = &ours.metrics.ca;
    let by = |own: Option<&Material>| caller(own, node_ca, NODE_SERVER_NAME);
    // As soon as the first report is there.
    let _ = next(&mut bench.reports().await).await;
    for reader in [&ours.metrics, &ours.controller] {
        let (status, text) = bench.read("/metrics", by(Some(reader))).await.unwrap();
        assert_eq!(status, 200);
        for sample in [
            "lvprov_node_info{node=\"n1\",version=",
            "lvprov_volume_group_size_bytes{volume_group=\"vg0\"} 8589934592\n",
            "lvprov_volume_group_free_bytes{volume_group=\"vg0\"} 3221225472\n",
            "lvprov_commands_total{kind=\"mutate\"} ",
            "lvprov_failing_unmounts 0\n",
            "lvprov_certificate_expiry_timestamp_seconds{file=\"tls.crt\"} ",
            "lvprov_certificate_expiry_timestamp_seconds{file=\"metrics-ca.crt\"} ",
        ] {
            assert!(text.contains(sample), "no {sample} in\n{text}");
        }
        assert_eq!(bench.read("/", by(Some(reader))).await.unwrap().0, 404);
        // There is nothing to call.
        let channel = bench.connect_to(bench.metrics, by(Some(reader))).await.unwrap();
        IdentityClient::new(channel).get_plugin_info(GetPluginInfoRequest {}).await.unwrap_err();
    }
    assert!(bench.read("/metrics", by(None)).await.is_none(), "no certificate");
    assert!(bench.read("/metrics", by(Some(&ours.node))).await.is_none(), "a node");
    assert!(bench.read("/metrics", by(Some(&others.metrics))).await.is_none(), "another CA");
    assert!(bench.read("/metrics", by(Some(&others.controller))).await.is_none(), "another CA");
    let other_name = caller(Some(&ours.metrics), node_ca, "n1.example.com");
    assert!(bench.read("/metrics", other_name).await.is_none(), "somebody who is no node");
}

#[tokio::test]
async fn silent_caller_does_not_keep_others_out() {
    let bench = Bench::start().await;
    let _silent = tokio::net::TcpStream::connect(bench.address).await.unwrap();
    let mut identity = IdentityClient::new(bench.controller().await);
    let info = identity.get_plugin_info(GetPluginInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.name, DRIVER);
}

#[tokio::test]
async fn capacity_is_told_at_once_and_after_each_change() {
    let bench = Bench::start().await;
    let channel = bench.controller().await;
    let mut admin = NodeAdminClient::new(channel.clone());
    let mut stream = admin.watch_capacity(WatchCapacityRequest {}).await.unwrap().into_inner();
    assert_eq!(next(&mut stream).await, Some(3 * GIB));
    bench.set_free(2 * GIB);
    assert_eq!(next(&mut stream).await, Some(2 * GIB));
    let mut second = admin.watch_capacity(WatchCapacityRequest {}).await.unwrap().into_inner();
    assert_eq!(next(&mut second).await, Some(2 * GIB));

    assert_eq!(
        IdentityClient::new(channel.clone()).probe(ProbeRequest {}).await.unwrap().into_inner().ready,
        Some(true)
    );
    let mut controller = ControllerClient::new(channel);
    let mut ask = async |vg: &str, node: &str| {
        let request = GetCapacityRequest {
            volume_capabilities: vec![capability()],
            parameters: HashMap::from([(parameters::VOLUME_GROUP.to_owned(), vg.to_owned())]),
            accessible_topology: Some(topology(node)),
        };
        let capacity = controller.get_capacity(request).await.unwrap().into_inner();
        assert_eq!(capacity.maximum_volume_size, Some(capacity.available_capacity));
        capacity.available_capacity as u64
    };
    assert_eq!(ask("vg0", NODE).await, 2 * GIB);
    assert_eq!(ask("vg1", NODE).await, 0);
    assert_eq!(ask("vg0", "n2").await, 0);
}

#[tokio::test]
async fn stopping_ends_streams_and_waits_for_nobody() {
    let bench = Bench::start().await;
    let mut stream = bench.reports().await;
    assert_eq!(next(&mut stream).await, Some(3 * GIB));
    bench.reporter.abort();
    bench.stop.cancel();
    assert_eq!(next(&mut stream).await, None);
    timeout(SOON, bench.server).await.unwrap().unwrap().unwrap();
    tokio::net::TcpStream::connect(bench.address).await.unwrap_err();
}

#[tokio::test]
async fn wrong_requests_are_refused_with_their_codes() {
    let bench = Bench::start().await;
    let mut controller = ControllerClient::new(bench.controller().await);

    let status = controller.create_volume(CreateVolumeRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    let status = controller.create_volume(create("vg0", "n2")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(status.message(), "the volume is wanted on n2, this is node n1");
    let status = controller.create_volume(create("vg1", NODE)).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().starts_with("no volume group vg1"), "{status}");
    let mut request = create("vg0", NODE);
    request.parameters.insert("thin".to_owned(), "yes".to_owned());
    let status = controller.create_volume(request).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "parameter \"thin\" is not known"));

    let delete = |id: &str| DeleteVolumeRequest { volume_id: id.to_owned(), ..Default::default() };
    let status = controller.delete_volume(delete("")).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    // No volume of ours can have this id: there is nothing left to do.
    controller.delete_volume(delete("vg0/home")).await.unwrap();
    let status = controller.delete_volume(delete(&format!("vg1/pvc-{UID}"))).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);

    let validate = ValidateVolumeCapabilitiesRequest {
        volume_id: "vg0/home".to_owned(),
        volume_capabilities: vec![capability()],
        ..Default::default()
    };
    let status = controller.validate_volume_capabilities(validate).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let capabilities =
        controller.controller_get_capabilities(ControllerGetCapabilitiesRequest {}).await.unwrap().into_inner();
    assert_eq!(capabilities.capabilities.len(), 7);
}

/// "Not there" from the wrong node would end a volume that the right one has.
#[tokio::test]
async fn calls_for_another_node_are_refused() {
    let bench = Bench::start().await;
    let channel = bench.controller().await;
    let mut controller = ControllerClient::new(channel.clone());
    fn meant<T>(node: &str, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.metadata_mut().insert(MEANT_NODE, node.parse().unwrap());
        request
    }
    let refused = |status: tonic::Status| {
        assert_eq!(status.code(), Code::Unavailable);
        assert!(status.message().starts_with("this is node n1, and the call is meant for"), "{status}");
    };
    // No volume of ours can have this id, so the node that is meant says that it is gone.
    let delete = || DeleteVolumeRequest { volume_id: "vg0/home".to_owned(), ..Default::default() };
    refused(controller.delete_volume(meant("n2", delete())).await.unwrap_err());
    controller.delete_volume(meant(NODE, delete())).await.unwrap();
    controller.delete_volume(delete()).await.unwrap();

    refused(controller.create_volume(meant("n2", create("vg0", NODE))).await.unwrap_err());
    let status = controller.create_volume(meant(NODE, create("vg1", NODE))).await.unwrap_err();
    assert!(status.message().starts_with("no volume group vg1"), "{status}");

    let mut admin = NodeAdminClient::new(channel);
    for node in ["n2", ""] {
        let node = node.to_owned();
        refused(admin.inventory(InventoryRequest { node: node.clone() }).await.unwrap_err());
        refused(admin.collect(CollectRequest { item: None, node, ..Default::default() }).await.unwrap_err());
    }
}

#[tokio::test]
async fn volume_that_is_worked_on_is_not_worked_on_twice() {
    let bench = Bench::start().await;
    let mut controller = ControllerClient::new(bench.controller().await);
    let first = bench.in_progress.begin(&format!("vg0/pvc-{UID}")).unwrap();
    let status = controller.create_volume(create("vg0", NODE)).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted);
    let delete = DeleteVolumeRequest { volume_id: format!("vg0/pvc-{UID}"), ..Default::default() };
    let status = controller.delete_volume(delete).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted);
    drop(first);
}

#[tokio::test]
async fn nothing_outside_our_places_is_collected() {
    let bench = Bench::start().await;
    let mut admin = NodeAdminClient::new(bench.controller().await);
    let item = Mount {
        target: "/".to_owned(),
        volume_group: "vg0".to_owned(),
        logical_volume: "root".to_owned(),
        ..Default::default()
    };
    let request = CollectRequest {
        item: Some(InventoryItem { item: Some(Item::Mount(item)) }),
        node: NODE.to_owned(),
        ..Default::default()
    };
    assert_eq!(admin.collect(request).await.unwrap_err().code(), Code::InvalidArgument);
    let status = admin.collect(CollectRequest { node: NODE.to_owned(), ..Default::default() }).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn kubelet_finds_driver_and_node() {
    let bench = Bench::start().await;
    // kubelet's plugin watcher makes the authority of the path, as grpc-go does.
    let authority = bench.paths.registration.to_str().unwrap().replace('/', "%2F");
    let mut registration = RegistrationClient::new(unix_as(&bench.paths.registration, &authority).await);
    let info = registration.get_info(InfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.r#type.as_str(), info.name.as_str()), ("CSIPlugin", DRIVER));
    assert_eq!(info.supported_versions, ["1.0.0"]);
    for status in [
        RegistrationStatus { plugin_registered: true, error: String::new() },
        RegistrationStatus { plugin_registered: false, error: "no".to_owned() },
    ] {
        registration.notify_registration_status(status).await.unwrap();
    }

    // kubelet opens the socket that it was told.
    let channel = unix(Path::new(&info.endpoint)).await;
    let mut node = NodeClient::new(channel.clone());
    let info = node.node_get_info(NodeGetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.node_id, NODE);
    assert_eq!(info.accessible_topology, Some(topology(NODE)));
    let capabilities = node.node_get_capabilities(NodeGetCapabilitiesRequest {}).await.unwrap().into_inner();
    assert_eq!(capabilities.capabilities.len(), 3);
    let status = node.node_publish_volume(NodePublishVolumeRequest::default()).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "volume_id is missing"));
    // Root may make volumes from here, as the controller does.
    let status = ControllerClient::new(channel).create_volume(create("vg0", "n2")).await.unwrap_err();
    assert_eq!(status.message(), "the volume is wanted on n2, this is node n1");
}
