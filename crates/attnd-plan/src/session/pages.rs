//! The pages of a copy of a replica: which, in which order, and how many travel together.

use std::ops::Range;

use attnd_kernel::slot::{N_SLOTS, PAGE_KEYS, slot_of_page};

use crate::planner::Piece;

/// Pages of a shard that somebody lacks who has the first tokens of each layer: by layer, by kv head of each piece, ascending. The page in
/// which what is lacking begins is one of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyPages {
    runs: Vec<Run>,
    /// Of each kv head of each piece, which of 64 neighbouring pages it has.
    owned: Vec<Vec<usize>>,
}

/// One page of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyPage {
    /// Of which layer.
    pub layer: usize,
    /// Of which of the kv heads of all pieces, in order.
    pub head: usize,
    /// Which page of the sequence.
    pub page: usize,
    /// The position behind its last token.
    pub end: usize,
}

/// Pages of one layer and head.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    layer: usize,
    head: usize,
    /// Pages of all runs before.
    before: usize,
    /// Counted among those that the head has.
    pages: Range<usize>,
    tokens: usize,
}

impl CopyPages {
    /// Those of a shard of these pieces, which has `tokens` of each layer, for somebody who has the first `from` of them.
    pub fn new(pieces: &[Piece], from: &[usize], tokens: &[usize]) -> Self {
        let of_piece = |piece: &Piece| {
            let owned: Vec<usize> =
                (0..N_SLOTS).filter(|page| piece.slots.contains(&slot_of_page(*page))).collect();
            vec![owned; piece.groups.len()]
        };
        let owned: Vec<Vec<usize>> = pieces.iter().flat_map(of_piece).collect();
        let mut runs = Vec::new();
        let mut before = 0;
        for (layer, tokens) in tokens.iter().copied().enumerate() {
            let from = from.get(layer).copied().unwrap_or(0);
            if from >= tokens {
                continue;
            }
            for (head, owned) in owned.iter().enumerate() {
                let pages = rank(owned, from / PAGE_KEYS)..rank(owned, tokens.div_ceil(PAGE_KEYS));
                if !pages.is_empty() {
                    let count = pages.len();
                    runs.push(Run { layer, head, before, pages, tokens });
                    before += count;
                }
            }
        }
        Self { runs, owned }
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.runs.last().map_or(0, |run| run.before + run.pages.len())
    }

    /// Whether nothing is lacking.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The page in this place.
    pub fn get(&self, at: usize) -> Option<CopyPage> {
        let run = self.runs.get(self.runs.partition_point(|run| run.before <= at).checked_sub(1)?)?;
        let nth = run.pages.start.checked_add(at - run.before).filter(|nth| run.pages.contains(nth))?;
        let owned = self.owned.get(run.head)?;
        let page = nth / owned.len() * N_SLOTS + owned.get(nth % owned.len())?;
        let end = run.tokens.min((page + 1) * PAGE_KEYS);
        Some(CopyPage { layer: run.layer, head: run.head, page, end })
    }
}

/// How many of the pages before `page` a head has.
fn rank(owned: &[usize], page: usize) -> usize {
    page / N_SLOTS * owned.len() + owned.partition_point(|of| *of < page % N_SLOTS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_hand(pieces: &[Piece], from: &[usize], tokens: &[usize]) -> Vec<CopyPage> {
        let mut pages = Vec::new();
        for layer in 0..tokens.len() {
            let mut head = 0;
            for piece in pieces {
                for _ in piece.groups.clone() {
                    for page in 0..tokens[layer].div_ceil(256) {
                        let end = tokens[layer].min(page * 256 + 256);
                        if end > from[layer] && piece.slots.contains(&slot_of_page(page)) {
                            pages.push(CopyPage { layer, head, page, end });
                        }
                    }
                    head += 1;
                }
            }
        }
        pages
    }

    #[test]
    fn every_page_that_is_lacking_comes_once() {
        let pieces = [
            Piece { groups: 0..1, slots: 20..64 },
            Piece { groups: 1..3, slots: 0..64 },
            Piece { groups: 3..4, slots: 0..1 },
        ];
        for (from, tokens) in [
            ([0, 0, 0], [0, 0, 0]),
            ([0, 0, 0], [1, 0, 40_000]),
            ([0, 0, 0], [256, 16_384, 257]),
            ([255, 16_384, 300], [256, 16_385, 300]),
            ([5000, 0, 1], [17_000, 1, 1]),
        ] {
            let pages = CopyPages::new(&pieces, &from, &tokens);
            let all: Vec<CopyPage> = (0..pages.len()).filter_map(|at| pages.get(at)).collect();
            let mut expected = by_hand(&pieces, &from, &tokens);
            // A page may have nothing new but what others of its layer have.
            expected.retain(|page| page.end > from[page.layer]);
            assert_eq!(all, expected, "{from:?} {tokens:?}");
            assert_eq!(pages.get(pages.len()), None);
            assert_eq!(pages.is_empty(), expected.is_empty());
        }
        assert_eq!(CopyPages::new(&[], &[], &[100]).len(), 0);
    }

    #[test]
    fn a_head_without_slots_has_no_pages() {
        let pages = CopyPages::new(&[Piece { groups: 0..2, slots: 63..64 }], &[0], &[5000]);
        // Page 63 is the only one among 64, and the sequence has 20.
        assert_eq!((pages.len(), pages.get(0)), (0, None));
    }
}
