//! The stream of requests: one for any number of sessions and callers, which stays open and is opened again when it was lost.
//!
//! Requests are numbered as they are handed to the connection; one task reads the replies and wakes whoever waits for each. A stream that
//! ends takes all requests on it with it: whether they are sent again is for [`crate::retry`] to say.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use attnd_wire::session::{Answer, Append, AppendChunk, Ask, SessionReply, SessionRequest};
use attnd_wire::{Commit, Deadline, Error, Outcome, Reason, Surroundings, limits, proto};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::error::ClientError;
use crate::retry::pause_before_repeat;

/// Requests that are under way at a time.
const MAX_IN_FLIGHT: usize = 256;
/// Frames that wait for the connection.
const MAX_QUEUED: usize = 8;
/// Replies to one request.
const MAX_PARTS: usize = 4096;

/// A coordinator's stream, as long as anybody uses it.
#[derive(Debug)]
pub(crate) struct Exchange {
    channel: Channel,
    surroundings: Surroundings,
    live: Mutex<Option<Arc<Stream>>>,
    room: Semaphore,
    /// The coordinator has answered, on whichever stream.
    is_known: Arc<AtomicBool>,
}

/// One stream, from its opening to its end.
#[derive(Debug)]
struct Stream {
    frames: mpsc::Sender<proto::SessionRequest>,
    routes: Arc<Mutex<Routes>>,
}

/// Who waits for what.
#[derive(Debug, Default)]
struct Routes {
    /// Requests numbered so far.
    requests: u64,
    waiting: BTreeMap<u64, Waiting>,
    /// Why the stream is no more.
    ended: Option<Error>,
}

#[derive(Debug)]
struct Waiting {
    parts: Vec<Answer>,
    done: oneshot::Sender<Outcomes>,
}

type Outcomes = Result<Vec<Answer>, Error>;

/// A request that was sent; dropped before it is answered, it is given up.
#[derive(Debug)]
struct Ticket<'a> {
    stream: Arc<Stream>,
    request: u64,
    answer: oneshot::Receiver<Outcomes>,
    _room: SemaphorePermit<'a>,
}

/// What is asked of a coordinator. Cloning copies no tensor.
#[derive(Clone, Debug)]
pub(crate) enum Request {
    /// In one message.
    One(Ask),
    /// In many: an append, and all its chunks.
    Chunked(Append, Arc<[AppendChunk]>),
}

impl Exchange {
    pub(crate) fn new(channel: Channel, surroundings: Surroundings) -> Self {
        let (live, room) = (Mutex::new(None), Semaphore::new(MAX_IN_FLIGHT));
        Self { channel, surroundings, live, room, is_known: Arc::default() }
    }

    /// A name for a session that nobody has.
    pub(crate) fn made_name(&self) -> String {
        format!("s-{:016x}{:016x}", self.surroundings.random(), self.surroundings.random())
    }

    /// By how much a pause differs from those of others, 0 to 1.
    pub(crate) fn jitter(&self) -> f64 {
        self.surroundings.fraction()
    }

    /// Whether the coordinator has ever answered.
    pub(super) fn is_known(&self) -> bool {
        self.is_known.load(Ordering::Relaxed)
    }

    /// Asks until there is an answer, it is no use, or the time is over. Only for requests that may come twice: those that change nothing,
    /// and mutations, which have their number. Gives the answers, and how often it asked.
    ///
    /// # Errors
    /// As [`Self::ask`], of the last attempt.
    pub(crate) async fn insist(
        &self,
        request: Request,
        deadline: Instant,
    ) -> Result<(Vec<Answer>, u32), ClientError> {
        let (mut attempts, mut may_be_done) = (0, false);
        loop {
            attempts += 1;
            let error = match self.ask(request.clone(), deadline).await {
                Ok(answers) => return Ok((answers, attempts)),
                Err(error) => in_all(error, &mut may_be_done),
            };
            let left = deadline.saturating_duration_since(Instant::now());
            let (is_known, jitter) = (self.is_known(), self.jitter());
            let Some(pause) = pause_before_repeat(attempts, &error, is_known, Some(left), jitter) else {
                return Err(ClientError::after(attempts, &error));
            };
            tracing::info!(%error, attempts, pause_ms = pause.as_millis() as u64, "the request is sent again");
            tokio::time::sleep(pause).await;
        }
    }

    /// Asks once. All replies, none of which is a failure.
    ///
    /// # Errors
    /// What the coordinator says, or what became of the stream. A request whose time is over may have been carried out.
    pub(crate) async fn ask(&self, request: Request, deadline: Instant) -> Outcomes {
        let asked = async {
            let left = deadline.saturating_duration_since(Instant::now());
            match request {
                Request::One(ask) => self.send(ask, left).await?.answer().await,
                Request::Chunked(append, chunks) => self.send_chunks(append, &chunks, left).await,
            }
        };
        let in_time = tokio::time::timeout_at(deadline, asked).await;
        in_time.unwrap_or_else(|_elapsed| Err(Deadline::expired().with_outcome(Outcome::Unknown)))
    }

    async fn send(&self, ask: Ask, timeout: Duration) -> Result<Ticket<'_>, Error> {
        let room = self.room.acquire().await.map_err(|_closed| lost("no more requests"))?;
        let stream = self.stream();
        let Ok(permit) = stream.frames.reserve().await else { return Err(stream.why_ended()) };
        let (done, answer) = oneshot::channel();
        let request = {
            // The number and the place in the queue are taken together, so that numbers ascend on the stream.
            let mut routes = lock(&stream.routes);
            if let Some(error) = &routes.ended {
                return Err(error.clone());
            }
            routes.requests += 1;
            let request = routes.requests;
            routes.waiting.insert(request, Waiting { parts: Vec::new(), done });
            permit.send(SessionRequest { request, timeout, ask }.into());
            request
        };
        Ok(Ticket { stream, request, answer, _room: room })
    }

    /// Sends an append and its rows. An answer that comes before they are all sent, which is a refusal, ends it.
    async fn send_chunks(&self, append: Append, chunks: &[AppendChunk], timeout: Duration) -> Outcomes {
        let mut ticket = self.send(Ask::Append(append), timeout).await?;
        let stream = Arc::clone(&ticket.stream);
        let mut commit = Commit { chunks: 0, bytes: 0 };
        let mut chunks = chunks.iter();
        loop {
            let ask = match chunks.next() {
                Some(chunk) => {
                    commit.chunks += 1;
                    commit.bytes += chunk.data.len() as u64;
                    Ask::Chunk(chunk.clone())
                }
                None => Ask::Commit(commit),
            };
            let is_last = matches!(ask, Ask::Commit(_));
            let frame = SessionRequest { request: ticket.request, timeout, ask };
            tokio::select! {
                biased;
                answer = &mut ticket.answer => return answer.unwrap_or_else(|_dropped| Err(stream.why_ended())),
                sent = stream.frames.send(frame.into()) => if sent.is_err() {
                    return Err(stream.why_ended());
                }
            }
            if is_last {
                return ticket.answer().await;
            }
        }
    }

    /// The stream that is open, or a new one.
    fn stream(&self) -> Arc<Stream> {
        let mut live = lock(&self.live);
        if let Some(stream) = live.as_ref().filter(|stream| lock(&stream.routes).ended.is_none()) {
            return Arc::clone(stream);
        }
        let (frames, outgoing) = mpsc::channel(MAX_QUEUED);
        let routes = Arc::new(Mutex::new(Routes::default()));
        tokio::spawn(run(self.channel.clone(), outgoing, Arc::clone(&routes), Arc::clone(&self.is_known)));
        let stream = Arc::new(Stream { frames, routes });
        *live = Some(Arc::clone(&stream));
        stream
    }
}

/// Opens the stream and reads from it until its end, which whoever still waits hears of. It ends when the last sender of frames is gone.
async fn run(
    channel: Channel,
    outgoing: mpsc::Receiver<proto::SessionRequest>,
    routes: Arc<Mutex<Routes>>,
    is_known: Arc<AtomicBool>,
) {
    let read = async {
        let mut stub = limits::sessions_client(channel);
        let mut replies = stub.exchange(ReceiverStream::new(outgoing)).await?.into_inner();
        while let Some(reply) = replies.message().await? {
            is_known.store(true, Ordering::Relaxed);
            lock(&routes).take(SessionReply::try_from(reply)?)?;
        }
        Ok(())
    };
    let ended = match read.await {
        Ok(()) => lost("the stream ended"),
        Err(error) => error,
    };
    tracing::debug!(error = %ended, "the stream of sessions ended");
    let waiting = {
        let mut routes = lock(&routes);
        routes.ended = Some(ended.clone());
        std::mem::take(&mut routes.waiting)
    };
    for (_request, waiting) in waiting {
        // Whoever gave up has gone.
        let _gone = waiting.done.send(Err(ended.clone()));
    }
}

impl Routes {
    /// Hands a reply to whoever waits for it, which nobody may any more.
    fn take(&mut self, reply: SessionReply) -> Result<(), Error> {
        let SessionReply { request, more, answer } = reply;
        if request == 0 || request > self.requests {
            return Err(Error::new(
                Reason::ReplyInvalid,
                format!("an answer to request {request} of {}", self.requests),
            ));
        }
        let Some(waiting) = self.waiting.get_mut(&request) else { return Ok(()) };
        let failed = match answer {
            Answer::Failed(error) => Some(error),
            answer => {
                waiting.parts.push(answer);
                None
            }
        };
        if waiting.parts.len() > MAX_PARTS {
            return Err(Error::new(Reason::ReplyInvalid, format!("over {MAX_PARTS} answers to one request")));
        }
        if (failed.is_some() || !more)
            && let Some(Waiting { parts, done }) = self.waiting.remove(&request)
        {
            let _gone = done.send(failed.map_or(Ok(parts), Err));
        }
        Ok(())
    }
}

impl Stream {
    fn why_ended(&self) -> Error {
        lock(&self.routes).ended.clone().unwrap_or_else(|| lost("the stream ended"))
    }
}

impl Ticket<'_> {
    async fn answer(mut self) -> Outcomes {
        let answer = (&mut self.answer).await;
        answer.unwrap_or_else(|_dropped| Err(self.stream.why_ended()))
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let is_unanswered = lock(&self.stream.routes).waiting.remove(&self.request).is_some();
        if is_unanswered {
            let give_up = SessionRequest { request: self.request, timeout: Duration::ZERO, ask: Ask::GiveUp };
            // Where the queue is full, it is computed until its time is over.
            self.stream.frames.try_send(give_up.into()).ok();
        }
    }
}

/// What is known after an attempt that ended with `error`, where earlier ones may have been carried out: a refusal of the last one says
/// nothing of those.
pub(super) fn in_all(error: Error, may_be_done: &mut bool) -> Error {
    *may_be_done |= error.outcome == Outcome::Unknown;
    match error.outcome {
        Outcome::NotExecuted if *may_be_done => error.with_outcome(Outcome::Unknown),
        _ => error,
    }
}

fn lost(what: &str) -> Error {
    Error::new(Reason::Transport, what)
}

/// Nothing that is locked here panics, and what is would still be whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
