//! lvprov's long-running halves and its admin commands.
//!
//! `node` serves the volume groups of one node over gRPC, `controller` turns
//! claims into calls to nodes, `admin` shows and cleans up what there is.

use std::error::Error;

pub mod admin;
pub mod certificates;
pub mod controller;
pub mod installer;
pub mod logging;
pub mod names;
pub mod node;
pub mod reports;
pub mod tls;
pub mod x509;

/// An error with all its causes on one line, each said once.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Many libraries repeat their cause in their own message.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[derive(Debug, thiserror::Error)]
    #[error("outer: {0}")]
    struct Repeats(#[source] std::io::Error);

    #[test]
    fn causes_are_told_once() {
        let inner = || std::io::Error::other("inner");
        assert_eq!(with_causes(&Outer(inner())), "outer: inner");
        assert_eq!(with_causes(&Repeats(inner())), "outer: inner");
    }
}
