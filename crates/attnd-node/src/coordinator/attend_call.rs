//! One Attend call: a shell around [`attnd_plan::Call`], which decides.
//!
//! One loop moves everything: frames of the client become messages to workers, their partials become rows on the
//! compute pool, rows go to the client. Every queue is bounded, and each stage is only read when the next has room:
//!
//! ```text
//! client --frames--> pending --4 messages--> worker        no frame is read while a message waits
//! client <--4 messages-- outbox <-- merging <-- ready <-- gather <--2 messages-- worker
//!                                                          no partial is read while many rows wait, and only those of
//!                                                          the slowest shares while the gather holds many
//! ```
//!
//! Where more is wanted than the context, merged rows go back to the workers as sums, and what these report on them takes the same
//! way as partials (`second_pass.rs`); elements of the score matrix are handed on as they come.
//!
//! So the coordinator holds a few chunks of K and V at a time, and a bounded number of partials. Whoever takes nothing
//! for [`STALL`] of what waits for it, client or worker, ends the call. The future of a call owns all of it:
//! dropping it, because the client is gone or the deadline has passed, cancels the shares.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Instant;

use attnd_kernel::{AttnShape, Compute, Mask, PartialRows};
use attnd_plan::call::STREAM_IDLE;
use attnd_plan::{Call, CallAction, CallEvent, Gathered, Plan, Ready, Run, SideTensor, Tensor};
use attnd_wire::limits::STALL;
use attnd_wire::proto;
use attnd_wire::surroundings::now;
use attnd_wire::{
    AttendReply, AttendRequest, Begin, Commit, ComputeReply, ComputeRequest, Deadline, Done, Error, Partial,
    PlanSummary, Reason, Status, TensorChunk, operator, refusal,
};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::SendTimeoutError;
use tonic::Streaming;

use self::averaging::Averaging;
use self::clock::{Clock, Stall};
use self::outgoing::{Outgoing, room};
use super::Hub;
use super::attention_service::Places;
use super::backlog::{Backlog, RowKey, bytes_of};
use super::finish::{Checks, Finish, finish};
use super::incoming::{Incoming, Said};
use super::placement::{Placement, place};
use super::second_pass::{Reported, SecondPass, numbers};
use super::worker_actor::OpenedShare;
use crate::compute_pool::WorkError;
use crate::shutdown::Calls;

mod averaging;
mod clock;
mod outgoing;
mod reports;
mod side;

/// Rows of a group whose partials are complete and wait for the pool. With more, no partials are read.
const READY: usize = 8;
/// Messages for the client that wait. With more, nothing is merged.
const OUTBOX: usize = 4;
/// Messages for the client that wait, elements among them. With more, nothing is read from workers.
const FULL_OUTBOX: usize = 64;

/// Answers one call. `Ok` means that Done was sent.
///
/// # Errors
/// The first thing that went wrong.
pub(crate) async fn attend(
    hub: &Hub,
    calls: &Calls,
    places: &Places,
    call_id: u64,
    mut requests: Streaming<proto::AttendRequest>,
    replies: &mpsc::Sender<proto::AttendReply>,
    deadline: Deadline,
) -> Result<(), Error> {
    let answer = async {
        let (begin, empty_rows) = read_begin(hub, &mut requests).await?;
        // Not before: a stream that says nothing is no call yet.
        let _place = places.take()?;
        let begun = now();
        let placement = place(hub, &begin, call_id, deadline).await?;
        Flow::new(hub, begin, begun, empty_rows, placement, requests, replies).run().await
    };
    tokio::select! {
        answered = answer => answered,
        () = replies.closed() => Err(gone()),
        () = tokio::time::sleep_until(deadline.at().into()) => Err(Deadline::expired()),
        () = calls.is_cut() => Err(Error::new(Reason::Draining, "the time to finish is over")),
    }
}

fn gone() -> Error {
    Error::new(Reason::Cancelled, "the client is gone")
}

/// What is asked for, and how many of its rows see no key.
async fn read_begin(
    hub: &Hub,
    requests: &mut Streaming<proto::AttendRequest>,
) -> Result<(Begin, u64), Error> {
    let first = tokio::time::timeout(STREAM_IDLE, requests.message())
        .await
        .map_err(|_elapsed| refusal::stream_idle(STREAM_IDLE))??;
    let Some(first) = first else { return Err(refusal::expected_begin()) };
    let AttendRequest::Begin(begin) = AttendRequest::decode(first, None)? else {
        return Err(refusal::expected_begin());
    };
    let (shape, operator) = (begin.shape, Arc::clone(&begin.operator));
    // Each element of the batch may have a mask of its own: millions of rows are too many for this thread.
    let counted = hub.pool.run(move || empty_rows(operator.mask(), &shape)).await;
    let empty_rows = counted.map_err(|error| Error::new(Reason::Internal, format!("counting {error}")))?;
    if begin.forbid_empty_rows && empty_rows > 0 {
        return Err(refusal::empty_row(empty_rows));
    }
    Ok((begin, empty_rows))
}

/// Rows that see no key. The mask alone says so: a call that must not have any is refused before it costs a byte.
pub(crate) fn empty_rows(mask: &Mask, shape: &AttnShape) -> u64 {
    let of_element = |element: usize| {
        let mask = mask.of_batch(element, shape);
        (0..shape.n_queries()).filter(|token| mask.visible(*token).is_empty()).count()
    };
    let blind: usize = (0..shape.batch()).map(of_element).sum();
    (blind * shape.n_heads()) as u64
}

type Merging = BoxFuture<'static, (RowKey, Result<Result<Made, Error>, WorkError>)>;

/// What waits for the pool.
enum Whole {
    /// All partials of some rows.
    Rows(Ready<PartialRows>),
    /// All reports on some rows.
    Reports(RowKey, Reported),
}

/// What the pool made of it.
enum Made {
    Rows(Finish),
    Numbers(Vec<proto::AttendReply>),
}

/// A call that has begun.
struct Flow<'a> {
    hub: &'a Hub,
    begin: Begin,
    call: Call<PartialRows>,
    clock: Clock,

    requests: Streaming<proto::AttendRequest>,
    requests_ended: bool,
    /// For the workers, in order, of one frame of the client at most.
    pending: VecDeque<(usize, ComputeRequest)>,
    pending_stall: Stall,
    shares: Vec<Outgoing>,
    /// Where rows that see no key become the mean of the values.
    averaging: Option<Averaging>,

    incoming: Incoming,
    backlog: Backlog,
    /// Where more is wanted than the context.
    second: Option<SecondPass>,
    ready: VecDeque<Whole>,
    merging: FuturesUnordered<Merging>,
    outbox: VecDeque<proto::AttendReply>,
    outbox_stall: Stall,
    replies: &'a mpsc::Sender<proto::AttendReply>,

    gathered: bool,
    tokens_per_cell: usize,
    done: Done,
}

impl<'a> Flow<'a> {
    fn new(
        hub: &'a Hub,
        begin: Begin,
        begun: Instant,
        empty_rows: u64,
        placement: Placement,
        requests: Streaming<proto::AttendRequest>,
        replies: &'a mpsc::Sender<proto::AttendReply>,
    ) -> Self {
        let Placement { plan, shares } = placement;
        let mut clock = Clock::new(begun);
        let kernel_id = begin.operator.kernel_id(Compute::F32);
        // Where tensors hide keys too, rows are counted as they end.
        let empty_rows = if operator::hides_single_keys(&begin.operator) { 0 } else { empty_rows };
        let mut done = Done { kernel_id: kernel_id.to_owned(), empty_rows, ..Done::default() };
        done.timings.plan = now().saturating_duration_since(clock.begun).as_secs_f64();
        let mut incoming = Vec::with_capacity(shares.len());
        let mut outgoing = Vec::with_capacity(shares.len());
        for (share, OpenedShare { requests, replies }) in plan.shares.iter().zip(shares) {
            incoming.push(replies);
            outgoing.push(Outgoing::new(share.worker.clone(), requests));
        }
        let (outputs, now) = (begin.outputs.clone(), clock.client_time());
        let call = Call::new(&plan, begin.dtype.size(), &begin.sides, outputs.clone(), now);
        let second = outputs.map(|outputs| SecondPass::new(outputs, &plan, &begin.shape));
        let backlog = Backlog::new(&plan, &begin.shape);
        let averaging = Averaging::of(&begin);
        Self {
            hub,
            begin,
            call,
            clock,
            requests,
            requests_ended: false,
            pending: VecDeque::new(),
            pending_stall: Stall::default(),
            shares: outgoing,
            averaging,
            incoming: Incoming::new(incoming),
            backlog,
            second,
            ready: VecDeque::new(),
            merging: FuturesUnordered::new(),
            outbox: VecDeque::from([planned(&plan, kernel_id)]),
            outbox_stall: Stall::default(),
            replies,
            gathered: false,
            tokens_per_cell: plan.tokens_per_cell.max(1),
            done,
        }
    }

    async fn run(mut self) -> Result<(), Error> {
        while !self.is_answered() {
            self.start_merging()?;
            let is_adding = self.is_adding();
            let queue = self.pending.front().and_then(|(share, _)| self.shares.get(*share)?.requests.clone());
            let reads_client = self.pending.is_empty() && !is_adding && !self.requests_ended;
            let wanted = self.backlog.wanted();
            let client_stalled = self.outbox_stall.after(!self.outbox.is_empty());
            let worker_stalled = self.pending_stall.after(!self.pending.is_empty());
            let idle = self.call.deadline().filter(|_| reads_client).map(|at| self.clock.instant_of(at));
            tokio::select! {
                biased;
                room = self.replies.reserve(), if !self.outbox.is_empty() => {
                    let room = room.map_err(|_closed| gone())?;
                    if let Some(reply) = self.outbox.pop_front() {
                        room.send(reply);
                    }
                    self.outbox_stall = Stall::default();
                }
                Some(merged) = self.merging.next() => self.take_merged(merged)?,
                added = Averaging::added(&mut self.averaging), if is_adding => {
                    added?;
                    self.free_client();
                }
                Some((share, said)) = poll_fn(|cx| self.incoming.poll(wanted.as_deref(), cx)),
                    if self.ready.len() < READY && self.outbox.len() < FULL_OUTBOX => self.take_said(share, said)?,
                room = room(queue), if !self.pending.is_empty() => {
                    if let Some((share, request)) = self.pending.pop_front() {
                        let was_commit = matches!(request, ComputeRequest::Commit(_));
                        let was_sums = matches!(request, ComputeRequest::Sums(_));
                        if let Some(room) = room {
                            room.send(request.into());
                        }
                        self.after_sent(share, was_commit, was_sums);
                    }
                    self.pending_stall = Stall::default();
                }
                frame = self.requests.message(), if reads_client => self.take_frame(frame)?,
                () = until(idle), if idle.is_some() => self.event(CallEvent::Tick, &Bytes::new())?,
                () = until(client_stalled), if client_stalled.is_some() => return Err(refusal::stalled(STALL)),
                () = until(worker_stalled), if worker_stalled.is_some() => return Err(self.worker_stalled()),
                else => return Err(Error::new(Reason::Internal, "a call waits for nothing")),
            }
        }
        self.done.timings = self.clock.timings(self.done.timings);
        let done = self.replies.send_timeout(AttendReply::Done(self.done).into(), STALL).await;
        done.map_err(|error| match error {
            SendTimeoutError::Timeout(_) => refusal::stalled(STALL),
            SendTimeoutError::Closed(_) => gone(),
        })
    }

    /// A worker reads whatever comes, also while it computes: it is sick if the first message in line doesn't leave.
    fn worker_stalled(&self) -> Error {
        match self.pending.front().and_then(|(share, _)| self.shares.get(*share)) {
            Some(share) => {
                refusal::worker_lost(&share.worker, &format!("took no message for {} ms", STALL.as_millis()))
            }
            None => Error::new(Reason::Internal, "a worker that nobody waits for is late"),
        }
    }

    fn is_answered(&self) -> bool {
        self.gathered && self.ready.is_empty() && self.merging.is_empty() && self.outbox.is_empty()
    }

    // === client to workers ===

    fn take_frame(&mut self, frame: Result<Option<proto::AttendRequest>, Status>) -> Result<(), Error> {
        let Some(frame) = frame? else {
            self.requests_ended = true;
            return self.event(CallEvent::StreamEnded, &Bytes::new());
        };
        match AttendRequest::decode(frame, Some(&self.begin))? {
            AttendRequest::Begin(_) => self.event(CallEvent::Begin, &Bytes::new()),
            AttendRequest::Chunk(chunk) => {
                self.clock.chunk_arrived();
                let TensorChunk { index, tensor, offset, data } = chunk;
                self.event(CallEvent::ChunkIn { index, tensor, offset, len: data.len() }, &data)
            }
            AttendRequest::Commit(Commit { chunks, bytes }) => {
                self.event(CallEvent::Commit { chunks, bytes }, &Bytes::new())
            }
        }
    }

    /// Puts a run of `data` into messages. They share the bytes of the client's message.
    fn forward(&mut self, tensor: Tensor, run: &Run, data: &Bytes) {
        let Some(share) = self.shares.get_mut(run.share) else { return };
        let chunks = share.cut(tensor, run, data);
        self.pending.extend(chunks.map(|chunk| (run.share, ComputeRequest::Chunk(chunk))));
    }

    /// The same of what travels beside the operands.
    fn forward_side(&mut self, tensor: SideTensor, part: &Gathered, data: &Bytes) {
        let Some(share) = self.shares.get_mut(part.share) else { return };
        let chunks = share.cut_side(tensor, part, data);
        self.pending.extend(chunks.map(|chunk| (part.share, ComputeRequest::Chunk(chunk))));
    }

    fn after_sent(&mut self, share: usize, was_commit: bool, was_sums: bool) {
        if let Some(second) = self.second.as_mut().filter(|_| was_sums) {
            second.sent(share);
        }
        let is_due = self.second.as_ref().is_some_and(|second| second.is_due(share));
        if let Some(share) = self.shares.get_mut(share) {
            if was_commit {
                share.committed = true;
                self.clock.sent_commit();
            }
            // The end of the stream says that no sums follow either.
            if share.committed && !is_due {
                share.requests = None;
            }
        }
        self.free_client();
    }

    /// A chunk of V is being added up.
    fn is_adding(&self) -> bool {
        self.averaging.as_ref().is_some_and(Averaging::is_adding)
    }

    /// From here on, time is the client's, unless something else still holds it back.
    fn free_client(&mut self) {
        if self.pending.is_empty() && !self.is_adding() {
            self.clock.client_freed();
        }
    }

    // === workers to client ===

    fn take_said(&mut self, share: usize, said: Said) -> Result<(), Error> {
        let event = match said {
            Some(Ok(ComputeReply::Partial(Partial { cell, rows }))) => {
                self.clock.last_partial = Some(now());
                self.backlog.took(share, (cell.group, cell.first_token), bytes_of(&rows));
                CallEvent::Partial { share, cell, part: rows }
            }
            Some(Ok(ComputeReply::Elements(elements))) => return self.take_elements(share, elements),
            Some(Ok(ComputeReply::Report(report))) => return self.take_report(share, report),
            Some(Ok(ComputeReply::Finished(finished))) => {
                let compute = &mut self.done.timings.compute;
                *compute = compute.max(finished.compute_seconds);
                CallEvent::Finished { share }
            }
            Some(Err(what)) => CallEvent::ShareFailed { share, what },
            None => CallEvent::WorkerLost { share },
        };
        self.event(event, &Bytes::new())
    }

    fn start_merging(&mut self) -> Result<(), Error> {
        while !self.is_adding()
            && self.merging.len() <= self.hub.pool.threads()
            && self.outbox.len() < OUTBOX
            && let Some(whole) = self.ready.pop_front()
        {
            let (pool, kernels) = (self.hub.pool.clone(), self.hub.kernels);
            let Begin { shape, allow_non_finite, .. } = self.begin;
            let operator = Arc::clone(&self.begin.operator);
            let keep_sums = self.second.is_some();
            self.merging.push(match whole {
                Whole::Rows(ready) => {
                    let mean = self.averaging.as_ref().map(|averaging| averaging.mean(ready.group));
                    let checks = Checks { mean: mean.transpose()?, allow_non_finite, keep_sums };
                    let row = (ready.group, ready.tokens.start);
                    let work = move || finish(ready, &shape, &operator, checks, kernels).map(Made::Rows);
                    Box::pin(async move { (row, pool.run(work).await) })
                }
                Whole::Reports(row, reported) => {
                    let work = move || numbers(reported, &shape, &operator).map(Made::Numbers);
                    Box::pin(async move { (row, pool.run(work).await) })
                }
            });
        }
        Ok(())
    }

    fn take_merged(
        &mut self,
        (row, made): (RowKey, Result<Result<Made, Error>, WorkError>),
    ) -> Result<(), Error> {
        let made = made.map_err(|error| Error::new(Reason::Internal, format!("merging {error}")))?;
        match made? {
            Made::Rows(Finish { replies, sums, spent, unseen, first_unseen }) => {
                self.backlog.merged(row);
                if operator::hides_single_keys(&self.begin.operator) {
                    if let Some((head, token)) = first_unseen.filter(|_| self.begin.forbid_empty_rows) {
                        return Err(refusal::empty_row_at(head, token));
                    }
                    self.done.empty_rows += unseen;
                }
                self.done.timings.merge += spent.as_secs_f64();
                self.outbox.extend(replies);
                if let (Some(second), Some(sums)) = (&mut self.second, sums) {
                    let owners = second.merged(sums.clone());
                    let sums = owners.into_iter().map(|share| (share, ComputeRequest::Sums(sums.clone())));
                    self.pending.extend(sums);
                }
                if !self.pending.is_empty() {
                    self.clock.client_held();
                }
            }
            Made::Numbers(replies) => {
                self.backlog.reported(row);
                self.outbox.extend(replies);
            }
        }
        Ok(())
    }

    // === decisions ===

    /// Asks the state machine what an event means, and does it. `data` are the bytes of a chunk.
    fn event(&mut self, event: CallEvent<PartialRows, Error>, data: &Bytes) -> Result<(), Error> {
        for action in self.call.handle(event, self.clock.client_time()) {
            match action {
                CallAction::Forward { tensor, runs } => {
                    for run in &runs {
                        self.forward(tensor, run, data);
                    }
                    if let Some(averaging) = &mut self.averaging {
                        averaging.add(&self.hub.pool, tensor, runs, data.clone())?;
                    }
                }
                CallAction::ForwardSide { tensor, parts } => {
                    for part in &parts {
                        self.forward_side(tensor, part, data);
                    }
                }
                CallAction::CommitShares => {
                    let commits = self.shares.iter().enumerate();
                    self.pending.extend(commits.map(|(share, to)| (share, ComputeRequest::Commit(to.sent))));
                    self.clock.committed = Some(now());
                }
                CallAction::Emit(ready) => self.ready.push_back(Whole::Rows(ready)),
                CallAction::EmitReport(id) => {
                    let reported = self.second.as_mut().and_then(|second| second.whole(id));
                    let row = (id.group, id.first_token);
                    self.ready.extend(reported.map(|reported| Whole::Reports(row, reported)));
                }
                // Comes with Fail, and the error ends this future, which owns the shares.
                CallAction::CancelShares => self.pending.clear(),
                CallAction::Fail(error) => return Err(error.into()),
                CallAction::Complete => self.gathered = true,
            }
        }
        if !self.pending.is_empty() || self.is_adding() {
            self.clock.client_held();
        }
        Ok(())
    }
}

fn planned(plan: &Plan, kernel_id: &str) -> proto::AttendReply {
    AttendReply::Planned(PlanSummary::new(plan, kernel_id)).into()
}

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant.into()).await,
        None => std::future::pending().await,
    }
}
