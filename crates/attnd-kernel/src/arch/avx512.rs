//! AVX-512: sixteen floats in one register.

use std::arch::x86_64::*;

use crate::canonical::{CANONICAL_NAN, FLUSH_EXPONENT};
use crate::lanes::{DotLanes, LANES, Lanes};

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
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(words))) }
    }
    #[inline(always)]
    unsafe fn high_bf16(words: Self::V) -> Self::V {
        unsafe {
            let upper = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(words), upper))
        }
    }
    #[inline(always)]
    unsafe fn low_f16(words: Self::V) -> Self::V {
        unsafe { _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_castps_si512(words))) }
    }
    #[inline(always)]
    unsafe fn high_f16(words: Self::V) -> Self::V {
        unsafe {
            let upper = _mm512_srli_epi32::<16>(_mm512_castps_si512(words));
            _mm512_cvtph_ps(_mm512_cvtepi32_epi16(upper))
        }
    }
    #[inline(always)]
    unsafe fn integer<const BITS: usize>(words: Self::V, at: usize) -> Self::V {
        unsafe {
            // Counts are constants where the loop over a word's elements is unrolled.
            let left = _mm512_set1_epi32((32 - BITS * (at + 1)) as i32);
            let upper = _mm512_sllv_epi32(_mm512_castps_si512(words), left);
            _mm512_cvtepi32_ps(_mm512_srav_epi32(upper, _mm512_set1_epi32((32 - BITS) as i32)))
        }
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
    unsafe fn min_keep(most: Self::V, a: Self::V) -> Self::V {
        // The instruction gives its second operand where one is NaN.
        unsafe { _mm512_min_ps(most, a) }
    }
    #[inline(always)]
    unsafe fn abs(a: Self::V) -> Self::V {
        unsafe { _mm512_andnot_ps(_mm512_set1_ps(-0.0), a) }
    }
    #[inline(always)]
    unsafe fn copy_sign(a: Self::V, sign: Self::V) -> Self::V {
        unsafe { _mm512_or_ps(a, _mm512_and_ps(sign, _mm512_set1_ps(-0.0))) }
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
    unsafe fn scale(y: Self::V, e: Self::V) -> Self::V {
        unsafe { _mm512_scalef_ps(y, e) }
    }
    #[inline(always)]
    unsafe fn transpose(v: [Self::V; LANES]) -> [Self::V; LANES] {
        unsafe {
            let mut pairs = v;
            for i in 0..8 {
                pairs[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
                pairs[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
            }
            // fours[4 g + k]: in each quarter of the register, element k of that quarter from rows 4 g to 4 g + 3.
            let mut fours = v;
            for g in 0..4 {
                for half in 0..2 {
                    let a = _mm512_castps_pd(pairs[4 * g + half]);
                    let b = _mm512_castps_pd(pairs[4 * g + 2 + half]);
                    fours[4 * g + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                    fours[4 * g + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
                }
            }
            let mut transposed = v;
            for k in 0..4 {
                let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(fours[k], fours[4 + k]);
                let odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(fours[k], fours[4 + k]);
                let even_high = _mm512_shuffle_f32x4::<0b10_00_10_00>(fours[8 + k], fours[12 + k]);
                let odd_high = _mm512_shuffle_f32x4::<0b11_01_11_01>(fours[8 + k], fours[12 + k]);
                transposed[k] = _mm512_shuffle_f32x4::<0b10_00_10_00>(even, even_high);
                transposed[8 + k] = _mm512_shuffle_f32x4::<0b11_01_11_01>(even, even_high);
                transposed[4 + k] = _mm512_shuffle_f32x4::<0b10_00_10_00>(odd, odd_high);
                transposed[12 + k] = _mm512_shuffle_f32x4::<0b11_01_11_01>(odd, odd_high);
            }
            transposed
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
    unsafe fn select_bits(bits: u16, yes: Self::V, no: Self::V) -> Self::V {
        unsafe { _mm512_mask_blend_ps(bits, no, yes) }
    }
    #[inline(always)]
    unsafe fn at_least(a: Self::V, least: Self::V) -> u16 {
        unsafe { _mm512_cmp_ps_mask::<_CMP_GE_OQ>(a, least) }
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

/// `acc` plus the products of both halves of `a` and `b`. By the instruction's name: of the intrinsic LLVM makes a multiplication
/// and an addition, for their latency, which hides behind that of other accumulators, and at twice the issue slots.
///
/// # Safety
/// The CPU has AVX-512 VNNI.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn vpdpwssd(acc: __m512, a: __m512, b: __m512) -> __m512 {
    let mut sum = acc;
    // SAFETY: the instruction reads and writes these registers and nothing else.
    unsafe {
        std::arch::asm!(
            "vpdpwssd {sum}, {a}, {b}",
            sum = inout(zmm_reg) sum,
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Where halves of two vectors go so that they alternate: half `i` of the first to `2 i`, of the second to `2 i + 1`.
const ALTERNATING: [i16; 32] = {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 16 {
        order[2 * i] = i as i16;
        order[2 * i + 1] = 16 + i as i16;
        i += 1;
    }
    order
};

// SAFETY: as above, with AVX-512 BW for halves of words, and BF16 and VNNI for the dot products.
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe impl DotLanes for Avx512 {
    #[inline(always)]
    unsafe fn dot_bf16(a: Self::V, b: Self::V, acc: Self::V) -> Self::V {
        // SAFETY: any bits are bf16.
        unsafe {
            let a = std::mem::transmute::<__m512, __m512bh>(a);
            let b = std::mem::transmute::<__m512, __m512bh>(b);
            _mm512_dpbf16_ps(acc, a, b)
        }
    }
    #[inline(always)]
    unsafe fn bf16_pairs(even: Self::V, odd: Self::V) -> Self::V {
        unsafe {
            let order = _mm512_loadu_epi16(ALTERNATING.as_ptr());
            let halves = _mm512_castps_si512(Self::bf16_words(even, odd));
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves))
        }
    }
    #[inline(always)]
    unsafe fn bf16_words(low: Self::V, high: Self::V) -> Self::V {
        // SAFETY: any bits are f32.
        unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
    }
    #[inline(always)]
    unsafe fn half_of_words(words: Self::V, at: usize) -> Self::V {
        unsafe {
            let half = _mm512_set1_epi32(if at == 0 { 0xffff } else { 0xffff_0000_u32.cast_signed() });
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(words), half))
        }
    }
    #[inline(always)]
    unsafe fn dot_int16(a: Self::V, b: Self::V, acc: Self::V) -> Self::V {
        unsafe { vpdpwssd(acc, a, b) }
    }
    #[inline(always)]
    unsafe fn bytes_of_halves(words: Self::V, at: usize) -> Self::V {
        unsafe {
            let words = _mm512_castps_si512(words);
            let upper = if at == 0 { _mm512_slli_epi16::<8>(words) } else { words };
            _mm512_castsi512_ps(_mm512_srai_epi16::<8>(upper))
        }
    }
    #[inline(always)]
    unsafe fn from_int32(integers: Self::V) -> Self::V {
        unsafe { _mm512_cvtepi32_ps(_mm512_castps_si512(integers)) }
    }
    #[inline(always)]
    unsafe fn int16_pairs(a: Self::V) -> Self::V {
        unsafe {
            // Of each four, the words of lanes 0 and 1 with those of lanes 2 and 3 in their upper halves; then pairs of words.
            let integers = _mm512_cvtps_epi32(a);
            let upper = _mm512_slli_epi32::<16>(_mm512_shuffle_epi32::<0b11_10_11_10>(integers));
            let words = _mm512_mask_blend_epi16(0xaaaa_aaaa, integers, upper);
            let order = _mm512_setr_epi64(0, 2, 4, 6, 0, 2, 4, 6);
            _mm512_castsi512_ps(_mm512_permutexvar_epi64(order, words))
        }
    }
    #[inline(always)]
    unsafe fn store_half(to: *mut f32, words: Self::V) {
        unsafe { _mm256_storeu_ps(to, _mm512_castps512_ps256(words)) }
    }
}
