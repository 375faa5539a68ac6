//! Leader election: of several controllers one acts, by a Lease.
//!
//! As client-go does it: a Lease counts as expired when it has been seen
//! unchanged for its duration, by one's own clock. Who waits, watches.

use std::time::Duration;

use futures::{Stream, StreamExt};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::runtime::watcher::{self, watch_object};
use kube::{Api, Client};
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use super::error::{is_conflict, is_not_found};

/// Name of the Lease.
pub const NAME: &str = "lvprov-controller";

const DURATION: Duration = Duration::from_secs(15);
const RENEW_EVERY: Duration = Duration::from_secs(4);
/// Well before anybody else may take it.
const GIVE_UP_AFTER: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(1);
/// For one request while waiting for the Lease.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);

/// The Lease has been lost; another controller may be acting.
#[derive(Debug, thiserror::Error)]
#[error("the Lease {NAME} could not be kept: {0}")]
pub struct Lost(String);

/// This controller's part in the election.
pub struct Election {
    api: Api<Lease>,
    identity: String,
}

impl Election {
    /// `identity` must differ between controllers that run at the same time.
    pub fn new(client: Client, namespace: &str, identity: String) -> Self {
        Self { api: Api::namespaced(client, namespace), identity }
    }

    /// Waits until this controller holds the Lease. Gives the time from which
    /// on it counts: others may have seen it as early as that.
    pub async fn acquire(&self) -> Instant {
        let mut changes = Box::pin(watch_object(self.api.clone(), NAME));
        let mut seen: Option<(Option<String>, Instant)> = None;
        loop {
            let current = match timeout(ASK_TIMEOUT, self.api.get_opt(NAME)).await {
                Ok(Ok(current)) => current,
                failed => {
                    match failed {
                        Ok(Err(error)) => warn!(%error, "cannot read the Lease"),
                        _ => warn!("cannot read the Lease: the API server does not answer"),
                    }
                    sleep(RETRY).await;
                    continue;
                }
            };
            let version = current.as_ref().and_then(|lease| lease.metadata.resource_version.clone());
            let since = match &seen {
                Some((earlier, since)) if *earlier == version => *since,
                _ => Instant::now(),
            };
            seen = Some((version, since));
            let left = current.as_ref().and_then(|lease| self.remaining(lease, since.elapsed()));
            if let Some(left) = left {
                wait_for_change(&mut changes, left).await;
                continue;
            }
            let asked = Instant::now();
            match timeout(ASK_TIMEOUT, self.write(current.as_ref(), &self.identity)).await {
                Ok(Ok(_)) => {
                    info!(identity = self.identity, "acting as leader");
                    return asked;
                }
                // Somebody else was faster.
                Ok(Err(error)) if is_conflict(&error) => {}
                Ok(Err(error)) => warn!(%error, "cannot take the Lease"),
                // It may have been written: the next look tells.
                Err(_) => warn!("cannot take the Lease: the API server does not answer"),
            }
            sleep(RETRY).await;
        }
    }

    /// Renews the Lease, held since `renewed`, for as long as it can be renewed.
    pub async fn keep(&self, mut renewed: Instant) -> Lost {
        loop {
            sleep(RENEW_EVERY).await;
            loop {
                let left = GIVE_UP_AFTER.saturating_sub(renewed.elapsed());
                // Not when the answer is here: others count from the write,
                // which may have been long before.
                let asked = Instant::now();
                match timeout(left, self.renew()).await {
                    Ok(Ok(())) => {
                        renewed = asked;
                        break;
                    }
                    Ok(Err(Renewal::Taken(by))) => return Lost(format!("{by} has taken it")),
                    Ok(Err(Renewal::Api(error))) => warn!(%error, "cannot renew the Lease"),
                    Err(_) => {
                        return Lost(format!("the API server has not answered for {} s", GIVE_UP_AFTER.as_secs()));
                    }
                }
                sleep(RETRY.min(left)).await;
            }
        }
    }

    /// Lets the next controller in at once.
    pub async fn release(&self) {
        let released = async {
            let lease = self.api.get(NAME).await?;
            if holder(&lease) == self.identity {
                self.write(Some(&lease), "").await?;
            }
            Ok::<_, kube::Error>(())
        };
        match timeout(Duration::from_secs(3), released).await {
            Ok(Ok(())) => info!("released the Lease"),
            Ok(Err(error)) => warn!(%error, "cannot release the Lease"),
            Err(_) => warn!("cannot release the Lease: the API server does not answer"),
        }
    }

    async fn renew(&self) -> Result<(), Renewal> {
        let lease = self.api.get(NAME).await;
        let lease = match lease {
            Ok(lease) if holder(&lease) == self.identity => Some(lease),
            Ok(lease) => return Err(Renewal::Taken(holder(&lease).to_owned())),
            // Deleted by hand: made again.
            Err(error) if is_not_found(&error) => None,
            Err(error) => return Err(Renewal::Api(error)),
        };
        self.write(lease.as_ref(), &self.identity).await.map_err(Renewal::Api)?;
        Ok(())
    }

    /// How long the Lease is still another's. None: it may be taken.
    fn remaining(&self, lease: &Lease, unchanged_for: Duration) -> Option<Duration> {
        let holder = holder(lease);
        if holder.is_empty() || holder == self.identity {
            return None;
        }
        let seconds = lease
            .spec
            .as_ref()
            .and_then(|spec| spec.lease_duration_seconds)
            .and_then(|seconds| u64::try_from(seconds).ok());
        seconds.map_or(DURATION, Duration::from_secs).checked_sub(unchanged_for).filter(|left| !left.is_zero())
    }

    /// Writes the Lease over `current`, or makes it; fails with a conflict
    /// where it is no longer `current`. Made with PUT, so that RBAC can tell
    /// by the address which Lease it is.
    async fn write(&self, current: Option<&Lease>, holder: &str) -> Result<Lease, kube::Error> {
        let now = MicroTime(Timestamp::now());
        let mut lease = current.cloned().unwrap_or_else(|| Lease {
            metadata: ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() },
            ..Lease::default()
        });
        lease.metadata.managed_fields = None;
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        let new_holder = spec.holder_identity.as_deref() != Some(holder);
        if new_holder && !holder.is_empty() {
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0).saturating_add(1));
            spec.acquire_time = Some(now.clone());
        }
        spec.holder_identity = Some(holder.to_owned());
        spec.lease_duration_seconds = Some(if holder.is_empty() { 1 } else { 15 });
        spec.renew_time = Some(now);
        self.api.replace(NAME, &PostParams::default(), &lease).await
    }
}

enum Renewal {
    Taken(String),
    Api(kube::Error),
}

fn holder(lease: &Lease) -> &str {
    lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default()
}

/// Waits until the Lease has changed, at most so long.
async fn wait_for_change<S>(changes: &mut S, longest: Duration)
where
    S: Stream<Item = Result<Option<Lease>, watcher::Error>> + Unpin,
{
    match timeout(longest, changes.next()).await {
        // Either the time is up, or there is something to look at.
        Err(_) | Ok(Some(Ok(_))) => {}
        // The watch is broken. It begins again when next asked.
        Ok(Some(Err(_)) | None) => sleep(RETRY.min(longest)).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{Request, Response};
    use kube::client::Body;
    use tower_test::mock::{Handle, SendResponse};

    type Api = Handle<Request<Body>, Response<Body>>;

    fn election() -> (Election, Api) {
        let (service, handle) = tower_test::mock::pair::<Request<Body>, Response<Body>>();
        (Election::new(Client::new(service, "default"), "default", "me".into()), handle)
    }

    fn held_by(holder: &str, seconds: i32) -> Lease {
        Lease {
            spec: Some(LeaseSpec {
                holder_identity: Some(holder.into()),
                lease_duration_seconds: Some(seconds),
                ..LeaseSpec::default()
            }),
            ..Lease::default()
        }
    }

    /// The next request that is not the watch.
    async fn next(api: &mut Api, method: &str) -> SendResponse<Response<Body>> {
        loop {
            let (request, answer) = api.next_request().await.unwrap();
            if !request.uri().query().unwrap_or_default().contains("fieldSelector") {
                assert_eq!(request.method(), method);
                return answer;
            }
        }
    }

    fn answer(to: SendResponse<Response<Body>>, lease: &Lease) {
        to.send_response(Response::new(Body::from(serde_json::to_vec(lease).unwrap())));
    }

    #[tokio::test]
    async fn a_lease_is_anothers_until_seen_unchanged_for_its_duration() {
        let (election, _api) = election();
        let left = |lease: &Lease, seconds| election.remaining(lease, Duration::from_secs(seconds));
        let other = held_by("other", 15);
        assert_eq!(left(&other, 0), Some(DURATION));
        assert_eq!(left(&other, 14), Some(Duration::from_secs(1)));
        assert_eq!(left(&other, 15), None);
        assert_eq!(left(&held_by("", 15), 0), None);
        // A container that was restarted takes up what it held.
        assert_eq!(left(&held_by("me", 15), 0), None);
        assert_eq!(left(&Lease::default(), 0), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_renewal_counts_from_when_it_was_asked_for() {
        let (election, mut api) = election();
        let start = Instant::now();
        let keeping = tokio::spawn(async move { election.keep(start).await });
        let read = next(&mut api, "GET").await;
        let asked = Instant::now();
        answer(read, &held_by("me", 15));
        // Written at once, and the answer is five seconds on its way.
        let write = next(&mut api, "PUT").await;
        sleep(Duration::from_secs(5)).await;
        answer(write, &held_by("me", 15));
        // From now on the API server is silent.
        let lost = keeping.await.unwrap();
        assert!(lost.to_string().contains("has not answered"), "{lost}");
        assert!(asked.elapsed() <= GIVE_UP_AFTER + Duration::from_millis(10), "{:?}", asked.elapsed());
        drop(api);
    }

    #[tokio::test(start_paused = true)]
    async fn the_lease_counts_from_before_it_was_taken_and_a_write_without_answer_is_done_again() {
        let (election, mut api) = election();
        let acquiring = tokio::spawn(async move { election.acquire().await });
        answer(next(&mut api, "GET").await, &held_by("", 1));
        let _unanswered = next(&mut api, "PUT").await;
        // It was written all the same.
        let read = next(&mut api, "GET").await;
        let before = Instant::now();
        answer(read, &held_by("me", 15));
        let write = next(&mut api, "PUT").await;
        sleep(Duration::from_secs(4)).await;
        answer(write, &held_by("me", 15));
        let since = acquiring.await.unwrap();
        assert!(since - before < Duration::from_secs(1), "{:?}", since - before);
    }
}
