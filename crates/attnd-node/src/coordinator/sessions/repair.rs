//! Who gets replicas: where some are missing, where a worker wants to leave, and where one has come that has more room than others.
//!
//! Nothing here is in a hurry but the first attempt: what can't be done now is tried again in the rounds of `upkeep.rs`, which look at who
//! is there and how much memory is free, and a worker that a copy failed on is left alone for a while that grows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use attnd_plan::session::{
    Holder, Keeper, Ledger, LedgerEvent, Move, ShardPlacement, placement::shard_bytes, rebalance, replacement,
};
use attnd_wire::join::SESSIONS;
use attnd_wire::{Error, Reason};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Sessions;
use super::session::{Session, State};
use crate::coordinator::membership_actor::{Everybody, Present};

/// Copies at once that no shard waits for.
const COPIES_AT_ONCE: usize = 4;
/// Replicas that move at once, of all sessions, because a worker came.
const MOVES_AT_ONCE: usize = 2;
/// How long a worker is left alone that a copy failed on: at first, and at most.
const LEFT_ALONE: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];

/// Copies of all sessions.
#[derive(Debug)]
pub(super) struct Repairs {
    turns: Arc<Semaphore>,
    known: Arc<Mutex<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    /// Bytes that are on their way to somebody, who doesn't count them yet.
    expected: BTreeMap<Holder, u64>,
    /// Who was there in the last round.
    present: BTreeSet<Holder>,
    /// Who came, and may take replicas of others.
    joined: BTreeSet<Holder>,
}

/// Bytes that are on their way to a worker.
#[derive(Debug)]
pub(super) struct Expected {
    known: Arc<Mutex<Known>>,
    holder: Holder,
    bytes: u64,
}

/// What is to be kept in mind of one session.
#[derive(Debug, Default)]
pub(super) struct Repair {
    /// Of workers that copies failed on: how often, and until when they are left alone.
    failed: BTreeMap<Holder, (u32, Duration)>,
    /// The replica that moves: of which shard, from whom, to whom.
    moving: Option<Move>,
    /// Somebody looks for workers that can have what is missing.
    is_running: bool,
    /// More is missing since it was begun.
    is_due_again: bool,
}

impl Repair {
    fn is_left_alone(&self, holder: &Holder, now: Duration) -> bool {
        self.failed.get(holder).is_some_and(|(_, until)| now < *until)
    }

    fn fails(&mut self, holder: &Holder, now: Duration) {
        let [first, most] = LEFT_ALONE;
        // Whoever is gone for good is forgotten.
        self.failed.retain(|_, (_, until)| now < *until + most);
        let (times, until) = self.failed.entry(holder.clone()).or_default();
        *until = now + first.saturating_mul(1 << (*times).min(10)).min(most);
        *times += 1;
    }

    /// A copy has come to somebody.
    pub(super) fn succeeded(&mut self, holder: &Holder) {
        self.failed.remove(holder);
    }
}

impl Repairs {
    pub(super) fn new() -> Self {
        Self { turns: Arc::new(Semaphore::new(COPIES_AT_ONCE)), known: Arc::default() }
    }

    /// Waits until another copy may run.
    pub(super) async fn turn(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.turns).acquire_owned().await.ok()
    }

    /// So many bytes are about to be copied to somebody.
    pub(super) fn expect(&self, holder: &Holder, bytes: u64) -> Expected {
        let mut known = lock(&self.known);
        let sum = known.expected.entry(holder.clone()).or_default();
        *sum = sum.saturating_add(bytes);
        Expected { known: Arc::clone(&self.known), holder: holder.clone(), bytes }
    }

    /// Everybody with the memory that is really free.
    fn keepers(&self, present: &[Present]) -> Vec<Keeper> {
        let known = lock(&self.known);
        let keeper = |present: &Present| {
            let mut keeper = present.keeper.clone();
            let expected = known.expected.get(&keeper.holder).copied().unwrap_or(0);
            keeper.free_bytes = keeper.free_bytes.saturating_sub(expected);
            keeper
        };
        present.iter().map(keeper).collect()
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        let mut known = lock(&self.known);
        if let Some(sum) = known.expected.get_mut(&self.holder) {
            *sum = sum.saturating_sub(self.bytes);
            if *sum == 0 {
                known.expected.remove(&self.holder);
            }
        }
    }
}

/// Workers are looked for that can have what a session lacks, until this is dropped.
struct Running {
    session: Arc<Session>,
    /// Whoever comes next looks by itself.
    is_over: bool,
}

impl Running {
    /// Whether it is to look once more.
    fn goes_on(&mut self) -> bool {
        let mut state = self.session.lock();
        state.repair.is_running = std::mem::take(&mut state.repair.is_due_again);
        self.is_over = !state.repair.is_running;
        state.repair.is_running
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.is_over {
            let mut state = self.session.lock();
            (state.repair.is_running, state.repair.is_due_again) = (false, false);
        }
    }
}

impl Session {
    /// What a replica of a shard takes, in bytes.
    pub(super) fn bytes_of(&self, ledger: &Ledger<Error>, shard: usize) -> u64 {
        let Some(pieces) = self.pieces.get(shard) else { return 0 };
        let of_layer = |tokens: &usize| shard_bytes(&self.spec, pieces, *tokens) / self.spec.layers as u64;
        ledger.tokens().iter().map(of_layer).fold(0, u64::saturating_add)
    }

    /// Who could get a replica of a shard now.
    fn replacement(&self, state: &State, shard: usize, keepers: &[Keeper], now: Duration) -> Option<Holder> {
        let ledger = &state.ledger;
        let staying = |keeper: &&Keeper| ledger.staying(shard).any(|holder| *holder == keeper.holder);
        let members: Vec<Keeper> = keepers.iter().filter(staying).cloned().collect();
        let is_free = |keeper: &&Keeper| {
            !ledger.holders(shard).any(|holder| *holder == keeper.holder)
                && !state.repair.is_left_alone(&keeper.holder, now)
        };
        let free: Vec<Keeper> = keepers.iter().filter(is_free).cloned().collect();
        replacement(&self.spec, &members, self.bytes_of(ledger, shard), &free)
    }
}

impl Sessions {
    async fn everybody(&self) -> Result<Vec<Present>, Error> {
        let gone = |_| Error::new(Reason::Internal, "the membership actor is gone");
        self.hub.cluster.ask(Everybody { least_version: SESSIONS }).send().await.map_err(gone)
    }

    /// Looks for workers that can have replicas of a session that are missing, now.
    pub(super) fn begin_repair(self: &Arc<Self>, session: &Arc<Session>) {
        {
            let repair = &mut session.lock().repair;
            // Whoever looks already may have looked past it.
            if std::mem::replace(&mut repair.is_running, true) {
                repair.is_due_again = true;
                return;
            }
        }
        let mut running = Running { session: Arc::clone(session), is_over: false };
        let sessions = Arc::clone(self);
        self.tasks.spawn(async move {
            while let Ok(present) = sessions.everybody().await {
                sessions.repair(&running.session, &present).await;
                if !running.goes_on() {
                    break;
                }
            }
        });
    }

    /// The same for all sessions that lack something: somebody has come who may have it.
    pub(super) fn begin_repairs(self: &Arc<Self>) {
        for session in self.open_sessions() {
            let lacks = {
                let state = session.lock();
                let is_open = state.closed.is_none() && !state.ledger.is_lost();
                is_open && (0..session.pieces.len()).any(|shard| state.ledger.missing_replicas(shard) > 0)
            };
            if lacks {
                self.begin_repair(&session);
            }
        }
    }

    /// Has replicas made that are missing, as far as there are workers for them.
    async fn repair(self: &Arc<Self>, session: &Arc<Session>, present: &[Present]) {
        for shard in 0..session.pieces.len() {
            // Whoever can't be reached is left alone for a while, and isn't chosen again.
            loop {
                let chosen = {
                    let state = session.lock();
                    if state.closed.is_some() || state.ledger.missing_replicas(shard) == 0 {
                        break;
                    }
                    let usable: Vec<Keeper> = self.usable_or_member(present, &state, shard);
                    session.replacement(&state, shard, &usable, self.now())
                };
                let Some(holder) = chosen else { break };
                if !self.link(session, &holder).await {
                    session.lock().repair.fails(&holder, self.now());
                    continue;
                }
                let missing = || session.lock().ledger.missing_replicas(shard);
                let before = missing();
                if before > 0 {
                    session.handle(self, LedgerEvent::Replacement { shard, holder });
                }
                if missing() >= before {
                    break;
                }
            }
        }
    }

    /// Whether replicas are missing for which there are workers.
    fn can_repair(&self, session: &Session, present: &[Present]) -> bool {
        let state = session.lock();
        let can = |shard: usize| {
            let usable = || self.usable_or_member(present, &state, shard);
            state.ledger.missing_replicas(shard) > 0
                && session.replacement(&state, shard, &usable(), self.now()).is_some()
        };
        state.closed.is_none() && (0..session.pieces.len()).any(can)
    }

    /// Workers that may get a replica, and those that have one, whatever else they are.
    fn usable_or_member(&self, present: &[Present], state: &State, shard: usize) -> Vec<Keeper> {
        let holds = |holder: &Holder| state.ledger.holders(shard).any(|other| other == holder);
        let keepers = self.repairs.keepers(present).into_iter().zip(present);
        let chosen = keepers.filter(|(keeper, present)| present.is_usable || holds(&keeper.holder));
        chosen.map(|(keeper, _)| keeper).collect()
    }

    /// Makes sure that a session has a link to a worker.
    async fn link(self: &Arc<Self>, session: &Arc<Session>, holder: &Holder) -> bool {
        if session.lock().links.contains_key(holder) {
            return true;
        }
        match self.link_of(holder).await {
            Ok(link) => {
                // It may be back, with other shards of the session, of which the ledger must hear too.
                session.lock().seen = 0;
                session.reconcile(self);
                session.lock().links.entry(holder.clone()).or_insert(link);
                true
            }
            Err(error) => {
                tracing::debug!(worker = %holder.worker, %error, "no stream to a worker that was chosen");
                false
            }
        }
    }

    /// A copy to somebody failed: nobody is looked for in its place at once, if it only was to move.
    pub(super) fn put_off(self: &Arc<Self>, session: &Arc<Session>, shard: usize, to: &Holder) {
        let now = self.now();
        let moved = {
            let mut state = session.lock();
            state.repair.fails(to, now);
            let is_it = |moving: &mut Move| moving.shard == shard && moving.to == *to;
            state.repair.moving.take_if(is_it)
        };
        if let Some(Move { shard, from: holder, .. }) = moved {
            session.handle(self, LedgerEvent::Stays { shard, holder });
        }
    }

    /// What is due about replicas of all sessions, in each round.
    pub(super) async fn mend(self: &Arc<Self>, open: &[Arc<Session>]) {
        let Ok(present) = self.everybody().await else { return };
        let draining: Vec<&Holder> = present
            .iter()
            .filter(|present| present.is_draining)
            .map(|present| &present.keeper.holder)
            .collect();
        let joined = self.look_who_came(&present);
        let mut moves = 0;
        for session in open {
            self.let_go(session, &draining);
            moves += usize::from(self.look_after_move(session));
            if self.can_repair(session, &present) {
                // In a task, as a stream to a worker may be a while in coming.
                self.begin_repair(session);
            }
        }
        for holder in joined {
            let mut has_moved = false;
            for session in open {
                if moves >= MOVES_AT_ONCE {
                    return;
                }
                if self.begin_move(session, &holder, &present).await {
                    moves += 1;
                    has_moved = true;
                }
            }
            if !has_moved && moves == 0 {
                // Nothing is better there, and nothing is on its way any more.
                lock(&self.repairs.known).joined.remove(&holder);
            }
        }
    }

    /// Who came and hasn't got all that is better there.
    fn look_who_came(&self, present: &[Present]) -> Vec<Holder> {
        let usable = present.iter().filter(|present| present.is_usable);
        let usable: BTreeSet<Holder> = usable.map(|present| present.keeper.holder.clone()).collect();
        let mut known = lock(&self.repairs.known);
        let Known { present: before, joined, .. } = &mut *known;
        joined.extend(usable.difference(before).cloned());
        joined.retain(|holder| usable.contains(holder));
        // Who is suspect for a while hasn't left.
        before.retain(|holder| present.iter().any(|present| present.keeper.holder == *holder));
        before.extend(usable);
        joined.iter().cloned().collect()
    }

    /// Tells a session who wants to leave.
    fn let_go(self: &Arc<Self>, session: &Arc<Session>, draining: &[&Holder]) {
        for holder in draining {
            let stays = {
                let state = session.lock();
                let shards = 0..session.pieces.len();
                let is_it = |other: &Holder| other == *holder;
                state.links.contains_key(*holder)
                    && shards.into_iter().any(|shard| state.ledger.staying(shard).any(is_it))
            };
            if stays {
                session.handle(self, LedgerEvent::Draining((*holder).clone()));
            }
        }
    }

    /// Looks what became of a move; says whether it goes on.
    fn look_after_move(self: &Arc<Self>, session: &Arc<Session>) -> bool {
        let stays = {
            let mut state = session.lock();
            let State { ledger, repair, .. } = &mut *state;
            let Some(Move { shard, from, to }) = &repair.moving else { return false };
            let holds = |holder: &Holder| ledger.holders(*shard).any(|other| other == holder);
            match (holds(from), holds(to)) {
                (true, true) => return true,
                (false, _) => {
                    repair.moving = None;
                    return false;
                }
                (true, false) => repair.moving.take(),
            }
        };
        if let Some(Move { shard, from: holder, .. }) = stays {
            session.handle(self, LedgerEvent::Stays { shard, holder });
        }
        false
    }

    /// Begins to move a replica of a session to a worker that came, if one would be better there; says whether.
    async fn begin_move(
        self: &Arc<Self>,
        session: &Arc<Session>,
        joined: &Holder,
        present: &[Present],
    ) -> bool {
        let keepers = self.repairs.keepers(present);
        let chosen = {
            let state = session.lock();
            let State { ledger, repair, .. } = &*state;
            let may_move = state.closed.is_none() && repair.moving.is_none() && ledger.is_settled();
            if !may_move || repair.is_left_alone(joined, self.now()) {
                return false;
            }
            let shards: Vec<ShardPlacement> = session
                .pieces
                .iter()
                .enumerate()
                .map(|(shard, pieces)| ShardPlacement {
                    pieces: pieces.to_vec(),
                    members: ledger.members(shard).cloned().collect(),
                    bytes: session.bytes_of(ledger, shard),
                })
                .collect();
            rebalance(&session.spec, &shards, &keepers, joined, 1).pop()
        };
        let Some(chosen) = chosen else { return false };
        if !self.link(session, joined).await {
            // As if it had: it is tried again, by others first.
            session.lock().repair.fails(joined, self.now());
            return true;
        }
        let Move { shard, from, to } = chosen.clone();
        tracing::info!(session = %session.name, shard, from = %from.worker, to = %to.worker, "a replica moves");
        session.lock().repair.moving = Some(chosen);
        session.handle(self, LedgerEvent::Move { shard, from, to });
        true
    }
}

fn lock(known: &Mutex<Known>) -> MutexGuard<'_, Known> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}
