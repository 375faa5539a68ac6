//! `cargo xtask test`.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

use crate::cargo::cargo;
use crate::progress::{say, step};
use crate::sandbox::xtask_binary;
use crate::setup::{self, binaries};

/// Runs all tests; the last line is `N passed, N failed`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask test                  # everything
  cargo xtask test --quick          # what needs no node
  cargo xtask test --full storm     # with a thousand rounds
  cargo xtask test retain           # tests with `retain` in their name, wherever they are")]
pub struct TestCommand {
    /// Only tests whose name contains this.
    filter: Option<String>,
    /// Leave out what needs a node.
    #[arg(long)]
    quick: bool,
    /// Run what is otherwise left out or cut short, too: takes hours more.
    #[arg(long, conflicts_with = "quick")]
    full: bool,
}

/// How long each fuzz target is run.
pub(crate) const FUZZ_SECONDS: &str = "LVPROV_FUZZ_SECONDS";
/// So long each where all tests are run: with two cores half a minute in all.
const SHORT_FUZZ: &str = "5";
/// How many rounds pods come and go.
const ROUNDS: &str = "LVPROV_ROUNDS";
const FULL_ROUNDS: &str = "1000";
/// Every crash there is, where otherwise there are some.
const FULL: &str = "LVPROV_FULL";

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
    let plain = Suite { filter, nodes: false, full: false };
    total.add(plain.run("Tests that need no node", "", &["--workspace"]));
    if !command.quick {
        match prepare(filter.is_none()).and_then(|()| targets()) {
            Ok(targets) => nodes(&mut total, &targets, Suite { filter, nodes: true, full: command.full }),
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

/// So many suites run beside each other: they wait a lot.
const BESIDE: usize = 2;
/// Suites that take long, the longest first.
const LONG: [&str; 3] = ["cluster", "node", "matrix"];

/// Runs the suites beside each other: who has ended one takes the next.
fn nodes(total: &mut Count, targets: &[String], suite: Suite<'_>) {
    let mut targets: Vec<&String> = targets.iter().collect();
    targets.sort_by_key(|target| LONG.iter().position(|long| target == long).unwrap_or(LONG.len()));
    let left = Mutex::new(targets.into_iter());
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        let mut counted = Count::default();
        while let Some(target) = next() {
            let title = format!("Tests on user-mode Linux: {target}");
            counted.add(suite.run(&title, target, &["--workspace", "--test", target]));
        }
        counted
    };
    thread::scope(|scope| {
        for worker in (0..BESIDE).map(|_| scope.spawn(work)).collect::<Vec<_>>() {
            match worker.join() {
                Ok(count) => total.add(count),
                Err(_) => total.failed += 1,
            }
        }
    });
}

/// How cargo test is to be run.
#[derive(Debug, Clone, Copy)]
struct Suite<'a> {
    filter: Option<&'a str>,
    nodes: bool,
    full: bool,
}

impl Suite<'_> {
    /// Runs cargo test once; what cannot be run is one failed test.
    fn run(self, title: &str, mark: &str, arguments: &[&str]) -> Count {
        let mut counted = Count::default();
        let ran = step(title, || {
            counted = cargo_test(mark, arguments, self)?;
            say(format!("{} passed, {} failed", counted.passed, counted.failed));
            if counted.failed > 0 { bail!("{} tests failed", counted.failed) } else { Ok(()) }
        });
        if let Err(error) = ran
            && counted.failed == 0
        {
            say(format!("{error:#}"));
            counted.failed = 1;
        }
        counted
    }
}

/// `all`: what one suite alone needs, too, which it would build while others wait for the same two cores.
fn prepare(all: bool) -> Result<()> {
    setup::for_tests()?;
    step("Build lvprov", || binaries::build(binaries::Profile::Debug))?;
    if all {
        step("Build lvprov with fault points", || binaries::build(binaries::Profile::Faults))?;
    }
    Ok(())
}

/// Test targets that need nodes: those of the test bed itself and those in
/// `tests/`, the latter first.
fn targets() -> Result<Vec<String>> {
    let output = cargo()
        .args(["metadata", "--no-deps", "--format-version=1", "--offline"])
        .output()
        .context("cannot run cargo metadata")?;
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata gave no JSON")?;
    let packages = || metadata["packages"].as_array().into_iter().flatten();
    let of = |package: &'static str| {
        packages()
            .filter(move |found| found["name"] == package)
            .flat_map(|found| found["targets"].as_array().into_iter().flatten())
            .filter(|target| target["kind"][0] == "test")
            .filter_map(|target| target["name"].as_str().map(String::from))
    };
    Ok(of("lvprov-tests").chain(of("xtask")).collect())
}

fn cargo_test(mark: &str, arguments: &[&str], suite: Suite<'_>) -> Result<Count> {
    let mut cargo = cargo();
    if suite.nodes {
        cargo.env("LVPROV_TESTBED", "1").env("LVPROV_XTASK", xtask_binary()?);
    } else {
        cargo.env_remove("LVPROV_TESTBED").env(FUZZ_SECONDS, SHORT_FUZZ);
    }
    if suite.full {
        cargo.env(ROUNDS, FULL_ROUNDS).env(FULL, "1");
    }
    let mut child = cargo
        .args(["test", "--no-fail-fast"])
        .args(arguments)
        .args(suite.filter)
        .env("CARGO_TERM_COLOR", "never")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run cargo test")?;
    let mark = if mark.is_empty() { String::new() } else { format!("{mark}: ") };
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let mut count = thread::scope(|scope| {
        let progress = scope.spawn(|| {
            let mut count = Count::default();
            for line in stderr.map(BufReader::new).into_iter().flat_map(BufRead::lines).map_while(Result::ok) {
                eprintln!("{mark}{line}");
                count.progress(&line);
            }
            count.begun
        });
        let mut count = Count::default();
        let mut last = Instant::now();
        for line in stdout.map(BufReader::new).into_iter().flat_map(BufRead::lines).map_while(Result::ok) {
            // Tests on nodes run one by one: the time since the last line is the test's.
            if suite.nodes && line.starts_with("test ") && !line.starts_with("test result") {
                println!("{mark}{line} ({:.1} s)", last.elapsed().as_secs_f64());
            } else {
                println!("{mark}{line}");
            }
            last = Instant::now();
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
