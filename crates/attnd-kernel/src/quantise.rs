//! Rows of integers with one scale: symmetric, nearest, exact to widen.
//!
//! A row `x` (a key, or a value, of one kv head) becomes whole numbers `n` and a scale `s`, and stands for the products
//! `n s`, with `|n| <= N`: 127 for int8, 7 for int4.
//!
//! * `s` is `max |x| / N` rounded up to 17 (int8) or 20 (int4) significant bits, and to a multiple of 2^-149, the step of
//!   the subnormal f32. So no `|x|` exceeds `N s`.
//! * `n` is the whole number nearest to `x / s`, ties to even. So `|x - n s| <= s / 2`.
//!
//! **Every `n s` is an f32.** `|n|` has 7 or 3 significant bits and `s` has 17 or 20, so the product has at most 24. It is
//! a multiple of 2^-149, because `s` is. And it is in range: where `N s` would leave it, which takes a `max |x|` among the
//! seven largest f32, `s` is the largest scale for which it doesn't. Then `max |x|` exceeds `N s` by up to 7 units of its
//! last place, far less than `s / 2`: all that was said holds but `|x| <= N s`. A number of at most 24 significant bits, in
//! range, that is a multiple of 2^-149, is an f32; a multiplication gives it without rounding.
//!
//! Quotients are those of f64, and rounding them is rounding the exact ones: an exact quotient that is no tie (no scale) is
//! further from one than f64 can lose, since numerator and denominator have few bits.

use crate::float_env::FloatEnvironment;
use crate::storage::Storage;

/// The step of the subnormal f32, 2^-149.
const STEP: f64 = f64::from_bits((1023 - 149) << 52);

/// 1.5 * 2^52: numbers near it are all the integers there are, and stay so with a few integers more or fewer.
const NO_FRACTION: f64 = f64::from_bits((1023 + 52) << 52 | 1 << 51);

/// The largest integer and the significant bits of a scale; `None` where elements are no integers.
const fn format(storage: Storage) -> Option<(f64, u32)> {
    match storage {
        Storage::F32 | Storage::F16 | Storage::Bf16 => None,
        Storage::Int8 => Some((127.0, 17)),
        Storage::Int4 => Some((7.0, 20)),
    }
}

/// Replaces the elements of a row, all finite, by integers, and returns their scale: 0 for a row of zeros.
///
/// # Panics
/// If `storage` has no scales.
pub(crate) fn quantise(row: &mut [f32], storage: Storage) -> f32 {
    let Some((most, bits)) = format(storage) else { panic!("{storage} has no scales") };
    let _standard = FloatEnvironment::standard();
    let max = row.iter().fold(0.0_f32, |max, x| if x.abs() > max { x.abs() } else { max });
    if max == 0.0 {
        row.fill(0.0);
        return 0.0;
    }
    let scale = scale(max, most, bits);
    let divisor = f64::from(scale);
    for x in row {
        // Adding rounds to nearest even: there is no room for a fraction. A call to round would take longer than the division.
        *x = (f64::from(*x) / divisor + NO_FRACTION - NO_FRACTION) as f32;
    }
    scale
}

/// `max / most` rounded up to `bits` significant bits, for a positive `max`.
fn scale(max: f32, most: f64, bits: u32) -> f32 {
    // An f64 is normal here, and writes one significant bit fewer than it has.
    let last = 1_u64 << (53 - bits);
    let up = |x: f64| f64::from_bits((x.to_bits() + (last - 1)) & !(last - 1));
    let scale = (up(f64::from(max) / most) / STEP).ceil() * STEP;
    let largest = f64::from_bits((f64::from(f32::MAX) / most).to_bits() & !(last - 1));
    if scale > largest { largest as f32 } else { scale as f32 }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    const INTEGERS: [Storage; 2] = [Storage::Int8, Storage::Int4];

    fn significant_bits(x: f32) -> u32 {
        let fraction = x.to_bits() & 0x007f_ffff;
        let significand = if x.is_normal() { fraction | 0x0080_0000 } else { fraction };
        32 - significand.leading_zeros() - significand.trailing_zeros()
    }

    /// Maxima of rows: around every power of two and every multiple of the largest integer that an f32 can be, and many
    /// between.
    fn maxima() -> Vec<f32> {
        let mut rng = SmallRng::seed_from_u64(1);
        let step = if cfg!(miri) { 997 } else { 1 };
        let mut bits: Vec<u32> = (0..200_000 / step).map(|_| rng.random_range(1..0x7f80_0000)).collect();
        let per_exponent: Vec<u32> = (0..255_u32)
            .flat_map(|exponent| [0, 1, 2, 0x0040_0000, 0x007e_0000, 0x0060_0000].map(|f| exponent << 23 | f))
            .collect();
        bits.extend(per_exponent.iter().flat_map(|b| b.saturating_sub(2)..b + 3));
        // Subnormals, and the largest numbers.
        bits.extend((1..3000).chain(0x7f80_0000 - 3000..0x7f80_0000));
        let positive = bits.into_iter().filter(|bits| (1..0x7f80_0000).contains(bits));
        positive.step_by(step).map(f32::from_bits).collect()
    }

    #[test]
    fn every_product_of_an_integer_and_a_scale_is_exact() {
        for storage in INTEGERS {
            let (most, bits) = format(storage).unwrap();
            for max in maxima() {
                let scale = scale(max, most, bits);
                assert!(scale > 0.0 && significant_bits(scale) <= bits, "{storage} {max:e}: {scale:e}");
                for n in 0..=most as i8 {
                    let n = f32::from(n);
                    let exact = f64::from(n) * f64::from(scale);
                    assert_eq!(f64::from(n * scale), exact, "{storage} {max:e}: {n} * {scale:e}");
                }
            }
        }
    }

    /// The definition, found by trying: the smallest f32 of so many bits that is large enough.
    #[test]
    fn a_scale_is_the_least_one_that_reaches_the_largest_element() {
        for storage in INTEGERS {
            let (most, bits) = format(storage).unwrap();
            for max in maxima() {
                let scale = scale(max, most, bits);
                let reaches = |scale: f32| f64::from(scale) * most >= f64::from(max);
                let mut below = scale.next_down();
                while significant_bits(below) > bits {
                    below = below.next_down();
                }
                assert!(!reaches(below), "{storage} {max:e}: {below:e} is enough, not {scale:e}");
                if !reaches(scale) {
                    let left = (f64::from(max) - most * f64::from(scale)) / f64::from(scale);
                    assert!(max.to_bits() > f32::MAX.to_bits() - 7 && left < 1e-4, "{storage} {max:e}");
                    let mut above = scale.next_up();
                    while significant_bits(above) > bits {
                        above = above.next_up();
                    }
                    assert!(most * f64::from(above) > f64::from(f32::MAX), "{storage} {max:e}");
                }
            }
        }
    }

    #[test]
    fn no_element_is_off_by_more_than_half_a_scale() {
        let mut rng = SmallRng::seed_from_u64(2);
        for storage in INTEGERS {
            let (most, bits) = format(storage).unwrap();
            for max in maxima().into_iter().step_by(37) {
                let mut row: Vec<f32> = (0..40).map(|_| max * rng.random_range(-1.0..=1.0_f32)).collect();
                row[7] = -max;
                // Ties, and their neighbours.
                let scale = scale(max, most, bits);
                for (i, n) in [0.5, 1.5, 2.5, -4.5].into_iter().enumerate() {
                    let tie = ((f64::from(scale) * n) as f32).clamp(-max / 2.0, max / 2.0);
                    (row[10 + 3 * i], row[11 + 3 * i], row[12 + 3 * i]) =
                        (tie, tie.next_down(), tie.next_up());
                }
                let mut integers = row.clone();
                assert_eq!(quantise(&mut integers, storage), scale);
                for (x, n) in row.iter().zip(&integers) {
                    assert!(n.abs() <= most as f32 && n.fract() == 0.0, "{storage} {max:e}: {x:e} is {n}");
                    let (x, n, scale) = (f64::from(*x), f64::from(*n), f64::from(scale));
                    // 48 bits of difference at most, so this subtraction and the halving are exact.
                    let off = (x - n * scale).abs();
                    assert!(off <= scale / 2.0, "{storage} {max:e}: {x:e} is {n} * {scale:e}");
                    assert!(
                        off < scale / 2.0 || n % 2.0 == 0.0,
                        "{storage} {max:e}: {x:e} is a tie, {n} odd"
                    );
                }
            }
        }
    }

    #[test]
    fn zeros_have_no_scale_and_lose_their_sign() {
        for storage in INTEGERS {
            let mut row = [0.0, -0.0, 0.0];
            assert_eq!(quantise(&mut row, storage).to_bits(), 0);
            assert!(row.iter().all(|n| n.to_bits() == 0));
        }
    }
}
