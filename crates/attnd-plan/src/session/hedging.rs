//! When queries that a replica is late with are asked of another one too, and how often: the only place that decides. Hedged requests, after
//! J. Dean and L. A. Barroso, "The Tail at Scale", CACM 56(2), 2013: second ones are sent once the first has taken longer than most do,
//! so that they are few, and a bucket of tokens sees to it that they are, also where everything is late.
//!
//! What is usual is known per class of work, a power of two of keys times rows, from the latest answers of all workers: a slow one is
//! measured against the others. An answer that came late, or that nobody waited for any more, counts as well, the latter with the time
//! that it had taken by then: otherwise the slowest would be missing, and what is usual would become ever shorter.

use std::collections::BTreeMap;
use std::time::Duration;

/// The share of answers that come before a request is late, in percent.
const USUAL: usize = 95;
/// Answers of a class that are remembered: the latest.
const REMEMBERED: usize = 256;
/// Answers before which nobody knows what is usual.
const FEWEST: usize = 64;
/// Answers after which it is looked at again.
const LOOK: usize = 16;
/// Nothing is late before: the sums of shorter times are made by schedulers and timers, which the other replica has too.
pub const FLOOR: Duration = Duration::from_millis(2);
/// Less work than this takes as long as the way of its messages.
const LEAST_CLASS: u32 = 16;

/// So many requests give room for one that is sent twice: one in twenty.
const REQUESTS_PER_HEDGE: u32 = 20;
/// Hedges that may come one after the other, at most.
pub const BURST: u32 = 5;

/// What a worker is charged with for a late answer that another replica overtook; an answer in time takes back 1.
const OVERTAKEN: u32 = 8;
/// With so much it is slow: three of them, and few answers in time between.
const SLOW: u32 = 3 * OVERTAKEN;
/// How long a slow worker is asked last: at first, and at most. Then it is asked again as everybody else.
const ASKED_LAST: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(80)];

/// How long answers take, what was sent twice, and who is slow. `H` names a replica's worker.
#[derive(Clone, Debug)]
pub struct Hedging<H> {
    classes: BTreeMap<u32, Times>,
    /// Requests that are paid for and not used, of which a hedge takes [`REQUESTS_PER_HEDGE`].
    credit: u32,
    sent: u64,
    won: u64,
    charged: BTreeMap<H, Charge>,
}

/// The latest answers of a class.
#[derive(Clone, Debug, Default)]
struct Times {
    /// In microseconds, a ring.
    latest: Vec<u32>,
    next: usize,
    since_look: usize,
    usual: Option<Duration>,
}

/// What is held against a worker.
#[derive(Clone, Copy, Debug, Default)]
struct Charge {
    score: u32,
    /// How often it was slow, and until when it is asked last.
    times: u32,
    until: Duration,
}

impl<H> Default for Hedging<H> {
    fn default() -> Self {
        Self { classes: BTreeMap::new(), credit: 0, sent: 0, won: 0, charged: BTreeMap::new() }
    }
}

impl<H: Ord + Clone> Hedging<H> {
    /// A request with so much work (keys times rows) is sent: says after which time it is late, if that is known.
    pub fn ask(&mut self, work: u64) -> Option<Duration> {
        self.credit = (self.credit + 1).min(BURST * REQUESTS_PER_HEDGE);
        let usual = self.classes.get(&class(work))?.usual?;
        Some(usual.max(FLOOR))
    }

    /// It was answered, after so long.
    pub fn answered(&mut self, by: &H, work: u64, after: Duration) {
        self.classes.entry(class(work)).or_default().add(after);
        let Some(charge) = self.charged.get_mut(by) else { return };
        charge.score = charge.score.saturating_sub(1);
        if charge.score == 0 && charge.until == Duration::ZERO {
            self.charged.remove(by);
        }
    }

    /// It is late: whether so many requests may be sent for it to others.
    pub fn hedge(&mut self, requests: usize) -> bool {
        let cost = u32::try_from(requests).unwrap_or(u32::MAX).saturating_mul(REQUESTS_PER_HEDGE);
        if requests == 0 || cost > self.credit {
            return false;
        }
        self.credit -= cost;
        self.sent += requests as u64;
        true
    }

    /// One that was sent second had the first answer.
    pub fn won(&mut self) {
        self.won += 1;
    }

    /// And another request was late, after so long.
    pub fn overtaken(&mut self, late: &H, work: u64, after: Duration, now: Duration) {
        self.classes.entry(class(work)).or_default().add(after);
        let charge = self.charged.entry(late.clone()).or_default();
        charge.score += OVERTAKEN;
        if charge.score >= SLOW {
            let [first, most] = ASKED_LAST;
            charge.score = 0;
            charge.until = now + first.saturating_mul(1 << charge.times.min(10)).min(most);
            charge.times += 1;
        }
    }

    /// Whether others are to be asked before this worker, for now.
    pub fn is_slow(&self, worker: &H, now: Duration) -> bool {
        self.charged.get(worker).is_some_and(|charge| now < charge.until)
    }

    /// A worker is gone.
    pub fn forget(&mut self, worker: &H) {
        self.charged.remove(worker);
    }

    /// Requests that were sent second, and those of them that had the first answer.
    pub fn counts(&self) -> (u64, u64) {
        (self.sent, self.won)
    }
}

/// What is comparable: the power of two.
fn class(work: u64) -> u32 {
    work.max(1).ilog2().max(LEAST_CLASS)
}

impl Times {
    fn add(&mut self, after: Duration) {
        let micros = u32::try_from(after.as_micros()).unwrap_or(u32::MAX);
        match self.latest.get_mut(self.next) {
            Some(oldest) => *oldest = micros,
            None => self.latest.push(micros),
        }
        self.next = (self.next + 1) % REMEMBERED;
        self.since_look += 1;
        let is_enough = self.latest.len() >= FEWEST;
        if is_enough && (self.usual.is_none() || self.since_look >= LOOK) {
            self.since_look = 0;
            self.usual = self.quantile();
        }
    }

    /// The shortest time in which as many as are usual were answered.
    fn quantile(&self) -> Option<Duration> {
        let mut sorted = self.latest.clone();
        let at = (sorted.len() * USUAL).div_ceil(100).checked_sub(1)?;
        let (_, usual, _) = sorted.select_nth_unstable(at);
        Some(Duration::from_micros(u64::from(*usual)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const WORK: u64 = 1 << 20;

    fn after(times: impl IntoIterator<Item = u32>) -> Hedging<char> {
        let mut hedging = Hedging::default();
        times.into_iter().for_each(|n| hedging.answered(&'a', WORK, n * MS));
        hedging
    }

    fn ask(hedging: &mut Hedging<char>, times: std::ops::Range<u32>) {
        for _ in times {
            hedging.ask(WORK);
        }
    }

    #[test]
    fn what_is_late_is_known_from_enough_comparable_answers() {
        let mut hedging = after(1..FEWEST as u32);
        assert_eq!(hedging.ask(WORK), None, "one is missing");
        hedging.answered(&'a', WORK, FEWEST as u32 * MS);
        // 61 of 64 are more than 95 %, 60 aren't.
        assert_eq!(hedging.ask(WORK), Some(61 * MS));
        assert_eq!((hedging.ask(2 * WORK - 1), hedging.ask(2 * WORK)), (Some(61 * MS), None));
    }

    #[test]
    fn short_answers_are_not_late_before_the_floor_and_small_works_are_alike() {
        let mut hedging = after([]);
        (0..FEWEST).for_each(|_| hedging.answered(&'a', 1, Duration::from_micros(70)));
        assert_eq!(
            (hedging.ask(1), hedging.ask(0), hedging.ask((1 << 17) - 1)),
            (Some(FLOOR), Some(FLOOR), Some(FLOOR))
        );
        assert_eq!(hedging.ask(1 << 17), None);
    }

    #[test]
    fn the_latest_answers_count() {
        let mut hedging = after((0..1000).map(|_| 50));
        assert_eq!(hedging.ask(WORK), Some(50 * MS));
        (0..REMEMBERED).for_each(|_| hedging.answered(&'b', WORK, 4 * MS));
        assert_eq!(hedging.ask(WORK), Some(4 * MS));
        // One in ten is slow, whether it was waited for or not.
        for n in 0..REMEMBERED {
            match n % 10 {
                0 => hedging.overtaken(&'c', WORK, 90 * MS, MS),
                _ => hedging.answered(&'b', WORK, 4 * MS),
            }
        }
        assert_eq!(hedging.ask(WORK), Some(90 * MS));
    }

    #[test]
    fn one_in_twenty_may_be_sent_twice_and_few_at_once() {
        let mut hedging = after([]);
        assert!(!hedging.hedge(1), "nothing was asked");
        ask(&mut hedging, 0..19);
        assert!(!hedging.hedge(1));
        hedging.ask(WORK);
        assert!(hedging.hedge(1) && !hedging.hedge(1));
        ask(&mut hedging, 0..40);
        assert!(!hedging.hedge(3) && hedging.hedge(2) && !hedging.hedge(0));
        // However much is asked, and if all of it is late.
        ask(&mut hedging, 0..10_000);
        assert_eq!((0..100).filter(|_| hedging.hedge(1)).count(), BURST as usize);
        let hedges = (0..1000).filter(|_| hedging.ask(WORK).is_none() && hedging.hedge(1)).count();
        assert_eq!(hedges, 50);
        assert_eq!(hedging.counts(), (1 + 2 + 5 + 50, 0));
    }

    #[test]
    fn who_is_overtaken_again_and_again_is_asked_last_for_a_while() {
        let mut hedging = after([]);
        let overtake = |hedging: &mut Hedging<char>, now| hedging.overtaken(&'s', WORK, 9 * MS, now);
        let second = Duration::from_secs(1);
        for _ in 0..2 {
            overtake(&mut hedging, second);
        }
        assert!(!hedging.is_slow(&'s', second));
        overtake(&mut hedging, second);
        assert!(hedging.is_slow(&'s', 2 * second) && !hedging.is_slow(&'o', 2 * second));
        assert!(!hedging.is_slow(&'s', 6 * second), "it is asked again");
        // It still is, and for longer.
        (0..3).for_each(|_| overtake(&mut hedging, 6 * second));
        assert!(hedging.is_slow(&'s', 15 * second) && !hedging.is_slow(&'s', 16 * second));
        (0..300).for_each(|n| overtake(&mut hedging, n * second));
        assert!(hedging.is_slow(&'s', 370 * second) && !hedging.is_slow(&'s', 380 * second));
        hedging.forget(&'s');
        assert!(!hedging.is_slow(&'s', 370 * second));
    }

    #[test]
    fn who_is_late_now_and_then_is_not_slow() {
        let mut hedging = after([]);
        for n in 0..1000 {
            match n % 20 {
                0 => hedging.overtaken(&'a', WORK, 9 * MS, MS),
                _ => hedging.answered(&'a', WORK, 3 * MS),
            }
            assert!(!hedging.is_slow(&'a', MS), "after {n}");
        }
    }
}
