//! `lvprov capacity`.

/// What `lvprov capacity` is told.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Why `lvprov capacity` failed.
#[derive(Debug, thiserror::Error)]
pub enum CapacityError {
    /// The command is not part of this build.
    #[error("`lvprov capacity` is not part of this build")]
    Missing,
}

/// Runs the command.
///
/// # Errors
/// When it cannot do what it was asked.
pub fn run(_args: Args) -> Result<(), CapacityError> {
    Err(CapacityError::Missing)
}
