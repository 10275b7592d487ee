//! Swin's bias inside windows of a picture (Liu et al., *Swin Transformer*, 2021, section 3.2): an entry of a table by how far apart query and
//! key are in both directions. Where windows are shifted, some hold regions of the picture that aren't neighbours: a constant keeps
//! them apart.

use std::sync::Arc;

use super::BiasError;
use crate::shape::AttnShape;
use crate::slot::PAGE_KEYS;

/// Biases of windows of `height * width` tokens, which are the tokens of a call, row by row; its batch elements are windows.
#[derive(Clone, Debug, PartialEq)]
pub struct Swin {
    /// Rows of a window.
    pub height: usize,
    /// Columns of a window.
    pub width: usize,
    /// `[(2 * height - 1) * (2 * width - 1), heads]`. For a query at `(r, c)` and a key at `(s, d)` it is entry
    /// `(r - s + height - 1) * (2 * width - 1) + c - d + width - 1`.
    pub table: Arc<[f32]>,
    /// Of shifted windows.
    pub shift: Option<Shift>,
}

/// The regions that shifted windows hold.
#[derive(Clone, Debug, PartialEq)]
pub struct Shift {
    /// Of each token, `[windows, height * width]`; batch element `b` is window `b % windows`.
    pub regions: Arc<[u32]>,
    /// Added where query and key are in different regions; -100 in Swin.
    pub between: f32,
}

impl Swin {
    /// Whether the numbers are those of a shape's heads and tokens.
    pub(super) fn check(&self, shape: &AttnShape) -> Result<(), BiasError> {
        let Self { height, width, table, shift } = self;
        let tokens = height.saturating_mul(*width);
        for (dimension, got) in [("q_len", shape.n_queries()), ("kv_len", shape.n_keys())] {
            if got != tokens {
                return Err(BiasError::Window { height: *height, width: *width, dimension, got });
            }
        }
        // Neither is 0, as there are tokens.
        super::check_table("bias.swin", table, (2 * height - 1) * (2 * width - 1), Some(shape.n_heads()))?;
        let Some(Shift { regions, between }) = shift else { return Ok(()) };
        let (got, batch) = (regions.len(), shape.batch());
        let windows = got / tokens;
        if windows == 0 || !got.is_multiple_of(tokens) || !batch.is_multiple_of(windows) {
            return Err(BiasError::Regions { got, tokens, batch });
        }
        if !super::is_bias(*between) {
            return Err(BiasError::Between { between: *between });
        }
        Ok(())
    }

    /// The biases of a row of head `head`, of one batch element.
    pub(crate) fn of_row(&self, batch: usize, head: usize, token: usize) -> SwinRow<'_> {
        SwinRow { swin: self, batch, head, token }
    }
}

/// What one row adds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SwinRow<'a> {
    swin: &'a Swin,
    batch: usize,
    head: usize,
    token: usize,
}

impl SwinRow<'_> {
    /// Values for the keys of `page`: `b`, or `fl(b + between)` for a key in another region. Behind the last key they stay as they are.
    pub(crate) fn fill(&self, page: usize, to: &mut [f32; PAGE_KEYS]) {
        let Swin { height, width, table, shift } = self.swin;
        let (tokens, columns) = (height * width, 2 * width - 1);
        let heads = table.len() / ((2 * height - 1) * columns);
        let (row, column) = (self.token / width + height - 1, self.token % width + width - 1);
        let keys = (page * PAGE_KEYS).min(tokens)..((page + 1) * PAGE_KEYS).min(tokens);
        for (key, to) in keys.clone().zip(to.iter_mut()) {
            let entry = (row - key / width) * columns + column - key % width;
            *to = table[entry * heads + self.head];
        }
        let Some(Shift { regions, between }) = shift else { return };
        let window = &regions[self.batch % (regions.len() / tokens) * tokens..][..tokens];
        for (region, to) in window[keys].iter().zip(to) {
            if *region != window[self.token] {
                *to += between;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_those_of_both_distances() {
        let table: Vec<f32> = (0..2 * 3 * 5).map(|n| n as f32).collect();
        let regions = [0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 7];
        let shift = Some(Shift { regions: regions.into(), between: -100.0 });
        let swin = Swin { height: 2, width: 3, table: table.into(), shift };
        let row = |batch, head, token| {
            let mut row = [f32::NAN; PAGE_KEYS];
            swin.of_row(batch, head, token).fill(0, &mut row);
            assert!(row[6..].iter().all(|value| value.is_nan()));
            row[..6].to_vec()
        };
        // Token 0 is the first of its row and of its column: entries (1, 2) down to (0, 0), of two heads each.
        assert_eq!(row(0, 0, 0), [14.0, 12.0, 10.0, 4.0, 2.0, 0.0]);
        assert_eq!(row(2, 1, 0), [15.0, 13.0, 11.0, 5.0, 3.0, 1.0]);
        assert_eq!(row(0, 0, 4), [26.0, 24.0, 22.0, 16.0, 14.0, 12.0]);
        // The second window has two regions.
        assert_eq!(row(1, 0, 0), [14.0, 12.0, -90.0, 4.0, 2.0, -100.0]);
        assert_eq!(row(3, 0, 5)[..3], [-72.0, -74.0, 24.0]);
    }
}
