//! One one-shot call, from its first chunk to its last partial.
//!
//! ```text
//! Receiving --Commit--> Computing --every share finished--> ended (Complete)
//!     |                     |
//!     +--- client's mistake, idle, lost worker, bad partial ---> ended (CancelShares, Fail)
//!     +--- client gone ----------------------------------------> ended (CancelShares)
//! ```
//!
//! A worker computes a kv group as soon as it has all of it, so partials arrive, and rows leave, in both states. What
//! makes an answer whole is Complete, which no call reaches without Commit.
//!
//! Where more is wanted than the context, shares report on rows that have merged, and owe these reports beside their partials.
//!
//! Exactly one terminal action comes out of a call, always the last one; events after it change nothing.

use std::sync::Arc;
use std::time::Duration;

use attnd_kernel::Outputs;

pub use self::error::CallError;
use crate::Tensor;
use crate::arrival::{Arrival, Arrivals, Misplaced};
use crate::cover::VerifiedPlan;
use crate::gather::{CellId, Gather, Ready};
use crate::report::{ReportId, Reports};
use crate::route::{Router, Run};
use crate::side::{AnyTensor, Cutter, Gathered, SideArrivals, SideTensor, Sides};
use crate::topology::WorkerId;

mod error;

/// A client that sends nothing for this long before Commit has lost its call.
pub const STREAM_IDLE: Duration = Duration::from_secs(10);

/// What happens to a call. `P` is the payload of a partial, `E` what a worker says when it fails.
#[derive(Clone, Debug)]
pub enum CallEvent<P, E = String> {
    /// A second Begin; the first one made the call.
    Begin,
    /// Bytes of a tensor arrived, checksum verified.
    ChunkIn {
        /// The client's count of chunks.
        index: u32,
        /// Which tensor.
        tensor: AnyTensor,
        /// Where they begin in it; `None` where its last chunk ended.
        offset: Option<u64>,
        /// Bytes.
        len: usize,
    },
    /// The client says that it sent everything.
    Commit {
        /// Chunks, by its count.
        chunks: u32,
        /// Bytes of all tensors, by its count.
        bytes: u64,
    },
    /// The client's stream ended.
    StreamEnded,
    /// A partial arrived, checksum verified.
    Partial {
        /// From whom.
        share: usize,
        /// What it covers.
        cell: CellId,
        /// The rows.
        part: P,
    },
    /// Elements of the score matrix arrived, checksum verified.
    Elements {
        /// From whom.
        share: usize,
        /// Of which rows.
        id: ReportId,
        /// How many.
        elements: u64,
    },
    /// A report arrived, checksum verified.
    Report {
        /// From whom.
        share: usize,
        /// On which rows.
        id: ReportId,
    },
    /// A worker says that it sent everything.
    Finished {
        /// Who.
        share: usize,
    },
    /// A worker is dead, or its stream broke.
    WorkerLost {
        /// Who.
        share: usize,
    },
    /// A worker refused its share or failed at it. After its last partial and report, this changes nothing.
    ShareFailed {
        /// Who.
        share: usize,
        /// Its words.
        what: E,
    },
    /// Time passed.
    Tick,
    /// Nobody waits for the answer any more.
    ClientGone,
}

/// What the shell does next, in this order.
#[derive(Debug)]
pub enum CallAction<P, E = String> {
    /// Send these runs of the chunk to their shares.
    Forward {
        /// Which tensor.
        tensor: Tensor,
        /// Where its bytes go.
        runs: Vec<Run>,
    },
    /// Send these parts of the chunk to their shares.
    ForwardSide {
        /// Which tensor.
        tensor: SideTensor,
        /// Where its bytes go.
        parts: Vec<Gathered>,
    },
    /// Send Commit to every share.
    CommitShares,
    /// Merge these partials and send the rows to the client; where reports are wanted, tell the shares of the group how
    /// the rows ended.
    Emit(Ready<P>),
    /// Every share has reported on these rows: send what their reports say together to the client.
    EmitReport(ReportId),
    /// End the streams of every share: nobody needs their work.
    CancelShares,
    /// The end: answer with this error.
    Fail(CallError<E>),
    /// The end: everything was emitted; answer Done.
    Complete,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Receiving,
    Computing,
    Ended,
}

/// The state machine of one call.
#[derive(Debug)]
pub struct Call<P> {
    phase: Phase,
    router: Router,
    cutter: Cutter,
    gather: Gather<P>,
    /// Where more is wanted than the context.
    reports: Option<Reports>,
    sides: SideArrivals,
    arrivals: Arrivals,
    chunks: u64,
    last_frame: Duration,
    /// Of each share: who, and whether it has nothing more to say.
    shares: Vec<(WorkerId, bool)>,
}

impl<P> Call<P> {
    /// A call whose Begin arrived at `now`, a time since any epoch that the caller keeps to. What travels beside its
    /// operands was made for the plan's shape. With `outputs`, every share reports on the rows that have merged.
    pub fn new(
        plan: &VerifiedPlan,
        dtype_bytes: usize,
        sides: &Sides,
        outputs: Option<Arc<Outputs>>,
        now: Duration,
    ) -> Self {
        let shape = plan.shape();
        Self {
            phase: Phase::Receiving,
            router: Router::new(plan, shape, dtype_bytes),
            cutter: Cutter::new(plan, shape, sides),
            gather: Gather::new(plan),
            reports: outputs.map(|outputs| Reports::new(plan, outputs)),
            sides: SideArrivals::new(sides),
            arrivals: Arrivals::new(shape, dtype_bytes),
            chunks: 0,
            last_frame: now,
            shares: plan.shares.iter().map(|share| (share.worker.clone(), false)).collect(),
        }
    }

    /// Takes one event and says what to do about it. Events of shares that the plan doesn't have are ignored.
    pub fn handle<E>(&mut self, event: CallEvent<P, E>, now: Duration) -> Vec<CallAction<P, E>> {
        if self.phase == Phase::Ended {
            return Vec::new();
        }
        self.step(event, now).unwrap_or_else(|error| {
            self.phase = Phase::Ended;
            vec![CallAction::CancelShares, CallAction::Fail(error)]
        })
    }

    /// When to send [`CallEvent::Tick`], if nothing happens before.
    pub fn deadline(&self) -> Option<Duration> {
        (self.phase == Phase::Receiving).then(|| self.last_frame + STREAM_IDLE)
    }

    /// Whether a terminal action came out.
    pub fn has_ended(&self) -> bool {
        self.phase == Phase::Ended
    }

    fn step<E>(
        &mut self,
        event: CallEvent<P, E>,
        now: Duration,
    ) -> Result<Vec<CallAction<P, E>>, CallError<E>> {
        match event {
            CallEvent::Begin | CallEvent::ChunkIn { .. } | CallEvent::Commit { .. }
                if self.phase != Phase::Receiving =>
            {
                Err(CallError::FrameAfterCommit)
            }
            CallEvent::Begin => Err(CallError::DuplicateBegin),
            CallEvent::ChunkIn { index, tensor, offset, len } => {
                self.last_frame = now;
                let offset = self.take_chunk(index, tensor, offset, len)?;
                Ok(vec![match tensor {
                    AnyTensor::Operand(tensor) => {
                        CallAction::Forward { tensor, runs: self.router.route(tensor, offset, len) }
                    }
                    AnyTensor::Side(tensor) => {
                        CallAction::ForwardSide { tensor, parts: self.cutter.cut(tensor, offset, len) }
                    }
                }])
            }
            CallEvent::Commit { chunks, bytes } => {
                self.check_commit(chunks, bytes)?;
                self.phase = Phase::Computing;
                Ok([CallAction::CommitShares].into_iter().chain(self.complete()).collect())
            }
            CallEvent::StreamEnded if self.phase == Phase::Receiving => {
                let operands: u64 = self.arrivals.tensors().iter().map(|arrival| arrival.need).sum();
                let need = operands + self.sides.tensors().iter().map(|arrival| arrival.need).sum::<u64>();
                Err(CallError::StreamTruncated { chunks: self.chunks, bytes: self.received(), need })
            }
            CallEvent::Partial { share, cell, part } => self.take_partial(share, cell, part),
            CallEvent::Elements { share, id, elements } => self.take_elements(share, id, elements),
            CallEvent::Report { share, id } => self.take_report(share, id),
            CallEvent::Finished { share } => self.finish_share(share),
            CallEvent::WorkerLost { share } => {
                self.end_share(share, |worker| CallError::WorkerLost { worker })
            }
            CallEvent::ShareFailed { share, what } => {
                self.end_share(share, |worker| CallError::ShareFailed { worker, what })
            }
            CallEvent::Tick if self.deadline().is_some_and(|deadline| deadline <= now) => {
                // The limit and not the time that a late tick found, so that equal faults have equal texts.
                Err(CallError::StreamIdle {
                    idle_ms: u64::try_from(STREAM_IDLE.as_millis()).unwrap_or(u64::MAX),
                })
            }
            CallEvent::ClientGone => {
                self.phase = Phase::Ended;
                Ok(vec![CallAction::CancelShares])
            }
            CallEvent::StreamEnded | CallEvent::Tick => Ok(Vec::new()),
        }
    }

    fn received(&self) -> u64 {
        let operands: u64 = self.arrivals.tensors().iter().map(|arrival| arrival.got).sum();
        operands + self.sides.tensors().iter().map(|arrival| arrival.got).sum::<u64>()
    }

    /// Counts a chunk in; returns where it begins in its tensor.
    fn take_chunk<E>(
        &mut self,
        index: u32,
        tensor: AnyTensor,
        offset: Option<u64>,
        len: usize,
    ) -> Result<u64, CallError<E>> {
        let index = u64::from(index);
        if index != self.chunks {
            return Err(CallError::ChunkOrder { expected: self.chunks, got: index });
        }
        if len == 0 {
            return Err(CallError::EmptyChunk { index });
        }
        let placed = match tensor {
            AnyTensor::Side(side) => {
                self.sides.take(side, offset, len as u64).map_err(|why| why.of_chunk(index, tensor))
            }
            AnyTensor::Operand(operand) => {
                self.sides.check_operand().map_err(|why| why.of_chunk(index, tensor))?;
                let placed = self.arrivals.take(operand, offset, len as u64);
                placed.map_err(|why| CallError::ChunkPlace { index, tensor, why })
            }
        };
        let start = placed.map_err(|error| match (offset, error) {
            (None, CallError::ChunkPlace { why: Misplaced::PastTheEnd { bytes, need }, .. }) => {
                CallError::PayloadLength { tensor, need, got: bytes.end }
            }
            (_, error) => error,
        })?;
        self.chunks += 1;
        Ok(start)
    }

    fn check_commit<E>(&self, chunks: u32, bytes: u64) -> Result<(), CallError<E>> {
        if u64::from(chunks) != self.chunks {
            return Err(CallError::CommitChunks { declared: u64::from(chunks), got: self.chunks });
        }
        if bytes != self.received() {
            return Err(CallError::CommitLength { declared: bytes, got: self.received() });
        }
        let sides =
            self.sides.tensors().iter().map(|side| (AnyTensor::from(side.tensor), side.need, side.got));
        let operands = self.arrivals.tensors().iter();
        let operands = operands.map(|Arrival { tensor, need, got, .. }| ((*tensor).into(), *need, *got));
        match sides.chain(operands).find(|(_, need, got)| got != need) {
            Some((tensor, need, got)) => Err(CallError::PayloadLength { tensor, need, got }),
            None => Ok(()),
        }
    }

    fn take_partial<E>(
        &mut self,
        share: usize,
        cell: CellId,
        part: P,
    ) -> Result<Vec<CallAction<P, E>>, CallError<E>> {
        let Some((worker, _)) = self.shares.get(share) else { return Ok(Vec::new()) };
        match self.gather.accept(share, cell, part) {
            Ok(ready) => Ok(ready.map(CallAction::Emit).into_iter().collect()),
            Err(why) => Err(CallError::PartialRefused { worker: worker.clone(), why }),
        }
    }

    fn take_elements<E>(
        &mut self,
        share: usize,
        id: ReportId,
        elements: u64,
    ) -> Result<Vec<CallAction<P, E>>, CallError<E>> {
        let Some((worker, _)) = self.shares.get(share) else { return Ok(Vec::new()) };
        let worker = worker.clone();
        let Some(reports) = &mut self.reports else { return Err(CallError::ReportUnasked { worker }) };
        match reports.count(share, id, elements) {
            Ok(()) => Ok(Vec::new()),
            Err(why) => Err(CallError::ReportRefused { worker, why }),
        }
    }

    fn take_report<E>(&mut self, share: usize, id: ReportId) -> Result<Vec<CallAction<P, E>>, CallError<E>> {
        let Some((worker, _)) = self.shares.get(share) else { return Ok(Vec::new()) };
        let worker = worker.clone();
        let Some(reports) = &mut self.reports else { return Err(CallError::ReportUnasked { worker }) };
        match reports.accept(share, id, self.gather.has_left(id.group, id.first_token)) {
            Ok(is_last) => Ok(is_last.then_some(CallAction::EmitReport(id)).into_iter().collect()),
            Err(why) => Err(CallError::ReportRefused { worker, why }),
        }
    }

    /// Partials and reports that a share still owes.
    fn missing_of(&self, share: usize) -> usize {
        let reports = self.reports.as_ref().map_or(0, |reports| reports.missing_of(share));
        self.gather.missing_of(share) + reports
    }

    fn finish_share<E>(&mut self, share: usize) -> Result<Vec<CallAction<P, E>>, CallError<E>> {
        let missing = self.missing_of(share);
        match self.shares.get_mut(share) {
            Some((worker, _)) if missing > 0 => {
                return Err(CallError::ShareIncomplete { worker: worker.clone(), missing });
            }
            Some((_, finished)) => *finished = true,
            None => return Ok(Vec::new()),
        }
        Ok(self.complete().into_iter().collect())
    }

    /// Ends the call when nobody owes anything: the client its Commit, a share its partials and reports.
    fn complete<E>(&mut self) -> Option<CallAction<P, E>> {
        let reported = self.reports.as_ref().is_none_or(Reports::is_complete);
        let all = self.shares.iter().all(|(_, finished)| *finished) && self.gather.is_complete() && reported;
        (all && self.phase == Phase::Computing).then(|| {
            self.phase = Phase::Ended;
            CallAction::Complete
        })
    }

    /// A worker whose partials and reports are all here is not missed, however it ends.
    fn end_share<E>(
        &mut self,
        share: usize,
        error: impl FnOnce(WorkerId) -> CallError<E>,
    ) -> Result<Vec<CallAction<P, E>>, CallError<E>> {
        match self.shares.get(share) {
            Some((worker, _)) if self.missing_of(share) > 0 => Err(error(worker.clone())),
            _ => self.finish_share(share),
        }
    }
}

#[cfg(test)]
mod tests;
