//! Products of bf16, two at a time, added up in f32: the order "c1-bf16".
//!
//! It departs from `canonical.rs` in what is multiplied and in how a product is added:
//!
//! * `q'` and the weights `p` are rounded to bf16, to nearest even. The sums `l` are of weights that are not rounded.
//! * `2^r` is a polynomial of degree 3, off by at most `7.5e-5` of it: a 26th of what rounding a weight to bf16 may take.
//! * Elements are reduced in pairs: dimensions `2 x` and `2 x + 1`, keys `2 j` and `2 j + 1`, the odd one first:
//!   `acc = fma(a_odd, b_odd, acc)`, then `acc = fma(a_even, b_even, acc)`. What the last pair lacks is 0, and so is a key that
//!   the row doesn't see. Of this instruction (`VDPBF16PS`, Intel SDM volume 2) subnormals are zeros, operands and sums.
//!
//! Pages, residues, merges and the division are those of `canonical.rs`. So bits are the same for any cut of the work and
//! for both families, as they are in f32.

use std::ops::Range;

use super::Arithmetic;
use crate::lanes::{DotLanes, LANES};

/// `2^r` on `[-1/2, 1/2]`, off by at most 7.5e-5 of it: minimax of degree 3, constant first.
const EXP2_POLY: [f32; 4] = [0.999_928_06, 0.693_260_97, 0.242_611_13, 0.055_171_67];

/// bf16 in pairs.
#[derive(Clone, Copy)]
pub(crate) struct Bf16Dots;

impl<L: DotLanes> Arithmetic<L> for Bf16Dots {
    const PER_WORD: usize = 2;
    const PARTS: usize = 1;
    const EXP2: &'static [f32] = &EXP2_POLY;

    #[inline(always)]
    unsafe fn part(words: L::V, _at: usize) -> L::V {
        words
    }
    #[inline(always)]
    unsafe fn only(words: L::V, at: usize) -> L::V {
        // SAFETY: as the caller vouches.
        unsafe { L::half_of_words(words, at) }
    }
    #[inline(always)]
    unsafe fn multiply_add(a: L::V, b: L::V, acc: L::V) -> L::V {
        // SAFETY: as the caller vouches.
        unsafe { L::dot_bf16(a, b, acc) }
    }
    #[inline(always)]
    unsafe fn pair(even: L::V, odd: L::V) -> L::V {
        // SAFETY: as the caller vouches.
        unsafe { L::bf16_pairs(even, odd) }
    }
    #[inline(always)]
    unsafe fn pack_row(p: *mut f32, keys: Range<usize>, _largest: f32) -> f32 {
        // Thirty-two weights make 16 words, which go where weights were that have been read.
        for j in (keys.start / (2 * LANES) * (2 * LANES)..keys.end).step_by(2 * LANES) {
            // SAFETY: j + 32 <= 256.
            unsafe {
                let words = L::bf16_words(L::load(p.add(j)), L::load(p.add(j + LANES)));
                L::store(p.add(j / 2), words);
            }
        }
        1.0
    }
}
