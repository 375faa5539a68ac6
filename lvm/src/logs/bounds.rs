//! What an admin allows log volumes on this node.

use super::{LogError, PublishLog};
use crate::Lvm;
use crate::identity::Owner;
use crate::lock::{Lock, LockError};
use crate::names::{Namespace, VgName};
use crate::report::LogicalVolume;

impl Lvm {
    /// Refuses a request that no volume of this node could meet.
    pub(super) fn check_request(&self, request: &PublishLog) -> Result<(), LogError> {
        if request.size < request.fs.for_logs()?.minimum_size() {
            return Err(LogError::TooSmall { asked: request.size, fs: request.fs });
        }
        if !self.config.open_groups().any(|vg| *vg == request.vg) {
            let open: Vec<&str> = self.config.open_groups().map(VgName::as_str).collect();
            return Err(LogError::GroupNotOpen { vg: request.vg.clone(), open: open.join(", ") });
        }
        match self.config.logs.max_retention {
            Some(bound) if request.retention > bound => {
                Err(LogError::RetentionBound { asked: request.retention, bound })
            }
            _ => Ok(()),
        }
    }

    /// Keeps other volumes of the namespace from being made or grown meanwhile,
    /// where there is a bound to all of them together.
    pub(super) fn lock_namespace(&self, namespace: &Namespace) -> Result<Option<Lock>, LockError> {
        match self.config.logs.max_per_namespace {
            Some(_) => Lock::namespace(namespace, self.patience()).map(Some),
            None => Ok(None),
        }
    }

    /// Refuses to make a volume of `size` bytes, or to grow one from `has`, past
    /// a bound. What is there is not measured by a bound that came later.
    pub(super) fn check_size(
        &self,
        namespace: &Namespace,
        has: u64,
        size: u64,
        volumes: &[LogicalVolume],
    ) -> Result<(), LogError> {
        if let Some(bound) = self.config.logs.max_size.filter(|bound| size > *bound) {
            return Err(LogError::SizeBound { asked: size, bound });
        }
        let Some(bound) = self.config.logs.max_per_namespace else { return Ok(()) };
        let is_theirs = |lv: &&LogicalVolume| matches!(&lv.owner, Owner::Log { namespace: of, .. } if of == namespace);
        let used = volumes.iter().filter(is_theirs).fold(0u64, |sum, lv| sum.saturating_add(lv.size));
        let more = size.saturating_sub(has);
        if used.saturating_add(more) > bound {
            return Err(LogError::NamespaceBound { namespace: namespace.clone(), used, more, bound });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{LogLimits, NodeConfig};
    use crate::layout::Layout;
    use crate::names::LvName;

    const GIB: u64 = 1 << 30;

    fn lvm(max_size: Option<u64>, max_per_namespace: Option<u64>) -> Lvm {
        let logs = LogLimits { max_size, max_per_namespace, ..LogLimits::default() };
        Lvm::new(NodeConfig { logs, ..NodeConfig::default() })
    }

    fn volume(namespace: &str, name: &str, size: u64) -> LogicalVolume {
        let (namespace, volume) = (namespace.parse().unwrap(), name.parse().unwrap());
        let name = LvName::for_log(&namespace, &volume);
        let owner = Owner::Log { namespace, volume };
        LogicalVolume {
            vg: "vg0".parse().unwrap(),
            name,
            size,
            created: 0,
            active: true,
            open: true,
            new: false,
            layout: Layout::Linear,
            has_snapshots: false,
            half_made: false,
            marks: Default::default(),
            owner,
        }
    }

    #[test]
    fn a_namespace_has_what_its_volumes_leave_of_its_bound() {
        let there = [volume("shop", "a", 3 * GIB), volume("shop", "b", GIB), volume("other", "a", 9 * GIB)];
        let shop: Namespace = "shop".parse().unwrap();
        let lvm = lvm(None, Some(6 * GIB));
        assert!(lvm.check_size(&shop, 0, 2 * GIB, &there).is_ok());
        // Growing costs only what is added.
        assert!(lvm.check_size(&shop, 3 * GIB, 5 * GIB, &there).is_ok());
        let error = lvm.check_size(&shop, 0, 3 * GIB, &there).unwrap_err().to_string();
        assert!(error.contains("maxPerNamespace") && error.contains("2 GiB are left"), "{error}");
    }

    #[test]
    fn a_volume_past_the_bound_is_told_the_bound() {
        let lvm = lvm(Some(2 * GIB), None);
        let shop: Namespace = "shop".parse().unwrap();
        assert!(lvm.check_size(&shop, 0, 2 * GIB, &[]).is_ok());
        let error = lvm.check_size(&shop, 0, 2 * GIB + 1, &[]).unwrap_err().to_string();
        assert!(error.contains("maxSize") && error.contains("2 GiB"), "{error}");
    }
}
