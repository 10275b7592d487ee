//! Fractions of this machine's own limit, measured in the same run: `cargo bench -p attnd-kernel [-- ISA...]`.
//!
//! Not a test: figures are printed, nothing is asserted. One thread, FMA peak calibrated before and after each shape,
//! medians of repeated calls.

#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::time::{Duration, Instant};

use attnd_kernel::slot::{N_SLOTS, Node, keys_in_page, n_pages};
use attnd_kernel::{AttnShape, Causal, Dims, Dtype, GroupCall, Kernels, KvHead, attend_node};
use rand::{RngExt, SeedableRng, rngs::SmallRng};

struct Case {
    name: &'static str,
    heads: u64,
    kv_heads: u64,
    queries: u64,
    keys: u64,
    dim: u64,
    causal: Causal,
}

fn main() {
    let prefill = |name, queries, dim, causal| Case {
        name,
        heads: 1,
        kv_heads: 1,
        queries,
        keys: queries,
        dim,
        causal,
    };
    let cases = [
        prefill("prefill T=2048 d=128", 2048, 128, Causal::None),
        prefill("prefill T=2048 d=64", 2048, 64, Causal::None),
        prefill("prefill T=4096 d=128", 4096, 128, Causal::None),
        prefill("causal  T=4096 d=128", 4096, 128, Causal::BottomRight),
        Case {
            name: "causal  T=4096 d=128 G=4",
            heads: 4,
            kv_heads: 1,
            queries: 4096,
            keys: 4096,
            dim: 128,
            causal: Causal::BottomRight,
        },
        Case {
            name: "decode  T=131072 d=128 G=1",
            heads: 1,
            kv_heads: 1,
            queries: 1,
            keys: 131_072,
            dim: 128,
            causal: Causal::None,
        },
        Case {
            name: "decode  T=131072 d=128 G=4",
            heads: 4,
            kv_heads: 1,
            queries: 1,
            keys: 131_072,
            dim: 128,
            causal: Causal::None,
        },
    ];
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load before: {}", load.trim());
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for kernels in Kernels::available() {
        let isa = kernels.isa().name();
        if !wanted.is_empty() && !wanted.iter().any(|w| w == isa) || (wanted.is_empty() && isa == "portable")
        {
            continue;
        }
        for case in &cases {
            run(case, kernels, &pool);
        }
    }
}

fn run(case: &Case, kernels: &Kernels, pool: &rayon::ThreadPool) {
    let shape = AttnShape::new(Dims {
        batch: 1,
        heads: case.heads,
        kv_heads: case.kv_heads,
        queries: case.queries,
        keys: case.keys,
        head_dim: case.dim,
        value_dim: case.dim,
    })
    .unwrap();
    let mut rng = SmallRng::seed_from_u64(7);
    let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-1.7..1.7)).collect() };
    let d = shape.head_dim();
    let q = random(shape.group_size() * shape.n_queries() * d);
    let mut kv = KvHead::new(shape.n_keys(), d, d, 0..N_SLOTS).unwrap();
    for page in 0..n_pages(shape.n_keys()) {
        let rows = random(keys_in_page(page, shape.n_keys()) * d);
        let bytes: Vec<u8> = rows.iter().flat_map(|x| x.to_le_bytes()).collect();
        kv.write_k(page, &bytes, Dtype::F32, true).unwrap();
        kv.write_v(page, &bytes, Dtype::F32, true).unwrap();
    }
    let call = GroupCall { shape, scale: (d as f32).sqrt().recip(), causal: case.causal, q: &q, kv: &kv };
    let span = Duration::from_millis(30);
    let mut peak = kernels.peak_gflops(pool, span);
    let mut seconds = Vec::new();
    let began = Instant::now();
    while seconds.len() < 3 || (began.elapsed() < Duration::from_millis(1500) && seconds.len() < 40) {
        let start = Instant::now();
        let result = pool.install(|| attend_node(kernels, &call, Node::ROOT, 0..shape.n_queries()));
        std::hint::black_box(&result);
        seconds.push(start.elapsed().as_secs_f64());
    }
    peak = peak.max(kernels.peak_gflops(pool, span));
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let seen: usize = (0..shape.n_queries()).map(|i| case.causal.visible(i, &shape).len()).sum();
    let flop = 4.0 * shape.n_heads() as f64 * seen as f64 * d as f64;
    let bytes = 2.0 * (shape.n_keys() * d * 4) as f64;
    println!(
        "{:9} {:28} {:8.2} ms  {:7.1} GFLOP/s = {:.3} of peak {:6.1}   KV {:5.1} GB/s   best {:.3}",
        kernels.isa().name(),
        case.name,
        median * 1e3,
        flop / median * 1e-9,
        flop / median * 1e-9 / peak,
        peak,
        bytes / median * 1e-9,
        flop / seconds[0] * 1e-9 / peak,
    );
}
