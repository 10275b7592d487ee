//! A whole worker on loopback, against a coordinator and a caller that are played by the test.

use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

use attnd_kernel::{
    AttnShape, Causal, Dims, Dtype, Effective, GroupCall, KvHead, Operator, PartialRows, Side, attend_node,
};
use attnd_plan::{Piece, Tensor, filled_nodes};
use attnd_wire::proto::cluster_server::Cluster;
use attnd_wire::{
    CallShape, Commit, ComputeBegin, ComputeReply, ComputeRequest, Error, Heartbeat, JoinReply, JoinRequest,
    Outcome, Partial, Reason, SliceChunk, Status, Welcome, proto,
};
use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Streaming};

use super::*;

/// Time for anything that has to happen.
const SOON: Duration = Duration::from_secs(10);
const BUDGET: u64 = 64 << 20;
const SESSION_MEMORY: u64 = 32 << 20;

/// Of a worker with one thread and no coordinator.
fn config() -> WorkerConfig {
    WorkerConfig {
        coordinator: String::new(),
        advertise: None,
        id: None,
        threads: 1,
        memory_budget: BUDGET,
        host: "h1".into(),
        session_memory: SESSION_MEMORY,
        scrub_interval: Duration::ZERO,
    }
}

type Replies = ReceiverStream<Result<proto::JoinReply, Status>>;

/// A coordinator that welcomes everybody and hands each frame to the test, with the means to end the stream.
struct FakeCluster {
    frames: mpsc::Sender<(JoinRequest, mpsc::Sender<Result<proto::JoinReply, Status>>)>,
}

#[tonic::async_trait]
impl Cluster for FakeCluster {
    type JoinStream = Replies;

    async fn join(
        &self,
        request: Request<Streaming<proto::JoinRequest>>,
    ) -> Result<Response<Replies>, Status> {
        let (replies, stream) = mpsc::channel(4);
        let (frames, mut inbound) = (self.frames.clone(), request.into_inner());
        let _detached = tokio::task::spawn(async move {
            let welcome = JoinReply::Welcome(Welcome { heartbeat: Duration::from_millis(5) });
            replies.send(Ok(welcome.into())).await.ok();
            while let Ok(Some(frame)) = inbound.message().await {
                let Ok(frame) = JoinRequest::try_from(frame) else { return };
                if frames.send((frame, replies.clone())).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

struct Stage {
    frames: mpsc::Receiver<(JoinRequest, mpsc::Sender<Result<proto::JoinReply, Status>>)>,
    worker: JoinHandle<Result<(), NodeError>>,
    stop: Option<oneshot::Sender<()>>,
    address: SocketAddr,
}

impl Stage {
    async fn set() -> Self {
        let (sender, frames) = mpsc::channel(1);
        let cluster = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let coordinator = format!("http://{}", cluster.local_addr().unwrap());
        let service = limits::cluster_server(FakeCluster { frames: sender });
        let router = limits::server_builder(Link::Cluster).add_service(service);
        let _detached = tokio::task::spawn(router.serve_with_incoming(TcpListenerStream::new(cluster)));

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let config = WorkerConfig { coordinator, threads: 2, ..config() };
        let (stop, stopped) = oneshot::channel::<()>();
        let worker = tokio::task::spawn(run(listener, config, async { drop(stopped.await) }));
        Self { frames, worker, stop: Some(stop), address }
    }

    async fn frame(&mut self) -> (JoinRequest, mpsc::Sender<Result<proto::JoinReply, Status>>) {
        tokio::time::timeout(SOON, self.frames.recv()).await.unwrap().unwrap()
    }

    /// The next beat that fits.
    async fn beat(&mut self, fits: impl Fn(&Heartbeat) -> bool) -> Heartbeat {
        loop {
            match self.frame().await.0 {
                JoinRequest::Heartbeat(beat) if fits(&beat) => return beat,
                _ => {}
            }
        }
    }

    async fn idle(&mut self) {
        self.beat(|beat| beat.calls_in_flight == 0 && beat.memory_used_bytes == 0).await;
    }

    /// Opens a Compute stream; frames are sent by the caller.
    async fn open(
        &self,
        timeout: Duration,
    ) -> (mpsc::Sender<proto::ComputeRequest>, JoinHandle<Result<Streaming<proto::ComputeReply>, Error>>)
    {
        let endpoint = limits::endpoint(&format!("http://{}", self.address), Link::Cluster).unwrap();
        let mut stub = limits::worker_client(endpoint.connect().await.unwrap());
        let (frames, stream) = mpsc::channel(1);
        let mut request = Request::new(ReceiverStream::new(stream));
        request.set_timeout(timeout);
        let answer = async move { Ok(stub.compute(request).await.map_err(Error::from)?.into_inner()) };
        (frames, tokio::task::spawn(answer))
    }

    /// Sends frames and reads the answer to its end.
    async fn call(
        &self,
        begin: &ComputeBegin,
        frames: Vec<ComputeRequest>,
    ) -> Result<Vec<ComputeReply>, Error> {
        let (sender, opening) = self.open(SOON).await;
        let sending = tokio::task::spawn(async move {
            for frame in frames {
                if sender.send(frame.into()).await.is_err() {
                    return;
                }
            }
        });
        let call = CallShape::from(begin);
        let mut replies = opening.await.unwrap()?;
        let mut all = Vec::new();
        while let Some(reply) = tokio::time::timeout(SOON, replies.message()).await.unwrap()? {
            all.push(ComputeReply::decode(reply, &call)?);
        }
        sending.await.unwrap();
        Ok(all)
    }
}

/// A call of two kv groups with random operands, as one share over `slots`.
struct Case {
    begin: ComputeBegin,
    q: Vec<Vec<f32>>,
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
}

impl Case {
    fn new(keys: u64, slots: Range<usize>) -> Self {
        let dims = Dims { batch: 1, heads: 4, kv_heads: 2, queries: 7, keys, head_dim: 5, value_dim: 6 };
        let shape = AttnShape::new(dims).unwrap();
        let mut rng = StdRng::seed_from_u64(keys);
        let mut matrices = |heads: usize, len: usize| -> Vec<Vec<f32>> {
            (0..heads).map(|_| (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()).collect()
        };
        let keys = shape.n_keys();
        let (q, k, v) = (matrices(4, 7 * 5), matrices(2, keys * 5), matrices(2, keys * 6));
        let begin = ComputeBegin {
            call_id: 7,
            shape,
            dtype: Dtype::F32,
            operator: Arc::new(Operator::plain(0.5, Causal::BottomRight)),
            outputs: None,
            sides: attnd_plan::Sides::default(),
            allow_non_finite: false,
            pieces: vec![Piece { groups: 0..2, slots }],
            tokens_per_cell: 3,
        };
        Self { begin, q, k, v }
    }

    /// Begin, chunks and Commit.
    fn frames(&self) -> Vec<ComputeRequest> {
        let mut frames = vec![ComputeRequest::Begin(self.begin.clone())];
        let (mut index, mut bytes) = (0, 0);
        for (tensor, heads, row) in
            [(Tensor::Q, &self.q, 5), (Tensor::K, &self.k, 5), (Tensor::V, &self.v, 6)]
        {
            for (head, values) in heads.iter().enumerate() {
                for run in self.runs(tensor, values.len(), row) {
                    let data: Vec<u8> = values[run.clone()].iter().flat_map(|v| v.to_le_bytes()).collect();
                    bytes += data.len() as u64;
                    let offset = run.start as u64 * 4;
                    let data = Bytes::from(data);
                    frames.push(ComputeRequest::Chunk(SliceChunk {
                        index,
                        tensor: tensor.into(),
                        head,
                        offset,
                        data: data.into(),
                    }));
                    index += 1;
                }
            }
        }
        frames.push(ComputeRequest::Commit(Commit { chunks: index, bytes }));
        frames
    }

    fn runs(&self, tensor: Tensor, len: usize, row: usize) -> Vec<Range<usize>> {
        let slots = &self.begin.pieces[0].slots;
        let pages =
            |page: &usize| tensor == Tensor::Q || slots.contains(&attnd_kernel::slot::slot_of_page(*page));
        let page_len = 256 * row;
        (0..len.div_ceil(page_len))
            .filter(pages)
            .map(|p| p * page_len..((p + 1) * page_len).min(len))
            .collect()
    }

    /// The partials that the kernels make of it, by group, first token and node.
    fn expected(&self) -> Vec<Partial> {
        let ComputeBegin { shape, operator, pieces, tokens_per_cell, .. } = &self.begin;
        let kernels = Kernels::from_env().unwrap();
        let bytes = |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
        let mut partials = Vec::new();
        for group in 0..2 {
            let mut kv = KvHead::new(shape.n_keys(), 5, 6, 0..64).unwrap();
            for (page, rows) in self.k[group].chunks(256 * 5).enumerate() {
                kv.write_k(page, &bytes(rows), Dtype::F32, true).unwrap();
            }
            for (page, rows) in self.v[group].chunks(256 * 6).enumerate() {
                kv.write_v(page, &bytes(rows), Dtype::F32, true).unwrap();
            }
            let q = self.q[2 * group..2 * group + 2].concat();
            let call = GroupCall {
                shape: *shape,
                operator,
                group,
                q: &q,
                kv: &kv,
                side: Side::default(),
                compute: Effective::F32,
            };
            for first_token in (0..7).step_by(*tokens_per_cell) {
                let tokens = first_token..(first_token + tokens_per_cell).min(7);
                for (node, keys) in filled_nodes(pieces[0].slots.clone(), shape.n_keys()) {
                    let rows: PartialRows = attend_node(kernels, &call, node, tokens.clone()).0;
                    let tokens = tokens.len();
                    let cell = attnd_plan::CellId { group, node, first_token, tokens, keys };
                    partials.push(Partial { cell, rows });
                }
            }
        }
        partials
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_share_comes_back_as_the_partials_of_its_cells_and_leaves_no_memory() {
    let mut stage = Stage::set().await;
    for (keys, slots) in [(5_000, 0..64), (5_000, 8..44), (3, 0..64), (20_000, 32..64)] {
        let case = Case::new(keys, slots.clone());
        let mut replies = stage.call(&case.begin, case.frames()).await.unwrap();
        let Some(ComputeReply::Finished(finished)) = replies.pop() else { panic!("no Finished") };
        assert_eq!(finished.partials as usize, replies.len());
        let mut partials: Vec<Partial> = replies
            .into_iter()
            .map(|reply| match reply {
                ComputeReply::Partial(partial) => partial,
                ComputeReply::Finished(_) => panic!("Finished twice"),
                unasked => panic!("nobody asked for {unasked:?}"),
            })
            .collect();
        partials.sort_by_key(|p| (p.cell.group, p.cell.first_token, p.cell.node.slots().start));
        assert!(partials == case.expected(), "{keys} keys, slots {slots:?}");
    }
    stage.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_leaves_gets_its_memory_taken_back() {
    let mut stage = Stage::set().await;
    let case = Case::new(5_000, 0..64);
    let (frames, opening) = stage.open(SOON).await;
    for frame in case.frames().into_iter().take(9) {
        frames.send(frame.into()).await.unwrap();
    }
    let replies = opening.await.unwrap().unwrap();
    stage.beat(|beat| beat.memory_used_bytes > 0 && beat.calls_in_flight == 1).await;
    drop((frames, replies));
    stage.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_a_call_whose_bytes_do_not_come() {
    let mut stage = Stage::set().await;
    let (frames, opening) = stage.open(Duration::from_millis(100)).await;
    frames.send(ComputeRequest::Begin(Case::new(300, 0..64).begin).into()).await.unwrap();
    let mut replies = opening.await.unwrap().unwrap();
    let ended = tokio::time::timeout(SOON, replies.message()).await.unwrap();
    assert_eq!(Error::from(ended.unwrap_err()).reason, Reason::Deadline);
    stage.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_streams_are_refused_by_name_and_cost_nothing() {
    let mut stage = Stage::set().await;
    let case = Case::new(300, 0..64);
    let good = case.frames();
    let changed = |change: &dyn Fn(&mut Case)| {
        let mut case = Case::new(300, 0..64);
        change(&mut case);
        case.frames()
    };
    let dims = Dims { batch: 1, heads: 4, kv_heads: 2, queries: 7, keys: 1 << 20, head_dim: 5, value_dim: 6 };
    let huge = ComputeBegin { shape: AttnShape::new(dims).unwrap(), ..case.begin.clone() };
    for (frames, wanted) in [
        (good[1..].to_vec(), "STREAM_ORDER: expected Begin"),
        (good[..3].to_vec(), "STREAM_TRUNCATED: 2 chunks, 280 of 26960 bytes, nothing applied"),
        ([&good[..2], &good[3..]].concat(), "CHUNK_ORDER: expected 1, got 2"),
        (changed(&|case| case.k[1][299 * 5 + 2] = f32::NAN), "NON_FINITE: k[h=1,pos=299,i=2] NaN"),
        (changed(&|case| case.q[3][6 * 5] = f32::INFINITY), "NON_FINITE: q[h=3,pos=6,i=0] +inf"),
        (
            changed(&|case| {
                case.q[3][5..10].fill(1e10);
                case.k[1].fill(1e37);
            }),
            "SCORE_OVERFLOW: head 3 row 1",
        ),
        (vec![ComputeRequest::Begin(huge)], "KV_BUDGET: need 176161712, free 67108864"),
    ] {
        let begin = &case.begin;
        let error = stage.call(begin, frames).await.map(|replies| replies.len()).unwrap_err();
        assert_eq!(error.message(), wanted);
        assert_eq!(error.outcome, Outcome::NotExecuted, "{error}");
        stage.idle().await;
    }
    assert!(stage.call(&case.begin, good).await.is_ok(), "the worker lives");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_allows_non_finite_operands_gets_an_answer() {
    let stage = Stage::set().await;
    let mut case = Case::new(300, 0..64);
    case.begin.allow_non_finite = true;
    case.q[3][5..10].fill(1e10);
    case.k[1].fill(1e37);
    assert!(stage.call(&case.begin, case.frames()).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_worker_finishes_what_it_has_and_takes_nothing_new() {
    let mut stage = Stage::set().await;
    let case = Case::new(5_000, 0..64);
    let (frames, opening) = stage.open(SOON).await;
    let mut all = case.frames().into_iter();
    for frame in all.by_ref().take(5) {
        frames.send(frame.into()).await.unwrap();
    }
    let mut replies = opening.await.unwrap().unwrap();
    // A connection from before the drain: afterwards there are no new ones.
    let endpoint = limits::endpoint(&format!("http://{}", stage.address), Link::Cluster).unwrap();
    let mut late = limits::worker_client(endpoint.connect().await.unwrap());
    stage.stop.take().unwrap().send(()).unwrap();
    stage.beat(|beat| beat.draining).await;

    let refused = late.compute(tokio_stream::once(case.frames()[0].clone().into())).await;
    let refused = refused.map(|_| ()).map_err(Error::from).unwrap_err();
    assert!(refused.is_retryable() || refused.reason == Reason::Transport, "{refused}");

    for frame in all {
        frames.send(frame.into()).await.unwrap();
    }
    let mut last = None;
    while let Some(reply) = tokio::time::timeout(SOON, replies.message()).await.unwrap().unwrap() {
        last = reply.part;
    }
    assert!(matches!(last, Some(proto::compute_reply::Part::Finished(_))));
    drop((replies, frames));
    tokio::time::timeout(SOON, stage.worker).await.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_stream_is_joined_again_and_a_dead_incarnation_never() {
    let mut stage = Stage::set().await;
    let mut lives = Vec::new();
    let ends = [
        Error::new(Reason::Draining, "the coordinator leaves"),
        Error::new(Reason::IncarnationDead, "rejoin"),
    ];
    let mut ends = ends.into_iter();
    loop {
        let (frame, replies) = stage.frame().await;
        let JoinRequest::Hello(hello) = frame else { continue };
        lives.push(hello.incarnation);
        match ends.next() {
            Some(end) => replies.send(Err(end.into())).await.unwrap(),
            None => break,
        }
    }
    assert_eq!(lives[0], lives[1]);
    assert_ne!(lives[1], lives[2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_says_where_it_is_and_what_sessions_may_take() {
    let mut stage = Stage::set().await;
    let JoinRequest::Hello(hello) = stage.frame().await.0 else { panic!("Hello comes first") };
    assert_eq!((hello.host.as_str(), hello.session_memory_bytes), ("h1", SESSION_MEMORY));
    assert_eq!(stage.beat(|_| true).await.session_used_bytes, 0);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nowhere = WorkerConfig { coordinator: "http://127.0.0.1:1".into(), host: "a b".into(), ..config() };
    let error = run(listener, nowhere, async {}).await.unwrap_err();
    assert_eq!((error.exit_code(), error.to_string().contains("\"a b\"")), (2, true), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_refused_for_good_ends_and_says_why() {
    let mut stage = Stage::set().await;
    let (_, replies) = stage.frame().await;
    let refusal = Error::new(Reason::KernelMix, "c9");
    replies.send(Err(refusal.into())).await.unwrap();
    let ended = tokio::time::timeout(SOON, stage.worker).await.unwrap().unwrap();
    assert!(matches!(&ended, Err(NodeError::Refused(why)) if why == "KERNEL_MIX: c9"), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_not_reached_tries_again() {
    let mut stage = Stage::set().await;
    let mut lives = Vec::new();
    while lives.len() < 2 {
        if let (JoinRequest::Hello(hello), replies) = stage.frame().await {
            lives.push(hello.incarnation);
            replies.send(Err(Error::new(Reason::Unreachable, "after 1 ms").into())).await.unwrap();
        }
    }
    assert_eq!(lives[0], lives[1]);
}

#[tokio::test]
async fn a_loopback_address_is_for_a_coordinator_on_this_machine() {
    let start = async |coordinator: &str, advertise: Option<&str>| {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let config = WorkerConfig {
            coordinator: coordinator.into(),
            advertise: advertise.map(Into::into),
            ..config()
        };
        // Asked to stop before it starts, so whoever isn't refused ends well.
        run(listener, config, async {}).await
    };
    for advertise in [None, Some("http://127.0.0.1:1"), Some("http://localhost:1"), Some("http://[::1]:1")] {
        let error = start("http://192.0.2.1:7400", advertise).await.unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(
            error.to_string().contains("say --listen 0.0.0.0:PORT --advertise http://HOST:PORT"),
            "{error}"
        );
    }
    for coordinator in ["http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1", "http://0.0.0.0:1"] {
        start(coordinator, None).await.unwrap();
    }
    start("http://192.0.2.1:7400", Some("http://192.0.2.2:7401")).await.unwrap();
}
