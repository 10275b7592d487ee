//! What sessions take, and that it goes back.

use super::*;

/// A page of two heads takes 256 x 2 x 128 x 4 bytes, an eighth of 2 MiB.
fn large() -> SessionSpec {
    SessionSpec { head_dim: 128, value_dim: 128, ..spec(Dtype::F32, Storage::F32) }
}

const PAGE: u64 = 256 << 10;

#[test]
fn what_does_not_fit_is_refused_with_the_numbers_and_leaves_no_trace() {
    // Eight pages.
    let store = store(2 * MIB);
    let mut session = Session::open(&store, 1, large(), vec![piece(0..2, 0..64)]);
    session.append(&store, 0, &(0..700).collect::<Vec<_>>());
    assert_eq!(store.resident_bytes(), 2 * MIB);
    let before = store.resident((1, 0)).unwrap().look().state(&store, false);
    let rows = session.rows(0, &(700..1100).collect::<Vec<_>>());
    let need = format!("KV_BUDGET: need {}, free {}", 4 * PAGE, 2 * PAGE);
    assert_eq!(session.refused(&store, 0, rows.clone()), need);
    let append = ShardAppend {
        at: session.at,
        layer: 0,
        op: rows.op,
        base_len: 700,
        tokens: 400,
        allow_non_finite: false,
    };
    let resident = store.resident((1, 0)).unwrap();
    let refused = resident.change().begin_bulk(&store, (1, 1), &append).unwrap_err();
    assert_eq!(refused.message(), need);
    assert_eq!(resident.look().state(&store, false), before);
    session.check(&store, 0, 700);
    session.seq -= 1;
    session.append(&store, 0, &(700..1024).collect::<Vec<_>>());
    session.check(&store, 0, 1024);
    let rows = session.rows(0, &[5]);
    assert_eq!(session.refused(&store, 0, rows), format!("KV_BUDGET: need {}, free 0", 2 * PAGE));
    session.seq -= 1;
    // What an append in chunks was promised others don't get.
    session.change(&store, ShardChangeKind::Truncate { len: 256 }).unwrap();
    session.generation += 1;
    session.layers[0].truncate(256);
    let append = ShardAppend { op: session.next_op(), base_len: 256, tokens: 512, ..append };
    assert!(resident.change().begin_bulk(&store, (1, 1), &append).unwrap().is_none());
    let mut other = Session::open(&store, 2, large(), vec![piece(0..2, 0..64)]);
    let rows = other.rows(0, &(0..257).collect::<Vec<_>>());
    let refused = other.refused(&store, 0, rows.clone());
    assert_eq!(refused, format!("KV_BUDGET: need {}, free {}", 4 * PAGE, 2 * PAGE));
    resident.change().abandon_bulk((1, 1));
    assert!(other.work(&store, 0, Some(rows), None).applied.is_some());
}

#[test]
fn a_fork_that_writes_needs_the_page_that_it_copies() {
    let store = store(2 * MIB);
    let mut session = Session::open(&store, 1, large(), vec![piece(0..2, 0..64)]);
    session.append(&store, 0, &(0..800).collect::<Vec<_>>());
    session.change(&store, ShardChangeKind::Fork { child: 2 }).unwrap();
    let rows = session.rows(0, &[5]);
    assert_eq!(session.refused(&store, 0, rows), format!("KV_BUDGET: need {}, free 0", 2 * PAGE));
    session.seq -= 1;
    let at = ShardAt { session: 2, shard: 0, epoch: 1 };
    store.release(&at).unwrap();
    session.append(&store, 0, &[5]);
    session.check(&store, 0, 801);
}

#[test]
fn opening_appending_and_closing_ten_thousand_times_returns_to_the_start() {
    let store = store(8 * MIB);
    let mut kept = Session::open(&store, u64::MAX, large(), vec![piece(0..2, 0..64)]);
    kept.append(&store, 0, &(0..10).collect::<Vec<_>>());
    let (bytes, records) = (store.resident_bytes(), store.0.records.reserved());
    for number in 0..10_000 {
        let mut session = Session::open(&store, number, large(), vec![piece(0..2, 0..64)]);
        session.append(&store, (number % 2) as usize, &[number]);
        if number % 3 == 0 {
            session.change(&store, ShardChangeKind::Fork { child: 1 << 40 }).unwrap();
            store.release(&ShardAt { session: 1 << 40, ..session.at }).unwrap();
        }
        let state = store.release(&session.at).unwrap();
        assert!(state.resident_bytes <= bytes + 2 * MIB);
    }
    assert_eq!((store.len(), store.0.records.reserved()), (1, records));
    assert!(store.resident_bytes() <= bytes + 2 * MIB);
    kept.check(&store, 0, 10);
}

#[test]
fn released_shards_are_empty_for_whoever_still_has_them() {
    let store = store(8 * MIB);
    let mut session = Session::open(&store, 1, large(), vec![piece(0..2, 0..64)]);
    session.append(&store, 0, &[1]);
    let work = Work::new(&store, session.shard_work(0, None, Some(session.queries(1, 1, Causal::None))));
    assert!(!store.release(&session.at).unwrap().replayed);
    let done = works::run_all(&store, vec![work], || true).remove(0).unwrap();
    assert_eq!(done.partials.unwrap_err().reason, Reason::Shard);
    assert!(store.release(&session.at).unwrap().replayed);
    assert_eq!(store.resident((1, 0)).unwrap_err().reason, Reason::Shard);
}

#[test]
fn accounts_of_shards_are_bounded_too() {
    let store = store(0);
    let many = SessionSpec { layers: 1024, heads: 1024, kv_heads: 1024, ..spec(Dtype::F32, Storage::F32) };
    let at = ShardAt { session: 1, shard: 0, epoch: 1 };
    let refused = Resident::new(&store, &at, many, vec![piece(0..1024, 0..64)]).unwrap_err();
    assert_eq!(refused.reason, Reason::Overloaded);
    assert!(refused.detail.starts_with("records of sessions need "), "{refused}");
}

#[tokio::test]
async fn sessions_stay_while_a_coordinator_is_there_and_for_a_while_without() {
    let store = store(8 * MIB);
    let present = store.present(2).unwrap();
    let second = store.present(2).unwrap();
    assert!(store.present(2).is_none());
    drop(second);
    let mut session = Session::open(&store, 1, large(), vec![piece(0..2, 0..64)]);
    session.append(&store, 0, &[1]);
    let keep = Duration::from_millis(50);
    let mut forgetting = std::pin::pin!(store.forget_when_left(keep));
    assert!(tokio::time::timeout(4 * keep, &mut forgetting).await.is_err());
    assert_eq!(store.len(), 1);
    // One that another has replaced is not there.
    present.term().store(3, Ordering::Relaxed);
    store.see_term(4).unwrap();
    assert_eq!(store.see_term(3).unwrap_err().message(), "FENCED: term 3 < 4");
    let gone = async {
        while store.len() > 0 || store.see_term(3).is_err() {
            tokio::time::sleep(keep / 10).await;
        }
    };
    tokio::select! {
        () = forgetting => {}
        waited = tokio::time::timeout(Duration::from_secs(10), gone) => waited.unwrap(),
    }
}

#[tokio::test(start_paused = true)]
async fn who_leaves_waits_for_its_shards_as_long_as_somebody_could_take_them() {
    let store = store(2 * MIB);
    let session = Session::open(&store, 1, spec(Dtype::F32, Storage::F32), vec![piece(0..2, 0..64)]);
    // Nobody could.
    store.handed_over().await;
    let stream = store.present(1).unwrap();
    let mut waits = Box::pin(store.handed_over());
    assert!(tokio::time::timeout(Duration::from_secs(60), &mut waits).await.is_err());
    store.release(&session.at).unwrap();
    waits.await;
    drop(stream);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_leaves_waits_for_a_coordinator_that_comes_back() {
    let store = store(2 * MIB);
    let session = Session::open(&store, 1, large(), vec![piece(0..2, 0..64)]);
    let is_over =
        async |after| tokio::time::timeout(Duration::from_secs(after), store.handed_over()).await.is_ok();
    let present = store.present(1);
    assert!(!is_over(20).await, "somebody is there");
    drop(present);
    assert!(!is_over(4).await, "it may start again");
    let present = store.present(1);
    assert!(!is_over(20).await, "it is back");
    drop(present);
    assert!(!is_over(4).await, "once more");
    assert!(is_over(2).await, "nobody comes");
    let present = store.present(1);
    store.release(&session.at).unwrap();
    assert!(is_over(1).await, "nothing is left");
    drop(present);
}
