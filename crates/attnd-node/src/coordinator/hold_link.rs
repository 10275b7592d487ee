//! The coordinator's two streams to a worker that holds shards: one for steps and control, one for bytes in bulk. Both stay open as
//! long as the worker is a member.
//!
//! Requests are numbered, and answers find by their number who waits. Nobody waits for a stream that ended: whoever asked is
//! told, and whoever asks from then on. A number is given out under the lock under which the request is queued, so
//! requests leave in the order of their numbers.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use attnd_plan::session::Holder;
use attnd_wire::{Error, Reason, limits, proto};
use futures::FutureExt as _;
use proto::hold_request::Ask;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// Messages of steps and control that wait to be sent.
const CONTROL_QUEUE: usize = 16;
/// Chunks that wait to be sent; a full queue holds the client back.
const BULK_QUEUE: usize = 4;

/// Bytes of one answer: more than the partials of any step that is admitted, and a worker that says more makes no sense.
const ANSWER_BYTES: usize = 1 << 30;

/// All parts of the answer to one request.
pub(crate) type Parts = Vec<proto::HoldReply>;

/// Both streams.
#[derive(Debug)]
pub(crate) struct HoldLink {
    /// Who is at the other end.
    pub(crate) holder: Holder,
    /// For steps and control.
    pub(crate) control: Lane,
    /// For chunks.
    pub(crate) bulk: Lane,
}

/// One stream.
#[derive(Debug)]
pub(crate) struct Lane {
    requests: mpsc::Sender<proto::HoldRequest>,
    waiting: Arc<Waiting>,
}

/// Who waits for what.
#[derive(Debug, Default)]
struct Waiting(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The number of the last request.
    last: u64,
    asked: BTreeMap<u64, Asked>,
    /// Why the stream ended.
    lost: Option<Error>,
    /// The worker has another coordinator now, as it says.
    fenced: Option<Error>,
    /// Dropped when it ends, for whoever waits for that.
    lives: Option<watch::Sender<()>>,
}

#[derive(Debug)]
struct Asked {
    parts: Parts,
    /// Of all of them.
    bytes: usize,
    answer: oneshot::Sender<Result<Parts, Error>>,
    /// Who waits for there to be an answer, whatever it is: they are dropped then.
    others: Vec<oneshot::Sender<()>>,
}

/// The answer to come.
#[derive(Debug)]
pub(crate) struct Answer(oneshot::Receiver<Result<Parts, Error>>);

/// A request that goes on: chunks, and what ends them.
#[derive(Debug)]
pub(crate) struct Upload<'a> {
    lane: &'a Lane,
    request: u64,
    term: u64,
}

/// Runs a stream to its end.
#[derive(Debug)]
pub(crate) struct LaneTask {
    outgoing: mpsc::Receiver<proto::HoldRequest>,
    waiting: LosesAll,
}

/// Tells everybody who waits that the stream is gone, also when its task is killed.
#[derive(Debug)]
struct LosesAll(Arc<Waiting>);

impl Drop for LosesAll {
    fn drop(&mut self) {
        self.0.lose(&Error::new(Reason::Transport, "the worker is gone"));
    }
}

impl HoldLink {
    /// Both streams to `holder`, and what has to run for them, each over a connection of its own.
    pub(crate) fn new(holder: Holder) -> (Self, [LaneTask; 2]) {
        let (control, control_task) = Lane::new(CONTROL_QUEUE);
        let (bulk, bulk_task) = Lane::new(BULK_QUEUE);
        (Self { holder, control, bulk }, [control_task, bulk_task])
    }

    /// Whether one of the streams ended: then this is of no use any more.
    pub(crate) fn is_lost(&self) -> bool {
        [&self.control, &self.bulk].into_iter().any(|lane| lane.waiting.lock().lost.is_some())
    }

    /// What the worker says of another coordinator that has taken it over.
    pub(crate) fn fenced(&self) -> Option<Error> {
        [&self.control, &self.bulk].into_iter().find_map(|lane| lane.waiting.lock().fenced.clone())
    }

    /// Waits until it [is lost](Self::is_lost), or [fenced](Self::fenced).
    pub(crate) async fn ended(&self) {
        tokio::select! {
            biased;
            () = self.control.waiting.ended() => {}
            () = self.bulk.waiting.ended() => {}
        }
    }
}

impl Lane {
    fn new(queue: usize) -> (Self, LaneTask) {
        let (requests, outgoing) = mpsc::channel(queue);
        let waiting = Arc::new(Waiting::default());
        let task = LaneTask { outgoing, waiting: LosesAll(Arc::clone(&waiting)) };
        (Self { requests, waiting }, task)
    }

    /// Queues a request, as soon as there is room; the answer comes by itself.
    ///
    /// # Errors
    /// Why the stream ended.
    pub(crate) async fn ask(&self, term: u64, ask: Ask) -> Result<Answer, Error> {
        self.begin(term, ask).await.map(|(_upload, answer)| answer)
    }

    /// Queues the first message of a request that goes on.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub(crate) async fn begin(&self, term: u64, ask: Ask) -> Result<(Upload<'_>, Answer), Error> {
        let room = self.requests.reserve().await.map_err(|_closed| self.why_lost())?;
        let (answer, answered) = oneshot::channel();
        let mut state = self.waiting.lock();
        if let Some(why) = &state.lost {
            return Err(why.clone());
        }
        state.last += 1;
        let request = state.last;
        state.asked.insert(request, Asked { parts: Parts::new(), bytes: 0, answer, others: Vec::new() });
        let message = proto::HoldRequest { request, term, ask: Some(ask) };
        #[cfg(feature = "simulation")]
        crate::simulation::sent(&message);
        room.send(message);
        drop(state);
        Ok((Upload { lane: self, request, term }, Answer(answered)))
    }

    /// A request that was begun, to go on with.
    pub(crate) fn resume(&self, request: u64, term: u64) -> Upload<'_> {
        Upload { lane: self, request, term }
    }

    /// Gives a request up that goes on, behind all that was sent of it, and waits until it has its answer, whatever that is: from then on
    /// nothing of it can come any more.
    pub(crate) async fn give_up(&self, request: u64, term: u64) {
        let (waits, is_over) = oneshot::channel();
        match self.waiting.lock().asked.get_mut(&request) {
            Some(asked) => asked.others.push(waits),
            None => return,
        }
        // A stream that ended is an answer too.
        self.resume(request, term).send(Ask::GiveUp(proto::ShardGiveUp {})).await.ok();
        is_over.await.ok();
    }

    fn why_lost(&self) -> Error {
        let gone = || Error::new(Reason::Transport, "the worker is gone");
        self.waiting.lock().lost.clone().unwrap_or_else(gone)
    }
}

impl Upload<'_> {
    /// Its number.
    pub(crate) fn request(&self) -> u64 {
        self.request
    }

    /// Queues what follows.
    ///
    /// # Errors
    /// As [`Lane::ask`].
    pub(crate) async fn send(&self, ask: Ask) -> Result<(), Error> {
        let room = self.lane.requests.reserve().await.map_err(|_closed| self.lane.why_lost())?;
        room.send(proto::HoldRequest { request: self.request, term: self.term, ask: Some(ask) });
        Ok(())
    }
}

impl Answer {
    /// All parts of the answer.
    ///
    /// # Errors
    /// Why the stream ended before the last one came.
    pub(crate) async fn parts(mut self) -> Result<Parts, Error> {
        poll_fn(|cx| self.poll_parts(cx)).await
    }

    /// The same for whoever waits for something else too. Not to be asked again once it is ready.
    pub(crate) fn poll_parts(&mut self, cx: &mut Context<'_>) -> Poll<Result<Parts, Error>> {
        let gone = |_| Err(Error::new(Reason::Transport, "the worker is gone"));
        self.0.poll_unpin(cx).map(|answered| answered.unwrap_or_else(gone))
    }
}

impl LaneTask {
    /// Opens the stream and hands out what comes, until it ends.
    pub(crate) async fn run(self, channel: Channel) {
        let Self { outgoing, waiting } = self;
        let why = match exchange(channel, outgoing, &waiting.0).await {
            Ok(()) => Error::new(Reason::Transport, "the worker ended its stream"),
            // Whatever it was, what was asked has no answer: a refusal of the stream is none of a request.
            Err(error) => Error::new(Reason::Transport, error.message()),
        };
        waiting.0.lose(&why);
    }
}

/// Hands in what comes on a stream that a test runs by itself.
#[cfg(test)]
pub(crate) struct Replies(LosesAll);

#[cfg(test)]
impl LaneTask {
    /// What leaves, and where what comes is handed in; the stream ends with that.
    pub(crate) fn apart(self) -> (mpsc::Receiver<proto::HoldRequest>, Replies) {
        (self.outgoing, Replies(self.waiting))
    }
}

#[cfg(test)]
impl Replies {
    pub(crate) fn take(&self, reply: proto::HoldReply) {
        self.0.0.take(reply).unwrap();
    }
}

async fn exchange(
    channel: Channel,
    outgoing: mpsc::Receiver<proto::HoldRequest>,
    waiting: &Waiting,
) -> Result<(), Error> {
    let mut stub = limits::shards_client(channel);
    let mut replies = stub.hold(ReceiverStream::new(outgoing)).await?.into_inner();
    while let Some(reply) = replies.message().await? {
        waiting.take(reply)?;
    }
    Ok(())
}

impl Waiting {
    /// No critical section here can panic half-way, so a poisoned lock still guards a whole value.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a reply; with the last part, whoever waits is told.
    ///
    /// # Errors
    /// [`Reason::ReplyInvalid`] for an answer that nobody asked for, or that has no end.
    fn take(&self, reply: proto::HoldReply) -> Result<(), Error> {
        let (number, more) = (reply.request, reply.more);
        let mut state = self.lock();
        let last = state.last;
        if !state.asked.contains_key(&number) {
            if number <= last {
                // A second answer, to what goes on after a refusal: the first one counts.
                return Ok(());
            }
            return Err(Error::new(
                Reason::ReplyInvalid,
                format!("an answer to request {number}, which isn't open"),
            ));
        }
        if let Some(proto::hold_reply::Answer::Failure(failure)) = &reply.answer
            && failure.reason == Reason::Fenced.name()
        {
            state.fenced = Some(failure.clone().into());
            state.lives = None;
        }
        let Some(asked) = state.asked.get_mut(&number) else { return Ok(()) };
        asked.bytes += limits::entry_bytes(&reply);
        if asked.bytes > ANSWER_BYTES {
            let detail = format!("{} bytes of an answer, at most {ANSWER_BYTES}", asked.bytes);
            return Err(Error::new(Reason::ReplyInvalid, detail));
        }
        asked.parts.push(reply);
        if more {
            return Ok(());
        }
        let asked = state.asked.remove(&number);
        drop(state);
        if let Some(Asked { parts, answer, .. }) = asked {
            // Whoever asked may be gone.
            drop(answer.send(Ok(parts)));
        }
        Ok(())
    }

    async fn ended(&self) {
        let mut ends = {
            let mut state = self.lock();
            if state.lost.is_some() || state.fenced.is_some() {
                return;
            }
            state.lives.get_or_insert_with(|| watch::Sender::new(())).subscribe()
        };
        // Nothing is ever said but that.
        while ends.changed().await.is_ok() {}
    }

    /// Nobody will be answered any more. The first reason stays.
    fn lose(&self, why: &Error) {
        let mut state = self.lock();
        state.lost.get_or_insert_with(|| why.clone());
        state.lives = None;
        let asked = std::mem::take(&mut state.asked);
        drop(state);
        for Asked { answer, .. } in asked.into_values() {
            drop(answer.send(Err(why.clone())));
        }
    }
}

#[cfg(test)]
mod tests {
    use attnd_plan::WorkerId;

    use super::*;

    fn release() -> Ask {
        Ask::Release(proto::ShardRelease::default())
    }

    fn reply(request: u64, more: bool) -> proto::HoldReply {
        proto::HoldReply { request, more, answer: None }
    }

    fn link() -> (HoldLink, [LaneTask; 2]) {
        HoldLink::new(Holder { worker: WorkerId::new("w1").unwrap(), incarnation: 7 })
    }

    #[tokio::test]
    async fn answers_find_who_waits_in_any_order_and_in_parts() {
        let (link, [mut task, _bulk]) = link();
        let first = link.control.ask(3, release()).await.unwrap();
        let (upload, second) = link.control.begin(3, release()).await.unwrap();
        upload.send(Ask::Commit(proto::Commit::default())).await.unwrap();
        let sent: Vec<(u64, u64)> =
            [task.outgoing.recv().await, task.outgoing.recv().await, task.outgoing.recv().await]
                .map(|sent| sent.map(|sent| (sent.request, sent.term)).unwrap())
                .into();
        assert_eq!(sent, [(1, 3), (2, 3), (2, 3)]);
        let waiting = &task.waiting.0;
        waiting.take(reply(2, true)).unwrap();
        waiting.take(reply(1, false)).unwrap();
        waiting.take(reply(2, false)).unwrap();
        assert_eq!((first.parts().await.unwrap().len(), second.parts().await.unwrap().len()), (1, 2));
        waiting.take(reply(2, false)).unwrap();
        let unknown = waiting.take(reply(3, false)).unwrap_err();
        assert_eq!(unknown.message(), "REPLY_INVALID: an answer to request 3, which isn't open");
    }

    #[tokio::test]
    async fn an_answer_without_an_end_ends_its_stream() {
        let (link, [task, _bulk]) = link();
        let _asked = link.control.ask(3, release()).await.unwrap();
        // The same memory each time.
        let chunk = proto::CopyChunk { data: vec![0; 8 << 20].into(), ..Default::default() };
        let part = || {
            let answer = Some(proto::hold_reply::Answer::Chunk(chunk.clone()));
            proto::HoldReply { answer, ..reply(1, true) }
        };
        let taken =
            (0..1000).map_while(|_| task.waiting.0.take(part()).err().is_none().then_some(())).count();
        assert_eq!(taken, 127);
        let endless = task.waiting.0.take(part()).unwrap_err();
        assert_eq!(endless.reason, Reason::ReplyInvalid, "{endless}");
    }

    #[tokio::test]
    async fn what_is_given_up_is_over_once_it_is_answered() {
        let (link, [control, mut task]) = link();
        let (_upload, answer) = link.bulk.begin(3, release()).await.unwrap();
        drop(answer);
        let mut over = std::pin::pin!(link.bulk.give_up(1, 3));
        assert!(futures::poll!(&mut over).is_pending());
        let sent = [task.outgoing.recv().await.unwrap(), task.outgoing.recv().await.unwrap()];
        assert!(sent.iter().all(|sent| sent.request == 1));
        assert_eq!(sent[1].ask, Some(Ask::GiveUp(proto::ShardGiveUp {})));
        task.waiting.0.take(reply(1, true)).unwrap();
        assert!(futures::poll!(&mut over).is_pending());
        task.waiting.0.take(reply(1, false)).unwrap();
        over.await;
        // And so it is where the stream ends.
        link.bulk.give_up(1, 3).await;
        let _upload = link.bulk.begin(3, release()).await.unwrap();
        let mut over = std::pin::pin!(link.bulk.give_up(2, 3));
        assert!(futures::poll!(&mut over).is_pending());
        drop(task);
        over.await;
        drop(control);
    }

    #[tokio::test]
    async fn whoever_waits_for_a_stream_that_ended_is_told_and_whoever_comes_later() {
        let (link, [task, _bulk]) = link();
        let waits = link.control.ask(1, release()).await.unwrap();
        assert!(!link.is_lost() && link.ended().now_or_never().is_none());
        task.waiting.0.lose(&Error::new(Reason::Transport, "reset"));
        assert!(link.is_lost() && link.ended().now_or_never().is_some());
        assert_eq!(waits.parts().await.unwrap_err().message(), "TRANSPORT: reset");
        assert_eq!(link.control.ask(1, release()).await.unwrap_err().message(), "TRANSPORT: reset");
        drop(task);
        assert_eq!(link.control.ask(1, release()).await.unwrap_err().message(), "TRANSPORT: reset");
    }

    #[tokio::test]
    async fn a_task_that_is_killed_loses_its_stream() {
        let (link, [control, bulk]) = link();
        let waits = link.bulk.ask(1, release()).await.unwrap();
        let ended = link.ended();
        tokio::pin!(ended);
        assert!(ended.as_mut().now_or_never().is_none());
        drop(bulk);
        assert!(ended.now_or_never().is_some());
        assert_eq!(waits.parts().await.unwrap_err().message(), "TRANSPORT: the worker is gone");
        assert!(link.is_lost());
        drop(control);
    }
}
