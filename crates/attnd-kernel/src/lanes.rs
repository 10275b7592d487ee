//! The dozen vector operations that the kernels need, over 16 floats at a time.
//!
//! A value of [`Lanes::V`] is always 16 f32, whatever the width of the machine's registers: one register of 512 bits,
//! two of 256, four of 128, or an array. Sixteen is the number of residue sums of the canonical order, so the
//! algorithms above this trait have one shape on every ISA and the register width can't reach the bits.

/// Floats in a [`Lanes::V`].
pub(crate) const LANES: usize = 16;

/// Sixteen-lane arithmetic of one ISA.
///
/// # Safety
/// Every method may only be called on a CPU that has the ISA's features, and only inlined into a function that
/// enables them (hence `inline(always)` on every implementation: a trait method can't carry `target_feature`).
/// Pointers passed to [`Lanes::load`] and [`Lanes::store`] must be valid for 16 f32; they need no alignment.
pub(crate) unsafe trait Lanes: Copy {
    /// Sixteen f32.
    type V: Copy;

    /// All lanes +0.
    unsafe fn zero() -> Self::V;
    /// All lanes `x`.
    unsafe fn splat(x: f32) -> Self::V;
    /// Sixteen consecutive f32.
    unsafe fn load(from: *const f32) -> Self::V;
    /// Sixteen consecutive f32.
    unsafe fn store(to: *mut f32, v: Self::V);
    /// Asks for the cache line at an address, which need not be readable.
    fn prefetch(at: *const f32);
    /// Asks for a cache line that is used later, in the second-level cache. It need not be readable.
    fn prefetch_later(at: *const f32);
    /// The lower halves of 16 words as bf16.
    unsafe fn low_bf16(words: Self::V) -> Self::V;
    /// The upper halves of 16 words as bf16.
    unsafe fn high_bf16(words: Self::V) -> Self::V;
    /// The lower halves of 16 words as f16.
    unsafe fn low_f16(words: Self::V) -> Self::V;
    /// The upper halves of 16 words as f16.
    unsafe fn high_f16(words: Self::V) -> Self::V;
    /// Element `at` of 16 words that hold integers of `BITS` bits in two's complement, as f32.
    unsafe fn integer<const BITS: usize>(words: Self::V, at: usize) -> Self::V;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a + b`.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// The larger of each pair. Where one is NaN, either may come back.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The smaller of each pair. Where one is NaN, either may come back.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// The smaller of `most`, which is a number, and `a`; NaN where `a` is.
    unsafe fn min_keep(most: Self::V, a: Self::V) -> Self::V;
    /// Without their signs.
    unsafe fn abs(a: Self::V) -> Self::V;
    /// `a`, which has no sign, with that of `sign`.
    unsafe fn copy_sign(a: Self::V, sign: Self::V) -> Self::V;
    /// Nearest integer, ties to even.
    unsafe fn rint(a: Self::V) -> Self::V;
    /// `y * 2^e` for an integer `e <= 0` and normal `y * 2^e`, and 0 where `e <= -126`. NaN where `y` is NaN and `e`
    /// is not <= -126.
    unsafe fn scale_or_flush(y: Self::V, e: Self::V) -> Self::V;
    /// `y * 2^e` as [`Lanes::scale_or_flush`], for callers that know every `e` to be in -126 < e < 128, or `y` to be NaN with it.
    unsafe fn scale(y: Self::V, e: Self::V) -> Self::V;
    /// `yes` where `lo <= at < hi`, else `no`, which it also is where a position is NaN.
    unsafe fn select_between(at: Self::V, lo: Self::V, hi: Self::V, yes: Self::V, no: Self::V) -> Self::V;
    /// `yes` where bit `i` of `bits` is set, of lane `i`, else `no`.
    unsafe fn select_bits(bits: u16, yes: Self::V, no: Self::V) -> Self::V;
    /// Bit `i` is set where lane `i` of `a` is `least` or more; not where it is NaN.
    unsafe fn at_least(a: Self::V, least: Self::V) -> u16;
    /// Every NaN replaced by [`crate::canonical::CANONICAL_NAN`].
    unsafe fn canonical_nan(a: Self::V) -> Self::V;
    /// Swaps lanes and vectors: lane `i` of vector `j` becomes lane `j` of vector `i`.
    #[inline(always)]
    unsafe fn transpose(vectors: [Self::V; LANES]) -> [Self::V; LANES] {
        let (mut from, mut to) = ([[0.0_f32; LANES]; LANES], [[0.0_f32; LANES]; LANES]);
        // SAFETY: each array is 16 f32.
        unsafe {
            for i in 0..LANES {
                Self::store(from[i].as_mut_ptr(), vectors[i]);
            }
            for i in 0..LANES {
                for j in 0..LANES {
                    to[i][j] = from[j][i];
                }
            }
            let mut transposed = [Self::zero(); LANES];
            for i in 0..LANES {
                transposed[i] = Self::load(to[i].as_ptr());
            }
            transposed
        }
    }
    /// The halving tree of rule 4: `t_i += t_{i+8}`, `+= t_{i+4}`, `+= t_{i+2}`, `t_0 += t_1`.
    unsafe fn halving_sum(t: Self::V) -> f32;
    /// The largest lane, in any order.
    unsafe fn largest(a: Self::V) -> f32;
    /// The smallest lane, in any order.
    unsafe fn smallest(a: Self::V) -> f32;
}

/// Lanes of an ISA with dot products of narrow elements. Words are 32 bits, as in `storage.rs`.
///
/// # Safety
/// As [`Lanes`]; the methods need what such an entry enables beyond the ISA's features. `max(a, b)` of these lanes is `b` where `a`
/// is NaN.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) unsafe trait DotLanes: Lanes {
    /// For each lane, `fma` of the upper halves of `a` and `b`, then of the lower ones, as bf16; subnormals are zeros.
    unsafe fn dot_bf16(a: Self::V, b: Self::V, acc: Self::V) -> Self::V;
    /// Words of two bf16: `even` in the lower halves, `odd` in the upper ones, rounded to nearest even.
    unsafe fn bf16_pairs(even: Self::V, odd: Self::V) -> Self::V;
    /// Words of two bf16: lanes `2 i` and `2 i + 1` of the 32 lanes of `low` and then `high`.
    unsafe fn bf16_words(low: Self::V, high: Self::V) -> Self::V;
    /// The lower (`at` is 0) or upper halves of words; the others are zero.
    unsafe fn half_of_words(words: Self::V, at: usize) -> Self::V;
    /// For each lane, `acc` plus the products of both halves of `a` and `b`, all of them integers.
    unsafe fn dot_int16(a: Self::V, b: Self::V, acc: Self::V) -> Self::V;
    /// The lower (`at` is 0) or upper bytes of both halves of words, sign-extended to these halves.
    unsafe fn bytes_of_halves(words: Self::V, at: usize) -> Self::V;
    /// Integers of 32 bits as f32, to nearest even.
    unsafe fn from_int32(integers: Self::V) -> Self::V;
    /// Sixteen f32 to nearest integers of 16 bits, ties to even, in the lower eight words: for each four lanes, words of lanes 0
    /// and 2, and of lanes 1 and 3. NaN gives 0, and what is out of range any integer.
    unsafe fn int16_pairs(a: Self::V) -> Self::V;
    /// The lower eight words; `to` is valid for 8 f32.
    unsafe fn store_half(to: *mut f32, words: Self::V);
}
