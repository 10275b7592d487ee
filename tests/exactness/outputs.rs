//! Weights and what is made of them: the same bits on 1 to 4 workers as in this process, and rows that sum to 1.

use std::num::NonZeroUsize;

use attnd_client::{AttendOptions, Inspected, OutputsParts, Rectangle, Stage, WorkerChoice};
use attnd_kernel::{EmptyRow, Kernels, Normaliser, Outputs};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::operators::case;
use crate::support::cases::{Answer, Case};
use crate::support::cluster::Cluster;

const CALLS: u64 = 60;

/// A range in `0..end` that isn't empty.
fn range(end: usize, rng: &mut SmallRng) -> std::ops::Range<usize> {
    let start = rng.random_range(0..end);
    start..rng.random_range(start..end) + 1
}

/// What is wanted of a random call: often much of it at once.
pub(super) fn parts(case: &Case, seed: u64) -> OutputsParts {
    let mut rng = SmallRng::seed_from_u64(9000 + seed);
    let shape = case.shape();
    let heads = range(shape.n_heads(), &mut rng);
    let stages = [Stage::Raw, Stage::Capped, Stage::Masked, Stage::Weights];
    let rectangle = |rng: &mut SmallRng| {
        let of_wanted = range(heads.len(), rng);
        Rectangle {
            stage: stages[rng.random_range(0..4)],
            heads: heads.start + of_wanted.start..heads.start + of_wanted.end,
            tokens: range(shape.n_queries(), rng),
            keys: range(shape.n_keys(), rng),
        }
    };
    let maybe = |rng: &mut SmallRng| rng.random::<bool>();
    OutputsParts {
        stages: stages.into_iter().filter(|_| rng.random_range(0..3) == 0).collect(),
        rectangles: (0..rng.random_range(0..3)).map(|_| rectangle(&mut rng)).collect(),
        top_k: if maybe(&mut rng) { rng.random_range(1..20) } else { 0 },
        mass_block: maybe(&mut rng).then(|| rng.random_range(1..=shape.n_keys())).and_then(NonZeroUsize::new),
        entropy: maybe(&mut rng) && case.normaliser == Normaliser::Softmax,
        distance: maybe(&mut rng),
        max_score: maybe(&mut rng),
        heatmap: maybe(&mut rng).then(|| {
            (rng.random_range(1..=shape.n_queries()), rng.random_range(1..=shape.n_keys().min(300)))
        }),
        heads: maybe(&mut rng).then_some(heads),
    }
}

pub(super) fn assert_bits(got: &Inspected, wanted: &Inspected, what: &str) {
    let same = |name: &str, got: &[f32], wanted: &[f32]| {
        assert_eq!(got.len(), wanted.len(), "{what}: {name}");
        let bits = got.iter().zip(wanted).position(|(a, b)| a.to_bits() != b.to_bits());
        if let Some(at) = bits {
            panic!("{what}: {name}[{at}] is {:e}, not {:e}", got[at], wanted[at]);
        }
    };
    assert_eq!(got.heads, wanted.heads, "{what}");
    assert_eq!(got.top_keys, wanted.top_keys, "{what}");
    assert_eq!(got.elements.len(), wanted.elements.len(), "{what}");
    for (at, (got, wanted)) in got.elements.iter().zip(&wanted.elements).enumerate() {
        same(&format!("elements {at}"), got, wanted);
    }
    same("top_weights", &got.top_weights, &wanted.top_weights);
    same("top_scores", &got.top_scores, &wanted.top_scores);
    same("mass", &got.mass, &wanted.mass);
    same("entropy", &got.entropy, &wanted.entropy);
    same("distance", &got.distance, &wanted.distance);
    same("max_score", &got.max_score, &wanted.max_score);
    same("heat", &got.heat, &wanted.heat);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outputs_have_the_same_bits_on_any_number_of_workers() {
    let cluster = Cluster::start(4).await;
    let client = cluster.client();
    let fast = Kernels::available()[0];
    let (mut told, mut shared) = (0, 0);
    for seed in 0..CALLS {
        let case = case(seed);
        let parts = parts(&case, seed);
        let outputs = Outputs::new(parts.clone(), case.shape(), &case.operator());
        let outputs = outputs.unwrap_or_else(|error| panic!("seed {seed}: {error}: {parts:?}"));
        let (context, inspected) = (case.compute(fast), case.inspect(fast, &outputs));
        for count in 1..=4 {
            let what = format!("seed {seed}, {count} workers: {parts:?}");
            let options =
                AttendOptions { outputs: parts.clone(), ..case.options(WorkerChoice::Exactly(count)) };
            let attended = client.attend(&case.operands, &options, &mut |_| {}).await;
            let attended = attended.unwrap_or_else(|error| panic!("{what}: {error}"));
            shared += usize::from(attended.plan.shares.len() == 4);
            if outputs.is_empty() {
                assert_eq!(attended.inspected, Inspected::default(), "{what}");
            } else {
                assert_bits(&attended.inspected, &inspected, &what);
                told += 1;
            }
            Answer::from(attended).assert_bits_of(&context, &what);
        }
    }
    assert!(told > 150 && shared >= 8, "{told} calls with outputs, {shared} with four shares");
}

/// Less what their sinks take.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_weights_sum_to_one() {
    let cluster = Cluster::start(3).await;
    let client = cluster.client();
    let (mut rows, mut sunk) = (0, 0);
    for seed in 0..24 {
        let mut case = case(seed);
        (case.empty_row, case.normaliser) = (EmptyRow::Zero, Normaliser::Softmax);
        let parts = OutputsParts {
            stages: vec![Stage::Weights],
            mass_block: NonZeroUsize::new(100),
            heatmap: Some((1, 1)),
            ..OutputsParts::default()
        };
        let options = AttendOptions { outputs: parts, ..case.options(WorkerChoice::Exactly(3)) };
        let attended = client.attend(&case.operands, &options, &mut |_| {}).await;
        let attended = attended.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let shape = case.shape();
        let blocks = shape.n_keys().div_ceil(100);
        let of_rows = attended.inspected.elements[0].chunks(shape.n_keys());
        let of_rows = of_rows.zip(attended.inspected.mass.chunks(blocks)).zip(&attended.lse);
        for (row, ((weights, mass), lse)) in of_rows.enumerate() {
            let sum: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
            let masses: f64 = mass.iter().map(|mass| f64::from(*mass)).sum();
            let head = row / shape.n_queries() % shape.n_heads();
            let token = row % shape.n_queries();
            let group = row / shape.n_queries() / shape.group_size();
            let operator = case.operator();
            let sees = !operator.mask_of_group(group, shape).visible(token).is_empty();
            let sink = operator.sinks().map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[head]));
            let share = if *lse == f32::NEG_INFINITY { 1.0 } else { (sink - f64::from(*lse)).exp() };
            // The lse is an f32: what it says of the sink's share is as good as its last digit.
            let bound = 2e-6 + share * f64::from(lse.abs().max(1.0)) * 1.2e-7;
            assert!((sum - (1.0 - share)).abs() <= bound, "seed {seed} row {row}: {sum}, sink {share}");
            assert!((masses - sum).abs() <= 2e-6, "seed {seed} row {row}: masses {masses}, weights {sum}");
            assert!(sees || sum == 0.0, "seed {seed} row {row} sees nothing");
            rows += usize::from(sees);
            sunk += usize::from(sees && share > 1e-3);
        }
    }
    assert!(rows > 3000 && sunk > 100, "{rows} rows, {sunk} with a sink that takes its share");
}
