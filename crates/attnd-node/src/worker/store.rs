//! The shards of sessions that this worker holds, and the work on them.
//!
//! * [`shard`] is one of them: what a replica knows (`attnd_plan::session`), and [`pages`] with its keys and values.
//! * [`turns`] lets work run whose turn it is: in order where it touches the same shard, else side by side. Work runs on the compute pool,
//!   from what it appends to its encoded answer, without a change of threads in between.
//! * [`works`] are the steps of a message: rows first, then all that is asked over them ([`attention`]).
//! * [`export`] and [`import`] are the two halves of a copy of a replica to another worker.
//! * [`scrub`] looks whether pages are still as they were written.
//! * [`memory`] is what all of it may take.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use attnd_kernel::Kernels;
use attnd_plan::Piece;
use attnd_plan::session::{SessionSpec, Terms};
use attnd_wire::hold::{ShardAt, ShardState};
use attnd_wire::surroundings::now;
use attnd_wire::{Error, Reason, refusal};

use self::memory::SessionMemory;
use self::shard::{Resident, ShardKey, key_of};
use self::turns::{Access, Ticket, Turns};
use crate::budget::{Budget, OverBudget, Reservation};
use crate::compute_pool::ComputePool;

pub(crate) mod attention;
pub(crate) mod export;
pub(crate) mod import;
pub(crate) mod memory;
pub(crate) mod pages;
pub(crate) mod scrub;
pub(crate) mod shard;
pub(crate) mod staged;
pub(crate) mod turns;
pub(crate) mod works;

/// How often a worker that leaves looks whether it still has shards.
const HANDED_OVER: Duration = Duration::from_millis(50);
/// How long a worker that leaves waits for a coordinator to come back, which alone could take its shards away. One that starts again is
/// back within three seconds, and a stream that broke sooner.
const COMES_BACK: Duration = Duration::from_secs(5);
/// Shards at most; each takes some memory of its own, however empty it is.
const MAX_SHARDS: usize = 65_536;
/// Bytes that the account of an empty shard takes, with the ops that it remembers.
const SHARD_RECORD: u64 = 48 << 10;
/// Bytes that a sequence takes beside its pages.
const SEQUENCE_RECORD: u64 = 256;
/// Bytes of such records that any worker has room for, beside a sixteenth of what pages may take.
const LEAST_RECORDS: u64 = 64 << 20;

/// All of it. Clones are handles on the same.
#[derive(Clone, Debug)]
pub(crate) struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    kernels: &'static Kernels,
    pool: ComputePool,
    /// What messages take on their way, beside that of calls.
    in_flight: Arc<Budget>,
    memory: SessionMemory,
    records: Arc<Budget>,
    terms: Mutex<Terms>,
    lines: Mutex<Lines>,
    presence: Mutex<Presence>,
    /// Streams so far.
    streams: AtomicU64,
}

struct Lines {
    shards: BTreeMap<ShardKey, Arc<Resident>>,
    turns: Turns<ShardKey, Job>,
}

/// Work on shards.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// Streams that coordinators keep open, with the terms that were heard on them, and when one of the highest was last there.
#[derive(Debug)]
struct Presence {
    streams: BTreeMap<u64, Arc<AtomicU64>>,
    last: Instant,
}

/// A coordinator's stream, for as long as it lives.
#[derive(Debug)]
pub(crate) struct Present {
    store: Store,
    stream: u64,
    term: Arc<AtomicU64>,
}

/// Work that has its turn, until it is dropped.
struct Turn {
    store: Store,
    ticket: Ticket,
}

impl Store {
    /// A store without shards, whose pages take at most `session_memory` bytes.
    pub(crate) fn new(
        kernels: &'static Kernels,
        pool: ComputePool,
        in_flight: Arc<Budget>,
        session_memory: u64,
    ) -> Self {
        // Each thread has a piece of work, and none waits inside of the pool for another's end.
        let turns = Turns::new(pool.threads());
        Self(Arc::new(Inner {
            kernels,
            pool,
            in_flight,
            memory: SessionMemory::new(session_memory),
            records: Budget::new(LEAST_RECORDS.saturating_add(session_memory / 16)),
            terms: Mutex::default(),
            lines: Mutex::new(Lines { shards: BTreeMap::new(), turns }),
            presence: Mutex::new(Presence { streams: BTreeMap::new(), last: now() }),
            streams: AtomicU64::new(0),
        }))
    }

    /// The kernels that all work here uses.
    pub(crate) fn kernels(&self) -> &'static Kernels {
        self.0.kernels
    }

    /// The memory of pages.
    pub(crate) fn memory(&self) -> &SessionMemory {
        &self.0.memory
    }

    /// Bytes of pages that are taken, of all sessions.
    pub(crate) fn resident_bytes(&self) -> u64 {
        self.0.memory.resident()
    }

    /// Compute threads.
    pub(crate) fn threads(&self) -> usize {
        self.0.pool.threads()
    }

    /// A coordinator of this term says something.
    ///
    /// # Errors
    /// [`Reason::Fenced`] if another one has shown a higher one.
    pub(crate) fn see_term(&self, term: u64) -> Result<(), Error> {
        lock(&self.0.terms).check(term).map_err(Error::from)
    }

    /// Reserves memory for what a message brings and what is made of it.
    ///
    /// # Errors
    /// [`Reason::Overloaded`] with both numbers: it is free again once other messages are answered.
    pub(crate) fn reserve(&self, bytes: u64) -> Result<Reservation, Error> {
        self.0.in_flight.reserve(bytes).map_err(|over| Error::new(Reason::Overloaded, over.to_string()))
    }

    /// A shard that is here.
    ///
    /// # Errors
    /// [`Reason::Shard`] if it isn't.
    pub(crate) fn resident(&self, key: ShardKey) -> Result<Arc<Resident>, Error> {
        self.lines().shards.get(&key).cloned().ok_or_else(|| no_shard(key))
    }

    /// All shards that are here, with their epochs; 0 for one that is being changed at this moment, for which nobody waits here.
    pub(crate) fn list(&self) -> Vec<ShardAt> {
        let residents: Vec<Arc<Resident>> = self.lines().shards.values().cloned().collect();
        let at = |resident: &Arc<Resident>| {
            let (session, shard) = resident.key;
            ShardAt { session, shard, epoch: resident.epoch_now().unwrap_or(0) }
        };
        residents.iter().map(at).collect()
    }

    /// Shards that are here.
    pub(crate) fn len(&self) -> usize {
        self.lines().shards.len()
    }

    /// Takes a shard in, unless one of this key is here: that one is returned then.
    ///
    /// # Errors
    /// [`Reason::Overloaded`] if there are too many.
    pub(crate) fn insert(&self, resident: Resident) -> Result<(Arc<Resident>, bool), Error> {
        let mut lines = self.lines();
        if let Some(there) = lines.shards.get(&resident.key) {
            return Ok((Arc::clone(there), false));
        }
        if lines.shards.len() >= MAX_SHARDS {
            return Err(Error::new(Reason::Overloaded, format!("{MAX_SHARDS} shards")));
        }
        let resident = Arc::new(resident);
        lines.shards.insert(resident.key, Arc::clone(&resident));
        Ok((resident, true))
    }

    /// Takes the child of a shard in, however many there are; `false` if one of its key is here.
    pub(crate) fn insert_fork(&self, child: Resident) -> bool {
        match self.lines().shards.entry(child.key) {
            Entry::Vacant(place) => {
                place.insert(Arc::new(child));
                true
            }
            Entry::Occupied(_) => false,
        }
    }

    /// Lets go of a shard. Whoever has it still doesn't find anything in it.
    pub(crate) fn remove(&self, key: ShardKey) -> Option<Arc<Resident>> {
        self.lines().shards.remove(&key)
    }

    /// The same for this one, and no other of its key.
    fn remove_only(&self, resident: &Arc<Resident>) {
        let mut lines = self.lines();
        if lines.shards.get(&resident.key).is_some_and(|there| Arc::ptr_eq(there, resident)) {
            lines.shards.remove(&resident.key);
        }
    }

    /// All shards that are here.
    fn keys(&self) -> Vec<ShardKey> {
        self.lines().shards.keys().copied().collect()
    }

    /// Memory for the account of a shard.
    ///
    /// # Errors
    /// [`Reason::Overloaded`] with both numbers.
    pub(crate) fn record(&self, spec: &SessionSpec, pieces: &[Piece]) -> Result<Reservation, Error> {
        let over = |over: OverBudget| Error::new(Reason::Overloaded, format!("records of sessions {over}"));
        self.0.records.reserve(record_bytes(spec, pieces)).map_err(over)
    }

    /// The same where nothing may be refused: what doesn't fit isn't counted.
    pub(crate) fn record_or_none(&self, spec: &SessionSpec, pieces: &[Piece]) -> Option<Reservation> {
        self.0.records.reserve(record_bytes(spec, pieces)).ok()
    }

    /// Runs work on the compute pool when its turn comes.
    pub(crate) fn submit(&self, touches: Vec<(ShardKey, Access)>, job: Job) {
        let runs = self.lines().turns.enter(job, touches);
        if let Some((ticket, job)) = runs {
            self.run(ticket, job);
        }
    }

    /// The same for a short job, which runs on this thread if it is its turn now.
    pub(crate) fn submit_short(&self, touches: Vec<(ShardKey, Access)>, job: Job) {
        let runs = self.lines().turns.enter(job, touches);
        if let Some((ticket, job)) = runs {
            let _turn = Turn { store: self.clone(), ticket };
            self.0.pool.run_here(job);
        }
    }

    fn run(&self, ticket: Ticket, job: Job) {
        let turn = Turn { store: self.clone(), ticket };
        self.0.pool.begin(move || {
            let _turn = turn;
            job();
        });
    }

    /// Lets go of a shard, and gives its memory back.
    ///
    /// # Errors
    /// [`Reason::Epoch`] if it is of a higher one. One that isn't here was let go before.
    pub(crate) fn release(&self, at: &ShardAt) -> Result<ShardState, Error> {
        let key = key_of(at);
        let Ok(resident) = self.resident(key) else {
            let (epoch, resident_bytes) = (at.epoch, self.resident_bytes());
            return Ok(ShardState { epoch, replayed: true, resident_bytes, ..ShardState::default() });
        };
        resident.look().check_release(at.epoch)?;
        self.remove(key);
        resident.release();
        let state = resident.look().state(self, false);
        Ok(state)
    }

    /// A number for a stream that no other one has.
    pub(crate) fn next_stream(&self) -> u64 {
        self.0.streams.fetch_add(1, Ordering::Relaxed)
    }

    /// Counts a stream of a coordinator as open, unless `most` are.
    pub(crate) fn present(&self, most: usize) -> Option<Present> {
        let (stream, term) = (self.next_stream(), Arc::default());
        let mut presence = self.presence();
        if presence.streams.len() >= most {
            return None;
        }
        presence.streams.insert(stream, Arc::clone(&term));
        Some(Present { store: self.clone(), stream, term })
    }

    /// Completes once there are no shards here, or nobody for a while who could take them away.
    pub(crate) async fn handed_over(&self) {
        let mut told = usize::MAX;
        loop {
            let (shards, is_left) = (self.len(), self.presence().is_left_for(COMES_BACK));
            if shards == 0 || is_left {
                return;
            }
            if shards < told {
                // One of them, so that whoever wonders finds its session.
                let one = self.lines().shards.keys().next().copied();
                tracing::info!(shards, ?one, "waits until others have its shards of sessions");
                told = shards;
            }
            tokio::time::sleep(HANDED_OVER).await;
        }
    }

    /// Completes never; gives all shards up whenever no coordinator has been there for so long. One that was replaced is none. If it is
    /// there still when the one that replaced it has been gone for so long, it is heard again: there is nothing any more that it could
    /// do wrong.
    pub(crate) async fn forget_when_left(&self, keep: Duration) {
        loop {
            let since = {
                let highest = lock(&self.0.terms).highest();
                let mut presence = self.presence();
                if presence.streams.values().any(|term| term.load(Ordering::Relaxed) == highest) {
                    presence.last = now();
                }
                now().saturating_duration_since(presence.last)
            };
            if since >= keep {
                self.forget_all();
                *lock(&self.0.terms) = Terms::default();
                self.presence().last = now();
            }
            tokio::time::sleep(keep.saturating_sub(since).max(keep / 10)).await;
        }
    }

    /// Gives all shards up.
    fn forget_all(&self) {
        let shards = self.keys();
        if !shards.is_empty() {
            tracing::warn!(
                shards = shards.len(),
                "no coordinator has been here for long; sessions are given up"
            );
        }
        for key in shards {
            let store = self.clone();
            let release = move || {
                if let Some(resident) = store.remove(key) {
                    resident.release();
                }
            };
            self.submit(vec![(key, Access::Changes)], Box::new(release));
        }
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        lock(&self.0.lines)
    }

    fn presence(&self) -> MutexGuard<'_, Presence> {
        lock(&self.0.presence)
    }
}

fn record_bytes(spec: &SessionSpec, pieces: &[Piece]) -> u64 {
    let heads: usize = pieces.iter().map(|piece| piece.groups.len()).sum();
    SHARD_RECORD + spec.layers as u64 * (heads as u64 + 1) * SEQUENCE_RECORD
}

/// A shard that isn't here, or not any more.
pub(crate) fn no_shard((session, shard): ShardKey) -> Error {
    Error::new(Reason::Shard, format!("session {session:016x} shard {shard} is not here"))
}

/// More memory of sessions is needed than is free.
pub(crate) fn no_memory(over: OverBudget) -> Error {
    refusal::kv_budget(over.need, over.free)
}

impl Drop for Turn {
    fn drop(&mut self) {
        let next = self.store.lines().turns.leave(self.ticket);
        for (ticket, job) in next {
            self.store.run(ticket, job);
        }
    }
}

impl Presence {
    /// Whether no coordinator has been here for so long.
    fn is_left_for(&self, long: Duration) -> bool {
        self.streams.is_empty() && now().saturating_duration_since(self.last) >= long
    }
}

impl Present {
    /// The term that was heard last on the stream, 0 before any; to be set.
    pub(crate) fn term(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.term)
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        let highest = lock(&self.store.0.terms).highest();
        let mut presence = self.store.presence();
        presence.streams.remove(&self.stream);
        if self.term.load(Ordering::Relaxed) == highest {
            presence.last = now();
        }
    }
}

impl std::fmt::Debug for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let work = self.turns.len();
        f.debug_struct("Lines")
            .field("shards", &self.shards.len())
            .field("work", &work)
            .finish_non_exhaustive()
    }
}

/// No critical section of this file panics half-way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(crate) mod tests;
