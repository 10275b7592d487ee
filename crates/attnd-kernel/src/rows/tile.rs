//! The loops that cover a page with the two register tiles of the rows-broadcast family.
//!
//! A row count that is no multiple of `MR` ends in a smaller tile.

use std::ops::Range;

use crate::lanes::Lanes;
use crate::pages::{PANEL_COLUMNS, PANEL_KEYS};
use crate::product::{Operand, reduce};
use crate::slot::PAGE_KEYS;
use crate::storage::Stored;

/// Calls `$f::<L, S, rows, $nr, $ahead>($args)` for a run-time row count of 1 to `$mr`, which is at most 6. Constant conditions
/// keep the tiles that an ISA doesn't have from being compiled.
macro_rules! with_rows {
    ($rows:expr, $mr:ident, $f:ident::<$l:ty, $s:ty, _, $nr:tt, $ahead:tt>($($arg:expr),*)) => {
        match $rows {
            6 => if const { $mr >= 6 } { $f::<$l, $s, 6, $nr, $ahead>($($arg),*) },
            5 => if const { $mr >= 5 } { $f::<$l, $s, 5, $nr, $ahead>($($arg),*) },
            4 => if const { $mr >= 4 } { $f::<$l, $s, 4, $nr, $ahead>($($arg),*) },
            3 => if const { $mr >= 3 } { $f::<$l, $s, 3, $nr, $ahead>($($arg),*) },
            2 => if const { $mr >= 2 } { $f::<$l, $s, 2, $nr, $ahead>($($arg),*) },
            _ => $f::<$l, $s, 1, $nr, $ahead>($($arg),*),
        }
    };
}

/// Rows of the largest tile.
pub(super) const MAX_ROWS: usize = 6;

/// How far ahead of its use a tile of `rows` rows asks for a line of a panel, in words, where the CPU wants it asked for
/// `ahead` words before.
///
/// With one or two rows a core runs far enough ahead by itself. With more, the multiply-adds between two lines fill its
/// window before the lines of the next 4 KiB are on their way.
#[inline(always)]
const fn ahead_of(rows: usize, ahead: usize) -> usize {
    if rows > 2 { ahead } else { 0 }
}

/// Scores of `n_rows` rows against panels `panels` of one page: `s[row * 256 + key]`.
///
/// # Safety
/// The ISA of `L` is enabled. `q`, laid out in tiles of `MR` rows (`QueryLayout::Tiles`), is valid for `n_rows * d` reads, `k` (the page's K panels) for their words, `s` for
/// `n_rows * 256` writes.
#[inline(always)]
pub(super) unsafe fn scores<L: Lanes, S: Stored, const MR: usize, const NR: usize, const AHEAD: usize>(
    q: *const f32,
    n_rows: usize,
    d: usize,
    k: *const f32,
    panels: Range<usize>,
    s: *mut f32,
) {
    for panel in panels {
        // The panel stays in the first-level cache while the row tiles pass over it.
        let mut row = 0;
        while row < n_rows {
            let rows = MR.min(n_rows - row);
            let mut key = 0;
            while key < PANEL_KEYS {
                // SAFETY: row + rows <= n_rows and key + 16 * NR <= 64, so every address is inside the ranges that the
                // caller vouches for.
                unsafe {
                    let q = q.add(row * d);
                    let k = k.add(panel * PANEL_KEYS * d.div_ceil(S::PER_WORD) + key);
                    let s = s.add(row * PAGE_KEYS + panel * PANEL_KEYS + key);
                    with_rows!(rows, MR, score_tile::<L, S, _, NR, AHEAD>(q, d, k, s));
                }
                key += 16 * NR;
            }
            row += rows;
        }
    }
}

/// # Safety
/// The ISA of `L` is enabled. `q` is valid for `d` times `MR` elements; `k` for `d` rows of `16 * NR` at a stride of 64; `s`
/// for writing `MR` rows of `16 * NR` at a stride of 256.
#[inline(always)]
unsafe fn score_tile<L: Lanes, S: Stored, const MR: usize, const NR: usize, const AHEAD: usize>(
    q: *const f32,
    d: usize,
    k: *const f32,
    s: *mut f32,
) {
    // SAFETY: the ranges above, element by element.
    unsafe {
        let mut acc = [[L::zero(); NR]; MR];
        let (q, k) = (Operand { at: q, step: MR }, Operand { at: k, step: PANEL_KEYS });
        reduce::<L, S, MR, NR, 1>(q, k, 0..d, ahead_of(MR, AHEAD), &mut acc);
        for r in 0..MR {
            for n in 0..NR {
                L::store(s.add(r * PAGE_KEYS + 16 * n), acc[r][n]);
            }
        }
    }
}

/// Where the accumulators of a context tile start.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// From +0: the first keys of a page.
    Zero,
    /// From what is in the output: further keys of the same page.
    Output,
}

/// Adds keys `keys` of one page to the context of `n_rows` rows: `o[row * columns + c] += p[row * 256 + j] * v[j][c]`.
///
/// # Safety
/// The ISA of `L` is enabled. `p` is valid for `n_rows * 256` reads, `v` (the page's V panels) for their words,
/// `o` for `n_rows * columns` reads and writes; `columns` is a multiple of 16 and `keys.end <= 256`.
#[inline(always)]
pub(super) unsafe fn context<L: Lanes, S: Stored, const MR: usize, const NR: usize, const AHEAD: usize>(
    p: *const f32,
    n_rows: usize,
    v: *const f32,
    keys: Range<usize>,
    columns: usize,
    o: *mut f32,
    start: Start,
) {
    // Where rows take turns on the values, they do so while these are in the first-level cache.
    let run = if MR == 1 && n_rows > 1 { PANEL_KEYS } else { PAGE_KEYS };
    let mut column = 0;
    while column < columns {
        let width = PANEL_COLUMNS.min(columns - column);
        let mut from = keys.start;
        loop {
            let part = from..keys.end.min(from + run);
            let start = if from == keys.start { start } else { Start::Output };
            let mut row = 0;
            while row < n_rows {
                let rows = MR.min(n_rows - row);
                let mut strip = 0;
                while strip < width {
                    let lanes = NR.min((width - strip) / 16);
                    // SAFETY: rows and columns stay inside the ranges that the caller vouches for: column * 256 is
                    // where the panel starts, because all panels before it are 64 wide.
                    unsafe {
                        let tile = ContextTile {
                            p: p.add(row * PAGE_KEYS),
                            v: v.add(column * PAGE_KEYS / S::PER_WORD + strip),
                            v_stride: width,
                            keys: part.clone(),
                            o: o.add(row * columns + column + strip),
                            o_stride: columns,
                            start,
                        };
                        match lanes {
                            4 => {
                                if const { NR >= 4 } {
                                    with_rows!(rows, MR, context_tile::<L, S, _, 4, AHEAD>(tile));
                                }
                            }
                            3 => {
                                if const { NR >= 3 } {
                                    with_rows!(rows, MR, context_tile::<L, S, _, 3, AHEAD>(tile));
                                }
                            }
                            2 => {
                                if const { NR >= 2 } {
                                    with_rows!(rows, MR, context_tile::<L, S, _, 2, AHEAD>(tile));
                                }
                            }
                            _ => with_rows!(rows, MR, context_tile::<L, S, _, 1, AHEAD>(tile)),
                        }
                    }
                    strip += 16 * lanes;
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
    p: *const f32,
    v: *const f32,
    v_stride: usize,
    keys: Range<usize>,
    o: *mut f32,
    o_stride: usize,
    start: Start,
}

/// # Safety
/// The ISA of `L` is enabled. `p` is valid for `MR` rows at a stride of 256, `v` for `16 * NR` columns of each key, `o`
/// for reading and writing `MR` rows of `16 * NR` columns.
#[inline(always)]
unsafe fn context_tile<L: Lanes, S: Stored, const MR: usize, const NR: usize, const AHEAD: usize>(
    tile: ContextTile,
) {
    let ContextTile { p, v, v_stride, keys, o, o_stride, start } = tile;
    // SAFETY: the ranges above, element by element.
    unsafe {
        let mut acc = [[L::zero(); NR]; MR];
        if start == Start::Output {
            for r in 0..MR {
                for n in 0..NR {
                    acc[r][n] = L::load(o.add(r * o_stride + 16 * n));
                }
            }
        }
        let (p, v) = (Operand { at: p, step: 1 }, Operand { at: v, step: v_stride });
        reduce::<L, S, MR, NR, PAGE_KEYS>(p, v, keys, ahead_of(MR, AHEAD), &mut acc);
        for r in 0..MR {
            for n in 0..NR {
                L::store(o.add(r * o_stride + 16 * n), acc[r][n]);
            }
        }
    }
}
