//! A node without Kubernetes.

use std::net::Ipv4Addr;
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{process, thread};

use anyhow::Result;

use super::guest::{Guest, GuestOptions};
use super::machine::Machine;
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
    /// Sizes of further disks, in GiB, that are left as they are.
    pub spare_disks_gib: Vec<u64>,
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
            spare_disks_gib: Vec::new(),
            profile: Profile::default(),
        }
    }
}

/// A throw-away machine with LVM; gone when dropped.
#[derive(Debug)]
pub struct Node {
    guest: Guest,
    sandbox: Sandbox,
    machine: Machine,
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
                spare_disks_gib: options.spare_disks_gib,
                cluster: false,
                tools: binaries::directory(options.profile),
            },
        )?;
        guest.power_on(&sandbox)?;
        guest.wait_ready(&sandbox)?;
        guest.make_volume_groups(&sandbox)?;
        Ok(Self { machine: guest.machine(&sandbox), guest, sandbox })
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
        "ip link add br0 type bridge; ip address add {BRIDGE}/24 dev br0; ip link set br0 up; \
         echo 1 > /proc/sys/net/ipv4/ip_forward"
    );
    Machine::new("sandbox", sandbox.agent().clone()).sh(&script)?;
    Ok(())
}

impl Deref for Node {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        super::finish(&self.sandbox, thread::panicking());
    }
}
