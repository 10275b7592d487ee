//! Checksums of pages that are full. Whoever has sequences says how they are made, and looks now and then whether pages still have them:
//! memory forgets, and nothing else would tell.
//!
//! A checksum lies beside its page, so forks and views have it, too. Whoever writes to a page takes it away, and a copy has none before it
//! gets its own: what is changed on purpose is never taken for damage.

use super::KvCache;
use crate::pages::KvView;
use crate::slot::PAGE_KEYS;

impl KvCache {
    /// Gives a checksum to those pages with rows from position `from` on, committed or not, that are full and have none.
    pub fn seal(&self, from: usize, sum: impl Fn(&[f32]) -> u32) {
        let full = self.written.keys.min(self.written.values) / PAGE_KEYS;
        for frame in (from / PAGE_KEYS..full).filter_map(|page| self.table.get(page)?.as_ref()) {
            if frame.sum().is_none() {
                frame.set_sum(sum(frame));
            }
        }
    }

    /// Whether a page has the words that it had when it got its checksum; `None` if it has none, or isn't resident.
    pub fn is_sound(&self, page: usize, sum: impl Fn(&[f32]) -> u32) -> Option<bool> {
        let frame = self.table.get(page)?.as_ref()?;
        frame.sum().map(|known| known == sum(frame))
    }

    /// Changes one bit of a page as failing memory does, behind the back of its checksum: for tests of whoever looks at these. `false` if
    /// the page isn't resident, or others hold it.
    pub fn damage(&mut self, page: usize, word: usize, bit: u32) -> bool {
        use std::sync::Arc;
        let table = Arc::get_mut(&mut self.table);
        let Some(frame) = table.and_then(|table| table.get_mut(page)?.as_mut()).and_then(Arc::get_mut) else {
            return false;
        };
        let sum = frame.sum();
        let Some(word) = frame.get_mut(word) else { return false };
        *word = f32::from_bits(word.to_bits() ^ 1_u32.rotate_left(bit));
        if let Some(sum) = sum {
            frame.set_sum(sum);
        }
        true
    }
}

impl KvView {
    /// As [`KvCache::is_sound`]; `None` also for what isn't part of a sequence that grows.
    pub fn is_sound(&self, page: usize, sum: impl Fn(&[f32]) -> u32) -> Option<bool> {
        let frame = self.frame(page)?;
        frame.sum().map(|known| known == sum(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Arena;
    use crate::dtype::Dtype;
    use crate::pages::PageLayout;
    use crate::storage::Storage;

    fn sum(words: &[f32]) -> u32 {
        words.iter().fold(7, |sum: u32, word| sum.rotate_left(5) ^ word.to_bits())
    }

    fn grow(cache: &mut KvCache, len: usize, value: f32) {
        let rows: Vec<u8> = (cache.len()..len).flat_map(|_| value.to_le_bytes()).collect();
        let from = cache.len();
        cache.append_k(from, &rows, Dtype::F32, true).unwrap();
        cache.seal(from, sum);
        cache.append_v(from, &rows, Dtype::F32, true).unwrap();
        cache.seal(from, sum);
        cache.commit(len);
    }

    fn sound(cache: &KvCache) -> Vec<Option<bool>> {
        (0..4).map(|page| cache.is_sound(page, sum)).collect()
    }

    fn cache() -> KvCache {
        KvCache::new(&Arena::new(), PageLayout { storage: Storage::F32, head_dim: 1, value_dim: 1 }, 0..64)
    }

    #[test]
    fn full_pages_have_checksums_and_keep_them_in_forks() {
        let mut cache = cache();
        grow(&mut cache, 255, 1.0);
        assert_eq!(sound(&cache), [None, None, None, None]);
        grow(&mut cache, 600, 2.0);
        assert_eq!(sound(&cache), [Some(true), Some(true), None, None]);
        let mut fork = cache.fork();
        grow(&mut fork, 800, 3.0);
        assert_eq!(sound(&fork), [Some(true), Some(true), Some(true), None]);
        assert_eq!(sound(&cache), [Some(true), Some(true), None, None]);
        assert_eq!(cache.view(600).unwrap().is_sound(1, sum), Some(true));
    }

    #[test]
    fn what_is_written_to_has_no_checksum_before_it_is_full_again() {
        for is_held in [false, true] {
            let mut cache = cache();
            grow(&mut cache, 512, 1.0);
            let fork = is_held.then(|| cache.fork());
            cache.truncate(300);
            assert_eq!(sound(&cache), [Some(true), Some(true), None, None]);
            grow(&mut cache, 301, 5.0);
            assert_eq!(sound(&cache), [Some(true), None, None, None]);
            grow(&mut cache, 520, 6.0);
            assert_eq!(sound(&cache), [Some(true), Some(true), None, None]);
            if let Some(fork) = fork {
                assert_eq!(sound(&fork), [Some(true), Some(true), None, None]);
            }
        }
    }

    #[test]
    fn one_bit_is_enough() {
        let mut cache = cache();
        grow(&mut cache, 512, 1.0);
        let fork = cache.fork();
        assert!(!cache.damage(1, 9, 3), "a fork holds it");
        drop(fork);
        assert!(cache.damage(1, 9, 3) && !cache.damage(2, 9, 3));
        assert_eq!(sound(&cache), [Some(true), Some(false), None, None]);
        assert_eq!(cache.view(512).unwrap().is_sound(1, sum), Some(false));
        assert!(cache.damage(1, 9, 3));
        assert_eq!(sound(&cache), [Some(true), Some(true), None, None]);
    }
}
