//! Which volume groups this node service may touch.

use std::fmt;
use std::sync::Arc;

use lvm::names::VgName;

/// The groups named by `--volume-group`; all of the node's, if none is.
#[derive(Debug, Clone, Default)]
pub struct Served {
    only: Arc<[VgName]>,
}

impl Served {
    /// These only, or all where there is none.
    pub fn new(only: &[VgName]) -> Self {
        Self { only: only.into() }
    }

    /// Those that are named; none where all are served.
    pub fn named(&self) -> &[VgName] {
        &self.only
    }

    /// Whether this group is one of them.
    pub fn includes(&self, vg: &VgName) -> bool {
        self.only.is_empty() || self.only.contains(vg)
    }
}

impl fmt::Display for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.only.is_empty() {
            return f.write_str("all");
        }
        let names: Vec<&str> = self.only.iter().map(VgName::as_str).collect();
        f.write_str(&names.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn none_named_means_all() {
        let (a, b) = (VgName::parse("a").unwrap(), VgName::parse("b").unwrap());
        assert!(Served::default().includes(&a));
        let only = Served::new(std::slice::from_ref(&a));
        assert!(only.includes(&a) && !only.includes(&b));
        assert_eq!(only.to_string(), "a");
    }
}
