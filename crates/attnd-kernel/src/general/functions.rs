//! The functions of `canonical/functions.rs`, sixteen at a time.

use crate::canonical::EXP2_POLY;
use crate::canonical::functions::{SATURATED, TWO_LOG2_E};
use crate::lanes::Lanes;

/// Rule 12.
///
/// # Safety
/// The ISA of `L` is enabled.
#[inline(always)]
pub(crate) unsafe fn tanh<L: Lanes>(z: L::V) -> L::V {
    // SAFETY: as the caller vouches.
    unsafe {
        let y = L::min_keep(L::splat(SATURATED), L::mul(L::abs(z), L::splat(TWO_LOG2_E)));
        let n = L::rint(y);
        let r = L::sub(y, n);
        let mut q = L::splat(EXP2_POLY[6]);
        for i in (1..6).rev() {
            q = L::fma(q, r, L::splat(EXP2_POLY[i]));
        }
        let one = L::splat(1.0);
        let power = L::scale(one, n);
        let less_one = L::fma(power, L::mul(q, r), L::sub(power, one));
        L::copy_sign(L::div(less_one, L::add(less_one, L::splat(2.0))), z)
    }
}

/// Rule 15.
///
/// # Safety
/// The ISA of `L` is enabled.
#[inline(always)]
pub(crate) unsafe fn sigmoid<L: Lanes>(s: L::V) -> L::V {
    // SAFETY: as the caller vouches.
    unsafe {
        let x = L::sub(L::zero(), L::abs(s));
        let n = L::rint(x);
        let r = L::sub(x, n);
        let mut y = L::splat(EXP2_POLY[6]);
        for i in (0..6).rev() {
            y = L::fma(y, r, L::splat(EXP2_POLY[i]));
        }
        let t = L::scale_or_flush(y, n);
        let one = L::splat(1.0);
        let above = L::select_between(s, L::splat(f32::NEG_INFINITY), L::zero(), t, one);
        L::div(above, L::add(one, t))
    }
}
