//! Works for whose partials nobody waits any more.

use super::*;

/// Takes all threads of a store of two, until it is dropped.
fn occupied(store: &Store) -> std::sync::mpsc::Sender<()> {
    let (free, gate) = std::sync::mpsc::channel::<()>();
    let gate = Arc::new(std::sync::Mutex::new(gate));
    for _ in 0..store.threads() {
        let gate = Arc::clone(&gate);
        store.submit(Vec::new(), Box::new(move || assert!(gate.lock().unwrap().recv().is_err())));
    }
    free
}

/// Waits until all memory of messages is free.
async fn all_is_free(store: &Store) {
    let free = async {
        while store.reserve(64 * MIB).is_err() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(SOON, free).await.expect("memory that nobody needs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn works_that_wait_are_given_up_at_once_but_for_their_rows() {
    let store = store(64 * MIB);
    let (url, calls) = serve(&store).await;
    let mut stream = Stream::open(&url, 1).await;
    let mut session = unopened(1);
    stream.ask(hold(&session)).await.unwrap();
    let rows = session.rows(0, &(0..300).collect::<Vec<_>>());
    session.layers[0].extend(0..300);
    let request = stream.send(HoldAsk::Works(vec![session.shard_work(0, Some(rows), None)])).await;
    assert!(stream.results(request, 0).await.0.is_some());
    let free = occupied(&store);
    let asks = |session: &Session| {
        let queries = session.queries(1, 300, Causal::None);
        HoldAsk::Works(vec![session.shard_work(0, None, Some(queries)); 2])
    };
    let looks = stream.send(asks(&session)).await;
    let rows = session.rows(0, &[7]);
    let queries = session.queries(1, 301, Causal::None);
    let changes = stream.send(HoldAsk::Works(vec![session.shard_work(0, Some(rows), Some(queries))])).await;
    let behind = stream.send(asks(&session)).await;
    stream.send_as(looks, HoldAsk::GiveUp).await;
    stream.send_as(changes, HoldAsk::GiveUp).await;
    stream.send_as(behind, HoldAsk::GiveUp).await;
    for request in [looks, behind] {
        let replies = stream.answer(request).await;
        for work in 0..2 {
            stream.early.insert(request, replies.clone());
            let (applied, _, failed) = stream.results(request, work).await;
            assert!(applied.is_none() && failed.starts_with("CANCELLED"), "{failed}");
        }
    }
    assert!(!stream.early.contains_key(&changes), "it has begun to wait for its turn");
    drop(free);
    let (applied, runs, failed) = stream.results(changes, 0).await;
    session.layers[0].push(7);
    assert_eq!((applied.unwrap().tokens, runs.len()), (vec![301, 0], 0));
    assert_eq!(failed, "CANCELLED: nobody waits for the partials");
    // To what has been answered nothing more is said.
    stream.send_as(changes, HoldAsk::GiveUp).await;
    // And with a stream goes all that waits on it.
    let free = occupied(&store);
    stream.send(asks(&session)).await;
    stream.send_as(99, HoldAsk::GiveUp).await;
    assert_eq!(stream.state(99).await.unwrap_err(), "STREAM_ORDER: expected Begin");
    assert!(store.reserve(64 * MIB).is_err());
    drop(stream);
    all_is_free(&store).await;
    drop(free);
    tokio::time::timeout(SOON, calls.idle()).await.unwrap();
    session.check(&store, 0, 301);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kernels_stop_once_nobody_waits_for_their_partials() {
    let store = store(64 * MIB);
    let (url, calls) = serve(&store).await;
    let mut stream = Stream::open(&url, 1).await;
    let mut session = unopened(1);
    stream.ask(hold(&session)).await.unwrap();
    let tokens: Vec<u64> = (0..1 << 17).collect();
    session.append(&store, 0, &tokens);
    // To compute all of it takes many times as long as to give it up.
    let long = |session: &Session, timeout| {
        let mut queries = session.queries(20_000, tokens.len(), Causal::None);
        (queries.tokens_per_cell, queries.timeout) = (5000, timeout);
        HoldAsk::Works(vec![session.shard_work(0, None, Some(queries))])
    };
    let given_up = stream.send(long(&session, None)).await;
    tokio::time::sleep(Duration::from_millis(30)).await;
    stream.send_as(given_up, HoldAsk::GiveUp).await;
    assert_eq!(stream.results(given_up, 0).await.2, "CANCELLED: nobody waits for the partials");
    let late = stream.send(long(&session, Some(Duration::from_millis(30)))).await;
    assert_eq!(stream.results(late, 0).await.2, "DEADLINE: expired");
    let _gone = stream.send(long(&session, None)).await;
    tokio::time::sleep(Duration::from_millis(30)).await;
    drop(stream);
    all_is_free(&store).await;
    // The threads are free, too.
    let mut stream = Stream::open(&url, 1).await;
    let queries = session.queries(1, 1000, Causal::None);
    let request = stream.send(HoldAsk::Works(vec![session.shard_work(0, None, Some(queries))])).await;
    assert!(stream.results(request, 0).await.2.is_empty());
    drop(stream);
    tokio::time::timeout(SOON, calls.idle()).await.unwrap();
}
