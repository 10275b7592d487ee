//! The answer to one streaming request: replies through a bounded queue, then a verdict.
//!
//! A stream that merely ended would look like success to the peer. So whoever answers owes a verdict, and one that
//! dies without giving it (a panic, the end of the node) is an error to the peer like any other.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use attnd_wire::{Error, Reason, Status};
use futures::{FutureExt, Stream};
use tokio::sync::{mpsc, oneshot};

/// Replies that wait for the peer to read them.
const QUEUE: usize = 4;

/// Makes the two ends of an answer. `guard` lives until the answer was read or given up.
pub(crate) fn reply_stream<T, G>(guard: G) -> (Answer<T>, ReplyStream<T, G>) {
    let (queue, replies) = mpsc::channel(QUEUE);
    let (verdict, end) = oneshot::channel();
    (Answer { queue, verdict }, ReplyStream { replies, end: Some(end), _guard: guard })
}

/// The end that answers.
#[derive(Debug)]
pub(crate) struct Answer<T> {
    queue: mpsc::Sender<T>,
    verdict: oneshot::Sender<Result<(), Error>>,
}

/// The end that the peer reads. Dropping it is how a peer gives up.
#[derive(Debug)]
pub(crate) struct ReplyStream<T, G> {
    replies: mpsc::Receiver<T>,
    end: Option<oneshot::Receiver<Result<(), Error>>>,
    _guard: G,
}

impl<T> Answer<T> {
    /// Where replies go. Its `closed()` says that the peer has given up.
    pub(crate) fn queue(&self) -> &mpsc::Sender<T> {
        &self.queue
    }

    /// Ends the answer; replies that wait are read first.
    pub(crate) fn end(self, verdict: Result<(), Error>) {
        // A peer that has given up needs no verdict.
        drop(self.verdict.send(verdict));
    }
}

impl<T, G: Unpin> Stream for ReplyStream<T, G> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(reply) = ready!(self.replies.poll_recv(cx)) {
            return Poll::Ready(Some(Ok(reply)));
        }
        let Some(end) = &mut self.end else { return Poll::Ready(None) };
        let verdict = ready!(end.poll_unpin(cx)).unwrap_or_else(|_given_up| {
            Err(Error::new(Reason::Internal, "the task that answered this died"))
        });
        self.end = None;
        Poll::Ready(verdict.err().map(|error| Err(error.into())))
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    #[tokio::test]
    async fn replies_come_before_the_verdict() {
        let (answer, mut stream) = reply_stream(());
        answer.queue().send(1).await.unwrap();
        answer.queue().send(2).await.unwrap();
        answer.end(Err(Error::new(Reason::WorkerLost, "w1")));
        assert_eq!(stream.next().await.unwrap().unwrap(), 1);
        assert_eq!(stream.next().await.unwrap().unwrap(), 2);
        assert_eq!(stream.next().await.unwrap().unwrap_err().message(), "WORKER_LOST: w1");
        assert!(stream.next().await.is_none());
    }

    #[tokio::test]
    async fn a_good_end_is_an_end() {
        let (answer, mut stream) = reply_stream::<(), _>(());
        answer.end(Ok(()));
        assert!(stream.next().await.is_none());
    }

    #[tokio::test]
    async fn a_dead_task_is_no_success() {
        let (answer, mut stream) = reply_stream::<(), _>(());
        let died = tokio::spawn(async move {
            let _answer = answer;
            panic!("in the middle of a call");
        });
        let end = stream.next().await.unwrap().unwrap_err();
        assert_eq!(end.message(), "INTERNAL: the task that answered this died");
        assert!(stream.next().await.is_none());
        assert!(died.await.unwrap_err().is_panic());
    }

    #[tokio::test]
    async fn the_answering_end_learns_that_the_peer_gave_up() {
        let (answer, stream) = reply_stream::<(), _>(());
        drop(stream);
        answer.queue().closed().await;
    }
}
