//! LVM, file systems, mounts and quotas: the only code of lvprov that touches
//! them. Synchronous, and ignorant of Kubernetes but for plain names.

pub mod command;
pub mod config;
pub mod data;
pub mod device;
pub mod duration;
pub mod fault;
pub mod filesystem;
mod flock;
pub mod identity;
pub mod layout;
pub mod lock;
pub mod logs;
pub mod mounts;
pub mod names;
pub mod options;
mod placement;
pub mod quota;
mod repair;
pub mod report;
pub mod size;
pub mod thin;
pub mod trouble;
pub mod volume;
mod xattr;

pub use volume::Lvm;
