//! The rows-broadcast family: a block of few rows over pages, lanes along the keys and along the value columns.
//!
//! A page gives a partial `(m, l, o)` of its own, from +0, so that pages can be computed anywhere. Partials then merge
//! in the canonical tree. Two orders of walking lead through the same tree:
//!
//! * **By slot**, for blocks of several tiles: pages in (slot, page) order on a stack of partials.
//! * **By address**, for the rows of one tile: the keys come from memory then, and walking forward is what lets them
//!   come at full bandwidth. Each page folds into the partial of its slot; the slots merge at the end.
//!
//! Pages are read as they are stored, and elements widened in registers: with few rows, a page that was widened to memory
//! would cost more to store and read again than everything else.
//!
//! Departures from the naive form, and why they change no bit: a page that no row of the block sees is left out,
//! because merging with the identity gives the other side back; rows that see a part of a page are reduced in up to
//! three pieces (alone, together, alone), because an accumulator that is stored and loaded again is the same number.

#[cfg(all(feature = "free-order", target_arch = "x86_64"))]
pub(crate) mod free_order;
pub(crate) mod softmax;
pub(crate) mod tile;

use std::ops::Range;

use self::softmax::softmax_row;
use self::tile::{Output, Panels, Queries, Start, Weights};
use crate::arithmetic::Arithmetic;
use crate::block::{BLOCK_ROWS, RowBlock, RowPartials, Seen, Span, Visible, by_slot, merge_rows};
use crate::fold::{STACK, Stack};
use crate::lanes::Lanes;
use crate::pages::{PANEL_KEYS, PageView, padded_columns};
use crate::slot::{N_SLOTS, PAGE_KEYS, slot_of_page};

/// Up to this many rows, pages are walked by address, and where registers are few, with a tile as wide as a panel: the
/// keys come from memory then, and in one sweep.
pub(crate) const FEW_ROWS: usize = tile::MAX_ROWS;

/// Memory that [`attend_rows`] works in, in f32s.
pub(crate) fn scratch_floats(n_rows: usize, value_dim: usize) -> usize {
    n_rows * PAGE_KEYS + partials_alive(n_rows) * n_rows * (padded_columns(value_dim) + 2)
}

/// Partials of a block that may be alive at a time.
pub(crate) fn partials_alive(n_rows: usize) -> usize {
    if n_rows <= FEW_ROWS { N_SLOTS + 1 } else { STACK }
}

/// Computes the partial of a block of rows, with tiles of `FR` rows by `FN` vectors where there are at most [`FEW_ROWS`]
/// and of `MR` by `NR` where there are more; lines are asked for `AHEAD` words ahead of their use, or not where that is 0.
/// Returns the first row of which a score overflowed f32.
///
/// # Safety
/// The ISA of `L`, and what `A` needs, is enabled, and `A` is for the storage of the block's keys and values. The block has been
/// checked, and its queries are packed for `A`.
#[inline(always)]
pub(crate) unsafe fn attend_rows<
    L: Lanes,
    A: Arithmetic<L>,
    const FR: usize,
    const FN: usize,
    const MR: usize,
    const NR: usize,
    const AHEAD: usize,
>(
    block: &RowBlock<'_>,
    scratch: &mut [f32],
    out: &mut RowPartials<'_>,
) -> Option<usize> {
    const { assert!(MR <= tile::MAX_ROWS && NR <= 4 && PANEL_KEYS.is_multiple_of(16 * NR)) };
    const { assert!(FR <= tile::MAX_ROWS && FN <= 4 && PANEL_KEYS.is_multiple_of(16 * FN)) };
    let n_rows = block.visible.len();
    let columns = padded_columns(block.kv.value_dim());
    let visible = Visible::new(block.visible, block.kv.n_keys());
    let (scores, partials) = scratch.split_at_mut(n_rows * PAGE_KEYS);
    let mut walk = Walk { n_rows, columns, scores, partials, overflow: None };
    // SAFETY: the ISA is enabled and the slices are long enough, as the caller vouches.
    let result = unsafe { walk.pages::<L, A, FR, FN, MR, NR, AHEAD>(block, &visible) };
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

    /// Covers all pages; where the result lies, if any row sees a key. One loop for both orders, because each copy of it
    /// has all the tiles in it.
    ///
    /// # Safety
    /// As [`attend_rows`].
    #[inline(always)]
    unsafe fn pages<
        L: Lanes,
        A: Arithmetic<L>,
        const FR: usize,
        const FN: usize,
        const MR: usize,
        const NR: usize,
        const AHEAD: usize,
    >(
        &mut self,
        block: &RowBlock<'_>,
        visible: &Visible<'_>,
    ) -> Option<usize> {
        const FRESH: usize = N_SLOTS;
        let by_address = self.n_rows <= FEW_ROWS;
        let mut order: Vec<usize> =
            if by_address { block.pages.to_vec() } else { by_slot(block.pages).collect() };
        order.retain(|page| visible.of_page(*page) != Seen::Nothing);
        let mut present = [false; N_SLOTS];
        let mut stack = Stack::default();
        for (i, page) in order.iter().copied().enumerate() {
            let slot = slot_of_page(page);
            let into = match (by_address, present[slot]) {
                (true, false) => slot,
                (true, true) => FRESH,
                (false, _) => stack.depth(),
            };
            // SAFETY: as the caller vouches.
            unsafe { self.page::<L, A, FR, FN, MR, NR, AHEAD>(block, visible, page, into) };
            if !by_address {
                let next = order.get(i + 1).map(|page| slot_of_page(*page));
                for merged in 0..stack.push(slot, next) {
                    // SAFETY: the ISA is enabled.
                    unsafe { self.merge::<L>(into - merged - 1, into - merged) };
                }
            } else if into == FRESH {
                // SAFETY: the ISA is enabled.
                unsafe { self.merge::<L>(slot, FRESH) };
            }
            present[slot] = true;
        }
        if !by_address {
            return (stack.depth() == 1).then_some(0);
        }
        let mut places = [0; STACK];
        let mut slots = (0..N_SLOTS).filter(|slot| present[*slot]).peekable();
        while let Some(slot) = slots.next() {
            let depth = stack.depth();
            places[depth] = slot;
            for merged in 0..stack.push(slot, slots.peek().copied()) {
                // SAFETY: the ISA is enabled.
                unsafe { self.merge::<L>(places[depth - merged - 1], places[depth - merged]) };
            }
        }
        (stack.depth() == 1).then_some(places[0])
    }

    /// Writes the partial of a page of which some row sees some key.
    ///
    /// # Safety
    /// As [`attend_rows`].
    #[inline(always)]
    unsafe fn page<
        L: Lanes,
        A: Arithmetic<L>,
        const FR: usize,
        const FN: usize,
        const MR: usize,
        const NR: usize,
        const AHEAD: usize,
    >(
        &mut self,
        block: &RowBlock<'_>,
        visible: &Visible<'_>,
        page: usize,
        into: usize,
    ) {
        let (n_rows, columns, d) = (self.n_rows, self.columns, block.kv.head_dim());
        let Some(PageView { k, v, key_scales, value_scales }) = block.kv.page(page) else {
            panic!("page {page} is not resident");
        };
        let seen = |row: usize| visible.of_row(row, page);
        let whole = visible.of_page(page) == Seen::Whole;
        let Span { hull, .. } = Span::of((0..n_rows).map(seen));
        let size = n_rows * (columns + 2);
        let (m, l, o) = split_partial(&mut self.partials[into * size..][..size], n_rows, columns);
        let s = self.scores.as_mut_ptr();
        let few = const { FR != MR || FN != NR } && n_rows <= FEW_ROWS;
        // Behind the words of the queries, if they are integers, their scales.
        let q = Queries { at: block.q.as_ptr(), n_rows, d, scales: block.q.as_ptr() };
        let (k, v) = (
            Panels { at: k.as_ptr(), scales: key_scales.as_ptr() },
            Panels { at: v.as_ptr(), scales: value_scales.as_ptr() },
        );
        let mut weight_scales = [0.0_f32; BLOCK_ROWS];
        // SAFETY: q, scores and partials fit n_rows, d and columns, as the caller vouches; a page's panels have
        // the words of 256 * d and 256 * columns elements by construction; `seen` stays inside the page.
        unsafe {
            let q = Queries {
                scales: if A::INTEGERS { q.at.add(n_rows * A::broadcasts(d)) } else { q.scales },
                ..q
            };
            let panels = hull.start / PANEL_KEYS..hull.end.div_ceil(PANEL_KEYS);
            if few {
                tile::scores::<L, A, FR, FN, AHEAD>(q, k, panels, s);
            } else {
                tile::scores::<L, A, MR, NR, AHEAD>(q, k, panels, s);
            }
            for row in 0..n_rows {
                let keys = if A::INTEGERS { hull.clone() } else { seen(row) };
                let sum = softmax_row::<L, A>(s.add(row * PAGE_KEYS), seen(row), keys, v.scales);
                m[row] = sum.m;
                l[row] = sum.l;
                weight_scales[row] = sum.weight_scale;
                if sum.overflow {
                    self.overflow = Some(self.overflow.map_or(row, |first| first.min(row)));
                }
            }
            let (p, o) = (s.cast_const(), o.as_mut_ptr());
            // Tile by tile: what a row sees before its neighbours do, what all of them see, what it sees after them.
            // A whole page is one piece; so is any with integers, whose weights are zero where a row sees nothing, as their
            // values are numbers. One call for all pieces, because each copy of it has all the tiles in it.
            let is_one = whole || A::INTEGERS;
            let tile_rows = if is_one { n_rows } else { MR };
            for row in (0..n_rows).step_by(tile_rows) {
                let rows = tile_rows.min(n_rows - row);
                let Span { shared, .. } = Span::of((row..row + rows).map(seen));
                let shared = words_inside::<L, A>(shared);
                for piece in 0..=2 * rows {
                    let is_shared = piece == rows;
                    let (first, rows, keys, start) = match piece {
                        _ if is_shared => (row, rows, shared.clone(), Start::Output),
                        _ if piece < rows => {
                            let keys = seen(row + piece);
                            let end = if shared.is_empty() { keys.end } else { shared.start };
                            (row + piece, 1, keys.start..end, Start::Zero)
                        }
                        _ => {
                            let keys = seen(row + piece - rows - 1);
                            let first = if shared.is_empty() { keys.end } else { shared.end };
                            (row + piece - rows - 1, 1, first..keys.end, Start::Output)
                        }
                    };
                    let (keys, start) = match (is_one, is_shared) {
                        (true, true) if A::INTEGERS => (whole_words::<L, A>(hull.clone()), Start::Zero),
                        (true, true) => (0..PAGE_KEYS, Start::Zero),
                        (true, false) => continue,
                        (false, _) => (keys, start),
                    };
                    if start == Start::Zero || !keys.is_empty() {
                        let scales = weight_scales[first..].as_ptr();
                        let p = Weights { at: p.add(first * PAGE_KEYS), n_rows: rows, scales };
                        let o = Output { at: o.add(first * columns), columns, start };
                        if few {
                            tile::context::<L, A, FR, FN, AHEAD>(p, v, keys, o);
                        } else {
                            tile::context::<L, A, MR, NR, AHEAD>(p, v, keys, o);
                        }
                    }
                }
            }
        }
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

/// The part of `keys` that may be reduced apart from the rest: any of them, or those of whole words where a word's elements are
/// added in an order of their own.
#[inline(always)]
fn words_inside<L: Lanes, A: Arithmetic<L>>(keys: Range<usize>) -> Range<usize> {
    if A::PARTS == A::PER_WORD {
        return keys;
    }
    keys.start.next_multiple_of(A::PER_WORD)..keys.end / A::PER_WORD * A::PER_WORD
}

/// The keys of all words that hold some of `keys`.
#[inline(always)]
fn whole_words<L: Lanes, A: Arithmetic<L>>(keys: Range<usize>) -> Range<usize> {
    keys.start / A::PER_WORD * A::PER_WORD..keys.end.next_multiple_of(A::PER_WORD)
}

fn split_partial(memory: &mut [f32], n_rows: usize, columns: usize) -> (&mut [f32], &mut [f32], &mut [f32]) {
    let (m, rest) = memory.split_at_mut(n_rows);
    let (l, rest) = rest.split_at_mut(n_rows);
    (m, l, &mut rest[..n_rows * columns])
}
