//! `attnd bench`: this machine's kernels, measured.

use std::time::Instant;

use anyhow::Context as _;
use attnd_kernel::{ISA_VARIABLE, Isa, Kernels, Storage};

use crate::args::{Bench, BenchArgs, BenchKernelArgs, BenchPeersArgs};
use crate::bench::case::{Case, chosen};
use crate::bench::compare::Earlier;
use crate::bench::limits::Limits;
use crate::bench::machine;
use crate::bench::measure::{Effort, measure};
use crate::bench::operands::CaseOperands;
use crate::bench::report::{CaseReport, KernelReport};
use crate::bench::threads::Pools;
use crate::bench::torch::Torch;
use crate::bench::{peers, venv};
use crate::exit::BadInput;
use crate::output;

/// Runs the verb.
///
/// # Errors
/// [`BadInput`] for arguments that can't be meant; otherwise if the system refuses memory or threads.
pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    match &args.what {
        Bench::Kernel(args) => kernel(args),
        Bench::Peers(args) => beside_peers(args),
    }
}

fn kernel(args: &BenchKernelArgs) -> anyhow::Result<()> {
    // All that can be wrong with the arguments comes first: a run takes minutes.
    let earlier = args.compare.as_deref().map(Earlier::read).transpose()?;
    let kernels = kernels_of(&args.isa)?;
    let threads = match args.threads {
        Some(threads) => threads.get(),
        None => cores()?,
    };
    let cases = chosen(args.case.as_deref(), threads)?;
    let effort = args.repeat.map_or(Effort::Span(args.seconds), Effort::Runs);

    let pools = Pools::start(threads)?;
    let mut report = KernelReport::new(machine::cpu_model(), threads, pools.pinned);
    fill(&mut report, &cases, &kernels, &pools, effort)?;
    let remarks = earlier.as_ref().map(|earlier| earlier.compare(&mut report)).unwrap_or_default();
    for remark in remarks {
        output::note(&remark);
    }
    if args.json {
        return output::json(&report);
    }
    output::line(&report.headline())?;
    output::line(&report.limit_table().to_string())?;
    output::line(&report.case_table(earlier.is_some()).to_string())?;
    output::line(&report.legend())
}

fn beside_peers(args: &BenchPeersArgs) -> anyhow::Result<()> {
    let threads = cores()?;
    let mut cases = chosen(args.case.as_deref(), threads)?;
    // torch runs each case with each of its own types, so those of ours would only repeat them.
    cases.retain(|case| case.storage == Storage::F32);
    let kernels = Kernels::from_env().map_err(|error| BadInput::new(error.to_string()))?;
    let folder = match &args.venv {
        Some(folder) => folder.clone(),
        None => venv::default_folder(|key| std::env::var(key).ok())?,
    };
    let mut torch = Torch::start(&venv::python_with_torch(&folder)?)?;
    let pools = Pools::start(threads)?;
    let report = peers::run(&cases, kernels, &pools, &mut torch, args.seconds)?;
    if args.json {
        return output::json(&report);
    }
    output::line(&report.headline())?;
    output::line(&report.table().to_string())?;
    output::line(report.legend())
}

fn cores() -> anyhow::Result<usize> {
    Ok(std::thread::available_parallelism().context("count the cores")?.get())
}

/// The kernels that were asked for; by default what `ATTND_ISA` says, or all but the portable ones, which only say
/// something where there are no others.
fn kernels_of(isas: &[Isa]) -> anyhow::Result<Vec<&'static Kernels>> {
    let refuse = |error: attnd_kernel::IsaError| BadInput::new(error.to_string());
    if !isas.is_empty() {
        return Ok(isas
            .iter()
            .map(|isa| Kernels::for_isa(*isa).map_err(refuse))
            .collect::<Result<_, _>>()?);
    }
    if std::env::var_os(ISA_VARIABLE).is_some() {
        return Ok(vec![Kernels::from_env().map_err(refuse)?]);
    }
    let mut available = Kernels::available();
    if available.len() > 1 {
        available.retain(|kernels| kernels.isa() != Isa::Portable);
    }
    Ok(available)
}

fn fill(
    report: &mut KernelReport,
    cases: &[Case],
    kernels: &[&'static Kernels],
    pools: &Pools,
    effort: Effort,
) -> anyhow::Result<()> {
    let began = Instant::now();
    report.load_before = machine::load_average();
    let mut limits = Limits::new(pools).context("memory to measure bandwidth with")?;
    limits.all(kernels);
    let mut operands: Option<CaseOperands> = None;
    for (done, case) in cases.iter().enumerate() {
        let held = operands.take().filter(|held| held.serve(case));
        let held = match held {
            Some(held) => held,
            None => CaseOperands::random(case)?,
        };
        for kernels in kernels {
            if output::is_watched() {
                output::note(&format!("{} of {}: {}, {}", done + 1, cases.len(), case.name, kernels.isa()));
            }
            let Some(measured) = measure(case, &held, kernels, pools, &mut limits, effort) else { continue };
            report.push(CaseReport::new(case, kernels, pools.threads(case.team), case.work()?, &measured));
        }
        operands = Some(held);
    }
    limits.all(kernels);
    report.calibration = limits.best();
    report.load_after = machine::load_average();
    report.seconds = began.elapsed().as_secs_f64();
    Ok(())
}
