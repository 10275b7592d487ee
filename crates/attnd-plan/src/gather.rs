//! Takes every partial of a call exactly once.
//!
//! A merge is not idempotent: a partial that is merged twice, or not at all, is a silently wrong answer. So there is
//! one cell per (kv group, tree node, token range), known in advance from the plan; each is filled once, by the worker
//! that was asked, with the number of keys that the plan counted; and nothing leaves before its row of cells is full.
//!
//! A client chooses the shape, so cells cost nothing until they are filled: a row that left is one bit, a row in flight
//! has its partials, and the others have nothing.

use std::collections::BTreeMap;
use std::ops::Range;

use attnd_kernel::AttnShape;
use attnd_kernel::slot::Node;

use crate::cover::{VerifiedPlan, filled_nodes};
use crate::planner::Piece;

/// What a partial says it covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CellId {
    /// Kv group, flattened over the batch.
    pub group: usize,
    /// Node of the canonical tree.
    pub node: Node,
    /// First query token.
    pub first_token: usize,
    /// Query tokens.
    pub tokens: usize,
    /// Keys that the node holds.
    pub keys: usize,
}

/// The cells of a share, in the order in which its worker sends them where the groups came in the order of their indices:
/// all nodes of some tokens of a group, then the next tokens, then the next group. Rows then leave while others are still
/// computed.
pub fn cells(pieces: &[Piece], shape: &AttnShape, tokens_per_cell: usize) -> Vec<CellId> {
    let tokens_per_cell = tokens_per_cell.max(1);
    let mut cells = Vec::new();
    for piece in pieces {
        let nodes = filled_nodes(piece.slots.clone(), shape.n_keys());
        for group in piece.groups.clone() {
            for first_token in (0..shape.n_queries()).step_by(tokens_per_cell) {
                let tokens = tokens_per_cell.min(shape.n_queries() - first_token);
                cells.extend(nodes.iter().map(|(node, keys)| CellId {
                    group,
                    node: *node,
                    first_token,
                    tokens,
                    keys: *keys,
                }));
            }
        }
    }
    cells
}

/// All partials of some tokens of a group: they tile its keys, and can merge.
#[derive(Debug)]
pub struct Ready<P> {
    /// Kv group, flattened over the batch.
    pub group: usize,
    /// Query tokens.
    pub tokens: Range<usize>,
    /// One per node, ascending by slots: what [`crate::fold()`] takes.
    pub parts: Vec<(Node, P)>,
}

/// Why a partial was refused; nothing was changed by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GatherError {
    /// The plan has fewer shares.
    #[error("share {share} of {shares}")]
    UnknownShare {
        /// Who sent it.
        share: usize,
        /// Shares of the plan.
        shares: usize,
    },
    /// The plan has no such cell: no such group, or a node that nobody was asked for.
    #[error("group {group} node {}/{} is in no share", node.level(), node.index())]
    UnknownCell {
        /// Kv group.
        group: usize,
        /// Node.
        node: Node,
    },
    /// Somebody else was asked for it.
    #[error("group {group} node {}/{} belongs to share {owner}, came from {share}", node.level(), node.index())]
    NotOwner {
        /// Kv group.
        group: usize,
        /// Node.
        node: Node,
        /// Who was asked.
        owner: usize,
        /// Who sent it.
        share: usize,
    },
    /// The token range is none of those agreed on.
    #[error("tokens {first_token}+{tokens}, expected multiples of {tokens_per_cell} in 0..{n_queries}")]
    TokenRange {
        /// First token received.
        first_token: usize,
        /// Tokens received.
        tokens: usize,
        /// Tokens in a cell; the last one of a group may have fewer.
        tokens_per_cell: usize,
        /// Query tokens of the call.
        n_queries: usize,
    },
    /// The worker merged another number of keys than the node holds.
    #[error("group {group} node {}/{}: {got} keys, expected {expected}", node.level(), node.index())]
    KeyCount {
        /// Kv group.
        group: usize,
        /// Node.
        node: Node,
        /// By the plan.
        expected: usize,
        /// By the worker.
        got: usize,
    },
    /// It came before.
    #[error("group {group} node {}/{} tokens from {first_token} came twice", node.level(), node.index())]
    Duplicate {
        /// Kv group.
        group: usize,
        /// Node.
        node: Node,
        /// First token of the cell.
        first_token: usize,
    },
}

/// One node that somebody was asked for.
#[derive(Clone, Copy, Debug)]
struct Asked {
    node: Node,
    keys: usize,
    share: usize,
}

/// One bit for each (kv group, token range).
#[derive(Debug)]
pub(crate) struct Bits(Vec<u64>);

impl Bits {
    pub(crate) fn new(n: usize) -> Self {
        Self(vec![0; n.div_ceil(64)])
    }

    pub(crate) fn is_set(&self, at: usize) -> bool {
        self.0.get(at / 64).is_some_and(|word| word >> (at % 64) & 1 == 1)
    }

    pub(crate) fn set(&mut self, at: usize) {
        if let Some(word) = self.0.get_mut(at / 64) {
            *word |= 1 << (at % 64);
        }
    }
}

/// The cells of a call.
#[derive(Debug)]
pub struct Gather<P> {
    n_queries: usize,
    tokens_per_cell: usize,
    /// Token ranges of a group.
    n_ranges: usize,
    /// Of each group, ascending by slots.
    asked: Vec<Vec<Asked>>,
    /// Rows with a partial, by `group * n_ranges + range`. Each partial is beside its place in `asked`, ascending.
    waiting: BTreeMap<usize, Vec<(usize, P)>>,
    /// Rows that left.
    emitted: Bits,
    /// Of each share.
    missing: Vec<usize>,
}

impl<P> Gather<P> {
    /// Empty cells for everything that `plan` asks for.
    pub fn new(plan: &VerifiedPlan) -> Self {
        let shape = plan.shape();
        let tokens_per_cell = plan.tokens_per_cell.max(1);
        let n_ranges = shape.n_queries().div_ceil(tokens_per_cell);
        let mut asked = vec![Vec::new(); shape.n_groups()];
        let mut missing = vec![0; plan.shares.len()];
        for (share, (of_worker, missing)) in plan.shares.iter().zip(&mut missing).enumerate() {
            for piece in &of_worker.pieces {
                let nodes = filled_nodes(piece.slots.clone(), shape.n_keys());
                for group in asked.iter_mut().skip(piece.groups.start).take(piece.groups.len()) {
                    group.extend(nodes.iter().map(|(node, keys)| Asked { node: *node, keys: *keys, share }));
                    *missing += nodes.len() * n_ranges;
                }
            }
        }
        for group in &mut asked {
            group.sort_by_key(|asked| asked.node.slots().start);
        }
        let emitted = Bits::new(asked.len() * n_ranges);
        let n_queries = shape.n_queries();
        Self { n_queries, tokens_per_cell, n_ranges, asked, waiting: BTreeMap::new(), emitted, missing }
    }

    /// Takes one partial. When it was the last of its group and tokens, all of them leave together.
    pub fn accept(&mut self, share: usize, cell: CellId, part: P) -> Result<Option<Ready<P>>, GatherError> {
        let CellId { group, node, first_token, tokens, keys } = cell;
        let shares = self.missing.len();
        let missing = self.missing.get_mut(share).ok_or(GatherError::UnknownShare { share, shares })?;
        let unknown = GatherError::UnknownCell { group, node };
        let nodes = self.asked.get(group).ok_or(unknown)?;
        let (place, asked) = nodes.iter().enumerate().find(|(_, asked)| asked.node == node).ok_or(unknown)?;
        if asked.share != share {
            return Err(GatherError::NotOwner { group, node, owner: asked.share, share });
        }
        let (tokens_per_cell, n_queries) = (self.tokens_per_cell, self.n_queries);
        let bad_tokens = GatherError::TokenRange { first_token, tokens, tokens_per_cell, n_queries };
        let agreed = tokens_per_cell.min(n_queries.saturating_sub(first_token));
        if first_token >= n_queries || first_token % tokens_per_cell != 0 || tokens != agreed {
            return Err(bad_tokens);
        }
        if keys != asked.keys {
            return Err(GatherError::KeyCount { group, node, expected: asked.keys, got: keys });
        }
        let duplicate = GatherError::Duplicate { group, node, first_token };
        let row = group * self.n_ranges + first_token / tokens_per_cell;
        if self.emitted.is_set(row) {
            return Err(duplicate);
        }
        let mut parts = self.waiting.remove(&row).unwrap_or_default();
        let found = parts.binary_search_by_key(&place, |(place, _)| *place);
        if let Err(at) = found {
            parts.insert(at, (place, part));
            *missing -= 1;
        }
        if parts.len() < nodes.len() {
            self.waiting.insert(row, parts);
            return if found.is_ok() { Err(duplicate) } else { Ok(None) };
        }
        self.emitted.set(row);
        let parts = nodes.iter().map(|asked| asked.node).zip(parts.into_iter().map(|(_, part)| part));
        Ok(Some(Ready { group, tokens: first_token..first_token + tokens, parts: parts.collect() }))
    }

    /// Whether the row with this token left.
    pub(crate) fn has_left(&self, group: usize, token: usize) -> bool {
        token < self.n_queries && self.emitted.is_set(group * self.n_ranges + token / self.tokens_per_cell)
    }

    /// Whether every cell was filled.
    pub fn is_complete(&self) -> bool {
        self.missing.iter().all(|missing| *missing == 0)
    }

    /// Cells that a share still owes; 0 for a share that the plan doesn't have.
    pub fn missing_of(&self, share: usize) -> usize {
        self.missing.get(share).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use attnd_kernel::Dims;

    use super::*;
    use crate::planner::Plan;
    use crate::planner::tests::{any_call, planned};

    /// Every cell of a plan and the share that owes it.
    fn all_cells(plan: &Plan, shape: &AttnShape) -> Vec<(usize, CellId)> {
        let of_share = |share: usize| cells(&plan.shares[share].pieces, shape, plan.tokens_per_cell);
        (0..plan.shares.len())
            .flat_map(|share| of_share(share).into_iter().map(move |cell| (share, cell)))
            .collect()
    }

    /// The call with the most cells: 65536 token ranges of one token, and 64 nodes of each.
    fn most_cells() -> VerifiedPlan {
        let dims = Dims {
            batch: 1,
            heads: 1024,
            kv_heads: 1,
            queries: 65_536,
            keys: 1 << 20,
            head_dim: 1,
            value_dim: 512,
        };
        let (shape, plan) = planned(&(dims, vec![(100.0, 1.0); 64]), u64::MAX).unwrap();
        assert_eq!((plan.tokens_per_cell, plan.shares.len()), (1, 64));
        plan.verify(&shape).unwrap()
    }

    /// No machine has room for one partial of this, nor for an empty place for it.
    type Vast = [u8; 1 << 46];

    #[test]
    fn cells_take_no_memory_before_they_are_filled() {
        let gather = Gather::<Vast>::new(&most_cells());
        assert_eq!(gather.emitted.0.len(), 65_536 / 64);
        assert!(gather.waiting.is_empty() && !gather.is_complete());
        assert_eq!(gather.missing_of(63), 65_536);
    }

    #[test]
    fn rows_in_flight_hold_their_partials_and_nothing_else() {
        let plan = most_cells();
        let mut gather = Gather::new(&plan);
        let cell = |share: usize, first_token: usize| CellId {
            group: 0,
            node: Node::new(0, share as u32).unwrap(),
            first_token,
            tokens: 1,
            keys: (1 << 20) / 64,
        };
        // A worker that runs ahead of all others.
        for token in 0..1000 {
            assert!(gather.accept(5, cell(5, token), [0_u8; 100]).unwrap().is_none());
        }
        let places: usize = gather.waiting.values().map(Vec::capacity).sum();
        assert!(gather.waiting.len() == 1000 && places <= 4000, "{places} places for 1000 partials");
        for share in (0..64).filter(|share| *share != 5) {
            let ready = gather.accept(share, cell(share, 7), [0; 100]).unwrap();
            assert_eq!(ready.is_some(), share == 63);
        }
        assert_eq!(gather.waiting.len(), 999);
    }

    proptest! {
        #[test]
        fn every_row_leaves_once_with_all_its_keys(
            call in any_call(),
            tokens_per_cell in 1usize..=20,
            order in any::<prop::sample::Index>(),
            step in 1usize..1000,
        ) {
            let Some((shape, mut plan)) = planned(&call, 1 << 16) else { return Ok(()) };
            plan.tokens_per_cell = tokens_per_cell;
            let plan = plan.verify(&shape).unwrap();
            let mut gather = Gather::new(&plan);
            let mut cells = all_cells(&plan, &shape);
            let start = order.index(cells.len());
            cells.rotate_left(start);
            // A stride that is coprime to the count visits all.
            let n = cells.len();
            let gcd = |mut a: usize, mut b: usize| { while b > 0 { (a, b) = (b, a % b) } a };
            let step = (step..).find(|step| gcd(*step, n) == 1).unwrap();
            let mut left = BTreeMap::new();
            for i in 0..n {
                prop_assert!(!gather.is_complete());
                let (share, cell) = cells[i * step % n];
                let owed = gather.missing_of(share);
                if let Some(ready) = gather.accept(share, cell, cell.keys).unwrap() {
                    let keys: usize = ready.parts.iter().map(|(_, keys)| keys).sum();
                    prop_assert_eq!(keys, shape.n_keys());
                    prop_assert!(ready.parts.is_sorted_by(|a, b| a.0.slots().end <= b.0.slots().start));
                    prop_assert_eq!(left.insert((ready.group, ready.tokens.start), ready.tokens.len()), None);
                }
                prop_assert_eq!(gather.missing_of(share), owed - 1);
                let again = gather.accept(share, cell, cell.keys).unwrap_err();
                let duplicate = GatherError::Duplicate { group: cell.group, node: cell.node, first_token: cell.first_token };
                prop_assert_eq!(again, duplicate);
            }
            prop_assert!(gather.is_complete());
            let tokens: usize = left.values().sum();
            prop_assert_eq!(tokens, shape.n_groups() * shape.n_queries());
        }

        #[test]
        fn a_cell_that_was_not_asked_for_changes_nothing(call in any_call(), which in any::<prop::sample::Index>()) {
            let Some((shape, mut plan)) = planned(&call, 1 << 16) else { return Ok(()) };
            plan.tokens_per_cell = 3;
            let plan = plan.verify(&shape).unwrap();
            let mut gather = Gather::<()>::new(&plan);
            let cells = all_cells(&plan, &shape);
            let (share, cell) = cells[which.index(cells.len())];
            let shares = plan.shares.len();
            let owed: Vec<usize> = (0..shares).map(|share| gather.missing_of(share)).collect();

            let mut refuse = |share, cell| gather.accept(share, cell, ()).unwrap_err();
            prop_assert_eq!(refuse(shares, cell), GatherError::UnknownShare { share: shares, shares });
            if shares > 1 {
                let other = (share + 1) % shares;
                let not_owner = GatherError::NotOwner { group: cell.group, node: cell.node, owner: share, share: other };
                prop_assert_eq!(refuse(other, cell), not_owner);
            }
            let no_group = refuse(share, CellId { group: shape.n_groups(), ..cell });
            prop_assert_eq!(no_group, GatherError::UnknownCell { group: shape.n_groups(), node: cell.node });
            if let Some((child, _)) = cell.node.children() {
                let finer = refuse(share, CellId { node: child, ..cell });
                prop_assert_eq!(finer, GatherError::UnknownCell { group: cell.group, node: child });
            }
            let counted = refuse(share, CellId { keys: cell.keys + 1, ..cell });
            let key_count =
                GatherError::KeyCount { group: cell.group, node: cell.node, expected: cell.keys, got: cell.keys + 1 };
            prop_assert_eq!(counted, key_count);
            for (first_token, tokens) in [
                (cell.first_token + 1, cell.tokens),
                (cell.first_token, cell.tokens + 1),
                (cell.first_token, 0),
                (usize::MAX, 1),
                (shape.n_queries().next_multiple_of(3), 3),
            ] {
                let refused = refuse(share, CellId { first_token, tokens, ..cell });
                prop_assert!(matches!(refused, GatherError::TokenRange { .. }), "{:?}", refused);
            }
            prop_assert_eq!((0..shares).map(|share| gather.missing_of(share)).collect::<Vec<_>>(), owed);
            prop_assert!(gather.accept(share, cell, ()).is_ok());
        }
    }
}
