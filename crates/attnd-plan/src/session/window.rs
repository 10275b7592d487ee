//! The last ops of a session, so that one which comes again is known and answered as it was then.

use std::collections::VecDeque;

use super::op::{Answer, Record};

/// Ops that are remembered; one that comes again later than this many others is refused.
pub const WINDOW: usize = 1024;
/// Ops that are kept: when the last one is taken back, there still are as many behind it as shall be remembered. Two are never taken
/// back one after the other.
pub const KEPT: usize = WINDOW + 1;

/// The last [`KEPT`] ops, which all follow each other.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Window {
    /// The number of the last one; 0 before any.
    last: u64,
    /// Oldest first, 24 bytes each: there are as many as sessions have ops.
    entries: VecDeque<Entry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Entry {
    digest: u32,
    len: u32,
    generation: u64,
    /// 0 where there is none: no session has this number.
    child: u64,
}

/// What the window says of a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// The next op, or one after it.
    New,
    /// An op that was applied, with its digest.
    Applied(Record),
    /// Older than all that are remembered, of which this is the oldest.
    Forgotten { oldest: u64 },
}

impl Window {
    /// A window in which ops up to `last` are forgotten, and none is remembered.
    pub(super) fn after(last: u64) -> Self {
        Self { last, entries: VecDeque::new() }
    }

    /// A window of these records, of which the last is op `last`. Of records with a gap only those behind it count.
    pub(super) fn of(last: u64, records: &[Record]) -> Self {
        let mut window = Self::after(last);
        let oldest_first = records.len().saturating_sub(KEPT);
        for record in records.iter().skip(oldest_first).filter(|record| record.seq <= last) {
            let follows = window.entries.is_empty() || window.last + 1 == record.seq;
            if !follows {
                window.entries.clear();
            }
            window.entries.push_back(Entry::of(record));
            window.last = record.seq;
        }
        if window.last != last {
            return Self::after(last);
        }
        window
    }

    /// The number of the last op; 0 before any.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// The number of the oldest op that is remembered; the next one if none is.
    pub fn oldest(&self) -> u64 {
        self.last + 1 - self.entries.len().min(WINDOW) as u64
    }

    /// Whether it is as long as it has to be.
    pub(super) fn is_whole(&self) -> bool {
        self.entries.len() as u64 >= self.last.min(WINDOW as u64)
    }

    /// All that it remembers, oldest first.
    pub fn records(&self) -> impl Iterator<Item = Record> + '_ {
        let oldest = self.oldest();
        self.kept().skip_while(move |record| record.seq < oldest)
    }

    /// All that it keeps, oldest first.
    pub fn kept(&self) -> impl Iterator<Item = Record> + '_ {
        let first = self.last + 1 - self.entries.len() as u64;
        self.entries.iter().zip(first..).map(|(entry, seq)| entry.record(seq))
    }

    pub(super) fn look(&self, seq: u64) -> Known {
        if seq > self.last {
            return Known::New;
        }
        let oldest = self.oldest();
        let index = usize::try_from(self.last - seq).ok().filter(|_| seq >= oldest);
        let entry = index.and_then(|index| self.entries.iter().rev().nth(index));
        entry.map_or(Known::Forgotten { oldest }, |entry| Known::Applied(entry.record(seq)))
    }

    /// Remembers the next op.
    pub(super) fn push(&mut self, digest: u32, answer: Answer) {
        self.last += 1;
        self.entries.push_back(Entry::of(&Record { seq: self.last, digest, answer }));
        if self.entries.len() > KEPT {
            self.entries.pop_front();
        }
    }

    /// Forgets the last op, as if it had never been.
    pub(super) fn pop(&mut self) {
        if self.entries.pop_back().is_some() {
            self.last -= 1;
        }
    }
}

impl Entry {
    fn of(record: &Record) -> Self {
        let Answer { len, generation, child } = record.answer;
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        Self { digest: record.digest, len, generation, child: child.unwrap_or(0) }
    }

    fn record(self, seq: u64) -> Record {
        let child = (self.child != 0).then_some(self.child);
        let answer = Answer { len: self.len as usize, generation: self.generation, child };
        Record { seq, digest: self.digest, answer }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(len: usize) -> Answer {
        Answer { len, generation: 3, child: None }
    }

    #[test]
    fn the_last_1024_are_remembered() {
        let mut window = Window::default();
        assert_eq!((window.last(), window.oldest(), window.look(1)), (0, 1, Known::New));
        for seq in 1..=1977_u32 {
            window.push(seq * 7, answer(seq as usize));
        }
        assert_eq!((window.last(), window.oldest(), window.is_whole()), (1977, 954, true));
        assert_eq!(window.look(3), Known::Forgotten { oldest: 954 });
        assert_eq!(window.look(953), Known::Forgotten { oldest: 954 });
        assert_eq!(window.look(0), Known::Forgotten { oldest: 954 });
        for seq in [954, 1500, 1977] {
            let record = Record { seq, digest: seq as u32 * 7, answer: answer(seq as usize) };
            assert_eq!(window.look(seq), Known::Applied(record));
        }
        assert_eq!(window.look(1978), Known::New);
    }

    #[test]
    fn what_is_taken_back_never_was() {
        let mut window = Window::default();
        window.push(1, answer(1));
        let before = window.clone();
        window.push(2, Answer { len: 2, generation: 3, child: Some(9) });
        window.pop();
        assert_eq!(window, before);
    }

    #[test]
    fn as_many_are_remembered_when_one_was_taken_back() {
        let mut window = Window::default();
        let push = |window: &mut Window| window.push(7, answer(1));
        (0..1038).for_each(|_| push(&mut window));
        for _ in 0..3 {
            push(&mut window);
            window.pop();
            assert_eq!((window.last(), window.oldest(), window.is_whole()), (1038, 15, true));
            assert_eq!(window.look(14), Known::Forgotten { oldest: 15 });
            assert!(matches!(window.look(15), Known::Applied(Record { seq: 15, .. })));
            let records: Vec<Record> = window.kept().collect();
            window = Window::of(1038, &records);
            assert!(window.is_whole());
        }
        // It never is shorter than that, whatever is copied when.
        push(&mut window);
        let records: Vec<Record> = window.kept().collect();
        let mut copied = Window::of(1039, &records);
        copied.pop();
        assert_eq!((copied.last(), copied.oldest(), copied.is_whole()), (1038, 15, true));
    }

    #[test]
    fn a_window_survives_as_records() {
        let mut window = Window::default();
        for seq in 1..=1100_usize {
            window.push(seq as u32, Answer { len: seq, generation: 0, child: (seq % 2 == 1).then_some(5) });
        }
        assert_eq!((window.records().count(), window.kept().count()), (WINDOW, KEPT));
        let records: Vec<Record> = window.kept().collect();
        assert_eq!(Window::of(1100, &records), window);
        assert_eq!(Window::of(1099, &records).last(), 1099);
        // Records that don't reach the last op say nothing about those before it.
        assert_eq!(Window::of(1101, &records), Window::after(1101));
        let mut gap = records;
        gap.remove(1000);
        assert_eq!(Window::of(1100, &gap).oldest(), 77 + 1000);
    }
}
