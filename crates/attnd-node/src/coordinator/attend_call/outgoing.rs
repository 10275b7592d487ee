//! What goes to one worker: its runs of the client's bytes, cut into messages and counted.

use attnd_plan::{Run, Tensor, WorkerId};
use attnd_wire::{Commit, SliceChunk, limits, proto};
use bytes::Bytes;
use tokio::sync::mpsc;

/// One share's messages.
pub(super) struct Outgoing {
    pub(super) worker: WorkerId,
    /// `None` after the last message.
    pub(super) requests: Option<mpsc::Sender<proto::ComputeRequest>>,
    /// What was put into messages so far.
    pub(super) sent: Commit,
    /// Whether Commit was sent.
    pub(super) committed: bool,
}

impl Outgoing {
    pub(super) fn new(worker: WorkerId, requests: mpsc::Sender<proto::ComputeRequest>) -> Self {
        Self { worker, requests: Some(requests), sent: Commit { chunks: 0, bytes: 0 }, committed: false }
    }

    /// Counts a message with `len` bytes as sent; returns its index.
    pub(super) fn count(&mut self, len: usize) -> u32 {
        let index = self.sent.chunks;
        self.sent.chunks += 1;
        self.sent.bytes += len as u64;
        index
    }

    /// Cuts a run of `data` into messages and counts them as sent. They share the bytes of the client's message.
    pub(super) fn cut(
        &mut self,
        tensor: Tensor,
        run: &Run,
        data: &Bytes,
    ) -> impl Iterator<Item = SliceChunk> {
        run.bytes.clone().step_by(limits::CHUNK_BYTES).map(move |start| {
            let slice = start..run.bytes.end.min(start + limits::CHUNK_BYTES);
            let offset = run.head_offset + (start - run.bytes.start) as u64;
            let index = self.count(slice.len());
            SliceChunk {
                index,
                tensor: tensor.into(),
                head: run.head,
                offset,
                data: data.slice(slice).into(),
            }
        })
    }
}

/// Room for the next message of a share; `None` if its worker takes nothing more. Why, its replies say.
pub(super) async fn room(
    queue: Option<mpsc::Sender<proto::ComputeRequest>>,
) -> Option<mpsc::OwnedPermit<proto::ComputeRequest>> {
    queue?.reserve_owned().await.ok()
}
