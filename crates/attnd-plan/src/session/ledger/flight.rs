//! The one op in flight: it is done once enough replicas of every shard have it, or taken back wherever it may be.

use super::shard::{Asked, Shard, Standing, Step};
use super::{Ledger, LedgerAction, LedgerError, Phase};
use crate::session::op::{Change, Holder, Op};
use crate::session::replica::ReplicaState;
use crate::session::window::WINDOW;

/// How far the op in flight is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Stage<E> {
    /// On its way to all members.
    Applying,
    /// As before, but a shard has too few members, and nobody waits for the answer. Whoever asks again brings the bytes.
    Parked,
    /// It is being taken back; then this is said of it, if anybody waits.
    Undoing(Option<LedgerError<E>>),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Flight<E> {
    pub(super) op: Op,
    pub(super) writer_epoch: u64,
    pub(super) stage: Stage<E>,
}

/// What a replica's state is, beside what the ledger knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// It has what was acknowledged, up to this op, or the op in flight too.
    Level(u64),
    /// It has that, and an op that nobody wants any more.
    TakeBack(Op),
    /// It lacks something, or has something else.
    Behind,
}

impl<E: Clone> Ledger<E> {
    pub(super) fn find(&self, shard: &Shard, state: &ReplicaState) -> Found {
        let last = self.window.last();
        if state.op_seq == last {
            let is_level = state.chain == shard.chain && self.has_all_of(state, None);
            return if is_level { Found::Level(last) } else { Found::Behind };
        }
        let Some(op) = state.last.filter(|op| op.seq == last + 1 && op.seq == state.op_seq) else {
            return Found::Behind;
        };
        if state.chain_before != shard.chain {
            return Found::Behind;
        }
        let is_in_flight = self.in_flight() == Some(&op);
        let has_same_bytes = shard.flight_chain.is_none_or(|chain| chain == state.chain);
        if is_in_flight && has_same_bytes && self.has_all_of(state, Some(&op)) {
            Found::Level(op.seq)
        } else if op.change.is_undoable() {
            Found::TakeBack(op)
        } else {
            Found::Behind
        }
    }

    /// Whether a replica has as many tokens of each layer as the session, after this op.
    fn has_all_of(&self, state: &ReplicaState, op: Option<&Op>) -> bool {
        match op.map(|op| op.change) {
            Some(Change::Append { layer, base_len, tokens }) => {
                let expected = self.tokens.iter().enumerate();
                let expected =
                    expected.map(|(index, have)| if index == layer { base_len + tokens } else { *have });
                state.tokens.iter().copied().eq(expected)
                    && (state.generation, state.sealed) == (self.generation, self.sealed)
            }
            change => {
                let (mut tokens, mut generation, mut sealed) =
                    (self.tokens.clone(), self.generation, self.sealed);
                if let Some(change) = change {
                    change.apply(&mut tokens, &mut generation, &mut sealed);
                }
                (&state.tokens, state.generation, state.sealed) == (&tokens, generation, sealed)
            }
        }
    }

    /// Takes note that a replica is level; the first one says what the others' bytes must be.
    pub(super) fn mark_level(&mut self, shard: usize, holder: &Holder, applied: u64, chain: u32) {
        let last = self.window.last();
        let Some(shard) = self.shards.get_mut(shard) else { return };
        if applied > last {
            shard.flight_chain = Some(chain);
        }
        if let Some(member) = shard.get_mut(holder) {
            member.applied = member.applied.max(Some(applied));
        }
    }

    pub(super) fn take_applied(&mut self, index: usize, holder: &Holder, state: &ReplicaState) {
        let Some(shard) = self.shards.get(index) else { return };
        let is_member = shard.members().any(|member| member.holder == *holder);
        if !is_member || state.epoch != shard.epoch {
            return;
        }
        match self.find(shard, state) {
            Found::Level(applied) => {
                self.mark_level(index, holder, applied, state.chain);
                let member = self.shards.get_mut(index).and_then(|shard| shard.get_mut(holder));
                if let Some(member) = member {
                    member.done = member.done.max(Some(applied));
                }
            }
            // Behind the others, who are enough.
            Found::Behind if state.op_seq < self.window.last() => {
                let member = self.shards.get_mut(index).and_then(|shard| shard.get_mut(holder));
                if let Some(member) = member {
                    member.applied = member.applied.max(Some(state.op_seq));
                }
            }
            Found::Behind => self.drop_member(index, holder),
            Found::TakeBack(_) => {}
        }
    }

    pub(super) fn take_refused(
        &mut self,
        index: usize,
        holder: &Holder,
        (epoch, seq): (u64, u64),
        is_final: bool,
        why: E,
    ) {
        let last = self.window.last();
        let Some(shard) = self.shards.get(index).filter(|shard| shard.epoch == epoch) else { return };
        let Some(member) = shard.members.iter().find(|member| member.holder == *holder) else { return };
        if !member.is_member() {
            // What can't be taken back there keeps it out of the round.
            if member.standing == Standing::TakingBack {
                self.drop_member(index, holder);
            }
            return;
        }
        let is_behind = member.applied < Some(seq.min(last));
        let Some(flight) = self.flight.as_mut().filter(|flight| flight.op.seq == seq) else {
            // Late, of an op before: whoever lacks that can't have what came since.
            if is_behind {
                self.drop_member(index, holder);
            }
            return;
        };
        if !is_final || !flight.op.change.is_undoable() {
            // Others have it, or it can't be refused.
            self.drop_member(index, holder);
        } else if !matches!(flight.stage, Stage::Undoing(_)) {
            flight.stage = Stage::Undoing(Some(LedgerError::Refused { why }));
        }
    }

    pub(super) fn abandon(&mut self, seq: u64, why: E) {
        let is_meant = |flight: &&mut Flight<E>| {
            let is_undoing = matches!(flight.stage, Stage::Undoing(_));
            flight.op.seq == seq && flight.op.change.is_undoable() && !is_undoing
        };
        if let Some(flight) = self.flight.as_mut().filter(is_meant) {
            flight.stage = Stage::Undoing(Some(LedgerError::Refused { why }));
        }
    }

    pub(super) fn take_undone(&mut self, index: usize, holder: &Holder, seq: u64, state: &ReplicaState) {
        let undoing = match &self.flight {
            Some(Flight { op, stage: Stage::Undoing(_), .. }) => Some(op.seq),
            _ => None,
        };
        let last = self.window.last();
        let Some(shard) = self.shards.get(index).filter(|shard| shard.epoch == state.epoch) else { return };
        let found = self.find(shard, state);
        let Some(member) = self.shards.get_mut(index).and_then(|shard| shard.get_mut(holder)) else { return };
        if !member.is_member() {
            return self.take_back_in_round(index, holder, state);
        }
        if member.asked != Asked::Undo || undoing != Some(seq) {
            return;
        }
        member.asked = Asked::Undone;
        match found {
            Found::Level(applied) if applied == last => member.applied = Some(last),
            Found::Behind if state.op_seq < last => member.applied = Some(state.op_seq),
            _ => self.drop_member(index, holder),
        }
    }

    /// Does what is due about the op in flight; returns whether anything changed.
    pub(super) fn settle_flight(&mut self) -> bool {
        let Some(flight) = &self.flight else { return false };
        let (op, is_undoable) = (flight.op, flight.op.change.is_undoable());
        let all_idle = self.shards.iter().all(|shard| shard.step == Step::Idle);
        match &flight.stage {
            Stage::Applying | Stage::Parked => {
                let has_enough = |shard: &Shard| {
                    let holders = shard.members().filter(|member| member.applied == Some(op.seq));
                    shard.phase == Phase::Open && holders.count() >= self.acks
                };
                if all_idle && self.shards.iter().all(has_enough) {
                    self.commit(op);
                    return true;
                }
                let is_parked = matches!(flight.stage, Stage::Parked);
                if !(is_parked && is_undoable) {
                    self.send(op);
                }
                if is_parked {
                    return false;
                }
                let degraded = self.shards.iter().find(|shard| shard.phase == Phase::Degraded);
                let Some(error) = degraded.map(|shard| self.under_replicated(shard, true)) else {
                    return false;
                };
                let is_abandoned = is_undoable && self.flight_writer() < self.writer_epoch;
                let stage = if is_abandoned { Stage::Undoing(None) } else { Stage::Parked };
                self.actions.push(LedgerAction::Answer { seq: op.seq, result: Err(error) });
                if let Some(flight) = &mut self.flight {
                    flight.stage = stage;
                }
                true
            }
            Stage::Undoing(error) => {
                let is_done = |shard: &Shard| shard.is_undone() && !shard.is_dirty;
                if all_idle && self.shards.iter().all(is_done) {
                    if let Some(error) = error.clone() {
                        self.actions.push(LedgerAction::Answer { seq: op.seq, result: Err(error) });
                    }
                    self.end_flight();
                    return true;
                }
                self.send_undo(op);
                false
            }
        }
    }

    fn flight_writer(&self) -> u64 {
        self.flight.as_ref().map_or(self.writer_epoch, |flight| flight.writer_epoch)
    }

    fn end_flight(&mut self) {
        self.flight = None;
        for shard in &mut self.shards {
            shard.flight_chain = None;
            shard.members_mut().for_each(|member| member.asked = Asked::Nothing);
        }
    }

    /// The op has happened.
    fn commit(&mut self, op: Op) {
        let answer = op.change.apply(&mut self.tokens, &mut self.generation, &mut self.sealed);
        self.window.push(op.digest, answer);
        for shard in &mut self.shards {
            shard.chain = shard.flight_chain.unwrap_or(shard.chain);
        }
        self.end_flight();
        self.actions.push(LedgerAction::Answer { seq: op.seq, result: Ok(answer) });
        let far_behind = |applied: Option<u64>| applied.unwrap_or(0) + WINDOW as u64 <= op.seq;
        for shard in &mut self.shards {
            let stragglers = shard.members().filter(|member| far_behind(member.applied));
            for holder in stragglers.map(|member| member.holder.clone()).collect::<Vec<_>>() {
                shard.drop_member(&holder);
            }
        }
    }

    /// Sends the op to members who haven't been asked in this epoch and don't have it.
    fn send(&mut self, op: Op) {
        for (index, shard) in self.shards.iter_mut().enumerate() {
            let epoch = shard.epoch;
            for member in shard.members_mut() {
                if member.asked == Asked::Nothing && member.applied != Some(op.seq) {
                    member.asked = Asked::Op;
                    let (holder, generation) = (member.holder.clone(), self.generation);
                    self.actions.push(LedgerAction::Send { shard: index, holder, epoch, generation, op });
                }
            }
        }
    }

    fn send_undo(&mut self, op: Op) {
        for (index, shard) in self.shards.iter_mut().enumerate() {
            let epoch = shard.epoch;
            for member in shard
                .members_mut()
                .filter(|member| member.asked == Asked::Nothing || member.asked == Asked::Op)
            {
                member.asked = Asked::Undo;
                let (holder, seq, digest) = (member.holder.clone(), op.seq, op.digest);
                self.actions.push(LedgerAction::Undo { shard: index, holder, epoch, seq, digest });
            }
        }
    }

    pub(super) fn drop_member(&mut self, index: usize, holder: &Holder) {
        if let Some(shard) = self.shards.get_mut(index) {
            shard.drop_member(holder);
        }
    }
}
