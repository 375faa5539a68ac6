//! Nodes and clusters to test on.

pub mod guest;
mod init;
pub mod node;
mod output;

pub use node::{Node, NodeOptions};
pub use output::Output;
