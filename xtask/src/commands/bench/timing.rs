//! Timing processes: run where they are measured, in a guest or here.

use std::fs;
use std::io::{self, Read};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// What is to be timed.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// How often, after one round that is not counted.
    pub rounds: usize,
    /// What takes turns: commands that are run one after the other.
    pub sides: Vec<Vec<Vec<String>>>,
}

/// All runs of one command.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Runs {
    /// Milliseconds from before it was started until it had ended.
    pub milliseconds: Vec<f64>,
    /// The fewest processes that it took, itself included. Other processes of
    /// the machine add to some runs; none takes away.
    pub processes: u64,
}

/// Reads a plan from standard input, and prints what was measured.
///
/// # Errors
/// When a command fails.
pub fn run() -> Result<()> {
    let mut text = String::new();
    io::stdin().read_to_string(&mut text)?;
    let measured = measure(&serde_json::from_str(&text)?)?;
    println!("{}", serde_json::to_string(&measured)?);
    Ok(())
}

fn measure(plan: &Plan) -> Result<Vec<Vec<Runs>>> {
    let mut measured: Vec<Vec<Runs>> = plan
        .sides
        .iter()
        .map(|commands| vec![Runs { processes: u64::MAX, ..Runs::default() }; commands.len()])
        .collect();
    for round in 0..=plan.rounds {
        for turn in 0..plan.sides.len() {
            // Each side follows each other one as often.
            let side = if (round / plan.sides.len()).is_multiple_of(2) { turn } else { plan.sides.len() - 1 - turn };
            let side = (side + round) % plan.sides.len();
            for (argv, runs) in plan.sides[side].iter().zip(&mut measured[side]) {
                let (milliseconds, processes) = time(argv)?;
                if round > 0 {
                    runs.milliseconds.push(milliseconds);
                    runs.processes = runs.processes.min(processes);
                }
            }
        }
    }
    Ok(measured)
}

/// As kubelet runs a driver: output through a pipe, and nothing to read.
fn time(argv: &[String]) -> Result<(f64, u64)> {
    let (program, arguments) = argv.split_first().context("an empty command")?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    let before = forks()?;
    let begun = Instant::now();
    let output = command.output().with_context(|| format!("cannot run {program}"))?;
    let milliseconds = begun.elapsed().as_secs_f64() * 1000.0;
    let processes = forks()?.saturating_sub(before);
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`{}` ended with {}: {said}", argv.join(" "), output.status);
    Ok((milliseconds, processes))
}

/// The kernel's own count of processes made since it booted.
fn forks() -> Result<u64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let line = stat.lines().find_map(|line| line.strip_prefix("processes ")).context("no count in /proc/stat")?;
    Ok(line.trim().parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn every_command_is_timed_and_its_processes_counted() {
        let shell: Vec<String> = ["sh", "-c", "true; /bin/true; /bin/true; :"].map(str::to_owned).to_vec();
        let plan = Plan { rounds: 3, sides: vec![vec![words("true"), shell], vec![words("sleep 0.01")]] };
        let measured = measure(&plan).unwrap();
        assert!(measured.iter().flatten().all(|runs| runs.milliseconds.len() == 3 && runs.processes >= 1));
        assert!(measured[0][1].processes >= 3);
        assert!(measured[1][0].milliseconds.iter().all(|ms| *ms >= 10.0));
    }

    #[test]
    fn a_command_that_fails_is_an_error_with_what_it_said() {
        let plan = Plan { rounds: 1, sides: vec![vec![words("ls /nowhere")]] };
        let error = measure(&plan).unwrap_err().to_string();
        assert!(error.contains("ls /nowhere") && error.contains("No such file"), "{error}");
    }
}
