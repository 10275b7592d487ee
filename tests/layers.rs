//! Layers of multi-head attention through clusters: as torch and Keras compute them, and as a formula in f64 does.
//!
//! Two results in f32 are both near the exact one. So the bound is against the formula: for each output, `8 u (8 + S) A`, as for
//! attention without a layer, where `A` is the sum of the magnitudes of everything that the output is a sum of, with those of the values'
//! and the contexts' own projections in it, and `S` the largest sum of magnitudes of a score of the row; for a weight `w`,
//! `8 u (8 + S) w`. Both ours and theirs have to keep it, so they differ by twice that at most.

mod fixtures;
mod formula;
mod latent;

use attnd_client::layer::{
    Layer, LayerAnswer, LayerCall, LayerParts, LayerWeights, Learnt, Matrix, Rope, RopeStyle, Rows, Weights,
};
use attnd_client::{AttendOptions, Causal, Client, Mask, PerBatch, WorkerChoice};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use self::fixtures::Fixture;
use self::formula::{Affine, Formula, Number, Row};
use crate::support::cluster::Cluster;

const U: f64 = 1.0 / (1_u64 << 24) as f64;

/// What is compared with the formula, and how near it comes.
#[derive(Default)]
struct Comparison {
    /// Each number, and the magnitude of what it is a sum of.
    numbers: Vec<(f32, f64)>,
    /// The largest difference, in bounds, and where it is.
    worst: f64,
    place: String,
}

impl Comparison {
    fn number(&mut self, got: f32, want: Number, score: f64, what: &str) {
        let bound = 8.0 * U * (8.0 + score) * want.magnitude;
        let error = (f64::from(got) - want.value).abs();
        // Not in bounds, if it is NaN.
        let share = if error <= bound { error / bound.max(f64::MIN_POSITIVE) } else { f64::INFINITY };
        if share > self.worst {
            self.worst = share;
            self.place = format!("{what}: {got}, exactly {}, bound {bound:e}", want.value);
        }
        self.numbers.push((got, want.magnitude));
    }

    fn assert_within(&self) {
        assert!(self.worst <= 1.0, "{}", self.place);
    }

    /// The largest difference between equal places of two results, as a share of the magnitude there.
    fn apart(&self, other: &Self) -> f64 {
        assert_eq!(self.numbers.len(), other.numbers.len());
        let pairs = self.numbers.iter().zip(&other.numbers).filter(|(one, two)| one.0 != two.0);
        pairs.map(|((a, magnitude), (b, _))| f64::from((a - b).abs()) / magnitude).fold(0.0, f64::max)
    }

    /// Compares a whole answer, `output` and `weights` as layers give them.
    fn answer(&mut self, rows: &[Row], output: &[f32], weights: &[f32], per_head: bool, what: &str) {
        let width = rows[0].output.len();
        let keys = rows[0].weights[0].len();
        assert_eq!(output.len(), rows.len() * width, "{what}: output");
        let heads = if per_head { rows[0].weights.len() } else { 1 };
        assert_eq!(weights.len(), rows.len() * heads * keys, "{what}: weights");
        for (at, row) in rows.iter().enumerate() {
            let what = format!("{what}, row {at}");
            for (got, want) in output[at * width..].iter().zip(&row.output) {
                self.number(*got, *want, row.score, &what);
            }
            let (batch, token) = (at / row.queries, at % row.queries);
            for head in 0..heads {
                let got = &weights[((batch * heads + head) * row.queries + token) * keys..][..keys];
                for (key, got) in got.iter().enumerate() {
                    let mean = row.weights.iter().map(|of_head| of_head[key]).sum::<f64>();
                    let want =
                        if per_head { row.weights[head][key] } else { mean / row.weights.len() as f64 };
                    self.number(*got, Number { value: want, magnitude: want }, row.score, &what);
                }
            }
        }
    }
}

async fn answer(
    client: &Client,
    layer: &Layer,
    [query, key, value]: &[Rows; 3],
    call: &LayerCall,
    workers: usize,
) -> LayerAnswer {
    let options = AttendOptions { workers: WorkerChoice::Exactly(workers), ..call.options.clone() };
    let call = LayerCall { options, ..call.clone() };
    let kv = layer.project(key, value, 0).await.unwrap_or_else(|error| panic!("{error}"));
    let answer = layer.attend(client, query, &kv, &call, &mut |_| {}).await;
    answer.unwrap_or_else(|error| panic!("{error}"))
}

fn assert_bits(one: &LayerAnswer, other: &LayerAnswer, what: &str) {
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert!(bits(&one.output) == bits(&other.output), "{what}: output");
    assert!(bits(&one.weights) == bits(&other.weights), "{what}: weights");
}

/// What a call of a fixture's case asks for.
fn call(fixture: &Fixture) -> LayerCall {
    let mask = Mask {
        key_end: fixture.lengths.as_ref().map(|lengths| PerBatch::Each(lengths.as_slice().into())),
        ..Mask::default()
    };
    let causal = if fixture.causal { Causal::TopLeft } else { Causal::None };
    let weights = if fixture.per_head { LayerWeights::PerHead } else { LayerWeights::Averaged };
    let options = AttendOptions { causal, mask, ..AttendOptions::default() };
    LayerCall { options, position: 0, weights: Some(weights) }
}

/// Runs all cases of a file, on one worker and on three, and holds ours and theirs against the formula; how many cases three
/// workers shared, and a sentence on it all.
async fn reproduce(file: &str, parameters: impl Fn(&Fixture) -> Formula) -> (Comparison, usize, String) {
    let cluster = Cluster::start(3).await;
    let client = cluster.client();
    let (mut ours, mut theirs, mut shared) = (Comparison::default(), Comparison::default(), 0);
    let fixtures = Fixture::all(file);
    let n_cases = fixtures.len();
    for fixture in fixtures {
        let what = format!("{file} case {}", fixture.name);
        let weights = Weights::from_state(fixture.state.clone(), fixture.heads, fixture.kv_heads);
        let weights = weights.unwrap_or_else(|error| panic!("{what}: {error}"));
        let (heads, kv_heads) = (fixture.heads, fixture.kv_heads);
        let parts =
            LayerParts { weights, heads, kv_heads, scale: None, rope: None, add_zero_attn: fixture.zero };
        let layer = Layer::new(parts).unwrap_or_else(|error| panic!("{what}: {error}"));
        let call = call(&fixture);
        let one = answer(&client, &layer, &fixture.rows, &call, 1).await;
        let three = answer(&client, &layer, &fixture.rows, &call, 3).await;
        assert_bits(&one, &three, &what);
        shared += usize::from(three.attended.plan.shares.len() == 3);

        let rows = parameters(&fixture).rows(&fixture.rows);
        ours.answer(&rows, &one.output, &one.weights, fixture.per_head, &what);
        theirs.answer(&rows, &fixture.output, &fixture.weights, fixture.per_head, &format!("{what}, theirs"));
    }
    ours.assert_within();
    theirs.assert_within();
    let apart = ours.apart(&theirs);
    let said = format!(
        "{file}: {n_cases} cases, {} numbers: ours within {:.3} of the bound, theirs within {:.3}, {apart:.1e} of the magnitude apart",
        ours.numbers.len(),
        ours.worst,
        theirs.worst
    );
    (ours, shared, said)
}

/// The whole grid of options: biases, other widths of keys and values, learnt keys, zero keys, causal and padding masks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn torchs_multihead_attention_is_reproduced_from_its_state_dict() {
    let (ours, shared, said) = reproduce("torch_layers", Fixture::torch_formula).await;
    println!("{said}");
    assert!(
        ours.numbers.len() > 10_000 && shared >= 3,
        "{} elements, {shared} cases on three workers",
        ours.numbers.len()
    );
}

/// Values of another dimension than keys, grouped queries, gates.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keras_layers_are_reproduced_from_their_variables() {
    let (ours, _, said) = reproduce("keras_layers", Fixture::keras_formula).await;
    println!("{said}");
    assert!(ours.numbers.len() > 1000, "{} elements", ours.numbers.len());
}

#[test]
fn a_wrong_result_is_out_of_the_bound() {
    let fixture = Fixture::all("torch_layers").remove(0);
    let rows = fixture.torch_formula().rows(&fixture.rows);
    let mut wrong = fixture.output.clone();
    wrong[3] += wrong[3].abs() * 1e-3 + 1e-4;
    let worst = |output: &[f32]| {
        let mut comparison = Comparison::default();
        comparison.answer(&rows, output, &fixture.weights, fixture.per_head, "wrong on purpose");
        comparison.worst
    };
    assert!(worst(&fixture.output) <= 1.0);
    assert!(worst(&wrong) > 1.0, "nothing tells a wrong output from a right one");
    wrong[3] = f32::NAN;
    assert!(worst(&wrong) > 1.0, "nothing tells NaN from a number");
}

fn random(rng: &mut SmallRng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-1.2..1.2)).collect()
}

/// A layer with everything that fixtures don't have together: rotary positions over some elements, grouped queries, values of another
/// dimension, a gate, a learnt and a zero key; and the formula of the same numbers.
fn everything(rng: &mut SmallRng, rope: Rope) -> (LayerParts, Formula) {
    let (heads, kv_heads, head_dim, value_dim) = (4, 2, 8, 5);
    let mut matrix = |outputs: usize, inputs: usize| {
        let (weight, bias) = (random(rng, outputs * inputs), Some(random(rng, outputs)));
        Matrix { name: format!("{outputs} of {inputs}"), outputs, inputs, weight, bias }
    };
    let [query, key, value] = [matrix(32, 9), matrix(16, 7), matrix(10, 6)];
    let (output, gate) = (matrix(11, 20), matrix(20, 9));
    let learnt = Learnt { key: random(rng, kv_heads * head_dim), value: random(rng, kv_heads * value_dim) };
    let affine = |matrix: &Matrix| Affine::new(matrix.weight.clone(), matrix.inputs, matrix.bias.clone());
    let formula = Formula {
        heads,
        kv_heads,
        query: affine(&query),
        key: affine(&key),
        value: affine(&value),
        output: affine(&output),
        gate: Some(affine(&gate)),
        learnt: Some((learnt.key.clone(), learnt.value.clone())),
        has_zero: true,
        rope: Some(rope.clone()),
        query_position: 400,
        visible: Box::new(|_batch, query, key| key <= 400 + query),
    };
    let weights = Weights { query, key, value, output: Some(output), gate: Some(gate), learnt: Some(learnt) };
    (LayerParts { weights, heads, kv_heads, scale: None, rope: Some(rope), add_zero_attn: true }, formula)
}

/// Both styles of rotary positions, over part of a row; keys over pages and workers; and the same keys for a second call.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whole_layers_keep_the_bound_and_their_keys_serve_again() {
    let cluster = Cluster::start(3).await;
    let client = cluster.client();
    let mut comparison = Comparison::default();
    for (seed, style) in [(1, RopeStyle::HalfSplit), (2, RopeStyle::Interleaved)] {
        let mut rng = SmallRng::seed_from_u64(seed);
        let rope = Rope { dims: Some(6), first: 2, ..Rope::new(style, 10_000.0) };
        let (parts, formula) = everything(&mut rng, rope);
        let layer = Layer::new(parts).unwrap_or_else(|error| panic!("{error}"));
        let mut rows = |batch: usize, tokens: usize, width: usize| {
            Rows::new(random(&mut rng, batch * tokens * width), [batch, tokens, width]).unwrap()
        };
        let inputs = [rows(2, 4, 9), rows(2, 700, 7), rows(2, 700, 6)];
        let mask = Mask {
            causal: true,
            positions: Some(attnd_client::Positions::Offset(PerBatch::Same(400))),
            ..Mask::default()
        };
        let options = AttendOptions { mask, ..AttendOptions::default() };
        let call = LayerCall { options, position: 400, weights: Some(LayerWeights::PerHead) };
        let what = format!("{style:?}");
        let one = answer(&client, &layer, &inputs, &call, 1).await;
        let three = answer(&client, &layer, &inputs, &call, 3).await;
        assert_eq!(three.attended.plan.shares.len(), 3, "{what}");
        assert_bits(&one, &three, &what);
        comparison.answer(&formula.rows(&inputs), &one.output, &one.weights, true, &what);

        // Keys and values that were projected once, with the first half of the queries and then with the rest.
        let kv = layer.project(&inputs[1], &inputs[2], 0).await.unwrap();
        let width = layer.output_width();
        for (first, position) in [(0, 400), (2, 402)] {
            let values: Vec<f32> = inputs[0]
                .values()
                .chunks(4 * 9)
                .flat_map(|problem| problem[first * 9..][..2 * 9].to_vec())
                .collect();
            let half = Rows::new(values, [2, 2, 9]).unwrap();
            let offset = attnd_client::Positions::Offset(PerBatch::Same(position));
            let mask = Mask { causal: true, positions: Some(offset), ..Mask::default() };
            let options = AttendOptions { mask, ..AttendOptions::default() };
            let call = LayerCall { options, position: position as usize, weights: None };
            let again = layer.attend(&client, &half, &kv, &call, &mut |_| {}).await.unwrap();
            for (batch, again) in again.output.chunks(2 * width).enumerate() {
                let whole = &one.output[(batch * 4 + first) * width..][..2 * width];
                assert!(
                    again.iter().zip(whole).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{what}, from {first}"
                );
            }
        }
    }
    comparison.assert_within();
    println!("{} numbers within {:.3} of the bound", comparison.numbers.len(), comparison.worst);
}
