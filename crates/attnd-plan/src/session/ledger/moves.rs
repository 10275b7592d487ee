//! Replicas that are to be elsewhere: somebody leaves who stays a member until there is another one in its place.

use super::shard::{Member, Shard, Standing, Step};
use super::{Ledger, LedgerAction, Phase};
use crate::session::op::Holder;

impl<E: Clone> Ledger<E> {
    /// A worker wants to leave all shards.
    pub(super) fn drain(&mut self, holder: &Holder) {
        for shard in &mut self.shards {
            if let Some(member) = shard.get_mut(holder) {
                member.is_leaving = true;
            }
        }
    }

    /// Of a session that is lost nobody takes what is left from those who want to leave, and nobody needs it.
    pub(super) fn release_leaving(&mut self) {
        for (index, shard) in self.shards.iter_mut().enumerate() {
            let epoch = shard.epoch;
            for member in shard.members.extract_if(.., |member| member.is_leaving) {
                self.actions.push(LedgerAction::Release { shard: index, holder: member.holder, epoch });
            }
        }
    }

    /// `to` gets a replica of a shard and takes the place of `from`, unless either can't be.
    pub(super) fn move_replica(&mut self, index: usize, from: &Holder, to: Holder) {
        let Some(shard) = self.shards.get_mut(index) else { return };
        if shard.holders().any(|holder| *holder == to) {
            return;
        }
        let is_from = |member: &Member| member.holder == *from && member.is_member() && !member.is_leaving;
        let Some(place) = shard.members.iter().position(is_from) else { return };
        if let Some(leaves) = shard.members.get_mut(place) {
            leaves.is_leaving = true;
        }
        // Members are in the order in which they compute.
        shard.members.insert(place + 1, Member::new(to, Standing::Cold { in_round: false }, None));
    }

    /// Somebody who was to leave a shard doesn't.
    pub(super) fn keep(&mut self, index: usize, holder: &Holder) {
        if let Some(member) = self.shards.get_mut(index).and_then(|shard| shard.get_mut(holder)) {
            member.is_leaving = false;
        }
    }

    /// Who has something of a shard, or is getting it, and isn't about to leave: who else gets a replica is to be on other hosts.
    pub fn staying(&self, shard: usize) -> impl Iterator<Item = &Holder> + '_ {
        let shard = self.shards.get(shard);
        let staying = shard.into_iter().flat_map(|shard| &shard.members).filter(|member| !member.is_leaving);
        staying.map(|member| &member.holder).chain(shard.into_iter().flat_map(|shard| &shard.absent))
    }

    /// Whether every shard has as many members as it should, and nobody is about to become one or to leave.
    pub fn is_settled(&self) -> bool {
        let is_settled = |shard: &Shard| {
            let is_one = |member: &Member| member.is_member() && !member.is_leaving;
            shard.phase == Phase::Open
                && shard.step == Step::Idle
                && shard.members.iter().all(is_one)
                && shard.members.len() == self.replicas
        };
        !self.is_restarting && self.lost.is_none() && self.shards.iter().all(is_settled)
    }

    /// Whether a shard has fewer members than it should.
    pub fn is_short(&self, shard: usize) -> bool {
        self.shards.get(shard).is_none_or(|shard| shard.member_count() < self.replicas)
    }
}
