//! Weighted sums of tangents with what the previous weights around a key say: for each row by itself,
//!
//! ```text
//! f_c = fma(F_ct, previous_(key + t - taps / 2), f_c)     t ascending from +0, 0 outside the sequence
//! t_x = fma(U_xc, f_c, t_x)                               c ascending from a_x + b_x
//! s   = fma(w_x, tanh(t_x), s)                            x ascending from +0
//! ```

use std::ops::Range;

use super::panel_at;
use crate::dispatch::ReduceEntries;
use crate::general::functions::tanh;
use crate::lanes::{LANES, Lanes};
use crate::pages::PANEL_KEYS;
use crate::slot::PAGE_KEYS;

/// Where a row's attention was before, and what becomes of that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Located<'a> {
    /// The row's previous weights, of all keys of the sequence.
    pub(crate) previous: &'a [f32],
    pub(crate) filters: Filters<'a>,
}

/// A convolution and a projection of its responses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Filters<'a> {
    /// `[filters, taps]`.
    pub(crate) taps: &'a [f32],
    pub(crate) n_taps: usize,
    /// `[units, filters]`.
    pub(crate) units: &'a [f32],
}

impl Filters<'_> {
    fn n(&self) -> usize {
        self.taps.len() / self.n_taps
    }
}

/// Scores of a row against some panels of page `page`. `row` is `a` and then `w`, `d` each.
pub(super) fn scores(
    entries: &ReduceEntries,
    row: &[f32],
    located: Located<'_>,
    (k, page): (&[f32], usize),
    panels: Range<usize>,
    s: &mut [f32],
) {
    let Located { previous, filters } = located;
    // Tap 0 of key j of the page is at j.
    let mut around = vec![0.0; PAGE_KEYS + filters.n_taps];
    let before = filters.n_taps / 2;
    for (i, to) in around.iter_mut().enumerate() {
        let at = (page * PAGE_KEYS + i).checked_sub(before);
        *to = at.and_then(|at| previous.get(at)).copied().unwrap_or(0.0);
    }
    let mut responses = vec![0.0; filters.n() * PAGE_KEYS];
    for (taps, to) in filters.taps.chunks_exact(filters.n_taps).zip(responses.chunks_exact_mut(PAGE_KEYS)) {
        entries.convolve(taps, &around, to);
    }
    entries.located(row, filters.units, &responses, k, panels, s);
}

/// The responses of one filter to the weights around each key of a page.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If `around` has fewer than 256 elements and one for each tap, or `to` fewer than 256.
#[inline(always)]
pub(crate) unsafe fn convolve<L: Lanes>(taps: &[f32], around: &[f32], to: &mut [f32]) {
    assert!(around.len() >= PAGE_KEYS + taps.len() && to.len() >= PAGE_KEYS);
    // SAFETY: the ISA is enabled, and key + tap + 16 <= 256 + taps.
    unsafe {
        for key in (0..PAGE_KEYS).step_by(LANES) {
            let mut sum = L::zero();
            for (t, tap) in taps.iter().enumerate() {
                sum = L::fma(L::splat(*tap), L::load(around.as_ptr().add(key + t)), sum);
            }
            L::store(to.as_mut_ptr().add(key), sum);
        }
    }
}

/// Scores of a row against panels `panels` of a page, with the responses of its filters.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If `k` isn't a page of keys of `d` elements, half of `row`, or another slice is too short for it.
#[inline(always)]
pub(crate) unsafe fn located_scores<L: Lanes>(
    row: &[f32],
    units: &[f32],
    responses: &[f32],
    k: &[f32],
    panels: Range<usize>,
    s: &mut [f32],
) {
    let (d, filters) = (row.len() / 2, responses.len() / PAGE_KEYS);
    assert!(k.len() >= PAGE_KEYS * d && units.len() >= d * filters && s.len() >= PAGE_KEYS);
    assert!(panels.end <= PAGE_KEYS / PANEL_KEYS);
    // SAFETY: the ISA is enabled; keys are those of a panel of the page, and the other slices have an element for each unit,
    // for each filter of it, and 256 responses for each filter.
    unsafe {
        let (units, responses) = (units.as_ptr(), responses.as_ptr());
        for panel in panels {
            for key in (0..PANEL_KEYS).step_by(LANES) {
                let k = k.as_ptr().add(panel_at(panel, d) + key);
                let at = panel * PANEL_KEYS + key;
                let mut sum = L::zero();
                for x in 0..d {
                    let mut t = L::add(L::splat(*row.as_ptr().add(x)), L::load(k.add(x * PANEL_KEYS)));
                    for c in 0..filters {
                        let response = L::load(responses.add(c * PAGE_KEYS + at));
                        t = L::fma(L::splat(*units.add(x * filters + c)), response, t);
                    }
                    sum = L::fma(L::splat(*row.as_ptr().add(d + x)), tanh::<L>(t), sum);
                }
                L::store(s.as_mut_ptr().add(at), sum);
            }
        }
    }
}
