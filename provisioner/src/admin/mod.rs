//! What the admin runs: `lvprov gc`, `lvprov volumes`, `lvprov capacity`.

pub mod capacity;
pub mod gc;
pub mod volumes;
