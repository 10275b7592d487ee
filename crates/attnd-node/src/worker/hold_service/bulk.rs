//! Appends in chunks: many frames, which all run in turn, and one answer.

use std::sync::{Arc, Mutex, PoisonError};

use attnd_wire::hold::{ShardAppend, ShardState};
use attnd_wire::{Error, refusal};

use super::answers::Asked;
use crate::worker::store::Store;
use crate::worker::store::shard::Resident;
use crate::worker::store::staged::BulkId;
use crate::worker::store::turns::Access;

/// An append in chunks, for the stream that it comes on.
#[derive(Debug)]
pub(crate) struct Bulk {
    pub(crate) id: BulkId,
    pub(crate) owed: Owed,
    /// None where the append was refused before it was known what it is about.
    pub(crate) to: Option<(Arc<Resident>, ShardAppend)>,
    pub(crate) chunks: u64,
    pub(crate) bytes: u64,
}

/// The answer to an append, which whoever knows it first gives.
#[derive(Clone, Debug)]
pub(crate) struct Owed(Arc<Mutex<Option<Asked>>>);

impl Owed {
    pub(crate) fn new(asked: Asked) -> Self {
        Self(Arc::new(Mutex::new(Some(asked))))
    }

    /// Whether nobody has answered yet.
    pub(crate) fn is_open(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Answers, unless that was done.
    pub(crate) fn answer(&self, state: Result<ShardState, Error>) {
        let asked = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(asked) = asked {
            asked.state(state);
        }
    }
}

impl Bulk {
    /// Answers with an error, and forgets what came.
    pub(crate) fn fail(&self, store: &Store, error: Error) {
        self.owed.answer(Err(error));
        if let Some((resident, _)) = &self.to {
            let (id, resident) = (self.id, Arc::clone(resident));
            let touches = vec![(resident.key, Access::Changes)];
            store.submit(touches, Box::new(move || resident.change().abandon_bulk(id)));
        }
    }

    /// The stream has ended before the append did.
    pub(crate) fn truncated(&self, store: &Store) {
        let expected = match &self.to {
            Some((resident, append)) => {
                append.bytes(&resident.spec, &resident.pieces).map_or(0, |(k, v)| k + v)
            }
            None => 0,
        };
        self.fail(store, refusal::stream_truncated(self.chunks, self.bytes, expected));
    }
}
