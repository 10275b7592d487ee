//! How products are computed: what a word of stored elements is multiplied by, and into what it is added up.
//!
//! | arithmetic | elements of a word | broadcast against | accumulator | order |
//! |---|---|---|---|---|
//! | [`Exact`] | 1 f32, 2 bf16 or f16, 4 int8, 8 int4 | one f32 for each | f32 | "c1-f32" |
//! | [`bf16::Bf16Dots`] | 2 bf16 | a pair of bf16 | f32 | "c1-bf16" |
//! | [`int8::Int8Dots`] | 4 int8 | two pairs of 16-bit integers | 32-bit integer | "c1-int8" |
//!
//! The first is every ISA's; the others need the CPU's dot products, and lanes that have them.

// No lanes of other CPUs have dot products yet.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) mod bf16;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) mod int8;

use std::marker::PhantomData;
use std::ops::Range;

use crate::canonical::EXP2_POLY;
use crate::lanes::Lanes;
use crate::storage::Stored;

/// The arithmetic of a kernel.
///
/// # Safety
/// Methods may only be called where the ISA of `L`, and what the arithmetic needs beyond it, is enabled.
pub(crate) trait Arithmetic<L: Lanes>: Copy {
    /// Elements in a stored word.
    const PER_WORD: usize;
    /// Broadcasts that a stored word meets, one after the other; each meets as many of its elements.
    const PARTS: usize;
    /// Whether elements are multiplied by a scale before the product.
    const SCALED: bool = false;
    /// Whether accumulators, and with them weights, are integers with scales of their own.
    const INTEGERS: bool = false;
    /// The polynomial for 2^r, constant first.
    const EXP2: &'static [f32] = &EXP2_POLY;

    /// What broadcast `at` meets of each word.
    unsafe fn part(words: L::V, at: usize) -> L::V;
    /// The same for a word of which only element `at` counts.
    unsafe fn only(words: L::V, at: usize) -> L::V;
    /// `a * b + acc`.
    unsafe fn multiply_add(a: L::V, b: L::V, acc: L::V) -> L::V;
    /// What an accumulator stands for, less its scales.
    unsafe fn value(acc: L::V) -> L::V {
        acc
    }
    /// The words of a pair of elements in each lane, where a word is one.
    unsafe fn pair(even: L::V, _odd: L::V) -> L::V {
        even
    }
    /// What a row's weights for the keys of a vector become before they are packed; `value_scales` is valid for reading 16 if
    /// weights are integers.
    unsafe fn weight(p: L::V, _value_scales: *const f32) -> L::V {
        p
    }
    /// Turns the weights of `keys`, whole vectors of a row over a page, into the words that broadcasts are read from, in place;
    /// `largest` is the largest of them if they are to be integers. Returns what integers are multiplied by.
    ///
    /// `p` is valid for reading and writing 256 f32.
    unsafe fn pack_row(_p: *mut f32, _keys: Range<usize>, _largest: f32) -> f32 {
        1.0
    }

    /// Elements that the sum of a score over `d` dimensions covers: whole words where broadcasts meet several at once.
    #[inline(always)]
    fn reduced(d: usize) -> usize {
        if Self::PARTS == Self::PER_WORD { d } else { d.next_multiple_of(Self::PER_WORD) }
    }

    /// Broadcasts of the same sum, which are the words of a query.
    #[inline(always)]
    fn broadcasts(d: usize) -> usize {
        Self::reduced(d) / (Self::PER_WORD / Self::PARTS)
    }
}

/// f32 products of what is stored, widened exactly.
#[derive(Clone, Copy)]
pub(crate) struct Exact<S>(PhantomData<S>);

impl<L: Lanes, S: Stored> Arithmetic<L> for Exact<S> {
    const PER_WORD: usize = S::PER_WORD;
    const PARTS: usize = S::PER_WORD;
    const SCALED: bool = S::SCALED;

    #[inline(always)]
    unsafe fn part(words: L::V, at: usize) -> L::V {
        // SAFETY: as the caller vouches.
        unsafe { S::element::<L>(words, at) }
    }
    #[inline(always)]
    unsafe fn only(words: L::V, at: usize) -> L::V {
        // SAFETY: as the caller vouches.
        unsafe { S::element::<L>(words, at) }
    }
    #[inline(always)]
    unsafe fn multiply_add(a: L::V, b: L::V, acc: L::V) -> L::V {
        // SAFETY: as the caller vouches.
        unsafe { L::fma(a, b, acc) }
    }
}
