//! What both stores promise, and what the file must survive.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use attnd_kernel::{Dtype, Storage};
use attnd_plan::Piece;
use attnd_plan::session::{SessionName, SessionSpec};
use futures::FutureExt as _;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::record::{Unreadable, VERSION};
use super::*;
use crate::coordinator::ending::Ending;

const FILE: &str = "sessions.redb";

fn holder(name: &str, incarnation: u64) -> Holder {
    Holder { worker: name.parse().unwrap(), incarnation }
}

fn record(name: &str) -> SessionRecord {
    let shard = |first: usize| ShardRecord {
        pieces: vec![
            Piece { groups: first..first + 1, slots: 0..32 },
            Piece { groups: first + 1..first + 2, slots: 3..64 },
        ],
        epoch: 1,
        members: vec![holder("w1", u64::MAX), holder("w2", 7)],
    };
    SessionRecord {
        name: SessionName::new(name).unwrap(),
        spec: SessionSpec {
            layers: 32,
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            value_dim: 64,
            dtype: Dtype::Bf16,
            storage: Storage::Int8,
            value_is_key_prefix: false,
            replicas: 2,
            acks: 1,
            ttl: Duration::from_secs(600),
            max_tokens: 1 << 20,
            allow_same_host: true,
        },
        writer_epoch: 1,
        shards: vec![shard(0), shard(2)],
        parent: Some(3),
        pending: false,
        created: Duration::from_secs(1_800_000_000),
    }
}

/// Runs a test on both stores.
fn on_both(test: impl Fn(&dyn MetaStore)) {
    test(&InMemory::new());
    let directory = tempfile::tempdir().unwrap();
    test(&RedbStore::open(directory.path()).unwrap());
}

const NOON: Duration = Duration::from_secs(1_800_000_000);

#[test]
fn sessions_are_found_by_number_and_name_until_they_are_removed() {
    on_both(|store| {
        assert_eq!((store.bump_term().unwrap(), store.bump_term().unwrap()), (1, 2));
        let a = store.create(&record("a")).unwrap();
        let reserved = store.reserve_number().unwrap();
        let b = store.create(&record("b")).unwrap();
        assert!(a < reserved && reserved < b);
        store.create_as(reserved, &record("c")).unwrap();
        assert_eq!(store.number_of("c").unwrap(), Some(reserved));
        assert_eq!(
            store.all().unwrap(),
            BTreeMap::from([(a, record("a")), (reserved, record("c")), (b, record("b"))])
        );
        let taken = store.create(&record("a")).unwrap_err();
        assert_eq!(taken.to_string(), format!("session {a} is named a"));
        for number in [0, a, b + 1, u64::MAX] {
            let error = store.create_as(number, &record("d")).unwrap_err();
            assert!(matches!(error, MetaError::Number { session } if session == number), "{error}");
        }
        assert!(store.remove(a, NOON).unwrap());
        assert!(!store.remove(a, NOON).unwrap());
        assert_eq!(store.number_of("a").unwrap(), None);
        assert!(store.create(&record("a")).unwrap() > b, "a number is never given twice");
    });
}

#[test]
fn names_of_closed_sessions_are_remembered_for_ten_minutes() {
    on_both(|store| {
        for name in ["a", "b"] {
            let number = store.create(&record(name)).unwrap();
            assert!(!store.was_closed(name, NOON).unwrap());
            store.remove(number, NOON).unwrap();
        }
        let later = |seconds| NOON + Duration::from_secs(seconds);
        assert!(store.was_closed("a", later(600)).unwrap() && !store.was_closed("a", later(601)).unwrap());
        assert!(store.was_closed("a", NOON - Duration::from_secs(3600)).unwrap(), "the clock was set back");
        assert!(!store.was_closed("c", NOON).unwrap());
        let number = store.create(&record("a")).unwrap();
        assert!(!store.was_closed("a", NOON).unwrap(), "it is open again");
        store.remove(number, later(700)).unwrap();
        assert!(store.was_closed("a", later(701)).unwrap());
        assert!(!store.was_closed("b", NOON).unwrap(), "it was forgotten");
    });
}

#[test]
fn members_change_only_from_the_epoch_that_was_seen() {
    on_both(|store| {
        let session = store.create(&record("a")).unwrap();
        let (two, three) = ([holder("w2", 7), holder("w3", 1)], [holder("w4", 1)]);
        store.update_shard(session, 1, 1, 2, &two).unwrap();
        store.update_shard(session, 1, 1, 2, &two).unwrap();
        let conflict = store.update_shard(session, 1, 1, 3, &three).unwrap_err();
        assert_eq!(conflict.to_string(), format!("shard 1 of session {session} has epoch 2, not 1"));
        let other = store.update_shard(session, 1, 1, 2, &three).unwrap_err();
        assert!(matches!(other, MetaError::Epoch { expected: 1, found: 2, .. }), "{other}");
        let back = store.update_shard(session, 1, 2, 2, &three).unwrap_err();
        assert!(matches!(back, MetaError::Backwards { old: 2, new: 2 }), "{back}");
        for (session, shard) in [(session, 2), (session + 1, 0)] {
            let error = store.update_shard(session, shard, 1, 2, &two).unwrap_err();
            assert!(matches!(error, MetaError::Unknown { .. }), "{error}");
        }
        store.set_writer_epoch(session, 2).unwrap();
        for epoch in [1, 2] {
            let error = store.set_writer_epoch(session, epoch).unwrap_err();
            assert!(matches!(error, MetaError::Backwards { old: 2, .. }), "{error}");
        }
        let kept = store.all().unwrap().remove(&session).unwrap();
        assert_eq!((kept.writer_epoch, kept.shards[1].epoch, &kept.shards[1].members[..]), (2, 2, &two[..]));
        assert_eq!(kept.shards[0], record("a").shards[0]);
    });
}

#[test]
fn what_is_pending_is_settled_or_never_was() {
    on_both(|store| {
        let pending = SessionRecord { pending: true, ..record("child") };
        let session = store.create(&pending).unwrap();
        let mut settled = record("child");
        settled.shards[1].members = vec![holder("w3", 5)];
        let renamed = SessionRecord { name: SessionName::new("other").unwrap(), ..settled.clone() };
        for (number, record) in [(session + 1, &settled), (session, &renamed)] {
            let error = store.settle(number, record).unwrap_err();
            assert!(matches!(error, MetaError::Unknown { shard: None, .. }), "{error}");
        }
        store.settle(session, &settled).unwrap();
        assert_eq!(store.all().unwrap(), BTreeMap::from([(session, settled.clone())]));
        let twice = store.settle(session, &settled).unwrap_err();
        assert!(matches!(twice, MetaError::Unknown { shard: None, .. }), "{twice}");
        assert!(store.forget(session).unwrap() && !store.forget(session).unwrap());
        assert!(!store.was_closed("child", NOON).unwrap(), "it never was");
        assert_eq!(store.number_of("child").unwrap(), None);
        assert!(store.create(&pending).unwrap() > session);
    });
}

#[test]
fn shards_of_many_sessions_change_at_once_each_by_itself() {
    on_both(|store| {
        let (a, b) = (store.create(&record("a")).unwrap(), store.create(&record("b")).unwrap());
        let update = |session, shard, expected, epoch| ShardUpdate {
            session,
            shard,
            expected,
            epoch,
            members: vec![holder("w5", 1)],
        };
        let updates = [
            update(a, 0, 1, 2),
            update(b, 1, 7, 8),
            update(a, 0, 2, 4),
            update(b, 0, 1, 3),
            update(b + 1, 0, 1, 2),
        ];
        let done: Vec<bool> = store.update_shards(&updates).unwrap().iter().map(Result::is_ok).collect();
        assert_eq!(done, [true, false, true, true, false]);
        let all = store.all().unwrap();
        let epochs = |session| all[&session].shards.iter().map(|shard| shard.epoch).collect::<Vec<_>>();
        assert_eq!((epochs(a), epochs(b)), (vec![4, 1], vec![3, 1]));
    });
}

#[test]
fn a_file_has_everything_that_was_answered_when_the_process_is_killed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(FILE);
    let mut expected = BTreeMap::new();
    for life in 1..=3_u64 {
        let store = RedbStore::open(directory.path()).unwrap();
        assert_eq!(store.bump_term().unwrap(), life);
        assert_eq!(store.all().unwrap(), expected);
        let name = format!("s{life}");
        let session = store.create(&record(&name)).unwrap();
        store.update_shard(session, 0, 1, 2, &[holder("w9", life)]).unwrap();
        let mut kept = record(&name);
        (kept.shards[0].epoch, kept.shards[0].members) = (2, vec![holder("w9", life)]);
        expected.insert(session, kept);
        // What is on disk at this moment is what a killed process leaves; closing writes more.
        let killed = fs::read(&path).unwrap();
        drop(store);
        fs::write(&path, killed).unwrap();
    }
    assert_eq!(RedbStore::open(directory.path()).unwrap().all().unwrap(), expected);
}

#[test]
fn two_coordinators_cannot_have_one_file() {
    let directory = tempfile::tempdir().unwrap();
    let first = RedbStore::open(directory.path()).unwrap();
    let second = RedbStore::open(directory.path()).unwrap_err();
    assert!(matches!(second, MetaError::InUse { .. }), "{second}");
    assert!(second.to_string().contains(FILE), "{second}");
    first.create(&record("a")).unwrap();
    drop(first);
    assert_eq!(RedbStore::open(directory.path()).unwrap().all().unwrap().len(), 1);
}

/// The bytes of a store with some sessions, closed in good order.
fn written(directory: &Path) -> Vec<u8> {
    let store = RedbStore::open(directory).unwrap();
    store.bump_term().unwrap();
    for i in 0..5 {
        store.create(&record(&format!("s{i}"))).unwrap();
    }
    drop(store);
    fs::read(directory.join(FILE)).unwrap()
}

#[test]
fn files_that_are_none_are_refused_and_left_as_they_are() {
    let directory = tempfile::tempdir().unwrap();
    let good = written(directory.path());
    let garbage: Vec<u8> = (0..good.len()).map(|i| (i * 31 % 251) as u8).collect();
    let begin = good[..good.len() / 2].to_vec();
    for bytes in [vec![], b"hello".to_vec(), garbage, vec![0; good.len()], begin] {
        let path = directory.path().join(FILE);
        fs::write(&path, &bytes).unwrap();
        let error = RedbStore::open(directory.path()).unwrap_err();
        assert!(matches!(error, MetaError::Corrupt { .. }), "{} bytes: {error}", bytes.len());
        assert!(
            error.to_string().contains("sessions.redb: ") && error.to_string().contains("move it away"),
            "{error}"
        );
    }
}

#[test]
fn damage_is_found_or_does_not_matter() {
    let directory = tempfile::tempdir().unwrap();
    let good = written(directory.path());
    let expected = RedbStore::open(directory.path()).unwrap().all().unwrap();
    let seed = 20_261_130;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut found = 0;
    for trial in 0..60 {
        let mut bytes = good.clone();
        if trial % 3 == 0 {
            bytes.truncate(rng.random_range(1..good.len()));
        } else {
            // Most of a file is free pages: the header, and a run long enough to hit something.
            let at = if trial % 3 == 1 { rng.random_range(0..400) } else { rng.random_range(0..good.len()) };
            let end = good.len().min(at + if trial % 3 == 1 { 1 } else { 4096 });
            bytes[at..end].iter_mut().for_each(|byte| *byte ^= 0x5a);
        }
        fs::write(directory.path().join(FILE), &bytes).unwrap();
        match RedbStore::open(directory.path()).and_then(|store| store.all()) {
            Ok(all) => assert_eq!(all, expected, "seed {seed}, trial {trial}"),
            Err(MetaError::Corrupt { .. }) => found += 1,
            Err(other) => panic!("seed {seed}, trial {trial}: {other}"),
        }
    }
    assert!(found >= 20, "{found} of 60: the damage hits nothing");
}

#[test]
fn records_return_and_other_versions_are_named() {
    let written = record("a").encode().unwrap();
    assert_eq!(SessionRecord::decode(&written).unwrap(), record("a"));
    let text = String::from_utf8(written).unwrap();
    let read = |from: &str, to: &str| {
        let changed = text.replacen(from, to, 1);
        assert_ne!(changed, text, "{from}");
        SessionRecord::decode(changed.as_bytes()).unwrap_err()
    };
    let version = format!("\"version\":{VERSION}");
    assert_eq!(read(&version, "\"version\":9,\"more\":1"), Unreadable::Version(9));
    for (from, to) in [
        (&version[..], "\"other\":1"),
        ("\"name\":\"a\"", "\"name\":\"a b\""),
        ("\"layers\":32", "\"layers\":0"),
        ("\"bf16\"", "\"bf17\""),
        ("[0,1,0,32]", "[0,1,0,65]"),
        ("[0,1,0,32]", "[8,9,0,32]"),
        ("[0,1,0,32]", "[1,1,0,32]"),
        ("\"worker\":\"w1\"", "\"worker\":\"\""),
        ("\"epoch\":1", "\"epoch\":-1"),
        ("\"parent\":3", "\"parents\":3"),
        ("\"pending\":false", "\"pending\":0"),
    ] {
        assert!(matches!(read(from, to), Unreadable::Corrupt(_)), "{to}");
    }
}

#[tokio::test]
async fn a_store_that_fails_ends_its_coordinator_and_a_refusal_does_not() {
    let (ending, io) = (Ending::default(), MetaError::Io { path: "p".into(), what: "no space".into() });
    let kept = || Arc::new(InMemory::new());
    let on_thread = MetaThread::start(kept(), ending.clone()).unwrap();
    for store in [on_thread, MetaThread::at_once(kept(), ending.clone())] {
        let unknown = store.run(|store| store.set_writer_epoch(7, 2)).await;
        assert!(matches!(unknown, Err(MetaError::Unknown { .. })), "{unknown:?}");
        assert!(ending.reason().now_or_never().is_none());
        let error = io.clone();
        assert!(store.run(move |_| Err::<(), _>(error)).await.is_err());
        let why = ending.reason().await;
        assert_eq!(why.exit_code(), 70, "{why}");
    }
}

#[tokio::test]
async fn transactions_run_in_order_and_a_panic_is_no_answer() {
    let ending = Ending::default();
    let store = MetaThread::start(Arc::new(InMemory::new()), ending.clone()).unwrap();
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let store = store.clone();
        waiting.push(tokio::task::spawn(async move { store.run(|store| store.bump_term()).await.unwrap() }));
    }
    let mut terms = Vec::new();
    for term in waiting {
        terms.push(term.await.unwrap());
    }
    terms.sort_unstable();
    assert_eq!(terms, [1, 2, 3]);
    assert!(store.run(|store| store.create(&record("a"))).await.unwrap() > 0);
    let panicked = store.run(|_| -> Result<(), MetaError> { panic!("of the test") }).await;
    assert!(matches!(panicked, Err(MetaError::Gone)));
    assert_eq!(ending.reason().await.exit_code(), 70);
    let after = store.run(|store| store.bump_term()).await;
    assert!(matches!(after, Err(MetaError::Gone)), "{after:?}");
}
