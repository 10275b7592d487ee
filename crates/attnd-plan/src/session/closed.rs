//! Names of sessions that were closed a short time ago, so that whoever comes late is told so.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::spec::SessionName;

/// For how long a closed session is remembered.
pub const REMEMBER_CLOSED: Duration = Duration::from_secs(600);
/// How many are: those of one coordinator's whole capacity. With more within [`REMEMBER_CLOSED`], the oldest are forgotten early.
pub const MAX_REMEMBERED_CLOSED: usize = 16_384;

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// Somebody closed it: to close it again is no mistake, whatever else is asked of it finds no session.
    Released,
    /// Nobody asked for it for its whole time: `SESSION_EXPIRED`.
    Expired,
}

/// Sessions that were closed.
#[derive(Clone, Debug, Default)]
pub struct ClosedSessions {
    by_name: BTreeMap<SessionName, (Closed, Duration)>,
    /// Oldest first; a name that was closed again is here twice, of which the last counts.
    order: VecDeque<(Duration, SessionName)>,
}

impl ClosedSessions {
    /// Remembers a session that ended at `now`.
    pub fn close(&mut self, name: SessionName, how: Closed, now: Duration) {
        self.forget(now);
        if self.order.len() >= MAX_REMEMBERED_CLOSED {
            self.forget_oldest();
        }
        self.by_name.insert(name.clone(), (how, now));
        self.order.push_back((now, name));
    }

    /// How a session of this name ended, if it did so lately, and no other one was opened since.
    pub fn look(&self, name: &SessionName, now: Duration) -> Option<Closed> {
        let (how, at) = self.by_name.get(name)?;
        (now.saturating_sub(*at) < REMEMBER_CLOSED).then_some(*how)
    }

    /// Another session has this name now.
    pub fn reopen(&mut self, name: &SessionName) {
        self.by_name.remove(name);
    }

    fn forget(&mut self, now: Duration) {
        while self.order.front().is_some_and(|(at, _)| now.saturating_sub(*at) >= REMEMBER_CLOSED) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        let Some((at, name)) = self.order.pop_front() else { return };
        if self.by_name.get(&name).is_some_and(|(_, closed)| *closed == at) {
            self.by_name.remove(&name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> SessionName {
        SessionName::new(text).unwrap()
    }

    #[test]
    fn the_closed_are_remembered_for_ten_minutes() {
        let mut closed = ClosedSessions::default();
        let at = Duration::from_secs;
        closed.close(name("a"), Closed::Released, at(100));
        closed.close(name("b"), Closed::Expired, at(200));
        assert_eq!(closed.look(&name("a"), at(699)), Some(Closed::Released));
        assert_eq!(closed.look(&name("b"), at(699)), Some(Closed::Expired));
        assert_eq!((closed.look(&name("a"), at(700)), closed.look(&name("c"), at(0))), (None, None));
        closed.reopen(&name("b"));
        assert_eq!(closed.look(&name("b"), at(300)), None);
        // Closed once more, and its first time forgotten.
        closed.close(name("a"), Closed::Expired, at(750));
        assert_eq!(closed.look(&name("a"), at(751)), Some(Closed::Expired));
    }

    #[test]
    fn they_are_never_too_many() {
        let mut closed = ClosedSessions::default();
        for index in 0..MAX_REMEMBERED_CLOSED + 10 {
            closed.close(name(&index.to_string()), Closed::Released, Duration::ZERO);
        }
        assert_eq!(
            (closed.order.len(), closed.by_name.len()),
            (MAX_REMEMBERED_CLOSED, MAX_REMEMBERED_CLOSED)
        );
        assert_eq!(closed.look(&name("9"), Duration::ZERO), None);
        assert_eq!(closed.look(&name("10"), Duration::ZERO), Some(Closed::Released));
    }
}
