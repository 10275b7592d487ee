//! Biases with tables, masks of blocks, and documents in several runs: the same bits on 1 to 4 workers as in this process, inside the f64
//! oracle's bound.

use std::sync::Arc;

use attnd_client::WorkerChoice;
use attnd_kernel::{
    AttnShape, Causal, Compute, Csr, Dims, Documents, Dtype, EmptyRow, Kernels, Mask, Positions, Relative,
    Run, Shift, Swin,
};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::support::cases::{Answer, Case, Data};
use crate::support::cluster::Cluster;

const CALLS: u64 = 60;

/// Blocks that are listed with a chance of some percent, the same for all heads, for each head, or for each of the batch.
fn csr(shape: &AttnShape, rng: &mut SmallRng) -> Csr {
    let query_block = rng.random_range(1..=shape.n_queries());
    let key_block = [1, 64, rng.random_range(1..=shape.n_keys())][rng.random_range(0..3)];
    let layouts = [1, shape.n_heads(), shape.n_heads() * shape.batch()][rng.random_range(0..3)];
    let (rows, columns) = (shape.n_queries().div_ceil(query_block), shape.n_keys().div_ceil(key_block));
    let (mut row_ptr, mut listed) = (Vec::new(), Vec::new());
    for _layout in 0..layouts {
        let begin = listed.len();
        row_ptr.push(0);
        for _row in 0..rows {
            let share = [0.0, 0.05, 0.5, 1.0][rng.random_range(0..4)];
            listed.extend((0..columns as u32).filter(|_| rng.random_bool(share)));
            row_ptr.push((listed.len() - begin) as u32);
        }
    }
    Csr::new((query_block, key_block), layouts, row_ptr.into(), listed.into()).expect("ascending blocks")
}

/// Tokens that belong to one of three documents, in runs.
fn scattered(shape: &AttnShape, rng: &mut SmallRng) -> Documents {
    let mut runs = |tokens: usize| {
        let mut runs: Vec<Run> = Vec::new();
        let mut end = 0;
        while end < tokens {
            end = (end + rng.random_range(1..=tokens.div_ceil(5))).min(tokens);
            runs.push(Run { end, id: rng.random_range(0..3) });
        }
        runs
    };
    let batches = [1, shape.batch()][usize::from(shape.n_keys().is_multiple_of(2))];
    let queries: Vec<Vec<Run>> = (0..batches).map(|_| runs(shape.n_queries())).collect();
    let keys: Vec<Vec<Run>> = (0..batches).map(|_| runs(shape.n_keys())).collect();
    Documents::new(&queries, &keys).expect("runs in order")
}

fn table(n: usize, rng: &mut SmallRng) -> Arc<[f32]> {
    (0..n).map(|_| rng.random_range(-3.0..3.0_f32)).collect()
}

fn relative(shape: &AttnShape, rng: &mut SmallRng) -> Relative {
    let (buckets, both) = (rng.random_range(4..40), rng.random());
    let farthest = rng.random_range(40..2000);
    Relative::new(table(buckets * shape.n_heads(), rng), buckets, farthest, both).expect("buckets enough")
}

/// Windows of 6 rows, shifted every other time.
fn swin(shape: &AttnShape, rng: &mut SmallRng) -> Swin {
    let (height, width) = (6, shape.n_keys() / 6);
    let shift = rng.random::<bool>().then(|| {
        let regions = (0..shape.batch() * shape.n_keys()).map(|_| rng.random_range(0..4)).collect();
        Shift { regions, between: -100.0 }
    });
    let entries = (2 * height - 1) * (2 * width - 1) * shape.n_heads();
    Swin { height, width, table: table(entries, rng), shift }
}

pub(super) fn case(seed: u64) -> Case {
    let mut rng = SmallRng::seed_from_u64(31_000 + seed);
    let kv_heads = rng.random_range(1..=3);
    let is_swin = seed.is_multiple_of(4);
    let tokens = 6 * rng.random_range(1..=60);
    let dims = Dims {
        batch: rng.random_range(1..=3),
        heads: kv_heads * rng.random_range(1..=3),
        kv_heads,
        queries: if is_swin { tokens } else { rng.random_range(1..=40) },
        keys: if is_swin { tokens } else { rng.random_range(1..=2500) },
        head_dim: rng.random_range(1..=24),
        value_dim: rng.random_range(1..=24),
    };
    let dtype = [Dtype::F32, Dtype::F16, Dtype::Bf16][rng.random_range(0..3)];
    let mut case = Case::new(seed, Data::Normal, Causal::None, dtype, dims);
    let shape = *case.shape();
    case.mask = Mask { causal: rng.random(), positions: Some(Positions::BottomRight), ..Mask::default() };
    match seed % 4 {
        0 => case.swin = Some(swin(&shape, &mut rng)),
        1 => case.relative = Some(relative(&shape, &mut rng)),
        2 => case.csr = Some(csr(&shape, &mut rng)),
        _ => case.mask.documents = Some(Arc::new(scattered(&shape, &mut rng))),
    }
    // Often two of them together.
    if rng.random() {
        case.csr = Some(csr(&shape, &mut rng));
    }
    if rng.random_range(0..3) == 0 {
        case.relative = Some(relative(&shape, &mut rng));
    }
    if rng.random_range(0..4) == 0 {
        case.sinks = Some((0..shape.n_heads()).map(|_| rng.random_range(-9.0..9.0)).collect());
    }
    case.empty_row = [EmptyRow::Zero, EmptyRow::Nan, EmptyRow::Uniform][rng.random_range(0..3)];
    case
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_blocks_and_scattered_documents_have_the_same_bits_on_any_number_of_workers() {
    let cluster = Cluster::start(4).await;
    let client = cluster.client();
    let fast = Kernels::available()[0];
    let (mut empty, mut shared, mut scattered) = (0, 0, 0);
    for seed in 0..CALLS {
        let case = case(seed);
        let wanted = case.compute(fast);
        let rows = case.sample_rows(seed, 8);
        let what = format!("seed {seed}, {:?}", case.shape());
        wanted.assert_within_operator(&case, &case.operator_reference(&rows), &what);
        for count in 1..=4 {
            let what = format!("{what}, {count} workers");
            let options = case.options(WorkerChoice::Exactly(count));
            let attended = client.attend(&case.operands, &options, &mut |_| {}).await;
            let attended = attended.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(attended.kernel_id, case.operator().kernel_id(Compute::F32), "{what}");
            assert_eq!(attended.empty_rows, case.empty_rows(), "{what}");
            shared += usize::from(attended.plan.shares.len() == 4);
            Answer::from(attended).assert_bits_of(&wanted, &what);
        }
        empty += usize::from(case.empty_rows() > 0);
        scattered +=
            usize::from(case.mask.documents.as_ref().is_some_and(|documents| documents.is_scattered()));
    }
    for (what, met) in [("empty rows", empty), ("four shares", shared), ("scattered documents", scattered)] {
        assert!(met >= 8, "{what}: only {met} calls");
    }
}
