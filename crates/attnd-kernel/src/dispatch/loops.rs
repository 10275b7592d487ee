//! The loops that a machine's limits are calibrated with: multiply-adds from registers, and reading.

use crate::arithmetic::Arithmetic;
use crate::lanes::Lanes;

/// Accumulators of the calibration loop: enough to hide the latency of two multiply-add pipes.
const FMA_CHAINS: usize = 12;
/// Floating-point operations in one round of the calibration loop.
pub(crate) const FLOP_PER_ROUND: u64 = FMA_CHAINS as u64 * 16 * 2;

/// # Safety
/// The ISA of `L`, and what `A` needs, is enabled.
#[inline(always)]
pub(super) unsafe fn chains<L: Lanes, A: Arithmetic<L>, const CHAINS: usize>(rounds: u64) -> f32 {
    // SAFETY: the ISA is enabled.
    unsafe {
        let (a, b) = (L::splat(std::hint::black_box(0.999_9)), L::splat(std::hint::black_box(1e-4)));
        let mut acc = [L::zero(); CHAINS];
        for _ in 0..rounds * (FMA_CHAINS / CHAINS) as u64 {
            // Accumulators are what is added to, as in the tiles: where the instruction overwrites that operand, any other
            // order costs a copy.
            for chain in &mut acc {
                *chain = A::multiply_add(a, b, *chain);
            }
        }
        acc.into_iter().map(|chain| L::halving_sum(chain)).sum()
    }
}

/// Accumulators of the reading loop: enough to hide the latency of an addition behind two loads a cycle.
const READ_CHAINS: usize = 8;

/// # Safety
/// The ISA of `L` is enabled.
#[inline(always)]
pub(super) unsafe fn read_chains<L: Lanes>(from: &[f32]) -> f32 {
    let mut chunks = from.chunks_exact(READ_CHAINS * 16);
    // SAFETY: the ISA is enabled, and a chunk is READ_CHAINS times sixteen f32 long.
    unsafe {
        let mut acc = [L::zero(); READ_CHAINS];
        for chunk in &mut chunks {
            for (i, chain) in acc.iter_mut().enumerate() {
                *chain = L::add(*chain, L::load(chunk.as_ptr().add(i * 16)));
            }
        }
        let sums: f32 = acc.into_iter().map(|chain| L::halving_sum(chain)).sum();
        sums + chunks.remainder().iter().sum::<f32>()
    }
}
