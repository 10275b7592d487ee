//! The canonical order "c1" of f32: the arithmetic that every kernel of it must reproduce bit for bit.
//!
//! All of it is IEEE 754 binary32, round to nearest even, subnormals on; `fma` rounds once; `rint` rounds ties to
//! even. For one row (a query token of one head):
//!
//! 1. `q'_x = q_x * fl(scale * log2 e)`, then `s_j = fma(q'_x, k_jx, s_j)` for `x` ascending from +0.
//! 2. Over the visible keys of one page of 256: `m = rint(max_j s_j) + 0.0`, an integer or -inf. `m'` is `m`, or 0
//!    where `m = -inf`.
//! 3. `p_j = P(s_j, m')`: with `n = rint(s)` and `e = n - m'`, 0 where `e <= -126`, else `poly(s - n) * 2^e`. Both
//!    the difference and the scaling are exact, and no `p` is subnormal. Invisible keys are skipped.
//! 4. `t_r` is the sum of the `p_j` with `j = r (mod 16)`, ascending from +0; then the halving tree `t_i += t_{i+8}`,
//!    `t_i += t_{i+4}`, `t_i += t_{i+2}`, `t_0 += t_1`; `l = t_0`.
//! 5. `o_c = fma(p_j, v_jc, o_c)`, `j` ascending over the visible keys, from +0.
//! 6. `merge(a, b)`, `a` on the left: `M = max(m_a, m_b)`, `A = P(m_a, M')`, `B = P(m_b, M')` (powers of two or 0),
//!    `l = fma(l_a, A, l_b * B)`, `o = fma(o_a, A, o_b * B)`.
//! 7. A slot folds its pages ascending; slots merge in the binary tree of [`crate::slot`].
//! 8. `context = o / l + 0.0` (divided by 1 where `m = -inf` and `l = 0`), any NaN becomes the one quiet NaN
//!    `0x7fc00000`; `lse = ln 2 * (m + log2 l)`, see [`lse`].
//! 9. A sink is a logit `x` that has a weight and no value: the part `(m, l, o) = (rint(s) + 0.0, P(s, m'), 0)` with
//!    `s = fl(x * log2 e)`. It merges by rule 6 once, on the right of all keys.
//! 10. Where weights are sigmoids, `m = 0` for every row that sees a key and `l` is their sum, so rule 6 adds. The context is
//!     `o + 0.0`, `lse = ln l`, and -inf where `l = 0`.
//! 11. Scores capped at `c`: rule 1 multiplies by `fl(scale / c)` instead, and `s = fl(c * log2 e) * tanh(s)`.
//! 12. `tanh(z)`: see [`functions`], whose scalar code is the definition. Divisions are IEEE's.
//! 13. Biases, one kind after the other in the order of `bias.rs`: `s = fma(b, log2 e, s)`, `b` in natural units as the file of its kind
//!     computes it. ALiBi: `b = fl(-m * abs(p - j))`, or `fl(m * (j - first))` by key, for the position `p` of the query and the first key
//!     that is no padding. Tables: their entries; across the regions of shifted windows `fl(entry + between)`.
//! 14. A key that a selection masks is invisible to all rules above, like one outside the interval: its score becomes -inf by a select,
//!     whatever it was.
//! 15. Weights that are sigmoids: `s = fma(bias, log2 e, s)`, then `t = P(-|s|, 0)` and `p = t / (1 + t)` where `s < 0`, else `1 / (1 + t)`.
//! 16. Rows that a score function transforms by a matrix: `y_o = b_o + sum`, the sum as in rule 1 without its factor, ascending over
//!     the row's elements. What else happens to a row is in the file of the function (`score.rs`).
//! 17. Scores that are no dot products are sums in the same order: `general/reduce.rs` and the files below it have their terms.
//!
//! Which keys are visible is said by intervals (`mask.rs`), which touch none of this: a row has the bits it would have if
//! the keys that it doesn't see were not there, except that pages begin where they begin.
//!
//! The integer maximum is what makes this cheap and accurate: every rescale is a power of two, so a merge rounds once
//! per element and needs no exponential. The residues of rule 4 are the lanes of one 512-bit vector, two of 256 bits
//! or four of 128 bits, which is why a lane count can't show in the result.
//!
//! Rule 6 with a row that saw no key, `(-inf, 0, 0)`, on either side gives the other side back, except that a zero
//! of `o` may lose its minus sign. Rule 8 drops that sign for every zero. So a row may be merged with its identity or
//! skipped, as suits the kernel.

pub(crate) mod functions;

/// Names the order of arithmetic; it changes when any bit of any result may change.
pub const KERNEL_ID: &str = "c1-f32";

/// `poly(r)` approximates `2^r` on `[-1/2, 1/2]` to 0.92 ulp; Horner from the last to the first, by fma.
pub(crate) const EXP2_POLY: [f32; 7] = [
    1.0,
    f32::from_bits(0x3f31_7218),
    f32::from_bits(0x3e75_fded),
    f32::from_bits(0x3d63_576a),
    f32::from_bits(0x3c1d_96de),
    f32::from_bits(0x3aaf_a2b5),
    f32::from_bits(0x3920_e99a),
];

/// Weights whose exponent is this or less are 0, so that none is subnormal.
pub(crate) const FLUSH_EXPONENT: f32 = -126.0;

/// The quiet NaN that stands for every NaN of a result.
pub(crate) const CANONICAL_NAN: f32 = f32::from_bits(0x7fc0_0000);

/// What queries are multiplied by: scale in units where the exponential is a power of two.
pub(crate) fn query_factor(scale: f32) -> f32 {
    scale * std::f32::consts::LOG2_E
}

/// `m'` of rule 2.
#[inline(always)]
pub(crate) fn finite_max(m: f32) -> f32 {
    if m == f32::NEG_INFINITY { 0.0 } else { m }
}

/// `P(m, M')` for an integer `m`: the power of two that moves a partial with maximum `m` to maximum `M`.
#[inline(always)]
pub(crate) fn rescale(m: f32, finite_max: f32) -> f32 {
    let e = m - finite_max;
    if e <= FLUSH_EXPONENT {
        0.0
    } else if e <= 0.0 {
        // e is an integer in (-126, 0]: the exponent field holds it.
        f32::from_bits(((e as i32 + 127) as u32) << 23)
    } else {
        // m = +inf or NaN: a score overflowed or was NaN, and the row stays NaN.
        f32::NAN
    }
}

/// The sums of a logit that has no value (rule 9); the identity for -inf.
pub(crate) fn sink(logit: f32) -> (f32, f32) {
    let s = query_factor(logit);
    let m = s.round_ties_even() + 0.0;
    (m, weight(s, finite_max(m)))
}

/// `P(s, m')` of rule 3, for an `m'` that no score is above by more than 1/2.
pub(crate) fn weight(s: f32, finite_max: f32) -> f32 {
    let n = s.round_ties_even();
    // s = -inf has no difference to its own integer.
    if n - finite_max <= FLUSH_EXPONENT {
        return 0.0;
    }
    let r = s - n;
    let poly = EXP2_POLY.iter().rev().copied().reduce(|sum, c| sum.mul_add(r, c));
    poly.unwrap_or(f32::NAN) * rescale(n, finite_max)
}

/// `lse = ln 2 * (m + log2 l)`, natural logarithm, computed in f64 by basic operations alone (no libm, whose log2
/// differs between platforms) and rounded once. -inf for a row that saw no key.
pub(crate) fn lse(m: f32, l: f32) -> f32 {
    if m == f32::NEG_INFINITY && l == 0.0 {
        return f32::NEG_INFINITY;
    }
    let value = (std::f64::consts::LN_2 * (f64::from(m) + log2(f64::from(l)))) as f32;
    if value.is_nan() { CANONICAL_NAN } else { value }
}

/// `log2 x` for a positive normal `x`: `x = 2^e * f` with `f` in `[sqrt(1/2), sqrt 2)`, then the series
/// `ln f = 2 (z + z^3/3 + z^5/5 + ...)` in `z = (f - 1) / (f + 1)`, `|z| < 0.1716`. Twelve terms leave less than
/// 2^-60. NaN for anything else.
pub(crate) fn log2(x: f64) -> f64 {
    const TERMS: u32 = 12;
    if !(x.is_finite() && x >= f64::MIN_POSITIVE) {
        return f64::NAN;
    }
    let bits = x.to_bits();
    let mut e = (bits >> 52) as i64 - 1023;
    let mut f = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    if f >= std::f64::consts::SQRT_2 {
        f *= 0.5;
        e += 1;
    }
    let z = (f - 1.0) / (f + 1.0);
    let z2 = z * z;
    let mut sum = 0.0;
    for k in (0..TERMS).rev() {
        sum = sum * z2 + 1.0 / f64::from(2 * k + 1);
    }
    e as f64 + 2.0 * std::f64::consts::LOG2_E * z * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coefficients_are_those_of_the_published_order() {
        let published: [f64; 7] = [
            1.0,
            0.693_147_182_464_599_6,
            0.240_226_462_483_406_07,
            0.055_503_286_421_298_98,
            0.009_618_489_071_726_799,
            0.001_339_993_090_368_807_3,
            0.000_153_458_124_259_468_6,
        ];
        for (c, p) in EXP2_POLY.iter().zip(published) {
            assert_eq!(f64::from(*c), f64::from(p as f32), "{p}");
        }
    }

    #[test]
    fn rescale_is_an_exact_power_of_two_or_zero() {
        for e in -125..=0_i16 {
            assert_eq!(rescale(7.0 + f32::from(e), 7.0), 2.0_f32.powi(e.into()));
        }
        for e in [-126.0, -127.0, -1e30, f32::NEG_INFINITY] {
            assert_eq!(rescale(e, 0.0).to_bits(), 0);
        }
        assert!(rescale(f32::INFINITY, f32::INFINITY).is_nan());
    }

    #[test]
    fn log2_agrees_with_libm() {
        let mut x = 1e-38;
        while x < 1e38 {
            let error = (log2(x) - x.log2()).abs();
            assert!(error <= 4e-16 * x.log2().abs().max(1.0), "log2({x}) is off by {error}");
            x *= if cfg!(miri) { 1.1 } else { 1.000_1 };
        }
        assert_eq!(log2(1.0), 0.0);
        assert_eq!(log2(0.25), -2.0);
        assert!(log2(f64::NAN).is_nan() && log2(0.0).is_nan());
    }

    #[test]
    fn empty_rows_have_lse_minus_infinity() {
        assert_eq!(lse(f32::NEG_INFINITY, 0.0), f32::NEG_INFINITY);
        assert_eq!(lse(3.0, 1.0), (3.0 * std::f64::consts::LN_2) as f32);
        assert_eq!(lse(f32::NEG_INFINITY, f32::NAN).to_bits(), 0x7fc0_0000);
    }
}
