//! One session on the coordinator: its ledger, the links to its holders, and the line of those who want to change it.
//!
//! The ledger decides, under a lock that is held for a few steps and never across an await. What it wants done besides answering runs in
//! tasks (`upkeep.rs`), whose ends are events again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use attnd_plan::Piece;
use attnd_plan::session::{
    Ask, Begun as LedgerBegun, Change, Closed, Holder, Ledger, LedgerAction, LedgerError, LedgerEvent, Op,
    Read, ReadRequest, Request, SessionName, SessionSpec,
};
use attnd_wire::hold::{ShardAt, ShardState};
use attnd_wire::session::{Applied, StepQueries};
use attnd_wire::{Error, Reason};
use tokio::sync::{Notify, oneshot, watch};

use super::births::Born;
use super::repair::Repair;
use super::turns::Turns;
use super::{Sessions, not_open};
use crate::coordinator::hold_link::HoldLink;
use crate::coordinator::meta_store::MetaError;

/// A session.
#[derive(Debug)]
pub(crate) struct Session {
    /// No other session ever has it.
    pub(super) number: u64,
    pub(super) name: SessionName,
    pub(super) spec: SessionSpec,
    /// What each shard is.
    pub(super) pieces: Vec<Arc<[Piece]>>,
    /// The session that it was forked from.
    pub(super) parent: Option<u64>,
    pub(super) turns: Arc<Turns>,
    /// Who waits for something that it has holds one of these.
    pub(super) in_use: Arc<()>,
    /// Whoever becomes the writer, or finds out what became of old forks, does so alone.
    pub(super) alone: tokio::sync::Mutex<()>,
    /// A child is a session now, or there will be none.
    pub(super) settled: Notify,
    /// The epoch of whoever writes, for those who take long over what they write.
    pub(super) writer: watch::Sender<u64>,
    /// Told of each change, for those who wait for one.
    pub(super) changed: Notify,
    state: Mutex<State>,
}

/// What a session is made of.
pub(super) struct SessionParts {
    pub(super) number: u64,
    pub(super) name: SessionName,
    pub(super) spec: SessionSpec,
    pub(super) ledger: Ledger<Error>,
    pub(super) pieces: Vec<Arc<[Piece]>>,
    pub(super) links: BTreeMap<Holder, Arc<HoldLink>>,
    pub(super) parent: Option<u64>,
}

#[derive(Debug)]
pub(super) struct State {
    /// That of the session.
    number: u64,
    pub(super) ledger: Ledger<Error>,
    /// Of every holder that can be reached, as far as the ledger knows.
    pub(super) links: BTreeMap<Holder, Arc<HoldLink>>,
    /// Of the view of all links that it knows; 0: it has to look again.
    pub(super) seen: u64,
    /// Who waits for the op in flight.
    pub(super) waits: Option<oneshot::Sender<Result<Applied, Error>>>,
    /// Names of children that are there, by number.
    pub(super) children: BTreeMap<u64, SessionName>,
    /// What is known about replicas that are missing, or to be elsewhere.
    pub(super) repair: Repair,
    /// Those that are in the store, and no sessions yet.
    pub(super) forks: BTreeMap<u64, SessionName>,
    /// Where room was asked for their shards.
    pub(super) rooms: BTreeMap<u64, Vec<(ShardAt, Arc<HoldLink>)>>,
    /// Some of them are of the coordinator before.
    pub(super) has_old_forks: bool,
    /// Those whose forks have been applied, and that become sessions now.
    pub(super) born: Vec<Born>,
    /// The names of those of them that aren't yet.
    pub(super) unsettled: BTreeSet<SessionName>,
    /// The epoch of each shard in the store.
    pub(super) saved: Vec<u64>,
    /// Where the append in flight is on its way in chunks.
    pub(super) uploads: Vec<Uploading>,
    /// It is closed: nothing begins any more.
    pub(super) closed: Option<Closed>,
    /// Since when somebody has been waiting for it to be whole.
    pub(super) stalled: Option<Instant>,
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
    /// Members that can be reached, first those who can compute.
    pub(super) links: Vec<Arc<HoldLink>>,
    /// How many of them can: they have all that was acknowledged.
    pub(super) able: usize,
    /// Members that lack the op in flight.
    pub(super) lack: Vec<Holder>,
}

impl Session {
    /// A session whose shards have the epochs that are in the store.
    pub(super) fn new(parts: SessionParts) -> Self {
        let SessionParts { number, name, spec, ledger, pieces, links, parent } = parts;
        let writer = watch::Sender::new(ledger.writer_epoch());
        let saved = (0..ledger.shards()).map(|shard| ledger.epoch(shard)).collect();
        let state = State {
            number,
            ledger,
            links,
            seen: 0,
            waits: None,
            children: BTreeMap::new(),
            forks: BTreeMap::new(),
            rooms: BTreeMap::new(),
            has_old_forks: false,
            born: Vec::new(),
            unsettled: BTreeSet::new(),
            saved,
            repair: Repair::default(),
            uploads: Vec::new(),
            closed: None,
            stalled: None,
        };
        Self {
            number,
            name,
            spec,
            pieces,
            parent,
            turns: Arc::default(),
            in_use: Arc::default(),
            alone: tokio::sync::Mutex::default(),
            settled: Notify::new(),
            writer,
            changed: Notify::new(),
            state: Mutex::new(state),
        }
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

    /// Whether it may be closed for want of use. Not as long as somebody is changing it, or waits for what it has.
    pub(super) fn is_expired(&self, state: &State, now: Duration) -> bool {
        state.ledger.is_expired(now) && self.turns.is_free() && Arc::strong_count(&self.in_use) == 1
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
        if let Ask::Fork { child } = request.ask
            && !state.forks.contains_key(&child)
            && state.ledger.in_flight().is_none()
            && request.seq == state.ledger.next_seq()
        {
            // It seemed to come again, as long as it wasn't known what had been before: as a new one it needs a child first.
            return Err(Error::new(Reason::Recovering, ""));
        }
        match state.ledger.begin(request).map_err(Error::from)? {
            // Soon it is there.
            LedgerBegun::Replayed(answer)
                if answer.child.is_some_and(|child| state.forks.contains_key(&child)) =>
            {
                Err(Error::new(Reason::Recovering, ""))
            }
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
        let (min_len, min_len_generation) = (tokens(queries.min_len), queries.min_len_generation);
        let request = ReadRequest { layer, at_len, generation, min_len, min_len_generation, after };
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
            _ if matches!(last.reason, Reason::Transport | Reason::Shard) => {
                LedgerError::<Error>::Recovering { is_in_flight: false }.into()
            }
            _ => last.clone(),
        }
    }

    /// Whether this replica of a shard has all that was acknowledged, as far as is known now.
    pub(super) fn is_computing(&self, shard: usize, holder: &Holder) -> bool {
        self.lock().ledger.computing(shard).any(|other| other == holder)
    }

    /// Who holds the session now.
    pub(super) fn view(&self) -> ShardView {
        let state = self.lock();
        let mut shards: Vec<ShardOf> = Vec::with_capacity(self.pieces.len());
        for (shard, pieces) in self.pieces.iter().enumerate() {
            let ledger = &state.ledger;
            let links =
                readers(ledger, shard).filter_map(|holder| state.links.get(holder)).cloned().collect();
            let able = ledger.computing(shard).filter(|holder| state.links.contains_key(holder)).count();
            shards.push(ShardOf {
                at: ShardAt { session: self.number, shard: shard as u32, epoch: ledger.epoch(shard) },
                pieces: Arc::clone(pieces),
                links,
                able,
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

    /// The streams to a worker that holds something broke.
    pub(super) fn disconnected(self: &Arc<Self>, sessions: &Arc<Sessions>, link: &Arc<HoldLink>) {
        let actions = {
            let mut state = self.lock();
            match state.links.get(&link.holder) {
                Some(known) if Arc::ptr_eq(known, link) => state.links.remove(&link.holder),
                // Others have taken their place.
                _ => return,
            };
            state.seen = 0;
            state.handle(LedgerEvent::Disconnected(link.holder.clone()))
        };
        self.perform(sessions, actions);
    }

    /// Makes whoever asks the writer, of this epoch.
    ///
    /// # Errors
    /// [`Reason::StateStore`]; then nothing has changed.
    pub(super) async fn become_writer(self: &Arc<Self>, sessions: &Arc<Sessions>) -> Result<u64, Error> {
        let _alone = self.alone.lock().await;
        let (number, next) = (self.number, self.lock().ledger.writer_epoch() + 1);
        match sessions.meta.run(move |store| store.set_writer_epoch(number, next)).await {
            Ok(()) => {}
            // It was saved for somebody who went before being told.
            Err(MetaError::Backwards { old, new }) if old == new => {}
            Err(MetaError::Unknown { .. }) => return Err(Error::new(Reason::Session, "")),
            Err(error) => return Err(super::not_kept(&error)),
        }
        let (epoch, actions) = {
            let mut state = self.lock();
            let (epoch, actions) = state.ledger.take_writer();
            // What the one before is about to append in chunks is taken back.
            self.writer.send_replace(epoch);
            (epoch, state.answer(actions))
        };
        self.perform(sessions, actions);
        Ok(epoch)
    }

    /// Tells the ledger, and has done what it says.
    pub(super) fn handle(self: &Arc<Self>, sessions: &Arc<Sessions>, event: LedgerEvent<Error>) {
        let actions = {
            let mut state = self.lock();
            state.handle(event)
        };
        self.perform(sessions, actions);
    }

    /// Has done what the ledger says.
    pub(super) fn perform(self: &Arc<Self>, sessions: &Arc<Sessions>, actions: Vec<LedgerAction<Error>>) {
        let born = {
            let mut state = self.lock();
            if state.stalled.is_some() {
                state.look_whether_whole();
            }
            std::mem::take(&mut state.born)
        };
        self.changed.notify_waiters();
        for child in born {
            sessions.deliver(self, child);
        }
        for action in actions {
            sessions.upkeep(self, action);
        }
    }
}

/// Who has a shard: whoever has all that was acknowledged, who can be read from also while the shard changes its members, and then the
/// other members.
pub(super) fn readers(ledger: &Ledger<Error>, shard: usize) -> impl Iterator<Item = &Holder> + '_ {
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
    /// The append of the step, which had been applied before, after which its layer had so many tokens in this generation.
    Replayed {
        /// Tokens.
        len: u64,
        /// Of the session, then.
        generation: u64,
    },
}

impl State {
    pub(super) fn handle(&mut self, event: LedgerEvent<Error>) -> Vec<LedgerAction<Error>> {
        tracing::trace!(session = self.number, ?event, "a ledger is told");
        let actions = self.ledger.handle(event);
        tracing::trace!(session = self.number, ?actions, "a ledger wants");
        self.answer(actions)
    }

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

    /// Tells whoever waits for an answer, under the lock under which the ledger gave it, so that no other one can be in their place.
    /// Returns what else is to be done.
    fn answer(&mut self, actions: Vec<LedgerAction<Error>>) -> Vec<LedgerAction<Error>> {
        let mut others = Vec::new();
        for action in actions {
            match action {
                LedgerAction::Answer { seq: _, result } => {
                    if let Ok(answer) = &result
                        && self.bear(answer, true)
                    {
                        continue;
                    }
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

    pub(super) fn applied(&self, answer: attnd_plan::session::Answer, replayed: bool) -> Applied {
        let child = answer.child.and_then(|child| self.children.get(&child).cloned());
        Applied { len: answer.len as u64, generation: answer.generation, replayed, child }
    }
}
