//! A worker of the explorer: replicas with rows, and requests that come in order on streams.

use super::choice::Omission;
use crate::session::model::Token;
use crate::session::op::{Change, Holder, Op};
use crate::session::replica::{Replica, ReplicaState, Terms, Undone, Verdict};

/// What a worker is asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Ask {
    Op { shard: usize, epoch: u64, generation: u64, op: Op },
    Undo { shard: usize, epoch: u64, seq: u64, digest: u32 },
    Fence { shard: usize, epoch: u64 },
    Release { shard: usize, epoch: u64 },
}

/// What it says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Reply {
    Applied { shard: usize, seq: u64, state: ReplicaState },
    Refused { shard: usize, epoch: u64, seq: u64, is_final: bool },
    Undone { shard: usize, seq: u64, state: ReplicaState },
    Fenced { shard: usize, state: ReplicaState },
    FenceRefused { shard: usize, epoch: u64 },
    Gone { shard: usize, epoch: u64 },
    Copied { shard: usize, state: ReplicaState },
}

/// A replica with its rows, and all that ever was applied and not taken back.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Held {
    pub(super) replica: Replica,
    pub(super) rows: Vec<Vec<Token>>,
    pub(super) log: Vec<(u64, u32)>,
}

impl Held {
    pub(super) fn new(layers: usize) -> Self {
        Self { replica: Replica::new(layers, 1), rows: vec![Vec::new(); layers], log: Vec::new() }
    }

    fn apply(&mut self, shard: usize, op: &Op) {
        self.replica.apply(op, op.digest.rotate_left(shard as u32 + 1));
        self.log.push((op.seq, op.digest));
        match op.change {
            Change::Append { layer, tokens, .. } => {
                self.rows[layer].extend((0..tokens).map(|index| (op.digest, index)));
            }
            Change::Truncate { len } => self.rows.iter_mut().for_each(|rows| rows.truncate(len)),
            Change::Fork { .. } | Change::Seal => {}
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Worker {
    pub(super) holder: Holder,
    pub(super) is_alive: bool,
    pub(super) is_connected: bool,
    pub(super) terms: u64,
    pub(super) shards: Vec<Option<Held>>,
}

impl Worker {
    /// Answers a request of a coordinator with this term; `refuses` says that there is no memory for an append.
    pub(super) fn answer(
        &mut self,
        term: u64,
        ask: &Ask,
        refuses: bool,
        omission: Option<Omission>,
    ) -> Option<Reply> {
        let mut terms = Terms::default();
        terms.check(self.terms).ok()?;
        // A refusal for its term ends a coordinator.
        terms.check(term).ok()?;
        self.terms = terms.highest();
        let (Ask::Op { shard, .. }
        | Ask::Undo { shard, .. }
        | Ask::Fence { shard, .. }
        | Ask::Release { shard, .. }) = *ask;
        if let Ask::Release { epoch, .. } = *ask {
            let is_late = |held: &Held| held.replica.check_release(epoch).is_err();
            self.shards[shard] = self.shards[shard].take().filter(is_late);
            return None;
        }
        let Some(held) = &mut self.shards[shard] else {
            let (Ask::Op { epoch, .. } | Ask::Undo { epoch, .. } | Ask::Fence { epoch, .. }) = *ask else {
                return None;
            };
            return Some(Reply::Gone { shard, epoch });
        };
        Some(match *ask {
            Ask::Op { epoch, generation, op, .. } => {
                let asked = if omission == Some(Omission::EpochCheck) { held.replica.epoch() } else { epoch };
                match held.replica.begin(asked, generation, &op) {
                    Ok(Verdict::Apply) if refuses => {
                        Reply::Refused { shard, epoch, seq: op.seq, is_final: true }
                    }
                    Ok(Verdict::Replayed) if omission != Some(Omission::Dedup) => {
                        Reply::Applied { shard, seq: op.seq, state: held.replica.state() }
                    }
                    Ok(_) => {
                        held.apply(shard, &op);
                        Reply::Applied { shard, seq: op.seq, state: held.replica.state() }
                    }
                    Err(_) => Reply::Refused { shard, epoch, seq: op.seq, is_final: false },
                }
            }
            Ask::Undo { epoch, seq, digest, .. } => {
                let before = held.replica.clone();
                match held.replica.undo(epoch, seq, digest) {
                    Ok(Undone::TakenBack { .. }) if omission == Some(Omission::Undo) => {
                        let state = held.replica.state();
                        held.replica = before;
                        Reply::Undone { shard, seq, state }
                    }
                    Ok(undone) => {
                        if let Undone::TakenBack { layer, len } = undone {
                            held.rows[layer].truncate(len);
                            held.log.pop();
                        }
                        Reply::Undone { shard, seq, state: held.replica.state() }
                    }
                    Err(_) => Reply::Refused { shard, epoch, seq, is_final: false },
                }
            }
            Ask::Fence { epoch, .. } => match held.replica.fence(epoch) {
                Ok(()) => Reply::Fenced { shard, state: held.replica.state() },
                Err(_) => Reply::FenceRefused { shard, epoch: held.replica.epoch() },
            },
            Ask::Release { .. } => return None,
        })
    }
}
