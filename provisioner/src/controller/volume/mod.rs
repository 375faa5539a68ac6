//! PersistentVolumes: what one of ours looks like, and what becomes of it
//! once its claim has gone.

mod lifecycle;
mod object;

pub use lifecycle::{Need, delete_volume, give_up, need, reconcile};
#[cfg(test)]
pub use object::tests;
pub use object::{Made, Place, build, layout_of, logical_volume_of, place_of, source_of};
