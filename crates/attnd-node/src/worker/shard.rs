//! The actor of one Compute stream: it owns what the stream brings and everything that runs for it.
//!
//! Frames come in through its mailbox, partials go out through a bounded queue. It ends with the stream: when the
//! answer is complete, when anything is wrong, when the deadline passes, or when the reader of [`Replies`] is gone.
//! With it go its tasks, its groups and their memory.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context as TaskContext, Poll};
use std::time::Instant;

use attnd_wire::proto::{self, compute_reply};
use attnd_wire::{ComputeReply, ComputeRequest, Deadline, Error, Finished, MergedSums, Reason, Status};
use futures::{FutureExt, Stream};
use kameo::actor::{Actor, ActorRef};
use kameo::error::Infallible;
use kameo::message::{Context, Message};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tonic::Streaming;

use super::cells::{self, Call, ReadyGroup};
use super::intake::{Intake, Progress};
use crate::shutdown::InFlight;

/// Frames that wait for the actor; more stay in the connection's window.
pub(crate) const MAILBOX: usize = 2;

/// The actor.
#[derive(Debug)]
pub(crate) struct Shard {
    intake: Intake,
    call: Arc<Call>,
    /// Groups on their way to the compute task; dropped at Commit, which ends that task after the last group.
    ready: Option<mpsc::Sender<ReadyGroup>>,
    /// Sums on their way there; dropped with the last one, which ends the second pass.
    sums: Option<mpsc::Sender<MergedSums>>,
    replies: cells::Replies,
    tasks: JoinSet<()>,
}

/// What a shard starts from.
#[derive(Debug)]
pub(crate) struct ShardArgs {
    pub(crate) intake: Intake,
    /// Groups of this share: an upper bound of those that wait to be computed.
    pub(crate) groups: usize,
    /// Sums that will come: an upper bound of those that wait for the second pass.
    pub(crate) sums: usize,
    pub(crate) call: Arc<Call>,
    pub(crate) inbound: Streaming<proto::ComputeRequest>,
    pub(crate) replies: cells::Replies,
    pub(crate) deadline: Deadline,
}

/// The next frame, or the end of the stream. An error of the connection ends it too.
struct Frame(Result<Option<proto::ComputeRequest>, Status>);

/// The compute task has ended.
struct Computed(Result<u32, Error>);

/// Nobody waits for the answer any more.
struct Expired;

impl Actor for Shard {
    type Args = ShardArgs;
    type Error = Infallible;

    async fn on_start(args: ShardArgs, actor: ActorRef<Self>) -> Result<Self, Infallible> {
        let ShardArgs { intake, groups, sums: n_sums, call, mut inbound, replies, deadline } = args;
        let (ready, groups_ready) = mpsc::channel(groups.max(1));
        let (sums, sums_ready) = mpsc::channel(n_sums.clamp(1, Semaphore::MAX_PERMITS));
        let mut tasks = JoinSet::new();

        let compute = cells::compute(Arc::clone(&call), groups_ready, sums_ready, replies.clone());
        let shard = actor.clone();
        tasks.spawn(async move {
            let result = AssertUnwindSafe(compute)
                .catch_unwind()
                .await
                .unwrap_or_else(|_panic| Err(Error::new(Reason::Internal, "the compute task panicked")));
            // A shard that is gone needs no result.
            shard.tell(Computed(result)).send().await.ok();
        });
        let shard = actor.clone();
        tasks.spawn(async move {
            loop {
                let frame = inbound.message().await;
                let last = !matches!(frame, Ok(Some(_)));
                if shard.tell(Frame(frame)).send().await.is_err() || last {
                    return;
                }
            }
        });
        tasks.spawn(async move {
            tokio::time::sleep_until(deadline.at().into()).await;
            actor.tell(Expired).send().await.ok();
        });
        Ok(Self { intake, call, ready: Some(ready), sums: (n_sums > 0).then_some(sums), replies, tasks })
    }
}

impl Shard {
    fn take(&mut self, frame: Result<Option<proto::ComputeRequest>, Status>) -> Result<(), Error> {
        let Some(frame) = frame.map_err(Error::from)? else { return self.intake.end() };
        match self.intake.frame(ComputeRequest::decode(frame, Some(&self.call.begin))?)? {
            Progress::More => {}
            Progress::Ready(group) => {
                let queued = self.ready.as_ref().is_some_and(|ready| ready.try_send(*group).is_ok());
                if !queued {
                    // The queue holds as many groups as there are; the task alone can be gone, and says why itself.
                    tracing::debug!("a group is ready and nothing computes any more");
                }
            }
            Progress::Committed => self.ready = None,
            Progress::Sums(sums) => {
                let queued = self.sums.as_ref().is_some_and(|queue| queue.try_send(sums).is_ok());
                if !queued {
                    // The queue holds as many as there are; the task alone can be gone, and says why itself.
                    tracing::debug!("rows have merged and nothing reports any more");
                }
                if self.intake.has_all_sums() {
                    self.sums = None;
                }
            }
        }
        Ok(())
    }

    /// Ends the stream with an error: nothing more is computed. The memory goes back as soon as the cells that run have
    /// come to their next slice, which may be after the peer knows.
    async fn fail(&mut self, error: Error) {
        self.call.cancelled.store(true, Ordering::Relaxed);
        self.tasks.abort_all();
        self.ready = None;
        self.sums = None;
        self.intake.abandon();
        tracing::debug!(%error, "the call fails");
        // A reader that is gone needs no error.
        self.replies.send(Err(error.into())).await.ok();
    }
}

impl Message<Frame> for Shard {
    type Reply = ();

    async fn handle(&mut self, Frame(frame): Frame, ctx: &mut Context<Self, ()>) {
        if let Err(error) = self.take(frame) {
            self.fail(error).await;
            ctx.stop();
        }
    }
}

impl Message<Computed> for Shard {
    type Reply = ();

    async fn handle(&mut self, Computed(result): Computed, ctx: &mut Context<Self, ()>) {
        match result {
            Ok(partials) => {
                let compute_seconds = self.call.busy.total(Instant::now()).as_secs_f64();
                let finished = ComputeReply::Finished(Finished { compute_seconds, partials });
                self.replies.send(Ok(finished.into())).await.ok();
            }
            Err(error) => self.fail(error).await,
        }
        ctx.stop();
    }
}

impl Message<Expired> for Shard {
    type Reply = ();

    async fn handle(&mut self, _: Expired, ctx: &mut Context<Self, ()>) {
        self.fail(Deadline::expired()).await;
        ctx.stop();
    }
}

/// The reply stream of one call. Dropping it is how a peer cancels: the shard is killed, and its memory returns with
/// the cells that run.
#[derive(Debug)]
pub(crate) struct Replies {
    queue: mpsc::Receiver<Result<proto::ComputeReply, Status>>,
    shard: ActorRef<Shard>,
    call: Arc<Call>,
    answered: bool,
    _in_flight: InFlight,
}

impl Replies {
    pub(crate) fn new(
        queue: mpsc::Receiver<Result<proto::ComputeReply, Status>>,
        shard: ActorRef<Shard>,
        call: Arc<Call>,
        in_flight: InFlight,
    ) -> Self {
        Self { queue, shard, call, answered: false, _in_flight: in_flight }
    }
}

impl Stream for Replies {
    type Item = Result<proto::ComputeReply, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<Option<Self::Item>> {
        if self.answered {
            return Poll::Ready(None);
        }
        let next = std::task::ready!(self.queue.poll_recv(cx)).unwrap_or_else(|| {
            // Only a shard that died by a panic of its own leaves without a last word.
            Err(Error::new(Reason::Internal, "the shard of this call died").into())
        });
        self.answered = match &next {
            Ok(proto::ComputeReply { part: Some(compute_reply::Part::Finished(_)) }) => {
                // Every cell was handed on, and the shard may live a little longer than the coordinator takes to send
                // the next call, which counts on this memory.
                self.call.memory.release();
                true
            }
            Ok(_partial) => false,
            Err(_) => true,
        };
        Poll::Ready(Some(next))
    }
}

impl Drop for Replies {
    fn drop(&mut self) {
        self.call.cancelled.store(true, Ordering::Relaxed);
        self.shard.kill();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use attnd_kernel::{AttnShape, Causal, Dims, Dtype, Kernels, Operator};
    use attnd_wire::ComputeBegin;
    use futures::StreamExt;
    use kameo::actor::Spawn;

    use super::*;
    use crate::budget::Budget;
    use crate::compute_pool::{BusyClock, ComputePool};
    use crate::shutdown::Calls;

    #[tokio::test]
    async fn memory_is_free_before_the_peer_knows_that_all_is_done() {
        let dims = Dims { batch: 1, heads: 1, kv_heads: 1, queries: 1, keys: 1, head_dim: 1, value_dim: 1 };
        let begin = ComputeBegin {
            call_id: 1,
            shape: AttnShape::new(dims).unwrap(),
            dtype: Dtype::F32,
            operator: Arc::new(Operator::plain(1.0, Causal::None)),
            outputs: None,
            sides: attnd_plan::Sides::default(),
            allow_non_finite: false,
            pieces: Vec::new(),
            tokens_per_cell: 1,
        };
        let budget = Budget::new(100);
        // Held by the shard too, for as long as it lives.
        let call = Arc::new(Call {
            begin,
            kernels: Kernels::from_env().unwrap(),
            pool: ComputePool::new(1, 1).unwrap(),
            cancelled: AtomicBool::new(false),
            busy: BusyClock::default(),
            memory: budget.reserve(100).unwrap(),
        });
        let (queue, replies) = mpsc::channel(2);
        let shard = Shard::prepare();
        let in_flight = Calls::new().enter().unwrap();
        let mut replies = Replies::new(replies, shard.actor_ref().clone(), Arc::clone(&call), in_flight);
        queue.send(Ok(proto::ComputeReply { part: None })).await.unwrap();
        let finished = ComputeReply::Finished(Finished { compute_seconds: 0.0, partials: 1 });
        queue.send(Ok(finished.into())).await.unwrap();
        assert!(replies.next().await.unwrap().is_ok());
        assert_eq!(budget.reserved(), 100, "a partial may wait to be sent");
        assert!(replies.next().await.unwrap().is_ok());
        assert_eq!(budget.reserved(), 0);
        assert!(replies.next().await.is_none());
    }
}
