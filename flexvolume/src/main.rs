//! The FlexVolume driver: kubelet execs it, it answers with one JSON object on
//! standard output, and not one byte on standard error, since kubelet reads
//! both together.

use lvprov_flexvolume::{Answer, answer};
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    // Whatever anybody writes to standard error from here on, it is not seen.
    if let Ok(null) = std::fs::OpenOptions::new().write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stderr(null);
    }
    std::panic::set_hook(Box::new(|_| {}));
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let answer = std::panic::catch_unwind(|| answer(&args))
        .unwrap_or_else(|_| Answer::failure("internal error: the driver panicked; please report it".to_owned()));
    match std::io::stdout().write_all(&answer.to_json()) {
        Ok(()) if answer.is_success() => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
