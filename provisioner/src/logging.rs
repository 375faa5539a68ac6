//! Structured logs, one JSON object a line.

use std::io;

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

/// How much is logged, and how it looks.
#[derive(Debug, Clone, clap::Args)]
// Named apart from what a program's own arguments are called.
#[group(id = "logging")]
pub struct Args {
    /// error, warn, info, debug or trace; or tracing's filter syntax
    #[arg(long, global = true, default_value = "info", env = "LVPROV_LOG_LEVEL")]
    pub log_level: String,
    /// How log lines look
    #[arg(long, global = true, value_enum, default_value_t = Format::Json)]
    pub log_format: Format,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// One JSON object a line
    Json,
    /// For people
    Text,
}

/// Where log lines go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// For daemons.
    Stdout,
    /// For commands, whose result goes to standard output.
    Stderr,
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// `--log-level` cannot be parsed.
    #[error("--log-level {level:?} is neither a level nor a filter: {reason}")]
    Filter {
        /// As given.
        level: String,
        /// What tracing says.
        reason: String,
    },
    /// Something else in this process has set it up already.
    #[error("logging is set up already")]
    Twice,
}

/// Sets up logging for the whole process.
///
/// # Errors
/// When the filter is malformed, or logging is set up already.
pub fn init(args: &Args, output: Output) -> Result<(), LoggingError> {
    let filter = EnvFilter::try_new(&args.log_level)
        .map_err(|error| LoggingError::Filter { level: args.log_level.clone(), reason: error.to_string() })?;
    let writer = match output {
        Output::Stdout => BoxMakeWriter::new(io::stdout),
        Output::Stderr => BoxMakeWriter::new(io::stderr),
    };
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    match args.log_format {
        Format::Json => lines.json().flatten_event(true).try_init(),
        Format::Text => lines.with_ansi(false).try_init(),
    }
    .map_err(|_| LoggingError::Twice)
}
