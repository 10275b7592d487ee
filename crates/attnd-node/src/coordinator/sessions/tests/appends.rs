//! Appends in chunks: those that are given up, those that wait for their turns, and those whose writer is none any more.

use attnd_plan::Tensor;
use attnd_wire::session::{
    Answer, Append, AppendChunk, Ask, Open, RowShape, SessionReply, SessionRequest, digest,
};
use attnd_wire::{Commit, Deadline};
use tonic::Streaming;

use super::super::append::{AppendCall, Frame};
use super::super::exchange::SessionsService;
use super::super::feed;
use super::*;

/// Of a session, its frames but for the beginning: K and V in so many chunks each, and a Commit.
pub(super) fn frames(
    session: &Session,
    seq: u64,
    tokens: usize,
    cuts: usize,
) -> (Append, Vec<AppendChunk>, Commit) {
    let rows = rows(&session.spec, seq, tokens);
    let append = Append {
        session: session.name.clone(),
        mutation: rows.mutation,
        layer: 0,
        tokens: tokens as u64,
        base_len: None,
        allow_non_finite: false,
        shape: RowShape::default(),
        crc32c: digest::of_rows(&rows.k, &rows.v),
    };
    let mut chunks: Vec<AppendChunk> = Vec::new();
    for (tensor, bytes) in [(Tensor::K, &rows.k), (Tensor::V, &rows.v)] {
        let size = (bytes.len() / 4).div_ceil(cuts) * 4;
        for from in (0..bytes.len()).step_by(size) {
            let data = bytes.slice(from..bytes.len().min(from + size));
            chunks.push(AppendChunk::new(chunks.len() as u32, tensor, from as u64, data));
        }
    }
    let bytes = chunks.iter().map(|chunk| chunk.data.len() as u64).sum();
    let commit = Commit { chunks: chunks.len() as u32, bytes };
    (append, chunks, commit)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_given_up_is_undone_behind_its_chunks() {
    let cluster = Cluster::start(2).await;
    let session = cluster.open("s", 2, &[(cluster.all(), &[0, 1])]).await;
    let slow = &cluster.nodes[0];
    slow.asks[BULK].send_replace(Gate::Shut);
    let (append, chunks, _) = frames(&session, 1, 300, 2);
    let (mut feeder, incoming) = feed::feed(&feed::ahead());
    let call = AppendCall::line_up(&cluster.sessions, append, incoming).unwrap();
    let sessions = Arc::clone(&cluster.sessions);
    let running = tokio::spawn(async move { call.run(&sessions).await });
    assert!(feeder.offer(Frame::Chunk(chunks[0].clone())).is_none());
    // The client goes.
    drop(feeder);
    let truncated = running.await.unwrap().unwrap_err();
    assert_eq!((truncated.reason, truncated.outcome), (Reason::StreamTruncated, Outcome::NotExecuted));
    let undone = |node: &Node| node.arrived(CONTROL).iter().any(|sent| matches!(sent, Sent::Change(_)));
    until("the other one undoes it", || undone(&cluster.nodes[1])).await;
    // The next one waits until it is undone everywhere.
    let mut next = Box::pin(cluster.run(vec![step(&session, 1, 2)]));
    assert!(tokio::time::timeout(A_WHILE, &mut next).await.is_err());
    assert!(!undone(slow), "before its chunks are out of the way");
    slow.asks[BULK].send_replace(Gate::Open);
    assert_eq!(applied(&next.await), (2, false));
    let bulk = slow.arrived(BULK);
    assert!(matches!(&bulk[..], [Sent::Append(_), .., Sent::GiveUp(_)]), "{bulk:?}");
    assert!(undone(slow) && session.lock().uploads.is_empty());
    assert_eq!((slow.state_of(&session, 0), session.lock().ledger.epoch(0)), ((1, vec![2]), 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_append_is_answered_when_enough_have_it_and_keeps_the_turn_for_the_others() {
    let cluster = Cluster::start(2).await;
    let session = cluster.open("s", 1, &[(cluster.all(), &[0, 1])]).await;
    let slow = &cluster.nodes[1];
    let (append, chunks, commit) = frames(&session, 1, 300, 1);
    let (mut feeder, incoming) = feed::feed(&feed::ahead());
    slow.answers[BULK].send_replace(false);
    let call = AppendCall::line_up(&cluster.sessions, append, incoming).unwrap();
    for chunk in chunks {
        assert!(feeder.offer(Frame::Chunk(chunk)).is_none());
    }
    assert!(feeder.offer(Frame::Commit(commit)).is_none());
    let done = tokio::time::timeout(SOON, call.run(&cluster.sessions)).await.unwrap().unwrap();
    assert_eq!(done.len, 300);
    let mut next = Box::pin(cluster.run(vec![step(&session, 2, 2)]));
    assert!(tokio::time::timeout(A_WHILE, &mut next).await.is_err(), "its rows take another way");
    slow.answers[BULK].send_replace(true);
    assert_eq!(applied(&next.await), (302, false));
    until("it has both", || slow.state_of(&session, 0) == (2, vec![302])).await;
    assert_eq!(session.lock().ledger.members(0).count(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_append_that_is_refused_is_answered_before_its_commit() {
    let cluster = Cluster::start(2).await;
    let session = cluster.open("s", 2, &[(cluster.all(), &[0, 1])]).await;
    let mut client = Client::connect(&cluster).await;
    let (append, chunks, commit) = frames(&session, 1, 300, 2);
    client.send(1, Ask::Append(append)).await;
    let nan: Vec<u8> = f32::NAN.to_le_bytes().repeat(chunks[0].data.len() / 4);
    client.send(1, Ask::Chunk(AppendChunk::new(0, Tensor::K, 0, nan))).await;
    let Answer::Failed(refused) = client.answer(1).await else { panic!("these are no numbers") };
    assert_eq!((refused.reason, refused.outcome), (Reason::NonFinite, Outcome::NotExecuted));
    assert!(session.lock().uploads.is_empty() && session.lock().ledger.members(0).count() == 2);
    // What was on its way is nobody's.
    client.send(1, Ask::Chunk(chunks[1].clone())).await;
    client.send(1, Ask::Commit(commit)).await;
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 4)]).await), (4, false));
}

/// The rows of one shard are refused, and the chunks of the others are on their way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_of_one_shard_costs_the_others_nothing() {
    let cluster = Cluster::start(3).await;
    let [low, high] = [0..1, 1..2].map(|groups| piece(groups, 0..64));
    let session = cluster.open("s", 1, &[(low, &[0, 1]), (high, &[1, 2])]).await;
    for seq in 1..=20 {
        let mut client = Client::connect(&cluster).await;
        let (mut append, mut chunks, commit) = frames(&session, seq, 300, 60);
        append.mutation.op_seq = 1;
        let nan: Vec<u8> = f32::NAN.to_le_bytes().repeat(chunks[0].data.len() / 4);
        chunks[0] = AppendChunk::new(0, Tensor::K, 0, nan);
        client.send(1, Ask::Append(append)).await;
        for chunk in chunks {
            client.send(1, Ask::Chunk(chunk)).await;
        }
        client.send(1, Ask::Commit(commit)).await;
        let Answer::Failed(refused) = client.answer(1).await else { panic!("these are no numbers") };
        assert!(matches!(refused.reason, Reason::NonFinite | Reason::Checksum), "{refused}");
        assert_eq!(refused.outcome, Outcome::NotExecuted);
        for shard in 0..2 {
            let state = session.lock();
            let ledger = &state.ledger;
            assert_eq!((ledger.members(shard).count(), ledger.epoch(shard)), (2, 1), "append {seq}");
        }
    }
    let done = cluster.run(vec![step(&session, 1, 4)]).await;
    assert_eq!(applied(&done), (4, false));
}

/// A replica is lost while rows come, so that the op is told of before it is taken back everywhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_an_append_that_ends_early_nothing_stays_at_workers() {
    let mut cluster = Cluster::start(2).await;
    let [low, high] = [0..1, 1..2].map(|groups| piece(groups, 0..64));
    let session = cluster.open("s", 2, &[(low, &[0, 1]), (high, &[0, 1])]).await;
    let mut client = Client::connect(&cluster).await;
    begin_append(&client, &session).await;
    let begun =
        |node: &Node| node.arrived(BULK).iter().filter(|sent| matches!(sent, Sent::Append(_))).count();
    until("both shards have begun", || begun(&cluster.nodes[0]) == 2).await;
    cluster.nodes[1].cut();
    cluster.misses(1);
    let Answer::Failed(short) = client.answer(1).await else { panic!("there are too few replicas") };
    assert_eq!(short.reason, Reason::UnderReplicated, "{short}");
    let node = &cluster.nodes[0];
    let over = || node.arrived(BULK).iter().filter(|sent| matches!(sent, Sent::GiveUp(_))).count();
    until("both are given up", || over() >= 2 && node.calls.in_flight() == 0).await;
    // The worker is through with them before the coordinator has its answers.
    until("the coordinator has heard so", || session.lock().uploads.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_behind_a_commit_ends_the_stream() {
    let cluster = Cluster::start(1).await;
    for (name, waits) in [("s", false), ("t", true)] {
        let session = cluster.open(name, 1, &[(cluster.all(), &[0])]).await;
        let mut client = Client::connect(&cluster).await;
        let (append, chunks, commit) = frames(&session, 1, 300, 1);
        client.send(1, Ask::Append(append)).await;
        for chunk in &chunks {
            client.send(1, Ask::Chunk(chunk.clone())).await;
        }
        client.send(1, Ask::Commit(commit)).await;
        if waits {
            assert!(matches!(client.answer(1).await, Answer::Applied(_)));
        }
        client.send(1, Ask::Chunk(chunks[0].clone())).await;
        let ended = loop {
            match client.replies.message().await {
                Ok(Some(_applied)) => {}
                ended => break Error::from(ended.unwrap_err()),
            }
        };
        assert_eq!(ended.message(), "STREAM_ORDER: frame after Commit");
        // Whole or not at all, as with any stream that ends.
        until("it has its end", || session.lock().ledger.in_flight().is_none()).await;
        let len = session.lock().ledger.tokens()[0];
        assert!(len == 300 || (len == 0 && !waits), "{len}");
    }
}

/// A client's stream.
pub(super) struct Client {
    frames: mpsc::Sender<proto::SessionRequest>,
    replies: Streaming<proto::SessionReply>,
    early: BTreeMap<u64, Answer>,
}

impl Client {
    pub(super) async fn connect(cluster: &Cluster) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let service = SessionsService::new(Arc::clone(&cluster.sessions), Calls::new(), Tasks::default());
        let router = limits::server_builder(Link::Client).add_service(limits::sessions_server(service));
        tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
        let endpoint = limits::endpoint(&url, Link::Client).unwrap();
        let mut stub = limits::sessions_client(endpoint.connect().await.unwrap());
        let (frames, stream) = mpsc::channel(1);
        let replies = stub.exchange(ReceiverStream::new(stream)).await.unwrap().into_inner();
        Self { frames, replies, early: BTreeMap::new() }
    }

    pub(super) async fn send(&self, request: u64, ask: Ask) {
        let frame = SessionRequest { request, timeout: Duration::from_secs(20), ask };
        tokio::time::timeout(SOON, self.frames.send(frame.into())).await.expect("it is read").unwrap();
    }

    pub(super) async fn answer(&mut self, request: u64) -> Answer {
        loop {
            if let Some(answer) = self.early.remove(&request) {
                return answer;
            }
            let reply = tokio::time::timeout(SOON, self.replies.message()).await.expect("an answer").unwrap();
            let SessionReply { request, answer, .. } = reply.unwrap().try_into().unwrap();
            self.early.insert(request, answer);
        }
    }

    async fn describe(&mut self, request: u64, session: &Session) -> Answer {
        self.send(request, Ask::Describe(session.name.clone())).await;
        self.answer(request).await
    }
}

/// Sends the beginning of an append, as request 1, and waits until its ledger has begun it.
pub(super) async fn begin_append(client: &Client, session: &Session) {
    let (append, chunks, _) = frames(session, 1, 300, 2);
    client.send(1, Ask::Append(append)).await;
    client.send(1, Ask::Chunk(chunks[0].clone())).await;
    until("it has begun", || session.lock().ledger.in_flight().is_some()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_append_without_its_turn_holds_no_other_request_up() {
    let cluster = Cluster::start(1).await;
    let session = cluster.open("s", 1, &[(cluster.all(), &[0])]).await;
    let mut client = Client::connect(&cluster).await;
    // Somebody has the turn.
    let turn = session.turns.line_up().unwrap().turn().await;
    let tokens = 120_000;
    let (append, chunks, commit) = frames(&session, 1, tokens, 12);
    let bytes: usize = chunks.iter().map(|chunk| chunk.data.len()).sum();
    assert!(bytes > feed::AHEAD_BYTES && bytes - chunks[23].data.len() * 4 < 2 * feed::AHEAD_BYTES);
    client.send(1, Ask::Append(append.clone())).await;
    for chunk in &chunks[..8] {
        client.send(1, Ask::Chunk(chunk.clone())).await;
    }
    assert!(matches!(client.describe(2, &session).await, Answer::Description(_)));
    for chunk in &chunks[8..] {
        client.send(1, Ask::Chunk(chunk.clone())).await;
    }
    let Answer::Failed(refused) = client.answer(1).await else { panic!("more than there is room for") };
    assert_eq!(refused.message(), "OVERLOADED: 8388608 bytes of appends wait for their turns");
    assert_eq!(refused.outcome, Outcome::NotExecuted);
    assert!(refused.pushback().is_some());
    client.send(1, Ask::Commit(commit)).await;
    assert!(matches!(client.describe(3, &session).await, Answer::Description(_)));
    // With the turn it may be as long as it likes.
    drop(turn);
    client.send(4, Ask::Append(append)).await;
    for chunk in chunks {
        client.send(4, Ask::Chunk(chunk)).await;
    }
    client.send(4, Ask::Commit(commit)).await;
    let Answer::Applied(done) = client.answer(4).await else { panic!("it fits") };
    assert_eq!(done.len, tokens as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appends_whose_chunks_come_in_another_order_than_their_turns_are_both_applied() {
    let cluster = Cluster::start(1).await;
    let session = cluster.open("s", 1, &[(cluster.all(), &[0])]).await;
    let mut client = Client::connect(&cluster).await;
    let (first, first_chunks, first_commit) = frames(&session, 1, 300, 3);
    let (second, second_chunks, second_commit) = frames(&session, 2, 200, 3);
    client.send(1, Ask::Append(first)).await;
    client.send(2, Ask::Append(second)).await;
    for chunk in second_chunks {
        client.send(2, Ask::Chunk(chunk)).await;
    }
    client.send(2, Ask::Commit(second_commit)).await;
    for chunk in first_chunks {
        client.send(1, Ask::Chunk(chunk)).await;
    }
    client.send(1, Ask::Commit(first_commit)).await;
    for (request, len) in [(1, 300), (2, 500)] {
        let Answer::Applied(done) = client.answer(request).await else { panic!("{request}") };
        assert_eq!(done.len, len);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_writes_anew_finds_nothing_of_before_under_way() {
    let cluster = Cluster::start(2).await;
    let session = cluster.open("s", 2, &[(cluster.all(), &[0, 1])]).await;
    let mut client = Client::connect(&cluster).await;
    begin_append(&client, &session).await;
    let open = Open { name: Some(session.name.clone()), spec: None, write: true };
    client.send(2, Ask::Open(open)).await;
    let Answer::Description(description) = client.answer(2).await else { panic!("it is there") };
    assert_eq!((description.writer_epoch, description.next_op_seq), (2, 1));
    assert!(session.lock().ledger.in_flight().is_none());
    let Answer::Failed(fenced) = client.answer(1).await else { panic!("it wasn't committed") };
    assert_eq!(fenced.message(), "WRITER_FENCED: writer_epoch 1 < 2");
    let mut next = step(&session, 1, 4);
    next.rows.as_mut().unwrap().mutation.writer_epoch = 2;
    assert_eq!(applied(&cluster.run(vec![next]).await), (4, false));
}

#[tokio::test]
async fn a_request_is_in_flight_until_its_answer_is_on_its_way() {
    let cluster = Cluster::start(0).await;
    let (calls, (replies, mut queue)) = (Calls::new(), mpsc::channel(1));
    let mut answers = super::super::exchange::answer_with(
        Arc::clone(&cluster.sessions),
        replies,
        Deadline::after(std::time::Instant::now(), SOON),
        calls.enter(),
        vec![Answer::Names(Vec::new()), Answer::Names(Vec::new()), Answer::Names(Vec::new())],
    );
    assert!(futures::poll!(&mut answers).is_pending());
    queue.recv().await.unwrap();
    assert!(futures::poll!(&mut answers).is_pending());
    assert_eq!(calls.in_flight(), 1);
    queue.recv().await.unwrap();
    assert_eq!(answers.await, Ok(1));
    assert_eq!(calls.in_flight(), 0);
}
