//! The softmax of one row over one page: maximum, weights and their sum (rules 2 to 4 of the canonical order).

use std::ops::Range;

use crate::arithmetic::Arithmetic;
use crate::canonical::finite_max;
use crate::lanes::{LANES, Lanes};
use crate::slot::PAGE_KEYS;

/// What the softmax of a row over a page leaves besides the weights.
#[derive(Clone, Copy)]
pub(super) struct RowSum {
    /// Integer maximum in log2 units, -inf where no key is visible.
    pub(super) m: f32,
    /// Sum of the weights.
    pub(super) l: f32,
    /// A score left the range of f32 although its operands may be finite.
    pub(super) overflow: bool,
    /// Where weights are integers, what they are multiplied by.
    pub(super) weight_scale: f32,
}

/// Turns the scores `s[0..256]` of one row into weights in place, packed as `A` broadcasts them. Keys outside `visible` are
/// skipped: what the scores hold there is of no consequence, and what is left there is unspecified, or zero in the vectors of
/// `keys`, which hold `visible`, if `A` is of integers.
///
/// # Safety
/// The ISA of `L`, and what `A` needs, is enabled; `s` is valid for reading and writing 256 f32, `value_scales` for reading 256 if
/// values have scales; `keys.end <= 256`.
#[inline(always)]
pub(super) unsafe fn softmax_row<L: Lanes, A: Arithmetic<L>>(
    s: *mut f32,
    visible: Range<usize>,
    keys: Range<usize>,
    value_scales: *const f32,
) -> RowSum {
    let keys = keys.start / LANES * LANES..keys.end.next_multiple_of(LANES).min(PAGE_KEYS);
    let (before, after) = if visible.is_empty() {
        (keys.start, keys.start)
    } else {
        (visible.start / LANES * LANES, visible.end.next_multiple_of(LANES))
    };
    // SAFETY: all of it lies inside a page.
    unsafe {
        let (sum, largest) = weigh_row::<L, A>(s, visible, value_scales);
        if A::INTEGERS {
            for j in (keys.start..before).chain(after..keys.end) {
                *s.add(j) = 0.0;
            }
        }
        RowSum { weight_scale: A::pack_row(s, keys, largest), ..sum }
    }
}

/// Weights as `A` packs them, and the largest of them if `A` is of integers.
///
/// # Safety
/// As [`softmax_row`].
#[inline(always)]
unsafe fn weigh_row<L: Lanes, A: Arithmetic<L>>(
    s: *mut f32,
    visible: Range<usize>,
    value_scales: *const f32,
) -> (RowSum, f32) {
    if visible.is_empty() {
        return (RowSum { m: f32::NEG_INFINITY, l: 0.0, overflow: false, weight_scale: 1.0 }, 0.0);
    }
    // Whole vectors around the visible keys; the rest of the first and last vector becomes -inf, whose weight is 0 by
    // rule 3 and whose place in the residue sums adds +0.
    let first = visible.start / 16 * 16;
    let last = visible.end.next_multiple_of(16);
    // SAFETY: first <= visible.start, visible.end <= last <= 256, and every access is in first..last.
    unsafe {
        let lowest = lowest::<L>(s, visible.clone());
        for j in (first..visible.start).chain(visible.end..last) {
            *s.add(j) = f32::NEG_INFINITY;
        }
        let (m, l, largest) = weigh_vectors::<L, A>(s, first, last, value_scales);
        let overflow = lowest == f32::NEG_INFINITY || m == f32::INFINITY || l.is_nan();
        let largest = if A::INTEGERS { L::largest(largest) } else { 0.0 };
        (RowSum { m, l, overflow, weight_scale: 1.0 }, largest)
    }
}

/// Turns the scores of whole vectors `first..last` of a row into weights as [`Arithmetic::weight`] leaves them, where invisible
/// ones are -inf by now. Returns their integer maximum, the sum of the weights, and the largest of each lane if `A` is of integers.
///
/// # Safety
/// The ISA of `L`, and what `A` needs, is enabled; `s` is valid for reading and writing `first..last`, which are multiples of 16
/// and `first < last`; `value_scales` for reading `last` if values have scales.
#[inline(always)]
pub(crate) unsafe fn weigh_vectors<L: Lanes, A: Arithmetic<L>>(
    s: *mut f32,
    first: usize,
    last: usize,
    value_scales: *const f32,
) -> (f32, f32, L::V) {
    // SAFETY: every access is in first..last.
    unsafe {
        let mut max = L::load(s.add(first));
        for j in (first + 16..last).step_by(16) {
            max = L::max(max, L::load(s.add(j)));
        }
        let m = L::largest(L::rint(max)) + 0.0;

        let shift = L::splat(finite_max(m));
        let degree = A::EXP2.len() - 1;
        let (mut sums, mut largest) = (L::zero(), L::zero());
        for j in (first..last).step_by(16) {
            let score = L::load(s.add(j));
            let n = L::rint(score);
            let r = L::sub(score, n);
            let mut y = L::splat(A::EXP2[degree]);
            for i in (0..degree).rev() {
                y = L::fma(y, r, L::splat(A::EXP2[i]));
            }
            let p = L::scale_or_flush(y, L::sub(n, shift));
            let weight = A::weight(p, value_scales.wrapping_add(j));
            L::store(s.add(j), weight);
            if A::INTEGERS {
                largest = L::max(weight, largest);
            }
            sums = L::add(sums, p);
        }
        (m, L::halving_sum(sums), largest)
    }
}

/// The smallest visible score, in whole vectors where possible.
///
/// # Safety
/// The ISA of `L` is enabled; `s` is valid for reading 256 f32; `visible` is not empty and ends at 256 or before.
#[inline(always)]
unsafe fn lowest<L: Lanes>(s: *const f32, visible: Range<usize>) -> f32 {
    let inner = visible.start.next_multiple_of(16)..visible.end / 16 * 16;
    // SAFETY: every access is inside `visible`.
    unsafe {
        let mut vector = L::splat(f32::INFINITY);
        for j in inner.clone().step_by(16) {
            vector = L::min(vector, L::load(s.add(j)));
        }
        let edges = if inner.is_empty() { visible.start..visible.end } else { visible.start..inner.start };
        let tail = if inner.is_empty() { 0..0 } else { inner.end..visible.end };
        edges.chain(tail).fold(L::smallest(vector), |min, j| min.min(*s.add(j)))
    }
}
