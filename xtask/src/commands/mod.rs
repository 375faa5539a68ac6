//! One module a command.

pub mod cluster;
pub mod node;
pub mod test;
