//! Computing: a group whose operands are complete becomes cells, (tree node x token range), and each finished cell is
//! sent at once.
//!
//! A cell takes its place in the outgoing queue before it is computed, so no more than [`QUEUE`] finished partials
//! ever wait for a slow reader, and the pool has its next cell while the last one is being sent.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use attnd_kernel::{Effective, GroupCall, Kernels, KvHead, PartialRows, ScoreOverflow, Side};
use attnd_plan::{CellId, SideTensor, filled_nodes};
use attnd_wire::{ComputeBegin, ComputeReply, Error, MergedSums, Partial, Reason, proto, refusal};
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::assembly::Operands;
use super::keys::SentKeys;
use super::projection::project;
use super::second_pass::{self, Kept};
use super::side::SidePlanes;
use super::slices::Slicer;
use crate::budget::Reservation;
use crate::compute_pool::{BusyClock, ComputePool, WorkError};

/// Finished or running cells of one call: one is computed while the other is sent.
pub(crate) const QUEUE: usize = 2;

/// What all cells of a call share.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) begin: ComputeBegin,
    pub(crate) kernels: &'static Kernels,
    pub(crate) pool: ComputePool,
    /// Set when nobody wants the answer any more; cells are then given up at their next slice.
    pub(crate) cancelled: AtomicBool,
    /// Wall time with a kernel of this call running.
    pub(crate) busy: BusyClock,
    /// Memory of the cells that are computed or wait to be sent.
    pub(crate) memory: Reservation,
}

/// A group that can be computed. Its memory goes back with its last cell.
#[derive(Debug)]
pub(crate) struct ReadyGroup {
    pub(crate) group: usize,
    pub(crate) operands: Operands,
    pub(crate) planes: Arc<SidePlanes>,
    pub(crate) _memory: Reservation,
}

impl ReadyGroup {
    /// Lends the group to `work`, as the kernels take it.
    pub(crate) fn with_call<T>(&self, begin: &ComputeBegin, work: impl FnOnce(GroupCall<'_>) -> T) -> T {
        let Operands { q, kv, .. } = &self.operands;
        with_call(begin, self.group, q, kv, &self.planes, work)
    }
}

/// Lends a group to `work`, as the kernels take it: its queries, `[group_size, n_queries, query_dim]`, and its keys and values.
pub(crate) fn with_call<T>(
    begin: &ComputeBegin,
    group: usize,
    q: &[f32],
    kv: &KvHead,
    planes: &SidePlanes,
    work: impl FnOnce(GroupCall<'_>) -> T,
) -> T {
    let &ComputeBegin { shape, ref operator, .. } = begin;
    let of_group = |tensor| planes.of_group(tensor, group, &kv.slots(), &shape);
    let (mask, bias) = (of_group(SideTensor::Mask), of_group(SideTensor::Bias));
    let previous = planes.previous_of_group(group, &shape);
    let side = Side { mask: &mask, bias: &bias, previous: &previous };
    work(GroupCall { shape, operator, group, q, kv, side, compute: Effective::F32 })
}

/// Where replies of a call go.
pub(crate) type Replies = mpsc::Sender<Result<proto::ComputeReply, attnd_wire::Status>>;

/// The cells of one group, in the order in which they are computed.
pub(crate) fn cells_of(call: &Call, ready: &ReadyGroup) -> Vec<CellId> {
    let ComputeBegin { shape, tokens_per_cell, .. } = &call.begin;
    let (n_queries, group) = (shape.n_queries(), ready.group);
    let nodes = filled_nodes(ready.operands.kv.slots(), shape.n_keys());
    let firsts = (0..n_queries).step_by((*tokens_per_cell).max(1));
    firsts
        .flat_map(|first_token| {
            let tokens = (*tokens_per_cell).min(n_queries - first_token);
            nodes.iter().map(move |&(node, keys)| CellId { group, node, first_token, tokens, keys })
        })
        .collect()
}

/// Computes groups as they become ready, until there are no more, and reports on their rows as sums come, until there are
/// none to come. Returns the number of partials sent.
///
/// # Errors
/// The first thing that went wrong; cells after it are not computed.
pub(crate) async fn compute(
    call: Arc<Call>,
    ready: mpsc::Receiver<ReadyGroup>,
    sums: mpsc::Receiver<MergedSums>,
    replies: Replies,
) -> Result<u32, Error> {
    let kept = Arc::new(Kept::default());
    let second = second_pass::report(Arc::clone(&call), Arc::clone(&kept), sums, replies.clone());
    let (sent, ()) = futures::try_join!(first_pass(&call, &kept, ready, replies), second)?;
    Ok(sent)
}

async fn first_pass(
    call: &Arc<Call>,
    kept: &Kept,
    ready: mpsc::Receiver<ReadyGroup>,
    replies: Replies,
) -> Result<u32, Error> {
    let resident = ReceiverStream::new(ready).then(|ready| with_resident_keys(Arc::clone(call), ready));
    let all_cells = resident.flat_map(|ready| {
        let ready = match ready {
            Ok(ready) => ready,
            Err(error) => return futures::stream::iter(vec![Err(error)]),
        };
        let cells = cells_of(call, &ready);
        let ready = Arc::new(ready);
        if call.begin.outputs.is_some() && !cells.is_empty() {
            kept.keep(call, &ready);
        }
        let of_group = |cell| Ok((Arc::clone(&ready), cell));
        futures::stream::iter(cells.into_iter().map(of_group).collect::<Vec<_>>())
    });
    let computed = |cell: Result<(Arc<ReadyGroup>, CellId), Error>| async {
        let (ready, cell) = cell?;
        one_cell(call, ready, cell, &replies).await
    };
    let results = all_cells.map(computed).buffer_unordered(QUEUE);
    let mut results = std::pin::pin!(results);
    let mut sent = 0;
    while let Some(result) = results.next().await {
        result?;
        sent += 1;
    }
    Ok(sent)
}

/// A group whose keys are as kernels read them, and whose values are there.
async fn with_resident_keys(call: Arc<Call>, mut ready: ReadyGroup) -> Result<ReadyGroup, Error> {
    let sent = ready.operands.sent_keys.take();
    if sent.is_none() && !call.begin.shape.kv_is_projected() {
        return Ok(ready);
    }
    let group = ready.group;
    let call_on_pool = Arc::clone(&call);
    let make = move || {
        let Call { kernels, begin, busy, cancelled, .. } = &*call_on_pool;
        let _busy = busy.enter();
        let wanted = || !cancelled.load(Ordering::Relaxed);
        let ReadyGroup { operands: Operands { kv, .. }, planes, .. } = &mut ready;
        make_resident(kernels, begin, group, (kv, sent), planes, wanted).map(|()| ready)
    };
    on_pool(&call.pool, group, make).await?
}

/// Writes what isn't yet in the pages of a group as kernels read it: keys that a score function transforms, or keys and values that
/// are made of rows. On the current rayon pool.
///
/// # Errors
/// As [`SentKeys::transform`] and [`project`].
pub(crate) fn make_resident(
    kernels: &Kernels,
    begin: &ComputeBegin,
    group: usize,
    (kv, sent): (&mut KvHead, Option<SentKeys>),
    planes: &SidePlanes,
    wanted: impl Fn() -> bool,
) -> Result<(), Error> {
    match sent {
        Some(sent) => sent.transform(kernels, begin, group, kv, wanted),
        None if begin.shape.kv_is_projected() => project(kernels, begin, group, planes, kv, wanted),
        None => Ok(()),
    }
}

async fn one_cell(
    call: &Arc<Call>,
    ready: Arc<ReadyGroup>,
    cell: CellId,
    replies: &Replies,
) -> Result<(), Error> {
    let gone = || Error::new(Reason::Cancelled, "nobody waits for the partials");
    let place = replies.reserve().await.map_err(|_closed| gone())?;
    let call_on_pool = Arc::clone(call);
    let computed = on_pool(&call.pool, cell.group, move || kernel(&call_on_pool, &ready, cell)).await?;
    let partial = computed.ok_or_else(gone)??;
    place.send(Ok(partial));
    Ok(())
}

/// Runs work on a group on the compute pool.
///
/// # Errors
/// [`Reason::Internal`] where it panics.
pub(crate) async fn on_pool<T: Send + 'static>(
    pool: &ComputePool,
    group: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    pool.run(work).await.map_err(|error| match error {
        WorkError::Panicked(text) => {
            tracing::error!(group, panic = text, "a kernel panicked");
            Error::new(Reason::Internal, "a kernel panicked")
        }
        WorkError::Dropped => Error::new(Reason::Internal, "the compute pool dropped a cell"),
    })
}

/// Runs on the compute pool, checksum and all; `None` if nobody wants the answer any more.
fn kernel(call: &Call, ready: &ReadyGroup, cell: CellId) -> Option<Result<proto::ComputeReply, Error>> {
    let _busy = call.busy.enter();
    let wanted = || !call.cancelled.load(Ordering::Relaxed);
    let tokens = cell.first_token..cell.first_token + cell.tokens;
    let computed = ready.with_call(&call.begin, |group| {
        Slicer::new(call.kernels, group, wanted).attend(cell.node, tokens.clone())
    });
    let rows = checked(&call.begin, cell.group, &tokens, computed?);
    Some(rows.map(|rows| ComputeReply::Partial(Partial { cell, rows }).into()))
}

/// The partial of some tokens of a group, if it may be part of an answer.
///
/// # Errors
/// [`Reason::ScoreOverflow`] and [`Reason::OutputOverflow`], unless what isn't finite is allowed: then it is what IEEE 754 makes of it.
pub(crate) fn checked(
    begin: &ComputeBegin,
    group: usize,
    tokens: &Range<usize>,
    (rows, finite): (PartialRows, Result<(), ScoreOverflow>),
) -> Result<PartialRows, Error> {
    let &ComputeBegin { shape, allow_non_finite, .. } = begin;
    if allow_non_finite {
        return Ok(rows);
    }
    let first_head = group * shape.group_size();
    finite.map_err(|at| refusal::score_overflow(first_head, &at))?;
    // Of finite operands only sums that overflowed both ways are NaN; the coordinator takes none for an answer.
    match rows.o.iter().position(|o| o.is_nan()) {
        Some(at) => {
            let row = at / shape.value_dim();
            let (head, token) = (first_head + row / tokens.len(), tokens.start + row % tokens.len());
            Err(refusal::output_overflow(head, token))
        }
        None => Ok(rows),
    }
}
