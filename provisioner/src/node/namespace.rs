//! Working as the host does, from inside a container.
//!
//! lvm has to see the host's /dev, /run/lock/lvm and lvm.conf, and has to share
//! them with the lvm that the driver runs on the host itself. Running the
//! host's own lvm in the host's mount namespace gives all of that at once. Two
//! more namespaces matter: udev on the host tells lvm through System V
//! semaphores that a device node is ready, so in a foreign IPC namespace
//! lvcreate would wait for ever; and lvm commands that must outlive the
//! container are moved to a cgroup, which has to be named as the host does.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use nix::sched::{CloneFlags, setns};

/// Why the host's namespaces cannot be entered.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// Process 1 is this one.
    #[error(
        "process 1 is lvprov itself, not the host's init: the pod needs `hostPID: true` for --host-mount-namespace"
    )]
    NoHostPid,
    /// The namespace of process 1 cannot be opened.
    #[error("cannot open {path}: --host-mount-namespace needs a privileged container")]
    Open {
        /// The namespace.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// It cannot be entered.
    #[error("cannot enter {path}: --host-mount-namespace needs a privileged container")]
    Enter {
        /// The namespace.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}

/// The mount namespace comes last: after it, /proc is the host's.
const NAMESPACES: [(&str, CloneFlags); 3] =
    [("cgroup", CloneFlags::CLONE_NEWCGROUP), ("ipc", CloneFlags::CLONE_NEWIPC), ("mnt", CloneFlags::CLONE_NEWNS)];

/// Moves this process into the host's mount, IPC and cgroup namespaces; the
/// working directory is the host's root then.
///
/// Has to be called before there is a second thread: a thread that shares its
/// working directory with another may not change its mount namespace
/// (setns(2)).
///
/// # Errors
/// When the pod lacks `hostPID` or is not privileged.
pub fn enter_host() -> Result<(), NamespaceError> {
    if std::process::id() == 1 {
        return Err(NamespaceError::NoHostPid);
    }
    let mut opened = Vec::new();
    for (name, flag) in NAMESPACES {
        let path = PathBuf::from(format!("/proc/1/ns/{name}"));
        match File::open(&path) {
            Ok(file) => opened.push((path, file, flag)),
            // A kernel without this kind of namespace has nothing to enter.
            Err(error) if error.kind() == io::ErrorKind::NotFound && name != "mnt" => {}
            Err(source) => return Err(NamespaceError::Open { path, source }),
        }
    }
    for (path, file, flag) in opened {
        setns(file, flag).map_err(|errno| NamespaceError::Enter { path, source: errno.into() })?;
    }
    // The kernel sets root and working directory to the new namespace's root,
    // and says so nowhere that could be relied on.
    std::env::set_current_dir("/").map_err(|source| NamespaceError::Enter { path: "/".into(), source })
}
