//! Masks of intervals, caps, linear biases, sigmoids, sinks, empty rows and scales of any sign: the same bits on 1 to 4 workers as in
//! this process, and near the f64 oracle.

use std::num::NonZeroUsize;
use std::sync::Arc;

use attnd_client::{Alibi, Attended, Client, WorkerChoice};
use attnd_kernel::{
    Causal, Compute, Dims, Documents, Dtype, EmptyRow, KERNEL_ID, Kernels, Mask, Normaliser, Path, PerBatch,
    Positions, Run, Window,
};
use attnd_wire::{AttendRequest, proto};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::support::cases::{Answer, Case, Data};
use crate::support::cluster::Cluster;
use crate::support::raw_call;

const COUNTS: [usize; 4] = [1, 2, 3, 4];
const CALLS: u64 = 120;

fn maybe(rng: &mut SmallRng) -> bool {
    rng.random_range(0..3) == 0
}

fn per_batch<T: Clone>(batch: u64, rng: &mut SmallRng, number: impl Fn(&mut SmallRng) -> T) -> PerBatch<T> {
    if rng.random() {
        return PerBatch::Same(number(rng));
    }
    PerBatch::Each((0..batch).map(|_| number(rng)).collect())
}

/// Runs of documents that have both queries and keys, in ascending order.
fn documents(dims: &Dims, rng: &mut SmallRng) -> Documents {
    let (queries, keys) = (dims.queries as usize, dims.keys as usize);
    let n = rng.random_range(1..=4).min(queries).min(keys);
    let mut cut = |tokens: usize| -> Vec<Run> {
        let mut ends: Vec<usize> = (1..n).map(|_| rng.random_range(1..=tokens)).collect();
        ends.push(tokens);
        ends.sort_unstable();
        ends.dedup();
        ends.into_iter().zip(0..).map(|(end, id)| Run { end, id }).collect()
    };
    let (queries, keys) = (cut(queries), cut(keys));
    Documents::new(&[queries], &[keys]).expect("no document is in two runs")
}

/// Rules that make sense together: positions always, the others with some luck.
fn mask(dims: &Dims, rng: &mut SmallRng) -> Mask {
    let (batch, queries, keys) = (dims.batch, dims.queries as usize, dims.keys as usize);
    let documents = (rng.random_range(0..5) == 0).then(|| Arc::new(documents(dims, rng)));
    let causal = rng.random();
    let positions = match rng.random_range(0..3) {
        0 if documents.is_none() => {
            let reach = keys as i64;
            Positions::Offset(per_batch(batch, rng, |rng| rng.random_range(-reach / 4..=reach)))
        }
        1 => Positions::TopLeft,
        _ => Positions::BottomRight,
    };
    let side = |rng: &mut SmallRng| maybe(rng).then(|| rng.random_range(0..=keys));
    let window = Window { left: side(rng), right: side(rng) };
    let chunk =
        (documents.is_none() && maybe(rng)).then(|| rng.random_range(1..=keys)).and_then(NonZeroUsize::new);
    // Padding is a document like any other, and a prefix would be nobody's.
    let is_whole = documents.is_none();
    let prefix =
        (is_whole && causal && maybe(rng)).then(|| per_batch(batch, rng, |rng| rng.random_range(0..=keys)));
    let key_begin = maybe(rng).then(|| per_batch(batch, rng, |rng| rng.random_range(0..=keys / 2)));
    let key_end =
        (is_whole && maybe(rng)).then(|| per_batch(batch, rng, |rng| rng.random_range(keys / 2..=keys)));
    let query_end =
        (is_whole && maybe(rng)).then(|| per_batch(batch, rng, |rng| rng.random_range(0..=queries)));
    Mask {
        causal,
        positions: Some(positions),
        window,
        chunk,
        prefix,
        key_begin,
        key_end,
        query_end,
        documents,
    }
}

/// A random call.
pub(super) fn case(seed: u64) -> Case {
    let mut rng = SmallRng::seed_from_u64(5000 + seed);
    let kv_heads = rng.random_range(1..=3);
    let dims = Dims {
        batch: rng.random_range(1..=3),
        heads: kv_heads * rng.random_range(1..=4),
        kv_heads,
        queries: rng.random_range(1..=60),
        keys: rng.random_range(1..=2500),
        head_dim: rng.random_range(1..=48),
        value_dim: rng.random_range(1..=48),
    };
    let dtype = [Dtype::F32, Dtype::F16, Dtype::Bf16][seed as usize % 3];
    let mut case = Case::new(seed, Data::Normal, Causal::None, dtype, dims);
    case.mask = mask(&dims, &mut rng);
    case.scale *= [1.0, -1.0, 0.0, -7.0][seed as usize / 3 % 4];
    case.softcap = maybe(&mut rng).then(|| rng.random_range(0.5..50.0_f32));
    case.alibi = maybe(&mut rng).then(|| alibi(&dims, &mut rng));
    if maybe(&mut rng) {
        case.normaliser = Normaliser::Sigmoid { bias: rng.random_range(-6.0..2.0_f32) };
    } else if rng.random() {
        let mut logit = |_| if maybe(&mut rng) { f32::NEG_INFINITY } else { rng.random_range(-9.0..9.0) };
        case.sinks = Some((0..dims.heads).map(&mut logit).collect());
    }
    case.empty_row = empty_row(seed, case.normaliser);
    // A row with a sink is none of them.
    if case.empty_row == EmptyRow::Uniform {
        case.sinks = None;
    }
    case
}

/// Each kind of empty rows in turn, but for uniform ones of sigmoids.
pub(super) fn empty_row(seed: u64, normaliser: Normaliser) -> EmptyRow {
    match (seed % 5, normaliser) {
        (0 | 1, _) => EmptyRow::Nan,
        (2 | 3, Normaliser::Softmax) => EmptyRow::Uniform,
        _ => EmptyRow::Zero,
    }
}

/// Slopes as published, of each head, or of each head of each element of the batch; some of the wrong sign.
fn alibi(dims: &Dims, rng: &mut SmallRng) -> Alibi {
    let heads = [0, dims.heads, dims.heads * dims.batch][rng.random_range(0..3)];
    let slopes: Vec<f32> = (0..heads).map(|_| rng.random_range(-0.02..0.5_f32)).collect();
    Alibi { slopes: (heads > 0).then(|| slopes.into()), by_key: rng.random() }
}

async fn attended(client: &Client, case: &Case, workers: WorkerChoice, what: &str) -> Attended {
    let attended = client.attend(&case.operands, &case.options(workers), &mut |_| {}).await;
    attended.unwrap_or_else(|error| panic!("{what}: {error}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_operators_have_the_same_bits_on_any_number_of_workers() {
    let cluster = Cluster::start(4).await;
    let client = cluster.client();
    let fast = Kernels::available()[0];
    let (mut empty, mut filled, mut uniform, mut sunk, mut shared) = (0, 0, 0, 0, 0);
    let (mut general, mut capped, mut biased, mut sigmoids) = (0, 0, 0, 0);
    for seed in 0..CALLS {
        let case = case(seed);
        let wanted = case.compute(fast);
        let rows = case.sample_rows(seed, 6);
        let operator = case.operator();
        wanted.assert_within_operator(
            &case,
            &case.operator_reference(&rows),
            &format!("seed {seed}: {operator:?}"),
        );
        for count in COUNTS {
            let what = format!("seed {seed}, {count} workers: {operator:?}");
            let attended = attended(&client, &case, WorkerChoice::Exactly(count), &what).await;
            assert_eq!(attended.kernel_id, operator.kernel_id(Compute::F32), "{what}");
            assert_eq!(attended.plan.kernel_id, attended.kernel_id, "{what}");
            assert_eq!(attended.empty_rows, case.empty_rows(), "{what}");
            shared += usize::from(attended.plan.shares.len() == 4);
            Answer::from(attended).assert_bits_of(&wanted, &what);
        }
        empty += usize::from(case.empty_rows() > 0);
        filled += usize::from(wanted.context.iter().any(|x| x.is_nan()));
        let is_uniform = case.empty_row == EmptyRow::Uniform && wanted.lse.contains(&f32::NEG_INFINITY);
        uniform += usize::from(is_uniform);
        sunk += usize::from(case.sinks.is_some());
        general += usize::from(operator.path() == Path::General);
        capped += usize::from(case.softcap.is_some());
        biased += usize::from(case.alibi.is_some());
        sigmoids += usize::from(case.normaliser != Normaliser::Softmax);
    }
    let plain = CALLS as usize - general;
    for (what, met) in [
        ("empty rows", empty),
        ("NaN rows", filled),
        ("uniform rows", uniform),
        ("sinks", sunk),
        ("four shares", shared),
        ("general path", general),
        ("plain path", plain),
        ("caps", capped),
        ("linear biases", biased),
        ("sigmoids", sigmoids),
    ] {
        assert!(met >= 8, "{what}: only {met} calls");
    }
}

/// What could always be asked for is answered as it always was, in bits and in name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_of_before_there_were_operators_is_what_it_was() {
    let cluster = Cluster::start(2).await;
    let client = cluster.client();
    let dims = Dims { batch: 2, heads: 4, kv_heads: 2, queries: 30, keys: 900, head_dim: 24, value_dim: 16 };
    let case = Case::new(3, Data::Normal, Causal::BottomRight, Dtype::F32, dims);
    let message =
        proto::AttendRequest::from(AttendRequest::Begin(raw_call::begin(&case, WorkerChoice::Auto)));
    let Some(proto::attend_request::Part::Begin(begin)) = message.part else { panic!("no Begin") };
    assert_eq!((begin.causal(), begin.operator), (proto::Causal::BottomRight, None), "nothing new is sent");
    let wanted = case.compute(Kernels::available()[0]);
    let old = attended(&client, &case, WorkerChoice::Exactly(2), "old").await;
    assert_eq!((old.kernel_id.as_str(), old.plan.kernel_id.as_str()), (KERNEL_ID, KERNEL_ID));
    Answer::from(old).assert_bits_of(&wanted, "a call without an operator");
    // The same mask by other rules, and sinks that are none, have its bits under another name.
    let mut same = Case::new(3, Data::Normal, Causal::None, Dtype::F32, dims);
    let positions = Some(Positions::Offset(PerBatch::Same(870)));
    same.mask = Mask { causal: true, positions, ..Mask::default() };
    same.sinks = Some([f32::NEG_INFINITY; 4].into());
    let new = attended(&client, &same, WorkerChoice::Exactly(2), "new").await;
    assert_eq!(new.kernel_id, "c1-f32-op1");
    Answer::from(new).assert_bits_of(&wanted, "the same call with an operator");
}
