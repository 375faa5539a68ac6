//! Thin pools: how much may still be promised of one.
//!
//! The admin makes the pool, and names it in the node's configuration. A thin
//! volume takes nothing of the pool until it is written to, so what counts is
//! what all volumes of the pool may come to have together: not more than the
//! pool, unless the configuration says so.

use crate::command::Kind;
use crate::config::CONFIG_PATH;
use crate::lock::Lock;
use crate::names::{LvName, VgName};
use crate::report::{self, PoolUse, ReportError, VolumeGroup};
use crate::size::human;
use crate::volume::Lvm;

/// Percent of a pool's data, or metadata, from which nothing more is promised:
/// a full pool fails the writes of all its volumes.
const FULL: u64 = 95;
const METADATA_FULL: u64 = 85;

/// A thin volume cannot be made, or cannot grow.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The node has no pool in this group.
    #[error("{CONFIG_PATH} names no thin pool for volume group {vg} (thinPools)")]
    NotConfigured {
        /// The group.
        vg: VgName,
    },
    /// The pool is not there.
    #[error(
        "volume group {vg} has no thin pool {pool}, which {CONFIG_PATH} names; make it (lvcreate --type thin-pool), or put the name right"
    )]
    Missing {
        /// The group.
        vg: VgName,
        /// The pool.
        pool: LvName,
    },
    /// The pool hands out what others have written.
    #[error("thin pool {vg}/{pool} does not zero what it hands out; have it do so (lvchange --zero y {vg}/{pool})")]
    NotZeroing {
        /// The group.
        vg: VgName,
        /// The pool.
        pool: LvName,
    },
    /// So much may not be promised.
    #[error("thin pool {vg}/{pool} has {} that are not promised yet ({room} B), {} was asked for ({asked} B): {} are missing. Ask for less, or extend the pool (lvextend)", human(*.room), human(*.asked), human(.asked.saturating_sub(*.room)))]
    Full {
        /// The group.
        vg: VgName,
        /// The pool.
        pool: LvName,
        /// Bytes asked for.
        asked: u64,
        /// Bytes that may be promised.
        room: u64,
    },
    /// It is nearly full, whatever has been promised.
    #[error(
        "thin pool {vg}/{pool} has used {data}% of its data and {metadata}% of its metadata, and nothing more is promised of it; extend it (lvextend, lvextend --poolmetadatasize)"
    )]
    NearlyFull {
        /// The group.
        vg: VgName,
        /// The pool.
        pool: LvName,
        /// Percent of its data.
        data: u64,
        /// Percent of its metadata.
        metadata: u64,
    },
    /// LVM could not be asked.
    #[error(transparent)]
    Report(#[from] ReportError),
}

impl PoolError {
    /// Whether it is only for want of room.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. } | Self::NearlyFull { .. })
    }
}

impl Lvm {
    fn pools(&self, lock: Option<&Lock>) -> Result<Vec<PoolUse>, ReportError> {
        let mut args = vec!["lvs"];
        args.extend(report::FORMAT);
        args.push(report::POOL_FIELDS);
        report::pools(&self.runner.lvm(Kind::Report, &args, lock)?.success()?.stdout)
    }

    /// As [`Lvm::volume_groups`], with what may be promised of their thin pools:
    /// one report more, on nodes that have any.
    pub fn volume_groups_and_pools(&self) -> Result<Vec<VolumeGroup>, ReportError> {
        let mut groups = self.volume_groups()?;
        if !self.config.thin_pools.is_empty() {
            let pools = self.pools(None)?;
            for group in &mut groups {
                let room = self.room(&group.name, &pools).map(|(_, room)| room - room % group.extent_size.max(1));
                // One that is nearly full is there.
                group.thin_room = match room {
                    Ok(room) => Some(if group.partial { 0 } else { room }),
                    Err(error) => error.is_full().then_some(0),
                };
            }
        }
        Ok(groups)
    }

    /// The pool of a group, and what may be promised of it.
    fn room(&self, vg: &VgName, pools: &[PoolUse]) -> Result<(LvName, u64), PoolError> {
        let vg = vg.clone();
        let Some(configured) = self.config.thin_pools.get(&vg) else {
            return Err(PoolError::NotConfigured { vg });
        };
        let pool = configured.pool.clone();
        let Some(found) = pools.iter().find(|one| one.vg == vg.as_str() && one.name == pool.as_str()) else {
            return Err(PoolError::Missing { vg, pool });
        };
        if !found.zeroes {
            return Err(PoolError::NotZeroing { vg, pool });
        }
        // Not known while it is not active, which the first of its volumes makes it.
        let (data, metadata) = (found.data.unwrap_or(0), found.metadata.unwrap_or(0));
        if data >= FULL || metadata >= METADATA_FULL {
            return Err(PoolError::NearlyFull { vg, pool, data, metadata });
        }
        let most = u128::from(found.size) * u128::from(configured.over_provisioning) / 1000;
        let room = u64::try_from(most).unwrap_or(u64::MAX).saturating_sub(found.promised);
        Ok((pool, room))
    }

    /// Whether `more` bytes may be promised of the group's pool: one report.
    pub(crate) fn check_pool(&self, lock: &Lock, vg: &VgName, more: u64) -> Result<(), PoolError> {
        let (pool, room) = self.room(vg, &self.pools(Some(lock))?)?;
        if more > room {
            return Err(PoolError::Full { vg: vg.clone(), pool, asked: more, room });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{NodeConfig, ThinPool};
    use std::collections::BTreeMap;

    const GIB: u64 = 1 << 30;

    fn room(over_provisioning: u64, change: impl FnOnce(&mut PoolUse)) -> Result<u64, PoolError> {
        let (vg, pool) = (VgName::parse("vg0").unwrap(), LvName::parse("pool0").unwrap());
        let thin_pools = BTreeMap::from([(vg.clone(), ThinPool { pool, over_provisioning })]);
        let mut found = PoolUse {
            vg: "vg0".into(),
            name: "pool0".into(),
            size: 10 * GIB,
            promised: 4 * GIB,
            data: Some(30),
            metadata: Some(12),
            zeroes: true,
        };
        change(&mut found);
        Lvm::new(NodeConfig { thin_pools, ..NodeConfig::default() }).room(&vg, &[found]).map(|(_, room)| room)
    }

    #[test]
    fn a_pool_is_promised_once_unless_told_otherwise() {
        assert_eq!(room(1000, |_| ()).unwrap(), 6 * GIB);
        assert_eq!(room(1500, |_| ()).unwrap(), 11 * GIB);
        assert_eq!(room(1000, |pool| pool.promised = 11 * GIB).unwrap(), 0);
        assert_eq!(room(1000, |pool| (pool.data, pool.metadata) = (None, None)).unwrap(), 6 * GIB);
        for full in [room(9000, |pool| pool.data = Some(95)), room(9000, |pool| pool.metadata = Some(85))] {
            assert!(full.unwrap_err().is_full());
        }
        assert!(matches!(room(1000, |pool| pool.zeroes = false), Err(PoolError::NotZeroing { .. })));
        assert!(matches!(room(1000, |pool| pool.name = "other".into()), Err(PoolError::Missing { .. })));
        assert!(matches!(room(1000, |pool| pool.vg = "vg1".into()), Err(PoolError::Missing { .. })));
    }
}
