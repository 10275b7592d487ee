//! Forks: a child is in the store before its fork begins, as pending, and is a session once the fork has been applied and its members are
//! saved. Then somebody may be told of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use attnd_plan::session::{Answer, Change, Holder, Ledger, SessionName};
use attnd_wire::hold::ShardAt;
use attnd_wire::session::Applied;
use attnd_wire::{Error, Reason, refusal};
use tokio::sync::oneshot;

use super::saves::TRY_AGAIN;
use super::session::{Session, SessionParts, State};
use super::{Sessions, not_kept};
use crate::coordinator::hold_link::HoldLink;
use crate::coordinator::meta_store::{MetaError, SessionRecord, ShardRecord};

/// Forks of forks: so many sessions above a child may be there, each a fork of the next.
const MAX_DEPTH: usize = 64;
/// Children of a session that may be there at a time.
const MAX_FORKS: usize = 10_000;

/// A child whose fork has been applied.
#[derive(Debug)]
pub(super) struct Born {
    number: u64,
    name: SessionName,
    ledger: Ledger<Error>,
    links: BTreeMap<Holder, Arc<HoldLink>>,
    /// Where room was asked for its shards.
    rooms: Vec<(ShardAt, Arc<HoldLink>)>,
    /// Who is told of it.
    waits: Option<oneshot::Sender<Result<Applied, Error>>>,
    applied: Applied,
}

impl State {
    /// Children that are there, or may come to be.
    fn forks_and_children(&self) -> usize {
        self.children.len() + self.forks.keys().filter(|child| !self.children.contains_key(child)).count()
    }

    /// Whether this is the answer to a fork that was begun here: then its child is what the session is at this moment, and whoever waits
    /// is told once it is kept.
    pub(super) fn bear(&mut self, answer: &Answer, is_awaited: bool) -> bool {
        let Some((number, name)) = answer.child.and_then(|child| self.forks.remove_entry(&child)) else {
            return false;
        };
        self.children.insert(number, name.clone());
        self.unsettled.insert(name.clone());
        let applied = self.applied(*answer, !is_awaited);
        let (ledger, links) = (self.ledger.fork(self.ledger.idle_since()), self.links.clone());
        let rooms = self.rooms.remove(&number).unwrap_or_default();
        let waits = if is_awaited { self.waits.take() } else { None };
        self.born.push(Born { number, name, ledger, links, rooms, waits, applied });
        true
    }
}

impl Sessions {
    /// Takes a name and a number for a child, and keeps both as pending.
    ///
    /// # Errors
    /// [`Reason::SessionExists`], [`Reason::ForkLimit`], [`Reason::Overloaded`], [`Reason::StateStore`].
    pub(super) async fn conceive(
        &self,
        parent: &Session,
        name: Option<SessionName>,
    ) -> Result<(SessionName, u64), Error> {
        if self.depth(parent) >= MAX_DEPTH {
            return Err(refusal::fork_depth(MAX_DEPTH));
        }
        if parent.lock().forks_and_children() >= MAX_FORKS {
            return Err(refusal::fork_count(MAX_FORKS));
        }
        let name = self.reserve(name)?;
        let ledger = parent.lock().ledger.fork(self.now());
        let mut record = record_of(&name, parent, &ledger);
        (record.parent, record.pending) = (Some(parent.number), true);
        match self.meta.run(move |store| store.create(&record)).await {
            Ok(number) => {
                self.table().reserved.insert(number);
                parent.lock().forks.insert(number, name.clone());
                Ok((name, number))
            }
            Err(error) => {
                self.give_back(&name, None);
                Err(not_kept(&error))
            }
        }
    }

    /// How many sessions above this one are there, each the parent of the next.
    fn depth(&self, session: &Session) -> usize {
        let table = self.table();
        let mut parent = session.parent;
        let above = std::iter::from_fn(|| {
            let found = table.by_number.get(&parent?)?;
            parent = found.parent;
            Some(())
        });
        above.take(MAX_DEPTH).count()
    }

    /// Forgets a child whose fork didn't come about.
    pub(super) async fn forget(&self, parent: &Session, number: u64) {
        let (name, rooms) = {
            let mut state = parent.lock();
            let Some(name) = state.forks.get(&number).cloned() else { return };
            // From now on its shards are nobody's, wherever more of them are found; its name is free once the store knows.
            self.table().reserved.remove(&number);
            state.forks.remove(&number);
            state.children.remove(&number);
            (name, state.rooms.remove(&number).unwrap_or_default())
        };
        self.give_up(rooms);
        if let Err(error) = self.meta.run(move |store| store.forget(number)).await {
            // As it is pending, it will be forgotten with the next start.
            tracing::error!(%error, child = %name, "a fork that failed can't be forgotten");
        }
        self.give_back(&name, Some(number));
    }

    /// Makes a session of a child, in a task.
    pub(super) fn deliver(self: &Arc<Self>, parent: &Arc<Session>, born: Born) {
        let (sessions, parent) = (Arc::clone(self), Arc::clone(parent));
        self.tasks.spawn(async move {
            let Born { number, name, ledger, links, mut rooms, waits, applied } = born;
            // Members may have changed since room was asked for.
            let holders: Vec<Vec<Holder>> =
                (0..ledger.shards()).map(|shard| ledger.holders(shard).cloned().collect()).collect();
            let child = SessionParts {
                number,
                name: name.clone(),
                spec: parent.spec.clone(),
                ledger,
                pieces: parent.pieces.clone(),
                links,
                parent: Some(parent.number),
            };
            let result = sessions.settle_child(number, child).await.map(|()| applied);
            if result.is_ok() {
                let is_used = |at: &ShardAt, link: &HoldLink| {
                    holders.get(at.shard as usize).is_some_and(|holders| holders.contains(&link.holder))
                };
                rooms.retain(|(at, link)| !is_used(at, link));
            }
            sessions.give_up(rooms);
            sessions.give_back(&name, Some(number));
            parent.lock().unsettled.remove(&name);
            parent.settled.notify_waiters();
            if let Some(waits) = waits {
                // Whoever asked may be gone.
                drop(waits.send(result));
            }
        });
    }

    async fn settle_child(self: &Arc<Self>, number: u64, child: SessionParts) -> Result<(), Error> {
        let child = Arc::new(Session::new(child));
        let record = {
            let state = child.lock();
            record_of(&child.name, &child, &state.ledger)
        };
        loop {
            let record = record.clone();
            match self.meta.run(move |store| store.settle(number, &record)).await {
                Ok(()) => break,
                // Its parent was closed meanwhile, and it with it.
                Err(MetaError::Unknown { .. }) => return Err(Error::new(Reason::Session, "")),
                Err(error @ MetaError::Gone) => return Err(not_kept(&error)),
                Err(error) => {
                    tracing::error!(session = %child.name, %error, "a fork can't be kept, and nobody is told of it before it is");
                    tokio::time::sleep(TRY_AGAIN).await;
                }
            }
        }
        let actions = {
            let mut state = child.lock();
            state.ledger.touch(self.now());
            state.ledger.start()
        };
        self.insert(&child);
        child.perform(self, actions);
        Ok(())
    }

    /// After a restart: what became of forks of whose end the coordinator before said nothing.
    pub(super) async fn settle_forks(self: &Arc<Self>, parent: &Arc<Session>) {
        let _alone = parent.alone.lock().await;
        let unborn = {
            let mut state = parent.lock();
            if !std::mem::take(&mut state.has_old_forks) {
                return;
            }
            let in_flight = match state.ledger.in_flight().map(|op| op.change) {
                Some(Change::Fork { child }) => Some(child),
                _ => None,
            };
            let last = state.ledger.last_op();
            if state.ledger.is_restarting() || (last.is_none() && state.ledger.next_seq() > 1) {
                // It isn't known yet.
                state.has_old_forks = true;
                return;
            }
            let mut unborn: Vec<u64> = state.forks.keys().copied().collect();
            // The ledger will say when it is applied.
            unborn.retain(|child| Some(*child) != in_flight);
            if let Some(answer) = last.map(|record| record.answer)
                && answer.child.is_some_and(|child| unborn.contains(&child))
            {
                unborn.retain(|child| Some(*child) != answer.child);
                state.bear(&answer, false);
            }
            unborn
        };
        parent.perform(self, Vec::new());
        for child in unborn {
            self.forget(parent, child).await;
        }
    }
}

impl Session {
    /// Waits until this child is a session, or will be none: whoever asks for its fork again is told of it no earlier than anybody else.
    pub(super) async fn wait_until_settled(&self, child: &SessionName) {
        loop {
            let settled = self.settled.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            if !self.lock().unsettled.contains(child) {
                return;
            }
            settled.await;
        }
    }
}

/// What has to be known of a session after a restart.
pub(super) fn record_of(name: &SessionName, session: &Session, ledger: &Ledger<Error>) -> SessionRecord {
    let shard = |(shard, pieces): (usize, &Arc<[attnd_plan::Piece]>)| ShardRecord {
        pieces: pieces.to_vec(),
        epoch: ledger.epoch(shard),
        members: ledger.members(shard).cloned().collect(),
    };
    SessionRecord {
        name: name.clone(),
        spec: session.spec.clone(),
        writer_epoch: ledger.writer_epoch(),
        shards: session.pieces.iter().enumerate().map(shard).collect(),
        parent: session.parent,
        pending: false,
        created: since_1970(),
    }
}

/// The time of people's clocks.
pub(super) fn since_1970() -> std::time::Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
