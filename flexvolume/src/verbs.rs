//! mount, unmount, expandfs.

use crate::call::{CallError, CallOptions, PodPath};
use crate::options::{Options, OptionsError};
use lvm::Lvm;
use lvm::config::{ConfigError, NodeConfig};
use lvm::data::{ExpandError, PublishData, PublishDataError};
use lvm::filesystem::{FsType, FsTypeError};
use lvm::logs::{LogError, PublishLog};
use lvm::mounts::{self, UnmountError};
use std::ffi::OsString;

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

/// `mount <dir> <json>`
pub fn mount(args: &[OsString]) -> Result<(), MountError> {
    let [directory, json] = exactly("mount", args)?;
    let target = PodPath::parse(directory)?;
    let call = CallOptions::parse(json)?;
    call.check_pod(&target)?;
    let options = Options::parse(call.user())?;
    // kubelet leaves it empty where the user does not say.
    let fs = match call.kubelet("kubernetes.io/fsType")? {
        "" => FsType::default(),
        text => text.parse()?,
    };
    let (namespace, read_only) = (call.namespace()?, call.read_only()?);
    let lvm = Lvm::in_cgroup(NodeConfig::load()?);
    match options {
        Options::Data { vg, lv, claim_uid, mount } => lvm.publish_data(&PublishData {
            vg,
            lv,
            claim_uid,
            namespace,
            fs,
            read_only,
            options: mount,
            target: target.path,
        })?,
        Options::Log { vg, volume, size, quota, retention } => lvm.publish_log(&PublishLog {
            vg: vg.unwrap_or_else(|| lvm.config.volume_group.clone()),
            namespace,
            volume,
            size,
            quota,
            fs,
            pod: call.pod()?,
            pod_uid: target.uid,
            retention,
            read_only,
            target: target.path,
        })?,
    }
    Ok(())
}

/// `unmount <dir>`: all it needs follows from the mounts themselves.
pub fn unmount(args: &[OsString]) -> Result<(), UnmountVerbError> {
    let [directory] = exactly("unmount", args)?;
    let target = PodPath::parse(directory)?;
    let gone = mounts::unmount(&target.path)?;
    if !gone.is_empty() {
        // A record that cannot be written only begins the retention earlier; the unmount is done.
        if let Ok(config) = NodeConfig::load() {
            let lvm = Lvm::in_cgroup(config);
            for mount in &gone {
                let _ = lvm.note_unmounted(mount);
            }
        }
    }
    Ok(())
}

/// `expandfs <json> <device> <dir> <new bytes> <old bytes>`. kubelet gives no
/// device; the JSON has no pod.
pub fn expandfs(args: &[OsString]) -> Result<(), ExpandVerbError> {
    let [json, _device, directory, size, _old] = exactly("expandfs", args)?;
    let target = PodPath::parse(directory)?;
    let call = CallOptions::parse(json)?;
    let size = size.to_str().and_then(|size| size.parse::<u64>().ok());
    let size = size.ok_or_else(|| CallError::Size(args[3].to_string_lossy().chars().take(40).collect()))?;
    let Options::Data { vg, lv, .. } = Options::parse(call.user())? else { return Err(ExpandVerbError::NotData) };
    Ok(Lvm::in_cgroup(NodeConfig::load()?).expand_data(&vg, &lv, &target.path, size)?)
}
