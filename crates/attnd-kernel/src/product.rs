//! The register tile under both kernel families: a rectangle of dot products, each reduced in ascending order.
//!
//! ```text
//! acc[r][16 n + lane] = fma(a[r, x], b[x, 16 n + lane], acc[r][16 n + lane])      x ascending
//! ```
//!
//! `a` is broadcast, `b` is loaded, the `MR x NR` accumulators stay in registers. Which of keys, queries, dimensions and
//! columns play the parts of `r`, `x` and the lanes is all that tells the two products of the two families apart:
//!
//! | family | product | broadcast `a` | lanes `b` | reduced over |
//! |---|---|---|---|---|
//! | rows broadcast | scores | query rows | keys of a K panel | dimension |
//! | rows broadcast | context | weights of a row | columns of a V panel | keys |
//! | lanes = queries | scores | keys of a K panel | queries | dimension |
//! | lanes = queries | context | columns of a V panel | weights of the queries | keys |
//!
//! An element has one accumulator, whatever its tile; so tile shapes can't show in the bits.

use std::ops::Range;

use crate::lanes::{LANES, Lanes};
use crate::storage::Stored;

/// Steps of a reduction between two looks at the loop counter: counting takes issue slots of the multiply-add pipes.
const UNROLL: usize = 4;

/// An operand of a product.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    /// The first element or word of step 0.
    pub(crate) at: *const f32,
    /// Elements or words from one step to the next.
    pub(crate) step: usize,
}

/// Adds the products of `elements` to each accumulator. `A_ROW` is the distance from one broadcast element of a step to
/// the next. `b` holds words of `S`, so one of its steps is as many elements as a word has.
///
/// Where `ahead` is not 0, cache lines of `b` are asked for that many words ahead of their use, for operands that are
/// swept forward and come from memory. It should be a constant where this is inlined.
///
/// # Safety
/// The ISA of `L` is enabled. At every element `a` is valid for reading `MR` elements at a distance of `A_ROW`, and `b` for
/// `16 * NR` words.
#[inline(always)]
pub(crate) unsafe fn reduce<L: Lanes, S: Stored, const MR: usize, const NR: usize, const A_ROW: usize>(
    a: Operand,
    b: Operand,
    elements: Range<usize>,
    ahead: usize,
    acc: &mut [[L::V; NR]; MR],
) {
    // Whole words; an element more at either end where the range cuts one.
    let words = elements.start.div_ceil(S::PER_WORD)..elements.end / S::PER_WORD;
    let head = elements.start..elements.end.min(words.start * S::PER_WORD);
    let tail = (words.end * S::PER_WORD).max(head.end)..elements.end;
    let unrolled = words.start + words.len() / UNROLL * UNROLL;
    // SAFETY: every element is one of `elements`, and every word holds one.
    unsafe {
        for x in head {
            element::<L, S, MR, NR, A_ROW>(a, b, x, acc);
        }
        for word in (words.start..unrolled).step_by(UNROLL) {
            for word in word..word + UNROLL {
                if ahead > 0 {
                    for n in 0..NR {
                        L::prefetch(b.at.wrapping_add(word * b.step + ahead + LANES * n));
                    }
                }
                step::<L, S, MR, NR, A_ROW>(a, b, word, acc);
            }
        }
        for word in unrolled..words.end {
            step::<L, S, MR, NR, A_ROW>(a, b, word, acc);
        }
        for x in tail {
            element::<L, S, MR, NR, A_ROW>(a, b, x, acc);
        }
    }
}

/// Adds the products of the elements of one word.
///
/// # Safety
/// As [`reduce`], for these elements.
#[inline(always)]
unsafe fn step<L: Lanes, S: Stored, const MR: usize, const NR: usize, const A_ROW: usize>(
    a: Operand,
    b: Operand,
    word: usize,
    acc: &mut [[L::V; NR]; MR],
) {
    // SAFETY: as the caller vouches.
    unsafe {
        if MR == 1 && S::PER_WORD > 1 {
            // A word at a time: nobody shares the widened lanes, and they would take the accumulators' registers.
            for n in 0..NR {
                let lanes = L::load(b.at.add(word * b.step + LANES * n));
                for at in 0..S::PER_WORD {
                    let a = L::splat(*a.at.add((word * S::PER_WORD + at) * a.step));
                    acc[0][n] = L::fma(a, S::element::<L>(lanes, at), acc[0][n]);
                }
            }
            return;
        }
        let mut words = [L::zero(); NR];
        for n in 0..NR {
            words[n] = L::load(b.at.add(word * b.step + LANES * n));
        }
        for at in 0..S::PER_WORD {
            let a = a.at.add((word * S::PER_WORD + at) * a.step);
            // No closure: what isn't inlined into the entry loses its CPU features.
            let mut lanes = [L::zero(); NR];
            for n in 0..NR {
                lanes[n] = S::element::<L>(words[n], at);
            }
            add::<L, MR, NR, A_ROW>(a, &lanes, acc);
        }
    }
}

/// Adds the products of one element.
///
/// # Safety
/// As [`reduce`], for this element.
#[inline(always)]
unsafe fn element<L: Lanes, S: Stored, const MR: usize, const NR: usize, const A_ROW: usize>(
    a: Operand,
    b: Operand,
    x: usize,
    acc: &mut [[L::V; NR]; MR],
) {
    // SAFETY: as the caller vouches.
    unsafe {
        let mut lanes = [L::zero(); NR];
        for n in 0..NR {
            let words = L::load(b.at.add(x / S::PER_WORD * b.step + LANES * n));
            lanes[n] = S::element::<L>(words, x % S::PER_WORD);
        }
        add::<L, MR, NR, A_ROW>(a.at.add(x * a.step), &lanes, acc);
    }
}

/// # Safety
/// The ISA of `L` is enabled, and `a` is valid for reading `MR` elements at a distance of `A_ROW`.
#[inline(always)]
unsafe fn add<L: Lanes, const MR: usize, const NR: usize, const A_ROW: usize>(
    a: *const f32,
    lanes: &[L::V; NR],
    acc: &mut [[L::V; NR]; MR],
) {
    // SAFETY: as the caller vouches.
    unsafe {
        for r in 0..MR {
            let a = L::splat(*a.add(r * A_ROW));
            for n in 0..NR {
                acc[r][n] = L::fma(a, lanes[n], acc[r][n]);
            }
        }
    }
}
