//! Mutations other than appends: cuts, forks, the end of all appends.

use std::sync::Arc;

use attnd_plan::session::{Change as OpChange, Op, SessionName};
use attnd_wire::hold::{HoldAsk, ShardChange, ShardChangeKind, ShardOp};
use attnd_wire::session::{Applied, Change, ChangeKind, digest};
use attnd_wire::{Error, Reason};

use super::Sessions;
use super::session::{Begun, Session};
use super::turns::Place;

/// A mutation that has its place.
pub(super) struct ChangeCall {
    session: Arc<Session>,
    change: Change,
    place: Place,
}

impl ChangeCall {
    /// Looks the session up and takes a place in its line.
    ///
    /// # Errors
    /// [`Reason::Session`] and the like; [`Reason::Overloaded`] if too many wait.
    pub(super) fn line_up(sessions: &Sessions, change: Change) -> Result<Self, Error> {
        let session = sessions.find(&change.session)?;
        let _all_at_once = sessions.line_up();
        let place = session.turns.line_up()?;
        Ok(Self { session, change, place })
    }

    /// Applies it.
    ///
    /// # Errors
    /// What the ledger refuses, and [`Reason::SessionExists`] for the name of a child that is taken.
    pub(super) async fn run(self, sessions: &Arc<Sessions>) -> Result<Applied, Error> {
        let Self { session, change, place } = self;
        let turn = place.turn().await;
        // What has begun goes on whoever waits for it.
        let sessions = Arc::clone(sessions);
        let (done, applied) = tokio::sync::oneshot::channel();
        sessions.tasks.clone().spawn(async move {
            let result = apply(&sessions, &session, &change).await;
            drop(turn);
            drop(done.send(result));
        });
        applied.await.unwrap_or_else(|_gone| Err(Error::new(Reason::Internal, "the task of a change died")))
    }
}
