//! When things happened in a call, and how long whoever is waited for has had.

use std::time::{Duration, Instant};

use attnd_wire::Timings;
use attnd_wire::limits::STALL;
use attnd_wire::surroundings::now;

/// How long a message has waited for its receiver.
#[derive(Default)]
pub(super) struct Stall(Option<Instant>);

impl Stall {
    /// When the receiver has had [`STALL`] for the message that waits; `None` if none does.
    pub(super) fn after(&mut self, waits: bool) -> Option<Instant> {
        self.0 = if waits { Some(self.0.unwrap_or_else(now)) } else { None };
        self.0.map(|since| since + STALL)
    }
}

/// When things happened.
pub(super) struct Clock {
    pub(super) begun: Instant,
    /// Since when the client is held back, and for how long it was before.
    held_since: Option<Instant>,
    held: Duration,
    first_chunk: Option<Instant>,
    scattered: Option<Instant>,
    pub(super) committed: Option<Instant>,
    pub(super) last_partial: Option<Instant>,
}

impl Clock {
    pub(super) fn new(begun: Instant) -> Self {
        Self {
            begun,
            held_since: None,
            held: Duration::ZERO,
            first_chunk: None,
            scattered: None,
            committed: None,
            last_partial: None,
        }
    }

    /// Time by a clock that stands still while workers hold the client back, so that it is not blamed for being idle.
    pub(super) fn client_time(&mut self) -> Duration {
        let now = self.held_since.unwrap_or_else(now);
        now.saturating_duration_since(self.begun).saturating_sub(self.held)
    }

    /// When that clock will show `client_time`, if the client is not held back until then.
    pub(super) fn instant_of(&self, client_time: Duration) -> Instant {
        self.begun + client_time + self.held
    }

    pub(super) fn chunk_arrived(&mut self) {
        self.first_chunk.get_or_insert_with(now);
    }

    pub(super) fn client_held(&mut self) {
        self.held_since.get_or_insert_with(now);
    }

    pub(super) fn client_freed(&mut self) {
        let now = now();
        self.held +=
            self.held_since.take().map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
    }

    /// All bytes of a share are sent.
    pub(super) fn sent_commit(&mut self) {
        self.scattered = Some(now());
    }

    pub(super) fn timings(&self, so_far: Timings) -> Timings {
        let seconds = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from).as_secs_f64(),
            _ => 0.0,
        };
        Timings {
            scatter: seconds(self.first_chunk, self.scattered),
            gather: seconds(self.committed, self.last_partial),
            total: now().saturating_duration_since(self.begun).as_secs_f64(),
            ..so_far
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_is_held_back_is_not_idle() {
        let begun = Instant::now().checked_sub(Duration::from_secs(100)).unwrap();
        let mut clock = Clock::new(begun);
        clock.held_since = Some(begun + Duration::from_secs(40));
        assert_eq!(clock.client_time(), Duration::from_secs(40));
        clock.client_freed();
        // 60 s of the 100 were not its own.
        let own = clock.client_time();
        assert!((Duration::from_secs(40)..Duration::from_secs(45)).contains(&own), "{own:?}");
        let due = clock.instant_of(Duration::from_secs(50));
        let wait = due.saturating_duration_since(Instant::now());
        assert!((Duration::from_secs(5)..=Duration::from_secs(10)).contains(&wait), "{wait:?}");
    }
}
