//! One call end to end over real processes, against this machine's own limit: `cargo bench -p attnd-tests`.
//!
//! Not a test: figures are printed, only the result is checked. Two workers with one thread each, H=8 d=128 T=4096 f32
//! without a mask; the time is that of the client library in this process, from call to answer. The limit is the
//! multiply-add peak of two threads, calibrated before and after. `ATTND_ISA` chooses the kernels of the workers and of
//! the calibration.

#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code, reason = "the tests use the rest of it")]
#[path = "../support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use attnd_client::{Attended, WorkerChoice};
use attnd_kernel::{Compute, Dims, Kernels};

use support::cases::{Answer, Case};
use support::cluster::{Cluster, WorkerSpec};

const CALLS: usize = 7;

fn load() -> String {
    std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim().to_owned()
}

fn peak_of_two_threads(kernels: &Kernels) -> f64 {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("two threads");
    kernels.peak_gflops(&pool, Compute::F32, Duration::from_millis(300))
}

#[tokio::main]
async fn main() {
    println!("load before: {}", load());
    let dims =
        Dims { batch: 1, heads: 8, kv_heads: 8, queries: 4096, keys: 4096, head_dim: 128, value_dim: 128 };
    let case = Case::plain(0, dims);
    let kernels = Kernels::from_env().expect("an instruction set of this CPU");
    let wanted = case.compute(kernels);
    let worker = WorkerSpec { isa: Some(kernels.isa()), ..WorkerSpec::default() };
    let mut cluster = Cluster::with(vec![worker; 2]).await;
    let idle = cluster.coordinator().peak_memory();
    let client = cluster.client();
    let options = case.options(WorkerChoice::Exactly(2));

    let before = peak_of_two_threads(kernels);
    let mut calls: Vec<(f64, Attended)> = Vec::new();
    // The first call warms up connections and pages.
    for call in 0..=CALLS {
        let begun = Instant::now();
        let attended = client.attend(&case.operands, &options, &mut |_| {}).await.expect("an answer");
        let seconds = begun.elapsed().as_secs_f64();
        if call > 0 {
            calls.push((seconds, attended));
        }
    }
    let after = peak_of_two_threads(kernels);
    println!("load after: {}", load());

    calls.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (fastest, slowest) = (calls[0].0, calls[CALLS - 1].0);
    let (seconds, attended) = calls.swap_remove(CALLS / 2);
    let (rate, peak) = (case.flops() / seconds * 1e-9, before.max(after));
    println!("{}", attended.plan.reason);
    println!("peak of two threads, {}: {before:.0} GFLOP/s before, {after:.0} after", kernels.isa());
    println!(
        "end to end: {:.1} ms, median of {CALLS} ({:.1} to {:.1}) = {rate:.0} GFLOP/s = {:.0} % of the peak",
        seconds * 1e3,
        fastest * 1e3,
        slowest * 1e3,
        rate / peak * 100.0
    );
    let t = attended.timings;
    println!(
        "of that at the coordinator: plan {:.2} ms, scatter {:.1}, compute {:.1}, gather {:.1}, merge {:.1}, total {:.1}",
        t.plan * 1e3,
        t.scatter * 1e3,
        t.compute * 1e3,
        t.gather * 1e3,
        t.merge * 1e3,
        t.total * 1e3
    );
    println!(
        "coordinator's peak memory: {:.1} MiB, {:.1} MiB before the first call; operands {:.1} MiB",
        cluster.coordinator().peak_memory() as f64 / f64::from(1 << 20),
        idle as f64 / f64::from(1 << 20),
        case.bytes() as f64 / f64::from(1 << 20)
    );
    Answer::from(attended).assert_bits_of(&wanted, "the result");
}
