//! LVM, file systems, mounts and quotas: the only code of lvprov that touches
//! them. Synchronous, and ignorant of Kubernetes but for plain names.

pub mod command;
pub mod config;
pub mod identity;
pub mod lock;
pub mod names;
pub mod report;
pub mod size;
