//! Running things on a machine of the test bed.

use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};

use super::output::{Output, shortened};
use crate::agent::Command;
use crate::agent::client::{Agent, AgentError, Input};

/// How long a command may take, unless told otherwise.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(300);

/// What answers on a machine of the test bed: [`super::Node`] and the nodes of
/// a cluster are used through this.
#[derive(Debug, Clone)]
pub struct Machine {
    name: String,
    agent: Agent,
}

impl Machine {
    pub(crate) fn new(name: impl Into<String>, agent: Agent) -> Self {
        Self { name: name.into(), agent }
    }

    /// Its host name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its agent, for what the methods here do not cover.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Runs a command; whatever its status, that is no error.
    ///
    /// # Errors
    /// When it cannot be started, or does not end within five minutes.
    pub fn exec<I, S>(&self, argv: I) -> Result<Output>
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        self.exec_with(&Command::new(argv), b"")
    }

    /// Runs a command with an environment, a directory, and this on its
    /// standard input.
    ///
    /// # Errors
    /// As [`Machine::exec`].
    pub fn exec_with(&self, command: &Command, input: &[u8]) -> Result<Output> {
        self.exec_within(command, input, COMMAND_LIMIT)
    }

    /// Runs a command that is to succeed; gives its standard output.
    ///
    /// # Errors
    /// As [`Machine::exec`], and for any status but 0.
    pub fn run<I, S>(&self, argv: I) -> Result<String>
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        self.exec(argv)?.ok()
    }

    /// Runs a shell script that stops at its first failing command.
    ///
    /// # Errors
    /// As [`Machine::run`].
    pub fn sh(&self, script: &str) -> Result<String> {
        self.run(["sh", "-ec", script])
    }

    /// Writes a file of mode 0644, whole before it appears; makes its directory.
    ///
    /// # Errors
    /// When the node cannot.
    pub fn write_file(&self, path: impl AsRef<Path>, content: impl Into<Vec<u8>>) -> Result<()> {
        Ok(self.agent.write_file(path.as_ref(), 0o644, content.into())?)
    }

    /// The file's content.
    ///
    /// # Errors
    /// When it is not there.
    pub fn read_file(&self, path: &str) -> Result<String> {
        self.run(["cat", path])
    }

    /// As [`Machine::exec_with`], with another limit; what runs longer is killed.
    ///
    /// # Errors
    /// As [`Machine::exec`].
    pub fn exec_within(&self, command: &Command, input: &[u8], limit: Duration) -> Result<Output> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let input = if input.is_empty() { Input::Empty } else { Input::Bytes(input.to_vec()) };
        let exit = self.agent.exec(command, input, Some(limit), &mut stdout, &mut stderr);
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let (stdout, stderr) = (text(stdout), text(stderr));
        match exit {
            Ok(exit) => Ok(Output { command: command.line(), stdout, stderr, status: exit.shell_code() }),
            Err(error @ AgentError::TimedOut { .. }) => {
                let (stdout, stderr) = (shortened(&stdout), shortened(&stderr));
                bail!("{}: {error}\n--- stdout so far\n{stdout}\n--- stderr so far\n{stderr}", self.name)
            }
            Err(error) => Err(anyhow::Error::new(error).context(format!("on {}", self.name))),
        }
    }

    /// Runs a command with this process's own standard input, output and error;
    /// gives its status.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn inherit(&self, command: &Command) -> Result<i32> {
        let exit = self.agent.exec(command, Input::Inherit, None, &mut io::stdout(), &mut io::stderr())?;
        Ok(exit.shell_code())
    }

    /// Starts a process that goes on by itself, its output appended to `log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, command: &Command, log: impl AsRef<Path>) -> Result<i32> {
        Ok(self.agent.spawn(command, log.as_ref())?)
    }
}
