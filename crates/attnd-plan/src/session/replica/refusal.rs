//! Why a replica refuses a request. The texts are what follows the reason's name in an answer.

/// Why a replica refuses a request. Nothing has changed then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplicaRefusal {
    /// `FENCED`: a coordinator with a higher term was here.
    #[error("term {term} < {highest}")]
    Fenced {
        /// Of the request.
        term: u64,
        /// The highest that was seen.
        highest: u64,
    },
    /// `EPOCH`: the shard has other replicas than the coordinator believed, or this isn't one of them any more.
    #[error("shard at {shard}, request {request}")]
    Epoch {
        /// Of the replica.
        shard: u64,
        /// Of the request.
        request: u64,
    },
    /// `GENERATION`: the session was cut since.
    #[error("session {session}, request {request}")]
    Generation {
        /// Of the replica.
        session: u64,
        /// Of the request.
        request: u64,
    },
    /// `SEQ_GAP`: an op is missing before this one.
    #[error("expected {expected}, got {got}")]
    SeqGap {
        /// The next number.
        expected: u64,
        /// That of the op.
        got: u64,
    },
    /// `SEQ_REUSED`: another op had this number.
    #[error("{seq}")]
    SeqReused {
        /// The number.
        seq: u64,
    },
    /// `SEQ_OLD`: so old that nobody knows whether it was applied.
    #[error("{seq} < {oldest}")]
    SeqOld {
        /// That of the op.
        seq: u64,
        /// The oldest that is remembered.
        oldest: u64,
    },
    /// `LENGTH`: the layer has another length than the op builds on.
    #[error("committed {committed}, base_len {base_len}")]
    Length {
        /// Tokens that the layer has.
        committed: usize,
        /// Tokens that the op is for.
        base_len: usize,
    },
    /// `SESSION_FULL`: more tokens than can be counted.
    #[error("{committed} + {tokens}")]
    Full {
        /// Tokens that the layer has.
        committed: usize,
        /// Tokens of the op.
        tokens: usize,
    },
    /// `AT_LEN`: more tokens than there are.
    #[error("{at_len} > {len}")]
    AtLen {
        /// Tokens of the request.
        at_len: usize,
        /// Tokens that there are.
        len: usize,
    },
    /// `SHAPE_ZERO`: an append of nothing.
    #[error("tokens")]
    NoTokens,
    /// `SHAPE_LIMIT`: a layer that the session hasn't got.
    #[error("layer {layer} of {layers}")]
    Layer {
        /// Of the request, from 0.
        layer: usize,
        /// That there are.
        layers: usize,
    },
    /// `SEALED`: nothing can be appended or cut any more.
    #[error("no append and no truncate after it")]
    Sealed,
    /// `UNDO`: the op isn't the last one, or no append.
    #[error("op {seq} can't be taken back, the last is {last}")]
    Undo {
        /// Of the request.
        seq: u64,
        /// The last op.
        last: u64,
    },
    /// `SNAPSHOT`: the history of a replica isn't whole.
    #[error("{records} records don't end in op {op_seq}")]
    Snapshot {
        /// Records that came.
        records: usize,
        /// The last op of the state.
        op_seq: u64,
    },
}
