//! The service on loopback, against a coordinator that is played by the test.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use attnd_kernel::slot::{PAGE_KEYS, slot_of_page};
use attnd_kernel::{Causal, Dtype, Storage};
use attnd_plan::{AnyTensor, Tensor};
use attnd_wire::hold::{
    HoldAnswer, HoldAsk, HoldReply, HoldRequest, HoldShard, PartialRun, ShardAppend, ShardAt, ShardChange,
    ShardChangeKind, ShardState,
};
use attnd_wire::{Commit, Link, Reason, SliceChunk, limits, proto};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::Streaming;

use super::HoldService;
use crate::shutdown::Calls;
use crate::worker::store::Store;
use crate::worker::store::tests::{MIB, Session, piece, spec, store};

mod copies;
mod works;

const SOON: Duration = Duration::from_secs(10);

/// A coordinator's stream.
struct Stream {
    frames: mpsc::Sender<proto::HoldRequest>,
    replies: Streaming<proto::HoldReply>,
    next: u64,
    term: u64,
    /// Answers that came before somebody asked for them.
    early: BTreeMap<u64, Vec<HoldReply>>,
}

async fn serve(store: &Store) -> (String, Calls) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let calls = Calls::new();
    let service = limits::shards_server(HoldService { store: store.clone(), calls: calls.clone() });
    let router = limits::server_builder(Link::Coordinator).add_service(service);
    let _detached = tokio::task::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
    (url, calls)
}

impl Stream {
    async fn open(url: &str, term: u64) -> Self {
        let endpoint = limits::endpoint(url, Link::Cluster).unwrap();
        let mut stub = limits::shards_client(endpoint.connect().await.unwrap());
        let (frames, stream) = mpsc::channel(8);
        let replies = stub.hold(ReceiverStream::new(stream)).await.unwrap().into_inner();
        Self { frames, replies, next: 1, term, early: BTreeMap::new() }
    }

    async fn send(&mut self, ask: HoldAsk) -> u64 {
        let request = self.next;
        self.next += 1;
        self.send_as(request, ask).await;
        request
    }

    async fn send_as(&mut self, request: u64, ask: HoldAsk) {
        let frame = HoldRequest { request, term: self.term, ask };
        self.frames.send(frame.into()).await.unwrap();
    }

    async fn frame(&mut self) -> Option<HoldReply> {
        let reply = tokio::time::timeout(SOON, self.replies.message()).await.unwrap();
        reply.unwrap().map(|reply| reply.try_into().unwrap())
    }

    /// All replies to a request, in order.
    async fn answer(&mut self, request: u64) -> Vec<HoldReply> {
        loop {
            if self.early.get(&request).is_some_and(|replies| replies.last().is_some_and(|last| !last.more)) {
                return self.early.remove(&request).unwrap();
            }
            let reply = self.frame().await.unwrap();
            self.early.entry(reply.request).or_default().push(reply);
        }
    }

    async fn state(&mut self, request: u64) -> Result<ShardState, String> {
        match self.answer(request).await.remove(0).answer {
            HoldAnswer::State(state) => Ok(state),
            HoldAnswer::Failed(error) => Err(error.message()),
            other => panic!("{other:?}"),
        }
    }

    async fn ask(&mut self, ask: HoldAsk) -> Result<ShardState, String> {
        let request = self.send(ask).await;
        self.state(request).await
    }

    /// The partials of one work, and what it applied.
    async fn results(&mut self, request: u64, work: usize) -> (Option<ShardState>, Vec<PartialRun>, String) {
        let (mut applied, mut runs, mut failed) = (None, Vec::new(), String::new());
        for reply in self.answer(request).await {
            let HoldAnswer::Results(results) = reply.answer else { panic!("{reply:?}") };
            for result in results.into_iter().filter(|result| result.work == work) {
                applied = applied.or(result.applied);
                runs.extend(result.partials);
                failed = result.failure.map_or(failed, |error| error.message());
            }
        }
        (applied, runs, failed)
    }
}

/// A session that the worker doesn't hold yet.
fn unopened(number: u64) -> Session {
    let spec = spec(Dtype::F32, Storage::F32);
    let at = ShardAt { session: number, shard: 0, epoch: 1 };
    let layers = vec![Vec::new(); spec.layers];
    Session { at, spec, pieces: vec![piece(0..2, 0..64)], layers, seq: 0, generation: 0 }
}

fn hold(session: &Session) -> HoldAsk {
    HoldAsk::Hold(HoldShard { at: session.at, spec: session.spec.clone(), pieces: session.pieces.clone() })
}

fn bits(expected: &[f32]) -> Vec<u8> {
    expected.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// What a run has, as it is in a message.
fn data(runs: Vec<PartialRun>) -> Vec<u8> {
    runs.into_iter().flat_map(|run| proto::PartialRun::from(run).data).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_live_on_a_stream_that_stays_open() {
    let store = store(64 * MIB);
    let (url, calls) = serve(&store).await;
    let mut stream = Stream::open(&url, 3).await;
    let mut sessions: Vec<Session> = (1..4).map(unopened).collect();
    for session in &sessions {
        let state = stream.ask(hold(session)).await.unwrap();
        assert_eq!((state.epoch, state.replayed, &state.tokens[..]), (1, false, &[0, 0][..]));
        assert!(stream.ask(hold(session)).await.unwrap().replayed);
    }
    let mut other = hold(&sessions[0]);
    if let HoldAsk::Hold(hold) = &mut other {
        hold.spec.layers = 3;
    }
    assert_eq!(stream.ask(other).await.unwrap_err(), "SESSION_EXISTS: parameters differ");
    // Steps that don't wait for each other, three sessions in each message.
    let mut sent = Vec::new();
    for step in 0..40_u64 {
        let mut expected = Vec::new();
        let mut works = Vec::new();
        for (at, session) in sessions.iter_mut().enumerate() {
            let names: Vec<u64> = (0..=at as u64 * 4).map(|name| name + step * 100).collect();
            let rows = session.rows(0, &names);
            session.layers[0].extend(names);
            let queries = session.queries(1, session.layers[0].len(), Causal::BottomRight);
            expected.push(session.expected(0, &queries));
            works.push(session.shard_work(0, Some(rows), Some(queries)));
        }
        sent.push((stream.send(HoldAsk::Works(works)).await, expected));
    }
    for (request, expected) in sent {
        let replies = stream.answer(request).await;
        assert_eq!(replies.len(), 1, "one message");
        stream.early.insert(request, replies.clone());
        for (work, expected) in expected.iter().enumerate() {
            stream.early.insert(request, replies.clone());
            let (applied, runs, failed) = stream.results(request, work).await;
            assert!(applied.is_some() && failed.is_empty(), "{failed}");
            assert!(data(runs) == bits(expected));
        }
    }
    // Fork, cut, seal, fence, release.
    let session = &mut sessions[0];
    let fork =
        ShardChange { at: session.at, op: session.next_op(), kind: ShardChangeKind::Fork { child: 99 } };
    assert_eq!(stream.ask(HoldAsk::Change(fork)).await.unwrap().op_seq, 41);
    let op = session.next_op();
    let cut = ShardChange { at: session.at, op, kind: ShardChangeKind::Truncate { len: 10 } };
    assert_eq!(stream.ask(HoldAsk::Change(cut)).await.unwrap().tokens, [10, 0]);
    let fence = ShardAt { epoch: 2, ..session.at };
    assert_eq!(stream.ask(HoldAsk::Fence(fence)).await.unwrap().epoch, 2);
    // What is here, and what it remembers, whatever epoch it has.
    let request = stream.send(HoldAsk::List).await;
    let HoldAnswer::Shards(shards) = stream.answer(request).await.remove(0).answer else { panic!("no list") };
    let forked = ShardAt { session: 99, epoch: 1, ..session.at };
    assert_eq!(shards, [fence, sessions[1].at, sessions[2].at, forked]);
    let session = &sessions[0];
    let request = stream.send(HoldAsk::Recall(session.at)).await;
    let HoldAnswer::Records(history) = stream.answer(request).await.remove(0).answer else { panic!("none") };
    assert_eq!((history.state.epoch, history.state.op_seq, history.records.len()), (2, 42, 42));
    let [.., fork, cut] = &history.records[..] else { panic!("{history:?}") };
    assert_eq!((fork.answer.child, fork.answer.len), (Some(99), 40));
    assert_eq!((cut.answer.child, cut.answer.len, cut.answer.generation), (None, 10, 1));
    let unknown = stream.ask(HoldAsk::Recall(ShardAt { session: 98, ..session.at })).await.unwrap_err();
    assert_eq!(unknown, "SHARD: session 0000000000000062 shard 0 is not here");
    let stale = stream.ask(HoldAsk::Release(session.at)).await.unwrap_err();
    assert_eq!(stale, "EPOCH: shard at 2, request 1");
    for session in [ShardAt { session: 99, ..session.at }, fence, sessions[1].at, sessions[2].at] {
        assert!(!stream.ask(HoldAsk::Release(session)).await.unwrap().replayed);
        assert!(stream.ask(HoldAsk::Release(session)).await.unwrap().replayed);
    }
    assert!(store.resident_bytes() <= 2 * MIB);
    let gone = stream.ask(HoldAsk::Fence(fence)).await.unwrap_err();
    assert_eq!(gone, "SHARD: session 0000000000000001 shard 0 is not here");
    // Of another coordinator there is no answer but that it is late.
    let mut newer = Stream::open(&url, 4).await;
    newer.ask(hold(&unopened(5))).await.unwrap();
    let late = stream.ask(HoldAsk::Fence(unopened(5).at)).await.unwrap_err();
    assert_eq!(late, "FENCED: term 3 < 4");
    drop((stream, newer));
    tokio::time::timeout(SOON, calls.idle()).await.unwrap();
    assert_eq!(store.len(), 1, "shards stay");
}

/// An append of so many tokens in chunks of whole heads.
fn bulk(session: &mut Session, tokens: u64) -> (ShardAppend, Vec<SliceChunk>, Commit) {
    let base_len = session.layers[0].len();
    let names: Vec<u64> = (0..tokens).collect();
    let (at, op) = (session.at, session.next_op());
    let append = ShardAppend { at, layer: 0, op, base_len, tokens: names.len(), allow_non_finite: false };
    let mut chunks = Vec::new();
    for (tensor, head) in [(Tensor::K, 0), (Tensor::K, 1), (Tensor::V, 0), (Tensor::V, 1)] {
        let rows: Vec<Vec<u8>> = names.iter().map(|name| session.row(tensor, 0, head, *name)).collect();
        let index = chunks.len() as u32;
        let data = rows.concat().into();
        chunks.push(SliceChunk { index, tensor: AnyTensor::Operand(tensor), head, offset: 0, data });
    }
    let commit = Commit { chunks: 4, bytes: chunks.iter().map(|chunk| chunk.data.len() as u64).sum() };
    assert!(session.pieces[0].slots.contains(&slot_of_page(base_len / PAGE_KEYS)));
    (append, chunks, commit)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appends_in_chunks_are_whole_or_not_there() {
    let store = store(64 * MIB);
    let (url, calls) = serve(&store).await;
    let mut stream = Stream::open(&url, 1).await;
    let mut session = unopened(1);
    stream.ask(hold(&session)).await.unwrap();
    let (append, chunks, commit) = bulk(&mut session, 400);
    // A chunk and a Commit before Begin, and behind an append that was refused.
    let request = stream.send(HoldAsk::Chunk(chunks[0].clone())).await;
    assert_eq!(stream.state(request).await.unwrap_err(), "STREAM_ORDER: expected Begin");
    let elsewhere = ShardAppend { at: ShardAt { session: 8, ..append.at }, ..append };
    let request = stream.send(HoldAsk::Append(elsewhere)).await;
    stream.send_as(request, HoldAsk::Chunk(chunks[0].clone())).await;
    stream.send_as(request, HoldAsk::Commit(commit)).await;
    let refused = stream.state(request).await.unwrap_err();
    assert_eq!(refused, "SHARD: session 0000000000000008 shard 0 is not here");
    // A chunk that is missing; what comes behind has no answer of its own.
    let request = stream.send(HoldAsk::Append(append)).await;
    stream.send_as(request, HoldAsk::Chunk(chunks[0].clone())).await;
    stream.send_as(request, HoldAsk::Chunk(chunks[2].clone())).await;
    stream.send_as(request, HoldAsk::Chunk(chunks[3].clone())).await;
    stream.send_as(request, HoldAsk::Commit(commit)).await;
    assert_eq!(stream.state(request).await.unwrap_err(), "CHUNK_ORDER: expected 1, got 2");
    stream.send_as(request, HoldAsk::Chunk(chunks[3].clone())).await;
    assert_eq!(stream.state(request).await.unwrap_err(), "STREAM_ORDER: frame after Commit");
    // Bytes that aren't those of the checksum.
    let request = stream.send(HoldAsk::Append(append)).await;
    let mut frame: proto::HoldRequest =
        HoldRequest { request, term: 1, ask: HoldAsk::Chunk(chunks[0].clone()) }.into();
    if let Some(proto::hold_request::Ask::Chunk(chunk)) = &mut frame.ask {
        chunk.crc32c ^= 1;
    }
    stream.frames.send(frame).await.unwrap();
    assert_eq!(stream.state(request).await.unwrap_err(), "CHECKSUM: chunk 0, nothing applied");
    // The stream ends without Commit.
    let mut short = Stream::open(&url, 1).await;
    let request = short.send(HoldAsk::Append(append)).await;
    short.send_as(request, HoldAsk::Chunk(chunks[0].clone())).await;
    short.send_as(request, HoldAsk::Chunk(chunks[1].clone())).await;
    let (unused, _) = mpsc::channel(1);
    drop(std::mem::replace(&mut short.frames, unused));
    let truncated = short.state(request).await.unwrap_err();
    let half = commit.bytes * 8 / 13;
    assert_eq!(
        truncated,
        format!("STREAM_TRUNCATED: 2 chunks, {half} of {} bytes, nothing applied", commit.bytes)
    );
    assert!(short.frame().await.is_none());
    // Or is gone.
    let mut lost = Stream::open(&url, 1).await;
    let request = lost.send(HoldAsk::Append(append)).await;
    lost.send_as(request, HoldAsk::Chunk(chunks[0].clone())).await;
    drop(lost);
    let taken = || store.resident_bytes();
    // The whole of it.
    let request = stream.send(HoldAsk::Append(append)).await;
    for chunk in &chunks {
        stream.send_as(request, HoldAsk::Chunk(chunk.clone())).await;
    }
    stream.send_as(request, HoldAsk::Commit(commit)).await;
    let state = stream.state(request).await.unwrap();
    assert_eq!((state.op_seq, state.replayed, &state.tokens[..]), (1, false, &[400, 0][..]));
    session.layers[0].extend(0..400);
    let queries = session.queries(2, 400, Causal::None);
    let expected = session.expected(0, &queries);
    let request = stream.send(HoldAsk::Works(vec![session.shard_work(0, None, Some(queries))])).await;
    let (_, runs, failed) = stream.results(request, 0).await;
    assert!(failed.is_empty() && data(runs) == bits(&expected), "{failed}");
    assert!(taken() <= 2 * MIB);
    let request = stream.send(HoldAsk::Append(append)).await;
    assert!(stream.state(request).await.unwrap().replayed);
    drop(stream);
    tokio::time::timeout(SOON, calls.idle()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_that_make_no_sense_cost_the_others_nothing() {
    let store = store(64 * MIB);
    let (url, calls) = serve(&store).await;
    let mut stream = Stream::open(&url, 1).await;
    let mut session = unopened(1);
    stream.ask(hold(&session)).await.unwrap();
    stream.frames.send(proto::HoldRequest { request: 2, term: 1, ask: None }).await.unwrap();
    stream.next = 3;
    assert_eq!(stream.state(2).await.unwrap_err(), "STREAM_ORDER: empty frame");
    stream.send_as(2, HoldAsk::Fence(session.at)).await;
    assert_eq!(stream.state(2).await.unwrap_err(), "STREAM_ORDER: request 2 after 2");
    let good = session.rows(0, &[1]);
    let mut bad: proto::ShardWork = session.shard_work(0, Some(good.clone()), None).into();
    bad.rows.as_mut().unwrap().crc32c ^= 1;
    let works = proto::ShardWorks { works: vec![bad, session.shard_work(0, Some(good), None).into()] };
    let ask = Some(proto::hold_request::Ask::Works(works));
    stream.frames.send(proto::HoldRequest { request: 3, term: 1, ask }).await.unwrap();
    stream.next = 4;
    let replies = stream.answer(3).await;
    stream.early.insert(3, replies.clone());
    let (_, _, failed) = stream.results(3, 0).await;
    assert!(failed.starts_with("CHECKSUM"), "{failed}");
    stream.early.insert(3, replies);
    assert_eq!(stream.results(3, 1).await.0.unwrap().tokens, [1, 0]);
    session.layers[0].push(1);
    // A work whose memory isn't there now.
    let held = store.reserve(64 * MIB - 100).unwrap();
    let works = HoldAsk::Works(vec![session.shard_work(0, None, Some(session.queries(1, 1, Causal::None)))]);
    let refused = stream.ask(works.clone()).await.unwrap_err();
    assert!(refused.starts_with("OVERLOADED: need ") && refused.ends_with(", free 100"), "{refused}");
    drop(held);
    let request = stream.send(works.clone()).await;
    assert!(stream.results(request, 0).await.2.is_empty());
    let _same: Arc<_> = store.resident((1, 0)).unwrap();
    drop((stream, calls));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_drains_begins_to_hold_nothing_and_serves_what_it_holds() {
    let store = store(64 * MIB);
    let (url, calls) = serve(&store).await;
    let mut stream = Stream::open(&url, 1).await;
    let mut session = unopened(1);
    stream.ask(hold(&session)).await.unwrap();
    calls.drain();
    let refused = stream.ask(hold(&unopened(2))).await.unwrap_err();
    assert_eq!(refused.split(':').next(), Some(Reason::Draining.name()));
    // Rows and queries.
    let rows = session.rows(0, &[1, 2]);
    session.layers[0].extend([1, 2]);
    let queries = session.queries(1, 2, Causal::None);
    let expected = session.expected(0, &queries);
    let works = vec![session.shard_work(0, Some(rows), Some(queries))];
    let request = stream.send(HoldAsk::Works(works)).await;
    let (applied, runs, failed) = stream.results(request, 0).await;
    assert!(applied.is_some() && data(runs) == bits(&expected), "{failed}");
    // An append in chunks, and its end.
    let (append, chunks, commit) = bulk(&mut session, 400);
    let request = stream.send(HoldAsk::Append(append)).await;
    for chunk in &chunks {
        stream.send_as(request, HoldAsk::Chunk(chunk.clone())).await;
    }
    stream.send_as(request, HoldAsk::Commit(commit)).await;
    assert_eq!(stream.state(request).await.unwrap().tokens, [402, 0]);
    let undo = ShardChange { at: session.at, op: append.op, kind: ShardChangeKind::Undo };
    assert_eq!(stream.ask(HoldAsk::Change(undo)).await.unwrap().tokens, [2, 0]);
    session.seq -= 1;
    let cut =
        ShardChange { at: session.at, op: session.next_op(), kind: ShardChangeKind::Truncate { len: 1 } };
    assert_eq!(stream.ask(HoldAsk::Change(cut)).await.unwrap().tokens, [1, 0]);
    let fence = ShardAt { epoch: 2, ..session.at };
    assert_eq!(stream.ask(HoldAsk::Fence(fence)).await.unwrap().epoch, 2);
    assert!(!stream.ask(HoldAsk::Release(fence)).await.unwrap().replayed);
    // All of it counts: the node isn't idle before it is answered.
    drop(stream);
    tokio::time::timeout(SOON, calls.idle()).await.unwrap();
}

#[tokio::test]
async fn an_append_may_wait_for_its_client_as_long_as_its_coordinator_does() {
    let store = store(64 * MIB);
    let (url, _calls) = serve(&store).await;
    let mut stream = Stream::open(&url, 1).await;
    let mut session = unopened(1);
    stream.ask(hold(&session)).await.unwrap();
    let (append, chunks, commit) = bulk(&mut session, 400);
    let request = stream.send(HoldAsk::Append(append)).await;
    stream.send_as(request, HoldAsk::Chunk(chunks[0].clone())).await;
    // What has come since says that the chunk is here.
    let later = ShardAt { session: 9, ..session.at };
    stream.ask(HoldAsk::Fence(later)).await.unwrap_err();
    // All that goes to another shard comes before the rest.
    tokio::time::pause();
    tokio::time::advance(3 * attnd_plan::call::STREAM_IDLE).await;
    tokio::time::resume();
    for chunk in &chunks[1..] {
        stream.send_as(request, HoldAsk::Chunk(chunk.clone())).await;
    }
    stream.send_as(request, HoldAsk::Commit(commit)).await;
    assert_eq!(stream.state(request).await.unwrap().tokens, [400, 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_append_that_is_given_up_is_answered_once_nothing_of_it_is_there() {
    let store = store(64 * MIB);
    let (url, calls) = serve(&store).await;
    let [mut control, mut stream] = [Stream::open(&url, 1).await, Stream::open(&url, 1).await];
    let mut session = unopened(1);
    control.ask(hold(&session)).await.unwrap();
    let (append, chunks, commit) = bulk(&mut session, 400);
    let request = stream.send(HoldAsk::Append(append)).await;
    for chunk in &chunks {
        stream.send_as(request, HoldAsk::Chunk(chunk.clone())).await;
    }
    stream.send_as(request, HoldAsk::GiveUp).await;
    let answer = stream.state(request).await.unwrap_err();
    assert_eq!(answer, "STREAM_TRUNCATED: the append was given up, nothing applied");
    // Behind the answer it may be undone over the other stream, and the same op may come anew.
    let undo = ShardChange { at: session.at, op: append.op, kind: ShardChangeKind::Undo };
    assert_eq!(control.ask(HoldAsk::Change(undo)).await.unwrap().op_seq, 0);
    let request = stream.send(HoldAsk::Append(append)).await;
    for chunk in &chunks {
        stream.send_as(request, HoldAsk::Chunk(chunk.clone())).await;
    }
    stream.send_as(request, HoldAsk::Commit(commit)).await;
    // What has its Commit is answered by that.
    stream.send_as(request, HoldAsk::GiveUp).await;
    assert_eq!(stream.state(request).await.unwrap().tokens, [400, 0]);
    let early = stream.send(HoldAsk::GiveUp).await;
    assert_eq!(stream.state(early).await.unwrap_err(), "STREAM_ORDER: expected Begin");
    drop((stream, control));
    tokio::time::timeout(SOON, calls.idle()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_over_two_mib_come_in_parts() {
    let store = store(64 * MIB);
    let (url, calls) = serve(&store).await;
    let mut stream = Stream::open(&url, 1).await;
    let mut session = unopened(1);
    session.spec.value_dim = 512;
    stream.ask(hold(&session)).await.unwrap();
    let rows = session.rows(0, &[4, 5, 6]);
    session.layers[0].extend([4, 5, 6]);
    let mut queries = session.queries(700, 3, Causal::None);
    queries.tokens_per_cell = 100;
    let expected = session.expected(0, &queries);
    let request = stream.send(HoldAsk::Works(vec![session.shard_work(0, Some(rows), Some(queries))])).await;
    let replies = stream.answer(request).await;
    assert_eq!(replies.iter().map(|reply| reply.more).collect::<Vec<_>>(), [true, true, false]);
    stream.early.insert(request, replies);
    let (applied, runs, failed) = stream.results(request, 0).await;
    assert!(applied.is_some() && failed.is_empty() && data(runs) == bits(&expected));
    drop(stream);
    tokio::time::timeout(SOON, calls.idle()).await.unwrap();
    assert!(store.reserve(64 * MIB).is_ok(), "all memory of answers is back");
}
