//! Which keys a query token sees. Every mask of this crate is one interval of keys per row.

mod selection;

use std::ops::Range;

pub(crate) use self::selection::PageBits;
use crate::shape::AttnShape;

/// The causal rules. With `Tq` queries and `Tk` keys, query `i` sees key `j` when:
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
        let (queries, keys) = (shape.n_queries(), shape.n_keys());
        let end = match self {
            Self::None => keys,
            Self::BottomRight => (token + 1 + keys).saturating_sub(queries),
            Self::TopLeft => token + 1,
        };
        0..end.min(keys)
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
}
