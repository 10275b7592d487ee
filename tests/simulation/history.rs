//! What happened in a run: a hash of all of it, the last of it in words, and what should not have happened.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::ops::AddAssign;
use std::rc::Rc;
use std::time::Duration;

/// Events that are kept in words.
const KEPT: usize = 150;

/// Of one run; clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct History(Rc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    now: Cell<Duration>,
    hash: Cell<u64>,
    last: RefCell<VecDeque<String>>,
    violations: RefCell<Vec<String>>,
    counts: RefCell<Counts>,
    /// Everything is printed as it happens.
    is_told: Cell<bool>,
}

/// How often there was what: faults, operations, and what came of them. So a run in which nothing happens doesn't pass for a good one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts(BTreeMap<&'static str, u64>);

impl Counts {
    pub(super) fn of(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or(0)
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        for (what, n) in other.0 {
            *self.0.entry(what).or_default() += n;
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<String> = self.0.iter().map(|(what, n)| format!("{n} {what}")).collect();
        f.write_str(&words.join(", "))
    }
}

impl History {
    /// Prints everything from now on.
    pub(super) fn print(&self) {
        self.0.is_told.set(true);
    }

    /// It is that late in the run.
    pub(super) fn tick(&self, now: Duration) {
        self.0.now.set(now);
    }

    pub(super) fn now(&self) -> Duration {
        self.0.now.get()
    }

    /// Something happened.
    pub(super) fn tell(&self, who: impl fmt::Display, what: impl fmt::Display) {
        let line = format!("{:>6} ms  {who}: {what}", self.now().as_millis());
        let mut hasher = DefaultHasher::new();
        (self.0.hash.get(), &line).hash(&mut hasher);
        self.0.hash.set(hasher.finish());
        if self.0.is_told.get() {
            std::io::stdout().write_all(format!("{line}\n").as_bytes()).ok();
        }
        let mut last = self.0.last.borrow_mut();
        if last.len() == KEPT {
            last.pop_front();
        }
        last.push_back(line);
    }

    /// Something happened that never should.
    pub(super) fn violation(&self, who: impl fmt::Display, what: impl fmt::Display) {
        let line = format!("{who}: {what}");
        self.tell("VIOLATION", &line);
        self.0.violations.borrow_mut().push(line);
    }

    /// So many more of that.
    pub(super) fn count(&self, what: &'static str, n: u64) {
        if n > 0 {
            *self.0.counts.borrow_mut().0.entry(what).or_default() += n;
        }
    }

    pub(super) fn counts(&self) -> Counts {
        self.0.counts.borrow().clone()
    }

    pub(super) fn hash(&self) -> u64 {
        self.0.hash.get()
    }

    /// The first violation, with what was before it.
    pub(super) fn verdict(&self) -> Result<(), String> {
        let violations = self.0.violations.borrow();
        if violations.is_empty() {
            return Ok(());
        }
        let last: Vec<String> = self.0.last.borrow().iter().cloned().collect();
        Err(format!("{}\n{}", violations.join("\n"), last.join("\n")))
    }

    pub(super) fn has_violations(&self) -> bool {
        !self.0.violations.borrow().is_empty()
    }
}
