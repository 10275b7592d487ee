//! The beginning and the end of sessions.

use std::collections::BTreeMap;
use std::sync::Arc;

use attnd_plan::session::{Closed, Holder, Keeper, Ledger, PlacementError, SessionName, SessionSpec, place};
use attnd_wire::hold::{HoldAsk, HoldShard, ShardAt};
use attnd_wire::session::{Open, SessionDescription};
use attnd_wire::{Error, Reason, Surroundings};
use futures::future::join_all;
use tokio::sync::oneshot;

use super::session::Session;
use super::upkeep::{ask, link_to};
use super::{MAX_SESSIONS, Sessions};
use crate::coordinator::hold_link::HoldLink;
use crate::coordinator::membership_actor::{Candidate, Capacities};
use attnd_wire::join::SESSIONS;

/// The name of a session that is being opened, until it is open or not.
struct Reserved<'a> {
    sessions: &'a Sessions,
    name: SessionName,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.sessions.give_back(&self.name);
    }
}

impl Sessions {
    /// Opens a session, or finds one that is open.
    ///
    /// # Errors
    /// [`Reason::Session`] if there is none and no spec to make one of, [`Reason::SessionExists`] if there is another one,
    /// [`Reason::Placement`], [`Reason::NoWorkers`], and what workers refuse.
    pub(super) async fn open(self: &Arc<Self>, open: Open) -> Result<SessionDescription, Error> {
        let Open { name, spec, write } = open;
        let found = match &name {
            Some(name) => match (self.find(name), &spec) {
                (Ok(session), _) => Some(session),
                (Err(missing), None) => return Err(missing),
                (Err(_), Some(_)) => None,
            },
            None => None,
        };
        match (found, spec) {
            (Some(session), spec) => {
                if spec.is_some_and(|spec| spec != session.spec) {
                    return Err(Error::new(Reason::SessionExists, "parameters differ"));
                }
                if write {
                    let actions = session.lock().take_writer();
                    session.perform(self, actions);
                }
                Ok(session.describe(self, false))
            }
            (None, Some(spec)) => {
                // Workers hold what was begun, whoever waits for it: it is opened to the end, and closed again for want of use.
                let (sessions, (done, created)) = (Arc::clone(self), oneshot::channel());
                self.tasks.spawn(async move {
                    drop(done.send(sessions.create(name, &spec).await));
                });
                let gone = |_| Err(Error::new(Reason::Internal, "the task of an open died"));
                let session = created.await.unwrap_or_else(gone)?;
                Ok(session.describe(self, true))
            }
            (None, None) => Err(Error::new(Reason::SessionId, "1..64 of [A-Za-z0-9._-]")),
        }
    }

    /// Takes a name, that of a session which isn't there, or makes one; and a number. Both are given up by [`Self::give_back`].
    ///
    /// # Errors
    /// [`Reason::SessionExists`], [`Reason::Overloaded`].
    pub(super) fn reserve(&self, name: Option<SessionName>) -> Result<(SessionName, u64), Error> {
        let mut table = self.table();
        if table.open.len() + table.opening.len() >= MAX_SESSIONS {
            return Err(Error::new(Reason::Overloaded, format!("{MAX_SESSIONS} sessions")));
        }
        let name = match name {
            Some(name) => name,
            // Somebody may have chosen such a name, but not more of them than there are sessions.
            None => loop {
                table.last += 1;
                let made = made_name(self.term, table.last)?;
                if !table.open.contains_key(&made) && !table.opening.contains(&made) {
                    break made;
                }
            },
        };
        if table.open.contains_key(&name) || !table.opening.insert(name.clone()) {
            return Err(Error::new(Reason::SessionExists, ""));
        }
        Ok((name, new_number(&self.hub.surroundings)))
    }

    async fn create(
        self: &Arc<Self>,
        name: Option<SessionName>,
        spec: &SessionSpec,
    ) -> Result<Arc<Session>, Error> {
        let (name, number) = self.reserve(name)?;
        let reserved = Reserved { sessions: self, name };
        let candidates = self.keepers().await?;
        let keepers: Vec<Keeper> = candidates.iter().map(|candidate| candidate.keeper.clone()).collect();
        let placement = place(spec, &keepers).map_err(unplaced)?;
        tracing::debug!(session = %reserved.name, reason = %placement.reason, "a session is placed");
        let mut links: BTreeMap<Holder, Arc<HoldLink>> = BTreeMap::new();
        for holder in placement.shards.iter().flat_map(|shard| &shard.members) {
            if links.contains_key(holder) {
                continue;
            }
            let actor = candidates.iter().find(|candidate| candidate.keeper.holder == *holder);
            let link = match actor {
                Some(candidate) => link_to(&candidate.actor).await?,
                None => return Err(Error::new(Reason::Internal, "placed on a worker that isn't there")),
            };
            links.insert(holder.clone(), link);
        }
        let mut held = Vec::new();
        for (shard, placed) in placement.shards.iter().enumerate() {
            for link in placed.members.iter().filter_map(|holder| links.get(holder)) {
                let at = ShardAt { session: number, shard: shard as u32, epoch: 1 };
                let hold = HoldShard { at, spec: spec.clone(), pieces: placed.pieces.clone() };
                held.push((at, Arc::clone(link), ask(self.term, Arc::clone(link), HoldAsk::Hold(hold))));
            }
        }
        let asked: Vec<(ShardAt, Arc<HoldLink>)> =
            held.iter().map(|(at, link, _)| (*at, Arc::clone(link))).collect();
        let answers = join_all(held.into_iter().map(|(_, _, answer)| answer)).await;
        if let Some(error) = answers.into_iter().find_map(Result::err) {
            // What others hold by now is given back, whoever waits for it.
            for (at, link) in asked {
                self.tasks.spawn(release(self.term, link, at));
            }
            return Err(error);
        }
        let shards = placement.shards.iter().map(|shard| shard.members.clone()).collect();
        let ledger = Ledger::new(spec, shards, self.now());
        let pieces = placement.shards.into_iter().map(|shard| shard.pieces.into()).collect();
        let session =
            Arc::new(Session::new(number, reserved.name.clone(), spec.clone(), ledger, pieces, links));
        let mut table = self.table();
        table.closed.reopen(&session.name);
        table.open.insert(session.name.clone(), Arc::clone(&session));
        drop(table);
        Ok(session)
    }

    /// Workers that may get shards.
    async fn keepers(&self) -> Result<Vec<Candidate>, Error> {
        let gone = |_| Error::new(Reason::Internal, "the membership actor is gone");
        let candidates =
            self.hub.cluster.ask(Capacities { least_version: SESSIONS }).send().await.map_err(gone)?;
        if candidates.usable.is_empty() {
            return Err(Error::new(Reason::NoWorkers, "no worker is alive that holds sessions"));
        }
        Ok(candidates.usable)
    }

    /// Closes a session, and gives its memory back. Says whether it had been closed before.
    ///
    /// # Errors
    /// [`Reason::Session`] if there never was one.
    pub(super) async fn close(self: &Arc<Self>, name: &SessionName) -> Result<bool, Error> {
        let session = {
            let table = self.table();
            match (table.open.get(name), table.closed.look(name, self.now())) {
                (Some(session), _) => Arc::clone(session),
                (None, Some(_)) => return Ok(true),
                (None, None) => return Err(Error::new(Reason::Session, "")),
            }
        };
        // Behind whatever changes it.
        let place = {
            let _all_at_once = self.line_up();
            session.turns.line_up()?
        };
        let _turn = place.turn().await;
        self.end(&session, Closed::Released).await;
        Ok(false)
    }

    /// Forgets a session and has its shards released.
    pub(super) async fn end(self: &Arc<Self>, session: &Arc<Session>, how: Closed) {
        let mut releases = Vec::new();
        {
            let mut state = session.lock();
            if std::mem::replace(&mut state.is_closed, true) {
                return;
            }
            for shard in 0..state.ledger.shards() {
                let at = ShardAt {
                    session: session.number,
                    shard: shard as u32,
                    epoch: state.ledger.epoch(shard),
                };
                let links = state.ledger.holders(shard).filter_map(|holder| state.links.get(holder));
                releases.extend(links.map(|link| (at, Arc::clone(link))));
            }
        }
        {
            let mut table = self.table();
            table.open.remove(&session.name);
            table.closed.close(session.name.clone(), how, self.now());
        }
        // In a task: whoever asked may go, the memory must come back.
        let (done, all) = tokio::sync::oneshot::channel::<()>();
        let term = self.term;
        self.tasks.spawn(async move {
            join_all(releases.into_iter().map(|(at, link)| release(term, link, at))).await;
            drop(done);
        });
        all.await.ok();
    }

    /// The child of a session whose fork has been applied.
    pub(super) fn adopt(&self, parent: &Session, number: u64, name: SessionName) {
        let child = {
            let state = parent.lock();
            let ledger = state.ledger.fork(self.now());
            Session::new(
                number,
                name.clone(),
                parent.spec.clone(),
                ledger,
                parent.pieces.clone(),
                state.links.clone(),
            )
        };
        let mut table = self.table();
        table.closed.reopen(&name);
        table.opening.remove(&name);
        table.open.insert(name, Arc::new(child));
    }

    /// Gives a name back, of a session that is open now or that there will not be.
    pub(super) fn give_back(&self, name: &SessionName) {
        self.table().opening.remove(name);
    }
}

/// The refusal of a session that can't be placed.
fn unplaced(error: PlacementError) -> Error {
    match error {
        PlacementError::Spec(error) => error.into(),
        PlacementError::NoWorkers => Error::new(Reason::NoWorkers, error.to_string()),
        PlacementError::Domains { .. } | PlacementError::Workers { .. } => {
            Error::new(Reason::Placement, error.to_string())
        }
    }
}

async fn release(term: u64, link: Arc<HoldLink>, at: ShardAt) {
    if let Err(error) = ask(term, Arc::clone(&link), HoldAsk::Release(at)).await {
        tracing::debug!(worker = %link.holder.worker, ?at, %error, "a shard is not released");
    }
}

/// A name for a session that was given none.
fn made_name(term: u64, number: u64) -> Result<SessionName, Error> {
    SessionName::new(format!("session-{term:x}-{number}"))
        .map_err(|error| Error::new(Reason::SessionId, error.to_string()))
}

/// A number that no other session has, not even one of an earlier coordinator that a worker still holds: 0 is none.
fn new_number(surroundings: &Surroundings) -> u64 {
    surroundings.random().max(1)
}
