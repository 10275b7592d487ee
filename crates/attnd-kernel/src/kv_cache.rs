//! Resident keys and values of one kv head whose sequence grows, is cut, and forks.
//!
//! Pages are those of [`KvHead`](crate::KvHead), each in a frame of an [`Arena`] behind a counted reference, in a table that is
//! behind one as well. So a fork and a view cost one count each, whatever the length, and share all memory. Whoever writes copies
//! what another one holds, first the table and then the page: readers of a view go on with the bytes that they began with.
//! In a sequence that nobody else holds nothing is copied.
//!
//! **Rows become visible by [`KvCache::commit`] alone.** They are written behind the last visible one, where nothing looks: a view
//! is of so many tokens, and what is in its pages beyond them has no influence (`hostile_memory/cache.rs` has NaN there). So an
//! append to many heads is refused as a whole: where one of them refuses, all the others [`KvCache::forget_uncommitted`].

use std::ops::Range;
use std::sync::Arc;

use crate::arena::Arena;
use crate::buffer::OutOfMemory;
use crate::dtype::Dtype;
use crate::fill::Rows;
use crate::pages::{KvView, NonFinite, PageLayout, PageTable, Part};
use crate::shape::MAX_KEYS;
use crate::slot::{N_SLOTS, PAGE_KEYS, n_pages, slot_of_page};

mod sealed;
mod stored;

/// Keys and values of one kv head in the pages of a range of slots, of a sequence that grows.
#[derive(Debug)]
pub struct KvCache {
    arena: Arena,
    layout: PageLayout,
    slots: Range<usize>,
    len: usize,
    /// The position behind the last row that was written and isn't committed; `len` if there is none.
    written: Written,
    /// Each frame has the words of a page.
    table: Arc<PageTable>,
}

#[derive(Clone, Copy, Debug)]
struct Written {
    keys: usize,
    values: usize,
}

/// Why rows were not appended.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum AppendError {
    /// A value that is NaN or infinite where finite values are promised, or where what is stored knows none.
    #[error(transparent)]
    NonFinite(#[from] NonFinite),
    /// The arena or the system has no memory for another page.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
    /// A position that no call reaches.
    #[error("a sequence of {len} tokens, at most {MAX_KEYS}")]
    TooLong {
        /// Tokens there would be.
        len: usize,
    },
}

impl KvCache {
    /// An empty sequence whose pages in `slots` will lie in `arena`.
    ///
    /// # Panics
    /// If keys or values have no elements or more than [`crate::shape::MAX_DIM`], or there are no such slots.
    pub fn new(arena: &Arena, layout: PageLayout, slots: Range<usize>) -> Self {
        assert!(layout.is_possible() && slots.end <= N_SLOTS, "{layout:?} in slots {slots:?}");
        let written = Written { keys: 0, values: 0 };
        Self { arena: arena.clone(), layout, slots, len: 0, written, table: Arc::default() }
    }

    /// What the pages are made of.
    pub fn layout(&self) -> PageLayout {
        self.layout
    }
    /// The slots whose pages are resident.
    pub fn slots(&self) -> Range<usize> {
        self.slots.clone()
    }
    /// Tokens of the whole sequence, resident here or not.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether the sequence has no token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Memory of the pages, in bytes, as [`PageLayout::resident_bytes`] counts it. Pages that forks share count in each of them.
    pub fn bytes(&self) -> u64 {
        self.layout.resident_bytes(self.table.iter().flatten().count())
    }

    /// Memory that appending up to `len` tokens takes beyond [`Self::bytes`], in bytes, as things are: that of pages to come, and
    /// of the copy of the last page where a fork or a view holds it and rows are to be written there. No sequence grows beyond
    /// [`MAX_KEYS`].
    pub fn growth_bytes(&self, len: usize) -> u64 {
        let len = len.min(MAX_KEYS);
        let is_held = Arc::strong_count(&self.table) > 1;
        let is_here = |page: &usize| match self.table.get(*page) {
            Some(Some(frame)) => !is_held && Arc::strong_count(frame) == 1,
            _ => false,
        };
        let pages = if len > self.len { self.len / PAGE_KEYS..n_pages(len) } else { 0..0 };
        self.layout.resident_bytes(pages.filter(|page| self.owns(*page) && !is_here(page)).count())
    }

    /// Position of the next row of K that [`Self::append_k`] takes: the first in the pages of `slots` that comes behind the rows
    /// that are here; `None` if there are no slots.
    pub fn next_key(&self) -> Option<usize> {
        self.next_owned(self.written.keys)
    }
    /// The same for V.
    pub fn next_value(&self) -> Option<usize> {
        self.next_owned(self.written.values)
    }

    /// Writes keys behind those that are here. `rows` holds `[n, head_dim]` elements, little-endian: those of `n` consecutive
    /// tokens in the pages of `slots`, the first one at position `first`; tokens in other pages are left out. They are part of
    /// the sequence once [`Self::commit`] says so.
    ///
    /// # Errors
    /// The first NaN or infinity, if `check_finite` or integers are stored, after rounding to the storage type; that there is no
    /// memory for a page; that the sequence would be too long. All rows that aren't committed are then gone, and the sequence is as
    /// it was: other heads that took their part of the same append have to [`Self::forget_uncommitted`].
    ///
    /// # Panics
    /// If `first` isn't [`Self::next_key`], or `rows` aren't whole rows.
    pub fn append_k(
        &mut self,
        first: usize,
        rows: &[u8],
        dtype: Dtype,
        check_finite: bool,
    ) -> Result<(), AppendError> {
        self.append(Part::Keys, first, rows, dtype, check_finite)
    }

    /// Writes values as [`Self::append_k`] writes keys: `[n, value_dim]`, with [`Self::next_value`].
    ///
    /// # Errors
    /// As [`Self::append_k`].
    ///
    /// # Panics
    /// As [`Self::append_k`].
    pub fn append_v(
        &mut self,
        first: usize,
        rows: &[u8],
        dtype: Dtype,
        check_finite: bool,
    ) -> Result<(), AppendError> {
        self.append(Part::Values, first, rows, dtype, check_finite)
    }

    /// Makes what was written part of the sequence, which has `len` tokens then.
    ///
    /// # Panics
    /// If not exactly the tokens before `len` that are in the pages of `slots` were written, keys and values both.
    pub fn commit(&mut self, len: usize) {
        let Written { keys, values } = self.written;
        for (what, end) in [("keys", keys), ("values", values)] {
            let is_all = self.next_owned(end).is_none_or(|next| next >= len);
            assert!(end <= len && is_all, "a sequence of {len} tokens, of which {what} end at {end}");
        }
        self.len = len;
        self.written = Written { keys: len, values: len };
    }

    /// Forgets rows that were written and not committed, and gives up pages that have no others.
    pub fn forget_uncommitted(&mut self) {
        self.truncate(self.len);
    }

    /// Cuts the sequence to `len` tokens, if it has more, and forgets uncommitted rows in any case. Pages that are left without a token
    /// are given up.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.written = Written { keys: self.len, values: self.len };
        let pages = n_pages(self.len);
        if self.table.len() > pages {
            match Arc::get_mut(&mut self.table) {
                Some(table) => table.truncate(pages),
                None => self.table = Arc::new(self.table[..pages].to_vec()),
            }
        }
    }

    /// Another sequence with the same tokens, which shares all pages until one of the two writes to them.
    #[must_use]
    pub fn fork(&self) -> Self {
        let table = Arc::clone(&self.table);
        let mut fork = Self { arena: self.arena.clone(), slots: self.slots(), table, ..*self };
        // What was written and not committed is none of it.
        fork.truncate(self.len);
        fork
    }

    /// The first `at_len` tokens as they are now, whatever becomes of the sequence; `None` if it has fewer. It holds all pages of the
    /// sequence: an append beside it copies the last one, so whoever looks once drops it before.
    pub fn view(&self, at_len: usize) -> Option<KvView> {
        let table = || Arc::clone(&self.table);
        (at_len <= self.len).then(|| KvView::of_frames(self.layout, at_len, self.slots(), table()))
    }

    /// Writes the memory of all pages of `len` tokens full of what must never be used. What was written is lost.
    #[cfg(test)]
    pub(crate) fn poison(&mut self, len: usize, word: f32) {
        for page in crate::pages::owned_pages(len, &self.slots()) {
            match self.page_mut(page) {
                Ok(memory) => crate::buffer::fill_by_copies(memory, word),
                Err(refused) => panic!("{refused}"),
            }
        }
    }

    fn append(
        &mut self,
        part: Part,
        first: usize,
        rows: &[u8],
        dtype: Dtype,
        check_finite: bool,
    ) -> Result<(), AppendError> {
        let next = match part {
            Part::Keys => self.next_key(),
            Part::Values => self.next_value(),
        };
        assert_eq!(Some(first), next, "position of the first row of {part:?}");
        if rows.is_empty() {
            // Nothing was written up to `first` either.
            return Ok(());
        }
        let stored = self.store(part, first, rows, dtype, check_finite);
        match stored {
            Ok(end) if part == Part::Keys => self.written.keys = end,
            Ok(end) => self.written.values = end,
            Err(refused) => {
                self.forget_uncommitted();
                return Err(refused);
            }
        }
        Ok(())
    }

    /// Stores rows from position `first` on; returns the position behind the last one.
    fn store(
        &mut self,
        part: Part,
        first: usize,
        mut rows: &[u8],
        dtype: Dtype,
        check_finite: bool,
    ) -> Result<usize, AppendError> {
        let layout = self.layout;
        let stride = layout.dim(part) * dtype.size();
        assert!(rows.len().is_multiple_of(stride), "{} bytes of rows of {stride}", rows.len());
        let mut end = first;
        while !rows.is_empty() {
            let Some(at) = self.next_owned(end) else { panic!("rows of a sequence without slots") };
            let of_page = rows.len().min((PAGE_KEYS - at % PAGE_KEYS) * stride);
            let (now, later) = rows.split_at(of_page);
            let of_page = Rows::new(at, now, (layout.dim(part), dtype), check_finite);
            let len = at + of_page.count();
            if len > MAX_KEYS {
                return Err(AppendError::TooLong { len });
            }
            layout.store(part, self.page_mut(at / PAGE_KEYS)?, &of_page)?;
            (end, rows) = (len, later);
        }
        Ok(end)
    }

    /// The memory of a page, which nobody else holds: a zeroed one where there was none, a copy where another holds it.
    ///
    /// # Errors
    /// If the system has no such memory.
    fn page_mut(&mut self, page: usize) -> Result<&mut [f32], OutOfMemory> {
        let table = Arc::make_mut(&mut self.table);
        if table.len() <= page {
            table.resize(page + 1, None);
        }
        let place = &mut table[page];
        let replaced = match place {
            None => Some(self.arena.zeroed(self.layout.page_words())?),
            Some(frame) if Arc::strong_count(frame) > 1 => Some(self.arena.copy(frame)?),
            Some(_) => None,
        };
        if let Some(frame) = replaced {
            *place = Some(Arc::new(frame));
        }
        match place.as_mut().and_then(Arc::get_mut) {
            Some(frame) => Ok(frame),
            None => panic!("page {page} is held by another"),
        }
    }

    fn owns(&self, page: usize) -> bool {
        self.slots.contains(&slot_of_page(page))
    }

    /// The first position from `at` on that is in a page of `slots`.
    fn next_owned(&self, at: usize) -> Option<usize> {
        let first = at / PAGE_KEYS;
        let page = (first..first + N_SLOTS).find(|page| self.owns(*page))?;
        Some(at.max(page * PAGE_KEYS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Storage;

    const SMALL: PageLayout = PageLayout { storage: Storage::F32, head_dim: 1, value_dim: 1 };

    #[test]
    fn tokens_of_other_slots_alone_are_a_sequence_too() {
        // Pages 0 and 4 are of slots 0 to 15.
        let mut cache = KvCache::new(&Arena::new(), SMALL, 0..16);
        grow(&mut cache, 256);
        for len in [257, 258, 1024] {
            assert_eq!((cache.next_key(), cache.next_value()), (Some(1024), Some(1024)));
            cache.append_k(1024, &[], Dtype::F32, true).unwrap();
            cache.append_v(1024, &[], Dtype::F32, true).unwrap();
            cache.commit(len);
            assert_eq!((cache.len(), cache.bytes()), (len, SMALL.resident_bytes(1)));
        }
        grow(&mut cache, 1025);
        assert_eq!(cache.bytes(), SMALL.resident_bytes(2));
    }

    #[test]
    fn what_one_head_refuses_all_forget_and_take_again() {
        let arena = Arena::new();
        let mut heads = [(); 2].map(|()| KvCache::new(&arena, SMALL, 0..64));
        heads.iter_mut().for_each(|head| grow(head, 255));
        let good = rows([1.0, 2.0, 3.0].into_iter());
        let bad = rows([1.0, f32::NAN, 3.0].into_iter());
        heads[0].append_k(255, &good, Dtype::F32, true).unwrap();
        assert!(matches!(heads[1].append_k(255, &bad, Dtype::F32, true), Err(AppendError::NonFinite(_))));
        assert_eq!(heads[0].bytes(), SMALL.resident_bytes(2));
        heads[0].forget_uncommitted();
        for head in &mut heads {
            assert_eq!((head.bytes(), head.next_key()), (SMALL.resident_bytes(1), Some(255)));
            head.append_k(255, &good, Dtype::F32, true).unwrap();
            head.append_v(255, &good, Dtype::F32, true).unwrap();
            head.commit(258);
        }
    }

    #[cfg(not(miri))]
    #[test]
    fn no_sequence_is_longer_than_a_call() {
        let mut cache = KvCache::new(&Arena::new(), SMALL, 63..64);
        grow(&mut cache, MAX_KEYS);
        let (next, row) = (cache.next_key().unwrap(), rows([1.0].into_iter()));
        let refused = cache.append_k(next, &row, Dtype::F32, true).unwrap_err();
        assert!(matches!(refused, AppendError::TooLong { len } if len == next + 1), "{refused}");
        assert_eq!(cache.growth_bytes(usize::MAX), 0);
    }

    fn rows(values: impl Iterator<Item = f32>) -> Vec<u8> {
        values.flat_map(f32::to_le_bytes).collect()
    }

    /// Appends keys and values of one element, which are their positions, up to `len`.
    fn grow(cache: &mut KvCache, len: usize) {
        let owned: Vec<usize> = (cache.len()..len).filter(|at| cache.owns(at / PAGE_KEYS)).collect();
        let rows = rows(owned.iter().map(|at| *at as f32));
        if let Some(first) = owned.first() {
            cache.append_k(*first, &rows, Dtype::F32, true).unwrap();
            cache.append_v(*first, &rows, Dtype::F32, true).unwrap();
        }
        cache.commit(len);
    }

    /// The keys of a view, and the first column of its values.
    fn elements(view: &KvView) -> Vec<(f32, f32)> {
        let key = |at: usize| {
            let page = view.page(at / PAGE_KEYS)?;
            Some((page.k[at % PAGE_KEYS], page.v[at % PAGE_KEYS * 16]))
        };
        (0..view.n_keys()).filter_map(key).collect()
    }

    fn positions(range: Range<usize>) -> Vec<(f32, f32)> {
        range.map(|at| (at as f32, at as f32)).collect()
    }

    #[test]
    fn a_view_goes_to_other_threads() {
        fn check<T: Send + Sync>() {}
        check::<(KvCache, KvView, Arena)>();
    }

    #[test]
    fn a_fork_and_a_view_share_pages_until_one_of_them_writes() {
        let arena = Arena::of_chunks(1 << 10, u64::MAX);
        let page = SMALL.page_words() as u64 * 4;
        let mut cache = KvCache::new(&arena, SMALL, 0..64);
        grow(&mut cache, 300);
        assert_eq!((arena.bytes(), cache.len()), (2 * page, 300));
        let mut fork = cache.fork();
        let view = cache.view(290).unwrap();
        assert_eq!(arena.bytes(), 2 * page);
        assert_eq!(cache.growth_bytes(301), SMALL.resident_bytes(1));
        assert_eq!(cache.growth_bytes(300), 0);
        assert_eq!(cache.growth_bytes(513), SMALL.resident_bytes(2));

        fork.truncate(280);
        let other = rows((280..300).map(|at| -(at as f32)));
        fork.append_k(280, &other, Dtype::F32, true).unwrap();
        fork.append_v(280, &other, Dtype::F32, true).unwrap();
        fork.commit(300);
        assert_eq!(arena.bytes(), 3 * page, "the last page alone was copied");
        grow(&mut cache, 301);
        assert_eq!(arena.bytes(), 4 * page, "the view holds the page as it was");
        assert_eq!(elements(&view), positions(0..290));
        assert_eq!(elements(&cache.view(301).unwrap()), positions(0..301));
        let forked = elements(&fork.view(300).unwrap());
        assert_eq!(forked[..280], positions(0..280));
        assert!((280..300).all(|at| forked[at] == (-(at as f32), -(at as f32))));

        // Nobody else holds the page now.
        drop(view);
        assert_eq!(arena.bytes(), 3 * page + page, "kept as a spare");
        assert_eq!(cache.growth_bytes(302), 0);
        let [before, after] = [302, 303].map(|len| {
            grow(&mut cache, len);
            cache.view(len).unwrap().page(1).unwrap().k.as_ptr()
        });
        assert_eq!(before, after);
        drop((cache, fork));
        assert_eq!(arena.bytes(), page);
    }

    #[test]
    fn a_view_outlives_what_is_cut_and_written_again() {
        let arena = Arena::new();
        let mut cache = KvCache::new(&arena, SMALL, 0..64);
        grow(&mut cache, 600);
        let view = cache.view(600).unwrap();
        cache.truncate(100);
        assert_eq!(cache.bytes(), SMALL.resident_bytes(1));
        let other = rows((100..110).map(|_| -1.0));
        cache.append_k(100, &other, Dtype::F32, true).unwrap();
        cache.append_v(100, &other, Dtype::F32, true).unwrap();
        cache.commit(110);
        assert!(cache.view(111).is_none());
        assert_eq!(elements(&view), positions(0..600));
        let now = elements(&cache.view(110).unwrap());
        assert_eq!(now[..100], positions(0..100));
        assert!(now[100..].iter().all(|element| *element == (-1.0, -1.0)));
        drop(cache);
        assert_eq!(elements(&view), positions(0..600));
        cache = KvCache::new(&arena, SMALL, 0..64);
        assert!(cache.is_empty() && cache.view(0).is_some());
    }

    #[test]
    fn a_refused_append_leaves_nothing() {
        let mut cache = KvCache::new(&Arena::new(), SMALL, 0..64);
        grow(&mut cache, 250);
        let view = cache.view(250).unwrap();
        let pages = cache.bytes();
        let good = rows((250..800).map(|at| at as f32));
        let bad = rows((250..800).map(|at| if at >= 700 { f32::INFINITY } else { at as f32 }));
        cache.append_k(250, &good, Dtype::F32, true).unwrap();
        assert_eq!((cache.next_key(), cache.next_value(), cache.len()), (Some(800), Some(250), 250));
        let refused = cache.append_v(250, &bad, Dtype::F32, true).unwrap_err();
        assert_eq!(refused.to_string(), "[pos=700,i=0] inf");
        assert_eq!((cache.next_key(), cache.next_value(), cache.len()), (Some(250), Some(250), 250));
        assert_eq!(cache.bytes(), pages);
        assert_eq!(elements(&view), positions(0..250));
        // A fork has nothing of what isn't committed.
        cache.append_k(250, &good, Dtype::F32, true).unwrap();
        let fork = cache.fork();
        assert_eq!((fork.next_key(), fork.bytes()), (Some(250), pages));
        cache.append_v(250, &good, Dtype::F32, true).unwrap();
        cache.commit(800);
        assert_eq!(elements(&cache.view(800).unwrap()), positions(0..800));
        assert_eq!(elements(&fork.view(250).unwrap()), positions(0..250));
    }

    #[test]
    fn rows_of_other_slots_are_left_out() {
        // Pages 0, 4, 8, ..
        let mut cache = KvCache::new(&Arena::new(), SMALL, 0..16);
        assert_eq!((cache.next_key(), cache.growth_bytes(300)), (Some(0), SMALL.resident_bytes(1)));
        grow(&mut cache, 200);
        grow(&mut cache, 300);
        assert_eq!(cache.next_key(), Some(1024));
        grow(&mut cache, 900);
        assert_eq!(cache.bytes(), SMALL.resident_bytes(1));
        grow(&mut cache, 2200);
        assert_eq!((cache.next_value(), cache.bytes()), (Some(2200), SMALL.resident_bytes(3)));
        let expected = [positions(0..256), positions(1024..1280), positions(2048..2200)].concat();
        assert_eq!(elements(&cache.view(2200).unwrap()), expected);
        assert_eq!(elements(&cache.view(1025).unwrap()), expected[..257]);
        let mut nothing = KvCache::new(&Arena::new(), SMALL, 8..8);
        nothing.commit(1000);
        assert_eq!((nothing.next_key(), nothing.len(), nothing.bytes()), (None, 1000, 0));
    }

    #[test]
    #[should_panic(expected = "a sequence of 11 tokens, of which values end at 10")]
    fn what_was_not_written_is_not_committed() {
        let mut cache = KvCache::new(&Arena::new(), SMALL, 0..64);
        cache.append_k(0, &rows((0..11).map(|_| 1.0)), Dtype::F32, true).unwrap();
        cache.append_v(0, &rows((0..10).map(|_| 1.0)), Dtype::F32, true).unwrap();
        cache.commit(11);
    }
}
