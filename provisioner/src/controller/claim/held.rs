//! Claims that can be served on one node only, and wait for something there: no
//! scheduler finds them another one.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// By UID, the node that they wait for.
#[derive(Debug, Default)]
pub struct Held {
    waiting: Mutex<HashMap<String, String>>,
}

impl Held {
    /// This claim waits for this node: for its return, its labels, or its room.
    pub fn note(&self, claim_uid: String, node: String) {
        self.lock().insert(claim_uid, node);
    }

    /// Something has become of a node, or (None) of any: the UIDs of those that
    /// wait for it. They wait no longer.
    pub fn take(&self, node: Option<&str>) -> Vec<String> {
        let mut waiting = self.lock();
        let concerned = |on: &str| node.is_none_or(|node| node == on);
        let uids: Vec<String> = waiting.iter().filter(|(_, on)| concerned(on)).map(|(uid, _)| uid.clone()).collect();
        for uid in &uids {
            waiting.remove(uid);
        }
        uids
    }

    /// The claim has gone, or has its volume.
    pub fn end(&self, claim_uid: &str) {
        self.lock().remove(claim_uid);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_waits_for_its_node_and_is_told_once() {
        let held = Held::default();
        for (uid, node) in [("a", "n1"), ("b", "n2"), ("c", "n1"), ("d", "n1")] {
            held.note(uid.into(), node.into());
        }
        held.end("d");
        let mut told = held.take(Some("n1"));
        told.sort();
        assert_eq!(told, ["a", "c"]);
        assert!(held.take(Some("n1")).is_empty());
        assert_eq!(held.take(None), ["b"]);
    }
}
