//! The answer to one streaming request: replies through a bounded queue, then a verdict.
//!
//! A stream that merely ended would look like success to the peer. So whoever answers owes a verdict, and one that
//! dies without giving it (a panic, the end of the node) is an error to the peer like any other.
//!
//! The stream belongs to the connection, which keeps it for as long as the peer does. So the end that answers can empty
//! it: a peer that reads nothing then keeps neither replies nor the guard.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use attnd_wire::{Error, Reason, Status, refusal};
use futures::{FutureExt, Stream};
use tokio::sync::{mpsc, oneshot};

/// Replies that wait for the peer to read them.
const QUEUE: usize = 4;

/// Makes the two ends of an answer. `guard` lives until the answer was read or given up.
pub(crate) fn reply_stream<T, G>(guard: G) -> (Answer<T, G>, ReplyStream<T, G>) {
    let (queue, replies) = mpsc::channel(QUEUE);
    let (verdict, end) = oneshot::channel();
    let (unread, alive) = oneshot::channel();
    let unread_replies = Unread { replies, end: Some(end), _alive: alive, _guard: guard };
    let content = Arc::new(Mutex::new(Content::Unread(unread_replies)));
    (Answer { queue, verdict, unread, content: Arc::downgrade(&content) }, ReplyStream { content })
}

/// The end that answers.
#[derive(Debug)]
pub(crate) struct Answer<T, G> {
    queue: mpsc::Sender<T>,
    verdict: oneshot::Sender<Result<(), Error>>,
    /// Closed once there is nothing more to read.
    unread: oneshot::Sender<()>,
    content: Weak<Mutex<Content<T, G>>>,
}

/// The end that the peer reads. Dropping it is how a peer gives up.
#[derive(Debug)]
pub(crate) struct ReplyStream<T, G> {
    content: Arc<Mutex<Content<T, G>>>,
}

#[derive(Debug)]
enum Content<T, G> {
    Unread(Unread<T, G>),
    /// Nobody read it in time.
    Cut(Option<Error>),
}

#[derive(Debug)]
struct Unread<T, G> {
    replies: mpsc::Receiver<T>,
    end: Option<oneshot::Receiver<Result<(), Error>>>,
    _alive: oneshot::Receiver<()>,
    _guard: G,
}

impl<T, G> Answer<T, G> {
    /// Where replies go. Its `closed()` says that the peer has given up.
    pub(crate) fn queue(&self) -> &mpsc::Sender<T> {
        &self.queue
    }

    /// Ends the answer, and returns when the peer has done with it. Replies that wait are read first; a peer that reads
    /// none of them for `patience` gets an error in their place.
    pub(crate) async fn end(self, verdict: Result<(), Error>, patience: Duration) {
        let Self { queue, verdict: says, mut unread, content } = self;
        let error = verdict.clone().err().unwrap_or_else(|| refusal::stalled(patience));
        // A peer that has given up needs no verdict.
        drop(says.send(verdict));
        // This wakes a stream that waits for more.
        drop(queue);
        let mut waiting = content.upgrade().map_or(0, |content| lock(&content).waiting());
        loop {
            tokio::select! {
                biased;
                () = unread.closed() => return,
                () = tokio::time::sleep(patience) => {}
            }
            let Some(content) = content.upgrade() else { return };
            let before = std::mem::replace(&mut waiting, lock(&content).waiting());
            if waiting >= before {
                tracing::debug!(waiting, "a peer does not read its answer");
                let cut = std::mem::replace(&mut *lock(&content), Content::Cut(Some(error)));
                drop(cut);
                return;
            }
        }
    }
}

impl<T, G> Content<T, G> {
    /// Replies that wait to be read.
    fn waiting(&self) -> usize {
        match self {
            Self::Unread(unread) => unread.replies.len(),
            Self::Cut(_) => 0,
        }
    }
}

impl<T, G> Stream for ReplyStream<T, G> {
    type Item = Result<T, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match &mut *lock(&self.content) {
            Content::Unread(unread) => unread.poll_next(cx),
            Content::Cut(error) => Poll::Ready(error.take().map(|error| Err(error.into()))),
        }
    }
}

impl<T, G> Unread<T, G> {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<T, Status>>> {
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

/// No critical section of this file can panic half-way, so a poisoned lock still guards a whole value.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use tokio::time::{sleep, timeout};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn replies_come_before_the_verdict() {
        let (answer, mut stream) = reply_stream(());
        answer.queue().send(1).await.unwrap();
        answer.queue().send(2).await.unwrap();
        let read = async {
            assert_eq!(stream.next().await.unwrap().unwrap(), 1);
            assert_eq!(stream.next().await.unwrap().unwrap(), 2);
            assert_eq!(stream.next().await.unwrap().unwrap_err().message(), "WORKER_LOST: w1");
            assert!(stream.next().await.is_none());
            drop(stream);
        };
        tokio::join!(answer.end(Err(Error::new(Reason::WorkerLost, "w1")), PATIENCE), read);
    }

    #[tokio::test]
    async fn a_good_end_is_an_end() {
        let (answer, mut stream) = reply_stream::<(), _>(());
        let read = async {
            assert!(stream.next().await.is_none());
            drop(stream);
        };
        tokio::join!(answer.end(Ok(()), PATIENCE), read);
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_peer_does_not_read_is_kept_for_a_while_and_no_longer() {
        let stalled = "STREAM_IDLE: no reply taken for 10000 ms";
        for (verdict, said) in [
            (Ok(()), stalled),
            (Err(refusal::stalled(PATIENCE)), stalled),
            (Err(Error::new(Reason::WorkerLost, "w1")), "WORKER_LOST: w1"),
        ] {
            let kept = Arc::new(());
            let (answer, mut stream) = reply_stream(Arc::clone(&kept));
            answer.queue().send(Arc::clone(&kept)).await.unwrap();
            let mut end = std::pin::pin!(answer.end(verdict, PATIENCE));
            assert!(timeout(PATIENCE / 2, &mut end).await.is_err());
            assert_eq!(Arc::strong_count(&kept), 3);
            timeout(PATIENCE, end).await.unwrap();
            assert_eq!(Arc::strong_count(&kept), 1, "neither reply nor guard is left");
            assert_eq!(stream.next().await.unwrap().unwrap_err().message(), said);
            assert!(stream.next().await.is_none());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_reads_slowly_gets_everything() {
        let (answer, mut stream) = reply_stream(());
        for reply in 0..QUEUE {
            answer.queue().send(reply).await.unwrap();
        }
        let read = async {
            for reply in 0..QUEUE {
                sleep(PATIENCE * 3 / 4).await;
                assert_eq!(stream.next().await.unwrap().unwrap(), reply);
            }
            assert!(stream.next().await.is_none());
            drop(stream);
        };
        tokio::join!(answer.end(Ok(()), PATIENCE), read);
    }

    #[tokio::test]
    async fn a_stream_that_waits_for_more_hears_that_there_is_none() {
        let (answer, mut stream) = reply_stream::<(), _>(());
        let read = tokio::spawn(async move { stream.next().await.unwrap().unwrap_err() });
        tokio::task::yield_now().await;
        answer.end(Err(Error::new(Reason::StreamIdle, "10 s")), Duration::ZERO).await;
        assert_eq!(timeout(PATIENCE, read).await.unwrap().unwrap().message(), "STREAM_IDLE: 10 s");
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
