//! What goes wrong in a run, and when.

use std::time::Duration;

use rand::RngExt;
use rand::rngs::SmallRng;
use turmoil::Sim;

use super::cluster::{COORDINATOR, worker_name};
use super::history::History;

/// Time in which one worker may lose what it has.
const HUNT: Duration = Duration::from_millis(1800);
/// Silence that no worker is given up for.
const SHORT: u64 = 600;

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
    /// Time until what one worker lost is on others; then the next one may lose what it has.
    pub(super) repair: Duration,
}

pub(super) fn client_name(n: usize) -> String {
    format!("client-{n}")
}

impl Nemesis {
    /// Seeded faults, no two of the same link at once.
    pub(super) fn new(random: &mut SmallRng, extent: Extent) -> Self {
        let Extent { workers, clients, from, to, repair } = extent;
        let mut planned = Vec::new();
        let mut hunts = Vec::new();
        let mut begins = from;
        while begins < to {
            hunts.push((begins..begins + HUNT, random.random_range(0..workers)));
            begins += HUNT + repair;
        }
        let is_victim = |worker: usize, at: Duration, end: Duration| {
            hunts.iter().any(|(hunt, victim)| *victim == worker && hunt.start <= at && end <= hunt.end)
        };
        let span = |random: &mut SmallRng, least: u64, most: u64| {
            Duration::from_millis(random.random_range(least..=most))
        };
        for worker in 0..workers {
            let mut at = from + span(random, 0, 1000);
            while at < to {
                let (coordinator, name) = (COORDINATOR.to_owned(), worker_name(worker));
                let hard = span(random, 50, 1500);
                let is_victim = is_victim(worker, at, at + hard);
                let (fault, lasts) = match random.random_range(0..10_u32) {
                    0..3 if is_victim => (Fault::Crash(name), hard),
                    3 if is_victim => (Fault::Cut(coordinator, name), hard),
                    4 if is_victim => (Fault::CutOneWay(coordinator, name), hard),
                    5 if is_victim => (Fault::CutOneWay(name, coordinator), hard),
                    6 if is_victim => (Fault::Hold(coordinator, name), hard),
                    7 => (Fault::Slow(coordinator, name, span(random, 10, 60)), span(random, 200, 2000)),
                    _ => (Fault::Hold(coordinator, name), span(random, 20, SHORT)),
                };
                planned.push(Planned { from: at, to: (at + lasts).min(to), fault });
                at += lasts + span(random, 200, 1500);
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
            // What is lost on a link ends its connections.
            Fault::Crash(_) | Fault::Cut(..) | Fault::CutOneWay(..) => true,
            Fault::Hold(..) => self.to - self.from > Duration::from_millis(SHORT),
            Fault::Slow(..) | Fault::Flips => false,
        }
    }
}
