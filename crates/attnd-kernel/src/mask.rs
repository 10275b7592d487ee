//! Which keys a query token sees. Most masks are one interval of keys per row: `interval.rs` has the rules that
//! make it, `documents.rs` the runs of sequences that are packed into one. Kernels compute the pages of that interval and
//! look at no other. What masks single keys of the interval besides takes the general path: `selection.rs` has the bits of a page, `csr.rs`
//! blocks, and `runs.rs` how lists become bits.

mod csr;
mod documents;
mod interval;
mod runs;
mod selection;

use std::ops::Range;

pub use self::csr::{Csr, CsrError};
pub use self::documents::{Documents, Run};
pub use self::interval::{BatchMask, Mask, MaskError, PerBatch, Positions, Window};
pub(crate) use self::runs::KeyRuns;
pub(crate) use self::selection::PageBits;
pub use self::selection::Selection;
use crate::shape::AttnShape;

/// The causal rules, short for a [`Mask`] that has no other. With `Tq` queries and `Tk` keys, query `i` sees key `j` when:
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Causal {
    /// Always.
    #[default]
    None,
    /// `j <= i + (Tk - Tq)`: the last query sees every key (flash-attn, a cache that was just appended to). Where
    /// `Tq > Tk` the first `Tq - Tk` rows see no key.
    BottomRight,
    /// `j <= i` (torch's `is_causal`, Keras, JAX).
    TopLeft,
}

impl Causal {
    /// The keys that query token `token` sees.
    pub fn visible(self, token: usize, shape: &AttnShape) -> Range<usize> {
        Mask::from(self).of_batch(0, shape).visible(token)
    }
}

impl From<Causal> for Mask {
    fn from(causal: Causal) -> Self {
        let positions = match causal {
            Causal::None => return Self::default(),
            Causal::BottomRight => Positions::BottomRight,
            Causal::TopLeft => Positions::TopLeft,
        };
        Self { causal: true, positions: Some(positions), ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::Dims;

    fn visible_ends(causal: Causal, queries: u64, keys: u64) -> Vec<usize> {
        let dims = Dims { batch: 1, heads: 1, kv_heads: 1, queries, keys, head_dim: 1, value_dim: 1 };
        let shape = AttnShape::new(dims).unwrap();
        (0..shape.n_queries()).map(|i| causal.visible(i, &shape).end).collect()
    }

    #[test]
    fn alignment_decides_what_the_first_and_last_rows_see() {
        assert_eq!(visible_ends(Causal::None, 2, 5), [5, 5]);
        assert_eq!(visible_ends(Causal::BottomRight, 2, 5), [4, 5]);
        assert_eq!(visible_ends(Causal::TopLeft, 2, 5), [1, 2]);
        assert_eq!(visible_ends(Causal::BottomRight, 5, 2), [0, 0, 0, 1, 2]);
        assert_eq!(visible_ends(Causal::TopLeft, 5, 2), [1, 2, 2, 2, 2]);
    }

    #[test]
    fn a_causal_rule_is_the_mask_that_it_is_short_for() {
        for causal in [Causal::None, Causal::BottomRight, Causal::TopLeft] {
            assert_eq!(Mask::from(causal).as_causal(), Some(causal));
        }
        let windowed = Mask { window: Window { left: Some(3), right: None }, ..Causal::TopLeft.into() };
        assert_eq!(windowed.as_causal(), None);
    }
}
