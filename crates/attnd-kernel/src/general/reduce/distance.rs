//! Squared distances, not expanded into products, so that nothing cancels: `s = fma(d, d, s)` with `d = q_x - k_x`, then
//! `s = s * factor`.

use super::tile::Tile;
use crate::lanes::{LANES, Lanes};
use crate::pages::PANEL_KEYS;
use crate::slot::PAGE_KEYS;

/// Sums of squares of differences, times a factor.
#[derive(Clone, Copy)]
pub(crate) struct Distance {
    pub(crate) factor: f32,
}

// SAFETY: reads `d` words of each row and `d` rows of the keys.
unsafe impl<L: Lanes> Tile<L> for Distance {
    const HEADER: usize = 0;
    const WORDS: usize = 1;
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
            let mut acc = [[L::zero(); NR]; MR];
            for x in 0..d {
                let mut keys = [L::zero(); NR];
                for n in 0..NR {
                    keys[n] = L::load(k.add(x * PANEL_KEYS + LANES * n));
                }
                for r in 0..MR {
                    let q = L::splat(*q.add(x * MR + r));
                    for n in 0..NR {
                        let off = L::sub(q, keys[n]);
                        acc[r][n] = L::fma(off, off, acc[r][n]);
                    }
                }
            }
            let factor = L::splat(self.factor);
            for r in 0..MR {
                for n in 0..NR {
                    L::store(s.add(r * PAGE_KEYS + LANES * n), L::mul(acc[r][n], factor));
                }
            }
        }
    }
}
