//! The Attention service: admits calls, runs each in a task of its own, counts how they end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use attnd_wire::limits::STALL;
use attnd_wire::proto::{self, attention_server};
use attnd_wire::surroundings::now;
use attnd_wire::{ClusterStatus, Deadline, Error, Reason, Status, refusal};
use tokio::sync::{Semaphore, SemaphorePermit};
use tonic::{Request, Response, Streaming};
use tracing::Instrument;

use super::Hub;
use super::attend_call::attend;
use super::membership_actor::Roster;
use super::reply_stream::{ReplyStream, reply_stream};
use super::sessions::Sessions;
use super::tasks::Tasks;
use crate::shutdown::{Calls, InFlight};

/// The service.
#[derive(Debug)]
pub(crate) struct AttentionService {
    hub: Arc<Hub>,
    calls: Calls,
    places: Arc<Places>,
    tasks: Tasks,
    started: Instant,
    next_call: AtomicU64,
    tally: Arc<Tally>,
    sessions: Arc<Sessions>,
}

/// One for each call that may run; a call beyond them is refused.
#[derive(Debug)]
pub(crate) struct Places {
    free: Semaphore,
    max_calls: usize,
}

impl Places {
    fn new(max_calls: usize) -> Self {
        Self { free: Semaphore::new(max_calls.min(Semaphore::MAX_PERMITS)), max_calls }
    }

    /// A place for as long as the permit lives.
    ///
    /// # Errors
    /// [`Reason::Overloaded`] if all are taken.
    pub(crate) fn take(&self) -> Result<SemaphorePermit<'_>, Error> {
        self.free.try_acquire().map_err(|_full| refusal::overloaded(self.max_calls))
    }
}

/// Calls that ended.
#[derive(Debug, Default)]
struct Tally {
    finished: AtomicU64,
    failed: AtomicU64,
}

impl AttentionService {
    pub(crate) fn new(
        hub: Arc<Hub>,
        calls: Calls,
        max_calls: usize,
        tasks: Tasks,
        sessions: Arc<Sessions>,
    ) -> Self {
        // Names calls in the logs of several nodes, so it doesn't start over with each life of this one.
        let next_call = AtomicU64::new(hub.surroundings.random());
        Self {
            hub,
            calls,
            places: Arc::new(Places::new(max_calls)),
            tasks,
            started: now(),
            next_call,
            tally: Arc::default(),
            sessions,
        }
    }
}

impl Tally {
    fn count(&self, ended: &Result<(), Error>, seconds: f64) {
        match ended {
            Ok(()) => {
                self.finished.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(seconds, "a call is answered");
            }
            Err(error) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                tracing::info!(seconds, %error, "a call failed");
            }
        }
    }
}

#[tonic::async_trait]
impl attention_server::Attention for AttentionService {
    type AttendStream = ReplyStream<proto::AttendReply, InFlight>;

    async fn attend(
        &self,
        request: Request<Streaming<proto::AttendRequest>>,
    ) -> Result<Response<Self::AttendStream>, Status> {
        // The layer in front of every service puts it there.
        let deadline = request.extensions().get::<Deadline>().copied();
        let deadline =
            deadline.ok_or_else(|| Error::new(Reason::Internal, "a request without a deadline"))?;
        let in_flight = self.calls.enter().ok_or_else(|| Error::new(Reason::Draining, ""))?;
        let call_id = self.next_call.fetch_add(1, Ordering::Relaxed);
        let (answer, stream) = reply_stream(in_flight);
        let (hub, places, tally) = (Arc::clone(&self.hub), Arc::clone(&self.places), Arc::clone(&self.tally));
        let calls = self.calls.clone();
        let requests = request.into_inner();
        let task = async move {
            let begun = now();
            let ended = attend(&hub, &calls, &places, call_id, requests, answer.queue(), deadline).await;
            tally.count(&ended, now().saturating_duration_since(begun).as_secs_f64());
            // Whoever was idle has had its time.
            let idle = ended.as_ref().is_err_and(|error| error.reason == Reason::StreamIdle);
            answer.end(ended, if idle { Duration::ZERO } else { STALL }).await;
        };
        let span = tracing::info_span!("attend", call_id = format_args!("{call_id:016x}"));
        self.tasks.spawn(task.instrument(span));
        Ok(Response::new(stream))
    }

    async fn status(&self, _: Request<proto::StatusRequest>) -> Result<Response<proto::StatusReply>, Status> {
        let gone = |_| Error::new(Reason::Internal, "the membership actor is gone");
        let status = ClusterStatus {
            workers: self.hub.cluster.ask(Roster).send().await.map_err(gone)?,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime: now().saturating_duration_since(self.started),
            calls_in_flight: self.calls.in_flight() as u64,
            calls_finished: self.tally.finished.load(Ordering::Relaxed),
            calls_failed: self.tally.failed.load(Ordering::Relaxed),
            sessions: self.sessions.counts(),
        };
        Ok(Response::new(status.into()))
    }
}
