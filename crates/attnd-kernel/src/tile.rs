//! The two register tiles of the rows-broadcast family, and the loops that cover a page with them.
//!
//! Lanes run over keys in the first product and over value columns in the second; the row operand is broadcast. So
//! each output element has one accumulator that is reduced in ascending order, as the canonical order wants (rules 1
//! and 5), with no horizontal sum anywhere:
//!
//! ```text
//! scores:  S[MR rows][16 NR keys]    += broadcast(q'[row][x]) * K panel[x][keys]      x ascending
//! context: O[MR rows][16 NR columns] += broadcast(p[row][j])  * V panel[j][columns]   j ascending
//! ```
//!
//! `MR x NR` accumulators stay in registers for a whole reduction. A row count that is no multiple of `MR` ends in a
//! smaller tile; the reduction of an element does not depend on the tile it is in.

use std::ops::Range;

use crate::lanes::Lanes;
use crate::pages::{PANEL_COLUMNS, PANEL_KEYS};
use crate::slot::PAGE_KEYS;

/// Calls `$f::<L, rows, $nr>($args)` for a run-time row count of 1 to 6.
macro_rules! with_rows {
    ($rows:expr, $f:ident::<$l:ty, _, $nr:tt>($($arg:expr),*)) => {
        match $rows {
            1 => $f::<$l, 1, $nr>($($arg),*),
            2 => $f::<$l, 2, $nr>($($arg),*),
            3 => $f::<$l, 3, $nr>($($arg),*),
            4 => $f::<$l, 4, $nr>($($arg),*),
            5 => $f::<$l, 5, $nr>($($arg),*),
            _ => $f::<$l, 6, $nr>($($arg),*),
        }
    };
}

/// Rows of the largest tile.
pub(crate) const MAX_ROWS: usize = 6;
/// Steps of a reduction between two looks at the loop counter: counting takes issue slots of the multiply-add pipes.
const UNROLL: usize = 4;

/// Where a query row of a block lies in memory: element `x` at `first + x * stride`.
///
/// Rows lie tile by tile, and inside a tile element by element, so that the score tile reads its broadcasts front to
/// back from one pointer.
pub(crate) struct QueryRow {
    pub(crate) first: usize,
    pub(crate) stride: usize,
}

/// The place of row `row` of `n_rows` rows of `d` elements, for tiles of `tile_rows` rows.
pub(crate) fn query_row(row: usize, n_rows: usize, d: usize, tile_rows: usize) -> QueryRow {
    let tile = row / tile_rows * tile_rows;
    QueryRow { first: tile * d + row - tile, stride: tile_rows.min(n_rows - tile) }
}

/// Scores of `n_rows` rows against panels `panels` of one page: `s[row * 256 + key]`.
///
/// # Safety
/// The ISA of `L` is enabled. `q`, laid out by [`query_row`] with tiles of `MR`, is valid for `n_rows * d` reads, `k` (the page's K panels) for `256 * d`, `s` for
/// `n_rows * 256` writes.
#[inline(always)]
pub(crate) unsafe fn scores<L: Lanes, const MR: usize, const NR: usize>(
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
                    let k = k.add(panel * PANEL_KEYS * d + key);
                    let s = s.add(row * PAGE_KEYS + panel * PANEL_KEYS + key);
                    with_rows!(rows, score_tile::<L, _, NR>(q, d, k, s));
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
unsafe fn score_tile<L: Lanes, const MR: usize, const NR: usize>(
    q: *const f32,
    d: usize,
    k: *const f32,
    s: *mut f32,
) {
    // SAFETY: the ranges above, element by element.
    unsafe {
        let mut acc = [[L::zero(); NR]; MR];
        let whole = d / UNROLL * UNROLL;
        for x in (0..whole).step_by(UNROLL) {
            for i in x..x + UNROLL {
                score_step::<L, MR, NR>(q.add(i * MR), k.add(i * PANEL_KEYS), &mut acc);
            }
        }
        for x in whole..d {
            score_step::<L, MR, NR>(q.add(x * MR), k.add(x * PANEL_KEYS), &mut acc);
        }
        for r in 0..MR {
            for n in 0..NR {
                L::store(s.add(r * PAGE_KEYS + 16 * n), acc[r][n]);
            }
        }
    }
}

/// Adds the products of one dimension.
///
/// # Safety
/// The ISA of `L` is enabled. `q` is valid for `MR` reads, `k` for `16 * NR`.
#[inline(always)]
unsafe fn score_step<L: Lanes, const MR: usize, const NR: usize>(
    q: *const f32,
    k: *const f32,
    acc: &mut [[L::V; NR]; MR],
) {
    // SAFETY: the ranges above, element by element.
    unsafe {
        let mut keys = [L::zero(); NR];
        for n in 0..NR {
            keys[n] = L::load(k.add(16 * n));
        }
        for r in 0..MR {
            let q = L::splat(*q.add(r));
            for n in 0..NR {
                acc[r][n] = L::fma(q, keys[n], acc[r][n]);
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

/// Adds keys `keys` of one page to the context of `n_rows` rows: `o[row * columns + c] += p[row * 256 + j] * v[j][c]`.
///
/// # Safety
/// The ISA of `L` is enabled. `p` is valid for `n_rows * 256` reads, `v` (the page's V panels) for `256 * columns`,
/// `o` for `n_rows * columns` reads and writes; `columns` is a multiple of 16 and `keys.end <= 256`.
#[inline(always)]
pub(crate) unsafe fn context<L: Lanes, const MR: usize, const NR: usize>(
    p: *const f32,
    n_rows: usize,
    v: *const f32,
    keys: Range<usize>,
    columns: usize,
    o: *mut f32,
    start: Start,
) {
    let mut column = 0;
    while column < columns {
        let width = PANEL_COLUMNS.min(columns - column);
        let mut row = 0;
        while row < n_rows {
            let rows = MR.min(n_rows - row);
            let mut strip = 0;
            while strip < width {
                let lanes = NR.min((width - strip) / 16);
                // SAFETY: rows and columns stay inside the ranges that the caller vouches for: column * 256 is where
                // the panel starts, because all panels before it are 64 wide.
                unsafe {
                    let tile = ContextTile {
                        p: p.add(row * PAGE_KEYS),
                        v: v.add(column * PAGE_KEYS + strip),
                        v_stride: width,
                        keys: keys.clone(),
                        o: o.add(row * columns + column + strip),
                        o_stride: columns,
                        start,
                    };
                    match lanes {
                        1 => with_rows!(rows, context_tile::<L, _, 1>(tile)),
                        2 => with_rows!(rows, context_tile::<L, _, 2>(tile)),
                        3 => with_rows!(rows, context_tile::<L, _, 3>(tile)),
                        _ => with_rows!(rows, context_tile::<L, _, 4>(tile)),
                    }
                }
                strip += 16 * lanes;
            }
            row += rows;
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
unsafe fn context_tile<L: Lanes, const MR: usize, const NR: usize>(tile: ContextTile) {
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
        let whole = keys.start + keys.len() / UNROLL * UNROLL;
        for j in (keys.start..whole).step_by(UNROLL) {
            for i in j..j + UNROLL {
                context_step::<L, MR, NR>(p.add(i), v.add(i * v_stride), &mut acc);
            }
        }
        for j in whole..keys.end {
            context_step::<L, MR, NR>(p.add(j), v.add(j * v_stride), &mut acc);
        }
        for r in 0..MR {
            for n in 0..NR {
                L::store(o.add(r * o_stride + 16 * n), acc[r][n]);
            }
        }
    }
}

/// Adds the products of one key.
///
/// # Safety
/// The ISA of `L` is enabled. `p` is valid for `MR` reads at a stride of 256, `v` for `16 * NR`.
#[inline(always)]
unsafe fn context_step<L: Lanes, const MR: usize, const NR: usize>(
    p: *const f32,
    v: *const f32,
    acc: &mut [[L::V; NR]; MR],
) {
    // SAFETY: the ranges above, element by element.
    unsafe {
        let mut values = [L::zero(); NR];
        for n in 0..NR {
            values[n] = L::load(v.add(16 * n));
        }
        for r in 0..MR {
            let p = L::splat(*p.add(r * PAGE_KEYS));
            for n in 0..NR {
                acc[r][n] = L::fma(p, values[n], acc[r][n]);
            }
        }
    }
}
