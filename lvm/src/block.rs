//! Raw block volumes: the device itself is the pod's, with no file system of
//! ours. What a new one shows would be the bytes of whoever had its extents
//! before: so it is made with the tag [`WIPING`], given to nobody as long as it
//! has that, and loses it when it holds nothing but zeros.

use crate::command::{CommandError, Kind};
use crate::fault;
use crate::identity::Owner;
use crate::intent::WIPING;
use crate::lock::{Lock, LockError};
use crate::mounts;
use crate::names::{ClaimUid, LvName, Namespace, VgName};
use crate::report::{LogicalVolume, ReportError};
use crate::restore::FillError;
use crate::snapshot::DeleteSnapshotError;
use crate::volume::{Begun, CreateData, CreateError, Created, Lvm, device};
use crate::wipe::{How, Progress, Wiped, wipe};
use nix::mount::MsFlags;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A raw volume to be given to a pod.
#[derive(Debug, Clone)]
pub struct PublishBlock {
    /// Volume group.
    pub vg: VgName,
    /// Logical volume.
    pub lv: LvName,
    /// The claim that it was made for.
    pub claim_uid: ClaimUid,
    /// Namespace of the claim.
    pub namespace: Namespace,
    /// Whether the pod may only read.
    pub read_only: bool,
    /// Whether no other pod may have it (ReadWriteOncePod).
    pub alone: bool,
    /// The file that becomes the device.
    pub target: PathBuf,
}

/// A raw volume could not be given to a pod.
#[derive(Debug, thiserror::Error)]
pub enum PublishBlockError {
    /// The volume is not there.
    #[error(
        "logical volume {vg}/{lv} is not on this node: was the disk replaced, or the volume removed by hand? Nothing was made in its place"
    )]
    Missing {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
    },
    /// The volume is not that of the claim.
    #[error("logical volume {vg}/{lv} does not belong to claim {claim_uid} of namespace {namespace}; no pod gets it")]
    NotTheClaims {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
        /// The claim named.
        claim_uid: ClaimUid,
        /// The namespace named.
        namespace: Namespace,
    },
    /// It was made for a file system.
    #[error(
        "logical volume {vg}/{lv} was made for a file system and is never given out as a raw device; its PersistentVolume should say volumeMode Filesystem"
    )]
    NotBlock {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
    },
    /// It still shows what it held before.
    #[error("logical volume {vg}/{lv} is not overwritten with zeros yet; no pod gets it before")]
    Wiping {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
    },
    /// LVM would look at what pods write.
    #[error(
        "this node's LVM looks at loop devices, and kubelet puts one upon each raw volume: what a pod writes there would be taken for a physical volume. Put \"r|^/dev/loop|\" in front of devices/global_filter in /etc/lvm/lvm.conf of the node"
    )]
    LoopsAreScanned,
    /// Another pod has a volume that is for one alone.
    #[error(
        "logical volume {vg}/{lv} is for one pod alone (ReadWriteOncePod), and is at {path}; this pod gets it when that one has ended"
    )]
    NotAlone {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
        /// Where it is.
        path: String,
    },
    /// Something else is at the target already.
    #[error("something else is at {target} already; remove it first")]
    TargetTaken {
        /// The target.
        target: String,
    },
    /// The device or the target cannot be used.
    #[error("cannot use {path}: {source}")]
    Io {
        /// The path.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The lock was not free in time.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// LVM could not be asked.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// Activating it failed.
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// A volume could not be overwritten.
#[derive(Debug, thiserror::Error)]
pub enum WipeError {
    /// It is not there, or has no such mark.
    #[error("logical volume {vg}/{lv} is not there, or not to be overwritten")]
    NotMarked {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
    },
    /// Its device cannot be written.
    #[error("cannot overwrite {device}: {source}; it is tried again")]
    Device {
        /// The device.
        device: String,
        /// What the system said.
        source: io::Error,
    },
    /// It could not be made a copy.
    #[error(transparent)]
    Fill(#[from] FillError),
    /// It is a copy, and what it was copied from cannot be removed.
    #[error(transparent)]
    Clone(#[from] DeleteSnapshotError),
    /// The lock was not free in time.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// LVM could not be asked.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// LVM refused.
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// Whether LVM looks at loop devices, by what lvmconfig(8) says of its filters
/// and its devices file (lvmdevices(8)). In doubt it does.
fn loops_are_scanned(config: &str, has_devices_file: bool) -> bool {
    let value = |key: &str| config.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='));
    if value("use_devicesfile").is_some_and(|value| value.trim() == "1") && has_devices_file {
        return false;
    }
    // The first pattern that matches decides (lvm.conf(5)).
    let rejects = |list: &str| {
        for pattern in list.split('"').skip(1).step_by(2) {
            // A letter, a delimiter, the expression, the delimiter.
            let mut rest = pattern.chars();
            let (kind, _) = (rest.next(), rest.next());
            rest.next_back();
            let regex = rest.as_str();
            let all = matches!(regex, "" | ".*" | "^.*$" | ".*/");
            match kind {
                Some('r') if all || regex.contains("loop") => return true,
                Some('a') if all || regex.contains("loop") || regex == "^/dev/" || regex == "/dev/" => return false,
                _ => {}
            }
        }
        false
    };
    !["global_filter", "filter"].into_iter().filter_map(value).any(rejects)
}

/// The places of this mount namespace at which a device node stands for the
/// volume: bind mounts of its node.
fn published_at(vg: &VgName, lv: &LvName) -> io::Result<Vec<PathBuf>> {
    let number = match mounts::device_number(&device(vg, lv)) {
        Ok(number) => number,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let all = mounts::all()?.into_iter().map(|mount| (mount.is_of_a_node(), mount.target));
    Ok(all.filter(|(node, at)| *node && mounts::device_number(at).ok() == Some(number)).map(|(_, at)| at).collect())
}

/// Whether a pod has the volume as a raw device, opened or not. What cannot be
/// looked at counts as given out.
pub fn is_published(vg: &VgName, lv: &LvName) -> bool {
    published_at(vg, lv).map_or(true, |places| !places.is_empty())
}

impl Lvm {
    /// As [`Lvm::create_data`], for a raw volume. It is not ready before
    /// [`Lvm::finish_new`] has come to its end.
    pub(crate) fn create_block(&self, request: &CreateData) -> Result<Created, CreateError> {
        let tags = [request.tags(), vec![WIPING.to_owned()]].concat();
        let Begun { size, found, .. } = self.begin(request, &tags)?;
        let Some(found) = found else { return Ok(Created { size, existed: false, wiping: true }) };
        if !found.marks.intent.block {
            return Err(request.conflict("it was made for a file system, and a raw block volume was asked for"));
        }
        Ok(Created { size: found.size, existed: true, wiping: found.marks.wiping })
    }

    /// Brings a volume that bears the mark [`WIPING`] to where it can be given
    /// out, and takes the mark off: overwrites it with zeros, or with what it is
    /// to be a copy of. No lock is held meanwhile. `go_on` as in [`wipe`].
    pub fn finish_new(
        &self,
        vg: &VgName,
        lv: &LvName,
        go_on: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Wiped, WipeError> {
        let not_marked = || WipeError::NotMarked { vg: vg.clone(), lv: lv.clone() };
        let found = self.find(vg, lv)?.ok_or_else(not_marked)?;
        let marks = &found.marks;
        if marks.trashed.is_some() || !(marks.intent.block || marks.spare || marks.origin.is_some()) {
            return Err(not_marked());
        }
        if !marks.wiping {
            return Ok(Wiped::Whole);
        }
        let (wiped, progress) = match &marks.origin {
            Some(origin) => self.fill(&found, origin, go_on)?,
            None => {
                let (wiped, progress) = self.wipe_volume(&found, How::Zero, "new", go_on)?;
                (wiped, Some(progress))
            }
        };
        if wiped == Wiped::Whole {
            let mut lock = self.lock_group(vg)?;
            fault::point("zeroed-before");
            self.tag(&mut lock, vg, lv, "--deltag", WIPING)?;
            if let Some(progress) = progress {
                progress.forget();
            }
            fault::point("zeroed-after");
            drop(lock);
            if let (Some(origin), Owner::Data(owner)) = (&marks.origin, &found.owner) {
                self.forget_clone(origin, owner)?;
            }
        }
        Ok(wiped)
    }

    /// Wipes the device of a volume that nobody may use.
    pub(crate) fn wipe_volume(
        &self,
        found: &LogicalVolume,
        how: How,
        purpose: &str,
        go_on: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<(Wiped, Progress), WipeError> {
        let node = device(&found.vg, &found.name);
        if !found.active || !node.exists() {
            self.activate(&mut self.lock_group(&found.vg)?, &found.vg, &found.name)?;
        }
        let failed = |source| WipeError::Device { device: node.display().to_string(), source };
        let progress = Progress::of(&node, purpose).map_err(failed)?;
        fault::point("wipe-before");
        let mut go_on = |done, total| {
            if done > 0 {
                fault::point("wipe-piece");
            }
            go_on(done, total)
        };
        let wiped = wipe(&self.runner, &node, how, &progress, &mut go_on).map_err(failed)?;
        Ok((wiped, progress))
    }

    /// Gives a raw volume to a pod: the device's node, mounted upon a file at
    /// the target. The same call again changes nothing.
    ///
    /// Its bytes are the pod's own, and prove nothing: whose it is, is asked of
    /// LVM each time.
    pub fn publish_block(&self, request: &PublishBlock) -> Result<(), PublishBlockError> {
        let (vg, lv) = (request.vg.clone(), request.lv.clone());
        let lock = Lock::volume(&lv, self.patience())?;
        let Some(found) = self.find(&vg, &lv)? else { return Err(PublishBlockError::Missing { vg, lv }) };
        match &found.owner {
            Owner::Data(owner) if owner.claim_uid == request.claim_uid && owner.namespace == request.namespace => {}
            _ => {
                let (claim_uid, namespace) = (request.claim_uid.clone(), request.namespace.clone());
                return Err(PublishBlockError::NotTheClaims { vg, lv, claim_uid, namespace });
            }
        }
        if found.marks.trashed.is_some() {
            return Err(PublishBlockError::Missing { vg, lv });
        }
        if !found.marks.intent.block {
            return Err(PublishBlockError::NotBlock { vg, lv });
        }
        if found.marks.wiping {
            return Err(PublishBlockError::Wiping { vg, lv });
        }
        let node = device(&vg, &lv);
        if !found.active || !node.exists() {
            self.activate(&mut self.lock_group(&vg)?, &vg, &lv)?;
        }
        let fields = ["devices/global_filter", "devices/filter", "devices/use_devicesfile"];
        let args = [&["lvmconfig", "--type", "full"][..], &fields].concat();
        let config = self.runner.run(Kind::Report, "lvm", &args, None)?.success()?;
        let devices = Path::new("/etc/lvm/devices/system.devices").exists();
        if loops_are_scanned(&String::from_utf8_lossy(&config.stdout), devices) {
            return Err(PublishBlockError::LoopsAreScanned);
        }
        let target = &request.target;
        let at = |path: &Path| {
            let path = path.display().to_string();
            move |source| PublishBlockError::Io { path, source }
        };
        if mounts::at(target).map_err(at(target))?.is_some() {
            let number = mounts::device_number(&node).map_err(at(&node))?;
            return match mounts::device_number(target) {
                Ok(there) if there == number => Ok(()),
                _ => Err(PublishBlockError::TargetTaken { target: target.display().to_string() }),
            };
        }
        if request.alone
            && let Some(other) = published_at(&vg, &lv).map_err(at(&node))?.first()
        {
            return Err(PublishBlockError::NotAlone { vg, lv, path: other.display().to_string() });
        }
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent).map_err(at(parent))?;
        }
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(target);
        match made {
            Ok(_) => {}
            // What an interrupted call has left.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let there = std::fs::symlink_metadata(target).map_err(at(target))?;
                if !there.is_file() || there.len() != 0 {
                    return Err(PublishBlockError::TargetTaken { target: target.display().to_string() });
                }
            }
            Err(error) => return Err(at(target)(error)),
        }
        fault::point("block-bind-before");
        nix::mount::mount(Some(&node), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(|error| at(target)(error.into()))?;
        if request.read_only {
            mounts::make_read_only_or_unmount(target).map_err(at(target))?;
        }
        fault::point("block-bind-after");
        drop(lock);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_first_filter_that_matches_decides_about_loop_devices() {
        let scanned = |config: &str| loops_are_scanned(config, false);
        for safe in [
            "global_filter=[\"r|^/dev/loop|\",\"a|.*|\"]\nfilter=[\"a|.*|\"]\nuse_devicesfile=0",
            "filter=[\"a|^/dev/sd|\",\"r|.*|\"]",
            "global_filter=\"r/loop/\"",
            "filter=[\"a|/dev/nvme.*|\",\"r/.*/\"]",
        ] {
            assert!(!scanned(safe), "{safe}");
        }
        for unsafe_ in [
            "global_filter=[\"a|.*|\"]\nfilter=[\"a|.*|\"]\nuse_devicesfile=0",
            "global_filter=[\"a|.*|\",\"r|loop|\"]",
            "global_filter=[\"a|loop|\",\"r|.*|\"]",
            "",
            "global_filter=[]",
            "use_devicesfile=1",
        ] {
            assert!(scanned(unsafe_), "{unsafe_}");
        }
        assert!(!loops_are_scanned("use_devicesfile=1", true));
    }

    proptest! {
        #[test]
        fn any_configuration_is_read(config in "[\\PC\n\"]{0,80}", pattern in "\\PC{0,6}") {
            let _ = loops_are_scanned(&config, false);
            let _ = loops_are_scanned(&format!("filter=[\"{pattern}\"]"), true);
        }
    }
}
