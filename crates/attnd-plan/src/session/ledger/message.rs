//! What a session's coordinator is told, and what it says: requests and their answers, events and actions.

use super::LedgerError;
use crate::session::op::{Answer, Holder, Op, Record};
use crate::session::replica::ReplicaState;

/// What a writer wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ask {
    /// Rows of one layer.
    Append {
        /// Which layer.
        layer: usize,
        /// Tokens that it must have before; `None`: as many as it has.
        base_len: Option<usize>,
        /// Tokens to come.
        tokens: usize,
    },
    /// See [`Change::Truncate`](super::Change::Truncate).
    Truncate {
        /// Tokens that stay.
        len: usize,
    },
    /// See [`Change::Fork`](super::Change::Fork).
    Fork {
        /// The number of the child, which is not 0. A request that comes again is answered with the number that it was given first;
        /// its digest is the same if `content_crc` is that of the child's name.
        child: u64,
    },
    /// See [`Change::Seal`](super::Change::Seal).
    Seal,
}

impl Ask {
    /// What tells this request from another one with its number: CRC32C over what it says and `content_crc`, which is that of all bytes
    /// of K in order, continued over those of V. The same request has the same one again, however it came in chunks.
    pub fn digest(&self, content_crc: u32) -> u32 {
        let words = match *self {
            Self::Append { layer, base_len, tokens } => {
                // No layer has so many tokens that this stands for a length.
                [1, layer as u64, base_len.map_or(u64::MAX, |base_len| base_len as u64), tokens as u64]
            }
            Self::Truncate { len } => [2, len as u64, 0, 0],
            // Whoever asks again can't know which number the child got.
            Self::Fork { .. } => [3, 0, 0, 0],
            Self::Seal => [4, 0, 0, 0],
        };
        let crc = words.iter().fold(0, |crc, word| crc32c::crc32c_append(crc, &word.to_le_bytes()));
        crc32c::crc32c_append(crc, &content_crc.to_le_bytes())
    }
}

/// A request to change the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Request {
    /// Of whoever asks.
    pub writer_epoch: u64,
    /// The number of the op, by its count.
    pub seq: u64,
    /// See [`Ask::digest`].
    pub digest: u32,
    /// What it wants.
    pub ask: Ask,
}

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// It is an op now, and in flight: send it to all of [`Ledger::missing`](super::Ledger::missing).
    Started(Op),
    /// It was in flight already: as for [`Begun::Started`]. The answer is for whoever asked last.
    Resumed(Op),
    /// It was applied before: this is what was said of it.
    Replayed(Answer),
}

/// A request to look at the tokens of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadRequest {
    /// Which layer.
    pub layer: usize,
    /// How many of its tokens; `None`: all.
    pub at_len: Option<usize>,
    /// Of the session; `None`: whichever it has.
    pub generation: Option<u64>,
    /// Tokens that the reader knows of.
    pub min_len: usize,
    /// Generation in which it was told of them: of a later one it knows nothing.
    pub min_len_generation: u64,
    /// The append of the same step, which is in flight: its tokens are looked at too. Whoever computes reads behind it.
    pub after: Option<Op>,
}

/// What is looked at: a name that means the same tokens for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// Of the session.
    pub generation: u64,
    /// The first so many tokens.
    pub at_len: usize,
}

/// How a shard is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Ops are taken.
    Open,
    /// Its replicas are being found out, or saved.
    Recovering,
    /// Fewer replicas than have to acknowledge: it can be read.
    Degraded,
    /// No replica has all that was acknowledged.
    Lost,
}

/// What happens to a session. Whatever is about a holder that isn't one of the shard's, or about another epoch, changes nothing.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LedgerEvent<E = String> {
    /// A replica has an op, now or since before.
    Applied {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
        /// Which op.
        seq: u64,
        /// What the replica has.
        state: ReplicaState,
    },
    /// A replica doesn't take an op, or doesn't take it back.
    Refused {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
        /// Of the request that is refused.
        epoch: u64,
        /// Which op.
        seq: u64,
        /// The op can't be had by anybody then: its rows aren't finite, or there is no memory for them. Otherwise the replica is out of
        /// step with the others, and dropped.
        is_final: bool,
        /// Its words.
        why: E,
    },
    /// A replica has taken an op back, or never had it.
    Undone {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
        /// Which op.
        seq: u64,
        /// What the replica has.
        state: ReplicaState,
    },
    /// The bytes of the append in flight can't be had any more: take it back.
    Abandoned {
        /// Which op.
        seq: u64,
        /// Why.
        why: E,
    },
    /// A worker is dead: what it held is gone.
    Lost(Holder),
    /// The stream to a worker broke, and nothing comes from it any more: what it holds doesn't count. It may come back
    /// ([`LedgerEvent::Joined`]), or be found dead; until then nobody takes its place, and a session isn't lost that it may have.
    Disconnected(Holder),
    /// A worker says that it has no replica of the shard.
    Gone {
        /// Which shard.
        shard: usize,
        /// Who.
        holder: Holder,
        /// Of the request that it says so to.
        epoch: u64,
    },
    /// A replica is of the shard's epoch now.
    Fenced {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
        /// What the replica has.
        state: ReplicaState,
    },
    /// A replica is of a higher epoch than it shall be fenced to.
    FenceRefused {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
        /// Of the replica.
        epoch: u64,
    },
    /// A replica has what the one that it was copied from had.
    Copied {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
        /// What the replica has.
        state: ReplicaState,
    },
    /// A copy can't be made, or not there.
    CopyFailed {
        /// Of which shard.
        shard: usize,
        /// Where to.
        holder: Holder,
    },
    /// A worker is there, or there again, that has a replica of the shard, or is one of [`Ledger::holders`](super::Ledger::holders).
    Joined {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
    },
    /// A worker has been chosen to get a replica: the answer to [`LedgerAction::NeedReplica`].
    Replacement {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
    },
    /// A worker wants to leave: its replicas are needed until there are others.
    Draining(Holder),
    /// A replica is to be elsewhere: `to` gets one, and takes the place of `from` then.
    Move {
        /// Of which shard.
        shard: usize,
        /// Who leaves.
        from: Holder,
        /// Who comes.
        to: Holder,
    },
    /// A replica doesn't move after all; said before [`LedgerEvent::CopyFailed`], so that nobody else is looked for.
    Stays {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
    },
    /// The set of a shard's members is in the durable store.
    Saved {
        /// Of which shard.
        shard: usize,
        /// Its epoch.
        epoch: u64,
    },
    /// The last ops, as a replica remembers them, oldest first.
    Records(Vec<Record>),
}

/// What the caller does next, in this order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LedgerAction<E = String> {
    /// Send the op in flight to this replica, where it may have been before.
    Send {
        /// Of which shard.
        shard: usize,
        /// Where to.
        holder: Holder,
        /// Of the shard.
        epoch: u64,
        /// Of the session, before the op.
        generation: u64,
        /// The op.
        op: Op,
    },
    /// Have this op taken back, behind all requests to apply it.
    Undo {
        /// Of which shard.
        shard: usize,
        /// Where to.
        holder: Holder,
        /// Of the shard.
        epoch: u64,
        /// Which op.
        seq: u64,
        /// Its digest.
        digest: u32,
    },
    /// Tell this replica that the shard is of this epoch.
    Fence {
        /// Of which shard.
        shard: usize,
        /// Where to.
        holder: Holder,
        /// Of the shard.
        epoch: u64,
    },
    /// Give `to` what `from` has and it hasn't, whatever it has, unless its replica is of a higher epoch by the time that it gets it.
    /// Its replica is of this epoch then.
    Copy {
        /// Of which shard.
        shard: usize,
        /// Who has it.
        from: Holder,
        /// Who gets it.
        to: Holder,
        /// Of the shard.
        epoch: u64,
    },
    /// Write to the durable store which members a shard has; then [`LedgerEvent::Saved`].
    SaveMembers {
        /// Of which shard.
        shard: usize,
        /// Of the shard.
        epoch: u64,
        /// All of them.
        members: Vec<Holder>,
    },
    /// The end of an op. Nobody may be waiting for it any more.
    Answer {
        /// Which op.
        seq: u64,
        /// What to say of it.
        result: Result<Answer, LedgerError<E>>,
    },
    /// A shard has fewer replicas than it should: choose workers of other failure domains than its holders', then
    /// [`LedgerEvent::Replacement`]. Comes again when the number changes.
    NeedReplica {
        /// Which shard.
        shard: usize,
        /// How many.
        missing: usize,
    },
    /// This replica isn't needed any more: give its memory back, unless it is of a higher epoch by now, as it may be needed again.
    Release {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
        /// Of the shard.
        epoch: u64,
    },
    /// Ask this replica for its last ops; then [`LedgerEvent::Records`].
    AskRecords {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
        /// Of the shard.
        epoch: u64,
    },
}

/// What the durable store has of a shard.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SavedShard {
    /// Its epoch.
    pub epoch: u64,
    /// Its members.
    pub members: Vec<Holder>,
}
