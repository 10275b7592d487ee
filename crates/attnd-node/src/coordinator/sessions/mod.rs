//! Sessions: keys and values that stay on the workers, so that queries travel to them.
//!
//! * `exchange.rs` serves the stream of a client. Its requests become an `open.rs`, `steps.rs`, `append.rs` or `change.rs`, each of which
//!   lines up (`turns.rs`) where it changes a session. `feed.rs` is the way of an append's chunks, before its turn and since.
//!   `patience.rs` keeps whoever asks waiting for a session that has just lost a replica.
//! * `session.rs` is a session: a shell around [`attnd_plan::session::Ledger`], which decides. `upkeep.rs` does what it wants done
//!   beside answering, `description.rs` is what is told of it, `copies.rs` has replicas copied, and `repair.rs` says where to.
//! * `links.rs` keeps links to workers, and tells sessions of those that break and of workers that are gone.
//! * What outlives this process is in its store: `open.rs` and `births.rs` write sessions there before anybody is told of them,
//!   `saves.rs` who holds them; `start.rs` reads it.
//! * `works.rs` and `cuts.rs` cut a step into its shards' parts, `collector.rs` sends these and takes what comes back, and asks others for what is late
//!   (`hedges.rs`); `merge.rs` makes rows of it, `results.rs` answers of these.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use attnd_plan::session::{Closed, ClosedSessions, Hedging, Holder, SessionName};
use attnd_wire::session::{Answer, SessionDescription, ShardHealth};
use attnd_wire::surroundings::now;
use attnd_wire::{Error, Reason, SessionCounts};

use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::Hub;
use super::meta_store::{MetaError, MetaThread};
use super::tasks::Tasks;
use crate::budget::{Budget, Reservation};
use links::View;
use repair::Repairs;
use saves::Saves;
use session::Session;

mod append;
mod births;
mod change;
mod collector;
mod copies;
mod cuts;
mod description;
mod exchange;
mod feed;
mod hedges;
mod links;
mod merge;
mod open;
mod patience;
mod repair;
mod results;
mod saves;
mod session;
mod start;
mod steps;
mod stock;
#[cfg(test)]
mod tests;
mod turns;
mod upkeep;
mod works;

pub(crate) use exchange::SessionsService;
pub(crate) use links::keep_links;
pub(crate) use saves::write_members;
pub(crate) use upkeep::watch;

/// Memory that all steps under way may take: what they say, and the answers and partials that come of it.
const STEP_BYTES: u64 = 512 << 20;

/// Sessions that may be open at a time.
const MAX_SESSIONS: usize = 100_000;

/// All sessions of a coordinator.
#[derive(Debug)]
pub(crate) struct Sessions {
    hub: Arc<Hub>,
    tasks: Tasks,
    /// Workers refuse a coordinator of a lower one.
    term: u64,
    meta: MetaThread,
    saves: Saves,
    links: watch::Sender<Arc<View>>,
    /// Told of each new link, once it is in `links`.
    linked: Notify,
    started: Instant,
    table: Mutex<Table>,
    lines: Mutex<()>,
    repairs: Repairs,
    /// Memory for steps.
    room: Arc<Budget>,
    /// How long answers take, and what may be asked of a second replica.
    hedging: Mutex<Hedging<Holder>>,
    /// How long whoever asks is kept waiting for a session that isn't whole.
    patience: Duration,
}

#[derive(Debug, Default)]
struct Table {
    /// The last number that was part of a name.
    last: u64,
    open: BTreeMap<SessionName, Arc<Session>>,
    by_number: BTreeMap<u64, Arc<Session>>,
    /// Names of sessions that are being opened, or forked.
    opening: BTreeSet<SessionName>,
    /// Of those that are being opened, what whoever opens the same one waits for.
    being_opened: BTreeMap<SessionName, CancellationToken>,
    /// And their numbers, whose shards workers may hold by now.
    reserved: BTreeSet<u64>,
    closed: ClosedSessions,
}

impl Sessions {
    pub(crate) fn new(hub: Arc<Hub>, tasks: Tasks, term: u64, meta: MetaThread) -> Self {
        let (started, table, lines) = (now(), Mutex::default(), Mutex::default());
        let (saves, links, repairs) = (Saves::default(), watch::Sender::default(), Repairs::new());
        let (linked, hedging, patience) = (Notify::new(), Mutex::default(), patience::PATIENCE);
        let room = Budget::new(STEP_BYTES);
        Self {
            hub,
            tasks,
            term,
            meta,
            saves,
            links,
            linked,
            started,
            table,
            lines,
            repairs,
            room,
            hedging,
            patience,
        }
    }

    /// The clock of ledgers.
    fn now(&self) -> Duration {
        now().saturating_duration_since(self.started)
    }

    /// Nobody else takes places in lines as long as this is held, so that all places of one call are next to each other.
    fn line_up(&self) -> MutexGuard<'_, ()> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No critical section leaves the table half-changed.
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No critical section leaves it half-changed.
    fn hedging(&self) -> MutexGuard<'_, Hedging<Holder>> {
        self.hedging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory for a step, until it is dropped.
    ///
    /// # Errors
    /// [`Reason::ShapeLimit`] for more than all there is, and [`Reason::Overloaded`] with both numbers: it is free again once other steps
    /// are answered.
    fn room_for(&self, bytes: u64) -> Result<Arc<Reservation>, Error> {
        let limit = self.room.limit();
        if bytes > limit {
            let detail = format!(
                "a step of {bytes} bytes > {limit}, with its partials and its answer; fewer queries need less"
            );
            return Err(Error::new(Reason::ShapeLimit, detail));
        }
        let room = self.room.reserve(bytes).map(Arc::new);
        room.map_err(|over| Error::new(Reason::Overloaded, format!("steps: {over}")))
    }

    fn open_sessions(&self) -> Vec<Arc<Session>> {
        self.table().open.values().cloned().collect()
    }

    /// A session that is kept is there from now on.
    fn insert(self: &Arc<Self>, session: &Arc<Session>) {
        tracing::trace!(session = session.number, name = %session.name, "a session is there");
        {
            let mut table = self.table();
            table.closed.reopen(&session.name);
            table.by_number.insert(session.number, Arc::clone(session));
            table.open.insert(session.name.clone(), Arc::clone(session));
        }
        // What became of its links before it was here.
        session.reconcile(self);
    }

    /// The session of that name, which counts as used now.
    ///
    /// # Errors
    /// [`Reason::Session`], or [`Reason::SessionExpired`] for one that was closed because nobody used it.
    fn find(&self, name: &SessionName) -> Result<Arc<Session>, Error> {
        let open = self.table().open.get(name).cloned();
        // It may be closed at this moment; if it isn't, it won't be for want of use.
        if let Some(session) = open.filter(|session| session.touch(self.now())) {
            return Ok(session);
        }
        Err(not_open(self.table().closed.look(name, self.now())))
    }

    /// What a session is and has.
    ///
    /// # Errors
    /// As [`Self::find`], and [`Reason::Recovering`].
    fn describe(&self, name: &SessionName) -> Result<SessionDescription, Error> {
        self.find(name)?.describe(self, false)
    }

    /// How all of them are.
    pub(crate) fn counts(&self) -> SessionCounts {
        let open: Vec<Arc<Session>> = self.table().open.values().cloned().collect();
        let (hedges_sent, hedges_won) = self.hedging().counts();
        let mut counts = SessionCounts { hedges_sent, hedges_won, ..SessionCounts::default() };
        for session in open {
            *match session.health() {
                ShardHealth::Open => &mut counts.open,
                ShardHealth::Repairing => &mut counts.repairing,
                ShardHealth::Recovering => &mut counts.recovering,
                ShardHealth::Degraded => &mut counts.degraded,
                ShardHealth::Lost => &mut counts.lost,
            } += 1;
        }
        counts
    }

    /// All names, in as many answers as they need.
    fn list(&self) -> Vec<Answer> {
        let names: Vec<SessionName> = self.table().open.keys().cloned().collect();
        let mut answers: Vec<Answer> =
            names.chunks(attnd_wire::limits::MAX_ENTRIES).map(|part| Answer::Names(part.to_vec())).collect();
        if answers.is_empty() {
            answers.push(Answer::Names(Vec::new()));
        }
        answers
    }
}

/// The refusal of what can't be written down.
fn not_kept(error: &MetaError) -> Error {
    tracing::error!(%error, "the store of sessions fails");
    let detail = match error {
        // Where the file is, is nobody's business but the operator's.
        MetaError::Io { what, .. } | MetaError::Corrupt { what, .. } => what.clone(),
        MetaError::InUse { .. } | MetaError::Version { .. } => "the file is somebody else's".to_owned(),
        other => other.to_string(),
    };
    Error::new(Reason::StateStore, detail)
}

/// The refusal of a session that isn't there, or not any more.
fn not_open(closed: Option<Closed>) -> Error {
    match closed {
        Some(Closed::Expired) => Error::new(Reason::SessionExpired, ""),
        Some(Closed::Released) | None => Error::new(Reason::Session, ""),
    }
}
