//! The asking side.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use thiserror::Error;

use super::{Command, Exit, Kind, Reply, Request, read_frame, write_frame, write_json};

/// Why a request to an agent came to nothing.
#[derive(Debug, Error)]
pub enum AgentError {
    /// No connection to the agent.
    #[error("cannot reach the agent at {address}: {source}")]
    Unreachable {
        /// Where it should be.
        address: SocketAddr,
        /// What connecting said.
        source: io::Error,
    },
    /// The connection broke: the guest went away, most likely.
    #[error("lost the agent at {address} while it ran `{what}`: {source}")]
    Lost {
        /// Where it was.
        address: SocketAddr,
        /// What was asked.
        what: String,
        /// What the connection said.
        source: io::Error,
    },
    /// It took longer than it may.
    #[error("`{what}` did not end within {limit:?}; it was killed")]
    TimedOut {
        /// What was asked.
        what: String,
        /// How long it had.
        limit: Duration,
    },
    /// The agent says no.
    #[error("{0}")]
    Refused(String),
}

/// Where a command's standard input comes from.
pub enum Input {
    /// Empty.
    Empty,
    /// These bytes.
    Bytes(Vec<u8>),
    /// This process's own standard input.
    Inherit,
}

/// An agent's address, as seen from the network namespace of a process.
#[derive(Debug, Clone)]
pub struct Agent {
    namespace: PathBuf,
    address: SocketAddr,
}

impl Agent {
    /// The agent listening at `address` in the network namespace of `pid`.
    pub fn new(pid: i32, address: SocketAddr) -> Self {
        Self { namespace: PathBuf::from(format!("/proc/{pid}/ns/net")), address }
    }

    /// The same namespace, another address.
    pub fn at(&self, address: SocketAddr) -> Self {
        Self { namespace: self.namespace.clone(), address }
    }

    /// A TCP connection made in the agent's network namespace.
    pub fn dial(&self, address: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
        let namespace = File::open(&self.namespace)?;
        // A socket stays in the namespace it was made in, a thread that ends
        // takes its own change of namespace with it.
        let dialled = thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&namespace, CloneFlags::CLONE_NEWNET)?;
                    TcpStream::connect_timeout(&address, limit)
                })
                .join()
        });
        dialled.unwrap_or_else(|_| Err(io::Error::other("the dialling thread panicked")))
    }

    /// Whether the agent answers now.
    pub fn answers(&self, limit: Duration) -> bool {
        self.dial(self.address, limit).is_ok()
    }

    fn ask(&self, request: &Request) -> Result<TcpStream, AgentError> {
        self.dial(self.address, Duration::from_secs(10))
            .and_then(|mut stream| {
                stream.set_nodelay(true)?;
                write_json(&mut stream, Kind::Request, request)?;
                Ok(stream)
            })
            .map_err(|source| AgentError::Unreachable { address: self.address, source })
    }

    /// Runs a command to its end, writing its output as it comes.
    ///
    /// # Errors
    /// When it cannot be started, the agent is lost, or `limit` passes; a
    /// command that fails is no error.
    pub fn exec(
        &self,
        command: &Command,
        input: Input,
        limit: Option<Duration>,
        stdout: &mut dyn Write,
        stderr: &mut dyn Write,
    ) -> Result<Exit, AgentError> {
        let what = command.line();
        let stream = self.ask(&Request::Exec(command.clone()))?;
        let result = self.follow(&stream, input, limit, stdout, stderr);
        let _ = stream.shutdown(Shutdown::Both);
        match result {
            Ok(Reply::Exited(exit)) => Ok(exit),
            Ok(Reply::Failed(message)) => Err(AgentError::Refused(message)),
            Ok(_) => Err(self.lost(what, io::Error::other("unexpected reply"))),
            Err(source) => match limit {
                Some(limit) if is_timeout(&source) => Err(AgentError::TimedOut { what, limit }),
                _ => Err(self.lost(what, source)),
            },
        }
    }

    fn follow(
        &self,
        stream: &TcpStream,
        input: Input,
        limit: Option<Duration>,
        stdout: &mut dyn Write,
        stderr: &mut dyn Write,
    ) -> io::Result<Reply> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        send_input(stream, input)?;
        let mut reader = stream.try_clone()?;
        loop {
            if let Some(deadline) = deadline {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                reader.set_read_timeout(Some(left))?;
            }
            match read_frame(&mut reader)? {
                (Kind::Stdout, data) => {
                    stdout.write_all(&data)?;
                    stdout.flush()?;
                }
                (Kind::Stderr, data) => {
                    stderr.write_all(&data)?;
                    stderr.flush()?;
                }
                (Kind::Reply, data) => return Ok(serde_json::from_slice(&data)?),
                _ => return Err(io::Error::other("unexpected frame")),
            }
        }
    }

    fn lost(&self, what: String, source: io::Error) -> AgentError {
        AgentError::Lost { address: self.address, what, source }
    }

    fn simple(&self, request: &Request, input: Input, what: String) -> Result<Reply, AgentError> {
        let stream = self.ask(request)?;
        let mut sink = io::sink();
        let mut sink2 = io::sink();
        match self.follow(&stream, input, Some(Duration::from_secs(60)), &mut sink, &mut sink2) {
            Ok(Reply::Failed(message)) => Err(AgentError::Refused(message)),
            Ok(reply) => Ok(reply),
            Err(source) => Err(self.lost(what, source)),
        }
    }

    /// Starts a process that outlives the connection; its output is appended
    /// to `log`. Gives the process id as the agent sees it.
    pub fn spawn(&self, command: &Command, log: &Path) -> Result<i32, AgentError> {
        let what = command.line();
        let request = Request::Spawn { command: command.clone(), log: log.to_path_buf() };
        match self.simple(&request, Input::Empty, what.clone())? {
            Reply::Spawned { pid } => Ok(pid),
            _ => Err(self.lost(what, io::Error::other("unexpected reply"))),
        }
    }

    /// How a spawned process ended; `None` while it runs.
    pub fn status(&self, pid: i32) -> Result<Option<Exit>, AgentError> {
        match self.simple(&Request::Status { pid }, Input::Empty, format!("status {pid}"))? {
            Reply::Exited(exit) => Ok(Some(exit)),
            _ => Ok(None),
        }
    }

    /// Signals the process group of a spawned process.
    pub fn kill(&self, pid: i32, signal: nix::sys::signal::Signal) -> Result<(), AgentError> {
        let request = Request::Kill { pid, signal: signal as i32 };
        self.simple(&request, Input::Empty, format!("kill {pid}")).map(|_| ())
    }

    /// Kills a spawned process's group and waits until its leader has gone.
    pub fn end(&self, pid: i32) -> Result<(), AgentError> {
        self.kill(pid, nix::sys::signal::Signal::SIGKILL)?;
        while self.status(pid)?.is_none() {
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Writes a file, whole before it appears under its name.
    pub fn write_file(&self, path: &Path, mode: u32, content: Vec<u8>) -> Result<(), AgentError> {
        let request = Request::Write { path: path.to_path_buf(), mode };
        self.simple(&request, Input::Bytes(content), format!("write {}", path.display())).map(|_| ())
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
}

fn send_input(stream: &TcpStream, input: Input) -> io::Result<()> {
    let mut writer = stream.try_clone()?;
    match input {
        Input::Empty => write_frame(&mut writer, Kind::InputEnd, &[]),
        Input::Bytes(bytes) => {
            // On its own thread: the command may print before it has read all.
            thread::spawn(move || {
                for chunk in bytes.chunks(256 << 10) {
                    write_frame(&mut writer, Kind::Input, chunk)?;
                }
                write_frame(&mut writer, Kind::InputEnd, &[])
            });
            Ok(())
        }
        Input::Inherit => {
            thread::spawn(move || -> io::Result<()> {
                let mut buffer = vec![0; 64 << 10];
                loop {
                    match io::stdin().read(&mut buffer)? {
                        0 => return write_frame(&mut writer, Kind::InputEnd, &[]),
                        length => write_frame(&mut writer, Kind::Input, &buffer[..length])?,
                    }
                }
            });
            Ok(())
        }
    }
}
