//! Pages that change by themselves are found, and nothing is answered from them.

use super::copies::{export, take};
use super::pages::PageAt;
use super::*;

const HALF: Piece = Piece { groups: 0..2, slots: 0..32 };

/// Looks at all of a shard; bytes of pages.
async fn scrubbed(store: &Store, session: &Session) -> Option<u64> {
    let (mut next, mut bytes) = (Some(PageAt::default()), 0);
    while let Some(from) = next {
        let done = store.scrub_piece(key_of(&session.at), from).await?;
        (bytes, next) = (bytes + done.bytes, done.next);
    }
    Some(bytes)
}

fn damage(store: &Store, session: &Session, at: PageAt, word: usize) {
    store.resident(key_of(&session.at)).unwrap().change().damage(at, word);
}

/// Waits until so many shards are left.
async fn holds(store: &Store, shards: usize) {
    let left = async {
        while store.len() != shards {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), left).await.unwrap();
}

#[tokio::test]
async fn what_is_as_it_was_written_is_left_alone_however_it_came() {
    for storage in [Storage::F32, Storage::Int4] {
        let store = store(64 * MIB);
        let spec = spec(Dtype::F32, storage);
        let page = spec.page_layout().stored_bytes() as u64;
        let mut session = Session::open(&store, 1, spec, vec![HALF]);
        assert_eq!(scrubbed(&store, &session).await, Some(0));
        session.append(&store, 1, &(0..300).collect::<Vec<_>>());
        for name in 300..700 {
            session.append(&store, 1, &[name]);
        }
        // Pages 0 and 2 are in these slots, and the second one isn't full.
        assert_eq!(scrubbed(&store, &session).await, Some(2 * page));
        session.change(&store, ShardChangeKind::Fork { child: 2 }).unwrap();
        session.change(&store, ShardChangeKind::Truncate { len: 200 }).unwrap();
        session.generation += 1;
        session.layers[1].truncate(200);
        session.append(&store, 1, &(0..1000).collect::<Vec<_>>());
        session.append(&store, 0, &(0..100).collect::<Vec<_>>());
        assert_eq!(scrubbed(&store, &session).await, Some(2 * 2 * page));
        let child = Session { at: ShardAt { session: 2, shard: 0, epoch: 1 }, ..session.clone() };
        assert_eq!(scrubbed(&store, &child).await, Some(2 * page));
        // And so it is where it was copied to.
        let other = super::store(64 * MIB);
        take(&other, &export(&store, &session, None, 1)).unwrap();
        assert_eq!(scrubbed(&other, &session).await, Some(2 * 2 * page));
        session.check(&store, 1, 1200);
    }
}

#[tokio::test]
async fn a_replica_with_a_bit_that_flipped_answers_nothing_more() {
    let store = store(64 * MIB);
    let mut session = Session::open(&store, 1, spec(Dtype::F32, Storage::F32), vec![HALF]);
    let mut other = Session::open(&store, 2, spec(Dtype::F32, Storage::F32), vec![HALF]);
    for session in [&mut session, &mut other] {
        session.append(&store, 1, &(0..1200).collect::<Vec<_>>());
    }
    let at = PageAt { layer: 1, head: 1, page: 2 };
    damage(&store, &session, at, 5);
    // What has begun before it is found isn't answered either.
    let asked = || session.shard_work(1, None, Some(session.queries(1, 1200, Causal::None)));
    let begun = Work::new(&store, asked());
    assert_eq!(scrubbed(&store, &session).await, None);
    assert!(scrubbed(&store, &other).await.is_some());
    assert_eq!(store.list().len(), 1);
    let gone = "SHARD: session 0000000000000001 shard 0 is not here";
    let done = works::run_all(&store, vec![begun], || true).remove(0).unwrap();
    assert_eq!(done.partials.unwrap_err().message(), gone);
    assert_eq!(Work::new(&store, asked()).unwrap_err().message(), gone);
    other.check(&store, 1, 1200);
    // A whole one may come in its place.
    let mut again = Session::open(&store, 1, spec(Dtype::F32, Storage::F32), vec![HALF]);
    again.append(&store, 1, &(0..1200).collect::<Vec<_>>());
    again.check(&store, 1, 1200);
}

#[tokio::test]
async fn forks_with_the_page_go_too_and_whoever_came_before_it_was_found_gets_nothing() {
    let store = store(64 * MIB);
    let mut session = Session::open(&store, 1, spec(Dtype::F32, Storage::F32), vec![HALF]);
    session.append(&store, 1, &(0..1200).collect::<Vec<_>>());
    damage(&store, &session, PageAt { layer: 1, head: 0, page: 2 }, 9);
    session.change(&store, ShardChangeKind::Fork { child: 2 }).unwrap();
    // One of before the page, which another shard has too.
    let other = Session::open(&store, 3, spec(Dtype::F32, Storage::F32), vec![HALF]);
    let resident = store.resident((1, 0)).unwrap();
    let fork =
        ShardChange { at: session.at, op: session.next_op(), kind: ShardChangeKind::Fork { child: 4 } };
    assert_eq!(scrubbed(&store, &session).await, None);
    let gone = "SHARD: session 0000000000000001 shard 0 is not here";
    assert_eq!(shard::fork(&store, &resident, &fork, 4).unwrap_err().message(), gone);
    assert_eq!(resident.change().fence(&store, 5).unwrap_err().message(), gone);
    let child = Session { at: ShardAt { session: 2, shard: 0, epoch: 1 }, ..session.clone() };
    holds(&store, 1).await;
    assert_eq!(scrubbed(&store, &child).await, None);
    assert_eq!(store.list(), [other.at]);
}

#[tokio::test]
async fn what_only_an_old_copy_has_is_nothing_against_the_replica() {
    let store = store(64 * MIB);
    let mut session = Session::open(&store, 1, spec(Dtype::F32, Storage::F32), vec![HALF]);
    session.append(&store, 1, &(0..1200).collect::<Vec<_>>());
    damage(&store, &session, PageAt { layer: 1, head: 0, page: 2 }, 9);
    let (copy, _) = export::Export::new(&store.resident((1, 0)).unwrap(), None).unwrap();
    session.change(&store, ShardChangeKind::Truncate { len: 300 }).unwrap();
    session.generation += 1;
    session.layers[1].truncate(300);
    let chunks = (0..).map_while(|index| (copy.damaged().is_none()).then(|| copy.chunk(index)));
    assert_eq!(chunks.last().unwrap().unwrap_err().reason, Reason::Checksum);
    let (resident, at) = copy.damaged().unwrap();
    store.look_again(&resident, at);
    assert!(scrubbed(&store, &session).await.is_some(), "it comes behind, and finds it there");
    session.check(&store, 1, 300);
}

#[tokio::test]
async fn a_page_that_changed_by_itself_goes_to_nobody_else() {
    let store = store(64 * MIB);
    let mut session = Session::open(&store, 1, spec(Dtype::F32, Storage::F32), vec![HALF]);
    session.append(&store, 1, &(0..600).collect::<Vec<_>>());
    let at = PageAt { layer: 1, head: 0, page: 0 };
    damage(&store, &session, at, 2000);
    let (copy, _) = export::Export::new(&store.resident((1, 0)).unwrap(), None).unwrap();
    assert!(copy.damaged().is_none());
    assert_eq!(copy.chunk(0).unwrap_err().reason, Reason::Checksum);
    assert_eq!(copy.damaged().unwrap().1, at);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_is_looked_at_again_and_again() {
    let store = store(64 * MIB);
    let mut session = Session::open(&store, 1, spec(Dtype::F32, Storage::F32), vec![HALF]);
    session.append(&store, 0, &(0..600).collect::<Vec<_>>());
    let looks = tokio::spawn({
        let store = store.clone();
        async move { store.scrub(Duration::from_millis(40)).await }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(store.len(), 1);
    damage(&store, &session, PageAt::default(), 0);
    holds(&store, 0).await;
    looks.abort();
}
