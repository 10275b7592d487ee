//! NEON: sixteen floats in four registers.

use std::arch::aarch64::*;

use crate::canonical::{CANONICAL_NAN, FLUSH_EXPONENT};
use crate::lanes::{LANES, Lanes};

/// Advanced SIMD, which every aarch64 has.
#[derive(Clone, Copy)]
pub(crate) struct Neon;

type V = [float32x4_t; 4];

#[inline(always)]
fn zip(a: V, b: V, f: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// f16 in the lower halves of four words, by integer operations: the conversion's intrinsic has a type that is not
/// stable. The product is exact, subnormals included; infinities and NaNs get the exponent of one afterwards.
#[inline(always)]
fn f16_in_low_half(words: uint32x4_t) -> float32x4_t {
    // SAFETY: every aarch64 has Advanced SIMD.
    unsafe {
        let sign = vshlq_n_u32::<16>(vandq_u32(words, vdupq_n_u32(0x8000)));
        let magnitude = vshlq_n_u32::<13>(vandq_u32(words, vdupq_n_u32(0x7fff)));
        let two_to_112 = vdupq_n_f32(f32::from_bits((112 + 127) << 23));
        let value = vreinterpretq_u32_f32(vmulq_f32(vreinterpretq_f32_u32(magnitude), two_to_112));
        let is_no_number = vcgeq_u32(magnitude, vdupq_n_u32(0x7c00 << 13));
        let exponent = vandq_u32(is_no_number, vdupq_n_u32(0x7f80_0000));
        vreinterpretq_f32_u32(vorrq_u32(vorrq_u32(value, exponent), sign))
    }
}

/// `2^e` for integers in -127 < e < 128.
#[inline(always)]
fn power_of_two(e: float32x4_t) -> float32x4_t {
    // SAFETY: every aarch64 has Advanced SIMD.
    unsafe {
        let biased = vaddq_s32(vcvtq_s32_f32(e), vdupq_n_s32(127));
        vreinterpretq_f32_s32(vshlq_n_s32::<23>(biased))
    }
}

/// Swaps rows and columns of a square of four.
#[inline(always)]
fn transpose_four(v: [float32x4_t; 4]) -> [float32x4_t; 4] {
    // SAFETY: every aarch64 has Advanced SIMD.
    unsafe {
        let even = vreinterpretq_f64_f32(vtrn1q_f32(v[0], v[1]));
        let odd = vreinterpretq_f64_f32(vtrn2q_f32(v[0], v[1]));
        let even_below = vreinterpretq_f64_f32(vtrn1q_f32(v[2], v[3]));
        let odd_below = vreinterpretq_f64_f32(vtrn2q_f32(v[2], v[3]));
        [
            vreinterpretq_f32_f64(vtrn1q_f64(even, even_below)),
            vreinterpretq_f32_f64(vtrn1q_f64(odd, odd_below)),
            vreinterpretq_f32_f64(vtrn2q_f64(even, even_below)),
            vreinterpretq_f32_f64(vtrn2q_f64(odd, odd_below)),
        ]
    }
}

// SAFETY: every method is a few NEON intrinsics, and the caller vouches for the pointers as the trait demands. That
// one argument covers each block below.
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe impl Lanes for Neon {
    type V = V;

    #[inline(always)]
    unsafe fn zero() -> V {
        unsafe { [vdupq_n_f32(0.0); 4] }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> V {
        unsafe { [vdupq_n_f32(x); 4] }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> V {
        unsafe { std::array::from_fn(|i| vld1q_f32(from.add(4 * i))) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: V) {
        unsafe {
            for (i, part) in v.into_iter().enumerate() {
                vst1q_f32(to.add(4 * i), part);
            }
        }
    }
    #[inline(always)]
    fn prefetch(_at: *const f32) {
        // The intrinsic is not stable yet, and what runs ahead by itself does well on a forward sweep.
    }
    #[inline(always)]
    fn prefetch_later(_at: *const f32) {}
    #[inline(always)]
    unsafe fn low_bf16(words: V) -> V {
        words.map(|words| unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<16>(vreinterpretq_u32_f32(words))) })
    }
    #[inline(always)]
    unsafe fn high_bf16(words: V) -> V {
        words.map(|words| unsafe {
            vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(words), vdupq_n_u32(0xffff_0000)))
        })
    }
    #[inline(always)]
    unsafe fn low_f16(words: V) -> V {
        words.map(|words| unsafe { f16_in_low_half(vreinterpretq_u32_f32(words)) })
    }
    #[inline(always)]
    unsafe fn high_f16(words: V) -> V {
        words.map(|words| unsafe { f16_in_low_half(vshrq_n_u32::<16>(vreinterpretq_u32_f32(words))) })
    }
    #[inline(always)]
    unsafe fn integer<const BITS: usize>(words: V, at: usize) -> V {
        words.map(|words| unsafe {
            // A shift to the left by a negative count is one to the right.
            let left = vdupq_n_s32((32 - BITS * (at + 1)) as i32);
            let right = vdupq_n_s32(-((32 - BITS) as i32));
            vcvtq_f32_s32(vshlq_s32(vshlq_s32(vreinterpretq_s32_f32(words), left), right))
        })
    }
    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        unsafe { std::array::from_fn(|i| vfmaq_f32(c[i], a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        zip(a, b, |a, b| unsafe { vaddq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn sub(a: V, b: V) -> V {
        zip(a, b, |a, b| unsafe { vsubq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        zip(a, b, |a, b| unsafe { vmulq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        zip(a, b, |a, b| unsafe { vdivq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn max(a: V, b: V) -> V {
        zip(a, b, |a, b| unsafe { vmaxq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn min(a: V, b: V) -> V {
        zip(a, b, |a, b| unsafe { vminq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn min_keep(most: V, a: V) -> V {
        // NaN wherever one is.
        zip(most, a, |most, a| unsafe { vminq_f32(most, a) })
    }
    #[inline(always)]
    unsafe fn abs(a: V) -> V {
        a.map(|a| unsafe { vabsq_f32(a) })
    }
    #[inline(always)]
    unsafe fn copy_sign(a: V, sign: V) -> V {
        zip(a, sign, |a, sign| unsafe { vbslq_f32(vdupq_n_u32(1 << 31), sign, a) })
    }
    #[inline(always)]
    unsafe fn rint(a: V) -> V {
        a.map(|a| unsafe { vrndnq_f32(a) })
    }
    #[inline(always)]
    unsafe fn scale_or_flush(y: V, e: V) -> V {
        zip(y, e, |y, e| unsafe {
            let power = power_of_two(e);
            // The comparison is false for NaN, which therefore stays.
            let flush = vcleq_f32(e, vdupq_n_f32(FLUSH_EXPONENT));
            vbslq_f32(flush, vdupq_n_f32(0.0), vmulq_f32(y, power))
        })
    }
    #[inline(always)]
    unsafe fn scale(y: V, e: V) -> V {
        zip(y, e, |y, e| unsafe { vmulq_f32(y, power_of_two(e)) })
    }
    #[inline(always)]
    unsafe fn transpose(v: [V; LANES]) -> [V; LANES] {
        let mut transposed = v;
        for rows in 0..4 {
            for columns in 0..4 {
                let mut square = v[0];
                for i in 0..4 {
                    square[i] = v[4 * rows + i][columns];
                }
                let square = transpose_four(square);
                for i in 0..4 {
                    transposed[4 * columns + i][rows] = square[i];
                }
            }
        }
        transposed
    }
    #[inline(always)]
    unsafe fn select_between(at: V, lo: V, hi: V, yes: V, no: V) -> V {
        std::array::from_fn(|i| unsafe {
            let between = vandq_u32(vcleq_f32(lo[i], at[i]), vcltq_f32(at[i], hi[i]));
            vbslq_f32(between, yes[i], no[i])
        })
    }
    #[inline(always)]
    unsafe fn select_bits(bits: u16, yes: V, no: V) -> V {
        std::array::from_fn(|i| unsafe {
            let of_lane = [1_u32, 2, 4, 8];
            let set = vtstq_u32(vdupq_n_u32(u32::from(bits) >> (4 * i)), vld1q_u32(of_lane.as_ptr()));
            vbslq_f32(set, yes[i], no[i])
        })
    }
    #[inline(always)]
    unsafe fn at_least(a: V, least: V) -> u16 {
        let of_four = |i: usize| unsafe {
            let of_lane = [1_u32, 2, 4, 8];
            let set = vcgeq_f32(a[i], least[i]);
            vaddvq_u32(vandq_u32(set, vld1q_u32(of_lane.as_ptr()))) << (4 * i)
        };
        (0..4).fold(0, |bits, i| bits | of_four(i)) as u16
    }
    #[inline(always)]
    unsafe fn canonical_nan(a: V) -> V {
        a.map(|a| unsafe { vbslq_f32(vceqq_f32(a, a), a, vdupq_n_f32(CANONICAL_NAN)) })
    }
    #[inline(always)]
    unsafe fn halving_sum(t: V) -> f32 {
        unsafe {
            let four = vaddq_f32(vaddq_f32(t[0], t[2]), vaddq_f32(t[1], t[3]));
            let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
        }
    }
    #[inline(always)]
    unsafe fn largest(a: V) -> f32 {
        unsafe { vmaxvq_f32(vmaxq_f32(vmaxq_f32(a[0], a[1]), vmaxq_f32(a[2], a[3]))) }
    }
    #[inline(always)]
    unsafe fn smallest(a: V) -> f32 {
        unsafe { vminvq_f32(vminq_f32(vminq_f32(a[0], a[1]), vminq_f32(a[2], a[3]))) }
    }
}
