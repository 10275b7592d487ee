//! The way of an append's frames from the stream that they come on to the append.
//!
//! An append that has its turn takes frames as fast as its workers do, and a stream whose next frame finds no room isn't read meanwhile.
//! One that waits for its turn may wait for frames behind its own, so nothing ever waits for it: frames that come before its turn wait
//! in a room that all such appends of the stream have together, and an append whose frame finds none there is refused.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use attnd_wire::{Error, Reason};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::append::Frame;

/// Bytes of chunks that may wait for the turns of their appends, over all appends of a stream. A message has room in it.
pub(super) const AHEAD_BYTES: usize = 8 << 20;
/// Frames of an append that has its turn which wait for its workers.
const FRAMES: usize = 2;

/// Room for the frames of a stream that come before their turn, in KiB.
pub(super) fn ahead() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(AHEAD_BYTES >> 10))
}

/// The stream's end.
#[derive(Debug)]
pub(super) struct Feeder {
    /// None once the append is refused.
    frames: Option<mpsc::Sender<Fed>>,
    has_turn: Arc<AtomicBool>,
    /// For frames that come before the turn.
    ahead: Arc<Semaphore>,
    /// For frames that come since.
    room: Arc<Semaphore>,
    /// Taken once it is refused.
    refuse: Option<oneshot::Sender<Error>>,
}

/// The append's end.
#[derive(Debug)]
pub(super) struct Frames {
    frames: mpsc::Receiver<Fed>,
    has_turn: Arc<AtomicBool>,
    room: Arc<Semaphore>,
    /// None once nothing can come of it any more.
    refused: Option<oneshot::Receiver<Error>>,
}

#[derive(Debug)]
struct Fed {
    frame: Frame,
    _room: OwnedSemaphorePermit,
}

/// Both ends, of an append of a stream with this room.
pub(super) fn feed(ahead: &Arc<Semaphore>) -> (Feeder, Frames) {
    // Each frame has room elsewhere, so there always is some here.
    let (sender, receiver) = mpsc::channel((AHEAD_BYTES >> 10) + FRAMES);
    let (refuse, refused) = oneshot::channel();
    let (has_turn, room) = (Arc::new(AtomicBool::new(false)), Arc::new(Semaphore::new(FRAMES)));
    let frames = Frames {
        frames: receiver,
        has_turn: Arc::clone(&has_turn),
        room: Arc::clone(&room),
        refused: Some(refused),
    };
    (Feeder { frames: Some(sender), has_turn, ahead: Arc::clone(ahead), room, refuse: Some(refuse) }, frames)
}

impl Feeder {
    /// Takes a frame; gives it back where it has to wait for [`Self::room`].
    pub(super) fn offer(&mut self, frame: Frame) -> Option<Frame> {
        let has_turn = self.has_turn.load(Ordering::Acquire);
        let (room, need) = if has_turn { (&self.room, 1) } else { (&self.ahead, kib(&frame)) };
        match Arc::clone(room).try_acquire_many_owned(need) {
            Ok(room) => self.feed(frame, room),
            Err(_full) if has_turn => return Some(frame),
            Err(_full) => {
                if let Some(refuse) = self.refuse.take() {
                    let detail = format!("{AHEAD_BYTES} bytes of appends wait for their turns");
                    // It may have got it just now, or be gone.
                    drop(refuse.send(Error::new(Reason::Overloaded, detail)));
                    self.frames = None;
                }
            }
        }
        None
    }

    /// Room for a frame that was given back; `None` if the append is gone.
    pub(super) fn room(&self) -> impl Future<Output = Option<OwnedSemaphorePermit>> + 'static {
        let room = Arc::clone(&self.room);
        async move { room.acquire_owned().await.ok() }
    }

    /// Takes a frame for which there is room.
    pub(super) fn feed(&self, frame: Frame, room: OwnedSemaphorePermit) {
        // An append that is gone has no use for it.
        if let Some(frames) = &self.frames {
            drop(frames.try_send(Fed { frame, _room: room }));
        }
    }
}

impl Frames {
    /// The append has its turn.
    pub(super) fn take_turn(&self) {
        self.has_turn.store(true, Ordering::Release);
    }

    /// Completes if the append is refused before its turn, with why.
    pub(super) async fn refused(&mut self) -> Error {
        if let Some(refused) = &mut self.refused {
            let refused = refused.await;
            self.refused = None;
            if let Ok(error) = refused {
                return error;
            }
        }
        pending().await
    }

    /// The next frame; `None` if no more come.
    ///
    /// # Errors
    /// Why it was refused, if that was when its turn came: a frame is missing then.
    pub(super) async fn next(&mut self) -> Result<Option<Frame>, Error> {
        let fed = self.frames.recv().await;
        match self.refused.as_mut().map(oneshot::Receiver::try_recv) {
            Some(Ok(error)) => Err(error),
            _ => Ok(fed.map(|fed| fed.frame)),
        }
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        self.room.close();
    }
}

/// Room that a frame takes.
fn kib(frame: &Frame) -> u32 {
    let bytes = match frame {
        Frame::Chunk(chunk) => chunk.data.len(),
        Frame::Commit(_) | Frame::Broken(_) => 0,
    };
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX).max(1)
}
