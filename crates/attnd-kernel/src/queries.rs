//! The family with lanes = queries: a block of many rows over pages, scores and output transposed.
//!
//! Queries lie in groups of up to three vectors of lanes. Keys and value columns are broadcast, so the maximum, the
//! sum and the rescaling of a row are operations between vectors, and there is no reduction across lanes at all:
//!
//! ```text
//! scores:  S^T[keys][lanes]    += broadcast(K panel[x][key]) * Q^T[x][lanes]          x ascending
//! softmax: m, l and P^T in place, a lane at a time
//! context: O^T[columns][lanes] += broadcast(V panel[j][column]) * P^T[j][lanes]       j ascending
//! ```
//!
//! Pages are walked in the order of the canonical tree, and each page's partial merges with those that wait for it
//! while the context tile is still in registers. The groups of a block take turns on a page, which then comes from
//! memory once.
//!
//! Rows that see a part of a page: a lane's invisible scores become -inf, whose weight is 0 by rule 3. A product with that is
//! 0, unless a value is NaN or infinite; where a partial page has such values, products of invisible keys are undone by a
//! select. What is left is the sign of a zero in `o`, which rule 8 drops.

#[cfg(all(feature = "free-order", target_arch = "x86_64"))]
pub(crate) mod free_order;
mod softmax;
mod tile;

use std::ops::Range;

use crate::arithmetic::Arithmetic;
use crate::block::{RowBlock, RowPartials, Seen, Span, Visible, by_slot};
use crate::compute::Compute;
use crate::fold::{STACK, Stack};
use crate::lanes::{DotLanes, LANES, Lanes};
use crate::pages::{KvView, padded_columns};
use crate::slot::{PAGE_KEYS, slot_of_page};
use crate::widen::{panels, widened_floats};

/// Vectors of lanes in a group, at most.
const MAX_VECTORS: usize = 3;

/// How the rows of a block are cut into groups of lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Groups {
    n_rows: usize,
    n_groups: usize,
    /// Whether memory is asked for a page while the one before is worked on.
    prefetch: bool,
}

impl Groups {
    /// Cuts `n_rows` rows into as few groups of at most `vectors` vectors as possible, evenly.
    pub(crate) fn new(n_rows: usize, vectors: usize, prefetch: bool) -> Self {
        Self { n_rows, n_groups: n_rows.div_ceil(LANES * vectors.min(MAX_VECTORS)), prefetch }
    }

    /// Rows of the block.
    pub(crate) fn rows(self) -> usize {
        self.n_rows
    }

    /// Lanes of all groups, those without a row included.
    pub(crate) fn lanes(self) -> usize {
        self.n_rows.next_multiple_of(LANES)
    }

    /// The lanes of one group.
    fn group(self, group: usize) -> Range<usize> {
        let vectors = self.lanes() / LANES;
        let first = |group: usize| LANES * (vectors * group / self.n_groups);
        first(group)..first(group + 1)
    }
}

/// What a group needs besides its queries, in f32s: partials, rescaling factors, and a few vectors.
fn group_floats(lanes: usize, columns: usize) -> usize {
    lanes * (STACK * (columns + 2) + 2 * STACK + 3)
}

/// Memory that [`attend_queries`] works in, in f32s.
pub(crate) fn scratch_floats(groups: Groups, kv: &KvView, compute: Compute) -> usize {
    let widest = (0..groups.n_groups).map(|group| groups.group(group).len()).max().unwrap_or(0);
    let widened = if compute == Compute::F32 { widened_floats(kv) } else { 0 };
    PAGE_KEYS * widest + group_floats(groups.lanes(), padded_columns(kv.value_dim())) + widened
}

/// Transposes the rows of a block into `q`, multiplied by `factor`: `q[group][x][lane]`. Lanes without a row are zero.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If `rows` or `q` have other lengths than the groups and `d` say.
#[inline(always)]
pub(crate) unsafe fn pack<L: Lanes>(groups: Groups, d: usize, rows: &[&[f32]], factor: f32, q: &mut [f32]) {
    assert!(rows.len() == groups.n_rows && rows.iter().all(|row| row.len() == d));
    assert_eq!(q.len(), groups.lanes() * d);
    let whole = d / LANES * LANES;
    for group in 0..groups.n_groups {
        let lanes = groups.group(group);
        let width = lanes.len();
        let q = &mut q[lanes.start * d..lanes.end * d];
        for first in (0..width).step_by(LANES) {
            let rows = &rows[lanes.start + first..];
            let rows = &rows[..rows.len().min(LANES)];
            // SAFETY: the ISA is enabled; a row has `d` elements, of which vectors end at `whole`, and a step of `q`
            // has `width` lanes, of which these 16 begin at `first`.
            unsafe {
                let factor = L::splat(factor);
                for x in (0..whole).step_by(LANES) {
                    let mut vectors = [L::zero(); LANES];
                    // All 16 by number: a loop over as many as there are would keep the vectors in memory.
                    if let Ok(rows) = <&[&[f32]; LANES]>::try_from(rows) {
                        for i in 0..LANES {
                            vectors[i] = L::mul(L::load(rows[i].as_ptr().add(x)), factor);
                        }
                    } else {
                        for (vector, row) in vectors.iter_mut().zip(rows) {
                            *vector = L::mul(L::load(row.as_ptr().add(x)), factor);
                        }
                    }
                    let vectors = L::transpose(vectors);
                    for i in 0..LANES {
                        L::store(q.as_mut_ptr().add((x + i) * width + first), vectors[i]);
                    }
                }
            }
            for x in whole..d {
                let to = &mut q[x * width + first..][..LANES];
                to.fill(0.0);
                for (to, row) in to.iter_mut().zip(rows) {
                    *to = row[x] * factor;
                }
            }
        }
    }
}

/// Makes words of pairs of what [`pack`] left, in place: `q[group][x / 2][lane]`. A last dimension without a partner gets 0.
///
/// # Safety
/// The ISA of `L`, and its dot products, are enabled.
///
/// # Panics
/// If `q` has another length than the groups and `d` say.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
#[inline(always)]
pub(crate) unsafe fn pair<L: DotLanes>(groups: Groups, d: usize, q: &mut [f32]) {
    assert_eq!(q.len(), groups.lanes() * d);
    for group in 0..groups.n_groups {
        let lanes = groups.group(group);
        let width = lanes.len();
        let q = q[lanes.start * d..lanes.end * d].as_mut_ptr();
        for x in (0..d).step_by(2) {
            for first in (0..width).step_by(LANES) {
                // SAFETY: the ISA is enabled; there are `d` rows of `width` lanes, and row x / 2 has been read.
                unsafe {
                    let even = L::load(q.add(x * width + first));
                    let odd = if x + 1 < d { L::load(q.add((x + 1) * width + first)) } else { L::zero() };
                    L::store(q.add(x / 2 * width + first), L::bf16_pairs(even, odd));
                }
            }
        }
    }
}

/// Computes the partial of a block of rows. Returns the first row of which a score overflowed f32. The largest tile is
/// `KEYS` keys by `VECTORS` vectors of queries.
///
/// # Safety
/// The ISA of `L`, and what `A` needs, is enabled; `A` is f32, or for the storage of the block's keys and values. The block has
/// been checked, and its queries are packed for `A`.
#[inline(always)]
pub(crate) unsafe fn attend_queries<L: Lanes, A: Arithmetic<L>, const KEYS: usize, const VECTORS: usize>(
    block: &RowBlock<'_>,
    groups: Groups,
    scratch: &mut [f32],
    out: &mut RowPartials<'_>,
) -> Option<usize> {
    let (d, columns) = (block.kv.head_dim(), padded_columns(block.kv.value_dim()));
    let (mut rest, scratch) = scratch.split_at_mut(group_floats(groups.lanes(), columns));
    const { assert!(!A::SCALED && !A::INTEGERS && (A::PER_WORD == 1 || A::PARTS == 1)) };
    let as_stored = const { A::PER_WORD > 1 };
    let (widened, scores) = scratch.split_at_mut(if as_stored { 0 } else { widened_floats(block.kv) });
    let mut parts: Vec<Group<'_>> = Vec::with_capacity(groups.n_groups);
    for group in 0..groups.n_groups {
        let lanes = groups.group(group);
        let (own, others) = rest.split_at_mut(group_floats(lanes.len(), columns));
        rest = others;
        let rows = lanes.start..lanes.end.min(groups.n_rows);
        let q = &block.q[lanes.start * d..lanes.end * d];
        parts.push(Group::new(block, rows, q, lanes.len(), own));
    }
    let order: Vec<usize> = by_slot(block.pages)
        .filter(|page| parts.iter().any(|group| group.visible.of_page(*page) != Seen::Nothing))
        .collect();
    for (i, page) in order.iter().enumerate() {
        let Some(stored) = block.kv.page(*page) else {
            panic!("page {page} is not resident");
        };
        // Behind the last page, the first one: that is where the block that comes next mostly begins.
        let next = order.get(i + 1).or(order.first()).filter(|next| groups.prefetch && *next != page);
        let next = next.and_then(|page| block.kv.page_memory(*page));
        let mut next = tile::Next::new(next.unwrap_or_default(), block.q);
        // SAFETY: the ISA is enabled, and scratch has been cut for the widest group.
        unsafe {
            let panels =
                if as_stored { (stored.k, stored.v) } else { panels::<L>(block.kv, stored, widened) };
            for group in &mut parts {
                // Constant conditions keep the tiles that an ISA doesn't have from being compiled.
                match group.lanes / LANES {
                    1 => group.page::<L, A, KEYS, 1>(panels, *page, &order[i + 1..], scores, &mut next),
                    2 if const { VECTORS >= 2 } => {
                        group.page::<L, A, KEYS, 2>(panels, *page, &order[i + 1..], scores, &mut next);
                    }
                    3 if const { VECTORS >= 3 } => {
                        group.page::<L, A, KEYS, 3>(panels, *page, &order[i + 1..], scores, &mut next);
                    }
                    vectors => panic!("a group of {vectors} vectors of queries, where {VECTORS} is the most"),
                }
            }
        }
    }
    let mut overflow = None;
    for group in &parts {
        // SAFETY: the ISA is enabled.
        let found = unsafe { group.finish::<L>(out) };
        overflow = overflow.or(found);
    }
    overflow
}

/// One group of lanes, and how far it has come.
struct Group<'a> {
    /// Rows of the block; the lanes behind the last one have none.
    rows: Range<usize>,
    lanes: usize,
    columns: usize,
    q: &'a [f32],
    visible: Visible<'a>,
    stack: Stack,
    /// Those on the stack: `[STACK][m [lanes], l [lanes], o [columns, lanes]]`.
    partials: &'a mut [f32],
    /// What the merges of a page multiply by: `[STACK][left [lanes], right [lanes]]`.
    factors: &'a mut [f32],
    /// First key of the page at hand that a lane sees, and the one behind the last: `[2][lanes]`.
    seen: &'a mut [f32],
    /// The smallest score that a lane has seen: `[lanes]`.
    lowest: &'a mut [f32],
}

impl<'a> Group<'a> {
    fn new(
        block: &RowBlock<'a>,
        rows: Range<usize>,
        q: &'a [f32],
        lanes: usize,
        memory: &'a mut [f32],
    ) -> Self {
        let columns = padded_columns(block.kv.value_dim());
        let (partials, memory) = memory.split_at_mut(STACK * lanes * (columns + 2));
        let (factors, memory) = memory.split_at_mut(STACK * 2 * lanes);
        let (seen, lowest) = memory.split_at_mut(2 * lanes);
        lowest.fill(f32::INFINITY);
        let visible = Visible::new(&block.visible[rows.clone()], block.kv.n_keys());
        Self { rows, lanes, columns, q, visible, stack: Stack::default(), partials, factors, seen, lowest }
    }

    /// Computes the partial of a page, if any row sees a key of it, and merges it with those that wait. `later` are
    /// the pages that follow, `next_page` is asked for meanwhile.
    ///
    /// # Safety
    /// The ISA of `L` is enabled; `scores` is valid for `256 * lanes` elements, and the group has `NR` vectors of lanes.
    #[inline(always)]
    unsafe fn page<L: Lanes, A: Arithmetic<L>, const MR: usize, const NR: usize>(
        &mut self,
        (k, v): (&[f32], &[f32]),
        page: usize,
        later: &[usize],
        scores: &mut [f32],
        next_page: &mut tile::Next,
    ) {
        let seen = self.visible.of_page(page);
        if seen == Seen::Nothing {
            return;
        }
        let d = self.q.len() / self.lanes;
        assert!(k.len() >= PAGE_KEYS * d.div_ceil(A::PER_WORD));
        assert!(v.len() >= PAGE_KEYS / A::PER_WORD * self.columns);
        assert!(self.lanes == LANES * NR && scores.len() >= PAGE_KEYS * self.lanes);
        let next = later.iter().find(|page| self.visible.of_page(**page) != Seen::Nothing);
        let place = self.stack.depth();
        let merges = self.stack.push(slot_of_page(page), next.map(|page| slot_of_page(*page)));
        let keys = if seen == Seen::Whole { tile::WHOLE_PAGE } else { self.keys_of(page) };
        let s = scores.as_mut_ptr();
        let size = self.lanes * (self.columns + 2);
        // SAFETY: q, scores and the group's memory have been cut for `lanes` and `columns`; the panels are long
        // enough, as has been asserted; a stack of STACK partials has the places used here.
        unsafe {
            let mut extremes =
                tile::scores::<L, A, MR, NR>(k.as_ptr(), d, &keys, self.q.as_ptr(), s, next_page);
            if seen == Seen::Part {
                extremes = softmax::hide::<L, NR>(s, &keys, self.seen.as_ptr());
            }
            let partials = self.partials.as_mut_ptr();
            let (top, to) = (partials.add(place * size), partials.add((place - merges) * size));
            let sums = softmax::weigh::<L, A, NR>(s, &keys, &extremes);
            for n in 0..NR {
                let lowest = self.lowest.as_mut_ptr().add(LANES * n);
                L::store(lowest, L::min(L::load(lowest), extremes.smallest[n]));
            }
            let factors = self.factors.as_mut_ptr();
            softmax::merge::<L, NR>(sums, merges, top, size, factors, to);
            let o = tile::Merge {
                merges,
                left: top.add(2 * self.lanes),
                size,
                factors,
                to: to.add(2 * self.lanes),
            };
            tile::context::<L, A, MR, NR>(
                v.as_ptr(),
                self.columns,
                &keys,
                self.seen.as_ptr(),
                s,
                &o,
                next_page,
            );
        }
    }

    /// The keys of a page that the lanes see; notes each lane's in `seen`.
    fn keys_of(&mut self, page: usize) -> Span {
        let (first, end) = self.seen.split_at_mut(self.lanes);
        // Lanes without a row see nothing.
        first.fill(0.0);
        end.fill(0.0);
        for lane in 0..self.rows.len() {
            let keys = self.visible.of_row(lane, page);
            (first[lane], end[lane]) = (keys.start as f32, keys.end as f32);
        }
        Span::of((0..self.rows.len()).map(|lane| self.visible.of_row(lane, page)))
    }

    /// Puts the rows in place; the first one of which a score overflowed f32.
    ///
    /// # Safety
    /// The ISA of `L` is enabled.
    #[inline(always)]
    unsafe fn finish<L: Lanes>(&self, out: &mut RowPartials<'_>) -> Option<usize> {
        let (lanes, columns, rows) = (self.lanes, self.columns, self.rows.clone());
        let (out_m, out_l) = (&mut out.m[rows.clone()], &mut out.l[rows.clone()]);
        let out_o = &mut out.o[rows.start * columns..rows.end * columns];
        if self.stack.depth() == 0 {
            out_m.fill(f32::NEG_INFINITY);
            out_l.fill(0.0);
            out_o.fill(0.0);
            return None;
        }
        let (m, rest) = self.partials.split_at(lanes);
        let (l, o) = rest.split_at(lanes);
        out_m.copy_from_slice(&m[..rows.len()]);
        out_l.copy_from_slice(&l[..rows.len()]);
        for lane in (0..rows.len()).step_by(LANES) {
            let n_rows = LANES.min(rows.len() - lane);
            for column in (0..columns).step_by(LANES) {
                // SAFETY: o has `columns` rows of `lanes` elements, both multiples of 16, and out_o has a row for each
                // lane that is stored.
                unsafe {
                    let mut vectors = [L::zero(); LANES];
                    for i in 0..LANES {
                        vectors[i] = L::load(o.as_ptr().add((column + i) * lanes + lane));
                    }
                    let of_rows = L::transpose(vectors);
                    let to = out_o.as_mut_ptr().add(lane * columns + column);
                    if n_rows == LANES {
                        for i in 0..LANES {
                            L::store(to.add(i * columns), of_rows[i]);
                        }
                    } else {
                        for (i, vector) in of_rows.iter().enumerate().take(n_rows) {
                            L::store(to.add(i * columns), *vector);
                        }
                    }
                }
            }
        }
        let left_range = |lane: usize| {
            self.lowest[lane] == f32::NEG_INFINITY || m[lane] == f32::INFINITY || l[lane].is_nan()
        };
        (0..rows.len()).find(|lane| left_range(*lane)).map(|lane| rows.start + lane)
    }
}
