//! Functions of scores, by their scalar definitions: every kernel gives their bits.
//!
//! No libm has a part in them, because its results differ between platforms.

use super::{EXP2_POLY, FLUSH_EXPONENT};

/// `fl(2 log2 e)`.
pub(crate) const TWO_LOG2_E: f32 = 2.0 * std::f32::consts::LOG2_E;

/// Where tanh is 1 to the last place: `2^40 / (2^40 + 2)` rounds to it.
pub(crate) const SATURATED: f32 = 40.0;

/// Up to here an exponential `e^2x` of a row and one of a key have a product inside the range of f32.
pub(crate) const FACTORED: f32 = 43.0;

/// Where the larger of two terms `1 + e^2x` that share a division is cut: a tanh is 1 there to the last place.
pub(crate) const SATURATED_SUM: f32 = (1_u64 << 30) as f32;

/// Where the binary exponent of a flagged row's exponential is cut: beside any key that is not flagged, its tanh is 1 there.
pub(crate) const FAR: f32 = 240.0;

/// Rule 12: `tanh z = (e^2|z| - 1) / (e^2|z| + 1)` with the sign of `z`, from `e^2|z| - 1 = 2^n q + (2^n - 1)`, so that nothing cancels
/// where `z` is small. Relative error at most 4.2 units roundoff; NaN stays NaN.
#[cfg(test)]
pub(crate) fn tanh(z: f32) -> f32 {
    let y = z.abs() * TWO_LOG2_E;
    let y = if y > SATURATED { SATURATED } else { y };
    let n = y.round_ties_even();
    let r = y - n;
    // The polynomial of rule 3 without its constant.
    let mut q = EXP2_POLY[6];
    for i in (1..6).rev() {
        q = q.mul_add(r, EXP2_POLY[i]);
    }
    let power = f32::from_bits(((n as i32 + 127) as u32) << 23);
    let less_one = power.mul_add(q * r, power - 1.0);
    (less_one / (less_one + 2.0)).copysign(z)
}

/// Rule 15: `1 / (1 + 2^-s)`, from the power of two that doesn't overflow, and 0 below `2^-126`.
pub(crate) fn sigmoid(s: f32) -> f32 {
    let x = 0.0 - s.abs();
    let n = x.round_ties_even();
    let mut y = EXP2_POLY[6];
    for i in (0..6).rev() {
        y = y.mul_add(x - n, EXP2_POLY[i]);
    }
    let t = if n <= FLUSH_EXPONENT { 0.0 } else { y * f32::from_bits(((n as i32 + 127) as u32) << 23) };
    if s < 0.0 { t / (1.0 + t) } else { 1.0 / (1.0 + t) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every 4099th float, both signs: 4099 is prime, so all exponents and most low bits are met. Few of them under Miri.
    fn floats() -> impl Iterator<Item = f32> {
        let step = if cfg!(miri) { 8_000_009 } else { 4099 };
        (0..=u32::MAX).step_by(step).map(f32::from_bits).filter(|x| !x.is_nan())
    }

    #[test]
    fn tanh_is_within_five_units_everywhere() {
        for z in floats() {
            let (got, want) = (f64::from(tanh(z)), f64::from(z).tanh());
            let bound = 4.2 / f64::from(1 << 24) * want.abs() + 2.0_f64.powi(-148);
            assert!((got - want).abs() <= bound, "tanh({z:e}) = {got:e}, not {want:e}");
            assert_eq!(got.is_sign_negative(), z.is_sign_negative());
        }
        assert_eq!((tanh(f32::INFINITY), tanh(f32::NEG_INFINITY)), (1.0, -1.0));
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn sigmoid_is_within_four_units_or_flushed() {
        for s in floats() {
            let (got, want) = (f64::from(sigmoid(s)), 1.0 / (1.0 + (-f64::from(s)).exp2()));
            let bound = 4.0 / f64::from(1 << 24) * want + if s < -125.0 { 2.0_f64.powi(-125) } else { 0.0 };
            assert!((got - want).abs() <= bound, "sigmoid({s:e}) = {got:e}, not {want:e}");
        }
        assert_eq!((sigmoid(f32::INFINITY), sigmoid(f32::NEG_INFINITY), sigmoid(0.0)), (1.0, 0.0, 0.5));
        assert!(sigmoid(f32::NAN).is_nan());
    }
}
