//! `attnd attend`: tensors from files, one call, the result into a file.

use std::num::NonZeroUsize;
use std::time::Instant;

use attnd_client::{AttendOptions, Attended, Operands};
use serde::Serialize;

use crate::args::{AttendArgs, EmptyRowArg};
use crate::call_report::{PlanReport, TimingsReport, plan_table, timing_table};
use crate::exit::{BadInput, connect};
use crate::options;
use crate::output;
use crate::outputs;
use crate::progress::CallProgress;
use crate::score_numbers;
use crate::site::Site;
use crate::tensor_file::{self, Array, Inputs, Output, OutputPath, Source, Values};

/// Runs the verb.
///
/// # Errors
/// [`BadInput`] and the errors of reading files end the process with code 2, others with 1, among them a result that
/// can't be written.
pub async fn run(args: &AttendArgs) -> anyhow::Result<()> {
    let sources = sources(args)?;
    let site = Site::of(&args.site, |key| std::env::var(key).ok())?;
    if let Some(output) = &args.output {
        check_room(args, output)?;
        output.check().map_err(|error| BadInput::new(error.to_string()))?;
        for (option, source) in sources.iter().copied().chain(args.operator.sources()) {
            if output.is_file_of(source) {
                let path = output.path().display();
                let text =
                    format!("--output {path} is the file of {option} {source}, which it would replace");
                return Err(BadInput::new(text).into());
            }
        }
    }
    let options = of_args(args)?;
    let [q, k] = [tensor_file::read(sources[0].1)?, tensor_file::read(sources[1].1)?];
    let v = match (sources.get(2), args.value_prefix) {
        (Some((_, v)), _) => Values::Sent(tensor_file::read(v)?),
        (None, prefix) => Values::OfKeys(prefix.map_or(0, NonZeroUsize::get)),
    };
    let inputs = tensor_file::assemble(q, k, v, options::query_dim(&args.operator))?;
    options::check_documents(&args.operator, &inputs.operands.shape)?;
    inputs.notes.iter().for_each(|note| output::note(note));

    let parts = args.outputs.parts(&inputs.operands.shape);
    let score = score_numbers::spread(options.score, &args.operator.function, &inputs.operands.shape)?;
    let options = AttendOptions { score, outputs: parts.clone(), ..options };
    let (attended, seconds) =
        site.ask(async |endpoint| call(endpoint, &options, &inputs.operands).await).await?;
    let shape = &inputs.operands.shape;
    let arrays = outputs::arrays(&attended.inspected, &parts, shape, inputs.batched);
    let written = args.output.as_ref().map(|to| {
        let shape = result_shape(&inputs);
        let (context, lse, kernel_id) = (&attended.context, &attended.lse, &attended.kernel_id);
        tensor_file::write(to, &Output { shape: &shape, context, lse, kernel_id, arrays: &arrays })
    });
    // The call was made and may have taken hours: what is known of it is printed even where the disk is full.
    let reported = report(args, &inputs, &attended, &arrays, seconds, matches!(written, Some(Ok(()))));
    written.transpose()?;
    reported
}

/// Where q, k and, unless it is part of k, v are, and the flags that say so.
fn sources(args: &AttendArgs) -> Result<Vec<(&'static str, &Source)>, BadInput> {
    let all = [("--q", &args.q), ("--k", &args.k), ("--v", &args.v)];
    let needed = if args.value_prefix.is_some() { &all[..2] } else { &all[..] };
    let given =
        needed.iter().filter_map(|(flag, source)| Some((*flag, source.as_ref()?))).collect::<Vec<_>>();
    if given.len() == needed.len() {
        return Ok(given);
    }
    // Without a request file the command line would have been refused.
    let flag = needed.iter().find(|(_, source)| source.is_none()).map_or("", |(flag, _)| flag);
    let file = args.request.as_ref().map_or_else(String::new, |file| format!(" nor in {}", file.display()));
    Err(BadInput::new(format!("{flag} is missing: not typed{file}")))
}

/// Refuses a file that has no room for what is wanted.
fn check_room(args: &AttendArgs, output: &OutputPath) -> Result<(), BadInput> {
    match output {
        OutputPath::Npy(path) if !args.outputs.is_empty() => Err(BadInput::new(format!(
            "--output {}: .npy holds the context only, and more than that is asked for; name a .safetensors file",
            path.display()
        ))),
        _ => Ok(()),
    }
}

/// What is asked for, as the client takes it.
fn of_args(args: &AttendArgs) -> anyhow::Result<AttendOptions> {
    Ok(AttendOptions {
        empty_row: args.empty_row.into(),
        allow_non_finite: args.allow_non_finite,
        ..options::of_flags(&args.operator, &args.site)?
    })
}

/// One call, with a progress bar, and the seconds that it took.
pub(super) async fn call(
    endpoint: &str,
    options: &AttendOptions,
    operands: &Operands,
) -> anyhow::Result<(Attended, f64)> {
    let client = connect(endpoint)?;
    let progress = CallProgress::new();
    let begin = Instant::now();
    let attended = client.attend(operands, options, &mut |event| progress.update(&event)).await?;
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
    /// What was told beside the context.
    outputs: Vec<ArrayReport>,
    /// What was written, if anything.
    output: Option<String>,
}

/// An array beside the context.
#[derive(Debug, Serialize)]
struct ArrayReport {
    name: String,
    shape: Vec<usize>,
    dtype: &'static str,
}

fn report(
    args: &AttendArgs,
    inputs: &Inputs,
    attended: &Attended,
    arrays: &[Array<'_>],
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
        outputs: arrays
            .iter()
            .map(|Array { name, shape, elements }| ArrayReport {
                name: name.clone(),
                shape: shape.clone(),
                dtype: elements.dtype(),
            })
            .collect(),
        output: args.output.as_ref().filter(|_| written).map(|output| output.path().display().to_string()),
    };
    if args.json {
        return output::json(&report);
    }
    output::line(&format!("plan: {}", report.plan.reason))?;
    output::line(&plan_table(&report.plan).to_string())?;
    output::line(&timing_table(&report.timings, seconds).to_string())?;
    if report.empty_rows > 0 {
        let filled = match (&args.operator.sinks, args.empty_row) {
            (Some(_), _) => "",
            (None, EmptyRowArg::Zero) => ": their context is 0 and their lse -inf",
            (None, EmptyRowArg::Nan) => ": their context is NaN and their lse -inf",
            (None, EmptyRowArg::Uniform) => ": their context is the mean of the values and their lse -inf",
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
    let more = report.outputs.iter().map(|array| format!(", {} {:?}", array.name, array.shape));
    let result = format!("context {:?}, f32{}", report.context_shape, more.collect::<String>());
    match &report.output {
        Some(path) => output::line(&format!("wrote {path}: {result}")),
        None if args.output.is_some() => Ok(()),
        None => output::line(&format!("{result}; -o FILE writes it")),
    }
}
