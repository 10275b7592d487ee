//! Forks and other changes, and the end of sessions that nobody uses.

use attnd_plan::session::{Ask, Closed};
use attnd_wire::hold::HoldAsk;
use attnd_wire::session::{Applied, Change as Asked, ChangeKind};
use tokio_util::task::AbortOnDropHandle;

use super::super::change::ChangeCall;
use super::super::upkeep::ask;
use super::*;

/// Makes a change as a client does.
pub(super) async fn change(
    cluster: &Cluster,
    session: &Session,
    op_seq: u64,
    change: Change,
) -> Result<Applied, Error> {
    let kind = match change {
        Change::Truncate { len } => ChangeKind::Truncate { len: len as u64 },
        Change::Seal => ChangeKind::Seal,
        Change::Fork { .. } => ChangeKind::Fork { child: Some(SessionName::new("child").unwrap()) },
        Change::Append { .. } => panic!("{change:?}"),
    };
    change_as(cluster, session, op_seq, kind).await
}

async fn change_as(
    cluster: &Cluster,
    session: &Session,
    op_seq: u64,
    kind: ChangeKind,
) -> Result<Applied, Error> {
    let mutation = Mutation { writer_epoch: 1, op_seq };
    let asked = Asked { session: session.name.clone(), mutation, kind };
    let call = ChangeCall::line_up(&cluster.sessions, asked)?;
    tokio::time::timeout(SOON, call.run(&cluster.sessions, patience())).await.expect("an answer")
}

const FORK: Change = Change::Fork { child: 0 };

fn child() -> SessionName {
    SessionName::new("child").unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_waits_for_no_more_than_must_acknowledge() {
    let cluster = Cluster::start(2).await;
    let session = cluster.open("s", 1, &[(cluster.all(), &[0, 1])]).await;
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 3)]).await), (3, false));
    let slow = &cluster.nodes[1];
    until("both have it", || slow.state_of(&session, 0).0 == 1).await;
    slow.asks[CONTROL].send_replace(Gate::Shut);
    assert_eq!(change(&cluster, &session, 2, Change::Truncate { len: 2 }).await.unwrap().len, 2);
    assert_eq!(applied(&cluster.run(vec![step(&session, 3, 1)]).await), (3, false));
    slow.asks[CONTROL].send_replace(Gate::Open);
    until("the other one has both", || slow.state_of(&session, 0).0 == 3).await;
    assert_eq!(session.lock().ledger.members(0).count(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_whose_fork_is_told_of_late_has_its_name() {
    let mut cluster = Cluster::start(2).await;
    let session = cluster.open("s", 2, &[(cluster.all(), &[0, 1])]).await;
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 3)]).await), (3, false));
    // One of them loses its streams before it has the fork.
    let sessions = Arc::clone(&cluster.sessions);
    let node = &cluster.nodes[1];
    node.asks[CONTROL].send_replace(Gate::NoChanges);
    let forking = async {
        let answer = change(&cluster, &session, 2, FORK);
        let lose = async {
            until("it is on its way", || session.lock().ledger.in_flight().is_some()).await;
            session.disconnected(&sessions, &node.link);
        };
        tokio::join!(answer, lose).0
    };
    let unknown = forking.await.unwrap_err();
    assert_eq!((unknown.reason, unknown.outcome), (Reason::UnderReplicated, Outcome::Unknown), "{unknown}");
    assert_eq!(cluster.sessions.find(&child()).unwrap_err().reason, Reason::Session);
    let taken = cluster.sessions.reserve(Some(child())).unwrap_err();
    assert_eq!(taken.reason, Reason::SessionExists, "the name is the child's");
    // It comes back, and the fork with it.
    let node = &mut cluster.nodes[1];
    node.asks[CONTROL].send_replace(Gate::Open);
    node.connect().await;
    cluster.sees(1);
    until("the child is there", || cluster.sessions.find(&child()).is_ok()).await;
    let again = change(&cluster, &session, 2, FORK).await.unwrap();
    assert_eq!((again.replayed, again.child), (true, Some(child())));
    let born = cluster.sessions.find(&child()).unwrap();
    assert_eq!(born.lock().ledger.tokens(), [3]);
    until("all of it is open", || born.lock().ledger.computing(0).count() == 2).await;
    assert_eq!(applied(&cluster.run(vec![step(&born, 1, 2)]).await), (5, false));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fork_that_a_worker_has_no_room_for_changes_nothing() {
    let cluster = Cluster::start(2).await;
    let session = cluster.open("s", 2, &[(cluster.all(), &[0, 1])]).await;
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 3)]).await), (3, false));
    let full = &cluster.nodes[1].store;
    let pieces = [cluster.all()];
    let room: Vec<_> = std::iter::from_fn(|| full.record(&session.spec, &pieces).ok()).collect();
    let refused = change(&cluster, &session, 2, FORK).await.unwrap_err();
    assert_eq!((refused.reason, refused.outcome), (Reason::Overloaded, Outcome::NotExecuted), "{refused}");
    until("the other one holds none", || cluster.nodes[0].store.len() == 1).await;
    let has = |ledger: &Ledger<Error>| (ledger.next_seq(), ledger.members(0).count());
    assert_eq!(has(&session.lock().ledger), (2, 2));
    drop(room);
    let done = change(&cluster, &session, 2, FORK).await.unwrap();
    assert_eq!((done.len, done.child), (3, Some(child())));
    assert_eq!((full.len(), cluster.nodes[0].store.len()), (2, 2));
    let born = cluster.sessions.find(&child()).unwrap();
    assert_eq!(applied(&cluster.run(vec![step(&born, 1, 1)]).await), (4, false));
    assert_eq!(applied(&cluster.run(vec![step(&session, 3, 2)]).await), (5, false));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_65_forks_of_forks_and_forks_of_one_session_have_a_limit() {
    let cluster = Cluster::start(1).await;
    let root = cluster.open("s", 1, &[(cluster.all(), &[0])]).await;
    let fork = |parent: Arc<Session>, child: String, seq| {
        let child = Some(SessionName::new(child).unwrap());
        let cluster = &cluster;
        async move { change_as(cluster, &parent, seq, ChangeKind::Fork { child }).await }
    };
    let find = |name: &str| cluster.sessions.find(&SessionName::new(name).unwrap()).unwrap();
    let mut above = Arc::clone(&root);
    for depth in 1..=64 {
        let name = format!("depth-{depth}");
        fork(above, name.clone(), 1).await.unwrap();
        above = find(&name);
    }
    let refused = fork(Arc::clone(&above), "deeper".into(), 1).await.unwrap_err();
    assert_eq!((refused.message().as_str(), refused.outcome), ("FORK_LIMIT: depth 64", Outcome::NotExecuted));
    // Who is closed is above nobody.
    cluster.sessions.close(&SessionName::new("depth-1").unwrap()).await.unwrap();
    assert!(root.lock().children.is_empty());
    fork(above, "deeper".into(), 1).await.unwrap();
    let other = || SessionName::new("other").unwrap();
    root.lock().children.extend((1..10_000).map(|child| (child, other())));
    fork(Arc::clone(&root), "last".into(), 2).await.unwrap();
    let refused = fork(Arc::clone(&root), "more".into(), 3).await.unwrap_err();
    assert_eq!((refused.message().as_str(), refused.outcome), ("FORK_LIMIT: 10000", Outcome::NotExecuted));
    cluster.sessions.close(&SessionName::new("last").unwrap()).await.unwrap();
    fork(root, "more".into(), 3).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_before_a_session_is_closed_keeps_it() {
    let cluster = Cluster::start(1).await;
    let spec = SessionSpec { layers: 1, ttl: A_WHILE, ..spec(Dtype::F32, Storage::F32) };
    let session = cluster.open_as("s", spec, &[(cluster.all(), &[0])]).await;
    let sessions = &cluster.sessions;
    tokio::time::sleep(A_WHILE).await;
    assert!(session.is_expired(&session.lock(), sessions.now()));
    // Found out to be unused, and asked for before it is closed.
    sessions.find(&session.name).unwrap();
    sessions.end(&session, Closed::Expired).await.unwrap();
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 3)]).await), (3, false));
    // Somebody who changes it may take longer.
    let turn = session.turns.line_up().unwrap().turn().await;
    tokio::time::sleep(A_WHILE).await;
    sessions.end(&session, Closed::Expired).await.unwrap();
    assert!(session.touch(sessions.now()));
    drop(turn);
    tokio::time::sleep(A_WHILE).await;
    sessions.end(&session, Closed::Expired).await.unwrap();
    assert_eq!(sessions.find(&session.name).unwrap_err().reason, Reason::SessionExpired);
    // Whoever has found it before hears the same.
    let ask = Ask::Append { layer: 0, base_len: None, tokens: 1 };
    let request = attnd_plan::session::Request { writer_epoch: 1, seq: 2, digest: 0, ask };
    let late = session.begin(&request, |_len| Ok(())).err().unwrap();
    assert_eq!(late.reason, Reason::SessionExpired);
    until("its memory is back", || cluster.nodes[0].store.len() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_a_session_that_was_closed_meanwhile_leaves_nothing() {
    let cluster = Cluster::start(3).await;
    let session = cluster.open("s", 2, &[(cluster.all(), &[0, 1])]).await;
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 3)]).await), (3, false));
    let (sessions, [_, leaves, takes]) = (&cluster.sessions, &cluster.nodes[..]) else {
        panic!("three workers");
    };
    takes.asks[BULK].send_replace(Gate::Shut);
    session.lock().links.insert(takes.link.holder.clone(), Arc::clone(&takes.link));
    session.handle(sessions, LedgerEvent::Draining(leaves.link.holder.clone()));
    session.handle(sessions, LedgerEvent::Replacement { shard: 0, holder: takes.link.holder.clone() });
    let is_read = |node: &Node| node.arrived(BULK).iter().any(|ask| matches!(ask, Sent::Export(_)));
    until("the copy is begun", || cluster.nodes.iter().any(is_read)).await;
    sessions.end(&session, Closed::Released).await.unwrap();
    takes.answers[BULK].send_replace(false);
    takes.asks[BULK].send_replace(Gate::Open);
    until("the copy is made", || takes.store.len() == 1).await;
    // What the end of the copy begins may be there before the release.
    let begun = ShardAt { session: session.number, shard: 0, epoch: 2 };
    ask(sessions.term, Arc::clone(&takes.link), HoldAsk::Fence(begun)).await.unwrap();
    takes.answers[BULK].send_replace(true);
    until("nothing is left", || cluster.nodes.iter().all(|node| node.store.len() == 0)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_found_over_a_link_that_is_half_broken_stays() {
    let cluster = Cluster::start(1).await;
    let session = cluster.open("s", 1, &[(cluster.all(), &[0])]).await;
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 3)]).await), (3, false));
    let (sessions, node) = (&cluster.sessions, &cluster.nodes[0]);
    session.disconnected(sessions, &node.link);
    let (link, [control, bulk]) = HoldLink::new(node.link.holder.clone());
    drop(bulk);
    let endpoint = limits::endpoint(&node.url, Link::Cluster).unwrap();
    let stub = limits::shards_client(endpoint.connect().await.unwrap());
    let gates = (node.asks[CONTROL].subscribe(), node.answers[CONTROL].subscribe());
    let log = Arc::default();
    let _lane = AbortOnDropHandle::new(tokio::spawn(carry(CONTROL, control, stub, gates, Arc::clone(&log))));
    let link = Arc::new(link);
    assert!(link.is_lost());
    let found = ShardAt { session: session.number, shard: 0, epoch: 1 };
    sessions.take_stock(&link, &[found]);
    // Behind whatever that sends.
    let look = || ask(sessions.term, Arc::clone(&link), HoldAsk::Look(found));
    tokio::time::sleep(A_WHILE).await;
    assert_eq!(look().await.unwrap().tokens, [3]);
}
