//! The driver's log: one line for a call, to the journal, else to syslog, else
//! to a file. Standard error is kubelet's.
//!
//! Both sockets take a line as one datagram. It is sent without waiting: a log
//! that is full loses a line rather than hold up a pod. (Crates for either wait.)

use lvm::config::{LogLevel, NodeConfig};
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// systemd.journal-fields(7) and the journal's native protocol.
const JOURNAL: &str = "/run/systemd/journal/socket";
/// syslog(3).
const SYSLOG: &str = "/dev/log";
/// Where neither is there.
const FILE: &str = "/var/log/lvprov-flexvolume.log";
/// What lines are marked with.
const IDENTIFIER: &str = "lvprov-flexvolume";

/// A call that has been answered.
#[derive(Debug, Clone, Default)]
pub struct Line {
    /// The verb.
    pub verb: &'static str,
    /// `<namespace>/<name>` of the pod; its UID where kubelet tells no more.
    pub pod: String,
    /// The volume, as the pod calls it.
    pub volume: String,
    /// What was wrong. None: nothing.
    pub failure: Option<String>,
    /// Whether something was changed, or it was all as it should be before.
    pub changed: bool,
    /// How long it took.
    pub took: Duration,
}

impl Line {
    fn level(&self) -> LogLevel {
        match (&self.failure, self.changed) {
            (Some(_), _) => LogLevel::Error,
            (None, true) => LogLevel::Info,
            (None, false) => LogLevel::Debug,
        }
    }

    /// The line itself, for people; never more than one.
    fn text(&self) -> String {
        let mut text = format!("{} of volume {} for pod {}", self.verb, self.volume, self.pod);
        let _ = match &self.failure {
            Some(failure) => write!(text, " failed after {} ms: {failure}", self.took.as_millis()),
            None if self.changed => write!(text, ": done in {} ms", self.took.as_millis()),
            None => write!(text, ": nothing to do, {} ms", self.took.as_millis()),
        };
        one_line(&text)
    }

    /// As syslog(3) counts: 3 is an error, 6 information, 7 debugging.
    fn priority(&self) -> u8 {
        match self.level() {
            LogLevel::Off | LogLevel::Error => 3,
            LogLevel::Info => 6,
            LogLevel::Debug => 7,
        }
    }
}

fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(2000).collect()
}

/// Writes the line, where the level asks for it. A log that cannot be written
/// is no reason to fail.
pub fn write(config: &NodeConfig, line: &Line) {
    write_to(config, line, Path::new(JOURNAL), Path::new(SYSLOG), Path::new(FILE));
}

fn write_to(config: &NodeConfig, line: &Line, journal: &Path, syslog: &Path, file: &Path) {
    if line.level() > config.log_level {
        return;
    }
    if let Some(file) = &config.log_file {
        let _ = append(file, line);
        return;
    }
    let _ =
        send(journal, &for_journal(line)).or_else(|_| send(syslog, &for_syslog(line))).or_else(|_| append(file, line));
}

fn send(socket: &Path, datagram: &str) -> io::Result<()> {
    let sender = UnixDatagram::unbound()?;
    sender.set_nonblocking(true)?;
    match sender.send_to(datagram.as_bytes(), socket) {
        // It is there, and full: the line is lost, not written elsewhere.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        sent => sent.map(drop),
    }
}

fn for_journal(line: &Line) -> String {
    let mut text = format!(
        "MESSAGE={}\nPRIORITY={}\nSYSLOG_IDENTIFIER={IDENTIFIER}\nLVPROV_VERB={}\nLVPROV_POD={}\nLVPROV_VOLUME={}\n",
        line.text(),
        line.priority(),
        line.verb,
        one_line(&line.pod),
        one_line(&line.volume),
    );
    let _ = writeln!(text, "LVPROV_MILLISECONDS={}", line.took.as_millis());
    text
}

fn for_syslog(line: &Line) -> String {
    // Facility 3, daemon; the time is syslog's own.
    format!("<{}>{IDENTIFIER}[{}]: {}", 3 * 8 + line.priority(), std::process::id(), line.text())
}

fn append(file: &Path, line: &Line) -> io::Result<()> {
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
    let time = lvm::logs::index::rfc3339(i64::try_from(seconds).unwrap_or_default());
    let text = format!("{time} {IDENTIFIER}[{}]: {}\n", std::process::id(), line.text());
    // One write with O_APPEND: lines of several processes do not mix.
    OpenOptions::new().create(true).append(true).mode(0o640).open(file)?.write_all(text.as_bytes())
}

/// The name of a volume as the last part of its directory.
pub fn volume_of(directory: &Path) -> String {
    directory.file_name().map(PathBuf::from).unwrap_or_default().display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(failure: Option<&str>, changed: bool) -> Line {
        Line {
            verb: "mount",
            pod: "shop/web-0".to_owned(),
            volume: "logs".to_owned(),
            failure: failure.map(str::to_owned),
            changed,
            took: Duration::from_millis(12),
        }
    }

    /// Three places in a directory of their own, with sockets where asked.
    struct Places {
        directory: tempfile::TempDir,
        sockets: Vec<UnixDatagram>,
    }

    impl Places {
        fn new(sockets: &[&str]) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let bind = |name: &&str| {
                let socket = UnixDatagram::bind(directory.path().join(name)).unwrap();
                socket.set_nonblocking(true).unwrap();
                socket
            };
            let sockets = sockets.iter().map(bind).collect();
            Self { directory, sockets }
        }

        fn write(&self, config: &NodeConfig, line: &Line) {
            let at = |name| self.directory.path().join(name);
            write_to(config, line, &at("journal"), &at("syslog"), &at("file"));
        }

        fn received(&self, socket: usize) -> String {
            let mut buffer = [0; 4096];
            let length = self.sockets[socket].recv(&mut buffer).unwrap();
            String::from_utf8(buffer[..length].to_vec()).unwrap()
        }

        fn file(&self) -> String {
            std::fs::read_to_string(self.directory.path().join("file")).unwrap_or_default()
        }
    }

    #[test]
    fn the_journal_comes_first_and_gets_fields() {
        let places = Places::new(&["journal", "syslog"]);
        places.write(&NodeConfig::default(), &line(Some("no\nroom"), false));
        let text = places.received(0);
        assert!(text.starts_with("MESSAGE=mount of volume logs for pod shop/web-0 failed after 12 ms: no room\n"));
        assert!(text.contains("\nPRIORITY=3\n") && text.contains("\nLVPROV_POD=shop/web-0\n"), "{text}");
        assert!(places.sockets[1].recv(&mut [0; 10]).is_err() && places.file().is_empty());
    }

    #[test]
    fn syslog_where_there_is_no_journal_and_a_file_where_there_is_neither() {
        let places = Places::new(&["syslog"]);
        places.write(&NodeConfig::default(), &line(None, true));
        let text = places.received(0);
        assert!(text.starts_with("<30>lvprov-flexvolume[") && text.ends_with(": done in 12 ms"), "{text}");
        let places = Places::new(&[]);
        places.write(&NodeConfig::default(), &line(None, true));
        assert!(places.file().contains("pod shop/web-0: done"), "{}", places.file());
    }

    #[test]
    fn a_log_that_is_full_holds_nobody_up() {
        let places = Places::new(&["journal"]);
        for _ in 0..5000 {
            places.write(&NodeConfig::default(), &line(None, true));
        }
        assert!(places.file().is_empty());
    }

    #[test]
    fn the_level_says_what_is_written() {
        for (level, lines) in [(LogLevel::Off, 0), (LogLevel::Error, 1), (LogLevel::Info, 2), (LogLevel::Debug, 3)] {
            let places = Places::new(&[]);
            let config = NodeConfig { log_level: level, ..NodeConfig::default() };
            for line in [line(Some("x"), false), line(None, true), line(None, false)] {
                places.write(&config, &line);
            }
            assert_eq!(places.file().lines().count(), lines, "{level:?}");
        }
    }

    #[test]
    fn a_file_that_is_named_gets_it_all() {
        let places = Places::new(&["journal", "syslog"]);
        let named = places.directory.path().join("named");
        let config = NodeConfig { log_file: Some(named.clone()), ..NodeConfig::default() };
        places.write(&config, &line(None, true));
        assert!(std::fs::read_to_string(named).unwrap().contains("lvprov-flexvolume["));
        assert!(places.sockets[0].recv(&mut [0; 10]).is_err());
    }
}
