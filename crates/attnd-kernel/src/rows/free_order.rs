//! The free order of few rows: one running sum a row, which is multiplied when the row's largest score rises.

use super::FEW_ROWS;
use super::tile::{self, Output, Panels, Queries, Start, Weights};
use crate::block::{RowBlock, RowPartials};
use crate::free_order::{F32, check, exp2};
use crate::lanes::{LANES, Lanes};
use crate::pages::{PANEL_KEYS, PageView, padded_columns};
use crate::slot::PAGE_KEYS;

/// As [`super::attend_rows`], for at most [`FEW_ROWS`] rows. No overflow is found.
///
/// # Safety
/// As [`super::attend_rows`].
///
/// # Panics
/// If the block has more rows, or is none for the free order.
#[inline(always)]
pub(crate) unsafe fn attend_rows<
    L: Lanes,
    const MR: usize,
    const NR: usize,
    const AHEAD: usize,
    const CLAMP: bool,
>(
    block: &RowBlock<'_>,
    scratch: &mut [f32],
    out: &mut RowPartials<'_>,
) -> Option<usize> {
    check(block);
    let n_rows = block.visible.len();
    assert!(n_rows <= FEW_ROWS, "{n_rows} rows");
    let (d, columns) = (block.kv.head_dim(), padded_columns(block.kv.value_dim()));
    let (s, scratch) = scratch.split_at_mut(n_rows * PAGE_KEYS);
    let sums = &mut scratch[..n_rows * LANES];
    out.m.fill(f32::NEG_INFINITY);
    sums.fill(0.0);
    out.o.fill(0.0);
    for (i, page) in block.pages.iter().copied().enumerate() {
        let Some(PageView { k, v, key_scales, value_scales }) = block.kv.page(page) else {
            panic!("page {page} is not resident");
        };
        let s = s.as_mut_ptr();
        let q = Queries { at: block.q.as_ptr(), n_rows, d, scales: block.q.as_ptr() };
        let k = Panels { at: k.as_ptr(), scales: key_scales.as_ptr() };
        let v = Panels { at: v.as_ptr(), scales: value_scales.as_ptr() };
        // SAFETY: the ISA is enabled. q, scores and sums have been cut for n_rows and d, the output for the columns; a page's
        // panels have 256 * d and 256 * columns elements by construction.
        unsafe {
            tile::scores::<L, F32, MR, NR, AHEAD>(q, k, 0..PAGE_KEYS / PANEL_KEYS, s);
            for row in 0..n_rows {
                let (sums, o) = (&mut sums[row * LANES..][..LANES], &mut out.o[row * columns..][..columns]);
                let m_before = (i > 0).then_some(out.m[row]);
                out.m[row] = weigh::<L, CLAMP>(s.add(row * PAGE_KEYS), m_before, sums, o);
            }
            let p = Weights { at: s, n_rows, scales: s };
            let start = if i == 0 { Start::Zero } else { Start::Output };
            let o = Output { at: out.o.as_mut_ptr(), columns, start };
            tile::context::<L, F32, MR, NR, AHEAD>(p, v, 0..PAGE_KEYS, o);
        }
    }
    for row in 0..n_rows {
        // SAFETY: the ISA is enabled, and each row has 16 sums.
        out.l[row] = unsafe { L::halving_sum(L::load(sums[row * LANES..][..LANES].as_ptr())) };
    }
    None
}

/// Turns the scores of one row into weights in place and adds them to its 16 sums. These and `o` are multiplied first if
/// the largest score rises above that of the pages before; there are none where `m_before` is `None`. Returns the largest.
///
/// # Safety
/// The ISA of `L` is enabled; `s` is valid for 256 elements, `sums` has 16, and `o` a multiple of that.
#[inline(always)]
unsafe fn weigh<L: Lanes, const CLAMP: bool>(
    s: *mut f32,
    m_before: Option<f32>,
    sums: &mut [f32],
    o: &mut [f32],
) -> f32 {
    // SAFETY: every access is inside the 256 scores, the 16 sums or the vectors of the output.
    unsafe {
        let mut largest = L::splat(m_before.unwrap_or(f32::NEG_INFINITY));
        for j in (0..PAGE_KEYS).step_by(LANES) {
            largest = L::max(largest, L::load(s.add(j)));
        }
        let m = L::largest(largest);
        let shift = L::splat(m);
        let mut sum = L::load(sums.as_ptr());
        if let Some(m_before) = m_before
            && m > m_before
        {
            let factor = exp2::<L, CLAMP>(L::sub(L::splat(m_before), shift));
            sum = L::mul(sum, factor);
            for column in (0..o.len()).step_by(LANES) {
                let o = o.as_mut_ptr().add(column);
                L::store(o, L::mul(L::load(o), factor));
            }
        }
        for j in (0..PAGE_KEYS).step_by(LANES) {
            let p = exp2::<L, CLAMP>(L::sub(L::load(s.add(j)), shift));
            L::store(s.add(j), p);
            sum = L::add(sum, p);
        }
        L::store(sums.as_mut_ptr(), sum);
        m
    }
}
