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
