//! The wording of refusals: one function or conversion for each way to be wrong, with the numbers that show it.
//!
//! The texts are part of what people see and search for; the tests here hold each of them.

use std::time::Duration;

use attnd_kernel::{AttnShape, Dims, NonFinite, OutOfMemory, ScoreOverflow, ShapeError};
use attnd_plan::{CallError, GatherError, Misplaced, PlanError, Rejection, SideTensor, Tensor, WorkerId};

use crate::error::{Error, Reason};
use crate::join::WIRE_VERSIONS;

mod session;

pub use session::*;

/// Validates dimensions, wherever they come from.
///
/// # Errors
/// [`Reason::ShapeOverflow`], [`Reason::ShapeZero`], [`Reason::ShapeLimit`], [`Reason::GqaRatio`].
pub fn shape(dims: Dims) -> Result<AttnShape, Error> {
    let Dims { batch, heads, kv_heads, queries, keys, head_dim, value_dim } = dims;
    let bytes = |dims: [u64; 4]| dims.into_iter().try_fold(size_of::<f32>() as u64, u64::checked_mul);
    let tensors = [
        [batch, heads, queries, head_dim],
        [batch, kv_heads, keys, head_dim],
        [batch, kv_heads, keys, value_dim],
    ];
    if tensors.into_iter().any(|dims| bytes(dims).is_none()) {
        return Err(Error::new(Reason::ShapeOverflow, ""));
    }
    AttnShape::new(dims).map_err(Into::into)
}

/// A tensor that a caller handed over whole, with other bytes than its shape needs.
pub fn tensor_length(tensor: impl std::fmt::Display, need: u64, payload: usize) -> Error {
    Error::new(Reason::PayloadLength, format!("{tensor}: shape needs {need}, payload {payload}"))
}

/// The first frame is not Begin.
pub fn expected_begin() -> Error {
    Error::new(Reason::StreamOrder, "expected Begin")
}

/// Begin came twice.
pub fn duplicate_begin() -> Error {
    Error::new(Reason::StreamOrder, "duplicate Begin")
}

/// Something came behind the last frame.
pub fn frame_after_commit() -> Error {
    Error::new(Reason::StreamOrder, "frame after Commit")
}

/// A frame without a part that this version knows.
pub fn empty_frame() -> Error {
    Error::new(Reason::StreamOrder, "empty frame")
}

/// The stream ended before Commit, after `chunks` chunks with `bytes` of `need` bytes.
pub fn stream_truncated(chunks: u64, bytes: u64, need: u64) -> Error {
    Error::new(Reason::StreamTruncated, format!("{chunks} chunks, {bytes} of {need} bytes, nothing applied"))
}

/// The peer sent nothing for `idle`.
pub fn stream_idle(idle: Duration) -> Error {
    Error::new(Reason::StreamIdle, format!("{} ms", idle.as_millis()))
}

/// The peer took no reply for `stall` although one waited.
pub fn stalled(stall: Duration) -> Error {
    Error::new(Reason::StreamIdle, format!("no reply taken for {} ms", stall.as_millis()))
}

/// The data of chunk `index` don't have the checksum that came with them.
pub fn checksum(index: u32) -> Error {
    Error::new(Reason::Checksum, format!("chunk {index}, nothing applied"))
}

/// Two operands disagree about a dimension, as in `q.d 64, k.d 128`.
pub fn shape_mismatch(left: &str, left_size: u64, right: &str, right_size: u64) -> Error {
    Error::new(Reason::ShapeMismatch, format!("{left} {left_size}, {right} {right_size}"))
}

/// The scale is NaN or infinite, or becomes infinite where scores are logarithms to base 2.
pub fn scale() -> Error {
    Error::new(Reason::Scale, "must be finite and at most 2.35e38 in size")
}

/// A NaN or an infinity in an operand; `head` is flattened over the batch.
pub fn non_finite(tensor: Tensor, head: usize, at: &NonFinite) -> Error {
    let value = match at.value {
        f32::INFINITY => "+inf".into(),
        other => other.to_string(),
    };
    let NonFinite { token, dim, .. } = at;
    Error::new(Reason::NonFinite, format!("{tensor}[h={head},pos={token},i={dim}] {value}"))
}

/// A NaN or +inf in a bias: what is added to the score of `[batch, head, query, key]`, in the bias's own dimensions.
pub fn non_finite_bias([batch, head, query, key]: [usize; 4], value: f32) -> Error {
    let value = if value.is_nan() { "NaN" } else { "+inf" };
    let at = format!("[b={batch},h={head},pos={query},key={key}]");
    Error::new(Reason::NonFinite, format!("{}{at} {value}", SideTensor::Bias))
}

/// A NaN or an infinity among the weights that rows had before, at `[batch, head, query, key]` in that tensor's own dimensions.
pub fn non_finite_previous([batch, head, query, key]: [usize; 4], value: f32) -> Error {
    let at = format!("[b={batch},h={head},pos={query},key={key}]");
    let value = if value == f32::INFINITY { "+inf".to_owned() } else { value.to_string() };
    Error::new(Reason::NonFinite, format!("{}{at} {value}", SideTensor::Previous))
}

/// A NaN or an infinity in element `at` of the row of token `pos` that keys or values are made of.
pub fn non_finite_source(tensor: SideTensor, [batch, pos, at]: [usize; 3], value: f32) -> Error {
    let value = if value == f32::INFINITY { "+inf".to_owned() } else { value.to_string() };
    Error::new(Reason::NonFinite, format!("{tensor}[b={batch},pos={pos},i={at}] {value}"))
}

/// A byte of a mask that is neither 0 nor 1, at `[batch, head, query, key]` in the mask's own dimensions.
pub fn not_bool([batch, head, query, key]: [usize; 4], byte: u8) -> Error {
    let at = format!("[b={batch},h={head},pos={query},key={key}]");
    Error::new(Reason::Dtype, format!("{}{at} is {byte}, a bool is 0 or 1", SideTensor::Mask))
}

/// A row sees no key although the caller forbade that; the head is flattened over the batch.
pub fn empty_row_at(head: usize, token: usize) -> Error {
    Error::new(Reason::EmptyRow, format!("head {head} row {token} sees no key"))
}

/// A score left the range of f32; `first_head` is the first query head of the group.
pub fn score_overflow(first_head: usize, at: &ScoreOverflow) -> Error {
    Error::new(Reason::ScoreOverflow, format!("head {} row {}", first_head + at.head_in_group, at.token))
}

/// An element of the context left the range of f32, or did before it was divided by the sum of the weights. Values
/// above `f32::MAX / (sqrt 2 * visible keys)` can do that: a weight is up to sqrt 2.
pub fn output_overflow(head: usize, token: usize) -> Error {
    Error::new(Reason::OutputOverflow, format!("head {head} row {token}"))
}

/// Rows see no key although the caller forbade that.
pub fn empty_row(rows: u64) -> Error {
    Error::new(Reason::EmptyRow, format!("rows without a key: {rows}"))
}

/// A call doesn't fit into the free memory; both in bytes.
pub fn kv_budget(need: u64, free: u64) -> Error {
    Error::new(Reason::KvBudget, format!("need {need}, free {free}"))
}

/// Too many calls run already.
pub fn overloaded(running: usize) -> Error {
    Error::new(Reason::Overloaded, format!("{running} running"))
}

/// A worker died or failed in the middle of a call.
pub fn worker_lost(worker: &WorkerId, what: &str) -> Error {
    Error::new(Reason::WorkerLost, format!("{worker}: {what}"))
}

/// A peer speaks another version of the protocol.
pub fn wire(theirs: u32) -> Error {
    Error::new(Reason::Wire, format!("{theirs} not in {}..{}", WIRE_VERSIONS.start(), WIRE_VERSIONS.end()))
}

/// A peer wants another order of arithmetic than this binary has for such a call.
pub fn kernel_mix(theirs: &str, ours: &str) -> Error {
    Error::new(Reason::KernelMix, format!("{theirs}, this node computes {ours}"))
}

/// A coordinator computes another operator than it was asked for: it ignores what it doesn't know.
pub fn older_coordinator(computes: &str, asked: &str) -> Error {
    Error::new(
        Reason::ReplyInvalid,
        format!("the coordinator is older: it computes {computes}, asked {asked}"),
    )
}

impl From<ShapeError> for Error {
    fn from(error: ShapeError) -> Self {
        let reason = match error {
            ShapeError::Zero { .. } => Reason::ShapeZero,
            ShapeError::Limit { .. } => Reason::ShapeLimit,
            ShapeError::GqaRatio { .. } => Reason::GqaRatio,
            ShapeError::Prefix { .. } => Reason::Combination,
        };
        Self::new(reason, error.to_string())
    }
}

impl From<OutOfMemory> for Error {
    fn from(error: OutOfMemory) -> Self {
        Self::new(Reason::KvBudget, error.to_string())
    }
}

impl From<PlanError> for Error {
    fn from(error: PlanError) -> Self {
        match error {
            // Workers come and go: asked again, there may be enough.
            PlanError::NoWorkers | PlanError::TooFewWorkers { .. } => {
                Self::new(Reason::NoWorkers, error.to_string())
            }
            PlanError::NoneAsked => Self::new(Reason::Workers, error.to_string()),
            PlanError::Memory { need, free } => kv_budget(need, free),
        }
    }
}

impl From<GatherError> for Error {
    fn from(error: GatherError) -> Self {
        Self::new(Reason::Coverage, error.to_string())
    }
}

impl From<Rejection> for Error {
    fn from(error: Rejection) -> Self {
        let reason = match error {
            Rejection::Wire { .. } => Reason::Wire,
            Rejection::Kernel { .. } => Reason::KernelMix,
            Rejection::IdInUse => Reason::WorkerId,
            Rejection::IncarnationDead => Reason::IncarnationDead,
        };
        Self::new(reason, error.to_string())
    }
}

impl From<CallError<Error>> for Error {
    fn from(error: CallError<Error>) -> Self {
        let reason = match &error {
            CallError::ExpectedBegin | CallError::DuplicateBegin | CallError::FrameAfterCommit => {
                Reason::StreamOrder
            }
            CallError::ChunkPlace { why: Misplaced::PastTheEnd { .. }, .. } => Reason::PayloadLength,
            CallError::ChunkOrder { .. }
            | CallError::ChunkPlace { .. }
            | CallError::SideFirst { .. }
            | CallError::CommitChunks { .. } => Reason::ChunkOrder,
            CallError::EmptyChunk { .. } | CallError::CommitLength { .. } => Reason::PayloadLength,
            CallError::StreamIdle { .. } => Reason::StreamIdle,
            CallError::StreamTruncated { chunks, bytes, need } => {
                return stream_truncated(*chunks, *bytes, *need);
            }
            CallError::PayloadLength { tensor, need, got } => {
                return Self::new(
                    Reason::PayloadLength,
                    format!("shape needs {need}, payload {got} ({tensor})"),
                );
            }
            CallError::ShareFailed { worker, what } => return share_failed(worker, what),
            CallError::WorkerLost { worker } => return worker_lost(worker, "lost"),
            CallError::PartialRefused { worker, why } => {
                return worker_lost(worker, &Self::from(*why).message());
            }
            CallError::ReportRefused { worker, why } => {
                return worker_lost(worker, &Self::new(Reason::Coverage, why.to_string()).message());
            }
            CallError::ReportUnasked { worker } => {
                return worker_lost(worker, "sent a report, the call has no outputs");
            }
            CallError::ShareIncomplete { worker, missing } => {
                return worker_lost(worker, &format!("finished with {missing} partials and reports missing"));
            }
        };
        Self::new(reason, error.to_string())
    }
}

/// What the client hears when a worker fails: its words where they are about the client's data or about limits, else
/// that the worker was lost, because the same call may succeed on another one. A worker without the memory that the
/// plan had reserved there is still busy with calls that have ended for the coordinator: that passes.
fn share_failed(worker: &WorkerId, what: &Error) -> Error {
    match what.reason {
        Reason::NonFinite
        | Reason::Dtype
        | Reason::ScoreOverflow
        | Reason::OutputOverflow
        | Reason::EmptyRow
        | Reason::KernelMix
        | Reason::Deadline => what.clone(),
        Reason::KvBudget => Error::new(Reason::Overloaded, format!("{worker}: {}", what.message())),
        _about_the_worker => worker_lost(worker, &what.message()),
    }
}

#[cfg(test)]
mod tests;
