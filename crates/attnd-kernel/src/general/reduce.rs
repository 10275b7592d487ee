//! What makes scores of a block's queries and the keys of a page, where that is another sum than a dot product, too.
//!
//! Each reducer is a register tile (a file of its own), and what is packed of a row for it. Like the tiles of dot products, they sum
//! elements in ascending order with one accumulator for each score, so tile shapes can't show in the bits.
//!
//! | reducer | term of the sum over `x` |
//! |---|---|
//! | [`Reducer::Dot`] | `q_x k_x` |
//! | [`Reducer::Distance`] | `(q_x - k_x)^2`, the sum times `-1 / (2 width^2)` |
//! | [`Reducer::Leaky`] | `w_x leaky(a_x + b_x)` |
//! | [`Reducer::Tanh`] | `w_x tanh(a_x + b_x)` |
//! | [`Reducer::Located`] | the same with what previous weights say |

mod distance;
mod leaky;
mod located;
mod tanh;
mod tile;

use std::ops::Range;

pub(crate) use self::distance::Distance;
pub(crate) use self::leaky::Leaky;
pub(crate) use self::located::{Filters, Located, convolve, located_scores};
pub(crate) use self::tanh::{
    DirectRow, Tanh, WideRow, direct_scores, flagged_exponentials, key_exponentials, row_exponentials,
    row_words, wide_scores,
};
pub(crate) use self::tile::{TiledRows, tiles};
use crate::block::QueryLayout;
use crate::dispatch::{GeneralEntries, Kernels, ReduceEntries};
use crate::pages::PANEL_KEYS;
use crate::slot::PAGE_KEYS;

/// A kind of sum over the elements of two rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Reducer {
    Dot,
    /// Squared differences.
    Distance {
        /// Of the Gaussian that the exponential of the score is.
        width: f32,
    },
    /// Weighted sums of a rectifier that leaks.
    Leaky {
        /// Where its argument is negative.
        slope: f32,
    },
    /// Weighted sums of hyperbolic tangents.
    Tanh,
    /// The same, for rows that had weights before.
    Located,
}

impl Reducer {
    /// Elements of a resident key behind those of its row.
    pub(crate) fn flags(self) -> usize {
        match self {
            Self::Dot | Self::Distance { .. } | Self::Leaky { .. } | Self::Located => 0,
            Self::Tanh => 1,
        }
    }

    /// What an element of a sum costs, in multiply-adds of a dot product, as `NOTES.md` of the crate has measured it. Filters are taken
    /// to be few and short.
    pub(crate) fn cost(self) -> usize {
        match self {
            Self::Dot => 1,
            Self::Distance { .. } => 2,
            Self::Leaky { .. } | Self::Tanh => 5,
            Self::Located => 45,
        }
    }
}

/// How a block's rows are packed for a reducer, and the entries that read them so.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    reducer: Reducer,
    n_rows: usize,
    /// Elements of a sum.
    d: usize,
    /// What scores are multiplied by (rules 1 and 11).
    factor: f32,
    general: &'static GeneralEntries,
    entries: &'static ReduceEntries,
}

impl Layout {
    /// The layout for `n_rows` transformed rows of `d` elements.
    pub(crate) fn new(reducer: Reducer, n_rows: usize, d: usize, factor: f32, kernels: &Kernels) -> Self {
        Self { reducer, n_rows, d, factor, general: kernels.general(), entries: kernels.reduce() }
    }

    /// Words of the packed block.
    pub(crate) fn words(&self) -> usize {
        let (in_tile, apart) = self.row_words();
        self.n_rows * (in_tile + apart)
    }

    /// Words of a row in its tile, and of what lies behind all tiles.
    fn row_words(&self) -> (usize, usize) {
        match self.reducer {
            Reducer::Dot | Reducer::Distance { .. } => (self.d, 0),
            Reducer::Leaky { .. } => (2 * self.d, 0),
            Reducer::Located => (0, 2 * self.d),
            Reducer::Tanh => (tanh::tile_words(self.d), tanh::row_words(self.d)),
        }
    }

    /// Packs a block's transformed rows, of which each has `weights` if the reducer has any.
    ///
    /// # Panics
    /// If `q` doesn't have [`Self::words`], or a row has another length.
    pub(crate) fn pack(&self, kernels: &Kernels, rows: &[&[f32]], weights: &[&[f32]], q: &mut [f32]) {
        assert!(q.len() == self.words() && rows.len() == self.n_rows && weights.len() == self.n_rows);
        assert!(rows.iter().all(|row| row.len() == self.d));
        let factor = self.factor;
        match self.reducer {
            Reducer::Dot => {
                kernels.pack_queries(QueryLayout::general(self.n_rows, self.d, kernels), rows, factor, q);
            }
            Reducer::Distance { .. } => {
                interleave(self.entries.tile_rows, self.n_rows, q, |row| rows[row].iter().copied());
            }
            Reducer::Leaky { .. } => {
                let of_row = |row: usize| {
                    let pairs = rows[row].iter().zip(weights[row]);
                    pairs.flat_map(move |(a, w)| [*a, w * factor])
                };
                interleave(self.entries.tile_rows, self.n_rows, q, of_row);
            }
            Reducer::Located => {
                for (to, (row, weights)) in q.chunks_exact_mut(2 * self.d).zip(rows.iter().zip(weights)) {
                    let (a, w) = to.split_at_mut(self.d);
                    a.copy_from_slice(row);
                    w.iter_mut().zip(*weights).for_each(|(to, w)| *to = w * factor);
                }
            }
            Reducer::Tanh => {
                let (tiles, apart) = q.split_at_mut(self.n_rows * tanh::tile_words(self.d));
                let size = tanh::row_words(self.d);
                for (apart, (row, weights)) in apart.chunks_exact_mut(size).zip(rows.iter().zip(weights)) {
                    tanh::pack_row(self.entries, row, weights, factor, apart);
                }
                let of_row = |row: usize| tanh::words_of_tile(&apart[row * size..][..size], self.d);
                interleave(self.entries.tanh_rows, self.n_rows, tiles, of_row);
            }
        }
    }

    /// Scores of packed rows against some panels of page `page`: `s[row * 256 + key]`. What is masked may be anything. `located`
    /// says where a row's attention was before, if the reducer asks for it.
    ///
    /// # Panics
    /// If a slice is too short, or a row has nothing before that should.
    pub(crate) fn scores<'a>(
        &self,
        q: &[f32],
        (k, page): (&[f32], usize),
        panels: Range<usize>,
        located: impl Fn(usize) -> Option<Located<'a>>,
        s: &mut [f32],
    ) {
        let (n_rows, d) = (self.n_rows, self.d);
        match self.reducer {
            Reducer::Dot => self.general.scores(q, n_rows, d, k, panels, s),
            Reducer::Distance { width } => {
                let width = f64::from(width);
                let factor = (f64::from(self.factor) / (-2.0 * width * width)) as f32;
                self.entries.distance(Distance { factor }, q, (n_rows, d), k, panels, s);
            }
            Reducer::Leaky { slope } => {
                self.entries.leaky(Leaky { slope }, q, (n_rows, d), k, panels, s);
            }
            Reducer::Located => {
                let rows = q.chunks_exact(2 * d).zip(s.chunks_exact_mut(PAGE_KEYS));
                for (i, (row, s)) in rows.enumerate() {
                    let Some(located) = located(i) else { panic!("row {i} has no previous weights") };
                    located::scores(self.entries, row, located, (k, page), panels.clone(), s);
                }
            }
            Reducer::Tanh => {
                let (tiles, apart) = q.split_at(n_rows * tanh::tile_words(d));
                self.entries.tanh(tiles, (n_rows, d), k, panels.clone(), s);
                tanh::exact_scores(self.entries, apart, d, k, panels, s);
            }
        }
    }
}

/// Lays the words of rows out tile by tile, inside a tile word by word.
fn interleave<I: Iterator<Item = f32>>(
    tile_rows: usize,
    n_rows: usize,
    q: &mut [f32],
    of_row: impl Fn(usize) -> I,
) {
    let row_words = q.len() / n_rows.max(1);
    for (i, tile) in q.chunks_mut(tile_rows * row_words).enumerate() {
        let rows = tile.len() / row_words;
        for r in 0..rows {
            let words = of_row(i * tile_rows + r);
            tile[r..].iter_mut().step_by(rows).zip(words).for_each(|(to, word)| *to = word);
        }
    }
}

/// Words of panels before panel `panel`, where a key has `key_dim` elements.
fn panel_at(panel: usize, key_dim: usize) -> usize {
    panel * PANEL_KEYS * key_dim
}

#[cfg(test)]
mod tests;
