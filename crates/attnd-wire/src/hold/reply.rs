//! What a worker answers.

use attnd_plan::session::{Answer, Change, Op, Record, ReplicaState};

use crate::convert::{self, size, small};
use crate::error::{Error, Reason};
use crate::hold::copy::{CopyChunk, CopySum, ShardSnapshot};
use crate::hold::partials::PartialRun;
use crate::hold::request::{ShardAt, tokens};
use crate::proto;

/// One frame from a worker.
#[derive(Clone, Debug, PartialEq)]
pub struct HoldReply {
    /// Of the request that it answers.
    pub request: u64,
    /// Another reply to this request follows.
    pub more: bool,
    /// What it says.
    pub answer: HoldAnswer,
}

/// What a worker may answer.
#[derive(Clone, Debug, PartialEq)]
pub enum HoldAnswer {
    /// To works: results of some of them.
    Results(Vec<ShardResult>),
    /// To all else.
    State(ShardState),
    /// To [`HoldAsk::Recall`](super::HoldAsk::Recall).
    Records(ShardRecords),
    /// To [`HoldAsk::List`](super::HoldAsk::List): some of them, with their epochs.
    Shards(Vec<ShardAt>),
    /// It wasn't done.
    Failed(Error),
    /// To an export.
    Snapshot(Box<ShardSnapshot>),
    /// To a read of one.
    Chunk(CopyChunk),
    /// To the end of one.
    Sum(CopySum),
}

/// What became of one work, or of a part of its queries.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ShardResult {
    /// Which of the request's works.
    pub work: usize,
    /// Its rows are appended, or were before.
    pub applied: Option<ShardState>,
    /// Of its queries.
    pub partials: Option<PartialRun>,
    /// Why there is nothing, or nothing more.
    pub failure: Option<Error>,
}

/// What a replica has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardState {
    /// Lower ones are refused.
    pub epoch: u64,
    /// Of the session, as far as the replica knows.
    pub generation: u64,
    /// Of the last op.
    pub op_seq: u64,
    /// Of all ops, and of the bytes that came with them.
    pub chain: u32,
    /// Of each layer, over all of the session.
    pub tokens: Vec<u64>,
    /// The op had been applied before.
    pub replayed: bool,
    /// Bytes of pages that the worker holds, of all sessions.
    pub resident_bytes: u64,
    /// What the chain was before the last op.
    pub chain_before: u32,
    /// The last op; `None` before the first, and behind one that was undone.
    pub last: Option<Op>,
    /// Nothing can be appended or cut any more.
    pub sealed: bool,
}

/// What a replica has, and the ops that it remembers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardRecords {
    /// What it has.
    pub state: ShardState,
    /// At most 1,024, oldest first, without a gap; the last one is that of its state.
    pub records: Vec<Record>,
}

impl From<ReplicaState> for ShardState {
    fn from(state: ReplicaState) -> Self {
        let ReplicaState { epoch, generation, op_seq, chain, chain_before, last, tokens, sealed } = state;
        let tokens = tokens.into_iter().map(|tokens| tokens as u64).collect();
        let (replayed, resident_bytes) = (false, 0);
        Self {
            epoch,
            generation,
            op_seq,
            chain,
            tokens,
            replayed,
            resident_bytes,
            chain_before,
            last,
            sealed,
        }
    }
}

impl From<ShardState> for ReplicaState {
    fn from(state: ShardState) -> Self {
        let ShardState { epoch, generation, op_seq, chain, tokens, chain_before, last, sealed, .. } = state;
        let tokens = tokens.into_iter().map(self::tokens).collect();
        Self { epoch, generation, op_seq, chain, chain_before, last, tokens, sealed }
    }
}

impl TryFrom<proto::HoldReply> for HoldReply {
    type Error = Error;

    /// Errors are [`Reason::ReplyInvalid`], [`Reason::Count`] and those of partials; the stream is of no use after one.
    fn try_from(message: proto::HoldReply) -> Result<Self, Error> {
        use proto::hold_reply::Answer as Message;
        let answer = match message.answer.ok_or_else(|| Error::new(Reason::ReplyInvalid, "empty frame"))? {
            Message::Results(proto::ShardResults { results }) => {
                convert::count("results", results.len())?;
                HoldAnswer::Results(results.into_iter().map(TryInto::try_into).collect::<Result<_, Error>>()?)
            }
            Message::State(state) => HoldAnswer::State(state.try_into()?),
            Message::Records(records) => HoldAnswer::Records(records.try_into()?),
            Message::Shards(proto::ShardList { shards }) => {
                convert::count("shards", shards.len())?;
                let shards = shards.into_iter().map(|at| Some(at).try_into());
                HoldAnswer::Shards(shards.collect::<Result<_, Error>>()?)
            }
            Message::Failure(failure) => HoldAnswer::Failed(failure.into()),
            Message::Snapshot(snapshot) => HoldAnswer::Snapshot(Box::new(snapshot.try_into()?)),
            Message::Chunk(chunk) => HoldAnswer::Chunk(chunk.try_into()?),
            Message::Sum(sum) => HoldAnswer::Sum(sum.into()),
        };
        Ok(Self { request: message.request, more: message.more, answer })
    }
}

impl From<HoldReply> for proto::HoldReply {
    fn from(reply: HoldReply) -> Self {
        use proto::hold_reply::Answer as Message;
        let answer = match reply.answer {
            HoldAnswer::Results(results) => Message::Results(proto::ShardResults {
                results: results.into_iter().map(Into::into).collect(),
            }),
            HoldAnswer::State(state) => Message::State(state.into()),
            HoldAnswer::Records(records) => Message::Records(records.into()),
            HoldAnswer::Shards(shards) => {
                Message::Shards(proto::ShardList { shards: shards.into_iter().map(Into::into).collect() })
            }
            HoldAnswer::Failed(error) => Message::Failure(error.into()),
            HoldAnswer::Snapshot(snapshot) => Message::Snapshot((*snapshot).into()),
            HoldAnswer::Chunk(chunk) => Message::Chunk(chunk.into()),
            HoldAnswer::Sum(sum) => Message::Sum(sum.into()),
        };
        Self { request: reply.request, more: reply.more, answer: Some(answer) }
    }
}

impl TryFrom<proto::ShardRecords> for ShardRecords {
    type Error = Error;

    /// Errors are [`Reason::Count`], and [`Reason::ReplyInvalid`] for ops that don't follow each other up to the last one.
    fn try_from(message: proto::ShardRecords) -> Result<Self, Error> {
        let proto::ShardRecords { state, records } = message;
        convert::count("records", records.len())?;
        let state: ShardState = state.unwrap_or_default().try_into()?;
        let mut seq = state.op_seq.checked_sub(records.len() as u64);
        let mut next = || {
            seq = seq?.checked_add(1);
            seq
        };
        let records = records.into_iter().map(|record| {
            let proto::OpRecord { op_seq, digest, len, generation, child } = record;
            if next() != Some(op_seq) {
                return Err(Error::new(
                    Reason::ReplyInvalid,
                    format!("a record of op {op_seq} out of place"),
                ));
            }
            let answer = Answer { len: tokens(len), generation, child: (child != 0).then_some(child) };
            Ok(Record { seq: op_seq, digest, answer })
        });
        let records = records.collect::<Result<_, Error>>()?;
        Ok(Self { state, records })
    }
}

impl From<ShardRecords> for proto::ShardRecords {
    fn from(records: ShardRecords) -> Self {
        let ShardRecords { state, records } = records;
        let record = |Record { seq: op_seq, digest, answer }| {
            let Answer { len, generation, child } = answer;
            proto::OpRecord { op_seq, digest, len: len as u64, generation, child: child.unwrap_or(0) }
        };
        Self { state: Some(state.into()), records: records.into_iter().map(record).collect() }
    }
}

impl TryFrom<proto::ShardResult> for ShardResult {
    type Error = Error;

    fn try_from(message: proto::ShardResult) -> Result<Self, Error> {
        let proto::ShardResult { work, applied, partials, failure } = message;
        Ok(Self {
            work: size(work),
            applied: applied.map(TryInto::try_into).transpose()?,
            partials: partials.map(TryInto::try_into).transpose()?,
            failure: failure.map(Into::into),
        })
    }
}

impl From<ShardResult> for proto::ShardResult {
    fn from(result: ShardResult) -> Self {
        let ShardResult { work, applied, partials, failure } = result;
        Self {
            work: small(work),
            applied: applied.map(Into::into),
            partials: partials.map(Into::into),
            failure: failure.map(Into::into),
        }
    }
}

impl TryFrom<proto::ShardState> for ShardState {
    type Error = Error;

    fn try_from(message: proto::ShardState) -> Result<Self, Error> {
        convert::count("tokens", message.tokens.len())?;
        let proto::ShardState {
            epoch,
            generation,
            op_seq,
            chain,
            tokens,
            replayed,
            resident_bytes,
            chain_before,
            last,
            sealed,
        } = message;
        let last = last.map(decode_last).transpose()?;
        Ok(Self {
            epoch,
            generation,
            op_seq,
            chain,
            tokens,
            replayed,
            resident_bytes,
            chain_before,
            last,
            sealed,
        })
    }
}

fn decode_last(message: proto::LastOp) -> Result<Op, Error> {
    use proto::last_op::Change as Message;
    let proto::LastOp { op_seq: seq, digest, change } = message;
    let change = match change.ok_or_else(|| Error::new(Reason::ReplyInvalid, "a last op that is none"))? {
        Message::Append(proto::LastAppend { layer, base_len, tokens: n }) => {
            Change::Append { layer: size(layer), base_len: tokens(base_len), tokens: tokens(n) }
        }
        Message::Truncate(proto::SessionTruncate { len }) => Change::Truncate { len: tokens(len) },
        Message::Fork(child) => Change::Fork { child },
        Message::Seal(proto::SessionSeal {}) => Change::Seal,
    };
    Ok(Op { seq, digest, change })
}

fn encode_last(op: Op) -> proto::LastOp {
    use proto::last_op::Change as Message;
    let change = match op.change {
        Change::Append { layer, base_len, tokens } => {
            let (layer, base_len, tokens) = (small(layer), base_len as u64, tokens as u64);
            Message::Append(proto::LastAppend { layer, base_len, tokens })
        }
        Change::Truncate { len } => Message::Truncate(proto::SessionTruncate { len: len as u64 }),
        Change::Fork { child } => Message::Fork(child),
        Change::Seal => Message::Seal(proto::SessionSeal {}),
    };
    proto::LastOp { op_seq: op.seq, digest: op.digest, change: Some(change) }
}

impl From<ShardState> for proto::ShardState {
    fn from(state: ShardState) -> Self {
        let ShardState {
            epoch,
            generation,
            op_seq,
            chain,
            tokens,
            replayed,
            resident_bytes,
            chain_before,
            last,
            sealed,
        } = state;
        let last = last.map(encode_last);
        Self {
            epoch,
            generation,
            op_seq,
            chain,
            tokens,
            replayed,
            resident_bytes,
            chain_before,
            last,
            sealed,
        }
    }
}
