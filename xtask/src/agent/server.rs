//! The serving side: runs in a guest or a sandbox and does what it is told.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{self, ChildStdin, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use super::{Command, Exit, Kind, Reply, Request, read_frame, write_frame, write_json};

/// How long output may be silent after a command's end before the descendants
/// that still hold it open are no longer waited for.
const STRAGGLER_SILENCE: Duration = Duration::from_millis(500);

type Processes = Arc<Mutex<HashMap<i32, Option<Exit>>>>;

/// Serves on `address` until the process ends. Prints `ready` once it listens.
pub fn serve(address: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    println!("ready");
    let processes = Processes::default();
    for stream in listener.incoming() {
        let stream = stream?;
        let processes = processes.clone();
        thread::spawn(move || {
            if let Err(error) = answer(stream, &processes) {
                eprintln!("agent: {error}");
            }
        });
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn answer(mut stream: TcpStream, processes: &Processes) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (kind, data) = match read_frame(&mut stream) {
        Ok(frame) => frame,
        // Somebody only looked whether we answer.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
        Err(error) => return Err(error),
    };
    if kind != Kind::Request {
        return Err(io::Error::other("the first frame is no request"));
    }
    let reply = match serde_json::from_slice(&data)? {
        Request::Exec(command) => return exec(&command, &mut stream),
        Request::Spawn { command, log } => spawn(&command, &log, processes),
        Request::Status { pid } => match lock(processes).get(&pid) {
            Some(Some(exit)) => Reply::Exited(*exit),
            Some(None) => Reply::Running,
            None => Reply::Failed(format!("no process {pid} was started here")),
        },
        Request::Kill { pid, signal } => kill(pid, signal, processes),
        Request::Write { path, mode } => write(&mut stream, &path, mode),
    };
    write_json(&mut stream, Kind::Reply, &reply)?;
    stream.shutdown(Shutdown::Both).or(Ok(()))
}

fn prepare(command: &Command) -> Result<process::Command, Reply> {
    let Some((program, arguments)) = command.argv.split_first() else {
        return Err(Reply::Failed("the command is empty".into()));
    };
    let mut prepared = process::Command::new(program);
    prepared.args(arguments).envs(&command.env).process_group(0);
    if let Some(cwd) = &command.cwd {
        prepared.current_dir(cwd);
    }
    Ok(prepared)
}

fn not_started(command: &Command, error: &io::Error) -> Reply {
    Reply::Failed(format!("cannot start {}: {error}", command.line()))
}

fn exit_of(status: ExitStatus) -> Exit {
    Exit { code: status.code(), signal: status.signal() }
}

fn exec(command: &Command, stream: &mut TcpStream) -> io::Result<()> {
    let spawned = prepare(command).and_then(|mut prepared| {
        prepared.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        prepared.spawn().map_err(|error| not_started(command, &error))
    });
    let mut child = match spawned {
        Ok(child) => child,
        Err(reply) => return write_json(stream, Kind::Reply, &reply),
    };
    let group = Pid::from_raw(child.id().cast_signed());

    let sender = Arc::new(Mutex::new(stream.try_clone()?));
    let moved = Arc::new(AtomicU64::new(0));
    let (ended, ends) = mpsc::channel();
    let mut open = 0;
    if let Some(stdout) = child.stdout.take() {
        forward(stdout, Kind::Stdout, sender.clone(), moved.clone(), ended.clone());
        open += 1;
    }
    if let Some(stderr) = child.stderr.take() {
        forward(stderr, Kind::Stderr, sender.clone(), moved.clone(), ended);
        open += 1;
    }
    let finished = Arc::new(AtomicBool::new(false));
    if let Some(stdin) = child.stdin.take() {
        let (stream, finished) = (stream.try_clone()?, finished.clone());
        thread::spawn(move || {
            feed(stream, stdin, || {
                if !finished.load(Ordering::SeqCst) {
                    // Nobody is left to see the result: the command ends too.
                    let _ = signal::killpg(group, Signal::SIGKILL);
                }
            })
        });
    }

    let status = child.wait()?;
    finished.store(true, Ordering::SeqCst);
    let mut seen = moved.load(Ordering::SeqCst);
    while open > 0 {
        match ends.recv_timeout(STRAGGLER_SILENCE) {
            Ok(()) => open -= 1,
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                let now = moved.load(Ordering::SeqCst);
                if now == seen {
                    break;
                }
                seen = now;
            }
        }
    }
    // A straggler that writes later must not write behind the reply.
    let guard = lock(&sender);
    write_json(&mut &*guard, Kind::Reply, &Reply::Exited(exit_of(status)))?;
    let _ = guard.shutdown(Shutdown::Both);
    Ok(())
}

fn forward(
    mut from: impl Read + Send + 'static,
    kind: Kind,
    to: Arc<Mutex<TcpStream>>,
    moved: Arc<AtomicU64>,
    ended: mpsc::Sender<()>,
) {
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            if write_frame(&mut *lock(&to), kind, &buffer[..length]).is_err() {
                break;
            }
            moved.fetch_add(1, Ordering::SeqCst);
        }
        let _ = ended.send(());
    });
}

fn feed(mut stream: TcpStream, stdin: ChildStdin, broken: impl FnOnce()) {
    let mut stdin = Some(stdin);
    loop {
        match read_frame(&mut stream) {
            // A command that does not read its input is no error.
            Ok((Kind::Input, data)) => {
                if let Some(pipe) = &mut stdin
                    && pipe.write_all(&data).is_err()
                {
                    stdin = None;
                }
            }
            Ok((Kind::InputEnd, _)) => stdin = None,
            Ok(_) | Err(_) => return broken(),
        }
    }
}

fn spawn(command: &Command, log: &Path, processes: &Processes) -> Reply {
    let started = prepare(command).and_then(|mut prepared| {
        let output = File::options().create(true).append(true).open(log);
        let spawned = output.and_then(|output| {
            let errors = output.try_clone()?;
            prepared.stdin(Stdio::null()).stdout(output).stderr(errors).spawn()
        });
        spawned.map_err(|error| not_started(command, &error))
    });
    let mut child = match started {
        Ok(child) => child,
        Err(reply) => return reply,
    };
    let pid = child.id().cast_signed();
    lock(processes).insert(pid, None);
    let processes = processes.clone();
    thread::spawn(move || {
        if let Ok(status) = child.wait() {
            lock(&processes).insert(pid, Some(exit_of(status)));
        }
    });
    Reply::Spawned { pid }
}

fn kill(pid: i32, signal: i32, processes: &Processes) -> Reply {
    let Ok(signal) = Signal::try_from(signal) else {
        return Reply::Failed(format!("no signal {signal}"));
    };
    match lock(processes).get(&pid) {
        Some(None) => match signal::killpg(Pid::from_raw(pid), signal) {
            Ok(()) => Reply::Done,
            Err(error) => Reply::Failed(format!("cannot signal process {pid}: {error}")),
        },
        Some(Some(_)) => Reply::Done,
        None => Reply::Failed(format!("no process {pid} was started here")),
    }
}

fn write(stream: &mut TcpStream, path: &Path, mode: u32) -> Reply {
    let mut hidden = path.as_os_str().to_owned();
    hidden.push(".part");
    let result = (|| {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        let mut file = OpenOptions::new().create(true).write(true).truncate(true).open(&hidden)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        loop {
            match read_frame(stream)? {
                (Kind::Input, data) => file.write_all(&data)?,
                (Kind::InputEnd, _) => break,
                _ => return Err(io::Error::other("unexpected frame")),
            }
        }
        fs::rename(&hidden, path)
    })();
    match result {
        Ok(()) => Reply::Done,
        Err(error) => Reply::Failed(format!("cannot write {}: {error}", path.display())),
    }
}
