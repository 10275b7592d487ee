//! Clients that don't wait for their answers.

use attnd_wire::session::{Answer, Ask};

use super::appends::{Client, begin_append};
use super::steps::occupied;
use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_computes_for_a_request_that_is_given_up() {
    let cluster = Cluster::start(1).await;
    let session = cluster.open("s", 1, &[(cluster.all(), &[0])]).await;
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 3)]).await), (3, false));
    let node = &cluster.nodes[0];
    let works = || node.arrived(CONTROL).iter().filter(|sent| matches!(sent, Sent::Works(_))).count();
    let is_free = || node.store.reserve(256 * MIB).is_ok();
    let free = occupied(node);
    let mut client = Client::connect(&cluster).await;
    client.send(1, Ask::Steps(vec![looking(&session)])).await;
    until("it waits for the thread", || works() == 2 && !is_free()).await;
    client.send(1, Ask::GiveUp).await;
    until("its memory is back, before there is a thread for it", is_free).await;
    assert!(node.arrived(CONTROL).iter().any(|sent| matches!(sent, Sent::GiveUp(_))));
    let Answer::Failed(ended) = client.answer(1).await else { panic!("nobody computed it") };
    assert_eq!((ended.message().as_str(), ended.outcome), ("CANCELLED: given up", Outcome::Unknown));
    drop(free);
    // It may come after the answer, and costs the others nothing.
    client.send(1, Ask::GiveUp).await;
    client.send(2, Ask::Steps(vec![looking(&session)])).await;
    assert!(matches!(client.answer(2).await, Answer::Steps(_)));
    client.send(3, Ask::GiveUp).await;
    let Answer::Failed(unknown) = client.answer(3).await else { panic!("there is no such request") };
    assert_eq!(unknown.message(), "STREAM_ORDER: expected Begin");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_append_that_is_given_up_is_taken_back() {
    let cluster = Cluster::start(2).await;
    let session = cluster.open("s", 2, &[(cluster.all(), &[0, 1])]).await;
    let mut client = Client::connect(&cluster).await;
    begin_append(&client, &session).await;
    client.send(1, Ask::GiveUp).await;
    assert!(matches!(client.answer(1).await, Answer::Failed(_)));
    until("it is taken back", || session.lock().ledger.in_flight().is_none()).await;
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 4)]).await), (4, false));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_close_comes_to_its_end_whoever_waits_for_it() {
    let cluster = Cluster::start(1).await;
    let session = cluster.open("s", 1, &[(cluster.all(), &[0])]).await;
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 3)]).await), (3, false));
    let name = session.name.clone();
    let mut close = Box::pin(cluster.sessions.close(&name));
    while session.lock().closed.is_none() {
        assert!(futures::poll!(&mut close).is_pending(), "it isn't marked before it waits");
    }
    drop(close);
    until("it is gone", || cluster.sessions.find(&name).is_err_and(|error| error.reason == Reason::Session))
        .await;
    let node = &cluster.nodes[0];
    let is_released = |lane| node.arrived(lane).iter().any(|sent| matches!(sent, Sent::Release(_)));
    until("its shard is released", || is_released(CONTROL) || is_released(BULK)).await;
    assert!(cluster.sessions.close(&name).await.unwrap(), "closed already");
}
