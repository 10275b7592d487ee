//! What score functions cost beside a dot product, and what a linear layer reaches of the peak.
//!
//! ```text
//! cargo bench -p attnd-kernel --bench scores
//! cargo bench -p attnd-kernel --bench scores -- additive linear
//! ```
//!
//! One thread, one head, f32, d = 64, on each ISA. A function's cost is the median, over rounds in which each function has one
//! turn, of the time of a call over that of `scaled_dot` in the same round; keys are transformed before, as they are once where
//! they are kept. A layer's rate is that of its products. Arguments choose what is measured by a part of its name.

// A report is what this program is for; the operands are its own.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use attnd_kernel::slot::{N_SLOTS, Node, PAGE_KEYS, n_pages};
use attnd_kernel::{
    AttnShape, Causal, Compute, Dims, Dtype, Effective, FUNCTIONS, Function, GroupCall, Isa, Kernels, KvHead,
    Linear, Operator, OperatorParts, Score, Side, Symbol, Tensor, attend_node,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const DIM: u64 = 64;
const TOKENS: u64 = 1024;
const ROUNDS: usize = 11;

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str()));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for kernels in Kernels::available().into_iter().filter(|kernels| kernels.isa() != Isa::Portable) {
        let names = FUNCTIONS.iter().map(|function| function.name);
        let names: Vec<&str> = names.filter(|name| *name == "scaled_dot" || is_wanted(name)).collect();
        if names.len() > 1 {
            pool.install(|| functions(kernels, &names));
        }
        for (inputs, outputs) in [(64, 64), (512, 64), (512, 512), (1024, 1024)] {
            let name = format!("linear {inputs} to {outputs}");
            if is_wanted(&name) {
                let peak = kernels.peak_gflops(&pool, Compute::F32, Duration::from_millis(30));
                let rate = pool.install(|| layer(kernels, inputs, outputs));
                let share = 100.0 * rate / peak;
                println!("{} {name:<24} {rate:>8.1} GFLOP/s  {share:>5.1} % of the peak", kernels.isa());
            }
        }
    }
}

/// A call with a score function, and what it reads.
struct Call {
    name: &'static str,
    shape: AttnShape,
    operator: Operator,
    q: Vec<f32>,
    kv: KvHead,
    previous: Option<Vec<f32>>,
}

impl Call {
    fn new(function: &'static Function, kernels: &Kernels) -> Self {
        let (queries, keys, head_dim, value_dim) = (TOKENS, TOKENS, DIM, DIM);
        let dims = Dims { batch: 1, heads: 1, kv_heads: 1, queries, keys, head_dim, value_dim };
        let shape = AttnShape::new(dims).unwrap();
        let mut random = StdRng::seed_from_u64(7);
        let mut uniform = |n: usize, lowest: f32| -> Vec<f32> {
            (0..n).map(|_| random.random_range(lowest..1.0)).collect()
        };
        let size = |symbol: &Symbol| match symbol {
            Symbol::One | Symbol::Batch | Symbol::Heads | Symbol::KvHeads => 1,
            Symbol::BothDims => 2 * DIM as usize,
            Symbol::Queries | Symbol::Positions => TOKENS as usize,
            Symbol::QueryDim | Symbol::KeyDim | Symbol::Units => DIM as usize,
            Symbol::Filters => 4,
            Symbol::Taps => 31,
        };
        let tensors = function.parameters.iter().map(|parameter| {
            let shape: Vec<usize> = parameter.shapes[0].iter().map(size).collect();
            let lowest = if shape == [1] { 0.1 } else { -1.0 };
            let values = uniform(shape.iter().product(), lowest).into();
            Tensor { name: parameter.name.to_owned(), shape, values }
        });
        let score = Score::new(function.name, tensors.collect()).unwrap();
        let scale = function.default_scale(&shape);
        let operator =
            Operator::new(OperatorParts { score, ..OperatorParts::plain(scale, Causal::None) }, &shape)
                .unwrap();
        let (dim, key_dim) = (DIM as usize, operator.key_dim(&shape));
        let mut kv = KvHead::new(TOKENS as usize, key_dim, dim, 0..N_SLOTS).unwrap();
        let bytes = |x: &[f32]| -> Vec<u8> { x.iter().flat_map(|x| x.to_le_bytes()).collect() };
        for page in 0..n_pages(TOKENS as usize) {
            let (k, v) = (uniform(PAGE_KEYS * dim, -1.0), uniform(PAGE_KEYS * dim, -1.0));
            let mut rows = vec![0.0; PAGE_KEYS * key_dim];
            operator.key_rows(kernels, &shape, 0, page * PAGE_KEYS..(page + 1) * PAGE_KEYS, &k, &mut rows);
            kv.write_k(page, &bytes(&rows), Dtype::F32, false).unwrap();
            kv.write_v(page, &bytes(&v), Dtype::F32, false).unwrap();
        }
        let previous = operator.reads_previous().then(|| uniform((TOKENS * TOKENS) as usize, 0.0));
        Self { previous, name: function.name, shape, operator, q: uniform((TOKENS * DIM) as usize, -1.0), kv }
    }

    fn seconds(&self, kernels: &Kernels) -> f64 {
        let previous: Vec<&[f32]> = self.previous.iter().map(Vec::as_slice).collect();
        let (side, compute) = (Side { previous: &previous, ..Side::default() }, Effective::F32);
        let Self { shape, operator, q, kv, .. } = self;
        let call = GroupCall { shape: *shape, operator, group: 0, q, kv, side, compute };
        let start = Instant::now();
        black_box(attend_node(kernels, &call, Node::ROOT, 0..TOKENS as usize).1.is_ok());
        start.elapsed().as_secs_f64()
    }
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

/// Times the functions in turns; a line of the report for each.
fn functions(kernels: &Kernels, names: &[&str]) {
    let calls: Vec<Call> =
        names.iter().map(|name| Call::new(Function::named(name).unwrap(), kernels)).collect();
    let rounds: Vec<Vec<f64>> =
        (0..=ROUNDS).map(|_| calls.iter().map(|call| call.seconds(kernels)).collect()).collect();
    let dot = calls.iter().position(|call| call.name == "scaled_dot").unwrap();
    for (i, call) in calls.iter().enumerate() {
        // The first round warms up.
        let ratio = median(rounds[1..].iter().map(|round| round[i] / round[dot]).collect());
        let milliseconds = 1e3 * median(rounds[1..].iter().map(|round| round[i]).collect());
        println!("{} {:<24} {milliseconds:>8.2} ms  {ratio:>5.2} times scaled_dot", kernels.isa(), call.name);
    }
}

/// The rate of a layer over rows of a few blocks.
fn layer(kernels: &Kernels, inputs: usize, outputs: usize) -> f64 {
    let rows = 960;
    let mut random = StdRng::seed_from_u64(8);
    let mut uniform = |n: usize| -> Vec<f32> { (0..n).map(|_| random.random_range(-1.0..1.0)).collect() };
    let layer = Linear::new(&uniform(outputs * inputs), [outputs, inputs], None).unwrap();
    let (x, mut y) = (uniform(rows * inputs), vec![0.0; rows * outputs]);
    let seconds = (0..=ROUNDS).map(|_| {
        let start = Instant::now();
        layer.apply(kernels, black_box(&x), &mut y);
        black_box(&y);
        start.elapsed().as_secs_f64()
    });
    let seconds: Vec<f64> = seconds.collect();
    2.0 * (rows * inputs * outputs) as f64 / median(seconds[1..].to_vec()) / 1e9
}
