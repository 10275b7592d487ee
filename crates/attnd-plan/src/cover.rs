//! The proof that a plan computes every key of every group exactly once, and the tree nodes that do it.

use std::ops::{Deref, Range};

use attnd_kernel::AttnShape;
use attnd_kernel::slot::{self, N_SLOTS, Node};

use crate::planner::Plan;
use crate::topology::WorkerId;

/// The canonical nodes that a worker sends partials of for `slots` of a sequence of `n_keys`, ascending, each with the
/// keys it holds. Nodes without keys are absent. Coordinator and worker both use this, so they can't disagree.
/// A range is cut off at the last slot; a verified plan has no piece that reaches further.
pub fn filled_nodes(slots: Range<usize>, n_keys: usize) -> Vec<(Node, usize)> {
    slot::cover(slots.start..slots.end.min(N_SLOTS))
        .into_iter()
        .map(|node| (node, slot::keys_in_slots(node.slots(), n_keys)))
        .filter(|(_, keys)| *keys > 0)
        .collect()
}

/// A plan whose shares tile (kv groups x slots) of a shape exactly once. Only [`Plan::verify`] makes one, and it can't
/// be changed; [`crate::Call`] and [`crate::Gather`] take no other plan, nor this one with another shape.
///
/// ```compile_fail,E0308
/// use attnd_plan::{Gather, Plan};
/// fn gather(unproven: &Plan) -> Gather<()> {
///     Gather::new(unproven)
/// }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct VerifiedPlan {
    plan: Plan,
    shape: AttnShape,
    keys: u64,
}

impl VerifiedPlan {
    /// The shape that the plan was verified for.
    pub fn shape(&self) -> &AttnShape {
        &self.shape
    }

    /// Keys over all kv groups, each computed once.
    pub fn keys(&self) -> u64 {
        self.keys
    }
}

impl Deref for VerifiedPlan {
    type Target = Plan;
    fn deref(&self) -> &Plan {
        &self.plan
    }
}

/// Why a plan would compute something twice or never.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CoverError {
    /// A piece is empty or reaches outside of the call.
    #[error("share {share}: groups {groups:?} slots {slots:?} of {n_groups} groups and {N_SLOTS} slots")]
    Piece {
        /// Which share.
        share: usize,
        /// Kv groups of the piece.
        groups: Range<usize>,
        /// Slots of the piece.
        slots: Range<usize>,
        /// Kv groups of the call.
        n_groups: usize,
    },
    /// Two pieces hold the same slot of the same group.
    #[error("group {group} slot {slot} belongs to share {first} and to share {second}")]
    Overlap {
        /// Kv group.
        group: usize,
        /// Slot.
        slot: usize,
        /// The share that had it.
        first: usize,
        /// The share that wants it as well.
        second: usize,
    },
    /// Nobody computes a slot of a group.
    #[error("group {group} slot {slot} belongs to no share")]
    Gap {
        /// Kv group.
        group: usize,
        /// Slot.
        slot: usize,
    },
    /// A share without keys.
    #[error("share {share} holds no key")]
    EmptyShare {
        /// Which share.
        share: usize,
    },
    /// A worker has two shares.
    #[error("worker {worker} has two shares")]
    Worker {
        /// Which worker.
        worker: WorkerId,
    },
    /// A cell without query tokens.
    #[error("0 tokens per cell")]
    Tokens,
}

impl Plan {
    /// Proves that this plan computes every key of every kv group of `shape` exactly once.
    pub fn verify(self, shape: &AttnShape) -> Result<VerifiedPlan, CoverError> {
        if self.tokens_per_cell == 0 {
            return Err(CoverError::Tokens);
        }
        let n_groups = shape.n_groups();
        let keys_of_slot: Vec<usize> =
            (0..N_SLOTS).map(|slot| slot::keys_in_slots(slot..slot + 1, shape.n_keys())).collect();
        let mut owners: Vec<Option<usize>> = vec![None; n_groups * N_SLOTS];
        let mut keys = 0;
        for (share, of_worker) in self.shares.iter().enumerate() {
            let mut keys_of_share = 0;
            for piece in &of_worker.pieces {
                let (groups, slots) = (piece.groups.clone(), piece.slots.clone());
                if groups.is_empty() || slots.is_empty() || groups.end > n_groups || slots.end > N_SLOTS {
                    return Err(CoverError::Piece { share, groups, slots, n_groups });
                }
                for group in groups {
                    for slot in slots.clone() {
                        let Some(owner) = owners.get_mut(group * N_SLOTS + slot) else { continue };
                        if let Some(first) = owner.replace(share) {
                            return Err(CoverError::Overlap { group, slot, first, second: share });
                        }
                        keys_of_share += keys_of_slot.get(slot).map_or(0, |keys| *keys as u64);
                    }
                }
            }
            if keys_of_share == 0 {
                return Err(CoverError::EmptyShare { share });
            }
            keys += keys_of_share;
        }
        if let Some(gap) = owners.iter().position(Option::is_none) {
            return Err(CoverError::Gap { group: gap / N_SLOTS, slot: gap % N_SLOTS });
        }
        let mut workers: Vec<&WorkerId> = self.shares.iter().map(|share| &share.worker).collect();
        workers.sort_unstable();
        if let Some([worker, _]) = workers.array_windows().find(|[a, b]| a == b) {
            return Err(CoverError::Worker { worker: (*worker).clone() });
        }
        Ok(VerifiedPlan { plan: self, shape: *shape, keys })
    }
}
