//! The half of a copy that takes: pages are written beside what is here, and become a shard's replica all together, once all of them are
//! here and have the right checksum. Until then nothing of them is to be seen, and dropping them gives their memory back.

use std::sync::Arc;

use attnd_plan::Piece;
use attnd_plan::session::{CopyPages, Replica, ReplicaRefusal, ReplicaSnapshot, SessionSpec};
use attnd_wire::hold::{
    CopyBase, CopyChunk, CopySum, ShardAt, ShardImport, ShardSnapshot, ShardState, pages_of_chunk,
};
use attnd_wire::{Error, Reason};

use super::memory::Claim;
use super::pages::Pages;
use super::shard::{Resident, ShardKey, key_of};
use super::{Store, no_memory, no_shard};
use crate::budget::{OverBudget, Reservation};

/// A replica that is on its way here.
#[derive(Debug)]
pub(crate) struct Import {
    at: ShardAt,
    spec: Arc<SessionSpec>,
    pieces: Vec<Piece>,
    snapshot: ReplicaSnapshot,
    base: Option<CopyBase>,
    pages: Pages,
    list: CopyPages,
    /// Pages that are here.
    done: usize,
    sum: CopySum,
    claim: Claim,
    needed: u64,
    record: Option<Reservation>,
}

impl Import {
    /// Begins to take a replica. Memory for all of its pages is promised to it.
    ///
    /// # Errors
    /// [`Reason::Epoch`] if the replica here is of a higher one, [`Reason::SessionExists`] if it is of another session, [`Reason::Snapshot`]
    /// if the history makes no sense, or the one here isn't its beginning, where it shall be; [`Reason::KvBudget`], [`Reason::Overloaded`].
    pub(crate) fn new(store: &Store, import: ShardImport) -> Result<Self, Error> {
        let ShardImport { at, spec, pieces, snapshot } = import;
        snapshot.check(&spec)?;
        let list = snapshot.pages(&pieces);
        let ShardSnapshot { base, .. } = snapshot.clone();
        let mut snapshot = ReplicaSnapshot::from(snapshot);
        // It may have come from a replica that was fenced since: this one is of the epoch that was asked for.
        snapshot.state.epoch = at.epoch;
        Replica::restore(&snapshot).map_err(Error::from)?;
        let here = store.resident(key_of(&at)).ok();
        if let Some(here) = &here {
            check_epoch(here, &at)?;
            if *here.spec != spec || here.pieces != pieces {
                return Err(Error::new(Reason::SessionExists, "parameters differ"));
            }
        }
        let pages = match (&base, &here) {
            (None, _) => Pages::new(store.memory(), &spec, &pieces),
            (Some(base), Some(here)) => {
                check_base(here, base)?;
                here.look().fork_pages()?
            }
            (Some(_), None) => return Err(no_shard(key_of(&at))),
        };
        let record = if here.is_some() { None } else { Some(store.record(&spec, &pieces)?) };
        let needed = pages.layout().resident_bytes(list.len());
        let claim = store.memory().claim(pages.layout(), needed).map_err(no_memory)?;
        let (done, sum, spec) = (0, CopySum::default(), Arc::new(spec));
        Ok(Self { at, spec, pieces, snapshot, base, pages, list, done, sum, claim, needed, record })
    }

    /// What it is about.
    pub(crate) fn key(&self) -> ShardKey {
        key_of(&self.at)
    }

    /// Writes the next chunk.
    ///
    /// # Errors
    /// [`Reason::ChunkOrder`] if it isn't that, [`Reason::PayloadLength`] if it has other pages than it should, [`Reason::KvBudget`]. Nothing
    /// comes of the copy then.
    pub(crate) fn take(&mut self, store: &Store, chunk: &CopyChunk) -> Result<(), Error> {
        if chunk.index != self.sum.chunks {
            let detail = format!("expected {}, got {}", self.sum.chunks, chunk.index);
            return Err(Error::new(Reason::ChunkOrder, detail));
        }
        let layout = self.pages.layout();
        let stored = layout.stored_bytes();
        let pages = pages_of_chunk(stored).min(self.list.len() - self.done);
        if chunk.data.len() != pages * stored {
            let detail =
                format!("chunk {} of {pages} pages of {stored}, got {}", chunk.index, chunk.data.len());
            return Err(Error::new(Reason::PayloadLength, detail));
        }
        for bytes in chunk.data.chunks_exact(stored) {
            let Some(page) = self.list.get(self.done) else {
                return Err(Error::new(Reason::Internal, "a page that isn't there"));
            };
            self.pages.put(&page, bytes).map_err(|_full| {
                no_memory(OverBudget { need: self.needed, free: store.memory().free(layout) })
            })?;
            self.done += 1;
        }
        self.sum.add(chunk);
        self.claim.shrink(layout.resident_bytes(self.list.len() - self.done));
        Ok(())
    }

    /// Makes it the shard's replica, in the place of the one that is here.
    ///
    /// # Errors
    /// [`Reason::ChunkOrder`] and [`Reason::Checksum`] if it isn't what was sent; what [`Self::new`] refuses and has come about since.
    /// Nothing has changed then.
    pub(crate) fn finish(mut self, store: &Store, sum: CopySum) -> Result<ShardState, Error> {
        if (sum.chunks, sum.bytes) != (self.sum.chunks, self.sum.bytes) || self.done < self.list.len() {
            let (pages, of) = (self.done, self.list.len());
            let detail = format!(
                "declared {} chunks of {} bytes, got {} of {}, {pages} of {of} pages",
                sum.chunks, sum.bytes, self.sum.chunks, self.sum.bytes
            );
            return Err(Error::new(Reason::ChunkOrder, detail));
        }
        if sum.crc32c != self.sum.crc32c {
            return Err(Error::new(Reason::Checksum, "a copy, nothing applied"));
        }
        let replica = Replica::restore(&self.snapshot).map_err(Error::from)?;
        for (layer, tokens) in self.snapshot.state.tokens.iter().enumerate().filter(|(_, n)| **n > 0) {
            self.pages.commit(layer, *tokens);
        }
        let key = self.key();
        let Self { at, spec, pieces, base, pages, claim, record, .. } = self;
        drop(claim);
        let resident = match store.resident(key) {
            Ok(here) => {
                check_epoch(&here, &at)?;
                if let Some(base) = &base {
                    check_base(&here, base)?;
                }
                here.change().replace(replica, pages);
                here
            }
            Err(missing) if base.is_some() => return Err(missing),
            Err(_) => store.insert(Resident::of(key, spec, pieces, (replica, pages), record))?.0,
        };
        let state = resident.look().state(store, false);
        Ok(state)
    }
}

fn check_epoch(here: &Resident, at: &ShardAt) -> Result<(), Error> {
    // The same rule: a higher one is needed by somebody else.
    here.look().check_release(at.epoch)
}

/// Whether the replica here is the one that the copy goes on from.
fn check_base(here: &Resident, base: &CopyBase) -> Result<(), Error> {
    let shard = here.look();
    let (snapshot, _) = shard.snapshot()?;
    let has = CopyBase::of(&ShardState::from(snapshot.state));
    if has == *base {
        return Ok(());
    }
    let refused = ReplicaRefusal::Snapshot { records: snapshot.records.len(), op_seq: base.op_seq };
    Err(Error::from(refused))
}
