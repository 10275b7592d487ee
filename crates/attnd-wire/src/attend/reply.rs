//! What a client gets back: the plan, finished rows, Done.

use std::ops::Range;

use attnd_kernel::{AttnShape, Outputs};
use attnd_plan::{Piece, Plan, WorkerId};

use crate::checksum::checksum;
use crate::convert::{self, quantity, small, text};
use crate::error::{Error, Reason, printable};
use crate::floats;
use crate::limits::MAX_TEXT;
use crate::outputs::elements::Elements;
use crate::outputs::report::{HeatChunk, ReportChunk};
use crate::proto;

/// One frame to the client.
#[derive(Clone, Debug, PartialEq)]
pub enum AttendReply {
    /// The first one.
    Planned(PlanSummary),
    /// Finished rows.
    Context(ContextChunk),
    /// Elements of the score matrix.
    Elements(Elements),
    /// Numbers of rows.
    Report(ReportChunk),
    /// Rows of maps.
    Heat(HeatChunk),
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
    /// Names the order of arithmetic of the call; empty where the coordinator is too old to say.
    pub kernel_id: String,
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

impl AttendReply {
    /// Decodes a frame of the answer to a call of `shape` with these outputs.
    ///
    /// # Errors
    /// [`Reason::ReplyInvalid`] and [`Reason::Checksum`].
    pub fn decode(
        message: proto::AttendReply,
        shape: &AttnShape,
        outputs: Option<&Outputs>,
    ) -> Result<Self, Error> {
        use proto::attend_reply::Part;
        let wanted = || outputs.ok_or_else(|| Error::new(Reason::ReplyInvalid, "no outputs are wanted"));
        match message.part {
            Some(Part::Planned(planned)) => PlanSummary::decode(planned, shape).map(Self::Planned),
            Some(Part::Context(context)) => ContextChunk::decode(context, shape).map(Self::Context),
            Some(Part::Elements(elements)) => {
                Elements::decode(elements, shape, wanted()?).map(Self::Elements)
            }
            Some(Part::Report(report)) => ReportChunk::decode(report, shape, wanted()?).map(Self::Report),
            Some(Part::Heat(rows)) => HeatChunk::decode(rows, shape, wanted()?).map(Self::Heat),
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
            AttendReply::Elements(elements) => Part::Elements(elements.into()),
            AttendReply::Report(report) => Part::Report(report.into()),
            AttendReply::Heat(rows) => Part::Heat(rows.into()),
            AttendReply::Done(done) => Part::Done(done.into()),
        };
        Self { part: Some(part) }
    }
}

impl PlanSummary {
    /// The summary of the plan of a call with that order of arithmetic.
    pub fn new(plan: &Plan, kernel_id: &str) -> Self {
        let shares = plan.shares.iter().map(|share| ShareSummary {
            worker: share.worker.clone(),
            pieces: share.pieces.clone(),
            kv_bytes: share.kv_bytes,
        });
        Self {
            shares: shares.collect(),
            reason: plan.reason.clone(),
            predicted_seconds: plan.predicted_seconds,
            kernel_id: kernel_id.to_owned(),
        }
    }

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
            kernel_id: text(Reason::ReplyInvalid, "kernel_id", message.kernel_id)?,
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
            kernel_id: summary.kernel_id,
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
