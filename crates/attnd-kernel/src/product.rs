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
//! An element has one accumulator, whatever its tile; so tile shapes can't show in the bits. What a word of `b` holds and how
//! it is multiplied is a matter of [`Arithmetic`].

use std::ops::Range;

use crate::arithmetic::Arithmetic;
use crate::lanes::{LANES, Lanes};

/// Broadcasts of a reduction between two looks at the loop counter: counting takes issue slots of the multiply-add pipes.
const UNROLL: usize = 4;

/// An operand of a product.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    /// The first word of step 0.
    pub(crate) at: *const f32,
    /// Words from one step to the next.
    pub(crate) step: usize,
}

impl Operand {
    /// The same from another word of each step on.
    pub(crate) fn at_word(self, word: usize) -> Self {
        Self { at: self.at.wrapping_add(word), ..self }
    }
}

/// What the elements of `b` are multiplied by, where its [`Arithmetic`] says that they are.
#[derive(Clone, Copy)]
pub(crate) enum Scales {
    /// Nothing.
    None,
    /// One for each lane.
    OfLanes(*const f32),
    /// One for each element of the reduction.
    OfElements(*const f32),
}

/// Cache lines that a reduction asks for on its way. Which of the three should be constant where it is inlined.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ask {
    /// None.
    Nothing,
    /// Those of `b`, so many words ahead of their use: for an operand that is swept forward and comes from memory.
    Ahead(usize),
    /// One for every [`words_of_ask`] words, for whoever comes later.
    Later {
        /// The first one.
        at: *const f32,
        /// Words from one to the next.
        step: usize,
    },
}

/// How many words of a reduction one line of [`Ask::Later`] comes to.
pub(crate) const fn words_of_ask(parts: usize) -> usize {
    if parts < UNROLL { UNROLL / parts } else { 1 }
}

/// Adds the products of `elements` to each accumulator. `A_ROW` is the distance from one broadcast word of a step to
/// the next. `b` holds words of `A`, so one of its steps is as many elements as a word has; one of `a` is as many as a
/// broadcast meets.
///
/// # Safety
/// The ISA of `L`, and what `A` needs, is enabled. At every element `a` is valid for reading `MR` words at a distance of `A_ROW`, and `b` for
/// `16 * NR` words. `scales` are valid for the lanes or the elements, if `A` has them.
#[inline(always)]
pub(crate) unsafe fn reduce<
    L: Lanes,
    A: Arithmetic<L>,
    const MR: usize,
    const NR: usize,
    const A_ROW: usize,
>(
    a: Operand,
    b: Operand,
    scales: Scales,
    elements: Range<usize>,
    ask: Ask,
    acc: &mut [[L::V; NR]; MR],
) {
    // Whole words; an element more at either end where the range cuts one.
    let words = elements.start.div_ceil(A::PER_WORD)..elements.end / A::PER_WORD;
    let head = elements.start..elements.end.min(words.start * A::PER_WORD);
    let tail = (words.end * A::PER_WORD).max(head.end)..elements.end;
    let unroll = const { words_of_ask(A::PARTS) };
    let unrolled = words.start + words.len() / unroll * unroll;
    // SAFETY: every element is one of `elements`, and every word holds one.
    unsafe {
        for x in head {
            element::<L, A, MR, NR, A_ROW>(a, b, scales, x, acc);
        }
        let mut later = match ask {
            Ask::Later { at, .. } => at,
            Ask::Nothing | Ask::Ahead(_) => std::ptr::null(),
        };
        for first in (words.start..unrolled).step_by(unroll) {
            if let Ask::Later { step, .. } = ask {
                L::prefetch_later(later);
                later = later.wrapping_add(step);
            }
            // Counted from 0, LLVM spills two accumulators of the tiles over words of two elements.
            for word in first..first + unroll {
                if let Ask::Ahead(ahead) = ask {
                    for n in 0..NR {
                        L::prefetch(b.at.wrapping_add(word * b.step + ahead + LANES * n));
                    }
                }
                step::<L, A, MR, NR, A_ROW>(a, b, scales, word, acc);
            }
        }
        for word in unrolled..words.end {
            step::<L, A, MR, NR, A_ROW>(a, b, scales, word, acc);
        }
        for x in tail {
            element::<L, A, MR, NR, A_ROW>(a, b, scales, x, acc);
        }
    }
}

/// Adds the products of the elements of one word.
///
/// # Safety
/// As [`reduce`], for these elements.
#[inline(always)]
unsafe fn step<L: Lanes, A: Arithmetic<L>, const MR: usize, const NR: usize, const A_ROW: usize>(
    a: Operand,
    b: Operand,
    scales: Scales,
    word: usize,
    acc: &mut [[L::V; NR]; MR],
) {
    // SAFETY: as the caller vouches.
    unsafe {
        if MR == 1 && A::PARTS > 1 {
            // A word at a time: nobody shares the widened lanes, and they would take the accumulators' registers.
            for n in 0..NR {
                let words = L::load(b.at.add(word * b.step + LANES * n));
                for at in 0..A::PARTS {
                    let lanes = scaled::<L, A>(A::part(words, at), scales, n, word * A::PER_WORD + at);
                    let a = L::splat(*a.at.add((word * A::PARTS + at) * a.step));
                    acc[0][n] = A::multiply_add(a, lanes, acc[0][n]);
                }
            }
            return;
        }
        let mut words = [L::zero(); NR];
        for n in 0..NR {
            words[n] = L::load(b.at.add(word * b.step + LANES * n));
        }
        for at in 0..A::PARTS {
            let a = a.at.add((word * A::PARTS + at) * a.step);
            // No closure: what isn't inlined into the entry loses its CPU features.
            let mut lanes = [L::zero(); NR];
            for n in 0..NR {
                lanes[n] = scaled::<L, A>(A::part(words[n], at), scales, n, word * A::PER_WORD + at);
            }
            add::<L, A, MR, NR, A_ROW>(a, &lanes, acc);
        }
    }
}

/// Adds the products of one element.
///
/// # Safety
/// As [`reduce`], for this element.
#[inline(always)]
unsafe fn element<L: Lanes, A: Arithmetic<L>, const MR: usize, const NR: usize, const A_ROW: usize>(
    a: Operand,
    b: Operand,
    scales: Scales,
    x: usize,
    acc: &mut [[L::V; NR]; MR],
) {
    let (word, at) = (x / A::PER_WORD, x % A::PER_WORD);
    // SAFETY: as the caller vouches.
    unsafe {
        let mut lanes = [L::zero(); NR];
        for n in 0..NR {
            let words = L::load(b.at.add(word * b.step + LANES * n));
            lanes[n] = scaled::<L, A>(A::only(words, at), scales, n, x);
        }
        add::<L, A, MR, NR, A_ROW>(a.at.add((word * A::PARTS + at % A::PARTS) * a.step), &lanes, acc);
    }
}

/// Lanes `16 n` to `16 n + 15` of element `x`, multiplied by their scales if `A` has any.
///
/// # Safety
/// As [`reduce`], for this element.
#[inline(always)]
unsafe fn scaled<L: Lanes, A: Arithmetic<L>>(lanes: L::V, scales: Scales, n: usize, x: usize) -> L::V {
    if !A::SCALED {
        return lanes;
    }
    // SAFETY: as the caller vouches.
    unsafe {
        match scales {
            Scales::None => lanes,
            Scales::OfLanes(at) => L::mul(lanes, L::load(at.add(LANES * n))),
            Scales::OfElements(at) => L::mul(lanes, L::splat(*at.add(x))),
        }
    }
}

/// # Safety
/// The ISA of `L`, and what `A` needs, is enabled, and `a` is valid for reading `MR` words at a distance of `A_ROW`.
#[inline(always)]
unsafe fn add<L: Lanes, A: Arithmetic<L>, const MR: usize, const NR: usize, const A_ROW: usize>(
    a: *const f32,
    lanes: &[L::V; NR],
    acc: &mut [[L::V; NR]; MR],
) {
    // SAFETY: as the caller vouches.
    unsafe {
        for r in 0..MR {
            let a = L::splat(*a.add(r * A_ROW));
            for n in 0..NR {
                acc[r][n] = A::multiply_add(a, lanes[n], acc[r][n]);
            }
        }
    }
}
