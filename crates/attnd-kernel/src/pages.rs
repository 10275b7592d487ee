//! Resident keys and values of one kv head, stored in the order the kernels consume them.
//!
//! A page of 256 keys is one run of memory, so that a kernel walks one forward-moving address:
//! * four K panels of 64 keys; in a panel, dimension `x` of key `t` is at `x * 64 + t` (K transposed);
//! * V panels of 64 columns (the last one narrower, in steps of 16); in a panel of width `w` column `c` of key `j`
//!   is at `j * w + c`.
//!
//! Values are padded to 16 columns with zeros. Keys of a page that were not written yet are zeros; kernels never use
//! them.

use std::ops::Range;

use crate::buffer::{Buffer, OutOfMemory};
use crate::dtype::{Dtype, first_non_finite, widen};
use crate::slot::{PAGE_KEYS, keys_in_page, n_pages, slot_of_page};

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

fn page_floats(head_dim: usize, value_dim: usize) -> usize {
    PAGE_KEYS * (head_dim + padded_columns(value_dim))
}

fn owned_pages(n_keys: usize, slots: &Range<usize>) -> impl Iterator<Item = usize> {
    (0..n_pages(n_keys)).filter(move |page| slots.contains(&slot_of_page(*page)))
}

impl KvHead {
    /// Memory that the pages of `slots` take, in bytes.
    pub fn bytes_needed(n_keys: usize, head_dim: usize, value_dim: usize, slots: &Range<usize>) -> u64 {
        let pages = owned_pages(n_keys, slots).count();
        (pages * page_floats(head_dim, value_dim)) as u64 * 4
    }

    /// Reserves memory for the pages that a sequence of `n_keys` has in `slots`, all zeros.
    pub fn new(
        n_keys: usize,
        head_dim: usize,
        value_dim: usize,
        slots: Range<usize>,
    ) -> Result<Self, OutOfMemory> {
        let mut place = vec![ABSENT; n_pages(n_keys)];
        let mut count = 0;
        for page in owned_pages(n_keys, &slots) {
            place[page] = count;
            count += 1;
        }
        let memory = Buffer::zeroed(count as usize * page_floats(head_dim, value_dim))?;
        Ok(Self { n_keys, head_dim, value_dim, slots, place, memory })
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
    /// The first NaN or infinity, if `check_finite`; the page is then only partly written.
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
        let d = self.head_dim;
        let n_rows = keys_in_page(page, self.n_keys);
        let k = self.page_mut(page).0;
        for_each_row(page, n_rows, rows, d, dtype, check_finite, |key, row| {
            let (panel, t) = (key / PANEL_KEYS, key % PANEL_KEYS);
            let panel = &mut k[panel * PANEL_KEYS * d..][..PANEL_KEYS * d];
            for (column, value) in panel.chunks_exact_mut(PANEL_KEYS).zip(row) {
                column[t] = *value;
            }
        })
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
        let dv = self.value_dim;
        let columns = padded_columns(dv);
        let n_rows = keys_in_page(page, self.n_keys);
        let v = self.page_mut(page).1;
        for_each_row(page, n_rows, rows, dv, dtype, check_finite, |key, row| {
            for (i, part) in row.chunks(PANEL_COLUMNS).enumerate() {
                let width = (columns - i * PANEL_COLUMNS).min(PANEL_COLUMNS);
                let at = i * PANEL_COLUMNS * PAGE_KEYS + key * width;
                v[at..at + part.len()].copy_from_slice(part);
            }
        })
    }

    /// The K panels and the V panels of a resident page.
    pub(crate) fn page(&self, page: usize) -> Option<(&[f32], &[f32])> {
        let place = *self.place.get(page).filter(|place| **place != ABSENT)?;
        let size = page_floats(self.head_dim, self.value_dim);
        Some(self.memory[place as usize * size..][..size].split_at(PAGE_KEYS * self.head_dim))
    }

    fn page_mut(&mut self, page: usize) -> (&mut [f32], &mut [f32]) {
        let place = self.place.get(page).copied().filter(|place| *place != ABSENT);
        let Some(place) = place else { panic!("page {page} is not in slots {:?}", self.slots) };
        let size = page_floats(self.head_dim, self.value_dim);
        self.memory[place as usize * size..][..size].split_at_mut(PAGE_KEYS * self.head_dim)
    }
}

fn for_each_row(
    page: usize,
    n_rows: usize,
    rows: &[u8],
    dim: usize,
    dtype: Dtype,
    check_finite: bool,
    mut store: impl FnMut(usize, &[f32]),
) -> Result<(), NonFinite> {
    let stride = dim * dtype.size();
    assert_eq!(rows.len(), n_rows * stride, "bytes of the {n_rows} rows of page {page}");
    let mut values = vec![0.0; dim];
    for (key, row) in rows.chunks_exact(stride).enumerate() {
        widen(row, dtype, &mut values);
        if check_finite && let Some(dim) = first_non_finite(&values) {
            return Err(NonFinite { token: page * PAGE_KEYS + key, dim, value: values[dim] });
        }
        store(key, &values);
    }
    Ok(())
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
    fn only_pages_of_the_slots_are_resident() {
        let kv = KvHead::new(256 * 8, 1, 1, 0..16).unwrap();
        let resident: Vec<usize> = (0..8).filter(|p| kv.page(*p).is_some()).collect();
        assert_eq!(resident, [0, 4]);
        assert_eq!(KvHead::bytes_needed(256 * 8, 1, 1, &(0..16)), 2 * 256 * 17 * 4);
    }

    #[test]
    fn the_first_non_finite_value_is_named() {
        let mut kv = KvHead::new(512, 2, 2, 0..64).unwrap();
        let mut rows = vec![0.5_f32; 512];
        rows[2 * 17 + 1] = f32::NAN;
        let found = kv.write_k(1, &bytes(&rows), Dtype::F32, true).unwrap_err();
        assert_eq!((found.token, found.dim), (256 + 17, 1));
        assert!(kv.write_k(1, &bytes(&rows), Dtype::F32, false).is_ok());
    }
}
