//! What a caller hands over: operands and options, checked before anything is sent.

use std::sync::Arc;
use std::time::Duration;

use attnd_kernel::{
    AttnShape, Bias, Causal, Csr, Dtype, EmptyRow, Mask, Normaliser, Operator, OperatorParts, OutputsParts,
    Relative, Score, Selection, Swin, alibi_slopes,
};
use attnd_plan::{SideTensor, Tensor, WorkerChoice};
use attnd_wire::{Begin, Error, operator, outputs, projection, refusal};
use bytes::Bytes;

use crate::error::ClientError;
use crate::side::{DenseTensor, KvSource, beside};

/// Q, K and V of one call, little-endian elements in C order. Cloning copies no tensor.
#[derive(Clone, Debug)]
pub struct Operands {
    /// Dimensions.
    pub shape: AttnShape,
    /// Element type of all three.
    pub dtype: Dtype,
    /// `[batch, heads, queries, query_dim]`, where `query_dim` is `head_dim` unless a score function takes another.
    pub q: Bytes,
    /// `[batch, kv_heads, keys, head_dim]`; empty where workers make keys and values ([`AttendOptions::source`]).
    pub k: Bytes,
    /// `[batch, kv_heads, keys, value_dim]`; empty there too, and where values are the first elements of keys
    /// ([`AttnShape::with_values_from_keys`]).
    pub v: Bytes,
}

/// How to compute. The default: dot products times `1 / sqrt(head_dim)`, no mask, finite operands only, as many workers as pay
/// off, and the coordinator's own time limit.
#[derive(Clone, Debug, Default)]
pub struct AttendOptions {
    /// What relates a query to a key.
    pub score: Score,
    /// The weights that each row had before, `[batch, heads, queries, keys]`, for score functions that look at them (`location_aware`).
    /// Each of the first three dimensions is the call's or 1, which is for all.
    pub previous: Option<DenseTensor>,
    /// What scores are multiplied by: any finite number, of either sign or 0. `None`: what the score function says.
    pub scale: Option<f32>,
    /// Scores become `cap * tanh(score / cap)`, before biases and masks; finite and over 0.
    pub softcap: Option<f32>,
    /// A bias linear in the distance.
    pub alibi: Option<Alibi>,
    /// A bias by buckets of the distance (T5).
    pub relative: Option<Relative>,
    /// A bias by distances in two dimensions (Swin).
    pub swin: Option<Swin>,
    /// The causal rule; short for one in `mask`.
    pub causal: Causal,
    /// Which keys a query sees, of those that `causal` lets through. Where it has no positions of its own, those of
    /// `causal` are its.
    pub mask: Mask,
    /// Which of these it doesn't see after all: a bool for each query and key, true where it does. Numbers are added to
    /// the scores instead, as `dense_bias` is.
    pub dense_mask: Option<DenseTensor>,
    /// Blocks of keys that blocks of queries see, and no others.
    pub csr: Option<Csr>,
    /// Numbers to add to the scores. A key whose number is -inf or the lowest finite one of the type is not seen.
    pub dense_bias: Option<DenseTensor>,
    /// How scores become weights; no sigmoid has sinks.
    pub normaliser: Normaliser,
    /// A logit for each query head of one batch element, `[heads]`, that joins the denominator of its rows.
    pub sinks: Option<Arc<[f32]>>,
    /// The context of rows that see neither a key nor a sink. No sigmoid has uniform ones.
    pub empty_row: EmptyRow,
    /// What is wanted beside the context. It costs a second pass over the scores.
    pub outputs: OutputsParts,
    /// Lets NaN and infinities through; they follow IEEE 754 into the rows that see them, and out of V into all uniform ones.
    pub allow_non_finite: bool,
    /// Refuses rows that see no key instead of answering; not together with another `empty_row` than 0.
    pub forbid_empty_rows: bool,
    /// What workers make keys and values of; the operands' own are empty then. Not with other operands than f32, nor with uniform
    /// empty rows, nor with values that are the first elements of keys.
    pub source: Option<KvSource>,
    /// How many workers may take part.
    pub workers: WorkerChoice,
    /// Time from the first byte sent to the last row received, all attempts included; at most an hour, longer ones
    /// are cut to that. `None`: the coordinator gives each attempt 300 s.
    pub timeout: Option<Duration>,
}

/// ALiBi: a bias of `-slope * abs(p - j)`, for the position `p` of a query among the keys (see [`AttendOptions::mask`]) and a key `j`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Alibi {
    /// `[heads]`, or `[batch * heads]`; finite. `None`: those that it was published with, see [`alibi_slopes`].
    pub slopes: Option<Arc<[f32]>>,
    /// `+slope * (j - first)` instead, where `first` is the first key that is no padding (BLOOM, MPT): with a causal rule the same
    /// context, and another lse. Needs no positions.
    pub by_key: bool,
}

impl Operands {
    /// The bytes of one operand.
    pub(crate) fn tensor(&self, tensor: Tensor) -> &Bytes {
        match tensor {
            Tensor::Q => &self.q,
            Tensor::K => &self.k,
            Tensor::V => &self.v,
        }
    }

    /// Bytes of all three.
    pub(crate) fn total_bytes(&self) -> u64 {
        Tensor::ALL.iter().map(|tensor| self.tensor(*tensor).len() as u64).sum()
    }

    /// Refuses what a call with these options would be refused for before anything is sent, for whoever makes several calls of one.
    ///
    /// # Errors
    /// As [`crate::Client::attend`] before it sends: a tensor of another length than its shape needs, or options that make no sense
    /// for the shape or together.
    pub fn check(&self, options: &AttendOptions) -> Result<(), ClientError> {
        Ok(self.begin(options).map(|_begin| ())?)
    }

    /// The first frame of a call with these options.
    ///
    /// # Errors
    /// `PAYLOAD_LENGTH` where a tensor doesn't have the bytes that the shape needs, `SCALE`, `OPERATOR`, `OUTPUTS` and `COMBINATION` where
    /// the options make no sense for it.
    pub(crate) fn begin(&self, options: &AttendOptions) -> Result<Begin, Error> {
        let begin = Self::begin_of(self.shape, self.dtype, options)?;
        for tensor in Tensor::ALL {
            let need = tensor.bytes(&begin.shape, self.dtype.size());
            let payload = self.tensor(tensor).len();
            if payload as u64 != need {
                return Err(refusal::tensor_length(tensor, need, payload));
            }
        }
        Ok(begin)
    }

    /// The same of operands that are not there yet.
    ///
    /// # Errors
    /// As [`Self::begin`], but for lengths of operands.
    pub(crate) fn begin_of(shape: AttnShape, dtype: Dtype, options: &AttendOptions) -> Result<Begin, Error> {
        let shape = if options.source.is_some() { shape.with_projected_kv() } else { shape };
        let (sides, _bytes) = beside(options, &shape)?;
        let default_scale = || options.score.function().default_scale(&shape);
        let scale = options.scale.unwrap_or_else(default_scale);
        let alibi = options.alibi.as_ref().map(|alibi| Bias::Alibi {
            slopes: alibi.slopes.clone().unwrap_or_else(|| alibi_slopes(shape.n_heads()).into()),
            by_key: alibi.by_key,
        });
        let dense = sides.of(SideTensor::Bias).map(|_| Bias::Dense);
        let relative = options.relative.clone().map(Bias::Relative);
        let swin = options.swin.clone().map(Bias::Swin);
        let parts = OperatorParts {
            score: options.score.clone(),
            softcap: options.softcap,
            biases: [dense, alibi, relative, swin].into_iter().flatten().collect(),
            normaliser: options.normaliser,
            mask: operator::with_causal(options.causal, options.mask.clone())?,
            selection: sides.of(SideTensor::Mask).map(|_| Selection::Dense),
            csr: options.csr.clone(),
            sinks: options.sinks.clone(),
            empty_row: options.empty_row,
            ..OperatorParts::plain(scale, Causal::None)
        };
        let operator = Operator::new(parts, &shape)?;
        operator::check_previous(&operator, &sides)?;
        operator::check_bytes(&operator)?;
        operator::check_empty_rows(&operator, options.forbid_empty_rows)?;
        projection::check(&shape, dtype, &operator)?;
        let outputs = outputs::checked(options.outputs.clone(), &shape, &operator)?;
        Ok(Begin {
            shape,
            dtype,
            operator: Arc::new(operator),
            outputs,
            sides,
            allow_non_finite: options.allow_non_finite,
            forbid_empty_rows: options.forbid_empty_rows,
            workers: options.workers,
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use attnd_kernel::Dims;

    use super::*;

    /// Operands whose bytes tell their place.
    pub(crate) fn operands(dims: Dims, dtype: Dtype) -> Operands {
        let shape = AttnShape::new(dims).unwrap();
        let bytes = |tensor: Tensor| -> Bytes {
            let len = usize::try_from(tensor.bytes(&shape, dtype.size())).unwrap();
            (0..len).map(|i| (i % 251) as u8).collect::<Vec<_>>().into()
        };
        Operands { shape, dtype, q: bytes(Tensor::Q), k: bytes(Tensor::K), v: bytes(Tensor::V) }
    }

    #[test]
    fn a_wrong_length_and_a_wrong_scale_are_refused_before_anything_is_sent() {
        let dims = Dims { batch: 1, heads: 2, kv_heads: 1, queries: 3, keys: 4, head_dim: 5, value_dim: 6 };
        let good = operands(dims, Dtype::F16);
        assert_eq!(good.begin(&AttendOptions::default()).unwrap().operator.scale(), 1.0 / 5.0_f32.sqrt());
        let short = Operands { v: good.v.slice(1..), ..good.clone() };
        let error = short.begin(&AttendOptions::default()).unwrap_err();
        assert_eq!(error.message(), "PAYLOAD_LENGTH: v: shape needs 48, payload 47");
        for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38] {
            let options = AttendOptions { scale: Some(scale), ..Default::default() };
            assert_eq!(good.begin(&options).unwrap_err().reason, attnd_wire::Reason::Scale);
        }
    }

    #[test]
    fn what_scores_meet_is_in_the_first_frame() {
        let dims = Dims { batch: 2, heads: 8, kv_heads: 1, queries: 3, keys: 3, head_dim: 5, value_dim: 6 };
        let operands = operands(dims, Dtype::F32);
        let biases = |alibi: Alibi| {
            let options = AttendOptions { alibi: Some(alibi), softcap: Some(3.0), ..Default::default() };
            let operator = operands.begin(&options).unwrap().operator;
            assert_eq!(operator.softcap(), Some(3.0));
            operator.biases().to_vec()
        };
        let published = (1..=8).map(|head| 0.5_f32.powi(head)).collect();
        assert_eq!(biases(Alibi::default()), [Bias::Alibi { slopes: published, by_key: false }]);
        let slopes: Arc<[f32]> = (0..16).map(|head| head as f32).collect();
        let given = Alibi { slopes: Some(Arc::clone(&slopes)), by_key: true };
        assert_eq!(biases(given), [Bias::Alibi { slopes, by_key: true }]);
        let (normaliser, sinks) = (Normaliser::Sigmoid { bias: 0.0 }, Some([0.0; 8].into()));
        let options = AttendOptions { normaliser, sinks, ..Default::default() };
        assert_eq!(
            operands.begin(&options).unwrap_err().message(),
            "COMBINATION: normaliser=sigmoid and sinks"
        );
    }
}
