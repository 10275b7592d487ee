//! Keys as runs, ascending and apart from each other: what a selection that is written down as a list leaves of a row.

use std::ops::Range;

use super::PageBits;
use crate::slot::PAGE_KEYS;

/// The runs of keys that a row sees, as far as one list says.
#[derive(Clone, Copy, Debug)]
pub(crate) enum KeyRuns<'a> {
    /// Blocks of equal size, by number.
    Blocks {
        numbers: &'a [u32],
        /// Keys of a block; the last block may reach past the last key.
        keys: usize,
    },
    /// Of any sizes.
    Ranges(&'a [Range<usize>]),
}

impl KeyRuns<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Blocks { numbers, .. } => numbers.len(),
            Self::Ranges(ranges) => ranges.len(),
        }
    }

    fn run(&self, at: usize) -> Range<usize> {
        match self {
            Self::Blocks { numbers, keys } => {
                let first = (numbers[at] as usize).saturating_mul(*keys);
                first..first.saturating_add(*keys)
            }
            Self::Ranges(ranges) => ranges[at].clone(),
        }
    }

    /// The number of runs that end at a key or before it.
    fn before(&self, key: usize) -> usize {
        match self {
            // Block n ends at (n + 1) * keys.
            Self::Blocks { numbers, keys } => numbers.partition_point(|n| (*n as usize) < key / keys),
            Self::Ranges(ranges) => ranges.partition_point(|range| range.end <= key),
        }
    }

    /// Whether both are the same list in memory.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Blocks { numbers, .. }, Self::Blocks { numbers: others, .. }) => {
                std::ptr::eq(*numbers, *others)
            }
            (Self::Ranges(ranges), Self::Ranges(others)) => std::ptr::eq(*ranges, *others),
            _ => false,
        }
    }

    /// The keys of a page. Costs a search and the runs that reach into the page.
    pub(crate) fn of_page(&self, page: usize) -> PageBits {
        let keys = page * PAGE_KEYS..(page + 1) * PAGE_KEYS;
        let mut bits = PageBits::default();
        for at in self.before(keys.start)..self.len() {
            let run = self.run(at);
            if run.start >= keys.end {
                break;
            }
            let run = run.start.max(keys.start) - keys.start..run.end.min(keys.end) - keys.start;
            if run.len() == 1 {
                bits.insert(run.start);
            } else {
                bits = bits.or(&PageBits::of(run));
            }
        }
        bits
    }

    /// Sets what stands for each page that a run reaches into; runs behind the last page are left out.
    pub(crate) fn mark_pages(&self, pages: &mut [bool]) {
        for at in 0..self.len() {
            let run = self.run(at);
            let end = run.end.div_ceil(PAGE_KEYS).min(pages.len());
            if let Some(pages) = pages.get_mut(run.start / PAGE_KEYS..end) {
                pages.fill(true);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of both kinds of lists, key by key.
    fn check(runs: KeyRuns<'_>, sees: impl Fn(usize) -> bool) {
        let mut marked = [false; 6];
        runs.mark_pages(&mut marked);
        for (page, is_marked) in marked.iter().enumerate() {
            let bits = runs.of_page(page);
            assert_eq!(bits.is_empty(), !is_marked, "page {page} of {runs:?}");
            for key in 0..PAGE_KEYS {
                assert_eq!(
                    bits.contains(key),
                    sees(page * PAGE_KEYS + key),
                    "{key} of page {page}, {runs:?}"
                );
            }
        }
    }

    #[test]
    fn pages_hold_the_keys_of_their_runs() {
        let first = 0..1;
        for ranges in [&[][..], &[first], &[3..5, 5..6, 250..700, 1023..1024], &[256..512, 1300..9000]] {
            check(KeyRuns::Ranges(ranges), |key| ranges.iter().any(|range| range.contains(&key)));
        }
        for keys in [1, 2, 3, 16, 64, 100, 256, 257, 700, usize::MAX] {
            for numbers in [&[][..], &[0], &[0, 1, 2, 5], &[1, 4], &[5, 20, 255, 256, 300, 1_000_000]] {
                check(KeyRuns::Blocks { numbers, keys }, |key| {
                    numbers.contains(&u32::try_from(key / keys).unwrap())
                });
            }
        }
    }

    #[test]
    fn the_same_list_is_known_again() {
        let numbers = [1, 2, 3, 1, 2, 3];
        let of = |range: Range<usize>| KeyRuns::Blocks { numbers: &numbers[range], keys: 4 };
        assert!(of(0..3).is_same(&of(0..3)));
        assert!(!of(0..3).is_same(&of(3..6)) && !of(0..3).is_same(&of(0..2)));
        assert!(!of(0..3).is_same(&KeyRuns::Ranges(&[])));
    }
}
