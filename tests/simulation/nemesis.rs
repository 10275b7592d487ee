//! What goes wrong in a run, and when.

use std::time::Duration;

use rand::RngExt;
use rand::rngs::SmallRng;
use turmoil::Sim;

use super::cluster::{COORDINATOR, Lives, worker_name};
use super::scene::Scene;

/// Time in which one worker may lose what it has.
const HUNT: Duration = Duration::from_millis(1800);
/// Time until what one worker lost is on others; then the next one may lose what it has.
const REPAIR: Duration = Duration::from_millis(2500);
/// Silence that no worker is given up for.
const SHORT: u64 = 600;
/// Time in which a node that is asked to end must have, whatever else goes wrong.
const LEAVES_WITHIN: Duration = Duration::from_secs(9);

/// Something that breaks, and is mended later.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fault {
    /// Nothing passes between them; what was on its way is lost.
    Cut(String, String),
    /// Nothing passes from the first to the second.
    CutOneWay(String, String),
    /// What is sent arrives once it is over.
    Hold(String, String),
    /// The same between one and each of these.
    Freeze(String, Vec<String>),
    /// Messages take that long.
    Slow(String, String, Duration),
    /// The process ends at once, and another one begins.
    Crash(String),
    /// The process is asked to end, and another one begins.
    Leave(String),
    /// A worker comes that wasn't there before.
    Join(String),
    /// Bits of tensors change on their way.
    Flips,
}

#[derive(Clone, Debug)]
struct Planned {
    from: Duration,
    to: Duration,
    fault: Fault,
    /// The worker that loses what it has by it.
    loses: Option<usize>,
}

/// All faults of a run.
#[derive(Debug)]
pub(super) struct Nemesis {
    planned: Vec<Planned>,
    broken: Vec<Planned>,
    /// When there was something broken last.
    calm_since: Duration,
}

/// What a run has, and for how long it is broken.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    pub(super) workers: usize,
    pub(super) clients: usize,
    pub(super) from: Duration,
    pub(super) to: Duration,
}

/// Which kinds of faults a run has: most have some of them, so that each meets the others, and shows by itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kinds {
    /// Workers lose what they have: they crash, or are silent for too long.
    pub(super) losses: bool,
    /// Workers leave.
    pub(super) leaves: bool,
    /// A worker more comes.
    pub(super) joins: bool,
    /// The coordinator ends, one way or another, and comes back.
    pub(super) restarts: bool,
    flips: bool,
}

impl Kinds {
    pub(super) fn new(random: &mut SmallRng) -> Self {
        let mut percent = |percent: u32| random.random_range(0..100_u32) < percent;
        Self {
            losses: percent(70),
            leaves: percent(40),
            joins: percent(30),
            restarts: percent(40),
            flips: percent(33),
        }
    }
}

pub(super) fn client_name(n: usize) -> String {
    format!("client-{n}")
}

/// A number of milliseconds.
fn span(random: &mut SmallRng, least: u64, most: u64) -> Duration {
    Duration::from_millis(random.random_range(least..=most))
}

impl Nemesis {
    /// Seeded faults; those of one link come one after the other, but for those of the coordinator as a whole.
    pub(super) fn new(random: &mut SmallRng, extent: Extent, kinds: Kinds) -> Self {
        let Extent { workers, clients, from, to } = extent;
        let mut hunts = Vec::new();
        let mut begins = from;
        while begins < to && kinds.losses {
            hunts.push((begins..begins + HUNT, random.random_range(0..workers)));
            begins += HUNT + REPAIR;
        }
        let mut planned = Vec::new();
        for worker in 0..workers {
            let hunts = hunts.iter().filter(|(_, victim)| *victim == worker).map(|(hunt, _)| hunt.clone());
            let hunts: Vec<_> = hunts.collect();
            of_worker(&mut planned, random, extent, worker, &hunts);
        }
        if kinds.leaves {
            let mut at = from + span(random, 0, 1500);
            while at < to {
                let lasts = span(random, 100, 1500);
                let fault = Fault::Leave(worker_name(random.random_range(0..workers)));
                planned.push(Planned { from: at, to: at + lasts, fault, loses: None });
                at += lasts + span(random, 500, 2500);
            }
        }
        if kinds.joins {
            let at = from + span(random, 0, 3000);
            planned.push(Planned { from: at, to: at, fault: Fault::Join(worker_name(workers)), loses: None });
        }
        if kinds.restarts {
            of_coordinator(&mut planned, random, extent);
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
                planned.push(Planned { from: at, to: (at + lasts).min(to), fault, loses: None });
                at += lasts + span(random, 1500, 5000);
            }
        }
        if kinds.flips {
            let at = from + span(random, 0, 3000);
            let until = (at + span(random, 500, 4000)).min(to);
            planned.push(Planned { from: at, to: until, fault: Fault::Flips, loses: None });
        }
        planned.sort_by_key(|planned| planned.from);
        planned.reverse();
        Self { planned, broken: Vec::new(), calm_since: Duration::ZERO }
    }

    /// Since when nothing has been broken, or ever will be again.
    pub(super) fn calm_since(&self) -> Option<Duration> {
        (self.planned.is_empty() && self.broken.is_empty()).then_some(self.calm_since)
    }

    /// Breaks and mends what is due.
    pub(super) fn strike(
        &mut self,
        sim: &mut Sim<'_>,
        now: Duration,
        scene: &Scene,
        lives: &Lives,
        flips: &dyn Fn(bool),
    ) {
        while let Some(due) = self.planned.pop_if(|planned| planned.from <= now) {
            if !self.may_strike(&due) || due.loses.is_some_and(|worker| !scene.lose(worker)) {
                continue;
            }
            scene.history.tell("nemesis", format!("{:?} until {} ms", due.fault, due.to.as_millis()));
            scene.history.count(due.fault.name(), 1);
            match &due.fault {
                Fault::Cut(a, b) => sim.partition(a.as_str(), b.as_str()),
                Fault::CutOneWay(a, b) => sim.partition_oneway(a.as_str(), b.as_str()),
                Fault::Hold(a, b) => sim.hold(a.as_str(), b.as_str()),
                Fault::Freeze(a, all) => all.iter().for_each(|b| sim.hold(a.as_str(), b.as_str())),
                Fault::Slow(a, b, by) => sim.set_link_latency(a.as_str(), b.as_str(), *by),
                Fault::Crash(host) => sim.crash(host.as_str()),
                Fault::Leave(host) => lives.stop(host),
                Fault::Join(host) => sim.bounce(host.as_str()),
                Fault::Flips => flips(true),
            }
            self.broken.push(due);
        }
        let is_over = |broken: &mut Planned| {
            broken.to <= now
                && !matches!(&broken.fault, Fault::Leave(host) if !has_left(sim, now, scene, lives, host, broken.from))
        };
        let over: Vec<Planned> = self.broken.extract_if(.., is_over).collect();
        for mended in over {
            scene.history.tell("nemesis", format!("{:?} is over", mended.fault));
            match &mended.fault {
                Fault::Cut(a, b) => sim.repair(a.as_str(), b.as_str()),
                Fault::CutOneWay(a, b) => sim.repair_oneway(a.as_str(), b.as_str()),
                Fault::Hold(a, b) => sim.release(a.as_str(), b.as_str()),
                Fault::Freeze(a, all) => all.iter().for_each(|b| sim.release(a.as_str(), b.as_str())),
                Fault::Slow(a, b, _) => {
                    sim.set_link_latency(a.as_str(), b.as_str(), Duration::from_millis(2))
                }
                Fault::Crash(host) | Fault::Leave(host) => sim.bounce(host.as_str()),
                Fault::Join(_) => {}
                Fault::Flips => flips(false),
            }
            if mended.loses.is_some() {
                scene.lost(now);
            }
            self.calm_since = now;
        }
    }

    /// A process that ends doesn't end once more, and workers leave one at a time.
    fn may_strike(&self, due: &Planned) -> bool {
        let ends = |planned: &Planned, host: &str| match &planned.fault {
            Fault::Crash(other) => other == host,
            Fault::Leave(other) => other == host || (other != COORDINATOR && host != COORDINATOR),
            _ => false,
        };
        match &due.fault {
            Fault::Leave(host) => !self.broken.iter().any(|broken| ends(broken, host)),
            Fault::Crash(host) => !self.broken.iter().any(
                |broken| matches!(&broken.fault, Fault::Crash(other) | Fault::Leave(other) if other == host),
            ),
            _ => true,
        }
    }
}

/// Whether a node that was asked to end has; its connections are closed then.
fn has_left(
    sim: &mut Sim<'_>,
    now: Duration,
    scene: &Scene,
    lives: &Lives,
    host: &str,
    asked: Duration,
) -> bool {
    match lives.ended(host) {
        None if now < asked + LEAVES_WITHIN => return false,
        None => scene.history.violation("nemesis", format!("{host} doesn't leave")),
        Some(Ok(())) => scene.history.tell("nemesis", format!("{host} has left")),
        Some(Err(error)) => scene.history.violation("nemesis", format!("{host} leaves: {error}")),
    }
    sim.crash(host);
    true
}

/// What goes wrong with a worker, and the link to it; it may lose what it has in these times.
fn of_worker(
    planned: &mut Vec<Planned>,
    random: &mut SmallRng,
    extent: Extent,
    worker: usize,
    hunts: &[std::ops::Range<Duration>],
) {
    let mut at = extent.from + span(random, 0, 1000);
    while at < extent.to {
        let (coordinator, name) = (COORDINATOR.to_owned(), worker_name(worker));
        let hard = span(random, 50, 1500);
        let is_victim = hunts.iter().any(|hunt| hunt.start <= at && at + hard <= hunt.end);
        let (fault, lasts) = match random.random_range(0..10_u32) {
            0..3 if is_victim => (Fault::Crash(name), hard),
            3 if is_victim => (Fault::Cut(coordinator, name), hard),
            4 if is_victim => (Fault::CutOneWay(coordinator, name), hard),
            5 if is_victim => (Fault::CutOneWay(name, coordinator), hard),
            // It is given up, and comes back with all that it had.
            6 if is_victim => (Fault::Hold(coordinator, name), hard * 3),
            7 => (Fault::Slow(coordinator, name, span(random, 10, 60)), span(random, 200, 2000)),
            _ => (Fault::Hold(coordinator, name), span(random, 20, SHORT)),
        };
        let loses = match &fault {
            // What is lost on a link ends its connections.
            Fault::Crash(_) | Fault::Cut(..) | Fault::CutOneWay(..) => true,
            Fault::Hold(..) => lasts > Duration::from_millis(SHORT),
            _ => false,
        };
        let loses = loses.then_some(worker);
        planned.push(Planned { from: at, to: (at + lasts).min(extent.to), fault, loses });
        at += lasts + span(random, 200, 1500);
    }
}

/// What goes wrong with the coordinator.
fn of_coordinator(planned: &mut Vec<Planned>, random: &mut SmallRng, extent: Extent) {
    let Extent { workers, clients, from, to } = extent;
    let mut at = from + span(random, 0, 2500);
    while at < to {
        let coordinator = COORDINATOR.to_owned();
        let down = span(random, 20, 1500);
        let (fault, lasts) = match random.random_range(0..4_u32) {
            0..2 => (Fault::Crash(coordinator), down),
            2 => (Fault::Leave(coordinator), down),
            _ => {
                let all = (0..workers).map(worker_name).chain((0..clients).map(client_name)).collect();
                (Fault::Freeze(coordinator, all), span(random, 20, SHORT))
            }
        };
        planned.push(Planned { from: at, to: at + lasts, fault, loses: None });
        at += lasts + span(random, 500, 3000);
    }
}

impl Fault {
    /// What it is counted as.
    fn name(&self) -> &'static str {
        match self {
            Self::Cut(..) => "cuts",
            Self::CutOneWay(..) => "one-way cuts",
            Self::Hold(..) => "holds",
            Self::Freeze(..) => "coordinators frozen",
            Self::Slow(..) => "slow links",
            Self::Crash(host) if host == COORDINATOR => "coordinators crashed",
            Self::Crash(_) => "workers crashed",
            Self::Leave(host) if host == COORDINATOR => "coordinators left",
            Self::Leave(_) => "workers left",
            Self::Join(_) => "workers joined",
            Self::Flips => "spells of bit flips",
        }
    }
}
