//! Ops: what is applied once, refused, taken back; forks, cuts and seals.

use super::*;

fn opened(store: &Store) -> Session {
    Session::open(store, 7, spec(Dtype::F32, Storage::F32), vec![piece(0..2, 0..64)])
}

/// What a shard has, but for how it came to it.
fn has(state: &ShardState) -> (u64, u64, u32, &[u64], u64) {
    (state.generation, state.op_seq, state.chain, &state.tokens, state.resident_bytes)
}

fn names(range: std::ops::Range<u64>) -> Vec<u64> {
    range.collect()
}

#[test]
fn an_op_that_comes_again_changes_nothing() {
    let store = store(64 * MIB);
    let mut session = opened(&store);
    session.append(&store, 0, &names(0..5));
    let rows = session.rows(0, &[9, 10]);
    session.layers[0].extend([9, 10]);
    let first = session.work(&store, 0, Some(rows.clone()), None).applied.unwrap();
    let again = session.work(&store, 0, Some(rows.clone()), None).applied.unwrap();
    assert_eq!(again, ShardState { replayed: true, ..first });
    session.check(&store, 0, 7);
    let mut other = rows.clone();
    other.op.digest += 1;
    assert_eq!(session.refused(&store, 0, other), "SEQ_REUSED: 2");
    let mut later = rows.clone();
    later.op.op_seq = 5;
    assert_eq!(session.refused(&store, 0, later), "SEQ_GAP: expected 3, got 5");
    let mut next = rows;
    next.op.op_seq = 3;
    assert_eq!(session.refused(&store, 0, next.clone()), "LENGTH: committed 7, base_len 5");
    next.op.generation = 1;
    assert_eq!(session.refused(&store, 0, next), "GENERATION: session 0, request 1");
    let rows = session.rows(0, &[1]);
    assert!(session.refused(&store, 2, rows).starts_with("SHAPE_LIMIT: layer 2 "));
}

#[test]
fn whoever_was_fenced_changes_and_sees_nothing() {
    let store = store(64 * MIB);
    let mut session = opened(&store);
    session.append(&store, 0, &names(0..5));
    let resident = store.resident((7, 0)).unwrap();
    let state = resident.change().fence(&store, 4).unwrap();
    assert_eq!((state.epoch, state.op_seq, &state.tokens[..]), (4, 1, &[5, 0][..]));
    assert_eq!(resident.change().fence(&store, 4).unwrap(), state);
    let refused = resident.change().fence(&store, 3).unwrap_err();
    assert_eq!(refused.message(), "EPOCH: shard at 4, request 3");
    let rows = session.rows(0, &[6]);
    assert_eq!(session.refused(&store, 0, rows.clone()), "EPOCH: shard at 4, request 1");
    let looked = session.work(&store, 0, None, Some(session.queries(1, 5, Causal::None)));
    assert_eq!(looked.partials.unwrap_err().message(), "EPOCH: shard at 4, request 1");
    assert_eq!(store.release(&session.at).unwrap_err().message(), "EPOCH: shard at 4, request 1");
    session.at.epoch = 4;
    assert!(session.work(&store, 0, Some(rows), None).applied.is_some());
    store.see_term(5).unwrap();
    assert_eq!(store.see_term(4).unwrap_err().message(), "FENCED: term 4 < 5");
    store.see_term(5).unwrap();
}

#[test]
fn forks_go_their_own_ways_and_share_what_neither_changes() {
    let store = store(64 * MIB);
    let mut parent = opened(&store);
    parent.append(&store, 0, &names(0..700));
    parent.append(&store, 1, &names(1000..1010));
    let before = store.resident_bytes();
    let state = parent.change(&store, ShardChangeKind::Fork { child: 8 }).unwrap();
    assert_eq!((state.op_seq, state.generation, store.resident_bytes()), (3, 0, before));
    let at = ShardAt { session: 8, shard: 0, epoch: 1 };
    let mut child = Session { at, seq: 0, ..parent.clone() };
    child.append(&store, 0, &names(5000..5300));
    parent.append(&store, 0, &names(6000..6001));
    for session in [&parent, &child] {
        session.check(&store, 0, session.layers[0].len());
        session.check(&store, 1, 10);
    }
    // A child of the child, whose parents go.
    child.change(&store, ShardChangeKind::Fork { child: 9 }).unwrap();
    let grandchild = Session { at: ShardAt { session: 9, ..at }, ..child.clone() };
    store.release(&parent.at).unwrap();
    store.release(&child.at).unwrap();
    grandchild.check(&store, 0, 1000);
    assert_eq!(store.resident((8, 0)).unwrap_err().reason, Reason::Shard);
    store.release(&grandchild.at).unwrap();
    assert!(store.resident_bytes() <= 2 * MIB, "but for what is kept");
}

#[test]
fn a_fork_that_comes_again_and_a_number_that_is_taken() {
    let store = store(64 * MIB);
    let mut parent = opened(&store);
    parent.append(&store, 0, &names(0..10));
    let change =
        ShardChange { at: parent.at, op: parent.next_op(), kind: ShardChangeKind::Fork { child: 8 } };
    let resident = store.resident((7, 0)).unwrap();
    let first = shard::fork(&store, &resident, &change, 8).unwrap();
    let again = shard::fork(&store, &resident, &change, 8).unwrap();
    assert_eq!(again, ShardState { replayed: true, ..first });
    let refused = parent.change(&store, ShardChangeKind::Fork { child: 8 }).unwrap_err();
    assert_eq!(refused.message(), "SESSION_EXISTS: session 0000000000000008");
    parent.seq -= 1;
    parent.append(&store, 0, &[1]);
    assert_eq!(store.len(), 2);
}

#[test]
fn a_fork_fills_the_child_that_room_was_asked_for() {
    let store = store(64 * MIB);
    let mut parent = opened(&store);
    parent.append(&store, 0, &names(0..300));
    // Somebody else's sessions, in all the room that there is but for one.
    let child = Session::open(&store, 8, parent.spec.clone(), parent.pieces.clone());
    let records = store.record(&parent.spec, &parent.pieces).unwrap();
    let (spec, pieces) = (parent.spec.clone(), parent.pieces.clone());
    let free = || std::iter::from_fn(|| store.record(&spec, &pieces).ok()).collect::<Vec<_>>();
    let all = free();
    parent.change(&store, ShardChangeKind::Fork { child: 8 }).unwrap();
    assert_eq!(store.len(), 2);
    let child = Session { layers: parent.layers.clone(), ..child };
    child.check(&store, 0, 300);
    // It gives back what it was counted for.
    drop((all, records));
    let before = free().len();
    store.release(&child.at).unwrap();
    assert_eq!(free().len(), before + 1);
    // One that has been used, or is cut otherwise, is none that waits for tokens.
    let mut used = Session::open(&store, 9, parent.spec.clone(), parent.pieces.clone());
    used.append(&store, 0, &[1]);
    Session::open(&store, 10, parent.spec.clone(), vec![piece(0..1, 0..64)]);
    for taken in [9, 10] {
        let refused = parent.change(&store, ShardChangeKind::Fork { child: taken }).unwrap_err();
        assert_eq!(refused.reason, Reason::SessionExists);
        parent.seq -= 1;
    }
    used.check(&store, 0, 1);
}

#[test]
fn what_was_cut_off_grows_again_with_other_rows() {
    let store = store(64 * MIB);
    let mut session = opened(&store);
    session.append(&store, 0, &names(0..600));
    session.append(&store, 1, &names(0..20));
    for len in [300, 256, 255, 0] {
        let state = session.change(&store, ShardChangeKind::Truncate { len }).unwrap();
        session.generation += 1;
        session.layers.iter_mut().for_each(|layer| layer.truncate(len));
        assert_eq!(
            (state.generation, &state.tokens[..]),
            (session.generation, &[len as u64, 20.min(len as u64)][..])
        );
        let from = 10_000 + len as u64;
        session.append(&store, 0, &names(from..from + 301));
        session.check(&store, 0, len + 301);
        session.layers[0].truncate(len);
        let _cut = session.change(&store, ShardChangeKind::Truncate { len }).unwrap();
        session.generation += 1;
    }
    assert!(store.resident_bytes() <= 2 * MIB);
    let refused = session.change(&store, ShardChangeKind::Truncate { len: 1 }).unwrap_err();
    assert_eq!(refused.message(), "AT_LEN: 1 > 0");
    session.seq -= 1;
    session.change(&store, ShardChangeKind::Seal).unwrap();
    let rows = session.rows(0, &[1]);
    assert_eq!(session.refused(&store, 0, rows).split(':').next(), Some("SEALED"));
}

#[test]
fn an_append_that_is_taken_back_was_never_there() {
    let store = store(64 * MIB);
    let mut session = opened(&store);
    let before = session.append(&store, 0, &names(0..300));
    let rows = session.rows(0, &names(900..1200));
    session.work(&store, 0, Some(rows.clone()), None).applied.unwrap();
    let undo = ShardChange { at: session.at, op: rows.op, kind: ShardChangeKind::Undo };
    let resident = store.resident((7, 0)).unwrap();
    let after = resident.change().apply(&store, &undo).unwrap();
    assert_eq!(has(&after), has(&before));
    // Undone is undone.
    assert_eq!(resident.change().apply(&store, &undo).unwrap(), after);
    session.check(&store, 0, 300);
    session.seq -= 1;
    session.append(&store, 0, &names(400..500));
    session.check(&store, 0, 400);
}

#[test]
fn short_work_runs_where_it_comes_unless_it_has_to_wait() {
    let store = store(MIB);
    let here = std::thread::current().id();
    let (ran, order) = std::sync::mpsc::channel();
    let key = (1, 0);
    let report = |what: &'static str| -> Job {
        let ran = ran.clone();
        Box::new(move || ran.send((what, std::thread::current().id())).unwrap())
    };
    store.submit_short(vec![(key, Access::Changes)], report("at once"));
    assert_eq!(order.try_recv(), Ok(("at once", here)));
    let (go, gate) = std::sync::mpsc::channel::<()>();
    store.submit(vec![(key, Access::Changes)], Box::new(move || assert!(gate.recv().is_err())));
    store.submit_short(vec![(key, Access::Reads)], report("behind"));
    store.submit_short(vec![((2, 0), Access::Reads)], report("beside"));
    assert_eq!(order.recv(), Ok(("beside", here)));
    drop(go);
    let (what, thread) = order.recv().unwrap();
    assert_eq!(what, "behind");
    assert_ne!(thread, here, "nobody waits for a turn on the thread of a stream");
    // A panic costs nobody else a turn.
    store.submit_short(vec![(key, Access::Changes)], Box::new(|| panic!("a short job")));
    store.submit_short(vec![(key, Access::Changes)], report("after"));
    assert_eq!(order.recv().unwrap().0, "after");
}
