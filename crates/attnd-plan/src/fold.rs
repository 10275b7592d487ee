//! Merges the partials of tree nodes along the canonical tree.

use attnd_kernel::slot::Node;

/// Merges `parts`, which are disjoint nodes in ascending order, exactly as the whole tree over 64 slots would, and
/// returns the result; `None` for no parts. Nodes that are not there are the identity: the sibling passes upward
/// unchanged. `merge(a, b)` gets the left side of the tree first.
///
/// The tree has one place where two neighbours meet: their lowest common ancestor. So a stack suffices: before a part
/// is pushed, the two topmost merge as long as they meet no higher than the topmost meets the new part.
pub fn fold<P>(parts: Vec<(Node, P)>, mut merge: impl FnMut(P, P) -> P) -> Option<P> {
    // Each entry: first slot, last slot, merged part.
    let mut stack: Vec<(usize, usize, P)> = Vec::new();
    for (node, part) in parts {
        let slots = node.slots();
        while meet_of_top(&stack).is_some_and(|(meet, last)| meet <= meeting_level(last, slots.start)) {
            merge_top(&mut stack, &mut merge);
        }
        stack.push((slots.start, slots.end - 1, part));
    }
    while stack.len() > 1 {
        merge_top(&mut stack, &mut merge);
    }
    stack.pop().map(|(_, _, part)| part)
}

/// Level of the lowest common ancestor of two slots.
fn meeting_level(left: usize, right: usize) -> u32 {
    usize::BITS - (left ^ right).leading_zeros()
}

/// Where the two topmost entries meet, and the last slot of the topmost.
fn meet_of_top<P>(stack: &[(usize, usize, P)]) -> Option<(u32, usize)> {
    match stack {
        [.., (_, left_last, _), (right_first, right_last, _)] => {
            Some((meeting_level(*left_last, *right_first), *right_last))
        }
        _ => None,
    }
}

fn merge_top<P>(stack: &mut Vec<(usize, usize, P)>, merge: &mut impl FnMut(P, P) -> P) {
    if let Some((right_first, right_last, right)) = stack.pop() {
        let top = match stack.pop() {
            Some((left_first, _, left)) => (left_first, right_last, merge(left, right)),
            None => (right_first, right_last, right),
        };
        stack.push(top);
    }
}

#[cfg(test)]
mod tests {
    use attnd_kernel::slot::{N_SLOTS, cover};
    use proptest::prelude::*;

    use super::*;

    /// Neither associative nor commutative, so a different order is a different text.
    fn bracket(a: String, b: String) -> String {
        format!("({a} {b})")
    }

    /// The tree by its definition.
    fn by_recursion(node: Node, present: &[bool]) -> Option<String> {
        match node.children() {
            None => present[node.slots().start].then(|| node.slots().start.to_string()),
            Some((left, right)) => match (by_recursion(left, present), by_recursion(right, present)) {
                (Some(a), Some(b)) => Some(bracket(a, b)),
                (a, b) => a.or(b),
            },
        }
    }

    fn single_slots(slots: std::ops::Range<usize>, present: &[bool]) -> Vec<(Node, String)> {
        slots
            .filter(|slot| present[*slot])
            .map(|slot| (Node::new(0, slot as u32).unwrap(), slot.to_string()))
            .collect()
    }

    proptest! {
        #[test]
        fn any_cut_folds_like_the_whole_tree(
            present in proptest::collection::vec(any::<bool>(), N_SLOTS),
            mut cuts in proptest::collection::vec(0..=N_SLOTS, 0..12),
        ) {
            let whole = by_recursion(Node::ROOT, &present);
            prop_assert_eq!(fold(single_slots(0..N_SLOTS, &present), bracket), whole.clone());

            cuts.extend([0, N_SLOTS]);
            cuts.sort_unstable();
            let mut parts = Vec::new();
            for ends in cuts.windows(2) {
                for node in cover(ends[0]..ends[1]) {
                    // What a worker sends for one node.
                    if let Some(text) = fold(single_slots(node.slots(), &present), bracket) {
                        parts.push((node, text));
                    }
                }
            }
            prop_assert_eq!(fold(parts, bracket), whole);
        }
    }

    #[test]
    fn a_fold_of_nothing_is_nothing() {
        assert_eq!(fold(Vec::<(Node, String)>::new(), bracket), None);
    }

    #[test]
    fn every_pair_of_cuts_folds_alike() {
        let present = [true; N_SLOTS];
        let whole = by_recursion(Node::ROOT, &present);
        for a in 0..=N_SLOTS {
            for b in a..=N_SLOTS {
                let parts = [0..a, a..b, b..N_SLOTS]
                    .into_iter()
                    .flat_map(cover)
                    .map(|node| (node, by_recursion(node, &present).unwrap()))
                    .collect();
                assert_eq!(fold(parts, bracket), whole, "cut at {a} and {b}");
            }
        }
    }
}
