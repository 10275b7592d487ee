//! What workers hold, beside what sessions take them to hold: what nobody knows is released, what a session didn't know of is offered to it,
//! and it misses what isn't there any more.

use std::collections::BTreeSet;
use std::sync::Arc;

use attnd_plan::session::{Holder, LedgerEvent};
use attnd_wire::hold::ShardAt;

use super::Sessions;
use super::open::release;
use super::session::Session;
use crate::coordinator::hold_link::HoldLink;

/// A replica that a worker has as far as is known: a shard of a session, in this epoch.
pub(super) type ExpectedReplica = (Arc<Session>, usize, u64);

impl Sessions {
    /// What is at the other end of a link that was just opened: shards that nobody knows are released, and those of whose replicas
    /// their sessions don't know are offered to them.
    pub(super) fn take_stock(self: &Arc<Self>, link: &Arc<HoldLink>, shards: &[ShardAt]) {
        for at in shards {
            let (is_reserved, session) = {
                let table = self.table();
                (table.reserved.contains(&at.session), table.by_number.get(&at.session).cloned())
            };
            // It is being opened, or forked, at this moment; and still is, if nobody has given it up meanwhile.
            if is_reserved && (self.take_room(link, at) || self.table().reserved.contains(&at.session)) {
                continue;
            }
            if session.is_some_and(|session| !session.takes_in(self, link, at)) {
                self.tasks.spawn(release(self.term, Arc::clone(link), *at));
            }
        }
        self.release_unknown(link, shards);
    }

    /// The replicas that a worker has, as far as is known.
    pub(super) fn expected_at(&self, holder: &Holder) -> Vec<ExpectedReplica> {
        let mut expected = Vec::new();
        for session in self.open_sessions() {
            let state = session.lock();
            if state.ledger.is_lost() {
                continue;
            }
            let has = |shard: &usize| state.ledger.computing(*shard).any(|other| other == holder);
            let shards: Vec<(usize, u64)> = (0..state.ledger.shards())
                .filter(has)
                .map(|shard| (shard, state.ledger.epoch(shard)))
                .collect();
            drop(state);
            expected.extend(shards.into_iter().map(|(shard, epoch)| (Arc::clone(&session), shard, epoch)));
        }
        expected
    }

    /// Tells sessions of replicas that were expected and aren't among the shards that a worker was asked for after that: it has given them
    /// up.
    pub(super) fn miss(
        self: &Arc<Self>,
        holder: &Holder,
        expected: Vec<ExpectedReplica>,
        shards: &[ShardAt],
    ) {
        let there: BTreeSet<(u64, usize)> = shards.iter().map(|at| (at.session, at.shard as usize)).collect();
        for (session, shard, epoch) in expected {
            if there.contains(&(session.number, shard)) {
                continue;
            }
            // It may have been meant to go.
            let is_missed = {
                let state = session.lock();
                let is_same = state.closed.is_none() && state.ledger.epoch(shard) == epoch;
                is_same && state.ledger.computing(shard).any(|other| other == holder)
            };
            if !is_missed {
                continue;
            }
            tracing::warn!(session = %session.name, shard, worker = %holder.worker, "a replica is gone from its worker");
            session.handle(self, LedgerEvent::Gone { shard, holder: holder.clone(), epoch });
        }
    }

    /// Has those of a worker's shards released whose session isn't there, and isn't about to be.
    pub(super) fn release_unknown(&self, link: &Arc<HoldLink>, shards: &[ShardAt]) {
        let unknown: Vec<ShardAt> = {
            let table = self.table();
            let is_known = |at: &ShardAt| {
                table.reserved.contains(&at.session) || table.by_number.contains_key(&at.session)
            };
            shards.iter().filter(|at| !is_known(at)).copied().collect()
        };
        if !unknown.is_empty() {
            let (worker, shards) = (&link.holder.worker, unknown.len());
            tracing::debug!(%worker, shards, "shards that no session knows are released");
        }
        self.give_up(unknown.into_iter().map(|at| (at, Arc::clone(link))).collect());
    }

    /// Shards of a child that may come to be are given back if it doesn't, also where the coordinator before asked for room. Whether they
    /// are of one.
    fn take_room(&self, link: &Arc<HoldLink>, at: &ShardAt) -> bool {
        self.open_sessions().iter().any(|parent| {
            let mut state = parent.lock();
            let is_child = state.forks.contains_key(&at.session);
            if is_child {
                state.rooms.entry(at.session).or_default().push((*at, Arc::clone(link)));
            }
            is_child
        })
    }
}
