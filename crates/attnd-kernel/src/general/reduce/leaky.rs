//! Weighted sums of leaky rectifiers: `s = fma(w_x, leaky(a_x + b_x), s)`.
//!
//! `leaky(t) = fma(slope, min(t, 0), max(t, 0))`, which is `t` or `slope t` rounded once, and NaN where `t` is.

use super::tile::Tile;
use crate::lanes::{LANES, Lanes};
use crate::pages::PANEL_KEYS;
use crate::slot::PAGE_KEYS;

/// Words of an element are `a_x` and `w_x`, the latter times the factor of rule 1 or 11.
#[derive(Clone, Copy)]
pub(crate) struct Leaky {
    pub(crate) slope: f32,
}

// SAFETY: reads `2 d` words of each row and `d` rows of the keys.
unsafe impl<L: Lanes> Tile<L> for Leaky {
    const HEADER: usize = 0;
    const WORDS: usize = 2;
    const FLAGS: usize = 0;

    #[inline(always)]
    unsafe fn tile<const MR: usize, const NR: usize>(
        self,
        q: *const f32,
        d: usize,
        k: *const f32,
        s: *mut f32,
    ) {
        // SAFETY: the ranges that the caller vouches for, element by element.
        unsafe {
            let (zero, slope) = (L::zero(), L::splat(self.slope));
            let mut acc = [[L::zero(); NR]; MR];
            for x in 0..d {
                let mut keys = [L::zero(); NR];
                for n in 0..NR {
                    keys[n] = L::load(k.add(x * PANEL_KEYS + LANES * n));
                }
                for r in 0..MR {
                    let a = L::splat(*q.add(2 * x * MR + r));
                    let w = L::splat(*q.add((2 * x + 1) * MR + r));
                    for n in 0..NR {
                        let t = L::add(a, keys[n]);
                        let leaky = L::fma(slope, L::min_keep(zero, t), L::max(t, zero));
                        acc[r][n] = L::fma(w, leaky, acc[r][n]);
                    }
                }
            }
            for r in 0..MR {
                for n in 0..NR {
                    L::store(s.add(r * PAGE_KEYS + LANES * n), acc[r][n]);
                }
            }
        }
    }
}
