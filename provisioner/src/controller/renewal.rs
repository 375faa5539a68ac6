//! Keeps the certificates of all sides valid: [`crate::certificates::plan`]
//! says what is to be done, this does it, at its time and whenever one of the
//! Secrets changes.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{BoxStream, StreamExt, select_all};
use k8s_openapi::api::core::v1::Secret;
use kube::runtime::WatchStreamExt;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher::watch_object;
use kube::{Api, Client};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use super::context::Context;
use super::error::is_conflict;
use super::events::{Events, Reason};
use super::nodes::Ageing;
use crate::certificates::cluster::{self, ApiError, Live, NAMES};
use crate::certificates::issue::{CLOCK_SKEW, IssueError};
use crate::certificates::plan::{Notice, Plan, Step, plan, write};
use crate::certificates::state::{LIFETIME, Slot};
use crate::names::{AUTHORITIES_SECRET, NODE_TLS_SECRET};
use crate::tls::{TlsDirectory, TlsError};
use crate::{with_causes, x509};

/// Between attempts, where the API server or a clock is wrong: the first wait,
/// doubled up to the last.
const FIRST_RETRY: Duration = Duration::from_secs(5);
const LAST_RETRY: Duration = Duration::from_secs(600);
/// After one change others may follow: `kubectl apply` writes one Secret after
/// the other.
const SETTLE: Duration = Duration::from_secs(2);
/// Files that are of no use are read again after this time.
const READ_AGAIN: Duration = Duration::from_secs(5);
/// A renewal of everything takes half of it.
const MOST_STEPS: usize = 40;

/// Why certificates could not be renewed this time.
#[derive(Debug, thiserror::Error)]
pub enum RenewalError {
    /// A Secret cannot be read or written.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// A key or certificate could not be made.
    #[error(transparent)]
    Issue(#[from] IssueError),
    /// What is valid cannot be told.
    #[error(
        "the clocks of this controller ({own}) and of the API server ({server}) differ by more than an hour; no \
         certificate is renewed until they agree"
    )]
    Clock {
        /// This one's time.
        own: String,
        /// The other's.
        server: String,
    },
    /// It should have come to an end.
    #[error("the Secrets are not as they should be after {MOST_STEPS} writes; does somebody else write them?")]
    NoEnd,
}

/// Renews, for ever.
pub async fn run(client: &Client, events: &Events, namespace: &str) {
    let mut changes = changes(client, namespace);
    let mut renewal = Renewal::new(client.clone(), namespace);
    let mut retry = FIRST_RETRY;
    loop {
        let wait = match renewal.renew(events).await {
            Ok(wait) => {
                retry = FIRST_RETRY;
                wait
            }
            Err(error) => {
                warn!(error = with_causes(&error), retry_seconds = retry.as_secs(), "certificates are not renewed");
                let wait = retry;
                retry = (retry * 2).min(LAST_RETRY);
                wait
            }
        };
        debug!(seconds = wait.as_secs(), "certificates are looked at again");
        if timeout(wait, changes.next()).await.is_ok() {
            while timeout(SETTLE, changes.next()).await.is_ok() {}
        }
    }
}

/// Opens the files with the own certificate. Where they are of no use, their
/// Secret is put right first: nobody else would do it.
///
/// # Errors
/// When there is no such directory.
pub async fn open(
    directory: &Path,
    client: &Client,
    events: &Events,
    namespace: &str,
) -> Result<Arc<TlsDirectory>, TlsError> {
    match TlsDirectory::open(directory) {
        Err(error) if directory.is_dir() => warn!(error = with_causes(&error), "waiting for certificates"),
        done => return done,
    }
    let opened = async {
        loop {
            sleep(READ_AGAIN).await;
            if let Ok(tls) = TlsDirectory::open(directory) {
                return tls;
            }
        }
    };
    tokio::select! {
        tls = opened => Ok(tls),
        () = run(client, events, namespace) => TlsDirectory::open(directory),
    }
}

/// Tells of nodes that do not use their new certificates, for ever.
pub async fn tell_nodes(ctx: Arc<Context>, mut ageing: broadcast::Receiver<Ageing>) {
    loop {
        let Ageing { node, ends } = match ageing.recv().await {
            Ok(ageing) => ageing,
            // It is told again with the next connection.
            Err(RecvError::Lagged(_)) => continue,
            Err(RecvError::Closed) => return,
        };
        let Some(object) = ctx.node_objects.get(&ObjectRef::new(&node)) else { continue };
        let note = format!(
            "the node service shows a certificate that ends at {}, and has not read a newer one from its Secret \
             {NODE_TLS_SECRET}; is the kubelet of this node at work, and has somebody renewed the Secret \
             (`lvprov certificates --list`)?",
            x509::show_time(ends)
        );
        ctx.events.tell(&*object, Reason::CertificateNotRenewed, note).await;
    }
}

/// Something has happened to one of the Secrets. Each is watched by its name.
fn changes(client: &Client, namespace: &str) -> BoxStream<'static, ()> {
    let watches = NAMES.map(|name| {
        let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
        let watch = watch_object(api, name).default_backoff();
        let changes = watch.filter_map(move |change| {
            let change = change.inspect_err(|error| debug!(name, %error, "cannot watch the Secret"));
            std::future::ready(change.ok().map(|_| ()))
        });
        changes.boxed()
    });
    // A watch goes on for ever.
    select_all(watches).chain(futures::stream::pending()).boxed()
}

/// What is renewed.
pub struct Renewal {
    api: Api<Secret>,
    namespace: String,
    says_idle: bool,
}

impl Renewal {
    /// Of the Secrets in this namespace.
    pub fn new(client: Client, namespace: &str) -> Self {
        Self { api: Api::namespaced(client, namespace), namespace: namespace.to_owned(), says_idle: true }
    }

    /// Does all that is to be done now. Gives the time until the next look.
    ///
    /// # Errors
    /// When not all of it could be done. What was done is of use by itself.
    pub async fn renew(&mut self, events: &Events) -> Result<Duration, RenewalError> {
        let mut clock_is_right = false;
        for _ in 0..MOST_STEPS {
            let live = cluster::read(&self.api).await?;
            let now = x509::now();
            let Plan { step, wake, notices } = plan(&live.secrets, now);
            self.say_whether_idle(&live);
            let Some(step) = step else {
                for notice in notices {
                    tell_notice(events, &live, notice).await;
                }
                return Ok(Duration::from_secs(u64::try_from(wake - now).unwrap_or(0).max(1)));
            };
            if !clock_is_right {
                self.check_clock(events, &live).await?;
                clock_is_right = true;
            }
            let write = write(step, &live.secrets, now)?;
            let secret = write.secret;
            match cluster::write(&self.api, &live, write).await {
                Ok(()) => {
                    info!(?step, secret, "certificates");
                    tell_step(events, &live, step).await;
                }
                // Somebody else has changed it, or it has gone: all is looked at again.
                Err(error) if is_conflict(&error.source) => info!(?step, secret, "the Secret has changed meanwhile"),
                Err(error) => return Err(error.into()),
            }
        }
        // A pause, so that two who disagree do not write all the time.
        sleep(SETTLE).await;
        Err(RenewalError::NoEnd)
    }

    /// Once, whenever it changes.
    fn say_whether_idle(&mut self, live: &Live) {
        let idle = live.secrets.authorities.is_none();
        if idle && self.says_idle {
            info!(
                namespace = self.namespace,
                "there is no Secret {AUTHORITIES_SECRET}: certificates are not renewed here, and are read from their \
                 files by whoever renews them"
            );
        }
        self.says_idle = !idle;
    }

    /// By a wrong clock valid certificates would be replaced by some that
    /// nobody accepts.
    async fn check_clock(&self, events: &Events, live: &Live) -> Result<(), RenewalError> {
        let Some(server) = cluster::server_time(&self.api).await? else { return Ok(()) };
        let own = x509::now();
        if (own - server).abs() <= CLOCK_SKEW {
            return Ok(());
        }
        let error = RenewalError::Clock { own: x509::show_time(own), server: x509::show_time(server) };
        if let Some(object) = live.object(AUTHORITIES_SECRET) {
            let note = format!(
                "the clocks of the controller and of the API server differ by {} min; no certificate is renewed until \
                 they agree",
                (own - server).abs() / 60
            );
            events.tell(&object, Reason::CertificateNotRenewed, note).await;
        }
        Err(error)
    }
}

async fn tell_step(events: &Events, before: &Live, step: Step) {
    let (secret, note) = match step {
        Step::Renew(side) => {
            let name = side.secret();
            (name, format!("{} has a new certificate; who uses it reads it without a restart", side.name()))
        }
        Step::Prepare(side) => (
            AUTHORITIES_SECRET,
            format!(
                "{} gets a new authority; it is trusted from now on, and signs in {} s",
                side.name(),
                before.secrets.lifetime().overlap()
            ),
        ),
        Step::Promote(side) => {
            let old = before.secrets.authority(side, Slot::Current);
            let until = old.map_or_else(String::new, |old| {
                format!("; the one before it is trusted until {}", x509::show_time(old.validity.not_after))
            });
            (AUTHORITIES_SECRET, format!("the new authority of {} signs from now on{until}", side.name()))
        }
        Step::Trust(_) | Step::Trusted(..) | Step::Distrust(..) | Step::Prune(_) => return,
    };
    if let Some(object) = before.object(secret) {
        events.tell(&object, Reason::CertificateRenewed, note).await;
    }
}

async fn tell_notice(events: &Events, live: &Live, notice: Notice) {
    let note = match notice {
        Notice::Missing(side) => format!(
            "the Secret {} is gone; make an empty one (`kubectl create secret generic {0}`) and it is filled",
            side.secret()
        ),
        Notice::CannotSign(side) => format!(
            "the authority of {} is of no use (key {}); a new one takes its place as soon as all trust it",
            side.name(),
            Slot::Current.keys(side).certificate
        ),
        Notice::OfNoUse(side) => format!("the certificate in {} is of no use, and cannot be made anew", side.secret()),
        Notice::Lifetime => {
            format!("the key {LIFETIME} holds no time such as 90d, of one minute at least; 90d is taken")
        }
    };
    warn!(note, "certificates");
    if let Some(object) = live.object(AUTHORITIES_SECRET) {
        events.tell(&object, Reason::CertificateNotRenewed, note).await;
    }
}
