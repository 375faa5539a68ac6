//! `lvprov node`: serves the volume groups of one node.

/// What `lvprov node` is told.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Why the node service ended.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The node service is not part of this build.
    #[error("`lvprov node` is not part of this build")]
    Missing,
}

/// Runs the node service until it is told to stop.
///
/// # Errors
/// When it cannot start.
pub fn run(_args: Args) -> Result<(), NodeError> {
    Err(NodeError::Missing)
}
