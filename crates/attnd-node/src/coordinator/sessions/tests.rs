//! Sessions on real workers behind real streams, each of which a test may hold up.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use attnd_kernel::{Causal, Dtype, Kernels, Operator, Storage};
use attnd_plan::session::{Change, Holder, Ledger, LedgerEvent, Phase, SessionName, SessionSpec};
use attnd_plan::{CostModel, Piece, WorkerId};
use attnd_wire::hold::{HoldShard, ShardAt};
use attnd_wire::proto::hold_request::Ask as Sent;
use attnd_wire::session::{Mutation, QueryOperator, Step, StepQueries, StepResult, StepRows};
use attnd_wire::surroundings::now;
use attnd_wire::{Deadline, Error, Link, Outcome, Reason, limits, proto};
use bytes::Bytes;
use kameo::actor::Spawn;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};

use super::births::record_of;
use super::patience::Patience;
use super::saves::write_members;
use super::session::{Session, SessionParts};
use super::steps::StepsCall;
use super::{Hub, Sessions, Tasks};
use crate::budget::Budget;
use crate::compute_pool::ComputePool;
use crate::coordinator::hold_link::{HoldLink, LaneTask};
use crate::coordinator::membership_actor::MembershipActor;
use crate::coordinator::meta_store::{InMemory, MetaThread};
use crate::shutdown::Calls;
use crate::worker::hold_service::HoldService;
use crate::worker::store::Store;
use crate::worker::store::tests::{MIB, piece, spec};

mod appends;
mod changes;
mod giving_up;
mod hedges;
mod kept;
mod patience;
mod steps;

/// Whatever doesn't come in this time doesn't come.
const SOON: Duration = Duration::from_secs(5);
/// What doesn't come in this time is taken not to come.
const A_WHILE: Duration = Duration::from_millis(60);

/// Which way of a worker's link.
const CONTROL: usize = 0;
const BULK: usize = 1;

/// A worker, its link, and what holds that up.
struct Node {
    link: Arc<HoldLink>,
    store: Store,
    calls: Calls,
    url: String,
    /// What of all that is sent arrives, by lane.
    asks: [watch::Sender<Gate>; 2],
    /// Whether what is answered arrives.
    answers: [watch::Sender<bool>; 2],
    /// What arrived, with its lane.
    log: Arc<Mutex<Vec<(usize, proto::HoldRequest)>>>,
    lanes: JoinSet<()>,
}

/// What a lane lets through; what is held up holds up all behind it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Gate {
    Open,
    Shut,
    /// Truncates, forks and the like don't pass.
    NoChanges,
}

/// A coordinator's sessions, and workers.
struct Cluster {
    sessions: Arc<Sessions>,
    nodes: Vec<Node>,
}

impl Node {
    async fn start(at: usize) -> Self {
        let (pool, calls) = (ComputePool::new(1, 1).unwrap(), Calls::new());
        let store = Store::new(Kernels::from_env().unwrap(), pool, Budget::new(256 * MIB), 64 * MIB);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let service = limits::shards_server(HoldService { store: store.clone(), calls: calls.clone() });
        let router = limits::server_builder(Link::Coordinator).add_service(service);
        tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
        let holder = Holder { worker: WorkerId::new(format!("w{at}")).unwrap(), incarnation: 1 };
        let asks = [Gate::Open; 2].map(watch::Sender::new);
        let answers = [true; 2].map(watch::Sender::new);
        let (link, log) = (Arc::new(HoldLink::new(holder).0), Arc::default());
        let mut node = Self { link, store, calls, url, asks, answers, log, lanes: JoinSet::new() };
        node.connect().await;
        node
    }

    /// Other streams than those before, if any.
    async fn connect(&mut self) {
        let (link, tasks) = HoldLink::new(self.link.holder.clone());
        self.link = Arc::new(link);
        for (lane, task) in tasks.into_iter().enumerate() {
            let endpoint = limits::endpoint(&self.url, Link::Cluster).unwrap();
            let stub = limits::shards_client(endpoint.connect().await.unwrap());
            let gates = (self.asks[lane].subscribe(), self.answers[lane].subscribe());
            self.lanes.spawn(carry(lane, task, stub, gates, Arc::clone(&self.log)));
        }
    }

    /// The requests of a lane that arrived, by number and kind.
    fn arrived(&self, lane: usize) -> Vec<Sent> {
        let log = self.log.lock().unwrap();
        log.iter().filter(|(of, _)| *of == lane).filter_map(|(_, frame)| frame.ask.clone()).collect()
    }

    /// Its streams end.
    fn cut(&mut self) {
        self.lanes.abort_all();
    }

    fn state_of(&self, session: &Session, shard: u32) -> (u64, Vec<u64>) {
        let state = self.store.resident((session.number, shard)).unwrap().look().state(&self.store, false);
        (state.op_seq, state.tokens)
    }
}

async fn carry(
    lane: usize,
    task: LaneTask,
    mut stub: proto::shards_client::ShardsClient<tonic::transport::Channel>,
    (mut asks, mut answers): (watch::Receiver<Gate>, watch::Receiver<bool>),
    log: Arc<Mutex<Vec<(usize, proto::HoldRequest)>>>,
) {
    let (mut outgoing, replies) = task.apart();
    let (frames, stream) = mpsc::channel(1);
    let mut inbound = stub.hold(ReceiverStream::new(stream)).await.unwrap().into_inner();
    let send = async {
        while let Some(frame) = outgoing.recv().await {
            let is_change = matches!(frame.ask, Some(Sent::Change(_)));
            let passes = |gate: &Gate| *gate == Gate::Open || (*gate == Gate::NoChanges && !is_change);
            asks.wait_for(passes).await.unwrap();
            log.lock().unwrap().push((lane, frame.clone()));
            if frames.send(frame).await.is_err() {
                return;
            }
        }
    };
    let hear = async {
        while let Ok(Some(reply)) = inbound.message().await {
            answers.wait_for(|open| *open).await.unwrap();
            replies.take(reply);
        }
    };
    // The stream ends with whichever does first.
    tokio::select! {
        () = send => {}
        () = hear => {}
    }
}

impl Cluster {
    /// Whoever asks for a session that isn't whole is told so soon.
    async fn start(nodes: usize) -> Self {
        Self::patient(nodes, A_WHILE).await
    }

    async fn patient(nodes: usize, patience: Duration) -> Self {
        let pool = ComputePool::new(1, 1).unwrap();
        let (cluster, kernels) =
            (MembershipActor::spawn(watch::Sender::default()), Kernels::from_env().unwrap());
        let hub = Hub {
            cluster,
            pool,
            kernels,
            costs: CostModel::default(),
            surroundings: attnd_wire::Surroundings::default(),
            ending: Default::default(),
        };
        let meta = MetaThread::start(Arc::new(InMemory::default()), Default::default()).unwrap();
        let sessions = Sessions::new(Arc::new(hub), Tasks::default(), 1, meta);
        let sessions = Arc::new(Sessions { patience, ..sessions });
        let mut started = Vec::new();
        for at in 0..nodes {
            started.push(Node::start(at).await);
        }
        sessions.tasks.spawn(write_members(Arc::clone(&sessions)));
        let cluster = Self { sessions, nodes: started };
        (0..nodes).for_each(|at| cluster.sees(at));
        cluster
    }

    /// A session of shards with these pieces, each on these workers.
    async fn open(&self, name: &str, acks: usize, shards: &[(Piece, &[usize])]) -> Arc<Session> {
        let spec =
            SessionSpec { layers: 1, replicas: shards[0].1.len(), acks, ..spec(Dtype::F32, Storage::F32) };
        self.open_as(name, spec, shards).await
    }

    async fn open_as(&self, name: &str, spec: SessionSpec, shards: &[(Piece, &[usize])]) -> Arc<Session> {
        let name = SessionName::new(name).unwrap();
        let number = self.sessions.meta.run(|store| store.reserve_number()).await.unwrap();
        let mut holds = Vec::new();
        let (mut holders, mut pieces) = (Vec::new(), Vec::new());
        let mut links: BTreeMap<Holder, Arc<HoldLink>> = BTreeMap::new();
        for (shard, (piece, on)) in shards.iter().enumerate() {
            let at = ShardAt { session: number, shard: shard as u32, epoch: 1 };
            let of_shard: Vec<&Node> = on.iter().map(|at| &self.nodes[*at]).collect();
            for node in &of_shard {
                let hold = HoldShard { at, spec: spec.clone(), pieces: vec![piece.clone()] };
                holds.push((Arc::clone(&node.link), hold));
                links.insert(node.link.holder.clone(), Arc::clone(&node.link));
            }
            holders.push(of_shard.iter().map(|node| node.link.holder.clone()).collect());
            pieces.push(Arc::from([piece.clone()]));
        }
        self.sessions.hold(holds, |_any| true).await.unwrap();
        let ledger = Ledger::new(&spec, holders, self.sessions.now());
        let session = Session::new(SessionParts { number, name, spec, ledger, pieces, links, parent: None });
        let record = record_of(&session.name, &session, &session.lock().ledger);
        self.sessions.meta.run(move |store| store.create_as(number, &record)).await.unwrap();
        let session = Arc::new(session);
        self.sessions.insert(&session);
        session
    }

    /// A worker is a member, with the streams that it has now.
    fn sees(&self, at: usize) {
        let link = &self.nodes[at].link;
        self.sessions
            .links
            .send_modify(|view| Arc::make_mut(view).set(link.holder.clone(), Some(Arc::clone(link))));
        self.sessions.reconcile();
    }

    /// A worker is no member any more.
    fn misses(&self, at: usize) {
        self.sessions.links.send_modify(|view| Arc::make_mut(view).remove(&self.nodes[at].link.holder));
        self.sessions.reconcile();
    }

    fn all(&self) -> Piece {
        piece(0..2, 0..64)
    }

    /// Runs steps as a client's message.
    fn run(&self, steps: Vec<Step>) -> impl Future<Output = Vec<StepResult>> + Send + 'static {
        let sessions = Arc::clone(&self.sessions);
        let call = StepsCall::line_up(&sessions, steps.into_iter().map(Ok).collect());
        async move { call.run(&sessions, patience()).await.expect("an answer") }
    }
}

/// As long as anybody waits for anything.
fn patience() -> Patience {
    Patience::new(Deadline::after(now(), SOON), &super::patience::room())
}

/// Rows of a session whose number this is, with other values for other numbers.
fn rows(spec: &SessionSpec, seq: u64, tokens: usize) -> StepRows {
    let (key, value) = spec.row_bytes();
    let of = |row: usize| -> Bytes {
        let n = spec.kv_heads * tokens * row / 4;
        (0..n)
            .flat_map(|x| ((x as u64 * 7 + seq * 13) as f32 % 5.0 - 2.0).to_le_bytes())
            .collect::<Vec<u8>>()
            .into()
    };
    StepRows::new(Mutation { writer_epoch: 1, op_seq: seq }, tokens, of(key), of(value))
}

fn queries(spec: &SessionSpec, operator: &Operator) -> StepQueries {
    let n = spec.heads * spec.head_dim;
    let q: Vec<u8> = (0..n).flat_map(|x| (x as f32 / n as f32).to_le_bytes()).collect();
    StepQueries::new(1, Dtype::F32, q.into(), QueryOperator::from(operator))
}

fn plain() -> Operator {
    Operator::plain(0.25, Causal::BottomRight)
}

fn step(session: &Session, seq: u64, tokens: usize) -> Step {
    let (rows, queries) = (rows(&session.spec, seq, tokens), queries(&session.spec, &plain()));
    Step { session: session.name.clone(), layer: 0, rows: Some(rows), queries: Some(queries) }
}

fn appending(session: &Session, seq: u64, tokens: usize) -> Step {
    Step { queries: None, ..step(session, seq, tokens) }
}

fn looking(session: &Session) -> Step {
    Step { rows: None, ..step(session, 1, 1) }
}

/// Waits until something is so.
async fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = std::time::Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < SOON, "{what} doesn't come about");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// The one result of a step that was appended.
fn applied(results: &[StepResult]) -> (u64, bool) {
    let [result] = results else { panic!("{results:?}") };
    let applied = result.applied.as_ref().unwrap_or_else(|| panic!("{result:?}"));
    (applied.len, applied.replayed)
}

fn failure(results: &[StepResult]) -> &Error {
    let [result] = results else { panic!("{results:?}") };
    result.failure.as_ref().unwrap_or_else(|| panic!("{result:?}"))
}

fn halves() -> [Range<usize>; 2] {
    [0..32, 32..64]
}
