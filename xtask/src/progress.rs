//! Saying what goes on, on standard error, and how long it took.

use std::fmt::Display;
use std::time::Instant;

/// Tells what is being done, does it, tells how long it took.
///
/// # Errors
/// Those of `work`.
pub fn step<T, E>(what: impl Display, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    let start = Instant::now();
    eprintln!("==> {what}");
    let result = work();
    let verdict = if result.is_ok() { "done" } else { "FAILED" };
    eprintln!("    {verdict} after {:.1} s: {what}", start.elapsed().as_secs_f64());
    result
}

/// One line of progress.
pub fn say(what: impl Display) {
    eprintln!("    {what}");
}
