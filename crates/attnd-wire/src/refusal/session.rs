//! The wording of what sessions refuse.

use attnd_kernel::Dtype;
use attnd_plan::Tensor;
use attnd_plan::session::ReplicaRefusal;

use crate::error::{Error, Reason};

/// There is no such session, or none of the caller's.
pub fn no_session() -> Error {
    Error::new(Reason::Session, "")
}

/// The session was closed because nobody asked for it.
pub fn session_expired() -> Error {
    Error::new(Reason::SessionExpired, "")
}

/// The session exists and is another one than was asked for.
pub fn session_differs() -> Error {
    Error::new(Reason::SessionExists, "parameters differ")
}

/// A session of this name exists, and is none that the caller has forked here.
pub fn session_exists() -> Error {
    Error::new(Reason::SessionExists, "")
}

/// A layer has nothing to attend over.
pub fn session_empty() -> Error {
    Error::new(Reason::SessionEmpty, "")
}

/// An append would pass the `most` tokens of a layer, which has `len`.
pub fn session_full(len: u64, tokens: u64) -> Error {
    Error::new(Reason::SessionFull, format!("{len} + {tokens}"))
}

/// All replicas of a shard are gone; what is left of `acknowledged` tokens is the first `prefix`.
pub fn session_lost(prefix: u64, acknowledged: u64) -> Error {
    Error::new(Reason::SessionLost, format!("prefix {prefix} of {acknowledged}"))
}

/// The session takes no more mutations but forks.
pub fn sealed() -> Error {
    Error::new(Reason::Sealed, "")
}

/// The workers are in fewer failure domains than there shall be replicas.
pub fn placement(domains: usize, replicas: usize) -> Error {
    Error::new(Reason::Placement, format!("{domains} domains for R={replicas}"))
}

/// Mutations are numbered from 1.
pub fn seq_zero() -> Error {
    Error::new(Reason::Seq, "must be >= 1")
}

/// The mutation `expected` is missing.
pub fn seq_gap(expected: u64, got: u64) -> Error {
    Error::new(Reason::SeqGap, format!("expected {expected}, got {got}"))
}

/// Another mutation had this number.
pub fn seq_reused(seq: u64) -> Error {
    Error::new(Reason::SeqReused, seq.to_string())
}

/// Of mutations before `oldest` nothing is known.
pub fn seq_old(seq: u64, oldest: u64) -> Error {
    Error::new(Reason::SeqOld, format!("{seq} < {oldest}"))
}

/// The layer has another length than an append said.
pub fn length(committed: u64, base_len: u64) -> Error {
    Error::new(Reason::Length, format!("committed {committed}, base_len {base_len}"))
}

/// There is a later writer.
pub fn writer_fenced(theirs: u64, current: u64) -> Error {
    Error::new(Reason::WriterFenced, format!("writer_epoch {theirs} < {current}"))
}

/// More tokens are looked at, or shall stay, than there are.
pub fn at_len(asked: u64, committed: u64) -> Error {
    Error::new(Reason::AtLen, format!("{asked} > {committed}"))
}

/// The session was cut since.
pub fn generation(session: u64, request: u64) -> Error {
    Error::new(Reason::Generation, format!("session {session}, request {request}"))
}

/// A session can't be its own child.
pub fn fork_of_itself() -> Error {
    Error::new(Reason::Fork, "child equals parent")
}

/// Forks of forks of forks.
pub fn fork_depth(most: usize) -> Error {
    Error::new(Reason::ForkLimit, format!("depth {most}"))
}

/// Too many forks of one session.
pub fn fork_count(most: usize) -> Error {
    Error::new(Reason::ForkLimit, most.to_string())
}

/// A shard finds out what its replicas have.
pub fn recovering() -> Error {
    Error::new(Reason::Recovering, "")
}

/// Fewer replicas of a shard are there than shall acknowledge.
pub fn under_replicated(live: usize, acks: usize) -> Error {
    Error::new(Reason::UnderReplicated, format!("{live} of {acks}"))
}

/// A coordinator with a higher term has been here.
pub fn fenced(theirs: u64, highest: u64) -> Error {
    Error::new(Reason::Fenced, format!("term {theirs} < {highest}"))
}

/// The shard has another epoch than a request is for.
pub fn epoch(shard: u64, request: u64) -> Error {
    Error::new(Reason::Epoch, format!("shard at {shard}, request {request}"))
}

/// A worker holds no such shard.
pub fn no_shard(session: u64, shard: u32) -> Error {
    Error::new(Reason::Shard, format!("{shard} of session {session}"))
}

/// Rows of another element type than the session's.
pub fn dtype_mismatch(session: Dtype, got: Dtype) -> Error {
    Error::new(Reason::DtypeMismatch, format!("session {session}, got {got}"))
}

/// Rows of another size than the session's, as in `session heads 32, got 16`.
pub fn session_mismatch(field: &str, session: usize, got: usize) -> Error {
    Error::new(Reason::ShapeMismatch, format!("session {field} {session}, got {got}"))
}

/// Rows of no token.
pub fn no_tokens() -> Error {
    Error::new(Reason::ShapeZero, "tokens")
}

/// A tensor in one message is shorter or longer than its dimensions say.
pub fn payload_length(tensor: Tensor, need: u128, got: usize) -> Error {
    Error::new(Reason::PayloadLength, format!("shape needs {need}, payload {got} ({tensor})"))
}

/// Rows in one message don't have the checksum that came with them.
pub fn rows_checksum(rows: &str) -> Error {
    Error::new(Reason::Checksum, format!("{rows}, nothing applied"))
}

impl From<ReplicaRefusal> for Error {
    fn from(refusal: ReplicaRefusal) -> Self {
        let reason = match refusal {
            ReplicaRefusal::Fenced { .. } => Reason::Fenced,
            ReplicaRefusal::Epoch { .. } => Reason::Epoch,
            ReplicaRefusal::Generation { .. } => Reason::Generation,
            ReplicaRefusal::SeqGap { .. } => Reason::SeqGap,
            ReplicaRefusal::SeqReused { .. } => Reason::SeqReused,
            ReplicaRefusal::SeqOld { .. } => Reason::SeqOld,
            ReplicaRefusal::Length { .. } => Reason::Length,
            ReplicaRefusal::Full { .. } => Reason::SessionFull,
            ReplicaRefusal::AtLen { .. } => Reason::AtLen,
            ReplicaRefusal::NoTokens => Reason::ShapeZero,
            ReplicaRefusal::Layer { .. } => Reason::ShapeLimit,
            ReplicaRefusal::Sealed => Reason::Sealed,
            ReplicaRefusal::Undo { .. } => Reason::Undo,
            ReplicaRefusal::Snapshot { .. } => Reason::Snapshot,
        };
        Self::new(reason, refusal.to_string())
    }
}
