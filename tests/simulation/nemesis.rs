//! What goes wrong in a run, and when.

use std::time::Duration;

use rand::RngExt;
use rand::rngs::SmallRng;
use turmoil::Sim;

use super::cluster::{COORDINATOR, worker_name};
use super::history::History;

/// Silence after which a worker is given up, with something to spare on the near side.
const NOT_YET_LOST: Duration = Duration::from_millis(1200);

/// Something that breaks, and is mended later.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fault {
    /// Nothing passes between them; what was on its way is lost.
    Cut(String, String),
    /// Nothing passes from the first to the second.
    CutOneWay(String, String),
    /// What is sent arrives once it is over.
    Hold(String, String),
    /// Messages take that long.
    Slow(String, String, Duration),
    /// The process ends at once, and another one begins.
    Crash(String),
    /// Bits of tensors change on their way.
    Flips,
}

#[derive(Clone, Debug)]
struct Planned {
    from: Duration,
    to: Duration,
    fault: Fault,
}

/// All faults of a run.
#[derive(Debug)]
pub(super) struct Nemesis {
    planned: Vec<Planned>,
    broken: Vec<Planned>,
}

/// What a run has, and for how long it is broken.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    pub(super) workers: usize,
    pub(super) clients: usize,
    pub(super) from: Duration,
    pub(super) to: Duration,
    /// Workers that may lose what they have.
    pub(super) victims: usize,
}

pub(super) fn client_name(n: usize) -> String {
    format!("client-{n}")
}

impl Nemesis {
    /// Seeded faults, no two of the same link at once.
    pub(super) fn new(random: &mut SmallRng, extent: Extent) -> Self {
        let Extent { workers, clients, from, to, victims } = extent;
        let mut planned = Vec::new();
        let first_victim = random.random_range(0..workers);
        let is_victim = |worker: usize| (worker + workers - first_victim) % workers < victims;
        let span = |random: &mut SmallRng, least: u64, most: u64| {
            Duration::from_millis(random.random_range(least..=most))
        };
        for worker in 0..workers {
            let mut at = from + span(random, 0, 1500);
            while at < to {
                let (coordinator, name) = (COORDINATOR.to_owned(), worker_name(worker));
                let (fault, lasts) = match random.random_range(0..8_u32) {
                    0 | 1 if is_victim(worker) => (Fault::Crash(name), span(random, 50, 2500)),
                    2 if is_victim(worker) => (Fault::Cut(coordinator, name), span(random, 100, 4000)),
                    3 if is_victim(worker) => (Fault::CutOneWay(coordinator, name), span(random, 100, 4000)),
                    4 if is_victim(worker) => (Fault::CutOneWay(name, coordinator), span(random, 100, 4000)),
                    5 => (Fault::Slow(coordinator, name, span(random, 10, 60)), span(random, 200, 2000)),
                    _ => {
                        let most = if is_victim(worker) { 3000 } else { 600 };
                        (Fault::Hold(coordinator, name), span(random, 20, most))
                    }
                };
                planned.push(Planned { from: at, to: (at + lasts).min(to), fault });
                at += lasts + span(random, 300, 2500);
            }
        }
        for client in 0..clients {
            let mut at = from + span(random, 0, 4000);
            while at < to {
                let (coordinator, name) = (COORDINATOR.to_owned(), client_name(client));
                let lasts = span(random, 20, 800);
                let fault = match random.random_range(0..2_u32) {
                    0 => Fault::Hold(coordinator, name),
                    _ => Fault::Slow(coordinator, name, span(random, 10, 60)),
                };
                planned.push(Planned { from: at, to: (at + lasts).min(to), fault });
                at += lasts + span(random, 1500, 5000);
            }
        }
        if random.random_range(0..3_u32) == 0 {
            let at = from + span(random, 0, 3000);
            planned.push(Planned {
                from: at,
                to: (at + span(random, 500, 4000)).min(to),
                fault: Fault::Flips,
            });
        }
        planned.sort_by_key(|planned| planned.from);
        planned.reverse();
        Self { planned, broken: Vec::new() }
    }

    /// Breaks and mends what is due. Returns how many workers lost what they had.
    pub(super) fn strike(
        &mut self,
        sim: &mut Sim<'_>,
        now: Duration,
        history: &History,
        flips: &dyn Fn(bool),
    ) -> usize {
        let mut lost = 0;
        while let Some(due) = self.planned.pop_if(|planned| planned.from <= now) {
            history.tell("nemesis", format!("{:?} until {} ms", due.fault, due.to.as_millis()));
            lost += usize::from(due.loses());
            match &due.fault {
                Fault::Cut(a, b) => sim.partition(a.as_str(), b.as_str()),
                Fault::CutOneWay(a, b) => sim.partition_oneway(a.as_str(), b.as_str()),
                Fault::Hold(a, b) => sim.hold(a.as_str(), b.as_str()),
                Fault::Slow(a, b, by) => sim.set_link_latency(a.as_str(), b.as_str(), *by),
                Fault::Crash(host) => sim.crash(host.as_str()),
                Fault::Flips => flips(true),
            }
            self.broken.push(due);
        }
        for mended in self.broken.extract_if(.., |broken| broken.to <= now) {
            history.tell("nemesis", format!("{:?} is over", mended.fault));
            match &mended.fault {
                Fault::Cut(a, b) => sim.repair(a.as_str(), b.as_str()),
                Fault::CutOneWay(a, b) => sim.repair_oneway(a.as_str(), b.as_str()),
                Fault::Hold(a, b) => sim.release(a.as_str(), b.as_str()),
                Fault::Slow(a, b, _) => {
                    sim.set_link_latency(a.as_str(), b.as_str(), Duration::from_millis(2))
                }
                Fault::Crash(host) => sim.bounce(host.as_str()),
                Fault::Flips => flips(false),
            }
        }
        lost
    }
}

impl Planned {
    /// Whether a worker may lose what it has.
    fn loses(&self) -> bool {
        match &self.fault {
            Fault::Crash(_) => true,
            Fault::Cut(..) | Fault::CutOneWay(..) | Fault::Hold(..) => self.to - self.from > NOT_YET_LOST,
            Fault::Slow(..) | Fault::Flips => false,
        }
    }
}
