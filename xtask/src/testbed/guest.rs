//! A guest: user-mode Linux with this machine's root file system, its own
//! disks, and an agent.

use std::fs::{self, File, Permissions};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::init;
use super::machine::Machine;
use super::registers;
use crate::agent::Command;
use crate::agent::client::Agent;
use crate::sandbox::{Sandbox, xtask_binary};

/// Where a guest writes logs that are kept on this machine, below its own directory.
pub const GUEST_LOGS: &str = "/var/log/testbed";

/// How long a guest may take to come up.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// What a guest is to be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GuestOptions {
    /// Its host name, unique in the sandbox.
    pub name: String,
    /// Its address on the sandbox's bridge, a /24.
    pub address: Ipv4Addr,
    /// The bridge's address.
    pub gateway: Ipv4Addr,
    /// Memory, in MiB.
    pub memory_mib: u32,
    /// Sizes of its data disks, in GiB: sparse files, /dev/ubdb and on.
    pub disks_gib: Vec<u64>,
    /// Whether the disks become volume groups vg0, vg1, …
    pub volume_groups: bool,
    /// Sizes of further disks, in GiB, that are left as they are.
    #[serde(default)]
    pub spare_disks_gib: Vec<u64>,
    /// Whether containerd and kubelet are to run in it.
    pub cluster: bool,
    /// Where `lvprov` and `lvprov-flexvolume` are.
    pub tools: PathBuf,
}

/// A guest in a sandbox.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Guest {
    /// What it was made as.
    pub options: GuestOptions,
    directory: PathBuf,
    pid: Option<i32>,
}

impl Guest {
    /// Makes the guest's disks and its tap; does not start it.
    ///
    /// # Errors
    /// When one of these cannot be made.
    pub fn create(sandbox: &Sandbox, options: GuestOptions) -> Result<Self> {
        let directory = sandbox.directory().join(&options.name);
        fs::create_dir_all(&directory)?;
        let guest = Self { options, directory, pid: None };
        let own = guest.directory.join("own.img");
        File::create(&own)?.set_len(16 << 30)?;
        let made = Process::new("mkfs.ext4")
            .args(["-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", "-O", "^metadata_csum_seed"])
            .arg(&own)
            .stdin(Stdio::null())
            .output()
            .context("cannot run mkfs.ext4")?;
        if !made.status.success() {
            bail!("cannot make {}: {}", own.display(), String::from_utf8_lossy(&made.stderr));
        }
        for (index, gib) in guest.disks().enumerate() {
            File::create(guest.disk(index))?.set_len(gib << 30)?;
        }
        let script =
            init::script(&guest.options, &xtask_binary()?.display().to_string(), &guest.logs().display().to_string());
        fs::create_dir_all(guest.logs())?;
        fs::write(guest.init(), script)?;
        fs::set_permissions(guest.init(), Permissions::from_mode(0o755))?;

        let (tap, address, mac) = (guest.tap(), guest.options.address, guest.mac());
        // The address is known from the start: no packet waits for ARP.
        let commands = format!(
            "ip tuntap add {tap} mode tap; ip link set {tap} master br0 up; \
             ip neighbour replace {address} lladdr {mac} dev br0 nud permanent"
        );
        Machine::new("sandbox", sandbox.agent().clone()).sh(&commands)?;
        Ok(guest)
    }

    fn disks(&self) -> impl Iterator<Item = &u64> {
        self.options.disks_gib.iter().chain(&self.options.spare_disks_gib)
    }

    fn init(&self) -> PathBuf {
        self.directory.join("init.sh")
    }

    fn disk(&self, index: usize) -> PathBuf {
        self.directory.join(format!("disk{index}.img"))
    }

    fn logs(&self) -> PathBuf {
        self.directory.join("logs")
    }

    fn tap(&self) -> String {
        format!("tap-{}", self.options.name)
    }

    fn mac(&self) -> String {
        let [a, b, c, d] = self.options.address.octets();
        format!("52:54:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
    }

    /// File that the guest's console goes to.
    pub fn console(&self) -> PathBuf {
        self.directory.join("console.log")
    }

    /// Its agent.
    pub fn agent(&self, sandbox: &Sandbox) -> Agent {
        sandbox.agent().at(SocketAddr::new(IpAddr::V4(self.options.address), init::AGENT_PORT))
    }

    /// To run things on it.
    pub fn machine(&self, sandbox: &Sandbox) -> Machine {
        Machine::new(&self.options.name, self.agent(sandbox))
    }

    /// Powers it on, without waiting.
    ///
    /// # Errors
    /// When it is on, or cannot be started.
    pub fn power_on(&mut self, sandbox: &Sandbox) -> Result<()> {
        if self.pid.is_some() {
            bail!("node {} is on", self.options.name);
        }
        let mut argv = vec![
            // A process namespace of its own: what belongs to a guest ends with its first process.
            "unshare".to_string(),
            "--mount".into(),
            "--pid".into(),
            "--fork".into(),
            "--mount-proc".into(),
        ];
        if let Some(library) = registers::preload()? {
            argv.extend(["env".into(), format!("LD_PRELOAD={}", library.display())]);
        }
        argv.extend([
            "linux.uml".into(),
            format!("mem={}M", self.options.memory_mib),
            "root=/dev/root".into(),
            "rootfstype=hostfs".into(),
            "rootflags=/".into(),
            "ro".into(),
            "quiet".into(),
            format!("umid={}", self.options.name),
            format!("uml_dir={}", self.directory.display()),
            // gro: without it the guest loses what the bridge sends in large segments.
            format!("vec0:transport=tap,ifname={},depth=128,gro=1,mac={}", self.tap(), self.mac()),
            "con0=null,fd:1".into(),
            "con=null".into(),
            "ssl=null".into(),
            format!("ubd0={}", self.directory.join("own.img").display()),
            format!("init={}", self.init().display()),
        ]);
        for index in 0..self.disks().count() {
            argv.push(format!("ubd{}={}", index + 1, self.disk(index).display()));
        }
        self.pid = Some(sandbox.agent().spawn(&Command::new(argv), &self.console())?);
        Ok(())
    }

    /// Waits until its agent answers.
    ///
    /// # Errors
    /// When it stops, or does not within two minutes.
    pub fn wait_ready(&self, sandbox: &Sandbox) -> Result<()> {
        let agent = self.agent(sandbox);
        let start = Instant::now();
        let mut checked = Instant::now();
        while !agent.answers(Duration::from_millis(100)) {
            thread::sleep(Duration::from_millis(20));
            if checked.elapsed() > Duration::from_millis(500) {
                checked = Instant::now();
                if !self.is_on(sandbox)? {
                    bail!("node {} stopped while it booted; its console said:\n{}", self.options.name, self.tail());
                }
                if start.elapsed() > BOOT_LIMIT {
                    bail!(
                        "node {} did not boot in {BOOT_LIMIT:?}; its console said:\n{}",
                        self.options.name,
                        self.tail()
                    );
                }
            }
        }
        Ok(())
    }

    /// Makes the volume groups on fresh disks.
    ///
    /// # Errors
    /// When lvm does.
    pub fn make_volume_groups(&self, sandbox: &Sandbox) -> Result<()> {
        if !self.options.volume_groups || self.options.disks_gib.is_empty() {
            return Ok(());
        }
        let mut script = String::new();
        for index in 0..self.options.disks_gib.len() {
            let letter = char::from(b'b' + u8::try_from(index)?);
            // vgcreate makes the physical volume too.
            script.push_str(&format!("vgcreate -q -q -y --metadatasize 16m vg{index} /dev/ubd{letter} >/dev/null\n"));
        }
        self.machine(sandbox).sh(&script)?;
        Ok(())
    }

    fn is_on(&self, sandbox: &Sandbox) -> Result<bool> {
        match self.pid {
            Some(pid) => Ok(sandbox.agent().status(pid)?.is_none()),
            None => Ok(false),
        }
    }

    /// Cuts its power: what it had not written to a disk is lost.
    ///
    /// # Errors
    /// When its processes cannot be ended.
    pub fn power_cut(&mut self, sandbox: &Sandbox) -> Result<()> {
        let Some(pid) = self.pid else { return Ok(()) };
        // The child of `unshare`: process 1 of the guest's namespace. Its parent
        // ends after it, and so after all that was in there.
        let control = Machine::new("sandbox", sandbox.agent().clone());
        control.sh(&format!("kill -9 $(cat /proc/{pid}/task/{pid}/children)"))?;
        let start = Instant::now();
        while sandbox.agent().status(pid)?.is_none() {
            if start.elapsed() > Duration::from_secs(20) {
                bail!("node {} still runs after its power was cut", self.options.name);
            }
            thread::sleep(Duration::from_millis(5));
        }
        self.pid = None;
        Ok(())
    }

    /// Shuts it down: processes told to end, file systems written and unmounted.
    ///
    /// # Errors
    /// When it does not stop within a minute.
    pub fn shut_down(&mut self, sandbox: &Sandbox) -> Result<()> {
        let Some(pid) = self.pid else { return Ok(()) };
        let script = "pkill -TERM . ; sleep 1; sync; umount -a -r -t xfs,ext4 2>/dev/null; sync; halt -f";
        // The agent is told to end too: it may not live to answer.
        let _ = self.agent(sandbox).spawn(&Command::new(["setsid", "sh", "-c", script]), Path::new("/dev/null"));
        let start = Instant::now();
        while sandbox.agent().status(pid)?.is_none() {
            if start.elapsed() > Duration::from_secs(60) {
                bail!("node {} did not shut down; its console said:\n{}", self.options.name, self.tail());
            }
            thread::sleep(Duration::from_millis(20));
        }
        self.pid = None;
        Ok(())
    }

    fn tail(&self) -> String {
        tail(&self.console(), 30)
    }
}

/// A log's last lines.
pub(crate) fn tail(log: &Path, count: usize) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
