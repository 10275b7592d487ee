//! What this machine can do, measured now: multiply and add, read memory, count cycles. What a planner weighs workers
//! by and what a benchmark divides by.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::buffer::{Buffer, OutOfMemory};
use crate::compute::Compute;
use crate::dispatch::{FLOP_PER_ROUND, Kernels};

impl Kernels {
    /// Peak rate of multiply-adds of all threads of a pool, in GFLOP/s: of f32, or of bf16 dot products. Takes about `span`
    /// on every thread.
    ///
    /// # Panics
    /// If these kernels don't have such products (see [`Self::effective`]), or they are integers, which no case needs yet.
    pub fn peak_gflops(&self, pool: &rayon::ThreadPool, compute: Compute, span: Duration) -> f64 {
        pool.broadcast(|_thread| self.peak_of_this_thread(compute, span)).into_iter().sum()
    }

    fn peak_of_this_thread(&self, compute: Compute, span: Duration) -> f64 {
        const ROUNDS: u64 = 20_000;
        let began = Instant::now();
        let mut best = f64::INFINITY;
        // At least two windows: the first one may still be raising the clock.
        for window in 0.. {
            if window >= 2 && began.elapsed() >= span {
                break;
            }
            let start = Instant::now();
            std::hint::black_box(self.peak_loop(compute, std::hint::black_box(ROUNDS)));
            best = best.min(start.elapsed().as_secs_f64());
        }
        let at_once = if compute == Compute::Bf16 { 2 } else { 1 };
        (ROUNDS * FLOP_PER_ROUND * at_once) as f64 / best * 1e-9
    }

    /// Rate at which all threads of a pool together read an area that was made for this pool and do nothing else, in
    /// GB/s (1e9 bytes): the best of `passes` passes, each begun by all threads at once.
    ///
    /// # Panics
    /// If the area was made for a pool with another number of threads.
    pub fn read_gb_per_second(&self, pool: &rayon::ThreadPool, area: &ReadArea, passes: usize) -> f64 {
        assert_eq!(area.parts.len(), pool.current_num_threads(), "threads of the pool and parts of the area");
        let start_line = StartLine { threads: area.parts.len(), arrived: AtomicUsize::new(0) };
        let times: Vec<Vec<(Instant, Instant)>> = pool.broadcast(|thread| {
            let part = &area.parts[thread.index()];
            let pass = |round| {
                start_line.wait(round);
                let start = Instant::now();
                // Both ends are opaque: a read whose result nobody needs is no read.
                std::hint::black_box(self.read_loop(std::hint::black_box(part)));
                (start, Instant::now())
            };
            (0..passes).map(pass).collect()
        });
        let seconds = (0..passes).filter_map(|pass| {
            let first_start = times.iter().map(|of_thread| of_thread[pass].0).min()?;
            let last_end = times.iter().map(|of_thread| of_thread[pass].1).max()?;
            Some((last_end - first_start).as_secs_f64())
        });
        area.bytes() as f64 / seconds.fold(f64::INFINITY, f64::min) * 1e-9
    }
}

/// Memory for [`Kernels::read_gb_per_second`]: one part for each thread of a pool, in huge pages where the system has
/// them, as the keys and values of [`crate::KvHead`] are.
#[derive(Debug)]
pub struct ReadArea {
    parts: Vec<Buffer>,
}

impl ReadArea {
    /// Reserves at least `bytes` altogether. Each thread writes its own part first, so that it lies in memory near that
    /// thread and is no page of zeros that the system shares.
    ///
    /// # Errors
    /// If the system refuses the memory.
    pub fn new(pool: &rayon::ThreadPool, bytes: usize) -> Result<Self, OutOfMemory> {
        let floats = bytes.div_ceil(4).div_ceil(pool.current_num_threads()).next_multiple_of(1024);
        let part = |_thread: rayon::BroadcastContext<'_>| {
            let mut part = Buffer::zeroed(floats)?;
            part.fill(1.0);
            Ok(part)
        };
        let parts: Result<Vec<Buffer>, OutOfMemory> = pool.broadcast(part).into_iter().collect();
        Ok(Self { parts: parts? })
    }

    /// Bytes that one pass reads.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.len() * 4).sum()
    }
}

/// Where threads wait for each other before a pass. They spin: being woken takes long beside a pass of milliseconds.
struct StartLine {
    threads: usize,
    arrived: AtomicUsize,
}

impl StartLine {
    /// Returns once all threads wait for round `round` (0, 1, 2, ...).
    fn wait(&self, round: usize) {
        const SPINS: usize = 10_000;
        self.arrived.fetch_add(1, Ordering::AcqRel);
        let mut spins = 0;
        while self.arrived.load(Ordering::Acquire) < self.threads * (round + 1) {
            spins += 1;
            // There may be fewer cores than threads.
            if spins > SPINS { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

/// Clock of the core that this thread runs on, now, in GHz: the rate of additions of which each needs the one before,
/// one a cycle. `None` on architectures for which no such loop is written. Takes about a millisecond.
pub fn core_ghz() -> Option<f64> {
    const ROUNDS: u64 = 16_384;
    let mut best = f64::INFINITY;
    for _window in 0..3 {
        let start = Instant::now();
        let mut sum = 0;
        for _ in 0..ROUNDS {
            sum = dependent_additions(sum)?;
        }
        std::hint::black_box(sum);
        best = best.min(start.elapsed().as_secs_f64());
    }
    Some((ROUNDS * ADDITIONS) as f64 / best * 1e-9)
}

/// Additions in one round of the clock's loop.
const ADDITIONS: u64 = 64;

/// Written in assembly, because a compiler would fold the additions into one. The second operand is a register: some
/// cores add small constants in no time at all.
#[cfg(all(target_arch = "x86_64", not(miri)))]
fn dependent_additions(mut sum: u64) -> Option<u64> {
    // SAFETY: 64 additions of two registers that the compiler chose; no memory, no stack.
    unsafe {
        std::arch::asm!(".rept 64", "add {sum}, {one}", ".endr", sum = inout(reg) sum, one = in(reg) 1_u64,
            options(pure, nomem, nostack));
    }
    Some(sum)
}

/// As on x86-64.
#[cfg(all(target_arch = "aarch64", not(miri)))]
fn dependent_additions(mut sum: u64) -> Option<u64> {
    // SAFETY: 64 additions of two registers that the compiler chose; no memory, no stack.
    unsafe {
        std::arch::asm!(".rept 64", "add {sum}, {sum}, {one}", ".endr", sum = inout(reg) sum, one = in(reg) 1_u64,
            options(pure, nomem, nostack));
    }
    Some(sum)
}

/// No loop is written for this architecture.
#[cfg(any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
fn dependent_additions(_sum: u64) -> Option<u64> {
    None
}

// Not under Miri: a rate says nothing there, spinning threads take long, and what is unsafe above is assembly.
#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    #[test]
    fn reading_and_counting_cycles_give_rates_for_any_number_of_threads() {
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let area = ReadArea::new(&pool, 100_000).unwrap();
            assert!(area.bytes() >= 100_000);
            for kernels in Kernels::available() {
                let rate = kernels.read_gb_per_second(&pool, &area, 2);
                assert!(rate.is_finite() && rate > 0.0, "{rate} GB/s");
            }
        }
        assert!(core_ghz().is_none_or(|ghz| ghz.is_finite() && ghz > 0.0));
    }
}
