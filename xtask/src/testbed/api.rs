//! Asking and telling a cluster's API server, through kubectl.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::Value;

use super::cluster::Cluster;
use super::machine::COMMAND_LIMIT;
use super::output::Output;
use crate::agent::client::Input;

/// An Event of an object.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Event {
    /// `Normal` or `Warning`.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// One word.
    #[serde(default)]
    pub reason: String,
    /// What happened.
    #[serde(default)]
    pub message: String,
    /// Who says so.
    #[serde(default, rename = "reportingComponent")]
    pub component: String,
}

impl Cluster {
    /// Runs kubectl; whatever its status, that is no error.
    ///
    /// # Errors
    /// When it cannot be started, or does not end within five minutes.
    pub fn kubectl_output<I, S>(&self, arguments: I) -> Result<Output>
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        self.kubectl_with(arguments, "")
    }

    fn kubectl_with<I, S>(&self, arguments: I, input: &str) -> Result<Output>
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        let command = self.kubectl_command(arguments.into_iter().map(Into::into).collect());
        self.control().exec_within(&command, input.as_bytes(), COMMAND_LIMIT)
    }

    /// Runs kubectl, which is to succeed; gives its standard output.
    ///
    /// # Errors
    /// As [`Cluster::kubectl_output`], and for any status but 0.
    pub fn kubectl<I, S>(&self, arguments: I) -> Result<String>
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        self.kubectl_output(arguments)?.ok()
    }

    /// Applies objects written as YAML.
    ///
    /// # Errors
    /// When the API server refuses one.
    pub fn apply(&self, yaml: &str) -> Result<String> {
        self.kubectl_with(["apply", "-f", "-"], yaml)?.ok()
    }

    /// Deletes objects written as YAML, and waits until they have gone.
    ///
    /// # Errors
    /// When they have not within five minutes.
    pub fn delete(&self, yaml: &str) -> Result<String> {
        self.kubectl_with(["delete", "--ignore-not-found", "-f", "-"], yaml)?.ok()
    }

    /// What `kubectl get … -o json` says. Arguments in one string, as
    /// `-n default pod web-0`.
    ///
    /// # Errors
    /// When there is no such object.
    pub fn get_json(&self, arguments: &str) -> Result<Value> {
        let words = ["get", "-o", "json"].into_iter().chain(arguments.split_whitespace());
        let text = self.kubectl(words)?;
        serde_json::from_str(&text).with_context(|| format!("kubectl get {arguments} gave no JSON"))
    }

    /// Waits, by watching, for what `kubectl wait --for` takes:
    /// `condition=Ready`, `jsonpath={.status.phase}=Running`, `create`, `delete`.
    /// The object in one string, as `-n default pod/web-0`.
    ///
    /// # Errors
    /// When it has not come true in time; the message tells what the object
    /// and its events look like.
    pub fn wait(&self, object: &str, condition: &str, limit: Duration) -> Result<()> {
        let mut words =
            vec!["wait".to_string(), format!("--for={condition}"), format!("--timeout={}s", limit.as_secs())];
        words.extend(object.split_whitespace().map(Into::into));
        let command = self.kubectl_command(words);
        let output = self.control().exec_within(&command, b"", limit + Duration::from_secs(10))?;
        if !output.success() {
            let words = ["describe"].into_iter().chain(object.split_whitespace());
            let described = self.kubectl_output(words)?;
            return output.ok().map(|_| ()).context(format!(
                "{object} was to be {condition} within {limit:?}; it is:\n{}{}",
                described.stdout, described.stderr
            ));
        }
        Ok(())
    }

    /// Watches objects until `accept` takes one, and gives that one. Arguments
    /// as for [`Cluster::get_json`].
    ///
    /// # Errors
    /// When none is taken in time; the message has the last one seen.
    pub fn watch(&self, arguments: &str, limit: Duration, accept: impl FnMut(&Value) -> bool) -> Result<Value> {
        let words = ["get", "-o", "json", "--watch"].into_iter().chain(arguments.split_whitespace());
        let command = self.kubectl_command(words.map(Into::into).collect());
        let deadline = Instant::now() + limit;
        let mut seeker = Seeker { accept, buffer: Vec::new(), last: None, found: None };
        let mut stderr = Vec::new();
        // kubectl's watch ends when the API server ends it: begun again.
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            stderr.clear();
            let ended = self.control().agent().exec(&command, Input::Empty, Some(left), &mut seeker, &mut stderr);
            if let Some(found) = seeker.found {
                return Ok(found);
            }
            if ended.is_ok_and(|exit| exit.shell_code() != 0) {
                std::thread::sleep(Duration::from_millis(200));
            }
        }
        bail!(
            "`kubectl get {arguments}` did not show what was waited for within {limit:?}; last seen: {}\n{}",
            seeker.last.map_or_else(|| "nothing".into(), |value| format!("{value:#}")),
            String::from_utf8_lossy(&stderr)
        )
    }

    /// The events of an object, oldest first; `kind` as `Pod`, `PersistentVolumeClaim`.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub fn events_for(&self, namespace: &str, kind: &str, name: &str) -> Result<Vec<Event>> {
        let list =
            self.get_json(&format!("--sort-by=.metadata.creationTimestamp {}", events_of(namespace, kind, name)))?;
        Ok(serde_json::from_value(list["items"].clone())?)
    }

    /// Watches the events of an object until `accept` takes one.
    ///
    /// # Errors
    /// When none comes in time; the message has those there are.
    pub fn wait_event(
        &self,
        namespace: &str,
        kind: &str,
        name: &str,
        limit: Duration,
        accept: impl Fn(&Event) -> bool,
    ) -> Result<Event> {
        let parse = |value: &Value| serde_json::from_value::<Event>(value.clone()).ok();
        let found = self
            .watch(&events_of(namespace, kind, name), limit, |value| parse(value).is_some_and(|event| accept(&event)));
        match found {
            Ok(value) => Ok(serde_json::from_value(value)?),
            Err(error) => {
                let events = self.events_for(namespace, kind, name)?;
                Err(error).context(format!("no such event for {kind} {namespace}/{name}; there are: {events:#?}"))
            }
        }
    }
}

fn events_of(namespace: &str, kind: &str, name: &str) -> String {
    format!("-n {namespace} events --field-selector involvedObject.kind={kind},involvedObject.name={name}")
}

/// Takes in concatenated JSON; says "enough", as an error, at the first accepted.
struct Seeker<F> {
    accept: F,
    buffer: Vec<u8>,
    last: Option<Value>,
    found: Option<Value>,
}

impl<F: FnMut(&Value) -> bool> Write for Seeker<F> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(data);
        let mut values = serde_json::Deserializer::from_slice(&self.buffer).into_iter::<Value>();
        let mut used = 0;
        while let Some(Ok(value)) = values.next() {
            used = values.byte_offset();
            if (self.accept)(&value) {
                self.found = Some(value);
                return Err(io::Error::other("enough seen"));
            }
            self.last = Some(value);
        }
        drop(values);
        self.buffer.drain(..used);
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
    fn a_watch_is_read_however_it_is_cut() {
        let text = br#"{"a": 1}
{"a": 2} {"a": 3}"#;
        for cut in 0..text.len() {
            let mut seeker =
                Seeker { accept: |value: &Value| value["a"] == 3, buffer: Vec::new(), last: None, found: None };
            let first = seeker.write_all(&text[..cut]);
            assert!(first.is_ok());
            assert!(seeker.write_all(&text[cut..]).is_err());
            assert_eq!(seeker.found.unwrap()["a"], 3);
            assert_eq!(seeker.last.unwrap()["a"], 2);
        }
    }
}
