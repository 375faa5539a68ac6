//! A node without Kubernetes.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{process, thread};

use anyhow::Result;

use super::guest::{COMMAND_LIMIT, Guest, GuestOptions, capture};
use super::output::Output;
use crate::agent::Command;
use crate::agent::client::{Agent, Input};
use crate::sandbox::{Life, Sandbox};
use crate::setup::binaries::{self, Profile};

pub(crate) const BRIDGE: Ipv4Addr = Ipv4Addr::new(10, 97, 0, 1);

/// What a node is to be.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// Its host name.
    pub name: String,
    /// Memory, in MiB.
    pub memory_mib: u32,
    /// Sizes of its data disks, in GiB.
    pub disks_gib: Vec<u64>,
    /// Whether the disks become volume groups vg0, vg1, …
    pub volume_groups: bool,
    /// Profile of the binaries on its PATH.
    pub profile: Profile,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self {
            name: "n1".into(),
            memory_mib: 1024,
            disks_gib: vec![20],
            volume_groups: true,
            profile: Profile::default(),
        }
    }
}

/// A throw-away machine with LVM; gone when dropped.
#[derive(Debug)]
pub struct Node {
    guest: Guest,
    sandbox: Sandbox,
    agent: Agent,
}

impl Node {
    /// Boots a node with 1 GiB of memory and a volume group vg0 of 20 GiB.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn boot() -> Result<Self> {
        Self::boot_with(NodeOptions::default())
    }

    /// Boots a node.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn boot_with(options: NodeOptions) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let sandbox = Sandbox::start(&format!("node-{}-{number}", process::id()), Life::Tied)?;
        make_bridge(&sandbox)?;
        let mut guest = Guest::create(
            &sandbox,
            GuestOptions {
                name: options.name,
                address: Ipv4Addr::new(10, 97, 0, 11),
                gateway: BRIDGE,
                memory_mib: options.memory_mib,
                disks_gib: options.disks_gib,
                volume_groups: options.volume_groups,
                cluster: false,
                tools: binaries::directory(options.profile),
            },
        )?;
        guest.power_on(&sandbox)?;
        guest.wait_ready(&sandbox)?;
        guest.make_volume_groups(&sandbox)?;
        Ok(Self {
            agent: guest.agent(&sandbox),
            guest,
            sandbox,
        })
    }

    /// The node's agent, for what the methods here do not cover.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Runs a command; whatever its status, that is no error.
    ///
    /// # Errors
    /// When it cannot be started, or does not end within five minutes.
    pub fn exec<I, S>(&self, argv: I) -> Result<Output>
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        self.exec_with(&Command::new(argv), b"")
    }

    /// Runs a command with an environment, a directory, and this on its
    /// standard input.
    ///
    /// # Errors
    /// As [`Node::exec`].
    pub fn exec_with(&self, command: &Command, input: &[u8]) -> Result<Output> {
        capture(&self.agent, command, Input::Bytes(input.to_vec()), COMMAND_LIMIT)
    }

    /// Runs a command that is to succeed; gives its standard output.
    ///
    /// # Errors
    /// As [`Node::exec`], and for any status but 0.
    pub fn run<I, S>(&self, argv: I) -> Result<String>
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        self.exec(argv)?.ok()
    }

    /// Runs a shell script that stops at its first failing command.
    ///
    /// # Errors
    /// As [`Node::run`].
    pub fn sh(&self, script: &str) -> Result<String> {
        self.run(["sh", "-ec", script])
    }

    /// Writes a file of mode 0644, whole before it appears; makes its directory.
    ///
    /// # Errors
    /// When the node cannot.
    pub fn write_file(&self, path: impl AsRef<Path>, content: impl Into<Vec<u8>>) -> Result<()> {
        Ok(self.agent.write_file(path.as_ref(), 0o644, content.into())?)
    }

    /// The file's content.
    ///
    /// # Errors
    /// When it is not there.
    pub fn read_file(&self, path: &str) -> Result<String> {
        self.run(["cat", path])
    }

    /// Cuts its power and leaves it off: what it had not written to a disk is lost.
    ///
    /// # Errors
    /// When its processes cannot be ended.
    pub fn power_cut(&mut self) -> Result<()> {
        self.guest.power_cut(&self.sandbox)
    }

    /// Boots it again, with the disks it had.
    ///
    /// # Errors
    /// When it is on, or does not come up.
    pub fn power_on(&mut self) -> Result<()> {
        self.guest.power_on(&self.sandbox)?;
        self.guest.wait_ready(&self.sandbox)
    }

    /// Shuts it down in order and boots it again, with the disks it had.
    ///
    /// # Errors
    /// When it does not stop, or does not come up.
    pub fn reboot(&mut self) -> Result<()> {
        self.guest.shut_down(&self.sandbox)?;
        self.power_on()
    }
}

/// The network that guests are on.
pub(crate) fn make_bridge(sandbox: &Sandbox) -> Result<()> {
    let script = format!(
        "set -e; ip link add br0 type bridge; ip address add {BRIDGE}/24 dev br0; ip link set br0 up; \
         echo 1 > /proc/sys/net/ipv4/ip_forward"
    );
    capture(sandbox.agent(), &Command::new(["sh", "-c", &script]), Input::Empty, COMMAND_LIMIT)?.ok()?;
    Ok(())
}

impl Drop for Node {
    fn drop(&mut self) {
        super::finish(&mut self.sandbox, thread::panicking());
    }
}
