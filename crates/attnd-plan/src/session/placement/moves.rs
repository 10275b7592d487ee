//! What becomes of replicas when a worker is lost, and when one comes.

use super::{Keeper, ShardPlacement};
use crate::session::{Holder, SessionSpec};

/// A move brings the fuller of two workers down by at least this part of its memory, or isn't worth the copy.
const WORTH: f64 = 0.01;

/// A replica that would be better elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    /// Which shard.
    pub shard: usize,
    /// Who has it.
    pub from: Holder,
    /// Who shall have it, in the same place among the members.
    pub to: Holder,
}

/// Who holds a shard of `bytes` beside `members`, which are those that still do: of the workers that have room for it, are none of
/// them and on none of their hosts, the one with the most free memory. Where replicas may be on one host, such a worker comes after all
/// others. `None` if there is nobody.
pub fn replacement(spec: &SessionSpec, members: &[Keeper], bytes: u64, keepers: &[Keeper]) -> Option<Holder> {
    let candidates = keepers.iter().filter_map(|keeper| {
        let is_member = members.iter().any(|member| member.holder.worker == keeper.holder.worker);
        let is_apart = members.iter().all(|member| member.host != keeper.host);
        let may_be = !is_member && (is_apart || spec.allow_same_host) && keeper.free_bytes >= bytes;
        may_be.then_some((is_apart, keeper.free_bytes, keeper))
    });
    let best = candidates.max_by(|a, b| {
        let by_room = a.0.cmp(&b.0).then(a.1.cmp(&b.1));
        by_room.then_with(|| b.2.holder.cmp(&a.2.holder))
    });
    best.map(|(_, _, keeper)| keeper.holder.clone())
}

/// Which replicas of a session, at most `most`, should move to a worker that joined, one after the other: each from a worker whose
/// memory is fuller than the joined one's will be. `shards` have what a replica takes now; `keepers` are all workers, the joined one
/// among them. A shard of which a member is none of these stays as it is: nobody knows which host that is on.
pub fn rebalance(
    spec: &SessionSpec,
    shards: &[ShardPlacement],
    keepers: &[Keeper],
    joined: &Holder,
    most: usize,
) -> Vec<Move> {
    let mut scales = Scales::new(shards, keepers);
    let Some(to) = scales.index(joined) else { return Vec::new() };
    let mut moves = Vec::new();
    while moves.len() < most {
        let Some((shard, from)) = scales.best_move(spec, shards, to) else { break };
        let Some(keeper) = keepers.get(from) else { break };
        scales.carry_out(shard, shards[shard].bytes, from, to);
        moves.push(Move { shard, from: keeper.holder.clone(), to: joined.clone() });
    }
    moves
}

/// How full everybody is.
struct Scales<'a> {
    keepers: &'a [Keeper],
    /// Of each shard the indices of its members; `None` where one is unknown.
    members: Vec<Option<Vec<usize>>>,
    loads: Vec<u64>,
    /// What each holds, and what it may take beside it.
    sizes: Vec<u64>,
}

impl<'a> Scales<'a> {
    fn new(shards: &[ShardPlacement], keepers: &'a [Keeper]) -> Self {
        let index = |holder: &Holder| keepers.iter().position(|keeper| keeper.holder == *holder);
        let members = shards.iter().map(|shard| shard.members.iter().map(index).collect());
        let mut loads = vec![0_u64; keepers.len()];
        for shard in shards {
            for member in shard.members.iter().filter_map(index) {
                loads[member] = loads[member].saturating_add(shard.bytes);
            }
        }
        let sizes = keepers.iter().zip(&loads).map(|(keeper, load)| keeper.free_bytes.saturating_add(*load));
        Self { keepers, members: members.collect(), sizes: sizes.collect(), loads }
    }

    fn index(&self, holder: &Holder) -> Option<usize> {
        self.keepers.iter().position(|keeper| keeper.holder == *holder)
    }

    fn part(&self, i: usize, load: u64) -> f64 {
        load as f64 / self.sizes[i].max(1) as f64
    }

    fn primaries(&self, i: usize) -> usize {
        self.members.iter().flatten().filter(|members| members.first() == Some(&i)).count()
    }

    /// The move to `to` that brings the fuller one of both down the most. Of moves that are nearly as good it is one that leaves
    /// those who compute nothing something to do.
    fn best_move(&self, spec: &SessionSpec, shards: &[ShardPlacement], to: usize) -> Option<(usize, usize)> {
        let mut best: Option<((i64, bool), usize, usize)> = None;
        for (shard, members) in self.members.iter().enumerate() {
            let Some(members) = members else { continue };
            let bytes = shards[shard].bytes;
            if members.contains(&to) || self.loads[to].saturating_add(bytes) > self.sizes[to] {
                continue;
            }
            for from in members {
                let stay = members.iter().filter(|member| *member != from);
                let is_apart = stay.clone().all(|member| self.keepers[*member].host != self.keepers[to].host);
                if !is_apart && !spec.allow_same_host {
                    continue;
                }
                let before = self.part(*from, self.loads[*from]).max(self.part(to, self.loads[to]));
                let after_from = self.part(*from, self.loads[*from].saturating_sub(bytes));
                let gain = before - after_from.max(self.part(to, self.loads[to].saturating_add(bytes)));
                if gain < WORTH {
                    continue;
                }
                let is_primary = members.first() == Some(from);
                let suits = is_primary == (self.primaries(*from) > self.primaries(to) + 1);
                let key = ((gain / WORTH) as i64, suits);
                if best.is_none_or(|(other, _, _)| key > other) {
                    best = Some((key, shard, *from));
                }
            }
        }
        best.map(|(_, shard, from)| (shard, from))
    }

    fn carry_out(&mut self, shard: usize, bytes: u64, from: usize, to: usize) {
        self.loads[from] = self.loads[from].saturating_sub(bytes);
        self.loads[to] = self.loads[to].saturating_add(bytes);
        for member in self.members[shard].iter_mut().flatten().filter(|member| **member == from) {
            *member = to;
        }
    }
}
