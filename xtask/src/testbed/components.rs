//! Command lines and configuration of the Kubernetes components.

use std::net::Ipv4Addr;
use std::path::Path;

use serde_json::json;

use super::certificates::{ADMIN, CONTROLLER_MANAGER, Identity, LVPROV, Pki, SCHEDULER};
use super::image::PAUSE;
use super::node::BRIDGE;
use crate::agent::Command;

/// Address of the service `kubernetes`; the API server itself listens there,
/// so that pods need no kube-proxy to reach it.
pub const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
const SERVICES: &str = "10.96.0.0/24";
const ETCD: &str = "http://127.0.0.1:2379";

/// Address of the node with this number, from 1.
pub fn node_address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 97, 0, 10 + number)
}

/// Addresses of that node's pods.
pub fn pod_network(number: u8) -> String {
    format!("10.244.{number}.0/24")
}

/// A component out of the one binary that holds them all.
fn component(kubernetes: &Path, name: &str, flags: Vec<String>) -> Command {
    let words = [kubernetes.display().to_string(), name.to_string()];
    Command::new(words.into_iter().chain(flags))
}

fn flag(name: &str, value: impl AsRef<Path>) -> String {
    format!("--{name}={}", value.as_ref().display())
}

/// etcd; its data are of no use after the sandbox has gone, so nothing is synced.
pub fn etcd(data: &Path) -> Command {
    let mut command = Command::new([
        "etcd".to_string(),
        flag("data-dir", data),
        format!("--listen-client-urls={ETCD}"),
        format!("--advertise-client-urls={ETCD}"),
        "--listen-peer-urls=http://127.0.0.1:2380".into(),
        "--unsafe-no-fsync".into(),
        "--log-level=warn".into(),
    ]);
    if cfg!(target_arch = "aarch64") {
        command.env.insert("ETCD_UNSUPPORTED_ARCH".into(), "arm64".into());
    }
    command
}

/// The API server.
pub fn apiserver(kubernetes: &Path, pki: &Pki) -> Command {
    component(
        kubernetes,
        "kube-apiserver",
        vec![
            format!("--etcd-servers={ETCD}"),
            "--bind-address=0.0.0.0".into(),
            "--secure-port=443".into(),
            format!("--advertise-address={BRIDGE}"),
            "--endpoint-reconciler-type=none".into(),
            format!("--service-cluster-ip-range={SERVICES}"),
            flag("tls-cert-file", pki.file("apiserver.crt")),
            flag("tls-private-key-file", pki.file("apiserver.key")),
            flag("client-ca-file", pki.file("ca.crt")),
            flag("token-auth-file", pki.file("tokens.csv")),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            flag("service-account-key-file", pki.file("service-accounts.pub")),
            flag("service-account-signing-key-file", pki.file("service-accounts.key")),
            "--authorization-mode=Node,RBAC".into(),
            "--enable-admission-plugins=NodeRestriction".into(),
            "--allow-privileged=true".into(),
            flag("kubelet-client-certificate", pki.file("kubelet-client.crt")),
            flag("kubelet-client-key", pki.file("kubelet-client.key")),
            flag("kubelet-certificate-authority", pki.file("ca.crt")),
            "--kubelet-preferred-address-types=InternalIP".into(),
        ],
    )
}

/// Controllers that bind claims, and nothing that would miss the heartbeats of
/// nodes that are not there.
pub const VOLUME_CONTROLLERS: &str = "--controllers=persistentvolume-binder-controller,persistentvolumeclaim-protection-controller,serviceaccount-controller";

/// Flags of an API server that writes down what [`audit_policy`] says.
pub fn audit(policy: &Path, log: &Path) -> [String; 2] {
    [flag("audit-policy-file", policy), flag("audit-log-path", log)]
}

/// What lvprov's controller asks, once it is answered.
pub fn audit_policy() -> String {
    json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived", "ResponseStarted"],
        "rules": [{"level": "Metadata", "users": [LVPROV.1]}, {"level": "None"}],
    })
    .to_string()
}

/// The controller manager.
pub fn controller_manager(kubernetes: &Path, pki: &Pki) -> Command {
    let mut flags = kubeconfigs(pki, CONTROLLER_MANAGER);
    flags.extend([
        "--use-service-account-credentials=true".into(),
        flag("service-account-private-key-file", pki.file("service-accounts.key")),
        flag("root-ca-file", pki.file("ca.crt")),
        "--leader-elect=false".into(),
    ]);
    component(kubernetes, "kube-controller-manager", flags)
}

/// The scheduler.
pub fn scheduler(kubernetes: &Path, pki: &Pki) -> Command {
    let mut flags = kubeconfigs(pki, SCHEDULER);
    flags.push("--leader-elect=false".into());
    component(kubernetes, "kube-scheduler", flags)
}

/// The snapshot-controller, as a cluster's admin.
pub fn snapshot_controller(binary: &Path, pki: &Pki) -> Command {
    Command::new([binary.display().to_string(), flag("kubeconfig", pki.kubeconfig(ADMIN.0))])
}

fn kubeconfigs(pki: &Pki, identity: Identity) -> Vec<String> {
    let file = pki.kubeconfig(identity.0);
    ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"].map(|name| flag(name, &file)).into()
}

/// kubectl.
pub fn kubectl(kubernetes: &Path, arguments: Vec<String>) -> Command {
    component(kubernetes, "kubectl", arguments)
}

/// kubelet, in its guest.
pub fn kubelet(kubernetes: &Path, pki: &Pki, node: &str, address: Ipv4Addr) -> Command {
    component(
        kubernetes,
        "kubelet",
        vec![
            flag("kubeconfig", pki.kubeconfig(node)),
            flag("config", "/etc/kubernetes/kubelet.json"),
            format!("--hostname-override={node}"),
            format!("--node-ip={address}"),
        ],
    )
}

/// Files of a node: path in the guest, content.
pub fn node_files(pki: &Pki, number: u8, crun: bool) -> Vec<(&'static str, String)> {
    let kubelet = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "cgroupDriver": "cgroupfs",
        // user-mode Linux has neither cpusets nor pods of several guarantees to tell apart.
        "cgroupsPerQOS": false,
        "enforceNodeAllocatable": [],
        "failSwapOn": false,
        // Tests kill containers over and over: pauses of minutes would prove nothing.
        "crashLoopBackOff": {"maxContainerRestartPeriod": "2s"},
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": pki.file("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": pki.file(&format!("n{number}.crt")),
        "tlsPrivateKeyFile": pki.file(&format!("n{number}.key")),
        "resolvConf": "",
        // Nobody answers there; without one, each pod gets a warning.
        "clusterDNS": ["10.96.0.10"],
        "evictionHard": {"memory.available": "16Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
    });
    let network = json!({
        "cniVersion": "0.4.0",
        "name": "testbed",
        "plugins": [{
            "type": "ptp",
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": pod_network(number)}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }],
    });
    let runtime = if crun { "crun" } else { "runc" };
    let containerd = format!(
        r#"version = 2
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.native"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = "{runtime}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
"#
    );
    vec![
        ("/etc/kubernetes/kubelet.json", kubelet.to_string()),
        ("/etc/cni/net.d/10-testbed.conflist", network.to_string()),
        ("/etc/containerd/config.toml", containerd),
    ]
}
