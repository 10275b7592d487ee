//! A cluster of one process: the coordinator and each worker on a runtime of its own, so that a worker can be killed
//! with all its sockets.
// Clippy sees tests here only inside of test functions.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use attnd_kernel::{AttnShape, Causal, Dtype, Operator, OperatorParts, Score, Selection};
use attnd_node::NodeError;
use attnd_node::coordinator::{self, CoordinatorConfig};
use attnd_node::worker::{self, WorkerConfig};
use attnd_plan::{Element, SideLayout, SideTensor, Sides, Tensor, WorkerChoice};
use attnd_wire::deadline::{TIMEOUT_HEADER, header_value};
use attnd_wire::proto::worker_server::Worker;
use attnd_wire::{
    AttendReply, AttendRequest, Begin, ClusterStatus, Commit, Done, Error, Heartbeat, Hello, JoinReply,
    JoinRequest, Link, PlanSummary, TensorChunk, limits, proto,
};
use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

/// How long anything that should happen soon may take.
const SOON: Duration = Duration::from_secs(5);

/// A role that runs.
struct Node {
    runtime: Option<Runtime>,
    stop: Option<oneshot::Sender<()>>,
    ended: oneshot::Receiver<Result<(), NodeError>>,
}

impl Node {
    fn ask_to_stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            stop.send(()).unwrap();
        }
    }
}

impl Drop for Node {
    /// A runtime may not wait for its tasks where others run.
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

pub(crate) struct Cluster {
    url: String,
    channel: Channel,
    coordinator: Node,
    workers: Vec<Option<Node>>,
}

/// A worker that joined, never beats, and accepts connections without a word.
pub(crate) struct MuteWorker {
    pub(crate) hello: Hello,
    _requests: mpsc::Sender<proto::JoinRequest>,
    _replies: Streaming<proto::JoinReply>,
    _deaf: TcpListener,
}

/// A worker that joined and beats, takes the calls, and then neither reads nor answers. It lives as long as its tasks.
pub(crate) struct IdleWorker(#[allow(dead_code)] tokio::task::JoinSet<()>);

/// Bytes of tensors by their number, and whether all of them are here.
#[derive(Clone, Debug, Default)]
pub(crate) struct Received {
    pub(crate) bytes: BTreeMap<i32, u64>,
    pub(crate) messages: BTreeMap<i32, u64>,
    pub(crate) is_whole: bool,
}

/// A worker that joined and beats, counts what it gets, and never answers.
pub(crate) struct CountingWorker {
    pub(crate) id: String,
    received: Arc<Mutex<Received>>,
    _tasks: tokio::task::JoinSet<()>,
}

impl CountingWorker {
    pub(crate) fn received(&self) -> Received {
        self.received.lock().unwrap().clone()
    }

    /// Counts the next call anew.
    pub(crate) fn forget(&self) {
        *self.received.lock().unwrap() = Received::default();
    }
}

struct CountingService(Arc<Mutex<Received>>);

#[tonic::async_trait]
impl Worker for CountingService {
    type ComputeStream = BoxStream<'static, Result<proto::ComputeReply, Status>>;

    async fn compute(
        &self,
        request: Request<Streaming<proto::ComputeRequest>>,
    ) -> Result<Response<Self::ComputeStream>, Status> {
        use proto::compute_request::Part;
        let (received, mut requests) = (Arc::clone(&self.0), request.into_inner());
        let counting = futures::stream::once(async move {
            while let Ok(Some(frame)) = requests.message().await {
                let mut received = received.lock().unwrap();
                match frame.part {
                    Some(Part::Chunk(chunk)) => {
                        *received.bytes.entry(chunk.tensor).or_default() += chunk.data.len() as u64;
                        *received.messages.entry(chunk.tensor).or_default() += 1;
                    }
                    Some(Part::Commit(_)) => received.is_whole = true,
                    Some(Part::Begin(_) | Part::Sums(_)) | None => {}
                }
            }
            std::future::pending().await
        });
        Ok(Response::new(counting.boxed()))
    }
}

struct IdleService;

#[tonic::async_trait]
impl Worker for IdleService {
    type ComputeStream = BoxStream<'static, Result<proto::ComputeReply, Status>>;

    async fn compute(
        &self,
        request: Request<Streaming<proto::ComputeRequest>>,
    ) -> Result<Response<Self::ComputeStream>, Status> {
        let unread = request.into_inner();
        let silence = futures::stream::once(async move {
            let _unread = unread;
            std::future::pending().await
        });
        Ok(Response::new(silence.boxed()))
    }
}

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    (listener, url)
}

fn start<F>(
    run: impl FnOnce(TcpListener, oneshot::Receiver<()>) -> F + Send + 'static,
    listener: TcpListener,
) -> Node
where
    F: Future<Output = Result<(), NodeError>> + Send,
{
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (stop, stopped) = oneshot::channel();
    let (end, ended) = oneshot::channel();
    // The socket belongs to the runtime that it is served on.
    let listener = listener.into_std().unwrap();
    runtime.spawn(async move {
        let listener = TcpListener::from_std(listener).unwrap();
        end.send(run(listener, stopped).await).ok();
    });
    Node { runtime: Some(runtime), stop: Some(stop), ended }
}

impl Cluster {
    pub(crate) async fn start(config: CoordinatorConfig, n_workers: usize) -> Self {
        let (listener, url) = listen().await;
        let coordinator = start(
            |listener, stopped| coordinator::run(listener, config, async { stopped.await.unwrap_or(()) }),
            listener,
        );
        let channel = limits::endpoint(&url, Link::Client).unwrap().connect().await.unwrap();
        let mut cluster = Self { url, channel, coordinator, workers: Vec::new() };
        for _ in 0..n_workers {
            cluster.start_worker().await;
        }
        cluster.wait_for_workers(n_workers).await;
        cluster
    }

    /// Starts one more worker; it joins soon.
    pub(crate) async fn start_worker(&mut self) {
        let (listener, _) = listen().await;
        let config = WorkerConfig {
            coordinator: self.url.clone(),
            advertise: None,
            id: Some(format!("w{}", self.workers.len()).parse().unwrap()),
            threads: 1,
            memory_budget: 1 << 30,
            host: format!("h{}", self.workers.len()),
            session_memory: 1 << 30,
            scrub_interval: worker::SCRUB_INTERVAL,
        };
        let node = start(
            |listener, stopped| worker::run(listener, config, async { stopped.await.unwrap_or(()) }),
            listener,
        );
        self.workers.push(Some(node));
    }

    /// Ends everything in good order.
    pub(crate) async fn stop(mut self) {
        for node in self.workers.iter_mut().filter_map(Option::as_mut).chain([&mut self.coordinator]) {
            node.ask_to_stop();
            tokio::time::timeout(SOON, &mut node.ended).await.unwrap().unwrap().unwrap();
        }
    }

    /// Asks the coordinator to stop, and waits until it takes no more connections.
    pub(crate) async fn drain(&mut self) {
        self.coordinator.ask_to_stop();
        let address = self.url.trim_start_matches("http://");
        eventually("no new connections", || async { TcpStream::connect(address).await.is_err() }).await;
    }

    /// How the coordinator ends, which must be soon.
    pub(crate) async fn end_of_coordinator(&mut self) -> Result<(), NodeError> {
        tokio::time::timeout(SOON, &mut self.coordinator.ended).await.unwrap().unwrap()
    }

    /// Ends a worker like a power cut: all its tasks and sockets at once.
    pub(crate) fn kill_worker(&mut self, n: usize) {
        drop(self.workers[n].take());
    }

    pub(crate) async fn status(&self) -> ClusterStatus {
        let mut client = limits::attention_client(self.channel.clone());
        client.status(proto::StatusRequest {}).await.unwrap().into_inner().try_into().unwrap()
    }

    pub(crate) async fn wait_for_workers(&self, n: usize) {
        eventually("the right number of workers", || async { self.status().await.workers.len() == n }).await;
    }

    /// Sends the frames that come through `requests`.
    pub(crate) async fn open(
        &self,
        requests: mpsc::Receiver<proto::AttendRequest>,
        timeout: Option<Duration>,
    ) -> Result<Streaming<proto::AttendReply>, Error> {
        let mut request = Request::new(ReceiverStream::new(requests));
        if let Some(timeout) = timeout {
            let value = header_value(timeout).to_str().unwrap().parse().unwrap();
            request.metadata_mut().insert(TIMEOUT_HEADER, value);
        }
        let replies = limits::attention_client(self.channel.clone()).attend(request).await?;
        Ok(replies.into_inner())
    }

    /// Sends a whole call.
    pub(crate) async fn attend(
        &self,
        requests: Vec<AttendRequest>,
        timeout: Option<Duration>,
    ) -> Result<Streaming<proto::AttendReply>, Error> {
        let (sender, receiver) = mpsc::channel(requests.len().max(1));
        for request in requests {
            sender.try_send(request.into()).unwrap();
        }
        drop(sender);
        self.open(receiver, timeout).await
    }

    /// Sends Begin alone, and keeps the stream open.
    pub(crate) async fn begin_attend(
        &self,
        begin: Begin,
    ) -> (mpsc::Sender<proto::AttendRequest>, Streaming<proto::AttendReply>) {
        let (sender, receiver) = mpsc::channel(4);
        sender.send(AttendRequest::Begin(begin).into()).await.unwrap();
        (sender, self.open(receiver, None).await.unwrap())
    }

    async fn join(&self, requests: mpsc::Receiver<proto::JoinRequest>) -> Streaming<proto::JoinReply> {
        let mut client = limits::cluster_client(self.channel.clone());
        client.join(ReceiverStream::new(requests)).await.unwrap().into_inner()
    }

    pub(crate) async fn join_mute_worker(&self) -> MuteWorker {
        let (deaf, address) = listen().await;
        let (hello, requests, replies) = self.join_as("mute", address).await;
        MuteWorker { hello, _requests: requests, _replies: replies, _deaf: deaf }
    }

    pub(crate) async fn join_idle_worker(&self) -> IdleWorker {
        IdleWorker(self.join_serving("idle", IdleService).await)
    }

    pub(crate) async fn join_counting_worker(&self, id: &str) -> CountingWorker {
        let received = Arc::default();
        let tasks = self.join_serving(id, CountingService(Arc::clone(&received))).await;
        CountingWorker { id: id.to_owned(), received, _tasks: tasks }
    }

    async fn join_serving(&self, id: &str, service: impl Worker) -> tokio::task::JoinSet<()> {
        let (listener, address) = listen().await;
        let (_, requests, replies) = self.join_as(id, address).await;
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async move {
            let router = limits::server_builder(Link::Cluster).add_service(limits::worker_server(service));
            router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        });
        tasks.spawn(async move {
            let _replies = replies;
            let beat = || JoinRequest::Heartbeat(Heartbeat::default());
            while requests.send(beat().into()).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        });
        tasks
    }

    async fn join_as(
        &self,
        id: &str,
        address: String,
    ) -> (Hello, mpsc::Sender<proto::JoinRequest>, Streaming<proto::JoinReply>) {
        let hello = Hello {
            worker: id.parse().unwrap(),
            incarnation: 7,
            address,
            wire_version: *attnd_wire::join::WIRE_VERSIONS.end(),
            kernel_id: attnd_kernel::KERNEL_ID.into(),
            isa: "portable".into(),
            threads: 1,
            gflops: 100.0,
            memory_budget_bytes: 1 << 30,
            version: "test".into(),
            host: id.into(),
            session_memory_bytes: 1 << 30,
        };
        let (sender, receiver) = mpsc::channel(4);
        sender.send(JoinRequest::Hello(hello.clone()).into()).await.unwrap();
        let mut replies = self.join(receiver).await;
        let welcome = JoinReply::try_from(replies.message().await.unwrap().unwrap()).unwrap();
        let JoinReply::Welcome(welcome) = welcome;
        assert_eq!(welcome.heartbeat, Duration::from_millis(200));
        (hello, sender, replies)
    }

    /// A cluster's client of its own, with a connection of its own.
    pub(crate) async fn another_client(&self) -> Channel {
        limits::endpoint(&self.url, Link::Client).unwrap().connect().await.unwrap()
    }

    /// Sends a whole call from another client.
    pub(crate) async fn attend_from(
        &self,
        client: Channel,
        requests: Vec<AttendRequest>,
    ) -> Streaming<proto::AttendReply> {
        let requests = tokio_stream::iter(requests.into_iter().map(proto::AttendRequest::from));
        limits::attention_client(client).attend(requests).await.unwrap().into_inner()
    }

    /// The error that a join stream with these frames ends with.
    pub(crate) async fn refusal_of_join(&self, frames: Vec<JoinRequest>) -> Error {
        let (sender, receiver) = mpsc::channel(frames.len().max(1));
        for frame in frames {
            sender.try_send(frame.into()).unwrap();
        }
        drop(sender);
        let mut replies = self.join(receiver).await;
        loop {
            match replies.message().await {
                Ok(Some(_welcome)) => {}
                Ok(None) => panic!("the stream ended well"),
                Err(status) => return status.into(),
            }
        }
    }
}

/// Waits until `holds`, for [`SOON`] at most.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, holds: impl Fn() -> F) {
    let begun = Instant::now();
    while !holds().await {
        assert!(begun.elapsed() < SOON, "not within {SOON:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) fn begin(shape: &AttnShape) -> Begin {
    Begin {
        shape: *shape,
        dtype: Dtype::F32,
        operator: Arc::new(Operator::plain(Score::default().function().default_scale(shape), Causal::None)),
        outputs: None,
        sides: Sides::default(),
        allow_non_finite: false,
        forbid_empty_rows: false,
        workers: WorkerChoice::Auto,
    }
}

#[derive(Clone)]
pub(crate) struct Operands {
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
}

impl Operands {
    pub(crate) fn random(shape: &AttnShape, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut values = |n: u64| (0..n).map(|_| rng.random_range(-2.0..2.0)).collect();
        Self { q: values(shape.q_elements()), k: values(shape.k_elements()), v: values(shape.v_elements()) }
    }

    pub(crate) fn bytes(&self) -> usize {
        (self.q.len() + self.k.len() + self.v.len()) * 4
    }

    /// Begin, chunks of at most `chunk_bytes`, the three operands in turn, Commit.
    pub(crate) fn requests(&self, begin: Begin, chunk_bytes: usize) -> Vec<AttendRequest> {
        let bytes = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Bytes>();
        let mut rest =
            [(Tensor::Q, bytes(&self.q)), (Tensor::K, bytes(&self.k)), (Tensor::V, bytes(&self.v))];
        let mut requests = vec![AttendRequest::Begin(begin)];
        let mut index = 0;
        while rest.iter().any(|(_, data)| !data.is_empty()) {
            for (tensor, data) in rest.iter_mut().filter(|(_, data)| !data.is_empty()) {
                let data = data.split_to(chunk_bytes.min(data.len()));
                requests.push(AttendRequest::Chunk(TensorChunk {
                    index,
                    tensor: (*tensor).into(),
                    offset: None,
                    data,
                }));
                index += 1;
            }
        }
        requests.push(AttendRequest::Commit(Commit { chunks: index, bytes: self.bytes() as u64 }));
        requests
    }
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) plan: PlanSummary,
    pub(crate) context: Vec<f32>,
    pub(crate) lse: Vec<f32>,
    pub(crate) done: Done,
}

/// Reads an answer to its end: each row exactly once, Planned first, Done last.
pub(crate) async fn collect(
    mut replies: Streaming<proto::AttendReply>,
    shape: &AttnShape,
) -> Result<Answer, Error> {
    let dv = shape.value_dim();
    let rows = shape.batch() * shape.n_heads() * shape.n_queries();
    let (mut context, mut lse) = (vec![f32::NAN; rows * dv], vec![f32::NAN; rows]);
    let (mut plan, mut done) = (None, None);
    let mut got = 0;
    while let Some(reply) = replies.message().await? {
        assert!(done.is_none(), "a frame after Done");
        match AttendReply::decode(reply, shape, None)? {
            AttendReply::Planned(summary) => assert!(plan.replace(summary).is_none() && got == 0),
            AttendReply::Context(chunk) => {
                for (i, head) in chunk.heads.clone().enumerate() {
                    for (j, token) in chunk.tokens.clone().enumerate() {
                        let (from, to) = (i * chunk.tokens.len() + j, head * shape.n_queries() + token);
                        assert!(lse[to].is_nan(), "row {to} came twice");
                        lse[to] = chunk.lse[from];
                        context[to * dv..][..dv].copy_from_slice(&chunk.context[from * dv..][..dv]);
                        got += 1;
                    }
                }
            }
            unasked @ (AttendReply::Elements(_) | AttendReply::Report(_) | AttendReply::Heat(_)) => {
                panic!("nobody asked for {unasked:?}")
            }
            AttendReply::Done(end) => done = Some(end),
        }
    }
    assert_eq!(got, rows);
    Ok(Answer { plan: plan.unwrap(), context, lse, done: done.unwrap() })
}

/// A call of one token of one dimension, with a mask of these dimensions.
pub(crate) fn masked(shape: &AttnShape, dims: [usize; 4]) -> Begin {
    let parts =
        OperatorParts { selection: Some(Selection::Dense), ..OperatorParts::plain(1.0, Causal::None) };
    let layout = SideLayout::dense(SideTensor::Mask, Element::Bool, dims, shape).unwrap();
    Begin {
        operator: Arc::new(Operator::new(parts, shape).unwrap()),
        sides: Sides::new(vec![layout]).unwrap(),
        ..begin(shape)
    }
}
