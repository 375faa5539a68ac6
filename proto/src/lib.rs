//! The wire contracts of lvprov, as generated from the files in `proto/`.
//!
//! What each message and field means is said there.

/// The Container Storage Interface, `csi.v1`.
#[allow(missing_docs, unused_qualifications, clippy::all)]
pub mod csi {
    tonic::include_proto!("csi.v1");
}

/// What CSI lacks: capacity watch, inventory and collection, `lvprov.v1`.
#[allow(missing_docs, unused_qualifications, clippy::all)]
pub mod lvprov {
    tonic::include_proto!("lvprov.v1");
}

/// How a driver makes itself known to kubelet, `pluginregistration`.
#[allow(missing_docs, unused_qualifications, clippy::all)]
pub mod pluginregistration {
    tonic::include_proto!("pluginregistration");
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use prost::Message;

    use super::csi::volume_capability::{AccessMode, AccessType, MountVolume};
    use super::csi::{CapacityRange, CreateVolumeRequest, Topology, TopologyRequirement, VolumeCapability};
    use super::{csi, lvprov, pluginregistration};

    /// Written down by hand from the field numbers of the CSI spec: tag byte
    /// (number * 8 + wire type), length, content.
    const CREATE_VOLUME: &[u8] = b"\x0a\x01a\
        \x12\x02\x08\x05\
        \x1a\x0b\x12\x05\x0a\x03xfs\x1a\x02\x08\x07\
        \x22\x06\x0a\x01k\x12\x01v\
        \x3a\x0a\x0a\x08\x0a\x06\x0a\x01t\x12\x01n";

    #[test]
    fn requests_are_on_the_wire_what_csi_says() {
        let request = CreateVolumeRequest {
            name: "a".into(),
            capacity_range: Some(CapacityRange { required_bytes: 5, limit_bytes: 0 }),
            volume_capabilities: vec![VolumeCapability {
                access_type: Some(AccessType::Mount(MountVolume { fs_type: "xfs".into(), ..Default::default() })),
                access_mode: Some(AccessMode { mode: 7 }),
            }],
            parameters: HashMap::from([("k".into(), "v".into())]),
            accessibility_requirements: Some(TopologyRequirement {
                requisite: vec![Topology { segments: HashMap::from([("t".into(), "n".into())]) }],
                preferred: Vec::new(),
            }),
            ..Default::default()
        };
        assert_eq!(request.encode_to_vec(), CREATE_VOLUME);
        assert_eq!(CreateVolumeRequest::decode(CREATE_VOLUME).unwrap(), request);
    }

    #[test]
    fn kubelet_gets_its_answers_as_it_reads_them() {
        let info = pluginregistration::PluginInfo {
            r#type: "T".into(),
            name: "N".into(),
            endpoint: "E".into(),
            supported_versions: vec!["1".into()],
        };
        assert_eq!(info.encode_to_vec(), b"\x0a\x01T\x12\x01N\x1a\x01E\x22\x011");
        let node = csi::NodeGetInfoResponse {
            node_id: "n".into(),
            max_volumes_per_node: 0,
            accessible_topology: Some(Topology { segments: HashMap::from([("t".into(), "n".into())]) }),
        };
        assert_eq!(node.encode_to_vec(), b"\x0a\x01n\x1a\x08\x0a\x06\x0a\x01t\x12\x01n");
    }

    #[test]
    fn services_have_the_names_that_are_called() {
        assert_eq!(csi::identity_server::SERVICE_NAME, "csi.v1.Identity");
        assert_eq!(csi::controller_server::SERVICE_NAME, "csi.v1.Controller");
        assert_eq!(csi::node_server::SERVICE_NAME, "csi.v1.Node");
        assert_eq!(pluginregistration::registration_server::SERVICE_NAME, "pluginregistration.Registration");
        assert_eq!(lvprov::node_admin_server::SERVICE_NAME, "lvprov.v1.NodeAdmin");
    }
}
