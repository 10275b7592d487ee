//! Products of 8-bit and 16-bit integers, added up exactly: the order "c1-int8".
//!
//! It departs from `canonical.rs` in the two products:
//!
//! * A query `q'` becomes integers `a_x = rint(q'_x / s)` with a scale `s` made of `max |q'|`. The key's integers `b_x` and
//!   scale `t` are what is stored. `score = (sum_x a_x b_x) as f32 * (t * s)`.
//! * The weights of a page become integers too, with the scale of their values folded in: `w_j = p_j * u_j` for value scales
//!   `u_j`, `c_j = rint(w_j / r)` with a scale `r` made of `max w`, and `o = (sum_j c_j v_j) as f32 * r`.
//! * A scale is a power of two, so that dividing by it is exact and costs a multiplication: `2^-14` of the power of two at or
//!   below the largest magnitude and a 2^-14th more, `2^-126` at least. No integer is over 32767 then, and the largest is
//!   16383 or more, unless all numbers are below `2^-112`. It is 1 where all is zero. No sum leaves 32 bits, over 512 dimensions or the 256 keys of
//!   a page.
//!
//! Sums of integers are exact in any order, so bits are the same for any cut of the work, tile and ISA. Softmax, merges and
//! the division are those of `canonical.rs`. What is lost beside the storage itself is a little over `2^-15` of a query's
//! largest element and of a page's largest weight times scale, or `2^-127` if that is more.

use std::ops::Range;

use super::Arithmetic;
use crate::lanes::{DotLanes, LANES};
use crate::shape::MAX_INT8_DIM;
use crate::slot::PAGE_KEYS;

/// A scale, over the power of two that it is made of.
const UNIT: f32 = 1.0 / (1 << 14) as f32;

const _: () = assert!(MAX_INT8_DIM * 127 * 32_767 <= i32::MAX as usize && PAGE_KEYS <= MAX_INT8_DIM);

/// The scale of integers that stand for numbers of up to `largest`: 1 where that is 0 or no number.
#[inline(always)]
fn scale_of(largest: f32) -> f32 {
    if !(largest > 0.0 && largest.is_finite()) {
        return 1.0;
    }
    // Halves, so that a 2^-14th more doesn't leave the range.
    let half = largest * 0.5 * (1.0 + UNIT);
    let power = f32::from_bits(half.to_bits() & f32::INFINITY.to_bits());
    (power * (2.0 * UNIT)).max(f32::MIN_POSITIVE)
}

/// Turns a query into integers, and gives those to `word` in words of two, as [`Int8Dots`] meets them: word `2 x` has
/// dimensions `4 x` and `4 x + 2`, word `2 x + 1` has `4 x + 1` and `4 x + 3`. Returns their scale; NaN for a query that isn't
/// finite, whose scores are NaN then.
pub(crate) fn pack_query(query: &[f32], factor: f32, mut word: impl FnMut(usize, f32)) -> f32 {
    let is_finite = query.iter().all(|x| (x * factor).is_finite());
    let largest = query.iter().fold(0.0_f32, |largest, x| largest.max((x * factor).abs()));
    let scale = scale_of(largest);
    let inverse = scale.recip();
    let integer = |x: usize| match query.get(x) {
        Some(x) if is_finite => (x * factor * inverse).round_ties_even() as i16,
        _ => 0,
    };
    let pair = |low: usize, high: usize| {
        u32::from(integer(low).cast_unsigned()) | u32::from(integer(high).cast_unsigned()) << 16
    };
    for x in 0..query.len().div_ceil(4) {
        word(2 * x, f32::from_bits(pair(4 * x, 4 * x + 2)));
        word(2 * x + 1, f32::from_bits(pair(4 * x + 1, 4 * x + 3)));
    }
    if is_finite { scale } else { f32::NAN }
}

/// int8 against 16-bit integers.
#[derive(Clone, Copy)]
pub(crate) struct Int8Dots;

impl<L: DotLanes> Arithmetic<L> for Int8Dots {
    const PER_WORD: usize = 4;
    const PARTS: usize = 2;
    const INTEGERS: bool = true;

    #[inline(always)]
    unsafe fn part(words: L::V, at: usize) -> L::V {
        // SAFETY: as the caller vouches.
        unsafe { L::bytes_of_halves(words, at) }
    }
    #[inline(always)]
    unsafe fn only(words: L::V, at: usize) -> L::V {
        // SAFETY: as the caller vouches.
        unsafe { L::half_of_words(L::bytes_of_halves(words, at % 2), at / 2) }
    }
    #[inline(always)]
    unsafe fn multiply_add(a: L::V, b: L::V, acc: L::V) -> L::V {
        // SAFETY: as the caller vouches.
        unsafe { L::dot_int16(a, b, acc) }
    }
    #[inline(always)]
    unsafe fn value(acc: L::V) -> L::V {
        // SAFETY: as the caller vouches.
        unsafe { L::from_int32(acc) }
    }
    #[inline(always)]
    unsafe fn weight(p: L::V, value_scales: *const f32) -> L::V {
        // SAFETY: as the caller vouches.
        unsafe { L::mul(p, L::load(value_scales)) }
    }
    #[inline(always)]
    unsafe fn pack_row(p: *mut f32, keys: Range<usize>, largest: f32) -> f32 {
        // Where weights are NaN so is their sum, and any integers do. Where the scale of a value that was never written
        // is NaN, the weight of its key is no number either; integers of such are 0.
        let scale = scale_of(largest);
        // SAFETY: keys are whole vectors of a page; the words of 16 weights go where weights were that have been read.
        unsafe {
            let inverse = L::splat(scale.recip());
            for j in keys.step_by(LANES) {
                let integers = L::mul(L::load(p.add(j)), inverse);
                L::store_half(p.add(j / 2), L::int16_pairs(integers));
            }
        }
        scale
    }
}
