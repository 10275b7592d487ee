//! Sixteen floats in an array: runs everywhere, and is the yardstick that the other ISAs are compared with.

use crate::canonical::{CANONICAL_NAN, FLUSH_EXPONENT};
use crate::lanes::Lanes;

/// Plain Rust. Fused multiply-add is `f32::mul_add`, which is one rounding on every platform, if slowly on some.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

type V = [f32; 16];

// What takes several instructions a lane is a function of its own: inlined, it is most of what the compiler does for this crate, and
// nobody gains by it.

/// Each lane by its number. Counted by hand, for Miri's sake: iterators make one call of an operation a dozen.
#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> V {
    let mut v = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        v[i] = f(i);
        i += 1;
    }
    v
}

#[inline(always)]
fn map(mut a: V, f: impl Fn(f32) -> f32) -> V {
    let mut i = 0;
    while i < 16 {
        a[i] = f(a[i]);
        i += 1;
    }
    a
}

#[inline(always)]
fn zip(mut a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    let mut i = 0;
    while i < 16 {
        a[i] = f(a[i], b[i]);
        i += 1;
    }
    a
}

#[inline(never)]
fn multiply_add(a: &V, b: &V, mut c: V) -> V {
    let mut i = 0;
    while i < 16 {
        c[i] = a[i].mul_add(b[i], c[i]);
        i += 1;
    }
    c
}

#[inline(never)]
fn widen_f16<const SHIFT: u32>(words: V) -> V {
    map(words, |word| half::f16::from_bits((word.to_bits() >> SHIFT & 0xffff) as u16).to_f32())
}

#[inline(never)]
fn integers(words: V, bits: u32, at: u32) -> V {
    map(words, |word| {
        let upper = (word.to_bits() << (32 - bits * (at + 1))).cast_signed();
        (upper >> (32 - bits)) as f32
    })
}

#[inline(never)]
fn round(a: V) -> V {
    map(a, f32::round_ties_even)
}

#[inline(never)]
fn scaled(y: V, e: &V) -> V {
    zip(y, *e, |y, e| y * f32::from_bits(((e as i32).wrapping_add(127) as u32) << 23))
}

#[inline(never)]
fn scaled_or_flushed(y: V, e: &V) -> V {
    zip(y, *e, |y, e| {
        if e <= FLUSH_EXPONENT {
            0.0
        } else {
            // The cast saturates, so a NaN exponent (then y is NaN too) makes no invalid bits that matter.
            y * f32::from_bits(((e as i32).wrapping_add(127) as u32) << 23)
        }
    })
}

// SAFETY: needs no CPU feature; pointer duties are the trait's.
unsafe impl Lanes for Portable {
    type V = V;

    #[inline(always)]
    unsafe fn zero() -> V {
        [0.0; 16]
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> V {
        [x; 16]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> V {
        // SAFETY: valid for 16 f32 by the trait's contract; unaligned reads are allowed.
        unsafe { from.cast::<V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: V) {
        // SAFETY: as in load.
        unsafe { to.cast::<V>().write_unaligned(v) }
    }
    #[inline(always)]
    fn prefetch(_at: *const f32) {}
    #[inline(always)]
    fn prefetch_later(_at: *const f32) {}
    #[inline(always)]
    unsafe fn low_bf16(words: V) -> V {
        map(words, |word| f32::from_bits(word.to_bits() << 16))
    }
    #[inline(always)]
    unsafe fn high_bf16(words: V) -> V {
        map(words, |word| f32::from_bits(word.to_bits() & 0xffff_0000))
    }
    #[inline(always)]
    unsafe fn low_f16(words: V) -> V {
        widen_f16::<0>(words)
    }
    #[inline(always)]
    unsafe fn high_f16(words: V) -> V {
        widen_f16::<16>(words)
    }
    #[inline(always)]
    unsafe fn integer<const BITS: usize>(words: V, at: usize) -> V {
        integers(words, BITS as u32, at as u32)
    }
    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        multiply_add(&a, &b, c)
    }
    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: V, b: V) -> V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(a: V, b: V) -> V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: V, b: V) -> V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min_keep(most: V, a: V) -> V {
        zip(most, a, |most, a| if a > most { most } else { a })
    }
    #[inline(always)]
    unsafe fn abs(a: V) -> V {
        map(a, f32::abs)
    }
    #[inline(always)]
    unsafe fn copy_sign(a: V, sign: V) -> V {
        zip(a, sign, f32::copysign)
    }
    #[inline(always)]
    unsafe fn rint(a: V) -> V {
        round(a)
    }
    #[inline(always)]
    unsafe fn scale_or_flush(y: V, e: V) -> V {
        scaled_or_flushed(y, &e)
    }
    #[inline(always)]
    unsafe fn scale(y: V, e: V) -> V {
        scaled(y, &e)
    }
    #[inline(always)]
    unsafe fn select_between(at: V, lo: V, hi: V, yes: V, no: V) -> V {
        each(|i| if lo[i] <= at[i] && at[i] < hi[i] { yes[i] } else { no[i] })
    }
    #[inline(always)]
    unsafe fn select_bits(bits: u16, yes: V, no: V) -> V {
        each(|i| if bits >> i & 1 == 1 { yes[i] } else { no[i] })
    }
    #[inline(always)]
    unsafe fn at_least(a: V, least: V) -> u16 {
        (0..16).fold(0, |bits, i| bits | u16::from(a[i] >= least[i]) << i)
    }
    #[inline(always)]
    unsafe fn canonical_nan(a: V) -> V {
        map(a, |x| if x.is_nan() { CANONICAL_NAN } else { x })
    }
    #[inline(always)]
    unsafe fn halving_sum(mut t: V) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                t[i] += t[i + half];
            }
        }
        t[0]
    }
    #[inline(always)]
    unsafe fn largest(a: V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |max, x| if x > max { x } else { max })
    }
    #[inline(always)]
    unsafe fn smallest(a: V) -> f32 {
        a.into_iter().fold(f32::INFINITY, |min, x| if x < min { x } else { min })
    }
}
