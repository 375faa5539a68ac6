//! `cargo xtask bench`: what lvprov adds to what there is without it.
//!
//! Everything is measured side by side, the sides taking turns, so that what
//! slows the machine slows all of them.

use std::fs;

use anyhow::Result;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use self::cluster::{Bench, COMMANDS, REPLICAS};
use self::rows::{Row, print_table};
use crate::progress::{say, step};
use crate::setup::{self, binaries, packages};
use crate::testbed::{Cluster, ClusterOptions, Machine, Node, NodeOptions};

mod cluster;
mod driver;
mod rows;
pub mod scale;
pub mod timing;

/// Measures claims, mounts and pods against the same without lvprov.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask bench                 # all of it
  cargo xtask bench driver          # needs no Kubernetes
  cargo xtask bench provision --claims 40 --bursts 0 --json")]
pub struct BenchCommand {
    /// Only this.
    #[command(subcommand)]
    part: Option<Part>,
    #[command(flatten)]
    options: Options,
}

/// A part of the benchmark.
#[derive(Debug, Clone, Copy, Subcommand)]
enum Part {
    /// Claims, one, ten and a hundred at once, against lvcreate and lvremove.
    Provision,
    /// The driver against mount(8) and against a driver written as a shell script, on a node and on this machine.
    Driver,
    /// Pods with a claim against pods with an emptyDir, and a StatefulSet against one without volumes.
    Pods,
    /// The controller with thousands of nodes and volumes that are not there: its memory, its requests, the scheduler's
    /// time. Not among `all of it`.
    Scale(scale::ScaleOptions),
}

#[derive(Debug, Args)]
struct Options {
    /// Print JSON instead of a table.
    #[arg(long, global = true)]
    json: bool,
    /// How many claims, one after the other; 0 here and below leaves that out.
    #[arg(long, global = true, default_value_t = 12)]
    claims: usize,
    /// How often ten claims at once, and a hundred.
    #[arg(long, global = true, default_value_t = 3)]
    bursts: usize,
    /// How many mounts of each kind on the node.
    #[arg(long, global = true, default_value_t = 40)]
    mounts: usize,
    /// How many mounts of each kind on this machine itself, where a process costs little.
    #[arg(long, global = true, default_value_t = 300)]
    native: usize,
    /// How many pods.
    #[arg(long, global = true, default_value_t = 6)]
    pods: usize,
    /// How often a StatefulSet of twenty.
    #[arg(long, global = true, default_value_t = 3)]
    sets: usize,
    /// Profile of the binaries.
    #[arg(long, global = true, value_enum, default_value_t = binaries::Profile::Release)]
    profile: binaries::Profile,
    /// Take the binaries that there are.
    #[arg(long, global = true)]
    no_build: bool,
}

/// Runs it.
///
/// # Errors
/// When a part of it does not do what it should.
pub fn run(command: &BenchCommand) -> Result<()> {
    let options = &command.options;
    if let Some(Part::Scale(scale)) = command.part {
        return run_scale(scale, options);
    }
    let same = |one: Part, other: Part| std::mem::discriminant(&one) == std::mem::discriminant(&other);
    let wanted = |part| command.part.is_none_or(|only| same(only, part));
    let kubernetes = wanted(Part::Provision) || wanted(Part::Pods);
    if kubernetes {
        setup::for_cluster()?
    } else {
        packages::install(packages::NODE)?
    }
    if !options.no_build {
        let build = if kubernetes { binaries::build } else { binaries::build_driver };
        step("Build lvprov", || build(options.profile))?;
    }
    let mut rows = Vec::new();
    let mut machine = Value::Null;
    if wanted(Part::Driver) {
        // First, while nothing else runs.
        machine = measure_driver(options, &mut rows)?;
    }
    if kubernetes {
        let cluster_options =
            ClusterOptions { nodes: 1, profile: options.profile, crun: false, ..ClusterOptions::default() };
        let cluster = step("Start Kubernetes with one node", || Cluster::start(cluster_options))?;
        let measured = measure_kubernetes(&cluster, options, wanted, &mut rows);
        cluster.end(measured.is_err());
        machine = measured?;
    }
    if options.json {
        let rows: Vec<Value> = rows.iter().map(Row::json).collect();
        println!("{:#}", json!({"machine": machine, "milliseconds": rows}));
    } else {
        print_table(&machine, &rows);
    }
    Ok(())
}

fn run_scale(scale: scale::ScaleOptions, options: &Options) -> Result<()> {
    setup::for_cluster()?;
    if !options.no_build {
        step("Build lvprov", || binaries::build(options.profile))?;
        // The nodes that are not there.
        step("Build what the tests run", || binaries::build(binaries::Profile::Debug))?;
    }
    let measured = scale::measure(scale, options.profile)?;
    println!("{:#}", measured.json(scale));
    Ok(())
}

/// A stage of the benchmark.
type Stage<'a> = &'a dyn Fn() -> Result<Vec<Row>>;

fn measure(rows: &mut Vec<Row>, what: &str, stage: Stage<'_>) -> Result<()> {
    let measured = step(what, stage)?;
    // Here too, in case that a later stage fails.
    measured.iter().for_each(|row| say(row.line()));
    rows.extend(measured);
    Ok(())
}

fn measure_driver(options: &Options, rows: &mut Vec<Row>) -> Result<Value> {
    measure(rows, "Mounts on this machine", &|| driver::natively(options.profile, options.native))?;
    let node =
        step("Boot a node", || Node::boot_with(NodeOptions { profile: options.profile, ..NodeOptions::default() }))?;
    measure(rows, "Mounts on the node", &|| driver::on_node(&node, options.mounts))?;
    machine(&node, options.profile, "")
}

fn measure_kubernetes(
    cluster: &Cluster,
    options: &Options,
    wanted: impl Fn(Part) -> bool,
    rows: &mut Vec<Row>,
) -> Result<Value> {
    cluster.node("n1")?.write_file("/etc/lvprov/node.json", format!(r#"{{"commandLog":"{COMMANDS}"}}"#))?;
    step("Install lvprov", || cluster.install_lvprov())?;
    let bench = Bench::new(cluster)?;
    if wanted(Part::Provision) {
        measure(rows, "Claims, one after the other", &|| bench.claims(options.claims))?;
        measure(rows, "Ten claims at once", &|| bench.claims_at_once(10, options.bursts))?;
        measure(rows, "A hundred claims at once", &|| bench.claims_at_once(100, options.bursts))?;
    }
    if wanted(Part::Pods) {
        measure(rows, "Pods", &|| bench.pods(options.pods))?;
        measure(rows, "StatefulSets", &|| bench.stateful_sets(options.sets))?;
    }
    let mut machine = machine(bench.node(), options.profile, &format!(", Kubernetes {}", bench.kubernetes()?))?;
    machine["resident MiB"] = json!({"at the end": bench.resident()?});
    if let Some(resident) = bench.resident_with_volumes() {
        machine["resident MiB"][format!("with {REPLICAS} volumes mounted")] = resident;
    }
    Ok(machine)
}

/// What it was measured on.
fn machine(node: &Machine, profile: binaries::Profile, more: &str) -> Result<Value> {
    let info = fs::read_to_string("/proc/cpuinfo")?;
    let cpu = info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("");
    let kernel = node.run(["uname", "-r"])?;
    let lvm = node.sh("lvm version | sed -n 's/ *LVM version: *//p'")?;
    Ok(json!({
        "date": node.run(["date", "-u", "+%Y-%m-%d"])?.trim(),
        "cpu": cpu.trim_start_matches([' ', '\t', ':']),
        "cores": std::thread::available_parallelism()?.get(),
        "node": format!("user-mode Linux {}, LVM {}{more}", kernel.trim(), lvm.trim()),
        "profile": profile.directory(),
    }))
}
