//! Mutations other than appends: cuts, forks, the end of all appends.

use std::sync::Arc;

use attnd_plan::session::{Ask, LedgerEvent, Op, Request, SessionName};
use attnd_wire::hold::{HoldAsk, ShardChange, ShardOp, ShardState};
use attnd_wire::session::{Applied, Change, ChangeKind, digest};
use attnd_wire::{Error, Reason};
use futures::future::join_all;
use tokio::sync::oneshot;

use super::Sessions;
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
    pub(super) async fn run(self, sessions: &Arc<Sessions>) -> Result<Applied, Error> {
        let Self { session, change, place } = self;
        let turn = place.turn().await;
        // What has begun goes on whoever waits for it.
        let sessions = Arc::clone(sessions);
        let (done, applied) = oneshot::channel();
        sessions.tasks.clone().spawn(async move {
            let result = apply(&sessions, &session, change).await;
            drop(turn);
            // Whoever asked may be gone.
            drop(done.send(result));
        });
        applied.await.unwrap_or_else(|_gone| Err(Error::new(Reason::Internal, "the task of a change died")))
    }
}

async fn apply(sessions: &Arc<Sessions>, session: &Arc<Session>, change: Change) -> Result<Applied, Error> {
    let Change { mutation, kind, .. } = change;
    let seq = mutation.op_seq;
    let is_new = {
        let state = session.lock();
        seq == state.ledger.next_seq() && state.ledger.in_flight().is_none()
    };
    let named = match &kind {
        ChangeKind::Fork { child } => child.clone(),
        ChangeKind::Truncate { .. } | ChangeKind::Seal => None,
    };
    let (ask, content, child) = match kind {
        ChangeKind::Truncate { len } => {
            (Ask::Truncate { len: usize::try_from(len).unwrap_or(usize::MAX) }, 0, None)
        }
        ChangeKind::Seal => (Ask::Seal, 0, None),
        ChangeKind::Fork { child: name } => {
            let content = digest::of_child(name.as_ref());
            // Of a fork that comes again the ledger knows the child.
            let child = if is_new { Some(sessions.conceive(session, name).await?) } else { None };
            (Ask::Fork { child: child.as_ref().map_or(1, |(_, number)| *number) }, content, child)
        }
    };
    let result = settle(sessions, session, mutation.writer_epoch, seq, ask, content, child.as_ref()).await;
    if let (Err(_), Some((_, number))) = (&result, child) {
        let is_in_flight = session.lock().ledger.in_flight().is_some_and(|op| op.seq == seq);
        // Otherwise it comes about later, whoever waits.
        if !is_in_flight {
            sessions.forget(session, number).await;
        }
    }
    // The child of a fork that comes again may be gone by now, and its name forgotten.
    result.map(|applied| Applied { child: applied.child.clone().or(named), ..applied })
}

async fn settle(
    sessions: &Arc<Sessions>,
    session: &Arc<Session>,
    writer_epoch: u64,
    seq: u64,
    ask: Ask,
    content: u32,
    child: Option<&(SessionName, u64)>,
) -> Result<Applied, Error> {
    let request = Request { writer_epoch, seq, digest: ask.digest(content), ask };
    if let Some((name, number)) = child {
        session.lock().children.insert(*number, name.clone());
    }
    match session.begin(&request, |_len| Ok(()))? {
        Begun::Replayed(applied) => Ok(applied),
        Begun::Started(op, answer) => {
            send(sessions, session, &op).await;
            let gone = |_| Err(Error::new(Reason::Internal, "a ledger that says nothing"));
            answer.await.unwrap_or_else(gone)
        }
    }
}

/// Sends an op without bytes to everybody who lacks it.
async fn send(sessions: &Arc<Sessions>, session: &Arc<Session>, op: &Op) {
    let Some(kind) = kind_of(op) else { return };
    let view = session.view();
    let op_at = ShardOp { op_seq: op.seq, digest: op.digest, generation: view.generation };
    let mut asked = Vec::new();
    for (shard, of_shard) in view.shards.iter().enumerate() {
        for link in of_shard.links.iter().filter(|link| of_shard.lack.contains(&link.holder)) {
            let change = ShardChange { at: of_shard.at, op: op_at, kind };
            let answer = ask(sessions.term, Arc::clone(link), HoldAsk::Change(change));
            let link = Arc::clone(link);
            asked.push(async move { (shard, of_shard.at.epoch, link, answer.await) });
        }
    }
    for (shard, epoch, link, answer) in join_all(asked).await {
        tell(sessions, session, (shard, epoch), &link, op, answer);
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
