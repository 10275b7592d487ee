//! Requests that come while a session has lost a replica: how long they wait, and for what.

use attnd_plan::session::Closed;
use futures::FutureExt as _;
use tokio::sync::Semaphore;

use super::*;

/// A session on both of two workers, of which both must acknowledge, and which has three tokens.
async fn pair(patience: Duration) -> (Cluster, Arc<Session>) {
    let cluster = Cluster::patient(2, patience).await;
    let session = cluster.open("s", 2, &[(cluster.all(), &[0, 1])]).await;
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 3)]).await), (3, false));
    (cluster, session)
}

/// The second worker's streams are gone, and the session knows.
async fn lose(cluster: &Cluster, session: &Arc<Session>) {
    session.disconnected(&cluster.sessions, &cluster.nodes[1].link);
    until("it is short", || session.lock().ledger.phase(0) == Phase::Degraded).await;
}

async fn come_back(cluster: &mut Cluster) {
    cluster.nodes[1].connect().await;
    cluster.sees(1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_wait_for_a_session_to_be_whole_and_go_in_their_order() {
    let (mut cluster, session) = pair(SOON).await;
    lose(&cluster, &session).await;
    let mut steps: Vec<_> = (2..5).map(|seq| Box::pin(cluster.run(vec![step(&session, seq, 1)]))).collect();
    for step in &mut steps {
        assert!(tokio::time::timeout(A_WHILE, step).await.is_err());
    }
    come_back(&mut cluster).await;
    for (step, len) in futures::future::join_all(steps).await.iter().zip(4..) {
        assert_eq!(applied(step), (len, false));
        assert!(step[0].context.is_some(), "{step:?}");
    }
    assert!(session.lock().stalled.is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_whose_worker_is_lost_on_the_way_is_brought_to_its_end() {
    let (mut cluster, session) = pair(SOON).await;
    let same = cluster.open("same", 1, &[(cluster.all(), &[0])]).await;
    cluster.nodes[1].asks[CONTROL].send_replace(Gate::Shut);
    let mut first = Box::pin(cluster.run(vec![step(&session, 2, 2)]));
    assert!(tokio::time::timeout(A_WHILE, &mut first).await.is_err());
    cluster.nodes[1].cut();
    assert!(tokio::time::timeout(A_WHILE, &mut first).await.is_err());
    assert_eq!(session.lock().ledger.phase(0), Phase::Degraded);
    cluster.nodes[1].asks[CONTROL].send_replace(Gate::Open);
    come_back(&mut cluster).await;
    let first = first.await;
    assert_eq!(applied(&first).0, 5);
    for (seq, tokens) in [(1, 3), (2, 2)] {
        cluster.run(vec![appending(&same, seq, tokens)]).await;
    }
    assert_eq!(first[0].context, cluster.run(vec![looking(&same)]).await[0].context);
    assert_eq!(applied(&cluster.run(vec![step(&session, 3, 1)]).await), (6, false));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queries_wait_for_a_replica_that_is_away() {
    let mut cluster = Cluster::patient(2, SOON).await;
    let session = cluster.open("s", 1, &[(cluster.all(), &[1])]).await;
    let stepped = cluster.run(vec![step(&session, 1, 3)]).await;
    session.disconnected(&cluster.sessions, &cluster.nodes[1].link);
    let mut look = Box::pin(cluster.run(vec![looking(&session)]));
    assert!(tokio::time::timeout(A_WHILE, &mut look).await.is_err());
    come_back(&mut cluster).await;
    assert_eq!(look.await[0].context, stepped[0].context);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lasts_too_long_is_said_and_then_at_once() {
    let (mut cluster, session) = pair(A_WHILE).await;
    lose(&cluster, &session).await;
    let refused = cluster.run(vec![step(&session, 2, 1)]).await;
    let error = failure(&refused);
    assert_eq!((error.reason, error.outcome), (Reason::UnderReplicated, Outcome::NotExecuted));
    let again = cluster.run(vec![step(&session, 2, 1)]).now_or_never().expect("an answer at once");
    assert_eq!(failure(&again).reason, Reason::UnderReplicated);
    // Once it was whole, there is patience again.
    come_back(&mut cluster).await;
    until("it is whole", || session.lock().stalled.is_none()).await;
    lose(&cluster, &session).await;
    assert!(cluster.run(vec![step(&session, 2, 1)]).now_or_never().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_no_time_or_no_room_is_told_what_is_missing() {
    let (cluster, session) = pair(SOON).await;
    lose(&cluster, &session).await;
    let run = |patience| {
        let call = StepsCall::line_up(&cluster.sessions, vec![Ok(step(&session, 2, 1))]);
        let sessions = Arc::clone(&cluster.sessions);
        async move { call.run(&sessions, patience).await.unwrap() }
    };
    let short = Patience::new(Deadline::after(now(), A_WHILE), &super::super::patience::room());
    assert_eq!(failure(&run(short).await).reason, Reason::UnderReplicated, "and not that its time is over");
    let crowded = Patience::new(Deadline::after(now(), SOON), &Arc::new(Semaphore::new(0)));
    let refused = run(crowded).now_or_never().expect("an answer at once");
    assert_eq!(failure(&refused).reason, Reason::UnderReplicated);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_hears_of_another_writer_and_of_the_end() {
    let (cluster, session) = pair(SOON).await;
    lose(&cluster, &session).await;
    let mut fenced = Box::pin(cluster.run(vec![step(&session, 2, 1)]));
    assert!(tokio::time::timeout(A_WHILE, &mut fenced).await.is_err());
    session.become_writer(&cluster.sessions).await.unwrap();
    assert_eq!(failure(&fenced.await).reason, Reason::WriterFenced);
    let mut next = step(&session, 2, 1);
    next.rows.as_mut().unwrap().mutation.writer_epoch = 2;
    let mut closed = Box::pin(cluster.run(vec![next]));
    assert!(tokio::time::timeout(A_WHILE, &mut closed).await.is_err());
    cluster.sessions.end(&session, Closed::Released).await.unwrap();
    assert_eq!(failure(&closed.await).reason, Reason::Session);
}
