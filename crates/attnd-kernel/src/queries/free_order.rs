//! The free order of a group of lanes: one running sum a lane, rescaled where the next page's context begins.

use super::softmax::Extremes;
use super::tile::{self, WHOLE_PAGE, cover};
use super::{Group, Groups, group_floats};
use crate::arithmetic::Arithmetic;
use crate::block::{RowBlock, RowPartials};
use crate::free_order::{F32, check, exp2};
use crate::lanes::{LANES, Lanes};
use crate::pages::{PANEL_COLUMNS, PageView, padded_columns};
use crate::product::{Ask, Operand, Scales, reduce};
use crate::slot::PAGE_KEYS;

/// Independent sums of weights: enough to hide the latency of an addition.
const SUMS: usize = 4;

/// As [`super::attend_queries`]. No overflow is looked for, except at the end of a row.
///
/// # Safety
/// As [`super::attend_queries`].
///
/// # Panics
/// If the block is none for the free order.
#[inline(always)]
pub(crate) unsafe fn attend_queries<L: Lanes, const KEYS: usize, const VECTORS: usize, const CLAMP: bool>(
    block: &RowBlock<'_>,
    groups: Groups,
    scratch: &mut [f32],
    out: &mut RowPartials<'_>,
) -> Option<usize> {
    check(block);
    let (d, columns) = (block.kv.head_dim(), padded_columns(block.kv.value_dim()));
    let (mut rest, scores) = scratch.split_at_mut(group_floats(groups.lanes(), columns));
    let mut parts: Vec<Group<'_>> = Vec::with_capacity(groups.n_groups);
    for group in 0..groups.n_groups {
        let lanes = groups.group(group);
        let (own, others) = rest.split_at_mut(group_floats(lanes.len(), columns));
        rest = others;
        let rows = lanes.start..lanes.end.min(groups.n_rows);
        let q = &block.q[lanes.start * d..lanes.end * d];
        parts.push(Group::new(block, rows, q, lanes.len(), own));
    }
    for page in block.pages {
        let Some(PageView { k, v, .. }) = block.kv.page(*page) else {
            panic!("page {page} is not resident");
        };
        // SAFETY: the ISA is enabled, and scratch has been cut for the widest group.
        unsafe {
            for group in &mut parts {
                match group.lanes / LANES {
                    1 => group.page_freely::<L, KEYS, 1, CLAMP>((k, v), scores),
                    2 if const { VECTORS >= 2 } => group.page_freely::<L, KEYS, 2, CLAMP>((k, v), scores),
                    3 if const { VECTORS >= 3 } => group.page_freely::<L, KEYS, 3, CLAMP>((k, v), scores),
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

impl Group<'_> {
    /// Adds a page to the running sum, which is the first partial.
    ///
    /// # Safety
    /// The ISA of `L` is enabled; `scores` is valid for `256 * lanes` elements, and the group has `NR` vectors of lanes.
    #[inline(always)]
    unsafe fn page_freely<L: Lanes, const MR: usize, const NR: usize, const CLAMP: bool>(
        &mut self,
        (k, v): (&[f32], &[f32]),
        scores: &mut [f32],
    ) {
        let d = self.q.len() / self.lanes;
        assert!(k.len() >= PAGE_KEYS * d && v.len() >= PAGE_KEYS * self.columns);
        assert!(self.lanes == LANES * NR && scores.len() >= PAGE_KEYS * self.lanes);
        let is_first = self.stack.depth() == 0;
        if is_first {
            self.stack.push(0, None);
        }
        let s = scores.as_mut_ptr();
        // SAFETY: q, scores and the group's memory have been cut for `lanes` and `columns`; the panels are long enough, as
        // has been asserted.
        unsafe {
            // Nothing asks for the smallest score, so nothing computes it.
            let Extremes { largest, .. } = tile::scores::<L, F32, MR, NR>(
                k.as_ptr(),
                d,
                &WHOLE_PAGE,
                self.q.as_ptr(),
                s,
                &mut tile::Next::new(&[], self.q),
            );
            let (running, factors) = (self.partials.as_mut_ptr(), self.factors.as_mut_ptr());
            weigh::<L, NR, CLAMP>(s, largest, is_first, running, factors);
            let o = Running { o: running.add(2 * self.lanes), factors, is_first };
            context::<L, MR, NR>(v.as_ptr(), self.columns, s, &o);
        }
    }
}

/// Turns the scores of a page into weights in place, and adds them to the running sum. Leaves what the output of the pages
/// before is multiplied by in `factors`.
///
/// # Safety
/// The ISA of `L` is enabled. `s` is valid for 256 rows of `16 * NR` elements, `running` for two (`m` and `l`), `factors`
/// for one.
#[inline(always)]
unsafe fn weigh<L: Lanes, const NR: usize, const CLAMP: bool>(
    s: *mut f32,
    largest: [L::V; NR],
    is_first: bool,
    running: *mut f32,
    factors: *mut f32,
) {
    // SAFETY: the ranges above, vector by vector.
    unsafe {
        for n in 0..NR {
            let (m, l) = (running.add(LANES * n), running.add(LANES * (NR + n)));
            let s = s.add(LANES * n);
            let mut shift = largest[n];
            let mut before = L::zero();
            if !is_first {
                let m_before = L::load(m);
                shift = L::max(m_before, shift);
                let factor = exp2::<L, CLAMP>(L::sub(m_before, shift));
                before = L::mul(L::load(l), factor);
                L::store(factors.add(LANES * n), factor);
            }
            let mut t = [L::zero(); SUMS];
            for j in (0..PAGE_KEYS).step_by(SUMS) {
                for i in 0..SUMS {
                    let at = s.add(LANES * NR * (j + i));
                    let p = exp2::<L, CLAMP>(L::sub(L::load(at), shift));
                    L::store(at, p);
                    t[i] = L::add(t[i], p);
                }
            }
            L::store(m, shift);
            L::store(l, L::add(before, L::add(L::add(t[0], t[1]), L::add(t[2], t[3]))));
        }
    }
}

/// The output of the pages before, which that of a page starts from and replaces.
struct Running {
    /// `[columns, lanes]`.
    o: *mut f32,
    /// What each lane of it is multiplied by: `[lanes]`.
    factors: *const f32,
    is_first: bool,
}

/// As [`tile::context`], of a whole page, added to the output of those before.
///
/// # Safety
/// The ISA of `L` is enabled. `v` (the page's V panels) is valid for its words, `columns` a multiple of 16, `p` for 256 rows
/// of `16 * NR`, the output for `columns`, and its factors for one.
#[inline(always)]
unsafe fn context<L: Lanes, const MR: usize, const NR: usize>(
    v: *const f32,
    columns: usize,
    p: *const f32,
    o: &Running,
) {
    // SAFETY: column * 256 is where a panel starts, because all panels before it are 64 wide; tiles stay inside one.
    unsafe {
        for first in (0..columns).step_by(PANEL_COLUMNS) {
            let width = PANEL_COLUMNS.min(columns - first);
            let v = Operand { at: v.add(first * PAGE_KEYS), step: width };
            cover!(width, |column| context_tile::<L, F32, MR, NR>(v, first, column, p, o));
        }
    }
}

/// `MR` columns from `column` of a panel on; `first` is the panel's first column.
///
/// # Safety
/// As [`context`]; `v` is the panel, and `column + MR` at most its width.
#[inline(always)]
unsafe fn context_tile<L: Lanes, A: Arithmetic<L>, const MR: usize, const NR: usize>(
    v: Operand,
    first: usize,
    column: usize,
    p: *const f32,
    running: &Running,
) {
    // SAFETY: the ranges above, element by element.
    unsafe {
        let o = running.o.add(LANES * NR * (first + column));
        let mut acc = [[L::zero(); NR]; MR];
        if !running.is_first {
            for n in 0..NR {
                let factor = L::load(running.factors.add(LANES * n));
                for r in 0..MR {
                    acc[r][n] = L::mul(L::load(o.add(LANES * (NR * r + n))), factor);
                }
            }
        }
        let v = Operand { at: v.at.add(column), ..v };
        let p = Operand { at: p, step: LANES * NR };
        reduce::<L, A, MR, NR, 1>(v, p, Scales::None, 0..PAGE_KEYS, Ask::Nothing, &mut acc);
        for r in 0..MR {
            for n in 0..NR {
                L::store(o.add(LANES * (NR * r + n)), acc[r][n]);
            }
        }
    }
}
