//! What can happen in the explorer's cluster, and how much of it may go wrong.

use super::worker::Ask;
use super::world::{SHARDS, World};

/// What is taken away from the protocol, to see that the checks see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Omission {
    EpochCheck,
    Dedup,
    Undo,
    FenceBeforeCopy,
    Coverage,
}

/// What there is, and how much may go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Setting {
    pub(super) replicas: usize,
    pub(super) acks: usize,
    pub(super) workers: usize,
    pub(super) budget: Budget,
    pub(super) omission: Option<Omission>,
}

/// How often each may still happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Budget {
    pub(super) ops: usize,
    pub(super) retries: usize,
    pub(super) refusals: usize,
    pub(super) crashes: usize,
    pub(super) breaks: usize,
    pub(super) restarts: usize,
    pub(super) writers: usize,
    pub(super) drains: usize,
    pub(super) moves: usize,
}

/// What can happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// A request reaches its worker, which may have no memory for it.
    Deliver {
        link: usize,
        refuses: bool,
    },
    /// An answer reaches the coordinator.
    Hear {
        link: usize,
    },
    Save,
    Copy,
    /// A client asks for another op, or for the one it has no answer to.
    Request {
        again: bool,
    },
    Abandon,
    TakeWriter,
    Replace {
        shard: usize,
        worker: usize,
    },
    Crash {
        worker: usize,
    },
    /// The coordinator hears of it.
    Bury {
        worker: usize,
    },
    /// The worker comes back, empty.
    Revive {
        worker: usize,
    },
    Break {
        worker: usize,
    },
    Reconnect {
        worker: usize,
    },
    Drain {
        worker: usize,
    },
    Move {
        shard: usize,
        from: usize,
        to: usize,
    },
    Stay {
        shard: usize,
        worker: usize,
    },
    /// The coordinator dies, and another begins; `landed`: what it was saving was saved.
    Restart {
        landed: bool,
    },
}

impl Choice {
    /// Faults are, or a walk is over before it has begun.
    pub(super) fn is_rare(&self) -> bool {
        match self {
            Self::Crash { .. }
            | Self::Break { .. }
            | Self::Restart { .. }
            | Self::TakeWriter
            | Self::Drain { .. }
            | Self::Move { .. }
            | Self::Stay { .. }
            | Self::Abandon
            | Self::Deliver { refuses: true, .. }
            | Self::Request { again: true } => true,
            Self::Deliver { .. }
            | Self::Hear { .. }
            | Self::Save
            | Self::Copy
            | Self::Request { again: false }
            | Self::Replace { .. }
            | Self::Bury { .. }
            | Self::Revive { .. }
            | Self::Reconnect { .. } => false,
        }
    }
}

impl World {
    /// Whether it is a message of a stream that is over.
    pub(super) fn is_late(&self, choice: &Choice) -> bool {
        match choice {
            Choice::Deliver { link, .. } | Choice::Hear { link } => {
                self.links.get(*link).is_some_and(|link| !link.is_open)
            }
            _ => false,
        }
    }

    /// Everything that can happen next.
    pub(super) fn choices(&self) -> Vec<Choice> {
        let mut choices = Vec::new();
        for (index, link) in self.links.iter().enumerate() {
            let worker = &self.workers[link.worker];
            let lives = worker.is_alive && worker.holder.incarnation == link.incarnation;
            if let (Some(ask), true) = (link.asks.front(), lives) {
                choices.push(Choice::Deliver { link: index, refuses: false });
                let is_append = matches!(ask, Ask::Op { op, .. } if op.change.is_undoable());
                if is_append && self.left.refusals > 0 {
                    choices.push(Choice::Deliver { link: index, refuses: true });
                }
            }
            if !link.replies.is_empty() && link.term == self.term {
                choices.push(Choice::Hear { link: index });
            }
        }
        if !self.saves.is_empty() {
            choices.push(Choice::Save);
        }
        if !self.copies.is_empty() {
            choices.push(Choice::Copy);
        }
        match self.model.open() {
            None if self.left.ops > 0 => choices.push(Choice::Request { again: false }),
            Some(_) if !self.is_waiting => choices.push(Choice::Request { again: true }),
            Some(_) if self.left.retries > 0 => choices.push(Choice::Request { again: true }),
            _ => {}
        }
        if self.is_waiting && self.left.refusals > 0 {
            choices.push(Choice::Abandon);
        }
        if self.left.writers > 0 {
            choices.push(Choice::TakeWriter);
        }
        for (index, worker) in self.workers.iter().enumerate() {
            if worker.is_alive {
                if self.left.crashes > 0 {
                    choices.push(Choice::Crash { worker: index });
                }
                if worker.is_connected && self.left.breaks > 0 {
                    choices.push(Choice::Break { worker: index });
                }
                if !worker.is_connected {
                    choices.push(Choice::Reconnect { worker: index });
                }
                if worker.is_connected && self.left.drains > 0 {
                    choices.push(Choice::Drain { worker: index });
                }
            } else if self.unburied.contains(&worker.holder) {
                choices.push(Choice::Bury { worker: index });
            } else {
                choices.push(Choice::Revive { worker: index });
            }
        }
        choices.extend(self.replacements());
        choices.extend(self.moves());
        if self.left.restarts > 0 {
            choices.push(Choice::Restart { landed: false });
            if !self.saves.is_empty() {
                choices.push(Choice::Restart { landed: true });
            }
        }
        choices
    }

    /// Replicas that could be elsewhere, and those that don't go after all.
    fn moves(&self) -> Vec<Choice> {
        let mut choices = Vec::new();
        for shard in 0..SHARDS {
            for (from, worker) in self.workers.iter().enumerate() {
                let holder = &worker.holder;
                let stays = self.ledger.staying(shard).any(|other| other == holder);
                if !self.ledger.members(shard).any(|member| member == holder) {
                    continue;
                }
                if !stays {
                    choices.push(Choice::Stay { shard, worker: from });
                } else if self.left.moves > 0 {
                    let others = (0..self.workers.len()).filter(|to| self.workers[*to].is_connected);
                    choices.extend(others.map(|to| Choice::Move { shard, from, to }));
                }
            }
        }
        choices
    }

    /// Workers that could get a replica that is missing.
    fn replacements(&self) -> Vec<Choice> {
        let mut choices = Vec::new();
        for shard in 0..SHARDS {
            if self.ledger.missing_replicas(shard) == 0 {
                continue;
            }
            for (index, worker) in self.workers.iter().enumerate() {
                let is_free = !self.ledger.holders(shard).any(|holder| holder.worker == worker.holder.worker);
                if worker.is_alive && worker.is_connected && is_free {
                    choices.push(Choice::Replace { shard, worker: index });
                }
            }
        }
        choices
    }
}
