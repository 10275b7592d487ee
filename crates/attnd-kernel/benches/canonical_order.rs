//! What the canonical order of arithmetic costs: the same calls in it and in the freest order, in turns.
//!
//! ```text
//! cargo bench -p attnd-kernel --features free-order --bench canonical_order
//! cargo bench -p attnd-kernel --features free-order --bench canonical_order -- 'avx512 prefill'
//! ```
//!
//! One thread, one head, f32. Both sides do the same outer work (`attend_node` and `finish`); the entries that compute a
//! block of rows differ. A cost is the median over pairs of neighbouring runs of canonical time over free time, less one,
//! with its 10th and 90th percentile; each side is first in every second pair. Arguments choose the cases whose names contain
//! one of them.

// A report is what this program is for; the operands are its own.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::time::Instant;

use attnd_kernel::slot::{Node, PAGE_KEYS, n_pages};
use attnd_kernel::{
    AttnShape, Causal, Dims, Dtype, Effective, GroupCall, Kernels, KvHead, Operator, Side, attend_node,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Fewest pairs of runs.
const PAIRS: usize = 25;
/// Pairs are added until they have taken this long.
const SECONDS: f64 = 3.0;
/// Keys and values of a decode case, in bytes.
const DECODE_BYTES: u64 = 256 << 20;

struct Case {
    name: String,
    heads: u64,
    queries: u64,
    keys: u64,
    dim: u64,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for tokens in [2048, 8192] {
        for dim in [128, 64] {
            let name = format!("prefill T={tokens} d={dim}");
            cases.push(Case { name, heads: 1, queries: tokens, keys: tokens, dim });
        }
    }
    for group in [1, 4] {
        for dim in [128, 64] {
            let keys = DECODE_BYTES / (4 * 2 * dim);
            let name = format!("decode G={group} d={dim}");
            cases.push(Case { name, heads: group, queries: 1, keys, dim });
        }
    }
    cases
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    println!("{:<28} {:>6} {:>11} {:>11}   cost of the canonical order", "", "pairs", "canonical", "free");
    for kernels in Kernels::available() {
        let Some(free) = Kernels::in_free_order(kernels.isa()) else { continue };
        for case in cases() {
            let name = format!("{} {}", kernels.isa(), case.name);
            if wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str())) {
                println!("{name:<28} {}", pool.install(|| measure(&case, kernels, free)));
            }
        }
    }
}

/// Runs both sides in turns; a line of the report.
fn measure(case: &Case, canonical: &Kernels, free: &Kernels) -> String {
    let Case { heads, queries, keys, dim, .. } = *case;
    let dims = Dims { batch: 1, heads, kv_heads: 1, queries, keys, head_dim: dim, value_dim: dim };
    let shape = AttnShape::new(dims).unwrap();
    let mut random = StdRng::seed_from_u64(7);
    let mut uniform = |n: usize| -> Vec<f32> { (0..n).map(|_| random.random_range(-1.7..1.7)).collect() };
    let d = shape.head_dim();
    let q = uniform(shape.q_elements() as usize);
    let mut kv = KvHead::new(shape.n_keys(), d, d, 0..64).unwrap();
    for page in 0..n_pages(shape.n_keys()) {
        let mut rows =
            || -> Vec<u8> { uniform(PAGE_KEYS * d).iter().flat_map(|word| word.to_le_bytes()).collect() };
        kv.write_k(page, &rows(), Dtype::F32, true).unwrap();
        kv.write_v(page, &rows(), Dtype::F32, true).unwrap();
    }
    let scale = 1.0 / (dim as f32).sqrt();
    let operator = Operator::plain(scale, Causal::None);
    let call = GroupCall {
        shape,
        operator: &operator,
        group: 0,
        q: &q,
        kv: &kv,
        side: Side::default(),
        compute: Effective::F32,
    };
    let run = |kernels: &Kernels| -> f64 {
        let start = Instant::now();
        let (partial, result) = attend_node(kernels, &call, Node::ROOT, 0..shape.n_queries());
        let finished = partial.finish(kernels);
        let seconds = start.elapsed().as_secs_f64();
        result.unwrap();
        black_box(finished);
        seconds
    };
    let (mut of_canonical, mut of_free, mut costs) = (Vec::new(), Vec::new(), Vec::new());
    run(canonical);
    run(free);
    while costs.len() < PAIRS || of_canonical.iter().chain(&of_free).sum::<f64>() < SECONDS {
        let (canonical, free) = if costs.len().is_multiple_of(2) {
            let first = run(canonical);
            (first, run(free))
        } else {
            let first = run(free);
            (run(canonical), first)
        };
        of_canonical.push(canonical);
        of_free.push(free);
        costs.push(100.0 * (canonical / free - 1.0));
    }
    format!(
        "{:>6} {:>8.2} ms {:>8.2} ms   {:+.2} % ({:+.2} to {:+.2})",
        costs.len(),
        1e3 * quantile(&mut of_canonical, 0.5),
        1e3 * quantile(&mut of_free, 0.5),
        quantile(&mut costs, 0.5),
        quantile(&mut costs, 0.1),
        quantile(&mut costs, 0.9),
    )
}

/// The value below which a part of all lies.
fn quantile(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * part).round() as usize]
}
