//! Reads the frames of one stream, in order: decides what each is about and hands it on, or answers that it makes no sense.
//!
//! Before a frame is handed on, its answer has a place in the queue and its bytes have room, so a stream whose work isn't done yet is
//! not read further.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use attnd_plan::call::STREAM_IDLE;
use attnd_wire::hold::{
    HoldAsk, HoldRequest, HoldShard, ShardAppend, ShardAt, ShardChange, ShardChangeKind, ShardWork,
    check_chunk,
};
use attnd_wire::surroundings::now;
use attnd_wire::{Commit, Error, Reason, SliceChunk, Status, proto, refusal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::Streaming;

use super::answers::{Answer, Asked};
use super::bulk::{Bulk, Owed};
use crate::shutdown::Calls;
use crate::worker::store::Store;
use crate::worker::store::shard::{self, Resident, ShardKey, key_of};
use crate::worker::store::turns::Access;
use crate::worker::store::works::{self, Work};

/// Bytes of rows and queries of one stream that wait or are written, in KiB; a message may be as large.
const ROOM_KIB: u32 = 8 << 10;
/// Appends in chunks that one stream has at once.
const MAX_BULKS: usize = 64;

/// One stream.
#[derive(Debug)]
pub(crate) struct Reader {
    store: Store,
    calls: Calls,
    replies: mpsc::Sender<Answer>,
    room: Arc<Semaphore>,
    /// Nobody waits for answers any more.
    cancelled: Arc<AtomicBool>,
    /// Tells this stream from others.
    stream: u64,
    last_request: u64,
    bulks: BTreeMap<u64, Bulk>,
}

/// The peer has gone.
pub(super) struct Gone;

impl Reader {
    pub(crate) fn new(
        store: Store,
        calls: Calls,
        replies: mpsc::Sender<Answer>,
        cancelled: Arc<AtomicBool>,
    ) -> Self {
        let stream = store.next_stream();
        let room = Arc::new(Semaphore::new(ROOM_KIB as usize));
        Self { store, calls, replies, room, cancelled, stream, last_request: 0, bulks: BTreeMap::new() }
    }

    /// Reads until the stream ends.
    pub(crate) async fn serve(mut self, mut inbound: Streaming<proto::HoldRequest>) {
        loop {
            let frame = match self.next(&mut inbound).await {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(status) => {
                    tracing::debug!(error = %Error::from(status), "a stream of sessions ends");
                    break;
                }
            };
            if self.take(frame).await.is_err() {
                break;
            }
        }
    }

    /// The next frame. Appends that nothing comes of meanwhile are given up.
    async fn next(
        &mut self,
        inbound: &mut Streaming<proto::HoldRequest>,
    ) -> Result<Option<proto::HoldRequest>, Status> {
        loop {
            let open = self.bulks.values().filter(|bulk| bulk.owed.is_open());
            let Some(since) = open.map(|bulk| bulk.last_frame).min() else { return inbound.message().await };
            if let Ok(frame) = tokio::time::timeout_at((since + STREAM_IDLE).into(), inbound.message()).await
            {
                return frame;
            }
            let now = now();
            for bulk in self.bulks.values().filter(|bulk| bulk.owed.is_open()) {
                if now.saturating_duration_since(bulk.last_frame) >= STREAM_IDLE {
                    bulk.fail(&self.store, refusal::stream_idle(STREAM_IDLE));
                }
            }
        }
    }

    /// Takes the next frame.
    ///
    /// # Errors
    /// The peer has gone.
    pub(super) async fn take(&mut self, frame: proto::HoldRequest) -> Result<(), Gone> {
        let asked = HoldRequest::decode(frame);
        let (request, last) = (asked.request, self.last_request);
        let is_part = match &asked.ask {
            Ok(HoldAsk::Chunk(_) | HoldAsk::Commit(_)) => true,
            // What is wrong with a chunk is for its append to hear.
            Err(_) => request <= last,
            Ok(_) => false,
        };
        if !is_part && request <= last {
            let error = Error::new(Reason::StreamOrder, format!("request {request} after {last}"));
            return self.refuse(request, error).await;
        }
        let ask = self.store.see_term(asked.term).and(asked.ask);
        if is_part && (request <= last || self.bulks.contains_key(&request)) {
            return match ask {
                Ok(HoldAsk::Chunk(chunk)) => self.chunk(request, chunk).await,
                Ok(HoldAsk::Commit(commit)) => self.commit(request, commit).await,
                Ok(_) => Ok(()),
                Err(error) => {
                    if let Some(bulk) = self.bulks.get(&request) {
                        bulk.fail(&self.store, error);
                        return Ok(());
                    }
                    self.refuse(request, error).await
                }
            };
        }
        self.last_request = last.max(request);
        match ask {
            Ok(HoldAsk::Works(works)) => self.works(request, works).await,
            Ok(HoldAsk::Append(append)) => self.append(request, append).await,
            Ok(HoldAsk::Hold(hold)) => self.hold(request, hold).await,
            Ok(HoldAsk::Change(change)) => self.change(request, change).await,
            Ok(HoldAsk::Fence(at)) => self.fence(request, at).await,
            Ok(HoldAsk::Release(at)) => self.release(request, at).await,
            Ok(HoldAsk::Chunk(_) | HoldAsk::Commit(_)) => {
                self.refuse(request, refusal::expected_begin()).await
            }
            Err(error) => self.refuse(request, error).await,
        }
    }

    /// A place for the answer to a request that is worked on.
    ///
    /// # Errors
    /// The peer has gone.
    async fn asked(&mut self, request: u64) -> Result<Result<Asked, Error>, Gone> {
        let place = self.replies.clone().reserve_owned().await.map_err(|_closed| Gone)?;
        match self.calls.enter() {
            Some(in_flight) => Ok(Ok(Asked::new(request, place, Some(in_flight)))),
            None => {
                let error = Error::new(Reason::Draining, "");
                Asked::new(request, place, None).state(Err(error.clone()));
                Ok(Err(error))
            }
        }
    }

    async fn refuse(&mut self, request: u64, error: Error) -> Result<(), Gone> {
        let place = self.replies.clone().reserve_owned().await.map_err(|_closed| Gone)?;
        Asked::new(request, place, None).state(Err(error));
        Ok(())
    }

    /// Room for the bytes of a message.
    async fn room(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX).clamp(1, ROOM_KIB);
        Arc::clone(&self.room).acquire_many_owned(kib).await.ok()
    }

    /// Runs `work` on the pool when it is the turn of what it touches, unless nobody waits for it then.
    fn submit(
        &self,
        touches: Vec<(ShardKey, Access)>,
        asked: Asked,
        work: impl FnOnce(Asked) + Send + 'static,
    ) {
        let cancelled = Arc::clone(&self.cancelled);
        let job = move || {
            if !cancelled.load(Ordering::Relaxed) {
                work(asked);
            }
        };
        self.store.submit(touches, Box::new(job));
    }

    async fn works(&mut self, request: u64, works: Vec<Result<ShardWork, Error>>) -> Result<(), Gone> {
        let store = self.store.clone();
        let works: Vec<Result<Work, Error>> =
            works.into_iter().map(|work| work.and_then(|work| Work::new(&store, work))).collect();
        let Ok(asked) = self.asked(request).await? else { return Ok(()) };
        let good = || works.iter().filter_map(|work| work.as_ref().ok());
        let room = self.room(good().map(Work::payload_bytes).sum()).await;
        let need = good().map(|work| work.bytes(store.threads())).fold(0, u64::saturating_add);
        let memory = match store.reserve(need) {
            Ok(memory) => memory,
            Err(error) => {
                asked.state(Err(error));
                return Ok(());
            }
        };
        let mut touches: Vec<(ShardKey, Access)> = good().map(Work::touches).collect();
        // Of one shard the strongest alone.
        touches.sort_unstable_by(|a, b| b.cmp(a));
        touches.dedup_by_key(|(key, _)| *key);
        let cancelled = Arc::clone(&self.cancelled);
        self.submit(touches, asked, move |asked| {
            let _room = room;
            let wanted = || !cancelled.load(Ordering::Relaxed);
            let done = works::run_all(&store, works, wanted);
            asked.works(done, Some(memory));
        });
        Ok(())
    }

    async fn hold(&mut self, request: u64, hold: HoldShard) -> Result<(), Gone> {
        let Ok(asked) = self.asked(request).await? else { return Ok(()) };
        let HoldShard { at, spec, pieces } = hold;
        let taken = Resident::new(&self.store, &at, spec.clone(), pieces.clone())
            .and_then(|resident| self.store.insert(resident));
        let (resident, is_new) = match taken {
            Ok(taken) => taken,
            Err(error) => {
                asked.state(Err(error));
                return Ok(());
            }
        };
        if *resident.spec != spec || resident.pieces != pieces {
            asked.state(Err(Error::new(Reason::SessionExists, "parameters differ")));
            return Ok(());
        }
        let store = self.store.clone();
        self.submit(vec![(resident.key, Access::Reads)], asked, move |asked| {
            asked.state(resident.look().held(&store, at.epoch, !is_new));
        });
        Ok(())
    }

    async fn change(&mut self, request: u64, change: ShardChange) -> Result<(), Gone> {
        let Ok(asked) = self.asked(request).await? else { return Ok(()) };
        let resident = match self.store.resident(key_of(&change.at)) {
            Ok(resident) => resident,
            Err(error) => {
                asked.state(Err(error));
                return Ok(());
            }
        };
        let store = self.store.clone();
        let mut touches = vec![(resident.key, Access::Changes)];
        let child = match change.kind {
            ShardChangeKind::Fork { child } if child != resident.key.0 => Some(child),
            ShardChangeKind::Fork { .. } => {
                asked.state(Err(Error::new(Reason::Fork, "child equals parent")));
                return Ok(());
            }
            _ => None,
        };
        touches.extend(child.map(|child| ((child, resident.key.1), Access::Changes)));
        self.submit(touches, asked, move |asked| {
            asked.state(match child {
                Some(child) => shard::fork(&store, &resident, &change, child),
                None => resident.change().apply(&store, &change),
            });
        });
        Ok(())
    }

    async fn fence(&mut self, request: u64, at: ShardAt) -> Result<(), Gone> {
        let Ok(asked) = self.asked(request).await? else { return Ok(()) };
        let store = self.store.clone();
        self.submit(vec![(key_of(&at), Access::Changes)], asked, move |asked| {
            let resident = store.resident(key_of(&at));
            asked.state(resident.and_then(|resident| resident.change().fence(&store, at.epoch)));
        });
        Ok(())
    }

    async fn release(&mut self, request: u64, at: ShardAt) -> Result<(), Gone> {
        let Ok(asked) = self.asked(request).await? else { return Ok(()) };
        let store = self.store.clone();
        self.submit(vec![(key_of(&at), Access::Changes)], asked, move |asked| {
            asked.state(store.release(&at));
        });
        Ok(())
    }

    async fn append(&mut self, request: u64, append: ShardAppend) -> Result<(), Gone> {
        let Ok(asked) = self.asked(request).await? else { return Ok(()) };
        let id = (self.stream, request);
        let mut bulk = Bulk { id, owed: Owed::new(asked), to: None, last_frame: now(), chunks: 0, bytes: 0 };
        let to = self.store.resident(key_of(&append.at)).and_then(|resident| {
            let _bytes = append.bytes(&resident.spec, &resident.pieces)?;
            Ok(resident)
        });
        self.bulks.retain(|_, bulk| bulk.owed.is_open() || request - bulk.id.1 < MAX_BULKS as u64);
        match to {
            Err(error) => bulk.owed.answer(Err(error)),
            Ok(_) if self.bulks.len() >= MAX_BULKS => {
                let error = Error::new(Reason::Overloaded, format!("{MAX_BULKS} appends on one stream"));
                bulk.owed.answer(Err(error));
            }
            Ok(resident) => {
                bulk.to = Some((Arc::clone(&resident), append));
                let (store, owed) = (self.store.clone(), bulk.owed.clone());
                let begin = move || {
                    if !owed.is_open() {
                        return;
                    }
                    match resident.change().begin_bulk(&store, id, &append) {
                        Ok(None) => {}
                        Ok(Some(replayed)) => owed.answer(Ok(replayed)),
                        Err(error) => owed.answer(Err(error)),
                    }
                };
                self.store.submit(vec![(key_of(&append.at), Access::Changes)], Box::new(begin));
            }
        }
        self.bulks.insert(request, bulk);
        Ok(())
    }

    async fn chunk(&mut self, request: u64, chunk: SliceChunk) -> Result<(), Gone> {
        let Some(bulk) = self.bulks.get_mut(&request) else { return self.after_commit(request).await };
        bulk.last_frame = now();
        bulk.chunks += 1;
        bulk.bytes += chunk.data.len() as u64;
        let Some((resident, append)) = bulk.to.as_ref().filter(|_| bulk.owed.is_open()) else {
            return Ok(());
        };
        if let Err(error) = check_chunk(&chunk, append, &resident.spec, &resident.pieces) {
            bulk.fail(&self.store, error);
            return Ok(());
        }
        let (store, owed, id, resident) =
            (self.store.clone(), bulk.owed.clone(), bulk.id, Arc::clone(resident));
        let touches = vec![(resident.key, Access::Changes)];
        let room = self.room(chunk.data.len()).await;
        let write = move || {
            let _room = room;
            if owed.is_open()
                && let Err(error) = resident.change().chunk(&store, id, &chunk)
            {
                owed.answer(Err(error));
            }
        };
        self.store.submit(touches, Box::new(write));
        Ok(())
    }

    async fn commit(&mut self, request: u64, commit: Commit) -> Result<(), Gone> {
        let Some(bulk) = self.bulks.remove(&request) else { return self.after_commit(request).await };
        let Some((resident, _)) = bulk.to else { return Ok(()) };
        let (store, owed, id) = (self.store.clone(), bulk.owed, bulk.id);
        let touches = vec![(resident.key, Access::Changes)];
        let commit = move || {
            if owed.is_open() {
                owed.answer(resident.change().commit_bulk(&store, id, commit));
            }
        };
        self.store.submit(touches, Box::new(commit));
        Ok(())
    }

    async fn after_commit(&mut self, request: u64) -> Result<(), Gone> {
        self.refuse(request, Error::new(Reason::StreamOrder, "frame after Commit")).await
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        for bulk in self.bulks.values().filter(|bulk| bulk.owed.is_open()) {
            bulk.truncated(&self.store);
        }
    }
}
