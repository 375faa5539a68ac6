//! What a command said.

use anyhow::{Result, bail};

/// Output and exit status of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The command, as a line for a shell.
    pub command: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Exit status; 128 and the signal's number where a signal ended it.
    pub status: i32,
}

impl Output {
    /// Whether the status is 0.
    pub fn success(&self) -> bool {
        self.status == 0
    }

    /// Standard output without the last line's end, where the status is 0.
    ///
    /// # Errors
    /// Any other status; the message carries all the command said.
    pub fn ok(self) -> Result<String> {
        if !self.success() {
            bail!(
                "`{}` ended with status {}\n--- stdout\n{}\n--- stderr\n{}",
                self.command,
                self.status,
                self.stdout.trim_end(),
                self.stderr.trim_end()
            );
        }
        Ok(self.stdout.trim_end_matches('\n').to_string())
    }
}
