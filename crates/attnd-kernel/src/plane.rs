//! Dense masks and biases of one head, page by page, as far as they are resident.
//!
//! A plane has a row for each query token, or one for all of them. Of a row's page it holds a bit for each key, set where the
//! key takes part, and of a bias an f32 for each key besides.

use std::ops::Range;

use crate::buffer::{Buffer, OutOfMemory};
use crate::dtype::{Dtype, widen};
use crate::mask::PageBits;
use crate::pages::{ABSENT, owned_pages};
use crate::slot::{PAGE_KEYS, keys_in_page, n_pages};

/// One `[rows, keys]` plane in the pages of a range of slots. What hasn't been written is masked, so a tensor may have fewer keys
/// than the call.
#[derive(Debug)]
pub struct DensePlane {
    n_rows: usize,
    n_keys: usize,
    /// Where each page of the sequence lies in a row, in pages.
    place: Vec<u32>,
    pages_per_row: usize,
    visible: Vec<PageBits>,
    /// `[rows, pages, 256]` of a bias, 0 where a key is masked; empty of a mask.
    values: Option<Buffer>,
}

/// A bias that is NaN or +inf.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("[query={row},key={key}] {value}")]
pub struct BiasValue {
    /// Row of the plane.
    pub row: usize,
    /// Absolute key position.
    pub key: usize,
    /// The value.
    pub value: f32,
}

/// 2^127: of what is stored, the largest magnitude.
const LARGEST_BIAS: f32 = (1_u128 << 127) as f32;

impl DensePlane {
    /// Memory that a plane of `n_rows` rows takes in the pages of `slots`, in bytes.
    pub fn bytes_needed(n_rows: usize, n_keys: usize, slots: &Range<usize>, is_bias: bool) -> u64 {
        let pages = (n_rows * owned_pages(n_keys, slots).count()) as u64;
        pages * (size_of::<PageBits>() + if is_bias { PAGE_KEYS * size_of::<f32>() } else { 0 }) as u64
    }

    /// Reserves a mask over a sequence of `n_keys` keys.
    ///
    /// # Errors
    /// If the system has no such memory.
    pub fn mask(n_rows: usize, n_keys: usize, slots: &Range<usize>) -> Result<Self, OutOfMemory> {
        let mut place = vec![ABSENT; n_pages(n_keys)];
        let mut pages_per_row = 0;
        for page in owned_pages(n_keys, slots) {
            place[page] = pages_per_row as u32;
            pages_per_row += 1;
        }
        let n_pages = n_rows.saturating_mul(pages_per_row);
        let mut visible = Vec::new();
        if visible.try_reserve_exact(n_pages).is_err() {
            let bytes = (n_pages as u64).saturating_mul(size_of::<PageBits>() as u64);
            return Err(OutOfMemory { bytes });
        }
        visible.resize(n_pages, PageBits::default());
        Ok(Self { n_rows, n_keys, place, pages_per_row, visible, values: None })
    }

    /// Reserves a bias over a sequence of `n_keys` keys.
    ///
    /// # Errors
    /// If the system has no such memory.
    pub fn bias(n_rows: usize, n_keys: usize, slots: &Range<usize>) -> Result<Self, OutOfMemory> {
        let mask = Self::mask(n_rows, n_keys, slots)?;
        let values = Buffer::zeroed(n_rows * mask.pages_per_row * PAGE_KEYS)?;
        Ok(Self { values: Some(values), ..mask })
    }

    /// Rows: query tokens, or 1 for all of them.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Key tokens of the whole sequence, resident here or not.
    pub fn n_keys(&self) -> usize {
        self.n_keys
    }

    /// Whether this is a bias, and not only a mask.
    pub fn is_bias(&self) -> bool {
        self.values.is_some()
    }

    /// Stores the first keys of a row's page in a mask, a byte each: masked where that is 0.
    ///
    /// # Panics
    /// If this is a bias, the row or the page isn't here, or the page has fewer keys.
    pub fn write_mask(&mut self, row: usize, page: usize, keys: &[u8]) {
        assert!(!self.is_bias() && keys.len() <= keys_in_page(page, self.n_keys));
        let at = self.at(row, page);
        let mut bits = PageBits::default();
        for (key, _) in keys.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            bits.insert(key);
        }
        self.visible[at] = bits;
    }

    /// Stores the first keys of a row's page in a bias. A key is masked where its bias is -inf or the lowest finite value of
    /// `dtype`; any other value, however low, is added to scores. Values beyond 2^127, as masks of some frameworks have, count as
    /// 2^127, which no score is felt beside and which stays finite in units of the binary logarithm.
    ///
    /// # Errors
    /// The first NaN or +inf; the page is then only partly written.
    ///
    /// # Panics
    /// If this is a mask, the row or the page isn't here, or the page has fewer keys.
    pub fn write_bias(
        &mut self,
        row: usize,
        page: usize,
        keys: &[u8],
        dtype: Dtype,
    ) -> Result<(), BiasValue> {
        let n = keys.len() / dtype.size();
        assert!(keys.len().is_multiple_of(dtype.size()) && n <= keys_in_page(page, self.n_keys));
        let at = self.at(row, page);
        let Some(values) = &mut self.values else { panic!("a mask has no values") };
        let values = &mut values[at * PAGE_KEYS..][..n];
        widen(keys, dtype, values);
        let lowest = lowest_finite(dtype);
        let mut bits = PageBits::default();
        for (key, value) in values.iter_mut().enumerate() {
            if value.is_nan() || *value == f32::INFINITY {
                return Err(BiasValue { row, key: page * PAGE_KEYS + key, value: *value });
            }
            if *value > lowest {
                *value = value.clamp(-LARGEST_BIAS, LARGEST_BIAS);
                bits.insert(key);
            } else {
                *value = 0.0;
            }
        }
        self.visible[at] = bits;
        Ok(())
    }

    /// Fills all values with what must never be used.
    #[cfg(test)]
    pub(crate) fn poison(&mut self, word: f32) {
        if let Some(values) = &mut self.values {
            crate::buffer::fill_by_copies(values, word);
        }
    }

    fn at(&self, row: usize, page: usize) -> usize {
        assert!(row < self.n_rows, "row {row} of {}", self.n_rows);
        match self.place.get(page) {
            Some(place) if *place != ABSENT => row * self.pages_per_row + *place as usize,
            _ => panic!("page {page} is not resident"),
        }
    }

    /// The keys of a page that query token `token` may see.
    pub(crate) fn visible(&self, token: usize, page: usize) -> &PageBits {
        &self.visible[self.at(self.row_of(token), page)]
    }

    /// The biases of a page for query token `token`, if this is a bias.
    pub(crate) fn values(&self, token: usize, page: usize) -> Option<&[f32; PAGE_KEYS]> {
        let at = self.at(self.row_of(token), page);
        self.values.as_ref()?[at * PAGE_KEYS..].first_chunk()
    }

    fn row_of(&self, token: usize) -> usize {
        if self.n_rows == 1 { 0 } else { token }
    }
}

/// What stands for "masked" in a bias besides -inf.
fn lowest_finite(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => f32::MIN,
        Dtype::F16 => half::f16::MIN.to_f32(),
        Dtype::Bf16 => half::bf16::MIN.to_f32(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slot::N_SLOTS;

    #[test]
    fn infinite_and_lowest_biases_are_masks_and_others_are_data() {
        let lowest =
            [(Dtype::F32, f32::MIN), (Dtype::F16, -65504.0), (Dtype::Bf16, half::bf16::MIN.to_f32())];
        for (dtype, lowest) in lowest {
            let encode = |x: f32| match dtype {
                Dtype::F32 => x.to_le_bytes().to_vec(),
                Dtype::F16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
                Dtype::Bf16 => half::bf16::from_f32(x).to_le_bytes().to_vec(),
            };
            let mut plane = DensePlane::bias(2, 300, &(0..N_SLOTS)).unwrap();
            let values = [0.0, f32::NEG_INFINITY, lowest, -60000.0, 1.5];
            let bytes: Vec<u8> = values.iter().flat_map(|x| encode(*x)).collect();
            plane.write_bias(1, 1, &bytes, dtype).unwrap();
            let bits = plane.visible(1, 1);
            let seen: Vec<bool> = (0..6).map(|key| bits.contains(key)).collect();
            assert_eq!(seen, [true, false, false, true, true, false], "{dtype:?}");
            let stored = plane.values(1, 1).unwrap();
            assert_eq!((stored[2], stored[4]), (0.0, 1.5));
            assert!(plane.visible(0, 1).is_empty(), "what isn't written is masked");

            for bad in [f32::NAN, f32::INFINITY] {
                let bytes: Vec<u8> = [0.0, bad].iter().flat_map(|x| encode(*x)).collect();
                let found = plane.write_bias(0, 1, &bytes, dtype).unwrap_err();
                assert_eq!((found.row, found.key), (0, 257));
            }
        }
    }

    #[test]
    fn planes_take_what_they_say() {
        let slots = 0..5;
        for is_bias in [false, true] {
            let plane = if is_bias {
                DensePlane::bias(7, 9000, &slots).unwrap()
            } else {
                DensePlane::mask(7, 9000, &slots).unwrap()
            };
            let values = plane.values.as_ref().map_or(0, |values| values.len() * 4);
            let bytes = plane.visible.len() * size_of::<PageBits>() + values;
            assert_eq!(bytes as u64, DensePlane::bytes_needed(7, 9000, &slots, is_bias));
        }
    }
}
