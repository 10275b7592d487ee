//! Why a session refuses, with the numbers. The texts are what follows the reason's name in an answer.

/// What became of a request that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing was changed.
    NotExecuted,
    /// It may have been, or may still be: the same request, sent again, finishes it.
    Unknown,
}

/// Why a session refuses. `E` is what a worker says when it does.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum LedgerError<E = String> {
    /// `SEQ`: ops are numbered from 1.
    #[error("must be >= 1")]
    SeqZero,
    /// `SEQ_GAP`: an op is missing before this one.
    #[error("expected {expected}, got {got}")]
    SeqGap {
        /// The next number.
        expected: u64,
        /// That of the request.
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
        /// That of the request.
        seq: u64,
        /// The oldest that is remembered.
        oldest: u64,
    },
    /// `LENGTH`: the layer has another length than the op builds on.
    #[error("committed {committed}, base_len {base_len}")]
    Length {
        /// Tokens that the layer has.
        committed: usize,
        /// Tokens that the request is for.
        base_len: usize,
    },
    /// `LENGTH`: the layer has fewer tokens than the reader was told of.
    #[error("committed {committed}, min_len {min_len}")]
    Behind {
        /// Tokens that the layer has.
        committed: usize,
        /// Tokens that the reader knows of.
        min_len: usize,
    },
    /// `WRITER_FENCED`: somebody else writes now.
    #[error("writer_epoch {got} < {current}")]
    WriterFenced {
        /// Of the request.
        got: u64,
        /// Of the session.
        current: u64,
    },
    /// `WRITER_FENCED`: nobody was ever told to write so.
    #[error("writer_epoch {got} > {current}")]
    WriterUnknown {
        /// Of the request.
        got: u64,
        /// Of the session.
        current: u64,
    },
    /// `SESSION_FULL`: more tokens than the session may have.
    #[error("{committed} + {tokens}")]
    Full {
        /// Tokens that the layer has.
        committed: usize,
        /// Tokens of the request.
        tokens: usize,
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
    /// `SESSION_EMPTY`: nothing to attend to.
    #[error("")]
    Empty,
    /// `AT_LEN`: more tokens than there are.
    #[error("{at_len} > {committed}")]
    AtLen {
        /// Tokens of the request.
        at_len: usize,
        /// Tokens that there are.
        committed: usize,
    },
    /// `GENERATION`: the session was cut since.
    #[error("session {session}, request {request}")]
    Generation {
        /// Of the session.
        session: u64,
        /// Of the request.
        request: u64,
    },
    /// `RECOVERING`: what replicas have is being found out; soon it will be known.
    #[error("")]
    Recovering {
        /// This op has been sent to replicas.
        is_in_flight: bool,
    },
    /// `UNDER_REPLICATED`: fewer replicas of a shard than have to acknowledge.
    #[error("{have} of {need}")]
    UnderReplicated {
        /// Replicas that there are.
        have: usize,
        /// Replicas that have to acknowledge.
        need: usize,
        /// This op has been sent to replicas.
        is_in_flight: bool,
    },
    /// `SESSION_LOST`: no replica of a shard is left that has all that was acknowledged.
    #[error("prefix {prefix} of {tokens}")]
    SessionLost {
        /// Tokens of the longest layer that survive.
        prefix: usize,
        /// Tokens that it had.
        tokens: usize,
    },
    /// A worker refused the op, which was taken back on all others: its own reason.
    #[error("{why}")]
    Refused {
        /// Its words.
        why: E,
    },
}

impl<E> LedgerError<E> {
    /// What became of the request.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Recovering { is_in_flight: true } | Self::UnderReplicated { is_in_flight: true, .. } => {
                Outcome::Unknown
            }
            _ => Outcome::NotExecuted,
        }
    }

    /// Whether the same request may succeed a little later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Recovering { .. } | Self::UnderReplicated { .. })
    }
}
