//! `attnd attend`: tensors from files, one call, the result into a file.

use std::time::Instant;

use anyhow::Context as _;
use attnd_client::{AttendOptions, Attended};
use serde::Serialize;

use crate::args::{AttendArgs, EmptyRowArg};
use crate::call_report::{PlanReport, TimingsReport, plan_table, timing_table};
use crate::embedded::LocalCluster;
use crate::exit::{BadInput, connect};
use crate::output;
use crate::progress::CallProgress;
use crate::site::{Site, worker_choice};
use crate::tensor_file::{self, Inputs, Output};

/// Runs the verb.
///
/// # Errors
/// [`BadInput`] and the errors of reading files end the process with code 2, others with 1, among them a result that
/// can't be written.
pub async fn run(args: &AttendArgs) -> anyhow::Result<()> {
    let site = Site::of(&args.site, |key| std::env::var(key).ok())?;
    if let Some(output) = &args.output {
        output.check().map_err(|error| BadInput::new(error.to_string()))?;
        let sinks = args.sinks.iter().map(|source| ("--sinks", source));
        for (option, source) in
            [("--q", &args.q), ("--k", &args.k), ("--v", &args.v)].into_iter().chain(sinks)
        {
            if output.is_file_of(source) {
                let path = output.path().display();
                let text =
                    format!("--output {path} is the file of {option} {source}, which it would replace");
                return Err(BadInput::new(text).into());
            }
        }
    }
    let options = options(args)?;
    let [q, k, v] = [tensor_file::read(&args.q)?, tensor_file::read(&args.k)?, tensor_file::read(&args.v)?];
    let inputs = tensor_file::assemble(q, k, v)?;
    inputs.notes.iter().for_each(|note| output::note(note));

    let (attended, seconds) = match site {
        Site::Remote(endpoint) => call(&endpoint, &options, &inputs).await.with_context(|| endpoint)?,
        Site::Local(local) => {
            let cluster = LocalCluster::start(local).await?;
            let outcome = call(cluster.endpoint(), &options, &inputs).await;
            cluster.stop().await;
            outcome?
        }
    };
    let written = args.output.as_ref().map(|to| {
        let shape = result_shape(&inputs);
        let (context, lse) = (&attended.context, &attended.lse);
        tensor_file::write(to, &Output { shape: &shape, context, lse, kernel_id: &attended.kernel_id })
    });
    // The call was made and may have taken hours: what is known of it is printed even where the disk is full.
    let reported = report(args, &inputs, &attended, seconds, matches!(written, Some(Ok(()))));
    written.transpose()?;
    reported
}

/// What is asked for, as the client takes it.
fn options(args: &AttendArgs) -> anyhow::Result<AttendOptions> {
    let missing = || BadInput::new("--causal=offset needs --offset");
    let (causal, mask) = args.causal_and_mask().ok_or_else(missing)?;
    let sinks = args.sinks.as_ref().map(tensor_file::read_vector).transpose()?;
    Ok(AttendOptions {
        scale: args.scale,
        causal,
        mask,
        sinks: sinks.map(Into::into),
        empty_row: args.empty_row.into(),
        allow_non_finite: args.allow_non_finite,
        workers: worker_choice(&args.site),
        timeout: Some(args.site.timeout),
        ..AttendOptions::default()
    })
}

async fn call(endpoint: &str, options: &AttendOptions, inputs: &Inputs) -> anyhow::Result<(Attended, f64)> {
    let client = connect(endpoint)?;
    let progress = CallProgress::new();
    let begin = Instant::now();
    let attended = client.attend(&inputs.operands, options, &mut |event| progress.update(&event)).await?;
    Ok((attended, begin.elapsed().as_secs_f64()))
}

fn result_shape(inputs: &Inputs) -> Vec<usize> {
    let shape = &inputs.operands.shape;
    let full = [shape.batch(), shape.n_heads(), shape.n_queries(), shape.value_dim()];
    full[usize::from(!inputs.batched)..].to_vec()
}

/// The `--json` form.
#[derive(Debug, Serialize)]
struct AttendReport {
    context_shape: Vec<usize>,
    kv_heads: usize,
    keys: usize,
    head_dim: usize,
    dtype: String,
    plan: PlanReport,
    timings: TimingsReport,
    client_seconds: f64,
    empty_rows: u64,
    attempts: u32,
    retried_after: Vec<&'static str>,
    kernel_id: String,
    /// What was written, if anything.
    output: Option<String>,
}

fn report(
    args: &AttendArgs,
    inputs: &Inputs,
    attended: &Attended,
    seconds: f64,
    written: bool,
) -> anyhow::Result<()> {
    let shape = &inputs.operands.shape;
    let report = AttendReport {
        context_shape: result_shape(inputs),
        kv_heads: shape.n_kv_heads(),
        keys: shape.n_keys(),
        head_dim: shape.head_dim(),
        dtype: inputs.operands.dtype.to_string(),
        plan: PlanReport::from(&attended.plan),
        timings: TimingsReport::from(&attended.timings),
        client_seconds: seconds,
        empty_rows: attended.empty_rows,
        attempts: attended.attempts,
        retried_after: attended.retried_after.iter().map(|reason| reason.name()).collect(),
        kernel_id: attended.kernel_id.clone(),
        output: args.output.as_ref().filter(|_| written).map(|output| output.path().display().to_string()),
    };
    if args.json {
        return output::json(&report);
    }
    output::line(&format!("plan: {}", report.plan.reason))?;
    output::line(&plan_table(&report.plan).to_string())?;
    output::line(&timing_table(&report.timings, seconds).to_string())?;
    if report.empty_rows > 0 {
        let filled = match (&args.sinks, args.empty_row) {
            (Some(_), _) => "",
            (None, EmptyRowArg::Zero) => ": their context is 0 and their lse -inf",
            (None, EmptyRowArg::Nan) => ": their context is NaN and their lse -inf",
        };
        output::line(&format!("{} rows see no key{filled}", report.empty_rows))?;
    }
    if report.attempts > 1 {
        output::line(&format!(
            "attempt {} succeeded; before it: {}",
            report.attempts,
            report.retried_after.join(", ")
        ))?;
    }
    match &report.output {
        Some(path) => output::line(&format!("wrote {path}: context {:?}, f32", report.context_shape)),
        None if args.output.is_some() => Ok(()),
        None => output::line(&format!("context {:?}, f32; -o FILE writes it", report.context_shape)),
    }
}
