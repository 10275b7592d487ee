//! The actor that knows the workers: a thin shell around [`attnd_plan::Membership`], which decides.
//!
//! It starts a [`WorkerActor`] for every worker that is admitted and kills it when the worker is dead. That of a worker that drained
//! and left is let go of: what the worker said last may still be on its way. The two are linked:
//!
//! | who dies                        | what happens                                                               |
//! |---------------------------------|----------------------------------------------------------------------------|
//! | a worker actor, killed or done  | nothing: this actor did it                                                 |
//! | a worker actor, by a panic      | its worker is dead; it joins again with a new incarnation, clean both ends |
//! | this actor, whatever the reason | all worker actors with it; the coordinator ends, see [`super::run`]        |
//!
//! Links and not kameo's supervised children: 0.22 keeps what a child was started from for as long as its supervisor
//! lives, and a worker that comes and goes would leave a channel behind each time.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use attnd_kernel::KERNEL_ID;
use attnd_plan::membership::{MemberChange, MemberState};
use attnd_plan::session::{Holder, Keeper};
use attnd_plan::{Capacity, Facts, MemberAction, MemberEvent, Membership, Rules, WorkerId};
use attnd_wire::join::{SESSIONS, WIRE_VERSIONS};
use attnd_wire::surroundings::now;
use attnd_wire::{Error, Heartbeat, Hello, Reason, WorkerStatus};
use kameo::actor::{Actor, ActorId, ActorRef, Spawn, WeakActorRef};
use kameo::error::{ActorStopReason, Infallible};
use kameo::mailbox::{MailboxReceiver, Signal};
use kameo::message::{Context, Message};
use tokio::sync::watch;
use tokio::time::{Interval, MissedTickBehavior};
use tonic::transport::Channel;

use super::worker_actor::{WorkerActor, WorkerActorArgs};
use crate::budget::Budget;
use crate::listen::MAX_CONNECTIONS;

/// How often silence is looked for: twice per beat.
const TICK: Duration = Duration::from_millis(100);
/// Workers that may have joined at a time. Each of them keeps a connection, and clients need some too.
const MAX_MEMBERS: usize = MAX_CONNECTIONS / 2;
/// How long a worker gets no new work after a share could not connect to it.
const NOT_CONNECTED: Duration = Duration::from_secs(2);

/// The actor.
#[derive(Debug)]
pub(crate) struct MembershipActor {
    decisions: Membership,
    members: BTreeMap<WorkerId, Member>,
    epoch: Instant,
    ticks: Interval,
    roll: watch::Sender<Arc<Roll>>,
}

/// Everybody who is a member at some moment and holds shards of sessions. One that isn't here any more never comes back.
pub(crate) type Roll = BTreeMap<Holder, ActorRef<WorkerActor>>;

/// A worker, and what runs for it.
#[derive(Debug)]
struct Member {
    hello: Hello,
    heartbeat: Heartbeat,
    /// What this coordinator has reserved of the worker's memory. Nobody else uses it, and the number in a heartbeat
    /// would be late. It may be too low for a moment: a share that was given up is over here before it is there, and
    /// a worker that has no room for the next one yet says so.
    memory: Arc<Budget>,
    actor: ActorRef<WorkerActor>,
    /// When a share last found no connection.
    not_connected: watch::Receiver<Option<Instant>>,
}

impl Member {
    fn can_connect(&self) -> bool {
        self.not_connected.borrow().is_none_or(|at| now().saturating_duration_since(at) >= NOT_CONNECTED)
    }

    /// The worker as a place for shards of sessions. What they take is as of its last beat: a worker that has less says so.
    fn keeper(&self) -> Keeper {
        let Hello { worker, incarnation, host, gflops, session_memory_bytes, .. } = &self.hello;
        Keeper {
            holder: Holder { worker: worker.clone(), incarnation: *incarnation },
            host: host.clone(),
            gflops: *gflops,
            free_bytes: session_memory_bytes.saturating_sub(self.heartbeat.session_used_bytes),
        }
    }

    fn candidate(&self) -> Candidate {
        Candidate {
            capacity: Capacity {
                id: self.hello.worker.clone(),
                gflops: self.hello.gflops,
                free_bytes: self.memory.limit().saturating_sub(self.memory.reserved()),
            },
            memory: Arc::clone(&self.memory),
            actor: self.actor.clone(),
            keeper: self.keeper(),
        }
    }
}

/// A worker that may get new work.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    pub(crate) capacity: Capacity,
    pub(crate) memory: Arc<Budget>,
    pub(crate) actor: ActorRef<WorkerActor>,
    /// What it is for sessions.
    pub(crate) keeper: Keeper,
}

/// The workers, as a planner sees them.
#[derive(Debug, Default, kameo::Reply)]
pub(crate) struct Candidates {
    /// Those that may get new work, ascending by id: the active ones or, where there is none, those in quarantine.
    pub(crate) usable: Vec<Candidate>,
    pub(crate) unused: Unused,
}

/// How many members may get no new work, and why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Unused {
    suspect: usize,
    quarantined: usize,
    draining: usize,
    not_connected: usize,
    too_old: usize,
}

impl fmt::Display for Unused {
    /// `1 suspect, 2 draining`: those that there are.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { suspect, quarantined, draining, not_connected, too_old } = *self;
        let counts = [
            (suspect, "suspect"),
            (quarantined, "quarantined"),
            (draining, "draining"),
            (not_connected, "not connected"),
            (too_old, "too old for such a call"),
        ];
        let mut separator = "";
        for (n, what) in counts.into_iter().filter(|(n, _)| *n > 0) {
            write!(f, "{separator}{n} {what}")?;
            separator = ", ";
        }
        Ok(())
    }
}

/// A worker said Hello, and is connected to. Answered with its actor, which lives as long as the worker is a member.
#[derive(Debug)]
pub(crate) struct Join {
    pub(crate) hello: Hello,
    pub(crate) channel: Channel,
    /// Another one to the same address, for bytes of sessions.
    pub(crate) bulk: Channel,
}

/// A worker beat.
#[derive(Debug)]
pub(crate) struct Beat {
    pub(crate) worker: WorkerId,
    pub(crate) incarnation: u64,
    pub(crate) heartbeat: Heartbeat,
}

/// The join stream of a worker ended.
#[derive(Debug)]
pub(crate) struct Closed {
    pub(crate) worker: WorkerId,
    pub(crate) incarnation: u64,
}

/// Who may get new work?
#[derive(Debug)]
pub(crate) struct Capacities {
    /// Of the protocol, that the work needs.
    pub(crate) least_version: u32,
}

/// Who is there, whether it may get new work or not?
#[derive(Debug)]
pub(crate) struct Everybody {
    /// Of the protocol, that the work needs.
    pub(crate) least_version: u32,
}

/// A worker that is there.
#[derive(Clone, Debug)]
pub(crate) struct Present {
    pub(crate) keeper: Keeper,
    /// It may get new work.
    pub(crate) is_usable: bool,
    /// It wants to leave.
    pub(crate) is_draining: bool,
}

/// How is everybody, ascending by id?
#[derive(Debug)]
pub(crate) struct Roster;

impl Actor for MembershipActor {
    /// Who is told of who is there.
    type Args = watch::Sender<Arc<Roll>>;
    type Error = Infallible;

    async fn on_start(roll: Self::Args, _: ActorRef<Self>) -> Result<Self, Infallible> {
        let rules = Rules { wire_versions: WIRE_VERSIONS, kernel_id: KERNEL_ID.to_owned() };
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            decisions: Membership::new(rules, Duration::ZERO),
            members: BTreeMap::new(),
            epoch: now(),
            ticks,
            roll,
        })
    }

    async fn next(
        &mut self,
        _: WeakActorRef<Self>,
        mailbox: &mut MailboxReceiver<Self>,
    ) -> Result<Option<Signal<Self>>, Infallible> {
        loop {
            tokio::select! {
                biased;
                // However much is said, silence is looked for.
                _ = self.ticks.tick() => {
                    let actions = self.decide(MemberEvent::Tick);
                    self.end_members(&actions);
                }
                signal = mailbox.recv() => return Ok(signal),
            }
        }
    }

    async fn on_link_died(
        &mut self,
        _: WeakActorRef<Self>,
        id: ActorId,
        reason: ActorStopReason,
    ) -> Result<ControlFlow<ActorStopReason>, Infallible> {
        let member = self.members.values().find(|member| member.actor.id() == id);
        if let Some(Hello { worker, incarnation, .. }) = member.map(|member| &member.hello) {
            tracing::error!(%worker, ?reason, "the actor of a live worker died");
            let event = MemberEvent::StreamClosed { id: worker.clone(), incarnation: *incarnation };
            let actions = self.decide(event);
            self.end_members(&actions);
        }
        Ok(ControlFlow::Continue(()))
    }
}

impl MembershipActor {
    fn now(&self) -> Duration {
        now().saturating_duration_since(self.epoch)
    }

    fn decide(&mut self, event: MemberEvent) -> Vec<MemberAction> {
        let actions = self.decisions.handle(event, self.now());
        for MemberAction { id, incarnation, change } in &actions {
            tracing::info!(worker = %id, incarnation = format_args!("{incarnation:016x}"), ?change, "membership");
        }
        actions
    }

    /// Ends what runs for workers that are gone. What changes else is looked up in [`Membership`] when it is needed.
    fn end_members(&mut self, actions: &[MemberAction]) {
        let before = self.members.len();
        for MemberAction { id, incarnation, change } in actions {
            let is_dead = matches!(change, MemberChange::Dead(_));
            if (is_dead || *change == MemberChange::Drained)
                && let Some(member) = self.members.remove(id)
            {
                debug_assert_eq!(member.hello.incarnation, *incarnation);
                if is_dead {
                    member.actor.kill();
                }
            }
        }
        if self.members.len() < before {
            self.call_the_roll();
        }
    }

    fn call_the_roll(&self) {
        let holders = self.members.values().filter(|member| member.hello.wire_version >= SESSIONS);
        let roll = holders.map(|member| (member.keeper().holder, member.actor.clone())).collect();
        self.roll.send_replace(Arc::new(roll));
    }
}

/// The refusal among the actions, if there is one.
fn refusal(actions: &[MemberAction]) -> Result<(), Error> {
    let rejected = actions.iter().find_map(|action| match &action.change {
        MemberChange::Reject(why) => Some(why),
        _ => None,
    });
    rejected.map_or(Ok(()), |why| Err(why.clone().into()))
}

impl Message<Join> for MembershipActor {
    type Reply = Result<ActorRef<WorkerActor>, Error>;

    async fn handle(&mut self, join: Join, ctx: &mut Context<Self, Self::Reply>) -> Self::Reply {
        let Join { hello, channel, bulk } = join;
        if self.members.len() >= MAX_MEMBERS && !self.members.contains_key(&hello.worker) {
            return Err(Error::new(Reason::Overloaded, format!("{MAX_MEMBERS} workers have joined")));
        }
        let facts = Facts {
            id: hello.worker.clone(),
            incarnation: hello.incarnation,
            wire_version: hello.wire_version,
            kernel_id: hello.kernel_id.clone(),
        };
        let actions = self.decide(MemberEvent::Joined(facts));
        self.end_members(&actions);
        refusal(&actions)?;
        let (sender, not_connected) = watch::channel(None);
        let (id, incarnation) = (hello.worker.clone(), hello.incarnation);
        let args = WorkerActorArgs { id, incarnation, channel, bulk, not_connected: sender };
        let actor = WorkerActor::spawn_link(ctx.actor_ref(), args).await;
        let member = Member {
            heartbeat: Heartbeat::default(),
            memory: Budget::new(hello.memory_budget_bytes),
            actor: actor.clone(),
            not_connected,
            hello,
        };
        self.members.insert(member.hello.worker.clone(), member);
        self.call_the_roll();
        Ok(actor)
    }
}

impl Message<Beat> for MembershipActor {
    type Reply = Result<(), Error>;

    async fn handle(&mut self, beat: Beat, _: &mut Context<Self, Self::Reply>) -> Self::Reply {
        let Beat { worker, incarnation, heartbeat } = beat;
        let event = MemberEvent::Beat { id: worker.clone(), incarnation, draining: heartbeat.draining };
        refusal(&self.decide(event))?;
        if let Some(member) = self.members.get_mut(&worker) {
            member.heartbeat = heartbeat;
        }
        Ok(())
    }
}

impl Message<Closed> for MembershipActor {
    type Reply = ();

    async fn handle(&mut self, closed: Closed, _: &mut Context<Self, ()>) {
        let Closed { worker, incarnation } = closed;
        let actions = self.decide(MemberEvent::StreamClosed { id: worker, incarnation });
        self.end_members(&actions);
    }
}

impl Message<Capacities> for MembershipActor {
    type Reply = Candidates;

    async fn handle(&mut self, ask: Capacities, _: &mut Context<Self, Candidates>) -> Candidates {
        let now = self.now();
        let mut quarantined = Vec::new();
        let Candidates { mut usable, mut unused } = Candidates::default();
        for (id, member) in &self.members {
            match self.decisions.state(id, now) {
                None => {}
                Some((MemberState::Suspect, _)) => unused.suspect += 1,
                Some((MemberState::Draining, _)) => unused.draining += 1,
                Some(_beats) if member.hello.wire_version < ask.least_version => unused.too_old += 1,
                Some(_beats) if !member.can_connect() => unused.not_connected += 1,
                Some((MemberState::Quarantined, _)) => quarantined.push(member.candidate()),
                Some((MemberState::Active, _)) => usable.push(member.candidate()),
            }
        }
        if usable.is_empty() {
            // A worker that may fail the call is better than a call that fails for sure.
            usable = quarantined;
        } else {
            unused.quarantined = quarantined.len();
        }
        Candidates { usable, unused }
    }
}

impl Message<Everybody> for MembershipActor {
    type Reply = Vec<Present>;

    async fn handle(&mut self, ask: Everybody, _: &mut Context<Self, Vec<Present>>) -> Vec<Present> {
        let now = self.now();
        let able = self.members.iter().filter(|(_, member)| member.hello.wire_version >= ask.least_version);
        let present = |(id, member): (&WorkerId, &Member)| {
            let (state, _) = self.decisions.state(id, now)?;
            Some(Present {
                keeper: member.keeper(),
                is_usable: state == MemberState::Active && member.can_connect(),
                is_draining: state == MemberState::Draining,
            })
        };
        able.filter_map(present).collect()
    }
}

impl Message<Roster> for MembershipActor {
    type Reply = Vec<WorkerStatus>;

    async fn handle(&mut self, _: Roster, _: &mut Context<Self, Self::Reply>) -> Self::Reply {
        let now = self.now();
        let states =
            self.members.iter().filter_map(|(id, member)| Some((member, self.decisions.state(id, now)?)));
        states
            .map(|(Member { hello, heartbeat, .. }, (state, silence))| WorkerStatus {
                worker: hello.worker.clone(),
                address: hello.address.clone(),
                state: state.as_str().to_owned(),
                isa: hello.isa.clone(),
                kernel_id: hello.kernel_id.clone(),
                threads: hello.threads,
                gflops: hello.gflops,
                memory_budget_bytes: hello.memory_budget_bytes,
                memory_used_bytes: heartbeat.memory_used_bytes,
                calls_in_flight: heartbeat.calls_in_flight,
                load: heartbeat.load,
                since_heartbeat: silence,
                version: hello.version.clone(),
                wire_version: hello.wire_version,
                host: hello.host.clone(),
                session_memory_bytes: hello.session_memory_bytes,
                session_used_bytes: heartbeat.session_used_bytes,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests;
