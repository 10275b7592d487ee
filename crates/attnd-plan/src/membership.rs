//! The workers of a cluster: who is alive, suspect, draining, quarantined or dead.
//!
//! ```text
//! Joined --> ACTIVE --600 ms silent--> SUSPECT --beat--> ACTIVE      3 such flaps in 60 s: no new work for 60 s
//!               |                         |
//!               |                         +--2 s silent, stream closed, or replaced by a new incarnation--> DEAD
//!               +--beat that says so--> DRAINING --stream closed--> left
//! ```
//!
//! DEAD is final for an incarnation: a process that comes back joins as another one, empty. That is remembered for
//! [`REMEMBER_DEAD`]. A return from DEAD is a flap like a return from SUSPECT, and flaps and quarantine stay with the
//! name: a process that crashes and rejoins again and again gets no work, while one that drained and left may come
//! back as often as it likes. Clocks serve liveness only; nothing here decides what is true about data.

use std::collections::{BTreeMap, VecDeque};
use std::ops::RangeInclusive;
use std::time::Duration;

use crate::topology::WorkerId;

/// How often a worker beats, and how often the shell sends [`MemberEvent::Tick`].
pub const HEARTBEAT: Duration = Duration::from_millis(200);
/// A worker that was silent for this long gets no new work: three beats are missing.
pub const SUSPECT_AFTER: Duration = Duration::from_millis(600);
/// A worker that was silent for this long is dead.
pub const DEAD_AFTER: Duration = Duration::from_secs(2);
/// So many returns from SUSPECT or DEAD within [`FLAP_WINDOW`] put a worker into quarantine.
pub const MAX_FLAPS: usize = 3;
/// See [`MAX_FLAPS`].
pub const FLAP_WINDOW: Duration = Duration::from_secs(60);
/// How long a quarantined worker gets no new work.
pub const QUARANTINE: Duration = Duration::from_secs(60);

/// How long a dead incarnation is refused; they are random, so an older one doesn't come back by chance.
pub const REMEMBER_DEAD: Duration = Duration::from_secs(600);
/// Dead incarnations that are remembered, so that a crash loop of the whole cluster takes a few MB at most. With more
/// within [`REMEMBER_DEAD`], which takes 27 deaths per second, the oldest are forgotten early.
pub const MAX_REMEMBERED_DEAD: usize = 16_384;

/// What a worker must match to be admitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Wire versions that the coordinator speaks.
    pub wire_versions: RangeInclusive<u32>,
    /// The order of arithmetic of this cluster.
    pub kernel_id: String,
}

/// What a worker says about itself when it joins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its name.
    pub id: WorkerId,
    /// One life of its process.
    pub incarnation: u64,
    /// The wire version it speaks.
    pub wire_version: u32,
    /// Its order of arithmetic.
    pub kernel_id: String,
}

/// What happens to the membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberEvent {
    /// A worker said Hello.
    Joined(Facts),
    /// A worker beat.
    Beat {
        /// Who.
        id: WorkerId,
        /// Which life of it.
        incarnation: u64,
        /// It is shutting down.
        draining: bool,
    },
    /// The join stream of a worker ended, in whatever way.
    StreamClosed {
        /// Who.
        id: WorkerId,
        /// Which life of it.
        incarnation: u64,
    },
    /// Time passed; comes every [`HEARTBEAT`].
    Tick,
}

/// What the shell does next, in this order. Every action names the worker and its incarnation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberAction {
    /// Who.
    pub id: WorkerId,
    /// Which life of it.
    pub incarnation: u64,
    /// What about it.
    pub change: MemberChange,
}

/// What changed for a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberChange {
    /// It is a member; answer Welcome.
    Admit,
    /// It is not; end its stream with this.
    Reject(Rejection),
    /// It missed beats: give it nothing new.
    Suspect,
    /// It beats again.
    Active,
    /// It came and went too often: give it nothing new until [`MemberChange::Release`].
    Quarantine,
    /// Its quarantine is over.
    Release,
    /// It is shutting down: give it nothing new.
    Draining,
    /// It drained and left.
    Drained,
    /// It is dead: fail its shares, close its stream.
    Dead(Death),
}

/// Why a worker is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// No beat for [`DEAD_AFTER`].
    Silent,
    /// Its join stream ended.
    StreamClosed,
    /// It was suspect, and another incarnation took its name.
    Replaced,
}

/// Why a worker is not admitted, or a beat not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// It speaks another wire version.
    #[error("{got} not in {}..{}", .supported.start(), .supported.end())]
    Wire {
        /// Its version.
        got: u32,
        /// The coordinator's versions.
        supported: RangeInclusive<u32>,
    },
    /// Its results would have other bits.
    #[error("kernel {got:?} in a cluster of {expected:?}")]
    Kernel {
        /// Its order of arithmetic.
        got: String,
        /// The cluster's.
        expected: String,
    },
    /// A live worker has this id.
    #[error("in use")]
    IdInUse,
    /// This incarnation was declared dead, or never joined.
    #[error("rejoin with a new incarnation")]
    IncarnationDead,
}

/// Liveness of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberState {
    /// It beats.
    Active,
    /// It beats, and is not trusted yet.
    Quarantined,
    /// It missed beats.
    Suspect,
    /// It is shutting down.
    Draining,
}

impl MemberState {
    /// Upper-case name, as `attnd status` shows it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "ACTIVE",
            Self::Quarantined => "QUARANTINED",
            Self::Suspect => "SUSPECT",
            Self::Draining => "DRAINING",
        }
    }
}

#[derive(Clone, Debug)]
struct Member {
    incarnation: u64,
    last_heard: Duration,
    is_suspect: bool,
    is_draining: bool,
    record: Record,
}

/// What is held against a name, whichever incarnation has it.
#[derive(Clone, Debug, Default)]
struct Record {
    quarantined_until: Option<Duration>,
    /// When it came back, within the window; at most [`MAX_FLAPS`].
    flaps: VecDeque<Duration>,
}

/// One incarnation that is gone.
#[derive(Clone, Debug)]
struct Gone {
    id: WorkerId,
    incarnation: u64,
    at: Duration,
    /// It said goodbye, so a return is no flap.
    has_drained: bool,
    record: Record,
}

impl Member {
    fn new(incarnation: u64, record: Record, now: Duration) -> Self {
        Self { incarnation, last_heard: now, is_suspect: false, is_draining: false, record }
    }

    fn state(&self) -> MemberState {
        match self {
            Self { is_suspect: true, .. } => MemberState::Suspect,
            Self { is_draining: true, .. } => MemberState::Draining,
            Self { record: Record { quarantined_until: Some(_), .. }, .. } => MemberState::Quarantined,
            _ => MemberState::Active,
        }
    }
}

impl Record {
    /// Counts a return; true if it was one too many, which begins a quarantine.
    fn flaps_too_often(&mut self, now: Duration) -> bool {
        self.flaps.push_back(now);
        while self.flaps.front().is_some_and(|at| now.saturating_sub(*at) > FLAP_WINDOW) {
            self.flaps.pop_front();
        }
        let too_often = self.flaps.len() >= MAX_FLAPS;
        if too_often {
            self.flaps.clear();
            self.quarantined_until = Some(now + QUARANTINE);
        }
        too_often
    }
}

/// The state machine of the workers.
#[derive(Clone, Debug)]
pub struct Membership {
    rules: Rules,
    members: BTreeMap<WorkerId, Member>,
    /// The latest, in the order of their ends; at most [`MAX_REMEMBERED_DEAD`].
    gone: VecDeque<Gone>,
    last_tick: Duration,
}

impl Membership {
    /// Nobody yet. `now` is a time since any epoch that the caller keeps to.
    pub fn new(rules: Rules, now: Duration) -> Self {
        Self { rules, members: BTreeMap::new(), gone: VecDeque::new(), last_tick: now }
    }

    /// Takes one event and says what to do about it.
    pub fn handle(&mut self, event: MemberEvent, now: Duration) -> Vec<MemberAction> {
        match event {
            MemberEvent::Joined(facts) => self.join(facts, now),
            MemberEvent::Beat { id, incarnation, draining } => self.beat(id, incarnation, draining, now),
            MemberEvent::StreamClosed { id, incarnation } => self.close(id, incarnation, now),
            MemberEvent::Tick => self.tick(now),
        }
    }

    /// State of a member, and how long it was silent.
    pub fn state(&self, id: &WorkerId, now: Duration) -> Option<(MemberState, Duration)> {
        self.members.get(id).map(|member| (member.state(), now.saturating_sub(member.last_heard)))
    }

    /// Whether this incarnation may get new work.
    pub fn is_usable(&self, id: &WorkerId) -> bool {
        self.members.get(id).is_some_and(|member| member.state() == MemberState::Active)
    }

    /// Everybody who may get new work, ascending.
    pub fn usable(&self) -> impl Iterator<Item = &WorkerId> {
        self.members.iter().filter(|(_, member)| member.state() == MemberState::Active).map(|(id, _)| id)
    }

    fn join(&mut self, facts: Facts, now: Duration) -> Vec<MemberAction> {
        let Facts { id, incarnation, wire_version, kernel_id } = facts;
        let old = self.members.get(&id);
        let rejection = if !self.rules.wire_versions.contains(&wire_version) {
            Some(Rejection::Wire { got: wire_version, supported: self.rules.wire_versions.clone() })
        } else if kernel_id != self.rules.kernel_id {
            Some(Rejection::Kernel { got: kernel_id, expected: self.rules.kernel_id.clone() })
        } else if self.gone.iter().any(|gone| gone.incarnation == incarnation && gone.id == id) {
            Some(Rejection::IncarnationDead)
        } else {
            old.filter(|old| !old.is_suspect || old.incarnation == incarnation).map(|_| Rejection::IdInUse)
        };
        if let Some(why) = rejection {
            return vec![MemberAction { id, incarnation, change: MemberChange::Reject(why) }];
        }
        let mut actions = Vec::new();
        if let Some(old) = old.map(|old| old.incarnation) {
            actions.push(self.bury(&id, old, Death::Replaced, now));
        }
        let record = self.record_of_return(&id, now);
        let is_quarantined = record.quarantined_until.is_some();
        self.members.insert(id.clone(), Member::new(incarnation, record, now));
        actions.push(MemberAction { id: id.clone(), incarnation, change: MemberChange::Admit });
        if is_quarantined {
            actions.push(MemberAction { id, incarnation, change: MemberChange::Quarantine });
        }
        actions
    }

    /// What the earlier lives of a name leave to the one that joins.
    fn record_of_return(&mut self, id: &WorkerId, now: Duration) -> Record {
        let Some(last) = self.gone.iter_mut().rev().find(|gone| gone.id == *id) else {
            return Record::default();
        };
        let mut record = std::mem::take(&mut last.record);
        record.quarantined_until = record.quarantined_until.filter(|until| *until > now);
        if !last.has_drained {
            record.flaps_too_often(now);
        }
        record
    }

    fn beat(&mut self, id: WorkerId, incarnation: u64, draining: bool, now: Duration) -> Vec<MemberAction> {
        let mut changes = Vec::new();
        match self.members.get_mut(&id).filter(|member| member.incarnation == incarnation) {
            None => changes.push(MemberChange::Reject(Rejection::IncarnationDead)),
            Some(member) => {
                member.last_heard = now;
                if std::mem::take(&mut member.is_suspect) {
                    changes.push(MemberChange::Active);
                    if member.record.flaps_too_often(now) {
                        changes.push(MemberChange::Quarantine);
                    }
                }
                if draining && !std::mem::replace(&mut member.is_draining, true) {
                    changes.push(MemberChange::Draining);
                }
            }
        }
        changes.into_iter().map(|change| MemberAction { id: id.clone(), incarnation, change }).collect()
    }

    fn close(&mut self, id: WorkerId, incarnation: u64, now: Duration) -> Vec<MemberAction> {
        match self.members.get(&id) {
            Some(member) if member.incarnation == incarnation => {
                vec![self.bury(&id, incarnation, Death::StreamClosed, now)]
            }
            // The stream of somebody who was rejected, replaced or declared dead before.
            _ => Vec::new(),
        }
    }

    fn tick(&mut self, now: Duration) -> Vec<MemberAction> {
        // Ticks that did not come mean that this process stood still, with the beats of everybody unread behind it:
        // that is nobody's silence. But one heartbeat of each pause is: where every tick is late, who stays silent
        // is dead after ten of them.
        let gap = now.saturating_sub(self.last_tick);
        let own_pause = if gap >= SUSPECT_AFTER { gap - HEARTBEAT } else { Duration::ZERO };
        self.last_tick = now;
        while self.gone.front().is_some_and(|gone| now.saturating_sub(gone.at) > REMEMBER_DEAD) {
            self.gone.pop_front();
        }
        let mut actions = Vec::new();
        let mut silent = Vec::new();
        for (id, member) in &mut self.members {
            member.last_heard = (member.last_heard + own_pause).min(now);
            let silence = now.saturating_sub(member.last_heard);
            let mut change = |change| {
                actions.push(MemberAction { id: id.clone(), incarnation: member.incarnation, change });
            };
            if silence >= DEAD_AFTER {
                silent.push((id.clone(), member.incarnation));
                continue;
            }
            if silence >= SUSPECT_AFTER && !std::mem::replace(&mut member.is_suspect, true) {
                change(MemberChange::Suspect);
            }
            if member.record.quarantined_until.is_some_and(|until| until <= now) {
                member.record.quarantined_until = None;
                change(MemberChange::Release);
            }
        }
        for (id, incarnation) in silent {
            actions.push(self.bury(&id, incarnation, Death::Silent, now));
        }
        actions
    }

    fn bury(&mut self, id: &WorkerId, incarnation: u64, death: Death, now: Duration) -> MemberAction {
        let member = self.members.remove(id);
        let has_drained =
            death == Death::StreamClosed && member.as_ref().is_some_and(|member| member.is_draining);
        let record = member.map(|member| member.record).unwrap_or_default();
        self.gone.push_back(Gone { id: id.clone(), incarnation, at: now, has_drained, record });
        if self.gone.len() > MAX_REMEMBERED_DEAD {
            self.gone.pop_front();
        }
        let change = if has_drained { MemberChange::Drained } else { MemberChange::Dead(death) };
        MemberAction { id: id.clone(), incarnation, change }
    }
}

#[cfg(test)]
mod tests;
