//! How stored elements lie in memory words, and how kernels widen them to f32: exactly.
//!
//! A word is 32 bits. Elements that are reduced one after the other share a word (dimensions of a key, keys of a value
//! column), the earlier one in the lower bits; so a vector of words becomes one vector of f32 per step, and 16-bit
//! elements take half the bandwidth and no shuffles. Buffers hold words as f32, whose bits are moved and never computed
//! with.

use std::ops::Range;

use half::{bf16, f16};

use crate::dtype::Dtype;
use crate::lanes::Lanes;
use crate::pages::{PANEL_COLUMNS, PANEL_KEYS};
use crate::slot::PAGE_KEYS;

/// Elements of a storage type in a word.
pub(crate) const fn per_word(storage: Dtype) -> usize {
    size_of::<f32>() / storage.size()
}

/// Puts element `at` of a word in place, rounded to nearest even where the storage is narrower than f32.
#[inline(always)]
pub(crate) fn put(word: &mut f32, at: usize, value: f32, storage: Dtype) {
    let half = match storage {
        Dtype::F32 => {
            *word = value;
            return;
        }
        Dtype::F16 => f16::from_f32(value).to_bits(),
        Dtype::Bf16 => bf16::from_f32(value).to_bits(),
    };
    let shift = 16 * at;
    *word = f32::from_bits(word.to_bits() & !(0xffff << shift) | u32::from(half) << shift);
}

/// A storage type as a kernel sees it.
pub(crate) trait Stored: Copy {
    /// Elements in a word.
    const PER_WORD: usize;

    /// Element `at` of each word, `at < PER_WORD`.
    ///
    /// # Safety
    /// The ISA of `L` is enabled.
    unsafe fn element<L: Lanes>(words: L::V, at: usize) -> L::V;
}

/// f32: a word is its element.
#[derive(Clone, Copy)]
pub(crate) struct StoredF32;

impl Stored for StoredF32 {
    const PER_WORD: usize = 1;

    #[inline(always)]
    unsafe fn element<L: Lanes>(words: L::V, _at: usize) -> L::V {
        words
    }
}

/// bf16, two in a word.
#[derive(Clone, Copy)]
pub(crate) struct StoredBf16;

impl Stored for StoredBf16 {
    const PER_WORD: usize = 2;

    #[inline(always)]
    unsafe fn element<L: Lanes>(words: L::V, at: usize) -> L::V {
        // SAFETY: as the caller vouches.
        unsafe { if at == 0 { L::low_bf16(words) } else { L::high_bf16(words) } }
    }
}

/// f16, two in a word.
#[derive(Clone, Copy)]
pub(crate) struct StoredF16;

impl Stored for StoredF16 {
    const PER_WORD: usize = 2;

    #[inline(always)]
    unsafe fn element<L: Lanes>(words: L::V, at: usize) -> L::V {
        // SAFETY: as the caller vouches.
        unsafe { if at == 0 { L::low_f16(words) } else { L::high_f16(words) } }
    }
}

/// Widens the K panels of a page to the layout that f32 storage has.
///
/// # Safety
/// The ISA of `L` is enabled. `words` are the panels of `d` dimensions, and `out` has room for `256 * d`.
#[inline(always)]
pub(crate) unsafe fn widen_keys<L: Lanes, S: Stored>(words: &[f32], d: usize, out: &mut [f32]) {
    let rows = d.div_ceil(S::PER_WORD);
    assert!(words.len() == PAGE_KEYS * rows && out.len() >= PAGE_KEYS * d);
    for panel in 0..PAGE_KEYS / PANEL_KEYS {
        let words = &words[panel * PANEL_KEYS * rows..][..PANEL_KEYS * rows];
        let out = &mut out[panel * PANEL_KEYS * d..][..PANEL_KEYS * d];
        // SAFETY: both are rows of 64, and `widen_rows` has as many of each.
        unsafe { widen_rows::<L, S>(words, PANEL_KEYS, 0..d, out) };
    }
}

/// Widens the V panels of a page to the layout that f32 storage has.
///
/// # Safety
/// The ISA of `L` is enabled. `words` are the panels of `columns` columns, and `out` has room for `256 * columns`.
#[inline(always)]
pub(crate) unsafe fn widen_values<L: Lanes, S: Stored>(words: &[f32], columns: usize, out: &mut [f32]) {
    let rows = PAGE_KEYS / S::PER_WORD;
    assert!(words.len() == rows * columns && out.len() >= PAGE_KEYS * columns);
    for first in (0..columns).step_by(PANEL_COLUMNS) {
        let width = PANEL_COLUMNS.min(columns - first);
        let words = &words[first * rows..][..width * rows];
        let out = &mut out[first * PAGE_KEYS..][..width * PAGE_KEYS];
        // SAFETY: both are rows of `width`, and `widen_rows` has as many of each.
        unsafe { widen_rows::<L, S>(words, width, 0..PAGE_KEYS, out) };
    }
}

/// # Safety
/// The ISA of `L` is enabled. `width` is a multiple of 16, `out` has a row of `width` for each of `elements`, and `words` one
/// for each word of them.
#[inline(always)]
unsafe fn widen_rows<L: Lanes, S: Stored>(
    words: &[f32],
    width: usize,
    elements: Range<usize>,
    out: &mut [f32],
) {
    for (word, words) in words.chunks_exact(width).enumerate() {
        for at in 0..S::PER_WORD.min(elements.end - word * S::PER_WORD) {
            let out = &mut out[(word * S::PER_WORD + at) * width..][..width];
            for lane in (0..width).step_by(crate::lanes::LANES) {
                // SAFETY: both rows are `width` long.
                unsafe {
                    let element = S::element::<L>(L::load(words.as_ptr().add(lane)), at);
                    L::store(out.as_mut_ptr().add(lane), element);
                }
            }
        }
    }
}
