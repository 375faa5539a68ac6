//! Child processes: the only place that starts any.
//!
//! No shell, nothing of the caller's environment, standard output and error
//! apart, and every run counted, by kind. No run is ever killed: one that takes
//! too long is left to finish, holding its lock, and its caller is told so. Its
//! output goes to memory files rather than pipes, so that it can still write
//! when its caller has died: a broken pipe would kill lvm half way. Where the node's configuration names a
//! `commandLog`, each run is also written there as one JSON line, so that an
//! admin can see what was done to the disks, and a test how often.

use crate::lock::Lock;
use crate::shell;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::Serialize;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a child process is waited for. kubelet itself sets no limit, and
/// gives CSI calls two minutes.
pub const LIMIT: Duration = Duration::from_secs(100);

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

/// How many commands this process has run.
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
        source: io::Error,
    },
    /// It has not ended in time.
    #[error("{command} is still running after {} s (process {pid}); it is left to finish. If it hangs, look at that process, at the disks and at suspended devices (dmsetup info)", .after.as_secs())]
    StillRunning {
        /// The command line, for reading.
        command: String,
        /// How long was waited.
        after: Duration,
        /// Its process id.
        pid: u32,
    },
    /// It ended with an error.
    #[error("{command} failed with {status}: {stderr}")]
    Failed {
        /// The command line, for reading.
        command: String,
        /// Exit status or signal.
        status: ExitStatus,
        /// What it wrote to standard error, on one line and not endless.
        stderr: String,
    },
}

/// What a child process gave.
#[derive(Debug)]
pub struct Finished {
    /// Its exit status.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    command: String,
}

impl Finished {
    pub(crate) fn new(command: &str, status: ExitStatus, stdout: Vec<u8>, stderr: Vec<u8>) -> Self {
        Self { status, stdout, stderr, command: command.to_owned() }
    }

    /// The output, or an error where the status is not 0.
    pub fn success(self) -> Result<Self, CommandError> {
        if self.status.success() {
            return Ok(self);
        }
        Err(CommandError::Failed { status: self.status, stderr: one_line(&self.stderr), command: self.command })
    }
}

/// Where mutating commands run (see [`Runner::in_cgroup`]).
pub const CGROUP: &str = "/sys/fs/cgroup/lvprov";

const SEARCHED: &str = "/usr/sbin, /sbin, /usr/bin and /bin";
const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// Where a program is. None: it is not installed.
pub(crate) fn find_program(program: &str) -> Option<PathBuf> {
    DIRECTORIES.iter().map(|directory| Path::new(directory).join(program)).find(|path| path.exists())
}

/// Starts child processes.
#[derive(Debug)]
pub struct Runner {
    log: Option<PathBuf>,
    cgroup: Option<PathBuf>,
    limit: Duration,
    deadline: Option<Instant>,
}

impl Default for Runner {
    fn default() -> Self {
        Self::new(None)
    }
}

impl Runner {
    /// `log`: where each run is written down, if anywhere.
    pub fn new(log: Option<PathBuf>) -> Self {
        Self { log, cgroup: None, limit: LIMIT, deadline: None }
    }

    /// Lets mutating commands run in the cgroup (v2) at `directory`, so that
    /// they outlive the container or service of their parent: an lvm command
    /// killed half way can leave devices suspended. Where there is no cgroup v2
    /// they run in the parent's.
    pub fn in_cgroup(mut self, directory: &Path) -> Self {
        self.cgroup = Some(directory.to_owned());
        self
    }

    /// Waits for no child beyond this moment.
    pub fn until(mut self, deadline: Instant) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// How long may be waited for something that takes `at_most`, before the
    /// deadline or for ever.
    pub(crate) fn patience(&self, at_most: Duration) -> Duration {
        match self.deadline {
            Some(deadline) => deadline.saturating_duration_since(Instant::now()).min(at_most),
            None => at_most,
        }
    }

    /// The cgroup, to be written to; made where it is not there.
    pub(crate) fn cgroup(&self) -> Option<File> {
        let directory = self.cgroup.as_ref()?;
        let procs = directory.join("cgroup.procs");
        let open = || OpenOptions::new().write(true).open(&procs).ok();
        open().or_else(|| {
            // Only below a cgroup v2: elsewhere the directory would be just that.
            directory.parent()?.join("cgroup.controllers").exists().then_some(())?;
            std::fs::create_dir(directory).ok()?;
            open()
        })
    }

    /// Runs an lvm command under the lock of its group, where one is given: in
    /// the lvm that stays, where there is one, or in a process of its own.
    pub(crate) fn lvm(&self, kind: Kind, args: &[&str], lock: Option<&Lock>) -> Result<Finished, CommandError> {
        if let Some(held) = lock.and_then(Lock::shell)
            && let Some(line) = shell::line(args)
        {
            let (shown, start) = (shown("lvm", args), Instant::now());
            if let Some(done) = held.run(&shown, &line, self.patience(self.limit)) {
                count(kind);
                let status = done.as_ref().ok().map(|done| done.status);
                self.write_down(Line { process: false, ..Line::new(kind, &shown, status, start) });
                return done;
            }
        }
        let done = self.run(kind, "lvm", args, lock.map(Lock::fd));
        if let (Err(CommandError::StillRunning { .. }), Some(lock)) = (&done, lock) {
            lock.abandon();
        }
        done
    }

    /// Runs `program` to its end. `lock`: the descriptor of a lock that must be
    /// held as long as the child runs, whatever becomes of this process. The
    /// child gets it as its standard input: lvm closes all others (lvm(8)).
    pub fn run<S: AsRef<OsStr>>(
        &self,
        kind: Kind,
        program: &str,
        args: &[S],
        lock: Option<BorrowedFd<'_>>,
    ) -> Result<Finished, CommandError> {
        let path = find_program(program).ok_or_else(|| CommandError::Missing { program: program.to_owned() })?;
        count(kind);
        let shown = shown(program, args);
        let failed = |source| CommandError::Start { program: path.display().to_string(), source };
        let (mut stdout, mut stderr) = (Captured::new().map_err(failed)?, Captured::new().map_err(failed)?);
        let mut command = Command::new(&path);
        command
            .args(args)
            .env_clear()
            .env("LC_ALL", "C")
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LVM_SUPPRESS_FD_WARNINGS", "1")
            .current_dir("/")
            .stdin(match lock {
                Some(lock) => Stdio::from(lock.try_clone_to_owned().map_err(failed)?),
                None => Stdio::null(),
            })
            .stdout(stdout.writer().map_err(failed)?)
            .stderr(stderr.writer().map_err(failed)?);
        let cgroup = if kind == Kind::Mutate { self.cgroup() } else { None };
        if let Some(cgroup) = &cgroup {
            prepare(&mut command, cgroup.as_raw_fd());
        }
        let start = Instant::now();
        let mut child = command.spawn().map_err(failed)?;
        let pid = child.id();
        let status = wait(&mut child, self.patience(self.limit)).map_err(failed)?;
        self.write_down(Line::new(kind, &shown, status, start));
        let Some(status) = status else {
            // Its end is taken note of, so that no zombie stays.
            std::thread::spawn(move || child.wait());
            return Err(CommandError::StillRunning { command: shown, after: start.elapsed(), pid });
        };
        let (stdout, stderr) = (stdout.read().map_err(failed)?, stderr.read().map_err(failed)?);
        Ok(Finished { status, stdout, stderr, command: shown })
    }

    /// Notes that an lvm was started which is to stay.
    pub(crate) fn note_shell(&self, start: Instant) {
        self.write_down(Line::new(Kind::Tool, "lvm", None, start));
    }

    /// The log is a help, never a reason to fail.
    fn write_down(&self, line: Line<'_>) {
        let Some(path) = &self.log else { return };
        if let Ok(mut text) = serde_json::to_string(&line) {
            text.push('\n');
            // One write with O_APPEND: lines of several processes do not mix.
            let _ =
                OpenOptions::new().create(true).append(true).open(path).and_then(|mut f| f.write_all(text.as_bytes()));
        }
    }
}

/// A line of the command log.
#[derive(Serialize)]
struct Line<'a> {
    kind: Kind,
    command: &'a str,
    /// Whether a process was started for it.
    process: bool,
    exit: Option<i32>,
    ms: u128,
    pid: u32,
}

impl<'a> Line<'a> {
    fn new(kind: Kind, command: &'a str, status: Option<ExitStatus>, start: Instant) -> Self {
        let exit = status.and_then(|status| status.code());
        Self { kind, command, process: true, exit, ms: start.elapsed().as_millis(), pid: std::process::id() }
    }
}

fn count(kind: Kind) {
    match kind {
        Kind::Mutate => &MUTATE,
        Kind::Report => &REPORT,
        Kind::Tool => &TOOL,
    }
    .fetch_add(1, Ordering::Relaxed);
}

/// A command line, for reading.
fn shown<S: AsRef<OsStr>>(program: &str, args: &[S]) -> String {
    let mut shown = program.to_owned();
    for arg in args {
        shown.push(' ');
        shown.push_str(&arg.as_ref().to_string_lossy());
    }
    shown
}

/// What a child writes: a file without a name that outlives both ends.
struct Captured(File);

impl Captured {
    fn new() -> io::Result<Self> {
        Ok(Self(File::from(memfd_create("lvprov", MFdFlags::MFD_CLOEXEC)?)))
    }

    fn writer(&self) -> io::Result<File> {
        self.0.try_clone()
    }

    fn read(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.0.rewind()?;
        self.0.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// Waits for the end of a child. None: it has not ended in time.
fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    match pidfd(child) {
        Ok(pidfd) => loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            match poll_one(&mut poll, left) {
                Ok(true) => return child.wait().map(Some),
                Ok(false) if left.is_zero() => return child.try_wait(),
                Ok(false) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        },
        // Before Linux 5.3.
        Err(_) => loop {
            match child.try_wait()? {
                None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                ended => return Ok(ended),
            }
        },
    }
}

#[allow(unsafe_code)]
fn pidfd(child: &Child) -> io::Result<OwnedFd> {
    // SAFETY: the child has not been waited for, so its id is still its own.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::pid_t::try_from(child.id()).unwrap_or(-1), 0) };
    let fd = RawFd::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[allow(unsafe_code)]
pub(crate) fn poll_one(poll: &mut libc::pollfd, limit: Duration) -> io::Result<bool> {
    let milliseconds = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one valid pollfd is handed over, and one is told.
    match unsafe { libc::poll(poll, 1, milliseconds) } {
        -1 => Err(io::Error::last_os_error()),
        ready => Ok(ready > 0),
    }
}

#[allow(unsafe_code)]
fn prepare(command: &mut Command, cgroup: RawFd) {
    // SAFETY: between fork and exec only write(2) is called, which is
    // async-signal-safe, on a descriptor that the parent keeps open.
    unsafe {
        command.pre_exec(move || {
            // "0" is the writing process itself (cgroups(7)). Failing to move is no reason to fail.
            libc::write(cgroup, b"0".as_ptr().cast(), 1);
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
    use std::os::fd::AsFd;

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

    /// lvm closes every descriptor but the first three, so the lock is one of these.
    #[test]
    fn a_child_keeps_its_lock_when_its_parent_has_let_go() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let lock = File::open(&path).unwrap();
        lock.lock().unwrap();
        let runner = Runner { limit: Duration::from_millis(20), ..Runner::default() };
        let error = runner.run(Kind::Tool, "sleep", &["0.5"], Some(lock.as_fd())).unwrap_err();
        assert!(matches!(error, CommandError::StillRunning { .. }));
        drop(lock);
        let other = File::open(&path).unwrap();
        assert!(other.try_lock().is_err(), "the lock is free while the child runs");
        other.lock().unwrap();
    }

    #[test]
    fn what_takes_too_long_is_left_to_finish() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("commands.log");
        let runner = Runner { limit: Duration::from_millis(50), ..Runner::new(Some(log)) };
        let start = Instant::now();
        let error = runner.run(Kind::Tool, "sleep", &["0.6"], None).unwrap_err();
        assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
        let CommandError::StillRunning { pid, .. } = error else { panic!("{error}") };
        assert!(Path::new(&format!("/proc/{pid}")).exists(), "it has been killed");
    }

    #[test]
    fn much_output_is_read_whole() {
        let done = Runner::default().run(Kind::Tool, "seq", &["200000"], None).unwrap();
        assert!(done.stdout.ends_with(b"\n200000\n"));
    }

    #[test]
    fn a_long_error_is_cut_to_one_line() {
        assert_eq!(one_line(b"  a\n\n  b\n"), "a; b");
        assert!(one_line("x\n".repeat(10_000).as_bytes()).chars().count() <= 500);
    }
}
