//! The mean of the values of a kv group, of rows that look at all keys alike because they see none.

use crate::canonical::CANONICAL_NAN;
use crate::float_env::FloatEnvironment;
use crate::shape::AttnShape;

/// Sums of the columns of one kv group's V, `[keys, value_dim]`; where values are the first elements of keys as they were sent
/// ([`AttnShape::value_is_key_prefix`]), of its K, `[keys, head_dim]`.
///
/// `mean_c = f32(sum_j v_jc / n)`, with a sum in f64 from +0 over all `n` keys, `j` ascending, one division in f64, and one
/// rounding to f32: wherever V is cut while it is added, the bits are the same. At most `2^20` keys of f32 lose nothing that f32
/// shows but where columns cancel: the sum is off by at most `2^-33` of that of the magnitudes.
#[derive(Clone, Debug)]
pub struct ValueSum {
    columns: Vec<f64>,
    /// Elements of the row that has begun.
    column: usize,
    /// Rows that are whole.
    keys: usize,
    /// Rows that there should be.
    n_keys: usize,
    /// The columns that are values.
    value_dim: usize,
}

impl ValueSum {
    /// Nothing yet of a kv group of a call of `shape`.
    pub fn new(shape: &AttnShape) -> Self {
        let value_dim = shape.value_dim();
        let row = if shape.value_is_key_prefix() { shape.head_dim() } else { value_dim };
        Self { columns: vec![0.0; row], column: 0, keys: 0, n_keys: shape.n_keys(), value_dim }
    }

    /// Adds the next elements, row by row; they may end, and the next ones begin, in the middle of a row.
    pub fn add(&mut self, values: &[f32]) {
        let _standard = FloatEnvironment::standard();
        let mut left = values;
        while !left.is_empty() {
            let columns = &mut self.columns[self.column..];
            let (of_row, behind) = left.split_at(columns.len().min(left.len()));
            for (sum, value) in columns.iter_mut().zip(of_row) {
                *sum += f64::from(*value);
            }
            left = behind;
            self.column += of_row.len();
            if self.column == self.columns.len() {
                self.column = 0;
                self.keys += 1;
            }
        }
    }

    /// The mean over all keys, `[value_dim]`; `None` unless each of them was added.
    pub fn mean(&self) -> Option<Vec<f32>> {
        if self.keys != self.n_keys || self.column != 0 {
            return None;
        }
        let _standard = FloatEnvironment::standard();
        let n = self.n_keys as f64;
        let of_column = |sum: &f64| {
            // Zeros and NaN have the bits that divided rows have (rule 8).
            let mean = (sum / n) as f32 + 0.0;
            if mean.is_nan() { CANONICAL_NAN } else { mean }
        };
        Some(self.columns.iter().take(self.value_dim).map(of_column).collect())
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    use super::*;
    use crate::shape::Dims;

    fn shape(keys: u64, value_dim: u64) -> AttnShape {
        let dims = Dims { batch: 1, heads: 2, kv_heads: 1, queries: 1, keys, head_dim: 1, value_dim };
        AttnShape::new(dims).unwrap()
    }

    fn mean(shape: &AttnShape, values: &[f32]) -> Vec<f32> {
        let mut sum = ValueSum::new(shape);
        sum.add(values);
        sum.mean().unwrap()
    }

    #[test]
    fn a_mean_is_the_nearest_number_to_the_exact_one() {
        let mut rng = SmallRng::seed_from_u64(5);
        for (keys, dim) in [(1, 1), (3, 5), (300, 7)] {
            // Multiples of 2^-12 under 2^8: sums of any of them are exact in whole numbers.
            let drawn: Vec<i32> = (0..keys * dim).map(|_| rng.random_range(-1 << 20..1 << 20)).collect();
            let values: Vec<f32> = drawn.iter().map(|n| *n as f32 / 4096.0).collect();
            let got = mean(&shape(keys as u64, dim as u64), &values);
            for (column, got) in got.iter().enumerate() {
                let sum: i64 = (0..keys).map(|key| i64::from(drawn[key * dim + column])).sum();
                // Further from every other f32 than from this one.
                let of = |value: f32| (f64::from(value) * 4096.0 * keys as f64 - sum as f64).abs();
                assert!(of(*got) <= of(got.next_up()) && of(*got) <= of(got.next_down()), "{keys} {column}");
            }
        }
    }

    #[test]
    fn large_and_small_values_neither_overflow_nor_vanish() {
        assert_eq!(mean(&shape(4, 1), &[f32::MAX; 4]), [f32::MAX]);
        assert_eq!(
            mean(&shape(3, 1), &[f32::MAX, 3.0, -f32::MAX]),
            [0.0],
            "3 is under half a unit of the sum"
        );
        let tiny = f32::from_bits(6);
        assert_eq!(mean(&shape(2, 1), &[tiny, 0.0]), [f32::from_bits(3)]);
        let signs = mean(&shape(2, 2), &[-0.0, -f32::from_bits(1), -0.0, 0.0]);
        assert_eq!(signs.map_bits(), [0, 0], "no negative zero");
    }

    #[test]
    fn what_is_no_number_follows_ieee() {
        let (inf, nan) = (f32::INFINITY, f32::from_bits(0xffc0_1234));
        let got = mean(&shape(2, 4), &[inf, inf, 1.0, -inf, 2.0, -inf, nan, -inf]);
        assert_eq!(got.map_bits(), [inf.to_bits(), 0x7fc0_0000, 0x7fc0_0000, (-inf).to_bits()]);
    }

    #[test]
    fn keys_that_are_missing_or_too_many_have_no_mean() {
        let shape = shape(2, 3);
        let mut sum = ValueSum::new(&shape);
        for is_whole in [false, false, false, false, false, true, false] {
            sum.add(&[1.0]);
            assert_eq!(sum.mean(), is_whole.then(|| vec![1.0; 3]));
        }
    }

    #[test]
    fn values_that_begin_keys_are_the_first_columns_of_these() {
        let dims = Dims { batch: 1, heads: 2, kv_heads: 1, queries: 1, keys: 2, head_dim: 3, value_dim: 2 };
        let shape = AttnShape::new(dims).unwrap().with_values_from_keys().unwrap();
        assert_eq!(mean(&shape, &[1.0, 2.0, f32::NAN, 3.0, 5.0, f32::INFINITY]), [2.0, 3.5]);
    }

    #[test]
    fn no_cut_shows() {
        let mut rng = SmallRng::seed_from_u64(6);
        let values: Vec<f32> = (0..40 * 9).map(|_| rng.random_range(-1e6..1e6_f32)).collect();
        let shape = shape(40, 9);
        let wanted = mean(&shape, &values);
        for _ in 0..30 {
            let mut sum = ValueSum::new(&shape);
            let mut left = &values[..];
            while !left.is_empty() {
                let (next, behind) = left.split_at(rng.random_range(0..=left.len().min(50)));
                sum.add(next);
                left = behind;
            }
            assert_eq!(sum.mean().unwrap().map_bits(), wanted.map_bits());
        }
    }

    trait MapBits {
        fn map_bits(&self) -> Vec<u32>;
    }

    impl MapBits for Vec<f32> {
        fn map_bits(&self) -> Vec<u32> {
            self.iter().map(|value| value.to_bits()).collect()
        }
    }
}
