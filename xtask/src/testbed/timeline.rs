//! When objects of a cluster came to look how: seen by watches that run all
//! the time, to the millisecond, where the objects' own times count seconds.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::Value;

use super::cluster::Cluster;
use crate::agent::client::Input;

/// Every state of the watched objects, with the moment it was seen.
#[derive(Debug, Clone, Default)]
pub struct Timeline {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    seen: Mutex<Vec<(Instant, Value)>>,
    more: Condvar,
}

impl Cluster {
    /// Begins to watch these kinds of objects, in all namespaces, until the
    /// cluster ends.
    pub fn timeline(&self, kinds: &[&str]) -> Timeline {
        let timeline = Timeline::default();
        for kind in kinds {
            let words = ["get", kind, "--all-namespaces", "--watch", "--output-watch-events", "--output=json"];
            let command = self.kubectl_command(words.map(Into::into).to_vec());
            let agent = self.control().agent().clone();
            let mut sink = Sink { shared: Arc::clone(&timeline.shared), buffer: Vec::new() };
            thread::spawn(move || {
                // Ends with the cluster; before that the API server may end a watch.
                while agent.exec(&command, Input::Empty, None, &mut sink, &mut io::sink()).is_ok() {
                    sink.buffer.clear();
                }
            });
        }
        timeline
    }
}

impl Timeline {
    /// Whether an object was seen as it went.
    pub fn is_gone(object: &Value) -> bool {
        object["gone"] == true
    }

    /// Forgets what was seen so far.
    pub fn clear(&self) {
        self.seen().clear();
    }

    /// The first moment when an object was seen that `accept` takes, in the
    /// past or to come.
    ///
    /// # Errors
    /// When none is seen in time.
    pub fn first(&self, what: &str, limit: Duration, accept: impl Fn(&Value) -> bool) -> Result<Instant> {
        let deadline = Instant::now() + limit;
        let mut seen = self.seen();
        let mut looked_at = 0;
        loop {
            if let Some((at, _)) = seen[looked_at..].iter().find(|(_, object)| accept(object)) {
                return Ok(*at);
            }
            looked_at = seen.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("{what} was not seen within {limit:?}");
            }
            seen = self.shared.more.wait_timeout(seen, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn seen(&self) -> MutexGuard<'_, Vec<(Instant, Value)>> {
        self.shared.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes in concatenated events of a watch.
struct Sink {
    shared: Arc<Shared>,
    buffer: Vec<u8>,
}

impl Write for Sink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let now = Instant::now();
        self.buffer.extend_from_slice(data);
        let mut values = serde_json::Deserializer::from_slice(&self.buffer).into_iter::<Value>();
        let mut used = 0;
        let mut seen = self.shared.seen.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(Ok(mut event)) = values.next() {
            used = values.byte_offset();
            let mut object = event["object"].take();
            if event["type"] == "DELETED" {
                object["gone"] = true.into();
            }
            seen.push((now, object));
        }
        drop(values);
        self.buffer.drain(..used);
        self.shared.more.notify_all();
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_moment_counts_and_what_never_comes_is_an_error() {
        let timeline = Timeline::default();
        let mut sink = Sink { shared: Arc::clone(&timeline.shared), buffer: Vec::new() };
        let before = Instant::now();
        let event = |number: u8| format!(r#"{{"type": "ADDED", "object": {{"a": {number}}}}}"#);
        let (one, two) = (event(1), event(2));
        sink.write_all(format!("{one}\n{}", &two[..20]).as_bytes()).unwrap();
        thread::sleep(Duration::from_millis(5));
        sink.write_all(format!("{}\n{two}\n", &two[20..]).as_bytes()).unwrap();
        let first = timeline.first("1", Duration::ZERO, |object| object["a"] == 1).unwrap();
        let second = timeline.first("2", Duration::ZERO, |object| object["a"] == 2).unwrap();
        assert!(before <= first && second - first >= Duration::from_millis(5));
        timeline.first("3", Duration::from_millis(5), |object| object["a"] == 3).unwrap_err();
        let waiting = thread::spawn({
            let timeline = timeline.clone();
            move || {
                let gone = |object: &Value| object["a"] == 4 && Timeline::is_gone(object);
                timeline.first("4", Duration::from_secs(20), gone)
            }
        });
        sink.write_all(event(4).replace("ADDED", "DELETED").as_bytes()).unwrap();
        waiting.join().unwrap().unwrap();
        timeline.clear();
        timeline.first("1", Duration::ZERO, |object| object["a"] == 1).unwrap_err();
    }
}
