//! Debian packages.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::progress::step;

/// For a node without Kubernetes.
pub const NODE: &[&str] = &[
    "btrfs-progs",
    "e2fsprogs",
    "iproute2",
    "kmod",
    "lvm2",
    "thin-provisioning-tools",
    "user-mode-linux",
    "util-linux",
    "xfsprogs",
];

/// For a cluster, besides those of a node.
pub const CLUSTER: &[&str] =
    &["busybox-static", "containerd", "containernetworking-plugins", "crun", "etcd-server", "runc"];

/// For tests, besides those of a cluster.
pub const TESTS: &[&str] = &["rsyslog"];

/// Installs those of `packages` that are missing.
///
/// # Errors
/// When apt cannot; its output goes to standard error.
pub fn install(packages: &[&str]) -> Result<()> {
    let missing = missing(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    step(format!("Install Debian packages: {}", missing.join(" ")), || {
        apt(&["update", "-qq"])?;
        let mut arguments = vec!["install", "-y", "-qq", "--no-install-recommends"];
        arguments.extend(missing.iter().map(String::as_str));
        let _none_starts = NoServices::new()?;
        apt(&arguments)
    })
}

/// While this lives, services of installed packages are not started: etcd and
/// containerd are to run in sandboxes and guests only.
struct NoServices {
    made: bool,
}

impl NoServices {
    /// What Debian asks before it starts one.
    const POLICY: &str = "/usr/sbin/policy-rc.d";

    fn new() -> Result<Self> {
        let made = !Path::new(Self::POLICY).exists();
        if made {
            fs::write(Self::POLICY, "#!/bin/sh\nexit 101\n")?;
            fs::set_permissions(Self::POLICY, fs::Permissions::from_mode(0o755))?;
        }
        Ok(Self { made })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.made {
            let _ = fs::remove_file(Self::POLICY);
        }
    }
}

fn missing(packages: &[&str]) -> Result<Vec<String>> {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat", "${Package} ${db:Status-Status}\n"])
        .args(packages)
        .output()
        .context("cannot run dpkg-query: the test bed needs Debian 12 or a system like it")?;
    let known = String::from_utf8_lossy(&output.stdout).into_owned();
    let installed = |name: &str| known.lines().any(|line| line == format!("{name} installed"));
    Ok(packages.iter().filter(|name| !installed(name)).map(|name| (*name).to_string()).collect())
}

fn apt(arguments: &[&str]) -> Result<()> {
    // What apt prints is progress, not the result that standard output is for.
    let mut child = Command::new("apt-get")
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run apt-get")?;
    if let Some(mut stdout) = child.stdout.take() {
        std::io::copy(&mut stdout, &mut std::io::stderr())?;
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("`apt-get {}` failed ({status}): are you root, and are package lists reachable?", arguments.join(" "));
    }
    Ok(())
}
