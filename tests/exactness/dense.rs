//! Dense masks and biases: the same bits on 1 to 4 workers as in this process, inside the f64 oracle's bound.

use std::time::Duration;

use attnd_client::{Alibi, AttendOptions, Client, DenseTensor, Element, WorkerChoice};
use attnd_kernel::{Causal, Compute, Dims, Dtype, EmptyRow, Kernels, Normaliser};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::operators::empty_row;
use crate::support::cases::{Answer, Case, Data};
use crate::support::cluster::Cluster;
use crate::support::dense::{random_bias, random_mask, random_shape};
use crate::support::raw_call;

const CALLS: u64 = 60;

/// A call with a mask, a bias or both.
pub(super) fn case(seed: u64) -> Case {
    let mut rng = SmallRng::seed_from_u64(9000 + seed);
    let kv_heads = rng.random_range(1..=3);
    let dims = Dims {
        batch: rng.random_range(1..=3),
        heads: kv_heads * rng.random_range(1..=3),
        kv_heads,
        queries: rng.random_range(1..=40),
        keys: rng.random_range(1..=2500),
        head_dim: rng.random_range(1..=32),
        value_dim: rng.random_range(1..=32),
    };
    let dtypes = [Dtype::F32, Dtype::F16, Dtype::Bf16];
    let causal = [Causal::None, Causal::None, Causal::BottomRight, Causal::TopLeft][rng.random_range(0..4)];
    let mut case = Case::new(seed, Data::Normal, causal, dtypes[rng.random_range(0..3)], dims);
    let which = rng.random_range(1..4);
    if which & 1 != 0 {
        case.dense_mask = Some(random_mask(random_shape(case.shape(), &mut rng), &mut rng));
    }
    if which & 2 != 0 {
        let dtype = dtypes[rng.random_range(0..3)];
        case.dense_bias = Some(random_bias(random_shape(case.shape(), &mut rng), dtype, &mut rng));
    }
    // What else single scores meet, too.
    if rng.random_range(0..4) == 0 {
        case.softcap = Some(rng.random_range(0.5..50.0_f32));
    }
    if rng.random_range(0..4) == 0 {
        case.alibi = Some(Alibi { slopes: None, by_key: true });
    }
    if rng.random_range(0..4) == 0 {
        case.normaliser = Normaliser::Sigmoid { bias: rng.random_range(-6.0..2.0_f32) };
    } else if rng.random() {
        case.sinks = Some((0..dims.heads).map(|_| rng.random_range(-9.0..9.0)).collect());
    }
    case.empty_row = empty_row(seed, case.normaliser);
    case
}

async fn attended(client: &Client, case: &Case, count: usize, what: &str) -> Answer {
    let options = case.options(WorkerChoice::Exactly(count));
    let attended = client.attend(&case.operands, &options, &mut |_| {}).await;
    let attended = attended.unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(attended.kernel_id, case.operator().kernel_id(Compute::F32), "{what}");
    assert_eq!(attended.empty_rows, case.empty_rows(), "{what}");
    attended.into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_dense_tensors_have_the_same_bits_on_any_number_of_workers() {
    let cluster = Cluster::start(4).await;
    let client = cluster.client();
    let fast = Kernels::available()[0];
    let (mut empty, mut uniform) = (0, 0);
    for seed in 0..CALLS {
        let case = case(seed);
        let wanted = case.compute(fast);
        let sides = case.sides();
        for count in 1..=4 {
            let what = format!("seed {seed}, {count} workers, {:?}, {sides:?}", case.operands.shape);
            attended(&client, &case, count, &what).await.assert_bits_of(&wanted, &what);
        }
        let rows = case.sample_rows(seed, 10);
        let what = format!("seed {seed}, {:?}", case.operator());
        wanted.assert_within_operator(&case, &case.operator_reference(&rows), &what);
        empty += u64::from(case.empty_rows() > 0);
        let is_uniform = case.empty_row == EmptyRow::Uniform && wanted.lse.contains(&f32::NEG_INFINITY);
        uniform += u64::from(is_uniform);
    }
    assert!(empty >= CALLS / 4, "only {empty} calls with rows that see no key");
    assert!(uniform >= CALLS / 12, "only {uniform} calls with rows that are uniform");
    cluster.wait_until_idle(Duration::from_secs(1)).await;
}

/// Chunks of any size, from one element on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_chunking_has_the_same_bits() {
    let cluster = Cluster::start(3).await;
    let mut rng = SmallRng::seed_from_u64(77);
    for seed in 100..112 {
        let case = case(seed);
        let wanted = case.compute(Kernels::available()[0]);
        let frames = raw_call::interleaved(&case, WorkerChoice::Exactly(3), 20_000, &mut rng);
        let answer = raw_call::send(raw_call::channel(cluster.url()), &case, frames).await;
        let answer = answer.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        answer.assert_bits_of(&wanted, &format!("seed {seed}"));
    }
}

/// Keys that a mask or a bias hides from every row may hold anything, and no worker's answer shows it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hidden_keys_have_no_influence_even_where_they_are_nan() {
    let cluster = Cluster::start(2).await;
    let client = cluster.client();
    let dims = Dims { batch: 1, heads: 4, kv_heads: 2, queries: 20, keys: 1100, head_dim: 16, value_dim: 8 };
    for by_bias in [false, true] {
        let mut rng = SmallRng::seed_from_u64(31);
        let hidden: Vec<bool> = (0..1100).map(|_| rng.random_bool(0.3)).collect();
        let poisoned = |rubbish: f32| {
            let plain = Case::plain(5, dims);
            let mut operands = plain.operands;
            for (bytes, dim) in [(&mut operands.k, 16), (&mut operands.v, 8)] {
                let mut values = attnd_wire::floats::from_bytes(bytes);
                for (row, values) in values.chunks_exact_mut(dim).enumerate() {
                    if hidden[row % 1100] {
                        values.fill(rubbish);
                    }
                }
                *bytes = attnd_wire::floats::into_bytes(values);
            }
            let mut case = Case::of(Data::Poisoned, Causal::None, 0.25, operands);
            let shape = [1, 1, 1, 1100];
            if by_bias {
                let value = |hidden: &bool| if *hidden { f32::NEG_INFINITY } else { 0.5 };
                let bytes = attnd_wire::floats::into_bytes(hidden.iter().map(value).collect());
                let element = Element::Float(Dtype::F32);
                case.dense_bias = Some(DenseTensor { element, shape, bytes });
            } else {
                let bytes: Vec<u8> = hidden.iter().map(|hidden| u8::from(!hidden)).collect();
                let element = Element::Bool;
                case.dense_mask = Some(DenseTensor { element, shape, bytes: bytes.into() });
            }
            case
        };
        let wanted = poisoned(0.0).compute(Kernels::available()[0]);
        assert!(wanted.context.iter().all(|x| x.is_finite()));
        for (rubbish, count) in [(f32::NAN, 1), (f32::NAN, 2), (f32::INFINITY, 2)] {
            let what = format!("{rubbish} where hidden, by bias: {by_bias}, {count} workers");
            attended(&client, &poisoned(rubbish), count, &what).await.assert_bits_of(&wanted, &what);
        }
    }
}

/// A row that sees no key is refused where that was asked for, although nobody knows before its mask has come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_without_a_key_are_refused_where_they_are_forbidden() {
    let cluster = Cluster::start(2).await;
    let client = cluster.client();
    let dims = Dims { batch: 2, heads: 2, kv_heads: 1, queries: 9, keys: 700, head_dim: 8, value_dim: 8 };
    let mut case = Case::plain(8, dims);
    let mut sees = vec![1_u8; 2 * 9 * 700];
    case.dense_mask =
        Some(DenseTensor { element: Element::Bool, shape: [2, 1, 9, 700], bytes: sees.clone().into() });
    let forbid =
        |case: &Case| AttendOptions { forbid_empty_rows: true, ..case.options(WorkerChoice::Exactly(2)) };
    let answer =
        client.attend(&case.operands, &forbid(&case), &mut |_| {}).await.expect("every row sees a key");
    assert_eq!(answer.empty_rows, 0);
    sees[(9 + 4) * 700..(9 + 5) * 700].fill(0);
    if let Some(mask) = &mut case.dense_mask {
        mask.bytes = sees.into();
    }
    let error =
        client.attend(&case.operands, &forbid(&case), &mut |_| {}).await.expect_err("one row sees none");
    assert_eq!(error.to_string(), "EMPTY_ROW: head 2 row 4 sees no key");
    attended(&client, &case, 2, "where they are not forbidden").await;
    cluster.wait_until_idle(Duration::from_secs(1)).await;
}
