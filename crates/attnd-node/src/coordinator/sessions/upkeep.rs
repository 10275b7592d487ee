//! What ledgers want done beside answering: ops taken back, replicas fenced and released; and what happens to sessions by itself, when
//! workers die and time passes.

use std::sync::Arc;
use std::time::Duration;

use attnd_plan::session::{Closed, Holder, LedgerAction, LedgerEvent};
use attnd_wire::hold::{
    HoldAnswer, HoldAsk, HoldReply, HoldRequest, ShardAt, ShardChange, ShardChangeKind, ShardOp, ShardState,
};
use attnd_wire::{Error, Reason, proto};
use kameo::actor::ActorRef;

use super::Sessions;
use super::session::Session;
use crate::coordinator::hold_link::{HoldLink, Parts};
use crate::coordinator::worker_actor::{OpenLink, WorkerActor};

/// How often sessions are looked through for links that broke and time that passed.
const ROUND: Duration = Duration::from_millis(200);

/// The streams to a worker.
///
/// # Errors
/// [`Reason::Transport`] if it is gone.
pub(super) async fn link_to(actor: &ActorRef<WorkerActor>) -> Result<Arc<HoldLink>, Error> {
    let gone = |_| Error::new(Reason::Transport, "the worker is gone");
    actor.ask(OpenLink).send().await.map_err(gone)
}

/// As it goes into a message.
pub(super) fn encode(ask: HoldAsk) -> Result<proto::hold_request::Ask, Error> {
    let request = proto::HoldRequest::from(HoldRequest { request: 0, term: 0, ask });
    request.ask.ok_or_else(|| Error::new(Reason::Internal, "a request for nothing"))
}

/// Asks for something that is answered by a replica's state.
///
/// # Errors
/// What the worker says, or why its stream ended.
pub(super) async fn ask(term: u64, link: Arc<HoldLink>, ask: HoldAsk) -> Result<ShardState, Error> {
    state_of(link.control.ask(term, encode(ask)?).await?.parts().await?)
}

/// The state that is the answer.
///
/// # Errors
/// What the worker says, and [`Reason::ReplyInvalid`].
pub(super) fn state_of(parts: Parts) -> Result<ShardState, Error> {
    let last = parts.into_iter().next_back().map(HoldReply::try_from).transpose()?;
    match last.map(|reply| reply.answer) {
        Some(HoldAnswer::State(state)) => Ok(state),
        Some(HoldAnswer::Failed(error)) => Err(error),
        _other => Err(Error::new(Reason::ReplyInvalid, "no state of a replica")),
    }
}

impl Sessions {
    /// Does what a ledger says, in a task whose end is an event.
    pub(super) fn upkeep(self: &Arc<Self>, session: &Arc<Session>, action: LedgerAction<Error>) {
        let (sessions, session) = (Arc::clone(self), Arc::clone(session));
        let at = |shard: usize, epoch: u64| ShardAt { session: session.number, shard: shard as u32, epoch };
        match action {
            // Said where it is heard.
            LedgerAction::Answer { .. } => {}
            LedgerAction::Send { shard, holder, epoch, generation, op } => {
                let Some(kind) = kind_of(&op) else {
                    // Its bytes went to whoever was there, and are nobody's any more: the client has them.
                    let why = Error::new(Reason::WorkerLost, "a replica lacks the rows, send them again");
                    session.handle(&sessions, LedgerEvent::Abandoned { seq: op.seq, why });
                    return;
                };
                let op_at = ShardOp { op_seq: op.seq, digest: op.digest, generation };
                let change = ShardChange { at: at(shard, epoch), op: op_at, kind };
                self.tell(&session, &holder, HoldAsk::Change(change), move |holder, answer| match answer {
                    Ok(state) => LedgerEvent::Applied { shard, holder, seq: op.seq, state: state.into() },
                    Err(why) => {
                        LedgerEvent::Refused { shard, holder, epoch, seq: op.seq, is_final: false, why }
                    }
                });
            }
            LedgerAction::Undo { shard, holder, epoch, seq, digest } => {
                let op = ShardOp { op_seq: seq, digest, generation: session.lock().ledger.generation() };
                let change = ShardChange { at: at(shard, epoch), op, kind: ShardChangeKind::Undo };
                self.tell(&session, &holder, HoldAsk::Change(change), move |holder, answer| match answer {
                    Ok(state) => LedgerEvent::Undone { shard, holder, seq, state: state.into() },
                    Err(why) => LedgerEvent::Refused { shard, holder, epoch, seq, is_final: false, why },
                });
            }
            LedgerAction::Fence { shard, holder, epoch } => {
                self.tell(&session, &holder, HoldAsk::Fence(at(shard, epoch)), move |holder, answer| {
                    match answer {
                        Ok(state) => LedgerEvent::Fenced { shard, holder, state: state.into() },
                        Err(_refused) => LedgerEvent::Lost(holder),
                    }
                });
            }
            LedgerAction::SaveMembers { shard, epoch, .. } => {
                // A coordinator without a durable store has nothing to write.
                session.handle(&sessions, LedgerEvent::Saved { shard, epoch });
            }
            LedgerAction::Release { shard, holder, epoch } => {
                let link = session.lock().links.get(&holder).cloned();
                let (term, at) = (self.term, at(shard, epoch));
                if let Some(link) = link {
                    self.tasks.spawn(async move {
                        if let Err(error) = ask(term, link, HoldAsk::Release(at)).await {
                            tracing::debug!(?at, %error, "a shard is not released");
                        }
                    });
                }
            }
            LedgerAction::Copy { shard, from, to, epoch } => {
                self.begin_copy(&session, shard, (from, to), epoch);
            }
            LedgerAction::NeedReplica { shard, missing } => {
                tracing::info!(session = %session.name, shard, missing, "a shard has fewer replicas than it should");
                self.begin_repair(&session);
            }
            LedgerAction::AskRecords { .. } => {}
        }
    }

    /// Asks a holder for something, and tells the ledger what came of it.
    fn tell(
        self: &Arc<Self>,
        session: &Arc<Session>,
        holder: &Holder,
        what: HoldAsk,
        event: impl FnOnce(Holder, Result<ShardState, Error>) -> LedgerEvent<Error> + Send + 'static,
    ) {
        let link = session.lock().links.get(holder).cloned();
        let (sessions, session, holder) = (Arc::clone(self), Arc::clone(session), holder.clone());
        let Some(link) = link else {
            session.handle(&sessions, LedgerEvent::Lost(holder));
            return;
        };
        self.tasks.spawn(async move {
            match ask(sessions.term, Arc::clone(&link), what).await {
                Err(error) if error.reason == Reason::Transport => session.lost(&sessions, &link),
                answer => session.handle(&sessions, event(holder, answer)),
            }
        });
    }
}

/// What is asked of a worker for an op that has no bytes.
pub(super) fn kind_of(op: &attnd_plan::session::Op) -> Option<ShardChangeKind> {
    use attnd_plan::session::Change;
    match op.change {
        Change::Append { .. } => None,
        Change::Truncate { len } => Some(ShardChangeKind::Truncate { len }),
        Change::Fork { child } => Some(ShardChangeKind::Fork { child }),
        Change::Seal => Some(ShardChangeKind::Seal),
    }
}

/// Looks through all sessions, for ever: tells ledgers of streams that ended, closes sessions that nobody uses, and has replicas made and
/// moved.
pub(crate) async fn watch(sessions: Arc<Sessions>) {
    let mut rounds = tokio::time::interval(ROUND);
    rounds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        rounds.tick().await;
        let open: Vec<Arc<Session>> = sessions.table().open.values().cloned().collect();
        for session in &open {
            let (lost, is_expired) = {
                let state = session.lock();
                let lost: Vec<Arc<HoldLink>> =
                    state.links.values().filter(|link| link.is_lost()).cloned().collect();
                (lost, state.ledger.is_expired(sessions.now()) && state.ledger.in_flight().is_none())
            };
            for link in lost {
                session.lost(&sessions, &link);
            }
            if is_expired {
                tracing::info!(session = %session.name, "nobody uses a session: it is closed");
                let (sessions, session) = (Arc::clone(&sessions), Arc::clone(session));
                sessions.tasks.clone().spawn(async move { sessions.end(&session, Closed::Expired).await });
            }
        }
        sessions.mend(&open).await;
    }
}
