//! Rows that see no key and become the mean of the values: the same bits on 1 to 4 workers, whoever hides the keys and however V is cut
//! into chunks.

use attnd_client::{AttendOptions, Client, DenseTensor, Element, OutputsParts, Stage, WorkerChoice};
use attnd_kernel::{Causal, Compute, Dims, Dtype, EmptyRow, Kernels, Mask, PerBatch, Positions};
use attnd_wire::floats;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::support::cases::{Answer, Case, Data};
use crate::support::cluster::Cluster;
use crate::support::raw_call;

const QUERIES: usize = 20;
const KEYS: usize = 3000;
/// Query heads of all three elements of the batch, three for each kv head.
const HEADS: usize = 18;

pub(super) fn plain(seed: u64, dtype: Dtype, data: Data) -> Case {
    let (queries, keys) = (QUERIES as u64, KEYS as u64);
    let dims = Dims { batch: 3, heads: 6, kv_heads: 2, queries, keys, head_dim: 8, value_dim: 24 };
    let mut case = Case::new(seed, data, Causal::None, dtype, dims);
    case.empty_row = EmptyRow::Uniform;
    case
}

/// The first queries of two elements stand before all keys that are no padding.
fn by_intervals(case: &mut Case) -> u64 {
    case.mask = Mask {
        causal: true,
        positions: Some(Positions::Offset(PerBatch::Each([0, 90, 2985].into()))),
        key_begin: Some(PerBatch::Each([0, 100, 2990].into())),
        key_end: Some(PerBatch::Each([3000, 2000, 2999].into())),
        ..Mask::default()
    };
    6 * (10 + 5)
}

/// A mask of each head hides all keys from every fourth row; of the others it shows keys that one worker may have alone.
fn by_a_dense_mask(case: &mut Case) -> u64 {
    let mut rng = SmallRng::seed_from_u64(17);
    let mut bytes = vec![0_u8; HEADS * QUERIES * KEYS];
    for (row, sees) in bytes.chunks_exact_mut(KEYS).enumerate() {
        if row % 4 != 0 {
            let first = rng.random_range(0..KEYS);
            sees[first..KEYS.min(first + 40)].fill(1);
        }
    }
    let shape = [3, 6, QUERIES, KEYS];
    case.dense_mask = Some(DenseTensor { element: Element::Bool, shape, bytes: bytes.into() });
    (HEADS * QUERIES / 4) as u64
}

async fn attended(client: &Client, case: &Case, count: usize, what: &str) -> attnd_client::Attended {
    let options = case.options(WorkerChoice::Exactly(count));
    let attended = client.attend(&case.operands, &options, &mut |_| {}).await;
    attended.unwrap_or_else(|error| panic!("{what}: {error}"))
}

/// What the same call answers without uniform rows, with the mean in those that saw nothing.
fn wanted(case: &Case) -> Answer {
    let zero = Case { empty_row: EmptyRow::Zero, ..case.clone() };
    let mut answer = zero.compute(Kernels::available()[0]);
    let (shape, dim) = (case.shape(), case.shape().value_dim());
    let means: Vec<Vec<f32>> = (0..shape.n_groups()).map(|group| case.value_mean(group)).collect();
    for (row, context) in answer.context.chunks_exact_mut(dim).enumerate() {
        if answer.lse[row] == f32::NEG_INFINITY {
            context.copy_from_slice(&means[row / shape.n_queries() / shape.group_size()]);
        }
    }
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uniform_rows_are_the_mean_of_all_values_on_any_number_of_workers() {
    let cluster = Cluster::start(4).await;
    let client = cluster.client();
    let mut rng = SmallRng::seed_from_u64(3);
    for (seed, dtype) in (0..).zip([Dtype::F32, Dtype::F16, Dtype::Bf16]) {
        for hide in [by_intervals, by_a_dense_mask] {
            let mut case = plain(seed, dtype, Data::Normal);
            let empty = hide(&mut case);
            let wanted = wanted(&case);
            let seen = wanted.lse.iter().filter(|lse| **lse == f32::NEG_INFINITY).count();
            assert_eq!(seen as u64, empty);
            let what = format!("{dtype}, {empty} empty rows");
            case.compute(Kernels::available()[0]).assert_bits_of(&wanted, &what);
            for count in 1..=4 {
                let what = format!("{what}, {count} workers");
                let answer = attended(&client, &case, count, &what).await;
                assert_eq!(answer.plan.shares.len(), count, "{what}");
                assert_eq!(answer.kernel_id, case.operator().kernel_id(Compute::F32), "{what}");
                assert_eq!(answer.empty_rows, empty, "{what}");
                Answer::from(answer).assert_bits_of(&wanted, &what);
            }
            // Chunks from one element on, in two of these calls the groups in any order.
            for count in [1, 3, 4] {
                let frames = raw_call::interleaved(&case, WorkerChoice::Exactly(count), 30_000, &mut rng);
                let answer = raw_call::send(raw_call::channel(cluster.url()), &case, frames).await;
                let answer = answer.unwrap_or_else(|error| panic!("{what}: {error}"));
                answer.assert_bits_of(&wanted, &format!("{what}, {count} workers, in random chunks"));
            }
        }
    }
}

/// Every chunk of V is waited for, and what comes behind it is not left waiting.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_large_chunks_are_added_as_they_pass() {
    let cluster = Cluster::start(2).await;
    let client = cluster.client();
    let dims = Dims { batch: 1, heads: 8, kv_heads: 4, queries: 6, keys: 8000, head_dim: 4, value_dim: 128 };
    let mut case = Case::plain(9, dims);
    case.empty_row = EmptyRow::Uniform;
    // The padding of the queries sees nothing.
    case.mask.query_end = Some(PerBatch::Same(4));
    let wanted = wanted(&case);
    for count in [1, 2] {
        let what = format!("{count} workers");
        let answer = attended(&client, &case, count, &what).await;
        assert_eq!(answer.empty_rows, 8 * 2);
        Answer::from(answer).assert_bits_of(&wanted, &what);
    }
}

/// Values that are the first elements of keys don't travel, and the mean is that of what did.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_that_begin_keys_have_a_mean_too() {
    let cluster = Cluster::start(3).await;
    let client = cluster.client();
    let dims = Dims { batch: 2, heads: 4, kv_heads: 2, queries: 6, keys: 2000, head_dim: 40, value_dim: 24 };
    let mut case = Case::new(11, Data::Normal, Causal::None, Dtype::F16, dims).with_values_from_keys();
    case.empty_row = EmptyRow::Uniform;
    case.mask.query_end = Some(PerBatch::Each([4, 6].into()));
    let wanted = wanted(&case);
    for count in 1..=3 {
        let what = format!("{count} workers");
        let answer = attended(&client, &case, count, &what).await;
        assert_eq!(answer.empty_rows, 4 * 2);
        Answer::from(answer).assert_bits_of(&wanted, &what);
    }
}

/// What hides in V follows IEEE 754 into the mean, and into no row that sees a key and not these.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_that_are_no_numbers_are_in_the_mean_alone() {
    let cluster = Cluster::start(3).await;
    let client = cluster.client();
    let mut clean = plain(4, Dtype::F32, Data::Normal);
    let empty = by_intervals(&mut clean);
    let mut case = Case { data: Data::Poisoned, ..clean.clone() };
    let mut values = floats::from_bytes(&case.operands.v);
    // Key 2999 is behind the last one of each element but the first, key 1999 before the first one of the last.
    for group in 2..6 {
        let last = &mut values[(group * KEYS + KEYS - 1) * 24..][..24];
        (last[0], last[1], last[2]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
    }
    values[(5 * KEYS + 1999) * 24 + 2] = f32::INFINITY;
    case.operands.v = floats::into_bytes(values);
    let wanted = wanted(&case);
    let (inf, nan) = (f32::INFINITY.to_bits(), 0x7fc0_0000);
    for (row, lse) in wanted.lse.iter().enumerate().filter(|(_, lse)| **lse == f32::NEG_INFINITY) {
        let group = row / QUERIES / 3;
        let [a, b, c] = [0, 1, 2].map(|column| wanted.context[row * 24 + column].to_bits());
        let third = if group == 5 { nan } else { f32::NEG_INFINITY.to_bits() };
        assert_eq!(([a, b, c], *lse), ([nan, inf, third], f32::NEG_INFINITY), "row {row}");
    }
    let zero = Case { empty_row: EmptyRow::Zero, ..clean };
    let zero = zero.compute(Kernels::available()[0]);
    let seen = |answer: &Answer| -> Vec<f32> {
        let rows = answer.context.chunks_exact(24).zip(&answer.lse);
        rows.filter(|(_, lse)| lse.is_finite()).flat_map(|(context, _)| context.to_vec()).collect()
    };
    assert_eq!(seen(&wanted), seen(&zero), "no row that sees a key");
    for count in 1..=3 {
        let what = format!("{count} workers");
        let answer = attended(&client, &case, count, &what).await;
        assert_eq!(answer.empty_rows, empty);
        Answer::from(answer).assert_bits_of(&wanted, &what);
    }
    // Without leave for them they are refused, and not averaged.
    let options = AttendOptions { allow_non_finite: false, ..case.options(WorkerChoice::Exactly(2)) };
    let error = client.attend(&case.operands, &options, &mut |_| {}).await.expect_err("NaN in V");
    assert!(error.to_string().starts_with("NON_FINITE: v[h="), "{error}");
}

/// The mean is no look at any key: what is told beside the context is what it is of rows of zeros.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn weights_of_uniform_rows_are_zero() {
    let cluster = Cluster::start(2).await;
    let client = cluster.client();
    let mut case = plain(6, Dtype::F16, Data::Normal);
    by_a_dense_mask(&mut case);
    let parts =
        OutputsParts { stages: vec![Stage::Weights], entropy: true, top_k: 2, ..OutputsParts::default() };
    let told = async |empty_row: EmptyRow| {
        let case = Case { empty_row, ..case.clone() };
        let options = AttendOptions { outputs: parts.clone(), ..case.options(WorkerChoice::Exactly(2)) };
        client.attend(&case.operands, &options, &mut |_| {}).await.expect("an answer")
    };
    let (uniform, zero) = (told(EmptyRow::Uniform).await, told(EmptyRow::Zero).await);
    for row in (0..HEADS * QUERIES).step_by(4) {
        assert_eq!(uniform.lse[row], f32::NEG_INFINITY);
        assert!(uniform.inspected.elements[0][row * KEYS..][..KEYS].iter().all(|weight| *weight == 0.0));
        assert_eq!((uniform.inspected.entropy[row], uniform.inspected.top_weights[row * 2]), (0.0, 0.0));
    }
    assert_eq!(uniform.inspected, zero.inspected);
    assert_eq!((&uniform.lse, uniform.context != zero.context), (&zero.lse, true));
}
