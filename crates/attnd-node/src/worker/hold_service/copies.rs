//! Copies of replicas, for the stream that they come on: those that are given, of which chunks are asked for, and those that are taken,
//! which are many frames and one answer.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use attnd_wire::hold::{CopyChunk, CopySum, ExportRead, HoldAnswer, ShardExport, ShardImport};
use attnd_wire::{Error, Reason};
use tokio::sync::OwnedSemaphorePermit;

use super::answers::Asked;
use super::bulk::Owed;
use crate::worker::store::Store;
use crate::worker::store::export::Export;
use crate::worker::store::import::Import;
use crate::worker::store::shard::{ShardKey, key_of};
use crate::worker::store::turns::Access;

/// Copies of each kind that one stream has at once.
const MAX_COPIES: usize = 64;

/// All of one stream. What is left of them when it ends is given up.
#[derive(Debug, Default)]
pub(super) struct Copies {
    /// By the number of the request that began them; empty until that is answered.
    exports: BTreeMap<u64, Arc<Mutex<Option<Arc<Export>>>>>,
    imports: BTreeMap<u64, Importing>,
}

/// A copy that is on its way here.
#[derive(Debug)]
struct Importing {
    key: ShardKey,
    owed: Owed,
    /// Nothing before its turn has come, and once it is answered.
    import: Arc<Mutex<Option<Import>>>,
}

impl Copies {
    /// Begins to give a replica.
    pub(super) fn export(&mut self, store: &Store, request: u64, asked: Asked, export: ShardExport) {
        if self.exports.len() >= MAX_COPIES {
            return asked.answer(Err(too_many()), None);
        }
        let ShardExport { at, base } = export;
        let place = Arc::new(Mutex::new(None));
        self.exports.insert(request, Arc::clone(&place));
        let of = store.clone();
        let begin = move || {
            let begun = of.resident(key_of(&at)).and_then(|resident| Export::new(&resident, base));
            let answer = begun.map(|(export, snapshot)| {
                *lock(&place) = Some(Arc::new(export));
                HoldAnswer::Snapshot(Box::new(snapshot))
            });
            asked.answer(answer, None);
        };
        store.submit(vec![(key_of(&at), Access::Reads)], Box::new(begin));
    }

    /// Gives a chunk. It touches nothing that may change, so it stands in nobody's way.
    pub(super) fn read(&self, store: &Store, asked: Asked, read: ExportRead) {
        let export = match self.find(read.export) {
            Ok(export) => export,
            Err(error) => return asked.answer(Err(error), None),
        };
        match store.reserve(export.chunk_bytes()) {
            Ok(memory) => {
                let of = store.clone();
                let give = move || {
                    let chunk = export.chunk(read.index);
                    if let Some((resident, at)) = export.damaged() {
                        of.look_again(&resident, at);
                    }
                    asked.answer(chunk.map(HoldAnswer::Chunk), Some(memory));
                };
                store.submit(Vec::new(), Box::new(give));
            }
            Err(error) => asked.answer(Err(error), None),
        }
    }

    /// Says what was given.
    pub(super) fn end(&mut self, asked: Asked, export: u64) {
        let sum = self.find(export).and_then(|export| export.sum());
        self.exports.remove(&export);
        asked.answer(sum.map(HoldAnswer::Sum), None);
    }

    fn find(&self, export: u64) -> Result<Arc<Export>, Error> {
        let begun = self.exports.get(&export).and_then(|place| lock(place).clone());
        begun.ok_or_else(|| Error::new(Reason::StreamOrder, format!("request {export} is no export")))
    }

    /// Begins to take a replica.
    pub(super) fn import(&mut self, store: &Store, request: u64, asked: Asked, import: ShardImport) {
        // What was refused still has frames on their way.
        self.imports.retain(|number, importing| {
            importing.owed.is_open() || request.saturating_sub(*number) < MAX_COPIES as u64
        });
        if self.imports.len() >= MAX_COPIES {
            return asked.answer(Err(too_many()), None);
        }
        let key = key_of(&import.at);
        let (owed, place) = (Owed::new(asked), Arc::new(Mutex::new(None)));
        let importing = Importing { key, owed: owed.clone(), import: Arc::clone(&place) };
        self.imports.insert(request, importing);
        let of = store.clone();
        let begin = move || {
            if !owed.is_open() {
                return;
            }
            match Import::new(&of, import) {
                Ok(begun) => *lock(&place) = Some(begun),
                Err(error) => owed.answer(Err(error)),
            }
        };
        store.submit(vec![(key, Access::Changes)], Box::new(begin));
    }

    /// Whether this request is a copy to here.
    pub(super) fn has_import(&self, request: u64) -> bool {
        self.imports.contains_key(&request)
    }

    /// Takes a chunk, in its turn.
    pub(super) fn take(
        &self,
        store: &Store,
        request: u64,
        chunk: CopyChunk,
        room: Option<OwnedSemaphorePermit>,
    ) {
        let Some(Importing { key, owed, import }) = self.imports.get(&request) else { return };
        if !owed.is_open() {
            return;
        }
        let (of, owed, place) = (store.clone(), owed.clone(), Arc::clone(import));
        let write = move || {
            let _room = room;
            let mut place = lock(&place);
            let Some(import) = place.as_mut().filter(|_| owed.is_open()) else { return };
            if let Err(error) = import.take(&of, &chunk) {
                *place = None;
                owed.answer(Err(error));
            }
        };
        store.submit(vec![(*key, Access::Changes)], Box::new(write));
    }

    /// Makes a copy the replica that it is.
    pub(super) fn finish(&mut self, store: &Store, request: u64, sum: CopySum) {
        let Some(Importing { key, owed, import }) = self.imports.remove(&request) else { return };
        let of = store.clone();
        let finish = move || {
            if let Some(import) = lock(&import).take().filter(|_| owed.is_open()) {
                owed.answer(import.finish(&of, sum));
            }
        };
        store.submit(vec![(key, Access::Changes)], Box::new(finish));
    }

    /// Nothing more comes of a copy, which is answered once nothing of it is here any more.
    pub(super) fn give_up(&mut self, store: &Store, request: u64) {
        let error = Error::new(Reason::StreamTruncated, "the copy was given up, nothing applied");
        if let Some(importing) = self.imports.remove(&request) {
            importing.fail(store, error);
        }
    }

    /// Something is wrong with a frame of a copy.
    pub(super) fn fail(&self, store: &Store, request: u64, error: Error) {
        if let Some(importing) = self.imports.get(&request) {
            importing.fail(store, error);
        }
    }
}

impl Importing {
    fn fail(&self, store: &Store, error: Error) {
        let (owed, import) = (self.owed.clone(), Arc::clone(&self.import));
        let fail = move || {
            drop(lock(&import).take());
            owed.answer(Err(error));
        };
        store.submit(vec![(self.key, Access::Changes)], Box::new(fail));
    }
}

fn too_many() -> Error {
    Error::new(Reason::Overloaded, format!("{MAX_COPIES} copies on one stream"))
}

/// What panics here leaves a copy that is answered for, and nothing else.
fn lock<T>(place: &Mutex<T>) -> MutexGuard<'_, T> {
    place.lock().unwrap_or_else(PoisonError::into_inner)
}
