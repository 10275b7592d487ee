//! The coordinator's side of one session: which op is next, which replicas have it, and what becomes of it when some are lost.
//!
//! ```text
//! shard   OPEN(e) --member lost, or one to be added--> RECOVERING(e+1) --saved--> OPEN(e+1) | DEGRADED(e+1): fewer than A
//!            |                                              |
//!            +--nobody left who has what was acknowledged---+--> LOST, with its session
//! ```
//!
//! One op is in flight at a time. Its bytes are the caller's: it sends the op to everyone in [`Ledger::missing`], and again where an
//! action says so, until there is an [`LedgerAction::Answer`]. The op has happened once A members of *every* shard have it.
//!
//! A *round* of a shard gives it another set of members: everyone who shall be one is fenced, so that what it has can't change any
//! more; who lacks acknowledged ops gets them by a copy; and the set is saved before it counts. While there are A members, rounds wait
//! until the op in flight has its end. Reads go on all the time: what they look at never changes.
//!
//! What the caller promises: requests about one shard reach a worker in the order of the actions, or after the answer to what came
//! before; each request is answered at most once; and a worker whose stream breaks is reported before another stream begins.

use std::time::Duration;

pub use self::error::{LedgerError, Outcome};
use self::flight::{Flight, Stage};
pub use self::message::{
    Ask, Begun, LedgerAction, LedgerEvent, Phase, Read, ReadRequest, Request, SavedShard,
};
use self::restart::Past;
use self::shard::{Asked, Shard};
use super::op::{Change, Holder, Op, Record, longest};
use super::spec::SessionSpec;
use super::window::{Known, Window};
use crate::omission::{Omission, omits};

mod error;
mod flight;
mod message;
mod moves;
mod read;
mod restart;
mod round;
mod shard;

/// One session, as its coordinator knows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Ledger<E = String> {
    layers: usize,
    replicas: usize,
    acks: usize,
    max_tokens: usize,
    ttl: Duration,
    writer_epoch: u64,
    generation: u64,
    tokens: Vec<usize>,
    sealed: bool,
    window: Window,
    flight: Option<Flight<E>>,
    shards: Vec<Shard>,
    /// Nothing is known yet of what the replicas have.
    is_restarting: bool,
    /// What is known of the ops before that.
    past: Past,
    /// The last op before this coordinator, as long as it isn't on enough replicas: it has happened if no more of them are lost, so
    /// nobody is told that it has, and nobody sees it before all that are left have it.
    unconfirmed: Option<Op>,
    /// Tokens that survive, and that there were, where that isn't all.
    lost: Option<(usize, usize)>,
    used: Duration,
    actions: Vec<LedgerAction<E>>,
    /// Whoever was copied is a member at once.
    #[cfg(test)]
    pub(super) skips_fences: bool,
}

impl<E: Clone> Ledger<E> {
    /// A session that was just opened, at `now`: of each shard the holders, where there is an empty replica of epoch 1, and who are
    /// saved.
    pub fn new(spec: &SessionSpec, shards: Vec<Vec<Holder>>, now: Duration) -> Self {
        let shards = shards.into_iter().map(|holders| Shard::open(1, holders, 0)).collect();
        Self {
            layers: spec.layers,
            replicas: spec.replicas,
            acks: spec.acks,
            max_tokens: spec.max_tokens,
            ttl: spec.ttl,
            writer_epoch: 1,
            generation: 0,
            tokens: vec![0; spec.layers],
            sealed: false,
            window: Window::default(),
            flight: None,
            shards,
            is_restarting: false,
            past: Past::Known,
            unconfirmed: None,
            lost: None,
            used: now,
            actions: Vec::new(),
            #[cfg(test)]
            skips_fences: false,
        }
    }

    /// Looks at a request without its digest, which is known once all of its bytes are here.
    ///
    /// # Errors
    /// Those of [`Ledger::begin`] that don't depend on it.
    pub fn check(&self, writer_epoch: u64, seq: u64, ask: &Ask) -> Result<(), LedgerError<E>> {
        self.look(writer_epoch, seq, None, ask).map(|_| ())
    }

    /// Takes a request. The next one waits until this one is answered.
    ///
    /// # Errors
    /// If it isn't the next op, nor one of the last 1,024, or can't be applied, or not now.
    pub fn begin(&mut self, request: &Request) -> Result<Begun, LedgerError<E>> {
        let Request { writer_epoch, seq, digest, ask } = request;
        match self.look(*writer_epoch, *seq, Some(*digest), ask)? {
            Looked::Begin(change) => {
                let op = Op { seq: self.next_seq(), digest: *digest, change };
                self.flight = Some(Flight { op, writer_epoch: *writer_epoch, stage: Stage::Applying });
                self.mark_sent();
                Ok(Begun::Started(op))
            }
            Looked::InFlight(op) => {
                if let Some(flight) = &mut self.flight {
                    flight.stage = Stage::Applying;
                }
                self.mark_sent();
                Ok(Begun::Resumed(op))
            }
            Looked::Applied(answer) => Ok(Begun::Replayed(answer)),
        }
    }

    fn look(
        &self,
        writer_epoch: u64,
        seq: u64,
        digest: Option<u32>,
        ask: &Ask,
    ) -> Result<Looked, LedgerError<E>> {
        self.check_lost()?;
        if seq == 0 {
            return Err(LedgerError::SeqZero);
        }
        if writer_epoch != self.writer_epoch {
            let (got, current) = (writer_epoch, self.writer_epoch);
            return Err(if got < current {
                LedgerError::WriterFenced { got, current }
            } else {
                LedgerError::WriterUnknown { got, current }
            });
        }
        if self.is_restarting {
            return Err(LedgerError::Recovering { is_in_flight: false });
        }
        match self.window.look(seq) {
            Known::Applied(_) if omits(Omission::Dedup) => {}
            Known::Applied(record) if digest.is_some_and(|digest| digest != record.digest) => {
                return Err(LedgerError::SeqReused { seq });
            }
            Known::Applied(record) => {
                if self.unconfirmed.is_some_and(|op| op.seq == seq) {
                    self.check_open(true)?;
                }
                return Ok(Looked::Applied(record.answer));
            }
            // Somebody remembers it, and will be asked.
            Known::Forgotten { .. } if self.past != Past::Known => {
                return Err(LedgerError::Recovering { is_in_flight: false });
            }
            Known::Forgotten { oldest } => return Err(LedgerError::SeqOld { seq, oldest }),
            Known::New => {}
        }
        let expected = self.next_seq();
        if seq != expected && !omits(Omission::Dedup) {
            return Err(LedgerError::SeqGap { expected, got: seq });
        }
        match &self.flight {
            Some(Flight { stage: Stage::Undoing(_), .. }) => {
                Err(LedgerError::Recovering { is_in_flight: false })
            }
            Some(flight) if digest.is_some_and(|digest| digest != flight.op.digest) => {
                Err(LedgerError::SeqReused { seq })
            }
            Some(flight) => self.check_open(true).map(|()| Looked::InFlight(flight.op)),
            None => {
                let change = self.resolve(ask)?;
                self.check_open(false).map(|()| Looked::Begin(change))
            }
        }
    }

    /// What the request does to the session as it is.
    fn resolve(&self, ask: &Ask) -> Result<Change, LedgerError<E>> {
        match *ask {
            Ask::Append { .. } | Ask::Truncate { .. } if self.sealed => Err(LedgerError::Sealed),
            Ask::Append { layer, base_len, tokens } => {
                let committed = self.tokens_of(layer)?;
                if let Some(base_len) = base_len.filter(|base_len| *base_len != committed) {
                    return Err(LedgerError::Length { committed, base_len });
                }
                if tokens == 0 {
                    return Err(LedgerError::NoTokens);
                }
                if tokens > self.max_tokens.saturating_sub(committed) {
                    return Err(LedgerError::Full { committed, tokens });
                }
                Ok(Change::Append { layer, base_len: committed, tokens })
            }
            Ask::Truncate { len } if len > longest(&self.tokens) => {
                Err(LedgerError::AtLen { at_len: len, committed: longest(&self.tokens) })
            }
            Ask::Truncate { len } => Ok(Change::Truncate { len }),
            Ask::Fork { child } => Ok(Change::Fork { child }),
            Ask::Seal => Ok(Change::Seal),
        }
    }

    /// Whether every shard takes ops.
    fn check_open(&self, is_in_flight: bool) -> Result<(), LedgerError<E>> {
        if self.shards.iter().any(|shard| shard.phase == Phase::Recovering) {
            return Err(LedgerError::Recovering { is_in_flight });
        }
        match self.shards.iter().find(|shard| shard.phase == Phase::Degraded) {
            Some(shard) => Err(self.under_replicated(shard, is_in_flight)),
            None => Ok(()),
        }
    }

    fn under_replicated(&self, shard: &Shard, is_in_flight: bool) -> LedgerError<E> {
        LedgerError::UnderReplicated { have: shard.member_count(), need: self.acks, is_in_flight }
    }

    fn check_lost(&self) -> Result<(), LedgerError<E>> {
        self.lost.map_or(Ok(()), |(prefix, tokens)| Err(LedgerError::SessionLost { prefix, tokens }))
    }

    fn tokens_of(&self, layer: usize) -> Result<usize, LedgerError<E>> {
        self.tokens.get(layer).copied().ok_or(LedgerError::Layer { layer, layers: self.layers })
    }

    /// The caller sends the op in flight to all that don't have it.
    fn mark_sent(&mut self) {
        for shard in &mut self.shards {
            shard.members_mut().for_each(|member| member.asked = Asked::Op);
        }
    }

    /// Where the op in flight has to be sent: to every member of every shard that isn't known to have it, with the shard's epoch.
    pub fn missing(&self) -> impl Iterator<Item = (usize, &Holder, u64)> + '_ {
        let seq = self.in_flight().map(|op| op.seq);
        let shards = self.shards.iter().enumerate().filter(move |_| seq.is_some());
        shards.flat_map(move |(index, shard)| {
            let missing = shard.members().filter(move |member| member.applied < seq);
            missing.map(move |member| (index, &member.holder, shard.epoch))
        })
    }

    /// Makes whoever asks the writer, and fences the one before. The number has to be saved before it is told. What the one before left
    /// unfinished is taken back.
    pub fn take_writer(&mut self) -> (u64, Vec<LedgerAction<E>>) {
        self.writer_epoch += 1;
        match &mut self.flight {
            Some(flight) if matches!(flight.stage, Stage::Parked) && flight.op.change.is_undoable() => {
                flight.stage = Stage::Undoing(None);
            }
            _ => {}
        }
        self.settle();
        (self.writer_epoch, std::mem::take(&mut self.actions))
    }

    /// Whether nothing is under way that can't be taken back: what a new writer is told of the session then holds until it changes it.
    ///
    /// # Errors
    /// [`LedgerError::UnderReplicated`] and [`LedgerError::Recovering`].
    pub fn check_settled(&self) -> Result<(), LedgerError<E>> {
        match &self.flight {
            Some(flight) if !flight.op.change.is_undoable() => {
                self.check_open(false)?;
                Err(LedgerError::Recovering { is_in_flight: false })
            }
            _ => Ok(()),
        }
    }

    /// Takes one event and says what to do about it.
    pub fn handle(&mut self, event: LedgerEvent<E>) -> Vec<LedgerAction<E>> {
        if self.lost.is_some() {
            if let LedgerEvent::Draining(holder) = event {
                self.drain(&holder);
                self.release_leaving();
            }
            return std::mem::take(&mut self.actions);
        }
        match event {
            LedgerEvent::Applied { shard, holder, state, .. } => self.take_applied(shard, &holder, &state),
            LedgerEvent::Refused { shard, holder, epoch, seq, is_final, why } => {
                self.take_refused(shard, &holder, (epoch, seq), is_final, why);
            }
            LedgerEvent::Undone { shard, holder, seq, state } => {
                self.take_undone(shard, &holder, seq, &state);
            }
            LedgerEvent::Abandoned { seq, why } => self.abandon(seq, why),
            LedgerEvent::Lost(holder) => self.lose_holder(&holder, false),
            LedgerEvent::Disconnected(holder) => self.lose_holder(&holder, true),
            LedgerEvent::Gone { shard, holder, epoch } => {
                if self.epoch(shard) == epoch {
                    self.lose_replica(shard, &holder, false);
                }
            }
            LedgerEvent::Fenced { shard, holder, state } => self.take_fenced(shard, &holder, state),
            LedgerEvent::FenceRefused { shard, holder, epoch } => self.outbid(shard, &holder, epoch),
            LedgerEvent::Copied { shard, holder, state } => self.take_copied(shard, &holder, &state),
            LedgerEvent::CopyFailed { shard, holder } => self.end_copy(shard, &holder),
            LedgerEvent::Joined { shard, holder } => self.admit(shard, holder, true),
            LedgerEvent::Replacement { shard, holder } => self.admit(shard, holder, false),
            LedgerEvent::Draining(holder) => self.drain(&holder),
            LedgerEvent::Move { shard, from, to } => self.move_replica(shard, &from, to),
            LedgerEvent::Stays { shard, holder } => self.keep(shard, &holder),
            LedgerEvent::Saved { shard, epoch } => self.open(shard, epoch),
            LedgerEvent::Records(records) => self.take_records(records),
        }
        self.settle();
        std::mem::take(&mut self.actions)
    }

    /// Does what is due, until nothing is.
    fn settle(&mut self) {
        loop {
            let mut has_moved = self.is_restarting && self.choose_session();
            for shard in 0..self.shards.len() {
                has_moved |= self.lost.is_none() && self.step(shard);
            }
            has_moved |= self.lost.is_none() && self.settle_flight();
            self.confirm();
            has_moved |= !self.is_restarting && self.past == Past::Unknown && self.ask_records();
            if !has_moved || self.lost.is_some() {
                return;
            }
        }
    }

    /// Who computes queries over a shard, first choice first: whoever has all that was acknowledged.
    pub fn computing(&self, shard: usize) -> impl Iterator<Item = &Holder> + '_ {
        let last = (!self.is_restarting).then(|| self.window.last());
        let members = self.shards.get(shard).into_iter().flat_map(|shard| &shard.members);
        let able = members.filter(move |member| last.is_some() && member.applied >= last);
        able.map(|member| &member.holder)
    }

    /// Who gets ops.
    pub fn members(&self, shard: usize) -> impl Iterator<Item = &Holder> + '_ {
        self.shards.get(shard).into_iter().flat_map(Shard::members).map(|member| &member.holder)
    }

    /// Who has something of a shard, or is getting it: where to release when the session is closed.
    pub fn holders(&self, shard: usize) -> impl Iterator<Item = &Holder> + '_ {
        self.shards.get(shard).into_iter().flat_map(Shard::holders)
    }

    /// Of a shard, for every request about it.
    pub fn epoch(&self, shard: usize) -> u64 {
        self.shards.get(shard).map_or(0, |shard| shard.epoch)
    }

    /// How a shard is.
    pub fn phase(&self, shard: usize) -> Phase {
        self.shards.get(shard).map_or(Phase::Lost, |shard| shard.phase)
    }

    /// How many shards there are.
    pub fn shards(&self) -> usize {
        self.shards.len()
    }

    /// Cuts so far.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Tokens of each layer that were acknowledged; after a restart, with those of the last op, of which that isn't known at first.
    pub fn tokens(&self) -> &[usize] {
        &self.tokens
    }

    /// Nothing can be appended or cut any more.
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Of whoever writes.
    pub fn writer_epoch(&self) -> u64 {
        self.writer_epoch
    }

    /// The number of the next op.
    pub fn next_seq(&self) -> u64 {
        self.window.last() + 1
    }

    /// The op in flight.
    pub fn in_flight(&self) -> Option<&Op> {
        self.flight.as_ref().map(|flight| &flight.op)
    }

    /// Takes note that somebody asked for the session.
    pub fn touch(&mut self, now: Duration) {
        self.used = self.used.max(now);
    }

    /// When somebody last asked for it.
    pub fn idle_since(&self) -> Duration {
        self.used
    }

    /// Whether nobody has asked for it for its whole time. Not while an op is on its way; one that waits for replicas, and that nobody
    /// has asked for since, keeps nothing.
    pub fn is_expired(&self, now: Duration) -> bool {
        let is_on_its_way =
            self.flight.as_ref().is_some_and(|flight| matches!(flight.stage, Stage::Applying));
        !is_on_its_way && now.saturating_sub(self.used) >= self.ttl
    }

    /// Replicas that a shard is short of, beside those on their way.
    pub fn missing_replicas(&self, shard: usize) -> usize {
        self.shards.get(shard).map_or(0, |shard| shard.missing(self.replicas))
    }

    /// The last op, with what was said of it; `None` where there was none, and as long as it isn't known what it was, or whether it has
    /// happened.
    pub fn last_op(&self) -> Option<Record> {
        let is_known = !self.is_restarting && self.unconfirmed.is_none();
        self.window.records().last().filter(|_| is_known)
    }

    /// Whether the rows of this op are still of use: it is in flight, and isn't taken back.
    pub fn takes_rows(&self, seq: u64) -> bool {
        let is_applying =
            |flight: &Flight<E>| flight.op.seq == seq && matches!(flight.stage, Stage::Applying);
        self.flight.as_ref().is_some_and(is_applying)
    }

    /// Whether nobody has all that was acknowledged: whatever is asked of it is answered so.
    pub fn is_lost(&self) -> bool {
        self.lost.is_some()
    }

    /// Whether it isn't known yet what the replicas have.
    pub fn is_restarting(&self) -> bool {
        self.is_restarting
    }
}

/// What a request turns out to be.
enum Looked {
    Begin(Change),
    InFlight(Op),
    Applied(super::op::Answer),
}

#[cfg(test)]
mod tests;
