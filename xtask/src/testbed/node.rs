//! A node without Kubernetes.

use std::net::Ipv4Addr;
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use std::{fs, path::Path};

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
    sandbox: Option<Sandbox>,
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
            sandbox: Some(sandbox),
        })
    }

    /// The node's agent, for what the methods here do not cover.
    pub fn agent(&self) -> &Agent {
        &self.agent
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
        if let Some(sandbox) = self.sandbox.take() {
            let directory = sandbox.directory().to_path_buf();
            let _ = sandbox.stop();
            let _ = fs::remove_dir_all(directory);
        }
    }
}
