//! The memory that sessions may take on this worker: an arena with a limit, and what is promised of it to appends that have begun.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use attnd_kernel::{Arena, PageLayout};

use crate::budget::OverBudget;

/// Where the pages of all sessions lie.
#[derive(Clone, Debug)]
pub(crate) struct SessionMemory {
    arena: Arena,
    /// Bytes of pages that are to come.
    promised: Arc<Mutex<u64>>,
}

/// A promise of memory for pages that are to come, until it is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    promised: Arc<Mutex<u64>>,
    bytes: u64,
}

impl SessionMemory {
    /// Memory of at most `limit` bytes.
    pub(crate) fn new(limit: u64) -> Self {
        Self { arena: Arena::with_limit(limit), promised: Arc::default() }
    }

    /// Where pages are taken from.
    pub(crate) fn arena(&self) -> &Arena {
        &self.arena
    }

    /// Bytes taken of the system's memory.
    pub(crate) fn resident(&self) -> u64 {
        self.arena.bytes()
    }

    /// Promises `need` bytes for pages of this layout. Nothing is taken yet.
    ///
    /// # Errors
    /// If there is less, with both numbers.
    pub(crate) fn claim(&self, layout: PageLayout, need: u64) -> Result<Claim, OverBudget> {
        if need > 0 {
            let mut promised = lock(&self.promised);
            let free = self.arena.free_bytes(layout).saturating_sub(*promised);
            if need > free {
                return Err(OverBudget { need, free });
            }
            *promised += need;
        }
        Ok(Claim { promised: Arc::clone(&self.promised), bytes: need })
    }

    /// What pages of this layout may still take, in bytes.
    pub(crate) fn free(&self, layout: PageLayout) -> u64 {
        self.arena.free_bytes(layout).saturating_sub(*lock(&self.promised))
    }
}

impl Claim {
    /// What is still promised.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Nothing more than `left` is to come.
    pub(crate) fn shrink(&mut self, left: u64) {
        let used = self.bytes.saturating_sub(left);
        if used > 0 {
            *lock(&self.promised) -= used;
            self.bytes -= used;
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.shrink(0);
    }
}

/// No critical section of this file can panic half-way.
fn lock(promised: &Mutex<u64>) -> MutexGuard<'_, u64> {
    promised.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use attnd_kernel::Storage;

    use super::*;

    #[test]
    fn what_was_promised_is_not_free() {
        let layout = PageLayout { storage: Storage::F32, head_dim: 128, value_dim: 128 };
        let page = layout.resident_bytes(1);
        let memory = SessionMemory::new(4 << 20);
        assert_eq!(memory.free(layout), 16 * page);
        let mut first = memory.claim(layout, 10 * page).unwrap();
        let refused = memory.claim(layout, 7 * page).unwrap_err();
        assert_eq!(refused, OverBudget { need: 7 * page, free: 6 * page });
        first.shrink(4 * page);
        first.shrink(5 * page);
        let second = memory.claim(layout, 12 * page).unwrap();
        assert_eq!(memory.free(layout), 0);
        assert!(memory.claim(layout, 0).is_ok());
        drop((first, second));
        assert_eq!((memory.free(layout), memory.resident()), (16 * page, 0));
    }
}
