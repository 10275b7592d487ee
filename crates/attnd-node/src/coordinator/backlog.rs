//! The partials and reports of a call that wait to be merged: what memory they take, and whose may still be read.
//!
//! A row of cells can merge when every share has sent its part. Where one share is slower than the others, theirs pile
//! up, without an end if all were read. So with more than [`BUDGET`] held, only those shares are read that owe a part
//! of the oldest row that isn't whole. There is always one, while anything waits, and what it sends brings that row
//! closer to its end: nobody waits for ever. All shares send their rows in the same order, that in which the client
//! sends the groups (one order in all tensors, see attnd-plan's `arrival.rs`), so the oldest row is the one that the slowest share is at, and the budget is exceeded by a few
//! cells at most.

use std::collections::BTreeMap;
use std::ops::Range;

use attnd_kernel::{AttnShape, PartialRows};
use attnd_plan::{Plan, filled_nodes};

/// Bytes of partials and reports that a call holds before it gets choosy.
const BUDGET: usize = 32 << 20;

/// A group and its first token: the cells of one row share both.
pub(crate) type RowKey = (usize, usize);

/// The rows of a call of which something is here and nothing was merged.
#[derive(Debug)]
pub(crate) struct Backlog {
    /// Of each share: some groups, and its cells in each row of them.
    asked: Vec<Vec<(Range<usize>, usize)>>,
    partials: Rows,
    /// Of the second pass. A row of it begins when its partials have merged, so that who owes a part of the oldest one has all
    /// that it needs for it.
    reports: Rows,
    held: usize,
}

#[derive(Debug, Default)]
struct Rows {
    rows: BTreeMap<RowKey, Row>,
    begun: u64,
}

impl Rows {
    /// Counts one part of a row in; `owed` says who owes how many, if it is the first one.
    fn took(&mut self, share: usize, key: RowKey, bytes: usize, owed: impl FnOnce() -> Vec<(usize, usize)>) {
        let begun = &mut self.begun;
        let row = self.rows.entry(key).or_insert_with(|| {
            *begun += 1;
            Row { age: *begun, bytes: 0, owed: owed() }
        });
        row.bytes += bytes;
        if let Some((_, cells)) = row.owed.iter_mut().find(|(owing, _)| *owing == share) {
            *cells = cells.saturating_sub(1);
        }
        row.owed.retain(|(_, cells)| *cells > 0);
    }

    /// Who owes parts of the oldest row that isn't whole.
    fn oldest(&self) -> impl Iterator<Item = usize> + '_ {
        let oldest = self.rows.values().filter(|row| !row.owed.is_empty()).min_by_key(|row| row.age);
        oldest.into_iter().flat_map(|row| row.owed.iter().map(|(share, _)| *share))
    }
}

#[derive(Debug)]
struct Row {
    /// The first row of a call has 1, the next one 2.
    age: u64,
    bytes: usize,
    /// Shares that owe cells of it, and how many.
    owed: Vec<(usize, usize)>,
}

impl Backlog {
    pub(crate) fn new(plan: &Plan, shape: &AttnShape) -> Self {
        let asked = plan.shares.iter().map(|share| {
            let cells = |slots: &Range<usize>| filled_nodes(slots.clone(), shape.n_keys()).len();
            share.pieces.iter().map(|piece| (piece.groups.clone(), cells(&piece.slots))).collect()
        });
        Self { asked: asked.collect(), partials: Rows::default(), reports: Rows::default(), held: 0 }
    }

    /// Counts a partial in that the gather took from `share`.
    pub(crate) fn took(&mut self, share: usize, key: RowKey, bytes: usize) {
        self.held += bytes;
        let asked = &self.asked;
        self.partials.took(share, key, bytes, || owed(asked, key.0, |cells| cells));
    }

    /// Counts a report in that was accepted from `share`.
    pub(crate) fn took_report(&mut self, share: usize, key: RowKey, bytes: usize) {
        self.held += bytes;
        let asked = &self.asked;
        self.reports.took(share, key, bytes, || owed(asked, key.0, |cells| cells.min(1)));
    }

    /// Counts a row out that was merged.
    pub(crate) fn merged(&mut self, key: RowKey) {
        self.held -= self.partials.rows.remove(&key).map_or(0, |row| row.bytes);
    }

    /// Counts a row out whose reports have become numbers.
    pub(crate) fn reported(&mut self, key: RowKey) {
        self.held -= self.reports.rows.remove(&key).map_or(0, |row| row.bytes);
    }

    /// The shares that alone may be read now; `None` if all may.
    pub(crate) fn wanted(&self) -> Option<Vec<usize>> {
        (self.held > BUDGET).then(|| self.partials.oldest().chain(self.reports.oldest()).collect())
    }
}

/// Who owes what of a row of a group: of its cells in it, as many as `parts` says.
fn owed(
    asked: &[Vec<(Range<usize>, usize)>],
    group: usize,
    parts: impl Fn(usize) -> usize,
) -> Vec<(usize, usize)> {
    let of_share = |pieces: &Vec<(Range<usize>, usize)>| -> usize {
        pieces.iter().filter(|(groups, _)| groups.contains(&group)).map(|(_, cells)| cells).sum()
    };
    let owed = asked.iter().map(of_share).enumerate().map(|(share, cells)| (share, parts(cells)));
    owed.filter(|(_, parts)| *parts > 0).collect()
}

/// What a partial takes.
pub(crate) fn bytes_of(PartialRows { m, l, o, .. }: &PartialRows) -> usize {
    size_of::<f32>() * (m.len() + l.len() + o.len())
}

#[cfg(test)]
mod tests {
    use attnd_kernel::Dims;
    use attnd_plan::{CellId, Gather, Piece, Share, VerifiedPlan, cells};
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    const CELL: usize = 512 << 10;

    /// Three workers cut each of four groups, so that a row has cells of all.
    fn cut() -> (VerifiedPlan, AttnShape) {
        let dims =
            Dims { batch: 2, heads: 2, kv_heads: 2, queries: 500, keys: 1 << 15, head_dim: 4, value_dim: 4 };
        let shape = AttnShape::new(dims).unwrap();
        let share = |(n, slots): (usize, Range<usize>)| Share {
            worker: format!("w{n}").parse().unwrap(),
            pieces: vec![Piece { groups: 0..4, slots }],
            kv_bytes: 1,
            resident_bytes: 1,
        };
        let shares = [0..20, 20..33, 33..64].into_iter().enumerate().map(share).collect();
        let plan = Plan {
            shares,
            tokens_per_cell: 10,
            reason: String::new(),
            predicted_seconds: 1.0,
            sent_bytes: 0,
        };
        (plan.verify(&shape).unwrap(), shape)
    }

    /// Reads `weights[s]` times as often from share `s`, where groups came in `order`, and returns the most that was held; weight 0 is a share that
    /// sends nothing until all others are held back.
    fn most_held(weights: [u32; 3], order: [usize; 4], seed: u64) -> usize {
        let (plan, shape) = cut();
        let mut gather = Gather::new(&plan);
        let mut backlog = Backlog::new(&plan, &shape);
        let of_share = |share: &Share| {
            let mut cells = cells(&share.pieces, &shape, 10);
            cells.sort_by_key(|cell| order.iter().position(|group| *group == cell.group));
            cells.into_iter()
        };
        let mut queues: Vec<std::vec::IntoIter<CellId>> = plan.shares.iter().map(of_share).collect();
        let mut rng = StdRng::seed_from_u64(seed);
        let mut most = 0;
        while !gather.is_complete() {
            let wanted = backlog.wanted();
            let may_send =
                |share: &usize| wanted.as_ref().is_none_or(|w| w.contains(share)) && queues[*share].len() > 0;
            let open: Vec<usize> = (0..3).filter(may_send).collect();
            assert!(!open.is_empty(), "all wait for all, seed {seed}");
            let lots: Vec<usize> =
                open.iter().flat_map(|share| vec![*share; weights[*share] as usize]).collect();
            let share = if lots.is_empty() { open[0] } else { lots[rng.random_range(0..lots.len())] };
            let cell = queues[share].next().unwrap();
            let ready = gather.accept(share, cell, ()).unwrap();
            backlog.took(share, (cell.group, cell.first_token), CELL);
            most = most.max(backlog.held);
            if let Some(ready) = ready {
                backlog.merged((ready.group, ready.tokens.start));
            }
        }
        assert_eq!((backlog.held, backlog.partials.rows.len()), (0, 0));
        most
    }

    #[test]
    fn shares_that_are_ahead_wait_for_the_one_behind_and_all_come_to_an_end() {
        for (seed, weights) in
            [[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 1], [50, 1, 1]].into_iter().enumerate()
        {
            for order in [[0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]] {
                let most = most_held(weights, order, seed as u64);
                // A row of this plan has 10 cells or fewer.
                assert!(most <= BUDGET + 10 * CELL, "{} MiB with {weights:?}, groups {order:?}", most >> 20);
            }
        }
        assert!(most_held([0, 1, 1], [0, 1, 2, 3], 7) > BUDGET, "the budget was never reached");
    }

    #[test]
    fn rows_that_are_whole_hold_all_back_until_they_are_merged() {
        let (plan, shape) = cut();
        let mut backlog = Backlog::new(&plan, &shape);
        backlog.took(1, (3, 10), BUDGET + 1);
        let mut behind = vec![0, 2];
        if filled_nodes(20..33, shape.n_keys()).len() > 1 {
            behind.insert(1, 1);
        }
        assert_eq!(backlog.wanted(), Some(behind));
        for (share, pieces) in plan.shares.iter().map(|share| &share.pieces).enumerate() {
            for cell in
                cells(pieces, &shape, 10).iter().filter(|cell| (cell.group, cell.first_token) == (3, 10))
            {
                backlog.took(share, (cell.group, cell.first_token), 1);
            }
        }
        assert_eq!(backlog.wanted(), Some(vec![]));
        backlog.merged((3, 10));
        assert_eq!(backlog.wanted(), None);
    }
}
