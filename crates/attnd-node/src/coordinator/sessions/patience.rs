//! How long requests wait for a session that can't serve them at this moment: a worker was lost, and what its replicas have is being found
//! out, or another one gets a copy. Most often that takes less time than the pause after which a client would ask again, so whoever asks
//! is kept waiting instead, without polling: a session tells of each change.
//!
//! What lasts longer than [`PATIENCE`] is said, and said at once to all who ask from then on, until the session is whole again.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use attnd_plan::session::{Ask, Phase};
use attnd_wire::surroundings::now;
use attnd_wire::{Deadline, Error, Reason};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::session::{Session, State};

/// How long a session may be unable to serve before whoever asks is told so: a silent worker is dead after two seconds, and a copy of its
/// replica takes its time.
pub(super) const PATIENCE: Duration = Duration::from_millis(2500);
/// Requests of one client's stream that may wait so: half of those that may run, so that others get past.
pub(super) const MAX_PATIENT: usize = 32;
/// How often one request begins anew because its session was whole again.
pub(super) const MAX_TRIES: u8 = 4;

/// What a request may wait for, and for how long.
#[derive(Debug)]
pub(super) struct Patience {
    pub(super) deadline: Deadline,
    room: Arc<Semaphore>,
    taken: Option<OwnedSemaphorePermit>,
}

impl Patience {
    /// Until there is just time enough left for an answer, if there is room for another one that waits.
    pub(super) fn new(deadline: Deadline, room: &Arc<Semaphore>) -> Self {
        Self { deadline, room: Arc::clone(room), taken: None }
    }

    /// Until when a refusal of this session, which may pass, is waited for; `None`: it is to be said.
    pub(super) fn until(&mut self, session: &Session, patience: Duration) -> Option<Instant> {
        if self.taken.is_none() {
            self.taken = Some(Arc::clone(&self.room).try_acquire_owned().ok()?);
        }
        let until = session.stalled().checked_add(patience)?.min(self.deadline.for_next_hop().at());
        (now() < until).then_some(until)
    }
}

/// Room for requests that wait.
pub(super) fn room() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(MAX_PATIENT))
}

/// Whether the same request may be served a little later, by the same session as it is.
pub(super) fn may_pass(error: &Error) -> bool {
    matches!(error.reason, Reason::Recovering | Reason::UnderReplicated)
}

impl Session {
    /// Since when whoever asks has been waiting for it to be whole.
    fn stalled(&self) -> Instant {
        *self.lock().stalled.get_or_insert_with(now)
    }

    /// Waits until the session would take this op, or refuse it for good.
    pub(super) async fn becomes_writable(
        &self,
        writer_epoch: u64,
        seq: u64,
        ask: &Ask,
        until: Instant,
    ) -> bool {
        self.wait(until, |state| match state.ledger.check(writer_epoch, seq, ask) {
            Err(error) => !error.is_retryable(),
            Ok(()) => true,
        })
        .await
    }

    /// Waits until every shard can be read, or none of them ever again.
    pub(super) async fn becomes_readable(&self, until: Instant) -> bool {
        self.wait(until, |state| {
            let ledger = &state.ledger;
            let has_reader = |shard| ledger.computing(shard).any(|holder| state.links.contains_key(holder));
            ledger.is_lost() || (0..ledger.shards()).all(has_reader)
        })
        .await
    }

    /// Waits until something is so, or the session is closed; false if neither is in time.
    async fn wait(&self, until: Instant, is_so: impl Fn(&State) -> bool) -> bool {
        let waits = async {
            loop {
                // From before it looks, so that no change is missed.
                let mut changed = pin!(self.changed.notified());
                changed.as_mut().enable();
                let is_over = {
                    let state = self.lock();
                    state.closed.is_some() || is_so(&state)
                };
                if is_over {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout_at(until.into(), waits).await.is_ok()
    }
}

impl State {
    /// Takes note of whether the session is whole.
    pub(super) fn look_whether_whole(&mut self) {
        let ledger = &self.ledger;
        let is_whole =
            !ledger.is_restarting() && (0..ledger.shards()).all(|shard| ledger.phase(shard) == Phase::Open);
        if is_whole {
            self.stalled = None;
        }
    }
}
