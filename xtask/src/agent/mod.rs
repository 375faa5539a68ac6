//! Running commands somewhere else: in a guest, or in a sandbox's namespaces.
//!
//! [`server`] runs there, [`client::Agent`] here. One TCP connection carries
//! one request. Frames are a byte of kind, a big-endian `u32` of length, and
//! that many bytes.

pub mod client;
pub mod server;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What a command is to be run with.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Command {
    /// Program and arguments; the program is looked up in the agent's PATH.
    pub argv: Vec<String>,
    /// Added to the agent's own environment.
    pub env: BTreeMap<String, String>,
    /// Working directory; the agent's own where absent.
    pub cwd: Option<PathBuf>,
}

impl Command {
    /// A command of these words.
    pub fn new<I, S>(argv: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        Self { argv: argv.into_iter().map(Into::into).collect(), ..Self::default() }
    }

    /// The words as one line, quoted where a shell would need it.
    pub fn line(&self) -> String {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
        let quote = |word: &String| {
            if !word.is_empty() && word.chars().all(plain) {
                word.clone()
            } else {
                format!("'{}'", word.replace('\'', r"'\''"))
            }
        };
        self.argv.iter().map(quote).collect::<Vec<_>>().join(" ")
    }
}

/// First frame of a connection.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Run to the end, streaming; killed with its process group when the
    /// connection breaks.
    Exec(Command),
    /// Start and leave running, output appended to a file.
    Spawn { command: Command, log: PathBuf },
    /// How a spawned process is doing.
    Status { pid: i32 },
    /// Signal a spawned process's group.
    Kill { pid: i32, signal: i32 },
    /// Write the input frames to a file, made complete before it appears.
    Write { path: PathBuf, mode: u32 },
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit status, where it exited.
    pub code: Option<i32>,
    /// Signal number, where a signal ended it.
    pub signal: Option<i32>,
}

impl Exit {
    /// The status as a shell would give it.
    pub fn shell_code(self) -> i32 {
        match (self.code, self.signal) {
            (Some(code), _) => code,
            (None, Some(signal)) => 128 + signal,
            (None, None) => 255,
        }
    }
}

/// Last frame of a connection: what became of the request.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    Exited(Exit),
    Spawned { pid: i32 },
    Running,
    Done,
    Failed(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Request,
    Input,
    InputEnd,
    Stdout,
    Stderr,
    Reply,
}

impl Kind {
    fn byte(self) -> u8 {
        match self {
            Kind::Request => b'R',
            Kind::Input => b'I',
            Kind::InputEnd => b'E',
            Kind::Stdout => b'1',
            Kind::Stderr => b'2',
            Kind::Reply => b'A',
        }
    }

    fn from_byte(byte: u8) -> io::Result<Self> {
        [Kind::Request, Kind::Input, Kind::InputEnd, Kind::Stdout, Kind::Stderr, Kind::Reply]
            .into_iter()
            .find(|kind| kind.byte() == byte)
            .ok_or_else(|| io::Error::other(format!("unknown frame kind {byte}")))
    }
}

/// Longest frame either side accepts, in bytes.
const MAX_FRAME: u32 = 4 << 20;

pub(crate) fn write_frame(to: &mut impl Write, kind: Kind, data: &[u8]) -> io::Result<()> {
    let length = u32::try_from(data.len()).map_err(io::Error::other)?;
    let mut frame = Vec::with_capacity(data.len() + 5);
    frame.push(kind.byte());
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(data);
    to.write_all(&frame)
}

pub(crate) fn write_json<T: Serialize>(to: &mut impl Write, kind: Kind, value: &T) -> io::Result<()> {
    write_frame(to, kind, &serde_json::to_vec(value)?)
}

pub(crate) fn read_frame(from: &mut impl Read) -> io::Result<(Kind, Vec<u8>)> {
    let mut header = [0; 5];
    from.read_exact(&mut header)?;
    let kind = Kind::from_byte(header[0])?;
    let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]);
    if length > MAX_FRAME {
        return Err(io::Error::other(format!("frame of {length} bytes")));
    }
    let mut data = vec![0; length as usize];
    from.read_exact(&mut data)?;
    Ok((kind, data))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_wire() {
        let mut wire = Vec::new();
        write_frame(&mut wire, Kind::Stdout, b"one").unwrap();
        write_frame(&mut wire, Kind::InputEnd, b"").unwrap();
        let mut wire = wire.as_slice();
        assert_eq!(read_frame(&mut wire).unwrap(), (Kind::Stdout, b"one".to_vec()));
        assert_eq!(read_frame(&mut wire).unwrap(), (Kind::InputEnd, Vec::new()));
        assert!(read_frame(&mut wire).is_err());
    }

    #[test]
    fn an_oversized_frame_is_refused_before_it_is_read() {
        let mut wire: &[u8] = &[b'1', 0xff, 0xff, 0xff, 0xff];
        assert!(read_frame(&mut wire).unwrap_err().to_string().contains("4294967295"));
    }

    #[test]
    fn a_line_can_be_pasted_into_a_shell() {
        let command = Command::new(["sh", "-c", "echo it's", ""]);
        assert_eq!(command.line(), r"sh -c 'echo it'\''s' ''");
    }
}
