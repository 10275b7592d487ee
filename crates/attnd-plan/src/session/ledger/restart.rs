//! Sessions that begin with tokens: those of a coordinator that has just started, and children of a fork.

use std::time::Duration;

use super::flight::{Flight, Stage};
use super::shard::{Member, Shard, Standing, Step};
use super::{Ledger, LedgerAction, Phase, SavedShard};
use crate::session::op::{Answer, Change, Holder, Op, Record, longest};
use crate::session::replica::ReplicaState;
use crate::session::spec::SessionSpec;
use crate::session::window::Window;

/// Whether the ops are known that came before this coordinator.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Past {
    Known,
    Unknown,
    /// Who remembers them has been asked.
    Asked(Holder),
}

impl<E: Clone> Ledger<E> {
    /// The child of this session, as soon as the fork is answered: its shards have the same holders, and epoch 1. The caller saves it
    /// before anybody is told of it; better, before it begins the fork, and forgets it if that doesn't come about. Then it has done what
    /// [`Self::start`] says.
    pub fn fork(&self, now: Duration) -> Self {
        let last = self.window.last();
        let child_of = |shard: &Shard| {
            let holders = shard.members.iter().filter(|member| {
                matches!(
                    member.standing,
                    Standing::Member | Standing::Fencing | Standing::Fenced(_) | Standing::Level
                )
            });
            // Who hasn't the fork yet will have it before it has anything of the child.
            let member = |member: &Member| {
                let applied = (member.applied >= Some(last)).then_some(0);
                Member::new(member.holder.clone(), Standing::Member, applied)
            };
            Shard {
                members: holders.clone().map(member).collect(),
                // Whoever was copied has what the parent had, and nothing of the child: it is asked.
                is_dirty: holders.clone().any(|member| !member.has_child(last)),
                ..Shard::open(1, Vec::new(), shard.chain)
            }
        };
        Self {
            writer_epoch: 1,
            generation: 0,
            tokens: self.tokens.clone(),
            sealed: false,
            window: Window::default(),
            flight: None,
            shards: self.shards.iter().map(child_of).collect(),
            is_restarting: false,
            past: Past::Known,
            unconfirmed: None,
            lost: None,
            used: now,
            actions: Vec::new(),
            #[cfg(test)]
            skips_fences: false,
            ..*self
        }
    }

    /// What a child does first.
    pub fn start(&mut self) -> Vec<LedgerAction<E>> {
        self.settle();
        std::mem::take(&mut self.actions)
    }

    /// A session of a coordinator that has just started, from what is in the durable store. It answers `RECOVERING` until all holders
    /// have been fenced, or reported lost.
    ///
    /// The length is the least over shards of the longest replica of each. No op begins before the one before it is on enough replicas
    /// of every shard, so replicas that are longest differ by one op at most; and an append that only some shards have was
    /// acknowledged by nobody, and is taken back. Other ops have no bytes, and are finished.
    pub fn recover(
        spec: &SessionSpec,
        writer_epoch: u64,
        shards: Vec<SavedShard>,
        now: Duration,
    ) -> (Self, Vec<LedgerAction<E>>) {
        let mut ledger = Self::new(spec, Vec::new(), now);
        ledger.writer_epoch = writer_epoch;
        ledger.is_restarting = true;
        for (index, saved) in shards.into_iter().enumerate() {
            let members = saved.members.len();
            let mut shard = Shard::open(saved.epoch, saved.members, 0);
            // Of those, as many have to be heard that one has every op that so many acknowledged.
            shard.saved = shard.members.iter().map(|member| member.holder.clone()).collect();
            shard.quorum = if members < spec.acks { 1 } else { members - spec.acks + 1 };
            shard.members.iter_mut().for_each(|member| member.applied = None);
            ledger.shards.push(shard);
            ledger.start_round(index);
        }
        ledger.settle();
        let actions = std::mem::take(&mut ledger.actions);
        (ledger, actions)
    }

    /// Finds out how long the session is, once everyone has said what it has; returns whether anything changed.
    pub(super) fn choose_session(&mut self) -> bool {
        for index in 0..self.shards.len() {
            let Some(shard) = self.shards.get(index) else { return false };
            if shard.has(|standing| *standing == Standing::Warm) {
                return self.start_round(index);
            }
        }
        if self.shards.iter().any(|shard| shard.has(|standing| *standing == Standing::Fencing)) {
            return false;
        }
        let best = |shard: &Shard| shard.heard().map(|state| state.op_seq).max();
        let most = self.shards.iter().filter_map(best).max().unwrap_or(0);
        for index in 0..self.shards.len() {
            let Some(shard) = self.shards.get(index) else { return false };
            let heard = shard.heard().count();
            let prefix = shard.heard().map(|state| longest(&state.tokens)).max().unwrap_or(0);
            if heard < shard.quorum || best(shard).is_none_or(|best| best + 1 < most) {
                // Even if this shard is lost, others say how much there was.
                let may_say =
                    |shard: &Shard| !shard.absent.is_empty() && shard.heard().count() < shard.quorum;
                if self.shards.iter().any(may_say) {
                    return false;
                }
                // What is known of its length is what somebody still has.
                let all = || self.shards.iter().flat_map(Shard::heard);
                let most = |layer: usize| all().filter_map(|state| state.tokens.get(layer)).max();
                self.tokens = (0..self.layers).map(|layer| most(layer).copied().unwrap_or(0)).collect();
                return self.wait_or_lose(index, prefix);
            }
        }
        let least = self.shards.iter().filter_map(best).min().unwrap_or(0);
        let Some(base) =
            self.shards.iter().flat_map(Shard::heard).find(|state| state.op_seq == least).cloned()
        else {
            return false;
        };
        self.begin_at(base);
        let states = self.shards.iter().flat_map(Shard::heard);
        let beyond = states.filter(|state| state.op_seq == most).find_map(|state| state.last);
        if let Some(op) = beyond.filter(|op| most > least && !op.change.is_undoable()) {
            self.flight = Some(Flight { op, writer_epoch: self.writer_epoch, stage: Stage::Applying });
        }
        for shard in &mut self.shards {
            let chain = shard.heard().find_map(|state| match state.op_seq {
                seq if seq == least => Some(state.chain),
                seq if seq == least + 1 => Some(state.chain_before),
                _ => None,
            });
            shard.chain = chain.unwrap_or(0);
        }
        self.is_restarting = false;
        self.past = if self.window.is_whole() { Past::Known } else { Past::Unknown };
        true
    }

    /// The session is what this replica has.
    fn begin_at(&mut self, base: ReplicaState) {
        self.window = Window::after(base.op_seq);
        // Where another op came after it and was taken back, it was acknowledged.
        self.unconfirmed = base.last.filter(|op| op.seq == base.op_seq);
        if let Some(op) = base.last.filter(|op| op.seq == base.op_seq) {
            let (layer, child) = match op.change {
                Change::Append { layer, .. } => (Some(layer), None),
                Change::Fork { child } => (None, Some(child)),
                Change::Truncate { .. } | Change::Seal => (None, None),
            };
            let len = layer.and_then(|layer| base.tokens.get(layer).copied());
            let len = len.unwrap_or_else(|| longest(&base.tokens));
            let answer = Answer { len, generation: base.generation, child };
            self.window = Window::of(op.seq, &[Record { seq: op.seq, digest: op.digest, answer }]);
        }
        self.tokens = base.tokens;
        self.generation = base.generation;
        self.sealed = base.sealed;
    }

    /// Once every shard is open, the last op before this coordinator is on as many replicas as if it had been acknowledged.
    pub(super) fn confirm(&mut self) {
        let Some(seq) = self.unconfirmed.map(|op| op.seq) else { return };
        let has_enough = |shard: &Shard| {
            let level = shard.members().filter(|member| member.applied >= Some(seq)).count();
            shard.step == Step::Idle && shard.phase == Phase::Open && level >= self.acks
        };
        if !self.is_restarting && self.shards.iter().all(has_enough) {
            self.unconfirmed = None;
        }
    }

    /// The last op before this coordinator, as long as some that are left may lack it. Once all that are left have it, and are saved, it
    /// isn't lost without everything else: it may be looked at, if not yet acknowledged.
    pub(super) fn unseen(&self) -> Option<&Op> {
        let op = self.unconfirmed.as_ref()?;
        let is_on_all = |shard: &Shard| {
            let have_it = shard.members().all(|member| member.applied >= Some(op.seq));
            let is_settled = shard.step == Step::Idle && !shard.is_dirty && shard.absent.is_empty();
            is_settled && have_it && shard.member_count() > 0
        };
        Some(op).filter(|_| !self.shards.iter().all(is_on_all))
    }

    /// Asks somebody for the ops before, once a shard can be read; returns whether anything changed.
    pub(super) fn ask_records(&mut self) -> bool {
        let is_settled = |shard: &Shard| shard.step == Step::Idle && shard.phase != Phase::Recovering;
        let Some(shard) = self.shards.iter().position(is_settled) else { return false };
        let Some(holder) = self.computing(shard).next().cloned() else { return false };
        self.past = Past::Asked(holder.clone());
        let epoch = self.epoch(shard);
        self.actions.push(LedgerAction::AskRecords { shard, holder, epoch });
        true
    }

    pub(super) fn take_records(&mut self, mut records: Vec<Record>) {
        if !matches!(self.past, Past::Asked(_)) {
            return;
        }
        let oldest = self.window.oldest();
        records.retain(|record| record.seq < oldest);
        records.extend(self.window.records());
        self.window = Window::of(self.window.last(), &records);
        self.past = Past::Known;
    }
}
