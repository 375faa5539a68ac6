//! From a call of kubelet's to an answer.

mod call;
mod options;
mod verbs;

use serde::Serialize;
use std::ffi::OsString;

pub use call::{CallError, PodPath};
pub use options::{Options, OptionsError};

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
    let rest = &args[1..];
    let done = match verb.to_str() {
        // No lock, no file, no child: kubelet stops all volume work of the node meanwhile.
        Some("init") => return Answer::init(),
        Some("mount") => verbs::mount(rest).map_err(|error| error.to_string()),
        Some("unmount") => verbs::unmount(rest).map_err(|error| error.to_string()),
        Some("expandfs") => verbs::expandfs(rest).map_err(|error| error.to_string()),
        _ => return Answer::not_supported(&verb.to_string_lossy().chars().take(40).collect::<String>()),
    };
    match done {
        Ok(()) => Answer::success(),
        Err(message) => Answer::failure(message),
    }
}
