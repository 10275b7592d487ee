//! Takes every report of a call exactly once: what the second pass says about some query tokens of a kv group.
//!
//! Shares that hold keys of a group report on its tokens once each, over all their keys, after the rows of these tokens
//! have merged. What a report holds is merged by whoever received it, in any order; here is only who owes one. Elements of
//! the score matrix come before the report of their tokens and are counted, because nobody merges them: the report closes
//! the count.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use attnd_kernel::slot::{PAGE_KEYS, n_pages, slot_of_page};
use attnd_kernel::{AttnShape, Outputs, Rectangle};

use crate::cover::VerifiedPlan;
use crate::gather::Bits;

/// What a report is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReportId {
    /// Kv group, flattened over the batch.
    pub group: usize,
    /// First query token.
    pub first_token: usize,
    /// Query tokens.
    pub tokens: usize,
}

/// Why a report was refused; nothing was changed by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// The share holds no key of the group, or there is no such group or share.
    #[error("group {group} is not for share {share} to report on")]
    NotAsked {
        /// Kv group.
        group: usize,
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
        /// Tokens in a range; the last one of a group may have fewer.
        tokens_per_cell: usize,
        /// Query tokens of the call.
        n_queries: usize,
    },
    /// The rows have not merged yet, so nobody can know their weights.
    #[error("group {group} tokens from {first_token} have not merged yet")]
    Early {
        /// Kv group.
        group: usize,
        /// First token.
        first_token: usize,
    },
    /// It came before.
    #[error("group {group} tokens from {first_token} came twice")]
    Duplicate {
        /// Kv group.
        group: usize,
        /// First token.
        first_token: usize,
    },
    /// More elements of the score matrix, or with the report fewer, than the share's keys have.
    #[error("group {group} tokens from {first_token}: {got} elements, expected {expected}")]
    Elements {
        /// Kv group.
        group: usize,
        /// First token.
        first_token: usize,
        /// By the plan.
        expected: u64,
        /// By what came.
        got: u64,
    },
}

/// What a share was asked about.
#[derive(Debug)]
struct Asked {
    groups: Vec<Range<usize>>,
    /// Of each range of groups: how many keys of each rectangle it holds.
    keys: Vec<Vec<usize>>,
}

/// Who still owes what of the second pass.
#[derive(Debug)]
pub(crate) struct Reports {
    shape: AttnShape,
    tokens_per_cell: usize,
    n_ranges: usize,
    outputs: Arc<Outputs>,
    asked: Vec<Asked>,
    /// Of each group: shares that hold some of its keys.
    owners: Vec<u32>,
    /// Rows of which something is here: what each share said, in elements, and whether that was all.
    open: BTreeMap<usize, BTreeMap<usize, Progress>>,
    /// Rows on which every share has reported.
    whole: Bits,
    /// Of each share.
    missing: Vec<usize>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    elements: u64,
    reported: bool,
}

impl Reports {
    /// Reports of everybody who holds keys, and before them the elements that `outputs` want.
    pub(crate) fn new(plan: &VerifiedPlan, outputs: Arc<Outputs>) -> Self {
        let shape = plan.shape();
        let tokens_per_cell = plan.tokens_per_cell.max(1);
        let n_ranges = shape.n_queries().div_ceil(tokens_per_cell);
        let mut owners = vec![0; shape.n_groups()];
        let mut missing = Vec::with_capacity(plan.shares.len());
        let mut asked = Vec::with_capacity(plan.shares.len());
        for share in &plan.shares {
            let (mut groups, mut keys, mut owed) = (Vec::new(), Vec::new(), 0);
            for piece in &share.pieces {
                let held = |rectangle: &Rectangle| keys_of(&piece.slots, &rectangle.keys, shape);
                if keys_of(&piece.slots, &(0..shape.n_keys()), shape) == 0 {
                    continue;
                }
                for owners in owners.iter_mut().skip(piece.groups.start).take(piece.groups.len()) {
                    *owners += 1;
                }
                groups.push(piece.groups.clone());
                keys.push(outputs.rectangles().iter().map(held).collect());
                owed += piece.groups.len() * n_ranges;
            }
            asked.push(Asked { groups, keys });
            missing.push(owed);
        }
        let whole = Bits::new(shape.n_groups() * n_ranges);
        Self {
            shape: *shape,
            tokens_per_cell,
            n_ranges,
            outputs,
            asked,
            owners,
            open: BTreeMap::new(),
            whole,
            missing,
        }
    }

    /// Counts elements of the score matrix in that came from a share.
    pub(crate) fn count(&mut self, share: usize, id: ReportId, elements: u64) -> Result<(), ReportError> {
        let (row, expected) = self.place(share, id)?;
        let progress = self.open.entry(row).or_default().entry(share).or_default();
        let ReportId { group, first_token, .. } = id;
        if progress.reported {
            return Err(ReportError::Duplicate { group, first_token });
        }
        let got = progress.elements.saturating_add(elements);
        if got > expected {
            return Err(ReportError::Elements { group, first_token, expected, got });
        }
        progress.elements = got;
        Ok(())
    }

    /// Takes the report of a share on rows that have `merged`. Whether it was the last one on them.
    pub(crate) fn accept(&mut self, share: usize, id: ReportId, merged: bool) -> Result<bool, ReportError> {
        let (row, expected) = self.place(share, id)?;
        let ReportId { group, first_token, .. } = id;
        if !merged {
            return Err(ReportError::Early { group, first_token });
        }
        let of_row = self.open.entry(row).or_default();
        let progress = of_row.entry(share).or_default();
        if progress.reported {
            return Err(ReportError::Duplicate { group, first_token });
        }
        if progress.elements != expected {
            let got = progress.elements;
            return Err(ReportError::Elements { group, first_token, expected, got });
        }
        progress.reported = true;
        if let Some(missing) = self.missing.get_mut(share) {
            *missing -= 1;
        }
        let reported = of_row.values().filter(|progress| progress.reported).count();
        let is_whole = self.owners.get(group).is_some_and(|owners| reported == *owners as usize);
        if is_whole {
            self.open.remove(&row);
            self.whole.set(row);
        }
        Ok(is_whole)
    }

    /// Whether every report came.
    pub(crate) fn is_complete(&self) -> bool {
        self.missing.iter().all(|missing| *missing == 0)
    }

    /// Reports that a share still owes.
    pub(crate) fn missing_of(&self, share: usize) -> usize {
        self.missing.get(share).copied().unwrap_or(0)
    }

    /// The row of a report that a share may still send, and the elements that come before it.
    fn place(&self, share: usize, id: ReportId) -> Result<(usize, u64), ReportError> {
        let ReportId { group, first_token, tokens } = id;
        let not_asked = ReportError::NotAsked { group, share };
        let asked = self.asked.get(share).ok_or(not_asked)?;
        let found = asked.groups.iter().zip(&asked.keys).find(|(groups, _)| groups.contains(&group));
        let (_, keys) = found.ok_or(not_asked)?;
        let (tokens_per_cell, n_queries) = (self.tokens_per_cell, self.shape.n_queries());
        let agreed = tokens_per_cell.min(n_queries.saturating_sub(first_token));
        if first_token >= n_queries || first_token % tokens_per_cell != 0 || tokens != agreed {
            return Err(ReportError::TokenRange { first_token, tokens, tokens_per_cell, n_queries });
        }
        let row = group * self.n_ranges + first_token / tokens_per_cell;
        if self.whole.is_set(row) {
            return Err(ReportError::Duplicate { group, first_token });
        }
        let first_head = group % self.shape.n_kv_heads() * self.shape.group_size();
        let heads = first_head..first_head + self.shape.group_size();
        let tokens = first_token..first_token + tokens;
        let of_rectangles = self.outputs.rectangles().iter().zip(keys).map(|(rectangle, keys)| {
            let rows = overlap(&rectangle.heads, &heads) * overlap(&rectangle.tokens, &tokens);
            rows as u64 * *keys as u64
        });
        Ok((row, of_rectangles.sum()))
    }
}

fn overlap(one: &Range<usize>, other: &Range<usize>) -> usize {
    one.end.min(other.end).saturating_sub(one.start.max(other.start))
}

/// How many of `keys` lie in `slots`.
fn keys_of(slots: &Range<usize>, keys: &Range<usize>, shape: &AttnShape) -> usize {
    let pages = (0..n_pages(shape.n_keys())).filter(|page| slots.contains(&slot_of_page(*page)));
    let of_page = |page: usize| page * PAGE_KEYS..((page + 1) * PAGE_KEYS).min(shape.n_keys());
    pages.map(|page| overlap(&of_page(page), keys)).sum()
}

#[cfg(test)]
pub(crate) mod tests {
    use attnd_kernel::{Causal, Operator, OutputsParts, Stage};
    use proptest::prelude::*;

    use super::*;
    use crate::cover::filled_nodes;
    use crate::planner::Piece;
    use crate::planner::tests::{any_call, planned};

    /// All weights of all heads, and a corner of raw scores.
    pub(crate) fn any_outputs(shape: &AttnShape) -> Arc<Outputs> {
        let heads = shape.n_heads();
        let corner = Rectangle {
            stage: Stage::Raw,
            heads: heads - 1..heads,
            tokens: 0..1,
            keys: shape.n_keys() / 2..shape.n_keys(),
        };
        let parts = OutputsParts {
            stages: vec![Stage::Weights],
            rectangles: vec![corner],
            ..OutputsParts::default()
        };
        Arc::new(Outputs::new(parts, shape, &Operator::plain(1.0, Causal::None)).unwrap())
    }

    /// Elements that a share sends before a report.
    pub(crate) fn elements_of(plan: &VerifiedPlan, share: usize, id: ReportId) -> u64 {
        let outputs = any_outputs(plan.shape());
        let of_piece = |piece: &Piece| -> u64 {
            let nodes = filled_nodes(piece.slots.clone(), plan.shape().n_keys());
            let tokens = id.first_token..id.first_token + id.tokens;
            nodes.iter().map(|(node, _)| outputs.elements_of(id.group, *node, &tokens)).sum()
        };
        plan.shares[share].pieces.iter().filter(|piece| piece.groups.contains(&id.group)).map(of_piece).sum()
    }

    /// Every report of a plan, and who owes it.
    pub(crate) fn all_reports(plan: &VerifiedPlan) -> Vec<(usize, ReportId)> {
        let shape = plan.shape();
        let mut all = Vec::new();
        for (share, of_worker) in plan.shares.iter().enumerate() {
            let with_keys = |slots: &Range<usize>| {
                (0..n_pages(shape.n_keys())).any(|page| slots.contains(&slot_of_page(page)))
            };
            for piece in of_worker.pieces.iter().filter(|piece| with_keys(&piece.slots)) {
                for group in piece.groups.clone() {
                    for first_token in (0..shape.n_queries()).step_by(plan.tokens_per_cell) {
                        let tokens = plan.tokens_per_cell.min(shape.n_queries() - first_token);
                        all.push((share, ReportId { group, first_token, tokens }));
                    }
                }
            }
        }
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// In any order, each report is taken once, a row is whole with its last one, and all elements of a block come once.
        #[test]
        fn each_report_is_taken_once(call in any_call(), seed in any::<u64>()) {
            let Some((shape, plan)) = planned(&call, 1 << 13) else { return Ok(()) };
            let plan = plan.verify(&shape).unwrap();
            let outputs = any_outputs(&shape);
            let of_rectangle = |rectangle: &Rectangle| {
                (shape.batch() * rectangle.heads.len() * rectangle.tokens.len() * rectangle.keys.len()) as u64
            };
            let all: u64 = outputs.rectangles().iter().map(of_rectangle).sum();
            let mut reports = Reports::new(&plan, outputs);
            let mut order = all_reports(&plan);
            let n = order.len();
            for at in 0..n {
                order.swap(at, (seed.wrapping_mul(at as u64 * 2 + 1) >> 33) as usize % n);
            }
            let (mut counted, mut whole) = (0, 0);
            for (share, id) in order {
                prop_assert!(!reports.is_complete());
                let ReportId { group, first_token, .. } = id;
                let early = ReportError::Early { group, first_token };
                prop_assert_eq!(reports.accept(share, id, false), Err(early));
                let expected = elements_of(&plan, share, id);
                if expected > 0 {
                    let short = ReportError::Elements { group, first_token, expected, got: expected - 1 };
                    reports.count(share, id, expected - 1).unwrap();
                    prop_assert_eq!(reports.accept(share, id, true), Err(short));
                    let over = ReportError::Elements { group, first_token, expected, got: expected + 1 };
                    prop_assert_eq!(reports.count(share, id, 2), Err(over));
                    reports.count(share, id, 1).unwrap();
                }
                counted += expected;
                whole += usize::from(reports.accept(share, id, true).unwrap());
                let twice = ReportError::Duplicate { group, first_token };
                prop_assert_eq!(reports.accept(share, id, true), Err(twice));
                prop_assert_eq!(reports.count(share, id, 0), Err(twice));
            }
            prop_assert!(reports.is_complete() && reports.open.is_empty());
            prop_assert_eq!(counted, all);
            prop_assert_eq!(whole, shape.n_groups() * shape.n_queries().div_ceil(plan.tokens_per_cell));
        }

        /// Nobody reports on what wasn't asked of it.
        #[test]
        fn strangers_are_refused(call in any_call(), share in 0usize..9, group in 0usize..40, from in 0usize..90, n in 0usize..90) {
            let Some((shape, plan)) = planned(&call, 1 << 13) else { return Ok(()) };
            let plan = plan.verify(&shape).unwrap();
            let id = ReportId { group, first_token: from, tokens: n };
            let plain = Operator::plain(1.0, Causal::None);
            let none = Arc::new(Outputs::new(OutputsParts::default(), &shape, &plain).unwrap());
            let is_asked = all_reports(&plan).contains(&(share, id));
            let mut reports = Reports::new(&plan, none);
            let owed = reports.missing_of(share);
            prop_assert_eq!(reports.accept(share, id, true).is_ok(), is_asked);
            prop_assert_eq!(owed - reports.missing_of(share), usize::from(is_asked));
        }
    }
}
