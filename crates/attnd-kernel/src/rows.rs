//! One block of rows over the pages of one tree node: the loop that everything else serves.
//!
//! A page gives a partial `(m, l, o)` of its own, from +0, so that pages can be computed anywhere. Partials then merge
//! in the canonical tree. Two orders of walking lead through the same tree:
//!
//! * **By slot**, for many rows: pages in (slot, page) order on a stack of partials. Before a new page is pushed, the
//!   top two entries merge while their lowest common ancestor is not above the one that the top has with the newcomer.
//!   Two pages of one slot have level 0, so they fold to the left; slots merge as the tree says. At most eight
//!   partials are alive, which stay in the second-level cache.
//! * **By address**, for few rows: the keys come from memory then, and walking forward is what lets them come at
//!   full bandwidth. Each page folds into the partial of its slot; the slots merge at the end by the same rule.
//!
//! Departures from the naive form, and why they change no bit: a page that no row of the block sees is left out,
//! because merging with the identity gives the other side back; rows that see a part of a page are reduced in up to
//! three pieces (alone, together, alone), because an accumulator that is stored and loaded again is the same number.

use std::ops::Range;

use crate::canonical::{finite_max, rescale};
use crate::lanes::Lanes;
use crate::pages::{KvHead, PANEL_KEYS, padded_columns};
use crate::slot::{N_SLOTS, PAGE_KEYS, TREE_LEVELS, slot_of_page};
use crate::softmax::softmax_row;
use crate::tile::{self, Start};

/// Rows that one call handles: few enough that scores and queries stay in the near caches, and a multiple of the tile.
pub(crate) const BLOCK_ROWS: usize = 96;
/// Up to this many rows, pages are walked by address.
const FEW_ROWS: usize = 6;
/// Partials alive when walking by slot: one per level, the newcomer, and one to fold a slot's next page into.
const STACK: usize = TREE_LEVELS as usize + 2;

/// What one call computes.
#[derive(Debug)]
pub(crate) struct RowBlock<'a> {
    /// `n_rows * head_dim` elements, multiplied by scale * log2 e, laid out by [`tile::query_row`].
    pub(crate) q: &'a [f32],
    /// Keys that each row sees, as positions in the sequence.
    pub(crate) visible: &'a [Range<usize>],
    /// Keys and values; every page of `pages` is resident.
    pub(crate) kv: &'a KvHead,
    /// Pages to cover, ascending.
    pub(crate) pages: &'a [usize],
}

/// Where the merged partial of a block goes.
#[derive(Debug)]
pub(crate) struct RowPartials<'a> {
    /// `[n_rows]`.
    pub(crate) m: &'a mut [f32],
    /// `[n_rows]`.
    pub(crate) l: &'a mut [f32],
    /// `[n_rows, padded columns]`.
    pub(crate) o: &'a mut [f32],
}

/// Memory that [`attend_rows`] works in, in f32s.
pub(crate) fn scratch_floats(n_rows: usize, value_dim: usize) -> usize {
    n_rows * PAGE_KEYS + partials_alive(n_rows) * n_rows * (padded_columns(value_dim) + 2)
}

fn partials_alive(n_rows: usize) -> usize {
    if n_rows <= FEW_ROWS { N_SLOTS + 1 } else { STACK }
}

/// The lowest level of the tree at which two slots share a node.
fn common_level(a: usize, b: usize) -> u32 {
    usize::BITS - (a ^ b).leading_zeros()
}

/// Computes the partial of a block of rows. Returns the first row of which a score overflowed f32.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If a slice is too short for its shape.
#[inline(always)]
pub(crate) unsafe fn attend_rows<L: Lanes, const MR: usize, const NR: usize>(
    block: &RowBlock<'_>,
    scratch: &mut [f32],
    out: &mut RowPartials<'_>,
) -> Option<usize> {
    let n_rows = block.visible.len();
    let columns = padded_columns(block.kv.value_dim());
    assert!(MR <= tile::MAX_ROWS && NR <= 4 && PANEL_KEYS.is_multiple_of(16 * NR));
    assert_eq!(block.q.len(), n_rows * block.kv.head_dim());
    assert!(scratch.len() >= scratch_floats(n_rows, block.kv.value_dim()));
    assert!(out.m.len() == n_rows && out.l.len() == n_rows && out.o.len() == n_rows * columns);

    let (scores, partials) = scratch.split_at_mut(n_rows * PAGE_KEYS);
    let mut walk = Walk { n_rows, columns, partials, scores, overflow: None };
    // SAFETY: the ISA is enabled, as the caller vouches.
    let result = unsafe {
        if n_rows <= FEW_ROWS {
            walk.by_address::<L, MR, NR>(block)
        } else {
            walk.by_slot::<L, MR, NR>(block)
        }
    };
    match result {
        Some(at) => {
            let (m, l, o) = walk.partial(at);
            out.m.copy_from_slice(m);
            out.l.copy_from_slice(l);
            out.o.copy_from_slice(o);
        }
        None => {
            out.m.fill(f32::NEG_INFINITY);
            out.l.fill(0.0);
            out.o.fill(0.0);
        }
    }
    walk.overflow
}

/// Partials that wait to merge, in the order of the tree.
#[derive(Default)]
struct Stack {
    entries: [Entry; STACK],
    depth: usize,
}

/// A partial: the last slot that went into it, which is the nearest to what comes next, and where it lies.
#[derive(Clone, Copy, Default)]
struct Entry {
    slot: usize,
    place: usize,
}

impl Stack {
    fn push(&mut self, slot: usize, place: usize) {
        self.entries[self.depth] = Entry { slot, place };
        self.depth += 1;
    }

    fn top(&self) -> Option<[Entry; 2]> {
        match self.entries[..self.depth] {
            [.., left, right] => Some([left, right]),
            _ => None,
        }
    }
}

/// Scratch of one call: the scores of a page, and partials by index.
struct Walk<'a> {
    n_rows: usize,
    columns: usize,
    scores: &'a mut [f32],
    partials: &'a mut [f32],
    overflow: Option<usize>,
}

impl Walk<'_> {
    fn partial(&mut self, at: usize) -> (&mut [f32], &mut [f32], &mut [f32]) {
        split_partial(&mut self.partials[at * self.n_rows * (self.columns + 2)..], self.n_rows, self.columns)
    }

    /// # Safety
    /// The ISA of `L` is enabled.
    #[inline(always)]
    unsafe fn by_slot<L: Lanes, const MR: usize, const NR: usize>(
        &mut self,
        block: &RowBlock<'_>,
    ) -> Option<usize> {
        let mut stack = Stack::default();
        for slot in 0..N_SLOTS {
            for &page in block.pages.iter().filter(|page| slot_of_page(**page) == slot) {
                // SAFETY: the ISA is enabled.
                unsafe {
                    self.make_room::<L>(&mut stack, slot);
                    let place = stack.depth;
                    if self.page::<L, MR, NR>(block, page, place) {
                        stack.push(slot, place);
                    }
                }
            }
        }
        // SAFETY: the ISA is enabled.
        unsafe { self.merge_all::<L>(&mut stack) }
    }

    /// # Safety
    /// The ISA of `L` is enabled.
    #[inline(always)]
    unsafe fn by_address<L: Lanes, const MR: usize, const NR: usize>(
        &mut self,
        block: &RowBlock<'_>,
    ) -> Option<usize> {
        const FRESH: usize = N_SLOTS;
        let mut present = [false; N_SLOTS];
        for &page in block.pages {
            let slot = slot_of_page(page);
            let into = if present[slot] { FRESH } else { slot };
            // SAFETY: the ISA is enabled.
            let seen = unsafe { self.page::<L, MR, NR>(block, page, into) };
            if seen && present[slot] {
                // SAFETY: the ISA is enabled.
                unsafe { self.merge::<L>(slot, FRESH) };
            }
            present[slot] |= seen;
        }
        let mut stack = Stack::default();
        for slot in (0..N_SLOTS).filter(|slot| present[*slot]) {
            // SAFETY: the ISA is enabled.
            unsafe { self.make_room::<L>(&mut stack, slot) };
            stack.push(slot, slot);
        }
        // SAFETY: the ISA is enabled.
        unsafe { self.merge_all::<L>(&mut stack) }
    }

    /// Merges what must be merged before a partial of `slot` is pushed.
    ///
    /// # Safety
    /// The ISA of `L` is enabled.
    #[inline(always)]
    unsafe fn make_room<L: Lanes>(&mut self, stack: &mut Stack, slot: usize) {
        while let Some([left, right]) = stack.top()
            && common_level(left.slot, right.slot) <= common_level(right.slot, slot)
        {
            // SAFETY: the ISA is enabled.
            unsafe { self.merge_top::<L>(stack, left, right) };
        }
    }

    /// Merges everything; where the result lies.
    ///
    /// # Safety
    /// The ISA of `L` is enabled.
    #[inline(always)]
    unsafe fn merge_all<L: Lanes>(&mut self, stack: &mut Stack) -> Option<usize> {
        while let Some([left, right]) = stack.top() {
            // SAFETY: the ISA is enabled.
            unsafe { self.merge_top::<L>(stack, left, right) };
        }
        (stack.depth == 1).then_some(stack.entries[0].place)
    }

    /// # Safety
    /// The ISA of `L` is enabled.
    #[inline(always)]
    unsafe fn merge_top<L: Lanes>(&mut self, stack: &mut Stack, left: Entry, right: Entry) {
        // SAFETY: the ISA is enabled.
        unsafe { self.merge::<L>(left.place, right.place) };
        stack.depth -= 2;
        stack.push(right.slot, left.place);
    }

    /// Writes the partial of one page; false, and nothing written, where no row sees a key of it.
    ///
    /// # Safety
    /// The ISA of `L` is enabled.
    #[inline(always)]
    unsafe fn page<L: Lanes, const MR: usize, const NR: usize>(
        &mut self,
        block: &RowBlock<'_>,
        page: usize,
        into: usize,
    ) -> bool {
        let (n_rows, columns, d) = (self.n_rows, self.columns, block.kv.head_dim());
        let n_keys = block.kv.keys_in_page(page);
        let seen = |row: usize| -> Range<usize> {
            let visible = &block.visible[row];
            let first = page * PAGE_KEYS;
            visible.start.saturating_sub(first).min(n_keys)..visible.end.saturating_sub(first).min(n_keys)
        };
        let (mut low, mut high, mut whole) = (PAGE_KEYS, 0, true);
        for row in 0..n_rows {
            let keys = seen(row);
            whole &= keys.len() == PAGE_KEYS;
            if !keys.is_empty() {
                low = low.min(keys.start);
                high = high.max(keys.end);
            }
        }
        if low >= high {
            return false;
        }
        let Some((k, v)) = block.kv.page(page) else {
            panic!("page {page} is not resident");
        };
        let size = n_rows * (columns + 2);
        let (m, l, o) = split_partial(&mut self.partials[into * size..][..size], n_rows, columns);
        let s = self.scores.as_mut_ptr();
        // SAFETY: attend_rows has checked q, scores and partials against n_rows, d and columns; a page's panels have
        // 256 * d and 256 * columns elements by construction; `seen` stays inside the page.
        unsafe {
            let panels = low / PANEL_KEYS..high.div_ceil(PANEL_KEYS);
            tile::scores::<L, MR, NR>(block.q.as_ptr(), n_rows, d, k.as_ptr(), panels, s);
            for row in 0..n_rows {
                let sum = softmax_row::<L>(s.add(row * PAGE_KEYS), seen(row));
                m[row] = sum.m;
                l[row] = sum.l;
                if sum.overflow {
                    self.overflow = Some(self.overflow.map_or(row, |first| first.min(row)));
                }
            }
            let (p, v, o) = (s.cast_const(), v.as_ptr(), o.as_mut_ptr());
            if whole {
                tile::context::<L, MR, NR>(p, n_rows, v, 0..PAGE_KEYS, columns, o, Start::Zero);
                return true;
            }
            let mut row = 0;
            while row < n_rows {
                let rows = MR.min(n_rows - row);
                let shared = (row..row + rows)
                    .map(seen)
                    .fold(0..PAGE_KEYS, |all, keys| all.start.max(keys.start)..all.end.min(keys.end));
                let shared = if shared.is_empty() { 0..0 } else { shared };
                let p = p.add(row * PAGE_KEYS);
                let o = o.add(row * columns);
                for r in 0..rows {
                    let keys = seen(row + r);
                    let alone = if shared.is_empty() { keys } else { keys.start..shared.start };
                    let (p, o) = (p.add(r * PAGE_KEYS), o.add(r * columns));
                    tile::context::<L, 1, NR>(p, 1, v, alone, columns, o, Start::Zero);
                }
                if !shared.is_empty() {
                    let end = shared.end;
                    tile::context::<L, MR, NR>(p, rows, v, shared, columns, o, Start::Output);
                    for r in 0..rows {
                        let alone = end..seen(row + r).end;
                        let (p, o) = (p.add(r * PAGE_KEYS), o.add(r * columns));
                        if !alone.is_empty() {
                            tile::context::<L, 1, NR>(p, 1, v, alone, columns, o, Start::Output);
                        }
                    }
                }
                row += rows;
            }
        }
        true
    }

    /// `partial[left] = merge(partial[left], partial[right])`.
    ///
    /// # Safety
    /// The ISA of `L` is enabled.
    #[inline(always)]
    unsafe fn merge<L: Lanes>(&mut self, left: usize, right: usize) {
        let size = self.n_rows * (self.columns + 2);
        let (n_rows, columns) = (self.n_rows, self.columns);
        let [left, right] = [left * size..(left + 1) * size, right * size..(right + 1) * size];
        let Ok([left, right]) = self.partials.get_disjoint_mut([left, right]) else {
            panic!("partials overlap");
        };
        let (m, l, o) = split_partial(left, n_rows, columns);
        let (m_right, l_right, o_right) = split_partial(right, n_rows, columns);
        // SAFETY: the ISA is enabled.
        unsafe { merge_rows::<L>(RowPartials { m, l, o }, m_right, l_right, o_right, columns) };
    }
}

fn split_partial(memory: &mut [f32], n_rows: usize, columns: usize) -> (&mut [f32], &mut [f32], &mut [f32]) {
    let (m, rest) = memory.split_at_mut(n_rows);
    let (l, rest) = rest.split_at_mut(n_rows);
    (m, l, &mut rest[..n_rows * columns])
}

/// Rule 6 over rows: `left = merge(left, right)`; `columns` may be any number.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If the slices differ in length.
#[inline(always)]
pub(crate) unsafe fn merge_rows<L: Lanes>(
    left: RowPartials<'_>,
    m_right: &[f32],
    l_right: &[f32],
    o_right: &[f32],
    columns: usize,
) {
    let n_rows = left.m.len();
    assert!(left.l.len() == n_rows && m_right.len() == n_rows && l_right.len() == n_rows);
    assert!(left.o.len() == n_rows * columns && o_right.len() == n_rows * columns);
    for row in 0..n_rows {
        let max = if left.m[row] > m_right[row] { left.m[row] } else { m_right[row] };
        let shift = finite_max(max);
        let (a, b) = (rescale(left.m[row], shift), rescale(m_right[row], shift));
        left.m[row] = max;
        left.l[row] = left.l[row].mul_add(a, l_right[row] * b);
        let (o, o_right) = (&mut left.o[row * columns..][..columns], &o_right[row * columns..][..columns]);
        let vectors = columns / 16 * 16;
        // SAFETY: both rows have `columns` elements and the vectors end before that.
        unsafe {
            let (a, b) = (L::splat(a), L::splat(b));
            for c in (0..vectors).step_by(16) {
                let right = L::mul(L::load(o_right.as_ptr().add(c)), b);
                let merged = L::fma(L::load(o.as_ptr().add(c)), a, right);
                L::store(o.as_mut_ptr().add(c), merged);
            }
        }
        for c in vectors..columns {
            o[c] = o[c].mul_add(a, o_right[c] * b);
        }
    }
}

/// Rule 8 for the context: `o = o / l + 0.0` in place, every NaN the canonical one.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If the slices differ in length.
#[inline(always)]
pub(crate) unsafe fn divide_rows<L: Lanes>(m: &[f32], l: &[f32], o: &mut [f32], columns: usize) {
    assert!(m.len() == l.len() && o.len() == l.len() * columns);
    for row in 0..l.len() {
        let empty = m[row] == f32::NEG_INFINITY && l[row] == 0.0;
        let divisor = if empty { 1.0 } else { l[row] };
        let o = &mut o[row * columns..][..columns];
        let vectors = columns / 16 * 16;
        // SAFETY: the row has `columns` elements and the vectors end before that.
        unsafe {
            let divisor = L::splat(divisor);
            for c in (0..vectors).step_by(16) {
                let at = o.as_mut_ptr().add(c);
                let value = L::add(L::div(L::load(at), divisor), L::zero());
                L::store(at, L::canonical_nan(value));
            }
        }
        for value in &mut o[vectors..] {
            let divided = *value / divisor + 0.0;
            *value = if divided.is_nan() { crate::canonical::CANONICAL_NAN } else { divided };
        }
    }
}
