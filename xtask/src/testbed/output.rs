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
                shortened(&self.stdout),
                shortened(&self.stderr)
            );
        }
        Ok(self.stdout.trim_end_matches('\n').to_string())
    }
}

/// Text for an error message: the end of it, where it is long.
pub(crate) fn shortened(text: &str) -> String {
    const LIMIT: usize = 8192;
    let text = text.trim_end();
    let mut from = text.len().saturating_sub(LIMIT);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    if from == 0 { text.to_string() } else { format!("[{from} bytes left out]…{}", &text[from..]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_tells_all() {
        let output = Output { command: "false".into(), stdout: "o\n".into(), stderr: "e\n".into(), status: 1 };
        let error = output.ok().unwrap_err().to_string();
        assert_eq!(error, "`false` ended with status 1\n--- stdout\no\n--- stderr\ne");
    }

    #[test]
    fn long_output_is_cut_between_characters() {
        let cut = shortened(&"ä".repeat(5000));
        assert!(cut.starts_with("[1808 bytes left out]…ä") && cut.len() < 8300, "{cut}");
    }
}
