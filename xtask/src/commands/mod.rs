//! One module a command.

pub mod bench;
pub mod cluster;
pub mod demo;
pub mod fuzz;
pub mod image;
pub mod node;
pub mod test;
