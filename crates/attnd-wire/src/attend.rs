//! The values of the public call: what a client sends and what it gets back.

use std::ops::Range;

use attnd_kernel::{AttnShape, Causal, Dtype};
use attnd_plan::{Piece, Plan, Tensor, WorkerChoice, WorkerId};
use bytes::Bytes;

use crate::convert::{self, quantity, small, text};
use crate::error::{Error, Reason, printable};
use crate::floats::{self, checksum};
use crate::limits::MAX_TEXT;
use crate::{proto, refusal};

/// One frame from the client.
#[derive(Clone, Debug, PartialEq)]
pub enum AttendRequest {
    /// The first one.
    Begin(Begin),
    /// Tensor bytes.
    Chunk(TensorChunk),
    /// The last one.
    Commit(Commit),
}

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Begin {
    /// Dimensions.
    pub shape: AttnShape,
    /// Element type of Q, K and V on the wire.
    pub dtype: Dtype,
    /// What scores are multiplied by: finite and positive. A request without one gets [`convert::default_scale`].
    pub scale: f32,
    /// Which keys a query sees.
    pub causal: Causal,
    /// NaN and infinities pass unexamined.
    pub allow_non_finite: bool,
    /// A row that sees no key is an error.
    pub forbid_empty_rows: bool,
    /// How many workers may take part.
    pub workers: WorkerChoice,
}

/// Bytes of one operand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorChunk {
    /// Place in the stream, from 0. Whether it is the next one is for the call's state machine to say.
    pub index: u32,
    /// Which operand.
    pub tensor: Tensor,
    /// Where they begin in the operand, in bytes; `None` where its last chunk ended. Whether they may begin there is for
    /// the call's state machine to say.
    pub offset: Option<u64>,
    /// Whole elements, at least one; the checksum was right.
    pub data: Bytes,
}

/// What was sent, by the sender's count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Chunks.
    pub chunks: u32,
    /// Bytes of all their data.
    pub bytes: u64,
}

/// One frame to the client.
#[derive(Clone, Debug, PartialEq)]
pub enum AttendReply {
    /// The first one.
    Planned(PlanSummary),
    /// Finished rows.
    Context(ContextChunk),
    /// The last one.
    Done(Done),
}

/// Who computes what, for people.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PlanSummary {
    /// One per worker that has work.
    pub shares: Vec<ShareSummary>,
    /// One sentence: how many workers, cut by what, and why.
    pub reason: String,
    /// Predicted duration of the whole call.
    pub predicted_seconds: f64,
}

/// What one worker computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareSummary {
    /// Who.
    pub worker: WorkerId,
    /// Kv groups times slots.
    pub pieces: Vec<Piece>,
    /// Bytes of K and V that it receives.
    pub kv_bytes: u64,
}

/// Finished rows of some consecutive query heads.
#[derive(Clone, Debug, PartialEq)]
pub struct ContextChunk {
    /// Query heads, flattened over the batch.
    pub heads: Range<usize>,
    /// Query tokens.
    pub tokens: Range<usize>,
    /// `[heads, tokens]`, natural logarithm; -inf where a row sees no key.
    pub lse: Vec<f32>,
    /// `[heads, tokens, value_dim]`.
    pub context: Vec<f32>,
}

/// The end of a call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Done {
    /// Rows that saw no key.
    pub empty_rows: u64,
    /// Where the time went.
    pub timings: Timings,
    /// Names the order of arithmetic.
    pub kernel_id: String,
}

/// Seconds, as the coordinator saw them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// Deciding who computes what.
    pub plan: f64,
    /// First chunk received to last chunk forwarded.
    pub scatter: f64,
    /// The longest time a worker spent in its kernels.
    pub compute: f64,
    /// Commit to last partial received.
    pub gather: f64,
    /// Merging and finishing partials.
    pub merge: f64,
    /// All of it.
    pub total: f64,
}

// === requests ===

impl AttendRequest {
    /// Decodes a frame of a call that began with `begun`, or didn't begin yet.
    ///
    /// # Errors
    /// [`Reason::StreamOrder`] for a first frame that isn't Begin, a second Begin, or an empty frame; and whatever
    /// is wrong with the frame itself.
    pub fn decode(message: proto::AttendRequest, begun: Option<&Begin>) -> Result<Self, Error> {
        use proto::attend_request::Part;
        match (message.part, begun) {
            (Some(Part::Begin(_)), Some(_)) => Err(refusal::duplicate_begin()),
            (Some(Part::Begin(begin)), None) => begin.try_into().map(Self::Begin),
            (Some(Part::Chunk(chunk)), Some(begun)) => {
                TensorChunk::decode(chunk, begun.dtype).map(Self::Chunk)
            }
            (Some(Part::Commit(commit)), Some(_)) => Ok(Self::Commit(commit.into())),
            (Some(Part::Chunk(_) | Part::Commit(_)), None) => Err(refusal::expected_begin()),
            (None, _) => Err(refusal::empty_frame()),
        }
    }
}

impl From<AttendRequest> for proto::AttendRequest {
    fn from(request: AttendRequest) -> Self {
        use proto::attend_request::Part;
        let part = match request {
            AttendRequest::Begin(begin) => Part::Begin(begin.into()),
            AttendRequest::Chunk(chunk) => Part::Chunk(chunk.into()),
            AttendRequest::Commit(commit) => Part::Commit(commit.into()),
        };
        Self { part: Some(part) }
    }
}

impl TryFrom<proto::AttendBegin> for Begin {
    type Error = Error;

    fn try_from(message: proto::AttendBegin) -> Result<Self, Error> {
        let shape = convert::shape(message.shape)?;
        let workers = match (message.max_workers, message.force_workers) {
            (0, false) => WorkerChoice::Auto,
            (0, true) => return Err(Error::new(Reason::Workers, "0 workers asked for")),
            (most, false) => WorkerChoice::AtMost(convert::size(most)),
            (asked, true) => WorkerChoice::Exactly(convert::size(asked)),
        };
        Ok(Self {
            shape,
            dtype: convert::dtype(message.dtype)?,
            scale: message.scale.map_or(Ok(convert::default_scale(&shape)), convert::scale)?,
            causal: convert::causal(message.causal)?,
            allow_non_finite: message.allow_non_finite,
            forbid_empty_rows: message.forbid_empty_rows,
            workers,
        })
    }
}

impl From<Begin> for proto::AttendBegin {
    fn from(begin: Begin) -> Self {
        let (max_workers, force_workers) = match begin.workers {
            WorkerChoice::Auto => (0, false),
            // 0 alone would mean Auto; with force it is refused by whoever decodes it.
            WorkerChoice::AtMost(most) => (small(most), most == 0),
            WorkerChoice::Exactly(asked) => (small(asked), true),
        };
        Self {
            shape: Some((&begin.shape).into()),
            dtype: proto::Dtype::from(begin.dtype).into(),
            scale: Some(begin.scale),
            causal: proto::Causal::from(begin.causal).into(),
            allow_non_finite: begin.allow_non_finite,
            forbid_empty_rows: begin.forbid_empty_rows,
            max_workers,
            force_workers,
        }
    }
}

impl TensorChunk {
    /// Decodes a chunk of elements of `dtype`.
    ///
    /// # Errors
    /// [`Reason::Tensor`], [`Reason::PayloadLength`], [`Reason::Checksum`].
    pub fn decode(message: proto::TensorChunk, dtype: Dtype) -> Result<Self, Error> {
        let tensor = convert::tensor(message.tensor)?;
        let place = message.offset.map(u64::to_le_bytes);
        let place = place.as_ref().map_or(&[][..], |bytes| bytes);
        convert::chunk_data(message.index, &message.data, place, message.crc32c, dtype)?;
        Ok(Self { index: message.index, tensor, offset: message.offset, data: message.data })
    }
}

impl From<TensorChunk> for proto::TensorChunk {
    fn from(chunk: TensorChunk) -> Self {
        Self {
            index: chunk.index,
            tensor: proto::Tensor::from(chunk.tensor).into(),
            crc32c: Some(match chunk.offset {
                Some(offset) => checksum(&[&chunk.data, &offset.to_le_bytes()]),
                None => checksum(&[&chunk.data]),
            }),
            data: chunk.data,
            offset: chunk.offset,
        }
    }
}

impl From<proto::Commit> for Commit {
    fn from(message: proto::Commit) -> Self {
        Self { chunks: message.chunks, bytes: message.bytes }
    }
}

impl From<Commit> for proto::Commit {
    fn from(commit: Commit) -> Self {
        Self { chunks: commit.chunks, bytes: commit.bytes }
    }
}

// === replies ===

impl AttendReply {
    /// Decodes a frame of the answer to a call of `shape`.
    ///
    /// # Errors
    /// [`Reason::ReplyInvalid`] and [`Reason::Checksum`].
    pub fn decode(message: proto::AttendReply, shape: &AttnShape) -> Result<Self, Error> {
        use proto::attend_reply::Part;
        match message.part {
            Some(Part::Planned(planned)) => PlanSummary::decode(planned, shape).map(Self::Planned),
            Some(Part::Context(context)) => ContextChunk::decode(context, shape).map(Self::Context),
            Some(Part::Done(done)) => done.try_into().map(Self::Done),
            None => Err(Error::new(Reason::ReplyInvalid, "empty frame")),
        }
    }
}

impl From<AttendReply> for proto::AttendReply {
    fn from(reply: AttendReply) -> Self {
        use proto::attend_reply::Part;
        let part = match reply {
            AttendReply::Planned(planned) => Part::Planned(planned.into()),
            AttendReply::Context(context) => Part::Context(context.into()),
            AttendReply::Done(done) => Part::Done(done.into()),
        };
        Self { part: Some(part) }
    }
}

impl From<&Plan> for PlanSummary {
    fn from(plan: &Plan) -> Self {
        let shares = plan.shares.iter().map(|share| ShareSummary {
            worker: share.worker.clone(),
            pieces: share.pieces.clone(),
            kv_bytes: share.kv_bytes,
        });
        Self {
            shares: shares.collect(),
            reason: plan.reason.clone(),
            predicted_seconds: plan.predicted_seconds,
        }
    }
}

impl PlanSummary {
    /// Decodes the plan of a call of `shape`.
    ///
    /// # Errors
    /// [`Reason::ReplyInvalid`], [`Reason::Count`], [`Reason::Pieces`].
    pub fn decode(message: proto::Planned, shape: &AttnShape) -> Result<Self, Error> {
        convert::count("shares", message.shares.len())?;
        let share = |message: proto::Share| {
            let worker = WorkerId::new(message.worker_id);
            Ok(ShareSummary {
                worker: worker.map_err(|error| Error::new(Reason::ReplyInvalid, error.to_string()))?,
                pieces: convert::pieces(message.pieces, shape.n_groups())?,
                kv_bytes: message.kv_bytes,
            })
        };
        Ok(Self {
            shares: message.shares.into_iter().map(share).collect::<Result<_, Error>>()?,
            reason: text(Reason::ReplyInvalid, "reason", message.reason)?,
            predicted_seconds: quantity(
                Reason::ReplyInvalid,
                "predicted_seconds",
                message.predicted_seconds,
            )?,
        })
    }
}

impl From<PlanSummary> for proto::Planned {
    fn from(summary: PlanSummary) -> Self {
        let share = |share: ShareSummary| proto::Share {
            worker_id: share.worker.to_string(),
            pieces: share.pieces.iter().map(Into::into).collect(),
            kv_bytes: share.kv_bytes,
        };
        Self {
            shares: summary.shares.into_iter().map(share).collect(),
            reason: printable(&summary.reason, MAX_TEXT).into_owned(),
            predicted_seconds: summary.predicted_seconds,
        }
    }
}

impl ContextChunk {
    /// Decodes rows of a call of `shape`: inside of it, with exactly the bytes they need and the right checksum.
    ///
    /// # Errors
    /// [`Reason::ReplyInvalid`] and [`Reason::Checksum`].
    pub fn decode(message: proto::ContextChunk, shape: &AttnShape) -> Result<Self, Error> {
        let proto::ContextChunk { first_head, heads, first_token, tokens, crc32c, lse, context } = message;
        let place = format!("context of heads {first_head}+{heads} tokens {first_token}+{tokens}");
        let invalid = |what: String| Error::new(Reason::ReplyInvalid, format!("{place}: {what}"));
        let n_heads = shape.batch() * shape.n_heads();
        let ranges = convert::range(first_head, heads, n_heads).zip(convert::range(
            first_token,
            tokens,
            shape.n_queries(),
        ));
        let Some((heads, tokens)) = ranges else {
            return Err(invalid(format!("outside of {n_heads} heads, {} tokens", shape.n_queries())));
        };
        let rows = heads.len() * tokens.len();
        let (need_lse, need_context) = (rows * 4, rows * shape.value_dim() * 4);
        if (lse.len(), context.len()) != (need_lse, need_context) {
            let got = (lse.len(), context.len());
            return Err(invalid(format!(
                "needs {need_lse} + {need_context} bytes, got {} + {}",
                got.0, got.1
            )));
        }
        if checksum(&[&context, &lse]) != crc32c {
            return Err(Error::new(Reason::Checksum, place));
        }
        Ok(Self { heads, tokens, lse: floats::from_bytes(&lse), context: floats::from_bytes(&context) })
    }
}

impl From<ContextChunk> for proto::ContextChunk {
    fn from(chunk: ContextChunk) -> Self {
        let (lse, context) = (floats::into_bytes(chunk.lse), floats::into_bytes(chunk.context));
        Self {
            first_head: small(chunk.heads.start),
            heads: small(chunk.heads.len()),
            first_token: small(chunk.tokens.start),
            tokens: small(chunk.tokens.len()),
            crc32c: checksum(&[&context, &lse]),
            lse,
            context,
        }
    }
}

impl TryFrom<proto::Done> for Done {
    type Error = Error;

    fn try_from(message: proto::Done) -> Result<Self, Error> {
        Ok(Self {
            empty_rows: message.empty_rows,
            timings: message.timings.unwrap_or_default().try_into()?,
            kernel_id: text(Reason::ReplyInvalid, "kernel_id", message.kernel_id)?,
        })
    }
}

impl From<Done> for proto::Done {
    fn from(done: Done) -> Self {
        Self { empty_rows: done.empty_rows, timings: Some(done.timings.into()), kernel_id: done.kernel_id }
    }
}

impl TryFrom<proto::Timings> for Timings {
    type Error = Error;

    fn try_from(message: proto::Timings) -> Result<Self, Error> {
        let seconds = |field, value| quantity(Reason::ReplyInvalid, field, value);
        Ok(Self {
            plan: seconds("timings.plan", message.plan)?,
            scatter: seconds("timings.scatter", message.scatter)?,
            compute: seconds("timings.compute", message.compute)?,
            gather: seconds("timings.gather", message.gather)?,
            merge: seconds("timings.merge", message.merge)?,
            total: seconds("timings.total", message.total)?,
        })
    }
}

impl From<Timings> for proto::Timings {
    fn from(timings: Timings) -> Self {
        let Timings { plan, scatter, compute, gather, merge, total } = timings;
        Self { plan, scatter, compute, gather, merge, total }
    }
}

#[cfg(test)]
pub(crate) mod tests;
