//! The work of a call, or the tokens of a session, as a line of places, and where to cut it.
//!
//! Place `g * 64 + s` is slot `s` of kv group `g`; it costs the keys it holds, whatever the mask, because a causal row
//! sees about the same fraction of every slot. A share is an interval of the line, so it has at most three pieces: the
//! end of one group, whole groups, the beginning of another. Cutting only at multiples of 64 is cutting by heads.

use std::ops::Range;

use attnd_kernel::slot::{self, N_SLOTS};

use crate::planner::Piece;

mod call;

pub(crate) use call::CallFootprint;

/// A cut may move this fraction of a share away from the even point for nothing, to where fewer partials merge. Both
/// ends of a share may, so a share is at most 4 % over its fair part. Measured speeds of workers wander by 5 to 10 %
/// from run to run: a finer balance than that is imaginary, the messages it costs are not.
const FREE_SHIFT: f64 = 0.02;

/// What the line must know about a worker.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hand {
    pub(crate) gflops: f64,
    pub(crate) free_bytes: u64,
}

/// What cutting costs, beside what is cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CutCosts {
    /// Seconds of one key of one kv group at 1 GFLOP/s.
    pub(crate) key_seconds: f64,
    /// Of one more partial of one group.
    pub(crate) node_seconds: f64,
    /// Of the queries of a group, sent to one more worker.
    pub(crate) query_seconds: f64,
    /// Of a run of pages of a group that is cut.
    pub(crate) run_seconds: f64,
}

/// What an interval takes of a worker's memory.
pub(crate) trait Footprint: Sized {
    /// Bytes of an interval that isn't empty. A longer one never takes less.
    fn bytes(&self, line: &Line<Self>, places: &Range<usize>) -> u64;
}

#[derive(Debug)]
pub(crate) struct Line<F> {
    n_groups: usize,
    /// Keys and pages of the slots before each slot of a group; the last entries are those of the whole group.
    keys_before: [u64; N_SLOTS + 1],
    pages_before: [u64; N_SLOTS + 1],
    /// Slots that hold keys, ascending.
    filled: Vec<usize>,
    footprint: F,
}

impl<F: Footprint> Line<F> {
    /// The line of so many kv groups of so many keys, at least one each.
    pub(crate) fn of(n_groups: usize, n_keys: usize, footprint: F) -> Self {
        let (mut keys_before, mut pages_before) = ([0; N_SLOTS + 1], [0; N_SLOTS + 1]);
        let (mut keys, mut pages) = (0, 0);
        for slot in 0..N_SLOTS {
            keys += slot::keys_in_slots(slot..slot + 1, n_keys) as u64;
            pages += slot::pages_of_slot(slot, n_keys).count() as u64;
            keys_before[slot + 1] = keys;
            pages_before[slot + 1] = pages;
        }
        let filled = (0..N_SLOTS).filter(|s| keys_before[*s] < keys_before[s + 1]).collect();
        Self { n_groups, filled, keys_before, pages_before, footprint }
    }

    pub(crate) fn footprint(&self) -> &F {
        &self.footprint
    }

    pub(crate) fn len(&self) -> usize {
        self.n_groups * N_SLOTS
    }

    fn before(&self, table: &[u64; N_SLOTS + 1], place: usize) -> u64 {
        (place / N_SLOTS) as u64 * table[N_SLOTS] + table[place % N_SLOTS]
    }

    /// Keys of an interval.
    pub(crate) fn keys(&self, places: &Range<usize>) -> u64 {
        self.before(&self.keys_before, places.end) - self.before(&self.keys_before, places.start)
    }

    /// Kv groups that an interval touches.
    pub(crate) fn groups(&self, places: &Range<usize>) -> usize {
        if places.is_empty() { 0 } else { (places.end - 1) / N_SLOTS + 1 - places.start / N_SLOTS }
    }

    /// Pages of an interval.
    pub(crate) fn pages(&self, places: &Range<usize>) -> u64 {
        self.before(&self.pages_before, places.end) - self.before(&self.pages_before, places.start)
    }

    /// Runs of consecutive pages in which an interval gets K, and V, of the groups that it shares with others. The slots
    /// of neighbouring pages are far apart, so pages alternate between shares, and most runs are one page long. Whole
    /// groups count nothing: they are cut by size.
    pub(crate) fn cut_runs(&self, places: &Range<usize>) -> u64 {
        let of_group = self.pages(&(0..N_SLOTS));
        let cut = self.pieces(places).into_iter().filter(|piece| self.pages(&piece.slots) < of_group);
        cut.map(|Piece { slots, .. }| {
            // Bit reversal is its own inverse: this is the first page of the slot.
            let page_before = |slot: &usize| slot::slot_of_page(*slot) + N_SLOTS - 1;
            let begins = |slot: &usize| !slots.contains(&slot::slot_of_page(page_before(slot)));
            slots.clone().filter(begins).map(|slot| self.pages(&(slot..slot + 1))).sum::<u64>()
        })
        .sum()
    }

    /// Bytes that a worker must have for an interval.
    pub(crate) fn resident_bytes(&self, places: &Range<usize>) -> u64 {
        if places.is_empty() { 0 } else { self.footprint.bytes(self, places) }
    }

    /// An interval as rectangles of groups and slots.
    pub(crate) fn pieces(&self, places: &Range<usize>) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut at = places.start;
        while at < places.end {
            let (group, slot) = (at / N_SLOTS, at % N_SLOTS);
            let whole = (places.end - at) / N_SLOTS;
            let piece = if slot == 0 && whole > 0 {
                Piece { groups: group..group + whole, slots: 0..N_SLOTS }
            } else {
                Piece { groups: group..group + 1, slots: slot..N_SLOTS.min(slot + places.end - at) }
            };
            at += piece.groups.len() * piece.slots.len();
            pieces.push(piece);
        }
        pieces
    }

    /// Tree nodes with keys of an interval, over its groups.
    pub(crate) fn nodes(&self, places: &Range<usize>) -> usize {
        self.pieces(places).into_iter().map(|piece| piece.groups.len() * self.filled_nodes(piece.slots)).sum()
    }

    /// As many as [`crate::filled_nodes`] of these slots.
    fn filled_nodes(&self, slots: Range<usize>) -> usize {
        let holds_keys = |node: &slot::Node| self.keys(&node.slots()) > 0;
        slot::cover(slots).iter().filter(|node| holds_keys(node)).count()
    }

    /// Cuts the line into one interval per hand, in order, so that the slowest finishes as early as it can and
    /// everybody's memory suffices. Intervals without keys are `None`. With `use_all`, everybody gets something as
    /// long as there are places. `None` if the memory doesn't suffice.
    pub(crate) fn cut(
        &self,
        hands: &[Hand],
        use_all: bool,
        costs: &CutCosts,
    ) -> Option<Vec<Option<Range<usize>>>> {
        let ends = |seconds: f64| self.walk(hands, seconds, use_all);
        ends(f64::INFINITY)?;
        // Seconds here are billions of key-operations per gflops: only ratios count.
        let fair = self.keys(&(0..self.len())) as f64 / hands.iter().map(|hand| hand.gflops).sum::<f64>();
        let (mut low, mut high) = (fair, fair);
        while ends(high).is_none() {
            (low, high) = (high, high * 2.0);
        }
        for _ in 0..24 {
            let middle = low + (high - low) / 2.0;
            if ends(middle).is_some() { high = middle } else { low = middle }
        }
        let even = ends(high)?;
        Some(self.snap(&even, hands, costs).unwrap_or(even))
    }

    /// What is left over however the line is cut among these hands, in their order; empty if everything does.
    /// One more hand never makes it more.
    pub(crate) fn left_over(&self, hands: &[Hand]) -> Range<usize> {
        self.deal(hands, f64::INFINITY, false).1..self.len()
    }

    fn walk(&self, hands: &[Hand], seconds: f64, use_all: bool) -> Option<Vec<Option<Range<usize>>>> {
        let (intervals, at) = self.deal(hands, seconds, use_all);
        (at == self.len()).then_some(intervals)
    }

    /// The greedy cut: each hand takes as much as it computes in `seconds` and as its memory holds. For a fixed order
    /// of hands, this covers the line whenever anything does. Also returns how far it came.
    fn deal(&self, hands: &[Hand], seconds: f64, use_all: bool) -> (Vec<Option<Range<usize>>>, usize) {
        let mut at = 0;
        let mut intervals = Vec::with_capacity(hands.len());
        for (i, hand) in hands.iter().enumerate() {
            let budget = hand.gflops * seconds;
            let fits = |end: usize| self.resident_bytes(&(at..end)) <= hand.free_bytes;
            let mut end = self.last_end(at, |end| self.keys(&(at..end)) as f64 <= budget && fits(end));
            if use_all {
                let after_this = hands.len() - i - 1;
                let least = self.after_one_filled(at);
                end = end.max(if fits(least) { least } else { at });
                end = end.min(self.before_last_filled(after_this).max(least));
            }
            if self.keys(&(at..end)) > 0 {
                intervals.push(Some(at..end));
                at = end;
            } else {
                intervals.push(None);
            }
        }
        (intervals, at)
    }

    /// The largest `end` of an interval from `start` that is allowed; whatever is allowed is allowed for shorter ones.
    fn last_end(&self, start: usize, allowed: impl Fn(usize) -> bool) -> usize {
        let (mut good, mut bad) = (start, self.len() + 1);
        while bad - good > 1 {
            let middle = good + (bad - good) / 2;
            if allowed(middle) { good = middle } else { bad = middle }
        }
        good
    }

    /// The second place with keys from `start`: the end of the smallest share that leaves no empty places behind.
    fn after_one_filled(&self, start: usize) -> usize {
        let seen =
            start / N_SLOTS * self.filled.len() + self.filled.partition_point(|s| *s < start % N_SLOTS);
        self.nth_filled(seen + 1).unwrap_or(self.len())
    }

    /// The first of the last `n` places with keys.
    fn before_last_filled(&self, n: usize) -> usize {
        if n == 0 {
            return self.len();
        }
        let all = self.n_groups * self.filled.len();
        self.nth_filled(all.saturating_sub(n)).unwrap_or(self.len())
    }

    fn nth_filled(&self, n: usize) -> Option<usize> {
        let (group, slot) = (n / self.filled.len(), self.filled.get(n % self.filled.len())?);
        (group < self.n_groups).then_some(group * N_SLOTS + slot)
    }

    /// Moves each cut to the best place near it: one where fewer partials merge, if they cost more than the imbalance.
    /// `None` if somebody would be left without keys or without memory.
    fn snap(
        &self,
        even: &[Option<Range<usize>>],
        hands: &[Hand],
        costs: &CutCosts,
    ) -> Option<Vec<Option<Range<usize>>>> {
        let mut snapped = even.to_vec();
        let used: Vec<usize> = (0..even.len()).filter(|i| even[*i].is_some()).collect();
        for pair in used.windows(2) {
            let [left, right] = *pair else { continue };
            let (from, cut) = (snapped[left].as_ref()?.start, even[left].as_ref()?.end);
            let to = even[right].as_ref()?.end;
            let per_key = |i: usize| costs.key_seconds / hands[i].gflops;
            let share = |i: usize, places: Range<usize>| per_key(i) * self.keys(&places) as f64;
            let free = FREE_SHIFT * share(left, even[left].clone()?).min(share(right, even[right].clone()?));
            let price = |at: usize| {
                let moved = self.keys(&(at.min(cut)..at.max(cut))) as f64 * per_key(left).max(per_key(right));
                (moved - free).max(0.0) + self.split_seconds(at, &(from..to), costs)
            };
            let holds = |i: usize, places: Range<usize>| {
                self.keys(&places) > 0 && self.resident_bytes(&places) <= hands[i].free_bytes
            };
            let at = [64, 32, 16, 8, 4, 2, 1]
                .into_iter()
                .flat_map(|step: usize| [cut / step * step, cut.next_multiple_of(step)])
                .filter(|at| from < *at && *at < to && holds(left, from..*at) && holds(right, *at..to))
                .min_by(|a, b| price(*a).total_cmp(&price(*b)).then(a.abs_diff(cut).cmp(&b.abs_diff(cut))))?;
            snapped[left] = Some(from..at);
            snapped[right] = Some(at..to);
        }
        Some(snapped)
    }

    /// What it costs to cut a group here, between the cuts at the ends of `between`: more partials, and its queries once
    /// more. If it were whole without this cut, its pages come one by one too.
    fn split_seconds(&self, at: usize, between: &Range<usize>, costs: &CutCosts) -> f64 {
        let slot = at % N_SLOTS;
        if slot == 0 {
            return 0.0;
        }
        let nodes = self.filled_nodes(0..slot) + self.filled_nodes(slot..N_SLOTS);
        let group = at - slot..at - slot + N_SLOTS;
        let is_whole = between.start <= group.start && group.end <= between.end;
        let runs = if is_whole { self.pages(&group) } else { 0 };
        nodes.saturating_sub(1) as f64 * costs.node_seconds
            + costs.query_seconds
            + runs as f64 * costs.run_seconds
    }
}
