//! Bins of an axis, where pages cut them, and sums of weights that wait to join a report.

use std::num::NonZeroUsize;
use std::ops::Range;

use super::outputs::keys_of_page;
use crate::slot::PAGE_KEYS;

/// Neighbouring intervals that cover an axis of tokens; none is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bins {
    /// Bin `b` is `[floor(b * length / n), floor((b + 1) * length / n))`, with `n <= length`.
    Evenly { n: usize, length: usize },
    /// Bin `b` is `[b * width, (b + 1) * width)`, the last one cut off.
    Width { width: NonZeroUsize, length: usize },
}

impl Bins {
    /// `n` bins, at least one and no more than tokens.
    pub(super) fn evenly(n: usize, length: usize) -> Self {
        Self::Evenly { n, length }
    }

    pub(super) fn of_width(width: NonZeroUsize, length: usize) -> Self {
        Self::Width { width, length }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Evenly { n, .. } => *n,
            Self::Width { width, length } => length.div_ceil(width.get()),
        }
    }

    /// The bin of a token.
    pub(super) fn of(&self, token: usize) -> usize {
        match self {
            // The last b with floor(b * length / n) <= token, so b * length < (token + 1) * n.
            Self::Evenly { n, length } => ((token + 1) * n - 1) / length,
            Self::Width { width, .. } => token / width.get(),
        }
    }

    /// Where a bin ends.
    pub(super) fn end(&self, bin: usize) -> usize {
        match self {
            Self::Evenly { n, length } => (bin + 1) * length / n,
            Self::Width { width, length } => ((bin + 1) * width.get()).min(*length),
        }
    }

    /// Tokens of a bin.
    pub(super) fn tokens(&self, bin: usize) -> usize {
        self.end(bin) - if bin == 0 { 0 } else { self.end(bin - 1) }
    }

    /// Where the bins of a page end inside it, the last one with the page. Returns the first of them.
    fn of_page(&self, page: usize, n_keys: usize, ends: &mut Vec<u16>) -> usize {
        let keys = keys_of_page(page, n_keys);
        let first = self.of(keys.start);
        ends.clear();
        for bin in first.. {
            let end = self.end(bin).min(keys.end);
            // At most 256.
            ends.push((end - keys.start) as u16);
            if end == keys.end {
                break;
            }
        }
        first
    }
}

/// Sums of weights by line (a row, or the rows of a head that share a row of the heatmap) and by bin of the keys, for the pages of a
/// block so far. Fixed point, so that their order is free.
#[derive(Debug)]
pub(super) struct Collected {
    bins: Bins,
    lines: usize,
    /// Where the bins of the current page end.
    ends: Vec<u16>,
    /// The bins of each page and where its cells begin.
    pages: Vec<(Range<usize>, usize)>,
    /// For each page `[lines, its bins]`.
    cells: Vec<i64>,
    sums: Vec<f32>,
}

/// Cells that wait at most, give or take a page.
const WAITING: usize = 1 << 17;

impl Collected {
    pub(super) fn new(bins: Bins, lines: usize) -> Self {
        Self { bins, lines, ends: Vec::new(), pages: Vec::new(), cells: Vec::new(), sums: Vec::new() }
    }

    /// Makes room for the sums of a page.
    pub(super) fn begin(&mut self, page: usize, n_keys: usize) {
        let first = self.bins.of_page(page, n_keys, &mut self.ends);
        let n = self.ends.len();
        self.pages.push((first..first + n, self.cells.len()));
        self.cells.resize(self.cells.len() + self.lines * n, 0);
        self.sums.resize(n, 0.0);
    }

    /// Adds a row's weights over the current page to a line: `sum` makes the sums of its bins from where they end, and each counts
    /// `factor` times, rounded towards zero.
    pub(super) fn add(&mut self, line: usize, factor: f64, sum: impl FnOnce(&[u16], &mut [f32])) {
        sum(&self.ends, &mut self.sums);
        let n = self.ends.len();
        let first = self.cells.len() - (self.lines - line) * n;
        for (cell, sum) in self.cells[first..][..n].iter_mut().zip(&self.sums) {
            *cell = cell.saturating_add((f64::from(*sum) * factor) as i64);
        }
    }

    /// Whether so much waits that it should join the report now.
    pub(super) fn is_full(&self) -> bool {
        self.cells.len() >= WAITING
    }

    /// Adds everything to cells of which those of a line begin where `line_at` says, and forgets it.
    pub(super) fn flush(&mut self, to: &mut [i64], line_at: impl Fn(usize) -> usize) {
        for (bins, at) in self.pages.drain(..) {
            for (line, cells) in self.cells[at..][..self.lines * bins.len()].chunks(bins.len()).enumerate() {
                let to = &mut to[line_at(line)..][bins.clone()];
                for (to, cell) in to.iter_mut().zip(cells) {
                    *to = to.saturating_add(*cell);
                }
            }
        }
        self.cells.clear();
    }
}

const _: () = assert!(PAGE_KEYS <= u16::MAX as usize);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_is_in_the_bin_that_says_so() {
        for length in [1, 2, 7, 100, 256, 1000, 1025] {
            for n in [1, 2, 3, 64, 99, 512].into_iter().filter(|n| *n <= length) {
                let width = NonZeroUsize::new(n).unwrap();
                for bins in [Bins::evenly(n, length), Bins::of_width(width, length)] {
                    let of: Vec<usize> = (0..length).map(|token| bins.of(token)).collect();
                    let mut at = 0;
                    for bin in 0..bins.len() {
                        assert!(bins.tokens(bin) > 0, "{bins:?} {bin}");
                        assert!(of[at..bins.end(bin)].iter().all(|of| *of == bin), "{bins:?} {bin}");
                        at = bins.end(bin);
                    }
                    assert_eq!(at, length);
                }
            }
        }
    }

    #[test]
    fn pages_cut_bins() {
        let mut ends = Vec::new();
        let bins = Bins::evenly(3, 700);
        // 0..233, 233..466, 466..700.
        assert_eq!((bins.of_page(0, 700, &mut ends), &ends[..]), (0, &[233, 256][..]));
        assert_eq!((bins.of_page(1, 700, &mut ends), &ends[..]), (1, &[210, 256][..]));
        assert_eq!((bins.of_page(2, 700, &mut ends), &ends[..]), (2, &[188][..]));
    }

    #[test]
    fn sums_join_in_any_order_and_never_wrap() {
        let collect = |pages: &[usize]| {
            let mut collected = Collected::new(Bins::evenly(3, 700), 2);
            let mut cells = vec![0; 2 * 3];
            for page in pages {
                collected.begin(*page, 700);
                for (line, weight) in [(0, 0.25), (1, 0.5), (1, 0.125)] {
                    collected.add(line, 16.0, |ends, sums| {
                        for (end, sum) in ends.iter().zip(sums) {
                            *sum = weight * f32::from(*end % 7);
                        }
                    });
                }
                if *page == 1 {
                    collected.flush(&mut cells, |line| line * 3);
                }
            }
            collected.flush(&mut cells, |line| line * 3);
            cells
        };
        assert_eq!(collect(&[0, 1, 2]), collect(&[2, 0, 1]));
        assert_eq!(collect(&[0, 1, 2]), [8, 16, 40, 20, 40, 100]);
        let mut collected = Collected::new(Bins::evenly(1, 100), 1);
        let mut cells = [i64::MAX - 3];
        for _ in 0..3 {
            collected.begin(0, 100);
            collected.add(0, 1e30, |_, sums| sums.fill(3e38));
        }
        collected.flush(&mut cells, |_| 0);
        assert_eq!(cells, [i64::MAX]);
    }
}
