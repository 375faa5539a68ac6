//! The text that Prometheus reads (its "text-based format", version 0.0.4).

use std::fmt::{Display, Write};

/// Media type of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What becomes of a metric's value with time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// It rises and falls.
    Gauge,
    /// It rises, and begins anew with the process.
    Counter,
}

/// The text, as it grows.
#[derive(Debug, Default)]
pub struct Exposition(String);

/// One metric, whose samples follow.
pub struct Metric<'a> {
    text: &'a mut String,
    name: &'static str,
}

impl Exposition {
    /// Begins a metric. `help` is one line; the name says the unit.
    pub fn metric(&mut self, name: &'static str, type_: Type, help: &str) -> Metric<'_> {
        let type_ = match type_ {
            Type::Gauge => "gauge",
            Type::Counter => "counter",
        };
        self.line(format_args!("# HELP {name} {help}\n# TYPE {name} {type_}\n"));
        Metric { text: &mut self.0, name }
    }

    /// All of it.
    pub fn into_text(self) -> String {
        self.0
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = self.0.write_fmt(line);
    }
}

impl Metric<'_> {
    /// Adds a sample.
    pub fn sample(&mut self, labels: &[(&str, &dyn Display)], value: u64) -> &mut Self {
        self.text.push_str(self.name);
        for (at, (label, value)) in labels.iter().enumerate() {
            self.text.push(if at == 0 { '{' } else { ',' });
            self.text.push_str(label);
            self.text.push_str("=\"");
            escape(&value.to_string(), self.text);
            self.text.push('"');
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
        self
    }
}

fn escape(value: &str, to: &mut String) {
    for c in value.chars() {
        match c {
            '\\' => to.push_str("\\\\"),
            '"' => to.push_str("\\\""),
            '\n' => to.push_str("\\n"),
            c => to.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_written_as_prometheus_reads_them() {
        let mut text = Exposition::default();
        text.metric("a_bytes", Type::Gauge, "What a has.").sample(&[("x", &"1"), ("y", &2)], 7).sample(&[], u64::MAX);
        text.metric("b_total", Type::Counter, "How often b was.");
        assert_eq!(
            text.into_text(),
            "# HELP a_bytes What a has.\n# TYPE a_bytes gauge\n\
             a_bytes{x=\"1\",y=\"2\"} 7\na_bytes 18446744073709551615\n\
             # HELP b_total How often b was.\n# TYPE b_total counter\n"
        );
    }

    #[test]
    fn no_label_ends_before_its_end() {
        let mut text = Exposition::default();
        text.metric("m", Type::Gauge, "m").sample(&[("l", &"a\"} 1\nm{l=\"\\b")], 2);
        let sample = text.into_text().lines().nth(2).unwrap().to_owned();
        assert_eq!(sample, r#"m{l="a\"} 1\nm{l=\"\\b"} 2"#);
    }
}
