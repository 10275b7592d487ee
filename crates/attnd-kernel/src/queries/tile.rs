//! The loops that cover a page with the two register tiles of the family with lanes = queries.

use std::ops::Range;

use super::softmax::Extremes;
use crate::arithmetic::Arithmetic;
use crate::block::Span;
use crate::lanes::{LANES, Lanes};
use crate::pages::{PANEL_COLUMNS, PANEL_KEYS};
use crate::product::{Ask, Operand, Scales, reduce, words_of_ask};
use crate::slot::PAGE_KEYS;

/// All keys of a page, for every lane.
pub(super) const WHOLE_PAGE: Span = Span { hull: 0..PAGE_KEYS, shared: 0..PAGE_KEYS };

/// Calls `$f::<L, A, MR, NR>($args)` on as many full tiles as fit into `$len` elements and then on smaller ones; `$at` is
/// the first element of each.
macro_rules! cover {
    ($len:expr, |$at:ident| $f:ident::<$l:ty, $a:ty, $mr:tt, $nr:tt $(, $careful:tt)?>($($arg:expr),*)) => {{
        let mut $at = 0;
        let len: usize = $len;
        while len - $at >= $mr {
            $f::<$l, $a, $mr, $nr $(, $careful)?>($($arg),*);
            $at += $mr;
        }
        if $mr > 4 && len - $at >= 4 {
            $f::<$l, $a, 4, $nr $(, $careful)?>($($arg),*);
            $at += 4;
        }
        if $mr > 2 && len - $at >= 2 {
            $f::<$l, $a, 2, $nr $(, $careful)?>($($arg),*);
            $at += 2;
        }
        debug_assert_eq!(len, $at);
    }};
}
#[cfg(all(feature = "free-order", target_arch = "x86_64"))]
pub(super) use cover;

/// What is asked of memory while a page is worked on: the cache lines of the one that comes next. A last-level cache that many
/// cores share answers so late that a core which only runs ahead by itself waits for every page.
pub(super) struct Next {
    at: *const f32,
    lines: usize,
    other: *const f32,
}

impl Next {
    /// The lines of `words`. Where there are no more, that of `other` is asked for again and again, which is in the cache: to look
    /// whether one shall be asked for would take as long.
    pub(super) fn new(words: &[f32], other: &[f32]) -> Self {
        Self { at: words.as_ptr(), lines: words.len() / LANES, other: other.as_ptr() }
    }

    /// Those that a reduction over `elements` elements asks for. The last ones, too few for a reduction, are left to the core.
    #[inline(always)]
    fn take<L: Lanes, A: Arithmetic<L>>(&mut self, elements: usize) -> Ask {
        let (at, lines) = (self.at, elements / A::PER_WORD / words_of_ask(A::PARTS));
        if self.lines < lines {
            return Ask::Later { at: self.other, step: 0 };
        }
        self.lines -= lines;
        self.at = at.wrapping_add(LANES * lines);
        Ask::Later { at, step: LANES }
    }
}

/// Scores of the keys of a page, `s[key * lanes + lane]`, at least for those in `keys.hull`; their extremes.
///
/// # Safety
/// The ISA of `L`, and what `A` needs, is enabled. `k` (the page's K panels) and `q` are valid for the words of `d`
/// dimensions, `q` in rows of `16 * NR`, `s` for
/// writing 256 rows of `16 * NR`.
#[inline(always)]
pub(super) unsafe fn scores<L: Lanes, A: Arithmetic<L>, const MR: usize, const NR: usize>(
    k: *const f32,
    d: usize,
    keys: &Span,
    q: *const f32,
    s: *mut f32,
    next: &mut Next,
) -> Extremes<L, NR> {
    // SAFETY: every tile lies inside a panel of 64 keys.
    unsafe {
        let mut extremes = Extremes::none();
        for panel in keys.hull.start / PANEL_KEYS..keys.hull.end.div_ceil(PANEL_KEYS) {
            let first = panel * PANEL_KEYS;
            let panel = Panel {
                k: k.add(first * d.div_ceil(A::PER_WORD)),
                d,
                wanted: keys.hull.start.saturating_sub(first)..keys.hull.end - first,
            };
            let s = s.add(first * LANES * NR);
            cover!(PANEL_KEYS, |key| score_tile::<L, A, MR, NR>(&panel, q, s, key, next, &mut extremes));
        }
        extremes
    }
}

/// 64 keys of a page.
struct Panel {
    k: *const f32,
    /// Dimensions.
    d: usize,
    /// The keys whose scores somebody reads.
    wanted: Range<usize>,
}

/// Scores of `MR` keys from `key` on, if one of them is wanted.
///
/// # Safety
/// The ISA of `L`, and what `A` needs, is enabled. The panel is valid for the words of its dimensions, and `key + MR <= 64`; `q` is
/// valid for as many rows of `16 * NR`, `s` for writing 64.
#[inline(always)]
unsafe fn score_tile<L: Lanes, A: Arithmetic<L>, const MR: usize, const NR: usize>(
    panel: &Panel,
    q: *const f32,
    s: *mut f32,
    key: usize,
    next: &mut Next,
    extremes: &mut Extremes<L, NR>,
) {
    let Panel { k, d, wanted } = panel;
    if key + MR <= wanted.start || wanted.end <= key {
        return;
    }
    // SAFETY: the ranges above, element by element.
    unsafe {
        let mut acc = [[L::zero(); NR]; MR];
        let (k, q) = (Operand { at: k.add(key), step: PANEL_KEYS }, Operand { at: q, step: LANES * NR });
        // Keys and queries change places, so that it is the words of a query that lie in lanes.
        let ask = next.take::<L, A>(A::reduced(*d));
        reduce::<L, A, MR, NR, 1>(k, q, Scales::None, 0..A::reduced(*d), ask, &mut acc);
        for n in 0..NR {
            for r in 0..MR {
                L::store(s.add(LANES * (NR * (key + r) + n)), acc[r][n]);
                extremes.largest[n] = L::max(extremes.largest[n], acc[r][n]);
                extremes.smallest[n] = L::min(extremes.smallest[n], acc[r][n]);
            }
        }
    }
}

/// What happens to the output of a page when its sum is complete: it merges with partials that wait.
pub(super) struct Merge {
    /// How many.
    pub(super) merges: usize,
    /// The output behind that of the first partial to merge with; those lie `size` apart, backwards.
    pub(super) left: *const f32,
    pub(super) size: usize,
    /// `[left, right]` of each merge.
    pub(super) factors: *const f32,
    /// Where the result goes.
    pub(super) to: *mut f32,
}

/// Adds up the values of one page by weight, merges, and stores: `o[column * lanes + lane]`.
///
/// A key that a lane doesn't see has the weight 0 there, and its product adds nothing: at most the sign of a zero, which
/// rule 8 drops. Only where some value of `keys.hull` is NaN or infinite, so that 0 times it is NaN, are such products undone.
///
/// # Safety
/// The ISA of `L`, and what `A` needs, is enabled. `v` (the page's V panels) is valid for its words, `columns` a multiple of 16, `seen`
/// for two rows of `16 * NR`, `p` for 256; each output of `merge` for `columns` rows, and its factors for two a merge.
#[inline(always)]
pub(super) unsafe fn context<L: Lanes, A: Arithmetic<L>, const MR: usize, const NR: usize>(
    v: *const f32,
    columns: usize,
    keys: &Span,
    seen: *const f32,
    p: *const f32,
    merge: &Merge,
    next: &mut Next,
) {
    let words = keys.hull.start / A::PER_WORD..keys.hull.end.div_ceil(A::PER_WORD);
    // SAFETY: first * 256 is where a panel starts, because all panels before it are 64 wide; tiles stay inside one.
    unsafe {
        let is_careful = *keys != WHOLE_PAGE && !are_finite::<L, A>(v, columns, words.clone());
        for first in (0..columns).step_by(PANEL_COLUMNS) {
            let width = PANEL_COLUMNS.min(columns - first);
            let v = Operand { at: v.add(first * PAGE_KEYS / A::PER_WORD), step: width };
            if is_careful {
                // Small tiles, for want of registers beside the bounds of the lanes.
                cover!(width, |column| context_tile::<L, A, 2, NR, true>(
                    v.at_word(column),
                    first + column,
                    &words,
                    seen,
                    p,
                    merge,
                    next
                ));
            } else {
                cover!(width, |column| context_tile::<L, A, MR, NR, false>(
                    v.at_word(column),
                    first + column,
                    &words,
                    seen,
                    p,
                    merge,
                    next
                ));
            }
        }
    }
}

/// Whether no value of some words of a page is NaN or infinite.
///
/// # Safety
/// The ISA of `L`, and what `A` needs, is enabled; `v` is valid for the words of a page's values.
#[inline(always)]
unsafe fn are_finite<L: Lanes, A: Arithmetic<L>>(v: *const f32, columns: usize, words: Range<usize>) -> bool {
    // SAFETY: rows of words lie panel by panel, each as wide as its panel.
    unsafe {
        // Products with 0 are 0 or NaN, which stays; four sums, so that they don't wait for each other.
        let mut sums = [L::zero(); PANEL_COLUMNS / LANES];
        for first in (0..columns).step_by(PANEL_COLUMNS) {
            let width = PANEL_COLUMNS.min(columns - first);
            let v = v.add(first * PAGE_KEYS / A::PER_WORD);
            for word in words.clone() {
                for n in 0..width / LANES {
                    let values = L::load(v.add(word * width + LANES * n));
                    sums[n] = A::multiply_add(values, L::zero(), sums[n]);
                }
            }
        }
        let sum = sums.into_iter().fold(L::zero(), |sum, other| L::add(sum, other));
        L::halving_sum(sum) == 0.0
    }
}

/// `MR` columns of a panel, from `column` of all on, where `v` begins. `CAREFUL`: products of keys that a lane doesn't see are undone.
///
/// # Safety
/// As [`context`]; `v` is the panel from that column on, which has `MR` more, and `words` are inside a page.
#[inline(always)]
unsafe fn context_tile<L: Lanes, A: Arithmetic<L>, const MR: usize, const NR: usize, const CAREFUL: bool>(
    v: Operand,
    column: usize,
    words: &Range<usize>,
    seen: *const f32,
    p: *const f32,
    merge: &Merge,
    next: &mut Next,
) {
    // SAFETY: the ranges above, element by element.
    unsafe {
        let mut acc = [[L::zero(); NR]; MR];
        let at = LANES * NR * column;
        let p = Operand { at: p, step: LANES * NR };
        if CAREFUL {
            for word in words.clone() {
                visible_step::<L, A, MR, NR>(v, p, word, seen, &mut acc);
            }
        } else {
            let elements = words.start * A::PER_WORD..words.end * A::PER_WORD;
            let ask = next.take::<L, A>(elements.len());
            reduce::<L, A, MR, NR, 1>(v, p, Scales::None, elements, ask, &mut acc);
        }
        for i in 0..merge.merges {
            let left = merge.left.sub((i + 1) * merge.size).add(at);
            for n in 0..NR {
                let a = L::load(merge.factors.add(LANES * (NR * 2 * i + n)));
                let b = L::load(merge.factors.add(LANES * (NR * (2 * i + 1) + n)));
                for r in 0..MR {
                    let left = L::load(left.add(LANES * (NR * r + n)));
                    acc[r][n] = L::fma(left, a, L::mul(acc[r][n], b));
                }
            }
        }
        for r in 0..MR {
            for n in 0..NR {
                L::store(merge.to.add(at + LANES * (NR * r + n)), acc[r][n]);
            }
        }
    }
}

/// Adds the products of one word, an element or a pair, in the lanes that see its keys.
///
/// # Safety
/// The ISA of `L`, and what `A` needs, is enabled. At `word`, `v` is valid for `MR` reads and `p` for `16 * NR`; `seen` is for two
/// rows of `16 * NR`.
#[inline(always)]
unsafe fn visible_step<L: Lanes, A: Arithmetic<L>, const MR: usize, const NR: usize>(
    v: Operand,
    p: Operand,
    word: usize,
    seen: *const f32,
    acc: &mut [[L::V; NR]; MR],
) {
    const { assert!(A::PER_WORD <= 2) };
    // SAFETY: the ranges above, element by element.
    unsafe {
        let (v, p) = (v.at.add(word * v.step), p.at.add(word * p.step));
        let key = word * A::PER_WORD;
        let (key, last) = (L::splat(key as f32), L::splat((key + A::PER_WORD - 1) as f32));
        for n in 0..NR {
            let (first, end) = (L::load(seen.add(LANES * n)), L::load(seen.add(LANES * (NR + n))));
            let p = L::load(p.add(LANES * n));
            for r in 0..MR {
                let (v, before) = (L::splat(*v.add(r)), acc[r][n]);
                let mut sum = before;
                if A::PER_WORD == 2 {
                    sum = L::select_between(key, first, end, A::multiply_add(A::only(v, 0), p, before), sum);
                    sum = L::select_between(last, first, end, A::multiply_add(A::only(v, 1), p, before), sum);
                }
                // Where the first key is seen, counted from one key later, so is the last one.
                let first = if A::PER_WORD == 2 { L::add(first, L::splat(1.0)) } else { first };
                acc[r][n] = L::select_between(last, first, end, A::multiply_add(v, p, before), sum);
            }
        }
    }
}
