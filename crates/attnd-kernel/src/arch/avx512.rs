//! AVX-512: sixteen floats in one register.

use std::arch::x86_64::*;

use crate::canonical::{CANONICAL_NAN, FLUSH_EXPONENT};
use crate::lanes::Lanes;

/// AVX-512 F and DQ, with AVX2 and FMA below them.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

// SAFETY: every method is one or a few intrinsics of AVX-512 F/DQ, AVX or SSE, and the caller vouches for the CPU and
// the pointers as the trait demands. That one argument covers each block below.
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe impl Lanes for Avx512 {
    type V = __m512;

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: Self::V) {
        unsafe { _mm512_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn rint(a: Self::V) -> Self::V {
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    unsafe fn scale_or_flush(y: Self::V, e: Self::V) -> Self::V {
        unsafe {
            // Not-less-or-equal, unordered: true for NaN, which therefore stays.
            let keep = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(e, _mm512_set1_ps(FLUSH_EXPONENT));
            _mm512_maskz_scalef_ps(keep, y, e)
        }
    }
    #[inline(always)]
    unsafe fn select_between(at: Self::V, lo: Self::V, hi: Self::V, yes: Self::V, no: Self::V) -> Self::V {
        unsafe {
            let from = _mm512_cmp_ps_mask::<_CMP_LE_OQ>(lo, at);
            let between = _mm512_mask_cmp_ps_mask::<_CMP_LT_OQ>(from, at, hi);
            _mm512_mask_blend_ps(between, no, yes)
        }
    }
    #[inline(always)]
    unsafe fn canonical_nan(a: Self::V) -> Self::V {
        unsafe {
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a);
            _mm512_mask_blend_ps(nan, a, _mm512_set1_ps(CANONICAL_NAN))
        }
    }
    #[inline(always)]
    unsafe fn halving_sum(t: Self::V) -> f32 {
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(t), _mm512_extractf32x8_ps::<1>(t));
            super::avx2::halving_sum_of_eight(eight)
        }
    }
    #[inline(always)]
    unsafe fn largest(a: Self::V) -> f32 {
        unsafe {
            let eight = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            super::avx2::largest_of_eight(eight)
        }
    }
    #[inline(always)]
    unsafe fn smallest(a: Self::V) -> f32 {
        unsafe {
            let eight = _mm256_min_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            super::avx2::smallest_of_eight(eight)
        }
    }
}
