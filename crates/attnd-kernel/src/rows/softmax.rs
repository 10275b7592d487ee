//! The softmax of one row over one page: maximum, weights and their sum (rules 2 to 4 of the canonical order).

use std::ops::Range;

use crate::canonical::{EXP2_POLY, finite_max};
use crate::lanes::Lanes;

/// What the softmax of a row over a page leaves besides the weights.
#[derive(Clone, Copy)]
pub(super) struct RowSum {
    /// Integer maximum in log2 units, -inf where no key is visible.
    pub(super) m: f32,
    /// Sum of the weights.
    pub(super) l: f32,
    /// A score left the range of f32 although its operands may be finite.
    pub(super) overflow: bool,
}

/// Turns the scores `s[0..256]` of one row into weights in place. Keys outside `visible` are skipped: what the scores
/// hold there is of no consequence, and what is left there is unspecified.
///
/// # Safety
/// The ISA of `L` is enabled; `s` is valid for reading and writing 256 f32; `visible.end <= 256`.
#[inline(always)]
pub(super) unsafe fn softmax_row<L: Lanes>(s: *mut f32, visible: Range<usize>) -> RowSum {
    if visible.is_empty() {
        return RowSum { m: f32::NEG_INFINITY, l: 0.0, overflow: false };
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
        let mut max = L::load(s.add(first));
        for j in (first + 16..last).step_by(16) {
            max = L::max(max, L::load(s.add(j)));
        }
        let m = L::largest(L::rint(max)) + 0.0;

        let shift = L::splat(finite_max(m));
        let poly = EXP2_POLY.map(|c| L::splat(c));
        let mut sums = L::zero();
        for j in (first..last).step_by(16) {
            let score = L::load(s.add(j));
            let n = L::rint(score);
            let r = L::sub(score, n);
            let mut y = poly[6];
            for c in [poly[5], poly[4], poly[3], poly[2], poly[1], poly[0]] {
                y = L::fma(y, r, c);
            }
            let p = L::scale_or_flush(y, L::sub(n, shift));
            L::store(s.add(j), p);
            sums = L::add(sums, p);
        }
        let l = L::halving_sum(sums);
        let overflow = lowest == f32::NEG_INFINITY || m == f32::INFINITY || l.is_nan();
        RowSum { m, l, overflow }
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
