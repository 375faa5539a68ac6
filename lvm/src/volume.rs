//! Logical volumes: report, create, extend, activate, remove.
//!
//! Every change is one lvm command under its group's lock. Where the answer is
//! not yet known, one report is asked for, and never more than a decision needs.

use crate::clock::now;
use crate::command::{CGROUP, CommandError, Kind, Runner};
use crate::config::NodeConfig;
use crate::fault;
use crate::filesystem::{self, FsType};
use crate::identity::{self, DataOwner, Owner};
use crate::intent::Intent;
use crate::layout::{Layout, Shortage};
use crate::lock::{Lock, LockError};
use crate::names::{LvName, VgName, dm_name};
use crate::placement::{self, Growth};
use crate::report::{self, LogicalVolume, ReportError, VOLUME_METADATA, VolumeGroup, volumes_that_fit};
use crate::restore::{Content, SourceError};
use crate::shell::Shells;
use crate::size::{human, round_up};
use crate::snapshot::DeleteSnapshotError;
use crate::thin::PoolError;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long a caller waits for another writer of the same volume group. kubelet
/// sets no time limit, and its peers wait two minutes for an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// LVM on this node.
#[derive(Debug)]
pub struct Lvm {
    /// The node's settings.
    pub config: NodeConfig,
    pub(crate) runner: Runner,
    shells: Option<Shells>,
}

/// A data volume to be made.
#[derive(Debug, Clone)]
pub struct CreateData {
    /// Where.
    pub vg: VgName,
    /// Its name; see [`LvName::for_claim`].
    pub name: LvName,
    /// Bytes that it must have at least.
    pub size: u64,
    /// Bytes that it may have at most; 0 means no bound.
    pub limit: u64,
    /// Extent size of the group, where the caller knows it; it saves a report.
    pub extent_size: Option<u64>,
    /// How it is to lie on the disks of the group.
    pub layout: Layout,
    /// What is left of the group's metadata area, where the caller knows it:
    /// one that is full is not tried.
    pub metadata_free: Option<u64>,
    /// Whose it is.
    pub owner: DataOwner,
    /// What it is meant for.
    pub intent: Intent,
    /// The file system that it is to have; none: it is a raw device.
    pub fs: Option<FsType>,
    /// What is to be in it. None: nothing yet.
    pub content: Option<Content>,
}

impl CreateData {
    /// What `lvcreate` is to tag it with.
    pub(crate) fn tags(&self) -> Vec<String> {
        let mut tags = Owner::Data(self.owner.clone()).to_tags();
        tags.extend(self.intent.to_tags());
        tags.extend(identity::layout_tag(self.layout));
        tags
    }

    pub(crate) fn conflict(&self, reason: &str) -> CreateError {
        CreateError::Conflict { vg: self.vg.clone(), name: self.name.clone(), reason: reason.to_owned() }
    }
}

/// What an earlier call has left of a data volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Marked as new, or formatted for its owner.
    Whole,
    /// Nothing was ever written to it.
    Unwritten,
    /// Neither of the two. Mostly that call was cut off before it could wipe and
    /// mark it: then whatever it holds is a former owner's. But a volume in use
    /// that has lost its superblock looks the same, and one that is asked for again
    /// long after it was made may have been in use, as the API server's data may
    /// have been restored from a backup.
    Unmarked,
}

/// In seconds: for longer nobody goes on with a call that was cut off, unless the node is away.
const A_DAY: i64 = 24 * 3600;

/// A volume that was made just now, or found.
pub(crate) struct Begun {
    /// The group's.
    pub lock: Lock,
    /// Bytes asked for, in whole stripes.
    pub size: u64,
    /// None: it was made.
    pub found: Option<LogicalVolume>,
}

/// A data volume that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Created {
    /// Its size in bytes.
    pub size: u64,
    /// Whether an earlier call had made it.
    pub existed: bool,
    /// Whether it still has to be overwritten before anybody is given it; see
    /// [`Lvm::finish_new`].
    pub wiping: bool,
}

/// A volume could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The volume group is not on this node.
    #[error("no volume group {vg} on this node; it has: {present}")]
    NoVolumeGroup {
        /// The group asked for.
        vg: VgName,
        /// The groups that are there.
        present: String,
    },
    /// It does not fit.
    #[error("volume group {vg} has {} free ({free} B), {} was asked for ({asked} B): {} are missing{}", human(*.free), human(*.asked), human(.asked.saturating_sub(*.free)), trash_note(*.trash))]
    Full {
        /// The group.
        vg: VgName,
        /// Bytes asked for, in whole extents.
        asked: u64,
        /// Bytes free.
        free: u64,
        /// Bytes of what is in the trash.
        trash: u64,
    },
    /// It does not fit on the disks as it is to lie there.
    #[error("volume group {vg} cannot hold {}: {shortage}", human(*.asked))]
    NoDisks {
        /// The group.
        vg: VgName,
        /// Bytes asked for, in whole stripes.
        asked: u64,
        /// What is missing.
        shortage: Shortage,
    },
    /// A stripe may not be more than an extent.
    #[error("stripeSize {} is more than an extent of volume group {vg}, which has {}; ask for a smaller one", human(*.stripe), human(*.extent))]
    Stripe {
        /// The group.
        vg: VgName,
        /// Bytes of a stripe.
        stripe: u64,
        /// Bytes of an extent.
        extent: u64,
    },
    /// The thin pool cannot hold it.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The kernel cannot do it.
    #[error("this node's kernel has no module {module}, which layout {} needs; install it (modprobe {module}), or keep such volumes off this node with allowedTopologies", .layout.kind())]
    NoModule {
        /// What was asked for.
        layout: Layout,
        /// What is not there.
        module: &'static str,
    },
    /// A disk of the group is missing.
    #[error("{}", Partial(.vg))]
    Partial {
        /// The group.
        vg: VgName,
    },
    /// The group's metadata area takes no further volume.
    #[error(
        "the metadata area of volume group {vg} is full ({free} B free): no volume can be made in it, whatever is free. Remove volumes that are not needed (`lvprov gc`), or make a group with a larger one on other disks (`lvprov vg create`)"
    )]
    MetadataFull {
        /// The group.
        vg: VgName,
        /// Bytes by which its metadata can grow.
        free: u64,
    },
    /// A volume of that name is there and is another one.
    #[error("logical volume {vg}/{name} is there already and does not fit the request: {reason}")]
    Conflict {
        /// The group.
        vg: VgName,
        /// The volume.
        name: LvName,
        /// In what it differs.
        reason: String,
    },
    /// The size makes no sense.
    #[error("size {asked} B is not possible: {reason}")]
    Size {
        /// Bytes asked for.
        asked: u64,
        /// Why not.
        reason: String,
    },
    /// Its device cannot be marked or looked at.
    #[error("cannot use {device}, the new volume's device: {source}")]
    Device {
        /// The device.
        device: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The lock was not free in time.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// What it is to be made from cannot be had.
    #[error(transparent)]
    Source(Box<SourceError>),
    /// LVM could not be asked.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// LVM refused for another reason.
    #[error(transparent)]
    Command(#[from] CommandError),
}

impl From<SourceError> for CreateError {
    fn from(error: SourceError) -> Self {
        Self::Source(Box::new(error))
    }
}

/// In words: a group that has lost a disk.
struct Partial<'a>(&'a VgName);

impl std::fmt::Display for Partial<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "volume group {} has lost a disk (pvs shows which), and LVM changes nothing in it before that is back              (vgextend --restoremissing) or taken out (vgreduce --removemissing)",
            self.0
        )
    }
}

/// What became of a volume that was to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deleted {
    /// It has been removed.
    Removed,
    /// It is in the trash.
    Trashed,
    /// It was not there.
    Absent,
}

/// A volume could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// Something holds it open.
    #[error("logical volume {vg}/{name} is in use (mounted in some mount namespace, or held open); it is tried again")]
    InUse {
        /// The group.
        vg: VgName,
        /// The volume.
        name: LvName,
    },
    /// Snapshots of it are nothing without it.
    #[error(
        "logical volume {vg}/{name} has snapshots ({snapshots}), which would go with it; it is removed when they have been"
    )]
    HasSnapshots {
        /// The group.
        vg: VgName,
        /// The volume.
        name: LvName,
        /// Their names.
        snapshots: String,
    },
    /// It does not carry our tags.
    #[error("logical volume {vg}/{name} does not carry the tags of lvprov; it is left alone")]
    NotOurs {
        /// The group.
        vg: VgName,
        /// The volume.
        name: LvName,
    },
    /// What it was being copied from.
    #[error(transparent)]
    Clone(#[from] Box<DeleteSnapshotError>),
    /// The lock was not free in time.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// LVM could not be asked; the volume may well exist.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// LVM refused.
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// A volume could not be extended.
#[derive(Debug, thiserror::Error)]
pub enum ExtendError {
    /// The volume is not there.
    #[error("logical volume {vg}/{name} is not on this node")]
    Missing {
        /// The group.
        vg: VgName,
        /// The volume.
        name: LvName,
    },
    /// The group has no room.
    #[error("volume group {vg} has {} free ({free} B), growing {name} to {} needs {} more: {} are missing. Ask for less, or add a disk to the group", human(*.free), human(*.asked), human(*.more), human(.more.saturating_sub(*.free)))]
    Full {
        /// The group.
        vg: VgName,
        /// The volume.
        name: LvName,
        /// Bytes that it should have.
        asked: u64,
        /// Bytes that this takes beyond what it has.
        more: u64,
        /// Bytes free.
        free: u64,
    },
    /// Its disks, or others, have no room.
    #[error("volume group {vg} cannot grow {name} to {}: {}{shortage}. Ask for less, or add disks to the group", human(*.asked), own_disks(*.own))]
    NoDisks {
        /// The group.
        vg: VgName,
        /// The volume.
        name: LvName,
        /// Bytes that it should have, in whole stripes.
        asked: u64,
        /// What each of the disks of a mirrored volume has free, at least.
        own: Option<u64>,
        /// What other disks lack.
        shortage: Shortage,
    },
    /// The thin pool cannot hold it.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A disk of the group is missing.
    #[error("{}", Partial(.vg))]
    Partial {
        /// The group.
        vg: VgName,
    },
    /// The group's metadata area does not take the further piece.
    #[error(
        "the metadata area of volume group {vg} is full ({free} B free), so {name} cannot grow. Remove volumes that are not needed (`lvprov gc`)"
    )]
    MetadataFull {
        /// The group.
        vg: VgName,
        /// The volume.
        name: LvName,
        /// Bytes by which its metadata can grow.
        free: u64,
    },
    /// The room that a raw volume grows by has to be overwritten first; see
    /// [`crate::grow`].
    #[error("the room that {vg}/{name} grows by is overwritten with zeros first, as logical volume {vg}/{spare}")]
    Zeroing {
        /// The group.
        vg: VgName,
        /// The volume.
        name: LvName,
        /// The room.
        spare: LvName,
    },
    /// A raw volume that somebody has made another kind of.
    #[error("raw volume {vg}/{name} is of type {layout} by now, which it was not made as, and cannot grow")]
    Layout {
        /// The group.
        vg: VgName,
        /// The volume.
        name: LvName,
        /// What LVM calls it.
        layout: String,
    },
    /// LVM does not grow what has snapshots.
    #[error(
        "logical volume {vg}/{name} has snapshots ({snapshots}), and cannot grow as long as they are kept; remove them first"
    )]
    HasSnapshots {
        /// The group.
        vg: VgName,
        /// The volume.
        name: LvName,
        /// Their names.
        snapshots: String,
    },
    /// A volume of another owner has the name that is needed.
    #[error(
        "logical volume {vg}/{spare} is in the way of growing {name}, and not of its owner; remove it by hand if nobody needs it"
    )]
    InTheWay {
        /// The group.
        vg: VgName,
        /// The volume.
        name: LvName,
        /// What is in the way.
        spare: LvName,
    },
    /// The lock was not free in time.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Its device cannot be read.
    #[error("cannot read the size of {device}: {source}")]
    Device {
        /// The device.
        device: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// LVM could not be asked.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// LVM refused for another reason.
    #[error(transparent)]
    Command(#[from] CommandError),
}

fn own_disks(least: Option<u64>) -> String {
    let said = |least| {
        format!("one of the disks that its copies are on has no more than {} free, and on others ", human(least))
    };
    least.map(said).unwrap_or_default()
}

/// The device node of a logical volume. It is there only while the volume is
/// active.
pub fn device(vg: &VgName, name: &LvName) -> PathBuf {
    Path::new("/dev/mapper").join(dm_name(vg, name))
}

impl Lvm {
    /// LVM with these settings.
    pub fn new(config: NodeConfig) -> Self {
        let runner = Runner::new(config.command_log.clone());
        Self { config, runner, shells: None }
    }

    /// As [`Lvm::new`], with mutating commands in a cgroup of their own.
    pub fn in_cgroup(config: NodeConfig) -> Self {
        let runner = Runner::new(config.command_log.clone()).in_cgroup(Path::new(CGROUP));
        Self { config, runner, shells: None }
    }

    /// Keeps an lvm for each group, where the configuration says so: for a
    /// process that stays.
    pub fn keeping_lvm(mut self) -> Self {
        self.shells = if self.config.keep_lvm { Shells::new() } else { None };
        self
    }

    /// The lock of a volume group.
    pub(crate) fn lock_group(&self, vg: &VgName) -> Result<Lock, LockError> {
        match &self.shells {
            Some(shells) => shells.lock(vg, &self.runner, self.patience()),
            None => Lock::volume_group(vg, self.patience()),
        }
    }

    /// With a deadline: no lock and no child process is waited for any longer.
    pub fn until(mut self, deadline: Instant) -> Self {
        self.runner = self.runner.until(deadline);
        self
    }

    /// How long a lock is waited for.
    pub(crate) fn patience(&self) -> Duration {
        self.runner.patience(PATIENCE)
    }

    pub(crate) fn report(
        &self,
        command: &str,
        fields: &str,
        of: Option<&str>,
        lock: Option<&Lock>,
    ) -> Result<Vec<u8>, CommandError> {
        let mut args = vec![command];
        args.extend(report::FORMAT);
        args.push(fields);
        args.extend(of);
        Ok(self.runner.lvm(Kind::Report, &args, lock)?.success()?.stdout)
    }

    /// One mutating lvm command; the lock lives as long as it does.
    pub(crate) fn mutate(&self, lock: &mut Lock, args: &[String]) -> Result<(), CommandError> {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let done = self.runner.lvm(Kind::Mutate, &args, Some(lock));
        // Also after a failure: it may have got half way.
        lock.announce_change();
        done?.success()?;
        Ok(())
    }

    /// All volume groups of this node: one report.
    pub fn volume_groups(&self) -> Result<Vec<VolumeGroup>, ReportError> {
        self.groups(None)
    }

    pub(crate) fn groups(&self, lock: Option<&Lock>) -> Result<Vec<VolumeGroup>, ReportError> {
        report::volume_groups(&self.report("vgs", report::VG_FIELDS, None, lock)?)
    }

    /// All logical volumes of this node that carry our tags: one report.
    pub fn volumes(&self) -> Result<Vec<LogicalVolume>, ReportError> {
        report::volumes(&self.report("lvs", report::LV_FIELDS, None, None)?)
    }

    /// Our logical volumes of one group: one report. An error where the group
    /// is not there.
    pub(crate) fn volumes_of(&self, vg: &VgName, lock: Option<&Lock>) -> Result<Vec<LogicalVolume>, ReportError> {
        report::volumes(&self.report("lvs", report::LV_FIELDS, Some(vg.as_str()), lock)?)
    }

    /// One of our logical volumes: one report. None: it is not there, or not ours.
    pub fn find(&self, vg: &VgName, name: &LvName) -> Result<Option<LogicalVolume>, ReportError> {
        self.find_in(vg, name, None)
    }

    /// As [`Lvm::find`], under the group's lock.
    pub(crate) fn find_in(
        &self,
        vg: &VgName,
        name: &LvName,
        lock: Option<&Lock>,
    ) -> Result<Option<LogicalVolume>, ReportError> {
        Ok(self.volumes_of(vg, lock)?.into_iter().find(|lv| lv.name == *name))
    }

    /// The groups, and the one that is asked for, or an error that names those that are there.
    pub(crate) fn group(&self, vg: &VgName, lock: &Lock) -> Result<VolumeGroup, CreateError> {
        let groups = self.groups(Some(lock))?;
        let present: Vec<&str> = groups.iter().map(|group| group.name.as_str()).collect();
        let present = if present.is_empty() { "none".to_owned() } else { present.join(", ") };
        let found = groups.into_iter().find(|group| group.name == *vg);
        found.ok_or_else(|| CreateError::NoVolumeGroup { vg: vg.clone(), present })
    }

    /// Makes a data volume, or finds the one that an earlier call made: the
    /// same request gives the same volume. One mutating command, and no report
    /// where `extent_size` is known and nothing goes wrong.
    pub fn create_data(&self, request: &CreateData) -> Result<Created, CreateError> {
        if let Some(content) = &request.content {
            return self.create_from(request, content);
        }
        if request.intent.block {
            return self.create_block(request);
        }
        let uuid = identity::data_uuid(&request.owner.namespace, &request.owner.claim_uid);
        let tags = request.tags();
        let made = |size: u64| {
            self.mark(request, uuid)?;
            crate::data::note_known(&device(&request.vg, &request.name));
            fault::point("mark-after");
            Ok(Created { size, existed: false, wiping: false })
        };
        let Begun { mut lock, size, found } = self.begin(request, &tags)?;
        let Some(found) = found else { return made(size) };
        if found.marks.intent.block {
            return Err(request.conflict("it is a raw block volume, and one with a file system was asked for"));
        }
        let state = if found.open { State::Whole } else { self.state(&mut lock, &found, uuid)? };
        if state == State::Unmarked && now().saturating_sub(found.created) > A_DAY {
            return Err(request.conflict(
                "it has neither a file system that is known nor the mark of a new volume, and was made more than a day \
                 ago: there may be data on it whose superblock is lost. If it is of no use, remove it with lvremove, \
                 and the volume is made again",
            ));
        }
        if state != State::Whole {
            self.lvremove(&mut lock, &found.vg, &found.name)?;
            // It took room of its own until now.
            let disks = match request.layout {
                Layout::Linear => Vec::new(),
                Layout::Thin => self.check_thin(&lock, request, size).map(|()| Vec::new())?,
                _ => place(request, &self.group(&request.vg, &lock)?, size)?,
            };
            self.lvcreate(&mut lock, &request.vg, &request.name, size, request.layout, &tags, &disks)?;
            return made(size);
        }
        Ok(Created { size: found.size, existed: true, wiping: false })
    }

    /// Makes the logical volume of a request, or finds the one that is its
    /// owner's, of its layout, and large enough.
    pub(crate) fn begin(&self, request: &CreateData, tags: &[String]) -> Result<Begun, CreateError> {
        let mut lock = self.lock_group(&request.vg)?;
        let size = |extent| whole_stripes(request.size, request.layout, extent, request.limit);
        let planned = match (request.extent_size, request.layout) {
            (Some(extent), Layout::Linear) => Ok((size(extent)?, Vec::new())),
            (extent, Layout::Thin) => {
                let extent =
                    extent.map_or_else(|| self.group(&request.vg, &lock).map(|group| group.extent_size), Ok)?;
                let size = size(extent)?;
                let checked = self.check_thin(&lock, request, size);
                checked.map(|()| (size, Vec::new())).map_err(|error| (size, error))
            }
            _ => {
                let group = self.group(&request.vg, &lock)?;
                let size = size(group.extent_size)?;
                place(request, &group, size).map(|disks| (size, disks)).map_err(|error| (size, error))
            }
        };
        let make = |lock: &mut Lock, size: u64, disks: &[String]| {
            self.lvcreate(lock, &request.vg, &request.name, size, request.layout, tags, disks)
        };
        let known_full = request.metadata_free.is_some_and(|free| volumes_that_fit(free) == 0);
        let (size, disks, failure) = match planned {
            // An earlier call may have made the volume, or there is room by now.
            Ok((size, disks)) if known_full => (size, disks, None),
            Ok((size, disks)) => match make(&mut lock, size, &disks) {
                Ok(()) => return Ok(Begun { lock, size, found: None }),
                Err(error) => (size, disks, Some(CreateError::from(error))),
            },
            Err((size, refused)) => (size, Vec::new(), Some(refused)),
        };
        // Now it pays to ask what is there.
        let group = self.group(&request.vg, &lock)?;
        let Some(found) = self.find_in(&request.vg, &request.name, Some(&lock))? else {
            let failure = match failure {
                Some(failure) => failure,
                None if volumes_that_fit(group.metadata.free) == 0 => {
                    return Err(CreateError::MetadataFull { vg: group.name, free: group.metadata.free });
                }
                None => match make(&mut lock, size, &disks) {
                    Ok(()) => return Ok(Begun { lock, size, found: None }),
                    Err(failure) => failure.into(),
                },
            };
            return Err(self.explain(&lock, failure, group, size));
        };
        if found.marks.trashed.is_some() {
            // It was on its way to the trash: the name is needed now.
            self.to_trash(&mut lock, &found)?;
            drop(lock);
            return self.begin(request, tags);
        }
        if found.owner != Owner::Data(request.owner.clone()) {
            return Err(request.conflict("it belongs to another claim"));
        }
        if found.marks.origin.is_some() != request.content.is_some() {
            return Err(request.conflict("one of the two is a copy of another volume, and the other is not"));
        }
        if found.layout != request.layout {
            return Err(request.conflict(&format!("its layout is {} and not {}", found.layout, request.layout)));
        }
        if found.size < size {
            return Err(request.conflict(&format!("it has {} and not {}", human(found.size), human(size))));
        }
        Ok(Begun { lock, size, found: Some(found) })
    }

    fn check_thin(&self, lock: &Lock, request: &CreateData, size: u64) -> Result<(), CreateError> {
        let layout = request.layout;
        if let Some(module) = layout.missing_module() {
            return Err(CreateError::NoModule { layout, module });
        }
        Ok(self.check_pool(lock, &request.vg, size)?)
    }

    /// How far an earlier call came with a closed data volume.
    fn state(&self, lock: &mut Lock, found: &LogicalVolume, uuid: Uuid) -> Result<State, CreateError> {
        if found.half_made {
            return Ok(State::Unwritten);
        }
        let node = device(&found.vg, &found.name);
        if !found.active {
            match self.activate(lock, &found.vg, &found.name) {
                // The pool does not know it: nobody has ever written to it.
                Err(CommandError::Failed { stderr, .. })
                    if found.layout == Layout::Thin && stderr.contains("No data available") =>
                {
                    return Ok(State::Unwritten);
                }
                other => other?,
            }
        }
        let whole = || {
            let superblock = filesystem::superblock(&self.runner, &node)?;
            Ok(superblock.is_some_and(|superblock| superblock.uuid == uuid)
                || filesystem::is_new(&self.runner, &node, uuid)?)
        };
        match whole() {
            Ok(true) => Ok(State::Whole),
            Ok(false) => Ok(State::Unmarked),
            Err(source) => Err(CreateError::Device { device: node.display().to_string(), source }),
        }
    }

    /// Makes the logical volume of a log volume, under the group's lock that
    /// the caller holds.
    pub(crate) fn create_log(
        &self,
        lock: &mut Lock,
        vg: &VgName,
        name: &LvName,
        size: u64,
        owner: &Owner,
    ) -> Result<(), CreateError> {
        let mut tags = owner.to_tags();
        tags.push(identity::NEW.to_owned());
        let failure = match self.lvcreate(lock, vg, name, size, Layout::Linear, &tags, &[]) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let group = self.group(vg, lock)?;
        let size = whole_stripes(size, Layout::Linear, group.extent_size, 0)?;
        Err(self.explain(lock, failure.into(), group, size))
    }

    /// Why lvcreate failed, given what is there.
    fn explain(&self, lock: &Lock, failure: CreateError, group: VolumeGroup, asked: u64) -> CreateError {
        match failure {
            CreateError::Command(_) if group.partial => CreateError::Partial { vg: group.name },
            CreateError::Command(_) if asked > group.free => {
                let all = self.volumes_of(&group.name, Some(lock)).unwrap_or_default();
                let trash = all.iter().filter(|volume| volume.marks.trashed.is_some()).map(|volume| volume.size).sum();
                CreateError::Full { vg: group.name, asked, free: group.free, trash }
            }
            CreateError::Command(CommandError::Failed { .. }) if group.metadata.free < VOLUME_METADATA => {
                CreateError::MetadataFull { vg: group.name, free: group.metadata.free }
            }
            other => other,
        }
    }

    /// `disks`: those that it is to lie on; none: LVM chooses.
    #[allow(clippy::too_many_arguments, reason = "they are what lvcreate is told")]
    pub(crate) fn lvcreate(
        &self,
        lock: &mut Lock,
        vg: &VgName,
        name: &LvName,
        size: u64,
        layout: Layout,
        tags: &[String],
        disks: &[String],
    ) -> Result<(), CommandError> {
        let mut args: Vec<String> =
            ["lvcreate", "--yes", "--quiet", "--wipesignatures", "y"].map(str::to_owned).to_vec();
        match self.config.thin_pools.get(vg).filter(|_| layout == Layout::Thin) {
            // It zeroes by itself.
            Some(thin) => {
                args.extend(["--type", "thin", "--thinpool", thin.pool.as_str(), "--name"].map(str::to_owned));
                args.extend([name.to_string(), "--virtualsize".to_owned(), size_argument(size)]);
            }
            None => {
                args.extend(["--zero", "y", "--name"].map(str::to_owned));
                args.extend([name.to_string(), "--size".to_owned(), size_argument(size)]);
                args.extend(layout.arguments());
            }
        }
        for tag in tags {
            args.extend(["--addtag".to_owned(), tag.clone()]);
        }
        args.push(vg.to_string());
        args.extend_from_slice(disks);
        fault::point("lvcreate-before");
        fault::during("lvcreate-during");
        self.mutate(lock, &args)?;
        fault::point("lvcreate-after");
        Ok(())
    }

    pub(crate) fn lvremove(&self, lock: &mut Lock, vg: &VgName, name: &LvName) -> Result<(), CommandError> {
        fault::point("lvremove-before");
        fault::during("lvremove-during");
        self.mutate(lock, &["lvremove".into(), "--yes".into(), "--quiet".into(), format!("{vg}/{name}")])?;
        fault::point("lvremove-after");
        Ok(())
    }

    /// Removes a logical volume that is ours and closed. The same call again
    /// succeeds.
    pub fn delete(&self, vg: &VgName, name: &LvName) -> Result<Deleted, DeleteError> {
        self.delete_if(vg, name, |_| true)
    }

    /// As [`Lvm::delete`], and only where the volume found is still the one meant.
    pub fn delete_if(
        &self,
        vg: &VgName,
        name: &LvName,
        is_meant: impl FnOnce(&LogicalVolume) -> bool,
    ) -> Result<Deleted, DeleteError> {
        let mut lock = self.lock_group(vg)?;
        let Some(found) = self.find_in(vg, name, Some(&lock))? else {
            // Either it is gone, or it is somebody's without our tags.
            if device(vg, name).exists() {
                return Err(DeleteError::NotOurs { vg: vg.clone(), name: name.clone() });
            }
            drop(lock);
            self.forget_begun_clone(vg, name).map_err(Box::new)?;
            return Ok(Deleted::Absent);
        };
        if !is_meant(&found) {
            return Ok(Deleted::Absent);
        }
        if found.marks.trashed.is_some() {
            // It is on its way, and may be being wiped already.
            self.to_trash(&mut lock, &found)?;
            return Ok(Deleted::Trashed);
        }
        if found.open || crate::block::is_published(vg, name) {
            return Err(DeleteError::InUse { vg: vg.clone(), name: name.clone() });
        }
        let marks = &found.marks;
        if found.has_snapshots {
            self.refuse_snapshots(&lock, &found)?;
        }
        if marks.intent.block
            && let Some(spare) = self.find(vg, &crate::grow::spare_of(name))?
            && spare.marks.spare
            && spare.owner == found.owner
        {
            self.lvremove(&mut lock, vg, &spare.name)?;
        }
        // What nobody was ever given needs no grace.
        if matches!(found.owner, Owner::Data(_)) && marks.intent.is_trashed_first() && !(marks.wiping || marks.spare) {
            self.to_trash(&mut lock, &found)?;
            return Ok(Deleted::Trashed);
        }
        crate::data::forget_known(&device(vg, name));
        self.lvremove(&mut lock, vg, name)?;
        drop(lock);
        if let (Some(origin), Owner::Data(owner)) = (&marks.origin, &found.owner)
            && (marks.wiping || device(&origin.vg, &origin.name).exists())
        {
            self.forget_clone(origin, owner).map_err(Box::new)?;
        }
        Ok(Deleted::Removed)
    }

    /// Whether nobody has been given this data volume yet: it is still being
    /// made, or bears the mark of a new one, which the first mkfs takes away.
    pub fn is_unused(&self, found: &LogicalVolume) -> bool {
        let Owner::Data(owner) = &found.owner else { return false };
        if found.marks.wiping && found.marks.trashed.is_none() {
            return true;
        }
        let uuid = identity::data_uuid(&owner.namespace, &owner.claim_uid);
        filesystem::is_new(&self.runner, &device(&found.vg, &found.name), uuid).unwrap_or(false)
    }

    /// Extends an active logical volume to at least `size` bytes. One command,
    /// or none where it is large enough.
    pub fn extend(&self, vg: &VgName, name: &LvName, size: u64) -> Result<(), ExtendError> {
        let node = device(vg, name);
        let has = || {
            crate::mounts::device_size(&node)
                .map_err(|source| ExtendError::Device { device: node.display().to_string(), source })
        };
        if has()? >= size {
            return Ok(());
        }
        let mut lock = self.lock_group(vg)?;
        let now = has()?;
        if now >= size {
            return Ok(());
        }
        // The driver's own call, for which LVM is asked no more than it must be.
        let layout = match placement::is_plain(&node) {
            true => Layout::Linear,
            false => self.find_in(vg, name, Some(&lock))?.map_or(Layout::Linear, |found| found.layout),
        };
        self.lvextend(&mut lock, vg, name, layout, now, size)
    }

    /// Extends a logical volume of ours, active or not, to at least `size`
    /// bytes, and gives what it has then. One report, and one command where it
    /// is too small.
    pub fn extend_any(&self, vg: &VgName, name: &LvName, size: u64) -> Result<u64, ExtendError> {
        let mut lock = self.lock_group(vg)?;
        let found = self
            .find_in(vg, name, Some(&lock))?
            .ok_or_else(|| ExtendError::Missing { vg: vg.clone(), name: name.clone() })?;
        if found.size >= size {
            return Ok(found.size);
        }
        if found.has_snapshots {
            return Err(self.kept_by_snapshots(&lock, vg, name)?);
        }
        if found.marks.intent.block {
            return self.extend_block(&mut lock, &found, size);
        }
        self.lvextend(&mut lock, vg, name, found.layout, found.size, size)?;
        Ok(self.find_in(vg, name, Some(&lock))?.map_or(size, |grown| grown.size))
    }

    /// Extends a thin volume under its group's lock, and gives what it has then.
    pub(crate) fn extend_thin(
        &self,
        lock: &mut Lock,
        vg: &VgName,
        name: &LvName,
        now: u64,
        size: u64,
    ) -> Result<u64, ExtendError> {
        self.lvextend(lock, vg, name, Layout::Thin, now, size)?;
        Ok(self.find_in(vg, name, Some(lock))?.map_or(size, |grown| grown.size))
    }

    fn lvextend(
        &self,
        lock: &mut Lock,
        vg: &VgName,
        name: &LvName,
        layout: Layout,
        now: u64,
        size: u64,
    ) -> Result<(), ExtendError> {
        let placed = match layout {
            Layout::Linear => Growth { size, disks: Vec::new() },
            Layout::Thin => {
                self.check_pool(lock, vg, size.saturating_sub(now))?;
                Growth { size, disks: Vec::new() }
            }
            _ => self.place_growth(lock, vg, name, layout, now, size)?,
        };
        let mut args: Vec<String> = ["lvextend", "--yes", "--quiet", "--size"].map(str::to_owned).to_vec();
        args.extend([size_argument(placed.size), format!("{vg}/{name}")]);
        args.extend(placed.disks);
        fault::point("lvextend-before");
        fault::during("lvextend-during");
        let Err(failure) = self.mutate(lock, &args) else {
            fault::point("lvextend-after");
            return Ok(());
        };
        let Some(group) = self.groups(Some(lock))?.into_iter().find(|group| group.name == *vg) else {
            return Err(failure.into());
        };
        if group.partial {
            return Err(ExtendError::Partial { vg: vg.clone() });
        }
        if layout != Layout::Thin && !self.snapshots_on(lock, vg, name)?.is_empty() {
            return Err(self.kept_by_snapshots(lock, vg, name)?);
        }
        let asked = round_up(size, group.extent_size).unwrap_or(u64::MAX);
        let more = asked.saturating_sub(now);
        if layout.is_linear() && more > group.free {
            return Err(ExtendError::Full { vg: vg.clone(), name: name.clone(), asked, more, free: group.free });
        }
        if group.metadata.free < VOLUME_METADATA {
            return Err(ExtendError::MetadataFull { vg: vg.clone(), name: name.clone(), free: group.metadata.free });
        }
        Err(failure.into())
    }

    fn kept_by_snapshots(&self, lock: &Lock, vg: &VgName, name: &LvName) -> Result<ExtendError, ReportError> {
        let snapshots = self.snapshots_on(lock, vg, name)?.join(", ");
        Ok(ExtendError::HasSnapshots { vg: vg.clone(), name: name.clone(), snapshots })
    }

    /// Succeeds where a volume that is to go has no snapshots that would go with
    /// it.
    fn refuse_snapshots(&self, lock: &Lock, found: &LogicalVolume) -> Result<(), DeleteError> {
        let snapshots = self.snapshots_on(lock, &found.vg, &found.name)?;
        if snapshots.is_empty() {
            return Ok(());
        }
        let (vg, name) = (found.vg.clone(), found.name.clone());
        Err(DeleteError::HasSnapshots { vg, name, snapshots: snapshots.join(", ") })
    }

    /// Takes the mark of a new volume off: from now on it is never formatted again.
    pub(crate) fn no_longer_new(&self, vg: &VgName, name: &LvName) -> Result<(), LogNewError> {
        let mut lock = self.lock_group(vg)?;
        fault::point("untag-before");
        self.tag(&mut lock, vg, name, "--deltag", identity::NEW)?;
        fault::point("untag-after");
        Ok(())
    }

    /// Gives a volume a tag (`--addtag`), or takes one off (`--deltag`).
    pub(crate) fn tag(
        &self,
        lock: &mut Lock,
        vg: &VgName,
        name: &LvName,
        option: &str,
        tag: &str,
    ) -> Result<(), CommandError> {
        self.mutate(lock, &["lvchange", "--yes", "--quiet", option, tag, &format!("{vg}/{name}")].map(str::to_owned))
    }

    /// Gives a volume another name.
    pub(crate) fn rename(&self, lock: &mut Lock, vg: &VgName, from: &LvName, to: &LvName) -> Result<(), CommandError> {
        let args = ["lvrename", "--yes", "--quiet", vg.as_str(), from.as_str(), to.as_str()];
        self.mutate(lock, &args.map(str::to_owned))
    }

    /// Of a volume that has just been made.
    fn mark(&self, request: &CreateData, uuid: Uuid) -> Result<(), CreateError> {
        let node = device(&request.vg, &request.name);
        filesystem::mark_wiped(&self.runner, &node, uuid)
            .map_err(|source| CreateError::Device { device: node.display().to_string(), source })
    }

    /// Wipes whatever signatures are on a volume that is still marked as new.
    pub(crate) fn wipe(&self, lock: &Lock, node: &Path) -> Result<(), CommandError> {
        let args = ["--all".as_ref(), "--quiet".as_ref(), node.as_os_str()];
        self.runner.run(Kind::Tool, "wipefs", &args, Some(lock.fd()))?.success()?;
        Ok(())
    }

    /// Gives the volume its device node, under the group's lock that the caller
    /// holds.
    pub(crate) fn activate(&self, lock: &mut Lock, vg: &VgName, name: &LvName) -> Result<(), CommandError> {
        let mut change = |how: &str, volumes: &[String]| {
            let args = ["lvchange", "--yes", "--quiet", "--activate", how].map(str::to_owned);
            self.mutate(lock, &[&args[..], volumes].concat())
        };
        let whole = [format!("{vg}/{name}")];
        match change("y", &whole) {
            // An activation was cut off, and left some of the parts: LVM wants those taken back first.
            Err(CommandError::Failed { stderr, .. }) if stderr.contains("is prohibited while logical volume") => {
                change("n", &placement::active_parts(vg, name))?;
                change("y", &whole)
            }
            other => other,
        }
    }
}

/// Why the mark of a new log volume could not be taken off.
#[derive(Debug, thiserror::Error)]
pub enum LogNewError {
    /// The lock was not free in time.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// LVM refused.
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// The disks for a volume that is to be made; none: LVM chooses.
fn place(request: &CreateData, group: &VolumeGroup, size: u64) -> Result<Vec<String>, CreateError> {
    let layout = request.layout;
    if layout.is_linear() {
        return Ok(Vec::new());
    }
    if let Some(module) = layout.missing_module() {
        return Err(CreateError::NoModule { layout, module });
    }
    let (vg, extent) = (group.name.clone(), group.extent_size);
    if group.partial {
        return Err(CreateError::Partial { vg });
    }
    if let Some(stripe) = layout.stripe_size().filter(|stripe| *stripe > extent) {
        return Err(CreateError::Stripe { vg, stripe, extent });
    }
    match layout.place(&placement::choices(&group.disks), layout.leg(size, extent)) {
        Ok(disks) => Ok(disks.into_iter().map(placement::argument).collect()),
        Err(shortage) => Err(CreateError::NoDisks { vg, asked: size, shortage }),
    }
}

fn whole_stripes(size: u64, layout: Layout, extent: u64, limit: u64) -> Result<u64, CreateError> {
    let refuse = |reason: String| CreateError::Size { asked: size, reason };
    if size == 0 {
        return Err(refuse("it must be more than 0".to_owned()));
    }
    let rounded = layout.whole(size, extent).ok_or_else(|| refuse("it is out of range".to_owned()))?;
    if limit != 0 && rounded > limit {
        return Err(refuse(format!("in whole extents it is {rounded} B, which is over the limit of {limit} B")));
    }
    Ok(rounded)
}

/// LVM takes sizes in whole sectors only, and rounds them up to extents itself.
pub(crate) fn size_argument(size: u64) -> String {
    format!("{}b", round_up(size, 512).unwrap_or(size))
}

/// What is said of room that the trash holds.
pub fn trash_note(bytes: u64) -> String {
    match bytes {
        0 => String::new(),
        bytes => format!("; {} are in the trash, see `lvprov trash list`", human(bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_become_whole_extents_within_the_limit() {
        const LINEAR: Layout = Layout::Linear;
        let extent = 4 << 20;
        assert_eq!(whole_stripes(1, LINEAR, extent, 0).unwrap(), extent);
        assert_eq!(whole_stripes(extent, LINEAR, extent, extent).unwrap(), extent);
        assert!(whole_stripes(0, LINEAR, extent, 0).is_err());
        assert!(whole_stripes(extent + 1, LINEAR, extent, extent + 1).is_err());
        assert!(whole_stripes(u64::MAX, LINEAR, extent, 0).is_err());
        let striped = Layout::Striped { stripes: 3, stripe_size: 64 << 10 };
        assert_eq!(whole_stripes(1, striped, extent, 0).unwrap(), 3 * extent);
        assert!(whole_stripes(extent, striped, extent, 2 * extent).is_err());
    }

    #[test]
    fn a_full_group_says_what_is_missing() {
        let vg = VgName::parse("vg0").unwrap();
        let full = |trash| CreateError::Full { vg: vg.clone(), asked: 3 << 30, free: 1 << 30, trash }.to_string();
        let error = full(0);
        assert_eq!(
            error,
            "volume group vg0 has 1 GiB free (1073741824 B), 3 GiB was asked for (3221225472 B): 2 GiB are missing"
        );
        assert!(full(2 << 30).ends_with("2 GiB are missing; 2 GiB are in the trash, see `lvprov trash list`"));
        let name = LvName::parse("pvc-1").unwrap();
        let error = ExtendError::Full { vg, name, asked: 4 << 30, more: 3 << 30, free: 1 << 30 }.to_string();
        assert!(error.contains("needs 3 GiB more: 2 GiB are missing"), "{error}");
    }
}
