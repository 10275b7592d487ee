//! The mean of the values of each kv group, from the chunks of V as they pass: what rows are that see no key, where such rows are
//! asked to be uniform. Pure; runs on the compute pool.
//!
//! No worker could say it: who has a part of the keys knows neither the other values nor, of a dense mask, whether a row sees none
//! of the other keys. The coordinator sees every byte of V once, so it adds up what passes, and holds 8 bytes for each
//! column of each group and no value.

use std::sync::Arc;

use attnd_kernel::{AttnShape, Dtype, ValueSum, widen};

/// Elements that are widened at a time.
const AT_ONCE: usize = 1024;

/// What has passed of V, and the means of groups that have passed whole.
#[derive(Debug)]
pub(crate) struct ValueMeans {
    dtype: Dtype,
    groups: Vec<Group>,
}

#[derive(Debug)]
struct Group {
    sum: ValueSum,
    /// Bytes that have passed.
    passed: u64,
    /// The first bytes of an element whose others are in the next chunk.
    cut: Vec<u8>,
    mean: Option<Arc<[f32]>>,
}

impl ValueMeans {
    /// Nothing yet of a call of `shape`, whose elements are of `dtype` on the wire.
    pub(crate) fn new(shape: &AttnShape, dtype: Dtype) -> Self {
        let group = || Group { sum: ValueSum::new(shape), passed: 0, cut: Vec::new(), mean: None };
        Self { dtype, groups: (0..shape.n_groups()).map(|_| group()).collect() }
    }

    /// Adds bytes of a group that begin at byte `offset` of its V, or of its K where values are the first elements of keys. Groups come
    /// in any order and each front to back, cut anywhere, which shows in no bit of a mean. Bytes out of place count for nothing, so
    /// their group never has one.
    pub(crate) fn add(&mut self, group: usize, offset: u64, mut bytes: &[u8]) {
        let size = self.dtype.size();
        let Some(group) = self.groups.get_mut(group).filter(|group| group.passed == offset) else { return };
        group.passed += bytes.len() as u64;
        if !group.cut.is_empty() {
            let (missing, rest) = bytes.split_at(bytes.len().min(size - group.cut.len()));
            group.cut.extend_from_slice(missing);
            bytes = rest;
            if group.cut.len() < size {
                return;
            }
            let mut value = [0.0];
            widen(&group.cut, self.dtype, &mut value);
            group.sum.add(&value);
            group.cut.clear();
        }
        let (whole, cut) = bytes.split_at(bytes.len() - bytes.len() % size);
        let mut values = [0.0; AT_ONCE];
        for elements in whole.chunks(AT_ONCE * size) {
            let values = &mut values[..elements.len() / size];
            widen(elements, self.dtype, values);
            group.sum.add(values);
        }
        group.cut.extend_from_slice(cut);
        if group.cut.is_empty() {
            group.mean = group.sum.mean().map(Arc::from);
        }
    }

    /// The mean of a group's values, `[value_dim]`; `None` until all of them have passed.
    pub(crate) fn of(&self, group: usize) -> Option<Arc<[f32]>> {
        self.groups.get(group)?.mean.clone()
    }
}

#[cfg(test)]
mod tests {
    use attnd_kernel::Dims;
    use rand::rngs::SmallRng;
    use rand::seq::SliceRandom;
    use rand::{RngExt, SeedableRng};

    use super::*;

    const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

    fn shape(keys: u64, value_dim: u64) -> AttnShape {
        let dims = Dims { batch: 2, heads: 4, kv_heads: 2, queries: 1, keys, head_dim: 1, value_dim };
        AttnShape::new(dims).unwrap()
    }

    /// A finite number, and what it is.
    fn element(dtype: Dtype, rng: &mut SmallRng) -> (Vec<u8>, f64) {
        let bytes = match dtype {
            Dtype::F32 => rng.random_range(-300.0..300.0_f32).to_le_bytes().to_vec(),
            // An exponent that isn't all ones.
            Dtype::F16 => (rng.random::<u16>() & 0xfbff).to_le_bytes().to_vec(),
            Dtype::Bf16 => (rng.random::<u16>() & 0x80ff | 0x4000).to_le_bytes().to_vec(),
        };
        let mut value = [0.0];
        widen(&bytes, dtype, &mut value);
        (bytes, f64::from(value[0]))
    }

    /// The bytes of each group's V, and its mean by the definition: columns summed in f64, key by key.
    fn drawn(shape: &AttnShape, dtype: Dtype, rng: &mut SmallRng) -> Vec<(Vec<u8>, Vec<u32>)> {
        let mut of_group = || {
            let (mut bytes, mut sums) = (Vec::new(), vec![0.0_f64; shape.value_dim()]);
            for at in 0..shape.n_keys() * shape.value_dim() {
                let (encoded, exact) = element(dtype, rng);
                bytes.extend(encoded);
                sums[at % shape.value_dim()] += exact;
            }
            let mean = |sum: &f64| ((sum / shape.n_keys() as f64) as f32).to_bits();
            (bytes, sums.iter().map(mean).collect())
        };
        (0..shape.n_groups()).map(|_| of_group()).collect()
    }

    fn bits(means: &ValueMeans, group: usize) -> Option<Vec<u32>> {
        Some(means.of(group)?.iter().map(|value| value.to_bits()).collect())
    }

    #[test]
    fn no_chunking_shows() {
        for seed in 0..300 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let (shape, dtype) =
                (shape(rng.random_range(1..60), rng.random_range(1..20)), DTYPES[seed as usize % 3]);
            let groups = drawn(&shape, dtype, &mut rng);
            let mut means = ValueMeans::new(&shape, dtype);
            let mut order = [0, 1, 2, 3];
            order.shuffle(&mut rng);
            for group in order {
                let (bytes, wanted) = &groups[group];
                let mut at = 0;
                while at < bytes.len() {
                    assert_eq!(bits(&means, group), None, "seed {seed}: {at} of {} bytes", bytes.len());
                    let end = bytes.len().min(at + rng.random_range(1..90));
                    means.add(group, at as u64, &bytes[at..end]);
                    at = end;
                }
                assert_eq!(bits(&means, group).as_ref(), Some(wanted), "seed {seed}: {dtype} group {group}");
            }
        }
    }

    #[test]
    fn more_elements_than_are_widened_at_once_are_added_in_order() {
        let (shape, mut rng) = (shape(400, 7), SmallRng::seed_from_u64(11));
        for dtype in DTYPES {
            let groups = drawn(&shape, dtype, &mut rng);
            let mut means = ValueMeans::new(&shape, dtype);
            for (group, (bytes, wanted)) in groups.iter().enumerate() {
                means.add(group, 0, bytes);
                assert_eq!(bits(&means, group).as_ref(), Some(wanted), "{dtype} group {group}");
            }
        }
    }

    #[test]
    fn groups_may_take_turns() {
        let shape = shape(9, 3);
        let groups = drawn(&shape, Dtype::F16, &mut SmallRng::seed_from_u64(12));
        let mut means = ValueMeans::new(&shape, Dtype::F16);
        for at in 0..groups[0].0.len() {
            for (group, (bytes, _)) in groups.iter().enumerate() {
                means.add(group, at as u64, &bytes[at..=at]);
            }
        }
        for (group, (_, wanted)) in groups.iter().enumerate() {
            assert_eq!(bits(&means, group).as_ref(), Some(wanted));
        }
    }

    #[test]
    fn what_is_out_of_place_counts_for_nothing() {
        let shape = shape(5, 2);
        let groups = drawn(&shape, Dtype::F32, &mut SmallRng::seed_from_u64(13));
        let (bytes, wanted) = &groups[0];
        let after = |parts: &[(usize, usize)]| {
            let mut means = ValueMeans::new(&shape, Dtype::F32);
            parts.iter().for_each(|(from, to)| means.add(0, *from as u64, &bytes[*from..*to]));
            bits(&means, 0)
        };
        for parts in [&[(0, 40)][..], &[(0, 16), (0, 16), (16, 40)], &[(4, 40), (0, 40), (0, 8)]] {
            assert_eq!(after(parts).as_ref(), Some(wanted), "{parts:?}");
        }
        for parts in [&[(0, 16), (24, 40)][..], &[(0, 39)], &[(1, 40)], &[]] {
            assert_eq!(after(parts), None, "{parts:?}");
        }
        assert_eq!(ValueMeans::new(&shape, Dtype::F32).of(4), None);
    }
}
