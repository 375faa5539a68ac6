//! `lvprov controller`: claims in, volumes and PersistentVolumes out.

/// What `lvprov controller` is told.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Why the controller ended.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// The controller is not part of this build.
    #[error("`lvprov controller` is not part of this build")]
    Missing,
}

/// Runs the controller until it is told to stop.
///
/// # Errors
/// When it cannot start, or has to give up.
pub fn run(_args: Args) -> Result<(), ControllerError> {
    Err(ControllerError::Missing)
}
