//! The loops that cover a page with a reducer's register tile.

use std::ops::Range;

use crate::lanes::{LANES, Lanes};
use crate::pages::PANEL_KEYS;
use crate::slot::PAGE_KEYS;

/// Rows of the largest tile of any ISA.
pub(crate) const MAX_ROWS: usize = 4;

/// A register tile: scores of a few rows and a few vectors of keys.
///
/// # Safety
/// An implementation reads what [`Tile::tile`] says and nothing else.
pub(crate) unsafe trait Tile<L: Lanes>: Copy {
    /// Words of a row before those of its elements.
    const HEADER: usize;
    /// Words of an element of a row.
    const WORDS: usize;
    /// Elements of a key behind those that are summed.
    const FLAGS: usize;

    /// # Safety
    /// The ISA of `L` is enabled. `q` is valid for the words of `MR` rows of `d` elements, word by word; `k` for `d` rows of
    /// `16 * NR` at a stride of 64; `s` for writing `MR` rows of `16 * NR` at a stride of 256.
    unsafe fn tile<const MR: usize, const NR: usize>(
        self,
        q: *const f32,
        d: usize,
        k: *const f32,
        s: *mut f32,
    );
}

/// The packed rows of a block.
#[derive(Clone, Copy)]
pub(crate) struct TiledRows {
    pub(crate) at: *const f32,
    pub(crate) n_rows: usize,
    /// Elements of a sum.
    pub(crate) d: usize,
}

/// Scores of rows against panels `panels` of one page: `s[row * 256 + key]`.
///
/// # Safety
/// The ISA of `L` is enabled. `q` is valid for the words of its rows in tiles of `MR`, `k` for a page of keys of `d + T::FLAGS`
/// elements, `s` for `n_rows * 256` writes; `panels.end <= 4`.
#[inline(always)]
pub(crate) unsafe fn tiles<L: Lanes, T: Tile<L>, const MR: usize, const NR: usize>(
    tile: T,
    q: TiledRows,
    k: *const f32,
    panels: Range<usize>,
    s: *mut f32,
) {
    const { assert!(MR <= MAX_ROWS && PANEL_KEYS.is_multiple_of(LANES * NR)) };
    let TiledRows { at, n_rows, d } = q;
    for panel in panels {
        // The panel stays in the first-level cache while the row tiles pass over it.
        let mut row = 0;
        while row < n_rows {
            let rows = MR.min(n_rows - row);
            for key in (0..PANEL_KEYS).step_by(LANES * NR) {
                // SAFETY: rows and keys stay inside what the caller vouches for; all tiles before this one are of whole rows.
                unsafe {
                    let q = at.add(row * (T::HEADER + T::WORDS * d));
                    let k = k.add(panel * PANEL_KEYS * (d + T::FLAGS) + key);
                    let s = s.add(row * PAGE_KEYS + panel * PANEL_KEYS + key);
                    match rows {
                        4 => {
                            if const { MR >= 4 } {
                                tile.tile::<4, NR>(q, d, k, s);
                            }
                        }
                        3 => {
                            if const { MR >= 3 } {
                                tile.tile::<3, NR>(q, d, k, s);
                            }
                        }
                        2 => {
                            if const { MR >= 2 } {
                                tile.tile::<2, NR>(q, d, k, s);
                            }
                        }
                        _ => tile.tile::<1, NR>(q, d, k, s),
                    }
                }
            }
            row += rows;
        }
    }
}
