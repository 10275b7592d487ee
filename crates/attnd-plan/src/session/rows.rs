//! Which rows of an append go to which shard.

use std::ops::Range;

use attnd_kernel::slot::{N_SLOTS, PAGE_KEYS, slot_of_page};

use crate::planner::Piece;

/// Those of the tokens `new` of a layer that are in pages of `slots`, as ascending ranges of positions; neighbouring pages are
/// one range.
pub fn positions_in(slots: &Range<usize>, new: Range<usize>) -> Vec<Range<usize>> {
    if slots.len() == N_SLOTS {
        return if new.is_empty() { Vec::new() } else { vec![new] };
    }
    let mut found: Vec<Range<usize>> = Vec::new();
    let mut at = new.start;
    while at < new.end {
        let page = at / PAGE_KEYS;
        let end = new.end.min((page + 1) * PAGE_KEYS);
        if slots.contains(&slot_of_page(page)) {
            match found.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => found.push(at..end),
            }
        }
        at = end;
    }
    found
}

/// The kv heads that a shard has slots of: neighbours, because a shard is an interval of the line of heads and slots.
pub fn kv_heads_of(pieces: &[Piece]) -> Range<usize> {
    let first = pieces.iter().map(|piece| piece.groups.start).min().unwrap_or(0);
    let end = pieces.iter().map(|piece| piece.groups.end).max().unwrap_or(0);
    first..end.max(first)
}

/// Byte ranges of the rows that go to a shard, of a tensor `[kv_heads, new.len(), row_bytes]` that has all rows of an append: of each
/// piece, of each of its kv heads, the tokens in its slots, ascending. What is in a row comes in one range, so a shard of whole heads
/// has one.
pub fn bytes_for(pieces: &[Piece], new: &Range<usize>, row_bytes: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for piece in pieces {
        let positions = positions_in(&piece.slots, new.clone());
        for head in piece.groups.clone() {
            for tokens in &positions {
                let row = |token: usize| (head * new.len() + token - new.start) * row_bytes;
                let run = row(tokens.start)..row(tokens.end);
                match runs.last_mut() {
                    Some(last) if last.end == run.start => last.end = run.end,
                    _ if run.is_empty() => {}
                    _ => runs.push(run),
                }
            }
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn piece(groups: Range<usize>, slots: Range<usize>) -> Piece {
        Piece { groups, slots }
    }

    proptest! {
        #[test]
        fn positions_are_those_whose_pages_are_in_the_slots(
            start in 0usize..70_000, len in 0usize..20_000, ends in (0usize..=64, 0usize..=64)
        ) {
            let slots = ends.0.min(ends.1)..ends.0.max(ends.1);
            let found = positions_in(&slots, start..start + len);
            let expected: Vec<usize> =
                (start..start + len).filter(|at| slots.contains(&slot_of_page(at / PAGE_KEYS))).collect();
            prop_assert_eq!(found.iter().cloned().flatten().collect::<Vec<_>>(), expected);
            prop_assert!(found.windows(2).all(|pair| pair[0].end < pair[1].start));
        }

        #[test]
        fn shards_that_tile_the_heads_and_slots_get_each_row_once(
            start in 0usize..40_000, len in 1usize..3000, cuts in proptest::collection::vec(0usize..=3 * 64, 0..5)
        ) {
            let (heads, row_bytes) = (3, 5);
            let mut cuts = cuts;
            cuts.extend([0, heads * N_SLOTS]);
            cuts.sort_unstable();
            let mut bytes = vec![0_u8; heads * len * row_bytes];
            for ends in cuts.windows(2) {
                // The pieces of an interval of the line, one slot each: their number doesn't matter.
                let pieces: Vec<Piece> = (ends[0]..ends[1])
                    .map(|place| piece(place / N_SLOTS..place / N_SLOTS + 1, place % N_SLOTS..place % N_SLOTS + 1))
                    .collect();
                for run in bytes_for(&pieces, &(start..start + len), row_bytes) {
                    prop_assert!(run.len().is_multiple_of(row_bytes) && run.start.is_multiple_of(row_bytes));
                    bytes[run].iter_mut().for_each(|byte| *byte += 1);
                }
            }
            prop_assert!(bytes.iter().all(|byte| *byte == 1));
        }
    }

    #[test]
    fn whole_heads_are_one_run() {
        let pieces = [piece(2..5, 0..64)];
        assert_eq!(bytes_for(&pieces, &(1000..1003), 4).as_slice(), std::slice::from_ref(&(24..60)));
        assert_eq!(kv_heads_of(&pieces), 2..5);
        let cut = [piece(1..2, 32..64), piece(2..4, 0..64), piece(4..5, 0..8)];
        assert_eq!(kv_heads_of(&cut), 1..5);
        assert_eq!(kv_heads_of(&[]), 0..0);
        // Page 1 is slot 32, page 0 slot 0.
        assert_eq!(bytes_for(&cut, &(255..257), 1).as_slice(), std::slice::from_ref(&(3..9)));
        assert_eq!(bytes_for(&cut, &(254..257), 1).as_slice(), std::slice::from_ref(&(5..14)));
    }

    #[test]
    fn nothing_is_no_run() {
        assert_eq!(bytes_for(&[piece(0..4, 0..64)], &(7..7), 4), []);
        assert_eq!(bytes_for(&[piece(0..4, 32..33)], &(0..256), 4), []);
    }
}
