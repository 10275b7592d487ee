//! `attnd demo`: real processes, real data, checked against what did not come from them.

use std::num::NonZeroUsize;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use attnd_client::{AttendOptions, Client, WorkerChoice};

use crate::args::DemoArgs;
use crate::call_report::TimingsReport;
use crate::demo::checks::{self, Answer, Check};
use crate::demo::input::{self, Case};
use crate::demo::report::{self, CallReport, HeadView, Run, Summary};
use crate::embedded::{LocalCluster, LocalOptions};
use crate::exit::BadInput;
use crate::output;

/// No call of the demo takes this long; one that does has failed.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Runs the verb.
///
/// # Errors
/// If a cluster can't be started, a call fails, or any check does not hold.
pub async fn run(args: &DemoArgs) -> anyhow::Result<()> {
    let begin = Instant::now();
    let screen = Screen { on: !args.json };
    std::fs::create_dir_all(&args.out)
        .map_err(|error| BadInput::new(format!("--out {}: {error}", args.out.display())))?;
    let tokens = input::tokens()?;
    let [layer_1, layer_4] = input::layers()?;
    let cases = [layer_1, layer_4, input::long()?];

    screen.line(
        "Exact attention over real processes: a coordinator and its workers, talking gRPC on this machine.\n",
    )?;
    for case in &cases {
        screen.line(&format!("  {:8} {}", case.name, case.description))?;
    }
    screen.line("")?;
    let mut observed = Observed::default();
    for workers in &args.workers_list {
        let run = run_cluster(*workers, &cases, &mut observed).await?;
        screen.line(&describe(&run))?;
        observed.runs.push(run);
    }
    let checks = judge(&cases, &observed);

    let weights = report::weights_by_head(&cases[0]);
    let heads = report::head_views(&weights, &tokens);
    let heatmap = args.out.join("attention.svg");
    std::fs::write(&heatmap, report::heatmap(weights, &heads, &tokens))
        .with_context(|| format!("write {}", heatmap.display()))?;

    let passed = checks.iter().all(|check| check.passed);
    let failed: Vec<String> =
        checks.iter().filter(|c| !c.passed).map(|c| format!("{} ({})", c.name, c.detail)).collect();
    let summary = Summary {
        passed,
        checks,
        runs: observed.runs,
        heads,
        heatmap: heatmap.display().to_string(),
        kernel_id: observed.kernel_ids.join(", "),
        seconds: begin.elapsed().as_secs_f64(),
    };
    if args.json {
        output::json(&summary)?;
    } else {
        print(&summary, &heatmap)?;
    }
    anyhow::ensure!(
        passed,
        "{} of {} checks failed: {}",
        failed.len(),
        summary.checks.len(),
        failed.join("; ")
    );
    Ok(())
}

/// Prints unless only JSON is wanted.
struct Screen {
    on: bool,
}

impl Screen {
    fn line(&self, text: &str) -> anyhow::Result<()> {
        if self.on { output::line(text) } else { Ok(()) }
    }
}

/// What came back, by case and run.
#[derive(Debug, Default)]
struct Observed {
    runs: Vec<Run>,
    /// One list for each case, in the order of the runs.
    answers: [Vec<Answer>; 3],
    /// How many workers should have had a share and how many had one, in order of the calls.
    shares: Vec<(usize, usize)>,
    /// Distinct orders of arithmetic, in order of appearance.
    kernel_ids: Vec<String>,
}

/// Starts a cluster, sends it every case, and stops it whatever happened.
async fn run_cluster(
    workers: NonZeroUsize,
    cases: &[Case; 3],
    observed: &mut Observed,
) -> anyhow::Result<Run> {
    let begin = Instant::now();
    let options = LocalOptions { workers: workers.into(), threads_per_worker: None };
    let cluster =
        LocalCluster::start(options).await.with_context(|| format!("start {}", count(workers.get())))?;
    let (startup_seconds, worker_pids) = (begin.elapsed().as_secs_f64(), cluster.worker_pids());
    let calls = call_all(cluster.endpoint(), workers, cases, observed).await;
    cluster.stop().await;
    let calls = calls.with_context(|| format!("with {}", count(workers.get())))?;
    Ok(Run { workers: workers.into(), worker_pids, startup_seconds, calls })
}

async fn call_all(
    endpoint: &str,
    workers: NonZeroUsize,
    cases: &[Case; 3],
    observed: &mut Observed,
) -> anyhow::Result<Vec<CallReport>> {
    let client = Client::connect(endpoint)?;
    let mut reports = Vec::new();
    for (case, answers) in cases.iter().zip(&mut observed.answers) {
        // The plan would leave workers idle for calls this small; the demo is about all of them.
        let options = AttendOptions {
            causal: case.causal,
            workers: WorkerChoice::Exactly(workers.into()),
            timeout: Some(TIMEOUT),
            ..AttendOptions::default()
        };
        let begin = Instant::now();
        let attended = client
            .attend(&case.operands, &options, &mut |_| {})
            .await
            .with_context(|| format!("attend over {}", case.name))?;
        let seconds = begin.elapsed().as_secs_f64();
        let answer = Answer { context: attended.context, lse: attended.lse };
        reports.push(CallReport {
            case: case.name,
            seconds,
            timings: TimingsReport::from(&attended.timings),
            plan: attended.plan.reason,
            digest: checks::digest(&answer),
        });
        answers.push(answer);
        observed.shares.push((workers.get().min(case.cells()), attended.plan.shares.len()));
        if !observed.kernel_ids.contains(&attended.kernel_id) {
            observed.kernel_ids.push(attended.kernel_id);
        }
    }
    Ok(reports)
}

fn describe(run: &Run) -> String {
    let pids = run.worker_pids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let plan = run.calls.last().map(|call| call.plan.as_str()).unwrap_or_default();
    let processes = if run.workers == 1 { "process" } else { "processes" };
    format!("  {:10} {processes} {pids}\n             {plan}", count(run.workers))
}

fn count(workers: usize) -> String {
    if workers == 1 { "1 worker".into() } else { format!("{workers} workers") }
}

fn judge(cases: &[Case; 3], observed: &Observed) -> Vec<Check> {
    let workers: Vec<usize> = observed.runs.iter().map(|run| run.workers).collect();
    let mut checks = Vec::new();
    for (case, answers) in cases.iter().zip(&observed.answers) {
        checks.push(checks::against_reference(case, answers));
        checks.extend(case.stored.as_ref().map(|stored| checks::against_stored(case, stored, answers)));
        checks.push(checks::same_bits(case, &workers, answers));
    }
    let idle = observed.shares.iter().filter(|(due, shares)| due != shares).count();
    checks.push(Check {
        name: "every worker with work took part".into(),
        passed: idle == 0 && observed.shares.len() == cases.len() * observed.runs.len(),
        detail: format!("{} calls, {idle} on fewer workers than have work", observed.shares.len()),
    });
    checks.push(Check {
        name: "one order of arithmetic".into(),
        passed: observed.kernel_ids.len() == 1,
        detail: observed.kernel_ids.join(", "),
    });
    checks
}

fn print(summary: &Summary, heatmap: &Path) -> anyhow::Result<()> {
    let print_heads = |heads: &[HeadView]| output::line(&report::head_table(heads).to_string());
    output::line("\nTimes in milliseconds, the last four for the long sequence:")?;
    output::line(&report::time_table(&summary.runs).to_string())?;
    output::line("\nThe bits of each result, as a 64-bit digest:")?;
    output::line(&report::digest_table(&summary.runs).to_string())?;
    output::line(
        "\nWhat each head of layer 1 looks at (weights computed in this process in f64 from q and k):",
    )?;
    print_heads(&summary.heads)?;
    output::line(&format!("\nHeatmap of these weights: {}", heatmap.display()))?;
    output::line("\nChecks over all runs:")?;
    for check in &summary.checks {
        output::line(&report::check_line(check))?;
    }
    let verdict = if summary.passed { "All checks passed" } else { "NOT all checks passed" };
    output::line(&format!("\n{verdict}, in {:.1} s.", summary.seconds))
}
