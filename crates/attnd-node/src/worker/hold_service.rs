//! The gRPC service of a worker for shards of sessions: streams of a coordinator that stay open, each with a task that reads frames and
//! hands work to the store.
//!
//! * [`reader`] takes frames: which shard they are about, and whether they make sense there.
//! * [`answers`] are what goes back: work that ends on the compute pool puts its answer straight into the stream's queue, where its place
//!   was kept before it began.
//! * [`works`] are steps on their way, whose partials may be given up.
//! * [`bulk`] are appends in chunks, which are many frames and one answer; [`copies`] what replicas are copied by.
//!
//! A stream that is dropped takes with it what nobody waits for any more. Shards stay: the coordinator may come back, or another one.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use attnd_wire::proto::{self, shards_server};
use attnd_wire::{Error, Reason, Status};
use futures::Stream;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Streaming};

use self::answers::Answer;
use self::reader::Reader;
use self::works::AllPending;
use super::store::{Present, Store};
use crate::shutdown::Calls;

pub(crate) mod answers;
mod bulk;
mod copies;
mod reader;
mod works;

/// Messages of a stream that wait or are computed, and answers that wait to be sent, together.
pub(crate) const QUEUE: usize = 256;
/// Streams at once: a coordinator has two, and one that takes over may come before the last one has gone.
const MAX_HOLDS: usize = 16;

/// The service.
#[derive(Debug)]
pub(crate) struct HoldService {
    pub(crate) store: Store,
    pub(crate) calls: Calls,
}

#[tonic::async_trait]
impl shards_server::Shards for HoldService {
    type HoldStream = HoldReplies;

    async fn hold(
        &self,
        request: Request<Streaming<proto::HoldRequest>>,
    ) -> Result<Response<HoldReplies>, Status> {
        let present = self.store.present(MAX_HOLDS);
        let present =
            present.ok_or_else(|| Error::new(Reason::Overloaded, format!("{MAX_HOLDS} streams")))?;
        let (replies, queue) = mpsc::channel(QUEUE);
        let works = Arc::new(AllPending::default());
        let (store, calls) = (self.store.clone(), self.calls.clone());
        let reader = Reader::new(store, calls, replies, Arc::clone(&works), present.term());
        let reader = tokio::task::spawn(reader.serve(request.into_inner()));
        let _reader = AbortOnDropHandle::new(reader);
        let answer =
            HoldReplies { queue, frames: VecDeque::new(), answer: None, works, _reader, _present: present };
        Ok(Response::new(answer))
    }
}

/// The reply stream. Dropping it is how a peer goes away.
#[derive(Debug)]
pub(crate) struct HoldReplies {
    queue: mpsc::Receiver<Answer>,
    /// Of the answer that is being sent.
    frames: VecDeque<proto::HoldReply>,
    /// What the answer holds until its last frame is taken.
    answer: Option<Answer>,
    works: Arc<AllPending>,
    _reader: AbortOnDropHandle<()>,
    _present: Present,
}

impl Stream for HoldReplies {
    type Item = Result<proto::HoldReply, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                if self.frames.is_empty() {
                    self.answer = None;
                }
                return Poll::Ready(Some(Ok(frame)));
            }
            match ready!(self.queue.poll_recv(cx)) {
                Some(mut answer) => {
                    self.frames = std::mem::take(&mut answer.frames);
                    self.answer = Some(answer);
                }
                None => return Poll::Ready(None),
            }
        }
    }
}

impl Drop for HoldReplies {
    fn drop(&mut self) {
        self.works.end();
    }
}

#[cfg(test)]
mod latency;
#[cfg(test)]
mod tests;
