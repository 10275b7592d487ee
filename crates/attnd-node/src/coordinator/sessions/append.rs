//! An append whose rows come in chunks: each run of bytes goes to the replicas of its shard as it comes, and nothing of it counts before
//! the Commit.

use std::sync::Arc;

use attnd_plan::call::STREAM_IDLE;
use attnd_plan::omission::{Omission, omits};
use attnd_plan::route::Router;
use attnd_plan::session::{Ask, LedgerEvent, Op, Request, SessionSpec};
use attnd_plan::{AnyTensor, Tensor};
use attnd_wire::hold::{HoldAsk, ShardAppend, ShardOp};
use attnd_wire::session::digest::RowsChecksum;
use attnd_wire::session::{Append, AppendChunk, Applied};
use attnd_wire::{Commit, Error, Reason, SliceChunk, limits, refusal};
use futures::future::join_all;
use tokio::sync::{mpsc, oneshot};

use super::Sessions;
use super::change::tell;
use super::session::{Begun, Session, ShardView};
use super::turns::{Place, Turn};
use super::upkeep::{encode, state_of};
use crate::coordinator::hold_link::{Answer, HoldLink, Upload};

/// What comes of an append after its beginning.
#[derive(Debug)]
pub(super) enum Frame {
    /// Bytes.
    Chunk(AppendChunk),
    /// All of them were sent.
    Commit(Commit),
    /// Something that makes no sense.
    Broken(Error),
}

/// An append that has its place.
pub(super) struct AppendCall {
    session: Arc<Session>,
    append: Append,
    bytes: (u64, u64),
    place: Place,
    frames: mpsc::Receiver<Frame>,
}

impl AppendCall {
    /// Looks the session up and takes a place in its line.
    ///
    /// # Errors
    /// [`Reason::Session`] and the like, what is wrong with the shape; [`Reason::Overloaded`] if too many wait.
    pub(super) fn line_up(
        sessions: &Sessions,
        append: Append,
        frames: mpsc::Receiver<Frame>,
    ) -> Result<Self, Error> {
        let session = sessions.find(&append.session)?;
        let bytes = append.bytes(&session.spec)?;
        let _all_at_once = sessions.line_up();
        let place = session.turns.line_up()?;
        Ok(Self { session, append, bytes, place, frames })
    }

    /// Takes all chunks and applies them.
    ///
    /// # Errors
    /// What the ledger or a worker refuses, and what is wrong with the chunks; then nothing is applied.
    pub(super) async fn run(self, sessions: &Arc<Sessions>) -> Result<Applied, Error> {
        let Self { session, append, bytes, place, frames } = self;
        let turn = place.turn().await;
        let size = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let (layer, tokens) = (append.layer, size(append.tokens));
        let ask = Ask::Append { layer, base_len: append.base_len.map(size), tokens };
        let digest = ask.digest(append.crc32c);
        let request =
            Request { writer_epoch: append.mutation.writer_epoch, seq: append.mutation.op_seq, digest, ask };
        let (op, answer) = match session.begin(&request, |_len| Ok(()))? {
            Begun::Replayed(applied) => return Ok(applied),
            Begun::Started(op, answer) => (op, answer),
        };
        let mut begun =
            Bulk { sessions: Arc::clone(sessions), session, op, turn: Some(turn), is_sent: false };
        begun.take(&append, bytes, frames).await?;
        answer.await.unwrap_or_else(|_gone| Err(Error::new(Reason::Internal, "a ledger that says nothing")))
    }
}

/// An append that a ledger has begun.
struct Bulk {
    sessions: Arc<Sessions>,
    session: Arc<Session>,
    op: Op,
    turn: Option<Turn>,
    /// Commit is on its way, and somebody hears the answers.
    is_sent: bool,
}

/// A replica that gets bytes.
struct Sink<'a> {
    shard: usize,
    epoch: u64,
    link: Arc<HoldLink>,
    upload: Upload<'a>,
    answer: Answer,
    sent: Commit,
}

impl Bulk {
    /// Takes chunks until the Commit, and hands what comes then to a task.
    async fn take(
        &mut self,
        append: &Append,
        bytes: (u64, u64),
        mut frames: mpsc::Receiver<Frame>,
    ) -> Result<(), Error> {
        let view = self.session.view();
        let links: Vec<(usize, Arc<HoldLink>)> = view
            .shards
            .iter()
            .enumerate()
            .flat_map(|(shard, of_shard)| of_shard.links.iter().map(move |link| (shard, Arc::clone(link))))
            .collect();
        let spec = self.session.spec.clone();
        let mut sinks = Vec::with_capacity(links.len());
        for (shard, link) in &links {
            sinks.push(self.open(append, &view, *shard, link).await?);
        }
        let base_len = match self.op.change {
            attnd_plan::session::Change::Append { base_len, .. } => base_len,
            _ => 0,
        };
        let tokens = usize::try_from(append.tokens).unwrap_or(usize::MAX);
        let shape = spec.shape(1, tokens)?;
        let pieces = self.session.pieces.iter().map(|pieces| &pieces[..]);
        let router = Router::of_append(pieces, &shape, spec.dtype.size(), base_len);
        let mut stream =
            Chunks { need: bytes, next: [0, 0], chunks: 0, bytes: 0, sum: RowsChecksum::default() };
        loop {
            let frame = tokio::time::timeout(STREAM_IDLE, frames.recv()).await;
            let frame = frame.map_err(|_elapsed| refusal::stream_idle(STREAM_IDLE))?;
            match frame {
                None if omits(Omission::Commit) => break,
                None => {
                    return Err(refusal::stream_truncated(
                        stream.chunks.into(),
                        stream.bytes,
                        bytes.0 + bytes.1,
                    ));
                }
                Some(Frame::Broken(error)) => return Err(error),
                Some(Frame::Chunk(chunk)) => {
                    let offset = stream.take(&chunk, &spec)?;
                    for run in router.route(chunk.tensor, offset, chunk.data.len()) {
                        for sink in sinks.iter_mut().filter(|sink| sink.shard == run.share) {
                            let data = chunk.data.slice(run.bytes.clone());
                            // A replica that is lost says so in its answer; the others go on.
                            sink.send(chunk.tensor, run.head, run.head_offset, data).await.ok();
                        }
                    }
                }
                Some(Frame::Commit(commit)) => {
                    stream.finish(&commit, append.crc32c)?;
                    break;
                }
            }
        }
        // From here it is applied whoever waits for it.
        self.is_sent = true;
        let committed = sinks.into_iter().map(|sink| {
            let (request, sent) = (sink.upload.request(), sink.sent);
            (sink.shard, sink.epoch, sink.link, sink.answer, request, sent)
        });
        let committed: Vec<_> = committed.collect();
        let (sessions, session, op, turn) =
            (Arc::clone(&self.sessions), Arc::clone(&self.session), self.op, self.turn.take());
        let (done, all) = oneshot::channel::<()>();
        self.sessions.tasks.spawn(async move {
            let term = sessions.term;
            let answers =
                committed.into_iter().map(|(shard, epoch, link, answer, request, sent)| async move {
                    if let Ok(commit) = encode(HoldAsk::Commit(sent)) {
                        // A stream that ended says so in the answer.
                        link.bulk.resume(request, term).send(commit).await.ok();
                    }
                    let answered = answer.parts().await.and_then(state_of);
                    (shard, epoch, link, answered)
                });
            for (shard, epoch, link, answer) in join_all(answers).await {
                tell(&sessions, &session, (shard, epoch), &link, &op, answer);
            }
            drop((turn, done));
        });
        all.await.ok();
        Ok(())
    }

    async fn open<'a>(
        &self,
        append: &Append,
        view: &ShardView,
        shard: usize,
        link: &'a Arc<HoldLink>,
    ) -> Result<Sink<'a>, Error> {
        let Some(of_shard) = view.shards.get(shard) else {
            return Err(Error::new(Reason::Internal, "a shard that isn't there"));
        };
        let attnd_plan::session::Change::Append { layer, base_len, tokens } = self.op.change else {
            return Err(Error::new(Reason::Internal, "an append that is none"));
        };
        let op = ShardOp { op_seq: self.op.seq, digest: self.op.digest, generation: view.generation };
        let begin = ShardAppend {
            at: of_shard.at,
            layer,
            op,
            base_len,
            tokens,
            allow_non_finite: append.allow_non_finite,
        };
        let (upload, answer) = link.bulk.begin(self.sessions.term, encode(HoldAsk::Append(begin))?).await?;
        let sent = Commit { chunks: 0, bytes: 0 };
        Ok(Sink { shard, epoch: of_shard.at.epoch, link: Arc::clone(link), upload, answer, sent })
    }
}

impl Drop for Bulk {
    /// What will have no Commit is taken back everywhere.
    fn drop(&mut self) {
        if self.is_sent {
            return;
        }
        let why = Error::new(Reason::StreamTruncated, "the append was given up, nothing applied");
        let event = LedgerEvent::Abandoned { seq: self.op.seq, why };
        self.session.handle(&self.sessions, event);
    }
}

impl Sink<'_> {
    async fn send(
        &mut self,
        tensor: Tensor,
        head: usize,
        offset: u64,
        data: bytes::Bytes,
    ) -> Result<(), Error> {
        let mut at = 0;
        while at < data.len() {
            let end = data.len().min(at + limits::CHUNK_BYTES);
            let (index, slice) = (self.sent.chunks, data.slice(at..end));
            self.sent = Commit { chunks: index + 1, bytes: self.sent.bytes + slice.len() as u64 };
            let tensor = AnyTensor::Operand(tensor);
            let chunk = SliceChunk { index, tensor, head, offset: offset + at as u64, data: slice };
            self.upload.send(encode(HoldAsk::Chunk(chunk))?).await?;
            at = end;
        }
        Ok(())
    }
}

/// What has come of K and V.
struct Chunks {
    need: (u64, u64),
    /// Where the next chunk of K, and of V, begins unless it says so.
    next: [u64; 2],
    chunks: u32,
    bytes: u64,
    sum: RowsChecksum,
}

impl Chunks {
    /// Checks that a chunk is the next one, and inside of its tensor; returns where it begins.
    fn take(&mut self, chunk: &AppendChunk, spec: &SessionSpec) -> Result<u64, Error> {
        if chunk.index != self.chunks {
            return Err(Error::new(
                Reason::ChunkOrder,
                format!("expected {}, got {}", self.chunks, chunk.index),
            ));
        }
        let (need, next) = match chunk.tensor {
            Tensor::V => (self.need.1, self.next.get_mut(1)),
            Tensor::Q | Tensor::K => (self.need.0, self.next.get_mut(0)),
        };
        let Some(next) = next else { return Err(Error::new(Reason::Internal, "no such tensor")) };
        let (offset, len) = (chunk.offset.unwrap_or(*next), chunk.data.len() as u64);
        let element = spec.dtype.size() as u64;
        let end = offset.checked_add(len).filter(|end| *end <= need);
        let (true, Some(end)) = (offset.is_multiple_of(element) && len.is_multiple_of(element), end) else {
            let detail = format!("{}: {len} bytes at {offset} of {need}", chunk.tensor);
            return Err(Error::new(Reason::PayloadLength, detail));
        };
        *next = end;
        self.chunks += 1;
        self.bytes += len;
        self.sum.add(chunk.tensor, offset, len, chunk.crc32c);
        Ok(offset)
    }

    /// Checks that all of it came. That no byte came twice is for workers to see, who take each row once.
    fn finish(&self, commit: &Commit, crc32c: u32) -> Result<(), Error> {
        let need = self.need.0 + self.need.1;
        if self.bytes != need || commit.bytes != need || commit.chunks != self.chunks {
            let detail = format!("declared {need}, got {} in {} chunks", self.bytes, self.chunks);
            return Err(Error::new(Reason::PayloadLength, detail));
        }
        if self.sum.finish() != crc32c {
            return Err(Error::new(Reason::Checksum, "k and v, nothing applied"));
        }
        Ok(())
    }
}
