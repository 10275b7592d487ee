//! Memory that may be taken: of a worker by calls and sessions, of a coordinator by steps. Bytes are reserved from declared sizes before
//! anything is done for them, and go back when the reservation is dropped, whatever the reason.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A limit, and what is reserved of it.
#[derive(Debug)]
pub(crate) struct Budget {
    limit: u64,
    reserved: AtomicU64,
}

/// More was asked for than is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("need {need}, free {free}")]
pub(crate) struct OverBudget {
    /// Bytes asked for.
    pub(crate) need: u64,
    /// Bytes free at that moment.
    pub(crate) free: u64,
}

/// Bytes of a [`Budget`], until it is released or dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    budget: Arc<Budget>,
    bytes: AtomicU64,
}

impl Budget {
    /// A budget of `limit` bytes.
    pub(crate) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, reserved: AtomicU64::new(0) })
    }

    /// The limit in bytes.
    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes reserved now.
    pub(crate) fn reserved(&self) -> u64 {
        self.reserved.load(Ordering::Relaxed)
    }

    /// Reserves `bytes`, all or nothing.
    ///
    /// # Errors
    /// [`OverBudget`] with both numbers.
    pub(crate) fn reserve(self: &Arc<Self>, bytes: u64) -> Result<Reservation, OverBudget> {
        let take = |reserved: u64| reserved.checked_add(bytes).filter(|after| *after <= self.limit);
        match self.reserved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            Ok(_before) => Ok(Reservation { budget: Arc::clone(self), bytes: bytes.into() }),
            Err(reserved) => Err(OverBudget { need: bytes, free: self.limit.saturating_sub(reserved) }),
        }
    }
}

impl Reservation {
    /// Moves up to `bytes` of this reservation to one of its own, so that they can go back earlier.
    pub(crate) fn split(&mut self, bytes: u64) -> Self {
        let all = self.bytes.get_mut();
        let bytes = bytes.min(*all);
        *all -= bytes;
        Self { budget: Arc::clone(&self.budget), bytes: bytes.into() }
    }

    /// Gives the bytes back although others still hold this.
    pub(crate) fn release(&self) {
        self.budget.reserved.fetch_sub(self.bytes.swap(0, Ordering::Relaxed), Ordering::Relaxed);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_with_the_numbers_and_takes_nothing() {
        let budget = Budget::new(100);
        let held = budget.reserve(60).unwrap();
        assert_eq!(budget.reserve(41).unwrap_err(), OverBudget { need: 41, free: 40 });
        assert_eq!(budget.reserve(u64::MAX).unwrap_err(), OverBudget { need: u64::MAX, free: 40 });
        assert_eq!(budget.reserved(), 60);
        drop(held);
        assert_eq!(budget.reserved(), 0);
        assert!(budget.reserve(100).is_ok());
    }

    #[test]
    fn parts_go_back_one_by_one() {
        let budget = Budget::new(100);
        let mut whole = budget.reserve(90).unwrap();
        let part = whole.split(50);
        let too_much = whole.split(1000);
        drop(part);
        assert_eq!(budget.reserved(), 40);
        drop(whole);
        assert_eq!(budget.reserved(), 40);
        too_much.release();
        assert_eq!(budget.reserved(), 0);
        drop(too_much);
        assert_eq!(budget.reserved(), 0, "bytes go back once");
    }

    #[test]
    fn many_threads_never_exceed_the_limit() {
        let budget = Budget::new(10);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        let held = budget.reserve(4);
                        assert!(budget.reserved() <= 10);
                        drop(held);
                    }
                });
            }
        });
        assert_eq!(budget.reserved(), 0);
    }
}
