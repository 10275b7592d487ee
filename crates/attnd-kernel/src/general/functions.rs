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

#[cfg(test)]
mod tests {
    use crate::canonical::functions::{sigmoid, tanh};
    use crate::dispatch::Kernels;
    use crate::mask::PageBits;

    /// Sixteen lanes at a time, on every ISA, through the entries that use them.
    #[test]
    fn every_isa_gives_the_bits_of_the_definitions() {
        let step = if cfg!(miri) { 16_000_057 } else { 20_011 };
        let floats: Vec<f32> = (0..=u32::MAX).step_by(step).map(f32::from_bits).collect();
        for kernels in Kernels::available() {
            for floats in floats.as_chunks::<256>().0 {
                let (mut capped, mut weighed) = (*floats, *floats);
                kernels.general().cap(&mut capped, 0..256, 1.0, &PageBits::WHOLE);
                kernels.general().sigmoids(&mut weighed, 0..256, 0.0);
                for ((x, capped), weighed) in floats.iter().zip(capped).zip(weighed) {
                    let same = |got: f32, want: f32| {
                        got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan()
                    };
                    assert!(same(capped, tanh(*x)), "tanh({x:e}) is {capped:e} on {}", kernels.isa());
                    assert!(same(weighed, sigmoid(*x)), "sigmoid({x:e}) is {weighed:e} on {}", kernels.isa());
                }
            }
        }
    }
}
