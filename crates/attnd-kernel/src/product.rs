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

use crate::lanes::{LANES, Lanes};

/// Steps of a reduction between two looks at the loop counter: counting takes issue slots of the multiply-add pipes.
const UNROLL: usize = 4;

/// An operand of a product.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    /// Element or vector 0 of step 0.
    pub(crate) at: *const f32,
    /// Elements from one step to the next.
    pub(crate) step: usize,
}

impl Operand {
    /// The operand from step `step` on.
    ///
    /// # Safety
    /// The step is inside the memory of the operand, or one past its end.
    #[inline(always)]
    pub(crate) unsafe fn skip_to(self, step: usize) -> Self {
        // SAFETY: as the caller vouches.
        Self { at: unsafe { self.at.add(step * self.step) }, ..self }
    }
}

/// Adds `steps` products to each accumulator. `A_ROW` is the distance from one broadcast element of a step to the next.
/// Where `ahead` is not 0, cache lines of `b` are asked for that many elements ahead of their use, for operands that
/// are swept forward and come from memory; it should be a constant where this is inlined.
///
/// # Safety
/// The ISA of `L` is enabled. At every step `a` is valid for reading `MR` elements at a distance of `A_ROW`, and `b` for
/// `16 * NR`.
#[inline(always)]
pub(crate) unsafe fn reduce<L: Lanes, const MR: usize, const NR: usize, const A_ROW: usize>(
    a: Operand,
    b: Operand,
    steps: usize,
    ahead: usize,
    acc: &mut [[L::V; NR]; MR],
) {
    let whole = steps / UNROLL * UNROLL;
    // SAFETY: every step is below `steps`.
    unsafe {
        for x in (0..whole).step_by(UNROLL) {
            for i in x..x + UNROLL {
                let b = b.at.add(i * b.step);
                if ahead > 0 {
                    for n in 0..NR {
                        L::prefetch(b.wrapping_add(ahead + LANES * n));
                    }
                }
                step::<L, MR, NR, A_ROW>(a.at.add(i * a.step), b, acc);
            }
        }
        for x in whole..steps {
            step::<L, MR, NR, A_ROW>(a.at.add(x * a.step), b.at.add(x * b.step), acc);
        }
    }
}

/// Adds the products of one step.
///
/// # Safety
/// The ISA of `L` is enabled. `a` is valid for `MR` reads at a distance of `A_ROW`, `b` for `16 * NR`.
#[inline(always)]
unsafe fn step<L: Lanes, const MR: usize, const NR: usize, const A_ROW: usize>(
    a: *const f32,
    b: *const f32,
    acc: &mut [[L::V; NR]; MR],
) {
    // SAFETY: the ranges above, element by element.
    unsafe {
        let mut lanes = [L::zero(); NR];
        for n in 0..NR {
            lanes[n] = L::load(b.add(LANES * n));
        }
        for r in 0..MR {
            let a = L::splat(*a.add(r * A_ROW));
            for n in 0..NR {
                acc[r][n] = L::fma(a, lanes[n], acc[r][n]);
            }
        }
    }
}
