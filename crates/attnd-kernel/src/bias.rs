//! What is added to scores: one file for each kind of bias. Each computes its values in natural units, in f32, and the general path
//! adds them by rule 13, one kind after the other in the order in which they stand here.
//!
//! | bias | value for query token at position `p`, key `j` |
//! |---|---|
//! | [`Bias::Dense`] | an element of a tensor, which travels beside the call |
//! | [`Bias::Alibi`] | `fl(-m * abs(p - j))`, or `fl(m * (j - first))` |

mod alibi;

use std::sync::Arc;

pub use self::alibi::alibi_slopes;
pub(crate) use self::alibi::{Ramp, fill_ramp};

/// A kind of bias and its parameters.
#[derive(Clone, Debug, PartialEq)]
pub enum Bias {
    /// The planes of `Side::bias`.
    Dense,
    /// Linear in the distance, or in the key's position.
    Alibi {
        /// Of each head, `[heads]`, or of each head of each batch element, `[batch * heads]`. Finite.
        slopes: Arc<[f32]>,
        /// `+m * (j - first)` instead of `-m * abs(p - j)` (BLOOM, MPT): under a causal mask the same weights, and another lse.
        /// `first` is the first key that is no padding, in the document of the query.
        by_key: bool,
    },
}

impl Bias {
    /// Where the kind stands in the order of addition; a call has at most one of each.
    pub(crate) fn order(&self) -> usize {
        match self {
            Self::Dense => 0,
            Self::Alibi { .. } => 1,
        }
    }

    /// Whether it is about where queries stand among the keys.
    pub(crate) fn uses_positions(&self) -> bool {
        match self {
            Self::Dense => false,
            Self::Alibi { by_key, .. } => !by_key,
        }
    }

    /// What it is called in refusals.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Dense => "bias.dense",
            Self::Alibi { .. } => "bias.alibi",
        }
    }
}
