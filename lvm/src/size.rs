//! Sizes: bytes inside, Kubernetes quantities and readable text at the edges.

/// A quantity that was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not a number with a known suffix.
    #[error("size {0:?} is not a quantity such as 10Gi, 500M or 1.5Ti")]
    Malformed(String),
    /// Negative, or more than 2^64 - 1 bytes.
    #[error("size {0:?} is out of range")]
    OutOfRange(String),
}

/// Parses a Kubernetes quantity (`1Gi`, `1.5G`, `1e9`, `100`) into bytes; a
/// fraction of a byte is rounded up, as Kubernetes does.
pub fn parse_quantity(text: &str) -> Result<u64, QuantityError> {
    let shown = || text.chars().take(40).collect::<String>();
    let malformed = || QuantityError::Malformed(shown());
    let range = || QuantityError::OutOfRange(shown());
    if let Some(rest) = text.strip_prefix('-') {
        // Only a well-formed negative number is out of range.
        return Err(parse_quantity(rest).map_or_else(|_| malformed(), |_| range()));
    }
    let body = text.strip_prefix('+').unwrap_or(text);
    let split = body.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(body.len());
    let (number, suffix) = body.split_at(split);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return Err(malformed());
    }
    // value = digits * factor / divisor
    let (factor, mut divisor): (u128, u128) = match suffix {
        "" => (1, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1_000),
        "k" => (1_000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        exponent => {
            let digits = exponent.strip_prefix(['e', 'E']).ok_or_else(malformed)?;
            let power: i32 = digits.parse().map_err(|_| malformed())?;
            let scale = 10u128.checked_pow(power.unsigned_abs()).ok_or_else(range)?;
            if power < 0 { (1, scale) } else { (scale, 1) }
        }
    };
    let fraction = fraction.trim_end_matches('0');
    let places = u32::try_from(fraction.len()).map_err(|_| range())?;
    divisor = 10u128.checked_pow(places).and_then(|p| p.checked_mul(divisor)).ok_or_else(range)?;
    let digits = format!("{}{fraction}", whole.trim_start_matches('0'));
    let digits: u128 = if digits.is_empty() { 0 } else { digits.parse().map_err(|_| range())? };
    let bytes = digits.checked_mul(factor).ok_or_else(range)?.div_ceil(divisor);
    u64::try_from(bytes).map_err(|_| range())
}

/// Bytes for people: `1 GiB`, `1.5 GiB`, `300 MiB`, `17 B`.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut unit, mut scale) = (0, 1024u64);
    while unit + 1 < UNITS.len() && bytes / scale >= 1024 {
        scale *= 1024;
        unit += 1;
    }
    let tenths = (u128::from(bytes) * 10 / u128::from(scale)) as u64;
    if tenths.is_multiple_of(10) || tenths >= 1000 {
        format!("{} {}", tenths / 10, UNITS[unit])
    } else {
        format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
    }
}

/// `bytes` rounded up to whole extents. None: more than 2^64 - 1.
pub fn round_up(bytes: u64, extent: u64) -> Option<u64> {
    bytes.checked_next_multiple_of(extent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn quantities_as_kubernetes_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("1", 1),
            ("1Ki", 1024),
            ("1Gi", 1 << 30),
            ("1.5Gi", 3 << 29),
            ("0.5", 1),
            ("100m", 1),
            ("1500m", 2),
            ("1k", 1000),
            ("1e3", 1000),
            ("1E3", 1000),
            ("12e-1", 2),
            ("1E", 1_000_000_000_000_000_000),
            (".5Ki", 512),
            ("5.Ki", 5120),
            ("+1Mi", 1 << 20),
            ("0001", 1),
            ("1.000Gi", 1 << 30),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_quantity(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", " ", "Gi", ".", "1.2.3", "1 Gi", "1gi", "1GiB", "0x10", "1e", "ein", "--1", "1,5Gi", "1Gi "] {
            assert!(matches!(parse_quantity(text), Err(QuantityError::Malformed(_))), "{text:?}");
        }
        for text in ["-1", "-1Gi", "16Ei", "18446744073709551616", "1e40", "999999999999999999999999999999999999999999"]
        {
            assert!(matches!(parse_quantity(text), Err(QuantityError::OutOfRange(_))), "{text:?}");
        }
    }

    #[test]
    fn sizes_for_people() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (300 << 20, "300 MiB"),
            (1 << 30, "1 GiB"),
            ((1 << 30) + (1 << 29), "1.5 GiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[-+0-9.eEKMGTPikmun]{0,50}") {
            let _ = parse_quantity(&text);
        }

        #[test]
        fn plain_bytes_go_through(bytes: u64) {
            prop_assert_eq!(parse_quantity(&bytes.to_string()), Ok(bytes));
            prop_assert!(!human(bytes).is_empty());
        }
    }
}
