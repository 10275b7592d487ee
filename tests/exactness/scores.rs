//! Score functions: the same bits on 1 to 4 workers as in this process, where the kernels' own tests hold each against its formula.

use attnd_client::{AttendOptions, DenseTensor, Element, OutputsParts, Stage, WorkerChoice};
use attnd_kernel::{
    AttnShape, Causal, Compute, Dims, Dtype, FUNCTIONS, Function, Kernels, Normaliser, Operator,
    OperatorParts, Outputs, Score, Symbol, Tensor,
};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::outputs::assert_bits;
use crate::support::cases::{Answer, Case, Data};
use crate::support::cluster::Cluster;
use crate::support::dense::random_mask;

/// Of each function.
const CALLS: u64 = 6;

/// How many elements a dimension of a parameter has; what only parameters say is `free`.
fn size(symbol: Symbol, shape: &AttnShape, free: usize) -> usize {
    match symbol {
        Symbol::Batch => shape.batch(),
        Symbol::Heads => shape.n_heads(),
        Symbol::KvHeads => shape.n_kv_heads(),
        Symbol::Queries => shape.n_queries(),
        Symbol::QueryDim => shape.query_dim(),
        Symbol::KeyDim => shape.head_dim(),
        Symbol::BothDims => shape.query_dim() + shape.head_dim(),
        Symbol::One => 1,
        Symbol::Positions => shape.n_keys() + free,
        Symbol::Units | Symbol::Filters | Symbol::Taps => free,
    }
}

/// Random parameters in random ones of the shapes that they may have, mostly those too that have a default.
fn score(function: &'static Function, shape: &AttnShape, rng: &mut SmallRng) -> Score {
    let free = rng.random_range(1..=24);
    let mut tensors = Vec::new();
    for parameter in function.parameters {
        if parameter.default.is_some() && rng.random_range(0..3) == 0 {
            continue;
        }
        let symbols = parameter.shapes[rng.random_range(0..parameter.shapes.len())];
        let sizes: Vec<usize> = symbols.iter().map(|symbol| size(*symbol, shape, free)).collect();
        // Numbers by themselves are widths, slopes and the like, which are positive.
        let least = if symbols == [Symbol::One] { 0.1 } else { -1.0 };
        let values = (0..sizes.iter().product()).map(|_| rng.random_range(least..1.0_f32)).collect();
        tensors.push(Tensor { name: parameter.name.to_owned(), shape: sizes, values });
    }
    Score::new(function.name, tensors).unwrap_or_else(|error| panic!("{error}"))
}

/// The shape with queries of another dimension than keys, where the function takes such.
fn with_other_queries(function: &'static Function, shape: AttnShape, rng: &mut SmallRng) -> AttnShape {
    let other = shape.with_query_dim(rng.random_range(1..=40)).expect("a small dimension");
    let parts =
        OperatorParts { score: score(function, &other, rng), ..OperatorParts::plain(1.0, Causal::None) };
    if Operator::new(parts, &other).is_ok() { other } else { shape }
}

pub(super) fn case(function: &'static Function, seed: u64) -> Case {
    let mut rng = SmallRng::seed_from_u64(21_000 + seed);
    let kv_heads = rng.random_range(1..=3);
    let dims = Dims {
        batch: rng.random_range(1..=2),
        heads: kv_heads * rng.random_range(1..=3),
        kv_heads,
        queries: rng.random_range(1..=40),
        keys: rng.random_range(1..=2500),
        head_dim: rng.random_range(1..=40),
        value_dim: rng.random_range(1..=40),
    };
    let shape = AttnShape::new(dims).unwrap_or_else(|error| panic!("{error}"));
    let shape = with_other_queries(function, shape, &mut rng);
    let dtype = [Dtype::F32, Dtype::F16, Dtype::Bf16][seed as usize % 3];
    let causal = [Causal::None, Causal::BottomRight][rng.random_range(0..2)];
    let mut case = Case::of_shape(seed, Data::Normal, causal, dtype, shape);
    case.score = score(function, &shape, &mut rng);
    case.scale = [function.default_scale(&shape), -0.7][rng.random_range(0..2)];
    if function.name == "location_aware" {
        let mut or_one = |size: usize| if rng.random() { 1 } else { size };
        let [batch, heads, queries] = [shape.batch(), shape.n_heads(), shape.n_queries()].map(&mut or_one);
        let dims = [batch, heads, queries, shape.n_keys()];
        let weights = (0..dims.iter().product()).map(|_| rng.random_range(0.0..1.0_f32)).collect();
        let bytes = attnd_wire::floats::into_bytes(weights);
        case.previous = Some(DenseTensor { element: Element::Float(Dtype::F32), shape: dims, bytes });
    }
    if rng.random_range(0..3) == 0 {
        let dims = [1, 1, shape.n_queries(), shape.n_keys()];
        case.dense_mask = Some(random_mask(dims, &mut rng));
    }
    if rng.random_range(0..3) == 0 {
        case.softcap = Some(rng.random_range(0.5..9.0_f32));
    }
    if rng.random_range(0..4) == 0 {
        case.normaliser = Normaliser::Sigmoid { bias: rng.random_range(-6.0..2.0_f32) };
    } else if rng.random() {
        case.sinks = Some((0..shape.n_heads()).map(|_| rng.random_range(-9.0..9.0)).collect());
    }
    case
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_function_has_the_same_bits_on_any_number_of_workers() {
    let cluster = Cluster::start(4).await;
    let client = cluster.client();
    let fast = Kernels::available()[0];
    let (mut shared, mut other_queries) = (0, 0);
    for (function, seed) in
        FUNCTIONS.iter().flat_map(|function| (0..CALLS).map(move |seed| (*function, seed)))
    {
        let case = case(function, seed);
        let shape = case.shape();
        // Scores may be so large that their sums aren't in range, whatever computes them.
        let wanted = case.compute(fast);
        let parts = OutputsParts {
            stages: if seed == 0 { vec![Stage::Raw, Stage::Weights] } else { Vec::new() },
            top_k: usize::from(seed == 1) * 3,
            ..OutputsParts::default()
        };
        let outputs = Outputs::new(parts.clone(), shape, &case.operator()).expect("outputs of any call");
        for count in 1..=4 {
            let what = format!("{} seed {seed}, {count} workers, {shape:?}", function.name);
            let options =
                AttendOptions { outputs: parts.clone(), ..case.options(WorkerChoice::Exactly(count)) };
            let attended = client.attend(&case.operands, &options, &mut |_| {}).await;
            let attended = attended.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(attended.kernel_id, case.operator().kernel_id(Compute::F32), "{what}");
            assert_eq!(attended.empty_rows, case.empty_rows(), "{what}");
            shared += usize::from(attended.plan.shares.len() == 4);
            if !outputs.is_empty() {
                assert_bits(&attended.inspected, &case.inspect(fast, &outputs), &what);
            }
            Answer::from(attended).assert_bits_of(&wanted, &what);
        }
        other_queries += usize::from(shape.query_dim() != shape.head_dim());
    }
    assert!(shared >= FUNCTIONS.len(), "only {shared} calls on four workers");
    assert!(other_queries >= 20, "only {other_queries} calls with queries of another dimension");
    cluster.wait_until_idle(std::time::Duration::from_secs(1)).await;
}

/// Where NaN and infinities are let through, they are what IEEE 754 makes of them, on any number of workers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_number_spreads_alike_on_any_number_of_workers() {
    let cluster = Cluster::start(3).await;
    let client = cluster.client();
    let mut poisoned = 0;
    for function in FUNCTIONS {
        for seed in 0..2 {
            let plain = case(function, seed);
            let shape = *plain.shape();
            let of_data = Case::of_shape(seed, Data::Poisoned, plain.causal, plain.operands.dtype, shape);
            let case = Case { data: Data::Poisoned, operands: of_data.operands, ..plain };
            let wanted = case.compute(Kernels::available()[0]);
            poisoned += usize::from(wanted.lse.iter().any(|lse| lse.is_nan()));
            for count in [1, 3] {
                let what = format!("{} seed {seed}, {count} workers, {shape:?}", function.name);
                let options = case.options(WorkerChoice::Exactly(count));
                let attended = client.attend(&case.operands, &options, &mut |_| {}).await;
                let attended = attended.unwrap_or_else(|error| panic!("{what}: {error}"));
                Answer::from(attended).assert_bits_of(&wanted, &what);
            }
        }
    }
    assert!(poisoned >= FUNCTIONS.len() / 2, "only {poisoned} calls with a row that is NaN");
}

/// The absorbed form of multi-head latent attention: one kv head of 576, whose first 512 are the values.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn latent_attention_reads_its_values_from_its_keys() {
    let cluster = Cluster::start(4).await;
    let client = cluster.client();
    let dims =
        Dims { batch: 2, heads: 16, kv_heads: 1, queries: 3, keys: 2000, head_dim: 576, value_dim: 512 };
    for (seed, dtype) in [(2, Dtype::F32), (3, Dtype::Bf16)] {
        let sent = Case::new(seed, Data::Normal, Causal::BottomRight, dtype, dims);
        let case = sent.clone().with_values_from_keys();
        let wanted = case.compute(Kernels::available()[0]);
        let rows = case.sample_rows(seed, 6);
        wanted.assert_within_operator(&case, &case.operator_reference(&rows), "latent attention");
        for count in 1..=4 {
            let what = format!("{dtype}, {count} workers");
            let options = case.options(WorkerChoice::Exactly(count));
            let attended = client.attend(&case.operands, &options, &mut |_| {}).await;
            let attended = attended.unwrap_or_else(|error| panic!("{what}: {error}"));
            let travelled: u64 = attended.plan.shares.iter().map(|share| share.kv_bytes).sum();
            assert_eq!(travelled, case.operands.k.len() as u64, "{what}: no value travels");
            Answer::from(attended).assert_bits_of(&wanted, &what);
        }
    }
    // With a score that makes others of its keys, values are the first elements of those that were sent.
    let dims = Dims { head_dim: 40, value_dim: 24, ..dims };
    let mut case = Case::new(4, Data::Normal, Causal::None, Dtype::F32, dims).with_values_from_keys();
    let mut rng = SmallRng::seed_from_u64(4);
    case.score = score(Function::named("additive").expect("a function"), case.shape(), &mut rng);
    let wanted = case.compute(Kernels::available()[0]);
    let options = case.options(WorkerChoice::Exactly(3));
    let attended = client.attend(&case.operands, &options, &mut |_| {}).await;
    Answer::from(attended.expect("an answer")).assert_bits_of(&wanted, "additive");
}

/// What becomes of keys that are no numbers may look like one (a saturated tangent), so they are refused as they come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_are_no_numbers_are_refused_whatever_becomes_of_them() {
    let cluster = Cluster::start(2).await;
    let client = cluster.client();
    let additive = Function::named("additive").expect("a function");
    for seed in 0..3 {
        let mut case = case(additive, seed);
        case.dense_mask = None;
        let (dim, dtype) = (case.shape().head_dim(), case.operands.dtype);
        let mut k = case.operands.k.to_vec();
        let key = case.shape().n_keys() - 1;
        let at = (key * dim + dim / 2) * dtype.size();
        // Of each type these are an infinity.
        let infinity: &[u8] = match dtype {
            Dtype::F32 => &[0, 0, 0x80, 0x7f],
            Dtype::F16 => &[0, 0x7c],
            Dtype::Bf16 => &[0x80, 0x7f],
        };
        k[at..at + dtype.size()].copy_from_slice(infinity);
        case.operands.k = k.into();
        let refused =
            client.attend(&case.operands, &case.options(WorkerChoice::Exactly(2)), &mut |_| {}).await;
        let text = refused.expect_err("an infinity among the keys").to_string();
        assert!(
            text.contains(&format!("NON_FINITE: k[h=0,pos={key},i={}] +inf", dim / 2)),
            "seed {seed}: {text}"
        );
    }
}
