//! What rows are that see neither a key nor a sink, and how rows end.

use super::Operator;
use crate::canonical::CANONICAL_NAN;
use crate::dispatch::Kernels;
use crate::normaliser::Normaliser;
use crate::partial::{FinishedRows, PartialRows};

/// The context of a row that sees nothing. Its lse is -inf whatever the context is, and what is told beside the context is of
/// keys that are seen: weights, masses and entropies of such a row are 0, and it has no best keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EmptyRow {
    /// Zeros (torch's SDPA, flash-attn, ONNX).
    #[default]
    Zero,
    /// NaN, as a softmax gives that adds -inf to every score.
    Nan,
    /// The mean of the values over all keys of the kv group ([`crate::ValueSum`]), as a softmax gives whose masks replace scores by,
    /// or add to them, a large negative number that is finite (JAX, Keras, Hugging Face's eager attention): all scores end up equal.
    /// Such a mask is one row of numbers over all keys, in which padding is hidden as later keys are, so the mean counts padding and
    /// everything else that K has. Values that rows don't see are in it, so with infinities or NaN among them so is the mean. Not
    /// with sigmoids, which sum to no 1.
    Uniform,
}

impl Operator {
    /// The same, with 0 in rows that see nothing: partials are as they were, because such rows are filled when all has merged.
    #[must_use]
    pub fn without_empty_row(&self) -> Self {
        let mut zero = self.clone();
        zero.parts.empty_row = EmptyRow::Zero;
        zero
    }

    /// The second half of [`Self::finish`], for rows that sinks have joined. `mean` is that of the kv group's values, `[value_dim]`,
    /// which [`EmptyRow::Uniform`] puts into rows that saw nothing, and which nothing else reads.
    ///
    /// # Panics
    /// If the lengths of the partial don't agree with each other; if rows are uniform and there is no mean of their length,
    /// whether or not one of them saw nothing.
    pub fn divide(&self, rows: PartialRows, mean: Option<&[f32]>, kernels: &Kernels) -> FinishedRows {
        let nan;
        let filling = match self.parts.empty_row {
            EmptyRow::Zero => None,
            EmptyRow::Nan => {
                nan = vec![CANONICAL_NAN; rows.value_dim];
                Some(&nan[..])
            }
            EmptyRow::Uniform => {
                let of_length = mean.filter(|mean| mean.len() == rows.value_dim);
                assert!(
                    of_length.is_some(),
                    "uniform rows of {} need the mean of their values",
                    rows.value_dim
                );
                of_length
            }
        };
        let unseen = filling.map_or_else(Vec::new, |_| rows.unseen());
        let mut finished = match self.parts.normaliser {
            Normaliser::Softmax => rows.finish(kernels),
            Normaliser::Sigmoid { .. } => rows.finish_sigmoid(kernels),
        };
        finished.fill(&unseen, filling.unwrap_or_default());
        finished
    }
}
