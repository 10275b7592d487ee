//! Fills the panels of a page from rows as somebody sent them: `[keys, dim]`, little-endian.
//!
//! Keys are transposed 16 at a time, which writes whole cache lines: an element alone would write to a line of its own, 64
//! words after that of its neighbour. Values are rows in their panels already. Elements that are stored as they were sent
//! are moved and not decoded: the bytes of a key are its words.

use crate::dispatch::Kernels;
use crate::dtype::{Dtype, are_finite, first_non_finite, widen};
use crate::lanes::{LANES, Lanes};
use crate::pages::{NonFinite, PANEL_COLUMNS, PANEL_KEYS, padded_columns};
use crate::quantise::quantise;
use crate::slot::PAGE_KEYS;
use crate::storage::{Storage, put, round};

/// Rows of consecutive keys of one page.
pub(crate) struct Rows<'a> {
    /// Absolute position of the first.
    first: usize,
    bytes: &'a [u8],
    dim: usize,
    dtype: Dtype,
    check_finite: bool,
}

impl<'a> Rows<'a> {
    /// # Panics
    /// If `bytes` aren't rows of `dim` elements, or more than there are keys behind `first` in its page.
    pub(crate) fn new(
        first: usize,
        bytes: &'a [u8],
        (dim, dtype): (usize, Dtype),
        check_finite: bool,
    ) -> Self {
        let rows = Self { first, bytes, dim, dtype, check_finite };
        assert!(bytes.len().is_multiple_of(rows.stride()), "{} bytes of rows of {dim} {dtype}", bytes.len());
        assert!(rows.first_key() + rows.count() <= PAGE_KEYS, "{} rows from {first} on", rows.count());
        rows
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.bytes.len() / self.stride()
    }

    /// The first key, counted from that of its page.
    fn first_key(&self) -> usize {
        self.first % PAGE_KEYS
    }

    fn stride(&self) -> usize {
        self.dim * self.dtype.size()
    }

    /// Whether `storage` holds elements as they were sent.
    fn are_stored_as_sent(&self, storage: Storage) -> bool {
        storage == self.dtype.into()
    }

    /// Looks for NaN and infinities in rows that are stored as they were sent, if they are looked for at all: `rows` are
    /// those from row `first` on.
    ///
    /// # Errors
    /// The first one.
    fn check(&self, first: usize, rows: &[u8], values: &mut [f32]) -> Result<(), NonFinite> {
        if self.check_finite && !are_finite(rows, self.dtype) {
            for row in first..first + rows.len() / self.stride() {
                self.decode(row, self.dtype.into(), values)?;
            }
        }
        Ok(())
    }

    /// Decodes row `row`, rounded to what `storage` holds; returns the scale of integers.
    ///
    /// # Errors
    /// Its first NaN or infinity, if they are looked for or are nothing that can be stored.
    fn decode(&self, row: usize, storage: Storage, values: &mut [f32]) -> Result<Option<f32>, NonFinite> {
        widen(&self.bytes[row * self.stride()..][..self.stride()], self.dtype, values);
        if !self.are_stored_as_sent(storage) {
            round(values, storage);
        }
        match first_non_finite(values).filter(|_| self.check_finite || storage.has_scales()) {
            Some(dim) => Err(NonFinite { token: self.first + row, dim, value: values[dim] }),
            None => Ok(storage.has_scales().then(|| quantise(values, storage))),
        }
    }

    /// Stores rows as keys in the K panels of their page, `[panel][word of a key][64]`, and their scales, if they have any.
    ///
    /// # Errors
    /// The first NaN or infinity, if they are looked for or can't be stored; rows after it are then partly stored.
    pub(crate) fn store_keys(
        &self,
        storage: Storage,
        panels: &mut [f32],
        scales: &mut [f32],
    ) -> Result<(), NonFinite> {
        let kernels = Kernels::chosen();
        let (stride, per_word) = (self.stride(), storage.per_word());
        let words = self.dim.div_ceil(per_word);
        let as_sent = self.are_stored_as_sent(storage);
        let is_whole_words = cfg!(target_endian = "little") && stride == words * size_of::<f32>();
        let mut values = vec![0.0; self.dim];
        let mut staged = vec![0.0; LANES.min(self.count()) * words];
        let mut first = 0;
        while first < self.count() {
            // Whole vectors of keys where they begin and end with one.
            let key = self.first_key() + first;
            let n_rows = (LANES - key % LANES).min(self.count() - first);
            let rows = &self.bytes[first * stride..][..n_rows * stride];
            let (panel, at) = (key / PANEL_KEYS, key % PANEL_KEYS);
            let panel = &mut panels[panel * PANEL_KEYS * words..][..PANEL_KEYS * words];
            if as_sent && is_whole_words && n_rows == LANES {
                let are_f32_and_finite =
                    kernels.transpose_bytes(rows, words, panel, at) && storage == Storage::F32;
                if !are_f32_and_finite {
                    self.check(first, rows, &mut values)?;
                }
                first += n_rows;
                continue;
            }
            if as_sent {
                self.check(first, rows, &mut values)?;
            }
            for (i, staged) in staged.chunks_exact_mut(words).take(n_rows).enumerate() {
                if as_sent {
                    put_bytes(staged, &rows[i * stride..][..stride]);
                    continue;
                }
                if let Some(scale) = self.decode(first + i, storage, &mut values)? {
                    scales[key + i] = scale;
                }
                for (word, values) in staged.iter_mut().zip(values.chunks(per_word)) {
                    for (at, value) in values.iter().enumerate() {
                        put(word, at, *value, storage);
                    }
                }
            }
            if n_rows == LANES {
                kernels.transpose_words(&staged, words, panel, at);
            } else {
                // A line has the same word of all of them.
                for (x, line) in panel.chunks_exact_mut(PANEL_KEYS).enumerate() {
                    for (to, row) in line[at..].iter_mut().zip(staged.chunks_exact(words).take(n_rows)) {
                        *to = row[x];
                    }
                }
            }
            first += n_rows;
        }
        Ok(())
    }

    /// Stores rows as values in the V panels of their page, `[panel][word of keys][columns of the panel]`, and their scales,
    /// if they have any.
    ///
    /// # Errors
    /// The first NaN or infinity, if they are looked for or can't be stored; rows after it are not stored.
    pub(crate) fn store_values(
        &self,
        storage: Storage,
        panels: &mut [f32],
        scales: &mut [f32],
    ) -> Result<(), NonFinite> {
        let (columns, per_word) = (padded_columns(self.dim), storage.per_word());
        let mut values = vec![0.0; self.dim];
        for (row_number, row) in self.bytes.chunks_exact(self.stride()).enumerate() {
            let (key, as_sent) = (self.first_key() + row_number, self.are_stored_as_sent(storage));
            if as_sent {
                self.check(row_number, row, &mut values)?;
            } else if let Some(scale) = self.decode(row_number, storage, &mut values)? {
                scales[key] = scale;
            }
            for first in (0..self.dim).step_by(PANEL_COLUMNS) {
                let width = PANEL_COLUMNS.min(columns - first);
                let to = &mut panels[first * PAGE_KEYS / per_word + key / per_word * width..][..width];
                if as_sent {
                    put_sent(to, key % per_word, &row[first * self.dtype.size()..], self.dtype);
                } else {
                    for (word, value) in to.iter_mut().zip(&values[first..]) {
                        put(word, key % per_word, *value, storage);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Makes words of consecutive elements as they were sent: the earlier one of a word is in its lower bits and came first.
/// What the last word has room for beyond them is zeros.
fn put_bytes(words: &mut [f32], bytes: &[u8]) {
    let (whole, rest) = bytes.as_chunks();
    for (word, raw) in words.iter_mut().zip(whole) {
        *word = f32::from_bits(u32::from_le_bytes(*raw));
    }
    if let (Some(word), [low, high]) = (words.get_mut(whole.len()), rest) {
        *word = f32::from_bits(u16::from_le_bytes([*low, *high]).into());
    }
}

/// Puts elements as they were sent at place `at` of a word each, and leaves the others of the words; the elements that there
/// are no words for are left out.
fn put_sent(words: &mut [f32], at: usize, bytes: &[u8], dtype: Dtype) {
    match dtype {
        Dtype::F32 => {
            for (word, raw) in words.iter_mut().zip(bytes.as_chunks().0) {
                *word = f32::from_bits(u32::from_le_bytes(*raw));
            }
        }
        Dtype::F16 | Dtype::Bf16 => {
            let shift = 16 * at as u32;
            let kept = !(0xffff << shift);
            for (word, raw) in words.iter_mut().zip(bytes.as_chunks().0) {
                let element = u32::from(u16::from_le_bytes(*raw)) << shift;
                *word = f32::from_bits(word.to_bits() & kept | element);
            }
        }
    }
}

/// Transposes 16 rows of `width` words into a K panel: word `x` of row `r` becomes `panel[64 x + first + r]`. Whether each
/// word is a finite number, read as f32.
///
/// # Safety
/// The ISA of `L` is enabled. `rows` is valid for reading `16 * width` words, at any alignment.
///
/// # Panics
/// If the rows don't fit into the panel.
#[inline(always)]
pub(crate) unsafe fn transpose_rows<L: Lanes>(
    rows: *const f32,
    width: usize,
    panel: &mut [f32],
    first: usize,
) -> bool {
    assert!(panel.len() == PANEL_KEYS * width && first + LANES <= PANEL_KEYS);
    let whole = width / LANES * LANES;
    // SAFETY: x + i < width and first + 16 <= 64, so what is read lies in `rows`, and what is written in `panel`.
    unsafe {
        // A finite number times 0 is 0; NaN and the infinities make NaN, which stays.
        let mut zeros = L::zero();
        for x in (0..whole).step_by(LANES) {
            let mut vectors = [L::zero(); LANES];
            for i in 0..LANES {
                vectors[i] = L::load(rows.add(i * width + x));
                zeros = L::add(zeros, L::mul(vectors[i], L::zero()));
            }
            let vectors = L::transpose(vectors);
            for i in 0..LANES {
                L::store(panel.as_mut_ptr().add((x + i) * PANEL_KEYS + first), vectors[i]);
            }
        }
        let mut are_finite = L::halving_sum(zeros) == 0.0;
        for x in whole..width {
            for i in 0..LANES {
                let word = rows.add(i * width + x).read_unaligned();
                are_finite &= word.is_finite();
                panel[x * PANEL_KEYS + first + i] = word;
            }
        }
        are_finite
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::pages::KvHead;
    use crate::slot::{keys_in_page, n_pages};

    #[test]
    fn every_isa_transposes_any_width_and_sees_each_word_that_is_no_number() {
        for kernels in Kernels::available() {
            let widths: &[usize] = if cfg!(miri) { &[1, 17] } else { &[1, 15, 16, 17, 40, 64] };
            for width in widths.iter().copied() {
                let mut rows: Vec<f32> = (0..16 * width).map(|i| i as f32 - 7.0).collect();
                let mut panel = vec![-1.0; 64 * width];
                assert!(kernels.transpose_words(&rows, width, &mut panel, 32), "{kernels:?}");
                for x in 0..width {
                    for key in 0..64 {
                        let expected =
                            if (32..48).contains(&key) { rows[(key - 32) * width + x] } else { -1.0 };
                        assert_eq!(panel[x * 64 + key], expected, "{kernels:?} width {width} [{key}][{x}]");
                    }
                }
                for at in [0, width - 1, 8 * width, 16 * width - 1] {
                    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7fa0_0000)] {
                        let kept = std::mem::replace(&mut rows[at], bad);
                        assert!(!kernels.transpose_words(&rows, width, &mut panel, 0), "{kernels:?} {at}");
                        rows[at] = kept;
                    }
                }
            }
        }
    }

    #[test]
    fn elements_stored_as_they_were_sent_are_those_that_f32_rounds_to() {
        for (dtype, of_f32) in [
            (Dtype::F32, f32::to_bits as fn(f32) -> u32),
            (Dtype::F16, |x| f16::from_f32(x).to_bits().into()),
            (Dtype::Bf16, |x| bf16::from_f32(x).to_bits().into()),
        ] {
            let shapes: &[_] = if cfg!(miri) {
                &[(17, 18, 3), (3, 1, 65)]
            } else {
                &[(300, 40, 70), (287, 33, 65), (17, 1, 1)]
            };
            for (n_keys, d, dv) in shapes.iter().copied() {
                let mut as_sent = KvHead::with_storage(n_keys, d, dv, 0..64, dtype.into()).unwrap();
                let mut rounded = KvHead::with_storage(n_keys, d, dv, 0..64, dtype.into()).unwrap();
                for page in 0..n_pages(n_keys) {
                    for (dim, is_key) in [(d, true), (dv, false)] {
                        // Signed zeros and subnormals of every type among them.
                        let value = |i: usize| {
                            ((i * 37 % 101) as f32 - 50.0) * 2.0_f32.powi((i % 31) as i32 * 9 - 140)
                        };
                        let values: Vec<f32> = (0..keys_in_page(page, n_keys) * dim).map(value).collect();
                        let floats: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                        let element = |x: &f32| of_f32(*x).to_le_bytes().into_iter().take(dtype.size());
                        let elements: Vec<u8> = values.iter().flat_map(element).collect();
                        for (kv, rows, dtype) in
                            [(&mut as_sent, &elements, dtype), (&mut rounded, &floats, Dtype::F32)]
                        {
                            let write = if is_key { KvHead::write_k } else { KvHead::write_v };
                            write(kv, page, rows, dtype, false).unwrap();
                        }
                    }
                    let [a, b] = [&as_sent, &rounded].map(|kv| kv.page(page).unwrap());
                    let bits = |words: &[f32]| words.iter().map(|word| word.to_bits()).collect::<Vec<u32>>();
                    assert!(bits(a.k) == bits(b.k), "{dtype} {n_keys} keys of {d}");
                    assert!(bits(a.v) == bits(b.v), "{dtype} {n_keys} values of {dv}");
                }
            }
        }
    }

    #[test]
    fn a_bad_element_is_named_in_every_type_and_place() {
        for (dtype, bad, one) in [
            (Dtype::F32, f32::NEG_INFINITY.to_le_bytes().to_vec(), 1.0_f32.to_le_bytes().to_vec()),
            (Dtype::F16, f16::NEG_INFINITY.to_le_bytes().to_vec(), f16::ONE.to_le_bytes().to_vec()),
            (Dtype::Bf16, bf16::NEG_INFINITY.to_le_bytes().to_vec(), bf16::ONE.to_le_bytes().to_vec()),
        ] {
            for dim in [3, 6].into_iter().take(if cfg!(miri) { 1 } else { 2 }) {
                let places = [(256, 0), (256 + 15, dim - 1), (256 + 16, 1), (256 + 42, 2)];
                for (token, at) in places.into_iter().take(if cfg!(miri) { 2 } else { 4 }) {
                    // A later one, which is not the first.
                    let place = (token - 256) * dim + at;
                    let element = |i| if i == place || i == 43 * dim - 1 { bad.clone() } else { one.clone() };
                    let rows: Vec<u8> = (0..43 * dim).flat_map(element).collect();
                    let mut kv = KvHead::with_storage(299, dim, dim, 0..64, dtype.into()).unwrap();
                    let expected = Err(NonFinite { token, dim: at, value: f32::NEG_INFINITY });
                    assert_eq!(kv.write_k(1, &rows, dtype, true), expected, "{dtype} {dim}");
                    assert_eq!(kv.write_v(1, &rows, dtype, true), expected, "{dtype} {dim}");
                    assert_eq!(kv.write_k(1, &rows, dtype, false), Ok(()));
                    assert_eq!(kv.write_v(1, &rows, dtype, false), Ok(()));
                }
            }
        }
    }

    #[test]
    fn bytes_are_transposed_at_any_alignment() {
        if cfg!(target_endian = "little") {
            let words: Vec<f32> = (0..16 * 20).map(|i| i as f32).collect();
            for kernels in Kernels::available() {
                for shift in 0..4 {
                    let mut bytes = vec![0xff; shift];
                    bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
                    let (mut expected, mut got) = (vec![0.0; 64 * 20], vec![0.0; 64 * 20]);
                    kernels.transpose_words(&words, 20, &mut expected, 16);
                    assert!(kernels.transpose_bytes(&bytes[shift..], 20, &mut got, 16));
                    assert_eq!(got, expected, "{kernels:?} {shift}");
                }
            }
        }
    }
}
