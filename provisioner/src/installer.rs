//! `lvprov install-driver`.

/// What `lvprov install-driver` is told.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Why `lvprov install-driver` failed.
#[derive(Debug, thiserror::Error)]
pub enum InstallerError {
    /// The command is not part of this build.
    #[error("`lvprov install-driver` is not part of this build")]
    Missing,
}

/// Runs the command.
///
/// # Errors
/// When it cannot do what it was asked.
pub fn run(_args: &Args) -> Result<(), InstallerError> {
    Err(InstallerError::Missing)
}
