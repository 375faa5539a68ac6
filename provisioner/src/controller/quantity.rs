//! Sizes as claims and PVs have them: quantities under the key `storage`.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use lvm::size::{QuantityError, parse_quantity};

use super::names::STORAGE;

/// The `storage` entry of a map of quantities, in bytes, rounded up.
///
/// # Errors
/// When the entry is there but is no number of bytes.
pub fn storage_of(map: Option<&BTreeMap<String, Quantity>>) -> Result<Option<u64>, QuantityError> {
    map.and_then(|quantities| quantities.get(STORAGE)).map(|quantity| parse_quantity(&quantity.0)).transpose()
}

/// Bytes as a quantity, with the largest binary suffix that is exact.
pub fn quantity(bytes: u64) -> Quantity {
    const SUFFIXES: [(&str, u32); 6] = [("Ei", 60), ("Pi", 50), ("Ti", 40), ("Gi", 30), ("Mi", 20), ("Ki", 10)];
    let exact = SUFFIXES.iter().find(|(_, shift)| bytes != 0 && bytes.trailing_zeros() >= *shift);
    match exact {
        Some((suffix, shift)) => Quantity(format!("{}{suffix}", bytes >> shift)),
        None => Quantity(bytes.to_string()),
    }
}

/// A map with this one size under the key `storage`.
pub fn storage(bytes: u64) -> BTreeMap<String, Quantity> {
    BTreeMap::from([(STORAGE.to_owned(), quantity(bytes))])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_written_exactly() {
        for bytes in [0, 1, 1023, 1024, 1 << 30, (1 << 30) + 1, 3 << 29, u64::MAX] {
            assert_eq!(parse_quantity(&quantity(bytes).0), Ok(bytes));
        }
        assert_eq!(quantity(1 << 30).0, "1Gi");
        assert_eq!(quantity(3 << 29).0, "1536Mi");
        assert_eq!(quantity(5).0, "5");
    }

    #[test]
    fn no_entry_is_no_size_and_a_bad_one_is_an_error() {
        assert_eq!(storage_of(None), Ok(None));
        assert_eq!(storage_of(Some(&BTreeMap::new())), Ok(None));
        assert_eq!(storage_of(Some(&storage(7))), Ok(Some(7)));
        let bad = BTreeMap::from([(STORAGE.to_owned(), Quantity("1 Gi".into()))]);
        assert!(storage_of(Some(&bad)).is_err());
    }
}
