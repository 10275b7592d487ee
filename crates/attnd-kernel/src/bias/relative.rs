//! T5's relative bias (Raffel et al., *Exploring the Limits of Transfer Learning*, 2020, section 2.1): an entry of a table by how far the key
//! is ahead of the query, where far distances share entries by their logarithm.
//!
//! Which distances share one is what `_relative_position_bucket` of transformers computes, operation by operation in f32. Its logarithm comes
//! from a library, which differs between machines where a distance lies on a border. So borders are found once, when the bias is made, with a
//! logarithm of basic operations in f64 that is rounded once, and kernels compare integers.

use std::sync::Arc;

use super::BiasError;
use crate::canonical::log2;
use crate::slot::PAGE_KEYS;

/// A table of biases, and which distances go with which entry. Cheap to clone.
#[derive(Clone, Debug, PartialEq)]
pub struct Relative {
    table: Arc<[f32]>,
    buckets: usize,
    max_distance: u32,
    bidirectional: bool,
    /// Ascending; the first begins before every key.
    steps: Arc<[Step]>,
}

/// From here on to the next step keys have the same entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Step {
    /// Position of the key less that of the query.
    ahead: i64,
    bucket: usize,
}

impl Relative {
    /// The entries of `table`, `[buckets, heads]`. Where `bidirectional` is true the first half of the buckets is for keys up to the query and
    /// the second one for keys behind it; else all are for keys up to the query, and those behind it count as distance 0. Half of the buckets of
    /// a direction have a distance each, the others share those up to `max_distance`, and the last one has all beyond.
    ///
    /// # Errors
    /// [`BiasError`] if there are too few buckets to halve, no distances for the shared ones, no whole number of heads, or a number in the
    /// table is NaN or infinite in units of the binary logarithm.
    pub fn new(
        table: Arc<[f32]>,
        buckets: usize,
        max_distance: u32,
        bidirectional: bool,
    ) -> Result<Self, BiasError> {
        let directions = if bidirectional { 2 } else { 1 };
        let of_direction = buckets / directions;
        let exact = of_direction / 2;
        if exact == 0 {
            return Err(BiasError::Buckets { got: buckets, least: 2 * directions });
        }
        if exact >= max_distance as usize {
            return Err(BiasError::MaxDistance { got: max_distance, buckets, exact });
        }
        super::check_table("bias.relative", &table, buckets, None)?;
        let first_of = first_distances(of_direction, exact, max_distance);
        let steps = steps(&first_of, bidirectional);
        Ok(Self { table, buckets, max_distance, bidirectional, steps: steps.into() })
    }

    /// `[buckets, heads]`.
    pub fn table(&self) -> &[f32] {
        &self.table
    }

    /// Rows of the table.
    pub fn buckets(&self) -> usize {
        self.buckets
    }

    /// The distance from which on all share the last bucket of their direction.
    pub fn max_distance(&self) -> u32 {
        self.max_distance
    }

    /// Whether keys behind the query have buckets of their own.
    pub fn bidirectional(&self) -> bool {
        self.bidirectional
    }

    /// Columns of the table.
    pub(super) fn heads(&self) -> usize {
        self.table.len() / self.buckets
    }

    /// The biases of a row of head `head`, of one batch element.
    pub(crate) fn of_row(&self, head: usize, position: i64) -> RelativeRow<'_> {
        RelativeRow { relative: self, head, position }
    }
}

/// The first distance of each bucket of a direction, ascending. Buckets without a distance begin where the next one does.
fn first_distances(buckets: usize, exact: usize, max_distance: u32) -> Vec<i64> {
    let log = |x: f64| (std::f64::consts::LN_2 * log2(x)) as f32;
    let octaves = log(f64::from(max_distance) / exact as f64);
    let bucket_of = |distance: i64| {
        let along = log(f64::from(distance as f32 / exact as f32)) / octaves * (buckets - exact) as f32;
        (exact + along as usize).min(buckets - 1)
    };
    let shared = (exact..buckets).map(|bucket| {
        // Every operation above is monotone, so halving finds the first one.
        let (mut below, mut first) = (exact as i64 - 1, i64::from(max_distance));
        while first - below > 1 {
            let middle = below + (first - below) / 2;
            if bucket_of(middle) >= bucket { first = middle } else { below = middle }
        }
        first
    });
    (0..exact as i64).chain(shared).collect()
}

/// The buckets along the axis of keys, the query at 0.
fn steps(first_of: &[i64], bidirectional: bool) -> Vec<Step> {
    let buckets = first_of.len();
    // Where a bucket ends: before the first distance of the next one.
    let end_of = |bucket: usize| first_of.get(bucket + 1).copied();
    let has_distances = |bucket: &usize| end_of(*bucket) != Some(first_of[*bucket]);
    let up_to_the_query = (0..buckets).rev().filter(has_distances).map(|bucket| {
        let ahead = end_of(bucket).map_or(i64::MIN, |end| 1 - end);
        Step { ahead, bucket }
    });
    let behind =
        (0..buckets).filter(has_distances).filter(|bucket| end_of(*bucket) != Some(1)).map(|bucket| {
            // Distance 0 is the query's own.
            Step { ahead: first_of[bucket].max(1), bucket: buckets + bucket }
        });
    let behind = behind.take(if bidirectional { buckets } else { 0 });
    up_to_the_query.chain(behind).collect()
}

/// What one row adds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RelativeRow<'a> {
    relative: &'a Relative,
    head: usize,
    /// Of the query among the keys.
    position: i64,
}

impl RelativeRow<'_> {
    /// Values for the keys of `page`.
    pub(crate) fn fill(&self, page: usize, to: &mut [f32; PAGE_KEYS]) {
        let Relative { table, steps, .. } = self.relative;
        let heads = self.relative.heads();
        // Positions beyond every key are far from all of them.
        let first = ((page * PAGE_KEYS) as i64).saturating_sub(self.position);
        let mut from = 0;
        let mut at = steps.partition_point(|step| step.ahead <= first).saturating_sub(1);
        while from < PAGE_KEYS {
            let next = steps.get(at + 1).map_or(i64::MAX, |next| next.ahead.saturating_sub(first));
            let end = usize::try_from(next).map_or(PAGE_KEYS, |next| next.min(PAGE_KEYS));
            to[from..end].fill(table[steps[at].bucket * heads + self.head]);
            (from, at) = (end, at + 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::biases::relative_bucket;

    /// A table whose entries are their buckets.
    fn counting(buckets: usize, max_distance: u32, bidirectional: bool) -> Relative {
        let table: Vec<f32> = (0..buckets).map(|bucket| bucket as f32).collect();
        Relative::new(table.into(), buckets, max_distance, bidirectional).unwrap()
    }

    /// The bucket of every key of a page.
    fn buckets_of(relative: &Relative, position: i64, page: usize) -> [f32; PAGE_KEYS] {
        let mut row = [f32::NAN; PAGE_KEYS];
        relative.of_row(0, position).fill(page, &mut row);
        row
    }

    #[test]
    fn buckets_are_those_of_transformers() {
        let mut sizes: Vec<(usize, u32)> =
            vec![(32, 128), (32, 256), (4, 3), (5, 3), (8, 1000), (64, 128), (320, 800)];
        sizes.extend(
            (4..40).flat_map(|buckets| [20, 27, 50, 100, 128, 1000, 4096].map(|most| (buckets, most))),
        );
        for (buckets, most) in sizes {
            for bidirectional in [false, true] {
                let relative = counting(buckets, most, bidirectional);
                for position in [0, 5, 300, 1000, 10_000, -7, -500] {
                    for page in 0..8 {
                        for (key, got) in buckets_of(&relative, position, page).iter().enumerate() {
                            let ahead = (page * PAGE_KEYS + key) as i64 - position;
                            let want = relative_bucket(ahead, buckets, most as usize, bidirectional);
                            assert_eq!(*got, want as f32, "{ahead} of {buckets}, {most}, {bidirectional}");
                        }
                    }
                }
            }
        }
    }

    /// Of `_relative_position_bucket` itself, at both sides of each border.
    #[test]
    fn borders_lie_where_transformers_has_them() {
        let first = |buckets, most| first_distances(buckets, buckets / 2, most);
        assert_eq!(first(16, 128), [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]);
        assert_eq!(first(32, 128)[16..], [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]);
    }

    #[test]
    fn positions_beyond_every_key_are_far() {
        let both = counting(32, 128, true);
        assert_eq!(buckets_of(&both, i64::MAX, 3), [15.0; PAGE_KEYS]);
        assert_eq!(buckets_of(&both, i64::MIN, 3), [31.0; PAGE_KEYS]);
        let past = counting(32, 128, false);
        assert_eq!(buckets_of(&past, i64::MAX, 0), [31.0; PAGE_KEYS]);
        assert_eq!(buckets_of(&past, i64::MIN, 0), [0.0; PAGE_KEYS]);
        let far = counting(32, u32::MAX, true);
        assert_eq!(buckets_of(&far, -(1 << 40), 0), [31.0; PAGE_KEYS]);
    }
}
