//! Weighted sums of hyperbolic tangents, by one exponential for each element of a row and one for each of a key:
//!
//! ```text
//! sum_x w_x tanh(a_x + b_x) = sum_x w_x - sum_x 2 w_x / (1 + E_x F_x)      E_x = e^2a_x, F_x = e^2b_x
//! ```
//!
//! Exponentials only stay in range together where neither argument is beyond [`FACTORED`]. So there are three forms of a score,
//! chosen by its key and its row alone, so that no row's or key's neighbours show in it:
//! * the key has an element beyond, or one that is NaN: it is flagged, its column holds `b` instead of `F`, and
//!   `s = fma(w_x, tanh(a_x + b_x), s)` from +0, with every row;
//! * else the row has such an element: `E` is two factors, `E1 = m 2^h` and `E2 = 2^(n - h)`, of which the second is multiplied
//!   last;
//! * else as above.
//!
//! Two terms share a division: from `s = sum_x w_x`, ascending, for `x` and `x + 1`,
//!
//! ```text
//! d = min(fma(E_x, F_x, 1), 2^30)      w' = -2 w_x      s = s + fma(w'_x, d_x+1, w'_x+1 * d_x) / (d_x * d_x+1)
//! ```
//!
//! and an odd last one alone, `s = s + w' / d`. At `2^30` a tanh is 1 to the last place.

use std::ops::Range;

use super::panel_at;
use super::tile::Tile;
use crate::canonical::EXP2_POLY;
use crate::canonical::functions::{FACTORED, FAR, SATURATED_SUM, TWO_LOG2_E};
use crate::dispatch::{Kernels, ReduceEntries};
use crate::general::functions::tanh;
use crate::lanes::{LANES, Lanes};
use crate::pages::PANEL_KEYS;
use crate::slot::PAGE_KEYS;

/// The tile: of a row it has the sum of the weights, then `E_x` and `-2 w_x` of each element.
#[derive(Clone, Copy)]
pub(crate) struct Tanh;

// SAFETY: reads `1 + 2 d` words of each row and `d` rows of the keys.
unsafe impl<L: Lanes> Tile<L> for Tanh {
    const HEADER: usize = 1;
    const WORDS: usize = 2;
    const FLAGS: usize = 1;

    #[inline(always)]
    unsafe fn tile<const MR: usize, const NR: usize>(
        self,
        q: *const f32,
        d: usize,
        k: *const f32,
        s: *mut f32,
    ) {
        // SAFETY: the ranges that the caller vouches for, element by element.
        unsafe {
            let (one, most) = (L::splat(1.0), L::splat(SATURATED_SUM));
            let mut acc = [[L::zero(); NR]; MR];
            for r in 0..MR {
                acc[r] = [L::splat(*q.add(r)); NR];
            }
            let q = q.add(MR);
            for x in (0..d / 2 * 2).step_by(2) {
                let mut keys = [[L::zero(); NR]; 2];
                for n in 0..NR {
                    keys[0][n] = L::load(k.add(x * PANEL_KEYS + LANES * n));
                    keys[1][n] = L::load(k.add((x + 1) * PANEL_KEYS + LANES * n));
                }
                for r in 0..MR {
                    // No closure: what isn't inlined into the entry loses its CPU features.
                    let q = q.add(2 * x * MR + r);
                    let e = [L::splat(*q), L::splat(*q.add(2 * MR))];
                    let w = [L::splat(*q.add(MR)), L::splat(*q.add(3 * MR))];
                    for n in 0..NR {
                        let d = [
                            L::min_keep(most, L::fma(e[0], keys[0][n], one)),
                            L::min_keep(most, L::fma(e[1], keys[1][n], one)),
                        ];
                        acc[r][n] = L::add(acc[r][n], pair::<L>(w, d));
                    }
                }
            }
            if d % 2 == 1 {
                for r in 0..MR {
                    let e = L::splat(*q.add(2 * (d - 1) * MR + r));
                    let w = L::splat(*q.add((2 * (d - 1) + 1) * MR + r));
                    for n in 0..NR {
                        let key = L::load(k.add((d - 1) * PANEL_KEYS + LANES * n));
                        let d = L::min_keep(most, L::fma(e, key, one));
                        acc[r][n] = L::add(acc[r][n], L::div(w, d));
                    }
                }
            }
            for r in 0..MR {
                for n in 0..NR {
                    L::store(s.add(r * PAGE_KEYS + LANES * n), acc[r][n]);
                }
            }
        }
    }
}

/// `w_0 / d_0 + w_1 / d_1` by one division.
///
/// # Safety
/// The ISA of `L` is enabled.
#[inline(always)]
unsafe fn pair<L: Lanes>(w: [L::V; 2], d: [L::V; 2]) -> L::V {
    // SAFETY: as the caller vouches.
    unsafe { L::div(L::fma(w[0], d[1], L::mul(w[1], d[0])), L::mul(d[0], d[1])) }
}

/// Words of a row in its tile.
pub(super) fn tile_words(d: usize) -> usize {
    1 + 2 * d
}

/// Words of a row behind the tiles: whether it is flagged, the sum of its weights, then `a`, `w`, `E1` and `E2`, `d` each.
pub(crate) fn row_words(d: usize) -> usize {
    2 + 4 * d
}

/// Packs what lies behind the tiles.
pub(super) fn pack_row(entries: &ReduceEntries, row: &[f32], weights: &[f32], factor: f32, to: &mut [f32]) {
    let d = row.len();
    let (header, to) = to.split_at_mut(2);
    let (a, to) = to.split_at_mut(d);
    let (w, to) = to.split_at_mut(d);
    let (e1, e2) = to.split_at_mut(d);
    a.copy_from_slice(row);
    w.iter_mut().zip(weights).for_each(|(to, w)| *to = w * factor);
    header[0] = f32::from(u8::from(entries.row_exponentials(row, e1, e2)));
    header[1] = w.iter().fold(0.0, |sum, w| sum + w);
}

/// The words of a row in its tile, from what [`pack_row`] left.
pub(super) fn words_of_tile(row: &[f32], d: usize) -> impl Iterator<Item = f32> + '_ {
    let (w, e1, e2) = (&row[2 + d..], &row[2 + 2 * d..], &row[2 + 3 * d..]);
    // Of a flagged row the product may leave the range; its scores are made again.
    std::iter::once(row[1]).chain((0..d).flat_map(move |x| [e1[x] * e2[x], -2.0 * w[x]]))
}

/// Makes the scores of flagged rows and of flagged keys again, by their forms.
pub(super) fn exact_scores(
    entries: &ReduceEntries,
    rows: &[f32],
    d: usize,
    k: &[f32],
    panels: Range<usize>,
    s: &mut [f32],
) {
    let rows = || rows.chunks_exact(row_words(d)).zip(0..);
    for (row, i) in rows().filter(|(row, _)| row[0] != 0.0) {
        let s = &mut s[i * PAGE_KEYS..][..PAGE_KEYS];
        entries.wide(row, d, k, panels.clone(), s);
    }
    for panel in panels {
        let panel_of_k = &k[panel_at(panel, d + 1)..][..PANEL_KEYS * (d + 1)];
        for (at, flags) in panel_of_k[d * PANEL_KEYS..].chunks_exact(LANES).enumerate() {
            let bits = flags.iter().rev().fold(0_u16, |bits, flag| bits << 1 | u16::from(*flag != 0.0));
            if bits == 0 {
                continue;
            }
            for (row, i) in rows() {
                let s = &mut s[i * PAGE_KEYS + panel * PANEL_KEYS + at * LANES..][..LANES];
                entries.direct(row, d, &panel_of_k[at * LANES..], bits, s);
            }
        }
    }
}

/// A flagged row.
#[derive(Clone, Copy)]
pub(crate) struct WideRow {
    /// What [`pack_row`] left.
    pub(crate) at: *const f32,
    pub(crate) d: usize,
}

/// Scores of a flagged row against panels `panels` of a page, in the second form.
///
/// # Safety
/// The ISA of `L` is enabled. `row` is valid for [`row_words`], `k` for a page of keys of `d + 1` elements, `s` for 256 writes;
/// `panels.end <= 4`.
#[inline(always)]
pub(crate) unsafe fn wide_scores<L: Lanes>(row: WideRow, k: *const f32, panels: Range<usize>, s: *mut f32) {
    let d = row.d;
    // SAFETY: the ranges that the caller vouches for, element by element.
    unsafe {
        let (w, e1, e2) = (row.at.add(2 + d), row.at.add(2 + 2 * d), row.at.add(2 + 3 * d));
        let (one, most) = (L::splat(1.0), L::splat(SATURATED_SUM));
        for panel in panels {
            for key in (0..PANEL_KEYS).step_by(LANES) {
                let k = k.add(panel_at(panel, d + 1) + key);
                let mut sum = L::splat(*row.at.add(1));
                let mut x = 0;
                while x < d {
                    let terms = if x + 1 < d { 2 } else { 1 };
                    let mut weights = [L::zero(); 2];
                    let mut sums = [one; 2];
                    for i in 0..terms {
                        let x = x + i;
                        let key = L::load(k.add(x * PANEL_KEYS));
                        let product = L::mul(L::splat(*e1.add(x)), key);
                        sums[i] = L::min_keep(most, L::fma(product, L::splat(*e2.add(x)), one));
                        weights[i] = L::splat(-2.0 * *w.add(x));
                    }
                    let term =
                        if terms == 2 { pair::<L>(weights, sums) } else { L::div(weights[0], sums[0]) };
                    sum = L::add(sum, term);
                    x += terms;
                }
                L::store(s.add(panel * PANEL_KEYS + key), sum);
            }
        }
    }
}

/// A row against keys that are flagged.
#[derive(Clone, Copy)]
pub(crate) struct DirectRow {
    /// What [`pack_row`] left.
    pub(crate) at: *const f32,
    pub(crate) d: usize,
}

/// Scores of a row against those of 16 keys whose bits are set, in the first form; the others stay.
///
/// # Safety
/// The ISA of `L` is enabled. `row` is valid for [`row_words`], `k` for `d` rows of 16 at a stride of 64, `s` for 16.
#[inline(always)]
pub(crate) unsafe fn direct_scores<L: Lanes>(row: DirectRow, k: *const f32, flagged: u16, s: *mut f32) {
    // SAFETY: the ranges that the caller vouches for, element by element.
    unsafe {
        let (a, w) = (row.at.add(2), row.at.add(2 + row.d));
        let mut sum = L::zero();
        for x in 0..row.d {
            let t = L::add(L::splat(*a.add(x)), L::load(k.add(x * PANEL_KEYS)));
            sum = L::fma(L::splat(*w.add(x)), tanh::<L>(t), sum);
        }
        L::store(s, L::select_bits(flagged, sum, L::load(s)));
    }
}

/// `e^2x = m 2^n` with `m` near 1 and an integer `n`, `|n| <= limit`; NaN where `x` is.
///
/// # Safety
/// The ISA of `L` is enabled.
#[inline(always)]
unsafe fn exponential<L: Lanes>(x: L::V, limit: f32) -> (L::V, L::V) {
    // SAFETY: as the caller vouches.
    unsafe {
        let limit = L::splat(limit);
        let below = L::min_keep(limit, L::mul(x, L::splat(TWO_LOG2_E)));
        let y = L::sub(L::zero(), L::min_keep(limit, L::sub(L::zero(), below)));
        let n = L::rint(y);
        let r = L::sub(y, n);
        let mut m = L::splat(EXP2_POLY[6]);
        for i in (0..6).rev() {
            m = L::fma(m, r, L::splat(EXP2_POLY[i]));
        }
        (m, n)
    }
}

/// 1 where `|x|` is beyond [`FACTORED`] or NaN, else 0.
///
/// # Safety
/// The ISA of `L` is enabled.
#[inline(always)]
unsafe fn is_far<L: Lanes>(x: L::V) -> L::V {
    // SAFETY: as the caller vouches.
    unsafe {
        let beyond = L::splat(FACTORED.next_up());
        L::select_between(L::abs(x), L::zero(), beyond, L::zero(), L::splat(1.0))
    }
}

/// Exponentials of a key's elements; whether it must be flagged, and these not used.
///
/// # Safety
/// The ISA of `L` is enabled.
#[inline(always)]
pub(crate) unsafe fn key_exponentials<L: Lanes>(b: &[f32], f: &mut [f32]) -> bool {
    let mut far = 0.0_f32;
    for (b, f) in b.chunks(LANES).zip(f.chunks_mut(LANES)) {
        let (mut from, mut to) = ([0.0_f32; LANES], [0.0_f32; LANES]);
        from[..b.len()].copy_from_slice(b);
        // SAFETY: the ISA is enabled, and each array is 16 f32.
        unsafe {
            let x = L::load(from.as_ptr());
            let (m, n) = exponential::<L>(x, 125.0);
            L::store(to.as_mut_ptr(), L::scale(m, n));
            far = far.max(L::largest(is_far::<L>(x)));
        }
        f.copy_from_slice(&to[..f.len()]);
    }
    far > 0.0
}

/// Exponentials of a row's elements in two factors; whether the row is flagged.
///
/// # Safety
/// The ISA of `L` is enabled.
#[inline(always)]
pub(crate) unsafe fn row_exponentials<L: Lanes>(a: &[f32], e1: &mut [f32], e2: &mut [f32]) -> bool {
    let mut far = 0.0_f32;
    let outputs = e1.chunks_mut(LANES).zip(e2.chunks_mut(LANES));
    for (a, (e1, e2)) in a.chunks(LANES).zip(outputs) {
        let (mut from, mut to) = ([0.0_f32; LANES], [[0.0_f32; LANES]; 2]);
        from[..a.len()].copy_from_slice(a);
        // SAFETY: the ISA is enabled, and each array is 16 f32.
        unsafe {
            let x = L::load(from.as_ptr());
            let (m, n) = exponential::<L>(x, FAR);
            let half = L::rint(L::mul(n, L::splat(0.5)));
            L::store(to[0].as_mut_ptr(), L::scale(m, half));
            L::store(to[1].as_mut_ptr(), L::scale(L::splat(1.0), L::sub(n, half)));
            far = far.max(L::largest(is_far::<L>(x)));
        }
        e1.copy_from_slice(&to[0][..e1.len()]);
        e2.copy_from_slice(&to[1][..e2.len()]);
    }
    far > 0.0
}

/// Keys as they are resident: exponentials of rows of `d` elements, or these themselves and a flag behind them.
///
/// # Panics
/// If `out` doesn't have `d + 1` elements for each row.
pub(crate) fn flagged_exponentials(kernels: &Kernels, rows: &[f32], d: usize, out: &mut [f32]) {
    assert_eq!(rows.len() / d * (d + 1), out.len());
    for (row, out) in rows.chunks_exact(d).zip(out.chunks_exact_mut(d + 1)) {
        let (f, flag) = out.split_at_mut(d);
        let is_flagged = kernels.reduce().key_exponentials(row, f);
        if is_flagged {
            f.copy_from_slice(row);
        }
        flag.fill(f32::from(u8::from(is_flagged)));
    }
}
