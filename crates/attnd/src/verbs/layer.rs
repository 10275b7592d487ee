//! `attnd layer`: matrices and rows from files, projections here or on the workers, attention on the cluster, the result into a file.

use std::time::Instant;

use attnd_client::AttendOptions;
use attnd_client::layer::{
    LatentParts, LatentWeights, Layer, LayerAnswer, LayerCall, LayerError, LayerParts, LayerWeights,
    Prediction, ProjectOn, ProjectionPlan, Rows, Weights,
};
use serde::Serialize;

use crate::args::LayerArgs;
use crate::call_report::{PlanReport, TimingsReport, plan_table, timing_table};
use crate::exit::{BadInput, connect};
use crate::flags::with_flags;
use crate::output;
use crate::progress::CallProgress;
use crate::site::{Site, worker_choice};
use crate::tensor_file::{self, Elements, Source};

/// Runs the verb.
///
/// # Errors
/// [`BadInput`] and the errors of reading files end the process with code 2, others with 1, among them a result that can't be
/// written.
pub async fn run(args: &LayerArgs) -> anyhow::Result<()> {
    let site = Site::of(&args.site, |key| std::env::var(key).ok())?;
    check_output(args)?;
    let call = call(args)?;
    let (layer, inputs) = (layer(args)?, Inputs::read(args)?);

    let project = args.project.into();
    let computed =
        site.ask(async |endpoint| compute(endpoint, &layer, &inputs, &call, project).await).await?;
    let Computed { projections, answer, seconds } = computed;
    let shapes = Shapes::of(args, &layer, &inputs, &answer);
    let written = args.output.as_ref().map(|to| {
        let output = ("output", &shapes.output[..], Elements::F32(&answer.output));
        let weights =
            shapes.weights.as_ref().map(|shape| ("weights", &shape[..], Elements::F32(&answer.weights)));
        let tensors: Vec<_> = [output].into_iter().chain(weights).collect();
        tensor_file::write_named(to, &tensors, &answer.attended.kernel_id)
    });
    // As for a call without a layer: what is known of it is printed even where the disk is full.
    let reported = report(args, projections, &shapes, &answer, seconds, matches!(written, Some(Ok(()))));
    written.transpose()?;
    reported
}

/// Refuses a destination that can't be written, or that is one of the inputs.
fn check_output(args: &LayerArgs) -> anyhow::Result<()> {
    let Some(output) = &args.output else { return Ok(()) };
    output.check().map_err(|error| BadInput::new(error.to_string()))?;
    let state = Source::Safetensors { path: args.state.clone(), name: args.prefix.clone() };
    let rows = [("--x", Some(&args.x)), ("--key", args.key.as_ref()), ("--value", args.value.as_ref())];
    let rows = rows.into_iter().filter_map(|(option, source)| source.map(|source| (option, source)));
    for (option, source) in rows.chain([("--state", &state)]) {
        if output.is_file_of(source) {
            let (path, source) = (output.path().display(), source.path().display());
            let text = format!("--output {path} is the file of {option} {source}, which it would replace");
            return Err(BadInput::new(text).into());
        }
    }
    Ok(())
}

/// What is asked for, as the client takes it.
fn call(args: &LayerArgs) -> Result<LayerCall, BadInput> {
    let missing = || BadInput::new("--causal=offset needs --offset");
    let (causal, mask) = args.causal_and_mask().ok_or_else(missing)?;
    let options = AttendOptions {
        causal,
        mask,
        allow_non_finite: args.allow_non_finite,
        workers: worker_choice(&args.site),
        timeout: Some(args.site.timeout),
        ..AttendOptions::default()
    };
    Ok(LayerCall { options, position: args.rope_position, weights: args.weights.map(Into::into) })
}

fn layer(args: &LayerArgs) -> anyhow::Result<Layer> {
    let heads = args.heads.get();
    let kv_heads = args.kv_heads.map_or(heads, Into::into);
    let state = tensor_file::read_state(&args.state, &args.prefix)?;
    let is_latent = LatentWeights::are_named(state.iter().map(|(name, _)| name.as_str()));
    let of_file = |error: LayerError| match bad_input(error) {
        Ok(fault) => BadInput::new(format!("{}: {fault}", args.state.display())).into(),
        Err(other) => other,
    };
    let (scale, rope) = (args.scale, args.rotary());
    if is_latent {
        if kv_heads != heads {
            let text = format!(
                "--kv-heads {kv_heads}: latent attention makes keys and values for each of its {heads} heads"
            );
            return Err(BadInput::new(text).into());
        }
        let weights = LatentWeights::from_state(state, heads, args.norm_eps.unwrap_or(1e-6));
        let weights = weights.map_err(|error| of_file(error.into()))?;
        let parts = LatentParts { weights, heads, scale, rope, add_zero_attn: args.add_zero_attn };
        return Layer::latent(parts).map_err(of_file);
    }
    let weights = Weights::from_state(state, heads, kv_heads).map_err(|error| of_file(error.into()))?;
    // Only of a layer that there is: without its prefix one of latent attention has no names that are known.
    if args.norm_eps.is_some() {
        let text =
            format!("--norm-eps: {} has no latent attention, whose norms it is for", args.state.display());
        return Err(BadInput::new(text).into());
    }
    let parts = LayerParts { weights, heads, kv_heads, scale, rope, add_zero_attn: args.add_zero_attn };
    Layer::new(parts).map_err(of_file)
}

/// What a layer refuses because of what was typed or read, as text; all else as it is.
fn bad_input(error: LayerError) -> Result<String, anyhow::Error> {
    match error {
        LayerError::Call(error) => Err(error.into()),
        LayerError::Memory(_) | LayerError::RowMemory { .. } | LayerError::Stopped => Err(error.into()),
        LayerError::Together { .. } => Ok(with_flags(&error.to_string())),
        LayerError::Weights(_)
        | LayerError::Rows { .. }
        | LayerError::Elements { .. }
        | LayerError::Rope(_)
        | LayerError::Isa(_) => Ok(error.to_string()),
    }
}

/// Rows that go into the layer. Those that weren't typed are others' clones.
struct Inputs {
    query: Rows,
    key: Rows,
    value: Rows,
    /// Whether the result has a batch dimension: it has one if the rows of queries have.
    batched: bool,
}

impl Inputs {
    fn read(args: &LayerArgs) -> anyhow::Result<Self> {
        let query = tensor_file::read_rows(&args.x)?;
        let read = |source: &Source| tensor_file::read_rows(source).map(|tensor| tensor.rows);
        let key = args.key.as_ref().map_or_else(|| Ok(query.rows.clone()), read)?;
        let value = args.value.as_ref().map_or_else(|| Ok(key.clone()), read)?;
        Ok(Self { query: query.rows, key, value, batched: query.batched })
    }
}

/// What came of a call.
struct Computed {
    projections: ProjectionPlan,
    answer: LayerAnswer,
    /// Projections included, and not what it took to decide where they run.
    seconds: f64,
}

async fn compute(
    endpoint: &str,
    layer: &Layer,
    inputs: &Inputs,
    call: &LayerCall,
    project: ProjectOn,
) -> anyhow::Result<Computed> {
    let client = connect(endpoint)?;
    let progress = CallProgress::new();
    let rows = [&inputs.query, &inputs.key, &inputs.value];
    let computed = async {
        let projections = layer.plan(&client, rows, call, project).await?;
        let begin = Instant::now();
        let update = &mut |event| progress.update(&event);
        let answer = layer.call(&client, rows, call, projections.place, update).await?;
        Ok(Computed { projections, answer, seconds: begin.elapsed().as_secs_f64() })
    };
    computed
        .await
        .map_err(|error| bad_input(error).map_or_else(|other| other, |text| BadInput::new(text).into()))
}

/// Shapes of what comes out, without a batch dimension where the rows had none.
struct Shapes {
    output: Vec<usize>,
    weights: Option<Vec<usize>>,
}

impl Shapes {
    fn of(args: &LayerArgs, layer: &Layer, inputs: &Inputs, answer: &LayerAnswer) -> Self {
        let (batch, queries) = (inputs.query.batch(), inputs.query.tokens());
        let first = usize::from(!inputs.batched);
        let output = [batch, queries, layer.output_width()][first..].to_vec();
        let weights = args.weights.map(|weights| {
            let rows: Vec<usize> = match LayerWeights::from(weights) {
                LayerWeights::Averaged => vec![batch, queries],
                LayerWeights::PerHead => vec![batch, args.heads.get(), queries],
            };
            let keys = answer.weights.len() / rows.iter().product::<usize>().max(1);
            rows.into_iter().chain([keys]).skip(first).collect()
        });
        Self { output, weights }
    }
}

/// The `--json` form.
#[derive(Debug, Serialize)]
struct LayerReport {
    output_shape: Vec<usize>,
    weights_shape: Option<Vec<usize>>,
    projections: ProjectionReport,
    plan: PlanReport,
    timings: TimingsReport,
    /// Projections included.
    client_seconds: f64,
    empty_rows: u64,
    attempts: u32,
    retried_after: Vec<&'static str>,
    kernel_id: String,
    /// What was written, if anything.
    output: Option<String>,
}

/// Where keys and values were projected, and why there.
#[derive(Debug, Serialize)]
struct ProjectionReport {
    text: String,
    place: String,
    client: Option<PredictionReport>,
    workers: Option<PredictionReport>,
    flops: u64,
}

/// What a place was predicted to cost.
#[derive(Debug, Serialize)]
struct PredictionReport {
    client_bytes: u64,
    worker_bytes: u64,
    seconds: f64,
}

impl From<Prediction> for PredictionReport {
    fn from(prediction: Prediction) -> Self {
        let Prediction { client_bytes, worker_bytes, seconds } = prediction;
        Self { client_bytes, worker_bytes, seconds }
    }
}

impl From<ProjectionPlan> for ProjectionReport {
    fn from(plan: ProjectionPlan) -> Self {
        let (client, workers) = (plan.client.map(Into::into), plan.workers.map(Into::into));
        Self { text: plan.to_string(), place: plan.place.to_string(), client, workers, flops: plan.flops }
    }
}

fn report(
    args: &LayerArgs,
    projections: ProjectionPlan,
    shapes: &Shapes,
    answer: &LayerAnswer,
    seconds: f64,
    written: bool,
) -> anyhow::Result<()> {
    let attended = &answer.attended;
    let report = LayerReport {
        output_shape: shapes.output.clone(),
        weights_shape: shapes.weights.clone(),
        projections: projections.into(),
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
    output::line(&report.projections.text)?;
    output::line(&format!("plan: {}", report.plan.reason))?;
    output::line(&plan_table(&report.plan).to_string())?;
    output::line(&timing_table(&report.timings, seconds).to_string())?;
    if report.empty_rows > 0 {
        let of = if args.add_zero_attn { "but the zero key" } else { ": their heads are 0" };
        output::line(&format!("{} rows of heads see no key{of}", report.empty_rows))?;
    }
    if report.attempts > 1 {
        let before = report.retried_after.join(", ");
        output::line(&format!("attempt {} succeeded; before it: {before}", report.attempts))?;
    }
    let weights = shapes.weights.as_ref().map_or_else(String::new, |shape| format!(" and weights {shape:?}"));
    match &report.output {
        Some(path) => output::line(&format!("wrote {path}: output {:?}{weights}, f32", report.output_shape)),
        None if args.output.is_some() => Ok(()),
        None => output::line(&format!("output {:?}{weights}, f32; -o FILE writes it", report.output_shape)),
    }
}
