//! Steps: who is waited for, what fits into a message, and what is said of what came again or got lost.

use attnd_kernel::{Bias, OperatorParts, Relative};
use attnd_wire::Deadline;

use crate::worker::store::pages::PageAt;

use super::super::works;
use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_not_needed_holds_no_step_up() {
    let cluster = Cluster::start(2).await;
    let session = cluster.open("s", 1, &[(cluster.all(), &[0, 1])]).await;
    let straggler = &cluster.nodes[1];
    straggler.asks[CONTROL].send_replace(Gate::Shut);
    for seq in 1..=3 {
        let results = cluster.run(vec![step(&session, seq, 2)]).await;
        assert_eq!(applied(&results), (2 * seq, false));
        assert!(results[0].context.is_some(), "{results:?}");
    }
    let members = |session: &Session| session.lock().ledger.members(0).count();
    assert_eq!((straggler.state_of(&session, 0).0, members(&session)), (0, 2));
    // It gets all of them, in order, and is as far as the others.
    straggler.asks[CONTROL].send_replace(Gate::Open);
    let holder = &straggler.link.holder;
    until("the straggler is level", || session.is_computing(0, holder)).await;
    assert_eq!(straggler.state_of(&session, 0), cluster.nodes[0].state_of(&session, 0));
    assert_eq!((members(&session), session.lock().ledger.epoch(0)), (2, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_changed_on_the_coordinator_are_not_sent_on() {
    let cluster = Cluster::start(2).await;
    let [low, high] = [0..1, 1..2].map(|groups| piece(groups, 0..64));
    let session = cluster.open("s", 1, &[(low, &[0]), (high, &[1])]).await;
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 3)]).await), (3, false));
    let mut rows = appending(&session, 2, 2);
    rows.rows.as_mut().unwrap().crc32c ^= 1;
    let mut asks = looking(&session);
    asks.queries.as_mut().unwrap().crc32c ^= 1;
    for (broken, what) in [(rows, "k and v"), (asks, "q")] {
        let failed = cluster.run(vec![broken]).await;
        let error = failure(&failed);
        assert_eq!(error.message(), format!("CHECKSUM: {what}, nothing applied"));
        assert_eq!(error.outcome, Outcome::NotExecuted);
    }
    assert_eq!(applied(&cluster.run(vec![step(&session, 2, 2)]).await), (5, false));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_for_which_there_is_no_memory_is_refused_alone() {
    let cluster = Cluster::start(1).await;
    let session = cluster.open("s", 1, &[(cluster.all(), &[0])]).await;
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 3)]).await), (3, false));
    let room = &cluster.sessions.room;
    assert_eq!(room.reserved(), 0);
    let need = works::step_bytes(None, looking(&session).queries.as_ref(), &session.spec, &session.pieces);
    let taken = room.reserve(room.limit() - need).unwrap();
    let results = cluster.run(vec![looking(&session), step(&session, 2, 1)]).await;
    assert!(results[0].context.is_some(), "{results:?}");
    let refused = results[1].failure.as_ref().unwrap();
    assert!(refused.message().starts_with("OVERLOADED: steps: need ") && refused.is_retryable(), "{refused}");
    assert!(results[1].applied.is_none() && room.reserved() == room.limit() - need);
    drop(taken);
    assert_eq!(applied(&cluster.run(vec![step(&session, 2, 1)]).await), (4, false));
    assert_eq!(room.reserved(), 0);
    // What never has room is refused for good.
    let too_large = cluster.sessions.room_for(room.limit() + 1).unwrap_err();
    assert!(too_large.reason == Reason::ShapeLimit && !too_large.is_retryable(), "{too_large}");
    assert!(cluster.sessions.room_for(room.limit()).is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_must_acknowledge_is_waited_for() {
    let cluster = Cluster::start(2).await;
    let session = cluster.open("s", 2, &[(cluster.all(), &[0, 1])]).await;
    cluster.nodes[1].asks[CONTROL].send_replace(Gate::Shut);
    let mut run = Box::pin(cluster.run(vec![step(&session, 1, 2)]));
    assert!(tokio::time::timeout(A_WHILE, &mut run).await.is_err());
    // Whoever asked is gone: the turn stays with the op until it has its end.
    drop(run);
    let mut next = Box::pin(cluster.run(vec![step(&session, 2, 2)]));
    assert!(tokio::time::timeout(A_WHILE, &mut next).await.is_err());
    cluster.nodes[1].asks[CONTROL].send_replace(Gate::Open);
    assert_eq!(applied(&next.await), (4, false));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_of_a_batch_go_as_their_turns_come() {
    let cluster = Cluster::start(1).await;
    let first = cluster.open("first", 1, &[(cluster.all(), &[0])]).await;
    let second = cluster.open("second", 1, &[(cluster.all(), &[0])]).await;
    let turn = first.turns.line_up().unwrap().turn().await;
    let batch = tokio::spawn(cluster.run(vec![step(&first, 1, 1), step(&second, 1, 1)]));
    until("the second one is applied", || second.lock().ledger.next_seq() == 2).await;
    // Nobody waits for it any more, while the batch waits for the first.
    assert_eq!(applied(&cluster.run(vec![step(&second, 2, 1)]).await), (2, false));
    assert!(!batch.is_finished());
    drop(turn);
    let results = batch.await.unwrap();
    assert_eq!(results.iter().map(|result| result.step).collect::<Vec<_>>(), [0, 1]);
    assert!(results.iter().all(|result| result.applied.is_some() && result.context.is_some()));
}

/// A table of so many MiB for sixteen heads.
fn large(mib: usize) -> Operator {
    let buckets = mib << 14;
    let table: Vec<f32> = (0..buckets * 16).map(|x| (x % 7) as f32 / 8.0).collect();
    let relative = Relative::new(table.into(), buckets, 1 << 20, false).unwrap();
    let parts = OperatorParts {
        biases: vec![Bias::Relative(relative)],
        ..OperatorParts::plain(0.25, Causal::BottomRight)
    };
    let shape = wide().shape(1, 3).unwrap();
    Operator::new(parts, &shape).unwrap()
}

fn wide() -> SessionSpec {
    SessionSpec { layers: 1, heads: 16, kv_heads: 2, ..spec(Dtype::F32, Storage::F32) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators_count_in_messages_and_too_large_ones_are_refused_before() {
    let cluster = Cluster::start(1).await;
    // Both shards on one worker, so a message to it has room for two operators or it hasn't.
    let [left, right] = halves().map(|slots| piece(0..2, slots));
    let session = cluster.open_as("s", wide(), &[(left, &[0]), (right, &[0])]).await;
    let node = &cluster.nodes[0];
    let with = |seq, operator: &Operator| Step {
        queries: Some(queries(&session.spec, operator)),
        ..step(&session, seq, 3)
    };
    let results = cluster.run(vec![with(1, &large(4))]).await;
    assert_eq!(applied(&results), (3, false));
    assert!(results[0].context.is_some(), "{:?}", results[0].failure);
    let works = |sent: &[Sent]| sent.iter().filter(|sent| matches!(sent, Sent::Works(_))).count();
    assert_eq!(works(&node.arrived(CONTROL)), 2);
    for (_, frame) in node.log.lock().unwrap().iter() {
        let bytes = limits::entry_bytes(frame);
        assert!(bytes <= limits::HOLD_REQUEST_BYTES, "{bytes}");
    }
    // A plain step is one message all the same.
    assert_eq!(applied(&cluster.run(vec![step(&session, 2, 1)]).await), (4, false));
    assert_eq!(works(&node.arrived(CONTROL)), 3);
    let shape = session.spec.shape(1, 7).unwrap();
    let mut over = queries(&session.spec, &plain());
    let mut message = proto::StepQueries::from(over.clone());
    let relative = proto::StepQueries::from(queries(&session.spec, &large(4))).operator.unwrap();
    message.operator = Some(proto::Operator { sinks: vec![0.0; 1 << 19], ..relative });
    over.operator = StepQueries::try_from(message).unwrap().operator;
    assert!(over.operator.decode(&shape).is_err());
    let results = cluster.run(vec![Step { queries: Some(over), ..step(&session, 3, 3) }]).await;
    let refused = failure(&results);
    assert_eq!((refused.reason, refused.outcome), (Reason::Operator, Outcome::NotExecuted));
    assert!(refused.message().contains("bytes, at most 5242880"), "{refused}");
    assert!(results[0].applied.is_none());
    assert_eq!(works(&node.arrived(CONTROL)), 3, "nothing of it was sent");
    assert!(!node.link.is_lost());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_that_comes_again_says_that_its_rows_are_there() {
    let cluster = Cluster::start(1).await;
    let session = cluster.open("s", 1, &[(cluster.all(), &[0])]).await;
    let first = step(&session, 1, 3);
    let context = cluster.run(vec![first.clone()]).await.remove(0).context.unwrap();
    // Over more tokens than there are.
    let beyond = StepQueries { at_len: Some(9), ..queries(&session.spec, &plain()) };
    let results = cluster.run(vec![Step { queries: Some(beyond), ..first.clone() }]).await;
    assert_eq!(applied(&results), (3, true));
    assert_eq!(failure(&results).message(), "AT_LEN: 9 > 3");
    // It looks at what it looked at then, as long as that is there.
    assert_eq!(applied(&cluster.run(vec![appending(&session, 2, 2)]).await), (5, false));
    let again = cluster.run(vec![first.clone()]).await;
    assert_eq!((applied(&again), again[0].context.as_ref()), ((3, true), Some(&context)));
    let cut = Change::Truncate { len: 4 };
    changes::change(&cluster, &session, 3, cut).await.unwrap();
    let results = cluster.run(vec![first.clone()]).await;
    assert_eq!(applied(&results), (3, true));
    assert_eq!(failure(&results).message(), "GENERATION: session 1, request 0");
    // Whoever says that it means what is there now, gets that.
    let now = StepQueries { generation: Some(1), at_len: Some(3), ..queries(&session.spec, &plain()) };
    let results = cluster.run(vec![Step { queries: Some(now), ..first }]).await;
    assert_eq!((applied(&results), &results[0].failure), ((3, true), &None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_whose_last_replica_goes_says_that_the_session_is_lost() {
    let mut cluster = Cluster::start(1).await;
    let session = cluster.open("s", 1, &[(cluster.all(), &[0])]).await;
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 3)]).await), (3, false));
    cluster.nodes[0].asks[CONTROL].send_replace(Gate::Shut);
    let mut read = Box::pin(cluster.run(vec![looking(&session)]));
    assert!(tokio::time::timeout(A_WHILE, &mut read).await.is_err());
    // Streams that break say nothing of the worker.
    cluster.misses(0);
    cluster.nodes[0].cut();
    let results = read.await;
    assert_eq!(failure(&results).message(), "SESSION_LOST: prefix 0 of 3");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partials_of_a_replica_that_was_dropped_are_asked_of_another() {
    let cluster = Cluster::start(2).await;
    let session = cluster.open("s", 2, &[(cluster.all(), &[0, 1])]).await;
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 3)]).await), (3, false));
    let (gone, other) = (&cluster.nodes[0], &cluster.nodes[1]);
    gone.answers[CONTROL].send_replace(false);
    let mut read = Box::pin(cluster.run(vec![looking(&session)]));
    assert!(tokio::time::timeout(A_WHILE, &mut read).await.is_err());
    // It is none any more, and what it says comes all the same.
    let before = other.arrived(CONTROL).len();
    session.handle(&cluster.sessions, LedgerEvent::Lost(gone.link.holder.clone()));
    gone.answers[CONTROL].send_replace(true);
    let results = read.await;
    assert!(results[0].context.is_some(), "{results:?}");
    let since = &other.arrived(CONTROL)[before..];
    assert!(since.iter().any(|sent| matches!(sent, Sent::Works(_))), "{since:?}");
}

/// Takes the one thread of a node, until it is dropped.
pub(super) fn occupied(node: &Node) -> std::sync::mpsc::Sender<()> {
    let (free, gate) = std::sync::mpsc::channel::<()>();
    node.store.submit(Vec::new(), Box::new(move || assert!(gate.recv().is_err())));
    free
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_compute_nothing_for_a_client_that_is_gone() {
    let cluster = Cluster::start(1).await;
    let session = cluster.open("s", 1, &[(cluster.all(), &[0])]).await;
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 3)]).await), (3, false));
    let node = &cluster.nodes[0];
    let works = || node.arrived(CONTROL).iter().filter(|sent| matches!(sent, Sent::Works(_))).count();
    let given_up = || node.arrived(CONTROL).iter().filter(|sent| matches!(sent, Sent::GiveUp(_))).count();
    assert_eq!((works(), given_up()), (1, 0), "nothing is given up that has its answer");
    let is_free = || node.store.reserve(256 * MIB).is_ok();
    let free = occupied(node);
    let mut read = Box::pin(cluster.run(vec![looking(&session)]));
    assert!(tokio::time::timeout(A_WHILE, &mut read).await.is_err());
    until("it waits for the thread", || works() == 2 && !is_free()).await;
    drop(read);
    until("its memory is back, before there is a thread for it", is_free).await;
    assert_eq!(given_up(), 1);
    // An append comes to its end, without its partials.
    let mut gone = Box::pin(cluster.run(vec![step(&session, 2, 2)]));
    assert!(tokio::time::timeout(A_WHILE, &mut gone).await.is_err());
    until("it waits for the thread", || works() == 3).await;
    drop(gone);
    until("it is given up", || given_up() == 2).await;
    drop(free);
    assert_eq!(applied(&cluster.run(vec![step(&session, 3, 1)]).await), (6, false));
    assert_eq!(node.state_of(&session, 0), (3, vec![6]));
    until("all is answered", is_free).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_know_how_long_somebody_waits_for_partials() {
    let cluster = Cluster::start(1).await;
    let session = cluster.open("s", 1, &[(cluster.all(), &[0])]).await;
    let node = &cluster.nodes[0];
    let free = occupied(node);
    let timeout = Duration::from_millis(80);
    let call = StepsCall::line_up(&cluster.sessions, vec![Ok(step(&session, 1, 3))]);
    let short = Patience::new(Deadline::after(now(), timeout), &super::super::patience::room());
    let sessions = Arc::clone(&cluster.sessions);
    let run = tokio::spawn(async move { call.run(&sessions, short).await });
    let left = || {
        let mut sent = node.arrived(CONTROL).into_iter();
        let works = sent.find_map(|sent| if let Sent::Works(works) = sent { Some(works) } else { None })?;
        Some(works.works[0].queries.as_ref().unwrap().timeout_ms)
    };
    until("it arrives", || left().is_some()).await;
    let left = left().unwrap();
    assert!((1..=75).contains(&left), "{left} ms of 80, less what the way back takes");
    tokio::time::sleep(timeout).await;
    drop(free);
    let late = tokio::time::timeout(SOON, run).await.unwrap().unwrap().unwrap_err();
    assert_eq!((late.message().as_str(), late.outcome), ("DEADLINE: expired", Outcome::Unknown));
    until("its rows are there all the same", || node.state_of(&session, 0) == (1, vec![3])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_its_worker_gave_up_is_missed() {
    let cluster = Cluster::start(2).await;
    let session = cluster.open("s", 2, &[(cluster.all(), &[0, 1])]).await;
    let alone = cluster.open("alone", 1, &[(cluster.all(), &[0])]).await;
    for session in [&session, &alone] {
        assert_eq!(applied(&cluster.run(vec![step(session, 1, 300)]).await), (300, false));
    }
    let before = cluster.run(vec![looking(&session)]).await;
    assert!(before[0].context.is_some(), "{before:?}");
    let node = &cluster.nodes[0];
    let asked = cluster.sessions.expected_at(&node.link.holder);
    assert_eq!(asked.len(), 2);
    cluster.sessions.miss(&node.link.holder, asked, &node.store.list());
    assert_eq!(session.lock().ledger.epoch(0), 1, "nothing is missing");
    let asked = cluster.sessions.expected_at(&node.link.holder);
    for session in [&session, &alone] {
        let key = (session.number, 0);
        node.store.resident(key).unwrap().change().damage(PageAt::default(), 7);
        assert_eq!(node.store.scrub_piece(key, PageAt::default()).await, None);
    }
    // Whoever asks gets it from the other one, with the same bits.
    let after = cluster.run(vec![looking(&session)]).await;
    assert_eq!(after, before);
    // There is no other one, but that isn't known yet.
    let none = cluster.run(vec![looking(&alone)]).await;
    assert_eq!(failure(&none).reason, Reason::Recovering);
    cluster.sessions.miss(&node.link.holder, asked, &node.store.list());
    until("it is no member", || session.lock().ledger.members(0).count() == 1).await;
    assert_eq!(cluster.run(vec![looking(&session)]).await, before);
    let lost = cluster.run(vec![looking(&alone)]).await;
    assert_eq!(failure(&lost).message(), "SESSION_LOST: prefix 0 of 300");
}
