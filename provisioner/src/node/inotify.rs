//! inotify(7) for tokio.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Watches on files and directories.
pub struct Watches(AsyncFd<Descriptor>);

/// nix's type lacks the trait that tokio asks for.
struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Watches {
    /// None yet.
    ///
    /// # Errors
    /// When the kernel gives no descriptor: a user may have so many only.
    pub fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        register(Descriptor(inotify), Interest::READABLE).map(Self)
    }

    /// Watches `path` for `what`.
    ///
    /// # Errors
    /// When it is not there, or there are too many watches.
    pub fn add(&self, path: &Path, what: AddWatchFlags) -> io::Result<WatchDescriptor> {
        Ok(self.0.get_ref().0.add_watch(path, what)?)
    }

    /// Ends a watch. One that has ended already, with what it was on, is no error.
    pub fn remove(&self, watch: WatchDescriptor) {
        let _ = self.0.get_ref().0.rm_watch(watch);
    }

    /// Waits for events. Safe to cancel.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn events(&self) -> io::Result<Vec<InotifyEvent>> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|inotify| Ok(inotify.get_ref().0.read_events()?)) {
                Ok(events) => return events,
                Err(_would_block) => {}
            }
        }
    }

    /// Whether there is something to read without waiting.
    pub fn pending(&self) -> bool {
        let mut fds = [PollFd::new(self.0.get_ref().0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

/// Has the runtime wait for a file.
#[allow(unsafe_code)]
pub(super) fn register<T: Owns>(file: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: the descriptor is open, owned by what is handed over, and always the same one.
    Ok(unsafe { AsyncFd::register_with_interest(file, interest) }?)
}

/// What owns one open descriptor, always the same.
pub(super) trait Owns: AsRawFd {}

impl Owns for Descriptor {}

impl Owns for File {}
