//! One session on the coordinator: its ledger, the links to its holders, and the line of those who want to change it.
//!
//! The ledger decides, under a lock that is held for a few steps and never across an await. What it wants done besides answering runs in
//! tasks (`upkeep.rs`), whose ends are events again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use attnd_plan::Piece;
use attnd_plan::session::{
    Ask, Begun as LedgerBegun, Change, Closed, Holder, Ledger, LedgerAction, LedgerError, LedgerEvent, Op,
    Phase, Read, ReadRequest, Request, SessionName, SessionSpec,
};
use attnd_wire::hold::{ShardAt, ShardState};
use attnd_wire::session::{Applied, SessionDescription, ShardDescription, ShardHealth, StepQueries};
use attnd_wire::{Error, Reason};
use tokio::sync::{oneshot, watch};

use super::turns::Turns;
use super::{Sessions, not_open};
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
    /// The epoch of whoever writes, for those who take long over what they write.
    pub(super) writer: watch::Sender<u64>,
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
    /// The same of those whose fork hasn't been applied yet. Their names are taken.
    pub(super) unborn: BTreeMap<u64, SessionName>,
    /// Where the append in flight is on its way in chunks.
    pub(super) uploads: Vec<Uploading>,
    /// It is closed: nothing begins any more.
    pub(super) closed: Option<Closed>,
}

/// An append on its way in chunks to one replica.
#[derive(Debug)]
pub(super) struct Uploading {
    pub(super) shard: usize,
    pub(super) link: Arc<HoldLink>,
    /// Its number on the link's lane for bulk.
    pub(super) request: u64,
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
        let writer = watch::Sender::new(ledger.writer_epoch());
        let state = State {
            ledger,
            links,
            waits: None,
            children: BTreeMap::new(),
            unborn: BTreeMap::new(),
            uploads: Vec::new(),
            closed: None,
        };
        Self { number, name, spec, pieces, turns: Arc::default(), writer, state: Mutex::new(state) }
    }

    /// No critical section can panic half-way but in the ledger, which then is as it was or broken; either way it is what there is.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note that somebody asks for it; false if it is closed.
    pub(super) fn touch(&self, now: Duration) -> bool {
        let mut state = self.lock();
        state.ledger.touch(now);
        state.closed.is_none()
    }

    /// Whether it may be closed for want of use. Not as long as somebody is changing it.
    pub(super) fn is_expired(&self, state: &State, now: Duration) -> bool {
        state.ledger.is_expired(now) && self.turns.is_free()
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
        state.check_open()?;
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
        state.check_open()?;
        let tokens = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let (at_len, generation, after) = match after {
            After::Nothing => (queries.at_len.map(tokens), queries.generation, None),
            After::Op(op) => (queries.at_len.map(tokens), queries.generation, Some(op)),
            // A step that comes again looks at what it looked at then, unless it says otherwise: since a cut that isn't there any more.
            After::Replayed { len, generation } => {
                let (len, generation) =
                    (queries.at_len.unwrap_or(len), queries.generation.unwrap_or(generation));
                (Some(tokens(len)), Some(generation), None)
            }
        };
        let min_len = tokens(queries.min_len);
        let request = ReadRequest { layer, at_len, generation, min_len, after };
        state.ledger.check_read(&request).map_err(Error::from)
    }

    /// What is said where no replica answers a read any more, the last of which failed so.
    pub(super) fn unreadable(&self, last: &Error) -> Error {
        let state = self.lock();
        if let Err(closed) = state.check_open() {
            return closed;
        }
        match state.ledger.check_read(&ReadRequest::default()) {
            Err(error @ (LedgerError::SessionLost { .. } | LedgerError::Recovering { .. })) => error.into(),
            // Others are found.
            _ if last.reason == Reason::Transport => {
                LedgerError::<Error>::Recovering { is_in_flight: false }.into()
            }
            _ => last.clone(),
        }
    }

    /// Whether this replica of a shard has all that was acknowledged, as far as is known now.
    pub(super) fn is_computing(&self, shard: usize, holder: &Holder) -> bool {
        self.lock().ledger.computing(shard).any(|other| other == holder)
    }

    /// Makes whoever asks the writer. What the one before is about to append in chunks is taken back.
    pub(super) fn take_writer(self: &Arc<Self>, sessions: &Arc<Sessions>) {
        let actions = {
            let mut state = self.lock();
            let (epoch, actions) = state.ledger.take_writer();
            self.writer.send_replace(epoch);
            self.answer(sessions, &mut state, actions)
        };
        self.perform(sessions, actions);
    }

    /// Who holds the session now.
    pub(super) fn view(&self) -> ShardView {
        let state = self.lock();
        let mut shards: Vec<ShardOf> = Vec::with_capacity(self.pieces.len());
        for (shard, pieces) in self.pieces.iter().enumerate() {
            let ledger = &state.ledger;
            let computing = ledger.computing(shard);
            let others =
                ledger.members(shard).filter(|member| !ledger.computing(shard).any(|other| other == *member));
            let links =
                computing.chain(others).filter_map(|holder| state.links.get(holder)).cloned().collect();
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
            let actions = state.ledger.handle(LedgerEvent::Lost(link.holder.clone()));
            self.answer(sessions, &mut state, actions)
        };
        self.perform(sessions, actions);
    }

    /// Tells the ledger, and has done what it says.
    pub(super) fn handle(self: &Arc<Self>, sessions: &Arc<Sessions>, event: LedgerEvent<Error>) {
        let actions = {
            let mut state = self.lock();
            let actions = state.ledger.handle(event);
            self.answer(sessions, &mut state, actions)
        };
        self.perform(sessions, actions);
    }

    /// Tells whoever waits for an answer, under the lock under which the ledger gave it, so that no other one can be in their place.
    /// Returns what else is to be done.
    fn answer(
        &self,
        sessions: &Sessions,
        state: &mut State,
        actions: Vec<LedgerAction<Error>>,
    ) -> Vec<LedgerAction<Error>> {
        let mut others = Vec::new();
        for action in actions {
            match action {
                LedgerAction::Answer { seq: _, result } => {
                    // Before anybody hears of it, and whether or not anybody does.
                    if let Some(child) = result.as_ref().ok().and_then(|answer| answer.child) {
                        self.adopt(sessions, state, child);
                    }
                    let result = result.map(|answer| state.applied(answer, false)).map_err(Error::from);
                    if let Some(waits) = state.waits.take() {
                        // Whoever asked may be gone.
                        drop(waits.send(result));
                    }
                }
                other => others.push(other),
            }
        }
        others
    }

    /// The child of a fork that was just applied is open from now on.
    fn adopt(&self, sessions: &Sessions, state: &mut State, child: u64) {
        let Some(name) = state.unborn.remove(&child) else { return };
        let ledger = state.ledger.fork(sessions.now());
        let (spec, pieces, links) = (self.spec.clone(), self.pieces.clone(), state.links.clone());
        let born = Self::new(child, name.clone(), spec, ledger, pieces, links);
        state.children.insert(child, name.clone());
        let mut table = sessions.table();
        table.closed.reopen(&name);
        table.opening.remove(&name);
        table.open.insert(name, Arc::new(born));
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
                Phase::Open => ShardHealth::Open,
                Phase::Recovering => ShardHealth::Recovering,
                Phase::Degraded => ShardHealth::Degraded,
                Phase::Lost => ShardHealth::Lost,
            },
            workers: ledger.members(shard).map(|holder| holder.worker.clone()).collect(),
            bytes: ledger
                .tokens()
                .iter()
                .map(|tokens| {
                    attnd_plan::session::placement::shard_bytes(&self.spec, pieces, *tokens)
                        / self.spec.layers as u64
                })
                .sum(),
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

/// What a read of a step comes behind.
#[derive(Clone, Copy, Debug)]
pub(super) enum After {
    /// The step appends nothing.
    Nothing,
    /// The append of the step, which is in flight.
    Op(Op),
    /// The append of the step, which had been applied before, after which its layer had so many tokens in this generation.
    Replayed {
        /// Tokens.
        len: u64,
        /// Of the session, then.
        generation: u64,
    },
}

impl State {
    /// # Errors
    /// [`Reason::Session`] and [`Reason::SessionExpired`] if it is closed.
    pub(super) fn check_open(&self) -> Result<(), Error> {
        self.closed.map_or(Ok(()), |closed| Err(not_open(Some(closed))))
    }

    /// Whether the fork that makes this child is in flight.
    pub(super) fn is_forking(&self, child: u64) -> bool {
        matches!(self.ledger.in_flight(), Some(Op { change: Change::Fork { child: number }, .. }) if *number == child)
    }

    /// An append on its way in chunks to this replica.
    pub(super) fn upload_to(&self, shard: usize, holder: &Holder) -> Option<(Arc<HoldLink>, u64)> {
        let is_meant = |upload: &&Uploading| upload.shard == shard && upload.link.holder == *holder;
        let upload = self.uploads.iter().find(is_meant)?;
        Some((Arc::clone(&upload.link), upload.request))
    }

    fn applied(&self, answer: attnd_plan::session::Answer, replayed: bool) -> Applied {
        let child = answer.child.and_then(|child| self.children.get(&child).cloned());
        Applied { len: answer.len as u64, generation: answer.generation, replayed, child }
    }
}
