//! The softmax of a group of lanes over one page (rules 2 to 4 of the canonical order), and the rescaling of what merges
//! with it (rule 6). A key's scores are one row of `lanes` elements.

use std::ops::Range;

use super::tile::WHOLE_PAGE;
use crate::arithmetic::Arithmetic;
use crate::block::Span;
use crate::lanes::{LANES, Lanes};

/// Exponents above this are safely above the one at which weights are flushed.
const NO_FLUSH: f32 = -120.0;
/// A fourth of the residues of rule 4.
const QUARTER: usize = LANES / 4;

/// The keys whose weights are computed: whole rounds of residues around those that some lane sees.
fn residues(keys: &Span) -> Range<usize> {
    keys.hull.start / LANES * LANES..keys.hull.end.next_multiple_of(LANES)
}

/// The largest and the smallest score of each lane.
#[derive(Clone, Copy)]
pub(super) struct Extremes<L: Lanes, const NR: usize> {
    pub(super) largest: [L::V; NR],
    pub(super) smallest: [L::V; NR],
}

impl<L: Lanes, const NR: usize> Extremes<L, NR> {
    /// Of no scores.
    ///
    /// # Safety
    /// The ISA of `L` is enabled.
    #[inline(always)]
    pub(super) unsafe fn none() -> Self {
        // SAFETY: as the caller vouches.
        unsafe {
            Self { largest: [L::splat(f32::NEG_INFINITY); NR], smallest: [L::splat(f32::INFINITY); NR] }
        }
    }
}

/// Maximum and sum of each lane.
#[derive(Clone, Copy)]
pub(super) struct Sums<L: Lanes, const NR: usize> {
    m: [L::V; NR],
    l: [L::V; NR],
}

/// Makes the scores that a lane doesn't see -inf, in all the residues that [`weigh`] reads. The extremes of the others.
///
/// # Safety
/// The ISA of `L` is enabled. `s` is valid for 256 rows of `16 * NR` elements, `seen` for two.
#[inline(always)]
pub(super) unsafe fn hide<L: Lanes, const NR: usize>(
    s: *mut f32,
    keys: &Span,
    seen: *const f32,
) -> Extremes<L, NR> {
    // SAFETY: residues(keys) stays inside a page.
    unsafe {
        let mut extremes = Extremes::<L, NR>::none();
        let (low, high) = (L::splat(f32::NEG_INFINITY), L::splat(f32::INFINITY));
        for n in 0..NR {
            let (first, end) = (L::load(seen.add(LANES * n)), L::load(seen.add(LANES * (NR + n))));
            for j in residues(keys) {
                let at = s.add(LANES * (NR * j + n));
                let (score, key) = (L::load(at), L::splat(j as f32));
                let visible = L::select_between(key, first, end, score, low);
                L::store(at, visible);
                extremes.largest[n] = L::max(extremes.largest[n], visible);
                let visible = L::select_between(key, first, end, score, high);
                extremes.smallest[n] = L::min(extremes.smallest[n], visible);
            }
        }
        extremes
    }
}

/// Turns scores into weights in place, packed as `A` multiplies them, and sums them.
///
/// Where no weight of a vector of lanes is small enough to be flushed, which the smallest score tells, flushing is left
/// out. A NaN among the scores of a lane may hide from its extremes; all that the lane gives is NaN either way.
///
/// # Safety
/// The ISA of `L`, and what `A` needs, is enabled. `s` is valid for 256 rows of `16 * NR` elements.
#[inline(always)]
pub(super) unsafe fn weigh<L: Lanes, A: Arithmetic<L>, const NR: usize>(
    s: *mut f32,
    keys: &Span,
    extremes: &Extremes<L, NR>,
) -> Sums<L, NR> {
    let residues = residues(keys);
    let is_whole = *keys == WHOLE_PAGE;
    // SAFETY: residues(keys) is whole vectors of residues inside a page.
    unsafe {
        let mut sums = Sums::<L, NR> { m: [L::zero(); NR], l: [L::zero(); NR] };
        for n in 0..NR {
            let m = L::add(L::rint(extremes.largest[n]), L::zero());
            let shift = finite::<L>(m);
            let (low, high) = (L::splat(NO_FLUSH), L::splat(f32::INFINITY));
            let least = L::sub(L::rint(extremes.smallest[n]), shift);
            // A comparison with NaN is false, whereas the smallest of several lanes may lose one and its neighbour.
            let is_safe = L::select_between(least, low, high, L::splat(1.0), L::zero());
            let s = s.add(LANES * n);
            let is_safe = is_whole && L::smallest(is_safe) == 1.0;
            let mut t = [L::zero(); LANES];
            if A::PER_WORD == 1 {
                for first in (0..LANES).step_by(QUARTER) {
                    let s = s.add(LANES * NR * first);
                    let of_four = if is_safe {
                        residue_sums::<L, A, NR, false>(s, residues.clone(), shift)
                    } else {
                        residue_sums::<L, A, NR, true>(s, residues.clone(), shift)
                    };
                    t[first..first + QUARTER].copy_from_slice(&of_four);
                }
            } else if is_safe {
                t = sums_of_pairs::<L, A, NR, false>(s, residues.clone(), shift);
            } else {
                t = sums_of_pairs::<L, A, NR, true>(s, residues.clone(), shift);
            }
            for half in [8, 4, 2, 1] {
                for i in 0..half {
                    t[i] = L::add(t[i], t[i + half]);
                }
            }
            sums.m[n] = m;
            sums.l[n] = t[0];
        }
        sums
    }
}

/// Runs a block with the constant `$r` from 0 to 15.
macro_rules! each_residue {
    ($r:ident, $block:block) => {
        each_residue!($r, $block, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    ($r:ident, $block:block, $($n:literal)*) => {
        $({ const $r: usize = $n; $block })*
    };
}

/// The weights of scores: `P(s, m')` of rule 3. Without `FLUSH`, every score minus `shift` is above [`NO_FLUSH`].
///
/// # Safety
/// The ISA of `L`, and what `A` needs, is enabled.
#[inline(always)]
unsafe fn weights<L: Lanes, A: Arithmetic<L>, const FLUSH: bool>(scores: L::V, shift: L::V) -> L::V {
    // SAFETY: as the caller vouches.
    unsafe {
        let degree = A::EXP2.len() - 1;
        let nearest = L::rint(scores);
        let rest = L::sub(scores, nearest);
        let mut y = L::splat(A::EXP2[degree]);
        for i in (0..degree).rev() {
            y = L::fma(y, rest, L::splat(A::EXP2[i]));
        }
        let e = L::sub(nearest, shift);
        if FLUSH { L::scale_or_flush(y, e) } else { L::scale(y, e) }
    }
}

/// Weights in place, and one sum per residue of the key modulo 16, as rule 4 says, of four neighbouring residues: their sums
/// stay in registers, where 16 don't.
///
/// # Safety
/// The ISA of `L`, and what `A` needs, is enabled. `s` is valid for a vector of each of the first four rows of every 16 of
/// `residues`, `NR` vectors apart. `FLUSH` as [`weights`] says.
#[inline(always)]
unsafe fn residue_sums<L: Lanes, A: Arithmetic<L>, const NR: usize, const FLUSH: bool>(
    s: *mut f32,
    residues: Range<usize>,
    shift: L::V,
) -> [L::V; QUARTER] {
    // SAFETY: the ranges above, vector by vector.
    unsafe {
        let mut t = [L::zero(); QUARTER];
        for j in residues.step_by(LANES) {
            for r in 0..QUARTER {
                let at = s.add(LANES * NR * (j + r));
                let p = weights::<L, A, FLUSH>(L::load(at), shift);
                L::store(at, p);
                t[r] = L::add(t[r], p);
            }
        }
        t
    }
}

/// The same of all residues at once, with weights packed in pairs: their words go where scores were, which therefore have to
/// be read in order.
///
/// # Safety
/// As [`residue_sums`], for all rows of `residues`.
#[inline(always)]
unsafe fn sums_of_pairs<L: Lanes, A: Arithmetic<L>, const NR: usize, const FLUSH: bool>(
    s: *mut f32,
    residues: Range<usize>,
    shift: L::V,
) -> [L::V; LANES] {
    // SAFETY: the ranges above, vector by vector.
    unsafe {
        let mut t = [L::zero(); LANES];
        let mut even = L::zero();
        for j in residues.step_by(LANES) {
            // Written out, because a loop would keep the sums in memory: LLVM unrolls none that is this long.
            each_residue!(R, {
                let p = weights::<L, A, FLUSH>(L::load(s.add(LANES * NR * (j + R))), shift);
                if R.is_multiple_of(2) {
                    even = p;
                } else {
                    L::store(s.add(LANES * NR * ((j + R) / 2)), A::pair(even, p));
                }
                t[R] = L::add(t[R], p);
            });
        }
        t
    }
}

/// `m'` of rule 2: -inf becomes a number that no finite maximum is below. Where a maximum is -inf so are all scores, and
/// any number gives them the weight 0.
///
/// # Safety
/// The ISA of `L` is enabled.
#[inline(always)]
unsafe fn finite<L: Lanes>(m: L::V) -> L::V {
    // SAFETY: as the caller vouches.
    unsafe { L::max(L::splat(f32::MIN), m) }
}

/// `P(m, M')` of rule 6 for integers `m`: a power of two, 0, or NaN where a score overflowed.
///
/// # Safety
/// The ISA of `L` is enabled.
#[inline(always)]
unsafe fn rescale<L: Lanes>(m: L::V, shift: L::V) -> L::V {
    // SAFETY: as the caller vouches.
    unsafe {
        // m - m is 0, or NaN where m is no number.
        let one = L::add(L::splat(1.0), L::sub(m, m));
        L::scale_or_flush(one, L::sub(m, shift))
    }
}

/// Merges maximum and sum of a page with those of `merges` partials, one after the other; they lie before `top`, `size`
/// apart, backwards. Leaves `[left, right]` of each merge in `factors`, for the output to follow, and the result at `to`.
///
/// # Safety
/// The ISA of `L` is enabled. Each partial, and `to`, is valid for `m` and `l`, two rows of `16 * NR` elements, and
/// `factors` for writing two rows a merge.
#[inline(always)]
pub(super) unsafe fn merge<L: Lanes, const NR: usize>(
    sums: Sums<L, NR>,
    merges: usize,
    top: *const f32,
    size: usize,
    factors: *mut f32,
    to: *mut f32,
) {
    // SAFETY: the ranges above, vector by vector.
    unsafe {
        for n in 0..NR {
            let (mut m, mut l) = (sums.m[n], sums.l[n]);
            for i in 0..merges {
                let left = top.sub((i + 1) * size).add(LANES * n);
                let m_left = L::load(left);
                let largest = L::max(m_left, m);
                let shift = finite::<L>(largest);
                let (a, b) = (rescale::<L>(m_left, shift), rescale::<L>(m, shift));
                l = L::fma(L::load(left.add(LANES * NR)), a, L::mul(l, b));
                m = largest;
                L::store(factors.add(LANES * (NR * 2 * i + n)), a);
                L::store(factors.add(LANES * (NR * (2 * i + 1) + n)), b);
            }
            L::store(to.add(LANES * n), m);
            L::store(to.add(LANES * (NR + n)), l);
        }
    }
}
