//! The result of `attnd bench kernel`, as JSON and as tables.

use attnd_kernel::{KERNEL_ID, Kernels};
use comfy_table::Table;
use serde::Serialize;

use super::case::{Bound, Case};
use super::limits::Limit;
use super::measure::Measured;
use crate::table;

/// Names this form of the JSON object; another number means other fields.
pub const FORMAT: &str = "attnd-bench-kernel/1";

/// A whole run: the `--json` form.
#[derive(Debug, Clone, Serialize)]
pub struct KernelReport {
    /// [`FORMAT`].
    pub format: &'static str,
    /// Of the program.
    pub version: &'static str,
    /// Names the order of arithmetic.
    pub kernel_id: &'static str,
    /// Of this machine.
    pub cpu_model: String,
    /// Of the cases that use all of them.
    pub threads: usize,
    /// Whether each thread was kept on a core of its own.
    pub pinned: bool,
    /// How `core_ghz` was found.
    pub core_ghz_from: &'static str,
    /// Load averages over 1, 5 and 15 minutes before the run.
    pub load_before: Option<[f64; 3]>,
    /// The same after the run, which then holds the run itself.
    pub load_after: Option<[f64; 3]>,
    /// The whole run, in seconds.
    pub seconds: f64,
    /// The best that was seen of each limit.
    pub calibration: Vec<Limit>,
    /// One for each case and instruction set.
    pub cases: Vec<CaseReport>,
}

/// One case on one instruction set.
#[derive(Debug, Clone, Serialize)]
pub struct CaseReport {
    /// Of the case.
    pub name: &'static str,
    /// Whose kernels ran.
    pub isa: &'static str,
    /// Threads that ran it.
    pub threads: usize,
    /// How keys and values are stored.
    pub storage: String,
    /// In what arithmetic.
    pub mode: String,
    /// Query heads.
    pub heads: u64,
    /// Key/value heads.
    pub kv_heads: u64,
    /// Query tokens.
    pub queries: u64,
    /// Key tokens.
    pub keys: u64,
    /// Dimension of queries and keys.
    pub head_dim: u64,
    /// Dimension of values.
    pub value_dim: u64,
    /// How often it ran.
    pub runs: usize,
    /// Time of a call: the middle one of the runs.
    pub median_seconds: f64,
    /// The shortest.
    pub best_seconds: f64,
    /// From the 10th to the 90th percentile, as a share of the median.
    pub spread: f64,
    /// What the median amounts to: useful floating-point operations, or bytes of keys and values, a second.
    pub rate: f64,
    /// Of `rate` and `limit`: GFLOP/s or GB/s.
    pub unit: &'static str,
    /// The larger of the limit just before and just after.
    pub limit: f64,
    /// The limit just before.
    pub limit_before: f64,
    /// The limit just after.
    pub limit_after: f64,
    /// `rate / limit`: what this is about.
    pub fraction: f64,
    /// The same for the shortest run.
    pub best_fraction: f64,
    /// How many times as fast as on one thread in this run.
    pub speedup: Option<f64>,
    /// Clock of a core that ran it, just after, in GHz.
    pub core_ghz: Option<f64>,
    /// `fraction` less that of the earlier run, where there is one to compare with.
    pub fraction_change: Option<f64>,
}

impl CaseReport {
    /// What was measured of a case. `work`: floating-point operations or bytes of one call.
    pub fn new(case: &Case, kernels: &Kernels, threads: usize, work: f64, measured: &Measured) -> Self {
        let Measured { times, limit: [limit_before, limit_after], core_ghz } = measured;
        let limit = limit_before.max(*limit_after);
        let rate = |seconds: f64| work / seconds * 1e-9;
        Self {
            name: case.name,
            isa: kernels.isa().name(),
            threads,
            storage: case.storage.to_string(),
            mode: mode(case, kernels),
            heads: case.heads,
            kv_heads: case.kv_heads,
            queries: case.queries,
            keys: case.keys,
            head_dim: case.head_dim,
            value_dim: case.value_dim,
            runs: times.runs(),
            median_seconds: times.median(),
            best_seconds: times.best(),
            spread: times.spread(),
            rate: rate(times.median()),
            unit: case.bound().unit(),
            limit,
            limit_before: *limit_before,
            limit_after: *limit_after,
            fraction: rate(times.median()) / limit,
            best_fraction: rate(times.best()) / limit,
            speedup: None,
            core_ghz: *core_ghz,
            fraction_change: None,
        }
    }
}

impl KernelReport {
    /// An empty report about this program and this machine.
    pub fn new(cpu_model: String, threads: usize, pinned: bool) -> Self {
        Self {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION"),
            kernel_id: KERNEL_ID,
            cpu_model,
            threads,
            pinned,
            core_ghz_from: "a chain of dependent additions, right after the last run",
            load_before: None,
            load_after: None,
            seconds: 0.0,
            calibration: Vec::new(),
            cases: Vec::new(),
        }
    }

    /// Adds a case; on several threads it is set beside itself on one, if that ran before it.
    pub fn push(&mut self, mut case: CaseReport) {
        let alone = |other: &&CaseReport| {
            (other.name, other.isa, &other.storage, &other.mode)
                == (case.name, case.isa, &case.storage, &case.mode)
                && other.threads == 1
        };
        if case.threads > 1 {
            case.speedup = self.cases.iter().find(alone).map(|one| one.median_seconds / case.median_seconds);
        }
        self.cases.push(case);
    }

    /// One line on the machine and the program.
    pub fn headline(&self) -> String {
        let pinned = if self.pinned { "pinned" } else { "not pinned" };
        format!(
            "{}; attnd {}, kernel_id {}; threads {pinned}; load average before {}, after {}; {:.0} s",
            self.cpu_model,
            self.version,
            self.kernel_id,
            load(self.load_before),
            load(self.load_after),
            self.seconds
        )
    }

    /// The limits.
    pub fn limit_table(&self) -> Table {
        let mut table = table::with_header(["limit", "isa", "threads", "rate"]);
        for limit in &self.calibration {
            let what = match limit.what.as_str() {
                "fma" => "f32 multiply-add",
                "read" => "pure read",
                other => other,
            };
            table.add_row([
                what.to_owned(),
                limit.isa.clone(),
                limit.threads.to_string(),
                format!("{:.1} {}", limit.rate, limit.unit),
            ]);
        }
        table::align_right(&mut table, &[2, 3]);
        table
    }

    /// The cases; with a column for an earlier run if there is one.
    pub fn case_table(&self, compared: bool) -> Table {
        let mut header = vec![
            "case",
            "isa",
            "mode",
            "threads",
            "median",
            "rate",
            "of limit",
            "best",
            "spread",
            "GHz",
            "x 1 thread",
        ];
        if compared {
            header.push("change");
        }
        let mut table = table::with_header(header);
        for case in &self.cases {
            let optional = |text: Option<String>| text.unwrap_or_default();
            let mut row = vec![
                case.name.to_owned(),
                case.isa.to_owned(),
                case.mode.clone(),
                case.threads.to_string(),
                milliseconds(case.median_seconds),
                format!("{:.1} {}", case.rate, case.unit),
                format!("{:.3}", case.fraction),
                format!("{:.3}", case.best_fraction),
                format!("{:.1} %", 100.0 * case.spread),
                optional(case.core_ghz.map(|ghz| format!("{ghz:.2}"))),
                optional(case.speedup.map(|x| format!("{x:.2}"))),
            ];
            if compared {
                row.push(case.fraction_change.map_or_else(|| "new".into(), |change| format!("{change:+.3}")));
            }
            table.add_row(row);
        }
        table::align_right(&mut table, &[3, 4, 5, 6, 7, 8, 9, 10, 11]);
        table
    }

    /// What the columns mean.
    pub fn legend(&self) -> String {
        let fma = Bound::Fma.unit();
        format!(
            "of limit: rate of the median run as a fraction of the peak of the same instruction set and mode \
             ({fma} cases) or\nof the pure-read bandwidth of the same threads (GB/s cases); best: the same for the \
             shortest run; spread: 10th to 90th\npercentile over the median; GHz: {}; causal cases count visible keys only.",
            self.core_ghz_from
        )
    }
}

/// In what arithmetic some kernels run a case, and what was asked for if they lack that.
pub fn mode(case: &Case, kernels: &Kernels) -> String {
    kernels
        .effective(case.compute, case.storage)
        .map_or_else(|mismatch| mismatch.to_string(), |effective| effective.to_string())
}

/// A time in ms with three or four digits.
pub fn milliseconds(seconds: f64) -> String {
    let ms = seconds * 1e3;
    if ms < 100.0 { format!("{ms:.2} ms") } else { format!("{ms:.1} ms") }
}

fn load(average: Option<[f64; 3]>) -> String {
    average.map_or_else(|| "unknown".into(), |[one, ..]| format!("{one:.2}"))
}

#[cfg(test)]
pub mod tests {
    use super::super::case::CASES;
    use super::super::measure::Times;
    use super::*;

    /// A report with one case at 0.6 of 0.3 and 0.5 GFLOP/s limits, on one thread and on two.
    pub fn example() -> KernelReport {
        let mut report = KernelReport::new("Some CPU".into(), 2, true);
        let kernels = Kernels::available().pop().unwrap();
        let measured = |seconds: &[f64], limit| Measured {
            times: Times::new(seconds.to_vec()).unwrap(),
            limit,
            core_ghz: Some(4.0),
        };
        let one = measured(&[1.0, 2.0, 3.0], [0.3, 0.5]);
        let two = measured(&[0.8, 1.0, 1.2], [1.0, 0.5]);
        report.push(CaseReport::new(&CASES[0], kernels, 1, 0.6e9, &one));
        report.push(CaseReport::new(&CASES[0], kernels, 2, 0.6e9, &two));
        report
    }

    #[test]
    fn fractions_are_of_the_larger_limit_and_speedups_of_one_thread() {
        let [one, two] = &example().cases[..] else { panic!("two cases") };
        assert!((one.rate - 0.3).abs() < 1e-12 && (one.fraction - 0.6).abs() < 1e-12, "{one:?}");
        assert!((one.best_fraction - 1.2).abs() < 1e-12);
        assert_eq!(one.speedup, None);
        assert!((two.fraction - 0.6).abs() < 1e-12);
        assert_eq!(two.speedup, Some(2.0));
    }

    #[test]
    fn tables_and_json_say_the_same() {
        let mut report = example();
        report.calibration.push(Limit {
            what: "read".into(),
            isa: "avx2".into(),
            threads: 2,
            rate: 41.25,
            unit: "GB/s".into(),
        });
        let table = report.case_table(false).to_string();
        for part in ["prefill T=2048 d=128", "portable", "2000.0 ms", "0.3 GFLOP/s", "0.600", "1.200", "4.00"]
        {
            assert!(table.contains(part), "no {part} in {table}");
        }
        assert!(!table.contains("change"));
        report.cases[0].fraction_change = Some(-0.0123);
        let compared = report.case_table(true).to_string();
        assert!(compared.contains("-0.012") && compared.contains("new"), "{compared}");
        assert!(report.limit_table().to_string().contains("41.2 GB/s"));
        assert!(report.headline().contains("load average before unknown"));
        let json = serde_json::to_value(&report).unwrap();
        let case = &json["cases"][1];
        assert_eq!((case["storage"].as_str(), case["mode"].as_str()), (Some("f32"), Some("f32")));
        assert_eq!(case["speedup"], 2.0);
        assert_eq!(json["format"], FORMAT);
    }
}
