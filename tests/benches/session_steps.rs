//! Appends to resident sessions and their decode steps, over real processes, beside the kernels alone: `cargo bench -p attnd-tests --bench session_steps`.
//!
//! Not a test: figures are printed. Two workers with one thread each, H 32/8, d=128, one layer: a step appends one token and attends over
//! all of them. The time is that of the client library in this process, from the request to the rows. *Kernels* is the same
//! attention over the same rows in this process, on two threads, whose rows are in memory of its own. Arguments: lengths, and which of
//! `appends`, `steps` and `batches` to measure; all by default.

#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code, reason = "the tests use the rest of it")]
#[path = "../support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use attnd_client::session::{BatchStep, OpenOptions, QueryOptions, Session, Sessions};
use attnd_client::{AttendOptions, Causal, Dims, Dtype};
use attnd_kernel::slot::{N_SLOTS, Node, PAGE_KEYS};
use attnd_kernel::{AttnShape, Compute, GroupCall, Kernels, KvHead, Operator, Side, attend_node};
use bytes::Bytes;
use half::bf16;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rayon::prelude::*;

use support::cluster::Cluster;

const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const DIM: usize = 128;
/// Tokens of one append that fills a session.
const PIECE: usize = 8192;

fn load() -> String {
    std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim().to_owned()
}

fn random(rng: &mut SmallRng, rows: usize, dtype: Dtype) -> Bytes {
    let elements = (0..rows * DIM).map(|_| rng.random_range(-1.0..1.0_f32));
    let bytes: Vec<u8> = match dtype {
        Dtype::F32 => elements.flat_map(f32::to_le_bytes).collect(),
        Dtype::Bf16 => elements.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
        Dtype::F16 => unreachable!("not measured"),
    };
    bytes.into()
}

fn options() -> QueryOptions {
    let attend = AttendOptions { causal: Causal::BottomRight, ..AttendOptions::default() };
    QueryOptions { attend, ..QueryOptions::default() }
}

fn percentile(sorted: &[Duration], of_hundred: usize) -> f64 {
    sorted[(sorted.len() - 1) * of_hundred / 100].as_secs_f64() * 1e3
}

async fn open(sessions: &Sessions, dtype: Dtype) -> Session {
    sessions.open(OpenOptions::new(1, HEADS, KV_HEADS, DIM, dtype)).await.expect("a session")
}

/// Appends random rows up to `len` tokens; returns bytes and seconds.
async fn fill(session: &mut Session, len: usize, dtype: Dtype, rng: &mut SmallRng) -> (usize, f64) {
    let (mut bytes, mut seconds) = (0, 0.0);
    let mut at = session.len(0) as usize;
    while at < len {
        let tokens = PIECE.min(len - at);
        let (k, v) = (random(rng, KV_HEADS * tokens, dtype), random(rng, KV_HEADS * tokens, dtype));
        bytes += k.len() + v.len();
        let begun = Instant::now();
        session.append(0, k, v).await.expect("appended");
        seconds += begun.elapsed().as_secs_f64();
        at += tokens;
    }
    (bytes, seconds)
}

/// The kernels of one step over `keys` tokens, median of some, in milliseconds.
fn kernels_alone(keys: usize, dtype: Dtype, rng: &mut SmallRng) -> f64 {
    let kernels = Kernels::from_env().expect("an instruction set of this CPU");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("two threads");
    let dims = Dims {
        batch: 1,
        heads: HEADS as u64,
        kv_heads: KV_HEADS as u64,
        queries: 1,
        keys: keys as u64,
        head_dim: DIM as u64,
        value_dim: DIM as u64,
    };
    let shape = AttnShape::new(dims).unwrap();
    let operator = Operator::plain((DIM as f32).sqrt().recip(), Causal::BottomRight);
    let groups: Vec<KvHead> = (0..KV_HEADS)
        .map(|_| {
            let mut kv = KvHead::with_storage(keys, DIM, DIM, 0..N_SLOTS, dtype.into()).expect("memory");
            for first in (0..keys).step_by(PAGE_KEYS) {
                let rows = PAGE_KEYS.min(keys - first);
                kv.write_k(first / PAGE_KEYS, &random(rng, rows, dtype), dtype, false).unwrap();
                kv.write_v(first / PAGE_KEYS, &random(rng, rows, dtype), dtype, false).unwrap();
            }
            kv
        })
        .collect();
    let q: Vec<f32> = (0..HEADS / KV_HEADS * DIM).map(|_| rng.random_range(-1.0..1.0)).collect();
    let compute = kernels.effective(Compute::F32, dtype.into()).unwrap();
    let mut times: Vec<Duration> = (0..200)
        .map(|_| {
            let begun = Instant::now();
            pool.install(|| {
                groups.par_iter().enumerate().for_each(|(group, kv)| {
                    let (shape, operator, side) = (shape, &operator, Side::default());
                    let call = GroupCall { shape, operator, group, q: &q, kv, side, compute };
                    let (partial, finite) = attend_node(kernels, &call, Node::ROOT, 0..1);
                    assert!(finite.is_ok());
                    std::hint::black_box(partial);
                });
            });
            begun.elapsed()
        })
        .collect();
    times.sort();
    percentile(&times, 50)
}

async fn steps(sessions: &Sessions, len: usize, dtype: Dtype, rng: &mut SmallRng) {
    let mut session = open(sessions, dtype).await;
    let (bytes, seconds) = fill(&mut session, len, dtype, rng).await;
    let options = options();
    let rounds = if len > 50_000 { 60 } else { 400 };
    let mut times = Vec::with_capacity(rounds);
    for round in 0..rounds + 20 {
        let row = |rng: &mut SmallRng, heads| random(rng, heads, dtype);
        let (k, v, q) = (row(rng, KV_HEADS), row(rng, KV_HEADS), row(rng, HEADS));
        let begun = Instant::now();
        let stepped = session.step(0, k, v, q, &options).await.expect("a step");
        let took = begun.elapsed();
        assert_eq!(stepped.attended.context.len(), HEADS * DIM);
        if round >= 20 {
            times.push(took);
        }
    }
    session.close().await.expect("closed");
    times.sort();
    let kernels = kernels_alone(len, dtype, rng);
    println!(
        "T={len:>7} {dtype:>4}: step p50 {:.3} ms, p90 {:.3}, p99 {:.3}; kernels alone {kernels:.3}, beyond {:.3}; filled {:.0} MiB at {:.2} GB/s",
        percentile(&times, 50),
        percentile(&times, 90),
        percentile(&times, 99),
        percentile(&times, 50) - kernels,
        bytes as f64 / f64::from(1 << 20),
        bytes as f64 / seconds * 1e-9,
    );
}

/// Appends of 128 MiB in one call to sessions that are opened for it and closed, so that all but the first find memory which the system
/// has given out before.
async fn appends(sessions: &Sessions, replicas: usize, rng: &mut SmallRng) {
    const TOKENS: usize = 16_384;
    let dtype = Dtype::F32;
    let (k, v) = (random(rng, KV_HEADS * TOKENS, dtype), random(rng, KV_HEADS * TOKENS, dtype));
    let bytes = (k.len() + v.len()) as f64;
    let mut times = Vec::new();
    for _ in 0..7 {
        let mut open = OpenOptions::new(1, HEADS, KV_HEADS, DIM, dtype);
        (open.spec.replicas, open.spec.acks, open.spec.allow_same_host) = (replicas, replicas, true);
        let mut session = sessions.open(open).await.expect("a session");
        let begun = Instant::now();
        session.append(0, k.clone(), v.clone()).await.expect("appended");
        times.push(begun.elapsed());
        session.close().await.expect("closed");
    }
    let first = times[0].as_secs_f64();
    times.sort();
    println!(
        "append of {:.0} MiB, {replicas} replicas: {:.2} GB/s, the first {:.2}",
        bytes / f64::from(1 << 20),
        bytes / percentile(&times, 50) * 1e-6,
        bytes / first * 1e-9,
    );
}

/// What this machine does with memory: copies what is in it, and copies to what is new, which the system gives out page by page.
fn memory() {
    const BYTES: usize = 64 << 20;
    let from = vec![1_u8; BYTES];
    let mut to = vec![0_u8; BYTES];
    let mut speeds = [Vec::new(), Vec::new()];
    for _ in 0..5 {
        let begun = Instant::now();
        std::hint::black_box(&mut to).copy_from_slice(std::hint::black_box(&from));
        speeds[0].push(begun.elapsed());
        let begun = Instant::now();
        std::hint::black_box(from.clone());
        speeds[1].push(begun.elapsed());
    }
    let [copy, fresh] = speeds.map(|mut times| {
        times.sort();
        BYTES as f64 / percentile(&times, 50) * 1e-6
    });
    println!("a copy in memory: {copy:.1} GB/s, to new memory: {fresh:.1}");
}

/// Steps of 16 sessions, together and one by one.
async fn batches(sessions: &Sessions, len: usize, rng: &mut SmallRng) {
    let dtype = Dtype::F32;
    let mut open_ones = Vec::new();
    for _ in 0..16 {
        let mut session = open(sessions, dtype).await;
        fill(&mut session, len, dtype, rng).await;
        open_ones.push(session);
    }
    let options = options();
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..40 {
        let row = |rng: &mut SmallRng, heads| random(rng, heads, dtype);
        let rows: Vec<[Bytes; 3]> =
            (0..16).map(|_| [row(rng, KV_HEADS), row(rng, KV_HEADS), row(rng, HEADS)]).collect();
        let begun = Instant::now();
        let mut steps: Vec<BatchStep<'_>> = open_ones
            .iter_mut()
            .zip(rows.clone())
            .map(|(session, [k, v, q])| BatchStep { session, layer: 0, k, v, q, options: &options })
            .collect();
        assert!(sessions.step_batch(&mut steps).await.into_iter().all(|stepped| stepped.is_ok()));
        times[0].push(begun.elapsed());
        let begun = Instant::now();
        for (session, [k, v, q]) in open_ones.iter_mut().zip(rows) {
            session.step(0, k, v, q, &options).await.expect("a step");
        }
        times[1].push(begun.elapsed());
    }
    for session in open_ones {
        session.close().await.expect("closed");
    }
    times.iter_mut().for_each(|times| times.sort());
    let [together, one_by_one] = times.map(|times| percentile(&times, 50));
    let bytes = (16 * KV_HEADS * len * 2 * DIM * 4) as f64;
    println!(
        "16 sessions of T={len}: together {together:.3} ms ({:.1} GB/s of K and V), one by one {one_by_one:.3} ms: {:.2} times",
        bytes / together * 1e-6,
        one_by_one / together
    );
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let lens: Vec<usize> = arguments.iter().filter_map(|arg| arg.parse().ok()).collect();
    let named = |part: &str| arguments.iter().any(|arg| arg == part);
    let all = !["appends", "steps", "batches"].into_iter().any(named);
    let lens = if lens.is_empty() { vec![1024, 8192, 32_768, 131_072] } else { lens };
    println!("load before: {}", load());
    let cluster = Cluster::start(2).await;
    let sessions = cluster.client().sessions();
    let mut rng = SmallRng::seed_from_u64(1);
    memory();
    if all || named("appends") {
        for replicas in [1, 2] {
            appends(&sessions, replicas, &mut rng).await;
        }
    }
    if all || named("steps") {
        for len in &lens {
            steps(&sessions, *len, Dtype::F32, &mut rng).await;
        }
        if let Some(longest) = lens.iter().max() {
            steps(&sessions, *longest, Dtype::Bf16, &mut rng).await;
        }
    }
    if all || named("batches") {
        for len in [128, 8192] {
            batches(&sessions, len, &mut rng).await;
        }
    }
    println!("load after: {}", load());
}
