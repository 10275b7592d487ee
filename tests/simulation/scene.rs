//! What all who take part in a run know of it: what there is, what was lost, and whether something is broken.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use super::history::History;
use super::model::Model;
use crate::support::tokens::Token;

/// Time from the end of what a worker lost something by until the coordinator knows what.
const NOTICED: Duration = Duration::from_secs(3);

/// A session that somebody opened, and nobody has closed.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) name: String,
    pub(super) model: Rc<RefCell<Model>>,
    pub(super) acks: usize,
}

/// The worker that may have lost what it had, until all replicas are there again.
#[derive(Clone, Copy, Debug)]
struct Loss {
    worker: usize,
    /// When the last thing that it lost by was over; `None`: it isn't.
    over: Option<Duration>,
}

/// What they share.
#[derive(Debug)]
pub(super) struct Scene {
    pub(super) history: History,
    /// Workers say some things twice.
    pub(super) repeats: bool,
    /// Replicas of a session.
    pub(super) most_replicas: usize,
    /// Whose sessions are whose.
    pub(super) open: RefCell<Vec<Known>>,
    /// The highest term that a coordinator spoke in.
    pub(super) term: Cell<u64>,
    /// Clients that aren't done.
    pub(super) writing: Cell<usize>,
    is_calm: Cell<bool>,
    loss: Cell<Option<Loss>>,
    losses: Cell<u64>,
    tokens: Cell<Token>,
}

impl Scene {
    pub(super) fn new(history: History, repeats: bool, most_replicas: usize, clients: usize) -> Rc<Self> {
        Rc::new(Self {
            history,
            repeats,
            most_replicas,
            open: RefCell::default(),
            term: Cell::new(0),
            writing: Cell::new(clients),
            is_calm: Cell::new(false),
            loss: Cell::new(None),
            losses: Cell::new(0),
            tokens: Cell::new(1),
        })
    }

    /// Tokens that nobody had before.
    pub(super) fn new_tokens(&self, n: usize) -> Vec<Token> {
        let first = self.tokens.replace(self.tokens.get() + n as Token);
        (first..first + n as Token).collect()
    }

    /// Nothing is broken from now on.
    pub(super) fn calm(&self) {
        self.is_calm.set(true);
    }

    pub(super) fn is_calm(&self) -> bool {
        self.is_calm.get()
    }

    // === what is lost ===

    /// A worker is about to lose what it has. One at a time may: `false` while another one has.
    pub(super) fn lose(&self, worker: usize) -> bool {
        if self.loss.get().is_some_and(|loss| loss.worker != worker) {
            return false;
        }
        self.loss.set(Some(Loss { worker, over: None }));
        self.losses.set(self.losses.get() + 1);
        for known in self.open.borrow().iter().filter(|known| known.acks < 2) {
            known.model.borrow_mut().may_be_lost = true;
        }
        true
    }

    /// What it lost by is over.
    pub(super) fn lost(&self, now: Duration) {
        self.loss.set(self.loss.get().map(|loss| Loss { over: Some(now), ..loss }));
    }

    /// The coordinator, asked then, said that no replica is missing.
    pub(super) fn is_whole(&self, asked: Duration) {
        let is_over = |loss: Loss| loss.over.is_some_and(|over| over + NOTICED <= asked);
        if self.loss.get().is_some_and(is_over) {
            self.history.tell("auditor", "no replica is missing");
            self.loss.set(None);
        }
    }

    /// How often something was lost.
    pub(super) fn losses(&self) -> u64 {
        self.losses.get()
    }

    /// Whether a worker may have lost what came to it since that was asked.
    pub(super) fn may_have_lost_since(&self, losses: u64) -> bool {
        self.loss.get().is_some() || self.losses.get() != losses
    }
}
