//! The stream of one client: any number of requests about any number of sessions.
//!
//! All requests of a stream run inside of its task, each as a future of its own, so that a decode step costs no hop between tasks.
//! Mutations line up behind each other as their frames are read, before anything else is awaited: this is what "in the order
//! in which they come" means. The chunks of an append go to it by `feed.rs`, so that one whose turn isn't there yet holds nobody back.

use std::collections::{BTreeMap, VecDeque};
use std::future::ready;
use std::sync::Arc;

use attnd_wire::limits::{MAX_ENTRIES, STALL};
use attnd_wire::proto::{self, sessions_server};
use attnd_wire::session::{Answer, Ask, Asked, SessionReply, SessionRequest, Step, StepContext, StepResult};
use attnd_wire::surroundings::now;
use attnd_wire::{Deadline, Error, Outcome, Reason, Status, refusal};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::mpsc::error::SendTimeoutError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Streaming};

use super::Sessions;
use super::append::{AppendCall, Frame};
use super::change::ChangeCall;
use super::feed::{self, Feeder};
use super::patience::{self, Patience};
use super::steps::StepsCall;
use crate::coordinator::reply_stream::{ReplyStream, reply_stream};
use crate::coordinator::tasks::Tasks;
use crate::shutdown::Calls;

/// Requests of one stream that may run at a time. With more, nothing is read from it.
const MAX_RUNNING: usize = 64;
/// Bytes of rows in one message of an answer.
const ANSWER_BYTES: usize = 4 << 20;
/// Appends in chunks of one stream at a time.
const MAX_APPENDS: usize = 64;

/// The service.
#[derive(Clone, Debug)]
pub(crate) struct SessionsService {
    sessions: Arc<Sessions>,
    calls: Calls,
    tasks: Tasks,
}

impl SessionsService {
    pub(crate) fn new(sessions: Arc<Sessions>, calls: Calls, tasks: Tasks) -> Self {
        Self { sessions, calls, tasks }
    }
}

#[tonic::async_trait]
impl sessions_server::Sessions for SessionsService {
    type ExchangeStream = ReplyStream<proto::SessionReply, ()>;

    async fn exchange(
        &self,
        request: Request<Streaming<proto::SessionRequest>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let (answer, stream) = reply_stream(());
        let (sessions, calls) = (Arc::clone(&self.sessions), self.calls.clone());
        let mut frames = request.into_inner();
        self.tasks.spawn(async move {
            let mut exchange = Exchange::new(sessions, calls.clone(), answer.queue().clone());
            let ended = tokio::select! {
                biased;
                ended = exchange.run(&mut frames) => ended,
                // Before this task is ended from outside, of which a client couldn't know that it may come again.
                () = calls.drained() => Err(Error::new(Reason::Draining, "")),
                () = answer.queue().closed() => Err(Error::new(Reason::Cancelled, "the client is gone")),
            };
            drop(exchange);
            answer.end(ended, STALL).await;
        });
        Ok(Response::new(stream))
    }
}

/// One request while it runs: its end gives its number back, or ends the stream of a client that doesn't take its answer.
type Running = BoxFuture<'static, Result<u64, Error>>;

struct Exchange {
    sessions: Arc<Sessions>,
    calls: Calls,
    replies: mpsc::Sender<proto::SessionReply>,
    running: FuturesUnordered<Running>,
    /// Of each that runs, what ends it when nobody waits for its answer any more.
    unwanted: BTreeMap<u64, CancellationToken>,
    /// Where the chunks of appends go that have begun.
    appends: BTreeMap<u64, Feeder>,
    /// Room for chunks that come before the turns of their appends.
    ahead: Arc<Semaphore>,
    /// Room for requests that wait for their sessions to be whole.
    patient: Arc<Semaphore>,
    /// A frame for which its append, which has its turn, has no room yet.
    held: Option<(u64, Frame)>,
    /// The last [`MAX_APPENDS`] appends whose Commit came.
    commits: VecDeque<u64>,
    last: u64,
}

impl Exchange {
    fn new(sessions: Arc<Sessions>, calls: Calls, replies: mpsc::Sender<proto::SessionReply>) -> Self {
        let (running, unwanted) = (FuturesUnordered::new(), BTreeMap::new());
        let (appends, ahead, patient) = (BTreeMap::new(), feed::ahead(), patience::room());
        let (held, commits, last) = (None, VecDeque::new(), 0);
        Self { sessions, calls, replies, running, unwanted, appends, ahead, patient, held, commits, last }
    }

    /// Serves until the client says that nothing more comes, and all it asked for is answered.
    async fn run(&mut self, frames: &mut Streaming<proto::SessionRequest>) -> Result<(), Error> {
        let mut is_open = true;
        while is_open || !self.running.is_empty() {
            let room =
                self.held.as_ref().and_then(|(request, _)| self.appends.get(request)).map(Feeder::room);
            let reads = is_open
                && self.held.is_none()
                && self.running.len().saturating_sub(self.appends.len()) < MAX_RUNNING;
            tokio::select! {
                biased;
                Some(request) = self.running.next() => {
                    let request = request?;
                    self.appends.remove(&request);
                    self.unwanted.remove(&request);
                    self.held = self.held.take().filter(|(held, _)| *held != request);
                }
                room = wait_for(room), if self.held.is_some() => {
                    // An append that ended takes nothing more.
                    if let (Some(room), Some((request, frame))) = (room, self.held.take())
                        && let Some(feeder) = self.appends.get(&request)
                    {
                        feeder.feed(frame, room);
                    }
                }
                frame = frames.message(), if reads => match frame? {
                    Some(frame) => self.take(SessionRequest::decode(frame))?,
                    None => {
                        is_open = false;
                        // Appends without a Commit will never have one.
                        self.appends.clear();
                    }
                },
                else => return Err(Error::new(Reason::Internal, "a stream waits for nothing")),
            }
        }
        Ok(())
    }

    /// Takes a frame.
    ///
    /// # Errors
    /// If its number can't be right, after which frames can't be told apart; and for what comes behind a Commit, whose append may have been
    /// answered by then.
    fn take(&mut self, Asked { request, timeout, ask }: Asked) -> Result<(), Error> {
        if matches!(ask, Ok(Ask::GiveUp)) && request <= self.last {
            // It may have been answered already.
            if let Some(unwanted) = self.unwanted.get(&request) {
                unwanted.cancel();
            }
            return Ok(());
        }
        if self.commits.contains(&request) {
            return Err(refusal::frame_after_commit());
        }
        let feeder = self.appends.get_mut(&request);
        let goes_on = feeder.is_some();
        let frame = match ask {
            Ok(Ask::Chunk(chunk)) => Frame::Chunk(chunk),
            Ok(Ask::Commit(commit)) => Frame::Commit(commit),
            Ok(Ask::Append(_)) if goes_on => Frame::Broken(refusal::duplicate_begin()),
            Err(error) if goes_on => Frame::Broken(error),
            ask => return self.begin(request, Deadline::after(now(), timeout), ask),
        };
        if goes_on && matches!(frame, Frame::Commit(_)) {
            self.commits.push_back(request);
            self.commits.drain(..self.commits.len().saturating_sub(MAX_APPENDS));
        }
        match feeder {
            Some(feeder) => self.held = feeder.offer(frame).map(|frame| (request, frame)),
            // It has been answered already.
            None if request <= self.last => {}
            None => self.begin(request, Deadline::after(now(), timeout), Err(refusal::expected_begin()))?,
        }
        Ok(())
    }

    fn begin(
        &mut self,
        request: u64,
        deadline: Deadline,
        ask: Result<Ask<Result<Step, Error>>, Error>,
    ) -> Result<(), Error> {
        if request <= self.last {
            let detail = format!("request {request} after {}", self.last);
            return Err(Error::new(Reason::StreamOrder, detail));
        }
        self.last = request;
        let Some(in_flight) = self.calls.enter() else {
            self.start(request, deadline, (), ready(Err(Error::new(Reason::Draining, ""))));
            return Ok(());
        };
        let sessions = Arc::clone(&self.sessions);
        match ask {
            Err(error) => self.start(request, deadline, in_flight, ready(Err(error))),
            Ok(Ask::Steps(steps)) => {
                let call = StepsCall::line_up(&sessions, steps);
                let patience = Patience::new(deadline, &self.patient);
                let held = (in_flight, call.rooms());
                self.serve(request, held, async move { call.run(&sessions, patience).await.map(split) });
            }
            Ok(Ask::Append(_)) if self.appends.len() >= MAX_APPENDS => {
                let error = Error::new(Reason::Overloaded, format!("{MAX_APPENDS} appends of one client"));
                self.start(request, deadline, in_flight, ready(Err(error)));
            }
            Ok(Ask::Append(append)) => {
                let (feeder, incoming) = feed::feed(&self.ahead);
                self.appends.insert(request, feeder);
                let call = AppendCall::line_up(&sessions, append, incoming);
                let applied =
                    async move { call?.run(&sessions).await.map(|applied| vec![Answer::Applied(applied)]) };
                self.start(request, deadline, in_flight, applied);
            }
            Ok(Ask::Change(change)) => {
                let call = ChangeCall::line_up(&sessions, change);
                let patience = Patience::new(deadline, &self.patient);
                let applied = async move {
                    call?.run(&sessions, patience).await.map(|applied| vec![Answer::Applied(applied)])
                };
                self.start(request, deadline, in_flight, applied);
            }
            Ok(Ask::Open(open)) => {
                let opened = async move {
                    sessions.open(open).await.map(|opened| vec![Answer::Description(Box::new(opened))])
                };
                self.start(request, deadline, in_flight, opened);
            }
            Ok(Ask::Close(name)) => {
                let closed = async move {
                    sessions.close(&name).await.map(|already| vec![Answer::Closed { already }])
                };
                self.start(request, deadline, in_flight, closed);
            }
            Ok(Ask::Describe(name)) => {
                let described = sessions.describe(&name);
                let described = described.map(|described| vec![Answer::Description(Box::new(described))]);
                self.start(request, deadline, in_flight, ready(described));
            }
            Ok(Ask::List) => self.start(request, deadline, in_flight, ready(Ok(sessions.list()))),
            // Taken above.
            Ok(Ask::Chunk(_) | Ask::Commit(_) | Ask::GiveUp) => {
                self.start(request, deadline, in_flight, ready(Err(refusal::expected_begin())));
            }
        }
        Ok(())
    }

    /// Runs a request until it is answered, the answer on its way, or its time is over; `held` lives as long.
    fn start(
        &mut self,
        request: u64,
        deadline: Deadline,
        held: impl Send + 'static,
        work: impl Future<Output = Result<Vec<Answer>, Error>> + Send + 'static,
    ) {
        self.serve(request, held, async move {
            let answered = tokio::time::timeout_at(deadline.at().into(), work).await;
            // What has begun goes on.
            answered.unwrap_or_else(|_elapsed| Err(Deadline::expired().with_outcome(Outcome::Unknown)))
        });
    }

    /// The same for work that ends when its time is over.
    fn serve(
        &mut self,
        request: u64,
        held: impl Send + 'static,
        work: impl Future<Output = Result<Vec<Answer>, Error>> + Send + 'static,
    ) {
        let (replies, unwanted) = (self.replies.clone(), CancellationToken::new());
        self.unwanted.insert(request, unwanted.clone());
        self.running.push(Box::pin(async move {
            let given_up = || Error::new(Reason::Cancelled, "given up").with_outcome(Outcome::Unknown);
            let answers = match unwanted.run_until_cancelled(work).await.unwrap_or_else(|| Err(given_up())) {
                Ok(answers) => answers,
                Err(error) => vec![Answer::Failed(error)],
            };
            let last = answers.len().saturating_sub(1);
            for (at, answer) in answers.into_iter().enumerate() {
                let reply = SessionReply { request, more: at < last, answer };
                match replies.send_timeout(reply.into(), STALL).await {
                    Ok(()) => {}
                    Err(SendTimeoutError::Timeout(_)) => return Err(refusal::stalled(STALL)),
                    // A client that is gone needs no answer.
                    Err(SendTimeoutError::Closed(_)) => break,
                }
            }
            drop(held);
            Ok(request)
        }));
    }
}

/// The future of request 1, which is answered so.
#[cfg(test)]
pub(super) fn answer_with(
    sessions: Arc<Sessions>,
    replies: mpsc::Sender<proto::SessionReply>,
    deadline: Deadline,
    held: impl Send + 'static,
    answers: Vec<Answer>,
) -> Running {
    let mut exchange = Exchange::new(sessions, Calls::new(), replies);
    exchange.start(1, deadline, held, ready(Ok(answers)));
    let mut running = exchange.running.into_iter();
    running.next().unwrap_or_else(|| Box::pin(ready(Ok(0))))
}

/// Room for a frame; `None` if its append is gone.
async fn wait_for(
    room: Option<impl Future<Output = Option<OwnedSemaphorePermit>>>,
) -> Option<OwnedSemaphorePermit> {
    room?.await
}

/// Results of steps in as few messages as are within the limit.
fn split(results: Vec<StepResult>) -> Vec<Answer> {
    let mut answers = Vec::new();
    let (mut part, mut bytes) = (Vec::new(), 0);
    for result in results {
        let of_result = result.context.as_ref().map_or(0, StepContext::bytes);
        if !part.is_empty() && (bytes + of_result > ANSWER_BYTES || part.len() == MAX_ENTRIES) {
            answers.push(Answer::Steps(std::mem::take(&mut part)));
            bytes = 0;
        }
        bytes += of_result;
        part.push(result);
    }
    answers.push(Answer::Steps(part));
    answers
}
