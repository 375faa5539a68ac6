//! Waiting for a file lock in order of arrival, up to a deadline.
//!
//! flock(2) itself knows no deadline, but the kernel queues who waits in it, and
//! wakes the first when the lock is free. Who looks again and again instead
//! stands in no queue: with twenty who want the same lock, newcomers win, and
//! some wait for many seconds. So a waiter waits in the kernel, and a timer of
//! its own ends the wait by a signal.

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigEvent, SigHandler, SigSet, SigevNotify, Signal, sigaction};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use nix::unistd::gettid;
use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Ends waits. Ignored by default, so one that comes late does nothing; it is
/// otherwise sent by the kernel only to who asks for it (F_SETOWN).
const ALARM: Signal = Signal::SIGURG;

/// The timer goes on until it is deleted: a signal that comes before the thread
/// has begun to wait would be missed.
const AGAIN: Duration = Duration::from_millis(20);

/// Locks `file` for this open file alone; false when that took longer than
/// `patience`. A patience of zero only looks.
///
/// # Errors
/// What flock(2) and timer_create(2) say.
pub fn lock(file: &File, patience: Duration) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => return Ok(true),
        Err(TryLockError::Error(error)) => return Err(error),
        Err(TryLockError::WouldBlock) if patience.is_zero() => return Ok(false),
        Err(TryLockError::WouldBlock) => {}
    }
    let deadline = Instant::now() + patience;
    handle_alarm()?;
    let notify = SigevNotify::SigevThreadId { signal: ALARM, thread_id: gettid().as_raw(), si_value: 0 };
    let mut timer = Timer::new(ClockId::CLOCK_MONOTONIC, SigEvent::new(notify))?;
    timer.set(Expiration::IntervalDelayed(patience.into(), AGAIN.into()), TimerSetTimeFlags::empty())?;
    loop {
        match wait(file) {
            Ok(()) => return Ok(true),
            // Also another signal ends the wait, and costs the place in the queue.
            Err(Errno::EINTR) if Instant::now() < deadline => {}
            Err(Errno::EINTR) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
}

#[allow(unsafe_code)]
fn wait(file: &File) -> Result<(), Errno> {
    // SAFETY: flock reads nothing but its two arguments, and the descriptor is open.
    Errno::result(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) }).map(drop)
}

/// A handler that does nothing, without SA_RESTART: the call it interrupts ends.
#[allow(unsafe_code)]
fn handle_alarm() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    static INSTALLED: OnceLock<Result<(), Errno>> = OnceLock::new();
    let install = || {
        let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing, so it is safe at any moment.
        unsafe { sigaction(ALARM, &action) }.map(drop)
    };
    Ok((*INSTALLED.get_or_init(install))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::sync::mpsc;

    /// A lock that is held.
    struct Held {
        directory: tempfile::TempDir,
        first: File,
    }

    impl Held {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let first = File::create(directory.path().join("lock")).unwrap();
            assert!(lock(&first, Duration::ZERO).unwrap());
            Self { directory, first }
        }

        /// For one more who wants it.
        fn open(&self) -> File {
            File::open(self.directory.path().join("lock")).unwrap()
        }

        /// How many the kernel has waiting for it.
        fn waiters(&self) -> usize {
            let inode = format!(":{} ", self.first.metadata().unwrap().ino());
            let locks = std::fs::read_to_string("/proc/locks").unwrap();
            locks.lines().filter(|line| line.contains("-> FLOCK") && line.contains(&inode)).count()
        }

        fn until_waiters_are(&self, count: usize) {
            while self.waiters() != count {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    #[test]
    fn who_came_first_goes_first() {
        let held = Held::new();
        let (told, order) = mpsc::channel();
        let waiting: Vec<_> = (0..8)
            .map(|number| {
                let (file, told) = (held.open(), told.clone());
                let thread = std::thread::spawn(move || {
                    assert!(lock(&file, Duration::from_secs(60)).unwrap());
                    told.send(number).unwrap();
                });
                held.until_waiters_are(number + 1);
                thread
            })
            .collect();
        drop(held.first);
        for thread in waiting {
            thread.join().unwrap();
        }
        assert_eq!(order.try_iter().collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
    }

    #[test]
    fn a_wait_ends_at_its_deadline_and_leaves_no_place_in_the_queue() {
        let held = Held::new();
        let second = held.open();
        let begun = Instant::now();
        assert!(!lock(&second, Duration::from_millis(30)).unwrap());
        assert!(begun.elapsed() >= Duration::from_millis(30));
        assert_eq!(held.waiters(), 0);
        drop(held.first);
        assert!(lock(&second, Duration::ZERO).unwrap());
    }

    /// A signal of somebody else is not the end of a wait.
    #[test]
    fn another_signal_only_interrupts() {
        let held = Held::new();
        let second = held.open();
        let (told, thread) = mpsc::channel();
        let waiting = std::thread::spawn(move || {
            told.send(nix::sys::pthread::pthread_self()).unwrap();
            lock(&second, Duration::from_secs(60)).unwrap()
        });
        let thread = thread.recv().unwrap();
        for _ in 0..3 {
            held.until_waiters_are(1);
            nix::sys::pthread::pthread_kill(thread, ALARM).unwrap();
        }
        drop(held.first);
        assert!(waiting.join().unwrap());
    }
}
