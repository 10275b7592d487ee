//! The pooled map of weights of some heads: sums that join exactly, and the means that they are of.

use std::ops::Range;

use super::outputs::{Outputs, overlap};

/// Sums of weights by head, row of the map and column of the map, as integers. Parts of it, of other keys or other query tokens, join in
/// any order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heat {
    /// Heads of the kv group, counted from its first.
    pub heads: Range<usize>,
    /// Rows of the map.
    pub rows: Range<usize>,
    /// Columns of the map, all of them.
    pub columns: usize,
    /// `[heads, rows, columns]`, in a unit that [`Outputs`] know.
    pub cells: Vec<i64>,
}

impl Heat {
    /// The rows of a group's map that have some of `tokens`, with nothing in them; nothing at all if no map is wanted.
    pub fn empty(wanted: &Outputs, group: usize, tokens: &Range<usize>) -> Self {
        let Some((_, columns)) = wanted.parts().heatmap else { return Self::default() };
        let (heads, rows) = (wanted.heads_of_group(group), wanted.heat_rows_of(tokens));
        let cells = vec![0; heads.len() * rows.len() * columns];
        Self { heads, rows, columns, cells }
    }

    /// Adds what another part has in rows of this one; its other rows are left out. So the maps of ranges of tokens join in the map of
    /// all of them, a row at a time if need be.
    ///
    /// # Panics
    /// If the two are of other heads or columns, or have not as many cells as they say.
    pub fn merge(&mut self, part: &Self) {
        assert_eq!(
            (&self.heads, self.columns),
            (&part.heads, part.columns),
            "heads and columns of a heatmap"
        );
        let n_cells = |heat: &Self| heat.heads.len() * heat.rows.len() * heat.columns;
        assert!(n_cells(self) == self.cells.len() && n_cells(part) == part.cells.len(), "cells of a heatmap");
        let shared = overlap(&self.rows, &part.rows);
        if shared.is_empty() {
            return;
        }
        let width = shared.len() * self.columns;
        for head in 0..self.heads.len() {
            let at = |heat: &Self| (head * heat.rows.len() + shared.start - heat.rows.start) * heat.columns;
            let (to, from) = (at(self), at(part));
            let from = &part.cells[from..][..width];
            for (to, from) in self.cells[to..][..width].iter_mut().zip(from) {
                *to = to.saturating_add(*from);
            }
        }
    }

    /// The map: of each cell the mean, over the query tokens of its row, of the weight of its keys, `[heads, rows, columns]`. It is the
    /// whole one where all nodes and all tokens of these rows have joined; then a row sums to 1 less the sink's mean share, and less
    /// the share of tokens that see nothing.
    pub fn means(&self, wanted: &Outputs) -> Vec<f32> {
        let Some(bins) = wanted.heat_rows() else { return Vec::new() };
        let unit = 2.0_f64.powi(-wanted.units.heat);
        let of_row = |(i, cells): (usize, &[i64])| {
            let tokens = bins.tokens(self.rows.start + i % self.rows.len()) as f64;
            cells.iter().map(|cell| (*cell as f64 * unit / tokens) as f32).collect::<Vec<_>>()
        };
        self.cells.chunks(self.columns.max(1)).enumerate().flat_map(of_row).collect()
    }
}
