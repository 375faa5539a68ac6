//! From a call of kubelet's to an answer.

mod call;
mod log;
mod verbs;

use crate::log::Line;
use crate::verbs::Called;
use lvm::config::NodeConfig;
use serde::Serialize;
use std::ffi::OsString;
use std::panic::AssertUnwindSafe;
use std::time::Instant;

pub use call::{CallError, CallOptions, PodPath};

/// The driver's answer, as kubelet reads it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Answer {
    status: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    capabilities: Option<Capabilities>,
}

/// What the driver can do. A key that is left out has a default of kubelet's,
/// so all are named.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Capabilities {
    attach: bool,
    fs_group: bool,
    #[serde(rename = "requiresFSResize")]
    requires_fs_resize: bool,
    selinux_relabel: bool,
    supports_metrics: bool,
}

impl Answer {
    /// All is done.
    fn success() -> Self {
        Self { status: "Success", message: String::new(), capabilities: None }
    }

    /// It cannot be done; `message` becomes part of an Event on the pod.
    pub fn failure(message: String) -> Self {
        Self { status: "Failure", message, capabilities: None }
    }

    /// A verb that this driver does not have.
    fn not_supported(verb: &str) -> Self {
        Self { status: "Not supported", message: format!("verb {verb:?} is not supported"), capabilities: None }
    }

    /// The answer to `init`.
    fn init() -> Self {
        let capabilities = Capabilities {
            attach: false,
            fs_group: true,
            requires_fs_resize: true,
            selinux_relabel: true,
            supports_metrics: true,
        };
        Self { capabilities: Some(capabilities), ..Self::success() }
    }

    /// Whether kubelet is to take it as done.
    pub fn is_success(&self) -> bool {
        self.status == "Success"
    }

    /// The JSON object for standard output.
    pub fn to_json(&self) -> Vec<u8> {
        let mut json =
            serde_json::to_vec(self).unwrap_or_else(|_| br#"{"status":"Failure","message":"internal error"}"#.to_vec());
        json.push(b'\n');
        json
    }
}

/// Does what the arguments (without the program's name) ask for.
pub fn answer(args: &[OsString]) -> Answer {
    let Some(verb) = args.first() else {
        return Answer::failure(
            "this is the FlexVolume driver of lvprov: kubelet calls it with init, mount, unmount or expandfs"
                .to_owned(),
        );
    };
    let work: Verb = match verb.to_str() {
        // No lock, no file, no child: kubelet stops all volume work of the node meanwhile.
        Some("init") => return Answer::init(),
        Some("mount") => ("mount", |args, called, line| verbs::mount(args, called, line).map_err(|e| e.to_string())),
        Some("unmount") => {
            ("unmount", |args, called, line| verbs::unmount(args, called, line).map_err(|e| e.to_string()))
        }
        Some("expandfs") => {
            ("expandfs", |args, called, line| verbs::expandfs(args, called, line).map_err(|e| e.to_string()))
        }
        _ => return Answer::not_supported(&verb.to_string_lossy().chars().take(40).collect::<String>()),
    };
    run(work, &args[1..])
}

/// A verb's name, and what it does.
type Verb = (&'static str, fn(&[OsString], Called, &mut Line) -> Result<(), String>);

fn run((verb, work): Verb, args: &[OsString]) -> Answer {
    let at = Instant::now();
    let config = NodeConfig::load();
    let log_config = config.as_ref().cloned().unwrap_or_default();
    let mut line = Line { verb, ..Line::default() };
    // Here and not only in `main`: a panic has to be in the log as well.
    let done = std::panic::catch_unwind(AssertUnwindSafe(|| work(args, Called { at, config }, &mut line)))
        .unwrap_or_else(|_| Err("internal error: the driver panicked; please report it".to_owned()));
    line.failure = done.as_ref().err().cloned();
    line.took = at.elapsed();
    log::write(&log_config, &line);
    match done {
        Ok(()) => Answer::success(),
        Err(message) => Answer::failure(message),
    }
}
