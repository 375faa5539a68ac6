//! The test bed of lvprov: real nodes with real LVM, and real Kubernetes, on
//! one machine.
//!
//! [`testbed::Node`] is a machine of its own (user-mode Linux) with volume
//! groups; [`testbed::Cluster`] is a control plane with such nodes. Both live
//! in a [`sandbox`]: namespaces that end, with everything in them, when the
//! process that made them ends.
//!
//! Nodes are user-mode Linux everywhere, also where the machine's own kernel
//! has device-mapper: one kind of node, whose power can be cut, and which
//! cannot reach the machine's own volume groups. There are none on loop devices.

pub mod agent;
mod cargo;
pub mod commands;
pub mod paths;
pub mod progress;
pub mod sandbox;
pub mod setup;
pub mod testbed;

/// Bytes, such as those of a digest, as text.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
