//! The watch of VolumeSnapshotContents, in clusters that have them or not.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, Stream, StreamExt};
use kube::api::ListParams;
use kube::runtime::watcher;
use kube::{Api, Client};
use tracing::{info, warn};

use super::Snapshots;
use super::types::VolumeSnapshotContent;
use crate::controller::error::{is_forbidden, is_not_found};

/// Between looks whether there are VolumeSnapshots by now, or the right to see
/// them.
pub const SELDOM: Duration = Duration::from_secs(30);
/// Between attempts after other errors: the first wait, doubled up to the last.
const FIRST_RETRY: Duration = Duration::from_millis(800);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// Whether the cluster has VolumeSnapshots, as far as this controller is
/// concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Presence {
    /// Nobody has looked yet.
    #[default]
    Unknown,
    /// They are watched.
    There,
    /// Their definitions are not installed.
    NotInstalled,
    /// They may not be read.
    Forbidden,
}

/// What to do about it.
impl fmt::Display for Presence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "the cluster's VolumeSnapshots have not been read yet",
            Self::There => "the cluster has VolumeSnapshots",
            Self::NotInstalled => {
                "the cluster has no VolumeSnapshots: install the snapshot-controller and its CustomResourceDefinitions \
                 (snapshot.storage.k8s.io/v1)"
            }
            Self::Forbidden => {
                "the controller of lvprov has no right to VolumeSnapshots: kubectl apply -f deploy/snapshots"
            }
        })
    }
}

type Events = Pin<Box<dyn Stream<Item = watcher::Result<watcher::Event<VolumeSnapshotContent>>> + Send>>;

/// What is between two events.
struct Watch {
    api: Api<VolumeSnapshotContent>,
    events: Events,
    snapshots: Arc<Snapshots>,
    seldom: Duration,
    retry: Duration,
}

/// All contents, as long as there are any to see; says once where there are
/// not, and looks again every `seldom`.
pub fn watch(
    client: Client,
    snapshots: Arc<Snapshots>,
    seldom: Duration,
) -> impl Stream<Item = watcher::Result<watcher::Event<VolumeSnapshotContent>>> + Send + 'static {
    let api = Api::<VolumeSnapshotContent>::all(client);
    let events: Events = Box::pin(watcher(api.clone(), watcher::Config::default()));
    let watch = Watch { api, events, snapshots, seldom, retry: FIRST_RETRY };
    stream::unfold(watch, |mut watch| async move {
        let event = watch.next().await?;
        Some((Ok(event), watch))
    })
}

impl Watch {
    async fn next(&mut self) -> Option<watcher::Event<VolumeSnapshotContent>> {
        loop {
            // The watcher itself would write each refusal into the log.
            if self.snapshots.presence() != Presence::There {
                self.wait_for_any().await;
            }
            match self.events.next().await? {
                Ok(event) => {
                    self.retry = FIRST_RETRY;
                    return Some(event);
                }
                Err(error) => match missing(&error) {
                    Some(presence) => self.is(presence),
                    None => {
                        warn!(%error, "cannot watch VolumeSnapshotContents");
                        self.pause().await;
                    }
                },
            }
        }
    }

    async fn wait_for_any(&mut self) {
        loop {
            match self.api.list(&ListParams::default().limit(1)).await {
                Ok(_) => return self.is(Presence::There),
                Err(error) => match missing_by(&error) {
                    Some(presence) => {
                        self.is(presence);
                        tokio::time::sleep(self.seldom).await;
                    }
                    None => {
                        warn!(%error, "cannot list VolumeSnapshotContents");
                        self.pause().await;
                    }
                },
            }
        }
    }

    fn is(&self, presence: Presence) {
        if !self.snapshots.set_presence(presence) {
            return;
        }
        match presence {
            Presence::There => info!("watching VolumeSnapshotContents"),
            _ => info!("no snapshots are taken: {presence}"),
        }
    }

    async fn pause(&mut self) {
        tokio::time::sleep(self.retry).await;
        self.retry = (self.retry * 2).min(LAST_RETRY);
    }
}

fn missing(error: &watcher::Error) -> Option<Presence> {
    use watcher::Error::{InitialListFailed, WatchError, WatchFailed, WatchStartFailed};
    match error {
        InitialListFailed(error) | WatchStartFailed(error) | WatchFailed(error) => missing_by(error),
        WatchError(status) => match status.code {
            404 => Some(Presence::NotInstalled),
            403 => Some(Presence::Forbidden),
            _ => None,
        },
        _ => None,
    }
}

fn missing_by(error: &kube::Error) -> Option<Presence> {
    match error {
        error if is_not_found(error) => Some(Presence::NotInstalled),
        error if is_forbidden(error) => Some(Presence::Forbidden),
        _ => None,
    }
}
