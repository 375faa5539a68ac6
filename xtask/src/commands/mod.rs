//! One module a command.

pub mod node;
