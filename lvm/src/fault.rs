//! Points at which a test ends this process, or holds it until it has cut the
//! power. Only with the feature `fault-points`, which nothing that is shipped has.
//!
//! A test writes a file of the point's name below [`DIRECTORY`]. Whoever comes
//! by first takes it away, so that it happens once, and does what it says:
//! `end` ends the process there and then, as SIGKILL would, which the first
//! process of a container cannot send to itself; `hold` stays until the file
//! that tells of the hit, `<name>.hit`, is gone.

/// Where points are armed.
#[cfg(feature = "fault-points")]
pub const DIRECTORY: &str = "/run/lvprov-faults";

/// A step that is done or about to be done.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn point(_name: &'static str) {}

/// A step that is done or about to be done.
#[cfg(feature = "fault-points")]
pub fn point(name: &'static str) {
    let armed = std::path::Path::new(DIRECTORY).join(name);
    let hit = armed.with_extension("hit");
    // Atomic: of several that come by, one is hit.
    if std::fs::rename(&armed, &hit).is_err() {
        return;
    }
    match std::fs::read_to_string(&hit).unwrap_or_default().trim() {
        "hold" => {
            while hit.exists() {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
        _ => end(),
    }
}

/// A moment in the midst of the command that is started next; for a power cut,
/// which nobody has to be held for.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn during(_name: &'static str) {}

/// A moment in the midst of the command that is started next; for a power cut,
/// which nobody has to be held for.
#[cfg(feature = "fault-points")]
pub fn during(name: &'static str) {
    std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        point(name);
    });
}

#[cfg(feature = "fault-points")]
#[allow(unsafe_code)]
fn end() -> ! {
    // SAFETY: no handler runs and nothing is written: that is what is wanted.
    unsafe { libc::_exit(137) }
}
