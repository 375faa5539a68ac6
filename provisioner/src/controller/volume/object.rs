//! What a PersistentVolume of ours looks like.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    CSIPersistentVolumeSource, FlexPersistentVolumeSource, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm,
    ObjectReference, PersistentVolume, PersistentVolumeClaim, PersistentVolumeSpec, VolumeNodeAffinity,
};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::ResourceExt;
use kube::api::ObjectMeta;
use lvm::layout::Layout;

use crate::controller::loss;
use crate::controller::names::{LAYOUT, ON_NODE_LOSS, PROVISIONED_BY, PV_FINALIZER, volume_of};
use crate::controller::quantity::storage;
use crate::controller::validate::{Request, Source};
use crate::names::{DRIVER, FLEX_DRIVER, TOPOLOGY_NODE, context};

/// Keys of `flexVolume.options`, read by the driver.
mod options {
    pub const TYPE: &str = "type";
    pub const VOLUME_GROUP: &str = "volumeGroup";
    pub const LOGICAL_VOLUME: &str = "logicalVolume";
    pub const CLAIM_UID: &str = "claimUID";
    pub const ONE_POD: &str = "onePod";
    pub const MOUNT_OPTIONS: &str = "mountOptions";
    pub const MKFS_OPTIONS: &str = "mkfsOptions";
}

/// A logical volume that a node has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// Value of the node's topology label.
    pub topology: String,
    /// Its volume group.
    pub volume_group: String,
    /// Its name.
    pub logical_volume: String,
    /// What it really has.
    pub bytes: u64,
    /// What the node wants to be told when the volume is mounted.
    pub context: BTreeMap<String, String>,
}

/// The PV of a claim.
pub fn build(claim: &PersistentVolumeClaim, class: &StorageClass, request: &Request, made: &Made) -> PersistentVolume {
    let claim_uid = claim.uid().unwrap_or_default();
    let reclaim_policy = class.reclaim_policy.clone().unwrap_or_else(|| "Delete".to_owned());
    let (flex_volume, csi, mount_options) = match request.source {
        // kubelet refuses to mount a flexVolume PV that has mountOptions of its
        // own: they travel in the driver's options.
        Source::Flexvolume => (Some(flex_source(&claim_uid, request, made)), None, None),
        Source::Csi => {
            let flags = Some(request.mount_flags()).filter(|flags| !flags.is_empty() && !request.block);
            (None, Some(csi_source(request, made)), flags)
        }
    };
    let here = NodeSelectorRequirement {
        key: TOPOLOGY_NODE.to_owned(),
        operator: "In".to_owned(),
        values: Some(vec![made.topology.clone()]),
    };
    PersistentVolume {
        metadata: ObjectMeta {
            name: Some(volume_of(&claim_uid)),
            annotations: Some(annotations(request, class)),
            finalizers: (reclaim_policy == "Delete").then(|| vec![PV_FINALIZER.to_owned()]),
            ..ObjectMeta::default()
        },
        spec: Some(PersistentVolumeSpec {
            access_modes: Some(request.access_modes.clone()),
            capacity: Some(storage(made.bytes)),
            claim_ref: Some(ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("PersistentVolumeClaim".to_owned()),
                namespace: claim.namespace(),
                name: Some(claim.name_any()),
                // Without it the volume would only be reserved by name, and
                // given to another claim that comes to have the name.
                uid: Some(claim_uid),
                resource_version: claim.resource_version(),
                ..ObjectReference::default()
            }),
            csi,
            flex_volume,
            mount_options,
            node_affinity: Some(VolumeNodeAffinity {
                required: Some(NodeSelector {
                    node_selector_terms: vec![NodeSelectorTerm {
                        match_expressions: Some(vec![here]),
                        match_fields: None,
                    }],
                }),
            }),
            persistent_volume_reclaim_policy: Some(reclaim_policy),
            storage_class_name: Some(class.name_any()),
            volume_mode: Some(if request.block { "Block" } else { "Filesystem" }.to_owned()),
            ..PersistentVolumeSpec::default()
        }),
        status: None,
    }
}

fn annotations(request: &Request, class: &StorageClass) -> BTreeMap<String, String> {
    let mut all = BTreeMap::from([(PROVISIONED_BY.to_owned(), DRIVER.to_owned())]);
    if !request.layout.is_linear() {
        all.insert(LAYOUT.to_owned(), request.layout.to_string());
    }
    let on_loss = class.parameters.as_ref().and_then(|parameters| parameters.get(crate::names::ON_NODE_LOSS));
    if let Some(on_loss) = on_loss.filter(|on_loss| *on_loss == loss::policy::RECREATE) {
        all.insert(ON_NODE_LOSS.to_owned(), on_loss.clone());
    }
    all
}

/// How the volume of a PV of ours lies on the disks.
pub fn layout_of(volume: &PersistentVolume) -> Layout {
    volume.annotations().get(LAYOUT).and_then(|layout| layout.parse().ok()).unwrap_or_default()
}

fn flex_source(claim_uid: &str, request: &Request, made: &Made) -> FlexPersistentVolumeSource {
    let mut flex_options = BTreeMap::from([
        (options::TYPE.to_owned(), "data".to_owned()),
        (options::VOLUME_GROUP.to_owned(), made.volume_group.clone()),
        (options::LOGICAL_VOLUME.to_owned(), made.logical_volume.clone()),
        (options::CLAIM_UID.to_owned(), claim_uid.to_owned()),
    ]);
    // kubelet does not look at a FlexVolume's access modes: the driver does.
    if request.access_modes.iter().any(|mode| mode == "ReadWriteOncePod") {
        flex_options.insert(options::ONE_POD.to_owned(), "true".to_owned());
    }
    if !request.mount_options.is_empty() {
        flex_options.insert(options::MOUNT_OPTIONS.to_owned(), request.mount_options.clone());
    }
    if !request.mkfs_options.is_empty() {
        flex_options.insert(options::MKFS_OPTIONS.to_owned(), request.mkfs_options.clone());
    }
    FlexPersistentVolumeSource {
        driver: FLEX_DRIVER.to_owned(),
        fs_type: Some(request.fs_type.as_str().to_owned()),
        options: Some(flex_options),
        ..FlexPersistentVolumeSource::default()
    }
}

fn csi_source(request: &Request, made: &Made) -> CSIPersistentVolumeSource {
    let mut attributes = made.context.clone();
    if !request.mkfs_options.is_empty() && !request.block {
        attributes.insert(context::MKFS_OPTIONS.to_owned(), request.mkfs_options.clone());
    }
    CSIPersistentVolumeSource {
        driver: DRIVER.to_owned(),
        volume_handle: handle(&made.volume_group, &made.logical_volume),
        fs_type: (!request.block).then(|| request.fs_type.as_str().to_owned()),
        volume_attributes: Some(attributes),
        ..CSIPersistentVolumeSource::default()
    }
}

/// The id that CSI calls a volume by.
fn handle(volume_group: &str, logical_volume: &str) -> String {
    format!("{volume_group}/{logical_volume}")
}

/// Volume group and logical volume of a PV, whoever made it; None where it is
/// not for us to mount.
pub fn logical_volume_of(spec: &PersistentVolumeSpec) -> Option<(String, String)> {
    match (&spec.flex_volume, &spec.csi) {
        (Some(flex), _) if flex.driver == FLEX_DRIVER => {
            let option = |key| flex.options.as_ref()?.get(key).cloned();
            Some((option(options::VOLUME_GROUP)?, option(options::LOGICAL_VOLUME)?))
        }
        (_, Some(csi)) if csi.driver == DRIVER => {
            let (group, volume) = csi.volume_handle.split_once('/')?;
            Some((group.to_owned(), volume.to_owned()))
        }
        _ => None,
    }
}

/// Where the logical volume of a PV is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Place {
    /// Value of the node's topology label.
    pub topology: String,
    /// Its volume group.
    pub volume_group: String,
    /// Its name.
    pub logical_volume: String,
}

impl Place {
    /// The handle that CSI calls it by.
    pub fn handle(&self) -> String {
        handle(&self.volume_group, &self.logical_volume)
    }
}

/// Where the volume of a PV is; None where the PV is not one that [`build`]
/// made.
pub fn place_of(volume: &PersistentVolume) -> Option<Place> {
    if volume.annotations().get(PROVISIONED_BY).map(String::as_str) != Some(DRIVER) {
        return None;
    }
    let spec = volume.spec.as_ref()?;
    let (volume_group, logical_volume) = logical_volume_of(spec)?;
    let requirement = spec
        .node_affinity
        .iter()
        .flat_map(|affinity| &affinity.required)
        .flat_map(|selector| &selector.node_selector_terms)
        .flat_map(|term| term.match_expressions.iter().flatten())
        .find(|requirement| requirement.key == TOPOLOGY_NODE)?;
    Some(Place { topology: requirement.values.as_ref()?.first()?.clone(), volume_group, logical_volume })
}

/// Kind of a PV of ours.
pub fn source_of(volume: &PersistentVolume) -> Source {
    match volume.spec.as_ref().and_then(|spec| spec.csi.as_ref()) {
        Some(_) => Source::Csi,
        None => Source::Flexvolume,
    }
}

#[cfg(test)]
/// For tests elsewhere.
pub mod tests {
    use super::*;
    use crate::controller::topology::Topologies;
    use crate::controller::validate::GroupChoice;
    use lvm::filesystem::FsType;
    use lvm::names::VgName;
    use serde_json::{Value, json};

    /// One of ours, with its options.
    pub fn pv(policy: &str, options: &str) -> PersistentVolume {
        of(Source::Flexvolume, policy, options)
    }

    fn of(source: Source, policy: &str, options: &str) -> PersistentVolume {
        built(&request(source, options), policy)
    }

    fn request(source: Source, options: &str) -> Request {
        Request {
            source,
            data: None,
            volume_group: GroupChoice::Group(VgName::parse("vg0").unwrap()),
            layout: Layout::Linear,
            fs_type: FsType::Xfs,
            block: false,
            end: Default::default(),
            mount_options: options.into(),
            mkfs_options: String::new(),
            bytes: (1 << 30) - 5,
            access_modes: vec!["ReadWriteOnce".into()],
            topologies: Topologies::default(),
        }
    }

    fn built(request: &Request, policy: &str) -> PersistentVolume {
        let claim: PersistentVolumeClaim = serde_json::from_value(json!({
            "metadata": {"name": "data-db-0", "namespace": "shop", "uid": "u1", "resourceVersion": "7"},
        }))
        .unwrap();
        let class: StorageClass = serde_json::from_value(json!({
            "metadata": {"name": "fast"},
            "provisioner": DRIVER,
            "reclaimPolicy": policy,
        }))
        .unwrap();
        let made = Made {
            topology: "worker-1".into(),
            volume_group: "vg0".into(),
            logical_volume: "pvc-u1".into(),
            bytes: 1 << 30,
            context: BTreeMap::from([("claimNamespace".into(), "shop".into()), ("claimUID".into(), "u1".into())]),
        };
        build(&claim, &class, request, &made)
    }

    #[test]
    fn a_pv_has_all_that_keeps_the_controller_manager_away() {
        let built = serde_json::to_value(pv("Delete", "")).unwrap();
        assert_eq!(
            built,
            json!({
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {
                    "name": "pvc-u1",
                    "annotations": {"pv.kubernetes.io/provisioned-by": "lvm.lvprov.io"},
                    "finalizers": ["external-provisioner.volume.kubernetes.io/finalizer"],
                },
                "spec": {
                    "accessModes": ["ReadWriteOnce"],
                    "capacity": {"storage": "1Gi"},
                    "claimRef": {
                        "apiVersion": "v1",
                        "kind": "PersistentVolumeClaim",
                        "namespace": "shop",
                        "name": "data-db-0",
                        "uid": "u1",
                        "resourceVersion": "7",
                    },
                    "flexVolume": {
                        "driver": "lvprov.io/lvm",
                        "fsType": "xfs",
                        "options": {
                            "type": "data",
                            "volumeGroup": "vg0",
                            "logicalVolume": "pvc-u1",
                            "claimUID": "u1",
                        },
                    },
                    "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [{
                        "key": "topology.lvprov.io/node",
                        "operator": "In",
                        "values": ["worker-1"],
                    }]}]}},
                    "persistentVolumeReclaimPolicy": "Delete",
                    "storageClassName": "fast",
                    "volumeMode": "Filesystem",
                },
            })
        );
    }

    #[test]
    fn a_kept_pv_has_no_finalizer_and_mount_options_travel_in_the_options() {
        let built = serde_json::to_value(pv("Retain", "noatime,discard")).unwrap();
        assert_eq!(built["metadata"].get("finalizers"), None);
        assert_eq!(built["spec"].get("mountOptions"), None);
        assert_eq!(built["spec"]["flexVolume"]["options"]["mountOptions"], "noatime,discard");
    }

    #[test]
    fn a_pv_says_how_its_volume_lies() {
        for source in [Source::Flexvolume, Source::Csi] {
            assert_eq!(layout_of(&of(source, "Delete", "")), Layout::Linear);
            let layout = Layout::Raid1 { mirrors: 1 };
            let mirrored = built(&Request { layout, ..request(source, "") }, "Delete");
            assert_eq!(mirrored.annotations()[LAYOUT], "raid1:1");
            assert_eq!(layout_of(&mirrored), layout);
        }
    }

    #[test]
    fn the_driver_is_told_of_a_claim_for_one_pod() {
        let one_pod = |source| {
            let built = serde_json::to_value(of(source, "Delete", "")).unwrap();
            built["spec"]["flexVolume"]["options"]["onePod"].clone()
        };
        assert_eq!(one_pod(Source::Flexvolume), Value::Null);
        let request = Request { access_modes: vec!["ReadWriteOncePod".into()], ..request(Source::Flexvolume, "") };
        let built = serde_json::to_value(built(&request, "Delete")).unwrap();
        assert_eq!(built["spec"]["flexVolume"]["options"]["onePod"], "true");
        assert_eq!(built["spec"]["accessModes"], json!(["ReadWriteOncePod"]));
    }

    #[test]
    fn a_csi_pv_differs_in_its_source_and_its_mount_options_only() {
        let built = serde_json::to_value(of(Source::Csi, "Delete", "noatime,discard")).unwrap();
        let mut expected = serde_json::to_value(pv("Delete", "")).unwrap();
        let spec = expected["spec"].as_object_mut().unwrap();
        spec.remove("flexVolume");
        spec.insert("mountOptions".into(), json!(["noatime", "discard"]));
        spec.insert(
            "csi".into(),
            json!({
                "driver": "lvm.lvprov.io",
                "volumeHandle": "vg0/pvc-u1",
                "fsType": "xfs",
                "volumeAttributes": {"claimNamespace": "shop", "claimUID": "u1"},
            }),
        );
        assert_eq!(built, expected);
        let plain = serde_json::to_value(of(Source::Csi, "Delete", "")).unwrap();
        assert_eq!(plain["spec"].get("mountOptions"), None);
    }

    #[test]
    fn a_raw_volume_has_no_file_system() {
        let request = Request { block: true, ..request(Source::Csi, "noatime") };
        let built = serde_json::to_value(built(&request, "Delete")).unwrap();
        assert_eq!(built["spec"]["volumeMode"], "Block");
        assert_eq!(built["spec"]["csi"].get("fsType"), None);
        assert_eq!(built["spec"].get("mountOptions"), None);
        assert_eq!(built["spec"]["csi"]["volumeAttributes"], json!({"claimNamespace": "shop", "claimUID": "u1"}));
    }

    #[test]
    fn the_place_is_read_back_and_only_from_our_own() {
        for (source, driver) in [(Source::Flexvolume, "/spec/flexVolume/driver"), (Source::Csi, "/spec/csi/driver")] {
            let built = of(source, "Delete", "");
            let place = place_of(&built).unwrap();
            assert_eq!(place.handle(), "vg0/pvc-u1");
            assert_eq!(place.topology, "worker-1");
            assert_eq!(source_of(&built), source);
            for path in ["/metadata/annotations/pv.kubernetes.io~1provisioned-by", driver] {
                let mut foreign = serde_json::to_value(&built).unwrap();
                *foreign.pointer_mut(path).unwrap() = Value::from("example.com/other");
                let foreign: PersistentVolume = serde_json::from_value(foreign).unwrap();
                assert_eq!(place_of(&foreign), None, "{path}");
            }
        }
    }
}
