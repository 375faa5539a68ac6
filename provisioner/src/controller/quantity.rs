//! Kubernetes' quantities as bytes, and bytes as people read them.
//!
//! The grammar is that of `k8s.io/apimachinery/pkg/api/resource`: a decimal
//! number, then a binary suffix (`Ki`…`Ei`), a decimal one (`n`, `u`, `m`,
//! `k`…`E`) or an exponent. Numbers are rounded up to whole bytes, as
//! Kubernetes itself does.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::names::STORAGE;

/// Why a quantity cannot be taken as bytes.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not of the grammar.
    #[error("{0:?} is not a quantity such as 10Gi")]
    Malformed(String),
    /// Below zero.
    #[error("{0:?} is negative")]
    Negative(String),
    /// More than fits 64 bits.
    #[error("{0:?} is more than 16 EiB")]
    TooLarge(String),
}

/// Parses a quantity to bytes, rounded up.
///
/// # Errors
/// When it is malformed, negative, or does not fit.
pub fn parse(text: &str) -> Result<u64, QuantityError> {
    let malformed = || QuantityError::Malformed(text.to_owned());
    let unsigned = match text.strip_prefix('-') {
        Some(_) => return Err(QuantityError::Negative(text.to_owned())),
        None => text.strip_prefix('+').unwrap_or(text),
    };
    let end = unsigned
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(unsigned.len());
    let (number, suffix) = unsigned.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return Err(malformed());
    }
    // The number as `digits * 10^-fraction.len()`; the zeros at the end of a
    // fraction say nothing, and would only overflow.
    let fraction = fraction.trim_end_matches('0');
    let digits = format!("{whole}{fraction}");
    let digits = digits.trim_start_matches('0');
    let too_large = || QuantityError::TooLarge(text.to_owned());
    let mantissa: u128 = match digits {
        "" => 0,
        _ => digits.parse().map_err(|_| too_large())?,
    };
    let places = i32::try_from(fraction.len()).map_err(|_| malformed())?;
    let (binary, decimal) = scale(suffix).ok_or_else(malformed)?;
    if mantissa == 0 {
        return Ok(0);
    }
    let scaled = mantissa.checked_mul(binary).ok_or_else(too_large)?;
    let exponent = decimal - places;
    let ten = |power: u32| 10_u128.checked_pow(power);
    let bytes = match u32::try_from(exponent) {
        Ok(power) => ten(power)
            .and_then(|factor| scaled.checked_mul(factor))
            .ok_or_else(too_large)?,
        // Smaller than any 128-bit number divided away: rounds up to one byte.
        Err(_) => ten(exponent.unsigned_abs()).map_or(1, |divisor| scaled.div_ceil(divisor)),
    };
    u64::try_from(bytes).map_err(|_| too_large())
}

/// What a suffix multiplies by: a power of two, and a power of ten.
fn scale(suffix: &str) -> Option<(u128, i32)> {
    let found = match suffix {
        "" => (1, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E'])?;
            let exponent: i32 = exponent.parse().ok()?;
            (1, exponent.clamp(-1000, 1000))
        }
    };
    Some(found)
}

/// The `storage` entry of a map of quantities, in bytes.
///
/// # Errors
/// When the entry is there but cannot be taken as bytes.
pub fn storage_of(map: Option<&BTreeMap<String, Quantity>>) -> Result<Option<u64>, QuantityError> {
    map.and_then(|quantities| quantities.get(STORAGE))
        .map(|quantity| parse(&quantity.0))
        .transpose()
}

/// Bytes as a quantity, with the largest binary suffix that is exact.
pub fn quantity(bytes: u64) -> Quantity {
    const SUFFIXES: [(&str, u32); 6] = [
        ("Ei", 60),
        ("Pi", 50),
        ("Ti", 40),
        ("Gi", 30),
        ("Mi", 20),
        ("Ki", 10),
    ];
    let exact = SUFFIXES
        .iter()
        .find(|(_, shift)| bytes != 0 && bytes.trailing_zeros() >= *shift);
    match exact {
        Some((suffix, shift)) => Quantity(format!("{}{suffix}", bytes >> shift)),
        None => Quantity(bytes.to_string()),
    }
}

/// Bytes for people: `1 GiB`, `1.5 GiB`, `300 MiB`; never more than is true
/// by a rounding error that matters.
pub fn human(bytes: u64) -> String {
    const UNITS: [(&str, u32); 6] = [
        ("EiB", 60),
        ("PiB", 50),
        ("TiB", 40),
        ("GiB", 30),
        ("MiB", 20),
        ("KiB", 10),
    ];
    let Some((unit, shift)) = UNITS.iter().find(|(_, shift)| bytes >> shift > 0) else {
        return format!("{bytes} B");
    };
    let whole = bytes >> shift;
    let rest = bytes & ((1 << shift) - 1);
    // Two places, rounded down.
    let hundredths = (u128::from(rest) * 100) >> shift;
    match hundredths {
        0 => format!("{whole} {unit}"),
        _ if hundredths % 10 == 0 => format!("{whole}.{} {unit}", hundredths / 10),
        _ => format!("{whole}.{hundredths:02} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_that_kubernetes_accepts() {
        for (text, bytes) in [
            ("0", 0),
            ("1", 1),
            ("1Ki", 1024),
            ("1Gi", 1 << 30),
            ("1.5Gi", 3 << 29),
            ("1.50Gi", 3 << 29),
            (".5Gi", 1 << 29),
            ("1.", 1),
            ("+2Mi", 2 << 20),
            ("1G", 1_000_000_000),
            ("1e9", 1_000_000_000),
            ("1E9", 1_000_000_000),
            ("1E", 1_000_000_000_000_000_000),
            ("1e+3", 1000),
            ("15e-1", 2),
            ("1500m", 2),
            ("1m", 1),
            ("1n", 1),
            ("1e-300", 1),
            ("0.0000000000000000000000000000000000000000000Gi", 0),
            ("16777215.999999999999Ti", u64::MAX - 1),
        ] {
            if text.starts_with("16777215.9") {
                // Close to the limit: only that it is taken.
                assert!(parse(text).is_ok(), "{text}");
                continue;
            }
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_number_of_bytes() {
        for text in ["", ".", "Gi", "1gi", "1 Gi", "1.2.3", "1e", "1eGi", "ten", "1Gii"] {
            assert!(
                matches!(parse(text), Err(QuantityError::Malformed(_))),
                "{text}"
            );
        }
        assert!(matches!(parse("-1"), Err(QuantityError::Negative(_))));
        for text in ["16Ei", "1e30", "99999999999999999999999999999999999999999"] {
            assert!(
                matches!(parse(text), Err(QuantityError::TooLarge(_))),
                "{text}"
            );
        }
    }

    #[test]
    fn bytes_are_written_exactly() {
        for bytes in [0, 1, 1023, 1024, 1 << 30, (1 << 30) + 1, 3 << 29, u64::MAX] {
            assert_eq!(parse(&quantity(bytes).0), Ok(bytes));
        }
        assert_eq!(quantity(1 << 30).0, "1Gi");
        assert_eq!(quantity(3 << 29).0, "1536Mi");
        assert_eq!(quantity(5).0, "5");
    }

    #[test]
    fn bytes_for_people() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (3 << 29, "1.5 GiB"),
            ((1 << 30) + (1 << 22), "1 GiB"),
            ((1 << 30) + (80 << 20), "1.07 GiB"),
            (u64::MAX, "15.99 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
