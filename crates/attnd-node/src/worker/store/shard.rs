//! One shard that is resident here: what its replica knows, its keys and values, and an append that is on its way in chunks.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};

use attnd_kernel::KvView;
use attnd_plan::Piece;
use attnd_plan::session::{Replica, ReplicaRefusal, ReplicaSnapshot, SessionSpec, Undone, Verdict};
use attnd_wire::hold::{
    ShardAppend, ShardAt, ShardChange, ShardChangeKind, ShardRecords, ShardRows, ShardState,
};
use attnd_wire::{Commit, Error, Reason, SliceChunk, refusal};

use super::pages::{PageAt, Pages, PagesError, Scrubbed, TokenRows};
use super::staged::{BulkId, Staged};
use super::{Store, no_memory, no_shard};
use crate::budget::{OverBudget, Reservation};

/// Number of the session, number of the shard.
pub(crate) type ShardKey = (u64, u32);

/// A shard, and what never changes of it.
#[derive(Debug)]
pub(crate) struct Resident {
    pub(crate) key: ShardKey,
    pub(crate) spec: Arc<SessionSpec>,
    pub(crate) pieces: Vec<Piece>,
    /// From the first of its kv heads to the last.
    pub(crate) kv_heads: Range<usize>,
    shard: RwLock<Shard>,
    /// A page has changed by itself: nothing is true that is computed from it.
    is_damaged: AtomicBool,
    /// For its account.
    _record: Option<Reservation>,
}

/// What changes of a shard. Who may look at it and who change it is decided before ([`super::turns`]), so nobody waits for its lock.
#[derive(Debug)]
pub(crate) struct Shard {
    key: ShardKey,
    replica: Replica,
    /// Nothing once it was released.
    pages: Option<Pages>,
    staged: Option<Staged>,
}

/// The key that a request is about.
pub(crate) fn key_of(at: &ShardAt) -> ShardKey {
    (at.session, at.shard)
}

impl Resident {
    /// An empty shard.
    ///
    /// # Errors
    /// [`Reason::Overloaded`] if there is no memory for its account.
    pub(crate) fn new(
        store: &Store,
        at: &ShardAt,
        spec: SessionSpec,
        pieces: Vec<Piece>,
    ) -> Result<Self, Error> {
        let record = store.record(&spec, &pieces)?;
        let pages = Pages::new(store.memory(), &spec, &pieces);
        let replica = Replica::new(spec.layers, at.epoch);
        Ok(Self::of(key_of(at), Arc::new(spec), pieces, (replica, pages), Some(record)))
    }

    /// A shard with this replica and these pages.
    pub(super) fn of(
        key: ShardKey,
        spec: Arc<SessionSpec>,
        pieces: Vec<Piece>,
        (replica, pages): (Replica, Pages),
        record: Option<Reservation>,
    ) -> Self {
        let first = pieces.iter().map(|piece| piece.groups.start).min().unwrap_or(0);
        let end = pieces.iter().map(|piece| piece.groups.end).max().unwrap_or(0);
        let shard = RwLock::new(Shard { key, replica, pages: Some(pages), staged: None });
        let is_damaged = AtomicBool::new(false);
        Self { key, spec, pieces, kv_heads: first..end, shard, is_damaged, _record: record }
    }

    /// For whoever has the turn to change it. Whoever came before it was found to be damaged finds it released.
    pub(crate) fn change(&self) -> RwLockWriteGuard<'_, Shard> {
        let mut shard = self.shard.write().unwrap_or_else(PoisonError::into_inner);
        if self.is_damaged() {
            shard.release();
        }
        shard
    }

    /// For whoever has the turn to look at it.
    pub(crate) fn look(&self) -> RwLockReadGuard<'_, Shard> {
        self.shard.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its epoch, for whoever has no turn; `None` as long as somebody changes it.
    pub(crate) fn epoch_now(&self) -> Option<u64> {
        match self.shard.try_read() {
            Ok(shard) => Some(shard.replica.epoch()),
            Err(TryLockError::Poisoned(shard)) => Some(shard.into_inner().replica.epoch()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Which kv head is number `head` of those of the pieces.
    pub(crate) fn kv_head(&self, head: usize) -> usize {
        self.pieces.iter().flat_map(|piece| piece.groups.clone()).nth(head).unwrap_or(head)
    }

    /// From now on nothing that is computed from it may be answered, and nothing changes it any more. False if that was so already.
    pub(super) fn mark_damaged(&self) -> bool {
        !self.is_damaged.swap(true, Ordering::SeqCst)
    }

    /// Whether one of its pages has changed by itself.
    pub(super) fn is_damaged(&self) -> bool {
        self.is_damaged.load(Ordering::SeqCst)
    }

    /// Gives all keys and values up.
    pub(crate) fn release(&self) {
        self.change().release();
    }
}

impl Shard {
    /// What the replica has.
    pub(crate) fn state(&self, store: &Store, replayed: bool) -> ShardState {
        let state = ShardState::from(self.replica.state());
        ShardState { replayed, resident_bytes: store.resident_bytes(), ..state }
    }

    /// What it has, and the ops that it remembers.
    ///
    /// # Errors
    /// [`Reason::Shard`] if it was released.
    pub(crate) fn records(&self, store: &Store) -> Result<ShardRecords, Error> {
        if self.pages.is_none() {
            return Err(no_shard(self.key));
        }
        Ok(ShardRecords { state: self.state(store, false), records: self.replica.records().collect() })
    }

    /// The answer to who wants it to be held, in this epoch.
    ///
    /// # Errors
    /// [`Reason::Epoch`] if it is of another one.
    pub(crate) fn held(&self, store: &Store, epoch: u64, replayed: bool) -> Result<ShardState, Error> {
        let shard = self.replica.epoch();
        if self.pages.is_none() {
            return Err(no_shard(self.key));
        }
        if epoch != shard {
            return Err(Error::from(ReplicaRefusal::Epoch { shard, request: epoch }));
        }
        Ok(self.state(store, replayed))
    }

    /// Appends the rows of a step, which fit the shard.
    ///
    /// # Errors
    /// What the replica refuses, [`Reason::KvBudget`] and [`Reason::NonFinite`]. Nothing of the rows is here then.
    pub(crate) fn append(
        &mut self,
        store: &Store,
        epoch: u64,
        layer: usize,
        rows: &ShardRows,
    ) -> Result<ShardState, Error> {
        let op = rows.op(layer);
        let key = self.key;
        if self.pages.is_none() {
            return Err(no_shard(key));
        }
        match self.replica.begin(epoch, rows.op.generation, &op).map_err(Error::from)? {
            Verdict::Replayed => return Ok(self.state(store, true)),
            Verdict::Apply => self.abandon(),
        }
        let pages = self.pages.as_mut().ok_or_else(|| no_shard(key))?;
        let need = pages.growth_bytes(layer, rows.tokens);
        let _claim = store.memory().claim(pages.layout(), need).map_err(no_memory)?;
        let token_rows = TokenRows {
            base_len: rows.base_len,
            tokens: rows.tokens,
            k: &rows.k,
            v: &rows.v,
            check_finite: !rows.allow_non_finite,
        };
        pages.append(layer, &token_rows).map_err(|error| pages_refuse(store, pages, need, &error))?;
        self.replica.apply(&op, rows.crc32c);
        Ok(self.state(store, false))
    }

    /// Begins an append in chunks, unless it was applied before: then the answer is here already.
    ///
    /// # Errors
    /// What the replica refuses, and [`Reason::KvBudget`].
    pub(crate) fn begin_bulk(
        &mut self,
        store: &Store,
        id: BulkId,
        append: &ShardAppend,
    ) -> Result<Option<ShardState>, Error> {
        let key = self.key;
        if self.pages.is_none() {
            return Err(no_shard(key));
        }
        let verdict = self.replica.begin(append.at.epoch, append.op.generation, &append.op());
        match verdict.map_err(Error::from)? {
            Verdict::Replayed => return Ok(Some(self.state(store, true))),
            Verdict::Apply => self.abandon(),
        }
        let pages = self.pages.as_mut().ok_or_else(|| no_shard(key))?;
        let need = pages.growth_bytes(append.layer, append.tokens);
        let claim = store.memory().claim(pages.layout(), need).map_err(no_memory)?;
        self.staged = Some(Staged::new(id, *append, pages, claim));
        Ok(None)
    }

    /// Writes a chunk of an append that has begun, where nobody sees it yet.
    ///
    /// # Errors
    /// What is wrong with it; nothing of the append is here then.
    pub(crate) fn chunk(&mut self, store: &Store, id: BulkId, chunk: &SliceChunk) -> Result<(), Error> {
        let key = self.key;
        let (Some(pages), Some(staged)) = (&mut self.pages, &mut self.staged) else {
            return Err(if self.pages.is_none() { no_shard(key) } else { given_up() });
        };
        if staged.id() != id {
            return Err(given_up());
        }
        let taken = staged.take(pages, chunk).map_err(|error| match error {
            Ok(error) => pages_refuse(store, pages, staged.needed(), &error),
            Err(error) => error,
        });
        if taken.is_err() {
            self.abandon();
        }
        taken
    }

    /// Makes an append part of the shard.
    ///
    /// # Errors
    /// If not all of it came; nothing of the append is here then.
    pub(crate) fn commit_bulk(
        &mut self,
        store: &Store,
        id: BulkId,
        commit: Commit,
    ) -> Result<ShardState, Error> {
        let key = self.key;
        let pages = self.pages.as_mut().ok_or_else(|| no_shard(key))?;
        let Some(staged) = self.staged.as_ref().filter(|staged| staged.id() == id) else {
            return Err(given_up());
        };
        let append = *staged.append();
        let op = append.op();
        let begun = self.replica.begin(append.at.epoch, append.op.generation, &op).map_err(Error::from);
        match begun.and_then(|_verdict| staged.content(commit)) {
            Ok(content_crc) => {
                pages.commit(append.layer, append.base_len + append.tokens);
                self.staged = None;
                self.replica.apply(&op, content_crc);
                Ok(self.state(store, false))
            }
            Err(error) => {
                self.abandon();
                Err(error)
            }
        }
    }

    /// Forgets an append that is on its way, if it is this one.
    pub(crate) fn abandon_bulk(&mut self, id: BulkId) {
        if self.staged.as_ref().is_some_and(|staged| staged.id() == id) {
            self.abandon();
        }
    }

    /// Truncates, seals, or takes an append back.
    ///
    /// # Errors
    /// What the replica refuses.
    pub(crate) fn apply(&mut self, store: &Store, change: &ShardChange) -> Result<ShardState, Error> {
        let key = self.key;
        let pages = self.pages.as_mut().ok_or_else(|| no_shard(key))?;
        let ShardChange { at, op, kind } = change;
        let Some(what) = kind.change() else {
            match self.replica.undo(at.epoch, op.op_seq, op.digest).map_err(Error::from)? {
                Undone::TakenBack { layer, len } => {
                    self.abandon();
                    if let Some(pages) = &mut self.pages {
                        pages.cut(layer, len);
                    }
                }
                // It may be on its way.
                Undone::NeverArrived => self.abandon(),
            }
            return Ok(self.state(store, false));
        };
        let op = op.op(what);
        match self.replica.begin(at.epoch, change.op.generation, &op).map_err(Error::from)? {
            Verdict::Replayed => return Ok(self.state(store, true)),
            Verdict::Apply => {}
        }
        if let ShardChangeKind::Truncate { len } = kind {
            pages.truncate(*len);
        }
        self.abandon();
        self.replica.apply(&op, 0);
        Ok(self.state(store, false))
    }

    /// From now on the shard is of this epoch.
    ///
    /// # Errors
    /// [`Reason::Epoch`] if it is of a higher one.
    pub(crate) fn fence(&mut self, store: &Store, epoch: u64) -> Result<ShardState, Error> {
        let key = self.key;
        if self.pages.is_none() {
            return Err(no_shard(key));
        }
        if self.replica.epoch() != epoch {
            self.replica.fence(epoch).map_err(Error::from)?;
            self.abandon();
        }
        Ok(self.state(store, false))
    }

    /// Whether a shard of this epoch may be let go.
    ///
    /// # Errors
    /// [`Reason::Epoch`] if it is of a higher one.
    pub(crate) fn check_release(&self, epoch: u64) -> Result<(), Error> {
        let shard = self.replica.epoch();
        if epoch < shard { Err(Error::from(ReplicaRefusal::Epoch { shard, request: epoch })) } else { Ok(()) }
    }

    /// What queries look at: of each kv head of each piece the first `at_len` tokens.
    ///
    /// # Errors
    /// What the replica refuses.
    pub(crate) fn views(
        &self,
        epoch: u64,
        generation: u64,
        layer: usize,
        at_len: usize,
    ) -> Result<Vec<(usize, KvView)>, Error> {
        let pages = self.pages.as_ref().ok_or_else(|| no_shard(self.key))?;
        self.replica.check_read(epoch, generation, layer, at_len).map_err(Error::from)?;
        let heads = pages.heads().iter().enumerate();
        let views: Option<Vec<_>> =
            heads.map(|(at, place)| Some((place.kv_head, pages.view(layer, at, at_len)?))).collect();
        views.ok_or_else(|| Error::new(Reason::Internal, "a layer has fewer tokens than its replica says"))
    }

    /// See [`Pages::scrub`]; nothing of what was released.
    pub(super) fn scrub(&self, from: PageAt, bytes: u64) -> Option<Result<Scrubbed, PageAt>> {
        Some(self.pages.as_ref()?.scrub(from, bytes))
    }

    /// See [`Pages::is_sound`]; of what was released nothing is known.
    pub(super) fn is_sound(&self, at: PageAt) -> Option<bool> {
        self.pages.as_ref()?.is_sound(at)
    }

    /// See [`Pages::damage`].
    #[cfg(test)]
    pub(crate) fn damage(&mut self, at: PageAt, word: usize) {
        self.pages.as_mut().unwrap().damage(at, word);
    }

    fn release(&mut self) {
        self.staged = None;
        self.pages = None;
    }

    /// Takes the tokens of a parent, if nothing has ever been here.
    fn become_child(&mut self, replica: Replica, pages: Pages) -> bool {
        let is_untouched = self.pages.is_some() && self.staged.is_none() && self.replica.is_untouched();
        if is_untouched && self.replica.epoch() == replica.epoch() {
            (self.replica, self.pages) = (replica, Some(pages));
            return true;
        }
        false
    }

    /// What another worker needs beside the rows, and all rows as they are now.
    ///
    /// # Errors
    /// [`Reason::Shard`] if it was released.
    pub(super) fn snapshot(&self) -> Result<(ReplicaSnapshot, Vec<Vec<KvView>>), Error> {
        let pages = self.pages.as_ref().ok_or_else(|| no_shard(self.key))?;
        let views = pages.views(self.replica.tokens());
        let short = || Error::new(Reason::Internal, "a layer has fewer tokens than its replica says");
        Ok((self.replica.snapshot(), views.ok_or_else(short)?))
    }

    /// Whether the replica has all that one has had whose last op and chain these are, and has only got rows since.
    pub(super) fn continues(&self, op_seq: u64, chain: u32) -> bool {
        self.replica.continues(op_seq, chain)
    }

    /// The same rows, which share memory with these until either changes.
    ///
    /// # Errors
    /// [`Reason::Shard`] if it was released.
    pub(super) fn fork_pages(&self) -> Result<Pages, Error> {
        self.pages.as_ref().map(Pages::fork).ok_or_else(|| no_shard(self.key))
    }

    /// Another replica takes the place of this one.
    pub(super) fn replace(&mut self, replica: Replica, pages: Pages) {
        self.abandon();
        self.replica = replica;
        self.pages = Some(pages);
    }

    /// Forgets what isn't part of the shard yet.
    pub(crate) fn abandon(&mut self) {
        if let (Some(staged), Some(pages)) = (self.staged.take(), &mut self.pages) {
            pages.forget(staged.append().layer);
        }
    }

    /// Forgets rows of a layer that nobody was told of.
    pub(crate) fn forget(&mut self, layer: usize) {
        if let Some(pages) = &mut self.pages {
            pages.forget(layer);
        }
    }
}

/// Makes a child of a shard, with the same tokens, which share memory until either changes.
///
/// # Errors
/// What the replica refuses, and [`Reason::SessionExists`] if the child is here already, unless it is held and empty. For memory nothing is
/// refused, as a fork is applied by all replicas or by none: whoever asks has the child held before.
pub(crate) fn fork(
    store: &Store,
    parent: &Resident,
    change: &ShardChange,
    child: u64,
) -> Result<ShardState, Error> {
    let mut shard = parent.change();
    let key = shard.key;
    let Some(pages) = &shard.pages else { return Err(no_shard(key)) };
    let Some(what) = change.kind.change() else { return Err(Error::new(Reason::Internal, "no fork")) };
    let op = change.op.op(what);
    if shard.replica.begin(change.at.epoch, change.op.generation, &op).map_err(Error::from)?
        == Verdict::Replayed
    {
        return Ok(shard.state(store, true));
    }
    let child_key = (child, key.1);
    let pages = pages.fork();
    let mut applied = shard.replica.clone();
    applied.apply(&op, 0);
    let (spec, pieces) = (Arc::clone(&parent.spec), parent.pieces.clone());
    let exists = || Error::new(Reason::SessionExists, format!("session {child:016x}"));
    match store.resident(child_key) {
        // Somebody has asked for room for it, and got it.
        Ok(held) => {
            let is_alike = held.spec == spec && held.pieces == pieces;
            if !is_alike || !held.change().become_child(applied.fork(), pages) {
                return Err(exists());
            }
        }
        Err(_nobody) => {
            let record = store.record_or_none(&spec, &pieces);
            let resident = Resident::of(child_key, spec, pieces, (applied.fork(), pages), record);
            if !store.insert_fork(resident) {
                return Err(exists());
            }
        }
    }
    shard.abandon();
    shard.replica = applied;
    Ok(shard.state(store, false))
}

/// Chunks of an append that something else has come before.
fn given_up() -> Error {
    Error::new(Reason::StreamOrder, "the append was given up")
}

/// What pages refuse, in words; `need` is what was claimed for all of the append.
fn pages_refuse(store: &Store, pages: &Pages, need: u64, error: &PagesError) -> Error {
    match *error {
        PagesError::NonFinite { tensor, head, found } => refusal::non_finite(tensor, head, &found),
        PagesError::Length { .. } => Error::new(Reason::PayloadLength, error.to_string()),
        PagesError::Full => no_memory(OverBudget { need, free: store.memory().free(pages.layout()) }),
    }
}
