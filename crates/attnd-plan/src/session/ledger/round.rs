//! Rounds: how a shard gets another set of members.

use super::flight::{Found, Stage};
use super::restart::Past;
use super::shard::{Asked, Member, Shard, Standing, Step};
use super::{Ledger, LedgerAction, LedgerError, Phase};
use crate::session::op::{Holder, longest};
use crate::session::replica::ReplicaState;

impl<E: Clone> Ledger<E> {
    /// Does what is due about one shard; returns whether anything changed.
    pub(super) fn step(&mut self, index: usize) -> bool {
        let Some(shard) = self.shards.get(index) else { return false };
        match shard.step {
            Step::Idle => self.step_idle(index),
            Step::Fencing if self.is_restarting || shard.has(|standing| *standing == Standing::Fencing) => {
                false
            }
            Step::Fencing => self.choose(index),
            Step::Levelling => self.step_levelling(index),
            Step::Saving => false,
        }
    }

    fn step_idle(&mut self, index: usize) -> bool {
        let Some(shard) = self.shards.get(index) else { return false };
        let have = shard.member_count();
        let has_warm = shard.has(|standing| *standing == Standing::Warm);
        if have == 0 {
            return if has_warm { self.start_round(index) } else { self.wait_or_lose(index, 0) };
        }
        let staying = shard.members().filter(|member| !member.is_leaving).count();
        let may_leave = staying < have && staying >= self.replicas;
        let waits = match self.flight.as_ref().map(|flight| &flight.stage) {
            Some(Stage::Applying) => have >= self.acks,
            // Whoever is gone may have what was taken back here, and must not come back with it under another coordinator.
            Some(Stage::Undoing(_)) => !(shard.is_dirty && shard.is_undone()),
            Some(Stage::Parked) | None => false,
        };
        if (shard.is_dirty || has_warm || may_leave) && !waits {
            return self.start_round(index);
        }
        if shard.has(|standing| matches!(standing, Standing::Cold { .. })) {
            let from = self.computing(index).next().cloned();
            from.iter().for_each(|from| self.copy(index, from));
        }
        let Some(shard) = self.shards.get_mut(index) else { return false };
        let missing = shard.missing(self.replicas);
        if missing != shard.told_missing {
            shard.told_missing = missing;
            if missing > 0 {
                self.actions.push(LedgerAction::NeedReplica { shard: index, missing });
            }
        }
        false
    }

    /// Has everyone who needs a copy get one from this holder.
    fn copy(&mut self, index: usize, from: &Holder) {
        let Some(shard) = self.shards.get_mut(index) else { return };
        let epoch = shard.epoch;
        for member in &mut shard.members {
            if let Standing::Cold { in_round } = member.standing {
                member.standing = Standing::Copying { from: from.clone(), in_round };
                member.may_have = true;
                let (from, to) = (from.clone(), member.holder.clone());
                self.actions.push(LedgerAction::Copy { shard: index, from, to, epoch });
            }
        }
    }

    /// Begins a round: everyone who shall be a member is fenced.
    pub(super) fn start_round(&mut self, index: usize) -> bool {
        let Some(shard) = self.shards.get_mut(index) else { return false };
        shard.epoch += 1;
        shard.phase = Phase::Recovering;
        shard.step = Step::Fencing;
        shard.is_dirty = false;
        let epoch = shard.epoch;
        for member in &mut shard.members {
            member.asked = Asked::Nothing;
            match &mut member.standing {
                Standing::Cold { in_round } | Standing::Copying { in_round, .. } => *in_round = false,
                standing => {
                    *standing = Standing::Fencing;
                    let holder = member.holder.clone();
                    self.actions.push(LedgerAction::Fence { shard: index, holder, epoch });
                }
            }
        }
        true
    }

    pub(super) fn take_fenced(&mut self, index: usize, holder: &Holder, state: ReplicaState) {
        let Some(shard) = self.shards.get_mut(index).filter(|shard| shard.epoch == state.epoch) else {
            return;
        };
        if let Some(member) = shard.get_mut(holder).filter(|member| member.standing == Standing::Fencing) {
            member.standing = Standing::Fenced(Box::new(state));
        }
    }

    /// A replica is of a higher epoch, which a coordinator gave it that didn't come to save it.
    pub(super) fn outbid(&mut self, index: usize, holder: &Holder, epoch: u64) {
        let Some(shard) = self.shards.get_mut(index) else { return };
        let is_awaited = shard.get_mut(holder).is_some_and(|member| member.standing == Standing::Fencing);
        if is_awaited && epoch > shard.epoch {
            shard.epoch = epoch;
            self.start_round(index);
        }
    }

    /// Everyone has said what it has: finds out who is level.
    pub(super) fn choose(&mut self, index: usize) -> bool {
        let Some(shard) = self.shards.get(index) else { return false };
        let mut found = Vec::new();
        let mut prefix = 0;
        for member in &shard.members {
            if let Standing::Fenced(state) = &member.standing {
                prefix = prefix.max(longest(&state.tokens));
                found.push((member.holder.clone(), self.find(shard, state), state.chain, member.is_fresh));
            }
        }
        let has_warm = shard.has(|standing| *standing == Standing::Warm);
        let is_good = |(_, found, ..): &&(Holder, Found, u32, bool)| *found != Found::Behind;
        if found.iter().filter(is_good).count() == 0 {
            return if has_warm { self.start_round(index) } else { self.wait_or_lose(index, prefix) };
        }
        for (holder, found, chain, is_fresh) in found {
            // Others may have other bytes than the first one in the op in flight.
            let found = match self.shards.get(index).and_then(|shard| shard.flight_chain) {
                Some(first)
                    if matches!(found, Found::Level(seq) if seq > self.window.last()) && first != chain =>
                {
                    Found::Behind
                }
                _ => found,
            };
            self.set_level(index, &holder, found, chain, is_fresh);
        }
        if let Some(shard) = self.shards.get_mut(index) {
            shard.step = Step::Levelling;
        }
        true
    }

    fn set_level(&mut self, index: usize, holder: &Holder, found: Found, chain: u32, waits: bool) {
        if let Found::Level(applied) = found {
            self.mark_level(index, holder, applied, chain);
        }
        let Some(shard) = self.shards.get_mut(index) else { return };
        let epoch = shard.epoch;
        let Some(member) = shard.get_mut(holder) else { return };
        member.is_fresh = false;
        match found {
            Found::Level(applied) => {
                member.standing = Standing::Level;
                member.applied = Some(applied);
            }
            Found::TakeBack(op) => {
                member.standing = Standing::TakingBack;
                let holder = holder.clone();
                let (seq, digest) = (op.seq, op.digest);
                self.actions.push(LedgerAction::Undo { shard: index, holder, epoch, seq, digest });
            }
            Found::Behind => {
                member.standing = Standing::Cold { in_round: waits };
                (member.applied, member.done) = (None, None);
            }
        }
    }

    /// An op of nobody has been taken back, so that its replica is level.
    pub(super) fn take_back_in_round(&mut self, index: usize, holder: &Holder, state: &ReplicaState) {
        let Some(shard) = self.shards.get_mut(index).filter(|shard| shard.step == Step::Levelling) else {
            return;
        };
        if shard.get_mut(holder).is_some_and(|member| member.standing == Standing::TakingBack) {
            let Some(shard) = self.shards.get(index) else { return };
            let found = match self.find(shard, state) {
                Found::TakeBack(_) => Found::Behind,
                found => found,
            };
            self.set_level(index, holder, found, state.chain, false);
        }
    }

    fn step_levelling(&mut self, index: usize) -> bool {
        let Some(shard) = self.shards.get(index) else { return false };
        let is_level = |member: &&Member| member.standing == Standing::Level;
        let is_taking_back = shard.has(|standing| *standing == Standing::TakingBack);
        let Some(from) = shard.members.iter().find(is_level).map(|member| member.holder.clone()) else {
            return match shard.has(|standing| *standing == Standing::Warm) {
                _ if is_taking_back => false,
                true => self.start_round(index),
                false => self.wait_or_lose(index, 0),
            };
        };
        let awaits = |standing: &Standing| {
            matches!(standing, Standing::Cold { in_round: true } | Standing::Copying { in_round: true, .. })
        };
        if is_taking_back || shard.has(awaits) {
            if shard.has(|standing| *standing == Standing::Cold { in_round: true }) {
                self.copy(index, &from);
            }
            return false;
        }
        // Never more than there shall be, as an op is safe on so many of them: first those who stay.
        let level = || shard.members.iter().filter(is_level);
        let staying = level().filter(|member| !member.is_leaving);
        let in_order = staying.chain(level().filter(|member| member.is_leaving));
        let surplus: Vec<Holder> = in_order.skip(self.replicas).map(|member| member.holder.clone()).collect();
        surplus.iter().for_each(|holder| self.drop_member(index, holder));
        let Some(shard) = self.shards.get_mut(index) else { return false };
        shard.step = Step::Saving;
        shard.is_dirty = false;
        let members: Vec<Holder> =
            shard.members.iter().filter(is_level).map(|member| member.holder.clone()).collect();
        self.actions.push(LedgerAction::SaveMembers { shard: index, epoch: shard.epoch, members });
        true
    }

    /// The set is saved: its members count from now on.
    pub(super) fn open(&mut self, index: usize, epoch: u64) {
        let Some(shard) = self.shards.get_mut(index) else { return };
        if shard.step != Step::Saving || shard.epoch != epoch {
            return;
        }
        shard.step = Step::Idle;
        for member in shard.members.iter_mut().filter(|member| member.standing == Standing::Level) {
            member.standing = Standing::Member;
        }
        shard.phase = if shard.member_count() < self.acks { Phase::Degraded } else { Phase::Open };
        if shard.member_count() == 0 {
            // They may be all that is left.
            return;
        }
        for holder in std::mem::take(&mut shard.leavers) {
            self.actions.push(LedgerAction::Release { shard: index, holder, epoch });
        }
    }

    pub(super) fn take_copied(&mut self, index: usize, holder: &Holder, state: &ReplicaState) {
        let Some(shard) = self.shards.get(index) else { return };
        let found = self.find(shard, state);
        let is_in_step = shard.step == Step::Levelling && shard.epoch == state.epoch;
        let Some(member) = self.shards.get_mut(index).and_then(|shard| shard.get_mut(holder)) else { return };
        match (&member.standing, found) {
            (Standing::Copying { in_round: true, .. }, Found::Level(_)) if is_in_step => {
                self.set_level(index, holder, found, state.chain, false);
            }
            (Standing::Copying { in_round: true, .. }, _) => self.drop_member(index, holder),
            (Standing::Copying { in_round: false, .. }, _) => {
                member.standing = Standing::Warm;
                member.is_fresh = true;
                #[cfg(test)]
                if self.skips_fences {
                    (member.standing, member.applied) = (Standing::Member, Some(self.window.last()));
                }
            }
            _ => {}
        }
    }

    pub(super) fn end_copy(&mut self, index: usize, holder: &Holder) {
        let Some(shard) = self.shards.get_mut(index) else { return };
        if shard.get_mut(holder).is_some_and(|member| matches!(member.standing, Standing::Copying { .. })) {
            // As with every other who leaves, not before a set is saved in which it isn't.
            shard.drop_member(holder);
        }
    }

    /// Somebody shall be a member: who has a replica, or who gets one.
    pub(super) fn admit(&mut self, index: usize, holder: Holder, has_replica: bool) {
        let Some(shard) = self.shards.get_mut(index) else { return };
        if shard.get_mut(&holder).is_some() {
            return;
        }
        let was_absent = shard.absent.contains(&holder);
        shard.absent.retain(|absent| *absent != holder);
        if !was_absent && shard.missing(self.replicas) == 0 {
            let epoch = shard.epoch;
            self.actions.push(LedgerAction::Release { shard: index, holder, epoch });
            return;
        }
        shard.leavers.retain(|leaver| *leaver != holder);
        let standing = if has_replica { Standing::Warm } else { Standing::Cold { in_round: false } };
        shard.members.push(Member::new(holder, standing, None));
    }

    /// A holder is gone: for good, or until it comes back.
    pub(super) fn lose_holder(&mut self, holder: &Holder, may_return: bool) {
        for index in 0..self.shards.len() {
            self.lose_replica(index, holder, may_return);
        }
    }

    pub(super) fn lose_replica(&mut self, index: usize, holder: &Holder, may_return: bool) {
        if matches!(&self.past, Past::Asked(from) if from == holder) {
            self.past = Past::Unknown;
        }
        let Some(shard) = self.shards.get_mut(index) else { return };
        if may_return && shard.absent.contains(holder) {
            return;
        }
        shard.absent.retain(|absent| absent != holder);
        shard.leavers.retain(|leaver| leaver != holder);
        let Some(member) = shard.get_mut(holder) else { return };
        let is_incomplete = matches!(member.standing, Standing::Cold { .. } | Standing::Copying { .. });
        let counts = member.is_member() || member.standing == Standing::Level;
        shard.members.retain(|member| member.holder != *holder);
        shard.is_dirty |= counts;
        shard.forget_source(holder);
        if may_return && !is_incomplete {
            shard.absent.push(holder.clone());
        }
    }

    /// Nobody is known to have what was acknowledged: asks those who were to get it, or were left out, who may have it by now, before it is
    /// lost.
    pub(super) fn wait_or_lose(&mut self, index: usize, prefix: usize) -> bool {
        let Some(shard) = self.shards.get_mut(index) else { return false };
        let mut may_have = false;
        for member in shard.members.iter_mut().filter(|member| member.may_have && !self.is_restarting) {
            let is_incomplete = matches!(member.standing, Standing::Cold { .. } | Standing::Copying { .. });
            member.may_have = false;
            if is_incomplete {
                member.standing = Standing::Warm;
                may_have = true;
            }
        }
        // Who was left out may have got since what it lacked, and keeps it until a set without it is saved.
        for holder in if self.is_restarting { Vec::new() } else { std::mem::take(&mut shard.leavers) } {
            shard.members.push(Member::new(holder, Standing::Warm, None));
            may_have = true;
        }
        if may_have {
            return self.start_round(index);
        }
        if shard.absent.is_empty() {
            self.lose(index, prefix);
            return true;
        }
        shard.phase = Phase::Recovering;
        false
    }

    /// The session is lost: whatever is asked of it is answered so.
    pub(super) fn lose(&mut self, index: usize, prefix: usize) {
        let tokens = longest(&self.tokens);
        let prefix = prefix.min(tokens);
        self.lost = Some((prefix, tokens));
        if let Some(shard) = self.shards.get_mut(index) {
            shard.phase = Phase::Lost;
        }
        if let Some(flight) = self.flight.take() {
            let result = Err(LedgerError::SessionLost { prefix, tokens });
            self.actions.push(LedgerAction::Answer { seq: flight.op.seq, result });
        }
        self.release_leaving();
    }
}

impl Shard {
    /// What those of the saved set have who were fenced in this round.
    pub(super) fn heard(&self) -> impl Iterator<Item = &ReplicaState> + '_ {
        let saved = self.members.iter().filter(|member| self.saved.contains(&member.holder));
        saved.filter_map(|member| match &member.standing {
            Standing::Fenced(state) => Some(&**state),
            _ => None,
        })
    }
}
