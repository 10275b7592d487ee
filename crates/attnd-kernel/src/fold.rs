//! In which order partials merge: the canonical tree, walked with a stack.
//!
//! Partials come in the order of their slots, and the pages of one slot in ascending order. A newcomer merges with those that
//! wait below it as long as their lowest common ancestor is not above the one that it has with whoever comes next. Two pages
//! of one slot have level 0, so they fold to the left; slots merge as the tree says. Knowing who comes next is what lets
//! a kernel merge while it still has the newcomer in registers.

use crate::slot::TREE_LEVELS;

/// Partials alive at a time: one per level, the newcomer, and one to fold a slot's next page into.
pub(crate) const STACK: usize = TREE_LEVELS as usize + 2;

/// The lowest level of the tree at which two slots share a node.
fn common_level(a: usize, b: usize) -> u32 {
    usize::BITS - (a ^ b).leading_zeros()
}

/// The slots of the partials that wait, in order. One that merged stands for its last slot, which is the nearest to
/// what comes next.
#[derive(Debug, Default)]
pub(crate) struct Stack {
    slots: [usize; STACK],
    depth: usize,
}

impl Stack {
    /// Partials that wait. The next newcomer has this index.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }

    /// Adds a partial of `slot`; `next` is the slot of the one after it. Returns how many of those below merge with
    /// it now, one after the other from the top, each on the left side; the result takes the lowest one's index.
    ///
    /// # Panics
    /// If partials come in another order than that of their slots, so that the stack runs over.
    pub(crate) fn push(&mut self, slot: usize, next: Option<usize>) -> usize {
        let merge =
            |left: usize| next.is_none_or(|next| common_level(left, slot) <= common_level(slot, next));
        let merges = self.slots[..self.depth].iter().rev().take_while(|left| merge(**left)).count();
        self.depth -= merges;
        self.slots[self.depth] = slot;
        self.depth += 1;
        merges
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slot::{N_SLOTS, Node};

    /// The fold as text, `(left right)` for a merge.
    fn walked(slots: &[usize]) -> String {
        let mut stack = Stack::default();
        let mut waiting: Vec<String> = Vec::new();
        for (i, slot) in slots.iter().enumerate() {
            assert_eq!(stack.depth(), waiting.len());
            let mut partial = format!("{slot}");
            for _ in 0..stack.push(*slot, slots.get(i + 1).copied()) {
                partial = format!("({} {partial})", waiting.pop().unwrap());
            }
            waiting.push(partial);
        }
        assert!(waiting.len() <= 1, "{waiting:?}");
        waiting.pop().unwrap_or_default()
    }

    /// The fold as the tree defines it.
    fn defined(node: Node, slots: &[usize]) -> String {
        match node.children() {
            None => {
                let pages =
                    slots.iter().filter(|slot| node.slots().contains(slot)).map(|slot| format!("{slot}"));
                pages.reduce(|left, right| format!("({left} {right})")).unwrap_or_default()
            }
            Some((left, right)) => match [left, right].map(|child| defined(child, slots)) {
                [one, other] if one.is_empty() || other.is_empty() => one + &other,
                [left, right] => format!("({left} {right})"),
            },
        }
    }

    #[test]
    fn any_set_of_slots_folds_as_the_tree_says() {
        let mut bits = 0x9e37_79b9_7f4a_7c15_u64;
        for round in 0..300 {
            bits = bits.wrapping_mul(0xd129_42e1_1f0d_2c15).rotate_left(23) ^ round;
            let present = if round == 0 { u64::MAX } else { bits };
            let pages =
                |slot: usize| (present >> slot & 1) as usize * (1 + slot % 3 * usize::from(round % 2 == 0));
            let slots: Vec<usize> =
                (0..N_SLOTS).flat_map(|slot| std::iter::repeat_n(slot, pages(slot))).collect();
            assert_eq!(walked(&slots), defined(Node::ROOT, &slots), "{slots:?}");
        }
    }
}
