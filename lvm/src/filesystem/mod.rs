//! File systems: what is on a device, making one, growing one.

mod aside;
mod mkfs;
mod mount_options;
mod uuid;

pub use self::uuid::{UuidError, set_uuid};
pub use aside::{GrowError, grow_unmounted};
pub use mkfs::{MkfsOptionError, MkfsOptions, NewFs, make};
pub use mount_options::{MountOptionError, MountOptions};

use crate::command::{CommandError, Kind, Runner};
use crate::device;
use ::uuid::Uuid;
use sha2::{Digest, Sha256};
use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// File systems that volumes can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FsType {
    /// XFS.
    #[default]
    Xfs,
    /// ext4.
    Ext4,
    /// Btrfs, on one device.
    Btrfs,
}

/// A file system type that is not served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("file system {name:?} is not served; use {served}")]
pub struct FsTypeError {
    name: String,
    served: &'static str,
}

impl std::str::FromStr for FsType {
    type Err = FsTypeError;
    fn from_str(text: &str) -> Result<Self, FsTypeError> {
        match text {
            "xfs" => Ok(Self::Xfs),
            "ext4" => Ok(Self::Ext4),
            "btrfs" => Ok(Self::Btrfs),
            other => Err(FsTypeError { name: other.chars().take(40).collect(), served: "xfs, ext4 or btrfs" }),
        }
    }
}

impl fmt::Display for FsType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FsType {
    /// The name that mount(2) takes.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Xfs => "xfs",
            Self::Ext4 => "ext4",
            Self::Btrfs => "btrfs",
        }
    }

    /// The least size in bytes: mkfs.xfs(8) refuses less than 300 MiB and
    /// mkfs.btrfs(8) less than 109 MiB, of which little would be left, and an
    /// ext4 of less than 16 MiB has little room left beside its journal.
    pub fn minimum_size(self) -> u64 {
        match self {
            Self::Xfs => 300 << 20,
            Self::Ext4 => 16 << 20,
            Self::Btrfs => 256 << 20,
        }
    }

    /// The type, where log volumes can have it.
    ///
    /// # Errors
    /// Where it has no project quotas: a pod's directory needs one.
    pub fn for_logs(self) -> Result<Self, FsTypeError> {
        match self {
            Self::Xfs | Self::Ext4 => Ok(self),
            Self::Btrfs => Err(FsTypeError {
                name: self.to_string(),
                served: "xfs or ext4, which have the quotas that a log volume needs",
            }),
        }
    }

    /// The program that looks at a damaged one, for messages.
    pub fn checker(self) -> &'static str {
        match self {
            Self::Xfs => "xfs_repair",
            Self::Ext4 => "e2fsck",
            Self::Btrfs => "btrfs check",
        }
    }
}

/// The superblock of a file system that we make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Superblock {
    /// Its type.
    pub fs: FsType,
    /// Its UUID.
    pub uuid: Uuid,
    /// Whether mkfs came to its end (XFS and Btrfs mark it).
    pub complete: bool,
}

/// Reads the superblock of the device. None: none of the file systems that we
/// make, which does not mean that it is blank.
pub fn superblock(runner: &Runner, device: &Path) -> io::Result<Option<Superblock>> {
    let mut head = [0; 2048];
    let read = |buffer: &mut [u8]| match device::read_head(runner, device, buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    };
    if !read(&mut head)? {
        return Ok(None);
    }
    if let Some(found) = decode_superblock(&head) {
        return Ok(Some(found));
    }
    // Btrfs has its own further back.
    let mut head = vec![0; BTRFS_AT + 128];
    Ok(if read(&mut head)? { decode_btrfs(&head[BTRFS_AT..]) } else { None })
}

/// Where Btrfs has its first superblock.
const BTRFS_AT: usize = 64 << 10;

fn decode_btrfs(block: &[u8]) -> Option<Superblock> {
    // btrfs_super_block: fsid at 32, magic at 64; another magic until mkfs is done.
    let complete = match block.get(64..72)? {
        b"_BHRfS_M" => true,
        b"!BHRfS_M" => false,
        _ => return None,
    };
    Some(Superblock { fs: FsType::Btrfs, uuid: Uuid::from_slice(block.get(32..48)?).ok()?, complete })
}

/// Whether a Btrfs has a log that only the kernel can replay.
fn btrfs_has_log(runner: &Runner, device: &Path) -> io::Result<bool> {
    let mut head = vec![0; BTRFS_AT + 128];
    device::read_head(runner, device, &mut head)?;
    // btrfs_super_block: log_root at 96.
    Ok(head[BTRFS_AT + 96..BTRFS_AT + 104] != [0; 8])
}

/// What is written at the start of a new data volume, before anybody has
/// formatted it, with the UUID that its file system will have, and a digest of
/// both its ends where they are known to be blank.
const NEW: &[u8; 16] = b"lvprov new vol 1";
/// Behind magic and UUID.
const DIGEST: Range<usize> = 32..64;
/// How long the mark is.
const SECTOR: usize = 512;
/// How much of each end of a device: whatever is known by a signature begins or ends there.
const END: u64 = 1 << 20;

/// Marks a device that has just been made for its owner: only what is marked is
/// ever formatted. A volume in use that has lost its superblock does not look
/// like a new one.
pub fn mark_new(device: &Path, uuid: Uuid) -> io::Result<()> {
    write_mark(device, uuid, [0; 32])
}

/// As [`mark_new`], of a device that LVM has just wiped: as long as both its ends
/// are as they are now, nobody needs to look for signatures again.
pub fn mark_wiped(runner: &Runner, device: &Path, uuid: Uuid) -> io::Result<()> {
    let digest = Ends::read(runner, device)?.map_or([0; 32], |ends| ends.digest);
    write_mark(device, uuid, digest)
}

fn write_mark(device: &Path, uuid: Uuid, digest: [u8; 32]) -> io::Result<()> {
    let mut sector = [0; SECTOR];
    sector[..16].copy_from_slice(NEW);
    sector[16..DIGEST.start].copy_from_slice(uuid.as_bytes());
    sector[DIGEST].copy_from_slice(&digest);
    let file = OpenOptions::new().write(true).open(device)?;
    file.write_all_at(&sector, 0)?;
    file.sync_all()
}

/// Both ends of a device.
struct Ends {
    /// Where the mark is, or would be.
    first: [u8; SECTOR],
    /// Of all the rest.
    digest: [u8; 32],
}

impl Ends {
    /// None: it is too small to have two.
    fn read(runner: &Runner, device: &Path) -> io::Result<Option<Self>> {
        let size = crate::mounts::device_size(device)?;
        if size < 2 * END {
            return Ok(None);
        }
        let (mut first, mut digest) = ([0; SECTOR], Sha256::new());
        device::read_head(runner, device, &mut first)?;
        for part in [SECTOR as u64..END, size - END..size] {
            device::read_part(runner, device, part, |piece| digest.update(piece))?;
        }
        Ok(Some(Self { first, digest: digest.finalize().into() }))
    }
}

/// Whether the device bears the mark of a new volume with this UUID.
pub fn is_new(runner: &Runner, device: &Path, uuid: Uuid) -> io::Result<bool> {
    let mut sector = [0; DIGEST.start];
    device::read_head(runner, device, &mut sector)?;
    Ok(bears_mark(&sector, uuid))
}

fn bears_mark(sector: &[u8], uuid: Uuid) -> bool {
    sector[..16] == *NEW && sector[16..DIGEST.start] == *uuid.as_bytes()
}

/// Whether the device is a new volume with this UUID, and both its ends are as
/// they were when LVM had wiped it: no signature can have come since.
pub fn is_untouched(runner: &Runner, device: &Path, uuid: Uuid) -> io::Result<bool> {
    let Some(ends) = Ends::read(runner, device)? else { return Ok(false) };
    Ok(bears_mark(&ends.first, uuid) && ends.first[DIGEST] == ends.digest)
}

/// Whether the device bears the mark of a new volume, whoever's.
pub(crate) fn is_marked_new(runner: &Runner, device: &Path) -> io::Result<bool> {
    let mut sector = [0; 16];
    device::read_head(runner, device, &mut sector)?;
    Ok(sector == *NEW)
}

fn decode_superblock(head: &[u8; 2048]) -> Option<Superblock> {
    let uuid = |at: usize| {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&head[at..at + 16]);
        Uuid::from_bytes(bytes)
    };
    if head.starts_with(b"XFSB") {
        // xfs_dsb: sb_uuid at 32, sb_inprogress at 126.
        return Some(Superblock { fs: FsType::Xfs, uuid: uuid(32), complete: head[126] == 0 });
    }
    if head[1024 + 56..1024 + 58] == [0x53, 0xef] {
        // ext4_super_block at 1024: s_magic at 56, s_uuid at 104. mke2fs writes it last.
        return Some(Superblock { fs: FsType::Ext4, uuid: uuid(1024 + 104), complete: true });
    }
    None
}

/// A device could not be proved blank.
#[derive(Debug, thiserror::Error)]
pub enum BlankError {
    /// It holds something.
    #[error(
        "{device} holds {found}: it is not formatted. If its data is of no use, wipe it by hand (wipefs) and try again"
    )]
    Occupied {
        /// The device.
        device: String,
        /// What blkid found.
        found: String,
    },
    /// It cannot be read.
    #[error("cannot read {device}: {source}")]
    Unreadable {
        /// The device.
        device: String,
        /// What the system said.
        source: io::Error,
    },
    /// Nobody could tell.
    #[error(transparent)]
    Unknown(#[from] CommandError),
}

/// Succeeds only where blkid(8), probing the device itself and no cache, finds
/// no signature of any kind.
pub fn prove_blank(runner: &Runner, device: &Path) -> Result<(), BlankError> {
    // blkid says "nothing found" of a device that it cannot read, too.
    device::read_part(runner, device, 0..END, |_| {})
        .map_err(|source| BlankError::Unreadable { device: device.display().to_string(), source })?;
    let args = ["--probe".as_ref(), "--output".as_ref(), "export".as_ref(), device.as_os_str()];
    let done = runner.run(Kind::Tool, "blkid", &args, None)?;
    // blkid(8): 2 is "nothing found", 8 "more than one signature".
    match done.status.code() {
        Some(2) if done.stdout.is_empty() && done.stderr.is_empty() => Ok(()),
        Some(0) => {
            let text = String::from_utf8_lossy(&done.stdout);
            let kind = text.lines().find_map(|line| line.strip_prefix("TYPE=").or(line.strip_prefix("PTTYPE=")));
            let found = format!("a signature ({})", kind.unwrap_or("unknown"));
            Err(BlankError::Occupied { device: device.display().to_string(), found })
        }
        Some(8) => {
            let found = "more than one signature".to_owned();
            Err(BlankError::Occupied { device: device.display().to_string(), found })
        }
        _ => Err(BlankError::Unknown(
            done.success().err().unwrap_or(CommandError::Missing { program: "blkid".to_owned() }),
        )),
    }
}

/// Grows a mounted file system to the size of its device. Does nothing where it
/// has that size already.
pub fn grow(runner: &Runner, fs: FsType, device: &Path, mounted_at: &Path) -> Result<(), CommandError> {
    match fs {
        FsType::Xfs => runner.run(Kind::Tool, "xfs_growfs", &["-d".as_ref(), mounted_at.as_os_str()], None)?,
        FsType::Ext4 => runner.run(Kind::Tool, "resize2fs", &[device.as_os_str()], None)?,
        FsType::Btrfs => {
            let args = ["filesystem".as_ref(), "resize".as_ref(), "max".as_ref(), mounted_at.as_os_str()];
            runner.run(Kind::Tool, "btrfs", &args, None)?
        }
    }
    .success()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::fd::AsFd;

    fn image(size: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        file
    }

    #[test]
    fn what_mkfs_makes_is_read_back() {
        let uuid = Uuid::from_u128(0x0f0e_7f0a_1111_8222_8333_4444_5555_6666);
        for (fs, quota) in [(FsType::Xfs, false), (FsType::Ext4, false), (FsType::Ext4, true), (FsType::Btrfs, false)] {
            let file = image(fs.minimum_size());
            assert!(!is_untouched(&Runner::default(), file.path(), uuid).unwrap(), "nobody has said that it is blank");
            assert_eq!(superblock(&Runner::default(), file.path()).unwrap(), None);
            prove_blank(&Runner::default(), file.path()).unwrap();
            let new = NewFs { fs, uuid, quota, again: false, options: &MkfsOptions::default() };
            make(&Runner::default(), file.as_file().as_fd(), file.path(), &new).unwrap();
            assert_eq!(
                superblock(&Runner::default(), file.path()).unwrap(),
                Some(Superblock { fs, uuid, complete: true })
            );
            let error = prove_blank(&Runner::default(), file.path()).unwrap_err().to_string();
            assert!(error.contains(fs.as_str()) && error.contains("wipefs"), "{error}");
        }
    }

    #[test]
    fn a_new_volume_is_marked_until_it_is_formatted() {
        let uuid = Uuid::from_u128(7);
        for fs in [FsType::Xfs, FsType::Ext4, FsType::Btrfs] {
            let file = image(fs.minimum_size());
            assert!(!is_new(&Runner::default(), file.path(), uuid).unwrap());
            mark_new(file.path(), uuid).unwrap();
            assert!(is_new(&Runner::default(), file.path(), uuid).unwrap());
            assert!(!is_new(&Runner::default(), file.path(), Uuid::from_u128(8)).unwrap());
            assert!(!is_untouched(&Runner::default(), file.path(), uuid).unwrap(), "nobody has said that it is blank");
            assert_eq!(superblock(&Runner::default(), file.path()).unwrap(), None);
            prove_blank(&Runner::default(), file.path()).unwrap();
            let new = NewFs { fs, uuid, quota: false, again: false, options: &MkfsOptions::default() };
            make(&Runner::default(), file.as_file().as_fd(), file.path(), &new).unwrap();
            assert!(!is_new(&Runner::default(), file.path(), uuid).unwrap(), "{fs}");
        }
    }

    #[test]
    fn a_wiped_volume_is_untouched_until_somebody_writes_to_its_ends() {
        let (uuid, runner) = (Uuid::from_u128(7), Runner::default());
        let file = image(16 << 20);
        let (size, untouched) = (16 << 20, |uuid| is_untouched(&runner, file.path(), uuid).unwrap());
        // What an earlier tenant has left is of no account: LVM has wiped what it knows.
        file.as_file().write_all_at(b"earlier", END - 7).unwrap();
        mark_wiped(&runner, file.path(), uuid).unwrap();
        assert!(untouched(uuid) && !untouched(Uuid::from_u128(8)));
        file.as_file().write_all_at(b"x", END).unwrap();
        file.as_file().write_all_at(b"x", size - END - 1).unwrap();
        assert!(untouched(uuid), "the middle has no signatures");
        for at in [SECTOR as u64, 4096, END - 1, size - END, size - 1] {
            let mut was = [0];
            file.as_file().read_exact_at(&mut was, at).unwrap();
            file.as_file().write_all_at(b"x", at).unwrap();
            assert!(!untouched(uuid), "{at}");
            assert!(is_new(&runner, file.path(), uuid).unwrap());
            file.as_file().write_all_at(&was, at).unwrap();
            assert!(untouched(uuid), "{at}");
        }
        for fs in [FsType::Ext4, FsType::Btrfs, FsType::Xfs] {
            let file = image(fs.minimum_size());
            mark_wiped(&runner, file.path(), uuid).unwrap();
            assert!(is_untouched(&runner, file.path(), uuid).unwrap());
            let new = NewFs { fs, uuid, quota: false, again: false, options: &MkfsOptions::default() };
            make(&runner, file.as_file().as_fd(), file.path(), &new).unwrap();
            assert!(!is_untouched(&runner, file.path(), uuid).unwrap(), "{fs}");
        }
        let small = image(1 << 20);
        mark_wiped(&runner, small.path(), uuid).unwrap();
        assert!(is_new(&runner, small.path(), uuid).unwrap() && !is_untouched(&runner, small.path(), uuid).unwrap());
    }

    #[test]
    fn an_xfs_whose_mkfs_was_cut_off_is_known_as_such() {
        let mut head = [0; 2048];
        head[..4].copy_from_slice(b"XFSB");
        head[126] = 1;
        assert!(!decode_superblock(&head).unwrap().complete);
    }

    #[test]
    fn a_btrfs_whose_mkfs_was_cut_off_is_known_as_such() {
        let mut block = [0; 128];
        block[32..48].copy_from_slice(Uuid::from_u128(7).as_bytes());
        block[64..72].copy_from_slice(b"!BHRfS_M");
        let found = Superblock { fs: FsType::Btrfs, uuid: Uuid::from_u128(7), complete: false };
        assert_eq!(decode_btrfs(&block), Some(found));
        block[64..72].copy_from_slice(b"_BHRfS_M");
        assert_eq!(decode_btrfs(&block), Some(Superblock { complete: true, ..found }));
        assert_eq!(decode_btrfs(&[0; 128]), None);
    }

    #[test]
    fn other_signatures_are_not_blank() {
        let file = image(1 << 20);
        // A swap area: neither of ours, and yet somebody's.
        file.as_file().write_all_at(b"SWAPSPACE2", 4086).unwrap();
        file.as_file().write_all_at(&[1, 0, 0, 0, 255, 0, 0, 0], 1024).unwrap();
        assert!(prove_blank(&Runner::default(), file.path()).is_err());
    }

    #[test]
    fn a_device_that_is_not_there_is_not_blank() {
        assert!(prove_blank(&Runner::default(), Path::new("/nonexistent")).is_err());
        assert!(superblock(&Runner::default(), Path::new("/nonexistent")).is_err());
    }

    proptest! {
        #[test]
        fn any_head_can_be_read(bytes in proptest::collection::vec(any::<u8>(), 2048)) {
            let head: [u8; 2048] = bytes.try_into().unwrap();
            let _ = decode_superblock(&head);
        }
    }
}
