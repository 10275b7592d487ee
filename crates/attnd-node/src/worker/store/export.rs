//! The half of a copy that gives: a replica as it was at one moment, whose pages are asked for in chunks. Views of them are all that is
//! held, so the replica goes on meanwhile; it copies the last page of each sequence when it next grows, and nothing else.

use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use attnd_kernel::KvView;
use attnd_plan::session::{CopyPages, ReplicaSnapshot};
use attnd_wire::checksum::joined;
use attnd_wire::hold::{CopyBase, CopyChunk, CopySum, ShardSnapshot, pages_of_chunk};
use attnd_wire::{Error, Reason};

use super::pages::{PageAt, checksum};
use super::shard::Resident;

/// A replica that is being given.
#[derive(Debug)]
pub(crate) struct Export {
    /// Of each layer, of each kv head of each piece.
    views: Vec<Vec<KvView>>,
    pages: CopyPages,
    stored_bytes: usize,
    /// Of each chunk that was given its checksum and length.
    given: Mutex<Vec<Option<(u32, usize)>>>,
    of: Weak<Resident>,
    /// A page that was found to have changed by itself.
    damaged: OnceLock<PageAt>,
}

impl Export {
    /// A shard as it is now, and what its receiver needs beside its pages. What a receiver has is left out if the replica continues
    /// that.
    ///
    /// # Errors
    /// [`Reason::Shard`] if it was released.
    pub(crate) fn new(
        resident: &Arc<Resident>,
        base: Option<CopyBase>,
    ) -> Result<(Self, ShardSnapshot), Error> {
        let (snapshot, views, continued) = {
            let shard = resident.look();
            let (snapshot, views) = shard.snapshot()?;
            let ReplicaSnapshot { state, .. } = &snapshot;
            let is_part = |base: &CopyBase| {
                let is_shorter = base.tokens.iter().zip(&state.tokens).all(|(base, has)| base <= has);
                base.generation == state.generation
                    && base.tokens.len() == state.tokens.len()
                    && is_shorter
                    && shard.continues(base.op_seq, base.chain)
            };
            let continued = base.filter(is_part);
            (snapshot, views, continued)
        };
        let snapshot = ShardSnapshot { base: continued, ..ShardSnapshot::from(snapshot) };
        let pages = snapshot.pages(&resident.pieces);
        let stored_bytes = resident.spec.page_layout().stored_bytes();
        let chunks = pages.len().div_ceil(pages_of_chunk(stored_bytes));
        let given = Mutex::new(vec![None; chunks]);
        let (of, damaged) = (Arc::downgrade(resident), OnceLock::new());
        Ok((Self { views, pages, stored_bytes, given, of, damaged }, snapshot))
    }

    /// Bytes of a chunk at most.
    pub(crate) fn chunk_bytes(&self) -> u64 {
        (pages_of_chunk(self.stored_bytes) * self.stored_bytes) as u64
    }

    /// What it is a copy of, if that is there still, and a page of the copy that was found to have changed by itself. What it is a copy
    /// of may have another page in its place by now.
    pub(crate) fn damaged(&self) -> Option<(Arc<Resident>, PageAt)> {
        Some((self.of.upgrade()?, *self.damaged.get()?))
    }

    /// A chunk.
    ///
    /// # Errors
    /// [`Reason::ChunkOrder`] if there are fewer; [`Reason::Checksum`] if a page has changed by itself ([`Self::damaged`]), which must not
    /// go on to others.
    pub(crate) fn chunk(&self, index: u32) -> Result<CopyChunk, Error> {
        let n = pages_of_chunk(self.stored_bytes);
        let (at, chunks) = (index as usize, self.pages.len().div_ceil(n));
        if at >= chunks {
            return Err(Error::new(Reason::ChunkOrder, format!("chunk {index} of {chunks}")));
        }
        let pages = (at * n..self.pages.len().min((at + 1) * n)).filter_map(|at| self.pages.get(at));
        let mut data = Vec::with_capacity(pages.clone().count() * self.stored_bytes);
        for page in pages {
            let view = self.views.get(page.layer).and_then(|views| views.get(page.head));
            if !view.is_some_and(|view| view.stored_page(page.page, &mut data)) {
                return Err(Error::new(Reason::Internal, format!("a replica lacks {page:?}")));
            }
            if view.and_then(|view| view.is_sound(page.page, checksum)) == Some(false) {
                let at = PageAt { layer: page.layer, head: page.head, page: page.page };
                self.damaged.get_or_init(|| at);
                return Err(Error::new(Reason::Checksum, format!("{at:?} of the replica that is copied")));
            }
        }
        let chunk = CopyChunk::new(index, data.into());
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = given.get_mut(at) {
            *place = Some((chunk.crc32c, chunk.data.len()));
        }
        Ok(chunk)
    }

    /// What was given, all together.
    ///
    /// # Errors
    /// [`Reason::ChunkOrder`] if a chunk wasn't asked for.
    pub(crate) fn sum(&self) -> Result<CopySum, Error> {
        let given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sum = CopySum::default();
        for (index, chunk) in given.iter().enumerate() {
            let Some((crc32c, bytes)) = *chunk else {
                return Err(Error::new(Reason::ChunkOrder, format!("chunk {index} was not read")));
            };
            sum.chunks += 1;
            sum.bytes += bytes as u64;
            sum.crc32c = joined(sum.crc32c, crc32c, bytes as u64);
        }
        Ok(sum)
    }
}
