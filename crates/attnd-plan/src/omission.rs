//! Checks that a simulation leaves out, to show that it would see it. Only what is built with the feature `simulation` can; for all
//! else every check is there, and what is asked here costs nothing.

/// A check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Omission {
    /// That a request has the epoch of its shard.
    EpochCheck,
    /// That partials of all cells are there, each once.
    CoverageCheck,
    /// That nothing of an append counts before its Commit.
    Commit,
    /// That an op which comes again is known.
    Dedup,
    /// That rows have the checksum that they were sent with.
    Checksum,
}

/// Whether this thread leaves the check out.
#[cfg(not(feature = "simulation"))]
#[inline(always)]
pub const fn omits(_: Omission) -> bool {
    false
}

/// Does nothing.
#[cfg(not(feature = "simulation"))]
#[inline(always)]
pub const fn repeat_some<T>(_: &mut Vec<T>) {}

#[cfg(feature = "simulation")]
mod simulated {
    use std::cell::Cell;

    use super::Omission;

    thread_local! {
        static OMITTED: Cell<Option<Omission>> = const { Cell::new(None) };
        static REPEATS: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
    }

    /// Whether this thread leaves the check out.
    pub fn omits(what: Omission) -> bool {
        OMITTED.get() == Some(what)
    }

    /// Leaves a check out on this thread, or none.
    pub fn omit(what: Option<Omission>) {
        OMITTED.set(what);
    }

    /// From now on every so many answers of a worker on this thread say something twice; 0: none.
    pub fn repeat_every(answers: u64) {
        REPEATS.set((answers, 0));
    }

    /// Says the last thing twice, if it is time to.
    pub fn repeat_some<T: Clone>(answer: &mut Vec<T>) {
        let (every, so_far) = REPEATS.get();
        if every > 0 {
            REPEATS.set((every, so_far + 1));
            if so_far % every == every - 1 {
                answer.extend(answer.last().cloned());
            }
        }
    }
}

#[cfg(feature = "simulation")]
pub use simulated::{omit, omits, repeat_every, repeat_some};
