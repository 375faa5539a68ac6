//! `lvprov certificates`.

/// What `lvprov certificates` is told.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Why `lvprov certificates` failed.
#[derive(Debug, thiserror::Error)]
pub enum CertificatesError {
    /// The command is not part of this build.
    #[error("`lvprov certificates` is not part of this build")]
    Missing,
}

/// Runs the command.
///
/// # Errors
/// When it cannot do what it was asked.
pub fn run(_args: &Args) -> Result<(), CertificatesError> {
    Err(CertificatesError::Missing)
}
