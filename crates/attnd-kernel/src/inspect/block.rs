//! A block of rows over pages: their scores once more, and what is wanted of each row of each page.

use std::ops::Range;

use super::bins::Collected;
use super::elements::Tiles;
use super::outputs::{ENTROPY_SHARE, ENTROPY_UNIT, Stage};
use super::report::{NodeReport, first};
use super::row::Moments;
use super::top::{TopRows, merge_best};
use super::{Pass, Sink};
use crate::attend::{ScoreOverflow, with_scratch};
use crate::block::{RowBlock, Visible};
use crate::canonical::{finite_max, log2};
use crate::dispatch::{GeneralEntries, InspectEntries};
use crate::float_env::FloatEnvironment;
use crate::general::reduce::Layout;
use crate::general::{GeneralBlock, RowTerms, add_and_mask, row_of};
use crate::mask::PageBits;
use crate::normaliser::Normaliser;
use crate::slot::PAGE_KEYS;
use crate::widen::widened_key_floats;

/// What is known of a row before the pass, and what its sums are multiplied by.
struct Row {
    /// Head in the group and query token.
    place: (usize, usize),
    /// `m'`.
    shift: f32,
    l: f32,
    /// `ln l`.
    log_l: f64,
    position: f32,
    /// What a weight counts in a mean.
    mean: f64,
    /// What a sum of weights counts in a mass, and in the heatmap.
    mass: f64,
    heat: f64,
    /// Of the heatmap.
    line: usize,
}

/// The heads and tokens of a block.
#[derive(Clone, Debug)]
pub(super) struct Rows {
    pub(super) heads: Range<usize>,
    pub(super) tokens: Range<usize>,
}

impl Rows {
    fn len(&self) -> usize {
        self.heads.len() * self.tokens.len()
    }

    /// Token first, so that neighbouring rows see nearly the same keys.
    fn place(&self, row: usize) -> (usize, usize) {
        (self.heads.start + row % self.heads.len(), self.tokens.start + row / self.heads.len())
    }
}

impl Pass<'_> {
    /// Covers `pages`, ascending, for the rows of a block.
    pub(super) fn block(&self, rows: &Rows, pages: &[usize], sink: &Sink<'_>) {
        let call = self.call;
        let (shape, operator, kv) = (&call.shape, call.operator, call.kv);
        let (n_rows, d) = (rows.len(), operator.packed_dim(shape));
        let mask = operator.mask_of_group(call.group, shape);
        let visible: Vec<Range<usize>> = (0..n_rows).map(|row| mask.visible(rows.place(row).1)).collect();
        let layout = Layout::new(operator.reducer(), n_rows, d, operator.factor(), self.kernels);
        let query_words = layout.words().next_multiple_of(16);
        let floats = query_words + n_rows * PAGE_KEYS + widened_key_floats(kv);

        let _standard = FloatEnvironment::standard();
        with_scratch(floats, |memory| {
            let (q, memory) = memory.split_at_mut(query_words);
            let (scores, widened) = memory.split_at_mut(n_rows * PAGE_KEYS);
            let of_row = |row: usize| {
                let (head, token) = rows.place(row);
                self.queries.row(head, token)
            };
            let q = &mut q[..layout.words()];
            let of_rows = (0..n_rows).map(of_row).collect::<Vec<_>>();
            let weights_of = |row: usize| operator.weights(shape, call.group, rows.place(row).0);
            layout.pack(self.kernels, &of_rows, &(0..n_rows).map(weights_of).collect::<Vec<_>>(), q);
            let terms: Vec<RowTerms<'_>> =
                (0..n_rows).map(|row| call.terms(rows.place(row), &mask)).collect();
            let block = GeneralBlock {
                rows: RowBlock { q, visible: &visible, kv, pages },
                layout,
                terms: &terms,
                cap: operator.cap(),
                normaliser: operator.normaliser(),
            };
            let parts = self.wanted.parts();
            let of = |is_wanted: bool| if is_wanted { n_rows } else { 0 };
            let lines = rows.heads.len() * self.wanted.heat_rows_of(&rows.tokens).len();
            let mut walk = Walk {
                pass: self,
                sink,
                general: self.kernels.general(),
                inspect: self.kernels.inspect(),
                block: &block,
                intervals: Visible::new(&visible, shape.n_keys()),
                bounds: rows,
                rows: (0..n_rows).map(|row| self.row(rows, row, mask.position(rows.place(row).1))).collect(),
                scores,
                widened,
                weights: [0.0; PAGE_KEYS],
                top: (parts.top_k > 0).then(|| TopRows::new(n_rows, parts.top_k)),
                mass: self.wanted.mass_bins().map(|bins| Collected::new(bins, n_rows)),
                heat: self.wanted.heat_columns().map(|bins| Collected::new(bins, lines)),
                entropy: vec![0; of(parts.entropy)],
                distance: vec![0; of(parts.distance)],
                max_score: vec![f32::NEG_INFINITY; of(parts.max_score)],
                overflow: None,
            };
            // A row's highest scores are often those of its latest keys: then few others are ever among the best.
            for page in pages.iter().rev() {
                walk.page(*page);
            }
            walk.join();
        });
    }

    fn row(&self, rows: &Rows, row: usize, position: i64) -> Row {
        let (wanted, place) = (self.wanted, rows.place(row));
        let (head, token) = place;
        let at = head * self.tokens.len() + token - self.tokens.start;
        let (m, l) = (self.sums.m[at], self.sums.l[at]);
        let mean = 1.0 / f64::from(l);
        let of_weight = match self.call.operator.normaliser() {
            Normaliser::Softmax => mean,
            Normaliser::Sigmoid { .. } => 1.0,
        };
        let heat_rows = wanted.heat_rows_of(&rows.tokens);
        let heat_row = wanted.heat_rows().map_or(0, |bins| bins.of(token) - heat_rows.start);
        Row {
            place,
            shift: finite_max(m),
            l,
            log_l: std::f64::consts::LN_2 * log2(f64::from(l)),
            position: position as f32,
            mean,
            mass: of_weight * 2.0_f64.powi(wanted.units.mass),
            heat: of_weight * 2.0_f64.powi(wanted.units.heat),
            line: (head - rows.heads.start) * heat_rows.len() + heat_row,
        }
    }
}

/// A block on its way through the pages.
struct Walk<'a, 's> {
    pass: &'a Pass<'a>,
    sink: &'a Sink<'s>,
    general: &'static GeneralEntries,
    inspect: &'static InspectEntries,
    block: &'a GeneralBlock<'a>,
    intervals: Visible<'a>,
    bounds: &'a Rows,
    rows: Vec<Row>,
    scores: &'a mut [f32],
    widened: &'a mut [f32],
    /// Of one row over one page.
    weights: [f32; PAGE_KEYS],
    top: Option<TopRows>,
    mass: Option<Collected>,
    heat: Option<Collected>,
    entropy: Vec<i64>,
    distance: Vec<i64>,
    max_score: Vec<f32>,
    overflow: Option<ScoreOverflow>,
}

impl Walk<'_, '_> {
    fn page(&mut self, page: usize) {
        let (wanted, call) = (self.pass.wanted, self.pass.call);
        let n_rows = self.rows.len();
        let seen: Vec<PageBits> =
            (0..n_rows).map(|row| self.block.seen(&self.intervals, row, page)).collect();
        let bounds = (&self.bounds.heads, &self.bounds.tokens);
        let mut tiles = Tiles::of_page(wanted, call.group, bounds, page);
        // Keys that are masked have scores too, if these are asked for.
        let vectors = if tiles.have(Stage::Raw) || tiles.have(Stage::Capped) {
            0..PAGE_KEYS
        } else {
            seen.iter().fold(PageBits::default(), |hull, row| hull.or(row)).vectors()
        };
        if vectors.is_empty() && tiles.is_empty() {
            return;
        }
        if !vectors.is_empty() {
            let Some(view) = call.kv.page(page) else { panic!("page {page} is not resident") };
            let k = self.inspect.key_panels(call.kv, view, self.widened);
            self.block.scores((k, page), &vectors, self.scores);
        }
        if seen.iter().any(|row| !row.is_empty()) {
            for collected in [&mut self.mass, &mut self.heat].into_iter().flatten() {
                collected.begin(page, call.shape.n_keys());
            }
        }
        for (row, seen) in seen.iter().enumerate() {
            self.row(row, page, seen, &vectors, &mut tiles);
        }
        if !tiles.is_empty() {
            self.sink.emit(&tiles);
        }
        if [&self.mass, &self.heat].into_iter().flatten().any(Collected::is_full) {
            self.flush();
        }
    }

    /// A row of a page: from its products to what is wanted of it.
    fn row(&mut self, row: usize, page: usize, seen: &PageBits, vectors: &Range<usize>, tiles: &mut Tiles) {
        let Row { place, l, .. } = self.rows[row];
        let (entries, block) = (self.general, self.block);
        let operator = self.pass.call.operator;
        let natural = |score: f32| score * std::f32::consts::LN_2;
        let s = row_of(self.scores, row);
        let mut left_range = false;
        if !vectors.is_empty() && (!seen.is_empty() || tiles.have(Stage::Capped) || tiles.have(Stage::Raw)) {
            match (block.cap, operator.softcap()) {
                (Some(cap), Some(softcap)) => {
                    tiles.put(Stage::Raw, place, s, |score| score * softcap);
                    left_range |= entries.cap(s, vectors.clone(), cap, seen);
                }
                _ => tiles.put(Stage::Raw, place, s, natural),
            }
            tiles.put(Stage::Capped, place, s, natural);
        }
        if seen.is_empty() {
            tiles.put(Stage::Masked, place, s, |_| f32::NEG_INFINITY);
            tiles.put(Stage::Weights, place, s, |_| 0.0);
            return;
        }
        left_range |= add_and_mask(entries, block, row, page, seen, vectors.clone(), s);
        if left_range || l.is_nan() {
            let (head_in_group, token) = place;
            self.overflow = first(self.overflow, Some(ScoreOverflow { head_in_group, token }));
        }
        if tiles.have(Stage::Masked) || tiles.have(Stage::Weights) {
            s[..vectors.start].fill(f32::NEG_INFINITY);
            s[vectors.end..].fill(f32::NEG_INFINITY);
            tiles.put(Stage::Masked, place, s, natural);
        }

        if let Some(top) = &mut self.top {
            let keys = self.inspect.at_least(s, vectors.clone(), top.least(row));
            if !keys.is_empty() {
                top.offer(row, page, s, &keys);
            }
        }
        if let Some(max) = self.max_score.get_mut(row) {
            let highest = self.inspect.highest(s, vectors.clone());
            *max = if highest > *max { highest } else { *max };
        }
        let moments = !self.entropy.is_empty() || !self.distance.is_empty();
        if moments || self.mass.is_some() || self.heat.is_some() || tiles.have(Stage::Weights) {
            self.weights(row, page, vectors, moments, tiles);
        }
    }

    /// The weights of a row of a page, and what is made of them. Rows that are no numbers, or whose weights are all flushed, have none.
    fn weights(&mut self, row: usize, page: usize, vectors: &Range<usize>, moments: bool, tiles: &mut Tiles) {
        let Row { place, shift, l, position, mass: of_mass, heat: of_heat, line, .. } = self.rows[row];
        let (s, p) = (row_of(self.scores, row), &mut self.weights);
        let has_weights = l > 0.0;
        if !has_weights {
            let weight = if l.is_nan() { f32::NAN } else { 0.0 };
            tiles.put(
                Stage::Weights,
                place,
                s,
                |score| if score == f32::NEG_INFINITY { 0.0 } else { weight },
            );
            return;
        }
        match self.block.normaliser {
            Normaliser::Softmax => {
                self.inspect.weights(s, vectors.clone(), shift, p);
                tiles.put(Stage::Weights, place, p, |weight| weight / l);
            }
            Normaliser::Sigmoid { bias } => {
                p.fill(0.0);
                p[vectors.clone()].copy_from_slice(&s[vectors.clone()]);
                self.general.sigmoids(p, vectors.clone(), bias);
                tiles.put(Stage::Weights, place, p, |weight| weight);
            }
        }
        let (s, p) = (&*s, &*p);
        if moments {
            let first_key = page * PAGE_KEYS;
            let found = self.inspect.moments((s, p), vectors.clone(), shift, position, first_key);
            self.add_moments(row, found);
        }
        let Self { inspect, weights, .. } = self;
        if let Some(mass) = &mut self.mass {
            mass.add(row, of_mass, |ends, sums| inspect.segment_sums(weights, ends, sums));
        }
        if let Some(heat) = &mut self.heat {
            heat.add(line, of_heat, |ends, sums| inspect.segment_sums(weights, ends, sums));
        }
    }

    /// Adds a page's share to a row's entropy and distance, rounded towards zero.
    fn add_moments(&mut self, row: usize, Moments { mass, depth, distance }: Moments) {
        let Row { mean, log_l, .. } = self.rows[row];
        if let Some(entropy) = self.entropy.get_mut(row) {
            // -ln w = ln 2 (m - s) + ln l.
            let depth = std::f64::consts::LN_2 * f64::from(depth) + log_l * f64::from(mass);
            let share = depth * mean * 2.0_f64.powi(ENTROPY_UNIT);
            *entropy = entropy.saturating_add(share.clamp(-ENTROPY_SHARE, ENTROPY_SHARE) as i64);
        }
        if let Some(sum) = self.distance.get_mut(row) {
            let share = f64::from(distance) * mean * 2.0_f64.powi(self.pass.wanted.units.distance);
            *sum = sum.saturating_add(share as i64);
        }
    }

    /// Where the rows of the block are among those of a report.
    fn at(&self, report: &NodeReport, row: usize) -> usize {
        let (head, token) = self.rows[row].place;
        (head - report.heads.start) * report.tokens.len() + token - report.tokens.start
    }

    /// Adds the sums that wait to the report.
    fn flush(&mut self) {
        let wanted = self.pass.wanted;
        let (mut mass, mut heat) = (self.mass.take(), self.heat.take());
        self.sink.report(|report| {
            if let Some(mass) = &mut mass {
                let blocks = wanted.mass_blocks();
                let line_at: Vec<usize> =
                    (0..self.rows.len()).map(|row| self.at(report, row) * blocks).collect();
                mass.flush(&mut report.mass, |line| line_at[line]);
            }
            if let Some(heat) = &mut heat {
                let rows = wanted.heat_rows_of(&self.bounds.tokens);
                let to = &mut report.heat;
                let (first_head, first_row) = (self.bounds.heads.start, rows.start);
                let (heads, all_rows, columns) = (to.heads.clone(), to.rows.clone(), to.columns);
                heat.flush(&mut to.cells, |line| {
                    let (head, row) = (first_head + line / rows.len(), first_row + line % rows.len());
                    ((head - heads.start) * all_rows.len() + row - all_rows.start) * columns
                });
            }
        });
        (self.mass, self.heat) = (mass, heat);
    }

    /// Adds all that the block found to the report.
    fn join(mut self) {
        self.flush();
        let k = self.pass.wanted.parts().top_k;
        let mut top = self.top.take();
        self.sink.report(|report| {
            for row in 0..self.rows.len() {
                let at = self.at(report, row);
                if let Some(top) = &mut top {
                    merge_best(&mut report.top[at * k..][..k], top.best(row));
                }
                if let Some(sum) = self.entropy.get(row) {
                    report.entropy[at] = report.entropy[at].saturating_add(*sum);
                }
                if let Some(sum) = self.distance.get(row) {
                    report.distance[at] = report.distance[at].saturating_add(*sum);
                }
                if let Some(max) = self.max_score.get(row).filter(|max| **max > report.max_score[at]) {
                    report.max_score[at] = *max;
                }
            }
            report.overflow = first(report.overflow, self.overflow);
        });
    }
}
