//! The pages of keys or values as they arrive, in any cut.

use std::ops::Range;

use attnd_kernel::slot::{PAGE_KEYS, keys_in_page, n_pages, slot_of_page};

/// The pages of a range of slots as they come, ascending.
#[derive(Debug)]
pub(super) struct Pages {
    n_keys: usize,
    slots: Range<usize>,
    row_bytes: usize,
    /// The page whose bytes come next; past the last one when all are here.
    page: usize,
    /// The beginning of that page, where a message ended inside of it.
    staged: Vec<u8>,
}

/// Why a run is refused: its place, or what the page's taker found.
pub(super) enum Refusal<E> {
    Offset { expected: u64, got: u64 },
    Page(E),
}

impl Pages {
    pub(super) fn new(n_keys: usize, slots: Range<usize>, row_bytes: usize) -> Self {
        let mut pages = Self { n_keys, slots, row_bytes, page: 0, staged: Vec::new() };
        pages.page = pages.owned_from(0);
        pages
    }

    fn owned_from(&self, page: usize) -> usize {
        let pages = n_pages(self.n_keys);
        (page..pages).find(|page| self.slots.contains(&slot_of_page(*page))).unwrap_or(pages)
    }

    pub(super) fn is_complete(&self) -> bool {
        self.page >= n_pages(self.n_keys)
    }

    /// The next expected byte.
    fn position(&self) -> u64 {
        (self.page.saturating_mul(PAGE_KEYS).min(self.n_keys) * self.row_bytes + self.staged.len()) as u64
    }

    /// Hands on whole pages: `store(page, bytes)`.
    pub(super) fn take<E>(
        &mut self,
        offset: u64,
        data: &[u8],
        mut store: impl FnMut(usize, &[u8]) -> Result<(), E>,
    ) -> Result<(), Refusal<E>> {
        let mut rest = data;
        let mut got = offset;
        loop {
            let expected = self.position();
            if got != expected || (self.is_complete() && !rest.is_empty()) {
                // An empty run is harmless anywhere.
                return if rest.is_empty() { Ok(()) } else { Err(Refusal::Offset { expected, got }) };
            }
            let page_bytes = keys_in_page(self.page, self.n_keys) * self.row_bytes;
            let missing = page_bytes - self.staged.len();
            if rest.len() < missing || self.is_complete() {
                if self.staged.is_empty() && !rest.is_empty() {
                    self.staged.reserve_exact(page_bytes);
                }
                self.staged.extend_from_slice(rest);
                return Ok(());
            }
            let (now, later) = rest.split_at(missing);
            if self.staged.is_empty() {
                store(self.page, now).map_err(Refusal::Page)?;
            } else {
                self.staged.extend_from_slice(now);
                store(self.page, &self.staged).map_err(Refusal::Page)?;
                self.staged = Vec::new();
            }
            self.page = self.owned_from(self.page + 1);
            rest = later;
            got += missing as u64;
        }
    }
}
