//! What a client gets back.

use std::time::Duration;

use attnd_kernel::AttnShape;
use attnd_plan::session::{SessionName, SessionSpec};
use attnd_plan::{Piece, WorkerId};

use crate::attend::ContextChunk;
use crate::convert::{self, size, small, text};
use crate::error::{Error, Reason};
use crate::proto;
use crate::session::spec;

const INVALID: Reason = Reason::ReplyInvalid;

/// One frame to a client.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionReply {
    /// Of the request that it answers.
    pub request: u64,
    /// Another reply to this request follows.
    pub more: bool,
    /// What it says.
    pub answer: Answer,
}

/// What a client may be told.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// A session, to Open and Describe.
    Description(Box<SessionDescription>),
    /// To steps: results of some of them.
    Steps(Vec<StepResult>),
    /// To all other mutations.
    Applied(Applied),
    /// To List.
    Names(Vec<SessionName>),
    /// To Close.
    Closed {
        /// It had been closed before.
        already: bool,
    },
    /// There is no answer.
    Failed(Error),
}

/// What became of a step, or of a part of its rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepResult {
    /// Which of the request's steps.
    pub step: usize,
    /// Its rows are appended.
    pub applied: Option<Applied>,
    /// Finished rows of its queries.
    pub context: Option<StepContext>,
    /// Why there is nothing, or nothing more.
    pub failure: Option<Error>,
}

/// Finished rows as they are in a message: [`Self::decode`] takes them out.
#[derive(Clone, Debug, PartialEq)]
pub struct StepContext {
    rows: proto::ContextChunk,
    /// How many tokens of the layer were looked at.
    pub at_len: u64,
    /// Of which generation.
    pub generation: u64,
    /// Names the order of arithmetic.
    pub kernel_id: String,
}

/// A mutation that was applied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Tokens of the layer that was appended to; of the longest one for other changes.
    pub len: u64,
    /// Since the session's last cut.
    pub generation: u64,
    /// It had been applied before.
    pub replayed: bool,
    /// The child of a fork.
    pub child: Option<SessionName>,
}

/// A session as its coordinator sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionDescription {
    /// Its name.
    pub name: SessionName,
    /// What can't change.
    pub spec: SessionSpec,
    /// The request made it.
    pub created: bool,
    /// How often it was cut, and one.
    pub generation: u64,
    /// It takes no more appends and cuts.
    pub sealed: bool,
    /// Of whoever writes.
    pub writer_epoch: u64,
    /// Number of the next mutation.
    pub next_op_seq: u64,
    /// Of each layer.
    pub tokens: Vec<u64>,
    /// Who holds what.
    pub shards: Vec<ShardDescription>,
    /// Time until it is closed if nobody asks for it.
    pub ttl_left: Duration,
}

/// Who holds one shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardDescription {
    /// Kv heads times slots.
    pub pieces: Vec<Piece>,
    /// Grows whenever its replicas change.
    pub epoch: u64,
    /// How it is.
    pub health: ShardHealth,
    /// The first one computes.
    pub workers: Vec<WorkerId>,
    /// Bytes of its pages on each of them.
    pub bytes: u64,
}

/// How a shard is, from good to bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ShardHealth {
    /// Takes everything.
    Open,
    /// Takes everything, and has fewer replicas than it should.
    Repairing,
    /// Finds out what its replicas have.
    Recovering,
    /// Takes no appends for want of replicas.
    Degraded,
    /// No replica is left.
    Lost,
}

impl ShardHealth {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Open, Self::Repairing, Self::Recovering, Self::Degraded, Self::Lost];

    /// The stable name, as on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Repairing => "repairing",
            Self::Recovering => "recovering",
            Self::Degraded => "degraded",
            Self::Lost => "lost",
        }
    }
}

impl TryFrom<proto::SessionReply> for SessionReply {
    type Error = Error;

    /// Errors are [`Reason::ReplyInvalid`], [`Reason::Count`] and [`Reason::Pieces`]; the stream is of no use after one.
    fn try_from(message: proto::SessionReply) -> Result<Self, Error> {
        use proto::session_reply::Answer as Message;
        let answer = match message.answer.ok_or_else(|| Error::new(INVALID, "empty frame"))? {
            Message::Description(description) => Answer::Description(Box::new(description.try_into()?)),
            Message::Steps(proto::StepResults { results }) => {
                convert::count("results", results.len())?;
                Answer::Steps(results.into_iter().map(TryInto::try_into).collect::<Result<_, Error>>()?)
            }
            Message::Applied(applied) => Answer::Applied(applied.try_into()?),
            Message::Names(proto::SessionNames { names }) => {
                convert::count("names", names.len())?;
                Answer::Names(names.into_iter().map(reply_name).collect::<Result<_, Error>>()?)
            }
            Message::Closed(proto::SessionClosed { already_closed: already }) => Answer::Closed { already },
            Message::Failure(failure) => Answer::Failed(failure.into()),
        };
        Ok(Self { request: message.request, more: message.more, answer })
    }
}

impl From<SessionReply> for proto::SessionReply {
    fn from(reply: SessionReply) -> Self {
        use proto::session_reply::Answer as Message;
        let answer = match reply.answer {
            Answer::Description(description) => Message::Description((*description).into()),
            Answer::Steps(results) => {
                Message::Steps(proto::StepResults { results: results.into_iter().map(Into::into).collect() })
            }
            Answer::Applied(applied) => Message::Applied(applied.into()),
            Answer::Names(names) => {
                Message::Names(proto::SessionNames { names: names.iter().map(ToString::to_string).collect() })
            }
            Answer::Closed { already } => Message::Closed(proto::SessionClosed { already_closed: already }),
            Answer::Failed(error) => Message::Failure(error.into()),
        };
        Self { request: reply.request, more: reply.more, answer: Some(answer) }
    }
}

fn reply_name(text: String) -> Result<SessionName, Error> {
    SessionName::new(text).map_err(|error| Error::new(INVALID, format!("session name: {error}")))
}

impl TryFrom<proto::StepResult> for StepResult {
    type Error = Error;

    fn try_from(message: proto::StepResult) -> Result<Self, Error> {
        let proto::StepResult { step, applied, context, failure } = message;
        Ok(Self {
            step: size(step),
            applied: applied.map(TryInto::try_into).transpose()?,
            context: context.map(TryInto::try_into).transpose()?,
            failure: failure.map(Into::into),
        })
    }
}

impl From<StepResult> for proto::StepResult {
    fn from(result: StepResult) -> Self {
        let StepResult { step, applied, context, failure } = result;
        Self {
            step: small(step),
            applied: applied.map(Into::into),
            context: context.map(Into::into),
            failure: failure.map(Into::into),
        }
    }
}

impl StepContext {
    /// Rows of queries over the first `at_len` tokens of that generation.
    pub fn new(rows: ContextChunk, at_len: u64, generation: u64, kernel_id: &str) -> Self {
        Self { rows: rows.into(), at_len, generation, kernel_id: kernel_id.to_owned() }
    }

    /// Bytes of the rows.
    pub fn bytes(&self) -> usize {
        self.rows.context.len() + self.rows.lse.len()
    }

    /// The rows, of a call of `shape`: inside of it, with exactly the bytes they need and the right checksum.
    ///
    /// # Errors
    /// [`Reason::ReplyInvalid`] and [`Reason::Checksum`].
    pub fn decode(self, shape: &AttnShape) -> Result<ContextChunk, Error> {
        ContextChunk::decode(self.rows, shape)
    }
}

impl TryFrom<proto::StepContext> for StepContext {
    type Error = Error;

    fn try_from(message: proto::StepContext) -> Result<Self, Error> {
        let proto::StepContext {
            first_head,
            heads,
            first_token,
            tokens,
            crc32c,
            lse,
            context,
            at_len,
            generation,
            kernel_id,
        } = message;
        let rows = proto::ContextChunk { first_head, heads, first_token, tokens, crc32c, lse, context };
        Ok(Self { rows, at_len, generation, kernel_id: text(INVALID, "kernel_id", kernel_id)? })
    }
}

impl From<StepContext> for proto::StepContext {
    fn from(context: StepContext) -> Self {
        let StepContext { rows, at_len, generation, kernel_id } = context;
        let proto::ContextChunk { first_head, heads, first_token, tokens, crc32c, lse, context } = rows;
        Self { first_head, heads, first_token, tokens, crc32c, lse, context, at_len, generation, kernel_id }
    }
}

impl TryFrom<proto::SessionApplied> for Applied {
    type Error = Error;

    fn try_from(message: proto::SessionApplied) -> Result<Self, Error> {
        let proto::SessionApplied { len, generation, replayed, child } = message;
        let child = if child.is_empty() { None } else { Some(reply_name(child)?) };
        Ok(Self { len, generation, replayed, child })
    }
}

impl From<Applied> for proto::SessionApplied {
    fn from(applied: Applied) -> Self {
        let Applied { len, generation, replayed, child } = applied;
        Self { len, generation, replayed, child: child.map_or_else(String::new, |name| name.to_string()) }
    }
}

impl TryFrom<proto::SessionDescription> for SessionDescription {
    type Error = Error;

    fn try_from(message: proto::SessionDescription) -> Result<Self, Error> {
        let invalid = |error: Error| Error::new(INVALID, error.message());
        let spec = spec::decode(message.spec.unwrap_or_default()).map_err(invalid)?;
        if message.tokens.len() != spec.layers {
            let detail =
                format!("tokens of {} layers, the session has {}", message.tokens.len(), spec.layers);
            return Err(Error::new(INVALID, detail));
        }
        convert::count("shards", message.shards.len())?;
        let shard = |shard| ShardDescription::decode(shard, spec.kv_heads);
        Ok(Self {
            name: reply_name(message.name)?,
            created: message.created,
            generation: message.generation,
            sealed: message.sealed,
            writer_epoch: message.writer_epoch,
            next_op_seq: message.next_op_seq,
            tokens: message.tokens,
            shards: message.shards.into_iter().map(shard).collect::<Result<_, Error>>()?,
            ttl_left: Duration::from_secs(message.ttl_left_seconds.into()),
            spec,
        })
    }
}

impl From<SessionDescription> for proto::SessionDescription {
    fn from(description: SessionDescription) -> Self {
        Self {
            name: description.name.to_string(),
            spec: Some((&description.spec).into()),
            created: description.created,
            generation: description.generation,
            sealed: description.sealed,
            writer_epoch: description.writer_epoch,
            next_op_seq: description.next_op_seq,
            tokens: description.tokens,
            shards: description.shards.into_iter().map(Into::into).collect(),
            ttl_left_seconds: u32::try_from(description.ttl_left.as_secs()).unwrap_or(u32::MAX),
        }
    }
}

impl ShardDescription {
    fn decode(message: proto::ShardDescription, kv_heads: usize) -> Result<Self, Error> {
        let proto::ShardDescription { pieces, epoch, state, workers, bytes } = message;
        convert::count("workers", workers.len())?;
        let worker = |id| WorkerId::new(id).map_err(|error| Error::new(INVALID, error.to_string()));
        let state = text(INVALID, "state", state)?;
        let health = ShardHealth::ALL.into_iter().find(|health| health.name() == state);
        Ok(Self {
            pieces: convert::pieces(pieces, kv_heads)?,
            epoch,
            health: health.ok_or_else(|| Error::new(INVALID, format!("state {state}")))?,
            workers: workers.into_iter().map(worker).collect::<Result<_, Error>>()?,
            bytes,
        })
    }
}

impl From<ShardDescription> for proto::ShardDescription {
    fn from(shard: ShardDescription) -> Self {
        Self {
            pieces: shard.pieces.iter().map(Into::into).collect(),
            epoch: shard.epoch,
            state: shard.health.name().to_owned(),
            workers: shard.workers.iter().map(ToString::to_string).collect(),
            bytes: shard.bytes,
        }
    }
}
