//! The key axis: pages of 256 keys, 64 slots, and the fixed binary tree in which slots merge.
//!
//! A page is anchored at an absolute multiple of 256 and belongs to slot `bitreverse6(page mod 64)`, so the pages of
//! any prefix spread evenly over any contiguous range of slots.

use std::ops::Range;

/// Keys in a page.
pub const PAGE_KEYS: usize = 256;
/// Virtual shards of the key axis.
pub const N_SLOTS: usize = 64;
/// Levels of the tree above the slots: the root is `Node { level: 6, index: 0 }`.
pub const TREE_LEVELS: u8 = 6;

/// The slot of a page.
pub fn slot_of_page(page: usize) -> usize {
    let low = (page % N_SLOTS) as u8;
    usize::from(low.reverse_bits() >> 2)
}

/// Pages that `n_keys` keys occupy.
pub fn n_pages(n_keys: usize) -> usize {
    n_keys.div_ceil(PAGE_KEYS)
}

/// Keys in one page of a sequence of `n_keys`.
pub fn keys_in_page(page: usize, n_keys: usize) -> usize {
    n_keys.saturating_sub(page * PAGE_KEYS).min(PAGE_KEYS)
}

/// The pages of one slot of a sequence of `n_keys`, ascending.
pub fn pages_of_slot(slot: usize, n_keys: usize) -> impl Iterator<Item = usize> {
    // Bit reversal is its own inverse.
    (slot_of_page(slot)..n_pages(n_keys)).step_by(N_SLOTS)
}

/// Keys that a range of slots holds of a sequence of `n_keys`.
pub fn keys_in_slots(slots: Range<usize>, n_keys: usize) -> usize {
    slots.flat_map(|slot| pages_of_slot(slot, n_keys)).map(|page| keys_in_page(page, n_keys)).sum()
}

/// A node of the canonical tree: slots `[index << level, (index + 1) << level)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node {
    level: u8,
    index: u8,
}

impl Node {
    /// The node over all slots.
    pub const ROOT: Self = Self { level: TREE_LEVELS, index: 0 };

    /// A node, if the tree has it.
    pub fn new(level: u32, index: u32) -> Option<Self> {
        let level = u8::try_from(level).ok().filter(|level| *level <= TREE_LEVELS)?;
        let index = u8::try_from(index).ok().filter(|index| *index < 1 << (TREE_LEVELS - level))?;
        Some(Self { level, index })
    }

    /// Height above the slots; 0 is a single slot.
    pub fn level(self) -> u8 {
        self.level
    }
    /// Position among the nodes of its level.
    pub fn index(self) -> u8 {
        self.index
    }
    /// The slots below this node.
    pub fn slots(self) -> Range<usize> {
        let first = usize::from(self.index) << self.level;
        first..first + (1 << self.level)
    }
    /// The left and right child; a single slot has none.
    pub fn children(self) -> Option<(Self, Self)> {
        let level = self.level.checked_sub(1)?;
        Some((Self { level, index: self.index * 2 }, Self { level, index: self.index * 2 + 1 }))
    }
}

/// The fewest nodes that tile a range of slots, ascending. Any range needs at most ten.
///
/// # Panics
/// If the range reaches past the last slot.
pub fn cover(slots: Range<usize>) -> Vec<Node> {
    assert!(slots.end <= N_SLOTS, "slots {slots:?} of {N_SLOTS}");
    let mut nodes = Vec::new();
    let mut at = slots.start;
    while at < slots.end {
        let aligned = if at == 0 { u32::from(TREE_LEVELS) } else { at.trailing_zeros() };
        let level = (0..=aligned).rev().find(|level| at + (1 << level) <= slots.end).unwrap_or(0);
        nodes.push(Node { level: level as u8, index: (at >> level) as u8 });
        at += 1 << level;
    }
    nodes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_spreads_evenly_over_the_slots() {
        for n in [64, 128, 4096] {
            for width in [1, 2, 4, 8, 16, 32] {
                let counts: Vec<usize> = (0..N_SLOTS / width)
                    .map(|i| (0..n).filter(|p| slot_of_page(*p) / width == i).count())
                    .collect();
                assert!(counts.iter().all(|c| *c == counts[0]), "{n} pages, {width} slots: {counts:?}");
            }
        }
    }

    #[test]
    fn pages_of_slots_are_all_pages_once() {
        for n_keys in [1, 255, 256, 257, 5_000, 70_000] {
            let mut pages: Vec<usize> = (0..N_SLOTS).flat_map(|s| pages_of_slot(s, n_keys)).collect();
            pages.sort_unstable();
            assert_eq!(pages, (0..n_pages(n_keys)).collect::<Vec<_>>());
            assert_eq!(keys_in_slots(0..N_SLOTS, n_keys), n_keys);
        }
    }

    #[test]
    fn covers_tile_every_range_with_few_nodes() {
        for start in 0..=N_SLOTS {
            for end in start..=N_SLOTS {
                let nodes = cover(start..end);
                let slots: Vec<usize> = nodes.iter().flat_map(|n| n.slots()).collect();
                assert_eq!(slots, (start..end).collect::<Vec<_>>());
                assert!(nodes.len() <= 10);
            }
        }
        assert_eq!(cover(0..N_SLOTS), [Node::ROOT]);
    }
}
