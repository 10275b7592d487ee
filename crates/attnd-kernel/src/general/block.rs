//! A block of rows on the general path: what of each page its rows see, and the stages over it.

use std::ops::Range;

use super::reduce::{Layout, Located};
use super::walk::Walk;
use crate::bias::{Ramp, RelativeRow, SwinRow};
use crate::block::{Place, QueryLayout, RowBlock, RowPartials, Seen, Visible};
use crate::compute::Compute;
use crate::dispatch::{GeneralEntries, Kernels};
use crate::mask::{KeyRuns, PageBits};
use crate::normaliser::Normaliser;
use crate::pages::{KvView, PANEL_KEYS, padded_columns};
use crate::plane::DensePlane;
use crate::rows::partials_alive;
use crate::rows::tile::Start;
use crate::slot::{PAGE_KEYS, n_pages};
use crate::widen::widened_floats;

/// What the scores of one row meet.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RowTerms<'a> {
    /// Row of the planes.
    pub(crate) token: usize,
    pub(crate) mask: Option<&'a DensePlane>,
    /// Added in this order.
    pub(crate) bias: Option<&'a DensePlane>,
    pub(crate) ramp: Option<Ramp>,
    pub(crate) relative: Option<RelativeRow<'a>>,
    pub(crate) swin: Option<SwinRow<'a>>,
    /// The row sees keys that are in each of them.
    pub(crate) runs: [Option<KeyRuns<'a>>; 2],
    /// What the score function asks for beside the two rows.
    pub(crate) located: Option<Located<'a>>,
}

/// A block whose rows are more than dot products of what they see.
pub(crate) struct GeneralBlock<'a> {
    /// Queries are packed by the layout.
    pub(crate) rows: RowBlock<'a>,
    pub(crate) layout: Layout,
    /// Of each row.
    pub(crate) terms: &'a [RowTerms<'a>],
    /// `fl(cap * log2 e)`, where scores are capped.
    pub(crate) cap: Option<f32>,
    pub(crate) normaliser: Normaliser,
}

impl QueryLayout {
    /// The layout for a block of `n_rows` rows on the general path.
    pub(crate) fn general(n_rows: usize, d: usize, kernels: &Kernels) -> Self {
        let place = Place::Tiles { n_rows, tile_rows: kernels.general().tile_rows(), prefetch: false };
        Self { d, compute: Compute::F32, place }
    }
}

/// Memory that [`attend`] works in, in f32s.
pub(crate) fn scratch_floats(n_rows: usize, kv: &KvView) -> usize {
    let partials = partials_alive(n_rows) * n_rows * (padded_columns(kv.value_dim()) + 2);
    n_rows * PAGE_KEYS + partials + widened_floats(kv)
}

/// Computes the partial of a block. Returns the first row of which a visible score, or a weight, left the range of f32.
///
/// # Panics
/// If the parts don't fit together.
pub(crate) fn attend(
    kernels: &Kernels,
    block: &GeneralBlock<'_>,
    scratch: &mut [f32],
    out: &mut RowPartials<'_>,
) -> Option<usize> {
    let (n_rows, kv) = (block.rows.visible.len(), block.rows.kv);
    let columns = padded_columns(kv.value_dim());
    assert_eq!(block.terms.len(), n_rows);
    let (scores, scratch) = scratch.split_at_mut(n_rows * PAGE_KEYS);
    let (partials, widened) = scratch.split_at_mut(partials_alive(n_rows) * n_rows * (columns + 2));
    let intervals = Visible::new(block.rows.visible, kv.n_keys());
    let listed = block.listed(kv.n_keys());
    let mut pages: Vec<usize> = block.rows.pages.to_vec();
    pages.retain(|page| {
        listed.as_ref().is_none_or(|listed| listed[*page])
            && intervals.of_page(*page) != Seen::Nothing
            && (0..n_rows).any(|row| !block.seen(&intervals, row, *page).is_empty())
    });
    let mut overflow: Option<usize> = None;
    let mut walk = Walk { kernels, n_rows, columns, partials };
    let mut stages = Stages { entries: kernels.general(), block, intervals, scores, widened };
    let result = walk.pages(&pages, |page, partial| {
        if let Some(row) = stages.page(page, partial) {
            overflow = Some(overflow.map_or(row, |first| first.min(row)));
        }
    });
    match result {
        Some(at) => {
            let partial = walk.partial(at);
            out.m.copy_from_slice(partial.m);
            out.l.copy_from_slice(partial.l);
            out.o.copy_from_slice(partial.o);
        }
        None => {
            out.m.fill(f32::NEG_INFINITY);
            out.l.fill(0.0);
            out.o.fill(0.0);
        }
    }
    overflow
}

impl GeneralBlock<'_> {
    /// Scores of all rows against whole panels of page `page` around `vectors`, before anything is done to them: `s[row * 256 + key]`.
    pub(crate) fn scores(&self, (k, page): (&[f32], usize), vectors: &Range<usize>, s: &mut [f32]) {
        let panels = vectors.start / PANEL_KEYS..vectors.end.div_ceil(PANEL_KEYS);
        self.layout.scores(self.rows.q, (k, page), panels, |row| self.terms[row].located, s);
    }

    /// The keys of a page that a row sees.
    pub(crate) fn seen(&self, intervals: &Visible<'_>, row: usize, page: usize) -> PageBits {
        let terms = &self.terms[row];
        let planes = [terms.mask, terms.bias].into_iter().flatten();
        let interval = PageBits::of(intervals.of_row(row, page));
        let seen = planes.fold(interval, |seen, plane| seen.and(plane.visible(terms.token, page)));
        terms.runs.iter().flatten().fold(seen, |seen, runs| seen.and(&runs.of_page(page)))
    }

    /// Which pages some list of runs has keys in, where there are lists: looking at each page for each row would cost more than the pages
    /// that they leave.
    fn listed(&self, n_keys: usize) -> Option<Vec<bool>> {
        let mut listed: Option<Vec<bool>> = None;
        for nth in 0..2 {
            if self.terms.iter().any(|terms| terms.runs[nth].is_none()) {
                continue;
            }
            let mut pages = vec![false; n_pages(n_keys)];
            let mut last: Option<KeyRuns<'_>> = None;
            for runs in self.terms.iter().filter_map(|terms| terms.runs[nth]) {
                // Heads, and the queries of a block, have their list in common.
                if !last.is_some_and(|last| last.is_same(&runs)) {
                    runs.mark_pages(&mut pages);
                }
                last = Some(runs);
            }
            listed = Some(match listed {
                None => pages,
                Some(others) => others.iter().zip(&pages).map(|(one, other)| *one && *other).collect(),
            });
        }
        listed
    }
}

/// The stages over one page, and the memory they share.
struct Stages<'a> {
    entries: &'static GeneralEntries,
    block: &'a GeneralBlock<'a>,
    intervals: Visible<'a>,
    scores: &'a mut [f32],
    widened: &'a mut [f32],
}

impl Stages<'_> {
    /// Writes the partial of a page of which some row sees some key; the first row with an overflow.
    fn page(&mut self, page: usize, partial: RowPartials<'_>) -> Option<usize> {
        let (block, kv) = (self.block, self.block.rows.kv);
        let (n_rows, columns) = (block.terms.len(), padded_columns(kv.value_dim()));
        let Some(view) = kv.page(page) else { panic!("page {page} is not resident") };
        let (k, v) = self.entries.panels(kv, view, self.widened);
        let seen: Vec<PageBits> = (0..n_rows).map(|row| block.seen(&self.intervals, row, page)).collect();
        let vectors = seen.iter().fold(PageBits::default(), |hull, row| hull.or(row)).vectors();

        block.scores((k, page), &vectors, self.scores);
        let mut overflow = None;
        for (row, seen) in seen.iter().enumerate() {
            let s = row_of(self.scores, row);
            if seen.is_empty() {
                s[vectors.clone()].fill(0.0);
                (partial.m[row], partial.l[row]) = (f32::NEG_INFINITY, 0.0);
                continue;
            }
            let left_range = shape(self.entries, block, row, page, seen, vectors.clone(), s);
            let (m, l) = match block.normaliser {
                Normaliser::Softmax => self.entries.softmax(s, vectors.clone()),
                Normaliser::Sigmoid { bias } => (0.0, self.entries.sigmoids(s, vectors.clone(), bias)),
            };
            (partial.m[row], partial.l[row]) = (m, l);
            if left_range || l.is_nan() {
                overflow = overflow.or(Some(row));
            }
        }

        if seen.iter().all(|row| *row == PageBits::WHOLE) || self.entries.are_finite(v) {
            self.entries.context(self.scores, n_rows, v, vectors, partial.o, columns, Start::Zero);
            return overflow;
        }
        for (row, (seen, o)) in seen.iter().zip(partial.o.chunks_exact_mut(columns)).enumerate() {
            o.fill(0.0);
            for keys in seen.runs() {
                self.entries.context(row_of(self.scores, row), 1, v, keys, o, columns, Start::Output);
            }
        }
        overflow
    }
}

/// Turns the products of a row into its scores, masked ones -inf. Returns whether a visible one left the range of f32.
fn shape(
    entries: &GeneralEntries,
    block: &GeneralBlock<'_>,
    row: usize,
    page: usize,
    seen: &PageBits,
    vectors: Range<usize>,
    s: &mut [f32; PAGE_KEYS],
) -> bool {
    let left_range = block.cap.is_some_and(|cap| entries.cap(s, vectors.clone(), cap, seen));
    left_range | add_and_mask(entries, block, row, page, seen, vectors, s)
}

/// The stages behind the cap: turns capped scores into those that are weighed. Returns what [`shape`] does.
pub(crate) fn add_and_mask(
    entries: &GeneralEntries,
    block: &GeneralBlock<'_>,
    row: usize,
    page: usize,
    seen: &PageBits,
    vectors: Range<usize>,
    s: &mut [f32; PAGE_KEYS],
) -> bool {
    let terms = &block.terms[row];
    if let Some(bias) = terms.bias.and_then(|plane| plane.values(terms.token, page)) {
        entries.add_bias(s, vectors.clone(), bias);
    }
    if let Some(ramp) = terms.ramp {
        let mut bias = [0.0; PAGE_KEYS];
        entries.fill_ramp(ramp, page, &mut bias);
        entries.add_bias(s, vectors.clone(), &bias);
    }
    if let Some(relative) = terms.relative {
        let mut bias = [0.0; PAGE_KEYS];
        relative.fill(page, &mut bias);
        entries.add_bias(s, vectors.clone(), &bias);
    }
    if let Some(swin) = terms.swin {
        let mut bias = [0.0; PAGE_KEYS];
        swin.fill(page, &mut bias);
        entries.add_bias(s, vectors.clone(), &bias);
    }
    entries.mask(s, vectors, seen)
}

/// The scores of a row over a page.
pub(crate) fn row_of(scores: &mut [f32], row: usize) -> &mut [f32; PAGE_KEYS] {
    let Some(row) = scores[row * PAGE_KEYS..].first_chunk_mut() else { panic!("no scores of row {row}") };
    row
}
