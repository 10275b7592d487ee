//! The loops that cover a page with the two register tiles of the rows-broadcast family.
//!
//! A row count that is no multiple of `MR` ends in a smaller tile.

use std::ops::Range;

use crate::arithmetic::Arithmetic;
use crate::lanes::{LANES, Lanes};
use crate::pages::{PANEL_COLUMNS, PANEL_KEYS};
use crate::product::{Ask, Operand, Scales, reduce};
use crate::slot::PAGE_KEYS;

/// Calls `$f::<L, A, rows, $nr, $ahead>($args)` for a run-time row count of 1 to `$mr`, which is at most 6. Constant conditions
/// keep the tiles that an ISA doesn't have from being compiled.
macro_rules! with_rows {
    ($rows:expr, $mr:ident, $f:ident::<$l:ty, $a:ty, _, $nr:tt, $ahead:tt>($($arg:expr),*)) => {
        match $rows {
            6 => if const { $mr >= 6 } { $f::<$l, $a, 6, $nr, $ahead>($($arg),*) },
            5 => if const { $mr >= 5 } { $f::<$l, $a, 5, $nr, $ahead>($($arg),*) },
            4 => if const { $mr >= 4 } { $f::<$l, $a, 4, $nr, $ahead>($($arg),*) },
            3 => if const { $mr >= 3 } { $f::<$l, $a, 3, $nr, $ahead>($($arg),*) },
            2 => if const { $mr >= 2 } { $f::<$l, $a, 2, $nr, $ahead>($($arg),*) },
            _ => $f::<$l, $a, 1, $nr, $ahead>($($arg),*),
        }
    };
}

/// Rows of the largest tile.
pub(crate) const MAX_ROWS: usize = 6;

/// How far ahead of its use a tile of `rows` rows asks for a line of a panel, in words, where the CPU wants it asked for
/// `ahead` words before.
///
/// With one or two rows a core runs far enough ahead by itself. With more, the multiply-adds between two lines fill its
/// window before the lines of the next 4 KiB are on their way.
#[inline(always)]
const fn ahead_of(rows: usize, ahead: usize) -> Ask {
    if rows > 2 && ahead > 0 { Ask::Ahead(ahead) } else { Ask::Nothing }
}

/// The queries of some rows.
#[derive(Clone, Copy)]
pub(crate) struct Queries {
    /// Laid out in tiles of `MR` rows, as `QueryLayout::Tiles` says.
    pub(crate) at: *const f32,
    pub(crate) n_rows: usize,
    pub(crate) d: usize,
    /// Where queries are integers, what those of each row are multiplied by.
    pub(crate) scales: *const f32,
}

/// The K panels or the V panels of a page.
#[derive(Clone, Copy)]
pub(crate) struct Panels {
    pub(crate) at: *const f32,
    /// Where elements are integers, what those of each of the 256 keys or values are multiplied by.
    pub(crate) scales: *const f32,
}

/// Scores of some rows against panels `panels` of one page: `s[row * 256 + key]`.
///
/// # Safety
/// The ISA of `L`, and what `A` needs, is enabled. `q` is valid for the words of its rows, `k` for those of the panels' keys, and of a
/// page's where `AHEAD` isn't 0, `s` for `n_rows * 256` writes.
#[inline(always)]
pub(crate) unsafe fn scores<
    L: Lanes,
    A: Arithmetic<L>,
    const MR: usize,
    const NR: usize,
    const AHEAD: usize,
>(
    q: Queries,
    k: Panels,
    panels: Range<usize>,
    s: *mut f32,
) {
    let (row_words, key_words) = (A::broadcasts(q.d), q.d.div_ceil(A::PER_WORD));
    for panel in panels {
        // The panel stays in the first-level cache while the row tiles pass over it.
        let mut row = 0;
        while row < q.n_rows {
            let rows = MR.min(q.n_rows - row);
            let mut key = 0;
            while key < PANEL_KEYS {
                // SAFETY: row + rows <= n_rows and key + 16 * NR <= 64, so every address is inside the ranges that the
                // caller vouches for.
                unsafe {
                    let first = panel * PANEL_KEYS;
                    let q = Queries {
                        at: q.at.add(row * row_words),
                        scales: if A::INTEGERS { q.scales.add(row) } else { q.scales },
                        ..q
                    };
                    let k = Panels {
                        at: k.at.add(first * key_words + key),
                        scales: if A::SCALED || A::INTEGERS { k.scales.add(first + key) } else { k.scales },
                    };
                    let s = s.add(row * PAGE_KEYS + first + key);
                    with_rows!(rows, MR, score_tile::<L, A, _, NR, AHEAD>(q, k, s));
                }
                key += LANES * NR;
            }
            row += rows;
        }
    }
}

/// # Safety
/// The ISA of `L`, and what `A` needs, is enabled. `q` is valid for the words of `MR` rows; `k` for rows of `16 * NR` words at a
/// stride of 64; `s` for writing `MR` rows of `16 * NR` at a stride of 256.
#[inline(always)]
unsafe fn score_tile<L: Lanes, A: Arithmetic<L>, const MR: usize, const NR: usize, const AHEAD: usize>(
    q: Queries,
    k: Panels,
    s: *mut f32,
) {
    // SAFETY: the ranges above, element by element.
    unsafe {
        let mut acc = [[L::zero(); NR]; MR];
        let operands = (Operand { at: q.at, step: MR }, Operand { at: k.at, step: PANEL_KEYS });
        let (elements, ahead) = (0..A::reduced(q.d), ahead_of(MR, AHEAD));
        let scales = Scales::OfLanes(k.scales);
        reduce::<L, A, MR, NR, 1>(operands.0, operands.1, scales, elements, ahead, &mut acc);
        for r in 0..MR {
            for n in 0..NR {
                let mut score = A::value(acc[r][n]);
                if A::INTEGERS {
                    let scale = L::mul(L::load(k.scales.add(LANES * n)), L::splat(*q.scales.add(r)));
                    score = L::mul(score, scale);
                }
                L::store(s.add(r * PAGE_KEYS + LANES * n), score);
            }
        }
    }
}

/// Where the accumulators of a context tile start.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// From +0: the first keys of a page.
    Zero,
    /// From what is in the output: further keys of the same page.
    Output,
}

/// The weights of some rows over a page.
#[derive(Clone, Copy)]
pub(crate) struct Weights {
    /// `[n_rows][256]`; of packed ones the words come first.
    pub(crate) at: *const f32,
    pub(crate) n_rows: usize,
    /// Where weights are integers, what those of each row are multiplied by.
    pub(crate) scales: *const f32,
}

/// Where a context goes: `[n_rows][columns]`.
#[derive(Clone, Copy)]
pub(crate) struct Output {
    pub(crate) at: *mut f32,
    /// A multiple of 16.
    pub(crate) columns: usize,
    pub(crate) start: Start,
}

/// Adds keys `keys` of one page to the context of some rows: `o[row * columns + c] += p[row * 256 + j] * v[j][c]`.
///
/// # Safety
/// The ISA of `L`, and what `A` needs, is enabled. `p` is valid for the words of its rows, `v` for those of a page's values,
/// `o` for reading and writing its rows; `keys.end <= 256`. Integers start from zero.
#[inline(always)]
pub(crate) unsafe fn context<
    L: Lanes,
    A: Arithmetic<L>,
    const MR: usize,
    const NR: usize,
    const AHEAD: usize,
>(
    p: Weights,
    v: Panels,
    keys: Range<usize>,
    o: Output,
) {
    // Where rows take turns on the values, they do so while these are in the first-level cache.
    let run = if MR == 1 && p.n_rows > 1 && !A::INTEGERS { PANEL_KEYS } else { PAGE_KEYS };
    let mut column = 0;
    while column < o.columns {
        let width = PANEL_COLUMNS.min(o.columns - column);
        let mut from = keys.start;
        loop {
            let part = from..keys.end.min(from + run);
            let start = if from == keys.start { o.start } else { Start::Output };
            let mut row = 0;
            while row < p.n_rows {
                let rows = MR.min(p.n_rows - row);
                let mut strip = 0;
                while strip < width {
                    let lanes = NR.min((width - strip) / LANES);
                    // SAFETY: rows and columns stay inside the ranges that the caller vouches for: column * 256 is
                    // where the panel starts, because all panels before it are 64 wide.
                    unsafe {
                        let tile = ContextTile {
                            p: Weights {
                                at: p.at.add(row * PAGE_KEYS),
                                scales: if A::INTEGERS { p.scales.add(row) } else { p.scales },
                                ..p
                            },
                            v: Panels { at: v.at.add(column * PAGE_KEYS / A::PER_WORD + strip), ..v },
                            v_stride: width,
                            keys: part.clone(),
                            o: Output { at: o.at.add(row * o.columns + column + strip), start, ..o },
                        };
                        match lanes {
                            4 => {
                                if const { NR >= 4 } {
                                    with_rows!(rows, MR, context_tile::<L, A, _, 4, AHEAD>(tile));
                                }
                            }
                            3 => {
                                if const { NR >= 3 } {
                                    with_rows!(rows, MR, context_tile::<L, A, _, 3, AHEAD>(tile));
                                }
                            }
                            2 => {
                                if const { NR >= 2 } {
                                    with_rows!(rows, MR, context_tile::<L, A, _, 2, AHEAD>(tile));
                                }
                            }
                            _ => with_rows!(rows, MR, context_tile::<L, A, _, 1, AHEAD>(tile)),
                        }
                    }
                    strip += LANES * lanes;
                }
                row += rows;
            }
            from = part.end;
            if from == keys.end {
                break;
            }
        }
        column += width;
    }
}

struct ContextTile {
    p: Weights,
    v: Panels,
    v_stride: usize,
    keys: Range<usize>,
    o: Output,
}

/// # Safety
/// The ISA of `L`, and what `A` needs, is enabled. `p` is valid for `MR` rows at a stride of 256, `v` for `16 * NR` columns of each
/// key, `o` for reading and writing `MR` rows of `16 * NR` columns.
#[inline(always)]
unsafe fn context_tile<L: Lanes, A: Arithmetic<L>, const MR: usize, const NR: usize, const AHEAD: usize>(
    tile: ContextTile,
) {
    let ContextTile { p, v, v_stride, keys, o } = tile;
    // SAFETY: the ranges above, element by element.
    unsafe {
        let mut acc = [[L::zero(); NR]; MR];
        if !A::INTEGERS && o.start == Start::Output {
            for r in 0..MR {
                for n in 0..NR {
                    acc[r][n] = L::load(o.at.add(r * o.columns + LANES * n));
                }
            }
        }
        let operands = (Operand { at: p.at, step: 1 }, Operand { at: v.at, step: v_stride });
        let (scales, ahead) = (Scales::OfElements(v.scales), ahead_of(MR, AHEAD));
        reduce::<L, A, MR, NR, PAGE_KEYS>(operands.0, operands.1, scales, keys, ahead, &mut acc);
        for r in 0..MR {
            for n in 0..NR {
                let mut sum = A::value(acc[r][n]);
                if A::INTEGERS {
                    sum = L::mul(sum, L::splat(*p.scales.add(r)));
                }
                L::store(o.at.add(r * o.columns + LANES * n), sum);
            }
        }
    }
}
