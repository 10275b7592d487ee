//! What a call computes beside its operands: what scores are multiplied by, who sees what, and what a row ends with.
//!
//! [`OperatorParts`] is what somebody asked for, [`Operator`] what makes sense for a shape. Another part is another field of
//! the first, its check in [`Operator::new`], and its share in [`Operator::kernel_id`].

use std::sync::Arc;

use crate::canonical::{CANONICAL_NAN, query_factor};
use crate::compute::Compute;
use crate::dispatch::Kernels;
use crate::mask::{BatchMask, Causal, Mask, MaskError};
use crate::partial::{FinishedRows, PartialRows};
use crate::shape::AttnShape;

/// An operator as somebody typed it; [`Operator::new`] decides whether it makes sense.
#[derive(Clone, Debug, PartialEq)]
pub struct OperatorParts {
    /// What scores are multiplied by: any finite number, of either sign or 0.
    pub scale: f32,
    /// Which keys a row sees.
    pub mask: Mask,
    /// A logit for each query head, `[heads]`, that joins the denominator of each of its rows and has no value; -inf is none.
    pub sinks: Option<Arc<[f32]>>,
    /// What a row is that sees neither a key nor a sink.
    pub empty_row: EmptyRow,
}

impl OperatorParts {
    /// A scale and a causal rule, and nothing else.
    pub fn plain(scale: f32, causal: Causal) -> Self {
        Self { scale, mask: causal.into(), sinks: None, empty_row: EmptyRow::Zero }
    }
}

/// The context of a row that sees nothing. Its lse is -inf whatever the context is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EmptyRow {
    /// Zeros (torch's SDPA, flash-attn, ONNX).
    #[default]
    Zero,
    /// NaN, as a softmax gives that adds -inf to every score.
    Nan,
}

/// Why parts are no operator. The text names the options and both numbers.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum OperatorError {
    /// The scale is NaN or infinite, or becomes infinite in units of the binary logarithm.
    #[error("scale is {scale}")]
    Scale {
        /// As given.
        scale: f32,
    },
    /// Another number of sinks than heads.
    #[error("sinks has {got} logits, num_heads is {heads}")]
    SinkCount {
        /// How many there are.
        got: usize,
        /// How many there should be.
        heads: usize,
    },
    /// A sink is NaN or plus infinity, or becomes infinite in units of the binary logarithm.
    #[error("sinks[{head}] is {logit}")]
    Sink {
        /// Which head.
        head: usize,
        /// As given.
        logit: f32,
    },
    /// The mask makes no sense by itself or for the shape.
    #[error(transparent)]
    Mask(#[from] MaskError),
}

/// What a call computes beside its operands, checked. Cheap to clone.
#[derive(Clone, Debug, PartialEq)]
pub struct Operator {
    parts: OperatorParts,
}

impl Operator {
    /// The operator of these parts, for calls of that shape.
    ///
    /// # Errors
    /// [`OperatorError`] for the first part that makes no sense.
    pub fn new(parts: OperatorParts, shape: &AttnShape) -> Result<Self, OperatorError> {
        if !query_factor(parts.scale).is_finite() {
            return Err(OperatorError::Scale { scale: parts.scale });
        }
        parts.mask.check(shape)?;
        if let Some(sinks) = &parts.sinks {
            if sinks.len() != shape.n_heads() {
                return Err(OperatorError::SinkCount { got: sinks.len(), heads: shape.n_heads() });
            }
            let is_logit = |logit: f32| logit == f32::NEG_INFINITY || query_factor(logit).is_finite();
            if let Some(head) = sinks.iter().position(|logit| !is_logit(*logit)) {
                return Err(OperatorError::Sink { head, logit: sinks[head] });
            }
        }
        Ok(Self { parts })
    }

    /// A scale and a causal rule, which make sense for every shape. Scores of a scale that isn't finite are reported as
    /// overflows.
    pub fn plain(scale: f32, causal: Causal) -> Self {
        Self { parts: OperatorParts::plain(scale, causal) }
    }

    /// What scores are multiplied by.
    pub fn scale(&self) -> f32 {
        self.parts.scale
    }

    /// Which keys a row sees.
    pub fn mask(&self) -> &Mask {
        &self.parts.mask
    }

    /// Which keys the rows of one kv group see.
    pub fn mask_of_group(&self, group: usize, shape: &AttnShape) -> BatchMask<'_> {
        self.parts.mask.of_batch(group / shape.n_kv_heads(), shape)
    }

    /// A logit for each query head, `[heads]`.
    pub fn sinks(&self) -> Option<&[f32]> {
        self.parts.sinks.as_deref()
    }

    /// What a row is that sees neither a key nor a sink.
    pub fn empty_row(&self) -> EmptyRow {
        self.parts.empty_row
    }

    /// Names the order of arithmetic of a call with this operator. What could be asked for before there were operators keeps
    /// the name it had; all else has a name that nodes of that time refuse.
    pub fn kernel_id(&self, compute: Compute) -> &'static str {
        let OperatorParts { scale, mask, sinks, empty_row } = &self.parts;
        let plain =
            *scale > 0.0 && mask.as_causal().is_some() && sinks.is_none() && *empty_row == EmptyRow::Zero;
        match compute {
            _ if plain => compute.kernel_id(),
            Compute::F32 => "c1-f32-op1",
            Compute::Bf16 => "c1-bf16-op1",
            Compute::Int8 => "c1-int8-op1",
        }
    }

    /// Makes the result of one kv group's rows, ordered `[head in group, token]`, over all keys: sinks join on the right,
    /// then rows are divided, and those that saw nothing are filled.
    ///
    /// # Panics
    /// If the group's heads don't divide the rows, or the lengths of the partial don't agree with each other.
    pub fn finish(
        &self,
        rows: PartialRows,
        group: usize,
        shape: &AttnShape,
        kernels: &Kernels,
    ) -> FinishedRows {
        let first_head = group % shape.n_kv_heads() * shape.group_size();
        let rows = match self.sinks() {
            Some(sinks) => rows.with_sinks(&sinks[first_head..][..shape.group_size()], kernels),
            None => rows,
        };
        match self.parts.empty_row {
            EmptyRow::Zero => rows.finish(kernels),
            EmptyRow::Nan => {
                let unseen = rows.unseen();
                let mut finished = rows.finish(kernels);
                finished.fill(&unseen, CANONICAL_NAN);
                finished
            }
        }
    }
}
