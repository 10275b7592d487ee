//! Pages in f32: kernels without tiles of their own for a storage type get a widened copy, exact to the last bit.
//!
//! The copy has the layout of f32 storage, so that one kernel serves all storage types. Widening a page once for all rows of
//! a block costs little beside the products of many rows; with few rows it is what decides the speed.

use crate::lanes::{LANES, Lanes};
use crate::pages::{KvView, PANEL_COLUMNS, PANEL_KEYS, PageView, padded_columns};
use crate::slot::PAGE_KEYS;
use crate::storage::{Storage, Stored, StoredBf16, StoredF16, StoredInt4, StoredInt8};

/// What a widened page takes, in f32s; nothing where pages are f32 already.
pub(crate) fn widened_floats(kv: &KvView) -> usize {
    match kv.storage() {
        Storage::F32 => 0,
        Storage::F16 | Storage::Bf16 | Storage::Int8 | Storage::Int4 => {
            PAGE_KEYS * (kv.head_dim() + padded_columns(kv.value_dim()))
        }
    }
}

/// The K panels and the V panels of a page in f32: those that are resident, or copies in `memory`.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If `page` is none of `kv`, or `memory` has less than [`widened_floats`].
#[inline(always)]
pub(crate) unsafe fn panels<'m, L: Lanes>(
    kv: &KvView,
    page: PageView<'m>,
    memory: &'m mut [f32],
) -> (&'m [f32], &'m [f32]) {
    let dims = (kv.head_dim(), padded_columns(kv.value_dim()));
    // SAFETY: the ISA is enabled.
    unsafe {
        match kv.storage() {
            Storage::F32 => (page.k, page.v),
            Storage::F16 => widen_page::<L, StoredF16>(page, dims, memory),
            Storage::Bf16 => widen_page::<L, StoredBf16>(page, dims, memory),
            Storage::Int8 => widen_page::<L, StoredInt8>(page, dims, memory),
            Storage::Int4 => widen_page::<L, StoredInt4>(page, dims, memory),
        }
    }
}

/// What the widened keys of a page take, in f32s; nothing where pages are f32 already.
pub(crate) fn widened_key_floats(kv: &KvView) -> usize {
    if kv.storage() == Storage::F32 { 0 } else { PAGE_KEYS * kv.head_dim() }
}

/// The K panels of a page in f32, as [`panels`] has them.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If `page` is none of `kv`, or `memory` has less than [`widened_key_floats`].
#[inline(always)]
pub(crate) unsafe fn key_panels<'m, L: Lanes>(
    kv: &KvView,
    page: PageView<'m>,
    memory: &'m mut [f32],
) -> &'m [f32] {
    let d = kv.head_dim();
    let copy = &mut memory[..widened_key_floats(kv)];
    // SAFETY: the ISA is enabled.
    unsafe {
        match kv.storage() {
            Storage::F32 => return page.k,
            Storage::F16 => widen_keys::<L, StoredF16>(page.k, page.key_scales, d, copy),
            Storage::Bf16 => widen_keys::<L, StoredBf16>(page.k, page.key_scales, d, copy),
            Storage::Int8 => widen_keys::<L, StoredInt8>(page.k, page.key_scales, d, copy),
            Storage::Int4 => widen_keys::<L, StoredInt4>(page.k, page.key_scales, d, copy),
        }
    }
    copy
}

/// # Safety
/// The ISA of `L` is enabled.
#[inline(always)]
unsafe fn widen_page<'m, L: Lanes, S: Stored>(
    page: PageView<'m>,
    (d, columns): (usize, usize),
    memory: &'m mut [f32],
) -> (&'m [f32], &'m [f32]) {
    let (k, v) = memory[..PAGE_KEYS * (d + columns)].split_at_mut(PAGE_KEYS * d);
    // SAFETY: as the caller vouches.
    unsafe {
        widen_keys::<L, S>(page.k, page.key_scales, d, k);
        widen_values::<L, S>(page.v, page.value_scales, columns, v);
    }
    (k, v)
}

/// Widens the K panels. A scale is that of a lane.
///
/// # Safety
/// The ISA of `L` is enabled.
#[inline(always)]
unsafe fn widen_keys<L: Lanes, S: Stored>(words: &[f32], scales: &[f32], d: usize, out: &mut [f32]) {
    let rows = d.div_ceil(S::PER_WORD);
    assert!(words.len() == PAGE_KEYS * rows && out.len() == PAGE_KEYS * d);
    assert!(!S::SCALED || scales.len() == PAGE_KEYS);
    for panel in 0..PAGE_KEYS / PANEL_KEYS {
        let words = &words[panel * PANEL_KEYS * rows..][..PANEL_KEYS * rows];
        let out = &mut out[panel * PANEL_KEYS * d..][..PANEL_KEYS * d];
        for (word, words) in words.chunks_exact(PANEL_KEYS).enumerate() {
            // Of the last word, only the dimensions that a key has.
            let elements = S::PER_WORD.min(d - word * S::PER_WORD);
            let out = &mut out[word * S::PER_WORD * PANEL_KEYS..][..elements * PANEL_KEYS];
            for lane in (0..PANEL_KEYS).step_by(LANES) {
                // SAFETY: lane + 16 <= 64, the rows of words and of elements are 64 long, and `scales`, if they are used,
                // are four times that.
                unsafe {
                    let mut scale = L::zero();
                    if S::SCALED {
                        scale = L::load(scales.as_ptr().add(panel * PANEL_KEYS + lane));
                    }
                    let (from, to) = (words.as_ptr().add(lane), out.as_mut_ptr().add(lane));
                    let words = L::load(from);
                    // Two loops, so that the one of whole words is unrolled.
                    if elements == S::PER_WORD {
                        for at in 0..S::PER_WORD {
                            L::store(to.add(at * PANEL_KEYS), scaled::<L, S>(words, at, scale));
                        }
                    } else {
                        for at in 0..elements {
                            L::store(to.add(at * PANEL_KEYS), scaled::<L, S>(words, at, scale));
                        }
                    }
                }
            }
        }
    }
}

/// Element `at` of each word, times a scale where there are any.
///
/// # Safety
/// The ISA of `L` is enabled.
#[inline(always)]
unsafe fn scaled<L: Lanes, S: Stored>(words: L::V, at: usize, scale: L::V) -> L::V {
    // SAFETY: as the caller vouches.
    unsafe {
        let element = S::element::<L>(words, at);
        if S::SCALED { L::mul(element, scale) } else { element }
    }
}

/// Widens the V panels. A scale is that of a row.
///
/// # Safety
/// The ISA of `L` is enabled.
#[inline(always)]
unsafe fn widen_values<L: Lanes, S: Stored>(words: &[f32], scales: &[f32], columns: usize, out: &mut [f32]) {
    let rows = PAGE_KEYS / S::PER_WORD;
    assert!(words.len() == rows * columns && out.len() == PAGE_KEYS * columns);
    assert!(!S::SCALED || scales.len() == PAGE_KEYS);
    assert!(columns.is_multiple_of(LANES));
    for first in (0..columns).step_by(PANEL_COLUMNS) {
        let width = PANEL_COLUMNS.min(columns - first);
        let words = &words[first * rows..][..width * rows];
        let out = &mut out[first * PAGE_KEYS..][..width * PAGE_KEYS];
        for row in 0..rows {
            let words = &words[row * width..][..width];
            let out = &mut out[row * S::PER_WORD * width..][..S::PER_WORD * width];
            for lane in (0..width).step_by(LANES) {
                // SAFETY: `width` is a multiple of 16, so the vectors lie inside the row of words and the rows of its
                // elements. `scales`, if they are used, have one for each key of a page.
                unsafe {
                    let (from, to) = (words.as_ptr().add(lane), out.as_mut_ptr().add(lane));
                    let words = L::load(from);
                    for at in 0..S::PER_WORD {
                        let mut scale = L::zero();
                        if S::SCALED {
                            scale = L::splat(*scales.as_ptr().add(row * S::PER_WORD + at));
                        }
                        L::store(to.add(at * width), scaled::<L, S>(words, at, scale));
                    }
                }
            }
        }
    }
}
