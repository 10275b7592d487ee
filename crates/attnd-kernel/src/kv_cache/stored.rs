//! Pages as they are stored, for a sequence of the same layout elsewhere: bytes that are moved and never computed with, so whoever gets
//! them has the same elements, bit for bit, whatever they are stored as.

use super::{AppendError, KvCache, Written};
use crate::pages::{KvView, PageLayout, PageView};
use crate::shape::MAX_KEYS;
use crate::slot::PAGE_KEYS;

impl PageLayout {
    /// Bytes of a page as it is stored: words of 32 bits, little-endian.
    pub fn stored_bytes(&self) -> usize {
        self.page_words() * size_of::<f32>()
    }
}

impl KvView {
    /// Puts a page as it is stored behind `bytes`: [`PageLayout::stored_bytes`] of it. `false` if it isn't resident. Rows behind the
    /// view's last token are what the page happens to have there.
    pub fn stored_page(&self, page: usize, bytes: &mut Vec<u8>) -> bool {
        let Some(PageView { k, v, key_scales, value_scales }) = self.page(page) else { return false };
        // In the order in which they lie in memory.
        for part in [key_scales, value_scales, k, v] {
            let from = bytes.len();
            bytes.resize(from + size_of_val(part), 0);
            for (raw, word) in bytes[from..].as_chunks_mut().0.iter_mut().zip(part) {
                *raw = word.to_bits().to_le_bytes();
            }
        }
        true
    }
}

impl KvCache {
    /// Writes a page as [`KvView::stored_page`] gave it, in the place of what is there of it. It has keys and values up to position
    /// `end`, which are part of the sequence once [`Self::commit`] says so.
    ///
    /// # Errors
    /// That there is no memory for it, or that the sequence would be too long. All rows that aren't committed are then gone.
    ///
    /// # Panics
    /// If it isn't the page of [`Self::next_key`] and of [`Self::next_value`], `end` isn't behind these and in it, or `bytes` aren't
    /// as many as a page has.
    pub fn put_page(&mut self, page: usize, end: usize, bytes: &[u8]) -> Result<(), AppendError> {
        let next = [self.next_key(), self.next_value()];
        let is_next = next.iter().all(|next| next.is_some_and(|at| at / PAGE_KEYS == page && at < end));
        assert!(is_next && end <= (page + 1) * PAGE_KEYS, "page {page} to {end} where {next:?} is next");
        assert_eq!(bytes.len(), self.layout.stored_bytes(), "bytes of a page");
        if end > MAX_KEYS {
            self.forget_uncommitted();
            return Err(AppendError::TooLong { len: end });
        }
        match self.page_mut(page) {
            Ok(memory) => {
                for (word, raw) in memory.iter_mut().zip(bytes.as_chunks().0) {
                    *word = f32::from_bits(u32::from_le_bytes(*raw));
                }
                self.written = Written { keys: end, values: end };
                Ok(())
            }
            Err(refused) => {
                self.forget_uncommitted();
                Err(refused.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Arena;
    use crate::dtype::Dtype;
    use crate::storage::Storage;

    /// Rows that depend on their positions and on `seed`.
    fn grow(cache: &mut KvCache, len: usize, seed: usize) {
        let PageLayout { head_dim, value_dim, .. } = cache.layout();
        let owned: Vec<usize> = (cache.len()..len).filter(|at| cache.owns(at / PAGE_KEYS)).collect();
        let rows = |dim: usize, salt: usize| -> Vec<u8> {
            let of = |at: &usize| {
                let at = *at;
                (0..dim).map(move |x| ((at * 31 + x * 7 + salt + seed) % 509) as f32 / 8.0 - 31.0)
            };
            owned.iter().flat_map(of).flat_map(f32::to_le_bytes).collect()
        };
        if let Some(first) = owned.first() {
            cache.append_k(*first, &rows(head_dim, 0), Dtype::F32, true).unwrap();
            cache.append_v(*first, &rows(value_dim, 3), Dtype::F32, true).unwrap();
        }
        cache.commit(len);
    }

    fn pages(cache: &KvCache) -> Vec<(usize, Vec<u8>)> {
        let view = cache.view(cache.len()).unwrap();
        let pages = (0..cache.len().div_ceil(PAGE_KEYS)).filter_map(|page| {
            let mut bytes = vec![7];
            view.stored_page(page, &mut bytes).then(|| (page, bytes.split_off(1)))
        });
        pages.collect()
    }

    fn put_all(from: &KvCache, to: &mut KvCache, first: usize) {
        for (page, bytes) in pages(from).into_iter().filter(|(page, _)| *page >= first) {
            to.put_page(page, from.len().min((page + 1) * PAGE_KEYS), &bytes).unwrap();
        }
        to.commit(from.len());
    }

    const STORAGES: [Storage; 5] = [Storage::F32, Storage::F16, Storage::Bf16, Storage::Int8, Storage::Int4];

    #[test]
    fn a_sequence_of_copied_pages_goes_on_with_the_same_bytes() {
        for storage in STORAGES {
            let layout = PageLayout { storage, head_dim: 3, value_dim: 18 };
            for slots in [0..64, 16..40] {
                let (arena, other) = (Arena::new(), Arena::new());
                let mut source = KvCache::new(&arena, layout, slots.clone());
                grow(&mut source, if cfg!(miri) { 300 } else { 1300 }, 0);
                let mut copy = KvCache::new(&other, layout, slots.clone());
                put_all(&source, &mut copy, 0);
                assert_eq!((copy.len(), copy.bytes()), (source.len(), source.bytes()));
                assert!(pages(&copy) == pages(&source), "{storage} {slots:?}");
                // Both grow alike, also inside of words that several rows share.
                for cache in [&mut source, &mut copy] {
                    grow(cache, cache.len() + 70, 5);
                }
                assert!(pages(&copy) == pages(&source), "{storage} {slots:?}");
                // What came later comes alone, from the page on in which it begins.
                let (len, before) = (source.len(), pages(&copy));
                grow(&mut source, len + 300, 9);
                let fork = copy.fork();
                put_all(&source, &mut copy, len / PAGE_KEYS);
                assert!(pages(&copy) == pages(&source), "{storage} {slots:?}");
                assert!(pages(&fork) == before, "a fork has what it had");
            }
        }
    }

    #[test]
    fn bits_that_are_no_numbers_arrive() {
        let layout = PageLayout { storage: Storage::F32, head_dim: 1, value_dim: 1 };
        let mut cache = KvCache::new(&Arena::new(), layout, 0..64);
        let bytes: Vec<u8> =
            (0..layout.stored_bytes() / 4).flat_map(|i| (0x7f80_0001_u32 + i as u32).to_le_bytes()).collect();
        cache.put_page(0, 256, &bytes).unwrap();
        cache.commit(256);
        assert!(pages(&cache) == [(0, bytes)]);
    }

    #[test]
    fn what_was_put_and_not_committed_is_gone() {
        let layout = PageLayout { storage: Storage::F32, head_dim: 1, value_dim: 1 };
        let arena = Arena::of_chunks(1 << 10, layout.stored_bytes() as u64 * 2);
        let (mut source, mut copy) =
            (KvCache::new(&Arena::new(), layout, 0..64), KvCache::new(&arena, layout, 0..64));
        grow(&mut source, 700, 0);
        let bytes = pages(&source);
        copy.put_page(0, 256, &bytes[0].1).unwrap();
        copy.put_page(1, 512, &bytes[1].1).unwrap();
        let refused = copy.put_page(2, 700, &bytes[2].1).unwrap_err();
        assert!(matches!(refused, AppendError::OutOfMemory(_)), "{refused}");
        assert_eq!((copy.len(), copy.bytes(), copy.next_key()), (0, 0, Some(0)));
    }

    #[test]
    #[should_panic(expected = "page 1 to 300 where [Some(0), Some(0)] is next")]
    fn pages_come_in_order() {
        let layout = PageLayout { storage: Storage::F32, head_dim: 1, value_dim: 1 };
        let mut cache = KvCache::new(&Arena::new(), layout, 0..64);
        cache.put_page(1, 300, &vec![0; layout.stored_bytes()]).unwrap();
    }
}
