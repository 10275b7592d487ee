//! Keys and values that workers make of rows: the same bits as where the client makes them, on 1 to 4 workers, whichever heads and slots
//! these have.

use attnd_client::layer::{
    Layer, LayerAnswer, LayerCall, LayerParts, LayerWeights, Matrix, Place, PlaceReason, ProjectOn, Rope,
    RopeStyle, Rows, Weights,
};
use attnd_client::{
    AttendOptions, Causal, Client, DenseTensor, Dtype, Element, EmptyRow, Mask, PerBatch, WorkerChoice,
};
use attnd_kernel::Score;
use half::{bf16, f16};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::support::cluster::Cluster;

/// A layer and its rows, by numbers.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    queries: usize,
    keys: usize,
    head_dim: usize,
    value_dim: usize,
    /// Of keys' rows, and of values' where they have their own.
    widths: [usize; 2],
    same_rows: bool,
    /// Of W^K and W^V.
    biases: [bool; 2],
    dtype: Dtype,
}

fn random(rng: &mut SmallRng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn matrix(rng: &mut SmallRng, [outputs, inputs]: [usize; 2], has_bias: bool) -> Matrix {
    let bias = has_bias.then(|| random(rng, outputs));
    Matrix { name: "m".into(), outputs, inputs, weight: random(rng, outputs * inputs), bias }
}

fn rows(rng: &mut SmallRng, shape: [usize; 3], dtype: Dtype) -> Rows {
    let values = random(rng, shape.iter().product());
    let bytes: Vec<u8> = match dtype {
        Dtype::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        Dtype::Bf16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
    };
    Rows::of_bytes(bytes.into(), dtype, shape).expect("rows")
}

fn parts(rng: &mut SmallRng, sizes: &Sizes) -> LayerParts {
    let Sizes { heads, kv_heads, head_dim, value_dim, widths, biases, .. } = *sizes;
    let weights = Weights {
        query: matrix(rng, [heads * head_dim, 19], true),
        key: matrix(rng, [kv_heads * head_dim, widths[0]], biases[0]),
        value: matrix(rng, [kv_heads * value_dim, widths[1]], biases[1]),
        output: Some(matrix(rng, [21, heads * value_dim], true)),
        gate: None,
        learnt: None,
    };
    LayerParts { weights, heads, kv_heads, scale: None, rope: None, add_zero_attn: false }
}

fn inputs(rng: &mut SmallRng, sizes: &Sizes) -> [Rows; 3] {
    let Sizes { batch, queries, keys, widths, same_rows, dtype, .. } = *sizes;
    let query = rows(rng, [batch, queries, 19], Dtype::F32);
    let key = rows(rng, [batch, keys, widths[0]], dtype);
    let value = if same_rows { key.clone() } else { rows(rng, [batch, keys, widths[1]], Dtype::F32) };
    [query, key, value]
}

fn refs(inputs: &[Rows; 3]) -> [&Rows; 3] {
    let [query, key, value] = inputs;
    [query, key, value]
}

async fn answered(
    client: &Client,
    layer: &Layer,
    inputs: &[Rows; 3],
    call: &LayerCall,
    (place, workers): (Place, usize),
) -> LayerAnswer {
    let options = AttendOptions { workers: WorkerChoice::Exactly(workers), ..call.options.clone() };
    let call = LayerCall { options, ..call.clone() };
    let answer = layer.call(client, refs(inputs), &call, place, &mut |_| {}).await;
    answer.unwrap_or_else(|error| panic!("{place}, {workers} workers: {error}"))
}

fn assert_bits(one: &LayerAnswer, other: &LayerAnswer, what: &str) {
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    for (name, one, other) in [
        ("output", &one.output, &other.output),
        ("weights", &one.weights, &other.weights),
        ("context", &one.attended.context, &other.attended.context),
        ("lse", &one.attended.lse, &other.attended.lse),
    ] {
        assert!(bits(one) == bits(other), "{what}: {name}");
    }
    assert_eq!(one.attended.empty_rows, other.attended.empty_rows, "{what}");
    assert_eq!(one.attended.kernel_id, other.attended.kernel_id, "{what}");
}

fn cases() -> Vec<(Sizes, AttendOptions)> {
    let base = Sizes {
        batch: 1,
        heads: 6,
        kv_heads: 3,
        queries: 11,
        keys: 3000,
        head_dim: 10,
        value_dim: 7,
        widths: [33, 33],
        same_rows: true,
        biases: [true, false],
        dtype: Dtype::F32,
    };
    let mut rng = SmallRng::seed_from_u64(77);
    let dense_mask = {
        let bytes: Vec<u8> = (0..11 * 3000).map(|_| u8::from(rng.random_range(0..3_u32) > 0)).collect();
        DenseTensor { element: Element::Bool, shape: [1, 1, 11, 3000], bytes: bytes.into() }
    };
    let dense_bias = {
        let bytes: Vec<u8> = random(&mut rng, 6 * 11 * 2990).iter().flat_map(|x| x.to_le_bytes()).collect();
        let shape = [1, 6, 11, 2990];
        DenseTensor { element: Element::Float(Dtype::F32), shape, bytes: bytes.into() }
    };
    let masked = AttendOptions {
        dense_mask: Some(dense_mask),
        dense_bias: Some(dense_bias),
        ..AttendOptions::default()
    };
    let lengths = Mask { key_end: Some(PerBatch::Each([3000, 900, 2100].into())), ..Mask::default() };
    let ragged = AttendOptions { mask: lengths, causal: Causal::BottomRight, ..AttendOptions::default() };
    let score = |name: &str| Score::new(name, Vec::new()).expect("a function without parameters");
    let cosine = AttendOptions { score: score("cosine"), ..AttendOptions::default() };
    let none = AttendOptions::default;
    vec![
        (base, none()),
        (Sizes { kv_heads: 1, biases: [true; 2], ..base }, none()),
        (Sizes { kv_heads: 6, dtype: Dtype::F16, ..base }, none()),
        (Sizes { batch: 3, ..base }, ragged.clone()),
        (Sizes { batch: 3, dtype: Dtype::Bf16, same_rows: false, widths: [33, 50], ..base }, ragged),
        (Sizes { same_rows: false, biases: [false; 2], ..base }, masked.clone()),
        (Sizes { dtype: Dtype::Bf16, biases: [false; 2], ..base }, masked),
        // One head of one element: cut by slots alone.
        (
            Sizes { heads: 2, kv_heads: 1, keys: 9000, head_dim: 65, value_dim: 64, widths: [70; 2], ..base },
            none(),
        ),
        // Fewer pages than workers.
        (Sizes { batch: 2, kv_heads: 2, keys: 300, ..base }, none()),
        (base, cosine),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_make_the_keys_that_the_client_makes() {
    let cluster = Cluster::start(4).await;
    let client = cluster.client();
    let (mut by_slots, mut by_heads) = (0, 0);
    for (at, (sizes, options)) in cases().into_iter().enumerate() {
        let mut rng = SmallRng::seed_from_u64(at as u64);
        let layer = Layer::new(parts(&mut rng, &sizes)).expect("a layer");
        let inputs = inputs(&mut rng, &sizes);
        let weights = (at % 2 == 0 && options.mask == Mask::default()).then_some(LayerWeights::PerHead);
        let call = LayerCall { options, weights, ..LayerCall::default() };
        let wanted = answered(&client, &layer, &inputs, &call, (Place::Client, 1)).await;
        assert!(wanted.output.iter().all(|value| value.is_finite()));
        for workers in 1..=4 {
            let what = format!("case {at}, {sizes:?}, {workers} workers");
            let answer = answered(&client, &layer, &inputs, &call, (Place::Workers, workers)).await;
            assert_bits(&answer, &wanted, &what);
            let shares = &answer.attended.plan.shares;
            let pieces = || shares.iter().flat_map(|share| &share.pieces);
            by_slots += usize::from(pieces().any(|piece| piece.slots.len() < 64));
            by_heads += usize::from(shares.len() > 1 && pieces().all(|piece| piece.slots.len() == 64));
        }
    }
    assert!(by_slots >= 10 && by_heads >= 3, "{by_slots} calls cut by slots, {by_heads} by heads alone");
}

/// What isn't finite is refused at either place: rows are named as rows where they travel, and a key that overflows has one text.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_finite_is_refused_at_either_place() {
    let cluster = Cluster::start(2).await;
    let client = cluster.client();
    let (sizes, options) = cases().remove(4);
    let mut rng = SmallRng::seed_from_u64(5);
    let layer = Layer::new(parts(&mut rng, &sizes)).expect("a layer");
    let [query, key, value] = inputs(&mut rng, &sizes);
    let with = |rows: &Rows, at: [usize; 3], number: f32| {
        let [batch, token, element] = at;
        let mut values = rows.values().to_vec();
        values[(batch * rows.tokens() + token) * rows.width() + element] = number;
        Rows::new(values, [rows.batch(), rows.tokens(), rows.width()]).expect("rows")
    };
    let refused = async |key: &Rows, value: &Rows, place: Place| {
        let options = AttendOptions { workers: WorkerChoice::Exactly(2), ..options.clone() };
        let call = LayerCall { options, ..LayerCall::default() };
        let answer = layer.call(&client, [&query, key, value], &call, place, &mut |_| {}).await;
        answer.expect_err("a number that is none").to_string()
    };
    for (at, number, shown) in [
        ([2, 2999, 32], f32::NAN, "NaN"),
        ([0, 0, 0], f32::INFINITY, "+inf"),
        ([1, 300, 5], f32::NEG_INFINITY, "-inf"),
    ] {
        let bad = with(&key, at, number);
        let [b, pos, i] = at;
        assert_eq!(
            refused(&bad, &value, Place::Workers).await,
            format!("NON_FINITE: source[b={b},pos={pos},i={i}] {shown}")
        );
        assert!(refused(&bad, &value, Place::Client).await.starts_with("NON_FINITE: k[h="));
        let bad = with(&value, at, number);
        let text = format!("NON_FINITE: value_source[b={b},pos={pos},i={i}] {shown}");
        assert_eq!(refused(&key, &bad, Place::Workers).await, text);
    }
    // A product over the range of f32, in a value of one head alone: the matrices are the same for all tokens.
    let huge = with(&value, [1, 777, 3], 3.4e38);
    let mut large = parts(&mut SmallRng::seed_from_u64(5), &sizes);
    large.weights.value.weight.iter_mut().for_each(|weight| *weight *= 1e-3);
    large.weights.value.weight[8 * 50 + 3] = -4.0;
    let large = Layer::new(large).expect("a layer");
    let mut texts = Vec::new();
    for place in [Place::Client, Place::Workers] {
        let call = LayerCall { options: options.clone(), ..LayerCall::default() };
        let answer = large.call(&client, [&query, &key, &huge], &call, place, &mut |_| {}).await;
        texts.push(answer.expect_err("an overflow").to_string());
    }
    assert_eq!(texts, ["NON_FINITE: v[h=4,pos=777,i=1] -inf"; 2]);
    // Who lets them through gets the same NaN at either place.
    let bad = with(&key, [0, 100, 1], f32::NAN);
    let call =
        LayerCall { options: AttendOptions { allow_non_finite: true, ..options }, ..LayerCall::default() };
    let inputs = [query, bad, value];
    let wanted = answered(&client, &layer, &inputs, &call, (Place::Client, 1)).await;
    assert!(wanted.output.iter().any(|value| value.is_nan()));
    let answer = answered(&client, &layer, &inputs, &call, (Place::Workers, 2)).await;
    assert_bits(&answer, &wanted, "NaN among the rows");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_says_where_and_why_and_what_both_places_cost() {
    let cluster = Cluster::start(2).await;
    let client = cluster.client();
    let (sizes, _) = cases().remove(0);
    let mut rng = SmallRng::seed_from_u64(8);
    let parts = parts(&mut rng, &sizes);
    let inputs = inputs(&mut rng, &sizes);
    let layer = Layer::new(parts.clone()).expect("a layer");
    let call = LayerCall::default();
    let plan = layer.plan(&client, refs(&inputs), &call, ProjectOn::Auto).await.expect("a plan");
    let (on_client, on_workers) = (plan.client.expect("a prediction"), plan.workers.expect("a prediction"));
    let queries = 6 * 11 * 10 * 4;
    assert_eq!(on_client.client_bytes, queries + 3 * 3000 * 17 * 4);
    let matrices = 3 * (10 * 34 + 7 * 33) * 4;
    assert_eq!(on_workers.client_bytes, queries + 3000 * 33 * 4 + matrices);
    assert_eq!(plan.reason, PlaceReason::Faster);
    assert_eq!(plan.place == Place::Workers, on_workers.seconds < on_client.seconds);
    assert_eq!(plan.flops, 2 * 3000 * 33 * 3 * 17);
    for (on, place) in [(ProjectOn::Client, Place::Client), (ProjectOn::Workers, Place::Workers)] {
        let asked = layer.plan(&client, refs(&inputs), &call, on).await.expect("a plan");
        assert_eq!((asked.place, asked.reason), (place, PlaceReason::Asked));
        assert!(asked.client.is_some() && asked.workers.is_some());
    }

    // What workers can't make.
    let rope = Some(Rope::new(RopeStyle::HalfSplit, 1e4));
    let turning = Layer::new(LayerParts { rope, ..parts }).expect("a layer");
    let uniform = AttendOptions { empty_row: EmptyRow::Uniform, ..AttendOptions::default() };
    let uniform = LayerCall { options: uniform, ..LayerCall::default() };
    for (layer, call, text) in [
        (&turning, &call, "project=workers and rope: keys turn after they are projected"),
        (
            &layer,
            &uniform,
            "project=workers and empty_row=uniform: the coordinator averages values as they pass",
        ),
    ] {
        let auto = layer.plan(&client, refs(&inputs), call, ProjectOn::Auto).await.expect("a plan");
        assert_eq!(auto.place, Place::Client);
        assert!(matches!(auto.reason, PlaceReason::Only(_)), "{auto}");
        let error =
            layer.plan(&client, refs(&inputs), call, ProjectOn::Workers).await.expect_err("no such plan");
        assert_eq!(error.to_string(), text);
        let called = layer.call(&client, refs(&inputs), call, Place::Workers, &mut |_| {}).await;
        assert_eq!(called.expect_err("no such call").to_string(), text);
        layer.call(&client, refs(&inputs), call, auto.place, &mut |_| {}).await.expect("an answer");
    }
}
