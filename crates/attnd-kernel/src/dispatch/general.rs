//! The entries of the general path: small ones, each called for a page or for one row of it.

use std::ops::Range;

use super::Kernels;
use crate::arch;
use crate::arithmetic::Exact;
use crate::bias::{Ramp, fill_ramp};
use crate::general::{shape, weigh};
use crate::lanes::{LANES, Lanes};
use crate::mask::PageBits;
use crate::pages::{KvView, PANEL_KEYS, PageView};
use crate::rows::tile::{self, Output, Panels, Queries, Start, Weights};
use crate::slot::PAGE_KEYS;
use crate::storage::StoredF32;
use crate::widen::panels;

use super::isa::Isa;

type Row = [f32; PAGE_KEYS];
type PanelsOf = for<'m> unsafe fn(&KvView, PageView<'m>, &'m mut [f32]) -> (&'m [f32], &'m [f32]);

/// The entries of one ISA. [`Kernels::general`] hands them out only where the CPU has its features.
pub(crate) struct GeneralEntries {
    tile_rows: usize,
    panels: PanelsOf,
    scores: unsafe fn(Queries, Panels, Range<usize>, *mut f32),
    cap: unsafe fn(&mut Row, Range<usize>, f32, &PageBits) -> bool,
    fill_ramp: unsafe fn(Ramp, usize, &mut Row),
    add_bias: unsafe fn(&mut Row, Range<usize>, &Row),
    mask: unsafe fn(&mut Row, Range<usize>, &PageBits) -> bool,
    softmax: unsafe fn(&mut Row, Range<usize>) -> (f32, f32),
    sigmoids: unsafe fn(&mut Row, Range<usize>, f32) -> f32,
    are_finite: unsafe fn(&[f32]) -> bool,
    context: unsafe fn(Weights, Panels, Range<usize>, Output),
}

impl Kernels {
    /// The entries of the general path.
    pub(crate) fn general(&self) -> &'static GeneralEntries {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &AVX512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &AVX2,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => &NEON,
            _ => &PORTABLE,
        }
    }
}

/// SAFETY, of all calls below: possession of the table proves that the CPU has the ISA's features.
impl GeneralEntries {
    /// Rows of the tile that queries are packed for.
    pub(crate) fn tile_rows(&self) -> usize {
        self.tile_rows
    }

    /// [`panels`].
    pub(crate) fn panels<'m>(
        &self,
        kv: &KvView,
        page: PageView<'m>,
        memory: &'m mut [f32],
    ) -> (&'m [f32], &'m [f32]) {
        // SAFETY: above.
        unsafe { (self.panels)(kv, page, memory) }
    }

    /// Products of `n_rows` packed queries of `d` elements with the keys of some panels of a page: `s[row * 256 + key]`.
    ///
    /// # Panics
    /// If a slice is too short.
    pub(crate) fn scores(
        &self,
        q: &[f32],
        n_rows: usize,
        d: usize,
        k: &[f32],
        panels: Range<usize>,
        s: &mut [f32],
    ) {
        assert!(q.len() >= n_rows * d && k.len() >= panels.end * PANEL_KEYS * d);
        assert!(s.len() >= n_rows * PAGE_KEYS);
        assert!(panels.end <= PAGE_KEYS / PANEL_KEYS);
        let q = Queries { at: q.as_ptr(), n_rows, d, scales: q.as_ptr() };
        let k = Panels { at: k.as_ptr(), scales: k.as_ptr() };
        // SAFETY: above, and the slices hold the rows, the panels, of which no others are read, and the scores.
        unsafe { (self.scores)(q, k, panels, s.as_mut_ptr()) }
    }

    /// [`shape::cap_row`].
    pub(crate) fn cap(&self, s: &mut Row, vectors: Range<usize>, cap: f32, visible: &PageBits) -> bool {
        // SAFETY: above.
        unsafe { (self.cap)(s, vectors, cap, visible) }
    }

    /// [`fill_ramp`].
    pub(crate) fn fill_ramp(&self, ramp: Ramp, page: usize, to: &mut Row) {
        // SAFETY: above.
        unsafe { (self.fill_ramp)(ramp, page, to) }
    }

    /// [`shape::add_bias`].
    pub(crate) fn add_bias(&self, s: &mut Row, vectors: Range<usize>, bias: &Row) {
        // SAFETY: above.
        unsafe { (self.add_bias)(s, vectors, bias) }
    }

    /// [`shape::mask_row`].
    pub(crate) fn mask(&self, s: &mut Row, vectors: Range<usize>, visible: &PageBits) -> bool {
        // SAFETY: above.
        unsafe { (self.mask)(s, vectors, visible) }
    }

    /// [`weigh::softmax`].
    pub(crate) fn softmax(&self, s: &mut Row, vectors: Range<usize>) -> (f32, f32) {
        // SAFETY: above.
        unsafe { (self.softmax)(s, vectors) }
    }

    /// [`weigh::sigmoids`].
    pub(crate) fn sigmoids(&self, s: &mut Row, vectors: Range<usize>, bias: f32) -> f32 {
        // SAFETY: above.
        unsafe { (self.sigmoids)(s, vectors, bias) }
    }

    /// Whether no value is NaN or infinite, of whole vectors of 16.
    pub(crate) fn are_finite(&self, values: &[f32]) -> bool {
        // SAFETY: above.
        unsafe { (self.are_finite)(values) }
    }

    /// Adds keys `keys` of a page to the contexts of `n_rows` rows, or starts with them: `o[row * columns + c] += p[row * 256 + j] * v[j][c]`.
    ///
    /// # Panics
    /// If a slice is too short or `columns` no multiple of 16.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn context(
        &self,
        p: &[f32],
        n_rows: usize,
        v: &[f32],
        keys: Range<usize>,
        o: &mut [f32],
        columns: usize,
        start: Start,
    ) {
        assert!(p.len() >= n_rows * PAGE_KEYS && v.len() >= PAGE_KEYS * columns && keys.end <= PAGE_KEYS);
        assert!(o.len() >= n_rows * columns && columns.is_multiple_of(LANES));
        let p = Weights { at: p.as_ptr(), n_rows, scales: p.as_ptr() };
        let v = Panels { at: v.as_ptr(), scales: v.as_ptr() };
        // SAFETY: above, and the slices hold the weights, a page's values and the contexts.
        unsafe { (self.context)(p, v, keys, Output { at: o.as_mut_ptr(), columns, start }) }
    }
}

/// # Safety
/// The ISA of `L` is enabled.
#[inline(always)]
unsafe fn are_finite<L: Lanes>(values: &[f32]) -> bool {
    const SUMS: usize = 4;
    assert!(values.len().is_multiple_of(SUMS * LANES));
    // SAFETY: the ISA is enabled, and a chunk is four times sixteen f32.
    unsafe {
        // Products with 0 are 0 or NaN, which stays; four sums, so that they don't wait for each other.
        let mut sums = [L::zero(); SUMS];
        for chunk in values.chunks_exact(SUMS * LANES) {
            for n in 0..SUMS {
                sums[n] = L::fma(L::load(chunk.as_ptr().add(LANES * n)), L::zero(), sums[n]);
            }
        }
        let sum = L::add(L::add(sums[0], sums[1]), L::add(sums[2], sums[3]));
        L::halving_sum(sum) == 0.0
    }
}

/// Stamps the entries of one ISA, with tiles of `$mr` rows by `$nr` vectors of keys and `$or` rows by `$on` vectors of columns.
///
/// # Safety
/// The entries may only be called on a CPU that has `$features`; [`Kernels::general`] hands the table out only there.
macro_rules! instantiate {
    ($table:ident, $lanes:ty, scores $mr:literal x $nr:literal, context $or:literal x $on:literal $(, #[$features:meta])?) => {
        static $table: GeneralEntries = {
            const { assert!($mr <= tile::MAX_ROWS && $or <= tile::MAX_ROWS) };
            const { assert!(PANEL_KEYS.is_multiple_of(LANES * $nr)) };
            $(#[$features])?
            unsafe fn panels_entry<'m>(kv: &KvView, page: PageView<'m>, memory: &'m mut [f32]) -> (&'m [f32], &'m [f32]) {
                // SAFETY: the features are enabled on this function.
                unsafe { panels::<$lanes>(kv, page, memory) }
            }
            $(#[$features])?
            unsafe fn scores_entry(q: Queries, k: Panels, panels: Range<usize>, s: *mut f32) {
                // SAFETY: the features are enabled on this function; operands are as the caller vouches.
                unsafe { tile::scores::<$lanes, Exact<StoredF32>, $mr, $nr, 0>(q, k, panels, s) }
            }
            $(#[$features])?
            unsafe fn cap_entry(s: &mut Row, vectors: Range<usize>, cap: f32, visible: &PageBits) -> bool {
                // SAFETY: the features are enabled on this function.
                unsafe { shape::cap_row::<$lanes>(s, vectors, cap, visible) }
            }
            $(#[$features])?
            unsafe fn fill_ramp_entry(ramp: Ramp, page: usize, to: &mut Row) {
                // SAFETY: the features are enabled on this function.
                unsafe { fill_ramp::<$lanes>(ramp, page, to) }
            }
            $(#[$features])?
            unsafe fn add_bias_entry(s: &mut Row, vectors: Range<usize>, bias: &Row) {
                // SAFETY: the features are enabled on this function.
                unsafe { shape::add_bias::<$lanes>(s, vectors, bias) }
            }
            $(#[$features])?
            unsafe fn mask_entry(s: &mut Row, vectors: Range<usize>, visible: &PageBits) -> bool {
                // SAFETY: the features are enabled on this function.
                unsafe { shape::mask_row::<$lanes>(s, vectors, visible) }
            }
            $(#[$features])?
            unsafe fn softmax_entry(s: &mut Row, vectors: Range<usize>) -> (f32, f32) {
                // SAFETY: the features are enabled on this function.
                unsafe { weigh::softmax::<$lanes>(s, vectors) }
            }
            $(#[$features])?
            unsafe fn sigmoids_entry(s: &mut Row, vectors: Range<usize>, bias: f32) -> f32 {
                // SAFETY: the features are enabled on this function.
                unsafe { weigh::sigmoids::<$lanes>(s, vectors, bias) }
            }
            $(#[$features])?
            unsafe fn are_finite_entry(values: &[f32]) -> bool {
                // SAFETY: the features are enabled on this function.
                unsafe { are_finite::<$lanes>(values) }
            }
            $(#[$features])?
            unsafe fn context_entry(p: Weights, v: Panels, keys: Range<usize>, o: Output) {
                // SAFETY: the features are enabled on this function; operands are as the caller vouches.
                unsafe { tile::context::<$lanes, Exact<StoredF32>, $or, $on, 0>(p, v, keys, o) }
            }
            GeneralEntries {
                tile_rows: $mr,
                panels: panels_entry,
                scores: scores_entry,
                cap: cap_entry,
                fill_ramp: fill_ramp_entry,
                add_bias: add_bias_entry,
                mask: mask_entry,
                softmax: softmax_entry,
                sigmoids: sigmoids_entry,
                are_finite: are_finite_entry,
                context: context_entry,
            }
        };
    };
}

#[cfg(target_arch = "x86_64")]
instantiate!(AVX512, arch::avx512::Avx512, scores 6 x 4, context 4 x 4, #[target_feature(enable = "avx512f,avx512dq,avx2,fma,f16c")]);
#[cfg(target_arch = "x86_64")]
instantiate!(AVX2, arch::avx2::Avx2, scores 6 x 1, context 6 x 1, #[target_feature(enable = "avx2,fma,f16c")]);
#[cfg(target_arch = "aarch64")]
instantiate!(NEON, arch::neon::Neon, scores 6 x 1, context 6 x 1);
instantiate!(PORTABLE, arch::portable::Portable, scores 2 x 1, context 2 x 1);
