//! The same bits on 1, 2, 3, 5 and 8 workers, of any instruction set, as in this process: over real processes.

mod dense;
mod in_process;
mod operators;
mod outputs;
mod projections;
mod scores;
mod tables;
mod uniform;

use std::collections::BTreeSet;

use attnd_client::{Client, WorkerChoice};
use attnd_kernel::slot::{N_SLOTS, n_pages};
use attnd_kernel::{Causal, Compute, Dims, Dtype, Isa, Kernels};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::mpsc;

use crate::support::cases::{Answer, Case, Data};
use crate::support::cluster::{Cluster, WorkerSpec};
use crate::support::{nightly, raw_call};

const WORKERS: usize = 8;
const COUNTS: [usize; 5] = [1, 2, 3, 5, WORKERS];
const CAUSAL: [Causal; 3] = [Causal::None, Causal::BottomRight, Causal::TopLeft];

/// Operations and bytes of one random call, at most: 200 of them times six computations fit into the suite's budget.
const FLOPS: u64 = 1_200_000_000;
const BYTES: u64 = 16 << 20;
/// Operations that the portable kernels are asked for, in this process.
const PORTABLE_FLOPS: f64 = 3e7;

/// Eight workers whose instruction sets are all that this machine has, at least one of them portable.
fn mixed_workers() -> Vec<WorkerSpec> {
    let fast: Vec<Isa> = Kernels::available()
        .iter()
        .map(|kernels| kernels.isa())
        .filter(|isa| *isa != Isa::Portable)
        .collect();
    let isa =
        |i: usize| if i == WORKERS - 1 || fast.is_empty() { Isa::Portable } else { fast[i % fast.len()] };
    (0..WORKERS).map(|i| WorkerSpec { isa: Some(isa(i)), ..WorkerSpec::default() }).collect()
}

fn flops(dims: &Dims) -> u64 {
    2 * dims.batch * dims.heads * dims.queries * dims.keys * (dims.head_dim + dims.value_dim)
}

fn bytes(dims: &Dims) -> u64 {
    let kv = dims.kv_heads * dims.keys * (dims.head_dim + dims.value_dim);
    4 * dims.batch * (kv + dims.heads * dims.queries * dims.head_dim)
}

fn divisor(of: u64, rng: &mut SmallRng) -> u64 {
    let divisors: Vec<u64> = (1..=of).filter(|n| of.is_multiple_of(*n)).collect();
    divisors[rng.random_range(0..divisors.len())]
}

/// Even over the logarithm, from 1 to `most`.
fn spread(most: u64, rng: &mut SmallRng) -> u64 {
    let x = (rng.random_range(0.0..1.0_f64) * ((most + 1) as f64).ln()).exp();
    (x as u64).clamp(1, most)
}

/// Random dimensions with one of them, by `turn`, at an edge of its range; the others shrink until the call is small
/// enough.
fn random_dims(turn: usize, rng: &mut SmallRng) -> Dims {
    let heads = rng.random_range(1..=64);
    let mut dims = Dims {
        batch: rng.random_range(1..=3),
        heads,
        kv_heads: divisor(heads, rng),
        queries: spread(700, rng),
        keys: spread(70_000, rng),
        head_dim: rng.random_range(1..=256),
        value_dim: rng.random_range(1..=256),
    };
    if rng.random_range(0..3) == 0 {
        dims.value_dim = dims.head_dim;
    }
    let far_end = !(turn / 12).is_multiple_of(2);
    // The dimensions that stay as they are, as indices into the match below.
    let fixed: &[u32] = match turn % 12 {
        0 => {
            dims.keys = if far_end { rng.random_range(30_000..70_000) } else { 70_000 };
            &[0]
        }
        1 => {
            dims.queries = 700;
            &[1]
        }
        2 => {
            (dims.heads, dims.kv_heads) = (64, divisor(64, rng));
            &[2]
        }
        3 => {
            dims.head_dim = if far_end { 255 } else { 256 };
            &[3]
        }
        4 => {
            dims.value_dim = if far_end { 255 } else { 256 };
            &[4]
        }
        5 => {
            dims.batch = 3;
            &[5]
        }
        6 => {
            dims.queries = 1;
            &[0, 1]
        }
        7 => {
            dims.keys = if far_end { rng.random_range(250..260) } else { 1 };
            &[0]
        }
        8 => {
            dims.head_dim = 1;
            &[3]
        }
        9 => {
            dims.value_dim = 1;
            &[4]
        }
        10 => {
            (dims.heads, dims.kv_heads) = if far_end { (48, 48) } else { (1, 1) };
            &[2]
        }
        // More queries than keys: rows that see nothing under one of the causal rules.
        _ => {
            dims.queries = rng.random_range(300..=700);
            dims.keys = rng.random_range(1..300);
            &[0, 1]
        }
    };
    while flops(&dims) > FLOPS || bytes(&dims) > BYTES {
        let which = rng.random_range(0..6);
        if fixed.contains(&which) {
            continue;
        }
        match which {
            0 => dims.keys = dims.keys * 3 / 4 + 1,
            1 => dims.queries = dims.queries / 2 + 1,
            2 => {
                dims.heads = dims.heads / 2 + 1;
                dims.kv_heads = divisor(dims.heads, rng);
            }
            3 => dims.head_dim = dims.head_dim / 2 + 1,
            4 => dims.value_dim = dims.value_dim / 2 + 1,
            _ => dims.batch = 1,
        }
    }
    dims
}

fn random_calls() -> Vec<(u64, Data, Causal, Dims)> {
    let mut rng = SmallRng::seed_from_u64(20_261_123);
    (0..200)
        .map(|i| {
            // Neither cycle has a common factor with that of the edges, so all combinations come up.
            let causal = CAUSAL[i / 12 % CAUSAL.len()];
            let data = if i % 5 == 4 { Data::ALL[i / 5 % Data::ALL.len()] } else { Data::Normal };
            (i as u64, data, causal, random_dims(i, &mut rng))
        })
        .collect()
}

#[test]
fn the_random_calls_cover_every_range() {
    let calls = random_calls();
    let all =
        |of: fn(&Dims) -> u64| -> BTreeSet<u64> { calls.iter().map(|(_, _, _, dims)| of(dims)).collect() };
    let covers = |what: &str, of: fn(&Dims) -> u64, edges: &[u64]| {
        let values = all(of);
        for pair in edges.windows(2) {
            let met = values.range(pair[0]..=pair[1]).count();
            assert!(met > 0, "{what}: nothing from {} to {}: {values:?}", pair[0], pair[1]);
        }
        let (first, last) = (edges[0], edges[edges.len() - 1]);
        assert!(values.contains(&first) && values.contains(&last), "{what}: {first} or {last} is missing");
    };
    covers("heads", |dims| dims.heads, &[1, 1, 2, 4, 8, 16, 32, 48, 64, 64]);
    covers("queries", |dims| dims.queries, &[1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 699, 700]);
    covers(
        "keys",
        |dims| dims.keys,
        &[1, 1, 7, 63, 255, 300, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 50_000, 70_000],
    );
    covers("head_dim", |dims| dims.head_dim, &[1, 1, 3, 8, 16, 32, 64, 80, 128, 200, 255, 256]);
    covers("value_dim", |dims| dims.value_dim, &[1, 1, 3, 8, 16, 32, 64, 80, 128, 200, 255, 256]);
    covers("batch", |dims| dims.batch, &[1, 2, 3]);

    let count = |holds: fn(&Dims) -> bool| calls.iter().filter(|(_, _, _, dims)| holds(dims)).count();
    for (what, met) in [
        ("multi-head", count(|dims| dims.heads > 1 && dims.kv_heads == dims.heads)),
        ("grouped", count(|dims| dims.kv_heads > 1 && dims.kv_heads < dims.heads)),
        ("multi-query", count(|dims| dims.heads > 1 && dims.kv_heads == 1)),
        ("odd head_dim", count(|dims| dims.head_dim % 2 == 1)),
        ("odd value_dim", count(|dims| dims.value_dim % 2 == 1)),
        ("dv != d", count(|dims| dims.value_dim != dims.head_dim)),
        ("dv == d", count(|dims| dims.value_dim == dims.head_dim)),
        ("more queries than keys", count(|dims| dims.queries > dims.keys)),
        ("more pages than slots", count(|dims| dims.keys > 256 * 64)),
        ("no whole page", count(|dims| dims.keys % 256 != 0)),
    ] {
        assert!(met >= 10, "{what}: only {met} calls");
    }
    for causal in CAUSAL {
        for far in [false, true] {
            let met =
                calls.iter().filter(|(_, _, c, dims)| *c == causal && (dims.keys > 4096) == far).count();
            assert!(met >= 5, "{causal:?} with more than 4096 keys = {far}: only {met} calls");
        }
    }
    for data in Data::ALL {
        assert!(calls.iter().any(|(_, d, ..)| *d == data), "{data:?}");
    }
}

/// What a list of calls has shown beyond the bits.
#[derive(Default)]
struct Seen {
    /// Workers that took part in some call.
    workers: BTreeSet<String>,
    /// Calls that all eight workers shared.
    by_all: usize,
    /// Calls in which a kv group was cut by slots.
    cut_by_slots: usize,
    /// Elements of context and lse whose bits were compared.
    elements: usize,
}

/// Computes one call in this process with every ISA, and some of its rows by themselves; returns what all of them are.
fn compute(what: &str, case: &Case) -> Answer {
    let fast = Kernels::available()[0];
    let rows = case.sample_rows(1, 2);
    let wanted = case.compute(fast);
    // The portable kernels are too slow for most whole calls.
    for kernels in Kernels::available() {
        let isa = kernels.isa();
        if isa != Isa::Portable || case.flops() <= PORTABLE_FLOPS {
            case.compute(kernels).assert_bits_of(&wanted, &format!("{what}: {isa} kernels"));
        }
        for (at, row) in case.compute_alone(kernels, &rows) {
            let what = format!("{what}: row {at:?} alone and in the batch, {isa} kernels");
            row.assert_bits_of(&wanted.row(case.shape(), at), &what);
        }
    }
    if case.data != Data::Poisoned {
        wanted.assert_within(case.shape(), &case.reference(&rows), what);
    }
    wanted
}

/// Has one call computed on 1, 2, 3, 5 and 8 workers.
async fn check(what: &str, client: &Client, case: &Case, wanted: &Answer, seen: &mut Seen) {
    for count in COUNTS {
        let options = case.options(WorkerChoice::Exactly(count));
        let attended = client.attend(&case.operands, &options, &mut |_| {}).await;
        let attended = attended.unwrap_or_else(|error| panic!("{what}, {count} workers: {error}"));
        assert_eq!(attended.empty_rows, case.empty_rows(), "{what}, {count} workers: rows without keys");
        // Where -inf is allowed as an operand, a row can see keys and still have an lse of -inf.
        if case.data != Data::Poisoned {
            let lowest = attended.lse.iter().filter(|lse| **lse == f32::NEG_INFINITY).count() as u64;
            assert_eq!(lowest, case.empty_rows(), "{what}, {count} workers: rows with an lse of -inf");
        }
        assert_eq!(
            (attended.kernel_id.as_str(), attended.attempts),
            (case.operator().kernel_id(Compute::F32), 1),
            "{what}, {count} workers"
        );

        let shares = &attended.plan.shares;
        let cells = case.shape().n_groups() * n_pages(case.shape().n_keys()).min(N_SLOTS);
        assert_eq!(shares.len(), count.min(cells), "{what}: {}", attended.plan.reason);
        let pieces = || shares.iter().flat_map(|share| &share.pieces);
        seen.workers.extend(shares.iter().map(|share| share.worker.to_string()));
        seen.by_all += usize::from(shares.len() == WORKERS);
        seen.cut_by_slots += usize::from(pieces().any(|piece| piece.slots != (0..N_SLOTS)));

        seen.elements += wanted.context.len() + wanted.lse.len();
        Answer::from(attended).assert_bits_of(wanted, &format!("{what}, {count} workers and this process"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_random_calls_have_the_same_bits_on_any_number_of_workers() {
    let cluster = Cluster::with(mixed_workers()).await;
    let client = cluster.client();
    let mut seen = Seen::default();
    // While the cluster computes a call, this process computes the next one.
    let (computed, mut calls) = mpsc::channel(1);
    let in_this_process = tokio::task::spawn_blocking(move || {
        for (seed, data, causal, dims) in random_calls() {
            let case = Case::new(seed, data, causal, Dtype::F32, dims);
            let what = format!("call {seed}: {data:?} {causal:?} {dims:?}");
            let wanted = compute(&what, &case);
            if computed.blocking_send((what, case, wanted)).is_err() {
                return;
            }
        }
    });
    let mut checked = 0;
    while let Some((what, case, wanted)) = calls.recv().await {
        check(&what, &client, &case, &wanted, &mut seen).await;
        checked += 1;
    }
    in_this_process.await.expect("what this process computes is right");
    assert_eq!(checked, 200);
    assert_eq!(seen.workers.len(), WORKERS, "workers that took part: {:?}", seen.workers);
    assert!(seen.by_all >= 100, "only {} calls were shared by all workers", seen.by_all);
    assert!(seen.cut_by_slots >= 100, "only {} calls were cut by slots", seen.cut_by_slots);
    println!("0 of {} elements differ over 200 calls on each of {COUNTS:?} workers", seen.elements);
    let status = cluster.status().await;
    let used: BTreeSet<&str> = status.workers.iter().map(|worker| worker.isa.as_str()).collect();
    let available: BTreeSet<&str> = Kernels::available().iter().map(|kernels| kernels.isa().name()).collect();
    assert_eq!(used, available, "instruction sets of the workers and of this machine");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_precision_and_any_interleaving_of_chunks_have_the_same_bits() {
    let cluster = Cluster::with(mixed_workers()).await;
    let channel = raw_call::channel(cluster.url());
    let client = cluster.client();
    let fast = Kernels::available()[0];
    for seed in 0..30_u64 {
        let mut rng = SmallRng::seed_from_u64(7000 + seed);
        let dtype = [Dtype::F16, Dtype::Bf16, Dtype::F32][seed as usize % 3];
        let causal = CAUSAL[seed as usize / 3 % 3];
        let data = [Data::Normal, Data::HugeValues, Data::Ties][seed as usize / 9 % 3];
        let heads = rng.random_range(1..=12);
        let dims = Dims {
            batch: rng.random_range(1..=2),
            heads,
            kv_heads: divisor(heads, &mut rng),
            queries: rng.random_range(1..=40),
            keys: rng.random_range(1..=3000),
            head_dim: rng.random_range(1..=80),
            value_dim: rng.random_range(1..=80),
        };
        let what = format!("seed {seed}: {dtype} {data:?} {causal:?} {dims:?}");
        let case = Case::new(seed, data, causal, dtype, dims);
        let rows = case.sample_rows(seed, 2);
        let wanted = case.compute(fast);
        wanted.assert_within(case.shape(), &case.reference(&rows), &what);
        let workers = WorkerChoice::Exactly(COUNTS[seed as usize % COUNTS.len()]);

        let sent = client.attend(&case.operands, &case.options(workers), &mut |_| {}).await;
        let sent = sent.unwrap_or_else(|error| panic!("{what}: {error}"));
        Answer::from(sent).assert_bits_of(&wanted, &what);

        // From chunks of one element or so to chunks of several whole heads.
        let largest = [3000, 10_000, 100_000][seed as usize % 3].max(case.bytes() / 2000);
        let frames = raw_call::interleaved(&case, workers, largest, &mut rng);
        let chunks = frames.len() - 2;
        let sent = raw_call::send(channel.clone(), &case, frames).await;
        let sent = sent.unwrap_or_else(|error| panic!("{what}, {chunks} chunks: {error}"));
        sent.assert_bits_of(&wanted, &format!("{what}, {chunks} chunks interleaved"));
    }
}

/// Workers keep keys and values as they were sent. That shows in what they take, and nowhere else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_precision_has_the_bits_of_the_same_numbers_in_f32() {
    let cluster = Cluster::with(mixed_workers()).await;
    let client = cluster.client();
    // Few rows and many, which take different kernels; odd dimensions and keys, which leave a word half empty.
    let sizes = [(1, 1, 3000, 64, 64), (4, 1, 5001, 65, 33), (2, 150, 1300, 40, 81), (1, 97, 999, 31, 128)];
    for (seed, (group, queries, keys, head_dim, value_dim)) in (0..).zip(sizes) {
        let dims = Dims { batch: 1, heads: 2 * group, kv_heads: 2, queries, keys, head_dim, value_dim };
        for dtype in [Dtype::F16, Dtype::Bf16] {
            for data in Data::ALL {
                let causal = CAUSAL[seed as usize % 3];
                let case = Case::new(seed, data, causal, dtype, dims);
                let in_f32 = case.in_f32();
                let wanted = in_f32.compute(Kernels::available()[0]);
                for count in 1..=3 {
                    let what = format!("{dtype} {data:?} {causal:?} {dims:?}, {count} workers");
                    let options = case.options(WorkerChoice::Exactly(count));
                    let mut kv_bytes = Vec::new();
                    for case in [&case, &in_f32] {
                        let attended = client.attend(&case.operands, &options, &mut |_| {}).await;
                        let attended = attended.unwrap_or_else(|error| panic!("{what}: {error}"));
                        let of_shares = attended.plan.shares.iter().map(|share| share.kv_bytes);
                        kv_bytes.push(of_shares.sum::<u64>());
                        let what = format!("{what}, sent as {}", case.operands.dtype);
                        Answer::from(attended).assert_bits_of(&wanted, &what);
                    }
                    assert_eq!(2 * kv_bytes[0], kv_bytes[1], "{what}: bytes on the workers");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_row_sees_changes_no_bit() {
    // Top-left: the keys behind the last query are never seen. Poison them.
    let dims =
        Dims { batch: 1, heads: 6, kv_heads: 2, queries: 300, keys: 2000, head_dim: 48, value_dim: 40 };
    let case = Case::new(11, Data::Normal, Causal::TopLeft, Dtype::F32, dims);
    let mut poisoned = Case::new(11, Data::Normal, Causal::TopLeft, Dtype::F32, dims);
    let poison = |bytes: &bytes::Bytes, dim: usize, value: f32| {
        let mut bytes = bytes.to_vec();
        for (at, element) in bytes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            if at / dim % 2000 >= 300 {
                *element = value.to_le_bytes();
            }
        }
        bytes::Bytes::from(bytes)
    };
    poisoned.operands.k = poison(&case.operands.k, 48, f32::NAN);
    poisoned.operands.v = poison(&case.operands.v, 40, f32::INFINITY);
    let wanted = case.compute(Kernels::available()[0]);

    let cluster = Cluster::start(3).await;
    let client = cluster.client();
    for count in [1, 2, 3] {
        let mut options = case.options(WorkerChoice::Exactly(count));
        options.allow_non_finite = true;
        let attended = client.attend(&poisoned.operands, &options, &mut |_| {}).await;
        let attended = attended.unwrap_or_else(|error| panic!("{count} workers: {error}"));
        Answer::from(attended).assert_bits_of(&wanted, &format!("{count} workers, unseen keys poisoned"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nightly_big_calls_have_the_same_bits_on_any_number_of_workers() {
    if !nightly("exactness of big calls: up to 64 heads, 1,048,576 keys, 700 queries") {
        return;
    }
    let dims = |batch, heads, kv_heads, queries, keys, head_dim, value_dim| Dims {
        batch,
        heads,
        kv_heads,
        queries,
        keys,
        head_dim,
        value_dim,
    };
    let calls = [
        (Causal::None, dims(1, 64, 1, 1, 1_048_576, 128, 128)),
        (Causal::BottomRight, dims(1, 64, 8, 16, 131_072, 128, 128)),
        (Causal::BottomRight, dims(1, 1, 1, 700, 1_048_576, 64, 64)),
        (Causal::None, dims(1, 8, 2, 700, 65_536, 128, 128)),
        (Causal::None, dims(1, 64, 64, 700, 4096, 64, 64)),
        (Causal::TopLeft, dims(2, 32, 32, 100, 20_011, 80, 96)),
        (Causal::None, dims(1, 16, 2, 7, 1_048_575, 33, 31)),
        (Causal::BottomRight, dims(3, 64, 16, 700, 5000, 255, 17)),
    ];
    let cluster = Cluster::with(mixed_workers()).await;
    let client = cluster.client();
    let mut seen = Seen::default();
    for (i, (causal, dims)) in calls.into_iter().enumerate() {
        let case = Case::new(90_000 + i as u64, Data::Normal, causal, Dtype::F32, dims);
        let what = format!("big call {i}: {causal:?} {dims:?}");
        let wanted = compute(&what, &case);
        check(&what, &client, &case, &wanted, &mut seen).await;
    }
    assert_eq!(seen.workers.len(), WORKERS, "workers that took part: {:?}", seen.workers);
}
