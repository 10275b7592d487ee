//! Mutations other than appends: cuts, forks, the end of all appends.

use std::sync::Arc;

use attnd_plan::session::{Ask, LedgerError, LedgerEvent, Op, Request};
use attnd_wire::hold::{HoldAsk, HoldShard, ShardAt, ShardChange, ShardOp, ShardState};
use attnd_wire::session::{Applied, Change, ChangeKind, digest};
use attnd_wire::{Error, Outcome, Reason};
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::oneshot;

use super::Sessions;
use super::patience::{MAX_TRIES, Patience, may_pass};
use super::session::{Begun, Session};
use super::turns::Place;
use super::upkeep::{ask, kind_of};
use crate::coordinator::hold_link::HoldLink;

/// A mutation that has its place.
pub(super) struct ChangeCall {
    session: Arc<Session>,
    change: Change,
    place: Place,
}

impl ChangeCall {
    /// Looks the session up and takes a place in its line.
    ///
    /// # Errors
    /// [`Reason::Session`] and the like; [`Reason::Overloaded`] if too many wait.
    pub(super) fn line_up(sessions: &Sessions, change: Change) -> Result<Self, Error> {
        let session = sessions.find(&change.session)?;
        let _all_at_once = sessions.line_up();
        let place = session.turns.line_up()?;
        Ok(Self { session, change, place })
    }

    /// Applies it.
    ///
    /// # Errors
    /// What the ledger refuses, and [`Reason::SessionExists`] for the name of a child that is taken.
    pub(super) async fn run(self, sessions: &Arc<Sessions>, patience: Patience) -> Result<Applied, Error> {
        let Self { session, change, place } = self;
        let turn = place.turn().await;
        // What has begun goes on whoever waits for it.
        let sessions = Arc::clone(sessions);
        let (done, applied) = oneshot::channel();
        sessions.tasks.clone().spawn(async move {
            let result = apply(&sessions, &session, change, patience).await;
            drop(turn);
            // Whoever asked may be gone.
            drop(done.send(result));
        });
        applied.await.unwrap_or_else(|_gone| Err(Error::new(Reason::Internal, "the task of a change died")))
    }
}

async fn apply(
    sessions: &Arc<Sessions>,
    session: &Arc<Session>,
    change: Change,
    patience: Patience,
) -> Result<Applied, Error> {
    let Change { mutation, kind, .. } = change;
    let (writer_epoch, seq) = (mutation.writer_epoch, mutation.op_seq);
    let request = |ask: Ask, content| Request { writer_epoch, seq, digest: ask.digest(content), ask };
    match kind {
        ChangeKind::Truncate { len } => {
            let ask = Ask::Truncate { len: usize::try_from(len).unwrap_or(usize::MAX) };
            settle(sessions, session, &request(ask, 0), patience).await
        }
        ChangeKind::Seal => settle(sessions, session, &request(Ask::Seal, 0), patience).await,
        ChangeKind::Fork { child } => {
            let (content, named) = (digest::of_child(child.as_ref()), child.clone());
            // The same fork may be one of the coordinator before, whose child has the name until it is known what became of it.
            sessions.settle_forks(session).await;
            if session.lock().has_old_forks {
                return Err(LedgerError::<Error>::Recovering { is_in_flight: false }.into());
            }
            let is_new = {
                let state = session.lock();
                // Of a fork that comes again the ledger knows the child.
                let is_new = state.ledger.next_seq() == seq && state.ledger.in_flight().is_none();
                if is_new {
                    state.ledger.check(writer_epoch, seq, &Ask::Fork { child: 1 }).map_err(Error::from)?;
                }
                is_new
            };
            let result = if is_new {
                let (_name, number) = sessions.conceive(session, child).await?;
                fork(sessions, session, &request(Ask::Fork { child: number }, content), number, patience)
                    .await
            } else {
                settle(sessions, session, &request(Ask::Fork { child: 1 }, content), patience).await
            };
            if let Ok(Applied { child: Some(child), .. }) = &result {
                session.wait_until_settled(child).await;
            }
            // The child of a fork that comes again may be gone by now, and its name forgotten.
            result.map(|applied| Applied { child: applied.child.clone().or(named), ..applied })
        }
    }
}

/// Empty shards of a child, wherever those of its parent are.
pub(super) fn rooms_for(parent: &Session, child: u64) -> Vec<(Arc<HoldLink>, HoldShard)> {
    let mut holds = Vec::new();
    for (shard, of_shard) in parent.view().shards.into_iter().enumerate() {
        for link in of_shard.links {
            let at = ShardAt { session: child, shard: shard as u32, epoch: 1 };
            let hold = HoldShard { at, spec: parent.spec.clone(), pieces: of_shard.pieces.to_vec() };
            holds.push((link, hold));
        }
    }
    holds
}

/// Forks for the first time: the child's name is taken, until it is known that there will be none.
async fn fork(
    sessions: &Arc<Sessions>,
    session: &Arc<Session>,
    request: &Request,
    number: u64,
    patience: Patience,
) -> Result<Applied, Error> {
    let holds = rooms_for(session, number);
    let held: Vec<_> = holds.iter().map(|(link, hold)| (hold.at, Arc::clone(link))).collect();
    // No replica may refuse a fork once it has begun, so room is asked for before; whoever is about to leave needs none.
    let counts = |error: &Error| !matches!(error.reason, Reason::Transport | Reason::Draining);
    if let Err(error) = sessions.hold(holds, counts).await {
        sessions.forget(session, number).await;
        return Err(error);
    }
    session.lock().rooms.entry(number).or_default().extend(held);
    let result = settle(sessions, session, request, patience).await;
    if result.is_err() {
        let will_be = {
            let state = session.lock();
            (state.is_forking(number) && state.closed.is_none()) || !state.forks.contains_key(&number)
        };
        // An outcome that isn't known yet is known later: then the child is there, with its name.
        if !will_be {
            sessions.forget(session, number).await;
        }
    }
    result
}

/// Applies it; again where a session that refuses it is whole in time.
async fn settle(
    sessions: &Arc<Sessions>,
    session: &Arc<Session>,
    request: &Request,
    mut patience: Patience,
) -> Result<Applied, Error> {
    let (mut tries, mut may_be_done) = (0, false);
    loop {
        let error = match attempt(sessions, session, request).await {
            Ok(applied) => return Ok(applied),
            Err(error) => error,
        };
        may_be_done |= error.outcome == Outcome::Unknown;
        let until = match tries < MAX_TRIES && may_pass(&error) {
            true => patience.until(session, sessions.patience),
            false => None,
        };
        tries += 1;
        let Request { writer_epoch, seq, ask, .. } = request;
        match until {
            Some(until) if session.becomes_writable(*writer_epoch, *seq, ask, until).await => {}
            // A refusal says nothing of what was begun before.
            _ if may_be_done && error.outcome == Outcome::NotExecuted => {
                return Err(error.with_outcome(Outcome::Unknown));
            }
            _ => return Err(error),
        }
    }
}

async fn attempt(
    sessions: &Arc<Sessions>,
    session: &Arc<Session>,
    request: &Request,
) -> Result<Applied, Error> {
    match session.begin(request, |_len| Ok(()))? {
        Begun::Replayed(applied) => Ok(applied),
        Begun::Started(op, mut answer) => {
            let mut sent = Box::pin(send(Arc::clone(sessions), Arc::clone(session), op));
            let settled = tokio::select! {
                biased;
                () = &mut sent => None,
                settled = &mut answer => Some(settled),
            };
            let settled = match settled {
                // The others are heard all the same.
                Some(settled) => {
                    sessions.tasks.spawn(sent);
                    settled
                }
                None => answer.await,
            };
            settled.unwrap_or_else(|_gone| Err(Error::new(Reason::Internal, "a ledger that says nothing")))
        }
    }
}

/// Sends an op without bytes to everybody who lacks it, and tells the ledger what each says.
async fn send(sessions: Arc<Sessions>, session: Arc<Session>, op: Op) {
    let Some(kind) = kind_of(&op) else { return };
    let view = session.view();
    let op_at = ShardOp { op_seq: op.seq, digest: op.digest, generation: view.generation };
    let mut asked = FuturesUnordered::new();
    for (shard, of_shard) in view.shards.iter().enumerate() {
        for link in of_shard.links.iter().filter(|link| of_shard.lack.contains(&link.holder)) {
            let change = ShardChange { at: of_shard.at, op: op_at, kind };
            let answer = ask(sessions.term, Arc::clone(link), HoldAsk::Change(change));
            let (link, epoch) = (Arc::clone(link), of_shard.at.epoch);
            asked.push(async move { (shard, epoch, link, answer.await) });
        }
    }
    while let Some((shard, epoch, link, answer)) = asked.next().await {
        tell(&sessions, &session, (shard, epoch), &link, &op, answer);
    }
}

/// Tells the ledger what a replica said of an op.
pub(super) fn tell(
    sessions: &Arc<Sessions>,
    session: &Arc<Session>,
    at: (usize, u64),
    link: &Arc<HoldLink>,
    op: &Op,
    answer: Result<ShardState, Error>,
) {
    match answer {
        Ok(state) => {
            let holder = link.holder.clone();
            let event = LedgerEvent::Applied { shard: at.0, holder, seq: op.seq, state: state.into() };
            session.handle(sessions, event);
        }
        Err(error) if error.reason == Reason::Transport => session.disconnected(sessions, link),
        Err(error) => session.refused(sessions, at, &link.holder, op, &error),
    }
}
