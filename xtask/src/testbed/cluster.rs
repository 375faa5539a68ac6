//! A Kubernetes cluster: control plane in a sandbox, nodes as guests.

use std::net::Ipv4Addr;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{env, fs, process, thread};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::certificates::{ADMIN, Pki};
use super::components::{self, SERVICE, node_address, pod_network};
use super::guest::{GUEST_LOGS, Guest, GuestOptions, tail};
use super::image::{self, Image};
use super::machine::Machine;
use super::node::{BRIDGE, make_bridge};
use crate::progress::say;
use crate::sandbox::{Life, Sandbox};
use crate::setup::binaries::{self, Profile};
use crate::setup::kubernetes::{KUBERNETES, SNAPSHOT_CONTROLLER};

/// How often kubelet is started before that is given up.
const KUBELET_STARTS: usize = 20;
/// How long it may take until it listens, in seconds.
const KUBELET_LISTENS: u32 = 75;
/// Statuses of the shell that waits for it.
const ENDED: i32 = 1;
const HANGS: i32 = 2;

/// What a cluster is to be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClusterOptions {
    /// Name of its directory below `target/testbed/run`.
    pub name: String,
    /// How many nodes: n1, n2, …
    pub nodes: u8,
    /// Memory of a node, in MiB.
    pub memory_mib: u32,
    /// Sizes of each node's data disks, in GiB; they become vg0, vg1, …
    pub disks_gib: Vec<u64>,
    /// Sizes of further disks of each node, in GiB, that are left as they are.
    #[serde(default)]
    pub spare_disks_gib: Vec<u64>,
    /// Profile of the binaries that are installed.
    pub profile: Profile,
    /// Whether it stays when this process ends.
    pub detached: bool,
    /// A control plane alone, for nodes that are not there: with an audit log
    /// of what lvprov's controller asks, and of the controller manager only
    /// what binds volumes.
    #[serde(default)]
    pub control_only: bool,
    /// Whether crun starts containers, or runc, as on most nodes: system calls
    /// are slow in user-mode Linux, and runc makes many more.
    #[serde(default)]
    pub crun: bool,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self {
            name: format!("cluster-{}", process::id()),
            nodes: 2,
            memory_mib: 2048,
            disks_gib: vec![20],
            spare_disks_gib: Vec::new(),
            profile: Profile::default(),
            detached: false,
            control_only: false,
            crun: true,
        }
    }
}

/// A running cluster. Unless detached it is gone when dropped.
#[derive(Debug)]
pub struct Cluster {
    options: ClusterOptions,
    sandbox: Sandbox,
    control: Machine,
    pki: Pki,
    kubernetes: PathBuf,
    guests: Mutex<Vec<Guest>>,
}

/// Images to be imported.
struct Archive {
    path: PathBuf,
    /// What is in it: name=id.
    images: Vec<String>,
}

/// What `cluster.json` says.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    options: ClusterOptions,
    guests: Vec<Guest>,
}

impl Cluster {
    /// Starts a cluster and waits until its nodes are Ready. One that does not come
    /// up is started once more: what runs there is not ours yet.
    ///
    /// # Errors
    /// When a part of it does not come up; what it logged is kept.
    pub fn start(options: ClusterOptions) -> Result<Self> {
        if options.control_only != (options.nodes == 0) || options.nodes > 100 {
            bail!("a cluster of {} nodes: 1 to 100 it can have", options.nodes);
        }
        Self::create(options.clone())?.brought_up().or_else(|error| {
            say(format!("it is started once more, since it did not come up: {error:#}"));
            Self::create(options)?.brought_up()
        })
    }

    fn brought_up(self) -> Result<Self> {
        let Err(error) = self.bring_up() else { return Ok(self) };
        // The machine with the logs may be gone before anybody looks.
        let error = anyhow!("{error:#}{}", self.last_words());
        self.end(true);
        Err(error)
    }

    fn create(options: ClusterOptions) -> Result<Self> {
        let life = if options.detached { Life::Detached } else { Life::Tied };
        let sandbox = Sandbox::start(&options.name, life)?;
        let names: Vec<_> = (1..=options.nodes).map(|number| (format!("n{number}"), node_address(number))).collect();
        let pki = Pki::create(sandbox.directory().join("pki"), &[BRIDGE, SERVICE, Ipv4Addr::LOCALHOST], &names);
        Ok(Self {
            control: Machine::new("control plane", sandbox.agent().clone()),
            pki: pki?,
            sandbox,
            kubernetes: KUBERNETES.binary(),
            guests: Mutex::default(),
            options,
        })
    }

    /// The ends of what each node's kubelet and containerd wrote.
    fn last_words(&self) -> String {
        let mut text = String::new();
        for node in self.node_names() {
            for log in ["containerd.log", "kubelet.log"] {
                let path = self.sandbox.directory().join(&node).join("logs").join(log);
                text.push_str(&format!("\n--- {node}: the end of {log}\n{}", tail(&path, 10)));
            }
        }
        text
    }

    fn bring_up(&self) -> Result<()> {
        let start = Instant::now();
        make_bridge(&self.sandbox)?;
        self.control.sh(&format!("ip address add {SERVICE}/32 dev br0"))?;
        if self.options.control_only {
            self.start_control_plane(start)?;
            return self.save();
        }
        let archive = self.write_images(&[Image::pause(), Image::busybox()?])?;
        let guests = (1..=self.options.nodes).map(|number| self.create_guest(number)).collect::<Result<Vec<_>>>()?;
        *self.guests() = guests;
        let failure = thread::scope(|scope| {
            let nodes: Vec<_> = (1..=self.options.nodes)
                .map(|number| {
                    let archive = &archive;
                    scope.spawn(move || {
                        self.boot_guest(number)?;
                        say(format!("n{number}: booted after {:.1} s", start.elapsed().as_secs_f64()));
                        self.import_into(number, archive)
                    })
                })
                .collect();
            let mut results = vec![self.start_control_plane(start)];
            for node in nodes {
                results.push(node.join().unwrap_or_else(|_| Err(anyhow!("starting a node panicked"))));
            }
            results.into_iter().find_map(Result::err)
        });
        if let Some(error) = failure {
            return Err(error);
        }
        self.save()?;
        for number in 1..=self.options.nodes {
            self.start_kubelet(number)?;
        }
        for number in 1..=self.options.nodes {
            let node = format!("node/n{number}");
            self.wait(&node, "create", Duration::from_secs(120))?;
            self.wait(&node, "condition=Ready", Duration::from_secs(120))?;
            say(format!("n{number}: Ready after {:.1} s", start.elapsed().as_secs_f64()));
        }
        self.wait("-n default serviceaccount/default", "create", Duration::from_secs(60))
    }

    fn start_control_plane(&self, start: Instant) -> Result<()> {
        let directory = self.sandbox.directory();
        let log = |name: &str| directory.join(format!("{name}.log"));
        let etcd = components::etcd(&directory.join("etcd"));
        self.control.spawn(&etcd, log("etcd"))?;
        let mut apiserver = components::apiserver(&self.kubernetes, &self.pki);
        if self.options.control_only {
            let policy = directory.join("audit-policy.json");
            fs::write(&policy, components::audit_policy())?;
            apiserver.argv.extend(components::audit(&policy, &self.audit_log()));
        }
        let pid = self.control.spawn(&apiserver, log("apiserver"))?;
        let deadline = Instant::now() + Duration::from_secs(90);
        while !self.kubectl_output(["get", "--raw=/readyz"])?.success() {
            if let Some(exit) = self.sandbox.agent().status(pid)? {
                bail!("the API server ended with status {}: {}", exit.shell_code(), tail(&log("apiserver"), 5));
            }
            if Instant::now() > deadline {
                bail!("the API server is not ready after 90 s: {}", tail(&log("apiserver"), 5));
            }
            thread::sleep(Duration::from_millis(100));
        }
        say(format!("API server ready after {:.1} s", start.elapsed().as_secs_f64()));
        let mut manager = components::controller_manager(&self.kubernetes, &self.pki);
        if self.options.control_only {
            manager.argv.push(components::VOLUME_CONTROLLERS.into());
        }
        self.control.spawn(&manager, log("controller-manager"))?;
        self.control.spawn(&components::scheduler(&self.kubernetes, &self.pki), log("scheduler"))?;
        if self.options.control_only {
            return Ok(());
        }
        let definitions: Vec<String> = fs::read_dir(SNAPSHOT_CONTROLLER.files())
            .context("the snapshot-controller is not built: `cargo xtask setup` does that")?
            .filter_map(|entry| Some(entry.ok()?.path().display().to_string()))
            // Not those of groups of snapshots.
            .filter(|path| path.contains("/snapshot.storage.k8s.io_"))
            .collect();
        self.kubectl(["apply".to_owned(), "-f".to_owned(), definitions.join(",")])?;
        let controller = components::snapshot_controller(&SNAPSHOT_CONTROLLER.binary(), &self.pki);
        self.control.spawn(&controller, log("snapshot-controller"))?;
        Ok(())
    }

    /// The running cluster of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(name: &str) -> Result<Self> {
        let sandbox = Sandbox::find(name)?
            .with_context(|| format!("no cluster {name} is running: `cargo xtask cluster up` starts one"))?;
        let file = sandbox.directory().join("cluster.json");
        let text =
            fs::read(&file).with_context(|| format!("the cluster {name} is still starting, or did not start"))?;
        let record: Record = serde_json::from_slice(&text)?;
        Ok(Self {
            control: Machine::new("control plane", sandbox.agent().clone()),
            pki: Pki::at(sandbox.directory().join("pki")),
            kubernetes: KUBERNETES.binary(),
            guests: Mutex::new(record.guests),
            options: record.options,
            sandbox,
        })
    }

    /// Ends it, whether detached or not; keeps its logs where something failed.
    pub fn end(&self, failed: bool) {
        super::finish(&self.sandbox, failed);
    }

    /// What it was made as.
    pub fn options(&self) -> &ClusterOptions {
        &self.options
    }

    /// Where its logs are.
    pub fn directory(&self) -> &Path {
        self.sandbox.directory()
    }

    /// What lvprov's controller has asked the API server, one JSON object a line.
    pub fn audit_log(&self) -> PathBuf {
        self.sandbox.directory().join("audit.log")
    }

    /// The kubeconfig of an identity.
    pub fn kubeconfig(&self, identity: &str) -> PathBuf {
        self.pki.kubeconfig(identity)
    }

    /// Where the control plane runs: commands see the cluster's network.
    pub fn control(&self) -> &Machine {
        &self.control
    }

    /// Names of its nodes.
    pub fn node_names(&self) -> Vec<String> {
        (1..=self.options.nodes).map(|number| format!("n{number}")).collect()
    }

    /// One of its nodes.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn node(&self, name: &str) -> Result<ClusterNode<'_>> {
        let number = name.strip_prefix('n').and_then(|number| number.parse().ok());
        let number = number.filter(|number| (1..=self.options.nodes).contains(number));
        let number = number.with_context(|| format!("no node {name}: there are {}", self.node_names().join(", ")))?;
        Ok(ClusterNode {
            machine: self.with_guest(number, |guest| Ok(guest.machine(&self.sandbox)))?,
            cluster: self,
            number,
        })
    }

    fn guests(&self) -> MutexGuard<'_, Vec<Guest>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works on a copy, so that slow work on one node does not hold up another.
    fn with_guest<T>(&self, number: u8, work: impl FnOnce(&mut Guest) -> Result<T>) -> Result<T> {
        let index = usize::from(number) - 1;
        let mut guest = self.guests().get(index).cloned().context("no such node")?;
        let result = work(&mut guest);
        self.guests()[index] = guest;
        result
    }

    fn save(&self) -> Result<()> {
        let record = Record { options: self.options.clone(), guests: self.guests().clone() };
        let file = self.sandbox.directory().join("cluster.json");
        let part = file.with_extension("part");
        fs::write(&part, serde_json::to_vec_pretty(&record)?)?;
        Ok(fs::rename(part, file)?)
    }

    fn create_guest(&self, number: u8) -> Result<Guest> {
        let guest = Guest::create(
            &self.sandbox,
            GuestOptions {
                name: format!("n{number}"),
                address: node_address(number),
                gateway: BRIDGE,
                memory_mib: self.options.memory_mib,
                disks_gib: self.options.disks_gib.clone(),
                volume_groups: true,
                spare_disks_gib: self.options.spare_disks_gib.clone(),
                cluster: true,
                tools: binaries::directory(self.options.profile),
            },
        )?;
        self.control.sh(&format!("ip route add {} via {}", pod_network(number), node_address(number)))?;
        Ok(guest)
    }

    /// First boot: with volume groups and configuration to make.
    fn boot_guest(&self, number: u8) -> Result<()> {
        self.power_on(number)?;
        self.with_guest(number, |guest| guest.make_volume_groups(&self.sandbox))
    }

    fn power_on(&self, number: u8) -> Result<()> {
        self.with_guest(number, |guest| {
            guest.power_on(&self.sandbox)?;
            guest.wait_ready(&self.sandbox)
        })?;
        let node = self.node(&format!("n{number}"))?;
        for (path, content) in components::node_files(&self.pki, number, self.options.crun) {
            node.write_file(path, content)?;
        }
        let routes = (1..=self.options.nodes)
            .filter(|other| *other != number)
            .map(|other| format!("ip route add {} via {}\n", pod_network(other), node_address(other)));
        node.sh(&routes.collect::<String>())?;
        node.spawn(&crate::agent::Command::new(["containerd"]), Path::new(GUEST_LOGS).join("containerd.log"))?;
        Ok(())
    }

    fn import_into(&self, number: u8, archive: &Archive) -> Result<()> {
        let node = self.node(&format!("n{number}"))?;
        // The socket is there before the service answers.
        node.sh(&format!(
            "n=0; until ctr -n k8s.io version >/dev/null 2>&1; do n=$((n+1)); [ $n -lt 100 ]; sleep 0.2; done\n\
             ctr -n k8s.io images import {} >/dev/null\n\
             # What kubelet asks learns of images by events, and may miss one: a change of an image makes another.\n\
             for image in {}; do\n\
               n=0; until ctr -n k8s.io images ls -q | grep -q ${{image#*=}}; do n=$((n+1)); [ $n -lt 300 ]; sleep 0.2\n\
               [ $((n % 25)) -ne 0 ] || ctr -n k8s.io images label ${{image%=*}} told=$n >/dev/null; done\n\
             done\n\
             # containerd leaves that to time, and a power cut may come first.\n\
             sync",
            archive.path.display(),
            archive.images.join(" ")
        ))?;
        Ok(())
    }

    /// kubelet ends if containerd answers and yet does not serve it, and may hang as it
    /// starts; systemd would start it again, and so does this, until it listens.
    fn start_kubelet(&self, number: u8) -> Result<()> {
        let node = self.node(&format!("n{number}"))?;
        let command = components::kubelet(&self.kubernetes, &self.pki, node.name(), node_address(number));
        for _ in 0..KUBELET_STARTS {
            let pid = node.spawn(&command, Path::new(GUEST_LOGS).join("kubelet.log"))?;
            node.write_file("/run/kubelet.pid", pid.to_string())?;
            // Of one that has ended nothing is there, or no program any more.
            let listens = format!(
                "while [ $SECONDS -lt {KUBELET_LISTENS} ]; do test -e /proc/{pid}/exe || exit {ENDED}\n\
                 (: < /dev/tcp/127.0.0.1/10250) 2> /dev/null && exit 0; sleep 0.1; done; exit {HANGS}"
            );
            match node.exec(["bash", "-c", &listens])?.status {
                0 => return Ok(()),
                HANGS => {
                    say(format!(
                        "{}: kubelet does not listen after {KUBELET_LISTENS} s; its log says what it does, and it is \
                         started again",
                        node.name()
                    ));
                    // A Go program writes down what all its goroutines do, and ends.
                    node.agent().kill(pid, Signal::SIGQUIT)?;
                    thread::sleep(Duration::from_secs(2));
                    node.agent().end(pid)?;
                }
                _ => {}
            }
        }
        bail!("kubelet of {} ends again and again, see its log", node.name())
    }

    fn write_images(&self, images: &[Image]) -> Result<Archive> {
        let directory = self.sandbox.directory().join("images");
        fs::create_dir_all(&directory)?;
        // A new name each time: a guest may remember an old file of the same name.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let path = directory.join(format!("{}-{}.tar", process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        let ids = image::write_archive(images, &path)?;
        Ok(Archive { path, images: images.iter().zip(ids).map(|(image, id)| format!("{}={id}", image.name)).collect() })
    }

    /// Makes images and imports them into every node.
    ///
    /// # Errors
    /// When an image cannot be made, or a node does not take it.
    pub fn import_images(&self, images: &[Image]) -> Result<()> {
        let archive = self.write_images(images)?;
        thread::scope(|scope| {
            let archive = &archive;
            let nodes: Vec<_> =
                (1..=self.options.nodes).map(|number| scope.spawn(move || self.import_into(number, archive))).collect();
            nodes
                .into_iter()
                .try_for_each(|node| node.join().unwrap_or_else(|_| Err(anyhow!("importing into a node panicked"))))
        })?;
        Ok(fs::remove_file(archive.path)?)
    }

    pub(super) fn kubectl_command(&self, arguments: Vec<String>) -> crate::agent::Command {
        let mut command = components::kubectl(&self.kubernetes, arguments);
        let admin = self.pki.kubeconfig(ADMIN.0);
        command.env.insert("KUBECONFIG".into(), admin.display().to_string());
        let cache = self.sandbox.directory().join("kubectl");
        command.env.insert("KUBECACHEDIR".into(), cache.display().to_string());
        command.cwd = env::current_dir().ok();
        command
    }

    /// Runs kubectl as this process would run it: standard input, output and
    /// error are its own. Gives the exit status.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn kubectl_inherit(&self, arguments: Vec<String>) -> Result<i32> {
        self.control.inherit(&self.kubectl_command(arguments))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.options.detached {
            self.end(thread::panicking());
        }
    }
}

/// A node of a cluster.
#[derive(Debug)]
pub struct ClusterNode<'a> {
    cluster: &'a Cluster,
    machine: Machine,
    number: u8,
}

impl ClusterNode<'_> {
    /// Its address on the network of the nodes.
    pub fn address(&self) -> Ipv4Addr {
        node_address(self.number)
    }

    /// Cuts its power and leaves it off: what it had not written to a disk is lost.
    ///
    /// # Errors
    /// When its processes cannot be ended.
    pub fn power_cut(&self) -> Result<()> {
        self.cluster.with_guest(self.number, |guest| guest.power_cut(&self.cluster.sandbox))?;
        self.cluster.save()
    }

    /// Boots it again with the disks it had, and starts containerd and kubelet.
    /// Does not wait for the node to be Ready.
    ///
    /// # Errors
    /// When it is on, or does not come up.
    pub fn power_on(&self) -> Result<()> {
        self.cluster.power_on(self.number)?;
        self.cluster.start_kubelet(self.number)?;
        self.cluster.save()
    }

    /// Shuts it down in order and boots it again, as [`ClusterNode::power_on`].
    ///
    /// # Errors
    /// When it does not stop, or does not come up.
    pub fn reboot(&self) -> Result<()> {
        self.cluster.with_guest(self.number, |guest| guest.shut_down(&self.cluster.sandbox))?;
        self.power_on()
    }

    /// Kills kubelet with SIGKILL.
    ///
    /// # Errors
    /// When the node does not answer.
    pub fn kill_kubelet(&self) -> Result<()> {
        let pid: i32 = self.read_file("/run/kubelet.pid")?.trim().parse()?;
        Ok(self.agent().end(pid)?)
    }

    /// Starts kubelet after [`ClusterNode::kill_kubelet`].
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_kubelet(&self) -> Result<()> {
        self.cluster.start_kubelet(self.number)
    }
}

impl Deref for ClusterNode<'_> {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}
