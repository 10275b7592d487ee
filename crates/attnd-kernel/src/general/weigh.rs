//! Weights of one row over one page from its finished scores, in which masked keys are -inf.

use std::ops::Range;

use super::functions::sigmoid;
use super::shape::check;
use crate::arithmetic::Exact;
use crate::lanes::{LANES, Lanes};
use crate::rows::softmax::weigh_vectors;
use crate::slot::PAGE_KEYS;
use crate::storage::StoredF32;

/// Rules 2 to 4, in place. Returns the integer maximum and the sum of the weights.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If `vectors` are no multiples of 16 inside a page.
#[inline(always)]
pub(crate) unsafe fn softmax<L: Lanes>(s: &mut [f32; PAGE_KEYS], vectors: Range<usize>) -> (f32, f32) {
    check(&vectors);
    let no_scales = s.as_ptr();
    // SAFETY: `vectors` are multiples of 16 inside `s`, and f32 has no scales.
    let (m, l, _) = unsafe {
        weigh_vectors::<L, Exact<StoredF32>>(s.as_mut_ptr(), vectors.start, vectors.end, no_scales)
    };
    (m, l)
}

/// Rule 15, in place: sigmoids of the scores and of `bias`, which is in natural units. Returns their sum (rule 4).
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If `vectors` are no multiples of 16 inside a page.
#[inline(always)]
pub(crate) unsafe fn sigmoids<L: Lanes>(s: &mut [f32; PAGE_KEYS], vectors: Range<usize>, bias: f32) -> f32 {
    check(&vectors);
    let s = s.as_mut_ptr();
    // SAFETY: every access is in `vectors`.
    unsafe {
        let (bias, log2_e) = (L::splat(bias), L::splat(std::f32::consts::LOG2_E));
        let mut sums = L::zero();
        for j in vectors.step_by(LANES) {
            let p = sigmoid::<L>(L::fma(bias, log2_e, L::load(s.add(j))));
            L::store(s.add(j), p);
            sums = L::add(sums, p);
        }
        L::halving_sum(sums)
    }
}
