//! Who may change a session next: one at a time, in the order in which they came.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use attnd_wire::{Error, Reason};
use tokio::sync::oneshot;

/// Changes of one session that may wait.
pub(crate) const MAX_WAITING: usize = 256;

/// The line of those who want to change one session.
#[derive(Debug, Default)]
pub(crate) struct Turns(Mutex<Line>);

#[derive(Debug, Default)]
struct Line {
    is_taken: bool,
    waiting: VecDeque<oneshot::Sender<()>>,
}

/// The right to change the session, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn(Arc<Turns>);

/// A place in the line, which is left by dropping it.
#[derive(Debug)]
pub(crate) struct Place {
    turns: Arc<Turns>,
    /// None where nobody is before.
    called: Option<oneshot::Receiver<()>>,
    /// It became a turn.
    is_used: bool,
}

impl Turns {
    /// A place behind everybody who has one.
    ///
    /// # Errors
    /// [`Reason::Overloaded`] if [`MAX_WAITING`] wait.
    pub(crate) fn line_up(self: &Arc<Self>) -> Result<Place, Error> {
        let mut line = self.lock();
        let place = |called| Place { turns: Arc::clone(self), called, is_used: false };
        if !std::mem::replace(&mut line.is_taken, true) {
            return Ok(place(None));
        }
        if line.waiting.len() >= MAX_WAITING {
            // Those who gave up leave their senders behind.
            line.waiting.retain(|waits| !waits.is_closed());
        }
        if line.waiting.len() >= MAX_WAITING {
            return Err(Error::new(Reason::Overloaded, format!("{MAX_WAITING} waiting")));
        }
        let (call, called) = oneshot::channel();
        line.waiting.push_back(call);
        Ok(place(Some(called)))
    }

    /// Whether nobody has the turn, or waits for it.
    pub(crate) fn is_free(&self) -> bool {
        !self.lock().is_taken
    }

    /// Calls the next who still waits.
    fn pass_on(&self) {
        let mut line = self.lock();
        while let Some(next) = line.waiting.pop_front() {
            if next.send(()).is_ok() {
                return;
            }
        }
        line.is_taken = false;
    }

    /// No critical section here can panic half-way, so a poisoned lock still guards a whole value.
    fn lock(&self) -> MutexGuard<'_, Line> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// The turn, if it has come.
    ///
    /// # Errors
    /// The place, if it hasn't.
    pub(crate) fn turn_now(mut self) -> Result<Turn, Self> {
        let has_come = self.called.as_mut().is_none_or(|called| called.try_recv().is_ok());
        if !has_come {
            return Err(self);
        }
        self.is_used = true;
        Ok(Turn(Arc::clone(&self.turns)))
    }

    /// Waits for the turn.
    pub(crate) async fn turn(mut self) -> Turn {
        if let Some(called) = &mut self.called {
            // A line is never dropped with somebody in it: the place holds it.
            called.await.ok();
        }
        self.is_used = true;
        Turn(Arc::clone(&self.turns))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let was_called = match &mut self.called {
            None => true,
            Some(called) => {
                called.close();
                called.try_recv().is_ok()
            }
        };
        if was_called && !self.is_used {
            self.turns.pass_on();
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.pass_on();
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn turns_come_in_the_order_of_the_line() {
        let turns = Arc::new(Turns::default());
        let places: Vec<Place> = (0..3).map(|_| turns.line_up().unwrap()).collect();
        let mut waits: Vec<_> = places.into_iter().map(|place| Box::pin(place.turn())).collect();
        assert!(waits[1].as_mut().now_or_never().is_none());
        let first = waits[0].as_mut().now_or_never().unwrap();
        assert!(waits[2].as_mut().now_or_never().is_none());
        drop(first);
        assert!(waits[2].as_mut().now_or_never().is_none(), "before the second");
        drop(waits[1].as_mut().now_or_never().unwrap());
        drop(waits[2].as_mut().now_or_never().unwrap());
        assert!(turns.line_up().unwrap().turn().now_or_never().is_some());
    }

    #[tokio::test]
    async fn whoever_gives_up_holds_nobody_back() {
        let turns = Arc::new(Turns::default());
        let first = turns.line_up().unwrap();
        let (second, third, fourth) =
            (turns.line_up().unwrap(), turns.line_up().unwrap(), turns.line_up().unwrap());
        drop(second);
        // Called, and then given up.
        drop(first);
        drop(third);
        drop(fourth.turn().await);
        // A future that was polled and dropped.
        let holds = turns.line_up().unwrap().turn().await;
        let mut waits = Box::pin(turns.line_up().unwrap().turn());
        assert!(waits.as_mut().now_or_never().is_none());
        drop(waits);
        let last = turns.line_up().unwrap();
        drop(holds);
        last.turn().await;
    }

    #[tokio::test]
    async fn the_line_is_bounded_and_forgets_who_left() {
        let turns = Arc::new(Turns::default());
        let first = turns.line_up().unwrap();
        let mut places: Vec<Place> = (0..MAX_WAITING).map(|_| turns.line_up().unwrap()).collect();
        assert_eq!(turns.line_up().unwrap_err().message(), "OVERLOADED: 256 waiting");
        places.truncate(10);
        assert!(turns.line_up().is_ok());
        drop((first, places));
        assert!(turns.line_up().unwrap().turn().now_or_never().is_some());
    }
}
