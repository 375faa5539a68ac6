//! Nodes and clusters to test on.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::paths;
use crate::progress::say;
use crate::sandbox::Sandbox;

mod api;
pub(crate) mod certificates;
pub mod cluster;
mod components;
pub mod guest;
pub mod image;
mod init;
mod install;
mod machine;
pub mod node;
mod output;
mod registers;
mod shared;
mod timeline;

pub use api::Event;
pub use cluster::{Cluster, ClusterNode, ClusterOptions};
pub use machine::Machine;
pub use node::{Node, NodeOptions};
pub use output::Output;
pub use shared::{Shared, is_asked_for};
pub use timeline::Timeline;

static KEEP_LOGS: AtomicBool = AtomicBool::new(false);

/// From now on, nodes and clusters that end leave their logs behind, and tell
/// where: called when a test has failed.
pub fn keep_logs() {
    KEEP_LOGS.store(true, Ordering::Relaxed);
}

/// Ends a sandbox; keeps its logs, and says where, when a test failed.
pub(crate) fn finish(sandbox: &Sandbox, failed: bool) {
    let directory = sandbox.directory().to_path_buf();
    if !directory.exists() {
        return;
    }
    if let Err(error) = sandbox.end() {
        say(format!("{error:#}"));
        return;
    }
    if (failed || KEEP_LOGS.load(Ordering::Relaxed))
        && let Some(name) = directory.file_name()
    {
        // One that is started once more has the same name.
        let mut kept = paths::kept_logs().join(name);
        while kept.exists() {
            kept.add_extension("again");
        }
        let moved = fs::create_dir_all(paths::kept_logs()).and_then(|()| fs::rename(&directory, &kept));
        say(match moved {
            Ok(()) => format!("logs are kept in {}", kept.display()),
            Err(error) => format!("logs are in {}: {error}", directory.display()),
        });
    } else {
        let _ = fs::remove_dir_all(&directory);
    }
}
