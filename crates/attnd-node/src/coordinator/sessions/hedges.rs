//! Queries that are late are asked of another replica too, and the first answer counts: it has the same bits, and the other one is ignored
//! when it comes. When something is late, and how much may be asked twice, is for [`attnd_plan::session::Hedging`] to say.
//!
//! Only of replicas that have all that was acknowledged. Of a step that appends, not before its op has happened: whoever has to acknowledge
//! it is waited for anyway, and answers queries in the same message.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use attnd_plan::session::Holder;
use attnd_wire::surroundings::now;

use super::collector::{Collector, Flying, Sent};
use super::session::ShardOf;
use super::steps::{Asked, QueriesState, RowsState, Running};
use crate::coordinator::hold_link::HoldLink;

impl Collector {
    /// Who may compute a shard, the best first: of those who have all of it, first those that weren't slow of late.
    pub(super) fn in_order(&self, shard: &ShardOf) -> Vec<Holder> {
        let mut holders: Vec<Holder> = shard.links.iter().map(|link| link.holder.clone()).collect();
        if holders.len() > 1 {
            let (hedging, now) = (self.sessions.hedging(), self.sessions.now());
            if let Some(able) = holders.get_mut(..shard.able) {
                able.sort_by_key(|holder| hedging.is_slow(holder, now));
            }
        }
        holders
    }

    /// When the next message is late of which something can be asked of others.
    pub(super) fn due(&self) -> Option<Instant> {
        let can = |flying: &&Flying| flying.sent.iter().any(|sent| self.late(sent).is_some());
        self.flying.values().filter(|flying| flying.due.is_some()).filter(can).filter_map(|f| f.due).min()
    }

    /// Asks others for what is late by now.
    pub(super) fn hedge(&mut self) {
        let now = now();
        let is_late = |flying: &Flying| flying.due.is_some_and(|due| due <= now);
        let late: Vec<u64> =
            self.flying.iter().filter(|(_, flying)| is_late(flying)).map(|(number, _)| *number).collect();
        for number in late {
            let Some(flying) = self.flying.get(&number) else { continue };
            let chosen: Vec<(Sent, Arc<HoldLink>)> =
                flying.sent.iter().filter_map(|sent| Some((*sent, self.other(sent)?))).collect();
            if chosen.is_empty() {
                // Nobody else has all of it. Behind an op that hasn't happened yet, somebody may have it soon.
                if flying.sent.iter().any(|sent| self.late(sent).is_some()) {
                    self.give_hedge_up(number);
                }
                continue;
            }
            let (worker, parts) = (flying.link.holder.worker.clone(), chosen.len());
            let others: BTreeSet<&Holder> = chosen.iter().map(|(_, link)| &link.holder).collect();
            let may = self.sessions.hedging().hedge(others.len());
            tracing::debug!(%worker, parts, waited = ?now.saturating_duration_since(flying.since), may, "queries are late");
            self.give_hedge_up(number);
            for (sent, link) in chosen.into_iter().filter(|_| may) {
                let Some(Running { queries: QueriesState::Asked(asked), .. }) =
                    self.steps.get_mut(&sent.step)
                else {
                    continue;
                };
                if asked.attempt.hedge(sent.shard, &link.holder) {
                    self.ask_for(&link, Sent { again: 0, is_hedge: true, ..sent });
                }
            }
        }
        self.send();
    }

    /// Takes note of how long an answer took, and of whom it was faster than.
    pub(super) fn note(&mut self, answered: &Flying, is_first: bool) {
        let now = now();
        let mut hedging = self.sessions.hedging();
        if !answered.is_overtaken {
            let after = now.saturating_duration_since(answered.since);
            hedging.answered(&answered.link.holder, answered.work, after);
        }
        if !(answered.is_hedge && is_first) {
            return;
        }
        let is_same = |sent: &Sent| {
            let which = |sent: &Sent| (sent.step, sent.attempt, sent.shard);
            let is_it = |other: &Sent| which(other) == which(sent);
            sent.computes && answered.sent.iter().any(is_it)
        };
        hedging.won();
        for late in self.flying.values_mut().filter(|flying| flying.sent.iter().any(is_same)) {
            if !std::mem::replace(&mut late.is_overtaken, true) {
                let after = now.saturating_duration_since(late.since);
                let worker = &late.link.holder.worker;
                tracing::debug!(%worker, by = %answered.link.holder.worker, ?after, "a late answer isn't waited for");
                hedging.overtaken(&late.link.holder, late.work, after, self.sessions.now());
            }
        }
    }

    fn give_hedge_up(&mut self, number: u64) {
        if let Some(flying) = self.flying.get_mut(&number) {
            flying.due = None;
        }
    }

    /// What a part's queries wait for, if another replica may be asked for that.
    fn late(&self, sent: &Sent) -> Option<&Asked> {
        match self.steps.get(&sent.step).filter(|step| sent.computes && step.is_of(sent)) {
            Some(Running { rows: RowsState::None | RowsState::Settled(Ok(_)), queries, .. }) => match queries
            {
                QueriesState::Asked(asked) => {
                    asked.attempt.spare(sent.shard, |_| true).map(|_somebody| &**asked)
                }
                QueriesState::None | QueriesState::Failed(_) => None,
            },
            _ => None,
        }
    }

    /// Who else has the shard of a late part, with all that was acknowledged.
    fn other(&self, sent: &Sent) -> Option<Arc<HoldLink>> {
        let asked = self.late(sent)?;
        let session = &self.steps.get(&sent.step)?.of.session;
        let view = session.view();
        let shard = view.shards.get(sent.shard)?;
        let able = shard.links.get(..shard.able)?;
        let of = |holder: &Holder| able.iter().find(|link| link.holder == *holder && !link.is_lost());
        let spare = asked.attempt.spare(sent.shard, |holder| of(holder).is_some())?;
        of(spare).cloned()
    }
}
