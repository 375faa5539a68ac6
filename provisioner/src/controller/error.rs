//! What can go wrong in a reconciliation, and when it is tried again.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A reconciliation that has to be tried again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused, or could not be asked.
    #[error("cannot {what}")]
    Api {
        /// What was to be done, and to what.
        what: String,
        /// What the API server, or the connection, says.
        #[source]
        source: Box<kube::Error>,
    },
    /// A node's answer does not make sense.
    #[error("node {node} {what}; do controller and node service have the same version?")]
    Answer {
        /// Who answered.
        node: String,
        /// What is wrong with it.
        what: String,
    },
}

/// Attaches to an error of the API what was to be done.
pub trait Doing<T> {
    /// `what` completes "cannot …", and names the object.
    ///
    /// # Errors
    /// That of `self`.
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T> Doing<T> for Result<T, kube::Error> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::Api { what: what(), source: Box::new(source) })
    }
}

/// Whether the API server says that there is no such object.
pub fn is_not_found(error: &kube::Error) -> bool {
    code(error) == Some(404)
}

/// Whether the API server says that this may not be done.
pub fn is_forbidden(error: &kube::Error) -> bool {
    code(error) == Some(403)
}

/// Whether the object has changed since it was read: who changed it has caused
/// another reconciliation.
pub fn is_conflict(error: &kube::Error) -> bool {
    code(error) == Some(409)
}

/// Whether there is such an object already.
pub fn already_exists(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409 && status.reason == "AlreadyExists")
}

fn code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// Which row of failures of an object. Each is measured by itself: how long a
/// node has been silent has nothing to do with how long its LVM has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Row {
    /// Reconciliations that ended with an error.
    Reconciliation,
    /// Calls that a node answered, or may have got.
    Attempts,
    /// Calls that did not reach a node.
    Silence,
    /// Calls that a node refused, and may take next time.
    Refusals,
}

/// How often, and since when, something has failed in a row, by UID of the
/// object.
#[derive(Debug, Default)]
pub struct Failures {
    rows: Mutex<HashMap<(String, Row), Count>>,
}

#[derive(Debug, Clone)]
struct Count {
    count: u32,
    first: Instant,
    last: Instant,
    wait: Duration,
    what: String,
}

/// A row of failures, as it is after one more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failing {
    /// How long the row lasts.
    pub since: Duration,
    /// How long to wait before the next attempt.
    pub wait: Duration,
}

/// A failure of other than this age begins a new row.
const FORGET: Duration = Duration::from_secs(30 * 60);

impl Failures {
    /// Notes a failure of the object `uid`. A failure of another `what`
    /// (another node, say) begins the row anew.
    pub fn note(&self, uid: &str, row: Row, what: &str, longest_wait: Duration) -> Failing {
        let now = Instant::now();
        let mut rows = self.lock();
        rows.retain(|_, row| now.duration_since(row.last) < FORGET);
        let new = || Count { count: 0, first: now, last: now, wait: Duration::ZERO, what: what.to_owned() };
        let row = rows.entry((uid.to_owned(), row)).or_insert_with(new);
        if row.what != what {
            *row = new();
        }
        row.count = row.count.saturating_add(1);
        row.last = now;
        row.wait = backoff(row.count, longest_wait);
        Failing { since: now.duration_since(row.first), wait: row.wait }
    }

    /// What is left of the wait after the last failure of `uid` in a row. None:
    /// it is over, or there was no failure.
    pub fn left(&self, uid: &str, row: Row) -> Option<Duration> {
        let rows = self.lock();
        let row = rows.get(&(uid.to_owned(), row))?;
        row.wait.checked_sub(row.last.elapsed())
    }

    /// Ends one row of `uid`.
    pub fn end(&self, uid: &str, row: Row) {
        self.lock().remove(&(uid.to_owned(), row));
    }

    /// Ends all rows of `uid`: it has succeeded, or has been given up.
    pub fn clear(&self, uid: &str) {
        self.lock().retain(|(of, _), _| of != uid);
    }

    /// The node is not silent: ends the rows that say so, of all objects.
    pub fn heard_from(&self, node: &str) {
        self.lock().retain(|(_, row), count| *row != Row::Silence || count.what != node);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(String, Row), Count>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Half a second, doubled with each failure.
fn backoff(failures: u32, longest: Duration) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    Duration::from_millis(500 << doublings).min(longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_secs(60);

    fn note(failures: &Failures, row: Row, node: &str) -> Failing {
        failures.note("claim", row, node, LONGEST)
    }

    #[test]
    fn waits_double_up_to_the_limit() {
        let failures = Failures::default();
        let waits: Vec<_> = (0..10).map(|_| note(&failures, Row::Attempts, "node-a").wait.as_millis()).collect();
        assert_eq!(waits, [500, 1000, 2000, 4000, 8000, 16000, 32000, 60000, 60000, 60000]);
        failures.clear("claim");
        assert_eq!(note(&failures, Row::Attempts, "node-a").wait.as_millis(), 500);
        assert_eq!(backoff(u32::MAX, LONGEST), LONGEST);
    }

    #[test]
    fn what_is_left_of_a_wait_is_known_until_it_is_over() {
        let failures = Failures::default();
        assert_eq!(failures.left("claim", Row::Attempts), None);
        failures.note("claim", Row::Attempts, "node-a", LONGEST);
        assert!(failures.left("claim", Row::Attempts).is_some());
        assert_eq!(failures.left("claim", Row::Silence), None);
        failures.note("other", Row::Attempts, "node-a", Duration::ZERO);
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(failures.left("other", Row::Attempts), None);
    }

    #[test]
    fn another_node_begins_a_new_row() {
        let failures = Failures::default();
        note(&failures, Row::Attempts, "node-a");
        std::thread::sleep(Duration::from_millis(20));
        assert!(note(&failures, Row::Attempts, "node-a").since >= Duration::from_millis(20));
        assert!(note(&failures, Row::Attempts, "node-b").since < Duration::from_millis(20));
    }

    #[test]
    fn a_silence_is_measured_by_itself_and_ends_when_the_node_is_heard() {
        let failures = Failures::default();
        let first = |row| note(&failures, row, "node-a").wait.as_millis() == 500;
        assert!(first(Row::Attempts) && first(Row::Reconciliation) && first(Row::Silence) && first(Row::Refusals));
        failures.heard_from("node-b");
        assert!(!first(Row::Silence));
        failures.heard_from("node-a");
        assert!(first(Row::Silence));
        assert!(!first(Row::Attempts));
        failures.end("claim", Row::Attempts);
        assert!(first(Row::Attempts));
        assert!(!first(Row::Refusals));
    }
}
