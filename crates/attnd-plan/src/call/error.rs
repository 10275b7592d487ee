//! Why a call fails: the client's mistakes, and those of workers with the name of the one that made them.

use crate::arrival::Misplaced;
use crate::gather::GatherError;
use crate::report::ReportError;
use crate::side::{AnyTensor, SideTensor};
use crate::topology::WorkerId;

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError<E = String> {
    /// The first frame is not Begin. The shell says so: without Begin there is no call.
    #[error("expected Begin")]
    ExpectedBegin,
    /// Begin came twice.
    #[error("duplicate Begin")]
    DuplicateBegin,
    /// A frame came after Commit.
    #[error("frame after Commit")]
    FrameAfterCommit,
    /// The stream ended without Commit.
    #[error("{chunks} chunks and {bytes} of {need} bytes, no Commit, nothing applied")]
    StreamTruncated {
        /// Chunks received.
        chunks: u64,
        /// Bytes received.
        bytes: u64,
        /// Bytes that the shape needs.
        need: u64,
    },
    /// A chunk is missing or came again.
    #[error("expected {expected}, got {got}")]
    ChunkOrder {
        /// The next index.
        expected: u64,
        /// The index received.
        got: u64,
    },
    /// A chunk without bytes: a stream of them would never end.
    #[error("chunk {index} has 0 bytes")]
    EmptyChunk {
        /// Which chunk.
        index: u64,
    },
    /// A chunk is in the wrong place of its tensor.
    #[error("chunk {index} of {tensor} {why}")]
    ChunkPlace {
        /// Which chunk.
        index: u64,
        /// Which tensor.
        tensor: AnyTensor,
        /// What is wrong with its place.
        why: Misplaced,
    },
    /// A chunk of a tensor came before all of another one was here.
    #[error("chunk {index} of {tensor}: all of {first} comes first")]
    SideFirst {
        /// Which chunk.
        index: u64,
        /// Which tensor.
        tensor: AnyTensor,
        /// Whose turn it is.
        first: SideTensor,
    },
    /// A tensor is shorter or longer than its shape.
    #[error("shape needs {need} bytes of {tensor}, payload {got}")]
    PayloadLength {
        /// Which tensor.
        tensor: AnyTensor,
        /// Bytes that the shape needs.
        need: u64,
        /// Bytes received.
        got: u64,
    },
    /// Commit declares other bytes than were received.
    #[error("declared {declared}, got {got}")]
    CommitLength {
        /// Bytes by the client's count.
        declared: u64,
        /// Bytes received.
        got: u64,
    },
    /// Commit declares other chunks than were received.
    #[error("commit declares {declared} chunks, got {got}")]
    CommitChunks {
        /// Chunks by the client's count.
        declared: u64,
        /// Chunks received.
        got: u64,
    },
    /// The client sent nothing for [`STREAM_IDLE`](super::STREAM_IDLE).
    #[error("{idle_ms} ms")]
    StreamIdle {
        /// How long it had, in milliseconds.
        idle_ms: u64,
    },
    /// A worker died before it had sent everything.
    #[error("worker {worker} was lost")]
    WorkerLost {
        /// Who.
        worker: WorkerId,
    },
    /// A worker failed at its share.
    #[error("worker {worker}: {what}")]
    ShareFailed {
        /// Who.
        worker: WorkerId,
        /// Its words.
        what: E,
    },
    /// A worker sent a partial that it wasn't asked for.
    #[error("worker {worker}: {why}")]
    PartialRefused {
        /// Who.
        worker: WorkerId,
        /// What is wrong with it.
        why: GatherError,
    },
    /// A worker sent a report that it wasn't asked for, or one that its keys can't have.
    #[error("worker {worker}: {why}")]
    ReportRefused {
        /// Who.
        worker: WorkerId,
        /// What is wrong with it.
        why: ReportError,
    },
    /// A worker sent a report, and nobody asked for any.
    #[error("worker {worker} sent a report, the call has no outputs")]
    ReportUnasked {
        /// Who.
        worker: WorkerId,
    },
    /// A worker says that it finished, and did not.
    #[error("worker {worker} finished with {missing} partials and reports missing")]
    ShareIncomplete {
        /// Who.
        worker: WorkerId,
        /// Cells and reports that it still owes.
        missing: usize,
    },
}

impl<E> CallError<E> {
    /// Whether the same call may succeed when it is sent again: a worker is at fault, not the input. Whether this
    /// holds for [`CallError::ShareFailed`] is in the worker's words, and the shell decides.
    pub fn is_retryable(&self) -> bool {
        self.culprit().is_some() && !matches!(self, Self::ShareFailed { .. })
    }

    /// The worker that it is about.
    pub fn culprit(&self) -> Option<&WorkerId> {
        match self {
            Self::WorkerLost { worker }
            | Self::ShareFailed { worker, .. }
            | Self::PartialRefused { worker, .. }
            | Self::ReportRefused { worker, .. }
            | Self::ReportUnasked { worker }
            | Self::ShareIncomplete { worker, .. } => Some(worker),
            Self::ExpectedBegin
            | Self::DuplicateBegin
            | Self::FrameAfterCommit
            | Self::StreamTruncated { .. }
            | Self::ChunkOrder { .. }
            | Self::EmptyChunk { .. }
            | Self::ChunkPlace { .. }
            | Self::SideFirst { .. }
            | Self::PayloadLength { .. }
            | Self::CommitLength { .. }
            | Self::CommitChunks { .. }
            | Self::StreamIdle { .. } => None,
        }
    }
}
