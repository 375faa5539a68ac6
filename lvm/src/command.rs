//! Child processes: the only place that starts any.
//!
//! No shell, nothing of the caller's environment, standard output and error
//! apart, and every run counted, by kind. Where the node's configuration names a
//! `commandLog`, each run is also written there as one JSON line, so that an
//! admin can see what was done to the disks, and a test how often.

use serde::Serialize;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// What a child process is run for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// An lvm command that changes metadata or activates a volume.
    Mutate,
    /// An lvm command that only reads.
    Report,
    /// mkfs, growfs, blkid.
    Tool,
}

/// How many child processes this process has started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// lvm commands that change something.
    pub mutate: u64,
    /// lvm commands that only read.
    pub report: u64,
    /// Other tools.
    pub tool: u64,
}

static MUTATE: AtomicU64 = AtomicU64::new(0);
static REPORT: AtomicU64 = AtomicU64::new(0);
static TOOL: AtomicU64 = AtomicU64::new(0);

/// The counts since this process started.
pub fn counts() -> Counts {
    Counts {
        mutate: MUTATE.load(Ordering::Relaxed),
        report: REPORT.load(Ordering::Relaxed),
        tool: TOOL.load(Ordering::Relaxed),
    }
}

/// A child process that could not be run, or failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The program is not on this host.
    #[error("{program} is not installed on this node (looked in {SEARCHED})")]
    Missing {
        /// Name of the program.
        program: String,
    },
    /// It could not be started.
    #[error("cannot run {program}: {source}")]
    Start {
        /// Path of the program.
        program: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// It ended with an error.
    #[error("{command} failed with {status}: {stderr}")]
    Failed {
        /// The command line, for reading.
        command: String,
        /// Exit status or signal.
        status: std::process::ExitStatus,
        /// What it wrote to standard error, on one line and not endless.
        stderr: String,
    },
}

/// What a child process gave.
#[derive(Debug)]
pub struct Finished {
    /// Its exit status.
    pub status: std::process::ExitStatus,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    command: String,
}

impl Finished {
    /// The output, or an error where the status is not 0.
    pub fn success(self) -> Result<Self, CommandError> {
        if self.status.success() {
            return Ok(self);
        }
        Err(CommandError::Failed { status: self.status, stderr: one_line(&self.stderr), command: self.command })
    }
}

const SEARCHED: &str = "/usr/sbin, /sbin, /usr/bin and /bin";
const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// Starts child processes.
#[derive(Debug, Default)]
pub struct Runner {
    log: Option<PathBuf>,
    cgroup: Option<File>,
}

impl Runner {
    /// `log`: where each run is written down, if anywhere.
    pub fn new(log: Option<PathBuf>) -> Self {
        Self { log, cgroup: None }
    }

    /// Lets mutating commands run in the cgroup (v2) at `directory`, so that
    /// they outlive the container of their parent: an lvm command killed half
    /// way can leave devices suspended.
    pub fn in_cgroup(mut self, directory: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        self.cgroup = Some(OpenOptions::new().write(true).open(directory.join("cgroup.procs"))?);
        Ok(self)
    }

    /// Runs `program` to its end. `inherit`: a descriptor that the child keeps
    /// open, such as that of a lock that must be held as long as the child runs.
    pub fn run<S: AsRef<OsStr>>(
        &self,
        kind: Kind,
        program: &str,
        args: &[S],
        inherit: Option<RawFd>,
    ) -> Result<Finished, CommandError> {
        let path = DIRECTORIES
            .iter()
            .map(|directory| Path::new(directory).join(program))
            .find(|path| path.exists())
            .ok_or_else(|| CommandError::Missing { program: program.to_owned() })?;
        match kind {
            Kind::Mutate => &MUTATE,
            Kind::Report => &REPORT,
            Kind::Tool => &TOOL,
        }
        .fetch_add(1, Ordering::Relaxed);

        let mut command = Command::new(&path);
        command
            .args(args)
            .env_clear()
            .env("LC_ALL", "C")
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LVM_SUPPRESS_FD_WARNINGS", "1")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let cgroup = self.cgroup.as_ref().filter(|_| kind == Kind::Mutate).map(AsRawFd::as_raw_fd);
        if inherit.is_some() || cgroup.is_some() {
            prepare(&mut command, inherit, cgroup);
        }
        let start = Instant::now();
        let output =
            command.output().map_err(|source| CommandError::Start { program: path.display().to_string(), source })?;
        let mut shown = program.to_owned();
        for arg in args {
            shown.push(' ');
            shown.push_str(&arg.as_ref().to_string_lossy());
        }
        self.write_down(kind, &shown, &output, start);
        Ok(Finished { status: output.status, stdout: output.stdout, stderr: output.stderr, command: shown })
    }

    /// The log is a help, never a reason to fail.
    fn write_down(&self, kind: Kind, command: &str, output: &std::process::Output, start: Instant) {
        #[derive(Serialize)]
        struct Line<'a> {
            kind: Kind,
            command: &'a str,
            exit: Option<i32>,
            ms: u128,
            pid: u32,
        }
        let Some(path) = &self.log else { return };
        let line = Line {
            kind,
            command,
            exit: output.status.code(),
            ms: start.elapsed().as_millis(),
            pid: std::process::id(),
        };
        if let Ok(mut text) = serde_json::to_string(&line) {
            text.push('\n');
            // One write with O_APPEND: lines of several processes do not mix.
            let _ =
                OpenOptions::new().create(true).append(true).open(path).and_then(|mut f| f.write_all(text.as_bytes()));
        }
    }
}

#[allow(unsafe_code)]
fn prepare(command: &mut Command, inherit: Option<RawFd>, cgroup: Option<RawFd>) {
    // SAFETY: between fork and exec only fcntl(2) and write(2) are called, both
    // async-signal-safe, on descriptors that the parent keeps open.
    unsafe {
        command.pre_exec(move || {
            if let Some(fd) = inherit
                && libc::fcntl(fd, libc::F_SETFD, 0) < 0
            {
                return Err(std::io::Error::last_os_error());
            }
            if let Some(fd) = cgroup {
                // "0" is the writing process itself (cgroups(7)). Failing to move is no reason to fail.
                libc::write(fd, b"0".as_ptr().cast(), 1);
            }
            Ok(())
        });
    }
}

/// Standard error as part of a message: one line, at most 500 characters.
fn one_line(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let joined = lines.join("; ");
    if joined.chars().count() > 500 { joined.chars().take(499).chain(['…']).collect() } else { joined }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_status_and_error_are_kept_apart_and_written_down() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("commands.log");
        let runner = Runner::new(Some(log.clone()));
        let done = runner.run(Kind::Tool, "cat", &["/nonexistent"], None).unwrap();
        assert!(done.stdout.is_empty());
        let error = done.success().unwrap_err().to_string();
        assert!(error.contains("cat /nonexistent") && error.contains("No such file"), "{error}");
        let line: serde_json::Value = serde_json::from_str(std::fs::read_to_string(&log).unwrap().trim()).unwrap();
        assert_eq!(line["kind"], "tool");
        assert_eq!(line["exit"], 1);
    }

    #[test]
    fn nothing_of_our_environment_reaches_a_child() {
        let done = Runner::default().run::<&str>(Kind::Tool, "env", &[], None).unwrap();
        let text = String::from_utf8(done.stdout).unwrap();
        let mut names: Vec<&str> = text.lines().filter_map(|l| l.split('=').next()).collect();
        names.sort_unstable();
        assert_eq!(names, ["LC_ALL", "LVM_SUPPRESS_FD_WARNINGS", "PATH"]);
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = Runner::default().run::<&str>(Kind::Tool, "no-such-tool", &[], None).unwrap_err();
        assert!(error.to_string().starts_with("no-such-tool is not installed"));
    }

    #[test]
    fn a_child_keeps_the_descriptor_it_is_given_and_no_other() {
        let file = tempfile::tempfile().unwrap();
        let fd = file.as_raw_fd();
        let path = format!("/proc/self/fd/{fd}");
        let with = Runner::default().run(Kind::Tool, "readlink", &[&path], Some(fd)).unwrap();
        assert!(with.status.success());
        let without = Runner::default().run(Kind::Tool, "readlink", &[&path], None).unwrap();
        assert!(!without.status.success());
    }

    #[test]
    fn a_long_error_is_cut_to_one_line() {
        assert_eq!(one_line(b"  a\n\n  b\n"), "a; b");
        assert!(one_line("x\n".repeat(10_000).as_bytes()).chars().count() <= 500);
    }
}
