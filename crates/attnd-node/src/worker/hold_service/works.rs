//! The works of one message on their way: they wait for their turn, are done, and answered. Their partials may be given up at any time.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use attnd_wire::Error;
use tokio::sync::OwnedSemaphorePermit;

use super::QUEUE;
use super::answers::Asked;
use crate::budget::Reservation;
use crate::worker::store::Store;
use crate::worker::store::attention::unwanted;
use crate::worker::store::works::{self, Work};

/// Works of one message.
#[derive(Debug)]
pub(super) struct Pending {
    stream: Arc<AllPending>,
    /// Nobody wants the partials any more.
    given_up: AtomicBool,
    waits: Mutex<Option<Waits>>,
}

/// What works have until they begin.
#[derive(Debug)]
pub(super) struct Waits {
    pub(super) works: Vec<Result<Work, Error>>,
    pub(super) asked: Asked,
    pub(super) memory: Reservation,
    pub(super) room: Option<OwnedSemaphorePermit>,
}

impl Waits {
    /// Whether something is changed by them, and not only looked at.
    fn appends(&self) -> bool {
        self.works.iter().flatten().any(Work::appends)
    }
}

impl Pending {
    /// Those of a request of a stream.
    pub(super) fn new(stream: &Arc<AllPending>, request: u64, waits: Waits) -> Arc<Self> {
        let (stream, waits) = (Arc::clone(stream), Mutex::new(Some(waits)));
        let works = Arc::new(Self { stream, given_up: AtomicBool::new(false), waits });
        works.stream.insert(request, &works);
        works
    }

    /// Does them and answers, now that it is their turn, unless that was done.
    pub(super) fn run(&self, store: &Store) {
        let Some(Waits { works, asked, memory, room }) = self.take(|_any| true) else { return };
        let _room = room;
        if !self.stream.is_gone() {
            let wanted = || !self.stream.is_gone() && !self.given_up.load(Ordering::Relaxed);
            let done = works::run_all(store, works, wanted);
            asked.works(done, Some(memory));
        }
    }

    /// Nobody wants the partials any more: kernels stop at their next slice. What waits and changes nothing ends here, with its memory.
    fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
        if let Some(Waits { works, asked, .. }) = self.take(|waits| !waits.appends()) {
            asked.works(works.iter().map(|_work| Err(unwanted(None))).collect(), None);
        }
    }

    fn take(&self, if_so: impl FnOnce(&Waits) -> bool) -> Option<Waits> {
        // Nothing panics under this lock.
        self.waits.lock().unwrap_or_else(PoisonError::into_inner).take_if(|waits| if_so(waits))
    }
}

/// All works of a stream that have no answer yet, and some that have.
#[derive(Debug, Default)]
pub(crate) struct AllPending {
    is_gone: AtomicBool,
    works: Mutex<BTreeMap<u64, Weak<Pending>>>,
}

impl AllPending {
    /// Whether the stream is gone, and with it everybody who waited.
    pub(super) fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::SeqCst)
    }

    fn insert(&self, request: u64, works: &Arc<Pending>) {
        let mut all = self.lock();
        // No more have no answer than there are places for.
        if all.len() >= 2 * QUEUE {
            all.retain(|_, works| works.strong_count() > 0);
        }
        all.insert(request, Arc::downgrade(works));
    }

    /// Gives up the partials of a request, if they are still to come.
    pub(super) fn give_up(&self, request: u64) {
        let works = self.lock().remove(&request);
        if let Some(works) = works.and_then(|works| works.upgrade()) {
            works.give_up();
        }
    }

    /// The stream is gone: what waits is not done any more, and its memory is free.
    pub(super) fn end(&self) {
        self.is_gone.store(true, Ordering::SeqCst);
        let all = std::mem::take(&mut *self.lock());
        for works in all.into_values().filter_map(|works| works.upgrade()) {
            drop(works.take(|_any| true));
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Weak<Pending>>> {
        self.works.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
