//! The order in which partials of pages are made and merged: that of `rows.rs`, around any way of making them.
//!
//! Pages in (slot, page) order on a stack, or for few rows by address, each folding into the partial of its slot. `rows.rs` has a loop of
//! its own, because all that it calls must be inlined into it.

use crate::block::{RowPartials, by_slot};
use crate::dispatch::Kernels;
use crate::fold::{STACK, Stack};
use crate::rows::FEW_ROWS;
use crate::slot::{N_SLOTS, slot_of_page};

/// Memory for the partials of a walk.
pub(super) struct Walk<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) n_rows: usize,
    /// Padded.
    pub(super) columns: usize,
    /// [`crate::rows::partials_alive`] times those of a block.
    pub(super) partials: &'a mut [f32],
}

impl Walk<'_> {
    /// The partial at `at`.
    pub(super) fn partial(&mut self, at: usize) -> RowPartials<'_> {
        let size = self.size();
        split(&mut self.partials[at * size..][..size], self.n_rows)
    }

    fn size(&self) -> usize {
        self.n_rows * (self.columns + 2)
    }

    /// Covers `pages`, ascending, whose partials `make` writes; where the result lies, if there are any.
    pub(super) fn pages(
        &mut self,
        pages: &[usize],
        mut make: impl FnMut(usize, RowPartials<'_>),
    ) -> Option<usize> {
        const FRESH: usize = N_SLOTS;
        let by_address = self.n_rows <= FEW_ROWS;
        let order: Vec<usize> = if by_address { pages.to_vec() } else { by_slot(pages).collect() };
        let mut present = [false; N_SLOTS];
        let mut stack = Stack::default();
        for (i, page) in order.iter().copied().enumerate() {
            let slot = slot_of_page(page);
            let into = match (by_address, present[slot]) {
                (true, false) => slot,
                (true, true) => FRESH,
                (false, _) => stack.depth(),
            };
            make(page, self.partial(into));
            if !by_address {
                let next = order.get(i + 1).map(|page| slot_of_page(*page));
                for merged in 0..stack.push(slot, next) {
                    self.merge(into - merged - 1, into - merged);
                }
            } else if into == FRESH {
                self.merge(slot, FRESH);
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
                self.merge(places[depth - merged - 1], places[depth - merged]);
            }
        }
        (stack.depth() == 1).then_some(places[0])
    }

    /// `partial[left] = merge(partial[left], partial[right])`.
    fn merge(&mut self, left: usize, right: usize) {
        let size = self.size();
        let both = [left * size..(left + 1) * size, right * size..(right + 1) * size];
        let Ok([left, right]) = self.partials.get_disjoint_mut(both) else { panic!("partials overlap") };
        let (left, right) = (split(left, self.n_rows), split(right, self.n_rows));
        self.kernels.merge_rows(left, right.m, right.l, right.o, self.columns);
    }
}

fn split(memory: &mut [f32], n_rows: usize) -> RowPartials<'_> {
    let (m, rest) = memory.split_at_mut(n_rows);
    let (l, o) = rest.split_at_mut(n_rows);
    RowPartials { m, l, o }
}
