//! What happens to the scores of one row over one page between the product and the weights (rules 11, 13 and 14): cap, biases, mask.
//!
//! Each is a pass of its own over 1 KiB in the first-level cache, so that one copy of each serves all that can be combined; the crate's
//! performance log says what they cost.

use std::ops::Range;

use super::functions::tanh;
use crate::lanes::{LANES, Lanes};
use crate::mask::PageBits;
use crate::slot::PAGE_KEYS;

/// Rule 11: caps scores in place, `s = cap * tanh(s)`, where `s` comes scaled by the inverse of the cap and leaves in log2 units. Returns
/// whether a visible score had left the range of f32 before, of which nothing is left to see afterwards.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If `vectors` are no multiples of 16 inside a page.
#[inline(always)]
pub(crate) unsafe fn cap_row<L: Lanes>(
    s: &mut [f32; PAGE_KEYS],
    vectors: Range<usize>,
    cap: f32,
    visible: &PageBits,
) -> bool {
    check(&vectors);
    let s = s.as_mut_ptr();
    // SAFETY: every access is in `vectors`.
    unsafe {
        let cap = L::splat(cap);
        let mut size = L::zero();
        for j in vectors.step_by(LANES) {
            let (score, bits) = (L::load(s.add(j)), visible.of_vector(j));
            // Expanding bits to lanes takes some instructions on most ISAs, so only where there is something to hide.
            let shown = if bits == u16::MAX { score } else { L::select_bits(bits, score, L::zero()) };
            size = L::max(L::abs(shown), size);
            L::store(s.add(j), L::mul(cap, tanh::<L>(score)));
        }
        L::largest(size) == f32::INFINITY
    }
}

/// Rule 13: adds a bias in natural units to scores in log2 units, `s = fma(b, log2 e, s)`.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If `vectors` are no multiples of 16 inside a page.
#[inline(always)]
pub(crate) unsafe fn add_bias<L: Lanes>(
    s: &mut [f32; PAGE_KEYS],
    vectors: Range<usize>,
    bias: &[f32; PAGE_KEYS],
) {
    check(&vectors);
    let (s, bias) = (s.as_mut_ptr(), bias.as_ptr());
    // SAFETY: every access is in `vectors`.
    unsafe {
        let log2_e = L::splat(std::f32::consts::LOG2_E);
        for j in vectors.step_by(LANES) {
            L::store(s.add(j), L::fma(L::load(bias.add(j)), log2_e, L::load(s.add(j))));
        }
    }
}

/// Rule 14: makes masked scores -inf, whatever they are. Returns whether a visible one has left the range of f32; of NaN it says nothing, as
/// that shows in the sum of the weights.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If `vectors` are no multiples of 16 inside a page.
#[inline(always)]
pub(crate) unsafe fn mask_row<L: Lanes>(
    s: &mut [f32; PAGE_KEYS],
    vectors: Range<usize>,
    visible: &PageBits,
) -> bool {
    check(&vectors);
    let s = s.as_mut_ptr();
    // SAFETY: every access is in `vectors`.
    unsafe {
        let masked = L::splat(f32::NEG_INFINITY);
        let mut size = L::zero();
        for j in vectors.step_by(LANES) {
            let (score, bits) = (L::load(s.add(j)), visible.of_vector(j));
            if bits == u16::MAX {
                size = L::max(L::abs(score), size);
            } else {
                size = L::max(L::select_bits(bits, L::abs(score), L::zero()), size);
                L::store(s.add(j), L::select_bits(bits, score, masked));
            }
        }
        L::largest(size) == f32::INFINITY
    }
}

/// # Panics
/// If `vectors` are no multiples of 16 inside a page.
#[inline(always)]
pub(crate) fn check(vectors: &Range<usize>) {
    let whole = vectors.start.is_multiple_of(LANES) && vectors.end.is_multiple_of(LANES);
    assert!(whole && vectors.start < vectors.end && vectors.end <= PAGE_KEYS, "{vectors:?}");
}
