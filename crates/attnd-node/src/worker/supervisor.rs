//! The root of a worker's actors. It keeps the membership actor running; the shards of calls are linked to it, so
//! that their deaths are noticed here and end nothing else.

use std::ops::ControlFlow;
use std::time::Duration;

use kameo::actor::{Actor, ActorId, ActorRef, Spawn, WeakActorRef};
use kameo::error::{ActorStopReason, Infallible};
use kameo::message::{Context, Message};
use kameo::supervision::RestartPolicy;

use super::membership::{Leave, Membership, MembershipArgs};

/// Deaths of the membership actor that are forgiven within [`RESTART_WINDOW`].
const RESTARTS: u32 = 5;
const RESTART_WINDOW: Duration = Duration::from_secs(10);

/// The root actor.
#[derive(Debug)]
pub(crate) struct Supervisor {
    membership: ActorRef<Membership>,
}

impl Actor for Supervisor {
    type Args = MembershipArgs;
    type Error = Infallible;

    async fn on_start(args: MembershipArgs, actor: ActorRef<Self>) -> Result<Self, Infallible> {
        let membership = Membership::supervise(&actor, args)
            .restart_policy(RestartPolicy::Permanent)
            .restart_limit(RESTARTS, RESTART_WINDOW)
            .spawn()
            .await;
        Ok(Self { membership })
    }

    async fn on_link_died(
        &mut self,
        _: WeakActorRef<Self>,
        id: ActorId,
        reason: ActorStopReason,
    ) -> Result<ControlFlow<ActorStopReason>, Infallible> {
        if id == self.membership.id() {
            tracing::error!(?reason, "the membership actor died too often");
            return Ok(ControlFlow::Break(ActorStopReason::LinkDied { id, reason: Box::new(reason) }));
        }
        match reason {
            ActorStopReason::Panicked(panic) => tracing::error!(%panic, "a shard died"),
            other => tracing::trace!(reason = ?other, "a shard ended"),
        }
        Ok(ControlFlow::Continue(()))
    }
}

impl Message<Leave> for Supervisor {
    type Reply = ();

    async fn handle(&mut self, leave: Leave, _: &mut Context<Self, ()>) {
        // A membership actor that is gone has left already.
        self.membership.tell(leave).send().await.ok();
    }
}
