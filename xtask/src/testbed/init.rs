//! The script a guest starts with.

use std::fmt::Write;

use super::guest::{GUEST_LOGS, GuestOptions};

/// Kernel modules of every guest, and those that only Kubernetes needs. Where a
/// kernel loads by itself what it wants, as a host's does, quota_v2 (ext4's
/// quotas) need not be named; a guest's cannot.
const MODULES: &str = "overlay dm-mod dm-thin-pool dm-snapshot dm-raid raid1 raid10 loop xfs quota_v2";
const CLUSTER_MODULES: &str = "veth bridge";

/// Where the agent of a guest listens.
pub const AGENT_PORT: u16 = 700;

/// What lvm is told: the guest has no udev, and its disks are `ubd`s.
/// /dev/ubda is the guest's own disk.
const LVM_CONF: &str = r#"devices {
    types = [ "ubd", 16 ]
    obtain_device_list_from_udev = 0
    global_filter = [ "r|^/dev/ubda$|", "r|^/dev/loop|", "a|.*|" ]
}
activation {
    udev_sync = 0
    udev_rules = 0
}
"#;

/// Writes the script. Everything before `pivot_root` sees the machine's own
/// root, mounted read-only.
pub fn script(options: &GuestOptions, xtask: &str, logs: &str) -> String {
    let mut script = String::new();
    let modules = if options.cluster { format!("{MODULES} {CLUSTER_MODULES}") } else { MODULES.into() };
    let GuestOptions { name, address, gateway, .. } = options;
    let tools = options.tools.display();
    let _ = write!(
        script,
        r#"#!/bin/sh
# Made by xtask: first process of the guest {name}.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
fail() {{ echo "INIT FAILED: $*"; halt -f; }}
mount -t proc proc /proc
[ -e /dev/ubda ] || mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /mnt
mkdir -p /mnt/lib/modules /mnt/disk
ln -s /usr/lib/uml/modules/* /mnt/lib/modules/
modprobe -d /mnt -a {modules} || fail modules

# Its own disk carries what it writes, so that a reboot finds it again.
mount -t ext4 -o noatime /dev/ubda /mnt/disk || fail disk
mkdir -p /mnt/disk/upper /mnt/disk/work /mnt/disk/containerd /mnt/disk/kubelet /mnt/root
mount -t overlay -o lowerdir=/,upperdir=/mnt/disk/upper,workdir=/mnt/disk/work overlay /mnt/root || fail overlay
cd /mnt/root
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -n --move /dev dev
mkdir -p dev/pts dev/shm mnt/old
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts dev/pts
mount -t tmpfs tmpfs dev/shm
mount -t tmpfs -o mode=755 tmpfs run
mkdir -p run/lock run/lvm var/lib/containerd var/lib/kubelet
# Not through the overlay: containerd stacks another one on it, and kubelet's is to be shared.
mount --bind /mnt/disk/containerd var/lib/containerd
mount --bind /mnt/disk/kubelet var/lib/kubelet
pivot_root . mnt/old
cd /
umount -l /mnt/old
# Only this directory of the machine can be written to.
mkdir -p {GUEST_LOGS}
mount -t hostfs -o {logs} none {GUEST_LOGS} || fail logs
mount --make-rshared /
ln -sfn /proc/self/fd /dev/fd
ln -sfn /run/lock /var/lock 2>/dev/null
hostname {name}
echo {name} > /etc/hostname
[ -f /etc/testbed-node ] || tr -d - < /proc/sys/kernel/random/uuid > /etc/machine-id
: > /etc/testbed-node
echo "127.0.0.1 localhost {name}" > /etc/hosts
: > /etc/fstab
ip link set lo up
ip address add {address}/24 dev vec0
ip link set vec0 up
ip route add default via {gateway}
cat > /etc/lvm/lvm.conf <<'END'
{LVM_CONF}END
for tool in lvprov lvprov-flexvolume; do ln -sfn {tools}/$tool /usr/local/bin/$tool; done
vgchange -ay >/dev/null 2>&1
"#
    );
    if options.cluster {
        script.push_str(CLUSTER);
    }
    let _ = write!(
        script,
        "# A child, so that this shell, as process 1, reaps what is orphaned.\n\
         {xtask} internal agent --listen 0.0.0.0:{AGENT_PORT}\n\
         fail agent\n"
    );
    script
}

/// What kubelet and containerd expect of a machine.
const CLUSTER: &str = r#"
mkdir -p /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo "+cpu +io +memory +pids" > /sys/fs/cgroup/cgroup.subtree_control
# cAdvisor wants a clock rate, which user-mode Linux does not tell.
{ sed '/^cpu MHz/d;/^$/d' /proc/cpuinfo; printf 'cpu MHz\t\t: 2000.000\n\n'; } > /run/cpuinfo
mount --bind /run/cpuinfo /proc/cpuinfo
echo 1 > /proc/sys/net/ipv4/ip_forward
"#;
