//! The cases by torch and by attnd in one run, alternating, side by side.

use std::time::Duration;

use anyhow::Context as _;
use attnd_kernel::{KERNEL_ID, Kernels, Storage};
use comfy_table::Table;
use serde::Serialize;

use super::case::{Bound, Case};
use super::machine;
use super::measure::{Effort, Times, times};
use super::operands::CaseOperands;
use super::report::milliseconds;
use super::report::mode;
use super::threads::Pools;
use super::torch::{Request, Torch};
use crate::{output, table};

/// Times that each library has its turn at each case.
const ROUNDS: u32 = 2;
/// Fewest runs in a turn of torch; attnd has its own.
const MIN_RUNS: usize = 5;

/// A whole run: the `--json` form.
#[derive(Debug, Clone, Serialize)]
pub struct PeersReport {
    /// Names this form.
    pub format: &'static str,
    /// Of the program.
    pub version: &'static str,
    /// Names attnd's order of arithmetic.
    pub kernel_id: &'static str,
    /// Whose kernels attnd ran.
    pub isa: &'static str,
    /// Of torch.
    pub torch: String,
    /// Of this machine.
    pub cpu_model: String,
    /// Whether attnd's threads were kept on cores of their own; torch's process was kept on the same cores.
    pub pinned: bool,
    /// Load averages over 1, 5 and 15 minutes before the run.
    pub load_before: Option<[f64; 3]>,
    /// The same after it.
    pub load_after: Option<[f64; 3]>,
    /// One for each case and way to call torch.
    pub rows: Vec<PeerRow>,
}

/// One case by both.
#[derive(Debug, Clone, Serialize)]
pub struct PeerRow {
    /// Of the case.
    pub name: &'static str,
    /// Threads that ran it.
    pub threads: usize,
    /// Type of torch's operands.
    pub torch_dtype: &'static str,
    /// How torch is called: `sdpa`, or `sdpa, folded`, where the heads of a group are made query tokens by hand.
    pub torch_call: &'static str,
    /// torch's median time of a call.
    pub torch_seconds: f64,
    /// The same as a rate: useful GFLOP/s, or GB/s of keys and values as attnd stores them, whatever torch does.
    pub torch_rate: f64,
    /// How attnd stores keys and values.
    pub storage: String,
    /// In what arithmetic attnd computes.
    pub mode: String,
    /// attnd's median time of a call.
    pub attnd_seconds: f64,
    /// The same as a rate.
    pub attnd_rate: f64,
    /// GFLOP/s or GB/s.
    pub unit: &'static str,
    /// How many times as fast attnd is: `torch_seconds / attnd_seconds`.
    pub ratio: f64,
}

/// A way to call torch.
#[derive(Debug, Clone, Copy)]
struct Variant {
    dtype: &'static str,
    fold: bool,
}

impl Variant {
    /// Those that make sense for a case: none where there is a window, which torch has only as a mask of all pairs. Folding by hand is what somebody does who knows how torch treats groups; a causal
    /// rule would then count heads as tokens.
    fn of(case: &Case) -> Vec<Self> {
        if case.window.is_some() {
            return Vec::new();
        }
        let foldable = case.heads != case.kv_heads && case.bound() == Bound::Read;
        let folds: &[bool] = if foldable { &[false, true] } else { &[false] };
        let dtype = if case.storage == Storage::Bf16 { "bf16" } else { "f32" };
        folds.iter().map(|fold| Self { dtype, fold: *fold }).collect()
    }

    fn call(self) -> &'static str {
        if self.fold { "sdpa, folded" } else { "sdpa" }
    }
}

/// Runs the cases, each library in turn.
///
/// # Errors
/// If torch fails, or the system refuses memory.
pub fn run(
    cases: &[Case],
    kernels: &Kernels,
    pools: &Pools,
    torch: &mut Torch,
    span: Duration,
) -> anyhow::Result<PeersReport> {
    let mut report = PeersReport {
        format: "attnd-bench-peers/1",
        version: env!("CARGO_PKG_VERSION"),
        kernel_id: KERNEL_ID,
        isa: kernels.isa().name(),
        torch: torch.version.clone(),
        cpu_model: machine::cpu_model(),
        pinned: pools.pinned,
        load_before: machine::load_average(),
        load_after: None,
        rows: Vec::new(),
    };
    let mut operands: Option<CaseOperands> = None;
    let of_both_types: Vec<Case> = cases.iter().flat_map(|case| [*case, case.in_bf16()]).collect();
    for (done, case) in of_both_types.iter().enumerate() {
        if output::is_watched() {
            output::note(&format!("{} of {}: {}", done + 1, of_both_types.len(), case.name));
        }
        let held = match operands.take().filter(|held| held.serve(case)) {
            Some(held) => held,
            None => CaseOperands::random(case)?,
        };
        let rows = side_by_side(case, &held, kernels, pools, torch, span);
        report.rows.extend(rows.with_context(|| case.name)?);
        operands = Some(held);
    }
    report.load_after = machine::load_average();
    Ok(report)
}

fn side_by_side(
    case: &Case,
    operands: &CaseOperands,
    kernels: &Kernels,
    pools: &Pools,
    torch: &mut Torch,
    span: Duration,
) -> anyhow::Result<Vec<PeerRow>> {
    let threads = pools.threads(case.team);
    let turn = span / ROUNDS;
    let variants = Variant::of(case);
    let compute = kernels.effective(case.compute, case.storage)?;
    let operator = case.operator()?;
    let call = || operands.attend(case, &operator, compute, kernels, pools.of(case.team));
    let mut by_torch: Vec<Vec<f64>> = vec![Vec::new(); variants.len()];
    let mut by_attnd = Vec::new();
    for _round in 0..ROUNDS {
        for (variant, seconds) in variants.iter().zip(&mut by_torch) {
            let cores = pools.cores_of(case.team);
            let mut request = Request::new(case, threads, cores, turn.as_secs_f64(), MIN_RUNS);
            (request.dtype, request.fold) = (variant.dtype, variant.fold);
            seconds.extend(torch.time(&request)?);
        }
        by_attnd.extend(times(Effort::Span(turn), call));
    }
    let attnd_seconds = Times::new(by_attnd).context("no run of attnd")?.median();
    let work = case.work()?;
    let rows = variants.iter().zip(by_torch).map(|(variant, seconds)| {
        let torch_seconds = Times::new(seconds).context("no run of torch")?.median();
        Ok(row(case, threads, *variant, work, torch_seconds, (mode(case, kernels), attnd_seconds)))
    });
    rows.collect()
}

fn row(
    case: &Case,
    threads: usize,
    variant: Variant,
    work: f64,
    torch_seconds: f64,
    (mode, attnd_seconds): (String, f64),
) -> PeerRow {
    PeerRow {
        name: case.name,
        threads,
        torch_dtype: variant.dtype,
        torch_call: variant.call(),
        torch_seconds,
        torch_rate: work / torch_seconds * 1e-9,
        storage: case.storage.to_string(),
        mode,
        attnd_seconds,
        attnd_rate: work / attnd_seconds * 1e-9,
        unit: case.bound().unit(),
        ratio: torch_seconds / attnd_seconds,
    }
}

impl PeersReport {
    /// One line on the machine and the programs.
    pub fn headline(&self) -> String {
        format!(
            "{}; torch {}; attnd {}, kernel_id {}, {}",
            self.cpu_model, self.torch, self.version, self.kernel_id, self.isa
        )
    }

    /// All rows.
    pub fn table(&self) -> Table {
        let header =
            ["case", "threads", "torch", "dtype", "median", "attnd", "median", "rate", "attnd / torch"];
        let mut table = table::with_header(header);
        for row in &self.rows {
            table.add_row([
                row.name.to_owned(),
                row.threads.to_string(),
                row.torch_call.to_owned(),
                row.torch_dtype.to_owned(),
                milliseconds(row.torch_seconds),
                row.mode.clone(),
                milliseconds(row.attnd_seconds),
                format!("{:.1} {}", row.attnd_rate, row.unit),
                format!("{:.2}", row.ratio),
            ]);
        }
        table::align_right(&mut table, &[1, 4, 6, 7, 8]);
        table
    }

    /// What the columns mean.
    pub fn legend(&self) -> &'static str {
        "attnd / torch: how many times as fast attnd is, by medians of alternating runs. Beside torch's bf16 \
         attnd stores bf16\nand computes in the mode of the row. folded: a group's heads made query tokens by hand."
    }
}

#[cfg(test)]
mod tests {
    use super::super::case::CASES;
    use super::*;

    #[test]
    fn torch_is_called_in_each_way_that_makes_sense() {
        let calls = |name: &str| {
            let case = CASES.iter().find(|case| case.name.contains(name)).unwrap();
            Variant::of(case).iter().map(|v| (v.dtype, v.call())).collect::<Vec<_>>()
        };
        assert_eq!(calls("causal"), [("f32", "sdpa")]);
        assert_eq!(calls("decode T=32768 d=128 H=32/8"), [("f32", "sdpa"), ("f32", "sdpa, folded")]);
        assert_eq!(calls("prefill T=2048 d=64 bf16 dots"), [("bf16", "sdpa")]);
        // torch's causal rule is attnd's only where there are as many queries as keys.
        let causal = |case: &&Case| case.causal != attnd_kernel::Causal::None;
        assert!(CASES.iter().filter(causal).all(|case| case.queries == case.keys));
    }

    #[test]
    fn a_ratio_above_one_says_that_attnd_is_faster() {
        let variant = Variant { dtype: "bf16", fold: false };
        let row = row(&CASES[0], 2, variant, 3e9, 0.03, ("f32".into(), 0.01));
        assert!((row.ratio - 3.0).abs() < 1e-12 && (row.attnd_rate - 300.0).abs() < 1e-9);
        let report = PeersReport {
            format: "",
            version: "1",
            kernel_id: "c1",
            isa: "avx2",
            torch: "2.0".into(),
            cpu_model: "Some CPU".into(),
            pinned: true,
            load_before: None,
            load_after: None,
            rows: vec![row],
        };
        let table = report.table().to_string();
        for part in ["prefill T=2048 d=128", "bf16", "30.00 ms", "10.00 ms", "300.0 GFLOP/s", "3.00"] {
            assert!(table.contains(part), "no {part} in {table}");
        }
        assert_eq!(report.headline(), "Some CPU; torch 2.0; attnd 1, kernel_id c1, avx2");
    }
}
