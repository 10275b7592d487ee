//! The actor that keeps this worker a member of its cluster: it holds the Join stream, beats on it, and comes back
//! with growing, jittered pauses when the stream is lost.

use std::time::Duration;

use attnd_plan::{WorkerId, WorkerIdError};
use attnd_wire::proto;
use attnd_wire::{Error, Heartbeat, Hello, JoinReply, JoinRequest, Reason, Surroundings, limits};
use kameo::actor::{Actor, ActorRef};
use kameo::error::Infallible;
use kameo::message::{Context, Message};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Endpoint;

use super::Gauges;

/// Messages that wait to be sent to the coordinator: a beat that finds more waiting means a stuck connection.
const OUTGOING: usize = 4;
/// Time for the coordinator to accept the stream.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// A coordinator that starts again answers nothing about sessions before their workers are back.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What the membership actor starts from, after a restart too.
#[derive(Clone, Debug)]
pub(crate) struct MembershipArgs {
    pub(crate) endpoint: Endpoint,
    pub(crate) surroundings: Surroundings,
    /// Its incarnation is replaced when the coordinator has declared this one dead.
    pub(crate) hello: Hello,
    pub(crate) gauges: Gauges,
    /// Told when the coordinator will never have this worker, and why.
    pub(crate) refused: watch::Sender<Option<Error>>,
}

/// The actor.
#[derive(Debug)]
pub(crate) struct Membership {
    args: MembershipArgs,
    /// Counts Join streams, so that what an earlier one still says is not taken for the current one's.
    stream: u64,
    outgoing: Option<mpsc::Sender<proto::JoinRequest>>,
    /// Streams lost since the last Welcome.
    failures: u32,
    leaving: bool,
    /// What runs for the current stream.
    tasks: JoinSet<()>,
}

/// Open a Join stream now.
struct Connect;

/// The stream with this number is open.
struct Opened(u64, Streaming<proto::JoinReply>);

/// The coordinator said something on the stream with this number, or the stream ended.
struct Said(u64, Result<Option<proto::JoinReply>, Error>);

/// Time for a beat on the stream with this number.
struct Beat(u64);

/// Tell the coordinator that this worker takes nothing new, and go on beating.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leave;

impl Actor for Membership {
    type Args = MembershipArgs;
    type Error = Infallible;

    async fn on_start(args: MembershipArgs, actor: ActorRef<Self>) -> Result<Self, Infallible> {
        // The mailbox of a starting actor is empty, or that of a life that ended: Connect fits or is there already.
        actor.tell(Connect).try_send().ok();
        let leaving = args.gauges.calls.is_draining();
        Ok(Self { args, stream: 0, outgoing: None, failures: 0, leaving, tasks: JoinSet::new() })
    }
}

impl Membership {
    /// Gives the current stream up and opens the next one after a pause.
    fn reconnect(&mut self, why: &Error, actor: &ActorRef<Self>) {
        self.outgoing = None;
        self.stream += 1;
        // What ran for the lost stream ends here; a fresh set keeps the pause from being aborted with it.
        self.tasks = JoinSet::new();
        match why.reason {
            Reason::Wire | Reason::KernelMix | Reason::Hello => {
                tracing::error!(error = %why, "the coordinator refuses this worker");
                self.args.refused.send_replace(Some(why.clone()));
                return;
            }
            Reason::IncarnationDead => self.args.hello.incarnation = self.args.surroundings.random(),
            Reason::Unreachable if !self.leaving => tracing::error!(
                address = %self.args.hello.address,
                "the coordinator can't connect to this worker at the address that it advertises; start it with \
                 --advertise http://HOST:PORT, the URL under which the coordinator reaches it, and see that the port \
                 is open"
            ),
            _lost => {}
        }
        let pause = pause_after(self.failures, self.args.surroundings.fraction());
        self.failures = self.failures.saturating_add(1);
        tracing::warn!(error = %why, pause_ms = pause.as_millis() as u64, "not joined");
        let actor = actor.clone();
        self.tasks.spawn(async move {
            tokio::time::sleep(pause).await;
            actor.tell(Connect).send().await.ok();
        });
    }

    fn heartbeat(&self) -> proto::JoinRequest {
        let Gauges { budget, calls, pool, sessions } = &self.args.gauges;
        let beat = Heartbeat {
            memory_used_bytes: budget.reserved(),
            calls_in_flight: u32::try_from(calls.in_flight()).unwrap_or(u32::MAX),
            load: pool.load(),
            draining: self.leaving,
            session_used_bytes: sessions.resident_bytes(),
        };
        JoinRequest::Heartbeat(beat).into()
    }

    fn beat(&mut self, actor: &ActorRef<Self>) {
        let Some(outgoing) = &self.outgoing else { return };
        if outgoing.try_send(self.heartbeat()).is_err() {
            self.reconnect(&Error::new(Reason::Transport, "heartbeats pile up"), actor);
        }
    }
}

impl Message<Connect> for Membership {
    type Reply = ();

    async fn handle(&mut self, _: Connect, ctx: &mut Context<Self, ()>) {
        self.stream += 1;
        let stream = self.stream;
        let actor = ctx.actor_ref().clone();
        let (outgoing, requests) = mpsc::channel(OUTGOING);
        // A fresh channel has room for the first message.
        outgoing.try_send(JoinRequest::Hello(self.args.hello.clone()).into()).ok();
        self.outgoing = Some(outgoing);
        let mut cluster = limits::cluster_client(self.args.surroundings.channel(&self.args.endpoint));
        self.tasks = JoinSet::new();
        self.tasks.spawn(async move {
            let opening = cluster.join(ReceiverStream::new(requests));
            let opened = match tokio::time::timeout(JOIN_TIMEOUT, opening).await {
                Ok(Ok(replies)) => actor.tell(Opened(stream, replies.into_inner())).send().await.is_ok(),
                Ok(Err(status)) => actor.tell(Said(stream, Err(status.into()))).send().await.is_ok(),
                Err(_elapsed) => {
                    let error = Error::new(Reason::Transport, "the coordinator does not answer");
                    actor.tell(Said(stream, Err(error))).send().await.is_ok()
                }
            };
            if !opened {
                tracing::debug!("the membership actor is gone");
            }
        });
    }
}

impl Message<Opened> for Membership {
    type Reply = ();

    async fn handle(&mut self, Opened(stream, mut replies): Opened, ctx: &mut Context<Self, ()>) {
        if stream != self.stream {
            return;
        }
        let actor = ctx.actor_ref().clone();
        self.tasks.spawn(async move {
            loop {
                let said = replies.message().await.map_err(Error::from);
                let last = !matches!(said, Ok(Some(_)));
                if actor.tell(Said(stream, said)).send().await.is_err() || last {
                    return;
                }
            }
        });
    }
}

impl Message<Said> for Membership {
    type Reply = ();

    async fn handle(&mut self, Said(stream, said): Said, ctx: &mut Context<Self, ()>) {
        if stream != self.stream {
            return;
        }
        let said = said.and_then(|reply| match reply {
            Some(reply) => JoinReply::try_from(reply),
            None => Err(Error::new(Reason::Transport, "the coordinator ended the stream")),
        });
        match said {
            Ok(JoinReply::Welcome(welcome)) => {
                self.failures = 0;
                tracing::info!(
                    id = %self.args.hello.worker,
                    coordinator = %self.args.endpoint.uri(),
                    "joined the cluster"
                );
                let actor = ctx.actor_ref().clone();
                let period = welcome.heartbeat;
                self.tasks.spawn(async move {
                    let mut ticks = tokio::time::interval(period);
                    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
                    loop {
                        ticks.tick().await;
                        if actor.tell(Beat(stream)).send().await.is_err() {
                            return;
                        }
                    }
                });
            }
            Err(error) => self.reconnect(&error, ctx.actor_ref()),
        }
    }
}

impl Message<Beat> for Membership {
    type Reply = ();

    async fn handle(&mut self, Beat(stream): Beat, ctx: &mut Context<Self, ()>) {
        if stream == self.stream {
            self.beat(ctx.actor_ref());
        }
    }
}

impl Message<Leave> for Membership {
    type Reply = ();

    async fn handle(&mut self, _: Leave, ctx: &mut Context<Self, ()>) {
        self.leaving = true;
        self.beat(ctx.actor_ref());
    }
}

/// The pause before the next attempt after `failures` in a row: doubled each time up to a limit, then scaled by
/// `jitter` (0 to 1) to between half and all of it, so that workers don't come back in step.
fn pause_after(failures: u32, jitter: f64) -> Duration {
    let doubled = FIRST_PAUSE.saturating_mul(1 << failures.min(10)).min(LONGEST_PAUSE);
    doubled.mul_f64(0.5 + 0.5 * jitter.clamp(0.0, 1.0))
}

/// A name for a worker that was given none: random, because host names and process ids repeat across containers.
pub(crate) fn default_id(incarnation: u64) -> Result<WorkerId, WorkerIdError> {
    WorkerId::new(format!("worker-{:08x}", incarnation >> 32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_limit_and_jitter_shortens_them() {
        let millis = |failures, jitter| pause_after(failures, jitter).as_millis();
        assert_eq!((0..4).map(|n| millis(n, 1.0)).collect::<Vec<_>>(), [50, 100, 200, 400]);
        assert_eq!((millis(20, 1.0), millis(u32::MAX, 1.0)), (1000, 1000));
        assert_eq!((millis(3, 0.0), millis(3, 0.5)), (200, 300));
        assert_eq!(millis(0, f64::NAN.max(0.0)), 25);
    }

    #[test]
    fn default_names_are_valid_and_tell_lives_apart() {
        let names = [0, u64::MAX, 1 << 32].map(|incarnation| default_id(incarnation).unwrap());
        assert!(names[0] != names[1] && names[0] != names[2]);
    }
}
