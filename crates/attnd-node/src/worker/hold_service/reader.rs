//! Reads the frames of one stream, in order: decides what each is about and hands it on, or answers that it makes no sense.
//!
//! Before a frame is handed on, its answer has a place in the queue and its bytes have room, so a stream whose work isn't done yet is
//! not read further.
//!
//! How long an append may take is not for this side to say: its client may be slow, and send all of what goes elsewhere first. The
//! coordinator watches the client, and gives the append up.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use attnd_wire::hold::{
    HoldAsk, HoldRequest, HoldShard, ShardAppend, ShardAt, ShardChange, ShardChangeKind, ShardWork,
    check_chunk,
};
use attnd_wire::{Commit, Error, Reason, SliceChunk, proto, refusal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::Streaming;

use super::answers::{Answer, Asked};
use super::bulk::{Bulk, Owed};
use super::copies::Copies;
use super::works::{AllPending, Pending, Waits};
use crate::shutdown::Calls;
use crate::worker::store::Store;
use crate::worker::store::shard::{self, Resident, ShardKey, key_of};
use crate::worker::store::turns::Access;
use crate::worker::store::works::Work;

/// Bytes of rows and queries of one stream that wait or are written, in KiB; a message may be as large.
const ROOM_KIB: u32 = 8 << 10;
/// Works of a message that take so long run on the thread that read it, where the pool has one thread: to wake that one and to be woken
/// by it takes 0.1 ms and more.
const SHORT: Duration = Duration::from_millis(1);
/// The same where the pool has several threads, which share what is longer.
const SHORT_OF_MANY: Duration = Duration::from_micros(100);
/// Appends in chunks that one stream has at once.
const MAX_BULKS: usize = 64;

/// One stream.
#[derive(Debug)]
pub(crate) struct Reader {
    store: Store,
    calls: Calls,
    replies: mpsc::Sender<Answer>,
    room: Arc<Semaphore>,
    works: Arc<AllPending>,
    /// Tells this stream from others.
    stream: u64,
    /// What was heard last.
    term: Arc<AtomicU64>,
    last_request: u64,
    bulks: BTreeMap<u64, Bulk>,
    copies: Copies,
}

/// The peer has gone.
pub(super) struct Gone;

impl Reader {
    pub(crate) fn new(
        store: Store,
        calls: Calls,
        replies: mpsc::Sender<Answer>,
        works: Arc<AllPending>,
        term: Arc<AtomicU64>,
    ) -> Self {
        let stream = store.next_stream();
        let room = Arc::new(Semaphore::new(ROOM_KIB as usize));
        let (last_request, bulks, copies) = (0, BTreeMap::new(), Copies::default());
        Self { store, calls, replies, room, works, stream, term, last_request, bulks, copies }
    }

    /// Reads until the stream ends.
    pub(crate) async fn serve(mut self, mut inbound: Streaming<proto::HoldRequest>) {
        loop {
            let frame = match inbound.message().await {
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

    /// Takes the next frame.
    ///
    /// # Errors
    /// The peer has gone.
    pub(super) async fn take(&mut self, frame: proto::HoldRequest) -> Result<(), Gone> {
        let asked = HoldRequest::decode(frame);
        let (request, last) = (asked.request, self.last_request);
        let is_part = match &asked.ask {
            Ok(
                HoldAsk::Chunk(_)
                | HoldAsk::Commit(_)
                | HoldAsk::GiveUp
                | HoldAsk::Copied(_)
                | HoldAsk::Sum(_),
            ) => true,
            // What is wrong with a chunk is for its append to hear.
            Err(_) => request <= last,
            Ok(_) => false,
        };
        if !is_part && request <= last {
            let error = Error::new(Reason::StreamOrder, format!("request {request} after {last}"));
            return self.refuse(request, error).await;
        }
        let seen = self.store.see_term(asked.term);
        if seen.is_ok() {
            self.term.store(asked.term, Ordering::Relaxed);
        }
        let ask = seen.and(asked.ask);
        if is_part && self.copies.has_import(request) {
            match ask {
                Ok(HoldAsk::Copied(chunk)) => {
                    let room = self.room(chunk.data.len()).await;
                    self.copies.take(&self.store, request, chunk, room);
                }
                Ok(HoldAsk::Sum(sum)) => self.copies.finish(&self.store, request, sum),
                Ok(HoldAsk::GiveUp) => self.copies.give_up(&self.store, request),
                Ok(_) => self.copies.fail(
                    &self.store,
                    request,
                    Error::new(Reason::StreamOrder, "a frame of no copy"),
                ),
                Err(error) => self.copies.fail(&self.store, request, error),
            }
            return Ok(());
        }
        if is_part && (request <= last || self.bulks.contains_key(&request)) {
            return match ask {
                Ok(HoldAsk::Chunk(chunk)) => self.chunk(request, chunk).await,
                Ok(HoldAsk::Commit(commit)) => self.commit(request, commit).await,
                Ok(HoldAsk::GiveUp) => {
                    self.give_up(request);
                    Ok(())
                }
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
            Ok(HoldAsk::Recall(at)) => self.recall(request, at).await,
            Ok(HoldAsk::List) => self.list(request).await,
            Ok(HoldAsk::Look(at)) => self.look(request, at).await,
            Ok(HoldAsk::Export(export)) => {
                let Ok(asked) = self.asked(request, false).await? else { return Ok(()) };
                self.copies.export(&self.store, request, asked, export);
                Ok(())
            }
            Ok(HoldAsk::Read(read)) => {
                let Ok(asked) = self.asked(request, false).await? else { return Ok(()) };
                self.copies.read(&self.store, asked, read);
                Ok(())
            }
            Ok(HoldAsk::End(export)) => {
                let Ok(asked) = self.asked(request, false).await? else { return Ok(()) };
                self.copies.end(asked, export);
                Ok(())
            }
            Ok(HoldAsk::Import(import)) => {
                let Ok(asked) = self.asked(request, true).await? else { return Ok(()) };
                self.copies.import(&self.store, request, asked, *import);
                Ok(())
            }
            Ok(
                HoldAsk::Chunk(_)
                | HoldAsk::Commit(_)
                | HoldAsk::GiveUp
                | HoldAsk::Copied(_)
                | HoldAsk::Sum(_),
            ) => self.refuse(request, refusal::expected_begin()).await,
            Err(error) => self.refuse(request, error).await,
        }
    }

    /// A place for the answer to a request that is worked on. A node that drains begins to hold nothing, but what it holds may be needed
    /// until it is gone.
    ///
    /// # Errors
    /// The peer has gone.
    async fn asked(&mut self, request: u64, is_new: bool) -> Result<Result<Asked, Error>, Gone> {
        let place = self.replies.clone().reserve_owned().await.map_err(|_closed| Gone)?;
        match if is_new { self.calls.enter() } else { self.calls.enter_until_cut() } {
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
        let stream = Arc::clone(&self.works);
        let job = move || {
            if !stream.is_gone() {
                work(asked);
            }
        };
        self.store.submit(touches, Box::new(job));
    }

    async fn works(&mut self, request: u64, works: Vec<Result<ShardWork, Error>>) -> Result<(), Gone> {
        let store = self.store.clone();
        let works: Vec<Result<Work, Error>> =
            works.into_iter().map(|work| work.and_then(|work| Work::new(&store, work))).collect();
        let Ok(asked) = self.asked(request, false).await? else { return Ok(()) };
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
        let is_short = good().map(Work::time).sum::<Duration>()
            <= if store.threads() == 1 { SHORT } else { SHORT_OF_MANY };
        let pending = Pending::new(&self.works, request, Waits { works, asked, memory, room });
        let job = Box::new(move || pending.run(&store));
        if is_short {
            self.store.submit_short(touches, job);
        } else {
            self.store.submit(touches, job);
        }
        Ok(())
    }

    async fn hold(&mut self, request: u64, hold: HoldShard) -> Result<(), Gone> {
        let Ok(asked) = self.asked(request, true).await? else { return Ok(()) };
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
        let Ok(asked) = self.asked(request, false).await? else { return Ok(()) };
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
        let Ok(asked) = self.asked(request, false).await? else { return Ok(()) };
        let store = self.store.clone();
        self.submit(vec![(key_of(&at), Access::Changes)], asked, move |asked| {
            let resident = store.resident(key_of(&at));
            asked.state(resident.and_then(|resident| resident.change().fence(&store, at.epoch)));
        });
        Ok(())
    }

    async fn look(&mut self, request: u64, at: ShardAt) -> Result<(), Gone> {
        let Ok(asked) = self.asked(request, false).await? else { return Ok(()) };
        let store = self.store.clone();
        self.submit(vec![(key_of(&at), Access::Reads)], asked, move |asked| {
            let resident = store.resident(key_of(&at));
            asked.state(resident.map(|resident| resident.look().state(&store, false)));
        });
        Ok(())
    }

    async fn release(&mut self, request: u64, at: ShardAt) -> Result<(), Gone> {
        let Ok(asked) = self.asked(request, false).await? else { return Ok(()) };
        let store = self.store.clone();
        self.submit(vec![(key_of(&at), Access::Changes)], asked, move |asked| {
            asked.state(store.release(&at));
        });
        Ok(())
    }

    async fn recall(&mut self, request: u64, at: ShardAt) -> Result<(), Gone> {
        let Ok(asked) = self.asked(request, false).await? else { return Ok(()) };
        let store = self.store.clone();
        self.submit(vec![(key_of(&at), Access::Reads)], asked, move |asked| {
            let resident = store.resident(key_of(&at));
            asked.records(resident.and_then(|resident| resident.look().records(&store)));
        });
        Ok(())
    }

    /// Shards that are being let go may be among them: whoever asks doesn't know them either.
    async fn list(&mut self, request: u64) -> Result<(), Gone> {
        if let Ok(asked) = self.asked(request, false).await? {
            asked.shards(&self.store.list());
        }
        Ok(())
    }

    async fn append(&mut self, request: u64, append: ShardAppend) -> Result<(), Gone> {
        let Ok(asked) = self.asked(request, false).await? else { return Ok(()) };
        let id = (self.stream, request);
        let mut bulk = Bulk { id, owed: Owed::new(asked), to: None, chunks: 0, bytes: 0 };
        let to = self.store.resident(key_of(&append.at)).and_then(|resident| {
            let _bytes = append.bytes(&resident.spec, &resident.pieces)?;
            Ok(resident)
        });
        self.bulks.retain(|_, bulk| bulk.owed.is_open() || request - bulk.id.1 < MAX_BULKS as u64);
        match to {
            Err(error) => bulk.owed.answer(Err(error)),
            Ok(_) if self.bulks.values().filter(|bulk| bulk.owed.is_open()).count() >= MAX_BULKS => {
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

    /// Nothing more comes of an append, which is answered once nothing of it is here any more; or nobody wants the partials of works.
    fn give_up(&mut self, request: u64) {
        // An append that has its Commit is answered by that.
        let Some(bulk) = self.bulks.get_mut(&request) else { return self.works.give_up(request) };
        // It stays, for what was on its way behind this: that is nobody's, and no answer to it may overtake this one's.
        let Some((resident, _)) = bulk.to.take().filter(|_| bulk.owed.is_open()) else { return };
        let (id, owed, touches) = (bulk.id, bulk.owed.clone(), vec![(resident.key, Access::Changes)]);
        let give_up = move || {
            resident.change().abandon_bulk(id);
            owed.answer(Err(Error::new(Reason::StreamTruncated, "the append was given up, nothing applied")));
        };
        self.store.submit(touches, Box::new(give_up));
    }

    async fn after_commit(&mut self, request: u64) -> Result<(), Gone> {
        self.refuse(request, refusal::frame_after_commit()).await
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        for bulk in self.bulks.values().filter(|bulk| bulk.owed.is_open()) {
            bulk.truncated(&self.store);
        }
    }
}
