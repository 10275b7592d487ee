//! What looking at weights costs: the second pass and the plain call that it follows, in turns.
//!
//! ```text
//! cargo bench -p attnd-kernel --bench second_pass
//! cargo bench -p attnd-kernel --bench second_pass -- 'T=16384' 'avx2'
//! ```
//!
//! One thread, one head, causal, f32. A cost is the median over rounds of the second pass's time over the plain call's of the same
//! round, with the lowest and the highest. Arguments choose the cases whose names contain all of them.

// A report is what this program is for; the operands are its own.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::time::Instant;

use attnd_kernel::slot::{Node, PAGE_KEYS, n_pages};
use attnd_kernel::{
    AttnShape, Causal, Dims, Dtype, Effective, GroupCall, Kernels, KvHead, Operator, Outputs, OutputsParts,
    RowSums, Side, attend_node, inspect_node,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Fewest rounds.
const ROUNDS: usize = 3;
/// Rounds are added until they have taken this long.
const SECONDS: f64 = 4.0;

/// What is looked at.
fn outputs() -> [(&'static str, OutputsParts); 6] {
    let none = OutputsParts::default();
    [
        ("heatmap 512x512", OutputsParts { heatmap: Some((512, 512)), ..none.clone() }),
        ("top-8", OutputsParts { top_k: 8, ..none.clone() }),
        ("top-64", OutputsParts { top_k: 64, ..none.clone() }),
        ("mass by 256", OutputsParts { mass_block: NonZeroUsize::new(256), ..none.clone() }),
        ("max", OutputsParts { max_score: true, ..none.clone() }),
        ("entropy and distance", OutputsParts { entropy: true, distance: true, ..none }),
    ]
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    println!("{:<24} {:<22} {:>6} {:>12}   second pass / plain call", "", "", "rounds", "plain call");
    for kernels in Kernels::available().iter().filter(|kernels| kernels.isa() != attnd_kernel::Isa::Portable)
    {
        for tokens in [16_384, 65_536] {
            for dim in [64, 128] {
                let name = format!("{} T={tokens} d={dim}", kernels.isa());
                if wanted.iter().all(|part| name.contains(part.as_str())) {
                    pool.install(|| measure(&name, kernels, tokens, dim));
                }
            }
        }
    }
}

/// Runs the plain call and each second pass in turns; prints a line for each.
fn measure(name: &str, kernels: &Kernels, tokens: u64, dim: u64) {
    let dims = Dims {
        batch: 1,
        heads: 1,
        kv_heads: 1,
        queries: tokens,
        keys: tokens,
        head_dim: dim,
        value_dim: dim,
    };
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
    let operator = Operator::plain(1.0 / (dim as f32).sqrt(), Causal::TopLeft);
    let call = GroupCall {
        shape,
        operator: &operator,
        group: 0,
        q: &q,
        kv: &kv,
        side: Side::default(),
        compute: Effective::F32,
    };
    let attend = || {
        let start = Instant::now();
        let (partial, result) = attend_node(kernels, &call, Node::ROOT, 0..shape.n_queries());
        let seconds = start.elapsed().as_secs_f64();
        result.unwrap();
        (partial, seconds)
    };
    let (partial, _) = attend();
    let sums = RowSums { m: &partial.m, l: &partial.l };
    let inspect = |parts: &OutputsParts| {
        let wanted = Outputs::new(parts.clone(), &shape, &operator).unwrap();
        let start = Instant::now();
        let report =
            inspect_node(kernels, &call, sums, &wanted, Node::ROOT, 0..shape.n_queries(), &mut |_tile| {});
        let seconds = start.elapsed().as_secs_f64();
        black_box(report);
        seconds
    };
    let outputs = outputs();
    let (mut plain, mut ratios) = (Vec::new(), vec![Vec::new(); outputs.len()]);
    while plain.len() < ROUNDS || plain.iter().sum::<f64>() < SECONDS {
        let (_, seconds) = attend();
        plain.push(seconds);
        for ((_, parts), ratios) in outputs.iter().zip(&mut ratios) {
            ratios.push(inspect(parts) / seconds);
        }
    }
    let rounds = plain.len();
    for ((what, _), ratios) in outputs.iter().zip(&mut ratios) {
        ratios.sort_by(f64::total_cmp);
        plain.sort_by(f64::total_cmp);
        println!(
            "{name:<24} {what:<22} {rounds:>6} {:>9.1} ms   {:.3} ({:.3} to {:.3})",
            1e3 * plain[rounds / 2],
            ratios[rounds / 2],
            ratios[0],
            ratios[rounds - 1],
        );
    }
}
