//! What ledgers want done beside answering: ops taken back, replicas fenced and released; and what happens to sessions by itself, when
//! workers die and time passes.

use std::sync::Arc;
use std::time::Duration;

use attnd_plan::session::{Closed, Holder, LedgerAction, LedgerEvent};
use attnd_wire::hold::{
    HoldAnswer, HoldAsk, HoldReply, HoldRequest, ShardAt, ShardChange, ShardChangeKind, ShardOp,
    ShardRecords, ShardState,
};
use attnd_wire::{Error, Reason, proto};
use kameo::actor::ActorRef;

use super::Sessions;
use super::session::Session;
use crate::coordinator::hold_link::{HoldLink, Parts};
use crate::coordinator::worker_actor::{OpenLink, WorkerActor};

/// How often sessions are looked through for links that broke and time that passed.
const ROUND: Duration = Duration::from_millis(200);
/// Time until a worker that has no room for a request is asked again.
const REFUSED: Duration = Duration::from_millis(200);

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
        Some(_) | None => Err(Error::new(Reason::ReplyInvalid, "no state of a replica")),
    }
}

/// The ops that a replica remembers, and its state.
///
/// # Errors
/// What the worker says, or why its stream ended.
async fn recall(term: u64, link: &HoldLink, at: ShardAt) -> Result<ShardRecords, Error> {
    let parts = link.control.ask(term, encode(HoldAsk::Recall(at))?).await?.parts().await?;
    let last = parts.into_iter().next_back().map(HoldReply::try_from).transpose()?;
    match last.map(|reply| reply.answer) {
        Some(HoldAnswer::Records(records)) => Ok(records),
        Some(HoldAnswer::Failed(error)) => Err(error),
        Some(_) | None => Err(Error::new(Reason::ReplyInvalid, "no records of a replica")),
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
                let (term, upload) = (self.term, session.lock().upload_to(shard, &holder));
                // Its chunks take another way, on which they may still be: nothing of them may come behind.
                let before = async move {
                    if let Some((link, request)) = upload {
                        link.bulk.give_up(request, term).await;
                    }
                };
                let event = move |holder, answer: Result<ShardState, Error>| match answer {
                    Ok(state) => LedgerEvent::Undone { shard, holder, seq, state: state.into() },
                    Err(why) => LedgerEvent::Refused { shard, holder, epoch, seq, is_final: false, why },
                };
                self.tell_behind(before, &session, &holder, HoldAsk::Change(change), event);
            }
            LedgerAction::Fence { shard, holder, epoch } => {
                self.fence(&session, shard, holder, epoch);
            }
            LedgerAction::SaveMembers { shard, epoch, members } => {
                self.saves.add(&session, shard, epoch, members);
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
            LedgerAction::AskRecords { shard, holder, epoch } => {
                self.ask_records(&session, shard, holder, epoch);
            }
        }
    }

    /// Tells a replica that it is of this epoch, until it has heard it or that is of no use any more.
    fn fence(self: &Arc<Self>, session: &Arc<Session>, shard: usize, holder: Holder, epoch: u64) {
        let at = ShardAt { session: session.number, shard: shard as u32, epoch };
        let Some(link) = self.link_in(session, &holder) else { return };
        let (sessions, session) = (Arc::clone(self), Arc::clone(session));
        self.tasks.spawn(async move {
            let term = sessions.term;
            loop {
                let answer = match ask(term, Arc::clone(&link), HoldAsk::Fence(at)).await {
                    // Which one it has, it says elsewhere.
                    Err(error) if error.reason == Reason::Epoch => recall(term, &link, at).await.map(Err),
                    answer => answer.map(Ok),
                };
                let error = match answer {
                    Ok(Ok(state)) => {
                        let state = state.into();
                        return session.handle(&sessions, LedgerEvent::Fenced { shard, holder, state });
                    }
                    Ok(Err(ShardRecords { state, .. })) if state.epoch > epoch => {
                        let epoch = state.epoch;
                        return session.handle(&sessions, LedgerEvent::FenceRefused { shard, holder, epoch });
                    }
                    Ok(Err(_)) => continue,
                    Err(error) => error,
                };
                if !sessions.may_ask_again(&session, &link, (shard, epoch), &error).await {
                    return;
                }
            }
        });
    }

    /// Asks a replica for the ops before this coordinator, until it has said them or can't.
    fn ask_records(self: &Arc<Self>, session: &Arc<Session>, shard: usize, holder: Holder, epoch: u64) {
        let at = ShardAt { session: session.number, shard: shard as u32, epoch };
        let Some(link) = self.link_in(session, &holder) else { return };
        let (sessions, session) = (Arc::clone(self), Arc::clone(session));
        self.tasks.spawn(async move {
            loop {
                let error = match recall(sessions.term, &link, at).await {
                    Ok(ShardRecords { records, .. }) => {
                        return session.handle(&sessions, LedgerEvent::Records(records));
                    }
                    Err(error) => error,
                };
                if !sessions.may_ask_again(&session, &link, (shard, epoch), &error).await {
                    return;
                }
            }
        });
    }

    /// The link to a holder, if there is one; the ledger is told if not.
    fn link_in(self: &Arc<Self>, session: &Arc<Session>, holder: &Holder) -> Option<Arc<HoldLink>> {
        let link = session.lock().links.get(holder).cloned();
        if link.is_none() {
            session.handle(self, LedgerEvent::Disconnected(holder.clone()));
        }
        link
    }

    /// Whether what a worker refused may be asked again, which it is after a pause; the ledger is told if not.
    async fn may_ask_again(
        self: &Arc<Self>,
        session: &Arc<Session>,
        link: &Arc<HoldLink>,
        (shard, epoch): (usize, u64),
        error: &Error,
    ) -> bool {
        let holder = link.holder.clone();
        tracing::debug!(session = %session.name, shard, worker = %holder.worker, %error, "a replica refuses");
        match error.reason {
            Reason::Transport => session.disconnected(self, link),
            Reason::Shard => session.handle(self, LedgerEvent::Gone { shard, holder, epoch }),
            // It is about to go, or another coordinator has it: until it is gone, nobody can say what it has.
            Reason::Draining | Reason::Fenced => {
                session.handle(self, LedgerEvent::Disconnected(holder));
            }
            Reason::Overloaded | Reason::Internal => {
                tokio::time::sleep(REFUSED).await;
                let state = session.lock();
                return state.closed.is_none() && state.ledger.epoch(shard) == epoch;
            }
            _other => {
                tracing::error!(session = %session.name, shard, worker = %link.holder.worker, %error, "a replica makes no sense");
                session.handle(self, LedgerEvent::Gone { shard, holder, epoch });
            }
        }
        false
    }

    /// Asks a holder for something, and tells the ledger what came of it.
    fn tell(
        self: &Arc<Self>,
        session: &Arc<Session>,
        holder: &Holder,
        what: HoldAsk,
        event: impl FnOnce(Holder, Result<ShardState, Error>) -> LedgerEvent<Error> + Send + 'static,
    ) {
        self.tell_behind(async {}, session, holder, what, event);
    }

    /// The same as soon as something else has come about.
    fn tell_behind(
        self: &Arc<Self>,
        before: impl Future<Output = ()> + Send + 'static,
        session: &Arc<Session>,
        holder: &Holder,
        what: HoldAsk,
        event: impl FnOnce(Holder, Result<ShardState, Error>) -> LedgerEvent<Error> + Send + 'static,
    ) {
        let Some(link) = self.link_in(session, holder) else { return };
        let (sessions, session, holder) = (Arc::clone(self), Arc::clone(session), holder.clone());
        self.tasks.spawn(async move {
            before.await;
            match ask(sessions.term, Arc::clone(&link), what).await {
                Err(error) if error.reason == Reason::Transport => session.disconnected(&sessions, &link),
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

/// Looks through all sessions, for ever: what they missed of links and forks, whether anybody uses them, and which replicas are to be made or
/// moved.
pub(crate) async fn watch(sessions: Arc<Sessions>) {
    let mut rounds = tokio::time::interval(ROUND);
    rounds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        rounds.tick().await;
        let open = sessions.open_sessions();
        for session in &open {
            session.reconcile(&sessions);
            let (is_expired, has_old_forks) = {
                let state = session.lock();
                (session.is_expired(&state, sessions.now()) && state.closed.is_none(), state.has_old_forks)
            };
            if has_old_forks {
                let (sessions, session) = (Arc::clone(&sessions), Arc::clone(session));
                sessions.tasks.clone().spawn(async move { sessions.settle_forks(&session).await });
            }
            if is_expired {
                tracing::info!(session = %session.name, "nobody uses a session: it is closed");
                let (sessions, session) = (Arc::clone(&sessions), Arc::clone(session));
                sessions.tasks.clone().spawn(async move {
                    if let Err(error) = sessions.end(&session, Closed::Expired).await {
                        tracing::error!(session = %session.name, %error, "a session can't be closed");
                    }
                });
            }
        }
        sessions.mend(&open).await;
    }
}
