//! What all listings share: the nodes that were asked, and how a result is
//! shown.

use std::io::Write;

use serde::Serialize;

use super::AdminError;
use super::fleet::Answer;

/// A node, and whether it has answered.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeReport {
    /// Name of the Node object.
    pub name: String,
    /// Whether its answer is in the result.
    pub reached: bool,
    /// Why it is not, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl NodeReport {
    /// `error`: why it did not answer.
    pub fn new(name: &str, error: Option<&str>) -> Self {
        Self { name: name.to_owned(), reached: error.is_none(), error: error.map(str::to_owned) }
    }

    /// By its answer.
    pub fn of<T>(answer: &Answer<T>) -> Self {
        Self::new(&answer.node.name, answer.result.as_ref().err().map(String::as_str))
    }

    /// The line that says so of a node that did not answer.
    pub fn unanswered(&self) -> Option<String> {
        let error = self.error.as_ref()?;
        Some(format!("node {} did not answer: {error}\n", self.name))
    }
}

/// A result. Its JSON has a `schema`, and fields are only ever added to it.
pub trait Report: Serialize {
    /// All nodes that were asked.
    fn nodes(&self) -> impl Iterator<Item = &NodeReport>;

    /// For people.
    fn text(&self) -> String;

    /// For programs.
    fn json(&self) -> String {
        // Nothing in a report can fail to be JSON.
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }

    /// Writes it to standard output.
    ///
    /// # Errors
    /// When that cannot be written.
    fn print(&self, json: bool) -> Result<(), AdminError> {
        let text = if json { self.json() } else { self.text() };
        std::io::stdout().write_all(text.as_bytes()).map_err(AdminError::Output)
    }

    /// Whether everything is in it.
    ///
    /// # Errors
    /// When a node did not answer: how many did not.
    fn complete(&self) -> Result<(), AdminError> {
        let unreached = self.nodes().filter(|node| !node.reached).count();
        match unreached {
            0 => Ok(()),
            unreached => Err(AdminError::Incomplete { unreached, nodes: self.nodes().count() }),
        }
    }
}
