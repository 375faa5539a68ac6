//! The unix sockets that kubelet calls.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

use crate::names::DRIVER;

/// Where kubelet looks for the driver, and where it finds it.
#[derive(Debug, Clone)]
pub struct Paths {
    /// The CSI services.
    pub csi: PathBuf,
    /// The registration service; as long as it is there, the driver counts as
    /// installed.
    pub registration: PathBuf,
}

impl Paths {
    /// Below kubelet's root directory.
    pub fn new(kubelet_root: &Path) -> Self {
        Self {
            csi: kubelet_root.join("plugins").join(DRIVER).join("csi.sock"),
            // kubelet's plugin watcher sends the percent-encoded path as the
            // authority of its calls, and only what stands before an @ may be
            // encoded there: without one, every call ends with PROTOCOL_ERROR.
            registration: kubelet_root.join("plugins_registry").join(format!("{DRIVER}@reg.sock")),
        }
    }
}

/// A socket could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {path}")]
pub struct SocketError {
    what: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// A socket that goes when this is dropped.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    identity: Identity,
}

/// Inode and time of its last change: the number alone is given again.
type Identity = (u64, i64, i64);

fn identity(path: &Path) -> io::Result<Identity> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.ino(), metadata.ctime(), metadata.ctime_nsec()))
}

impl Socket {
    /// Makes the socket and its directory. What a killed predecessor left in
    /// its place is replaced: kubelet refuses a driver that comes with a second
    /// socket of another name.
    ///
    /// # Errors
    /// When the directory or the socket cannot be made.
    pub fn bind(path: &Path) -> Result<(Self, UnixListener), SocketError> {
        let error = |what, source| SocketError { what, path: path.to_owned(), source };
        if let Some(directory) = path.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o750)
                .create(directory)
                .map_err(|source| error("make the directory of", source))?;
        }
        match fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(error("replace", source)),
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(|source| error("bind", source))?;
        fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(|source| error("set the mode of", source))?;
        let identity = identity(path).map_err(|source| error("look at", source))?;
        Ok((Self { path: path.to_owned(), identity }, listener))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // A successor may have put its own there already.
        if identity(&self.path).is_ok_and(|there| there == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixStream;

    use super::*;

    #[test]
    fn paths_are_those_that_kubelet_knows() {
        let paths = Paths::new(Path::new("/var/lib/kubelet"));
        assert_eq!(paths.csi, Path::new("/var/lib/kubelet/plugins/lvm.lvprov.io/csi.sock"));
        assert_eq!(paths.registration, Path::new("/var/lib/kubelet/plugins_registry/lvm.lvprov.io@reg.sock"));
    }

    #[tokio::test]
    async fn stale_socket_is_replaced_and_a_successors_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("plugins/csi.sock");
        let (first, stale) = Socket::bind(&path).unwrap();
        drop(stale);
        assert!(UnixStream::connect(&path).await.is_err());
        let (second, _listener) = Socket::bind(&path).unwrap();
        UnixStream::connect(&path).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        drop(first);
        UnixStream::connect(&path).await.unwrap();
        drop(second);
        assert!(!path.exists());
    }
}
