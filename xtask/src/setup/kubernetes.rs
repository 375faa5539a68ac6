//! Kubernetes, its snapshot-controller, and its tests of drivers.

use super::go_module::GoModule;

/// All components of Kubernetes in one program.
pub const KUBERNETES: GoModule = GoModule {
    name: "kubernetes",
    sources: &["go.mod", "go.sum", "main.go"],
    package: ".",
    of: "k8s.io/kubernetes",
    title: "Kubernetes",
    linker_flags: |version| {
        let mut parts = version.split('.');
        let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let stamp = "k8s.io/component-base/version";
        format!("-X {stamp}.gitVersion=v{version} -X {stamp}.gitMajor={major} -X {stamp}.gitMinor={minor}")
    },
    files: None,
};

/// What makes VolumeSnapshotContents of VolumeSnapshots, with the definitions of
/// both: a part of clusters that have snapshots, whatever their drivers.
pub const SNAPSHOT_CONTROLLER: GoModule = GoModule {
    name: "snapshot-controller",
    sources: &["go.mod", "go.sum"],
    package: "github.com/kubernetes-csi/external-snapshotter/v8/cmd/snapshot-controller",
    of: "github.com/kubernetes-csi/external-snapshotter/v8",
    title: "the snapshot-controller",
    linker_flags: |version| format!("-X main.version=v{version}"),
    files: Some(("github.com/kubernetes-csi/external-snapshotter/client/v8", "config/crd")),
};

/// The public tests of CSI drivers.
pub const CSI_SANITY: GoModule = GoModule {
    name: "csi-sanity",
    sources: &["go.mod", "go.sum"],
    package: "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity",
    of: "github.com/kubernetes-csi/csi-test/v5",
    title: "csi-sanity",
    linker_flags: |_| String::new(),
    files: None,
};
