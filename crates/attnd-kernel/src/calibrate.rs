//! How fast this machine could multiply and add, measured now: what a planner weighs workers by and what a benchmark
//! divides by.

use std::time::{Duration, Instant};

use crate::dispatch::{FLOP_PER_ROUND, Kernels};

impl Kernels {
    /// Peak f32 multiply-add rate of all threads of a pool, in GFLOP/s. Takes about `span` on every thread.
    pub fn peak_gflops(&self, pool: &rayon::ThreadPool, span: Duration) -> f64 {
        pool.broadcast(|_thread| self.peak_of_this_thread(span)).into_iter().sum()
    }

    fn peak_of_this_thread(&self, span: Duration) -> f64 {
        const ROUNDS: u64 = 20_000;
        let began = Instant::now();
        let mut best = f64::INFINITY;
        // At least two windows: the first one may still be raising the clock.
        for window in 0.. {
            if window >= 2 && began.elapsed() >= span {
                break;
            }
            let start = Instant::now();
            std::hint::black_box(self.fma_loop(std::hint::black_box(ROUNDS)));
            best = best.min(start.elapsed().as_secs_f64());
        }
        (ROUNDS * FLOP_PER_ROUND) as f64 / best * 1e-9
    }
}
