//! Resident keys and values of one kv head, stored in the order the kernels consume them.
//!
//! A page of 256 keys is one run of memory, so that a kernel walks one forward-moving address:
//! * four K panels of 64 keys; in a panel, dimension `x` of key `t` is at `x * 64 + t` (K transposed);
//! * V panels of 64 columns (the last one narrower, in steps of 16); in a panel of width `w` column `c` of key `j`
//!   is at `j * w + c`.
//!
//! With 16-bit elements a place in a panel is a word that holds two of them: dimensions `2 x` and `2 x + 1` of a key,
//! keys `2 j` and `2 j + 1` of a column.
//!
//! Values are padded to 16 columns with zeros. Keys of a page that were not written yet are zeros; kernels never use
//! them.

use std::ops::Range;

use crate::buffer::{Buffer, OutOfMemory};
use crate::dtype::Dtype;
use crate::fill::Rows;
use crate::slot::{PAGE_KEYS, keys_in_page, n_pages, slot_of_page};
use crate::storage::per_word;

/// Keys in a K panel.
pub(crate) const PANEL_KEYS: usize = 64;
/// Columns in a full V panel.
pub(crate) const PANEL_COLUMNS: usize = 64;
/// Values are padded to a multiple of this many columns.
pub(crate) const COLUMN_STEP: usize = 16;

const ABSENT: u32 = u32::MAX;

/// Keys and values of one kv head in the pages of a range of slots.
#[derive(Debug)]
pub struct KvHead {
    storage: Dtype,
    n_keys: usize,
    head_dim: usize,
    value_dim: usize,
    slots: Range<usize>,
    /// Where each page of the sequence lies in `memory`, in pages.
    place: Vec<u32>,
    memory: Buffer,
}

/// A value that is NaN or infinite where finite values are promised.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("[pos={token},i={dim}] {value}")]
pub struct NonFinite {
    /// Absolute token position.
    pub token: usize,
    /// Index in the head dimension.
    pub dim: usize,
    /// The value.
    pub value: f32,
}

/// Columns of V as stored.
pub(crate) fn padded_columns(value_dim: usize) -> usize {
    value_dim.next_multiple_of(COLUMN_STEP)
}

/// Words of the K panels and of the V panels of a page.
fn page_words(head_dim: usize, value_dim: usize, storage: Dtype) -> (usize, usize) {
    let per_word = per_word(storage);
    (PAGE_KEYS * head_dim.div_ceil(per_word), PAGE_KEYS / per_word * padded_columns(value_dim))
}

fn owned_pages(n_keys: usize, slots: &Range<usize>) -> impl Iterator<Item = usize> {
    (0..n_pages(n_keys)).filter(move |page| slots.contains(&slot_of_page(*page)))
}

impl KvHead {
    /// Memory that the pages of `slots` take in f32, in bytes.
    pub fn bytes_needed(n_keys: usize, head_dim: usize, value_dim: usize, slots: &Range<usize>) -> u64 {
        let pages = owned_pages(n_keys, slots).count();
        let (k, v) = page_words(head_dim, value_dim, Dtype::F32);
        (pages * (k + v)) as u64 * 4
    }

    /// Reserves memory for the pages that a sequence of `n_keys` has in `slots`, all zeros, stored as f32.
    ///
    /// # Errors
    /// If the system has no such memory.
    pub fn new(
        n_keys: usize,
        head_dim: usize,
        value_dim: usize,
        slots: Range<usize>,
    ) -> Result<Self, OutOfMemory> {
        Self::with_storage(n_keys, head_dim, value_dim, slots, Dtype::F32)
    }

    /// As [`Self::new`], with elements stored as `storage`. What is written is rounded to it, to nearest even; kernels
    /// widen it exactly and compute in f32, so that the result has the bits that f32 storage of the rounded values
    /// gives.
    ///
    /// # Errors
    /// If the system has no such memory.
    pub fn with_storage(
        n_keys: usize,
        head_dim: usize,
        value_dim: usize,
        slots: Range<usize>,
        storage: Dtype,
    ) -> Result<Self, OutOfMemory> {
        let mut place = vec![ABSENT; n_pages(n_keys)];
        let mut count = 0;
        for page in owned_pages(n_keys, &slots) {
            place[page] = count;
            count += 1;
        }
        let (k, v) = page_words(head_dim, value_dim, storage);
        let memory = Buffer::zeroed(count as usize * (k + v))?;
        Ok(Self { storage, n_keys, head_dim, value_dim, slots, place, memory })
    }

    /// How elements are stored.
    pub fn storage(&self) -> Dtype {
        self.storage
    }
    /// Key tokens of the whole sequence, resident here or not.
    pub fn n_keys(&self) -> usize {
        self.n_keys
    }
    /// The slots whose pages are resident.
    pub fn slots(&self) -> Range<usize> {
        self.slots.clone()
    }
    pub(crate) fn head_dim(&self) -> usize {
        self.head_dim
    }
    pub(crate) fn value_dim(&self) -> usize {
        self.value_dim
    }

    /// Stores the keys of one page: `rows` holds `[keys_in_page, head_dim]` elements.
    ///
    /// # Errors
    /// The first NaN or infinity, if `check_finite`, after rounding to the storage type; the page is then only partly
    /// written.
    ///
    /// # Panics
    /// If the page is not resident here or `rows` has another length.
    pub fn write_k(
        &mut self,
        page: usize,
        rows: &[u8],
        dtype: Dtype,
        check_finite: bool,
    ) -> Result<(), NonFinite> {
        let (of_row, storage) = ((self.head_dim, dtype), self.storage);
        let rows = Rows::new(page, keys_in_page(page, self.n_keys), rows, of_row, check_finite);
        rows.store_keys(storage, self.page_mut(page).0)
    }

    /// Stores the values of one page: `rows` holds `[keys_in_page, value_dim]` elements. Errors and panics are
    /// those of [`Self::write_k`].
    pub fn write_v(
        &mut self,
        page: usize,
        rows: &[u8],
        dtype: Dtype,
        check_finite: bool,
    ) -> Result<(), NonFinite> {
        let (of_row, storage) = ((self.value_dim, dtype), self.storage);
        let rows = Rows::new(page, keys_in_page(page, self.n_keys), rows, of_row, check_finite);
        rows.store_values(storage, self.page_mut(page).1)
    }

    /// The K panels and the V panels of a resident page, in words.
    pub(crate) fn page(&self, page: usize) -> Option<(&[f32], &[f32])> {
        let place = *self.place.get(page).filter(|place| **place != ABSENT)?;
        let (k, v) = page_words(self.head_dim, self.value_dim, self.storage);
        Some(self.memory[place as usize * (k + v)..][..k + v].split_at(k))
    }

    /// Fills all pages with what must never be used.
    #[cfg(test)]
    pub(crate) fn poison(&mut self, word: f32) {
        self.memory.fill(word);
    }

    fn page_mut(&mut self, page: usize) -> (&mut [f32], &mut [f32]) {
        let place = self.place.get(page).copied().filter(|place| *place != ABSENT);
        let Some(place) = place else { panic!("page {page} is not in slots {:?}", self.slots) };
        let (k, v) = page_words(self.head_dim, self.value_dim, self.storage);
        self.memory[place as usize * (k + v)..][..k + v].split_at_mut(k)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn elements_are_where_the_layout_says() {
        let (d, dv, n_keys) = (3, 70, 300);
        let mut kv = KvHead::new(n_keys, d, dv, 0..64).unwrap();
        let k = |t: usize, x: usize| (t * 1000 + x) as f32;
        for page in 0..2 {
            let keys = page * 256..(page * 256 + keys_in_page(page, n_keys));
            let rows = |dim: usize| -> Vec<u8> {
                bytes(&keys.clone().flat_map(|t| (0..dim).map(move |x| k(t, x))).collect::<Vec<_>>())
            };
            kv.write_k(page, &rows(d), Dtype::F32, true).unwrap();
            kv.write_v(page, &rows(dv), Dtype::F32, true).unwrap();
        }
        let (keys, values) = kv.page(1).unwrap();
        assert_eq!(keys[2 * 64 + 43], k(256 + 43, 2));
        assert_eq!(keys[2 * 64 + 44], 0.0, "never written");
        assert_eq!(values[43 * 64 + 63], k(256 + 43, 63));
        assert_eq!(values[64 * 256 + 43 * 16 + 5], k(256 + 43, 69));
        assert_eq!(values[64 * 256 + 43 * 16 + 6], 0.0, "padding");
    }

    #[test]
    fn two_elements_of_sixteen_bits_share_a_word() {
        for storage in [Dtype::Bf16, Dtype::F16] {
            let mut kv = KvHead::with_storage(300, 3, 70, 0..64, storage).unwrap();
            let keys: Vec<f32> = (0..256 * 3).map(|i| i as f32 / 4.0 % 50.0).collect();
            kv.write_k(0, &bytes(&keys), Dtype::F32, true).unwrap();
            let values: Vec<f32> = (0..256 * 70).map(|i| (i % 120) as f32).collect();
            kv.write_v(0, &bytes(&values), Dtype::F32, true).unwrap();
            let halves = |word: f32| {
                let half = |bits: u32| match storage {
                    Dtype::Bf16 => half::bf16::from_bits(bits as u16).to_f32(),
                    _ => half::f16::from_bits(bits as u16).to_f32(),
                };
                (half(word.to_bits() & 0xffff), half(word.to_bits() >> 16))
            };
            let (k, v) = kv.page(0).unwrap();
            let key = 64 + 7;
            assert_eq!(halves(k[64 * 2 + 7]), (keys[key * 3], keys[key * 3 + 1]));
            assert_eq!(halves(k[64 * 2 + 64 + 7]), (keys[key * 3 + 2], 0.0), "an odd dimension is alone");
            assert_eq!(halves(v[20 * 64 + 9]), (values[40 * 70 + 9], values[41 * 70 + 9]));
            assert_eq!(halves(v[64 * 128 + 20 * 16 + 5]), (values[40 * 70 + 69], values[41 * 70 + 69]));
        }
    }

    #[test]
    fn what_the_storage_type_cannot_hold_is_refused_or_becomes_infinite() {
        let mut kv = KvHead::with_storage(1, 1, 1, 0..64, Dtype::F16).unwrap();
        let found = kv.write_k(0, &bytes(&[70_000.0]), Dtype::F32, true).unwrap_err();
        assert_eq!(found.value, f32::INFINITY);
        assert!(kv.write_k(0, &bytes(&[70_000.0]), Dtype::F32, false).is_ok());
    }

    #[test]
    fn only_pages_of_the_slots_are_resident() {
        let kv = KvHead::new(256 * 8, 1, 1, 0..16).unwrap();
        let resident: Vec<usize> = (0..8).filter(|p| kv.page(*p).is_some()).collect();
        assert_eq!(resident, [0, 4]);
        assert_eq!(KvHead::bytes_needed(256 * 8, 1, 1, &(0..16)), 2 * 256 * 17 * 4);
    }

    #[test]
    fn the_first_non_finite_value_is_named() {
        let mut kv = KvHead::new(512, 20, 20, 0..64).unwrap();
        for bad in [20 * 17 + 1, 20 * 17 + 18, 0, 20 * 256 - 1] {
            let mut rows = vec![0.5_f32; 20 * 256];
            rows[bad] = f32::NAN;
            rows[bad.max(20 * 200 + 1)] = f32::INFINITY;
            let found = kv.write_k(1, &bytes(&rows), Dtype::F32, true).unwrap_err();
            assert_eq!((found.token, found.dim), (256 + bad / 20, bad % 20));
            let found = kv.write_v(1, &bytes(&rows), Dtype::F32, true).unwrap_err();
            assert_eq!((found.token, found.dim), (256 + bad / 20, bad % 20));
            assert!(kv.write_k(1, &bytes(&rows), Dtype::F32, false).is_ok());
            assert!(kv.write_v(1, &bytes(&rows), Dtype::F32, false).is_ok());
        }
    }
}
