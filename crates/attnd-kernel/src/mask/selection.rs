//! Masks that are no interval of keys: a bit for each of the 256 keys of a page.

use std::ops::Range;

use crate::lanes::LANES;
use crate::slot::PAGE_KEYS;

/// What masks single keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Selection {
    /// A bit for each query and key, in the planes of `Side::mask`.
    Dense,
}

/// Which keys of a page a row sees: bit `j % 16` of word `j / 16`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageBits([u16; PAGE_KEYS / LANES]);

impl PageBits {
    /// Every key.
    pub(crate) const WHOLE: Self = Self([u16::MAX; PAGE_KEYS / LANES]);

    /// An interval of keys, counted from the page's first.
    pub(crate) fn of(keys: Range<usize>) -> Self {
        // Bits below `end` of the word that begins at `first`.
        let below = |end: usize, first: usize| ((1_u32 << end.saturating_sub(first).min(LANES)) - 1) as u16;
        let of_word = |word: usize| below(keys.end, word * LANES) & !below(keys.start, word * LANES);
        Self(std::array::from_fn(of_word))
    }

    /// The bits of the 16 keys from `key` on.
    #[inline(always)]
    pub(crate) fn of_vector(&self, key: usize) -> u16 {
        self.0[key / LANES]
    }

    /// Puts the bits of the 16 keys from `key` on.
    #[inline(always)]
    pub(crate) fn put_vector(&mut self, key: usize, bits: u16) {
        self.0[key / LANES] = bits;
    }

    /// Adds one key.
    pub(crate) fn insert(&mut self, key: usize) {
        self.0[key / LANES] |= 1 << (key % LANES);
    }

    pub(crate) fn contains(&self, key: usize) -> bool {
        self.0[key / LANES] >> (key % LANES) & 1 == 1
    }

    /// The keys of both.
    pub(crate) fn and(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] & other.0[word]))
    }

    /// The keys of either.
    pub(crate) fn or(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] | other.0[word]))
    }

    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whole vectors around all keys; empty if there are none.
    pub(crate) fn vectors(&self) -> Range<usize> {
        let first = self.0.iter().position(|word| *word != 0).unwrap_or(0);
        let end = self.0.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
        first * LANES..end * LANES
    }

    /// The keys, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = usize> {
        self.0.iter().enumerate().flat_map(|(vector, bits)| {
            let mut left = *bits;
            std::iter::from_fn(move || {
                let lane = left.trailing_zeros() as usize;
                // Clears the lowest bit that is set.
                left &= left.checked_sub(1)?;
                Some(vector * LANES + lane)
            })
        })
    }

    /// Runs of neighbouring keys, ascending.
    pub(crate) fn runs(&self) -> impl Iterator<Item = Range<usize>> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let start = (from..PAGE_KEYS).find(|key| self.contains(*key))?;
            from = (start..PAGE_KEYS).find(|key| !self.contains(*key)).unwrap_or(PAGE_KEYS);
            Some(start..from)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_those_of_the_interval() {
        for (start, end) in [(0, 0), (0, 1), (15, 16), (15, 17), (3, 250), (0, 256), (255, 256), (40, 20)] {
            let bits = PageBits::of(start..end);
            for key in 0..PAGE_KEYS {
                assert_eq!(bits.contains(key), (start..end).contains(&key), "{key} of {start}..{end}");
            }
            let runs: Vec<_> = bits.runs().collect();
            let one = start..end;
            assert_eq!(runs, if one.is_empty() { vec![] } else { vec![one] });
        }
        assert_eq!(PageBits::of(0..256), PageBits::WHOLE);
    }

    #[test]
    fn runs_and_vectors_cover_the_keys_and_nothing_else() {
        let mut bits = PageBits::default();
        for key in [33, 34, 40, 47, 48, 49, 255] {
            bits.insert(key);
        }
        assert_eq!(bits.runs().collect::<Vec<_>>(), [33..35, 40..41, 47..50, 255..256]);
        assert_eq!(bits.vectors(), 32..256);
        assert_eq!(bits.iter().collect::<Vec<_>>(), [33, 34, 40, 47, 48, 49, 255]);
        assert_eq!(bits.and(&PageBits::of(34..48)).vectors(), 32..48);
        assert!(bits.and(&PageBits::of(0..33)).is_empty());
        assert_eq!(PageBits::default().vectors(), 0..0);
    }
}
