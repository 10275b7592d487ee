//! When a failed call is sent again, and how long to wait before: the only place that decides.

use std::time::Duration;

use attnd_wire::Error;

/// How often a call is sent, the first time included.
pub const MAX_ATTEMPTS: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The pause before the next attempt after `attempts` that ended with `error`, or `None` to give up.
///
/// `left` is the time until the caller's deadline; `jitter` (0 to 1) keeps clients that failed together from coming
/// back together.
pub(crate) fn pause_before_next(
    attempts: u32,
    error: &Error,
    left: Option<Duration>,
    jitter: f64,
) -> Option<Duration> {
    if attempts >= MAX_ATTEMPTS || !error.is_retryable() {
        return None;
    }
    let doubled = FIRST_PAUSE * (1 << attempts.saturating_sub(1));
    let asked = error.pushback().unwrap_or_default();
    let pause = doubled.max(asked).mul_f64(0.75 + 0.5 * jitter.clamp(0.0, 1.0));
    left.is_none_or(|left| pause < left).then_some(pause)
}

#[cfg(test)]
mod tests {
    use attnd_wire::{Outcome, Reason};

    use super::*;

    const LOST: Reason = Reason::WorkerLost;

    #[test]
    fn only_what_was_not_executed_is_sent_again_and_at_most_three_times() {
        let lost = Error::new(LOST, "w1");
        let attempts: Vec<bool> =
            (1..5).map(|attempts| pause_before_next(attempts, &lost, None, 0.5).is_some()).collect();
        assert_eq!(attempts, [true, true, false, false]);
        for error in [
            Error::new(LOST, "").with_outcome(Outcome::Unknown),
            Error::new(Reason::KvBudget, "need 2, free 1"),
            Error::new(Reason::NonFinite, ""),
            Error::new(Reason::Deadline, "expired"),
        ] {
            assert_eq!(pause_before_next(1, &error, None, 0.5), None, "{error}");
        }
    }

    #[test]
    fn pauses_grow_are_jittered_and_heed_the_server() {
        let millis = |attempts, error: &Error, jitter| {
            pause_before_next(attempts, error, None, jitter).unwrap().as_millis()
        };
        let lost = Error::new(LOST, "");
        assert_eq!((millis(1, &lost, 0.0), millis(1, &lost, 1.0)), (75, 125));
        assert_eq!((millis(2, &lost, 0.0), millis(2, &lost, 1.0)), (150, 250));
        assert_eq!(millis(1, &Error::new(Reason::Draining, ""), 0.5), 200);
    }

    #[test]
    fn no_attempt_begins_past_the_deadline() {
        let lost = Error::new(LOST, "");
        let left = |millis| Some(Duration::from_millis(millis));
        assert_eq!(pause_before_next(1, &lost, left(100), 0.5), None);
        assert_eq!(pause_before_next(1, &lost, left(101), 0.5), left(100));
        assert_eq!(pause_before_next(1, &lost, left(0), 0.0), None);
    }
}
