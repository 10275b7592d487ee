//! AVX2 with FMA: sixteen floats in two registers.

use std::arch::x86_64::*;

use crate::canonical::{CANONICAL_NAN, FLUSH_EXPONENT};
use crate::lanes::{LANES, Lanes};

/// AVX2 and FMA.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

/// The last three steps of the halving tree.
///
/// # Safety
/// The CPU must have AVX.
#[inline(always)]
pub(super) unsafe fn halving_sum_of_eight(t: __m256) -> f32 {
    // SAFETY: the caller vouches for AVX.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps::<1>(t));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}

/// # Safety
/// The CPU must have AVX.
#[inline(always)]
pub(super) unsafe fn largest_of_eight(t: __m256) -> f32 {
    // SAFETY: the caller vouches for AVX.
    unsafe {
        let four = _mm_max_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps::<1>(t));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
    }
}

/// # Safety
/// The CPU must have AVX.
#[inline(always)]
pub(super) unsafe fn smallest_of_eight(t: __m256) -> f32 {
    // SAFETY: the caller vouches for AVX.
    unsafe {
        let four = _mm_min_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps::<1>(t));
        let two = _mm_min_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)))
    }
}

/// # Safety
/// The CPU must have AVX2.
#[inline(always)]
unsafe fn low_bf16_of_eight(words: __m256) -> __m256 {
    // SAFETY: the caller vouches for AVX2.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(words))) }
}

/// The halves that begin at byte `FIRST` of eight words, as f16.
///
/// # Safety
/// The CPU must have AVX2 and F16C.
#[inline(always)]
unsafe fn f16_of_eight<const FIRST: i8>(words: __m256) -> __m256 {
    // SAFETY: the caller vouches for AVX2 and F16C.
    unsafe {
        let [a, b, c, d] = [FIRST, FIRST + 4, FIRST + 8, FIRST + 12];
        let quarter = _mm_setr_epi8(a, a + 1, b, b + 1, c, c + 1, d, d + 1, -1, -1, -1, -1, -1, -1, -1, -1);
        let gathered = _mm256_shuffle_epi8(_mm256_castps_si256(words), _mm256_set_m128i(quarter, quarter));
        _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b00_00_10_00>(gathered)))
    }
}

/// Element `at` of eight words of integers of `BITS` bits.
///
/// # Safety
/// The CPU must have AVX2.
#[inline(always)]
unsafe fn integer_of_eight<const BITS: usize>(words: __m256, at: usize) -> __m256 {
    // SAFETY: the caller vouches for AVX2.
    unsafe {
        // Counts are constants where the loop over a word's elements is unrolled.
        let left = _mm256_set1_epi32((32 - BITS * (at + 1)) as i32);
        let upper = _mm256_sllv_epi32(_mm256_castps_si256(words), left);
        _mm256_cvtepi32_ps(_mm256_srav_epi32(upper, _mm256_set1_epi32((32 - BITS) as i32)))
    }
}

/// # Safety
/// The CPU must have AVX2.
#[inline(always)]
unsafe fn scale_eight(y: __m256, e: __m256) -> __m256 {
    // SAFETY: the caller vouches for AVX2.
    unsafe {
        let biased = _mm256_add_epi32(_mm256_cvtps_epi32(e), _mm256_set1_epi32(127));
        _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased)))
    }
}

/// # Safety
/// The CPU must have AVX2.
#[inline(always)]
unsafe fn scale_or_flush_eight(y: __m256, e: __m256) -> __m256 {
    // SAFETY: the caller vouches for AVX2.
    unsafe {
        // Not-less-or-equal, unordered. The flush is a bitwise and, because the product of a masked score of -inf is
        // NaN by now.
        let keep = _mm256_cmp_ps::<_CMP_NLE_UQ>(e, _mm256_set1_ps(FLUSH_EXPONENT));
        _mm256_and_ps(scale_eight(y, e), keep)
    }
}

/// # Safety
/// The CPU must have AVX.
#[inline(always)]
unsafe fn select_between_eight(at: __m256, lo: __m256, hi: __m256, yes: __m256, no: __m256) -> __m256 {
    // SAFETY: the caller vouches for AVX.
    unsafe {
        let from = _mm256_cmp_ps::<_CMP_LE_OQ>(lo, at);
        let to = _mm256_cmp_ps::<_CMP_LT_OQ>(at, hi);
        _mm256_blendv_ps(no, yes, _mm256_and_ps(from, to))
    }
}

/// # Safety
/// The CPU must have AVX2.
#[inline(always)]
unsafe fn select_bits_of_eight(bits: i32, yes: __m256, no: __m256) -> __m256 {
    // SAFETY: the caller vouches for AVX2.
    unsafe {
        let of_lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        let set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), of_lane), of_lane);
        _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(set))
    }
}

/// # Safety
/// The CPU must have AVX.
#[inline(always)]
unsafe fn canonical_nan_of_eight(a: __m256) -> __m256 {
    // SAFETY: the caller vouches for AVX.
    unsafe {
        let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(a, a);
        _mm256_blendv_ps(a, _mm256_set1_ps(CANONICAL_NAN), nan)
    }
}

/// Swaps rows and columns of a square of eight.
///
/// # Safety
/// The CPU must have AVX.
#[inline(always)]
unsafe fn transpose_eight(v: [__m256; 8]) -> [__m256; 8] {
    // SAFETY: the caller vouches for AVX.
    unsafe {
        let mut pairs = v;
        for i in 0..4 {
            pairs[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
            pairs[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
        }
        // fours[4 g + k]: in each half of the register, element k of that half from rows 4 g to 4 g + 3.
        let mut fours = v;
        for g in 0..2 {
            for half in 0..2 {
                let (a, b) = (pairs[4 * g + half], pairs[4 * g + 2 + half]);
                fours[4 * g + 2 * half] = _mm256_shuffle_ps::<0b01_00_01_00>(a, b);
                fours[4 * g + 2 * half + 1] = _mm256_shuffle_ps::<0b11_10_11_10>(a, b);
            }
        }
        let mut transposed = v;
        for k in 0..4 {
            transposed[k] = _mm256_permute2f128_ps::<0x20>(fours[k], fours[4 + k]);
            transposed[4 + k] = _mm256_permute2f128_ps::<0x31>(fours[k], fours[4 + k]);
        }
        transposed
    }
}

// SAFETY: every method is a few intrinsics of AVX2, FMA or below, and the caller vouches for the CPU and the pointers
// as the trait demands. That one argument covers each block below.
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe impl Lanes for Avx2 {
    type V = [__m256; 2];

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        unsafe { [_mm256_setzero_ps(); 2] }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: Self::V) {
        unsafe {
            _mm256_storeu_ps(to, v[0]);
            _mm256_storeu_ps(to.add(8), v[1]);
        }
    }
    #[inline(always)]
    fn prefetch(at: *const f32) {
        // SAFETY: SSE is part of x86-64, and a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    fn prefetch_later(at: *const f32) {
        // SAFETY: SSE is part of x86-64, and a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn low_bf16(words: Self::V) -> Self::V {
        unsafe { [low_bf16_of_eight(words[0]), low_bf16_of_eight(words[1])] }
    }
    #[inline(always)]
    unsafe fn high_bf16(words: Self::V) -> Self::V {
        unsafe {
            let upper = _mm256_castsi256_ps(_mm256_set1_epi32(0xffff_0000_u32.cast_signed()));
            [_mm256_and_ps(words[0], upper), _mm256_and_ps(words[1], upper)]
        }
    }
    #[inline(always)]
    unsafe fn low_f16(words: Self::V) -> Self::V {
        unsafe { [f16_of_eight::<0>(words[0]), f16_of_eight::<0>(words[1])] }
    }
    #[inline(always)]
    unsafe fn high_f16(words: Self::V) -> Self::V {
        unsafe { [f16_of_eight::<2>(words[0]), f16_of_eight::<2>(words[1])] }
    }
    #[inline(always)]
    unsafe fn integer<const BITS: usize>(words: Self::V, at: usize) -> Self::V {
        unsafe { [integer_of_eight::<BITS>(words[0], at), integer_of_eight::<BITS>(words[1], at)] }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn min_keep(most: Self::V, a: Self::V) -> Self::V {
        // The instruction gives its second operand where one is NaN.
        unsafe { [_mm256_min_ps(most[0], a[0]), _mm256_min_ps(most[1], a[1])] }
    }
    #[inline(always)]
    unsafe fn abs(a: Self::V) -> Self::V {
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            [_mm256_andnot_ps(sign, a[0]), _mm256_andnot_ps(sign, a[1])]
        }
    }
    #[inline(always)]
    unsafe fn copy_sign(a: Self::V, sign: Self::V) -> Self::V {
        unsafe {
            let bit = _mm256_set1_ps(-0.0);
            let signs = [_mm256_and_ps(sign[0], bit), _mm256_and_ps(sign[1], bit)];
            [_mm256_or_ps(a[0], signs[0]), _mm256_or_ps(a[1], signs[1])]
        }
    }
    #[inline(always)]
    unsafe fn rint(a: Self::V) -> Self::V {
        unsafe {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            [_mm256_round_ps::<NEAREST>(a[0]), _mm256_round_ps::<NEAREST>(a[1])]
        }
    }
    #[inline(always)]
    unsafe fn scale_or_flush(y: Self::V, e: Self::V) -> Self::V {
        unsafe { [scale_or_flush_eight(y[0], e[0]), scale_or_flush_eight(y[1], e[1])] }
    }
    #[inline(always)]
    unsafe fn scale(y: Self::V, e: Self::V) -> Self::V {
        unsafe { [scale_eight(y[0], e[0]), scale_eight(y[1], e[1])] }
    }
    #[inline(always)]
    unsafe fn transpose(v: [Self::V; LANES]) -> [Self::V; LANES] {
        unsafe {
            let mut transposed = v;
            for rows in 0..2 {
                for columns in 0..2 {
                    let mut square = [_mm256_setzero_ps(); 8];
                    for i in 0..8 {
                        square[i] = v[8 * rows + i][columns];
                    }
                    let square = transpose_eight(square);
                    for i in 0..8 {
                        transposed[8 * columns + i][rows] = square[i];
                    }
                }
            }
            transposed
        }
    }
    #[inline(always)]
    unsafe fn select_between(at: Self::V, lo: Self::V, hi: Self::V, yes: Self::V, no: Self::V) -> Self::V {
        unsafe {
            [
                select_between_eight(at[0], lo[0], hi[0], yes[0], no[0]),
                select_between_eight(at[1], lo[1], hi[1], yes[1], no[1]),
            ]
        }
    }
    #[inline(always)]
    unsafe fn select_bits(bits: u16, yes: Self::V, no: Self::V) -> Self::V {
        unsafe {
            [
                select_bits_of_eight(bits.into(), yes[0], no[0]),
                select_bits_of_eight((bits >> 8).into(), yes[1], no[1]),
            ]
        }
    }
    #[inline(always)]
    unsafe fn at_least(a: Self::V, least: Self::V) -> u16 {
        unsafe {
            let bits = |i: usize| _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(a[i], least[i]));
            (bits(0) | bits(1) << 8) as u16
        }
    }
    #[inline(always)]
    unsafe fn canonical_nan(a: Self::V) -> Self::V {
        unsafe { [canonical_nan_of_eight(a[0]), canonical_nan_of_eight(a[1])] }
    }
    #[inline(always)]
    unsafe fn halving_sum(t: Self::V) -> f32 {
        unsafe { halving_sum_of_eight(_mm256_add_ps(t[0], t[1])) }
    }
    #[inline(always)]
    unsafe fn largest(a: Self::V) -> f32 {
        unsafe { largest_of_eight(_mm256_max_ps(a[0], a[1])) }
    }
    #[inline(always)]
    unsafe fn smallest(a: Self::V) -> f32 {
        unsafe { smallest_of_eight(_mm256_min_ps(a[0], a[1])) }
    }
}
