//! Whose turn it is: work that touches the same shard, one of them changing it, runs in the order in which it came; all other work
//! runs side by side. Decides without running anything.
//!
//! Work says at once all that it touches and whether it changes that, and waits until everything ahead of it that stands in its way
//! has left. So work never waits in the middle, and nobody waits for each other.

use std::collections::{BTreeMap, VecDeque};

/// Names work that has entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ticket(u64);

/// What work does with what it touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Access {
    /// It looks at it, beside others that do.
    Reads,
    /// It changes it, and is alone.
    Changes,
}

/// Work of type `J` that touches things of type `K`.
#[derive(Debug)]
pub(crate) struct Turns<K, J> {
    next: u64,
    /// Work that runs at a time, at most.
    at_once: usize,
    running: usize,
    /// Of each thing, who has entered and not left, in that order.
    queues: BTreeMap<K, VecDeque<(Ticket, Access)>>,
    entered: BTreeMap<Ticket, Entered<K, J>>,
    /// Nothing stands in the way of these but the number of those that run.
    ready: VecDeque<Ticket>,
}

#[derive(Debug)]
struct Entered<K, J> {
    touches: Vec<(K, Access)>,
    /// Of how many things it is not the turn yet.
    blocked: usize,
    /// Taken when its turn comes.
    job: Option<J>,
}

impl<K: Ord + Clone, J> Turns<K, J> {
    /// Nothing is there, and `at_once` pieces of work, at least one, may run at a time.
    pub(crate) fn new(at_once: usize) -> Self {
        Self {
            next: 0,
            at_once: at_once.max(1),
            running: 0,
            queues: BTreeMap::new(),
            entered: BTreeMap::new(),
            ready: VecDeque::new(),
        }
    }

    /// Work comes, which touches each of these once; gives it back if it shall run now.
    pub(crate) fn enter(&mut self, job: J, touches: Vec<(K, Access)>) -> Option<(Ticket, J)> {
        let ticket = Ticket(self.next);
        self.next += 1;
        let mut blocked = 0;
        for (thing, access) in &touches {
            let queue = self.queues.entry(thing.clone()).or_default();
            let is_free = match access {
                Access::Reads => queue.iter().all(|(_, ahead)| *ahead == Access::Reads),
                Access::Changes => queue.is_empty(),
            };
            blocked += usize::from(!is_free);
            queue.push_back((ticket, *access));
        }
        let runs = blocked == 0 && self.running < self.at_once;
        let (given, job) = if runs { (Some(job), None) } else { (None, Some(job)) };
        self.running += usize::from(runs);
        self.entered.insert(ticket, Entered { touches, blocked, job });
        if blocked == 0 && !runs {
            self.ready.push_back(ticket);
        }
        given.map(|job| (ticket, job))
    }

    /// Work that ran has ended; returns what shall run now.
    pub(crate) fn leave(&mut self, ticket: Ticket) -> Vec<(Ticket, J)> {
        let Some(left) = self.entered.remove(&ticket) else { return Vec::new() };
        self.running -= 1;
        for (thing, _) in left.touches {
            self.leave_queue(&thing, ticket);
        }
        let mut run = Vec::new();
        while self.running < self.at_once
            && let Some(ticket) = self.ready.pop_front()
        {
            if let Some(job) = self.entered.get_mut(&ticket).and_then(|entered| entered.job.take()) {
                self.running += 1;
                run.push((ticket, job));
            }
        }
        run
    }

    /// Work that has entered and not left.
    pub(crate) fn len(&self) -> usize {
        self.entered.len()
    }

    fn leave_queue(&mut self, thing: &K, ticket: Ticket) {
        let Some(queue) = self.queues.get_mut(thing) else { return };
        // Those whose turn it was before don't get it again.
        let had_turn = turns(queue);
        let at = queue.iter().position(|(there, _)| *there == ticket);
        if let Some(at) = at {
            queue.remove(at);
        }
        let still = had_turn - usize::from(at.is_some_and(|at| at < had_turn));
        for (freed, _) in queue.iter().take(turns(queue)).skip(still) {
            if let Some(entered) = self.entered.get_mut(freed) {
                entered.blocked -= 1;
                if entered.blocked == 0 {
                    self.ready.push_back(*freed);
                }
            }
        }
        if queue.is_empty() {
            self.queues.remove(thing);
        }
    }
}

/// How many at the front of a queue have their turn: one that changes, or all that read before the first one that does.
fn turns(queue: &VecDeque<(Ticket, Access)>) -> usize {
    match queue.front() {
        Some((_, Access::Changes)) => 1,
        _ => queue.iter().take_while(|(_, access)| *access == Access::Reads).count(),
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::Access::{Changes, Reads};
    use super::*;

    #[test]
    fn changes_are_alone_and_readers_together() {
        let mut turns = Turns::new(10);
        let first = turns.enter("a", vec![(1, Reads)]).unwrap();
        let second = turns.enter("b", vec![(1, Reads)]).unwrap();
        assert!(turns.enter("c", vec![(1, Changes), (2, Changes)]).is_none());
        assert!(turns.enter("d", vec![(1, Reads)]).is_none(), "not before what came before it");
        assert!(turns.enter("e", vec![(2, Reads)]).is_none());
        let other = turns.enter("f", vec![(3, Changes)]).unwrap();
        assert_eq!(turns.leave(second.0), []);
        assert_eq!(turns.leave(other.0), []);
        let third = turns.leave(first.0);
        assert_eq!(third.iter().map(|(_, job)| *job).collect::<Vec<_>>(), ["c"]);
        let last = turns.leave(third[0].0);
        assert_eq!(last.iter().map(|(_, job)| *job).collect::<Vec<_>>(), ["d", "e"]);
        for (ticket, _) in last {
            assert_eq!(turns.leave(ticket), []);
        }
        assert_eq!((turns.len(), turns.queues.len()), (0, 0));
    }

    #[test]
    fn no_more_run_than_may_and_who_was_ready_first_is_first() {
        let mut turns = Turns::new(2);
        let a = turns.enter("a", vec![(1, Changes)]).unwrap();
        let b = turns.enter("b", vec![]).unwrap();
        assert!(turns.enter("c", vec![(1, Changes)]).is_none());
        assert!(turns.enter("d", vec![(2, Reads)]).is_none());
        let next = turns.leave(b.0);
        assert_eq!(next.iter().map(|(_, job)| *job).collect::<Vec<_>>(), ["d"]);
        let after = turns.leave(a.0);
        assert_eq!(after.iter().map(|(_, job)| *job).collect::<Vec<_>>(), ["c"]);
    }

    #[test]
    fn any_work_runs_once_in_order_and_never_beside_what_it_must_not() {
        for seed in 0..200 {
            let mut rng = StdRng::seed_from_u64(seed);
            let at_once = rng.random_range(1..5);
            let mut turns = Turns::new(at_once);
            let mut touched: Vec<Vec<(u32, Access)>> = Vec::new();
            let mut running: Vec<(Ticket, usize)> = Vec::new();
            let mut ran: Vec<usize> = Vec::new();
            let mut begin = |started: Vec<(Ticket, usize)>,
                             running: &mut Vec<(Ticket, usize)>,
                             touched: &[Vec<(u32, Access)>]| {
                for (ticket, job) in started {
                    let meets = |a: usize, b: usize| {
                        touched[a].iter().any(|(thing, access)| {
                            touched[b]
                                .iter()
                                .any(|(other, its)| thing == other && (*access == Changes || *its == Changes))
                        })
                    };
                    for (_, beside) in running.iter() {
                        assert!(!meets(job, *beside), "seed {seed}: {job} beside {beside}");
                    }
                    for earlier in 0..job {
                        assert!(
                            ran.contains(&earlier) || !meets(earlier, job),
                            "seed {seed}: {earlier}, {job}"
                        );
                    }
                    ran.push(job);
                    running.push((ticket, job));
                    assert!(running.len() <= at_once, "seed {seed}");
                }
            };
            for job in 0..60 {
                let mut touches: Vec<(u32, Access)> = Vec::new();
                for thing in 0..4 {
                    if rng.random_range(0..3_u32) == 0 {
                        touches.push((thing, if rng.random() { Reads } else { Changes }));
                    }
                }
                touched.push(touches.clone());
                let started = turns.enter(job, touches);
                begin(started.into_iter().collect(), &mut running, &touched);
                while running.len() > rng.random_range(0..5) {
                    let (ticket, _) = running.swap_remove(rng.random_range(0..running.len()));
                    let started = turns.leave(ticket);
                    begin(started, &mut running, &touched);
                }
            }
            while let Some((ticket, _)) = running.pop() {
                let started = turns.leave(ticket);
                begin(started, &mut running, &touched);
            }
            assert_eq!((turns.len(), turns.queues.len(), ran.len()), (0, 0, 60), "seed {seed}");
        }
    }
}
