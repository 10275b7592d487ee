//! The coordinator's side of one worker: its channels, a task for each share that runs on it, and the streams over which it holds
//! shards of sessions.
//!
//! The actor lives as long as one incarnation of the worker is a member. When it is killed, because the worker is
//! dead, its tasks end, their queues close, and every call that waits on one of them knows at once: a call never
//! waits for a worker that is gone. A worker that drained has answered all its calls before it left, which is read to the
//! end: then its tasks end with their streams, at the latest with the worker's connection.

use std::sync::Arc;
use std::time::Instant;

use attnd_plan::WorkerId;
use attnd_plan::session::Holder;
use attnd_wire::deadline::{self, TIMEOUT_HEADER};
use attnd_wire::surroundings::now;
use attnd_wire::{
    CallShape, ComputeBegin, ComputeReply, ComputeRequest, Deadline, Error, Outcome, Reason, limits, proto,
};
use kameo::actor::{Actor, ActorRef, WeakActorRef};
use kameo::error::{ActorStopReason, Infallible};
use kameo::mailbox::{MailboxReceiver, Signal};
use kameo::message::{Context, Message};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;

use super::hold_link::HoldLink;
use super::tasks;
use crate::budget::Reservation;

/// Messages of one share that wait to be sent; a full queue holds the client back.
const REQUESTS: usize = 4;
/// Messages of one share that wait to be gathered; a full queue holds the worker back.
const REPLIES: usize = 2;

/// The actor.
#[derive(Debug)]
pub(crate) struct WorkerActor {
    args: WorkerActorArgs,
    shares: JoinSet<()>,
    link: Option<Arc<HoldLink>>,
    /// What runs for the streams of the link.
    lanes: JoinSet<()>,
}

/// What a worker actor starts from.
#[derive(Clone, Debug)]
pub(crate) struct WorkerActorArgs {
    pub(crate) id: WorkerId,
    pub(crate) incarnation: u64,
    /// Connects when the first share needs it, and again when the connection is lost.
    pub(crate) channel: Channel,
    /// Another connection, for bytes of sessions.
    pub(crate) bulk: Channel,
    /// When a share last found no connection.
    pub(crate) not_connected: watch::Sender<Option<Instant>>,
}

/// Begin a share on this worker.
#[derive(Debug)]
pub(crate) struct OpenShare {
    pub(crate) begin: ComputeBegin,
    /// What the share takes of the worker's memory. Given back when the worker says that it finished, which it does
    /// once it has the memory back, or when nobody waits for the share any more, which the worker learns later.
    pub(crate) memory: Reservation,
    pub(crate) deadline: Deadline,
}

/// The streams over which this worker holds shards; those that are there, or other ones where they ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenLink;

/// A share that runs. Dropping either end cancels it.
#[derive(Debug, kameo::Reply)]
pub(crate) struct OpenedShare {
    /// What follows Begin. Closed when the worker takes nothing more; then `replies` has the reason.
    pub(crate) requests: mpsc::Sender<proto::ComputeRequest>,
    /// What the worker says, checked. An error is the last item; an end without Finished means that the worker is
    /// lost.
    pub(crate) replies: mpsc::Receiver<Result<ComputeReply, Error>>,
}

impl Actor for WorkerActor {
    type Args = WorkerActorArgs;
    type Error = Infallible;

    async fn on_start(args: WorkerActorArgs, _: ActorRef<Self>) -> Result<Self, Infallible> {
        Ok(Self { args, shares: JoinSet::new(), link: None, lanes: JoinSet::new() })
    }

    async fn next(
        &mut self,
        _: WeakActorRef<Self>,
        mailbox: &mut MailboxReceiver<Self>,
    ) -> Result<Option<Signal<Self>>, Infallible> {
        loop {
            tokio::select! {
                biased;
                signal = mailbox.recv() => return Ok(signal),
                Some(ended) = self.shares.join_next() => tasks::report(ended),
                Some(ended) = self.lanes.join_next() => tasks::report(ended),
            }
        }
    }

    async fn on_stop(&mut self, _: WeakActorRef<Self>, reason: ActorStopReason) -> Result<(), Infallible> {
        // Let go of, and not killed: shares run to their end, and none follows.
        while matches!(reason, ActorStopReason::Normal)
            && let Some(ended) = self.shares.join_next().await
        {
            tasks::report(ended);
        }
        Ok(())
    }
}

impl Message<OpenShare> for WorkerActor {
    type Reply = OpenedShare;

    async fn handle(&mut self, share: OpenShare, _: &mut Context<Self, OpenedShare>) -> OpenedShare {
        let (requests, outgoing) = mpsc::channel(REQUESTS);
        let (answers, replies) = mpsc::channel(REPLIES);
        self.shares.spawn(run_share(self.args.clone(), share, outgoing, answers));
        OpenedShare { requests, replies }
    }
}

impl Message<OpenLink> for WorkerActor {
    type Reply = Arc<HoldLink>;

    async fn handle(&mut self, _: OpenLink, _: &mut Context<Self, Arc<HoldLink>>) -> Arc<HoldLink> {
        if let Some(link) = self.link.as_ref().filter(|link| !link.is_lost()) {
            return Arc::clone(link);
        }
        let WorkerActorArgs { id, incarnation, channel, bulk, .. } = &self.args;
        let holder = Holder { worker: id.clone(), incarnation: *incarnation };
        let (link, [control_task, bulk_task]) = HoldLink::new(holder);
        // What is left of streams that ended.
        self.lanes.abort_all();
        self.lanes.spawn(control_task.run(channel.clone()));
        self.lanes.spawn(bulk_task.run(bulk.clone()));
        let link = Arc::new(link);
        self.link = Some(Arc::clone(&link));
        link
    }
}

/// Runs one share to its end, or until nobody waits for it.
async fn run_share(
    args: WorkerActorArgs,
    share: OpenShare,
    outgoing: mpsc::Receiver<proto::ComputeRequest>,
    answers: mpsc::Sender<Result<ComputeReply, Error>>,
) {
    let WorkerActorArgs { id: worker, channel, not_connected, .. } = args;
    let ended = tokio::select! {
        biased;
        ended = exchange(channel, share, outgoing, &answers) => ended,
        () = answers.closed() => return,
    };
    if let Err(error) = ended {
        tracing::debug!(%worker, %error, "a share failed");
        // Before the call knows, which may be sent again at once and must not come back here.
        if (error.reason, error.outcome) == (Reason::Transport, Outcome::NotExecuted) {
            not_connected.send_replace(Some(now()));
        }
        // A call that is gone needs no error.
        answers.send(Err(error)).await.ok();
    }
}

async fn exchange(
    channel: Channel,
    share: OpenShare,
    outgoing: mpsc::Receiver<proto::ComputeRequest>,
    answers: &mpsc::Sender<Result<ComputeReply, Error>>,
) -> Result<(), Error> {
    let OpenShare { begin, memory, deadline } = share;
    let call = CallShape::from(&begin);
    let left = deadline.for_next_hop().remaining(now())?;
    let first = futures::stream::iter([ComputeRequest::Begin(begin).into()]);
    let mut request = Request::new(futures::StreamExt::chain(first, ReceiverStream::new(outgoing)));
    if let Ok(timeout) = MetadataValue::try_from(deadline::header_value(left).as_bytes()) {
        request.metadata_mut().insert(TIMEOUT_HEADER, timeout);
    }
    let mut replies = limits::worker_client(channel).compute(request).await?.into_inner();
    let mut memory = Some(memory);
    while let Some(message) = replies.message().await? {
        let reply = ComputeReply::decode(message, &call)?;
        let is_last = matches!(reply, ComputeReply::Finished(_));
        if is_last {
            // Before the call can end and the next one be planned.
            memory = None;
        }
        if answers.send(Ok(reply)).await.is_err() || is_last {
            break;
        }
    }
    drop(memory);
    Ok(())
}
