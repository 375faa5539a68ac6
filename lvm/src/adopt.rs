//! Making a volume that no PersistentVolume names the volume of a claim: one
//! that was kept when its claim went, one from the trash, or one that an admin
//! made by hand.
//!
//! In the end it is as if it had been made for that claim: its tags, the UUID
//! of its file system and its name say so, all that the driver goes by. So
//! nothing else has to know of adoption, and what proves whose a volume is
//! stays as strong. The tags come first, in one change; every step is safe to
//! repeat, and what was cut off is known by them.

use crate::command::CommandError;
use crate::fault;
use crate::filesystem::{self, FsType, UuidError};
use crate::identity::{self, DataOwner, Owner};
use crate::intent::{Intent, Marks};
use crate::layout::Layout;
use crate::lock::{Lock, LockError};
use crate::names::{ClaimUid, LvName, VgName};
use crate::report::{self, AnyVolume, ReportError};
use crate::size::human;
use crate::volume::{Lvm, device};

/// A volume, and whose it is to be.
#[derive(Debug, Clone)]
pub struct Adopt {
    /// Its group.
    pub vg: VgName,
    /// Its name now.
    pub lv: LvName,
    /// The claim whose it is by its tags. None: it has no tags of ours.
    pub from: Option<ClaimUid>,
    /// Whose it is to be.
    pub owner: DataOwner,
    /// What it is meant for, and what becomes of it in the end.
    pub intent: Intent,
    /// Its file system. None: a raw device.
    pub fs: Option<FsType>,
    /// Bytes that it must have at least.
    pub size: u64,
}

/// A volume that has been given to a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Adopted {
    /// Bytes.
    pub size: u64,
    /// How it lies on the disks, as it was made.
    pub layout: Layout,
}

/// A volume could not be given to a claim.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// It is not there.
    #[error("logical volume {vg}/{lv} is not on this node")]
    Missing {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
    },
    /// It is not what was thought.
    #[error("logical volume {vg}/{lv} cannot be given to claim {claim}: {why}. Nothing was changed")]
    Unfit {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
        /// The claim.
        claim: String,
        /// What is wrong with it.
        why: String,
    },
    /// Its device cannot be read.
    #[error("cannot read {device}: {source}")]
    Device {
        /// The device.
        device: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Its file system could not be given its UUID.
    #[error("{0}. Run the same command again once that is put right")]
    Uuid(#[from] UuidError),
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

impl Lvm {
    /// Gives a closed volume to a claim, and says what it has. The same again
    /// changes nothing.
    pub fn adopt(&self, request: &Adopt) -> Result<Adopted, AdoptError> {
        let (vg, name) = (&request.vg, LvName::for_claim(&request.owner.claim_uid));
        // Nobody mounts it meanwhile.
        let lock_volume = Lock::volume(&name, self.patience())?;
        let mut lock = self.lock_group(vg)?;
        let fields = report::LV_FIELDS;
        let all = report::any_volumes(&self.report("lvs", fields, Some(vg.as_str()), Some(&lock))?)?;
        let found = |name: &LvName| all.iter().find(|one| one.name == name.as_str());
        let there = found(&name).filter(|_| name != request.lv);
        let volume = match (found(&request.lv), there) {
            (Some(_), Some(_)) => {
                return Err(unfit(request, format!("the claim has a volume already, {vg}/{name}")));
            }
            (Some(volume), None) => volume,
            // An earlier call has come as far as that.
            (None, Some(volume)) => volume,
            (None, None) => return Err(AdoptError::Missing { vg: vg.clone(), lv: request.lv.clone() }),
        };
        let now = LvName::parse(&volume.name).map_err(|error| unfit(request, error.to_string()))?;
        check(request, volume)?;
        if crate::block::is_published(vg, &now) {
            return Err(unfit(request, "a pod has it".to_owned()));
        }
        let node = device(vg, &now);
        if volume.attr.as_bytes().get(4) != Some(&b'a') || !node.exists() {
            self.activate(&mut lock, vg, &now)?;
        }
        let superblock = filesystem::superblock(&self.runner, &node)
            .map_err(|source| AdoptError::Device { device: node.display().to_string(), source })?;
        if let Some(fs) = request.fs {
            match superblock {
                Some(found) if found.fs == fs && found.complete => {}
                Some(found) => return Err(unfit(request, format!("it has {}, and the class says {fs}", found.fs))),
                None => return Err(unfit(request, "it has no file system that lvprov knows".to_owned())),
            }
        }
        let layout = self.layout_of(&lock, request, volume, &now)?;
        self.retag(&mut lock, request, volume, &now, layout)?;
        fault::point("adopt-tagged");
        if request.fs.is_none() {
            crate::data::forget_known(&node);
        }
        let uuid = identity::data_uuid(&request.owner.namespace, &request.owner.claim_uid);
        if let Some(fs) = request.fs
            && superblock.is_some_and(|found| found.uuid != uuid)
        {
            filesystem::set_uuid(&self.runner, fs, &node, uuid)?;
        }
        fault::point("adopt-uuid");
        if now != name {
            self.rename(&mut lock, vg, &now, &name)?;
        }
        fault::point("adopt-renamed");
        drop(lock_volume);
        Ok(Adopted { size: volume.size, layout })
    }

    /// By its tag, or, where somebody made it by hand, by what LVM has made.
    fn layout_of(&self, lock: &Lock, request: &Adopt, volume: &AnyVolume, now: &LvName) -> Result<Layout, ReportError> {
        let said = identity::layout_of(volume.tags.iter().map(String::as_str));
        if request.from.is_some() || !said.is_linear() {
            return Ok(said);
        }
        let vg = &request.vg;
        let pool = self.config.thin_pools.get(vg).map(|thin| &thin.pool);
        let report = self.report("lvs", report::MADE_FIELDS, Some(&format!("{vg}/{now}")), Some(lock))?;
        report::made_as(&report, now, pool)
    }

    /// In one change from the old owner's tags to the new one's.
    fn retag(
        &self,
        lock: &mut Lock,
        request: &Adopt,
        volume: &AnyVolume,
        now: &LvName,
        layout: Layout,
    ) -> Result<(), CommandError> {
        let mut wanted = [Owner::Data(request.owner.clone()).to_tags(), request.intent.to_tags()].concat();
        // How it lies on the disks is the volume's, whoever has it.
        wanted.extend(identity::layout_tag(layout));
        let mut args: Vec<String> = ["lvchange", "--yes", "--quiet"].map(str::to_owned).to_vec();
        let mut change = |option: &str, tag: &String| args.extend([option.to_owned(), tag.clone()]);
        let old = volume.tags.iter().filter(|tag| tag.starts_with(identity::PREFIX) && !wanted.contains(tag));
        old.for_each(|tag| change("--deltag", tag));
        wanted.iter().filter(|tag| !volume.tags.contains(tag)).for_each(|tag| change("--addtag", tag));
        if args.len() == 3 {
            return Ok(());
        }
        args.push(format!("{}/{now}", request.vg));
        self.mutate(lock, &args)
    }
}

fn unfit(request: &Adopt, why: String) -> AdoptError {
    let claim = format!("{}/{}", request.owner.namespace, request.owner.claim);
    AdoptError::Unfit { vg: request.vg.clone(), lv: request.lv.clone(), claim, why }
}

/// All that can be seen without touching it.
fn check(request: &Adopt, volume: &AnyVolume) -> Result<(), AdoptError> {
    let refuse = |why: &str| Err(unfit(request, why.to_owned()));
    let tags = || volume.tags.iter().map(String::as_str);
    let new = Owner::Data(request.owner.clone());
    let marks = Marks::from_tags(tags());
    match Owner::from_tags(tags()) {
        // Cut off, or done already.
        Some(owner) if owner == new => {}
        Some(Owner::Data(owner)) => {
            if owner.cluster != request.owner.cluster {
                return refuse("it belongs to another cluster");
            }
            if request.from.as_ref() != Some(&owner.claim_uid) {
                return refuse(&format!("it is the volume of claim {}/{}", owner.namespace, owner.claim));
            }
        }
        Some(Owner::Log { .. }) => return refuse("it is a log volume"),
        None if request.from.is_some() => return refuse("it does not carry the tags of lvprov any more"),
        None if tags().any(|tag| tag.starts_with(identity::PREFIX)) => {
            return refuse(
                "it carries some of the tags of lvprov, and not all of them; look at it by hand (lvs -o+tags)",
            );
        }
        None => {}
    }
    if marks.wiping {
        return refuse("it is being wiped");
    }
    if marks.spare {
        return refuse("it is room for the growth of another volume");
    }
    // What was made as one is never handed out as the other; who made it by hand knows best.
    if request.from.is_some() && marks.intent.block != request.fs.is_none() {
        return refuse(if marks.intent.block { "it is a raw block volume" } else { "it was made for a file system" });
    }
    // lvs(8): the first letter is the type; only volumes that are nothing else to LVM.
    let attr = volume.attr.as_bytes();
    if !matches!(attr.first(), Some(b'-' | b'm' | b'M' | b'r' | b'R' | b'V' | b'l' | b'o' | b'O')) {
        return refuse("it is a snapshot, a pool or a part of another volume");
    }
    if attr.get(5) != Some(&b'-') {
        return refuse("it is in use: mounted somewhere, or held open");
    }
    if volume.size < request.size {
        return refuse(&format!("it has {}, and the claim asks for {}", human(volume.size), human(request.size)));
    }
    Ok(())
}
