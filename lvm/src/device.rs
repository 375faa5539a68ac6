//! Reading from block devices without waiting for ever.
//!
//! A read from a hung disk cannot be ended, not even by a signal, and a process
//! in one cannot exit. So the page is asked for ahead (posix_fadvise(2)), which
//! does not wait, and taken with preadv2(2) and RWF_NOWAIT once it is there. A
//! device that takes longer than [`QUICK`] is read by a child process, which
//! can be left behind and tells an error from a silence.

use crate::command::{CommandError, Kind, Runner};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

/// Within this time a healthy device answers, also under load.
const QUICK: Duration = Duration::from_millis(500);
/// How long the first look waits; each next one twice as long.
const FIRST_PAUSE: Duration = Duration::from_micros(20);
/// Pages are read whole.
const PAGE: u64 = 4096;

/// Opens a device and fills `buffer` from its start. An error of kind
/// `ResourceBusy` where it is suspended, `TimedOut` where it does not answer,
/// `UnexpectedEof` where it is smaller.
pub fn read_head(runner: &Runner, device: &Path, buffer: &mut [u8]) -> io::Result<()> {
    let file = File::open(device)?;
    read(runner, device, &file, buffer, 0)
}

/// How much is read at a time: what a long-lived process has once had for a
/// buffer it hardly gives back.
const PIECE: u64 = 128 << 10;

/// As [`read_head`], for this part of the device, piece by piece.
pub fn read_part(runner: &Runner, device: &Path, part: Range<u64>, mut work: impl FnMut(&[u8])) -> io::Result<()> {
    let file = File::open(device)?;
    let mut buffer = vec![0; PIECE.min(part.end - part.start) as usize];
    let mut at = part.start;
    while at < part.end {
        let piece = &mut buffer[..PIECE.min(part.end - at) as usize];
        read(runner, device, &file, piece, at)?;
        work(piece);
        at += piece.len() as u64;
    }
    Ok(())
}

/// Succeeds if the device answers, read where no file system keeps what it
/// needs in memory: at its end.
pub fn probe(runner: &Runner, device: &Path) -> io::Result<()> {
    let file = File::open(device)?;
    refuse_suspended(&file)?;
    let size = crate::mounts::device_size(device)?;
    let mut page = [0; PAGE as usize];
    read(runner, device, &file, &mut page, (size / PAGE).saturating_sub(1) * PAGE)
}

/// As [`probe`], for whoever asks often: one that does not answer at once is an
/// error of kind `TimedOut`, and no process is started to wait for it.
pub fn answers(device: &Path) -> io::Result<()> {
    let file = File::open(device)?;
    let size = crate::mounts::device_size(device)?;
    let mut page = [0; PAGE as usize];
    match read_at_once(&file, &mut page, (size / PAGE).saturating_sub(1) * PAGE)? {
        // Where nobody can tell, the kernel itself will.
        Quick::Read | Quick::Unable => Ok(()),
        Quick::Silent => Err(io::Error::new(io::ErrorKind::TimedOut, "the disk does not answer")),
    }
}

/// What became of a read that must not wait.
enum Quick {
    Read,
    /// The device has not answered.
    Silent,
    /// The kernel cannot read so.
    Unable,
}

fn read(runner: &Runner, device: &Path, file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    if !file.metadata()?.file_type().is_block_device() {
        return file.read_exact_at(buffer, offset);
    }
    match read_at_once(file, buffer, offset)? {
        Quick::Read => Ok(()),
        Quick::Silent | Quick::Unable => {
            ask_a_child(runner, device, offset)?;
            file.read_exact_at(buffer, offset)
        }
    }
}

fn read_at_once(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<Quick> {
    refuse_suspended(file)?;
    // What is in memory says nothing of the disk.
    advise(file, offset, buffer.len(), PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    let mut filled = 0;
    let begun = Instant::now();
    let mut pause = FIRST_PAUSE;
    let mut ask = true;
    while begun.elapsed() < QUICK {
        let at = offset + filled as u64;
        if ask {
            advise(file, at, buffer.len() - filled, PosixFadviseAdvice::POSIX_FADV_WILLNEED)?;
        }
        match read_what_is_there(file, &mut buffer[filled..], at) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) if filled + read == buffer.len() => return Ok(Quick::Read),
            // The kernel reads no more ahead than it is set to: ask for the rest.
            Ok(read) => {
                filled += read;
                (ask, pause) = (true, FIRST_PAUSE);
                continue;
            }
            Err(error) => match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) => ask = false,
                // A kernel that cannot do this.
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => return Ok(Quick::Unable),
                _ => return Err(error),
            },
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(2));
    }
    Ok(Quick::Silent)
}

fn advise(file: &File, offset: u64, length: usize, advice: PosixFadviseAdvice) -> io::Result<()> {
    // Whole pages: of others the kernel drops none.
    let start = offset / PAGE * PAGE;
    let end = (offset + length as u64).next_multiple_of(PAGE);
    Ok(posix_fadvise(file, start.cast_signed(), (end - start).cast_signed(), advice)?)
}

#[allow(unsafe_code)]
fn read_what_is_there(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: the one iovec is `buffer`, and lives longer than the call.
    let read = unsafe { libc::preadv2(file.as_raw_fd(), &raw const part, 1, offset.cast_signed(), libc::RWF_NOWAIT) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

fn ask_a_child(runner: &Runner, device: &Path, offset: u64) -> io::Result<()> {
    let args = [
        format!("if={}", device.display()),
        "of=/dev/null".to_owned(),
        format!("bs={PAGE}"),
        "count=1".to_owned(),
        format!("skip={}", offset / PAGE),
        "iflag=direct".to_owned(),
        "status=none".to_owned(),
    ];
    match runner.run(Kind::Tool, "dd", &args, None).and_then(crate::command::Finished::success) {
        Ok(_) => Ok(()),
        Err(CommandError::StillRunning { after, pid, .. }) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!(
                "it has not answered a read for {} s (process {pid}): the disk below it hangs, or a device below it is \
                 suspended; look at the kernel's log and at dmsetup info",
                after.as_secs()
            ),
        )),
        Err(error) => Err(io::Error::other(error.to_string())),
    }
}

/// Reading a suspended device would wait until somebody resumes it.
pub fn refuse_suspended(device: &File) -> io::Result<()> {
    let number = device.metadata()?.rdev();
    let path = format!("/sys/dev/block/{}:{}/dm/suspended", libc::major(number), libc::minor(number));
    match std::fs::read(path) {
        Ok(text) if text.starts_with(b"1") => Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "the device is suspended; if it stays so, resume it (dmsetup resume)",
        )),
        _ => Ok(()),
    }
}
