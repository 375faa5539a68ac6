//! Getting what the test bed needs onto the machine.

pub mod binaries;
pub mod packages;
