//! Sessions over the stores of two workers in this process, and a store of sessions that fails where it is told to.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use attnd_kernel::{Dtype, KERNEL_ID, Kernels, Storage};
use attnd_plan::session::Holder;
use attnd_plan::session::SessionSpec;
use attnd_plan::session::spec::DEFAULT_TTL;
use attnd_plan::{CostModel, WorkerId};
use attnd_wire::join::WIRE_VERSIONS;
use attnd_wire::session::{Applied, Change, ChangeKind, Mutation, Open, Step, StepRows};
use attnd_wire::{Deadline, Heartbeat, Hello, Link, Outcome, limits};
use bytes::Bytes;
use futures::FutureExt as _;
use kameo::actor::{ActorRef, Spawn};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_stream::wrappers::TcpListenerStream;

use super::super::change::{ChangeCall, rooms_for};
use super::super::patience::Patience;
use super::super::steps::StepsCall;
use super::super::*;
use crate::budget::Budget;
use crate::compute_pool::ComputePool;
use crate::coordinator::membership_actor::{Beat, Join, MembershipActor};
use crate::coordinator::meta_store::{InMemory, MetaStore, SessionRecord, ShardUpdate};
use crate::shutdown::Calls;
use crate::worker::hold_service::HoldService;
use crate::worker::store::Store;

const SOON: Duration = Duration::from_secs(10);

/// A store whose named functions fail.
#[derive(Debug)]
struct Failing {
    kept: InMemory,
    fails: Mutex<BTreeSet<&'static str>>,
}

impl Failing {
    fn check(&self, what: &'static str) -> Result<(), MetaError> {
        let fails = self.fails.lock().unwrap().contains(what);
        let error = || MetaError::Io { path: "/secret/sessions.redb".into(), what: "no space left".into() };
        if fails { Err(error()) } else { Ok(()) }
    }

    fn fail(&self, what: &[&'static str]) {
        *self.fails.lock().unwrap() = what.iter().copied().collect();
    }
}

impl MetaStore for Failing {
    fn bump_term(&self) -> Result<u64, MetaError> {
        self.kept.bump_term()
    }
    fn reserve_number(&self) -> Result<u64, MetaError> {
        self.kept.reserve_number()
    }
    fn create(&self, record: &SessionRecord) -> Result<u64, MetaError> {
        self.check("create")?;
        self.kept.create(record)
    }
    fn create_as(&self, session: u64, record: &SessionRecord) -> Result<(), MetaError> {
        self.check("create_as")?;
        self.kept.create_as(session, record)
    }
    fn update_shard(&self, s: u64, i: usize, from: u64, to: u64, who: &[Holder]) -> Result<(), MetaError> {
        self.kept.update_shard(s, i, from, to, who)
    }
    fn update_shards(&self, updates: &[ShardUpdate]) -> Result<Vec<Result<(), MetaError>>, MetaError> {
        self.check("update_shards")?;
        self.kept.update_shards(updates)
    }
    fn settle(&self, session: u64, record: &SessionRecord) -> Result<(), MetaError> {
        self.check("settle")?;
        self.kept.settle(session, record)
    }
    fn forget(&self, session: u64) -> Result<bool, MetaError> {
        self.kept.forget(session)
    }
    fn set_writer_epoch(&self, session: u64, writer_epoch: u64) -> Result<(), MetaError> {
        self.check("set_writer_epoch")?;
        self.kept.set_writer_epoch(session, writer_epoch)
    }
    fn remove(&self, session: u64, now: Duration) -> Result<bool, MetaError> {
        self.check("remove")?;
        self.kept.remove(session, now)
    }
    fn was_closed(&self, name: &str, now: Duration) -> Result<bool, MetaError> {
        self.kept.was_closed(name, now)
    }
    fn number_of(&self, name: &str) -> Result<Option<u64>, MetaError> {
        self.kept.number_of(name)
    }
    fn all(&self) -> Result<BTreeMap<u64, SessionRecord>, MetaError> {
        self.kept.all()
    }
}

/// One life of a coordinator.
struct Life {
    sessions: Arc<Sessions>,
    cluster: ActorRef<MembershipActor>,
    beats: JoinSet<()>,
}

impl Drop for Life {
    fn drop(&mut self) {
        self.sessions.tasks.abort_all();
        self.cluster.kill();
        self.beats.abort_all();
    }
}

struct Scene {
    meta: Arc<Failing>,
    workers: Vec<(Hello, Store)>,
    _serving: JoinSet<()>,
}

impl Scene {
    async fn new() -> Self {
        let meta = Arc::new(Failing { kept: InMemory::new(), fails: Mutex::default() });
        let (mut workers, mut serving) = (Vec::new(), JoinSet::new());
        for name in ["w0", "w1"] {
            let pool = ComputePool::new(1, 1).unwrap();
            let store = Store::new(Kernels::from_env().unwrap(), pool, Budget::new(64 << 20), 64 << 20);
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = format!("http://{}", listener.local_addr().unwrap());
            let service = limits::shards_server(HoldService { store: store.clone(), calls: Calls::new() });
            let router = limits::server_builder(Link::Coordinator).add_service(service);
            serving.spawn(async move {
                router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
            });
            workers.push((hello(name, address), store));
        }
        Self { meta, workers, _serving: serving }
    }

    /// A coordinator to which both workers have come.
    async fn begin(&self) -> Life {
        let (roll, members) = watch::channel(Arc::default());
        let cluster = MembershipActor::spawn(roll);
        let (pool, kernels) = (ComputePool::new(1, 1).unwrap(), Kernels::from_env().unwrap());
        let hub = Arc::new(Hub {
            cluster: cluster.clone(),
            pool,
            kernels,
            costs: CostModel::default(),
            surroundings: attnd_wire::Surroundings::default(),
            ending: Default::default(),
        });
        let store = Arc::clone(&self.meta) as Arc<dyn MetaStore>;
        let meta = MetaThread::start(store, hub.ending.clone()).unwrap();
        let term = meta.run(|store| store.bump_term()).await.unwrap();
        let sessions = Arc::new(Sessions::new(hub, Tasks::default(), term, meta));
        sessions.recover().await.unwrap();
        sessions.tasks.spawn(write_members(Arc::clone(&sessions)));
        sessions.tasks.spawn(keep_links(Arc::clone(&sessions), members));
        sessions.tasks.spawn(watch(Arc::clone(&sessions)));
        let mut beats = JoinSet::new();
        for (hello, _) in &self.workers {
            let channel = limits::endpoint(&hello.address, Link::Cluster).unwrap().connect_lazy();
            let bulk = limits::endpoint(&hello.address, Link::Cluster).unwrap().connect_lazy();
            let (worker, incarnation) = (hello.worker.clone(), hello.incarnation);
            cluster.ask(Join { hello: hello.clone(), channel, bulk }).send().await.unwrap();
            let cluster = cluster.clone();
            beats.spawn(async move {
                let beat = || Beat { worker: worker.clone(), incarnation, heartbeat: Heartbeat::default() };
                while cluster.ask(beat()).send().await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            });
        }
        Life { sessions, cluster, beats }
    }

    async fn wait_until_workers_are_empty(&self) {
        eventually("no shard is left", || self.workers.iter().all(|(_, store)| store.len() == 0)).await;
    }
}

async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < SOON, "not within {SOON:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn hello(name: &str, address: String) -> Hello {
    Hello {
        worker: WorkerId::new(name).unwrap(),
        incarnation: 7,
        address,
        wire_version: *WIRE_VERSIONS.end(),
        kernel_id: KERNEL_ID.into(),
        isa: "portable".into(),
        threads: 1,
        gflops: 100.0,
        memory_budget_bytes: 1 << 30,
        version: "test".into(),
        host: name.into(),
        session_memory_bytes: 64 << 20,
    }
}

fn name(text: &str) -> SessionName {
    SessionName::new(text).unwrap()
}

fn open(session: &str, write: bool) -> Open {
    let spec = SessionSpec {
        layers: 1,
        heads: 2,
        kv_heads: 2,
        head_dim: 4,
        value_dim: 4,
        dtype: Dtype::F32,
        storage: Storage::F32,
        value_is_key_prefix: false,
        replicas: 2,
        acks: 2,
        ttl: DEFAULT_TTL,
        max_tokens: 1000,
        allow_same_host: false,
    };
    Open { name: Some(name(session)), spec: Some(spec), write }
}

/// Appends one token, once, or as soon as the session has recovered.
async fn append(life: &Life, session: &str, writer_epoch: u64, op_seq: u64) -> Result<Applied, Error> {
    let rows = Bytes::from(vec![op_seq as u8; 2 * 4 * 4]);
    let begun = Instant::now();
    loop {
        let mutation = Mutation { writer_epoch, op_seq };
        let rows = StepRows::new(mutation, 1, rows.clone(), rows.clone());
        let step = Step { session: name(session), layer: 0, rows: Some(rows), queries: None };
        let call = StepsCall::line_up(&life.sessions, vec![Ok(step)]);
        let result = call.run(&life.sessions, short()).await?.remove(0);
        match (result.applied, result.failure) {
            (Some(applied), None) => return Ok(applied),
            (_, Some(error)) if error.pushback().is_some() && begun.elapsed() < SOON => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            (_, failure) => return Err(failure.unwrap()),
        }
    }
}

/// Time enough for what is whole.
fn short() -> Patience {
    Patience::new(Deadline::after(now(), SOON), &patience::room())
}

async fn fork(sessions: &Arc<Sessions>, parent: &str, child: &str, op_seq: u64) -> Result<Applied, Error> {
    let kind = ChangeKind::Fork { child: Some(name(child)) };
    let change = Change { session: name(parent), mutation: Mutation { writer_epoch: 1, op_seq }, kind };
    ChangeCall::line_up(sessions, change)?.run(sessions, short()).await
}

/// The same, or as soon as the session has recovered.
async fn fork_in_time(
    sessions: &Arc<Sessions>,
    parent: &str,
    child: &str,
    op_seq: u64,
) -> Result<Applied, Error> {
    let begun = Instant::now();
    loop {
        match fork(sessions, parent, child, op_seq).await {
            Err(error) if error.pushback().is_some() && begun.elapsed() < SOON => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            answer => return answer,
        }
    }
}

fn not_kept(error: &Error) {
    assert_eq!(error.message(), "STATE_STORE: no space left", "no path of the coordinator's");
    assert_eq!(error.outcome, Outcome::NotExecuted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_be_kept_is_refused_and_changes_nothing() {
    let scene = Scene::new().await;
    let life = scene.begin().await;
    let sessions = &life.sessions;
    scene.meta.fail(&["create_as", "create", "set_writer_epoch", "remove"]);
    not_kept(&sessions.open(open("a", true)).await.unwrap_err());
    scene.wait_until_workers_are_empty().await;
    scene.meta.fail(&["create", "set_writer_epoch", "remove"]);
    assert!(sessions.open(open("a", true)).await.unwrap().created);
    append(&life, "a", 1, 1).await.unwrap();
    not_kept(&sessions.open(open("a", true)).await.unwrap_err());
    append(&life, "a", 1, 2).await.unwrap();
    not_kept(&fork(sessions, "a", "child", 3).await.unwrap_err());
    append(&life, "a", 1, 3).await.unwrap();
    not_kept(&sessions.close(&name("a")).await.unwrap_err());
    append(&life, "a", 1, 4).await.unwrap();
    scene.meta.fail(&[]);
    // The name of the child is nobody's.
    fork(sessions, "a", "child", 5).await.unwrap();
    assert_eq!(sessions.open(open("a", true)).await.unwrap().writer_epoch, 2);
    let fenced = append(&life, "a", 1, 6).await.unwrap_err();
    assert_eq!(fenced.message(), "WRITER_FENCED: writer_epoch 1 < 2");
    for session in ["a", "child"] {
        assert!(!sessions.close(&name(session)).await.unwrap());
        assert!(sessions.close(&name(session)).await.unwrap());
    }
    scene.wait_until_workers_are_empty().await;
    assert_eq!(scene.meta.all().unwrap(), BTreeMap::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_is_opened_twice_at_once_is_one() {
    let scene = Scene::new().await;
    let life = scene.begin().await;
    let opened = |open| life.sessions.open(open);
    let mut other = open("a", false);
    other.spec.as_mut().unwrap().max_tokens += 1;
    let (first, second, third) =
        tokio::join!(opened(open("a", true)), opened(open("a", true)), opened(other.clone()));
    let epochs =
        |of: Result<SessionDescription, Error>| of.map(|opened| (opened.created, opened.writer_epoch));
    assert_eq!((epochs(first).unwrap(), epochs(second).unwrap()), ((true, 1), (false, 2)));
    let differs = third.unwrap_err();
    assert_eq!(differs.message(), "SESSION_EXISTS: parameters differ");
    // What whoever was first is told is its own, whoever comes next.
    for n in 0..40 {
        let open = || opened(Open { name: Some(name(&format!("both-{n}"))), ..open("a", true) });
        let (first, second) = tokio::join!(open(), open());
        assert_eq!((epochs(first).unwrap(), epochs(second).unwrap()), ((true, 1), (false, 2)), "{n}");
    }
    // Where the first one fails, the second is for whoever waits for it.
    scene.meta.fail(&["create_as"]);
    other.name = Some(name("b"));
    let (first, second) = tokio::join!(opened(open("b", true)), opened(other.clone()));
    not_kept(&first.unwrap_err());
    not_kept(&second.unwrap_err());
    scene.meta.fail(&[]);
    assert!(opened(other).await.unwrap().created);
    assert!(life.sessions.table().being_opened.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_is_told_of_once_it_is_kept_be_it_by_the_next_coordinator() {
    let scene = Scene::new().await;
    let life = scene.begin().await;
    life.sessions.open(open("a", true)).await.unwrap();
    append(&life, "a", 1, 1).await.unwrap();
    scene.meta.fail(&["settle"]);
    let sessions = Arc::clone(&life.sessions);
    let waits = tokio::task::spawn(async move { fork(&sessions, "a", "late", 2).await });
    eventually("the fork is applied", || scene.workers.iter().all(|(_, store)| store.len() == 4)).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waits.is_finished() && life.sessions.describe(&name("late")).is_err());
    let taken = life.sessions.open(open("late", false)).await.unwrap_err();
    assert_eq!(taken.reason, Reason::SessionExists);
    scene.meta.fail(&[]);
    let applied = tokio::time::timeout(SOON, waits).await.unwrap().unwrap().unwrap();
    assert_eq!((applied.replayed, applied.child), (false, Some(name("late"))));
    append(&life, "late", 1, 1).await.unwrap();
    // The next one is applied, and its coordinator ends.
    scene.meta.fail(&["settle"]);
    let sessions = Arc::clone(&life.sessions);
    let unheard = tokio::task::spawn(async move { fork(&sessions, "a", "later", 3).await });
    eventually("the fork is applied", || scene.workers.iter().all(|(_, store)| store.len() == 6)).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    // And one of which workers have no more than room for it.
    let mut record = scene.meta.all().unwrap().into_values().find(|record| record.pending).unwrap();
    let parent = life.sessions.find(&name("a")).unwrap();
    (record.name, record.parent) = (name("never"), Some(parent.number));
    let never = scene.meta.create(&record).unwrap();
    life.sessions.hold(rooms_for(&parent, never), |_any| true).await.unwrap();
    (record.name, record.parent) = (name("nobodys"), Some(1));
    scene.meta.create(&record).unwrap();
    unheard.abort();
    drop(life);
    let life = scene.begin().await;
    eventually("what it has is known", || life.sessions.describe(&name("a")).is_ok()).await;
    let waits = fork_in_time(&life.sessions, "a", "later", 3);
    tokio::pin!(waits);
    assert!(tokio::time::timeout(Duration::from_millis(300), &mut waits).await.is_err());
    scene.meta.fail(&[]);
    let again = waits.await.unwrap();
    assert_eq!((again.replayed, again.child), (true, Some(name("later"))));
    eventually("the child is open", || life.sessions.describe(&name("later")).is_ok()).await;
    append(&life, "later", 1, 1).await.unwrap();
    append(&life, "a", 1, 4).await.unwrap();
    append(&life, "late", 1, 2).await.unwrap();
    for session in ["never", "nobodys"] {
        eventually("what never was is forgotten", || {
            scene.meta.number_of(session).unwrap().is_none()
                && !life.sessions.table().opening.contains(&name(session))
        })
        .await;
        assert!(life.sessions.open(open(session, true)).await.unwrap().created);
    }
    for session in ["a", "late", "later", "never", "nobodys"] {
        life.sessions.close(&name(session)).await.unwrap();
    }
    scene.wait_until_workers_are_empty().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_whose_members_can_not_be_kept_takes_no_appends_until_they_are() {
    let scene = Scene::new().await;
    let life = scene.begin().await;
    life.sessions.open(open("a", true)).await.unwrap();
    append(&life, "a", 1, 1).await.unwrap();
    drop(life);
    scene.meta.fail(&["update_shards"]);
    let life = scene.begin().await;
    eventually("what it has is known", || life.sessions.describe(&name("a")).is_ok()).await;
    let described = life.sessions.describe(&name("a")).unwrap();
    assert_eq!((described.next_op_seq, &described.tokens[..]), (2, &[1][..]));
    let waits = append(&life, "a", 1, 2);
    tokio::pin!(waits);
    assert!(tokio::time::timeout(Duration::from_millis(300), &mut waits).await.is_err());
    scene.meta.fail(&[]);
    assert_eq!(waits.await.unwrap().len, 2);
    let kept = scene.meta.all().unwrap().into_values().next().unwrap();
    let described = life.sessions.describe(&name("a")).unwrap();
    let epochs = |of: &[u64]| of.iter().all(|epoch| *epoch > 1);
    let saved: Vec<u64> = kept.shards.iter().map(|shard| shard.epoch).collect();
    let open: Vec<u64> = described.shards.iter().map(|shard| shard.epoch).collect();
    assert!(saved == open && epochs(&saved), "{saved:?}, {open:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_of_the_past_ends() {
    let scene = Scene::new().await;
    let past = scene.begin().await;
    past.sessions.open(open("a", true)).await.unwrap();
    append(&past, "a", 1, 1).await.unwrap();
    assert!(past.sessions.hub.ending.reason().now_or_never().is_none());
    // It was asleep, and another one has taken its workers over.
    let life = scene.begin().await;
    assert_eq!(append(&life, "a", 1, 2).await.unwrap().len, 2);
    let refused = append(&past, "a", 1, 2).await;
    assert!(refused.as_ref().is_err_and(|error| error.outcome != Outcome::Applied), "{refused:?}");
    let why = tokio::time::timeout(SOON, past.sessions.hub.ending.reason()).await.expect("it notices");
    assert!(why.exit_code() == 71 && why.to_string().contains("FENCED: term 1 < 2"), "{why}");
    assert_eq!(append(&life, "a", 1, 3).await.unwrap().len, 3);
    assert!(life.sessions.hub.ending.reason().now_or_never().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_that_come_late_over_a_connection_of_before_are_given_back() {
    let scene = Scene::new().await;
    let life = scene.begin().await;
    life.sessions.open(open("a", true)).await.unwrap();
    let parent = life.sessions.find(&name("a")).unwrap();
    let nobodys = scene.meta.reserve_number().unwrap();
    let counts = || -> Vec<usize> { scene.workers.iter().map(|(_, store)| store.len()).collect() };
    let before = counts();
    // Behind the listing of its link.
    life.sessions.hold(rooms_for(&parent, nobodys), |_any| true).await.unwrap();
    assert_ne!(counts(), before);
    eventually("those that nobody knows are gone", || counts() == before).await;
    append(&life, "a", 1, 1).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fork_that_comes_before_it_is_known_what_was_before_has_a_child() {
    let scene = Scene::new().await;
    let life = scene.begin().await;
    life.sessions.open(open("a", true)).await.unwrap();
    append(&life, "a", 1, 1).await.unwrap();
    drop(life);
    let life = scene.begin().await;
    let forked = fork_in_time(&life.sessions, "a", "early", 2).await.unwrap();
    assert_eq!((forked.replayed, forked.child), (false, Some(name("early"))));
    assert_eq!(life.sessions.describe(&name("early")).unwrap().tokens, [1]);
}
