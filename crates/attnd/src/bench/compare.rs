//! `--compare`: how fractions changed since an earlier run, whose JSON somebody kept.

use std::path::Path;

use serde::Deserialize;

use super::report::{FORMAT, KernelReport};
use crate::exit::BadInput;

/// What is needed of an earlier run.
#[derive(Debug, Deserialize)]
pub struct Earlier {
    format: String,
    version: String,
    cpu_model: String,
    cases: Vec<EarlierCase>,
}

#[derive(Debug, Deserialize)]
struct EarlierCase {
    name: String,
    isa: String,
    threads: usize,
    storage: String,
    mode: String,
    fraction: f64,
}

impl Earlier {
    /// Reads what `attnd bench kernel --json` printed.
    ///
    /// # Errors
    /// [`BadInput`] if the file can't be read or holds something else.
    pub fn read(path: &Path) -> Result<Self, BadInput> {
        let refuse = |why: String| BadInput::new(format!("--compare {}: {why}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
        Self::parse(&text).map_err(refuse)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let expected = "expected what `attnd bench kernel --json` prints";
        let earlier: Self = serde_json::from_str(text).map_err(|error| format!("{expected}: {error}"))?;
        if earlier.format != FORMAT {
            return Err(format!("{expected} in the form {FORMAT}; this is {:?}", earlier.format));
        }
        Ok(earlier)
    }

    /// Fills in how each fraction changed. Returns remarks for the person who compares.
    pub fn compare(&self, report: &mut KernelReport) -> Vec<String> {
        for case in &mut report.cases {
            let same = self.cases.iter().find(|old| {
                (old.name.as_str(), old.isa.as_str(), old.threads) == (case.name, case.isa, case.threads)
                    && (old.storage.as_str(), old.mode.as_str())
                        == (case.storage.as_str(), case.mode.as_str())
            });
            case.fraction_change = same.map(|old| case.fraction - old.fraction);
        }
        let mut remarks = Vec::new();
        if self.cpu_model != report.cpu_model {
            remarks.push(format!(
                "the file of the earlier run is of another CPU: {}; this run is of {}",
                self.cpu_model, report.cpu_model
            ));
        }
        if self.version != report.version {
            remarks.push(format!("the earlier run was of attnd {}", self.version));
        }
        remarks
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::example;
    use super::*;

    const STORED: &str = r#"{
        "format": "attnd-bench-kernel/1", "version": "0.0.1", "cpu_model": "Another CPU", "kernel_id": "c0", "more": 1,
        "cases": [
            {"name": "prefill T=2048 d=128", "isa": "portable", "threads": 2, "storage": "f32", "mode": "f32",
             "fraction": 0.5, "median_seconds": 9.0},
            {"name": "prefill T=2048 d=128", "isa": "portable", "threads": 1, "storage": "bf16", "mode": "f32",
             "fraction": 0.1}
        ]}"#;

    #[test]
    fn fractions_are_compared_case_by_case() {
        let mut report = example();
        let remarks = Earlier::parse(STORED).unwrap().compare(&mut report);
        assert_eq!(report.cases[0].fraction_change, None, "another storage is another case");
        let change = report.cases[1].fraction_change.unwrap();
        assert!((change - 0.1).abs() < 1e-12, "{change}");
        assert_eq!(remarks.len(), 2);
        assert!(remarks[0].contains("of another CPU: Another CPU; this run is of Some CPU"), "{remarks:?}");
    }

    #[test]
    fn a_run_compares_with_itself() {
        let mut report = example();
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(Earlier::parse(&text).unwrap().compare(&mut report), Vec::<String>::new());
        assert!(report.cases.iter().all(|case| case.fraction_change == Some(0.0)));
    }

    #[test]
    fn other_files_are_refused_in_one_line() {
        let other = STORED.replace("kernel/1", "kernel/99");
        for (text, reason) in
            [("", "EOF"), ("[]", "expected"), ("{}", "missing field"), (&*other, "kernel/99")]
        {
            let error = Earlier::parse(text).unwrap_err();
            assert!(error.contains(reason) && !error.contains('\n'), "{error}");
        }
        let error = Earlier::read(Path::new("no/such/file.json")).unwrap_err().to_string();
        assert!(error.starts_with("--compare no/such/file.json: "), "{error}");
    }
}
