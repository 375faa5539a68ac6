//! LVM, file systems, mounts and quotas: the only code of lvprov that touches
//! them. Synchronous, and ignorant of Kubernetes but for plain names.

pub mod adopt;
pub mod block;
pub mod clock;
pub mod command;
pub mod config;
mod copy;
pub mod create_group;
pub mod data;
pub mod device;
pub mod doctor;
pub mod duration;
pub mod fault;
pub mod filesystem;
mod flock;
pub mod grow;
pub mod identity;
pub mod intent;
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
pub mod restore;
mod shell;
pub mod size;
pub mod snapshot;
pub mod thin;
pub mod trash;
pub mod trouble;
mod unfinished;
pub mod volume;
pub mod wipe;
mod xattr;

pub use volume::Lvm;
