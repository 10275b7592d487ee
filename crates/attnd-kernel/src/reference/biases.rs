//! Biases by name, each as the number of one element that defines it. They are not scaled.

use super::masks;
use super::operator::At;

/// A matrix of `[batch, heads, tokens, keys]`, of which the first three may be 1, for all, and the last may be short.
/// What it lacks is hidden, and so is what it has of -inf or of the lowest finite value of its type, by which libraries
/// mean the same. Every other value is a number to add.
///
/// # Panics
/// If `values` doesn't have the shape's length.
pub fn dense(shape: [usize; 4], values: &[f32], lowest: f32) -> impl Fn(At) -> f64 {
    assert_eq!(values.len(), shape.iter().product::<usize>(), "length of a bias of {shape:?}");
    move |at| match masks::element(shape, at).map(|index| values[index]) {
        Some(value) if value != lowest => f64::from(value),
        _hidden => f64::NEG_INFINITY,
    }
}

/// ALiBi: `-slope |p - j|` with `p = offset + i`, and one slope for each head.
pub fn alibi(offset: i64, slopes: &[f32]) -> impl Fn(At) -> f64 {
    move |at| -f64::from(slopes[at.head]) * (offset + at.token as i64 - at.key as i64).abs() as f64
}

/// ALiBi as BLOOM and MPT add it: `slope * j`, counted from the first key that is no padding. Contexts are those of [`alibi`] where masks
/// are causal; lse is not.
pub fn alibi_by_key(first: usize, slopes: &[f32]) -> impl Fn(At) -> f64 {
    move |at| f64::from(slopes[at.head]) * (at.key as f64 - first as f64)
}

/// The slopes that ALiBi was published with: `2^(-8 h / H)` for `h` from 1, where `H` is a power of two; else those of
/// the power below, then every other one of the power above.
pub fn alibi_slopes(heads: usize) -> Vec<f32> {
    let of_power =
        |heads: usize| (1..=heads).map(move |h| 2.0_f64.powf(-8.0 * h as f64 / heads as f64) as f32);
    if heads.is_power_of_two() {
        return of_power(heads).collect();
    }
    let below = heads.next_power_of_two() / 2;
    of_power(below).chain(of_power(2 * below).step_by(2)).take(heads).collect()
}

/// T5's relative bias: an entry of `table`, `[buckets, heads]`, by how far the key is ahead of the token.
pub fn relative(
    offset: i64,
    (buckets, max_distance, bidirectional): (usize, usize, bool),
    table: &[f32],
) -> impl Fn(At) -> f64 {
    let heads = table.len() / buckets;
    move |at| {
        let ahead = at.key as i64 - (offset + at.token as i64);
        f64::from(table[relative_bucket(ahead, buckets, max_distance, bidirectional) * heads + at.head])
    }
}

/// The bucket of a distance, in the arithmetic of transformers: small distances have one each, larger ones share
/// them by their logarithm, which is f32's.
pub fn relative_bucket(ahead: i64, buckets: usize, max_distance: usize, bidirectional: bool) -> usize {
    let (first, buckets, distance) = match (bidirectional, ahead) {
        (true, 1..) => (buckets / 2, buckets / 2, ahead.unsigned_abs()),
        (true, _) => (0, buckets / 2, ahead.unsigned_abs()),
        (false, 1..) => (0, buckets, 0),
        (false, _) => (0, buckets, ahead.unsigned_abs()),
    };
    let exact = buckets / 2;
    if distance < exact as u64 {
        return first + distance as usize;
    }
    let octaves = (max_distance as f64 / exact as f64).ln() as f32;
    let along = (distance as f32 / exact as f32).ln() / octaves * (buckets - exact) as f32;
    first + (exact + along as usize).min(buckets - 1)
}

/// Swin's bias inside windows of `height * width` tokens: an entry of `table`, `[(2 height - 1) (2 width - 1), heads]`,
/// by how far apart the two are in both directions.
pub fn swin((height, width): (usize, usize), table: &[f32]) -> impl Fn(At) -> f64 {
    let columns = 2 * width - 1;
    let heads = table.len() / ((2 * height - 1) * columns);
    move |at| {
        let down = at.token / width + height - 1 - at.key / width;
        let across = at.token % width + width - 1 - at.key % width;
        f64::from(table[(down * columns + across) * heads + at.head])
    }
}

/// Swin's mask of shifted windows: `between` where token and key are of different regions. `regions` is
/// `[windows, height * width]`, and the windows of a picture follow each other along the batch.
pub fn swin_regions(tokens: usize, regions: &[u32], between: f32) -> impl Fn(At) -> f64 {
    let windows = regions.len() / tokens;
    move |at| {
        let window = &regions[at.batch % windows * tokens..][..tokens];
        if window[at.token] == window[at.key] { 0.0 } else { f64::from(between) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(head: usize, token: usize, key: usize) -> At {
        At { batch: 0, head, token, key }
    }

    #[test]
    fn float_masks_hide_by_minus_infinity_and_by_the_lowest_value() {
        let values = [f32::NEG_INFINITY, f32::MIN, -1e9, 2.0];
        let bias = dense([1, 1, 1, 4], &values, f32::MIN);
        let row: Vec<f64> = (0..5).map(|key| bias(at(3, 1, key))).collect();
        assert_eq!(row, [f64::NEG_INFINITY, f64::NEG_INFINITY, -1e9, 2.0, f64::NEG_INFINITY]);
    }

    #[test]
    fn slopes_are_the_published_ones() {
        assert_eq!(alibi_slopes(8), [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]);
        let twelve = alibi_slopes(12);
        assert_eq!(twelve[..8], alibi_slopes(8));
        assert_eq!(twelve[8..], [0, 2, 4, 6].map(|h| alibi_slopes(16)[h]));
        let slopes = alibi_slopes(2);
        let bias = alibi(1, &slopes);
        assert_eq!((bias(at(0, 2, 0)), bias(at(0, 2, 5))), (-3.0 / 16.0, -2.0 / 16.0));
        assert_eq!(alibi_by_key(0, &slopes)(at(1, 0, 5)), 5.0 / 256.0);
        assert_eq!(alibi_by_key(3, &slopes)(at(1, 0, 5)), 2.0 / 256.0);
    }

    #[test]
    fn buckets_are_those_of_transformers() {
        // Of its _relative_position_bucket with 32 buckets and a distance of 128.
        let both = |ahead| relative_bucket(ahead, 32, 128, true);
        let past = |ahead| relative_bucket(ahead, 32, 128, false);
        assert_eq!([-200, -128, -64, -20, -8, -7, -1, 0].map(both), [15, 15, 14, 10, 8, 7, 1, 0]);
        assert_eq!([1, 7, 8, 20, 64, 128, 200].map(both), [17, 23, 24, 26, 30, 31, 31]);
        assert_eq!(
            [-200, -128, -113, -64, -20, -16, -15, -1, 0, 1, 9].map(past),
            [31, 31, 31, 26, 17, 16, 15, 1, 0, 0, 0]
        );
    }

    #[test]
    fn windows_of_swin_count_in_two_directions() {
        // [(2 * 2 - 1) * (2 * 2 - 1), 1]
        let table: Vec<f32> = (0..9_u8).map(f32::from).collect();
        let bias = swin((2, 2), &table);
        let row = |token| [0, 1, 2, 3].map(|key| bias(at(0, token, key)));
        assert_eq!(row(0), [4.0, 3.0, 1.0, 0.0]);
        assert_eq!(row(1), [5.0, 4.0, 2.0, 1.0]);
        assert_eq!(row(2), [7.0, 6.0, 4.0, 3.0]);
        assert_eq!(row(3), [8.0, 7.0, 5.0, 4.0]);
        let regions = swin_regions(2, &[0, 0, 0, 1], -100.0);
        let of = |batch| regions(At { batch, head: 0, token: 0, key: 1 });
        assert_eq!([0, 1, 2, 3].map(of), [0.0, -100.0, 0.0, -100.0]);
    }
}
