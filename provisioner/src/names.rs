//! The names that controller, node service, kubelet and manifests agree on.

/// Provisioner of our StorageClasses, and name of the CSI driver.
pub const DRIVER: &str = "lvm.lvprov.io";

/// FlexVolume driver that mounts our PersistentVolumes.
pub const FLEX_DRIVER: &str = "lvprov.io/lvm";

/// Node label that kubelet sets when the node service registers; its value is
/// the node's name. Also the key of our CSI topology segments.
pub const TOPOLOGY_NODE: &str = "topology.lvprov.io/node";

/// TCP port of the node service.
pub const NODE_PORT: u16 = 9808;

/// TCP port of the node service's metrics.
pub const METRICS_PORT: u16 = 9809;

/// Name in the certificate of the controller: nodes obey nobody without it.
pub const CONTROLLER_CLIENT_NAME: &str = "controller.lvprov.io";

/// The name in every node's certificate. Nodes are called by IP address, so
/// this is what the controller checks instead.
pub const NODE_SERVER_NAME: &str = "node.lvprov.io";

/// gRPC metadata of CSI calls to a node: the name of the node that is meant.
/// Another one that has its address by now refuses such a call.
pub const MEANT_NODE: &str = "x-lvprov-node";

/// Namespace of the installation, unless told otherwise.
pub const NAMESPACE: &str = "lvprov-system";

/// Secret with the authorities that sign the certificates of all sides, and
/// their keys. Where there is none, nobody renews certificates.
pub const AUTHORITIES_SECRET: &str = "lvprov-authorities";

/// Secret with the controller's certificate and the nodes' CA.
pub const CONTROLLER_TLS_SECRET: &str = "lvprov-controller-tls";

/// Secret with the nodes' certificate and the controller's CA.
pub const NODE_TLS_SECRET: &str = "lvprov-node-tls";

/// Secret with a certificate to read the nodes' metrics with, and the nodes' CA.
pub const METRICS_TLS_SECRET: &str = "lvprov-metrics-tls";

/// Written by kubelet on the mirror of a static pod: the UID under which it
/// runs on its node, which is another than that in the API.
pub const STATIC_POD_UID: &str = "kubernetes.io/config.hash";

/// Parameter of a StorageClass: what becomes of a claim whose node is lost.
pub const ON_NODE_LOSS: &str = "onNodeLoss";

/// Keys of a volume's context: what CreateVolume answers, and what kubelet adds.
pub mod context {
    /// Namespace of the claim.
    pub const CLAIM_NAMESPACE: &str = "claimNamespace";
    /// UID of the claim.
    pub const CLAIM_UID: &str = "claimUID";
    /// How its file system is made: options of mkfs.
    pub const MKFS_OPTIONS: &str = "mkfsOptions";
    /// What kubelet says of the pod begins so; a user cannot write such keys.
    pub const KUBELETS: &str = "csi.storage.k8s.io/";
    /// `true`: the volume is inline in the pod, and the context is the pod's.
    pub const EPHEMERAL: &str = "csi.storage.k8s.io/ephemeral";
    /// Namespace of the pod.
    pub const POD_NAMESPACE: &str = "csi.storage.k8s.io/pod.namespace";
    /// Name of the pod.
    pub const POD_NAME: &str = "csi.storage.k8s.io/pod.name";
    /// UID of the pod.
    pub const POD_UID: &str = "csi.storage.k8s.io/pod.uid";
}

/// Key of a StorageClass's parameters that only the controller reads: what kind
/// of PersistentVolume its claims get, `flexvolume` (the default) or `csi`.
pub const SOURCE: &str = "source";

/// Key of a StorageClass's parameters that goes into the PersistentVolume, for
/// whoever makes its file system: options of mkfs.
pub const MKFS_OPTIONS: &str = "mkfsOptions";

/// Keys of `CreateVolumeRequest.parameters`. Any other key is refused.
pub mod parameters {
    /// Volume group that the volume is carved from. Where neither it nor a
    /// device class is named, that of the node's default device class.
    pub const VOLUME_GROUP: &str = "volumeGroup";
    /// What the node's configuration calls the volume group.
    pub const DEVICE_CLASS: &str = "deviceClass";
    /// File system: `xfs` (the default), `ext4` or `btrfs`.
    pub const FS_TYPE: &str = "csi.storage.k8s.io/fstype";
    /// Name of the claim. Required.
    pub const PVC_NAME: &str = "csi.storage.k8s.io/pvc/name";
    /// Namespace of the claim. Required.
    pub const PVC_NAMESPACE: &str = "csi.storage.k8s.io/pvc/namespace";
    /// Name of the PersistentVolume to come; the same as the request's name.
    pub const PV_NAME: &str = "csi.storage.k8s.io/pv/name";
    /// UID of the claim. Required.
    pub const CLAIM_UID: &str = "lvprov.io/claim-uid";
    /// UID of the cluster's kube-system namespace. Required.
    pub const CLUSTER: &str = "lvprov.io/cluster";
    /// What is done with the volume's bytes when it is deleted: `remove` (the
    /// default), `discard` or `zero`.
    pub const DELETE_POLICY: &str = "deletePolicy";
    /// How long it is kept in the trash before that: `24h`.
    pub const TRASH_TIME: &str = "trashTime";
    /// Of a VolumeSnapshotClass: room for what is overwritten in a volume that
    /// is not thin while the snapshot is kept, `20%` or `5Gi`.
    pub const SNAPSHOT_SIZE: &str = lvm::snapshot::SNAPSHOT_SIZE;
    /// Name of the VolumeSnapshot.
    pub const SNAPSHOT_NAME: &str = "csi.storage.k8s.io/volumesnapshot/name";
    /// Namespace of the VolumeSnapshot.
    pub const SNAPSHOT_NAMESPACE: &str = "csi.storage.k8s.io/volumesnapshot/namespace";
    /// Name of the VolumeSnapshotContent.
    pub const SNAPSHOT_CONTENT_NAME: &str = "csi.storage.k8s.io/volumesnapshotcontent/name";
    /// Name of the StorageClass.
    pub const CLASS: &str = "lvprov.io/storage-class";
}
