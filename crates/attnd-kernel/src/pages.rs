//! Resident keys and values of one kv head, stored in the order the kernels consume them.
//!
//! A page of 256 keys is one run of memory, so that a kernel walks one forward-moving address:
//! * where elements are integers, the scales of the 256 keys, and those of the 256 values;
//! * four K panels of 64 keys; in a panel, dimension `x` of key `t` is at `x * 64 + t` (K transposed);
//! * V panels of 64 columns (the last one narrower, in steps of 16); in a panel of width `w` column `c` of key `j`
//!   is at `j * w + c`.
//!
//! With narrower elements a place in a panel is a word that holds several of them: of 16 bits dimensions `2 x` and `2 x + 1`
//! of a key, keys `2 j` and `2 j + 1` of a column; of 8 bits four, of 4 bits eight. What a key's last word has room for
//! beyond its dimensions is zeros.
//!
//! Values are padded to 16 columns with zeros. Keys of a page that were not written yet are zeros; they never influence a
//! result, whatever they are.

use std::ops::{Deref, Range};
use std::sync::Arc;

use crate::arena::{Frame, bytes_of_frames};
use crate::buffer::{Buffer, OutOfMemory};
use crate::dtype::Dtype;
use crate::fill::Rows;
use crate::shape::MAX_DIM;
use crate::slot::{PAGE_KEYS, keys_in_page, n_pages, slot_of_page};
use crate::storage::Storage;

/// Keys in a K panel.
pub(crate) const PANEL_KEYS: usize = 64;
/// Columns in a full V panel.
pub(crate) const PANEL_COLUMNS: usize = 64;
/// Values are padded to a multiple of this many columns.
pub(crate) const COLUMN_STEP: usize = 16;

pub(crate) const ABSENT: u32 = u32::MAX;

/// What the pages of a kv head are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageLayout {
    /// How elements are stored.
    pub storage: Storage,
    /// Elements of a key as it is resident: [`crate::Operator::key_dim`].
    pub head_dim: usize,
    /// Elements of a value.
    pub value_dim: usize,
}

/// Keys and values of one kv head that kernels read: those of a sequence of some length, in the pages of a range of slots.
/// [`KvHead`] is one that is written page by page; [`crate::KvCache`] grows, and gives out views of itself at any length.
#[derive(Debug)]
pub struct KvView {
    layout: PageLayout,
    n_keys: usize,
    slots: Range<usize>,
    pages: Pages,
}

/// Where the pages of a sequence are.
#[derive(Debug)]
enum Pages {
    /// In one run of memory: where each page lies in it, in pages.
    Whole { place: Vec<u32>, memory: Buffer },
    /// Each in a frame of its own, which others may see too.
    Framed(Arc<PageTable>),
}

/// The frame of each page of a sequence, where it is resident.
pub(crate) type PageTable = Vec<Option<Arc<Frame>>>;

/// Keys and values of one kv head whose sequence has its length from the start.
#[derive(Debug)]
pub struct KvHead(KvView);

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

/// A resident page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageView<'a> {
    /// The K panels, in words.
    pub(crate) k: &'a [f32],
    /// The V panels, in words.
    pub(crate) v: &'a [f32],
    /// What the integers of each key are multiplied by: `[256]`, or empty where elements are floats.
    pub(crate) key_scales: &'a [f32],
    /// The same for each value.
    pub(crate) value_scales: &'a [f32],
}

/// Sizes of the parts of a page, in words.
#[derive(Clone, Copy)]
struct PageWords {
    k: usize,
    v: usize,
    /// Of the keys; the values have as many.
    scales: usize,
}

impl PageWords {
    fn new(head_dim: usize, value_dim: usize, storage: Storage) -> Self {
        let per_word = storage.per_word();
        Self {
            k: PAGE_KEYS * head_dim.div_ceil(per_word),
            v: PAGE_KEYS / per_word * padded_columns(value_dim),
            scales: if storage.has_scales() { PAGE_KEYS } else { 0 },
        }
    }

    fn total(self) -> usize {
        self.k + self.v + 2 * self.scales
    }
}

impl PageLayout {
    /// Words of a page.
    pub(crate) fn page_words(&self) -> usize {
        self.words().total()
    }

    /// Whether there are pages of this kind.
    pub(crate) fn is_possible(&self) -> bool {
        [self.head_dim, self.value_dim].iter().all(|dim| (1..=MAX_DIM).contains(dim))
    }

    /// Memory that `n` pages of [`crate::KvCache`]s take in an [`crate::Arena`], in bytes: their frames, with the share of each in
    /// what is lost of a chunk. An arena takes whole chunks, so this plans, and [`crate::Arena::with_limit`] bounds.
    ///
    /// # Panics
    /// If keys or values have no elements or more than [`MAX_DIM`].
    pub fn resident_bytes(&self, n: usize) -> u64 {
        assert!(self.is_possible(), "elements of {self:?}");
        bytes_of_frames(n, self.page_words())
    }

    fn words(&self) -> PageWords {
        PageWords::new(self.head_dim, self.value_dim, self.storage)
    }

    /// The parts of a page.
    ///
    /// # Panics
    /// If `memory` isn't that of one.
    fn view(self, memory: &[f32]) -> PageView<'_> {
        let words = self.words();
        // Kernels read as many by their addresses.
        assert_eq!(memory.len(), words.total(), "words of a page");
        let (key_scales, memory) = memory.split_at(words.scales);
        let (value_scales, memory) = memory.split_at(words.scales);
        let (k, v) = memory.split_at(words.k);
        PageView { k, v, key_scales, value_scales }
    }

    /// Stores rows as keys or as values of the page whose memory this is.
    ///
    /// # Errors
    /// The first NaN or infinity, if they are looked for or can't be stored; rows after it may be partly stored.
    pub(crate) fn store(self, part: Part, memory: &mut [f32], rows: &Rows<'_>) -> Result<(), NonFinite> {
        let words = self.words();
        let (key_scales, memory) = memory.split_at_mut(words.scales);
        let (value_scales, memory) = memory.split_at_mut(words.scales);
        let (k, v) = memory.split_at_mut(words.k);
        match part {
            Part::Keys => rows.store_keys(self.storage, k, key_scales),
            Part::Values => rows.store_values(self.storage, v, value_scales),
        }
    }

    /// Elements of a row.
    pub(crate) fn dim(&self, part: Part) -> usize {
        match part {
            Part::Keys => self.head_dim,
            Part::Values => self.value_dim,
        }
    }
}

/// One of the two operands that are resident.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Keys,
    Values,
}

pub(crate) fn owned_pages(n_keys: usize, slots: &Range<usize>) -> impl Iterator<Item = usize> {
    (0..n_pages(n_keys)).filter(move |page| slots.contains(&slot_of_page(*page)))
}

impl KvView {
    /// The first `n_keys` tokens of a sequence whose pages are in frames.
    pub(crate) fn of_frames(
        layout: PageLayout,
        n_keys: usize,
        slots: Range<usize>,
        table: Arc<PageTable>,
    ) -> Self {
        Self { layout, n_keys, slots, pages: Pages::Framed(table) }
    }

    /// What the pages are made of.
    pub fn layout(&self) -> PageLayout {
        self.layout
    }
    /// How elements are stored.
    pub fn storage(&self) -> Storage {
        self.layout.storage
    }
    /// Key tokens of the whole sequence, resident here or not. Rows of later ones, where pages have them, are never looked at.
    pub fn n_keys(&self) -> usize {
        self.n_keys
    }
    /// The slots whose pages are resident.
    pub fn slots(&self) -> Range<usize> {
        self.slots.clone()
    }
    pub(crate) fn head_dim(&self) -> usize {
        self.layout.head_dim
    }
    pub(crate) fn value_dim(&self) -> usize {
        self.layout.value_dim
    }

    /// The frame of a page, if it is resident in one.
    pub(crate) fn frame(&self, page: usize) -> Option<&Frame> {
        match &self.pages {
            Pages::Whole { .. } => None,
            Pages::Framed(table) => table.get(page).filter(|_| page < n_pages(self.n_keys))?.as_deref(),
        }
    }

    /// A page, if it is resident.
    pub(crate) fn page(&self, page: usize) -> Option<PageView<'_>> {
        Some(self.layout.view(self.page_memory(page)?))
    }

    /// All words of a page; `None` if it isn't resident.
    pub(crate) fn page_memory(&self, page: usize) -> Option<&[f32]> {
        match &self.pages {
            Pages::Whole { place, memory } => {
                let place = *place.get(page).filter(|place| **place != ABSENT)?;
                let words = self.layout.page_words();
                Some(&memory[place as usize * words..][..words])
            }
            Pages::Framed(_) => self.frame(page).map(|frame| &frame[..]),
        }
    }
}

impl Deref for KvHead {
    type Target = KvView;
    fn deref(&self) -> &KvView {
        &self.0
    }
}

impl KvHead {
    /// Memory that the pages of `slots` take, in bytes.
    pub fn bytes_needed(
        n_keys: usize,
        head_dim: usize,
        value_dim: usize,
        slots: &Range<usize>,
        storage: Storage,
    ) -> u64 {
        let pages = owned_pages(n_keys, slots).count();
        (pages * PageLayout { storage, head_dim, value_dim }.page_words()) as u64 * 4
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
        Self::with_storage(n_keys, head_dim, value_dim, slots, Storage::F32)
    }

    /// As [`Self::new`], with elements stored as `storage`. What is written is rounded to it, to nearest even; kernels
    /// widen it exactly and compute in f32, unless another [`crate::Compute`] is asked for, so that the result has the bits
    /// that f32 storage of the rounded values gives.
    ///
    /// Integers have a scale for each key and for each value: its largest magnitude over 127 (int8) or 7 (int4), rounded up
    /// to 17 or 20 significant bits. What is stored is off by at most half of it.
    ///
    /// # Errors
    /// If the system has no such memory.
    pub fn with_storage(
        n_keys: usize,
        head_dim: usize,
        value_dim: usize,
        slots: Range<usize>,
        storage: Storage,
    ) -> Result<Self, OutOfMemory> {
        let mut place = vec![ABSENT; n_pages(n_keys)];
        let mut count = 0;
        for page in owned_pages(n_keys, &slots) {
            place[page] = count;
            count += 1;
        }
        let layout = PageLayout { storage, head_dim, value_dim };
        let memory = Buffer::zeroed(count as usize * layout.page_words())?;
        Ok(Self(KvView { layout, n_keys, slots, pages: Pages::Whole { place, memory } }))
    }

    /// Stores the keys of one page: `rows` holds `[keys_in_page, head_dim]` elements.
    ///
    /// # Errors
    /// The first NaN or infinity, if `check_finite`, after rounding to the storage type; the page is then only partly
    /// written. Where integers are stored, it is an error in any case, because no integer stands for it.
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
        self.write(Part::Keys, page, rows, dtype, check_finite)
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
        self.write(Part::Values, page, rows, dtype, check_finite)
    }

    fn write(
        &mut self,
        part: Part,
        page: usize,
        rows: &[u8],
        dtype: Dtype,
        check_finite: bool,
    ) -> Result<(), NonFinite> {
        let layout = self.layout;
        let rows = Rows::new(page * PAGE_KEYS, rows, (layout.dim(part), dtype), check_finite);
        assert_eq!(rows.count(), keys_in_page(page, self.n_keys), "rows of page {page}");
        layout.store(part, self.page_mut(page), &rows)
    }

    /// Fills all pages with what must never be used.
    #[cfg(test)]
    pub(crate) fn poison(&mut self, word: f32) {
        for page in owned_pages(self.n_keys, &self.slots()) {
            crate::buffer::fill_by_copies(self.page_mut(page), word);
        }
    }

    fn page_mut(&mut self, page: usize) -> &mut [f32] {
        let KvView { layout, slots, pages, .. } = &mut self.0;
        let found = match pages {
            Pages::Whole { place, memory } => {
                place.get(page).filter(|place| **place != ABSENT).map(|place| (*place as usize, memory))
            }
            // Frames may be seen by others.
            Pages::Framed(_) => None,
        };
        let Some((place, memory)) = found else { panic!("page {page} is not in slots {slots:?}") };
        let words = layout.page_words();
        &mut memory[place * words..][..words]
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
        let PageView { k: keys, v: values, .. } = kv.page(1).unwrap();
        assert_eq!(keys[2 * 64 + 43], k(256 + 43, 2));
        assert_eq!(keys[2 * 64 + 44], 0.0, "never written");
        assert_eq!(values[43 * 64 + 63], k(256 + 43, 63));
        assert_eq!(values[64 * 256 + 43 * 16 + 5], k(256 + 43, 69));
        assert_eq!(values[64 * 256 + 43 * 16 + 6], 0.0, "padding");
    }

    #[test]
    fn two_elements_of_sixteen_bits_share_a_word() {
        for storage in [Storage::Bf16, Storage::F16] {
            let mut kv = KvHead::with_storage(300, 3, 70, 0..64, storage).unwrap();
            let keys: Vec<f32> = (0..256 * 3).map(|i| i as f32 / 4.0 % 50.0).collect();
            kv.write_k(0, &bytes(&keys), Dtype::F32, true).unwrap();
            let values: Vec<f32> = (0..256 * 70).map(|i| (i % 120) as f32).collect();
            kv.write_v(0, &bytes(&values), Dtype::F32, true).unwrap();
            let halves = |word: f32| {
                let half = |bits: u32| match storage {
                    Storage::Bf16 => half::bf16::from_bits(bits as u16).to_f32(),
                    _ => half::f16::from_bits(bits as u16).to_f32(),
                };
                (half(word.to_bits() & 0xffff), half(word.to_bits() >> 16))
            };
            let PageView { k, v, .. } = kv.page(0).unwrap();
            let key = 64 + 7;
            assert_eq!(halves(k[64 * 2 + 7]), (keys[key * 3], keys[key * 3 + 1]));
            assert_eq!(halves(k[64 * 2 + 64 + 7]), (keys[key * 3 + 2], 0.0), "an odd dimension is alone");
            assert_eq!(halves(v[20 * 64 + 9]), (values[40 * 70 + 9], values[41 * 70 + 9]));
            assert_eq!(halves(v[64 * 128 + 20 * 16 + 5]), (values[40 * 70 + 69], values[41 * 70 + 69]));
        }
    }

    #[test]
    fn four_or_eight_integers_share_a_word_and_each_key_and_value_has_a_scale() {
        for (storage, bits, most) in [(Storage::Int8, 8, 127), (Storage::Int4, 4, 7)] {
            let (per_word, d, dv, n_keys) = (32 / bits, 11_usize, 70_usize, 300_usize);
            let mut kv = KvHead::with_storage(n_keys, d, dv, 0..64, storage).unwrap();
            kv.poison(f32::from_bits(0x7fa0_1234));
            // Rows that quantise to themselves: an element of the largest magnitude, and a power of two as scale.
            let scale = |key: usize| 2.0_f32.powi((key % 7) as i32 - 3);
            let integer = |key: usize, x: usize| {
                let n = (key * 31 + x * 17) % (2 * most + 1);
                if x == key % 11 { most as i32 } else { n as i32 - most as i32 }
            };
            for page in 0..2 {
                let keys = page * 256..page * 256 + keys_in_page(page, n_keys);
                let rows = |dim: usize, more: i32| -> Vec<u8> {
                    let row = |key: usize| (0..dim).map(move |x| integer(key, x) as f32 * scale(key));
                    bytes(&keys.clone().flat_map(row).map(|x| x * 2.0_f32.powi(more)).collect::<Vec<_>>())
                };
                kv.write_k(page, &rows(d, 0), Dtype::F32, true).unwrap();
                kv.write_v(page, &rows(dv, 1), Dtype::F32, true).unwrap();
            }
            let in_word =
                |word: f32, at: usize| word.to_bits().cast_signed() << (32 - bits * (at + 1)) >> (32 - bits);
            let PageView { k, v, key_scales, value_scales } = kv.page(1).unwrap();
            let words = d.div_ceil(per_word);
            assert_eq!((k.len(), v.len()), (256 * words, 256 / per_word * 80), "{storage}");
            assert_eq!((key_scales.len(), value_scales.len()), (256, 256));
            for key in 0..44 {
                let token = 256 + key;
                assert_eq!((key_scales[key], value_scales[key]), (scale(token), 2.0 * scale(token)));
                for x in 0..words * per_word {
                    let expected = if x < d { integer(token, x) } else { 0 };
                    assert_eq!(in_word(k[x / per_word * 64 + key], x % per_word), expected, "{storage}");
                }
                for x in 0..dv {
                    let (panel, width) = if x < 64 { (0, 64) } else { (64 * 256 / per_word, 16) };
                    let word = v[panel + key / per_word * width + x % 64];
                    assert_eq!(in_word(word, key % per_word), integer(token, x), "{storage}");
                }
            }
            assert_eq!(key_scales[44].to_bits(), 0x7fa0_1234, "never written");
            assert_eq!(value_scales[44].to_bits(), 0x7fa0_1234, "never written");
        }
    }

    #[test]
    fn integers_never_stand_for_nan_or_infinity() {
        for storage in [Storage::Int8, Storage::Int4] {
            let mut kv = KvHead::with_storage(20, 3, 3, 0..64, storage).unwrap();
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut rows = [0.5_f32; 60];
                rows[17 * 3 + 2] = bad;
                for written in [
                    kv.write_k(0, &bytes(&rows), Dtype::F32, false),
                    kv.write_v(0, &bytes(&rows), Dtype::F32, false),
                ] {
                    let found = written.unwrap_err();
                    assert_eq!((found.token, found.dim), (17, 2));
                    assert_eq!(found.value.to_bits(), bad.to_bits());
                }
            }
        }
    }

    #[test]
    fn what_a_head_needs_is_what_it_takes() {
        for storage in [Storage::F32, Storage::F16, Storage::Bf16, Storage::Int8, Storage::Int4] {
            for (d, dv) in [(1, 1), (3, 70), (9, 16), (128, 128)] {
                let kv = KvHead::with_storage(256 * 9 + 5, d, dv, 0..16, storage).unwrap();
                let needed = KvHead::bytes_needed(256 * 9 + 5, d, dv, &(0..16), storage);
                let Pages::Whole { memory, .. } = &kv.pages else { panic!("a KvHead in frames") };
                assert_eq!(needed, memory.len() as u64 * 4, "{storage} {d} {dv}");
            }
        }
        // d = 128: 8 of every 264 bytes are scales.
        let int8 = KvHead::bytes_needed(256, 128, 128, &(0..64), Storage::Int8);
        assert_eq!(int8, 256 * (128 + 128 + 4 + 4));
        let int4 = KvHead::bytes_needed(256, 128, 128, &(0..64), Storage::Int4);
        assert_eq!(int4, 256 * (64 + 64 + 4 + 4));
    }

    #[test]
    fn what_the_storage_type_cannot_hold_is_refused_or_becomes_infinite() {
        let mut kv = KvHead::with_storage(1, 1, 1, 0..64, Storage::F16).unwrap();
        let found = kv.write_k(0, &bytes(&[70_000.0]), Dtype::F32, true).unwrap_err();
        assert_eq!(found.value, f32::INFINITY);
        assert!(kv.write_k(0, &bytes(&[70_000.0]), Dtype::F32, false).is_ok());
    }

    #[test]
    fn only_pages_of_the_slots_are_resident() {
        let kv = KvHead::new(256 * 8, 1, 1, 0..16).unwrap();
        let resident: Vec<usize> = (0..8).filter(|p| kv.page(*p).is_some()).collect();
        assert_eq!(resident, [0, 4]);
        assert_eq!(KvHead::bytes_needed(256 * 8, 1, 1, &(0..16), Storage::F32), 2 * 256 * 17 * 4);
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
