//! The entries of reducers other than dot products.

use std::ops::Range;

use super::Kernels;
use super::isa::Isa;
use crate::arch;
use crate::general::reduce::{
    DirectRow, Distance, Leaky, Tanh, TiledRows, WideRow, convolve, direct_scores, key_exponentials,
    located_scores, row_exponentials, row_words, tiles, wide_scores,
};
use crate::lanes::LANES;
use crate::pages::PANEL_KEYS;
use crate::slot::PAGE_KEYS;

type LocatedScores = unsafe fn(&[f32], &[f32], &[f32], &[f32], Range<usize>, &mut [f32]);

/// The entries of one ISA. [`Kernels::reduce`] hands them out only where the CPU has its features.
pub(crate) struct ReduceEntries {
    /// Rows of the tiles of distances and leaky sums.
    pub(crate) tile_rows: usize,
    /// Rows of the tile of tangents.
    pub(crate) tanh_rows: usize,
    distance: unsafe fn(Distance, TiledRows, *const f32, Range<usize>, *mut f32),
    leaky: unsafe fn(Leaky, TiledRows, *const f32, Range<usize>, *mut f32),
    tanh: unsafe fn(TiledRows, *const f32, Range<usize>, *mut f32),
    wide: unsafe fn(WideRow, *const f32, Range<usize>, *mut f32),
    direct: unsafe fn(DirectRow, *const f32, u16, *mut f32),
    key_exponentials: unsafe fn(&[f32], &mut [f32]) -> bool,
    row_exponentials: unsafe fn(&[f32], &mut [f32], &mut [f32]) -> bool,
    convolve: unsafe fn(&[f32], &[f32], &mut [f32]),
    located: LocatedScores,
}

impl Kernels {
    /// The entries of reducers.
    pub(crate) fn reduce(&self) -> &'static ReduceEntries {
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

/// # Panics
/// If rows of `row_words` words, a page of keys of `key_dim` elements or the scores of the rows aren't there.
fn check(
    q: &[f32],
    n_rows: usize,
    row_words: usize,
    k: &[f32],
    key_dim: usize,
    panels: &Range<usize>,
    s: &[f32],
) {
    assert!(q.len() >= n_rows * row_words && k.len() >= PAGE_KEYS * key_dim && s.len() >= n_rows * PAGE_KEYS);
    assert!(panels.end <= PAGE_KEYS / PANEL_KEYS);
}

/// SAFETY, of all calls below: possession of the table proves that the CPU has the ISA's features.
impl ReduceEntries {
    /// [`Distance`] of `n_rows` packed rows and some panels of a page, `s[row * 256 + key]`.
    ///
    /// # Panics
    /// If a slice is too short.
    pub(crate) fn distance(
        &self,
        tile: Distance,
        q: &[f32],
        (n_rows, d): (usize, usize),
        k: &[f32],
        panels: Range<usize>,
        s: &mut [f32],
    ) {
        check(q, n_rows, d, k, d, &panels, s);
        let q = TiledRows { at: q.as_ptr(), n_rows, d };
        // SAFETY: above, and the slices hold the rows, a page's keys and the scores.
        unsafe { (self.distance)(tile, q, k.as_ptr(), panels, s.as_mut_ptr()) }
    }

    /// The same of [`Leaky`].
    ///
    /// # Panics
    /// If a slice is too short.
    pub(crate) fn leaky(
        &self,
        tile: Leaky,
        q: &[f32],
        (n_rows, d): (usize, usize),
        k: &[f32],
        panels: Range<usize>,
        s: &mut [f32],
    ) {
        check(q, n_rows, 2 * d, k, d, &panels, s);
        let q = TiledRows { at: q.as_ptr(), n_rows, d };
        // SAFETY: above, and the slices hold the rows, a page's keys and the scores.
        unsafe { (self.leaky)(tile, q, k.as_ptr(), panels, s.as_mut_ptr()) }
    }

    /// The same of [`Tanh`], whose keys have a flag behind their elements.
    ///
    /// # Panics
    /// If a slice is too short.
    pub(crate) fn tanh(
        &self,
        q: &[f32],
        (n_rows, d): (usize, usize),
        k: &[f32],
        panels: Range<usize>,
        s: &mut [f32],
    ) {
        check(q, n_rows, 1 + 2 * d, k, d + 1, &panels, s);
        let q = TiledRows { at: q.as_ptr(), n_rows, d };
        // SAFETY: above, and the slices hold the rows, a page's keys and the scores.
        unsafe { (self.tanh)(q, k.as_ptr(), panels, s.as_mut_ptr()) }
    }

    /// [`wide_scores`] of a row.
    ///
    /// # Panics
    /// If a slice is too short.
    pub(crate) fn wide(&self, row: &[f32], d: usize, k: &[f32], panels: Range<usize>, s: &mut [f32]) {
        check(row, 1, row_words(d), k, d + 1, &panels, s);
        // SAFETY: above, and the slices hold the row, a page's keys and the row's scores.
        unsafe { (self.wide)(WideRow { at: row.as_ptr(), d }, k.as_ptr(), panels, s.as_mut_ptr()) }
    }

    /// [`direct_scores`] of a row and 16 keys, the first of which is that of `k` in its panel.
    ///
    /// # Panics
    /// If a slice is too short.
    pub(crate) fn direct(&self, row: &[f32], d: usize, k: &[f32], flagged: u16, s: &mut [f32]) {
        assert!(row.len() >= row_words(d) && k.len() >= (d - 1) * PANEL_KEYS + LANES && s.len() >= LANES);
        // SAFETY: above, and the slices hold the row, the keys and their scores.
        unsafe { (self.direct)(DirectRow { at: row.as_ptr(), d }, k.as_ptr(), flagged, s.as_mut_ptr()) }
    }

    /// Exponentials of a key's elements; whether it is flagged, and they are not to be used.
    pub(crate) fn key_exponentials(&self, b: &[f32], f: &mut [f32]) -> bool {
        // SAFETY: above.
        unsafe { (self.key_exponentials)(b, f) }
    }

    /// Exponentials of a row's elements in two factors; whether the row is flagged.
    pub(crate) fn row_exponentials(&self, a: &[f32], e1: &mut [f32], e2: &mut [f32]) -> bool {
        // SAFETY: above.
        unsafe { (self.row_exponentials)(a, e1, e2) }
    }

    /// [`convolve`].
    pub(crate) fn convolve(&self, taps: &[f32], around: &[f32], to: &mut [f32]) {
        // SAFETY: above.
        unsafe { (self.convolve)(taps, around, to) }
    }

    /// [`located_scores`].
    pub(crate) fn located(
        &self,
        row: &[f32],
        units: &[f32],
        responses: &[f32],
        k: &[f32],
        panels: Range<usize>,
        s: &mut [f32],
    ) {
        // SAFETY: above.
        unsafe { (self.located)(row, units, responses, k, panels, s) }
    }
}

/// Stamps the entries of one ISA, with tiles of rows by vectors of keys.
///
/// # Safety
/// The entries may only be called on a CPU that has `$features`; [`Kernels::reduce`] hands the table out only there.
macro_rules! instantiate {
    ($table:ident, $lanes:ty, sums $mr:literal x $nr:literal, tanh $tr:literal x $tn:literal $(, #[$features:meta])?) => {
        static $table: ReduceEntries = {
            $(#[$features])?
            unsafe fn distance_entry(tile: Distance, q: TiledRows, k: *const f32, panels: Range<usize>, s: *mut f32) {
                // SAFETY: the features are enabled on this function; operands are as the caller vouches.
                unsafe { tiles::<$lanes, Distance, $mr, $nr>(tile, q, k, panels, s) }
            }
            $(#[$features])?
            unsafe fn leaky_entry(tile: Leaky, q: TiledRows, k: *const f32, panels: Range<usize>, s: *mut f32) {
                // SAFETY: the features are enabled on this function; operands are as the caller vouches.
                unsafe { tiles::<$lanes, Leaky, $mr, $nr>(tile, q, k, panels, s) }
            }
            $(#[$features])?
            unsafe fn tanh_entry(q: TiledRows, k: *const f32, panels: Range<usize>, s: *mut f32) {
                // SAFETY: the features are enabled on this function; operands are as the caller vouches.
                unsafe { tiles::<$lanes, Tanh, $tr, $tn>(Tanh, q, k, panels, s) }
            }
            $(#[$features])?
            unsafe fn wide_entry(row: WideRow, k: *const f32, panels: Range<usize>, s: *mut f32) {
                // SAFETY: the features are enabled on this function; operands are as the caller vouches.
                unsafe { wide_scores::<$lanes>(row, k, panels, s) }
            }
            $(#[$features])?
            unsafe fn direct_entry(row: DirectRow, k: *const f32, flagged: u16, s: *mut f32) {
                // SAFETY: the features are enabled on this function; operands are as the caller vouches.
                unsafe { direct_scores::<$lanes>(row, k, flagged, s) }
            }
            $(#[$features])?
            unsafe fn key_exponentials_entry(b: &[f32], f: &mut [f32]) -> bool {
                // SAFETY: the features are enabled on this function.
                unsafe { key_exponentials::<$lanes>(b, f) }
            }
            $(#[$features])?
            unsafe fn row_exponentials_entry(a: &[f32], e1: &mut [f32], e2: &mut [f32]) -> bool {
                // SAFETY: the features are enabled on this function.
                unsafe { row_exponentials::<$lanes>(a, e1, e2) }
            }
            $(#[$features])?
            unsafe fn convolve_entry(taps: &[f32], around: &[f32], to: &mut [f32]) {
                // SAFETY: the features are enabled on this function.
                unsafe { convolve::<$lanes>(taps, around, to) }
            }
            $(#[$features])?
            unsafe fn located_entry(
                row: &[f32],
                units: &[f32],
                responses: &[f32],
                k: &[f32],
                panels: Range<usize>,
                s: &mut [f32],
            ) {
                // SAFETY: the features are enabled on this function.
                unsafe { located_scores::<$lanes>(row, units, responses, k, panels, s) }
            }
            ReduceEntries {
                tile_rows: $mr,
                tanh_rows: $tr,
                distance: distance_entry,
                leaky: leaky_entry,
                tanh: tanh_entry,
                wide: wide_entry,
                direct: direct_entry,
                key_exponentials: key_exponentials_entry,
                row_exponentials: row_exponentials_entry,
                convolve: convolve_entry,
                located: located_entry,
            }
        };
    };
}

#[cfg(target_arch = "x86_64")]
instantiate!(AVX512, arch::avx512::Avx512, sums 4 x 4, tanh 4 x 2, #[target_feature(enable = "avx512f,avx512dq,avx2,fma,f16c")]);
#[cfg(target_arch = "x86_64")]
instantiate!(AVX2, arch::avx2::Avx2, sums 2 x 1, tanh 1 x 1, #[target_feature(enable = "avx2,fma,f16c")]);
#[cfg(target_arch = "aarch64")]
instantiate!(NEON, arch::neon::Neon, sums 2 x 1, tanh 1 x 1);
instantiate!(PORTABLE, arch::portable::Portable, sums 2 x 1, tanh 1 x 1);
