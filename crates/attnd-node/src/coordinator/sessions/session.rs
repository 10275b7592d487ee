//! One session on the coordinator: its ledger, the links to its holders, and the line of those who want to change it.
//!
//! The ledger decides, under a lock that is held for a few steps and never across an await. What it wants done besides answering runs in
//! tasks (`upkeep.rs`), whose ends are events again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use attnd_plan::Piece;
use attnd_plan::session::{
    Ask, Begun as LedgerBegun, Holder, Ledger, LedgerAction, LedgerEvent, Op, Phase, Read, ReadRequest,
    Request, SessionName, SessionSpec,
};
use attnd_wire::hold::{ShardAt, ShardState};
use attnd_wire::session::{Applied, SessionDescription, ShardDescription, ShardHealth, StepQueries};
use attnd_wire::{Error, Reason};
use tokio::sync::oneshot;

use super::Sessions;
use super::repair::Repair;
use super::turns::Turns;
use crate::coordinator::hold_link::HoldLink;

/// A session.
#[derive(Debug)]
pub(crate) struct Session {
    /// No other session ever has it.
    pub(super) number: u64,
    pub(super) name: SessionName,
    pub(super) spec: SessionSpec,
    /// What each shard is.
    pub(super) pieces: Vec<Arc<[Piece]>>,
    pub(super) turns: Arc<Turns>,
    state: Mutex<State>,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) ledger: Ledger<Error>,
    /// Of every holder that can be reached.
    pub(super) links: BTreeMap<Holder, Arc<HoldLink>>,
    /// Who waits for the op in flight.
    waits: Option<oneshot::Sender<Result<Applied, Error>>>,
    /// Names of children, by number.
    pub(super) children: BTreeMap<u64, SessionName>,
    /// What is known about replicas that are missing, or to be elsewhere.
    pub(super) repair: Repair,
    /// It is being closed: nothing begins any more.
    pub(super) is_closed: bool,
}

/// What becomes of a mutation.
pub(super) enum Begun {
    /// It is in flight: send it to everybody who lacks it. The answer comes by itself.
    Started(Op, oneshot::Receiver<Result<Applied, Error>>),
    /// It was applied before.
    Replayed(Applied),
}

/// Who holds a session now.
pub(super) struct ShardView {
    pub(super) generation: u64,
    pub(super) shards: Vec<ShardOf>,
}

/// Who holds one shard.
pub(super) struct ShardOf {
    pub(super) at: ShardAt,
    pub(super) pieces: Arc<[Piece]>,
    /// Members that can be reached; the first computes.
    pub(super) links: Vec<Arc<HoldLink>>,
    /// Members that lack the op in flight.
    pub(super) lack: Vec<Holder>,
}

impl Session {
    pub(super) fn new(
        number: u64,
        name: SessionName,
        spec: SessionSpec,
        ledger: Ledger<Error>,
        pieces: Vec<Arc<[Piece]>>,
        links: BTreeMap<Holder, Arc<HoldLink>>,
    ) -> Self {
        let (waits, children, repair, is_closed) = (None, BTreeMap::new(), Repair::default(), false);
        let state = State { ledger, links, waits, children, repair, is_closed };
        Self { number, name, spec, pieces, turns: Arc::default(), state: Mutex::new(state) }
    }

    /// No critical section can panic half-way but in the ledger, which then is as it was or broken; either way it is what there is.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a mutation. `check` says, for the tokens that a layer has after an append, whether what shall follow makes sense.
    ///
    /// # Errors
    /// What the ledger refuses, and what `check` says.
    pub(super) fn begin(
        &self,
        request: &Request,
        check: impl FnOnce(usize) -> Result<(), Error>,
    ) -> Result<Begun, Error> {
        let mut state = self.lock();
        if state.is_closed {
            return Err(Error::new(Reason::Session, ""));
        }
        if let Ask::Append { layer, base_len, tokens } = request.ask {
            let have = state.ledger.tokens().get(layer).copied().unwrap_or(0);
            // A request that comes again may be for what the layer had then: the ledger knows.
            if base_len.is_none_or(|base_len| base_len == have) && request.seq == state.ledger.next_seq() {
                state.ledger.check(request.writer_epoch, request.seq, &request.ask).map_err(Error::from)?;
                check(have.saturating_add(tokens))?;
            }
        }
        match state.ledger.begin(request).map_err(Error::from)? {
            LedgerBegun::Replayed(answer) => {
                let applied = state.applied(answer, true);
                Ok(Begun::Replayed(applied))
            }
            LedgerBegun::Started(op) | LedgerBegun::Resumed(op) => {
                let (waits, answer) = oneshot::channel();
                state.waits = Some(waits);
                Ok(Begun::Started(op, answer))
            }
        }
    }

    /// What queries look at, behind the append of their own step if there is one.
    ///
    /// # Errors
    /// What the ledger refuses.
    pub(super) fn read(&self, layer: usize, queries: &StepQueries, after: After) -> Result<Read, Error> {
        let state = self.lock();
        if state.is_closed {
            return Err(Error::new(Reason::Session, ""));
        }
        let tokens = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let (at_len, after) = match after {
            After::Nothing => (queries.at_len.map(tokens), None),
            After::Op(op) => (queries.at_len.map(tokens), Some(op)),
            // A step that comes again looks at what it looked at then, unless it says otherwise.
            After::Replayed(len) => (Some(tokens(queries.at_len.unwrap_or(len))), None),
        };
        let (generation, min_len) = (queries.generation, tokens(queries.min_len));
        let request = ReadRequest { layer, at_len, generation, min_len, after };
        state.ledger.check_read(&request).map_err(Error::from)
    }

    /// Who holds the session now.
    pub(super) fn view(&self) -> ShardView {
        let state = self.lock();
        let mut shards: Vec<ShardOf> = Vec::with_capacity(self.pieces.len());
        for (shard, pieces) in self.pieces.iter().enumerate() {
            let ledger = &state.ledger;
            let links =
                readers(ledger, shard).filter_map(|holder| state.links.get(holder)).cloned().collect();
            shards.push(ShardOf {
                at: ShardAt { session: self.number, shard: shard as u32, epoch: ledger.epoch(shard) },
                pieces: Arc::clone(pieces),
                links,
                lack: Vec::new(),
            });
        }
        for (shard, holder, _epoch) in state.ledger.missing() {
            if let Some(shard) = shards.get_mut(shard) {
                shard.lack.push(holder.clone());
            }
        }
        ShardView { generation: state.ledger.generation(), shards }
    }

    /// A replica has an op.
    pub(super) fn applied(
        self: &Arc<Self>,
        sessions: &Arc<Sessions>,
        shard: usize,
        holder: &Holder,
        op: &Op,
        state: ShardState,
    ) {
        let (holder, seq, state) = (holder.clone(), op.seq, state.into());
        self.handle(sessions, LedgerEvent::Applied { shard, holder, seq, state });
    }

    /// A replica refuses an op.
    pub(super) fn refused(
        self: &Arc<Self>,
        sessions: &Arc<Sessions>,
        at: (usize, u64),
        holder: &Holder,
        op: &Op,
        why: &Error,
    ) {
        let ((shard, epoch), holder, seq) = (at, holder.clone(), op.seq);
        let is_final = matches!(
            why.reason,
            Reason::NonFinite
                | Reason::KvBudget
                | Reason::ShapeLimit
                | Reason::PayloadLength
                | Reason::Checksum
                | Reason::ChunkOrder
                | Reason::StreamTruncated
                | Reason::StreamIdle
                | Reason::Overloaded
                | Reason::Draining
        ) && op.change.is_undoable();
        tracing::debug!(session = %self.name, shard, worker = %holder.worker, seq, error = %why, "an op is refused");
        let why = why.clone();
        self.handle(sessions, LedgerEvent::Refused { shard, holder, epoch, seq, is_final, why });
    }

    /// A worker that holds something is gone, or its stream is.
    pub(super) fn lost(self: &Arc<Self>, sessions: &Arc<Sessions>, link: &Arc<HoldLink>) {
        let actions = {
            let mut state = self.lock();
            match state.links.get(&link.holder) {
                Some(known) if Arc::ptr_eq(known, link) => state.links.remove(&link.holder),
                // Another stream has taken its place.
                _ => return,
            };
            state.handle(LedgerEvent::Lost(link.holder.clone()))
        };
        self.perform(sessions, actions);
    }

    /// Tells the ledger, and has done what it says.
    pub(super) fn handle(self: &Arc<Self>, sessions: &Arc<Sessions>, event: LedgerEvent<Error>) {
        let actions = self.lock().handle(event);
        self.perform(sessions, actions);
    }

    /// Has done what the ledger says.
    pub(super) fn perform(self: &Arc<Self>, sessions: &Arc<Sessions>, actions: Vec<LedgerAction<Error>>) {
        for action in actions {
            sessions.upkeep(self, action);
        }
    }

    /// What a client is told of it.
    pub(super) fn describe(&self, sessions: &Sessions, created: bool) -> SessionDescription {
        let state = self.lock();
        let ledger = &state.ledger;
        let shard = |(shard, pieces): (usize, &Arc<[Piece]>)| ShardDescription {
            pieces: pieces.to_vec(),
            epoch: ledger.epoch(shard),
            health: match ledger.phase(shard) {
                Phase::Open if ledger.is_short(shard) => ShardHealth::Repairing,
                Phase::Open => ShardHealth::Open,
                Phase::Recovering => ShardHealth::Recovering,
                Phase::Degraded => ShardHealth::Degraded,
                Phase::Lost => ShardHealth::Lost,
            },
            workers: readers(ledger, shard).map(|holder| holder.worker.clone()).collect(),
            bytes: self.bytes_of(ledger, shard),
        };
        let idle = sessions.now().saturating_sub(ledger.idle_since());
        SessionDescription {
            name: self.name.clone(),
            spec: self.spec.clone(),
            created,
            generation: ledger.generation(),
            sealed: ledger.is_sealed(),
            writer_epoch: ledger.writer_epoch(),
            next_op_seq: ledger.next_seq(),
            tokens: ledger.tokens().iter().map(|tokens| *tokens as u64).collect(),
            shards: self.pieces.iter().enumerate().map(shard).collect(),
            ttl_left: self.spec.ttl.saturating_sub(idle),
        }
    }
}

/// Who has a shard: whoever has all that was acknowledged, who can be read from also while the shard changes its members, and then the
/// other members.
fn readers(ledger: &Ledger<Error>, shard: usize) -> impl Iterator<Item = &Holder> + '_ {
    let is_computing = move |member: &&Holder| ledger.computing(shard).any(|other| other == *member);
    let others = ledger.members(shard).filter(move |member| !is_computing(member));
    ledger.computing(shard).chain(others)
}

/// What a read of a step comes behind.
#[derive(Clone, Copy, Debug)]
pub(super) enum After {
    /// The step appends nothing.
    Nothing,
    /// The append of the step, which is in flight.
    Op(Op),
    /// The append of the step, which had been applied before, after which its layer had so many tokens.
    Replayed(u64),
}

impl State {
    fn handle(&mut self, event: LedgerEvent<Error>) -> Vec<LedgerAction<Error>> {
        let actions = self.ledger.handle(event);
        self.answer(actions)
    }

    /// Makes whoever asks the writer.
    pub(super) fn take_writer(&mut self) -> Vec<LedgerAction<Error>> {
        let (_epoch, actions) = self.ledger.take_writer();
        self.answer(actions)
    }

    /// Tells whoever waits for an answer, under the lock under which the ledger gave it, so that no other one can be in their place.
    /// Returns what else is to be done.
    fn answer(&mut self, actions: Vec<LedgerAction<Error>>) -> Vec<LedgerAction<Error>> {
        let mut others = Vec::new();
        for action in actions {
            match action {
                LedgerAction::Answer { seq: _, result } => {
                    let result = result.map(|answer| self.applied(answer, false)).map_err(Error::from);
                    if let Some(waits) = self.waits.take() {
                        // Whoever asked may be gone.
                        drop(waits.send(result));
                    }
                }
                other => others.push(other),
            }
        }
        others
    }

    fn applied(&self, answer: attnd_plan::session::Answer, replayed: bool) -> Applied {
        let child = answer.child.and_then(|child| self.children.get(&child).cloned());
        Applied { len: answer.len as u64, generation: answer.generation, replayed, child }
    }
}
