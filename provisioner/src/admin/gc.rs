//! `lvprov gc`.

/// What `lvprov gc` is told.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Why `lvprov gc` failed.
#[derive(Debug, thiserror::Error)]
pub enum GcError {
    /// The command is not part of this build.
    #[error("`lvprov gc` is not part of this build")]
    Missing,
}

/// Runs the command.
///
/// # Errors
/// When it cannot do what it was asked.
pub fn run(_args: Args) -> Result<(), GcError> {
    Err(GcError::Missing)
}
