//! Times as people write them: `90s`, `30m`, `24h`, `7d`.

use std::time::Duration;

/// A text that is no time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a time such as 90s, 30m, 24h or 7d")]
pub struct DurationError(String);

/// Parses a whole number and one of the units s, m, h, d.
pub fn parse_duration(text: &str) -> Result<Duration, DurationError> {
    let refuse = || DurationError(text.chars().take(40).collect());
    let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(refuse)?;
    let (number, unit) = text.split_at(split);
    let scale = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return Err(refuse()),
    };
    let number: u64 = number.parse().map_err(|_| refuse())?;
    // A hundred years: far from any overflow of a time.
    let seconds = number.checked_mul(scale).filter(|s| *s <= 100 * 365 * 24 * 3600).ok_or_else(refuse)?;
    Ok(Duration::from_secs(seconds))
}

/// A time in the largest unit that holds it whole, as [`parse_duration`] reads it.
pub fn show_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match [(24 * 3600, 'd'), (3600, 'h'), (60, 'm')]
        .into_iter()
        .find(|(unit, _)| seconds >= *unit && seconds.is_multiple_of(*unit))
    {
        Some((unit, letter)) => format!("{}{letter}", seconds / unit),
        None => format!("{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn times() {
        for (text, seconds) in [("0s", 0), ("90s", 90), ("30m", 1800), ("24h", 86400), ("7d", 604_800)] {
            assert_eq!(parse_duration(text).unwrap(), Duration::from_secs(seconds));
        }
        for bad in ["", "1", "s", "1w", "-1h", "1.5h", "99999999999d", "1 h", "1hh"] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_back(seconds in 0u64..10_000_000) {
            let duration = Duration::from_secs(seconds);
            prop_assert_eq!(parse_duration(&show_duration(duration)).unwrap(), duration);
        }
    }
}
