//! The beginning and the end of sessions.

use std::collections::BTreeMap;
use std::sync::Arc;

use attnd_plan::session::{
    Closed, Holder, Keeper, Ledger, LedgerError, PlacementError, SessionName, SessionSpec, place,
};
use attnd_wire::hold::{HoldAsk, HoldShard, ShardAt};
use attnd_wire::session::{Open, SessionDescription};
use attnd_wire::{Error, Reason};
use futures::future::join_all;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::births::{record_of, since_1970};
use super::session::{Session, SessionParts};
use super::upkeep::ask;
use super::{MAX_SESSIONS, Sessions, Table, not_kept};
use crate::coordinator::hold_link::HoldLink;
use crate::coordinator::membership_actor::{Candidate, Capacities};
use attnd_wire::join::SESSIONS;

/// The name and the number of a session that is being opened, until it is open or not.
struct Reserved {
    sessions: Arc<Sessions>,
    name: SessionName,
    number: Option<u64>,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.sessions.give_back(&self.name, self.number);
    }
}

/// Whose name it is.
enum Naming {
    Ours(Reserved),
    /// Somebody else opens a session of this name, until then.
    Theirs(CancellationToken),
}

impl Sessions {
    /// Opens a session, or finds one that is open.
    ///
    /// # Errors
    /// [`Reason::Session`] if there is none and no spec to make one of, [`Reason::SessionExists`] if there is another one,
    /// [`Reason::Placement`], [`Reason::NoWorkers`], and what workers refuse.
    pub(super) async fn open(self: &Arc<Self>, open: Open) -> Result<SessionDescription, Error> {
        let Open { name, spec, write } = open;
        let reserved = loop {
            let missing = match name.as_ref().map(|name| self.find(name)) {
                Some(Ok(session)) => return self.join(&session, spec.as_ref(), write).await,
                Some(Err(missing)) => missing,
                None => Error::new(Reason::SessionId, "1..64 of [A-Za-z0-9._-]"),
            };
            if spec.is_none() {
                return Err(missing);
            }
            match self.name_for_open(name.clone())? {
                Naming::Ours(reserved) => break reserved,
                // Perhaps the same request, whose answer got lost. Then it is there, or it can be opened.
                Naming::Theirs(ended) => ended.cancelled().await,
            }
        };
        let Some(spec) = spec else { return Err(Error::new(Reason::Internal, "a session of nothing")) };
        // Workers hold what was begun, whoever waits for it: it is opened to the end, and closed again for want of use.
        let (sessions, (done, created)) = (Arc::clone(self), oneshot::channel());
        self.tasks.spawn(async move {
            drop(done.send(sessions.create(reserved, &spec).await));
        });
        let gone = |_| Err(Error::new(Reason::Internal, "the task of an open died"));
        created.await.unwrap_or_else(gone)
    }

    /// Opens a session that is there.
    async fn join(
        self: &Arc<Self>,
        session: &Arc<Session>,
        spec: Option<&SessionSpec>,
        write: bool,
    ) -> Result<SessionDescription, Error> {
        if spec.is_some_and(|spec| *spec != session.spec) {
            return Err(Error::new(Reason::SessionExists, "parameters differ"));
        }
        let mut described = session.describe(self, false)?;
        if write {
            let epoch = session.become_writer(self).await?;
            // What the one before has under way has its end when this is answered, so nothing of that comes between.
            let place = {
                let _all_at_once = self.line_up();
                session.turns.line_up()?
            };
            drop(place.turn().await);
            // A cut or a fork that was left unfinished can't be taken back: it still comes.
            session.lock().ledger.check_settled()?;
            described = session.describe(self, false)?;
            // Somebody came meanwhile, whose number isn't for whoever came before.
            if described.writer_epoch != epoch {
                let current = described.writer_epoch;
                return Err(LedgerError::<Error>::WriterFenced { got: epoch, current }.into());
            }
        }
        Ok(described)
    }

    fn name_for_open(self: &Arc<Self>, name: Option<SessionName>) -> Result<Naming, Error> {
        let mut table = self.table();
        let being_opened = name.as_ref().and_then(|name| table.being_opened.get(name));
        if let Some(ended) = being_opened {
            return Ok(Naming::Theirs(ended.clone()));
        }
        let name = self.reserve_in(&mut table, name)?;
        table.being_opened.insert(name.clone(), CancellationToken::new());
        Ok(Naming::Ours(Reserved { sessions: Arc::clone(self), name, number: None }))
    }

    /// Takes a name, that of a session which isn't there, or makes one. It is given up by [`Self::give_back`].
    ///
    /// # Errors
    /// [`Reason::SessionExists`], [`Reason::Overloaded`].
    pub(super) fn reserve(&self, name: Option<SessionName>) -> Result<SessionName, Error> {
        self.reserve_in(&mut self.table(), name)
    }

    fn reserve_in(&self, table: &mut Table, name: Option<SessionName>) -> Result<SessionName, Error> {
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
        Ok(name)
    }

    async fn create(
        self: &Arc<Self>,
        mut reserved: Reserved,
        spec: &SessionSpec,
    ) -> Result<SessionDescription, Error> {
        let number = self.meta.run(|store| store.reserve_number()).await.map_err(|error| not_kept(&error))?;
        self.table().reserved.insert(number);
        reserved.number = Some(number);
        let candidates = self.keepers().await?;
        let keepers: Vec<Keeper> = candidates.iter().map(|candidate| candidate.keeper.clone()).collect();
        let placement = place(spec, &keepers).map_err(unplaced)?;
        tracing::debug!(session = %reserved.name, reason = %placement.reason, "a session is placed");
        let mut links: BTreeMap<Holder, Arc<HoldLink>> = BTreeMap::new();
        for holder in placement.shards.iter().flat_map(|shard| &shard.members) {
            if links.contains_key(holder) {
                continue;
            }
            let link = self.link_of(holder).await?;
            links.insert(holder.clone(), link);
        }
        let mut holds = Vec::new();
        for (shard, placed) in placement.shards.iter().enumerate() {
            for link in placed.members.iter().filter_map(|holder| links.get(holder)) {
                let at = ShardAt { session: number, shard: shard as u32, epoch: 1 };
                let hold = HoldShard { at, spec: spec.clone(), pieces: placed.pieces.clone() };
                holds.push((Arc::clone(link), hold));
            }
        }
        let held = holds.iter().map(|(link, hold)| (hold.at, Arc::clone(link))).collect();
        self.hold(holds, |_any| true).await?;
        let shards = placement.shards.iter().map(|shard| shard.members.clone()).collect();
        let ledger = Ledger::new(spec, shards, self.now());
        let pieces = placement.shards.into_iter().map(|shard| shard.pieces.into()).collect();
        let (name, spec) = (reserved.name.clone(), spec.clone());
        let session = Session::new(SessionParts { number, name, spec, ledger, pieces, links, parent: None });
        let record = record_of(&session.name, &session, &session.lock().ledger);
        if let Err(error) = self.meta.run(move |store| store.create_as(number, &record)).await {
            self.give_up(held);
            return Err(not_kept(&error));
        }
        let session = Arc::new(session);
        // As long as nobody else can become its writer.
        let description = session.describe(self, true)?;
        self.insert(&session);
        Ok(description)
    }

    /// Has empty shards held, all of them or none.
    ///
    /// # Errors
    /// What a worker refuses, if that `counts`.
    pub(super) async fn hold(
        &self,
        holds: Vec<(Arc<HoldLink>, HoldShard)>,
        counts: impl Fn(&Error) -> bool,
    ) -> Result<(), Error> {
        let asked: Vec<(ShardAt, Arc<HoldLink>)> =
            holds.iter().map(|(link, hold)| (hold.at, Arc::clone(link))).collect();
        let answers = holds.into_iter().map(|(link, hold)| ask(self.term, link, HoldAsk::Hold(hold)));
        let refused = join_all(answers).await.into_iter().filter_map(Result::err);
        let Some(error) = refused.into_iter().find(counts) else { return Ok(()) };
        // What others hold by now is given back, whoever waits for it.
        self.give_up(asked);
        Err(error)
    }

    /// Has shards released that nobody uses.
    pub(super) fn give_up(&self, shards: Vec<(ShardAt, Arc<HoldLink>)>) {
        for (at, link) in shards {
            self.tasks.spawn(release(self.term, link, at));
        }
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
        let found = {
            let table = self.table();
            match (table.open.get(name), table.closed.look(name, self.now())) {
                (Some(session), _) => Some(Arc::clone(session)),
                (None, Some(_)) => return Ok(true),
                (None, None) => None,
            }
        };
        let Some(session) = found else {
            // The coordinator before may have closed it.
            let name = name.clone();
            let was_closed = self.meta.run(move |store| store.was_closed(name.as_str(), since_1970())).await;
            return match was_closed {
                Ok(true) => Ok(true),
                Ok(false) => Err(Error::new(Reason::Session, "")),
                Err(error) => Err(not_kept(&error)),
            };
        };
        // Behind whatever changes it.
        let place = {
            let _all_at_once = self.line_up();
            session.turns.line_up()?
        };
        let _turn = place.turn().await;
        self.end(&session, Closed::Released).await?;
        Ok(false)
    }

    /// Forgets a session and has its shards released. One that expired stays if somebody has asked for it meanwhile.
    ///
    /// # Errors
    /// [`Reason::StateStore`]: it is as it was then.
    pub(super) async fn end(self: &Arc<Self>, session: &Arc<Session>, how: Closed) -> Result<(), Error> {
        {
            let mut state = session.lock();
            let is_used = how == Closed::Expired && !session.is_expired(&state, self.now());
            if state.closed.is_some() || is_used {
                return Ok(());
            }
            state.closed = Some(how);
        }
        session.changed.notify_waiters();
        // In a task: whoever asked may go, and what is marked as closed has to come to its end.
        let (done, ended) = oneshot::channel();
        let (sessions, session) = (Arc::clone(self), Arc::clone(session));
        self.tasks.spawn(async move {
            drop(done.send(sessions.finish(&session, how).await));
        });
        ended.await.unwrap_or_else(|_gone| Err(Error::new(Reason::Internal, "the task of a close died")))
    }

    /// What is left to do of a session that is marked as closed.
    async fn finish(self: &Arc<Self>, session: &Arc<Session>, how: Closed) -> Result<(), Error> {
        let (number, now) = (session.number, since_1970());
        if let Err(error) = self.meta.run(move |store| store.remove(number, now)).await {
            session.lock().closed = None;
            return Err(not_kept(&error));
        }
        let mut releases = Vec::new();
        let forks: Vec<u64> = {
            let state = session.lock();
            for shard in 0..state.ledger.shards() {
                let at = ShardAt {
                    session: session.number,
                    shard: shard as u32,
                    epoch: state.ledger.epoch(shard),
                };
                let links = state.ledger.holders(shard).filter_map(|holder| state.links.get(holder));
                releases.extend(links.map(|link| (at, Arc::clone(link))));
            }
            // Under the session's lock: whoever finds it closed finds here how.
            let mut table = self.table();
            table.open.remove(&session.name);
            table.by_number.remove(&session.number);
            table.closed.close(session.name.clone(), how, self.now());
            state.forks.keys().copied().collect()
        };
        for child in forks {
            self.forget(session, child).await;
        }
        let parent = session.parent.and_then(|parent| self.table().by_number.get(&parent).cloned());
        if let Some(parent) = parent {
            parent.lock().children.remove(&number);
        }
        tracing::trace!(session = number, ?how, releases = releases.len(), "a session is closed");
        join_all(releases.into_iter().map(|(at, link)| release(self.term, link, at))).await;
        Ok(())
    }

    /// Gives a name and a number back, of a session that is open now or that there will not be.
    pub(super) fn give_back(&self, name: &SessionName, number: Option<u64>) {
        let mut table = self.table();
        table.opening.remove(name);
        let ended = table.being_opened.remove(name);
        if let Some(number) = number {
            table.reserved.remove(&number);
        }
        drop(table);
        if let Some(ended) = ended {
            ended.cancel();
        }
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

pub(super) async fn release(term: u64, link: Arc<HoldLink>, at: ShardAt) {
    if let Err(error) = ask(term, Arc::clone(&link), HoldAsk::Release(at)).await {
        tracing::debug!(worker = %link.holder.worker, ?at, %error, "a shard is not released");
    }
}

/// A name for a session that was given none.
fn made_name(term: u64, number: u64) -> Result<SessionName, Error> {
    SessionName::new(format!("session-{term:x}-{number}"))
        .map_err(|error| Error::new(Reason::SessionId, error.to_string()))
}
