//! The Cluster service: one Join stream for each worker, from its Hello until it leaves, is lost or is declared dead.
//!
//! A worker is only admitted once the coordinator has connected to the address it gave: one that can't be reached
//! would fail every call that is planned on it.

use std::sync::Arc;

use attnd_plan::call::STREAM_IDLE;
use attnd_wire::limits::{CONNECT_TIMEOUT, STALL};
use attnd_wire::proto::{self, cluster_server};
use attnd_wire::surroundings::now;
use attnd_wire::{
    Error, Heartbeat, Hello, JoinReply, JoinRequest, Link, Reason, Status, Surroundings, Welcome, limits,
    refusal,
};
use kameo::actor::ActorRef;
use kameo::error::SendError;
use tokio::sync::{Semaphore, mpsc};
use tonic::transport::Channel;
use tonic::{Request, Response, Streaming};
use tracing::Instrument;

use super::membership_actor::{Beat, Closed, Join, MembershipActor};
use super::reply_stream::{ReplyStream, reply_stream};
use super::tasks::Tasks;

/// Workers that the coordinator connects to at a time, each for [`CONNECT_TIMEOUT`] at most: whoever says Hello makes
/// it open a connection.
const MAX_DIALS: usize = 64;

/// The service.
#[derive(Clone, Debug)]
pub(crate) struct JoinService {
    cluster: ActorRef<MembershipActor>,
    surroundings: Surroundings,
    tasks: Tasks,
    dials: Arc<Semaphore>,
}

impl JoinService {
    pub(crate) fn new(cluster: ActorRef<MembershipActor>, surroundings: Surroundings, tasks: Tasks) -> Self {
        Self { cluster, surroundings, tasks, dials: Arc::new(Semaphore::new(MAX_DIALS)) }
    }
}

#[tonic::async_trait]
impl cluster_server::Cluster for JoinService {
    type JoinStream = ReplyStream<proto::JoinReply, ()>;

    async fn join(
        &self,
        request: Request<Streaming<proto::JoinRequest>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        let (answer, stream) = reply_stream(());
        let service = self.clone();
        let mut frames = request.into_inner();
        let task = async move {
            let ended = service.serve(&mut frames, answer.queue()).await;
            answer.end(ended, STALL).await;
        };
        self.tasks.spawn(task.instrument(tracing::debug_span!("join")));
        Ok(Response::new(stream))
    }
}

impl JoinService {
    /// Runs one membership. `Ok` means that the worker left.
    async fn serve(
        &self,
        frames: &mut Streaming<proto::JoinRequest>,
        replies: &mpsc::Sender<proto::JoinReply>,
    ) -> Result<(), Error> {
        let hello = read_hello(frames).await?;
        let (worker, incarnation) = (hello.worker.clone(), hello.incarnation);
        let channel = self.dial(&hello).await?;
        // Connects with the first session.
        let bulk = self.surroundings.channel(&limits::endpoint(&hello.address, Link::Cluster)?);
        let actor = self.cluster.ask(Join { hello, channel, bulk }).send().await.map_err(unanswered)?;
        let welcome = Welcome { heartbeat: attnd_plan::membership::HEARTBEAT };
        // A worker that reads nothing is noticed below.
        replies.send(JoinReply::Welcome(welcome).into()).await.ok();
        let beats = async {
            while let Some(heartbeat) = read_heartbeat(frames).await? {
                let beat = Beat { worker: worker.clone(), incarnation, heartbeat };
                self.cluster.ask(beat).send().await.map_err(unanswered)?;
            }
            Ok(())
        };
        let ended = tokio::select! {
            biased;
            ended = beats => ended,
            () = replies.closed() => Ok(()),
            () = actor.wait_for_shutdown() => return Err(Error::new(Reason::IncarnationDead, "declared dead")),
        };
        // An actor that is gone knows no members.
        self.cluster.tell(Closed { worker, incarnation }).send().await.ok();
        ended
    }

    /// Connects to a worker, as its calls will.
    async fn dial(&self, hello: &Hello) -> Result<Channel, Error> {
        let endpoint = limits::endpoint(&hello.address, Link::Cluster)?;
        let _turn = self.dials.try_acquire().map_err(|_full| {
            Error::new(Reason::Overloaded, format!("{MAX_DIALS} workers join at this moment"))
        })?;
        let begun = now();
        // The endpoint's own limit doesn't count the time to resolve a name.
        match tokio::time::timeout(CONNECT_TIMEOUT, self.surroundings.connect(&endpoint)).await {
            Ok(Ok(channel)) => Ok(channel),
            failed => {
                let Hello { worker, address, .. } = hello;
                tracing::warn!(%worker, %address, result = ?failed, "a worker can't be reached and is refused");
                Err(Error::new(
                    Reason::Unreachable,
                    format!(
                        "connect to the advertised address failed after {} ms",
                        now().saturating_duration_since(begun).as_millis()
                    ),
                ))
            }
        }
    }
}

async fn read_hello(frames: &mut Streaming<proto::JoinRequest>) -> Result<Hello, Error> {
    let first = tokio::time::timeout(STREAM_IDLE, frames.message())
        .await
        .map_err(|_elapsed| refusal::stream_idle(STREAM_IDLE))??;
    match first.map(JoinRequest::try_from).transpose()? {
        Some(JoinRequest::Hello(hello)) => Ok(hello),
        Some(JoinRequest::Heartbeat(_)) | None => Err(Error::new(Reason::StreamOrder, "expected Hello")),
    }
}

/// The next beat; `None` when the worker ended the stream. Silence is for the membership to judge.
async fn read_heartbeat(frames: &mut Streaming<proto::JoinRequest>) -> Result<Option<Heartbeat>, Error> {
    match frames.message().await?.map(JoinRequest::try_from).transpose()? {
        Some(JoinRequest::Heartbeat(heartbeat)) => Ok(Some(heartbeat)),
        Some(JoinRequest::Hello(_)) => Err(Error::new(Reason::StreamOrder, "duplicate Hello")),
        None => Ok(None),
    }
}

/// The refusal of an actor, or that it is gone.
fn unanswered<M>(error: SendError<M, Error>) -> Error {
    match error {
        SendError::HandlerError(refusal) => refusal,
        SendError::ActorNotRunning(_)
        | SendError::ActorStopped
        | SendError::ActorRestarting(_)
        | SendError::MailboxFull(_)
        | SendError::Timeout(_) => Error::new(Reason::Internal, "the membership actor is gone"),
    }
}
