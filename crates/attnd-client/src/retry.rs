//! When a failed call is sent again, and how long to wait before: the only place that decides.

use std::time::Duration;

use attnd_wire::{Error, Outcome, Reason};
use tonic::Code;

/// How often a call is sent, the first time included.
pub const MAX_ATTEMPTS: u32 = 3;
/// How often a request about a session is sent, the first time included: long enough for a lost worker to be noticed and replaced, which
/// takes seconds, as no other worker can step in for the one that holds the keys. Where a coordinator starts again, or finds out what
/// its workers have, it is sent until its time is over.
pub const MAX_SESSION_ATTEMPTS: u32 = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

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
    pause(attempts, error, left, jitter)
}

/// The same for a request about a session, which may also be sent again where nobody knows what became of it: one that changes nothing,
/// or a mutation that has its number, under which it is applied once. `is_known`: the coordinator has answered before.
pub(crate) fn pause_before_repeat(
    attempts: u32,
    error: &Error,
    is_known: bool,
    left: Option<Duration>,
    jitter: f64,
) -> Option<Duration> {
    let may_pass = error.outcome != Outcome::Applied && (error.is_retryable() || is_of_the_way(error));
    let is_patient = is_known && left.is_some() && is_of_a_start(error);
    if !may_pass || (attempts >= MAX_SESSION_ATTEMPTS && !is_patient) {
        return None;
    }
    pause(attempts, error, left, jitter)
}

/// Whether a coordinator goes, or comes: what it knew of sessions outlives it.
fn is_of_a_start(error: &Error) -> bool {
    matches!(error.reason, Reason::Recovering | Reason::Transport | Reason::Cancelled | Reason::Draining)
}

/// Whether a request failed on its way, rather than for what it says.
fn is_of_the_way(error: &Error) -> bool {
    let on_the_way =
        [Reason::Transport, Reason::Cancelled, Reason::Checksum, Reason::StreamIdle, Reason::Epoch];
    on_the_way.contains(&error.reason) || error.reason.code() == Code::Unavailable
}

fn pause(attempts: u32, error: &Error, left: Option<Duration>, jitter: f64) -> Option<Duration> {
    let doubled = FIRST_PAUSE * (1 << attempts.saturating_sub(1).min(10));
    let asked = error.pushback().unwrap_or_default();
    let pause = doubled.min(LONGEST_PAUSE).max(asked).mul_f64(0.75 + 0.5 * jitter.clamp(0.0, 1.0));
    left.is_none_or(|left| pause < left).then_some(pause)
}

#[cfg(test)]
mod tests {
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
    fn what_can_be_repeated_is_sent_again_where_nobody_knows_what_became_of_it() {
        let again =
            |attempts, error: &Error| pause_before_repeat(attempts, error, false, None, 0.5).is_some();
        let cut = Error::new(Reason::Transport, "connection lost");
        assert!(again(1, &cut) && again(7, &cut) && !again(8, &cut));
        assert!(again(1, &Error::new(Reason::Recovering, "")));
        for error in [
            Error::new(Reason::SeqGap, ""),
            Error::new(Reason::Internal, ""),
            Error::new(Reason::ReplyInvalid, ""),
            Error::new(Reason::Deadline, "expired").with_outcome(Outcome::Unknown),
            Error::new(Reason::Transport, "").with_outcome(Outcome::Applied),
        ] {
            assert!(!again(1, &error), "{error}");
        }
        // All attempts together last longer than it takes to replace a worker.
        let total: Duration = (1..8).filter_map(|n| pause_before_repeat(n, &cut, false, None, 0.0)).sum();
        assert!(total > Duration::from_millis(2500) && total < Duration::from_secs(6), "{total:?}");
    }

    #[test]
    fn a_coordinator_that_starts_again_is_waited_for_as_long_as_there_is_time() {
        let left = Some(Duration::from_secs(2));
        let again =
            |error: &Error, is_known, left| pause_before_repeat(30, error, is_known, left, 1.0).is_some();
        for reason in [Reason::Transport, Reason::Recovering, Reason::Draining, Reason::Cancelled] {
            let error = Error::new(reason, "");
            assert!(again(&error, true, left), "{error}");
            // Nobody is there, it seems, or there is no end.
            assert!(!again(&error, false, left) && !again(&error, true, None), "{error}");
            assert!(!again(&error, true, Some(Duration::from_millis(1200))), "{error}");
        }
        for reason in [Reason::NoWorkers, Reason::WorkerLost, Reason::UnderReplicated, Reason::Checksum] {
            assert!(!again(&Error::new(reason, ""), true, left), "{reason}");
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
