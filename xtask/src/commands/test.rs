//! `cargo xtask test`.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;
use std::{env, thread};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

use crate::paths;
use crate::progress::{say, step};
use crate::sandbox::xtask_binary;
use crate::setup::{self, binaries};

/// Runs all tests; the last line is `N passed, N failed`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask test                  # everything
  cargo xtask test --quick          # what needs no node
  cargo xtask test retain           # tests with `retain` in their name, wherever they are")]
pub struct TestCommand {
    /// Only tests whose name contains this.
    filter: Option<String>,
    /// Leave out what needs a node.
    #[arg(long)]
    quick: bool,
}

/// What suites said.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Count {
    passed: u64,
    failed: u64,
    /// Suites that began, and those of them that told how they ended.
    begun: u64,
    told: u64,
}

impl Count {
    /// Takes in a line of a suite's standard output.
    fn output(&mut self, line: &str) {
        let Some(rest) = line.strip_prefix("test result: ") else { return };
        self.told += 1;
        for part in rest.split([';', '.']) {
            let mut words = part.split_whitespace();
            let (Some(number), Some(what)) = (words.next(), words.next()) else { continue };
            match (number.parse::<u64>(), what) {
                (Ok(number), "passed") => self.passed += number,
                (Ok(number), "failed") => self.failed += number,
                _ => {}
            }
        }
    }

    /// Takes in a line of cargo's standard error.
    fn progress(&mut self, line: &str) {
        let line = line.trim_start();
        if line.starts_with("Running ") || line.starts_with("Doc-tests ") {
            self.begun += 1;
        }
    }

    /// What cargo's end adds: each suite that died silently, or a failure that
    /// no suite counted, is one failed test.
    fn close(&mut self, success: bool) {
        self.failed += self.begun.saturating_sub(self.told);
        if !success && self.failed == 0 {
            self.failed = 1;
        }
    }

    fn add(&mut self, other: Count) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// Runs it; gives the exit status.
///
/// # Errors
/// When the tests cannot be run at all.
pub fn run(command: &TestCommand) -> Result<u8> {
    let start = Instant::now();
    let mut total = Count::default();
    let filter = command.filter.as_deref();
    suite(&mut total, "Tests that need no node", &["--workspace"], filter, false);
    if !command.quick {
        match prepare().and_then(|()| targets()) {
            Ok(targets) => {
                for (package, target) in targets {
                    let title = format!("Tests on user-mode Linux nodes: {package} {target}");
                    suite(&mut total, &title, &["--workspace", "--test", &target], filter, true);
                }
            }
            Err(error) => {
                say(format!("the test bed cannot be had: {error:#}"));
                total.failed += 1;
            }
        }
    }
    say(format!("all of it took {:.1} s", start.elapsed().as_secs_f64()));
    println!("{} passed, {} failed", total.passed, total.failed);
    Ok(u8::from(total.failed > 0))
}

fn suite(total: &mut Count, title: &str, arguments: &[&str], filter: Option<&str>, nodes: bool) {
    let ran = step(title, || {
        let count = cargo_test(arguments, filter, nodes)?;
        say(format!("{} passed, {} failed", count.passed, count.failed));
        total.add(count);
        if count.failed > 0 { bail!("failed") } else { Ok(count) }
    });
    if ran.is_err_and(|error| error.to_string() != "failed") {
        total.failed += 1;
    }
}

fn prepare() -> Result<()> {
    setup::for_cluster()?;
    step("Build lvprov", || binaries::build(binaries::Profile::Debug))?;
    Ok(())
}

/// Test targets that need nodes, with their packages: those of the test bed
/// itself and those in `tests/`, plain nodes before clusters.
fn targets() -> Result<Vec<(String, String)>> {
    let output = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(paths::repository())
        .args(["metadata", "--no-deps", "--format-version=1", "--offline"])
        .output()
        .context("cannot run cargo metadata")?;
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata gave no JSON")?;
    let mut targets = Vec::new();
    for package in ["xtask", "lvprov-tests"] {
        let packages = metadata["packages"].as_array().into_iter().flatten();
        let mut names: Vec<_> = packages
            .filter(|found| found["name"] == package)
            .flat_map(|found| found["targets"].as_array().into_iter().flatten())
            .filter(|target| target["kind"][0] == "test")
            .filter_map(|target| target["name"].as_str())
            .map(|target| (package.to_string(), target.to_string()))
            .collect();
        names.sort_by_key(|(_, target)| (target != "node", target.clone()));
        targets.extend(names);
    }
    Ok(targets)
}

fn cargo_test(arguments: &[&str], filter: Option<&str>, nodes: bool) -> Result<Count> {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    if nodes {
        cargo.env("LVPROV_TESTBED", "1").env("LVPROV_XTASK", xtask_binary()?);
    } else {
        cargo.env_remove("LVPROV_TESTBED");
    }
    let mut child = cargo
        .current_dir(paths::repository())
        .args(["test", "--no-fail-fast"])
        .args(arguments)
        .args(filter)
        .env("CARGO_TERM_COLOR", "never")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run cargo test")?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let mut count = thread::scope(|scope| {
        let progress = scope.spawn(|| {
            let mut count = Count::default();
            for line in stderr.map(BufReader::new).into_iter().flat_map(BufRead::lines).map_while(Result::ok) {
                eprintln!("{line}");
                count.progress(&line);
            }
            count.begun
        });
        let mut count = Count::default();
        for line in stdout.map(BufReader::new).into_iter().flat_map(BufRead::lines).map_while(Result::ok) {
            println!("{line}");
            count.output(&line);
        }
        count.begun = progress.join().unwrap_or_default();
        count
    });
    count.close(child.wait()?.success());
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSED: &str =
        "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s";
    const FAILED: &str = "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out";

    fn count(begun: &[&str], told: &[&str], success: bool) -> (u64, u64) {
        let mut count = Count::default();
        begun.iter().for_each(|line| count.progress(line));
        told.iter().for_each(|line| count.output(line));
        count.close(success);
        (count.passed, count.failed)
    }

    #[test]
    fn results_are_summed() {
        let begun =
            ["     Running unittests src/lib.rs (target/debug/deps/lvm-1)", "   Doc-tests lvm", "   Compiling x"];
        assert_eq!(count(&begun, &[PASSED, FAILED], false), (15, 2));
    }

    #[test]
    fn a_suite_that_dies_silently_is_a_failed_test() {
        let begun = ["     Running a", "     Running b"];
        assert_eq!(count(&begun, &[PASSED], false), (12, 1));
    }

    #[test]
    fn what_does_not_compile_is_a_failed_test() {
        assert_eq!(count(&[], &[], false), (0, 1));
    }

    #[test]
    fn what_a_test_prints_is_not_counted() {
        assert_eq!(count(&[], &["stdout: test result: ok. 5 passed; 0 failed"], true), (0, 0));
    }
}
