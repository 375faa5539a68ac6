//! What was measured, and how it is shown.

use serde_json::{Value, json};

/// One thing measured, and what it is measured against. Milliseconds.
#[derive(Debug)]
pub struct Row {
    /// The thing.
    pub what: String,
    /// Its runs.
    pub ours: Vec<f64>,
    /// What it is measured against.
    pub against: &'static str,
    /// Its runs.
    pub theirs: Vec<f64>,
    /// Processes that each started, itself included, where that was counted.
    pub processes: Option<(u64, u64)>,
}

impl Row {
    /// One line of the table.
    pub fn line(&self) -> String {
        let (ours, theirs) = (median(&self.ours), median(&self.theirs));
        let processes = self.processes.map_or(String::new(), |(ours, theirs)| format!("  {ours:>4} / {theirs}"));
        format!(
            "{:<41} {:>28}   {:<22} {:>28}   {:>6.2}  {:>+9.1}{processes}",
            self.what,
            spread(&self.ours),
            self.against,
            spread(&self.theirs),
            ours / theirs,
            ours - theirs
        )
    }

    /// Every single run.
    pub fn json(&self) -> Value {
        json!({
            "what": self.what, "median": median(&self.ours), "runs": self.ours,
            "against": self.against, "against_median": median(&self.theirs), "against_runs": self.theirs,
            "ratio": median(&self.ours) / median(&self.theirs),
            "processes": self.processes.map(|(ours, _)| ours), "against_processes": self.processes.map(|(_, theirs)| theirs),
        })
    }
}

/// The value in the middle; the mean of two, where there is none.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => sorted[count / 2],
        count => f64::midpoint(sorted[count / 2 - 1], sorted[count / 2]),
    }
}

fn spread(values: &[f64]) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(0.0, f64::max);
    // Where a process costs a millisecond, tenths are too coarse.
    let digits = if median(values) < 10.0 { 2 } else { 1 };
    format!("{:.digits$} ({least:.digits$}-{most:.digits$}) {}", median(values), values.len())
}

/// Prints all rows, below the machine that they were measured on.
pub fn print_table(machine: &Value, rows: &[Row]) {
    let text = |key: &str| machine[key].as_str().unwrap_or("?").to_owned();
    println!("{}: {}, {} cores, {}", text("date"), text("cpu"), machine["cores"], text("node"));
    println!("binaries: {}; medians in milliseconds, (least to most), runs\n", text("profile"));
    println!("{:<41} {:>28}   {:<22} {:>28}   {:>6}  {:>9}  processes", "", "lvprov", "", "without", "ratio", "more");
    for row in rows {
        println!("{}", row.line());
    }
    for (when, resident) in machine["resident MiB"].as_object().into_iter().flatten() {
        for (who, mib) in resident.as_object().into_iter().flatten() {
            let of = |what: &str| mib[what].as_f64().unwrap_or(f64::NAN);
            println!("{who} in memory, {when}: {:.1} MiB, {:.1} MiB of it anonymous", of("all"), of("anonymous"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_few_and_many() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_line_shows_both_sides_and_their_processes() {
        let row = Row {
            what: "mount".into(),
            ours: vec![2.0, 3.0, 4.0],
            against: "mount(8)",
            theirs: vec![12.0],
            processes: Some((1, 2)),
        };
        let words: Vec<String> = row.line().split_whitespace().map(str::to_owned).collect();
        assert_eq!(words.join(" "), "mount 3.00 (2.00-4.00) 3 mount(8) 12.0 (12.0-12.0) 1 0.25 -9.0 1 / 2");
    }
}
