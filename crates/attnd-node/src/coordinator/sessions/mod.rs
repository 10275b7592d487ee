//! Sessions: keys and values that stay on the workers, so that queries travel to them.
//!
//! * `exchange.rs` serves the stream of a client. Its requests become an `open.rs`, `steps.rs`, `append.rs` or `change.rs`, each of which
//!   lines up (`turns.rs`) where it changes a session.
//! * `session.rs` is a session: a shell around [`attnd_plan::session::Ledger`], which decides. `upkeep.rs` does what it wants done
//!   beside answering, `copies.rs` has replicas copied, and `repair.rs` says where to.
//! * `works.rs` cuts a step into its shards' parts, `collector.rs` sends these and takes what comes back, `merge.rs` makes rows of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use attnd_plan::session::{Closed, ClosedSessions, SessionName};
use attnd_wire::session::{Answer, SessionDescription};
use attnd_wire::surroundings::now;
use attnd_wire::{Error, Reason};

use super::Hub;
use super::tasks::Tasks;
use repair::Repairs;
use session::Session;

mod append;
mod change;
mod collector;
mod copies;
mod exchange;
mod merge;
mod open;
mod repair;
mod session;
mod steps;
mod turns;
mod upkeep;
mod works;

pub(crate) use exchange::SessionsService;
pub(crate) use upkeep::watch;

/// Sessions that may be open at a time.
const MAX_SESSIONS: usize = 100_000;

/// All sessions of a coordinator.
#[derive(Debug)]
pub(crate) struct Sessions {
    hub: Arc<Hub>,
    tasks: Tasks,
    /// Workers refuse a coordinator of a lower one.
    term: u64,
    started: Instant,
    table: Mutex<Table>,
    lines: Mutex<()>,
    repairs: Repairs,
}

#[derive(Debug, Default)]
struct Table {
    /// The last number that a session got.
    last: u64,
    open: BTreeMap<SessionName, Arc<Session>>,
    /// Names of sessions that are being opened.
    opening: BTreeSet<SessionName>,
    closed: ClosedSessions,
}

impl Sessions {
    pub(crate) fn new(hub: Arc<Hub>, tasks: Tasks, term: u64) -> Self {
        let (started, table, lines) = (now(), Mutex::default(), Mutex::default());
        Self { hub, tasks, term, started, table, lines, repairs: Repairs::new() }
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

    /// The session of that name, which counts as used now.
    ///
    /// # Errors
    /// [`Reason::Session`], or [`Reason::SessionExpired`] for one that was closed because nobody used it.
    fn find(&self, name: &SessionName) -> Result<Arc<Session>, Error> {
        let table = self.table();
        if let Some(session) = table.open.get(name) {
            let session = Arc::clone(session);
            drop(table);
            session.lock().ledger.touch(self.now());
            return Ok(session);
        }
        match table.closed.look(name, self.now()) {
            Some(Closed::Expired) => Err(Error::new(Reason::SessionExpired, "")),
            Some(Closed::Released) | None => Err(Error::new(Reason::Session, "")),
        }
    }

    /// What a session is and has.
    ///
    /// # Errors
    /// As [`Self::find`].
    fn describe(&self, name: &SessionName) -> Result<SessionDescription, Error> {
        Ok(self.find(name)?.describe(self, false))
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
