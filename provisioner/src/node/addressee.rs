//! Whether a call has come to the node that was meant.
//!
//! Nodes are called by their IP address, and that may be another node's by now:
//! a Node object that outlives its machine keeps its address. All nodes have
//! the same certificate, so TLS does not tell them apart. What is true of the
//! wrong node ("no such volume here") would be taken for true of the right one.

use tonic::metadata::MetadataMap;

use crate::names::MEANT_NODE;

/// The call is for another node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this is node {here}, and the call is meant for {meant}: is the InternalIP of that Node object still its own?")]
pub struct Misdirected {
    here: String,
    meant: String,
}

/// A call that says it is for `meant`. Empty is no node's name.
///
/// # Errors
/// When `here` is another node.
pub fn check(here: &str, meant: &str) -> Result<(), Misdirected> {
    if here == meant {
        return Ok(());
    }
    let meant = match meant {
        "" => "no node by name".to_owned(),
        // It goes into logs and Events.
        long => format!("node {}", long.chars().take(80).collect::<String>()),
    };
    Err(Misdirected { here: here.to_owned(), meant })
}

/// A CSI call, whose message has no room for the node: its metadata may name
/// it. One that does not is served, as CSI knows no such thing.
///
/// # Errors
/// When it names another node.
pub fn check_metadata(here: &str, metadata: &MetadataMap) -> Result<(), Misdirected> {
    metadata.get_all(MEANT_NODE).iter().try_for_each(|meant| check(here, &String::from_utf8_lossy(meant.as_bytes())))
}

#[cfg(test)]
mod tests {
    use tonic::metadata::MetadataValue;

    use super::*;

    #[test]
    fn only_the_node_that_is_meant_answers() {
        check("n1", "n1").unwrap();
        let error = check("n1", "n2").unwrap_err().to_string();
        assert!(error.starts_with("this is node n1, and the call is meant for node n2"), "{error}");
        for other in ["", "N1", "n1 ", "n11"] {
            check("n1", other).unwrap_err();
        }
        assert!(check("n1", &"x".repeat(10_000)).unwrap_err().to_string().len() < 300);
    }

    #[test]
    fn a_csi_call_need_not_say_which_node_it_means() {
        let metadata = |values: &[&'static [u8]]| {
            let mut metadata = MetadataMap::new();
            for value in values {
                metadata.append(MEANT_NODE, MetadataValue::try_from(*value).unwrap());
            }
            metadata
        };
        check_metadata("n1", &metadata(&[])).unwrap();
        check_metadata("n1", &metadata(&[b"n1"])).unwrap();
        check_metadata("n1", &metadata(&[b"n2"])).unwrap_err();
        check_metadata("n1", &metadata(&[b"n1", b"n2"])).unwrap_err();
        check_metadata("n1", &metadata(&[b"\xff"])).unwrap_err();
    }
}
