//! `lvprov volumes`.

/// What `lvprov volumes` is told.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Why `lvprov volumes` failed.
#[derive(Debug, thiserror::Error)]
pub enum VolumesError {
    /// The command is not part of this build.
    #[error("`lvprov volumes` is not part of this build")]
    Missing,
}

/// Runs the command.
///
/// # Errors
/// When it cannot do what it was asked.
pub fn run(_args: Args) -> Result<(), VolumesError> {
    Err(VolumesError::Missing)
}
