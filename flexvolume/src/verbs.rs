//! mount, unmount, expandfs.

use crate::call::{CallError, CallOptions, PodPath};
use crate::log::{Line, volume_of};
use lvm::Lvm;
use lvm::config::{ConfigError, NodeConfig};
use lvm::data::{ExpandError, PublishData, PublishDataError};
use lvm::filesystem::{FsType, FsTypeError, MkfsOptionError, MkfsOptions};
use lvm::logs::{LogError, PublishLog};
use lvm::mounts::{self, BindOptions, UnmountError};
use lvm::names::{NameError, NodeName};
use lvm::options::{Options, OptionsError};
use lvm::trouble::Notes;
use std::ffi::OsString;
use std::time::Instant;

/// When the driver was called, and under which settings of the node.
pub struct Called {
    pub at: Instant,
    pub config: Result<NodeConfig, ConfigError>,
}

impl Called {
    fn lvm(self) -> Result<Lvm, ConfigError> {
        let config = self.config?;
        let deadline = self.at + config.deadline;
        Ok(Lvm::in_cgroup(config).until(deadline))
    }

    /// A configuration with an error in it must not keep anything mounted.
    fn lvm_anyway(self) -> Lvm {
        let at = self.at;
        self.lvm().unwrap_or_else(|_| {
            let config = NodeConfig::default();
            let deadline = at + config.deadline;
            Lvm::in_cgroup(config).until(deadline)
        })
    }
}

impl Line {
    fn of(&mut self, target: &PodPath) {
        self.pod = target.uid.to_string();
        self.volume = volume_of(&target.path);
    }
}

/// A mount that failed; nothing is left mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error(transparent)]
    Options(#[from] OptionsError),
    #[error(transparent)]
    FsType(#[from] FsTypeError),
    #[error(transparent)]
    Mkfs(#[from] MkfsOptionError),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Data(#[from] PublishDataError),
    #[error(transparent)]
    Log(#[from] LogError),
}

/// An unmount that failed; it is called again.
#[derive(Debug, thiserror::Error)]
pub enum UnmountVerbError {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error(transparent)]
    Unmount(#[from] UnmountError),
}

/// A growth that failed.
#[derive(Debug, thiserror::Error)]
pub enum ExpandVerbError {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error(transparent)]
    Options(#[from] OptionsError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("a log volume grows when a pod asks for a larger size, not by a claim")]
    NotData,
    #[error(transparent)]
    Expand(#[from] ExpandError),
}

fn exactly<'a, const N: usize>(verb: &'static str, args: &'a [OsString]) -> Result<&'a [OsString; N], CallError> {
    args.try_into().map_err(|_| CallError::Arguments { verb, expected: N, got: args.len() })
}

/// This node's name, for `{node}`: the one that is set, or the host's, as kubelet
/// takes it where it is not told another.
fn node_name(config: &NodeConfig) -> Result<NodeName, NameError> {
    match &config.node_name {
        Some(name) => Ok(name.clone()),
        None => {
            let host = nix::unistd::gethostname().unwrap_or_default();
            NodeName::parse(&host.to_string_lossy().trim().to_lowercase())
        }
    }
}

/// `mount <dir> <json>`
pub fn mount(args: &[OsString], called: Called, line: &mut Line) -> Result<(), MountError> {
    let [directory, json] = exactly("mount", args)?;
    let target = PodPath::parse(directory)?;
    line.of(&target);
    let call = CallOptions::parse(json)?;
    call.check_pod(&target)?;
    let pod = call.pod()?;
    line.pod = format!("{}/{pod}", call.namespace()?);
    let lvm = called.lvm()?;
    let options = Options::parse(call.user(), &lvm.config.logs)?;
    // kubelet leaves it empty where the user does not say.
    let fs = match call.kubelet("kubernetes.io/fsType")? {
        "" => FsType::default(),
        text => text.parse()?,
    };
    let (namespace, read_only) = (call.namespace()?, call.read_only()?);
    line.changed = mounts::at(&target.path).ok().flatten().is_none();
    match options {
        Options::Data { vg, lv, claim_uid, one_pod, mount, mkfs } => lvm.publish_data(&PublishData {
            mkfs: MkfsOptions::parse(fs, &mkfs)?,
            vg,
            lv,
            claim_uid,
            namespace,
            fs,
            read_only,
            alone: one_pod,
            options: mount,
            target: target.path,
        })?,
        Options::Log(log) => lvm.publish_log(&PublishLog {
            directory: log.sub_path.expand(&namespace, &pod, &target.uid, || node_name(&lvm.config))?,
            vg: log.vg.unwrap_or_else(|| lvm.config.volume_group.clone()),
            namespace,
            volume: log.volume,
            size: log.size,
            quota: log.quota,
            files: log.files,
            fs,
            pod,
            containers: target.containers(),
            pod_uid: target.uid,
            retention: log.retention,
            owner: log.owner,
            mode: log.mode,
            mount: BindOptions { read_only, ..log.mount },
            target: target.path,
        })?,
    }
    Ok(())
}

/// `unmount <dir>`: all it needs follows from the mounts themselves.
pub fn unmount(args: &[OsString], called: Called, line: &mut Line) -> Result<(), UnmountVerbError> {
    let [directory] = exactly("unmount", args)?;
    let target = PodPath::parse(directory)?;
    line.of(&target);
    let lvm = called.lvm_anyway();
    let notes = Notes::default();
    let gone = lvm
        .unmount(&target.path)
        .inspect_err(|error| notes.note_failed_unmount(&target.path, &target.uid, &error.to_string()))?;
    notes.clear(&target.path);
    line.changed = !gone.is_empty();
    for mount in &gone {
        // A record that cannot be written only begins the retention earlier; the unmount is done.
        let _ = lvm.note_unmounted(mount, Some(&target.uid), target.containers());
    }
    Ok(())
}

/// `expandfs <json> <device> <dir> <new bytes> <old bytes>`. kubelet gives no
/// device; the JSON has no pod.
pub fn expandfs(args: &[OsString], called: Called, line: &mut Line) -> Result<(), ExpandVerbError> {
    let [json, _device, directory, size, _old] = exactly("expandfs", args)?;
    let target = PodPath::parse(directory)?;
    line.of(&target);
    let call = CallOptions::parse(json)?;
    let size = size.to_str().and_then(|size| size.parse::<u64>().ok());
    let size = size.ok_or_else(|| CallError::Size(args[3].to_string_lossy().chars().take(40).collect()))?;
    let lvm = called.lvm()?;
    let options = Options::parse(call.user(), &lvm.config.logs)?;
    let Options::Data { vg, lv, .. } = options else { return Err(ExpandVerbError::NotData) };
    line.changed = true;
    Ok(lvm.expand_data(&vg, &lv, &target.path, size)?)
}
