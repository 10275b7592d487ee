//! The keys and values that a shard holds: of each layer, of each kv head of each piece, a sequence that grows.
//!
//! Sequences of a layer are made when it gets its first rows, so that a session which is only opened takes next to nothing. Rows of
//! an append are written behind those that are there, and are part of all sequences of their layer or of none.

use std::ops::Range;

use attnd_kernel::slot::{N_SLOTS, PAGE_KEYS, n_pages, slot_of_page};
use attnd_kernel::{AppendError, Dtype, KvCache, KvView, NonFinite, PageLayout};
use attnd_plan::session::{CopyPage, SessionSpec};
use attnd_plan::{Piece, Tensor};
use rayon::prelude::*;

use super::memory::SessionMemory;

/// Rows of less than this many bytes are written by the thread that has them: others would take longer to wake up.
const WORTH_SHARING: usize = 256 << 10;

/// Keys and values of a shard.
#[derive(Debug)]
pub(crate) struct Pages {
    memory: SessionMemory,
    format: RowFormat,
    heads: Vec<HeadPlace>,
    /// Of each layer, one for each of `heads`; none before the first append.
    layers: Vec<Vec<KvCache>>,
}

/// One kv head of one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HeadPlace {
    /// Which kv head.
    pub(crate) kv_head: usize,
    /// Whose pages are here.
    pub(crate) slots: Range<usize>,
}

/// How rows come, and become resident.
#[derive(Clone, Copy, Debug)]
struct RowFormat {
    dtype: Dtype,
    layout: PageLayout,
    key_bytes: usize,
    /// Of a value as it is sent; 0 where it is the beginning of its key.
    value_bytes: usize,
    /// Bytes at the beginning of a key that are its value, where they are.
    prefix_bytes: Option<usize>,
}

/// Rows of consecutive tokens for one layer: of each kv head of each piece, those that are in its slots, ascending.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TokenRows<'a> {
    /// The first token's position.
    pub(crate) base_len: usize,
    /// Tokens, whether they are in the shard's slots or not.
    pub(crate) tokens: usize,
    pub(crate) k: &'a [u8],
    pub(crate) v: &'a [u8],
    pub(crate) check_finite: bool,
}

/// A page of a shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageAt {
    pub(crate) layer: usize,
    /// Which of the kv heads of the pieces.
    pub(crate) head: usize,
    pub(crate) page: usize,
}

/// What was looked at of a shard, which is as it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scrubbed {
    /// Bytes of pages.
    pub(crate) bytes: u64,
    /// Where to go on, if there is more.
    pub(crate) next: Option<PageAt>,
}

/// Why rows were not taken. Nothing of them is there then.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub(crate) enum PagesError {
    #[error("rows of {tensor} need {need} bytes, got {got}")]
    Length { tensor: Tensor, need: u64, got: u64 },
    #[error("{tensor} head {head}: {found}")]
    NonFinite { tensor: Tensor, head: usize, found: NonFinite },
    /// The arena, the system, or the longest sequence that there is.
    #[error("no memory for more pages")]
    Full,
}

impl Pages {
    /// Nothing yet, of `layers` layers.
    pub(crate) fn new(memory: &SessionMemory, spec: &SessionSpec, pieces: &[Piece]) -> Self {
        let (key_bytes, value_bytes) = spec.row_bytes();
        let prefix_bytes = spec.value_is_key_prefix.then(|| spec.value_dim * spec.dtype.size());
        let (dtype, layout) = (spec.dtype, spec.page_layout());
        let of_piece = |piece: &Piece| {
            let slots = piece.slots.clone();
            piece.groups.clone().map(move |kv_head| HeadPlace { kv_head, slots: slots.clone() })
        };
        Self {
            memory: memory.clone(),
            format: RowFormat { dtype, layout, key_bytes, value_bytes, prefix_bytes },
            heads: pieces.iter().flat_map(of_piece).collect(),
            layers: (0..spec.layers).map(|_| Vec::new()).collect(),
        }
    }

    /// The kv heads of the pieces, in order.
    pub(crate) fn heads(&self) -> &[HeadPlace] {
        &self.heads
    }

    /// How pages are made.
    pub(crate) fn layout(&self) -> PageLayout {
        self.format.layout
    }

    /// Bytes of a row as it is sent; 0 where values are parts of keys.
    pub(crate) fn row_bytes(&self, tensor: Tensor) -> usize {
        if tensor == Tensor::V { self.format.value_bytes } else { self.format.key_bytes }
    }

    /// Memory that `tokens` more tokens of a layer take, in bytes.
    pub(crate) fn growth_bytes(&self, layer: usize, tokens: usize) -> u64 {
        match self.layers.get(layer) {
            Some(caches) if !caches.is_empty() => {
                caches.iter().map(|cache| cache.growth_bytes(cache.len().saturating_add(tokens))).sum()
            }
            _ => {
                let pages = |place: &HeadPlace| {
                    (0..n_pages(tokens)).filter(|page| place.slots.contains(&slot_of_page(*page))).count()
                };
                self.format.layout.resident_bytes(self.heads.iter().map(pages).sum())
            }
        }
    }

    /// Bytes of K and of V that rows of these tokens have here.
    pub(crate) fn sent_bytes(&self, tokens: &Range<usize>) -> (u64, u64) {
        let rows: usize = self.heads.iter().map(|place| tokens_in_slots(&place.slots, tokens)).sum();
        (rows as u64 * self.format.key_bytes as u64, rows as u64 * self.format.value_bytes as u64)
    }

    /// Appends rows to a layer.
    ///
    /// # Errors
    /// [`PagesError`]; nothing of the rows is there then.
    ///
    /// # Panics
    /// If there is no such layer, or it has another number of tokens than `rows.base_len`.
    pub(crate) fn append(&mut self, layer: usize, rows: &TokenRows<'_>) -> Result<(), PagesError> {
        let end = rows.base_len + rows.tokens;
        let tokens = rows.base_len..end;
        let (k, v) = self.sent_bytes(&tokens);
        for (tensor, need, got) in [(Tensor::K, k, rows.k.len()), (Tensor::V, v, rows.v.len())] {
            if need != got as u64 {
                return Err(PagesError::Length { tensor, need, got: got as u64 });
            }
        }
        let format = self.format;
        let (caches, heads) = self.caches(layer);
        assert!(caches.iter().all(|cache| cache.len() == rows.base_len), "rows from {} on", rows.base_len);
        let (mut k, mut v) = (rows.k, rows.v);
        let mut of_heads = caches.iter_mut().zip(heads).map(|(cache, place)| {
            let count = tokens_in_slots(&place.slots, &tokens);
            let (of_k, of_v);
            (of_k, k) = k.split_at(count * format.key_bytes);
            (of_v, v) = v.split_at(count * format.value_bytes);
            (cache, place, of_k, of_v)
        });
        let write = |(cache, place, k, v): (&mut KvCache, &HeadPlace, &[u8], &[u8])| {
            let refused = |(tensor, error)| refused(tensor, place.kv_head, error);
            format.write(cache, Some(k), Some(v), rows.check_finite).map_err(refused)
        };
        let written: Result<(), PagesError> = if rows.k.len() + rows.v.len() < WORTH_SHARING {
            of_heads.try_for_each(write)
        } else {
            // All of them, so that the first one that refuses is the same each time.
            let all: Vec<_> = of_heads.collect();
            let all: Vec<_> = all.into_par_iter().map(write).collect();
            all.into_iter().collect()
        };
        match written {
            Ok(()) => caches.iter_mut().for_each(|cache| cache.commit(end)),
            Err(_) => self.forget(layer),
        }
        written
    }

    /// Writes rows of one head of a layer, of K or of V, behind those that it has; they are part of the sequence with
    /// [`Self::commit`].
    ///
    /// # Errors
    /// [`PagesError`]; nothing that isn't committed is there in any head of the layer then.
    ///
    /// # Panics
    /// If there is no such layer or head, or these aren't whole rows.
    pub(crate) fn write(
        &mut self,
        layer: usize,
        head: usize,
        tensor: Tensor,
        rows: &[u8],
        check_finite: bool,
    ) -> Result<(), PagesError> {
        let format = self.format;
        let (caches, heads) = self.caches(layer);
        let kv_head = heads[head].kv_head;
        let (k, v) = if tensor == Tensor::V { (None, Some(rows)) } else { (Some(rows), None) };
        let written = format.write(&mut caches[head], k, v, check_finite);
        written.map_err(|(tensor, error)| {
            self.forget(layer);
            refused(tensor, kv_head, error)
        })
    }

    /// Where the next row of one head of a layer belongs; `None` if its slots have no more.
    pub(crate) fn next_row(&self, layer: usize, head: usize, tensor: Tensor) -> Option<usize> {
        let Some(cache) = self.layers.get(layer).and_then(|caches| caches.get(head)) else {
            let slots = &self.heads.get(head)?.slots;
            return (0..N_SLOTS)
                .find(|page| slots.contains(&slot_of_page(*page)))
                .map(|page| page * PAGE_KEYS);
        };
        if tensor == Tensor::V { cache.next_value() } else { cache.next_key() }
    }

    /// Makes what was written part of a layer, which has `len` tokens then.
    ///
    /// # Panics
    /// If not all rows of tokens before `len` were written.
    pub(crate) fn commit(&mut self, layer: usize, len: usize) {
        self.caches(layer).0.iter_mut().for_each(|cache| cache.commit(len));
    }

    /// Forgets what was written and not committed.
    pub(crate) fn forget(&mut self, layer: usize) {
        if let Some(caches) = self.layers.get_mut(layer) {
            caches.iter_mut().for_each(KvCache::forget_uncommitted);
            if caches.iter().all(KvCache::is_empty) {
                *caches = Vec::new();
            }
        }
    }

    /// Cuts a layer to so many tokens, if it has more.
    pub(crate) fn cut(&mut self, layer: usize, len: usize) {
        if let Some(caches) = self.layers.get_mut(layer) {
            caches.iter_mut().for_each(|cache| cache.truncate(len));
            if len == 0 {
                *caches = Vec::new();
            }
        }
    }

    /// Cuts all layers that have more tokens.
    pub(crate) fn truncate(&mut self, len: usize) {
        (0..self.layers.len()).for_each(|layer| self.cut(layer, len));
    }

    /// The same keys and values, which share memory with these until either changes.
    pub(crate) fn fork(&self) -> Self {
        let layers = self.layers.iter().map(|caches| caches.iter().map(KvCache::fork).collect()).collect();
        Self { memory: self.memory.clone(), format: self.format, heads: self.heads.clone(), layers }
    }

    /// The first `at_len` tokens of one head of a layer; `None` if there are fewer, or no such head.
    pub(crate) fn view(&self, layer: usize, head: usize, at_len: usize) -> Option<KvView> {
        self.layers.get(layer)?.get(head)?.view(at_len)
    }

    /// The first tokens of all heads of all layers, as they are now: of each layer `tokens`. `None` if there are fewer.
    pub(crate) fn views(&self, tokens: &[usize]) -> Option<Vec<Vec<KvView>>> {
        let of_layer = |(layer, tokens): (usize, &usize)| {
            let heads = 0..if *tokens > 0 { self.heads.len() } else { 0 };
            heads.map(|head| self.view(layer, head, *tokens)).collect()
        };
        tokens.iter().enumerate().map(of_layer).collect()
    }

    /// Looks at about so many bytes of full pages, from one on, whether they are as they were written.
    ///
    /// # Errors
    /// The first one that isn't.
    pub(crate) fn scrub(&self, from: PageAt, bytes: u64) -> Result<Scrubbed, PageAt> {
        let (mut at, mut done) = (from, 0);
        while let Some(caches) = self.layers.get(at.layer) {
            let Some(cache) = caches.get(at.head) else {
                at = PageAt { layer: at.layer + 1, head: 0, page: 0 };
                continue;
            };
            if at.page >= cache.len() / PAGE_KEYS {
                at = PageAt { head: at.head + 1, page: 0, ..at };
                continue;
            }
            if done >= bytes {
                return Ok(Scrubbed { bytes: done, next: Some(at) });
            }
            match cache.is_sound(at.page, checksum) {
                Some(true) => done += self.format.layout.stored_bytes() as u64,
                Some(false) => return Err(at),
                // In the slots of another shard, or without a checksum.
                None => {}
            }
            at.page += 1;
        }
        Ok(Scrubbed { bytes: done, next: None })
    }

    /// Whether a page is as it was written; `None` if that isn't known, or there is none.
    pub(crate) fn is_sound(&self, at: PageAt) -> Option<bool> {
        self.layers.get(at.layer)?.get(at.head)?.is_sound(at.page, checksum)
    }

    /// Changes a bit of a page that nobody else holds, as failing memory does.
    #[cfg(test)]
    pub(crate) fn damage(&mut self, at: PageAt, word: usize) {
        assert!(self.layers[at.layer][at.head].damage(at.page, word, 3), "{at:?}");
    }

    /// Writes a page of a copy as it is stored, in the place of what is there of it. It is part of its sequence with [`Self::commit`].
    ///
    /// # Errors
    /// [`PagesError::Full`]; nothing of the head that isn't committed is there then.
    ///
    /// # Panics
    /// If there is no such layer or head, if it isn't the next page of that, or these aren't the bytes of a page.
    pub(crate) fn put(&mut self, page: &CopyPage, bytes: &[u8]) -> Result<(), PagesError> {
        let (caches, _) = self.caches(page.layer);
        let cache = &mut caches[page.head];
        cache.put_page(page.page, page.end, bytes).map_err(|_refused| PagesError::Full)?;
        cache.seal(page.page * PAGE_KEYS, checksum);
        Ok(())
    }

    /// The sequences of a layer, which are made if it has none.
    fn caches(&mut self, layer: usize) -> (&mut [KvCache], &[HeadPlace]) {
        let caches = &mut self.layers[layer];
        if caches.is_empty() {
            let layout = self.format.layout;
            let new = |place: &HeadPlace| KvCache::new(self.memory.arena(), layout, place.slots.clone());
            *caches = self.heads.iter().map(new).collect();
        }
        (caches, &self.heads)
    }
}

impl RowFormat {
    /// Writes rows behind those that a sequence has.
    fn write(
        &self,
        cache: &mut KvCache,
        k: Option<&[u8]>,
        v: Option<&[u8]>,
        check_finite: bool,
    ) -> Result<(), (Tensor, AppendError)> {
        let dtype = self.dtype;
        let first = [k.and_then(|_| cache.next_key()), v.and_then(|_| cache.next_value())];
        let first = first.into_iter().flatten().min();
        if let Some(k) = k.filter(|k| !k.is_empty())
            && let Some(at) = cache.next_key()
        {
            cache.append_k(at, k, dtype, check_finite).map_err(|error| (Tensor::K, error))?;
            if let Some(bytes) = self.prefix_bytes {
                for key in k.chunks_exact(self.key_bytes) {
                    let Some(at) = cache.next_value() else { break };
                    // It is the key's number, too.
                    cache
                        .append_v(at, &key[..bytes], dtype, check_finite)
                        .map_err(|error| (Tensor::K, error))?;
                }
            }
        }
        if let Some(v) = v.filter(|v| !v.is_empty())
            && let Some(at) = cache.next_value()
        {
            cache.append_v(at, v, dtype, check_finite).map_err(|error| (Tensor::V, error))?;
        }
        if let Some(first) = first {
            cache.seal(first, checksum);
        }
        Ok(())
    }
}

/// CRC32C of a page as it lies in memory. It is compared where it was made, so the order of bytes doesn't matter.
pub(crate) fn checksum(words: &[f32]) -> u32 {
    crc32c::crc32c(bytemuck::cast_slice(words))
}

fn refused(tensor: Tensor, head: usize, error: AppendError) -> PagesError {
    match error {
        AppendError::NonFinite(found) => PagesError::NonFinite { tensor, head, found },
        AppendError::OutOfMemory(_) | AppendError::TooLong { .. } => PagesError::Full,
    }
}

/// How many of these tokens are in pages of `slots`.
pub(crate) fn tokens_in_slots(slots: &Range<usize>, tokens: &Range<usize>) -> usize {
    if slots.len() == N_SLOTS {
        return tokens.len();
    }
    let pages = tokens.start / PAGE_KEYS..n_pages(tokens.end);
    let of_page = |page: usize| {
        let end = tokens.end.min((page + 1) * PAGE_KEYS);
        end.saturating_sub(tokens.start.max(page * PAGE_KEYS))
    };
    pages.filter(|page| slots.contains(&slot_of_page(*page))).map(of_page).sum()
}
