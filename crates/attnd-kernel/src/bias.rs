//! What is added to scores: one file for each kind of bias. Each computes its values in natural units, in f32, and the general path
//! adds them by rule 13, one kind after the other in the order in which they stand here.
//!
//! | bias | value for query token `i` at position `p`, key `j` |
//! |---|---|
//! | [`Bias::Dense`] | an element of a tensor, which travels beside the call |
//! | [`Bias::Alibi`] | `fl(-m * abs(p - j))`, or `fl(m * (j - first))` |
//! | [`Bias::Relative`] | an entry of a table, by the bucket of `j - p` |
//! | [`Bias::Swin`] | an entry of a table, by the distances of `i` and `j` in a window; `fl(b + between)` across regions |

mod alibi;
mod relative;
mod swin;

use std::sync::Arc;

pub use self::alibi::alibi_slopes;
pub(crate) use self::alibi::{Ramp, fill_ramp};
pub use self::relative::Relative;
pub(crate) use self::relative::RelativeRow;
pub(crate) use self::swin::SwinRow;
pub use self::swin::{Shift, Swin};
use crate::canonical::query_factor;
use crate::shape::AttnShape;

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
    /// By buckets of the distance (T5).
    Relative(Relative),
    /// By distances in two dimensions (Swin).
    Swin(Swin),
}

impl Bias {
    /// Where the kind stands in the order of addition; a call has at most one of each.
    pub(crate) fn order(&self) -> usize {
        match self {
            Self::Dense => 0,
            Self::Alibi { .. } => 1,
            Self::Relative(_) => 2,
            Self::Swin(_) => 3,
        }
    }

    /// Whether it is about where queries stand among the keys.
    pub(crate) fn uses_positions(&self) -> bool {
        match self {
            Self::Dense | Self::Swin(_) => false,
            Self::Alibi { by_key, .. } => !by_key,
            Self::Relative(_) => true,
        }
    }

    /// What it is called in refusals.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Dense => "bias.dense",
            Self::Alibi { .. } => "bias.alibi",
            Self::Relative(_) => "bias.relative",
            Self::Swin(_) => "bias.swin",
        }
    }

    /// Whether a table is one for a shape.
    pub(crate) fn check_tables(&self, shape: &AttnShape) -> Result<(), BiasError> {
        match self {
            Self::Dense | Self::Alibi { .. } => Ok(()),
            Self::Relative(relative) => {
                check_table(self.name(), relative.table(), relative.buckets(), Some(shape.n_heads()))
            }
            Self::Swin(swin) => swin.check(shape),
        }
    }
}

/// Why numbers make no bias. The text names the option and both numbers.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum BiasError {
    /// Too few buckets for one of each kind and direction.
    #[error("bias.relative has {got} buckets, at least {least} are needed")]
    Buckets {
        /// How many there are.
        got: usize,
        /// How many there must be.
        least: usize,
    },
    /// No distances for buckets that share them.
    #[error("bias.relative.max_distance is {got}, {buckets} buckets count up to {exact} one by one")]
    MaxDistance {
        /// As given.
        got: u32,
        /// Rows of the table.
        buckets: usize,
        /// Distances that have buckets of their own.
        exact: usize,
    },
    /// Another number of entries than rows times heads.
    #[error("{bias}.table has {got} numbers, {rows} for each of {heads} heads are needed")]
    Table {
        /// Which bias.
        bias: &'static str,
        /// How many there are.
        got: usize,
        /// Rows of the table.
        rows: usize,
        /// Heads of a batch element.
        heads: usize,
    },
    /// No whole number of entries for each row.
    #[error("{bias}.table has {got} numbers, no multiple of {rows}")]
    Ragged {
        /// Which bias.
        bias: &'static str,
        /// How many there are.
        got: usize,
        /// Rows of the table.
        rows: usize,
    },
    /// An entry is NaN or infinite, or becomes infinite in units of the binary logarithm.
    #[error("{bias}.table[{at}] is {value}")]
    Entry {
        /// Which bias.
        bias: &'static str,
        /// Which entry.
        at: usize,
        /// As given.
        value: f32,
    },
    /// Windows of another size than the tokens.
    #[error("bias.swin has windows of {height} * {width} tokens, {dimension} is {got}")]
    Window {
        /// Rows of a window.
        height: usize,
        /// Columns of a window.
        width: usize,
        /// What differs, as the API spells it.
        dimension: &'static str,
        /// What it is.
        got: usize,
    },
    /// Regions of no whole number of windows, or of one that doesn't divide the batch.
    #[error("bias.swin.regions has {got} numbers, windows have {tokens} tokens, batch is {batch}")]
    Regions {
        /// How many there are.
        got: usize,
        /// Tokens of a window.
        tokens: usize,
        /// Batch elements.
        batch: usize,
    },
    /// What keeps regions apart is NaN or infinite, or becomes infinite in units of the binary logarithm.
    #[error("bias.swin.between is {between}")]
    Between {
        /// As given.
        between: f32,
    },
}

/// Whether a number can be added to scores in units of the binary logarithm.
fn is_bias(value: f32) -> bool {
    query_factor(value).is_finite()
}

/// Checks a table of `rows` rows, with a column for each of some heads, or of as many as it has columns.
fn check_table(
    bias: &'static str,
    table: &[f32],
    rows: usize,
    heads: Option<usize>,
) -> Result<(), BiasError> {
    let got = table.len();
    match heads {
        Some(heads) if got != rows.saturating_mul(heads) => {
            return Err(BiasError::Table { bias, got, rows, heads });
        }
        None if got == 0 || !got.is_multiple_of(rows) => return Err(BiasError::Ragged { bias, got, rows }),
        Some(_) | None => {}
    }
    match table.iter().position(|value| !is_bias(*value)) {
        Some(at) => Err(BiasError::Entry { bias, at, value: table[at] }),
        None => Ok(()),
    }
}
