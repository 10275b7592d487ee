//! What a call computes beside its operands: what scores are multiplied by, who sees what, and what a row ends with.
//!
//! [`OperatorParts`] is what somebody asked for, [`Operator`] what makes sense for a shape. Another part is another field of
//! the first, its check in [`Operator::new`], and its share in [`Operator::kernel_id`].

mod empty_row;
mod transform;

use std::sync::Arc;

pub use self::empty_row::EmptyRow;
pub(crate) use self::transform::Queries;
use crate::bias::{Bias, BiasError, Ramp, RelativeRow, SwinRow};
use crate::canonical::query_factor;
use crate::compute::Compute;
use crate::dispatch::Kernels;
use crate::general::reduce::Reducer;
use crate::mask::{BatchMask, Causal, Csr, CsrError, Mask, MaskError, Selection};
use crate::normaliser::Normaliser;
use crate::partial::{FinishedRows, PartialRows};
use crate::score::{BoundScore, Score, ScoreError};
use crate::shape::AttnShape;

/// An operator as somebody typed it; [`Operator::new`] decides whether it makes sense.
#[derive(Clone, Debug, PartialEq)]
pub struct OperatorParts {
    /// What relates a query to a key.
    pub score: Score,
    /// What scores are multiplied by: any finite number, of either sign or 0.
    pub scale: f32,
    /// Scores become `cap * tanh(score / cap)`, before biases and masks; finite and over 0.
    pub softcap: Option<f32>,
    /// What is added to scores, at most one of each kind.
    pub biases: Vec<Bias>,
    /// Which keys a row sees.
    pub mask: Mask,
    /// Which of these it doesn't see after all.
    pub selection: Option<Selection>,
    /// Blocks of keys that blocks of queries see, and no others.
    pub csr: Option<Csr>,
    /// How scores become weights.
    pub normaliser: Normaliser,
    /// A logit for each query head, `[heads]`, that joins the denominator of each of its rows and has no value; -inf is none.
    pub sinks: Option<Arc<[f32]>>,
    /// What a row is that sees neither a key nor a sink.
    pub empty_row: EmptyRow,
}

impl OperatorParts {
    /// A scale and a causal rule, and nothing else.
    pub fn plain(scale: f32, causal: Causal) -> Self {
        Self {
            score: Score::default(),
            scale,
            softcap: None,
            biases: Vec::new(),
            mask: causal.into(),
            selection: None,
            csr: None,
            normaliser: Normaliser::Softmax,
            sinks: None,
            empty_row: EmptyRow::Zero,
        }
    }
}

impl OperatorParts {
    /// Checks the biases, and puts them into the order in which they are added.
    fn check_biases(&mut self, shape: &AttnShape) -> Result<(), OperatorError> {
        self.biases.sort_by_key(Bias::order);
        if let Some(pair) = self.biases.windows(2).find(|pair| pair[0].order() == pair[1].order()) {
            return Err(OperatorError::Twice { bias: pair[0].name() });
        }
        for bias in &self.biases {
            bias.check_tables(shape)?;
            if bias.uses_positions() {
                self.mask.check_positions(bias.name(), shape)?;
            }
            let Bias::Alibi { slopes, .. } = bias else { continue };
            let (got, heads, batch) = (slopes.len(), shape.n_heads(), shape.batch());
            if got != heads && got != heads * batch {
                return Err(OperatorError::SlopeCount { got, heads, batch });
            }
            if let Some(at) = slopes.iter().position(|slope| !slope.is_finite()) {
                return Err(OperatorError::Slope { at, slope: slopes[at] });
            }
        }
        Ok(())
    }
}

/// Which kernels a call takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Path {
    /// Products and intervals of keys, and nothing in between.
    Plain,
    /// Stages between the products and the weights.
    General,
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
    /// The cap isn't over 0 or not finite, or too small for the scale or too large in units of the binary logarithm.
    #[error("softcap is {cap}, scale is {scale}")]
    Softcap {
        /// As given.
        cap: f32,
        /// What scores are multiplied by.
        scale: f32,
    },
    /// Two biases of a kind.
    #[error("{bias} twice")]
    Twice {
        /// Which kind.
        bias: &'static str,
    },
    /// Another number of slopes than heads.
    #[error("bias.alibi has {got} slopes, num_heads is {heads}, batch is {batch}")]
    SlopeCount {
        /// How many there are.
        got: usize,
        /// Heads of a batch element.
        heads: usize,
        /// Batch elements.
        batch: usize,
    },
    /// A slope is NaN or infinite.
    #[error("bias.alibi.slopes[{at}] is {slope}")]
    Slope {
        /// Which one.
        at: usize,
        /// As given.
        slope: f32,
    },
    /// The sigmoid's bias is NaN or infinite, or becomes infinite in units of the binary logarithm.
    #[error("normaliser.sigmoid_bias is {bias}")]
    SigmoidBias {
        /// As given.
        bias: f32,
    },
    /// Two options that exclude each other.
    #[error("{one} and {other}")]
    Together {
        /// One of them.
        one: &'static str,
        /// The other one.
        other: &'static str,
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
    /// An arithmetic that a score function doesn't have.
    #[error("{compute} and score={function}")]
    ComputeOfScore {
        /// The arithmetic.
        compute: &'static str,
        /// The function.
        function: &'static str,
    },
    /// The score function or its parameters make no sense for the shape.
    #[error(transparent)]
    Score(#[from] ScoreError),
    /// The numbers of a bias make no sense by themselves or for the shape.
    #[error(transparent)]
    Bias(#[from] BiasError),
    /// The block mask makes no sense for the shape.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// The mask makes no sense by itself or for the shape.
    #[error(transparent)]
    Mask(#[from] MaskError),
}

/// What a call computes beside its operands, checked. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Operator {
    parts: OperatorParts,
    /// Of the parts' score; none of what takes rows of any length as they are.
    score: Option<BoundScore>,
}

impl PartialEq for Operator {
    fn eq(&self, other: &Self) -> bool {
        self.parts == other.parts
    }
}

impl Operator {
    /// The operator of these parts, for calls of that shape.
    ///
    /// # Errors
    /// [`OperatorError`] for the first part that makes no sense.
    pub fn new(mut parts: OperatorParts, shape: &AttnShape) -> Result<Self, OperatorError> {
        if !query_factor(parts.scale).is_finite() {
            return Err(OperatorError::Scale { scale: parts.scale });
        }
        if let Some(cap) = parts.softcap {
            let (scale, is_over_0) = (parts.scale, cap > 0.0);
            // A subnormal quotient would lose what is multiplied by the cap again.
            let quotient = scale / cap;
            let keeps_digits = quotient.is_normal() || scale == 0.0;
            if !is_over_0 || !query_factor(cap).is_finite() || !keeps_digits {
                return Err(OperatorError::Softcap { cap, scale });
            }
        }
        parts.mask.check(shape)?;
        if let Some(csr) = &parts.csr {
            csr.check(shape)?;
        }
        parts.check_biases(shape)?;
        if let Normaliser::Sigmoid { bias } = parts.normaliser {
            if !query_factor(bias).is_finite() {
                return Err(OperatorError::SigmoidBias { bias });
            }
            if parts.sinks.is_some() {
                return Err(OperatorError::Together { one: "normaliser=sigmoid", other: "sinks" });
            }
            if parts.empty_row == EmptyRow::Uniform {
                let other = "empty_row=uniform";
                return Err(OperatorError::Together { one: "normaliser=sigmoid", other });
            }
        }
        if let Some(sinks) = &parts.sinks {
            if sinks.len() != shape.n_heads() {
                return Err(OperatorError::SinkCount { got: sinks.len(), heads: shape.n_heads() });
            }
            let is_logit = |logit: f32| logit == f32::NEG_INFINITY || query_factor(logit).is_finite();
            if let Some(head) = sinks.iter().position(|logit| !is_logit(*logit)) {
                return Err(OperatorError::Sink { head, logit: sinks[head] });
            }
        }
        let score = Some(parts.score.bind(shape)?);
        Ok(Self { parts, score })
    }

    /// A scale and a causal rule, which make sense for every shape. Scores of a scale that isn't finite are reported as
    /// overflows.
    pub fn plain(scale: f32, causal: Causal) -> Self {
        Self { parts: OperatorParts::plain(scale, causal), score: None }
    }

    /// What makes a score of a query and a key.
    pub fn score(&self) -> &Score {
        &self.parts.score
    }

    /// What scores are multiplied by.
    pub fn scale(&self) -> f32 {
        self.parts.scale
    }

    /// Which kernels a call with this operator takes.
    pub fn path(&self) -> Path {
        let OperatorParts { softcap, biases, selection, csr, mask, normaliser, .. } = &self.parts;
        let is_dot = self.score.as_ref().is_none_or(|score| score.reducer() == Reducer::Dot);
        let is_plain = is_dot
            && softcap.is_none()
            && biases.is_empty()
            && selection.is_none()
            && csr.is_none()
            && mask.leaves_intervals()
            && *normaliser == Normaliser::Softmax;
        if is_plain { Path::Plain } else { Path::General }
    }

    /// Refuses an arithmetic that the operator's kernels don't have.
    ///
    /// # Errors
    /// [`OperatorError::Together`] for dot products of narrow elements on the general path, and
    /// [`OperatorError::ComputeOfScore`] for those of rows that aren't as they were sent.
    pub fn check_compute(&self, compute: Compute) -> Result<(), OperatorError> {
        let OperatorParts { softcap, biases, selection, csr, mask, .. } = &self.parts;
        let one = match compute {
            Compute::F32 => return Ok(()),
            _ if self.path() == Path::Plain && self.parts.score.is_scaled_dot() => return Ok(()),
            Compute::Bf16 => "compute=bf16",
            Compute::Int8 => "compute=int8",
        };
        if !self.parts.score.is_scaled_dot() {
            let function = self.parts.score.function().name;
            return Err(OperatorError::ComputeOfScore { compute: one, function });
        }
        let other = match (softcap, biases.first(), selection) {
            (Some(_), _, _) => "softcap",
            (None, Some(bias), _) => bias.name(),
            (None, None, Some(Selection::Dense)) => "mask.dense",
            (None, None, None) if csr.is_some() => "mask.csr",
            (None, None, None) if !mask.leaves_intervals() => "mask.documents",
            (None, None, None) => "normaliser=sigmoid",
        };
        Err(OperatorError::Together { one, other })
    }

    /// What queries are multiplied by (rules 1 and 11).
    pub(crate) fn factor(&self) -> f32 {
        match self.parts.softcap {
            None => query_factor(self.parts.scale),
            Some(cap) => self.parts.scale / cap,
        }
    }

    /// `fl(cap * log2 e)`, where scores are capped.
    pub(crate) fn cap(&self) -> Option<f32> {
        self.parts.softcap.map(query_factor)
    }

    /// Scores become `cap * tanh(score / cap)`.
    pub fn softcap(&self) -> Option<f32> {
        self.parts.softcap
    }

    /// What is added to scores, in this order.
    pub fn biases(&self) -> &[Bias] {
        &self.parts.biases
    }

    /// Which keys of its interval a row doesn't see.
    pub fn selection(&self) -> Option<Selection> {
        self.parts.selection
    }

    /// Blocks of keys that blocks of queries see.
    pub fn csr(&self) -> Option<&Csr> {
        self.parts.csr.as_ref()
    }

    /// How scores become weights.
    pub fn normaliser(&self) -> Normaliser {
        self.parts.normaliser
    }

    /// The linear bias of the row of query token `token` of head `head`, flattened over the batch.
    pub(crate) fn ramp(&self, head: usize, token: usize, mask: &BatchMask<'_>) -> Option<Ramp> {
        self.parts.biases.iter().find_map(|bias| match bias {
            Bias::Alibi { slopes, by_key } => {
                let slope = slopes[head % slopes.len()];
                let origin = if *by_key { mask.first_key(token) } else { mask.position(token) };
                Some(Ramp { slope, origin: origin as f32, by_key: *by_key })
            }
            _ => None,
        })
    }

    /// The bias by buckets of a row of query head `head`, of one batch element.
    pub(crate) fn relative(&self, head: usize, position: i64) -> Option<RelativeRow<'_>> {
        self.parts.biases.iter().find_map(|bias| match bias {
            Bias::Relative(relative) => Some(relative.of_row(head, position)),
            _ => None,
        })
    }

    /// The bias inside of windows of a row of query head `head`, of one batch element.
    pub(crate) fn swin(&self, batch: usize, head: usize, token: usize) -> Option<SwinRow<'_>> {
        self.parts.biases.iter().find_map(|bias| match bias {
            Bias::Swin(swin) => Some(swin.of_row(batch, head, token)),
            _ => None,
        })
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
    /// the name it had; all else has a name that nodes of that time refuse, and what the general path computes one that nodes
    /// refuse that have the plain path only.
    pub fn kernel_id(&self, compute: Compute) -> &'static str {
        if !self.parts.score.is_scaled_dot() || self.parts.csr.is_some() {
            return kernel_id_of_op3(compute);
        }
        let OperatorParts { scale, mask, biases, sinks, empty_row, .. } = &self.parts;
        // Positions that no rule asks for change no bit; outputs may ask for them.
        let asks = mask.uses_positions() || biases.iter().any(Bias::uses_positions);
        let is_causal = mask.as_causal().is_some()
            || !asks && Mask { positions: None, ..mask.clone() }.as_causal().is_some();
        let is_old = *scale > 0.0 && is_causal && sinks.is_none() && *empty_row == EmptyRow::Zero;
        match (self.path(), compute) {
            (Path::Plain, compute) if is_old => compute.kernel_id(),
            (Path::Plain, Compute::F32) => "c1-f32-op1",
            (Path::Plain, Compute::Bf16) => "c1-bf16-op1",
            (Path::Plain, Compute::Int8) => "c1-int8-op1",
            (Path::General, Compute::F32) => "c1-f32-op2",
            // Names of orders that no kernel has: `check_compute` refuses both.
            (Path::General, Compute::Bf16) => "c1-bf16-op2",
            (Path::General, Compute::Int8) => "c1-int8-op2",
        }
    }

    /// Makes the result of one kv group's rows, ordered `[head in group, token]`, over all keys: sinks join on the right,
    /// then rows are divided, and those that saw nothing are filled, with `mean` if they are uniform (see [`Self::divide`]).
    ///
    /// # Panics
    /// If the group's heads don't divide the rows, or the lengths of the partial don't agree with each other; if rows are
    /// uniform and there is no mean of their length.
    pub fn finish(
        &self,
        rows: PartialRows,
        group: usize,
        shape: &AttnShape,
        mean: Option<&[f32]>,
        kernels: &Kernels,
    ) -> FinishedRows {
        self.divide(self.join_sinks(rows, group, shape, kernels), mean, kernels)
    }

    /// The first half of [`Self::finish`]: sinks join. What it leaves in `m` and `l` is what a second pass over the rows
    /// divides by, see [`crate::RowSums`].
    ///
    /// # Panics
    /// If the group's heads don't divide the rows, or the lengths of the partial don't agree with each other.
    #[must_use]
    pub fn join_sinks(
        &self,
        rows: PartialRows,
        group: usize,
        shape: &AttnShape,
        kernels: &Kernels,
    ) -> PartialRows {
        let first_head = group % shape.n_kv_heads() * shape.group_size();
        match self.sinks() {
            Some(sinks) => rows.with_sinks(&sinks[first_head..][..shape.group_size()], kernels),
            None => rows,
        }
    }
}

/// Names the order of calls whose score isn't the scaled dot product that nodes have computed since there are operators, or that have
/// masks of blocks, which nodes of the first general path would ignore.
fn kernel_id_of_op3(compute: Compute) -> &'static str {
    match compute {
        Compute::F32 => "c1-f32-op3",
        Compute::Bf16 => "c1-bf16-op3",
        Compute::Int8 => "c1-int8-op3",
    }
}
