//! An append whose rows come in chunks: each run of bytes goes to the replicas of its shard as it comes, and nothing of it counts before
//! the Commit.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use attnd_plan::call::STREAM_IDLE;
use attnd_plan::omission::{Omission, omits};
use attnd_plan::route::Router;
use attnd_plan::session::{Ask, LedgerError, LedgerEvent, Op, Request, SessionSpec};
use attnd_plan::{AnyTensor, Tensor};
use attnd_wire::checksum::{agrees, joined};
use attnd_wire::hold::{HoldAsk, ShardAppend, ShardOp, ShardState};
use attnd_wire::session::digest::RowsChecksum;
use attnd_wire::session::{Append, AppendChunk, Applied};
use attnd_wire::{Checksummed, Commit, Error, Reason, SliceChunk, limits, refusal};
use futures::future::join_all;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{oneshot, watch};

use super::Sessions;
use super::change::tell;
use super::feed::Frames;
use super::session::{Begun, Session, ShardView, Uploading};
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
    frames: Frames,
}

impl AppendCall {
    /// Looks the session up and takes a place in its line.
    ///
    /// # Errors
    /// [`Reason::Session`] and the like, what is wrong with the shape; [`Reason::Overloaded`] if too many wait.
    pub(super) fn line_up(sessions: &Sessions, append: Append, frames: Frames) -> Result<Self, Error> {
        let session = sessions.find(&append.session)?;
        let bytes = append.bytes(&session.spec)?;
        let _all_at_once = sessions.line_up();
        let place = session.turns.line_up()?;
        Ok(Self { session, append, bytes, place, frames })
    }

    /// Takes all chunks and applies them.
    ///
    /// # Errors
    /// What the ledger or a worker refuses, and what is wrong with the chunks; then nothing is applied. [`Reason::Overloaded`] if too much
    /// came before its turn.
    pub(super) async fn run(self, sessions: &Arc<Sessions>) -> Result<Applied, Error> {
        let Self { session, append, bytes, place, mut frames } = self;
        let turn = tokio::select! {
            biased;
            error = frames.refused() => return Err(error),
            turn = place.turn() => turn,
        };
        frames.take_turn();
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
        let sessions = Arc::clone(sessions);
        let mut begun = Bulk { sessions, session, op, held: Some((turn, answer)) };
        match begun.take(&append, bytes, frames).await? {
            Taken::All(sinks) => begun.commit(sinks).await,
            Taken::Ended(ended) => ended,
        }
    }
}

/// An append that a ledger has begun.
struct Bulk {
    sessions: Arc<Sessions>,
    session: Arc<Session>,
    op: Op,
    /// Who has the turn, and hears how it ends. Nobody, once Commit is on its way: that is somebody else's then.
    held: Option<(Turn, Ended)>,
}

/// What becomes of its chunks.
enum Taken {
    /// They are with these, who wait for the Commit.
    All(Vec<Sink>),
    /// The op ended before that: replicas refused it, or there are too few of them.
    Ended(Result<Applied, Error>),
}

/// How an op ends.
type Ended = oneshot::Receiver<Result<Applied, Error>>;

/// A replica that gets bytes.
struct Sink {
    shard: usize,
    epoch: u64,
    link: Arc<HoldLink>,
    /// Of the upload on its link.
    request: u64,
    answer: Answer,
    /// It had the op when it was asked to begin it.
    has: Option<ShardState>,
    sent: Commit,
}

impl Bulk {
    /// Takes chunks until the Commit, or until the op has ended without it.
    async fn take(&mut self, append: &Append, bytes: (u64, u64), mut frames: Frames) -> Result<Taken, Error> {
        let writer_epoch = append.mutation.writer_epoch;
        let mut writer = self.session.writer.subscribe();
        let mut sinks = self.open_all(append).await?;
        let spec = self.session.spec.clone();
        let base_len = match self.op.change {
            attnd_plan::session::Change::Append { base_len, .. } => base_len,
            _ => 0,
        };
        let tokens = usize::try_from(append.tokens).unwrap_or(usize::MAX);
        let shape = spec.shape(1, tokens)?;
        let pieces = self.session.pieces.iter().map(|pieces| &pieces[..]);
        let router = Router::of_append(pieces, &shape, spec.dtype.size(), base_len);
        let term = self.sessions.term;
        let mut stream =
            Chunks { need: bytes, next: [0, 0], chunks: 0, bytes: 0, sum: RowsChecksum::default() };
        loop {
            // Behind a refusal that counts nothing more is sent: a replica that hears of its end first would refuse the rest of it.
            let goes_on = self.session.lock().ledger.takes_rows(self.op.seq);
            let frame = tokio::select! {
                biased;
                current = fenced(&mut writer, writer_epoch) => {
                    return Err(LedgerError::<Error>::WriterFenced { got: writer_epoch, current }.into());
                }
                ended = ended(&mut self.held) => return Ok(Taken::Ended(self.end(ended))),
                (sink, why) = refusal_of(&mut sinks), if goes_on => {
                    let Sink { shard, epoch, link, .. } = sink;
                    tell(&self.sessions, &self.session, (shard, epoch), &link, &self.op, Err(why));
                    continue;
                }
                frame = tokio::time::timeout(STREAM_IDLE, frames.next()), if goes_on => frame,
            };
            match frame.map_err(|_elapsed| refusal::stream_idle(STREAM_IDLE))?? {
                None if omits(Omission::Commit) => return Ok(Taken::All(sinks)),
                None => {
                    return Err(refusal::stream_truncated(
                        stream.chunks.into(),
                        stream.bytes,
                        bytes.0 + bytes.1,
                    ));
                }
                Some(Frame::Broken(error)) => return Err(error),
                // It changed while this was waited for.
                Some(_) if !self.session.lock().ledger.takes_rows(self.op.seq) => {}
                Some(Frame::Chunk(chunk)) => {
                    let offset = stream.take(&chunk, &spec)?;
                    let mut sum = 0;
                    for run in router.route(chunk.tensor, offset, chunk.data.len()) {
                        let data = chunk.data.slice(run.bytes.clone());
                        sum = joined(sum, data.crc32c(), data.len() as u64);
                        for sink in sinks.iter_mut().filter(|sink| sink.lacks(run.share)) {
                            // A replica that is lost says so in its answer; the others go on.
                            sink.send(term, chunk.tensor, run.head, run.head_offset, &data).await.ok();
                        }
                    }
                    // Of what has changed in memory since it came, the parts have checksums that fit.
                    if !agrees(sum, chunk.data.crc32c()) {
                        return Err(refusal::checksum(chunk.index));
                    }
                }
                Some(Frame::Commit(commit)) => {
                    stream.finish(&commit, append.crc32c)?;
                    return Ok(Taken::All(sinks));
                }
            }
        }
    }

    /// Begins uploads to all replicas of all shards. One that is lost meanwhile gets nothing.
    async fn open_all(&self, append: &Append) -> Result<Vec<Sink>, Error> {
        let view = self.session.view();
        self.session.lock().uploads.clear();
        let mut sinks = Vec::new();
        for (shard, of_shard) in view.shards.iter().enumerate() {
            for link in &of_shard.links {
                match self.open(append, &view, shard, link).await {
                    Ok(sink) => sinks.push(sink),
                    Err(error) if error.reason == Reason::Transport => {
                        self.session.disconnected(&self.sessions, link)
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(sinks)
    }

    /// Sends the Commit. From here the op goes on whoever waits for it: a task hears all answers, and keeps the turn as long, as chunks
    /// take another way than what comes next; who waits hears as soon as enough have it.
    async fn commit(mut self, sinks: Vec<Sink>) -> Result<Applied, Error> {
        let silent = || Err(Error::new(Reason::Internal, "a ledger that says nothing"));
        let Some((turn, ended)) = self.held.take() else { return silent() };
        let (sessions, session, op) = (Arc::clone(&self.sessions), Arc::clone(&self.session), self.op);
        let (done, applied) = oneshot::channel();
        self.sessions.tasks.spawn(async move {
            let term = sessions.term;
            let mut answers: FuturesUnordered<_> = sinks
                .into_iter()
                .map(|Sink { shard, epoch, link, request, answer, has, sent }| async move {
                    if let Some(state) = has {
                        return (shard, epoch, link, Ok(state));
                    }
                    if let Ok(commit) = encode(HoldAsk::Commit(sent)) {
                        // A stream that ended says so in the answer.
                        link.bulk.resume(request, term).send(commit).await.ok();
                    }
                    let answered = answer.parts().await.and_then(state_of);
                    (shard, epoch, link, answered)
                })
                .collect();
            let tell_all = async {
                while let Some((shard, epoch, link, answer)) = answers.next().await {
                    tell(&sessions, &session, (shard, epoch), &link, &op, answer);
                }
            };
            let pass_on = async {
                // Whoever asked may be gone.
                drop(done.send(ended.await));
            };
            futures::future::join(tell_all, pass_on).await;
            session.lock().uploads.clear();
            drop(turn);
        });
        match applied.await {
            Ok(Ok(applied)) => applied,
            _ => silent(),
        }
    }

    /// The op has ended without its Commit. The turn is over once nothing of it is on its way any more.
    fn end(&mut self, ended: Result<Applied, Error>) -> Result<Applied, Error> {
        if let Some((turn, _ended)) = self.held.take() {
            self.sessions.tasks.spawn(end_uploads(
                Arc::clone(&self.sessions),
                Arc::clone(&self.session),
                turn,
            ));
        }
        ended
    }

    async fn open(
        &self,
        append: &Append,
        view: &ShardView,
        shard: usize,
        link: &Arc<HoldLink>,
    ) -> Result<Sink, Error> {
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
        let (request, epoch, link) = (upload.request(), of_shard.at.epoch, Arc::clone(link));
        // Before anything else is awaited: whoever takes the op back has to know.
        self.session.lock().uploads.push(Uploading { shard, link: Arc::clone(&link), request });
        Ok(Sink { shard, epoch, link, request, answer, has: None, sent: Commit { chunks: 0, bytes: 0 } })
    }
}

impl Drop for Bulk {
    /// What will have no Commit is taken back everywhere, before anybody else has the turn.
    fn drop(&mut self) {
        let Some((turn, ended)) = self.held.take() else { return };
        let why = Error::new(Reason::StreamTruncated, "the append was given up, nothing applied");
        let event = LedgerEvent::Abandoned { seq: self.op.seq, why };
        self.session.handle(&self.sessions, event);
        let (sessions, session) = (Arc::clone(&self.sessions), Arc::clone(&self.session));
        self.sessions.tasks.spawn(async move {
            ended.await.ok();
            end_uploads(sessions, session, turn).await;
        });
    }
}

/// Gives up what is still on its way of an append that will have no Commit, also where nothing is undone because a shard has other
/// members by now, or will have: a worker waits for the rest of it otherwise.
async fn end_uploads(sessions: Arc<Sessions>, session: Arc<Session>, turn: Turn) {
    let uploads: Vec<(Arc<HoldLink>, u64)> = {
        let state = session.lock();
        state.uploads.iter().map(|upload| (Arc::clone(&upload.link), upload.request)).collect()
    };
    join_all(uploads.iter().map(|(link, request)| link.bulk.give_up(*request, sessions.term))).await;
    session.lock().uploads.clear();
    drop(turn);
}

/// Completes once the op has ended.
async fn ended(held: &mut Option<(Turn, Ended)>) -> Result<Applied, Error> {
    match held {
        Some((_turn, ended)) => ended
            .await
            .unwrap_or_else(|_gone| Err(Error::new(Reason::Internal, "a ledger that says nothing"))),
        None => std::future::pending().await,
    }
}

/// Completes once one of the replicas has refused its chunks, which gets no more of them.
async fn refusal_of(sinks: &mut Vec<Sink>) -> (Sink, Error) {
    poll_fn(|cx| {
        let refused = sinks.iter_mut().enumerate().find_map(|(at, sink)| {
            if sink.has.is_some() {
                return None;
            }
            match sink.answer.poll_parts(cx) {
                Poll::Pending => None,
                Poll::Ready(answer) => match answer.and_then(state_of) {
                    Ok(state) => {
                        sink.has = Some(state);
                        None
                    }
                    Err(why) => Some((at, why)),
                },
            }
        });
        refused.map_or(Poll::Pending, |(at, why)| Poll::Ready((sinks.swap_remove(at), why)))
    })
    .await
}

/// Completes once somebody else writes, with their epoch.
async fn fenced(writer: &mut watch::Receiver<u64>, epoch: u64) -> u64 {
    let current = writer.wait_for(|current| *current > epoch).await.map(|current| *current);
    match current {
        Ok(current) => current,
        // The session is held as long as this runs.
        Err(_gone) => std::future::pending().await,
    }
}

impl Sink {
    /// Whether it needs the rows of a shard.
    fn lacks(&self, shard: usize) -> bool {
        self.shard == shard && self.has.is_none()
    }

    async fn send(
        &mut self,
        term: u64,
        tensor: Tensor,
        head: usize,
        offset: u64,
        data: &Checksummed,
    ) -> Result<(), Error> {
        let upload: Upload<'_> = self.link.bulk.resume(self.request, term);
        let mut at = 0;
        while at < data.len() {
            let end = data.len().min(at + limits::CHUNK_BYTES);
            let (index, data) = (self.sent.chunks, data.slice(at..end));
            self.sent = Commit { chunks: index + 1, bytes: self.sent.bytes + data.len() as u64 };
            let tensor = AnyTensor::Operand(tensor);
            let chunk = SliceChunk { index, tensor, head, offset: offset + at as u64, data };
            upload.send(encode(HoldAsk::Chunk(chunk))?).await?;
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
        self.sum.add(chunk.tensor, offset, len, chunk.data.crc32c());
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
